"""Reading records from a log's files: the blocking half, usable without trio.

Law: used by one thread at a time; gives nothing from ``stop`` on, which is where the caller knows
durability to end.  What a cursor meets that is not as it must be, it raises as damage; whether
the log has only changed meanwhile is for the caller to find out, who can look again.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Final, Protocol

import msgspec

from trio_wal._engine import Moved, Record
from trio_wal._exceptions import CorruptLogError
from trio_wal._files import File, close_quietly
from trio_wal._util import KiB

from . import scan
from .chain import FoundSegment, joins
from .frame import FrameError, Kind, SegmentHeader, to_datetime
from .scan import FrameScanner, Position, start_of

CHUNK_BYTES: Final = 512 * KiB
"""Payload decoded per call: some 5,000 records of 100 bytes."""


class Ended(Moved):
    """The segment that should have a record ends before it, and no other is known to have it."""


class Place(msgspec.Struct, frozen=True):
    """Where to start reading an LSN."""

    header: SegmentHeader
    file: File
    position: Position
    chained: bool
    """Whether the checksum of the frame before is known."""
    following: SegmentHeader | None
    """The segment behind, where there is one: nothing from its first LSN on may be taken from
    this file."""


class Locator(Protocol):
    """What a cursor asks where things are."""

    def locate(self, lsn: int) -> Place:
        """The place of the record, or, above the last one, of the log's end.

        Raises:
          FileNotFoundError, Moved
        """
        ...

    def release(self, header: SegmentHeader) -> None:
        """The place's file was closed."""
        ...


def place_in(
    file: File,
    found: FoundSegment,
    lsn: int,
    following: SegmentHeader | None,
    index: tuple[tuple[int, int], ...] | None = None,
) -> Place:
    """The nearest known frame at or before ``lsn``: by an index in memory, or by the one in
    the segment's footer."""
    header = found.header
    if index is None:
        index = scan.footer_index(file.pread, header, found.pointer)
    nearest = [offset for first, offset in index if first <= lsn][-1:]
    if nearest:
        frame = scan.frame_at(file.pread, header, nearest[0])
        if frame is not None and frame.kind is Kind.DATA and frame.first_lsn <= lsn:
            position = Position(frame.offset, frame.first_lsn, frame.previous)
            return Place(header, file, position, False, following)
    return Place(header, file, start_of(header), True, following)


class Cursor:
    """Goes through the records of a log, from one segment to the next."""

    def __init__(
        self, locator: Locator, next_lsn: int, give_way: Callable[[], None] | None = None
    ) -> None:
        self.next_lsn = next_lsn
        self._give_way = give_way
        """Called after each frame."""
        self._locator = locator
        self._place: Place | None = None
        self._scanner: FrameScanner | None = None

    def chunk(self, stop: int) -> list[Record]:
        """The next records below ``stop``, which are known to be durable.

        What is wrong behind records that can be given is raised by the next call.

        Raises:
          CorruptLogError, OSError, Moved
        """
        records: list[Record] = []
        try:
            self._collect(records, stop)
        except (CorruptLogError, OSError, Moved):
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
                raise Ended(place.file.path, reason, place.position.offset)
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
            if place.following is not None and frame.next_lsn >= place.following.first_lsn:
                # Or it may be of another history; and who begins after it sees only what follows.
                self._check_join(place, scanner, place.following)
            try:
                data = scan.payloads(frame, body)
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
            if self._give_way is not None:
                self._give_way()
            if end < frame.next_lsn:
                # The rest of this frame is asked for later, if at all.
                self.leave()

    def _open(self) -> tuple[Place, FrameScanner]:
        place, scanner = self._place, self._scanner
        if place is not None and scanner is not None:
            following = place.following
            if following is None or scanner.position.next_lsn < following.first_lsn:
                return place, scanner
            self._check_join(place, scanner, following)
            self.leave()
        return self._enter(self._locator.locate(self.next_lsn))

    def _enter(self, place: Place, position: Position | None = None) -> tuple[Place, FrameScanner]:
        self._place = place
        at, chained = (place.position, place.chained) if position is None else (position, True)
        scanner = self._scanner = FrameScanner(place.file.pread, place.header, at, chained=chained)
        return place, scanner

    def _check_join(self, place: Place, scanner: FrameScanner, following: SegmentHeader) -> None:
        """The next segment must begin with the checksum of the last frame before it."""
        for frame, _ in scanner if not joins(scanner.position, following) else ():
            # Marks of closing may stand between, and belong to the chain or not.
            if frame.kind is not Kind.CLOSE or joins(scanner.position, following):
                break
        if not joins(scanner.position, following):
            reason = f"the segment {following.name} does not continue this one"
            raise CorruptLogError(place.file.path, scanner.position.offset, reason)

    def _at_end(self, place: Place, scanner: FrameScanner) -> None:
        """No frame where one must be: the file has grown since it was looked at, or the
        log goes on in the next segment, or it is damaged."""
        reached = scanner.position
        self.leave()
        fresh = self._locator.locate(self.next_lsn)
        # At once: what cannot be read from here on is left as any other.
        self._enter(fresh)
        if fresh.header != place.header:
            return
        again = FrameScanner(fresh.file.pread, fresh.header, reached)
        if next(iter(again), None) is None:
            raise CorruptLogError(
                fresh.file.path,
                again.position.offset,
                again.reason or f"the frame of LSN {again.position.next_lsn} is missing",
            )
        self._enter(fresh, reached)

    def leave(self) -> None:
        """Let go of the segment."""
        place, self._place, self._scanner = self._place, None, None
        if place is not None:
            close_quietly(place.file)
            self._locator.release(place.header)
