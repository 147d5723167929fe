"""The bound of the queue: the ancestor's five tests restated with content, and the bytes."""

from __future__ import annotations

import gc
import math
import random
import sys
import threading
from pathlib import Path

import pytest
import trio
from helpers import AfterEveryStep, Call, Disk, open_memory, open_tasks, read_all
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal.testing import MemoryFiles


async def stalled(
    wal: trio_wal.WriteAheadLog, files: MemoryFiles, nursery: trio.Nursery, data: bytes = b"first"
) -> Call:
    """Stall the disk with one record in flight: from now on the queue fills."""
    files.hold()
    call = Call(nursery, wal.append, data)
    await wait_all_tasks_blocked()
    assert wal.statistics().records_waiting == 0
    return call


# -- the ancestor's five ----------------------------------------------------------


async def test_a_full_queue_makes_writers_wait_and_then_resume(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=3) as wal:
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery, b"record 0")
            calls = []
            for number in range(1, 8):
                calls.append(Call(nursery, wal.append, b"record %d" % number))
                await wait_all_tasks_blocked()
            statistics = wal.statistics()
            assert statistics.records_waiting == 3
            assert statistics.tasks_waiting_send == 4
            assert [call.state for call in calls] == ["waiting"] * 7

            files.release()
            await wait_all_tasks_blocked()
        assert [call.value for call in calls] == [2, 3, 4, 5, 6, 7, 8]
        assert wal.statistics().tasks_waiting_send == 0
        assert await read_all(wal) == {n + 1: b"record %d" % n for n in range(8)}


@pytest.mark.parametrize(
    ("max_queue_size", "max_queue_bytes"), [(7, math.inf), (math.inf, 700), (7, 500)]
)
@pytest.mark.parametrize("max_batch_bytes", [250, 1 << 20])
async def test_200_tasks_never_exceed_the_capacity(
    files: MemoryFiles, max_queue_size: float, max_queue_bytes: float, max_batch_bytes: int
) -> None:
    async with open_memory(
        files,
        max_queue_size=max_queue_size,
        max_queue_bytes=max_queue_bytes,
        max_batch_bytes=max_batch_bytes,
    ) as wal:

        def check() -> None:
            statistics = wal.statistics()
            assert statistics.records_waiting <= max_queue_size
            assert statistics.bytes_waiting <= max_queue_bytes
            assert 0 <= statistics.queue_utilization <= 1

        async def write(task: int) -> None:
            for number in range(5):
                data = (b"%d:%d" % (task, number)).ljust(100, b".")
                if task % 2 or number % 2:
                    await wal.append(data)
                else:
                    await wal.send(data)

        with AfterEveryStep(check) as watch:
            async with open_tasks(files) as nursery:
                for task in range(200):
                    nursery.start_soon(write, task)
            await wal.flush()
        assert watch.steps > 500

        statistics = wal.statistics()
        # Not above, and with so many writers not below either.
        assert statistics.peak_records_waiting == min(max_queue_size, max_queue_bytes // 100)
        assert statistics.peak_bytes_waiting == statistics.peak_records_waiting * 100
        assert statistics.backpressure_waits > 0
        found = sorted((await read_all(wal)).values())
        assert found == sorted(
            (b"%d:%d" % (task, number)).ljust(100, b".")
            for task in range(200)
            for number in range(5)
        )


async def test_50_tasks_write_100_records_each_all_readable_and_in_order(disk: Disk) -> None:
    def data(task: int, number: int) -> bytes:
        return (b"task %d record %d " % (task, number)).ljust(100, b"x")

    given: dict[int, bytes] = {}

    async def write(task: int) -> None:
        before = 0
        for number in range(100):
            lsn = await wal.append(data(task, number))
            assert lsn > before
            assert lsn not in given
            given[lsn] = data(task, number)
            before = lsn

    async with disk.open(max_queue_size=20) as wal:
        async with trio.open_nursery() as nursery:
            for task in range(50):
                nursery.start_soon(write, task)
        assert sorted(given) == list(range(1, 5001))
        assert await read_all(wal) == given
    async with disk.open() as wal:
        found = await read_all(wal)
    assert found == given
    for task in range(50):
        mine = [r for r in found.values() if r.startswith(b"task %d " % task)]
        assert mine == [data(task, number) for number in range(100)]


async def test_overload_degrades_without_loss(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    """Ten times more than the disk takes, from writers of every kind: whoever is told yes
    finds the record in the log, whoever is told no does not."""
    accepted: list[bytes] = []
    refused: list[bytes] = []
    rng = random.Random(1)

    async def slow_disk() -> None:
        while True:
            files.hold()
            await trio.sleep(0.1)
            files.release()
            await trio.sleep(0.001)

    async def write(task: int) -> None:
        for number in range(20):
            data = b"%d/%d" % (task, number)
            kind = rng.randrange(4)
            if kind == 0:
                await wal.append(data)
            elif kind == 1:
                await wal.send(data)
            elif kind == 2:
                lsns = await wal.append_many([data, data])
                assert len(lsns) == 2
                accepted.append(data)
            else:
                try:
                    wal.send_nowait(data)
                except trio.WouldBlock:
                    refused.append(data)
                    await trio.sleep(0.01)
                    continue
            accepted.append(data)

    async with open_memory(files, max_queue_size=10) as wal:
        async with open_tasks(files) as nursery:
            nursery.start_soon(slow_disk)
            async with trio.open_nursery() as writers:
                for task in range(40):
                    writers.start_soon(write, task)
            nursery.cancel_scope.cancel()
        files.release()
        await wal.flush()
        statistics = wal.statistics()
        assert statistics.rejected == len(refused) > 0
        assert statistics.backpressure_waits > 0
        assert statistics.backpressure_seconds > 0
        assert statistics.peak_records_waiting <= 10
        assert sorted((await read_all(wal)).values()) == sorted(accepted)
    async with open_memory(files) as wal:
        assert sorted((await read_all(wal)).values()) == sorted(accepted)


async def test_the_counters_are_exact_at_each_step(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files, max_queue_size=2, max_queue_bytes=100) as wal:

        def counters() -> tuple[float, ...]:
            s = wal.statistics()
            return (
                s.records_waiting,
                s.bytes_waiting,
                s.tasks_waiting_send,
                s.tasks_waiting_durable,
                s.backpressure_waits,
                s.rejected,
                s.records_appended,
            )

        assert counters() == (0, 0, 0, 0, 0, 0, 0)
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            assert counters() == (0, 0, 0, 1, 0, 0, 0)

            Call(nursery, wal.append, b"ten bytes.")
            await wait_all_tasks_blocked()
            assert counters() == (1, 10, 0, 2, 0, 0, 0)

            wal.send_nowait(b"five.")
            assert counters() == (2, 15, 0, 2, 0, 0, 0)
            assert wal.statistics().queue_utilization == 1.0

            with pytest.raises(trio.WouldBlock):
                wal.send_nowait(b"no")
            assert counters() == (2, 15, 0, 2, 0, 1, 0)

            blocked = Call(nursery, wal.send, b"blocked")
            await wait_all_tasks_blocked()
            assert counters() == (2, 15, 1, 2, 1, 1, 0)

            Call(nursery, wal.append, b"blocked too")
            await wait_all_tasks_blocked()
            assert counters() == (2, 15, 2, 2, 2, 1, 0)

            mock_clock.jump(1.5)
            blocked.scope.cancel()
            # At once, before the task has run.
            assert counters() == (2, 15, 1, 2, 2, 1, 0)
            assert wal.statistics().backpressure_seconds == 1.5
            await wait_all_tasks_blocked()

            mock_clock.jump(0.25)
            files.release()
            await wait_all_tasks_blocked()
            assert counters() == (0, 0, 0, 0, 2, 1, 4)
            assert wal.statistics().backpressure_seconds == 1.5 + 1.75
        statistics = wal.statistics()
        assert statistics.peak_records_waiting == 2
        assert statistics.peak_bytes_waiting == 15
        assert statistics.queue_utilization == 0.0
        assert statistics.bytes_appended == len(b"firstten bytes.five.blocked too")
        assert list((await read_all(wal)).values()) == [
            b"first",
            b"ten bytes.",
            b"five.",
            b"blocked too",
        ]


# -- the bound in bytes -----------------------------------------------------------


async def test_the_bound_in_bytes_blocks_and_is_met_exactly(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_bytes=100) as wal, open_tasks(files) as nursery:
        await stalled(wal, files, nursery)
        wal.send_nowait(bytes(60))
        with pytest.raises(trio.WouldBlock):
            wal.send_nowait(bytes(41))
        wal.send_nowait(bytes(40))
        assert wal.statistics().bytes_waiting == 100
        assert wal.statistics().queue_utilization == 1.0
        # A record of no bytes takes none; the bound in records is far.
        wal.send_nowait(b"")
        with pytest.raises(trio.WouldBlock):
            wal.send_nowait(b"1")
        call = Call(nursery, wal.append, b"1")
        await wait_all_tasks_blocked()
        assert wal.statistics().tasks_waiting_send == 1
        files.release()
        await wait_all_tasks_blocked()
        assert call.value == 5


async def test_one_larger_record_passes_alone(files: MemoryFiles) -> None:
    large = bytes(range(256)) * 4
    async with open_memory(files, max_queue_bytes=100) as wal:
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            wal.send_nowait(large)
            assert wal.statistics().bytes_waiting == 1024
            assert wal.statistics().queue_utilization == 1.0
            with pytest.raises(trio.WouldBlock):
                wal.send_nowait(b"")
            # The second one waits until nothing else does.
            second = Call(nursery, wal.append, large)
            await wait_all_tasks_blocked()
            small = Call(nursery, wal.append, b"small")
            await wait_all_tasks_blocked()
            assert wal.statistics().tasks_waiting_send == 2
            files.release()
            await wait_all_tasks_blocked()
        assert (second.value, small.value) == (3, 4)
        assert wal.statistics().peak_bytes_waiting == 1024
        assert await read_all(wal) == {1: b"first", 2: large, 3: large, 4: b"small"}


async def test_a_unit_larger_than_the_queue_passes_alone(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=3) as wal:
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            wal.send_nowait(b"waits")
            unit = Call(nursery, wal.append_many, [b"%d" % n for n in range(10)])
            await wait_all_tasks_blocked()
            after = Call(nursery, wal.append, b"after")
            await wait_all_tasks_blocked()
            assert wal.statistics().tasks_waiting_send == 2
            files.release()
            await wait_all_tasks_blocked()
        assert unit.value == range(3, 13)
        assert after.value == 13
        assert wal.statistics().peak_records_waiting == 10


async def test_an_unbounded_queue_never_blocks(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=math.inf, max_queue_bytes=math.inf) as wal:
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            for number in range(20_000):
                wal.send_nowait(b"%d" % number)
            statistics = wal.statistics()
            assert statistics.records_waiting == 20_000
            assert statistics.queue_utilization == 0.0
            assert statistics.max_queue_size == math.inf
            files.release()
        assert await wal.flush() == 20_001


# -- send -------------------------------------------------------------------------


async def test_send_returns_when_accepted_and_blocks_when_full(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=2) as wal, open_tasks(files) as nursery:
        await stalled(wal, files, nursery)
        await wal.send(b"one")
        await wal.send(b"two")
        with trio.move_on_after(0) as scope:
            await wal.send(b"withdrawn")
        assert scope.cancelled_caught
        third = Call(nursery, wal.send, b"three")
        await wait_all_tasks_blocked()
        assert third.state == "waiting"
        files.release()
        await wait_all_tasks_blocked()
        assert third.state == "returned"
        assert third.value is None
        await wal.flush()
        assert list((await read_all(wal)).values()) == [b"first", b"one", b"two", b"three"]


# -- a slow disk ------------------------------------------------------------------


async def test_a_stalled_disk_keeps_no_more_than_the_queue_and_one_batch(
    files: MemoryFiles,
) -> None:
    payloads = [b"number %d" % number for number in range(10_000)]

    def counts() -> list[int]:
        return [sys.getrefcount(payload) for payload in payloads]

    unused = max(counts())

    def kept() -> int:
        """How many are kept by others than the list, and than who asks."""
        return sum(count > unused for count in counts())

    async def write_many() -> None:
        for payload in payloads:
            await wal.send(payload)

    async with open_memory(files, max_queue_size=50, flush_interval=0) as wal:
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            nursery.start_soon(write_many)
            await wait_all_tasks_blocked()
            gc.collect()
            assert kept() == 50 + 1  # the queue, and the argument of the blocked send
            files.release()
        await wal.flush()
        await wait_all_tasks_blocked()
        gc.collect()
        assert kept() == 0
        assert wal.last_lsn == 10_001


async def test_the_loop_stays_responsive_while_a_sync_takes_a_minute(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    ticks = []

    async def tick() -> None:
        while True:
            await trio.sleep(1)
            ticks.append(trio.current_time())

    async with open_memory(files) as wal, open_tasks(files) as nursery:
        nursery.start_soon(tick)
        call = await stalled(wal, files, nursery)
        await trio.sleep(60.5)
        assert len(ticks) == 60
        assert call.state == "waiting"
        assert wal.durable_lsn == 0
        files.release()
        await wait_all_tasks_blocked()
        assert call.value == 1
        nursery.cancel_scope.cancel()


async def test_the_loop_runs_while_the_real_disk_blocks_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow_sync(fd: int) -> None:
        entered.set()
        assert leave.wait(60)

    async with trio_wal.open_wal(f"{tmp_path}/log") as wal, trio.open_nursery() as nursery:
        try:
            monkeypatch.setattr("trio_wal._system.files.sync_file", slow_sync)
            call = Call(nursery, wal.append, b"record")
            await trio.to_thread.run_sync(entered.wait)
            queued = Call(nursery, wal.append, b"queued")
            for _ in range(1000):
                await trio.lowlevel.checkpoint()
            assert (call.state, queued.state) == ("waiting", "waiting")
            assert wal.durable_lsn == 0
            assert await read_all(wal) == {}
        finally:
            leave.set()
    assert (call.value, queued.value) == (1, 2)
