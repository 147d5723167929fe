"""What waits to be written: acceptance, back-pressure, withdrawal, order.

Law: one event loop, no I/O.  Writers fill batches; the flusher takes them.  Nothing
here awaits but the few lines that park a task.

A batch is filled where it will be written from: the writers put their records
straight into the newest batch, keyed by the task that waits (or by a number, where
nobody does).  The batches themselves travel to the flusher through a bounded
`trio.open_memory_channel`, whose closing is the signal to shut down.  One channel
operation a batch, not a record: at 0.7 us against 2.4 us for a whole park and
wake, one a record costs a quarter of the throughput (docs/design).

Invariants:
  * waiting records <= max_queue_size and waiting payload bytes <= max_queue_bytes,
    but for one record or unit that is larger by itself and waits alone;
  * while anybody is blocked nobody passes: admission is in order of arrival, and is
    done by whoever makes room, not by the blocked task when it happens to run;
  * an entry is withdrawn without a trace until its batch is taken, and not after.
"""

from __future__ import annotations

import math
import types
from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from itertools import count
from typing import Any, Final, Protocol

import attrs
import trio
from trio.lowlevel import (
    Abort,
    Task,
    current_task,
    enable_ki_protection,
    reschedule,
    wait_task_rescheduled,
)

from ._admission import Admission, Blocked, Line
from ._batch import Batch, Flush, Item, Job, Key, bytes_of, count_of
from ._exceptions import LogFullError, Outcome
from ._park import REUSES, WOKEN, park, request
from ._state import State, Status
from ._text import printable


@attrs.define
class Counters:
    """Running totals; `WalStatistics` says what they mean."""

    peak_records_waiting: int = 0
    peak_bytes_waiting: int = 0
    rejected: int = 0


class Claim:
    """What trio calls when the task of an entry is cancelled.

    Claims are used again: making one anew for every record costs a twentieth of the
    throughput, most of it in the garbage collector.
    """

    __slots__ = ("_queue", "batch", "request", "task")

    def __init__(self, queue: WriteQueue) -> None:
        self._queue = queue
        self.request: Any = request(self)
        """For `park`."""
        self.batch: Batch | None = None
        self.task: Task | None = None

    def __call__(self, _raise_cancel: object) -> Abort:
        assert self.batch is not None
        assert self.task is not None
        return self._queue.withdraw(self.batch, self.task)


class Owner(Protocol):
    """Whoever writes all records of a log and must know what becomes of each: the database."""

    def may_withdraw(self, task: Task) -> bool:
        """Whether the task's entry may still be taken back."""
        ...

    def withdrawn(self, task: Task) -> None:
        """The task's entry will not be in the log."""
        ...

    def settled(self, batch: Batch) -> None:
        """The batch is durable and has its LSNs; its tasks have not run yet."""
        ...

    def failed(self) -> None:
        """The log is broken: nothing more will become durable."""
        ...


class WriteQueue:
    """The bounded queue between the writers and the flusher."""

    def __init__(
        self,
        status: Status,
        max_queue_size: float,
        max_queue_bytes: float,
        max_batch_bytes: int,
        max_batch_records: int,
    ) -> None:
        self.status: Final = status
        self.line: Final = Line(self.withdraw_blocked)
        self._admission: Final = Admission(
            max_queue_size, max_queue_bytes, max_batch_bytes, max_batch_records, self.line
        )
        self.counters = Counters()
        self._send, self.batches = trio.open_memory_channel[Batch](max_queue_size)
        self._sealed: deque[Batch] = deque()
        """Batches that wait behind one another, without the one that is filling."""
        self._numbers = count()
        self._lingering: Task | None = None
        self._awaited: float = math.inf
        """While the flusher lingers: with so many records somebody waits for the filling batch."""
        self._wants_space = trio.Event()
        self._full: LogFullError | None = None
        self.owner: Owner | None = None
        self._claims: list[Claim] = []
        """Free ones; at most as many as tasks ever waited at a time."""
        self.filling = Batch()
        self._set_limits()

    # -- counts --

    @property
    def records_waiting(self) -> int:
        return self._admission.records + self.filling.records

    @property
    def bytes_waiting(self) -> int:
        return self._admission.bytes + self.filling.bytes

    @property
    def blocked(self) -> int:
        return len(self.line.blocked)

    def tasks_waiting(self) -> int:
        """Tasks whose accepted entries wait to be taken."""
        return sum(len(b.entries) - b.unwaited for b in (*self._sealed, self.filling))

    def note_peaks(self) -> None:
        """The queue only grows between two takes or withdrawals: looking then is exact."""
        counters = self.counters
        counters.peak_records_waiting = max(counters.peak_records_waiting, self.records_waiting)
        counters.peak_bytes_waiting = max(counters.peak_bytes_waiting, self.bytes_waiting)

    # -- acceptance --

    def _set_limits(self) -> None:
        """How far the filling batch may be filled without asking: see `append`."""
        batch = self.filling
        if (
            self.status.state is not State.OPEN
            or self._lingering is not None
            or isinstance(batch.barrier, Job)
        ):
            batch.records_credit = 0
        else:
            self._admission.credit(batch)

    def _put(self, key: Key, item: Item) -> Batch:
        """Accept: there is room."""
        batch = self.filling
        size, records = bytes_of(item), count_of(item)
        if self._admission.starts_batch(item, batch):
            self._sealed.append(batch)
            self._admission.seal(batch)
            batch = self.filling = Batch()
        batch.entries[key] = item
        batch.bytes += size
        if isinstance(key, int):
            if len(batch.entries) == 1:
                batch.opened = trio.current_time()
            batch.unwaited += 1
        if not isinstance(item, bytes):
            batch.mixed = True
            batch.extra += records - 1
            if isinstance(item, (Flush, Job)):
                batch.barrier = item
        if not batch.queued:
            self.enqueue(batch)
        if self._lingering is not None and self._ripe():
            self.wake_flusher()
        self._set_limits()
        return batch

    def enqueue(self, batch: Batch) -> None:
        """Hand a batch that has its first entry to the flusher; it is still filled."""
        if not batch.queued:
            batch.queued = True
            self._send.send_nowait(batch)

    def _admit(self) -> None:
        """Let in those who blocked first, as far as there is room."""
        while self.status.state is State.OPEN:
            admitted = self._admission.next(self.filling)
            if admitted is None:
                break
            task, blocked = admitted
            if blocked.waits_durable:
                blocked.batch = self._put(task, blocked.item)
                blocked.batch.mixed = True
            else:
                self._put(next(self._numbers), blocked.item)
                reschedule(task, WOKEN)
        self._set_limits()

    def _fate(self, item: Item | None, outcome: Outcome) -> Outcome:
        """A flush has no records of its own: it asks about those before it."""
        return self.status.loss if isinstance(item, Flush) else outcome

    @enable_ki_protection
    @types.coroutine
    def append(self, record: bytes, task: Task) -> Generator[Any, Any, int]:
        """`submit` for one record of the current task, as cheap as it can be where there is
        room.

        Of a coroutine's kind but no ``async def``: so it can put the task to sleep by itself.
        Every frame between the task and its sleep is passed twice a record.
        """
        batch = self.filling
        entries = batch.entries
        place = len(entries)
        total = batch.bytes + len(record)
        if place >= batch.records_credit or total > batch.bytes_credit:
            if self.status.state is not State.OPEN or self._has_room(record):
                # Closed, or something else that is not the common case.
                return (yield from self.submit(record).__await__())
            blocked = self._block(task, record, waits_durable=True)
            if REUSES:
                (yield blocked.request).unwrap()
            else:
                yield from park(blocked.request).__await__()
            taken = self.line.leave(blocked)
            assert taken is not None
            return self.outcome(taken, task)
        entries[task] = record
        batch.bytes = total
        if not place:
            self.enqueue(batch)
        claims = self._claims
        claim = claims.pop() if claims else Claim(self)
        claim.batch = batch
        claim.task = task
        if REUSES:
            (yield claim.request).unwrap()
        else:
            yield from park(claim.request).__await__()
        # A claim that is free keeps nothing alive.
        claim.batch = claim.task = None
        claims.append(claim)
        if batch.lsns is None and batch.first_lsn:
            return batch.first_lsn + place
        return self.outcome(batch, task)

    async def submit(self, item: Item) -> int:
        """Accept, with back-pressure, and wait until it is durable; gives the (first) LSN.

        Cancelled: nothing of it is in the log.
        """
        self.status.check_open(self._fate(item, "not written"))
        task = current_task()
        if self._has_room(item):
            batch = self._put(task, item)
            batch.mixed = True
            await wait_task_rescheduled(partial(self.withdraw, batch, task))
            return self.outcome(batch, task)
        blocked = self._block(task, item, waits_durable=True)
        await park(blocked.request)
        taken = self.line.leave(blocked)
        assert taken is not None
        return self.outcome(taken, task)

    async def accept(self, item: Item) -> None:
        """Accept, with back-pressure; nobody waits for its durability."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.status.check_open()
        if self._has_room(item):
            self._put(next(self._numbers), item)
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            blocked = self._block(current_task(), item, waits_durable=False)
            await park(blocked.request)
            self.line.leave(blocked)

    def accept_nowait(self, item: Item) -> None:
        """Accept or raise `trio.WouldBlock` (`LogFullError` where the disk is full)."""
        self.status.check_open()
        if self.status.state is State.FULL:
            self._wants_space.set()
            assert self._full is not None
            raise self._full.again()
        if not self._has_room(item):
            self.counters.rejected += 1
            raise trio.WouldBlock
        self._put(next(self._numbers), item)

    def _has_room(self, item: Item) -> bool:
        return (
            not self.line.blocked
            and self.status.state is State.OPEN
            and self._admission.fits(item, self.filling)
        )

    def _block(self, task: Task, item: Item, *, waits_durable: bool) -> Blocked:
        """The task stands in line; it must park with the request of what this returns."""
        blocked = self.line.enter(task, item, waits_durable=waits_durable)
        self._set_limits()
        self.wake_flusher()
        self._wants_space.set()
        return blocked

    # -- withdrawal --

    def withdraw(self, batch: Batch, task: Task, _raise_cancel: object = None) -> Abort:
        """Take an entry back; too late once its batch is taken, but for a flush."""
        if self.status.disowned:
            return Abort.SUCCEEDED
        entry = batch.entries.get(task)
        if batch.taken and isinstance(entry, Flush):
            # It has nothing in the batch: its task need not wait for a disk that stalls.
            del batch.entries[task]
            batch.extra += 1
            return Abort.SUCCEEDED
        if batch.taken or (self.owner is not None and not self.owner.may_withdraw(task)):
            return Abort.FAILED
        self.note_peaks()
        item = batch.entries.pop(task)
        size, records = bytes_of(item), count_of(item)
        batch.bytes -= size
        batch.extra -= records - 1
        batch.mixed = True
        if batch.barrier is item:
            barriers = (b for b in reversed(batch.entries.values()) if isinstance(b, (Flush, Job)))
            batch.barrier = next(barriers, None)
        if batch is not self.filling:
            self._admission.bytes -= size
            self._admission.records -= records
        if self.owner is not None:
            self.owner.withdrawn(task)
        self._admit()
        return Abort.SUCCEEDED

    def withdraw_blocked(self, blocked: Blocked) -> Abort:
        """Take back what waits for room, or has found it since."""
        task = blocked.task
        assert task is not None
        if self.status.disowned:
            return Abort.SUCCEEDED
        if blocked.batch is not None:
            return self.withdraw(blocked.batch, task)
        if self.owner is not None and not self.owner.may_withdraw(task):
            return Abort.FAILED
        if not self.line.remove(task):
            return Abort.FAILED
        if self.owner is not None:
            self.owner.withdrawn(task)
        self._admit()
        return Abort.SUCCEEDED

    # -- outcome --

    def outcome(self, batch: Batch, key: Key) -> int:
        """What became of an entry whose task was woken: its LSN, or an error."""
        if key in batch.refused:
            raise batch.refused.pop(key)
        if batch.failure is not None:
            outcome, cause = batch.failure
            raise self.status.failed(self._fate(batch.entries.get(key), outcome), cause)
        assert batch.lsns is not None
        return batch.lsns[key]

    # -- the flusher's side --

    def _ripe(self) -> bool:
        """Whether somebody waits for the filling batch, or it cannot grow any more."""
        batch = self.filling
        return (
            len(batch.entries) > batch.unwaited
            or self.status.state is State.CLOSING
            or bool(self.line.blocked)
            or bool(self._sealed)
            or batch.bytes >= self._admission.max_batch_bytes
            or batch.records >= self._awaited
            or not self._admission.fits(b"", batch)
        )

    async def linger(self, batch: Batch, seconds: float, awaited: float = math.inf) -> None:
        """Let a batch that nobody waits for grow for a while, or until it has so many records
        that somebody's wait for an LSN ends with it."""
        self._awaited = awaited
        if batch is not self.filling or self._ripe():
            return
        with trio.move_on_at(batch.opened + seconds):
            self._lingering = current_task()
            self._set_limits()
            await wait_task_rescheduled(self._abort_linger)

    def _abort_linger(self, _raise_cancel: object) -> Abort:
        self._lingering = None
        self._set_limits()
        return Abort.SUCCEEDED

    def expect(self, records: float) -> None:
        """Somebody waits until the batch that is filling has so many records."""
        if self._lingering is not None:
            self._awaited = min(self._awaited, records)
            if self._ripe():
                self.wake_flusher()

    def wake_flusher(self) -> None:
        """Somebody waits now."""
        if self._lingering is not None:
            task, self._lingering = self._lingering, None
            reschedule(task)
            self._set_limits()

    def take(self, batch: Batch) -> None:
        """From now on the batch is being written: nothing can be withdrawn from it."""
        self.note_peaks()
        batch.taken = True
        if batch is self.filling:
            self.filling = Batch()
        else:
            assert self._sealed[0] is batch
            self._sealed.popleft()
            self._admission.release(batch)
        self._admit()

    def acknowledge(self, batch: Batch, first_lsn: int) -> None:
        """The batch is durable: fix its LSNs and wake its tasks."""
        batch.number(first_lsn)
        if self.owner is not None:
            self.owner.settled(batch)
        batch.wake()

    def fail(
        self, cause: BaseException, in_flight: Batch | None, outcome: Outcome, loss: Outcome
    ) -> None:
        """The log is broken: tell everybody, take nothing more.

        Args:
          outcome: what became of the batch in flight.
          loss: what became of records that were accepted before, some of them only written.
        """
        self.note_peaks()
        self.status.loss = loss
        self.status.stop(State.FAILED)
        self.status.failure = cause
        if in_flight is not None:
            in_flight.failure = (outcome, cause)
            self._lose(in_flight)
        for batch in (*self._sealed, self.filling):
            batch.taken = True
            batch.mixed = True
            batch.failure = ("not written", cause)
            self._lose(batch)
        self._reset()
        for blocked in self._drain_blocked():
            blocked.error = self.status.failed(self._fate(blocked.item, "not written"), cause)
        if self.owner is not None:
            self.owner.failed()

    def _lose(self, batch: Batch) -> None:
        if self.owner is not None:
            for task in batch.waiters():
                self.owner.withdrawn(task)
        batch.wake()

    def refuse(self, cause: LogFullError, batch: Batch | None) -> None:
        """No disk space for the next segment: whoever waits is told and withdrawn, what
        was only sent stays, and nobody is let in before there is space again."""
        self.note_peaks()
        self.status.state = State.FULL
        self._full = cause
        self._wants_space = trio.Event()
        for waiting in (*([] if batch is None else [batch]), *self._sealed, self.filling):
            for task in list(waiting.waiters()):
                item = waiting.entries.pop(task)
                waiting.bytes -= bytes_of(item)
                waiting.extra -= count_of(item) - 1
                waiting.mixed = True
                waiting.barrier = None
                waiting.refused[task] = cause.again()
                if self.owner is not None:
                    self.owner.withdrawn(task)
                reschedule(task)
        self._admission.recount(tuple(self._sealed))
        for blocked in self._drain_blocked():
            blocked.error = cause.again()
        self._set_limits()

    async def wait_wants_space(self, seconds: float) -> None:
        """Until somebody asks for the space that was not there, or some time has passed."""
        with trio.move_on_after(seconds):
            await self._wants_space.wait()

    def reopen(self) -> None:
        """There is space again."""
        if self.status.state is State.FULL:
            self.status.state = State.OPEN
            self._admit()

    def _drain_blocked(self) -> Iterator[Blocked]:
        for task, blocked in self.line.drain():
            if self.owner is not None:
                self.owner.withdrawn(task)
            yield blocked
            reschedule(task, WOKEN)

    def _reset(self) -> None:
        self._sealed.clear()
        self._admission.recount(())
        self.filling = Batch()
        self._set_limits()

    def close(self) -> None:
        """Accept nothing more; the flusher ends when it has written what is here."""
        if self.status.state in (State.OPEN, State.FULL):
            self.status.stop(State.CLOSING)
            for blocked in self._drain_blocked():
                blocked.error = trio.ClosedResourceError(
                    f"{printable(self.status.name)}: the log was closed"
                )
            self._set_limits()
        self.wake_flusher()
        self._wants_space.set()
        self._send.close()

    def closed(self) -> None:
        """The flusher and the files are done."""
        if self.status.state is not State.FAILED:
            self.status.stop(State.CLOSED)

    def disown(self) -> None:
        """In a forked child nothing is accepted, nor waited for, nor written."""
        self.status.disowned = True
        self.status.stop(State.CLOSED)
        self.line.forget()
        self._set_limits()
