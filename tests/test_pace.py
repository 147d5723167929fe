"""`max_queue_size="auto"`: what a round costs, and that the bound settles and never swings."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import attrs
import pytest
import trio
from helpers import open_memory, open_tasks
from trio.testing import MockClock
from virtual_disks import Noise, follow

import trio_wal
from trio_wal._local import LocalEngine
from trio_wal._pace import AUTO_RECORDS_MAX, AUTO_RECORDS_MIN, AutoBound, RoundCosts
from trio_wal.testing import MemoryFiles

TARGET = 0.010

# -- what a round costs -----------------------------------------------------------


def test_until_sizes_differ_all_is_taken_for_what_records_cost() -> None:
    costs = RoundCosts()
    for _ in range(20):
        costs.note(100, 0.001)
    assert costs.record_seconds == pytest.approx(1e-5)
    assert costs.fixed_seconds == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("fixed", [0.0, 0.0001, 0.02])
def test_both_costs_are_found(fixed: float) -> None:
    costs = RoundCosts()
    rng = random.Random(1)
    for _ in range(300):
        records = rng.randint(500, 2000)
        costs.note(records, fixed + 3e-6 * records)
    assert costs.record_seconds == pytest.approx(3e-6, rel=0.01)
    assert costs.fixed_seconds == pytest.approx(fixed, rel=0.01, abs=1e-5)


def test_one_stall_changes_little_and_another_disk_all() -> None:
    costs = RoundCosts()
    rng = random.Random(2)

    def rounds(count: int) -> None:
        for _ in range(count):
            records = rng.randint(500, 1500)
            costs.note(records, 0.001 + 3e-6 * records)

    rounds(100)
    assert costs.fixed_seconds == pytest.approx(0.001, rel=0.01)
    costs.note(1000, 1.0)
    assert costs.seconds < 2 * 0.004
    rounds(60)
    assert costs.fixed_seconds == pytest.approx(0.001, rel=0.3)
    for _ in range(3):
        costs.note(1000, 0.5)
    # Forgotten: nothing is known of it but that.
    assert costs.seconds == 0.5
    assert costs.fixed_seconds == pytest.approx(0, abs=1e-9)


# -- the bound, on a disk that is a formula ---------------------------------------


@attrs.define
class Disk:
    """Rounds that cost so much by themselves and for each record, under a queue always full."""

    bound: AutoBound
    fixed: float
    each: float
    batch_max: float = math.inf
    now: float = 0.0
    noise: Callable[[], float] = lambda: 1.0
    bounds: list[int] = attrs.Factory(list)

    def run(self, seconds: float) -> list[int]:
        """Returns the bounds in force."""
        end, self.bounds = self.now + seconds, []
        waiting = self.bound.records
        while self.now < end:
            taken = int(min(waiting, self.batch_max))
            self.bound.taken(self.now, taken, waiting, full=True, at_once=True)
            self.bounds.append(self.bound.records)
            # Whoever was blocked comes in as soon as the batch is taken.
            waiting = max(self.bound.records, waiting - taken)
            self.now += (self.fixed + self.each * taken) * self.noise()
        return self.bounds

    @property
    def wait(self) -> float:
        """Of a record that comes in now."""
        records = self.bound.records
        batch = min(records, self.batch_max)
        return records / batch * (self.fixed + self.each * batch)


DISKS = [(0.0001, 3e-6), (0.001, 3e-6), (0.005, 3e-6), (0.0, 1e-4), (0.002, 1e-3), (0.001, 1e-6)]


@pytest.mark.parametrize(("fixed", "each"), DISKS)
@pytest.mark.parametrize("batch_max", [math.inf, 100])
def test_a_record_waits_about_the_target(fixed: float, each: float, batch_max: float) -> None:
    disk = Disk(AutoBound(TARGET), fixed, each, batch_max)
    disk.run(0.5)
    assert TARGET / 1.3 <= disk.wait <= TARGET * 1.3 or disk.bound.records == AUTO_RECORDS_MIN


@pytest.mark.parametrize(("fixed", "each"), DISKS)
@pytest.mark.parametrize("start", [AUTO_RECORDS_MIN, 64, 100_000])
def test_it_comes_from_one_side_and_stays(fixed: float, each: float, start: int) -> None:
    """No swing: the bound moves in one direction, and then it does not move."""
    disk = Disk(AutoBound(TARGET), fixed, each)
    disk.bound.records = start
    bounds = disk.run(max(3.0, 30 * (fixed + each * start)))
    ups = sum(after > before for before, after in pairwise(bounds))
    downs = sum(after < before for before, after in pairwise(bounds))
    assert not ups or not downs, bounds
    assert len(set(bounds[-10:])) == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((0.001, 3e-6), (0.010, 3e-6)),
        ((0.010, 3e-6), (0.001, 3e-6)),
        ((0.0001, 3e-6), (0.001, 3e-6)),
        ((0.0005, 3e-6), (0.0005, 3e-5)),
        ((0.0005, 3e-5), (0.0005, 3e-6)),
        ((0.020, 3e-6), (0.002, 3e-6)),
        ((0.002, 1e-4), (0.020, 1e-3)),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_it_settles_when_the_disk_changes_ten_times_and_back(
    before: tuple[float, float], after: tuple[float, float], noise: float
) -> None:
    rng = random.Random(7)
    disk = Disk(AutoBound(TARGET), *before, noise=lambda: rng.lognormvariate(0, noise))
    disk.run(3)
    for fixed, each in (after, before):
        disk.fixed, disk.each = fixed, each
        disk.run(2)
        # What the target cannot be, where one round takes so long already.
        goal = max(TARGET, 1.5 * fixed)
        for _ in range(20):
            disk.run(0.05)
            assert goal / 2 <= disk.wait <= 2 * goal


@pytest.mark.parametrize("noise", [Noise(), Noise(0.1, 0.1), Noise(0.03, 0.3), Noise(0.2, 0.2)])
@pytest.mark.parametrize("each", [3e-6, 12e-6, 25e-6])
@pytest.mark.parametrize("syncs", [(0.001, 0.010, 0.001), (0.0005, 0.005, 0.0005)])
def test_what_perf_measures_of_the_bound_holds_in_virtual_time(
    syncs: tuple[float, ...], each: float, noise: Noise
) -> None:
    """The requirement is two seconds; a target of as long as a sync is the hardest there is."""
    for seed in range(12):
        found = follow(AutoBound(TARGET), list(syncs), each, noise, seed)
        assert max(found.settled) <= 1.5, (seed, found)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("sync", [0.020, 0.050])
def test_where_the_target_is_out_of_reach_records_are_a_share_of_the_round_for_good(
    sync: float, noise: float
) -> None:
    """A bound that sank would save no time and cost all of the throughput."""
    each = 12e-6
    for seed in range(5):
        found = follow(AutoBound(TARGET), [sync], each, Noise(0.03, noise), seed, 30.0)
        assert 0.08 * sync <= each * found.records[0] <= 0.8 * sync


def test_on_a_disk_that_is_too_slow_for_the_target_it_keeps_the_throughput() -> None:
    """Little's law alone would lower the bound to nothing: each round would take 20 ms still."""
    disk = Disk(AutoBound(TARGET), 0.020, 3e-6)
    disk.run(3)
    assert 0.020 < disk.wait <= 0.040
    assert disk.bound.records > 1000


def test_a_queue_that_is_not_full_teaches_nothing_of_the_bound() -> None:
    bound = AutoBound(TARGET)
    for number in range(100):
        assert not bound.taken(number * 0.001, 10, 10, full=False, at_once=True)
    # One batch in flight, of one record, when the rush comes.
    assert not bound.taken(1.0, 1, 1, full=False, at_once=False)
    assert not bound.taken(1.1, 64, 64, full=True, at_once=True)
    assert bound.records == 64


def test_the_time_in_which_nothing_was_there_is_not_a_round() -> None:
    bound = AutoBound(TARGET)
    for number in range(10):
        assert not bound.taken(number * 1.0, 64, 64, full=True, at_once=False)
    assert bound.records == 64


def test_a_round_of_which_no_part_can_be_told_is_none() -> None:
    bound = AutoBound(TARGET)
    shortest = math.ulp(0.0)
    for number in range(10):
        assert not bound.taken(number * shortest, 64, 64, full=True, at_once=True)
    assert bound.records == 64


@pytest.mark.parametrize(("each", "limit"), [(1.0, AUTO_RECORDS_MIN), (1e-9, AUTO_RECORDS_MAX)])
def test_it_stays_within_its_limits(each: float, limit: int) -> None:
    disk = Disk(AutoBound(TARGET), 1e-9, each)
    disk.run(0.05 if each < 1 else 1000)
    assert disk.bound.records == limit
    assert all(AUTO_RECORDS_MIN <= bound <= AUTO_RECORDS_MAX for bound in disk.bounds)


# -- in a log ---------------------------------------------------------------------


async def test_the_bound_in_force_is_a_number(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size="auto") as wal:
        assert wal.statistics().max_queue_size == 64
        assert wal.statistics().queue_utilization == 0
        await wal.append(b"x")
        async with wal.writer("w", max_queue_size=AUTO_RECORDS_MAX) as w:
            assert w.statistics().max_queue_size == 64
        with pytest.raises(ValueError, match=r"^max_queue_size must be at most the queue's"):
            wal.writer("w", max_queue_size=AUTO_RECORDS_MAX + 1)


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan])
@pytest.mark.parametrize("open_", [trio_wal.open_wal, trio_wal.open_database])
def test_a_target_of_nothing_is_refused(files: MemoryFiles, open_: Any, value: float) -> None:
    with pytest.raises(ValueError, match=r"^target_latency must be at least 1e-06"):
        open_("/log", files=files, max_queue_size="auto", target_latency=value)
    assert files.operations == {}


def test_another_word_is_refused(files: MemoryFiles) -> None:
    with pytest.raises(TypeError, match=r"^max_queue_size must be an int, not str$"):
        trio_wal.open_wal("/log", files=files, max_queue_size="adaptive")  # type: ignore[arg-type]


async def test_under_overload_a_record_waits_about_the_target(
    files: MemoryFiles, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 tasks, on a disk of 1 ms and 50 us a record, and then of ten times that."""
    scale = 1.0
    original = LocalEngine.write

    async def write(self: Any, records: Any, *, sync: bool) -> None:
        await original(self, records, sync=sync)
        await trio.sleep(scale * (0.001 + 50e-6 * len(records)))

    async def append() -> None:
        while True:
            await wal.append(b"record")

    monkeypatch.setattr(LocalEngine, "write", write)
    async with open_memory(files, max_queue_size="auto") as wal, open_tasks(files) as nursery:
        for _ in range(1000):
            nursery.start_soon(append)
        for scale in (1.0, 10.0, 1.0):
            await trio.sleep(2)
            for _ in range(10):
                await trio.sleep(0.1)
                bound = wal.statistics().max_queue_size
                wait = scale * (0.001 + 50e-6 * bound)
                assert 0.8 * TARGET / 1.5 <= wait <= 2 * TARGET
                assert wal.statistics().records_waiting <= bound
        nursery.cancel_scope.cancel()
