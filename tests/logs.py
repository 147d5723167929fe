"""Logs on files in memory, without tasks: made, damaged, crashed and read back.

Law: nothing here knows the format but through the package.  What a log holds is always
read through a reader's cursor, as a program would read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import attrs

from trio_wal._disk import frame, spares
from trio_wal._disk.cursor import Cursor
from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.opening import open_log_directory
from trio_wal._files import NO_WORD
from trio_wal._local import DirectoryLocator
from trio_wal.testing import MemoryFiles

LOG = "/log"
TINY = 1
"""A segment size that leaves room for two small frames a segment."""

Records = tuple[tuple[int, bytes], ...]
"""(LSN, payload) of every record."""


def open_log(files: MemoryFiles, path: str = LOG, **options: Any) -> LogDirectory:
    options.setdefault("segment_size", TINY)
    return open_log_directory(files, path, **options)


def append(log: LogDirectory, *records: bytes) -> int:
    """One frame, durable; returns the last LSN."""
    log.write(records, log.synced_lsn, sync=True)
    log.publish()
    return log.last_lsn


def records_of(log: LogDirectory) -> Records:
    """Everything in an open log."""
    return read_between(log, log.first_lsn, log.last_lsn)


def read_between(log: LogDirectory, first_lsn: int, last_lsn: int) -> Records:
    source = DirectoryLocator(log)
    cursor = Cursor(source, first_lsn)
    found: list[tuple[int, bytes]] = []
    try:
        while cursor.next_lsn <= last_lsn:
            found += [(record.lsn, record.data) for record in cursor.chunk(last_lsn + 1)]
    finally:
        cursor.leave()
    return tuple(found)


def numbered(payloads: Iterable[bytes], first_lsn: int = 1) -> Records:
    return tuple(enumerate(payloads, first_lsn))


def copy_of(files: MemoryFiles) -> MemoryFiles:
    """The same files, to be opened without changing the original."""
    return files.crash_image(kind="kill")


def forget_word(files: MemoryFiles, path: str = LOG) -> MemoryFiles:
    """What the owner has said of its log did not reach the disk: it is never synced."""
    folder = files._folders[path]
    folder.published, folder.words = NO_WORD, [NO_WORD]
    return files


def content(files: MemoryFiles, path: str = LOG, **options: Any) -> Records:
    """What a log holds after everything was checked; the files stay as they are."""
    log = open_log(copy_of(files), path, **{"verify_bytes": math.inf, **options})
    try:
        return records_of(log)
    finally:
        log.close(orderly=False)


def make_log(
    *batches: Iterable[bytes], close: bool = True, seed: int = 7, **options: Any
) -> MemoryFiles:
    """Files with a log of these batches; ``close=False``: the process was killed.

    Two of one seed are one log: its uuid comes from there.
    """
    files = MemoryFiles(seed=seed)
    log = open_log(files, **options)
    for batch in batches:
        append(log, *batch)
    log.close(orderly=close)
    return files


@contextmanager
def reusing() -> Iterator[None]:
    """Dropped segments are used again with the bytes that they have, as they are between large
    frames; and a terminator is no longer than it must be."""
    with (
        mock.patch.object(spares, "REUSE_FRAMES_FROM", 0),
        mock.patch.object(frame, "TERMINATOR_ALIGN", frame.BLOCK),
    ):
        yield


def reuse_dropped(log: LogDirectory, keep: int = 1) -> None:
    """Drop all but the newest ``keep`` sealed segments, and prepare the next one of one of them."""
    sealed = log.sealed()
    if len(sealed) > keep:
        log.drop_before(sealed[-keep].first_lsn)
        with reusing():
            log.prepare_spare()


def make_reused_log(
    *batches: Iterable[bytes], close: bool = True, seed: int = 7, keep: int = 1, **options: Any
) -> MemoryFiles:
    """As `make_log`; the log has dropped its past, and its last segment was one of that."""
    files = MemoryFiles(seed=seed)
    log = open_log(files, **options)
    with reusing():
        for batch in batches:
            append(log, *batch)
            reuse_dropped(log, keep)
        assert log.active.header.reused
        log.close(orderly=close)
    return files


def segments(files: MemoryFiles, path: str = LOG) -> list[str]:
    return [name for name in files.names(path) if name.startswith("wal-")]


# -- crashes at every operation -----------------------------------------------------


@attrs.define(eq=False, slots=False)
class CrashTest:
    """Crashes a program at every operation on its files and recovers each time.

    ``allowed`` is what a recovery may find just now: one element between calls, more
    while a call is under way that may be there or not.
    """

    files: MemoryFiles
    seeds: Iterable[int] = range(3)
    nested: int = 0
    """Of every so many images the recovery too is crashed at every operation; 0: of none."""
    allowed: list[Records] = attrs.Factory(lambda: [()])
    options: dict[str, Any] = attrs.Factory(dict)
    images: int = 0
    nested_images: int = 0
    log: LogDirectory | None = None
    _seen: set[int] = attrs.Factory(set)

    def __attrs_post_init__(self) -> None:
        self.files.after_operation = lambda operation, path: self._crash()

    # -- the program --

    def open(self) -> None:
        self.log = open_log(self.files, **self.options)
        self._settled(records_of(self.log))

    def step(self, call: Callable[[LogDirectory], object], *outcomes: Records) -> None:
        """A call that makes of the log one of the outcomes, or leaves it as it was."""
        assert self.log is not None
        (before,) = self.allowed
        self.allowed = [before, *outcomes]
        call(self.log)
        self._settled(records_of(self.log))

    def append(self, *payloads: bytes) -> None:
        (before,) = self.allowed
        first = self.log.last_lsn + 1
        after = before + numbered(payloads, first)
        self.step(lambda log: append(log, *payloads), after)
        assert self.allowed == [after], "an acknowledged record cannot be read"

    def append_unsynced(self, *batches: bytes) -> None:
        """Several frames before one sync: any number of the first may survive."""
        (before,) = self.allowed
        first = self.log.last_lsn + 1
        states = [before + numbered(batches[:n], first) for n in range(1, len(batches) + 1)]

        def call(log: LogDirectory) -> None:
            for payload in batches:
                log.write([payload], first - 1, sync=False)
            log.sync()

        self.step(call, *states)
        assert self.allowed == [states[-1]]

    def truncate_after(self, lsn: int) -> None:
        (before,) = self.allowed
        after = tuple(pair for pair in before if pair[0] <= lsn)
        self.step(lambda log: log.truncate_after(lsn), after)
        assert self.allowed == [after]
        assert self.log.last_lsn == lsn

    def truncate_before(self, lsn: int) -> None:
        """Whole segments only, so the outcome is looked up afterwards."""
        (before,) = self.allowed
        ends = [s.next_lsn for s in self.log.sealed() if s.next_lsn <= lsn]
        first = max(ends, default=self.log.first_lsn)
        after = tuple(pair for pair in before if pair[0] >= first)
        self.step(lambda log: log.drop_before(lsn), after)
        assert self.allowed == [after]

    def close(self) -> None:
        self.log.close()
        self._crash()

    def _settled(self, records: Records) -> None:
        assert records in self.allowed, (records, self.allowed)
        self.allowed = [records]
        self._crash()

    # -- the crashes --

    def _crash(self) -> None:
        self._check(self.files.crash_image(kind="kill"))
        for seed in self.seeds:
            image = self.files.crash_image(seed)
            fingerprint = hash(tuple(sorted(image.contents(LOG).items())))
            if (key := hash((fingerprint, tuple(self.allowed)))) not in self._seen:
                self._seen.add(key)
                self._check(image)

    def _check(self, image: MemoryFiles) -> None:
        self.images += 1
        if self.nested and self.images % self.nested == 0:
            self._recover_crashing(image)
        else:
            self._recover(image)

    def _recover(self, image: MemoryFiles) -> None:
        """Open, compare, append, lose the power, open again: all of it must be there."""
        log = open_log(image, **self.options)
        found = records_of(log)
        assert found in self.allowed, (found, self.allowed)
        assert (log.report.first_lsn, log.report.last_lsn) == (log.first_lsn, log.last_lsn)
        expected = found
        if self.images % 2:
            expected += ((log.last_lsn + 1, b"after"),)
            append(log, b"after")
        seed = self.images
        again = image.crash_image(seed, "power" if self.images % 3 else "kill")
        log = open_log(again, **self.options)
        assert records_of(log) == expected, (records_of(log), expected)
        if self.images % 2:
            assert log.report.torn_bytes == 0, "the first recovery left something torn behind"

    def _recover_crashing(self, image: MemoryFiles) -> None:
        moments = 0

        def crash(operation: str, path: str) -> None:
            nonlocal moments
            moments += 1
            self.nested_images += 1
            for kind in ("kill", "power"):
                self._recover(image.crash_image(moments, kind))  # type: ignore[arg-type]

        image.after_operation = crash
        log = open_log(image, **self.options)
        assert records_of(log) in self.allowed
        log.close()
