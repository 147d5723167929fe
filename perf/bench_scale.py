"""How cost grows with size: tasks, keys, bytes of log, records in one unit, deleted keys.

Law: one kind of thing grows and everything else stays as it is.  What can be repeated is
measured in turns (`harness.compare`), in a process of its own where memory counts; what
takes minutes is built once, and then looked at several times.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import shutil
import statistics
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import job_queue
import load
import trio
import trio.testing
from apart import Stall, apart, forget_peak, memory
from harness import Contender, ForeignLoad, Setting, Spread, compare, percentile
from report import Report, Requirement, number, table

import trio_wal

MB: Final = 1_000_000
GB: Final = 1_000 * MB


def run(setting: Setting) -> Report:
    report = Report("scale")
    _tasks(setting, report)
    _keys(setting, report)
    _logs(setting, report)
    _units(setting, report)
    job_queue.run(setting, report)
    return report


# -- tasks that commit ------------------------------------------------------------

TASKS: Final = (1_000, 10_000)
TASKS_AT_LENGTH: Final = (1_000, 10_000, 100_000)
ROUNDS: Final = 2
"""A trial lasts until so many commits a task were made, however long that takes."""
APPEND: Final = "append"
PUT: Final = "put"
CEILING: Final = "ceiling"
KINDS: Final = {APPEND: "log, append", PUT: "database, put", CEILING: "tasks alone"}
"""The last: tasks that only park and are woken, by trio itself."""


def _tasks(setting: Setting, report: Report) -> None:
    sizes = TASKS if setting.brief else TASKS_AT_LENGTH
    seconds = 1.0 if setting.brief else 4.0
    trials: dict[str, list[dict[str, float]]] = {}
    for some, rounds in ((sizes[:-1], 3), (sizes[-1:], 3 if setting.brief else 1)):
        with setting.scratch() as directory:
            contenders = [
                Contender(
                    f"{kind}, {tasks}",
                    partial(_commits_in, directory / "it", kind, tasks, seconds),
                )
                for tasks in some
                for kind in KINDS
            ]
            trials |= compare(contenders, rounds).trials
    made = table(
        "Tasks in a closed loop, each commit durable (median)",
        ["", "tasks", "commits/s", "µs a commit", "p50 ms", "p99 ms", "bytes a waiting task"],
    )
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for kind, what in KINDS.items():
        for tasks in sizes:
            name = f"{kind}, {tasks}"
            figures = {
                figure: Spread.of([trial[figure] for trial in trials[name]])
                for figure in trials[name][0]
            }
            rate = figures["per second"].median
            made.add_row(
                what,
                f"{tasks:,}",
                number(rate),
                f"{1e6 / rate:.2f}",
                *(
                    f"{figures[share].median:.1f}" if share in figures else ""
                    for share in ("p50 ms", "p99 ms")
                ),
                number(figures["bytes a task"].median),
            )
            rows[kind].append({"tasks": tasks, **figures})
    report.tables.append(made)
    report.notes.append(
        "A waiting task is measured while the disk stalls: its record and its key are not "
        "counted, the task is."
    )
    report.data["tasks"] = rows


def _commits_in(path: Path, kind: str, tasks: int, seconds: float) -> dict[str, float]:
    """A trial in a process of its own; its files are gone before the next one's turn."""
    try:
        return apart(commits, str(path), kind, tasks, seconds)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.sync()


def commits(path: str, kind: str, tasks: int, seconds: float) -> dict[str, float]:
    """The commits of so many tasks, and what one that waits weighs."""
    if kind == CEILING:
        size = trio.run(_sleepers, tasks)
        return {**load.ceiling(tasks, seconds), "bytes a task": size}
    return trio.run(_appends if kind == APPEND else _puts, path, tasks, seconds)


async def _sleepers(tasks: int) -> float:
    async with trio.open_nursery() as nursery:
        before = _settled()
        for _ in range(tasks):
            nursery.start_soon(trio.sleep_forever)
        await trio.testing.wait_all_tasks_blocked()
        grown = memory("VmRSS") - before
        nursery.cancel_scope.cancel()
    return grown / tasks


def _settled() -> int:
    gc.collect()
    return memory("VmRSS")


async def _appends(path: str, tasks: int, seconds: float) -> dict[str, float]:
    records = [task.to_bytes(len(load.RECORD), "little") for task in range(tasks)]
    async with trio_wal.open_wal(path) as wal:
        return await _loop(lambda task: wal.append(records[task]), tasks, seconds)


async def _puts(path: str, tasks: int, seconds: float) -> dict[str, float]:
    keys = [b"%08d" % task for task in range(tasks)]
    async with trio_wal.open_database(path) as db:
        return await _loop(lambda task: db.put(keys[task], load.RECORD), tasks, seconds)


async def _loop(
    commit: Callable[[int], Awaitable[object]], tasks: int, seconds: float
) -> dict[str, float]:
    stall = Stall()
    await commit(0)
    async with trio.open_nursery() as nursery:
        before = _settled()
        with stall():
            for task in range(tasks):
                nursery.start_soon(commit, task)
            await trio.testing.wait_all_tasks_blocked()
            grown = memory("VmRSS") - before
    taken: list[float] = []
    came_round = done = 0
    counts_from = math.inf
    closed = 0.0

    async def worker(task: int) -> None:
        nonlocal came_round, done, counts_from, closed
        end = perf_counter()
        for turn in itertools.count():
            start = end
            await commit(task)
            end = perf_counter()
            if closed:
                return
            if end - counts_from >= seconds and done >= ROUNDS * tasks:
                # As the window opened at an acknowledgement, so it closes.
                closed = end
                return
            done += end > counts_from
            if start >= counts_from:
                taken.append(end - start)
            if turn == 0:
                came_round += 1
                if came_round == tasks:
                    counts_from = end

    async with trio.open_nursery() as nursery:
        for task in range(tasks):
            nursery.start_soon(worker, task)
    taken.sort()
    return {
        "per second": done / (closed - counts_from),
        "p50 ms": percentile(taken, 0.5) * 1e3,
        "p99 ms": percentile(taken, 0.99) * 1e3,
        "bytes a task": grown / tasks,
    }


# -- keys in the database ---------------------------------------------------------

KEYS: Final = (10_000, 100_000)
KEYS_AT_LENGTH: Final = (10_000, 100_000, 1_000_000, 10_000_000)
VALUE_BYTES: Final = (16, 100)
KEYS_A_TRANSACTION: Final = 10_000
SHUFFLED_MAX: Final = 1_000_000
"""So many are also loaded in no order: of more, each checkpoint writes most of the tree again,
and that takes many minutes."""
READS: Final = 20_000
SCANNED_MAX: Final = 1_000_000
PUT_TASKS: Final = 128
PUT_KEYS: Final = 500_000
"""Existing keys, drawn by lot, that are put again and again."""
OPENS: Final = 5


def _key(place: int) -> bytes:
    return b"%016d" % place


def _value(place: int) -> bytes:
    least, most = VALUE_BYTES
    return b"%016d" % place + bytes(place % (most + 1 - least))


def _keys(setting: Setting, report: Report) -> None:
    made = table(
        f"Keys in the database, values of {VALUE_BYTES[0]} to {VALUE_BYTES[1]} bytes, loaded in "
        f"their order by transactions of {KEYS_A_TRANSACTION:,} (median of several passes)",
        ["keys", "loaded/s", "in no order", "open ms", "get µs", "scan µs",
         f"puts/s, {PUT_TASKS} tasks", "own memory MB", "LMDB's pages MB", "its file MB"],
    )  # fmt: skip
    rows = []
    for keys in KEYS if setting.brief else KEYS_AT_LENGTH:
        watch = ForeignLoad()
        with setting.scratch() as directory:
            path = str(directory / "db")
            loaded = apart(load_keys, path, keys, False)
            # In another process: what loading needed is not what using needs.
            used = apart(use_keys, path, keys, 0.5 if setting.brief else 10.0)
        shuffled = None
        if keys <= SHUFFLED_MAX:
            with setting.scratch() as directory:
                shuffled = apart(load_keys, str(directory / "db"), keys, True)
        row = {
            "keys": keys,
            **loaded,
            **used,
            "shuffled": shuffled,
            "foreign cores": watch.cores(),
        }
        rows.append(row)
        made.add_row(
            f"{keys:,}",
            number(row["loaded per second"]),
            "" if shuffled is None else number(shuffled["loaded per second"]),
            f"{statistics.median(row['open ms']):.1f}",
            f"{statistics.median(row['get us']):.2f}",
            f"{row['scan us']:.2f}",
            number(row["puts per second"]),
            number(row["RssAnon"] / MB),
            number(row["RssFile"] / MB),
            number(row["store bytes"] / MB),
        )
    report.tables.append(made)
    report.notes.append(
        f"Loading peaked at {max(row['load peak'] for row in rows) / MB:,.0f} MB of own memory. "
        "The keys were checkpointed, and are resident when they are read. The puts are of keys "
        "that are there, and their checkpoint is part of the time."
    )
    report.data["keys"] = rows


def load_keys(path: str, keys: int, shuffled: bool) -> dict[str, Any]:
    places: Sequence[int] = range(keys)
    if shuffled:
        places = random.Random(keys).sample(places, keys)

    async def main() -> dict[str, Any]:
        peak = 0
        async with trio_wal.open_database(path) as db:
            start = perf_counter()
            for first in range(0, keys, KEYS_A_TRANSACTION):
                async with db.transaction() as tx:
                    for place in places[first : first + KEYS_A_TRANSACTION]:
                        tx.put(_key(place), _value(place))
                peak = max(peak, memory("RssAnon"))
            await db.checkpoint()
            seconds = perf_counter() - start
            store_bytes = db.statistics().store_bytes
        return {
            "loaded per second": keys / seconds,
            "load seconds": seconds,
            "load peak": peak,
            "store bytes": store_bytes,
        }

    return trio.run(main)


def use_keys(path: str, keys: int, seconds: float) -> dict[str, Any]:
    chosen = random.Random(keys)
    places = [chosen.randrange(keys) for _ in range(READS)]
    wanted = [_key(place) for place in places]
    opens: list[float] = []
    gets: list[float] = []
    found: dict[str, Any] = {"open ms": opens, "get us": gets}

    async def opening() -> None:
        start = perf_counter()
        async with trio_wal.open_database(path):
            opens.append((perf_counter() - start) * 1e3)

    async def using() -> None:
        async with trio_wal.open_database(path) as db:
            assert all(
                db.get(key) == _value(place) for key, place in zip(wanted, places, strict=True)
            )
            get = db.get
            for _ in range(5):
                start = perf_counter()
                for key in wanted:
                    get(key)
                gets.append((perf_counter() - start) / READS * 1e6)
            start = perf_counter()
            scanned = sum(1 for _ in db.scan(limit=SCANNED_MAX))
            found["scan us"] = (perf_counter() - start) / scanned * 1e6
            assert scanned == min(keys, SCANNED_MAX)
            gc.collect()
            for name in ("RssAnon", "RssFile"):
                found[name] = memory(name)
            turns = [_key(chosen.randrange(keys)) for _ in range(min(keys, PUT_KEYS))]
            found["puts per second"] = await _put_rate(db, itertools.cycle(turns), seconds)
            found["checkpoints"] = db.statistics().checkpoints

    for _ in range(OPENS):
        trio.run(opening)
    trio.run(using)
    return found


async def _put_rate(db: trio_wal.Database, keys: Iterator[bytes], seconds: float) -> float:
    """Of existing keys, and including the time in which they are moved into the store."""
    done = 0
    closed = False

    async def worker() -> None:
        nonlocal done
        while not closed:
            await db.put(next(keys), load.RECORD)
            done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(PUT_TASKS):
            nursery.start_soon(worker)
        await trio.sleep(load.WARM_UP_SECONDS)
        before, start = done, perf_counter()
        await trio.sleep(seconds)
        # Some are in the store by now; this makes it all of them, while others are put.
        await db.checkpoint()
        rate = (done - before) / (perf_counter() - start)
        closed = True
    return rate


# -- bytes of log -----------------------------------------------------------------

LOG_BYTES: Final = (20 * MB, 200 * MB)
LOG_BYTES_AT_LENGTH: Final = (20 * MB, 200 * MB, 2 * GB, 20 * GB)
ROOM: Final = 1.25
"""Bytes free on the disk for a byte of log, or it is left out."""
UNIT_RECORDS: Final = 1_000
UNIT_RECORD_BYTES: Final = 1_000
ENDS: Final = 8
END_STEP_BYTES: Final = 8 * MB
"""A log is opened at this many ends so far apart: together, a full-size segment.  How much of a
log is checked on opening depends on where in a segment it ends."""
LOG_OPENS: Final = 5
MIDDLE_RECORDS: Final = 1_000
OPEN_MS_MAX: Final = 50.0


def _logs(setting: Setting, report: Report) -> None:
    made = table(
        f"Opening logs closed in order, at {ENDS} ends each: ms (median at the best end, at the "
        "worst end, slowest of all)",
        ["log", "built MB/s", "segments", "warm", "cold", "MB checked at the worst end"],
    )  # fmt: skip
    more = table(
        f"The same logs: {MIDDLE_RECORDS:,} records from the middle, and dropping what is before",
        ["log", "read, warm ms", "cold ms", "truncate_before ms", "segments dropped", "close ms"],
    )
    rows: list[dict[str, Any]] = []
    for size in LOG_BYTES if setting.brief else LOG_BYTES_AT_LENGTH:
        free = shutil.disk_usage(setting.directory).free
        if free < size * ROOM:
            report.notes.append(
                f"A log of {_bytes(size)} was left out: there are {_bytes(free)} free, and it "
                f"should be {_bytes(size * ROOM)}."
            )
            continue
        with setting.scratch() as directory:
            row = _log_of(directory / "log", size)
        rows.append(row)
        made.add_row(
            _bytes(size),
            number(row["built MB per second"]),
            str(row["segments"]),
            *(_best_worst_slowest(row, how) for how in ("warm", "cold")),
            number(_worst_end(row)["checked bytes"] / MB),
        )
        more.add_row(
            _bytes(size),
            f"{statistics.median(row['read warm ms']):.1f}",
            f"{row['read cold ms']:.1f}",
            f"{row['truncate ms']:.1f}",
            str(row["segments dropped"]),
            f"{statistics.median(row['close ms']):.1f}",
        )
    report.tables += [made, more]
    report.notes.append(
        "Warm: in the page cache, but for the last two segments, which opening reads from the "
        "disk. Cold: none of its files is in the page cache."
    )
    report.data["logs"] = rows
    if rows:
        _require_open(rows[-1], report)


def _require_open(row: dict[str, Any], report: Report) -> None:
    """Of the largest log that was built, at the end where opening takes longest."""
    worst = _worst_end(row)
    report.requirements.append(
        Requirement(
            "open a large log",
            f"opening a log of {_bytes(row['bytes'])} closed in order, at the worst of {ENDS} ends",
            f"at most {OPEN_MS_MAX:g} ms",
            OPEN_MS_MAX,
            Spread.of(worst["warm ms"]),
            unit="ms",
            at_most=True,
        )
    )


def _bytes(size: float) -> str:
    return f"{size / GB:.3g} GB" if size >= GB else f"{size / MB:.0f} MB"


def by_end(row: dict[str, Any], how: str) -> list[dict[str, float]]:
    """Median and slowest opening at each end, the best end first."""
    ends = [
        {"median": statistics.median(end[f"{how} ms"]), "slowest": max(end[f"{how} ms"])}
        for end in row["ends"]
    ]
    return sorted(ends, key=lambda end: end["median"])


def _best_worst_slowest(row: dict[str, Any], how: str) -> str:
    ends = by_end(row, how)
    slowest = max(end["slowest"] for end in ends)
    return f"{ends[0]['median']:.1f}, {ends[-1]['median']:.1f}, {slowest:.1f}"


def _worst_end(row: dict[str, Any]) -> dict[str, Any]:
    ends: list[dict[str, Any]] = row["ends"]
    return max(ends, key=lambda end: statistics.median(end["warm ms"]))


def _log_of(path: Path, size: int) -> dict[str, Any]:
    watch = ForeignLoad()
    unit = UNIT_RECORDS * UNIT_RECORD_BYTES
    step = min(END_STEP_BYTES, size // ENDS // unit * unit)
    start = perf_counter()
    trio.run(_grow, path, size - ENDS * step)
    row: dict[str, Any] = {"bytes": size, "close ms": [], "ends": []}
    row["built MB per second"] = (size - ENDS * step) / (perf_counter() - start) / MB
    for _ in range(ENDS):
        trio.run(_grow, path, step)
        end: dict[str, Any] = {"warm ms": [], "cold ms": []}
        for _ in range(LOG_OPENS):
            report = trio.run(_open, path, end["warm ms"], row["close ms"])
        for _ in range(LOG_OPENS):
            _forget(path)
            trio.run(_open, path, end["cold ms"], row["close ms"])
        assert report.clean_shutdown
        row["ends"].append({**end, "checked bytes": report.bytes_scanned})
    assert report.last_lsn * UNIT_RECORD_BYTES == size
    row["segments"] = report.segments
    _forget(path)
    trio.run(_use, path, row)
    return {**row, "foreign cores": watch.cores()}


async def _grow(path: Path, size: int) -> None:
    async with trio_wal.open_wal(path, durability="none") as wal:
        first = wal.last_lsn
        while (wal.last_lsn - first) * UNIT_RECORD_BYTES < size:
            numbers = range(wal.last_lsn, wal.last_lsn + UNIT_RECORDS)
            await wal.append_many([n.to_bytes(UNIT_RECORD_BYTES, "little") for n in numbers])


async def _open(path: Path, opens: list[float], closes: list[float]) -> trio_wal.RecoveryReport:
    start = perf_counter()
    async with trio_wal.open_wal(path) as wal:
        opens.append((perf_counter() - start) * 1e3)
        report = wal.recovery
        start = perf_counter()
    closes.append((perf_counter() - start) * 1e3)
    return report


def _forget(path: Path) -> None:
    """Take the log's files out of the page cache; what is not yet on the disk would stay."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


async def _use(path: Path, row: dict[str, Any]) -> None:
    async with trio_wal.open_wal(path) as wal:
        middle = wal.last_lsn // 2 + 1
        row["read cold ms"] = await _read(wal, middle)
        row["read warm ms"] = [await _read(wal, middle) for _ in range(LOG_OPENS)]
        segments = wal.statistics().segments
        start = perf_counter()
        await wal.truncate_before(middle)
        row["truncate ms"] = (perf_counter() - start) * 1e3
        row["segments dropped"] = segments - wal.statistics().segments
        assert wal.first_lsn <= middle


async def _read(wal: trio_wal.WriteAheadLog, first: int) -> float:
    start = perf_counter()
    expected = first
    async with wal.read(first, first + MIDDLE_RECORDS) as records:
        async for record in records:
            assert record.data == (expected - 1).to_bytes(UNIT_RECORD_BYTES, "little")
            expected += 1
    assert expected == first + MIDDLE_RECORDS
    return (perf_counter() - start) * 1e3


# -- records in one unit ----------------------------------------------------------

UNITS: Final = (10_000, 100_000, 1_000_000)


def _units(setting: Setting, report: Report) -> None:
    with setting.scratch() as directory:
        found = compare(
            [
                Contender(f"{records}", partial(_unit_in, directory / "log", records))
                for records in UNITS
            ],
            3 if setting.brief else 7,
        )
    made = table(
        f"append_many, one call, records of {len(load.RECORD)} bytes (median)",
        ["records", "records/s", "ms", "payload MB", "growth at its peak MB", "bytes a record"],
    )
    rows = []
    for records in UNITS:
        rate, growth = (found.spread(f"{records}", name) for name in ("per second", "growth"))
        made.add_row(
            f"{records:,}",
            number(rate.median),
            f"{records / rate.median * 1e3:.1f}",
            number(records * len(load.RECORD) / MB),
            number(growth.median / MB),
            number(growth.median / records),
        )
        rows.append({"records": records, "per second": rate, "growth": growth})
    report.tables.append(made)
    report.notes.append("The growth is beside the records themselves, which were there before.")
    report.data["units"] = rows


def _unit_in(path: Path, records: int) -> dict[str, float]:
    try:
        return apart(unit, str(path), records)
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.sync()


def unit(path: str, records: int) -> dict[str, float]:
    async def main() -> dict[str, float]:
        data = [number.to_bytes(len(load.RECORD), "little") for number in range(records)]
        async with trio_wal.open_wal(path) as wal:
            await wal.append_many(data[:1000])
            before = _settled()
            forget_peak()
            start = perf_counter()
            lsns = await wal.append_many(data)
            seconds = perf_counter() - start
            assert len(lsns) == records
            assert wal.durable_lsn == lsns[-1]
            return {"per second": records / seconds, "growth": memory("VmHWM") - before}

    return trio.run(main)
