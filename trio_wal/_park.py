"""Parking and waking tasks, some hundred thousand a second.

Law: nothing here decides who waits or who is woken.  `park` and ``reschedule(task, WOKEN)``
are `trio.lowlevel.wait_task_rescheduled` and `trio.lowlevel.reschedule`, without the two
objects that each such pair makes anew: the message that asks trio to put the task to sleep,
and the `outcome.Value` that it is woken with.  Both are attrs classes, and making and
checking them is two fifths of what a park and a wake cost (1.5 of 3.6 us, CPython 3.11, trio
0.35).

Both are used again here.  A wake-up carries no value, so one outcome serves for all.  The
message is frozen and says only whom to ask when the task is cancelled: whoever parks often
keeps his.  Of a trio whose message says more than that, `wait_task_rescheduled` itself is
used.

A `Latch` and a `Bell` are for waits of other kinds: to the end whatever happens, and until a
thread has something to say.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar, cast, final

import attrs
import outcome
import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    Task,
    current_task,
    reschedule,
    wait_task_rescheduled,
)

from ._engine import Forked

T = TypeVar("T")
AbortFn = Callable[[RaiseCancelT], Abort]


@final
class _Woken(outcome.Outcome[None]):
    """``outcome.Value(None)`` that may be unwrapped any number of times."""

    def unwrap(self) -> None:
        return None

    def send(self, gen: Generator[T, None, object]) -> T:
        return gen.send(None)

    async def asend(self, agen: AsyncGenerator[T, None]) -> T:
        return await agen.asend(None)


WOKEN: Final = _Woken()
"""For `trio.lowlevel.reschedule`."""


def _message(abort: AbortFn) -> Any:
    """What `wait_task_rescheduled` hands to trio for this abort function."""
    coroutine: Any = wait_task_rescheduled(abort)  # noqa: ASYNC105  (it is never to be run)
    try:
        return coroutine.send(None)
    finally:
        coroutine.close()


def _is_reusable(message: Any) -> bool:
    kind = cast("type[object]", type(message))
    if not attrs.has(kind) or [field.name for field in attrs.fields(kind)] != ["abort_func"]:
        return False
    try:
        message.abort_func = message.abort_func
    except attrs.exceptions.FrozenInstanceError:
        return True
    return False


@types.coroutine
def _park(request: Any) -> Generator[Any, Any, None]:
    (yield request).unwrap()


def _never(_: RaiseCancelT) -> Abort:
    return Abort.FAILED


REUSES: Final = _is_reusable(_message(_never))
"""Whether this trio's messages can be used again."""

park: Final[Callable[[Any], Awaitable[object]]] = _park if REUSES else wait_task_rescheduled
"""``await park(request(abort))`` is ``await wait_task_rescheduled(abort)``."""


def request(abort: AbortFn) -> Any:
    """What `park` takes; may be kept, and used whenever it is not in use."""
    return _message(abort) if REUSES else abort


def is_parked(task: Task) -> bool:
    """Whether a task that is not the running one waits to be woken; False: it is about to run.

    For forked children, and for a client whose event loop has failed: nothing else here asks it.
    """
    return getattr(task, "_next_send_fn", True) is None


def free_token(token: trio.lowlevel.TrioToken) -> None:
    """In a forked child: a thread of the parent's may just have been speaking to trio, and holds
    for ever a lock that `TrioToken.run_sync_soon` takes."""
    lock = getattr(getattr(token, "_reentry_queue", None), "lock", None)
    renew = getattr(lock, "_at_fork_reinit", None)
    if lock is None or renew is None:
        return
    if lock.acquire(blocking=False):
        lock.release()
    else:
        renew()


FORKED_TURNS: Final = 100
"""Of the event loop of a forked child; what wakes it may be taken away by the parent's."""


async def end_forked(nursery: trio.Nursery, error: Callable[[], BaseException]) -> None:
    """In a forked child nobody will ever wake the tasks of ``nursery``, so that they must not be
    waited for; and to cancel them would have trio change the epoll instance that it shares with
    the parent.  So each is woken with an error where it stands."""
    # First what threads have said before the fork: a task must not be woken twice.
    heard = trio.Event()
    token = trio.lowlevel.current_trio_token()
    free_token(token)
    token.run_sync_soon(heard.set)
    for _ in range(FORKED_TURNS):
        if heard.is_set():
            break
        await trio.lowlevel.cancel_shielded_checkpoint()
    while nursery.child_tasks:
        for task in nursery.child_tasks:
            # Else it is about to run, and will stand somewhere else.
            if is_parked(task):
                reschedule(task, outcome.Error(error()))
        await trio.lowlevel.cancel_shielded_checkpoint()


ASYNCIO_HAS: Final = frozenset({"open_wal", "open_database", "open_reader", "open_database_reader"})
"""What there is in `trio_wal.asyncio`, too."""


def require_trio(caller: str) -> None:
    """Raises `RuntimeError`, with what to do, where trio does not run: under asyncio, say."""
    try:
        current_task()
    except RuntimeError:
        raise no_trio(caller) from None


def no_trio(caller: str) -> RuntimeError:
    """For a call that is made where trio does not run.

    Args:
      caller: a function of the package; a method, where a dot is in it.
    """
    method = caller.partition(".")[2]
    name = f"{method}()" if method else f"trio_wal.{caller}()"
    if not _asyncio_runs():
        text = "run it under trio.run(); from a thread of trio's, by trio.from_thread.run()"
    elif caller in ASYNCIO_HAS:
        text = f"use trio_wal.asyncio.{caller}()"
    elif method:
        text = "open it with trio_wal.asyncio, which has the same methods"
    else:
        text = "run it by trio.run() in a thread of its own"
    where = ", and this is asyncio" if _asyncio_runs() else ""
    return RuntimeError(f"{name} needs trio{where}: {text}")


def _asyncio_runs() -> bool:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Latch:
    """An event that is waited for to the end: neither cancellation nor Ctrl-C cuts in."""

    def __init__(self) -> None:
        self._set = False
        self._tasks: list[Task] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            reschedule(task)

    async def wait(self) -> None:
        if self._set:
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            self._tasks.append(current_task())
            await wait_task_rescheduled(_never)


# -- woken by a thread --------------------------------------------------------------------


class Bell(Protocol):
    """How a thread wakes the task that waits for it."""

    def ring(self) -> None: ...

    async def wait(self) -> None:
        """`trio.ClosedResourceError` where it is closed, or will be."""
        ...

    def close(self) -> None: ...

    def disown(self) -> None: ...


class _TokenBell:
    """Through trio's own wake-up, on every platform."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._rung = trio.Event()
        self._closed = False
        self._disowned = False

    def ring(self) -> None:
        self._token.run_sync_soon(self._rung.set)

    async def wait(self) -> None:
        if not self._disowned:
            await self._rung.wait()
        if self._disowned:
            raise Forked
        if self._closed:
            raise trio.ClosedResourceError
        self._rung = trio.Event()

    def close(self) -> None:
        self._closed = True
        self._rung.set()

    def disown(self) -> None:
        self._disowned = True


if sys.platform == "linux":

    class _EventFdBell:
        """Through an eventfd (eventfd(2)): half the price of the above."""

        def __init__(self) -> None:
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._disowned = False

        def ring(self) -> None:
            os.eventfd_write(self._fd, 1)

        async def wait(self) -> None:
            if self._fd >= 0:
                try:
                    await trio.lowlevel.wait_readable(self._fd)
                except trio.ClosedResourceError:
                    if not self._disowned:
                        raise
            if self._fd < 0:
                raise Forked if self._disowned else trio.ClosedResourceError
            os.eventfd_read(self._fd)

        def close(self) -> None:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                # Who still waits is told: the thread has died, of MemoryError for one.
                trio.lowlevel.notify_closing(fd)
                os.close(fd)

        def disown(self) -> None:
            self._disowned = True
            fd, self._fd = self._fd, -1
            if fd >= 0:
                # Closed first: then trio forgets who waits, whom the parent's thread would wake
                # once more, and cannot take it out of the epoll instance, which is shared with
                # the parent.
                os.close(fd)
                # RuntimeError: forked by another thread than trio's, which is not in the child.
                with suppress(RuntimeError):
                    trio.lowlevel.notify_closing(fd)

    def new_bell() -> Bell:
        return _EventFdBell()

else:

    def new_bell() -> Bell:
        return _TokenBell()
