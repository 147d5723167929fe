"""The engine whose log is a replicated stream.

Law: knows positions, records and time, and no server: those are behind a `CasLog`.  Nothing is
acknowledged that a majority of the servers does not hold, and nobody is told anything of a batch
that is not so.  How: the log is taken over when it is opened (`_takeover`); then one batch is in
flight, which is appended right behind the last position, or not at all (`_appender`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Final, TypeVar, final
from uuid import UUID

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from ._appender import Appender
from ._caslog import BATCH_BYTES_MAX, CasLog, Denied, Description, Gone, RemoteLog, Unsure
from ._disk.frame import FEATURE_DATABASE, FRAME_HEADER_SIZE
from ._disk.repair import create_empty
from ._engine import Forked, RecoveryReport, Tail
from ._events import tell
from ._exceptions import (
    CorruptLogError,
    LogFailedError,
    LogFullError,
    LogLockedError,
    UnsupportedOperationError,
)
from ._files import Files
from ._messages import Mark, encode_batch, encode_mark
from ._places import Place
from ._retention import KeepAll, Retention
from ._statistics import EngineStatistics, ReplicationStatistics, SyncTimes
from ._streamindex import Positions, Segment, Segments
from ._streamlog import End, Patience, StreamCursor, StreamLog, StreamSource
from ._takeover import Taken, take_over, this_process
from ._util import MiB
from ._worker import Blocking

BATCH_RECORDS_MAX: Final = 1 << 20
CLOSE_SECONDS: Final = 1.0
"""For the last mark, which is a courtesy: servers that are gone must not hold up the end."""
STATUS_SECONDS: Final = 10.0
"""How often the servers are asked how the log fares."""

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class ReplicatedOptions:
    """How a replicated log is opened; `trio_wal.nats.Log` and `open_wal` say what each means."""

    unavailable_after: float = 30.0
    takeover: bool = True
    segment_size: int = 64 * MiB
    retention: Retention = attrs.field(factory=KeepAll)


@final
class ReplicatedEngine:
    """An `_engine.Engine` on a `CasLog`; see `open_replicated`.

    So many methods because that protocol has two thirds of them.
    """

    batch_records_max = BATCH_RECORDS_MAX
    places: Mapping[str, Place] = {}
    keeps_places = False

    def __init__(self, taken: Taken, options: ReplicatedOptions, files: Files) -> None:
        log, found, end = taken.log, taken.found, taken.end
        self.name: str = log.name
        self.uuid: UUID = log.uuid
        self._log = log
        self._cas = log.cas
        self._options = options
        self._files = files
        self._found = found
        self._blocking = Blocking(threaded=files.threaded)
        pieces = found.message_bytes_max * found.pieces_max
        self.batch_bytes_max: int = min(BATCH_BYTES_MAX, pieces - FRAME_HEADER_SIZE)
        self._appender = Appender(
            log, taken.epoch, taken.writer, end, found.message_bytes_max, options.unavailable_after
        )
        self._history = end.history
        self._time_us = end.time_us
        self._first = found.first
        self._first_lsn = taken.first_lsn
        self.last_lsn: int = end.last_lsn
        self.durable_lsn: int = end.last_lsn
        self._bytes = found.bytes
        self._places = Positions()
        older = Segment(taken.first_lsn, found.bytes, end.time_us)
        self._segments = Segments(options.segment_size, older, end.last_lsn)
        self._holds: dict[str, tuple[int, float]] = {}
        self._syncs = SyncTimes()
        self._one = trio.Lock()
        """One append at a time."""
        self._dropping = trio.Lock()
        """While what nothing holds is being dropped."""
        self._forked = False
        self._callers = 0
        self._idle = trio.Event()
        self._due = trio.Event()
        """Set when there may be something to drop."""
        self._ending = trio.Event()
        self._ending_scopes: list[trio.CancelScope] = []
        self._tasks_done: list[trio.Event] = []
        self.recovery: RecoveryReport

    # -- what it is --

    @property
    def tail(self) -> Tail:
        return Tail(self._first_lsn, self.last_lsn, self.durable_lsn, self._history)

    def statistics(self) -> EngineStatistics:
        appender = self._appender
        since = appender.since
        return EngineStatistics(
            self._syncs,
            self._segments.count,
            self._bytes,
            ReplicationStatistics(
                position=appender.position,
                replicas=self._found.replicas,
                replicas_current=self._found.replicas_current,
                unsettled_seconds=0.0 if since is None else trio.current_time() - since,
                rotations=appender.rotations,
                resolved=appender.resolved,
                assume_synced=self._found.assume_synced,
            ),
        )

    # -- its life --

    def tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        return (self._maintain, self._watch_status)

    async def ready(self) -> None:
        await self._cas.announce(this_process())

    async def aclose(self, *, orderly: bool) -> None:
        try:
            await self._end_tasks()
            if orderly and not self._forked:
                # Another may have taken over, or nobody answers: only the word is missing then.
                with (
                    trio.move_on_after(CLOSE_SECONDS),
                    contextlib.suppress(LogFailedError, LogFullError),
                ):
                    await self._append_mark(closed=True, tries=1)
        finally:
            await self._end()

    async def abandon(self) -> None:
        await self._end_tasks()
        await self._end()

    async def _end_tasks(self) -> None:
        self._ending.set()
        for scope in self._ending_scopes:
            scope.cancel()
        for done in self._tasks_done:
            await done.wait()

    async def _end(self) -> None:
        if not self._forked:
            if self._callers:
                await self._idle.wait()
            await self._blocking.close()
            await self._cas.aclose()

    def on_fork(self, callback: Callable[[], None]) -> None:
        self._files.on_fork(callback)

    def disown(self) -> None:
        self._forked = True
        self._cas.disown()
        self._blocking.disown()

    @contextlib.contextmanager
    def _unless_forked(self) -> Generator[None, None, None]:
        """Around what only the log's own task does, which must not call that a failure."""
        if self._forked:
            raise Forked
        try:
            yield
        except trio.ClosedResourceError:
            if self._forked:
                raise Forked from None
            raise

    # -- the one writer --

    async def write(self, records: Sequence[bytes], *, sync: bool) -> None:
        with self._unless_forked():
            await self._write(records)

    async def _write(self, records: Sequence[bytes]) -> None:
        async with self._one:
            appender = self._appender
            self._time_us = max(self._time_us, self._files.time_us())
            position = appender.position + 1
            frame = encode_batch(
                records,
                position=position,
                seed=appender.seed,
                first_lsn=self.last_lsn + 1,
                time_us=self._time_us,
                previous=appender.chain,
            )
            started = trio.current_time()
            await appender.append(frame, self.last_lsn + len(records))
            self._syncs.note(trio.current_time() - started, self._files.time_us())
            self._places.add(self.last_lsn + 1, position)
            self.last_lsn += len(records)
            self.durable_lsn = self.last_lsn
        self._bytes += len(frame.data)
        if self._segments.note(len(frame.data), self._time_us, self.last_lsn):
            self._due.set()

    async def sync(self) -> None:
        """Whatever is written is durable."""

    async def make_room(self) -> None:
        with self._unless_forked():
            found = await self._describe()
        if found is None:
            needed = self._appender.full_bytes
            raise LogFullError(self.name, needed, "nobody says whether there is room again")
        if found.bytes_max - found.bytes < self._appender.full_bytes:
            raise self._appender.no_room()

    async def rotate(self) -> None:
        if self._segments.seal(self.last_lsn):
            self._due.set()

    async def truncate_after(self, lsn: int) -> None:
        raise UnsupportedOperationError(
            self.name,
            "truncate_after",
            "what a majority of the servers has made durable cannot be undone",
        )

    # -- beside the writing: marks --

    async def _append_mark(self, *, closed: bool = False, tries: float = math.inf) -> None:
        """Write down where the log is: afterwards what is older may be dropped.

        Raises: as `_append`.
        """
        async with self._one:
            appender = self._appender
            self._time_us = max(self._time_us, self._files.time_us())
            frame = encode_mark(
                Mark(self._history, closed),
                position=appender.position + 1,
                seed=appender.seed,
                next_lsn=self.last_lsn + 1,
                time_us=self._time_us,
                previous=appender.chain,
            )
            await appender.append(frame, self.last_lsn, mark=True, tries=tries)

    async def begin(self) -> None:
        """The first append of an epoch: proof that the tail was read right."""
        await self._append_mark()

    # -- beside the writing --

    async def _counted(self, call: Callable[[], Awaitable[T]]) -> T:
        """A call that closing waits for."""
        if self._ending.is_set():
            raise trio.ClosedResourceError(f"{self.name}: this log is closed")
        self._callers += 1
        try:
            return await call()
        finally:
            self._callers -= 1
            if not self._callers and self._ending.is_set():
                self._idle.set()

    async def drop_before(self, lsn: int) -> None:
        await self._counted(partial(self._drop_before, lsn))

    async def _drop_before(self, lsn: int) -> None:
        async with self._dropping:
            await self._drop_what_nothing_holds(lsn)

    async def settle_holds(self) -> None:
        async with self._dropping:
            pass

    async def _drop_what_nothing_holds(self, lsn: int) -> None:
        lsn = min(lsn, self.durable_lsn + 1, self._held_from())
        if lsn <= self._first_lsn:
            await trio.lowlevel.checkpoint()
            return
        # Gone: whoever has taken the log over has dropped more of it.
        with contextlib.suppress(Gone):
            position = await self._place_to_drop(lsn)
            with trio.CancelScope(shield=True):
                if self._appender.mark < position:
                    await self._mark_before(position)
                await self._purge(position)

    async def _mark_before(self, position: int) -> None:
        """Have a mark that is left when what stands before a position is dropped.  A log that is
        full has no room for one, and to make room is what dropping takes."""
        with contextlib.suppress(LogFullError):
            await self._append_mark()
            return
        if self._appender.mark > self._first:
            # What the mark tells is left.
            await self._purge(self._appender.mark)
            with contextlib.suppress(LogFullError):
                await self._append_mark()
                return
        # All but the last record can go at once.  Whoever takes the log over before the next mark
        # is there does not know of older epochs.
        spared = await self._place_to_drop(self.last_lsn)
        await self._purge(min(position, spared))
        with contextlib.suppress(*((LogFullError,) if position <= spared else ())):
            await self._append_mark()

    async def _place_to_drop(self, lsn: int) -> int:
        """The position before which there are only records below an LSN, for certain."""
        if lsn > self.last_lsn:
            return self._appender.position + 1
        position = await self._locate(lsn)
        first = await self._log.first_lsn(position, self._as_end())
        if first > lsn:
            raise self._log.damaged(position, f"LSN {first} stands where LSN {lsn} should")
        return position

    async def _purge(self, position: int) -> None:
        """Drop what stands before a batch of this epoch, or before its mark: so something is left
        that knows the next LSN."""
        patience = Patience(self._cas, self._options.unavailable_after)
        while True:
            try:
                await self._cas.drop_before(position)
                break
            except Denied as exc:
                raise PermissionError(errno.EACCES, f"{self.name}: {exc}") from exc
            except Unsure as exc:
                if patience.over:
                    raise TimeoutError(errno.ETIMEDOUT, f"{self.name}: {exc}") from exc
            await patience.pause()
        if position > self._first:
            # Gone: whoever has taken the log over has dropped more of it.
            with contextlib.suppress(Gone):
                self._first_lsn = await self._log.first_lsn(position, self._as_end())
                self._first = position
                self._segments.drop_before(self._first_lsn)
        found = await self._describe()
        if found is not None:
            self._bytes = found.bytes

    def _as_end(self) -> End:
        return End(
            position=self._appender.position,
            chain=self._appender.chain,
            last_lsn=self.last_lsn,
            history=self._history,
        )

    def hold(self, who: str, lsn: int | None, bytes_max: float = math.inf) -> None:
        if lsn is None:
            self._holds.pop(who, None)
        else:
            self._holds[who] = lsn, bytes_max
        self._due.set()

    def _held_from(self) -> int:
        """The first LSN that a hold keeps."""
        within = self._segments.within
        kept = [max(lsn, within(bytes_max)) for lsn, bytes_max in self._holds.values()]
        return min(kept, default=self.durable_lsn + 1)

    def busy(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def keep_places(self, places: Mapping[str, Place]) -> None:
        raise UnsupportedOperationError(
            self.name,
            "consumer",
            "servers keep the places of a database's consumers, but not of a log's",
        )

    async def admit_consumers(self) -> None:
        """There is no version that knows such logs and no consumers."""
        await trio.lowlevel.checkpoint()

    def behind(self, lsn: int) -> tuple[int, float]:
        size, since_us = self._segments.behind(lsn)
        return size, max(0, self._files.time_us() - since_us) / 1e6

    async def _locate(self, lsn: int) -> int:
        low, high = self._places.around(lsn, self._first, self._appender.position)
        return await self._log.find(lsn, low, high)

    def cursor(self) -> StreamCursor:
        return StreamCursor(self._log, self._locate)

    async def branch(self, dest: str, after_lsn: int) -> None:
        create = partial(
            create_empty,
            log_uuid=self.uuid.bytes,
            first_lsn=after_lsn + 1,
            features=FEATURE_DATABASE,
            history=self._history,
        )
        await self._blocking(create, self._files, dest)

    async def check_archive(self) -> None:
        """There is none."""
        await trio.lowlevel.checkpoint()

    # -- retention --

    @enable_ki_protection
    async def _maintain(self) -> None:
        """Apply retention: whenever a segment is finished, a hold has moved, or time has passed."""
        await self._until_ending(self._apply_retention, self._retention_pause)

    async def _apply_retention(self) -> None:
        segments, now_us = self._segments, self._files.time_us()
        spare = self._options.retention.droppable(segments.sealed, segments.active.bytes, now_us)
        if spare:
            await self._drop_before(segments.lsn_after(spare))

    def _retention_pause(self) -> float:
        due_us = self._options.retention.next_change_us(self._segments.sealed)
        if due_us is None:
            return math.inf
        return max(1.0, (due_us - self._files.time_us()) / 1e6)

    @enable_ki_protection
    async def _watch_status(self) -> None:
        """Keep up with what the servers say of themselves."""
        await self._until_ending(self._describe, lambda: STATUS_SECONDS, due=False)

    async def _describe(self) -> Description | None:
        try:
            found = self._found = await self._cas.describe()
        except (Unsure, Denied):
            return None
        return found

    async def _until_ending(
        self,
        work: Callable[[], Awaitable[object]],
        pause: Callable[[], float],
        *,
        due: bool = True,
    ) -> None:
        """Work, now and then, until the log is closed.  What fails is told, and tried again."""
        done = trio.Event()
        self._tasks_done.append(done)
        try:
            with trio.CancelScope(shield=True) as scope:
                self._ending_scopes.append(scope)
                while True:
                    with trio.move_on_after(pause()):
                        await (self._due if due else self._ending).wait()
                    if due:
                        self._due = trio.Event()
                    try:
                        await work()
                    except (OSError, LogFullError, LogFailedError, CorruptLogError) as exc:
                        text = f"retention failed, will try again: {exc!r}"
                        tell(logging.WARNING, "retention_failed", self.name, text, error=repr(exc))
        except Forked:
            pass
        except trio.ClosedResourceError:
            if not self._forked:
                raise
        finally:
            if not self._forked:
                done.set()


async def open_remote(
    log: RemoteLog, segment_size: int, retention: Retention, files: Files
) -> ReplicatedEngine:
    """Connect, and take the log over.  Raises as `RemoteLog.connect` and `open_replicated`."""
    cas, found = await log.connect(create=True)
    options = ReplicatedOptions(
        unavailable_after=log.unavailable_after,
        takeover=log.takeover,
        segment_size=segment_size,
        retention=retention,
    )
    return await open_replicated(cas, found, options, files)


async def open_remote_source(log: RemoteLog) -> StreamSource:
    """Connect, to read what somebody else writes.  Raises as `RemoteLog.connect`, and what the
    log's end has to be read for."""
    cas, found = await log.connect(create=False)
    source = StreamSource(StreamLog(cas, found.uuid, log.unavailable_after))
    try:
        await source.refresh()
    except BaseException:
        with trio.CancelScope(shield=True):
            await cas.aclose()
        raise
    return source


async def open_replicated(
    cas: CasLog, found: Description, options: ReplicatedOptions, files: Files
) -> ReplicatedEngine:
    """Take a replicated log over; from here on its former owner is fenced.

    Args:
      found: what the log's backend has found, and checked.  Nothing is read after it and before
          the epoch begins: to read first, and append then, would starve beside a writer.

    Raises; the connection is closed then:
      LogLockedError: somebody else has it open, and is not to be disturbed.
      LogFencedError: somebody else has taken it over while it was opened.
      LogFullError, LogUnavailableError, CorruptLogError, OSError
    """
    try:
        if not options.takeover and (owner := await cas.owner()) is not None:
            raise LogLockedError(cas.name, None, owner=owner)
        return await _open(cas, found, options, files)
    except BaseException:
        with trio.CancelScope(shield=True):
            await cas.aclose()
        raise


async def _open(
    cas: CasLog, found: Description, options: ReplicatedOptions, files: Files
) -> ReplicatedEngine:
    started = trio.current_time()
    taken = await take_over(cas, found, options.unavailable_after, files)
    end = taken.end
    engine = ReplicatedEngine(taken, options, files)
    await engine.begin()
    engine.recovery = RecoveryReport(
        first_lsn=taken.first_lsn,
        last_lsn=end.last_lsn,
        segments=engine.statistics().segments,
        records_replayed=end.records_checked,
        bytes_scanned=end.bytes_checked,
        torn_bytes=0,
        clean_shutdown=end.closed,
        seconds=trio.current_time() - started,
    )
    return engine
