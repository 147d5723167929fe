"""Wrote the logs in v1, once.  It is kept to tell how, and writes nothing that is there.

A later trio-wal must read them as they are.  A new version of the format gets a folder and
a script of its own; these files are never written again.

    python tests/data/write_v1.py
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import trio
from trio.testing import MockClock

from trio_wal._disk.chain import read_meta
from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.opening import open_log_directory
from trio_wal.testing import MemoryFiles

HERE = Path(__file__).parent / "v1"
LOG = "/log"


class Writer:
    """A log in files in memory, and a clock that moves by hand."""

    def __init__(self, seed: int, clock: MockClock, compression: str | None = None) -> None:
        self.files = MemoryFiles(seed=seed, epoch_us=1_700_000_000_000_000)
        self._clock = clock
        self._compression = compression
        self.log = self._open()

    def _open(self) -> LogDirectory:
        return open_log_directory(self.files, LOG, segment_size=1, compression=self._compression)

    def reopen(self) -> None:
        self.log.close()
        self.log = self._open()

    def append(self, *records: bytes) -> None:
        self._clock.jump(0.25)
        self.log.write(records, self.log.synced_lsn, sync=True)


def closed(clock: MockClock) -> MemoryFiles:
    """Several segments and sessions, closed in order."""
    writer = Writer(1, clock)
    writer.append(b"first record")
    writer.append(b"", b"\x00\xff", "grüße".encode(), b"")
    writer.append(b"x" * 1000)
    writer.reopen()
    writer.append(b"second session")
    writer.append(b"TWF\x01 is how a frame begins", b"trio-wal is how a segment begins")
    writer.append(b"last record")
    writer.log.close()
    return writer.files


def crashed(clock: MockClock) -> MemoryFiles:
    """The process was killed in the middle of a write."""
    writer = Writer(2, clock)
    for n in range(1, 6):
        writer.append(b"record %d" % n)
    writer.append(b"two records", b"of one batch")
    writer.append(b"acknowledged by its own sync, and by no later frame")
    writer.files.fail("pwrite", written=100)
    with contextlib.suppress(OSError):
        writer.append(b"torn" * 100)
    writer.log.close(orderly=False)
    return writer.files


def zstd(clock: MockClock) -> MemoryFiles:
    """Compressed, where that makes a frame smaller."""
    writer = Writer(3, clock, compression="zstd")
    writer.append(b"compressible " * 200)
    writer.append(b"short")
    writer.append(*(b'{"order": %d, "colour": "blue"}' % n for n in range(50)))
    writer.append(bytes(4000))
    writer.log.close()
    return writer.files


def dropped(clock: MockClock) -> MemoryFiles:
    """Its first segments are gone."""
    writer = Writer(4, clock)
    for n in range(1, 8):
        writer.append(b"record %d" % n)
    writer.log.drop_before(6)
    writer.log.close()
    return writer.files


def cut(clock: MockClock) -> MemoryFiles:
    """The process was killed when it had decided to drop its records above 4."""
    writer = Writer(5, clock)
    writer.append(b"record 1", b"record 2", b"record 3")
    writer.append(b"record 4", b"record 5")
    writer.append(b"record 6")
    writer.append(b"record 7")
    images: list[MemoryFiles] = []

    def look(operation: str, path: str) -> None:
        meta = read_meta(writer.files.open_directory(LOG))
        if meta is not None and meta.truncation is not None:
            images.append(writer.files.crash_image(kind="kill"))

    writer.files.after_operation = look
    writer.log.truncate_after(4)
    # The rename of log.meta is the decision; the second moment is its sync.
    return images[1]


LOGS: list[Callable[[MockClock], MemoryFiles]] = [closed, crashed, zstd, dropped, cut]


def digests() -> Iterator[str]:
    for path in sorted(HERE.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield f"{digest}  {path.relative_to(HERE).as_posix()}"


async def main(clock: MockClock) -> None:
    for make in LOGS:
        folder = HERE / make.__name__
        if folder.exists():
            sys.exit(f"{folder} is there, and stays as it is")
        contents = make(clock).contents(LOG)
        folder.mkdir(parents=True)
        for name, data in contents.items():
            (folder / name).write_bytes(data)
    print(*digests(), sep="\n")


if __name__ == "__main__":
    the_clock = MockClock()
    trio.run(main, the_clock, clock=the_clock)
