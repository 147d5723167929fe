"""Every finding of a log's directory, not only the first one.

Law: blocking, no trio, and nothing but reading: no lock, no write.  What is damage, and what a
crash or a writer at work leaves behind, is judged by `chain` and `walk`, as for an open; this
module's reporter lists.  What it looks for on its own is harmless: an open passes over it.

The log may be written meanwhile.  A rotation, a truncation, a write that is half done look like
damage for an instant, so what is found is believed only when the files stood still around the
look.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from typing import Final

import attrs

from trio_wal._exceptions import CorruptLogError, UnsupportedFormatError
from trio_wal._files import Directory, File, close_quietly
from trio_wal._util import KiB

from .chain import (
    META_NAME,
    PLACES_NAME,
    Chain,
    FoundSegment,
    Until,
    check_ours,
    list_chain,
    list_unborn,
    no_log,
    read_meta,
    read_segment,
)
from .finding import Finding, Report, finding_of
from .frame import (
    BLOCK,
    DATA_OFFSET,
    FEATURE_DATABASE,
    META_SIZE_MAX,
    POINTER_OFFSET,
    Meta,
    log_features,
    segment_name_lsn,
)
from .placesfile import read_places
from .walk import Walk, begun_lsn, check_last, check_segment, proven_lsn

LOOK_TRIES: Final = 20
"""How often a log that changes all the time is looked at before it is taken as it is."""
RESCUE_BYTES: Final = 4 * KiB
"""A stretch that cannot be read is read again in pieces of this size."""

Progress = Callable[[int, int], None]
"""Called with the bytes that are checked and the bytes that there are."""


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


# -- one look -------------------------------------------------------------------------


@attrs.frozen
class Listing:
    """A log's directory at one moment."""

    meta: Meta
    """Made up of what is there, where ``log.meta`` is not."""
    has_meta: bool
    chain: Chain
    findings: tuple[Finding, ...]
    told_lsn: int
    """Up to here somebody proves that there was more, the log's owner included; a reader believes
    him, an open does not (docs/design)."""

    @property
    def segments(self) -> list[FoundSegment]:
        """All that are this log's, by number."""
        return [*self.chain.segments, *self.chain.beyond]

    def view(self, number: int) -> tuple[FoundSegment, Until, int] | None:
        """What the verdict on a segment depends on; None: it is not there any more."""
        segment = self.chain.find(number)
        if segment is None:
            return None
        return segment, self.chain.until(segment), self.meta.epoch


def list_log(directory: Directory) -> Listing:
    """Read ``log.meta`` and every segment's header, and say what is wrong.

    Findings are believed only if the directory stood still while they were made.

    Raises:
      WrongDirectoryError, UnsupportedFormatError, OSError: as `verify`.
    """
    for _ in range(LOOK_TRIES):
        before = _fingerprint(directory)
        try:
            listing = _list(directory)
        except FileNotFoundError:
            continue
        except CorruptLogError:
            if _fingerprint(directory) == before:
                raise
            continue
        if not listing.findings or _fingerprint(directory) == before:
            return listing
    return _list(directory)


def _fingerprint(directory: Directory) -> object:
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


def _list(directory: Directory) -> Listing:
    """Raises `FileNotFoundError` where a file went away meanwhile."""
    findings: list[Finding] = []
    # Before the files: what it speaks of is in them then.
    word = directory.published()
    check_ours(directory, directory.names(), findings.append)
    meta = find_meta(directory, findings.append)
    if meta is not None and not meta.features & FEATURE_DATABASE:
        check_places(directory, meta, findings.append)
    if meta is None:
        made_up = guess_meta(directory)
        chain = list_chain(directory, made_up, findings.append)
        return Listing(made_up, False, chain, tuple(findings), 0)
    if not meta.live:
        list_unborn(directory, directory.names(), findings.append)
        return Listing(meta, True, Chain([], [], []), tuple(findings), 0)
    chain = list_chain(directory, meta, findings.append)
    return Listing(meta, True, chain, tuple(findings), proven_lsn(word, meta))


def find_meta(directory: Directory, report: Report) -> Meta | None:
    path = f"{directory.path}/{META_NAME}"
    try:
        meta = read_meta(directory)
    except UnsupportedFormatError:
        raise
    except (CorruptLogError, OSError) as exc:
        report(finding_of(exc, path))
        return None
    if meta is None:
        names = directory.names()
        if all(segment_name_lsn(name) is None for name in names):
            raise no_log(directory.path, names)
        report(Finding(path, 0, "the file is missing"))
    return meta


def check_places(directory: Directory, meta: Meta, report: Report) -> None:
    try:
        read_places(directory, meta.log_uuid)
    except (CorruptLogError, UnsupportedFormatError, OSError) as exc:
        report(finding_of(exc, f"{directory.path}/{PLACES_NAME}"))


def guess_meta(directory: Directory) -> Meta:
    """What ``log.meta`` may have said, by the segments that there are."""
    found: list[FoundSegment] = []
    for name in directory.names():
        if segment_name_lsn(name) is not None:
            try:
                found.append(read_segment(directory, name))
            except FileNotFoundError:
                raise
            except (CorruptLogError, UnsupportedFormatError, OSError):
                # For `list_chain` to say.
                continue
    # What has come from elsewhere has mostly another name than its own.
    named = [segment for segment in found if segment.file_name == segment.header.name] or found
    counts = Counter(segment.header.log_uuid for segment in named)
    uuid = counts.most_common(1)[0][0] if counts else bytes(16)
    headers = [segment.header for segment in found if segment.header.log_uuid == uuid]
    if not headers:
        return Meta(uuid, 1, 1, live=True)
    first = min(headers, key=lambda header: header.number)
    return Meta(uuid, first.number, first.first_lsn, log_features(first.features), live=True)


# -- one segment ------------------------------------------------------------------------


class CarefulFile:
    """A segment's file, where a bad sector costs itself and not everything around it."""

    def __init__(self, file: File, size: int, report: Report, tick: Callable[[int], None]) -> None:
        self.path: str = file.path
        self.next_data = file.next_data
        self._file = file
        self._size = size
        self._report = report
        self._tick = tick
        self._unread: set[int] = set()

    def pread(self, length: int, offset: int) -> bytes:
        self._tick(offset)
        try:
            return self._file.pread(length, offset)
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
        pieces: list[bytes] = []
        for start in range(offset, min(offset + length, self._size), RESCUE_BYTES):
            size = min(RESCUE_BYTES, offset + length - start)
            try:
                pieces.append(self._file.pread(size, start))
            except OSError as exc:
                if start not in self._unread:
                    self._unread.add(start)
                    reason = f"{size} bytes cannot be read: {exc.strerror}"
                    self._report(Finding(self.path, start, reason, cause=exc))
                pieces.append(bytes(size))
        return b"".join(pieces)


def _check_reserved(file: CarefulFile, report: Report) -> None:
    """What lies between the header and the first frame."""
    start = POINTER_OFFSET + BLOCK
    reserved = file.pread(DATA_OFFSET - start, start)
    used = len(reserved) - len(reserved.lstrip(b"\0"))
    if used < len(reserved):
        reason = "bytes between header and frames that are not zero"
        report(Finding(file.path, start + used, reason, harmless=True))


# -- the whole --------------------------------------------------------------------------


@attrs.frozen
class _Checked:
    segment: FoundSegment
    walk: Walk
    findings: tuple[Finding, ...]


class _Verifier:
    def __init__(self, directory: Directory, progress: Progress | None) -> None:
        self._directory = directory
        self._progress = progress
        self._total = 0
        self._done = 0
        self._listing = list_log(directory)

    def run(self) -> Verification:
        first = self._listing
        self._total = sum(segment.size for segment in first.segments)
        findings = list(first.findings)
        checks: list[_Checked] = []
        for segment in first.segments:
            checked = self._settle(segment.number)
            # None: dropped, or cut off, while this was running.
            if checked is not None:
                checks.append(checked)
                findings += checked.findings
                self._done += checked.segment.size
        if self._progress is not None:
            self._progress(self._total, self._total)
        last = checks[-1].walk if checks else None
        base = first.meta.base_lsn
        torn = 0 if last is None else last.torn_bytes
        return Verification(
            path=self._directory.path,
            log_uuid=first.meta.log_uuid,
            features=first.meta.features,
            findings=tuple(sorted(findings, key=lambda finding: finding.path)),
            segments=len(checks),
            frames=sum(checked.walk.frames for checked in checks),
            records=sum(checked.walk.records for checked in checks),
            bytes=sum(checked.walk.end.offset for checked in checks),
            first_lsn=checks[0].segment.header.first_lsn if checks else base,
            last_lsn=base - 1 if last is None else last.end.next_lsn - 1,
            torn_bytes=torn,
            clean=torn == 0 and (last is None or last.closed),
        )

    def _settle(self, number: int) -> _Checked | None:
        """Check a segment until all that its verdict depends on stood still meanwhile.

        None: it left the log.
        """
        settled: _Checked | None = None
        for _ in range(LOOK_TRIES):
            view = self._listing.view(number)
            if view is None:
                return None
            settled = self._check(view[0], view[1], begun_lsn(self._listing.meta))
            if settled is not None and not settled.findings and not view[1].is_last:
                break
            self._listing = list_log(self._directory)
            if settled is not None and self._listing.view(number) == view:
                break
        return settled

    def _check(self, segment: FoundSegment, until: Until, told_lsn: int) -> _Checked | None:
        findings: list[Finding] = []
        try:
            opened = self._directory.open(segment.file_name)
        except FileNotFoundError:
            return None
        try:
            file = CarefulFile(opened, segment.size, findings.append, self._tick)
            _check_reserved(file, findings.append)
            if until.is_last:
                path = self._directory.path
                walk = check_last(
                    path, file, segment, findings.append, told_lsn=told_lsn, look_behind=True
                )
            else:
                walk = check_segment(file, segment, until, findings.append)
            return _Checked(segment, walk, tuple(findings))
        finally:
            close_quietly(opened)

    def _tick(self, offset: int) -> None:
        if self._progress is not None:
            self._progress(min(self._done + offset, self._total), self._total)
