"""A consumer of a log, as a trio program sees it: `Consumer`.

Law: promises and the checks of what users pass; the work is `_consumers`'.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, final

from trio.lowlevel import enable_ki_protection

from ._consumers import Session
from ._engine import Record
from ._exports import NoPublicConstructor, constructor, publish
from ._identity import Bookmark
from ._stream import RecordStream


@final
class Consumer(
    AbstractAsyncContextManager["Consumer"], AsyncIterator[Record], metaclass=NoPublicConstructor
):
    """A named, durable place in a log; what `WriteAheadLog.consumer` gives.

    Iterating gives every durable record after that place, and then waits for new ones, as
    `WriteAheadLog.follow` does and with the same errors.  At least once: what was not
    acknowledged is given again the next time it is entered.  A cancellation loses nothing, as of
    any `RecordStream`.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._records: RecordStream | None = None

    @enable_ki_protection
    async def __aenter__(self) -> Consumer:
        self._records = await self._session.enter()
        return self

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.leave()

    @property
    def name(self) -> str:
        """As given to ``consumer()``."""
        return self._session.name

    @property
    def bookmark(self) -> Bookmark:
        """The place after the last record that was given, acknowledged or not."""
        return self._session.stream.bookmark

    def __aiter__(self) -> Consumer:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Record]:
        return (self._records or self._session.stream).__anext__()

    def batches(
        self, max_records: int | None = 1000, *, linger: float = 0.0
    ) -> AsyncIterator[list[Record]]:
        """The same records in lists, as `RecordStream.batches`; acknowledge the last one of a
        list for all of it."""
        return self._session.stream.batches(max_records, linger=linger)

    async def acknowledge(self, item: Record) -> None:
        """Everything up to this record, which this consumer has given, is done with.

        Durable on return.  One that lies before what is acknowledged changes nothing.  Several
        tasks' acknowledgements share a write.

        Cancellation: nothing has happened, or it is written and the call returns.

        Raises:
          TypeError: ``item`` is no `Record`.
          ValueError: this consumer has not given it, since its block was entered.
          LogDivergedError: `WriteAheadLog.truncate_after` has dropped it.
          LogFullError: there is no room for the new place; the old one is in force.
          OSError: it could not be written; the old one or the new one is in force.
          LogFailedError, trio.ClosedResourceError: as the log's methods, or the block was left.
        """
        if not isinstance(item, Record):
            raise TypeError(f"item must be a Record, not {type(item).__name__}")
        await self._session.acknowledge(item)


new_consumer = constructor(Consumer)


publish(Consumer)
