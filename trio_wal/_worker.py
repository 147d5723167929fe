"""Where blocking calls run: one long-lived thread for the log's writes, short ones for the rest.

Law: the only place that starts threads.  A thread's work is never abandoned on
cancellation: a write that goes on after its caller has left would be a write that
nobody answers for.

A thread hop per batch (`trio.to_thread.run_sync`) costs more than the sync it is for.
So one worker is started through it, once, under a limiter of its own: the nursery
owns the thread, and an application that uses up trio's default limiter cannot starve
the log.  Jobs reach it through a `queue.SimpleQueue`; it answers through a bell of `_park`.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Final, Protocol, TypeVar, cast, final

import outcome
import trio
from trio.lowlevel import current_task, enable_ki_protection, reschedule

from ._park import free_token, is_parked, new_bell
from ._statistics import LoopWrites
from ._util import KiB

T = TypeVar("T")

LOOP_SECONDS_MAX: Final = 0.005
"""After a write and sync in the event loop that took longer, the thread does them for a while."""
LOOP_PAUSE_SECONDS: Final = 1.0
LOOP_BYTES_MAX: Final = 256 * KiB
"""Larger batches are for the thread: copying and checksums alone take a tenth of a millisecond."""
READ_THREADS: Final = 4
"""Threads that one log may use at a time for reads and for work in the background."""


@contextmanager
def no_thread_is_oserror() -> Generator[None, None, None]:
    """Python says RuntimeError where pthread_create(3) says EAGAIN."""
    try:
        yield
    except RuntimeError as exc:
        if str(exc) != "can't start new thread":
            raise
        raise OSError(
            errno.EAGAIN, "no thread can be started: check the limits on processes"
        ) from exc


class Worker(Protocol):
    """Runs one blocking call at a time, for one task: the flusher."""

    async def run(self) -> None:
        """Serve until `stop`; a task of the log's nursery.  Raises nothing: `ready` and `call`
        say what went wrong."""
        ...

    async def ready(self) -> None:
        """Wait until `run` serves; an `OSError` where it cannot."""
        ...

    async def call(self, job: Callable[[], T]) -> T:
        """The job's result or exception.  Not to be cancelled: call it shielded."""
        ...

    def stop(self) -> None: ...

    def close(self) -> None:
        """Give back what one has that never ran."""
        ...

    def disown(self) -> None:
        """In a forked child: the thread, and what wakes the parent, are the parent's."""
        ...


class _Answer:
    """What one job came to."""

    __slots__ = ("error", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None


def _nothing() -> None: ...


class ThreadWorker:
    """The real one.

    ``afterwards`` is called after each answer: what need not be waited for.
    """

    def __init__(self, afterwards: Callable[[], None]) -> None:
        self._afterwards = afterwards
        self._jobs: SimpleQueue[tuple[Callable[[], object], _Answer] | None] = SimpleQueue()
        self._bell = new_bell()
        self._limiter = trio.CapacityLimiter(1)
        self._died: OSError | None = None
        self._given = 0
        """Jobs, counted by the event loop."""
        self._ended = 0
        """Jobs with all that follows them, counted by the thread.  One flag for both would be set
        by the end of a job when the next one has been given already."""
        self.disowned: bool = False

    @property
    def idle(self) -> bool:
        """Whether the thread has nothing to do, not even what nobody waits for."""
        return self._given == self._ended

    async def run(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                with no_thread_is_oserror():
                    await trio.to_thread.run_sync(self._serve, limiter=self._limiter)
            except OSError as exc:
                self._died = exc
            except Exception as exc:  # noqa: BLE001  (`call` raises it)
                # Between two jobs, of MemoryError for one: the next caller is told.
                self._died = OSError(errno.ENOMEM, f"the log's thread has ended: {exc!r}")
                self._died.__cause__ = exc
            finally:
                self._bell.close()

    async def ready(self) -> None:
        await self.call(_nothing)

    def _serve(self) -> None:
        get, ring, afterwards = self._jobs.get, self._bell.ring, self._afterwards
        while True:
            item = get()
            if item is None:
                return
            job, answer = item
            try:
                answer.value = job()
            except BaseException as exc:  # noqa: BLE001, ASYNC103  (the flusher raises it)
                answer.error = exc
            # A job holds a whole batch: nothing here keeps it alive until the next one.
            del item, job, answer
            ring()
            afterwards()
            self._ended += 1

    async def call(self, job: Callable[[], T]) -> T:
        answer = _Answer()
        self._given += 1
        self._jobs.put((job, answer))
        try:
            await self._bell.wait()
        except trio.ClosedResourceError:
            if self._died is None:
                raise
            # The thread has ended; why is what the caller gets instead of an answer.
            answer.error = self._died
        if answer.error is not None:
            raise answer.error
        return cast(T, answer.value)

    def stop(self) -> None:
        self._jobs.put(None)

    def close(self) -> None:
        self._bell.close()

    def disown(self) -> None:
        self.disowned = True
        self._bell.disown()


@final
class LoopWriter:
    """Runs small writes and their syncs in the event loop instead, while that is quick.

    One that was slow sends those of the next second to the thread, and so does whoever writes a
    lot to the same disk, for as long as he does.
    """

    def __init__(self, worker: ThreadWorker, afterwards: Callable[[], None]) -> None:
        self._worker = worker
        self._afterwards = afterwards
        self._others = 0
        self._again = 0.0
        """Not before this time."""
        self.statistics: LoopWrites = LoopWrites()

    @contextmanager
    def busy(self) -> Generator[None]:
        """Others write a lot to the disk."""
        self._others += 1
        try:
            yield
        finally:
            self._others -= 1

    def may(self, size: int) -> bool:
        """Whether so many bytes may be written in the event loop now."""
        worker = self._worker
        return (
            not self._others
            and size <= LOOP_BYTES_MAX
            and perf_counter() >= self._again
            # Two threads must not publish at once: the older word might come last.
            and worker.idle
            and not worker.disowned
        )

    def run(self, job: Callable[[], T]) -> T:
        started = perf_counter()
        try:
            return job()
        finally:
            self._afterwards()
            ended = perf_counter()
            if ended - started > LOOP_SECONDS_MAX:
                self._again = ended + LOOP_PAUSE_SECONDS
            self.statistics.note(ended - started, slow=ended - started > LOOP_SECONDS_MAX)


class InlineWorker:
    """Runs the calls in the event loop: for files in memory and virtual clocks.

    ``gate`` is awaited before every job: tests hold a "disk" back with it.
    """

    def __init__(
        self, gate: Callable[[], Awaitable[object]], afterwards: Callable[[], None]
    ) -> None:
        self._gate = gate
        self._afterwards = afterwards

    async def run(self) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def ready(self) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def call(self, job: Callable[[], T]) -> T:
        await self._gate()
        try:
            return job()
        finally:
            self._afterwards()

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass

    def disown(self) -> None:
        pass


def _parents() -> trio.ClosedResourceError:
    return trio.ClosedResourceError("this log is the parent process's")


class _Limiter:
    """As many threads as one log may use; in a forked child none."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(READ_THREADS)
        self._disowned = False

    async def acquire_on_behalf_of(self, borrower: object) -> None:
        await self._limiter.acquire_on_behalf_of(borrower)
        if self._disowned:
            self._limiter.release_on_behalf_of(borrower)
            raise _parents()

    def release_on_behalf_of(self, borrower: object) -> None:
        self._limiter.release_on_behalf_of(borrower)

    def disown(self) -> None:
        """Nobody waits for one any more."""
        self._disowned = True
        self._limiter.total_tokens = math.inf


def cancellation_check(*, threaded: bool) -> Callable[[], None]:
    """What a long call of `Blocking` calls in between: raises where whoever waits for it was
    cancelled, or interrupted.

    Args:
      threaded: as for `Blocking`.
    """
    return trio.from_thread.check_cancelled if threaded else _nothing


class Blocking:
    """Runs what is not the log's writing: opening, reading, preparing, dropping.

    Args:
      threaded: whether in threads.
      abandons: whether a call is left alone that is still under way when its caller is cancelled:
          for calls that may never end.
    """

    def __init__(self, *, threaded: bool, abandons: bool = False) -> None:
        self._abandons = abandons
        self.threaded: Final = threaded
        self._limiter = _Limiter() if threaded else None
        self._token = trio.lowlevel.current_trio_token() if threaded else None
        self._callers: set[trio.lowlevel.Task] = set()
        self._closed: trio.Event | None = None
        self._disowned = False

    # Protected: a call that Ctrl-C takes away between being counted and its end would be waited
    # for, by `close`, for ever.
    @enable_ki_protection
    async def __call__(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        """A checkpoint; once started, the call is waited for even when cancelled."""
        if self._closed is not None:
            raise trio.ClosedResourceError("this log is closed")
        task = current_task()
        self._callers.add(task)
        try:
            if self._limiter is None:
                await trio.lowlevel.checkpoint()
                return function(*args, **kwargs)
            with no_thread_is_oserror():
                return await trio.to_thread.run_sync(
                    partial(function, *args, **kwargs),
                    abandon_on_cancel=self._abandons,
                    limiter=cast(trio.CapacityLimiter, self._limiter),
                )
        except OSError as exc:
            if self._disowned:
                raise _parents() from exc
            raise
        finally:
            self._callers.discard(task)
            self._note_idle()

    async def close(self) -> None:
        """Refuse every later call, and wait for those under way: the files are closed next,
        and a call that went on could meet another file under a number of theirs."""
        if self._closed is None:
            self._closed = trio.Event()
        self._note_idle()
        await self._closed.wait()

    def disown(self) -> None:
        """In a forked child: what is under way there has no thread, and is not waited for."""
        self._disowned = True
        self._closed = trio.Event()
        self._closed.set()
        # RuntimeError: as above.
        with suppress(RuntimeError):
            token = trio.lowlevel.current_trio_token()
            if self._limiter is not None and token is self._token:
                self._limiter.disown()
                orphans = list(filter(is_parked, self._callers))
                # Behind what threads have said before the fork: no task may be woken twice.
                free_token(token)
                token.run_sync_soon(self._release, orphans)

    def _release(self, orphans: list[trio.lowlevel.Task]) -> None:
        for task in orphans:
            if task in self._callers and is_parked(task):
                reschedule(task, outcome.Error(_parents()))

    def _note_idle(self) -> None:
        if self._closed is not None and not self._callers:
            self._closed.set()
