"""Durable transactions: the database beside SQLite, LMDB, RocksDB and LevelDB.

Law: the same trio program for everybody, in turns in one run; only the commit differs.
For each number of tasks a peer is represented by the arrangement in which it was best.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Final

import attrs
import load
import trio
from harness import Comparison, Contender, MiB, Setting, Spread, compare
from peers import ARRANGEMENTS, IN_LOOP, IN_THREADS, PEERS, Peer, Sqlite, arrange
from report import Report, Requirement, number, table

import trio_wal

TASKS: Final = (1, 16, 128, 1024)
VALUE: Final = b"." * 100
KEYS_A_TASK: Final = 500
DATABASE: Final = "trio_wal"
PUT: Final = "trio_wal, put()"
LOG: Final = "log, append"
LOG_IN_LOOP: Final = "log, append, in the loop"
WRITE: Final = "trio_wal, write()"
WRITTEN_TASKS: Final = (1, 128)
WRITTEN_KEYS: Final = 10
CEILING: Final = "ceiling"
BATCH_TASKS: Final = 10
BATCH_PUTS: Final = 50
READS: Final = 20_000

Step = Callable[[int, int], Awaitable[object]]
"""``await step(task, turn)``: one durable transaction."""


def run(setting: Setting) -> Report:
    report = Report("transactions")
    with setting.scratch() as directory:
        _puts(setting, directory, report)
    with setting.scratch() as directory:
        _written(setting, directory, report)
    with setting.scratch() as directory:
        _hot(setting, directory, report)
    with setting.scratch() as directory:
        _fifty(setting, directory, report)
    with setting.scratch() as directory:
        _reads(setting, directory, report)
    with setting.scratch() as directory:
        _checkpoint(setting, directory, report)
    with setting.scratch() as directory:
        _opening(setting, directory, report)
    return report


async def _rates(tasks: int, seconds: float, step: Step) -> dict[str, float]:
    """Transactions a second of so many tasks in a closed loop, and what they cost."""
    done = 0
    window = load._Window(seconds, lambda: done)

    async def worker(task: int) -> None:
        nonlocal done
        turn = 0
        while window.open:
            await step(task, turn)
            turn += 1
            done += 1

    async def keep() -> None:
        turn = 0

        async def one() -> None:
            nonlocal done, turn
            await step(0, turn)
            turn += 1
            done += 1

        await window.keep(one)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep)
        for task in range(1, tasks):
            nursery.start_soon(worker, task)
    return window.rates


_KEYS: Final = tuple(b"-%06d" % number for number in range(KEYS_A_TASK))


def _writes(task: int, turn: int, puts: int) -> dict[bytes, bytes]:
    """Of one transaction: cheap, because everybody pays for it."""
    own = task.to_bytes(3, "big")
    first = turn * puts % KEYS_A_TASK
    return {own + key: VALUE for key in _KEYS[first : first + puts]}


# -- contenders -------------------------------------------------------------------


StepOf = Callable[[trio_wal.Database], Step]


def _age(path: Path, tasks: int, step_of: StepOf) -> None:
    """Bring a new database's log to its full-size segments, by commits like the ones to come."""

    async def fill() -> None:
        async with trio_wal.open_database(path, durability="none") as db:
            step = step_of(db)

            async def worker(task: int) -> None:
                turn = 0
                while db.wal.statistics().bytes_appended < load.AGED_BYTES:
                    await load.prepared(db.wal)
                    await step(task, turn)
                    turn += 1

            async with trio.open_nursery() as nursery:
                for task in range(max(tasks, load.AGED_TASKS_MIN)):
                    nursery.start_soon(worker, task)
            await db.checkpoint()

    if not path.exists():
        trio.run(fill)


def _in_database(path: Path, tasks: int, seconds: float, step_of: StepOf) -> dict[str, float]:
    async def main() -> dict[str, float]:
        async with trio_wal.open_database(path) as db:
            rates = await _rates(tasks, seconds, step_of(db))
            # The next trial need not replay it.
            await db.checkpoint()
            return rates

    _age(path, tasks, step_of)
    return trio.run(main)


def _database(path: Path, tasks: int, seconds: float, puts: int) -> dict[str, float]:
    def step_of(db: trio_wal.Database) -> Step:
        async def step(task: int, turn: int) -> None:
            async with db.transaction() as tx:
                for key, value in _writes(task, turn, puts).items():
                    tx.put(key, value)

        return step

    return _in_database(path, tasks, seconds, step_of)


def _put(path: Path, tasks: int, seconds: float) -> dict[str, float]:
    """The same with the method for a transaction of one operation."""

    def step_of(db: trio_wal.Database) -> Step:
        async def step(task: int, turn: int) -> None:
            ((key, value),) = _writes(task, turn, 1).items()
            await db.put(key, value)

        return step

    return _in_database(path, tasks, seconds, step_of)


def _write(path: Path, tasks: int, seconds: float, puts: int) -> dict[str, float]:
    """The same with the method for a transaction that is a mapping."""

    def step_of(db: trio_wal.Database) -> Step:
        async def step(task: int, turn: int) -> None:
            await db.write(_writes(task, turn, puts))

        return step

    return _in_database(path, tasks, seconds, step_of)


def _log(
    path: Path, tasks: int, seconds: float, puts: int, sync_in: trio_wal.SyncIn = "thread"
) -> dict[str, float]:
    """Appends of the same bytes, without anything that a transaction is."""

    async def main() -> dict[str, float]:
        async with trio_wal.open_wal(path, sync_in=sync_in) as wal:

            async def step(task: int, turn: int) -> None:
                for value in _writes(task, turn, puts).values():
                    await wal.append(value)

            return await _rates(tasks, seconds, step)

    load.age(path, [VALUE] * max(tasks, load.AGED_TASKS_MIN))
    return trio.run(main)


def _peer(
    path: Path, kind: type[Peer], arrangement: str, tasks: int, seconds: float, puts: int
) -> dict[str, float]:
    async def main() -> dict[str, float]:
        peer = kind(path)
        try:
            arranged = arrange(peer, arrangement)

            async def step(task: int, turn: int) -> None:
                await arranged.commit(_writes(task, turn, puts))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(arranged.run)
                rates = await _rates(tasks, seconds, step)
                nursery.cancel_scope.cancel()
            return rates
        finally:
            peer.close()

    rates = trio.run(main)
    shutil.rmtree(path)
    return rates


def _contenders(
    directory: Path, tasks: int, seconds: float, puts: int, arrangements: tuple[str, ...]
) -> list[Contender]:
    database, log = directory / f"db-{tasks}", directory / f"log-{tasks}"
    made = [
        Contender(DATABASE, partial(_database, database, tasks, seconds, puts)),
    ]
    if puts == 1:
        made += [
            Contender(PUT, partial(_put, database, tasks, seconds)),
            Contender(LOG, partial(_log, log, tasks, seconds, puts)),
            Contender(CEILING, partial(load.ceiling, tasks, seconds)),
        ]
        if tasks == 1:
            trial = partial(_log, directory / "loop", tasks, seconds, puts, "loop")
            made.append(Contender(LOG_IN_LOOP, trial))
    for kind in PEERS:
        for arrangement in arrangements:
            trial = partial(_peer, directory / "peer", kind, arrangement, tasks, seconds, puts)
            made.append(Contender(f"{kind.name}, {arrangement}", trial))
    return made


def _best(found: Comparison, arrangements: tuple[str, ...]) -> str:
    names = [f"{kind.name}, {arrangement}" for kind in PEERS for arrangement in arrangements]
    return max(names, key=found.median)


OWN: Final = ("one thread", "40 threads")
"""Arrangements in which each call is a transaction of its own."""


def _puts(setting: Setting, directory: Path, report: Report) -> None:
    seconds = 0.25 if setting.brief else 1.0
    shown = table(
        "One put a transaction, each durable: transactions per second (median)",
        ["contender", *(f"{tasks} tasks" for tasks in TASKS)],
    )
    found = {
        tasks: compare(
            _contenders(directory, tasks, seconds, 1, ARRANGEMENTS), 3 if setting.brief else 5
        )
        for tasks in TASKS
    }
    cost = table(
        "The same: seconds of CPU for a million transactions, all threads (median)",
        ["contender", *(f"{tasks} tasks" for tasks in TASKS)],
    )
    for name in found[1].trials:
        measured = [one if name in one.trials else None for one in found.values()]
        shown.add_row(name, *(number(one.median(name)) if one else "" for one in measured))
        cost.add_row(name, *(number(one.median(name, load.CPU)) if one else "" for one in measured))
    report.tables += [shown, cost]
    report.data["puts"] = [
        {
            "tasks": tasks,
            "per second": {name: comparison.spread(name) for name in comparison.trials},
            load.CPU: {name: comparison.spread(name, load.CPU) for name in comparison.trials},
        }
        for tasks, comparison in found.items()
    ]
    _require_puts(found, report)


def _require_puts(found: dict[int, Comparison], report: Report) -> None:
    def require(key: str, what: str, needed: float, tasks: int, name: str, to: str) -> None:
        report.requirements.append(
            Requirement(key, what, f"{needed:g} ×", needed, found[tasks].ratio(name, to))
        )

    for tasks, of_log, of_database in ((1, 2.0, 1.3), (128, 25.0, 15.0), (1024, 25.0, 15.0)):
        # With one task, collecting by hand makes a transaction of each call too.
        best = _best(found[tasks], IN_THREADS if tasks == 1 else OWN)
        require(
            f"append, K={tasks}, to best peer",
            f"append of the log, {tasks} tasks, to the best peer's put ({best})",
            *(of_log, tasks, LOG, best),
        )
        require(
            f"put, K={tasks}, to best peer",
            f"one put a transaction, {tasks} tasks, to the best peer ({best})",
            *(of_database, tasks, DATABASE, best),
        )
    best = _best(found[1], IN_THREADS)
    require(
        "append, K=1, to best peer in a thread",
        f"append of the log, 1 task, to the best peer in a thread ({best})",
        *(1.0, 1, LOG, best),
    )
    best = _best(found[1], (IN_LOOP,))
    require(
        "append, K=1, in the loop, to best peer",
        f'append of the log, 1 task, sync_in="loop", to the best peer called in the loop ({best})',
        *(0.8, 1, LOG_IN_LOOP, best),
    )
    best = _best(found[128], ("by hand",))
    require(
        "put, K=128, to best by hand",
        f"one put a transaction, 128 tasks, to the best peer batched by hand ({best})",
        *(1.0, 128, DATABASE, best),
    )
    # What is batched by hand is single puts.
    require(
        "put(), K=128, to best by hand",
        f"put(), 128 tasks, to the best peer batched by hand ({best})",
        *(1.0, 128, PUT, best),
    )
    require(
        "put, K=128, to append",
        "one put a transaction, 128 tasks, to the log's own append",
        *(0.6, 128, DATABASE, LOG),
    )
    for tasks in (128, 1024):
        require(
            f"put, K={tasks}, to ceiling",
            f"one put a transaction, {tasks} tasks, to the bare ceiling",
            *(0.5, tasks, DATABASE, CEILING),
        )


# -- a mapping as one transaction --------------------------------------------------


def _written(setting: Setting, directory: Path, report: Report) -> None:
    seconds = 0.4 if setting.brief else 1.0
    shown = table(
        "put(), and write() of one key and of ten: keys per second (median)",
        ["contender", *(f"{tasks} tasks" for tasks in WRITTEN_TASKS)],
    )
    ten = f"{WRITE}, {WRITTEN_KEYS} keys"
    found = {
        tasks: compare(
            [
                Contender(PUT, partial(_put, directory / f"put-{tasks}", tasks, seconds)),
                *(
                    Contender(name, partial(_write, directory / name, tasks, seconds, keys))
                    for name, keys in ((WRITE, 1), (ten, WRITTEN_KEYS))
                ),
            ],
            5 if setting.brief else 9,
        )
        for tasks in WRITTEN_TASKS
    }
    for name, keys in ((PUT, 1), (WRITE, 1), (ten, WRITTEN_KEYS)):
        shown.add_row(name, *(number(one.median(name) * keys) for one in found.values()))
    report.tables.append(shown)
    report.data["written"] = found
    for tasks, one in found.items():
        report.require(
            f"write() of one key, K={tasks}",
            f"write() of one key, {tasks} task{'s' * (tasks > 1)}, to put()",
            0.95,
            one.ratio(WRITE, PUT),
            at_most=False,
        )
        keys_a_put = one.ratio(ten, PUT)
        report.require(
            f"write() of {WRITTEN_KEYS} keys, K={tasks}",
            f"write() of {WRITTEN_KEYS} keys, {tasks} task{'s' * (tasks > 1)}: keys, to put()",
            3.0,
            Spread(*(each * WRITTEN_KEYS for each in attrs.astuple(keys_a_put))),
            at_most=False,
        )


# -- one key that everybody increments --------------------------------------------


def _hot_database(path: Path, tasks: int, seconds: float) -> dict[str, float]:
    async def main() -> tuple[dict[str, float], int]:
        lost = 0
        async with trio_wal.open_database(path) as db:
            done = 0

            async def step(task: int, turn: int) -> None:
                nonlocal done
                async with db.transaction() as tx:
                    tx.put(b"n", b"%d" % (int(tx.get(b"n", b"0")) + 1))
                done += 1

            rates = await _rates(tasks, seconds, step)
            lost = done - int(db.get(b"n", b"0"))
        return rates, lost

    rates, lost = trio.run(main)
    shutil.rmtree(path)
    return {**rates, "lost": lost}


def _hot_sqlite(path: Path, threads: int, tasks: int, seconds: float) -> dict[str, float]:
    async def main() -> tuple[dict[str, float], int]:
        peer = Sqlite(path)
        try:
            limiter = trio.CapacityLimiter(threads)
            done = 0

            async def step(task: int, turn: int) -> None:
                nonlocal done
                await trio.to_thread.run_sync(peer.increment, limiter=limiter)
                done += 1

            rates = await _rates(tasks, seconds, step)
            return rates, done - peer.counter()
        finally:
            peer.close()

    rates, lost = trio.run(main)
    shutil.rmtree(path)
    return {**rates, "lost": lost}


def _hot(setting: Setting, directory: Path, report: Report) -> None:
    seconds = 0.4 if setting.brief else 1.5
    tasks = 128
    found = compare(
        [
            Contender(DATABASE, partial(_hot_database, directory / "db", tasks, seconds)),
            *(
                Contender(
                    f"sqlite3, {threads} thread{'s' * (threads > 1)}",
                    partial(_hot_sqlite, directory / "peer", threads, tasks, seconds),
                )
                for threads in (1, 40)
            ),
        ],
        3 if setting.brief else 7,
    )
    shown = table(
        f"One counter, incremented by {tasks} tasks (median)",
        ["contender", "increments per second", "lost"],
    )
    for name in found.trials:
        lost = sum(found.values(name, "lost"))
        shown.add_row(name, number(found.median(name)), f"{lost:.0f}")
    report.tables.append(shown)
    best = max((name for name in found.trials if name != DATABASE), key=found.median)
    report.data["hot"] = {name: found.spread(name) for name in found.trials}
    report.requirements += [
        Requirement(
            key="hot counter to sqlite3",
            what=f"hot counter, {tasks} tasks, to SQLite's UPDATE ({best})",
            needed="12 ×",
            limit=12.0,
            measured=found.ratio(DATABASE, best),
        ),
        Requirement(
            key="hot counter, lost",
            what="hot counter, lost increments",
            needed="0",
            limit=0.0,
            measured=Spread.of([sum(found.values(DATABASE, "lost"))]),
            unit="increments",
            at_most=True,
        ),
    ]


# -- larger transactions ----------------------------------------------------------


def _fifty(setting: Setting, directory: Path, report: Report) -> None:
    seconds = 0.3 if setting.brief else 1.0
    contenders = [
        contender
        for contender in _contenders(
            directory, BATCH_TASKS, seconds, BATCH_PUTS, ("one thread", "by hand")
        )
        if contender.name not in (LOG, CEILING)
    ]
    found = compare(contenders, 3 if setting.brief else 7)
    shown = table(
        f"{BATCH_PUTS} puts a transaction, {BATCH_TASKS} tasks: puts per second (median)",
        ["contender", "puts per second"],
    )
    for name in found.trials:
        shown.add_row(name, number(found.median(name) * BATCH_PUTS))
    report.tables.append(shown)
    best = _best(found, ("by hand",))
    spread = found.spread(DATABASE)
    needed = max(300_000.0, 0.8 * found.median(best) * BATCH_PUTS)
    report.data["fifty"] = {name: found.spread(name) for name in found.trials}
    report.requirements.append(
        Requirement(
            key="50 puts",
            what=f"50 puts a transaction, 10 tasks (0.8 × {best}, or 300,000)",
            needed=f"{number(needed)} puts/s",
            limit=needed,
            measured=Spread(
                *(value * BATCH_PUTS for value in (spread.median, spread.low, spread.high))
            ),
            unit="puts/s",
        )
    )


# -- reads ------------------------------------------------------------------------


def _timed(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return (perf_counter() - start) / READS * 1e6


def _reads(setting: Setting, directory: Path, report: Report) -> None:
    import lmdb

    keys = [b"key-%08d" % number for number in range(READS)]
    figures: dict[str, list[float]] = {}

    async def main() -> None:
        env = lmdb.open(str(directory / "lmdb"), map_size=1 << 32)
        with env.begin(write=True) as txn:
            for key in keys:
                txn.put(key, VALUE)
        async with trio_wal.open_database(directory / "db") as db:
            async with db.transaction() as tx:
                for key in keys:
                    tx.put(key, VALUE)
            with env.begin() as txn:
                bare = txn.get

                def gets(get: Callable[[bytes], object]) -> float:
                    def loop() -> None:
                        for key in keys:
                            get(key)

                    return _timed(loop)

                def turns(where: str) -> None:
                    for _ in range(5 if setting.brief else 15):
                        figures.setdefault(f"bare lmdb get ({where})", []).append(gets(bare))
                        figures.setdefault(f"get, {where}", []).append(gets(db.get))
                        scan = _timed(lambda: sum(1 for _ in db.scan()))
                        figures.setdefault(f"scan, {where}", []).append(scan)
                        cursor = _timed(lambda: sum(1 for _ in txn.cursor()))
                        figures.setdefault(f"bare lmdb cursor ({where})", []).append(cursor)

                turns("from the memtable")
                await db.checkpoint()
                turns("from LMDB")
        env.close()

    trio.run(main)
    shown = table(f"Reads of {READS:,} resident keys: µs each (median)", ["what", "µs"])
    for name, taken in figures.items():
        shown.add_row(name, f"{statistics.median(taken):.2f}")
    report.tables.append(shown)
    report.data["reads"] = {name: Spread.of(taken) for name, taken in figures.items()}
    pairs = zip(figures["get, from LMDB"], figures["bare lmdb get (from LMDB)"], strict=True)
    report.requirements.append(
        Requirement(
            key="get to bare lmdb",
            what="get of a resident key, to a bare lmdb get in an open transaction: time",
            needed="2 × at most",
            limit=2.0,
            measured=Spread.of([mine / theirs for mine, theirs in pairs]),
            at_most=True,
        )
    )


# -- while a checkpoint runs ------------------------------------------------------


def _checkpoint(setting: Setting, directory: Path, report: Report) -> None:
    size = (64 if setting.brief else 1024) * MiB
    quiet: list[float] = []
    during: list[float] = []
    taken: dict[str, float] = {}

    async def main() -> None:
        async with trio_wal.open_database(
            directory / "db", checkpoint_bytes=4 * size, max_record_size=64 * MiB
        ) as db:
            value = bytes(8192)
            for first in range(0, size // 8192, 1024):
                async with db.transaction() as tx:
                    for place in range(1024):
                        tx.put(b"%010d" % (first + place), value)

            async def commits(into: list[float], until: Callable[[], bool]) -> None:
                async def worker(task: int) -> None:
                    turn = 0
                    while not until():
                        start = perf_counter()
                        await db.put(b"w%d-%d" % (task, turn % 100), VALUE)
                        into.append(perf_counter() - start)
                        turn += 1

                async with trio.open_nursery() as nursery:
                    for task in range(16):
                        nursery.start_soon(worker, task)

            deadline = perf_counter() + 1.0
            await commits(quiet, lambda: perf_counter() > deadline)
            done = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(commits, during, lambda: done)
                start = perf_counter()
                await db.checkpoint()
                taken["seconds"] = perf_counter() - start
                done = True

    trio.run(main)
    shown = table(
        f"Commits of 16 tasks while {size // MiB} MiB are checkpointed ({taken['seconds']:.1f} s)",
        ["", "commits", "median ms", "p99 ms", "slowest ms"],
    )
    rows = {}
    for name, values in (("quiet", quiet), ("during the checkpoint", during)):
        values.sort()
        row = (
            statistics.median(values) * 1e3,
            values[int(len(values) * 0.99)] * 1e3,
            values[-1] * 1e3,
        )
        rows[name] = row
        shown.add_row(name, str(len(values)), *(f"{figure:.2f}" for figure in row))
    report.tables.append(shown)
    report.data["checkpoint"] = {"bytes": size, **taken, "median, p99, slowest, ms": rows}


# -- opening ----------------------------------------------------------------------


def _opening(setting: Setting, directory: Path, report: Report) -> None:
    sizes = (10, 100) if setting.brief else (10, 100, 1000)
    shown = table(
        "Opening time by size of the data (all but the last 1,000 commits checkpointed)",
        ["data MB", "opened in ms", "transactions replayed"],
    )
    figures = []

    async def main(megabytes: int) -> tuple[float, int]:
        path = directory / str(megabytes)
        async with trio_wal.open_database(path, max_record_size=64 * MiB) as db:
            value = bytes(10_000)
            for first in range(0, megabytes * 100, 1000):
                async with db.transaction() as tx:
                    for place in range(1000):
                        tx.put(b"%010d" % (first + place), value)
            await db.checkpoint()
            async with trio.open_nursery() as nursery:
                for turn in range(1000):
                    nursery.start_soon(db.put, b"tail-%d" % turn, VALUE)
        start = perf_counter()
        async with trio_wal.open_database(path) as db:
            return perf_counter() - start, db.recovery.transactions_replayed

    for megabytes in sizes:
        seconds, replayed = trio.run(main, megabytes)
        shutil.rmtree(directory / str(megabytes))
        figures.append((megabytes, seconds * 1e3, replayed))
        shown.add_row(str(megabytes), f"{seconds * 1e3:.1f}", str(replayed))
    report.tables.append(shown)
    report.data["opening: MB, ms, replayed"] = figures
