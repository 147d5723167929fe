"""How long a disk takes to make bytes durable, and how fast it writes.

Law: blocking, no trio.  It writes as a log does, through `Files`, only into the directory that it
is given, and no longer than it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Final

import attrs

from trio_wal._files import Directory, File, close_quietly
from trio_wal._util import KiB, MiB

FRAME_BYTES: Final = 512
"""A lone record of up to some 400 bytes, as it stands on disk."""
FILE_BYTES: Final = 2 * MiB
SYNCS_MIN: Final = 5
SYNCS_MAX: Final = FILE_BYTES // FRAME_BYTES
WRITE_BYTES: Final = 32 * MiB
PIECE_BYTES: Final = 256 * KiB
SHARES: Final = (0.5, 0.25, 0.25)
"""Of the time: syncs in place, syncs of a file that grows, writing."""

Tick = Callable[[float], None]
"""Called with the seconds that have passed; what it raises ends the probe."""


@attrs.frozen(kw_only=True)
class Times:
    """How long something took, in seconds."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float


def times_of(seconds: Sequence[float]) -> Times:
    """Of at least one."""
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Times(count=len(ordered), p50=at(0.5), p90=at(0.9), p99=at(0.99), max=ordered[-1])


@attrs.frozen(kw_only=True)
class Probe:
    """What was measured."""

    sync_prepared: Times
    """Of 512 bytes over zeros that were written before, as a log does it."""
    sync_growing: Times
    """Of 512 bytes at the end of a file that grows by them, as a log does not."""
    write_bytes_per_second: float
    """In large pieces, the sync at their end included."""


def probe(directory: Directory, seconds: float, tick: Tick) -> Probe:
    """Leaves the directory as it was.

    Raises:
      OSError: no space, or the disk's own.
    """
    began = perf_counter()

    def passed() -> None:
        tick(perf_counter() - began)

    in_place, growing, writing = (seconds * share for share in SHARES)
    with_zeros = _syncs(directory, in_place, passed, prepared=True)
    without = _syncs(directory, growing, passed, prepared=False)
    return Probe(
        sync_prepared=with_zeros,
        sync_growing=without,
        write_bytes_per_second=_write(directory, writing, passed),
    )


def _syncs(
    directory: Directory, seconds: float, passed: Callable[[], None], *, prepared: bool
) -> Times:
    frame = bytes(range(256)) * (FRAME_BYTES // 256)
    found: list[float] = []
    with_file = _Scratch(directory)
    file = with_file.file
    try:
        if prepared:
            file.allocate(FILE_BYTES)
            for offset in range(0, FILE_BYTES, PIECE_BYTES):
                file.pwrite([bytes(PIECE_BYTES)], offset)
                passed()
            file.sync()
            # What the file system puts down about it later is not the syncs' business.
            directory.sync()
        until = perf_counter() + seconds
        for number in range(SYNCS_MAX):
            file.pwrite([frame], number * FRAME_BYTES)
            start = perf_counter()
            file.sync(in_place=prepared)
            end = perf_counter()
            found.append(end - start)
            passed()
            if end > until and len(found) >= SYNCS_MIN:
                break
    finally:
        with_file.remove()
    return times_of(found)


def _write(directory: Directory, seconds: float, passed: Callable[[], None]) -> float:
    piece = bytes(range(256)) * (PIECE_BYTES // 256)
    with_file = _Scratch(directory)
    file = with_file.file
    written = 0
    start = perf_counter()
    try:
        for offset in _until(range(0, WRITE_BYTES, PIECE_BYTES), start + seconds):
            file.pwrite([piece], offset)
            written = offset + PIECE_BYTES
            passed()
        file.sync()
        return written / max(perf_counter() - start, 1e-9)
    finally:
        with_file.remove()


def _until(numbers: range, end: float) -> Iterator[int]:
    for number in numbers:
        yield number
        if perf_counter() > end:
            return


class _Scratch:
    """A file that goes again."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.file: File = directory.open("probe", create=True)

    def remove(self) -> None:
        close_quietly(self.file)
        self._directory.unlink("probe")
