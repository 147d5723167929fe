"""The next segment of an open log, made ready while the active one fills.

Law: blocking; no trio.  Space is reserved, and zeros written and synced, before a commit needs the
file; one that cannot wait takes it as far as it is.  Between large frames a dropped segment's file
is taken with the bytes that it has.  A file that becomes a segment once more has nobody who reads
it.  What `prepare` does may run in a thread beside all other calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Final

import msgspec

from trio_wal._exceptions import LogFullError
from trio_wal._files import NO_SPACE, Directory, File, close_quietly
from trio_wal._util import KiB, MiB

from .frame import FEATURE_REUSED, SegmentHeader
from .segment import (
    CAPACITY_GROWTH,
    FIRST_CAPACITY,
    SPARE_PREFIX,
    ActiveSegment,
    SegmentInfo,
    capacity_for,
)

ZERO_CHUNK: Final = 256 * KiB
LARGE_ZERO_CHUNK: Final = 1 * MiB
"""Between frames for which it takes as long anyway: a sync for each piece costs as much as the
zeros."""
SPARE_RETRY_SECONDS: Final = 1.0
"""After a full disk: not at every commit."""
PREPARE_FROM: Final = 0.25
PREPARED_AT: Final = 0.75
"""The next segment is prepared while the active one fills between these shares of it."""
PAUSES: Final = 4
PAUSE_SHARE: Final = 4
"""Zeros and commits share the disk: between two pieces of zeros there are so many pauses of so
many times what the piece took, unless preparing falls behind.  A log that is idle has its segment
within seconds all the same, and nothing waits in vain."""
ZERO_FRAMES_BELOW: Final = 32 * KiB
"""Writing zeros ahead costs about 1-2 ms a MiB and saves about 50 us a sync (an overwrite
needs no block allocation): it pays while the mean frame is smaller than this."""
REUSE_FRAMES_FROM: Final = 64 * KiB
"""Over a dropped segment they cost half of that, because its blocks are there.  From this mean size
of a frame on it is used as it is instead: each frame brings its terminator."""


class Spare(msgspec.Struct, eq=False):
    """A file that reads as zeros, or as a dropped segment, to become the next one."""

    name: str
    file: File
    capacity: int
    written: int = 0
    """So many bytes of it have been written, and synced."""
    features: int = 0
    """Of the segment, beside those of its log."""


class Spares:
    """The file that is ready, those that may be used again, and who reads which segment.

    Args:
      active: gives the segment that is being written.
      segment_size: bytes of a full-grown one.
      database: whether the log is a database's: for what an error recommends.
    """

    def __init__(
        self,
        directory: Directory,
        active: Callable[[], ActiveSegment],
        *,
        segment_size: int,
        database: bool,
    ) -> None:
        self.ready: Spare | None = None
        self.not_before: float = 0.0
        """On `time.perf_counter`: until then nothing is prepared, because the disk was full."""
        self.preparing: bool = False
        self._directory = directory
        self._active = active
        self._segment_size = segment_size
        self._database = database
        self._lock = threading.Condition()
        self._hurry = False
        self.litter: list[str] = []
        """Files that could not be removed; `drop` tries again."""
        self._recycled: dict[str, int] = {}
        """Files of dropped segments, one at most, and their bytes."""
        self._made = 0
        self._reading = threading.Lock()
        """Never held for long: a cursor that is closed in the event loop takes it, too."""
        self._readers: dict[bytes, int] = {}

    @property
    def bytes(self) -> int:
        """Space that is prepared, or kept for that."""
        spare = self.ready
        kept = sum(list(self._recycled.values()))
        return kept if spare is None else kept + spare.capacity

    # -- taking one --

    def make_room(self) -> None:
        """See whether a segment can be prepared again; `LogFullError` where not."""
        if self.ready is None:
            self.ready = self.take(0)

    def take(self, stored_length: int) -> Spare:
        """The prepared segment, or one made now without writing its zeros.

        Raises:
          LogFullError: there is no space for one.
        """
        needed = capacity_for(stored_length, 0)
        with self._lock:
            self._hurry = True
            self._lock.notify_all()
            self._lock.wait_for(lambda: not self.preparing)
            self._hurry = False
            spare, self.ready = self.ready, None
            if spare is not None and spare.capacity >= needed:
                return spare
            if spare is not None:
                spare.file.close()
                self._remove(spare.name)
            capacity = self._next_capacity(stored_length)
            try:
                return self._reserve(capacity)
            except LogFullError:
                if not self._recycled:
                    raise
                # Space first: what was kept to be overwritten is worth more as free blocks.
                self._remove_recycled()
                return self._reserve(capacity)

    def _next_capacity(self, stored_length: int) -> int:
        wanted = max(FIRST_CAPACITY, CAPACITY_GROWTH * self._active().capacity)
        return capacity_for(stored_length, min(self._segment_size, wanted))

    def _reserve(self, capacity: int) -> Spare:
        """A new file of ``capacity`` bytes that reads as zeros, its space reserved."""
        name = self._new_name()
        file: File | None = None
        try:
            file = self._directory.open(name, create=True)
            file.allocate(capacity)
        except OSError as exc:
            if file is not None:
                close_quietly(file)
                self._remove(name)
            if exc.errno in NO_SPACE:
                raise LogFullError(self._directory.path, capacity, database=self._database) from exc
            raise
        return Spare(name, file, capacity)

    def _new_name(self) -> str:
        """Never the name of a file that a rotation may be renaming at this moment."""
        self._made += 1
        return f"{SPARE_PREFIX}{self._made}.tmp"

    # -- making one ready --

    def prepare(self) -> None:
        """Make the next segment ready in the background: space reserved, zeros written
        and synced, so that a commit meets neither ENOSPC nor block allocation.

        A rotation that cannot wait takes it as it is.  A full disk is not an error
        here: the rotation will say so, if it is still full then.
        """
        with self._lock:
            if self.ready is not None or self.preparing:
                return
            self.preparing = True
        spare: Spare | None = None
        try:
            spare = self._recycle()
            if spare is None:
                spare = self._reserve(self._next_capacity(0))
                if self._active().mean_frame_bytes < ZERO_FRAMES_BELOW:
                    self._write_zeros(spare)
        except (OSError, LogFullError):
            self.not_before = perf_counter() + SPARE_RETRY_SECONDS
            if spare is not None:
                close_quietly(spare.file)
                self._remove(spare.name)
                spare = None
        finally:
            with self._lock:
                self.ready = spare
                self.preparing = False
                self._lock.notify_all()

    def _recycle(self) -> Spare | None:
        """A dropped segment's file: its blocks are allocated, and need new zeros at most."""
        if not self._recycled:
            return None
        name = next(iter(self._recycled))
        try:
            file = self._directory.open(name, writable=True)
        except FileNotFoundError:
            # Somebody has cleaned up.
            del self._recycled[name]
            return None
        try:
            capacity = self._next_capacity(0)
            written = min(file.size(), capacity)
            features = FEATURE_REUSED
            if self._active().mean_frame_bytes < REUSE_FRAMES_FROM:
                written, features = self._zero(file, 0, written), 0
            if file.size() > capacity:
                file.truncate(capacity)
            file.allocate(capacity)
        except BaseException:
            close_quietly(file)
            # Not to be used again: a page that could not be written may stay lost.
            del self._recycled[name]
            self._remove(name)
            raise
        del self._recycled[name]
        return Spare(name, file, capacity, written, features)

    def _zero(self, file: File, start: int, end: int) -> int:
        """Write zeros from ``start`` on; returns how far it came before a rotation asked
        for the file.  What is left of an old file's content is cut off."""
        large = self._active().mean_frame_bytes >= ZERO_FRAMES_BELOW
        chunk = LARGE_ZERO_CHUNK if large else ZERO_CHUNK
        zeros = bytes(chunk)
        for offset in range(start, end, chunk):
            if self._hurry:
                file.truncate(offset)
                return offset
            started = perf_counter()
            file.pwrite([zeros[: end - offset]], offset)
            file.sync()
            if offset + chunk < end:
                self._pause(offset / end, perf_counter() - started)
        return end

    def _pause(self, done: float, seconds: float) -> None:
        """Leave the disk to the commits, after a piece that took so long."""
        with self._lock:
            for _ in range(PAUSES):
                active = self._active()
                used = active.position.offset / active.capacity
                due = (used - PREPARE_FROM) / (PREPARED_AT - PREPARE_FROM)
                if self._hurry or done < due:
                    return
                self._lock.wait(PAUSE_SHARE * seconds)

    def _write_zeros(self, spare: Spare) -> None:
        spare.written = self._zero(spare.file, 0, spare.capacity)
        if spare.written < spare.capacity:
            spare.file.allocate(spare.capacity)

    # -- files of dropped segments --

    def drop(self, dropped: Iterable[SegmentInfo]) -> None:
        """Remove segments' files, and what could not be removed before.  One is kept for the next
        segment, where there is none and nobody reads it.

        Raises:
          OSError: some are left, or may come back with a crash; the next call tries it again.
        """
        failed: OSError | None = None
        for _ in range(len(self.litter)):
            failed = self._remove(self.litter.pop(0)) or failed
        kept: str | None = None
        size = 0
        for segment in dropped:
            if kept is None:
                kept, size = self._keep(segment), segment.bytes
                if kept is not None:
                    continue
            failed = self._remove(segment.name) or failed
        try:
            self._directory.sync()
        except OSError:
            if kept is not None:
                # No later sync would prove that it has its new name.
                self.litter.append(kept)
            raise
        if kept is not None:
            # Only now: under the old name it must stay whole.
            with self._lock:
                self._recycled[kept] = size
        if failed is not None:
            raise failed

    def _keep(self, segment: SegmentInfo) -> str | None:
        """Give a segment's file another name, where it can be used again."""
        with self._lock:
            if self.ready is not None or self.preparing or self._recycled:
                return None
            with self._reading:
                if segment.header.salt in self._readers:
                    return None
                name = self._new_name()
                try:
                    self._directory.rename(segment.name, name)
                except OSError:
                    # Whichever name it has, it goes.
                    self.litter.append(name)
                    return None
                return name

    def _remove(self, name: str) -> OSError | None:
        """Remove a file; what it gives was in the way."""
        try:
            self._directory.unlink(name)
        except FileNotFoundError:
            pass
        except OSError as exc:
            self.litter.append(name)
            return exc
        return None

    def pin(self, header: SegmentHeader) -> None:
        """Somebody reads this segment: its file may be unlinked, but not written over."""
        with self._reading:
            self._readers[header.salt] = self._readers.get(header.salt, 0) + 1

    def unpin(self, header: SegmentHeader) -> None:
        with self._reading:
            self._readers[header.salt] -= 1
            if not self._readers[header.salt]:
                del self._readers[header.salt]

    # -- ending --

    def stop(self) -> None:
        """Have `prepare` return soon, for a close."""
        self._hurry = True

    def discard(self) -> None:
        """Remove what was made ready and kept; where that cannot be, the next open does."""
        spare, self.ready = self.ready, None
        if spare is not None:
            spare.file.close()
            self._remove(spare.name)
        self._remove_recycled()

    def _remove_recycled(self) -> None:
        for name in self._recycled:
            self._remove(name)
        self._recycled.clear()

    def close(self) -> None:
        """Give descriptors back, and leave the files."""
        if self.ready is not None:
            close_quietly(self.ready.file)

    def disown(self) -> None:
        """In a forked child: the parent's threads may have had the lock, and are not there."""
        self._lock = threading.Condition()
        self._reading = threading.Lock()
