"""A batch while it fills and until its tasks are woken, and what may be put into one.

Law: a batch is filled by the queue, numbered and woken by the flusher's side of it; it decides
nothing.  Its entries stand as they will be written.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeAlias, final

import msgspec
from trio.lowlevel import Task, reschedule

from ._exceptions import (
    CorruptLogError,
    LogFullError,
    LsnTruncatedError,
    Outcome,
    UnsupportedOperationError,
)
from ._park import WOKEN


@final
class Unit(msgspec.Struct, eq=False):
    """The records of one ``append_many``."""

    records: Sequence[bytes]
    bytes: int


@final
class Flush:
    """No record: done when all before it is durable."""

    __slots__ = ()


@final
class Job(msgspec.Struct, eq=False):
    """No record: done when all before it is durable and ``run`` has returned, between two
    writes."""

    run: Callable[[], Awaitable[None]]
    error: LogFullError | CorruptLogError | LsnTruncatedError | UnsupportedOperationError | None = (
        None
    )
    """Why it could not be done; nothing was changed then."""


Item: TypeAlias = bytes | Unit | Flush | Job
Key: TypeAlias = Task | int
"""Who waits for an entry's durability; a number where nobody does."""


@final
class Share:
    """What of a batch came through one writer; its line counts it."""

    __slots__ = (
        "batch",
        "bytes",
        "bytes_before",
        "line",
        "records",
        "records_before",
        "sent_bytes",
        "sent_records",
    )

    def __init__(self, line: Any, batch: Batch) -> None:
        self.line: Any = line
        """The writer's `Line`."""
        self.batch: Batch = batch
        self.records: int = 0
        """Up to date but for the line's newest share, which is what is not before it."""
        self.bytes: int = 0
        self.records_before: int = 0
        """Of the newest share: what the line has waiting in others."""
        self.bytes_before: int = 0
        self.sent_records: int = 0
        """Those that nobody waits for, and so nobody can take back."""
        self.sent_bytes: int = 0


@final
class Batch:
    """Records that one write and one sync make durable together."""

    __slots__ = (
        "barrier",
        "bytes",
        "bytes_credit",
        "entries",
        "extra",
        "failure",
        "first_lsn",
        "lsns",
        "mixed",
        "opened",
        "overtaken",
        "queued",
        "records_credit",
        "refused",
        "shares",
        "taken",
        "unwaited",
    )

    def __init__(self) -> None:
        self.entries: dict[Key, Item] = {}
        self.bytes: int = 0
        self.extra: int = 0
        """Records minus entries: more for a unit, less for a flush or a job."""
        self.unwaited: int = 0
        """Entries that nobody waits for."""
        self.mixed: bool = False
        """Whether LSNs are not simply ``first_lsn`` + place: then ``lsns`` has them, or ``failure``
        and ``refused`` say why there are none."""
        self.barrier: Flush | Job | None = None
        """The newest of these; a batch ends with a job."""
        self.records_credit: float = 0
        """How many entries it may have before somebody must be asked for more."""
        self.bytes_credit: float = 0
        """The same for its payload bytes."""
        self.opened: float = 0.0
        """Trio time of the first entry, where nobody waits for it."""
        self.queued: bool = False
        self.taken: bool = False
        self.overtaken: bool = False
        """Whether a batch of high priority was put before it."""
        self.shares: dict[Any, Share] | None = None
        """What came through writers, by their `Line`."""
        self.first_lsn: int = 0
        self.lsns: dict[Key, int] | None = None
        self.failure: tuple[Outcome, BaseException] | None = None
        self.refused: dict[Key, BaseException] = {}

    @property
    def records(self) -> int:
        return len(self.entries) + self.extra

    def payload(self) -> Sequence[bytes]:
        """The records in LSN order."""
        if not self.mixed:
            return list(self.entries.values())  # type: ignore[arg-type]
        records: list[bytes] = []
        for item in self.entries.values():
            if isinstance(item, bytes):
                records.append(item)
            elif isinstance(item, Unit):
                records.extend(item.records)
        return records

    def number(self, first_lsn: int) -> None:
        """Fix every entry's LSN."""
        self.first_lsn = first_lsn
        if self.mixed:
            lsns: dict[Key, int] = {}
            for key, item in self.entries.items():
                lsns[key] = first_lsn
                first_lsn += count_of(item)
            self.lsns = lsns

    def fail(self, outcome: Outcome, cause: BaseException) -> None:
        """No entry has an LSN: each is told this."""
        self.mixed = True
        self.failure = (outcome, cause)

    def waiters(self) -> Iterator[Task]:
        for key in self.entries:
            if not isinstance(key, int):
                yield key

    def wake(self) -> None:
        """Wake every task that waits for an entry: it finds here what became of it."""
        if self.unwaited:
            for task in self.waiters():
                reschedule(task, WOKEN)
        else:
            for key in self.entries:
                reschedule(key, WOKEN)  # type: ignore[arg-type]


def count_of(item: Item) -> int:
    if isinstance(item, bytes):
        return 1
    return len(item.records) if isinstance(item, Unit) else 0


def bytes_of(item: Item) -> int:
    if isinstance(item, bytes):
        return len(item)
    return item.bytes if isinstance(item, Unit) else 0
