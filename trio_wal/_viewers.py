"""Who reads which state of a database, and what becomes of the commits that it has read.

Law: one event loop, no I/O.  Nothing here knows what a version is, or how it got there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol, final

import trio
from trio.lowlevel import Task

from ._layer import Layer
from ._memtable import View


class Reader(Protocol):
    """Whoever has a view of a moment: what it may need is kept until it is unpinned."""

    task: Task | None
    """Whose transaction it is; None: nobody's."""

    @property
    def view(self) -> View: ...

    def layer_dropped(self, layer: Layer) -> None:
        """A layer has gone into the store, where versions have no numbers any more."""
        ...

    def changed_past(self, keys: Iterable[bytes]) -> None:
        """Its own task has changed keys in another transaction."""
        ...


@final
class CommitDependency:
    """What becomes of a pending commit that a transaction has read."""

    __slots__ = ("_waiters", "key", "lost", "seq", "settled")

    def __init__(self, key: bytes, seq: int) -> None:
        self.key: bytes = key
        """One that was read."""
        self.seq: int = seq
        self.lost: bool = False
        self.settled: bool = False
        self._waiters: list[trio.Event] = []

    async def wait(self) -> None:
        """Until it is settled or lost."""
        event = trio.Event()
        self._waiters.append(event)
        await event.wait()

    def settle(self) -> None:
        self.settled = True
        self._wake()

    def lose(self) -> None:
        self.lost = True
        self._wake()

    def _wake(self) -> None:
        for event in self._waiters:
            event.set()


@final
class Readers:
    """Who has a view, and since when."""

    def __init__(self) -> None:
        self.pins: Final[dict[Reader, int]] = {}
        """In the order in which they came, with the newest settled commit of that moment."""
        self.waited_for: int = 0
        """Tasks that wait until all have left."""
        self._gone: Final = trio.lowlevel.ParkingLot()

    def unpin(self, reader: Reader) -> None:
        """It reads no more; nothing where it was let go of before."""
        if self.pins.pop(reader, None) is None:
            return
        reader.view.base.unpin()
        if self.waited_for and not self.pins:
            self._gone.unpark_all()

    def of(self, task: Task) -> Reader | None:
        """The transaction whose block a task is most likely in: the newest that reads, if it
        is this task's.  Good enough for a hint, and cheap."""
        try:
            newest = next(reversed(self.pins), None)
        except RuntimeError:
            # The garbage collector has ended a scan in between.
            return None
        return newest if newest is not None and newest.task is task else None

    def oldest(self) -> int | None:
        """The newest commit that was settled when the one came who has been reading for
        longest; None: nobody reads."""
        # No `next`: before that is called the garbage collector may end a scan.
        for settled_seq in self.pins.values():
            return settled_seq
        return None

    async def wait_unread(self) -> None:
        """Until nobody has a view."""
        self.waited_for += 1
        try:
            while self.pins:
                await self._gone.park()
        finally:
            self.waited_for -= 1

    def let_go(self) -> None:
        """None of them reads any more, whether they know it or not."""
        for reader in list(self.pins):
            self.unpin(reader)
