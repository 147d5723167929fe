"""Records as a trio program iterates over them, wherever the log is.

Law: knows no file and no thread.  A `Source` says what a log has, and how to wait for more; its
cursors give records in chunks, and here they are only given out.  Nothing that is not durable is
ever given.  What looks like damage is believed when the log has not changed while it was looked
at twice.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Final, final

import msgspec
import trio
from trio.lowlevel import enable_ki_protection

from ._engine import Forked, Moved, Record, Source
from ._exceptions import CorruptLogError, LogDivergedError, LsnTruncatedError, WalError
from ._exports import NoPublicConstructor, constructor, publish
from ._identity import Bookmark, History, common_lsn, epoch_of
from ._park import require_trio
from ._util import check_int, check_seconds

CHECKPOINT_RECORDS: Final = 1024
"""Of those that are ready, between two checkpoints: about half a millisecond."""
AHEAD_RECORDS_MIN: Final = 1000
"""So many must still be there to be read before a piece of them is read ahead: a few come as fast
without."""
RETRY_SECONDS: Final = 0.002
SAME_DAMAGE_TIMES: Final = 50
"""What is found so often, one time after the other, is damage even if the log never stands still:
whatever an owner is doing moves on."""


StartAside = Callable[[Callable[[], Awaitable[None]]], Callable[[], None]]
"""Starts a task, and gives what cuts it short."""


def _nothing() -> None: ...


class _Ahead(msgspec.Struct, eq=False):
    """The piece after what is ready, which a task reads."""

    start: int
    """The LSN with which it begins."""
    history: History
    """Under which it is read."""
    done: trio.Event
    records: list[Record] = []
    """None of them: it could not be read, or is still being read."""
    cut_short: Callable[[], None] = _nothing
    """Have the task end without them."""


class Reading:
    """One pass over a source, between its beginning and its end.

    Whenever the log's end was cut, the source tells it at once (`epoch_changed`), or it finds
    out by comparing epochs before the next chunk; what it has given out by then, and what it is
    about to, decides what the cut means.
    """

    def __init__(self, source: Source, start: int, *, stop: int | None, seen: bool) -> None:
        self.source: Source = source
        self.ready: list[Record] = []
        """The newest stands first."""
        self.ended: bool = False
        self._cursor = source.cursor()
        self._ahead: _Ahead | None = None
        """As long as it is there, the cursor is its."""
        self._in_use = False
        """Whether the cursor is of somebody who needs the records now."""
        self._next = start
        """The LSN behind the newest record that is ready, or was given."""
        self._stop = stop
        self._begin = 0 if seen else start
        """Where a cut begins to matter: below, nothing was seen."""
        self._history = source.tail.history
        """Of the records that are ready, or were given."""
        self._changes = source.changes
        self._diverged: LogDivergedError | None = None
        self._doubt: object = None
        """What looked like damage, and where."""
        self._doubts = 0
        """How often, one time after the other."""

    @property
    def next_lsn(self) -> int:
        """The LSN that is given next."""
        return self.ready[-1].lsn if self.ready else self._next

    @property
    def bookmark(self) -> Bookmark:
        return Bookmark(self.next_lsn - 1, epoch_of(self._history))

    def close(self) -> None:
        self.ended = True
        self.ready.clear()
        if self._ahead is not None:
            # Servers may not answer: nobody waits for that any more.
            self._ahead.cut_short()
        self.source.unsubscribe(self)
        self._cursor.close()

    def _renew_cursor(self) -> None:
        self._cursor.close()
        self._cursor = self.source.cursor()

    # -- the log's end was cut --

    def epoch_changed(self) -> None:
        """See what has become of the records that were given, or are about to be."""
        history = self.source.tail.history
        if history is not self._history and history != self._history:
            self._cut(common_lsn(history, epoch_of(self._history)))
            self._history = history
            self._renew_cursor()

    def _cut(self, lsn: int | None) -> None:
        """Records after ``lsn`` are gone, others may come; None: nobody knows where."""
        next_lsn = self.next_lsn
        if lsn is None or next_lsn > max(self._begin, lsn + 1):
            self._diverged = LogDivergedError(self.source.name, self.bookmark, lsn)
            self.ready.clear()
        elif self.ready:
            del self.ready[: max(0, self.ready[0].lsn - lsn)]
            self._next = self.ready[0].lsn + 1 if self.ready else next_lsn
        if self._stop is not None and lsn is not None:
            self._stop = min(self._stop, lsn + 1)

    def check_history(self) -> None:
        self.epoch_changed()
        if self._diverged is not None:
            known = self._diverged
            raise LogDivergedError(known.path, known.bookmark, known.parted_after)

    # -- filling --

    async def next_chunk(self, *, follow: bool, to_end: bool) -> bool:
        """Get records ready; False at the end."""
        while not self.ready:
            if self.ended:
                raise trio.ClosedResourceError("this stream of records is closed")
            self.check_history()
            if not await self._fill(follow=follow, to_end=to_end):
                return False
        return True

    async def gather(self, count: float, seconds: float, *, follow: bool, to_end: bool) -> None:
        """Wait until ``count`` records are ready, or for so long.

        What is found out meanwhile and means the end, the next call that needs a record finds
        out again: first what is ready is given.
        """
        with (
            trio.move_on_after(seconds),
            contextlib.suppress(WalError, OSError, trio.ClosedResourceError),
        ):
            while self.ready and len(self.ready) < count and not self.ended:
                self.check_history()
                if not await self._fill(follow=follow, to_end=to_end):
                    break

    async def _fill(self, *, follow: bool, to_end: bool) -> bool:
        """Get more ready, behind what is; False where there will be no more."""
        source = self.source
        if self._stop is not None and self._next >= self._stop:
            if to_end:
                self._check_damage()
            return False
        tail = source.tail
        if self._next > tail.durable_lsn:
            await source.refresh()
            self.check_history()
            tail = source.tail
            if self._next > max(self._begin, tail.durable_lsn + 1):
                # Cut by an owner of an older version, which tells of no epoch.
                raise LogDivergedError(source.name, self.bookmark, tail.durable_lsn)
            if self._next > tail.durable_lsn:
                self._check_damage()
                return follow and await source.wait_beyond(self._next - 1)
        if self._next < tail.first_lsn:
            raise LsnTruncatedError(tail.first_lsn, self._next)
        if source.changes != self._changes:
            self._changes = source.changes
            self._renew_cursor()
        stop = tail.durable_lsn + 1
        await self._read_chunk(stop if self._stop is None else min(stop, self._stop))
        return True

    async def _read_chunk(self, stop: int) -> None:
        history, changes = self._history, self._changes
        ahead = self._ahead
        if ahead is not None:
            await ahead.done.wait()
            self._ahead = None
            if ahead.records:
                self._take(ahead.records, ahead.history)
            return
        self._in_use = True
        try:
            records = await self._cursor.chunk(self._next, stop)
        except (CorruptLogError, Moved) as exc:
            await self._explain(exc, history, changes)
            return
        finally:
            self._in_use = False
        self._take(records, history)

    def _take(self, records: list[Record], history: History) -> None:
        """Records from `_next` on are ready, if the log's end was not cut since they were asked
        for: else nobody can tell of which history they are."""
        if self._diverged is None and self.source.tail.history == history:
            self._next = records[-1].lsn + 1
            records.reverse()
            self.ready[:0] = records
            self._doubt = None

    # -- reading ahead --

    # Protected: whoever reads next waits for a task that is said to read.
    @enable_ki_protection
    def read_ahead(self, start_aside: StartAside) -> None:
        """Have a task read the next piece meanwhile, one at most, where there is much to read:
        whoever iterates is about to wait for something else.

        Nothing is given, or seen to be given, any sooner; and what goes wrong is found out again
        by whoever needs the records.
        """
        stop = self.source.tail.durable_lsn + 1
        if stop - self._next < AHEAD_RECORDS_MIN or self.ended:
            return
        if self._ahead is not None or self._in_use:
            # Acknowledged by another task than the one that iterates, say.
            return
        ahead = _Ahead(self._next, self._history, trio.Event())
        ahead.cut_short = start_aside(partial(self._read_piece, ahead, stop))
        self._ahead = ahead

    @enable_ki_protection
    async def _read_piece(self, ahead: _Ahead, stop: int) -> None:
        """A task."""
        try:
            with contextlib.suppress(Exception, Forked):
                ahead.records = await self._cursor.chunk(ahead.start, stop)
        finally:
            ahead.done.set()

    async def _explain(self, exc: CorruptLogError | Moved, history: History, changes: int) -> None:
        """Damage, or only a log that has changed meanwhile?"""
        source = self.source
        await trio.sleep(RETRY_SECONDS)
        await source.settle()
        self.check_history()
        tail, next_lsn = source.tail, self._next
        if next_lsn < tail.first_lsn:
            raise LsnTruncatedError(tail.first_lsn, next_lsn) from exc
        if tail.history != history:
            # What was missed meanwhile says nothing of the log as it is now.
            self._doubt = None
            return
        doubt = (next_lsn, repr(exc))
        self._doubts = self._doubts + 1 if doubt == self._doubt else 1
        self._doubt = doubt
        stood = changes == source.changes
        if next_lsn > tail.durable_lsn:
            return
        # Once more: what was read may have been written at that moment.
        if self._doubts < (2 if stood else SAME_DAMAGE_TIMES):
            return
        found = exc
        if isinstance(found, Moved):
            found = CorruptLogError(found.path, found.offset, found.reason)
        known = source.damage
        if known is not None and (
            isinstance(exc, Moved) or (found.path, found.offset) == (known.path, known.offset)
        ):
            # The source knows more of it.
            found = CorruptLogError(known.path, known.offset, known.reason)
        raise found from (None if found is exc else exc)

    def _check_damage(self) -> None:
        known = self.source.damage
        if known is not None:
            raise CorruptLogError(known.path, known.offset, known.reason)


def _take(ready: list[Record], count: float) -> list[Record]:
    """The oldest, which stand last."""
    if count >= len(ready):
        taken = ready[::-1]
        ready.clear()
    else:
        place = len(ready) - int(count)
        taken = ready[place:]
        taken.reverse()
        del ready[place:]
    return taken


@final
class _Batches(AsyncIterator[list[Record]]):
    """Of a stream, which has all of the state."""

    def __init__(
        self,
        take: Callable[[float, float], Awaitable[list[Record]]],
        count: float,
        linger: float,
    ) -> None:
        self._take = take
        self._count = count
        self._linger = linger

    def __aiter__(self) -> _Batches:
        return self

    async def __anext__(self) -> list[Record]:
        return await self._take(self._count, self._linger)


@final
class RecordStream(
    AbstractAsyncContextManager["RecordStream"],
    AsyncIterator[Record],
    metaclass=NoPublicConstructor,
):
    """Records of a log, in LSN order; what ``read()`` and ``follow()`` return.

    Enter it with ``async with`` and iterate with ``async for``.  Entering, each chunk of
    records read from disk and every 1,024 records are checkpoints.  One task iterates at a
    time.  A cancellation loses nothing: what was not given yet is given by the next call.
    """

    def __init__(
        self,
        source: Source,
        start: int | Bookmark | None,
        stop: int | None,
        *,
        follow: bool,
        entering: str | None = None,
    ) -> None:
        if start is not None and not isinstance(start, Bookmark):
            check_int("start", start, 0)
        if stop is not None:
            check_int("stop", stop, 0)
        self._source = source
        self._start = start
        self._stop = stop
        self._follow = follow
        self._to_end = stop is None
        self._entering = entering or f"log.{'follow' if follow else 'read'}() as records"
        """How it is entered, for who forgets it."""
        self._reading: Reading | None = None
        self._ready: list[Record] = []
        self._busy = False

    async def __aenter__(self) -> RecordStream:
        if self._reading is not None:
            raise RuntimeError("a stream of records can be used only once")
        require_trio("log.follow" if self._follow else "log.read")
        await trio.lowlevel.checkpoint()
        source = self._source
        await source.refresh()
        start = self._first(source)
        stop = self._stop
        if not self._follow:
            end = source.tail.durable_lsn + 1
            self._to_end = stop is None or stop > end
            stop = end if stop is None else min(stop, end)
        seen = isinstance(self._start, Bookmark)
        self._reading = Reading(source, start, stop=stop, seen=seen)
        self._ready = self._reading.ready
        source.subscribe(self._reading)
        return self

    def _first(self, source: Source) -> int:
        """The LSN to begin with, if what comes before it is in the log's history."""
        tail = source.tail
        first, last, history = tail.first_lsn, tail.last_lsn, tail.history
        place = self._start
        if place is None:
            return first
        if isinstance(place, Bookmark):
            common = common_lsn(history, place.epoch)
            if common is not None and last < place.lsn <= common:
                self._check_damage(source)
            if common is None or place.lsn > min(common, last):
                parted = None if common is None else min(common, last)
                raise LogDivergedError(source.name, place, parted)
            start = place.lsn + 1
        else:
            # LSN 0 never was: to start there is to start at the beginning.
            start = max(place, 1)
            if start > last + 1:
                self._check_damage(source)
                ahead = Bookmark(start - 1, epoch_of(history))
                raise LogDivergedError(source.name, ahead, last)
        if start < first:
            raise LsnTruncatedError(first, start)
        return start

    def _check_damage(self, source: Source) -> None:
        """Where the log is known to be damaged, its end is not where it seems to be."""
        known = source.damage
        if known is not None:
            raise CorruptLogError(known.path, known.offset, known.reason)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._reading is not None:
            self._reading.close()

    @property
    def bookmark(self) -> Bookmark:
        """The place after the last record that was given; before the first one, the place at
        which the stream began.  ``read`` and ``follow`` go on from there."""
        return self._entered().bookmark

    def _check_history(self) -> None:
        self._entered().check_history()

    def _read_ahead(self, start_aside: StartAside) -> None:
        self._entered().read_ahead(start_aside)

    def _entered(self) -> Reading:
        if self._reading is None:
            raise RuntimeError(f"enter the stream first: async with {self._entering}")
        return self._reading

    def batches(
        self, max_records: int | None = 1000, *, linger: float = 0.0
    ) -> AsyncIterator[list[Record]]:
        """The same records in lists, none of them empty; faster than one by one::

            async for records in stream.batches(): ...

        Each list is a checkpoint.  Cancelled, nothing is lost: the records are given by the next
        call, of this iterator or of the stream's own.

        Args:
          max_records: in a list; None: as they stand in the log's frames, which is fastest.
          linger: for so many seconds, after there is a first record, a list waits for more;
              without ``max_records`` it keeps all that it reads meanwhile in memory.

        Raises:
          TypeError, ValueError: ``max_records`` is no int above 0, or ``linger`` no number of
              seconds.
          trio.BusyResourceError: another task is reading the stream.

        Iterating raises what iterating the stream raises; first all that is whole is given.
        """
        count = math.inf if max_records is None else check_int("max_records", max_records, 1)
        return _Batches(self._next_batch, count, check_seconds("linger", linger))

    @enable_ki_protection
    async def _next_batch(self, count: float, linger: float) -> list[Record]:
        reading = self._entered()
        if self._busy:
            raise trio.BusyResourceError("another task is reading this stream")
        self._busy = True
        try:
            await trio.lowlevel.checkpoint()
            ready = reading.ready
            follow, to_end = self._follow, self._to_end
            while await reading.next_chunk(follow=follow, to_end=to_end):
                if linger:
                    await reading.gather(count, linger, follow=follow, to_end=to_end)
                if ready:
                    return _take(ready, count)
            raise StopAsyncIteration
        finally:
            self._busy = False

    def __aiter__(self) -> RecordStream:
        return self

    async def __anext__(self) -> Record:
        ready = self._ready
        if len(ready) % CHECKPOINT_RECORDS:
            return ready.pop()
        return await self._next_chunk()

    @enable_ki_protection
    async def _next_chunk(self) -> Record:
        reading = self._entered()
        if self._busy:
            raise trio.BusyResourceError("another task is reading this stream")
        self._busy = True
        try:
            if reading.ready:
                # Of a large batch: whoever iterates must not keep the event loop for long.
                await trio.lowlevel.checkpoint()
            if not await reading.next_chunk(follow=self._follow, to_end=self._to_end):
                await trio.lowlevel.checkpoint()
                raise StopAsyncIteration
            return reading.ready.pop()
        finally:
            self._busy = False


new_record_stream = constructor(RecordStream)
check_history = RecordStream._check_history
"""Of a stream; raises `LogDivergedError` where records that it has given are not in the log any
more."""
read_ahead = RecordStream._read_ahead
"""Of a stream that follows: `Reading.read_ahead`."""


publish(RecordStream)
