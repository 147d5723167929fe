"""A user's program. It is type-checked, not run: no checker may find anything in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
from typing_extensions import assert_type

import trio_wal
import trio_wal.asyncio
from trio_wal import Commit, Database, Snapshot, Table, Transaction
from trio_wal.testing import MemoryFiles


async def add(tx: Transaction, key: bytes, amount: int) -> int:
    total = int(tx.get(key, b"0")) + amount
    tx.put(key, b"%d" % total)
    return total


def move(tx: Transaction, source: bytes, dest: bytes) -> bytes | None:
    value = tx.get(source)
    if value is not None:
        tx.delete(source)
        tx.put(dest, value)
    return value


def clear(tx: Transaction) -> None:
    for key, _ in tx.scan(prefix=b"temporary:", limit=10):
        tx.delete(key)


class Counter:
    async def increase(self, tx: Transaction, by: int = 1) -> bool:
        return bool(await add(tx, b"counter", by))


async def transactions(db: Database) -> None:
    n = await db.run(add, b"hits", 1)
    assert_type(n, int)
    assert_type(await db.run(add, b"hits", 1, retries=3), int)
    moved = await db.run(move, b"one", b"two")
    assert_type(moved, "bytes | None")
    await db.run(clear)
    assert_type(await db.run(Counter().increase, 2), bool)
    assert_type(await db.run(lambda tx: tx.get(b"key", 0)), "bytes | int")
    async with db.transaction() as tx:
        assert_type(tx, Transaction)
        tx.insert(b"key", b"value")
        assert_type(b"key" in tx, bool)
        assert_type(tx.scan(b"a", b"b", reverse=True), Iterator[tuple[bytes, bytes]])
    assert_type(tx.lsn, "int | None")


async def reading(db: Database) -> None:
    assert_type(db.get(b"key"), "bytes | None")
    assert_type(db.get(b"key", b""), bytes)
    assert_type(await db.put(b"key", b"value"), int)
    with db.snapshot() as snap:
        assert_type(snap, Snapshot)
        assert_type(snap.get(b"key", 0), "bytes | int")
        assert_type(dict(snap.scan()), dict[bytes, bytes])
    async with db.changes(snap.bookmark) as commits:
        async for commit in commits:
            assert_type(commit, Commit)
            break


def durability(careful: bool) -> trio_wal.Durability:
    return "sync" if careful else "interval"


def files(real: bool) -> trio_wal.Files | None:
    return None if real else MemoryFiles()


async def opening(directory: Path) -> None:
    async with trio_wal.open_database(
        directory,
        checkpoint_bytes=1 << 20,
        max_queue_size=math.inf,
        durability=durability(True),
        compression="zstd",
        verify_store="none",
        retention=trio_wal.KeepSegments(2) | trio_wal.KeepFor(60),
        files=files(True),
    ) as db:
        assert_type(db, Database)
        assert_type(db.wal, trio_wal.WriteAheadLog)
        await transactions(db)
        await reading(db)


class Job(msgspec.Struct):
    kind: str


JOBS = Table("jobs", key=tuple[int, str], value=Job)
COUNTS = Table("counts", key=str, value=dict[str, int])


async def beside(path: str) -> None:
    async with trio_wal.open_database_reader(path) as reader:
        assert_type(reader, trio_wal.DatabaseReader)
        assert_type(reader.get(b"a", 0), "bytes | int")
        assert_type(JOBS.get(reader, (1, "a")), "Job | None")
        await reader.wait_for(reader.bookmark)


def tables(db: Database, tx: Transaction, snap: Snapshot) -> None:
    assert_type(JOBS, "Table[tuple[int, str], Job]")
    JOBS.put(tx, (7, "mail"), Job("x"))
    COUNTS.insert(tx, "a", {"b": 1})
    for source in (db, tx, snap):
        assert_type(JOBS.get(source, (7, "mail")), "Job | None")
        assert_type(COUNTS.get(source, "a", 0), "dict[str, int] | int")
        for key, job in JOBS.scan(source, prefix=(7,), limit=3):
            assert_type(key, "tuple[int, str]")
            assert_type(job, Job)
    assert_type(COUNTS.pop(tx, "a"), "dict[str, int]")
    assert_type(COUNTS.pop(tx, "a", None), "dict[str, int] | None")
    assert_type(JOBS.discard(tx, (7, "mail")), bool)
    assert_type(JOBS.delete_range(tx, (7,), (8,)), int)
    assert_type(tx.pop(b"key"), bytes)
    assert_type(tx.pop(b"key", None), "bytes | None")


async def more(db: Database) -> None:
    assert_type(await db.write({b"a": b"1", b"b": None}), int)
    assert_type(await db.discard(b"a"), bool)
    assert_type(await db.wait_changed(prefix=JOBS.prefix, since=3), int)
    async with db.stream(prefix=b"a") as pairs:
        async for name, value in pairs:
            assert_type((name, value), "tuple[bytes, bytes]")
    async with db.changes() as commits:
        async for batch in commits.batches(linger=0.1):
            assert_type(batch, "list[Commit]")
            for operation in batch[0].operations:
                assert_type(JOBS.decode(operation), "tuple[tuple[int, str], Job | None] | None")


async def under_asyncio() -> None:
    async with trio_wal.asyncio.open_wal("it", durability="sync", max_queue_size=10) as wal:
        assert_type(await wal.append(b"record"), int)
        assert_type(await wal.append_many([b"record"]), range)
        async with wal.follow() as records:
            assert_type(records, trio_wal.asyncio.RecordStream)
            async for record in records:
                assert_type(record, trio_wal.Record)
            async for batch in records.batches(10):
                assert_type(batch, list[trio_wal.Record])
    async with trio_wal.asyncio.open_database(Path("it"), checkpoint_bytes=5) as db:
        assert_type(await db.get(b"key", b""), bytes)
        assert_type(await db.scan(prefix=b"k"), list[tuple[bytes, bytes]])
        assert_type(await db.run(move, b"one", b"two"), "bytes | None")
        assert_type(await db.run(later, 5), int)
        assert_type(await db.view(size, b"key"), int)
        async with db.transaction() as tx:
            assert_type(tx, trio_wal.asyncio.Transaction)
            assert_type(await tx.get(b"key"), "bytes | None")
            assert_type(await tx.call(move, b"one", b"two"), "bytes | None")
            await tx.call(clear)
        async with db.consumer("mailer") as consumer:
            async for commit in consumer:
                assert_type(commit, Commit)
                await consumer.acknowledge(commit)


async def later(tx: trio_wal.asyncio.Transaction, by: int) -> int:
    await tx.put(b"counter", b"%d" % by)
    return by


def size(snap: Snapshot, key: bytes) -> int:
    return len(snap.get(key, b""))
