"""A directory -> a plan, or a typed error.

Law: only reads and decides; `repair` carries the plan out.  Damage is an error, never a
reason to drop something.  No trio.

What can be there after a crash, and what becomes of it:

  the log's last segment ends in an invalid frame     the unfinished batch of a crash: cut
  ... and a later frame says it had been durable      damage: refuse
  the last frames are not proven durable by a         copied into a new segment, synced, and
  later frame                                         the old segment sealed before them
  the last segment but one has no footer              a rotation was interrupted: sealed
  log.meta tells of a decided truncate_after          carried out
  segments below log.meta's base                      a truncate_before was interrupted: dropped
  the last segment ends in a footer                   the segment behind it is missing: refuse
  anything else that is not a chain                   refuse
"""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from typing import Final

import attrs

from trio_wal._exceptions import CorruptLogError, UnsupportedFormatError
from trio_wal._files import Directory, File
from trio_wal._util import KiB, MiB

from . import scan
from .chain import (
    TRUNCATE_NAME,
    Chain,
    FoundSegment,
    find_segments,
    is_foreign,
    joins,
    judge_end,
    no_log,
    place_before,
    read_meta,
    read_segment,
    temporary,
)
from .frame import (
    DATA_OFFSET,
    POINTER_OFFSET,
    Footer,
    FrameError,
    FrameHeader,
    Kind,
    Meta,
    SegmentHeader,
    decode_footer,
    index_step,
    segment_name_lsn,
)
from .scan import FrameScanner, Position, start_of
from .segment import SegmentInfo

VERIFY_BYTES: Final = 32 * MiB
"""How much of the log is checked record by record on every open, newest first."""
_FRAME_COST: Final = 32 * KiB
_RECORD_COST: Final = 64
"""What checking one more frame, or record, costs, as bytes: about 12 us, or 25 ns, at 2-3 GB/s."""


@attrs.frozen
class Plan:
    """What `repair` will do, and what is known when it is done."""

    meta: Meta | None
    """None: there is no log yet."""
    leftovers: tuple[str, ...] = ()
    """Files to unlink: nothing of the log needs them."""
    sealed: tuple[SegmentInfo, ...] = ()
    last: FoundSegment | None = None
    end: Position | None = None
    """Behind the last valid frame."""
    counts: tuple[int, int] = (0, 0)
    """(records, data frames) of the last segment."""
    index: tuple[tuple[int, int], ...] = ()
    marks_offset: int = 0
    """Behind the last frame with records: CLOSE frames may stand between here and ``end``."""
    copy_from: Position | None = None
    """Frames from here on go into a new segment; None: go on in the last one."""
    copy_counts: tuple[int, int] = (0, 0)
    """(records, data frames) before ``copy_from``."""
    seal_previous: tuple[FoundSegment, _Walk] | None = None
    """The last segment but one, up to its end: it gets its missing footer."""
    previous: FoundSegment | None = None
    """The last segment but one."""
    torn_bytes: int = 0
    clean: bool = True
    records_replayed: int = 0
    bytes_scanned: int = 0
    verified_lsn: int = 1
    """Every record from here on was checked."""

    @property
    def last_lsn(self) -> int:
        return 0 if self.end is None else self.end.next_lsn - 1


def reread_tail(directory: Directory) -> None:
    """Before a log is recovered: have the end of it read from the disk.

    After a failed write or sync the page cache holds what the disk does not, and such a page
    may stay lost even if it is written again (see `_files`).  A process that has ended can
    have left such pages in the last two segments only: it does not begin a third before the
    footer of the first is synced.  And recovery writes to no other segment.

    Of those two, what stands before a SEAL or CLOSE frame is kept in the cache, so that the
    open of a large log need not wait for the disk: such a frame is written only after a sync
    of all before it has returned, and what had to be recovered before was read from the disk
    then.  It proves that wherever it is seen, be it in the page cache alone.  It does not prove
    itself: the frame, all behind it, and the pointer to it, which are what is written again,
    come from the disk; and so does everything where there is none.
    """
    names = directory.names()
    segments = [name for name in names if segment_name_lsn(name) is not None]
    for name in (*segments[-2:], *(name for name in names if name == TRUNCATE_NAME)):
        directory.reread(name, keep=_proven_durable(directory, name))


def _proven_durable(directory: Directory, name: str) -> range:
    """The bytes of a segment that were on the disk when its SEAL or last CLOSE was written."""
    try:
        mark = read_segment(directory, name).mark
    except (CorruptLogError, UnsupportedFormatError):
        # For `examine` to say.
        mark = None
    return range(DATA_OFFSET, DATA_OFFSET if mark is None else mark.offset)


# -- examine ----------------------------------------------------------------------


@attrs.define
class _Walk:
    """A pass over one segment, or its end: what `examine` needs to know of it."""

    start: Position
    end: Position
    data_end: Position
    """Behind the last frame with records: only CLOSE frames may stand between here and ``end``."""
    records: int = 0
    frames: int = 0
    bytes: int = 0
    reason: str = ""
    last_kind: Kind | None = None
    index: list[tuple[int, int]] = attrs.Factory(list[tuple[int, int]])
    unproven: deque[tuple[Position, int, int]] = attrs.Factory(deque[tuple[Position, int, int]])
    """For each frame not proven durable: where the frame with records before it ended, and how
    many records and frames were before.  CLOSE frames between the two are passed over: nothing
    proves that they are on the disk, and nothing may be chained to them."""


def _walk(
    file: File,
    segment: FoundSegment,
    start: Position,
    *,
    counts: tuple[int, int] = (0, 0),
    until: SegmentHeader | FrameHeader | None = None,
    chained: bool = True,
    data_end: Position | None = None,
) -> _Walk:
    """Check every frame from ``start`` on; stops before the segment, or the SEAL or CLOSE
    frame, ``until``.  With ``chained=False`` it is not known what is before ``start``;
    ``data_end`` says where the records before it end, if that is not there."""
    scanner = FrameScanner(file.pread, segment.header, start, chained=chained, skim=True)
    walk = _Walk(start, start, data_end or start, *counts)
    step = index_step(segment.size)
    here = start
    frames = iter(scanner)
    while until is None or not joins(here, until):
        frame_body = next(frames, None)
        if frame_body is None:
            break
        frame, body = frame_body
        try:
            scan.check_body(frame, body)
        except FrameError as exc:
            raise CorruptLogError(file.path, frame.offset, str(exc)) from exc
        if frame.kind is Kind.DATA:
            if not walk.index or frame.offset - walk.index[-1][1] >= step:
                walk.index.append((frame.first_lsn, frame.offset))
            walk.unproven.append((walk.data_end, walk.records, walk.frames))
            walk.records += frame.count
            walk.frames += 1
            walk.data_end = scanner.position
        here = scanner.position
        while walk.unproven and _last_lsn_of(walk.unproven, here) <= frame.durable_lsn:
            walk.unproven.popleft()
        walk.last_kind = frame.kind
        if frame.kind is Kind.SEAL:
            break
    walk.end = here
    walk.bytes = here.offset - start.offset
    walk.reason = scanner.reason
    return walk


def _last_lsn_of(unproven: deque[tuple[Position, int, int]], end: Position) -> int:
    """Last LSN of the first unproven frame: one below the first of what follows it, which
    for the newest frame is ``end``."""
    following = unproven[1][0] if len(unproven) > 1 else end
    return following.next_lsn - 1


def _walk_up_to(
    file: File, segment: FoundSegment, start: Position, following: SegmentHeader | FrameHeader
) -> _Walk:
    """Check the records from ``start``, a place that `_start_for` gave, up to what follows.

    Raises:
      CorruptLogError: they do not come as far as that.
    """
    first = segment.header.first_lsn
    if start.offset > DATA_OFFSET:
        counts = (start.next_lsn - first, 0)
        walk = _walk(file, segment, start, counts=counts, until=following, chained=False)
        if walk.frames:
            return _check_end(file, walk, following)
        # Damaged there, or not the place of a frame at all.
    return _check_end(
        file, _walk(file, segment, start_of(segment.header), until=following), following
    )


def _check_end(file: File, walk: _Walk, following: SegmentHeader | FrameHeader) -> _Walk:
    if not joins(walk.end, following):
        reason = walk.reason or f"the records before LSN {following.first_lsn} are missing"
        raise CorruptLogError(file.path, walk.end.offset, reason)
    return walk


def _start_for(
    segment: FoundSegment, mark: FrameHeader, footer: Footer | None, budget: float
) -> Position | None:
    """From where on ``budget`` pays for a check up to ``mark``; None: it pays for nothing."""
    length = mark.offset - DATA_OFFSET
    cost = 0 if footer is None else _cost(length, footer.records, footer.frames)
    if footer is None or cost <= budget:
        return start_of(segment.header)
    first = mark.offset - int(length * budget / cost) if budget > 0 else mark.offset
    places = (Position(at, lsn, 0) for lsn, at in footer.index if first <= at < mark.offset)
    return next(places, None)


def _cost(length: int, records: int, frames: int) -> int:
    """What a check costs, as bytes."""
    return length + _RECORD_COST * records + _FRAME_COST * frames


def examine(directory: Directory, *, verify_bytes: float = VERIFY_BYTES) -> Plan:
    """Read the directory and decide.  Nothing is written.

    Args:
      verify_bytes: how much of the log, newest first, is checked frame by frame; the
          rest by the headers and footers of its segments.

    Raises:
      CorruptLogError, UnsupportedFormatError: the log must not be opened.
      WrongDirectoryError: there is something else.
    """
    meta = read_meta(directory)
    names = directory.names()
    if meta is None:
        if any(map(is_foreign, names)):
            raise no_log(directory.path, names)
        return Plan(None, tuple(temporary(names)))
    if not meta.live:
        # Its creation was interrupted; nothing was ever accepted.
        segments = [name for name in names if name.startswith("wal-")]
        strange = [name for name in segments if segment_name_lsn(name) is None]
        if strange:
            raise CorruptLogError(
                f"{directory.path}/{strange[0]}", 0, "this is not the name of a segment"
            )
        if len(segments) > 1:
            raise CorruptLogError(
                f"{directory.path}/{segments[1]}", 0, "a log that was never in use has segments"
            )
        return Plan(None, (*temporary(names), *segments))
    chain = find_segments(directory, meta)
    return _examine_chain(directory, meta, chain, verify_bytes)


def _examine_chain(
    directory: Directory,
    meta: Meta,
    chain: Chain,
    verify_bytes: float,
) -> Plan:
    found = chain.segments
    last = found[-1]
    tail = _examine_last(directory, last, verify_bytes)
    assert tail.end is not None
    verified_lsn = tail.verified_lsn
    budget = verify_bytes - _cost(tail.bytes_scanned, *tail.counts)
    sealed: list[SegmentInfo] = []
    replayed, scanned = tail.records_replayed, tail.bytes_scanned
    seal_previous = None
    for following, segment in pairwise(reversed(found)):
        if verified_lsn > following.header.first_lsn:
            # Where not all of a segment is checked, the ones before it are not checked either.
            budget = 0
        may_be_open = following is last
        info, walk, unsealed = _examine_sealed(
            directory, segment, following.header, meta, budget=budget, may_be_open=may_be_open
        )
        sealed.append(info)
        if walk is not None:
            if verified_lsn <= following.header.first_lsn:
                verified_lsn = min(verified_lsn, walk.start.next_lsn)
            records = walk.end.next_lsn - walk.start.next_lsn
            replayed += records
            scanned += walk.bytes
            budget -= _cost(walk.bytes, records, walk.frames)
        if unsealed and walk is not None:
            seal_previous = (segment, walk)
    return attrs.evolve(
        tail,
        meta=meta,
        leftovers=tuple(chain.leftovers),
        sealed=tuple(reversed(sealed)),
        seal_previous=seal_previous,
        previous=found[-2] if len(found) > 1 else None,
        clean=tail.clean and seal_previous is None and meta.truncation is None,
        records_replayed=replayed,
        bytes_scanned=scanned,
        verified_lsn=verified_lsn,
    )


def _examine_sealed(
    directory: Directory,
    segment: FoundSegment,
    following: SegmentHeader,
    meta: Meta,
    *,
    budget: float,
    may_be_open: bool,
) -> tuple[SegmentInfo, _Walk | None, bool]:
    """A segment with another behind it: (what it is, what was checked, footer missing)."""
    cut = meta.truncation
    may_be_open = may_be_open or (cut is not None and segment.number == cut.keep_number)
    seal = _seal_of(segment, following)
    walk = None
    if budget > 0 or may_be_open or seal is None:
        file = directory.open(segment.file_name)
        try:
            if may_be_open and seal is not None and not _is_whole_seal(file, segment, seal):
                # A crash tore what its one sync was to cover; it is written again.
                seal = None
            if seal is None:
                walk = _walk_up_to(file, segment, start_of(segment.header), following)
                if not may_be_open:
                    raise _seal_is_damaged(file, segment, walk)
            elif budget > 0:
                footer = scan.read_footer(file.pread, seal)
                start = _start_for(segment, seal, footer, budget)
                if start is not None:
                    walk = _walk_up_to(file, segment, start, following)
                    _check_seal(file, segment, walk, seal)
        finally:
            file.close()
    end = seal.end if seal is not None else segment.size
    time_us = seal.time_us if seal is not None else (walk.end.time_us if walk else 0)
    info = SegmentInfo(segment.header, following.first_lsn, end, time_us)
    return info, walk, seal is None


def _seal_of(segment: FoundSegment, following: SegmentHeader) -> FrameHeader | None:
    """The SEAL frame that the pointer tells of, if it fits the segment behind."""
    mark = segment.mark
    fits = mark is not None and mark.kind is Kind.SEAL and joins(place_before(mark), following)
    return mark if fits else None


def _seal_is_damaged(file: File, segment: FoundSegment, walk: _Walk) -> CorruptLogError:
    """Which of the two it is: the records in front of them are whole."""
    seal = next(iter(FrameScanner(file.pread, segment.header, walk.end)), None)
    if seal is not None and seal[0].kind is Kind.SEAL:
        reason = "the pointer to the segment's footer is damaged"
        return CorruptLogError(file.path, POINTER_OFFSET, reason)
    return CorruptLogError(file.path, walk.end.offset, "the segment's footer is damaged")


def _is_whole_seal(file: File, segment: FoundSegment, seal: FrameHeader) -> bool:
    """Whether footer and file size are as `ActiveSegment.seal` leaves them."""
    scanner = FrameScanner(file.pread, segment.header, place_before(seal))
    return next(iter(scanner), None) is not None and segment.size == seal.end


def _check_seal(file: File, segment: FoundSegment, walk: _Walk, seal: FrameHeader) -> None:
    scanner = FrameScanner(file.pread, segment.header, walk.end)
    frame_body = next(iter(scanner), None)
    if frame_body is None or frame_body[0].crc != seal.crc:
        raise CorruptLogError(file.path, walk.end.offset, scanner.reason or "no footer here")
    try:
        footer = decode_footer(frame_body[1])
    except FrameError as exc:
        raise CorruptLogError(file.path, seal.offset, str(exc)) from exc
    if (footer.records, footer.last_lsn) != (walk.records, walk.end.next_lsn - 1):
        raise CorruptLogError(
            file.path,
            seal.offset,
            f"the footer counts {footer.records} records up to LSN {footer.last_lsn}, "
            f"the segment has {walk.records} up to {walk.end.next_lsn - 1}",
        )
    tail = scan.examine_tail(
        file.pread, segment.size, segment.header, scanner.position, file.next_data
    )
    if tail.torn_end > seal.end:
        raise CorruptLogError(file.path, seal.end, "bytes behind the segment's footer")


def _find_close(file: File, last: FoundSegment) -> tuple[FrameHeader, Footer] | None:
    """The CLOSE frame that the pointer tells of."""
    frame = last.mark
    if frame is None or frame.kind is not Kind.CLOSE:
        return None
    footer = scan.read_footer(file.pread, frame)
    counted = (frame.first_lsn - last.header.first_lsn, frame.first_lsn - 1)
    if footer is None or (footer.records, footer.last_lsn) != counted:
        # Nothing that a bug or a forger wrote there may get into the footer that follows.
        return None
    return frame, footer


def _examine_last(directory: Directory, last: FoundSegment, verify_bytes: float) -> Plan:
    """The segment in which the log ends; the rest of the plan is filled in by the caller."""
    file = directory.open(last.file_name)
    try:
        start = start_of(last.header)
        counts = (0, 0)
        index: tuple[tuple[int, int], ...] = ()
        close = _find_close(file, last)
        checked = None
        data_end = None
        verified_lsn = last.header.first_lsn
        if close is not None:
            frame, footer = close
            from_here = _start_for(last, frame, footer, verify_bytes)
            if from_here != start:
                # Too long to check all of it: go on behind the CLOSE frame.
                start = Position(
                    frame.end, frame.first_lsn, frame.crc, frame.durable_lsn, frame.time_us
                )
                data_end = attrs.evolve(start, offset=frame.offset, previous=frame.previous)
                counts, index = (footer.records, footer.frames), footer.index
                verified_lsn = frame.first_lsn
                if from_here is not None:
                    checked = _walk_up_to(file, last, from_here, frame)
                    verified_lsn = checked.start.next_lsn
        walk = _walk(file, last, start, counts=counts, data_end=data_end)
        where = walk.end.offset
        pointer = last.pointer
        ends_closed = close is not None and where == close[0].end
        judged = judge_end(
            directory.path,
            file,
            last,
            walk.end,
            reason=walk.reason,
            last_kind=walk.last_kind,
            # The first write behind a CLOSE frame takes the pointer away, in the same sync:
            # while it stands, nothing behind it was ever acknowledged.
            look_behind=not ends_closed or bool(walk.reason),
        )
        if judged.loss is not None:
            raise judged.loss.error
        torn_end = judged.torn_end
        torn = torn_end > where
        copy_from: Position | None = None
        copy_counts = (0, 0)
        if walk.unproven:
            copy_from, *before = walk.unproven[0]
            copy_counts = (before[0], before[1])
        elif torn:
            copy_from, copy_counts = walk.data_end, (walk.records, walk.frames)
        return Plan(
            None,
            last=last,
            end=walk.end,
            counts=(walk.records, walk.frames),
            index=(*index, *walk.index),
            marks_offset=walk.data_end.offset,
            copy_from=copy_from,
            copy_counts=copy_counts,
            torn_bytes=torn_end
            - scan.torn_start(file.pread, last.header, pointer, walk.end, torn_end),
            clean=not torn and (ends_closed or walk.last_kind is Kind.CLOSE),
            records_replayed=walk.end.next_lsn - verified_lsn,
            bytes_scanned=walk.bytes + (0 if checked is None else checked.bytes),
            verified_lsn=verified_lsn,
        )
    finally:
        file.close()


def check_records(directory: Directory, plan: Plan, lsn: int) -> Plan:
    """The plan after a check of the records from ``lsn`` on that `examine` has left out.

    For who will read them all at once: damage among them is found while nothing is written.

    Raises:
      CorruptLogError, UnsupportedFormatError: the log must not be opened.
    """
    last = plan.last
    if last is None:
        return plan
    behind: list[SegmentHeader | FrameHeader] = [info.header for info in plan.sealed[1:]]
    names = [info.name for info in plan.sealed]
    if names:
        behind.append(last.header)
    if last.mark is not None:
        names.append(last.file_name)
        behind.append(last.mark)
    for name, following in zip(reversed(names), reversed(behind), strict=True):
        if following.first_lsn <= lsn or plan.verified_lsn <= lsn:
            break
        segment = last if name == last.file_name else read_segment(directory, name)
        if segment.header.first_lsn >= plan.verified_lsn:
            continue
        file = directory.open(name)
        try:
            index = scan.footer_index(file.pread, segment.header, segment.pointer)
            places = (Position(at, first, 0) for first, at in reversed(index) if first <= lsn)
            start = next(places, start_of(segment.header))
            walk = _walk_up_to(file, segment, start, following)
        finally:
            file.close()
        plan = attrs.evolve(
            plan,
            records_replayed=plan.records_replayed + plan.verified_lsn - walk.start.next_lsn,
            bytes_scanned=plan.bytes_scanned + walk.bytes,
            verified_lsn=walk.start.next_lsn,
        )
    return plan
