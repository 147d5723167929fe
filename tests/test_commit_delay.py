"""`commit_delay`: how long a batch waits for siblings, fixed and learned."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import trio
from helpers import Call, open_memory, open_tasks, read_all
from trio.testing import MockClock, wait_all_tasks_blocked
from virtual_disks import Appenders

import trio_wal
from trio_wal._local import LocalEngine
from trio_wal._pace import TIMER, AutoDelay
from trio_wal.testing import MemoryFiles

DELAY = 0.5

# -- fixed ------------------------------------------------------------------------


async def test_a_batch_waits_for_siblings(files: MemoryFiles, mock_clock: MockClock) -> None:
    async with open_memory(files, commit_delay=DELAY) as wal, open_tasks(files) as nursery:
        first = Call(nursery, wal.append, b"first")
        await wait_all_tasks_blocked()
        mock_clock.jump(0.3)
        second = Call(nursery, wal.append, b"second")
        await wait_all_tasks_blocked()
        mock_clock.jump(0.19)
        await wait_all_tasks_blocked()
        assert (first.state, second.state, wal.durable_lsn) == ("waiting", "waiting", 0)
        mock_clock.jump(0.02)
        await wait_all_tasks_blocked()
        assert (first.value, second.value) == (1, 2)
        assert wal.statistics().batches_synced == 1


async def test_without_it_a_batch_does_not_wait(files: MemoryFiles, mock_clock: MockClock) -> None:
    async with open_memory(files) as wal:
        await wal.append(b"first")
        await wal.append(b"second")
        assert wal.statistics().batches_synced == 2


async def end_by_flush(wal: Any, nursery: trio.Nursery) -> None:
    Call(nursery, wal.flush)


async def end_by_a_job(wal: Any, nursery: trio.Nursery) -> None:
    Call(nursery, wal.truncate_after, 5)


async def end_by_closing(wal: Any, nursery: trio.Nursery) -> None:
    Call(nursery, wal.aclose)


async def end_by_a_full_batch(wal: Any, nursery: trio.Nursery) -> None:
    Call(nursery, wal.append, bytes(99))


async def end_by_a_full_queue(wal: Any, nursery: trio.Nursery) -> None:
    for _ in range(3):
        Call(nursery, wal.send, b"x")


@pytest.mark.parametrize(
    "end",
    [end_by_flush, end_by_a_job, end_by_closing, end_by_a_full_batch, end_by_a_full_queue],
    ids=lambda end: end.__name__,
)
async def test_it_waits_no_longer_than_it_must(
    files: MemoryFiles, mock_clock: MockClock, end: Callable[[Any, trio.Nursery], Any]
) -> None:
    options = {"max_queue_size": 3, "max_batch_bytes": 100, "commit_delay": DELAY}
    async with open_memory(files, **options) as wal, open_tasks(files) as nursery:
        call = Call(nursery, wal.append, b"first")
        await wait_all_tasks_blocked()
        assert call.state == "waiting"
        await end(wal, nursery)
        await wait_all_tasks_blocked()
        assert call.value == 1
        mock_clock.autojump_threshold = 0


@pytest.mark.parametrize("first", ["normal", "high"])
async def test_high_priority_ends_it(files: MemoryFiles, mock_clock: MockClock, first: str) -> None:
    async with (
        open_memory(files, commit_delay=DELAY) as wal,
        wal.writer("h", priority="high") as h,
        open_tasks(files) as nursery,
    ):
        calls = [Call(nursery, (wal if first == "normal" else h).append, b"first")]
        await wait_all_tasks_blocked()
        assert calls[0].state == ("waiting" if first == "normal" else "returned")
        calls.append(Call(nursery, h.append, b"high"))
        await wait_all_tasks_blocked()
        assert [call.value for call in calls] == [1, 2]


async def test_cancelled_while_it_waits_leaves_nothing(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files, commit_delay=DELAY) as wal, open_tasks(files) as nursery:
        cancelled = Call(nursery, wal.append, b"cancelled")
        await wait_all_tasks_blocked()
        cancelled.scope.cancel()
        await wait_all_tasks_blocked()
        assert cancelled.state == "cancelled"
        kept = Call(nursery, wal.append, b"kept")
        await wait_all_tasks_blocked()
        mock_clock.jump(DELAY)
        await wait_all_tasks_blocked()
        assert kept.value == 1
        assert await read_all(wal) == {1: b"kept"}


@pytest.mark.parametrize("durability", ["interval", "none"])
async def test_it_is_for_syncs_only(
    files: MemoryFiles, mock_clock: MockClock, durability: str
) -> None:
    async with open_memory(files, commit_delay=DELAY, durability=durability) as wal:
        assert await wal.append(b"record") == 1


async def test_what_nobody_waits_for_is_not_delayed_twice(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files, commit_delay=DELAY, flush_interval=0.1) as wal:
        await wal.send(b"record")
        await wait_all_tasks_blocked()
        mock_clock.jump(0.11)
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 1


@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf])
@pytest.mark.parametrize("open_", [trio_wal.open_wal, trio_wal.open_database])
def test_a_wrong_delay_is_refused(files: MemoryFiles, open_: Any, value: float) -> None:
    with pytest.raises(ValueError, match=r"^commit_delay must be at least 0 and at most"):
        open_("/log", files=files, commit_delay=value)
    with pytest.raises(TypeError, match=r"^commit_delay must be a number of seconds, not str"):
        open_("/log", files=files, commit_delay="adaptive")
    assert files.operations == {}


# -- learned, on a disk and tasks that are formulas -------------------------------


def throughput(
    tasks: int,
    sync: float,
    think: Callable[[random.Random], float],
    delay: AutoDelay | float,
    seconds: float,
    resolution: float = 0.0,
) -> float:
    """Entries per second of tasks that append, think, and append again.

    Args:
      resolution: of the timer that ends a delay, in seconds: it rounds up.
    """
    rng = random.Random(5)
    now, done, waiting = 0.0, 0, 0
    coming = [think(rng) for _ in range(tasks)]
    heapq.heapify(coming)

    def come(until: float) -> int:
        count = 0
        while coming and coming[0] <= until:
            heapq.heappop(coming)
            count += 1
        return count

    while now < seconds:
        now = max(now, coming[0]) if not waiting else now
        waiting += come(now)
        wait, siblings = delay, math.inf
        if isinstance(delay, AutoDelay):
            wait, siblings = delay.seconds, delay.siblings
        end = now + float(wait)  # type: ignore[arg-type]
        if resolution:
            end = now + math.ceil(float(wait) / resolution) * resolution  # type: ignore[arg-type]
        while waiting < siblings and now < end:
            now = min(end, coming[0]) if coming else end
            waiting += come(now)
        took = (sync + 2e-6 * waiting) * rng.lognormvariate(0, 0.05)
        now += took
        batch, waiting = waiting, come(now)
        if isinstance(delay, AutoDelay):
            delay.written(now, batch, waiting, took)
        for _ in range(batch):
            heapq.heappush(coming, now + think(rng))
        done += batch
    return done / now


THINK: dict[str, Callable[[float], Callable[[random.Random], float]]] = {
    "not at all": lambda sync: lambda rng: 1e-7,
    "a little": lambda sync: lambda rng: 0.01 * sync * rng.random(),
    "half a sync": lambda sync: lambda rng: sync / 2 * rng.random(),
    "a sync, at random": lambda sync: lambda rng: rng.expovariate(1 / sync),
    "long": lambda sync: lambda rng: rng.expovariate(0.2 / sync),
}


@pytest.mark.parametrize("name", THINK)
@pytest.mark.parametrize("tasks", [1, 8, 64])
@pytest.mark.parametrize("sync", [0.0001, 0.005])
def test_auto_is_about_as_good_as_the_best(name: str, tasks: int, sync: float) -> None:
    think, seconds = THINK[name](sync), 1500 * sync
    fixed = [throughput(tasks, sync, think, share * sync, seconds) for share in (0, 0.1, 0.3, 1)]
    auto = throughput(tasks, sync, think, AutoDelay(timer=0.0), seconds)
    assert auto >= 0.9 * max(fixed), (fixed, auto)


@pytest.mark.parametrize("name", THINK)
@pytest.mark.parametrize("tasks", [8, 64])
@pytest.mark.parametrize("sync", [0.0001, 0.001])
def test_trials_cost_little_where_a_timer_is_longer_than_a_sync(
    name: str, tasks: int, sync: float
) -> None:
    think = THINK[name](sync)
    without = throughput(tasks, sync, think, 0.0, 5)
    assert throughput(tasks, sync, think, AutoDelay(), 5, 0.001) >= 0.95 * without


@pytest.mark.parametrize("loop", [0.0, 5e-6, 20e-6, 40e-6])
@pytest.mark.parametrize("sync", [0.0001, 0.001, 0.005, 0.020])
def test_what_perf_measures_of_the_delay_holds_in_virtual_time(sync: float, loop: float) -> None:
    """The requirement is 0.95 of the better of none and the best fixed delay, at each of 32 points,
    with as much time to learn as perf gives."""
    warm_up, seconds = max(0.3, 150 * sync), max(0.7, 40 * sync)
    # On a loop that costs nothing a thousand tasks of a fast disk are nothing but more of the same.
    crowds = (1, 16, 128, 1024) if loop else (1, 16, 128)
    for tasks, think in product(crowds, (0.0, sync / 4 if sync > 0.002 else 0.002)):

        def rate(delay: AutoDelay | float, tasks: int = tasks, think: float = think) -> float:
            appenders = Appenders(tasks, sync, think, loop=loop, noise=0.05, timer=TIMER)
            return appenders.rate(delay, warm_up, seconds)

        # A timer makes the same delay of several, and the same delay has the same rate.
        shares = 0.0, 0.25, 0.5, 1.0
        delays = {math.ceil(share * sync / TIMER): share * sync for share in shares}
        better = max(map(rate, delays.values()))
        assert rate(AutoDelay()) >= 0.97 * better, (tasks, think)


@pytest.mark.parametrize("seconds", [0.0001, 0.0009])
def test_where_a_round_is_shorter_than_a_timer_nothing_is_tried(seconds: float) -> None:
    delay, now = AutoDelay(), 0.0
    for _ in range(5000):
        now += 2 * seconds
        delay.written(now, 8, 8, seconds)
        assert delay.seconds == 0


def test_no_delay_is_tried_that_a_timer_makes_longer() -> None:
    delay, now = AutoDelay(), 0.0
    tried = set()
    for _ in range(5000):
        tried.add(delay.seconds)
        now += 0.0015
        delay.written(now, 8, 8, 0.0012)
    assert len(tried) > 2
    assert all(not seconds or seconds >= 0.001 for seconds in tried)


def test_a_delay_ends_when_the_disk_has_become_faster_than_a_timer() -> None:
    delay = AutoDelay()
    throughput(64, 0.005, THINK["a little"](0.005), delay, 5)
    assert delay.seconds > 0
    now = 5.1
    # As long as the average of the rounds needs, and an epoch or two.
    for _ in range(32):
        now += 0.0002
        delay.written(now, 8, 8, 0.0001)
    assert delay.seconds == 0


def test_it_learns_that_a_delay_doubles_the_throughput_of_two_halves() -> None:
    think = THINK["a little"](0.005)
    without = throughput(64, 0.005, think, 0.0, 10)
    assert throughput(64, 0.005, think, AutoDelay(), 10) > 1.7 * without


def test_a_single_task_never_waits() -> None:
    delay = AutoDelay()
    for number in range(1000):
        delay.written(number * 0.01, 1, 0, 0.01)
        assert delay.siblings == 1


def test_it_forgets_when_times_change() -> None:
    delay = AutoDelay()
    think = THINK["a little"](0.005)
    throughput(64, 0.005, think, delay, 5)
    assert delay.seconds > 0
    # The same tasks, who now think for long: to wait for them would be in vain.
    long = THINK["long"](0.005)
    without = throughput(64, 0.005, long, 0.0, 10)
    assert throughput(64, 0.005, long, delay, 10) > 0.93 * without


async def test_auto_in_a_log(
    files: MemoryFiles, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 tasks that think for a quarter of a sync: all of them share each sync in the end."""
    original = LocalEngine.write

    async def write(self: Any, records: Any, *, sync: bool) -> None:
        await original(self, records, sync=sync)
        await trio.sleep(0.008)

    monkeypatch.setattr(LocalEngine, "write", write)
    rates = {}
    for delay in (0.0, "auto"):
        rng = random.Random(1)
        log = MemoryFiles()

        async def append(wal: Any, rng: random.Random) -> None:
            while True:
                await wal.append(b"record")
                await trio.sleep(0.002 * rng.random())

        async with open_memory(log, commit_delay=delay) as wal, open_tasks(log) as nursery:
            for _ in range(16):
                nursery.start_soon(append, wal, rng)
            await trio.sleep(4)
            before = wal.last_lsn
            await trio.sleep(4)
            rates[delay] = (wal.last_lsn - before) / 4
            nursery.cancel_scope.cancel()
    assert rates["auto"] > 1.3 * rates[0.0]
