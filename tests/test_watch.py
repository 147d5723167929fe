"""`Database.wait_changed`: nobody misses a commit, and nobody is woken by another's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from databases import hold_with_batch_in_flight, open_memory_database, write
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

import trio_wal
from trio_wal import Database, LogDivergedError, LogFailedError, LsnTruncatedError, _watch
from trio_wal.testing import MemoryFiles


class Waiting:
    """A task in `wait_changed`."""

    def __init__(self, db: Database, nursery: trio.Nursery, **what: Any) -> None:
        self.lsn: int | None = None
        self.error: BaseException | None = None
        self.scope = trio.CancelScope()
        self._db = db
        self._what = what
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        with self.scope:
            try:
                self.lsn = await self._db.wait_changed(**self._what)
            except (trio_wal.WalError, trio.ClosedResourceError) as exc:
                self.error = exc


async def test_who_waits_is_woken_by_what_touches_it(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        await db.put(b"job:1", b"")
        key = Waiting(db, nursery, key=b"job:1")
        prefix = Waiting(db, nursery, prefix=b"job:")
        other = Waiting(db, nursery, prefix=b"mail:")
        short = Waiting(db, nursery, key=b"job:")
        anything = Waiting(db, nursery)
        await wait_all_tasks_blocked()
        await db.put(b"x", b"")
        await wait_all_tasks_blocked()
        assert (key.lsn, prefix.lsn, anything.lsn) == (None, None, 2)
        await db.put(b"job:2", b"")
        await wait_all_tasks_blocked()
        assert (key.lsn, prefix.lsn) == (None, 3)
        await db.delete(b"job:1")
        await wait_all_tasks_blocked()
        assert (key.lsn, other.lsn, short.lsn) == (4, None, None)
        await write(db, {b"a": b"", b"mail:": b"", b"job:": b""})
        await wait_all_tasks_blocked()
        assert (other.lsn, short.lsn) == (5, 5)


@pytest.mark.parametrize("what", [{"key": b"ab"}, {"prefix": b"a"}, {"prefix": b"ab"}, {}])
async def test_one_alone_is_woken(files: MemoryFiles, what: dict[str, Any]) -> None:
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        waiting = Waiting(db, nursery, **what)
        await wait_all_tasks_blocked()
        if what:
            await db.put(b"b", b"")
            await wait_all_tasks_blocked()
            assert waiting.lsn is None
        lsn = await db.put(b"ab", b"")
        await wait_all_tasks_blocked()
        assert waiting.lsn == lsn


async def test_only_durable_commits_wake(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        waiting = Waiting(db, nursery, key=b"a")
        await wait_all_tasks_blocked()
        files.hold()
        nursery.start_soon(db.put, b"a", b"1")
        await wait_all_tasks_blocked()
        assert waiting.lsn is None
        files.release()
        await wait_all_tasks_blocked()
        assert waiting.lsn == 1


async def test_what_is_withdrawn_wakes_nobody(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        waiting = Waiting(db, nursery, key=b"a")
        await hold_with_batch_in_flight(files, nursery, db)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(db.put, b"a", b"1")
                await wait_all_tasks_blocked()
                scope.cancel()
        files.release()
        await db.put(b"b", b"")
        await wait_all_tasks_blocked()
        assert waiting.lsn is None
        waiting.scope.cancel()


async def test_with_the_last_result_none_is_missed(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        assert await db.put(b"a", b"") == 1
        # Nobody had waited before: the log knows.
        with assert_checkpoints():
            assert await db.wait_changed(b"a", since=0) == 1
        await db.put(b"a", b"")
        await db.put(b"a", b"")
        await db.put(b"b", b"")
        with assert_checkpoints():
            assert await db.wait_changed(b"a", since=1) == 3
        assert await db.wait_changed(b"a", since=2) == 3
        assert await db.wait_changed(prefix=b"", since=3) == 4
        with trio.move_on_after(0.01) as scope:
            await db.wait_changed(b"a", since=3)
        assert scope.cancelled_caught


async def test_what_memory_has_forgotten_the_log_knows(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_watch, "COMMITS_REMEMBERED", 4)
    async with open_memory_database(files) as db:
        with trio.move_on_after(0):
            await db.wait_changed(b"a")
        await db.put(b"a", b"")
        for number in range(10):
            await db.put(b"b", b"%d" % number)
        assert await db.wait_changed(b"a", since=0) == 1
        assert await db.wait_changed(b"b", since=1) in range(2, 12)
        assert await db.wait_changed(b"b", since=10) == 11
        with trio.move_on_after(0.01) as scope:
            await db.wait_changed(b"a", since=1)
        assert scope.cancelled_caught


async def test_commits_of_one_batch_are_told_apart(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        with trio.move_on_after(0):
            await db.wait_changed(b"a")
        waiting = Waiting(db, nursery, key=b"3")
        prefix = Waiting(db, nursery, prefix=b"long ")
        await hold_with_batch_in_flight(files, nursery, db)
        names = (b"0", b"1", b"2", b"3", b"long name")
        for name in names:
            nursery.start_soon(db.put, name, b"")
            await wait_all_tasks_blocked()
        files.release()
        await wait_all_tasks_blocked()
        assert db.wal.statistics().batches_synced == 2
        assert (waiting.lsn, prefix.lsn) == (5, 6)
        for lsn, name in enumerate(names, 2):
            for since in range(lsn):
                assert await db.wait_changed(name, since=since) == lsn
            with trio.move_on_after(0.01) as scope:
                await db.wait_changed(name, since=lsn)
            assert scope.cancelled_caught
        assert await db.wait_changed(prefix=b"", since=3) == 6


async def test_a_batch_is_forgotten_as_a_whole(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_watch, "COMMITS_REMEMBERED", 4)
    async with open_memory_database(files) as db:
        with trio.move_on_after(0):
            await db.wait_changed(b"a")
        async with trio.open_nursery() as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            for number in range(6):
                nursery.start_soon(db.put, b"%d" % number, b"")
            await wait_all_tasks_blocked()
            files.release()
        watches = db._core.versions.watches
        assert (watches.known_from, len(watches._recent)) == (7, 0)
        found = [await db.wait_changed(b"%d" % number, since=0) for number in range(6)]
        assert sorted(found) == [2, 3, 4, 5, 6, 7]
        await db.put(b"a", b"")
        assert (watches.known_from, len(watches._recent)) == (7, 1)
        assert await db.wait_changed(b"a", since=7) == 8


async def test_memory_is_bounded_by_keys_too(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_watch, "KEYS_REMEMBERED", 10)
    async with open_memory_database(files) as db:
        with trio.move_on_after(0):
            await db.wait_changed(b"a")
        await write(db, {b"%d" % number: b"" for number in range(20)})
        assert await db.wait_changed(b"7", since=0) == 1
        await db.put(b"a", b"")
        assert await db.wait_changed(b"a", since=1) == 2


async def test_what_nobody_knows_any_more_is_told(files: MemoryFiles) -> None:
    retention = trio_wal.KeepSegments(1)
    async with open_memory_database(files, segment_size=1, retention=retention) as db:
        for number in range(200):
            await db.put(b"a", b"x" * 100)
            if number % 50 == 0:
                await db.checkpoint()
        for _ in range(6000):
            if db.wal.first_lsn > 1:
                break
            await trio.sleep(0.01)
        with pytest.raises(LsnTruncatedError):
            await db.wait_changed(b"b", since=0)


@pytest.mark.parametrize("durability", ["interval", "none"])
async def test_it_waits_for_less_than_a_sync_too(files: MemoryFiles, durability: Any) -> None:
    async with (
        open_memory_database(files, durability=durability, flush_interval=1000.0) as db,
        trio.open_nursery() as nursery,
    ):
        await db.put(b"a", b"")
        assert await db.wait_changed(b"a", since=0) == 1
        waiting = Waiting(db, nursery, key=b"a")
        await wait_all_tasks_blocked()
        await db.put(b"a", b"")
        await wait_all_tasks_blocked()
        assert waiting.lsn == 2
        # What it was told it may ask with, though no sync has reached that.
        again = Waiting(db, nursery, key=b"a", since=2)
        await wait_all_tasks_blocked()
        assert (again.lsn, again.error) == (None, None)
        again.scope.cancel()


async def test_who_waits_in_vain_is_told(files: MemoryFiles) -> None:
    async with trio.open_nursery() as nursery:
        async with open_memory_database(files) as db:
            closed = Waiting(db, nursery, key=b"a")
            await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert isinstance(closed.error, trio.ClosedResourceError)
        with pytest.raises(trio.ClosedResourceError):
            await db.wait_changed(b"a")


async def test_who_waits_is_told_of_a_broken_log(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        waiting = Waiting(db, nursery, prefix=b"a")
        await wait_all_tasks_blocked()
        files.fail("sync")
        with pytest.raises(LogFailedError):
            await db.put(b"b", b"")
        await wait_all_tasks_blocked()
        assert isinstance(waiting.error, LogFailedError)
        with pytest.raises(LogFailedError):
            await db.wait_changed(b"a")


async def test_who_waits_no_more_is_forgotten(files: MemoryFiles) -> None:
    whats: list[dict[str, Any]] = [{"key": b"a"}, {"prefix": b"a"}, {"prefix": b"ab"}, {}]
    async with open_memory_database(files) as db:
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for what in whats * 2:
                    Waiting(db, nursery, **what)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            woken = [Waiting(db, nursery, **what) for what in whats]
            await wait_all_tasks_blocked()
            await db.put(b"ab", b"")
            await db.put(b"a", b"")
        assert [waiting.lsn for waiting in woken] == [2, 1, 1, 1]
        watches = db._core.versions.watches
        assert (watches._by_key, watches._by_prefix) == ({}, {})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"key": b"a", "prefix": b"a"}, ValueError, "prefix cannot be combined with key"),
        ({"key": b""}, ValueError, "key must have 1 to 511 bytes"),
        ({"key": "a"}, TypeError, "key must be bytes"),
        ({"prefix": "a"}, TypeError, "prefix must be bytes"),
        ({"since": -1}, ValueError, "since must be at least 0"),
        ({"since": "1"}, TypeError, "since must be an int"),
        ({"since": 2}, LogDivergedError, "2@"),
    ],
)
async def test_bad_arguments_are_refused(
    files: MemoryFiles, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"a", b"")
        with pytest.raises(error, match=message):
            await db.wait_changed(**arguments)


@pytest.mark.parametrize("seed", range(4))
async def test_many_who_wait_see_what_a_model_says(files: MemoryFiles, seed: int) -> None:
    rng = random.Random(seed)
    names = [b"%c%c" % (a, b) for a in b"abc" for b in b"abc"]
    touched: list[tuple[int, bytes]] = []
    seen: dict[int, list[int]] = {}

    async def follow(db: Database, number: int, what: dict[str, Any]) -> None:
        lsn = 0
        while True:
            lsn = await db.wait_changed(**what, since=lsn)
            seen[number].append(lsn)
            for _ in range(rng.randrange(4)):
                await trio.lowlevel.checkpoint()

    async def write_some(db: Database) -> None:
        for _ in range(40):
            keys = rng.sample(names, rng.randrange(1, 4))
            lsn = await db.write(dict.fromkeys(keys, rng.choice([b"", None])))
            touched.extend((lsn, key) for key in keys)

    whats: list[dict[str, Any]] = [{"key": name} for name in names]
    whats += [{"prefix": name[:1]} for name in names[::3]] + [{"prefix": b""}]
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        for number, what in enumerate(whats):
            seen[number] = []
            nursery.start_soon(follow, db, number, what)
        async with trio.open_nursery() as writers:
            for _ in range(3):
                writers.start_soon(write_some, db)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    for number, what in enumerate(whats):
        matching = {
            lsn
            for lsn, key in touched
            if key == what.get("key") or ("prefix" in what and key.startswith(what["prefix"]))
        }
        lsns = seen[number]
        assert lsns == sorted(set(lsns))
        assert set(lsns) <= matching
        # The last one is never missed: it covers those before.
        assert lsns[-1:] == sorted(matching)[-1:]
