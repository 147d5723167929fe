"""Memory while the disk stalls: a million `send`s must not pile up.

Law: a process of its own for each case, because what one has allocated and freed
disturbs the next.  The disk is the real one; its sync is made to wait.  Measured is what
the kernel says of the process (VmRSS before, VmHWM after), not what Python thinks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from harness import MiB, Report, Requirement, Setting, Spread, number, table

SENDS: Final = 1_000_000
RECORD_BYTES: Final = 200
TASKS: Final = 100
SLACK_BYTES: Final = 16 * MiB

CASES: Final = {
    "as opened by default": {},
    "unbounded count, 64 MiB": {"max_queue_size": None},
}
"""Options of `open_wal`; None stands for infinity, which JSON does not have."""


def run(setting: Setting) -> Report:
    report = Report("memory")
    made = table(
        f"{SENDS:,} sends of {RECORD_BYTES} bytes by {TASKS} tasks; the disk stalls at first",
        ["", "growth MiB", "limit MiB", "accepted while it stalled", "their payload MiB"],
    )
    for name, options in CASES.items():
        growths = []
        for _ in range(1 if setting.brief else 3):
            with setting.scratch() as directory:
                found = _measure(directory, options)
            growths.append(found["growth"] / MiB)
            assert found["durable"] == SENDS
        limit = (found["max_queue_bytes"] + found["max_batch_bytes"] + SLACK_BYTES) / MiB
        growth = Spread.of(growths)
        made.add_row(
            name,
            f"{growth.median:.1f}",
            f"{limit:.0f}",
            number(found["accepted"]),
            f"{found['peak_bytes_waiting'] / MiB:.1f}",
        )
        report.data[name] = {**found, "growth MiB": growth, "limit MiB": limit}
        if not options:
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
    report.tables.append(made)
    report.notes.append(
        "The bound on bytes counts payload; a small record in memory weighs some 100 bytes more, "
        "which the bound on records keeps in check unless it is lifted."
    )
    return report


def _measure(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    # This file's folder, where the harness is, must be on the child's path.
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONSAFEPATH"}
    command = [sys.executable, __file__, str(directory / "log"), json.dumps(options)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- in the process that is measured ----------------------------------------------


def _kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise LookupError(name)


def main(path: str, options: dict[str, Any]) -> None:
    import gc
    import math
    import threading

    import trio

    import trio_wal
    from trio_wal import _files

    moves = threading.Event()
    moves.set()
    real_sync = _files.OsFile.sync

    def sync(file: _files.OsFile) -> None:
        moves.wait()
        real_sync(file)

    _files.OsFile.sync = sync  # type: ignore[method-assign]
    options = {name: math.inf if value is None else value for name, value in options.items()}
    found: dict[str, Any] = {"max_queue_bytes": 64 * MiB, "max_batch_bytes": 8 * MiB}

    async def measure() -> None:
        async with trio_wal.open_wal(path, **options) as wal:
            sent = 0

            async def sender(first: int) -> None:
                nonlocal sent
                for number in range(first, SENDS, TASKS):
                    # Each a value of its own: one that all share would weigh nothing.
                    await wal.send(number.to_bytes(RECORD_BYTES, "little"))
                    sent += 1

            async with trio.open_nursery() as nursery:
                await wal.append(b"warm")
                gc.collect()
                before = _kib("VmRSS")
                moves.clear()
                for first in range(TASKS):
                    nursery.start_soon(sender, first)
                # Until nothing moves any more: every task is blocked, or done.
                with trio.move_on_after(60):
                    last = -1
                    while last != sent:
                        last = sent
                        await trio.sleep(0.5)
                found["accepted"] = sent
                found["stalled growth"] = (_kib("VmRSS") - before) * 1024
                moves.set()
            await wal.flush()
            found["durable"] = wal.durable_lsn - 1
            statistics = wal.statistics()
            found["peak_bytes_waiting"] = statistics.peak_bytes_waiting
            found["peak_records_waiting"] = statistics.peak_records_waiting
            found["growth"] = (_kib("VmHWM") - before) * 1024

    trio.run(measure)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
