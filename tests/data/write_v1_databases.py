"""Wrote what is in v1_databases, once, and writes nothing that is there.

A later trio-wal must read it as it is: databases with their stores, a backup that nobody has
opened, an archive, and a log with places of consumers.  All of format version 1, stores of format
1; those were written on a machine of 64 bits, little-endian, with pages of 4 KiB.

    python tests/data/write_v1_databases.py
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import trio

import trio_wal

HERE = Path(__file__).parent / "v1_databases"
TINY = 1
LEFT_OUT = ("lock.mdb",)
"""What is not kept: LMDB's table of readers is of one machine."""


async def commit(db: trio_wal.Database, number: int) -> None:
    """Commits 1 to 12: each counts, puts a key, and from the fourth on deletes an older one."""
    async with db.transaction() as tx:
        tx.put(b"count", b"%d" % number)
        tx.put(b"key %02d" % number, b"value %d" % number * number)
        tx.discard(b"key %02d" % (number - 3))


async def acknowledge(db: trio_wal.Database, name: str, count: int) -> None:
    async with db.consumer(name) as consumer:
        for _ in range(count):
            await consumer.acknowledge(await consumer.__anext__())


async def databases(work: Path) -> None:
    archive = trio_wal.DirectoryArchive(work / "archive")
    async with trio_wal.open_database(work / "closed", segment_size=TINY, archive=archive) as db:
        for number in range(1, 9):
            await commit(db, number)
        await acknowledge(db, "mail", 5)
        await db.checkpoint()
        await db.backup(work / "backup")
        await acknowledge(db, "audit", 2)
        for number in range(9, 13):
            await commit(db, number)
        await db.wal.rotate()
        while db.wal.statistics().archived_lsn != db.wal.last_lsn:  # noqa: ASYNC110
            await trio.sleep(0.01)
        shutil.copytree(work / "closed", work / "killed")


async def consumers(work: Path) -> None:
    async with trio_wal.open_wal(work / "consumers", segment_size=TINY) as wal:
        await wal.append_many([b"record %d" % n for n in range(1, 8)])
        async with wal.consumer("mail") as consumer:
            for _ in range(3):
                await consumer.acknowledge(await consumer.__anext__())
        async with wal.consumer("new"):
            pass


async def main() -> None:
    if HERE.exists():
        sys.exit(f"{HERE} is there, and stays as it is")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        await databases(work)
        await consumers(work)
        shutil.copytree(work, HERE, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in sorted(HERE.rglob("*")):
        if path.is_file():
            print(hashlib.sha256(path.read_bytes()).hexdigest(), path.relative_to(HERE))


if __name__ == "__main__":
    trio.run(main)
