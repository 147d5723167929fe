"""What happens under back-pressure: one program for each question, on a disk of a given speed.

Law: a program runs for some seconds and returns figures; nothing is compared or shown here.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from time import perf_counter, thread_time_ns
from typing import Any, Final

import attrs
import trio
from harness import percentile
from slow_disk import SlowFiles, Speed

import trio_wal
from trio_wal.testing import MemoryFiles

RECORD: Final = b"." * 100
RECORD_LARGE: Final = b"." * 2000
TARGET: Final = 0.010
"""``target_latency`` of "auto"."""


@contextmanager
def _directory() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="trio-wal-perf-") as path:
        yield str(Path(path) / "log")


def _open(path: str, speed: Speed, **options: Any) -> Any:
    options.setdefault("segment_size", 16 << 20)
    options.setdefault("retention", trio_wal.KeepSegments(1))
    return trio_wal.open_wal(path, files=SlowFiles(speed), **options)


async def _repeat(call: Callable[[], Awaitable[object]], until: float) -> None:
    while perf_counter() < until:
        await call()


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """The collector does not walk through all tasks of the load again and again, which takes as
    long as some rounds: that is the price of a program with so many tasks, whatever they wait for.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _p99(values: list[float]) -> float:
    return percentile(sorted(values), 0.99)


# -- a greedy group and polite tasks ------------------------------------------------


async def fairness(sync: float, seconds: float, greedy: int, *, writers: bool) -> dict[str, float]:
    """10 polite tasks, which append every now and then, beside a greedy group, in a queue of
    100: their p99, in seconds."""
    taken: list[float] = []
    with _directory() as path:
        async with _open(path, Speed(sync), max_queue_size=100) as wal:
            until = perf_counter() + seconds
            counts_from = perf_counter() + 0.3 + 3 * sync

            async def polite(number: int) -> None:
                rng = random.Random(number)
                async with wal.writer(f"polite {number}") as writer:
                    append = writer.append if writers else wal.append
                    while perf_counter() < until:
                        start = perf_counter()
                        await append(RECORD)
                        if start > counts_from:
                            taken.append(perf_counter() - start)
                        await trio.sleep(0.02 * rng.random())

            async with trio.open_nursery() as nursery:
                for _ in range(greedy):
                    nursery.start_soon(_repeat, lambda: wal.append(RECORD), until)
                for number in range(10):
                    nursery.start_soon(polite, number)
    return {"p99": _p99(taken), "median": percentile(sorted(taken), 0.5), "count": len(taken)}


# -- the fast lane ------------------------------------------------------------------


async def fast_lane(sync: float, seconds: float, *, high: bool, large: bool) -> dict[str, float]:
    """A commit every 10 ms under the load of 10,000 tasks: its p99 in rounds of write and sync.

    ``large``: 100 times more bytes wait than one batch takes.
    """
    taken: list[float] = []
    options = {"max_batch_bytes": 1 << 14} if large else {}
    with _directory() as path:
        async with (
            _open(path, Speed(sync), **options) as wal,
            wal.writer("urgent", priority="high") as writer,
        ):
            append = writer.append if high else wal.append
            until = perf_counter() + seconds
            async with trio.open_nursery() as nursery:
                for _ in range(10_000):
                    nursery.start_soon(_repeat, lambda: wal.append(RECORD), until)
                await trio.sleep(seconds / 4)
                with _old_objects_left_alone():
                    batches, began = wal.statistics().batches_synced, perf_counter()
                    while perf_counter() < until - 5 * sync:
                        start = perf_counter()
                        await append(RECORD)
                        taken.append(perf_counter() - start)
                        await trio.sleep(max(0.0, 0.010 - taken[-1]))
                    elapsed = perf_counter() - began
                round_seconds = elapsed / (wal.statistics().batches_synced - batches)
                nursery.cancel_scope.cancel()
    return {"p99 rounds": _p99(taken) / round_seconds, "p99": _p99(taken), "round": round_seconds}


# -- the bound that follows ---------------------------------------------------------


@attrs.define
class Followed:
    """How long records waited, over time."""

    times: list[float]
    waits: list[float]
    bounds: list[float]
    settled: list[float]
    """Seconds after each change of speed until the wait was within half and double for good."""
    overshoot: float
    """The longest wait after a change, in target latencies; the first round counts, too."""


LOOK_SECONDS: Final = 0.002
SAMPLE_SECONDS: Final = 0.1
"""Over which what waits is averaged: the queue fills and empties within a round."""


async def follow_disk(speeds: list[float], seconds: float) -> Followed:
    """``max_queue_size="auto"`` under 10,000 tasks, while the disk's speed changes."""
    speed = Speed(speeds[0])
    times: list[float] = []
    waits: list[float] = []
    bounds: list[float] = []
    changes: list[float] = []
    with _directory() as path:
        async with _open(path, speed, max_queue_size="auto", target_latency=TARGET) as wal:
            began = perf_counter()
            until = began + seconds * len(speeds)

            async def sample() -> None:
                last, then = wal.last_lsn, perf_counter()
                waiting: list[int] = []
                while perf_counter() < until:
                    await trio.sleep(LOOK_SECONDS)
                    now, lsn = perf_counter(), wal.last_lsn
                    seen = wal.statistics()
                    waiting.append(seen.records_waiting)
                    if now - then < SAMPLE_SECONDS or lsn == last:
                        continue
                    # Little's law, the other way round.
                    times.append(now - began)
                    waits.append(statistics.mean(waiting) * (now - then) / (lsn - last))
                    bounds.append(seen.max_queue_size)
                    last, then = lsn, now
                    waiting.clear()

            async with trio.open_nursery() as nursery:
                for _ in range(10_000):
                    nursery.start_soon(_repeat, lambda: wal.append(RECORD), until)
                await trio.lowlevel.checkpoint()
                with _old_objects_left_alone():
                    nursery.start_soon(sample)
                    for speed.sync_seconds in speeds:
                        changes.append(perf_counter() - began)
                        await trio.sleep(seconds)
                nursery.cancel_scope.cancel()
    settled = []
    for change in changes:
        late = [
            time - change
            for time, wait in zip(times, waits, strict=True)
            if change < time < change + seconds and not TARGET / 2 <= wait <= 2 * TARGET
        ]
        settled.append(max(late, default=0.0))
    after = [w for t, w in zip(times, waits, strict=True) if t > changes[1]]
    return Followed(times, waits, bounds, settled, max(after, default=0.0) / TARGET)


# -- waiting for siblings -----------------------------------------------------------


async def delayed(
    sync: float, tasks: int, think: float, delay: Any, seconds: float, warm_up: float
) -> dict[str, float]:
    """Appends per second of tasks that think for up to ``think`` seconds between two."""
    with _directory() as path:
        async with _open(path, Speed(sync), commit_delay=delay) as wal:
            until = perf_counter() + seconds + warm_up

            async def work(number: int) -> None:
                rng = random.Random(number)
                while perf_counter() < until:
                    await wal.append(RECORD)
                    if think:
                        await trio.sleep(think * rng.random())

            async with trio.open_nursery() as nursery:
                for number in range(tasks):
                    nursery.start_soon(work, number)
                await trio.sleep(warm_up)
                before, began = wal.last_lsn, perf_counter()
                await trio.sleep(seconds)
                rate = (wal.last_lsn - before) / (perf_counter() - began)
                nursery.cancel_scope.cancel()
    return {"per second": rate}


# -- more than the disk takes -------------------------------------------------------

RATE: Final = 1_000
"""Records per second that the disk takes, by its bytes."""
DISK: Final = {"sync_seconds": 0.002, "byte_seconds": 1 / (RATE * len(RECORD_LARGE))}

BOUNDS: Final[dict[str, dict[str, Any]]] = {
    "unbounded": {"max_queue_size": float("inf"), "max_queue_bytes": float("inf")},
    "250 records": {"max_queue_size": 250},
    "128 KiB": {"max_queue_bytes": 128 << 10},
    "auto": {"max_queue_size": "auto", "target_latency": 0.100},
    # The ancestor's four presets, as we read their names.
    "low latency": {"max_queue_size": 16},
    "high throughput": {"max_queue_size": 100_000, "commit_delay": "auto"},
    "balanced": {},
    "small memory": {"max_queue_bytes": 32 << 10},
}
PRESETS: Final = ("low latency", "high throughput", "balanced", "small memory")


async def overloaded(load: float, seconds: float, bound: str) -> dict[str, float]:
    """Records come at ``load`` times what the disk takes, whatever becomes of them; who finds no
    room for 50 ms gives up.  Two probes see how long a record takes: one in the same line, one
    in the fast lane."""
    probes: dict[str, list[float]] = {"normal": [], "high": []}
    offered = refused = 0
    options = {"max_batch_bytes": 64 << 10, **BOUNDS[bound]}
    with _directory() as path:
        async with _open(path, Speed(**DISK), **options) as wal:
            until = perf_counter() + seconds

            async def offer() -> None:
                nonlocal refused
                with trio.move_on_after(0.05) as scope:
                    await wal.send(RECORD_LARGE)
                refused += scope.cancelled_caught

            async def generate(nursery: trio.Nursery) -> None:
                nonlocal offered
                began = perf_counter()
                while (now := perf_counter()) < until:
                    for _ in range(int((now - began) * RATE * load) - offered):
                        nursery.start_soon(offer)
                        offered += 1
                    await trio.sleep(0.002)

            async def probe(append: Callable[[bytes], Awaitable[int]], name: str) -> None:
                while perf_counter() < until:
                    start = perf_counter()
                    await append(b"probe")
                    probes[name].append(perf_counter() - start)
                    await trio.sleep(0.02)

            async with wal.writer("probe", priority="high") as high, trio.open_nursery() as nursery:
                nursery.start_soon(probe, wal.append, "normal")
                nursery.start_soon(probe, high.append, "high")
                nursery.start_soon(generate, nursery)
                await trio.sleep(seconds / 2)
                before, began = wal.last_lsn, perf_counter()
                await trio.sleep(seconds / 2)
                rate = (wal.last_lsn - before) / (perf_counter() - began)
                nursery.cancel_scope.cancel()
            peak = wal.statistics().peak_bytes_waiting
    return {
        "per second": rate,
        "p99": _p99(probes["normal"]) if probes["normal"] else seconds,
        "p99, fast lane": _p99(probes["high"]) if probes["high"] else seconds,
        "waiting bytes": float(peak),
        "refused": refused / max(1, offered),
    }


async def shed(sync: float, load: float, seconds: float) -> dict[str, float]:
    """Requests at ``load`` times what fits, each refused after 50 ms: what is said of each is
    held against what the log has."""
    rng = random.Random(1)
    size = 20
    rate = size / (sync * 1.15)
    told: set[bytes] = set()
    taken: list[float] = []
    with _directory() as path:
        async with _open(
            path, Speed(sync), max_queue_size=size, retention=trio_wal.KeepAll()
        ) as wal:

            async def request(data: bytes) -> None:
                start = perf_counter()
                with trio.move_on_after(0.05) as scope:
                    await wal.append(data)
                taken.append(perf_counter() - start)
                if not scope.cancelled_caught:
                    told.add(data)

            async with trio.open_nursery() as nursery:
                began, offered = perf_counter(), 0
                while (now := perf_counter() - began) < seconds:
                    for _ in range(int(now * rate * load) - offered):
                        offered += 1
                        nursery.start_soon(request, b"%d:%d" % (offered, rng.getrandbits(64)))
                    await trio.sleep(0.002)
            found: dict[bytes, int] = {}
            async with wal.read() as records:
                async for record in records:
                    found[record.data] = found.get(record.data, 0) + 1
    return {
        "offered": float(offered),
        "accepted": float(len(told)),
        "lost": float(len(told - found.keys())),
        "doubled": float(sum(n > 1 for n in found.values()) + len(found.keys() - told)),
        "late": sum(time > 0.1 for time in taken) / len(taken),
    }


# -- free when unused ---------------------------------------------------------------


async def in_memory(rounds: int, tasks: int, appends: int) -> dict[str, list[float]]:
    """Nanoseconds of the processor for an append, on files in memory: bounded, unbounded, and
    through 16 writers, in turns."""

    async def slice_of(appenders: list[Any]) -> float:
        async def one(append: Any) -> None:
            for _ in range(appends):
                await append(RECORD)

        start = thread_time_ns()
        async with trio.open_nursery() as nursery:
            for number in range(tasks):
                nursery.start_soon(one, appenders[number % len(appenders)])
        return (thread_time_ns() - start) / (tasks * appends)

    found: dict[str, list[float]] = {"bounded": [], "unbounded": [], "16 writers": []}
    async with AsyncExitStack() as stack:

        async def opened(**options: Any) -> Any:
            log = trio_wal.open_wal(
                "/log",
                files=MemoryFiles(),
                segment_size=1 << 20,
                retention=trio_wal.KeepSegments(1),
                **options,
            )
            return await stack.enter_async_context(log)

        endless = float("inf")
        bounded = await opened()
        unbounded = await opened(max_queue_size=endless, max_queue_bytes=endless)
        shared = await opened()
        writers = [await stack.enter_async_context(shared.writer(f"{n}")) for n in range(16)]
        logs = {
            "bounded": [bounded.append],
            "unbounded": [unbounded.append],
            "16 writers": [writer.append for writer in writers],
        }
        for appenders in logs.values():
            await slice_of(appenders)
        gc.collect()
        gc.freeze()
        for number in range(rounds):
            turns = list(logs) if number % 2 == 0 else list(reversed(logs))
            for name in turns:
                found[name].append(await slice_of(logs[name]))
        gc.unfreeze()
    return found


async def push(count: int) -> dict[str, float]:
    """Microseconds for a ``send_nowait``."""
    with _directory() as path:
        async with _open(path, Speed(0.005), max_queue_size=float("inf")) as wal:
            start = perf_counter()
            for _ in range(count):
                wal.send_nowait(RECORD)
            taken = perf_counter() - start
            await wal.flush()
    return {"us": taken / count * 1e6}


async def sized(size: float, seconds: float) -> dict[str, float]:
    """Records come at half of what the disk takes; the queue is ``size`` times rate x flush time:
    how many of them had to wait, and the rate."""
    flush = 2 * DISK["sync_seconds"]  # at this load half of a round is the sync itself
    bound = max(1, round(RATE * flush * size))
    with _directory() as path:
        async with _open(path, Speed(**DISK), max_queue_size=bound) as wal:
            began, sent = perf_counter(), 0
            while (now := perf_counter() - began) < seconds:
                for _ in range(int(now * RATE * 0.5) - sent):
                    await wal.send(RECORD_LARGE)
                    sent += 1
                await trio.sleep(0.001)
            waited = wal.statistics().backpressure_waits
    return {
        "bound": float(bound),
        "waited": waited / max(1, sent),
        "per second": sent / (perf_counter() - began),
    }


async def scaled(sync: float, tasks: int, seconds: float, bound: float) -> dict[str, float]:
    """Appends per second of so many tasks."""
    with _directory() as path:
        async with _open(path, Speed(sync), max_queue_size=bound) as wal:
            until = perf_counter() + seconds
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(_repeat, lambda: wal.append(RECORD), until)
                await trio.sleep(seconds / 4)
                before, began = wal.last_lsn, perf_counter()
                await trio.sleep(seconds / 2)
                rate = (wal.last_lsn - before) / (perf_counter() - began)
            peak = wal.statistics().peak_bytes_waiting
    return {"per second": rate, "peak bytes": float(peak)}
