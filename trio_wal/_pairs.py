"""A scan for large ranges, which gives other tasks their turn.

Law: somebody's scan, and a clock; knows nothing of what is scanned.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from time import perf_counter
from types import TracebackType
from typing import Final, NoReturn, final

import trio
from trio.lowlevel import enable_ki_protection

from ._exports import NoPublicConstructor, constructor, publish
from ._park import require_trio

TURN_SECONDS: Final = 0.0005
"""For so long pairs are given out without a checkpoint.  Half of what is promised: the clock is
looked at before a pair is fetched, which may be a large one."""


@final
class PairStream(
    AbstractAsyncContextManager["PairStream"],
    AsyncIterator[tuple[bytes, bytes]],
    metaclass=NoPublicConstructor,
):
    """Keys and values of a snapshot, in order; what `Database.stream` and `Snapshot.stream`
    return.

    Enter it with ``async with`` and iterate with ``async for``, in one task.  Entering is a
    checkpoint, and iterating is one at least once per millisecond.  A cancellation loses nothing:
    the next call gives the next pair.
    """

    def __init__(
        self, scan: Callable[[], Iterator[tuple[bytes, bytes]]], let_go: Callable[[], None]
    ) -> None:
        """
        Args:
          scan: called once, when the stream is entered.
          let_go: called when it is left, also where ``scan`` has failed.
        """
        self._scan = scan
        self._let_go = let_go
        self._pairs: Iterator[tuple[bytes, bytes]] | None = None
        self._closed = False
        self._due = 0.0

    @enable_ki_protection
    async def __aenter__(self) -> PairStream:
        if self._pairs is not None or self._closed:
            raise RuntimeError("a stream of pairs can be used only once")
        require_trio("db.stream")
        await trio.lowlevel.checkpoint()
        try:
            self._pairs = self._scan()
        except BaseException:
            self._close()
            raise
        self._due = perf_counter() + TURN_SECONDS
        return self

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._let_go()

    def __aiter__(self) -> PairStream:
        return self

    async def __anext__(self) -> tuple[bytes, bytes]:
        pairs = self._pairs
        if pairs is None or self._closed:
            self._refuse()
        if perf_counter() >= self._due:
            await trio.lowlevel.checkpoint()
            self._due = perf_counter() + TURN_SECONDS
        pair = next(pairs, None)
        if pair is None:
            await trio.lowlevel.checkpoint()
            raise StopAsyncIteration
        return pair

    def _refuse(self) -> NoReturn:
        if self._closed:
            raise trio.ClosedResourceError("this stream of pairs is closed")
        raise RuntimeError("enter the stream first: async with db.stream() as pairs")


new_pair_stream = constructor(PairStream)


publish(PairStream)
