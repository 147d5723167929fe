"""Memory while the disk stalls: a million `send`s must not pile up.

Law: a process of its own for each case (see `apart`).  The disk is the real one; its sync is
made to wait.  Measured is by how much the process has grown at its largest.
"""

from __future__ import annotations

import gc
import math
from functools import partial
from typing import Any, Final

import trio
from apart import Stall, apart, forget_peak, memory
from harness import MiB, Setting, Spread
from report import Report, Requirement, number, table

import trio_wal

SENDS: Final = 1_000_000
"""Of this many the requirement speaks."""
LOADS: Final = (10_000, 100_000, SENDS)
LOADS_AT_LENGTH: Final = (1_000, 10_000, 30_000, 100_000, 300_000, SENDS)
RECORD_BYTES: Final = 200
TASKS: Final = 100
SLACK_BYTES: Final = 16 * MiB
MAX_BATCH_BYTES: Final = 8 * MiB
STILL_SECONDS: Final = 0.5
"""When nothing was accepted for so long, every task is blocked, or done."""

DEFAULT: Final = "as opened by default"
CASES: Final[dict[str, dict[str, Any]]] = {
    DEFAULT: {"max_queue_bytes": 64 * MiB},
    "unbounded count, 64 MiB": {"max_queue_size": math.inf, "max_queue_bytes": 64 * MiB},
    "unbounded": {"max_queue_size": math.inf, "max_queue_bytes": math.inf},
}
"""Options of `open_wal`."""


def run(setting: Setting) -> Report:
    report = Report("memory")
    made = table(
        f"Sends of {RECORD_BYTES} bytes by {TASKS} tasks; the disk stalls at first (median)",
        ["", "sends", "growth MiB", "limit MiB", "accepted while it stalled", "their payload MiB"],
    )
    for name, options in CASES.items():
        limit = (options["max_queue_bytes"] + MAX_BATCH_BYTES + SLACK_BYTES) / MiB
        rows = []
        for sends in LOADS if setting.brief else LOADS_AT_LENGTH:
            found = [_measure(setting, options, sends) for _ in range(1 if setting.brief else 3)]
            growth = Spread.of([trial["growth"] / MiB for trial in found])
            made.add_row(
                name,
                f"{sends:,}",
                f"{growth.median:.1f}",
                "" if math.isinf(limit) else f"{limit:.0f}",
                number(found[0]["accepted"]),
                f"{found[0]['peak_bytes_waiting'] / MiB:.1f}",
            )
            rows.append({"sends": sends, "growth MiB": growth, "trials": found})
            if name == DEFAULT and sends == SENDS:
                report.requirements.append(
                    Requirement(
                        "memory",
                        "memory: 1 M sends of 200 bytes against a disk that stalls: growth",
                        f"at most {limit:.0f} MiB",
                        limit,
                        growth,
                        unit="MiB",
                        at_most=True,
                    )
                )
        report.data[name] = {"limit MiB": None if math.isinf(limit) else limit, "loads": rows}
    report.tables.append(made)
    report.notes.append(
        "The bound on bytes counts payload; a small record in memory weighs some 100 bytes more, "
        "which the bound on records keeps in check unless it is lifted."
    )
    return report


def _measure(setting: Setting, options: dict[str, Any], sends: int) -> dict[str, Any]:
    with setting.scratch() as directory:
        found = apart(stalled, str(directory / "log"), options, sends)
    assert found["durable"] == sends
    return found


# -- in the process that is measured ----------------------------------------------


def stalled(path: str, options: dict[str, Any], sends: int) -> dict[str, Any]:
    return trio.run(partial(_stalled, path, options, sends))


async def _stalled(path: str, options: dict[str, Any], sends: int) -> dict[str, Any]:
    stall = Stall()
    found: dict[str, Any] = {}
    async with trio_wal.open_wal(path, max_batch_bytes=MAX_BATCH_BYTES, **options) as wal:
        sent = 0

        async def sender(first: int) -> None:
            nonlocal sent
            for number in range(first, sends, TASKS):
                # Each a value of its own: one that all share would weigh nothing.
                await wal.send(number.to_bytes(RECORD_BYTES, "little"))
                sent += 1

        async with trio.open_nursery() as nursery:
            await wal.append(b"warm")
            gc.collect()
            forget_peak()
            before = memory("VmRSS")
            with stall():
                for first in range(TASKS):
                    nursery.start_soon(sender, first)
                with trio.move_on_after(60):
                    last = -1
                    while last != sent:
                        last = sent
                        await trio.sleep(STILL_SECONDS)
                found["accepted"] = sent
                found["stalled growth"] = memory("VmRSS") - before
        await wal.flush()
        found["durable"] = wal.durable_lsn - 1
        statistics = wal.statistics()
        found["peak_bytes_waiting"] = statistics.peak_bytes_waiting
        found["peak_records_waiting"] = statistics.peak_records_waiting
        found["growth"] = memory("VmHWM") - before
    return found
