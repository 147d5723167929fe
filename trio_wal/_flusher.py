"""Group commit: takes one batch after the other, makes it durable, acknowledges it.

Law: one write in flight.  Write, sync, only then acknowledge, then the next: at every
acknowledgement ``acknowledged <= synced`` is asserted.  The first failure ends it; a
sync is never tried again.  The loop is shielded from cancellation and from Ctrl-C and
ends when the queue's channel is closed and empty.

There is no fixed delay.  A batch is whatever queued while the last sync ran; after an
acknowledgement the woken tasks run once before the next batch is taken, so that N
busy writers share one sync instead of falling into two halves that alternate.
"""

from __future__ import annotations

import heapq
import logging
import math
import weakref
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Final, Literal, Protocol

import attrs
import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from ._disk.directory import LogDirectory
from ._events import tell
from ._exceptions import CorruptLogError, LogFullError, LsnTruncatedError
from ._identity import History
from ._queue import Barrier, Batch, State, WriteQueue
from ._worker import Forked, Worker

Durability = Literal["sync", "interval", "none"]
"""What `open_wal` takes as ``durability``: ``"sync"``, ``"interval"`` or ``"none"``."""

FULL_RETRY_SECONDS: Final = 0.25
"""How often a full disk is looked at again when nobody asks."""
PRESSURE_SECONDS: Final = 1.0
"""Writers that wait for room without a pause for so long are worth a line in the log."""
HISTOGRAM_BOUNDS: Final = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005,
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds, in seconds, of the buckets of ``sync_seconds_histogram``."""


class Cuttable(Protocol):
    """A pass over this log's records."""

    def cut(self, lsn: int) -> None: ...


@attrs.define
class SyncCounters:
    """Running totals; `WalStatistics` says what they mean."""

    records_appended: int = 0
    bytes_appended: int = 0
    batches_synced: int = 0
    seconds_total: float = 0.0
    seconds_max: float = 0.0
    buckets: list[int] = attrs.Factory(lambda: [0] * (len(HISTOGRAM_BOUNDS) + 1))
    last_us: int | None = None


class Flusher:
    """The task between the queue and the I/O worker."""

    def __init__(
        self,
        queue: WriteQueue,
        directory: LogDirectory,
        worker: Worker,
        durability: Durability,
        flush_interval: float,
        clock_us: Callable[[], int],
    ) -> None:
        self._queue = queue
        self._directory = directory
        self._worker = worker
        self._durability = durability
        self._flush_interval = flush_interval
        self._clock_us = clock_us
        self.counters = SyncCounters()
        self.last_lsn = directory.last_lsn
        """Of what is written."""
        self.durable_lsn = directory.last_lsn
        """Of what is synced."""
        self.in_flight: Batch | None = None
        self.maintenance = trio.Event()
        """Set when there may be something to do beside the writing."""
        self.spare_wanted = False
        """Whether the next segment should be prepared now."""
        self.done = trio.Event()
        self.followers = trio.lowlevel.ParkingLot()
        """Tasks that wait for any new durable record."""
        self.readings: weakref.WeakSet[Cuttable] = weakref.WeakSet()
        """Readers, who must notice when the log's end is cut."""
        self.history: History = directory.history
        self.cuts = 0
        """How often they were told."""
        self._active_number = directory.active.header.number
        self._sync_due: float | None = None
        self._sync_scope = trio.CancelScope()
        """In which the flusher waits for records until then."""
        self._pressed = False
        """Whether writers waited for room when the last batch was taken."""
        self._pressed_since = 0.0
        self._pressure_told = False
        self._waiters: list[tuple[int, int, Task]] = []
        self._waiter_numbers = count()

    # -- waiting for durability --

    @property
    def waiting(self) -> int:
        """Tasks in `wait_durable` and in the batch being written."""
        batch = self.in_flight
        return len(self._waiters) + (0 if batch is None else len(batch.entries) - batch.unwaited)

    async def wait_durable(self, lsn: int) -> None:
        if self.durable_lsn >= lsn:
            await trio.lowlevel.checkpoint()
            return
        self._queue.check_open(self._queue.loss)
        waiter = (lsn, next(self._waiter_numbers), current_task())
        heapq.heappush(self._waiters, waiter)
        self._queue.expect(lsn - self.last_lsn)
        if self._sync_due is not None and lsn <= self.last_lsn:
            # Written, and to be synced some time.
            self._sync_due = self._sync_scope.deadline = trio.current_time()

        def abort(_: object) -> Abort:
            self._waiters.remove(waiter)
            heapq.heapify(self._waiters)
            return Abort.SUCCEEDED

        await wait_task_rescheduled(abort)
        if self.durable_lsn < lsn:
            if self._queue.state is State.FAILED:
                self._queue.check_open(self._queue.loss)
            raise trio.ClosedResourceError(f"the log was closed before LSN {lsn} was written")

    def _durable_up_to(self, lsn: int) -> None:
        self.durable_lsn = lsn
        waiters = self._waiters
        while waiters and waiters[0][0] <= lsn:
            reschedule(heapq.heappop(waiters)[2])
        if self.followers:
            self.followers.unpark_all()

    def _release_all(self) -> None:
        """Nothing will become durable any more."""
        waiters, self._waiters = self._waiters, []
        for _, _, task in waiters:
            reschedule(task)
        self.followers.unpark_all()

    # -- the loop --

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Until the queue is closed and empty, or something failed."""
        try:
            with trio.CancelScope(shield=True):
                while (batch := await self._next_batch()) is not None:
                    await self._commit(batch)
                    del batch  # its payload must not stay until the next one comes
                if self.durable_lsn < self.last_lsn:
                    await self._sync()
        except Forked:
            pass
        except OSError as exc:
            self._fail(exc)
        except BaseException as exc:
            # Not the disk but this program is at fault: nobody may hang on it.
            self._fail(exc)
            raise
        finally:
            if not self._queue.disowned:
                self._release_all()
                self.maintenance.set()
                self.done.set()

    async def _next_batch(self) -> Batch | None:
        """The oldest batch, still being filled; None when the queue is closed and empty."""
        while True:
            try:
                return self._queue.batches.receive_nowait()
            except trio.WouldBlock:
                pass
            except trio.EndOfChannel:
                return None
            if self._sync_due is None:
                return await self._receive()
            batch: Batch | None = None
            if not self._is_awaited(self.last_lsn):
                with trio.move_on_at(self._sync_due) as self._sync_scope:
                    batch = await self._receive()
                if not self._sync_scope.cancelled_caught:
                    return batch
            await self._sync()

    def _is_awaited(self, lsn: int) -> bool:
        """Whether somebody waits for a record up to this one."""
        return bool(self._waiters) and self._waiters[0][0] <= lsn

    async def _receive(self) -> Batch | None:
        try:
            return await self._queue.batches.receive()
        except trio.EndOfChannel:
            return None

    async def _commit(self, batch: Batch) -> None:
        queue = self._queue
        if self._flush_interval and self._durability == "sync":
            awaited = self._waiters[0][0] - self.last_lsn if self._waiters else math.inf
            await queue.doze(batch, self._flush_interval, awaited)
        if queue.blocked or self._pressed:
            self._note_pressure()
        queue.take(batch)
        self.in_flight = batch
        while batch.entries:
            try:
                await self._write(batch)
                break
            except LogFullError as exc:
                await self._wait_for_space(batch, exc)
        self.in_flight = None

    def _note_pressure(self) -> None:
        """Say once where writers have been waiting for room for a while, and once where they
        no longer do: a queue that is full for an instant is how it should be."""
        queue, now = self._queue, trio.current_time()
        blocked = queue.blocked
        if not blocked:
            if self._pressure_told:
                seconds = now - self._pressed_since
                text = f"no writer waits for room any more, after {seconds:.1f} seconds"
                path = self._directory.path
                tell(logging.INFO, "backpressure_ended", path, text, seconds=seconds)
            self._pressed = self._pressure_told = False
        elif not self._pressed:
            self._pressed, self._pressed_since = True, now
        elif not self._pressure_told and now - self._pressed_since >= PRESSURE_SECONDS:
            self._pressure_told = True
            tell(
                logging.WARNING,
                "backpressure_began",
                self._directory.path,
                f"writers wait for room in the queue, {blocked} at the moment",
                tasks=blocked,
                records=queue.records_waiting,
                bytes=queue.bytes_waiting,
            )

    async def _write(self, batch: Batch) -> None:
        """One write, one sync, one acknowledgement."""
        barrier = batch.barrier
        now = trio.current_time()
        sync = (
            self._durability == "sync"
            or barrier is not None
            or (self._sync_due is not None and now >= self._sync_due)
            or (
                self._durability == "interval"
                and (not self._flush_interval or self._is_awaited(self.last_lsn + batch.records))
            )
        )
        first_lsn = self.last_lsn + 1
        records = batch.payload()
        if records:
            wants_spare = await self._worker.call(
                partial(self._directory.write, records, self.durable_lsn, sync=sync)
            )
            self.last_lsn += len(records)
            self.counters.records_appended += len(records)
            self.counters.bytes_appended += batch.bytes
            if sync:
                self._count_sync()
            elif self._sync_due is None and self._durability == "interval":
                self._sync_due = now + self._flush_interval
            self._look_after(wants_spare)
            del records
        elif sync and self.durable_lsn < self.last_lsn:
            await self._sync()
        if barrier is not None and barrier.job is not None:
            await self._run_job(barrier, barrier.job)
        elif self._durability == "sync":
            # The law of this file; a bug here must stop the log, not lose a record.
            assert first_lsn + batch.records - 1 <= self._directory.synced_lsn
        if sync:
            self._sync_due = None
            self._durable_up_to(self._directory.synced_lsn)
        self._queue.settle(batch, first_lsn)
        self.in_flight = None
        # Let the woken run once: what they append next goes into one batch.
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _run_job(self, barrier: Barrier, job: Callable[[], None]) -> None:
        """A job may cut the log's end, or finish a segment."""
        try:
            await self._worker.call(job)
        except (LogFullError, CorruptLogError, LsnTruncatedError) as exc:
            barrier.error = exc
        if self._directory.last_lsn < self.last_lsn:
            self.last_lsn = self.durable_lsn = self._directory.last_lsn
            self.history = self._directory.history
            self.cuts += 1
            for reading in list(self.readings):
                reading.cut(self.last_lsn)
            self.followers.unpark_all()
        self._look_after(False)

    def _look_after(self, wants_spare: bool) -> None:
        """Have the next segment prepared, or retention applied to a finished one."""
        number = self._directory.active.header.number
        if wants_spare and not self.spare_wanted:
            self.spare_wanted = True
            self.maintenance.set()
        if number != self._active_number:
            self._active_number = number
            self.maintenance.set()
            first_lsn = self._directory.active.header.first_lsn
            tell(
                logging.DEBUG,
                "rotated",
                self._directory.path,
                f"segment {number} begins at LSN {first_lsn}",
                segment=number,
                first_lsn=first_lsn,
                segments=self._directory.segments,
            )

    async def _sync(self) -> None:
        await self._worker.call(self._directory.sync)
        self._count_sync()
        self._sync_due = None
        self._durable_up_to(self._directory.synced_lsn)

    def _count_sync(self) -> None:
        counters = self.counters
        seconds = self._directory.sync_seconds
        counters.batches_synced += 1
        counters.seconds_total += seconds
        counters.seconds_max = max(counters.seconds_max, seconds)
        counters.buckets[bisect_left(HISTOGRAM_BOUNDS, seconds)] += 1
        counters.last_us = self._clock_us()

    # -- trouble --

    async def _wait_for_space(self, batch: Batch, error: LogFullError) -> None:
        """Hold what was only sent until there is a segment for it."""
        queue = self._queue
        started = trio.current_time()
        tell(
            logging.WARNING,
            "full",
            self._directory.path,
            f"the disk is full: {error}",
            needed=error.needed,
            last_lsn=self.last_lsn,
        )
        while True:
            closing = queue.state is State.CLOSING
            queue.refuse(error, batch)
            if closing:
                if batch.entries or queue.records_waiting:
                    self.in_flight = None
                    raise OSError(*_errno_of(error)) from error
                queue.state = State.CLOSING
                return
            await queue.wait_wants_space(FULL_RETRY_SECONDS)
            if queue.state is State.CLOSING and not (batch.entries or queue.records_waiting):
                return
            try:
                await self._worker.call(self._directory.make_room)
            except LogFullError as exc:
                error = exc
                continue
            queue.reopen()
            seconds = trio.current_time() - started
            text = f"there is disk space again, after {seconds:.1f} seconds"
            tell(logging.INFO, "space", self._directory.path, text, seconds=seconds)
            return

    def _fail(self, exc: BaseException) -> None:
        in_flight, self.in_flight = self.in_flight, None
        unsynced = in_flight is not None or self.durable_lsn < self.last_lsn
        self._queue.fail(exc, in_flight, "unknown" if unsynced else "not written")
        self._queue.batches.close()
        # Last: where this fails too, of MemoryError for one, everybody has been told.
        tell(
            logging.ERROR,
            "failed",
            self._directory.path,
            f"the log is broken: {exc!r}",
            outcome=self._queue.loss,
            last_lsn=self.last_lsn,
            durable_lsn=self.durable_lsn,
            error=repr(exc),
        )


def _errno_of(error: LogFullError) -> tuple[int, str]:
    cause = error.__cause__
    assert isinstance(cause, OSError)
    return cause.errno or 0, f"{error}"
