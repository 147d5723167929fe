"""One segment file: making it, writing frames to its end, sealing it.

Law: blocking; no trio.  A frame goes to the file with one write, and nothing here
decides when to sync but `seal` and `mark_closed`, which are whole only with one.
What a crash leaves behind is judged in `recovery`, never here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from trio_wal import _codec
from trio_wal._files import Directory, File
from trio_wal._util import MiB

from .frame import (
    BLOCK,
    DATA_OFFSET,
    FEATURE_ZSTD,
    FRAME_HEADER_SIZE,
    POINTER_OFFSET,
    Codec,
    Footer,
    FrameHeader,
    Kind,
    Pointer,
    SegmentHeader,
    crc32c,
    encode_body,
    encode_frame_header,
    encode_pointer,
    footer_reserve,
    frame_size,
    index_step,
    terminator_end,
)
from .scan import Position, start_of

FIRST_CAPACITY: Final = 1 * MiB
"""The first segment of a log is small, so that a log is open within milliseconds and a
short one stays small; each next one is four times as large, up to ``segment_size``."""
CAPACITY_GROWTH: Final = 4
SPARE_PREFIX: Final = "spare-"
NEW_NAME: Final = "segment.tmp"


class SegmentInfo(msgspec.Struct, frozen=True):
    """A sealed segment, as the rest of the log needs to know it."""

    header: SegmentHeader
    next_lsn: int
    """First LSN of the segment behind it."""
    bytes: int
    last_time_us: int

    @property
    def name(self) -> str:
        return self.header.name

    @property
    def first_lsn(self) -> int:
        return self.header.first_lsn


class Extent(msgspec.Struct, frozen=True):
    """A segment up to a place: what a frame written there must fit, and what a footer counts."""

    header: SegmentHeader
    capacity: int
    """Bytes of the file."""
    end: Position
    """The place."""
    frames: int = 0
    """Data frames before it."""
    index: tuple[tuple[int, int], ...] = ()
    """(first LSN, offset) of some of them."""

    @classmethod
    def empty(cls, header: SegmentHeader, capacity: int) -> Extent:
        """Up to the place of the first frame."""
        return cls(header, capacity, start_of(header))

    @property
    def records(self) -> int:
        return self.end.next_lsn - self.header.first_lsn


class Body(msgspec.Struct, frozen=True):
    """Records encoded, and compressed where the log is."""

    pieces: list[bytes]
    codec: Codec
    count: int
    stored_length: int
    raw_length: int
    crc: int


def encode(records: Sequence[bytes], features: int = 0) -> Body:
    pieces = encode_body(records)
    raw = sum(map(len, pieces))
    codec = Codec.NONE
    if features & FEATURE_ZSTD:
        pieces, codec = _codec.compress(pieces)
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    stored = raw if codec is Codec.NONE else len(pieces[0])
    return Body(pieces, codec, len(records), stored, raw, crc)


def capacity_for(stored_length: int, wanted: int) -> int:
    """At least ``wanted``, and enough for a frame of this length."""
    return max(wanted, DATA_OFFSET + frame_size(stored_length) + footer_reserve(wanted) + BLOCK)


class ActiveSegment:
    """The segment that is being written: its end, its counts, its index.

    Touched by one thread at a time.  ``index`` only grows, so that a reader in
    another thread may copy it.
    """

    def __init__(
        self,
        file: File,
        extent: Extent,
        *,
        has_pointer: bool = False,
        marks_offset: int | None = None,
        settled: int = 0,
        written: int = 0,
    ) -> None:
        header = extent.header
        self.file = file
        self.header: SegmentHeader = header
        self.capacity: int = extent.capacity
        self._settled = settled
        """So many bytes had been written, as zeros for one, and synced: a frame there stands in
        place.  Only a first look at them tells; what is written meanwhile does not count."""
        self._written = written
        """The same, but for the sync: the next one settles them."""
        self.position: Position = extent.end
        self.frames: int = extent.frames
        self.index: list[tuple[int, int]] = list(extent.index)
        self._seed = header.seed
        self._reserve = footer_reserve(extent.capacity)
        self._index_step = index_step(extent.capacity)
        self._has_pointer = has_pointer
        self._marks_offset = marks_offset
        """From here to the position stand CLOSE frames that recovery read, but whose sync
        may have failed: they may be in the page cache only."""

    def fits(self, stored_length: int) -> bool:
        end = self.position.offset + frame_size(stored_length) + self._reserve
        return end <= self.capacity

    @property
    def records(self) -> int:
        return self.position.next_lsn - self.header.first_lsn

    @property
    def extent(self) -> Extent:
        """All of it, as it is now."""
        return Extent(self.header, self.capacity, self.position, self.frames, tuple(self.index))

    @property
    def mean_frame_bytes(self) -> int:
        return (self.position.offset - DATA_OFFSET) // max(1, self.frames)

    def write(self, body: Body, durable_lsn: int, time_us: int) -> None:
        """Put the records behind the last frame; not durable before a sync."""
        if self._has_pointer:
            # The same sync covers this and the frame: once a record is acknowledged, no
            # pointer says any more that the log ended before it.
            self.file.pwrite([bytes(BLOCK)], POINTER_OFFSET)
            self._has_pointer = False
        here = self.position
        self._write_frame(Kind.DATA, body, durable_lsn, max(time_us, here.time_us))
        if not self.index or here.offset - self.index[-1][1] >= self._index_step:
            self.index.append((here.next_lsn, here.offset))
        self.frames += 1

    def _write_frame(self, kind: Kind, body: Body, durable_lsn: int, time_us: int) -> FrameHeader:
        self.rewrite_marks()
        here = self.position
        frame = FrameHeader(
            kind=kind,
            offset=here.offset,
            first_lsn=here.next_lsn,
            durable_lsn=durable_lsn,
            time_us=time_us,
            count=body.count,
            codec=body.codec,
            stored_length=body.stored_length,
            raw_length=body.raw_length,
            body_crc=body.crc,
            previous=here.previous,
            crc=0,
        )
        head = encode_frame_header(frame, self._seed)
        end = frame.end
        if self.header.reused and kind is not Kind.SEAL:
            # In the same write, and so in the same sync: what once was durable behind the end,
            # as long as the file was another segment, must not stand right behind it.
            end = terminator_end(end, self.capacity)
        padding = bytes(end - here.offset - FRAME_HEADER_SIZE - body.stored_length)
        self.file.pwrite([head, *body.pieces, padding], here.offset)
        crc = int.from_bytes(head[4:8], "little")
        self.position = Position(frame.end, frame.next_lsn, crc, durable_lsn, time_us)
        return frame

    def sync(self) -> None:
        """On return all that was written is durable."""
        if self.position.offset <= self._settled:
            self.file.sync(in_place=True)
        else:
            self.file.sync()
            self._settled = max(self._settled, self._written)

    def rewrite_marks(self) -> bool:
        """Have the next sync cover the CLOSE frames at the end: nothing may be chained to
        one that is not there.  Returns whether there are any."""
        start, end = self._marks_offset, self.position.offset
        self._marks_offset = None
        if start is None or start == end:
            return False
        self.file.pwrite([self.file.pread(end - start, start)], start)
        return True

    def _write_end(self, kind: Kind) -> None:
        """A SEAL or CLOSE frame and the pointer to it.  Everything before it is durable."""
        here = self.position
        last_lsn = here.next_lsn - 1
        raw = Footer(self.records, last_lsn, self.frames, tuple(self.index)).encode()
        body = Body([raw], Codec.NONE, 0, len(raw), len(raw), crc32c(raw))
        self._write_frame(kind, body, last_lsn, here.time_us)
        pointer = Pointer(kind, here.offset, last_lsn, self.position.previous)
        self.file.pwrite([encode_pointer(pointer, self._seed)], POINTER_OFFSET)
        self._has_pointer = True
        self.file.sync()

    def mark_closed(self) -> None:
        """Write down, durably, that the log was closed here and all before is durable."""
        self._write_end(Kind.CLOSE)

    def seal(self) -> SegmentInfo:
        """Write the footer, durably, as the file's last bytes, and close the file.

        The segment behind this one must be durable already, with a copy of every frame
        that may still stand behind the end of this one: those are cut off first.
        """
        try:
            self.file.truncate(self.position.offset)
            self._write_end(Kind.SEAL)
        finally:
            self.file.close()
        end = self.position.offset
        return SegmentInfo(self.header, self.position.next_lsn, end, self.position.time_us)


def create_segment(
    directory: Directory,
    file: File,
    old_name: str,
    header: SegmentHeader,
    capacity: int,
    written: int,
) -> ActiveSegment:
    """Turn a prepared file into a segment, durable under its final name.

    Args:
      written: so many bytes of it were written, and synced.

    Nothing is lost where a crash comes between: the file keeps a name that recovery
    clears away.
    """
    write_header(file, header, capacity)
    file.sync()
    directory.rename(old_name, header.name)
    directory.sync()
    return ActiveSegment(file, Extent.empty(header, capacity), settled=written)


def write_header(file: File, header: SegmentHeader, capacity: int) -> None:
    """Put the header into a file of zeros; in one of old bytes also all that stands between it and
    the first frame, and the terminator."""
    zeros = terminator_end(DATA_OFFSET, capacity) - BLOCK if header.reused else 0
    file.pwrite([header.encode(), bytes(zeros)], 0)


__all__ = [
    "ActiveSegment",
    "Body",
    "Extent",
    "SegmentInfo",
    "capacity_for",
    "create_segment",
    "encode",
    "write_header",
]
