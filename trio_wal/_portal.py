"""Trio in a thread of its own, for the tasks of an asyncio event loop.

Law: knows no log and no database.  What was opened is touched in trio's thread only: whatever an
asyncio task wants of it is a `Call`, which a task of trio, a `_Hand`, makes for it.  Nothing here
waits with a lock held; what both threads touch is said below.

The way there and back is one wake-up for all the calls of a turn of the event loop, and one for
all the answers of a turn of trio: so the appends of many tasks become one batch, as under trio.
One callback of the event loop then wakes all of their tasks.

Cancelled: the call is cancelled in trio's thread, and the task sleeps until its end, so that it
means there and here the same.  A call that ended otherwise gives what it came to, and the
cancellation is delivered where the task waits next (`_cancel_again`).

A loop that was closed, or a program that ends, without leaving the block: the log is closed all
the same, as at the end of a block.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast, final

import outcome
import trio
from trio.lowlevel import Abort, RaiseCancelT, Task, current_task, reschedule

from ._events import tell
from ._park import WOKEN, park, request
from ._system.files import OsFiles
from ._worker import no_thread_is_oserror

P = ParamSpec("P")
T = TypeVar("T")

LOOK_SECONDS: Final = 1.0
"""How often it is looked whether the event loop is still there; nothing tells of its end."""
EXIT_SECONDS: Final = 10.0
"""For a log that the program has left open, at the end of the program: a disk that hangs must not
keep it for ever.  What was acknowledged is durable before."""


@final
class Call(Awaitable[T], Generic[T]):
    """Something that an asyncio task wants done in trio's thread, and waits for.

    To asyncio it is a Future-like object (`asyncio.isfuture`) that one task waits for, and no
    `asyncio.Future`: so all tasks of a turn are woken by one callback of the event loop, and
    whoever cancels the task calls `cancel` here, while the task sleeps on.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_cancelled",
        "_context",
        "_portal",
        "_shielded",
        "_wake",
        "arguments",
        "ended",
        "error",
        "function",
        "hand",
        "last",
        "line",
        "value",
        "withdrawn",
    )

    def __init__(
        self,
        portal: Portal,
        function: Callable[..., Awaitable[T]],
        arguments: tuple[object, ...],
        line: Line | None = None,
        last: bool = False,
        shielded: bool = False,
    ) -> None:
        """
        Args:
          line: whose task is to make the call; None: any.
          last: of its line.
          shielded: it goes on where the task that waits is cancelled.
        """
        self._portal = portal
        self.function: Final = function
        self.arguments: Final = arguments
        self._shielded = shielded
        self.line: Final = line
        self.last: Final = last
        # -- of asyncio's thread only
        self._asyncio_future_blocking = True
        self._wake: Callable[[Call[T]], object] | None = None
        self._context: contextvars.Context | None = None
        """In which the task wants that called."""
        self._cancelled: tuple[object, ...] | None = None
        """Arguments of the newest `asyncio.CancelledError` that the task was to get."""
        # -- written in trio's thread, once, before the answer is sent; read after it came
        self.ended: bool = False
        self.value: T
        self.error: BaseException | None = None
        # -- of trio's thread only
        self.hand: _Hand | None = None
        """Who makes the call."""
        self.withdrawn: bool = False
        """It is to be cancelled."""

    # -- asyncio's thread: what a task asks of a Future-like object ----------------------

    def __await__(self) -> Generator[Any, Any, T]:
        try:
            yield self
        except BaseException:
            # Nobody waits any more: the loop was closed.
            self._portal.withdraw(self)
            raise
        error, self.error = self.error, None
        if self._cancelled is not None:
            if isinstance(error, trio.Cancelled):
                raise asyncio.CancelledError(*self._cancelled)
            _cancel_again(self._portal.loop, self._cancelled)
        if error is not None:
            try:
                raise error
            finally:
                # Its traceback knows this frame.
                del error
        return self.value

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._portal.loop

    def add_done_callback(
        self, wake: Callable[[Call[T]], object], *, context: contextvars.Context
    ) -> None:
        self._wake = wake
        self._context = context

    def result(self) -> None:
        """It is `__await__` that knows."""

    def cancel(self, msg: object = None) -> bool:
        """Of the task that waits.  What it means is decided in trio's thread, and told with the
        answer."""
        if self._cancelled is None and not self._shielded:
            self._portal.withdraw(self)
        self._cancelled = () if msg is None else (msg,)
        return True

    def wake(self) -> None:
        """Have the task that waits run until it waits again."""
        wake, self._wake = self._wake, None
        if wake is not None:
            assert self._context is not None
            self._context.run(wake, self)

    # -- trio's thread -------------------------------------------------------------------

    async def make(self) -> None:
        """Nothing but trio's cancellation comes out."""
        try:
            self.value = await self.function(*self.arguments)
        except BaseException as exc:  # noqa: ASYNC103  (or the caller raises it)
            self.fail(exc)
            if isinstance(exc, trio.Cancelled):
                raise
        finally:
            self.ended = True

    def fail(self, error: BaseException) -> None:
        cut = isinstance(error, trio.Cancelled) and not self.withdrawn
        self.error = _closed() if cut else error


@final
class Line:
    """Calls that one task of trio makes, one after the other: it is that task's transaction."""

    def __init__(self, portal: Portal) -> None:
        self._portal = portal
        self._busy = False
        # -- of trio's thread only
        self.hand: _Hand | None = None
        self.waiting: list[Call[Any]] = []
        """The last call, where it came while another one was being made."""
        self._begun = False
        """Whether a call has come to something."""
        self._ended = False
        """Whether it has had its last call, after others."""

    async def call(self, function: Callable[P, Awaitable[T]], *args: P.args, **_: P.kwargs) -> T:
        """
        Raises:
          trio.BusyResourceError: a call of the line is being made.
        """
        if self._busy:
            raise trio.BusyResourceError("another task is using this transaction")
        self._busy = True
        try:
            return await self._portal.begin(function, args, self)
        finally:
            self._busy = False

    async def call_sync(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.call(_run_sync, partial(function, *args, **kwargs))

    async def close(self, function: Callable[P, Awaitable[T]], *args: P.args, **_: P.kwargs) -> T:
        """The last call, behind one that is being made."""
        return await self._portal.begin(function, args, self, last=True)

    def is_over(self, call: Call[Any]) -> bool:
        """After a call, in trio's thread: whether its task is free for others.

        A line whose first call came to nothing is over, and may begin once more; what is called
        after the last call is on its own.
        """
        self._begun = self._begun or call.error is None
        self._ended = self._ended or (call.last and self._begun)
        return self._ended or not self._begun


async def _run_sync(function: Callable[..., T], *args: object) -> T:  # noqa: ASYNC124
    return function(*args)


@final
class _Hand:
    """A task of trio that makes calls.  All of it is of trio's thread only."""

    def __init__(self, portal: Portal) -> None:
        self._portal = portal
        self._request = request(self._abort)
        self._resting: Task | None = None
        """The task, while it has nothing to do."""
        self.call: Call[Any] | None = None
        self._scope = trio.CancelScope()
        """Around the calls; a new one only after it was cancelled."""
        self._cancelled = False

    def give(self, call: Call[Any]) -> None:
        call.hand = self
        if self.call is not None:
            assert call.line is not None
            call.line.waiting.append(call)
            return
        self.call = call
        task = self._resting
        if task is not None:
            self._resting = None
            reschedule(task, WOKEN)

    def cancel(self) -> None:
        """The call that is being made."""
        self._cancelled = True
        self._scope.cancel()

    async def run(self) -> None:
        task = current_task()
        while True:
            with self._scope:
                while not self._cancelled:
                    call = self.call
                    if call is None:
                        self._resting = task
                        await park(self._request)
                        continue
                    if call.withdrawn:
                        # While it waited behind another one.
                        self.cancel()
                    # As `Call.make`, without a coroutine for each.
                    try:
                        call.value = await call.function(*call.arguments)
                    except BaseException as exc:  # noqa: ASYNC103  (or the caller raises it)
                        call.fail(exc)
                        if isinstance(exc, trio.Cancelled):
                            raise
                    finally:
                        self._finish(call)
            self._scope, self._cancelled = trio.CancelScope(), False

    def _abort(self, _: RaiseCancelT) -> Abort:
        self._resting = None
        return Abort.SUCCEEDED

    def _finish(self, call: Call[Any]) -> None:
        call.ended = True
        self.call = call.hand = None
        self._portal.answer(call)
        line = call.line
        if line is None:
            self._portal.take_back(self)
            return
        over = line.is_over(call)
        if line.waiting:
            self.give(line.waiting.pop())
        elif over:
            line.hand = None
            self._portal.take_back(self)


@final
class Portal:
    """What was opened in a thread of trio's own, and the way there.

    Made in asyncio's thread; `call`, `open` and `leave` are for tasks of its event loop.
    """

    def __init__(self, manager: AbstractAsyncContextManager[Any], name: str) -> None:
        """
        Args:
          manager: opens what the portal is for.
          name: of the call that users know, for messages.
        """
        self._manager = manager
        self._name = name
        self.loop: Final = running_loop(name)
        # -- of asyncio's thread only
        self._token: trio.lowlevel.TrioToken | None = None
        """None until trio runs."""
        self._outbox: list[Call[Any]] = []
        self._withdrawn: list[Call[Any]] = []
        self._sending = False
        self._unanswered: set[Call[Any]] = set()
        self._answered: deque[Call[Any]] = deque()
        """Those whose tasks are still to be woken."""
        self._ended = False
        self._forked = False
        self._thread: threading.Thread | None = None
        self._over: asyncio.Future[None] | None = None
        # -- of trio's thread only
        self._answers: list[Call[Any]] = []
        self._idle: list[_Hand] = []
        self._nursery: trio.Nursery | None = None
        self._porter: Task | None = None
        self._leaving = trio.Event()
        self._finished = False
        """Nothing is taken any more."""
        self._error: BaseException | None = None
        """With which the block is left."""
        self._entering = trio.CancelScope()
        self._opening: Call[Any]
        self._closing: Call[None] | None = None

    # -- asyncio's thread: calls -----------------------------------------------------

    def call(
        self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Call[T]:
        """What an async function of trio's returns or raises, called in trio's thread; to be
        awaited at once.

        Raises:
          trio.ClosedResourceError: it is closed there, or this is a forked child.
          RuntimeError: called from elsewhere than the event loop.
        """
        return self.begin(partial(function, **kwargs) if kwargs else function, args)

    def call_sync(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Call[T]:
        """The same for a sync function."""
        called = partial(function, **kwargs) if kwargs else function
        return self.begin(_run_sync, (called, *args))

    async def close(self, function: Callable[..., Awaitable[object]], *args: object) -> None:
        """A call that leaves a block: not cut short, and nothing to do where all is closed."""
        if not (self._forked or self._ended):
            await self.begin(function, args, shielded=True)

    def begin(
        self,
        function: Callable[..., Awaitable[T]],
        args: tuple[object, ...],
        line: Line | None = None,
        *,
        last: bool = False,
        shielded: bool = False,
    ) -> Call[T]:
        """As `call`; the arguments are those of `Call`."""
        # The fast path of the check.
        try:
            usable = asyncio.get_running_loop() is self.loop and not (self._ended or self._forked)
        except RuntimeError:
            usable = False
        if not usable:
            self._check_usable()
        call = Call(self, function, args, line, last, shielded)
        if not self._sending:
            self._send_soon()
        self._unanswered.add(call)
        self._outbox.append(call)
        return call

    def line(self) -> Line:
        return Line(self)

    def _check_usable(self) -> None:
        if self._forked:
            raise trio.ClosedResourceError(
                "a log or database that the parent process opened cannot be used in a forked child"
            )
        if running_loop(self._name) is not self.loop:
            raise RuntimeError(
                f"this was opened by another event loop: use it there, or {self._name}() here"
            )
        if self._ended:
            raise trio.ClosedResourceError("it is closed: its block was left")

    def withdraw(self, call: Call[Any]) -> None:
        """Have a call cancelled in trio's thread."""
        if call in self._unanswered and not self.loop.is_closed():
            if not self._sending:
                self._send_soon()
            self._withdrawn.append(call)

    def _send_soon(self) -> None:
        # In this order: where there is no memory for it, the next call tries again.
        self.loop.call_soon(self._send)
        self._sending = True

    def _send(self) -> None:
        """All that has come together in this turn."""
        if self._token is None:
            return
        self._sending = False
        calls, self._outbox = self._outbox, []
        withdrawn, self._withdrawn = self._withdrawn, []
        try:
            self._token.run_sync_soon(self._take, calls, withdrawn)
        except trio.RunFinishedError:
            # `_end` is on its way, and tells them.
            return

    def _deliver(self, calls: list[Call[Any]]) -> None:
        self._answered.extend(calls)
        self._unanswered.difference_update(calls)
        self._wake_all()

    def _wake_all(self) -> None:
        answered = self._answered
        if len(answered) > 1:
            # For the others, where a task that is woken ends the loop's run, or runs it itself.
            self.loop.call_soon(self._wake_all)
        while answered:
            answered.popleft().wake()

    # -- asyncio's thread: beginning and end ------------------------------------------

    async def open(self) -> Any:
        """Start the thread; what the manager gives.  Cancelled, nothing stays.

        Raises:
          OSError: no thread can be started.
        """
        OsFiles().on_fork(self._disown)
        self._over = self.loop.create_future()
        opening = self._opening = Call(self, self._manager.__aenter__, ())
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        with no_thread_is_oserror():
            self._thread.start()
        # A daemon, because a loop that is gone can end no thread; this ends it in time.
        atexit.register(self._exit)
        try:
            self._unanswered.add(opening)
            return await opening
        except BaseException:
            await self._join()
            raise

    async def leave(self, exc: BaseException | None) -> None:
        """Leave the manager's block; the thread ends.  Neither is cut short by cancellation."""
        if self._forked or self._ended:
            return
        closing = self._closing = Call(self, _nothing, (), shielded=True)
        self._unanswered.add(closing)
        self._error = exc
        try:
            with suppress(trio.RunFinishedError):
                assert self._token is not None
                self._token.run_sync_soon(self._leaving.set)
            await closing
        finally:
            await self._join()

    async def _join(self) -> None:
        assert self._over is not None
        assert self._thread is not None
        cancelled: asyncio.CancelledError | None = None
        while not self._over.done():
            try:
                await asyncio.shield(self._over)
            except asyncio.CancelledError as exc:  # noqa: ASYNC103  (raised below)
                cancelled = exc
        # Trio's run has ended: this takes no time.
        self._thread.join()
        if cancelled is not None:
            _cancel_again(self.loop, cancelled.args)

    def _started(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token
        self._send()

    def _end(self) -> None:
        """Trio's run has ended: who still waits is told."""
        self._ended = True
        atexit.unregister(self._exit)
        for call in self._unanswered:
            if not call.ended:
                call.error = _closed()
        # Before a task is woken: it may raise.
        if self._over is not None and not self._over.done():
            self._over.set_result(None)
        self._deliver(list(self._unanswered))

    def _exit(self) -> None:
        """The program ends, and nobody has left the block."""
        if self._forked or self._thread is None:
            return
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._leaving.set)
        self._thread.join(EXIT_SECONDS)
        if self._thread.is_alive():
            text = f"still open after {EXIT_SECONDS:g} s, when the program ended"
            tell(logging.WARNING, "failed", self._name, text)

    def _disown(self) -> None:
        """In a forked child: the thread is the parent's."""
        self._forked = True
        atexit.unregister(self._exit)

    # -- trio's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as exc:  # noqa: BLE001, ASYNC103  (nobody else is told)
            if not self._opening.ended:
                self._opening.error, self._opening.ended = exc, True
            tell(logging.ERROR, "failed", self._name, f"trio's thread has failed: {exc!r}")
        # RuntimeError: the loop is closed.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._end)

    async def _main(self) -> None:
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._started, trio.lowlevel.current_trio_token())
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._carry)
            nursery.start_soon(self._watch_loop)
            await self._keep_open()
            self._finished = True
            nursery.cancel_scope.cancel()

    async def _keep_open(self) -> None:
        """The block around all calls, in one task: what is opened may have a nursery."""
        opening = self._opening
        with self._entering:
            try:
                await opening.make()
            finally:
                self.answer(opening)
            if opening.error is not None:
                return
            with trio.CancelScope(shield=True):
                await self._leaving.wait()
            exc = self._error
            leave = self._manager.__aexit__
            result = await outcome.acapture(leave, *_parts(exc))
            error = result.error if isinstance(result, outcome.Error) else None
            closing = self._closing
            if closing is not None:
                closing.value, closing.error, closing.ended = None, error, True
                self.answer(closing)
            elif error is not None:
                text = f"closed, because its event loop has ended, with {error!r}"
                tell(logging.ERROR, "failed", self._name, text)

    async def _watch_loop(self) -> None:
        while True:
            if self.loop.is_closed():
                self._leaving.set()
                return
            await trio.sleep(LOOK_SECONDS)

    async def _carry(self) -> None:
        """Send the answers that have come together in a turn."""
        wait = request(self._abort)
        while True:
            if not self._answers:
                self._porter = current_task()
                await park(wait)
            answers, self._answers = self._answers, []
            try:
                self.loop.call_soon_threadsafe(self._deliver, answers)
            except RuntimeError:
                self._leaving.set()
            # Nothing that they hold is kept until the next turn.
            del answers

    def _abort(self, _: RaiseCancelT) -> Abort:
        self._porter = None
        return Abort.SUCCEEDED

    def answer(self, call: Call[Any]) -> None:
        self._answers.append(call)
        if self._porter is not None:
            porter, self._porter = self._porter, None
            reschedule(porter, WOKEN)

    def take_back(self, hand: _Hand) -> None:
        self._idle.append(hand)

    def _take(self, calls: list[Call[Any]], withdrawn: list[Call[Any]]) -> None:
        if self._finished:
            # `_end` tells them.
            return
        idle = self._idle
        for call in calls:
            hand = idle.pop() if idle and call.line is None else self._hand_for(call)
            hand.give(call)
        for call in withdrawn:
            call.withdrawn = True
            if call is self._opening:
                if not call.ended:
                    self._entering.cancel()
            elif call.hand is not None and call.hand.call is call:
                call.hand.cancel()

    def _hand_for(self, call: Call[Any]) -> _Hand:
        line = call.line
        if line is not None and line.hand is not None:
            return line.hand
        if self._idle:
            hand = self._idle.pop()
        else:
            hand = _Hand(self)
            assert self._nursery is not None
            self._nursery.start_soon(hand.run)
        if line is not None:
            line.hand = hand
        return hand


async def _nothing() -> None: ...


def _closed() -> trio.ClosedResourceError:
    return trio.ClosedResourceError("it was closed while this was waiting")


def _parts(
    exc: BaseException | None,
) -> tuple[type[BaseException] | None, BaseException | None, TracebackType | None]:
    return (None, None, None) if exc is None else (type(exc), exc, exc.__traceback__)


def running_loop(name: str) -> asyncio.AbstractEventLoop:
    """Of asyncio; `RuntimeError`, with what to do, where there is none: under trio, say."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        other = name.replace("trio_wal.asyncio.", "trio_wal.")
        raise RuntimeError(
            f"{name}() needs asyncio: run it under asyncio.run(); under trio it is {other}()"
        ) from None


def _cancel_again(loop: asyncio.AbstractEventLoop, arguments: tuple[object, ...]) -> None:
    """What the current task was asked came too late: it is asked again where it waits next.

    Not where it has ended by then, nor where who asked has taken that back, as a time-out does
    at the end of its block.  (Before Python 3.11 a task does not know that.)
    """
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    requests = getattr(task, "cancelling", None)
    asked = 0 if requests is None else requests()

    def again() -> None:
        if task.done() or (requests is not None and requests() < max(asked, 1)):
            return
        if requests is not None:
            # It is no request more.
            task.uncancel()  # type: ignore[attr-defined,unused-ignore]
        task.cancel(*arguments)

    loop.call_soon(again)
