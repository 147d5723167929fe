"""Are NATS servers, and the stream of a log on them, as a log needs them?

Law: looks and refuses, and makes the stream where there is none.  Each refusal has its own message
with what to do; nothing is written to a log before all of it holds.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import ssl
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, Protocol, final
from urllib.parse import urlsplit

import attrs
import trio

from ._caslog import Description, Unsure
from ._events import tell
from ._exceptions import UnsuitableServersError, UnsupportedFormatError
from ._natscas import NAME_IN_USE, NO_PEERS, OVERLAP, ApiError, NatsCas

VERSION_MIN: Final = (2, 12)
"""Of the servers: the first with atomic batches, and with repairs of what lost data before."""
MONITOR_SECONDS: Final = 2.0
MONITOR_PORT: Final = 8222
CREATE_SECONDS: Final = 2.0
"""How long servers may be too few for a new stream before that is an error."""
METADATA_UUID: Final = "trio-wal-uuid"
METADATA_FORMAT: Final = "trio-wal-format"
"""What a stream says of its messages; one that says nothing has the first format."""
STREAM_FORMAT: Final = 1


class Wanted(Protocol):
    """What `trio_wal.nats.Log` says."""

    @property
    def address(self) -> str: ...
    @property
    def servers(self) -> tuple[str, ...]: ...
    @property
    def monitor(self) -> tuple[str, ...]: ...
    @property
    def tls(self) -> ssl.SSLContext | None: ...
    @property
    def assume_synced(self) -> bool: ...
    @property
    def replicas(self) -> int: ...
    @property
    def max_bytes(self) -> int | None: ...


@attrs.frozen(kw_only=True)
class Server:
    """What a server's monitoring says."""

    url: str
    name: str = ""
    version: tuple[int, ...] = ()
    jetstream: bool = False
    synced: bool = False
    """Whether it syncs every write."""
    cluster_size: int = 1
    problem: str = ""
    """Why it could not be asked."""


def ask_server(url: str, tls: ssl.SSLContext | None = None) -> Server:
    """Blocking."""
    try:
        with urllib.request.urlopen(f"{url}/varz", timeout=MONITOR_SECONDS, context=tls) as answer:
            found: Any = json.load(answer)
        jetstream: dict[str, Any] = found.get("jetstream") or {}
        config: dict[str, Any] = jetstream.get("config") or {}
        meta: dict[str, Any] = jetstream.get("meta") or {}
        return Server(
            url=url,
            name=str(found["server_name"]),
            version=_version(str(found["version"])),
            jetstream=bool(config),
            synced=bool(config.get("sync_always")),
            cluster_size=int(meta.get("cluster_size", 1)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        reason = getattr(exc, "reason", exc)
        return Server(url=url, problem=str(reason) or type(exc).__name__)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


async def ask_servers(log: Wanted) -> list[Server]:
    """All at once, each within `MONITOR_SECONDS`."""
    urls = log.monitor or tuple(
        f"http://{urlsplit(server).hostname}:{MONITOR_PORT}" for server in log.servers
    )

    def ask() -> list[Server]:
        with ThreadPoolExecutor(max_workers=max(1, len(urls))) as pool:
            return list(pool.map(partial(ask_server, tls=log.tls), urls))

    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)


def fault_of(server: Server) -> tuple[str, str] | None:
    """Why no log may be on a server that was asked, and what to do about it."""
    who = f"{server.url} ({server.name})"
    if server.version[:2] < VERSION_MIN:
        return _too_old(who, server.version)
    if not server.jetstream:
        return f"{who} has no JetStream", "enable it in its configuration"
    if not server.synced:
        remedy = "set 'jetstream { sync_interval: always }' on every server"
        return f"{who} does not sync every write", remedy
    return None


def _too_old(who: str, version: tuple[int, ...]) -> tuple[str, str] | None:
    if version[:2] >= VERSION_MIN:
        return None
    shown, least = ".".join(map(str, version)), ".".join(map(str, VERSION_MIN))
    return f"{who} is nats-server {shown}, which is too old", f"update it to {least} or newer"


@final
class Opening:
    """Looks at servers and stream, and refuses what is not as it should be."""

    def __init__(self, log: Wanted, cas: NatsCas) -> None:
        self._log = log
        self._cas = cas

    def _refuse(self, reason: str, remedy: str) -> UnsuitableServersError:
        return UnsuitableServersError(self._log.address, reason, remedy)

    async def run(self, *, create: bool) -> Description:
        """
        Args:
          create: for a writer: who only reads need not know how what is durable became so.
        """
        log, cas = self._log, self._cas
        if not any(cas.server_version):
            # Between two servers: the one that was connected has died.
            raise Unsure("the connection was lost")
        if (wrong := _too_old("the server", cas.server_version)) is not None:
            raise self._refuse(*wrong)
        asks = create and not log.assume_synced
        servers = await self._ask() if asks else []
        info = await self._find(servers, create=create)
        self._check_config(info["config"])
        if asks:
            self._check_asked(servers, info)
        cas.assume_synced = log.assume_synced
        cas.use(self._uuid_of(info["config"]))
        return cas.description_of(info)

    async def _ask(self) -> list[Server]:
        servers = await ask_servers(self._log)
        for server in servers:
            if not server.problem and (wrong := fault_of(server)) is not None:
                raise self._refuse(*wrong)
        return servers

    def _unasked(self, who: str) -> UnsuitableServersError:
        return self._refuse(
            f"nobody says whether {who} syncs every write",
            "give the monitoring URL of every server with monitor=, or say assume_synced=True",
        )

    async def _find(self, servers: list[Server], *, create: bool) -> Any:
        log, cas = self._log, self._cas
        try:
            info = await cas.info()
            if info is not None:
                return info
            if not create:
                text = f"{log.address}: there is no such log"
                raise FileNotFoundError(errno.ENOENT, text)
            self._check_enough(servers)
            try:
                await self._create()
            except ApiError as exc:
                if exc.code == OVERLAP:
                    raise self._refuse(
                        f"another stream takes the subject {cas.access.subject!r}: {exc}",
                        "choose another name for the log, or remove that subject from the stream",
                    ) from exc
                # Somebody else may have made it meanwhile.
                if exc.code != NAME_IN_USE:
                    raise
            info = await cas.info()
        except ApiError as exc:
            raise self._refuse(
                f"the servers refused to create the stream: {exc}",
                "check JetStream, its limits, and how many servers there are",
            ) from exc
        if info is None:
            raise Unsure("the stream was just created, but it is not there")
        return info

    async def _create(self) -> None:
        """Again for a while, where servers have just come back and not all have noticed."""
        until = trio.current_time() + CREATE_SECONDS
        while True:
            try:
                await self._cas.create(self._config())
                return
            except ApiError as exc:
                if exc.code != NO_PEERS or trio.current_time() > until:
                    raise
            await trio.sleep(0.1)

    def _check_enough(self, servers: list[Server]) -> None:
        """For a log that is about to be made every server must have been asked."""
        log = self._log
        for server in servers:
            if server.problem:
                raise self._unasked(f"{server.url} ({server.problem})")
        size = max((server.cluster_size for server in servers), default=log.replicas)
        if size < log.replicas:
            raise self._refuse(
                f"there are {size} servers for {log.replicas} replicas",
                "add servers, or say replicas=1 where one copy is enough",
            )
        if servers and len({server.name for server in servers}) < size:
            raise self._unasked(f"each of the {size} servers")

    def _config(self) -> dict[str, Any]:
        log, access = self._log, self._cas.access
        return {
            "name": access.stream,
            "description": "a log of trio-wal: do not publish to it, and remove nothing",
            "subjects": [access.subject],
            "retention": "limits",
            "storage": "file",
            "num_replicas": log.replicas,
            "discard": "new",
            "max_bytes": -1 if log.max_bytes is None else log.max_bytes,
            "max_msgs": -1,
            "max_age": 0,
            "max_msg_size": -1,
            "duplicate_window": 1_000_000_000,
            "deny_delete": True,
            "allow_direct": True,
            "allow_atomic": True,
            "metadata": {METADATA_UUID: uuid.uuid4().hex, METADATA_FORMAT: str(STREAM_FORMAT)},
        }

    def _uuid_of(self, config: Any) -> uuid.UUID:
        metadata: dict[str, Any] = config.get("metadata") or {}
        text = metadata.get(METADATA_UUID)
        try:
            return uuid.UUID(str(text))
        except ValueError:
            raise self._refuse(
                f"the stream {config.get('name')!r} was not created by trio-wal",
                "choose another name for the log, or another account",
            ) from None

    def _check_format(self, config: Any) -> None:
        text = str(config["metadata"].get(METADATA_FORMAT, STREAM_FORMAT))
        if text != str(STREAM_FORMAT):
            number = int(text) if text.isascii() and text.isdigit() else -1
            raise UnsupportedFormatError(self._log.address, number, "format of the stream")

    def _check_config(self, config: Any) -> None:
        log = self._log
        self._uuid_of(config)
        self._check_format(config)
        stream = config.get("name")
        replicas = int(config.get("num_replicas", 1))
        if replicas < log.replicas:
            raise self._refuse(
                f"the stream {stream!r} has {replicas} replicas, but {log.replicas} were asked for",
                f"'nats stream edit --replicas {log.replicas} {stream}', or say "
                f"replicas={replicas} where that is enough",
            )
        wanted: dict[str, Any] = {
            "storage": "file",
            "discard": "new",
            "retention": "limits",
            "subjects": [self._cas.access.subject],
            "deny_delete": True,
            "allow_direct": True,
            "allow_atomic": True,
        }
        unlimited = ("max_msgs", "max_age", "max_msgs_per_subject", "max_msg_size")
        for key, value in wanted.items():
            if config.get(key, False) != value:
                raise self._refuse(
                    f"the stream {stream!r} has {key} = {config.get(key)!r}, not {value!r}",
                    "make a new log with another name, and copy this one into it",
                )
        for key in unlimited:
            if int(config.get(key, 0)) > 0:
                raise self._refuse(
                    f"the stream {stream!r} has {key} = {config[key]}, and would lose or refuse "
                    "records",
                    "remove that limit",
                )
        for key in ("mirror", "sources", "subject_transform", "republish", "sealed", "no_ack"):
            if config.get(key):
                raise self._refuse(
                    f"the stream {stream!r} has {key!r}, which a log must not have", "remove it"
                )

    def _check_asked(self, servers: list[Server], info: Any) -> None:
        """Each server that keeps a copy must have been asked, but for those that are down.

        They were when the log was made; and to take a log over because a server has died is what it
        is kept on several for.
        """
        cluster: dict[str, Any] = info.get("cluster") or {}
        asked = {server.name for server in servers if not server.problem}
        replicas: list[dict[str, Any]] = cluster.get("replicas") or []
        copies: dict[str, dict[str, Any]] = {one["name"]: one for one in replicas}
        if leader := cluster.get("leader"):
            copies[leader] = {}
        problems = ", ".join(f"{one.url} ({one.problem})" for one in servers if one.problem)
        for name, one in sorted(copies.items()):
            if name not in asked and one.get("current", True):
                # Its address is wrong, or a network is cut and the leader does not know it yet.
                raise self._unasked(f"{name}, perhaps {problems}," if problems else name)
        if 2 * len(asked) <= int(info["config"].get("num_replicas", 1)):
            raise self._unasked(problems or "a majority of the servers")
        if down := sorted(copies.keys() - asked):
            text = f"{', '.join(down)} cannot be asked whether each write is synced there"
            tell(logging.WARNING, "unasked", self._log.address, text, servers=down)
