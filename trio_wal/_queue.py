"""What waits to be written: acceptance, back-pressure, withdrawal, order.

Law: one event loop, no I/O.  Writers fill batches; the flusher takes them.  Nothing
here awaits but the few lines that park a task.

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

import math
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import count
from typing import Any, Final, Protocol

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
from ._batch import Batch, Flush, Item, Job, Key, Share, bytes_of, count_of
from ._exceptions import LogFullError, Outcome
from ._pace import AutoBound
from ._park import REUSES, WOKEN, park, request
from ._state import State, Status
from ._statistics import Times
from ._text import printable


class Counters:
    """Running totals; `WalStatistics` says what they mean."""

    __slots__ = ("peak_bytes_waiting", "peak_records_waiting", "rejected")

    def __init__(self) -> None:
        self.peak_records_waiting: int = 0
        self.peak_bytes_waiting: int = 0
        self.rejected: int = 0


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
        self._lines: Final[list[Line]] = [self.line]
        """All of them."""
        self._admission: Final = Admission(
            max_queue_size if auto is None else auto.records,
            max_queue_bytes,
            max_batch_bytes,
            max_batch_records,
            reserve,
            self.line,
        )
        self._auto: Final = auto
        self.crowded_since: float | None = None
        """In trio's time; the flusher forgets it when nothing waits."""
        self.counters: Counters = Counters()
        send, queued = trio.open_memory_channel[None](max_queue_size)
        self._send = send
        self.queued: trio.MemoryReceiveChannel[None] = queued
        self._sealed: deque[Batch] = deque()
        """Batches that wait behind one another, before the one that is filling; of high
        priority are some that still grow."""
        self._numbers = count()
        self._lingering: Task | None = None
        self._awaited: float = math.inf
        """While the flusher lingers: with so many records somebody waits for the filling batch."""
        self._siblings: float | None = None
        """While it waits for more entries: with so many there is nobody else to be expected."""
        self._wants_space = trio.Event()
        self._full: LogFullError | None = None
        self.owner: Owner | None = None
        """Set by `own`."""
        self._claims: list[Claim] = []
        """Free ones; at most as many as tasks ever waited at a time."""
        self.filling: Batch = Batch()
        self._set_limits()

    # -- counts --

    @property
    def records_waiting(self) -> int:
        return self._admission.records + self.filling.records

    @property
    def bytes_waiting(self) -> int:
        return self._admission.bytes + self.filling.bytes

    @property
    def max_queue_size(self) -> float:
        """The bound in force."""
        return self._admission.max_queue_size

    @property
    def blocked(self) -> int:
        """Tasks that wait for room."""
        blocked = 0
        for line in self._lines:
            blocked += len(line.blocked)
        return blocked

    def tasks_waiting(self) -> int:
        """Tasks whose accepted entries wait to be taken."""
        return sum(len(b.entries) - b.unwaited for b in (*self._sealed, self.filling))

    def note_peaks(self) -> tuple[int, int]:
        """The queue only grows between two takes or withdrawals: looking then is exact.  Gives
        how many records wait, and how many bytes."""
        counters = self.counters
        records, size = self.records_waiting, self.bytes_waiting
        counters.peak_records_waiting = max(counters.peak_records_waiting, records)
        counters.peak_bytes_waiting = max(counters.peak_bytes_waiting, size)
        return records, size

    def crowded_seconds(self) -> float:
        """For how long the queue has been crowded, as far as that was seen: whenever a batch was
        taken, and whenever this was called.  0 where it is not."""
        if not self._admission.is_crowded(self.records_waiting, self.bytes_waiting):
            return 0.0
        now = trio.current_time()
        if self.crowded_since is None:
            self.crowded_since = now
        return now - self.crowded_since

    # -- lines --

    def own(self, owner: Owner) -> None:
        """Tell ``owner`` what becomes of each record from here on; he numbers them."""
        self.owner = owner
        self._admission.ordered = True

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
        self._lines.append(line)
        self._admission.open(line)
        self._set_limits()
        return line

    def close_line(self, line: Line) -> None:
        """Nobody comes in through this line any more; who stands there is told.  What was
        accepted stays."""
        line.close()
        self._dismiss(line, lambda _: line.left())
        self._lines.remove(line)
        self._admission.close(line)
        self._admit()

    # -- acceptance --

    def _set_limits(self) -> None:
        """How far the filling batch may be filled without asking: see `append`."""
        batch = self.filling
        if (
            self.status.state is not State.OPEN
            or (self._lingering is not None and self._siblings is None)
            or isinstance(batch.barrier, Job)
        ):
            batch.records_credit = 0
        else:
            self._admission.credit(batch)
            if self._siblings is not None:
                batch.records_credit = min(batch.records_credit, self._siblings - 1)

    def _put(self, key: Key, item: Item, line: Line) -> Batch:
        """Accept: there is room."""
        batch = self._place_high(item, line) if line.high else self._place(item)
        size, records = bytes_of(item), count_of(item)
        if batch is not self.filling:
            self._admission.records += records
            self._admission.bytes += size
        if line.name is not None:
            share = line.share_of(batch)
            line.records += records
            line.bytes += size
            if isinstance(key, int):
                share.sent_records += records
                share.sent_bytes += size
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
        if self._lingering is not None and (line.high or self._ripe()):
            self.wake_flusher()
        self._set_limits()
        return batch

    def _place(self, item: Item) -> Batch:
        """Where an entry goes: to the end."""
        batch = self.filling
        if self._admission.starts_batch(item, batch):
            self._sealed.append(batch)
            self._admission.seal(batch)
            batch = self.filling = Batch()
        return batch

    def _place_high(self, item: Item, line: Line) -> Batch:
        """Where an entry of high priority goes: into the batch that is taken next.

        Only what its own line has in a later batch, and jobs, are not overtaken, nor anything
        of an owner's, who has numbered it; and where a batch has no room, another is put before
        it just once, so that at least every second batch is a normal one.
        """
        if not self._sealed or self.owner is not None:
            if self._may_precede(self.filling, item, line):
                return self._insert(0)
            return self._place(item)
        waiting = [*self._sealed, self.filling]
        first = len(waiting)
        while first and not isinstance(waiting[first - 1].barrier, Job):
            first -= 1
            if line in (waiting[first].shares or ()):
                break
        for place, batch in enumerate(waiting[first:], first):
            if self._may_precede(batch, item, line):
                return self._insert(place)
            if batch is not self.filling and not self._admission.starts_batch(item, batch):
                return batch
        return self._place(item)

    def _may_precede(self, batch: Batch, item: Item, line: Line) -> bool:
        """Whether a batch of its own for this entry may be put before that one."""
        return (
            self.owner is None
            and not batch.overtaken
            and line not in (batch.shares or ())
            and not isinstance(batch.barrier, Job)
            and self._admission.starts_batch(item, batch)
            and not self._admission.full_of_batches()
        )

    def _insert(self, place: int) -> Batch:
        """A batch of high priority; it is filled while it waits there."""
        behind = self._sealed[place] if place < len(self._sealed) else self.filling
        behind.overtaken = True
        batch = Batch()
        self._sealed.insert(place, batch)
        self._admission.seal(batch)
        return batch

    def enqueue(self, batch: Batch) -> None:
        """Hand a batch that has its first entry to the flusher; it is still filled."""
        if not batch.queued:
            batch.queued = True
            self._send.send_nowait(None)

    def _admit(self) -> None:
        """Let in those who blocked first, as far as there is room."""
        while self.status.state is State.OPEN:
            admitted = self._admission.next(self.filling)
            if admitted is None:
                break
            task, blocked = admitted
            line, records = blocked.line, count_of(blocked.item)
            if blocked.enter is not None and not self._entered(blocked):
                records = 0
                reschedule(task, WOKEN)
            elif blocked.waits_durable:
                batch = blocked.batch = self._put(task, blocked.item, line)
                blocked.share = None if batch.shares is None else batch.shares.get(line)
                batch.mixed = True
            else:
                self._put(next(self._numbers), blocked.item, line)
                reschedule(task, WOKEN)
            self._admission.served(line, records)
        self._set_limits()

    def _entered(self, blocked: Blocked) -> bool:
        """Call what an entry wants to be called when it is let in; False: it refuses."""
        assert blocked.enter is not None
        try:
            blocked.enter()
        except Exception as exc:  # noqa: BLE001  (its task gets it)
            blocked.error = exc
            return False
        return True

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
            # Apart, because CPython 3.11 compares twice as slowly before a long jump.
            return (yield from self._append_full(record, task))
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
        batch = self.filling
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
        entries[task] = record
        batch.bytes = total
        if not place:
            self.enqueue(batch)
        share = line.share
        if share is None or share.batch is not batch:
            share = line.share_of(batch)
        line.records = mine + 1
        line.bytes = my_bytes
        claims = self._claims
        claim = claims.pop() if claims else Claim(self)
        claim.batch = batch
        claim.task = task
        claim.share = share
        if REUSES:
            (yield claim.request).unwrap()
        else:
            yield from park(claim.request).__await__()
        claim.batch = claim.task = claim.share = None
        claims.append(claim)
        if batch.lsns is None and batch.first_lsn:
            return batch.first_lsn + place
        return self.outcome(batch, task)

    def _claim(self, batch: Batch, task: Task, share: Share | None) -> Claim:
        claim = self._claims.pop() if self._claims else Claim(self)
        claim.batch = batch
        claim.task = task
        claim.share = share
        return claim

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
        self.status.check_open(self._fate(item, "not written"))
        line = line or self.line
        if line.closed:
            raise line.left()
        task = current_task()
        if self._has_room(item, line):
            if enter is not None:
                refused: Exception | None = None
                try:
                    enter()
                except Exception as exc:  # noqa: BLE001  (it is raised below)
                    refused = exc
                if refused is not None:
                    await trio.lowlevel.checkpoint()
                    raise refused
            batch = self._put(task, item, line)
            batch.mixed = True
            claim = self._claim(batch, task, (batch.shares or {}).get(line))
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
            self._wants_space.set()
            assert self._full is not None
            raise self._full.again()
        line = line or self.line
        if not self._has_room(item, line):
            self.counters.rejected += 1
            line.rejected += 1
            raise trio.WouldBlock
        self._put(next(self._numbers), item, line)
        self._passed(line, item)

    def _has_room(self, item: Item, line: Line) -> bool:
        return self.status.state is State.OPEN and self._admission.may_enter(
            line, item, self.filling
        )

    def _passed(self, line: Line, item: Item) -> None:
        """Somebody came in without waiting: perhaps past those who wait, whose turn it may be
        now."""
        if line.high:
            self._admission.passed(count_of(item))
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
        self._admission.refresh(line)
        self._set_limits()
        self.wake_flusher()
        self._wants_space.set()
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
        if share is not None:
            share.line.give_back(share, records, size)
            self._admission.refresh(share.line)
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
        self._admission.refresh(blocked.line)
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
        if self._siblings is not None:
            waited_for = len(batch.entries) >= self._siblings or batch.barrier is not None
        else:
            waited_for = len(batch.entries) > batch.unwaited or batch.records >= self._awaited
        return (
            waited_for
            or self.status.state is State.CLOSING
            or bool(self.blocked)
            or bool(self._sealed)
            or batch.bytes >= self._admission.max_batch_bytes
            or not self._admission.fits(b"", batch)
        )

    async def linger(self, seconds: float, awaited: float = math.inf) -> None:
        """Let the batch that is next, and that nobody waits for, grow for a while, or until it
        has so many records that somebody's wait for an LSN ends with it."""
        self._awaited = awaited
        if self._ripe():
            return
        with trio.move_on_at(self.filling.opened + seconds):
            self._lingering = current_task()
            self._set_limits()
            await wait_task_rescheduled(self._abort_linger)

    async def wait_siblings(self, seconds: float, siblings: float) -> None:
        """Let the batch that is next, and that somebody waits for, grow for a while, or until it
        has so many entries.  Not where it holds a barrier, or is full, or something of high
        priority is in it, or somebody waits for room."""
        batch = self.filling
        lines: Iterable[Line] = batch.shares or ()
        if len(batch.entries) == batch.unwaited or any(line.high for line in lines):
            return
        self._siblings = siblings
        if not self._ripe():
            with trio.move_on_after(seconds):
                self._lingering = current_task()
                self._set_limits()
                await wait_task_rescheduled(self._abort_linger)
        self._siblings = None
        self._set_limits()

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

    def take(self, *, at_once: bool = False) -> Batch:
        """The batch that is next: from now on it is being written, and nothing can be withdrawn
        from it.  It has been queued, once.

        Args:
          at_once: whether it was there when the one before it was done.
        """
        waiting, size = self.note_peaks()
        full = self._admission.is_full(waiting)
        if not self._admission.is_crowded(waiting, size):
            self.crowded_since = None
        elif self.crowded_since is None:
            self.crowded_since = trio.current_time()
        if self._sealed:
            batch = self._sealed.popleft()
            self._admission.release(batch)
        else:
            batch = self.filling
            self.filling = Batch()
        batch.taken = True
        if batch.shares is not None:
            self._take_shares(batch)
        if self._auto is not None and self._auto.taken(
            trio.current_time(), batch.records, waiting, full=full, at_once=at_once
        ):
            self._admission.bound(self._auto.records)
        self._admit()
        return batch

    def _take_shares(self, batch: Batch) -> None:
        shares: dict[Line, Share] = batch.shares or {}
        for line, share in shares.items():
            line.take(share)
            self._admission.refresh(line)

    @property
    def entries_waiting(self) -> int:
        return sum(len(batch.entries) for batch in self._sealed) + len(self.filling.entries)

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
        self._dismiss_all(lambda item: self.status.failed(self._fate(item, "not written"), cause))
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
            for share in (waiting.shares or {}).values():
                share.records, share.bytes = share.sent_records, share.sent_bytes
        self._recount()
        self._dismiss_all(lambda _: cause.again())
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

    def _recount(self) -> None:
        """Count anew what waits."""
        self._admission.recount(tuple(self._sealed))
        for line in self._lines:
            found = ((batch.shares or {}).get(line) for batch in (*self._sealed, self.filling))
            line.recount(share for share in found if share is not None)

    def _dismiss_all(self, error: Callable[[Item], BaseException]) -> None:
        for line in self._lines:
            self._dismiss(line, error)

    def _dismiss(self, line: Line, error: Callable[[Item], BaseException]) -> None:
        """Whoever stands in the line is told why there will be no room."""
        for task, blocked in line.drain():
            if self.owner is not None:
                self.owner.withdrawn(task)
            blocked.error = error(blocked.item)
            reschedule(task, WOKEN)
        self._admission.refresh(line)

    def _reset(self) -> None:
        self._sealed.clear()
        self.filling = Batch()
        self._recount()
        self._set_limits()

    def close(self) -> None:
        """Accept nothing more; the flusher ends when it has written what is here."""
        if self.status.state in (State.OPEN, State.FULL):
            self.status.stop(State.CLOSING)
            text = f"{printable(self.status.name)}: the log was closed"
            self._dismiss_all(lambda _: trio.ClosedResourceError(text))
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
        for line in self._lines:
            line.forget()
        self._set_limits()
