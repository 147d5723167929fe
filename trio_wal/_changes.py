"""The database's transactions, as they stand in its log.

Law: what is in the log is durable; nothing here asks what the memtable or the store has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from types import TracebackType
from typing import final

import attrs

from . import _operations
from ._exceptions import CorruptLogError
from ._exports import NoPublicConstructor, constructor
from ._identity import Bookmark
from ._operations import Operation, OperationsError, Writes, decode_transaction
from ._stream import RecordStream


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


new_commit_stream = constructor(CommitStream)


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
