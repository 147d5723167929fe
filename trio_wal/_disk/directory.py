"""The log as a directory of segments: open, write, rotate, truncate, close.

Law: blocking; no trio; one handle per open log.  `write`, `sync`, `truncate_after`
and `close` are called by one thread, the I/O worker, one after the other;
`prepare_spare` and `drop_before` may run in another at the same time.  Nothing is
acknowledged here: a caller may do that when `write` with ``sync=True`` has returned.

Three locks: ``_shape`` guards the list of segments and is held for an instant only,
``_truncating`` guards ``log.meta``, ``_spare_lock`` the segment that is being prepared.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Final

import attrs

from trio_wal._codec import require_zstd
from trio_wal._engine import RecoveryReport
from trio_wal._exceptions import (
    CorruptLogError,
    LogFullError,
    LogLockedError,
    LsnTruncatedError,
    UnsupportedFormatError,
    WrongDirectoryError,
)
from trio_wal._files import NO_SPACE, Directory, File, Files, close_quietly
from trio_wal._identity import History, branch
from trio_wal._retention import Retention
from trio_wal._util import KiB

from . import scan
from .chain import META_NEW_NAME, TRUNCATE_NAME, FoundSegment, read_meta, read_segment
from .finding import refuse
from .frame import (
    BLOCK,
    FEATURE_DATABASE,
    FEATURE_ZSTD,
    FrameError,
    FrameHeader,
    Meta,
    SegmentHeader,
    Truncation,
)
from .recovery import (
    VERIFY_BYTES,
    Plan,
    check_records,
    examine,
    reread_tail,
)
from .repair import repair, reserve_meta, uncreate, write_meta
from .scan import FrameScanner, Position, start_of
from .segment import (
    CAPACITY_GROWTH,
    FIRST_CAPACITY,
    SPARE_PREFIX,
    ActiveSegment,
    Extent,
    SegmentInfo,
    capacity_for,
    create_segment,
    encode,
)
from .walk import Walk

ZERO_CHUNK: Final = 256 * KiB
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


@attrs.define(eq=False)
class _Spare:
    """A file that reads as zeros, to become the next segment."""

    name: str
    file: File
    capacity: int
    zeroed: int = 0
    """So many bytes of it have been written, as zeros, and synced."""


class LogDirectory:
    """One open log on its files."""

    def __init__(
        self,
        files: Files,
        directory: Directory,
        plan: Plan,
        *,
        segment_size: int,
        features: int,
        started_us: int,
        found_names: frozenset[str],
    ) -> None:
        self._files = files
        self._directory = directory
        self._segment_size = segment_size
        self._new_locks()
        self._spare: _Spare | None = None
        self._preparing = False
        self._hurry = False
        self._recycled: list[str] = []
        self._spares_made = 0
        self._spare_not_before = 0.0
        self._meta_reserved = False
        self._readers: dict[bytes, int] = {}
        self.created: Final = plan.meta is None
        """Whether this open has made the log."""
        self._found_names: Final = found_names
        opened = repair(files, directory, plan, segment_size=segment_size, features=features)
        self._meta = opened.meta
        self._sealed = opened.sealed
        self.active: ActiveSegment = opened.active
        self._untouched = plan.meta is not None and plan.clean
        self.report: RecoveryReport = attrs.evolve(
            opened.report, seconds=max(0, files.time_us() - started_us) / 1e6
        )
        # The mark of the last close may be in the page cache only: its process was killed.
        self._unsynced = self._untouched
        self.synced_lsn: int = self.last_lsn
        """Up to here a sync has returned."""
        self.keep_from: int | None = None
        """Records from here on are never dropped, whatever is asked for; None: no such."""
        self.cuts: int = 0
        """Counts before and after the log's end is cut: a reader compares."""
        self.cutting: bool = False
        """Whether that is under way: what a reader misses now need not be damage."""
        self.cut_failed: OSError | None = None
        """What kept `truncate_after` from its end: log.meta may hold a decision that `_meta`
        does not know, and to write `_meta` again would take that back, files being gone."""
        self.sync_seconds: float = 0.0
        """How long the last sync took."""
        self._published: tuple[int, Meta] | None = None
        self.publish()

    def _new_locks(self) -> None:
        self._shape = threading.Lock()
        self._truncating = threading.Lock()
        self._spare_lock = threading.Condition()

    # -- what it is --

    @property
    def path(self) -> str:
        return self._directory.path

    @property
    def first_lsn(self) -> int:
        return self._meta.base_lsn

    @property
    def last_lsn(self) -> int:
        return self.active.position.next_lsn - 1

    @property
    def features(self) -> int:
        """Feature flags, as in `SegmentHeader`."""
        return self._meta.features

    @property
    def log_uuid(self) -> bytes:
        return self._meta.log_uuid

    @property
    def history(self) -> History:
        return self._meta.history

    @property
    def segments(self) -> int:
        return len(self._sealed) + 1

    @property
    def disk_bytes(self) -> int:
        """Bytes of segment files, space prepared but not yet written included."""
        spare = self._spare
        with self._shape:
            total = sum(segment.bytes for segment in self._sealed) + self.active.capacity
        return total + (spare.capacity if spare is not None else 0)

    def shape(self) -> tuple[list[SegmentInfo], ActiveSegment]:
        """The sealed segments and the one being written, at one moment."""
        with self._shape:
            return list(self._sealed), self.active

    def sealed(self) -> list[SegmentInfo]:
        with self._shape:
            return list(self._sealed)

    # -- writing --

    def write(self, records: Sequence[bytes], durable_lsn: int, *, sync: bool) -> bool:
        """Append one frame; with ``sync`` it is durable on return.

        Returns whether the next segment should be prepared now.

        Raises:
          LogFullError: the next segment cannot be prepared; nothing was written.
          OSError: the log is broken; the frame may be there or not.
        """
        body = encode(records, self._meta.features)
        if not self.active.fits(body.stored_length):
            self._rotate(body.stored_length)
        active = self.active
        active.write(body, durable_lsn, self._files.time_us())
        self._untouched = False
        self._unsynced = True
        if sync:
            self.sync()
        return (
            self._spare is None
            and active.position.offset > PREPARE_FROM * active.capacity
            and perf_counter() >= self._spare_not_before
        )

    def sync(self) -> None:
        """On return everything written is durable."""
        if self._unsynced:
            started = perf_counter()
            self.active.sync()
            self.sync_seconds = perf_counter() - started
            self._unsynced = False
        self.synced_lsn = self.last_lsn

    def publish(self) -> None:
        """Let readers in other processes know what is durable; nobody waits for this."""
        if self._published != (self.synced_lsn, self._meta):
            word = (self.synced_lsn, self._meta)
            with contextlib.suppress(OSError):
                self._directory.publish(self.synced_lsn, self._meta.epoch)
                self._published = word

    def make_room(self) -> None:
        """See whether a segment can be prepared again; `LogFullError` where not."""
        if self._spare is None:
            self._spare = self._take_spare(0)

    def rotate(self) -> None:
        """Finish the active segment, if it has records, and start the next one."""
        if self.active.records:
            self._rotate(0)

    def _rotate(self, stored_length: int) -> None:
        """The next segment, durable; then the footer of this one, durable.

        In this order a sealed last segment means that the next one was lost.
        """
        spare = self._take_spare(stored_length)
        try:
            old = self.active
            self._unsynced = old.rewrite_marks() or self._unsynced
            self.sync()
            # An empty segment that is too small is replaced: the new one has its name.
            replaces = not old.records
            header = SegmentHeader(
                old.header.log_uuid,
                old.header.number if replaces else old.header.number + 1,
                old.position.next_lsn,
                self._files.random_bytes(16),
                self._files.time_us(),
                old.header.previous if replaces else old.position.previous,
                self._meta.features,
            )
            # The file keeps its temporary name until its header is durable.
            active = create_segment(
                self._directory, spare.file, spare.name, header, spare.capacity, spare.zeroed
            )
        except BaseException:
            close_quietly(spare.file)
            raise
        active.position = attrs.evolve(active.position, time_us=old.position.time_us)
        finished: list[SegmentInfo] = []
        try:
            if replaces:
                old.file.close()
            else:
                finished.append(old.seal())
        except BaseException:
            close_quietly(active.file)
            raise
        with self._shape:
            self._sealed += finished
            self.active = active
        self._untouched = False

    # -- the next segment --

    def _next_capacity(self, stored_length: int) -> int:
        wanted = max(FIRST_CAPACITY, CAPACITY_GROWTH * self.active.capacity)
        return capacity_for(stored_length, min(self._segment_size, wanted))

    def _take_spare(self, stored_length: int) -> _Spare:
        """The prepared segment, or one made now without writing its zeros."""
        needed = capacity_for(stored_length, 0)
        with self._spare_lock:
            self._hurry = True
            self._spare_lock.notify_all()
            self._spare_lock.wait_for(lambda: not self._preparing)
            self._hurry = False
            spare, self._spare = self._spare, None
            if spare is not None and spare.capacity >= needed:
                return spare
            if spare is not None:
                spare.file.close()
                self._directory.unlink(spare.name)
            capacity = self._next_capacity(stored_length)
            try:
                return self._reserve_spare(capacity)
            except LogFullError:
                if not self._recycled:
                    raise
                # Space first: what was kept to be overwritten is worth more as free blocks.
                self._unlink_recycled()
                return self._reserve_spare(capacity)

    def _reserve_spare(self, capacity: int) -> _Spare:
        """A new file of ``capacity`` bytes that reads as zeros, its space reserved."""
        name = self._spare_name()
        file: File | None = None
        try:
            file = self._directory.open(name, create=True)
            file.allocate(capacity)
        except OSError as exc:
            if file is not None:
                close_quietly(file)
                self._directory.unlink(name)
            if exc.errno in NO_SPACE:
                database = bool(self.features & FEATURE_DATABASE)
                raise LogFullError(self.path, capacity, database=database) from exc
            raise
        return _Spare(name, file, capacity)

    def _spare_name(self) -> str:
        """Never the name of a file that a rotation may be renaming at this moment."""
        self._spares_made += 1
        return f"{SPARE_PREFIX}{self._spares_made}.tmp"

    def prepare_spare(self) -> None:
        """Make the next segment ready in the background: space reserved, zeros written
        and synced, so that a commit meets neither ENOSPC nor block allocation.

        A rotation that cannot wait takes it as it is.  A full disk is not an error
        here: the rotation will say so, if it is still full then.
        """
        if self._truncating.acquire(blocking=False):
            # Else whoever truncates reserves it himself.
            try:
                self._reserve_meta()
            finally:
                self._truncating.release()
        with self._spare_lock:
            if self._spare is not None or self._preparing:
                return
            self._preparing = True
        spare: _Spare | None = None
        try:
            spare = self._recycle()
            if spare is None:
                spare = self._reserve_spare(self._next_capacity(0))
                if self.active.mean_frame_bytes < ZERO_FRAMES_BELOW:
                    self._write_zeros(spare)
        except (OSError, LogFullError):
            self._spare_not_before = perf_counter() + SPARE_RETRY_SECONDS
            if spare is not None:
                close_quietly(spare.file)
                self._directory.unlink(spare.name)
                spare = None
        finally:
            with self._spare_lock:
                self._spare = spare
                self._preparing = False
                self._spare_lock.notify_all()

    def _recycle(self) -> _Spare | None:
        """A dropped segment's file: its blocks are allocated and need only new zeros."""
        if not self._recycled:
            return None
        name = self._recycled[0]
        file = self._directory.open(name, writable=True)
        try:
            capacity = self._next_capacity(0)
            zeroed = self._zero(file, 0, min(file.size(), capacity))
            if file.size() > capacity:
                file.truncate(capacity)
            file.allocate(capacity)
        except BaseException:
            close_quietly(file)
            # Not to be used again: a page that could not be written may stay lost.
            self._recycled.remove(name)
            with contextlib.suppress(OSError):
                self._directory.unlink(name)
            raise
        self._recycled.remove(name)
        return _Spare(name, file, capacity, zeroed)

    def _zero(self, file: File, start: int, end: int) -> int:
        """Write zeros from ``start`` on; returns how far it came before a rotation asked
        for the file.  What is left of an old file's content is cut off."""
        zeros = bytes(ZERO_CHUNK)
        for offset in range(start, end, ZERO_CHUNK):
            if self._hurry:
                file.truncate(offset)
                return offset
            started = perf_counter()
            file.pwrite([zeros[: end - offset]], offset)
            file.sync()
            if offset + ZERO_CHUNK < end:
                self._pause(offset / end, perf_counter() - started)
        return end

    def _pause(self, done: float, seconds: float) -> None:
        """Leave the disk to the commits, after a piece that took so long."""
        with self._spare_lock:
            for _ in range(PAUSES):
                used = self.active.position.offset / self.active.capacity
                due = (used - PREPARE_FROM) / (PREPARED_AT - PREPARE_FROM)
                if self._hurry or done < due:
                    return
                self._spare_lock.wait(PAUSE_SHARE * seconds)

    def _write_zeros(self, spare: _Spare) -> None:
        spare.zeroed = self._zero(spare.file, 0, spare.capacity)
        if spare.zeroed < spare.capacity:
            spare.file.allocate(spare.capacity)

    # -- truncation --

    def drop_before(self, lsn: int) -> int:
        """Drop the sealed segments that hold only records below ``lsn``.

        Durable on return: first ``log.meta`` says where the log starts, then files go.
        Returns how many were dropped.
        """
        with self._truncating:
            if self.cut_failed is not None:
                text = "the log's end could not be cut, and nothing else will be"
                raise OSError(errno.EIO, text, self.path) from self.cut_failed
            sealed = self.sealed()
            if self.keep_from is not None:
                # Looked at here, under the lock: a caller's own look may be out of date.
                lsn = min(lsn, self.keep_from)
            dropped = [segment for segment in sealed if segment.next_lsn <= lsn]
            if not dropped:
                return 0
            kept = sealed[len(dropped) :]
            first = kept[0].header if kept else self._header_after(dropped[-1])
            meta = attrs.evolve(self._meta, base_number=first.number, base_lsn=first.first_lsn)
            self._write_meta(meta)
            with self._shape:
                self._meta = meta
                # The I/O worker may have added one meanwhile.
                del self._sealed[: len(dropped)]
            spare: str | None = None
            for segment in dropped:
                spare = self._drop_file(segment, spare)
            self._directory.sync()
            self._reserve_meta()
            if spare is not None:
                # Not before its new name is durable: under the old one it must stay whole.
                with self._spare_lock:
                    self._recycled.append(spare)
        return len(dropped)

    def _write_meta(self, meta: Meta) -> None:
        """Raises `LogFullError`, with nothing changed, where even that has no place."""
        reserved, self._meta_reserved = self._meta_reserved, False
        try:
            write_meta(self._directory, meta, reserved=reserved)
        except OSError as exc:
            # Only the sync of its new name may have failed: then it is in place already.
            if exc.errno in NO_SPACE and read_meta(self._directory) == self._meta:
                raise LogFullError(self.path, BLOCK, "log.meta cannot be written") from exc
            raise

    def _reserve_meta(self) -> None:
        """As far as there is space."""
        if not self._meta_reserved:
            with contextlib.suppress(OSError):
                reserve_meta(self._directory, len(self._meta.encode()))
                self._meta_reserved = True

    def _header_after(self, segment: SegmentInfo) -> SegmentHeader:
        with self._shape:
            following = [s.header for s in self._sealed if s.first_lsn >= segment.next_lsn]
            return following[0] if following else self.active.header

    def _drop_file(self, segment: SegmentInfo, spare: str | None) -> str | None:
        """Keep one file for the next segment, unless somebody still reads it; returns its
        new name."""
        with self._spare_lock:
            recycle = (
                spare is None
                and self._spare is None
                and not self._preparing
                and not self._recycled
                and segment.header.salt not in self._readers
                and self.active.mean_frame_bytes < ZERO_FRAMES_BELOW
            )
            if recycle:
                spare = self._spare_name()
                self._directory.rename(segment.name, spare)
            else:
                self._directory.unlink(segment.name)
        return spare

    def apply_retention(self, policy: Retention) -> int:
        """Drop what ``policy`` does not keep; returns how many segments."""
        sealed = self.sealed()
        count = policy.droppable(sealed, self.active.position.offset, self._files.time_us())
        return self.drop_before(sealed[count - 1].next_lsn) if count else 0

    def next_retention_us(self, policy: Retention) -> int | None:
        """Microseconds until time alone changes what ``policy`` keeps."""
        due = policy.next_change_us(self.sealed())
        return None if due is None else max(0, due - self._files.time_us())

    def truncate_after(self, lsn: int) -> None:
        """Drop the records above ``lsn``, durably and all or none.

        The frames that stay in part are copied into a new segment; ``log.meta`` then
        decides, in one rename, that this segment is the log's end; only then does
        anything go.  A crash in between is finished by recovery.

        Raises:
          CorruptLogError: what is to stay cannot be read; nothing was changed.
          LogFullError: there is no space for the new segment; nothing was changed.
          LsnTruncatedError: the log starts behind ``lsn + 1`` by now; nothing was changed.
        """
        if lsn >= self.last_lsn:
            return
        with self._truncating:
            if lsn < self.first_lsn - 1:
                # Retention, in another thread, was faster.
                raise LsnTruncatedError(self.first_lsn, lsn)
            self.cuts += 1
            self.cutting = True
            try:
                self._cut(lsn)
            except OSError as exc:
                self.cut_failed = exc
                raise
            finally:
                self.cutting = False

    def _cut(self, lsn: int) -> None:
        self.sync()
        keep, position, records = self._find_cut(lsn)
        history = branch(self._meta.history, lsn, self._files.random_bytes(4))
        header = SegmentHeader(
            self.active.header.log_uuid,
            keep.header.number + 1 if keep is not None else self._meta.base_number,
            position.next_lsn,
            self._files.random_bytes(16),
            self._files.time_us(),
            position.previous,
            self._meta.features,
        )
        body = encode(records, self._meta.features)
        spare = self._take_spare(body.stored_length)
        try:
            spare.file.pwrite([header.encode()], 0)
            new = ActiveSegment(spare.file, Extent(header, spare.capacity))
            new.position = attrs.evolve(new.position, time_us=position.time_us)
            if records:
                new.write(body, position.next_lsn - 1, position.time_us)
            spare.file.sync()
            self._directory.rename(spare.name, TRUNCATE_NAME)
            self._directory.sync()
            keep_number = header.number - 1
            cut = Truncation(
                header.salt, keep_number, position.offset, position.previous, header.first_lsn
            )
            meta = attrs.evolve(self._meta, truncation=cut, history=history)
            try:
                self._write_meta(meta)
            except LogFullError:
                self._directory.unlink(TRUNCATE_NAME)
                raise
            # The block of the old one is free now, and the next write must not fail.
            self._reserve_meta()
            self._finish_truncation(meta, keep, new.extent)
        finally:
            close_quietly(spare.file)

    def _finish_truncation(self, meta: Meta, keep: Extent | None, new: Extent) -> None:
        """Carry out what ``log.meta`` now says, as recovery would after a crash.

        Decided is decided: an error here breaks the log, and recovery goes on from there.
        """
        assert meta.truncation is not None
        keep_number = meta.truncation.keep_number
        everything = [*(info.header for info in self._sealed), self.active.header]
        last = FoundSegment(new.header, TRUNCATE_NAME, new.capacity, None, None)
        plan = Plan(
            meta,
            leftovers=tuple(header.name for header in everything if header.number > keep_number),
            sealed=tuple(info for info in self._sealed if info.header.number < keep_number),
            last=last,
            end=new,
            marks_offset=new.end.offset,
            seal_previous=keep,
            clean=False,
        )
        reserved, self._meta_reserved = self._meta_reserved, False
        done = repair(
            self._files,
            self._directory,
            plan,
            segment_size=self._segment_size,
            features=self.features,
            meta_reserved=reserved,
        )
        self.active.file.close()
        with self._shape:
            self._meta = done.meta
            self._sealed = done.sealed
            self.active = done.active
        self.cuts += 1
        self._untouched = False
        self.synced_lsn = self.last_lsn

    def _find_cut(self, lsn: int) -> tuple[Extent | None, Position, list[bytes]]:
        """Where the log will end: (the last segment that stays, up to there; that place in the
        chain; the records after it which stay)."""
        sealed = [s for s in self._sealed if s.first_lsn <= lsn + 1]
        header, capacity = self.active.header, self.active.capacity
        if header.first_lsn > lsn + 1:
            info = sealed.pop()
            header, capacity = info.header, info.bytes
        file = self._directory.open(header.name)
        records: list[bytes] = []
        frames = 0
        try:
            scanner = FrameScanner(file.pread, header, start_of(header))
            position = scanner.position
            for frame, body in scanner:
                if frame.next_lsn > lsn + 1:
                    if frame.first_lsn <= lsn:
                        records = self._payloads(file, frame, body)[: lsn + 1 - frame.first_lsn]
                        position = attrs.evolve(position, time_us=frame.time_us)
                    break
                frames += bool(frame.count)
                position = scanner.position
            else:
                raise self._damage(file, scanner)
        finally:
            file.close()
        if position.next_lsn > header.first_lsn:
            return Extent(header, capacity, position, frames), position, records
        # Nothing of this segment stays: the new one takes its place in the chain.
        previous = attrs.evolve(position, previous=header.previous)
        if not sealed:
            return None, previous, records
        keep = self._whole_extent(sealed[-1], header)
        time_us = max(keep.end.time_us, position.time_us)
        return keep, attrs.evolve(keep.end, time_us=time_us), records

    def _whole_extent(self, info: SegmentInfo, following: SegmentHeader) -> Extent:
        """A sealed segment, up to where the one after it goes on."""
        segment = read_segment(self._directory, info.name)
        file = self._directory.open(info.name)
        try:
            walk = Walk(file, segment, refuse)
            walk.check_up_to(following)
        finally:
            file.close()
        return walk.extent()

    def _damage(self, file: File, scanner: FrameScanner) -> CorruptLogError:
        """The frames end before the place that was looked for: what is to stay is not there."""
        here = scanner.position
        reason = scanner.reason or f"the frame of LSN {here.next_lsn} is missing"
        return CorruptLogError(file.path, here.offset, reason)

    def _payloads(self, file: File, frame: FrameHeader, body: bytes) -> list[bytes]:
        try:
            return scan.payloads(frame, body)
        except FrameError as exc:
            raise CorruptLogError(file.path, frame.offset, str(exc)) from exc

    # -- reading --

    def pin(self, header: SegmentHeader) -> None:
        """Somebody reads this segment: its file may be unlinked, but not written over."""
        with self._spare_lock:
            self._readers[header.salt] = self._readers.get(header.salt, 0) + 1

    def unpin(self, header: SegmentHeader) -> None:
        with self._spare_lock:
            self._readers[header.salt] -= 1
            if not self._readers[header.salt]:
                del self._readers[header.salt]

    def open_segment(self, header: SegmentHeader) -> File:
        return self._directory.open(header.name)

    # -- closing --

    def close(self, *, orderly: bool = True) -> None:
        """Sync, mark the clean close, give everything back.

        ``orderly=False`` after a failure: only let go.
        """
        try:
            if orderly:
                if not self._untouched:
                    # The mark says that all before it is durable, older marks included.
                    self._unsynced = self.active.rewrite_marks() or self._unsynced
                self.sync()
                if not self._untouched:
                    self.active.mark_closed()
                self._discard_spares()
        finally:
            close_quietly(self.active.file)
            if self._spare is not None:
                close_quietly(self._spare.file)
            close_quietly(self._directory)

    def abandon(self, also: Callable[[], None] | None = None) -> None:
        """The open has failed after all: let go, and remove what it has made.

        Args:
          also: removes what was made beside the log; called before the log goes.
        """
        try:
            close_quietly(self.active.file)
            if self._spare is not None:
                close_quietly(self._spare.file)
            with contextlib.suppress(OSError, CorruptLogError, UnsupportedFormatError):
                if also is not None:
                    also()
                uncreate(self._directory, self._found_names, created=self.created)
                self._directory.unmake()
        finally:
            close_quietly(self._directory)

    def disown(self) -> None:
        """In a forked child: the parent's threads may have had the locks, and are not there."""
        self._new_locks()

    def stop_preparing(self) -> None:
        """Have `prepare_spare` return soon, for a close."""
        self._hurry = True

    def _discard_spares(self) -> None:
        if self._meta_reserved:
            self._meta_reserved = False
            self._directory.unlink(META_NEW_NAME)
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.file.close()
            self._directory.unlink(spare.name)
        self._unlink_recycled()

    def _unlink_recycled(self) -> None:
        for name in self._recycled:
            self._directory.unlink(name)
        self._recycled.clear()


def open_log_directory(
    files: Files,
    path: str,
    *,
    segment_size: int,
    verify_bytes: float = VERIFY_BYTES,
    compression: str | None = None,
    check: Callable[[Plan], int | None] | None = None,
    database: bool = False,
    trust_directory: bool = False,
) -> LogDirectory:
    """Lock, recover and open the log in a directory, which is created if it is missing.

    Args:
      check: looks at the plan before anything is written, and may refuse it; returns the LSN
          from which on all records will be read at once, and so are checked before, or None.

    Raises:
      LogLockedError, WrongDirectoryError, UntrustedDirectoryError, CorruptLogError,
      UnsupportedFormatError, LogFullError, OSError: what this open has created is removed
          again.
      ModuleNotFoundError: the log is compressed and zstandard is not installed.
    """
    if compression == "zstd":
        require_zstd()
    started_us = files.time_us()
    # A database's log is in the database, and not where a link leads.
    directory = _open_locked(files, path, follow=not database, trust_directory=trust_directory)
    plan: Plan | None = None
    found_names: frozenset[str] = frozenset()
    try:
        found_names = frozenset(directory.names())
        reread_tail(directory)
        plan = examine(directory, verify_bytes=verify_bytes)
        features = FEATURE_ZSTD if compression == "zstd" else 0
        if database:
            features |= FEATURE_DATABASE
        if plan.meta is not None:
            if database and not plan.meta.features & FEATURE_DATABASE:
                raise WrongDirectoryError(directory.path, "a log, not a database's", "open_wal()")
            if not database and plan.meta.features & FEATURE_DATABASE:
                parent = directory.path.rpartition("/")[0]
                raise WrongDirectoryError(
                    directory.path, "the log of a database", f"open_database({parent!r})"
                )
            if compression is not None and features != plan.meta.features:
                raise ValueError(
                    f"compression must be what the log was created with, not {compression!r}"
                )
            if plan.meta.features & FEATURE_ZSTD:
                require_zstd()
        if check is not None:
            read_from = check(plan)
            if read_from is not None:
                plan = check_records(directory, plan, read_from)
        # Only now, when nothing can be refused any more, is anything written.
        directory.sign(new=plan.meta is None)
        return LogDirectory(
            files,
            directory,
            plan,
            segment_size=segment_size,
            features=features,
            started_us=started_us,
            found_names=found_names,
        )
    except BaseException:
        with contextlib.suppress(OSError, CorruptLogError, UnsupportedFormatError):
            if plan is not None:
                uncreate(directory, found_names, created=plan.meta is None)
            directory.unmake()
        close_quietly(directory)
        raise


def _open_locked(files: Files, path: str, *, follow: bool, trust_directory: bool) -> Directory:
    """The directory, made if it is missing, with this process as its owner."""
    while True:
        directory = files.open_directory(path, create=True, follow=follow)
        try:
            if not trust_directory:
                directory.check_trusted()
            directory.lock()
            if directory.is_there():
                return directory
        except BaseException as exc:
            if not isinstance(exc, LogLockedError):
                # Else another is its owner by now, even if it was made here.
                directory.unmake()
            close_quietly(directory)
            raise
        # Its owner failed to open it, and has removed what it had made.
        close_quietly(directory)
