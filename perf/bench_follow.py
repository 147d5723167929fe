"""Followers in another process: how long from durable to given, and what they cost the writer.

Law: the writer is this process, the followers are in one of their own, and both read the same
clock.  The writer commits at a steady pace, so that what is measured is the way to the follower
and not a queue.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import trio
from apart import apart
from harness import Contender, Setting, compare, percentile
from report import Report, Requirement, spread_text, table

import trio_wal

PER_SECOND: Final = 100
LAST: Final = b"last"
RECORD: Final = b"." * 100

CHILD: Final = """\
import sys
sys.path[:0] = sys.argv[1:2]
from bench_follow import follow
follow(sys.argv[2])
"""


def follow(path: str) -> None:
    """The other process: a line for each record, its LSN and when it was given."""

    async def main() -> None:
        given: list[tuple[int, float]] = []
        async with trio_wal.open_reader(path) as reader, reader.follow() as records:
            print("ready", flush=True)
            async for record in records:
                given.append((record.lsn, time.monotonic()))
                if record.data == LAST:
                    break
        print("\n".join(f"{lsn} {when!r}" for lsn, when in given))

    trio.run(main)


async def _trial(path: Path, seconds: float) -> dict[str, float]:
    async with trio_wal.open_wal(path) as wal:
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(path)]
        durable: dict[int, float] = {}
        # Begun before anything is measured.
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:  # noqa: ASYNC220
            assert child.stdout is not None
            await trio.to_thread.run_sync(child.stdout.readline)
            for _ in range(int(seconds * PER_SECOND)):
                durable[await wal.append(RECORD)] = time.monotonic()
                await trio.sleep(1 / PER_SECOND)
            await wal.append(LAST)
            lines = (await trio.to_thread.run_sync(child.stdout.read)).splitlines()
    given = {int(lsn): float(when) for lsn, when in map(str.split, lines)}
    # Given before the writer's own task has run: that is no time at all.
    late = sorted(max(0.0, given[lsn] - when) * 1e3 for lsn, when in durable.items())
    return {"p99": percentile(late, 0.99), "median": percentile(late, 0.5), "slowest": late[-1]}


def trial(path: str, seconds: float) -> dict[str, float]:
    """Milliseconds."""
    found: dict[str, float] = trio.run(_trial, Path(path), seconds)
    return found


def run(setting: Setting) -> Report:
    """The benchmark."""
    seconds, rounds = (3.0, 3) if setting.brief else (20.0, 5)

    def one() -> Mapping[str, float]:
        with setting.scratch() as path:
            return apart(trial, str(path / "log"), seconds)

    found = compare([Contender("a follower", one)], rounds)
    report = Report("follow")
    shown = table(
        f"A follower in another process, {PER_SECOND} commits a second, {rounds} trials of "
        f"{seconds:g} s; milliseconds from durable to given",
        ["", "median", "p99", "slowest"],
    )
    figures = {name: found.spread("a follower", name) for name in ("median", "p99", "slowest")}
    shown.add_row("a follower", *(spread_text(spread) for spread in figures.values()))
    report.tables.append(shown)
    report.data["follow"] = figures
    report.requirements.append(
        Requirement(
            "follower p99",
            "a follower in another process: from durable to given, p99",
            "at most 5 ms",
            5.0,
            figures["p99"],
            unit="ms",
            at_most=True,
        )
    )
    if found.disturbed:
        report.notes.append(f"{found.disturbed} trials were disturbed by other processes.")
    return report
