"""`trio-wal inspect`: which segments a log has, and what is in them."""

from __future__ import annotations

import uuid
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import attrs
from msgspec import to_builtins

from trio_wal._disk import scan as _scan
from trio_wal._disk.chain import FoundSegment, Until, joins, place_before
from trio_wal._disk.finding import TOLD, Finding
from trio_wal._disk.frame import (
    FORMAT_VERSION,
    TIME_US_MAX,
    FrameHeader,
    Kind,
    SegmentHeader,
    feature_names,
    to_datetime,
)
from trio_wal._disk.scan import FrameScanner, Position, start_of
from trio_wal._disk.verify import LOOK_TRIES, Listing, list_log
from trio_wal._disk.walk import judge_end
from trio_wal._files import Directory, File
from trio_wal._util import KiB, MiB

from . import _servers
from ._output import (
    ExitCode,
    Json,
    Place,
    complain,
    count,
    new_table,
    opened,
    say,
    show,
    write_json,
)

State = Literal["sealed", "unsealed", "closed", "active"]


@attrs.frozen
class _Segment:
    """One row."""

    number: int
    file: str
    first_lsn: int
    last_lsn: int
    records: int
    frames: int
    bytes: int
    """Of the file; of the last segment a part is prepared and still empty."""
    used: int
    """Bytes up to the last frame."""
    state: State
    created: datetime


@attrs.frozen
class _Log:
    path: str
    uuid: str
    format_version: int
    features: list[str]
    first_lsn: int
    last_lsn: int
    """The newest record in the files."""
    durable_lsn: int
    """The newest record that is known to be durable."""
    records: int
    """Of all segments."""
    bytes: int
    segments: tuple[_Segment, ...]
    findings: tuple[Finding, ...]
    """Damage that was met; what is whole is in the rest."""


def inspect(place: Place, /, *, json: Json = False) -> int:
    """Show the segments of a log.

    Reads only and takes no lock; the log may be written meanwhile. A segment is sealed
    when another follows it. The last one is closed after an orderly close; otherwise it is
    active: it is being written, or its writer was killed. Exits with 1 if it meets damage,
    after showing what is whole; `trio-wal verify` looks for all damage.

    For a log on servers, it shows its messages and how many of its replicas are up to date.

    Example: `trio-wal inspect orders.wal`
    """
    if _servers.is_url(place):
        return _servers.inspect(place, json)
    with opened(Path(place)) as files:
        log = _look(files)
    if json:
        write_json(_as_json(log))
    else:
        _print(log)
    for finding in log.findings:
        complain(f"{finding.path}: at offset {finding.offset}: {finding.reason}")
    return ExitCode.FINDINGS if log.findings else ExitCode.OK


def _look(directory: Directory) -> _Log:
    """A log that is written, rotated or truncated at this moment is looked at again: what looks
    damaged is believed if it is still there, unchanged."""
    before: _Log | None = None
    for _ in range(LOOK_TRIES):
        try:
            log = _look_once(directory)
        except FileNotFoundError:
            continue
        if not log.findings or (before is not None and before.findings == log.findings):
            return log
        before = log
    return _look_once(directory)


def _look_once(directory: Directory) -> _Log:
    listing = list_log(directory)
    meta, findings = listing.meta, list(listing.findings)
    rows: list[_Segment] = []
    durable_lsn = meta.base_lsn - 1
    for segment in listing.segments:
        until = listing.chain.until(segment)
        look = _Look(directory, segment, until)
        file = directory.open(segment.file_name)
        try:
            rows.append(look.row(file))
            # Another segment follows only when all of this one is durable.
            durable_lsn = look.check_end(file, listing) if until.is_last else rows[-1].last_lsn
        finally:
            file.close()
        findings += look.findings
    return _Log(
        path=directory.path,
        uuid=str(uuid.UUID(bytes=meta.log_uuid)),
        format_version=FORMAT_VERSION,
        features=list(feature_names(meta.features)),
        first_lsn=rows[0].first_lsn if rows else meta.base_lsn,
        last_lsn=rows[-1].last_lsn if rows else meta.base_lsn - 1,
        durable_lsn=durable_lsn,
        records=sum(row.records for row in rows),
        bytes=sum(row.bytes for row in rows),
        segments=tuple(rows),
        findings=tuple(findings),
    )


class _Look:
    """At one segment: by its footer, where it has one, and otherwise frame by frame."""

    def __init__(self, directory: Directory, segment: FoundSegment, until: Until) -> None:
        self._directory = directory
        self._until = until
        self._segment = segment
        self._header = segment.header
        self._position = start_of(segment.header)
        self._last: FrameHeader | None = None
        self._reason = ""
        self._frames = 0
        self._watermark = segment.header.first_lsn - 1
        self.findings: list[Finding] = []

    def row(self, file: File) -> _Segment:
        header, until, mark = self._header, self._until, self._segment.mark
        following = until.following
        state: State = "active" if until.is_last else "unsealed"
        footer = None
        if following is None:
            is_seal = not until.is_last
        else:
            # Or it is of the time before a truncation that is not yet carried out.
            is_seal = mark is not None and joins(place_before(mark), following)
        if is_seal and mark is not None and mark.kind is Kind.SEAL:
            footer = _scan.read_footer(file.pread, mark)
        if mark is not None and footer is not None:
            state = "sealed"
            self._frames = footer.frames
            self._position = Position(mark.end, mark.next_lsn, mark.crc)
        else:
            self._walk(file, following)
            if until.is_last and self._last is not None and self._last.kind is Kind.CLOSE:
                state = "closed"
        next_lsn = self._position.next_lsn
        if following is not None and next_lsn != following.first_lsn:
            lost = next_lsn, following.first_lsn - 1
            reason = f"the records before LSN {following.first_lsn} are missing"
            self._find(self._position.offset, self._reason or reason, lost)
        elif state == "unsealed" and not until.may_be_open:
            self._find(self._position.offset, "the segment's footer or its pointer is damaged")
        return _Segment(
            number=header.number,
            file=self._segment.file_name,
            first_lsn=header.first_lsn,
            last_lsn=next_lsn - 1,
            records=next_lsn - header.first_lsn,
            frames=self._frames,
            bytes=file.size(),
            used=self._position.offset,
            state=state,
            created=to_datetime(max(0, min(header.created_us, TIME_US_MAX))),
        )

    def _walk(self, file: File, following: SegmentHeader | None) -> None:
        """Over all frames, or to where the next segment goes on: what stands after that was
        copied or cut."""
        scanner = FrameScanner(file.pread, self._header, self._position, bodies=False)
        frames = iter(scanner)
        while following is None or not joins(scanner.position, following):
            frame, _ = next(frames, (None, b""))
            if frame is None:
                break
            self._last = frame
            self._frames += frame.kind is Kind.DATA
            self._watermark = max(self._watermark, frame.durable_lsn)
        self._position, self._reason = scanner.position, scanner.reason

    def check_end(self, file: File, listing: Listing) -> int:
        """Whether the log ends here; returns the newest record that is known to be durable."""
        position, pointer, told = self._position, self._segment.pointer, listing.told_lsn
        judged = judge_end(
            self._directory.path,
            file,
            self._segment,
            position,
            reason=self._reason,
            last_kind=self._last.kind if self._last is not None else None,
            told_lsn=told,
        )
        if judged.loss is not None:
            lost = attrs.evolve(judged.loss.finding, first_lsn=position.next_lsn, last_lsn=None)
            self.findings.append(lost)
        if pointer is not None:
            told = max(told, pointer.last_lsn)
        return max(self._watermark, min(told, position.next_lsn - 1))

    def _find(
        self, offset: int, reason: str, lost: tuple[int | None, int | None] = (None, None)
    ) -> None:
        path = f"{self._directory.path}/{self._segment.file_name}"
        self.findings.append(Finding(path, offset, reason, *lost))


def _as_json(log: _Log) -> Any:
    return to_builtins(attrs.asdict(log, filter=TOLD))


def _print(log: _Log) -> None:
    say(log.path)
    features = ", ".join(log.features) or "none"
    say(f"log {log.uuid}, format {log.format_version}, features: {features}")
    summary = count(log.records, "record")
    if log.records:
        summary += f", LSN {log.first_lsn} to {log.last_lsn}"
        summary += _durable(log)
    say(f"{summary}; {count(len(log.segments), 'segment')}, {_size(log.bytes)}")
    if not log.segments:
        return
    numbers = ("segment", "first LSN", "last LSN", "records", "used")
    table = new_table(*numbers, "state", "created (UTC)", numbers=numbers, plain=True)
    for row in log.segments:
        table.add_row(
            f"{row.number}",
            f"{row.first_lsn}",
            f"{row.last_lsn}" if row.records else "-",
            f"{row.records}",
            _size(row.used),
            row.state,
            f"{row.created:%Y-%m-%d %H:%M}",
        )
    show(table)


def _durable(log: _Log) -> str:
    if log.durable_lsn >= log.last_lsn:
        return ", all durable"
    if log.durable_lsn < log.first_lsn:
        return ", none known to be durable yet"
    return f", known to be durable up to {log.durable_lsn}"


def _size(size: int) -> str:
    return f"{size / MiB:,.1f} MiB" if size >= MiB else f"{size / KiB:,.1f} KiB"
