"""The batches that wait to be written, in the order in which they will be, and what is in them.

Law: places and accounts.  Here it is said into which batch an entry goes and how much waits;
nobody is let in, parked or woken.

The newest batch is *filling*: entries go to its end.  Those before it are *sealed*; of high
priority are some that still grow.  `Admission` counts what is in sealed batches, so that the
credit of the filling one is known without looking at them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final, final

import trio
from trio.lowlevel import Task

from ._admission import Admission, Line
from ._batch import Batch, Flush, Item, Job, Key, Share, bytes_of, count_of


@final
class Backlog:
    """What waits."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Final = admission
        self.filling: Batch = Batch()
        self._sealed: deque[Batch] = deque()
        self.peak_records: int = 0
        self.peak_bytes: int = 0
        self.crowded_since: float | None = None
        """In trio's time; the flusher forgets it when nothing waits."""

    def __iter__(self) -> Iterator[Batch]:
        yield from self._sealed
        yield self.filling

    @property
    def sealed(self) -> bool:
        """Whether there are batches before the one that is filling."""
        return bool(self._sealed)

    # -- counts --

    @property
    def records(self) -> int:
        return self._admission.records + self.filling.records

    @property
    def bytes(self) -> int:
        """Their payload."""
        return self._admission.bytes + self.filling.bytes

    @property
    def entries(self) -> int:
        return sum(len(batch.entries) for batch in self)

    @property
    def tasks(self) -> int:
        """Those that wait for what became of an entry."""
        return sum(len(batch.entries) - batch.unwaited for batch in self)

    def note_peaks(self) -> tuple[int, int]:
        """It only grows between two takes or withdrawals: looking then is exact.  Gives how many
        records wait, and how many bytes."""
        records, size = self.records, self.bytes
        self.peak_records = max(self.peak_records, records)
        self.peak_bytes = max(self.peak_bytes, size)
        return records, size

    def note_crowd(self, records: int, size: int) -> None:
        """So much waits."""
        if not self._admission.is_crowded(records, size):
            self.crowded_since = None
        elif self.crowded_since is None:
            self.crowded_since = trio.current_time()

    def crowded_seconds(self) -> float:
        """For how long it has been crowded, as far as that was seen: whenever a batch was
        taken, and whenever this was called.  0 where it is not."""
        if not self._admission.is_crowded(self.records, self.bytes):
            return 0.0
        now = trio.current_time()
        if self.crowded_since is None:
            self.crowded_since = now
        return now - self.crowded_since

    # -- places --

    def put(self, key: Key, item: Item, line: Line) -> Batch:
        """An entry of this line, for which there is room; gives its batch."""
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
        that has its number already; and where a batch has no room, another is put before
        it just once, so that at least every second batch is a normal one.
        """
        if not self._sealed or self._admission.ordered:
            if self._may_precede(self.filling, item, line):
                return self._insert(0)
            return self._place(item)
        waiting: list[Batch] = [*self]
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
            not self._admission.ordered
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

    def remove(self, batch: Batch, task: Task, share: Share | None) -> None:
        """A task's entry is withdrawn from a batch that waits.

        Args:
          share: of the writer's through which it came.
        """
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

    def take(self) -> Batch:
        """The batch that is next; it waits no more."""
        if self._sealed:
            batch = self._sealed.popleft()
            self._admission.release(batch)
        else:
            batch = self.filling
            self.filling = Batch()
        batch.taken = True
        if batch.shares is not None:
            shares: dict[Line, Share] = batch.shares
            for line, share in shares.items():
                line.take(share)
                self._admission.refresh(line)
        return batch

    def clear(self) -> None:
        """Nothing waits any more."""
        self._sealed.clear()
        self.filling = Batch()
        self.recount()

    def recount(self) -> None:
        """Count anew what waits."""
        self._admission.recount(tuple(self._sealed))
        for line in self._admission.lines:
            found = ((batch.shares or {}).get(line) for batch in self)
            line.recount(share for share in found if share is not None)
