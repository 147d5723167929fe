"""Reading a database for asyncio: snapshots, committed transactions, and what reads both.

Law: as `_facade_log`.  What is to be read in a single stretch is read by a sync function, called in
trio's thread.
"""

from __future__ import annotations

import inspect
import os
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import (
    TYPE_CHECKING,
    Concatenate,
    ParamSpec,
    TypeVar,
    final,
    overload,
)

from . import _database, _database_reader, _snapshot
from ._changes import Commit
from ._database_statistics import DatabaseReaderStatistics
from ._exports import NoPublicConstructor, constructor
from ._facade import Entered, Facade, Opened, PairStream, Stream
from ._health import Health
from ._identity import Bookmark
from ._portal import Portal

if TYPE_CHECKING:
    from ._table import Readable

D = TypeVar("D")
P = ParamSpec("P")
R = TypeVar("R", bound="Readable")
T = TypeVar("T")
V = TypeVar("V", bound=_snapshot.Snapshot | _database.Database | _database_reader.DatabaseReader)
W = TypeVar("W", bound=_database.Database | _database_reader.DatabaseReader)


def _refuse_awaitable(result: object) -> None:
    """A sync function that has returned a coroutine, such as a lambda around an async one."""
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError(
            "fn must be a sync function, which is called in trio's thread, or an `async def` one"
        )


def call(fn: Callable[..., T], source: object, args: tuple[object, ...]) -> T:
    result = fn(source, *args)
    _refuse_awaitable(result)
    return result


class Reading(Facade[R]):
    """For all that has keys and values, also a transaction."""

    @overload
    async def get(self, key: bytes) -> bytes | None: ...
    @overload
    async def get(self, key: bytes, default: D) -> bytes | D: ...
    async def get(self, key: bytes, default: object = None) -> object:
        """As ``get`` under trio: the value of ``key``, or ``default``."""
        return await self._way().call_sync(self._entered().get, key, default)

    async def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> list[tuple[bytes, bytes]]:
        """As ``scan`` under trio; all pairs at once.  For large ranges there is ``stream``, but not
        in a transaction."""
        scan = partial(
            self._entered().scan, start, stop, prefix=prefix, reverse=reverse, limit=limit
        )
        return await self._way().call_sync(lambda: list(scan()))


class Streaming(Reading[V]):
    """For all that shows one durable state, or one at a time."""

    def stream(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> PairStream:
        """As ``stream`` under trio; errors are raised on entering."""
        begin = partial(
            self._entered().stream, start, stop, prefix=prefix, reverse=reverse, limit=limit
        )
        return PairStream(self._portal, begin)


@final
class CommitStream(Stream[Commit], metaclass=NoPublicConstructor):
    """Committed transactions in order; what ``changes()`` returns.

    As `trio_wal.CommitStream`.  Up to 1,000 commits are fetched at once.
    """


new_commit_stream = constructor(CommitStream)


@final
class Snapshot(
    Entered[_snapshot.Snapshot],
    Streaming[_snapshot.Snapshot],
    AbstractAsyncContextManager["Snapshot"],
    metaclass=NoPublicConstructor,
):
    """A consistent, durable view at one LSN; as `trio_wal.Snapshot`, with ``async with``."""

    _what = "snapshot"
    _how = " db.snapshot() as snap"

    async def _enter(self) -> None:  # noqa: ASYNC124
        self._trios = self._begin().__enter__()

    async def _leave(self, *_: object) -> None:  # noqa: ASYNC124
        self._entered().close()

    @property
    def lsn(self) -> int:
        """The newest transaction that it contains."""
        return self._entered().lsn

    @property
    def bookmark(self) -> Bookmark:
        """`lsn`, with the database's epoch."""
        return self._entered().bookmark

    async def call(
        self,
        fn: Callable[Concatenate[_snapshot.Snapshot, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call ``fn(snapshot, *args)``, a sync function, in trio's thread, with trio's snapshot::

            job = await snap.call(lambda snap: jobs.get(snap, (7, "mail")))  # jobs: a Table

        Returns what it returned.

        Cancellation: if it raises `asyncio.CancelledError`, ``fn`` was not called; otherwise the
        call returns, and the cancellation is delivered where the task waits next.

        Raises:
          TypeError: ``fn`` is an async function.
          trio.ClosedResourceError: the database is closed.

        What ``fn`` raises is raised, too.
        """
        return await self._portal.call_sync(call, partial(fn, **kwargs), self._entered(), args)


new_snapshot = constructor(Snapshot)


def _view(
    db: _database.Database | _database_reader.DatabaseReader,
    fn: Callable[..., T],
    args: tuple[object, ...],
) -> T:
    with db.snapshot() as snapshot:
        return call(fn, snapshot, args)


class Viewing(Opened[W], Streaming[W]):
    """For a database and for another process's."""

    async def view(
        self,
        fn: Callable[Concatenate[_snapshot.Snapshot, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call ``fn(snapshot, *args)``, a sync function, in trio's thread, with a snapshot of its
        own: `Database.run` for what only reads, and sees durable state only::

            job = await db.view(lambda snap: jobs.get(snap, (7, "mail")))  # jobs: a Table

        Returns what it returned.
        """
        return await self._portal.call_sync(_view, self._trios, partial(fn, **kwargs), args)

    def snapshot(self) -> Snapshot:
        """A consistent, durable view at one LSN: ``async with db.snapshot() as snap``."""
        return new_snapshot(self._portal, self._trios.snapshot)

    def changes(self, start: int | Bookmark | None = None) -> CommitStream:
        """As ``changes`` under trio; errors are raised on entering."""
        return new_commit_stream(self._portal, partial(self._trios.changes, start))

    async def backup(self, dest: str | os.PathLike[str]) -> int:
        """As ``backup`` under trio."""
        return await self._portal.call(self._trios.backup, dest)

    async def health(self) -> Health:
        """As ``health`` under trio."""
        return await self._portal.call_sync(self._trios.health)


@final
class DatabaseReader(Viewing[_database_reader.DatabaseReader], metaclass=NoPublicConstructor):
    """Another process's database, without owning it; as `trio_wal.DatabaseReader`."""

    def __init__(self, portal: Portal, reader: _database_reader.DatabaseReader) -> None:
        super().__init__(portal, reader)
        self._uuid = reader.uuid

    @property
    def uuid(self) -> uuid.UUID:
        """The database's, and that of its backups."""
        return self._uuid

    async def bookmark(self) -> Bookmark:
        """`trio_wal.DatabaseReader.bookmark`."""
        return await self._portal.call_sync(lambda: self._trios.bookmark)

    async def statistics(self) -> DatabaseReaderStatistics:
        """As `trio_wal.DatabaseReader.statistics`."""
        return await self._portal.call_sync(self._trios.statistics)

    async def wait_for(self, lsn_or_bookmark: int | Bookmark) -> None:
        """As `trio_wal.DatabaseReader.wait_for`."""
        await self._portal.call(self._trios.wait_for, lsn_or_bookmark)


new_database_reader = constructor(DatabaseReader)
