"""A running log: queue, flusher and engine as one thing that can be opened, used and closed.

Law: composes, and owns the tasks and the end of all three; knows no file, no segment and no
thread.  It promises nothing to users: that is for the facades that are built on it,
`WriteAheadLog` and `Database`, which also check what users pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final, Literal, final

import attrs
import msgspec
import trio
from msgspec.structs import asdict
from trio.lowlevel import enable_ki_protection

from ._admission import Line
from ._batch import Flush, Job, Unit
from ._engine import RECORD_OVERHEAD, Cursor, Engine, Forked, Reader, Tail
from ._events import tell
from ._exceptions import LogFailedError
from ._flusher import Durability, Flusher
from ._health import HealthReason, log_reasons
from ._identity import Bookmark
from ._lines import Lines
from ._pace import AUTO_RECORDS_MAX, AutoBound, AutoDelay, Delay, FixedDelay
from ._park import Latch, end_forked, require_trio
from ._queue import Owner, WriteQueue
from ._state import State, Status
from ._statistics import (
    ArchiveStatistics,
    ConsumerStatistics,
    LoopWrites,
    ReplicationStatistics,
    WalStatistics,
)
from ._stream import RecordStream, new_record_stream
from ._text import printable
from ._util import check_int, check_int_or_inf, check_one_of, check_seconds, check_share

TARGET_LATENCY: Final = 0.010
TARGET_LATENCY_MIN: Final = 1e-6
RESERVE: Final = 0.1
"""Of the queue, for writers of high priority, while there are any."""
RESERVE_MAX: Final = 0.9


class LogOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a log is run, wherever its bytes are; `open_wal` says what each means."""

    max_queue_size: float
    """The most that it ever is."""
    target_latency: float | None
    """Where the bound follows the rate of flushing; None: it is as given."""
    max_queue_bytes: float
    max_record_size: int
    max_batch_bytes: int
    flush_interval: float
    commit_delay: float | Literal["auto"]
    durability: Durability
    reserve: float
    consumer_hold_bytes: float = math.inf


def check_log_options(
    batch_bytes_max: int,
    *,
    max_queue_size: float | Literal["auto"],
    target_latency: float,
    max_queue_bytes: float,
    max_record_size: int,
    max_batch_bytes: int,
    flush_interval: float,
    commit_delay: float | Literal["auto"],
    durability: Durability,
    reserve: float,
    consumer_hold_bytes: float,
) -> LogOptions:
    """These arguments of `open_wal`, or the error that names the wrong one.

    Args:
      batch_bytes_max: the engine's.
    """
    check_one_of("durability", durability, ("sync", "interval", "none"))
    record_size_max = batch_bytes_max - RECORD_OVERHEAD
    auto = max_queue_size == "auto"
    latency = check_seconds("target_latency", target_latency, TARGET_LATENCY_MIN)
    if max_queue_size == "auto":
        max_queue_size = AUTO_RECORDS_MAX
    return LogOptions(
        max_queue_size=check_int_or_inf("max_queue_size", max_queue_size, 1),
        target_latency=latency if auto else None,
        max_queue_bytes=check_int_or_inf("max_queue_bytes", max_queue_bytes, 1),
        max_record_size=check_int("max_record_size", max_record_size, 1, record_size_max),
        max_batch_bytes=check_int("max_batch_bytes", max_batch_bytes, 1, batch_bytes_max // 2),
        flush_interval=check_seconds("flush_interval", flush_interval),
        commit_delay=_check_delay(commit_delay),
        durability=durability,
        reserve=check_share("reserve", reserve, RESERVE_MAX),
        consumer_hold_bytes=check_int_or_inf("consumer_hold_bytes", consumer_hold_bytes, 0),
    )


def _in_loop(loop: LoopWrites | None) -> dict[str, Any]:
    if loop is None:
        return {}
    return {
        "loop_writes": loop.count,
        "loop_seconds_total": loop.seconds_total,
        "loop_seconds_max": loop.seconds_max,
        "loop_slow": loop.slow,
    }


def _replicated(found: ReplicationStatistics | None) -> dict[str, Any]:
    """The fields of `WalStatistics` that only a replicated log has."""
    return {} if found is None else asdict(found)


def _archived(found: ArchiveStatistics | None) -> dict[str, Any]:
    """The fields of `WalStatistics` that only a log with an archive has."""
    fields = {} if found is None else asdict(found)
    fields.pop("stalled_seconds", None)
    return fields


def _check_delay(commit_delay: float | Literal["auto"]) -> float | Literal["auto"]:
    return "auto" if commit_delay == "auto" else check_seconds("commit_delay", commit_delay)


def _delay(commit_delay: float | Literal["auto"]) -> Delay | None:
    if commit_delay == "auto":
        return AutoDelay()
    return FixedDelay(commit_delay) if commit_delay else None


@final
class LogSource:
    """The log that this process has open, as something to be read; an `_engine.Source`."""

    changes = 0
    damage = None
    """Opening has made sure of the end, and the engine knows how far it has come since."""

    def __init__(self, engine: Engine, flusher: Flusher) -> None:
        self.name: str = engine.name
        self._engine = engine
        self._flusher = flusher

    @property
    def tail(self) -> Tail:
        return self._engine.tail

    async def refresh(self) -> None:
        pass

    async def settle(self) -> None:
        await self._flusher.wait_job()

    async def wait_beyond(self, lsn: int) -> bool:
        return await self._flusher.wait_beyond(lsn)

    def cursor(self) -> Cursor:
        return self._engine.cursor()

    def subscribe(self, reader: Reader) -> None:
        self._flusher.readers.add(reader)

    def unsubscribe(self, reader: Reader) -> None:
        self._flusher.readers.discard(reader)


@final
class Log:
    """A log that is open; see `OpenLog`."""

    def __init__(self, options: LogOptions, engine: Engine) -> None:
        self.name: Final[str] = engine.name
        self.engine: Final[Engine] = engine
        self._options = options
        self.max_record_size: Final[int] = min(
            options.max_record_size, engine.batch_bytes_max - RECORD_OVERHEAD
        )
        self.status: Final = Status(engine.name)
        self._queue = WriteQueue(
            self.status,
            options.max_queue_size,
            options.max_queue_bytes,
            # Two halves, for the payload and for what records count beside it: no batch of
            # several entries is too large for the engine.
            min(options.max_batch_bytes, engine.batch_bytes_max // 2),
            min(engine.batch_records_max, engine.batch_bytes_max // 2 // RECORD_OVERHEAD),
            options.reserve,
            None if options.target_latency is None else AutoBound(options.target_latency),
        )
        self._flusher = Flusher(
            self._queue,
            engine,
            options.durability,
            options.flush_interval,
            _delay(options.commit_delay),
        )
        self.append: Final = self._queue.append
        """``await append(record, current_task())``: accept, with back-pressure, and wait until
        the record is durable; gives its LSN.  The queue's own method: a call is not passed
        through anything else."""
        self.append_in: Final = self._queue.append_in
        """``await append_in(line, record, current_task())``: the same through a writer's line."""
        self.accept: Final = self._queue.accept
        """``await accept(record, line)``: the same without waiting for durability."""
        self.accept_nowait: Final = self._queue.accept_nowait
        self.lines: Final = Lines(
            self.status, self._queue, options.max_queue_size, options.max_queue_bytes
        )
        """Those of writers."""
        self.consumer_hold_bytes: Final[float] = options.consumer_hold_bytes
        self.consumers: Callable[[], Mapping[str, ConsumerStatistics]] = dict
        """Says how far consumers are."""
        self._nursery: trio.Nursery
        self._before_close: list[Callable[[], Awaitable[None]]] = []
        self._aside: set[trio.CancelScope] = set()
        """Around tasks that may be cut short."""
        self._closing = False
        self._closed = Latch()
        self._handed_out = False
        self._forked = False
        engine.on_fork(self._disown)

    # -- what it is --

    @property
    def tail(self) -> Tail:
        return self.engine.tail

    @property
    def durable_lsn(self) -> int:
        return self.engine.durable_lsn

    @property
    def bookmark(self) -> Bookmark:
        """The durable end."""
        tail = self.engine.tail
        return Bookmark(tail.durable_lsn, tail.epoch)

    def statistics(self) -> WalStatistics:
        queue, flusher, tail = self._queue, self._flusher, self.engine.tail
        backlog, engine = queue.backlog, self.engine.statistics()
        records, waiting = backlog.note_peaks()
        bound, blocked = queue.admission.max_queue_size, queue.admission.blocked
        return WalStatistics(
            records_waiting=records,
            bytes_waiting=waiting,
            max_queue_size=bound,
            max_queue_bytes=self._options.max_queue_bytes,
            queue_utilization=min(
                1.0, max(records / bound, waiting / self._options.max_queue_bytes)
            ),
            peak_records_waiting=backlog.peak_records,
            peak_bytes_waiting=backlog.peak_bytes,
            tasks_waiting_send=blocked,
            tasks_waiting_durable=backlog.tasks + flusher.waiting,
            backpressure_waits=queue.waits.count + blocked,
            backpressure_seconds=queue.waits.seconds_total,
            backpressure_seconds_histogram=queue.waits.histogram(),
            rejected=queue.rejected,
            writers=self.lines.statistics(),
            consumers=self.consumers(),
            records_appended=flusher.counters.records_appended,
            bytes_appended=flusher.counters.bytes_appended,
            batches_synced=engine.syncs.count,
            sync_seconds_total=engine.syncs.seconds_total,
            sync_seconds_max=engine.syncs.seconds_max,
            sync_seconds_histogram=engine.syncs.histogram(),
            first_lsn=tail.first_lsn,
            last_lsn=tail.last_lsn,
            durable_lsn=tail.durable_lsn,
            segments=engine.segments,
            disk_bytes=engine.disk_bytes,
            last_sync_time=engine.syncs.last_time,
            state=self.status.state.value,
            epoch=tail.epoch,
            **_in_loop(engine.loop),
            **_replicated(engine.replication),
            **_archived(engine.archive),
        )

    def reasons(self) -> tuple[HealthReason | None, ...]:
        """Why it does not fare well."""
        crowded, archive = self._queue.backlog.crowded_seconds(), self.engine.statistics().archive
        stalled = 0.0 if archive is None else archive.stalled_seconds
        return log_reasons(self.statistics(), self.status.failure, crowded, stalled)

    # -- writing --

    def own(self, owner: Owner) -> None:
        """Tell ``owner`` what becomes of each record from here on."""
        self._queue.own(owner)

    def append_in_turn(
        self, record: bytes, line: Line | None, enter: Callable[[], None]
    ) -> Awaitable[int]:
        """Accept through a line, wait until the record is durable; gives its LSN.

        Args:
          enter: called in the moment in which the record is let in; it may refuse by raising.
        """
        if line is not None:
            self.lines.check(line)
        return self._queue.submit(record, line, enter)

    async def append_unit(
        self, records: Sequence[bytes], size: int, line: Line | None = None
    ) -> int:
        """Append records of ``size`` bytes together as one; gives the first LSN."""
        return await self._queue.submit(Unit(records, size), line)

    async def flush(self, line: Line | None = None) -> int:
        """Make everything accepted before the call durable, of a writer's line all that is its;
        gives ``durable_lsn``."""
        queue, engine = self._queue, self.engine
        if (
            self.status.state is State.OPEN
            and self._flusher.in_flight is None
            and not queue.backlog.records
            and engine.durable_lsn == engine.last_lsn
        ):
            await trio.lowlevel.checkpoint()
            return engine.durable_lsn
        await queue.submit(Flush(), line)
        return engine.durable_lsn

    def hold(self, who: str, lsn: int | None, bytes_max: float = math.inf) -> None:
        """Keep the record ``lsn`` and all that come after it: see `Engine.hold`."""
        self.engine.hold(who, lsn, bytes_max)

    async def wait_durable(self, lsn: int) -> None:
        await self._flusher.wait_durable(lsn)

    async def run_job(self, run: Callable[[], Awaitable[None]]) -> None:
        """Have the flusher call a method of the engine between two writes, after everything
        accepted before has become durable.

        Cancelled before it has begun: it is not called.
        """
        job = Job(run)
        await self._queue.submit(job)
        if job.error is not None:
            raise job.error

    # -- reading --

    def read(self, start: int | Bookmark | None, stop: int | None = None) -> RecordStream:
        return new_record_stream(self._source(), start, stop, follow=False)

    def follow(self, start: int | Bookmark | None, *, entering: str | None = None) -> RecordStream:
        """
        Args:
          entering: how a user would enter the stream; for a message.
        """
        return new_record_stream(self._source(), start, None, follow=True, entering=entering)

    def _source(self) -> LogSource:
        if self.status.state is State.CLOSED or self._closed.is_set():
            raise trio.ClosedResourceError(f"{printable(self.name)}: this log is closed")
        return LogSource(self.engine, self._flusher)

    # -- its life --

    def start(self, nursery: trio.Nursery) -> None:
        """Start the tasks of the log."""
        self._nursery = nursery
        for task in self.engine.tasks():
            nursery.start_soon(task)
        nursery.start_soon(self._flusher.run)

    def start_soon(self, task: Callable[..., Awaitable[Any]]) -> None:
        """Run a task beside those of the log.  It must end before the log closes: see
        `before_close`."""
        self._nursery.start_soon(task)

    def start_aside(self, task: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        """Run a task that nobody needs to end well; returns what cuts it short.  Closing the log
        does that, too."""
        scope = trio.CancelScope(shield=True)
        self._nursery.start_soon(self._run_aside, task, scope)
        self._aside.add(scope)
        return partial(self._cut_short, scope)

    @enable_ki_protection
    async def _run_aside(
        self, task: Callable[[], Awaitable[None]], scope: trio.CancelScope
    ) -> None:
        try:
            with scope:
                await task()
        finally:
            self._aside.discard(scope)

    def _cut_short(self, *scopes: trio.CancelScope) -> None:
        # A forked child shares with the parent what trio would change for that.
        if not self._forked:
            for scope in scopes:
                scope.cancel()

    def before_close(self, hook: Callable[[], Awaitable[None]]) -> None:
        """Have ``hook`` called, shielded, when the log is being closed: everything accepted is
        written by then, and the engine still open."""
        self._before_close.append(hook)

    def hand_out(self) -> None:
        """The open has succeeded: from here on the log is closed, not abandoned."""
        report = self.engine.recovery
        text = "closed in order before" if report.clean_shutdown else "recovered"
        if report.torn_bytes:
            text += f", {report.torn_bytes} bytes of an unfinished batch cut"
        if report.lost_lsn:
            text += f"; readers had been told that LSN {report.lost_lsn} is durable, and all after "
            text += f"{report.last_lsn} is lost: a new epoch begins"
        tell(
            logging.WARNING if report.torn_bytes or report.lost_lsn else logging.INFO,
            "opened",
            self.name,
            f"opened at LSN {report.last_lsn} in {report.seconds:.3f} seconds, {text}",
            **attrs.asdict(report),
        )
        self._handed_out = True

    async def aclose(self) -> None:
        """Make everything accepted durable and close; neither cancellation nor Ctrl-C cuts that
        short.  Idempotent."""
        if self._forked:
            await self._end_forked()
            return
        if not self._closing:
            self._closing = True
            # In a task of its own: Ctrl-C is delivered to the main task, even shielded.
            self._nursery.start_soon(self._shut)
        await self._closed.wait()

    def tell_failure(self) -> None:
        """Raises `LogFailedError` if the log broke and nobody has been told."""
        status = self.status
        if status.failure is not None and not status.failure_told:
            raise status.failed(status.loss, status.failure)

    @enable_ki_protection
    async def _shut(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                await self._finish()
            except Forked:
                pass
            except (OSError, LogFailedError) as exc:
                self._queue.fail(exc, None, "unknown", "unknown")
            finally:
                if not self._forked:
                    self.status.end()
                    self._closed.set()

    async def _finish(self) -> None:
        orderly = False
        try:
            self._queue.close()
            await self._flusher.done.wait()
            for hook in reversed(self._before_close):
                await hook()
            orderly = self.status.failure is None
        finally:
            if self._forked:
                pass
            elif self._handed_out:
                self._cut_short(*self._aside)
                await self.engine.aclose(orderly=orderly)
            else:
                await self.engine.abandon()
        if self._handed_out and orderly:
            last_lsn = self.engine.last_lsn
            text = f"closed at LSN {last_lsn}"
            tell(logging.INFO, "closed", self.name, text, last_lsn=last_lsn)

    async def abandon(self) -> None:
        """Have the tasks end that were started, and let go: nothing was accepted."""
        self._queue.close()
        with trio.CancelScope(shield=True):
            await self.engine.abandon()

    # -- in a forked child --

    def _disown(self) -> None:
        """The log is the parent's, and so is whatever works for it."""
        self._forked = True
        self._queue.disown()
        self.engine.disown()

    async def _end_forked(self) -> None:
        """On its way out none of the tasks wakes another."""
        self._closed.set()
        await end_forked(self._nursery, Forked)


@final
class OpenLog:
    """Opens a log and closes it: what the context managers of both facades have in common.

    Each method is called once, with Ctrl-C held back.
    """

    def __init__(
        self, caller: str, options: LogOptions, open_engine: Callable[[], Awaitable[Engine]]
    ) -> None:
        """
        Args:
          caller: the function that users call, for messages.
          open_engine: opens the engine, or raises and leaves nothing behind.
        """
        self._caller = caller
        self._options = options
        self._open_engine = open_engine
        self._entered = False
        self._log: Log | None = None
        self._nursery_manager: AbstractAsyncContextManager[trio.Nursery] | None = None

    async def enter(self) -> Log:
        """Open the log and start its tasks.  It is abandoned when it is left, unless
        `Log.hand_out` was called."""
        if self._entered:
            raise RuntimeError(
                f"{self._caller}() gives a context manager that can be used only once"
            )
        require_trio(self._caller)
        self._entered = True
        engine = await self._open_engine()
        manager = trio.open_nursery()
        try:
            log = Log(self._options, engine)
            nursery = await manager.__aenter__()
        except BaseException:
            # No memory.
            await engine.abandon()
            raise
        try:
            log.start(nursery)
            with trio.CancelScope(shield=True):
                await engine.ready()
        except BaseException:
            # No thread, or no memory.
            nursery.cancel_scope.shield = True
            await log.abandon()
            await manager.__aexit__(None, None, None)
            raise
        self._log, self._nursery_manager = log, manager
        return log

    async def leave(self, exc: BaseException | None) -> None:
        """Close the log.

        Raises:
          LogFailedError: it broke, nobody has been told, and ``exc`` is None.
        """
        assert self._log is not None
        assert self._nursery_manager is not None
        await self._log.aclose()
        # All of its tasks have ended: this neither waits nor wraps anything.
        await self._nursery_manager.__aexit__(None, None, None)
        if exc is None:
            self._log.tell_failure()
