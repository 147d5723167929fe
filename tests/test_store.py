"""The store: LMDB and its stand-in keep one contract, and damage has a name."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import pytest
import trio
from campaigns import _mounts
from databases import hash_tree

import trio_wal
from trio_wal import CorruptLogError, _pages, _store_check
from trio_wal._admin import verify_database
from trio_wal._base import MapFull, Store, StoreState
from trio_wal._pages import Contents
from trio_wal._store import LmdbStore, explained
from trio_wal._store_check import LOOK_TRIES, StoreCheck, check_before_open, check_store
from trio_wal._store_files import DATA_NAME, SUSPECT_NAME, data_file, inspect_store
from trio_wal._system import child
from trio_wal._system.files import OsDirectory, OsFile, OsFiles
from trio_wal._util import MiB
from trio_wal.testing import MemoryFiles

TESTS = Path(__file__).parent
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
    "it from the log, otherwise restore a backup; nothing was modified; "
)


@pytest.mark.parametrize(
    "size", [1, 100, 4095, 4096, 8191, 8192, 3 * 4096], ids=lambda size: f"{size} bytes"
)
def test_a_truncated_data_file_is_damage(tmp_path: Path, size: int) -> None:
    file = fill(tmp_path / "store")
    file.write_bytes(file.read_bytes()[:size])
    before = hash_tree(tmp_path)
    with pytest.raises(CorruptLogError, match=rf"^{file}: at offset (0|4096): ") as caught:
        inspect_store(str(tmp_path / "store"))
    assert HOW_TO_GO_ON in str(caught.value)
    assert hash_tree(tmp_path) == before


@pytest.mark.parametrize("garbage", [bytes(8192), b"\xff" * 8192, b"garbage " * 1024])
def test_a_damaged_header_is_damage(tmp_path: Path, garbage: bytes) -> None:
    file = fill(tmp_path / "store")
    content = file.read_bytes()
    file.write_bytes(garbage + content[8192:])
    with pytest.raises(
        CorruptLogError, match=rf"^{file}: at offset 0: this is no header of LMDB; "
    ):
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
    with pytest.raises(CorruptLogError, match=r"^.*data\.mdb: .* \d+: this is no trio-wal store; "):
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
        self.reader_check = environment.reader_check

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
    monkeypatch.setattr(OsDirectory, "reread", lambda self, name: reread.append(name))
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
    assert reread == [DATA_NAME]
    assert store.read().get(b"key") == b"value"
    store.apply([(b"key", b"other")], STATE)
    assert store.read().get(b"key") == b"other"
    store.close()
    assert sorted(os.listdir(path)) == ["data.mdb", "lock.mdb"]


def test_what_a_failed_write_left_to_the_next_process_is_read_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reread: list[str] = []
    monkeypatch.setattr(OsDirectory, "reread", lambda self, name: reread.append(name))
    path = str(tmp_path / "store")
    store = LmdbStore(path, 8 * MiB)
    store.apply([(b"key", b"value")], STATE)
    store._env = _Refusing(store._env)
    with pytest.raises(OSError, match="checkpoint failed"):
        store.apply([(b"key", b"other")], STATE)
    store.close()
    assert inspect_store(path) == STATE
    assert reread == [DATA_NAME]
    LmdbStore(path, 8 * MiB).close()
    assert reread == [DATA_NAME] * 2
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
        db._core._store._env = _Refusing(db._core._store._env)  # type: ignore[attr-defined]
        monkeypatch.setattr(lmdb, "open", fail)
        for _ in range(3):
            with pytest.raises(OSError, match=r"checkpoint failed|Input/output error"):
                await db.checkpoint()
        assert db.statistics().checkpoint_lsn == 0
        # What the log has can be read; what only the store can know cannot, and that is said.
        assert db.get(b"key") == b"value"
        message = (
            r"^\[Errno 5\] the store cannot be read: its file could not be opened again: "
            r"LMDB says: .*: Input/output error: '.*data\.mdb'$"
        )
        unreadable = partial(pytest.raises, OSError, match=message)
        for _ in range(2):
            with unreadable() as caught:
                db.get(b"none")
            cause = caught.value.__cause__
            assert isinstance(cause, OSError)
            assert str(cause).startswith("[Errno 5] LMDB says: ")
            assert isinstance(cause.__cause__, lmdb.Error)
            assert caught.value.filename == cause.filename
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
        db._core._store._env = _Refusing(db._core._store._env)  # type: ignore[attr-defined]
        monkeypatch.setattr(lmdb, "open", fail)
        for _ in range(2):
            with pytest.raises(OSError, match=r"checkpoint failed|Input/output error"):
                await db.checkpoint()
    monkeypatch.undo()
    async with trio_wal.open_database(tmp_path / "db") as db:
        assert dict(db.scan()) == {b"key": b"other"}


async def test_a_store_that_was_found_damaged_when_it_was_opened_again_is_called_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(tmp_path / "db" / "store" / DATA_NAME)

    def fail(*_: Any, **__: Any) -> Any:
        raise lmdb.CorruptedError("mdb_env_open: MDB_CORRUPTED")

    async with trio_wal.open_database(tmp_path / "db") as db:
        await db.put(b"key", b"value")
        db._core._store._env = _Refusing(db._core._store._env)  # type: ignore[attr-defined]
        with pytest.raises(OSError, match=r"checkpoint failed"):
            await db.checkpoint()
        monkeypatch.setattr(lmdb, "open", fail)
        with pytest.raises(CorruptLogError):
            await db.checkpoint()
        with pytest.raises(CorruptLogError) as caught:
            db.get(b"none")
        assert (caught.value.path, caught.value.offset) == (data, 0)
        assert caught.value.reason.startswith(
            "the store cannot be read: its file could not be opened again: LMDB says: mdb_env_open"
        )
        assert isinstance(caught.value.__cause__, CorruptLogError)
        monkeypatch.undo()
        assert await db.checkpoint() == 1
        assert db.get(b"none") is None
    async with trio_wal.open_database(tmp_path / "db") as db:
        assert dict(db.scan()) == {b"key": b"value"}


async def test_checkpoints_go_on_after_a_write_of_the_store_has_failed(tmp_path: Path) -> None:
    async with trio_wal.open_database(tmp_path / "db") as db:
        await db.put(b"key", b"value")
        db._core._store._env = _Refusing(db._core._store._env)  # type: ignore[attr-defined]
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


class _Short:
    """An LMDB environment of whose write the disk takes a part."""

    def __init__(self, environment: Any) -> None:
        self.close, self.info = environment.close, environment.info
        self.reader_check = environment.reader_check

    def begin(self, **_: Any) -> Any:
        raise lmdb.DiskError(f"mdb_txn_commit: {os.strerror(errno.EIO)}")


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (None, errno.EIO),
        (errno.ENOSPC, errno.ENOSPC),
        (errno.EDQUOT, errno.EDQUOT),
        (errno.EIO, errno.EIO),
        (errno.EROFS, errno.EIO),
    ],
)
def test_a_short_write_on_a_full_disk_is_no_failed_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int | None, said: int
) -> None:
    """LMDB calls both EIO; so the system is asked whether there is room."""
    store = LmdbStore(str(tmp_path), 8 * MiB)
    store.apply([(b"key", b"value")], STATE)
    sizes: list[int] = []

    def allocate(self: OsFile, size: int) -> None:
        sizes.append(size)
        self.pwrite([bytes(5)], 0)
        if room is not None:
            raise OSError(room, os.strerror(room))

    monkeypatch.setattr(OsFile, "allocate", allocate)
    store._env = _Short(store._env)
    with pytest.raises(OSError, match=r"checkpoint failed: .*mdb_txn_commit: ") as caught:
        store.apply([(b"key", b"other")], STATE)
    assert caught.value.errno == said
    assert caught.value.filename == str(tmp_path / DATA_NAME)
    assert os.strerror(said) in str(caught.value)
    assert isinstance(caught.value.__cause__, lmdb.DiskError)
    assert sizes == [MiB]
    # What asking took is given back, and later processes are warned all the same.
    assert (tmp_path / SUSPECT_NAME).stat().st_size == 0
    with pytest.raises(MapFull):
        store.apply([(b"key", b"other")], STATE)
    store.grow()
    assert not (tmp_path / SUSPECT_NAME).exists()
    store.apply([(b"key", b"other")], STATE)
    store.close()


FULL = """\
import os, sys
from pathlib import Path
import trio
from campaigns import _mounts, realerrors
import trio_wal

async def main(path):
    options = {"segment_size": 256 * 1024, "checkpoint_bytes": 1 << 30, "map_size": 1 << 26}
    values = {b"%04d" % number: os.urandom(1000) for number in range(400)}
    async with trio_wal.open_database(f"{path}/db", **options) as db:
        for key, value in values.items():
            await db.put(key, value)
        space = os.statvfs(path)
        with open(f"{path}/ballast", "wb") as file:
            size = space.f_bavail * space.f_frsize - int(sys.argv[2])
            os.posix_fallocate(file.fileno(), 0, size)
        for _ in range(2):
            try:
                await db.checkpoint()
            except OSError as exc:
                print(exc.errno)
        assert dict(db.scan()) == values
    try:
        async with trio_wal.open_database(f"{path}/db", **options | {"checkpoint_bytes": 1000}):
            pass
    except OSError as exc:
        print(exc.errno)
    os.unlink(f"{path}/ballast")
    async with trio_wal.open_database(f"{path}/db", **options) as db:
        assert await db.checkpoint() == len(values)
        assert dict(db.scan()) == values

with realerrors._disk(Path(sys.argv[1]), realerrors.SMALL) as (mounted, _):
    trio.run(main, mounted)
"""


@pytest.mark.parametrize("left", [10_000, 60_000, 200_000])
def test_a_checkpoint_on_a_real_disk_that_is_full_says_so(tmp_path: Path, left: int) -> None:
    if (reason := _mounts.why_not(["ext4"])) is not None:
        pytest.skip(reason)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path, str(left)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(errno.ENOSPC)] * 3


@pytest.mark.parametrize(
    "number",
    [
        *(errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EROFS, errno.EFBIG, errno.EDQUOT),
        *(errno.ENOMEM, errno.EAGAIN, errno.ENOLCK, errno.EINTR, errno.EINVAL, errno.ENOTSUP),
    ],
)
def test_an_error_of_the_disk_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = tmp_path / "store"
    name = fill(path)

    def fail(*_: Any, **__: Any) -> Any:
        raise lmdb.Error(f"{path}: {os.strerror(number)}")

    monkeypatch.setattr(lmdb, "open", fail)
    with pytest.raises(OSError, match=r"LMDB says: .*store: ") as caught:
        LmdbStore(str(path), 8 * MiB)
    assert (caught.value.errno, caught.value.filename) == (number, str(name))
    assert ("; map_size of " in str(caught.value)) == (number == errno.ENOMEM)


# -- what must not reach anybody ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "number"),
    [
        (lmdb.CorruptedError("mdb_get: MDB_CORRUPTED"), CorruptLogError, None),
        (lmdb.PageNotFoundError("mdb_get: MDB_PAGE_NOTFOUND"), CorruptLogError, None),
        (lmdb.InvalidError("mdb_env_open: MDB_INVALID"), CorruptLogError, None),
        (lmdb.VersionMismatchError("MDB_VERSION_MISMATCH"), CorruptLogError, None),
        (lmdb.BadTxnError("mdb_cursor_get: MDB_BAD_TXN"), CorruptLogError, None),
        (lmdb.PanicError("mdb_txn_begin: MDB_PANIC"), OSError, errno.EIO),
        (lmdb.ReadersFullError("MDB_READERS_FULL"), OSError, errno.EAGAIN),
        (lmdb.MemoryError(f"mdb: {os.strerror(errno.ENOMEM)}"), OSError, errno.ENOMEM),
        (lmdb.DiskError(f"mdb: {os.strerror(errno.ENOSPC)}"), OSError, errno.ENOSPC),
        (lmdb.Error("something else"), OSError, errno.EIO),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_error_of_lmdb_is_damage_only_where_it_says_so(
    error: Exception, kind: type[Exception], number: int | None
) -> None:
    found = explained(error, "/db/store", "what happened")
    assert type(found) is kind or isinstance(found, kind)
    assert str(error) in str(found)
    assert "/db/store/data.mdb" in str(found)
    assert getattr(found, "errno", None) == number


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of address space is Linux's")
def test_too_little_memory_for_the_map_is_an_os_error_that_names_map_size(tmp_path: Path) -> None:
    fill(tmp_path / "db" / "store")
    shutil.move(tmp_path / "db" / "store", tmp_path / "store")
    program = """
import resource, sys
from trio_wal._store import LmdbStore
import lmdb
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30),) * 2)
try:
    LmdbStore(sys.argv[1], 1 << 36)
except OSError as exc:
    print(exc.errno, exc)
"""
    arguments = [sys.executable, "-c", program, str(tmp_path / "store")]
    done = subprocess.run(arguments, check=True, capture_output=True, encoding="utf-8")
    assert done.stdout.startswith(f"{errno.ENOMEM} ")
    assert f"; map_size of {1 << 36} bytes of address space was not to be had" in done.stdout


def leaves_of_data(content: bytearray) -> Iterator[int]:
    for offset in range(2 * 4096, len(content), 4096):
        page = content[offset : offset + 4096]
        if page[10] == 2 and not any(name in page for name in (b"data", b"format")):
            yield offset


async def damaged_database(path: Path) -> None:
    """One that was closed in order, and whose pages of data are of no kind: LMDB sees that."""
    async with trio_wal.open_database(path) as db:
        for number in range(100):
            await db.put(b"%05d" % number, bytes(100))
        await db.checkpoint()
    file = path / "store" / "data.mdb"
    content = bytearray(file.read_bytes())
    for offset in leaves_of_data(content):
        content[offset + 10] = 0
    file.write_bytes(content)


async def test_every_way_to_read_a_damaged_store_says_so(tmp_path: Path) -> None:
    await damaged_database(tmp_path / "db")
    corrupt = partial(
        pytest.raises, CorruptLogError, match=rf"^{tmp_path}/db/store/data\.mdb: at offset 0: "
    )
    async with trio_wal.open_database(tmp_path / "db") as db:
        with corrupt():
            db.get(b"00050")
        for reverse in (False, True):
            with corrupt():
                list(db.scan(reverse=reverse))
            with corrupt():
                list(db.scan(b"00050", b"00060", reverse=reverse))
        with db.snapshot() as snapshot:
            with corrupt():
                snapshot.get(b"00050")
            with corrupt():
                list(snapshot.scan())
        async with db.transaction() as tx:
            with corrupt():
                tx.get(b"00050")
            with corrupt():
                assert b"00050" in tx
            with corrupt():
                list(tx.scan())
            tx.abort()
        with corrupt():
            await db.delete(b"00050")
        with corrupt():
            await db.backup(tmp_path / "copy")
        await db.put(b"00050", b"new")
        assert db.get(b"00050") == b"new"
        with corrupt():
            db.get(b"00051")
        with corrupt():
            await db.checkpoint()
        assert db.statistics().checkpoint_lsn == 100
    assert sorted(os.listdir(tmp_path)) == ["db"]


async def test_a_checkpoint_by_itself_of_a_damaged_store_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await damaged_database(tmp_path / "db")
    async with trio_wal.open_database(tmp_path / "db", checkpoint_bytes=1) as db:
        failed = trio.Event()
        original = db._core.checkpointer._failed

        def note(*arguments: Any) -> None:
            original(*arguments)
            failed.set()

        monkeypatch.setattr(db._core.checkpointer, "_failed", note)
        await db.put(b"00050", b"new")
        await failed.wait()
        await db.put(b"00051", b"new")
        assert db.get(b"00051") == b"new"
    assert "checkpoint failed, will try again: CorruptLogError" in caplog.text


# -- what stands where a store should ------------------------------------------------------------


def _hard_link(path: Path, outside: Path) -> None:
    path.hardlink_to(outside / "file")


PLACES = {
    "a link to a file": lambda path, outside: path.symlink_to(outside / "file"),
    "a link to an empty file": lambda path, outside: path.symlink_to(outside / "empty"),
    "a link to a directory": lambda path, outside: path.symlink_to(outside / "directory"),
    "a link to nothing": lambda path, outside: path.symlink_to(outside / "nothing"),
    "a FIFO": lambda path, outside: os.mkfifo(path),
    "a directory": lambda path, outside: path.mkdir(),
    "a hard link": _hard_link,
}


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and FIFOs")
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("name", ["store", "log", "store/data.mdb", "store/lock.mdb"])
async def test_nothing_but_a_regular_file_of_its_own_is_opened(
    tmp_path: Path, name: str, kind: str
) -> None:
    if kind == "a directory" and "/" not in name:
        return
    async with trio_wal.open_database(tmp_path / "db") as db:
        await db.put(b"key", b"value")
        await db.checkpoint()
    outside = tmp_path / "outside"
    (outside / "directory").mkdir(parents=True)
    (outside / "empty").touch()
    (outside / "file").write_bytes(b"precious\n" * 10_000)
    place = tmp_path / "db" / name
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink()
    PLACES[kind](place, outside)
    before = hash_tree(outside)
    message = rf"^{place}: at offset 0: (a symbolic link and )?not a (regular file|directory)"
    for _ in range(2):
        with pytest.raises(CorruptLogError, match=message):
            async with trio_wal.open_database(tmp_path / "db"):
                pass
        assert hash_tree(outside) == before
    await trio.to_thread.run_sync(_verify_finds_something, tmp_path / "db")
    assert hash_tree(outside) == before


def _verify_finds_something(path: Path) -> None:
    found = verify_database(
        f"{path}/log",
        f"{path}/store",
        lambda: OsFiles().open_directory(f"{path}/log", follow=False),
    )
    assert found.findings


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_mark_is_no_way_out_either(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    (tmp_path / "store" / "suspect").symlink_to(tmp_path / "outside")
    for call in (inspect_store, partial(LmdbStore, map_size=8 * MiB)):
        with pytest.raises(CorruptLogError, match=r"suspect: at offset 0: not a regular file"):
            call(str(tmp_path / "store"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_store_is_looked_at_again_before_it_is_opened_again(tmp_path: Path) -> None:
    store = LmdbStore(str(tmp_path / "store"), 8 * MiB)
    store._suspect = True
    (tmp_path / "outside").touch()
    (tmp_path / "store" / "data.mdb").unlink()
    (tmp_path / "store" / "data.mdb").symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptLogError, match=r"data\.mdb: at offset 0: not a regular file"):
        store.grow()
    assert (tmp_path / "outside").read_bytes() == b""


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fill(tmp_path / "store")
    original = lmdb.open

    def swap(*arguments: Any, **options: Any) -> Any:
        opened = original(*arguments, **options)
        file.rename(tmp_path / "away")
        shutil.copy(tmp_path / "away", file)
        return opened

    monkeypatch.setattr(lmdb, "open", swap)
    with pytest.raises(CorruptLogError, match=r"the file was replaced while it was opened"):
        LmdbStore(str(tmp_path / "store"), 8 * MiB)
    monkeypatch.undo()
    LmdbStore(str(tmp_path / "store"), 8 * MiB).close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a way to name a descriptor")
def test_a_store_that_is_swapped_for_a_link_while_it_is_opened_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "store")
    (tmp_path / "outside").mkdir()
    original = lmdb.open

    def swap(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "store").symlink_to(tmp_path / "outside")
        return original(*arguments, **options)

    monkeypatch.setattr(lmdb, "open", swap)
    LmdbStore(str(tmp_path / "store"), 8 * MiB).close()
    assert os.listdir(tmp_path / "outside") == []


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")
@pytest.mark.parametrize("mask", [0o277, 0o077, 0])
def test_no_umask_decides_who_may_read_a_store_or_a_copy_of_it(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        store = LmdbStore(str(tmp_path / "store"), 8 * MiB)
        store.copy(str(tmp_path / "copy"))
        store.close()
    finally:
        os.umask(before)
    for name in ("store/data.mdb", "store/lock.mdb", "copy/data.mdb"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    for name in ("store", "copy"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_what_was_deleted_is_not_copied(tmp_path: Path) -> None:
    store = LmdbStore(str(tmp_path / "store"), 8 * MiB)
    secrets = [(b"%05d" % n, b"secret-%05d" % n * 20) for n in range(500)]
    store.apply(secrets, StoreState(UUID, 7))
    store.apply([(key, None) for key, _ in secrets], StoreState(UUID, 8))
    store.copy(str(tmp_path / "copy"))
    store.close()
    assert b"secret-" in (tmp_path / "store" / "data.mdb").read_bytes()
    assert b"secret-" not in (tmp_path / "copy" / "data.mdb").read_bytes()
    assert inspect_store(str(tmp_path / "copy")) == StoreState(UUID, 8)


# -- checking all of it ---------------------------------------------------------------------------


def test_a_sound_store_is_found_sound(tmp_path: Path) -> None:
    assert check_store(str(tmp_path / "store")).bytes == 0
    file = fill(tmp_path / "store", count=1000)
    before = hash_tree(tmp_path)
    told: list[tuple[int, int]] = []
    found = check_store(str(tmp_path / "store"), lambda *done: told.append(done))
    size = file.stat().st_size
    assert found == StoreCheck(str(file), (), StoreState(UUID, 7), 1000, size)
    assert told[-1] == (size, size)
    assert hash_tree(tmp_path) == before


def test_a_store_that_cannot_be_read_in_a_child_is_checked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "store")
    monkeypatch.setattr(sys, "executable", "")
    found = check_store(str(tmp_path / "store"))
    assert (found.findings, found.keys) == ((), 100)
    assert found.note.startswith("the pages were checked, but the store was not read through LMDB")
    check_before_open(str(tmp_path / "store"), "child", None)
    assert "there is no Python interpreter to start" in caplog.text


@pytest.mark.parametrize(
    ("ending", "finding", "note"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGBUS)", "(SIGBUS)", ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "", "SIGKILL"),
        ("raise ValueError('what it says')", "", "exit code 1: ValueError: what it says"),
        ("pass", "", "the child process did not answer"),
        ('print(\'{"keys": 3, "wrong": "", "refused": ""}\')', "3 keys of 100", ""),
        ('print(\'{"keys": 0, "wrong": "bad", "refused": ""}\')', "bad", ""),
        ('print(\'{"keys": 0, "wrong": "", "refused": "no"}\')', "", "LMDB: no"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_the_end_of_the_child_is_a_finding_where_it_tells_of_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, finding: str, note: str
) -> None:
    fill(tmp_path / "store")
    monkeypatch.setattr(child, "_CHILD", ending.replace("{", "{{").replace("}", "}}"))
    found = check_store(str(tmp_path / "store"))
    assert [finding in reason for _, reason in found.findings] == [True] * bool(finding)
    assert note in found.note
    assert bool(note) == bool(found.note)


def test_the_child_imports_nothing_of_the_folder_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "store")
    for name in ("json.py", "lmdb.py", "trio.py", "trio_wal.py", "sitecustomize.py"):
        (tmp_path / name).write_text("import os; os._exit(7)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", ["", ".", *sys.path])
    assert check_store(str(tmp_path / "store")).note == ""


def test_findings_count_only_where_the_store_stood_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "store")
    looks = 0

    def look(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        return Contents(((0, "as it was for an instant"),), 0, {})

    monkeypatch.setattr(_pages, "check", look)
    # As if checkpoints went on all the time.
    monkeypatch.setattr(_store_check, "_headers", lambda file: b"%d" % looks)
    found = check_store(str(tmp_path / "store"))
    assert (found.findings, looks) == ((), LOOK_TRIES)
    assert found.note == "the store was being written all the time, and could not be judged"
    monkeypatch.setattr(_store_check, "_headers", lambda file: b"")
    assert check_store(str(tmp_path / "store")).findings == ((0, "as it was for an instant"),)


# -- before it is opened --------------------------------------------------------------------------


@pytest.fixture
async def killed(tmp_path: Path) -> Path:
    """A database that was not closed, with a page that LMDB would not survive."""
    async with trio_wal.open_database(tmp_path / "db") as db:
        for number in range(100):
            await db.put(b"%05d" % number, bytes(100))
        await db.checkpoint()
        shutil.copytree(tmp_path / "db", tmp_path / "killed")
    break_slots(tmp_path / "db" / "store" / "data.mdb")
    break_slots(tmp_path / "killed" / "store" / "data.mdb")
    return tmp_path / "killed"


def break_slots(file: Path) -> None:
    """The slots of the data's pages lead out of them."""
    content = bytearray(file.read_bytes())
    for offset in leaves_of_data(content):
        content[offset + 16 : offset + 18] = b"\xfe\xff"
    file.write_bytes(content)


async def test_after_a_crash_a_damaged_store_is_refused(killed: Path) -> None:
    before = hash_tree(killed)
    message = r"data\.mdb: at offset \d+: a node lies at 65534, outside of the page; "
    with pytest.raises(CorruptLogError, match=message):
        async with trio_wal.open_database(killed):
            pass
    assert hash_tree(killed) == before
    async with trio_wal.open_database(killed, verify_store="none"):
        pass


async def test_a_store_can_be_checked_at_every_open(killed: Path) -> None:
    closed = killed.with_name("db")
    async with trio_wal.open_database(closed):
        pass
    with pytest.raises(CorruptLogError, match=r"a node lies at 65534, outside of the page; "):
        async with trio_wal.open_database(closed, verify_store="child"):
            pass


async def test_a_large_store_is_not_checked_unasked(
    killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store_check, "AUTO_BYTES_MAX", 4096)
    async with trio_wal.open_database(killed):
        pass


async def test_a_check_tells_how_far_it_is(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"verify_store": "child"}
    options["on_verify_progress"] = lambda *done: told.append(done)
    async with trio_wal.open_database(tmp_path / "db", **options) as db:
        await db.put(b"key", b"value")
        await db.checkpoint()
    assert not told
    async with trio_wal.open_database(tmp_path / "db", **options) as db:
        assert db.get(b"key") == b"value"
    assert told
    assert told[-1][0] == told[-1][1] > 0


def test_how_a_store_is_checked_must_be_one_of_three(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^verify_store must be one of"):
        trio_wal.open_database(tmp_path, verify_store="yes")  # type: ignore[arg-type]
