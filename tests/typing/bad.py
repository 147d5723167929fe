"""A user's program with a mistake on every line that says so. It is type-checked, not run.

A line ends with what must be found there: mypy's codes, and after the comma pyright's rules.
"""

from __future__ import annotations

import trio_wal
import trio_wal.asyncio
from trio_wal import Database, Table, Transaction


async def add(tx: Transaction, key: bytes, amount: int) -> int:
    tx.put(key, b"%d" % amount)
    return amount


def touch(tx: Transaction, key: bytes) -> None:
    tx.put(key, b"")


async def transactions(db: Database) -> None:
    await db.run(add, "hits", 1)  # wrong: arg-type call-arg, reportArgumentType reportCallIssue
    await db.run(add, b"hits")  # wrong: arg-type, reportArgumentType reportCallIssue
    await db.run(add, b"hits", 1, 2)  # wrong: arg-type call-arg, reportArgumentType reportCallIssue
    await db.run(touch, 1)  # wrong: arg-type, reportArgumentType reportCallIssue
    await db.run(touch, b"", retries="")  # wrong: call-overload, reportArgumentType reportCallIssue
    text: str = await db.run(add, b"hits", 1)  # wrong: arg-type call-arg, reportAssignmentType
    await db.run(len)  # wrong: arg-type call-arg, reportArgumentType reportCallIssue
    del text


async def reading(db: Database) -> None:
    value: bytes = db.get(b"key")  # wrong: assignment, reportAssignmentType
    db.get("key")  # wrong: call-overload, reportArgumentType
    db.scan(b"a", b"b", True)  # wrong: arg-type call-arg, reportCallIssue
    await db.put(b"key", "value")  # wrong: arg-type, reportArgumentType
    async with db.transaction() as tx:
        tx.put(b"key", None)  # wrong: arg-type, reportArgumentType
        tx.commit(b"key")  # wrong: call-arg unused-coroutine, reportCallIssue
    db.changes("1234")  # wrong: arg-type, reportArgumentType
    del value


def opening() -> None:
    trio_wal.open_database("it", max_queue_sise=5)  # wrong: call-arg, reportCallIssue
    trio_wal.open_database("it", durability="sometimes")  # wrong: arg-type, reportArgumentType
    trio_wal.open_database("it", verify_store=True)  # wrong: arg-type, reportArgumentType
    trio_wal.open_database("it", None)  # wrong: call-arg, reportCallIssue
    trio_wal.open_wal("it", durability="sometimes")  # wrong: arg-type, reportArgumentType
    trio_wal.open_wal("it", checkpoint_bytes=5)  # wrong: call-arg, reportCallIssue


JOBS = Table("jobs", key=tuple[int, str], value=bytes)
Table("lengths", key=len, value=int)  # wrong: arg-type, reportArgumentType


def tables(db: Database, tx: Transaction) -> None:
    JOBS.put(db, (7, "mail"), b"")  # wrong: arg-type, reportArgumentType
    JOBS.put(tx, (7, 8), b"")  # wrong: arg-type, reportArgumentType
    JOBS.put(tx, (7, "mail"), 5)  # wrong: arg-type, reportArgumentType
    value: bytes = JOBS.get(db, (7, ""))  # wrong: assignment, reportAssignmentType
    JOBS.get({}, (7, ""))  # wrong: call-overload, reportArgumentType
    del value


async def under_asyncio(db: trio_wal.asyncio.Database) -> None:
    trio_wal.asyncio.open_wal("it", checkpoint_bytes=5)  # wrong: call-arg, reportCallIssue
    trio_wal.asyncio.open_database("it", None)  # wrong: call-arg, reportCallIssue
    await db.put(b"key", "value")  # wrong: arg-type, reportArgumentType
    number: int = await db.get(b"key", b"")  # wrong: arg-type assignment, reportAssignmentType
    db.put(b"key", b"")  # wrong: unused-coroutine, reportUnusedCoroutine
    del number
