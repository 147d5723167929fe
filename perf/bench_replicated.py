"""A log on three NATS servers of this machine, beside bare publishes of the same sizes.

Law: one run, side by side, and ratios; absolute figures say little of other disks and networks.
Needs what `nox -s cluster` installs: ``python perf/cluster.py [SECONDS]``.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import nats_cluster

import trio_wal
from trio_wal import nats

RECORD = 100
"""Bytes."""


def bare(cluster: nats_cluster.Cluster, size: int, seconds: float) -> float:
    """Publishes a second, one in flight, each right behind the last one."""
    from nats.aio.client import Client

    async def publish() -> float:
        client = Client()
        await client.connect(cluster.urls[0])
        stream = client.jetstream()
        name = f"bare-{size}-{time.monotonic_ns()}"
        await stream.add_stream(name=name, subjects=[name], num_replicas=3)
        data, count, began = bytes(size), 0, time.monotonic()
        while time.monotonic() - began < seconds:
            headers = {"Nats-Expected-Last-Sequence": str(count)}
            await stream.publish(name, data, headers=headers, timeout=10)
            count += 1
        rate = count / (time.monotonic() - began)
        await stream.delete_stream(name)
        await client.close()
        return rate

    return asyncio.run(publish())


async def appends(log: nats.Log, tasks: int, seconds: float) -> tuple[float, float, float]:
    """(records a second, batches a second, bytes of a batch)."""
    async with trio_wal.open_wal(log) as wal:
        until = time.monotonic() + seconds

        async def append() -> None:
            while time.monotonic() < until:
                await wal.append(bytes(RECORD))

        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(append)
        took = time.monotonic() - began
        found = wal.statistics()
        batches = found.batches_synced
        return found.records_appended / took, batches / took, found.bytes_appended / batches


async def units(log: nats.Log, size: int, seconds: float) -> float:
    """MB a second of `append_many`."""
    unit = [bytes(20_000)] * (size // 20_000)
    async with trio_wal.open_wal(log) as wal:
        began, count = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            await wal.append_many(unit)
            count += 1
        return count * size / (time.monotonic() - began) / 1e6


async def replay(log: nats.Log) -> tuple[float, float]:
    """(MB, records) a second."""
    async with trio_wal.open_reader(log) as reader, reader.read() as records:
        size = count = 0
        began = time.monotonic()
        async for record in records:
            size += len(record.data)
            count += 1
        took = time.monotonic() - began
    return size / took / 1e6, count / took


async def database(log: nats.Log, folder: Path, seconds: float) -> tuple[float, list[float], float]:
    """(transactions a second, lags of a replica in seconds, seconds of a promotion)."""
    lags: list[float] = []
    async with (
        trio_wal.open_database(folder / "leader", log=log) as db,
        trio_wal.open_replica(folder / "replica", log=log) as replica,
    ):
        until = time.monotonic() + seconds

        async def write(task: int) -> None:
            number = 0
            while time.monotonic() < until:
                async with db.transaction() as tx:
                    for key in range(4):
                        tx.get(b"%d.%d" % (task, key))
                        tx.put(b"%d.%d" % (task, key), b"%d" % number)
                number += 1

        async def watch() -> None:
            while time.monotonic() < until:
                lsn, began = db.durable_lsn, time.monotonic()
                await replica.wait_for(lsn)
                lags.append(time.monotonic() - began)
                await trio.sleep(0.01)

        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            for task in range(64):
                nursery.start_soon(write, task)
        rate = db.statistics().transactions / (time.monotonic() - began)
        began = time.monotonic()
        async with replica.promote():
            return rate, lags, time.monotonic() - began


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with nats_cluster.running(folder / "servers", 3) as cluster:
            measure(cluster, folder, seconds)


def measure(cluster: nats_cluster.Cluster, folder: Path, seconds: float) -> None:
    def log(name: str) -> nats.Log:
        return nats.Log(cluster.urls, name, monitor=cluster.monitors)

    run: Callable[..., Any] = trio.run
    for tasks in (1, 16, 128, 1024):
        rate, batches, size = run(appends, log(f"appends-{tasks}"), tasks, seconds)
        beside = bare(cluster, round(size) + 4 * round(size / RECORD) + 64, seconds)
        print(
            f"{tasks:5} tasks: {rate:9,.0f} appends/s, {batches:6,.0f} batches of {size:8,.0f} B/s,"
            f" bare {beside:6,.0f}/s, ratio {batches / beside:.2f}"
        )
    for size in (800_000, 8_000_000):
        rate = run(units, log(f"units-{size}"), size, seconds)
        beside = bare(cluster, 900_000, seconds) * 0.9
        print(f"units of {size:,} B: {rate:.1f} MB/s, bare {beside:.1f} MB/s, {rate / beside:.2f}")
    for name in ("units-800000", "appends-1024", "appends-128"):
        mb, records = run(replay, log(name))
        print(f"replay of {name}: {mb:.0f} MB/s, {records:,.0f} records/s")
    rate, lags, promoted = run(database, log("database"), folder, seconds)
    p99 = statistics.quantiles(lags, n=100)[98] if len(lags) > 2 else max(lags)
    print(
        f"database, 64 tasks: {rate:,.0f} transactions/s; replica lag p50 "
        f"{1000 * statistics.median(lags):.0f} ms, p99 {1000 * p99:.0f} ms; promotion "
        f"{promoted:.2f} s"
    )


if __name__ == "__main__":
    main()
