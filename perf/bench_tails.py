"""The slow ones: latency of commits while something else goes on, and what stalls the event loop.

Law: one program a scenario, the same tasks in a closed loop; only what goes on beside them
differs.  A ticking task asks for every millisecond; by how much it comes late is what the
program could not do anything else: with work to do, a loop is late by a batch of wake-ups.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

import attrs
import load
import trio
from harness import MiB, Setting, Spread, percentile
from report import Report, Requirement, table

import trio_wal

TASKS: Final = 128
TICK_SECONDS: Final = 0.001
VALUE: Final = b"." * 100

Commit = Callable[[int, int], Awaitable[object]]
"""``await commit(task, turn)``."""
Beside = Callable[[], Awaitable[None]]
"""What goes on meanwhile, over and over."""


@attrs.define
class Tail:
    """What one trial found."""

    median: float
    p99: float
    slowest: float
    late_p99: float
    latest: float
    cpu: float
    """Seconds of CPU for a million commits."""
    commits: int


async def _measure(seconds: float, commit: Commit, beside: Beside | None) -> Tail:
    taken: list[float] = []
    late: list[float] = []
    counts_from = perf_counter() + load.WARM_UP_SECONDS
    until = counts_from + seconds

    async def worker(task: int) -> None:
        turn = 0
        while (start := perf_counter()) < until:
            await commit(task, turn)
            turn += 1
            if start >= counts_from:
                taken.append(perf_counter() - start)

    async def tick() -> None:
        while (start := perf_counter()) < until:
            await trio.sleep(TICK_SECONDS)
            if start >= counts_from:
                late.append(perf_counter() - start - TICK_SECONDS)

    async def again_and_again(what: Beside) -> None:
        while perf_counter() < until:
            await what()

    # What the benchmark itself keeps is not what the collector should walk through.
    gc.collect()
    gc.freeze()
    try:
        cpu = process_time()
        async with trio.open_nursery() as others:
            if beside is not None:
                others.start_soon(again_and_again, beside)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tick)
                for task in range(TASKS):
                    nursery.start_soon(worker, task)
            others.cancel_scope.cancel()
        cpu = process_time() - cpu
    finally:
        gc.unfreeze()
    taken.sort()
    late.sort()
    return Tail(
        statistics.median(taken),
        percentile(taken, 0.99),
        taken[-1],
        percentile(late, 0.99),
        late[-1],
        cpu / len(taken) * 1e6,
        len(taken),
    )


# -- scenarios --------------------------------------------------------------------


async def _log(path: Path, seconds: float, scenario: str) -> Tail:
    retention = trio_wal.KeepBytes(64 * MiB) if scenario == "rotation, retention" else None
    size = 1 * MiB if scenario.startswith("rotation") else 64 * MiB
    async with trio_wal.open_wal(path, segment_size=size, retention=retention) as wal:

        async def follow() -> None:
            async with wal.follow(max(wal.first_lsn, wal.durable_lsn - 1000)) as records:
                async for _ in records:
                    pass

        async def read() -> None:
            async with wal.read() as records:
                async for _ in records:
                    pass

        async def verify() -> None:
            command = [sys.executable, "-m", "trio_wal", "verify", str(path), "--json"]
            await trio.run_process(command, stdout=subprocess.DEVNULL, check=False)

        beside = {"a follower": follow, "a reader": read, "verify": verify}.get(scenario)

        async def commit(_task: int, _turn: int) -> None:
            await wal.append(load.RECORD)

        return await _measure(seconds, commit, beside)


async def _database(path: Path, seconds: float, scenario: str) -> Tail:
    checkpoint_bytes = (2 if scenario == "checkpoints" else 1 << 20) * MiB
    async with trio_wal.open_database(path, checkpoint_bytes=checkpoint_bytes) as db:
        for first in range(0, 20_000, 1000):
            async with db.transaction() as tx:
                for place in range(first, first + 1000):
                    tx.put(b"%08d" % place, bytes(1000))
        if scenario != "a checkpoint of 20 MB":
            await db.checkpoint()

        async def scan() -> None:
            for number, _ in enumerate(db.scan()):
                if number % 100 == 0:
                    await trio.lowlevel.checkpoint()

        async def checkpoint() -> None:
            await db.checkpoint()
            await trio.sleep_forever()

        beside = {"a scan": scan, "a checkpoint of 20 MB": checkpoint}.get(scenario)
        keys = [[b"%03d-%04d" % (task, turn) for turn in range(100)] for task in range(TASKS)]

        async def commit(task: int, turn: int) -> None:
            await db.put(keys[task][turn % 100], VALUE)

        return await _measure(seconds, commit, beside)


LOGS: Final = ("nothing else", "rotation", "rotation, retention", "a follower", "a reader",
               "verify")  # fmt: skip
DATABASES: Final = ("nothing else", "checkpoints", "a checkpoint of 20 MB", "a scan")


def run(setting: Setting) -> Report:
    report = Report("tails")
    shown = table(
        f"Commits of {TASKS} tasks (median of the trials), and how late a task is that wants "
        "every millisecond",
        ["beside", "median ms", "p99 ms", "slowest ms", "p99 : median", "slowest : median",
         "late p99 ms", "latest ms", "CPU s a million"],
    )  # fmt: skip
    rounds, seconds = (3, 0.6) if setting.brief else (7, 2.0)
    found: dict[str, list[Tail]] = {}
    for number in range(rounds):
        scenarios = [(_log, "append", name) for name in LOGS]
        scenarios += [(_database, "put", name) for name in DATABASES]
        for kind, what, name in scenarios if number % 2 == 0 else reversed(scenarios):
            with setting.scratch() as directory:
                if kind is _log:
                    load.age(directory / "it", [load.RECORD] * TASKS)
                tail = trio.run(kind, directory / "it", seconds, name)
            found.setdefault(f"{what}: {name}", []).append(tail)
    for _, what, name in [(None, "append", n) for n in LOGS] + [
        (None, "put", n) for n in DATABASES
    ]:
        _row(shown, f"{what}: {name}", found[f"{what}: {name}"])
    report.tables.append(shown)
    report.data["tails"] = {
        name: {
            field.name: Spread.of([getattr(tail, field.name) for tail in tails])
            for field in attrs.fields(Tail)
        }
        for name, tails in found.items()
    }
    _require(report, found)
    return report


def _row(shown: Any, name: str, tails: list[Tail]) -> None:
    def median(figure: Callable[[Tail], float]) -> float:
        return statistics.median(map(figure, tails))

    shown.add_row(
        name,
        f"{median(lambda t: t.median) * 1e3:.2f}",
        f"{median(lambda t: t.p99) * 1e3:.2f}",
        f"{median(lambda t: t.slowest) * 1e3:.2f}",
        f"{median(lambda t: t.p99 / t.median):.1f}",
        f"{median(lambda t: t.slowest / t.median):.1f}",
        f"{median(lambda t: t.late_p99) * 1e3:.2f}",
        f"{median(lambda t: t.latest) * 1e3:.2f}",
        f"{median(lambda t: t.cpu):.1f}",
    )


def _require(report: Report, found: dict[str, list[Tail]]) -> None:
    def require(key: str, what: str, limit: float, values: list[float], unit: str) -> None:
        needed = f"at most {limit:g} {'×' if unit == 'x' else unit}"
        report.requirements.append(
            Requirement(key, what, needed, limit, Spread.of(values), unit=unit, at_most=True)
        )

    steady = found["append: nothing else"]
    require(
        "append p99 to median",
        f"append, {TASKS} tasks, nothing else: p99 to median",
        2.5,
        [tail.p99 / tail.median for tail in steady],
        "x",
    )
    beside = list(zip(found["append: a reader"], steady, strict=True))
    require(
        "p99 beside a reader",
        f"append, {TASKS} tasks, beside a reader at full speed: p99 to undisturbed",
        3.0,
        [reader.p99 / alone.p99 for reader, alone in beside],
        "x",
    )
    report.require(
        "commits beside a reader",
        "the same: commits, to undisturbed",
        0.5,
        Spread.of([reader.commits / alone.commits for reader, alone in beside]),
        at_most=False,
    )
    for name, what in (
        ("append: rotation", "slowest append to median, a segment of 1 MiB after the other"),
        ("put: a checkpoint of 20 MB", "slowest put to median, while 20 MB are checkpointed"),
        ("put: checkpoints", "slowest put to median, a checkpoint every 2 MiB"),
    ):
        values = [tail.slowest / tail.median for tail in found[name]]
        require(f"slowest, {name}", what, 20.0, values, "x")
    worst = max(found, key=lambda name: statistics.median(t.latest for t in found[name]))
    require(
        "event loop late",
        f"event loop: latest tick ({worst})",
        5.0,
        [tail.latest * 1e3 for tail in found[worst]],
        "ms",
    )
