"""A share of the queue with a name: `Writer`, and what opens one.

Law: promises and the checks of what users pass, as in `_wal`; the work is `_log`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from itertools import islice
from threading import get_ident
from types import TracebackType
from typing import Final, Generic, Literal, TypeVar, final

import msgspec
import trio
from trio.lowlevel import current_task, enable_ki_protection

from ._admission import Line
from ._engine import RECORD_OVERHEAD, Engine
from ._exceptions import RecordTooLargeError
from ._exports import NoPublicConstructor, constructor, publish
from ._log import Log
from ._statistics import WriterStatistics
from ._util import check_bytes, check_int_or_inf, check_one_of

W = TypeVar("W")

UNIT_SLICE: Final = 10_000
"""`append_many` takes its iterable in slices of this many records, with a checkpoint
between: the event loop is not held up for longer than a few milliseconds."""


# -- what users pass ----------------------------------------------------------------


class LineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The checked arguments of ``writer()``."""

    name: str
    max_queue_size: float
    max_queue_bytes: float
    high: bool


def check_line_options(
    log: Log,
    name: str,
    max_queue_size: float | None,
    max_queue_bytes: float | None,
    priority: Literal["normal", "high"],
) -> LineOptions:
    """These arguments of ``writer()``, or the error that names the wrong one."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    if not name:
        raise ValueError("name must not be empty")
    check_one_of("priority", priority, ("normal", "high"))
    log.status.check_open()
    log.lines.check_name(name)
    return LineOptions(
        name=name,
        max_queue_size=_check_limit("max_queue_size", max_queue_size, log.lines.max_queue_size),
        max_queue_bytes=_check_limit("max_queue_bytes", max_queue_bytes, log.lines.max_queue_bytes),
        high=priority == "high",
    )


def _check_limit(name: str, value: float | None, queue_limit: float) -> float:
    if value is None:
        return math.inf
    checked = check_int_or_inf(name, value, 1)
    if checked > queue_limit:
        raise ValueError(f"{name} must be at most the queue's, which is {queue_limit}, not {value}")
    return checked


def check_size(size: int, size_max: int) -> None:
    if size > size_max:
        raise RecordTooLargeError(size, size_max)


async def gather_unit(
    engine: Engine, size_max: int, records: Iterable[bytes]
) -> tuple[list[bytes], int]:
    """The records of one ``append_many``, and their bytes; a checkpoint for every slice.

    Raises:
      TypeError, RecordTooLargeError: as ``append_many`` says.
    """
    if isinstance(records, (bytes, bytearray, memoryview, str)):
        raise TypeError(f"records must be an iterable of bytes, not one {type(records).__name__}")
    try:
        iterator = iter(records)
    except TypeError:
        kind = type(records).__name__
        raise TypeError(f"records must be an iterable of bytes, not {kind}") from None
    unit: list[bytes] = []
    total = 0
    while chunk := list(islice(iterator, UNIT_SLICE)):
        if set(map(type, chunk)) != {bytes}:
            chunk = [
                check_bytes(f"records[{number}]", record)
                for number, record in enumerate(chunk, len(unit))
            ]
        check_size(max(map(len, chunk)), size_max)
        total += sum(map(len, chunk))
        unit += chunk
        if total + RECORD_OVERHEAD * len(unit) > engine.batch_bytes_max:
            raise RecordTooLargeError(total, engine.batch_bytes_max, "the limit of one append_many")
        if len(unit) > engine.batch_records_max:
            raise RecordTooLargeError(
                len(unit), engine.batch_records_max, "the limit of records of one append_many"
            )
        if len(chunk) == UNIT_SLICE:
            await trio.lowlevel.checkpoint()
    return unit, total


# -- the writer ---------------------------------------------------------------------


@final
class Writer(metaclass=NoPublicConstructor):
    """A named share of a log's queue; see `WriteAheadLog.writer`.

    Its methods are those of `WriteAheadLog`, with the same promises about cancellation, order,
    durability, errors and shutdown.  They differ in where they wait.  Each writer has its own
    line, so that many blocked tasks of one writer do not delay the few of another, and a limit
    on how many of *its* records wait.  Records of one writer keep their order; records of
    different writers are in the order of acceptance, except for ``priority="high"``.
    """

    def __init__(self, log: Log, line: Line) -> None:
        self._log = log
        self._line = line
        self._append = log.append_in
        self._thread = get_ident()
        self._record_size_max = log.max_record_size

    def _check_data(self, data: bytes) -> bytes:
        self._log.lines.check(self._line)
        data = check_bytes("data", data)
        check_size(len(data), self._log.max_record_size)
        return data

    @enable_ki_protection
    async def append(self, data: bytes) -> int:
        """Append one record and wait until it is durable; returns its LSN.

        Waits in this writer's line while its share, or the queue, is full.

        Cancellation: as `WriteAheadLog.append`.  If it raises `trio.Cancelled`, nothing of the
        record is in the log.

        Raises:
          TypeError, RecordTooLargeError, LogFullError, LogFailedError: as `WriteAheadLog.append`.
          trio.ClosedResourceError: the writer's block was left, or the log is closed.
          RuntimeError: called from another run of trio than the log's.
        """
        if type(data) is not bytes or len(data) > self._record_size_max:
            data = self._check_data(data)
        if get_ident() != self._thread:
            self._log.lines.check(self._line)
        return await self._append(self._line, data, current_task())

    @enable_ki_protection
    async def append_many(self, records: Iterable[bytes]) -> range:
        """Append records as one unit and wait until all are durable; returns their LSNs.

        As `WriteAheadLog.append_many`.  A unit larger than the writer's share waits until
        nothing else of the writer does.  Where lines take turns it counts as its records do.
        """
        self._log.lines.check(self._line)
        log = self._log
        unit, total = await gather_unit(log.engine, log.max_record_size, records)
        log.lines.check(self._line)
        if not unit:
            log.status.check_open()
            await trio.lowlevel.checkpoint()
            return range(log.engine.last_lsn + 1, log.engine.last_lsn + 1)
        first = await log.append_unit(unit, total, self._line)
        return range(first, first + len(unit))

    @enable_ki_protection
    async def send(self, data: bytes) -> None:
        """Append one record without waiting for its durability; as `WriteAheadLog.send`.

        Cancellation: if it raises `trio.Cancelled`, the record was not accepted.
        """
        await self._log.accept(self._check_data(data), self._line)

    @enable_ki_protection
    def send_nowait(self, data: bytes) -> None:
        """Like `send`, without waiting.

        Raises:
          trio.WouldBlock: the writer's share, or the queue, is full, or somebody waits for it.
          TypeError, RecordTooLargeError, LogFullError, LogFailedError: as for `append`.
          trio.ClosedResourceError, RuntimeError: as for `append`.
        """
        self._log.accept_nowait(self._check_data(data), self._line)

    @enable_ki_protection
    async def flush(self) -> int:
        """Make every record that this writer accepted before the call durable; returns the
        log's ``durable_lsn``.

        Cancellation leaves the records as they are: they become durable all the same.  Errors
        are those of `WriteAheadLog.flush`.
        """
        self._log.lines.check(self._line)
        return await self._log.flush(self._line)

    def statistics(self) -> WriterStatistics:
        """A look at this writer's share.  Cheap; no checkpoint; also after its block."""
        return self._log.lines.statistics_of(self._line)

    def __repr__(self) -> str:
        state = "closed" if self._line.closed else "open"
        return f"<Writer {self._line.name!r} of {self._log.name!r} {state}>"


new_writer = constructor(Writer)


@final
class OpenWriter(AbstractAsyncContextManager[W], Generic[W]):
    """What ``writer()`` returns: opens a line, and closes it at the end of the block."""

    def __init__(self, log: Log, options: LineOptions, make: Callable[[Line], W]) -> None:
        """
        Args:
          make: what users get, made of the line.
        """
        self._log = log
        self._options = options
        self._make = make
        self._line: Line | None = None

    @enable_ki_protection
    async def __aenter__(self) -> W:
        if self._line is not None:
            raise RuntimeError("writer() gives a context manager that can be used only once")
        self._log.lines.check_run()
        await trio.lowlevel.checkpoint()
        options = self._options
        self._line = self._log.lines.open(
            options.name, options.max_queue_size, options.max_queue_bytes, high=options.high
        )
        return self._make(self._line)

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._line is not None
        self._log.lines.close(self._line)
        await trio.lowlevel.cancel_shielded_checkpoint()


publish(Writer)
