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
  the owner's word is that there was more             a new epoch begins
  anything else that is not a chain                   refuse
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import msgspec
from msgspec.structs import replace

from trio_wal._exceptions import CorruptLogError, UnsupportedFormatError
from trio_wal._files import Directory, File
from trio_wal._util import KiB, MiB

from . import scan
from .chain import (
    TRUNCATE_NAME,
    Chain,
    FoundSegment,
    Until,
    is_foreign,
    joins,
    list_chain,
    list_unborn,
    no_log,
    place_before,
    read_meta,
    read_segment,
    temporary,
)
from .finding import refuse
from .frame import DATA_OFFSET, Footer, FrameHeader, Kind, Meta, SegmentHeader, segment_name_lsn
from .scan import FrameScanner, Position
from .segment import Extent, SegmentInfo
from .walk import Walk, begun_lsn, check_last, check_segment

VERIFY_BYTES: Final = 32 * MiB
"""How much of the log is checked record by record on every open, newest first."""
_FRAME_COST: Final = 32 * KiB
_RECORD_COST: Final = 64
"""What checking one more frame, or record, costs, as bytes: about 12 us, or 25 ns, at 2-3 GB/s."""


class Plan(msgspec.Struct, frozen=True):
    """What `repair` will do, and what is known when it is done."""

    meta: Meta | None
    """None: there is no log yet."""
    leftovers: tuple[str, ...] = ()
    """Files to unlink: nothing of the log needs them."""
    sealed: tuple[SegmentInfo, ...] = ()
    """The segments before the last, but for `seal_previous`."""
    last: FoundSegment | None = None
    end: Extent | None = None
    """The last segment, up to the last valid frame."""
    marks_offset: int = 0
    """Behind the last frame with records: CLOSE frames may stand between here and ``end``."""
    copy_from: Extent | None = None
    """The last segment up to the frames that go into a new one; None: go on in the last one."""
    seal_previous: Extent | None = None
    """The last segment but one, up to its end: it gets its missing footer."""
    previous: FoundSegment | None = None
    """The last segment but one."""
    told_lsn: int = 0
    """Up to here other processes were told, in today's epoch, that records are durable.  No proof:
    see `examine`."""
    torn_bytes: int = 0
    clean: bool = True
    records_replayed: int = 0
    bytes_scanned: int = 0
    verified_lsn: int = 1
    """Every record from here on was checked."""

    @property
    def last_lsn(self) -> int:
        return 0 if self.end is None else self.end.end.next_lsn - 1

    @property
    def lost_lsn(self) -> int:
        """The last LSN that others were told of and that is not there; 0: nothing is missing."""
        return self.told_lsn if self.told_lsn > self.last_lsn else 0


def reread_tail(directory: Directory, names: Sequence[str]) -> None:
    """Before a log is recovered: have the end of it read from the disk.

    After a failed write or sync the page cache holds what the disk does not, and such a page
    may stay lost even if it is written again (see `_system.sync`).  A process that has ended can
    have left such pages in the last two segments only: it does not begin a third before the
    footer of the first is synced.  And recovery writes to no other segment.

    Of those two, what stands before a SEAL or CLOSE frame is kept in the cache, so that the
    open of a large log need not wait for the disk: such a frame is written only after a sync
    of all before it has returned, and what had to be recovered before was read from the disk
    then.  It proves that wherever it is seen, be it in the page cache alone.  It does not prove
    itself: the frame, all behind it, and the pointer to it, which are what is written again,
    come from the disk; and so does everything where there is none.
    """
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


def _start_for(
    file: File, segment: FoundSegment, mark: FrameHeader, footer: Footer | None, budget: float
) -> Extent | None:
    """From where on ``budget`` pays for a check up to ``mark``; None: it pays for nothing."""
    length = mark.offset - DATA_OFFSET
    cost = 0 if footer is None else _cost(length, footer.records, footer.frames)
    if footer is None or cost <= budget:
        return Extent.empty(segment.header, segment.size)
    first = mark.offset - int(length * budget / cost) if budget > 0 else mark.offset
    places = ((lsn, at) for lsn, at in footer.index if first <= at < mark.offset)
    place = next(places, None)
    return None if place is None else _from_place(file, segment, place)


def _from_place(file: File, segment: FoundSegment, place: tuple[int, int]) -> Extent:
    """The segment up to a frame that an index tells of; up to its first one, if none is there."""
    lsn, offset = place
    whole = Extent.empty(segment.header, segment.size)
    frame = scan.frame_at(file.pread, segment.header, offset)
    if frame is None or frame.first_lsn != lsn:
        return whole
    return replace(whole, end=place_before(frame))


def _cost(length: int, records: int, frames: int) -> int:
    """What a check costs, as bytes."""
    return length + _RECORD_COST * records + _FRAME_COST * frames


def examine(
    directory: Directory,
    names: Sequence[str] | None = None,
    *,
    verify_bytes: float = VERIFY_BYTES,
) -> Plan:
    """Read the directory and decide.  Nothing is written.

    The owner's word is no reason to refuse (docs/design says why).  But whoever was given the
    records that it speaks of must be able to tell them from those that take their LSNs next: where
    the log ends before them, a new epoch begins.

    Args:
      names: of the files, if they are known.
      verify_bytes: how much of the log, newest first, is checked frame by frame; the
          rest by the headers and footers of its segments.

    Raises:
      CorruptLogError, UnsupportedFormatError: the log must not be opened.
      WrongDirectoryError: there is something else.
    """
    meta = read_meta(directory)
    names = directory.names() if names is None else names
    if meta is None:
        if any(map(is_foreign, names)):
            raise no_log(directory.path, names)
        return Plan(None, tuple(temporary(names)))
    if not meta.live:
        # Its creation was interrupted; nothing was ever accepted.
        segments = list_unborn(directory, names, refuse)
        return Plan(None, (*temporary(names), *segments))
    # A copy that was not opened yet begins an epoch anyway, and its word is another's.
    told_lsn = 0 if meta.copied else directory.published().told_lsn(meta.epoch)
    chain = list_chain(directory, meta, refuse, names=names)
    plan = _examine_chain(directory, meta, chain, verify_bytes)
    return replace(plan, told_lsn=told_lsn)


def _examine_chain(
    directory: Directory,
    meta: Meta,
    chain: Chain,
    verify_bytes: float,
) -> Plan:
    found = chain.segments
    last = found[-1]
    tail = _examine_last(directory, last, begun_lsn(meta), verify_bytes)
    assert tail.end is not None
    verified_lsn = tail.verified_lsn
    budget = verify_bytes - _cost(tail.bytes_scanned, tail.end.records, tail.end.frames)
    sealed: list[SegmentInfo] = []
    replayed, scanned = tail.records_replayed, tail.bytes_scanned
    seal_previous = None
    for following, segment in pairwise(reversed(found)):
        if verified_lsn > following.header.first_lsn:
            # Where not all of a segment is checked, the ones before it are not checked either.
            budget = 0
        info, walk, unsealed = _examine_sealed(
            directory, segment, chain.until(segment), following.header, budget=budget
        )
        if walk is not None:
            if verified_lsn <= following.header.first_lsn:
                verified_lsn = min(verified_lsn, walk.start.next_lsn)
            replayed += walk.records
            scanned += walk.length
            budget -= _cost(walk.length, walk.records, walk.frames)
        if unsealed and walk is not None:
            seal_previous = walk.extent()
        else:
            sealed.append(info)
    return replace(
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
    until: Until,
    following: SegmentHeader,
    *,
    budget: float,
) -> tuple[SegmentInfo, Walk | None, bool]:
    """A segment with another behind it: (what it is, what was checked, footer missing)."""
    seal = _seal_of(segment, following)
    walk = None
    if budget > 0 or until.may_be_open or seal is None:
        file = directory.open(segment.file_name)
        try:
            if until.may_be_open and seal is not None and not _is_whole_seal(file, segment, seal):
                # A crash tore what its one sync was to cover; it is written again.
                seal = None
            if seal is None:
                walk = check_segment(file, segment, until, refuse)
                seal = walk.seal
            elif budget > 0:
                footer = scan.read_footer(file.pread, seal)
                start = _start_for(file, segment, seal, footer, budget)
                if start is not None:
                    walk = check_segment(file, segment, until, refuse, start)
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


def _is_whole_seal(file: File, segment: FoundSegment, seal: FrameHeader) -> bool:
    """Whether footer and file size are as `ActiveSegment.seal` leaves them."""
    scanner = FrameScanner(file.pread, segment.header, place_before(seal))
    return next(iter(scanner), None) is not None and segment.size == seal.end


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


def _examine_last(
    directory: Directory, last: FoundSegment, told_lsn: int, verify_bytes: float
) -> Plan:
    """The segment in which the log ends; the rest of the plan is filled in by the caller."""
    file = directory.open(last.file_name)
    try:
        start, data_end, checked = _after_close(file, last, verify_bytes)
        walk = check_last(
            directory.path, file, last, refuse, told_lsn=told_lsn, start=start, data_end=data_end
        )
        torn = walk.torn_end > walk.end.offset or walk.in_doubt
        copy_from = walk.unproven()
        if copy_from is None and torn:
            copy_from = walk.data_extent()
        verified_lsn = walk.start.next_lsn if checked is None else checked.start.next_lsn
        return Plan(
            None,
            last=last,
            end=walk.extent(),
            marks_offset=walk.data_end.offset,
            copy_from=copy_from,
            torn_bytes=walk.torn_bytes,
            clean=not torn and walk.closed,
            records_replayed=walk.end.next_lsn - verified_lsn,
            bytes_scanned=walk.length + (0 if checked is None else checked.length),
            verified_lsn=verified_lsn,
        )
    finally:
        file.close()


def _after_close(
    file: File, last: FoundSegment, verify_bytes: float
) -> tuple[Extent, Position | None, Walk | None]:
    """Where to begin with the last segment: (the place, where the records before it end, if
    not there, and the check of what is just before it)."""
    whole = Extent.empty(last.header, last.size)
    close = _find_close(file, last)
    if close is None:
        return whole, None, None
    frame, footer = close
    from_here = _start_for(file, last, frame, footer, verify_bytes)
    if from_here == whole:
        return whole, None, None
    # Too long to check all of it: go on behind the CLOSE frame.
    end = Position(frame.end, frame.first_lsn, frame.crc, frame.durable_lsn, frame.time_us)
    data_end = replace(end, offset=frame.offset, previous=frame.previous)
    checked = None
    if from_here is not None:
        checked = Walk(file, last, refuse, from_here)
        checked.check_up_to(frame)
    return replace(whole, end=end, frames=footer.frames, index=footer.index), data_end, checked


def check_records(directory: Directory, plan: Plan, lsn: int) -> Plan:
    """The plan after a check of the records from ``lsn`` on that `examine` has left out.

    For who will read them all at once: damage among them is found while nothing is written.

    Raises:
      CorruptLogError, UnsupportedFormatError: the log must not be opened.
    """
    last = plan.last
    if last is None:
        return plan
    before = () if plan.seal_previous is None else (plan.seal_previous.header,)
    headers = [*(info.header for info in plan.sealed), *before, last.header]
    stretches: list[tuple[str, SegmentHeader | FrameHeader]] = []
    stretches += [(header.name, following) for header, following in pairwise(headers)]
    if last.mark is not None:
        stretches.append((last.file_name, last.mark))
    for name, following in reversed(stretches):
        if following.first_lsn <= lsn or plan.verified_lsn <= lsn:
            break
        segment = last if name == last.file_name else read_segment(directory, name)
        if segment.header.first_lsn >= plan.verified_lsn:
            continue
        file = directory.open(name)
        try:
            index = scan.footer_index(file.pread, segment.header, segment.pointer)
            places = (place for place in reversed(index) if place[0] <= lsn)
            place = next(places, None)
            start = None if place is None else _from_place(file, segment, place)
            walk = Walk(file, segment, refuse, start)
            walk.check_up_to(following)
        finally:
            file.close()
        plan = replace(
            plan,
            records_replayed=plan.records_replayed + plan.verified_lsn - walk.start.next_lsn,
            bytes_scanned=plan.bytes_scanned + walk.length,
            verified_lsn=walk.start.next_lsn,
        )
    return plan
