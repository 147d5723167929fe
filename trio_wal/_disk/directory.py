"""The log as a directory of segments: write, rotate, truncate, close.

Law: blocking; no trio; one handle per open log.  `write`, `sync`, `truncate_after`
and `close` are called by one thread, the I/O worker, one after the other;
`prepare_spare` and `drop_before` may run in another at the same time.  Nothing is
acknowledged here: a caller may do that when `write` with ``sync=True`` has returned.

Three locks: ``_shape`` guards the list of segments and is held for an instant only,
``MetaFile.deciding`` guards ``log.meta``, that of `Spares` the segment that is being prepared.
"""

from __future__ import annotations

import contextlib
import errno
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Final

import attrs
from msgspec.structs import replace

from trio_wal._engine import RecoveryReport
from trio_wal._exceptions import (
    CorruptLogError,
    LogFullError,
    LsnTruncatedError,
    UnsupportedFormatError,
)
from trio_wal._files import Directory, File, Files, close_quietly
from trio_wal._identity import History, branch
from trio_wal._places import Place
from trio_wal._retention import Retention

from .chain import TRUNCATE_NAME
from .cut import find_cut, plan_cut
from .frame import DATA_OFFSET, FEATURE_DATABASE, Meta, SegmentHeader, Truncation
from .holds import Holds
from .metafile import MetaFile
from .placesfile import PlacesFile
from .recovery import Plan
from .repair import repair, uncreate
from .segment import ActiveSegment, Extent, SegmentInfo, create_segment, encode, write_header
from .spares import PREPARE_FROM, Spares


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
        places: Mapping[str, Place],
    ) -> None:
        self._files = files
        self._directory = directory
        self._segment_size = segment_size
        self._shape = threading.Lock()
        self.created: Final = plan.meta is None
        """Whether this open has made the log."""
        self._found_names: Final = found_names
        opened = repair(files, directory, plan, segment_size=segment_size, features=features)
        self.meta: Final = MetaFile(directory, opened.meta)
        self.places: Final = PlacesFile(directory, opened.meta.log_uuid, places)
        self._sealed = opened.sealed
        self.active: ActiveSegment = opened.active
        self.spares: Final = Spares(
            directory,
            lambda: self.active,
            segment_size=segment_size,
            database=bool(opened.meta.features & FEATURE_DATABASE),
        )
        self._holds = Holds()
        self._untouched = plan.meta is not None and plan.clean
        self.report: RecoveryReport = attrs.evolve(
            opened.report, seconds=max(0, files.time_us() - started_us) / 1e6
        )
        # The mark of the last close may be in the page cache only: its process was killed.
        self._unsynced = self._untouched
        self.synced_lsn: int = self.last_lsn
        """Up to here a sync has returned."""
        self.cuts: int = 0
        """Counts before and after the log's end is cut: a reader compares."""
        self.cutting: bool = False
        """Whether that is under way: what a reader misses now need not be damage."""
        self.cut_failed: OSError | None = None
        """What kept `truncate_after` from its end: log.meta may hold a decision that `meta`
        does not know, and to write what it knows again would take that back, files being gone."""
        self.sync_seconds: float = 0.0
        """How long the last sync took."""
        self._published: tuple[int, Meta] | None = None
        self.publish()

    # -- what it is --

    @property
    def path(self) -> str:
        return self._directory.path

    @property
    def first_lsn(self) -> int:
        return self.meta.says.base_lsn

    @property
    def last_lsn(self) -> int:
        return self.active.position.next_lsn - 1

    @property
    def features(self) -> int:
        """Feature flags, as in `SegmentHeader`."""
        return self.meta.says.features

    @property
    def log_uuid(self) -> bytes:
        return self.meta.says.log_uuid

    @property
    def history(self) -> History:
        return self.meta.says.history

    @property
    def segments(self) -> int:
        return len(self._sealed) + 1

    @property
    def disk_bytes(self) -> int:
        """Bytes of segment files, space prepared but not yet written included."""
        prepared = self.spares.bytes
        with self._shape:
            total = sum(segment.bytes for segment in self._sealed) + self.active.capacity
        return total + prepared

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
        body = encode(records, self.meta.says.features)
        if not self.active.fits(body.stored_length):
            self._rotate(body.stored_length)
        active = self.active
        active.write(body, durable_lsn, self._files.time_us())
        self._untouched = False
        self._unsynced = True
        if sync:
            self.sync()
        spares = self.spares
        return (
            spares.ready is None
            and active.position.offset > PREPARE_FROM * active.capacity
            and perf_counter() >= spares.not_before
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
        meta = self.meta.says
        if self._published != (self.synced_lsn, meta):
            word = (self.synced_lsn, meta)
            with contextlib.suppress(OSError):
                self._directory.publish(self.synced_lsn, meta.epoch)
                self._published = word

    def make_room(self) -> None:
        """See whether a segment can be prepared again; `LogFullError` where not."""
        self.spares.make_room()

    def prepare_spare(self) -> None:
        """Make the next segment ready, in the background; see `Spares.prepare`."""
        self.meta.reserve_unless_deciding()
        self.spares.prepare()

    def rotate(self) -> None:
        """Finish the active segment, if it has records, and start the next one."""
        if self.active.records:
            self._rotate(0)

    def _rotate(self, stored_length: int) -> None:
        """The next segment, durable; then the footer of this one, durable.

        In this order a sealed last segment means that the next one was lost.
        """
        spare = self.spares.take(stored_length)
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
                self.features | spare.features,
            )
            # The file keeps its temporary name until its header is durable.
            active = create_segment(
                self._directory, spare.file, spare.name, header, spare.capacity, spare.written
            )
        except BaseException:
            close_quietly(spare.file)
            raise
        active.position = replace(active.position, time_us=old.position.time_us)
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

    # -- truncation --

    def hold(self, who: str, lsn: int | None, bytes_max: float = math.inf) -> bool:
        """See `Holds.set`.  Returns whether that may let go of the oldest segment."""
        self._holds.set(who, lsn, bytes_max)
        with self._shape:
            oldest = self._sealed[0].next_lsn if self._sealed else None
        return oldest is not None and (lsn is None or lsn >= oldest)

    def behind(self, lsn: int) -> tuple[int, int]:
        """How many bytes of frames come after ``lsn``, and when the next record cannot have been
        written before; both estimated from what is known of whole segments."""
        sealed, active = self.shape()
        now = active.position
        count = now.next_lsn - active.header.first_lsn
        share = min(1.0, (now.next_lsn - 1 - lsn) / count) if count else 0.0
        total = share * (now.offset - DATA_OFFSET)
        since = active.header.created_us
        for segment in reversed(sealed):
            if segment.next_lsn - 1 <= lsn:
                break
            count = segment.next_lsn - segment.first_lsn
            share = min(1.0, (segment.next_lsn - 1 - lsn) / count) if count else 0.0
            total += share * segment.bytes
            since = segment.header.created_us
        return max(0, math.ceil(total)), since

    def drop_before(self, lsn: int, policy: Retention | None = None) -> int:
        """Drop the sealed segments that hold only records below ``lsn``.

        Durable on return: first ``log.meta`` says where the log starts, then files go.
        Returns how many were dropped.

        Args:
          policy: instead of ``lsn``: what it does not keep is dropped.

        Raises:
          LogFullError: ``log.meta`` cannot be written; nothing was dropped.
          OSError: this may have been done or not; the next call goes on with it.
        """
        with self.meta.deciding:
            # Looked at here, under the lock: a caller's own look may be out of date.
            sealed = self.sealed()
            used = self.active.position.offset
            if policy is not None:
                count = policy.droppable(sealed, used, self._files.time_us())
                if not count and not self.spares.litter:
                    return 0
                lsn = sealed[count - 1].next_lsn if count else 0
            if self.cut_failed is not None:
                text = "the log's end could not be cut, and nothing else will be"
                raise OSError(errno.EIO, text, self.path) from self.cut_failed
            lsn = self._holds.allowed(lsn, sealed, used)
            dropped = [segment for segment in sealed if segment.next_lsn <= lsn]
            if dropped:
                # The I/O worker may have begun another one meanwhile.
                now, active = self.shape()
                last = dropped[-1]
                following = [segment for segment in now if segment.first_lsn >= last.next_lsn]
                first = following[0].header if following else active.header
                meta = replace(self.meta.says, base_number=first.number, base_lsn=first.first_lsn)
                self.meta.write(meta)
                with self._shape:
                    self.meta.says = meta
                    # The I/O worker may have added one meanwhile.
                    del self._sealed[: len(dropped)]
            if dropped or self.spares.litter:
                self.spares.drop(dropped)
                self.meta.reserve()
        return len(dropped)

    def apply_retention(self, policy: Retention) -> int:
        """Drop what ``policy`` does not keep; returns how many segments."""
        return self.drop_before(0, policy)

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
        with self.meta.deciding:
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
        cut = find_cut(self._directory, self._sealed, self.active, lsn)
        keep, position, records = cut.keep, cut.position, cut.records
        says = self.meta.says
        history = branch(says.history, lsn, self._files.random_bytes(4))
        body = encode(records, says.features)
        spare = self.spares.take(body.stored_length)
        try:
            header = SegmentHeader(
                self.active.header.log_uuid,
                keep.header.number + 1 if keep is not None else says.base_number,
                position.next_lsn,
                self._files.random_bytes(16),
                self._files.time_us(),
                position.previous,
                says.features | spare.features,
            )
            write_header(spare.file, header, spare.capacity)
            new = ActiveSegment(spare.file, Extent.empty(header, spare.capacity))
            new.position = replace(new.position, time_us=position.time_us)
            if records:
                new.write(body, position.next_lsn - 1, position.time_us)
            spare.file.sync()
            self._directory.rename(spare.name, TRUNCATE_NAME)
            self._directory.sync()
            keep_number = header.number - 1
            decided = Truncation(
                header.salt, keep_number, position.offset, position.previous, header.first_lsn
            )
            meta = replace(says, truncation=decided, history=history)
            try:
                self.meta.write(meta)
            except LogFullError:
                self._directory.unlink(TRUNCATE_NAME)
                raise
            # The block of the old one is free now, and the next write must not fail.
            self.meta.reserve()
            self._finish_truncation(meta, keep, new.extent)
        finally:
            close_quietly(spare.file)

    def _finish_truncation(self, meta: Meta, keep: Extent | None, new: Extent) -> None:
        """Carry out what ``log.meta`` now says, as recovery would after a crash.

        Decided is decided: an error here breaks the log, and recovery goes on from there.
        """
        plan = plan_cut(meta, keep, new, self._sealed, self.active)
        done = repair(
            self._files,
            self._directory,
            plan,
            segment_size=self._segment_size,
            features=self.features,
            meta_reserved=self.meta.take_reserved(),
        )
        self.active.file.close()
        with self._shape:
            self.meta.says = done.meta
            self._sealed = done.sealed
            self.active = done.active
        self.cuts += 1
        self._untouched = False
        self.synced_lsn = self.last_lsn

    # -- reading --

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
                self.meta.discard()
                self.spares.discard()
        finally:
            close_quietly(self.active.file)
            self.spares.close()
            close_quietly(self._directory)

    def abandon(self, also: Callable[[], None] | None = None) -> None:
        """The open has failed after all: let go, and remove what it has made.

        Args:
          also: removes what was made beside the log; called before the log goes.
        """
        try:
            close_quietly(self.active.file)
            self.spares.close()
            with contextlib.suppress(OSError, CorruptLogError, UnsupportedFormatError):
                if also is not None:
                    also()
                uncreate(self._directory, self._found_names, created=self.created)
                self._directory.unmake()
        finally:
            close_quietly(self._directory)

    def disown(self) -> None:
        """In a forked child: the parent's threads may have had the locks, and are not there."""
        self._shape = threading.Lock()
        self.meta.disown()
        self.spares.disown()
