"""A queue of jobs in the database: what deleted keys cost whoever asks for the first key.

Law: as in `bench_scale`, whose part this is.  A queue puts keys at one end and deletes them
at the other, for ever; so nearly every key that was ever there is deleted.
"""

from __future__ import annotations

import itertools
import random
import sqlite3
import statistics
from collections.abc import Awaitable, Callable
from functools import partial
from time import perf_counter, process_time
from typing import Any, Final

import load
import trio
import trio.testing
from apart import apart
from harness import Setting, Spread
from report import Report, Requirement, number, table

import trio_wal

DELETED: Final = 100_000
DELETED_AT_LENGTH: Final = 1_000_000
KEYS_A_TRANSACTION: Final = 1_000
LOOKS: Final = 201
RATIO_MAX: Final = 100.0
"""What a scan may cost, in scans of an empty database."""
WORKERS: Final = 8
BACKLOG: Final = 100
"""Jobs that are ready all the time."""
SLICE_SECONDS: Final = 5.0
SECONDS: Final = 30.0
SECONDS_AT_LENGTH: Final = 600.0
LAST_TO_FIRST_MIN: Final = 0.9
OURS: Final = "trio-wal"
SQLITE: Final = "sqlite3 in a thread"
MOMENTS: Final = ("never checkpointed", "being checkpointed", "checkpointed")
READERS: Final = ("db.scan", "snapshot", "transaction", "older snapshot")


def run(setting: Setting, report: Report) -> None:
    _heads(setting, report)
    _jobs(setting, report)


def _job(place: int) -> bytes:
    return b"job:%012d" % place


# -- the first key, behind deleted ones -------------------------------------------


def _heads(setting: Setting, report: Report) -> None:
    deleted = DELETED if setting.brief else DELETED_AT_LENGTH
    made = table(
        f"scan(limit=1) after {deleted:,} keys were deleted: µs (times an empty database's)",
        ["deleted keys", "in what order", "when", *READERS],
    )
    rows: list[dict[str, Any]] = []
    for stored, shuffled in itertools.product((False, True), (False, True)):
        with setting.scratch() as directory:
            found = apart(heads, str(directory / "db"), deleted, stored, shuffled)
        rows.append({"stored": stored, "shuffled": shuffled, **found})
        for moment in MOMENTS:
            made.add_row(
                "had been in the store" if stored else "never stored",
                "shuffled" if shuffled else "theirs",
                moment,
                *(
                    f"{found[moment][reader]:.1f} ({times(found, moment, reader):.1f})"
                    for reader in READERS
                ),
            )
    report.tables.append(made)
    report.notes.append(
        "Median of the first key and of the last; the older snapshot was taken when half of "
        "the keys were deleted, and sees the others."
    )
    report.data["heads"] = rows
    report.requirements.append(
        Requirement(
            "the first key behind deleted ones",
            f"scan(limit=1) after {deleted:,} deletions, in empty databases' scans, at its worst",
            f"at most {RATIO_MAX:g}",
            RATIO_MAX,
            Spread.of([max(times(r, m, reader) for m in MOMENTS for reader in READERS)
                       for r in rows]),
            unit="x",
            at_most=True,
        )
    )  # fmt: skip


def times(row: dict[str, Any], moment: str, reader: str) -> float:
    time: float = row[moment][reader]
    return time / float(row["empty"][reader])


def heads(path: str, deleted: int, stored: bool, shuffled: bool) -> dict[str, Any]:
    return trio.run(_head_times, path, deleted, stored, shuffled)


async def _head_times(path: str, deleted: int, stored: bool, shuffled: bool) -> dict[str, Any]:
    places = list(range(deleted))
    lots = random.Random(deleted)
    found: dict[str, Any] = {}

    async def change(places: list[int], value: bytes | None) -> None:
        for first in range(0, len(places), KEYS_A_TRANSACTION):
            async with db.transaction() as tx:
                for place in places[first : first + KEYS_A_TRANSACTION]:
                    if value is None:
                        tx.delete(_job(place))
                    else:
                        tx.put(_job(place), value)

    # No checkpoint by itself, and room for one of this size.
    async with trio_wal.open_database(path, checkpoint_bytes=1 << 40, map_size=1 << 33) as db:
        with db.snapshot() as none:
            found["empty"] = await _look(db, none)
        if shuffled:
            lots.shuffle(places)
        await change(places, b"")
        if stored:
            await db.checkpoint()
        if shuffled:
            lots.shuffle(places)
        await change(places[: deleted // 2], None)
        # What a large transaction deleted is dealt with bit by bit, in the moments after it.
        await trio.testing.wait_all_tasks_blocked()
        with db.snapshot() as older:
            await change(places[deleted // 2 :], None)
            await trio.testing.wait_all_tasks_blocked()
            found[MOMENTS[0]] = await _look(db, older)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(db.checkpoint)
                await trio.sleep(0.001)
                found[MOMENTS[1]] = await _look(db, older)
            found[MOMENTS[2]] = await _look(db, older)
    return found


async def _look(db: trio_wal.Database, older: trio_wal.Snapshot) -> dict[str, float]:
    """Microseconds, of each way to ask."""
    with db.snapshot() as snapshot:
        async with db.transaction() as tx:
            scans: list[Callable[..., Any]] = [db.scan, snapshot.scan, tx.scan, older.scan]
            return {
                reader: statistics.median(
                    _timed(scan, bool(turn % 2)) for turn in range(LOOKS)
                )
                for reader, scan in zip(READERS, scans, strict=True)
            }  # fmt: skip


def _timed(scan: Callable[..., Any], reverse: bool) -> float:
    start = perf_counter()
    for _ in scan(prefix=b"job:", limit=1, reverse=reverse):
        pass
    return (perf_counter() - start) * 1e6


# -- jobs per second, for minutes -------------------------------------------------


def _jobs(setting: Setting, report: Report) -> None:
    seconds = SECONDS if setting.brief else SECONDS_AT_LENGTH
    made = table(
        f"A queue of jobs, {WORKERS} workers that each put one and take the first, durably, "
        f"{BACKLOG} ready: jobs/s",
        ["", "first slice", "last slice", "last to first", "all", "of a CPU second, last to first"],
    )
    rows: dict[str, list[float]] = {}
    works: dict[str, list[float]] = {}
    for name, kind in ((OURS, "ours"), (SQLITE, "sqlite")):
        with setting.scratch() as directory:
            found = apart(jobs, str(directory / "db"), kind, seconds)
        rows[name], works[name] = found["rates"], found["per CPU second"]
        first, last = _ends(rows[name])
        first_work, last_work = _ends(works[name])
        made.add_row(
            name, number(first), number(last), f"{last / first:.2f}",
            number(statistics.mean(rows[name])), f"{last_work / first_work:.2f}",
        )  # fmt: skip
    report.tables.append(made)
    report.notes.append(
        f"Slices of {SLICE_SECONDS:g} s; the first and the last tenth of {seconds:g} s. Each job "
        "is two commits."
    )
    report.data["jobs"] = rows
    report.data["jobs of a CPU second"] = works
    first, last = _ends(rows[OURS])
    report.requirements.append(
        Requirement(
            "a queue of jobs stays as fast",
            f"jobs per second in the last of {seconds:g} s, to those in the first",
            f"at least {LAST_TO_FIRST_MIN:g}",
            LAST_TO_FIRST_MIN,
            Spread.of([last / first]),
            unit="x",
        )
    )


def _ends(rates: list[float]) -> tuple[float, float]:
    share = max(1, len(rates) // 10)
    return statistics.mean(rates[:share]), statistics.mean(rates[-share:])


def jobs(path: str, kind: str, seconds: float) -> dict[str, Any]:
    """Jobs per second, slice by slice, and per second of this process's processor time, which
    other programs have less of a hand in."""
    use = _with_ours if kind == "ours" else _with_sqlite
    found = trio.run(use, path, seconds)
    return {"rates": [rate for rate, _ in found], "per CPU second": [work for _, work in found]}


async def _work(
    put: Callable[[int], Awaitable[object]],
    take: Callable[[], Awaitable[int | None]],
    seconds: float,
) -> list[tuple[float, float]]:
    places = itertools.count()
    for _ in range(BACKLOG):
        await put(next(places))
    done = 0
    taken: set[int] = set()
    closed = False

    async def worker() -> None:
        nonlocal done
        while not closed:
            await put(next(places))
            place = await take()
            assert place is not None
            assert place not in taken
            taken.add(place)
            done += 1

    found: list[tuple[float, float]] = []
    async with trio.open_nursery() as nursery:
        for _ in range(WORKERS):
            nursery.start_soon(worker)
        await trio.sleep(load.WARM_UP_SECONDS)
        begin = perf_counter()
        while perf_counter() - begin < seconds:
            before, start, work = done, perf_counter(), process_time()
            await trio.sleep(min(SLICE_SECONDS, max(seconds / 10, 0.01)))
            count = done - before
            found.append((count / (perf_counter() - start), count / (process_time() - work)))
            # Who is served twice would be seen at once, or never.
            taken.clear()
        closed = True
    return found


async def _with_ours(path: str, seconds: float) -> list[tuple[float, float]]:
    def first(tx: trio_wal.Transaction) -> int | None:
        for key, _ in tx.scan(prefix=b"job:", limit=1):
            tx.delete(key)
            return int(key[4:])
        return None

    async with trio_wal.open_database(path) as db:
        return await _work(
            lambda place: db.put(_job(place), load.RECORD), lambda: db.run(first), seconds
        )


async def _with_sqlite(path: str, seconds: float) -> list[tuple[float, float]]:
    """As its manual would have it: one connection, in a thread."""
    connection = sqlite3.connect(f"{path}.sqlite", isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE job (place INTEGER PRIMARY KEY, body BLOB)")
    limiter = trio.CapacityLimiter(1)

    def put(place: int) -> None:
        connection.execute("INSERT INTO job VALUES (?, ?)", (place, load.RECORD))

    def take() -> int | None:
        row = connection.execute(
            "DELETE FROM job WHERE place = (SELECT min(place) FROM job) RETURNING place"
        ).fetchall()
        return row[0][0] if row else None

    async def put_one(place: int) -> None:
        await trio.to_thread.run_sync(put, place, limiter=limiter)

    try:
        return await _work(
            put_one, partial(trio.to_thread.run_sync, take, limiter=limiter), seconds
        )
    finally:
        connection.close()
