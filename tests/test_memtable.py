"""Versions and views: every reader sees its moment, whatever happens beside it."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from collections.abc import Iterator

import attrs
import pytest
import trio
from databases import (
    Session,
    State,
    check_content,
    hold_with_batch_in_flight,
    open_memory_database,
    open_sessions,
    write,
)
from helpers import Call, open_tasks
from trio.testing import wait_all_tasks_blocked

from trio_wal import Database, Snapshot, _memtable
from trio_wal._memtable import Layer
from trio_wal.testing import MemoryFiles

KEYS = [b"%02d" % n for n in range(10)] + [b"03\0", b"03\0\0", b"03!", b"07 "]


# -- a model beside it -------------------------------------------------------------


@attrs.define(eq=False)
class Written:
    """A commit, as the model knows it."""

    seq: int
    items: dict[bytes, bytes | None]
    call: Call
    durable: bool = False


@attrs.define(eq=False)
class Reading:
    """An open transaction: it sees every commit up to ``seq`` that was not withdrawn."""

    seq: int
    session: Session


@attrs.define(eq=False)
class Model:
    """A database on a disk that only moves when told to, and what must be seen of it."""

    db: Database
    files: MemoryFiles
    nursery: trio.Nursery
    rng: random.Random
    sessions: Iterator[Session]
    durable: State = attrs.Factory(dict)
    written: list[Written] = attrs.Factory(list)
    """Pending and durable ones since the start, without those withdrawn."""
    commits: int = 0
    readings: list[Reading] = attrs.Factory(list)
    snapshots: list[tuple[Snapshot, State]] = attrs.Factory(list)
    checkpoint: Call | None = None
    seen: set[str] = attrs.Factory(set)
    """What happened, to be sure that the interesting did."""

    def state(self, seq: int) -> State:
        state: State = {}
        for commit in self.written:
            if commit.seq <= seq:
                _apply(state, commit.items)
        return state

    async def put(self) -> None:
        count = self.rng.randint(1, 4)
        tag = b"%d" % self.commits
        now = self.state(self.commits)
        items: dict[bytes, bytes | None] = {}
        for key in self.rng.sample(KEYS, count):
            items[key] = None if key in now and self.rng.random() < 0.3 else tag
        if any(value is None for value in items.values()):
            # Deleting is reading: such a commit makes others that are pending stay.
            items = dict.fromkeys(items, tag) if self.rng.random() < 0.5 else items
        self.commits += 1
        call = Call(self.nursery, write, self.db, items)
        self.written.append(Written(self.commits, items, call))
        await wait_all_tasks_blocked()

    async def cancel(self) -> None:
        pending = [commit for commit in self.written if commit.call.state == "waiting"]
        if not pending:
            return
        commit = self.rng.choice(pending)
        commit.call.scope.cancel()
        await wait_all_tasks_blocked()
        if commit.call.state == "cancelled":
            self.written.remove(commit)
            self.seen.add("withdrawn")

    async def move(self) -> None:
        """Let the disk do what there is to do, and stall again."""
        self.files.release()
        await wait_all_tasks_blocked()
        self.files.hold()
        for commit in self.written:
            if not commit.durable and commit.call.state == "returned":
                commit.durable = True
                _apply(self.durable, commit.items)
        assert all(commit.durable for commit in self.written)

    async def freeze(self) -> None:
        if self.checkpoint is None or self.checkpoint.state != "waiting":
            self.checkpoint = Call(self.nursery, self.db.checkpoint)
            await wait_all_tasks_blocked()
            if self.checkpoint.state == "waiting":
                self.seen.add("frozen with pending commits")

    async def begin(self) -> None:
        if len(self.readings) < 4:
            session = next(self.sessions)
            await session.get(self.rng.choice(KEYS))
            self.readings.append(Reading(self.commits, session))

    async def end(self) -> None:
        if self.readings:
            reading = self.readings.pop(self.rng.randrange(len(self.readings)))
            await reading.session.abort()

    async def open_snapshot(self) -> None:
        if len(self.snapshots) < 4:
            self.snapshots.append((self.db.snapshot(), dict(self.durable)))

    async def close_snapshot(self) -> None:
        if self.snapshots:
            snap, _ = self.snapshots.pop(self.rng.randrange(len(self.snapshots)))
            snap.close()

    async def look(self) -> None:
        """Everybody sees what he must see."""
        start, stop = sorted(self.rng.choices([None, *KEYS, b"\xff"], k=2), key=lambda k: k or b"")
        reverse = self.rng.random() < 0.5
        assert list(self.db.scan(start, stop, reverse=reverse)) == _range(
            self.durable, start, stop, reverse
        )
        assert {key: self.db.get(key) for key in KEYS} == {
            key: self.durable.get(key) for key in KEYS
        }
        for snap, state in self.snapshots:
            found = list(snap.scan(start, stop, reverse=reverse))
            assert found == _range(state, start, stop, reverse)
            assert {key: snap.get(key) for key in KEYS} == {key: state.get(key) for key in KEYS}
        if self.readings:
            reading = self.rng.choice(self.readings)
            expected = self.state(reading.seq)
            if self.rng.random() < 0.5:
                key = self.rng.choice(KEYS)
                assert await reading.session.get(key) == expected.get(key)
            else:
                scanned = await reading.session.do(
                    lambda tx: list(tx.scan(start, stop, reverse=reverse))
                )
                assert scanned == _range(expected, start, stop, reverse)


def _apply(state: State, items: dict[bytes, bytes | None]) -> None:
    for key, value in items.items():
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value


def _range(
    state: State, start: bytes | None, stop: bytes | None, reverse: bool
) -> list[tuple[bytes, bytes]]:
    return sorted(
        (
            (key, value)
            for key, value in state.items()
            if (start is None or key >= start) and (stop is None or key < stop)
        ),
        reverse=reverse,
    )


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
        assert db.memtable.view.frozen is not None
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
        assert len(chain(db.memtable.view.active, b"hot")) == 1
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
        assert len(chain(db.memtable.view.active, b"n")) == 1
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
        assert len(chain(db.memtable.view.active, b"k")) == 1
        assert db.statistics().memtable_bytes < 500


LONG_CHAIN = """
from trio_wal._memtable import Layer
layer = Layer()
for number in range(1, 500_001):
    layer.add({b"hot": b"%d" % number}, number, number, keep_older=True)
    layer.settle(number, keep_older=True)
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
        first = db.memtable.view.base
        snap = db.snapshot()
        await db.put(b"k", b"2")
        await db.checkpoint()
        assert db.memtable.view.base is not first
        assert (first._users, first._retired) == (1, True)
        assert snap.get(b"k") == b"1"
        snap.close()
        snap.close()
        assert first._users == 0
        assert db.statistics().open_readers == 0
