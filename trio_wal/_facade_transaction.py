"""Transactions of a database for asyncio, and what takes part in them: writers and consumers.

Law: as `_facade_log`.  A transaction is trio's; what is to be done with one in a single stretch is
a sync function, called in trio's thread: one way there for all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import (
    TYPE_CHECKING,
    Concatenate,
    Final,
    ParamSpec,
    TypeVar,
    cast,
    final,
    overload,
)

from . import _database, _database_consumer, _database_writer, _transaction
from ._changes import Commit
from ._exceptions import TransactionConflict
from ._exports import NoPublicConstructor, constructor
from ._facade import Entered, Held, Stream
from ._facade_reading import Reading, call
from ._portal import Line, Portal
from ._statistics import WriterStatistics
from ._util import check_int

if TYPE_CHECKING:
    # As in `_database`.
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")

C = TypeVar("C", bound=_database.Database | _database_writer.DatabaseWriter)
D = TypeVar("D")
P = ParamSpec("P")
T = TypeVar("T")

_NO_DEFAULT: Final = object()


@final
class Transaction(
    Entered[_transaction.Transaction],
    Reading[_transaction.Transaction],
    AbstractAsyncContextManager["Transaction"],
    metaclass=NoPublicConstructor,
):
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

    _what = "transaction"
    _how = " db.transaction()"

    def __init__(self, portal: Portal, begin: Callable[[], _transaction.Transaction]) -> None:
        super().__init__(portal, begin)
        self._line = portal.line()

    def _way(self) -> Line:
        return self._line

    async def call(
        self,
        fn: Callable[Concatenate[_transaction.Transaction, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Call ``fn(tx, *args)``, a sync function, in trio's thread, with trio's transaction::

            await tx.call(jobs.put, (7, "mail"), Job(...))  # jobs: a Table

        Returns what it returned.  In that thread it must not touch anything of asyncio's.

        Cancellation: if it raises `asyncio.CancelledError`, ``fn`` was not called; otherwise the
        call returns, and the cancellation is delivered where the task waits next.

        Raises:
          TypeError: ``fn`` is an async function.
          trio.ClosedResourceError: the transaction has ended, or the database is closed.

        What ``fn`` raises is raised, too; what it has written until then stays in the transaction.
        Nothing is durable before the commit.
        """
        return await self._line.call_sync(self._called, partial(fn, **kwargs), *args)

    def _called(self, fn: Callable[..., T], *args: object) -> T:
        return call(fn, self._entered(), args)

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
        """As `trio_wal.DatabaseConsumer.acknowledge_in`, in this transaction.

        Cancellation is that of `call`.
        """
        own = consumer.trio_consumer
        await self._line.call_sync(own.acknowledge_in, self._entered(), item)

    @property
    def lsn(self) -> int | None:
        """The LSN of the commit; None before."""
        return None if self._trios is None else self._trios.lsn


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


def _call_in(fn: Callable[..., T], tx: _transaction.Transaction, args: tuple[object, ...]) -> T:
    return call(fn, tx, args)


class Committing(Held[C]):
    """For a database and for a writer of one, whose commits wait in a line of their own."""

    def transaction(self) -> Transaction:
        """A serializable transaction, as an async context manager; errors are raised on
        entering.  `run` is faster."""
        return new_transaction(self._portal, self._trios.transaction)

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
        if not inspect.iscoroutinefunction(fn):
            called = partial(_call_in, fn)
            return await self._portal.call(partial(self._trios.run, called, args, retries=retries))
        check_int("retries", retries, 0)
        while True:
            try:
                async with self.transaction() as tx:
                    result: T = await fn(tx, *args)
                return result
            except TransactionConflict:
                if not retries:
                    raise
                retries -= 1

    async def put(self, key: bytes, value: bytes) -> int:
        """Set one key, in a transaction of its own; returns its LSN, durable then.

        As `trio_wal.Database.put`.  Commits of many tasks share a write and a sync.  Cancellation
        is that of `WriteAheadLog.append`.
        """
        return await self._portal.call(self._trios.put, key, value)

    async def delete(self, key: bytes) -> int:
        """As `trio_wal.Database.delete`."""
        return await self._portal.call(self._trios.delete, key)


@final
class DatabaseWriter(Committing[_database_writer.DatabaseWriter], metaclass=NoPublicConstructor):
    """A named share of a database's queue; as `trio_wal.DatabaseWriter`.

    Its methods are those of `Database`, with the same promises; its commits wait in their own
    line.
    """

    async def statistics(self) -> WriterStatistics:
        """As `trio_wal.DatabaseWriter.statistics`."""
        return await self._portal.call_sync(self._trios.statistics)


new_database_writer = constructor(DatabaseWriter)
