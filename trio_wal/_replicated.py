"""The engine whose log is a replicated stream: epochs, and what an answer that never came means.

Law: knows positions, records and time, and no server: those are behind a `CasLog`.  Nothing is
acknowledged that a majority of the servers does not hold, and nobody is told anything of a batch
that is not so.  How:

  One batch is in flight, and is appended right behind the last position, or not at all; `_appender`
  finds out which.

  Whoever opens the log first appends an epoch record, with nothing read before: from then on the
  place that the former owner's next batch would need is taken.  Only what is read after that
  decides where the log goes on.  The epoch's number is the record's position.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import platform
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import count
from typing import Final, TypeVar, final
from uuid import UUID

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from ._appender import Appender
from ._caslog import CasLog, Conflict, Denied, Description, Full, Gone, Unsure
from ._disk.frame import FEATURE_DATABASE, FRAME_HEADER_SIZE
from ._disk.repair import create_empty
from ._engine import Forked, RecoveryReport, Tail
from ._events import tell
from ._exceptions import (
    CorruptLogError,
    LogFailedError,
    LogFencedError,
    LogFullError,
    LogLockedError,
    LogUnavailableError,
    UnsupportedOperationError,
)
from ._files import Files
from ._identity import epoch_of
from ._messages import (
    Mark,
    encode_batch,
    encode_epoch,
    encode_mark,
    epoch_ident,
)
from ._places import Place
from ._retention import KeepAll, Retention
from ._statistics import EngineStatistics, ReplicationStatistics, SyncTimes
from ._streamlog import PAUSE_SECONDS_MIN, End, Patience, StreamCursor, StreamLog, StreamSource
from ._util import MiB
from ._worker import Blocking

BATCH_BYTES_MAX: Final = 64 * MiB
"""Of one batch, whatever the servers would take: they hold it in memory as a whole, and so does
whoever reads it."""
BATCH_RECORDS_MAX: Final = 1 << 20
PLACES_MAX: Final = 4096
"""Of batches of which it is remembered where they are; between them it is searched."""
CLOSE_SECONDS: Final = 1.0
"""For the last mark, which is a courtesy: servers that are gone must not hold up the end."""
DAMAGE_TRIES: Final = 8
"""Times that what is read on opening must be damaged before it is called so."""
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


class RemoteLog(ABC):
    """A log that servers keep: what `trio_wal.open_wal` and the like take instead of a path.

    `trio_wal.nats.Log` is one.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """For messages: without credentials."""

    unavailable_after: float
    """Seconds that a batch in flight may be without an outcome."""
    takeover: bool
    """Whether to open it also while another owner is alive."""

    @abstractmethod
    async def connect(self, *, create: bool) -> tuple[CasLog, Description]:
        """A connection to the log, which is as it should be, and what is known of it.

        Args:
          create: make it if it is missing.
        """


@attrs.define
class _Segment:
    """Some batches in a row, which retention treats as one; a `_retention.Sealed`."""

    first_lsn: int
    bytes: int = 0
    last_time_us: int = 0


class _Segments:
    """Batches in a row, counted as retention counts segments: nothing of them is in the log."""

    def __init__(self, size: int, older: _Segment, last_lsn: int) -> None:
        """
        Args:
          older: what is older than this session is one: nobody has written down where others end.
        """
        self._size = size
        self.sealed: list[_Segment] = []
        self.active: _Segment = older
        self.seal(last_lsn)

    @property
    def count(self) -> int:
        return len(self.sealed) + 1

    def note(self, size: int, time_us: int, last_lsn: int) -> bool:
        """One more batch; True: a segment is finished."""
        self.active.bytes += size
        self.active.last_time_us = time_us
        return self.active.bytes >= self._size and self.seal(last_lsn)

    def seal(self, last_lsn: int) -> bool:
        if self.active.first_lsn > last_lsn:
            return False
        self.sealed.append(self.active)
        self.active = _Segment(last_lsn + 1)
        return True

    def lsn_after(self, count: int) -> int:
        """The first LSN behind the oldest sealed segments."""
        return (*self.sealed, self.active)[count].first_lsn

    def within(self, bytes_max: float) -> int:
        """The first LSN of the newest ones that have no more bytes than these together; 0 for
        all."""
        if bytes_max < math.inf:
            bytes_max -= self.active.bytes
            for count in range(len(self.sealed), 0, -1):
                bytes_max -= self.sealed[count - 1].bytes
                if bytes_max < 0:
                    return self.lsn_after(count)
        return 0

    def behind(self, lsn: int) -> tuple[int, int]:
        """Bytes of those that have records after an LSN, and a time before which none of these
        was written."""
        size, since_us = self.active.bytes, 0
        for number in range(len(self.sealed), 0, -1):
            since_us = self.sealed[number - 1].last_time_us
            if self.lsn_after(number) - 1 <= lsn:
                break
            size += self.sealed[number - 1].bytes
        return size, since_us

    def drop_before(self, lsn: int) -> None:
        while self.sealed and self.lsn_after(1) <= lsn:
            del self.sealed[0]


class _Places:
    """Where some batches are: their first LSNs and positions, ascending."""

    def __init__(self) -> None:
        self._lsns: list[int] = []
        self._positions: list[int] = []
        self._step = 1
        self._skipped = 0

    def add(self, first_lsn: int, position: int) -> None:
        self._skipped += 1
        if self._skipped < self._step:
            return
        self._skipped = 0
        self._lsns.append(first_lsn)
        self._positions.append(position)
        if len(self._lsns) > PLACES_MAX:
            del self._lsns[1::2], self._positions[1::2]
            self._step *= 2

    def around(self, lsn: int, first: int, last: int) -> tuple[int, int]:
        """Between which positions the batch is that has a record."""
        at = bisect_right(self._lsns, lsn)
        low = max(first, self._positions[at - 1]) if at else first
        high = self._positions[at] - 1 if at < len(self._positions) else last
        return low, max(low, high)


@final
class ReplicatedEngine:
    """An `_engine.Engine` on a `CasLog`; see `open_replicated`.

    So many methods because that protocol has two thirds of them.
    """

    batch_records_max = BATCH_RECORDS_MAX
    places: Mapping[str, Place] = {}
    keeps_places = False

    def __init__(
        self,
        log: StreamLog,
        options: ReplicatedOptions,
        files: Files,
        found: Description,
        appender: Appender,
        end: End,
        first_lsn: int,
    ) -> None:
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
        self._appender = appender
        self._history = end.history
        self._time_us = end.time_us
        self._first = found.first
        self._first_lsn = first_lsn
        self.last_lsn: int = end.last_lsn
        self.durable_lsn: int = end.last_lsn
        self._bytes = found.bytes
        self._places = _Places()
        older = _Segment(first_lsn, found.bytes, end.time_us)
        self._segments = _Segments(options.segment_size, older, end.last_lsn)
        self._holds: dict[str, tuple[int, float]] = {}
        self._syncs = SyncTimes()
        self._one = trio.Lock()
        """One append at a time."""
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
        await self._cas.announce(_this_process())

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
            "what a majority of the servers has made durable is not taken back",
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
        lsn = min(lsn, self.durable_lsn + 1, self._held_from())
        if lsn <= self._first_lsn:
            await trio.lowlevel.checkpoint()
            return
        try:
            position = await self._place_to_drop(lsn)
        except Gone:
            return
        with trio.CancelScope(shield=True):
            if self._appender.mark < position:
                try:
                    await self._append_mark()
                except LogFullError:
                    # To make room is what it takes: all but the last record can go at once.
                    spared = await self._place_to_drop(self.last_lsn)
                    await self._purge(min(position, spared))
                    if position > spared:
                        await self._append_mark()
            await self._purge(position)

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
            self.name, "consumer", "servers keep no places of a log's consumers, but a database's"
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


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node() or 'an unnamed host'}"


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
    writer = files.random_bytes(8).hex()
    epoch = await _begin_epoch(cas, found, options, files, writer)
    log = StreamLog(cas, found.uuid, options.unavailable_after)
    end = await _find_end(log, epoch)
    assert epoch_of(end.history) == epoch
    first, first_lsn = await _find_first(log, found.first, end)
    found = attrs.evolve(found, first=first)
    patience = options.unavailable_after
    appender = Appender(log, epoch, writer, end, found.message_bytes_max, patience)
    engine = ReplicatedEngine(log, options, files, found, appender, end, first_lsn)
    await engine.begin()
    engine.recovery = RecoveryReport(
        first_lsn=first_lsn,
        last_lsn=end.last_lsn,
        segments=engine.statistics().segments,
        records_replayed=end.records_checked,
        bytes_scanned=end.bytes_checked,
        torn_bytes=0,
        clean_shutdown=end.closed,
        seconds=trio.current_time() - started,
    )
    return engine


async def _find_first(log: StreamLog, first: int, end: End) -> tuple[int, int]:
    """Where the log begins: position and LSN.  A former owner's purge may arrive late, and so may
    that of the next one, who has purged this epoch too."""
    while True:
        try:
            return first, await log.first_lsn(first, end)
        except Gone as exc:
            if exc.first > end.position:
                raise LogFencedError(log.name, exc.first, "another writer") from exc
            first = exc.first


async def _find_end(log: StreamLog, epoch: int) -> End:
    """What stands before an epoch that has just begun.  What looks like damage may be one
    replica's: it is believed when it has been seen again and again."""
    for tries in count(1):
        try:
            return await log.end_at(epoch, checked=True)
        except CorruptLogError:
            if tries >= DAMAGE_TRIES:
                raise
            await log.cas.elsewhere()
            await trio.sleep(PAUSE_SECONDS_MIN)
        except Gone as exc:
            raise LogFencedError(log.name, exc.first, "another writer") from exc
    raise AssertionError


async def _begin_epoch(
    cas: CasLog, found: Description, options: ReplicatedOptions, files: Files, writer: str
) -> int:
    """Append the epoch record; gives its position."""
    ident = epoch_ident(writer, found.uuid)
    patience = Patience(cas, options.unavailable_after)
    after, unsure_at = found.last, -1
    owner, time_us = _this_process(), files.time_us()
    while True:
        frame = encode_epoch(owner, position=after + 1, uuid=found.uuid, time_us=time_us)
        try:
            return await cas.append(after, [frame.data], ident)
        except Conflict as exc:
            reason = str(exc)
            if unsure_at == after and await _is_ours(cas, after + 1, ident):
                return after + 1
            if exc.last != after:
                # At once: whoever writes this log has no pauses either.
                after = exc.last
                if not patience.over:
                    continue
        except Full as exc:
            reason = str(exc)
            if unsure_at != after:
                raise LogFullError(cas.name, len(frame.data), reason) from exc
        except Denied as exc:
            raise PermissionError(errno.EACCES, f"{cas.name}: {exc}") from exc
        except Unsure as exc:
            reason, unsure_at = str(exc), after
        if patience.over:
            seconds = trio.current_time() - patience.began
            raise LogUnavailableError(cas.name, seconds, reason, "unknown")
        await patience.pause()


async def _is_ours(cas: CasLog, position: int, ident: str) -> bool:
    try:
        return await cas.ident_at(position) == ident
    except Unsure:
        return False
