"""What became faster or slower since another commit: `perf -- before --before DIRECTORY`.

Law: no process can hold two versions of the package, so each trial is one of its own.  It finds
the package of the checkout in DIRECTORY (`git worktree add`) or the installed one, and everything
else is the same: this file, Python, and the log or database that is read, which the other commit
has written.  Only what is public is used, as it has been in both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import trio
from apart import apart
from harness import Comparison, Contender, MiB, Setting, compare
from report import Report, number, table

import trio_wal

RECORDS: Final = 1_000_000
A_FRAME: Final = 1_000
TRANSACTIONS: Final = 100_000
TRANSACTIONS_AT_LENGTH: Final = 1_000_000
VALUE: Final = b"." * 100
KEYS: Final = 10_000
WARM_UP: Final = 0.3
NOW: Final = "now"
BEFORE: Final = "before"


def run(setting: Setting) -> Report:
    report = Report("before")
    if setting.before is None:
        report.notes.append("Not compared with another commit: no --before DIRECTORY.")
        return report
    seconds, rounds = (0.6, 5) if setting.brief else (2.0, 9)
    count = TRANSACTIONS if setting.brief else TRANSACTIONS_AT_LENGTH
    found: dict[str, Comparison] = {}
    with setting.scratch() as path:
        log, data = str(path / "log"), str(path / "db")
        apart(make_log, log, package=setting.before)
        apart(make_database, data, count, package=setting.before)
        found["read"] = _turns(setting, partial(read, log), rounds)
        found["batches"] = _turns(setting, partial(batches, log), rounds)
        found["replay"] = _turns(setting, partial(replay, data, count), rounds)
    for name, (trial, tasks) in LOADS.items():
        with setting.scratch() as path:
            found[name] = _turns(setting, partial(trial, tasks, seconds), rounds, path)
    made = table("Against the commit before (median)", ["", "before", "now"])
    for name, comparison in found.items():
        made.add_row(name, *(number(comparison.median(one)) for one in (BEFORE, NOW)))
        what, limit = REQUIRED[name]
        ratio = comparison.ratio(NOW, BEFORE)
        report.require(f"before: {name}", f"{what}, to before", limit, ratio, at_most=False)
    report.tables.append(made)
    report.data["before"] = found
    return report


def _turns(setting: Setting, trial: Any, rounds: int, scratch: Path | None = None) -> Comparison:
    """The trial with both packages; where it writes, in a directory for each."""

    def one(name: str) -> Mapping[str, float]:
        paths = [] if scratch is None else [str(scratch / name)]
        package = setting.before if name == BEFORE else None
        return apart(trial.func, *paths, *trial.args, package=package)

    return compare([Contender(name, partial(one, name)) for name in (BEFORE, NOW)], rounds)


# -- in the other process -------------------------------------------------------------------


def make_log(path: str) -> dict[str, float]:
    async def main() -> None:
        async with trio_wal.open_wal(path) as wal:
            for first in range(0, RECORDS, A_FRAME):
                unit = [n.to_bytes(100, "little") for n in range(first, first + A_FRAME)]
                await wal.append_many(unit)

    trio.run(main)
    return {}


def make_database(path: str, count: int) -> dict[str, float]:
    async def main() -> None:
        async with (
            trio_wal.open_database(path, durability="none", checkpoint_bytes=1 << 40) as db,
            trio.open_nursery() as nursery,
        ):

            async def some(task: int) -> None:
                for n in range(task, count, 100):
                    await db.put(b"%08d" % n, VALUE)

            for task in range(100):
                nursery.start_soon(some, task)

    trio.run(main)
    return {}


def _reading(path: str, together: bool) -> dict[str, float]:
    async def main() -> float:
        async with trio_wal.open_wal(path) as wal, wal.read() as records:
            count = 0
            started = perf_counter()
            # What could not be read together was read one by one.
            if together and hasattr(records, "batches"):
                async for batch in records.batches():
                    count += len(batch)
            else:
                async for _ in records:
                    count += 1
            assert count == RECORDS
            return RECORDS / (perf_counter() - started)

    return {"per second": trio.run(main)}


def read(path: str) -> dict[str, float]:
    return _reading(path, together=False)


def batches(path: str) -> dict[str, float]:
    return _reading(path, together=True)


def replay(path: str, count: int) -> dict[str, float]:
    async def main() -> float:
        # What is imported when a database is opened for the first time is not what is timed.
        with tempfile.TemporaryDirectory(prefix="trio-wal-perf-") as empty:
            async with trio_wal.open_database(empty):
                pass
        started = perf_counter()
        async with trio_wal.open_database(path, checkpoint_bytes=1 << 40) as db:
            assert db.recovery.transactions_replayed == count
            return count / (perf_counter() - started)

    return {"per second": trio.run(main)}


async def _rate(tasks: int, seconds: float, step: Callable[[int], Any]) -> dict[str, float]:
    done = 0
    counts_from = perf_counter() + WARM_UP
    until = counts_from + seconds

    async def worker(task: int) -> None:
        nonlocal done
        while (now := perf_counter()) < until:
            await step(task)
            done += now >= counts_from

    async with trio.open_nursery() as nursery:
        for task in range(tasks):
            nursery.start_soon(worker, task)
    return {"per second": done / seconds}


def append(path: str, tasks: int, seconds: float) -> dict[str, float]:
    async def main() -> dict[str, float]:
        async with trio_wal.open_wal(path, retention=trio_wal.KeepBytes(64 * MiB)) as wal:
            return await _rate(tasks, seconds, lambda _: wal.append(VALUE))

    return trio.run(main)


def block(path: str, tasks: int, seconds: float) -> dict[str, float]:
    async def main() -> dict[str, float]:
        async with trio_wal.open_database(path) as db:

            async def step(task: int) -> None:
                async with db.transaction() as tx:
                    tx.put(b"%d" % task, VALUE)

            return await _rate(tasks, seconds, step)

    return trio.run(main)


def get(path: str, tasks: int, seconds: float) -> dict[str, float]:
    async def main() -> dict[str, float]:
        async with trio_wal.open_database(path) as db:
            async with db.transaction() as tx:
                for n in range(KEYS):
                    tx.put(b"%08d" % n, VALUE)
            keys = [b"%08d" % n for n in range(KEYS)]
            count = 0
            started = perf_counter()
            while perf_counter() - started < seconds:
                for key in keys:
                    db.get(key)
                count += KEYS
            return {"per second": count / (perf_counter() - started)}

    return trio.run(main)


LOADS: Final[Mapping[str, tuple[Callable[..., dict[str, float]], int]]] = {
    "append, 128 tasks": (append, 128),
    "append, 1,024 tasks": (append, 1024),
    "block, 128 tasks": (block, 128),
    "get": (get, 1),
}
REQUIRED: Final = {
    "read": ("read of 1 M records of 100 bytes, 1,000 a frame, one by one", 2.0),
    "batches": ("the same in batches", 4.0),
    "replay": ("replay of single-put transactions", 2.0),
    "append, 128 tasks": ("appends/s of 128 tasks", 0.98),
    "append, 1,024 tasks": ("appends/s of 1,024 tasks", 0.98),
    "block, 128 tasks": ("transaction blocks/s of 128 tasks", 0.98),
    "get": ("get", 0.98),
}
