"""Writers with a share: lines, turns, limits, the fast lane, and every promise in each line."""

from __future__ import annotations

import errno
import gc
import math
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
from helpers import LOG, AfterEveryStep, Call, open_memory, open_tasks, read_all
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

import trio_wal
from trio_wal import LogFailedError, LogFullError, RecordTooLargeError
from trio_wal.testing import MemoryFiles


async def stalled(wal: Any, files: MemoryFiles, nursery: trio.Nursery) -> Call:
    """Stall the disk with one record in flight: from now on the queue fills."""
    files.hold()
    call = Call(nursery, wal.append, b"first")
    await wait_all_tasks_blocked()
    assert wal.statistics().records_waiting == 0
    return call


async def calls_of(
    nursery: trio.Nursery, call: Callable[[bytes], Any], name: str, count: int
) -> list[Call]:
    """So many calls in tasks of their own, one after the other."""
    calls = []
    for number in range(count):
        calls.append(Call(nursery, call, b"%s%d" % (name.encode(), number)))
        await wait_all_tasks_blocked()
    return calls


async def letters(wal: Any) -> str:
    """Of which writer each record is, in the order of LSNs, without the first."""
    return b"".join(data[:1] for data in list((await read_all(wal)).values())[1:]).decode()


# -- what a writer can do ---------------------------------------------------------


async def test_a_writer_writes_like_the_log(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, wal.writer("w") as w:
        assert await w.append(b"1") == 1
        assert await w.append_many([b"2", b"3"]) == range(2, 4)
        assert await w.append_many([]) == range(4, 4)
        await w.send(b"4")
        w.send_nowait(b"5")
        assert await w.flush() == 5
        assert list((await read_all(wal)).values()) == [b"1", b"2", b"3", b"4", b"5"]
        assert repr(w) == "<Writer 'w' of '/log' open>"
    assert repr(w) == "<Writer 'w' of '/log' closed>"


@pytest.mark.parametrize("priority", ["normal", "high"])
async def test_every_method_is_a_checkpoint(files: MemoryFiles, priority: str) -> None:
    async with open_memory(files) as wal, wal.writer("w", priority=priority) as w:
        for call in (
            lambda: w.append(b"1"),
            lambda: w.append_many([b"2"]),
            lambda: w.append_many([]),
            lambda: w.send(b"3"),
            w.flush,
        ):
            with assert_checkpoints():
                await call()
        with assert_checkpoints():
            async with wal.writer("x"):
                pass


async def test_a_writer_has_statistics_of_its_own(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files, max_queue_size=10) as wal:
        async with wal.writer("a", max_queue_size=2, max_queue_bytes=50) as a, wal.writer("b") as b:
            async with open_tasks(files) as nursery:
                await stalled(wal, files, nursery)
                await calls_of(nursery, a.append, "aa", 2)
                await calls_of(nursery, wal.append, "main", 1)
                blocked = await calls_of(nursery, a.append, "aa", 2)
                with pytest.raises(trio.WouldBlock):
                    a.send_nowait(b"no")
                mock_clock.jump(0.3)
                blocked[1].scope.cancel()
                await wait_all_tasks_blocked()
                s = a.statistics()
                assert s == wal.statistics().writers["a"]
                assert (s.name, s.priority) == ("a", "normal")
                assert (s.max_queue_size, s.max_queue_bytes) == (2, 50)
                assert (s.records_waiting, s.bytes_waiting) == (2, 6)
                assert (s.tasks_waiting_send, s.backpressure_waits) == (1, 2)
                assert s.backpressure_seconds == 0.3
                assert [n for bound, n in s.backpressure_seconds_histogram if n] == [1]
                assert s.rejected == wal.statistics().rejected == 1
                assert s.records_appended == 0
                mock_clock.jump(0.2)
                files.release()
                await wait_all_tasks_blocked()
            s = a.statistics()
            assert (s.records_waiting, s.bytes_waiting) == (0, 0)
            assert (s.peak_records_waiting, s.peak_bytes_waiting) == (2, 6)
            assert (s.records_appended, s.bytes_appended) == (3, 9)
            assert s.backpressure_seconds == 0.8
            assert dict(s.backpressure_seconds_histogram) == {
                bound: 2 if bound == 0.5 else 0 for bound, _ in s.backpressure_seconds_histogram
            }
            whole = wal.statistics()
            assert (whole.backpressure_waits, whole.backpressure_seconds) == (2, 0.8)
            assert whole.backpressure_seconds_histogram == s.backpressure_seconds_histogram
            assert b.statistics().records_appended == 0
            assert set(whole.writers) == {"a", "b"}
        assert wal.statistics().writers == {}
        assert wal.statistics().backpressure_waits == 2
        assert a.statistics() == s


# -- shares and turns -------------------------------------------------------------


async def test_whoever_finds_its_share_full_delays_nobody_else(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, wal.writer("a", max_queue_size=2) as a:
        async with wal.writer("b") as b, open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            mine = await calls_of(nursery, a.append, "a", 5)
            assert a.statistics().tasks_waiting_send == 3
            # Whoever comes later in other lines does not wait.
            wal.send_nowait(b"m")
            await wal.send(b"m")
            b.send_nowait(b"b")
            with pytest.raises(trio.WouldBlock):
                a.send_nowait(b"a")
            assert wal.statistics().records_waiting == 5
            files.release()
            await wait_all_tasks_blocked()
        assert [call.state for call in mine] == ["returned"] * 5
        assert [call.value for call in mine] == sorted(call.value for call in mine)
        assert await letters(wal) == "aammbaaa"
        assert a.statistics().peak_records_waiting == 2


async def test_a_share_in_bytes_lets_one_larger_record_pass_alone(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, wal.writer("a", max_queue_bytes=10) as a:
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            large = Call(nursery, a.append, b"a" * 100)
            await wait_all_tasks_blocked()
            small = Call(nursery, a.append, b"a")
            await wait_all_tasks_blocked()
            assert (a.statistics().records_waiting, a.statistics().tasks_waiting_send) == (1, 1)
            large.scope.cancel()
            # At once, before the task has run.
            assert (a.statistics().records_waiting, a.statistics().tasks_waiting_send) == (1, 0)
            assert a.statistics().bytes_waiting == 1
            files.release()
        assert (large.state, small.value) == ("cancelled", 2)


async def test_a_full_queue_is_shared_by_turns(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=6) as wal:
        async with wal.writer("a") as a, wal.writer("b") as b, open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            for _ in range(6):
                wal.send_nowait(b".")
            greedy = await calls_of(nursery, wal.append, "m", 20)
            await calls_of(nursery, a.append, "a", 4)
            await calls_of(nursery, b.send, "b", 3)
            files.after_operation = lambda operation, path: operation == "sync" and files.hold()
            files.release()
            await wait_all_tasks_blocked()
            # Six were let in when the first of all was taken; the next six when those were.
            assert wal.statistics().tasks_waiting_send == 27 - 6
            files.after_operation = None
            files.release()
        order = (await letters(wal)).lstrip(".")
        assert order == "mabmabmabma" + "m" * 16
        assert [call.value for call in greedy] == sorted(call.value for call in greedy)


async def test_turns_are_counted_in_records(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=4) as wal, wal.writer("u") as u:
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            for _ in range(4):
                wal.send_nowait(b".")
            await calls_of(nursery, wal.append, "m", 9)
            for number in range(3):
                Call(nursery, u.append_many, [b"u%d" % number] * 3)
                await wait_all_tasks_blocked()
            files.release()
        order = (await letters(wal)).lstrip(".")
        # The queue has room for one of either and one unit: then it is full for both.
        assert order.count("u") == 9
        for end in range(len(order)):
            start = order[:end]
            if start.count("m") < 9 and start.count("u") < 9:
                assert abs(start.count("u") - start.count("m")) <= 4, order


async def test_a_line_that_was_idle_has_saved_nothing_up(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=2) as wal:
        async with wal.writer("a") as a, wal.writer("b") as b:
            async with open_tasks(files) as nursery:
                for _ in range(3):
                    files.hold()
                    await calls_of(nursery, a.append, "x", 10)
                    files.release()
                    await wait_all_tasks_blocked()
            before = wal.last_lsn - 1
            async with open_tasks(files) as nursery:
                files.hold()
                await calls_of(nursery, a.append, "a", 9)
                await calls_of(nursery, b.append, "b", 6)
                files.release()
        order = (await letters(wal))[before:]
        assert order == "aaa" + "ab" * 6


async def test_a_greedy_line_does_not_starve_the_others(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    """500 greedy tasks and one polite one: with a writer it waits for its turn, not for theirs."""
    waits: list[float] = []

    async def slow_disk() -> None:
        files.after_operation = lambda operation, path: operation == "sync" and files.hold()
        files.hold()
        while True:
            await trio.sleep(0.01)
            files.release()

    async def greedy() -> None:
        while True:
            await wal.append(b"greedy")

    async with (
        open_memory(files, max_queue_size=50) as wal,
        wal.writer("polite") as polite,
        open_tasks(files) as nursery,
    ):
        nursery.start_soon(slow_disk)
        for _ in range(500):
            nursery.start_soon(greedy)
        await trio.sleep(0.1)
        for _ in range(20):
            start = trio.current_time()
            await polite.append(b"polite")
            waits.append(trio.current_time() - start)
        nursery.cancel_scope.cancel()
        files.after_operation = None
        files.release()
    # The round under way and its own; in the log's own line it would be ten.
    assert max(waits) < 0.035


@pytest.mark.parametrize("priority", ["normal", "high"])
async def test_200_tasks_in_many_lines_never_exceed_any_limit(
    files: MemoryFiles, priority: str
) -> None:
    rng = random.Random(5)
    limits = [(None, None), (1, None), (3, 250), (None, 120), (7, 700)]
    queue = {"max_queue_size": 8, "max_queue_bytes": 900, "max_batch_bytes": 250}
    accepted: list[bytes] = []

    async with open_memory(files, **queue) as wal:
        async with (
            wal.writer("0") as w0,
            wal.writer("1", max_queue_size=1) as w1,
            wal.writer("2", max_queue_size=3, max_queue_bytes=250, priority=priority) as w2,
            wal.writer("3", max_queue_bytes=120) as w3,
            wal.writer("4", max_queue_size=7, max_queue_bytes=700, priority=priority) as w4,
        ):
            writers = [w0, w1, w2, w3, w4]

            def check() -> None:
                whole = wal.statistics()
                assert whole.records_waiting <= 8
                assert whole.bytes_waiting <= 900
                parts = whole.writers.values()
                assert sum(part.records_waiting for part in parts) <= whole.records_waiting
                assert sum(part.tasks_waiting_send for part in parts) <= whole.tasks_waiting_send
                for (size, length), part in zip(limits, parts, strict=True):
                    assert part.records_waiting <= (size or 8)
                    assert part.bytes_waiting <= (length or 900)
                    assert part.records_waiting >= 0
                    assert part.bytes_waiting >= 0

            async def write(task: int) -> None:
                through = [*writers, wal][task % 6]
                for number in range(5):
                    data = (b"%d:%d" % (task, number)).ljust(100, b".")
                    scope = trio.CancelScope()
                    if rng.random() < 0.2:
                        scope.deadline = trio.current_time() - rng.choice([0, 1])
                    with scope:
                        if rng.random() < 0.5:
                            await through.append(data)
                        else:
                            await through.send(data)
                        accepted.append(data)

            with AfterEveryStep(check) as watch:
                async with open_tasks(files) as nursery:
                    for task in range(200):
                        nursery.start_soon(write, task)
                await wal.flush()
            assert watch.steps > 500
            statistics = wal.statistics()
            assert statistics.records_waiting == 0
            assert {part.records_waiting for part in statistics.writers.values()} == {0}
            assert {part.bytes_waiting for part in statistics.writers.values()} == {0}
        found = list((await read_all(wal)).values())
    assert sorted(found) == sorted(accepted)
    for task in range(200):
        mine = b"%d:" % task
        assert [r for r in found if r.startswith(mine)] == sorted(
            r for r in found if r.startswith(mine)
        )


# -- the fast lane ----------------------------------------------------------------


async def test_the_reserve_is_kept_while_there_is_a_high_writer(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=10, reserve=0.2) as wal:
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            async with wal.writer("h", priority="high") as h:
                for _ in range(8):
                    wal.send_nowait(b".")
                for _ in range(2):
                    with pytest.raises(trio.WouldBlock):
                        wal.send_nowait(b"n")
                    h.send_nowait(b"h")
                with pytest.raises(trio.WouldBlock):
                    h.send_nowait(b"n")
                blocked = Call(nursery, wal.append, b"b")
                await wait_all_tasks_blocked()
                assert wal.statistics().records_waiting == 10
                assert h.statistics().rejected == 1
            files.release()
        assert blocked.value == 12
        # Without one it is everybody's.
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            for _ in range(10):
                wal.send_nowait(b".")
            files.release()


async def test_closing_the_high_writer_lets_in_who_waited_for_its_reserve(
    files: MemoryFiles,
) -> None:
    async with (
        open_memory(files, max_queue_size=4, reserve=0.5) as wal,
        open_tasks(files) as nursery,
    ):
        await stalled(wal, files, nursery)
        async with wal.writer("h", priority="high"):
            await calls_of(nursery, wal.append, "m", 5)
            assert wal.statistics().records_waiting == 2
        assert wal.statistics().records_waiting == 4
        assert wal.statistics().tasks_waiting_send == 1
        files.release()


async def test_high_priority_is_let_in_first_and_one_in_nine_is_normal(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=20, reserve=0.0) as wal:
        async with wal.writer("h", priority="high") as h, open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            for _ in range(20):
                wal.send_nowait(b".")
            normal = await calls_of(nursery, wal.append, "n", 3)
            await calls_of(nursery, h.append, "h", 30)
            files.release()
            await wait_all_tasks_blocked()
        order = (await letters(wal)).lstrip(".")
        assert order == "hhhhhhhhn" * 3 + "h" * 6
        assert [call.state for call in normal] == ["returned"] * 3


async def test_what_has_come_in_past_a_waiting_line_counts_too(files: MemoryFiles) -> None:
    """A high writer that never waits because of its reserve lets one of nine in all the same."""
    async with open_memory(files, max_queue_size=40, reserve=0.5) as wal:
        async with wal.writer("h", priority="high") as h, open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            for _ in range(20):
                wal.send_nowait(b".")
            await calls_of(nursery, wal.append, "n", 5)
            assert wal.statistics().tasks_waiting_send == 5
            for number in range(1, 18):
                h.send_nowait(b"h")
                assert wal.statistics().tasks_waiting_send == 5 - number // 8
            files.release()
        assert (await letters(wal)).lstrip(".") == "hhhhhhhhnhhhhhhhhnhnnn"


async def test_high_priority_goes_into_the_next_batch_that_is_taken(files: MemoryFiles) -> None:
    """Past 40 batches of one record each, which are accepted and wait."""
    async with open_memory(files, max_batch_bytes=10) as wal:
        async with wal.writer("h", priority="high") as h, open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            normal = [Call(nursery, wal.append, b"n" * 10) for _ in range(40)]
            await wait_all_tasks_blocked()
            (high,) = await calls_of(nursery, h.append, "h", 1)
            files.release()
        assert high.value == 2
        assert sorted(call.value for call in normal) == list(range(3, 43))


async def test_batches_of_high_priority_do_not_starve_the_others(files: MemoryFiles) -> None:
    """However many come: at least every second batch is a normal one."""
    async with open_memory(files, max_batch_bytes=10) as wal:
        async with wal.writer("h", priority="high") as h, open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            for _ in range(10):
                wal.send_nowait(b"n" * 10)
            for _ in range(20):
                h.send_nowait(b"h" * 10)
            files.release()
            await wal.flush()
        assert await letters(wal) == "hn" * 10 + "h" * 10


async def test_one_high_line_keeps_its_order_across_batches(files: MemoryFiles) -> None:
    rng = random.Random(3)
    given: list[bytes] = []
    async with open_memory(files, max_batch_bytes=30) as wal:
        async with wal.writer("h", priority="high") as h, open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            for number in range(200):
                if rng.random() < 0.5:
                    wal.send_nowait(b"n" * rng.randint(1, 30))
                else:
                    data = (b"h%d" % number).ljust(rng.randint(4, 30), b".")
                    h.send_nowait(data)
                    given.append(data)
            files.release()
            await wal.flush()
        found = [data for data in (await read_all(wal)).values() if data.startswith(b"h")]
    assert found == given


async def test_the_flush_of_a_high_writer_waits_for_its_records_only(files: MemoryFiles) -> None:
    async with (
        open_memory(files, max_batch_bytes=10) as wal,
        wal.writer("h", priority="high") as h,
        open_tasks(files) as nursery,
    ):
        await stalled(wal, files, nursery)
        for _ in range(5):
            wal.send_nowait(b"n" * 10)
        h.send_nowait(b"h" * 10)
        h.send_nowait(b"h" * 10)
        flush = Call(nursery, h.flush)
        await wait_all_tasks_blocked()
        files.after_operation = lambda operation, path: operation == "sync" and files.hold()
        for _ in range(3):
            assert flush.state == "waiting"
            files.release()
            await wait_all_tasks_blocked()
        # The first of all, h, n, h: the hold is after each sync.
        files.release()
        await wait_all_tasks_blocked()
        assert flush.state == "returned"
        assert wal.durable_lsn == 4
        assert await letters(wal) == "hnh"
        files.after_operation = None
        files.release()


async def test_a_truncation_is_not_overtaken(files: MemoryFiles) -> None:
    """What comes after the call of a truncation is not written before it, and lost."""
    async with open_memory(files, max_batch_bytes=10) as wal:
        async with wal.writer("h", priority="high") as h, open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            wal.send_nowait(b"n" * 10)
            wal.send_nowait(b"n" * 10)
            cut = Call(nursery, wal.truncate_after, 1)
            await wait_all_tasks_blocked()
            high = Call(nursery, h.append, b"h")
            await wait_all_tasks_blocked()
            files.release()
        assert (cut.state, high.value) == ("returned", 2)
        assert list((await read_all(wal)).values()) == [b"first", b"h"]


# -- cancellation -----------------------------------------------------------------


@pytest.mark.parametrize("priority", ["normal", "high"])
async def test_cancelled_means_absent_in_every_line(files: MemoryFiles, priority: str) -> None:
    async with (
        open_memory(files, max_queue_size=4, max_batch_bytes=8, reserve=0.0) as wal,
        wal.writer("w", priority=priority) as w,
    ):
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            calls = await calls_of(nursery, w.append, "w", 8)
            unit = Call(nursery, w.append_many, [b"u", b"u"])
            await wait_all_tasks_blocked()
            assert w.statistics().records_waiting == 4
            for number in (1, 6, 0):
                calls[number].scope.cancel()
            unit.scope.cancel()
            s = w.statistics()
            assert (s.records_waiting, s.tasks_waiting_send) == (4, 1)
            assert wal.statistics().records_waiting == 4
            await wait_all_tasks_blocked()
            files.release()
        states = ["cancelled" if n in (0, 1, 6) else "returned" for n in range(8)]
        assert [call.state for call in calls] == states
        found = list((await read_all(wal)).values())
        assert found == [b"first"] + [b"w%d" % n for n in (2, 3, 4, 5, 7)]
        assert w.statistics().records_appended == 5
        assert w.statistics().records_waiting == 0


async def test_what_is_being_written_is_waited_for(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, wal.writer("w") as w:
        async with open_tasks(files) as nursery:
            files.hold()
            call = Call(nursery, w.append, b"w")
            await wait_all_tasks_blocked()
            call.scope.cancel()
            await wait_all_tasks_blocked()
            assert call.state == "waiting"
            files.release()
        assert (call.state, call.value) == ("returned", 1)


# -- failure, full disks, the end -------------------------------------------------


@pytest.mark.parametrize("priority", ["normal", "high"])
async def test_a_failure_is_told_in_every_line(files: MemoryFiles, priority: str) -> None:
    async with (
        open_memory(files, max_queue_size=2, reserve=0.0) as wal,
        wal.writer("w", priority=priority) as w,
        open_tasks(files) as nursery,
    ):
        files.hold()
        calls = await calls_of(nursery, w.append, "w", 5)
        blocked = Call(nursery, w.send, b"sent")
        await wait_all_tasks_blocked()
        files.fail("sync", errno.EIO)
        files.release()
        await wait_all_tasks_blocked()
        outcomes = []
        for call in (*calls, blocked):
            assert isinstance(call.error, LogFailedError)
            assert isinstance(call.error.__cause__, OSError)
            outcomes.append(call.error.outcome)
        assert outcomes == ["unknown"] + ["not written"] * 5
        s = w.statistics()
        assert (s.records_waiting, s.bytes_waiting, s.tasks_waiting_send) == (0, 0, 0)
        assert s.records_appended == 0
        for call in (w.append, w.send):
            with pytest.raises(LogFailedError):
                await call(b"more")


@pytest.mark.parametrize("priority", ["normal", "high"])
async def test_a_full_disk_refuses_in_every_line_and_keeps_what_was_sent(
    files: MemoryFiles, priority: str
) -> None:
    async with (
        open_memory(files, max_queue_size=3, segment_size=1, reserve=0.0) as wal,
        wal.writer("w", priority=priority) as w,
    ):
        async with open_tasks(files) as nursery:
            files.free_bytes = 0
            refused: list[LogFullError] = []
            while not refused:
                try:
                    await w.append(bytes(600))
                except LogFullError as exc:
                    refused.append(exc)
            before = wal.last_lsn
            files.free_bytes = math.inf
            await w.append(b"again")
            files.free_bytes = 0
            files.hold()
            fill = Call(nursery, w.append, bytes(30_000))
            await wait_all_tasks_blocked()
            w.send_nowait(b"sent")
            waits = await calls_of(nursery, w.append, "w", 2)
            blocked = await calls_of(nursery, w.append, "b", 2)
            files.release()
            await wait_all_tasks_blocked()
            for call in (fill, *waits, *blocked):
                assert isinstance(call.error, LogFullError), call
            assert w.statistics().records_waiting == 1
            assert w.statistics().bytes_waiting == 4
            assert wal.statistics().records_waiting == 1
            with pytest.raises(LogFullError):
                w.send_nowait(b"no")
            files.free_bytes = math.inf
            assert await w.flush() == before + 2
            assert w.statistics().records_waiting == 0
        assert (await read_all(wal))[before + 2] == b"sent"


async def test_closing_the_log_drains_every_line(files: MemoryFiles) -> None:
    async with (
        open_memory(files, max_queue_size=2, reserve=0.0) as wal,
        wal.writer("w") as w,
        wal.writer("h", priority="high") as h,
    ):
        async with open_tasks(files) as nursery:
            files.hold()
            calls = await calls_of(nursery, w.append, "w", 4)
            high = await calls_of(nursery, h.append, "h", 1)
            closing = Call(nursery, wal.aclose)
            await wait_all_tasks_blocked()
            assert isinstance(calls[3].error, trio.ClosedResourceError)
            assert isinstance(high[0].error, trio.ClosedResourceError)
            files.release()
        assert closing.state == "returned"
        assert [call.value for call in calls[:3]] == [1, 2, 3]
        for writer in (w, h):
            with pytest.raises(trio.ClosedResourceError):
                await writer.append(b"late")
    async with open_memory(files) as wal:
        assert len(await read_all(wal)) == 3


async def test_leaving_the_block_keeps_what_was_accepted(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=3) as wal:
        async with open_tasks(files) as nursery:
            await stalled(wal, files, nursery)
            async with wal.writer("w", max_queue_size=2) as w:
                w.send_nowait(b"sent")
                calls = await calls_of(nursery, w.append, "w", 3)
            await wait_all_tasks_blocked()
            assert calls[0].state == "waiting"
            for call in calls[1:]:
                assert isinstance(call.error, trio.ClosedResourceError)
            # The name is free, and the new share is a whole one.
            async with wal.writer("w", max_queue_size=1) as again:
                again.send_nowait(b"x")
                assert again.statistics().records_waiting == 1
                calls[0].scope.cancel()
                assert again.statistics().records_waiting == 1
                assert w.statistics().records_waiting == 1
            files.release()
            await wal.flush()
        assert await letters(wal) == "sx"
        assert w.statistics().records_appended == 1


async def test_nothing_keeps_the_payload_once_it_is_written(files: MemoryFiles) -> None:
    payload = b"payload %d" % random.getrandbits(64)
    unused = sys.getrefcount(payload)
    gc.collect()
    gc.disable()
    try:
        async with (
            open_memory(files, flush_interval=0) as wal,
            wal.writer("w") as w,
            wal.writer("h", priority="high") as h,
        ):
            for writer in (w, h):
                await writer.append(payload)
                await writer.send(payload)
                await writer.append_many([payload])
                await writer.flush()
            await wait_all_tasks_blocked()
            assert sys.getrefcount(payload) == unused
    finally:
        gc.enable()


# -- bad input --------------------------------------------------------------------

WRONG: list[tuple[type[Exception], dict[str, Any], str]] = [
    (TypeError, {"name": 3}, r"^name must be a str, not int$"),
    (TypeError, {"name": None}, r"^name must be a str, not NoneType$"),
    (ValueError, {"name": ""}, r"^name must not be empty$"),
    (ValueError, {"name": "used"}, r"^name must be unique: there is already a writer 'used'$"),
    (TypeError, {"priority": 1}, r"^priority must be a str, not int$"),
    (ValueError, {"priority": "urgent"}, r"^priority must be one of 'normal', 'high', not 'urg"),
    (TypeError, {"max_queue_size": "1"}, r"^max_queue_size must be an int, not str$"),
    (TypeError, {"max_queue_size": 1.5}, r"^max_queue_size must be an int or math.inf, not 1.5$"),
    (ValueError, {"max_queue_size": 0}, r"^max_queue_size must be at least 1, not 0$"),
    (ValueError, {"max_queue_size": 101}, r"^max_queue_size must be at most the queue's, which"),
    (ValueError, {"max_queue_size": math.inf}, r"^max_queue_size must be at most the queue's, wh"),
    (TypeError, {"max_queue_bytes": True}, r"^max_queue_bytes must be an int, not bool$"),
    (ValueError, {"max_queue_bytes": -1}, r"^max_queue_bytes must be at least 1, not -1$"),
    (ValueError, {"max_queue_bytes": 1001}, r"^max_queue_bytes must be at most the queue's, which"),
]


@pytest.mark.parametrize(("error", "arguments", "message"), WRONG)
async def test_bad_arguments_are_refused_by_name_before_anything_changes(
    files: MemoryFiles, error: type[Exception], arguments: dict[str, Any], message: str
) -> None:
    async with open_memory(files, max_queue_size=100, max_queue_bytes=1000) as wal:
        async with wal.writer("used"):
            with pytest.raises(error, match=message):
                wal.writer(**{"name": "w", **arguments})
            assert set(wal.statistics().writers) == {"used"}
        async with wal.writer("w", max_queue_size=100, max_queue_bytes=1000):
            pass


@pytest.mark.parametrize(
    ("error", "reserve", "message"),
    [
        (TypeError, "0.1", r"^reserve must be a number, not str$"),
        (TypeError, True, r"^reserve must be a number, not bool$"),
        (ValueError, -0.1, r"^reserve must be at least 0 and at most 0.9, not -0.1$"),
        (ValueError, 0.91, r"^reserve must be at least 0 and at most 0.9, not 0.91$"),
        (ValueError, math.nan, r"^reserve must be at least 0 and at most 0.9, not nan$"),
    ],
)
@pytest.mark.parametrize("open_", [trio_wal.open_wal, trio_wal.open_database])
def test_a_reserve_outside_0_to_0_9_is_refused(
    files: MemoryFiles, open_: Any, error: type[Exception], reserve: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        open_(LOG, files=files, reserve=reserve)


async def test_a_name_may_be_taken_between_the_call_and_the_block(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        late = wal.writer("w")
        async with wal.writer("w"):
            with pytest.raises(
                ValueError, match=r"^name must be unique: there is already a writer"
            ):
                await late.__aenter__()
        # That was no use of it.
        async with late as w:
            await w.append(b"x")
        with pytest.raises(RuntimeError, match="can be used only once"):
            await late.__aenter__()


async def test_a_writer_is_no_use_after_its_block(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        async with wal.writer("w") as w:
            pass
        closed = pytest.raises(trio.ClosedResourceError, match=r"^writer w: its block was left$")
        for call in (
            lambda: w.append(b""), lambda: w.append_many([b""]), lambda: w.send(b""), w.flush
        ):  # fmt: skip
            with closed:
                await call()
        with closed:
            w.send_nowait(b"")
        assert wal.last_lsn == 0


async def test_a_writer_checks_what_it_is_given(files: MemoryFiles) -> None:
    async with open_memory(files, max_record_size=10) as wal, wal.writer("w") as w:
        with pytest.raises(TypeError, match=r"^data must be bytes, not str$"):
            await w.append("x")
        with pytest.raises(TypeError, match=r"^records\[1\] must be bytes, not int$"):
            await w.append_many([b"", 3])
        for call in (w.append, w.send, lambda data: w.append_many([data])):
            with pytest.raises(RecordTooLargeError):
                await call(bytes(11))
        with pytest.raises(RecordTooLargeError):
            w.send_nowait(bytes(11))
        assert w.statistics().records_waiting == 0
        assert wal.last_lsn == 0


async def test_a_writer_belongs_to_the_run_that_opened_its_log(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, wal.writer("w") as w:
        manager = wal.writer("x")
        errors: list[BaseException] = []

        async def elsewhere() -> None:
            for call in (lambda: w.append(b""), lambda: w.send(b""), w.flush, manager.__aenter__):
                try:
                    await call()
                except RuntimeError as exc:
                    errors.append(exc)

        thread = threading.Thread(target=lambda: trio.run(elsewhere))
        thread.start()
        await trio.to_thread.run_sync(thread.join)
        assert len(errors) == 4
        assert all("belongs to another run of trio" in str(error) for error in errors)
        assert wal.last_lsn == 0
        assert set(wal.statistics().writers) == {"w"}


async def test_a_closed_or_broken_log_gives_no_writers(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        late = wal.writer("late")
    with pytest.raises(trio.ClosedResourceError):
        wal.writer("w")
    with pytest.raises(trio.ClosedResourceError):
        await late.__aenter__()
