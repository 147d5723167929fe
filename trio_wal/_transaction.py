"""One transaction: its block, what it will write, and its end.

Law: no await but in the block's ends and `commit`.  What was read, and whether that still holds,
is `_readset`'s.  Check and hand-over to the log happen in one stretch without a checkpoint: the
order of commits is the order of the log, without locks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, TypeVar, cast, final, overload

import trio
from trio.lowlevel import Task, current_task, enable_ki_protection

from ._exceptions import KeyExistsError, TransactionConflict
from ._exports import NoPublicConstructor, publish
from ._mvcc import Versions
from ._operations import (
    KEY_BYTES_MAX,
    OPERATION_OVERHEAD,
    Writes,
    check_key,
    check_range,
    check_size,
)
from ._park import no_trio
from ._places import Move, encode_moves, is_after
from ._readset import ReadSet
from ._util import check_bytes, check_int

D = TypeVar("D")
T = TypeVar("T")


class _NoDefault:
    pass


_NO_DEFAULT: Final = _NoDefault()


@final
class Transaction(AbstractAsyncContextManager["Transaction"], metaclass=NoPublicConstructor):
    """A serializable transaction; what `Database.transaction` gives.

    ::

        async with db.transaction() as tx:
            balance = int(tx.get(b"alice", b"0"))
            tx.put(b"alice", str(balance + 10).encode())

    The end of the block commits; an exception aborts.  A block without ``await`` between
    its first read and its end cannot conflict.  It belongs to the task that entered it.
    """

    # Defaults on the class: few transactions need these of their own.
    _lsn: int | None = None
    _line: Any = None
    """The log's, through which it is committed; None: the log's own."""
    _moves: dict[str, Move] | None = None
    """What it does to the places of consumers."""
    _guards: tuple[Callable[[], None], ...] = ()
    """Those raise where their consumers are no longer in use."""

    def __init__(self, versions: Versions) -> None:
        # What every transaction looks at: an instance's own attributes are the cheapest to read.
        self._versions = versions
        self._task: Task | None = None
        self._reads: ReadSet | None = None
        """From the first read on."""
        self._writes: Writes = {}
        self._bytes = 1
        self._ended = False
        self._plain = True
        """Nothing was read or acknowledged, and it has no line of its own."""

    # -- the block --

    async def __aenter__(self) -> Transaction:
        if self._task is not None:
            raise RuntimeError("a transaction can be used only once")
        versions = self._versions
        if versions.checkpointing and versions.behind():
            await versions.wait_for_room()
        try:
            self._task = current_task()
        except RuntimeError:
            raise no_trio("db.transaction") from None
        return self

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ended:
            if exc_type is None and self._lsn is None:
                await trio.lowlevel.checkpoint()
            return
        if exc_type is not None:
            self._end()
        elif self._plain and self._writes:
            # As `commit`, which has nothing to validate here.
            task = current_task()
            if self._task is not task:
                self._check()
            self._ended = True
            self._lsn = await self._versions.commit(self._writes, task)
        elif self._reads is not None and self._versions.closed:
            self._end()
            raise trio.ClosedResourceError("the database was closed before this commit")
        else:
            await self.commit()

    def _check(self) -> None:
        # One that has read has lost its view when the database is closed.
        if self._ended or (self._reads is not None and self._versions.closed):
            raise trio.ClosedResourceError("this transaction has ended")
        if self._task is not current_task():
            if self._task is None:
                raise RuntimeError("enter the transaction first: async with db.transaction()")
            raise trio.BusyResourceError("another task is using this transaction")

    # -- reading --

    @enable_ki_protection
    def _begin_reading(self) -> ReadSet:
        reads = self._reads
        if reads is None:
            self._plain = False
            reads = self._reads = ReadSet(self._versions, self._task)
        return reads

    def _read(self, key: bytes) -> bytes | None:
        if key in self._writes:
            return self._writes[key]
        return (self._reads or self._begin_reading()).get(key)

    @overload
    def get(self, key: bytes) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: D) -> bytes | D: ...
    def get(self, key: bytes, default: object = None) -> object:
        """The value of ``key``, or ``default``; sees its own writes.  All else counts as
        read: where it has changed by the commit, that raises `TransactionConflict`.

        Raises:
          TypeError, ValueError: ``key`` is not 1 to 511 bytes.
          trio.ClosedResourceError: the transaction has ended, or the database is closed.
          trio.BusyResourceError: another task has begun the transaction.
          OSError, CorruptLogError: as `Database.get`.
        """
        # The fast paths of _check, check_key and _read.
        reads = self._reads
        if (
            self._ended
            or self._task is not current_task()
            or (reads is not None and self._versions.closed)
        ):
            self._check()
        if type(key) is not bytes or not 0 < len(key) <= KEY_BYTES_MAX:
            key = check_key(key)
        if key in self._writes:
            value = self._writes[key]
        else:
            value = (reads or self._begin_reading()).get(key)
        return default if value is None else value

    def __contains__(self, key: bytes) -> bool:
        self._check()
        return self._read(check_key(key)) is not None

    def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values with ``start <= key < stop``, in order; see `Database.scan`.

        Sees the transaction's own writes as of this call.  What was scanned over counts
        as read, also where nothing was found.
        """
        self._check()
        start, stop = check_range(start, stop, prefix, limit)
        return self._scan(start, stop, reverse, limit)

    def _scan(
        self, start: bytes | None, stop: bytes | None, reverse: bool, limit: int | None
    ) -> Iterator[tuple[bytes, bytes]]:
        reads = self._begin_reading()
        own = sorted(
            (
                (key, value)
                for key, value in self._writes.items()
                if (start is None or key >= start) and (stop is None or key < stop)
            ),
            reverse=reverse,
        )
        place = reads.begin_range(start, stop)
        return self._scan_from(reads, own, place, start, stop, reverse, limit)

    def _scan_from(
        self,
        reads: ReadSet,
        own: list[tuple[bytes, bytes | None]],
        place: int,
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        limit: int | None,
    ) -> Iterator[tuple[bytes, bytes]]:
        self._check()
        versions = self._versions
        given = 0
        last: bytes | None = None
        complete = False
        try:
            if limit != 0:
                for key, value in _merge(reads.scan(start, stop, reverse), own, reverse):
                    given += 1
                    last = key
                    yield key, value
                    if given == limit:
                        return
                    if self._ended or versions.closed:
                        self._check()
            complete = limit != 0
        finally:
            if not complete:
                reads.end_range(place, last, reverse)

    # -- writing --

    def put(self, key: bytes, value: bytes) -> None:
        """Set ``key`` to ``value``; buffered until the commit.

        Raises:
          TypeError, ValueError: ``key`` is not 1 to 511 bytes, ``value`` not bytes.
          RecordTooLargeError: the transaction would be over ``max_record_size``.
          trio.ClosedResourceError, trio.BusyResourceError: as for `get`.
        """
        # The fast paths of _check, check_key and check_bytes.
        if (
            self._ended
            or self._task is not current_task()
            or (self._reads is not None and self._versions.closed)
        ):
            self._check()
        if type(key) is not bytes or not 0 < len(key) <= KEY_BYTES_MAX:
            key = check_key(key)
        if type(value) is not bytes:
            value = check_bytes("value", value)
        # As `_write`, for the common case.
        size = self._bytes + OPERATION_OVERHEAD + len(key) + len(value)
        if key in self._writes or size > self._versions.max_transaction_bytes:
            self._write(key, value)
            return
        self._bytes = size
        self._writes[key] = value

    def _write(self, key: bytes, value: bytes | None) -> None:
        size = self._bytes + OPERATION_OVERHEAD + len(key) + (0 if value is None else len(value))
        if key in self._writes:
            before = self._writes[key]
            size -= OPERATION_OVERHEAD + len(key) + (0 if before is None else len(before))
        check_size(size, self._versions.max_transaction_bytes)
        self._bytes = size
        self._writes[key] = value

    def insert(self, key: bytes, value: bytes) -> None:
        """Like `put`; `KeyExistsError` if the key is there, which counts as read."""
        self._check()
        key = check_key(key)
        if self._read(key) is not None:
            raise KeyExistsError(key)
        self._write(key, check_bytes("value", value))

    def update(self, key: bytes, value: bytes) -> None:
        """Like `put`; `KeyError` if the key is absent, which counts as read."""
        self._check()
        key = check_key(key)
        if self._read(key) is None:
            raise KeyError(key)
        self._write(key, check_bytes("value", value))

    def delete(self, key: bytes) -> None:
        """Remove ``key``; `KeyError` if it is absent, which counts as read.

        Other errors are as for `get` and `put`.
        """
        self._check()
        key = check_key(key)
        if self._read(key) is None:
            raise KeyError(key)
        self._write(key, None)

    def discard(self, key: bytes) -> bool:
        """Remove ``key``, if it is there; returns whether it was, which counts as read.  Errors are
        as for `get` and `put`."""
        self._check()
        key = check_key(key)
        if self._read(key) is None:
            return False
        self._write(key, None)
        return True

    @overload
    def pop(self, key: bytes) -> bytes: ...
    @overload
    def pop(self, key: bytes, default: D) -> bytes | D: ...
    def pop(self, key: bytes, default: object = _NO_DEFAULT) -> object:
        """Remove ``key`` and return its value; ``default`` if it is absent, or `KeyError`
        without one.

        It counts as read.  Other errors are as for `get` and `put`.
        """
        self._check()
        key = check_key(key)
        value = self._read(key)
        if value is None:
            if isinstance(default, _NoDefault):
                raise KeyError(key)
            return default
        self._write(key, None)
        return value

    def delete_range(
        self, start: bytes | None = None, stop: bytes | None = None, *, prefix: bytes | None = None
    ) -> int:
        """Remove the keys with ``start <= key < stop``, or all that start with ``prefix``; returns
        how many there were.

        The range counts as read, so that no other commit can have put something into it.  It
        takes memory for each key: of millions, delete some thousands in a transaction.

        Raises:
          RecordTooLargeError: the transaction would be over ``max_record_size``; nothing was
              removed.
        """
        self._check()
        start, stop = check_range(start, stop, prefix, None)
        keys = [key for key, _ in self._scan(start, stop, reverse=False, limit=None)]
        writes, size = self._writes, self._bytes
        for key in keys:
            before = writes.get(key)
            size += OPERATION_OVERHEAD + len(key) if before is None else -len(before)
        check_size(size, self._versions.max_transaction_bytes)
        self._bytes = size
        writes.update(dict.fromkeys(keys))
        return len(keys)

    # -- the end --

    def _end(self) -> None:
        self._ended = True
        if self._reads is not None:
            self._versions.readers.unpin(self._reads)

    @enable_ki_protection
    async def commit(self) -> int:
        """Commit; returns the LSN, and the transaction is durable then.

        A transaction without writes writes nothing; it returns the newest durable LSN, as
        soon as everything that it read is durable.

        Cancellation: if it raises `trio.Cancelled`, nothing of it is in the log.  Where
        another transaction has read its writes already, or they are being written, the
        outcome is waited for and the call returns.

        Raises:
          TransactionConflict: something that was read has changed; nothing was written.
          LogFullError, LogFailedError, trio.ClosedResourceError: as `WriteAheadLog.append`.
        """
        self._check()
        versions, reads = self._versions, self._reads
        conflict = None if reads is None else reads.conflict()
        if versions.by_turns and (self._writes or self._moves) and conflict is None:
            return await self._commit_in_turn()
        self._end()
        if reads is not None and conflict is not None:
            versions.note_conflict()
            await trio.lowlevel.checkpoint()
            raise TransactionConflict(conflict, own=reads.is_own(conflict))
        for guard in self._guards:
            guard()
        if self._writes or self._moves:
            self._lsn = await versions.commit(self._writes, current_task(), self._moves)
        else:
            self._lsn = await versions.wait_for(None if reads is None else reads.dependency)
        return self._lsn

    async def _commit_in_turn(self) -> int:
        """What was read must hold when the log lets the commit in, not when it gets in line."""
        versions = self._versions
        try:
            self._lsn = await versions.commit_in_turn(
                self._writes, current_task(), self._line, self._validate, self._moves
            )
        finally:
            self._end()
        return self._lsn

    def _validate(self) -> None:
        reads = self._reads
        conflict = None if reads is None else reads.conflict()
        self._end()
        if reads is not None and conflict is not None:
            self._versions.note_conflict()
            raise TransactionConflict(conflict, own=reads.is_own(conflict))
        for guard in self._guards:
            guard()

    def _acknowledge(
        self, versions: Versions, name: str, move: Move | None, guard: Callable[[], None]
    ) -> None:
        self._check()
        if versions is not self._versions:
            raise ValueError("tx must be a transaction of the consumer's database")
        self._guards, self._plain = (*self._guards, guard), False
        moves = dict(self._moves or {})
        old = moves.get(name)
        if move is None or (old is not None and not is_after(move, old)):
            return
        moves[name] = move
        # The one: a map without operations has a byte, too.
        before = -1 if self._moves is None else len(encode_moves(self._moves))
        size = self._bytes + len(encode_moves(moves)) - before
        check_size(size, self._versions.max_transaction_bytes)
        self._bytes, self._moves = size, moves

    @enable_ki_protection
    def abort(self) -> None:
        """Give up; nothing reaches the log.  Also after the end, where it does nothing, and after
        the database was closed: the block is then left without an error."""
        if not self._ended:
            if not self._versions.closed:
                self._check()
            self._end()

    @property
    def lsn(self) -> int | None:
        """The LSN of the commit; None before."""
        return self._lsn


acknowledge_in = Transaction._acknowledge

_new = object.__new__


def new_transaction(versions: Versions) -> Transaction:
    # As `constructor` would, without the detour through the metaclass: every block begins here.
    tx = _new(Transaction)
    Transaction.__init__(tx, versions)
    return tx


def new_transaction_in(versions: Versions, line: Any) -> Transaction:
    """One that is committed through a line of the log's."""
    tx = new_transaction(versions)
    tx._line, tx._plain = line, False
    return tx


async def run_transaction(
    begin: Callable[[], Transaction],
    fn: Callable[..., Awaitable[T] | T],
    args: tuple[object, ...],
    retries: int,
) -> T:
    """Call ``fn(tx, *args)`` in a transaction and commit; again on a conflict."""
    check_int("retries", retries, 0)
    while True:
        try:
            async with begin() as tx:
                result = fn(tx, *args)
                if isinstance(result, Awaitable):
                    result = await cast("Awaitable[T]", result)
            return result
        except TransactionConflict:
            if not retries:
                raise
            retries -= 1


def _merge(
    committed: Iterator[tuple[bytes, bytes]],
    own: list[tuple[bytes, bytes | None]],
    reverse: bool,
) -> Iterator[tuple[bytes, bytes]]:
    """What is committed, with a transaction's own writes over it."""
    if not own:
        yield from committed
        return
    item = next(committed, None)
    for key, value in own:
        while item is not None and (item[0] > key if reverse else item[0] < key):
            yield item
            item = next(committed, None)
        if item is not None and item[0] == key:
            item = next(committed, None)
        if value is not None:
            yield key, value
    if item is not None:
        yield item
        yield from committed


publish(Transaction)
