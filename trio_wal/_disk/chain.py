"""The segments of a log as one chain.

Law: blocking, only reads, and tells a reporter of what is wrong: opening, verifying and reading
ask here, and differ in what they do about it.  No trio.

A chain is whole where ``log.meta`` names its first segment, numbers have no gap, all have the
log's UUID, and each begins with the checksum of the frame before it.  Whether frames lead from
one segment to the next, and where the log ends, is judged in `walk`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final

import attrs
import msgspec
from msgspec.structs import replace

from trio_wal._exceptions import (
    CorruptLogError,
    UnsupportedFormatError,
    WalError,
    WrongDirectoryError,
)
from trio_wal._files import LOCK_NAME, Directory, File

from . import scan
from .finding import Finding, Report, finding_of, refuse
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
from .plain import follow_plain
from .scan import FrameScanner, Position, start_of
from .segment import NEW_NAME, SPARE_PREFIX

META_NAME: Final = "log.meta"
META_NEW_NAME: Final = "log.meta.tmp"
TRUNCATE_NAME: Final = "truncate.tmp"
PLACES_NAME: Final = "consumers"
PLACES_NEW_NAME: Final = "consumers.tmp"
LOG_NAME: Final = "log"
STORE_NAME: Final = "store"
"""What a database's directory holds: its log, and LMDB's files."""


class FoundSegment(msgspec.Struct, frozen=True):
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

    @property
    def next_lsn(self) -> int | None:
        """The first LSN after it, where its SEAL frame tells."""
        sealed = self.mark is not None and self.mark.kind is Kind.SEAL
        return self.mark.first_lsn if sealed and self.mark is not None else None


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
        raise exc.of(path) from exc
    except FrameError as exc:
        raise CorruptLogError(path, 0, str(exc)) from exc
    finally:
        file.close()


def is_ours(name: str) -> bool:
    return name in (LOCK_NAME, META_NEW_NAME, TRUNCATE_NAME, NEW_NAME, PLACES_NEW_NAME) or (
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


def check_ours(directory: Directory, names: Iterable[str], report: Report = refuse) -> None:
    """Whether what has the name of one of the log's own files is a file: recovery would remove it,
    or write it.  Segments, ``log.meta`` and the places of consumers are looked at elsewhere."""
    for name in filter(is_ours, names):
        try:
            directory.open(name).close()
        except CorruptLogError as exc:
            report(finding_of(exc, exc.path))
        except OSError:
            # It went away, or is not ours to read: whoever needs it says so.
            continue


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
        raise exc.of(file.path) from exc
    except FrameError as exc:
        raise CorruptLogError(file.path, 0, str(exc)) from exc


class Until(msgspec.Struct, frozen=True):
    """What comes after a segment, and so how it must end."""

    following: SegmentHeader | None
    """The segment after it; None: there is none, or its header cannot be read."""
    is_last: bool
    may_be_open: bool
    """Whether it is the last but one.  A missing footer is no damage there: a rotation or
    a truncation was, or is, at it."""


class Chain(msgspec.Struct, frozen=True):
    """A log's segments, by number."""

    segments: list[FoundSegment]
    """Without a gap, from the first on."""
    beyond: list[FoundSegment]
    """What is this log's, too, but stands after a place where the chain is broken."""
    leftovers: list[str]
    """Names of files that the log no longer needs."""
    unreadable: tuple[int, ...] = ()
    """First LSNs, by file name, of segments whose header is damaged; in order."""

    def find(self, number: int) -> FoundSegment | None:
        """The segment of a number."""
        for part in (self.segments, self.beyond):
            at = bisect_left(part, number, key=_number_of)
            if at < len(part) and part[at].number == number:
                return part[at]
        return None

    def until(self, segment: FoundSegment) -> Until:
        """What comes after one of its segments."""
        # Of both there are as many as somebody likes to put there; all are in order.
        number = segment.number
        whole = bisect_right(self.segments, number, key=_number_of)
        broken = bisect_right(self.beyond, number, key=_number_of)
        after = [*self.segments[whole : whole + 1], *self.beyond[broken : broken + 1]][:1]
        count = len(self.segments) - whole + len(self.beyond) - broken
        count += len(self.unreadable) - bisect_right(self.unreadable, segment.header.first_lsn)
        follows = bool(after) and after[0].number == number + 1
        return Until(after[0].header if follows else None, not count, count == 1)


def _number_of(segment: FoundSegment) -> int:
    return segment.number


def list_chain(
    directory: Directory,
    meta: Meta,
    report: Report = refuse,
    known: Mapping[str, FoundSegment] | None = None,
    names: Sequence[str] | None = None,
) -> Chain:
    """The chain of segments, up to the first place where it is broken, and what is after that.

    Args:
      report: is told of files that are foreign, renamed, duplicate, damaged or missing.
      known: segments, by file name, whose headers need not be read again.
      names: of the files, if they are known.

    Raises:
      FileNotFoundError: a file went away meanwhile.
      OSError: a header cannot be read, and that is not the file's fault.
    """
    names = directory.names() if names is None else names
    leftovers = temporary(names)
    cut = meta.truncation
    candidates = [name for name in names if name.startswith("wal-")]
    if cut is not None and TRUNCATE_NAME in names:
        candidates.append(TRUNCATE_NAME)
        leftovers.remove(TRUNCATE_NAME)
    found: list[FoundSegment] = []
    unreadable: list[int] = []
    lsns = sorted(lsn for lsn in map(segment_name_lsn, names) if lsn is not None)
    for name in candidates:
        segment = known.get(name) if known is not None else None
        if segment is None:
            segment = _read_candidate(directory, name, lsns, unreadable, report)
        if segment is not None:
            found.append(segment)
    chain: dict[int, FoundSegment] = {}
    doubtful: list[int] = []
    # A file under its right name goes before one that claims the same number.
    for segment in sorted(found, key=lambda s: s.file_name not in (s.header.name, TRUNCATE_NAME)):
        header = segment.header
        path = f"{directory.path}/{segment.file_name}"
        if header.log_uuid != meta.log_uuid:
            report(Finding(path, 0, "this segment belongs to another log"))
            continue
        renamed = segment.file_name not in (header.name, TRUNCATE_NAME)
        if renamed:
            report(Finding(path, 0, f"the header says that this file is {header.name}"))
        if (cut is not None and header.number > cut.keep_number and header.salt != cut.salt) or (
            header.number < meta.base_number and header.first_lsn < meta.base_lsn
        ):
            leftovers.append(segment.file_name)
        elif header.number in chain:
            other = chain[header.number].file_name
            report(Finding(path, 0, f"both this file and {other} are segment {header.number}"))
            doubtful += [] if renamed else [header.number]
        else:
            chain[header.number] = segment
            doubtful += [header.number] if renamed else []
    if cut is not None and all(segment.header.salt != cut.salt for segment in chain.values()):
        path = f"{directory.path}/{segment_name(cut.first_lsn)}"
        reason = "the segment in which a truncated log goes on is missing"
        report(Finding(path, 0, reason, cut.first_lsn))
    segments = [chain[number] for number in sorted(chain)]
    unread = tuple(sorted(unreadable))
    whole = _whole_part(directory, meta, segments, unread, report)
    if doubtful:
        whole = min(whole, sum(segment.number < min(doubtful) for segment in segments))
    return Chain(segments[:whole], segments[whole:], leftovers, unread)


def _read_candidate(
    directory: Directory, name: str, lsns: list[int], unreadable: list[int], report: Report
) -> FoundSegment | None:
    """A file that has a segment's name, if it can be read as one.

    Args:
      lsns: that segments are named after, in order.
      unreadable: gets what this file is named after, if it cannot be read.
    """
    path = f"{directory.path}/{name}"
    lsn = segment_name_lsn(name)
    if lsn is None and name != TRUNCATE_NAME:
        report(Finding(path, 0, "this is not the name of a segment"))
        return None
    try:
        return read_segment(directory, name)
    except FileNotFoundError:
        raise
    except (CorruptLogError, UnsupportedFormatError, OSError) as exc:
        later = bisect_right(lsns, lsn or 0)
        end = lsns[later] - 1 if later < len(lsns) else None
        report(attrs.evolve(finding_of(exc, path), first_lsn=lsn, last_lsn=end))
        unreadable += [] if lsn is None else [lsn]
        return None


def list_unborn(directory: Directory, names: Iterable[str], report: Report) -> list[str]:
    """The segments of a log whose creation was interrupted: nothing was ever accepted."""
    segments = [name for name in names if name.startswith("wal-")]
    for name in segments:
        if segment_name_lsn(name) is None:
            report(Finding(f"{directory.path}/{name}", 0, "this is not the name of a segment"))
    for name in segments[1:]:
        reason = "a log that was never in use has segments"
        report(Finding(f"{directory.path}/{name}", 0, reason))
    return segments


def _whole_part(
    directory: Directory,
    meta: Meta,
    segments: list[FoundSegment],
    unreadable: tuple[int, ...],
    report: Report,
) -> int:
    """How many segments follow each other without a gap, from the log's first one on."""
    whole: int | None = None
    before: FoundSegment | None = None
    for index, segment in enumerate(segments):
        number, lsn = segment.number, segment.header.first_lsn
        due_number: int = meta.base_number
        due_lsn: int | None = meta.base_lsn
        if before is not None:
            due_number, due_lsn = before.number + 1, before.next_lsn
        start = before.header.first_lsn + 1 if before is not None else meta.base_lsn
        unread = bisect_right(unreadable, lsn) - bisect_left(unreadable, start)
        wrong: Finding | None = None
        if number - due_number - max(0, unread) > 0:
            wrong = _missing(directory, segment, due_number, due_lsn, is_first=before is None)
        elif before is not None and lsn < before.header.first_lsn:
            path = f"{directory.path}/{segment.file_name}"
            wrong = Finding(path, 0, "its first LSN is below that of the segment before")
        elif before is None and (number < due_number or (number == due_number and lsn != due_lsn)):
            reason = f"it says that the log starts with segment {due_number} and LSN {due_lsn}"
            reason += f", but that is {segment.file_name}"
            wrong = Finding(f"{directory.path}/{META_NAME}", 0, reason)
        if wrong is not None:
            report(wrong)
        if whole is None and (wrong is not None or number != due_number):
            whole = index
        before = segment
    if not segments and not unreadable:
        path = f"{directory.path}/{segment_name(meta.base_lsn)}"
        report(Finding(path, 0, "the log's segments are missing", meta.base_lsn))
    return len(segments) if whole is None else whole


def _missing(
    directory: Directory, segment: FoundSegment, number: int, lsn: int | None, *, is_first: bool
) -> Finding:
    """Segments are missing before one.

    Args:
      number: of the first of them.
      lsn: its first LSN; None: not known.
    """
    last, end = segment.number - 1, segment.header.first_lsn - 1
    which = f"segment {last} is" if last == number else f"segments {number} to {last} are"
    why = "the log starts there" if is_first else f"{segment.file_name} comes after it"
    name = segment.file_name if lsn is None else segment_name(lsn)
    lost = (lsn, end) if lsn is not None and lsn <= end else (None, None)
    return Finding(f"{directory.path}/{name}", 0, f"{which} missing: {why}", *lost)


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
        report(Finding(path, offset, reason))
        beyond = [*segments[whole:], *chain.beyond]
        return replace(chain, segments=segments[:whole], beyond=beyond)
    return chain


class _Break(msgspec.Struct, frozen=True):
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
            frames = iter(scanner)
            while (
                follow_plain(scanner, stop_lsn=following.first_lsn)
                or next(frames, None) is not None
            ):
                if joins(scanner.position, following):
                    return None
        return _Break(scanner.position.offset, scanner.reason)
    finally:
        file.close()
