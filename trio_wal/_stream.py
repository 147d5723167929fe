"""Records as a trio program iterates over them, wherever the log is.

Law: knows no file.  A `Source` says what a log has, and how to wait for more; chunks of records
are read in a worker thread and handed over whole, and the event loop only gives them out.
Nothing that is not durable is ever given.  What looks like damage is believed when the log has
not changed while it was looked at twice.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Final, Protocol, final

import trio
from trio.lowlevel import enable_ki_protection

from ._cursor import Cursor, Locator, Moved, Record
from ._exceptions import CorruptLogError, LogDivergedError, LsnTruncatedError
from ._exports import NoPublicConstructor, constructor
from ._identity import Bookmark, History, common_lsn, epoch_of
from ._util import check_int
from ._worker import Blocking

CHECKPOINT_RECORDS: Final = 1024
"""Of those that are ready, between two checkpoints: about half a millisecond."""
RETRY_SECONDS: Final = 0.002
SAME_DAMAGE_TIMES: Final = 50
"""What is found so often, one time after the other, is damage even if the log never stands still:
whatever an owner is doing moves on."""


class Source(Locator, Protocol):
    """A log that can be read: this process's own, or another's."""

    path: str
    blocking: Blocking

    @property
    def first_lsn(self) -> int: ...

    @property
    def durable_lsn(self) -> int:
        """The newest record that may be given, as far as is known."""
        ...

    @property
    def last_lsn(self) -> int:
        """The newest record written, as far as is known; not below `durable_lsn`."""
        ...

    @property
    def history(self) -> History: ...

    @property
    def damage(self) -> CorruptLogError | None:
        """What keeps whoever has read everything up to `durable_lsn`, as far as it is whole,
        from going on: proof that there was more."""
        ...

    async def refresh(self) -> None:
        """Bring all this up to date; no checkpoint where that takes no time."""
        ...

    def generation(self) -> int:
        """Changes whenever the log's end may have been cut."""
        ...

    def shape(self) -> int:
        """Changes whenever files have come, gone or been replaced."""
        ...

    def cutting(self) -> bool:
        """Whether the log's end is being cut."""
        ...

    async def wait_durable_after(self, lsn: int) -> bool:
        """Wait until more than ``lsn`` is durable, or the end was cut, or damage has shown;
        False: there will be no more."""
        ...

    def watch(self, reading: Reading) -> None:
        """From here on, tell ``reading`` at once when the end was cut, if that is known."""
        ...

    def unwatch(self, reading: Reading) -> None: ...


class Reading:
    """One pass over a source, between its beginning and its end.

    Between two chunks it is told of cuts by its source (`cut`), or finds out by the log's
    history; what it has given out by then, and what it is about to, decides what a cut means.
    """

    def __init__(self, source: Source, start: int, *, stop: int | None, seen: bool) -> None:
        self.source: Source = source
        self.ready: list[Record] = []
        """The newest stands first."""
        self.ended: bool = False
        self._cursor = Cursor(source, start)
        self._stop = stop
        self._begin = 0 if seen else start
        """Where a cut begins to matter: below, nothing was seen."""
        self._due = start
        """The LSN that is given next, where none is ready."""
        self._history = source.history
        self._generation = source.generation()
        self._shape = source.shape()
        self._diverged: LogDivergedError | None = None
        self._doubt: object = None
        """What looked like damage, and where."""
        self._doubts = 0
        """How often, one time after the other."""
        self._filling = False

    @property
    def next_lsn(self) -> int:
        """The LSN that is given next."""
        if self.ready:
            return self.ready[-1].lsn
        return self._due if self._filling else self._cursor.next_lsn

    @property
    def bookmark(self) -> Bookmark:
        return Bookmark(self.next_lsn - 1, epoch_of(self._history))

    def close(self) -> None:
        self.ended = True
        self.ready.clear()
        self.source.unwatch(self)
        if not self._filling:
            self._cursor.leave()

    # -- the log's end was cut --

    def cut(self, lsn: int | None) -> None:
        """Records after ``lsn`` are gone, others may come; None: nobody knows where."""
        next_lsn = self.next_lsn
        place = self.bookmark
        self._history = self.source.history
        if lsn is None or next_lsn > max(self._begin, lsn + 1):
            self._diverged = LogDivergedError(self.source.path, place, lsn)
            self.ready.clear()
        elif self.ready:
            del self.ready[: max(0, self.ready[0].lsn - lsn)]
            self._cursor.next_lsn = self.ready[0].lsn + 1 if self.ready else next_lsn
        if self._stop is not None and lsn is not None:
            self._stop = min(self._stop, lsn + 1)

    def _follow_history(self) -> None:
        history = self.source.history
        if history is not self._history and history != self._history:
            self.cut(common_lsn(history, epoch_of(self._history)))

    def _check_history(self) -> None:
        self._follow_history()
        if self._diverged is not None:
            known = self._diverged
            raise LogDivergedError(known.path, known.bookmark, known.parted_after)

    # -- filling --

    async def next_chunk(self, *, follow: bool, to_end: bool) -> bool:
        """Get records ready; False at the end."""
        while not self.ready:
            if self.ended:
                raise trio.ClosedResourceError("this stream of records is closed")
            self._check_history()
            if not await self._fill(follow=follow, to_end=to_end):
                return False
        return True

    async def _fill(self, *, follow: bool, to_end: bool) -> bool:
        source, cursor = self.source, self._cursor
        if self._stop is not None and cursor.next_lsn >= self._stop:
            if to_end:
                self._check_damage()
            return False
        if cursor.next_lsn > source.durable_lsn:
            await source.refresh()
            self._check_history()
            if cursor.next_lsn > max(self._begin, source.durable_lsn + 1):
                # Cut by an owner of an older version, which tells of no epoch.
                raise LogDivergedError(source.path, self.bookmark, source.durable_lsn)
            if cursor.next_lsn > source.durable_lsn:
                self._check_damage()
                return follow and await source.wait_durable_after(cursor.next_lsn - 1)
        if cursor.next_lsn < source.first_lsn:
            raise LsnTruncatedError(source.first_lsn, cursor.next_lsn)
        generation, shape = source.generation(), source.shape()
        if (generation, shape) != (self._generation, self._shape):
            self._generation, self._shape = generation, shape
            cursor.leave()
        stop = source.durable_lsn + 1
        await self._read_chunk(stop if self._stop is None else min(stop, self._stop))
        return True

    async def _read_chunk(self, stop: int) -> None:
        source, cursor = self.source, self._cursor
        generation, shape = source.generation(), source.shape()
        before = self._due = cursor.next_lsn
        self._filling = True
        try:
            records = await source.blocking(cursor.chunk, stop)
        except (CorruptLogError, FileNotFoundError, Moved) as exc:
            cursor.next_lsn = before
            cursor.leave()
            await self._explain(exc, generation, shape)
            return
        except BaseException:
            cursor.next_lsn = before
            raise
        finally:
            self._filling = False
            if self.ended:
                cursor.leave()
        if self._diverged is None and generation == source.generation():
            records.reverse()
            self.ready[:] = records
            self._doubt = None
        else:
            # Of which history they are nobody can tell.
            cursor.next_lsn = before

    async def _explain(self, exc: Exception, generation: int, shape: int) -> None:
        """Damage, or only a log that has changed meanwhile?"""
        source = self.source
        await trio.sleep(RETRY_SECONDS)
        await source.refresh()
        self._check_history()
        next_lsn = self._cursor.next_lsn
        if next_lsn < source.first_lsn:
            raise LsnTruncatedError(source.first_lsn, next_lsn) from exc
        doubt = (next_lsn, repr(exc))
        self._doubts = self._doubts + 1 if doubt == self._doubt else 1
        self._doubt = doubt
        stood = (generation, shape) == (source.generation(), source.shape())
        if source.cutting() or next_lsn > source.durable_lsn:
            return
        # Once more: what was read may have been written at that moment.
        if self._doubts < (2 if stood else SAME_DAMAGE_TIMES):
            return
        if isinstance(exc, FileNotFoundError):
            found = CorruptLogError(str(exc.filename), 0, "the segment is missing")
        elif isinstance(exc, Moved):
            found = CorruptLogError(exc.path, exc.offset, exc.reason)
        else:
            assert isinstance(exc, CorruptLogError)
            found = exc
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


@final
class RecordStream(
    AbstractAsyncContextManager["RecordStream"],
    AsyncIterator[Record],
    metaclass=NoPublicConstructor,
):
    """Records of a log, in LSN order; what ``read()`` and ``follow()`` return.

    Enter it with ``async with`` and iterate with ``async for``.  Entering, each chunk of
    records read from disk and every 1,024 records are checkpoints.  One task iterates at a
    time.
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
            raise RuntimeError("a stream of records is for one use")
        await trio.lowlevel.checkpoint()
        source = self._source
        await source.refresh()
        start = self._first(source)
        stop = self._stop
        if not self._follow:
            end = source.durable_lsn + 1
            self._to_end = stop is None or stop > end
            stop = end if stop is None else min(stop, end)
        seen = isinstance(self._start, Bookmark)
        self._reading = Reading(source, start, stop=stop, seen=seen)
        self._ready = self._reading.ready
        source.watch(self._reading)
        return self

    def _first(self, source: Source) -> int:
        """The LSN to begin with, if what comes before it is in the log's history."""
        first, last, history = source.first_lsn, source.last_lsn, source.history
        place = self._start
        if place is None:
            return first
        if isinstance(place, Bookmark):
            common = common_lsn(history, place.epoch)
            if common is not None and last < place.lsn <= common:
                self._check_damage(source)
            if common is None or place.lsn > min(common, last):
                parted = None if common is None else min(common, last)
                raise LogDivergedError(source.path, place, parted)
            start = place.lsn + 1
        else:
            # LSN 0 never was: to start there is to start at the beginning.
            start = max(place, 1)
            if start > last + 1:
                self._check_damage(source)
                ahead = Bookmark(start - 1, epoch_of(history))
                raise LogDivergedError(source.path, ahead, last)
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

    def _entered(self) -> Reading:
        if self._reading is None:
            raise RuntimeError(f"enter the stream first: async with {self._entering}")
        return self._reading

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
