"""The segments of a log as one chain, and what proves that there was more than there is.

Law: blocking, only reads, and judges nothing but what it can see: opening, verifying and
reading ask here, and differ in what they do about it.  No trio.

A chain is whole where ``log.meta`` names its first segment, numbers have no gap, all have the
log's UUID, and each begins with the checksum of the frame before it.  Where a scan of the last
segment ends, the log ends, unless there is proof of loss:

  a SEAL frame, or a pointer to one             the next segment was durable, and is not there
  a pointer to a place after the end            so was all before that place
  a later frame that names a durable LSN from   that frame was written when the sync of what is
  the end on                                    missing here had returned
  the owner's word (the lock file)              it was told when such a sync had returned
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Final, NoReturn

import attrs

from trio_wal._exceptions import (
    CorruptLogError,
    UnsupportedFormatError,
    WalError,
    WrongDirectoryError,
)
from trio_wal._files import LOCK_NAME, Directory, File

from . import scan
from .frame import (
    BLOCK,
    DATA_OFFSET,
    META_SIZE_MAX,
    POINTER_OFFSET,
    FrameError,
    FrameHeader,
    Kind,
    Meta,
    Pointer,
    SegmentHeader,
    UnsupportedVersion,
    decode_meta,
    decode_pointer,
    decode_segment_header,
    segment_name,
    segment_name_lsn,
)
from .scan import FrameScanner, Position, start_of
from .segment import NEW_NAME, SPARE_PREFIX

META_NAME: Final = "log.meta"
META_NEW_NAME: Final = "log.meta.tmp"
TRUNCATE_NAME: Final = "truncate.tmp"
LOG_NAME: Final = "log"
STORE_NAME: Final = "store"
"""What a database's directory holds: its log, and LMDB's files."""

Report = Callable[[CorruptLogError], None]
"""Is told of each thing that is wrong; what it raises ends the look."""


def raise_it(error: CorruptLogError) -> NoReturn:
    """The reporter of whoever cannot go on after damage."""
    raise error


@attrs.frozen
class FoundSegment:
    """A segment file of the chain, as its header and pointer describe it."""

    header: SegmentHeader
    file_name: str
    """Differs from the header's where a decided truncation is not yet carried out."""
    size: int
    pointer: Pointer | None
    mark: FrameHeader | None
    """The SEAL or CLOSE frame that the pointer tells of, where its header stands there."""

    @property
    def number(self) -> int:
        return self.header.number


def read_meta(directory: Directory) -> Meta | None:
    """The log's meta; None where the file is not there.

    Raises:
      CorruptLogError, UnsupportedFormatError
    """
    path = f"{directory.path}/{META_NAME}"
    try:
        file = directory.open(META_NAME)
    except FileNotFoundError:
        return None
    try:
        return decode_meta(file.pread(META_SIZE_MAX, 0))
    except UnsupportedVersion as exc:
        raise UnsupportedFormatError(path, exc.version, exc.reason) from exc
    except FrameError as exc:
        raise CorruptLogError(path, 0, str(exc)) from exc
    finally:
        file.close()


def is_ours(name: str) -> bool:
    return name in (LOCK_NAME, META_NEW_NAME, TRUNCATE_NAME, NEW_NAME) or (
        name.startswith(SPARE_PREFIX) and name.endswith(".tmp")
    )


def is_foreign(name: str) -> bool:
    """Whether a file of this name says that something else than a log lives here."""
    return not is_ours(name) and name[0] != "." and name != "lost+found"


def no_log(path: str, names: Iterable[str], instead: str = "open_database()") -> WalError:
    """What to raise of a directory with these names that has no ``log.meta``.

    ``instead`` is what to call where it is a database's.
    """
    foreign = list(filter(is_foreign, names))
    if any(segment_name_lsn(name) is not None for name in foreign):
        return CorruptLogError(f"{path}/{META_NAME}", 0, "the file is missing")
    if foreign == [LOG_NAME] or {LOG_NAME, STORE_NAME} <= set(foreign):
        return WrongDirectoryError(path, "a database", instead)
    return WrongDirectoryError(path, *neither(foreign))


def neither(names: list[str]) -> tuple[str, str]:
    """What is found, and what to use instead, where a directory is neither log nor database."""
    holds = f"it holds {names[0]!r}" if names else "it is empty"
    return f"neither a log nor a database: {holds}", "the directory of one, or a new path"


def is_temporary(name: str) -> bool:
    """Whether recovery would remove a file of this name."""
    return name != LOCK_NAME and is_ours(name)


def temporary(names: Iterable[str]) -> list[str]:
    return [name for name in names if is_temporary(name)]


def read_segment(directory: Directory, name: str) -> FoundSegment:
    """Open one segment file and check its header.

    Raises:
      CorruptLogError, UnsupportedFormatError, FileNotFoundError
    """
    file = directory.open(name)
    try:
        return look_at(file, name)
    finally:
        file.close()


def look_at(file: File, name: str) -> FoundSegment:
    """Header, pointer and mark of an open segment file."""
    try:
        head = file.pread(POINTER_OFFSET + BLOCK, 0)
        header = decode_segment_header(head)
        size = file.size()
        if size < DATA_OFFSET:
            raise FrameError(f"the file has only {size} bytes")
        pointer = decode_pointer(head[POINTER_OFFSET:], header.seed)
        mark = None
        if pointer is not None:
            mark = scan.frame_at(file.pread, header, pointer.offset)
            if mark is not None and (mark.kind, mark.crc) != (pointer.kind, pointer.crc):
                mark = None
        return FoundSegment(header, name, size, pointer, mark)
    except UnsupportedVersion as exc:
        raise UnsupportedFormatError(file.path, exc.version, exc.reason) from exc
    except FrameError as exc:
        raise CorruptLogError(file.path, 0, str(exc)) from exc


@attrs.frozen
class Chain:
    """A log's segments, by number."""

    segments: list[FoundSegment]
    """Without a gap, from the first on."""
    beyond: list[FoundSegment]
    """What is this log's, too, but stands after a place where the chain is broken."""
    leftovers: list[str]
    """Names of files that the log no longer needs."""


def find_segments(
    directory: Directory,
    meta: Meta,
    report: Report = raise_it,
    known: Mapping[str, FoundSegment] | None = None,
) -> Chain:
    """The chain of segments, up to the first place where it is broken.

    Args:
      report: is told of files that are foreign, renamed, duplicate or missing, by
          `CorruptLogError`.
      known: segments, by file name, whose headers need not be read again.

    Raises:
      FileNotFoundError: a file went away meanwhile.
      UnsupportedFormatError
    """
    names = directory.names()
    leftovers = temporary(names)
    cut = meta.truncation
    candidates = [name for name in names if name.startswith("wal-")]
    if cut is not None and TRUNCATE_NAME in names:
        candidates.append(TRUNCATE_NAME)
        leftovers.remove(TRUNCATE_NAME)
    chain: dict[int, FoundSegment] = {}
    doubtful: set[int] = set()
    for name in candidates:
        found = _read_candidate(directory, meta, name, report, known or {})
        if found is None:
            continue
        header = found.header
        if (cut is not None and header.number > cut.keep_number and header.salt != cut.salt) or (
            header.number < meta.base_number and header.first_lsn < meta.base_lsn
        ):
            leftovers.append(name)
        elif header.number in chain:
            other = chain[header.number].file_name
            reason = f"this file and {other} are both segment {header.number}"
            report(CorruptLogError(f"{directory.path}/{name}", 0, reason))
            doubtful.add(header.number)
        else:
            chain[header.number] = found
    if cut is not None and all(found.header.salt != cut.salt for found in chain.values()):
        path = f"{directory.path}/{segment_name(cut.first_lsn)}"
        reason = "the segment in which a truncated log goes on is missing"
        report(CorruptLogError(path, 0, reason))
    segments = [chain[number] for number in sorted(chain)]
    whole = _whole_part(directory, meta, segments, report)
    if doubtful:
        whole = min(whole, sum(found.number < min(doubtful) for found in segments))
    return Chain(segments[:whole], segments[whole:], leftovers)


def _read_candidate(
    directory: Directory,
    meta: Meta,
    name: str,
    report: Report,
    known: Mapping[str, FoundSegment],
) -> FoundSegment | None:
    """A file that has a segment's name, if it is one of this log's."""
    path = f"{directory.path}/{name}"
    lsn = segment_name_lsn(name)
    if lsn is None and name != TRUNCATE_NAME:
        report(CorruptLogError(path, 0, "this is not the name of a segment"))
        return None
    try:
        found = known.get(name) or read_segment(directory, name)
    except CorruptLogError as exc:
        report(exc)
        return None
    header = found.header
    if header.log_uuid != meta.log_uuid:
        report(CorruptLogError(path, 0, "this segment belongs to another log"))
        return None
    if lsn is not None and lsn != header.first_lsn:
        reason = f"the header says that this file is {segment_name(header.first_lsn)}"
        report(CorruptLogError(path, 0, reason))
        return None
    return found


def _whole_part(
    directory: Directory, meta: Meta, segments: list[FoundSegment], report: Report
) -> int:
    """How many segments follow each other without a gap, from the log's first one on."""
    base_path = f"{directory.path}/{segment_name(meta.base_lsn)}"
    if not segments:
        report(CorruptLogError(base_path, 0, "the log's segments are missing"))
        return 0
    first = segments[0]
    if (first.number, first.header.first_lsn) != (meta.base_number, meta.base_lsn):
        reason = f"segment {meta.base_number} is missing: the log starts with it"
        report(CorruptLogError(base_path, 0, reason))
        return 0
    for index, (segment, after) in enumerate(pairwise(segments), 1):
        path = f"{directory.path}/{after.file_name}"
        if after.number != segment.number + 1:
            report(CorruptLogError(path, 0, f"segment {segment.number + 1} before it is missing"))
            return index
        if after.header.first_lsn < segment.header.first_lsn:
            reason = "its first LSN is below that of the segment before"
            report(CorruptLogError(path, 0, reason))
            return index
    return len(segments)


# -- how parts of the chain join ------------------------------------------------------


def joins(end: Position, following: SegmentHeader | FrameHeader) -> bool:
    """Whether the segment, or frame, follows what is before ``end``."""
    return following.first_lsn == end.next_lsn and following.previous == end.previous


def place_before(frame: FrameHeader) -> Position:
    """The place at which a frame stands, without what only a walk up to it can tell."""
    return Position(frame.offset, frame.first_lsn, frame.previous)


def check_joins(
    directory: Directory,
    meta: Meta,
    chain: Chain,
    report: Report,
    known: Mapping[SegmentHeader, Position] | None = None,
) -> Chain:
    """The chain up to the first place where what follows does not continue what is before it.

    A SEAL frame tells where its segment ends; where there is none yet, the frames do.  Of two
    that do not join either may be of another history, and no record of such a one may be read:
    the first of them stays only where the second does not join the third.

    Args:
      known: places up to which the frames of a segment were followed before.

    Raises:
      FileNotFoundError: a file went away meanwhile.
    """
    segments = chain.segments
    for index, (segment, after) in enumerate(pairwise(segments), 1):
        end = _end_before(directory, meta, segment, after.header, known or {})
        if end is None:
            continue
        path, offset = f"{directory.path}/{after.file_name}", 0
        reason = f"this segment does not continue {segment.file_name}, which is before it"
        if end.reason:
            path, offset, reason = f"{directory.path}/{segment.file_name}", end.offset, end.reason
            whole = index
        else:
            third = segments[index + 1] if index + 1 < len(segments) else None
            odd = third and _end_before(directory, meta, after, third.header, {})
            whole = index if odd else index - 1
        report(CorruptLogError(path, offset, reason))
        return Chain(segments[:whole], [*segments[whole:], *chain.beyond], chain.leftovers)
    return chain


@attrs.frozen
class _Break:
    """Where a segment ends that does not come to the next one."""

    offset: int
    reason: str
    """What is wrong there; "": nothing, it ends as segments do."""


def _end_before(
    directory: Directory,
    meta: Meta,
    segment: FoundSegment,
    following: SegmentHeader,
    known: Mapping[SegmentHeader, Position],
) -> _Break | None:
    """None where the segment's frames lead to the one after it."""
    cut, mark = meta.truncation, segment.mark
    # A SEAL may be of the time before a truncation that is not yet carried out.
    is_cut = cut is not None and segment.number == cut.keep_number
    if mark is not None and mark.kind is Kind.SEAL and not is_cut:
        return None if joins(place_before(mark), following) else _Break(mark.offset, "")
    file = directory.open(segment.file_name)
    try:
        for start in (known.get(segment.header), start_of(segment.header)):
            if start is None:
                continue
            if joins(start, following):
                return None
            scanner = FrameScanner(file.pread, segment.header, start, bodies=False, skim=True)
            for _ in scanner:
                if joins(scanner.position, following):
                    return None
        return _Break(scanner.position.offset, scanner.reason)
    finally:
        file.close()


# -- where the log ends -----------------------------------------------------------------


@attrs.frozen
class Loss:
    """Proof that more was durable than there is."""

    error: CorruptLogError
    durable_lsn: int
    """Up to here it proves it, at least."""


@attrs.frozen
class End:
    """What `judge_end` says of the place at which a scan of the last segment ended."""

    loss: Loss | None
    torn_end: int
    """Offset after what is left of an unfinished batch; the place itself where nothing is."""


def judge_end(
    directory_path: str,
    file: File,
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
      told_lsn: what the log's owner has said is durable.
      look_behind: whether to search all that stands after ``end``.
    """
    pointer = segment.pointer
    if last_kind is Kind.SEAL or (pointer is not None and pointer.kind is Kind.SEAL):
        # Either is written only when the segment behind is durable.
        path = f"{directory_path}/{segment_name(end.next_lsn)}"
        text = f"segment {segment.number + 1} is missing: {segment.file_name} is sealed"
        proven = end.next_lsn - 1 if pointer is None else max(end.next_lsn - 1, pointer.last_lsn)
        return End(Loss(CorruptLogError(path, 0, text), proven), end.offset)
    if pointer is not None and pointer.offset > end.offset:
        text = reason or "frames that had been durable are missing"
        return End(Loss(CorruptLogError(file.path, end.offset, text), pointer.last_lsn), end.offset)
    if not look_behind:
        return End(None, end.offset)
    tail = scan.examine_tail(file.pread, segment.size, segment.header, end, file.next_data)
    covering = tail.covering
    if covering is not None:
        text = (
            f"{reason or 'a frame is missing'}; the frame at offset {covering.offset} "
            f"says that LSN {end.next_lsn} had been durable"
        )
        error = CorruptLogError(file.path, end.offset, text)
        return End(Loss(error, max(tail.durable_lsn, told_lsn)), tail.torn_end)
    if told_lsn >= end.next_lsn:
        text = f"{reason or 'a frame is missing'}; the log's owner has said that LSN {told_lsn} "
        error = CorruptLogError(file.path, end.offset, f"{text}is durable")
        return End(Loss(error, told_lsn), tail.torn_end)
    return End(None, tail.torn_end)
