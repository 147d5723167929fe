"""`open_database` and `Database`: what outside of a transaction is seen, and how it all ends."""

from __future__ import annotations

import errno
import functools
import gc
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import trio
from databases import (
    DB,
    Home,
    after,
    check_content,
    commits_of,
    hash_tree,
    hold_with_batch_in_flight,
    open_memory_database,
    open_sessions,
    write,
)
from helpers import Call, open_tasks
from trio.testing import (
    MockClock,
    assert_checkpoints,
    assert_no_checkpoints,
    wait_all_tasks_blocked,
)

import trio_wal
from trio_wal import (
    Commit,
    Database,
    LogFailedError,
    LogLockedError,
    Operation,
    RecordTooLargeError,
    Transaction,
    TransactionConflict,
    _local,
)
from trio_wal._system.paths import finish_directory
from trio_wal.testing import MemoryFiles


@pytest.fixture(params=["memory", "real"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    return Home(tmp_path if request.param == "real" else None)


# -- the whole ---------------------------------------------------------------------


async def test_what_was_committed_is_there_after_reopening(home: Home) -> None:
    state: dict[bytes, bytes] = {}
    lsn = 0
    for session in range(6):
        async with home.open() as db:
            assert (db.durable_lsn, db.wal.durable_lsn) == (lsn, lsn)
            await check_content(db, state)
            items: dict[bytes, bytes | None] = {b"%d" % n: b"%d" % session for n in range(session)}
            if session == 5:
                items[b"1"] = None
            lsn = await write(db, items) if items else lsn
            state = after(state, (await commits_of(db))[-1:])
            if session % 2:
                await db.checkpoint()
            await check_content(db, state)
    assert state == {b"0": b"5", b"2": b"5", b"3": b"5", b"4": b"5"}


async def test_put_delete_get_and_scan_are_transactions_of_one_operation(home: Home) -> None:
    async with home.open() as db:
        assert await db.put(b"a", b"1") == 1
        assert await db.put(b"b", b"") == 2
        assert await db.put(b"a", b"2") == 3
        assert (db.get(b"a"), db.get(b"b"), db.get(b"c"), db.get(b"c", 0)) == (b"2", b"", None, 0)
        assert await db.delete(b"a") == 4
        with pytest.raises(KeyError, match=r"^b'a'$"):
            await db.delete(b"a")
        assert db.get(b"a", b"gone") == b"gone"
        assert list(db.scan()) == [(b"b", b"")]
        assert [commit.operations for commit in await commits_of(db)] == [
            (Operation(b"a", b"1"),),
            (Operation(b"b", b""),),
            (Operation(b"a", b"2"),),
            (Operation(b"a", None),),
        ]
        assert db.statistics().open_readers == 0


async def test_keys_and_values_are_checked_by_name(home: Home) -> None:
    async with home.open(max_record_size=1000) as db:
        calls: list[Callable[[Any], Awaitable[object]]] = [
            lambda key: db.put(key, b""),
            db.delete,
        ]
        for call in calls:
            for bad in (b"", b"k" * 512):
                with pytest.raises(ValueError, match=r"^key must have 1 to 511 bytes"):
                    await call(bad)
            for wrong in ("k", None, bytearray(b"k")):
                with pytest.raises(TypeError, match=r"^key must be bytes, not "):
                    await call(wrong)
        with pytest.raises(TypeError, match=r"^value must be bytes, not str$"):
            await db.put(b"k", "v")  # type: ignore[arg-type]
        with pytest.raises(RecordTooLargeError, match=r"^data of 1018 bytes is over max_record_si"):
            await db.put(b"k", bytes(1000))
        await db.put(b"k" * 511, b"longest")
        for where in (db, db.snapshot().__enter__()):
            for bad in (b"", b"k" * 512):
                with pytest.raises(ValueError, match=r"^key must have 1 to 511 bytes"):
                    where.get(bad)
            for wrong in ("k", 1, bytearray(b"k")):
                with pytest.raises(TypeError, match=r"^key must be bytes, not "):
                    where.get(wrong)  # type: ignore[call-overload]
            assert where.get(b"k" * 511) == b"longest"
        assert await db.checkpoint() == 1
        assert db.get(b"k" * 511) == b"longest"


# -- durable and pending -----------------------------------------------------------


async def test_outside_of_transactions_only_durable_state_is_seen(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        feed: list[Commit] = []

        async def follow() -> None:
            async with db.changes() as commits:
                async for commit in commits:
                    feed.append(commit)  # noqa: PERF401  (seen before the end)

        async with trio.open_nursery() as followers, open_tasks(files) as nursery:
            followers.start_soon(follow)
            await wait_all_tasks_blocked()
            files.hold()
            flying = Call(nursery, write, db, {b"a": b"2", b"b": None})
            await wait_all_tasks_blocked()
            queued = Call(nursery, write, db, {b"a": b"3", b"c": b"3"})
            await wait_all_tasks_blocked()
            for _ in range(2):
                assert (db.get(b"a"), db.get(b"b"), db.get(b"c")) == (b"1", b"1", None)
                assert list(db.scan()) == [(b"a", b"1"), (b"b", b"1")]
                with db.snapshot() as snap:
                    assert dict(snap.scan()) == {b"a": b"1", b"b": b"1"}
                    assert (snap.lsn, snap.get(b"c")) == (1, None)
                assert (db.durable_lsn, [commit.lsn for commit in feed]) == (1, [1])
                # Also what a checkpoint has put aside.
                Call(nursery, db.checkpoint)
                await wait_all_tasks_blocked()
            assert flying.state == queued.state == "waiting"
            files.release()
            await wait_all_tasks_blocked()
            await check_content(db, {b"a": b"3", b"c": b"3"})
            assert [commit.lsn for commit in feed] == [1, 2, 3]
            followers.cancel_scope.cancel()


async def test_nobody_ever_sees_half_a_transaction(home: Home) -> None:
    """Each transaction gives all keys one value; whoever looks sees one value."""
    keys = [b"%d" % number for number in range(5)]
    seen: set[bytes] = set()

    def look(items: dict[bytes, bytes]) -> None:
        assert len(items) in (0, 5)
        assert len(set(items.values())) <= 1, items
        seen.update(items.values())

    async with home.open(checkpoint_bytes=2000) as db:

        async def write_all(writer: int) -> None:
            for number in range(1000):
                if number >= 15 and db.statistics().checkpoints > 1:
                    break
                async with db.transaction() as tx:
                    for key in keys:
                        tx.put(key, b"%d.%d" % (writer, number))
                        if number % 5 == 0:
                            await trio.lowlevel.checkpoint()

        async def read_outside() -> None:
            while True:
                look(dict(db.scan()))
                look({key: value for key in keys if (value := db.get(key)) is not None})
                with db.snapshot() as snap:
                    found = dict(snap.scan(limit=2))
                    await trio.lowlevel.checkpoint()
                    found |= dict(snap.scan(keys[2]))
                    look(found)

        async def read_inside() -> None:
            while True:
                with_scan: dict[bytes, bytes] = {}
                async with db.transaction() as tx:
                    for key, value in tx.scan():
                        with_scan[key] = value
                        await trio.lowlevel.checkpoint()
                    look(with_scan)
                    look({key: value for key in keys if (value := tx.get(key)) is not None})
                    tx.abort()

        async def follow() -> None:
            async with db.changes() as commits:
                async for commit in commits:
                    look({op.key: op.value for op in commit.operations if op.value})

        async with trio.open_nursery() as readers:
            for reader in (read_outside, read_inside, follow):
                readers.start_soon(reader)
            async with trio.open_nursery() as nursery:
                for writer in range(8):
                    nursery.start_soon(write_all, writer)
            readers.cancel_scope.cancel()
        assert len(seen) > 50
        assert db.statistics().checkpoints > 1


async def test_a_scan_shows_the_moment_of_its_call(home: Home) -> None:
    async with home.open() as db:
        await write(db, {b"a": b"1", b"b": b"1", b"c": b"1"})
        forward, backward = db.scan(), db.scan(reverse=True)
        assert next(forward) == (b"a", b"1")
        await write(db, {b"a": None, b"b": b"2", b"bb": b"2"})
        await db.checkpoint()
        await write(db, {b"c": None, b"d": b"3"})
        assert list(forward) == [(b"b", b"1"), (b"c", b"1")]
        assert list(backward) == [(b"c", b"1"), (b"b", b"1"), (b"a", b"1")]
        assert list(db.scan()) == [(b"b", b"2"), (b"bb", b"2"), (b"d", b"3")]


async def test_a_scan_that_is_dropped_lets_go_of_its_moment(home: Home) -> None:
    async with home.open() as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        unused, begun = db.scan(), db.scan()
        next(begun)
        assert db.statistics().open_readers == 2
        del unused, begun
        gc.collect()
        assert db.statistics().open_readers == 0
        for _ in db.scan():
            break
        gc.collect()
        assert db.statistics().open_readers == 0
        list(db.scan(limit=1))
        assert db.statistics().open_readers == 0


# -- run ---------------------------------------------------------------------------


async def test_run_takes_sync_and_async_functions_and_gives_their_result(home: Home) -> None:
    async with home.open() as db:

        def add(tx: Transaction, key: bytes, number: int) -> int:
            total = int(tx.get(key, b"0")) + number
            tx.put(key, b"%d" % total)
            return total

        async def add_slowly(tx: Transaction, key: bytes, number: int) -> int:
            await trio.lowlevel.checkpoint()
            return add(tx, key, number)

        assert await db.run(add, b"n", 3) == 3
        assert await db.run(add_slowly, b"n", 4) == 7
        assert await db.run(lambda tx: tx.get(b"n")) == db.get(b"n") == b"7"


async def test_run_tries_again_on_a_conflict_until_nothing_is_lost(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        tries = 0

        async def increment(tx: Transaction) -> None:
            nonlocal tries
            tries += 1
            number = int(tx.get(b"n", b"0"))
            await trio.lowlevel.checkpoint()
            tx.put(b"n", b"%d" % (number + 1))

        async def many() -> None:
            for _ in range(5):
                await db.run(increment, retries=1000)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(many)
        assert db.get(b"n") == b"100"
        stats = db.statistics()
        assert (stats.transactions, stats.conflicts) == (100, tries - 100)
        assert stats.conflicts > 0


@pytest.mark.parametrize("retries", [0, 1, 10])
async def test_run_gives_up_after_so_many_retries(files: MemoryFiles, retries: int) -> None:
    async with open_memory_database(files) as db:
        tries = 0

        async def never(tx: Transaction) -> None:
            nonlocal tries
            tries += 1
            tx.get(b"k")
            await db.put(b"k", b"%d" % tries)

        with pytest.raises(TransactionConflict, match=r"^key b'k', read by this transaction"):
            await db.run(never, retries=retries)
        assert tries == db.statistics().conflicts == retries + 1
        if retries == 10:
            with pytest.raises(TransactionConflict):
                await db.run(never)
            assert tries == 22


async def test_run_lets_other_errors_through_at_once(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        tries = 0

        def fail(tx: Transaction) -> None:
            nonlocal tries
            tries += 1
            tx.put(b"a", b"1")
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match=r"^mine$"):
            await db.run(fail)
        assert (tries, db.wal.last_lsn) == (1, 0)
        for wrong in (-1, 1.0, True):
            with pytest.raises((TypeError, ValueError), match=r"^retries must be "):
                await db.run(fail, retries=wrong)  # type: ignore[arg-type]


# -- changes -----------------------------------------------------------------------


async def test_changes_gives_every_commit_in_order_and_then_new_ones(home: Home) -> None:
    async with home.open() as db:
        for number in range(10):
            await write(db, {b"a": b"%d" % number, b"b%d" % number: b""})
        await write(db, {b"b0": None})
        seen: list[Commit] = []

        async def follow(start: int | None, found: list[Commit]) -> None:
            async with db.changes(start) as commits:
                async for commit in commits:
                    found.append(commit)  # noqa: PERF401  (seen before the end)

        late: list[Commit] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow, None, seen)
            nursery.start_soon(follow, 11, late)
            for number in range(10, 20):
                await write(db, {b"a": b"%d" % number})
                if number == 15:
                    await db.checkpoint()
            while not (seen and late and seen[-1].lsn == late[-1].lsn == 21):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert [commit.lsn for commit in seen] == list(range(1, 22))
        assert late == seen[10:]
        assert seen[0].operations == (Operation(b"a", b"0"), Operation(b"b0", b""))
        assert seen[10].operations == (Operation(b"b0", None),)
        assert after({}, seen) == dict(db.scan())
        times = [commit.timestamp for commit in seen]
        assert times == sorted(times)
        assert times[0].utcoffset() == timedelta(0)


async def test_changes_end_when_the_database_is_closed(files: MemoryFiles) -> None:
    found: list[int] = []
    async with trio.open_nursery() as nursery, open_memory_database(files) as db:

        async def follow() -> None:
            async with db.changes() as commits:
                found.extend([commit.lsn async for commit in commits])

        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        await db.put(b"a", b"1")
    assert found == [1]


async def test_a_transaction_gives_one_operation_per_key_in_order_of_first_writes(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        async with db.transaction() as tx:
            for key, value in ((b"b", b"1"), (b"a", b"1"), (b"b", b"2"), (b"c", b"1")):
                tx.put(key, value)
            tx.delete(b"a")
        (commit,) = await commits_of(db)
        assert commit.operations == (
            Operation(b"b", b"2"),
            Operation(b"a", None),
            Operation(b"c", b"1"),
        )


# -- statistics --------------------------------------------------------------------


async def test_statistics_count_what_happens(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        first = db.statistics()
        assert first.wal == db.wal.statistics()
        await write(db, {b"a": b"1", b"b": b"2"})
        await db.put(b"a", b"2")
        async with db.transaction() as tx:
            tx.get(b"a")
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            nursery.start_soon(db.put, b"c", b"")
            await wait_all_tasks_blocked()
            snapshots = [db.snapshot().__enter__(), db.snapshot().__enter__()]
            async with open_sessions(db, 2) as (reader, _):
                await reader.get(b"a")
                stats = db.statistics()
                assert (stats.transactions, stats.pending, stats.open_readers) == (2, 2, 3)
                assert (stats.memtable_keys, stats.store_keys) == (4, 0)
                assert 4 * 200 < stats.memtable_bytes < 6 * 300
                assert stats.wal.durable_lsn == 2
            for snap in snapshots:
                snap.close()
            files.release()
        await db.checkpoint()
        stats = db.statistics()
        assert (stats.transactions, stats.pending, stats.open_readers) == (4, 0, 0)
        assert (stats.memtable_keys, stats.memtable_bytes, stats.store_keys) == (0, 0, 4)
        assert stats.store_bytes > 0
        assert (stats.checkpoints, stats.checkpoint_lsn, stats.conflicts) == (1, 4, 0)
        assert stats.tasks_waiting_checkpoint == 0


async def test_statistics_can_be_looked_at_after_closing(home: Home) -> None:
    async with home.open() as db:
        await db.put(b"a", b"1")
        await db.checkpoint()
        await db.put(b"b", b"1")
    stats = db.statistics()
    assert (stats.store_keys, stats.transactions, stats.wal.state) == (1, 2, "closed")
    assert stats.memtable_keys == 0
    assert (db.durable_lsn, db.wal.durable_lsn) == (2, 2)


# -- closing -----------------------------------------------------------------------


async def test_closing_twice_is_fine_and_nothing_can_be_done_afterwards(home: Home) -> None:
    async with home.open() as db:
        await db.put(b"stored", b"1")
        await db.checkpoint()
        await db.put(b"a", b"1")
        await db.aclose()
        with assert_checkpoints():
            await db.aclose()
        uses: list[Callable[[], object]] = [
            lambda: db.get(b"a"),
            lambda: db.get(b"stored"),
            lambda: db.get(b"absent"),
            db.scan,
            db.snapshot,
            db.transaction,
            db.changes,
        ]
        for use in uses:
            with pytest.raises(trio.ClosedResourceError, match=r"this (database|log) is closed$"):
                use()
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: db.put(b"b", b""),
            lambda: db.delete(b"a"),
            lambda: db.run(lambda tx: None),
            db.checkpoint,
            lambda: db.backup(home.beside("copy")),
        ]
        for call in calls:
            with pytest.raises(trio.ClosedResourceError):
                await call()
    async with home.open() as db:
        await check_content(db, {b"stored": b"1", b"a": b"1"})


async def test_what_is_open_when_the_database_closes_is_closed_with_it(home: Home) -> None:
    async with home.open() as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        await db.checkpoint()
        await write(db, {b"c": b"1"})
        old = db.snapshot().__enter__()
        await db.checkpoint()
        snap, items = db.snapshot().__enter__(), db.scan()
        own = snap.scan()
        next(items)
        next(own)
        with pytest.raises(trio.ClosedResourceError, match=r"^the database was closed before this"):
            await _close_within_a_transaction(db)
    assert db.statistics().open_readers == 0
    for use in (lambda: old.get(b"a"), lambda: list(snap.scan())):
        with pytest.raises(trio.ClosedResourceError):
            use()
    for iterator in (items, own):
        with pytest.raises(trio.ClosedResourceError):
            next(iterator)
    for closed in (old, snap):
        closed.close()
    async with home.open() as db:
        await check_content(db, {b"a": b"1", b"b": b"1", b"c": b"1"})


async def _close_within_a_transaction(db: Database) -> None:
    async with db.transaction() as tx:
        tx.put(b"x", tx.get(b"a", b""))
        items = tx.scan()
        next(items)
        await db.aclose()
        for use in (lambda: tx.get(b"a"), lambda: next(items), lambda: tx.put(b"y", b"")):
            with pytest.raises(trio.ClosedResourceError):
                use()


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("aborted_first", [False, True])
async def test_who_gives_up_a_transaction_is_not_told_that_it_was_not_committed(
    home: Home, aborted_first: bool, reads: bool
) -> None:
    """Nothing was to reach the log; whether the database was closed before or after that does
    not matter.  To use it is an error all the same."""
    async with home.open() as db:
        await db.put(b"a", b"1")
        async with db.transaction() as tx:
            if reads:
                assert tx.get(b"a") == b"1"
            tx.put(b"a", b"2")
            if aborted_first:
                tx.abort()
            await db.aclose()
            tx.abort()
            for use in (lambda: tx.get(b"a"), lambda: tx.put(b"a", b"3"), lambda: tx.delete(b"a")):
                with pytest.raises(trio.ClosedResourceError, match=r"^this transaction has ended$"):
                    use()
            with pytest.raises(trio.ClosedResourceError, match=r"^this transaction has ended$"):
                await tx.commit()
            tx.abort()
        assert tx.lsn is None
    assert db.statistics().open_readers == 0
    async with home.open() as db:
        await check_content(db, {b"a": b"1"})


async def test_a_transaction_that_had_not_read_is_not_committed_after_closing(home: Home) -> None:
    async with home.open() as db:

        async def close_within() -> None:
            async with db.transaction() as tx:
                tx.put(b"x", b"1")
                await db.aclose()

        with pytest.raises(trio.ClosedResourceError):
            await close_within()
    async with home.open() as db:
        await check_content(db, {})


async def test_closing_first_makes_every_commit_durable(files: MemoryFiles) -> None:
    async with trio.open_nursery() as nursery:
        async with open_memory_database(files) as db:
            await hold_with_batch_in_flight(files, nursery, db)
            calls = [Call(nursery, db.put, b"%d" % number, b"") for number in range(10)]
            await wait_all_tasks_blocked()
            nursery.start_soon(_release_when_blocked, files)
        assert [call.state for call in calls] == ["returned"] * 10
    async with open_memory_database(files) as db:
        assert len(list(db.scan())) == 11


async def _release_when_blocked(files: MemoryFiles) -> None:
    await wait_all_tasks_blocked()
    files.release()


async def test_an_exception_of_the_body_passes_through_unwrapped(home: Home) -> None:
    error = RuntimeError("mine")

    async def body() -> None:
        async with home.open() as db:
            await db.put(b"a", b"1")
            db.snapshot().__enter__()
            raise error

    with pytest.raises(RuntimeError, match=r"^mine$") as caught:
        await body()
    assert caught.value is error
    async with home.open() as db:
        assert db.get(b"a") == b"1"


async def test_a_failed_log_is_told_on_leaving_if_nobody_was(files: MemoryFiles) -> None:
    async def body() -> None:
        async with open_memory_database(files) as db:
            await db.put(b"a", b"1")
            files.hold()
            async with trio.open_nursery() as nursery:
                call = Call(nursery, db.put, b"b", b"1")
                await wait_all_tasks_blocked()
                files.fail("sync")
                files.release()
            assert isinstance(call.error, LogFailedError)

    # The writer was told: leaving is quiet.
    await body()
    after_crash = files.crash_image(kind="kill")
    async with open_memory_database(after_crash) as db:
        assert db.get(b"a") == b"1"


async def test_it_opens_and_closes_many_times_without_leaving_anything(home: Home) -> None:
    async def session(number: int) -> None:
        async with home.open() as db:
            await db.put(b"n", b"%d" % number)
            if number % 3 == 0:
                await db.checkpoint()
            db.snapshot().__enter__()

    def resources() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0

    await session(0)
    before = resources(), threading.active_count()
    for number in range(1, 20):
        await session(number)
    assert resources() <= before[0]
    # trio keeps idle threads for a while, but needs no more of them.
    assert threading.active_count() <= before[1] + 3
    async with home.open() as db:
        assert (db.get(b"n"), db.durable_lsn) == (b"19", 20)


# -- conventions -------------------------------------------------------------------


async def test_every_async_method_is_a_checkpoint_and_no_sync_method_is(home: Home) -> None:
    async with home.open() as db:
        await db.put(b"a", b"1")
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: db.put(b"b", b"1"),
            lambda: db.delete(b"b"),
            lambda: db.run(lambda tx: None),
            lambda: db.run(lambda tx: tx.put(b"c", b"")),
            db.checkpoint,
            db.checkpoint,
            lambda: db.backup(home.beside("copy")),
            lambda: commits_of(db),
        ]
        for call in calls:
            with assert_checkpoints():
                await call()
        with assert_no_checkpoints():
            db.get(b"a")
            list(db.scan())
            with db.snapshot() as snap:
                snap.get(b"a")
                list(snap.scan())
            db.transaction()
            db.changes()
            db.statistics()
            assert db.path.endswith("db")
            assert repr(db) == f"<Database {db.path!r} durable_lsn=4>"
            assert db.recovery.last_lsn == 0


async def test_only_transactions_write_the_log(home: Home) -> None:
    async with home.open() as db:
        await db.put(b"a", b"1")

        async def send_nowait() -> None:
            db.wal.send_nowait(b"")

        calls: list[Callable[[], Any]] = [
            lambda: db.wal.append(b""),
            lambda: db.wal.append_many([b""]),
            lambda: db.wal.send(b""),
            lambda: db.wal.truncate_before(1),
            lambda: db.wal.truncate_after(0),
            send_nowait,
        ]
        for call in calls:
            with pytest.raises(
                TypeError, match=r"^this log belongs to a database, whose transactions write to it$"
            ):
                await call()
        # What does not write is there for all.
        assert await db.wal.flush() == 1
        await db.wal.wait_durable(1)
        async with db.wal.read() as records:
            assert [record.lsn async for record in records] == [1]
        assert db.wal.statistics().records_appended == 1


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"checkpoint_bytes": 0}, ValueError, r"^checkpoint_bytes must be at least 1, not 0$"),
    ({"checkpoint_bytes": 1.5}, TypeError, r"^checkpoint_bytes must be an int, not float$"),
    ({"map_size": 1}, ValueError, r"^map_size must be at least 1048576 and at most [0-9]+, not 1$"),
    ({"map_size": "1"}, TypeError, r"^map_size must be an int, not str$"),
    ({"retention": 3}, TypeError, r"^retention must be None or made of "),
    ({"durability": "perhaps"}, ValueError, r"^durability must be one of 'sync', "),
    ({"max_record_size": 0}, ValueError, r"^max_record_size must be at least 1"),
    ({"unknown": 1}, TypeError, r"unexpected keyword argument 'unknown'$"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=str)
def test_a_bad_option_is_refused_by_name_before_anything_is_created(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trio_wal.open_database(tmp_path / "db", **options)
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("path", [None, 1, b"db", "", "a\0b"])
def test_a_bad_path_is_refused_by_name(path: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^path must be a "):
        trio_wal.open_database(path)


async def test_a_path_may_be_a_str_or_a_path_and_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with trio_wal.open_database("relative") as db:
        assert db.path == str(tmp_path / "relative")
    async with trio_wal.open_database(tmp_path / "deep" / "down") as db:
        assert db.path == str(tmp_path / "deep" / "down")
        assert db.wal.path == str(tmp_path / "deep" / "down" / "log")


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")
async def test_only_the_owner_may_look_into_a_database(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        async with trio_wal.open_database(tmp_path / "db") as db:
            await db.put(b"a", b"1")
            await db.checkpoint()
    finally:
        os.umask(before)
    for entry in (tmp_path / "db", *(tmp_path / "db").rglob("*")):
        assert stat.S_IMODE(entry.stat().st_mode) == (0o700 if entry.is_dir() else 0o600), entry


async def test_a_database_has_one_owner(home: Home) -> None:
    async with home.open() as db:
        await db.put(b"a", b"1")
        await db.checkpoint()
        for _ in range(2):
            with pytest.raises(LogLockedError, match=rf"open in process {os.getpid()}; ") as caught:
                await home.open().__aenter__()
            assert caught.value.pid == os.getpid()
        # The owner has not noticed.
        await db.put(b"b", b"1")
        await db.checkpoint()
        await check_content(db, {b"a": b"1", b"b": b"1"})


# -- backup ------------------------------------------------------------------------


async def test_a_backup_opens_and_equals_the_state_at_its_lsn(home: Home) -> None:
    async with home.open(checkpoint_bytes=3000) as db:
        done = False
        backups: list[tuple[str, int]] = []

        async def writer(name: bytes) -> None:
            number = 0
            while not done:
                number += 1
                async with db.transaction() as tx:
                    tx.put(name, b"%d" % number)
                    tx.put(name + b" again", b"%d" % number)
                    if number % 7 == 0:
                        tx.delete(name + b" again")

        async with trio.open_nursery() as nursery:
            for name in (b"x", b"y", b"z"):
                nursery.start_soon(writer, name)
            for number in range(3):
                for _ in range(20):
                    await db.put(b"k%d" % number, b"")
                path = home.beside(f"copy{number}")
                backups.append((path, await db.backup(path)))
                if number == 1:
                    await db.put(b"in between", b"")
            done = True
        final = dict(db.scan())
        last = db.durable_lsn
    commits: list[Commit] = []
    # The log was dropped behind checkpoints: the oracle is another run over the copies.
    for path, lsn in backups:
        async with home.open(path) as copy:
            assert (copy.durable_lsn, copy.recovery.checkpoint_lsn) == (lsn, lsn)
            assert copy.wal.first_lsn == lsn + 1
            assert copy.recovery.transactions_replayed == 0
            for name in (b"x", b"y", b"z"):
                value = copy.get(name)
                if value is not None:
                    expected = None if int(value) % 7 == 0 else value
                    assert copy.get(name + b" again") == expected
            # LSNs go on behind it.
            assert await copy.put(b"new", b"") == lsn + 1
            commits = await commits_of(copy)
            assert [commit.lsn for commit in commits] == [lsn + 1]
        async with home.open(path) as copy:
            assert (copy.get(b"new"), copy.durable_lsn) == (b"", lsn + 1)
    assert [lsn for _, lsn in backups] == sorted({lsn for _, lsn in backups})
    async with home.open() as db:
        assert (dict(db.scan()), db.durable_lsn) == (final, last)


async def test_a_backup_equals_the_replay_of_the_log_up_to_its_lsn(home: Home) -> None:
    async with home.open(retention=trio_wal.KeepAll(), checkpoint_bytes=2000) as db:
        done = False

        async def writer(name: bytes) -> None:
            number = 0
            while not done:
                number += 1
                await write(db, {name: b"%d" % number, b"n%d" % (number % 5): name})

        async with trio.open_nursery() as nursery:
            for name in (b"x", b"y", b"z"):
                nursery.start_soon(writer, name)
            lsns = []
            for number in range(4):
                for _ in range(10):
                    await db.put(b"k", b"%d" % number)
                lsns.append(await db.backup(home.beside(f"copy{number}")))
            done = True
        commits = await commits_of(db)
    for number, lsn in enumerate(lsns):
        async with home.open(home.beside(f"copy{number}")) as copy:
            assert dict(copy.scan()) == after({}, commits[:lsn])


async def test_a_backup_of_an_empty_database_opens(home: Home) -> None:
    async with home.open() as db:
        assert await db.backup(home.beside("copy")) == 0
    async with home.open(home.beside("copy")) as copy:
        await check_content(copy, {})
        assert await copy.put(b"a", b"1") == 1
    async with home.open(home.beside("copy")) as copy:
        await check_content(copy, {b"a": b"1"})


async def test_a_backup_does_not_replace_anything(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "kept").write_bytes(b"kept")
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "link").symlink_to("nowhere")
    async with home.open() as db:
        await db.put(b"a", b"1")
        await db.backup(tmp_path / "copy")
        before = {name: hash_tree(tmp_path / name) for name in ("directory", "copy")}
        for name in ("directory", "file", "link", "copy", "db"):
            with pytest.raises(
                FileExistsError, match=rf"the destination of the backup already exists: '.*{name}'$"
            ):
                await db.backup(tmp_path / name)
        assert before == {name: hash_tree(tmp_path / name) for name in ("directory", "copy")}
        assert (tmp_path / "file").read_bytes() == b"kept"
        await check_content(db, {b"a": b"1"})


async def test_a_backup_in_memory_does_not_replace_anything_either(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"a", b"1")
        await db.backup("/copy")
        await db.put(b"a", b"2")
        for path in ("/copy", DB):
            with pytest.raises(
                FileExistsError, match=r"the destination of the backup already exists"
            ):
                await db.backup(path)
    async with open_memory_database(files, "/copy") as copy:
        await check_content(copy, {b"a": b"1"})


async def test_a_backup_that_fails_leaves_nothing_and_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with home.open() as db:
        await db.put(b"a", b"1")
        for name in ("create_empty", "finish"):
            if name == "finish":
                monkeypatch.setattr(db._core._files, "finish_directory", fail)
            else:
                monkeypatch.setattr(_local, name, fail)
            with pytest.raises(OSError, match="No space left on device"):
                await db.backup(tmp_path / "copy")
            assert os.listdir(tmp_path) == ["db"]
            monkeypatch.undo()
        await db.backup(tmp_path / "copy")
    async with home.open(home.beside("copy")) as copy:
        await check_content(copy, {b"a": b"1"})


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of file sizes")
def test_a_backup_on_a_disk_that_takes_no_more_says_what_the_system_said(tmp_path: Path) -> None:
    program = """
import os, resource, sys
import trio, trio_wal
async def main():
    async with trio_wal.open_database(sys.argv[1] + "/db") as db:
        for n in range(30):
            await db.put(b"%d" % n, bytes(100_000))
        await db.checkpoint()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, resource.RLIM_INFINITY))
        try:
            await db.backup(sys.argv[1] + "/copy")
        except OSError as exc:
            print(exc.errno, *sorted(os.listdir(sys.argv[1])))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        await db.backup(sys.argv[1] + "/copy")
trio.run(main)
"""
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(arguments, check=True, capture_output=True, encoding="utf-8")
    assert done.stdout == f"{errno.EFBIG} db\n"
    assert sorted(os.listdir(tmp_path)) == ["copy", "db"]


async def test_what_a_killed_backup_left_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)

    def die(*_: Any) -> None:
        raise SystemExit

    async with home.open() as db:
        await db.put(b"a", b"1")
        monkeypatch.setattr(db._core._files, "finish_directory", die)
        monkeypatch.setattr(db._core._files, "discard_directory", lambda temporary: None)
        for count in (1, 2):
            with pytest.raises(SystemExit):
                await db.backup(tmp_path / "copy")
            left = [name for name in os.listdir(tmp_path) if name != "db"]
            assert len(left) == count
            assert all(re.fullmatch(r"copy\.[0-9a-f]{12}\.tmp", name) for name in left)
        monkeypatch.undo()
        await db.backup(tmp_path / "copy")
    async with home.open(home.beside("copy")) as copy:
        await check_content(copy, {b"a": b"1"})


@pytest.mark.parametrize("planted", ["directory", "directory with a file", "file", "link"])
async def test_what_is_planted_where_a_backup_goes_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    home = Home(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "copy"

    def plant(temporary: str, path: str) -> None:
        if planted == "file":
            copy.write_bytes(b"kept")
        elif planted == "link":
            copy.symlink_to(tmp_path / "elsewhere")
        else:
            copy.mkdir()
            if planted != "directory":
                (copy / "kept").touch()
        before = hash_tree(tmp_path)
        try:
            finish_directory(temporary, path)
        finally:
            assert hash_tree(tmp_path) == before

    async with home.open() as db:
        await db.put(b"a", b"1")
        monkeypatch.setattr(db._core._files, "finish_directory", plant)
        with pytest.raises(
            FileExistsError, match=r"the destination of the backup already exists: '.*copy'$"
        ):
            await db.backup(copy)
    assert sorted(os.listdir(tmp_path)) == ["copy", "db", "elsewhere"]
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")
async def test_a_backup_is_its_owners_alone_and_without_what_was_deleted(tmp_path: Path) -> None:
    home = Home(tmp_path)
    before = os.umask(0)
    try:
        async with home.open() as db:
            for number in range(50):
                await db.put(b"%d" % number, b"secret" * 100)
            await db.checkpoint()
            for number in range(50):
                await db.delete(b"%d" % number)
            await db.backup(tmp_path / "parent" / "copy")
    finally:
        os.umask(before)
    for path in (tmp_path / "parent").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
        assert path.is_dir() or b"secret" not in path.read_bytes()


async def test_a_backup_keeps_the_features_of_the_log(home: Home) -> None:
    pytest.importorskip("zstandard", reason="the zstd extra is not installed")
    async with home.open(compression="zstd") as db:
        await db.put(b"a", bytes(10_000))
        await db.backup(home.beside("copy"))
    async with home.open(home.beside("copy")) as copy:
        await copy.put(b"b", bytes(100_000))
        assert copy.wal.statistics().bytes_appended > 100_000
        async with copy.wal.read() as records:
            assert len([record async for record in records]) == 1
        assert (
            copy.wal._log.engine._directory.features == db.wal._log.engine._directory.features != 0
        )


# -- Ctrl-C -------------------------------------------------------------------------

PACKAGE = str(Path(trio_wal.__file__).parent)
INTERRUPTED_FILES = (
    "_database.py", "_core.py", "_mvcc.py", "_viewers.py", "_room.py",
    "_readset.py", "_snapshot.py", "_transaction.py",
    "_layer.py", "_memtable.py", "_checkpoint.py",
)  # fmt: skip


@functools.cache
def is_of_the_database(code: CodeType) -> bool:
    path = code.co_filename
    return path.startswith(PACKAGE) and path.endswith(INTERRUPTED_FILES)


class Interrupter:
    """Counts the lines of the database that run, and presses Ctrl-C at one of them: then there is
    nothing more to count, and nothing is traced any more."""

    def __init__(self, interrupt_at: int) -> None:
        self.lines: list[tuple[str, int]] = []
        self._interrupt_at = interrupt_at

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if is_of_the_database(frame.f_code) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self._interrupt_at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self._line


def life_of_a_database(
    files: MemoryFiles, interrupter: Interrupter, returned: dict[int, bytes]
) -> None:
    """One of everything; what is interrupted is given up, and the rest goes on."""

    async def put(db: Database, key: bytes) -> None:
        returned[await db.put(key, key)] = key

    async def transaction(db: Database, key: bytes) -> None:
        async with db.transaction() as tx:
            assert tx.get(key) is None
            list(tx.scan())
            tx.put(key, key)
        assert tx.lsn is not None
        returned[tx.lsn] = key

    async def read(db: Database) -> None:
        async with db.transaction() as tx:
            tx.get(b"a")
        await db.run(lambda tx: list(tx.scan(limit=1)))

    async def look(db: Database) -> None:
        with db.snapshot() as snap:
            list(snap.scan())
        list(db.scan(reverse=True))
        db.get(b"a")

    async def checkpoint(db: Database) -> None:
        await db.checkpoint()

    async def main() -> None:
        async with open_memory_database(files) as db:
            calls: list[Callable[[], Awaitable[None]]] = [
                lambda: put(db, b"a"),
                lambda: transaction(db, b"b"),
                lambda: checkpoint(db),
                lambda: put(db, b"c"),
                lambda: read(db),
                lambda: look(db),
                lambda: transaction(db, b"d"),
            ]
            interrupted = False
            for call in calls:
                try:
                    await call()
                except KeyboardInterrupt:
                    interrupted = True
            # Whatever was interrupted holds nothing up, nor does it hide anything.
            with trio.fail_after(60):
                lsn = await db.put(b"last", b"last")
                assert await db.checkpoint() == lsn
            assert db.statistics().pending == 0
            state = dict(db.scan())
            assert set(returned.values()) | {b"last"} <= state.keys()
            assert after({}, await commits_of(db)) == state
            if interrupted:
                raise KeyboardInterrupt

    trio._core._run._r.seed(0)  # type: ignore[attr-defined]
    before = sys.gettrace()
    sys.settrace(interrupter)
    try:
        trio.run(main, clock=MockClock(autojump_threshold=0))
    finally:
        sys.settrace(before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a call interrupted before it was awaited
def test_ctrl_c_at_every_line_leaves_the_database_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    counter = Interrupter(0)
    life_of_a_database(MemoryFiles(), counter, {})
    first = {line: number for number, line in reversed(list(enumerate(counter.lines, 1)))}
    assert len(first) > 250

    async def look() -> None:
        async with open_memory_database(files) as db:
            assert db.recovery.clean_shutdown
            assert {db.get(key) for key in returned.values()} == set(returned.values())

    for number in sorted(first.values()):
        files = MemoryFiles()
        returned: dict[int, bytes] = {}
        interrupter = Interrupter(number)
        try:
            life_of_a_database(files, interrupter, returned)
        except KeyboardInterrupt:
            pass
        except BaseException as exc:
            raise AssertionError(interrupter.lines[number - 1]) from exc
        trio.run(look)


# -- snapshots that are not entered --------------------------------------------------


async def test_a_snapshot_keeps_nothing_before_it_is_entered_and_says_so(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"k", b"1")
        snap = db.snapshot()
        uses: list[Callable[[], object]] = [
            lambda: snap.get(b"k"),
            snap.scan,
            lambda: snap.lsn,
            lambda: snap.bookmark,
        ]
        for use in uses:
            with pytest.raises(RuntimeError, match=r"^enter the snapshot first: with db\.snapsho"):
                use()
        assert db.statistics().open_readers == 0
        await db.put(b"k", b"2")
        # Its moment is this one.
        with snap as entered:
            assert entered is snap
            assert (snap.lsn, snap.get(b"k")) == (2, b"2")
            assert db.statistics().open_readers == 1
        with pytest.raises(RuntimeError, match=r"^a snapshot can be used only once$"), snap:
            pass
        for use in uses[:2]:
            with pytest.raises(trio.ClosedResourceError, match=r"^this snapshot is closed$"):
                use()
        late = db.snapshot()
    with pytest.raises(trio.ClosedResourceError, match=r"this database is closed$"), late:
        pass


# -- subclasses of bytes ---------------------------------------------------------------


class Text(bytes):
    """As numpy has one."""


async def test_a_subclass_of_bytes_is_stored_as_the_bytes_that_it_is(home: Home) -> None:
    async with home.open() as db:
        await db.put(Text(b"put"), Text(b"1"))
        async with db.transaction() as tx:
            tx.put(Text(b"tx"), Text(b"1"))
            tx.insert(Text(b"insert"), Text(b"1"))
            tx.update(Text(b"put"), Text(b"2"))
            assert tx.get(Text(b"tx")) == b"1"
            assert Text(b"insert") in tx
            assert len(list(tx.scan(Text(b"i"), Text(b"z")))) == 3
            assert len(list(tx.scan(prefix=Text(b"in")))) == 1
        async with db.transaction() as tx:
            tx.delete(Text(b"tx"))
        await db.delete(Text(b"insert"))
        assert db.get(Text(b"put")) == b"2"
        with db.snapshot() as snap:
            found = [*snap.scan(Text(b"p")), (b"put", snap.get(Text(b"put")))]
        assert found == [(b"put", b"2")] * 2
        assert {type(part) for item in db.scan() for part in item} == {bytes}
        await db.checkpoint()
        await check_content(db, {b"put": b"2"})
    async with home.open() as db:
        await check_content(db, {b"put": b"2"})


class Liar(bytes):
    """Says of itself what it is not."""

    def __len__(self) -> int:
        return 1

    def __bytes__(self) -> bytes:
        return Liar(b"a lie")


async def test_what_a_subclass_of_bytes_says_of_itself_is_of_no_account(files: MemoryFiles) -> None:
    keys = [Liar(bytes([number]) * 400) for number in range(3)]
    async with trio_wal.open_database("/db", files=files, max_record_size=1000) as db:
        with pytest.raises(trio_wal.RecordTooLargeError):
            await db.write(dict.fromkeys(keys))
        with pytest.raises(trio_wal.RecordTooLargeError):
            await db.write({b"key": Liar(bytes(1000))})
        await db.write({Liar(b"written"): Liar(b"1")})
        await db.put(Liar(b"put"), Liar(b"1"))
        assert dict(db.scan()) == {b"put": b"1", b"written": b"1"}
    async with trio_wal.open_wal("/log", files=files, max_record_size=1000) as wal:
        with pytest.raises(trio_wal.RecordTooLargeError):
            await wal.append(Liar(bytes(1001)))
        await wal.append_many([Liar(b"1"), Liar(b"22")])
        async with wal.read() as records:
            assert [record.data async for record in records] == [b"1", b"22"]


async def test_a_log_stores_a_subclass_of_bytes_as_the_bytes_that_it_is(files: MemoryFiles) -> None:
    async with trio_wal.open_wal("/log", files=files) as wal:
        await wal.append(Text(b"1"))
        await wal.append_many([b"2", Text(b"3")])
        await wal.send(Text(b"4"))
        wal.send_nowait(Text(b"5"))
        await wal.flush()
        async with wal.read() as records:
            found = [record.data async for record in records]
    assert found == [b"1", b"2", b"3", b"4", b"5"]
    assert {type(data) for data in found} == {bytes}
