"""How the queue finds its own pace: the bound of ``"auto"``, learned from how fast it is flushed.

Law: arithmetic on times and counts that it is told; no clock, no tasks.  Why it cannot oscillate
stands in docs/design.
"""

from __future__ import annotations

import math
from typing import Final, final

AUTO_RECORDS_MIN: Final = 16
AUTO_RECORDS_MAX: Final = 1_000_000
"""The least and the most that ``max_queue_size="auto"`` makes of it."""
AUTO_RECORDS_START: Final = 64
"""What it begins with: few, because nobody knows yet what a record costs."""
STEP_MAX: Final = 2.0
"""The bound changes by at most this factor in a round."""
FIXED_MAX: Final = 1.5
"""Where a round without records takes so long that the target cannot be met: the records may
make it longer by half.  Fewer would cost throughput and save little time."""
SMOOTHING: Final = 1 / 8
OUTLIER: Final = 4.0
"""A round that is so many times longer than usual counts as one of this length: it may have
been a stall.  If the disk has become slower, the next rounds will say so."""
STRANGE: Final = 2.0
STRANGERS_MAX: Final = 3
"""After so many rounds in a row that are so many times longer or shorter than expected, what was
learned is forgotten."""
CLOSE: Final = 1.25
"""A wait that is so close to what it should be is left as it is."""
SPREAD_MIN: Final = 0.02
"""Rounds whose records differ by less say nothing of what a record costs."""


@final
class RoundCosts:
    """What a round of write and sync costs: so much by itself, and so much for each record.

    A line of least squares through the last rounds, the older the lighter.  Until rounds of
    different sizes were seen all of it is taken for what the records cost.
    """

    def __init__(self) -> None:
        self.seconds: float = 0.0
        """Of a round, on average."""
        self.records: float = 0.0
        self.record_seconds: float = 0.0
        """For one more record."""
        self._variance = 0.0
        self._covariance = 0.0
        self._strangers = 0
        """Rounds, the last ones, that were quite different from what was to be expected."""

    @property
    def fixed_seconds(self) -> float:
        """Of a round without records."""
        return max(0.0, self.seconds - self.record_seconds * self.records)

    def note(self, records: int, seconds: float) -> None:
        """A round that had work from its beginning to its end."""
        expected = self.fixed_seconds + self.record_seconds * records
        strange = not expected / STRANGE <= seconds <= expected * STRANGE
        self._strangers = self._strangers + 1 if strange else 0
        if not self.records or self._strangers == STRANGERS_MAX:
            # Another disk, as it were.
            self.records, self.seconds = records, seconds
            self.record_seconds = seconds / records
            self._variance = self._covariance = 0.0
            self._strangers = 0
            return
        more_records = records - self.records
        more_seconds = min(seconds, OUTLIER * self.seconds) - self.seconds
        keep = 1 - SMOOTHING
        self.records += SMOOTHING * more_records
        self.seconds += SMOOTHING * more_seconds
        self._variance = keep * (self._variance + SMOOTHING * more_records**2)
        self._covariance = keep * (self._covariance + SMOOTHING * more_records * more_seconds)
        if self._variance > (SPREAD_MIN * self.records) ** 2:
            slope = self._covariance / self._variance
            self.record_seconds = min(max(0.0, slope), self.seconds / self.records)


@final
class AutoBound:
    """The bound by which a record waits about ``target_latency`` for its turn.

    By Little's law a record that comes into a queue of L waits L / rate.  So where the queue is
    full, the bound is multiplied by the square root of (target / wait), once a round.
    """

    def __init__(self, target_latency: float) -> None:
        self.target_latency: Final = target_latency
        self.records: int = AUTO_RECORDS_START
        """The bound in force."""
        self._costs = RoundCosts()
        self._taken_at = -math.inf
        self._taken = 0
        self._was_full = False

    def taken(self, now: float, records: int, waiting: int, *, full: bool, at_once: bool) -> bool:
        """A batch was taken; returns whether the bound is another one now.

        Args:
          now: in seconds, of any clock.
          records: of the batch.
          waiting: in the queue before that, those of the batch among them.
          full: whether these were about as many as may wait.
          at_once: whether the batch was there when the one before it was done.
        """
        seconds, flushed, was_full = now - self._taken_at, self._taken, self._was_full
        self._taken_at, self._taken, self._was_full = now, records, full
        if not at_once or not flushed or not 0 < seconds < math.inf:
            return False
        self._costs.note(flushed, seconds)
        if not (full and was_full):
            # What was flushed is what came, and not how fast it can be flushed.
            return False
        wait = waiting * seconds / flushed
        goal = max(self.target_latency, FIXED_MAX * self._costs.fixed_seconds)
        if goal / CLOSE <= wait <= goal * CLOSE:
            return False
        step = min(max(math.sqrt(goal / wait), 1 / STEP_MAX), STEP_MAX)
        bound = min(max(round(self.records * step), AUTO_RECORDS_MIN), AUTO_RECORDS_MAX)
        changed, self.records = bound != self.records, bound
        return changed
