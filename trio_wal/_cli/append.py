"""`trio-wal append`: the lines of standard input become records."""

from __future__ import annotations

import os
import select
import stat
import sys
from time import monotonic
from typing import Annotated, Final, TextIO, cast

import attrs
import trio
from cyclopts import Parameter

from trio_wal._util import MiB
from trio_wal._wal import WriteAheadLog, open_wal

from ._output import CommandError, ExitCode, Json, LogDir, complain, count, say, write_json

READ_BYTES: Final = 1 * MiB
"""At most so much is read, and made durable as one unit, at a time."""
LINE_BYTES_MAX: Final = 16 * MiB
"""`open_wal`'s default for a record."""
PROGRESS_SECONDS: Final = 1.0


@attrs.define
class _Done:
    """What has become durable since the last report, or at all."""

    path: str
    first_lsn: int | None = None
    last_lsn: int | None = None
    records: int = 0
    bytes: int = 0

    def add(self, lsns: range, size: int) -> None:
        self.first_lsn = self.first_lsn or lsns[0]
        self.last_lsn = lsns[-1]
        self.records += len(lsns)
        self.bytes += size

    def __str__(self) -> str:
        return (
            f"LSN {self.first_lsn} to {self.last_lsn}: {count(self.records, 'record')}, "
            f"{count(self.bytes, 'byte')}, durable in {self.path}"
        )


async def append(
    directory: LogDir,
    /,
    *,
    progress: Annotated[
        bool,
        Parameter(
            negative=(),
            show_default=False,
            help="Say on standard error, once per second, how much is durable.",
        ),
    ] = False,
    json: Json = False,
) -> int:
    """Append each line of standard input as one record, without its newline.

    The log is created if it is missing. Input is read as fast as the disk makes it
    durable. The LSNs are printed once all of it is durable, and also whenever a pipe or a
    terminal has no more input for now: one line for everything since the last one.

    Example: `printf 'one\\ntwo\\n' | trio-wal append orders.wal`
    """
    source = _Input()
    reporter = _Reporter(_Done(str(directory)), json=json, progress=progress)
    try:
        async with open_wal(directory) as wal:
            await _append(wal, source, reporter)
    except Exception:
        if reporter.unsaid.records:
            reporter.report()
        raise
    if reporter.unsaid.records or not reporter.total.records:
        reporter.report()
    return ExitCode.OK


async def _append(wal: WriteAheadLog, source: _Input, reporter: _Reporter) -> None:
    reporter.unsaid.path = reporter.total.path = wal.path
    while lines := await source.lines():
        reporter.add(await wal.append_many(lines), sum(map(len, lines)))
        if source.is_idle():
            reporter.report()


class _Reporter:
    """Says what is durable: every record once."""

    def __init__(self, done: _Done, *, json: bool, progress: bool) -> None:
        self.total = done
        self.unsaid = attrs.evolve(done)
        self._json = json
        self._progress = progress
        self._next = monotonic() + PROGRESS_SECONDS

    def add(self, lsns: range, size: int) -> None:
        self.unsaid.add(lsns, size)
        self.total.add(lsns, size)
        if self._progress and monotonic() >= self._next:
            self._next = monotonic() + PROGRESS_SECONDS
            complain(f"{self.total} so far")

    def report(self) -> None:
        done = self.unsaid
        self.unsaid = _Done(done.path)
        try:
            if self._json:
                write_json(attrs.asdict(done))
            elif done.records:
                say(str(done))
            else:
                say(f"no input, nothing appended to {done.path}")
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as exc:
            # Whoever only sees the exit code would append them again.
            raise CommandError(f"standard output: {exc}; {done}") from exc


class _Input:
    """Standard input, line by line."""

    def __init__(self) -> None:
        stdin = cast("TextIO | None", sys.stdin)
        if stdin is None:
            raise CommandError("standard input is closed: there is nothing to append")
        # The descriptor, not sys.stdin: Ctrl-C leaves the thread that waits in a read
        # behind, and it must not hold a lock that the interpreter wants at its end.
        self._fd = stdin.fileno()
        # select() takes nothing but sockets there.
        self._may_be_idle = sys.platform != "win32" and not stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._rest: list[bytes] = []
        self._size = 0
        self._lines_taken = 0

    def is_idle(self) -> bool:
        """Whether there is neither more input now nor its end."""
        return self._may_be_idle and not select.select([self._fd], [], [], 0)[0]

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
