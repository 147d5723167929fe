"""Logs and databases for asyncio programs: `trio_wal.asyncio.open_wal` and `open_database`.

Law: the same names and promises as under trio.

Each ``open_*()`` starts a thread in which trio runs; what it gives has the methods of trio's
object, as coroutines.  The page "asyncio and threads" of the documentation says what is different.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Any

from . import _exports
from ._database_reader import open_database_reader as _open_database_reader
from ._facade import Opening as _Opening, PairStream as PairStream, takes as _takes
from ._facade_database import Database as Database, new_database as _new_database
from ._facade_log import (
    Consumer as Consumer,
    LogReader as LogReader,
    RecordStream as RecordStream,
    WriteAheadLog as WriteAheadLog,
    Writer as Writer,
    new_log_reader as _new_log_reader,
    new_wal as _new_wal,
)
from ._facade_reading import (
    CommitStream as CommitStream,
    DatabaseReader as DatabaseReader,
    Snapshot as Snapshot,
    new_database_reader as _new_database_reader,
)
from ._facade_transaction import (
    DatabaseConsumer as DatabaseConsumer,
    DatabaseWriter as DatabaseWriter,
    Transaction as Transaction,
)
from ._opening import open_database as _open_database
from ._reader import open_reader as _open_reader
from ._wal import open_wal as _open_wal


@_takes(_open_wal)
def open_wal(*args: Any, **options: Any) -> AbstractAsyncContextManager[WriteAheadLog]:
    """Open the write-ahead log in a directory, in a thread of its own; as `trio_wal.open_wal`.

    ::

        async with trio_wal.asyncio.open_wal("orders.wal") as wal:
            lsn = await wal.append(b"order 17: two of blue")

    Leaving the block makes every accepted record durable and ends the thread, shielded from
    cancellation.  The thread is also ended, and the log closed so, where the event loop is closed
    or the program ends inside of the block.

    Arguments and errors are those of `trio_wal.open_wal`.  Also raised on entering:

    Raises:
      RuntimeError: asyncio is not running.
      OSError: the thread cannot be started.
    """
    return _Opening(_open_wal(*args, **options), "trio_wal.asyncio.open_wal", _new_wal)


@_takes(_open_database)
def open_database(*args: Any, **options: Any) -> AbstractAsyncContextManager[Database]:
    """Open a transactional key-value store, in a thread of its own; as `trio_wal.open_database`.

    ::

        async with trio_wal.asyncio.open_database("bank.db") as db:
            await db.put(b"alice", b"10")
            await db.run(lambda tx: tx.put(b"bob", b"10"))

    Its block ends as that of `open_wal`.  Arguments and errors are those of
    `trio_wal.open_database`, and the same two more.
    """
    opened = _open_database(*args, **options)
    return _Opening(opened, "trio_wal.asyncio.open_database", _new_database)


@_takes(_open_reader)
def open_reader(*args: Any, **options: Any) -> AbstractAsyncContextManager[LogReader]:
    """Read a log that this or another process may be writing; as `trio_wal.open_reader`.

    Arguments and errors are those of `trio_wal.open_reader`, and the two of `open_wal` here.
    """
    return _Opening(_open_reader(*args, **options), "trio_wal.asyncio.open_reader", _new_log_reader)


@_takes(_open_database_reader)
def open_database_reader(*args: Any, **options: Any) -> AbstractAsyncContextManager[DatabaseReader]:
    """Read a database that another process may be writing; as `trio_wal.open_database_reader`.

    Arguments and errors are those of `trio_wal.open_database_reader`, and the two of `open_wal`
    here.
    """
    opened = _open_database_reader(*args, **options)
    name = "trio_wal.asyncio.open_database_reader"
    return _Opening(opened, name, _new_database_reader)


_exports.say_public(__name__, globals())
