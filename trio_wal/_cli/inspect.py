"""`trio-wal inspect`: which segments a log has, and what is in them."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Literal

import attrs
from msgspec import to_builtins

from trio_wal import _scan
from trio_wal._chain import FoundSegment
from trio_wal._files import Directory
from trio_wal._frame import FORMAT_VERSION, TIME_US_MAX, Kind, to_datetime
from trio_wal._reader import WatchSource
from trio_wal._scan import FrameScanner, start_of
from trio_wal._worker import Blocking

from ._output import (
    Dir,
    ExitCode,
    Json,
    count,
    feature_names,
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
    """The newest record that is known to be durable."""
    bytes: int
    segments: tuple[_Segment, ...]


def inspect(directory: Dir, /, *, json: Json = False) -> int:
    """Show the segments of a log.

    Reads only and takes no lock; the log may be written meanwhile. A segment is sealed
    when another follows it; the last one is closed after an orderly close, and else
    active: it is being written, or its writer was killed.
    """
    with opened(directory) as files:
        log = _look(files)
    if json:
        write_json(to_builtins(attrs.asdict(log)))
    else:
        _print(log)
    return ExitCode.OK


def _look(directory: Directory) -> _Log:
    """A log that is rotated or truncated at this moment is looked at again."""
    while True:
        try:
            return _look_once(directory)
        except FileNotFoundError:
            continue


def _look_once(directory: Directory) -> _Log:
    source = WatchSource(directory, Blocking(threaded=False))
    source.look()
    meta, found = source.meta, source.segments
    rows = [_row(directory, *pair) for pair in zip(found, [*found[1:], None], strict=False)]
    return _Log(
        path=directory.path,
        uuid=str(uuid.UUID(bytes=meta.log_uuid)),
        format_version=FORMAT_VERSION,
        features=feature_names(meta.features),
        first_lsn=source.first_lsn,
        last_lsn=source.durable_lsn,
        bytes=sum(row.bytes for row in rows),
        segments=tuple(rows),
    )


def _row(directory: Directory, segment: FoundSegment, following: FoundSegment | None) -> _Segment:
    header, pointer = segment.header, segment.pointer
    state: State = "active" if following is None else "unsealed"
    frames, used, next_lsn = 0, 0, header.first_lsn
    file = directory.open(segment.file_name)
    try:
        frame = None
        if pointer is not None:
            frame = _scan.frame_at(file.pread, header, pointer.offset)
        footer = None
        if pointer is not None and frame is not None and frame.crc == pointer.crc:
            footer = _scan.read_footer(file.pread, frame)
        if frame is not None and footer is not None:
            frames, used, next_lsn = footer.frames, frame.end, frame.next_lsn
            if (following is None) == (frame.kind is Kind.CLOSE):
                state = "closed" if following is None else "sealed"
        else:
            scanner = FrameScanner(file.pread, header, start_of(header), bodies=False)
            frames = sum(frame.kind is Kind.DATA for frame, _ in scanner)
            used, next_lsn = scanner.position.offset, scanner.position.next_lsn
        if following is not None:
            next_lsn = following.header.first_lsn
        size = file.size()
    finally:
        file.close()
    return _Segment(
        number=header.number,
        file=segment.file_name,
        first_lsn=header.first_lsn,
        last_lsn=next_lsn - 1,
        records=next_lsn - header.first_lsn,
        frames=frames,
        bytes=size,
        used=used,
        state=state,
        created=to_datetime(max(0, min(header.created_us, TIME_US_MAX))),
    )


def _print(log: _Log) -> None:
    features = ", ".join(log.features) or "none"
    say(f"{log.path}: log {log.uuid}, format {log.format_version}, features: {features}")
    records = max(0, log.last_lsn - log.first_lsn + 1)
    where = f", LSN {log.first_lsn} to {log.last_lsn}" if records else ""
    say(
        f"{count(records, 'durable record')}{where}; "
        f"{count(len(log.segments), 'segment')}, {count(log.bytes, 'byte')}"
    )
    numbers = ("segment", "first LSN", "last LSN", "records", "frames", "bytes", "used")
    table = new_table(*numbers, "state", "created (UTC)", numbers=numbers)
    for row in log.segments:
        table.add_row(
            f"{row.number}",
            f"{row.first_lsn}",
            f"{row.last_lsn}" if row.records else "-",
            f"{row.records:,}",
            f"{row.frames:,}",
            f"{row.bytes:,}",
            f"{row.used:,}",
            row.state,
            f"{row.created:%Y-%m-%d %H:%M:%S}",
        )
    show(table)
