"""Writers of a database: commits in lines, validated when they are let in, in the log's order."""

from __future__ import annotations

import errno
import random
import threading
from typing import Any

import pytest
import trio
from databases import open_memory_database
from helpers import Call, open_tasks
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

import trio_wal
from trio_wal import LogFailedError, RecordTooLargeError, TransactionConflict
from trio_wal.testing import MemoryFiles


async def stalled(db: Any, files: MemoryFiles, nursery: trio.Nursery) -> Call:
    files.hold()
    call = Call(nursery, db.put, b"first", b"")
    await wait_all_tasks_blocked()
    return call


async def puts(nursery: trio.Nursery, to: Any, name: bytes, count: int) -> list[Call]:
    calls = []
    for number in range(count):
        calls.append(Call(nursery, to.put, b"%s%d" % (name, number), b""))
        await wait_all_tasks_blocked()
    return calls


async def order_of(db: Any) -> str:
    """The first letter of each commit's key, in the log's order, without the first commit."""
    found = []
    async with db.changes() as commits:
        async for commit in commits:
            found += [operation.key[:1].decode() for operation in commit.operations]
            if commit.lsn == db.durable_lsn:
                break
    return "".join(found[1:])


async def test_a_writer_writes_like_the_database(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, db.writer("w") as w:
        assert await w.put(b"a", b"1") == 1

        async def add(tx: trio_wal.Transaction, key: bytes) -> bytes:
            tx.put(key, (tx.get(key) or b"") + b"+")
            return key

        assert await w.run(add, b"a") == b"a"
        assert await w.run(lambda tx: tx.get(b"a")) == b"1+"
        async with w.transaction() as tx:
            tx.put(b"b", b"2")
        assert tx.lsn == 3
        assert await w.delete(b"a") == 4
        with pytest.raises(KeyError):
            await w.delete(b"a")
        assert dict(db.scan()) == {b"b": b"2"}
        assert w.statistics().records_appended == 4
        assert db.statistics().wal.writers["w"] == w.statistics()
        assert repr(w) == "<DatabaseWriter 'w' of '/db' open>"


async def test_every_method_is_a_checkpoint(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, db.writer("w") as w:
        for call in (
            lambda: w.put(b"a", b""),
            lambda: w.run(lambda tx: None),
            lambda: w.delete(b"a"),
        ):
            with assert_checkpoints():
                await call()


async def test_commits_take_turns_and_their_numbers_are_the_logs(files: MemoryFiles) -> None:
    async with (
        open_memory_database(files, max_queue_size=4) as db,
        db.writer("a") as a,
        db.writer("b", max_queue_size=1) as b,
    ):
        async with open_tasks(files) as nursery:
            await stalled(db, files, nursery)
            for call in await puts(nursery, db, b".", 4):
                assert call.state == "waiting"
            calls = await puts(nursery, db, b"m", 8)
            calls += await puts(nursery, a, b"a", 4)
            calls += await puts(nursery, b, b"b", 2)
            assert db.statistics().pending == 5
            files.release()
        assert (await order_of(db)).lstrip(".") == "mabmabmamammmm"
        assert sorted(call.value for call in calls) == list(range(6, 20))


async def test_what_a_commit_read_is_validated_when_it_is_let_in(files: MemoryFiles) -> None:
    """Two transactions read the same value while the queue is full; the one that is let in
    second must know of the other."""
    async with open_memory_database(files, max_queue_size=2) as db:
        await db.put(b"n", b"0")
        async with db.writer("a") as a, db.writer("b") as b, open_tasks(files) as nursery:
            await stalled(db, files, nursery)
            await puts(nursery, db, b".", 2)

            async def add(writer: Any) -> None:
                async with writer.transaction() as tx:
                    tx.put(b"n", tx.get(b"n") + b"+")

            first = Call(nursery, add, a)
            await wait_all_tasks_blocked()
            second = Call(nursery, add, b)
            await wait_all_tasks_blocked()
            assert (first.state, second.state) == ("waiting", "waiting")
            assert db.statistics().wal.tasks_waiting_send == 2
            assert db.statistics().open_readers == 2
            files.release()
        assert first.state == "returned"
        assert isinstance(second.error, TransactionConflict)
        assert second.error.key == b"n"
        assert db.get(b"n") == b"0+"
        assert db.statistics().conflicts == 1
        assert db.statistics().open_readers == 0
        assert b.statistics().records_appended == 0
        assert db.statistics().wal.records_waiting == 0


async def test_a_conflict_that_is_there_already_does_not_stand_in_line(files: MemoryFiles) -> None:
    async with open_memory_database(files, max_queue_size=1) as db, db.writer("a") as a:
        await db.put(b"n", b"0")
        async with open_tasks(files) as nursery:
            begun, go = trio.Event(), trio.Event()

            async def add() -> None:
                async with a.transaction() as tx:
                    tx.put(b"n", tx.get(b"n") + b"+")
                    begun.set()
                    await go.wait()

            call = Call(nursery, add)
            await begun.wait()
            await db.put(b"n", b"1")
            await stalled(db, files, nursery)
            await puts(nursery, db, b".", 3)
            go.set()
            await wait_all_tasks_blocked()
            assert isinstance(call.error, TransactionConflict)
            files.release()


@pytest.mark.parametrize("method", ["put", "transaction"])
async def test_cancelled_in_line_leaves_nothing(files: MemoryFiles, method: str) -> None:
    async with open_memory_database(files, max_queue_size=2) as db, db.writer("a") as a:
        await db.put(b"k", b"before")

        async def change(key: bytes) -> None:
            if method == "put":
                await a.put(key, b"after")
            else:
                async with a.transaction() as tx:
                    tx.put(key, tx.get(key, b"") + b" after")

        async with open_tasks(files) as nursery:
            await stalled(db, files, nursery)
            accepted = Call(nursery, change, b"j")
            await wait_all_tasks_blocked()
            await puts(nursery, db, b".", 1)
            blocked = Call(nursery, change, b"k")
            await wait_all_tasks_blocked()
            after = await puts(nursery, a, b"z", 1)
            assert db.statistics().wal.tasks_waiting_send == 2
            blocked.scope.cancel()
            accepted.scope.cancel()
            await wait_all_tasks_blocked()
            assert db.statistics().wal.tasks_waiting_send == 0
            assert db.statistics().open_readers == 0
            files.release()
        assert (accepted.state, blocked.state, after[0].state) == (
            "cancelled", "cancelled", "returned"
        )  # fmt: skip
        assert (db.get(b"j"), db.get(b"k")) == (None, b"before")
        assert await order_of(db) == "f.z"


async def test_who_stands_in_line_when_the_first_writer_comes_is_not_passed(
    files: MemoryFiles,
) -> None:
    """Their commits have their numbers already."""
    async with open_memory_database(files, max_queue_size=2) as db:
        async with open_tasks(files) as nursery:
            await stalled(db, files, nursery)
            before = await puts(nursery, db, b"m", 6)
            assert db.statistics().pending == 7
            async with db.writer("h", priority="high") as h, db.writer("a") as a:
                high = await puts(nursery, h, b"h", 2)
                normal = await puts(nursery, a, b"a", 2)
                late = await puts(nursery, db, b"l", 2)
                assert db.statistics().pending == 7
                files.release()
                await wait_all_tasks_blocked()
        assert await order_of(db) == "mmmmmmhhaall"
        assert [call.value for call in before] == list(range(2, 8))
        for calls in (high, normal, late):
            assert calls[0].value < calls[1].value


async def test_high_priority_is_let_in_first_but_passes_nothing_accepted(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files, max_queue_size=10, max_batch_bytes=60) as db:
        async with db.writer("h", priority="high") as h, open_tasks(files) as nursery:
            await stalled(db, files, nursery)
            await puts(nursery, db, b"m", 12)
            assert db.statistics().wal.records_waiting == 9
            await puts(nursery, h, b"h", 2)
            assert db.statistics().wal.records_waiting == 10
            files.release()
        assert await order_of(db) == "mmmmmmmmmhhmmm"


async def test_others_do_not_see_what_stands_in_line(files: MemoryFiles) -> None:
    async with (
        open_memory_database(files, max_queue_size=1) as db,
        db.writer("a") as a,
        open_tasks(files) as nursery,
    ):
        await stalled(db, files, nursery)
        await puts(nursery, a, b"a", 2)
        async with db.transaction() as tx:
            assert tx.get(b"a0") == b""
            assert tx.get(b"a1") is None
            tx.abort()
        files.release()


async def test_a_failure_is_told_to_who_stands_in_line(files: MemoryFiles) -> None:
    async with open_memory_database(files, max_queue_size=1) as db, db.writer("a") as a:
        async with open_tasks(files) as nursery:
            first = await stalled(db, files, nursery)
            calls = await puts(nursery, a, b"a", 3)
            files.fail("sync", errno.EIO)
            files.release()
            await wait_all_tasks_blocked()
        for call in (first, *calls):
            assert isinstance(call.error, LogFailedError)
        assert [call.error.outcome for call in calls] == ["not written"] * 3  # type: ignore[union-attr]
        with pytest.raises(LogFailedError):
            await a.put(b"k", b"")
        assert db.statistics().pending == 0


async def test_leaving_the_block_and_closing_the_database_end_the_line(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files, max_queue_size=1) as db:
        async with open_tasks(files) as nursery:
            await stalled(db, files, nursery)
            async with db.writer("a") as a:
                calls = await puts(nursery, a, b"a", 3)
                tx = a.transaction()
                await tx.__aenter__()
                tx.put(b"k", b"v")
            await wait_all_tasks_blocked()
            assert [type(call.error) for call in calls[1:]] == [trio.ClosedResourceError] * 2
            with pytest.raises(trio.ClosedResourceError, match=r"^writer a: its block was left"):
                await tx.commit()
            for call in (lambda: a.put(b"k", b""), lambda: a.delete(b"k"), lambda: a.run(print)):
                with pytest.raises(
                    trio.ClosedResourceError, match=r"^writer a: its block was left"
                ):
                    await call()
            async with db.writer("b") as b:
                blocked = await puts(nursery, b, b"b", 1)
                closing = Call(nursery, db.aclose)
                await wait_all_tasks_blocked()
                assert isinstance(blocked[0].error, trio.ClosedResourceError)
                files.release()
                await wait_all_tasks_blocked()
                assert closing.state == "returned"
                with pytest.raises(trio.ClosedResourceError, match="this database is closed"):
                    await b.put(b"k", b"")
        assert calls[0].value == 2


async def test_bad_input_is_refused_by_name_before_anything_changes(files: MemoryFiles) -> None:
    async with open_memory_database(files, max_queue_size=10) as db, db.writer("w") as w:
        for arguments, message in (
            ({"name": "w"}, r"^name must be unique: there is already a writer"),
            ({"priority": "low"}, r"^priority must be one of"),
            ({"max_queue_size": 0}, r"^max_queue_size must be at least 1"),
            ({"max_queue_size": 11}, r"^max_queue_size must be at most the queue's"),
            ({"max_queue_bytes": 0}, r"^max_queue_bytes must be at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                db.writer(**{"name": "x", **arguments})
        with pytest.raises(TypeError, match=r"^this log belongs to a database"):
            db.wal.writer("x")
        with pytest.raises(TypeError, match=r"^value must be bytes"):
            await w.put(b"k", "v")
        with pytest.raises(ValueError, match=r"^key must have 1 to 511 bytes"):
            await w.put(b"", b"v")
        with pytest.raises(RecordTooLargeError):
            await w.put(b"k", bytes(1 << 25))
        assert set(db.statistics().wal.writers) == {"w"}
        assert db.durable_lsn == 0
    with pytest.raises(trio.ClosedResourceError):
        db.writer("x")


async def test_another_run_is_refused(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, db.writer("w") as w:
        errors: list[BaseException] = []

        async def elsewhere() -> None:
            for call in (lambda: w.put(b"k", b""), lambda: w.delete(b"k"), w.transaction):
                try:
                    await call()  # type: ignore[misc]
                except RuntimeError as exc:
                    errors.append(exc)

        thread = threading.Thread(target=lambda: trio.run(elsewhere))
        thread.start()
        await trio.to_thread.run_sync(thread.join)
        assert len(errors) == 3
        assert db.durable_lsn == 0


@pytest.mark.parametrize("seed", range(8))
async def test_counters_add_up_through_any_lines(files: MemoryFiles, seed: int) -> None:
    """Increments through four lines of a queue that is always full, some cancelled: what is
    there is what returned, and the order of numbers is the order of the log."""
    rng = random.Random(seed)
    returned = 0

    async with open_memory_database(files, max_queue_size=3, max_batch_bytes=80) as db:
        async with (
            db.writer("a") as a,
            db.writer("b", max_queue_size=1) as b,
            db.writer("h", priority="high") as h,
        ):

            def add(tx: trio_wal.Transaction, key: bytes) -> None:
                tx.put(key, b"%d" % (int(tx.get(key, b"0")) + 1))

            async def work(task: int) -> None:
                nonlocal returned
                to = [db, a, b, h][task % 4]
                for _ in range(6):
                    with trio.CancelScope() as scope:
                        if rng.random() < 0.2:
                            scope.deadline = trio.current_time() + rng.choice([0, 0.0001])
                        await to.run(add, rng.choice([b"x", b"y"]), retries=1000)
                        returned += 1

            async with open_tasks(files) as nursery:
                for task in range(24):
                    nursery.start_soon(work, task)
            assert int(db.get(b"x", b"0")) + int(db.get(b"y", b"0")) == returned
            assert db.statistics().pending == 0
            assert db.statistics().wal.tasks_waiting_send == 0
            values = dict(db.scan())
        crashed = files.crash_image(kind="kill")
    async with open_memory_database(crashed) as db:
        assert dict(db.scan()) == values
