"""Room above the store: who waits until a checkpoint has made some.

Law: one event loop, no I/O.  When one is due is decided by `_mvcc`, and made by `_checkpoint`.
"""

from __future__ import annotations

from typing import final

import trio

from ._exceptions import LogFullError


@final
class Room:
    """Between commits and checkpoints: who wants one, and who waits because they are behind."""

    def __init__(self) -> None:
        self.waiting: int = 0
        """Tasks that wait for room."""
        self.failing: LogFullError | None = None
        """Set while checkpoints have been failing for long: then nobody waits for one."""
        self.stuck: LogFullError | None = None
        """Set while the store cannot grow before those who read have left."""
        self._made = trio.Event()
        self._asked = trio.Event()

    def ask(self) -> None:
        """Somebody wants a checkpoint."""
        self._asked.set()

    async def wait_asked(self) -> None:
        """Until somebody wants a checkpoint; `Versions.checkpoint_due` says whether one still
        is."""
        await self._asked.wait()
        self._asked = trio.Event()

    async def wait(self, *, reading: bool) -> None:
        """Until room was made, or there is news.

        Raises:
          LogFullError: there will be none before the disk is repaired, or readers leave.
        """
        if self.failing is not None:
            raise self.failing.again()
        if self.stuck is not None and reading:
            raise self.stuck.again()
        self.waiting += 1
        try:
            await self._made.wait()
        finally:
            self.waiting -= 1

    def tell(self) -> None:
        """Have those who wait look again."""
        made, self._made = self._made, trio.Event()
        made.set()
