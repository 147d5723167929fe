"""`trio-wal dump`: the records of a log as JSON lines.

Law: memory does not grow with a record.  What is larger than `LARGE_BYTES` is written in
slices: a byte of text may take six in JSON, and an encoder that grows its buffer copies it.
"""

from __future__ import annotations

import base64
import codecs
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated, Final

import attrs
import msgspec
from cyclopts import Parameter

from trio_wal._caslog import RemoteLog
from trio_wal._changes import decode_record, operations_in
from trio_wal._disk.chain import read_meta
from trio_wal._disk.frame import FEATURE_DATABASE
from trio_wal._engine import Record
from trio_wal._exceptions import CorruptLogError, LogDivergedError
from trio_wal._identity import Bookmark
from trio_wal._reader import LogReader, open_reader
from trio_wal._stream import RecordStream
from trio_wal._text import plain_json
from trio_wal._util import KiB, MiB

from . import _servers
from ._output import CommandError, ExitCode, Json, Place, UsageError, complain, log_of, opened

WRITE_BYTES: Final = 256 * KiB
"""Lines are written in pieces of about this size."""
LARGE_BYTES: Final = 1 * MiB
"""Bytes of a record, or a value, from which on it is encoded in slices."""
SLICE_BYTES: Final = 48 * KiB
"""A multiple of 3, so that slices in base64 can stand one after the other."""

STATE_SECONDS: Final = 0.2
"""Between two times that a state is kept."""

_encode: Final = msgspec.json.Encoder().encode


async def dump(
    place: Place,
    /,
    *,
    from_: Annotated[
        str | None,
        Parameter(
            name="--from", help="The first LSN, or a time with its zone; default: the oldest."
        ),
    ] = None,
    to: Annotated[
        str | None,
        Parameter(
            help="The last LSN, or a time with its zone; default: the newest durable record."
        ),
    ] = None,
    follow: Annotated[
        bool,
        Parameter(
            negative=(),
            show_default=False,
            help="Then wait for new records, until Ctrl-C or --to.",
        ),
    ] = False,
    state: Annotated[
        Path | None,
        Parameter(
            show_default=False,
            help="A file that keeps how far this has come; the next dump with it continues there.",
        ),
    ] = None,
    json: Json = False,  # noqa: ARG001  (there is no other format)
) -> int:
    """Print durable records, one JSON object per line: lsn, timestamp, and text or base64.

    A record that is valid UTF-8 is printed as "text", any other as "base64". A database in a
    directory gives the "operations" of each transaction instead. Reads only and takes no lock;
    the log may be written meanwhile. Exits with 1 if it meets damage, after printing everything
    whole before it, and if --from is beyond the end. With --state, no line is ever missed, but
    one may be printed twice if the dump was killed; --from says where the first dump begins.

    Example: `trio-wal dump orders.wal --from 2026-11-29T12:00Z | jq .text`
    """
    bounds = _bounds(from_, to)
    keeper = None if state is None else _State(state)
    try:
        source, is_database = _source(place)
        async with open_reader(source) as reader:
            start = (keeper and keeper.bookmark) or bounds.first_lsn
            if isinstance(start, int) and not follow and start > reader.durable_lsn + 1:
                return _beyond(reader, start)
            stop = None if bounds.last_lsn is None else bounds.last_lsn + 1
            stream = reader.follow(start) if follow else reader.read(start, stop)
            async with stream as records:
                pieces_of = partial(transaction_pieces, reader.path) if is_database else pieces
                await _dump(records, bounds, pieces_of, keeper)
    except (CorruptLogError, LogDivergedError) as exc:
        complain(str(exc))
        return ExitCode.FINDINGS
    return ExitCode.OK


def _source(place: str) -> tuple[Path | RemoteLog, bool]:
    """What `open_reader` takes, and whether its records are a database's."""
    if _servers.is_url(place):
        # Servers know of records, and not of what is in them.
        return _servers.parse(place), False
    path = Path(place)
    with opened(path) as files:
        meta = read_meta(files)
    return log_of(path), meta is not None and bool(meta.features & FEATURE_DATABASE)


def _beyond(reader: LogReader, lsn: int) -> int:
    last = reader.durable_lsn
    complain(
        f"{reader.path}: --from {lsn} is beyond the end: the newest durable record is LSN {last}"
    )
    return ExitCode.FINDINGS


@attrs.frozen
class _Bounds:
    """What is wanted."""

    first_lsn: int | None = None
    last_lsn: int | None = None
    first_time: datetime | None = None
    last_time: datetime | None = None

    def wants(self, record: Record) -> bool:
        return not (
            self.ends_before(record)
            or (self.first_time is not None and record.timestamp < self.first_time)
        )

    def ends_before(self, record: Record) -> bool:
        """Whether it is behind the end.  Times never decrease along a log."""
        return (self.last_lsn is not None and record.lsn > self.last_lsn) or (
            self.last_time is not None and record.timestamp > self.last_time
        )

    def ends_with(self, record: Record) -> bool:
        return self.ends_before(record) or record.lsn == self.last_lsn


def _bounds(from_: str | None, to: str | None) -> _Bounds:
    """Raises `UsageError`."""
    first, last = _bound("--from", from_), _bound("--to", to)
    if first is not None and last is not None and type(first) is type(last) and last < first:  # type: ignore[operator]
        raise UsageError(f"--to {to} is before --from {from_}")
    return _Bounds(
        first if isinstance(first, int) else None,
        last if isinstance(last, int) else None,
        first if isinstance(first, datetime) else None,
        last if isinstance(last, datetime) else None,
    )


def _bound(name: str, text: str | None) -> int | datetime | None:
    if text is None:
        return None
    if re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        if int(text) < 1:
            raise UsageError(f"{name} must be an LSN, 1 or more, not {text}")
        return int(text)
    try:
        time = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    except ValueError as exc:
        raise UsageError(
            f"{name} must be an LSN or a time such as 2026-11-29T12:00:00Z, not {text!r}"
        ) from exc
    if time.tzinfo is None:
        raise UsageError(f"{name} must say its zone, as 2026-11-29T12:00:00Z does, not {text!r}")
    return time


class _State:
    """How far a dump has come, in a file of its own; replaced, never changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved = 0.0
        self.bookmark: Bookmark | None = None
        try:
            text = path.read_text("ascii").strip()
        except FileNotFoundError:
            return
        except UnicodeDecodeError:
            text = ""
        try:
            self.bookmark = Bookmark.parse(text)
        except ValueError as exc:
            raise CommandError(
                f"{path}: this is no state of a dump; name another file, or remove it"
            ) from exc

    def reached(self, bookmark: Bookmark) -> None:
        """All up to there was written out; now and then it is kept."""
        self.bookmark = bookmark
        if monotonic() - self._saved >= STATE_SECONDS:
            self.save()

    def save(self) -> None:
        if self.bookmark is None:
            return
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        with temporary.open("w", encoding="ascii") as file:
            file.write(f"{self.bookmark}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._saved = monotonic()


async def _dump(
    records: RecordStream,
    bounds: _Bounds,
    pieces_of: Callable[[Record], Iterable[bytes]],
    state: _State | None,
) -> None:
    try:
        async for batch in records.batches(None):
            _dump_batch(list(filter(bounds.wants, batch)), pieces_of)
            passed = [record for record in batch if not bounds.ends_before(record)]
            if state is not None and passed:
                state.reached(Bookmark(passed[-1].lsn, records.bookmark.epoch))
            if bounds.ends_with(batch[-1]):
                break
    finally:
        if state is not None:
            state.save()


def _dump_batch(batch: Sequence[Record], pieces_of: Callable[[Record], Iterable[bytes]]) -> None:
    """Nothing of it is held back: the stream may have to wait for what comes next."""
    ready: list[bytes] = []
    size = 0
    try:
        for record in batch:
            for piece in pieces_of(record):
                ready.append(piece)
                size += len(piece)
                if size >= WRITE_BYTES:
                    _write(ready)
                    size = 0
    except Exception:
        # What is whole is given first.
        _write(ready)
        raise
    _write(ready)


def _write(pieces: list[bytes]) -> None:
    """Write the pieces out, and forget them."""
    sys.stdout.buffer.write(b"".join(pieces))
    pieces.clear()
    sys.stdout.buffer.flush()


def pieces(record: Record) -> Iterator[bytes]:
    """The line of a record."""
    fields: dict[str, object] = {"lsn": record.lsn, "timestamp": record.timestamp}
    if len(record.data) <= LARGE_BYTES:
        yield plain_json(_encode(fields | data_fields(record.data))) + b"\n"
        return
    yield _encode(fields)[:-1] + b","
    yield from data_slices(record.data)
    yield b"}\n"


def data_fields(data: bytes) -> dict[str, object]:
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": data}


def data_slices(data: bytes) -> Iterator[bytes]:
    """What JSON has for `_data`, without the braces."""
    slices = [memoryview(data)[at : at + SLICE_BYTES] for at in range(0, len(data), SLICE_BYTES)]
    if _is_text(slices):
        decode = codecs.getincrementaldecoder("utf-8")().decode
        yield b'"text":"'
        for piece in slices:
            yield plain_json(_encode(decode(bytes(piece)))[1:-1])
    else:
        yield b'"base64":"'
        yield from map(base64.b64encode, slices)
    yield b'"'


def _is_text(slices: list[memoryview]) -> bool:
    decode = codecs.getincrementaldecoder("utf-8")().decode
    try:
        for piece in slices:
            decode(bytes(piece))
        decode(b"", True)
    except UnicodeDecodeError:
        return False
    return True


def transaction_pieces(path: str, record: Record) -> Iterator[bytes]:
    """The line of a record of a database's log: what it did to each key; null is a deletion."""
    fields: dict[str, object] = {"lsn": record.lsn, "timestamp": record.timestamp}
    if len(record.data) <= LARGE_BYTES:
        operations = [
            {"key": data_fields(key), "value": None if value is None else data_fields(value)}
            for key, value in decode_record(path, record.lsn, record.data).items()
        ]
        yield plain_json(_encode({**fields, "operations": operations})) + b"\n"
        return
    # All of it is looked at before a part is given: half a line would be none.
    for _ in operations_in(path, record.lsn, record.data):
        pass
    yield _encode(fields)[:-1] + b',"operations":['
    comma = b""
    for key, value in operations_in(path, record.lsn, record.data):
        yield comma + b'{"key":' + plain_json(_encode(data_fields(key))) + b',"value":'
        if value is None:
            yield b"null}"
        elif len(value) <= LARGE_BYTES:
            yield plain_json(_encode(data_fields(value))) + b"}"
        else:
            yield b"{"
            yield from data_slices(value)
            yield b"}}"
        comma = b","
    yield b"]}\n"
