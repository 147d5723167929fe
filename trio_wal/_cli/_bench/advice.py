"""Settings for four aims, from what was measured; and what they should come to.

Law: arithmetic; no clock, no file.  The rule of sizes is that of docs/backpressure: while one batch
is written the next one gathers, so a queue holds twice what comes in a round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import attrs

from trio_wal._util import KiB, MiB

from .probe import Probe, Times

Aim = Literal["low latency", "balanced", "high throughput", "small memory"]
AIMS: Final[tuple[Aim, ...]] = ("low latency", "balanced", "high throughput", "small memory")

TASKS: Final[Mapping[Aim, int]] = {
    "low latency": 8,
    "balanced": 128,
    "high throughput": 1024,
    "small memory": 128,
}
"""How many tasks append at once, in the trial."""
MARGIN: Final = 2
LOOP_P99_MAX: Final = 0.001
"""So long may the event loop stand still for the slowest of a hundred syncs."""
DELAY_FROM: Final = 0.005
"""From this sync on it pays to wait for more records (docs/backpressure)."""
FAST_WRITE: Final = 100 * MiB
"""Bytes per second from which a segment of 256 MiB is full within seconds under load."""


@attrs.frozen
class Settings:
    """What to give to `open_wal` or `open_database`."""

    max_queue_size: int
    max_queue_bytes: int
    max_batch_bytes: int
    commit_delay: float | Literal["auto"]
    segment_size: int
    sync_in: Literal["thread", "loop"]
    checkpoint_bytes: int
    """Of a database."""

    def for_log(self) -> dict[str, object]:
        """What `open_wal` takes of it."""
        return attrs.asdict(self, filter=attrs.filters.exclude("checkpoint_bytes"))

    def waiting_bytes(self, record_size: int) -> int:
        """Payload that waits at most, a batch in flight included."""
        waiting = min(self.max_queue_size * record_size, self.max_queue_bytes)
        return waiting + min(self.max_batch_bytes, waiting)


@attrs.frozen
class Rates:
    """What settings come to."""

    records_per_second: float
    latency_p50: float
    """Seconds from the call of `append` to its return."""
    latency_p99: float


def settings_for(aim: Aim, probe: Probe) -> Settings:
    """The settings for an aim on this disk."""
    syncs = probe.sync_prepared
    delay: float | Literal["auto"] = "auto" if syncs.p50 >= DELAY_FROM else 0.0
    in_loop = syncs.p99 <= LOOP_P99_MAX
    if aim == "low latency":
        return Settings(
            max_queue_size=max(16, MARGIN * TASKS[aim]),
            max_queue_bytes=1 * MiB,
            max_batch_bytes=1 * MiB,
            commit_delay=0.0,
            segment_size=64 * MiB,
            sync_in="loop" if in_loop else "thread",
            checkpoint_bytes=16 * MiB,
        )
    if aim == "high throughput":
        return Settings(
            max_queue_size=100_000,
            max_queue_bytes=256 * MiB,
            max_batch_bytes=8 * MiB,
            commit_delay=delay,
            segment_size=(256 if probe.write_bytes_per_second >= FAST_WRITE else 64) * MiB,
            sync_in="thread",
            checkpoint_bytes=256 * MiB,
        )
    if aim == "small memory":
        return Settings(
            max_queue_size=MARGIN * TASKS[aim],
            max_queue_bytes=256 * KiB,
            max_batch_bytes=256 * KiB,
            commit_delay=0.0,
            segment_size=16 * MiB,
            sync_in="thread",
            checkpoint_bytes=4 * MiB,
        )
    return Settings(
        max_queue_size=10_000,
        max_queue_bytes=64 * MiB,
        max_batch_bytes=8 * MiB,
        commit_delay=0.0,
        segment_size=64 * MiB,
        sync_in="thread",
        checkpoint_bytes=64 * MiB,
    )


def expected(tasks: int, unsynced_per_second: float, syncs: Times) -> Rates:
    """What a round of all tasks comes to: the processor's part of it, which was measured without
    syncs, and a sync.

    Args:
      unsynced_per_second: records that the same tasks append where nothing is synced.
    """
    processing = tasks / unsynced_per_second
    round_seconds = processing + syncs.p50
    return Rates(tasks / round_seconds, round_seconds, processing + syncs.p99)
