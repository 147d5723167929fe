"""LMDB's file read by another process than the one that writes it.

Law: with `_store` the only one that knows lmdb.  Nothing is written but LMDB's table of who reads
(``lock.mdb``): without it the owner would use pages again that are being read here.  What the
owner may be doing is looked at again before it is called damage.
"""

from __future__ import annotations

import errno
import importlib
from time import sleep
from typing import Any, Final

from . import _pages
from ._base import ReadTransaction, StoreGrown, StoreState
from ._exceptions import CorruptLogError
from ._files import OsDirectory, identity, open_store_directory, path_below
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


class LmdbStoreReader:
    """A `StoreReader` of LMDB's."""

    def __init__(self, path: str) -> None:
        self._lmdb = importlib.import_module("lmdb")
        self.lmdb_error: type[Exception] = self._lmdb.Error
        self.path = path
        self._env: Any = None
        self._data: Any = None
        self._meta: Any = None
        self._place: tuple[int, int] | None = None
        """Which file is open."""

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

    def _open(self) -> bool:
        """Whether there is a file, which is open then."""
        try:
            directory = open_store_directory(self.path)
        except FileNotFoundError:
            return False
        try:
            sizes = check_files(directory)
            size = sizes[DATA_NAME]
            if not size:
                return False
            self._look_through()
            self._place = identity(directory, DATA_NAME)
            if sizes[LOCK_NAME] is None:
                _make_lock(directory)
            try:
                self._env = self._open_lmdb(directory, max(MAP_SIZE, 4 * size))
            except self.lmdb_error as exc:
                raise self._refused(exc) from exc
            if identity(directory, DATA_NAME) != self._place:
                self.close()
                raise damaged(data_file(self.path), "the file was replaced while it was opened")
        finally:
            directory.close()
        return True

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
        if "already open" in str(exc):
            return OSError(
                errno.EBUSY,
                "this process has the database open already: read through its Database",
                data_file(self.path),
            )
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
            except CorruptLogError as exc:
                # The owner may have written meanwhile; damage stands still.
                found = (exc.offset, exc.reason, store_size(self.path), self._headers())
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
        if self._env is None and not self._open():
            return _Nothing(), None
        env: Any = self._env
        try:
            if self._data is None and not self._open_databases():
                return _Nothing(), None
            txn = env.begin(db=self._data)
        except (self._lmdb.MapResizedError, self._lmdb.MapFullError):
            raise StoreGrown from None
        except self.lmdb_error as exc:
            raise self._told(exc, "the store cannot be read") from exc
        try:
            names = (b"lsn", b"log", b"format", _pages.CONSUMERS)
            meta = {name: txn.get(name, db=self._meta) for name in names}
            state = state_of(self.path, {k: v for k, v in meta.items() if v is not None})
            return LmdbRead(self, txn), state
        except self.lmdb_error as exc:
            txn.abort()
            raise self._told(exc, "the store cannot be read") from exc
        except BaseException:
            txn.abort()
            raise

    def _open_databases(self) -> bool:
        """Whether both are there; they are made when a store is opened for the first time."""
        try:
            self._meta = self._env.open_db(_pages.META, create=False)
            self._data = self._env.open_db(_pages.DATA, create=False)
        except self._lmdb.NotFoundError:
            return False
        return True

    def _check_place(self) -> None:
        if self._env is None:
            return
        directory = open_store_directory(self.path)
        try:
            if identity(directory, DATA_NAME) != self._place:
                raise CorruptLogError(
                    data_file(self.path), 0, "another file stands here now: open the reader again"
                )
        finally:
            directory.close()

    def grow(self) -> None:
        try:
            self._env.set_mapsize(max(MAP_SIZE, 4 * store_size(self.path)))
        except self.lmdb_error as exc:
            raise self._told(exc, "the map cannot grow") from exc

    def size(self) -> int:
        return store_size(self.path)

    def close(self) -> None:
        env, self._env = self._env, None
        self._data = self._meta = None
        if env is not None:
            env.close()


def _make_lock(directory: OsDirectory) -> None:
    """As the owner makes it.  Where nothing can be written nobody writes, and LMDB needs none."""
    try:
        directory.open(LOCK_NAME, create=True).close()
    except FileExistsError:
        pass
    except OSError as exc:
        if exc.errno != errno.EROFS:
            raise
