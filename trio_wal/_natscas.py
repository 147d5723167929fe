"""A `CasLog` on a JetStream stream, by nats-py in an asyncio thread of its own.

Law: the only file that knows nats-py, and imported only when such a log is opened.  One call is
one request; what it says of its outcome is what the server said, and "no answer" is never more
than that.

Sources: NATS ADR-31 (direct get, in batches), ADR-50 (atomic batches), and the server's error codes
(server/errors.json of nats-server 2.12).
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, Final, TypeVar, final

import attrs
import nats
import nats.errors
import trio
from nats.aio.client import Client
from nats.aio.msg import Msg

from ._asyncio import AsyncioThread
from ._caslog import Conflict, Denied, Description, Entry, Full, Gone, Unsure
from ._messages import HEADER
from ._util import KiB

T = TypeVar("T")

TRY_SECONDS: Final = 2.0
"""For one request, and a second for each 4 MB that it carries: then its outcome is not known."""
READ_SECONDS: Final = 1.0
"""For one answer to a read: a stream without a leader gives none, and every second more that is
waited for it is one more without acknowledgements."""
CONNECT_SECONDS: Final = 2.0
HEADERS_BYTES: Final = 4 * KiB
"""Of a message's limit that are kept for its headers."""
PIECES_MAX: Final = 1000
"""Messages of one atomic batch that a server takes (2.12)."""
READ_MESSAGES: Final = 1024
"""Asked for at once."""
RING_SECONDS: Final = 0.1
"""After the bell has rung there may be more for so long: it rings when a message is sent, not when
a majority has it."""
LOOK_SECONDS: Final = 0.003
"""Between two looks in that time."""
OWNER_SECONDS: Final = 1.0

WRONG_LAST: Final = 10071
"""Error code: the stream does not end where `append` said."""
STREAM_NOT_FOUND: Final = 10059
NO_MESSAGE: Final = 10037
FULL_CODES: Final = {10077, 10023, 10047, 10028, 10002}
"""Error codes: the stream's limit, no resources, no storage, the account's limits."""
DENIED_CODES: Final = {10054, 10076, 10109, 10110, 10053}
"""Error codes: too large for the stream, the stream is sealed, purging is denied, bad subject."""
UNAVAILABLE: Final = 10008
"""Error code: the servers elect a leader of theirs."""
NAME_IN_USE: Final = 10058
NO_PEERS: Final = 10005
OVERLAP: Final = 10065


@attrs.frozen(kw_only=True)
class Access:
    """How the servers are reached."""

    servers: tuple[str, ...]
    name: str
    user: str | None = attrs.field(default=None, repr=False)
    password: str | None = attrs.field(default=None, repr=False)
    nkey_seed: str | None = attrs.field(default=None, repr=False)
    tls: ssl.SSLContext | None = None

    @property
    def stream(self) -> str:
        return f"WAL-{self.name}"

    @property
    def subject(self) -> str:
        return f"wal.{self.name}"


class Refused(Exception):
    """The servers do not let us in; final."""


class ApiError(Exception):
    """What a server answers instead of what was asked for."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} (error {code})")
        self.code = code
        self.description = description


@final
class Connection:
    """A client of the servers, in the asyncio thread: its coroutines run there and nowhere else."""

    def __init__(self, access: Access, rung: Callable[[], None]) -> None:
        """
        Args:
          rung: called whenever a message is sent to the log.
        """
        self.access: Final = access
        self.client: Final[Any] = Client()
        self._ring_bell = rung
        self._inbox = ""
        self._tokens = count(1)
        self._inboxes: dict[str, Callable[[Msg], None]] = {}
        self._asked: set[asyncio.Task[Any]] = set()
        """Requests under way, for when it turns out that they are not permitted."""
        self._refusal: str | None = None

    async def connect(self) -> None:
        """
        Raises:
          Refused: wrong credentials, no TLS, an unknown authority.
          Unsure: no server answers.
        """
        # First without reconnecting: with it, wrong credentials would be tried for ever.
        tried: list[str] = []
        for server in self.access.servers:
            first: Any = Client()
            try:
                await asyncio.wait_for(
                    first.connect(server, allow_reconnect=False, **self._options()),
                    CONNECT_SECONDS,
                )
                break
            except (nats.errors.AuthorizationError, ssl.SSLError) as exc:
                raise Refused(f"{server}: {_text(exc)}") from exc
            except (OSError, nats.errors.Error, asyncio.TimeoutError) as exc:
                if _final(exc):
                    raise Refused(f"{server}: {_text(exc)}") from exc
                tried.append(f"{server}: {_text(exc)}")
            finally:
                with suppress(Exception):
                    await asyncio.wait_for(first.close(), CONNECT_SECONDS)
        else:
            raise Unsure("; ".join(tried))
        await self.client.connect(
            [server, *(one for one in self.access.servers if one != server)],
            max_reconnect_attempts=-1,
            dont_randomize=True,
            **self._options(),
        )
        self._inbox = self.client.new_inbox()
        await self.client.subscribe(
            f"{self._inbox}.*", cb=self._take_answer, pending_msgs_limit=0, pending_bytes_limit=0
        )

    def _options(self) -> dict[str, Any]:
        access = self.access
        options: dict[str, Any] = {
            "connect_timeout": CONNECT_SECONDS,
            "reconnect_time_wait": 0.1,
            "ping_interval": 2,
            "max_outstanding_pings": 2,
            "error_cb": self._note_error,
            "name": "trio-wal",
            "pending_size": 16 << 20,
        }
        if access.tls is not None:
            options["tls"] = access.tls
        if access.user is not None:
            options.update(user=access.user, password=access.password)
        if access.nkey_seed is not None:
            options["nkeys_seed_str"] = access.nkey_seed
        return options

    async def _note_error(self, exc: Exception) -> None:
        text = str(exc)
        if "permissions violation" not in text.lower() or ".owner" in text:
            return
        # The server answers nothing then: whoever waits would wait in vain.
        self._refusal = text
        for task in self._asked:
            task.cancel()

    async def listen(self) -> None:
        """Have the bell rung from here on.  Not before somebody waits for it: an owner would have
        each of its messages sent back to it."""
        await self.client.subscribe(self.access.subject, cb=self._ring)

    async def _ring(self, _: Msg) -> None:
        self._ring_bell()

    async def _take_answer(self, message: Msg) -> None:
        take = self._inboxes.get(message.subject.rpartition(".")[2])
        if take is not None:
            take(message)

    async def ask(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str] | None,
        seconds: float,
        last: Callable[[Msg], bool],
    ) -> list[Msg]:
        """The answers to one request, up to the one that is the last."""
        token = f"{next(self._tokens):x}"
        answers: list[Msg] = []
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[bool] = loop.create_future()
        heard = loop.time()

        def take(message: Msg) -> None:
            nonlocal heard
            heard = loop.time()
            answers.append(message)
            if last(message) and not ended.done():
                ended.set_result(True)

        timers: list[asyncio.TimerHandle] = []

        def expire() -> None:
            left = heard + seconds - loop.time()
            if left > 0:
                timers[:] = [loop.call_later(left, expire)]
            elif not ended.done():
                ended.set_result(False)

        timers.append(loop.call_later(seconds, expire))
        self._inboxes[token] = take
        task = asyncio.current_task()
        assert task is not None
        self._asked.add(task)
        try:
            reply = f"{self._inbox}.{token}"
            await self.client.publish(subject, payload, reply, dict(headers or {}) or None)
            if not await ended:
                raise Unsure(f"no answer within {seconds:.1f} seconds")
        except asyncio.CancelledError:
            if self._refusal is not None:
                # This is how a refusal ends it.
                raise Denied(self._refusal) from None  # noqa: ASYNC104
            raise
        except (OSError, nats.errors.Error, asyncio.TimeoutError) as exc:
            raise Unsure(_text(exc)) from exc
        finally:
            timers[0].cancel()
            self._asked.discard(task)
            del self._inboxes[token]
        status = (answers[-1].headers or {}).get("Status")
        if status == "503":
            raise Unsure("no server accepts that: the stream has no leader")
        return answers

    async def ask_one(
        self,
        subject: str,
        payload: bytes = b"",
        headers: Mapping[str, str] | None = None,
        seconds: float = READ_SECONDS,
    ) -> Msg:
        return (await self.ask(subject, payload, headers, seconds, lambda _: True))[-1]

    async def api(self, what: str, content: Any = None) -> Any:
        """Raises `ApiError`, `Unsure`, `Denied`."""
        payload = b"" if content is None else json.dumps(content).encode()
        answer = await self.ask_one(f"$JS.API.{what}", payload)
        try:
            return _checked(answer.data)
        except ApiError as exc:
            if exc.code == UNAVAILABLE:
                raise Unsure(str(exc)) from exc
            raise

    async def close(self) -> None:
        # It may hang, or raise, where servers are gone.
        with suppress(Exception):
            await asyncio.wait_for(self.client.close(), CONNECT_SECONDS)


@final
class NatsCas:
    """A `_caslog.CasLog`; see `open_connection`."""

    def __init__(self, access: Access, name: str, thread: AsyncioThread) -> None:
        self.name: str = name
        self.access: Final = access
        self.assume_synced: bool = False
        self._thread = thread
        self._connection = Connection(access, partial(thread.tell, self._note_ring))
        self._rung = trio.Event()
        self._rung_at = -RING_SECONDS
        self._closed = False
        self._listening = False
        self._uuid = uuid.UUID(int=0)

    async def connect(self) -> None:
        """Raises as `Connection.connect`."""
        await self._thread.call(self._connection.connect)

    def _note_ring(self) -> None:
        self._rung_at = trio.current_time()
        self._rung.set()
        self._rung = trio.Event()

    # -- in the asyncio thread --

    async def _append(self, after: int, pieces: Sequence[bytes], ident: str) -> int:
        headers = {HEADER: ident, "Nats-Expected-Last-Sequence": str(after)}
        seconds = TRY_SECONDS + sum(map(len, pieces)) / 4e6
        if len(pieces) == 1:
            answer = await self._connection.ask_one(
                self.access.subject, pieces[0], headers, seconds
            )
        else:
            answer = await self._append_batch(pieces, headers, ident, seconds)
        try:
            return int(_checked(answer.data)["seq"])
        except ApiError as exc:
            raise _append_error(exc, after) from exc
        except (KeyError, TypeError, ValueError) as exc:
            raise Unsure(f"an answer that cannot be understood: {answer.data[:200]!r}") from exc

    async def _append_batch(
        self, pieces: Sequence[bytes], headers: dict[str, str], ident: str, seconds: float
    ) -> Msg:
        """All of the messages, or none; the answer to the last one decides."""
        batch = {"Nats-Batch-Id": uuid.uuid4().hex}
        subject = self.access.subject
        try:
            for number, piece in enumerate(pieces[:-1], 1):
                part = {**headers, **batch} if number == 1 else {HEADER: ident, **batch}
                part["Nats-Batch-Sequence"] = str(number)
                if number == 1:
                    # The first is answered; what it is refused for the others are refused for.
                    answer = await self._connection.ask_one(subject, piece, part, seconds)
                    if answer.data:
                        return answer
                else:
                    await self._connection.client.publish(subject, piece, headers=part)
        except (OSError, nats.errors.Error, asyncio.TimeoutError) as exc:
            raise Unsure(_text(exc)) from exc
        part = {HEADER: ident, **batch, "Nats-Batch-Sequence": str(len(pieces))}
        part["Nats-Batch-Commit"] = "1"
        return await self._connection.ask_one(subject, pieces[-1], part, seconds)

    async def _read(self, position: int, max_bytes: int) -> list[Entry]:
        subject = f"$JS.API.DIRECT.GET.{self.access.stream}"
        one = max_bytes <= 1
        asked = {"seq": position}
        if not one:
            asked.update(batch=READ_MESSAGES, max_bytes=max_bytes)

        def last(message: Msg) -> bool:
            return one or (not message.data and "Status" in (message.headers or {}))

        answers = await self._connection.ask(
            subject, json.dumps(asked).encode(), None, READ_SECONDS, last
        )
        found: list[Entry] = []
        for answer in answers:
            headers = answer.headers or {}
            if "Status" in headers and "Nats-Sequence" not in headers:
                break
            at = int(headers.get("Nats-Sequence", "0"))
            found.append(Entry(at, headers.get(HEADER, ""), answer.data))
        if found and found[0].position == position:
            return found
        # Nothing is there: it has been dropped, or not come yet.
        state = (await self._info())["state"]
        if int(state["first_seq"]) > position:
            raise Gone(int(state["first_seq"]))
        return []

    async def _ident_at(self, position: int) -> str | None:
        try:
            answer = await self._connection.api(
                f"STREAM.MSG.GET.{self.access.stream}", {"seq": position}
            )
        except ApiError as exc:
            if exc.code == NO_MESSAGE:
                return None
            raise Unsure(str(exc)) from exc
        return _ident_in(base64.b64decode(answer["message"].get("hdrs", "")))

    async def _info(self) -> Any:
        try:
            return await self._connection.api(f"STREAM.INFO.{self.access.stream}")
        except ApiError as exc:
            raise Unsure(str(exc)) from exc

    async def info(self) -> Any | None:
        """The stream, as its leader describes it; None: there is none.  Raises `Unsure`,
        `Denied`, `ApiError`."""
        try:
            return await self._thread.call(
                self._connection.api, f"STREAM.INFO.{self.access.stream}"
            )
        except ApiError as exc:
            if exc.code == STREAM_NOT_FOUND:
                return None
            raise

    async def account(self) -> Any:
        """Raises `ApiError` where there is no JetStream."""
        return await self._thread.call(self._connection.api, "INFO")

    async def create(self, config: Mapping[str, Any]) -> None:
        """Make the stream.  Raises `ApiError`, `Unsure`, `Denied`."""
        await self._thread.call(
            self._connection.api, f"STREAM.CREATE.{self.access.stream}", dict(config)
        )

    def use(self, log_uuid: uuid.UUID) -> None:
        """The stream has been looked at, and is the one."""
        self._uuid = log_uuid

    @property
    def server_version(self) -> tuple[int, int]:
        version = self._connection.client.connected_server_version
        return version.major, version.minor

    # -- CasLog --

    async def describe(self) -> Description:
        return self.description_of(await self._thread.call(self._info))

    def description_of(self, info: Any) -> Description:
        state, config = info["state"], info["config"]
        cluster: dict[str, Any] = info.get("cluster") or {}
        replicas: list[dict[str, Any]] = cluster.get("replicas") or []
        maximum = int(config.get("max_bytes", -1))
        metadata: dict[str, Any] = config.get("metadata") or {}
        return Description(
            uuid=uuid.UUID(metadata.get("trio-wal-uuid", self._uuid.hex)),
            first=max(1, int(state["first_seq"])),
            last=int(state["last_seq"]),
            bytes=int(state["bytes"]),
            bytes_max=float("inf") if maximum < 0 else maximum,
            message_bytes_max=self._connection.client.max_payload - HEADERS_BYTES,
            pieces_max=PIECES_MAX,
            replicas=int(config.get("num_replicas", 1)),
            replicas_current=1 + sum(1 for one in replicas if one.get("current")),
            assume_synced=self.assume_synced,
        )

    async def last(self) -> int:
        return (await self.describe()).last

    async def append(self, after: int, pieces: Sequence[bytes], ident: str) -> int:
        return await self._thread.call(self._append, after, pieces, ident)

    async def ident_at(self, position: int) -> str | None:
        return await self._thread.call(self._ident_at, position)

    async def read(self, position: int, max_bytes: int) -> list[Entry]:
        return await self._thread.call(self._read, position, max_bytes)

    async def drop_before(self, position: int) -> None:
        await self._thread.call(self._purge, position)

    async def _purge(self, position: int) -> None:
        try:
            await self._connection.api(f"STREAM.PURGE.{self.access.stream}", {"seq": position})
        except ApiError as exc:
            raise (Denied if exc.code in DENIED_CODES else Unsure)(str(exc)) from exc

    async def elsewhere(self) -> None:
        await self._thread.call(self._connection.client.force_reconnect)

    async def changed(self, seconds: float) -> None:
        if not self._listening:
            self._listening = True
            try:
                await self._thread.call(self._connection.listen)
            except nats.errors.ConnectionClosedError:
                # It is closed before it has ever listened.
                raise trio.ClosedResourceError("this log is closed") from None
        if trio.current_time() - self._rung_at < RING_SECONDS:
            await trio.sleep(LOOK_SECONDS)
        else:
            with trio.move_on_after(seconds):
                await self._rung.wait()

    async def announce(self, owner: str) -> None:
        async def answer(message: Msg) -> None:
            if message.reply:
                await message.respond(owner.encode())

        subscribe = partial(
            self._connection.client.subscribe, f"{self.access.subject}.owner", cb=answer
        )
        await self._thread.call(subscribe)

    async def owner(self) -> str | None:
        subject = f"{self.access.subject}.owner"
        ask = partial(self._connection.ask_one, subject, seconds=OWNER_SECONDS)
        try:
            answer = await self._thread.call(ask)
        except (Unsure, Denied):
            return None
        return bytes(answer.data).decode("utf-8", "replace")

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            with trio.CancelScope(shield=True):
                with trio.move_on_after(2 * CONNECT_SECONDS):
                    await self._thread.call(self._connection.close)
                await self._thread.aclose()

    def disown(self) -> None:
        self._closed = True
        self._thread.disown()


def _checked(data: bytes) -> Any:
    """An answer of the API, which is JSON.  Raises `ApiError`, `Unsure`."""
    try:
        content = json.loads(data)
        error = content.get("error")
    except (ValueError, AttributeError) as exc:
        raise Unsure(f"an answer that cannot be understood: {data[:200]!r}") from exc
    if error is not None:
        raise ApiError(int(error.get("err_code", 0)), str(error.get("description", "")))
    return content


def _append_error(exc: ApiError, after: int) -> Exception:
    if exc.code == WRONG_LAST:
        found = re.search(r"\d+", exc.description)
        return Conflict(int(found[0]) if found else after)
    if exc.code in FULL_CODES:
        return Full(str(exc))
    if exc.code in DENIED_CODES:
        return Denied(str(exc))
    return Unsure(str(exc))


def _ident_in(headers: bytes) -> str:
    for line in headers.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip() == HEADER.encode():
            return value.strip().decode("ascii", "replace")
    return ""


def _text(exc: BaseException) -> str:
    return str(exc) or type(exc).__name__


def _final(exc: BaseException) -> bool:
    """Whether it is of no use to try that again."""
    text = _text(exc).lower()
    return any(word in text for word in ("authorization", "tls", "ssl", "certificate", "nkey"))


async def open_connection(access: Access, name: str) -> NatsCas:
    """
    Raises:
      Refused, Unsure
    """
    cas = NatsCas(access, name, AsyncioThread(f"trio-wal {name}"))
    try:
        await cas.connect()
    except BaseException:
        await cas.aclose()
        raise
    return cas
