"""A database for asyncio: what `trio_wal.asyncio.open_database` gives.

Law: as `_facade_log`.  What others have, too, is in `_facade_transaction` and `_facade_reading`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Literal, final

from . import _database
from ._archive import Archive
from ._database_statistics import DatabaseStatistics
from ._engine import RecoveryReport
from ._exports import NoPublicConstructor, constructor
from ._facade import Block
from ._facade_log import WriteAheadLog, new_wal
from ._facade_reading import Viewing
from ._facade_transaction import (
    Committing,
    DatabaseConsumer,
    DatabaseWriter,
    new_database_consumer,
    new_database_writer,
)
from ._identity import Bookmark


@final
class Database(
    Committing[_database.Database],
    Viewing[_database.Database],
    metaclass=NoPublicConstructor,
):
    """An open database, for the tasks of one asyncio event loop.

    Its methods are those of `trio_wal.Database`, with the same promises.  All are coroutines,
    also those that there are sync: they run in trio's thread.
    """

    async def discard(self, key: bytes) -> bool:
        """As `trio_wal.Database.discard`."""
        return await self._portal.call(self._trios.discard, key)

    async def write(self, mapping: Mapping[bytes, bytes | None]) -> int:
        """As `trio_wal.Database.write`."""
        # What is no mapping is refused there.
        given: object = mapping
        copied = dict(mapping) if isinstance(given, Mapping) else mapping
        return await self._portal.call(self._trios.write, copied)

    def writer(
        self,
        name: str,
        *,
        max_queue_size: float | None = None,
        max_queue_bytes: float | None = None,
        priority: Literal["normal", "high"] = "normal",
    ) -> AbstractAsyncContextManager[DatabaseWriter]:
        """As `trio_wal.Database.writer`; errors are raised on entering."""
        begin = partial(
            self._trios.writer,
            name,
            max_queue_size=max_queue_size,
            max_queue_bytes=max_queue_bytes,
            priority=priority,
        )
        return Block(self._portal, begin, new_database_writer)

    async def wait_changed(
        self, key: bytes | None = None, *, prefix: bytes | None = None, since: int | None = None
    ) -> int:
        """As `trio_wal.Database.wait_changed`."""
        return await self._portal.call(self._trios.wait_changed, key, prefix=prefix, since=since)

    def consumer(self, name: str, *, start: int | Bookmark | None = None) -> DatabaseConsumer:
        """As `trio_wal.Database.consumer`; errors are raised on entering."""
        return new_database_consumer(self._portal, partial(self._trios.consumer, name, start=start))

    async def drop_consumer(self, name: str) -> None:
        """As `trio_wal.Database.drop_consumer`."""
        await self._portal.call(self._trios.drop_consumer, name)

    # -- into the store --

    async def checkpoint(self) -> int:
        """As `trio_wal.Database.checkpoint`."""
        return await self._portal.call(self._trios.checkpoint)

    async def snapshot_to(self, store: Archive) -> int:
        """As `trio_wal.Database.snapshot_to`."""
        return await self._portal.call(self._trios.snapshot_to, store)

    # -- what it is --

    @property
    def wal(self) -> WriteAheadLog:
        """The log in front, to read, follow and flush; only transactions write it."""
        wal: WriteAheadLog = new_wal(self._portal, self._trios.wal)
        return wal

    @property
    def recovery(self) -> RecoveryReport:
        """What this open found and did."""
        return self._trios.recovery

    async def statistics(self) -> DatabaseStatistics:
        """As `trio_wal.Database.statistics`."""
        return await self._portal.call_sync(self._trios.statistics)

    def __repr__(self) -> str:
        return f"<trio_wal.asyncio.Database {self.path!r}>"


new_database = constructor(Database)
