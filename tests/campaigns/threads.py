"""A database under real threads: commits, deletions and readers beside checkpoints without pause.

Law: real files, LMDB and worker threads, and an interpreter that changes threads as often as it
can.  A case makes one change or one look after the other, while checkpoints run all the time in
another task; what it looks for is one dictionary of its own:

  * `scan`, `stream`, `get` and a snapshot, however old, give exactly that, at its moment;
  * after the last checkpoint the store alone has all of it: the log has nothing that is newer;
  * opened again it is the same.

A case that found something need not find it again: threads are no part of the seed.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import trio

import trio_wal

from . import _report
from ._promises import check

STEPS: Final = 40
KEYS: Final = (300, 3_000, 20_000, 20_000)
SWITCH_SECONDS: Final = (1e-6, 1e-5, 1e-4)
CHECKPOINT_BYTES: Final = (20_000, 300_000, 1 << 40)
SNAPSHOTS_MAX: Final = 4
TRIES: Final = 20
"""How often the threads of one case are given a chance when it is run again."""

Content = dict[bytes, bytes]


def _key(number: int) -> bytes:
    return b"%08d" % number


class Case:
    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = rng = random.Random(seed)
        self.path = folder / "db"
        self.keys = rng.choice(KEYS)
        self.checkpoint_bytes = rng.choice(CHECKPOINT_BYTES)
        self.pauses = rng.choice((0.0, 0.0, 0.002))
        self.content: Content = {}
        self.snapshots: list[tuple[trio_wal.Snapshot, Content, ExitStack]] = []
        self.made = 0
        self.over = False

    def _some(self, most: int) -> list[bytes]:
        """Keys, by chance in a row, or in any order."""
        count = self.rng.randint(1, min(most, self.keys))
        if self.rng.random() < 0.5:
            first = self.rng.randrange(self.keys - count + 1)
            chosen = list(range(first, first + count))
            if self.rng.random() < 0.7:
                self.rng.shuffle(chosen)
        else:
            chosen = self.rng.sample(range(self.keys), count)
        return [_key(number) for number in chosen]

    def _value(self) -> bytes:
        self.made += 1
        return b"%d" % self.made + b"." * self.rng.choice((0, 0, 20, 200))

    async def run(self) -> None:
        options = {"checkpoint_bytes": self.checkpoint_bytes, "durability": "none"}
        async with trio_wal.open_database(self.path, **options) as db:  # type: ignore[arg-type]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._checkpoint_always, db)
                try:
                    for _ in range(STEPS):
                        await self._step(db)
                finally:
                    self.over = True
            for snapshot, content, leave in self.snapshots:
                self._compare(snapshot.scan(), content, "a snapshot, at the end")
                leave.close()
            await self._look(db)
            lsn = await db.checkpoint()
            check(lsn == db.durable_lsn, f"a checkpoint up to {lsn}, durable {db.durable_lsn}")
        async with trio_wal.open_database(self.path, **options) as db:  # type: ignore[arg-type]
            replayed = db.statistics().memtable_keys
            check(not replayed, f"{replayed} keys came from the log after a checkpoint of all")
            self._compare(db.scan(), self.content, "the store alone")

    async def _checkpoint_always(self, db: trio_wal.Database) -> None:
        while not self.over:
            await db.checkpoint()
            await trio.sleep(self.pauses)

    async def _step(self, db: trio_wal.Database) -> None:
        action = self.rng.choices(
            (
                *(self._put, self._delete, self._empty, self._mix, self._many, self._range),
                *(self._pin, self._look),
            ),
            (15, 15, 15, 15, 10, 5, 15, 10),
        )[0]
        await action(db)

    # -- changes --

    async def _put(self, db: trio_wal.Database) -> None:
        writes = {key: self._value() for key in self._some(self.keys)}
        async with db.transaction() as tx:
            for key, value in writes.items():
                tx.put(key, value)
        self.content.update(writes)

    async def _delete(self, db: trio_wal.Database) -> None:
        keys = [key for key in self._some(self.keys) if key in self.content]
        async with db.transaction() as tx:
            for key in keys:
                tx.delete(key)
        for key in keys:
            del self.content[key]

    async def _empty(self, db: trio_wal.Database) -> None:
        """Fill the store, delete nearly all of it, and checkpoint that while it is still being
        dealt with."""
        await self._put(db)
        if self.rng.random() < 0.5:
            await db.checkpoint()
        keys = list(self.content)
        self.rng.shuffle(keys)
        del keys[: self.rng.randrange(3)]
        async with db.transaction() as tx:
            for key in keys:
                tx.delete(key)
        for key in keys:
            del self.content[key]
        await db.checkpoint()
        self._compare(db.scan(), self.content, "emptied")

    async def _mix(self, db: trio_wal.Database) -> None:
        async with db.transaction() as tx:
            for key in self._some(500):
                if self.rng.random() < 0.5:
                    value = self.content[key] = self._value()
                    tx.put(key, value)
                else:
                    there = self.content.pop(key, None) is not None
                    check(tx.discard(key) == there, f"discard({key!r}) says {not there}")

    async def _many(self, db: trio_wal.Database) -> None:
        """Small commits of many tasks, each with its own key."""

        async def one(key: bytes, value: bytes | None) -> None:
            if value is None:
                await db.discard(key)
            else:
                await db.put(key, value)

        async with trio.open_nursery() as nursery:
            for key in self._some(100):
                value = self._value() if self.rng.random() < 0.4 else None
                nursery.start_soon(one, key, value)
                if value is None:
                    self.content.pop(key, None)
                else:
                    self.content[key] = value

    async def _range(self, db: trio_wal.Database) -> None:
        first, last = sorted(self.rng.choices(range(self.keys), k=2))
        start, stop = _key(first), _key(last)
        gone = [key for key in self.content if start <= key < stop]
        async with db.transaction() as tx:
            count = tx.delete_range(start, stop)
        check(count == len(gone), f"delete_range says {count} of {len(gone)}")
        for key in gone:
            del self.content[key]

    # -- looks --

    def _compare(self, pairs: Iterator[tuple[bytes, bytes]], content: Content, what: str) -> None:
        found = list(pairs)
        expected = sorted(content.items())
        if found == expected:
            return
        keys = [key for key, _ in found]
        check(keys == sorted(set(keys)), f"{what}: keys out of order, or twice")
        lost = [key for key in content if key not in dict(found)]
        more = [key for key in keys if key not in content]
        other = len(expected) - len(lost) - sum(content.get(key) == value for key, value in found)
        raise AssertionError(
            f"{what}: {len(lost)} keys lost {lost[:3]}, {len(more)} came back {more[:3]}, "
            f"{other} have another value"
        )

    async def _pin(self, db: trio_wal.Database) -> None:
        """Begin to hold a moment, or compare and let go of one."""
        if len(self.snapshots) < SNAPSHOTS_MAX and self.rng.random() < 0.6:
            leave = ExitStack()
            self.snapshots.append((leave.enter_context(db.snapshot()), dict(self.content), leave))
        elif self.snapshots:
            place = self.rng.randrange(len(self.snapshots))
            snapshot, content, leave = self.snapshots.pop(place)
            self._compare(snapshot.scan(), content, "a snapshot")
            for key in self._some(50):
                check(snapshot.get(key) == content.get(key), f"a snapshot: get({key!r})")
            leave.close()

    async def _look(self, db: trio_wal.Database) -> None:
        self._compare(db.scan(), self.content, "scan")
        for key in self._some(50):
            check(db.get(key) == self.content.get(key), f"get({key!r})")
        async with db.stream() as pairs:
            found = [pair async for pair in pairs]
        self._compare(iter(found), self.content, "stream")


def run_case(seed: int) -> None:
    """Raises what is found."""
    before = sys.getswitchinterval()
    with tempfile.TemporaryDirectory(dir=_report.fast_folder()) as folder:
        case = Case(seed, Path(folder))
        sys.setswitchinterval(case.rng.choice(SWITCH_SECONDS))
        try:
            trio.run(case.run)
        finally:
            sys.setswitchinterval(before)


def found_in(seed: int) -> str:
    return _report.found_in(run_case, seed)


# -- the campaign -------------------------------------------------------------------


def run_one(seed: int) -> _report.Answer:
    found = found_in(seed)
    rows = {"threads": Counter({"cases": 1, "found": int(bool(found))})}
    failures: list[tuple[object, str]] = [(seed, found)] if found else []
    return _report.Answer(1, f"seed {seed}", rows, failures)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replay", metavar="SEED", help=f"one case again, up to {TRIES} times")
    _report.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    report = _report.Report("threads", arguments, {"row": "", "cases": "cases", "found": "FOUND"})
    seeds = itertools.count(arguments.seed << 20)
    if arguments.count is not None:
        seeds = itertools.islice(seeds, arguments.count)  # type: ignore[assignment]
    rows, seconds = _report.collect(report, run_one, seeds, arguments.count)
    for name, row in rows.items():
        report.add(row=name, cases=row["cases"], found=row["found"])
    total = sum(row["cases"] for row in rows.values())
    report.note(f"{_report.per_minute(total, seconds):,} cases a minute")
    return report.finish()


def replay(text: str) -> int:
    found = next(filter(None, (found_in(int(text)) for _ in range(TRIES))), "")
    print(f"{text}: {found or 'nothing'}")
    return 1 if found else 0
