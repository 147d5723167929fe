"""How the queue finds its own pace: the bound of ``"auto"``, and how long a batch may wait.

Law: arithmetic on times and counts that it is told; no clock, no tasks.  Why the bound cannot
oscillate, and what a delay is good for, stands in docs/design.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import Final, Protocol, final

AUTO_RECORDS_MIN: Final = 16
AUTO_RECORDS_MAX: Final = 1_000_000
"""The least and the most that ``max_queue_size="auto"`` makes of it."""
AUTO_RECORDS_START: Final = 64
"""What it begins with: few, because nobody knows yet what a record costs."""
STEP_MAX: Final = 2.0
"""The bound changes by at most this factor in a round."""
RECORDS_NEAR: Final = 0.2
RECORDS_FAR: Final = 0.5
"""Where a round without records takes as long as the target, which can then not be met, the records
may make it longer by a fifth; where it takes 2.5 times as long or more, by half.  Fewer would cost
throughput and save little time; with more, noise makes the wait twice the target now and then."""
SMOOTHING: Final = 1 / 8
LATE: Final = 1.5
"""A round that is so many times longer than expected counts as one of this length: it may have
been a stall.  If the disk has become slower, the next rounds will say so."""
STRANGE: Final = 2.0
STRANGERS_MAX: Final = 3
"""After so many rounds in a row that are so many times longer or shorter than expected, what was
learned is forgotten."""
CLOSE: Final = 1.1
"""A wait that is so close to what it should be is left as it is."""
PACES: Final = 5
"""The bound goes by the median of so many rounds: one that was held up by another program says
nothing of the disk."""
SPREAD_MIN: Final = 0.02
"""Rounds whose records differ by less say nothing of what a record costs."""
LAST_ROUNDS: Final = 16
"""So many are remembered as they were."""


@final
class RoundCosts:
    """What a round of write and sync costs: so much by itself, and so much for each record.

    A line of least squares through the last rounds, the older the lighter.  Until rounds of
    different sizes were seen all of it is taken for what the records cost.  The line goes up with
    each round that was held up; so what a round costs by itself is never more than what the lower
    quartile of the last rounds leaves for it.
    """

    def __init__(self) -> None:
        self.seconds: float = 0.0
        """Of a round, on average."""
        self.records: float = 0.0
        self.record_seconds: float = 0.0
        """For one more record."""
        self._variance = 0.0
        self._covariance = 0.0
        self._last: Final[deque[tuple[int, float]]] = deque(maxlen=LAST_ROUNDS)
        """Records and seconds."""
        self._strangers = 0
        """Rounds, the last ones, that were quite different from what was to be expected."""

    @property
    def fixed_seconds(self) -> float:
        """Of a round without records."""
        line = self.seconds - self.record_seconds * self.records
        if self._last:
            alone = sorted(took - self.record_seconds * n for n, took in self._last)
            line = min(line, alone[len(alone) // 4])
        return max(0.0, line)

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
            self._last.clear()
            return
        self._last.append((records, seconds))
        more_records = records - self.records
        more_seconds = min(seconds, LATE * max(expected, self.seconds)) - self.seconds
        keep = 1 - SMOOTHING
        self.records += SMOOTHING * more_records
        self.seconds += SMOOTHING * more_seconds
        self._variance = keep * (self._variance + SMOOTHING * more_records**2)
        self._covariance = keep * (self._covariance + SMOOTHING * more_records * more_seconds)
        if self._variance > (SPREAD_MIN * self.records) ** 2:
            slope = self._covariance / self._variance
            self.record_seconds = min(max(0.0, slope), self.seconds / self.records)


def _median(values: Collection[float]) -> float:
    """As `statistics.median`, which takes long to import."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


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
        self._paces: Final[deque[float]] = deque(maxlen=PACES)
        """Seconds a record took, in the last rounds."""
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
        # Nor where so little time has passed that a record's part of it is none.
        if not at_once or not flushed or not 0 < seconds / flushed < math.inf:
            return False
        self._costs.note(flushed, seconds)
        if not (full and was_full):
            # What was flushed is what came, and not how fast it can be flushed.
            return False
        self._paces.append(seconds / flushed)
        wait = waiting * _median(self._paces)
        goal = self._goal()
        if goal / CLOSE <= wait <= goal * CLOSE:
            return False
        step = min(max(math.sqrt(goal / wait), 1 / STEP_MAX), STEP_MAX)
        bound = min(max(round(self.records * step), AUTO_RECORDS_MIN), AUTO_RECORDS_MAX)
        changed, self.records = bound != self.records, bound
        return changed

    def _goal(self) -> float:
        """The wait to be reached, in seconds: the target, or what is possible."""
        fixed = self._costs.fixed_seconds
        share = min(RECORDS_NEAR * fixed / self.target_latency, RECORDS_FAR)
        return max(self.target_latency, fixed * (1 + share))


# -- how long a batch may wait for siblings -----------------------------------------


class Delay(Protocol):
    """Says how long a batch waits for more records before it is written."""

    @property
    def seconds(self) -> float:
        """At most so long."""
        ...

    @property
    def siblings(self) -> float:
        """With so many entries it need not wait any longer: nobody else is to be expected."""
        ...

    def written(self, now: float, entries: int, waiting: int, seconds: float) -> None:
        """A batch was written.

        Args:
          now: in seconds, of any clock.
          entries: in the batch.
          waiting: those that have come since it was taken.
          seconds: that write and sync took.
        """
        ...


@final
class FixedDelay:
    """As long as the user says."""

    siblings: float = math.inf

    def __init__(self, seconds: float) -> None:
        self.seconds: float = seconds

    def written(self, now: float, entries: int, waiting: int, seconds: float) -> None:
        pass


OUTLIER: Final = 4.0
"""As `LATE`, for the length of a round; there are more of those that are only late."""
TIMER: Final = 0.001
"""No timer is sure to wake trio earlier than that: epoll and Windows count in milliseconds."""
EPOCH_ROUNDS: Final = 8
"""A choice is tried for so many rounds at a time."""
HOPELESS_ROUNDS: Final = 3
HOPELESS: Final = 0.7
"""A trial that after so many rounds is so far behind the best is ended."""
GAIN_MIN: Final = 1.05
"""A delay must be better than a shorter one by this factor to be chosen."""
NOISE: Final = 2.0
"""And by so many standard errors."""
FORGET: Final = 0.9
"""What an epoch counts for after one more of the same choice."""
CHANGE: Final = 0.25
"""The best choice's rate has changed by more than this share and its noise: then all is learned
anew."""
TRIES_MIN: Final = 1.5
"""Fewer epochs, weighed by their age, say nothing."""
PAUSE_MIN: Final = 2.0
PAUSE_MAX: Final = 32.0
PAUSE_GROWTH: Final = 1.5
"""Epochs of the best choice between two trials of others."""
LOSS_MAX: Final = 0.01
"""Of the time, that trials may cost."""
CROWD_FORGET: Final = 15 / 16
"""What the largest crowd counts for after one more round."""


@final
class Choice:
    """A delay, as a share of a round, and what rates it has shown."""

    def __init__(self, share: float) -> None:
        self.share: Final = share
        self.tries: float = 0.0
        """Epochs, the older the lighter."""
        self.rate: float = 0.0
        """Entries per second, on average."""
        self.variance: float = 0.0

    def note(self, rate: float) -> None:
        self.tries = FORGET * self.tries + 1
        off = rate - self.rate
        self.rate += off / self.tries
        self.variance += (off * (rate - self.rate) - self.variance) / self.tries

    def forget(self) -> None:
        self.tries = self.rate = self.variance = 0.0

    def beats(self, other: Choice) -> bool:
        """Whether it is to be preferred; the shorter one is, unless the other is clearly better."""
        if self.tries < TRIES_MIN or other.tries < TRIES_MIN:
            return False
        if self.share < other.share:
            return not other.is_clearly_better(self)
        return self.is_clearly_better(other)

    def is_clearly_better(self, other: Choice) -> bool:
        # Two rates may be close by chance: the larger variance is nearer to the truth.
        variance = max(self.variance, other.variance)
        noise = math.sqrt(variance / self.tries + variance / other.tries)
        return self.rate > GAIN_MIN * other.rate and self.rate - other.rate > NOISE * noise


@final
class AutoDelay:
    """Tries delays of several lengths, and uses the one with which most entries are written.

    A batch waits only until as many entries are in it as there were at a time of late, in
    flight and waiting: so it costs nothing where everybody is there already.  Where a round is
    shorter than a timer nothing is tried, and nowhere a delay that is: it would become longer.
    """

    def __init__(self, timer: float = TIMER) -> None:
        self._timer: Final = timer
        """The shortest delay there is, in seconds."""
        self._choices: Final[list[Choice]] = [Choice(share) for share in (0.0, 0.25, 0.5, 1.0, 2.0)]
        self._best: Choice = self._choices[0]
        self._now: Choice = self._best
        self._next = 1
        """Which is tried next."""
        self._epochs = 0
        """Of the best, since another was tried."""
        self._pause = PAUSE_MIN
        self._paid_at: float = -math.inf
        """When what the last trial has lost is `LOSS_MAX` of the time since."""
        self._round_seconds = 0.0
        self._crowd = 0.0
        self._began: float | None = None
        """When the epoch did."""
        self._entries = 0
        self._rounds = 0

    @property
    def seconds(self) -> float:
        return self._now.share * self._round_seconds

    @property
    def siblings(self) -> float:
        return math.ceil(self._crowd)

    def written(self, now: float, entries: int, waiting: int, seconds: float) -> None:
        self._crowd = max(CROWD_FORGET * self._crowd, entries + waiting)
        usual = self._round_seconds or seconds
        self._round_seconds = usual + SMOOTHING * (min(seconds, OUTLIER * usual) - usual)
        if self._began is None or now <= self._began:
            self._began = now
            return
        self._entries += entries
        self._rounds += 1
        rate = self._entries / (now - self._began)
        if self._rounds < EPOCH_ROUNDS and not self._is_hopeless(rate):
            return
        began, self._began = self._began, now
        self._entries = self._rounds = 0
        best = self._best
        if self._now is not best and rate < best.rate:
            self._paid_at = now + (now - began) * (1 - rate / best.rate) / LOSS_MAX
        self._end_epoch(rate, paid=now >= self._paid_at)

    def _is_hopeless(self, rate: float) -> bool:
        best = self._best
        noise = NOISE * math.sqrt(best.variance)
        tried = self._now is not best and self._rounds >= HOPELESS_ROUNDS
        return tried and rate < HOPELESS * best.rate - noise

    def _end_epoch(self, rate: float, *, paid: bool) -> None:
        now, best = self._now, self._best
        if now is best:
            change = abs(rate - best.rate) - 2 * NOISE * math.sqrt(best.variance)
            if best.tries > 2 and change > CHANGE * best.rate:
                for choice in self._choices:
                    choice.forget()
                self._pause = PAUSE_MIN
            now.note(rate)
            self._epochs += 1
            if self._round_seconds < self._timer:
                self._best = self._now = self._choices[0]
            elif paid and self._epochs >= self._pause:
                self._try_another()
            return
        now.note(rate)
        if now.beats(best):
            self._best = now
            self._pause = PAUSE_MIN
        elif rate > best.rate and now.tries < TRIES_MIN + 4:
            # It may be better: once more, and soon.
            self._pause = PAUSE_MIN
        else:
            self._skip()
            self._pause = min(PAUSE_GROWTH * self._pause, PAUSE_MAX)
        self._now = self._best

    def _try_another(self) -> None:
        for _ in self._choices:
            choice = self._choices[self._next]
            delay = choice.share * self._round_seconds
            if choice is not self._best and (not delay or delay >= self._timer):
                self._epochs = 0
                self._now = choice
                return
            self._skip()

    def _skip(self) -> None:
        self._next = (self._next + 1) % len(self._choices)
