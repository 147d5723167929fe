"""A pass over the frames of one segment, and what proves that there was more than there is.

Law: blocking, only reads.  Whatever is wrong is told to a reporter (`finding`); if that returns,
the pass goes on after the damage, so that one judge serves those who refuse and those who list.

Going on means finding the next frame that is one.  A frame's checksum covers its offset and its
segment's salt, so whatever passes it was written there by this log; the LSNs between it and the
last good frame are those that are lost.

A segment with another after it must lead to that one, and end in a whole footer.  Where the
frames of the last segment end, the log ends, unless there is proof of loss:

  a pointer to a place after the end            all before that place was durable
  a SEAL frame, or a pointer to one             the next segment was durable, and is not there
  a later frame that names a durable LSN from   that frame was written when the sync of what is
  the end on                                    missing here had returned
  the beginning of an epoch (``log.meta``),     it was decided, or told, when such a sync had
  and for readers the owner's word (lock file)  returned
"""

from __future__ import annotations

from typing import Final, Protocol

import msgspec

from trio_wal._files import Word

from . import scan
from .chain import FoundSegment, Until, joins
from .finding import Finding, Report
from .frame import (
    BLOCK,
    FRAME_HEADER_SIZE,
    FRAME_MAGIC,
    LSN_MAX,
    POINTER_OFFSET,
    Codec,
    FrameError,
    FrameHeader,
    Kind,
    Meta,
    SegmentHeader,
    decode_footer,
    decode_frame_header,
    index_step,
    segment_name,
)
from .plain import Tally, follow_plain
from .scan import WINDOW, FrameScanner, Position
from .segment import Extent


class Readable(Protocol):
    """What is read of a file: a `File`, or one that reads more carefully."""

    @property
    def path(self) -> str: ...

    def pread(self, length: int, offset: int) -> bytes: ...

    def next_data(self, offset: int) -> int: ...


def proven_lsn(word: Word, meta: Meta) -> int:
    """Up to which LSN the log's owner, or an epoch that has begun, proves to a reader that there
    was more; an open takes `begun_lsn` (docs/design says why).

    The word is written after a sync has returned, so that whatever a crash leaves of it speaks
    of what is durable.  It must be of today's epoch: LSNs above an older one's end were dropped.
    In a copy that was not opened yet it is the word of whoever owns what it is a copy of.
    """
    if meta.copied or word.epoch != meta.epoch:
        return begun_lsn(meta)
    return max(begun_lsn(meta), word.durable_lsn)


def begun_lsn(meta: Meta) -> int:
    """After which LSN today's epoch began: all up to there was durable by then."""
    return meta.history[-1].after_lsn if meta.history else 0


# -- where the log ends -----------------------------------------------------------------


class Loss(msgspec.Struct, frozen=True):
    """Proof that more was durable than there is."""

    finding: Finding
    durable_lsn: int
    """Up to here it proves it, at least."""
    inside: bool = True
    """Whether it is this segment that has lost it, and not the one after it."""


class End(msgspec.Struct, frozen=True):
    """What `judge_end` says of the place at which a scan of the last segment ended."""

    loss: Loss | None
    torn_end: int
    """Offset after what is left of an unfinished batch; the place itself where nothing is."""


def judge_end(
    directory_path: str,
    file: Readable,
    segment: FoundSegment,
    end: Position,
    *,
    reason: str,
    last_kind: Kind | None,
    told_lsn: int = 0,
    look_behind: bool = True,
) -> End:
    """Whether the log ends where the frames of its last segment do.

    Args:
      segment: with its pointer as read before the scan.
      reason: why the scan ended.
      last_kind: of the last frame.
      told_lsn: what `begun_lsn` says, or for a reader `proven_lsn`.
      look_behind: whether to search all that stands after ``end``.
    """
    pointer = segment.pointer
    if pointer is not None and pointer.offset > end.offset:
        text = reason or "frames that had been durable are missing"
        return End(_loss(file, end, text, pointer.last_lsn), end.offset)
    if last_kind is Kind.SEAL or (pointer is not None and pointer.kind is Kind.SEAL):
        # Either is written only when the segment behind is durable.
        path = f"{directory_path}/{segment_name(end.next_lsn)}"
        text = f"segment {segment.number + 1} is missing: {segment.file_name} is sealed"
        proven = end.next_lsn - 1 if pointer is None else max(end.next_lsn - 1, pointer.last_lsn)
        finding = Finding(path, 0, text, end.next_lsn)
        return End(Loss(finding, max(proven, told_lsn), inside=False), end.offset)
    if not look_behind and told_lsn < end.next_lsn:
        return End(None, end.offset)
    tail = scan.examine_tail(file.pread, segment.size, segment.header, end, file.next_data)
    covering, missing = tail.covering, reason or "a frame is missing"
    if covering is not None:
        text = (
            f"{missing}; the frame at offset {covering.offset} "
            f"says that LSN {end.next_lsn} had been durable"
        )
        return End(_loss(file, end, text, max(tail.durable_lsn, told_lsn)), tail.torn_end)
    if told_lsn >= end.next_lsn:
        text = f"{missing}; the log's owner has said that LSN {told_lsn} is durable"
        return End(_loss(file, end, text, told_lsn), tail.torn_end)
    return End(None, tail.torn_end)


def _loss(file: Readable, end: Position, reason: str, durable_lsn: int) -> Loss:
    lost = (end.next_lsn, durable_lsn) if end.next_lsn <= durable_lsn else (None, None)
    return Loss(Finding(file.path, end.offset, reason, *lost), durable_lsn)


# -- one segment ------------------------------------------------------------------------


class Walk:
    """A pass over one segment, or its end.

    Args:
      start: where to begin; the segment's first frame, if it is not said.
      data_end: where the records before ``start`` end, if that is not there.
    """

    def __init__(
        self,
        file: Readable,
        segment: FoundSegment,
        report: Report,
        start: Extent | None = None,
        data_end: Position | None = None,
    ) -> None:
        self._file = file
        self._segment = segment
        self._report = report
        begin = Extent.empty(segment.header, segment.size) if start is None else start
        self.start: Position = begin.end
        self.end: Position = begin.end
        """After the last frame that was taken."""
        step = index_step(segment.size)
        self.tally: Final = Tally(data_end or begin.end, begin.frames, list(begin.index), step)
        """Those before the start included."""
        self.reason: str = ""
        """Why the last stretch of frames ended."""
        self.last_kind: Kind | None = None
        self.seal: FrameHeader | None = None
        """The SEAL frame at the end, if it and all that belongs to it is whole."""
        self.torn_end: int = begin.end.offset
        """Offset after what is left of an unfinished batch."""
        self.torn_bytes: int = 0
        """Bytes of it: a CLOSE frame that a crash tore is no batch."""
        self.closed: bool = False
        """Whether the log ends with the mark of an orderly close."""
        self.in_doubt: bool = False
        """Whether what stands behind the end may be an unfinished batch, or of another segment."""

    @property
    def frames(self) -> int:
        """Whole data frames, those before the start included."""
        return self.tally.frames

    @property
    def records(self) -> int:
        """Records of whole frames that were met."""
        return self.tally.records

    @property
    def data_end(self) -> Position:
        """Behind the last frame with records: only CLOSE frames may stand between it and `end`."""
        return self.tally.data_end

    @property
    def length(self) -> int:
        """Bytes that were walked over, without the footer."""
        end = self.end.offset if self.seal is None else self.seal.offset
        return end - self.start.offset

    def extent(self) -> Extent:
        """The segment up to the end of the walk."""
        return self._up_to(self.end, self.frames)

    def data_extent(self) -> Extent:
        """The segment up to the last frame with records."""
        return self._up_to(self.data_end, self.frames)

    def unproven(self) -> Extent | None:
        """The segment up to the first frame that no later one proves durable; None: all are."""
        if not self.tally.unproven:
            return None
        # CLOSE frames before it are left out: nothing proves that they are on the disk, and nothing
        # may be chained to them.
        _, frames, data_end = self.tally.unproven[0]
        return self._up_to(Position(*data_end), frames)

    def _up_to(self, end: Position, frames: int) -> Extent:
        index = tuple(entry for entry in self.tally.index if entry[1] < end.offset)
        return Extent(self._segment.header, self._segment.size, end, frames, index)

    def follow(self, until: SegmentHeader | FrameHeader | None) -> bool:
        """Take valid frames: up to the segment, or the SEAL or CLOSE frame, ``until``; else to
        a SEAL, or as far as they go.  Returns whether it has come to ``until``."""
        here, tally = self.end, self.tally
        scanner = FrameScanner(self._file.pread, self._segment.header, here, skim=True)
        stop_lsn = LSN_MAX + 1 if until is None else until.first_lsn
        frames = iter(scanner)
        plain = True
        while until is None or not joins(here, until):
            if plain and follow_plain(scanner, tally, stop_lsn):
                here = self.end = scanner.position
                self.last_kind = Kind.DATA
                continue
            frame_body = next(frames, None)
            if frame_body is None:
                break
            frame, body = frame_body
            # After a compressed frame comes another one, mostly.
            plain = frame.codec is Codec.NONE
            if self._take(frame, body, here) and frame.kind is Kind.DATA:
                tally.take(frame.first_lsn, frame.count, frame.offset, scanner.position)
            here = self.end = scanner.position
            tally.prove(frame.durable_lsn)
            self.last_kind = frame.kind
            if frame.kind is Kind.SEAL:
                break
        self.reason = scanner.reason
        return until is not None and joins(here, until)

    def _take(self, frame: FrameHeader, body: bytes, before: Position) -> bool:
        """Look into a frame whose checksums are good; returns whether it holds what it says."""
        if frame.time_us < before.time_us:
            reason = "the frame's time is before that of the frame before it"
            self._report(Finding(self._file.path, frame.offset, reason, harmless=True))
        try:
            scan.check_body(frame, body)
        except FrameError as exc:
            self._find(frame.offset, str(exc), frame.first_lsn, frame.next_lsn)
            return False
        if frame.kind is not Kind.DATA:
            self._check_footer(frame, body)
        return True

    def _check_footer(self, frame: FrameHeader, body: bytes) -> None:
        footer = decode_footer(body)
        records, last_lsn = frame.first_lsn - self._segment.header.first_lsn, frame.first_lsn - 1
        if (footer.records, footer.last_lsn) != (records, last_lsn):
            reason = (
                f"the footer counts {footer.records} records up to LSN {footer.last_lsn}, "
                f"the segment has {records} up to {last_lsn}"
            )
            # What a CLOSE counts nobody needs: a scan takes its place.
            harmless = frame.kind is Kind.CLOSE
            self._report(Finding(self._file.path, frame.offset, reason, harmless=harmless))

    def _find(self, offset: int, reason: str, first_lsn: int = 0, next_lsn: int = 0) -> None:
        """Report what ``first_lsn`` to below ``next_lsn``, if any, are lost by."""
        lost = (first_lsn, next_lsn - 1) if first_lsn < next_lsn else (None, None)
        self._report(Finding(self._file.path, offset, reason, *lost))

    def check_up_to(self, following: SegmentHeader | FrameHeader | None) -> bool:
        """Follow the frames to what comes after them, over damage; returns whether they lead
        there.  None: nobody knows what comes, but the segment must have a footer."""
        while not self.follow(following):
            reason = self.reason or "a frame is missing"
            if self.last_kind is Kind.SEAL or not self.pass_over(reason):
                self._say_where_it_ends(following)
                return False
        return True

    def _say_where_it_ends(self, following: SegmentHeader | FrameHeader | None) -> None:
        end = self.end
        if following is None:
            if self.last_kind is not Kind.SEAL:
                self._find(end.offset, "the segment's footer is damaged")
        elif end.next_lsn < following.first_lsn:
            reason = f"the records before LSN {following.first_lsn} are missing"
            lost = end.next_lsn, following.first_lsn
            self._find(end.offset, self.reason or reason, *lost)
        else:
            what = "a footer" if isinstance(following, FrameHeader) else following.name
            self._find(end.offset, f"{what} does not follow this segment")

    def pass_over(self, reason: str) -> bool:
        """Nothing valid stands here: report it and move behind it; False where nothing comes."""
        if self._is_valid_now():
            return True
        frame = self._next_frame()
        if frame is not None:
            self._move_to(frame, reason)
        return frame is not None

    def _is_valid_now(self) -> bool:
        """Whether what was no frame has become one: it was being written."""
        scanner = FrameScanner(self._file.pread, self._segment.header, self.end)
        return next(iter(scanner), None) is not None

    def _next_frame(self) -> FrameHeader | None:
        """The first frame header from here on."""
        seed, size = self._segment.header.seed, self._segment.size
        for offset in scan.stretches(self.end.offset, size, self._file.next_data):
            window = self._file.pread(WINDOW, offset)
            at = window.find(FRAME_MAGIC)
            while at >= 0:
                if at % BLOCK == 0:
                    head = window[at : at + FRAME_HEADER_SIZE]
                    frame = decode_frame_header(head, offset + at, seed)
                    if frame is not None:
                        return frame
                at = window.find(FRAME_MAGIC, at + 1)
        return None

    def _move_to(self, frame: FrameHeader, reason: str) -> None:
        """Report what is damaged before the rest of the segment, and go on there."""
        end, time_us = self.end, self.end.time_us
        if frame.offset == end.offset and joins(end, frame):
            # Its header is good, so where it ends is known.
            if reason.startswith("padding"):
                self._find(frame.offset, reason)
                self.tally.frames += 1
                self.tally.records += frame.count
            else:
                self._find(frame.offset, reason, frame.first_lsn, frame.next_lsn)
            self.end = Position(frame.end, frame.next_lsn, frame.crc, time_us=time_us)
            if frame.kind is Kind.DATA:
                self.tally.data_end = self.end
        else:
            self._find(end.offset, reason, end.next_lsn, frame.first_lsn)
            self.end = Position(frame.offset, frame.first_lsn, frame.previous, time_us=time_us)
        self.last_kind = None


def check_segment(
    file: Readable,
    segment: FoundSegment,
    until: Until,
    report: Report,
    start: Extent | None = None,
) -> Walk:
    """Check a segment with another after it: its frames, that they lead there, its footer."""
    walk = Walk(file, segment, report, start)
    following, pointer = until.following, segment.pointer
    if not walk.check_up_to(following) or following is None:
        return walk
    seal = next((frame for frame, _ in FrameScanner(file.pread, segment.header, walk.end)), None)
    if seal is not None and seal.kind is not Kind.SEAL:
        seal = None
    pointed = seal and pointer and (pointer.kind, pointer.crc) == (Kind.SEAL, seal.crc)
    if until.may_be_open and not (seal and pointed and segment.size == seal.end):
        # A crash tore what one sync was to cover; it is written again.
        return walk
    if seal is None:
        report(Finding(file.path, walk.end.offset, "the segment's footer is damaged"))
        return walk
    walk.follow(None)
    if not pointed:
        reason = "the pointer to the segment's footer is damaged"
        report(Finding(file.path, POINTER_OFFSET, reason))
    behind = scan.examine_tail(file.pread, segment.size, segment.header, walk.end, file.next_data)
    if behind.data_end > seal.end:
        report(Finding(file.path, seal.end, "bytes behind the segment's footer"))
    walk.seal = seal
    return walk


def check_last(
    directory_path: str,
    file: Readable,
    segment: FoundSegment,
    report: Report,
    *,
    told_lsn: int,
    start: Extent | None = None,
    data_end: Position | None = None,
    look_behind: bool = False,
) -> Walk:
    """Check the segment in which the log ends, from ``start`` on.

    Args:
      told_lsn: what `begun_lsn` says, or for a reader `proven_lsn`.
      data_end: as for `Walk`.
      look_behind: look at all that stands behind the end also after a close in order, where
          nobody has written: opening does not, because it may be a long way.
    """
    walk = Walk(file, segment, report, start, data_end)
    mark = segment.mark if segment.mark is not None and segment.mark.kind is Kind.CLOSE else None
    while True:
        walk.follow(None)
        end, reason = walk.end, walk.reason
        at_mark = mark is not None and end.offset == mark.end
        walk.closed = at_mark or walk.last_kind is Kind.CLOSE
        judged = judge_end(
            directory_path,
            file,
            segment,
            end,
            reason=reason,
            last_kind=walk.last_kind,
            told_lsn=told_lsn,
            # The first write behind a CLOSE frame takes the pointer away, in the same sync:
            # while it stands, nothing behind it was ever acknowledged.
            look_behind=look_behind or bool(reason) or not at_mark,
        )
        loss = judged.loss
        if loss is None:
            walk.torn_end = torn_end = judged.torn_end
            torn = scan.torn_start(file.pread, segment.header, segment.pointer, end, torn_end)
            walk.torn_bytes = max(0, torn_end - torn)
            walk.in_doubt = segment.header.reused and not at_mark
            return walk
        if not loss.inside or not walk.pass_over(loss.finding.reason):
            report(loss.finding)
            walk.torn_end = walk.end.offset
            return walk
