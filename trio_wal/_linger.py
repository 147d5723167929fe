"""The flusher's wait for the batch that is next to grow.

Law: one task waits here, the flusher, and only for time or for entries; what it does with the
batch is its own affair.  Whoever changes what the wait is for asks whether it is over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final, final

import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

from ._admission import Admission, Line
from ._backlog import Backlog
from ._state import State, Status


@final
class Linger:
    """The wait of one log's flusher."""

    def __init__(
        self,
        status: Status,
        backlog: Backlog,
        admission: Admission,
        changed: Callable[[], None],
    ) -> None:
        """
        Args:
          changed: is called when a wait begins and when it ends.
        """
        self._status: Final = status
        self._backlog: Final = backlog
        self._admission: Final = admission
        self._changed: Final = changed
        self.task: Task | None = None
        """While it waits."""
        self.siblings: float | None = None
        """While it waits for more entries: with so many there is nobody else to be expected."""
        self._awaited: float = math.inf
        """With so many records somebody waits for the filling batch."""

    def ripe(self) -> bool:
        """Whether somebody waits for the filling batch, or it cannot grow any more."""
        batch = self._backlog.filling
        if self.siblings is not None:
            waited_for = len(batch.entries) >= self.siblings or batch.barrier is not None
        else:
            waited_for = len(batch.entries) > batch.unwaited or batch.records >= self._awaited
        return (
            waited_for
            or self._status.state is State.CLOSING
            or bool(self._admission.blocked)
            or self._backlog.sealed
            or batch.bytes >= self._admission.max_batch_bytes
            or not self._admission.fits(b"", batch)
        )

    async def unwaited(self, seconds: float, awaited: float = math.inf) -> None:
        """Let the batch that is next, and that nobody waits for, grow for a while, or until it
        has so many records that somebody's wait for an LSN ends with it."""
        self._awaited = awaited
        if not self.ripe():
            with trio.move_on_at(self._backlog.filling.opened + seconds):
                await self._wait()

    async def for_siblings(self, seconds: float, siblings: float) -> None:
        """Let the batch that is next, and that somebody waits for, grow for a while, or until it
        has so many entries.  Not where it holds a barrier, or is full, or something of high
        priority is in it, or somebody waits for room."""
        batch = self._backlog.filling
        lines: Iterable[Line] = batch.shares or ()
        if len(batch.entries) == batch.unwaited or any(line.high for line in lines):
            return
        self.siblings = siblings
        if not self.ripe():
            with trio.move_on_after(seconds):
                await self._wait()
        self.siblings = None
        self._changed()

    async def _wait(self) -> None:
        self.task = current_task()
        self._changed()
        await wait_task_rescheduled(self._abort)

    def _abort(self, _raise_cancel: object) -> Abort:
        self.task = None
        self._changed()
        return Abort.SUCCEEDED

    def expect(self, records: float) -> None:
        """Somebody waits until the batch that is filling has so many records."""
        if self.task is not None:
            self._awaited = min(self._awaited, records)
            if self.ripe():
                self.wake()

    def wake(self) -> None:
        """The wait is over."""
        if self.task is not None:
            task, self.task = self.task, None
            reschedule(task)
            self._changed()
