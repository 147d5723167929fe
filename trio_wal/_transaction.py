"""One transaction: what it read, what it will write, and whether that still holds.

Law: no await but in `commit`.  Reads see the newest committed state as of the first
read, pending commits included, and the transaction's own writes.  Serializable by
validation ("optimistic", backward: Kung & Robinson 1981): a commit passes only if no
key it read, found absent or scanned over has a version newer than its snapshot.

Check and hand-over to the log happen in one stretch without a checkpoint: the order of
commits is the order of the log, without locks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeVar, final, overload

import trio
from trio.lowlevel import Task, current_task, enable_ki_protection

from ._exceptions import KeyExistsError, TransactionConflict
from ._exports import NoPublicConstructor, constructor
from ._memtable import Layer, View
from ._operations import KEY_BYTES_MAX, OPERATION_OVERHEAD, Writes, check_key
from ._util import check_bytes, check_int

if TYPE_CHECKING:
    from ._database import Database, Fate

D = TypeVar("D")

DROPPED_LAYERS_MAX: Final = 2
"""Memtable layers, of up to ``checkpoint_bytes`` of log each, that an open transaction keeps
after a checkpoint has dropped them."""


def check_range(
    start: bytes | None, stop: bytes | None, prefix: bytes | None, limit: int | None
) -> tuple[bytes | None, bytes | None]:
    """The (start, stop) of a scan's arguments."""
    if start is not None:
        start = check_bytes("start", start)
    if stop is not None:
        stop = check_bytes("stop", stop)
    if limit is not None:
        check_int("limit", limit, 0)
    if prefix is None:
        return start, stop
    prefix = check_bytes("prefix", prefix)
    if start is not None or stop is not None:
        raise ValueError("prefix cannot be combined with start or stop")
    trimmed = prefix.rstrip(b"\xff")
    end = trimmed[:-1] + bytes((trimmed[-1] + 1,)) if trimmed else None
    return prefix, end


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

    # Defaults on the class: most transactions never need most of these of their own.
    _task: Task | None = None
    _view: View | None = None
    _seq = 0
    _reads: set[bytes] | None = None
    _ranges: list[tuple[bytes | None, bytes | None]] | None = None
    _bytes = 1
    _observed: Fate | None = None
    """Of the newest pending commit that was read."""
    _doomed: bytes | None = None
    """A key that is known to conflict."""
    _past: frozenset[bytes] = frozenset()
    """Keys that its own task has changed past it, as far as that was noticed."""
    _dropped: tuple[Layer, ...] = ()
    _blind = False
    _cut = False
    """The database was closed under it."""
    _ended = False
    _lsn: int | None = None

    def __init__(self, db: Database) -> None:
        self._db = db
        self._writes: Writes = {}

    # -- the block --

    async def __aenter__(self) -> Transaction:
        if self._task is not None:
            raise RuntimeError("a transaction is for one use")
        db = self._db
        if db._checkpointing and db._behind():
            await db._wait_for_memtable()
        self._task = current_task()
        return self

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._ended:
            if exc_type is None and self._cut:
                raise trio.ClosedResourceError("the database was closed before this commit")
            if exc_type is None and self._lsn is None:
                await trio.lowlevel.checkpoint()
            return
        if exc_type is not None:
            self._end()
        elif self._view is None and self._writes:
            # As `commit`, which has nothing to validate here.
            task = current_task()
            if self._task is not task:
                self._check()
            self._ended = True
            self._lsn = await self._db._commit(self._writes, task)
        else:
            await self.commit()

    def _check(self) -> None:
        if self._ended:
            raise trio.ClosedResourceError("this transaction has ended")
        if self._task is not current_task():
            if self._task is None:
                raise RuntimeError("enter the transaction first: async with db.transaction()")
            raise trio.BusyResourceError("another task is in this transaction")

    # -- reading --

    @enable_ki_protection
    def _begin_reading(self) -> View:
        view = self._view
        if view is None:
            view = self._view = self._db._pin(self)
            self._seq = self._db._last_seq
        return view

    def _read(self, key: bytes) -> bytes | None:
        if key in self._writes:
            return self._writes[key]
        view = self._view or self._begin_reading()
        reads = self._reads
        if reads is None:
            reads = self._reads = set()
        if key not in reads:
            reads.add(key)
            if self._blind and self._doomed is None:
                self._doomed = key
        version = view.version(key, self._seq)
        if version is None:
            try:
                return view.base.get(key)
            except Exception as exc:
                view.base.explain(exc)
                raise
        if version.seq > self._db._settled_seq:
            self._observe(key, version.seq)
        return version.value

    def _observe(self, key: bytes, seq: int) -> None:
        if seq > self._db._settled_seq:
            fate = self._db._observe(key, seq)
            if self._observed is None or seq > self._observed.seq:
                self._observed = fate

    @overload
    def get(self, key: bytes) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: D) -> bytes | D: ...
    def get(self, key: bytes, default: object = None) -> object:
        """The value of ``key``, or ``default``; sees its own writes."""
        self._check()
        value = self._read(check_key(key))
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
        view = self._begin_reading()
        if self._blind and self._doomed is None:
            self._doomed = start or b""
        own = sorted(
            (
                (key, value)
                for key, value in self._writes.items()
                if (start is None or key >= start) and (stop is None or key < stop)
            ),
            reverse=reverse,
        )
        # Before anything is given out the whole range counts as read; a scan that is left
        # early gives back what it did not reach.
        if self._ranges is None:
            self._ranges = []
        self._ranges.append((start, stop))
        place = len(self._ranges) - 1
        return self._scan_from(view, own, self._ranges, place, start, stop, reverse, limit)

    def _scan_from(
        self,
        view: View,
        own: list[tuple[bytes, bytes | None]],
        ranges: list[tuple[bytes | None, bytes | None]],
        place: int,
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        limit: int | None,
    ) -> Iterator[tuple[bytes, bytes]]:
        self._check()
        committed = view.scan(self._seq, start, stop, reverse, self._observe)
        given = 0
        last: bytes | None = None
        complete = False
        try:
            if limit != 0:
                for key, value in _merge(committed, own, reverse):
                    given += 1
                    last = key
                    yield key, value
                    if given == limit:
                        return
                    if self._ended:
                        self._check()
            complete = limit != 0
        finally:
            if not complete:
                ranges[place] = _reached(start, stop, last, reverse)

    # -- writing --

    def put(self, key: bytes, value: bytes) -> None:
        """Set ``key`` to ``value``; buffered until the commit.

        Raises:
          TypeError, ValueError: ``key`` is not 1 to 511 bytes, ``value`` not bytes.
          RecordTooLargeError: the transaction would be over ``max_record_size``.
        """
        # The fast paths of _check, check_key and check_bytes.
        if self._ended or self._task is not current_task():
            self._check()
        if type(key) is not bytes or not 0 < len(key) <= KEY_BYTES_MAX:
            key = check_key(key)
        if type(value) is not bytes:
            value = check_bytes("value", value)
        # As `_write`, for the common case.
        size = self._bytes + OPERATION_OVERHEAD + len(key) + len(value)
        if key in self._writes or size > self._db._max_transaction_bytes:
            self._write(key, value)
            return
        self._bytes = size
        self._writes[key] = value

    def _write(self, key: bytes, value: bytes | None) -> None:
        size = self._bytes + OPERATION_OVERHEAD + len(key) + (0 if value is None else len(value))
        if key in self._writes:
            before = self._writes[key]
            size -= OPERATION_OVERHEAD + len(key) + (0 if before is None else len(before))
        if size > self._db._max_transaction_bytes:
            self._db._check_size(size)
        self._bytes = size
        self._writes[key] = value

    def insert(self, key: bytes, value: bytes) -> None:
        """Like `put`; `KeyExistsError` if the key is there."""
        self._check()
        key = check_key(key)
        if self._read(key) is not None:
            raise KeyExistsError(key)
        self._write(key, check_bytes("value", value))

    def update(self, key: bytes, value: bytes) -> None:
        """Like `put`; `KeyError` if the key is absent."""
        self._check()
        key = check_key(key)
        if self._read(key) is None:
            raise KeyError(key)
        self._write(key, check_bytes("value", value))

    def delete(self, key: bytes) -> None:
        """Remove ``key``; `KeyError` if it is absent."""
        self._check()
        key = check_key(key)
        if self._read(key) is None:
            raise KeyError(key)
        self._write(key, None)

    # -- the end --

    def _conflict_in(self, layer: Layer) -> bytes | None:
        """A key that was read and has a version newer than this transaction's view."""
        seq = self._seq
        if layer.last_seq <= seq:
            return None
        versions = layer.versions
        for key in self._reads or ():
            version = versions.get(key)
            if version is not None and version.seq > seq:
                return key
        for start, stop in self._ranges or ():
            changed = layer.changed_since(seq, start, stop)
            if changed is not None:
                return changed
        return None

    def _layer_dropped(self, layer: Layer) -> None:
        """The layer has gone into the store, where versions have no numbers any more.

        What is read from here on must still be held against it, so it is kept, up to a
        bound: a transaction that stays open over several checkpoints and then reads on
        conflicts, because nobody can tell any more.
        """
        if layer.last_seq <= self._seq:
            return
        if self._doomed is None:
            self._doomed = self._conflict_in(layer)
        if len(self._dropped) < DROPPED_LAYERS_MAX:
            self._dropped += (layer,)
        else:
            self._blind = True

    def _changed_past(self, key: bytes) -> None:
        """Its own task has changed a key by `Database.put` or `Database.delete`."""
        self._past |= {key}

    def _database_closed(self) -> None:
        """Nothing can be read any more, nor committed."""
        self._end()
        self._cut = True

    def _end(self) -> None:
        self._ended = True
        if self._view is not None:
            self._db._unpin(self, self._view)

    def _conflict(self) -> bytes | None:
        """A key that was read and has changed since, or None."""
        if self._doomed is not None:
            return self._doomed
        if self._observed is not None and self._observed.lost:
            # What was read will never have been.
            return self._observed.key
        if self._seq != self._db._last_seq:
            for layer in (*self._db._layers(), *self._dropped):
                conflict = self._conflict_in(layer)
                if conflict is not None:
                    return conflict
        return None

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
        conflict = self._conflict() if self._view is not None else None
        self._end()
        if conflict is not None:
            self._db._note_conflict()
            await trio.lowlevel.checkpoint()
            raise TransactionConflict(conflict, own=conflict in self._past)
        if self._writes:
            self._lsn = await self._db._commit(self._writes, current_task())
        else:
            self._lsn = await self._db._wait_observed(self._observed)
        return self._lsn

    @enable_ki_protection
    def abort(self) -> None:
        """Give up; nothing reaches the log.  Also after the end, where it does nothing."""
        if not self._ended:
            self._check()
            self._end()

    @property
    def lsn(self) -> int | None:
        """The LSN of the commit; None before."""
        return self._lsn


new_transaction = constructor(Transaction)


def _reached(
    start: bytes | None, stop: bytes | None, last: bytes | None, reverse: bool
) -> tuple[bytes | None, bytes | None]:
    """The part of a range that was scanned when ``last`` was the last key given."""
    if last is None:
        return b"", b""
    return (last, stop) if reverse else (start, last + b"\0")


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
