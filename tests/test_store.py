"""The store: LMDB and its stand-in keep one contract, and damage has a name."""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import pytest
from databases import hash_tree

import trio_wal
from trio_wal import CorruptLogError, _store
from trio_wal._store import LmdbStore, MapFull, Store, StoreState, data_file, inspect_store
from trio_wal._util import MiB
from trio_wal.testing import MemoryFiles

UUID = bytes(range(16))
STATE = StoreState(UUID, 7)


@pytest.fixture(params=["lmdb", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened: Store
    if request.param == "lmdb":
        opened = LmdbStore(str(tmp_path / "store"), 8 * MiB)
    else:
        opened = MemoryFiles().open_store("/store", 8 * MiB)
    yield opened
    opened.close()


def fill(path: Path, *, lsn: int = 7, count: int = 100) -> Path:
    """A closed store; returns its data file."""
    store = LmdbStore(str(path), 8 * MiB)
    store.apply([(b"%05d" % n, bytes(100)) for n in range(count)], StoreState(UUID, lsn))
    store.close()
    return path / "data.mdb"


# -- the contract ------------------------------------------------------------------


def test_what_is_applied_is_read(store: Store) -> None:
    store.apply([(b"a", b"1"), (b"b", b""), (b"c", b"3")], STATE)
    store.apply([(b"a", b"2"), (b"c", None), (b"absent", None)], StoreState(UUID, 8))
    read = store.read()
    assert [read.get(key) for key in (b"a", b"b", b"c", b"absent")] == [b"2", b"", None, None]
    assert list(read.items(None, None, False)) == [(b"a", b"2"), (b"b", b"")]
    assert store.statistics()[0] == 2
    read.close()


def test_a_read_sees_its_moment_whatever_is_applied_later(store: Store) -> None:
    store.apply([(b"a", b"1"), (b"b", b"1")], STATE)
    read = store.read()
    items = read.items(None, None, False)
    assert next(items) == (b"a", b"1")
    store.apply([(b"a", b"2"), (b"b", None), (b"c", b"2")], StoreState(UUID, 8))
    assert list(items) == [(b"b", b"1")]
    assert (read.get(b"a"), read.get(b"c")) == (b"1", None)
    later = store.read()
    assert list(later.items(None, None, True)) == [(b"c", b"2"), (b"a", b"2")]
    read.close()
    later.close()


def test_items_are_those_of_a_sorted_dict_between_any_bounds(store: Store) -> None:
    rng = random.Random(1)
    longest = b"\xff" * 511
    keys = {rng.randbytes(rng.choice((1, 1, 2, 3))) for _ in range(60)}
    keys |= {b"a" * 511, b"a" * 510 + b"b", b"b" * 511, longest}
    store.apply([(key, key[::-1]) for key in sorted(keys)], STATE)
    bounds: list[bytes | None] = [None, b"", b"\0", b"\xff", longest, longest + b"\0", longest * 2]
    bounds += [b"a" * 511 + b"\0", b"a" * 512, b"a" * 600, *rng.sample(sorted(keys), 10)]
    read = store.read()
    for start in bounds:
        for stop in bounds:
            expected = [
                (key, key[::-1])
                for key in sorted(keys)
                if (start is None or key >= start) and (stop is None or key < stop)
            ]
            assert list(read.items(start, stop, False)) == expected, (start, stop)
            assert list(read.items(start, stop, True)) == expected[::-1], (start, stop)
    read.close()


def test_an_empty_store_has_no_items(store: Store) -> None:
    read = store.read()
    for reverse in (False, True):
        assert list(read.items(None, None, reverse)) == []
        assert list(read.items(b"a", b"b", reverse)) == []
    assert read.get(b"a") is None
    read.close()


# -- LMDB --------------------------------------------------------------------------


def test_the_state_stands_beside_the_data(tmp_path: Path) -> None:
    assert inspect_store(str(tmp_path / "store")) is None
    fill(tmp_path / "store", lsn=2**40)
    before = hash_tree(tmp_path)
    assert inspect_store(str(tmp_path / "store")) == StoreState(UUID, 2**40)
    assert hash_tree(tmp_path) == before


def test_a_store_that_never_had_a_checkpoint_has_no_state(tmp_path: Path) -> None:
    LmdbStore(str(tmp_path / "store"), 8 * MiB).close()
    assert inspect_store(str(tmp_path / "store")) is None


def test_a_piece_of_a_checkpoint_does_not_say_that_it_is_complete(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    store = LmdbStore(path, 1 * MiB)
    store.apply([(b"a", b"1")], None)
    store.close()
    assert inspect_store(path) is None, "the first checkpoint was never complete"
    store = LmdbStore(path, 1 * MiB)
    store.apply([(b"b", b"1")], STATE)
    store.apply([(b"a", None), (b"b", b"2")], None)
    store.close()
    assert inspect_store(path) == STATE
    store = LmdbStore(path, 1 * MiB)
    read = store.read()
    assert list(read.items(None, None, False)) == [(b"b", b"2")]
    read.close()
    store.close()


def test_a_full_map_changes_nothing_and_can_grow(tmp_path: Path) -> None:
    store = LmdbStore(str(tmp_path / "store"), 1 * MiB)
    store.apply([(b"a", b"1")], STATE)
    large = [(b"%05d" % n, bytes(10_000)) for n in range(3000)]
    with pytest.raises(MapFull):
        store.apply([(b"a", None), *large], StoreState(UUID, 9))
    read = store.read()
    assert list(read.items(None, None, False)) == [(b"a", b"1")]
    read.close()
    grown = 0
    while True:
        try:
            store.apply([(b"a", None), *large], StoreState(UUID, 9))
            break
        except MapFull:
            store.grow()
            grown += 1
    assert grown == 2  # 16 MiB is the least
    read = store.read()
    assert list(read.items(None, None, False)) == large
    read.close()
    store.close()
    assert inspect_store(str(tmp_path / "store")) == StoreState(UUID, 9)


def test_a_store_that_outgrew_its_map_size_opens_with_it_again(tmp_path: Path) -> None:
    store = LmdbStore(str(tmp_path / "store"), 32 * MiB)
    store.apply([(b"%05d" % n, bytes(1000)) for n in range(5000)], STATE)
    store.close()
    store = LmdbStore(str(tmp_path / "store"), 1 * MiB)
    store.apply([(b"new", bytes(1000))], StoreState(UUID, 8))
    assert store.statistics()[0] == 5001
    store.close()


def test_what_lmdb_cannot_do_is_an_os_error(tmp_path: Path) -> None:
    store = LmdbStore(str(tmp_path / "store"), 8 * MiB)
    with pytest.raises(OSError, match=r"checkpoint failed: .*MDB_BAD_VALSIZE"):
        store.apply([(b"a", b"1"), (b"k" * 512, b"")], STATE)
    assert store.statistics()[0] == 0
    store.close()


def test_a_copy_is_whole_and_independent(tmp_path: Path) -> None:
    store = LmdbStore(str(tmp_path / "store"), 8 * MiB)
    store.apply([(b"a", b"1")], STATE)
    store.copy(str(tmp_path / "copy" / "store"))
    store.apply([(b"a", b"2")], StoreState(UUID, 8))
    store.close()
    assert inspect_store(str(tmp_path / "copy" / "store")) == STATE
    copy = LmdbStore(str(tmp_path / "copy" / "store"), 8 * MiB)
    read = copy.read()
    assert read.get(b"a") == b"1"
    read.close()
    copy.close()


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")
def test_only_the_owner_may_read_the_files(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    for name in ("data.mdb", "lock.mdb"):
        assert stat.S_IMODE((tmp_path / "store" / name).stat().st_mode) == 0o600


def test_the_log_alone_does_not_load_lmdb(tmp_path: Path) -> None:
    program = """
import sys, trio, trio_wal
async def main():
    async with trio_wal.open_wal(sys.argv[1]) as wal:
        await wal.append(b"")
trio.run(main)
sys.exit("lmdb" in sys.modules)
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "log")]
    assert subprocess.run(arguments, check=False).returncode == 0


# -- damage ------------------------------------------------------------------------

HOW_TO_GO_ON = (
    "; where the log still starts at LSN 1, moving the store away lets open_database rebuild "
    "it from the log, otherwise restore a backup; nothing was modified, "
)


@pytest.mark.parametrize(
    "size", [1, 100, 4095, 4096, 8191, 8192, 3 * 4096], ids=lambda size: f"{size} bytes"
)
def test_a_truncated_data_file_is_damage(tmp_path: Path, size: int) -> None:
    file = fill(tmp_path / "store")
    file.write_bytes(file.read_bytes()[:size])
    before = hash_tree(tmp_path)
    with pytest.raises(CorruptLogError, match=rf"^{file}: at offset 0: ") as caught:
        inspect_store(str(tmp_path / "store"))
    assert HOW_TO_GO_ON in str(caught.value)
    assert hash_tree(tmp_path) == before


@pytest.mark.parametrize("garbage", [bytes(8192), b"\xff" * 8192, b"garbage " * 1024])
def test_a_damaged_header_is_damage(tmp_path: Path, garbage: bytes) -> None:
    file = fill(tmp_path / "store")
    content = file.read_bytes()
    file.write_bytes(garbage + content[8192:])
    with pytest.raises(CorruptLogError, match=rf"^{file}: at offset 0: LMDB says: "):
        inspect_store(str(tmp_path / "store"))


def test_no_flipped_bit_in_the_header_breaks_anything_but_the_store(tmp_path: Path) -> None:
    """LMDB has no checksums: not every flip is found, but none may crash or hang."""
    file = fill(tmp_path / "store")
    content = bytearray(file.read_bytes())
    refused = 0
    # Magic, version, map size, flags and roots of both headers lie in their first 152 bytes.
    for offset in (*range(152), *range(4096, 4096 + 152)):
        for bit in (0, 6):
            content[offset] ^= 1 << bit
            file.write_bytes(content)
            content[offset] ^= 1 << bit
            try:
                inspect_store(str(tmp_path / "store"))
            except CorruptLogError:
                refused += 1
    assert refused > 20


def test_a_foreign_lmdb_file_is_refused(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "store")) as env, env.begin(write=True) as txn:
        txn.put(b"somebody's", b"data")
    before = hash_tree(tmp_path)
    with pytest.raises(CorruptLogError, match=r"^.*data\.mdb: .* 0: this is no trio-wal store; "):
        inspect_store(str(tmp_path / "store"))
    assert hash_tree(tmp_path) == before


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (b"lsn", None, "the store does not say of which log it is the state"),
        (b"log", None, "the store does not say of which log it is the state"),
        (b"format", None, "the store does not say of which log it is the state"),
        (b"lsn", b"7", "the store does not say of which log it is the state"),
        (b"log", b"7", "the store does not say of which log it is the state"),
        (b"format", struct.pack("<H", 2), "store format 2 is not known"),
    ],
)
def test_a_store_that_does_not_say_what_it_is_is_refused(
    tmp_path: Path, key: bytes, value: bytes | None, reason: str
) -> None:
    fill(tmp_path / "store")
    with lmdb.open(str(tmp_path / "store"), max_dbs=2) as env:
        meta = env.open_db(b"meta")
        with env.begin(write=True, db=meta) as txn:
            if value is None:
                txn.delete(key)
            else:
                txn.put(key, value)
    with pytest.raises(CorruptLogError, match=rf"^.*data\.mdb: at offset 0: {reason}; "):
        inspect_store(str(tmp_path / "store"))


def test_the_data_file_is_where_lmdb_puts_it(tmp_path: Path) -> None:
    assert data_file(str(tmp_path / "store")) == str(fill(tmp_path / "store"))


# -- errors of the disk ------------------------------------------------------------------------


class _Refusing:
    """An LMDB environment after a write of its own has failed."""

    def __init__(self, environment: Any) -> None:
        self.close, self.info = environment.close, environment.info

    def begin(self, **_: Any) -> Any:
        raise lmdb.PanicError("mdb_txn_begin: MDB_PANIC: Update of meta page failed")


def test_a_store_whose_own_write_has_failed_can_be_looked_at_and_closed(tmp_path: Path) -> None:
    store = LmdbStore(str(tmp_path / "store"), 8 * MiB)
    store.apply([(b"key", b"value")], STATE)
    before = store.statistics()
    store._env = _Refusing(store._env)
    with pytest.raises(OSError, match=r"checkpoint failed: mdb_txn_begin: MDB_PANIC"):
        store.apply([(b"key", b"other")], STATE)
    assert store.statistics() == before
    store.close()


def test_after_a_failed_write_a_store_is_read_from_the_disk_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reread: list[str] = []
    monkeypatch.setattr(_store, "reread_file", reread.append)
    path = str(tmp_path / "store")
    store = LmdbStore(path, 8 * MiB)
    store.apply([(b"key", b"value")], STATE)
    store._env = _Refusing(store._env)
    with pytest.raises(OSError, match="checkpoint failed"):
        store.apply([(b"key", b"other")], STATE)
    for _ in range(2):
        with pytest.raises(MapFull):
            store.apply([(b"key", b"other")], STATE)
    assert not reread
    assert store.crowded(0)
    store.grow()
    assert not store.crowded(0)
    assert reread == [data_file(path)]
    assert store.read().get(b"key") == b"value"
    store.apply([(b"key", b"other")], STATE)
    assert store.read().get(b"key") == b"other"
    store.close()
    assert sorted(os.listdir(path)) == ["data.mdb", "lock.mdb"]


def test_what_a_failed_write_left_to_the_next_process_is_read_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reread: list[str] = []
    monkeypatch.setattr(_store, "reread_file", reread.append)
    path = str(tmp_path / "store")
    store = LmdbStore(path, 8 * MiB)
    store.apply([(b"key", b"value")], STATE)
    store._env = _Refusing(store._env)
    with pytest.raises(OSError, match="checkpoint failed"):
        store.apply([(b"key", b"other")], STATE)
    store.close()
    assert inspect_store(path) == STATE
    assert reread == [data_file(path)]
    LmdbStore(path, 8 * MiB).close()
    assert reread == [data_file(path)] * 2
    LmdbStore(path, 8 * MiB).close()
    assert inspect_store(path) == STATE
    assert len(reread) == 2


async def test_a_store_that_cannot_be_opened_again_is_tried_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise lmdb.Error(f"{tmp_path}: {os.strerror(errno.EIO)}")

    async with trio_wal.open_database(tmp_path / "db") as db:
        await db.put(b"key", b"value")
        db.store._env = _Refusing(db.store._env)  # type: ignore[attr-defined]
        monkeypatch.setattr(lmdb, "open", fail)
        for _ in range(3):
            with pytest.raises(OSError, match=r"checkpoint failed|Input/output error"):
                await db.checkpoint()
        assert db.statistics().checkpoint_lsn == 0
        # What the log has can be read; what only the store can know cannot, and that is said.
        assert db.get(b"key") == b"value"
        unreadable = partial(pytest.raises, OSError, match="the store cannot be read")
        with unreadable():
            db.get(b"none")
        with unreadable():
            list(db.scan())
        with db.snapshot() as snapshot, unreadable():
            snapshot.get(b"none")
        async with db.transaction() as tx:
            with unreadable():
                tx.get(b"none")
        with pytest.raises(OSError, match=r"Input/output error"):
            await db.backup(tmp_path / "copy")
        await db.put(b"key", b"newer")
        monkeypatch.undo()
        assert await db.checkpoint() == 2
        assert db.get(b"key") == b"newer"
        assert db.get(b"none") is None
    async with trio_wal.open_database(tmp_path / "db") as db:
        await db.put(b"key", b"other")
        db.store._env = _Refusing(db.store._env)  # type: ignore[attr-defined]
        monkeypatch.setattr(lmdb, "open", fail)
        for _ in range(2):
            with pytest.raises(OSError, match=r"checkpoint failed|Input/output error"):
                await db.checkpoint()
    monkeypatch.undo()
    async with trio_wal.open_database(tmp_path / "db") as db:
        assert dict(db.scan()) == {b"key": b"other"}


async def test_checkpoints_go_on_after_a_write_of_the_store_has_failed(tmp_path: Path) -> None:
    async with trio_wal.open_database(tmp_path / "db") as db:
        await db.put(b"key", b"value")
        db.store._env = _Refusing(db.store._env)  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="checkpoint failed"):
            await db.checkpoint()
        assert db.get(b"key") == b"value"
        await db.put(b"key", b"other")
        assert await db.checkpoint() == 2
        assert db.get(b"key") == b"other"
        assert db.statistics().checkpoint_lsn == 2
    async with trio_wal.open_database(tmp_path / "db") as db:
        assert dict(db.scan()) == {b"key": b"other"}
        assert db.recovery.checkpoint_lsn == 2


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EROFS, errno.EFBIG, errno.EDQUOT]
)
def test_an_error_of_the_disk_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "store"
    name = fill(path)

    def fail(*_: Any, **__: Any) -> Any:
        raise lmdb.Error(f"{path}: {os.strerror(number)}")

    monkeypatch.setattr(lmdb, "open", fail)
    for call in (lambda: inspect_store(str(path)), lambda: LmdbStore(str(path), 8 * MiB)):
        with pytest.raises(OSError, match=r"LMDB says: .*store: ") as caught:
            call()
        assert (caught.value.errno, caught.value.filename) == (number, str(name))
