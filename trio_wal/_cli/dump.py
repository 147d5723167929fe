"""`trio-wal dump`: the records of a log as JSON lines.

Law: memory does not grow with a record.  What is larger than `LARGE_BYTES` is written in
slices: a byte of text may take six in JSON, and an encoder that grows its buffer copies it.
"""

from __future__ import annotations

import base64
import codecs
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cyclopts import Parameter

from trio_wal._changes import decode_record, operations_in
from trio_wal._disk.chain import read_meta
from trio_wal._disk.frame import FEATURE_DATABASE
from trio_wal._engine import Record
from trio_wal._exceptions import CorruptLogError, LogDivergedError
from trio_wal._reader import LogReader, open_reader
from trio_wal._replicated import RemoteLog
from trio_wal._stream import RecordStream
from trio_wal._text import plain_json
from trio_wal._util import KiB, MiB

from . import _servers
from ._output import ExitCode, Json, Place, UsageError, complain, log_of, opened

WRITE_BYTES: Final = 256 * KiB
"""Lines are written in pieces of about this size."""
LARGE_BYTES: Final = 1 * MiB
"""Bytes of a record, or a value, from which on it is encoded in slices."""
SLICE_BYTES: Final = 48 * KiB
"""A multiple of 3, so that slices in base64 can stand one after the other."""

_encode: Final = msgspec.json.Encoder().encode


async def dump(
    place: Place,
    /,
    *,
    from_: Annotated[
        int | None, Parameter(name="--from", help="First LSN; default: the oldest record.")
    ] = None,
    to: Annotated[
        int | None, Parameter(help="Last LSN; default: the newest durable record.")
    ] = None,
    follow: Annotated[
        bool,
        Parameter(
            negative=(),
            show_default=False,
            help="Then wait for new records, until Ctrl-C or --to.",
        ),
    ] = False,
    json: Json = False,  # noqa: ARG001  (there is no other format)
) -> int:
    """Print durable records, one JSON object a line: lsn, timestamp, and text or base64.

    A record that is valid UTF-8 is given as "text", any other as "base64"; of a database
    in a directory the "operations" of each transaction. Reads only and takes no lock; the
    log may be written meanwhile. Exits with 1 if it meets damage, after all that is whole
    before it, and if --from is beyond the end.

    Example: `trio-wal dump orders.wal --from 17 | jq .text`
    """
    for name, lsn in (("--from", from_), ("--to", to)):
        if lsn is not None and lsn < 1:
            raise UsageError(f"{name} must be an LSN, 1 or more, not {lsn}")
    if from_ is not None and to is not None and to < from_:
        raise UsageError(f"--to {to} is before --from {from_}")
    try:
        source, is_database = _source(place)
        async with open_reader(source) as reader:
            if from_ is not None and not follow and from_ > reader.durable_lsn + 1:
                return _beyond(reader, from_)
            stop = None if to is None else to + 1
            stream = reader.follow(from_) if follow else reader.read(from_, stop)
            async with stream as records:
                pieces_of = partial(transaction_pieces, reader.path) if is_database else pieces
                await _dump(records, to, pieces_of)
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


async def _dump(
    records: RecordStream, to: int | None, pieces_of: Callable[[Record], Iterable[bytes]]
) -> None:
    async for batch in records.batches(None):
        _dump_batch([record for record in batch if to is None or record.lsn <= to], pieces_of)
        if to is not None and batch[-1].lsn >= to:
            break


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
