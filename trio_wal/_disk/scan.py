"""Bytes of one segment -> frames, or a verdict on where and why they end.

Law: pure.  Bytes come from a `Read` callable; nothing is written, and no decision
about other segments is made here (that is `recovery`).  A length is believed only
after the checksum of the header that holds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from trio_wal import _codec
from trio_wal._util import KiB, MiB, align_up

from .frame import (
    BLOCK,
    DATA_OFFSET,
    FRAME_HEADER_SIZE,
    FRAME_MAGIC,
    POINTER_OFFSET,
    Codec,
    Footer,
    FrameError,
    FrameHeader,
    Kind,
    Pointer,
    SegmentHeader,
    check_table,
    crc32c,
    decode_body,
    decode_footer,
    decode_frame_header,
    decode_pointer,
    frame_size,
    has_equal_table,
)
from .window import APART, Read, Window

NextData = Callable[[int], int]
"""``next_data(offset)``: as `File.next_data`."""

WINDOW: Final = 1 * MiB
SKIM_WINDOW: Final = 512 * KiB
"""Where nothing is kept: so little stays in the processor's cache, and in memory that an
allocator does not give back and take anew."""
_ZEROS: Final = bytes(SKIM_WINDOW)
_HEADER: Final = re.compile(
    rb"%b(?=.{32}[%b][%b]\0\0.{16}\0)"
    % tuple(map(re.escape, (FRAME_MAGIC, bytes([*Kind]), bytes([*Codec])))),
    re.DOTALL,
)
"""What may be a frame's header: magic, then a kind, a codec, no flags, and an offset that may be a
multiple of a block.  Records may be full of magics, and stand behind the end of a log for long."""


class Position(msgspec.Struct, frozen=True):
    """Between two frames: everything that the next frame must fit."""

    offset: int
    next_lsn: int
    previous: int
    durable_lsn: int = 0
    time_us: int = 0

    @property
    def fields(self) -> tuple[int, int, int, int, int]:
        return self.offset, self.next_lsn, self.previous, self.durable_lsn, self.time_us


def start_of(header: SegmentHeader) -> Position:
    return Position(DATA_OFFSET, header.first_lsn, header.digest, header.first_lsn - 1)


class FrameScanner:
    """Walks the frames of one segment from a position on.

    Iterating yields ``(header, stored body)`` of each valid frame.  When it ends,
    ``position`` is where the next frame would stand and ``reason`` says why what
    stands there is none ("" where there is nothing but zeros or the file's end).

    ``chained=False`` is for a walk that starts in the middle, where the checksum of
    the frame before is not known: the first frame is then taken as it stands.

    ``skim=True`` is for who only checks: of a long body that is not compressed no more
    is given than its table of lengths, though all of it is checked.
    """

    def __init__(
        self,
        read: Read,
        segment: SegmentHeader,
        position: Position,
        *,
        chained: bool = True,
        bodies: bool = True,
        skim: bool = False,
    ) -> None:
        self._read = read
        self._chained = chained
        self._skim = skim
        self._apart: Final = APART if skim else WINDOW
        """Larger frames are read each by itself."""
        self.seed: Final = segment.seed
        """Where the checksums of the frames start."""
        self.bodies: Final = bodies
        """Whether these are looked at."""
        self.window: Final = Window(read, SKIM_WINDOW if skim else WINDOW)
        self.position: Position = position
        self.reason: str = ""

    def _long_body(self, frame: FrameHeader) -> tuple[bytes, int, int, bytes]:
        """The table of a body, then length and checksum of all of it, and the padding."""
        start = frame.offset + FRAME_HEADER_SIZE
        end = start + frame.stored_length
        table: list[bytes] = []
        missing = 4 * frame.count
        length = crc = 0
        for offset in range(start, end, SKIM_WINDOW):
            piece = self._read(min(SKIM_WINDOW, end - offset), offset)
            if missing > 0:
                table.append(piece[:missing])
                missing -= len(piece)
            length += len(piece)
            crc = crc32c(piece, crc)
        return b"".join(table), length, crc, self._read(frame.end - end, end)

    def _large_body(self, frame: FrameHeader) -> tuple[bytes, bytes]:
        """A body that is read as it is, without a copy, and not kept; and the padding."""
        start = frame.offset + FRAME_HEADER_SIZE
        end = start + frame.stored_length
        self.window.drop()
        return self._read(frame.stored_length, start), self._read(frame.end - end, end)

    def __iter__(self) -> Iterator[tuple[FrameHeader, bytes]]:
        while True:
            here = self.position
            head = self.window.copy(FRAME_HEADER_SIZE, here.offset)
            frame = decode_frame_header(head, here.offset, self.seed)
            if frame is None:
                self.reason = "" if head.count(0) == len(head) else "no valid frame header"
                return
            if frame.first_lsn != here.next_lsn:
                self.reason = f"frame of LSN {frame.first_lsn} where {here.next_lsn} is due"
                return
            if self._chained and frame.previous != here.previous:
                self.reason = "the frame does not follow the one before it"
                return
            body = b""
            if self.bodies:
                long = self._skim and frame.stored_length > SKIM_WINDOW
                if long and frame.kind is Kind.DATA and frame.codec is Codec.NONE:
                    body, length, crc, padding = self._long_body(frame)
                elif frame.end - here.offset > self._apart:
                    body, padding = self._large_body(frame)
                    length, crc = len(body), crc32c(body)
                else:
                    whole = self.window.copy(frame_size(frame.stored_length), here.offset)
                    end = FRAME_HEADER_SIZE + frame.stored_length
                    body, padding = whole[FRAME_HEADER_SIZE:end], whole[end:]
                    length, crc = len(body), crc32c(body)
                if length < frame.stored_length:
                    self.reason = f"frame body cut short: {length} of {frame.stored_length}"
                    return
                if crc != frame.body_crc:
                    self.reason = "checksum of the frame body does not match"
                    return
                if padding.count(0) != len(padding):
                    self.reason = "padding behind the frame is not zero"
                    return
            self._chained = True
            self.position = Position(
                frame.end,
                frame.next_lsn,
                frame.crc,
                max(here.durable_lsn, frame.durable_lsn),
                max(here.time_us, frame.time_us),
            )
            # Whoever is given a large body decides alone how long it is kept.
            given = [body]
            body = b""
            yield frame, given.pop()


def check_body(frame: FrameHeader, body: bytes) -> None:
    """Raises `FrameError` where a body with a good checksum does not hold what it declares."""
    if frame.kind is not Kind.DATA:
        decode_footer(body)
    elif frame.codec is Codec.NONE:
        if frame.raw_length != frame.stored_length:
            raise FrameError("an uncompressed frame declares two lengths")
        if not has_equal_table(body, frame.count, frame.raw_length):
            check_table(body, frame.count, frame.raw_length)
    else:
        raw = _codec.decompress(body, frame.raw_length)
        check_table(raw, frame.count, frame.raw_length)


def payloads(frame: FrameHeader, body: bytes) -> list[bytes]:
    """The records of a data frame."""
    if frame.codec is not Codec.NONE:
        body = _codec.decompress(body, frame.raw_length)
    return decode_body(body, frame.count)


def read_pointer(read: Read, segment: SegmentHeader) -> tuple[Pointer | None, bool]:
    """The segment's pointer, and whether its block is clean (a pointer or zeros)."""
    block = read(BLOCK, POINTER_OFFSET)
    pointer = decode_pointer(block, segment.seed)
    return pointer, pointer is not None or block.count(0) == len(block)


def frame_at(read: Read, segment: SegmentHeader, offset: int) -> FrameHeader | None:
    return decode_frame_header(read(FRAME_HEADER_SIZE, offset), offset, segment.seed)


def footer_index(
    read: Read, segment: SegmentHeader, pointer: Pointer | None
) -> tuple[tuple[int, int], ...]:
    """(first LSN, offset) of some frames, from the footer that the pointer tells of."""
    if pointer is None:
        return ()
    frame = frame_at(read, segment, pointer.offset)
    footer = None if frame is None or frame.crc != pointer.crc else read_footer(read, frame)
    return () if footer is None else footer.index


def read_footer(read: Read, frame: FrameHeader) -> Footer | None:
    """The footer of a SEAL or CLOSE frame; None where its body is damaged."""
    body = read(frame.stored_length, frame.offset + FRAME_HEADER_SIZE)
    if len(body) != frame.stored_length or crc32c(body) != frame.body_crc:
        return None
    try:
        return decode_footer(body)
    except FrameError:
        return None


# -- the tail ---------------------------------------------------------------------


class Tail(msgspec.Struct, frozen=True):
    """What stands behind the last valid frame."""

    data_end: int
    """Offset behind the last byte that is not zero; the position itself where all are."""
    torn_end: int
    """Offset behind what is left of an unfinished batch, as far as that can be told from what the
    file had before; the position itself where nothing is."""
    covering: FrameHeader | None = None
    """The first later frame which says that what is invalid here had been durable."""
    durable_lsn: int = 0
    """The highest LSN that such a frame calls durable."""


def stretches(start: int, size: int, next_data: NextData) -> Iterator[int]:
    """Offsets of the windows in which a file may have something else than zeros.

    A file may be 8 EiB long and take no space: holes are passed over.
    """
    offset = start
    while (offset := next_data(offset)) < size:
        yield offset
        offset += WINDOW


def _pieces(start: int, size: int, next_data: NextData) -> Iterator[int]:
    """The same in pieces that stay in the processor's cache."""
    for offset in stretches(start, size, next_data):
        yield from range(offset, min(offset + WINDOW, size), SKIM_WINDOW)


def examine_tail(
    read: Read,
    size: int,
    segment: SegmentHeader,
    position: Position,
    next_data: NextData = int,
) -> Tail:
    """Look at everything behind ``position`` for proof that it once was durable.

    A frame names the highest LSN that was durable when it was written.  If such a
    frame stands behind an invalid one and covers its first LSN, then the invalid one
    had been synced and acknowledged, and is damaged, not torn.

    Such a frame is proof wherever it is found, be it misplaced: its checksum has this
    segment's salt, and no payload can hold it, for it was written after all of them; nor
    can what the file had before it was this segment, for the salt is younger.
    """
    end = position.offset
    covering: FrameHeader | None = None
    durable_lsn = 0
    for offset in _pieces(position.offset, size, next_data):
        window = read(SKIM_WINDOW, offset)
        if _ZEROS.startswith(window):
            # Nothing begins here.
            continue
        end = max(end, offset + len(window.rstrip(b"\0")))
        window += read(FRAME_HEADER_SIZE - 1, offset + len(window))
        for found in _HEADER.finditer(window):
            head = window[found.start() : found.start() + FRAME_HEADER_SIZE]
            written_at = int.from_bytes(head[FRAME_HEADER_SIZE - 8 :], "little")
            frame = decode_frame_header(head, written_at, segment.seed)
            if frame is not None and frame.durable_lsn >= position.next_lsn:
                covering = covering or frame
                durable_lsn = max(durable_lsn, frame.durable_lsn)
    limit = max(size, position.offset)
    data_end = min(align_up(end, BLOCK), limit)
    torn_end = data_end
    if segment.reused:
        torn_end = min(_first_torn_end(read, segment, position.offset), limit)
    return Tail(data_end, torn_end, covering, durable_lsn)


def _first_torn_end(read: Read, segment: SegmentHeader, offset: int) -> int:
    """The same where a terminator ends a log: what stands behind it, or behind what stands in its
    place, may be of another segment."""
    block = read(BLOCK, offset)
    if block.count(0) == len(block):
        return offset
    frame = decode_frame_header(block, offset, segment.seed)
    return offset + BLOCK if frame is None else frame.end


def torn_start(
    read: Read, segment: SegmentHeader, pointer: Pointer | None, position: Position, torn_end: int
) -> int:
    """Where an unfinished batch starts in what stands behind the last valid frame.

    Not at a CLOSE frame that a crash tore, which is nobody's batch: its header tells, or the
    pointer that was written with it, and then nothing was written behind it.
    """
    if pointer is not None and (pointer.kind, pointer.offset) == (Kind.CLOSE, position.offset):
        return torn_end
    frame = frame_at(read, segment, position.offset)
    if frame is None or frame.kind is not Kind.CLOSE or frame.previous != position.previous:
        return position.offset
    return min(frame.end, torn_end)
