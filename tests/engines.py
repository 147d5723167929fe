"""A second engine: a log on a server that is an object in memory, for the seam of `_engine`.

Law: knows nothing of files, segments, frames and threads, so that what a log asks of its engine
is what `_engine` says and no more.  Each promise of the seam that the log must keep, one writer,
limits of a batch, nothing after a failure, is asserted here.  A backup alone is a directory, as
it is for every engine.
"""

from __future__ import annotations

import errno
import math
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import Any, Final, Literal, final

import attrs
import trio
from databases import DB

from trio_wal import Database, LogFullError, LsnTruncatedError, RecoveryReport, WriteAheadLog
from trio_wal._base import StoreState
from trio_wal._checkpoint import HOLD
from trio_wal._core import Core
from trio_wal._database import new_database
from trio_wal._disk.frame import FEATURE_DATABASE
from trio_wal._disk.repair import create_empty
from trio_wal._engine import Forked, Moved, Record, Tail
from trio_wal._identity import History, branch
from trio_wal._log import Log, LogOptions, OpenLog
from trio_wal._places import Place
from trio_wal._statistics import EngineStatistics, SyncTimes
from trio_wal._wal import new_wal
from trio_wal._worker import Blocking
from trio_wal.testing import MemoryFiles

PIECE_RECORDS: Final = 4
"""What a server drops as a whole."""
CHUNK_RECORDS: Final = 3
BEGINNING: Final = datetime(2026, 1, 1, tzinfo=timezone.utc)

Action = Literal["open", "write", "sync", "make_room", "rotate", "truncate_after", "drop_before",
                 "chunk", "close"]  # fmt: skip


@attrs.frozen
class Fault:
    """What becomes of one call."""

    error: Exception
    applied: bool
    """Whether it has done its work all the same."""


class MemoryServer:
    """What is left of a log when its engine is gone."""

    def __init__(self, name: str = "memory:log", *, seed: int = 0) -> None:
        self.name = name
        self.random = random.Random(seed)
        self.uuid = uuid.UUID(bytes=self.random.randbytes(16))
        self.records: list[Record] = []
        self.first_lsn = 1
        self.durable_lsn = 0
        self.history: History = ()
        self.places: Mapping[str, Place] = {}
        self.starts = [1]
        """The first LSN of each piece."""
        self.closed_in_order = True
        self.owner: MemoryEngine | None = None
        self.files = MemoryFiles(seed=seed)
        """Of this machine: for the store of a database."""
        self.unreachable: OSError | None = None
        """Why no connection comes about."""
        self.free_bytes: float = math.inf
        self.batch_bytes_max = 1 << 20
        self.batch_records_max = 1 << 10
        self.calls: list[Action] = []
        """What engines have asked for."""
        self._faults: dict[Action, Fault] = {}
        self._held: trio.Event | None = None

    @property
    def last_lsn(self) -> int:
        return self.first_lsn + len(self.records) - 1

    # -- what tests do to it --

    def fail(self, action: Action, error: Exception, *, applied: bool = False) -> None:
        """Let the next call of this kind fail."""
        self._faults[action] = Fault(error, applied)

    def hold(self) -> None:
        """Answer nothing that is asked by the writer, until `release`."""
        self._held = self._held or trio.Event()

    def release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.set()

    def crash(self) -> None:
        """Server and client lose their power: what is not durable is there or not."""
        self._end(self.random.randint(self.durable_lsn, self.last_lsn))
        self.durable_lsn = self.last_lsn
        self.owner = None
        self.closed_in_order = False
        self._faults.clear()
        self.release()

    # -- what engines do --

    async def reach(self, action: Action) -> Fault | None:
        """Come to the server, and see what it will do."""
        self.calls.append(action)
        while self._held is not None and action != "chunk":
            await self._held.wait()
        await trio.lowlevel.cancel_shielded_checkpoint()
        return self._faults.pop(action, None)

    def check_room(self, size: int) -> None:
        if size > self.free_bytes:
            raise LogFullError(self.name, size, "the server has no more")

    def add(self, records: Sequence[bytes]) -> None:
        now = BEGINNING + timedelta(seconds=max(0.0, trio.current_time() % 1e6))
        if self.records:
            now = max(now, self.records[-1].timestamp)
        for data in records:
            if self.last_lsn + 1 - self.starts[-1] >= PIECE_RECORDS:
                self.starts.append(self.last_lsn + 1)
            self.records.append(Record(self.last_lsn + 1, now, data))
            self.free_bytes -= len(data)

    def rotate(self) -> None:
        if self.starts[-1] <= self.last_lsn:
            self.starts.append(self.last_lsn + 1)

    def truncate_after(self, lsn: int) -> None:
        if lsn < self.last_lsn:
            self._end(lsn)
            self.durable_lsn = lsn
            self.history = branch(self.history, lsn, self.random.randbytes(4))

    def drop_before(self, lsn: int) -> None:
        starts = [start for start in self.starts if start <= lsn]
        if starts and starts[-1] > self.first_lsn:
            del self.records[: starts[-1] - self.first_lsn]
            self.first_lsn = starts[-1]
            self.starts = [start for start in self.starts if start >= self.first_lsn]

    def _end(self, lsn: int) -> None:
        del self.records[lsn + 1 - self.first_lsn :]
        self.starts = [start for start in self.starts if start <= lsn + 1]


@final
class MemoryCursor:
    """An `_engine.Cursor`."""

    def __init__(self, engine: MemoryEngine) -> None:
        self._engine = engine
        self._closed = False

    async def chunk(self, lsn: int, stop: int) -> list[Record]:
        engine, server = self._engine, self._engine.server
        assert lsn < stop <= engine.durable_lsn + 1, "asked for what is not durable"
        assert not self._closed
        with engine.counted():
            await trio.lowlevel.checkpoint()
            fault = await server.reach("chunk")
            if fault is not None:
                raise fault.error
            if not server.first_lsn <= lsn <= server.last_lsn:
                raise Moved(server.name, f"there is no LSN {lsn}")
            place = lsn - server.first_lsn
            return server.records[place : place + min(stop - lsn, CHUNK_RECORDS)]

    def close(self) -> None:
        self._closed = True


@final
class MemoryEngine:
    """An `_engine.Engine`."""

    def __init__(self, server: MemoryServer) -> None:
        self.server = server
        self.name = server.name
        self.uuid = server.uuid
        self.batch_bytes_max = server.batch_bytes_max
        self.batch_records_max = server.batch_records_max
        self.places = server.places
        self.keeps_places = True
        self.last_lsn = server.last_lsn
        self.durable_lsn = server.durable_lsn
        self.recovery = RecoveryReport(
            first_lsn=server.first_lsn,
            last_lsn=server.last_lsn,
            segments=len(server.starts),
            records_replayed=0,
            bytes_scanned=0,
            torn_bytes=0,
            clean_shutdown=server.closed_in_order,
            seconds=0.0,
        )
        self.running = False
        """Whether its task runs."""
        self._history = server.history
        self._holds: dict[str, int] = {}
        self._syncs = SyncTimes()
        self._writing = False
        self._broken = False
        self._forked = False
        self._callers = 0
        self._started = trio.Event()
        self._closing = trio.Event()
        self._idle = trio.Event()
        self._done = trio.Event()
        server.owner = self

    @property
    def tail(self) -> Tail:
        server = self.server
        return Tail(server.first_lsn, self.last_lsn, self.durable_lsn, self._history)

    def statistics(self) -> EngineStatistics:
        size = sum(len(record.data) for record in self.server.records)
        return EngineStatistics(self._syncs, len(self.server.starts), size)

    # -- its life --

    def tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        return (self._keep_connection,)

    async def _keep_connection(self) -> None:
        self.running = True
        self._started.set()
        try:
            with trio.CancelScope(shield=True):
                await self._closing.wait()
        finally:
            self.running = False
            self._done.set()

    async def ready(self) -> None:
        await self._started.wait()
        if self.server.unreachable is not None:
            raise self.server.unreachable

    async def aclose(self, *, orderly: bool) -> None:
        server = self.server
        try:
            assert not (orderly and self._broken), "nobody knows whether it is in order"
            fault = await server.reach("close")
            self._check_connected()
            if orderly and (fault is None or fault.applied):
                server.durable_lsn = self.durable_lsn = server.last_lsn
                server.closed_in_order = True
            if fault is not None:
                raise fault.error
        finally:
            await self._end()

    async def abandon(self) -> None:
        await self._end()

    async def _end(self) -> None:
        self._closing.set()
        self._note_idle()
        await self._idle.wait()
        if self._started.is_set():
            await self._done.wait()
        if self.server.owner is self:
            self.server.owner = None

    def _check_connected(self) -> None:
        if self.server.owner is not self:
            raise ConnectionResetError(errno.ECONNRESET, "the server has crashed")

    def on_fork(self, callback: Callable[[], None]) -> None:
        pass

    def disown(self) -> None:
        self._forked = True

    # -- the one writer --

    @contextmanager
    def _one_call(self) -> Generator[None, None, None]:
        if self._forked:
            raise Forked
        assert not self._writing, "two calls of the one writer at a time"
        assert not self._broken, "a call after a failure"
        assert not self._closing.is_set()
        self._writing = True
        try:
            yield
        except (LogFullError, LsnTruncatedError):
            raise
        except BaseException:
            self._broken = True
            raise
        finally:
            self._writing = False

    async def _do(self, action: Action, work: Callable[[], object], *, sync: bool) -> None:
        """One call of the one writer; ``work`` is done as a whole, or not."""
        server = self.server
        with self._one_call():
            fault = await server.reach(action)
            self._check_connected()
            if fault is None or fault.applied:
                work()
                if sync:
                    server.durable_lsn = server.last_lsn
            if fault is not None:
                raise fault.error
        if sync and action in ("write", "sync"):
            self._syncs.note(0.0, 0)
        self.last_lsn, self.durable_lsn = server.last_lsn, server.durable_lsn
        self._history = server.history

    async def write(self, records: Sequence[bytes], *, sync: bool) -> None:
        size = sum(map(len, records))
        assert records
        assert len(records) <= self.batch_records_max
        assert size + 4 * len(records) <= self.batch_bytes_max

        def work() -> None:
            self.server.check_room(size)
            self.server.closed_in_order = False
            self.server.add(records)

        await self._do("write", work, sync=sync)

    async def sync(self) -> None:
        await self._do("sync", lambda: None, sync=True)

    async def make_room(self) -> None:
        await self._do("make_room", lambda: self.server.check_room(1), sync=False)

    async def rotate(self) -> None:
        await self._do("rotate", self.server.rotate, sync=True)

    async def truncate_after(self, lsn: int) -> None:
        def work() -> None:
            if lsn < self.server.first_lsn - 1:
                raise LsnTruncatedError(self.server.first_lsn, lsn)
            self.server.truncate_after(lsn)

        await self._do("truncate_after", work, sync=True)

    # -- beside the writing --

    @contextmanager
    def counted(self) -> Generator[None, None, None]:
        """A call that closing waits for."""
        if self._closing.is_set():
            raise trio.ClosedResourceError("this log is closed")
        self._callers += 1
        try:
            yield
        finally:
            self._callers -= 1
            self._note_idle()

    def _note_idle(self) -> None:
        if self._closing.is_set() and not self._callers:
            self._idle.set()

    async def drop_before(self, lsn: int) -> None:
        with self.counted():
            fault = await self.server.reach("drop_before")
            if fault is not None:
                raise fault.error
            self.server.drop_before(min(lsn, self.durable_lsn + 1, *self._holds.values()))

    def busy(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def keep_places(self, places: Mapping[str, Place]) -> None:
        with self.counted():
            await trio.lowlevel.checkpoint()
            self.server.places = dict(places)

    async def admit_consumers(self) -> None:
        with self.counted():
            await trio.lowlevel.checkpoint()

    def behind(self, lsn: int) -> tuple[int, float]:
        return sum(len(record.data) for record in self.server.records if record.lsn > lsn), 0.0

    def hold(self, who: str, lsn: int | None, bytes_max: float = math.inf) -> None:
        if lsn is None:
            self._holds.pop(who, None)
        else:
            self._holds[who] = lsn

    async def settle_holds(self) -> None:
        # What is dropped is decided and done in one stretch.
        with self.counted():
            await trio.lowlevel.checkpoint()

    def cursor(self) -> MemoryCursor:
        return MemoryCursor(self)

    async def branch(self, dest: str, after_lsn: int) -> None:
        files = self.server.files
        with self.counted():
            await trio.lowlevel.checkpoint()
            create_empty(
                files,
                dest,
                log_uuid=self.uuid.bytes,
                first_lsn=after_lsn + 1,
                features=FEATURE_DATABASE,
                history=self._history,
            )

    async def check_archive(self) -> None:
        await trio.lowlevel.checkpoint()


# -- on it: both facades --------------------------------------------------------------------


async def open_memory_engine(server: MemoryServer) -> MemoryEngine:
    fault = await server.reach("open")
    if fault is not None:
        raise fault.error
    assert server.owner is None, "the log is open"
    return MemoryEngine(server)


def log_options(**options: Any) -> LogOptions:
    defaults: dict[str, Any] = {
        "max_queue_size": 10_000,
        "max_queue_bytes": 1 << 26,
        "max_record_size": 1 << 24,
        "max_batch_bytes": 1 << 23,
        "commit_delay": 0.0,
        "reserve": 0.1,
        "target_latency": None,
        "flush_interval": 0.010,
        "durability": "sync",
    }
    return LogOptions(**{**defaults, **options})


@asynccontextmanager
async def _opened(server: MemoryServer, options: dict[str, Any]) -> AsyncIterator[Log]:
    opened = OpenLog("open", log_options(**options), partial(open_memory_engine, server))
    log = await opened.enter()
    try:
        yield log
    except BaseException as exc:
        await opened.leave(exc)
        raise
    await opened.leave(None)


@asynccontextmanager
async def open_wal_on(server: MemoryServer, **options: Any) -> AsyncIterator[WriteAheadLog]:
    async with _opened(server, options) as log:
        log.hand_out()
        yield new_wal(log)


@asynccontextmanager
async def open_database_on(
    server: MemoryServer, *, checkpoint_bytes: int = 1 << 26, **options: Any
) -> AsyncIterator[Database]:
    """Its store, and its backups, are in ``server.files``."""
    files = server.files
    async with _opened(server, options) as log:
        state = files.inspect_store(DB) or StoreState(server.uuid.bytes, 0)
        log.hold(HOLD, state.lsn + 1)
        store, blocking = files.open_store(DB, 1), Blocking(threaded=False)
        core = Core(DB, log, store, state, files, blocking, checkpoint_bytes)
        replayed = await core.start()
        recovery = attrs.evolve(
            log.engine.recovery, transactions_replayed=replayed, checkpoint_lsn=state.lsn
        )
        log.hand_out()
        yield new_database(core, recovery)
