"""What must not be dropped from a log, because somebody has yet to see it.

Law: no I/O.  One hold per name; set by one thread, looked at by others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .segment import SegmentInfo


class Holds:
    def __init__(self) -> None:
        self._by_name: dict[str, tuple[int, float]] = {}

    def set(self, who: str, lsn: int | None, bytes_max: float = math.inf) -> None:
        """Keep the records from here on, whatever is asked to be dropped; None: no more.

        Args:
          bytes_max: of more bytes of segments than these the oldest are not kept.
        """
        if lsn is None:
            self._by_name.pop(who, None)
        else:
            self._by_name[who] = lsn, bytes_max

    def allowed(self, lsn: int, sealed: Sequence[SegmentInfo], active_bytes: int) -> int:
        """Below which LSN all may be dropped, where that is asked for below this one."""
        for first, bytes_max in self._by_name.copy().values():
            bounded = bytes_max < math.inf
            within = _within(bytes_max - active_bytes, sealed) if bounded else 0
            lsn = min(lsn, max(first, within))
        return lsn


def _within(bytes_max: float, sealed: Sequence[SegmentInfo]) -> int:
    """The first LSN of the newest segments that have no more bytes than these together."""
    for segment in reversed(sealed):
        bytes_max -= segment.bytes
        if bytes_max < 0:
            return segment.next_lsn
    return 0
