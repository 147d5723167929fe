"""The seam under the log: what an engine promises, and what is built on those promises.

Law: values and protocols.  No files, no sockets, no threads, no trio.

An engine is where a log's bytes are: a directory of segments (`_local`), or a replicated stream
(`_replicated`).  Above the seam there are records, LSNs and
batches: the queue decides what is written next, the flusher when, the streams who reads what.
Below it there are files or servers: how a batch is laid out, what "durable" takes, and what an
answer that never came means.

One task writes.  The flusher calls `Engine.write`, `Engine.sync`, `Engine.rotate`,
`Engine.truncate_after` and `Engine.make_room`, one at a time, each awaited to its end.  To
cancel a write would leave a record of which nobody can say whether it is in the log, so these
calls run in a shielded scope and need no cancellation of their own.  Everything else may be
called by any task at any time.

What an error means is part of each promise:

  LogFullError      nothing was written; the same call may succeed later
  OSError           the log is broken, and what was being written may be there or not
  LogFailedError    the log is broken, and its ``outcome`` says which of the two it is
  CorruptLogError, LsnTruncatedError, UnsupportedOperationError
                    from a truncation only: it was refused, and nothing has changed

An engine never reports an ambiguous outcome as a success or as "not written".  One that can
find out what happened, by asking again, does so before it answers.  After an OSError or a
LogFailedError nothing more is written: the next call of the one writer is `Engine.aclose`.
A kind of LogFailedError that an engine has for itself reaches every caller as that kind: see
`LogFailedError.again`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Final, Protocol, final
from uuid import UUID

import attrs
import msgspec

from ._exceptions import CorruptLogError
from ._exports import publish
from ._identity import History, epoch_of
from ._places import Place
from ._statistics import EngineStatistics

RECORD_OVERHEAD: Final = 4
"""Bytes that a record counts for in a batch beside its own: the frame's table of lengths."""

# -- values -----------------------------------------------------------------------------


@final
class Record(msgspec.Struct, frozen=True, gc=False):
    """One record of the log.

    The garbage collector does not track it, because it cannot be part of a cycle: so it costs a
    fifth, and reading a log takes half as long.
    """

    lsn: int
    """Its number."""
    timestamp: datetime
    """UTC, of its batch; never decreasing along the log."""
    data: bytes
    """What was appended."""


@attrs.frozen
class RecoveryReport:
    """What opening the log found and did."""

    first_lsn: int
    """The oldest record; ``last_lsn + 1`` where there is none."""
    last_lsn: int
    """The newest record, after an unfinished batch was cut."""
    segments: int
    """Segment files of the log."""
    records_replayed: int
    """Records whose checksums were checked on this open."""
    bytes_scanned: int
    """Bytes that were read for that."""
    torn_bytes: int
    """Bytes of an unfinished batch that were cut; nobody had been told it was durable.  What
    is left of a mark that a crash tore while the log was being closed is none."""
    clean_shutdown: bool
    """True where the log was closed in order, and for a new log."""
    seconds: float
    """How long it took."""
    transactions_replayed: int = 0
    """Transactions that a database applied from the log's tail; 0 for a log."""
    checkpoint_lsn: int = 0
    """The LSN up to which a database's store already held everything; 0 for a log."""
    lost_lsn: int = 0
    """The last LSN of which other processes had been told that it is durable, where the log ends
    before it: records that they may have read are not there any more, and a new epoch began
    after ``last_lsn``.  0: nothing that anybody was told of is missing."""


@final
class Tail(msgspec.Struct, frozen=True):
    """Where a log begins and ends, at one moment."""

    first_lsn: int
    """The oldest record; ``last_lsn + 1`` where there is none."""
    last_lsn: int
    """The newest record written."""
    durable_lsn: int
    """The newest record that no crash can take away."""
    history: History
    """The epochs of the log.  It changes whenever the log's end is cut, and only then: whoever
    holds records of the log compares it with the one that they were read under."""

    @property
    def epoch(self) -> int:
        """Today's: the last one of `history`."""
        return epoch_of(self.history)


# -- errors -----------------------------------------------------------------------------


class Moved(Exception):
    """A cursor did not find a record where it was: look again.  It is damage if the log has not
    changed meanwhile."""

    def __init__(self, path: str, reason: str, offset: int = 0) -> None:
        super().__init__(path, reason, offset)
        self.path = path
        self.reason = reason
        self.offset = offset


class Forked(BaseException):
    """Ends the tasks of a log in a forked child, where it is dead."""


# -- reading ----------------------------------------------------------------------------


class Cursor(Protocol):
    """One reader's place in an engine, or in another process's log.  Used by one task."""

    async def chunk(self, lsn: int, stop: int) -> list[Record]:
        """The next records from ``lsn`` on, all below ``stop``; at least one.

        The caller asks only for records that it knows to be durable.  Where a chunk ends is up
        to the engine: at some hundred kilobytes, so that neither memory nor the event loop
        notices.  Cancelled or failed, the caller's place has not changed, and the next call may
        ask for the same records again.

        Raises:
          Moved: the records are not where they were.
          CorruptLogError: what stands there is not what was written.  Only true if the log
              has not changed meanwhile: the caller asks again before believing it.
          OSError: they could not be read.
        """
        ...

    def close(self) -> None:
        """Let go of what the cursor holds, at the latest when a `chunk` under way returns."""
        ...


class Source(Protocol):
    """A log that can be read: the one that this process has open, or another's."""

    name: str
    """For messages: a path or an address."""

    @property
    def tail(self) -> Tail:
        """As far as is known; `refresh` brings it up to date.  It changes between two turns of
        the event loop at any time, but not while a task is running."""
        ...

    @property
    def changes(self) -> int:
        """Grows whenever the log is seen to have changed in another way than by growing at its
        end: segments that have come, gone, or been replaced."""
        ...

    @property
    def damage(self) -> CorruptLogError | None:
        """Proof that there was more than can be read: the error for a reader that has had
        everything else."""
        ...

    async def refresh(self) -> None:
        """Bring `tail` and `damage` up to date.  Not a checkpoint where that takes no time."""
        ...

    async def settle(self) -> None:
        """As `refresh`, for a reader that has met what may be damage: returns when nothing is
        under way that would explain it.

        Raises:
          LogFailedError: something was under way and failed, so that nobody can tell.
        """
        ...

    async def wait_beyond(self, lsn: int) -> bool:
        """Wait until more than ``lsn`` is durable, or the epoch has changed, or damage has shown.
        False: there will be no more."""
        ...

    def cursor(self) -> Cursor: ...

    def subscribe(self, reader: Reader) -> None:
        """Call ``reader.epoch_changed()`` whenever the epoch changes, in the same step.  A source
        that learns of a new epoch only by looking need not: its readers compare."""
        ...

    def unsubscribe(self, reader: Reader) -> None: ...


class Reader(Protocol):
    """Someone who holds records of a log and must not give them out once they are dropped."""

    def epoch_changed(self) -> None: ...


# -- writing ----------------------------------------------------------------------------


class Engine(Protocol):
    """An open log, wherever its bytes are.

    It is opened by a function of its own, which recovers the log or raises, and leaves nothing
    behind if it raises.  It ends with exactly one of `aclose` and `abandon`.
    """

    name: str
    """For messages: a path or an address."""
    uuid: UUID
    """Made with the log; kept for ever, also by its copies."""
    recovery: RecoveryReport
    """What opening it found and did."""
    places: Mapping[str, Place]
    """Up to where consumers had acknowledged when it was opened; none for a database's log,
    whose transactions move them."""
    keeps_places: bool
    """Whether `keep_places` can be called."""
    batch_bytes_max: int
    """The most that one `write` takes, where each record counts for ``len(record)`` +
    `RECORD_OVERHEAD`."""
    batch_records_max: int
    """The most records that one `write` takes."""

    last_lsn: int
    """The newest record written.  Moves only when one of the one writer's calls returns, as
    `durable_lsn` does: so what has not been awaited is not seen."""
    durable_lsn: int
    """The newest record that no crash can take away."""

    @property
    def tail(self) -> Tail:
        """Both, with where the log begins and its history."""
        ...

    # -- its life --

    def tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """What must run while the log is open, each in a task of the log's own nursery: an I/O
        thread, the next segment, retention, a client's connection.  They end during `aclose` or
        `abandon`, raise nothing, and are not cancelled."""
        ...

    async def ready(self) -> None:
        """Wait until `tasks` can serve; an `OSError` where they cannot."""
        ...

    async def aclose(self, *, orderly: bool) -> None:
        """Finish: what is written is made durable and marked as closed in order.

        Waits for reads and for work in the background that is under way.  Gives everything back,
        also if it raises.

        Args:
          orderly: False after a failure: only let go, the next open recovers.

        Raises:
          OSError: the log could not be finished; the next open recovers it.
        """
        ...

    async def abandon(self) -> None:
        """As `aclose`, for an open that fails after all: what it has made is removed again.
        Raises nothing."""
        ...

    def on_fork(self, callback: Callable[[], None]) -> None:
        """Have a bound method called in every forked child, while its object lives."""
        ...

    def disown(self) -> None:
        """This is a forked child: threads, sockets and locks are the parent's.  From here on
        every call raises `Forked` or does nothing."""
        ...

    # -- the one writer --

    async def write(self, records: Sequence[bytes], *, sync: bool) -> None:
        """Append one batch behind ``tail.last_lsn``, all of it or nothing.

        On return ``tail.last_lsn`` has grown by ``len(records)``, and with ``sync`` all of it is
        durable.

        Raises:
          LogFullError: there is no room for it; nothing was written.
          OSError, LogFailedError: see the top of this module.
        """
        ...

    async def sync(self) -> None:
        """Everything written is durable on return.

        Raises:
          OSError, LogFailedError: it may be or not; a sync is never tried again.
        """
        ...

    async def make_room(self) -> None:
        """Find out whether there is room again after a `LogFullError`, and raise another one if
        there is none."""
        ...

    async def rotate(self) -> None:
        """Everything written is durable on return and may be dropped, or archived, as a whole.

        Raises:
          LogFullError: there is no room for what comes next; nothing has changed.
          OSError, LogFailedError: see the top of this module.
        """
        ...

    async def truncate_after(self, lsn: int) -> None:
        """Drop the records above ``lsn``, durably, and all of them or none; begins an epoch.

        Raises:
          LogFullError, CorruptLogError, LsnTruncatedError: nothing has changed.
          UnsupportedOperationError: there is no such thing here.
          OSError, LogFailedError: see the top of this module.
        """
        ...

    # -- beside the writing: once `aclose` has begun, `trio.ClosedResourceError` --

    async def drop_before(self, lsn: int) -> None:
        """Drop records below ``lsn``, as far as that is possible in whole pieces, and no hold
        keeps them.  Durable on return.  Cancelled: nothing is dropped, or all that was to be.

        Raises:
          LogFullError: there is no room to write down where the log begins now; nothing has
              changed.
          LogFailedError: the log is broken, and nothing was dropped.
          OSError: some of them may be gone.
        """
        ...

    def hold(self, who: str, lsn: int | None, bytes_max: float = math.inf) -> None:
        """Keep the records from ``lsn`` on, whatever asks for them to be dropped; None: no
        longer.  One hold per name: ``"store"``, ``"archive"``, ``"consumer:billing"``.

        Args:
          bytes_max: where they take more than so many bytes, the oldest may be dropped all the
              same.
        """
        ...

    async def settle_holds(self) -> None:
        """Wait until nothing is being dropped any more that was decided before now: from here on
        ``tail.first_lsn`` says what a new hold came too late for."""
        ...

    def busy(self) -> AbstractContextManager[None]:
        """While it is entered, somebody writes a lot to the same disk: a write that should be
        quick may not be."""
        ...

    async def keep_places(self, places: Mapping[str, Place]) -> None:
        """Have these be `places`, durably, all or nothing.  Called by one task at a time.

        Raises:
          LogFullError: there is no room; nothing has changed.
          OSError: they are there, or those before them.
        """
        ...

    async def admit_consumers(self) -> None:
        """Of a database's log: have versions refuse it that do not know that transactions move
        places of consumers.  Durable on return.

        Raises:
          LogFullError: there is no room; nothing has changed.
          OSError: it may be so or not.
        """
        ...

    def behind(self, lsn: int) -> tuple[int, float]:
        """How many bytes of the log come after ``lsn``, and how many seconds ago the oldest
        record there was written; both estimated, and at least what they are.  Cheap."""
        ...

    def cursor(self) -> Cursor:
        """For one reader of the durable records."""
        ...

    async def branch(self, dest: str, after_lsn: int) -> None:
        """Make an empty log in the directory ``dest`` that continues this one after
        ``after_lsn``: the log of a backup.  Same uuid; its first open begins an epoch.

        Raises:
          OSError: what was made of it is for the caller to remove.
        """
        ...

    def check_archive(self) -> Awaitable[None]:
        """Before anything but segments is put into the log's archive.

        Raises:
          FileExistsError: that has what is not this log's; and what an archive raises.
        """
        ...

    def statistics(self) -> EngineStatistics:
        """Cheap; no checkpoint."""
        ...


publish(Record, RecoveryReport)
