"""What was acknowledged, what was found, and whether the two agree.

Law: pure bookkeeping.  Lost is a line that was acknowledged and is not in the log, byte by
byte; whatever else is wrong has a count of its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import islice, pairwise

import attrs

from .workload import Workload, line_of


@attrs.define
class Problems:
    """Of one reading of the whole log."""

    lost: int = 0
    """Acknowledged lines that are not there."""
    duplicated: int = 0
    """Lines that are there again."""
    altered: int = 0
    """Records that are no line of the source."""
    misordered: int = 0
    """Lines that stand before the one that their task appended before them."""
    misplaced: int = 0
    """Lines under another LSN than the one that was acknowledged."""

    def __bool__(self) -> bool:
        return any(attrs.astuple(self))


class Ledger:
    """Both sides of the account."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        total = len(workload.records)
        self._lsns = array("Q", bytes(8 * total))
        """Acknowledged LSN of each line; 0: not acknowledged."""
        self.acknowledged = 0
        self.latencies = array("Q")
        """Nanoseconds, of each acknowledgement."""
        self._found = bytearray(total)
        self._found_lsn = 0
        self._problems = Problems()

    def acknowledge(self, words: Sequence[int]) -> None:
        """Take (index, LSN, nanoseconds) of each of some acknowledgements."""
        lsns = self._lsns
        for index, lsn in zip(islice(words, 0, None, 3), islice(words, 1, None, 3), strict=True):
            self.acknowledged += not lsns[index]
            lsns[index] = lsn
        self.latencies.extend(islice(words, 2, None, 3))

    # -- one reading of the whole log --

    def begin(self) -> None:
        self._found = bytearray(len(self._found))
        self._found_lsn = 0
        self._problems = Problems()

    def saw(self, lsn: int, data: bytes) -> None:
        """The next record of the log."""
        workload, problems, found = self._workload, self._problems, self._found
        if lsn != self._found_lsn + 1:
            problems.misplaced += 1
        self._found_lsn = lsn
        index = workload.index_of(data)
        if index is None or workload.records[index] != data:
            problems.altered += 1
            return
        if found[index]:
            problems.duplicated += 1
            return
        found[index] = 1
        if not (index and found[index - 1]) and not workload.is_first_of_task(index):
            problems.misordered += 1
        if self._lsns[index] not in (0, lsn):
            problems.misplaced += 1

    def end(self) -> Problems:
        """What is wrong with what was seen since `begin`."""
        self._problems.lost = sum(
            1 for lsn, found in zip(self._lsns, self._found, strict=True) if lsn and not found
        )
        return self._problems

    @property
    def found(self) -> int:
        """Lines that the last reading found."""
        return self._found.count(1)

    def resume(self) -> list[int]:
        """Index of the first line of each task that the last reading did not find."""
        bounds = self._workload.bounds
        missing = (self._found.find(0, first, end) for first, end in pairwise(bounds))
        return [end if index < 0 else index for index, end in zip(missing, bounds[1:], strict=True)]


class Rebuilder:
    """Makes the sources again from the log alone, to be compared with the originals."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._lines: dict[int, bytes] = {}

    def saw(self, data: bytes) -> None:
        index = self._workload.index_of(data)
        if index is not None:
            self._lines[index] = line_of(data)

    def identical(self) -> int:
        """How many sources came out as they were."""
        workload = self._workload
        spans = pairwise(workload.starts)
        return sum(
            b"".join(self._lines.get(index, b"") for index in range(first, end)) == content
            for (first, end), content in zip(spans, workload.contents, strict=True)
        )
