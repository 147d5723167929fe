"""Reading records, in this process or beside the one that writes.

Law: chunks are read and decoded in a worker thread and handed over whole; the event
loop only makes `Record`s of them.  Nothing that is not durable is ever given out.  A
reader never writes and takes no lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from itertools import repeat
from types import TracebackType
from typing import Final, Protocol, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from . import _scan
from ._directory import LogDirectory
from ._exceptions import CorruptLogError, LsnTruncatedError
from ._files import Directory, File, Files, OsFiles, close_quietly
from ._flusher import Flusher
from ._frame import FrameError, Kind, SegmentHeader, to_datetime
from ._queue import State, WriteQueue
from ._recovery import FoundSegment, find_segments, look_at, read_meta, read_segment
from ._scan import FrameScanner, Position, start_of
from ._util import KiB, check_int, check_path
from ._worker import Blocking

CHUNK_BYTES: Final = 512 * KiB
CHECKPOINT_RECORDS: Final = 1024
"""Of those that are ready, between two checkpoints: about half a millisecond."""
"""Payload decoded per thread call: some 5,000 records of 100 bytes."""
POLL_SECONDS: Final = 0.02
"""How often the files of another process's log are looked at for news."""
RETRY_SECONDS: Final = 0.002
LOOK_TRIES: Final = 20


@final
@attrs.frozen
class Record:
    """One record of the log."""

    lsn: int
    timestamp: datetime
    """UTC, of its batch; never decreasing along the log."""
    data: bytes


class _Moved(Exception):
    """The log changed under the reader; look again."""


@attrs.frozen
class Place:
    """Where to start reading an LSN."""

    header: SegmentHeader
    file: File
    position: Position
    chained: bool
    limit_lsn: int | None
    """First LSN of the segment behind, where there is one: nothing from there on may be
    taken from this file."""


class Source(Protocol):
    """A log that can be read: this process's own, or another's."""

    path: str
    blocking: Blocking

    @property
    def first_lsn(self) -> int: ...

    @property
    def durable_lsn(self) -> int: ...

    async def refresh(self) -> None:
        """Bring the two above up to date; no checkpoint where that takes no time."""
        ...

    def generation(self) -> int:
        """Changes whenever the log's end may have been cut."""
        ...

    def cutting(self) -> bool:
        """Whether that is under way."""
        ...

    def locate(self, lsn: int) -> Place:
        """Blocking.  Raises `FileNotFoundError`, `_Moved`."""
        ...

    def release(self, header: SegmentHeader) -> None: ...

    async def wait_durable_after(self, lsn: int) -> bool:
        """Wait until more than ``lsn`` is durable, or the end was cut; False: there will be
        no more."""
        ...

    def watch(self, stream: RecordStream) -> None: ...

    def unwatch(self, stream: RecordStream) -> None: ...


def place_in(
    file: File,
    found: FoundSegment,
    lsn: int,
    limit_lsn: int | None,
    index: tuple[tuple[int, int], ...] | None = None,
) -> Place:
    """The nearest known frame at or before ``lsn``: by an index in memory, or by the one in
    the segment's footer."""
    header = found.header
    if index is None:
        index = _scan.footer_index(file.pread, header, found.pointer)
    nearest = [offset for first, offset in index if first <= lsn][-1:]
    if nearest:
        frame = _scan.frame_at(file.pread, header, nearest[0])
        if frame is not None and frame.kind is Kind.DATA and frame.first_lsn <= lsn:
            position = Position(frame.offset, frame.first_lsn, frame.previous)
            return Place(header, file, position, False, limit_lsn)
    return Place(header, file, start_of(header), True, limit_lsn)


class _Cursor:
    """The blocking half of a `RecordStream`: used by one thread at a time."""

    def __init__(self, source: Source, next_lsn: int) -> None:
        self.next_lsn = next_lsn
        self._source = source
        self._place: Place | None = None
        self._scanner: FrameScanner | None = None

    def chunk(self, stop: int) -> list[Record]:
        """The next records below ``stop``, which are known to be durable.

        What is wrong behind records that can be given is raised by the next call.
        """
        records: list[Record] = []
        try:
            self._collect(records, stop)
        except (CorruptLogError, OSError, _Moved):
            self.leave()
            if not records:
                raise
        return records

    def _collect(self, records: list[Record], stop: int) -> None:
        size = 0
        ended: SegmentHeader | None = None
        while self.next_lsn < stop and size < CHUNK_BYTES:
            place, scanner = self._open()
            if place.header == ended:
                # Its footer was read, and no other segment has the record.
                reason = f"the segment ends before LSN {self.next_lsn}"
                raise CorruptLogError(place.file.path, place.position.offset, reason)
            frame_body = next(iter(scanner), None)
            if frame_body is None:
                self._at_end(place, scanner)
                continue
            frame, body = frame_body
            if frame.kind is Kind.SEAL:
                ended = place.header
                self.leave()
            if frame.kind is not Kind.DATA or frame.next_lsn <= self.next_lsn:
                continue
            try:
                data = _scan.payloads(frame, body)
            except FrameError as exc:
                raise CorruptLogError(place.file.path, frame.offset, str(exc)) from exc
            skip = self.next_lsn - frame.first_lsn
            end = min(frame.next_lsn, stop)
            if skip or end < frame.next_lsn:
                data = data[skip : end - frame.first_lsn]
            timestamp = to_datetime(frame.time_us)
            records.extend(map(Record, range(self.next_lsn, end), repeat(timestamp), data))
            size += frame.stored_length
            self.next_lsn = end
            if end < frame.next_lsn:
                # The rest of this frame is asked for later, if at all.
                self.leave()

    def _open(self) -> tuple[Place, FrameScanner]:
        place, scanner = self._place, self._scanner
        if place is not None and scanner is not None:
            if place.limit_lsn is None or scanner.position.next_lsn < place.limit_lsn:
                return place, scanner
            self.leave()
        place = self._place = self._source.locate(self.next_lsn)
        scanner = self._scanner = FrameScanner(
            place.file.pread, place.header, place.position, chained=place.chained
        )
        return place, scanner

    def _at_end(self, place: Place, scanner: FrameScanner) -> None:
        """No frame where one must be: the file has grown since it was looked at, or the
        log goes on in the next segment, or it is damaged."""
        reached = scanner.position
        self.leave()
        fresh = self._source.locate(self.next_lsn)
        if fresh.header != place.header:
            self._place = fresh
            self._scanner = FrameScanner(
                fresh.file.pread, fresh.header, fresh.position, chained=fresh.chained
            )
            return
        again = FrameScanner(fresh.file.pread, fresh.header, reached)
        if next(iter(again), None) is None:
            path = fresh.file.path
            fresh.file.close()
            self._source.release(fresh.header)
            raise CorruptLogError(
                path,
                again.position.offset,
                again.reason or f"the frame of LSN {again.position.next_lsn} is missing",
            )
        self._place = fresh
        self._scanner = FrameScanner(fresh.file.pread, fresh.header, reached)

    def leave(self) -> None:
        """Let go of the segment."""
        place, self._place, self._scanner = self._place, None, None
        if place is not None:
            close_quietly(place.file)
            self._source.release(place.header)


@final
class RecordStream(AbstractAsyncContextManager["RecordStream"], AsyncIterator[Record]):
    """Records of a log, in LSN order; what ``read()`` and ``follow()`` return.

    Enter it with ``async with`` and iterate with ``async for``.  Entering, each chunk of
    records read from disk and every 1,024 records are checkpoints.  One task iterates at a
    time.
    """

    def __init__(
        self, source: Source, start: int | None, stop: int | None, *, follow: bool
    ) -> None:
        if start is not None:
            check_int("start", start, 0)
        if stop is not None:
            check_int("stop", stop, 0)
        self._source = source
        self._start = start
        self._stop = stop
        self._follow = follow
        self._cursor: _Cursor | None = None
        self._ready: list[Record] = []
        self._generation = 0
        self._overtaken = False
        self._begin = 0
        """The LSN that is, or was, given first."""
        self._due = 0
        """The LSN that is given next, where none is ready."""
        self._busy = False
        self._ended = False

    async def __aenter__(self) -> RecordStream:
        if self._cursor is not None:
            raise RuntimeError("a stream of records is for one use")
        await trio.lowlevel.checkpoint()
        source = self._source
        await source.refresh()
        first = source.first_lsn
        # LSN 0 never was: to start there is to start at the beginning.
        start = first if self._start is None else max(self._start, 1)
        if start < first:
            raise LsnTruncatedError(first, start)
        if not self._follow:
            end = source.durable_lsn + 1
            self._stop = end if self._stop is None else min(self._stop, end)
        self._begin = self._due = start
        self._cursor = _Cursor(source, start)
        self._generation = source.generation()
        source.watch(self)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        cursor = self._cursor
        self._ended = True
        self._ready.clear()
        self._source.unwatch(self)
        if cursor is not None and not self._busy:
            cursor.leave()

    def cut(self, lsn: int) -> None:
        """The log's end was cut behind ``lsn``."""
        ready = self._ready
        due = ready[-1].lsn if ready else self._due
        if due > max(self._begin, lsn + 1):
            # Records that were given are no longer in the log.
            self._overtaken = True
            ready.clear()
        elif ready and self._cursor is not None:
            # The newest stands first.
            del ready[: max(0, ready[0].lsn - lsn)]
            self._cursor.next_lsn = self._due = ready[0].lsn + 1 if ready else due
        if self._stop is not None:
            self._stop = min(self._stop, lsn + 1)

    def __aiter__(self) -> RecordStream:
        return self

    async def __anext__(self) -> Record:
        ready = self._ready
        if len(ready) % CHECKPOINT_RECORDS:
            return ready.pop()
        return await self._next_chunk()

    @enable_ki_protection
    async def _next_chunk(self) -> Record:
        if self._cursor is None:
            raise RuntimeError("enter the stream first: async with log.read() as records")
        if self._busy:
            raise trio.BusyResourceError("another task is reading this stream")
        self._busy = True
        try:
            if self._ready:
                # Of a large batch: whoever iterates must not keep the event loop for long.
                await trio.lowlevel.checkpoint()
            while not self._ready:
                if self._ended:
                    raise trio.ClosedResourceError("this stream of records is closed")
                if self._overtaken:
                    raise LsnTruncatedError(self._source.first_lsn, self._cursor.next_lsn)
                if not await self._fill(self._cursor):
                    await trio.lowlevel.checkpoint()
                    raise StopAsyncIteration
            return self._ready.pop()
        finally:
            self._busy = False
            if self._ended:
                self._cursor.leave()

    async def _fill(self, cursor: _Cursor) -> bool:
        """Try to get records ready; False at the end."""
        source = self._source
        self._due = cursor.next_lsn
        if self._stop is not None and cursor.next_lsn >= self._stop:
            return False
        if cursor.next_lsn > source.durable_lsn:
            await source.refresh()
            if cursor.next_lsn > max(self._begin, source.durable_lsn + 1):
                # What was given out is no longer in the log.
                raise LsnTruncatedError(source.first_lsn, cursor.next_lsn)
            if cursor.next_lsn > source.durable_lsn:
                return self._follow and await source.wait_durable_after(cursor.next_lsn - 1)
        if cursor.next_lsn < source.first_lsn:
            raise LsnTruncatedError(source.first_lsn, cursor.next_lsn)
        stop = source.durable_lsn + 1
        if self._stop is not None:
            stop = min(stop, self._stop)
        generation = source.generation()
        if generation != self._generation:
            self._generation = generation
            cursor.leave()
        before = cursor.next_lsn
        try:
            records = await source.blocking(cursor.chunk, stop)
        except (CorruptLogError, FileNotFoundError, _Moved) as exc:
            cursor.next_lsn = before
            cursor.leave()
            await self._explain(exc, generation)
            return True
        if not self._overtaken and generation == source.generation():
            records.reverse()
            self._ready = records
        else:
            cursor.next_lsn = before
        return True

    async def _explain(self, exc: Exception, generation: int) -> None:
        """Damage, or only a log that was truncated meanwhile?"""
        source = self._source
        await trio.sleep(RETRY_SECONDS)
        await source.refresh()
        assert self._cursor is not None
        if self._cursor.next_lsn < source.first_lsn:
            raise LsnTruncatedError(source.first_lsn, self._cursor.next_lsn) from exc
        if isinstance(exc, _Moved) or generation != source.generation():
            return
        if source.cutting() or self._cursor.next_lsn > source.durable_lsn:
            return
        if isinstance(exc, CorruptLogError):
            raise exc
        raise CorruptLogError(str(exc.filename), 0, "the segment is missing") from exc  # type: ignore[attr-defined]


# -- this process's own log -------------------------------------------------------


class WalSource:
    """The log that this process has open."""

    def __init__(
        self, directory: LogDirectory, flusher: Flusher, queue: WriteQueue, blocking: Blocking
    ) -> None:
        self.path: str = directory.path
        self.blocking = blocking
        self._directory = directory
        self._flusher = flusher
        self._queue = queue

    @property
    def first_lsn(self) -> int:
        return self._directory.first_lsn

    @property
    def durable_lsn(self) -> int:
        # The flusher hears of a cut only when it is done.
        return min(self._flusher.durable_lsn, self._directory.last_lsn)

    async def refresh(self) -> None:
        pass

    def generation(self) -> int:
        return self._directory.cuts + self._flusher.cuts

    def cutting(self) -> bool:
        failed = self._directory.cut_failed
        if failed is not None:
            # What the reader misses may be cut off or not: only recovery can tell.
            raise self._queue.failed("unknown", failed)
        return self._directory.cutting

    def locate(self, lsn: int) -> Place:
        directory = self._directory
        sealed, active = directory.shape()
        following: SegmentHeader = active.header
        index: tuple[tuple[int, int], ...] | None = tuple(active.index)
        limit: int | None = None
        if active.header.first_lsn > lsn:
            behind = [segment for segment in sealed if segment.first_lsn <= lsn < segment.next_lsn]
            if not behind:
                raise _Moved
            following, limit, index = behind[-1].header, behind[-1].next_lsn, None
        directory.pin(following)
        try:
            file = directory.open_segment(following)
            try:
                found = look_at(file, following.name)
                if found.header != following:
                    raise _Moved
                return place_in(file, found, lsn, limit, index)
            except BaseException:
                close_quietly(file)
                raise
        except BaseException:
            directory.unpin(following)
            raise

    def release(self, header: SegmentHeader) -> None:
        self._directory.unpin(header)

    async def wait_durable_after(self, lsn: int) -> bool:
        flusher = self._flusher
        cuts = flusher.cuts
        while self.durable_lsn <= lsn and flusher.cuts == cuts:
            if flusher.done.is_set():
                if self._queue.state is State.FAILED:
                    self._queue.check_open(self._queue.loss)
                return False
            await flusher.followers.park()
        return True

    def watch(self, stream: RecordStream) -> None:
        self._flusher.streams.add(stream)

    def unwatch(self, stream: RecordStream) -> None:
        self._flusher.streams.discard(stream)


# -- another process's log --------------------------------------------------------


class _ReaderSource:
    """A directory that another process may be writing."""

    def __init__(self, directory: Directory, blocking: Blocking) -> None:
        self.path: str = directory.path
        self.blocking = blocking
        self._directory = directory
        self._names: list[str] = []
        self._segments: list[FoundSegment] = []
        self._first_lsn = 1
        self._durable_lsn = 0
        self._watermark = 0
        self._tail: tuple[SegmentHeader, Position] | None = None
        self._cuts = 0
        self._looking = threading.Lock()

    @property
    def first_lsn(self) -> int:
        return self._first_lsn

    @property
    def durable_lsn(self) -> int:
        return self._durable_lsn

    def generation(self) -> int:
        return self._cuts

    def cutting(self) -> bool:
        return False

    async def refresh(self) -> None:
        await self.blocking(self.look)

    def look(self) -> None:
        """Read what has changed; blocking.

        The writer may be in the middle of a rotation or truncation: what looks damaged is
        looked at again, and believed only when the directory stands still.
        """
        with self._looking:
            for _ in range(LOOK_TRIES):
                before = self._fingerprint()
                try:
                    self._look_once()
                    return
                except (CorruptLogError, FileNotFoundError):
                    if self._fingerprint() == before:
                        raise
            self._look_once()

    def _fingerprint(self) -> object:
        return self._directory.names(), read_meta(self._directory)

    def _look_once(self) -> None:
        meta = read_meta(self._directory)
        if meta is None:
            raise CorruptLogError(self.path, 0, "there is no log here: log.meta is missing")
        if not meta.live:
            self._first_lsn, self._durable_lsn, self._segments = 1, 0, []
            return
        names = self._directory.names()
        if names != self._names or meta.base_lsn != self._first_lsn or self._end_replaced():
            self._segments, _ = find_segments(self._directory, meta)
            self._names = names
            self._first_lsn = meta.base_lsn
        self._find_durable()

    def _end_replaced(self) -> bool:
        """Whether a recovery or truncation put another segment under the last one's name."""
        last = self._segments[-1]
        return read_segment(self._directory, last.file_name).header != last.header

    def _find_durable(self) -> None:
        """The highest LSN that some frame, or the owner's word, says is durable."""
        last = self._segments[-1]
        if self._tail is None or self._tail[0] != last.header:
            if self._tail is not None and last.header.first_lsn < self._tail[1].next_lsn:
                self._cuts += 1
                self._durable_lsn = 0
            self._tail = (last.header, start_of(last.header))
            self._watermark = last.header.first_lsn - 1
        position = self._tail[1]
        file = self._directory.open(last.file_name)
        try:
            # Most looks find nothing new: one small read.
            if _scan.frame_at(file.pread, last.header, position.offset) is not None:
                scanner = FrameScanner(file.pread, last.header, position, bodies=False)
                for frame, _ in scanner:
                    self._watermark = max(self._watermark, frame.durable_lsn)
                position = scanner.position
        finally:
            file.close()
        self._tail = (last.header, position)
        published = min(self._directory.published(), position.next_lsn - 1)
        # What once was durable is, unless the end was cut: an unlinked lock file says nothing.
        self._durable_lsn = max(self._durable_lsn, self._watermark, published)

    def locate(self, lsn: int) -> Place:
        found = [s for s in self._segments if s.header.first_lsn <= lsn]
        if not found:
            raise _Moved
        segment = found[-1]
        behind = self._segments[len(found) :]
        try:
            file = self._directory.open(segment.file_name)
        except FileNotFoundError:
            if self._directory.names() != self._names:
                # Renamed or dropped since the last look.
                raise _Moved from None
            raise
        try:
            fresh = look_at(file, segment.file_name)
            if fresh.header != segment.header:
                self._names = []
                raise _Moved
            limit = behind[0].header.first_lsn if behind else None
            return place_in(file, fresh, lsn, limit)
        except BaseException:
            close_quietly(file)
            raise

    def release(self, header: SegmentHeader) -> None:
        pass

    async def wait_durable_after(self, lsn: int) -> bool:
        while self._durable_lsn <= lsn:
            await trio.sleep(POLL_SECONDS)
            await self.refresh()
        return True

    def watch(self, stream: RecordStream) -> None:
        pass

    def unwatch(self, stream: RecordStream) -> None:
        pass


@final
class LogReader:
    """A look at a log without owning it; what `open_reader` gives.

    Takes no lock and writes nothing; the log may be written by another process all the
    while.  Durable records only.
    """

    def __init__(self, directory: Directory, source: _ReaderSource) -> None:
        self._directory = directory
        self._source = source
        self._closed = False

    @property
    def path(self) -> str:
        """The log's directory."""
        return self._source.path

    @property
    def first_lsn(self) -> int:
        """The oldest record now; reads a few blocks of the log's files."""
        self._look()
        return self._source.first_lsn

    @property
    def durable_lsn(self) -> int:
        """The newest record known to be durable now; reads a few blocks of the log's files."""
        self._look()
        return self._source.durable_lsn

    def _look(self) -> None:
        self._check_open()
        self._source.look()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"{self.path}: this reader is closed")

    def read(self, start: int | None = None, stop: int | None = None) -> RecordStream:
        """As `WriteAheadLog.read`."""
        self._check_open()
        return RecordStream(self._source, start, stop, follow=False)

    def follow(self, start: int | None = None) -> RecordStream:
        """As `WriteAheadLog.follow`, until it is left: the writer may come and go.

        New records are looked for every 20 ms.
        """
        self._check_open()
        return RecordStream(self._source, start, None, follow=True)

    async def aclose(self) -> None:
        """Close the reader; a checkpoint; idempotent.

        Streams that go on reading get `trio.ClosedResourceError`.
        """
        await self._close()
        await trio.lowlevel.checkpoint()

    async def _close(self) -> None:
        if not self._closed:
            self._closed = True
            with trio.CancelScope(shield=True):
                await self._source.blocking.close()
            self._directory.close()


@final
class _OpenReader(AbstractAsyncContextManager[LogReader]):
    def __init__(self, path: str, files: Files) -> None:
        self._path = path
        self._files = files
        self._reader: LogReader | None = None

    async def __aenter__(self) -> LogReader:
        if self._reader is not None:
            raise RuntimeError("open_reader() gives a context manager for one use")
        blocking = Blocking(threaded=self._files.threaded)
        directory = await blocking(self._files.open_directory, self._path)
        try:
            source = _ReaderSource(directory, blocking)
            await source.refresh()
        except BaseException:
            close_quietly(directory)
            raise
        self._reader = LogReader(directory, source)
        return self._reader

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._reader is not None:
            await self._reader._close()


def open_reader(
    path: str | os.PathLike[str], *, files: Files | None = None
) -> AbstractAsyncContextManager[LogReader]:
    """Read a log that this or another process may be writing; needs no lock, never writes.

    ::

        async with trio_wal.open_reader("orders.wal") as reader:
            async with reader.follow() as records:
                async for record in records:
                    ...

    Args:
      path: the log's directory.
      files: another file system, such as `trio_wal.testing.MemoryFiles`.

    Raises, on entering:
      FileNotFoundError: there is nothing at ``path``.
      CorruptLogError, UnsupportedFormatError: it is no log that can be read.
    """
    return _OpenReader(check_path(path), OsFiles() if files is None else files)
