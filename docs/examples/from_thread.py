"""A log used from sync code: a function in a thread of trio's appends by `trio.from_thread`.

``python docs/examples/from_thread.py [DIRECTORY]``: three threads write, each waits for its
records to be durable.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

import trio_wal


def import_file(wal: trio_wal.WriteAheadLog, lines: list[bytes]) -> int:
    """Sync code, in a worker thread: it blocks until its records are durable."""
    lsn = 0
    for line in lines:
        lsn = trio.from_thread.run(wal.append, line)
    return lsn


async def main(directory: Path) -> int:
    async with trio_wal.open_wal(directory / "imports.wal") as wal:
        async with trio.open_nursery() as nursery:
            for name in (b"a", b"b", b"c"):
                lines = [b"%s %d" % (name, number) for number in range(10)]
                nursery.start_soon(trio.to_thread.run_sync, partial(import_file, wal, lines))
        return wal.durable_lsn


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(trio.run(main, Path(sys.argv[1])), "records are durable")
    else:
        with tempfile.TemporaryDirectory() as directory:
            print(trio.run(main, Path(directory)), "records are durable")
