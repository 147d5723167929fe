"""The write-ahead log as a trio program sees it: `open_wal` and `WriteAheadLog`.

Law: promises and the checks of what users pass; the work is `_log`'s.  What is promised stands
here, in the docstrings; the README and the docs quote it.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal, final

import trio
from trio.lowlevel import current_task, enable_ki_protection

from ._archive import Archive
from ._caslog import BATCH_BYTES_MAX, RemoteLog
from ._consumer import Consumer, new_consumer
from ._consumers import Consumers, EngineKeeper, Session, check_start
from ._engine import RecoveryReport
from ._exceptions import RecordTooLargeError, UnsupportedOperationError
from ._exports import NoPublicConstructor, constructor, publish
from ._files import Files
from ._flusher import Durability
from ._health import Health, judge
from ._identity import Bookmark
from ._local import (
    VERIFY_BYTES,
    LocalEngine,
    SyncIn,
    check_local_options,
    open_local,
)
from ._log import RESERVE, TARGET_LATENCY, Log, OpenLog, check_log_options
from ._park import require_trio
from ._places import check_consumer_name
from ._remotelog import check_remote, refuse_options, remote_log
from ._retention import KeepAll, Retention
from ._statistics import WalStatistics
from ._stream import RecordStream
from ._system.files import OsFiles
from ._util import MiB, Unentered, check_bytes, check_int
from ._writer import OpenWriter, Writer, check_line_options, gather_unit, new_writer

if TYPE_CHECKING:
    from ._replicated import ReplicatedEngine


@final
class WriteAheadLog(metaclass=NoPublicConstructor):
    """An open log.  There is no public constructor: see `open_wal`.

    Every async method is a checkpoint, also when it need not wait; no sync method is.
    Methods may be called by any number of tasks of the trio run that opened the log.
    There are no ``timeout=`` parameters: use cancel scopes.
    """

    def __init__(self, log: Log, *, owned: bool = False) -> None:
        """
        Args:
          owned: whether a database writes all of the log's records.
        """
        self._log = log
        self._append = log.append
        self._owned = owned
        self._consumers = None if owned else Consumers(log, EngineKeeper(log))
        # Of a log that is owned every record is too large, and so comes to `_check_size`.
        self._record_size_max = -1 if owned else log.max_record_size

    # -- writing --

    @enable_ki_protection
    async def append(self, data: bytes) -> int:
        """Append one record and wait until it is durable; returns its LSN.

        When it returns, a sync that covers the record has returned (with
        ``durability="interval"`` or ``"none"``: the record is written).

        Cancellation: if it raises `trio.Cancelled`, nothing of the record is in the log.
        A record whose batch is already being written is waited for, and the call returns
        its LSN; the next checkpoint then raises.

        Args:
          data: the record, 0 to ``max_record_size`` bytes.

        Raises:
          TypeError: ``data`` is not `bytes`.
          RecordTooLargeError: before anything is queued.
          LogFullError: no disk space for the next segment; nothing was accepted.
          LogFailedError: a write or sync failed; see its ``outcome``.
          trio.ClosedResourceError: the log is closed.
        """
        if type(data) is not bytes:
            data = check_bytes("data", data)
        if len(data) > self._record_size_max:
            self._check_size(len(data))
        append = self._append  # called as a method, it would be looked up twice
        try:
            return await append(data, current_task())
        except RuntimeError:
            require_trio("log.append")
            raise

    def _check_size(self, size: int) -> None:
        self._check_not_owned()
        if size > self._record_size_max:
            raise RecordTooLargeError(size, self._record_size_max)

    def _check_not_owned(self) -> None:
        if self._owned:
            raise TypeError("this log belongs to a database, whose transactions write to it")

    @enable_ki_protection
    async def append_many(self, records: Iterable[bytes]) -> range:
        """Append records as one unit and wait until all are durable; returns their LSNs.

        The LSNs are consecutive.  After a crash all of the records are there or none.
        Cancellation and errors are as for `append`, for the unit as a whole.  Of a long
        iterable a slice is taken at a time, with a checkpoint between; nothing is queued
        before its end.  No records at all are a checkpoint and an empty range.

        Raises:
          TypeError: an element is not `bytes`; the message says which.
          RecordTooLargeError: a record is over ``max_record_size``, or the unit over the
              1 GiB (and 16 Mi records) that a frame can hold.
        """
        self._check_not_owned()
        require_trio("log.append_many")
        log = self._log
        unit, total = await gather_unit(log.engine, self._record_size_max, records)
        if not unit:
            log.status.check_open()
            await trio.lowlevel.checkpoint()
            return range(log.engine.last_lsn + 1, log.engine.last_lsn + 1)
        first = await log.append_unit(unit, total)
        return range(first, first + len(unit))

    @enable_ki_protection
    async def send(self, data: bytes) -> None:
        """Append one record without waiting for its durability.

        Returns when the record is accepted; waits while the queue is full.  It will be
        durable ``flush_interval`` seconds later at the latest, in the order of acceptance;
        `flush` waits for that and reports a loss.

        Cancellation: if it raises `trio.Cancelled`, the record was not accepted.

        Raises:
          TypeError, RecordTooLargeError, LogFullError, LogFailedError: as for `append`.
          trio.ClosedResourceError: the log is closed.
        """
        data = check_bytes("data", data)
        self._check_size(len(data))
        try:
            await self._log.accept(data)
        except RuntimeError:
            require_trio("log.send")
            raise

    @enable_ki_protection
    def send_nowait(self, data: bytes) -> None:
        """Like `send`, without waiting.

        Raises:
          trio.WouldBlock: the queue is full.
          RuntimeError: called in a thread in which trio does not run.
          TypeError, RecordTooLargeError, LogFullError, LogFailedError: as for `append`.
          trio.ClosedResourceError: the log is closed.
        """
        data = check_bytes("data", data)
        self._check_size(len(data))
        require_trio("log.send_nowait")
        self._log.accept_nowait(data)

    @enable_ki_protection
    async def flush(self) -> int:
        """Make every record accepted before the call durable; returns `durable_lsn`.

        Cancellation leaves the records as they are: they become durable all the same.

        Raises:
          LogFailedError: records were lost, perhaps ones that were only sent.
          LogFullError: there is no disk space for them; they stay queued.
          trio.ClosedResourceError: the log is closed.
        """
        require_trio("log.flush")
        return await self._log.flush()

    @enable_ki_protection
    async def wait_durable(self, lsn: int) -> None:
        """Wait until ``durable_lsn >= lsn``, for a record written or still to come.

        With ``durability="none"`` it waits for somebody's `flush`.  Cancelling it changes nothing.

        Raises:
          TypeError, ValueError: ``lsn`` is not an int, or is negative.
          LogFailedError, trio.ClosedResourceError: it will not happen any more.
        """
        check_int("lsn", lsn, 0)
        require_trio("log.wait_durable")
        await self._log.wait_durable(lsn)

    def writer(
        self,
        name: str,
        *,
        max_queue_size: float | None = None,
        max_queue_bytes: float | None = None,
        priority: Literal["normal", "high"] = "normal",
    ) -> AbstractAsyncContextManager[Writer]:
        """A share of the queue with a line of its own, as an async context manager::

            async with wal.writer("audit", max_queue_size=100) as audit:
                await audit.append(b"alice logged in")

        At most ``max_queue_size`` of *its* records wait.  A task that finds this share full waits
        in the writer's own line and delays no other line.  While the queue is full, the lines
        with waiting tasks take turns, the same number of records each; the log's own methods
        share one line.  Within a line, first come, first served.

        Leaving the block does not wait: what was accepted becomes durable all the same, and
        tasks that are still waiting in the line get `trio.ClosedResourceError`.

        Args:
          name: for `WalStatistics.writers`; free again after the block.
          max_queue_size: records of this writer that may wait; None: as many as the queue's.
          max_queue_bytes: payload bytes of this writer that may wait; None: as many as the
              queue's.  One larger record or unit may wait alone.
          priority: ``"high"``: may use what ``reserve`` of `open_wal` keeps for such writers, is
              let in before others, and goes into the next batch that is taken, also past records
              of others that were accepted before.  After 8 records that were let in so, one
              of a waiting line of normal priority is.

        Raises, when called:
          TypeError: an argument has the wrong type, or the log belongs to a database.
          ValueError: a limit is below 1 or above the queue's, or a writer of this name is open.
          LogFailedError, trio.ClosedResourceError: the log is broken, or closed.

        Raises, on entering:
          ValueError: somebody has opened a writer of this name meanwhile.
          RuntimeError: in another run of trio than the log's.
        """
        self._check_not_owned()
        options = check_line_options(self._log, name, max_queue_size, max_queue_bytes, priority)
        return OpenWriter(self._log, options, partial(new_writer, self._log))

    # -- reading --

    def read(self, start: int | Bookmark | None = None, stop: int | None = None) -> RecordStream:
        """The durable records with ``start <= lsn < stop``, in LSN order.

        ::

            async with wal.read(start=17) as records:
                async for record in records:
                    ...

        Ends at the record that was the last durable one on entering; does not stop
        writers.  Iterating is a checkpoint for every chunk of records read from disk and
        for every 1,024 records, not for every record.

        Args:
          start: the first LSN, or a bookmark to continue after; None: the oldest record.
          stop: the LSN to stop before; None: up to what is durable on entering.

        Raises, on entering or iterating:
          LsnTruncatedError: ``start`` is below `first_lsn`, or retention overtook the reader.
          LogDivergedError: ``start``, or what was given, is not in the log's history, or after it.
          CorruptLogError: damage on disk, with its place; the records before it were given.
        """
        return self._log.read(start, stop)

    def follow(self, start: int | Bookmark | None = None) -> RecordStream:
        """Like `read`, and then waits for new durable records, until it is left or the
        log is closed.

        Closing the log does not wait for followers.  A follower that was given everything
        durable just ends; any other gets what it had already read from the disk, and then an
        error.

        Raises:
          trio.ClosedResourceError: the log was closed before everything durable was given.
          LogDivergedError: also when `truncate_after` drops what was already given, however
              far the log has grown since.
          LogFailedError: the log is broken, after all that is durable was given.
        """
        return self._log.follow(start)

    # -- consuming --

    def consumer(self, name: str, *, start: int | Bookmark | None = None) -> Consumer:
        """A named, durable place in the log, as an async context manager::

            async with wal.consumer("mailer") as consumer:
                async for record in consumer:
                    send_mail(record.data)
                    await consumer.acknowledge(record)

        It continues after the last record that was acknowledged, whenever that was.
        Its first use makes it, durably, before anything is given.  From then on no segment is
        dropped that holds records after its place, by retention or by `truncate_before`, unless
        that takes more than ``consumer_hold_bytes``; `drop_consumer` ends that.

        Args:
          name: 1 to 255 characters.
          start: where its first use begins: the first LSN, or a bookmark to continue after; None:
              the oldest record.  Ignored afterwards.

        Raises, when called:
          TypeError, ValueError: an argument is wrong, or the log belongs to a database.
          UnsupportedOperationError: the log is replicated.

        Raises, on entering; nothing was made:
          trio.BusyResourceError: somebody is using it.
          LsnTruncatedError: its place, or ``start``, is below `first_lsn`.
          LogDivergedError: its place, or ``start``, is not in the log's history.
          ValueError: there are 1,000 consumers.
          LogFullError, OSError: its first place could not be written.
          LogFailedError, trio.ClosedResourceError: the log is broken, or closed.
        """
        consumers = self._get_consumers()
        return new_consumer(Session(consumers, check_consumer_name(name), check_start(start)))

    @enable_ki_protection
    async def drop_consumer(self, name: str) -> None:
        """Forget a consumer and what it holds.  Durable on return.

        Cancellation: if it raises `trio.Cancelled`, the consumer is as it was.

        Raises:
          KeyError: there is none of this name.
          trio.BusyResourceError: somebody is using it.
          LogFullError, OSError, LogFailedError, trio.ClosedResourceError: as
              `Consumer.acknowledge`.
        """
        require_trio("log.drop_consumer")
        await self._get_consumers().drop(check_consumer_name(name))

    def _get_consumers(self) -> Consumers:
        self._check_not_owned()
        if not self._log.engine.keeps_places:
            reason = "servers keep places of a database's consumers only"
            raise UnsupportedOperationError(self._log.name, "consumer", reason)
        assert self._consumers is not None
        return self._consumers

    # -- segments --

    @enable_ki_protection
    async def rotate(self) -> int:
        """Seal the segment that is being written, so that everything up to the LSN that this
        returns can be archived, or dropped, as a whole.

        What was accepted before the call is made durable first.  Where nothing was written since
        the last segment was sealed there is nothing to seal, and `durable_lsn` is returned.  Of a
        replicated log it ends what `KeepSegments` counts as one segment.

        A segment that is ended before it is full is a file of its own all the same: once a minute
        is fine, once a record is not.

        Cancelled while it waits: nothing is sealed, unless that has already begun; then it
        returns.

        Raises:
          LogFullError: there is no disk space for the next segment; nothing has changed.
          LogFailedError: a write or sync failed.
          trio.ClosedResourceError: the log is closed.
        """
        require_trio("log.rotate")
        sealed_lsn = 0

        async def rotate() -> None:
            nonlocal sealed_lsn
            await self._log.engine.rotate()
            sealed_lsn = self._log.engine.durable_lsn

        await self._log.run_job(rotate)
        return sealed_lsn

    # -- truncating --

    @enable_ki_protection
    async def truncate_before(self, lsn: int) -> None:
        """Drop whole segments that hold only records below ``lsn``.

        `first_lsn` moves up, by whole segments; LSNs are not reused.  With ``last_lsn + 1``
        the log becomes empty.  Durable on return.  A reader that has yet to come to a
        dropped record gets `LsnTruncatedError`.

        Cancelled while waiting: nothing is dropped, or all that was asked for.

        Raises:
          ValueError: ``lsn`` is above ``last_lsn + 1``.
          LogFullError: emptying the log needs a new segment, and there is no space; or
              not even the block that says where the log starts has a place.
        """
        self._check_not_owned()
        check_int("lsn", lsn, 1)
        require_trio("log.truncate_before")
        log = self._log
        if lsn > log.engine.last_lsn:
            await log.flush()
        behind = log.engine.last_lsn + 1
        if lsn > behind:
            raise ValueError(
                f"lsn must be at most {behind}, right after the last record, not {lsn}"
            )
        if lsn == behind:
            await log.run_job(log.engine.rotate)
        log.status.check_open()
        await log.engine.drop_before(lsn)

    @enable_ki_protection
    async def truncate_after(self, lsn: int) -> None:
        """Drop the records above ``lsn``; the next record gets ``lsn + 1``.

        For logs whose tail can be revoked (Raft).  Records accepted before the call are
        written first, and then dropped with the others.  Durable, and all or none after a
        crash.  Cancelled: nothing is dropped, unless it already began; then it returns.

        Raises:
          ValueError: ``lsn`` is below ``first_lsn - 1``.
          LogFullError: there is no space for the new end of the log; nothing was dropped.
          CorruptLogError: records that are to stay cannot be read; nothing was dropped.
          LsnTruncatedError: retention dropped the record ``lsn`` meanwhile; nothing else was.
          UnsupportedOperationError: the log is a replicated one.
        """
        self._check_not_owned()
        check_int("lsn", lsn, 0)
        require_trio("log.truncate_after")
        if lsn < self.first_lsn - 1:
            raise ValueError(
                f"lsn must be at least {self.first_lsn - 1}, right before the first record, "
                f"not {lsn}"
            )
        await self._log.run_job(partial(self._log.engine.truncate_after, lsn))

    # -- what it is --

    @property
    def path(self) -> str:
        """The log's directory, absolute; the address of a replicated log."""
        return self._log.name

    @property
    def uuid(self) -> uuid.UUID:
        """Made with the log, kept for ever, also by its copies."""
        return self._log.engine.uuid

    @property
    def epoch(self) -> int:
        """Which of the log's histories this is.  It grows whenever LSNs may be given a second
        time, that is at a `truncate_after` that drops something, at the first open of a backup,
        and where an open finds less than others were told is durable (`RecoveryReport.lost_lsn`).
        0 until then."""
        return self._log.tail.epoch

    @property
    def bookmark(self) -> Bookmark:
        """The durable end, with the epoch."""
        return self._log.bookmark

    @property
    def first_lsn(self) -> int:
        """The oldest record; ``last_lsn + 1`` where there is none."""
        return self._log.tail.first_lsn

    @property
    def last_lsn(self) -> int:
        """The newest record written; with ``durability="sync"`` it is durable."""
        return self._log.engine.last_lsn

    @property
    def durable_lsn(self) -> int:
        """The newest record that a sync has covered."""
        return self._log.durable_lsn

    @property
    def recovery(self) -> RecoveryReport:
        """What this open found and did."""
        return self._log.engine.recovery

    def statistics(self) -> WalStatistics:
        """A look at queue, syncs and disk.  Cheap; no checkpoint."""
        return self._log.statistics()

    def health(self) -> Health:
        """How the log fares, in one word and with reasons; cheap, no checkpoint.

        It may be asked after the log was closed, or has failed.
        """
        return judge(self._log.reasons())

    def __repr__(self) -> str:
        state = self._log.status.state.value
        return f"<WriteAheadLog {self.path!r} {state} durable_lsn={self.durable_lsn}>"

    # -- closing --

    @enable_ki_protection
    async def aclose(self) -> None:
        """Make every accepted record durable, close the log, release the lock.

        Neither cancellation nor Ctrl-C cuts that short; both are delivered afterwards.
        Idempotent; leaving the ``async with`` block does it.  Blocked writers get
        `trio.ClosedResourceError`.

        Raises:
          LogFailedError: the log broke and nobody has been told.
        """
        require_trio("log.aclose")
        await self._log.aclose()
        await trio.lowlevel.checkpoint()
        self._log.tell_failure()


new_wal = constructor(WriteAheadLog)


@final
class _OpenWal(Unentered, AbstractAsyncContextManager[WriteAheadLog]):
    """What `open_wal` returns.

    A class, not a generator: ``__aexit__`` is then protected from Ctrl-C from its first
    instruction on, and the body's exception is not touched by the nursery.
    """

    _call = "trio_wal.open_wal"

    def __init__(self, opened: OpenLog) -> None:
        self._opened = opened

    @enable_ki_protection
    async def __aenter__(self) -> WriteAheadLog:
        log = await self._opened.enter()
        try:
            wal = new_wal(log)
            log.hand_out()
        except BaseException as exc:
            # No memory.
            await self._opened.leave(exc)
            raise
        return wal

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._opened.leave(exc)


async def _open_remote(
    log: RemoteLog, segment_size: int, retention: Retention, files: Files
) -> ReplicatedEngine:
    # With all that it is made of, of which a log in a directory has no need.
    from ._replicated import open_remote

    return await open_remote(log, segment_size, retention, files)


def open_wal(
    path: str | os.PathLike[str] | RemoteLog,
    *,
    max_queue_size: float | Literal["auto"] = 10_000,
    target_latency: float = TARGET_LATENCY,
    max_queue_bytes: float = 64 * MiB,
    max_record_size: int = 16 * MiB,
    max_batch_bytes: int = 8 * MiB,
    flush_interval: float = 0.010,
    commit_delay: float | Literal["auto"] = 0.0,
    segment_size: int = 64 * MiB,
    durability: Durability = "sync",
    retention: Retention | None = None,
    compression: Literal["none", "zstd"] | None = None,
    verify_bytes: float = VERIFY_BYTES,
    trust_directory: bool = False,
    sync_in: SyncIn = "thread",
    reserve: float = RESERVE,
    consumer_hold_bytes: float = math.inf,
    archive: Archive | None = None,
    files: Files | None = None,
) -> AbstractAsyncContextManager[WriteAheadLog]:
    """Open the write-ahead log in a directory, recovering it first.

    ::

        async with trio_wal.open_wal("orders.wal") as wal:
            lsn = await wal.append(b"order 17: two of blue")

    The log owns a nursery with its flusher; leaving the block, however that happens,
    first makes every accepted record durable, shielded from cancellation and Ctrl-C.
    The body's exception passes through as it is.

    Args:
      path: a directory; created with mode 0700 if it is missing.  Or a log that servers keep:
          `trio_wal.nats.Log`, or its URL, ``"nats://host:4222/orders"``.
      max_queue_size: records that may wait to be written; `math.inf`: no bound; ``"auto"``: it
          follows the rate at which records are flushed, between 16 and 1,000,000, so that a
          record waits about ``target_latency`` for its turn.  `WalStatistics.max_queue_size` is
          the bound in force.
      target_latency: seconds, for ``max_queue_size="auto"``.  On a disk where a single sync takes
          about so long or longer, the bound is such that records make a round of write and
          sync longer by half.
      max_queue_bytes: payload bytes that may wait; `math.inf`: no bound.  One larger
          record or unit may wait alone.
      max_record_size: bytes of one record.
      max_batch_bytes: payload bytes of one write; a larger record or unit is written alone.
      flush_interval: seconds that an accepted record for which nobody waits may stay
          unsynced; 0: written at once.
      commit_delay: seconds that a batch may wait for more records, though somebody waits for it;
          ``"auto"``: as long as was found to be good for throughput, not at all where it is not.
          A `WriteAheadLog.flush`, a record of high priority and a full batch end the wait.  Only
          with ``durability="sync"``.
      segment_size: bytes of a full-grown segment file; the first ones are smaller.  A wish:
          no segment is smaller than its header, one frame and its footer (about 6 KiB).
      durability: ``"sync"``: acknowledged when a sync covers the record.  ``"interval"``:
          when it is written; synced every ``flush_interval``.  ``"none"``: when it is
          written; synced only by `WriteAheadLog.flush` and on closing.
      retention: what to keep: `KeepAll` (None), `KeepSegments`, `KeepFor`, `KeepBytes`;
          ``a & b`` keeps what both keep, ``a | b`` what either keeps.
      compression: ``"zstd"`` for a new log (needs the ``zstd`` extra); None: as the log
          was created.
      verify_bytes: how much of the log, newest first, is checked frame by frame before
          it is opened, where a batch counts for 32 KiB more than it has, and a record for
          64 bytes; what is older is checked by the headers and footers of segments, and
          when it is read.  `math.inf`: everything.
      trust_directory: open a directory that belongs to another user than this process's and
          root, or that others may write; without it such a directory is refused, as ssh and
          git do.
      sync_in: ``"loop"``: batches of up to 256 KiB are written and synced in the event loop, which
          stands still meanwhile, and not in a thread.  One task, or a few, commit faster; a disk
          that hangs hangs the program.  After one that took over 5 ms, while segments are prepared
          or dropped and while a checkpoint runs, the thread does it all the same.
      reserve: how much of the queue, 0 to 0.9, is kept for writers of high priority while there
          are any: see `WriteAheadLog.writer`.
      consumer_hold_bytes: bytes of segments that consumers may keep from being dropped;
          `math.inf`: any number.  A consumer that is further behind may get `LsnTruncatedError`.
      archive: where every sealed segment is put, such as `DirectoryArchive`; nothing is dropped
          from the log before it is there.  `restore` makes a log of it.  An archive that is slow,
          full or gone costs disk space and nothing else: what fails is logged, seen in
          `WalStatistics`, and tried again, after a second at first and then up to a minute.
      files: another file system, such as `trio_wal.testing.MemoryFiles`.

    A replicated log takes neither ``compression``, ``verify_bytes``, ``trust_directory``,
    ``sync_in``, ``archive`` nor ``files``, and of ``durability`` only ``"sync"``; ``segment_size``
    is how much of it `KeepSegments` counts as one.  Opening it takes it over: a previous owner
    gets `LogFencedError` from its next write on.

    Raises, when called:
      TypeError, ValueError: an argument is wrong; the message names it.

    Raises, on entering; what was there is as it was, and nothing else stays:
      LogLockedError: somebody else has it open.
      WrongDirectoryError: it is a database, or no log; or the archive is another log's, or none.
      UntrustedDirectoryError: see ``trust_directory``.
      CorruptLogError: it is damaged.
      UnsupportedFormatError: a newer trio-wal wrote it.
      LogFullError: no disk space to recover it.
      OSError: the operating system's own.
      RuntimeError: trio is not running.
      UnsuitableServersError, LogUnavailableError, LogFencedError: of a replicated log.

    Raises, on leaving:
      LogFailedError: a write or sync failed and nobody has been told.
    """
    run = check_log_options(
        LocalEngine.batch_bytes_max if remote_log(path) is None else BATCH_BYTES_MAX,
        max_queue_size=max_queue_size,
        target_latency=target_latency,
        max_queue_bytes=max_queue_bytes,
        max_record_size=max_record_size,
        max_batch_bytes=max_batch_bytes,
        flush_interval=flush_interval,
        commit_delay=commit_delay,
        durability=durability,
        reserve=reserve,
        consumer_hold_bytes=consumer_hold_bytes,
    )
    log = remote_log(path)
    if log is not None:
        check_remote(
            durability, segment_size, retention, compression, verify_bytes, sync_in, archive
        )
        refuse_options("a replicated log", trust_directory=trust_directory, files=files is not None)
        keep = KeepAll() if retention is None else retention
        return _OpenWal(
            OpenLog("open_wal", run, partial(_open_remote, log, segment_size, keep, OsFiles()))
        )
    assert not isinstance(path, RemoteLog)
    where = check_local_options(
        path=path,
        segment_size=segment_size,
        retention=KeepAll() if retention is None else retention,
        compression=compression,
        verify_bytes=verify_bytes,
        trust_directory=trust_directory,
        archive=archive,
        sync_in=sync_in,
    )
    used = OsFiles() if files is None else files
    return _OpenWal(OpenLog("open_wal", run, partial(open_local, used, where)))


publish(WriteAheadLog, open_wal)
