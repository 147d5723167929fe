"""The write-ahead log as a trio program sees it: `open_wal` and `WriteAheadLog`.

Law: this file composes.  Acceptance is `_queue`'s, group commit `_flusher`'s, the
bytes `_directory`'s, reading `_reader`'s.  What is promised stands here, in the
docstrings; the README and the docs quote it.
"""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Final, Literal, NoReturn, final

import attrs
import outcome
import trio
from trio.lowlevel import (
    Abort,
    Task,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from ._codec import require_zstd
from ._directory import LogDirectory, open_log_directory
from ._events import tell
from ._exceptions import LogFullError, RecordTooLargeError
from ._exports import NoPublicConstructor, constructor
from ._files import Files, OsFiles
from ._flusher import HISTOGRAM_BOUNDS, Durability, Flusher
from ._frame import BATCH_RECORDS_MAX, FRAME_BODY_MAX, to_datetime
from ._identity import Bookmark, epoch_of
from ._local import LocalSource
from ._park import is_parked
from ._queue import Barrier, Owner, State, Unit, WriteQueue
from ._recovery import VERIFY_BYTES, Plan, RecoveryReport
from ._retention import KeepAll, Retention
from ._stream import RecordStream, new_record_stream
from ._text import printable
from ._util import (
    MiB,
    check_bool,
    check_bytes,
    check_int,
    check_int_or_inf,
    check_one_of,
    check_path,
    check_seconds,
)
from ._worker import Blocking, Forked, InlineWorker, ThreadWorker, Worker, require_trio

SEGMENT_SIZE_MAX: Final = 1 << 40
MAINTENANCE_RETRY_SECONDS: Final = 1.0
FORKED_TURNS: Final = 100
"""Of the event loop of a forked child; what wakes it may be taken away by the parent's."""
UNIT_SLICE: Final = 10_000
"""`append_many` takes its iterable in slices of this many records, with a checkpoint
between: the event loop is not held up for longer than a few milliseconds."""


@final
@attrs.frozen(kw_only=True)
class WalStatistics:
    """A look at the log at one moment; what `WriteAheadLog.statistics` returns."""

    records_waiting: int
    """Accepted records that wait to be written, without the batch being written."""
    bytes_waiting: int
    """Their payload bytes."""
    max_queue_size: float
    """As given to `open_wal`; `math.inf` where unbounded."""
    max_queue_bytes: float
    """As given to `open_wal`."""
    queue_utilization: float
    """How full the queue is, 0 to 1, in records or bytes, whichever is more."""
    peak_records_waiting: int
    """The most records that ever waited."""
    peak_bytes_waiting: int
    """The most payload bytes that ever waited."""
    tasks_waiting_send: int
    """Tasks blocked because the queue is full."""
    tasks_waiting_durable: int
    """Tasks whose records are accepted, or that wait for an LSN, and not yet durable."""
    backpressure_waits: int
    """How often a task was blocked by a full queue."""
    backpressure_seconds: float
    """For how long, all tasks together, by trio's clock."""
    rejected: int
    """How often ``send_nowait`` raised `trio.WouldBlock`."""
    records_appended: int
    """Records written in this session."""
    bytes_appended: int
    """Their payload bytes."""
    batches_synced: int
    """Syncs that covered new records."""
    sync_seconds_total: float
    """Time spent in them."""
    sync_seconds_max: float
    """The slowest."""
    sync_seconds_histogram: tuple[tuple[float, int], ...]
    """(upper bound in seconds, syncs that took at most so long and longer than the bound
    before); the last bound is infinite."""
    first_lsn: int
    """The oldest record; ``last_lsn + 1`` where there is none."""
    last_lsn: int
    """The newest record written."""
    durable_lsn: int
    """The newest record that a sync has covered."""
    segments: int
    """Segment files of the log, the one being written among them."""
    disk_bytes: int
    """Their size, space prepared ahead included."""
    last_sync_time: datetime | None
    """UTC, when the last sync returned; None before the first."""
    state: Literal["open", "full", "closing", "closed", "failed"]
    """Where it is ``full``, there is no disk space for the next segment; for ``failed`` see
    `LogFailedError`."""


@attrs.frozen(kw_only=True)
class _Options:
    """The checked arguments of `open_wal`."""

    path: str
    max_queue_size: float
    max_queue_bytes: float
    max_record_size: int
    max_batch_bytes: int
    flush_interval: float
    segment_size: int
    durability: Durability
    retention: Retention
    compression: Literal["none", "zstd"] | None
    verify_bytes: float
    trust_directory: bool


@final
class WriteAheadLog(metaclass=NoPublicConstructor):
    """An open log.  There is no public constructor: see `open_wal`.

    Every async method is a checkpoint, also when it need not wait; no sync method is.
    Methods may be called by any number of tasks of the trio run that opened the log.
    There are no ``timeout=`` parameters: use cancel scopes.
    """

    def __init__(
        self,
        options: _Options,
        files: Files,
        directory: LogDirectory,
        blocking: Blocking,
        worker: Worker,
    ) -> None:
        self._options = options
        self._files = files
        self._directory = directory
        self._blocking = blocking
        self._worker = worker
        self._max_record_size = options.max_record_size
        self._queue = WriteQueue(
            directory.path,
            options.max_queue_size,
            options.max_queue_bytes,
            options.max_batch_bytes,
        )
        self._flusher = Flusher(
            self._queue,
            directory,
            worker,
            options.durability,
            options.flush_interval,
            files.time_us,
        )
        self._nursery: trio.Nursery
        self._closing = False
        self._handed_out = False
        self._forked = False
        self._undo_opening: Callable[[], None] | None = None
        """What removes whatever an open that fails has made beside the log."""
        self._before_close: Callable[[], Awaitable[None]] | None = None
        self._closed = _Latch()
        self._worker_done = trio.Event()
        self._maintenance_done = trio.Event()
        files.on_fork(self._disown)

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
        if len(data) > self._max_record_size:
            self._check_size(len(data))
        return await self._queue.append(data, current_task())

    def _check_size(self, size: int) -> None:
        if size > self._max_record_size:
            raise RecordTooLargeError(size, self._max_record_size)

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
        if isinstance(records, (bytes, bytearray, memoryview, str)):
            raise TypeError(
                f"records must be an iterable of bytes, not one {type(records).__name__}"
            )
        try:
            iterator = iter(records)
        except TypeError:
            kind = type(records).__name__
            raise TypeError(f"records must be an iterable of bytes, not {kind}") from None
        unit: list[bytes] = []
        total = 0
        while chunk := list(islice(iterator, UNIT_SLICE)):
            if set(map(type, chunk)) != {bytes}:
                chunk = [
                    check_bytes(f"records[{number}]", record)
                    for number, record in enumerate(chunk, len(unit))
                ]
            self._check_size(max(map(len, chunk)))
            total += sum(map(len, chunk))
            unit += chunk
            if total + 4 * len(unit) > FRAME_BODY_MAX:
                raise RecordTooLargeError(total, FRAME_BODY_MAX, "the limit of one append_many")
            if len(unit) > BATCH_RECORDS_MAX:
                raise RecordTooLargeError(
                    len(unit), BATCH_RECORDS_MAX, "the limit of records of one append_many"
                )
            if len(chunk) == UNIT_SLICE:
                await trio.lowlevel.checkpoint()
        if not unit:
            self._queue.check_open()
            await trio.lowlevel.checkpoint()
            return range(self._flusher.last_lsn + 1, self._flusher.last_lsn + 1)
        first = await self._queue.submit(Unit(unit, total))
        return range(first, first + len(unit))

    @enable_ki_protection
    async def send(self, data: bytes) -> None:
        """Append one record without waiting for its durability.

        Returns when the record is accepted; waits while the queue is full.  It will be
        durable ``flush_interval`` seconds later at the latest, in the order of acceptance;
        `flush` waits for that and reports a loss.

        Cancellation: if it raises `trio.Cancelled`, the record was not accepted.

        Raises:
          TypeError, RecordTooLargeError, LogFullError, LogFailedError,
          trio.ClosedResourceError: as for `append`.
        """
        data = check_bytes("data", data)
        self._check_size(len(data))
        await self._queue.accept(data)

    @enable_ki_protection
    def send_nowait(self, data: bytes) -> None:
        """Like `send`, without waiting.

        Raises:
          trio.WouldBlock: the queue is full.
          TypeError, RecordTooLargeError, LogFullError, LogFailedError,
          trio.ClosedResourceError: as for `append`.
        """
        data = check_bytes("data", data)
        self._check_size(len(data))
        self._queue.accept_nowait(data)

    @enable_ki_protection
    async def flush(self) -> int:
        """Make every record accepted before the call durable; returns `durable_lsn`.

        Cancellation leaves the records as they are: they become durable all the same.

        Raises:
          LogFailedError: records were lost, perhaps ones that were only sent.
          LogFullError: there is no disk space for them; they stay queued.
          trio.ClosedResourceError: the log is closed.
        """
        flusher = self._flusher
        queue = self._queue
        if (
            queue.state is State.OPEN
            and flusher.in_flight is None
            and not queue.records_waiting
            and flusher.durable_lsn == flusher.last_lsn
        ):
            await trio.lowlevel.checkpoint()
            return flusher.durable_lsn
        await queue.submit(Barrier())
        return flusher.durable_lsn

    @enable_ki_protection
    async def wait_durable(self, lsn: int) -> None:
        """Wait until ``durable_lsn >= lsn``, for a record written or still to come.

        With ``durability="none"`` that takes somebody's `flush`.

        Raises:
          LogFailedError, trio.ClosedResourceError: it will not happen any more.
        """
        check_int("lsn", lsn, 0)
        await self._flusher.wait_durable(lsn)

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
          stop: the LSN behind the last; None: up to what is durable on entering.

        Raises, on entering or iterating:
          LsnTruncatedError: ``start`` is below `first_lsn`, or retention overtook the reader.
          LogDivergedError: ``start``, or what was given, is not in the log's history, or after it.
          CorruptLogError: damage on disk, with its place; the records before it were given.
        """
        return new_record_stream(self._source(), start, stop, follow=False)

    def follow(self, start: int | Bookmark | None = None) -> RecordStream:
        """Like `read`, and then waits for new durable records, until it is left or the
        log is closed.

        A close does not wait for followers.  For one that has had everything durable it ends
        the iteration; one that has not is told so, by an error, after what it had already
        read from the disk.

        Raises:
          trio.ClosedResourceError: the log was closed before everything durable was given.
          LogDivergedError: also when `truncate_after` drops what was already given, however
              far the log has grown since.
          LogFailedError: the log is broken, after all that is durable was given.
        """
        return new_record_stream(self._source(), start, None, follow=True)

    def _source(self) -> LocalSource:
        if self._queue.state is State.CLOSED or self._closed.is_set():
            raise trio.ClosedResourceError(f"{printable(self.path)}: this log is closed")
        return LocalSource(self._directory, self._flusher, self._queue, self._blocking)

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
        check_int("lsn", lsn, 1)
        if lsn > self._flusher.last_lsn:
            await self.flush()
        behind = self._flusher.last_lsn + 1
        if lsn > behind:
            raise ValueError(f"lsn must be at most {behind}, behind the last record, not {lsn}")
        if lsn == behind:
            await self._run_job(Barrier(self._directory.rotate))
        self._queue.check_open()
        await self._blocking(self._directory.drop_before, lsn)

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
        """
        check_int("lsn", lsn, 0)
        if lsn < self.first_lsn - 1:
            raise ValueError(
                f"lsn must be at least {self.first_lsn - 1}, before the first record, not {lsn}"
            )
        await self._run_job(Barrier(partial(self._directory.truncate_after, lsn)))

    async def _run_job(self, barrier: Barrier) -> None:
        await self._queue.submit(barrier)
        if barrier.error is not None:
            raise barrier.error

    # -- what it is --

    @property
    def path(self) -> str:
        """The log's directory, absolute."""
        return self._directory.path

    @property
    def uuid(self) -> uuid.UUID:
        """Made with the log, kept for ever, also by its copies."""
        return uuid.UUID(bytes=self._directory.log_uuid)

    @property
    def epoch(self) -> int:
        """Which of the log's histories this is.  It grows whenever LSNs may be given a second
        time, that is at a `truncate_after` that drops something, and at the first open of a
        backup.  0 until then."""
        return epoch_of(self._flusher.history)

    @property
    def bookmark(self) -> Bookmark:
        """The durable end, with the epoch."""
        return Bookmark(self._flusher.durable_lsn, self.epoch)

    @property
    def first_lsn(self) -> int:
        """The oldest record; ``last_lsn + 1`` where there is none."""
        return self._directory.first_lsn

    @property
    def last_lsn(self) -> int:
        """The newest record written; with ``durability="sync"`` it is durable."""
        return self._flusher.last_lsn

    @property
    def durable_lsn(self) -> int:
        """The newest record that a sync has covered."""
        return self._flusher.durable_lsn

    @property
    def recovery(self) -> RecoveryReport:
        """What this open found and did."""
        return self._directory.report

    def statistics(self) -> WalStatistics:
        """A look at queue, syncs and disk.  Cheap; no checkpoint."""
        queue, flusher = self._queue, self._flusher
        queue.note_peaks()
        counters, syncs = queue.counters, flusher.counters
        records, waiting = queue.records_waiting, queue.bytes_waiting
        last_us = syncs.last_us
        return WalStatistics(
            records_waiting=records,
            bytes_waiting=waiting,
            max_queue_size=queue.max_queue_size,
            max_queue_bytes=queue.max_queue_bytes,
            queue_utilization=min(
                1.0, max(records / queue.max_queue_size, waiting / queue.max_queue_bytes)
            ),
            peak_records_waiting=counters.peak_records_waiting,
            peak_bytes_waiting=counters.peak_bytes_waiting,
            tasks_waiting_send=queue.blocked,
            tasks_waiting_durable=queue.tasks_waiting() + flusher.waiting,
            backpressure_waits=counters.backpressure_waits,
            backpressure_seconds=counters.backpressure_seconds,
            rejected=counters.rejected,
            records_appended=syncs.records_appended,
            bytes_appended=syncs.bytes_appended,
            batches_synced=syncs.batches_synced,
            sync_seconds_total=syncs.seconds_total,
            sync_seconds_max=syncs.seconds_max,
            sync_seconds_histogram=tuple(
                zip((*HISTOGRAM_BOUNDS, math.inf), syncs.buckets, strict=True)
            ),
            first_lsn=self.first_lsn,
            last_lsn=flusher.last_lsn,
            durable_lsn=flusher.durable_lsn,
            segments=self._directory.segments,
            disk_bytes=self._directory.disk_bytes,
            last_sync_time=None if last_us is None else to_datetime(last_us),
            state=queue.state.value,
        )

    def __repr__(self) -> str:
        state = self._queue.state.value
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
        await self._close()
        await trio.lowlevel.checkpoint()
        self._tell_failure()

    def _tell_failure(self) -> None:
        queue = self._queue
        if queue.failure is not None and not queue.failure_told:
            raise queue.failed(queue.loss, queue.failure)

    async def _close(self) -> None:
        if self._forked:
            await self._end_forked()
            return
        if not self._closing:
            self._closing = True
            # In a task of its own: Ctrl-C is delivered to the main task, even shielded.
            self._nursery.start_soon(self._shut)
        await self._closed.wait()

    @enable_ki_protection
    async def _shut(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                self._queue.close()
                await self._flusher.done.wait()
                self._directory.stop_preparing()
                await self._maintenance_done.wait()
                if self._before_close is not None:
                    await self._before_close()
                await self._blocking.close()
                orderly = self._queue.failure is None
                if self._handed_out:
                    close = partial(self._directory.close, orderly=orderly)
                else:
                    close = partial(self._directory.abandon, self._undo_opening)
                await self._worker.call(close)
                if self._handed_out and orderly:
                    last_lsn = self._flusher.last_lsn
                    text = f"closed at LSN {last_lsn}"
                    tell(logging.INFO, "closed", self.path, text, last_lsn=last_lsn)
            except Forked:
                pass
            except OSError as exc:
                self._queue.fail(exc, None, "unknown")
            finally:
                if not self._forked:
                    self._worker.stop()
                    await self._worker_done.wait()
                    # Once more, for where the worker has ended before it could.
                    self._directory.close(orderly=False)
                    self._queue.closed()
                    self._closed.set()

    def _disown(self) -> None:
        """In a forked child: the log is the parent's, and so are the threads that work for it."""
        self._forked = True
        self._queue.disown()
        self._directory.disown()
        self._worker.disown()
        self._blocking.disown()

    async def _end_forked(self) -> None:
        """In a forked child nobody will ever wake the log's tasks, so that they must not be
        waited for; and to cancel them would have trio change the epoll instance that it shares
        with the parent.  So each is woken with an error where it stands, and on its way out
        wakes none of the others."""
        self._closed.set()
        # First what threads have said before the fork: a task must not be woken twice.
        heard = trio.Event()
        trio.lowlevel.current_trio_token().run_sync_soon(heard.set)
        for _ in range(FORKED_TURNS):
            if heard.is_set():
                break
            await trio.lowlevel.cancel_shielded_checkpoint()
        while self._nursery.child_tasks:
            for task in self._nursery.child_tasks:
                # Else it is about to run, and will stand somewhere else.
                if is_parked(task):
                    reschedule(task, outcome.Error(Forked()))
            await trio.lowlevel.cancel_shielded_checkpoint()

    # -- for a database, which writes all of the log's records --

    def _own(self, owner: Owner) -> Callable[[bytes, Task], Awaitable[int]]:
        """From here on only the owner appends, with what this returns: `append` without its
        checks."""
        self._queue.owner = owner
        for name in (
            "append",
            "append_many",
            "send",
            "send_nowait",
            "truncate_before",
            "truncate_after",
        ):
            setattr(self, name, _refuse)
        return self._queue.append

    def _keep_from(self, lsn: int) -> None:
        """What is below may be dropped, as far as retention lets go of it."""
        self._directory.keep_from = lsn
        self._flusher.maintenance.set()

    def _abandon(self) -> None:
        """Have the tasks end that were started, and let go of the files: nothing was accepted."""
        self._queue.close()
        self._flusher.done.set()
        self._flusher.maintenance.set()
        self._worker.stop()
        self._directory.abandon()

    # -- the tasks of the log's nursery --

    def _start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        nursery.start_soon(self._run_worker)
        nursery.start_soon(self._flusher.run)
        nursery.start_soon(self._maintain)

    @enable_ki_protection
    async def _run_worker(self) -> None:
        try:
            await self._worker.run()
        except Forked:
            pass
        finally:
            if not self._forked:
                self._worker_done.set()

    @enable_ki_protection
    async def _maintain(self) -> None:
        """Prepare the next segment, apply retention: what must not hold up a commit."""
        flusher, directory = self._flusher, self._directory
        policy = self._options.retention
        with trio.CancelScope(shield=True):
            try:
                while not flusher.done.is_set():
                    try:
                        await self._blocking(directory.apply_retention, policy)
                        await self._wait_for_maintenance(policy)
                        if flusher.spare_wanted and not flusher.done.is_set():
                            flusher.spare_wanted = False
                            await self._blocking(directory.prepare_spare)
                    except (OSError, LogFullError) as exc:
                        text = f"retention failed, will try again: {exc!r}"
                        tell(logging.WARNING, "retention_failed", self.path, text, error=repr(exc))
                        with trio.move_on_after(MAINTENANCE_RETRY_SECONDS):
                            await flusher.done.wait()
            except Forked:
                pass
            except trio.ClosedResourceError:
                if not self._forked:
                    raise
            finally:
                if not self._forked:
                    self._maintenance_done.set()

    async def _wait_for_maintenance(self, policy: Retention) -> None:
        flusher = self._flusher
        due_us = self._directory.next_retention_us(policy)
        seconds = math.inf if due_us is None else max(due_us / 1e6, MAINTENANCE_RETRY_SECONDS)
        with trio.move_on_after(seconds):
            await flusher.maintenance.wait()
        if flusher.maintenance.is_set():
            flusher.maintenance = trio.Event()


def _refuse(*_: object, **__: object) -> NoReturn:
    raise TypeError("this log belongs to a database, whose transactions write it")


class _Latch:
    """An event that is waited for to the end: neither cancellation nor Ctrl-C cuts in."""

    def __init__(self) -> None:
        self._set = False
        self._tasks: list[Task] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            reschedule(task)

    async def wait(self) -> None:
        if self._set:
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            self._tasks.append(current_task())
            await wait_task_rescheduled(lambda _: Abort.FAILED)


_new_log = constructor(WriteAheadLog)


@final
class _OpenWal(AbstractAsyncContextManager[WriteAheadLog]):
    """What `open_wal` returns.

    A class, not a generator: ``__aexit__`` is then protected from Ctrl-C from its first
    instruction on, and the body's exception is not touched by the nursery.
    """

    def __init__(
        self,
        options: _Options,
        files: Files,
        *,
        check: Callable[[Plan], int | None] | None = None,
        keep_from: Callable[[], int] | None = None,
        database: bool = False,
    ) -> None:
        self._options = options
        self._files = files
        self._check = check
        self._keep_from = keep_from
        self._database = database
        self._entered = False
        self._wal: WriteAheadLog | None = None
        self._nursery_manager: AbstractAsyncContextManager[trio.Nursery] | None = None

    @enable_ki_protection
    async def __aenter__(self) -> WriteAheadLog:
        if self._entered:
            raise RuntimeError("open_wal() gives a context manager for one use")
        require_trio("open_wal")
        self._entered = True
        options, files = self._options, self._files
        blocking = Blocking(threaded=files.threaded)
        directory = await blocking(
            open_log_directory,
            files,
            options.path,
            segment_size=options.segment_size,
            verify_bytes=options.verify_bytes,
            compression=options.compression,
            check=self._check,
            database=self._database,
            trust_directory=options.trust_directory,
        )
        worker: Worker | None = None
        try:
            if self._keep_from is not None:
                directory.keep_from = self._keep_from()
            worker = self._make_worker(directory)
            wal = _new_log(options, files, directory, blocking, worker)
            manager = trio.open_nursery()
            nursery = await manager.__aenter__()
        except BaseException:
            # No descriptor for the worker, or no memory.
            if worker is not None:
                worker.close()
            directory.abandon()
            raise
        try:
            wal._start(nursery)
            with trio.CancelScope(shield=True):
                await worker.ready()
        except BaseException:
            # No thread, or no memory.
            wal._abandon()
            nursery.cancel_scope.shield = True
            await manager.__aexit__(None, None, None)
            worker.close()
            raise
        self._wal, self._nursery_manager = wal, manager
        if self._keep_from is None:
            self._hand_out()
        return wal

    def _make_worker(self, directory: LogDirectory) -> Worker:
        files = self._files
        if files.threaded:
            return ThreadWorker(directory.publish)
        gate = getattr(files, "gate", trio.lowlevel.cancel_shielded_checkpoint)
        return InlineWorker(gate, directory.publish)

    def _hand_out(self) -> None:
        """The open has succeeded."""
        wal = self._wal
        assert wal is not None
        wal._handed_out = True
        report = wal.recovery
        text = "closed in order before" if report.clean_shutdown else "recovered"
        if report.torn_bytes:
            text += f", {report.torn_bytes} bytes of an unfinished batch cut"
        tell(
            logging.WARNING if report.torn_bytes else logging.INFO,
            "opened",
            wal.path,
            f"opened at LSN {report.last_lsn} in {report.seconds:.3f} seconds, {text}",
            **attrs.asdict(report),
        )

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._wal is not None
        assert self._nursery_manager is not None
        await self._wal._close()
        # All of its tasks have ended: this neither waits nor wraps anything.
        await self._nursery_manager.__aexit__(None, None, None)
        if exc is None:
            self._wal._tell_failure()


def open_wal(
    path: str | os.PathLike[str],
    *,
    max_queue_size: float = 10_000,
    max_queue_bytes: float = 64 * MiB,
    max_record_size: int = 16 * MiB,
    max_batch_bytes: int = 8 * MiB,
    flush_interval: float = 0.010,
    segment_size: int = 64 * MiB,
    durability: Durability = "sync",
    retention: Retention | None = None,
    compression: Literal["none", "zstd"] | None = None,
    verify_bytes: float = VERIFY_BYTES,
    trust_directory: bool = False,
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
      path: a directory; created with mode 0700 if it is missing.
      max_queue_size: records that may wait to be written; `math.inf`: no bound.
      max_queue_bytes: payload bytes that may wait; `math.inf`: no bound.  One larger
          record or unit may wait alone.
      max_record_size: bytes of one record.
      max_batch_bytes: payload bytes of one write; a larger record or unit is written alone.
      flush_interval: seconds that an accepted record for which nobody waits may stay
          unsynced; 0: written at once.
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
      files: another file system, such as `trio_wal.testing.MemoryFiles`.

    Raises, when called:
      TypeError, ValueError: an argument is wrong; the message names it.

    Raises, on entering; what was there is as it was, and nothing else stays:
      LogLockedError: somebody else has it open.
      WrongDirectoryError: it is a database, or something else that is no log.
      UntrustedDirectoryError: see ``trust_directory``.
      CorruptLogError: it is damaged.
      UnsupportedFormatError: a newer trio-wal wrote it.
      LogFullError: no disk space to recover it.
      OSError: the operating system's own.
      RuntimeError: trio is not running.

    Raises, on leaving:
      LogFailedError: a write or sync failed and nobody has been told.
    """
    if retention is not None and not isinstance(retention, Retention):
        raise TypeError(
            "retention must be None or made of KeepAll, KeepSegments, KeepFor and KeepBytes, "
            f"not {type(retention).__name__}"
        )
    check_one_of("durability", durability, ("sync", "interval", "none"))
    if compression is not None:
        check_one_of("compression", compression, ("none", "zstd"))
        if compression == "zstd":
            require_zstd()
    options = _Options(
        path=check_path(path),
        max_queue_size=check_int_or_inf("max_queue_size", max_queue_size, 1),
        max_queue_bytes=check_int_or_inf("max_queue_bytes", max_queue_bytes, 1),
        max_record_size=check_int("max_record_size", max_record_size, 1, FRAME_BODY_MAX - 4),
        max_batch_bytes=check_int("max_batch_bytes", max_batch_bytes, 1, FRAME_BODY_MAX // 2),
        flush_interval=check_seconds("flush_interval", flush_interval),
        segment_size=check_int("segment_size", segment_size, 1, SEGMENT_SIZE_MAX),
        durability=durability,
        retention=KeepAll() if retention is None else retention,
        compression=compression,
        verify_bytes=check_int_or_inf("verify_bytes", verify_bytes, 0),
        trust_directory=check_bool("trust_directory", trust_directory),
    )
    return _OpenWal(options, OsFiles() if files is None else files)
