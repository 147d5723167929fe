"""Who is let into the queue, and how far: the room there is, and those who stand in line for it.

Law: policy only.  Nothing here puts a record anywhere, and nothing waits.  A writer spends the
credit of the batch that is filling without asking; without credit it asks `Admission.may_enter`;
whoever has made room asks `Admission.next` whose turn it is.

A line is first come, first served.  The log's own methods are one; each `Writer` is another, with
limits of its own.  A line is *ready* while somebody stands in it whom only the queue's bound keeps
out, not the line's own.  Ready lines take turns (`Turns`); those of high priority come first, until
they have let in `PASSED_MAX` records past a normal line that is ready.

Invariant: after every step of the queue nobody who stands in line could be let in.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, Final, final

import trio
from trio.lowlevel import Abort, Task

from ._batch import Batch, Item, Job, Share, bytes_of, count_of
from ._health import CROWDED
from ._park import request
from ._statistics import Times
from ._text import printable

PASSED_MAX: Final = 8
"""So many records of high priority are let in past a normal line; then one of that is."""

FULL: Final = 0.8
"""A queue with so much of its records is called full: the next may be larger than the rest."""


@final
class Blocked:
    """A task that found no room, and what trio calls when it is cancelled; used again, as
    claims are: the more tasks wait, the dearer every object that the garbage collector sees."""

    __slots__ = (
        "_withdraw",
        "batch",
        "enter",
        "error",
        "item",
        "line",
        "request",
        "share",
        "since",
        "task",
        "waits_durable",
    )

    def __init__(self, withdraw: Callable[[Blocked], Abort], line: Line) -> None:
        self._withdraw = withdraw
        self.line: Line = line
        self.request: Any = request(self)
        """For `park`."""
        self.task: Task | None = None
        self.item: Item = b""
        self.waits_durable: bool = True
        self.enter: Callable[[], None] | None = None
        """Called in the moment in which the entry is let in; it may refuse by raising."""
        self.since: float = 0.0
        self.batch: Batch | None = None
        """Which took its entry in the end."""
        self.share: Share | None = None
        """Its line's in that batch."""
        self.error: BaseException | None = None
        """Or why none did."""

    def __call__(self, _raise_cancel: object) -> Abort:
        return self._withdraw(self)

    def let_in(self) -> bool:
        """Call what the entry wants to be called then; False: it refuses."""
        if self.enter is None:
            return True
        try:
            self.enter()
        except Exception as exc:  # noqa: BLE001  (its task gets it)
            self.error = exc
            return False
        return True


@final
class Line:
    """Tasks that wait for room: first come, first served; and how much of the queue is theirs."""

    def __init__(
        self,
        withdraw: Callable[[Blocked], Abort],
        waits: Times,
        *,
        name: str | None = None,
        max_queue_size: float = math.inf,
        max_queue_bytes: float = math.inf,
        high: bool = False,
    ) -> None:
        """
        Args:
          withdraw: is called when a task that stands here, or has just left, is cancelled.
          waits: of all lines together.
          name: of a writer; None: the log's own line, whose records nobody counts.
        """
        # A dict would walk over all whom it has let go, to find who came first.
        self.blocked: OrderedDict[Task, Blocked] = OrderedDict()
        self.name: Final = name
        self.high: Final = high
        self.max_queue_size: Final = max_queue_size
        self.max_queue_bytes: Final = max_queue_bytes
        self.records: int = 0
        """Of a writer: those that are accepted and wait to be taken."""
        self.bytes: int = 0
        """Their payload."""
        self.share: Share | None = None
        """The newest, whichever batch it is in."""
        self.peak_records: int = 0
        self.peak_bytes: int = 0
        self.records_appended: int = 0
        self.bytes_appended: int = 0
        self.rejected: int = 0
        self.waits: Final = waits if name is None else Times()
        """How long tasks stood here, by trio's clock; of those that stand here no more."""
        self._all_waits: Final = waits
        self.closed: bool = False
        """Whether its writer's block was left."""
        self.records_credit: float = 0 if high else max_queue_size
        """With so many of its records waiting somebody must be asked for more."""
        self.tag: float = 0.0
        """Where it is on the clock of `Turns`."""
        self.entry: int = 0
        """Of its place there; 0: it is not ready."""
        self._withdraw = withdraw
        self._free: list[Blocked] = []

    def close(self) -> None:
        """Its writer's block was left."""
        self.closed = True
        self.records_credit = 0

    def left(self) -> trio.ClosedResourceError:
        """For whoever comes here after that."""
        name = printable(str(self.name))
        return trio.ClosedResourceError(f"writer {name}: its block was left")

    # -- its share --

    def fits(self, item: Item) -> bool:
        """Whether its own limits allow one more; an entry larger than they are passes alone."""
        records = count_of(item)
        if not self.records or not records:
            return True
        return (
            self.records + records <= self.max_queue_size
            and self.bytes + bytes_of(item) <= self.max_queue_bytes
        )

    def share_of(self, batch: Batch) -> Share:
        """The line's share of a batch that is being filled.

        What comes into it is counted in the line only: the rest is found when it has an end.
        """
        newest = self.share
        if newest is not None:
            if newest.batch is batch:
                return newest
            self._settle(newest)
        if batch.shares is None:
            batch.shares = {}
        share = batch.shares.get(self)
        if share is None:
            share = batch.shares[self] = Share(self, batch)
        share.records_before = self.records - share.records
        share.bytes_before = self.bytes - share.bytes
        self.share = share
        return share

    def _settle(self, newest: Share) -> None:
        newest.records = self.records - newest.records_before
        newest.bytes = self.bytes - newest.bytes_before
        self.share = None

    def give_back(self, share: Share, records: int, size: int) -> None:
        """So much of a share was withdrawn."""
        self.note_peaks()
        if self.share is not share:
            share.records -= records
            share.bytes -= size
            self._less_before(records, size)
        self.records -= records
        self.bytes -= size

    def take(self, share: Share) -> None:
        """The batch of a share was taken: nothing of it waits."""
        self.note_peaks()
        if self.share is share:
            self._settle(share)
        self._less_before(share.records, share.bytes)
        self.records -= share.records
        self.bytes -= share.bytes

    def _less_before(self, records: int, size: int) -> None:
        if self.share is not None:
            self.share.records_before -= records
            self.share.bytes_before -= size

    def recount(self, shares: Iterable[Share]) -> None:
        """Count anew: in what waits these are its shares, all of them settled."""
        self.share = None
        self.records = self.bytes = 0
        for share in shares:
            self.records += share.records
            self.bytes += share.bytes

    def note_peaks(self) -> None:
        """As `Backlog.note_peaks`, for this line."""
        self.peak_records = max(self.peak_records, self.records)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    # -- its tasks --

    def enter(
        self, task: Task, item: Item, *, waits_durable: bool, enter: Callable[[], None] | None
    ) -> Blocked:
        """The task stands in line; it must park with the request of what this returns."""
        blocked = self._free.pop() if self._free else Blocked(self._withdraw, self)
        blocked.task = task
        blocked.item = item
        blocked.waits_durable = waits_durable
        blocked.enter = enter
        blocked.since = trio.current_time()
        self.blocked[task] = blocked
        return blocked

    def first(self) -> Blocked | None:
        """Whose turn it is in this line."""
        return next(iter(self.blocked.values()), None)

    def remove(self, task: Task) -> bool:
        """The task does not wait for room any more; False: it did not."""
        blocked = self.blocked.pop(task, None)
        if blocked is None:
            return False
        self._note(blocked)
        return True

    def _note(self, blocked: Blocked) -> None:
        seconds = trio.current_time() - blocked.since
        self._all_waits.note(seconds)
        if self.name is not None:
            self.waits.note(seconds)

    def drain(self) -> Iterator[tuple[Task, Blocked]]:
        """Everybody, in order; the line is empty from the first one on."""
        blocked_tasks, self.blocked = self.blocked, OrderedDict()
        for task, blocked in blocked_tasks.items():
            self._note(blocked)
            yield task, blocked

    def leave(self, blocked: Blocked) -> Batch | None:
        """The task was woken: its entry is in this batch, if it waits for that; or an error."""
        batch, error = blocked.batch, blocked.error
        blocked.task = blocked.batch = blocked.error = blocked.enter = blocked.share = None
        blocked.item = b""
        self._free.append(blocked)
        if error is not None:
            raise error
        return batch

    def forget(self) -> None:
        """In a forked child: nobody who stands here is ever let in."""
        self.blocked = OrderedDict()


@final
class Turns:
    """Ready lines of one priority, and whose turn it is: as many records for each.

    Start-time fair queueing (Goyal, Vin, Cheng 1996): a line's tag grows by the records that it
    is let in, the lowest tag is next, and a line that becomes ready begins where the clock is.
    A unit of many records so costs its line as many turns.
    """

    def __init__(self) -> None:
        self.ready: int = 0
        """Lines in it."""
        self._heap: list[tuple[float, int, Line]] = []
        """Some of them are not ready any more: those with another `entry`."""
        self._entries = count(1)
        self._clock: float = 0.0
        """The tag of the line that was served last."""
        self._latest: float = 0.0
        """The highest tag of a line that has left."""

    def first(self) -> Line | None:
        """The line whose turn it is."""
        heap = self._heap
        while heap:
            _, entry, line = heap[0]
            if line.entry == entry:
                return line
            heapq.heappop(heap)
        return None

    def refresh(self, line: Line) -> None:
        """Somebody came, went, or made room in the line: see whether it is ready."""
        first = line.first()
        if first is not None and line.fits(first.item):
            if not line.entry:
                line.tag = max(line.tag, self._clock)
                self._push(line)
                self.ready += 1
        elif line.entry:
            line.entry = 0
            self.ready -= 1
            self._latest = max(self._latest, line.tag)
            if not self.ready:
                # Whoever was ahead is forgiven.
                self._clock = max(self._clock, self._latest)
                self._heap.clear()

    def served(self, line: Line, records: int) -> None:
        """So many records of the line, whose turn it was, were let in."""
        if line.entry:
            self._clock = line.tag
        line.tag += records
        if line.entry and len(self._heap) > 1:
            self._push(line)
        self.refresh(line)

    def _push(self, line: Line) -> None:
        line.entry = next(self._entries)
        heapq.heappush(self._heap, (line.tag, line.entry, line))


@final
class Admission:
    """How much room there is beside the batch that is filling, which is the queue's."""

    def __init__(
        self,
        max_queue_size: float,
        max_queue_bytes: float,
        max_batch_bytes: int,
        max_batch_records: int,
        reserve: float,
        line: Line,
    ) -> None:
        self.max_queue_size: float = max_queue_size
        self.max_queue_bytes: Final = max_queue_bytes
        self.max_batch_bytes: Final = max_batch_bytes
        self._max_batch_records: Final = max_batch_records
        self._reserve: Final = reserve
        self._line: Final = line
        self.lines: Final[list[Line]] = [line]
        """All of them."""
        self._highs: int = 0
        """Lines of high priority; while there are none nothing is kept for them."""
        self._normal_size: float = max_queue_size
        """What of the queue is for everybody."""
        self._normal_bytes: float = max_queue_bytes
        self._normal: Final = Turns()
        self._high: Final = Turns()
        self._passed: int = 0
        """Records let in by priority since a normal line that is ready had its turn."""
        self.ordered: bool = False
        """Whether entries have their numbers when they come to stand in the log's own line:
        then nobody passes those."""
        self.records: int = 0
        """In batches that wait to be taken, but for the one that is filling."""
        self.bytes: int = 0
        """Their payload."""
        self.batches: int = 0
        """How many there are of them."""

    # -- room --

    def seal(self, batch: Batch) -> None:
        """The batch is not the one that is filling any more."""
        self.records += batch.records
        self.bytes += batch.bytes
        self.batches += 1

    def release(self, batch: Batch) -> None:
        """It was taken: there is room."""
        self.records -= batch.records
        self.bytes -= batch.bytes
        self.batches -= 1

    def recount(self, batches: tuple[Batch, ...]) -> None:
        """Count anew: these are sealed."""
        self.records = sum(batch.records for batch in batches)
        self.bytes = sum(batch.bytes for batch in batches)
        self.batches = len(batches)

    def credit(self, batch: Batch) -> None:
        """How far this batch may be filled without asking; not at all while somebody waits."""
        if self._normal.ready or self._high.ready:
            batch.records_credit = 0
            return
        batch.records_credit = (
            min(self._normal_size - self.records, self._max_batch_records) - batch.extra
        )
        batch.bytes_credit = min(self._normal_bytes - self.bytes, self.max_batch_bytes)

    def starts_batch(self, item: Item, batch: Batch) -> bool:
        """Whether the batch has entries and cannot take this one, too."""
        return bool(batch.entries) and (
            batch.bytes + bytes_of(item) > self.max_batch_bytes
            or batch.records + count_of(item) > self._max_batch_records
            or isinstance(batch.barrier, Job)
        )

    def is_full(self, records: int) -> bool:
        """Whether the bound keeps back others, where so many records wait."""
        return records >= FULL * self._normal_size

    def is_crowded(self, records: int, size: int) -> bool:
        """Whether so many records, or payload bytes, are nine tenths of what may wait."""
        return records >= CROWDED * self.max_queue_size or size >= CROWDED * self.max_queue_bytes

    def full_of_batches(self) -> bool:
        """Whether the channel takes only the batch that is filling: it is full of batches that
        hold a barrier or were emptied by withdrawal."""
        return self.batches + 1 >= self.max_queue_size

    def fits(self, item: Item, batch: Batch, *, reserve: bool = False) -> bool:
        """Whether there is room for an entry beside all that waits.

        Args:
          reserve: whether it may use what is kept for high priority.
        """
        if self.full_of_batches() and self.starts_batch(item, batch):
            return False
        records = self.records + batch.records
        if not records:
            return True
        size, length = self._normal_size, self._normal_bytes
        if reserve:
            size, length = self.max_queue_size, self.max_queue_bytes
        return (
            records + count_of(item) <= size and self.bytes + batch.bytes + bytes_of(item) <= length
        )

    # -- lines --

    @property
    def blocked(self) -> int:
        """Tasks that wait for room."""
        blocked = 0
        for line in self.lines:
            blocked += len(line.blocked)
        return blocked

    @property
    def crowded(self) -> bool:
        """Whether somebody waits whom only the queue's bound keeps out."""
        return bool(self._normal.ready or self._high.ready)

    def _turns(self, line: Line) -> Turns:
        return self._high if line.high else self._normal

    def open(self, line: Line) -> None:
        """Another line."""
        self.lines.append(line)
        if line.high:
            self._highs += 1
            self._keep()

    def close(self, line: Line) -> None:
        """The line, whose tasks have gone, is no more."""
        self.lines.remove(line)
        self.refresh(line)
        if line.high:
            self._highs -= 1
            self._keep()

    def bound(self, max_queue_size: float) -> None:
        """So many records may wait from now on."""
        self.max_queue_size = max_queue_size
        self._keep()

    def _keep(self) -> None:
        self._normal_size, self._normal_bytes = self.max_queue_size, self.max_queue_bytes
        if self._highs:
            self._normal_size -= kept(self._reserve, self.max_queue_size)
            self._normal_bytes -= kept(self._reserve, self.max_queue_bytes)

    def refresh(self, line: Line) -> None:
        """Somebody came, went, or made room in the line, other than by `next`."""
        self._turns(line).refresh(line)

    def may_enter(self, line: Line, item: Item, batch: Batch) -> bool:
        """Whether an entry of the line, which has just come, need not wait."""
        if line.blocked or not line.fits(item):
            return False
        if not line.high:
            return not self.crowded and self.fits(item, batch)
        if self._high.ready or self._must_yield():
            return False
        return self.fits(item, batch, reserve=True)

    def _must_yield(self) -> bool:
        """Whether a normal line has its turn before those of high priority."""
        return bool(self._normal.ready) and (self._passed >= PASSED_MAX or self._numbered())

    def _numbered(self) -> bool:
        first = self._line.first() if self.ordered else None
        return first is not None and first.enter is None and isinstance(first.item, bytes)

    def next(self, batch: Batch) -> tuple[Task, Blocked] | None:
        """Who is let in now, and stands in line no more; None: nobody, or there is no room.

        When the entry has its place, or has none after all, `served` must be told.
        """
        if not self._normal.ready and not self._high.ready:
            return None
        yields = self._must_yield()
        if self.ordered and self._numbered():
            line: Line | None = self._line
        else:
            line = None if yields else self._high.first()
            line = line or self._normal.first()
        assert line is not None
        task, blocked = found = next(iter(line.blocked.items()))
        # A normal line that is due may use the reserve, too: it would not come in otherwise.
        if not self.fits(blocked.item, batch, reserve=line.high or yields):
            return None
        line.remove(task)
        return found

    def served(self, line: Line, records: int) -> None:
        """So many records of this line, whose turn it was, were let in."""
        self._turns(line).served(line, records)
        if line.high:
            self.passed(records)
        else:
            self._passed = 0

    def passed(self, records: int) -> None:
        """So many records of high priority were let in."""
        self._passed = self._passed + records if self._normal.ready else 0


def kept(reserve: float, limit: float) -> float:
    """How much of a limit is kept for high priority: some, if any, and never all of it."""
    if not reserve or limit == math.inf:
        return 0
    return min(math.ceil(round(limit * reserve, 6)), limit - 1)
