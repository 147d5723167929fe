"""The base of the database: checkpointed state in LMDB.

Law: the only file that knows lmdb, which is imported when a database is opened.  An LMDB
write transaction belongs to one thread: begin, puts and commit are one function.  The LSN
that a state covers comes in the LMDB transaction that completes the state.

LMDB trusts its file and its paths.  So nothing is opened by it that is not a regular file of
its own in a directory that is no link, nor before the pages that opening reads were checked
(`_pages`); and no error of LMDB's leaves this file.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter, sleep
from typing import Any, Final, Literal, Protocol, TypeVar

import attrs

from . import _pages
from ._exceptions import CorruptLogError
from ._files import (
    ChildError,
    File,
    OsDirectory,
    close_quietly,
    identity,
    leave_mark,
    make_directory,
    open_store_directory,
    path_below,
    plain_size,
    remove_file,
    run_child,
    system_error,
)
from ._operations import KEY_BYTES_MAX
from ._util import MiB

T = TypeVar("T")

log = logging.getLogger("trio_wal")

StoreCheckLevel = Literal["child", "auto"]
Progress = Callable[[int, int], None]
"""Called with the bytes that are checked and the bytes that there are."""

DATA_NAME: Final = "data.mdb"
LOCK_NAME: Final = "lock.mdb"
SUSPECT_NAME: Final = "suspect"
"""Stands beside the data from a failed write on, until the data was read from the disk anew."""
MAP_GROWTH: Final = 2
TURN_KEYS: Final = 64
TURN_SECONDS: Final = 0.001
TURN_PAUSE_SECONDS: Final = 0.00005
READERS_MAX: Final = 4096
"""Open snapshots and the like, at once."""
STORE_FORMAT: Final = 1
AUTO_BYTES_MAX: Final = 128 * MiB
"""A store up to this size is checked on opening after a crash: 3 ms per MiB, so 0.4 s at most."""
LOOK_TRIES: Final = 20
"""How often a store that is written all the time is looked at before it is left unjudged."""

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

    def explain(self, exc: BaseException) -> None:
        """Raises what an error of `get` means; returns where that is no error of the store."""
        ...

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        """The key before, whether this one is there, and the key after it."""
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
          CorruptLogError: the file is damaged.
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
        """A consistent copy into a new directory, without what was deleted."""
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
    def __init__(self, store: LmdbStore) -> None:
        self._store = store
        self._txn = store._env.begin(db=store._data)
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


class Unreadable:
    """In the place of a read transaction that could not be had: whoever reads is told."""

    def __init__(self, cause: OSError | CorruptLogError) -> None:
        self._cause = cause

    def get(self, key: bytes) -> bytes | None:
        """Raises `OSError` or `CorruptLogError`."""
        raise type(self._cause)(*self._cause.args) from self._cause

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """Raises `OSError` or `CorruptLogError`."""
        raise type(self._cause)(*self._cause.args) from self._cause

    def explain(self, exc: BaseException) -> None:
        pass

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        """Raises `OSError` or `CorruptLogError`."""
        raise type(self._cause)(*self._cause.args) from self._cause

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
        self.lmdb_error: type[Exception] = self._lmdb.Error
        self.path = path
        make_directory(path)
        self._entries: int = 0
        self._open(map_size)

    def _open(self, map_size: int) -> None:
        self._suspect = True
        directory = open_store_directory(self.path)
        try:
            sizes = _check_files(directory)
            _forget_suspect(directory, sizes)
            for name in (DATA_NAME, LOCK_NAME):
                if sizes[name] is None:
                    # By us: LMDB would leave their modes to the umask.
                    directory.open(name, create=True).close()
            # LMDB never shrinks a map below what is used; a larger file needs a larger map.
            size = max(map_size, (sizes[DATA_NAME] or 0) + 16 * MiB)
            try:
                self._open_lmdb(directory, size)
            except OSError:
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
            **_engine(self._lmdb),
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
        try:
            return _LmdbRead(self)
        except self.lmdb_error as exc:
            explained = self.explained(exc, "the store cannot be read")
            assert explained is not None
            raise explained from exc

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
        except self.lmdb_error as exc:
            explained = self.explained(exc, "checkpoint failed")
            assert explained is not None
            if isinstance(explained, OSError):
                # LMDB would write the same pages again, and that may not help: see `_files`.
                self._suspect = True
                self._mark_suspect()
            raise explained from exc

    def _mark_suspect(self) -> None:
        try:
            directory = open_store_directory(self.path)
        except (OSError, CorruptLogError):
            return
        leave_mark(directory, SUSPECT_NAME)
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
            self._open(self._map_size)
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
                self._env.copyfd(file._fd, compact=True)
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
        return self._entries, _size(self.path)

    def close(self) -> None:
        self._env.close()


def _engine(lmdb: Any) -> dict[str, int]:
    """py-lmdb 3 brings LMDB 1.0 too, which has another format."""
    return {"lib_version": 0} if int(lmdb.__version__.partition(".")[0]) >= 3 else {}


def data_file(path: str) -> str:
    return f"{path}/{DATA_NAME}"


def _size(path: str) -> int:
    """Bytes of a store's file, as far as that can be told."""
    try:
        directory = open_store_directory(path)
        try:
            return plain_size(directory, DATA_NAME) or 0
        finally:
            directory.close()
    except (OSError, CorruptLogError):
        return 0


def _check_files(directory: OsDirectory) -> dict[str, int | None]:
    """The sizes of a store's files, None where there is none.

    Raises:
      CorruptLogError: one of them is not a regular file of its own: what LMDB, or a mark, would
          write there would be written elsewhere.
    """
    names = (DATA_NAME, LOCK_NAME, SUSPECT_NAME)
    return {name: plain_size(directory, name) for name in names}


def _forget_suspect(directory: OsDirectory, sizes: dict[str, int | None]) -> None:
    """After a write of a store has failed: read it from the disk, not from the page cache."""
    if sizes[SUSPECT_NAME] is not None and sizes[DATA_NAME]:
        directory.reread(DATA_NAME)


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


def damaged(path: str, reason: str) -> CorruptLogError:
    return CorruptLogError(
        path,
        0,
        f"{reason}; where the log still starts at LSN 1, moving the store away lets "
        "open_database rebuild it from the log, otherwise restore a backup",
    )


# -- looking at a store without LMDB ------------------------------------------------


@contextmanager
def _opened_data(path: str) -> Generator[File | None]:
    """A store's data file, to read; None where there is none yet."""
    try:
        directory = open_store_directory(path)
    except FileNotFoundError:
        yield None
        return
    try:
        sizes = _check_files(directory)
        _forget_suspect(directory, sizes)
        if not sizes[DATA_NAME]:
            yield None
            return
        file = directory.open(DATA_NAME)
        try:
            yield file
        finally:
            close_quietly(file)
    finally:
        close_quietly(directory)


def inspect_store(path: str) -> StoreState | None:
    """What a store says of itself, without writing; None where there is none yet.

    LMDB is not asked: it would follow whatever the pages say.  After this it may be: the few
    pages that opening it reads have been checked.

    Raises:
      CorruptLogError: this is no store, or damaged, or the file is shorter than it says.
      OSError: the disk's own.
    """
    with _opened_data(path) as file:
        if file is None:
            return None
        try:
            _, _, meta = _pages.read_meta(file.pread, file.size())
        except _pages.PagesError as exc:
            raise _found(path, exc.offset, exc.reason) from exc
        return _state_of(path, meta)


def _found(path: str, offset: int, reason: str) -> CorruptLogError:
    error = damaged(data_file(path), reason)
    return CorruptLogError(error.path, offset, error.reason)


def _state_of(path: str, meta: dict[bytes, bytes]) -> StoreState | None:
    name = data_file(path)
    lsn, uuid, version = (meta.get(key) for key in (b"lsn", b"log", b"format"))
    if lsn is None and uuid is None and version is None:
        return None
    if lsn is None or uuid is None or len(lsn) != 8 or len(uuid) != 16 or version is None:
        raise damaged(name, "the store does not say of which log it is the state")
    if int.from_bytes(version, "little") != STORE_FORMAT:
        raise damaged(name, f"store format {int.from_bytes(version, 'little')} is not known")
    return StoreState(uuid, int.from_bytes(lsn, "little"))


def misfit(
    state: StoreState | None, log_uuid: bytes | None, base_lsn: int, last_lsn: int
) -> str | None:
    """Why a store and a log do not belong together; ``log_uuid`` None: there is no log."""
    if log_uuid is None:
        return None if state is None else "there is a store but no log"
    if state is None:
        if base_lsn > 1:
            return f"the store is missing, and the log starts at LSN {base_lsn}"
    elif state.log_uuid != log_uuid:
        return "the store belongs to another log"
    elif state.lsn > last_lsn:
        return f"the store holds LSN {state.lsn}, but its log ends at LSN {last_lsn}"
    elif state.lsn + 1 < base_lsn:
        return f"the store ends at LSN {state.lsn}, but its log starts at {base_lsn}"
    return None


# -- checking all of a store ----------------------------------------------------------


@attrs.frozen
class StoreCheck:
    """What `check_store` found."""

    path: str
    """Of the data file."""
    findings: tuple[tuple[int, str], ...]
    """(offset, reason)"""
    state: StoreState | None
    keys: int
    bytes: int
    note: str = ""
    """What could not be checked, and why."""


def check_store(
    path: str, progress: Progress | None = None, *, read_through: bool = True
) -> StoreCheck:
    """Check every page, and then whether LMDB reads every key; nothing is written.

    The pages are read as bytes, so nothing that they say can do harm.  ``read_through``: only
    where they are sound is all of it read through LMDB as well, both ways and key by key, in a
    child process: a page that cannot be read ends that one and not this.

    The store may be written meanwhile, and pages be used anew: what is found counts only where
    the headers stood still.

    Raises:
      CorruptLogError: what stands there is no store's file.
      OSError: the disk's own.
    """
    name = data_file(path)
    with _opened_data(path) as file:
        if file is None:
            return StoreCheck(name, (), None, 0, 0)
        for _ in range(LOOK_TRIES):
            before = _headers(file)
            found = _check_once(path, file, read_through, progress)
            if not found.findings or _headers(file) == before:
                return found
        size = file.size()
    note = "the store was being written all the time, and could not be judged"
    return StoreCheck(name, (), None, 0, size, note)


def _headers(file: File) -> bytes:
    return file.pread(2 * _pages.PAGE_BYTES_MAX, 0)


def _check_once(path: str, file: File, read_through: bool, progress: Progress | None) -> StoreCheck:
    name, size = data_file(path), file.size()
    contents = _pages.check(file.pread, size, _Ticks(size, progress))
    if contents.findings:
        return StoreCheck(name, contents.findings, None, 0, size)
    try:
        state = _state_of(path, contents.meta)
    except CorruptLogError as exc:
        return StoreCheck(name, ((0, exc.reason.partition(";")[0]),), None, 0, size)
    findings: tuple[tuple[int, str], ...] = ()
    note = ""
    if read_through:
        try:
            findings = tuple((0, reason) for reason in _read_in_child(path, contents.entries))
        except ChildError as exc:
            note = f"the pages were checked, but the store was not read through LMDB: {exc}"
    if progress is not None:
        progress(size, size)
    return StoreCheck(name, findings, state, contents.entries, size, note)


class _Ticks:
    """Tells how far a check is, and lets the event loop have its turn."""

    def __init__(self, size: int, progress: Progress | None) -> None:
        self._size = size
        self._progress = progress
        self._done = 0
        self._since = perf_counter()

    def __call__(self, done: int) -> None:
        self._done += done
        if perf_counter() - self._since > TURN_SECONDS:
            if self._progress is not None:
                self._progress(min(self._done, self._size), self._size)
            sleep(TURN_PAUSE_SECONDS)
            self._since = perf_counter()


def _read_in_child(path: str, entries: int) -> Iterator[str]:
    """What is wrong with reading the store through LMDB."""
    output, crash = run_child("_store", "read_as_child", path)
    if crash:
        yield f"reading the store through LMDB ends the process ({crash})"
        return
    try:
        answer = json.loads(output)
    except ValueError as exc:
        raise ChildError("the child process did not answer") from exc
    if answer["refused"]:
        raise ChildError(answer["refused"])
    if answer["wrong"]:
        yield answer["wrong"]
    elif answer["keys"] != entries:
        yield f"LMDB reads {answer['keys']} keys of {entries}"


def read_as_child() -> None:
    """What the child process does."""
    keys, wrong, refused = 0, "", ""
    try:
        keys = read_everything(sys.argv[1])
    except CorruptLogError as exc:
        wrong = exc.reason.partition(";")[0]
    except (OSError, MemoryError) as exc:
        refused = str(exc) or type(exc).__name__
    sys.stdout.write(json.dumps({"keys": keys, "wrong": wrong, "refused": refused}))


def read_everything(path: str) -> int:
    """Every key forwards, backwards and by itself, through LMDB; returns how many there are.

    Raises:
      CorruptLogError, OSError
    """
    lmdb = importlib.import_module("lmdb")
    env: Any = None
    directory = open_store_directory(path)
    try:
        _check_files(directory)
        env = lmdb.open(
            path_below(directory), readonly=True, lock=False, max_dbs=2, create=False,
            **_engine(lmdb),
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


def check_before_open(path: str, how: StoreCheckLevel, progress: Progress | None) -> None:
    """`check_store` before a store is opened; ``"auto"``: its pages, where there are not too many.

    Raises:
      CorruptLogError: the first finding.
      OSError
    """
    if how == "auto" and _size(path) > AUTO_BYTES_MAX:
        return
    found = check_store(path, progress, read_through=how == "child")
    if found.findings:
        raise _found(path, *found.findings[0])
    if found.note:
        log.warning("%s: %s", found.path, found.note)
