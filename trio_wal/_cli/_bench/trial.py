"""Settings tried: many tasks append for a moment, to a log of its own.

Law: the library as anybody uses it; what was tried is gone afterwards.
"""

from __future__ import annotations

import shutil
from typing import Any

import trio

from trio_wal._wal import WriteAheadLog, open_wal

from .advice import Rates, Settings
from .probe import times_of


async def run_trial(
    path: str, settings: Settings, *, tasks: int, record_size: int, seconds: float, synced: bool
) -> Rates:
    """
    Args:
      path: where nothing stands yet.
      synced: whether records are made durable; else only what that costs besides is measured.

    Raises:
      WalError, OSError: as `open_wal` and `WriteAheadLog.append`.
    """
    options: dict[str, Any] = settings.for_log()
    if not synced:
        options.update(durability="none", commit_delay=0.0)
    try:
        async with open_wal(path, **options) as wal:
            return await _append(wal, tasks, bytes(record_size), seconds)
    finally:
        shutil.rmtree(path, ignore_errors=True)


async def _append(wal: WriteAheadLog, tasks: int, record: bytes, seconds: float) -> Rates:
    latencies: list[float] = []
    began = trio.current_time()
    until = began + seconds
    clock = trio.current_time

    async def append() -> None:
        while True:
            start = clock()
            await wal.append(record)
            end = clock()
            latencies.append(end - start)
            if end >= until:
                return

    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(append)
    times = times_of(latencies)
    return Rates(len(latencies) / max(clock() - began, 1e-9), times.p50, times.p99)
