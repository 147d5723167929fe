"""A log for asyncio: what `trio_wal.asyncio.open_wal` and `open_reader` give.

Law: each method is the one of the same name under trio, called in trio's thread: what it promises
stands there.  What is different stands here.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Literal, TypeVar, cast, final

from . import _consumer, _reader, _wal, _writer
from ._engine import Record, RecoveryReport
from ._exports import NoPublicConstructor, constructor
from ._facade import Block, Held, Opened, Stream
from ._health import Health
from ._identity import Bookmark
from ._statistics import WalStatistics, WriterStatistics

T = TypeVar("T")


def copied(records: Iterable[bytes]) -> Iterable[bytes]:
    """Taken from the iterable here, and not in trio's thread; what is wrong with it is said
    there."""
    given: object = records
    if isinstance(given, (bytes, bytearray, memoryview, str)) or not isinstance(given, Iterable):
        return records
    return list(records)


@final
class RecordStream(Stream[Record], metaclass=NoPublicConstructor):
    """Records of a log, in LSN order; what ``read()`` and ``follow()`` return.

    As `trio_wal.RecordStream`.  Up to 1,000 records are fetched at once: where
    `WriteAheadLog.truncate_after` drops some that were fetched and not yet given, they are given,
    and then `trio_wal.LogDivergedError` is raised.
    """


new_record_stream = constructor(RecordStream)


@final
class Consumer(Stream[Record], metaclass=NoPublicConstructor):
    """A named, durable place in a log; as `trio_wal.Consumer`."""

    @property
    def name(self) -> str:
        """As given to ``consumer()``."""
        return cast(_consumer.Consumer, self._entered()).name

    async def acknowledge(self, item: Record) -> None:
        """As `trio_wal.Consumer.acknowledge`."""
        consumer = cast(_consumer.Consumer, self._entered())
        await self._portal.call(consumer.acknowledge, item)


new_consumer = constructor(Consumer)


@final
class Writer(Held[_writer.Writer], metaclass=NoPublicConstructor):
    """A named share of a log's queue; as `trio_wal.Writer`."""

    async def append(self, data: bytes) -> int:
        """As `trio_wal.Writer.append`."""
        return await self._portal.call(self._trios.append, data)

    async def append_many(self, records: Iterable[bytes]) -> range:
        """As `trio_wal.Writer.append_many`; the iterable is consumed at once."""
        return await self._portal.call(self._trios.append_many, copied(records))

    async def send(self, data: bytes) -> None:
        """As `trio_wal.Writer.send`."""
        await self._portal.call(self._trios.send, data)

    async def send_nowait(self, data: bytes) -> None:
        """As `trio_wal.Writer.send_nowait`: it waits for trio's thread, and never for room."""
        await self._portal.call_sync(self._trios.send_nowait, data)

    async def flush(self) -> int:
        """As `trio_wal.Writer.flush`."""
        return await self._portal.call(self._trios.flush)

    async def statistics(self) -> WriterStatistics:
        """As `trio_wal.Writer.statistics`."""
        return await self._portal.call_sync(self._trios.statistics)


new_writer = constructor(Writer)


@final
class WriteAheadLog(Opened[_wal.WriteAheadLog], metaclass=NoPublicConstructor):
    """An open log, for the tasks of one asyncio event loop.

    Its methods are those of `trio_wal.WriteAheadLog`, with the same promises.  All are
    coroutines, also those that there are sync: they run in trio's thread.
    """

    # -- writing --

    async def append(self, data: bytes) -> int:
        """Append one record and wait until it is durable; returns its LSN.

        As `trio_wal.WriteAheadLog.append`.  Appends of many tasks share a write and a sync.

        Cancellation: if it raises `asyncio.CancelledError`, nothing of the record is in the log.
        A record whose batch is already being written is waited for, and the call returns its
        LSN; the cancellation is delivered where the task waits next.
        """
        return await self._portal.call(self._trios.append, data)

    async def append_many(self, records: Iterable[bytes]) -> range:
        """As `trio_wal.WriteAheadLog.append_many`; the iterable is consumed at once."""
        return await self._portal.call(self._trios.append_many, copied(records))

    async def send(self, data: bytes) -> None:
        """As `trio_wal.WriteAheadLog.send`."""
        await self._portal.call(self._trios.send, data)

    async def send_nowait(self, data: bytes) -> None:
        """As `trio_wal.WriteAheadLog.send_nowait`: it waits for trio's thread, and never for room
        in the queue."""
        await self._portal.call_sync(self._trios.send_nowait, data)

    async def flush(self) -> int:
        """As `trio_wal.WriteAheadLog.flush`."""
        return await self._portal.call(self._trios.flush)

    async def wait_durable(self, lsn: int) -> None:
        """As `trio_wal.WriteAheadLog.wait_durable`."""
        await self._portal.call(self._trios.wait_durable, lsn)

    def writer(
        self,
        name: str,
        *,
        max_queue_size: float | None = None,
        max_queue_bytes: float | None = None,
        priority: Literal["normal", "high"] = "normal",
    ) -> AbstractAsyncContextManager[Writer]:
        """As `trio_wal.WriteAheadLog.writer`; errors are raised on entering."""
        begin = partial(
            self._trios.writer,
            name,
            max_queue_size=max_queue_size,
            max_queue_bytes=max_queue_bytes,
            priority=priority,
        )
        return Block(self._portal, begin, new_writer)

    # -- reading --

    def read(self, start: int | Bookmark | None = None, stop: int | None = None) -> RecordStream:
        """As `trio_wal.WriteAheadLog.read`; errors are raised on entering."""
        return new_record_stream(self._portal, partial(self._trios.read, start, stop))

    def follow(self, start: int | Bookmark | None = None) -> RecordStream:
        """As `trio_wal.WriteAheadLog.follow`; errors are raised on entering."""
        return new_record_stream(self._portal, partial(self._trios.follow, start))

    def consumer(self, name: str, *, start: int | Bookmark | None = None) -> Consumer:
        """As `trio_wal.WriteAheadLog.consumer`; errors are raised on entering."""
        return new_consumer(self._portal, partial(self._trios.consumer, name, start=start))

    async def drop_consumer(self, name: str) -> None:
        """As `trio_wal.WriteAheadLog.drop_consumer`."""
        await self._portal.call(self._trios.drop_consumer, name)

    # -- segments --

    async def rotate(self) -> int:
        """As `trio_wal.WriteAheadLog.rotate`."""
        return await self._portal.call(self._trios.rotate)

    async def truncate_before(self, lsn: int) -> None:
        """As `trio_wal.WriteAheadLog.truncate_before`."""
        await self._portal.call(self._trios.truncate_before, lsn)

    async def truncate_after(self, lsn: int) -> None:
        """As `trio_wal.WriteAheadLog.truncate_after`."""
        await self._portal.call(self._trios.truncate_after, lsn)

    # -- what it is --

    @property
    def recovery(self) -> RecoveryReport:
        """What this open found and did."""
        return self._trios.recovery

    async def bookmark(self) -> Bookmark:
        """`trio_wal.WriteAheadLog.bookmark`."""
        return await self._portal.call_sync(lambda: self._trios.bookmark)

    async def first_lsn(self) -> int:
        """`trio_wal.WriteAheadLog.first_lsn`."""
        return await self._portal.call_sync(lambda: self._trios.first_lsn)

    async def last_lsn(self) -> int:
        """`trio_wal.WriteAheadLog.last_lsn`."""
        return await self._portal.call_sync(lambda: self._trios.last_lsn)

    async def statistics(self) -> WalStatistics:
        """As `trio_wal.WriteAheadLog.statistics`."""
        return await self._portal.call_sync(self._trios.statistics)

    async def health(self) -> Health:
        """As `trio_wal.WriteAheadLog.health`."""
        return await self._portal.call_sync(self._trios.health)

    def __repr__(self) -> str:
        return f"<trio_wal.asyncio.WriteAheadLog {self.path!r}>"


new_wal = constructor(WriteAheadLog)


@final
class LogReader(Opened[_reader.LogReader], metaclass=NoPublicConstructor):
    """A look at a log without owning it; as `trio_wal.LogReader`.

    What is a property there is a coroutine here: files are looked at, in trio's thread.
    """

    async def bookmark(self) -> Bookmark:
        """`trio_wal.LogReader.bookmark`."""
        return await self._portal.call_sync(lambda: self._trios.bookmark)

    async def first_lsn(self) -> int:
        """`trio_wal.LogReader.first_lsn`."""
        return await self._portal.call_sync(lambda: self._trios.first_lsn)

    def read(self, start: int | Bookmark | None = None, stop: int | None = None) -> RecordStream:
        """As `trio_wal.LogReader.read`."""
        return new_record_stream(self._portal, partial(self._trios.read, start, stop))

    def follow(self, start: int | Bookmark | None = None) -> RecordStream:
        """As `trio_wal.LogReader.follow`."""
        return new_record_stream(self._portal, partial(self._trios.follow, start))


new_log_reader = constructor(LogReader)
