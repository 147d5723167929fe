"""What perf's benchmark of back-pressure measures, in virtual time: a disk, a loop and tasks that
are formulas, and the controllers themselves.

Law: nothing here depends on the machine; the same seed gives the same figures to the last digit.
"""

from __future__ import annotations

import heapq
import math
import random
from typing import final

import attrs

from trio_wal._pace import AutoBound, AutoDelay

TARGET = 0.010
"""``target_latency``."""
HAND_OVER = 0.0008
"""Of a round without records, beside the sync: threads, and the loop."""
WINDOW = 0.1
"""Over which what waits is averaged, as in perf."""


@attrs.frozen
class Noise:
    """Of a machine that others use as well."""

    disk: float = 0.0
    """Spread of a sync, in logarithms."""
    loop: float = 0.0
    """Of what the loop does for the records."""
    stalls: float = 0.0
    """Share of the rounds in which another program has the processor."""
    stall_seconds: float = 0.0
    """For so long, on average."""

    def round(self, sync: float, loop: float, rng: random.Random) -> float:
        took = sync * rng.lognormvariate(0, self.disk) + loop * rng.lognormvariate(0, self.loop)
        return took + (rng.random() < self.stalls) * 2 * self.stall_seconds * rng.random()


@attrs.define
class Followed:
    settled: list[float] = attrs.Factory(list)
    """Seconds after each change until the wait stayed within half and double of the target."""
    records: list[float] = attrs.Factory(list)
    """The bound in the middle of each phase's last second."""


def follow(
    bound: AutoBound, syncs: list[float], each: float, noise: Noise, seed: int, seconds: float = 3.0
) -> Followed:
    """A queue that is always full, on a disk whose speed changes.

    Args:
      each: seconds that the loop needs for a record.
    """
    rng, now, found = random.Random(seed), 0.0, Followed()
    for number, sync in enumerate(syncs):
        began, last, settled = now, now, 0.0
        area, flushed, bounds = 0.0, 0, []
        waiting = bound.records
        while now < began + seconds:
            taken = waiting
            bound.taken(now, taken, waiting, full=True, at_once=True)
            # Whoever was blocked comes in as soon as the batch is taken.
            waiting = bound.records
            took = noise.round(sync, HAND_OVER + each * taken, rng)
            now, area, flushed = now + took, area + took * waiting, flushed + taken
            if now - last >= WINDOW:
                # Little's law, the other way round.
                wait = area / flushed
                if not TARGET / 2 <= wait <= 2 * TARGET:
                    settled = now - began
                last, area, flushed = now, 0.0, 0
            if now > began + seconds - 1:
                bounds.append(bound.records)
        found.records.append(sorted(bounds)[len(bounds) // 2])
        if number:
            found.settled.append(settled)
    return found


@final
class Appenders:
    """Tasks that append, think, and append again, on a loop that serves one after the other.

    The tasks think, and the disk is late, in the same way whatever the delay: two runs differ by
    what the delay does.
    """

    def __init__(
        self, tasks: int, sync: float, think: float, *, loop: float, noise: float, timer: float
    ) -> None:
        """
        Args:
          think: up to so many seconds between two appends.
          loop: seconds that it needs for an append.
          noise: spread of a sync, in logarithms.
          timer: its resolution, in seconds: it rounds up.
        """
        self._sync, self._think, self._loop = sync, think, loop
        self._noise, self._timer = noise, timer
        self._late = random.Random(1)
        self._tasks = [random.Random(number) for number in range(tasks)]
        self._coming = [(self._pause(number), number) for number in range(tasks)]
        heapq.heapify(self._coming)
        self._now = 0.0
        self._waiting: list[int] = []

    def rate(self, delay: AutoDelay | float, warm_up: float, seconds: float) -> float:
        """Appends per second after the warm-up."""
        while self._now < warm_up:
            self._round(delay)
        began, done = self._now, 0
        while self._now < began + seconds:
            done += self._round(delay)
        return done / (self._now - began)

    def _pause(self, task: int) -> float:
        return self._think * self._tasks[task].random() if self._think else 0.0

    def _serve(self, until: float, most: float = math.inf) -> None:
        """Whoever comes before a time; what the loop has begun, it ends."""
        coming, waiting, now, loop = self._coming, self._waiting, self._now, self._loop
        # Most of the time of the tests that use it is spent here.
        pop = heapq.heappop
        while coming and len(waiting) < most:
            begins = coming[0][0]
            begins = max(begins, now)
            if begins >= until:
                break
            waiting.append(pop(coming)[1])
            now = begins + loop
        self._now = now

    def _round(self, delay: AutoDelay | float) -> int:
        if not self._waiting:
            self._now = max(self._now, self._coming[0][0])
        # Who is ready by now comes first.
        self._serve(math.nextafter(self._now, math.inf), math.inf)
        auto = delay if isinstance(delay, AutoDelay) else None
        seconds, siblings = (delay, math.inf) if auto is None else (auto.seconds, auto.siblings)
        if seconds:
            if self._timer:
                seconds = math.ceil(seconds / self._timer) * self._timer
            end = self._now + seconds
            self._serve(end, siblings)
            if len(self._waiting) < siblings:
                self._now = max(self._now, end)
        batch, self._waiting = self._waiting, []
        taken_at = self._now
        done_at = taken_at + self._sync * self._late.lognormvariate(0, self._noise)
        self._serve(done_at)
        self._now = max(self._now, done_at)
        if auto is not None:
            auto.written(self._now, len(batch), len(self._waiting), self._now - taken_at)
        for task in batch:
            heapq.heappush(self._coming, (self._now + self._pause(task), task))
        if not self._think:
            self._serve(math.inf)
        return len(batch)
