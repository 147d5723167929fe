"""What the tests of archives share: archives that fail, and logs that were archived."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, final

import attrs
import trio

import trio_wal
from trio_wal import Archive, DirectoryArchive, Record
from trio_wal.testing import MemoryFiles

LOG = "/log"
ARCHIVE = "/archive"
RESTORED = "/restored"


def archive_in(files: MemoryFiles) -> DirectoryArchive:
    return DirectoryArchive(ARCHIVE, files=files)


@final
class Wayward:
    """An archive that does what a test says before each call."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self.before: Callable[[str, str], object] = lambda method, name: None
        """Called with the method and the name of the object; may raise."""
        self.puts: list[str] = []

    def put(self, name: str, content: Iterable[bytes]) -> None:
        self.before("put", name)
        self._archive.put(name, content)
        if name != "archive.json":
            self.puts.append(name)

    def list(self) -> list[str]:
        self.before("list", "")
        return self._archive.list()

    def get(self, name: str) -> Iterator[bytes]:
        self.before("get", name)
        return self._archive.get(name)


async def records_of(wal: Any) -> list[Record]:
    async with wal.read() as records:
        return [record async for record in records]


async def settle() -> None:
    """Let the tasks of a log in memory do all that they can do now."""
    await trio.testing.wait_all_tasks_blocked()


async def wait_archived(wal: Any) -> None:
    """Seal what there is, and wait until it is archived: a close waits for a while only."""
    lsn = await wal.rotate()
    with trio.fail_after(100):
        while wal.statistics().archived_lsn != lsn:  # noqa: ASYNC110  (threads do it)
            await trio.sleep(0.01)


async def write_batches(wal: Any, count: int, seed: int = 0) -> None:
    """Batches of one to five records, a second apart."""
    rng = random.Random(seed)
    for number in range(count):
        await trio.sleep(1)
        size = rng.choice((1, 1, 1, 2, 5))
        await wal.append_many(
            [b"%d.%d" % (number, i) + bytes(rng.randrange(600)) for i in range(size)]
        )


@attrs.frozen
class Archived:
    """A log, all of whose segments are in an archive, in files in memory."""

    files: MemoryFiles
    archive: DirectoryArchive
    records: list[Record]

    @property
    def last_lsn(self) -> int:
        return len(self.records)

    def at(self, time: datetime) -> int:
        """The last record written at or before a time."""
        return max((r.lsn for r in self.records if r.timestamp <= time), default=0)

    def restore(self, **options: Any) -> Any:
        return trio_wal.restore(self.archive, RESTORED, files=self.files, **options)

    async def check(self, lsn: int, path: str = RESTORED) -> None:
        """What was restored is the log up to there, works, and is another history."""
        async with trio_wal.open_wal(path, files=self.files) as wal:
            assert await records_of(wal) == self.records[:lsn]
            assert wal.last_lsn == lsn
            assert wal.recovery.torn_bytes == 0
            assert wal.epoch > 0
            assert await wal.append(b"another history") == lsn + 1
        self.files.discard_directory(path)


async def archived_log(count: int, *, segment_size: int = 4096, **options: Any) -> Archived:
    files = MemoryFiles()
    archive = archive_in(files)
    async with trio_wal.open_wal(
        LOG, files=files, archive=archive, segment_size=segment_size, **options
    ) as wal:
        await write_batches(wal, count)
        records = await records_of(wal)
        await wal.rotate()
        await settle()
        assert wal.statistics().archived_lsn == wal.last_lsn
    return Archived(files, archive, records)
