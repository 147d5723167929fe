"""A share of the queue for transactions: `DatabaseWriter`.

Law: promises and the checks of what users pass, as in `_database`; lines are the log's, and
what a commit is, the versions'.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar, cast, final, overload

from trio.lowlevel import current_task, enable_ki_protection

from ._admission import Line
from ._exports import NoPublicConstructor, constructor, publish
from ._lines import Lines
from ._mvcc import Versions
from ._operations import OPERATION_OVERHEAD, check_key, check_size
from ._statistics import WriterStatistics
from ._transaction import Transaction, new_transaction_in, run_transaction
from ._util import check_bytes

if TYPE_CHECKING:
    # As in `_database`.
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")

T = TypeVar("T")


@final
class DatabaseWriter(metaclass=NoPublicConstructor):
    """A named share of a database's queue; see `Database.writer`.

    Its methods are those of `Database`, with the same promises; its commits wait in their own
    line.
    """

    def __init__(self, versions: Versions, lines: Lines, line: Line) -> None:
        self._versions = versions
        self._lines = lines
        self._line = line

    def _check(self) -> None:
        self._versions.check_open()
        self._lines.check(self._line)

    def transaction(self) -> Transaction:
        """A serializable transaction, committed through this writer; as `Database.transaction`.

        A commit that finds the writer's share, or the queue, full waits in the writer's line.
        Until it is let in it is no commit: other transactions do not see it, what it has read is
        validated only then, and cancelled it leaves nothing.

        Raises:
          trio.ClosedResourceError: the writer's block was left, or the database is closed.
          RuntimeError: called from another run of trio than the database's.
        """
        self._check()
        return new_transaction_in(self._versions, self._line)

    @overload
    async def run(
        self,
        fn: Callable[[Transaction, Unpack[Ts]], Awaitable[T]],
        *args: Unpack[Ts],
        retries: int = 10,
    ) -> T: ...
    @overload
    async def run(
        self, fn: Callable[[Transaction, Unpack[Ts]], T], *args: Unpack[Ts], retries: int = 10
    ) -> T: ...
    async def run(self, fn: Callable[..., Awaitable[T] | T], *args: object, retries: int = 10) -> T:
        """Call ``fn(tx, *args)`` in a transaction and commit; as `Database.run`."""
        return await run_transaction(self.transaction, fn, args, retries)

    @enable_ki_protection
    async def put(self, key: bytes, value: bytes) -> int:
        """Set one key, in a transaction of its own; returns its LSN, durable then.

        As `Database.put`, in this writer's line.
        """
        self._check()
        key, value = check_key(key), check_bytes("value", value)
        versions = self._versions
        size = 1 + OPERATION_OVERHEAD + len(key) + len(value)
        check_size(size, versions.max_transaction_bytes)
        if versions.checkpointing and versions.behind():
            await versions.wait_for_room()
        task = current_task()
        passed = versions.readers.of(task)
        lsn = await versions.commit_in_turn({key: value}, task, self._line)
        if passed is not None:
            passed.changed_past((key,))
        return lsn

    @enable_ki_protection
    async def delete(self, key: bytes) -> int:
        """Remove one key, in a transaction of its own; returns its LSN, durable then.

        As `Database.delete`, in this writer's line.

        Raises:
          KeyError: the key is absent.
        """
        tx = self.transaction()
        passed = self._versions.readers.of(current_task())
        async with tx:
            tx.delete(key)
        if passed is not None:
            passed.changed_past((key,))
        return cast(int, tx.lsn)

    def statistics(self) -> WriterStatistics:
        """A look at this writer's share of the queue.  Cheap; no checkpoint; also after its
        block."""
        return self._lines.statistics_of(self._line)

    def __repr__(self) -> str:
        state = "closed" if self._line.closed else "open"
        return f"<DatabaseWriter {self._line.name!r} of {self._versions.path!r} {state}>"


_new_database_writer = constructor(DatabaseWriter)


def open_database_writer(versions: Versions, lines: Lines, line: Line) -> DatabaseWriter:
    """From here on commits take turns."""
    versions.by_turns = True
    return _new_database_writer(versions, lines, line)


publish(DatabaseWriter)
