"""Wrote the logs in v1_reused, once, when dropped segments were first used again with their bytes.

What is there stays as it is: these are logs of users.  Of format version 1, as those in ``v1``
beside them; the last segment of each has the feature "reused".

    PYTHONPATH=tests python tests/data/write_v1_reused.py
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import trio
from logs import reuse_dropped, reusing
from trio.testing import MockClock
from write_v1 import LOG, Writer

from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.opening import open_log_directory
from trio_wal.testing import MemoryFiles

HERE = Path(__file__).parent / "v1_reused"
BATCHES = 30


class RoomyWriter(Writer):
    """Its segments have room for nine frames, so that old bytes are left."""

    def _open(self) -> LogDirectory:
        return open_log_directory(self.files, LOG, segment_size=10_000)


def _write(writer: Writer) -> None:
    with reusing():
        for n in range(1, BATCHES):
            writer.append(b"record %d" % n)
            reuse_dropped(writer.log)
        if not writer.log.active.header.reused:
            sys.exit("its last segment is none that was dropped")
        writer.append(b"the last record")


def closed(clock: MockClock) -> MemoryFiles:
    """Closed in order."""
    writer = RoomyWriter(21, clock)
    _write(writer)
    with reusing():
        writer.log.close()
    return writer.files


def killed(clock: MockClock) -> MemoryFiles:
    """The process was killed when all had been written."""
    writer = RoomyWriter(22, clock)
    _write(writer)
    writer.log.close(orderly=False)
    return writer.files


LOGS: list[Callable[[MockClock], MemoryFiles]] = [closed, killed]


async def main(clock: MockClock) -> None:
    for make in LOGS:
        folder = HERE / make.__name__
        if folder.exists():
            sys.exit(f"{folder} is there, and stays as it is")
        contents = make(clock).contents(LOG)
        folder.mkdir(parents=True)
        for name, data in contents.items():
            if name == "log.meta" or name.startswith("wal-"):
                (folder / name).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            print(digest, make.__name__, name)


if __name__ == "__main__":
    the_clock = MockClock()
    trio.run(main, the_clock, clock=the_clock)
