"""Keys in order, made ready bit by bit.

Law: pure; nothing in here takes longer than a few milliseconds at a time, however many keys
there are, because it happens in the event loop.

One sorted list of a million keys would be cheapest to read, but has to be made: half a
second in the first scan.  So keys are sorted in short runs as they come, and eight short
runs become a long one (the first two levels of a log-structured merge tree: O'Neil et al.,
Acta Informatica 33, 1996); a scan merges the runs.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain, groupby
from typing import Final, final

RUN_KEYS: Final = 4096
"""Keys that are sorted at once: about a millisecond."""
RUNS_MERGED: Final = 8
"""Short runs that become a long one: about three milliseconds."""


@final
class SortedKeys:
    """Byte strings, ascending."""

    __slots__ = ("_long", "_short", "fresh")

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        self._long: list[list[bytes]] = [sorted(keys)]
        self._short: list[list[bytes]] = []
        self.fresh: list[bytes] = []
        """New keys are appended here; `tidy` is called when there are `RUN_KEYS`."""

    def tidy(self) -> None:
        """Make a run of the new keys."""
        run, self.fresh = self.fresh, []
        run.sort()
        self._short.append(run)
        if len(self._short) == RUNS_MERGED:
            runs, self._short = self._short, []
            self._long.append(sorted(chain.from_iterable(runs)))

    def between(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> Iterator[bytes]:
        """``start <= key < stop`` without repetition, or backwards; None is no bound.

        To be used up before another key comes.
        """
        self.fresh.sort()
        found: list[Iterator[bytes]] = []
        for run in (*self._long, *self._short, self.fresh):
            low = 0 if start is None else bisect_left(run, start)
            high = len(run) if stop is None else bisect_left(run, stop, low)
            if low < high:
                places = range(high - 1, low - 1, -1) if reverse else range(low, high)
                found.append(map(run.__getitem__, places))
        merged = found[0] if len(found) == 1 else heapq.merge(*found, reverse=reverse)
        # A key that was withdrawn and written again comes twice.
        return (key for key, _ in groupby(merged))
