"""Versions and views: every reader sees its moment, whatever happens beside it."""

from __future__ import annotations

import gc
import random
import subprocess
import sys

import pytest
import trio
from databases import (
    check_content,
    hold_with_batch_in_flight,
    open_memory_database,
    open_sessions,
    write,
)
from helpers import Call, open_tasks
from models import Model
from trio.testing import wait_all_tasks_blocked

from trio_wal import _memtable
from trio_wal._layer import Layer
from trio_wal.testing import MemoryFiles

# -- a model beside it -------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 5, 128])
async def test_every_reader_sees_its_moment_whatever_is_committed_withdrawn_and_checkpointed(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_memtable, "SCAN_CHUNK", chunk)
    seen: set[str] = set()
    for seed in range(8):
        files = MemoryFiles(seed=seed)
        rng = random.Random(seed * 1000 + chunk)
        async with open_memory_database(files) as db, open_tasks(files) as nursery:
            files.hold()
            async with open_sessions(db, 150) as sessions:
                model = Model(db, files, nursery, rng, iter(sessions))
                for _ in range(120):
                    step = rng.choices(
                        (
                            model.put,
                            model.cancel,
                            model.move,
                            model.freeze,
                            model.begin,
                            model.end,
                            model.open_snapshot,
                            model.close_snapshot,
                        ),
                        (12, 5, 3, 2, 3, 2, 2, 1),
                    )[0]
                    await step()
                    await model.look()
                for snap, _ in model.snapshots:
                    snap.close()
                while model.readings:
                    await model.end()
            files.release()
            await wait_all_tasks_blocked()
            await check_content(db, model.state(model.commits))
            seen |= model.seen
    assert seen == {"withdrawn", "frozen with pending commits"}


# -- single cases ------------------------------------------------------------------


async def test_a_scan_finds_every_key_after_many_were_withdrawn_and_written_again(
    files: MemoryFiles,
) -> None:
    keys = [b"%03d" % n for n in range(300)]
    async with open_memory_database(files) as db:
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            async with trio.open_nursery() as withdrawn:
                for key in keys:
                    withdrawn.start_soon(db.put, key, b"never")
                await wait_all_tasks_blocked()
                async with db.transaction() as tx:
                    # Makes the order of keys, without reading any.
                    assert list(tx.scan(b"zzz")) == []
                withdrawn.cancel_scope.cancel()
            for key in keys:
                nursery.start_soon(db.put, key, b"1")
            files.release()
        expected = dict.fromkeys(keys, b"1") | {b"in flight": b""}
        await check_content(db, expected)
        await db.checkpoint()
        await check_content(db, expected)


async def test_a_withdrawn_commit_uncovers_what_was_there_before(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"stored": b"1", b"frozen": b"1"})
        await db.checkpoint()
        await write(db, {b"active": b"1"})
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            new: dict[bytes, bytes | None] = {b"stored": b"2", b"active": b"2", b"new": b"2"}
            below = Call(nursery, write, db, new)
            await wait_all_tasks_blocked()
            above = Call(nursery, write, db, dict.fromkeys(new, b"3"))
            await wait_all_tasks_blocked()
            # From the middle of the chain, then from its head.
            below.scope.cancel()
            await wait_all_tasks_blocked()
            assert below.state == "cancelled"
            above.scope.cancel()
            await wait_all_tasks_blocked()
            assert above.state == "cancelled"
            async with open_sessions(db, 1) as (session,):
                assert await session.scan() == {
                    b"active": b"1",
                    b"frozen": b"1",
                    b"in flight": b"",
                    b"stored": b"1",
                }
            files.release()


async def test_a_scan_under_way_does_not_show_what_was_withdrawn_meanwhile(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"1", b"c": b"1"})
        await db.checkpoint()
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            pending = Call(nursery, write, db, {b"c": b"2", b"d": b"2"})
            await wait_all_tasks_blocked()
            async with db.transaction() as tx:
                items = tx.scan(b"a", b"e")
                assert next(items) == (b"a", b"1")
                pending.scope.cancel()
                await wait_all_tasks_blocked()
                assert pending.state == "cancelled"
                assert list(items) == [(b"b", b"1"), (b"c", b"1")]
            # Not read, and so nothing to conflict with.
            assert tx.lsn == 1
            files.release()


async def test_a_scan_under_way_keeps_what_it_has_shown_from_being_withdrawn(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db, open_tasks(files) as nursery:
        await hold_with_batch_in_flight(files, nursery, db)
        pending = Call(nursery, write, db, {b"a": b"2", b"b": b"2"})
        await wait_all_tasks_blocked()
        async with open_sessions(db, 1) as (session,):
            items = await session.do(lambda tx: tx.scan(b"a", b"e"))
            assert await session.do(lambda tx: next(items)) == (b"a", b"2")
            pending.scope.cancel()
            await wait_all_tasks_blocked()
            assert pending.state == "waiting"
            assert await session.do(lambda tx: list(items)) == [(b"b", b"2")]
            session.commit_soon()
            files.release()
            await session.ended.wait()
            assert session.outcome == pending.value == 2


async def test_a_view_reads_through_two_layers_and_the_store(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"store", b"b": b"store", b"c": b"store", b"d": b"store"})
        await db.checkpoint()
        await write(db, {b"b": b"frozen", b"c": b"frozen", b"d": None, b"e": b"frozen"})
        files.fail("store")
        with pytest.raises(OSError, match="Input/output error"):
            await db.checkpoint()
        assert db._versions.view.frozen is not None
        await write(db, {b"c": b"active", b"d": b"active", b"e": None, b"f": b"active"})
        expected = {
            b"a": b"store",
            b"b": b"frozen",
            b"c": b"active",
            b"d": b"active",
            b"f": b"active",
        }
        await check_content(db, expected)
        await write(db, {b"a": None, b"b": None})
        del expected[b"a"], expected[b"b"]
        await check_content(db, expected)
        await db.checkpoint()
        await check_content(db, expected)


# -- memory ------------------------------------------------------------------------


def chain(layer: Layer, key: bytes) -> list[int]:
    """The numbers of a key's versions, newest first."""
    found = []
    version = layer.versions.get(key)
    while version is not None:
        found.append(version.seq)
        version = version.older
    return found


def references(value: bytes) -> int:
    """To tell how many versions hold it, which the collector does not list."""
    gc.collect()
    return sys.getrefcount(value)


async def test_a_hot_key_keeps_one_version_when_nobody_reads(files: MemoryFiles) -> None:
    value = bytes(50)
    async with open_memory_database(files) as db:
        before = references(value)
        for _ in range(5000):
            await db.put(b"hot", value)
        assert len(chain(db._versions.view.active, b"hot")) == 1
        assert references(value) - before == 1
        await db.checkpoint()
        assert references(value) - before == 1, "the store's"
        for _ in range(5000):
            await db.put(b"hot", value)
        assert references(value) - before == 2
        stats = db.statistics()
        assert stats.memtable_keys == 1
        assert stats.memtable_bytes < 500


async def test_many_tasks_on_a_hot_key_leave_one_version(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:

        async def increment() -> None:
            for _ in range(20):
                async with db.transaction() as tx:
                    tx.put(b"n", b"%d" % (int(tx.get(b"n", b"0")) + 1))

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(increment)
        assert db.get(b"n") == b"1000"
        assert len(chain(db._versions.view.active, b"n")) == 1
        assert db.statistics().memtable_bytes < 500


async def test_older_versions_stay_while_somebody_reads_and_go_afterwards(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"k", b"old")
        with db.snapshot() as snap:
            for number in range(10):
                await db.put(b"k", b"%d" % number)
            assert snap.get(b"k") == b"old"
        await db.put(b"k", b"new")
        assert len(chain(db._versions.view.active, b"k")) == 1
        assert db.statistics().memtable_bytes < 500


LONG_CHAIN = """
from trio_wal._layer import Layer
layer = Layer()
for number in range(1, 500_001):
    layer.add({b"hot": b"%d" % number}, number, number, keep_older=True)
    layer.settle(number, 0, None)
assert layer.bytes > 500_000 * 200
if FORGET:
    layer.forget_older(layer.versions[b"hot"])
    assert layer.bytes < 500
del layer
print("freed")
"""


@pytest.mark.parametrize("forget", [False, True], ids=["with the layer", "one by one"])
def test_versions_that_a_long_snapshot_has_kept_are_freed(forget: bool) -> None:
    """Not recursively: the process would end with its stack."""
    code = LONG_CHAIN.replace("FORGET", str(forget))
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "freed\n"), done.stderr


async def test_commits_that_were_withdrawn_leave_no_memory(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        value = bytes(100)
        before = references(value)
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            bytes_before = db.statistics().memtable_bytes
            async with trio.open_nursery() as withdrawn:
                for number in range(100):
                    withdrawn.start_soon(db.put, b"%d" % (number % 10), value)
                await wait_all_tasks_blocked()
                assert references(value) - before > 100
                assert db.statistics().memtable_bytes > bytes_before + 100 * 100
                withdrawn.cancel_scope.cancel()
            assert db.statistics().memtable_bytes == bytes_before
            assert db.statistics().pending == 1
            files.release()
        assert references(value) - before == 0


async def test_a_checkpoint_lets_go_of_the_old_base_once_nobody_reads_from_it(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"k", b"1")
        await db.checkpoint()
        first = db._versions.view.base
        snap = db.snapshot().__enter__()
        await db.put(b"k", b"2")
        await db.checkpoint()
        assert db._versions.view.base is not first
        assert (first._users, first._retired) == (1, True)
        assert snap.get(b"k") == b"1"
        snap.close()
        snap.close()
        assert first._users == 0
        assert db.statistics().open_readers == 0
