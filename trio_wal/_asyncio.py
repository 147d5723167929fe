"""An asyncio event loop in a thread of its own, for a client library that needs one.

Law: knows nothing of what runs there.  The loop is made by hand, and not by ``asyncio.run``, which
other libraries in the process may have replaced; the thread is a daemon, so that nothing that hangs
there keeps the process.  In a forked child there is no such thread: nothing is called there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Final, TypeVar, final

import outcome
import trio
from trio.lowlevel import Abort, RaiseCancelT, Task, current_task, reschedule, wait_task_rescheduled

from ._park import free_token, is_parked

T = TypeVar("T")

END_SECONDS: Final = 2.0
"""For tasks to end once they are cancelled; some swallow it, and are cancelled again."""


@final
class AsyncioThread:
    """Runs coroutines of asyncio for tasks of trio."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.SelectorEventLoop()
        self._token = trio.lowlevel.current_trio_token()
        self._callers: set[Task] = set()
        self._forked = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            # What a library has lost sight of, when a task of its own was cancelled.
            for transport in list(getattr(self._loop, "_transports", {}).values()):
                transport.abort()
            self._loop.run_until_complete(asyncio.sleep(0))
        finally:
            self._loop.close()
            # Where the loop itself has failed, somebody may wait for an answer.
            self.tell(self._end_calls)

    async def call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """What a coroutine function returns or raises.

        Cancelled: the task there is cancelled, too, and not waited for.

        Raises:
          trio.ClosedResourceError: the thread has ended, or is the parent process's.
        """
        if self._forked:
            raise _parents()
        task = current_task()
        waiting = True
        running: list[asyncio.Task[T]] = []

        def wake(result: outcome.Outcome[T]) -> None:
            nonlocal waiting
            if waiting:
                waiting = False
                reschedule(task, result)

        def done(finished: asyncio.Task[T]) -> None:
            result: outcome.Outcome[T]
            if finished.cancelled():
                result = outcome.Error(trio.ClosedResourceError("this log is closed"))
            elif (error := finished.exception()) is not None:
                result = outcome.Error(error)
            else:
                result = outcome.Value(finished.result())
            # RunFinishedError: nobody waits any more.
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(wake, result)

        def start() -> None:
            running.append(self._loop.create_task(function(*args)))
            running[0].add_done_callback(done)

        def abort(_: RaiseCancelT) -> Abort:
            nonlocal waiting
            waiting = False
            if not self._forked:
                with suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(lambda: [one.cancel() for one in running])
            return Abort.SUCCEEDED

        try:
            self._loop.call_soon_threadsafe(start)
        except RuntimeError:
            raise trio.ClosedResourceError("this log is closed") from None
        self._callers.add(task)
        try:
            result: T = await wait_task_rescheduled(abort)
        finally:
            self._callers.discard(task)
        return result

    def tell(self, function: Callable[..., object], *args: Any) -> None:
        """From the loop's thread: have trio call a function soon."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(partial(function, *args))

    async def aclose(self) -> None:
        """End whatever runs, and the thread.  Not to be cancelled: call it shielded."""
        if not self._forked and self._thread.is_alive():
            with trio.move_on_after(2 * END_SECONDS), suppress(trio.ClosedResourceError):
                await self.call(self._cancel_all)
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)
            await trio.to_thread.run_sync(self._thread.join, END_SECONDS)

    async def _cancel_all(self) -> None:
        """Again and again: one cancellation can be lost (in `asyncio.wait_for` of Python 3.11)."""
        until = self._loop.time() + END_SECONDS
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.wait(others, timeout=0.05)
            if self._loop.time() > until:
                return

    def disown(self) -> None:
        """In a forked child: the thread, and what it speaks with, is the parent's.  Whoever waits
        for an answer is told so, where the child goes on with the event loop."""
        self._forked = True
        # RuntimeError: it does not.
        with suppress(RuntimeError):
            token = trio.lowlevel.current_trio_token()
            if token is self._token:
                # Behind what the thread has said before the fork: no task may be woken twice.
                free_token(token)
                orphans = list(filter(is_parked, self._callers))
                token.run_sync_soon(self._release, orphans, _parents)

    def _end_calls(self) -> None:
        self._release(list(self._callers), _ended)

    def _release(self, orphans: list[Task], error: Callable[[], Exception]) -> None:
        for task in orphans:
            if task in self._callers and is_parked(task):
                reschedule(task, outcome.Error(error()))


def _ended() -> trio.ClosedResourceError:
    return trio.ClosedResourceError("this log is closed: its client's event loop has ended")


def _parents() -> trio.ClosedResourceError:
    return trio.ClosedResourceError("this log is the parent process's")
