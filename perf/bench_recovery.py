"""Opening a log of a million records, and reading them all.

Law: the same files for everybody, in the page cache: this is what the code costs, not
what the disk does.  "Scan" checks every frame (``verify_bytes=math.inf``); an ordinary
open checks the newest 32 MiB only and is shown beside it.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Final

import trio
from harness import Contender, Report, Requirement, Setting, compare, number, table

import trio_wal

RECORDS: Final = 1_000_000
RECORD_BYTES: Final = 100
BATCHES: Final = (128, 10_000)
"""Records in a frame: many tasks that append, and `append_many`."""

WRITER: Final = """\
import os, sys, trio, trio_wal
path, records, batch, size = sys.argv[1], *map(int, sys.argv[2:])
async def main():
    async with trio_wal.open_wal(path) as wal:
        for first in range(0, records, batch):
            numbers = range(first, min(first + batch, records))
            await wal.append_many([number.to_bytes(size, "little") for number in numbers])
        os._exit(0)  # killed: neither closed nor marked as such
trio.run(main)
"""


def run(setting: Setting) -> Report:
    report = Report("recovery")
    made = table(
        f"{RECORDS:,} records of {RECORD_BYTES} bytes (median)",
        ["records a frame", "", "records/s", "MB/s", "ms"],
    )
    rounds = 3 if setting.brief else 9
    for batch in BATCHES:
        with setting.scratch() as directory:
            crashed = directory / "crashed"
            _write(crashed, batch)
            log = directory / "log"
            shutil.copytree(crashed, log)
            trio.run(_open, log, math.inf)  # recovered, and then closed in order
            found = compare(
                [
                    Contender("scan, after a clean close", partial(_scan, log, math.inf)),
                    Contender("scan, after a crash", partial(_scan_crashed, crashed)),
                    Contender("ordinary open", partial(_scan, log, None)),
                    Contender("read", partial(_read, log)),
                    Contender("the files alone", partial(_files_alone, log)),
                ],
                rounds,
            )
        for name in found.trials:
            seconds = found.median(name, "seconds")
            is_open = name == "ordinary open"
            made.add_row(
                f"{batch:,}",
                name,
                "" if is_open else number(RECORDS / seconds),
                "" if is_open else number(RECORDS * RECORD_BYTES / seconds / 1e6),
                f"{seconds * 1e3:.0f}",
            )
        report.data[f"frames of {batch}"] = found
        for what, name, limit in (
            ("recovery scan", "scan, after a crash", 1e6),
            ("read", "read", 0.5e6),
        ):
            report.requirements.append(
                Requirement(
                    f"{name} {batch}",
                    f"{what} of 1 M records of 100 bytes, {batch:,} a frame",
                    f"{number(limit)}" if limit >= 1e6 else "0.5 M",
                    limit,
                    found.spread(name),
                    unit="/s",
                )
            )
    report.tables.append(made)
    return report


def _write(path: Path, batch: int) -> None:
    """In a process of its own, which does not close the log."""
    arguments = [path, RECORDS, batch, RECORD_BYTES]
    # This folder must not come before the installed package on the child's path either.
    subprocess.run([sys.executable, "-c", WRITER, *map(str, arguments)], check=True)


async def _open(path: Path, verify_bytes: float | None) -> trio_wal.RecoveryReport:
    options = {} if verify_bytes is None else {"verify_bytes": verify_bytes}
    async with trio_wal.open_wal(path, **options) as wal:
        return wal.recovery


def _scan(path: Path, verify_bytes: float | None) -> dict[str, float]:
    """By the clock around the whole open, close included: what a user waits."""
    start = perf_counter()
    report = trio.run(_open, path, verify_bytes)
    seconds = perf_counter() - start
    assert report.last_lsn == RECORDS
    assert verify_bytes is None or report.records_replayed == RECORDS
    return {
        "records per second": RECORDS / seconds,
        "seconds": seconds,
        "recovery seconds": report.seconds,
    }


def _scan_crashed(crashed: Path) -> dict[str, float]:
    """Recovery repairs, so each trial gets a copy, which it does not wait for."""
    copy = crashed.with_name("copy")
    shutil.copytree(crashed, copy)
    os.sync()
    try:
        return _scan(copy, math.inf)
    finally:
        shutil.rmtree(copy)


def _read(path: Path) -> dict[str, float]:
    return trio.run(_read_async, path)


async def _read_async(path: Path) -> dict[str, float]:
    async with trio_wal.open_wal(path) as wal:
        count = 0
        start = perf_counter()
        async with wal.read() as records:
            async for _ in records:
                count += 1
        seconds = perf_counter() - start
    assert count == RECORDS
    return {"records per second": count / seconds, "seconds": seconds}


def _files_alone(path: Path) -> dict[str, float]:
    """Reading the same bytes, a MiB at a time."""
    start = perf_counter()
    for file in sorted(path.glob("wal-*.log")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass
    seconds = perf_counter() - start
    return {"records per second": RECORDS / seconds, "seconds": seconds}
