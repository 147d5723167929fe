"""Every finding of a log's directory or a database's, not only the first one.

Law: blocking, no trio, and nothing but reading: no lock, no write.  What is damage, and
what a crash or a writer at work leaves behind, is judged as `recovery.examine` judges
it; this module goes on where that one refuses.

Going on after damage means finding the next frame that is one.  A frame's checksum
covers its offset and its segment's salt, so whatever passes it was written there by
this log; the LSNs between it and the last good frame are those that are lost.

The log may be written meanwhile.  A rotation, a truncation, a write that is half done
look like damage for an instant, so what is found is believed only when the files stood
still around the look, and a frame only when it is read again after the proof that it
must be there.
"""

from __future__ import annotations

import errno
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final

import attrs

from trio_wal._exceptions import CorruptLogError, UnsupportedFormatError, WrongDirectoryError
from trio_wal._files import Directory, File, close_quietly
from trio_wal._store_check import StoreCheck, check_store
from trio_wal._store_files import data_file, inspect_store, misfit
from trio_wal._util import KiB

from . import scan
from .chain import (
    META_NAME,
    TRUNCATE_NAME,
    FoundSegment,
    no_log,
    read_meta,
    read_segment,
)
from .frame import (
    BLOCK,
    DATA_OFFSET,
    FRAME_HEADER_SIZE,
    FRAME_MAGIC,
    META_SIZE_MAX,
    POINTER_OFFSET,
    FrameError,
    FrameHeader,
    Kind,
    Meta,
    SegmentHeader,
    decode_footer,
    decode_frame_header,
    segment_name,
    segment_name_lsn,
)
from .scan import WINDOW, FrameScanner, Position, Read, start_of

LOOK_TRIES: Final = 20
"""How often a log that changes all the time is looked at before it is taken as it is."""
RESCUE_BYTES: Final = 4 * KiB
"""A stretch that cannot be read is read again in pieces of this size."""

Progress = Callable[[int, int], None]
"""Called with the bytes that are checked and the bytes that there are."""


@attrs.frozen
class Finding:
    """One thing that is wrong, and where."""

    path: str
    offset: int
    """Byte offset in the file; 0 where the file as a whole is wrong."""
    reason: str
    first_lsn: int | None = None
    """First of the records that cannot be read because of it; None: none, or not known."""
    last_lsn: int | None = None
    """The last of them; None with a ``first_lsn``: to the end of the log."""


@attrs.frozen
class Verification:
    """What `verify` found."""

    path: str
    log_uuid: bytes
    features: int
    findings: tuple[Finding, ...]
    segments: int
    """Segments that could be checked."""
    frames: int
    """Data frames that are whole."""
    records: int
    """Their records."""
    bytes: int
    """Bytes of segment files up to the last frame of each."""
    first_lsn: int
    last_lsn: int
    torn_bytes: int
    """Bytes of an unfinished batch behind the log's end: no damage, the next open cuts
    them, or a writer is at work."""
    clean: bool
    """Whether the log ends with the mark of an orderly close."""


def verify(directory: Directory, progress: Progress | None = None) -> Verification:
    """Check every frame of every segment.

    Raises:
      WrongDirectoryError: there is no log in this directory.
      UnsupportedFormatError: ``log.meta`` is from a newer trio-wal: nothing can be said.
      ModuleNotFoundError: the log is compressed and zstandard is not installed.
      OSError: a file cannot be opened.  One that can, but not be read, is a finding.
    """
    return _Verifier(directory, progress).run()


@attrs.frozen
class DatabaseVerification:
    """What `verify_database` found."""

    log: Verification | None
    """None: there is no log that could be looked at."""
    store: StoreCheck
    findings: tuple[Finding, ...]
    """The log's, the store's, and why the two do not fit."""


def verify_database(
    log_path: str,
    store_path: str,
    open_log: Callable[[], Directory],
    progress: Progress | None = None,
) -> DatabaseVerification:
    """Check log, store, and that they belong together.

    Raises:
      UnsupportedFormatError, ModuleNotFoundError, OSError: as `verify`.
    """
    tries = 0
    while True:
        tries += 1
        store, findings = _verify_store(store_path, progress)
        try:
            directory = open_log()
            try:
                log = verify(directory, progress)
            finally:
                close_quietly(directory)
        except (CorruptLogError, WrongDirectoryError, FileNotFoundError) as exc:
            findings.append(_no_log_finding(exc, log_path))
            return DatabaseVerification(None, store, tuple(findings))
        wrong = None
        if not findings:
            wrong = misfit(store.state, log.log_uuid, log.first_lsn, log.last_lsn)
        if wrong is None or tries == LOOK_TRIES or not _goes_on(store_path, store):
            break
    if wrong is not None:
        findings.append(Finding(store.path, 0, wrong))
    return DatabaseVerification(log, store, (*log.findings, *findings))


def _no_log_finding(error: Exception, log_path: str) -> Finding:
    if isinstance(error, CorruptLogError):
        return Finding(error.path, error.offset, error.reason)
    if isinstance(error, WrongDirectoryError):
        return Finding(error.path, 0, f"this is {error.found}")
    return Finding(log_path, 0, "the database has no log")


def _verify_store(path: str, progress: Progress | None) -> tuple[StoreCheck, list[Finding]]:
    try:
        store = check_store(path, progress)
    except CorruptLogError as exc:
        name = data_file(path)
        return StoreCheck(name, (), None, 0, 0), [Finding(exc.path, exc.offset, exc.reason)]
    return store, [Finding(store.path, offset, reason) for offset, reason in store.findings]


def _goes_on(path: str, store: StoreCheck) -> bool:
    """Whether there was a checkpoint since: then the log may begin behind what was looked at."""
    try:
        return inspect_store(path) != store.state
    except CorruptLogError:
        return True


# -- the directory ----------------------------------------------------------------


@attrs.frozen
class _View:
    """Everything outside a segment that its verdict depends on."""

    segment: FoundSegment
    following: SegmentHeader | None
    """The segment behind; None: there is none, or its header cannot be read."""
    is_last: bool
    may_be_open: bool
    """Whether it is the last but one.  A missing footer is no damage there: a rotation or
    a truncation was, or is, at it."""


def _numbers_of(listing: _Listing) -> tuple[int, ...]:
    return tuple(listing.chain)


@attrs.frozen
class _Listing:
    """The directory at one moment."""

    meta: Meta | None
    chain: dict[int, FoundSegment]
    unreadable: tuple[int, ...]
    """First LSNs, by file name, of segments whose header is damaged; in order."""
    findings: tuple[Finding, ...]

    numbers: tuple[int, ...] = attrs.field(
        init=False, eq=False, default=attrs.Factory(_numbers_of, takes_self=True)
    )
    """Of the chain, in order."""

    def view(self, number: int) -> _View | None:
        segment = self.chain.get(number)
        if segment is None:
            return None
        # Of both there are as many as somebody likes to put there; both are in order.
        behind = len(self.chain) - bisect_right(self.numbers, number)
        behind += len(self.unreadable) - bisect_right(self.unreadable, segment.header.first_lsn)
        following = self.chain.get(number + 1)
        return _View(
            segment,
            following.header if following is not None else None,
            is_last=not behind,
            may_be_open=behind == 1,
        )

    def missing_before(self, segment: FoundSegment, first_number: int, first_lsn: int) -> int:
        """How many segments are missing between a place in the chain and this segment."""
        start = bisect_left(self.unreadable, first_lsn)
        unreadable = bisect_right(self.unreadable, segment.header.first_lsn) - start
        return segment.number - first_number - max(0, unreadable)


def _list(directory: Directory) -> _Listing:
    """Read ``log.meta`` and every segment's header.

    Raises:
      FileNotFoundError: a file went away meanwhile.
    """
    findings: list[Finding] = []
    names = directory.names()
    candidates = [name for name in names if name.startswith("wal-")]
    meta = None
    try:
        meta = read_meta(directory)
        if meta is None:
            if not any(segment_name_lsn(name) is not None for name in candidates):
                raise no_log(directory.path, names)
            findings.append(Finding(f"{directory.path}/{META_NAME}", 0, "the file is missing"))
    except CorruptLogError as exc:
        findings.append(Finding(exc.path, exc.offset, exc.reason))
    except OSError as exc:
        findings.append(_unread(exc, f"{directory.path}/{META_NAME}"))
    if meta is not None and not meta.live:
        # Its creation was interrupted; one segment may be there, and nothing was accepted.
        findings += [
            Finding(f"{directory.path}/{name}", 0, "this is not the name of a segment")
            for name in candidates
            if segment_name_lsn(name) is None
        ]
        findings += [
            Finding(f"{directory.path}/{name}", 0, "a log that was never in use has segments")
            for name in candidates[1:]
        ]
        return _Listing(meta, {}, (), tuple(findings))
    if meta is not None and meta.truncation is not None and TRUNCATE_NAME in names:
        candidates.append(TRUNCATE_NAME)
    found: list[FoundSegment] = []
    unreadable: list[int] = []
    named = sorted(lsn for lsn in map(segment_name_lsn, names) if lsn is not None)
    for name in candidates:
        path = f"{directory.path}/{name}"
        lsn = segment_name_lsn(name)
        if lsn is None and name != TRUNCATE_NAME:
            findings.append(Finding(path, 0, "this is not the name of a segment"))
            continue
        try:
            found.append(read_segment(directory, name))
        except UnsupportedFormatError as exc:
            findings.append(Finding(path, 0, f"{exc.reason} {exc.version} is not supported"))
            unreadable += [] if lsn is None else [lsn]
        except CorruptLogError as exc:
            later = bisect_right(named, lsn or 0)
            end = named[later] - 1 if later < len(named) else None
            findings.append(Finding(path, exc.offset, exc.reason, lsn, end))
            unreadable += [] if lsn is None else [lsn]
        except OSError as exc:
            findings.append(_unread(exc, path))
            unreadable += [] if lsn is None else [lsn]
    chain, more = _chain(directory, meta, found)
    cut = meta.truncation if meta is not None else None
    if cut is not None and all(segment.header.salt != cut.salt for segment in found):
        path = f"{directory.path}/{segment_name(cut.first_lsn)}"
        reason = "the segment in which a truncated log goes on is missing"
        more.append(Finding(path, 0, reason, cut.first_lsn))
    return _Listing(meta, chain, tuple(sorted(unreadable)), (*findings, *more))


def _unread(error: OSError, path: str) -> Finding:
    """A bad sector is a finding; any other error is the caller's to hear of."""
    if error.errno != errno.EIO:
        raise error
    return Finding(path, 0, f"the header cannot be read: {error.strerror}")


def _chain(
    directory: Directory, meta: Meta | None, found: list[FoundSegment]
) -> tuple[dict[int, FoundSegment], list[Finding]]:
    """The segments of this log by number, and what is wrong with the others."""
    findings: list[Finding] = []
    chain: dict[int, FoundSegment] = {}
    log_uuid = _uuid_of(meta, found)
    cut = meta.truncation if meta is not None else None
    # A file under its right name goes before one that claims the same number.
    for segment in sorted(found, key=lambda s: s.file_name != s.header.name):
        header = segment.header
        path = f"{directory.path}/{segment.file_name}"
        if header.log_uuid != log_uuid:
            findings.append(Finding(path, 0, "this segment belongs to another log"))
            continue
        if segment.file_name not in (header.name, TRUNCATE_NAME):
            findings.append(Finding(path, 0, f"the header says that this file is {header.name}"))
        is_leftover = meta is not None and (
            (cut is not None and header.number > cut.keep_number and header.salt != cut.salt)
            or (header.number < meta.base_number and header.first_lsn < meta.base_lsn)
        )
        if is_leftover:
            continue
        if header.number in chain:
            other = chain[header.number].file_name
            reason = f"both this file and {other} are segment {header.number}"
            findings.append(Finding(path, 0, reason))
        else:
            chain[header.number] = segment
    return dict(sorted(chain.items())), findings


def _uuid_of(meta: Meta | None, found: list[FoundSegment]) -> bytes:
    if meta is not None:
        return meta.log_uuid
    counts = Counter(segment.header.log_uuid for segment in found)
    return counts.most_common(1)[0][0] if counts else bytes(16)


# -- one segment ------------------------------------------------------------------


@attrs.define
class _Checked:
    """What became of one segment."""

    end: Position
    findings: list[Finding] = attrs.Factory(list[Finding])
    frames: int = 0
    records: int = 0
    torn_bytes: int = 0
    last_kind: Kind | None = None


class _SegmentCheck:
    """One pass over one segment."""

    def __init__(
        self,
        directory: Directory,
        file: File,
        view: _View,
        tick: Callable[[int], None],
    ) -> None:
        self._directory = directory
        self._file = file
        self._view = view
        self._segment = view.segment
        self._header = view.segment.header
        self._tick = tick
        self._read: Read = self._careful_read
        self._unread: set[int] = set()
        self._time_us = 0
        self.result = _Checked(start_of(self._header))

    def run(self) -> _Checked:
        self._check_reserved()
        result = self.result
        while True:
            reason = self._scan()
            if self._at_join() or result.last_kind is Kind.SEAL:
                break
            if not self._go_on(reason):
                break
        if self._view.is_last:
            self._check_last_end()
        else:
            self._check_end(self._view.following)
        return result

    def _find(
        self, offset: int, reason: str, first_lsn: int | None = None, next_lsn: int | None = None
    ) -> None:
        """Note a finding; ``first_lsn`` to below ``next_lsn`` are lost by it."""
        last_lsn = None
        if next_lsn is not None:
            last_lsn = next_lsn - 1
            if first_lsn is None or last_lsn < first_lsn:
                first_lsn = last_lsn = None
        self.result.findings.append(Finding(self._file.path, offset, reason, first_lsn, last_lsn))

    def _careful_read(self, length: int, offset: int) -> bytes:
        """`File.pread`, where a bad sector costs itself and not everything around it."""
        self._tick(offset)
        try:
            return self._file.pread(length, offset)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
        pieces: list[bytes] = []
        for start in range(offset, min(offset + length, self._segment.size), RESCUE_BYTES):
            size = min(RESCUE_BYTES, offset + length - start)
            try:
                pieces.append(self._file.pread(size, start))
            except OSError as exc:
                if start not in self._unread:
                    self._unread.add(start)
                    self._find(start, f"{size} bytes cannot be read: {exc.strerror}")
                pieces.append(bytes(size))
        return b"".join(pieces)

    def _check_reserved(self) -> None:
        """What lies between the header and the first frame."""
        start = POINTER_OFFSET + BLOCK
        reserved = self._read(DATA_OFFSET - start, start)
        used = len(reserved) - len(reserved.lstrip(b"\0"))
        if used < len(reserved):
            self._find(start + used, "bytes between header and frames that are not zero")

    def _scan(self) -> str:
        """Take valid frames as far as they go; returns why they end."""
        result = self.result
        if self._at_join():
            return ""
        scanner = FrameScanner(self._read, self._header, result.end)
        for frame, body in scanner:
            self._take(frame, body)
            result.end = scanner.position
            if self._at_join() or frame.kind is Kind.SEAL:
                break
        return scanner.reason

    def _take(self, frame: FrameHeader, body: bytes) -> None:
        result = self.result
        result.last_kind = frame.kind
        if frame.time_us < self._time_us:
            self._find(frame.offset, "the frame's time is before that of the frame before it")
        self._time_us = max(self._time_us, frame.time_us)
        try:
            scan.check_body(frame, body)
        except FrameError as exc:
            self._find(frame.offset, str(exc), frame.first_lsn, frame.next_lsn)
            return
        if frame.kind is Kind.DATA:
            result.frames += 1
            result.records += frame.count
            return
        footer = decode_footer(body)
        records = frame.first_lsn - self._header.first_lsn
        if (footer.records, footer.last_lsn) != (records, frame.first_lsn - 1):
            self._find(
                frame.offset,
                f"the footer counts {footer.records} records up to LSN {footer.last_lsn}, "
                f"the segment has {records} up to {frame.first_lsn - 1}",
            )

    def _at_join(self) -> bool:
        """Whether the segment behind starts just here."""
        following, end = self._view.following, self.result.end
        return (
            following is not None
            and following.first_lsn == end.next_lsn
            and following.previous == end.previous
        )

    def _go_on(self, reason: str) -> bool:
        """Nothing valid stands here: note it and move behind it; False at the end."""
        end = self.result.end
        if self._view.is_last and not self._was_durable(end):
            return False
        if next(iter(FrameScanner(self._read, self._header, end)), None) is not None:
            # It was being written while the look around it was taken.
            return True
        frame = self._next_frame(end.offset)
        if frame is None:
            if self._view.is_last:
                pointer = self._segment.pointer
                self._find(
                    end.offset,
                    reason or "frames that had been durable are missing",
                    end.next_lsn,
                    pointer.last_lsn + 1 if pointer is not None else end.next_lsn,
                )
            return False
        whole = frame.offset == end.offset and frame.first_lsn == end.next_lsn
        if whole and frame.previous == end.previous:
            # Its header is good, so where it ends is known.
            padding = reason.startswith("padding")
            self._find(frame.offset, reason, None if padding else frame.first_lsn, frame.next_lsn)
            if padding:
                self.result.frames += 1
                self.result.records += frame.count
            self.result.end = Position(frame.end, frame.next_lsn, frame.crc)
        else:
            self._find(end.offset, reason or "a frame is missing", end.next_lsn, frame.first_lsn)
            self.result.end = Position(frame.offset, frame.first_lsn, frame.previous)
        self.result.last_kind = None
        return True

    def _was_durable(self, end: Position) -> bool:
        """Whether something behind this place says that what stood here had been durable."""
        pointer = self._segment.pointer
        if pointer is not None and pointer.offset > end.offset:
            return True
        tail = scan.examine_tail(
            self._read, self._segment.size, self._header, end, self._file.next_data
        )
        start = scan.torn_start(self._read, self._header, pointer, end, tail.torn_end)
        self.result.torn_bytes = tail.torn_end - start
        return tail.covering is not None

    def _next_frame(self, start: int) -> FrameHeader | None:
        """The first frame header at or behind an offset."""
        for offset in scan.stretches(start, self._segment.size, self._file.next_data):
            window = self._read(WINDOW, offset)
            at = window.find(FRAME_MAGIC)
            while at >= 0:
                if at % BLOCK == 0:
                    head = window[at : at + FRAME_HEADER_SIZE]
                    frame = decode_frame_header(head, offset + at, self._header.seed)
                    if frame is not None:
                        return frame
                at = window.find(FRAME_MAGIC, at + 1)
        return None

    def _check_last_end(self) -> None:
        """The log ends here, unless the footer says that it goes on."""
        result, pointer = self.result, self._segment.pointer
        if result.last_kind is Kind.SEAL or (pointer is not None and pointer.kind is Kind.SEAL):
            result.torn_bytes = 0
            lsn = result.end.next_lsn
            path = f"{self._directory.path}/{segment_name(lsn)}"
            reason = (
                f"segment {self._header.number + 1} is missing: {self._segment.file_name} is sealed"
            )
            result.findings.append(Finding(path, 0, reason, lsn))

    def _check_end(self, following: SegmentHeader | None) -> None:
        """The segment must end where the next one starts, with a footer."""
        result, end = self.result, self.result.end
        if following is None:
            if result.last_kind is not Kind.SEAL:
                self._find(end.offset, "the segment's footer is damaged")
            return
        if not self._at_join():
            if end.next_lsn < following.first_lsn:
                reason = f"the records before LSN {following.first_lsn} are missing"
                self._find(end.offset, reason, end.next_lsn, following.first_lsn)
            else:
                self._find(end.offset, f"{following.name} does not follow this segment")
            return
        scanner = FrameScanner(self._read, self._header, end)
        frame_body = next(iter(scanner), None)
        seal = None if frame_body is None or frame_body[0].kind is not Kind.SEAL else frame_body[0]
        if self._view.may_be_open and (seal is None or self._segment.size != seal.end):
            return
        if frame_body is None or seal is None:
            self._find(end.offset, "the segment's footer is damaged")
            return
        self._take(seal, frame_body[1])
        pointer = self._segment.pointer
        if not self._view.may_be_open and (
            pointer is None or (pointer.kind, pointer.crc) != (Kind.SEAL, seal.crc)
        ):
            self._find(POINTER_OFFSET, "the pointer to the segment's footer is damaged")
        behind = scan.examine_tail(
            self._read, self._segment.size, self._header, scanner.position, self._file.next_data
        )
        if behind.torn_end > seal.end:
            self._find(seal.end, "bytes behind the segment's footer")
        result.end = Position(seal.end, seal.next_lsn, seal.crc, time_us=seal.time_us)


# -- the whole --------------------------------------------------------------------


class _Verifier:
    def __init__(self, directory: Directory, progress: Progress | None) -> None:
        self._directory = directory
        self._progress = progress
        self._total = 0
        self._done = 0
        self._listing = self._look()

    def _look(self) -> _Listing:
        """The directory, and findings only if it stood still while they were made."""
        for _ in range(LOOK_TRIES):
            before = self._fingerprint()
            try:
                listing = _list(self._directory)
            except FileNotFoundError:
                continue
            except CorruptLogError:
                if self._fingerprint() == before:
                    raise
                continue
            if not listing.findings or self._fingerprint() == before:
                return listing
        return _list(self._directory)

    def _fingerprint(self) -> object:
        directory = self._directory
        names = directory.names()
        if META_NAME not in names:
            return names, b""
        try:
            file = directory.open(META_NAME)
            try:
                return names, file.pread(META_SIZE_MAX, 0)
            finally:
                file.close()
        except (OSError, CorruptLogError):
            return names, None

    def run(self) -> Verification:
        first_listing = self._listing
        meta, chain = first_listing.meta, first_listing.chain
        numbers = list(chain)
        base = meta.base_number if meta is not None else (numbers[0] if numbers else 1)
        base_lsn = (
            meta.base_lsn
            if meta is not None
            else (chain[numbers[0]].header.first_lsn if numbers else 1)
        )
        self._total = sum(segment.size for segment in chain.values())
        findings = list(first_listing.findings)
        if meta is not None and meta.live and not chain and not first_listing.unreadable:
            path = f"{self._directory.path}/{segment_name(base_lsn)}"
            findings.append(Finding(path, 0, "the log's segments are missing", base_lsn))
        segments = frames = records = size = torn = 0
        clean = not chain
        due_number, due_lsn = base, base_lsn
        first_lsn: int | None = None
        for number in numbers:
            settled = self._settle(number)
            if settled is None:
                # Dropped, or cut off, while this was running.
                due_number = number + 1
                continue
            segment, checked = settled
            is_first = number == numbers[0]
            findings += self._gap_before(first_listing, segment, due_number, due_lsn, is_first)
            findings += checked.findings
            first_lsn = segment.header.first_lsn if first_lsn is None else first_lsn
            due_number, due_lsn = number + 1, checked.end.next_lsn
            segments += 1
            frames += checked.frames
            records += checked.records
            size += checked.end.offset
            torn = checked.torn_bytes
            clean = checked.last_kind is Kind.CLOSE
            self._done += segment.size
        if self._progress is not None:
            self._progress(self._total, self._total)
        return Verification(
            path=self._directory.path,
            log_uuid=_uuid_of(meta, list(chain.values())),
            features=meta.features if meta is not None else 0,
            findings=tuple(findings),
            segments=segments,
            frames=frames,
            records=records,
            bytes=size,
            first_lsn=base_lsn if first_lsn is None else first_lsn,
            last_lsn=due_lsn - 1,
            torn_bytes=torn,
            clean=clean and torn == 0,
        )

    def _gap_before(
        self,
        listing: _Listing,
        segment: FoundSegment,
        due_number: int,
        due_lsn: int,
        is_first: bool,
    ) -> Iterator[Finding]:
        """What is wrong between a place in the chain, or where ``log.meta`` says that the log
        starts, and the next segment that there is."""
        if listing.missing_before(segment, due_number, due_lsn) > 0:
            yield self._missing(segment, due_number, due_lsn, is_first)
        elif is_first and self._starts_elsewhere(segment.header, due_number, due_lsn):
            path = f"{self._directory.path}/{META_NAME}"
            reason = f"it says that the log starts with segment {due_number} and LSN {due_lsn}"
            yield Finding(path, 0, f"{reason}, but that is {segment.file_name}")

    def _starts_elsewhere(self, header: SegmentHeader, base: int, base_lsn: int) -> bool:
        return header.number < base or (header.number == base and header.first_lsn != base_lsn)

    def _missing(
        self, segment: FoundSegment, due_number: int, due_lsn: int, is_first: bool
    ) -> Finding:
        last = segment.number - 1
        which = (
            f"segment {last} is" if last == due_number else f"segments {due_number} to {last} are"
        )
        path = f"{self._directory.path}/{segment_name(due_lsn)}"
        why = "the log starts there" if is_first else f"{segment.file_name} comes behind"
        end = segment.header.first_lsn - 1
        lost = (due_lsn, end) if due_lsn <= end else (None, None)
        return Finding(path, 0, f"{which} missing: {why}", *lost)

    def _settle(self, number: int) -> tuple[FoundSegment, _Checked] | None:
        """Check a segment until all that its verdict depends on stood still meanwhile.

        None: it left the log.
        """
        settled: tuple[FoundSegment, _Checked] | None = None
        for _ in range(LOOK_TRIES):
            view = self._listing.view(number)
            if view is None:
                return None
            checked = self._check(view)
            settled = None if checked is None else (view.segment, checked)
            if checked is not None and not checked.findings and not view.is_last:
                break
            self._listing = self._look()
            if checked is not None and self._listing.view(number) == view:
                break
        return settled

    def _check(self, view: _View) -> _Checked | None:
        try:
            file = self._directory.open(view.segment.file_name)
        except FileNotFoundError:
            return None
        try:
            return _SegmentCheck(self._directory, file, view, self._report).run()
        finally:
            close_quietly(file)

    def _report(self, offset: int) -> None:
        if self._progress is not None:
            self._progress(min(self._done + offset, self._total), self._total)
