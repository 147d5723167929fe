"""`open_database_reader`: another process's database, followed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from databases import DB, Home, State, commits_of, hash_tree, open_memory_database, write
from trio.testing import MockClock, assert_checkpoints, assert_no_checkpoints

import trio_wal
from trio_wal import (
    Bookmark,
    CorruptLogError,
    DatabaseReader,
    LogDivergedError,
    Table,
    UntrustedDirectoryError,
    WrongDirectoryError,
    _follower,
    _layer,
)
from trio_wal._engine import Tail
from trio_wal._follower import Follower
from trio_wal._identity import branch, epoch_of
from trio_wal._watchsource import WatchSource
from trio_wal.testing import MemoryFiles


def open_reader(files: MemoryFiles, path: str = DB) -> Any:
    return trio_wal.open_database_reader(path, files=files)


async def check_reader(reader: DatabaseReader, expected: State) -> None:
    items = sorted(expected.items())
    assert list(reader.scan()) == items
    assert list(reader.scan(reverse=True)) == items[::-1]
    with reader.snapshot() as snap:
        assert list(snap.scan()) == items
    async with reader.stream() as pairs:
        assert [pair async for pair in pairs] == items
    for key, value in items:
        assert reader.get(key) == value
    assert reader.get(b"nothing") is None
    assert reader.get(b"nothing", 0) == 0


async def test_it_shows_what_is_durable_and_follows(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        async with open_reader(files) as reader:
            await check_reader(reader, {b"a": b"1", b"b": b"1"})
            assert (reader.path, reader.uuid, reader.epoch) == (db.path, db.uuid, db.epoch)
            with reader.snapshot() as before:
                lsn = await write(db, {b"a": b"2", b"b": None, b"c": b"2"})
                with assert_checkpoints():
                    await reader.wait_for(lsn)
                await check_reader(reader, {b"a": b"2", b"c": b"2"})
                assert dict(before.scan()) == {b"a": b"1", b"b": b"1"}
                assert before.lsn == 1
            assert reader.bookmark == db.wal.bookmark
            assert reader.durable_lsn == lsn
            files.hold()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(db.put, b"a", b"not durable")
                await trio.sleep(0.1)
                assert reader.get(b"a") == b"2"
                files.release()
        # Nobody owns it now.
    async with open_reader(files) as reader:
        assert reader.get(b"a") == b"not durable"


async def test_it_lets_go_of_what_the_store_has(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(_follower, "CHECK_BYTES", 1)
    monkeypatch.setattr(_follower, "CHECK_SECONDS", 0.0)
    expected: State = {}
    async with open_memory_database(files) as db, open_reader(files) as reader:
        with reader.snapshot() as old:
            for number in range(100):
                key = b"%d" % number
                expected[key] = b"%d" % number
                lsn = await db.put(key, expected[key])
                if number % 9 == 0:
                    await db.checkpoint()
                await reader.wait_for(lsn)
                await check_reader(reader, expected)
            assert list(old.scan()) == []
            assert len(reader._follower._former) == 1
        statistics = reader.statistics()
        assert statistics.following
        assert statistics.checkpoint_lsn > 50
        assert statistics.memtable_keys < 50
        assert (statistics.durable_lsn, statistics.open_readers) == (100, 0)


async def test_an_epoch_that_begins_behind_what_is_seen_is_known(files: MemoryFiles) -> None:
    """The owner's next life finds less than others were told: here only the word was wrong."""
    async with open_memory_database(files) as db:
        for number in range(3):
            await db.put(b"a", b"%d" % number)
    async with open_reader(files) as reader:
        before = reader.bookmark
        directory = files.open_directory(f"{DB}/log")
        directory.publish(5, before.epoch)
        directory.close()
        async with open_memory_database(files) as db:
            assert db.recovery.lost_lsn == 5
            assert db.epoch > before.epoch
            with trio.fail_after(60):
                await reader.wait_for(db.wal.bookmark)
                await reader.wait_for(before)
                await db.put(b"a", b"new")
                await reader.wait_for(db.wal.bookmark)
            assert reader.get(b"a") == b"new"
            assert reader.bookmark == db.wal.bookmark
            with reader.snapshot() as snap:
                assert snap.bookmark == db.wal.bookmark
            with pytest.raises(LogDivergedError):
                await reader.wait_for(Bookmark(4, before.epoch))


async def test_what_was_read_and_is_lost_is_seen_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the log of a killed owner has rotted: a reader that had it goes back."""
    path = tmp_path / "db"
    may_look = trio.Event()
    original = WatchSource.refresh

    async def refresh(source: WatchSource) -> None:
        await may_look.wait()
        await original(source)

    program = (
        "import os, sys, trio, trio_wal\n"
        "async def main():\n"
        "    async with trio_wal.open_database(sys.argv[1]) as db:\n"
        "        for number in range(5):\n"
        "            await db.put(b'a', b'%d' % number * 5000)\n"
        "        print('ready', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    arguments = [sys.executable, "-c", program, str(path)]
    process = await trio.lowlevel.open_process(arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert b"ready" in await process.stdout.receive_some()
    async with trio_wal.open_database_reader(path) as reader:
        # The owner's own task knows a moment before others are told.
        await reader.wait_for(5)
        lost = reader.bookmark
        assert (lost.lsn, reader.get(b"a", b"")[:1]) == (5, b"4")
        with reader.snapshot() as old:
            process.kill()
            await process.wait()
            # One that looked before the next owner had the log's end mended would call it damaged.
            monkeypatch.setattr(WatchSource, "refresh", refresh)
            zero_frame(path, b"4" * 5000)
            with trio.fail_after(60):
                async with owner_of(path, b"new") as bookmark:
                    may_look.set()
                    await reader.wait_for(bookmark)
                    assert reader.get(b"a") == b"new"
                    assert reader.bookmark == bookmark
                    with pytest.raises(LogDivergedError):
                        await reader.wait_for(lost)
            assert old.get(b"a", b"")[:1] == b"4"


def zero_frame(path: Path, data: bytes) -> None:
    """Take a frame, the last one, out of a log's file."""
    for segment in path.glob("log/wal-*.log"):
        content = segment.read_bytes()
        place = content.find(data)
        if place >= 0:
            with segment.open("r+b") as file:
                file.seek(place // 512 * 512)
                file.write(bytes(len(content) - place // 512 * 512))


@asynccontextmanager
async def owner_of(path: Path, value: bytes) -> AsyncIterator[Bookmark]:
    """Another process that owns a database, and has put one value."""
    program = (
        "import sys, trio, trio_wal\n"
        "async def main():\n"
        "    async with trio_wal.open_database(sys.argv[1]) as db:\n"
        "        await db.put(b'a', sys.argv[2].encode())\n"
        "        print(db.wal.bookmark, flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    arguments = [sys.executable, "-c", program, str(path), value.decode()]
    process = await trio.lowlevel.open_process(arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield Bookmark.parse((await process.stdout.receive_some()).decode().strip())
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def test_pieces_of_a_checkpoint_are_not_seen_early(files: MemoryFiles) -> None:
    """The store may have a piece of a checkpoint, and not the LSN that it belongs to."""
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        await db.checkpoint()
        await write(db, {b"a": b"2", b"b": b"2"})
        # The first piece of the next one.
        db._core._store.apply([(b"a", b"2")], None)
        async with open_reader(files) as reader:
            assert reader.statistics().checkpoint_lsn == 1
            await check_reader(reader, {b"a": b"2", b"b": b"2"})


async def test_a_piece_of_what_came_after_the_last_look_is_not_seen_early(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_database(files) as db, open_reader(files) as reader:
        await write(db, {b"a": b"1", b"b": b"1"})
        await db.checkpoint()
        await reader.wait_for(1)
        follower = reader._follower
        with monkeypatch.context() as patch:
            patch.setattr(follower.source, "look", lambda: None)
            await write(db, {b"a": b"2", b"b": b"2"})
            db._core._store.apply([(b"a", b"2")], None)
        stream = await follower.begin()
        await stream.__aexit__(None, None, None)
        await check_reader(reader, {b"a": b"2", b"b": b"2"})


def test_what_was_cut_since_it_was_seen_does_not_count_as_seen() -> None:
    """Here the history has parted after LSN 4, and 9 was seen before."""
    history = branch((), 4, bytes(4))
    epoch = epoch_of(history)
    follower: Any = SimpleNamespace(
        lsn=9, epoch=0, source=SimpleNamespace(tail=Tail(1, 9, 9, history))
    )
    seen = [Follower.sees(follower, Bookmark(lsn, epoch)) for lsn in (4, 5, 9)]
    assert seen == [True, False, False]
    follower.epoch = epoch
    assert Follower.sees(follower, Bookmark(9, epoch))
    assert not Follower.sees(follower, Bookmark(10, epoch))


async def test_a_snapshot_keeps_its_moment_however_often_a_key_changes(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, open_reader(files) as reader:
        seen: list[tuple[Any, bytes]] = []
        for number in range(6):
            await reader.wait_for(await db.put(b"a", b"%d" % number))
            seen.append((reader.snapshot().__enter__(), b"%d" % number))
            await reader.wait_for(await db.put(b"a", b"between"))
            for snap, value in seen:
                assert snap.get(b"a") == value
        for snap, _ in seen:
            snap.close()


async def test_a_store_that_is_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "db"
    retention = trio_wal.KeepSegments(1)
    async with trio_wal.open_database(path, segment_size=1, retention=retention) as db:
        for number in range(100):
            await db.put(b"a", b"%d" % number * 500)
        await db.checkpoint()
        for _ in range(6000):
            if db.wal.first_lsn > 1:
                break
            await trio.sleep(0.01)
    shutil.rmtree(path / "store")
    with pytest.raises(CorruptLogError, match=r"the store ends at LSN 0, but its log starts at"):
        async with trio_wal.open_database_reader(path):
            pass


async def test_it_begins_anew_where_the_log_was_dropped(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """As one that was stopped for a while."""
    async with open_memory_database(files, segment_size=1) as db, open_reader(files) as reader:
        source = reader._follower.source
        look = source.look
        monkeypatch.setattr(source, "look", lambda: None)
        with reader.snapshot() as old:
            await trio.sleep(0.1)
            for number in range(300):
                await db.put(b"%d" % (number % 10), b"x" * 100)
                if number % 50 == 0:
                    await db.checkpoint()
            await db.checkpoint()
            for _ in range(1000):
                if db.wal.first_lsn > 1:
                    break
                await trio.sleep(0.01)
            assert db.wal.first_lsn > 1
            assert reader.durable_lsn == 0
            monkeypatch.setattr(source, "look", look)
            with trio.fail_after(60):
                await reader.wait_for(300)
            await check_reader(reader, dict(db.scan()))
            assert list(old.scan()) == []
        await db.put(b"a", b"")
        await reader.wait_for(301)


async def test_changes_tables_and_waiting(files: MemoryFiles) -> None:
    table = Table("t", key=int, value=str)
    async with open_memory_database(files) as db, open_reader(files) as reader:
        async with db.transaction() as tx:
            table.put(tx, 1, "one")
        await reader.wait_for(db.wal.bookmark)
        assert table.get(reader, 1) == "one"
        assert list(table.scan(reader)) == [(1, "one")]
        with reader.snapshot() as snap:
            assert table.get(snap, 1) == "one"
        async with reader.changes() as commits:
            assert await commits.__anext__() == (await commits_of(db))[0]
        with assert_checkpoints():
            await reader.wait_for(0)
        with trio.move_on_after(0.05) as scope:
            await reader.wait_for(2)
        assert scope.cancelled_caught
        with pytest.raises(LogDivergedError):
            await reader.wait_for(Bookmark(1, db.epoch + 1))
        with pytest.raises(ValueError, match="lsn_or_bookmark must be at least 0"):
            await reader.wait_for(-1)
        with assert_no_checkpoints():
            reader.get(b"x")
            reader.statistics()


async def test_a_closed_reader_says_so(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, open_reader(files) as reader:
        await db.put(b"a", b"1")
        await reader.wait_for(1)
        snap = reader.snapshot().__enter__()

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await reader.wait_for(100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            with assert_checkpoints():
                await reader.aclose()
        for call in (
            lambda: reader.get(b"a"),
            reader.scan,
            reader.stream,
            reader.snapshot,
            reader.changes,
            reader.statistics,
            lambda: reader.durable_lsn,
            lambda: snap.get(b"a"),
        ):
            with pytest.raises(trio.ClosedResourceError):
                call()
        await reader.aclose()
        assert db.get(b"a") == b"1"


def damage(path: Path) -> None:
    (segment,) = path.glob("log/wal-*.log")
    with segment.open("r+b") as file:
        file.seek(4096 + 2 * 5632 + 1000)
        file.write(b"\xff" * 8)


async def test_damage_is_told_by_every_call(tmp_path: Path) -> None:
    home = Home(tmp_path)
    async with home.open() as db:
        for _ in range(5):
            await db.put(b"a", b"x" * 5000)
    damage(Path(home.path))
    with pytest.raises(CorruptLogError):
        async with trio_wal.open_database_reader(home.path):
            pass


@pytest.mark.parametrize("what", ["log", "nothing", "file", "missing"])
async def test_what_is_no_database_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "it"
    error: type[Exception] = WrongDirectoryError
    if what == "log":
        async with trio_wal.open_wal(path):
            pass
    elif what == "nothing":
        path.mkdir(mode=0o700)
    elif what == "file":
        path.write_bytes(b"")
    else:
        error = FileNotFoundError
    before = hash_tree(tmp_path)
    with pytest.raises(error):
        async with trio_wal.open_database_reader(path):
            pass
    assert hash_tree(tmp_path) == before


async def test_another_logs_store_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        async with trio_wal.open_database(tmp_path / name) as db:
            await db.put(b"a", b"")
            await db.checkpoint()
    shutil.rmtree(tmp_path / "one" / "store")
    shutil.copytree(tmp_path / "two" / "store", tmp_path / "one" / "store")
    with pytest.raises(CorruptLogError, match="the store belongs to another log"):
        async with trio_wal.open_database_reader(tmp_path / "one"):
            pass


async def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "db"
    async with trio_wal.open_database(path) as db:
        await db.put(b"a", b"")
    path.chmod(0o777)
    with pytest.raises(UntrustedDirectoryError):
        async with trio_wal.open_database_reader(path):
            pass
    async with trio_wal.open_database_reader(path, trust_directory=True) as reader:
        assert reader.get(b"a") == b""


async def test_a_backup_is_read_and_stays_as_it_was(tmp_path: Path) -> None:
    home = Home(tmp_path)
    async with home.open() as db:
        await db.put(b"a", b"1")
        await db.backup(home.beside("copy"))
    before = hash_tree(home.beside("copy"))
    async with trio_wal.open_database_reader(home.beside("copy")) as reader:
        await check_reader(reader, {b"a": b"1"})
    after = hash_tree(home.beside("copy"))
    # LMDB's table of who reads, and nothing else.
    after.pop("store/lock.mdb", None)
    before.pop("store/lock.mdb", None)
    assert after == before


async def test_any_number_of_readers_in_one_process(tmp_path: Path) -> None:
    home = Home(tmp_path)
    async with home.open() as db:
        await db.put(b"a", b"1")
        await db.checkpoint()
    opening = trio_wal.open_database_reader
    async with opening(home.path) as first:
        async with opening(home.path) as second, opening(home.path) as third:
            for reader in (first, second, third):
                assert reader.get(b"a") == b"1"
        # Those that are closed have taken nothing along.
        with first.snapshot() as snap:
            assert snap.get(b"a") == b"1"
    async with opening(home.path) as reader:
        assert reader.get(b"a") == b"1"
    # Nothing is open any more: the owner's own would be refused.
    async with home.open() as db:
        assert db.get(b"a") == b"1"


async def test_the_owners_own_process_is_told_to_read_its_database(tmp_path: Path) -> None:
    home = Home(tmp_path)
    async with home.open() as db:
        await db.put(b"a", b"1")
        await db.checkpoint()
        with pytest.raises(OSError, match="read through its Database"):
            async with trio_wal.open_database_reader(home.path):
                pass
        assert db.get(b"a") == b"1"


OWNER = """\
import random, sys, trio, trio_wal

async def main(path, seed):
    rng = random.Random(seed)
    async with trio_wal.open_database(path, checkpoint_bytes=30_000, segment_size=8_000) as db:
        number = int(db.get(b"count", b"0"))
        print("open", flush=True)
        while True:
            number += 1
            async with db.transaction() as tx:
                tx.put(b"count", b"%d" % number)
                for _ in range(rng.randrange(6)):
                    tx.put(b"k%d" % rng.randrange(40), b"%d" % number)
                tx.delete_range(prefix=b"k%d" % rng.randrange(40))
            print(tx.lsn, number, flush=True)

trio.run(main, sys.argv[1], int(sys.argv[2]))
"""


@asynccontextmanager
async def owner(path: str, seed: int) -> AsyncIterator[Any]:
    arguments = [sys.executable, "-c", OWNER, path, str(seed)]
    process = await trio.lowlevel.open_process(arguments, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


def check_moment(items: State, changes: dict[int, State], lsn: int) -> None:
    """What is seen at an LSN is what the commits up to it make."""
    assert items == changes[lsn], lsn


@pytest.mark.parametrize("seed", range(2))
async def test_each_moment_of_another_process_is_one_that_was(tmp_path: Path, seed: int) -> None:
    """An owner that checkpoints and drops its log all the time, and is killed and begins again."""
    rng = random.Random(seed)
    path = str(tmp_path / "db")
    moments: list[tuple[int, int]] = []
    async with trio_wal.open_database(path):
        pass
    async with trio_wal.open_database_reader(path) as reader:
        for life in range(4):
            async with owner(path, 10 * seed + life) as process:
                await process.stdout.receive_some(1)
                with trio.move_on_after(0.5 + rng.random()):
                    while True:
                        with reader.snapshot() as snap:
                            items = dict(snap.scan())
                            number = int(items.get(b"count", b"0"))
                            assert all(int(value) <= number for value in items.values())
                            assert snap.lsn == number
                            if items:
                                assert snap.get(b"count") == b"%d" % number
                        moments.append((snap.lsn, len(items)))
                        await trio.sleep(0.001)
                os.kill(process.pid, signal.SIGKILL)
        assert moments == sorted(moments, key=lambda moment: moment[0])
        async with reader.changes(None) as commits:
            first = await commits.__anext__()
        assert first.lsn >= 1
        await reader.aclose()
    async with trio_wal.open_database(path) as db:
        final = dict(db.scan())
        assert int(final[b"count"]) >= moments[-1][0]
    async with trio_wal.open_database_reader(path) as reader:
        assert dict(reader.scan()) == final


async def test_killed_readers_are_forgotten_at_the_next_checkpoint(tmp_path: Path) -> None:
    home = Home(tmp_path)
    program = (
        "import sys, trio, trio_wal\n"
        "async def main():\n"
        "    async with trio_wal.open_database_reader(sys.argv[1]) as reader:\n"
        "        with reader.snapshot():\n"
        "            print('reading', flush=True)\n"
        "            await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    async with home.open() as db:
        await db.put(b"a", b"1")
        await db.checkpoint()
        arguments = [sys.executable, "-c", program, home.path]
        process = await trio.lowlevel.open_process(arguments, stdout=subprocess.PIPE)
        assert process.stdout is not None
        await process.stdout.receive_some(1)
        process.kill()
        await process.wait()
        await db.put(b"a", b"2")
        await db.checkpoint()
        assert db._core._store._env.reader_check() == 0


@pytest.mark.parametrize("seed", range(sys.version_info[1] % 3, 12, 3))
async def test_each_moment_is_what_its_commits_make(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, seed: int
) -> None:
    """Whatever the owner's checkpoints take along, and whenever they come."""
    monkeypatch.setattr(_follower, "CHECK_BYTES", 1)
    monkeypatch.setattr(_follower, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(_layer, "BURIED_TOGETHER", 1)
    rng = random.Random(seed)
    model: State = {}
    async with open_memory_database(files, segment_size=1) as db, open_reader(files) as reader:
        for _ in range(150):
            keys = [b"%d" % number for number in rng.sample(range(30), rng.randrange(1, 12))]
            async with db.transaction() as tx:
                for key in keys:
                    if rng.random() < 0.5:
                        tx.discard(key)
                        model.pop(key, None)
                    else:
                        tx.put(key, model.setdefault(key, b"%d" % rng.randrange(100)))
            if rng.random() < 0.7:
                await reader.wait_for(db.wal.bookmark)
                await check_reader(reader, model)
            if rng.random() < 0.1:
                await db.checkpoint()
        await reader.wait_for(db.wal.bookmark)
        await check_reader(reader, model)
        assert reader.statistics().checkpoint_lsn > 0


async def test_one_process_has_the_file_open_once(tmp_path: Path) -> None:
    path = str(tmp_path / "db")
    says = "this process has the database open already: read through its Database, and close"
    async with trio_wal.open_database(path) as db:
        await db.put(b"a", b"1")
        await db.checkpoint()
        with pytest.raises(OSError, match=says) as told:
            async with trio_wal.open_database_reader(path):
                pass
        assert told.value.errno == errno.EBUSY
        await db.put(b"b", b"2")
    async with trio_wal.open_database_reader(path) as reader:
        with pytest.raises(OSError, match=says) as told:
            async with trio_wal.open_database(path):
                pass
        assert told.value.errno == errno.EBUSY
        assert dict(reader.scan()) == {b"a": b"1", b"b": b"2"}
    # It was nothing that the store must be suspected for.
    async with trio_wal.open_database(path) as db:
        assert dict(db.scan()) == {b"a": b"1", b"b": b"2"}
        assert sorted(os.listdir(tmp_path / "db" / "store")) == ["data.mdb", "lock.mdb"]


# -- copies ---------------------------------------------------------------------------------


async def test_a_copy_of_what_is_seen(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        for number in range(30):
            await db.put(b"%02d" % number, b"v" * 50)
            if number == 10:
                await db.checkpoint()
        await db.delete(b"03")
        async with open_reader(files) as reader:
            await reader.wait_for(31)
            expected = dict(reader.scan())
            assert await reader.backup("/copy") == 31
            with pytest.raises(FileExistsError):
                await reader.backup("/copy")
    async with trio_wal.open_database("/copy", files=files) as copy:
        assert dict(copy.scan()) == expected
        assert copy.durable_lsn == 31
        assert await copy.put(b"x", b"y") == 32


async def test_a_copy_larger_than_its_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_wal._copying.PIECE_BYTES", 100_000)
    monkeypatch.setattr("trio_wal._follower.Follower.store_bytes", lambda self: 0)
    async with trio_wal.open_database(tmp_path / "db", checkpoint_bytes=1 << 20) as db:
        for number in range(30):
            async with db.transaction() as tx:
                tx.put(b"%02d" % number, bytes([number]) * 1_500_000)
    async with trio_wal.open_database_reader(tmp_path / "db") as reader:
        assert await reader.backup(tmp_path / "copy") == 30
    async with trio_wal.open_database(tmp_path / "copy") as copy:
        assert dict(copy.scan()) == {
            b"%02d" % number: bytes([number]) * 1_500_000 for number in range(30)
        }


async def test_a_copy_that_is_cancelled_or_fails_leaves_nothing(tmp_path: Path) -> None:
    async with trio_wal.open_database(tmp_path / "db") as db:
        await db.put(b"a", b"b")
    async with trio_wal.open_database_reader(tmp_path / "db") as reader:
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                await reader.backup(tmp_path / "copy")
            assert os.listdir(tmp_path) == ["db"]
        with pytest.raises(NotADirectoryError):
            await reader.backup(tmp_path / "db" / "log" / "log.meta" / "copy")
    with pytest.raises(trio.ClosedResourceError):
        await reader.backup(tmp_path / "copy")
