"""A database for asyncio: what `trio_wal.asyncio.open_database` and `open_database_reader` give.

Law: as `_facade_log`.  Transactions and snapshots are trio's; what is to be done with one in a
single stretch is a sync function, called in trio's thread: one way there for all of it.
"""

from __future__ import annotations

import inspect
import os
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Concatenate,
    Final,
    Literal,
    ParamSpec,
    TypeVar,
    cast,
    final,
    overload,
)

from . import (
    _database,
    _database_consumer,
    _database_reader,
    _database_writer,
    _snapshot,
    _transaction,
)
from ._archive import Archive
from ._changes import Commit
from ._database_statistics import DatabaseReaderStatistics, DatabaseStatistics
from ._engine import RecoveryReport
from ._exceptions import TransactionConflict
from ._exports import NoPublicConstructor, constructor
from ._facade import Block, PairStream, Stream
from ._facade_log import WriteAheadLog, new_wal
from ._health import Health
from ._identity import Bookmark
from ._portal import Line, Portal
from ._statistics import WriterStatistics
from ._util import check_int

if TYPE_CHECKING:
    # As in `_database`.
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")

D = TypeVar("D")
P = ParamSpec("P")
T = TypeVar("T")

_NO_DEFAULT: Final = object()


def _refuse_awaitable(result: object) -> None:
    """A sync function that has returned a coroutine, such as a lambda around an async one."""
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError(
            "fn must be a sync function, which is called in trio's thread, or an `async def` one"
        )


def _call(fn: Callable[..., T], source: object, args: tuple[object, ...]) -> T:
    result = fn(source, *args)
    _refuse_awaitable(result)
    return result


@final
class CommitStream(Stream[Commit], metaclass=NoPublicConstructor):
    """Committed transactions in order; what ``changes()`` returns.

    As `trio_wal.CommitStream`.  Up to 1,000 commits are fetched at once.
    """


new_commit_stream = constructor(CommitStream)


@final
class Transaction(AbstractAsyncContextManager["Transaction"], metaclass=NoPublicConstructor):
    """A serializable transaction; as `trio_wal.Transaction`, with coroutines.

    ::

        async with db.transaction() as tx:
            balance = int(await tx.get(b"alice", b"0"))
            await tx.put(b"alice", str(balance + 10).encode())

    Each call goes to trio's thread and back, and other transactions commit meanwhile: what this
    one has read may have changed by its end, which `trio_wal.TransactionConflict` says.  `call`
    does several things at once, and `Database.run` all of them: both are faster, and neither can
    conflict.
    """

    def __init__(self, line: Line, begin: Callable[[], _transaction.Transaction]) -> None:
        self._line = line
        self._begin = begin
        self._tx: _transaction.Transaction | None = None

    async def _enter(self) -> None:
        tx = self._begin()
        await tx.__aenter__()
        self._tx = tx

    async def __aenter__(self) -> Transaction:
        if self._tx is not None:
            raise RuntimeError("a transaction can be used only once")
        await self._line.call(self._enter)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._line.end(self._entered().__aexit__, exc_type, exc, traceback)

    def _entered(self) -> _transaction.Transaction:
        if self._tx is None:
            raise RuntimeError("enter the transaction first: async with db.transaction()")
        return self._tx

    async def call(
        self,
        fn: Callable[Concatenate[_transaction.Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call ``fn(tx, *args)``, a sync function, in trio's thread, with trio's transaction::

            await tx.call(jobs.put, (7, "mail"), Job(...))  # jobs: a Table

        Returns what it returned.  In that thread it must not touch anything of asyncio's.
        """
        return await self._line.call_sync(self._called, partial(fn, **kwargs), *args)

    def _called(self, fn: Callable[..., T], *args: object) -> T:
        return _call(fn, self._entered(), args)

    @overload
    async def get(self, key: bytes) -> bytes | None: ...
    @overload
    async def get(self, key: bytes, default: D) -> bytes | D: ...
    async def get(self, key: bytes, default: object = None) -> object:
        """As `trio_wal.Transaction.get`."""
        return await self._line.call_sync(self._entered().get, key, default)

    async def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> list[tuple[bytes, bytes]]:
        """As `trio_wal.Transaction.scan`; all pairs at once."""
        scan = partial(
            self._entered().scan, start, stop, prefix=prefix, reverse=reverse, limit=limit
        )
        return await self._line.call_sync(lambda: list(scan()))

    async def put(self, key: bytes, value: bytes) -> None:
        """As `trio_wal.Transaction.put`."""
        await self._line.call_sync(self._entered().put, key, value)

    async def insert(self, key: bytes, value: bytes) -> None:
        """As `trio_wal.Transaction.insert`."""
        await self._line.call_sync(self._entered().insert, key, value)

    async def update(self, key: bytes, value: bytes) -> None:
        """As `trio_wal.Transaction.update`."""
        await self._line.call_sync(self._entered().update, key, value)

    async def delete(self, key: bytes) -> None:
        """As `trio_wal.Transaction.delete`."""
        await self._line.call_sync(self._entered().delete, key)

    async def discard(self, key: bytes) -> bool:
        """As `trio_wal.Transaction.discard`."""
        return await self._line.call_sync(self._entered().discard, key)

    @overload
    async def pop(self, key: bytes) -> bytes: ...
    @overload
    async def pop(self, key: bytes, default: D) -> bytes | D: ...
    async def pop(self, key: bytes, default: object = _NO_DEFAULT) -> object:
        """As `trio_wal.Transaction.pop`."""
        pop = self._entered().pop
        if default is _NO_DEFAULT:
            return await self._line.call_sync(pop, key)
        return await self._line.call_sync(pop, key, default)

    async def delete_range(
        self, start: bytes | None = None, stop: bytes | None = None, *, prefix: bytes | None = None
    ) -> int:
        """As `trio_wal.Transaction.delete_range`."""
        delete = partial(self._entered().delete_range, start, stop, prefix=prefix)
        return await self._line.call_sync(delete)

    async def commit(self) -> int:
        """As `trio_wal.Transaction.commit`; cancellation as `WriteAheadLog.append`."""
        return await self._line.call(self._entered().commit)

    async def abort(self) -> None:
        """As `trio_wal.Transaction.abort`."""
        await self._line.call_sync(self._entered().abort)

    async def acknowledge(self, consumer: DatabaseConsumer, item: Commit) -> None:
        """`trio_wal.DatabaseConsumer.acknowledge_in` this transaction."""
        own = consumer.trio_consumer
        await self._line.call_sync(own.acknowledge_in, self._entered(), item)

    @property
    def lsn(self) -> int | None:
        """The LSN of the commit; None before."""
        return None if self._tx is None else self._tx.lsn


new_transaction = constructor(Transaction)


@final
class DatabaseConsumer(Stream[Commit], metaclass=NoPublicConstructor):
    """A named, durable place in a database's commits; as `trio_wal.DatabaseConsumer`."""

    @property
    def trio_consumer(self) -> _database_consumer.DatabaseConsumer:
        """The consumer in trio's thread, for functions that are called there, where
        ``acknowledge_in`` is sync."""
        return cast(_database_consumer.DatabaseConsumer, self._entered())

    @property
    def name(self) -> str:
        """As given to ``consumer()``."""
        return self.trio_consumer.name

    async def acknowledge(self, item: Commit) -> None:
        """As `trio_wal.DatabaseConsumer.acknowledge`."""
        await self._portal.call(self.trio_consumer.acknowledge, item)

    async def acknowledge_in(self, tx: Transaction, item: Commit) -> None:
        """As `trio_wal.DatabaseConsumer.acknowledge_in`."""
        if not isinstance(tx, Transaction):
            raise TypeError(f"tx must be a trio_wal.asyncio.Transaction, not {type(tx).__name__}")
        await tx.acknowledge(self, item)


new_database_consumer = constructor(DatabaseConsumer)


@final
class Snapshot(AbstractAsyncContextManager["Snapshot"], metaclass=NoPublicConstructor):
    """A consistent, durable view at one LSN; as `trio_wal.Snapshot`, with ``async with``."""

    def __init__(self, portal: Portal, begin: Callable[[], _snapshot.Snapshot]) -> None:
        self._portal = portal
        self._begin = begin
        self._snapshot: _snapshot.Snapshot | None = None

    def _enter(self) -> None:
        self._snapshot = self._begin().__enter__()

    async def __aenter__(self) -> Snapshot:
        if self._snapshot is not None:
            raise RuntimeError("a snapshot can be used only once")
        await self._portal.call_sync(self._enter)
        return self

    async def _leave(self) -> None:  # noqa: ASYNC124
        self._entered().close()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._portal.close(self._leave)

    def _entered(self) -> _snapshot.Snapshot:
        if self._snapshot is None:
            raise RuntimeError("enter the snapshot first: async with db.snapshot() as snap")
        return self._snapshot

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
        """
        return await self._portal.call_sync(_call, partial(fn, **kwargs), self._entered(), args)

    @overload
    async def get(self, key: bytes) -> bytes | None: ...
    @overload
    async def get(self, key: bytes, default: D) -> bytes | D: ...
    async def get(self, key: bytes, default: object = None) -> object:
        """As `trio_wal.Snapshot.get`."""
        return await self._portal.call_sync(self._entered().get, key, default)

    async def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> list[tuple[bytes, bytes]]:
        """As `trio_wal.Snapshot.scan`; all pairs at once.  For large ranges: `stream`."""
        scan = partial(
            self._entered().scan, start, stop, prefix=prefix, reverse=reverse, limit=limit
        )
        return await self._portal.call_sync(lambda: list(scan()))

    def stream(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> PairStream:
        """As `trio_wal.Snapshot.stream`."""
        begin = partial(
            self._entered().stream, start, stop, prefix=prefix, reverse=reverse, limit=limit
        )
        return PairStream(self._portal, begin)


new_snapshot = constructor(Snapshot)


@final
class DatabaseWriter(metaclass=NoPublicConstructor):
    """A named share of a database's queue; as `trio_wal.DatabaseWriter`."""

    def __init__(self, portal: Portal, writer: _database_writer.DatabaseWriter) -> None:
        self._portal = portal
        self._writer = writer

    def transaction(self) -> Transaction:
        """As `Database.transaction`, committed through this writer."""
        return new_transaction(self._portal.line(), self._writer.transaction)

    @overload
    async def run(
        self,
        fn: Callable[[Transaction, Unpack[Ts]], Awaitable[T]],
        *args: Unpack[Ts],
        retries: int = 10,
    ) -> T: ...
    @overload
    async def run(
        self,
        fn: Callable[[_transaction.Transaction, Unpack[Ts]], T],
        *args: Unpack[Ts],
        retries: int = 10,
    ) -> T: ...
    async def run(self, fn: Callable[..., Awaitable[T] | T], *args: object, retries: int = 10) -> T:
        """As `Database.run`, committed through this writer."""
        return await _run(self._portal, self._writer, self.transaction, fn, args, retries)

    async def put(self, key: bytes, value: bytes) -> int:
        """As `trio_wal.DatabaseWriter.put`."""
        return await self._portal.call(self._writer.put, key, value)

    async def delete(self, key: bytes) -> int:
        """As `trio_wal.DatabaseWriter.delete`."""
        return await self._portal.call(self._writer.delete, key)

    async def statistics(self) -> WriterStatistics:
        """As `trio_wal.DatabaseWriter.statistics`."""
        return await self._portal.call_sync(self._writer.statistics)


new_database_writer = constructor(DatabaseWriter)


async def _run(
    portal: Portal,
    trios: _database.Database | _database_writer.DatabaseWriter,
    begin: Callable[[], Transaction],
    fn: Callable[..., Awaitable[T] | T],
    args: tuple[object, ...],
    retries: int,
) -> T:
    """A sync function as a whole in trio's thread; an async one here, with calls to there."""
    if not inspect.iscoroutinefunction(fn):
        called = partial(_call_in, fn)
        return await portal.call(partial(trios.run, called, args, retries=retries))
    check_int("retries", retries, 0)
    while True:
        try:
            async with begin() as tx:
                result: T = await fn(tx, *args)
            return result
        except TransactionConflict:
            if not retries:
                raise
            retries -= 1


def _call_in(fn: Callable[..., T], tx: _transaction.Transaction, args: tuple[object, ...]) -> T:
    return _call(fn, tx, args)


@final
class Database(metaclass=NoPublicConstructor):
    """An open database, for the tasks of one asyncio event loop.

    Its methods are those of `trio_wal.Database`, with the same promises.  All are coroutines,
    also those that there are sync: they run in trio's thread.
    """

    def __init__(self, portal: Portal, db: _database.Database) -> None:
        self._portal = portal
        self._db = db

    # -- transactions --

    def transaction(self) -> Transaction:
        """A serializable transaction, as an async context manager; errors are raised on
        entering.  `run` is faster."""
        return new_transaction(self._portal.line(), self._db.transaction)

    @overload
    async def run(
        self,
        fn: Callable[[Transaction, Unpack[Ts]], Awaitable[T]],
        *args: Unpack[Ts],
        retries: int = 10,
    ) -> T: ...
    @overload
    async def run(
        self,
        fn: Callable[[_transaction.Transaction, Unpack[Ts]], T],
        *args: Unpack[Ts],
        retries: int = 10,
    ) -> T: ...
    async def run(self, fn: Callable[..., Awaitable[T] | T], *args: object, retries: int = 10) -> T:
        """Call ``fn(tx, *args)`` in a transaction and commit; again on a conflict.

        A sync function is called in trio's thread, with a `trio_wal.Transaction`: one way there
        for all that it reads and writes, and no other commit can come between.  It must neither
        wait nor touch anything of asyncio's.  An ``async def`` function is called here, with a
        `trio_wal.asyncio.Transaction`.

        Otherwise as `trio_wal.Database.run`.
        """
        return await _run(self._portal, self._db, self.transaction, fn, args, retries)

    async def view(
        self,
        fn: Callable[Concatenate[_snapshot.Snapshot, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call ``fn(snapshot, *args)``, a sync function, in trio's thread, with a snapshot of its
        own: `run` for what only reads, and sees durable state only::

            job = await db.view(lambda snap: jobs.get(snap, (7, "mail")))  # jobs: a Table

        Returns what it returned.
        """
        return await self._portal.call_sync(_view, self._db, partial(fn, **kwargs), args)

    async def put(self, key: bytes, value: bytes) -> int:
        """Set one key, in a transaction of its own; returns its LSN, durable then.

        As `trio_wal.Database.put`.  Commits of many tasks share a write and a sync.  Cancellation
        is that of `WriteAheadLog.append`.
        """
        return await self._portal.call(self._db.put, key, value)

    async def delete(self, key: bytes) -> int:
        """As `trio_wal.Database.delete`."""
        return await self._portal.call(self._db.delete, key)

    async def discard(self, key: bytes) -> bool:
        """As `trio_wal.Database.discard`."""
        return await self._portal.call(self._db.discard, key)

    async def write(self, mapping: Mapping[bytes, bytes | None]) -> int:
        """As `trio_wal.Database.write`."""
        # What is no mapping is refused there.
        given: object = mapping
        copied = dict(mapping) if isinstance(given, Mapping) else mapping
        return await self._portal.call(self._db.write, copied)

    def writer(
        self,
        name: str,
        *,
        max_queue_size: float | None = None,
        max_queue_bytes: float | None = None,
        priority: Literal["normal", "high"] = "normal",
    ) -> AbstractAsyncContextManager[DatabaseWriter]:
        """As `trio_wal.Database.writer`; errors are raised on entering."""
        begin = partial(
            self._db.writer,
            name,
            max_queue_size=max_queue_size,
            max_queue_bytes=max_queue_bytes,
            priority=priority,
        )
        return Block(self._portal, begin, new_database_writer)

    # -- reading what is durable --

    @overload
    async def get(self, key: bytes) -> bytes | None: ...
    @overload
    async def get(self, key: bytes, default: D) -> bytes | D: ...
    async def get(self, key: bytes, default: object = None) -> object:
        """As `trio_wal.Database.get`."""
        return await self._portal.call_sync(self._db.get, key, default)

    async def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> list[tuple[bytes, bytes]]:
        """As `trio_wal.Database.scan`; all pairs at once.  For large ranges: `stream`."""
        scan = partial(self._db.scan, start, stop, prefix=prefix, reverse=reverse, limit=limit)
        return await self._portal.call_sync(lambda: list(scan()))

    def stream(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> PairStream:
        """As `trio_wal.Database.stream`; errors are raised on entering."""
        begin = partial(self._db.stream, start, stop, prefix=prefix, reverse=reverse, limit=limit)
        return PairStream(self._portal, begin)

    def snapshot(self) -> Snapshot:
        """A consistent, durable view at one LSN: ``async with db.snapshot() as snap``."""
        return new_snapshot(self._portal, self._db.snapshot)

    def changes(self, start: int | Bookmark | None = None) -> CommitStream:
        """As `trio_wal.Database.changes`; errors are raised on entering."""
        return new_commit_stream(self._portal, partial(self._db.changes, start))

    async def wait_changed(
        self, key: bytes | None = None, *, prefix: bytes | None = None, since: int | None = None
    ) -> int:
        """As `trio_wal.Database.wait_changed`."""
        return await self._portal.call(self._db.wait_changed, key, prefix=prefix, since=since)

    def consumer(self, name: str, *, start: int | Bookmark | None = None) -> DatabaseConsumer:
        """As `trio_wal.Database.consumer`; errors are raised on entering."""
        return new_database_consumer(self._portal, partial(self._db.consumer, name, start=start))

    async def drop_consumer(self, name: str) -> None:
        """As `trio_wal.Database.drop_consumer`."""
        await self._portal.call(self._db.drop_consumer, name)

    # -- into the store --

    async def checkpoint(self) -> int:
        """As `trio_wal.Database.checkpoint`."""
        return await self._portal.call(self._db.checkpoint)

    async def backup(self, dest: str | os.PathLike[str]) -> int:
        """As `trio_wal.Database.backup`."""
        return await self._portal.call(self._db.backup, dest)

    async def snapshot_to(self, store: Archive) -> int:
        """As `trio_wal.Database.snapshot_to`."""
        return await self._portal.call(self._db.snapshot_to, store)

    # -- what it is --

    @property
    def path(self) -> str:
        """The database's directory, absolute."""
        return self._db.path

    @property
    def wal(self) -> WriteAheadLog:
        """The log in front, to read, follow and flush; only transactions write it."""
        wal: WriteAheadLog = new_wal(self._portal, self._db.wal)
        return wal

    @property
    def uuid(self) -> uuid.UUID:
        """Made with the database, kept for ever, also by its backups."""
        return self._db.uuid

    @property
    def recovery(self) -> RecoveryReport:
        """What this open found and did."""
        return self._db.recovery

    async def epoch(self) -> int:
        """`trio_wal.Database.epoch`."""
        return await self._portal.call_sync(lambda: self._db.epoch)

    async def durable_lsn(self) -> int:
        """`trio_wal.Database.durable_lsn`."""
        return await self._portal.call_sync(lambda: self._db.durable_lsn)

    async def statistics(self) -> DatabaseStatistics:
        """As `trio_wal.Database.statistics`."""
        return await self._portal.call_sync(self._db.statistics)

    async def health(self) -> Health:
        """As `trio_wal.Database.health`."""
        return await self._portal.call_sync(self._db.health)

    async def aclose(self) -> None:
        """As `trio_wal.Database.aclose`; leaving the block does it, and ends the thread."""
        await self._portal.close(self._db.aclose)

    def __repr__(self) -> str:
        return f"<trio_wal.asyncio.Database {self.path!r}>"


new_database = constructor(Database)


def _view(
    db: _database.Database | _database_reader.DatabaseReader,
    fn: Callable[..., T],
    args: tuple[object, ...],
) -> T:
    with db.snapshot() as snapshot:
        return _call(fn, snapshot, args)


@final
class DatabaseReader(metaclass=NoPublicConstructor):
    """Another process's database, without owning it; as `trio_wal.DatabaseReader`."""

    def __init__(self, portal: Portal, reader: _database_reader.DatabaseReader) -> None:
        self._portal = portal
        self._reader = reader
        self._uuid = reader.uuid

    @property
    def path(self) -> str:
        """The database's directory, absolute."""
        return self._reader.path

    @property
    def uuid(self) -> uuid.UUID:
        """The database's, and that of its backups."""
        return self._uuid

    async def epoch(self) -> int:
        """`trio_wal.DatabaseReader.epoch`."""
        return await self._portal.call_sync(lambda: self._reader.epoch)

    async def durable_lsn(self) -> int:
        """`trio_wal.DatabaseReader.durable_lsn`."""
        return await self._portal.call_sync(lambda: self._reader.durable_lsn)

    async def bookmark(self) -> Bookmark:
        """`trio_wal.DatabaseReader.bookmark`."""
        return await self._portal.call_sync(lambda: self._reader.bookmark)

    async def statistics(self) -> DatabaseReaderStatistics:
        """As `trio_wal.DatabaseReader.statistics`."""
        return await self._portal.call_sync(self._reader.statistics)

    async def health(self) -> Health:
        """As `trio_wal.DatabaseReader.health`."""
        return await self._portal.call_sync(self._reader.health)

    @overload
    async def get(self, key: bytes) -> bytes | None: ...
    @overload
    async def get(self, key: bytes, default: D) -> bytes | D: ...
    async def get(self, key: bytes, default: object = None) -> object:
        """As `trio_wal.DatabaseReader.get`."""
        return await self._portal.call_sync(self._reader.get, key, default)

    async def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> list[tuple[bytes, bytes]]:
        """As `trio_wal.DatabaseReader.scan`; all pairs at once.  For large ranges: `stream`."""
        scan = partial(self._reader.scan, start, stop, prefix=prefix, reverse=reverse, limit=limit)
        return await self._portal.call_sync(lambda: list(scan()))

    def stream(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> PairStream:
        """As `trio_wal.DatabaseReader.stream`; errors are raised on entering."""
        begin = partial(
            self._reader.stream, start, stop, prefix=prefix, reverse=reverse, limit=limit
        )
        return PairStream(self._portal, begin)

    def snapshot(self) -> Snapshot:
        """As `trio_wal.DatabaseReader.snapshot`, with ``async with``."""
        return new_snapshot(self._portal, self._reader.snapshot)

    async def view(
        self,
        fn: Callable[Concatenate[_snapshot.Snapshot, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """As `Database.view`."""
        return await self._portal.call_sync(_view, self._reader, partial(fn, **kwargs), args)

    def changes(self, start: int | Bookmark | None = None) -> CommitStream:
        """As `trio_wal.DatabaseReader.changes`; errors are raised on entering."""
        return new_commit_stream(self._portal, partial(self._reader.changes, start))

    async def wait_for(self, lsn_or_bookmark: int | Bookmark) -> None:
        """As `trio_wal.DatabaseReader.wait_for`."""
        await self._portal.call(self._reader.wait_for, lsn_or_bookmark)

    async def backup(self, dest: str | os.PathLike[str]) -> int:
        """As `trio_wal.DatabaseReader.backup`."""
        return await self._portal.call(self._reader.backup, dest)

    async def aclose(self) -> None:
        """As `trio_wal.DatabaseReader.aclose`; leaving the block does it, and ends the thread."""
        await self._portal.close(self._reader.aclose)


new_database_reader = constructor(DatabaseReader)
