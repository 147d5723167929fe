"""`statistics()`: every field, exact where it can be, and cheap to ask for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import get_args, get_type_hints

import attrs
import pytest
import trio
from helpers import SMALL_SEGMENT, Call, Disk, append_until, open_memory, open_tasks
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal._statistics import HISTOGRAM_BOUNDS, SyncTimes
from trio_wal.testing import MemoryFiles

REPLICATED = (
    "position",
    "replicas",
    "replicas_current",
    "unsettled_seconds",
    "rotations",
    "resolved",
    "assume_synced",
)
"""None for a log in a directory."""
ARCHIVED = (
    "archived_lsn",
    "archive_lag_segments",
    "archive_lag_bytes",
    "archive_failures",
    "archive_error",
)
"""None for a log without an archive."""


async def test_a_new_log_has_these_statistics(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        assert attrs.asdict(wal.statistics()) == {
            "records_waiting": 0,
            "bytes_waiting": 0,
            "max_queue_size": 10_000,
            "max_queue_bytes": 64 << 20,
            "queue_utilization": 0.0,
            "peak_records_waiting": 0,
            "peak_bytes_waiting": 0,
            "tasks_waiting_send": 0,
            "tasks_waiting_durable": 0,
            "backpressure_waits": 0,
            "backpressure_seconds": 0.0,
            "backpressure_seconds_histogram": tuple((b, 0) for b in (*HISTOGRAM_BOUNDS, math.inf)),
            "rejected": 0,
            "writers": {},
            "consumers": {},
            "records_appended": 0,
            "bytes_appended": 0,
            "batches_synced": 0,
            "sync_seconds_total": 0.0,
            "sync_seconds_max": 0.0,
            "sync_seconds_histogram": tuple((b, 0) for b in (*HISTOGRAM_BOUNDS, math.inf)),
            "first_lsn": 1,
            "last_lsn": 0,
            "durable_lsn": 0,
            "segments": 1,
            "disk_bytes": 1 << 20,
            "last_sync_time": None,
            "state": "open",
            "epoch": 0,
            "loop_writes": 0,
            "loop_seconds_total": 0.0,
            "loop_seconds_max": 0.0,
            "loop_slow": 0,
            **dict.fromkeys(REPLICATED),
            **dict.fromkeys(ARCHIVED),
        }


async def test_statistics_are_a_frozen_value(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        before = wal.statistics()
        assert before == wal.statistics()
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            before.records_waiting = 1
        await wal.append(b"one")
        assert before.last_lsn == 0
        assert wal.statistics() != before


def test_the_documented_states_are_the_states_there_are() -> None:
    from trio_wal._state import State

    hints = get_type_hints(trio_wal.WalStatistics)
    assert set(get_args(hints["state"])) == {state.value for state in State}


async def test_the_state_follows_the_life_of_the_log(files: MemoryFiles) -> None:
    states = []
    async with open_memory(files, segment_size=SMALL_SEGMENT) as wal:
        states.append(wal.statistics().state)
        files.free_bytes = 0
        with pytest.raises(trio_wal.LogFullError):
            await append_until(wal, lambda: False)
        states.append(wal.statistics().state)
        files.free_bytes = math.inf
        await wal.append(b"one")
        states.append(wal.statistics().state)
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.aclose)
            await wait_all_tasks_blocked()
            states.append(wal.statistics().state)
            files.release()
        states.append(wal.statistics().state)
    assert states == ["open", "full", "open", "closing", "closed"]
    async with open_memory(files) as wal:
        files.fail("sync")
        with pytest.raises(trio_wal.LogFailedError):
            await wal.append(b"two")
        assert wal.statistics().state == "failed"
    assert wal.statistics().state == "failed"


async def test_appended_records_bytes_and_batches_are_counted_of_this_session(
    files: MemoryFiles,
) -> None:
    for session in range(2):
        async with open_memory(files, flush_interval=1000) as wal:
            await wal.append(b"12345")
            await wal.append_many([b"123", b"", b"1"])
            wal.send_nowait(b"1234567")
            await wal.flush()
            await wal.flush()
            statistics = wal.statistics()
            assert statistics.records_appended == 5
            assert statistics.bytes_appended == 16
            assert statistics.batches_synced == 3
            assert statistics.last_lsn == statistics.durable_lsn == 5 * (session + 1)
            assert statistics.first_lsn == 1


async def test_a_flush_that_finds_nothing_to_sync_is_no_sync(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
            flush = Call(nursery, wal.flush)
            await wait_all_tasks_blocked()
            files.release()
        assert flush.value == 1
        assert wal.statistics().batches_synced == 1


async def test_waiting_records_do_not_include_the_batch_in_flight(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=10, max_queue_bytes=100) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, bytes(30))
            await wait_all_tasks_blocked()
            Call(nursery, wal.append_many, [bytes(20), bytes(5)])
            wal.send_nowait(bytes(15))
            Call(nursery, wal.flush)
            Call(nursery, wal.wait_durable, 4)
            await wait_all_tasks_blocked()
            statistics = wal.statistics()
            assert statistics.records_waiting == 3
            assert statistics.bytes_waiting == 40
            assert statistics.queue_utilization == 0.4
            assert statistics.peak_records_waiting == 3
            assert statistics.peak_bytes_waiting == 40
            assert statistics.tasks_waiting_send == 0
            # The two appends, the flush and the one that waits for an LSN; nobody for the sent.
            assert statistics.tasks_waiting_durable == 4
            files.release()
        assert wal.statistics().tasks_waiting_durable == 0


async def test_utilization_is_the_larger_of_the_two_shares(files: MemoryFiles) -> None:
    async with open_memory(
        files, max_queue_size=4, max_queue_bytes=1000, flush_interval=1000
    ) as wal:
        wal.send_nowait(bytes(100))
        assert wal.statistics().queue_utilization == 0.25
        wal.send_nowait(bytes(800))
        assert wal.statistics().queue_utilization == 0.9
        wal.send_nowait(bytes(100))
        assert wal.statistics().queue_utilization == 1.0
    async with open_memory(files, max_queue_bytes=1, flush_interval=1000) as wal:
        wal.send_nowait(bytes(100))  # alone
        assert wal.statistics().queue_utilization == 1.0


async def test_peaks_keep_what_has_been_withdrawn_or_written(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
            calls = [Call(nursery, wal.append, bytes(10)) for _ in range(7)]
            await wait_all_tasks_blocked()
            for call in calls:
                call.scope.cancel()
            assert wal.statistics().records_waiting == 0
            files.release()
        statistics = wal.statistics()
        assert (statistics.peak_records_waiting, statistics.peak_bytes_waiting) == (7, 70)


# -- syncs ------------------------------------------------------------------------


def syncs_that_take(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
    """Let the clock with which syncs are measured say that they took so long."""

    def clock() -> Iterator[float]:
        now = 100.0
        for duration in seconds:
            yield now
            now += duration
            yield now

    monkeypatch.setattr("trio_wal._disk.directory.perf_counter", clock().__next__)


async def test_the_seconds_of_syncs_are_summed_and_sorted_into_the_histogram(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 0.0625 s and its multiples are exact as floats, as is every sum here.
    durations = [0.0625, 0.0, 0.25, 0.0625, 4.0, 64.0, 0.375]
    async with open_memory(files) as wal:
        syncs_that_take(monkeypatch, durations)
        for _ in durations:
            await wal.append(b"record")
        monkeypatch.undo()
        statistics = wal.statistics()
    assert statistics.batches_synced == 7
    assert statistics.sync_seconds_total == sum(durations)
    assert statistics.sync_seconds_max == 64.0
    counts = dict(statistics.sync_seconds_histogram)
    assert sum(counts.values()) == 7
    assert {bound: count for bound, count in counts.items() if count} == {
        0.00005: 1,
        0.1: 2,
        0.5: 2,
        5.0: 1,
        math.inf: 1,
    }
    assert list(counts) == sorted(counts)


@pytest.mark.parametrize("number", range(len(HISTOGRAM_BOUNDS)))
def test_a_bound_of_the_histogram_belongs_to_its_bucket(number: int) -> None:
    times, bound = SyncTimes(), HISTOGRAM_BOUNDS[number]
    times.note(bound, 1)
    assert [count for _, count in times.histogram()].index(1) == number
    times.note(math.nextafter(bound, 1e9) if hasattr(math, "nextafter") else bound * 1.0001, 2)
    counts = [count for _, count in times.histogram()]
    assert counts[number : number + 2] == [1, 1]
    assert sum(counts) == 2


async def test_the_histogram_counts_every_sync_of_a_real_log(disk: Disk) -> None:
    async with disk.open() as wal:
        for _ in range(20):
            await wal.append(b"record")
        statistics = wal.statistics()
    assert statistics.batches_synced == 20
    assert sum(count for _, count in statistics.sync_seconds_histogram) == 20
    assert 0 < statistics.sync_seconds_max <= statistics.sync_seconds_total
    assert statistics.sync_seconds_total <= 20 * statistics.sync_seconds_max


async def test_last_sync_time_is_utc_and_when_the_last_sync_returned(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    start = datetime(2023, 11, 14, 22, 13, 20, tzinfo=timezone.utc)
    async with open_memory(files) as wal:
        mock_clock.jump(10)
        async with open_tasks(files) as nursery:
            files.hold()
            Call(nursery, wal.append, b"one")
            await wait_all_tasks_blocked()
            mock_clock.jump(25)
            assert wal.statistics().last_sync_time is None
            files.release()
        last = wal.statistics().last_sync_time
        assert (last - start).total_seconds() == 35
        assert last.tzinfo is timezone.utc
        mock_clock.jump(100)
        assert wal.statistics().last_sync_time == last


# -- the disk ---------------------------------------------------------------------


async def test_segments_and_disk_bytes_are_those_of_the_files(disk: Disk) -> None:
    async with disk.open(segment_size=SMALL_SEGMENT) as wal:
        await append_until(wal, lambda: wal.statistics().segments == 4)
        await wal.truncate_before(wal.last_lsn // 2)
        await wal.truncate_after(wal.last_lsn - 1)
        segments = wal.statistics().segments
    async with disk.open(segment_size=SMALL_SEGMENT) as wal:
        statistics = wal.statistics()
        sizes = disk.sizes()
        found = {name: size for name, size in sizes.items() if name.endswith(".log")}
        assert statistics.segments == segments == len(found)
        assert statistics.disk_bytes == sum(found.values())


async def test_statistics_can_be_asked_for_a_thousand_times_while_the_log_is_busy(
    files: MemoryFiles,
) -> None:
    """Asking changes nothing."""
    async with open_memory(files, max_queue_size=5) as wal, open_tasks(files) as nursery:
        files.hold()
        for number in range(9):
            Call(nursery, wal.append, b"%d" % number)
            await wait_all_tasks_blocked()
        assert len({repr(wal.statistics()) for _ in range(1000)}) == 1
        files.release()
        await trio.testing.wait_all_tasks_blocked()
        assert wal.last_lsn == 9
