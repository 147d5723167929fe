"""The transactional key-value store: the log in front, LMDB behind.

Law: this file composes.  Versions and views are `_memtable`'s, validation `_transaction`'s,
moving state into LMDB `_checkpoint`'s and `_store`'s; durability is the log's alone.

Outside of a transaction only durable state is seen.  Inside, also what is committed and
still on its way to the disk; a commit returns when it and all that it read are durable.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from datetime import datetime
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Literal, TypeVar, cast, final, overload

import attrs
import trio
from trio.lowlevel import Task, current_task, enable_ki_protection

from . import _operations
from ._checkpoint import Checkpointer, settle_quietly
from ._disk.chain import LOG_NAME, META_NAME, STORE_NAME, neither
from ._disk.recovery import VERIFY_BYTES, Plan
from ._engine import Engine, RecoveryReport
from ._events import tell
from ._exceptions import (
    CorruptLogError,
    LogLockedError,
    RecordTooLargeError,
    TransactionConflict,
    WrongDirectoryError,
)
from ._exports import NoPublicConstructor, constructor
from ._files import Files, OsFiles
from ._flusher import Durability
from ._identity import Bookmark
from ._local import LocalOptions, open_local
from ._log import Log, LogOptions, OpenLog
from ._memtable import Layer, Memtable, View
from ._operations import (
    KEY_BYTES_MAX,
    OPERATION_OVERHEAD,
    Operation,
    OperationsError,
    Writes,
    check_key,
    decode_transaction,
    encode_transaction,
)
from ._queue import Batch, Key
from ._retention import KeepSegments, Retention
from ._state import State
from ._statistics import WalStatistics
from ._store import Progress, Store, StoreState, damaged, data_file, misfit
from ._stream import RecordStream
from ._text import printable
from ._transaction import Transaction, check_range, new_transaction
from ._util import MiB, check_bytes, check_int, check_one_of, check_path
from ._wal import WriteAheadLog, check_options, new_wal
from ._worker import Blocking, require_trio

if TYPE_CHECKING:
    # Only checkers need it, and they bring it along; Python has it from 3.11 on.
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")

D = TypeVar("D")
T = TypeVar("T")
VerifyStore = Literal["auto", "child", "none"]
"""What `open_database` takes as ``verify_store``: ``"auto"``, ``"child"`` or ``"none"``."""

MAP_SIZE: Final = 1 << 36
"""64 GiB of address space, not of disk: the file grows as it is needed."""
MAP_SIZE_MAX: Final = 1 << 61
"""Below what LMDB's C can count, once doubled; where less is too much, the system says so."""


class Fate:
    """What becomes of a pending commit that a transaction has read."""

    __slots__ = ("key", "lost", "seq", "settled", "waiters")

    def __init__(self, key: bytes, seq: int) -> None:
        self.key: bytes = key
        """One that was read."""
        self.seq: int = seq
        self.lost: bool = False
        self.settled: bool = False
        self.waiters: list[trio.Event] = []

    async def wait(self) -> None:
        """Until it is settled or lost."""
        event = trio.Event()
        self.waiters.append(event)
        await event.wait()

    def wake(self) -> None:
        for event in self.waiters:
            event.set()


@final
@attrs.frozen
class Commit:
    """One committed transaction, as `Database.changes` gives it."""

    lsn: int
    timestamp: datetime
    """UTC, of its batch; never decreasing along the log."""
    operations: tuple[Operation, ...]
    """What it did, one per key, in the order of first writes."""


@final
@attrs.frozen(kw_only=True)
class DatabaseStatistics:
    """A look at the database at one moment; what `Database.statistics` returns."""

    wal: WalStatistics
    """Of the log in front."""
    transactions: int
    """Transactions with writes that became durable in this session."""
    conflicts: int
    """Commits refused with `TransactionConflict`."""
    pending: int
    """Commits on their way to the disk."""
    memtable_keys: int
    """Keys with a newer value than the store has."""
    memtable_bytes: int
    """Their memory, estimated."""
    tasks_waiting_checkpoint: int
    """Tasks that wait to begin a transaction because checkpoints have fallen behind."""
    open_readers: int
    """Snapshots and transactions that hold a view."""
    checkpoint_lsn: int
    """Up to here the store holds everything."""
    checkpoints: int
    """Checkpoints of this session."""
    checkpoint_seconds_last: float
    """How long the last one wrote."""
    store_keys: int
    store_bytes: int
    """Size of the store's file."""


@final
class Snapshot(AbstractContextManager["Snapshot"], metaclass=NoPublicConstructor):
    """A consistent, durable view at one LSN; writers and checkpoints go on.

    Its moment is that of entering ``with``; it is for one use.  Keep it short: while it is
    open, memory and disk pages that it may need are kept.
    """

    _view: View | None = None
    _entered = False
    _seq = 0
    _lsn = 0

    def __init__(self, db: Database) -> None:
        self._db = db

    @enable_ki_protection
    def __enter__(self) -> Snapshot:
        if self._entered:
            raise RuntimeError("a snapshot is for one use")
        # Here, not when it was made: without the block nobody would let go of what it keeps.
        self._view = self._db._pin(self)
        self._seq, self._lsn = self._db._durable_point()
        self._entered = True
        return self

    @enable_ki_protection
    def __exit__(self, *_: object) -> None:
        self.close()

    @enable_ki_protection
    def close(self) -> None:
        """Let go of the view; idempotent."""
        view, self._view = self._view, None
        if view is not None:
            self._db._unpin(self, view)

    def _database_closed(self) -> None:
        self.close()

    def _open_view(self) -> View:
        if self._view is None:
            self._check_entered()
            raise trio.ClosedResourceError("this snapshot is closed")
        return self._view

    def _check_entered(self) -> None:
        if not self._entered:
            raise RuntimeError("enter the snapshot first: with db.snapshot() as snap")

    @property
    def lsn(self) -> int:
        """The newest transaction that it contains."""
        self._check_entered()
        return self._lsn

    @property
    def bookmark(self) -> Bookmark:
        """`lsn`, with the database's epoch: `Database.changes` continues after this state."""
        return Bookmark(self.lsn, self._db.epoch)

    @overload
    def get(self, key: bytes) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: D) -> bytes | D: ...
    def get(self, key: bytes, default: object = None) -> object:
        """The value of ``key`` at `lsn`, or ``default``."""
        value = self._open_view().get(check_key(key), self._seq)
        return default if value is None else value

    def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """As `Database.scan`, at `lsn`; ends with the snapshot."""
        start, stop = check_range(start, stop, prefix, limit)
        self._open_view()
        return self._scan(start, stop, reverse, limit)

    def _scan(
        self, start: bytes | None, stop: bytes | None, reverse: bool, limit: int | None
    ) -> Iterator[tuple[bytes, bytes]]:
        if limit == 0:
            return
        found = self._open_view().scan(self._seq, start, stop, reverse)
        for number, item in enumerate(found, 1):
            yield item
            if number == limit:
                return
            self._open_view()


@final
class CommitStream(
    AbstractAsyncContextManager["CommitStream"],
    AsyncIterator[Commit],
    metaclass=NoPublicConstructor,
):
    """Committed transactions in order; what `Database.changes` returns."""

    def __init__(self, path: str, records: RecordStream) -> None:
        self._path = path
        self._records = records

    async def __aenter__(self) -> CommitStream:
        await self._records.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._records.__aexit__(exc_type, exc, traceback)

    @property
    def bookmark(self) -> Bookmark:
        """The place after the last commit that was given, where `Database.changes` continues."""
        return self._records.bookmark

    def __aiter__(self) -> CommitStream:
        return self

    async def __anext__(self) -> Commit:
        record = await self._records.__anext__()
        writes = decode_record(self._path, record.lsn, record.data)
        operations = tuple(Operation(key, value) for key, value in writes.items())
        return Commit(record.lsn, record.timestamp, operations)


def decode_record(path: str, lsn: int, data: bytes) -> Writes:
    """The transaction in a record of a database's log, or `CorruptLogError`."""
    try:
        return decode_transaction(data)
    except OperationsError as exc:
        raise CorruptLogError(path, 0, f"LSN {lsn}: {exc}") from exc


def operations_in(path: str, lsn: int, data: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """As `decode_record`, one operation after the other."""
    try:
        yield from _operations.operations_in(data)
    except OperationsError as exc:
        raise CorruptLogError(path, 0, f"LSN {lsn}: {exc}") from exc


_new_snapshot = constructor(Snapshot)
_new_commit_stream = constructor(CommitStream)


@final
class Database(metaclass=NoPublicConstructor):
    """An open database.  There is no public constructor: see `open_database`.

    Every async method is a checkpoint; no sync method is.  Methods may be called by any
    number of tasks of the trio run that opened it.
    """

    def __init__(
        self,
        path: str,
        log: Log,
        store: Store,
        state: StoreState,
        checkpoint_bytes: int,
        files: Files,
        blocking: Blocking,
    ) -> None:
        self._path = path
        self._log = log
        self._status = log.status
        self._append = log.append
        log.own(_LogOwner(self))
        self._wal = new_wal(log, owned=True)
        self._store: Final = store
        self._memtable: Final = Memtable(store)
        self._blocking: Final = blocking
        self._files: Final = files
        self._max_transaction_bytes: Final[int] = log.max_record_size
        self._checkpoint_bytes = checkpoint_bytes
        self._checkpointer = Checkpointer(self, log, state)
        self._pending: dict[Key, tuple[int, Writes, Layer, int]] = {}
        """Commits on their way to the disk, by task and in their order: number, writes, the
        layer that has them, and their bytes in the log."""
        self._fates: dict[int, Fate] = {}
        """Of those among them that a transaction has read, by number."""
        self._readers: dict[Transaction | Snapshot, int] = {}
        self._last_seq: int = 0
        self._settled_seq: int = 0
        """Of the newest commit whose call may return; those above are pending."""
        self._durable_lsn = log.durable_lsn
        self._readers_gone: Final = trio.lowlevel.ParkingLot()
        self._room = trio.Event()
        self._waiting_for_room = 0
        self._transactions = 0
        self._conflicts = 0
        self._recovery = log.engine.recovery
        self._closed = False
        self._checkpointing: bool = False
        """Whether a layer is on its way into the store."""
        self._closed_store: tuple[int, int] | None = None
        self._burying = False
        self._refresh_view()

    # -- transactions --

    def transaction(self) -> Transaction:
        """A serializable transaction, as an async context manager.

        Committed at a clean end of the block, aborted if it raises.  Entering waits only
        where checkpoints have fallen behind, and raises `LogFullError` where they cannot
        go on: open snapshots keep LMDB's map from growing, or the store could not be written
        for several seconds.
        """
        if self._closed:
            self._check_open()
        return new_transaction(self)

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
        """Call ``fn(tx, *args)`` in a transaction and commit; again on a conflict.

        Args:
          fn: a function or an async function; called anew for every try, so it should
              have no other effects.
          retries: how often it is tried again before `TransactionConflict` is let through.

        Returns what ``fn`` returned in the try that was committed.
        """
        check_int("retries", retries, 0)
        while True:
            try:
                async with self.transaction() as tx:
                    result = fn(tx, *args)
                    if isinstance(result, Awaitable):
                        result = await cast("Awaitable[T]", result)
                return result
            except TransactionConflict:
                if not retries:
                    raise
                retries -= 1

    @enable_ki_protection
    async def put(self, key: bytes, value: bytes) -> int:
        """Set one key, in a transaction of its own; returns its LSN, durable then.

        Cancellation and errors are those of `Transaction.commit`.  It waits while
        checkpoints have fallen behind; `LogFullError` where they cannot go on, as
        `transaction` says.
        """
        # The fast path of the checks.
        if type(key) is not bytes or not 0 < len(key) <= KEY_BYTES_MAX:
            key = check_key(key)
        if type(value) is not bytes:
            value = check_bytes("value", value)
        size = 1 + OPERATION_OVERHEAD + len(key) + len(value)
        if size > self._max_transaction_bytes:
            self._check_size(size)
        if self._closed:
            self._check_open()
        if self._checkpointing and self._behind():
            await self._wait_for_memtable()
        task = current_task()
        if self._readers and (passed := self._transaction_of(task)) is not None:
            lsn = await self._commit({key: value}, task)
            passed._changed_past(key)
            return lsn
        return await self._commit({key: value}, task)

    def _transaction_of(self, task: Task) -> Transaction | None:
        """The transaction whose block a task is most likely in: the newest that reads, if it
        is this task's.  Good enough for a hint, and cheap."""
        newest = next(reversed(self._readers), None)
        return newest if isinstance(newest, Transaction) and newest._task is task else None

    async def delete(self, key: bytes) -> int:
        """Remove one key, in a transaction of its own; returns its LSN, durable then.

        Raises:
          KeyError: the key is absent.
        """
        tx = new_transaction(self)
        self._check_open()
        passed = self._transaction_of(current_task())
        async with tx:
            tx.delete(key)
        if passed is not None:
            passed._changed_past(key)
        return cast(int, tx.lsn)

    # -- reading what is durable --

    def _refresh_view(self) -> None:
        """Remember the parts of the current view that `get` needs."""
        view = self._memtable.view
        self._view = view
        self._active_versions = view.active.versions
        self._base_get = view.base.get
        self._checkpointing = view.frozen is not None

    def _renew_view(self) -> None:
        self._memtable.renew()
        self._refresh_view()

    @overload
    def get(self, key: bytes) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: D) -> bytes | D: ...
    def get(self, key: bytes, default: object = None) -> object:
        """The durable value of ``key``, or ``default``: no crash can take it back.

        `OSError` where the store must be asked and cannot be read, `CorruptLogError` where
        it is damaged; see `checkpoint`.
        """
        try:
            if key not in self._active_versions and self._view.frozen is None:
                value = self._base_get(key)
            else:
                value = self._view.get(key, self._settled_seq)
        except BaseException as exc:
            check_key(key)
            self._check_open()
            self._view.base.explain(exc)
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
        """Durable keys and values with ``start <= key < stop``, in order.

        The iterator shows one moment, that of this call; iterate it to its end, or close
        it, so that it lets go of that.

        Args:
          start: the first key; None: from the beginning.
          stop: the key behind the last; None: to the end.
          prefix: instead of the two: all keys that start with this.
          reverse: from the last to the first.
          limit: so many at most.
        """
        self._check_open()
        start, stop = check_range(start, stop, prefix, limit)
        found = self._scan(start, stop, reverse, limit)
        next(found)
        return found

    @enable_ki_protection
    def _scan(
        self,
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        limit: int | None,
    ) -> Iterator[tuple[bytes, bytes]]:
        with _new_snapshot(self) as snapshot:
            # `scan` takes this: a generator that was never begun would not let go either.
            yield b"", b""
            yield from snapshot.scan(start, stop, reverse=reverse, limit=limit)

    def snapshot(self) -> Snapshot:
        """A consistent, durable view at one LSN: ``with db.snapshot() as snap``.

        Its moment is that of entering the block.
        """
        self._check_open()
        return _new_snapshot(self)

    def changes(self, start: int | Bookmark | None = None) -> CommitStream:
        """Every committed transaction from LSN ``start`` on, in order, then new ones::

            async with db.changes(start=17) as commits:
                async for commit in commits: ...

        Durable ones only.  Where ``durability`` is less than "sync", that is those that a sync
        has reached: with "none" the checkpoint makes it, and drops the log in the same moment.
        There a stream needs a ``retention`` that keeps more of it, or is soon told
        `LsnTruncatedError`.

        A bookmark continues after its place; None: from the oldest that
        the log still has.

        Raises:
          LogDivergedError: ``start`` is not in this database's history, or after its end: it
              may be of the database that this one is a backup of.
          LsnTruncatedError: ``start`` is no longer in the log: see ``retention`` of
              `open_database` for how to keep more of it.
        """
        records = self._log.follow(start, entering="db.changes() as commits")
        return _new_commit_stream(self._log.name, records)

    # -- into the store --

    async def checkpoint(self) -> int:
        """Move everything committed into the store; returns the LSN that it covers.

        Runs beside the writers, and by itself every ``checkpoint_bytes`` of log.  A crash
        or cancellation on the way loses nothing.

        Raises:
          LogFullError: LMDB's map is full, and cannot grow because a snapshot, or a
              transaction that has read, stayed open for several seconds.
          CorruptLogError: the store is damaged; nothing is lost, the log still has it.
          OSError: the store could not be written; nothing is lost, the log still has it.
          LogFailedError: the log is broken; what was durable is read from it on the next open.
        """
        await self._check_usable()
        return await self._checkpointer.checkpoint()

    async def backup(self, dest: str | os.PathLike[str]) -> int:
        """Write a copy that `open_database` opens, while writers go on.

        It is made under another name next to ``dest`` (with a random part and ``.tmp`` at its
        end) and renamed when it is durable.  So ``dest`` is there whole or not at all, and what
        failed can be tried again.  Once the copy has begun it is finished even if the caller is
        cancelled.  A killed process leaves the other name behind, which may be deleted.

        Deleted keys and values are not copied.

        Args:
          dest: a directory that does not exist yet.

        Returns the LSN whose state the copy has.

        Raises:
          FileExistsError: ``dest`` exists.
          CorruptLogError: the store is damaged.
          OSError: the copy could not be written; nothing of it is left.
          LogFailedError: the log is broken.
        """
        path = check_path(dest)
        await self._check_usable()
        return await self._checkpointer.backup(path)

    # -- what it is --

    @property
    def path(self) -> str:
        """The database's directory, absolute."""
        return self._path

    @property
    def wal(self) -> WriteAheadLog:
        """The log in front, to read, follow and flush; only transactions write it."""
        return self._wal

    @property
    def uuid(self) -> uuid.UUID:
        """Made with the database, kept for ever, also by its backups."""
        return self._wal.uuid

    @property
    def epoch(self) -> int:
        """Which of the database's histories this is.  It grows at the first open of a backup,
        because from then on it and the original may give the same LSN to different
        transactions."""
        return self._wal.epoch

    @property
    def durable_lsn(self) -> int:
        """The newest durable transaction."""
        return self._durable_lsn

    @property
    def recovery(self) -> RecoveryReport:
        """What this open found and did."""
        return self._recovery

    def statistics(self) -> DatabaseStatistics:
        """A look at log, memtable and store.  Cheap; no checkpoint."""
        store_keys, store_bytes = self._closed_store or self._store.statistics()
        return DatabaseStatistics(
            wal=self._wal.statistics(),
            transactions=self._transactions,
            conflicts=self._conflicts,
            pending=len(self._pending),
            memtable_keys=sum(len(layer.versions) for layer in self._view.layers()),
            memtable_bytes=self._memtable.bytes,
            tasks_waiting_checkpoint=self._waiting_for_room,
            open_readers=len(self._readers),
            checkpoint_lsn=self._checkpointer.state.lsn,
            checkpoints=self._checkpointer.count,
            checkpoint_seconds_last=self._checkpointer.seconds_last,
            store_keys=store_keys,
            store_bytes=store_bytes,
        )

    async def aclose(self) -> None:
        """Make every commit durable, close log and store; idempotent.

        Raises:
          LogFailedError: the log broke and nobody has been told.
        """
        await self._wal.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"{printable(self._path)}: this database is closed")

    async def _check_usable(self) -> None:
        """A checkpoint; raises where the database is closed or its log has failed."""
        self._check_open()
        await trio.lowlevel.checkpoint()
        self._status.check_usable()

    def __repr__(self) -> str:
        return f"<Database {self._path!r} durable_lsn={self._durable_lsn}>"

    # -- for transactions and snapshots --

    def _durable_point(self) -> tuple[int, int]:
        return self._settled_seq, self._durable_lsn

    def _layers(self) -> tuple[Layer, ...]:
        return self._view.layers()

    def _pin(self, reader: Transaction | Snapshot) -> View:
        """Somebody begins to read: what it may need is kept until `unpin`."""
        self._check_open()
        view = self._view
        view.base.pin()
        # A transaction reads as of later; but so they stand in order.
        self._readers[reader] = self._settled_seq
        return view

    def _unpin(self, reader: Transaction | Snapshot, view: View) -> None:
        del self._readers[reader]
        view.base.unpin()
        if self._readers_gone and not self._readers:
            self._readers_gone.unpark_all()

    @property
    def _disowned(self) -> bool:
        """Whether this is a forked child, where all of it is dead."""
        return self._status.disowned

    @property
    def _reading(self) -> bool:
        """Whether a snapshot or transaction holds a view."""
        return bool(self._readers)

    async def _wait_unread(self) -> None:
        """Until no snapshot and no transaction holds a view."""
        while self._readers:
            await self._readers_gone.park()

    @enable_ki_protection
    async def _wait_for_memtable(self) -> None:
        """Back-pressure: wait while checkpoints are a whole interval behind."""
        while self._behind():
            self._status.check_open()
            self._checkpointer.check_room()
            self._waiting_for_room += 1
            try:
                await self._room.wait()
            finally:
                self._waiting_for_room -= 1

    def _wake_waiting_for_room(self) -> None:
        room, self._room = self._room, trio.Event()
        room.set()

    def _check_size(self, size: int) -> None:
        """Raises `RecordTooLargeError` where a transaction would not fit into a record."""
        if size > self._max_transaction_bytes:
            raise RecordTooLargeError(size, self._max_transaction_bytes)

    def _behind(self) -> bool:
        """Whether checkpoints are a whole interval behind."""
        view = self._view
        return view.frozen is not None and view.active.log_bytes >= self._checkpoint_bytes

    def _checkpoint_due(self) -> bool:
        """Whether the checkpointer was woken for something: what woke it may have been
        withdrawn."""
        view = self._view
        return view.frozen is not None or view.active.log_bytes >= self._checkpoint_bytes

    def _commit(self, writes: Writes, task: Task) -> Awaitable[int]:
        """Hand over to the log, in one stretch with the validation of the task that calls, and
        wait.

        Not a coroutine function: one frame less to pass through a park and a wake.  What
        it returns must be awaited at once.
        """
        if self._status.state is not State.OPEN:
            self._status.check_open()
        payload = encode_transaction(writes)
        layer = self._view.active
        self._last_seq = seq = self._last_seq + 1
        size = len(payload)
        self._pending[task] = (seq, writes, layer, size)
        if layer.add(writes, seq, self._settled_seq, bool(self._readers)):
            self._renew_view()
        layer.log_bytes += size
        if layer.log_bytes >= self._checkpoint_bytes:
            self._checkpointer.wake()
        return self._append(payload, task)

    def _observe(self, key: bytes, seq: int) -> Fate:
        """A transaction has read a pending commit: it cannot be taken back any more."""
        fate = self._fates.get(seq)
        if fate is None:
            fate = self._fates[seq] = Fate(key, seq)
        return fate

    async def _wait_observed(self, fate: Fate | None) -> int:
        """Wait until what was read is durable; returns the newest durable LSN."""
        if fate is None or fate.settled:
            await trio.lowlevel.checkpoint()
        elif not fate.lost:
            await fate.wait()
        if fate is not None and fate.lost:
            self._status.check_open()
            self._note_conflict()
            raise TransactionConflict(fate.key)
        return self._durable_lsn

    def _note_conflict(self) -> None:
        self._conflicts += 1

    # -- the log tells what becomes of commits --

    def _may_withdraw(self, task: Task) -> bool:
        commit = self._pending.get(task)
        return commit is None or commit[0] not in self._fates

    def _withdrawn(self, task: Task) -> None:
        commit = self._pending.pop(task, None)
        if commit is not None:
            seq, writes, layer, size = commit
            layer.log_bytes -= size
            if self._waiting_for_room and not self._behind():
                self._wake_waiting_for_room()
            if layer.remove(writes, seq, self._settled_seq):
                self._renew_view()
            fate = self._fates.pop(seq, None)
            if fate is not None:
                fate.lost = True
                fate.wake()

    def _settled(self, batch: Batch) -> None:
        pending = self._pending
        if not batch.mixed and len(pending) == len(batch.entries):
            # The usual: whoever commits waits for this batch.
            commits = list(pending.values())
            pending.clear()
        else:
            # A flush waits in the batch too; and numbers stand for those who do not wait.
            pop = pending.pop
            commits = [c for key in batch.entries if (c := pop(key, None)) is not None]
        if not commits:
            return
        seq, _, layer, _ = commits[-1]
        lsn = self._durable_lsn = batch.first_lsn + len(commits) - 1
        self._settled_seq = seq
        self._transactions += len(commits)
        layer.last_lsn = lsn
        if commits[0][2] is not layer:
            # A checkpoint froze the layer in between.
            frozen = [c for c in commits if c[2] is not layer]
            frozen[0][2].last_lsn = batch.first_lsn + len(frozen) - 1
        if self._settle_layers(seq) and not self._burying and self._dead():
            self._burying = True
            self._log.start_soon(self._bury)
        if self._fates:
            for number in [number for number in self._fates if number <= seq]:
                fate = self._fates.pop(number)
                fate.settled = True
                fate.wake()

    def _settle_layers(self, seq: int) -> bool:
        """Returns whether a view was made anew."""
        oldest = next(iter(self._readers.values())) if self._readers else None
        below = self._memtable.below
        renew = False
        for layer in reversed(self._view.layers()):
            if layer.settle(seq, oldest, below):
                renew = True
        if renew:
            self._renew_view()
        return renew

    def _dead(self) -> bool:
        return any(layer.dead(self._settled_seq) for layer in self._view.layers())

    @enable_ki_protection
    async def _bury(self) -> None:
        """A task: deal with the many deletions of a large transaction bit by bit."""
        try:
            while self._dead():
                await trio.lowlevel.checkpoint()
                self._settle_layers(self._settled_seq)
        finally:
            self._burying = False

    # -- for the checkpointer --

    async def _wait_settled(self, seq: int) -> None:
        """Until no commit up to ``seq`` is pending."""
        while self._pending and next(iter(self._pending.values()))[0] <= seq:
            await settle_quietly(self._log)

    def _checkpointed(self, frozen: Layer, lsn: int) -> None:
        """The store holds the frozen layer, durably."""
        for reader in self._readers:
            if isinstance(reader, Transaction):
                reader._layer_dropped(frozen)
        self._memtable.drop_frozen()
        self._refresh_view()
        self._log.engine.hold("store", lsn + 1)
        self._wake_waiting_for_room()
        if self._view.active.log_bytes >= self._checkpoint_bytes:
            self._checkpointer.wake()

    # -- opening and closing --

    async def _replay(self) -> None:
        """Bring the log's tail into the memtable."""
        state = self._checkpointer.state
        count = 0
        async with self._log.read(state.lsn + 1) as records:
            async for record in records:
                writes = decode_record(self._log.name, record.lsn, record.data)
                seq = self._settled_seq = self._last_seq = self._last_seq + 1
                layer = self._view.active
                if layer.add(writes, seq, seq, keep_older=False):
                    self._renew_view()
                while self._settle_layers(seq):
                    if not self._dead():
                        break
                    # More deletions to be buried than are at once.
                    await trio.lowlevel.checkpoint()
                layer.last_lsn = record.lsn
                layer.log_bytes += len(record.data)
                count += 1
                if layer.log_bytes >= self._checkpoint_bytes:
                    await self._checkpointer.checkpoint()
        self._recovery = attrs.evolve(
            self._log.engine.recovery, transactions_replayed=count, checkpoint_lsn=state.lsn
        )

    def _start(self) -> None:
        self._checkpointer.start()

    def _disown(self) -> None:
        """In a forked child: the database is the parent's.

        LMDB's read transactions stay as they are: to end one would free its place in the table
        of readers, which is the parent's too.
        """
        self._closed = True
        self._blocking.disown()
        for view in (self._view, *(reader._view for reader in self._readers)):
            if view is not None:
                view.base.pin()
        for reader in list(self._readers):
            reader._database_closed()
        self._memtable.close()
        self._refresh_view()
        self._base_get = self._get_closed
        self._closed_store = (0, 0)

    @enable_ki_protection
    async def _before_close(self) -> None:
        self._closed = True
        # LMDB must not be closed while somebody reads; nor may a checkpoint wait for them.
        try:
            for reader in list(self._readers):
                reader._database_closed()
        finally:
            await self._checkpointer.stop()
        await self._blocking.close()
        self._wake_waiting_for_room()
        self._memtable.close()
        self._refresh_view()
        self._base_get = self._get_closed
        try:
            self._closed_store = self._store.statistics()
        finally:
            self._store.close()

    def _get_closed(self, key: bytes) -> bytes | None:
        check_key(key)
        self._check_open()
        return None


_new_database = constructor(Database)


class _LogOwner:
    """Whom the log tells what becomes of each commit; see `_queue.Owner`."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def may_withdraw(self, task: Task) -> bool:
        return self._db._may_withdraw(task)

    def withdrawn(self, task: Task) -> None:
        self._db._withdrawn(task)

    def settled(self, batch: Batch) -> None:
        self._db._settled(batch)


@final
class _OpenDatabase(AbstractAsyncContextManager[Database]):
    """What `open_database` returns."""

    def __init__(
        self,
        path: str,
        checkpoint_bytes: int,
        map_size: int,
        files: Files,
        run: LogOptions,
        where: LocalOptions,
    ) -> None:
        self._path = path
        self._checkpoint_bytes = checkpoint_bytes
        self._map_size = map_size
        self._files = files
        self._where = where
        self._opened = OpenLog("open_database", run, self._open_engine)
        self._state: StoreState | None = None
        self._made: tuple[str, ...] = ()
        self._verify_store: VerifyStore = "auto"
        self._on_verify_progress: Progress | None = None

    @property
    def _store_path(self) -> str:
        return f"{self._path}/{STORE_NAME}"

    def _check(self, plan: Plan) -> int | None:
        """Log and store must fit each other before either is written; returns the first LSN
        to replay."""
        if self._verify_store == "child" or (self._verify_store == "auto" and not plan.clean):
            how = self._verify_store
            self._files.check_store(self._store_path, how, self._on_verify_progress)
        state = self._state = self._files.inspect_store(self._store_path)
        meta = plan.meta
        wrong = misfit(
            state,
            None if meta is None else meta.log_uuid,
            1 if meta is None else meta.base_lsn,
            plan.last_lsn,
        )
        if wrong is not None:
            raise damaged(data_file(self._store_path), wrong)
        if meta is None:
            return None
        return 1 if state is None else state.lsn + 1

    def _prepare(self) -> None:
        """Create the directory, or see whether it is a database's."""
        directory = self._files.open_directory(self._path, create=True)
        self._made = directory.made
        try:
            if not self._where.trust_directory:
                directory.check_trusted()
                if STORE_NAME in directory.names():
                    self._check_store_trusted()
            names = [name for name in directory.names() if name[0] != "." and name != "lost+found"]
            if not names or LOG_NAME in names:
                return
            if STORE_NAME in names:
                raise CorruptLogError(self._path, 0, "a database without its log")
            if META_NAME in names:
                raise WrongDirectoryError(self._path, "a log", "open_wal()")
            raise WrongDirectoryError(self._path, *neither(names))
        finally:
            directory.close()

    def _check_store_trusted(self) -> None:
        try:
            directory = self._files.open_directory(self._store_path, follow=False)
        except (OSError, CorruptLogError):
            # Whatever it is: for those to say who open it.
            return
        try:
            directory.check_trusted()
        finally:
            directory.close()

    def _remove_made(self) -> None:
        """After an open that failed: the directories that `_prepare` has made."""
        self._files.remove_directories(self._made)

    def _open_store(self) -> Store:
        return self._files.open_store(self._store_path, self._map_size)

    async def _open_engine(self) -> Engine:
        engine = await open_local(
            self._files,
            self._where,
            check=self._check,
            database=True,
            undo=partial(self._files.remove_store, self._store_path),
        )
        engine.hold("store", 1 if self._state is None else self._state.lsn + 1)
        return engine

    @enable_ki_protection
    async def __aenter__(self) -> Database:
        require_trio("open_database")
        blocking = Blocking(threaded=self._files.threaded)
        try:
            await blocking(self._prepare)
            try:
                log = await self._opened.enter()
            except LogLockedError as exc:
                raise LogLockedError(self._path, exc.pid, database=True) from exc.__cause__
            try:
                db = await self._open_on(log, blocking)
            except BaseException as exc:
                await self._opened.leave(exc)
                raise
        except BaseException:
            self._remove_made()
            raise
        log.hand_out()
        report = db.recovery
        tell(
            logging.INFO,
            "replayed",
            db.path,
            f"{report.transactions_replayed} transactions after the store's LSN "
            f"{report.checkpoint_lsn} replayed",
            transactions_replayed=report.transactions_replayed,
            checkpoint_lsn=report.checkpoint_lsn,
        )
        return db

    async def _open_on(self, log: Log, blocking: Blocking) -> Database:
        store = await blocking(self._open_store)
        try:
            state = self._state or StoreState(log.engine.uuid.bytes, 0)
            db = _new_database(
                self._path, log, store, state, self._checkpoint_bytes, self._files, blocking
            )
        except BaseException:
            store.close()
            raise
        log.before_close(db._before_close)
        await db._replay()
        db._start()
        self._files.on_fork(db._disown)
        return db

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._opened.leave(exc)


def open_database(
    path: str | os.PathLike[str],
    *,
    checkpoint_bytes: int = 64 * MiB,
    map_size: int = MAP_SIZE,
    verify_store: VerifyStore = "auto",
    on_verify_progress: Callable[[int, int], None] | None = None,
    retention: Retention | None = None,
    max_queue_size: float = 10_000,
    max_queue_bytes: float = 64 * MiB,
    max_record_size: int = 16 * MiB,
    max_batch_bytes: int = 8 * MiB,
    flush_interval: float = 0.010,
    segment_size: int = 64 * MiB,
    durability: Durability = "sync",
    compression: Literal["none", "zstd"] | None = None,
    verify_bytes: float = VERIFY_BYTES,
    trust_directory: bool = False,
    files: Files | None = None,
) -> AbstractAsyncContextManager[Database]:
    """Open a transactional key-value store in a directory, recovering it first.

    ::

        async with trio_wal.open_database("bank.db") as db:
            async with db.transaction() as tx:
                tx.put(b"alice", b"10")

    Keys are `bytes` of 1 to 511; values `bytes` of any length that fits, with the rest of
    its transaction, into ``max_record_size``.

    Args:
      path: a directory; created with mode 0700 if it is missing.
      checkpoint_bytes: committed state is moved into the store every so many bytes of log.
          Twice that may have to be replayed on opening, and kept in memory.
      map_size: bytes of address space for LMDB; grown when it is full.
      verify_store: LMDB trusts its file, and reading a damaged page can end the process, so
          the store can be checked before it is opened.  ``"auto"``: every page, after a crash
          and where the store has at most 128 MiB; that takes 3 ms per MiB.  ``"child"``: every
          page, and then every key through LMDB, in a child process, always; twice that, and
          0.3 seconds for the process.  ``"none"``: nothing but the few pages that opening reads.
      on_verify_progress: called, in a worker thread, with the bytes that are checked so far and
          the bytes that there are.
      retention: how much of the log to keep beyond what the store does not hold yet, for
          `Database.changes`; None: nothing.
      max_queue_size, max_queue_bytes, max_record_size, max_batch_bytes: as for `open_wal`.
      flush_interval, segment_size, durability, compression: as for `open_wal`.
      verify_bytes, trust_directory: as for `open_wal`.
      files: another file system, such as `trio_wal.testing.MemoryFiles`.

    Raises, when called:
      TypeError, ValueError: an argument is wrong; the message names it.

    Raises, on entering; what was there is as it was, and nothing else stays:
      LogLockedError, WrongDirectoryError, UntrustedDirectoryError: as `open_wal`.
      UnsupportedFormatError, LogFullError, OSError, RuntimeError: as `open_wal`.
      CorruptLogError: also where LMDB's file is damaged, or log and store do not fit.

    Raises, on leaving:
      LogFailedError: a write or sync failed and nobody has been told.
    """
    name = check_path(path)
    check_int("checkpoint_bytes", checkpoint_bytes, 1)
    check_int("map_size", map_size, 1 * MiB, MAP_SIZE_MAX)
    check_one_of("verify_store", verify_store, ("auto", "child", "none"))
    used = OsFiles() if files is None else files
    run, where = check_options(
        path=f"{name}/{LOG_NAME}",
        retention=KeepSegments(1) if retention is None else retention,
        max_queue_size=max_queue_size,
        max_queue_bytes=max_queue_bytes,
        max_record_size=max_record_size,
        max_batch_bytes=max_batch_bytes,
        flush_interval=flush_interval,
        segment_size=segment_size,
        durability=durability,
        compression=compression,
        verify_bytes=verify_bytes,
        trust_directory=trust_directory,
    )
    opened = _OpenDatabase(used.absolute(name), checkpoint_bytes, map_size, used, run, where)
    opened._verify_store = verify_store
    opened._on_verify_progress = on_verify_progress
    return opened
