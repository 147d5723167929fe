"""The transactional key-value store: the log in front, LMDB behind.

Law: what is promised stands here, in the docstrings; what keeps the promises is below, in
`_core` and what that is made of.

Outside of a transaction only durable state is seen.  Inside, also what is committed and
still on its way to the disk; a commit returns when it and all that it read are durable.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar, cast, final, overload

import trio
from trio.lowlevel import current_task, enable_ki_protection

from ._archive import Archive, check_archive
from ._changes import CommitStream, changed_in_log, new_commit_stream
from ._consumers import Session, check_start
from ._core import Core
from ._database_consumer import DatabaseConsumer, new_database_consumer
from ._database_statistics import DatabaseStatistics
from ._database_writer import DatabaseWriter, open_database_writer
from ._engine import RecoveryReport
from ._exceptions import LogDivergedError
from ._exports import NoPublicConstructor, constructor, publish
from ._health import Health, judge
from ._identity import Bookmark
from ._operations import (
    KEY_BYTES_MAX,
    OPERATION_OVERHEAD,
    Writes,
    check_key,
    check_range,
    check_size,
)
from ._pairs import PairStream
from ._park import no_trio, require_trio
from ._places import check_consumer_name
from ._snapshot import Snapshot, new_snapshot, scan_once, stream_once
from ._text import printable
from ._transaction import Transaction, new_transaction, run_transaction
from ._util import check_bytes, check_int, check_path
from ._wal import WriteAheadLog
from ._watch import Watch
from ._writer import OpenWriter, check_line_options

if TYPE_CHECKING:
    # Only checkers need it, and they bring it along; Python has it from 3.11 on.
    from typing_extensions import TypeVarTuple, Unpack

    Ts = TypeVarTuple("Ts")

D = TypeVar("D")
T = TypeVar("T")


@final
class Database(metaclass=NoPublicConstructor):
    """An open database.  There is no public constructor: see `open_database`.

    Every async method is a checkpoint; no sync method is.  Methods may be called by any
    number of tasks of the trio run that opened it.
    """

    def __init__(self, core: Core, recovery: RecoveryReport) -> None:
        self._core = core
        self._versions = core.versions
        self._recovery = recovery

    # -- transactions --

    def transaction(self) -> Transaction:
        """A serializable transaction, as an async context manager.

        Committed at a clean end of the block, aborted if it raises.  Entering waits only
        where checkpoints have fallen behind, and raises `LogFullError` where they cannot
        go on: open snapshots keep LMDB's map from growing, or the store could not be written
        for several seconds.
        """
        versions = self._versions
        if versions.closed:
            versions.check_open()
        return new_transaction(versions)

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
          fn: a function or an async function; called again for every try, so it should
              have no other effects.
          retries: how many more times to try before `TransactionConflict` is raised.

        Returns what ``fn`` returned in the try that was committed: durable then.

        Cancellation is that of `Transaction.commit`; in ``fn`` it aborts the try, of which nothing
        is in the log.

        Raises:
          TransactionConflict: the last try, too, has met one; nothing was written.
          TypeError, ValueError: ``retries`` is not an int, or is negative.
          LogFullError, LogFailedError, trio.ClosedResourceError: as `transaction` and
              `Transaction.commit`.

        What ``fn`` raises is raised, too, and nothing of that try is in the log.
        """
        return await run_transaction(self.transaction, fn, args, retries)

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
        versions = self._versions
        if size > versions.max_transaction_bytes:
            check_size(size, versions.max_transaction_bytes)
        if versions.closed:
            versions.check_open()
        if versions.checkpointing and versions.behind():
            await versions.wait_for_room()
        try:
            task = current_task()
        except RuntimeError:
            raise no_trio("db.put") from None
        if versions.readers.pins and (passed := versions.readers.of(task)) is not None:
            lsn = await versions.commit({key: value}, task)
            passed.changed_past((key,))
            return lsn
        return await versions.commit({key: value}, task)

    async def delete(self, key: bytes) -> int:
        """Remove one key, in a transaction of its own; returns its LSN, durable then.

        Cancellation and other errors are those of `Transaction.commit`; it waits as `put` does.

        Raises:
          KeyError: the key is absent; nothing was written.
        """
        require_trio("db.delete")
        tx = self.transaction()
        passed = self._versions.readers.of(current_task())
        async with tx:
            tx.delete(key)
        if passed is not None:
            passed.changed_past((key,))
        return cast(int, tx.lsn)

    async def discard(self, key: bytes) -> bool:
        """Remove one key if it is there, in a transaction of its own; returns whether it was, and
        what it returns is durable then.

        Cancellation and errors are those of `Transaction.commit`; it waits as `put` does.
        """
        require_trio("db.discard")
        tx = self.transaction()
        passed = self._versions.readers.of(current_task())
        async with tx:
            found = tx.discard(key)
        if found and passed is not None:
            passed.changed_past((key,))
        return found

    @enable_ki_protection
    async def write(self, mapping: Mapping[bytes, bytes | None]) -> int:
        """Set any number of keys, in a transaction of its own; returns its LSN, durable then.

        Blind: nothing is read, so it cannot conflict.  Cancellation, errors and waiting are
        those of `put`.

        Args:
          mapping: keys and their new values; None removes a key, whether it is there or not.
              An empty mapping writes nothing, and the newest durable LSN is returned.

        Raises:
          TypeError, ValueError: a key is not 1 to 511 bytes, a value neither bytes nor None.
          RecordTooLargeError: together they are over ``max_record_size``.
        """
        if mapping.__class__ is not dict and not isinstance(mapping, Mapping):
            raise TypeError(f"mapping must be a mapping, not {type(mapping).__name__}")
        size = 1
        writes: Writes = {}
        for key, value in mapping.items():
            # The fast path of the checks.
            data = value if value is None or type(value) is bytes else check_bytes("value", value)
            known = type(key) is bytes and 0 < len(key) <= KEY_BYTES_MAX
            name = key if known else check_key(key)
            writes[name] = data
            size += OPERATION_OVERHEAD + len(name) + (0 if data is None else len(data))
        versions = self._versions
        if size > versions.max_transaction_bytes:
            check_size(size, versions.max_transaction_bytes)
        if versions.closed:
            versions.check_open()
        try:
            task = current_task()
        except RuntimeError:
            raise no_trio("db.write") from None
        if versions.checkpointing and versions.behind():
            await versions.wait_for_room()
        if not writes:
            await self._check_usable("write")
            return versions.durable_lsn
        if versions.readers.pins and (passed := versions.readers.of(task)) is not None:
            lsn = await versions.commit(writes, task)
            passed.changed_past(writes)
            return lsn
        return await versions.commit(writes, task)

    def writer(
        self,
        name: str,
        *,
        max_queue_size: float | None = None,
        max_queue_bytes: float | None = None,
        priority: Literal["normal", "high"] = "normal",
    ) -> AbstractAsyncContextManager[DatabaseWriter]:
        """A share of the log's queue with a line of its own, as an async context manager::

            async with db.writer("imports", max_queue_size=100) as imports:
                await imports.put(b"alice", b"10")

        As `WriteAheadLog.writer`, for transactions: at most so many of *its* commits wait to be
        written.  A commit that waits in line is none yet: it gets its place among the others,
        and what it read is validated, when it is let in.

        Priority ``"high"`` is let in before others.  It does not pass commits that were let in
        before it: those are already seen by other transactions.

        From the first writer on, every commit of this database costs about a microsecond more.

        Arguments and errors are those of `WriteAheadLog.writer`.
        """
        self._versions.check_open()
        log = self._core.log
        options = check_line_options(log, name, max_queue_size, max_queue_bytes, priority)
        return OpenWriter(log, options, partial(open_database_writer, self._versions, log.lines))

    # -- reading what is durable --

    @overload
    def get(self, key: bytes) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: D) -> bytes | D: ...
    def get(self, key: bytes, default: object = None) -> object:
        """The durable value of ``key``, or ``default``: no crash can take it back.

        `OSError` where the store must be asked and cannot be read, `CorruptLogError` where
        it is damaged; see `checkpoint`.

        Raises:
          TypeError, ValueError: ``key`` is not 1 to 511 bytes.
          trio.ClosedResourceError: the database is closed.
        """
        versions = self._versions
        try:
            if key not in versions.newest and not versions.checkpointing:
                value = versions.base_get(key)
            else:
                value = versions.get(key)
        except BaseException as exc:
            check_key(key)
            versions.check_open()
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
        """Durable keys and values with ``start <= key < stop``, in order.

        The iterator shows one moment, that of this call; iterate it to its end, or close
        it, so that it lets go of that.

        Args:
          start: the first key; None: from the beginning.
          stop: the key to stop before; None: to the end.
          prefix: instead of the two: all keys that start with this.
          reverse: from the last to the first.
          limit: so many at most.

        Raises:
          TypeError, ValueError: an argument is wrong; the message names it.
          trio.ClosedResourceError: the database is closed, also while it is iterated.
          OSError, CorruptLogError: while it is iterated, as `get`.
        """
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
        """As `scan`, for large ranges: other tasks get their turn at least once a millisecond::

            async with db.stream(prefix=b"user:") as pairs:
                async for key, value in pairs: ...

        It shows one moment, that of entering the block, and keeps what it may need until the
        block is left.  Arguments and errors are as for `scan`.
        """
        start, stop = check_range(start, stop, prefix, limit)
        return stream_once(self.snapshot(), start, stop, reverse, limit)

    def snapshot(self) -> Snapshot:
        """A consistent, durable view at one LSN: ``with db.snapshot() as snap``.

        Its moment is that of entering the block.
        """
        self._versions.check_open()
        return new_snapshot(self._versions)

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
        records = self._core.log.follow(start, entering="db.changes() as commits")
        return new_commit_stream(self._core.log.name, records)

    async def wait_changed(
        self, key: bytes | None = None, *, prefix: bytes | None = None, since: int | None = None
    ) -> int:
        """Wait for a durable commit that touched ``key``, or a key that starts with ``prefix``, or
        any key where neither is given; returns its LSN::

            lsn = db.durable_lsn
            while True:
                work_on(db.get(b"settings"))
                lsn = await db.wait_changed(b"settings", since=lsn)

        With what the last call returned as ``since``, none is missed between two calls; several
        commits may be told as one, with the LSN of the newest.  Cancelling a call changes nothing:
        one with the same ``since`` tells what it would have told.

        Args:
          since: only commits after this LSN count, those that are there already included;
              None: after now.

        Raises:
          TypeError, ValueError: key and prefix are both given, or one of them is none.
          LsnTruncatedError: ``since`` lies so far back that neither memory nor the log know
              what has changed; look, and go on from `durable_lsn`.
          LogDivergedError: ``since`` is above `durable_lsn`, so it is not of this database.
          LogFailedError, trio.ClosedResourceError: no more commits will come.
        """
        if key is not None:
            if prefix is not None:
                raise ValueError("prefix cannot be combined with key")
            key = check_key(key)
        elif prefix is not None:
            prefix = check_bytes("prefix", prefix)
        versions, log = self._versions, self._core.log
        versions.check_open()
        require_trio("db.wait_changed")
        watches, watch = versions.watches, Watch(key, prefix)
        watches.begin(versions.durable_lsn)
        durable_lsn = max(versions.durable_lsn, log.durable_lsn)
        place = durable_lsn if since is None else check_int("since", since, 0)
        if place > durable_lsn:
            raise LogDivergedError(log.name, Bookmark(place, log.tail.epoch), durable_lsn)
        while place < watches.known_from:
            end = versions.durable_lsn
            lsn = await changed_in_log(log, watch, place, end)
            if lsn is not None:
                return lsn
            place = end
        lsn = watches.missed(watch, place)
        if lsn is not None:
            await trio.lowlevel.checkpoint()
            return lsn
        watches.add(watch)
        try:
            log.status.check_usable()
            await watch.wait()
        finally:
            watches.discard(watch)
        if watch.lsn is None:
            versions.check_open()
            log.status.check_usable()
            raise trio.ClosedResourceError(f"{printable(self.path)}: this database is closed")
        return watch.lsn

    def consumer(self, name: str, *, start: int | Bookmark | None = None) -> DatabaseConsumer:
        """A named, durable place among the commits, as an async context manager::

            async with db.consumer("mailer") as consumer:
                async for commit in consumer:
                    send_mails(commit.operations)
                    await consumer.acknowledge(commit)

        It continues after the last commit that was acknowledged, whenever that was, and in
        whichever process.  Its first use makes it, durably, before anything is given.  From then
        on the log keeps what comes after its place, unless that takes more than
        ``consumer_hold_bytes``; `drop_consumer` ends that.  Places belong to the database: its
        backups have them as of their LSN.

        From its first consumer on, versions of trio-wal that know of none refuse the database.

        Args:
          name: 1 to 255 characters.
          start: where its first use begins: the first LSN, or a bookmark to continue after; None:
              the oldest commit that the log still has.  Ignored afterwards.

        Raises, when called:
          TypeError, ValueError: an argument is wrong.

        Raises, on entering; no consumer was made:
          trio.BusyResourceError: somebody is using it.
          LsnTruncatedError: its place, or ``start``, is no longer in the log.
          LogDivergedError: its place, or ``start``, is not in this database's history.
          ValueError: there are 1,000 consumers.
          LogFullError, OSError: its first place could not be written.
          LogFailedError, trio.ClosedResourceError: the log is broken, or it is closed.
        """
        session = Session(self._core.consumers, check_consumer_name(name), check_start(start))
        return new_database_consumer(session, self._versions, self._core.log.name)

    @enable_ki_protection
    async def drop_consumer(self, name: str) -> None:
        """Forget a consumer and what it holds, in a transaction of its own.  Durable on return.

        Cancellation: if it raises `trio.Cancelled`, the consumer is as it was.

        Raises:
          KeyError: there is none of this name.
          trio.BusyResourceError: somebody is using it.
          LogFullError, LogFailedError, trio.ClosedResourceError: as `put`.
        """
        await self._core.consumers.drop(check_consumer_name(name))

    # -- into the store --

    async def checkpoint(self) -> int:
        """Move everything committed into the store; returns the LSN that it covers.

        Writers go on meanwhile.  It also runs by itself after every ``checkpoint_bytes`` of log.
        A crash or cancellation on the way loses nothing.

        Raises:
          LogFullError: LMDB's map is full, and cannot grow because a snapshot, or a
              transaction that has read, stayed open for several seconds.
          CorruptLogError: the store is damaged; nothing is lost, the log still has it.
          OSError: the store could not be written; nothing is lost, the log still has it.
          LogFailedError: the log is broken; what was durable is read from it on the next open.
        """
        await self._check_usable("checkpoint")
        return await self._core.checkpointer.checkpoint()

    async def backup(self, dest: str | os.PathLike[str]) -> int:
        """Write a copy that `open_database` opens, while writers go on.

        It is made under another name next to ``dest`` (with a random part and ``.tmp`` at its
        end) and renamed when it is durable.  So ``dest`` is there whole or not at all, and what
        failed can be tried again.  Once the copy has begun it is finished even if the caller is
        cancelled.  A process that is killed leaves the other name there; it may be deleted.

        Deleted keys and values are not copied.

        With ``archive=`` of `open_database` the copy is put there, too, before it gets its name:
        `restore` begins with it.  That can be cancelled, between two pieces of a mebibyte; then,
        as where the archive fails, there is no ``dest`` either.

        Args:
          dest: a directory that does not exist yet.

        Returns the LSN whose state the copy has.

        Raises:
          FileExistsError: ``dest`` exists; or the archive has what is not this log's, because its
              files were set back.
          CorruptLogError: the store is damaged.
          WrongDirectoryError: the archive is another log's.
          OSError: the copy could not be written, or not be archived; nothing of it is left.
          LogFailedError: the log is broken.
        """
        path = check_path(dest)
        await self._check_usable("backup")
        return await self._core.backup(path)

    async def snapshot_to(self, store: Archive) -> int:
        """Keep a copy of the state, as of now, where other machines find it; returns its LSN.

        For a log on servers: a machine that has nothing begins with the newest snapshot, and only
        what a snapshot has may be dropped from the log.  ``snapshots=`` of `open_database` makes
        them by itself.  Once the copy has begun it is finished even if the caller is cancelled;
        what is kept under its name is whole, or not there.

        Args:
          store: `DirectoryArchive`, or another `Archive`.

        Raises:
          CorruptLogError: the store is damaged.
          OSError: the copy could not be made; nothing of it is left.
          LogFailedError: the log is broken.
        """
        check_archive("store", store)
        await self._check_usable("snapshot_to")
        return await self._core.snapshot_to(store)

    # -- what it is --

    @property
    def path(self) -> str:
        """The database's directory, absolute."""
        return self._core.path

    @property
    def wal(self) -> WriteAheadLog:
        """The log in front, to read, follow and flush; only transactions write it."""
        return self._core.wal

    @property
    def uuid(self) -> uuid.UUID:
        """Made with the database, kept for ever, also by its backups."""
        return self.wal.uuid

    @property
    def epoch(self) -> int:
        """Which of the database's histories this is.  It grows at the first open of a backup,
        because from then on it and the original may give the same LSN to different
        transactions, and where an open finds less than others were told is durable
        (`RecoveryReport.lost_lsn`)."""
        return self.wal.epoch

    @property
    def durable_lsn(self) -> int:
        """The newest durable transaction."""
        return self._versions.durable_lsn

    @property
    def recovery(self) -> RecoveryReport:
        """What this open found and did."""
        return self._recovery

    def statistics(self) -> DatabaseStatistics:
        """A look at log, memtable and store.  Cheap; no checkpoint."""
        versions, checkpointer = self._versions, self._core.checkpointer
        store_keys, store_bytes = self._core.store_statistics()
        layers = versions.view.layers()
        wal = self.wal.statistics()
        return DatabaseStatistics(
            wal=wal,
            consumers=wal.consumers,
            transactions=versions.transactions,
            conflicts=versions.conflicts,
            pending=versions.pending,
            memtable_keys=sum(len(layer.versions) for layer in layers),
            memtable_bytes=sum(layer.bytes for layer in layers),
            tasks_waiting_checkpoint=versions.room.waiting,
            open_readers=len(versions.readers.pins),
            checkpoint_lsn=checkpointer.state.lsn,
            checkpoints=checkpointer.count,
            checkpoint_seconds_last=checkpointer.seconds_last,
            store_keys=store_keys,
            store_bytes=store_bytes,
        )

    def health(self) -> Health:
        """How log and store fare, in one word and with reasons; cheap, no checkpoint.

        It may be asked after the database was closed, or its log has failed.
        """
        core = self._core
        return judge((*core.log.reasons(), *core.checkpointer.reasons()))

    async def aclose(self) -> None:
        """Make every commit durable, close log and store; idempotent.

        Neither cancellation nor Ctrl-C cuts that short, as `WriteAheadLog.aclose`; leaving the
        ``async with`` block does it.

        Raises:
          LogFailedError: the log broke and nobody has been told.
        """
        await self.wal.aclose()

    async def _check_usable(self, caller: str) -> None:
        """A checkpoint; raises where the database is closed or its log has failed."""
        self._versions.check_open()
        require_trio(f"db.{caller}")
        await trio.lowlevel.checkpoint()
        self._core.log.status.check_usable()

    def __repr__(self) -> str:
        return f"<Database {self.path!r} durable_lsn={self.durable_lsn}>"


new_database = constructor(Database)


publish(Database)
