"""`trio-wal append`: the lines of standard input become records."""

from __future__ import annotations

import os
import sys
from typing import Final

import attrs
import trio

from trio_wal._util import MiB
from trio_wal._wal import open_wal

from ._output import CommandError, Dir, ExitCode, Json, count, say, write_json

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
            source = _Input()
            while lines := await source.lines():
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


class _Input:
    """Standard input, line by line."""

    def __init__(self) -> None:
        # The descriptor, not sys.stdin: Ctrl-C leaves the thread that waits in a read
        # behind, and it must not hold a lock that the interpreter wants at its end.
        self._fd = sys.stdin.fileno()
        self._rest: list[bytes] = []
        self._size = 0
        self._lines_taken = 0

    async def lines(self) -> list[bytes]:
        """The lines that have come, without their newlines; none at the end."""
        while chunk := await trio.to_thread.run_sync(
            os.read, self._fd, READ_BYTES, abandon_on_cancel=True
        ):
            *lines, rest = chunk.split(b"\n")
            if not lines:
                self._keep(rest)
                continue
            self._keep(lines[0])
            lines[0] = self._take()
            self._keep(rest)
            self._lines_taken += len(lines)
            return lines
        # The last line may lack its newline.
        return [self._take()] if self._size else []

    def _keep(self, piece: bytes) -> None:
        self._rest.append(piece)
        self._size += len(piece)
        if self._size > LINE_BYTES_MAX:
            raise CommandError(
                f"line {self._lines_taken + 1} of the input is over {LINE_BYTES_MAX:,} bytes, "
                "the limit of a record; it was not appended"
            )

    def _take(self) -> bytes:
        line = b"".join(self._rest)
        self._rest.clear()
        self._size = 0
        return line
