"""The base of the database: checkpointed state in LMDB.

Law: this and `_store_reader` alone know lmdb, which is imported when a database is opened.  An LMDB
write transaction belongs to one thread: begin, puts and commit are one function.  The LSN
that a state covers comes in the LMDB transaction that completes the state.

LMDB trusts its file and its paths.  So nothing is opened by it that is not a regular file of
its own in a directory that is no link, nor before the pages that opening reads were checked
(`_pages`); and no error of LMDB's leaves this file.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterable, Iterator
from time import perf_counter, sleep
from typing import Any, Final, Protocol, TypeVar

from . import _pages
from ._base import MapFull, ReadTransaction, StoreState
from ._exceptions import CorruptLogError
from ._files import close_quietly
from ._operations import KEY_BYTES_MAX
from ._places import encode_places
from ._store_files import (
    DATA_NAME,
    LOCK_NAME,
    STORE_FORMAT,
    SUSPECT_NAME,
    check_files,
    damaged,
    data_file,
    forget_suspect,
    store_size,
)
from ._system.files import OsDirectory
from ._system.paths import make_directory
from ._system.store import (
    identity,
    leave_mark,
    open_store_directory,
    path_below,
    remove_file,
    system_error,
)
from ._util import MiB

T = TypeVar("T")

MAP_GROWTH: Final = 2
TURN_KEYS: Final = 64
TURN_SECONDS: Final = 0.001
TURN_PAUSE_SECONDS: Final = 0.00005
WRITTEN_AT_ONCE: Final = MiB
"""LMDB writes up to 64 pages by one call."""
READERS_MAX: Final = 4096
"""Open snapshots and the like, at once."""

_DATA: Final = _pages.DATA
_META: Final = _pages.META
_DAMAGE: Final = (
    *("CorruptedError", "PageNotFoundError", "InvalidError", "VersionMismatchError"),
    *("IncompatibleError", "CursorFullError", "PageFullError", "BadTxnError", "NotFoundError"),
    *("BadChecksumError", "EnvEncryptionError", "CryptoFailError", "ProblemError"),
)
"""LMDB's errors that come of what the file holds.  Any other is the system's, or, as the panic
that follows a failed write of a header, comes of one that was."""
_SYSTEM: Final = {
    "ReadersFullError": errno.EAGAIN,
    "TlsFullError": errno.EAGAIN,
    "TxnFullError": errno.ENOMEM,
    "MapResizedError": errno.EAGAIN,
}


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


class Environment(Protocol):
    """An open file of LMDB's."""

    lmdb_error: type[Exception]

    def explained(self, exc: BaseException, what: str) -> CorruptLogError | OSError | None:
        """LMDB's error as ours; None: it is not LMDB's."""
        ...


class LmdbRead:
    """A `ReadTransaction` of LMDB's."""

    def __init__(self, store: Environment, txn: Any) -> None:
        self._store = store
        self._txn = txn
        self._cursor = self._txn.cursor()
        self.get = self._txn.get

    def explain(self, exc: BaseException) -> None:
        explained = self._store.explained(exc, "the store cannot be read")
        if explained is not None:
            raise explained from exc

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        try:
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
        except self._store.lmdb_error as exc:
            self.explain(exc)
            raise

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        try:
            return self._neighbours(key)
        except self._store.lmdb_error as exc:
            self.explain(exc)
            raise

    def _neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        cursor = self._cursor
        if not cursor.set_range(key):
            return cursor.key() if cursor.last() else None, False, None
        after = cursor.key()
        before = cursor.key() if cursor.prev() else None
        if after != key:
            return before, False, after
        cursor.set_key(key)
        return before, True, cursor.key() if cursor.next() else None

    def close(self) -> None:
        self._txn.abort()


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
        self.lmdb_error: type[Exception] = self._lmdb.Error
        self.path = path
        make_directory(path)
        self._entries: int = 0
        self._unopened: OSError | CorruptLogError | None = None
        """Why the file, which was closed, could not be opened again."""
        self._open(map_size)

    def _open(self, map_size: int) -> None:
        self._suspect = True
        directory = open_store_directory(self.path)
        try:
            sizes = check_files(directory)
            forget_suspect(directory, sizes)
            for name in (DATA_NAME, LOCK_NAME):
                if sizes[name] is None:
                    # By us: LMDB would leave their modes to the umask.
                    directory.open(name, create=True).close()
            # LMDB never shrinks a map below what is used; a larger file needs a larger map.
            size = max(map_size, (sizes[DATA_NAME] or 0) + 16 * MiB)
            try:
                self._open_lmdb(directory, size)
            except OSError as exc:
                if exc.errno != errno.EBUSY:
                    leave_mark(directory, SUSPECT_NAME)
                raise
            remove_file(directory, SUSPECT_NAME)
        finally:
            directory.close()
        self._page_size: int = self._env.stat()["psize"]
        self._map_size: int = size
        self._suspect = False

    def _open_lmdb(self, directory: OsDirectory, map_size: int) -> None:
        try:
            self._env, self._data, self._meta = self._opened(directory, map_size)
        except self.lmdb_error as exc:
            explained = self.explained(exc, "LMDB says", map_size)
            assert explained is not None
            raise explained from exc

    def _opened(self, directory: OsDirectory, map_size: int) -> tuple[Any, Any, Any]:
        before = [identity(directory, name) for name in (DATA_NAME, LOCK_NAME)]
        env: Any = self._lmdb.open(
            path_below(directory),
            map_size=map_size,
            max_dbs=2,
            mode=0o600,
            max_readers=READERS_MAX,
            **engine_options(self._lmdb),
        )
        try:
            data, meta = env.open_db(_DATA), env.open_db(_META)
            if [identity(directory, name) for name in (DATA_NAME, LOCK_NAME)] != before:
                raise damaged(data_file(self.path), "the file was replaced while it was opened")
        except BaseException:
            env.close()
            raise
        return env, data, meta

    def explained(
        self, exc: BaseException, what: str, map_size: int | None = None
    ) -> CorruptLogError | OSError | None:
        """LMDB's error as ours; None: it is not LMDB's."""
        if not isinstance(exc, self.lmdb_error):
            return None
        return explained(exc, self.path, what, map_size)

    def read(self) -> ReadTransaction:
        if self._unopened is not None:
            raise unreadable(self._unopened) from self._unopened
        try:
            return LmdbRead(self, self._env.begin(db=self._data))
        except self.lmdb_error as exc:
            explained = self.explained(exc, "the store cannot be read")
            assert explained is not None
            raise explained from exc

    def apply(self, items: Iterable[tuple[bytes, bytes | None]], state: StoreState | None) -> None:
        if self._suspect:
            raise MapFull
        try:
            if state is not None:
                # Of processes that were killed: what they were reading need not be kept.
                self._env.reader_check()
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
                    if state.places:
                        places = encode_places(state.places)
                        said = state.commit_lsn.to_bytes(8, "little") + places
                        txn.put(_pages.CONSUMERS, said, db=self._meta)
                    else:
                        txn.delete(_pages.CONSUMERS, db=self._meta)
        except self._lmdb.MapFullError as exc:
            raise MapFull from exc
        except self.lmdb_error as exc:
            explained = self.explained(exc, "checkpoint failed")
            assert explained is not None
            if isinstance(explained, OSError):
                # LMDB would write the same pages again, and that may not help: see `_system.sync`.
                self._suspect = True
                full = self._mark_suspect()
                if explained.errno == errno.EIO and full is not None:
                    text = f"checkpoint failed: {full.strerror}; LMDB says: {exc}"
                    explained = OSError(full.errno, text, explained.filename)
            raise explained from exc

    def _mark_suspect(self) -> OSError | None:
        """Have later processes know it too.  Returns why there is no room, where there is none:
        a write of which the disk took only a part is EIO to LMDB, which does not ask again."""
        try:
            directory = open_store_directory(self.path)
        except (OSError, CorruptLogError):
            return None
        try:
            return leave_mark(directory, SUSPECT_NAME, WRITTEN_AT_ONCE)
        finally:
            directory.close()

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
            try:
                self._open(self._map_size)
            except (OSError, CorruptLogError) as exc:
                self._unopened = exc
                raise
            self._unopened = None
            return
        wanted = self._map_size = self._env.info()["map_size"] * MAP_GROWTH
        try:
            self._env.set_mapsize(wanted)
        except self.lmdb_error as exc:
            explained = self.explained(exc, "the map cannot grow", wanted)
            assert explained is not None
            raise explained from exc

    def copy(self, path: str) -> None:
        make_directory(path)
        directory = open_store_directory(path)
        try:
            file = directory.open(DATA_NAME, create=True)
            try:
                # Compacted: what was deleted stays in free pages, and need not travel.
                self._env.copyfd(file.fileno(), compact=True)
                file.sync()
            finally:
                close_quietly(file)
            directory.sync()
        except self.lmdb_error as exc:
            explained = self.explained(exc, "the store cannot be copied")
            assert explained is not None
            raise explained from exc
        finally:
            directory.close()

    def statistics(self) -> tuple[int, int]:
        try:
            with self._env.begin() as txn:
                self._entries = txn.stat(self._data)["entries"]
        except self.lmdb_error:
            # A write of its own failed, and LMDB begins nothing any more: what was last known.
            pass
        return self._entries, store_size(self.path)

    def close(self) -> None:
        self._env.close()


def engine_options(lmdb: Any) -> dict[str, int]:
    """py-lmdb 3 brings LMDB 1.0 too, which has another format."""
    return {"lib_version": 0} if int(lmdb.__version__.partition(".")[0]) >= 3 else {}


def explained(
    exc: Exception, path: str, what: str, map_size: int | None = None
) -> CorruptLogError | OSError:
    """What an error of LMDB means.

    Damage is what LMDB says is damage; whatever else it says is the system's, with its errno,
    so that no lack of memory makes anybody throw a sound store away.
    """
    name = type(exc).__name__
    if name in _DAMAGE:
        return damaged(data_file(path), f"{what}: {exc}")
    if "already open in this process" in str(exc):
        return OSError(
            errno.EBUSY,
            "this process has the database open already: read through its Database, and close "
            "its DatabaseReaders before it is opened with open_database",
            data_file(path),
        )
    number = system_error(str(exc))
    if number is None:
        number = _SYSTEM.get(name, errno.EIO)
    text = f"{what}: {exc}"
    if number == errno.ENOMEM and map_size is not None:
        text += (
            f"; map_size of {map_size} bytes of address space was not to be had: open the "
            "database with a smaller map_size, or raise the limit (ulimit -v)"
        )
    return OSError(number, text, data_file(path))


def unreadable(cause: OSError | CorruptLogError) -> OSError | CorruptLogError:
    """For whoever reads a store whose file could not be opened again."""
    what = "the store cannot be read: its file could not be opened again"
    if isinstance(cause, CorruptLogError):
        return CorruptLogError(cause.path, cause.offset, f"{what}: {cause.reason}")
    return OSError(cause.errno, f"{what}: {cause.strerror or cause}", cause.filename)


def read_everything(path: str) -> int:
    """Every key forwards, backwards and by itself, through LMDB; returns how many there are.

    Raises:
      CorruptLogError, OSError
    """
    lmdb = importlib.import_module("lmdb")
    env: Any = None
    directory = open_store_directory(path)
    try:
        check_files(directory)
        env = lmdb.open(
            path_below(directory), readonly=True, lock=False, max_dbs=2, create=False,
            **engine_options(lmdb),
        )  # fmt: skip
        try:
            data = env.open_db(_DATA, create=False)
        except lmdb.NotFoundError:
            return 0
        with env.begin(db=data) as txn:
            return _read_all(path, txn)
    except lmdb.Error as exc:
        raise explained(exc, path, "LMDB says") from exc
    finally:
        if env is not None:
            env.close()
        directory.close()


def _read_all(path: str, txn: Any) -> int:
    get = txn.get
    count = 0
    for key, value in txn.cursor().iternext():
        count += 1
        if get(key) != value:
            raise damaged(data_file(path), f"LMDB lists the key {key!r} and does not find it")
    backwards = sum(1 for _ in txn.cursor().iterprev())
    if backwards != count:
        raise damaged(data_file(path), f"LMDB lists {count} keys, and backwards {backwards}")
    return count
