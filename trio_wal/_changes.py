"""The database's transactions, as they stand in its log.

Law: what is in the log is durable; nothing here asks what the memtable or the store has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from types import TracebackType
from typing import NoReturn, final

import msgspec
import trio

from . import _operations
from ._engine import Record
from ._exceptions import CorruptLogError
from ._exports import NoPublicConstructor, constructor, publish
from ._identity import Bookmark
from ._log import Log
from ._operations import (
    Operation,
    OperationsError,
    Writes,
    decode_transaction,
    moves_places,
    not_a_transaction,
)
from ._stream import RecordStream
from ._watch import Watch


@final
class Commit(msgspec.Struct, frozen=True, gc=False):
    """One committed transaction, as `Database.changes` gives it."""

    lsn: int
    """Of its record in the log."""
    timestamp: datetime
    """UTC, of its batch; never decreasing along the log."""
    operations: tuple[Operation, ...]
    """What it did, one per key, in the order of first writes."""


@final
class CommitStream(
    AbstractAsyncContextManager["CommitStream"],
    AsyncIterator[Commit],
    metaclass=NoPublicConstructor,
):
    """Committed transactions in order; what `Database.changes` returns.

    Enter it with ``async with`` and iterate with ``async for``, in one task at a time.  Checkpoints
    and cancellation are those of `RecordStream`.
    """

    def __init__(self, path: str, records: RecordStream) -> None:
        self._path = path
        self._records = records
        self._damage: CorruptLogError | None = None
        """Of the commit where this stream ends."""
        self._damaged_lsn = 0

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
        place = self._records.bookmark
        if self._damage is not None:
            # The records behind it may have been taken in the same list.
            return Bookmark(self._damaged_lsn - 1, place.epoch)
        return place

    def __aiter__(self) -> CommitStream:
        return self

    async def __anext__(self) -> Commit:
        while True:
            if self._damage is not None:
                await self._tell_damage(self._damage)
            commit = self._commit(await self._records.__anext__())
            if commit is not None:
                return commit

    def batches(
        self, max_records: int | None = 1000, *, linger: float = 0.0
    ) -> AsyncIterator[list[Commit]]:
        """The same commits in lists, as `RecordStream.batches`."""
        return _Batches(self._next_batch, self._records.batches(max_records, linger=linger))

    async def _next_batch(self, records: AsyncIterator[list[Record]]) -> list[Commit]:
        if self._damage is not None:
            await self._tell_damage(self._damage)
        commits: list[Commit] = []
        try:
            while not commits:
                commits.extend(filter(None, map(self._commit, await records.__anext__())))
        except CorruptLogError:
            # First what is whole.
            if not commits:
                raise
        return commits

    def _commit(self, record: Record) -> Commit | None:
        """None: it only moves places of consumers, which is nobody's business."""
        try:
            writes = decode_record(self._path, record.lsn, record.data)
        except CorruptLogError as exc:
            self._damage, self._damaged_lsn = exc, record.lsn
            raise
        if not writes and moves_places(record.data):
            return None
        operations = tuple(Operation(key, value) for key, value in writes.items())
        return Commit(record.lsn, record.timestamp, operations)

    async def _tell_damage(self, damage: CorruptLogError) -> NoReturn:
        """Nothing is given past it, however the stream is gone on with."""
        await trio.lowlevel.checkpoint()
        raise CorruptLogError(*damage.args) from damage


@final
class _Batches(AsyncIterator[list[Commit]]):
    """Of a stream, which has all of the state."""

    def __init__(
        self,
        take: Callable[[AsyncIterator[list[Record]]], Awaitable[list[Commit]]],
        records: AsyncIterator[list[Record]],
    ) -> None:
        self._take = take
        self._records = records

    def __aiter__(self) -> _Batches:
        return self

    async def __anext__(self) -> list[Commit]:
        return await self._take(self._records)


new_commit_stream = constructor(CommitStream)


def decode_record(path: str, lsn: int, data: bytes) -> Writes:
    """The transaction in a record of a database's log, or `CorruptLogError`."""
    try:
        return decode_transaction(data)
    except OperationsError as exc:
        raise not_a_transaction(path, lsn, exc) from exc


def operations_in(path: str, lsn: int, data: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """As `decode_record`, one operation after the other."""
    try:
        yield from _operations.operations_in(data)
    except OperationsError as exc:
        raise not_a_transaction(path, lsn, exc) from exc


async def changed_in_log(log: Log, watch: Watch, since: int, stop: int) -> int | None:
    """The first commit after ``since``, up to ``stop``, that touched what is watched."""
    if log.durable_lsn < stop:
        await log.flush()
    async with log.read(since + 1, stop + 1) as records:
        async for record in records:
            if watch.touched_by(decode_record(log.name, record.lsn, record.data)):
                return record.lsn
    return None


publish(Commit, CommitStream)
