"""What a replicated log's owner remembers of its batches: where they are, and how much they take.

Law: of one session, and in memory only; nothing is read and nothing is sent.  What is not
remembered is searched for in the stream (`_streamlog`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Final

import attrs

POSITIONS_MAX: Final = 4096
"""Of batches of which it is remembered where they are; between them it is searched."""


@attrs.define
class Segment:
    """Some batches in a row, which retention treats as one; a `_retention.Sealed`."""

    first_lsn: int
    bytes: int = 0
    last_time_us: int = 0


class Segments:
    """Batches in a row, counted as retention counts segments: nothing of them is in the log."""

    def __init__(self, size: int, older: Segment, last_lsn: int) -> None:
        """
        Args:
          older: what is older than this session is one: nobody has written down where others end.
        """
        self._size = size
        self.sealed: list[Segment] = []
        self.active: Segment = older
        self.seal(last_lsn)

    @property
    def count(self) -> int:
        return len(self.sealed) + 1

    def note(self, size: int, time_us: int, last_lsn: int) -> bool:
        """One more batch; True: a segment is finished."""
        self.active.bytes += size
        self.active.last_time_us = time_us
        return self.active.bytes >= self._size and self.seal(last_lsn)

    def seal(self, last_lsn: int) -> bool:
        if self.active.first_lsn > last_lsn:
            return False
        self.sealed.append(self.active)
        self.active = Segment(last_lsn + 1)
        return True

    def lsn_after(self, count: int) -> int:
        """The first LSN behind the oldest sealed segments."""
        return (*self.sealed, self.active)[count].first_lsn

    def within(self, bytes_max: float) -> int:
        """The first LSN of the newest ones that have no more bytes than these together; 0 for
        all."""
        if bytes_max < math.inf:
            bytes_max -= self.active.bytes
            for count in range(len(self.sealed), 0, -1):
                bytes_max -= self.sealed[count - 1].bytes
                if bytes_max < 0:
                    return self.lsn_after(count)
        return 0

    def behind(self, lsn: int) -> tuple[int, int]:
        """Bytes of those that have records after an LSN, and a time before which none of these
        was written."""
        size, since_us = self.active.bytes, 0
        for number in range(len(self.sealed), 0, -1):
            since_us = self.sealed[number - 1].last_time_us
            if self.lsn_after(number) - 1 <= lsn:
                break
            size += self.sealed[number - 1].bytes
        return size, since_us

    def drop_before(self, lsn: int) -> None:
        while self.sealed and self.lsn_after(1) <= lsn:
            del self.sealed[0]


class Positions:
    """Where some batches are: their first LSNs and positions, ascending."""

    def __init__(self) -> None:
        self._lsns: list[int] = []
        self._positions: list[int] = []
        self._step = 1
        self._skipped = 0

    def add(self, first_lsn: int, position: int) -> None:
        self._skipped += 1
        if self._skipped < self._step:
            return
        self._skipped = 0
        self._lsns.append(first_lsn)
        self._positions.append(position)
        if len(self._lsns) > POSITIONS_MAX:
            del self._lsns[1::2], self._positions[1::2]
            self._step *= 2

    def around(self, lsn: int, first: int, last: int) -> tuple[int, int]:
        """Between which positions the batch is that has a record."""
        at = bisect_right(self._lsns, lsn)
        low = max(first, self._positions[at - 1]) if at else first
        high = self._positions[at] - 1 if at < len(self._positions) else last
        return low, max(low, high)
