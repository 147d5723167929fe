"""A log on NATS JetStream servers: `Log` says where it is, `trio_wal.open_wal` opens it.

Law: what is said and checked; nats-py is loaded when a log is opened, by ``_natscas``.

Needs the extra ``nats``.  Servers that would make the log less durable than it promises are refused
by name, before a byte is written.

::

    log = trio_wal.nats.Log(
        ["nats://n0:4222", "nats://n1:4222", "nats://n2:4222"],
        "orders",
        monitor=["http://n0:8222", "http://n1:8222", "http://n2:8222"],
    )
    async with trio_wal.open_wal(log) as wal:
        lsn = await wal.append(b"order 17: two of blue")
"""

from __future__ import annotations

import errno
import importlib
import re
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, cast, final
from urllib.parse import parse_qs, unquote, urlsplit

import attrs
import trio

from . import _exports
from ._caslog import CasLog, Denied, Description, RemoteLog, Unsure
from ._exceptions import LogUnavailableError, UnsuitableServersError as UnsuitableServersError
from ._streamlog import Patience
from ._util import check_bool, check_int, check_seconds

if TYPE_CHECKING:
    from ._natscas import NatsCas

REPLICAS_MAX: Final = 5
NAME_PATTERN: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
SCHEMES: Final = ("nats", "tls")


def _servers(value: str | Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    servers = tuple(value)
    if not servers:
        raise ValueError("servers must name at least one server")
    for server in servers:
        if not isinstance(server, str):
            raise TypeError(f"servers must be URLs, not {type(server).__name__}")
        _check_server(server)
    return servers


def _check_server(server: str) -> None:
    try:
        parts = urlsplit(server)
        port = parts.port
    except ValueError as exc:
        raise ValueError(f"servers: {exc}") from None
    if parts.scheme not in SCHEMES or not parts.hostname or port is None:
        raise ValueError(
            f"servers must be URLs such as 'nats://host:4222', not {_without_password(server)!r}"
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError("servers must not carry a password: use user= and password=")
    if parts.path.strip("/") or parts.query:
        raise ValueError(f"servers must include the port, as in 'nats://host:4222', not {server!r}")


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", url)


def _monitors(value: str | Iterable[str]) -> tuple[str, ...]:
    monitors = (value,) if isinstance(value, str) else tuple(value)
    for url in monitors:
        if not isinstance(url, str):
            raise TypeError(f"monitor must be URLs, not {type(url).__name__}")
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"monitor must be URLs such as 'http://host:8222', not {url!r}")
    return tuple(url.rstrip("/") for url in monitors)


def _check_name(_: object, __: object, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"name must be a str, not {type(value).__name__}")
    if NAME_PATTERN.fullmatch(value) is None:
        raise ValueError(f"name must be 1 to 64 letters, digits, '_' and '-', not {value!r}")


def _optional_str(_: object, field: Any, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{field.name} must be a str, not {type(value).__name__}")


def _check_tls(_: object, __: object, value: Any) -> None:
    if value is not None and not isinstance(value, ssl.SSLContext):
        raise TypeError(f"tls must be an ssl.SSLContext, not {type(value).__name__}")


def _seconds(value: float) -> float:
    return check_seconds("unavailable_after", value)


def _check_flag(_: object, field: Any, value: Any) -> None:
    check_bool(field.name, value)


def _check_replicas(_: object, __: object, value: Any) -> None:
    check_int("replicas", value, 1, REPLICAS_MAX)


def _check_max_bytes(_: object, __: object, value: Any) -> None:
    if value is not None:
        check_int("max_bytes", value, 1)


@final
@attrs.frozen
class Log(RemoteLog):
    """Where a log is on NATS servers, and how it is reached.  A description: nothing is connected
    before it is opened.

    Attributes:
      servers: URLs such as ``nats://host:4222``; one is enough to begin with, all are better.
      name: of the log: 1 to 64 letters, digits, ``_`` and ``-``.  Its stream is ``WAL-<name>``, its
        subject ``wal.<name>``.
      user, password: for servers that want them.
      nkey_seed: the seed of an nkey, as text.
      tls: an `ssl.SSLContext` for servers that want TLS.
      monitor: the servers' monitoring URLs, by which each is asked whether it syncs every write;
        where none are given, port 8222 of each server is tried.
      assume_synced: do not ask, and take their word; ``statistics()`` shows it.
      replicas: how many servers keep a copy.  With one, what that server loses is lost.
      max_bytes: of the stream, where opening creates it; None: no limit.
      unavailable_after: seconds that a batch in flight may be without an outcome.
      takeover: open it also while another owner is alive, which is fenced then.
    """

    servers: tuple[str, ...] = attrs.field(converter=_servers)
    name: str = attrs.field(validator=_check_name)
    user: str | None = attrs.field(default=None, kw_only=True, validator=_optional_str, repr=False)
    password: str | None = attrs.field(
        default=None, kw_only=True, validator=_optional_str, repr=False
    )
    nkey_seed: str | None = attrs.field(
        default=None, kw_only=True, validator=_optional_str, repr=False
    )
    tls: ssl.SSLContext | None = attrs.field(default=None, kw_only=True, validator=_check_tls)
    monitor: tuple[str, ...] = attrs.field(default=(), kw_only=True, converter=_monitors)
    assume_synced: bool = attrs.field(default=False, kw_only=True, validator=_check_flag)
    replicas: int = attrs.field(default=3, kw_only=True, validator=_check_replicas)
    max_bytes: int | None = attrs.field(default=None, kw_only=True, validator=_check_max_bytes)
    unavailable_after: float = attrs.field(default=30.0, kw_only=True, converter=_seconds)
    takeover: bool = attrs.field(default=True, kw_only=True, validator=_check_flag)

    @classmethod
    def parse(cls, url: str) -> Log:
        """The log that a URL names: ``nats://[user:password@]host:4222[,host2:4222...]/name``.

        After a ``?``: ``monitor`` (again for each server), ``replicas``, ``max_bytes``,
        ``unavailable_after``, ``assume_synced`` and ``takeover`` (``true`` or ``false``).

        Raises:
          ValueError: it is no such URL; the message says what is wrong, and not the password.
        """
        return _parse(url)

    @property
    def address(self) -> str:
        """Servers and name without credentials, as messages show them."""
        hosts = ",".join(urlsplit(server).netloc for server in self.servers)
        return f"{urlsplit(self.servers[0]).scheme}://{hosts}/{self.name}"

    async def connect(self, *, create: bool) -> tuple[CasLog, Description]:
        """For `open_wal` and the like: a connection to a log that is as it should be.

        Raises:
          UnsuitableServersError: the servers or the stream are not what a log needs.
          PermissionError: wrong credentials, or no permission.
          LogUnavailableError: no server answers.
          FileNotFoundError: there is no such log, and it is not to be created.
          ModuleNotFoundError: nats-py is not installed.
        """
        _require_nats()
        from . import _natscas

        access = _natscas.Access(
            servers=self.servers,
            name=self.name,
            user=self.user,
            password=self.password,
            nkey_seed=self.nkey_seed,
            tls=self._context(),
        )
        address = self.address
        started = trio.current_time()
        try:
            cas = await _natscas.open_connection(access, address)
        except _natscas.Refused as exc:
            text = f"{address}: the servers refuse the connection, check credentials and TLS: {exc}"
            raise PermissionError(errno.EACCES, text) from exc
        except Unsure as exc:
            seconds = trio.current_time() - started
            raise LogUnavailableError(address, seconds, f"{exc}", "not written") from exc
        try:
            return cas, await self._look(cas, create=create)
        except Denied as exc:
            await cas.aclose()
            raise PermissionError(errno.EACCES, f"{address}: no permission: {exc}") from exc
        except Unsure as exc:
            await cas.aclose()
            seconds = trio.current_time() - started
            raise LogUnavailableError(address, seconds, f"{exc}", "not written") from exc
        except BaseException:
            with trio.CancelScope(shield=True):
                await cas.aclose()
            raise

    async def _look(self, cas: NatsCas, *, create: bool) -> Description:
        """Again, where a leader is just being elected.  Raises `Denied`, `Unsure` and others."""
        from ._natscheck import Opening

        patience = Patience(cas, self.unavailable_after)
        while True:
            try:
                return await Opening(cast(Any, self), cas).run(create=create)
            except Unsure:
                if patience.over:
                    raise
            await patience.pause()

    def _context(self) -> ssl.SSLContext | None:
        if self.tls is None and any(server.startswith("tls:") for server in self.servers):
            return ssl.create_default_context()
        return self.tls


def _parse(url: str) -> Log:
    if not isinstance(url, str):
        raise TypeError(f"url must be a str, not {type(url).__name__}")
    shown = _without_password(url)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ValueError(f"a log's URL must begin with 'nats://', not {shown!r}")
    location, _, query = rest.partition("?")
    hosts, _, name = location.partition("/")
    credentials, at, hosts = hosts.rpartition("@")
    if not name:
        raise ValueError(
            f"a log's URL must end with the log's name, as in 'nats://host:4222/orders', "
            f"not {shown!r}"
        )
    options: dict[str, Any] = {}
    if at:
        user, _, password = credentials.partition(":")
        options.update(user=unquote(user), password=unquote(password))
    try:
        given = parse_qs(query, strict_parsing=True) if query else {}
    except ValueError as exc:
        raise ValueError(f"a log's URL: {exc}") from None
    for key, values in given.items():
        options[key] = _option(key, values)
    servers = [
        f"{scheme}://{host}" if re.search(r":\d+$", host) else f"{scheme}://{host}:4222"
        for host in hosts.split(",")
    ]
    return Log(servers, name, **options)


def _option(key: str, values: list[str]) -> Any:
    if key == "monitor":
        return tuple(values)
    if len(values) > 1:
        raise ValueError(f"a log's URL names {key!r} twice")
    text = values[0]
    try:
        if key in ("replicas", "max_bytes"):
            return int(text)
        if key == "unavailable_after":
            return float(text)
    except ValueError:
        raise ValueError(f"a log's URL: {key} must be a number, not {text!r}") from None
    if key in ("assume_synced", "takeover"):
        if text not in ("true", "false"):
            raise ValueError(f"a log's URL: {key} must be 'true' or 'false', not {text!r}")
        return text == "true"
    raise ValueError(f"a log's URL has no option {key!r}")


def _require_nats() -> None:
    try:
        importlib.import_module("nats.aio.client")
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            "a log on NATS servers needs nats-py: python -m pip install 'trio-wal[nats]'",
            name="nats",
        ) from exc


_exports.say_public(__name__, {"Log": Log, "UnsuitableServersError": UnsuitableServersError})
