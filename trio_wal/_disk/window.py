"""A stretch of a file that is kept while its frames are walked over.

Law: pure; bytes come from a `Read` callable.  Nobody is given the window itself but who walks over
it in place (`plain`); what is read is never more than asked for, or the largest window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from trio_wal._util import KiB

Read = Callable[[int, int], bytes]
"""``read(length, offset)``; shorter only at the end of the file."""

FIRST_WINDOW: Final = 16 * KiB
"""A walk begins with so little, and takes four times as much each time, up to its largest: who
follows a log's end begins a walk for each batch, and a mebibyte of zeros takes a millisecond."""


APART: Final = 64 * KiB
"""Larger frames are read each by itself: what is as long as its object need not be copied out of a
window, and that costs more than one more call."""
_BETWEEN: Final = 576
"""Of those no more is read into a window than one's padding and the next one's header."""


@final
class Window:
    """Bytes of a file from ``offset`` on."""

    __slots__ = ("_largest", "_read", "_size", "data", "offset")

    def __init__(self, read: Read, largest: int) -> None:
        self._read = read
        self._size = FIRST_WINDOW
        self._largest = largest
        self.data: bytes = b""
        self.offset: int = 0

    def have(self, length: int, offset: int, size: int = 0) -> int:
        """Have so many bytes in the window, as far as the file goes; returns where they begin.

        Args:
          size: of the frames around here, probably: half of one at the window's end would be
              read twice.
        """
        start = offset - self.offset
        if start < 0 or start + length > len(self.data):
            if size > APART:
                wanted = _BETWEEN
            else:
                wanted = self._size - self._size % size if 0 < size <= self._size else self._size
                self._size = min(4 * self._size, self._largest)
            # First the old one goes: then the new one takes its place in memory, and in the cache.
            self.data = b""
            self.data = self._read(max(length, wanted), offset)
            self.offset = offset
            start = 0
        return start

    def copy(self, length: int, offset: int) -> bytes:
        """A copy of these, as far as the file goes."""
        start = self.have(length, offset)
        return self.data[start : start + length]

    def apart(self, length: int, offset: int) -> bytes:
        """The same, read for itself."""
        self.drop()
        return self._read(length, offset)

    def drop(self) -> None:
        """Keep nothing, and begin small again: what comes after a large frame may be another one,
        and what the window had of that would be read twice."""
        self.data = b""
        self._size = FIRST_WINDOW
