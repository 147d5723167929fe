"""Readers' threads give way to a log of the same process that has work.

Law: counts and times; nothing of files, tasks or records.  One object for the process, because
what readers and writers share is the interpreter.

A thread that reads record after record keeps the interpreter lock for whole switch intervals of
5 ms, and a commit needs the lock several times.  So a reader's thread, after each slice of work,
sleeps for a moment if something was written a moment ago.  It is never starved: each slice has one
pause at most.  Where nobody writes there are none, nor where a reader waits for records and has
little to do with each: time that it did not work is no part of a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, sleep
from typing import Final, final

SLICE_SECONDS: Final = 0.0005
"""So long a reader's thread works before it gives way."""
PAUSE_SECONDS: Final = 0.001
"""What it sleeps then: as long as a round of many tasks takes in the event loop.  A twentieth of
that lets a commit have the lock once, and it needs it several times (docs/design)."""
BUSY_SECONDS: Final = 0.02
"""So long after a write a log is taken to have work: longer than a round of write and sync takes
that is held up by a reader."""


@final
class Turns:
    """Who has written last, and how long a reader has worked since it gave way."""

    def __init__(
        self,
        clock: Callable[[], float] = perf_counter,
        pause: Callable[[float], None] = sleep,
    ) -> None:
        self._clock = clock
        self._pause = pause
        self._busy_until = -1.0

    def wrote(self) -> None:
        """A log of this process has a batch to write."""
        self._busy_until = self._clock() + BUSY_SECONDS

    def slice(self) -> Slice:
        """For one reader."""
        return Slice(self._clock, self._pause, self._is_busy)

    def _is_busy(self, now: float) -> bool:
        return now < self._busy_until


@final
class Slice:
    """How long one reader has worked without a break; it may be in one thread after the other."""

    def __init__(
        self,
        clock: Callable[[], float],
        pause: Callable[[float], None],
        is_busy: Callable[[float], bool],
    ) -> None:
        self._clock = clock
        self._pause = pause
        self._is_busy = is_busy
        self._since = clock()

    def begin(self) -> None:
        """To be called when a thread begins to work: until then nobody was in the way."""
        self._since = self._clock()

    def give_way(self) -> None:
        """To be called between pieces of work: a pause, if it is time for one."""
        now = self._clock()
        if now - self._since >= SLICE_SECONDS and self._is_busy(now):
            self._pause(PAUSE_SECONDS)
            self._since = self._clock()


TURNS: Final = Turns()
"""Of this process."""
