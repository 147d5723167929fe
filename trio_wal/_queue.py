"""The queue between writers and flusher: acceptance, back-pressure, withdrawal, outcome.

Law: one event loop, no I/O.  Writers fill batches; the flusher takes them.  Nothing
here awaits but the few lines that park a task.  Where an entry goes is said in `_backlog`, who is
let in next in `_admission`, and how long the flusher lets a batch grow in `_linger`.

A batch is filled where it will be written from: the writers put their records
straight into the newest batch, keyed by the task that waits (or by a number, where
nobody does).  For every batch something travels to the flusher through a bounded
`trio.open_memory_channel`, whose closing is the signal to shut down; which batch is next the
flusher asks here.  One channel operation a batch, not a record: at 0.7 us against 2.4 us for
a whole park and wake, one a record costs a quarter of the throughput (docs/design).

A writer's records stand in the same batches.  What comes through it is counted in its `Line`,
and in a `Share` for each batch.

Invariants:
  * waiting records <= max_queue_size and waiting payload bytes <= max_queue_bytes,
    but for one record or unit that is larger by itself and waits alone;
  * while anybody is blocked nobody of his line passes, and where lines wait they take turns:
    admission is done by whoever makes room, not by the blocked task when it happens to run;
  * records of one line stand in the order of their acceptance, those of high priority before
    what other lines have in later batches;
  * an entry is withdrawn without a trace until its batch is taken, and not after.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, Final, Protocol

import trio
from trio.lowlevel import Abort, Task, current_task, enable_ki_protection, reschedule

from ._admission import Admission, Blocked, Line
from ._backlog import Backlog
from ._batch import Batch, Flush, Item, Job, Key, Share, bytes_of, count_of
from ._exceptions import LogFullError, Outcome
from ._linger import Linger
from ._pace import AutoBound
from ._park import REUSES, WOKEN, park, request
from ._state import State, Status
from ._statistics import Times
from ._text import printable


class Claim:
    """What trio calls when the task of an entry is cancelled.

    Claims are used again: making one anew for every record costs a twentieth of the
    throughput, most of it in the garbage collector.
    """

    __slots__ = ("_queue", "batch", "request", "share", "task")

    def __init__(self, queue: WriteQueue) -> None:
        self._queue = queue
        self.request: Any = request(self)
        """For `park`."""
        self.batch: Batch | None = None
        self.task: Task | None = None
        self.share: Share | None = None
        """Where it came through a writer."""

    def __call__(self, _raise_cancel: object) -> Abort:
        assert self.batch is not None
        assert self.task is not None
        return self._queue.withdraw(self.batch, self.task, self.share)


def _new_claim(queue: WriteQueue, task: Task) -> Claim:
    """Before anything of the task's is in a batch: where there is no memory for it, the entry of a
    task that does not wait would lend its place to the next one, or have the task woken."""
    try:
        return Claim(queue)
    except BaseException:
        if queue.owner is not None:
            queue.owner.withdrawn(task)
        raise


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
        reserve: float = 0.0,
        auto: AutoBound | None = None,
    ) -> None:
        """
        Args:
          max_queue_size: the most that it ever is.
          auto: says how much it is.
        """
        self.status: Final = status
        self.waits: Final = Times()
        """For room, in all lines together."""
        self.line: Final = Line(self.withdraw_blocked, self.waits)
        """The log's own."""
        self.admission: Final = Admission(
            max_queue_size if auto is None else auto.records,
            max_queue_bytes,
            max_batch_bytes,
            max_batch_records,
            reserve,
            self.line,
        )
        self.backlog: Final = Backlog(self.admission)
        self.linger: Final = Linger(status, self.backlog, self.admission, self._set_limits)
        self._auto: Final = auto
        self.rejected: int = 0
        """Entries for which there was no room, and that were not to wait."""
        send, queued = trio.open_memory_channel[None](max_queue_size)
        self._send = send
        self.queued: trio.MemoryReceiveChannel[None] = queued
        self._numbers = count()
        self.wants_space: trio.Event = trio.Event()
        """Somebody asks for the disk space that was not there."""
        self._full: LogFullError | None = None
        self.owner: Owner | None = None
        """Set by `own`."""
        self._claims: list[Claim] = []
        """Free ones; at most as many as tasks ever waited at a time."""
        self._set_limits()

    # -- lines --

    def own(self, owner: Owner) -> None:
        """Tell ``owner`` what becomes of each record from here on; he numbers them."""
        self.owner = owner
        self.admission.ordered = True

    def open_line(
        self, name: str, max_queue_size: float, max_queue_bytes: float, *, high: bool
    ) -> Line:
        """Another line, for a writer."""
        line = Line(
            self.withdraw_blocked,
            self.waits,
            name=name,
            max_queue_size=max_queue_size,
            max_queue_bytes=max_queue_bytes,
            high=high,
        )
        self.admission.open(line)
        self._set_limits()
        return line

    def close_line(self, line: Line) -> None:
        """Nobody comes in through this line any more; who stands there is told.  What was
        accepted stays."""
        line.close()
        self._dismiss(line, lambda _: line.left())
        self.admission.close(line)
        self._admit()

    # -- acceptance --

    def _set_limits(self) -> None:
        """How far the filling batch may be filled without asking: see `append`."""
        batch, linger = self.backlog.filling, self.linger
        if (
            self.status.state is not State.OPEN
            or (linger.task is not None and linger.siblings is None)
            or isinstance(batch.barrier, Job)
        ):
            batch.records_credit = 0
        else:
            self.admission.credit(batch)
            if linger.siblings is not None:
                batch.records_credit = min(batch.records_credit, linger.siblings - 1)

    def _put(self, key: Key, item: Item, line: Line) -> Batch:
        """Accept: there is room."""
        batch = self.backlog.put(key, item, line)
        if not batch.queued:
            self.enqueue(batch)
        if self.linger.task is not None and (line.high or self.linger.ripe()):
            self.linger.wake()
        self._set_limits()
        return batch

    def enqueue(self, batch: Batch) -> None:
        """Hand a batch that has its first entry to the flusher; it is still filled."""
        if not batch.queued:
            batch.queued = True
            self._send.send_nowait(None)

    def _admit(self) -> None:
        """Let in those who blocked first, as far as there is room."""
        while self.status.state is State.OPEN:
            admitted = self.admission.next(self.backlog.filling)
            if admitted is None:
                break
            task, blocked = admitted
            line, records = blocked.line, count_of(blocked.item)
            if not blocked.let_in():
                records = 0
                reschedule(task, WOKEN)
            elif blocked.waits_durable:
                batch = blocked.batch = self._put(task, blocked.item, line)
                blocked.share = None if batch.shares is None else batch.shares.get(line)
                batch.mixed = True
            else:
                self._put(next(self._numbers), blocked.item, line)
                reschedule(task, WOKEN)
            self.admission.served(line, records)
        self._set_limits()

    @enable_ki_protection
    @types.coroutine
    def append(self, record: bytes, task: Task) -> Generator[Any, Any, int]:
        """`submit` for one record of the current task, as cheap as it can be where there is
        room.

        Of a coroutine's kind but no ``async def``: so it can put the task to sleep by itself.
        Every frame between the task and its sleep is passed twice a record.
        """
        batch = self.backlog.filling
        entries = batch.entries
        place = len(entries)
        total = batch.bytes + len(record)
        if place >= batch.records_credit or total > batch.bytes_credit:
            # Apart, because CPython 3.11 compares twice as slowly before a long jump.
            return (yield from self._append_full(record, task))
        if not place:
            self.enqueue(batch)
        claims = self._claims
        claim = claims.pop() if claims else _new_claim(self, task)
        entries[task] = record
        batch.bytes = total
        claim.batch = batch
        claim.task = task
        if REUSES:
            woken = yield claim.request
            if woken is not WOKEN:
                woken.unwrap()
        else:
            yield from park(claim.request).__await__()
        # A claim that is free keeps nothing alive.
        claim.batch = claim.task = None
        claims.append(claim)
        if not batch.mixed:
            return batch.first_lsn + place
        return self.outcome(batch, task)

    def _append_full(self, record: bytes, task: Task) -> Generator[Any, Any, int]:
        if self.status.state is not State.OPEN or self._has_room(record, self.line):
            # Closed, or something else that is not the common case.
            return (yield from self.submit(record).__await__())
        blocked = self._block(task, record, self.line, waits_durable=True)
        if REUSES:
            (yield blocked.request).unwrap()
        else:
            yield from park(blocked.request).__await__()
        taken = self.line.leave(blocked)
        assert taken is not None
        return self.outcome(taken, task)

    @enable_ki_protection
    @types.coroutine
    def append_in(self, line: Line, record: bytes, task: Task) -> Generator[Any, Any, int]:
        """`append` through a writer's line."""
        batch = self.backlog.filling
        entries = batch.entries
        place = len(entries)
        size = len(record)
        total = batch.bytes + size
        mine, my_bytes = line.records, line.bytes + size
        if (
            place >= batch.records_credit
            or total > batch.bytes_credit
            or mine >= line.records_credit
            or my_bytes > line.max_queue_bytes
            or line.blocked
        ):
            return (yield from self.submit(record, line).__await__())
        if not place:
            self.enqueue(batch)
        claims = self._claims
        claim = claims.pop() if claims else _new_claim(self, task)
        share = line.share
        if share is None or share.batch is not batch:
            share = line.share_of(batch)
        entries[task] = record
        batch.bytes = total
        line.records = mine + 1
        line.bytes = my_bytes
        claim.batch = batch
        claim.task = task
        claim.share = share
        if REUSES:
            woken = yield claim.request
            if woken is not WOKEN:
                woken.unwrap()
        else:
            yield from park(claim.request).__await__()
        claim.batch = claim.task = claim.share = None
        claims.append(claim)
        if not batch.mixed:
            return batch.first_lsn + place
        return self.outcome(batch, task)

    async def submit(
        self, item: Item, line: Line | None = None, enter: Callable[[], None] | None = None
    ) -> int:
        """Accept, with back-pressure, and wait until it is durable; gives the (first) LSN.

        Cancelled: nothing of it is in the log.

        Args:
          line: through which it comes; None: the log's own.
          enter: called in the moment in which it is let in, in the same step; what it raises is
              raised here, and then nothing is accepted.
        """
        self.status.check_open(fate(self.status, item, "not written"))
        line = line or self.line
        if line.closed:
            raise line.left()
        task = current_task()
        if self._has_room(item, line):
            claim = self._claims.pop() if self._claims else _new_claim(self, task)
            if enter is not None:
                refused: Exception | None = None
                try:
                    enter()
                except Exception as exc:  # noqa: BLE001  (it is raised below)
                    refused = exc
                if refused is not None:
                    self._claims.append(claim)
                    await trio.lowlevel.checkpoint()
                    raise refused
            batch = self._put(task, item, line)
            batch.mixed = True
            claim.batch = batch
            claim.task = task
            claim.share = (batch.shares or {}).get(line)
            self._passed(line, item)
            await park(claim.request)
            claim.batch = claim.task = claim.share = None
            self._claims.append(claim)
            return self.outcome(batch, task)
        blocked = self._block(task, item, line, waits_durable=True, enter=enter)
        await park(blocked.request)
        taken = line.leave(blocked)
        assert taken is not None
        return self.outcome(taken, task)

    async def accept(self, item: Item, line: Line | None = None) -> None:
        """Accept, with back-pressure; nobody waits for its durability."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self.status.check_open()
        line = line or self.line
        if self._has_room(item, line):
            self._put(next(self._numbers), item, line)
            self._passed(line, item)
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            blocked = self._block(current_task(), item, line, waits_durable=False)
            await park(blocked.request)
            line.leave(blocked)

    def accept_nowait(self, item: Item, line: Line | None = None) -> None:
        """Accept or raise `trio.WouldBlock` (`LogFullError` where the disk is full)."""
        self.status.check_open()
        if self.status.state is State.FULL:
            self.wants_space.set()
            assert self._full is not None
            raise self._full.again()
        line = line or self.line
        if not self._has_room(item, line):
            self.rejected += 1
            line.rejected += 1
            raise trio.WouldBlock
        self._put(next(self._numbers), item, line)
        self._passed(line, item)

    def _has_room(self, item: Item, line: Line) -> bool:
        return self.status.state is State.OPEN and self.admission.may_enter(
            line, item, self.backlog.filling
        )

    def _passed(self, line: Line, item: Item) -> None:
        """Somebody came in without waiting: perhaps past those who wait, whose turn it may be
        now."""
        if line.high:
            self.admission.passed(count_of(item))
            self._admit()

    def _block(
        self,
        task: Task,
        item: Item,
        line: Line,
        *,
        waits_durable: bool,
        enter: Callable[[], None] | None = None,
    ) -> Blocked:
        """The task stands in line; it must park with the request of what this returns."""
        blocked = line.enter(task, item, waits_durable=waits_durable, enter=enter)
        self.admission.refresh(line)
        self._set_limits()
        self.linger.wake()
        self.wants_space.set()
        return blocked

    # -- withdrawal --

    def withdraw(self, batch: Batch, task: Task, share: Share | None = None) -> Abort:
        """Take an entry back; too late once its batch is taken, but for a flush.

        Args:
          share: of the writer's through which it came.
        """
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
        self.backlog.note_peaks()
        self.backlog.remove(batch, task, share)
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
            return self.withdraw(blocked.batch, task, blocked.share)
        if self.owner is not None and not self.owner.may_withdraw(task):
            return Abort.FAILED
        if not blocked.line.remove(task):
            return Abort.FAILED
        self.admission.refresh(blocked.line)
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
            raise self.status.failed(fate(self.status, batch.entries.get(key), outcome), cause)
        assert batch.lsns is not None
        return batch.lsns[key]

    # -- the flusher's side --

    def take(self, *, at_once: bool = False) -> Batch:
        """The batch that is next: from now on it is being written, and nothing can be withdrawn
        from it.  It has been queued, once.

        Args:
          at_once: whether it was there when the one before it was done.
        """
        waiting, size = self.backlog.note_peaks()
        self.backlog.note_crowd(waiting, size)
        full = self.admission.is_full(waiting)
        batch = self.backlog.take()
        if self._auto is not None and self._auto.taken(
            trio.current_time(), batch.records, waiting, full=full, at_once=at_once
        ):
            self.admission.bound(self._auto.records)
        self._admit()
        return batch

    def acknowledge(self, batch: Batch, first_lsn: int) -> None:
        """The batch is durable: fix its LSNs and wake its tasks."""
        batch.number(first_lsn)
        if batch.shares is not None:
            shares: dict[Line, Share] = batch.shares
            for line, share in shares.items():
                line.records_appended += share.records
                line.bytes_appended += share.bytes
            # Each knows its batch: nobody should have to look for that circle.
            batch.shares = None
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
        self.backlog.note_peaks()
        self.status.loss = loss
        self.status.stop(State.FAILED)
        self.status.failure = cause
        if in_flight is not None:
            in_flight.fail(outcome, cause)
            self._lose(in_flight)
        for batch in self.backlog:
            batch.taken = True
            batch.fail("not written", cause)
            self._lose(batch)
        self.backlog.clear()
        self._set_limits()
        self._dismiss_all(
            lambda item: self.status.failed(fate(self.status, item, "not written"), cause)
        )
        if self.owner is not None:
            self.owner.failed()

    def _lose(self, batch: Batch) -> None:
        batch.shares = None
        if self.owner is not None:
            for task in batch.waiters():
                self.owner.withdrawn(task)
        batch.wake()

    def refuse(self, cause: LogFullError, batch: Batch | None) -> None:
        """No disk space for the next segment: whoever waits is told and withdrawn, what
        was only sent stays, and nobody is let in before there is space again."""
        self.backlog.note_peaks()
        self.status.state = State.FULL
        self._full = cause
        self.wants_space = trio.Event()
        for waiting in (*([] if batch is None else [batch]), *self.backlog):
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
            for share in (waiting.shares or {}).values():
                share.records, share.bytes = share.sent_records, share.sent_bytes
        self.backlog.recount()
        self._dismiss_all(lambda _: cause.again())
        self._set_limits()

    def reopen(self) -> None:
        """There is space again."""
        if self.status.state is State.FULL:
            self.status.state = State.OPEN
            self._admit()

    def _dismiss_all(self, error: Callable[[Item], BaseException]) -> None:
        for line in self.admission.lines:
            self._dismiss(line, error)

    def _dismiss(self, line: Line, error: Callable[[Item], BaseException]) -> None:
        """Whoever stands in the line is told why there will be no room."""
        for task, blocked in line.drain():
            if self.owner is not None:
                self.owner.withdrawn(task)
            blocked.error = error(blocked.item)
            reschedule(task, WOKEN)
        self.admission.refresh(line)

    def close(self) -> None:
        """Accept nothing more; the flusher ends when it has written what is here."""
        if self.status.state in (State.OPEN, State.FULL):
            self.status.stop(State.CLOSING)
            text = f"{printable(self.status.name)}: the log was closed"
            self._dismiss_all(lambda _: trio.ClosedResourceError(text))
            self._set_limits()
        self.linger.wake()
        self.wants_space.set()
        self._send.close()

    def disown(self) -> None:
        """In a forked child nothing is accepted, nor waited for, nor written."""
        self.status.disowned = True
        self.status.stop(State.CLOSED)
        for line in self.admission.lines:
            line.forget()
        self._set_limits()


def fate(status: Status, item: Item | None, outcome: Outcome) -> Outcome:
    """What became of an entry; a flush has no records of its own, it asks about those before it."""
    return status.loss if isinstance(item, Flush) else outcome
