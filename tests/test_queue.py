"""Order, fairness and withdrawal: what happens to a record before it is written."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from helpers import Call, open_memory, open_tasks, read_all
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal import _queue
from trio_wal._queue import WriteQueue
from trio_wal._state import Status
from trio_wal.testing import MemoryFiles


class NoMemory:
    def __init__(self, queue: WriteQueue) -> None:
        raise MemoryError


async def no_memory_for(write: Callable[[bytes], Awaitable[Any]]) -> Any:
    """What a write gives after one for which there was no memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_queue, "Claim", NoMemory)
        with pytest.raises(MemoryError):
            await write(b"lost")
    return await write(b"next")


@pytest.mark.parametrize("method", ["append", "append_many"])
@pytest.mark.parametrize("writer", [False, True])
async def test_a_record_without_memory_for_its_wait_leaves_nothing(
    method: str, writer: bool, files: MemoryFiles
) -> None:
    async with open_memory(files) as wal, wal.writer("writer") as line:
        write = getattr(line if writer else wal, method)
        given = (lambda data: write([data])) if method == "append_many" else write
        found = await no_memory_for(given)
        assert found == (range(1, 2) if method == "append_many" else 1)
        assert (wal.statistics().records_waiting, wal.statistics().bytes_appended) == (0, 4)
        assert await read_all(wal) == {1: b"next"}


async def test_a_commit_without_memory_for_its_wait_is_not_seen(files: MemoryFiles) -> None:
    async with trio_wal.open_database("/db", files=files) as db:
        assert await no_memory_for(lambda key: db.put(key, b"")) == 1
        assert dict(db.scan()) == {b"next": b""}


# -- order ------------------------------------------------------------------------


async def test_blocked_writers_are_served_first_come_first_served(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=2) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            calls = []
            for number in range(20):
                # Every third only sends: the queue for admission is one for all.
                write = wal.send if number % 3 == 2 else wal.append
                calls.append(Call(nursery, write, b"%d" % number))
                await wait_all_tasks_blocked()
            assert wal.statistics().tasks_waiting_send == 17
            files.release()
        assert await read_all(wal) == {n + 1: b"%d" % n for n in range(20)}
        assert [call.value for call in calls] == [None if n % 3 == 2 else n + 1 for n in range(20)]


async def test_a_small_record_does_not_pass_a_large_one_that_is_blocked(
    files: MemoryFiles,
) -> None:
    async with open_memory(files, max_queue_bytes=100) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"in flight")
            await wait_all_tasks_blocked()
            Call(nursery, wal.append, bytes(90))
            await wait_all_tasks_blocked()
            Call(nursery, wal.append, bytes(50))
            await wait_all_tasks_blocked()
            Call(nursery, wal.append, b"small")
            await wait_all_tasks_blocked()
            # It would fit, and so would this one.
            with pytest.raises(trio.WouldBlock):
                wal.send_nowait(b"")
            assert wal.statistics().tasks_waiting_send == 2
            files.release()
        assert list((await read_all(wal)).values()) == [
            b"in flight",
            bytes(90),
            bytes(50),
            b"small",
        ]


async def test_when_a_blocked_record_is_withdrawn_those_behind_it_are_let_in(
    files: MemoryFiles,
) -> None:
    async with open_memory(files, max_queue_bytes=100) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            calls = []
            for size in (10, 90, 50, 10):
                calls.append(Call(nursery, wal.append, bytes(size)))
                await wait_all_tasks_blocked()
            assert wal.statistics().tasks_waiting_send == 2
            calls[2].scope.cancel()
            assert wal.statistics().tasks_waiting_send == 0
            assert wal.statistics().bytes_waiting == 100
            files.release()
        assert [call.value for call in calls] == [1, 2, None, 3]


async def test_one_task_keeps_its_order_across_all_ways_to_write(files: MemoryFiles) -> None:
    given: list[bytes] = []

    async def write(wal: object, task: int) -> None:
        rng = random.Random(task)
        for number in range(60):
            data = b"%d:%d" % (task, number)
            kind = rng.randrange(4)
            if kind == 0:
                await wal.append(data)  # type: ignore[attr-defined]
            elif kind == 1:
                await wal.send(data)  # type: ignore[attr-defined]
            elif kind == 2:
                await wal.append_many([data, data + b"'"])  # type: ignore[attr-defined]
                given.append(data)
                data += b"'"
            else:
                try:
                    wal.send_nowait(data)  # type: ignore[attr-defined]
                except trio.WouldBlock:
                    continue
            given.append(data)

    async with open_memory(files, max_queue_size=5, max_batch_bytes=20) as wal:
        async with trio.open_nursery() as nursery:
            for task in range(10):
                nursery.start_soon(write, wal, task)
        await wal.flush()
        found = list((await read_all(wal)).values())
    for task in range(10):
        mine = b"%d:" % task
        assert [r for r in found if r.startswith(mine)] == [r for r in given if r.startswith(mine)]
    assert len(found) == len(given) > 500


async def test_what_waits_at_the_same_time_becomes_one_batch(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"alone")
            await wait_all_tasks_blocked()
            calls = [Call(nursery, wal.append, b"together") for _ in range(100)]
            await wait_all_tasks_blocked()
            before = files.operations["sync"]
            files.release()
        assert files.operations["sync"] - before == 2
        assert wal.statistics().batches_synced == 2
        assert sorted(call.value for call in calls) == list(range(2, 102))


async def test_a_batch_is_cut_at_max_batch_bytes(files: MemoryFiles) -> None:
    async with open_memory(files, max_batch_bytes=100) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"alone")
            await wait_all_tasks_blocked()
            for size in (60, 40, 1, 500, 50, 50):
                Call(nursery, wal.append, bytes(size))
                await wait_all_tasks_blocked()
            files.release()
        # 5 | 60 40 | 1 | 500: more than a batch, written alone | 50 50
        assert wal.statistics().batches_synced == 5
        sizes = [len(data) for data in (await read_all(wal)).values()]
        assert sizes == [5, 60, 40, 1, 500, 50, 50]


# -- withdrawal -------------------------------------------------------------------


async def test_a_cancelled_writer_in_the_queue_leaves_nothing_and_makes_room_at_once(
    files: MemoryFiles,
) -> None:
    async with open_memory(files, max_queue_size=2) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            calls = {}
            for name in (b"flying", b"queued 1", b"queued 2", b"blocked 1", b"blocked 2"):
                calls[name] = Call(nursery, wal.append, name)
                await wait_all_tasks_blocked()
            assert wal.statistics().tasks_waiting_send == 2
            assert wal.statistics().bytes_waiting == 16

            calls[b"queued 1"].scope.cancel()
            # Without a step of any task: the record is out and the next one in.
            statistics = wal.statistics()
            assert statistics.tasks_waiting_send == 1
            assert statistics.records_waiting == 2
            assert statistics.bytes_waiting == 17

            calls[b"blocked 2"].scope.cancel()
            assert wal.statistics().tasks_waiting_send == 0
            assert wal.statistics().records_waiting == 2

            calls[b"blocked 1"].scope.cancel()
            assert wal.statistics().records_waiting == 1
            assert wal.statistics().bytes_waiting == 8
            await wait_all_tasks_blocked()
            cancelled = [name for name, call in calls.items() if call.state == "cancelled"]
            assert cancelled == [b"queued 1", b"blocked 1", b"blocked 2"]
            files.release()
        assert await read_all(wal) == {1: b"flying", 2: b"queued 2"}
        assert calls[b"queued 2"].value == 2
    async with open_memory(files) as wal:
        assert await read_all(wal) == {1: b"flying", 2: b"queued 2"}


async def test_a_withdrawn_record_leaves_no_gap_in_the_lsns_of_its_batch(
    files: MemoryFiles,
) -> None:
    async with open_memory(files) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
            calls = []
            for number in range(10):
                calls.append(Call(nursery, wal.append, b"%d" % number))
                await wait_all_tasks_blocked()
            for number in (0, 4, 5, 9):
                calls[number].scope.cancel()
            await wait_all_tasks_blocked()
            files.release()
        kept = [1, 2, 3, 6, 7, 8]
        assert [calls[number].value for number in kept] == [2, 3, 4, 5, 6, 7]
        assert list((await read_all(wal)).values())[1:] == [b"%d" % n for n in kept]


async def test_a_withdrawn_unit_goes_as_a_whole(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=5) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
            unit = Call(nursery, wal.append_many, [b"aa", b"bb", b"cc", b"dd"])
            await wait_all_tasks_blocked()
            after = Call(nursery, wal.append_many, [b"x", b"y"])
            await wait_all_tasks_blocked()
            assert wal.statistics().records_waiting == 4
            assert wal.statistics().tasks_waiting_send == 1
            unit.scope.cancel()
            assert wal.statistics().records_waiting == 2
            assert wal.statistics().bytes_waiting == 2
            files.release()
        assert unit.state == "cancelled"
        assert after.value == range(2, 4)
        assert await read_all(wal) == {1: b"flying", 2: b"x", 3: b"y"}


async def test_withdrawing_everything_writes_nothing(files: MemoryFiles) -> None:
    async with open_memory(files, max_batch_bytes=10) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
            calls = [Call(nursery, wal.append, bytes(8)) for _ in range(5)]
            await wait_all_tasks_blocked()
            for call in calls:
                call.scope.cancel()
            await wait_all_tasks_blocked()
            before = files.operations["pwrite"]
            files.release()
            await wait_all_tasks_blocked()
            assert files.operations["pwrite"] == before + 1
        assert wal.last_lsn == 1
        assert await wal.append(b"next") == 2


async def test_withdrawn_batches_do_not_use_up_the_channel(files: MemoryFiles) -> None:
    """Each record here is a batch of its own, and an empty batch stays in the channel."""
    async with open_memory(files, max_queue_size=2, max_batch_bytes=1) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            calls = []
            for name in (b"a", b"b", b"c"):
                calls.append(Call(nursery, wal.append, name))
                await wait_all_tasks_blocked()
            calls[1].scope.cancel()
            calls += [Call(nursery, wal.append, b"d")]
            await wait_all_tasks_blocked()
            calls += [Call(nursery, wal.append, b"e")]
            await wait_all_tasks_blocked()
            files.release()
        assert [call.state for call in calls] == [
            "returned",
            "cancelled",
            "returned",
            "returned",
            "returned",
        ]
        assert list((await read_all(wal)).values()) == [b"a", b"c", b"d", b"e"]


async def test_barriers_do_not_use_up_the_channel(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=1) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            calls = [Call(nursery, wal.append, b"flying")]
            await wait_all_tasks_blocked()
            for function, argument in [
                (wal.truncate_after, 1),
                (wal.truncate_after, 1),
                (wal.append, b"behind"),
                (wal.truncate_after, 2),
            ]:
                calls.append(Call(nursery, function, argument))
                await wait_all_tasks_blocked()
            files.release()
        assert [call.state for call in calls] == ["returned"] * 5
        assert await read_all(wal) == {1: b"flying", 2: b"behind"}


async def test_a_record_appended_behind_a_truncation_is_not_truncated(
    files: MemoryFiles,
) -> None:
    async with open_memory(files) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
            Call(nursery, wal.truncate_after, 0)
            await wait_all_tasks_blocked()
            behind = [Call(nursery, wal.append, b"behind")]
            await wait_all_tasks_blocked()
            behind.append(Call(nursery, wal.append, b"behind too"))
            await wait_all_tasks_blocked()
            files.release()
        assert [call.value for call in behind] == [1, 2]
        assert await read_all(wal) == {1: b"behind", 2: b"behind too"}


async def test_a_withdrawn_flush_does_not_take_another_one_with_it(files: MemoryFiles) -> None:
    async with open_memory(files, durability="none") as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
            first = Call(nursery, wal.flush)
            await wait_all_tasks_blocked()
            second = Call(nursery, wal.flush)
            await wait_all_tasks_blocked()
            second.scope.cancel()
            await wait_all_tasks_blocked()
            files.release()
        assert (first.value, second.state) == (1, "cancelled")
        assert wal.durable_lsn == 1


async def test_cancelling_a_task_in_mid_air_changes_nothing_for_the_others(
    files: MemoryFiles,
) -> None:
    """A random crowd, half of it cancelled at random: what returned is there, what was
    cancelled is not, and nothing is counted as waiting at the end."""
    rng = random.Random(7)
    for trial in range(30):
        disk = MemoryFiles(seed=trial)
        async with open_memory(disk, max_queue_size=4, max_batch_bytes=16) as wal:
            async with open_tasks(disk) as nursery:
                disk.hold()
                calls = []
                for number in range(16):
                    data = b"%d-%d" % (trial, number)
                    if rng.random() < 0.3:
                        calls.append((data, Call(nursery, wal.append_many, [data, data + b"'"])))
                    else:
                        calls.append((data, Call(nursery, wal.append, data)))
                    if rng.random() < 0.5:
                        await wait_all_tasks_blocked()
                    if rng.random() < 0.5:
                        rng.choice(calls)[1].scope.cancel()
                    if rng.random() < 0.2:
                        disk.release()
                        await wait_all_tasks_blocked()
                        disk.hold()
                disk.release()
            found = await read_all(wal)
            for data, call in calls:
                if call.state == "returned":
                    lsns = call.value if isinstance(call.value, range) else [call.value]
                    assert found[lsns[0]] == data
                    assert [lsn for lsn in found if found[lsn].rstrip(b"'") == data] == list(lsns)
                else:
                    assert call.state == "cancelled"
                    assert data not in found.values()
            statistics = wal.statistics()
            assert statistics.records_waiting == statistics.bytes_waiting == 0
            assert statistics.tasks_waiting_send == statistics.tasks_waiting_durable == 0
            assert statistics.records_appended == len(found)


# -- send_nowait ------------------------------------------------------------------


async def test_send_nowait_raises_would_block_when_full_and_counts_it(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files, max_queue_size=3, flush_interval=100) as wal:
        for number in range(3):
            wal.send_nowait(b"%d" % number)
        for _ in range(5):
            with pytest.raises(trio.WouldBlock):
                wal.send_nowait(b"no")
        assert wal.statistics().rejected == 5
        await wal.flush()
        wal.send_nowait(b"yes")
        await wal.flush()
        assert list((await read_all(wal)).values()) == [b"0", b"1", b"2", b"yes"]


async def test_a_full_queue_of_sent_records_is_written_without_waiting_for_the_interval(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    """The clock stands still: only the full queue can be the reason."""
    async with open_memory(files, max_queue_size=3, flush_interval=100) as wal:
        for number in range(3):
            wal.send_nowait(b"%d" % number)
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 3


async def test_the_queue_is_a_trio_memory_channel_of_the_size_that_was_asked_for() -> None:
    assert WriteQueue(Status("/log"), 17, 100, 100, 100).queued.statistics().max_buffer_size == 17
    unbounded = WriteQueue(Status("/log"), math.inf, 100, 100, 100)
    assert unbounded.queued.statistics().max_buffer_size == math.inf
