"""What a log counts, and how it is handed out.

Law: values only; nothing here looks anything up.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Final

import attrs

HISTOGRAM_BOUNDS: Final = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005,
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds, in seconds, of the buckets of ``sync_seconds_histogram``."""


@attrs.define
class SyncTimes:
    """How long syncs took: running totals."""

    count: int = 0
    seconds_total: float = 0.0
    seconds_max: float = 0.0
    last_us: int | None = None
    """When the last one returned, in microseconds since 1970."""
    _buckets: list[int] = attrs.Factory(lambda: [0] * (len(HISTOGRAM_BOUNDS) + 1))

    def note(self, seconds: float, now_us: int) -> None:
        """One more, which has just returned."""
        self.count += 1
        self.seconds_total += seconds
        self.seconds_max = max(self.seconds_max, seconds)
        self._buckets[bisect_left(HISTOGRAM_BOUNDS, seconds)] += 1
        self.last_us = now_us

    def histogram(self) -> tuple[tuple[float, int], ...]:
        return tuple(zip((*HISTOGRAM_BOUNDS, math.inf), self._buckets, strict=True))


@attrs.frozen
class EngineStatistics:
    """What an engine knows that its log does not; `WalStatistics` says what it means."""

    syncs: SyncTimes
    segments: int
    disk_bytes: int
