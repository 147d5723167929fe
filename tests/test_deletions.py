"""What is deleted: no scan meets it for long, and nobody misses it who still needs it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from databases import check_content, open_memory_database, open_sessions, write
from helpers import open_tasks
from models import Model
from trio.testing import wait_all_tasks_blocked

from trio_wal import Database, Snapshot, _layer, _memtable, _mvcc, _order, _readset
from trio_wal._base import Unreadable as _Unreadable
from trio_wal.testing import MemoryFiles

SEEN = {"withdrawn", "frozen with pending commits", "conflict", "no conflict", "scan under way"}


@pytest.mark.parametrize("part", range(6))
async def test_whatever_is_deleted_each_reader_sees_its_moment_and_conflicts_are_exact(
    part: int,
) -> None:
    seen: set[str] = set()
    for seed in range(4 * part, 4 * part + 4):
        with pytest.MonkeyPatch.context() as monkeypatch:
            seen |= await _random_life(seed, monkeypatch)
    assert seen == SEEN


async def _random_life(seed: int, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Small pieces of everything, so that few keys meet every case."""
    rng = random.Random(seed)
    monkeypatch.setattr(_memtable, "SCAN_CHUNK", rng.choice((1, 2, 5, 128)))
    monkeypatch.setattr(_layer, "BURIED_TOGETHER", rng.choice((1, 1, 1, 4)))
    monkeypatch.setattr(_layer, "BURIED_AT_ONCE", rng.choice((1, 2, 512)))
    monkeypatch.setattr(_layer, "DELETIONS_NOTED", rng.choice((1, 3)))
    monkeypatch.setattr(_layer, "RUN_KEYS", rng.choice((3, 6, 4096)))
    monkeypatch.setattr(_layer, "RUN_KEYS_READ", rng.choice((2, 4, 256)))
    monkeypatch.setattr(_mvcc, "MANY_BYTES", 0)
    monkeypatch.setattr(_order, "RUN_KEYS", rng.choice((3, 6)))
    monkeypatch.setattr(_order, "RUNS_MERGED", rng.choice((2, 3)))
    monkeypatch.setattr(_order, "STALE_MIN", rng.choice((0, 2, 64)))
    monkeypatch.setattr(_order, "BLOCK_KEYS", rng.choice((2, 4, 512)))
    # Otherwise one that is open for long conflicts because nobody can tell.
    monkeypatch.setattr(_readset, "DROPPED_LAYERS_MAX", 1000)
    files = MemoryFiles(seed=seed)
    async with open_memory_database(files) as db, open_tasks(files) as nursery:
        files.hold()
        async with open_sessions(db, 100) as sessions:
            model = Model(db, files, nursery, rng, iter(sessions))
            model.deleted = rng.choice((0.4, 0.6, 0.8))
            steps = {
                model.put: 14,
                model.cancel: 3,
                model.move: 5,
                model.freeze: rng.choice((0.2, 1, 2)),
                model.begin: 3,
                model.end: 1,
                model.end_with_a_commit: 4,
                model.open_snapshot: 2,
                model.close_snapshot: 2,
                model.open_scan: 3,
            }
            for _ in range(250):
                step = rng.choices([*steps], [*steps.values()])[0]
                await step()
                await model.look()
                await model.step_scans()
            for snap, _ in model.snapshots:
                snap.close()
            while model.readings:
                await model.end()
            # Before the sessions are cancelled, some of which wait for their commits.
            files.release()
            await wait_all_tasks_blocked()
        await check_content(db, model.state(model.commits))
    async with open_memory_database(files) as db:
        await check_content(db, model.state(model.commits))
    return model.seen


# -- what a scan meets -------------------------------------------------------------

DELETED = 2000
EMPTY_STEPS_MAX = 100
"""A scan may take so many times the steps that it takes in an empty database."""


def steps(function: Callable[[], object]) -> int:
    """How many lines are run, of whatever module."""
    count = 0

    def trace(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def key(number: int) -> bytes:
    return b"job:%06d" % number


async def most_steps(db: Database, snapshots: dict[Snapshot, Any], expected: Any) -> int:
    """Of every way to ask for the first and the last key."""
    most = 0

    def look(scan: Callable[..., Iterator[tuple[bytes, bytes]]], found: Any) -> None:
        nonlocal most
        for place, reverse in ((0, False), (-1, True)):
            for where in ({"prefix": b"job:"}, {"start": b"job:", "stop": b"job;"}):
                items: list[tuple[bytes, bytes]] = []

                def first(where: Any = where, reverse: Any = reverse, items: Any = items) -> None:
                    items += scan(**where, reverse=reverse, limit=1)

                most = max(most, steps(first))
                assert [name for name, _ in items] == ([found[place]] if found else [])

    look(db.scan, expected)
    for snapshot, seen in snapshots.items():
        look(snapshot.scan, seen)
    with db.snapshot() as now:
        look(now.scan, expected)
    async with db.transaction() as tx:
        look(tx.scan, expected)
        tx.put(b"other", b"")
        most = max(most, steps(tx._reads.conflict))
    return most


@pytest.mark.parametrize("order", ["in order", "shuffled"])
@pytest.mark.parametrize("stored", ["nothing", "half", "everything"])
@pytest.mark.parametrize(
    ("alive", "commit"),
    [([], 500), ([1_000], 1), ([0, 700, 1_999], 500)],
    ids=["none alive", "one alive, small commits", "three alive"],
)
async def test_deleted_keys_are_no_obstacle_to_a_scan_whatever_becomes_of_them(
    alive: list[int], stored: str, order: str, commit: int, files: MemoryFiles
) -> None:
    numbers = list(range(DELETED))
    rng = random.Random(1)
    if order == "shuffled":
        rng.shuffle(numbers)
    snapshots: dict[Snapshot, Any] = {}
    left = sorted(map(key, alive))

    async def change(numbers: list[int], value: bytes | None) -> None:
        for place in range(0, len(numbers), commit):
            await write(db, {key(number): value for number in numbers[place : place + commit]})

    async with open_memory_database(files) as db:
        empty = await most_steps(db, {}, [])

        async def check() -> None:
            # A few turns of the event loop for what a large transaction leaves to be done.
            await wait_all_tasks_blocked()
            assert await most_steps(db, snapshots, left) < EMPTY_STEPS_MAX * empty

        def keep(seen: list[bytes]) -> None:
            snapshots[db.snapshot().__enter__()] = seen

        keep([])
        if stored == "half":
            await change(numbers[::2], b"")
            await db.checkpoint()
            await change(numbers[1::2], b"")
        else:
            await change(numbers, b"")
            if stored == "everything":
                await db.checkpoint()
        keep(sorted(map(key, numbers)))
        if order == "shuffled":
            rng.shuffle(numbers)
        dead = [number for number in numbers if number not in alive]
        await change(dead[: DELETED // 2], None)
        keep(sorted([*map(key, dead[DELETED // 2 :]), *left]))
        await change(dead[DELETED // 2 :], None)
        keep(left)
        await check()
        # The layer is frozen, and stays so.
        files.fail("store")
        with pytest.raises(OSError, match="Input/output error"):
            await db.checkpoint()
        await check()
        # The same keys once more, over the frozen layer.
        keys = dead[: DELETED // 4]
        await change(keys, b"")
        await change(keys, None)
        await check()
        await db.checkpoint()
        await check()
        for snapshot in snapshots:
            snapshot.__exit__(None, None, None)
        snapshots.clear()
        await db.put(b"other", b"")
        await check()
        await check_content(db, dict.fromkeys(left, b"") | {b"other": b""})
    async with open_memory_database(files) as db:
        await check()


async def test_deletions_leave_no_memory(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        for turn in range(40):
            for value in (b"", None):
                await write(db, {key(1000 * turn + number): value for number in range(1000)})
        await wait_all_tasks_blocked()
        stats = db.statistics()
        assert stats.memtable_keys < _layer.BURIED_TOGETHER
        assert stats.memtable_bytes < 10_000
        active = db._versions.view.active
        assert sum(run.size for run in active.keys.order.runs) + len(active.keys.fresh) < 2000
        # They are forgotten once nobody reads any more who was reading then.
        with db.snapshot():
            await write(db, {key(number): b"" for number in range(1000)})
            await write(db, {key(number): None for number in range(1000)})
            assert db.statistics().memtable_keys >= 1000
        await db.put(b"k", b"")
        await db.put(b"k", b"")
        await wait_all_tasks_blocked()
        assert db.statistics().memtable_keys < 1 + _layer.BURIED_TOGETHER
        # Neither does the log stay: the checkpoint holds what there is, which is little.
        assert await db.checkpoint() == db.durable_lsn
        assert db.statistics().store_keys == 1


async def test_a_checkpoint_of_what_was_put_and_deleted_moves_on_in_the_log(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_layer, "BURIED_TOGETHER", 1)
    async with open_memory_database(files) as db:
        await db.put(b"k", b"")
        await db.delete(b"k")
        assert db.statistics().memtable_keys == 0
        assert await db.checkpoint() == 2
        assert db.statistics().checkpoint_lsn == 2
    async with open_memory_database(files) as db:
        assert db.recovery.transactions_replayed == 0


async def test_where_the_store_cannot_be_read_deletions_stay_and_hide_what_it_holds(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_layer, "BURIED_TOGETHER", 1)

    def unreadable(_layer: object) -> Any:
        return _Unreadable(OSError(5, "Input/output error"))

    async with open_memory_database(files) as db:
        await write(db, {b"a": b"", b"b": b""})
        await db.checkpoint()
        monkeypatch.setattr(db._versions._memtable, "below", unreadable)
        await db.delete(b"a")
        monkeypatch.undo()
        await check_content(db, {b"b": b""})
        await db.delete(b"b")
        await check_content(db, {})
        await db.checkpoint()
        await check_content(db, {})


@pytest.mark.parametrize("left", [0, 1])
async def test_the_head_of_a_queue_is_found_without_the_store(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """The keys that a checkpoint has left there are gone soon; who looks for the first one all the
    time need not go through the store for it."""
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"", b"z": b""} | {key(n): b"" for n in range(100)})
        await db.checkpoint()
        await write(db, dict.fromkeys((key(n) for n in range(100 - left)), None))
        await write(db, {key(n): b"new" for n in range(100, 110)})
        await wait_all_tasks_blocked()
        base = db._core.versions.view.base
        asked: list[Any] = []
        original = base.transaction.items

        def items(start: Any, stop: Any, reverse: bool) -> Any:
            asked.append((start, stop, reverse))
            return original(start, stop, reverse)

        monkeypatch.setattr(base.transaction, "items", items)
        for _ in range(3):
            assert next(db.scan(prefix=key(0)[:1])) == (key(100 - left), b"" if left else b"new")
        looks = len(asked)
        for _ in range(3):
            assert next(db.scan(prefix=key(0)[:1])) == (key(100 - left), b"" if left else b"new")
        assert len(asked) - looks == 3 * left
        # Nothing is said of other ranges, nor of the same one backwards.
        assert list(db.scan(limit=1)) == [(b"a", b"")]
        assert list(db.scan(stop=key(0))) == [(b"a", b"")]
        assert list(db.scan(reverse=True, limit=2)) == [(b"z", b""), (key(109), b"new")]
        # A new state of the store is looked at anew.
        await write(db, {key(0): b"again"})
        await db.checkpoint()
        await write(db, {key(1): b"behind"})
        found = list(db.scan(prefix=key(0)[:1], limit=2))
        assert found == [(key(0), b"again"), (key(1), b"behind")]
