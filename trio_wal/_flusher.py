"""Group commit: takes one batch after the other, makes it durable, acknowledges it.

Law: one write in flight.  Write, sync, only then acknowledge, then the next: at every
acknowledgement it is asserted that the engine calls the records durable.  The first failure
ends it; a sync is never tried again.  The loop is shielded from cancellation and from Ctrl-C
and ends when the queue's channel is closed and empty.

Without ``commit_delay`` there is no delay.  A batch is whatever queued while the last sync ran;
after an acknowledgement the woken tasks run once before the next batch is taken, so that N
busy writers share one sync instead of falling into two halves that alternate.
"""

from __future__ import annotations

import errno
import logging
import weakref
from typing import Final, Literal

import trio

from ._batch import Batch, Job
from ._engine import Engine, Forked, Reader
from ._events import tell
from ._exceptions import (
    CorruptLogError,
    LogFailedError,
    LogFullError,
    LsnTruncatedError,
    Outcome,
    UnsupportedOperationError,
)
from ._pace import Delay
from ._queue import WriteQueue
from ._state import State
from ._watermark import Watermark

Durability = Literal["sync", "interval", "none"]
"""What `open_wal` takes as ``durability``: ``"sync"``, ``"interval"`` or ``"none"``."""

FULL_RETRY_SECONDS: Final = 0.25
"""How often a full disk is looked at again when nobody asks."""
PRESSURE_SECONDS: Final = 1.0
"""Writers that wait for room without a pause for so long are worth a line in the log."""


class FlushCounters:
    """Running totals; `WalStatistics` says what they mean."""

    __slots__ = ("bytes_appended", "records_appended")

    def __init__(self) -> None:
        self.records_appended: int = 0
        self.bytes_appended: int = 0


class Flusher:
    """The task between the queue and the engine."""

    def __init__(
        self,
        queue: WriteQueue,
        engine: Engine,
        durability: Durability,
        flush_interval: float,
        delay: Delay | None = None,
    ) -> None:
        """
        Args:
          delay: how long a batch waits for more; None: not at all.
        """
        self._queue = queue
        self._engine = engine
        self._durability = durability
        self._flush_interval = flush_interval
        self._delay = delay if durability == "sync" else None
        self._taken_at = 0.0
        self.counters = FlushCounters()
        self.in_flight: Batch | None = None
        self.done = trio.Event()
        self._watermark = Watermark()
        self.readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        """Whom to tell when the log's end was cut."""
        self._job: trio.Event | None = None
        """While a job is under way: set when it has ended."""
        self._job_failure: OSError | LogFailedError | None = None
        """What kept a job from its end."""
        self._sync_due: float | None = None
        self._sync_scope = trio.CancelScope()
        """In which the flusher waits for records until then."""
        self._at_once = False
        """Whether there was a batch when the one before it was done."""
        self._pressed = False
        """Whether writers waited for room when the last batch was taken."""
        self._pressed_since = 0.0
        self._pressure_waits = 0
        """How often a task had waited for room before that."""
        self._pressure_told = False

    # -- waiting for durability --

    @property
    def waiting(self) -> int:
        """Tasks in `wait_durable` and in the batch being written."""
        batch = self.in_flight
        return self._watermark.waiting + (
            0 if batch is None else len(batch.entries) - batch.unwaited
        )

    async def wait_durable(self, lsn: int) -> None:
        if self._engine.durable_lsn >= lsn:
            await trio.lowlevel.checkpoint()
            return
        self._queue.status.check_usable()
        last_lsn = self._engine.last_lsn
        self._queue.linger.expect(lsn - last_lsn)
        if self._sync_due is not None and lsn <= last_lsn:
            # Written, and to be synced some time.
            self._sync_due = self._sync_scope.deadline = trio.current_time()
        if not await self._watermark.wait(lsn):
            if self._queue.status.state is State.FAILED:
                self._queue.status.check_usable()
            raise trio.ClosedResourceError(f"the log was closed before LSN {lsn} was written")

    async def wait_beyond(self, lsn: int) -> bool:
        """Wait until more than ``lsn`` is durable, or the log's end was cut; False: there will be
        no more.

        Raises:
          LogFailedError
        """
        history = self._engine.tail.history
        while True:
            tail = self._engine.tail
            if tail.durable_lsn > lsn or tail.history != history:
                return True
            if self.done.is_set():
                if self._queue.status.state is State.FAILED:
                    self._queue.status.check_usable()
                return False
            await self._watermark.wait_news()

    # -- the loop --

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Until the queue is closed and empty, or something failed."""
        try:
            with trio.CancelScope(shield=True):
                while await self._wait_batch():
                    await self._commit()
                if self._engine.durable_lsn < self._engine.last_lsn:
                    await self._sync()
        except Forked:
            pass
        except (OSError, LogFailedError) as exc:
            self._fail(exc)
        except BaseException as exc:
            # Not the disk but this program is at fault: nobody may hang on it.
            self._fail(exc)
            raise
        finally:
            if not self._queue.status.disowned:
                self._watermark.release()
                self.done.set()

    async def _wait_batch(self) -> bool:
        """Until there is a batch, which is still being filled; False: the queue is closed and
        empty."""
        self._at_once = True
        while True:
            try:
                self._queue.queued.receive_nowait()
            except trio.WouldBlock:
                pass
            except trio.EndOfChannel:
                return False
            else:
                return True
            self._at_once = False
            self._queue.backlog.crowded_since = None
            if self._sync_due is None:
                return await self._receive()
            received = False
            if self._watermark.lowest > self._engine.last_lsn:
                with trio.move_on_at(self._sync_due) as self._sync_scope:
                    received = await self._receive()
                if not self._sync_scope.cancelled_caught:
                    return received
            await self._sync()

    async def _receive(self) -> bool:
        try:
            await self._queue.queued.receive()
        except trio.EndOfChannel:
            return False
        return True

    async def _commit(self) -> None:
        queue = self._queue
        if self._flush_interval and self._durability == "sync":
            awaited = self._watermark.lowest - self._engine.last_lsn
            await queue.linger.unwaited(self._flush_interval, awaited)
        if self._delay is not None:
            await self._wait_siblings(self._delay)
        if queue.admission.blocked or self._pressed:
            self._note_pressure()
        batch = self.in_flight = queue.take(at_once=self._at_once)
        while batch.entries:
            try:
                await self._write(batch)
                break
            except LogFullError as exc:
                await self._wait_for_space(batch, exc)
        self.in_flight = None

    async def _wait_siblings(self, delay: Delay) -> None:
        seconds = delay.seconds
        if seconds:
            await self._queue.linger.for_siblings(seconds, delay.siblings)
        self._taken_at = trio.current_time()

    def _note_pressure(self) -> None:
        """Say once where writers have been waiting for room for a while, and once where they
        no longer do: a queue that is full for an instant is how it should be."""
        queue, now = self._queue, trio.current_time()
        blocked = queue.admission.blocked
        if not blocked:
            if self._pressure_told:
                seconds = now - self._pressed_since
                waits = queue.waits.count - self._pressure_waits
                text = f"no writer waits for room any more, after {seconds:.1f} seconds"
                text += f" and {waits} waits"
                path = self._engine.name
                tell(logging.INFO, "backpressure_ended", path, text, seconds=seconds, waits=waits)
            self._pressed = self._pressure_told = False
        elif not self._pressed:
            self._pressed, self._pressed_since = True, now
            self._pressure_waits = queue.waits.count
        elif not self._pressure_told and now - self._pressed_since >= PRESSURE_SECONDS:
            self._pressure_told = True
            tell(
                logging.WARNING,
                "backpressure_began",
                self._engine.name,
                f"writers wait for room in the queue, {blocked} at the moment",
                tasks=blocked,
                records=queue.backlog.records,
                bytes=queue.backlog.bytes,
            )

    async def _write(self, batch: Batch) -> None:
        """One write, one sync, one acknowledgement."""
        engine, barrier = self._engine, batch.barrier
        last_lsn = engine.last_lsn
        now = trio.current_time()
        sync = (
            self._durability == "sync"
            or barrier is not None
            or (self._sync_due is not None and now >= self._sync_due)
            or (
                self._durability == "interval"
                and (not self._flush_interval or self._watermark.lowest <= last_lsn + batch.records)
            )
        )
        records = batch.payload()
        if records:
            await engine.write(records, sync=sync)
            self.counters.records_appended += len(records)
            self.counters.bytes_appended += batch.bytes
            if not sync and self._sync_due is None and self._durability == "interval":
                self._sync_due = now + self._flush_interval
            del records
        elif sync and engine.durable_lsn < last_lsn:
            await self._sync()
        if isinstance(barrier, Job):
            await self._run_job(barrier)
        elif self._durability == "sync":
            # The law of this file; a bug here must stop the log, not lose a record.
            assert last_lsn + batch.records <= engine.durable_lsn
        if sync:
            self._sync_due = None
            self._watermark.reached(engine.durable_lsn)
        if self._delay is not None:
            now = trio.current_time()
            waiting, seconds = self._queue.backlog.entries, now - self._taken_at
            self._delay.written(now, len(batch.entries), waiting, seconds)
        self._queue.acknowledge(batch, last_lsn + 1)
        self.in_flight = None
        # Let the woken run once: what they append next goes into one batch.
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _run_job(self, job: Job) -> None:
        """A job may cut the log's end."""
        history = self._engine.tail.history
        self._job = trio.Event()
        try:
            await job.run()
        except (
            LogFullError,
            CorruptLogError,
            LsnTruncatedError,
            UnsupportedOperationError,
        ) as exc:
            job.error = exc
        except (OSError, LogFailedError) as exc:
            self._job_failure = exc
            raise
        finally:
            ended, self._job = self._job, None
            ended.set()
        if self._engine.tail.history != history:
            for reader in list(self.readers):
                reader.epoch_changed()
            self._watermark.tell()

    async def wait_job(self) -> None:
        """Wait for a job that is under way.

        Raises:
          LogFailedError: one has failed, so that nobody knows where the log ends.
        """
        if self._job is not None:
            await self._job.wait()
        if self._job_failure is not None:
            raise self._queue.status.failed("unknown", self._job_failure)

    async def _sync(self) -> None:
        await self._engine.sync()
        self._sync_due = None
        self._watermark.reached(self._engine.durable_lsn)

    # -- trouble --

    async def _wait_for_space(self, batch: Batch, error: LogFullError) -> None:
        """Hold what was only sent until there is a segment for it."""
        queue = self._queue
        started = trio.current_time()
        tell(
            logging.WARNING,
            "full",
            self._engine.name,
            f"the disk is full: {error}",
            needed=error.needed,
            last_lsn=self._engine.last_lsn,
        )
        while True:
            closing = queue.status.state is State.CLOSING
            queue.refuse(error, batch)
            if closing:
                if batch.entries or queue.backlog.records:
                    self.in_flight = None
                    raise OSError(*_errno_of(error)) from error
                queue.status.state = State.CLOSING
                return
            with trio.move_on_after(FULL_RETRY_SECONDS):
                await queue.wants_space.wait()
            if queue.status.state is State.CLOSING and not (batch.entries or queue.backlog.records):
                return
            try:
                await self._engine.make_room()
            except LogFullError as exc:
                error = exc
                continue
            queue.reopen()
            seconds = trio.current_time() - started
            text = f"there is disk space again, after {seconds:.1f} seconds"
            tell(logging.INFO, "space", self._engine.name, text, seconds=seconds)
            return

    def _fail(self, exc: BaseException) -> None:
        in_flight, self.in_flight = self.in_flight, None
        tail = self._engine.tail
        # An engine may know what became of a batch; an error of the system never says.
        outcome: Outcome = exc.outcome if isinstance(exc, LogFailedError) else "unknown"
        unsynced = tail.durable_lsn < tail.last_lsn
        if in_flight is not None and outcome == "unknown":
            unsynced = True
        self._queue.fail(exc, in_flight, outcome, "unknown" if unsynced else "not written")
        self._queue.queued.close()
        # Last: where this fails too, of MemoryError for one, everybody has been told.
        tell(
            logging.ERROR,
            "failed",
            self._engine.name,
            f"the log is broken: {exc!r}",
            outcome=self._queue.status.loss,
            last_lsn=tail.last_lsn,
            durable_lsn=tail.durable_lsn,
            error=repr(exc),
        )


def _errno_of(error: LogFullError) -> tuple[int, str]:
    cause = error.__cause__
    number = cause.errno if isinstance(cause, OSError) else None
    return number or errno.ENOSPC, f"{error}"
