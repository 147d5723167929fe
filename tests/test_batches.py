"""Records and commits in lists: `RecordStream.batches` and `CommitStream.batches`."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from databases import open_memory_database, write
from logs import LOG
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

import trio_wal
from trio_wal import CorruptLogError, LogDivergedError, Record
from trio_wal._operations import encode_transaction
from trio_wal.testing import MemoryFiles


def open_wal(files: MemoryFiles, **options: Any) -> Any:
    return trio_wal.open_wal(LOG, files=files, **options)


def lsns(records: list[Record]) -> list[int]:
    return [record.lsn for record in records]


async def fill(wal: Any, count: int, together: int = 1) -> None:
    for start in range(0, count, together):
        await wal.append_many([b"%d" % number for number in range(start, start + together)])


@pytest.mark.parametrize(("together", "size"), [(1, 4), (10, 4), (10, 10), (10, 7), (20, None)])
async def test_lists_hold_every_record_in_order(
    files: MemoryFiles, together: int, size: int | None
) -> None:
    async with open_wal(files) as wal:
        await fill(wal, 40, together)
        for opened in (wal.read(), wal.read(5, 31)):
            found: list[Record] = []
            async with opened as records:
                async for batch in records.batches(size):
                    assert 0 < len(batch) <= (size or math.inf)
                    found += batch
                    assert records.bookmark.lsn == batch[-1].lsn
            async with wal.read(found[0].lsn, found[-1].lsn + 1) as records:
                assert [record async for record in records] == found
        assert lsns(found) == list(range(5, 31))


async def test_lists_and_single_records_take_turns(files: MemoryFiles) -> None:
    async with open_wal(files) as wal:
        await fill(wal, 10, 10)
        async with wal.read() as records:
            lists = records.batches(3)
            assert lsns(await lists.__anext__()) == [1, 2, 3]
            assert (await records.__anext__()).lsn == 4
            assert lsns(await records.batches(None).__anext__()) == [5, 6, 7, 8, 9, 10]
            for ended in (lists, records):
                with pytest.raises(StopAsyncIteration):
                    await ended.__anext__()


async def test_a_list_is_a_checkpoint_and_cancelled_gives_the_same_again(
    files: MemoryFiles,
) -> None:
    async with open_wal(files) as wal:
        await fill(wal, 4, 4)
        async with wal.read() as records:
            lists = records.batches(2)
            with assert_checkpoints():
                assert lsns(await lists.__anext__()) == [1, 2]
            with trio.CancelScope() as scope:
                scope.cancel()
                await lists.__anext__()
            assert scope.cancelled_caught
            assert records.bookmark.lsn == 2
            assert lsns(await lists.__anext__()) == [3, 4]


async def test_a_list_waits_for_more_as_long_as_it_is_told(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    found: list[tuple[float, list[int]]] = []

    async with open_wal(files) as wal:

        async def read(lists: AsyncIterator[list[Record]]) -> None:
            async for batch in lists:
                found.append((trio.current_time() - begun, lsns(batch)))  # noqa: PERF401

        async with wal.follow() as records, trio.open_nursery() as nursery:
            begun = trio.current_time()
            nursery.start_soon(read, records.batches(3, linger=10.0))
            await wait_all_tasks_blocked()
            for seconds in (1.0, 4.0, 7.0, 20.0):
                mock_clock.jump(begun + seconds - trio.current_time())
                await wal.append(b"")
                await wait_all_tasks_blocked()
            assert [batch for _, batch in found] == [[1, 2, 3]]
            assert found[0][0] == pytest.approx(7.0)
            mock_clock.jump(10.0)
            await wait_all_tasks_blocked()
            assert [batch for _, batch in found] == [[1, 2, 3], [4]]
            nursery.cancel_scope.cancel()


async def test_cancelled_while_it_waits_for_more_nothing_is_lost(files: MemoryFiles) -> None:
    async with open_wal(files) as wal:
        await fill(wal, 2)
        async with wal.follow() as records:
            lists = records.batches(linger=1000.0)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lists.__anext__)
                    await wait_all_tasks_blocked()
                    await wal.append(b"")
                    await wait_all_tasks_blocked()
                    scope.cancel()
            assert records.bookmark.lsn == 0
            assert lsns(await records.batches(2).__anext__()) == [1, 2]
            assert (await records.__anext__()).lsn == 3


async def test_what_is_cut_meanwhile_is_not_given(files: MemoryFiles) -> None:
    async with open_wal(files) as wal:
        await fill(wal, 4)
        async with wal.follow(3) as records, trio.open_nursery() as nursery:
            found: list[list[int]] = []

            async def read() -> None:
                found.append(lsns(await lists.__anext__()))

            lists = records.batches(3, linger=1000.0)
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            await wal.truncate_after(3)
            for _ in range(2):
                await wal.append(b"new")
            await wait_all_tasks_blocked()
            # Of the new history all three.
            assert found == [[3, 4, 5]]
            await wal.truncate_after(4)
            with pytest.raises(LogDivergedError):
                await lists.__anext__()


async def test_a_list_of_which_all_is_cut_is_not_given(files: MemoryFiles) -> None:
    async with open_wal(files) as wal:
        await fill(wal, 4)
        async with wal.follow(3) as records, trio.open_nursery() as nursery:
            found: list[list[bytes]] = []

            async def read() -> None:
                batch = await records.batches(3, linger=1000.0).__anext__()
                found.append([record.data for record in batch])

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            await wal.truncate_after(2)
            await wait_all_tasks_blocked()
            assert found == []
            await fill(wal, 3, 3)
            await wait_all_tasks_blocked()
            assert found == [[b"0", b"1", b"2"]]


async def test_the_end_of_the_log_ends_the_wait_for_more(files: MemoryFiles) -> None:
    found: list[list[int]] = []

    async def read(records: trio_wal.RecordStream, entered: trio.Event) -> None:
        async with records:
            entered.set()
            async for batch in records.batches(linger=1000.0):
                found.append(lsns(batch))  # noqa: PERF401

    async with trio.open_nursery() as nursery, open_wal(files) as wal:
        await fill(wal, 2)
        entered = trio.Event()
        nursery.start_soon(read, wal.follow(), entered)
        await entered.wait()
        await wait_all_tasks_blocked()
        assert found == []
    assert found == [[1, 2]]


async def test_first_what_is_whole_then_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "log"
    async with trio_wal.open_wal(path) as wal:
        for number in range(6):
            await wal.append(b"x" * 300_000 + b"%d" % number)
    segment = min(path.glob("*.log"))
    with segment.open("r+b") as file:
        file.seek(700_000)
        file.write(b"\xff" * 10)
    for size in (None, 1000, 2):
        async with trio_wal.open_reader(path) as reader, reader.read() as records:
            found: list[int] = []

            async def read(lists: AsyncIterator[list[Record]], found: list[int]) -> None:
                async for batch in lists:
                    found += lsns(batch)

            with pytest.raises(CorruptLogError):
                await read(records.batches(size, linger=0.01), found)
            assert found == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_records": 0}, ValueError, "max_records must be at least 1"),
        ({"max_records": 1.5}, TypeError, "max_records must be an int"),
        ({"linger": -1}, ValueError, "linger must be at least 0"),
        ({"linger": "1"}, TypeError, "linger must be a number of seconds"),
    ],
)
async def test_bad_arguments_are_refused(
    files: MemoryFiles, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with open_wal(files) as wal, wal.read() as records:
        with pytest.raises(error, match=message):
            records.batches(**arguments)


async def test_the_stream_must_be_entered_and_one_task_reads(files: MemoryFiles) -> None:
    async with open_wal(files) as wal:
        with pytest.raises(RuntimeError, match="enter the stream first"):
            await wal.read().batches().__anext__()
        async with wal.follow() as records, trio.open_nursery() as nursery:
            nursery.start_soon(records.batches().__anext__)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await records.batches().__anext__()
            nursery.cancel_scope.cancel()


async def test_commits_come_in_lists_too(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        for number in range(5):
            await write(db, {b"%d" % number: b"x", b"y": b"%d" % number})
        async with db.changes() as commits, db.changes() as one_by_one:
            lists = commits.batches(2)
            for count in (2, 2, 1):
                batch = await lists.__anext__()
                assert batch == [await one_by_one.__anext__() for _ in range(count)]
                assert commits.bookmark == one_by_one.bookmark


async def test_of_commits_too_first_what_is_whole(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"a", b"1")
        log = db._core.log  # a record that is no transaction, as nobody should write
        await log.append_unit([b"nonsense"], 8)
        async with db.changes() as commits:
            lists = commits.batches()
            # However they stand in chunks, the first is given before the error.
            assert [commit.lsn for commit in await lists.__anext__()] == [1]
            for _ in range(2):
                with pytest.raises(CorruptLogError, match="LSN 2"):
                    await lists.__anext__()


@pytest.mark.parametrize("size", [None, 2, 0])
async def test_nobody_is_led_past_a_damaged_commit(files: MemoryFiles, size: int | None) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"a", b"1")
        whole = db.wal.bookmark
        # In one frame, and so in one list, with what comes after it.
        log = db._core.log
        good = encode_transaction({b"a": b"2"})
        await log.append_unit([good, b"nonsense", good], 40)
        async with db.changes(whole) as commits:
            items: AsyncIterator[Any] = commits if size == 0 else commits.batches(size)
            await items.__anext__()
            with pytest.raises(CorruptLogError, match="LSN 3"):
                await items.__anext__()
            assert (commits.bookmark.lsn, commits.bookmark.epoch) == (2, whole.epoch)
            # However it is gone on with.
            for other in (items, commits, commits.batches()):
                with pytest.raises(CorruptLogError, match="LSN 3"):
                    await other.__anext__()
            assert commits.bookmark.lsn == 2
        async with db.changes(commits.bookmark) as commits:
            with pytest.raises(CorruptLogError, match="LSN 3"):
                await commits.__anext__()
