"""Writes the logs of ``v1_epochs``: run once, when logs got epochs, and never again.

What is there stays as it is: these are logs of users.  Of format version 1, as those in ``v1``
beside them, with a history in ``log.meta``.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import trio
from trio.testing import MockClock
from write_v1 import LOG, Writer

from trio_wal._disk.chain import read_meta
from trio_wal._disk.repair import create_empty
from trio_wal.testing import MemoryFiles

HERE = Path(__file__).parent / "v1_epochs"


def parted(clock: MockClock) -> MemoryFiles:
    """Its end was cut twice, and it went on each time; closed in order."""
    writer = Writer(11, clock)
    for n in range(1, 7):
        writer.append(b"first %d" % n)
    writer.log.truncate_after(4)
    for n in range(5, 9):
        writer.append(b"second %d" % n)
    writer.log.truncate_after(2)
    writer.append(b"third 3", b"third 4")
    writer.log.close()
    return writer.files


def deciding(clock: MockClock) -> MemoryFiles:
    """The process was killed when it had decided to drop its records above 2."""
    writer = Writer(12, clock)
    for n in range(1, 6):
        writer.append(b"record %d" % n)
    images: list[MemoryFiles] = []

    def look(operation: str, path: str) -> None:
        meta = read_meta(writer.files.open_directory(LOG))
        if meta is not None and meta.truncation is not None:
            images.append(writer.files.crash_image(kind="kill"))

    writer.files.after_operation = look
    writer.log.truncate_after(2)
    # The rename of log.meta is the decision; the second moment is its sync.
    return images[1]


def copied(clock: MockClock) -> MemoryFiles:
    """The log of a backup that was never opened; it goes on after LSN 7."""
    writer = Writer(13, clock)
    for n in range(1, 10):
        writer.append(b"record %d" % n)
    writer.log.truncate_after(7)
    files = MemoryFiles(seed=14)
    create_empty(
        files,
        LOG,
        log_uuid=writer.log.log_uuid,
        first_lsn=8,
        features=0,
        history=writer.log.history,
    )
    writer.log.close(orderly=False)
    return files


LOGS: list[Callable[[MockClock], MemoryFiles]] = [parted, deciding, copied]


async def main(clock: MockClock) -> None:
    for make in LOGS:
        folder = HERE / make.__name__
        if folder.exists():
            sys.exit(f"{folder} is there, and stays as it is")
        contents = make(clock).contents(LOG)
        folder.mkdir(parents=True)
        for name, data in contents.items():
            (folder / name).write_bytes(data)
    for path in sorted(HERE.rglob("*")):
        if path.is_file():
            print(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(HERE))


if __name__ == "__main__":
    the_clock = MockClock()
    trio.run(main, the_clock, clock=the_clock)
