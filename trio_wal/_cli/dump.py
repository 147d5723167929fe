"""`trio-wal dump`: the records of a log as JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Final

import msgspec
from cyclopts import Parameter

from trio_wal._chain import read_meta
from trio_wal._cursor import Record
from trio_wal._database import decode_record
from trio_wal._frame import FEATURE_DATABASE
from trio_wal._reader import open_reader
from trio_wal._stream import RecordStream
from trio_wal._util import KiB

from ._output import Dir, ExitCode, Json, UsageError, log_of, opened

WRITE_BYTES: Final = 256 * KiB
"""Lines are written in pieces of about this size."""

_encode: Final = msgspec.json.Encoder().encode


async def dump(
    directory: Dir,
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

    A record that is valid UTF-8 is given as "text", any other as "base64". Reads only and
    takes no lock; the log may be written meanwhile.
    """
    for name, lsn in (("--from", from_), ("--to", to)):
        if lsn is not None and lsn < 1:
            raise UsageError(f"{name} must be an LSN, 1 or more, not {lsn}")
    if from_ is not None and to is not None and to < from_:
        raise UsageError(f"--to {to} is before --from {from_}")
    with opened(directory) as files:
        meta = read_meta(files)
    is_database = meta is not None and bool(meta.features & FEATURE_DATABASE)
    async with open_reader(log_of(directory)) as reader:
        stop = None if to is None else to + 1
        stream = reader.follow(from_) if follow else reader.read(from_, stop)
        async with stream as records:
            line_of = partial(_transaction, reader.path) if is_database else _line
            await _dump(records, to, line_of)
    return ExitCode.OK


async def _dump(records: RecordStream, to: int | None, line_of: Callable[[Record], bytes]) -> None:
    lines: list[bytes] = []
    size = 0
    async for record in records:
        if to is not None and record.lsn > to:
            break
        line = line_of(record)
        lines.append(line)
        size += len(line)
        # Nothing is held back while the stream reads on: it may have to wait, or to fail.
        if size >= WRITE_BYTES or not records._ready:
            _write(lines)
            size = 0
        if record.lsn == to:
            break
    _write(lines)


def _write(lines: list[bytes]) -> None:
    """Write the lines out, and forget them."""
    sys.stdout.buffer.write(b"\n".join((*lines, b"")))
    lines.clear()
    sys.stdout.buffer.flush()


def _line(record: Record) -> bytes:
    fields: dict[str, object] = {"lsn": record.lsn, "timestamp": record.timestamp}
    return _encode(fields | _data(record.data))


def _data(data: bytes) -> dict[str, object]:
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"base64": data}


def _transaction(path: str, record: Record) -> bytes:
    """A record of a database's log: what it did to each key; null is a deletion."""
    operations = [
        {"key": _data(key), "value": None if value is None else _data(value)}
        for key, value in decode_record(path, record.lsn, record.data).items()
    ]
    fields: dict[str, object] = {"lsn": record.lsn, "timestamp": record.timestamp}
    return _encode({**fields, "operations": operations})
