"""What the tests of the command line share: processes, and logs on real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import trio

import trio_wal
from trio_wal._cli import run

PROGRAM = [sys.executable, "-m", "trio_wal"]


def make_log(path: Path, *batches: Iterable[bytes], **options: Any) -> Path:
    """A log, closed in order, with these batches."""

    async def main() -> None:
        async with trio_wal.open_wal(path, **options) as wal:
            for batch in batches:
                await wal.append_many(batch)

    trio.run(main)
    return path


def lines_of(path: Path) -> list[bytes]:
    """Every record of a log."""

    async def main() -> list[bytes]:
        async with trio_wal.open_reader(path) as reader, reader.read() as records:
            return [record.data async for record in records]

    return trio.run(main)


def segment_files(path: Path) -> list[Path]:
    return sorted(path.glob("wal-*.log"))


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def everything(path: Path) -> dict[str, tuple[bytes, int, int]]:
    """Content, mode and time of change of every file of a directory."""
    files = [path, *sorted(path.rglob("*"))]
    return {
        str(file): (
            file.read_bytes() if file.is_file() else b"",
            file.stat().st_mode,
            file.stat().st_mtime_ns,
        )
        for file in files
    }


class CommandLine:
    """Runs commands in this process and keeps what they say."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self.out = ""
        self.err = ""

    def __call__(self, *arguments: object) -> int:
        self._read()
        code = run([str(argument) for argument in arguments])
        said = self._read()
        self.out, self.err = said.out.decode(), said.err.decode()
        return code

    def json(self, *arguments: object) -> Any:
        """The one JSON document of a command that succeeds."""
        assert self(*arguments, "--json") == 0, self.err
        assert self.err == ""
        return json.loads(self.out)


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """A command in a process (and a group of processes) of its own."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, **options.pop("env", {})}
    # Output that is not buffered would hide what happens to a buffer at the end.
    environment.pop("PYTHONUNBUFFERED", None)
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.Popen(
        command, start_new_session=True, env=environment, **{**pipes, **options}
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def read_terminal(fd: int, until: bytes) -> bytes:
    """What a terminal shows up to some text, or to its end."""
    shown = b""
    while until not in shown:
        try:
            chunk = os.read(fd, 4096)
        except OSError:
            # Linux: nobody has the other side open any more.
            break
        if not chunk:
            break
        shown += chunk
    return shown
