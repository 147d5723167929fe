"""Opening logs of up to some million records, and reading them all.

Law: the same files for everybody, in the page cache: this is what the code costs, not
what the disk does.  "Scan" checks every frame (``verify_bytes=math.inf``); an ordinary
open checks the newest 32 MiB only and is shown beside it.

One part comes from the disk all the same: opening forgets what the page cache has of the
last two segments, because only there can it have what the disk has not.  So what a scan is
compared with, reading the bytes and computing their checksum, is measured both ways.
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
from typing import Any, Final

import google_crc32c
import trio
from harness import Comparison, Contender, Setting, compare
from report import Report, Requirement, number, table

import trio_wal
from trio_wal._disk.chain import read_segment
from trio_wal._disk.finding import refuse
from trio_wal._disk.walk import Walk
from trio_wal._system.files import OsFiles

RECORDS: Final = 1_000_000
RECORD_BYTES: Final = 100
BATCHES: Final = (128, 1_000, 10_000)
"""Records in a frame: many tasks that append, and `append_many`."""
SCAN_NEEDED: Final = {128: 0.4, 1_000: 0.7, 10_000: 0.75}
"""Of the speed of reading and checksumming the same bytes."""
SIZES: Final = (10_000, 100_000, RECORDS)
SIZES_AT_LENGTH: Final = (10_000, 30_000, 100_000, 300_000, RECORDS, 3_000_000, 10_000_000)
"""Records of the logs by which the time is shown over the size."""
READ_BYTES: Final = 1 << 20
REREAD: Final = 2
"""Of so many segments, the newest, recovery reads what the disk has."""
CHECKED: Final = {
    "read + checksum": False,
    "read + checksum, newest from the disk": True,
}
"""What a scan is compared with; whether those segments come from the disk."""
CRASHED: Final = "scan, after a crash"
WALK: Final = "the walk alone"
"""Over the same frames, without what an open does beside it: repair, two syncs, zeros behind the
end."""

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
    _million(setting, report)
    _over_size(setting, report)
    return report


def _million(setting: Setting, report: Report) -> None:
    made = table(
        f"{RECORDS:,} records of {RECORD_BYTES} bytes (median)",
        ["records a frame", "", "records/s", "MB/s", "ms"],
    )
    rounds = 3 if setting.brief else 9
    for batch in BATCHES:
        with setting.scratch() as directory:
            crashed = directory / "crashed"
            _write(crashed, RECORDS, batch)
            log = directory / "log"
            scanned = _closed_copy(crashed, log)
            found = compare(
                [
                    Contender("scan, after a clean close", partial(_scan, log, RECORDS, math.inf)),
                    Contender(CRASHED, partial(_scan_crashed, crashed, RECORDS, math.inf)),
                    Contender(WALK, partial(_walk, log, RECORDS)),
                    Contender("ordinary open", partial(_scan, log, RECORDS, None)),
                    Contender("read", partial(_read, log)),
                    Contender("the files alone", partial(_bytes, log, scanned, checksum=False)),
                    *(
                        Contender(name, partial(_bytes, log, scanned, checksum=True, disk=disk))
                        for name, disk in CHECKED.items()
                    ),
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
        _require(batch, found, report)
    report.tables.append(made)


def _require(batch: int, found: Comparison, report: Report) -> None:
    for what, name, needed, limit in (
        ("recovery scan", CRASHED, "1 M", 1e6),
        ("read", "read", "0.5 M", 0.5e6),
    ):
        report.requirements.append(
            Requirement(
                f"{name} {batch}",
                f"{what} of 1 M records of 100 bytes, {batch:,} a frame",
                needed,
                limit,
                found.spread(name),
                unit="/s",
            )
        )
    report.require(
        f"walk to read + checksum {batch}",
        f"the walk of a recovery scan alone, {batch:,} a frame, to reading and checksumming",
        SCAN_NEEDED[batch],
        found.ratio(WALK, "read + checksum"),
        at_most=False,
    )
    for name, disk in CHECKED.items():
        where = "where recovery reads them" if disk else "from the page cache"
        report.requirements.append(
            Requirement(
                f"scan to {name} {batch}",
                f"recovery scan, {batch:,} a frame, to reading and checksumming the same bytes "
                f"{where}",
                f"{SCAN_NEEDED[batch]} ×",
                SCAN_NEEDED[batch],
                found.ratio(CRASHED, name),
            )
        )


# -- over the size of the log -----------------------------------------------------


def _over_size(setting: Setting, report: Report) -> None:
    made = table(
        f"Opening over the size of the log, records of {RECORD_BYTES} bytes, {BATCHES[0]} a "
        "frame: ms (median)",
        ["records", "scan of everything, after a crash", "ordinary open, after a crash",
         "scan of everything, closed", "ordinary open, closed"],
    )  # fmt: skip
    rows = []
    for records in SIZES if setting.brief else SIZES_AT_LENGTH:
        with setting.scratch() as directory:
            crashed, log = directory / "crashed", directory / "log"
            _write(crashed, records, BATCHES[0])
            _closed_copy(crashed, log)
            found = compare(
                [
                    Contender(f"{what}, {when}", partial(scan, path, records, verify_bytes))
                    for when, scan, path in (
                        ("after a crash", _scan_crashed, crashed),
                        ("closed", _scan, log),
                    )
                    for what, verify_bytes in (("everything", math.inf), ("ordinary", None))
                ],
                3 if setting.brief else 5,
            )
        seconds = {name: found.spread(name, "seconds") for name in found.trials}
        made.add_row(f"{records:,}", *(f"{spread.median * 1e3:.1f}" for spread in seconds.values()))
        rows.append({"records": records, "seconds": seconds})
    report.tables.append(made)
    report.data["over size"] = rows


# -- trials -----------------------------------------------------------------------


def _write(path: Path, records: int, batch: int) -> None:
    """In a process of its own, which does not close the log."""
    arguments = [path, records, batch, RECORD_BYTES]
    # This folder must not come before the installed package on the child's path either.
    subprocess.run([sys.executable, "-c", WRITER, *map(str, arguments)], check=True)


def _closed_copy(crashed: Path, path: Path) -> int:
    """The log recovered and then closed in order; returns the bytes of its frames."""
    shutil.copytree(crashed, path)
    trio.run(_open, path, math.inf)
    return trio.run(_open, path, math.inf).bytes_scanned


async def _open(path: Path, verify_bytes: float | None) -> trio_wal.RecoveryReport:
    options: dict[str, Any] = {} if verify_bytes is None else {"verify_bytes": verify_bytes}
    async with trio_wal.open_wal(path, **options) as wal:
        return wal.recovery


def _scan(path: Path, records: int, verify_bytes: float | None) -> dict[str, float]:
    """By the clock around the whole open, close included: what a user waits."""
    start = perf_counter()
    report = trio.run(_open, path, verify_bytes)
    seconds = perf_counter() - start
    assert report.last_lsn == records
    assert verify_bytes is None or report.records_replayed == records
    return {
        "records per second": records / seconds,
        "seconds": seconds,
        "recovery seconds": report.seconds,
    }


def _walk(path: Path, records: int) -> dict[str, float]:
    directory = OsFiles().open_directory(str(path))
    segments = [read_segment(directory, file.name) for file in sorted(path.glob("wal-*.log"))]
    met = 0
    start = perf_counter()
    for segment in segments:
        file = directory.open(segment.file_name)
        walk = Walk(file, segment, refuse)
        walk.follow(None)
        met += walk.records
        file.close()
    seconds = perf_counter() - start
    directory.close()
    assert met == records
    return {"records per second": records / seconds, "seconds": seconds}


def _scan_crashed(crashed: Path, records: int, verify_bytes: float | None) -> dict[str, float]:
    """Recovery repairs, so each trial gets a copy, which it does not wait for."""
    copy = crashed.with_name("copy")
    _copy_reserved(crashed, copy)
    os.sync()
    try:
        return _scan(copy, records, verify_bytes)
    finally:
        shutil.rmtree(copy)


def _copy_reserved(crashed: Path, copy: Path) -> None:
    """A copy in which space that was reserved and never written is not zeros that were."""
    if sys.platform == "linux":
        subprocess.run(["cp", "-a", "--sparse=auto", crashed, copy], check=True)
    else:
        shutil.copytree(crashed, copy)


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


def _bytes(path: Path, size: int, *, checksum: bool, disk: bool = False) -> dict[str, float]:
    """Reading as many bytes of the same files as a scan does, a piece at a time."""
    start = perf_counter()
    files = sorted(path.glob("wal-*.log"))
    if disk:
        for file in files[-REREAD:]:
            _forget(file)
    crc = 0
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while size and (piece := stream.read(min(size, READ_BYTES))):
                size -= len(piece)
                if checksum:
                    crc = google_crc32c.extend(crc, piece)
    assert not size
    seconds = perf_counter() - start
    return {"records per second": RECORDS / seconds, "seconds": seconds}


def _forget(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
