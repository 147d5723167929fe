"""How far the log is durable, and who waits for it to come further.

Law: whoever moves the mark wakes those who wait for it, in the same step.  Where the mark stands
is the engine's word; here it is only waited for.
"""

from __future__ import annotations

import heapq
import math
from itertools import count
from typing import final

import outcome
import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled


@final
class Watermark:
    """Tasks that wait for an LSN, the lowest first, and tasks that wait for any news."""

    def __init__(self) -> None:
        self._waiters: list[tuple[int, int, Task]] = []
        self._numbers = count()
        self._followers = trio.lowlevel.ParkingLot()

    @property
    def waiting(self) -> int:
        """Tasks in `wait`."""
        return len(self._waiters)

    @property
    def lowest(self) -> float:
        """The first LSN that somebody waits for; infinite where nobody does."""
        return self._waiters[0][0] if self._waiters else math.inf

    async def wait(self, lsn: int) -> bool:
        """Until ``lsn`` is durable; False: nothing more will be.

        Durable then, perhaps not any more when the caller runs: the log's end may be cut.
        """
        waiter = (lsn, next(self._numbers), current_task())
        heapq.heappush(self._waiters, waiter)

        def abort(_: object) -> Abort:
            self._waiters.remove(waiter)
            heapq.heapify(self._waiters)
            return Abort.SUCCEEDED

        reached: bool = await wait_task_rescheduled(abort)
        return reached

    async def wait_news(self) -> None:
        """Until the mark has moved, the log's end was cut, or nothing more will come."""
        await self._followers.park()

    def reached(self, lsn: int) -> None:
        """Everything up to ``lsn`` is durable."""
        waiters = self._waiters
        while waiters and waiters[0][0] <= lsn:
            reschedule(heapq.heappop(waiters)[2], outcome.Value(True))
        self.tell()

    def tell(self) -> None:
        """There is news."""
        if self._followers:
            self._followers.unpark_all()

    def release(self) -> None:
        """Nothing will become durable any more."""
        waiters, self._waiters = self._waiters, []
        for _, _, task in waiters:
            reschedule(task, outcome.Value(False))
        self._followers.unpark_all()
