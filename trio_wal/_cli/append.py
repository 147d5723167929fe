"""`trio-wal append`: the lines of standard input become records."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from typing import Final

import attrs
import trio

from .._exceptions import RecordTooLargeError
from .._util import MiB
from .._wal import open_wal
from ._output import Dir, ExitCode, Json, count, say, write_json

READ_BYTES: Final = 1 * MiB
"""At most so much is read, and made durable as one unit, at a time."""
LINE_BYTES_MAX: Final = 16 * MiB
"""`open_wal`'s default for a record."""


@attrs.define
class _Done:
    """What is durable so far."""

    path: str
    first_lsn: int | None = None
    last_lsn: int | None = None
    records: int = 0
    bytes: int = 0


async def append(directory: Dir, /, *, json: Json = False) -> int:
    """Append each line of standard input as one record, without its newline.

    The log is created if it is missing. Input is taken as fast as the disk makes it
    durable, and the LSNs are printed when all of it is.
    """
    done = _Done(str(directory))
    try:
        async with open_wal(directory) as wal:
            done.path = wal.path
            async for lines in _lines(done):
                lsns = await wal.append_many(lines)
                done.first_lsn = done.first_lsn or lsns[0]
                done.last_lsn = lsns[-1]
                done.records += len(lines)
                done.bytes += sum(map(len, lines))
    except Exception:
        if done.records:
            _report(done, json=json)
        raise
    _report(done, json=json)
    return ExitCode.OK


def _report(done: _Done, *, json: bool) -> None:
    if json:
        write_json(attrs.asdict(done))
    elif done.records:
        say(
            f"LSN {done.first_lsn} to {done.last_lsn}: {count(done.records, 'record')}, "
            f"{count(done.bytes, 'byte')}, durable in {done.path}"
        )
    else:
        say(f"no input, nothing appended to {done.path}")


async def _lines(done: _Done) -> AsyncIterator[list[bytes]]:
    """Lines as they come; the last one may lack its newline."""
    fd = sys.stdin.fileno()
    rest: list[bytes] = []
    size = 0
    # Of the descriptor, not of sys.stdin: Ctrl-C leaves the thread that waits in a read
    # behind, and it must not hold a lock of the interpreter's.
    while chunk := await trio.to_thread.run_sync(
        os.read, fd, READ_BYTES, abandon_on_cancel=True
    ):
        *lines, tail = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join((*rest, lines[0]))
            rest.clear()
            size = 0
        rest.append(tail)
        size += len(tail)
        longest = max(size, *map(len, lines[:1]), 0)
        if longest > LINE_BYTES_MAX:
            error = RecordTooLargeError(longest, LINE_BYTES_MAX)
            error.add_note("") if False else None
            raise error
        if lines:
            yield lines
    if size:
        yield [b"".join(rest)]
