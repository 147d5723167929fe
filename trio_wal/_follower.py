"""Another process's database, followed: its store, and its log's tail in layers above it.

Law: never writes to log or store, takes no lock, and is never ahead of what is durable.  The
layers are those of `_mvcc`, to which the log is replayed as it grows; here nothing is committed.

A checkpoint of the owner's comes in pieces, and each of them may be in the store's read
transaction before the LSN that it belongs to.  They are of commits that were durable when that
transaction began.  So a store is shown only once everything that was durable after its beginning
has been replayed above it: then each key that a piece has set is set again in a layer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, final

import trio
from trio.lowlevel import Task

from ._base import ReadTransaction, StoreGrown, StoreReader, StoreState
from ._changes import decode_record
from ._engine import Forked, Record, Tail
from ._exceptions import (
    CorruptLogError,
    LogDivergedError,
    LsnTruncatedError,
    UnsupportedFormatError,
)
from ._identity import Bookmark, common_lsn
from ._layer import Layer
from ._mvcc import Versions
from ._operations import moves_in
from ._reader import WatchSource
from ._store_files import damaged, data_file, misfit
from ._stream import RecordStream, new_record_stream
from ._watermark import Watermark

FREEZE_BYTES: Final = 4 * 1024 * 1024
"""Of log in the active layer, after which it waits for the owner's store to have it."""
OPEN_TRIES: Final = 100
"""How often the owner may checkpoint and drop the log while this opens."""


class _NoStatus:
    """Of a log to which nothing is committed here."""

    refuses = True
    disowned = False

    def check_open(self) -> None:
        raise AssertionError("nothing is committed by a reader")


class _NoLog:
    """In the place of `_mvcc.CommitLog`."""

    status = _NoStatus()

    def append(self, record: bytes, task: Task) -> Awaitable[int]:
        raise AssertionError("nothing is committed by a reader")

    def append_in_turn(self, record: bytes, line: Any, enter: Callable[[], None]) -> Awaitable[int]:
        raise AssertionError("nothing is committed by a reader")

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        raise AssertionError("nothing is committed by a reader")


class _Prepared:
    """A store's read transaction that was begun before it is needed; a `_base.Readable`."""

    def __init__(self, transaction: ReadTransaction) -> None:
        self.next: ReadTransaction = transaction

    def read(self) -> ReadTransaction:
        return self.next


@final
class Follower:
    """A database's durable state, as far as it was followed."""

    def __init__(self, path: str, source: WatchSource, store: StoreReader) -> None:
        self._path = path
        self.source: Final = source
        self._store = store
        self._prepared: _Prepared
        self.versions: Versions
        self.checkpoint_lsn = 0
        """Up to here the store that is read has everything."""
        self.epoch = 0
        self.forked = False
        self.failure: Exception | None = None
        """Why it follows no more."""
        self._frozen: Layer | None = None
        self._reached = Watermark()
        self._stopping = trio.CancelScope()
        self._former: list[Versions] = []
        """Those before the last time that all began anew, while somebody may read them."""

    @property
    def lsn(self) -> int:
        """The newest commit that is seen here."""
        return self.versions.durable_lsn

    # -- the store --

    async def _begin_store(self) -> tuple[ReadTransaction, int]:
        """A read transaction of the store, and what it holds."""
        while True:
            try:
                transaction, state = await self.source.blocking(self._store.read)
                break
            except StoreGrown:
                await self._wait_unread()
                self._store.grow()
        try:
            self._check(state)
        except BaseException:
            transaction.close()
            raise
        return transaction, 0 if state is None else state.lsn

    def _check(self, state: StoreState | None) -> None:
        if state is not None and state.log_uuid != self.source.meta.log_uuid:
            wrong = misfit(state, self.source.meta.log_uuid, 1, state.lsn)
            assert wrong is not None
            raise damaged(data_file(self._path), wrong)

    async def _wait_unread(self) -> None:
        for versions in (*self._former, self.versions):
            await versions.readers.wait_unread()
        self._former.clear()

    # -- beginning --

    async def begin(self) -> RecordStream:
        """Read the store and the log's tail; gives the stream that goes on from there.

        Raises:
          CorruptLogError, OSError, UnsupportedFormatError
        """
        for _ in range(OPEN_TRIES):
            transaction, lsn = await self._begin_store()
            try:
                # After that: see the top of this module.
                await self.source.refresh()
                return await self._begin_above(transaction, lsn)
            except LsnTruncatedError:
                # The owner has checkpointed and dropped what was to be read.
                transaction.close()
                before = lsn
                _, lsn = await self._begin_store()
                if lsn == before:
                    wrong = misfit(None, self.source.meta.log_uuid, self.source.tail.first_lsn, 0)
                    raise damaged(data_file(self._path), wrong or "") from None
            except BaseException:
                transaction.close()
                raise
        raise CorruptLogError(self._path, 0, "its log is dropped faster than it can be read")

    async def _begin_above(self, transaction: ReadTransaction, lsn: int) -> RecordStream:
        tail = self.source.tail
        if lsn > tail.durable_lsn:
            self._refuse_ahead(lsn, tail)
        stream = new_record_stream(self.source, lsn + 1, None, follow=True)
        await stream.__aenter__()
        try:
            prepared = _Prepared(transaction)
            versions = Versions(
                self._path,
                prepared,
                _NoLog(),
                durable_lsn=lsn,
                checkpoint_bytes=1 << 62,
                max_transaction_bytes=0,
            )
            await self._replay_up_to(versions, stream, tail.durable_lsn)
        except BaseException:
            await stream.__aexit__(None, None, None)
            raise
        self._prepared, self.versions = prepared, versions
        self._frozen = None
        self.checkpoint_lsn = lsn
        self.epoch = tail.epoch
        return stream

    def _refuse_ahead(self, lsn: int, tail: Tail) -> None:
        if self.source.damage is not None:
            raise self.source.damage
        wrong = misfit(
            StoreState(self.source.meta.log_uuid, lsn),
            self.source.meta.log_uuid,
            1,
            tail.durable_lsn,
        )
        raise damaged(data_file(self._path), wrong or "")

    async def _replay_up_to(self, versions: Versions, stream: RecordStream, lsn: int) -> None:
        while versions.durable_lsn < lsn:
            await self._replay(versions, await stream.batches(None).__anext__())

    async def _replay(self, versions: Versions, records: list[Record]) -> None:
        name = self.source.name
        for record in records:
            writes = decode_record(name, record.lsn, record.data)
            moves = moves_in(record.data)
            await versions.replay(record.lsn, writes, len(record.data), moves)

    # -- following --

    async def run(self, stream: RecordStream) -> None:
        """Follow until stopped, or until nothing more can be read, which `failure` tells."""
        try:
            with self._stopping:
                while True:
                    try:
                        await self._follow(stream)
                    except (LsnTruncatedError, LogDivergedError):
                        # Fallen behind, or the end was cut: what the store has is the truth.
                        await stream.__aexit__(None, None, None)
                        stream = await self._begin_anew()
        except (Forked, trio.ClosedResourceError):
            return
        except (CorruptLogError, UnsupportedFormatError, OSError, MemoryError) as exc:
            self.failure = exc
        finally:
            await stream.__aexit__(None, None, None)
        self._reached.release()

    async def _begin_anew(self) -> RecordStream:
        former = self.versions
        stream = await self.begin()
        self._former.append(former)
        self._reached.release()
        return stream

    async def _follow(self, stream: RecordStream) -> None:
        async for records in stream.batches(None):
            await self._replay(self.versions, records)
            self._reached.reached(self.lsn)
            await self._take_checkpoint(stream)

    async def _take_checkpoint(self, stream: RecordStream) -> None:
        """Let go of the layer that the owner's store has."""
        versions = self.versions
        if self._frozen is None and versions.view.active.log_bytes >= FREEZE_BYTES:
            self._frozen = versions.freeze()
        frozen = self._frozen
        if frozen is None:
            return
        transaction, lsn = await self._begin_store()
        try:
            if lsn < frozen.last_lsn:
                transaction.close()
                return
            await self.source.refresh()
            await self._replay_up_to(versions, stream, self.source.tail.durable_lsn)
        except BaseException:
            transaction.close()
            raise
        self._prepared.next = transaction
        versions.checkpointed(frozen)
        self._frozen = None
        self.checkpoint_lsn = lsn
        self._former = [each for each in self._former if each.readers.pins]
        self._reached.reached(self.lsn)

    def check_history(self, place: int | Bookmark) -> None:
        """Raises `LogDivergedError` where a bookmark is not in the history that is seen here."""
        if isinstance(place, Bookmark):
            common = common_lsn(self.source.tail.history, place.epoch)
            if common is None or common < place.lsn:
                raise LogDivergedError(self._path, place, common)

    async def wait_news(self, lsn: int) -> None:
        """Until that LSN is seen here, or something has happened."""
        await self._reached.wait(lsn)

    def check_following(self) -> None:
        """Raises what ended the following: what is seen here may be old by now."""
        failure = self.failure
        if failure is None:
            return
        if isinstance(failure, (CorruptLogError, UnsupportedFormatError)):
            raise type(failure)(*failure.args) from failure
        if isinstance(failure, OSError):
            raise OSError(failure.errno, failure.strerror, failure.filename) from failure
        raise MemoryError(*failure.args) from failure

    # -- the end --

    def stop(self) -> None:
        """Nobody reads any more."""
        self._stopping.cancel()
        for versions in (*self._former, self.versions):
            versions.let_go()
        self._reached.release()

    def close(self) -> None:
        """Give everything back, after `run` has ended."""
        self.stop()
        for versions in (*self._former, self.versions):
            versions.close()
        self._former.clear()
        self._store.close()

    def disown(self) -> None:
        """In a forked child: all of it is the parent's."""
        self.forked = True
        for versions in (*self._former, self.versions):
            versions.disown()
        self.source.blocking.disown()

    def store_bytes(self) -> int:
        """Of the store's file."""
        return self._store.size()
