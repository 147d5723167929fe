"""LMDB's file read by another process than the one that writes it.

Law: with `_store` the only one that knows lmdb.  Nothing is written but LMDB's table of who reads
(``lock.mdb``): without it the owner would use pages again that are being read here.  What the
owner may be doing is looked at again before it is called damage.
"""

from __future__ import annotations

import errno
import importlib
import threading
from time import sleep
from typing import Any, Final

from . import _pages
from ._base import ReadTransaction, StoreState
from ._exceptions import CorruptLogError, UnsupportedFormatError
from ._store import LmdbRead, engine_options, explained
from ._store_files import (
    DATA_NAME,
    LOCK_NAME,
    check_files,
    damaged,
    data_file,
    inspect_store,
    state_of,
    store_size,
)
from ._system.files import OsDirectory, on_every_fork
from ._system.store import identity, open_store_directory, path_below

MAP_SIZE: Final = 1 << 36
"""64 GiB of address space, or four times the file."""
LOOKS: Final = 50
LOOK_SECONDS: Final = 0.002


class _Nothing:
    """A store that nothing was ever committed to."""

    def get(self, key: bytes) -> bytes | None:
        return None

    def items(self, start: bytes | None, stop: bytes | None, reverse: bool) -> Any:
        return iter(())

    def explain(self, exc: BaseException) -> None:
        pass

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        return None, False, None

    def close(self) -> None:
        pass


class _Environment:
    """A file that is open: LMDB allows it once in a process, so its readers share it."""

    def __init__(self, env: Any, place: tuple[int, int]) -> None:
        self.env = env
        self.place = place
        """Which file it is."""
        self.users = 0
        self.data: Any = None
        self.meta: Any = None


class _Process:
    """What is open in this process."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Also in a forked child: what was open is the parent's, and so may be the thread that has
        the lock."""
        self.environments: dict[tuple[int, int], _Environment] = {}
        self.lock = threading.Lock()
        """Who opens or closes one, or changes `_Environment.users`."""


_process = _Process()
on_every_fork(_process.begin)


class LmdbStoreReader:
    """A `StoreReader` of LMDB's."""

    def __init__(self, path: str) -> None:
        self._lmdb = importlib.import_module("lmdb")
        self.lmdb_error: type[Exception] = self._lmdb.Error
        self.path = path
        self._opened: _Environment | None = None

    def explained(self, exc: BaseException, what: str) -> CorruptLogError | OSError | None:
        """LMDB's error as ours; None: it is not LMDB's."""
        if not isinstance(exc, self.lmdb_error):
            return None
        return explained(exc, self.path, what, MAP_SIZE)

    def _told(self, exc: Exception, what: str) -> CorruptLogError | OSError:
        found = self.explained(exc, what)
        assert found is not None
        return found

    # -- opening --

    def _open(self) -> _Environment | None:
        """None: there is no file yet."""
        try:
            directory = open_store_directory(self.path)
        except FileNotFoundError:
            return None
        try:
            sizes = check_files(directory)
            size = sizes[DATA_NAME]
            if not size:
                return None
            self._look_through()
            with _process.lock:
                opened = self._shared(directory, size)
                opened.users += 1
            if identity(directory, DATA_NAME) != opened.place:
                _release(opened)
                raise damaged(data_file(self.path), "the file was replaced while it was opened")
            return opened
        finally:
            directory.close()

    def _shared(self, directory: OsDirectory, size: int) -> _Environment:
        place = identity(directory, DATA_NAME)
        opened = _process.environments.get(place)
        if opened is None:
            _make_lock(directory)
            try:
                env = self._open_lmdb(directory, max(MAP_SIZE, 4 * size))
            except self.lmdb_error as exc:
                raise self._refused(exc) from exc
            opened = _process.environments[place] = _Environment(env, place)
        return opened

    def _open_lmdb(self, directory: OsDirectory, size: int) -> Any:
        return self._lmdb.open(
            path_below(directory),
            map_size=size,
            max_dbs=2,
            mode=0o600,
            readonly=True,
            create=False,
            **engine_options(self._lmdb),
        )

    def _refused(self, exc: Exception) -> CorruptLogError | OSError:
        found = self._told(exc, "LMDB says")
        if isinstance(found, OSError) and found.errno in (errno.EACCES, errno.EPERM):
            return OSError(
                found.errno,
                f"{found.strerror}; whoever reads must be allowed to read {DATA_NAME} and to "
                f"write {LOCK_NAME}, LMDB's table of who reads",
                data_file(self.path),
            )
        return found

    def _look_through(self) -> None:
        """The few pages that opening reads, checked as LMDB does not."""
        before: object = None
        for _ in range(LOOKS):
            try:
                inspect_store(self.path)
                return
            except (CorruptLogError, UnsupportedFormatError) as exc:
                # The owner may have written meanwhile; damage stands still.
                found = (str(exc), store_size(self.path), self._headers())
                if found == before:
                    raise
                before = found
            sleep(LOOK_SECONDS)
        raise damaged(data_file(self.path), "it is never whole when it is looked at")

    def _headers(self) -> bytes:
        directory = open_store_directory(self.path)
        try:
            file = directory.open(DATA_NAME)
            try:
                return file.pread(2 * _pages.PAGE_BYTES_MAX, 0)
            finally:
                file.close()
        finally:
            directory.close()

    # -- reading --

    def read(self) -> tuple[ReadTransaction, StoreState | None]:
        self._check_place()
        if self._opened is None:
            self._opened = self._open()
        opened = self._opened
        try:
            if opened is None or not self._has_databases(opened):
                return _Nothing(), None
            txn = opened.env.begin(db=opened.data)
        except self._lmdb.MapResizedError as exc:
            # LMDB maps more only while nothing is read.
            text = "the store has outgrown what this reader has mapped: open the reader again"
            raise OSError(errno.ENOMEM, text, data_file(self.path)) from exc
        except self.lmdb_error as exc:
            raise self._told(exc, "the store cannot be read") from exc
        try:
            names = (b"lsn", b"log", b"format", _pages.CONSUMERS)
            meta = {name: txn.get(name, db=opened.meta) for name in names}
            state = state_of(self.path, {k: v for k, v in meta.items() if v is not None})
            return LmdbRead(self, txn), state
        except self.lmdb_error as exc:
            txn.abort()
            raise self._told(exc, "the store cannot be read") from exc
        except BaseException:
            txn.abort()
            raise

    def _has_databases(self, opened: _Environment) -> bool:
        """They are made when a store is opened for the first time."""
        with _process.lock:
            if opened.data is None:
                try:
                    opened.meta = opened.env.open_db(_pages.META, create=False)
                    opened.data = opened.env.open_db(_pages.DATA, create=False)
                except self._lmdb.NotFoundError:
                    return False
        return True

    def _check_place(self) -> None:
        if self._opened is None:
            return
        directory = open_store_directory(self.path)
        try:
            if identity(directory, DATA_NAME) != self._opened.place:
                raise CorruptLogError(
                    data_file(self.path), 0, "another file stands here now: open the reader again"
                )
        finally:
            directory.close()

    def size(self) -> int:
        return store_size(self.path)

    def close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            _release(opened)


def _release(opened: _Environment) -> None:
    with _process.lock:
        opened.users -= 1
        # In a forked child it is the parent's, and stays as it is.
        if not opened.users and _process.environments.get(opened.place) is opened:
            del _process.environments[opened.place]
            opened.env.close()


def _make_lock(directory: OsDirectory) -> None:
    """As the owner makes it.  Where nothing can be written nobody writes, and LMDB needs none."""
    try:
        directory.open(LOCK_NAME, create=True).close()
    except FileExistsError:
        pass
    except OSError as exc:
        if exc.errno != errno.EROFS:
            raise
