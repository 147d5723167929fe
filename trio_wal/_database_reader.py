"""Another process's database, to read: `open_database_reader` and `DatabaseReader`.

Law: what is promised stands here, in the docstrings; what keeps the promises is `_follower`'s.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TypeVar, final, overload

import trio
from trio.lowlevel import enable_ki_protection

from ._changes import CommitStream, new_commit_stream
from ._copying import copy_database
from ._database_statistics import DatabaseReaderStatistics
from ._disk.chain import LOG_NAME, META_NAME, STORE_NAME, neither
from ._engine import Forked
from ._exceptions import WrongDirectoryError
from ._exports import NoPublicConstructor, constructor, publish
from ._files import Directory, Files
from ._follower import Follower
from ._health import Health, closed, judge, not_following
from ._identity import Bookmark
from ._operations import check_key, check_range
from ._pairs import PairStream
from ._park import end_forked, require_trio
from ._snapshot import Snapshot, new_snapshot, scan_once, stream_once
from ._stores import stores_of
from ._stream import new_record_stream
from ._system.files import OsFiles
from ._text import printable
from ._util import Unentered, check_bool, check_int, check_path
from ._watchsource import WatchSource
from ._worker import Blocking

D = TypeVar("D")


@final
class DatabaseReader(metaclass=NoPublicConstructor):
    """Reads another process's database without owning it; what `open_database_reader` gives.

    It follows by itself: a commit can be seen here a few milliseconds after it became durable.
    It shows durable state only, always of one moment, and never an older one than before, unless
    the database itself has gone back to an older one.

    If log or store turn out to be damaged, it stops following, and every call raises
    `CorruptLogError` (or the `OSError` that was met).
    """

    def __init__(self, path: str, files: Files, follower: Follower) -> None:
        self._path = path
        self._files = files
        self._follower = follower
        self._closed = False
        files.on_fork(self._disown)

    def _check(self) -> Follower:
        if self._closed:
            raise trio.ClosedResourceError(f"{printable(self._path)}: this reader is closed")
        self._follower.check_following()
        return self._follower

    # -- what it is --

    @property
    def path(self) -> str:
        """The database's directory, absolute."""
        return self._path

    @property
    def uuid(self) -> uuid.UUID:
        """The database's, and that of its backups."""
        return uuid.UUID(bytes=self._check().source.meta.log_uuid)

    @property
    def epoch(self) -> int:
        """Which of the database's histories is seen here."""
        return self._check().epoch

    @property
    def durable_lsn(self) -> int:
        """The newest transaction that is seen here."""
        return self._check().lsn

    @property
    def bookmark(self) -> Bookmark:
        """`durable_lsn`, with the `epoch`."""
        follower = self._check()
        return Bookmark(follower.lsn, follower.epoch)

    def statistics(self) -> DatabaseReaderStatistics:
        """A look at what is kept in memory.  Cheap; no checkpoint."""
        if self._closed:
            self._check()
        follower = self._follower
        versions = follower.versions
        layers = versions.view.layers()
        return DatabaseReaderStatistics(
            durable_lsn=follower.lsn,
            checkpoint_lsn=follower.checkpoint_lsn,
            memtable_keys=sum(len(layer.versions) for layer in layers),
            memtable_bytes=sum(layer.bytes for layer in layers),
            open_readers=len(versions.readers.pins),
            store_bytes=follower.store_bytes(),
            consumers=follower.consumers(),
            following=follower.failure is None,
        )

    def health(self) -> Health:
        """Whether the reader follows, and if not, why; cheap, no checkpoint.

        It may be asked after the reader was closed.
        """
        state = "closed" if self._closed else "open"
        failure = self._follower.failure
        return judge((closed("the reader", state), not_following("the reader", failure)))

    # -- reading --

    @overload
    def get(self, key: bytes) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: D) -> bytes | D: ...
    def get(self, key: bytes, default: object = None) -> object:
        """The value of ``key``, or ``default``; errors are as for `Database.get`."""
        if self._closed or self._follower.failure is not None:
            self._check()
        versions = self._follower.versions
        try:
            value = versions.get(key)
        except BaseException as exc:
            check_key(key)
            versions.view.base.explain(exc)
            raise
        if value is None:
            check_key(key)
            return default
        return value

    def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values with ``start <= key < stop``, in order; as `Database.scan`."""
        start, stop = check_range(start, stop, prefix, limit)
        return scan_once(self.snapshot(), start, stop, reverse, limit)

    def stream(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> PairStream:
        """As `scan`, for large ranges; see `Database.stream`."""
        start, stop = check_range(start, stop, prefix, limit)
        return stream_once(self.snapshot(), start, stop, reverse, limit)

    def snapshot(self) -> Snapshot:
        """A consistent view at one LSN: ``with reader.snapshot() as snap``.

        While it is open the owner cannot use again the pages of the store that it may need, so
        that the store's file grows: keep it short.
        """
        follower = self._check()
        return new_snapshot(follower.versions)

    def changes(self, start: int | Bookmark | None = None) -> CommitStream:
        """Every committed transaction from ``start`` on, then new ones: `Database.changes`."""
        source = self._check().source
        records = new_record_stream(
            source, start, None, follow=True, entering="reader.changes() as commits"
        )
        return new_commit_stream(source.name, records)

    async def wait_for(self, lsn_or_bookmark: int | Bookmark) -> None:
        """Wait until that commit is seen here: to read what another process has just written.

        Cancelling it changes nothing.

        Raises:
          TypeError, ValueError: it is neither an LSN nor a bookmark.
          LogDivergedError: a bookmark that is not in this database's history, and so never can
              be.
          CorruptLogError, OSError: nothing more can be followed.
          trio.ClosedResourceError: the reader was closed.
        """
        place = lsn_or_bookmark
        lsn = place.lsn if isinstance(place, Bookmark) else check_int("lsn_or_bookmark", place, 0)
        self._check()
        await trio.lowlevel.checkpoint()
        follower = self._check()
        if isinstance(place, Bookmark) and place.epoch > follower.epoch:
            # Of an epoch that has just begun, or of none.
            await follower.source.refresh()
        while True:
            follower = self._check()
            follower.check_history(place)
            if follower.sees(place):
                return
            await follower.wait_news(lsn)

    async def backup(self, dest: str | os.PathLike[str]) -> int:
        """Write a copy of the state that is seen here, which `open_database` opens.

        The owner need not know of it.  As `Database.backup` it is made under another name next
        to ``dest`` and renamed when it is durable; every key is written one by one, which takes
        about 5 times as long.  If it is cancelled, nothing of it is left.

        Args:
          dest: a directory that does not exist yet.

        Returns the LSN whose state the copy has.

        Raises:
          FileExistsError: ``dest`` exists.
          CorruptLogError: log or store are damaged.
          OSError: the copy could not be written; nothing of it is left.
          trio.ClosedResourceError: the reader was closed.
        """
        path = self._files.absolute(check_path(dest))
        await trio.lowlevel.checkpoint()
        follower = self._check()
        state, meta, source = follower.state(), follower.source.meta, follower.source
        size = follower.store_bytes() + self.statistics().memtable_bytes
        with self.snapshot() as snapshot:
            assert snapshot.lsn == state.lsn
            await copy_database(
                self._files, source.blocking, path, snapshot.stream(), state, meta, size
            )
        return state.lsn

    # -- its end --

    async def aclose(self) -> None:
        """Close the reader; a checkpoint; idempotent.  Leaving the block does it.

        A cancellation is delivered when it is closed.
        """
        self._closed = True
        self._follower.stop()
        await trio.lowlevel.checkpoint()

    def _disown(self) -> None:
        """In a forked child all of it is the parent's."""
        self._closed = True
        self._follower.disown()


new_database_reader = constructor(DatabaseReader)


@final
class _OpenDatabaseReader(Unentered, AbstractAsyncContextManager[DatabaseReader]):
    """What `open_database_reader` returns."""

    _call = "trio_wal.open_database_reader"

    def __init__(self, path: str, trust_directory: bool, files: Files) -> None:
        self._path = path
        self._trust_directory = trust_directory
        self._files = files
        self._reader: DatabaseReader | None = None
        self._follower: Follower
        self._source: WatchSource
        self._nursery: trio.Nursery
        self._nursery_manager: AbstractAsyncContextManager[trio.Nursery]

    def _open_directory(self) -> Directory:
        """The log's, if this is a database."""
        files, path = self._files, self._path
        directory = files.open_directory(path)
        try:
            if not self._trust_directory:
                directory.check_trusted()
            names = [name for name in directory.names() if name[0] != "." and name != "lost+found"]
        finally:
            directory.close()
        try:
            return files.open_directory(f"{path}/{LOG_NAME}", follow=False)
        except FileNotFoundError:
            if META_NAME in names:
                raise WrongDirectoryError(path, "a log", "open_reader()") from None
            raise WrongDirectoryError(path, *neither(names)) from None

    @enable_ki_protection
    async def __aenter__(self) -> DatabaseReader:
        if self._reader is not None:
            raise RuntimeError(
                "open_database_reader() gives a context manager that can be used only once"
            )
        require_trio("open_database_reader")
        files, path = self._files, self._path
        blocking = Blocking(threaded=files.threaded)
        store = stores_of(files).open_store_reader(f"{path}/{STORE_NAME}")
        directory = await blocking(self._open_directory)
        source = WatchSource(directory, blocking)
        follower = Follower(f"{path}/{STORE_NAME}", source, store)
        manager = trio.open_nursery()
        try:
            await source.refresh()
            stream = await follower.begin()
            nursery = await manager.__aenter__()
        except BaseException:
            with trio.CancelScope(shield=True):
                await source.aclose()
            store.close()
            raise
        nursery.start_soon(follower.run, stream)
        self._source, self._follower = source, follower
        self._nursery, self._nursery_manager = nursery, manager
        self._reader = new_database_reader(path, files, follower)
        return self._reader

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        reader, follower = self._reader, self._follower
        assert reader is not None
        if follower.forked:
            await end_forked(self._nursery, Forked)
            await self._nursery_manager.__aexit__(None, None, None)
            return
        with trio.CancelScope(shield=True):
            await reader.aclose()
        # Its only task is ending: this wraps nothing.
        self._nursery.cancel_scope.shield = True
        await self._nursery_manager.__aexit__(None, None, None)
        with trio.CancelScope(shield=True):
            await self._source.aclose()
        follower.close()


def open_database_reader(
    path: str | os.PathLike[str],
    *,
    trust_directory: bool = False,
    files: Files | None = None,
) -> AbstractAsyncContextManager[DatabaseReader]:
    """Read a database that another process may be writing; needs no lock.

    ::

        async with trio_wal.open_database_reader("bank.db") as reader:
            print(reader.get(b"alice"))

    Meanwhile, the owner may come and go, make checkpoints, be killed, and open the database again.
    Nothing is written to log or store, except for a line in LMDB's table of readers
    (``store/lock.mdb``), which this process must be allowed to write.  Neither the owner nor the
    reader ever waits for the other; what a killed reader was reading is freed at the owner's
    next checkpoint.

    In the process that has the database open, read through its `Database`.  The page "Several
    processes" of the documentation is about workers, containers, and what errors mean.

    Args:
      path: the database's directory.
      trust_directory: as for `open_database`.
      files: another file system, such as `trio_wal.testing.MemoryFiles`.

    Raises, when called:
      TypeError, ValueError: an argument is wrong; the message names it.

    Raises, on entering:
      FileNotFoundError: there is nothing at ``path``.
      WrongDirectoryError: it is no database.
      UntrustedDirectoryError: others may write to it.
      CorruptLogError, UnsupportedFormatError: log or store cannot be read, or do not fit.
      OSError: the system refused something, as the permission to read the files.
      RuntimeError: trio is not running.
    """
    used = OsFiles() if files is None else files
    return _OpenDatabaseReader(
        used.absolute(check_path(path)), check_bool("trust_directory", trust_directory), used
    )


publish(DatabaseReader, open_database_reader)
