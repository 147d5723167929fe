"""Where a log is cut, and the plan that recovery would make of it: for ``truncate_after``.

Law: only reads.  What is to stay is checked, and damage there is an error: nothing was changed.
Blocking; no trio.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from trio_wal._exceptions import CorruptLogError
from trio_wal._files import Directory, File

from . import scan
from .chain import TRUNCATE_NAME, FoundSegment, read_segment
from .finding import refuse
from .frame import FrameError, FrameHeader, Meta, SegmentHeader
from .recovery import Plan
from .scan import FrameScanner, Position, start_of
from .segment import ActiveSegment, Extent, SegmentInfo
from .walk import Walk


class Cut(msgspec.Struct, frozen=True):
    """Where the log will end."""

    keep: Extent | None
    """The last segment that stays, up to there; None: none does."""
    position: Position
    """That place in the chain."""
    records: list[bytes]
    """Those after it which stay: the frame that has them goes."""


def find_cut(
    directory: Directory, segments: Sequence[SegmentInfo], active: ActiveSegment, lsn: int
) -> Cut:
    """The place behind the record ``lsn`` of a log with these segments.

    Raises:
      CorruptLogError: what is to stay cannot be read.
    """
    sealed = [s for s in segments if s.first_lsn <= lsn + 1]
    header, capacity = active.header, active.capacity
    if header.first_lsn > lsn + 1:
        info = sealed.pop()
        header, capacity = info.header, info.bytes
    file = directory.open(header.name)
    records: list[bytes] = []
    frames = 0
    try:
        scanner = FrameScanner(file.pread, header, start_of(header))
        position = scanner.position
        for frame, body in scanner:
            if frame.next_lsn > lsn + 1:
                if frame.first_lsn <= lsn:
                    records = _payloads(file, frame, body)[: lsn + 1 - frame.first_lsn]
                    position = replace(position, time_us=frame.time_us)
                break
            frames += bool(frame.count)
            position = scanner.position
        else:
            raise _damage(file, scanner)
    finally:
        file.close()
    if position.next_lsn > header.first_lsn:
        return Cut(Extent(header, capacity, position, frames), position, records)
    # Nothing of this segment stays: the new one takes its place in the chain.
    previous = replace(position, previous=header.previous)
    if not sealed:
        return Cut(None, previous, records)
    keep = _whole_extent(directory, sealed[-1], header)
    time_us = max(keep.end.time_us, position.time_us)
    return Cut(keep, replace(keep.end, time_us=time_us), records)


def _whole_extent(directory: Directory, info: SegmentInfo, following: SegmentHeader) -> Extent:
    """A sealed segment, up to where the one after it goes on."""
    segment = read_segment(directory, info.name)
    file = directory.open(info.name)
    try:
        walk = Walk(file, segment, refuse)
        walk.check_up_to(following)
    finally:
        file.close()
    return walk.extent()


def _damage(file: File, scanner: FrameScanner) -> CorruptLogError:
    """The frames end before the place that was looked for: what is to stay is not there."""
    here = scanner.position
    reason = scanner.reason or f"the frame of LSN {here.next_lsn} is missing"
    return CorruptLogError(file.path, here.offset, reason)


def _payloads(file: File, frame: FrameHeader, body: bytes) -> list[bytes]:
    try:
        return scan.payloads(frame, body)
    except FrameError as exc:
        raise CorruptLogError(file.path, frame.offset, str(exc)) from exc


def plan_cut(
    meta: Meta,
    keep: Extent | None,
    new: Extent,
    segments: Sequence[SegmentInfo],
    active: ActiveSegment,
) -> Plan:
    """To carry out what ``log.meta`` now says, as recovery would after a crash.

    Args:
      new: the segment in which the log goes on, under its temporary name.
      segments, active: what the log had until now.
    """
    assert meta.truncation is not None
    keep_number = meta.truncation.keep_number
    everything = [*(info.header for info in segments), active.header]
    return Plan(
        meta,
        leftovers=tuple(header.name for header in everything if header.number > keep_number),
        sealed=tuple(info for info in segments if info.header.number < keep_number),
        last=FoundSegment(new.header, TRUNCATE_NAME, new.capacity, None, None),
        end=new,
        marks_offset=new.end.offset,
        seal_previous=keep,
        clean=False,
    )
