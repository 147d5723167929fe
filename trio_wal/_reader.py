"""Reading a log beside the process that writes it: `open_reader` and `LogReader`.

Law: what is promised stands here, in the docstrings; what keeps the promises is the source's: of
files `_watchsource`, of a log on servers `_streamlog`.
"""

from __future__ import annotations

import os
import uuid
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, final

import trio
from trio.lowlevel import enable_ki_protection

from ._caslog import RemoteLog
from ._engine import Forked, Source
from ._exports import NoPublicConstructor, constructor, publish
from ._files import Files, close_quietly
from ._identity import Bookmark
from ._park import end_forked, require_trio
from ._remotelog import refuse_options, remote_log
from ._stream import RecordStream, new_record_stream
from ._system.files import OsFiles
from ._text import printable
from ._util import Unentered, check_path
from ._watchsource import WatchSource
from ._worker import Blocking

if TYPE_CHECKING:
    from ._streamlog import StreamSource


class _ReaderSource(Source, Protocol):
    """What a reader has: a log of which another owner may be writing."""

    @property
    def uuid(self) -> uuid.UUID: ...

    def look(self) -> None:
        """Bring `tail` up to date, where that does not take waiting."""
        ...

    async def aclose(self) -> None:
        """Streams that wait get `trio.ClosedResourceError`."""
        ...

    def disown(self) -> None:
        """This is a forked child."""
        ...


@final
class LogReader(metaclass=NoPublicConstructor):
    """Reads a log without owning it; what `open_reader` gives.

    Takes no lock and writes nothing; another process may write the log at the same time.
    Gives durable records only.

    If the log is damaged, everything before the damage is given, and then `CorruptLogError`
    is raised.  Its properties say what is proven: `durable_lsn` may be a record that
    cannot be read.
    """

    def __init__(self, files: Files, source: _ReaderSource) -> None:
        self._source = source
        self._closed = False
        files.on_fork(self._disown)

    @property
    def path(self) -> str:
        """The log's directory."""
        return self._source.name

    @property
    def uuid(self) -> uuid.UUID:
        """The log's, and that of its copies."""
        self._check_open()
        return self._source.uuid

    @property
    def epoch(self) -> int:
        """Grows when LSNs may be given a second time; reads a few blocks of the log's files."""
        self._look()
        return self._source.tail.epoch

    @property
    def bookmark(self) -> Bookmark:
        """`durable_lsn` with the `epoch` of the same look."""
        self._look()
        tail = self._source.tail
        return Bookmark(tail.durable_lsn, tail.epoch)

    @property
    def first_lsn(self) -> int:
        """The oldest record now; reads a few blocks of the log's files."""
        self._look()
        return self._source.tail.first_lsn

    @property
    def durable_lsn(self) -> int:
        """The newest record known to be durable now; reads a few blocks of the log's files."""
        self._look()
        return self._source.tail.durable_lsn

    def _look(self) -> None:
        self._check_open()
        self._source.look()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"{printable(self.path)}: this reader is closed")

    def read(self, start: int | Bookmark | None = None, stop: int | None = None) -> RecordStream:
        """As `WriteAheadLog.read`."""
        self._check_open()
        return new_record_stream(self._source, start, stop, follow=False)

    def follow(self, start: int | Bookmark | None = None) -> RecordStream:
        """As `WriteAheadLog.follow`, until it is left: the writer may come and go.

        On Linux the writer wakes the stream, within a millisecond or so after more has become
        durable; elsewhere, and on file systems that tell of no changes, the log's files are looked
        at every 20 ms.
        """
        self._check_open()
        return new_record_stream(self._source, start, None, follow=True)

    async def aclose(self) -> None:
        """Close the reader; a checkpoint; idempotent.

        Streams that go on reading get `trio.ClosedResourceError`.  A cancellation is delivered
        when it is closed.
        """
        await self._close()
        await trio.lowlevel.checkpoint()

    def _disown(self) -> None:
        """In a forked child there is nothing to wait for: its threads are the parent's."""
        self._closed = True
        self._source.disown()

    async def _close(self) -> None:
        if not self._closed:
            self._closed = True
            with trio.CancelScope(shield=True):
                await self._source.aclose()


_new_log_reader = constructor(LogReader)


@final
class _OpenReader(Unentered, AbstractAsyncContextManager[LogReader]):
    _call = "trio_wal.open_reader"

    def __init__(self, path: str, files: Files) -> None:
        self._path = path
        self._files = files
        self._reader: LogReader | None = None

    async def __aenter__(self) -> LogReader:
        if self._reader is not None:
            raise RuntimeError("open_reader() gives a context manager that can be used only once")
        require_trio("open_reader")
        blocking = Blocking(threaded=self._files.threaded)
        directory = await blocking(self._files.open_directory, self._path)
        try:
            source = WatchSource(directory, blocking)
            await source.refresh()
        except BaseException:
            close_quietly(directory)
            raise
        self._reader = _new_log_reader(self._files, source)
        return self._reader

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._reader is not None:
            await self._reader._close()


@final
class _OpenRemoteReader(Unentered, AbstractAsyncContextManager[LogReader]):
    """For a log that servers keep: what they say of it arrives in a task."""

    _call = "trio_wal.open_reader"

    def __init__(self, log: RemoteLog) -> None:
        self._log = log
        self._reader: LogReader | None = None
        self._nursery_manager = trio.open_nursery()
        self._nursery: trio.Nursery
        self._source: StreamSource

    @enable_ki_protection
    async def __aenter__(self) -> LogReader:
        if self._reader is not None:
            raise RuntimeError("open_reader() gives a context manager that can be used only once")
        require_trio("open_reader")
        # With all that it is made of, of which a log in a directory has no need.
        from ._replicated import open_remote_source

        source = self._source = await open_remote_source(self._log)
        self._nursery = await self._nursery_manager.__aenter__()
        self._nursery.start_soon(source.keep_up)
        self._reader = _new_log_reader(OsFiles(), source)
        return self._reader

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._reader is not None:
            if self._source.forked:
                await end_forked(self._nursery, Forked)
            else:
                await self._reader._close()
                self._nursery.cancel_scope.cancel()
            # Its task has ended, or does now: this wraps nothing.
            await self._nursery_manager.__aexit__(None, None, None)


def open_reader(
    path: str | os.PathLike[str] | RemoteLog, *, files: Files | None = None
) -> AbstractAsyncContextManager[LogReader]:
    """Read a log that this or another process may be writing; needs no lock, never writes.

    ::

        async with trio_wal.open_reader("orders.wal") as reader:
            async with reader.follow() as records:
                async for record in records:
                    ...

    Args:
      path: the log's directory; or a log that servers keep, from any machine, as for `open_wal`.
          What its properties say is then a few milliseconds old.
      files: another file system, such as `trio_wal.testing.MemoryFiles`.

    Raises, on entering:
      FileNotFoundError: there is nothing at ``path``.
      WrongDirectoryError: it is no log.
      CorruptLogError, UnsupportedFormatError: it is one of which nothing can be read.
      RuntimeError: trio is not running.
    """
    log = remote_log(path)
    if log is not None:
        refuse_options("a replicated log", files=files is not None)
        return _OpenRemoteReader(log)
    assert not isinstance(path, RemoteLog)
    return _OpenReader(check_path(path), OsFiles() if files is None else files)


publish(LogReader, open_reader)
