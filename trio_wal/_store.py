"""The base of the database: checkpointed state in LMDB.

Law: the only file that knows lmdb, which is imported when a database is opened.  An LMDB
write transaction belongs to one thread: begin, puts and commit are one function.  The LSN
that a state covers comes in the LMDB transaction that completes the state.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterable, Iterator
from time import perf_counter, sleep
from typing import Any, Final, Protocol, TypeVar

import attrs

from ._exceptions import CorruptLogError
from ._files import (
    disk_error,
    file_size,
    has_mark,
    leave_mark,
    make_directory,
    remove_mark,
    reread_file,
    sync_file,
)
from ._operations import KEY_BYTES_MAX
from ._util import MiB

T = TypeVar("T")

DATA_NAME: Final = "data.mdb"
SUSPECT_NAME: Final = "suspect"
"""Stands beside the data from a failed write on, until the data was read from the disk anew."""
MAP_GROWTH: Final = 2
TURN_KEYS: Final = 64
TURN_SECONDS: Final = 0.001
TURN_PAUSE_SECONDS: Final = 0.00005
READERS_MAX: Final = 4096
"""Open snapshots and the like, at once."""
STORE_FORMAT: Final = 1

_DATA: Final = b"data"
_META: Final = b"meta"


class MapFull(Exception):
    """The store has no more room in its map, or a write has failed and its pages must not be
    written again before they were forgotten; grow it while nobody reads, and try again."""


@attrs.frozen
class StoreState:
    """To which log a store belongs, and how much of it it holds."""

    log_uuid: bytes
    lsn: int


class ReadTransaction(Protocol):
    """The store as it was when this began."""

    def get(self, key: bytes) -> bytes | None: ...

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """``start <= key < stop`` in the order of keys, or backwards."""
        ...

    def close(self) -> None: ...


class Store(Protocol):
    """Committed state on disk."""

    path: str

    def read(self) -> ReadTransaction: ...

    def apply(self, items: Iterable[tuple[bytes, bytes | None]], state: StoreState | None) -> None:
        """Write a piece of a checkpoint, durably, all or nothing; ``state`` with the last.

        Raises:
          MapFull
          OSError: a write failed; the next call raises `MapFull`.
        """
        ...

    def crowded(self, needed: int) -> bool:
        """Whether half of the map is used, or would be with so many bytes more; or else `grow`
        is due."""
        ...

    def grow(self) -> None:
        """Make the map larger, or begin anew after a failed write; nothing may be reading."""
        ...

    def copy(self, path: str) -> None:
        """A consistent copy into an empty directory."""
        ...

    def statistics(self) -> tuple[int, int]:
        """(keys, bytes of the file)."""
        ...

    def close(self) -> None: ...


def taking_turns(items: Iterable[T]) -> Iterator[T]:
    """The items, with a pause after every millisecond or so: the event loop gets its turn.

    A thread that goes on and on keeps the interpreter lock for the interpreter's switch interval
    of 5 ms.  That LMDB's calls give it away does not help: for a microsecond each, which is too
    short for a thread that waits for it to wake up.
    """
    since = perf_counter()
    for number, item in enumerate(items, 1):
        yield item
        if not number % TURN_KEYS and perf_counter() - since > TURN_SECONDS:
            sleep(TURN_PAUSE_SECONDS)
            since = perf_counter()


class _LmdbRead:
    def __init__(self, env: Any, data: Any) -> None:
        self._txn = env.begin(db=data)
        self.get = self._txn.get

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        cursor = self._txn.cursor()
        if reverse:
            if stop is None:
                found = cursor.last()
            else:
                found = cursor.prev() if _seek(cursor, stop) else cursor.last()
            if found:
                for key, value in cursor.iterprev():
                    if start is not None and key < start:
                        return
                    yield key, value
        elif cursor.first() if start is None else _seek(cursor, start):
            for key, value in cursor.iternext():
                if stop is not None and key >= stop:
                    return
                yield key, value

    def close(self) -> None:
        self._txn.abort()


class Unreadable:
    """In the place of a read transaction that could not be had: whoever reads is told."""

    def __init__(self, cause: OSError) -> None:
        self._cause = cause

    def get(self, key: bytes) -> bytes | None:
        """Raises `OSError`."""
        raise OSError(*self._cause.args) from self._cause

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """Raises `OSError`."""
        raise OSError(*self._cause.args) from self._cause

    def close(self) -> None:
        pass


def _seek(cursor: Any, key: bytes) -> bool:
    """Go to the first key that is not below ``key``, which may be longer than keys can be."""
    found: bool = cursor.set_range(key[:KEY_BYTES_MAX])
    if found and len(key) > KEY_BYTES_MAX and cursor.key() == key[:KEY_BYTES_MAX]:
        found = cursor.next()
    return found


class LmdbStore:
    """One LMDB environment with two databases: the data, and what it is the state of."""

    def __init__(self, path: str, map_size: int) -> None:
        self._lmdb = importlib.import_module("lmdb")
        self.path = path
        make_directory(path)
        self._entries: int = 0
        self._open(map_size)

    def _open(self, map_size: int) -> None:
        self._suspect = True
        forget_suspect(self.path)
        # LMDB never shrinks a map below what is used; a larger file needs a larger map.
        size = max(map_size, file_size(data_file(self.path)) + 16 * MiB)
        try:
            with _corruption(self._lmdb, self.path):
                self._env = self._lmdb.open(
                    self.path, map_size=size, max_dbs=2, mode=0o600, max_readers=READERS_MAX
                )
                self._data = self._env.open_db(_DATA)
                self._meta = self._env.open_db(_META)
        except OSError:
            leave_mark(f"{self.path}/{SUSPECT_NAME}")
            raise
        self._page_size: int = self._env.stat()["psize"]
        self._map_size: int = size
        remove_mark(f"{self.path}/{SUSPECT_NAME}")
        self._suspect = False

    def read(self) -> ReadTransaction:
        try:
            return _LmdbRead(self._env, self._data)
        except self._lmdb.Error as exc:
            raise OSError(errno.EIO, f"the store cannot be read: {exc}", self.path) from exc

    def apply(self, items: Iterable[tuple[bytes, bytes | None]], state: StoreState | None) -> None:
        if self._suspect:
            raise MapFull
        try:
            with self._env.begin(write=True, db=self._data) as txn:
                put, delete = txn.put, txn.delete
                for key, value in taking_turns(items):
                    if value is None:
                        delete(key)
                    else:
                        put(key, value)
                if state is not None:
                    txn.put(b"lsn", state.lsn.to_bytes(8, "little"), db=self._meta)
                    txn.put(b"log", state.log_uuid, db=self._meta)
                    txn.put(b"format", STORE_FORMAT.to_bytes(2, "little"), db=self._meta)
        except self._lmdb.MapFullError as exc:
            raise MapFull from exc
        except self._lmdb.Error as exc:
            # LMDB would write the same pages again, and that may not help: see `_files`.
            self._suspect = True
            leave_mark(f"{self.path}/{SUSPECT_NAME}")
            number = disk_error(str(exc)) or 5
            raise OSError(number, f"checkpoint failed: {exc}", self.path) from exc

    def crowded(self, needed: int) -> bool:
        if self._suspect:
            return True
        info = self._env.info()
        used = (info["last_pgno"] + 1) * self._page_size
        return bool(2 * (used + needed) > info["map_size"])

    def grow(self) -> None:
        if self._suspect:
            # Closed first: what is mapped stays in the cache.
            self._env.close()
            self._open(self._map_size)
            return
        try:
            self._map_size = self._env.info()["map_size"] * MAP_GROWTH
            self._env.set_mapsize(self._map_size)
        except self._lmdb.Error as exc:
            raise OSError(12, f"the map cannot grow: {exc}", self.path) from exc

    def copy(self, path: str) -> None:
        make_directory(path)
        try:
            self._env.copy(path)
        except self._lmdb.Error as exc:
            raise OSError(errno.EIO, f"the store cannot be copied: {exc}", self.path) from exc
        sync_file(data_file(path))

    def statistics(self) -> tuple[int, int]:
        try:
            with self._env.begin() as txn:
                self._entries = txn.stat(self._data)["entries"]
        except self._lmdb.Error:
            # A write of its own failed, and LMDB begins nothing any more: what was last known.
            pass
        return self._entries, file_size(data_file(self.path))

    def close(self) -> None:
        self._env.close()


def forget_suspect(path: str) -> None:
    """After a write of a store has failed: read it from the disk, not from the page cache."""
    if has_mark(f"{path}/{SUSPECT_NAME}") and file_size(data_file(path)):
        reread_file(data_file(path))


def data_file(path: str) -> str:
    return f"{path}/{DATA_NAME}"


class _corruption:  # noqa: N801  (reads as a clause)
    """LMDB's errors as ours, with what to do."""

    def __init__(self, lmdb: Any, path: str) -> None:
        self._lmdb = lmdb
        self._path = data_file(path)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, self._lmdb.Error):
            number = disk_error(str(exc))
            if number is not None:
                # The disk's fault, or the process's: that is no damage.
                raise OSError(number, f"LMDB says: {exc}", self._path) from exc
            raise damaged(self._path, f"LMDB says: {exc}") from exc


def damaged(path: str, reason: str) -> CorruptLogError:
    return CorruptLogError(
        path,
        0,
        f"{reason}; where the log still starts at LSN 1, moving the store away lets "
        "open_database rebuild it from the log, otherwise restore a backup",
    )


def inspect_store(path: str) -> StoreState | None:
    """What a store says of itself, without writing; None where there is none yet.

    Raises:
      CorruptLogError: LMDB cannot read it, or the file is shorter than it says.
      OSError: the disk's own.
    """
    size = file_size(data_file(path))
    if not size:
        return None
    forget_suspect(path)
    lmdb = importlib.import_module("lmdb")
    name = data_file(path)
    with _corruption(lmdb, path):
        env = lmdb.open(path, readonly=True, lock=False, max_dbs=2, create=False)
        try:
            # Before any page is touched: a page behind the file's end is a SIGBUS.
            pages = env.info()["last_pgno"] + 1
            page_size = env.stat()["psize"]
            if pages * page_size > size:
                raise damaged(name, f"the file has {size} bytes of {pages * page_size}")
            try:
                meta = env.open_db(_META, create=False)
            except lmdb.NotFoundError:
                with env.begin() as txn:
                    # An interrupted creation may have made the other one.
                    if any(key != _DATA for key, _ in txn.cursor()):
                        raise damaged(name, "this is no trio-wal store") from None
                return None
            with env.begin(db=meta) as txn:
                lsn, uuid, version = txn.get(b"lsn"), txn.get(b"log"), txn.get(b"format")
        finally:
            env.close()
    if lsn is None and uuid is None:
        return None
    if lsn is None or uuid is None or len(lsn) != 8 or len(uuid) != 16 or version is None:
        raise damaged(name, "the store does not say of which log it is the state")
    if int.from_bytes(version, "little") != STORE_FORMAT:
        raise damaged(name, f"store format {int.from_bytes(version, 'little')} is not known")
    return StoreState(uuid, int.from_bytes(lsn, "little"))
