"""`trio-wal scan`: keys and values of a database, in order, as JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any, Final

from cyclopts import Parameter

from trio_wal._database_reader import open_database_reader
from trio_wal._util import KiB

from ._output import Database, ExitCode, Json, UsageError, as_bytes, to_json
from .dump import LARGE_BYTES, data_fields, data_slices

WRITE_BYTES: Final = 256 * KiB

Bound = Annotated[str | None, Parameter(show_default=False)]


async def scan(
    database: Database,
    /,
    *,
    prefix: Annotated[Bound, Parameter(help="Only keys that begin with this.")] = None,
    start: Annotated[Bound, Parameter(help="The first key to print.")] = None,
    stop: Annotated[Bound, Parameter(help="The key to stop before.")] = None,
    hex_: Annotated[
        bool,
        Parameter(
            name="--hex",
            negative=(),
            show_default=False,
            help="Keys are given as hexadecimal digits.",
        ),
    ] = False,
    keys: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Keys only, no values.")
    ] = False,
    reverse: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Last key first.")
    ] = False,
    limit: Annotated[int | None, Parameter(help="Print at most this many; default: all.")] = None,
    json: Json = False,  # noqa: ARG001  (there is no other format)
) -> int:
    """Print keys and values in order, one JSON object per line: each as text or base64.

    Everything is from one moment. Takes no lock; another process may have the database open,
    but its file grows during a long scan.

    Example: `trio-wal scan bank.db --prefix acc: --limit 10`
    """
    if limit is not None and limit < 0:
        raise UsageError(f"--limit must be 0 or more, not {limit}")
    if prefix is not None and (start is not None or stop is not None):
        raise UsageError("--prefix and a range (--start, --stop) cannot be combined")
    bounds: dict[str, Any] = {
        name: None if text is None else as_bytes(f"--{name}", text, digits=hex_)
        for name, text in (("prefix", prefix), ("start", start), ("stop", stop))
    }
    ready: list[bytes] = []
    size = 0
    async with (
        open_database_reader(database) as reader,
        reader.stream(**bounds, reverse=reverse, limit=limit) as pairs,
    ):
        async for key, value in pairs:
            for piece in _line(key, None if keys else value):
                ready.append(piece)
                size += len(piece)
                if size >= WRITE_BYTES:
                    size = _write(ready)
    _write(ready)
    return ExitCode.OK


def _write(pieces: list[bytes]) -> int:
    sys.stdout.buffer.write(b"".join(pieces))
    sys.stdout.buffer.flush()
    pieces.clear()
    return 0


def _line(key: bytes, value: bytes | None) -> Iterator[bytes]:
    fields: dict[str, object] = {"key": data_fields(key)}
    if value is None:
        yield to_json(fields) + b"\n"
    elif len(value) <= LARGE_BYTES:
        yield to_json({**fields, "value": data_fields(value)}) + b"\n"
    else:
        yield to_json(fields)[:-1] + b',"value":{'
        yield from data_slices(value)
        yield b"}}\n"
