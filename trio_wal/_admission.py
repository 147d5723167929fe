"""Who is let into the queue, and how far: the room there is, and those who stand in line for it.

Law: policy only.  Nothing here puts a record anywhere, and nothing waits.  A writer spends the
credit of the batch that is filling without asking; without credit it asks `Admission.fits`; whoever
has made room asks `Admission.next` whose turn it is.

One line stands today.  A line has its own tasks and counters, so that there may be more of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final, final

import trio
from trio.lowlevel import Abort, Task

from ._batch import Batch, Item, Job, bytes_of, count_of
from ._park import request


@final
class Blocked:
    """A task that found no room, and what trio calls when it is cancelled; used again, as
    claims are: the more tasks wait, the dearer every object that the garbage collector sees."""

    __slots__ = ("_withdraw", "batch", "error", "item", "request", "since", "task", "waits_durable")

    def __init__(self, withdraw: Callable[[Blocked], Abort]) -> None:
        self._withdraw = withdraw
        self.request: Any = request(self)
        """For `park`."""
        self.task: Task | None = None
        self.item: Item = b""
        self.waits_durable = True
        self.since: float = 0.0
        self.batch: Batch | None = None
        """Which took its entry in the end."""
        self.error: BaseException | None = None
        """Or why none did."""

    def __call__(self, _raise_cancel: object) -> Abort:
        return self._withdraw(self)


@final
class Line:
    """Tasks that wait for room: first come, first served."""

    def __init__(self, withdraw: Callable[[Blocked], Abort]) -> None:
        """
        Args:
          withdraw: is called when a task that stands here, or has just left, is cancelled.
        """
        # A dict would walk over all whom it has let go, to find who came first.
        self.blocked: OrderedDict[Task, Blocked] = OrderedDict()
        self.waits: int = 0
        """How often a task came to stand here."""
        self.seconds: float = 0.0
        """For how long, all tasks together, by trio's clock."""
        self._withdraw = withdraw
        self._free: list[Blocked] = []

    def enter(self, task: Task, item: Item, *, waits_durable: bool) -> Blocked:
        """The task stands in line; it must park with the request of what this returns."""
        blocked = self._free.pop() if self._free else Blocked(self._withdraw)
        blocked.task = task
        blocked.item = item
        blocked.waits_durable = waits_durable
        blocked.since = trio.current_time()
        self.blocked[task] = blocked
        self.waits += 1
        return blocked

    def remove(self, task: Task) -> bool:
        """The task does not wait for room any more; False: it did not."""
        blocked = self.blocked.pop(task, None)
        if blocked is None:
            return False
        self.seconds += trio.current_time() - blocked.since
        return True

    def drain(self) -> Iterator[tuple[Task, Blocked]]:
        """Everybody, in order; the line is empty from the first one on."""
        blocked_tasks, self.blocked = self.blocked, OrderedDict()
        for task, blocked in blocked_tasks.items():
            self.seconds += trio.current_time() - blocked.since
            yield task, blocked

    def leave(self, blocked: Blocked) -> Batch | None:
        """The task was woken: its entry is in this batch, if it waits for that; or an error."""
        batch, error = blocked.batch, blocked.error
        blocked.task = blocked.batch = blocked.error = None
        blocked.item = b""
        self._free.append(blocked)
        if error is not None:
            raise error
        return batch

    def forget(self) -> None:
        """In a forked child: nobody who stands here is ever let in."""
        self.blocked = OrderedDict()


@final
class Admission:
    """How much room there is beside the batch that is filling, which is the queue's."""

    def __init__(
        self,
        max_queue_size: float,
        max_queue_bytes: float,
        max_batch_bytes: int,
        max_batch_records: int,
        line: Line,
    ) -> None:
        self.max_queue_size: Final = max_queue_size
        self.max_queue_bytes: Final = max_queue_bytes
        self.max_batch_bytes: Final = max_batch_bytes
        self._max_batch_records: Final = max_batch_records
        self._line: Final = line
        self.records: int = 0
        """In batches that wait to be taken and do not grow any more."""
        self.bytes: int = 0
        """Their payload."""
        self.batches: int = 0
        """How many there are of them."""

    def seal(self, batch: Batch) -> None:
        """The batch has grown as far as it will."""
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
        if self._line.blocked:
            batch.records_credit = 0
            return
        batch.records_credit = (
            min(self.max_queue_size - self.records, self._max_batch_records) - batch.extra
        )
        batch.bytes_credit = min(self.max_queue_bytes - self.bytes, self.max_batch_bytes)

    def starts_batch(self, item: Item, batch: Batch) -> bool:
        """Whether the batch has entries and cannot take this one, too."""
        return bool(batch.entries) and (
            batch.bytes + bytes_of(item) > self.max_batch_bytes
            or batch.records + count_of(item) > self._max_batch_records
            or isinstance(batch.barrier, Job)
        )

    def fits(self, item: Item, batch: Batch) -> bool:
        """Whether there is room for an entry beside all that waits."""
        if self.batches + 1 >= self.max_queue_size and self.starts_batch(item, batch):
            # The channel is full of batches that hold a barrier or were emptied by withdrawal.
            return False
        records = self.records + batch.records
        if not records:
            return True
        return (
            records + count_of(item) <= self.max_queue_size
            and self.bytes + batch.bytes + bytes_of(item) <= self.max_queue_bytes
        )

    def next(self, batch: Batch) -> tuple[Task, Blocked] | None:
        """Who is let in now, and stands in line no more; None: nobody, or there is no room."""
        line = self._line
        if not line.blocked:
            return None
        task, blocked = found = next(iter(line.blocked.items()))
        if not self.fits(blocked.item, batch):
            return None
        del line.blocked[task]
        line.seconds += trio.current_time() - blocked.since
        return found
