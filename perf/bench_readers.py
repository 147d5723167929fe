"""A database for more than its own process: readers in others, consumers, watchers, tables.

Law: what costs the owner is counted in its processor time, because readers need processors of
their own, and two machines differ in how many they have.  Both processes read the same clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

import msgspec
import trio
from apart import apart
from harness import Comparison, Contender, Setting, Spread, compare, percentile
from report import Report, spread_text, table

import trio_wal

MB: Final = 1_000_000
TASKS: Final = 128
READERS: Final = 4
PER_SECOND: Final = 1_000
VALUE: Final = b"." * 100
LAST: Final = b"last"
TICK: Final = b"tick"
LOOKED_UP: Final = 20_000
COMMITS: Final = 20_000
ACKNOWLEDGED_TOGETHER: Final = 100
WATCHERS: Final = 1_000
ROWS: Final = 5_000
STORE_BYTES: Final = 100 * MB
STORE_BYTES_AT_LENGTH: Final = 1_000 * MB
TAIL_BYTES: Final = 64 << 20
OPENS: Final = 7

CHILD: Final = """\
import sys
sys.path[:0] = sys.argv[1:2]
import bench_readers
getattr(bench_readers, sys.argv[2])(sys.argv[3])
"""


def run(setting: Setting) -> Report:
    """The benchmark."""
    rounds, seconds = (3, 2.0) if setting.brief else (9, 5.0)
    report = Report("readers")
    found: dict[str, Comparison] = {}
    for name, contenders in CONTENDERS.items():
        each = [
            Contender(what, partial(_in_scratch, setting, trial, seconds))
            for what, trial in contenders.items()
        ]
        found[name] = compare(each, rounds)
    _show(found, report, rounds)
    _opening(setting, report)
    disturbed = sum(one.disturbed for one in found.values())
    if disturbed:
        report.notes.append(f"{disturbed} trials were disturbed by other processes.")
    return report


def _in_scratch(
    setting: Setting, trial: Callable[[str, float], dict[str, float]], seconds: float
) -> Mapping[str, float]:
    with setting.scratch() as path:
        return apart(trial, str(path / "db"), seconds)


@contextlib.contextmanager
def _others(function: str, path: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """So many other processes that look at the database, all ready."""
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), function, path]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


async def _fill(db: trio_wal.Database, keys: int) -> None:
    for first in range(0, keys, 1_000):
        async with db.transaction() as tx:
            for n in range(first, min(first + 1_000, keys)):
                tx.put(b"key %08d" % n, VALUE)


# -- the owner beside readers ---------------------------------------------------------------


def watch_and_scan(path: str) -> None:
    """The other process: follows the commits, and scans a part after each tenth."""

    async def main() -> None:
        async with trio_wal.open_database_reader(path) as reader:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            async with reader.changes() as commits:
                n = 0
                async for _ in commits:
                    n += 1
                    if not n % 10:
                        for _ in reader.scan(start=b"key", limit=100):
                            pass

    trio.run(main)


def read_another(share_and_path: str) -> None:
    """The other process, for comparison: reads as `watch_and_scan` does, but another database,
    which nobody writes; again and again, with a share of a processor."""
    share, path = share_and_path.split(":", 1)

    async def main() -> None:
        async with trio_wal.open_database_reader(path) as reader:
            last = reader.durable_lsn
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            started, spent = perf_counter(), process_time()
            while True:
                async with reader.changes(1) as commits:
                    async for commit in commits:
                        if not commit.lsn % 10:
                            for _ in reader.scan(start=b"key", limit=100):
                                pass
                        ahead = (process_time() - spent) / float(share) + started - perf_counter()
                        if ahead > 0.0005:
                            await trio.sleep(ahead)
                        if commit.lsn == last:
                            break

    trio.run(main)


async def _closed_loop(
    commit: Callable[[int], Awaitable[object]], seconds: float
) -> tuple[int, float, float]:
    """How many commits tasks make in this time, each one at least, and what they take: seconds of
    processor time, and seconds."""
    done = 0
    began, spent = perf_counter(), process_time()

    async def worker(task: int) -> None:
        nonlocal done
        while True:
            await commit(task)
            done += 1
            if perf_counter() - began >= seconds:
                return

    async with trio.open_nursery() as nursery:
        for task in range(TASKS):
            nursery.start_soon(worker, task)
    return done, process_time() - spent, perf_counter() - began


async def _commit(db: trio_wal.Database, task: int) -> None:
    async with db.transaction() as tx:
        tx.put(b"task %d" % task, VALUE)


def _used(children: list[subprocess.Popen[str]]) -> float:
    """Processor seconds of other processes that run."""
    ticks = 0
    for child in children:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def _own_cost(
    db: trio_wal.Database, seconds: float, others: tuple[str, str] | None
) -> dict[str, float]:
    """
    Args:
      others: what the other processes do, and with what.
    """
    with _others(*(others or ("", "")), READERS if others else 0) as children:
        theirs = _used(children)
        done, spent, took = await _closed_loop(partial(_commit, db), seconds)
        used = _used(children) - theirs
    return {
        "CPU s a million": spent / done * 1e6,
        "per second": done / took,
        "others' cores": used / took,
    }


async def _alone(path: str, seconds: float) -> dict[str, float]:
    async with trio_wal.open_database(path) as db:
        await _fill(db, 10_000)
        return await _own_cost(db, seconds * 2, None)


async def _beside(path: str, seconds: float, readers: bool) -> dict[str, float]:
    another = f"{path}-another"
    if not readers:
        async with trio_wal.open_database(another) as db:
            await _fill(db, 10_000)
            await _closed_loop(partial(_commit, db), min(seconds, 0.5))
    async with trio_wal.open_database(path) as db:
        await _fill(db, 10_000)
        theirs = ("watch_and_scan", db.path)
        if readers:
            return await _own_cost(db, seconds * 2, theirs)
        # First with readers, which tell how much they use.
        found = await _own_cost(db, seconds, theirs)
        share = max(0.01, found["others' cores"] / READERS)
        return await _own_cost(db, seconds * 2, ("read_another", f"{share}:{another}"))


def alone(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_alone, path, seconds)


def beside_readers(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_beside, path, seconds, True)


def beside_others(path: str, seconds: float) -> dict[str, float]:
    """What of the price of readers is that of processors, and their caches, that are shared."""
    return trio.run(_beside, path, seconds, False)


# -- from durable to visible ----------------------------------------------------------------


def watch_ticks(path: str) -> None:
    """The other process: a line for each commit that it has seen first, and when."""

    async def main() -> None:
        seen: list[tuple[int, float]] = []
        async with trio_wal.open_database_reader(path) as reader:
            sys.stdout.write("ready\n")
            sys.stdout.flush()
            lsn = reader.durable_lsn
            while reader.get(TICK) != LAST:
                await reader.wait_for(lsn + 1)
                lsn = reader.durable_lsn
                seen.append((lsn, time.monotonic()))
        sys.stdout.write("".join(f"{lsn} {when!r}\n" for lsn, when in seen))

    trio.run(main)


async def _visible(path: str, seconds: float) -> dict[str, float]:
    durable: dict[int, float] = {}
    async with trio_wal.open_database(path) as db, trio.open_nursery() as nursery:
        await db.put(TICK, VALUE)
        with _others("watch_ticks", path, 1) as (child,):

            async def put() -> None:
                durable[await db.put(TICK, VALUE)] = time.monotonic()

            began = trio.current_time()
            for n in range(int(seconds * PER_SECOND)):
                await trio.sleep_until(began + n / PER_SECOND)
                nursery.start_soon(put)
            await trio.sleep(0.5)
            await db.put(TICK, LAST)
            assert child.stdout is not None
            lines = await trio.to_thread.run_sync(child.stdout.read)
    late: list[float] = []
    seen = [(int(lsn), float(when)) for lsn, when in map(str.split, lines.splitlines())]
    place = 0
    for lsn, when in sorted(durable.items()):
        while seen[place][0] < lsn:
            place += 1
        late.append(max(0.0, seen[place][1] - when) * 1e3)
    late.sort()
    return {"p50": percentile(late, 0.5), "p99": percentile(late, 0.99)}


def visible(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_visible, path, seconds)


# -- get in a reader ------------------------------------------------------------------------


def _gets(get: Callable[[bytes], bytes | None]) -> dict[str, float]:
    keys = [b"key %08d" % (n * 7919 % 10_000) for n in range(LOOKED_UP)]
    started = perf_counter()
    for key in keys:
        get(key)
    return {"us": (perf_counter() - started) / LOOKED_UP * 1e6}


async def _get_in_reader(path: str) -> dict[str, float]:
    async with trio_wal.open_database_reader(path) as reader:
        return _gets(reader.get)


def get_in_reader(path: str) -> dict[str, float]:
    return trio.run(_get_in_reader, path)


async def _get_both(path: str, stored: bool) -> dict[str, float]:
    async with trio_wal.open_database(path) as db:
        await _fill(db, 10_000)
        if stored:
            await db.checkpoint()
        # In turns: a process has a database open once, so the reader is in another.
        turns = [
            (_gets(db.get)["us"], (await trio.to_thread.run_sync(apart, get_in_reader, path))["us"])
            for _ in range(3)
        ]
    own, others = map(min, zip(*turns, strict=True))
    return {"ratio": others / own, "owner us": own, "reader us": others}


def get_in_memory(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_get_both, path, False)


def get_of_store(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_get_both, path, True)


# -- consumers, watchers, tables ------------------------------------------------------------


@contextlib.asynccontextmanager
async def _commits(path: str) -> AsyncIterator[trio_wal.Database]:
    keep: Any = trio_wal.KeepAll()
    async with trio_wal.open_database(path, retention=keep) as db:
        async with trio.open_nursery() as nursery:

            async def some(task: int) -> None:
                for n in range(COMMITS // TASKS):
                    await db.put(b"%d %d" % (task, n), VALUE)

            for task in range(TASKS):
                nursery.start_soon(some, task)
        yield db


async def _read_changes(path: str) -> dict[str, float]:
    async with _commits(path) as db, db.changes(start=1) as commits:
        started = perf_counter()
        n = 0
        async for commit in commits:
            n += 1
            if commit.lsn == db.durable_lsn:
                break
        return {"per second": n / (perf_counter() - started)}


async def _consume(path: str) -> dict[str, float]:
    async with _commits(path) as db:
        # What a consumer notes of itself it is not given.
        last = db.durable_lsn
        async with db.consumer("it", start=1) as consumer:
            started = perf_counter()
            n = 0
            async for commit in consumer:
                n += 1
                if not n % ACKNOWLEDGED_TOGETHER:
                    await consumer.acknowledge(commit)
                if commit.lsn >= last:
                    break
            return {"per second": n / (perf_counter() - started)}


async def _consume_in_tasks(path: str) -> dict[str, float]:
    """The same, but nobody waits for an acknowledgement before it goes on."""
    async with _commits(path) as db:
        last = db.durable_lsn
        async with db.consumer("it", start=1) as consumer:
            started = perf_counter()
            n = 0
            async with trio.open_nursery() as nursery:
                async for commit in consumer:
                    n += 1
                    if not n % ACKNOWLEDGED_TOGETHER:
                        nursery.start_soon(consumer.acknowledge, commit)
                    if commit.lsn >= last:
                        break
            return {"per second": n / (perf_counter() - started)}


def changes(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_read_changes, path)


def consumed(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_consume, path)


def consumed_in_tasks(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_consume_in_tasks, path)


async def _watched(path: str, seconds: float, watchers: int) -> dict[str, float]:
    async with trio_wal.open_database(path) as db, trio.open_nursery() as nursery:
        for n in range(watchers):
            nursery.start_soon(partial(db.wait_changed, prefix=b"watched %d/" % n))
        done, spent, _ = await _closed_loop(lambda task: db.put(b"task %d" % task, VALUE), seconds)
        nursery.cancel_scope.cancel()
    return {"CPU us": spent / done * 1e6}


def unwatched(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_watched, path, seconds, 0)


def watched(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_watched, path, seconds, WATCHERS)


class Job(msgspec.Struct):
    kind: str
    address: str
    tries: int
    due: float
    done: bool


def _job(n: int) -> Job:
    return Job("mail", "somebody@example.org", n % 5, n / 3, bool(n % 2))


async def _by_table(path: str) -> dict[str, float]:
    jobs = trio_wal.Table("jobs", key=int, value=Job)
    async with trio_wal.open_database(path) as db:
        made = [_job(n) for n in range(ROWS)]
        started = process_time()
        for first in range(0, ROWS, 100):
            async with db.transaction() as tx:
                for n in range(first, first + 100):
                    jobs.put(tx, n, made[n])
        put = process_time() - started
        started = process_time()
        for n in range(ROWS):
            jobs.get(db, n)
        return {"put us": put / ROWS * 1e6, "get us": (process_time() - started) / ROWS * 1e6}


async def _by_hand(path: str) -> dict[str, float]:
    encode = msgspec.msgpack.Encoder().encode
    decode = msgspec.msgpack.Decoder(Job).decode
    async with trio_wal.open_database(path) as db:
        made = [_job(n) for n in range(ROWS)]
        started = process_time()
        for first in range(0, ROWS, 100):
            async with db.transaction() as tx:
                for n in range(first, first + 100):
                    tx.put(b"jobs\0" + n.to_bytes(8, "big"), encode(made[n]))
        put = process_time() - started
        started = process_time()
        for n in range(ROWS):
            data = db.get(b"jobs\0" + n.to_bytes(8, "big"))
            assert data is not None
            decode(data)
        return {"put us": put / ROWS * 1e6, "get us": (process_time() - started) / ROWS * 1e6}


def by_table(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_by_table, path)


def by_hand(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_by_hand, path)


# -- opening --------------------------------------------------------------------------------


async def _make_large(path: str, store_bytes: int) -> None:
    value = b"." * 1_000
    options: Any = {"checkpoint_bytes": 4 * TAIL_BYTES}
    async with trio_wal.open_database(path, **options) as db:

        async def add(first: int, size: int) -> int:
            last = first + size // len(value)
            for at in range(first, last, 10_000):
                async with db.transaction() as tx:
                    for n in range(at, min(at + 10_000, last)):
                        tx.put(b"key %010d" % n, value)
            return last

        last = await add(0, store_bytes)
        await db.checkpoint()
        await add(last, TAIL_BYTES)


def open_and_look(path: str) -> None:
    """The other process: opens the database, and waits for a commit that it asks for."""

    async def main() -> None:
        opened: list[float] = []
        again: list[float] = []
        for _ in range(OPENS):
            started = perf_counter()
            async with trio_wal.open_database_reader(path) as reader:
                opened.append((perf_counter() - started) * 1e3)
                for _ in range(3):
                    sys.stdout.write("commit\n")
                    sys.stdout.flush()
                    await reader.wait_for(reader.durable_lsn + 1)
                    seen = time.monotonic()
                    durable = float(await trio.to_thread.run_sync(sys.stdin.readline))
                    again.append(max(0.0, seen - durable) * 1e3)
        sys.stdout.write(json.dumps({"open ms": opened, "again ms": again}) + "\n")

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    trio.run(main)


async def _open_large(path: str) -> dict[str, list[float]]:
    async with trio_wal.open_database(path, checkpoint_bytes=4 * TAIL_BYTES) as db:
        with _others("open_and_look", path, 1) as (child,):
            assert child.stdin is not None
            assert child.stdout is not None
            while (line := await trio.to_thread.run_sync(child.stdout.readline)) == "commit\n":
                await db.put(b"another", VALUE)
                child.stdin.write(f"{time.monotonic()!r}\n")
                child.stdin.flush()
    found: dict[str, list[float]] = json.loads(line)
    return found


def large(path: str, store_bytes: int) -> dict[str, Any]:
    trio.run(_make_large, path, store_bytes)
    return {}


def opening(path: str) -> dict[str, Any]:
    return dict(trio.run(_open_large, path))


def _opening(setting: Setting, report: Report) -> None:
    size = STORE_BYTES if setting.brief else STORE_BYTES_AT_LENGTH
    with setting.scratch() as path:
        apart(large, str(path / "db"), size)
        found = apart(opening, str(path / "db"))
    opened, again = Spread.of(found["open ms"]), Spread.of(found["again ms"])
    report.data["opening"] = {"store bytes": size, **found}
    shown = table(
        f"A reader of {size // MB:,} MB and {TAIL_BYTES >> 20} MiB of log that are not in the "
        "store yet, ms",
        ["opening", "from durable to seen"],
    )
    shown.add_row(spread_text(opened), spread_text(again))
    report.tables.append(shown)
    report.require(
        "reader opens",
        "opening a reader of 1 GB",
        500.0,
        opened,
        unit="ms",
        at_most=True,
    )
    share = Spread.of([one / opened.median for one in found["again ms"]])
    report.require(
        "reader looks",
        "from durable to seen later on, of that",
        0.1,
        share,
        at_most=True,
    )


# -- what is found --------------------------------------------------------------------------

Trial = Callable[[str, float], dict[str, float]]
CONTENDERS: Final[Mapping[str, Mapping[str, Trial]]] = {
    "owner": {"alone": alone, "beside readers": beside_readers, "beside others": beside_others},
    "visible": {"visible": visible},
    "get": {"in memory": get_in_memory, "of the store": get_of_store},
    "consumers": {"changes": changes, "consumer": consumed, "in tasks": consumed_in_tasks},
    "watchers": {"none": unwatched, "watchers": watched},
    "tables": {"by hand": by_hand, "table": by_table},
}


def _show(found: Mapping[str, Comparison], report: Report, rounds: int) -> None:
    for name, comparison in found.items():
        figures = [key for key in next(iter(comparison.trials.values()))[0] if "foreign" not in key]
        shown = table(f"{name}, {rounds} rounds", ["", *figures])
        for what in comparison.trials:
            shown.add_row(what, *(spread_text(comparison.spread(what, one)) for one in figures))
        report.tables.append(shown)
        report.data[name] = {
            what: {one: comparison.spread(what, one) for one in figures}
            for what in comparison.trials
        }
    owner, consumers = found["owner"], found["consumers"]
    watchers, tables = found["watchers"], found["tables"]
    report.require(
        "owner beside readers",
        f"CPU of a commit, {TASKS} tasks, beside {READERS} readers, to none",
        1.05,
        owner.ratio("beside readers", "alone"),
        at_most=True,
    )
    report.require(
        "owner beside others",
        "the same, to beside readers of another database that use as much",
        1.05,
        owner.ratio("beside readers", "beside others"),
        at_most=True,
    )
    for share, limit in (("p50", 2.0), ("p99", 20.0)):
        report.require(
            f"visible {share}",
            f"durable to visible in a reader, {share}",
            limit,
            found["visible"].spread("visible", share),
            unit="ms",
            at_most=True,
        )
    for what in ("in memory", "of the store"):
        report.require(
            f"get {what}",
            f"get in a reader to the owner's, {what}",
            1.5,
            found["get"].spread(what),
            at_most=True,
        )
    report.require(
        "consumer",
        "a consumer to changes",
        0.9,
        consumers.ratio("consumer", "changes"),
        at_most=False,
    )
    report.require(
        "watchers",
        f"CPU of a commit with {WATCHERS:,} watchers, to none",
        1.1,
        watchers.ratio("watchers", "none"),
        at_most=True,
    )
    for what in ("put us", "get us"):
        report.require(
            f"table {what[:3]}",
            f"a table's {what[:3]} to one by hand",
            1.5,
            tables.ratio("table", "by hand", what),
            at_most=True,
        )
