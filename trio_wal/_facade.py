"""What all that `trio_wal.asyncio` gives has in common: blocks, streams, and how they are opened.

Law: as `_portal`, knows no log and no database; nothing of trio's is touched but through a portal.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, TypeVar, final

from ._identity import Bookmark
from ._portal import Portal
from ._util import MiB

if TYPE_CHECKING:
    # Only checkers need it; Python has it from 3.11 on.
    from typing_extensions import Self

F = TypeVar("F")
P = ParamSpec("P")
R = TypeVar("R")
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
class Opening(AbstractAsyncContextManager[F], Generic[F]):
    """What the ``open_*()`` of `trio_wal.asyncio` return: a thread, as long as the block."""

    def __init__(
        self,
        manager: AbstractAsyncContextManager[Any],
        name: str,
        make: Callable[[Portal, Any], F],
    ) -> None:
        self._manager = manager
        self._name = name
        self._make = make
        self._portal: Portal | None = None

    async def __aenter__(self) -> F:
        if self._portal is not None:
            raise RuntimeError(f"{self._name}() gives a context manager that can be used only once")
        portal = self._portal = Portal(self._manager, self._name)
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


class Stream(AbstractAsyncContextManager["Stream[T]"], AsyncIterator[T], Generic[T]):
    """A stream of trio's: items are fetched many at a time and given one at a time.

    Nothing is lost where a fetch is cancelled: what it got is given by the next call.
    """

    def __init__(self, portal: Portal, begin: Callable[[], Any]) -> None:
        """
        Args:
          begin: makes the stream of trio's, in trio's thread.
        """
        self._portal = portal
        self._begin = begin
        self._stream: Any = None
        self._batches: AsyncIterator[list[T]] | None = None
        self._ready: list[Any] = []
        """The newest stands first.  Filled in trio's thread, while a fetch is waited for."""
        self._fetched: Bookmark | None = None
        """The stream's place behind all that is ready."""

    async def _enter(self) -> None:
        stream = self._begin()
        await stream.__aenter__()
        self._fetched = stream.bookmark
        self._stream = stream

    async def __aenter__(self) -> Self:
        if self._stream is not None:
            raise RuntimeError("a stream can be used only once")
        await self._portal.call(self._enter)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ready.clear()
        await self._portal.close(self._stream.__aexit__, exc_type, exc, traceback)

    def _entered(self) -> Any:
        if self._stream is None:
            raise RuntimeError("enter the stream first: async with")
        return self._stream

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
        self._fetched = self._stream.bookmark

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
    AbstractAsyncContextManager["PairStream"],
    AsyncIterator[tuple[bytes, bytes]],
):
    """Keys and values of one moment, in order; what ``stream()`` returns.

    Enter it with ``async with`` and iterate with ``async for``.  Some hundred pairs, up to a
    mebibyte, are fetched at once.
    """

    def __init__(self, portal: Portal, begin: Callable[[], Any]) -> None:
        self._portal = portal
        self._begin = begin
        self._pairs: Any = None
        self._ready: deque[tuple[bytes, bytes]] = deque()
        """Filled in trio's thread, while a fetch is waited for."""

    async def _enter(self) -> None:
        pairs = self._begin()
        await pairs.__aenter__()
        self._pairs = pairs

    async def __aenter__(self) -> PairStream:
        if self._pairs is not None:
            raise RuntimeError("a stream can be used only once")
        await self._portal.call(self._enter)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ready.clear()
        await self._portal.close(self._pairs.__aexit__, exc_type, exc, traceback)

    async def _fetch(self) -> None:
        # Into what the stream keeps: cancelled, nothing is lost.
        size = 0
        async for key, value in self._pairs:
            self._ready.append((key, value))
            size += len(key) + len(value)
            if len(self._ready) >= AHEAD_ITEMS or size >= AHEAD_BYTES:
                return

    def __aiter__(self) -> PairStream:
        return self

    async def __anext__(self) -> tuple[bytes, bytes]:
        if self._pairs is None:
            raise RuntimeError("enter the stream first: async with db.stream() as pairs")
        if not self._ready:
            await self._portal.call(self._fetch)
            if not self._ready:
                raise StopAsyncIteration
        return self._ready.popleft()
