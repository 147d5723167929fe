"""Lines of real files as records, divided among tasks.

Law: the process that writes and the one that checks build the same workload from the
same bytes; nothing depends on files that may change meanwhile.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from io import BytesIO
from itertools import accumulate
from typing import Final, cast

import attrs

_TAG: Final = struct.Struct("<II")


@attrs.frozen(eq=False)
class Workload:
    """Every line of every source, in order; a line's number in it is its index."""

    contents: tuple[bytes, ...]
    """The sources."""
    records: list[bytes]
    """Each line as its record: source (``<u32``), line in it from 0 (``<u32``), the line's
    bytes, newline included."""
    starts: list[int]
    """Index of the first line of each source, and behind the last the count of lines."""
    bounds: list[int]
    """Task t appends the lines with ``bounds[t] <= index < bounds[t + 1]``, in order."""

    @property
    def tasks(self) -> int:
        return len(self.bounds) - 1

    def index_of(self, data: bytes) -> int | None:
        """Which line a record says it is; None where it cannot be one."""
        if len(data) < _TAG.size:
            return None
        source, line = cast("tuple[int, int]", _TAG.unpack_from(data))
        if source >= len(self.contents):
            return None
        index = self.starts[source] + line
        return index if index < self.starts[source + 1] else None

    def is_first_of_task(self, index: int) -> bool:
        return self.bounds[bisect_right(self.bounds, index) - 1] == index


def build(contents: tuple[bytes, ...], tasks: int) -> Workload:
    """Divide the lines so that each task has as many as any other, give or take one."""
    records: list[bytes] = []
    counts: list[int] = []
    pack = _TAG.pack
    for source, content in enumerate(contents):
        lines = BytesIO(content).readlines()
        counts.append(len(lines))
        records += [pack(source, number) + line for number, line in enumerate(lines)]
    starts = list(accumulate(counts, initial=0))
    total = len(records)
    bounds = [total * task // tasks for task in range(tasks + 1)]
    return Workload(contents, records, starts, bounds)


def line_of(record: bytes) -> bytes:
    return record[_TAG.size :]
