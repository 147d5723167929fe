"""Plain frames in one flat loop: what opening and verifying walk over, frame after frame.

Law: pure, and no judge.  A frame is plain if it has records, is not compressed, stands whole in
the window, and is taken by `scan.FrameScanner` and `scan.check_body` without a word.  At the first
one that is not, for whatever reason, the loop ends and says nothing: the scanner goes on from
there, and its verdict is the only one.  So whatever is taken here must be taken there, with the
same result; `tests/test_plain.py` and the campaign ``plain`` hold it to that.

The loop makes no object of a frame.  What it takes of each one is an unpack, two slices, two
checksums, and two comparisons with what is mostly there: a table of equal lengths, and zeros.
The window is asked only for what it does not have: a call less for each frame is a twentieth.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Final, final

from .frame import (
    BATCH_RECORDS_MAX,
    BLOCK,
    FRAME_BODY_MAX,
    FRAME_HEADER_SIZE,
    FRAME_MAGIC,
    LSN_MAX,
    TIME_US_MAX,
    Codec,
    Kind,
    equal_table,
    extend_crc32c,
)
from .scan import WINDOW, FrameScanner, Position
from .window import APART, Window

_FRAME: Final = struct.Struct("<4sIQQqIIIIIIQ")
"""A frame's header, with its kind, codec and flags as one number."""
assert _FRAME.size == FRAME_HEADER_SIZE
_unpack: Final = _FRAME.unpack_from
_PLAIN: Final = Kind.DATA | Codec.NONE << 8
_CHECKED: Final = 8
"""From here on a header is what its checksum is of."""
_PADDINGS: Final = tuple(map(bytes, range(BLOCK)))

Unproven = tuple[int, int, tuple[int, int, int, int, int]]
"""Of a frame that no later one proves durable: the LSN after its last one, how many frames were
before, and the `Position` at which the frame with records before it ended, field by field."""


@final
class Tally:
    """What a walk over one segment counts and keeps of its data frames."""

    __slots__ = ("data_end", "frames", "index", "records", "step", "unproven")

    def __init__(
        self, data_end: Position, frames: int, index: list[tuple[int, int]], step: int
    ) -> None:
        self.data_end: Position = data_end
        """Behind the last frame with records: CLOSE frames may stand behind it."""
        self.frames: int = frames
        """Whole data frames."""
        self.records: int = 0
        """Those of the frames that were met."""
        self.index: list[tuple[int, int]] = index
        """(first LSN, offset) of some frames."""
        self.step: Final = step
        """So many bytes lie between two of these, at least."""
        self.unproven: deque[Unproven] = deque()

    def take(self, first_lsn: int, count: int, offset: int, end: Position) -> None:
        """A data frame that is whole, and where it ends."""
        if not self.index or offset - self.index[-1][1] >= self.step:
            self.index.append((first_lsn, offset))
        self.unproven.append((first_lsn + count, self.frames, self.data_end.fields))
        self.records += count
        self.frames += 1
        self.data_end = end

    def prove(self, durable_lsn: int) -> None:
        """What a frame says, be it one without records."""
        while self.unproven and self.unproven[0][0] - 1 <= durable_lsn:
            self.unproven.popleft()


def follow_plain(
    scanner: FrameScanner, tally: Tally | None = None, stop_lsn: int = LSN_MAX + 1
) -> bool:
    """Take the scanner over plain frames, up to the one that begins with ``stop_lsn`` or the first
    that is not plain.  Returns whether there was any.

    If the scanner is one without bodies, they are not looked at here either.
    """
    window, seed = scanner.window, scanner.seed
    bodies = _Bodies(window) if scanner.bodies else None
    offset, due, previous, proven, time_us = place = begin = scanner.position.fields
    size = frames = index_at = 0
    before, unproven = place, deque[Unproven]()
    if tally is not None:
        frames, before, unproven = tally.frames, tally.data_end.fields, tally.unproven
        index_at = tally.index[-1][1] + tally.step if tally.index else 0
    while due < stop_lsn:
        data, start = window.data, offset - window.offset
        if start < 0 or len(data) - start < FRAME_HEADER_SIZE:
            start = window.have(FRAME_HEADER_SIZE, offset, size)
            data = window.data
            if len(data) - start < FRAME_HEADER_SIZE:
                break
        magic, crc, first, durable, now_us, count, form, stored, raw, body_crc, follows, at = (
            _unpack(data, start)
        )
        if magic != FRAME_MAGIC or form != _PLAIN or at != offset or first != due:
            break
        if extend_crc32c(seed, data[start + _CHECKED : start + FRAME_HEADER_SIZE]) != crc:
            break
        if follows != previous or durable >= due:
            break
        if not time_us <= now_us <= TIME_US_MAX:
            break
        if raw != stored or stored > FRAME_BODY_MAX or not 0 < count <= BATCH_RECORDS_MAX:
            break
        size = -(-(FRAME_HEADER_SIZE + stored) // BLOCK) * BLOCK
        if bodies is not None and not bodies.are_plain(offset, size, count, stored, body_crc):
            break
        if tally is not None:
            if offset >= index_at:
                tally.index.append((due, offset))
                index_at = offset + tally.step
            unproven.append((due + count, frames, before))
            # It comes to an end: no frame vouches for itself.
            while unproven[0][0] <= durable + 1:
                unproven.popleft()
            frames += 1
        # A log that is never synced calls nothing durable, not even what was before a segment.
        if durable > proven:  # noqa: PLR1730  (a call would cost more)
            proven = durable
        offset, due, previous, time_us = offset + size, due + count, crc, now_us
        place = before = (offset, due, previous, proven, time_us)
    if place is begin:
        return False
    scanner.position = Position(*place)
    if tally is not None:
        tally.records += due - begin[1]
        tally.frames, tally.data_end = frames, scanner.position
    return True


@final
class _Bodies:
    """The bodies of one walk's frames."""

    __slots__ = ("_count", "_stored", "_table", "_window")

    def __init__(self, window: Window) -> None:
        self._window = window
        self._count: int = 0
        self._stored: int = 0
        """Records and bytes of the last one."""
        self._table = b""
        """The table of lengths that it has if they are equal; b"" where they cannot be."""

    def are_plain(self, offset: int, size: int, count: int, stored: int, crc: int) -> bool:
        """Whether the frame with this body is one, as far as it is the body that says so."""
        window = self._window
        if size > WINDOW or 4 * count > stored:
            return False
        data, start = window.data, offset - window.offset + FRAME_HEADER_SIZE
        if size <= APART:
            if len(data) - start < size - FRAME_HEADER_SIZE:
                start = window.have(size, offset, size) + FRAME_HEADER_SIZE
                data = window.data
        else:
            start, data = 0, window.apart(stored, offset + FRAME_HEADER_SIZE)
            if len(data) < stored:
                # Its checksum may be that of what is there.
                return False
        end = start + stored
        if count != self._count or stored != self._stored:
            self._count, self._stored = count, stored
            self._table = equal_table(count, stored)
        if not (self._table and data.startswith(self._table, start)):
            lengths = struct.unpack_from(f"<{count}I", data, start) if len(data) >= end else ()
            if 4 * count + sum(lengths) != stored:
                return False
        if extend_crc32c(0, data[start:end]) != crc:
            return False
        padding = _PADDINGS[size - FRAME_HEADER_SIZE - stored]
        if size > APART:
            end = window.have(len(padding), offset + size - len(padding), size)
        return window.data.startswith(padding, end)
