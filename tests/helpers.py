"""What the tests of the log share: calls in tasks of their own, and a cut at the k-th step."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, final

import trio

import trio_wal
from trio_wal.testing import MemoryFiles

LOG = "/log"
"""Where a log stands in `MemoryFiles`."""
SMALL_SEGMENT = 16 * 1024
"""A segment that is full after some twenty short batches."""


def open_memory(files: MemoryFiles, **options: Any) -> AbstractAsyncContextManager[Any]:
    return trio_wal.open_wal(LOG, files=files, **options)


class Disk:
    """Where a test keeps its log: in memory, or in a real directory."""

    def __init__(self, path: Path | None) -> None:
        self.real = path is not None
        self.path = LOG if path is None else str(path / "log")
        self.files = MemoryFiles() if path is None else None

    def sizes(self) -> dict[str, int]:
        """The files of the log and how long they are."""
        if self.files is not None:
            return {name: len(data) for name, data in self.files.contents(LOG).items()}
        return {path.name: path.stat().st_size for path in Path(self.path).iterdir()}

    def open(self, **options: Any) -> AbstractAsyncContextManager[Any]:
        return trio_wal.open_wal(self.path, files=self.files, **options)


@asynccontextmanager
async def open_tasks(files: MemoryFiles) -> AsyncIterator[trio.Nursery]:
    """A nursery for a test that stalls the disk: a test that fails must not wait for it."""
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException:
            files.release()
            raise


class Call:
    """An async call in a task of its own, and what has become of it."""

    def __init__(
        self, nursery: trio.Nursery, function: Callable[..., Awaitable[Any]], *args: Any
    ) -> None:
        self.scope = trio.CancelScope()
        self.state = "waiting"
        self.value: Any = None
        self.error: Exception | None = None
        nursery.start_soon(self._run, function, args)

    async def _run(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        with self.scope:
            try:
                self.value = await function(*args)
                self.state = "returned"
            except Exception as exc:  # noqa: BLE001  (the test looks at it)
                self.error = exc
                self.state = "raised"
        if self.state == "waiting":
            self.state = "cancelled"

    def __repr__(self) -> str:
        return f"<Call {self.state} value={self.value!r} error={self.error!r}>"


@final
class AtStep(trio.abc.Instrument):
    """Does something once, after the k-th step that any task makes; 0: at once."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self._left = step
        self._action = action
        self.done = False

    def __enter__(self) -> AtStep:
        trio.lowlevel.add_instrument(self)
        self._look()
        return self

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        self._look()

    def _look(self) -> None:
        if self._left <= 0 and not self.done:
            self.done = True
            self._action()


@final
class AfterEveryStep(trio.abc.Instrument):
    """Checks something after every step that any task makes."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self.error: Exception | None = None
        self.steps = 0

    def __enter__(self) -> AfterEveryStep:
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *_: object) -> None:
        trio.lowlevel.remove_instrument(self)
        # trio only logs what an instrument raises, and drops it.
        if self.error is not None:
            raise self.error

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.error is None:
            try:
                self._check()
            except Exception as exc:  # noqa: BLE001  (raised by __exit__)
                self.error = exc


async def until(condition: Callable[[], bool]) -> None:
    """Let the others run until something holds that a worker thread brings about."""
    for _ in count():
        if condition():
            return
        await trio.lowlevel.checkpoint()


def descriptors(path: Path) -> int:
    """How many this process has of files below a path, and of what has no name, such as watches."""
    if sys.platform != "linux":
        return 0
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            name = os.readlink(f"/proc/self/fd/{number}")
            found += name.startswith((str(path), "anon_inode:"))
    return found


async def read_all(wal: Any, start: int | None = None, stop: int | None = None) -> dict[int, bytes]:
    """Every durable record by its LSN, after a check that the order is theirs."""
    async with wal.read(start, stop) as records:
        found = [(record.lsn, record.data) async for record in records]
    assert found == sorted(found)
    return dict(found)


async def append_until(wal: Any, done: Callable[[], bool], data: bytes = bytes(400)) -> list[int]:
    """Append records, one a batch, until ``done()``; returns their LSNs."""
    lsns = []
    while not done():
        lsns.append(await wal.append(data))
    return lsns
