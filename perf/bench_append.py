"""Durable appends: many small ones by many tasks, and `append_many`.

Law: the log, the bare ceiling, the bare disk and the thread per append take turns in
one run (`harness.compare`).  Latency has trials of its own.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import load
import trio
from harness import Comparison, Contender, MiB, Setting, Spread, compare, percentile
from report import Report, Requirement, number, table

import trio_wal

TASKS: Final = (1, 4, 16, 64, 128, 256, 1024, 4096)
REQUIRED: Final = (1, 16, 128, 1024, 4096)
"""For these the issue names a figure: they get more rounds."""
CEILINGS: Final = (128, 1024, 4096)
IN_LOOP: Final = "log, in the loop"
LOOPS: Final = {1: ("disk, written", 0.8), 16: ("log", 1.5), 128: ("log", 1.15)}
"""By tasks: what a log that syncs in the event loop is held against, and what it should reach."""
LARGE: Final = (16, 128, 1024)
"""KiB of a record."""
LARGE_TASKS: Final = (16, 128)
THREADS_MAX: Final = 256
"""Above, a thread per append is measured no more: trio runs 40 of them at a time, and the
others only wait longer."""


def run(setting: Setting) -> Report:
    report = Report("append")
    with setting.scratch() as directory:
        _appends(setting, directory, report)
    with setting.scratch() as directory:
        _many_small(setting, directory, report)
    with setting.scratch() as directory:
        _many_large(setting, directory, report)
    with setting.scratch() as directory:
        _large(setting, directory, report)
    return report


# -- append -----------------------------------------------------------------------


def _contenders(directory: Path, tasks: int, seconds: float) -> list[Contender]:
    spare = directory / "file"
    size = [load.frame_bytes(tasks)]
    contenders = [
        Contender("ceiling", partial(load.ceiling, tasks, seconds)),
        Contender("log", partial(load.log, directory / "log", tasks, seconds)),
        Contender(
            "log, unbounded queue",
            partial(load.log, directory / "unbounded", tasks, seconds, max_queue_size=math.inf),
        ),
        Contender("disk, written", partial(load.disk, spare, size, seconds, "written")),
        Contender("disk, growing", partial(load.disk, spare, size, seconds, "growing")),
        Contender("disk, 4 KiB, written", partial(load.disk, spare, [4096], seconds, "written")),
        Contender("disk, 4 KiB, growing", partial(load.disk, spare, [4096], seconds, "growing")),
    ]
    if tasks in LOOPS:
        trial = partial(load.log, directory / "loop", tasks, seconds, sync_in="loop")
        contenders.append(Contender(IN_LOOP, trial))
    if tasks <= THREADS_MAX:
        contenders += [
            Contender(
                f"threads, {how}",
                partial(load.thread_per_append, spare, tasks, seconds, grow=how == "growing"),
            )
            for how in ("written", "growing")
        ]
    return contenders


def _appends(setting: Setting, directory: Path, report: Report) -> None:
    seconds = 0.25 if setting.brief else 0.5
    comparisons: dict[int, Comparison] = {}
    latencies: dict[int, list[float]] = {}
    for tasks in TASKS:
        here = directory / str(tasks)
        here.mkdir()
        rounds = (5 if tasks in REQUIRED else 3) if setting.brief else 7
        comparisons[tasks] = compare(_contenders(here, tasks, seconds), rounds)
        taken = load.log_latency(here / "latency", tasks, 0.5 if setting.brief else 2.0)
        taken.sort()
        latencies[tasks] = taken

    rates = table(
        "Durable appends of 100 bytes: records per second (median)",
        ["tasks", "log", "ceiling", "log : ceiling", "unbounded queue", "a thread each, growing",
         "a thread each, written"],
    )  # fmt: skip
    syncs = table(
        "Batches, the bare disk at the batch's size, and the processor (median)",
        ["tasks", "records a sync", "sync µs", "disk, written µs", "disk, growing µs",
         "4 KiB, written µs", "4 KiB, growing µs", "CPU s a million, log", "ceiling"],
    )  # fmt: skip
    latency = table(
        "Latency of append, ms (trials of their own)", ["tasks", "p50", "p99", "p99.9", "max"]
    )
    data: list[dict[str, Any]] = []
    for tasks, found in comparisons.items():
        ratio = found.ratio("log", "ceiling")
        has_threads = tasks <= THREADS_MAX
        rates.add_row(
            str(tasks),
            number(found.median("log")),
            number(found.median("ceiling")),
            _spread(ratio),
            number(found.median("log, unbounded queue")),
            *(
                number(found.median(f"threads, {how}")) if has_threads else ""
                for how in ("growing", "written")
            ),
        )
        syncs.add_row(
            str(tasks),
            f"{found.median('log', 'records per sync'):.1f}",
            f"{found.median('log', 'sync us'):.0f}",
            *(
                f"{found.median(name, 'us'):.0f}"
                for name in ("disk, written", "disk, growing", "disk, 4 KiB, written",
                             "disk, 4 KiB, growing")
            ),
            *(f"{found.median(name, load.CPU):.1f}" for name in ("log", "ceiling")),
        )  # fmt: skip
        taken = latencies[tasks]
        shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
        ms = {name: percentile(taken, share) * 1e3 for name, share in shares.items()}
        ms["max"] = taken[-1] * 1e3
        latency.add_row(str(tasks), *(f"{value:.2f}" for value in ms.values()))
        data.append(
            {
                "tasks": tasks,
                "comparison": found,
                "per second": {name: found.spread(name) for name in found.trials},
                "log to ceiling": ratio,
                "latency ms": ms,
                "latency samples": len(taken),
            }
        )
    report.tables += [rates, syncs, latency]
    disturbed = sum(found.disturbed for found in comparisons.values())
    if disturbed:
        total = sum(found.rounds * len(found.trials) for found in comparisons.values())
        report.notes.append(f"Other processes disturbed {disturbed} of {total} trials.")
    report.data["appends"] = data
    _require_appends(comparisons, report)


def _spread(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _require_appends(comparisons: dict[int, Comparison], report: Report) -> None:
    report.requirements.append(
        Requirement(
            "append K=1 to thread",
            "K=1: appends/s against one to_thread per append, write + fdatasync",
            "1.5 ×",
            1.5,
            # A growing file: who has no log has nobody who prepares one.
            comparisons[1].ratio("log", "threads, growing"),
        )
    )
    for tasks, (to, limit) in LOOPS.items():
        name = "bare pwrite + fdatasync in a loop" if to != "log" else 'sync_in="thread"'
        report.require(
            f"append in the loop K={tasks}",
            f'K={tasks}: appends/s with sync_in="loop" against {name}',
            limit,
            comparisons[tasks].ratio(IN_LOOP, to),
            at_most=False,
        )
    for tasks in CEILINGS:
        report.requirements.append(
            Requirement(
                f"append K={tasks} to ceiling",
                f"K={tasks}: appends/s against the bare ceiling",
                "0.85 ×",
                0.85,
                comparisons[tasks].ratio("log", "ceiling"),
            )
        )
    report.requirements.append(
        Requirement(
            "bounded to unbounded K=1024",
            "K=1024: queue of 10,000 against an unbounded one",
            "0.98 ×",
            0.98,
            comparisons[1024].ratio("log", "log, unbounded queue"),
        )
    )


# -- append_many ------------------------------------------------------------------


def _append_many(
    path: Path,
    units: Sequence[list[bytes]],
    seconds: float,
    retention: trio_wal.Retention | None = None,
) -> dict[str, float]:
    """One task, one unit after the other, in a log of its own."""
    load.age(path, units[0])
    try:
        return trio.run(_append_many_async, path, units, seconds, retention)
    finally:
        # What it wrote is given back before the next one's turn.
        shutil.rmtree(path)
        os.sync()


async def _append_many_async(
    path: Path,
    units: Sequence[list[bytes]],
    seconds: float,
    retention: trio_wal.Retention | None,
) -> dict[str, float]:
    async with trio_wal.open_wal(path, retention=retention) as wal:
        for unit in units:
            await wal.append_many(unit)
        records = size = count = 0
        before = wal.statistics().sync_seconds_total
        start = perf_counter()
        while (elapsed := perf_counter() - start) < seconds:
            unit = units[count % len(units)]
            await wal.append_many(unit)
            count += 1
            records += len(unit)
            size += sum(map(len, unit))
        synced = wal.statistics().sync_seconds_total - before
    return {
        "records per second": records / elapsed,
        "MB per second": size / elapsed / 1e6,
        "us": elapsed / count * 1e6,
        "sync us": synced / count * 1e6,
    }


def _logs(directory: Path, units: Sequence[list[bytes]], seconds: float) -> list[Contender]:
    path = directory / "log"
    drops = "log, dropping what is older than 256 MiB"
    return [
        Contender("log", partial(_append_many, path, units, seconds)),
        Contender(
            drops, partial(_append_many, path, units, seconds, trio_wal.KeepBytes(256 * MiB))
        ),
    ]


def _many_small(setting: Setting, directory: Path, report: Report) -> None:
    seconds = 0.4 if setting.brief else 1.0
    units = [[number.to_bytes(100, "little") for number in range(10_000)] for _ in range(4)]
    size = [load.frame_bytes(10_000)]
    found = compare(
        [
            *_logs(directory, units, seconds),
            *_disks(directory, size, seconds),
        ],
        5 if setting.brief else 7,
    )
    made = table(
        "append_many, 10,000 records of 100 bytes a call (median)",
        ["", "records/s", "MB/s", "µs a call"],
    )
    for name in found.trials:
        calls = 1e6 / found.median(name, "us")
        made.add_row(
            name,
            number(calls * 10_000),
            number(found.median(name, "MB per second")),
            number(found.median(name, "us")),
        )
    report.tables.append(made)
    report.data["append_many small"] = found
    report.requirements.append(
        Requirement(
            "append_many small",
            "append_many, 100-byte records, 10,000 a call: durable records/s",
            "2 M",
            2e6,
            found.spread("log"),
            unit="/s",
        )
    )


def _disks(directory: Path, sizes: Sequence[int], seconds: float) -> list[Contender]:
    return [
        Contender(
            f"disk, {how}",
            partial(load.disk, directory / "file", sizes, seconds, how, file_bytes=64 * MiB),
        )
        for how in load.PREPARATIONS
    ]


def _many_large(setting: Setting, directory: Path, report: Report) -> None:
    seconds = 0.4 if setting.brief else 1.0
    made = table(
        "append_many, records of 64 KiB (median)",
        ["", "MB/s", "µs a call", "log : this"],
    )
    for count in (16, 64):
        record = bytes(range(256)) * 256
        unit = [number.to_bytes(4, "little") + record[4:] for number in range(count)]
        found = compare(
            [
                *_logs(directory, [unit], seconds),
                *_disks(directory, [count << 16], seconds),
            ],
            5 if setting.brief else 7,
        )
        for name in found.trials:
            ratio = found.ratio("log", name, "MB per second")
            made.add_row(
                f"{count >> 4} MiB a call: {name}",
                number(found.median(name, "MB per second")),
                number(found.median(name, "us")),
                "" if name == "log" else _spread(ratio),
            )
        report.data[f"append_many large {count}"] = found
        report.requirements.append(
            Requirement(
                f"append_many large {count}",
                f"append_many, 64 KiB records, {count >> 4} MiB a call: MB/s against the disk, "
                "space reserved as in the log",
                "0.7 ×",
                0.7,
                found.ratio("log", "disk, reserved", "MB per second"),
            )
        )
    report.tables.append(made)


# -- large records by many tasks ---------------------------------------------------


def _large(setting: Setting, directory: Path, report: Report) -> None:
    """Beside the bare disk, which writes as much at once as the log may."""
    seconds = 0.4 if setting.brief else 1.0
    made = table(
        "Appends of large records, what is older than 128 MiB is dropped (median)",
        ["KiB a record, tasks", "log MB/s", "records a sync", "disk, reserved MB/s",
         "disk, written MB/s", "log : reserved"],
    )  # fmt: skip
    for size in LARGE:
        for tasks in LARGE_TASKS:
            record = bytes(range(256)) * 4 * size
            size_bytes = [min(tasks * len(record), load.BATCH_BYTES)]
            path = directory / "log"
            keep = trio_wal.KeepBytes(128 * MiB)
            trial = partial(load.log, path, tasks, seconds, record=record, retention=keep)
            disks = _disks(directory, size_bytes, seconds)
            found = compare([Contender("log", trial), *disks], 5 if setting.brief else 7)
            shutil.rmtree(path)
            ratio = found.ratio("log", "disk, reserved", "MB per second")
            made.add_row(
                f"{size:,}, {tasks}",
                number(found.median("log", "MB per second")),
                f"{found.median('log', 'records per sync'):.1f}",
                *(
                    number(found.median(f"disk, {how}", "MB per second"))
                    for how in ("reserved", "written")
                ),
                _spread(ratio),
            )
            report.data[f"large {size} {tasks}"] = found
            report.require(
                f"large {size} K={tasks}",
                f"K={tasks}: appends of {size} KiB with retention, MB/s against the bare disk in "
                "reserved space",
                0.8,
                ratio,
                at_most=False,
            )
    report.tables.append(made)
