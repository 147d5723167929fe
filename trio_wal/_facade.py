"""What all that `trio_wal.asyncio` gives has in common: blocks, streams, and how they are opened.

Law: as `_portal`, knows no log and no database; nothing of trio's is touched but through a portal.
"""

from __future__ import annotations

import inspect
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Final,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    final,
)

from ._identity import Bookmark
from ._portal import Line, Portal
from ._util import MiB, Unentered

if TYPE_CHECKING:
    # Only checkers need it; Python has it from 3.11 on.
    from typing_extensions import Self


class _Open(Protocol):
    @property
    def path(self) -> str: ...
    @property
    def uuid(self) -> uuid.UUID: ...
    @property
    def epoch(self) -> int: ...
    @property
    def durable_lsn(self) -> int: ...
    async def aclose(self) -> None: ...


F = TypeVar("F")
L = TypeVar("L", bound=_Open)
P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

AHEAD_ITEMS: Final = 1000
"""Records, commits or pairs that are fetched at once: so many share the way through the thread."""
AHEAD_BYTES: Final = 1 * MiB
"""The same of pairs, where one is over it: that one alone."""


def takes(of: Callable[P, object]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """A function that takes the arguments of another one, and says so."""

    def wrap(function: Callable[..., R]) -> Callable[P, R]:
        own = inspect.signature(function, eval_str=True)
        signature = inspect.signature(of, eval_str=True)
        wrapped: Any = function
        wrapped.__signature__ = signature.replace(return_annotation=own.return_annotation)
        return function

    return wrap


@final
class Opening(Unentered, AbstractAsyncContextManager[F], Generic[F]):
    """What the ``open_*()`` of `trio_wal.asyncio` return: a thread, as long as the block."""

    def __init__(
        self,
        manager: AbstractAsyncContextManager[Any],
        name: str,
        make: Callable[[Portal, Any], F],
    ) -> None:
        self._manager = manager
        self._call = name
        self._make = make
        self._portal: Portal | None = None

    async def __aenter__(self) -> F:
        if self._portal is not None:
            raise RuntimeError(f"{self._call}() gives a context manager that can be used only once")
        portal = self._portal = Portal(self._manager, self._call)
        return self._make(portal, await portal.open())

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._portal is not None
        await self._portal.leave(exc)


@final
class Block(AbstractAsyncContextManager[F], Generic[F]):
    """A block of trio's that belongs to no task, such as a writer's."""

    def __init__(
        self,
        portal: Portal,
        begin: Callable[[], AbstractAsyncContextManager[Any]],
        make: Callable[[Portal, Any], F],
    ) -> None:
        self._portal = portal
        self._begin = begin
        self._make = make
        self._manager: AbstractAsyncContextManager[Any] | None = None

    async def _enter(self) -> Any:
        manager = self._begin()
        thing = await manager.__aenter__()
        self._manager = manager
        return thing

    async def __aenter__(self) -> F:
        if self._manager is not None:
            raise RuntimeError("this context manager can be used only once")
        return self._make(self._portal, await self._portal.call(self._enter))

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._manager is not None
        await self._portal.close(self._manager.__aexit__, exc_type, exc, traceback)


class Facade(ABC, Generic[S]):
    """Stands for an object of trio's, which is used in trio's thread only."""

    _portal: Portal

    def _way(self) -> Portal | Line:
        """To trio's thread."""
        return self._portal

    @abstractmethod
    def _entered(self) -> S:
        """What it stands for."""


class Held(Facade[S]):
    """For one that is open and stays what it is."""

    def __init__(self, portal: Portal, trios: S) -> None:
        self._portal = portal
        self._trios: Final = trios

    def _entered(self) -> S:
        return self._trios


class Opened(Held[L]):
    """What the ``open_*()`` give, all of them."""

    @property
    def path(self) -> str:
        """The directory, absolute; the address of a replicated log."""
        return self._trios.path

    @property
    def uuid(self) -> uuid.UUID:
        """Made with the log or database, kept for ever, also by its copies and backups."""
        return self._trios.uuid

    async def epoch(self) -> int:
        """The property ``epoch`` under trio: which of the histories this is."""
        return await self._portal.call_sync(lambda: self._trios.epoch)

    async def durable_lsn(self) -> int:
        """The property ``durable_lsn`` under trio: all up to this LSN is durable."""
        return await self._portal.call_sync(lambda: self._trios.durable_lsn)

    async def aclose(self) -> None:
        """As ``aclose`` under trio; leaving the block does it, and ends the thread."""
        await self._portal.close(self._trios.aclose)


class Entered(Facade[S]):
    """For one whose block is entered and left in trio's thread."""

    _what: ClassVar = "stream"
    _how: ClassVar = ""
    """For messages: how it is entered."""

    def __init__(self, portal: Portal, begin: Callable[[], Any]) -> None:
        """
        Args:
          begin: makes the object of trio's, in trio's thread.
        """
        self._portal = portal
        self._begin = begin
        self._trios: S | None = None
        self._entering = False

    async def _enter(self) -> None:
        trios = self._begin()
        await trios.__aenter__()
        self._trios = trios

    async def __aenter__(self) -> Self:
        if self._trios is not None or self._entering:
            raise RuntimeError(f"a {self._what} can be used only once")
        self._entering = True
        try:
            await self._way().call(self._enter)
        finally:
            self._entering = False
        return self

    async def _leave(self, *exc_info: Any) -> None:
        trios: Any = self._entered()
        await trios.__aexit__(*exc_info)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._forget()
        await self._way().close(self._leave, exc_type, exc, traceback)

    def _forget(self) -> None:
        """What was fetched and not given."""

    def _entered(self) -> S:
        if self._trios is None:
            raise RuntimeError(f"enter the {self._what} first: async with{self._how}")
        return self._trios


class Stream(Entered[Any], AbstractAsyncContextManager["Stream[T]"], AsyncIterator[T], Generic[T]):
    """A stream of trio's: items are fetched many at a time and given one at a time.

    Nothing is lost where a fetch is cancelled: what it got is given by the next call.
    """

    def __init__(self, portal: Portal, begin: Callable[[], Any]) -> None:
        super().__init__(portal, begin)
        self._batches: AsyncIterator[list[T]] | None = None
        self._ready: list[Any] = []
        """The newest stands first.  Filled in trio's thread, while a fetch is waited for."""
        self._fetched: Bookmark | None = None
        """The stream's place behind all that is ready."""

    async def _enter(self) -> None:
        await super()._enter()
        self._fetched = self._entered().bookmark

    def _forget(self) -> None:
        self._ready.clear()

    @property
    def bookmark(self) -> Bookmark:
        """The place after the last item that was given, where another stream continues."""
        self._entered()
        assert self._fetched is not None
        if self._ready:
            return Bookmark(self._ready[-1].lsn - 1, self._fetched.epoch)
        return self._fetched

    async def _fetch(self, batches: AsyncIterator[list[T]]) -> None:
        items = await batches.__anext__()
        items.reverse()
        self._ready[:0] = items
        self._fetched = self._entered().bookmark

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if not self._ready:
            batches = self._batches
            if batches is None:
                batches = self._batches = self._entered().batches(AHEAD_ITEMS)
            await self._portal.call(self._fetch, batches)
        item: T = self._ready.pop()
        return item

    def batches(
        self, max_records: int | None = 1000, *, linger: float = 0.0
    ) -> AsyncIterator[list[T]]:
        """The same items in lists, none of them empty; as `trio_wal.RecordStream.batches`."""
        batches: AsyncIterator[list[T]] = self._entered().batches(max_records, linger=linger)
        return _Lists(partial(self._next_list, batches, max_records))

    async def _next_list(self, batches: AsyncIterator[list[T]], count: int | None) -> list[T]:
        ready = self._ready
        if not ready:
            await self._portal.call(self._fetch, batches)
        place = 0 if count is None else max(0, len(ready) - count)
        items: list[T] = ready[place:]
        items.reverse()
        del ready[place:]
        return items


@final
class _Lists(AsyncIterator[list[T]], Generic[T]):
    """Of a stream, which has all of the state."""

    def __init__(self, take: Callable[[], Awaitable[list[T]]]) -> None:
        self._take = take

    def __aiter__(self) -> _Lists[T]:
        return self

    async def __anext__(self) -> list[T]:
        return await self._take()


@final
class PairStream(
    Entered[Any],
    AbstractAsyncContextManager["PairStream"],
    AsyncIterator[tuple[bytes, bytes]],
):
    """Keys and values of one moment, in order; what ``stream()`` returns.

    Enter it with ``async with`` and iterate with ``async for``.  Some hundred pairs, up to a
    mebibyte, are fetched at once.  A cancellation loses nothing: what was fetched is given by the
    next call.
    """

    _how = " db.stream() as pairs"

    def __init__(self, portal: Portal, begin: Callable[[], Any]) -> None:
        super().__init__(portal, begin)
        self._ready: deque[tuple[bytes, bytes]] = deque()
        """Filled in trio's thread, while a fetch is waited for."""

    def _forget(self) -> None:
        self._ready.clear()

    async def _fetch(self) -> None:
        # Into what the stream keeps: cancelled, nothing is lost.
        size = 0
        async for key, value in self._entered():
            self._ready.append((key, value))
            size += len(key) + len(value)
            if len(self._ready) >= AHEAD_ITEMS or size >= AHEAD_BYTES:
                return

    def __aiter__(self) -> PairStream:
        return self

    async def __anext__(self) -> tuple[bytes, bytes]:
        if not self._ready:
            self._entered()
            await self._portal.call(self._fetch)
            if not self._ready:
                raise StopAsyncIteration
        return self._ready.popleft()
