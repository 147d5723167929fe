"""Logs on the servers of `nats_cluster`: tasks that append, what they were told, and its judge.

Law: 0 lost, 0 doubled, and nothing that was called absent, whatever is done to the servers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import nats_cluster
import trio
from helpers import read_all
from nats_cluster import Cluster

import trio_wal
from trio_wal import nats


def log_on(cluster: Cluster, name: str = "orders", **options: Any) -> nats.Log:
    one = {} if len(cluster.servers) > 1 else {"replicas": 1}
    return nats.Log(
        cluster.urls,
        name,
        **{"monitor": cluster.monitors, **one, **options},
    )


def js(cluster: Cluster, what: str, content: Any) -> Any:
    """One request of JetStream's API, past the log."""
    from nats.aio.client import Client

    async def quiet(exc: Exception) -> None:
        """Else it is printed."""

    async def ask() -> Any:
        client = Client()
        await client.connect(cluster.urls[0], error_cb=quiet)
        answer = await client.request(f"$JS.API.{what}", json.dumps(content).encode(), timeout=5)
        await client.close()
        return json.loads(answer.data)

    return asyncio.run(ask())


def heal(cluster: Cluster) -> None:
    """A server that was paused is started anew: others take long to talk to it again."""
    for server in cluster.servers:
        if server.paused:
            server.kill()
    cluster.start()
    config = {"name": "PROBE", "subjects": ["probe"], "num_replicas": 3}
    until = time.monotonic() + nats_cluster.READY_SECONDS
    while time.monotonic() < until:
        with suppress(Exception):
            if "error" not in js(cluster, "STREAM.CREATE.PROBE", config):
                js(cluster, "STREAM.DELETE.PROBE", {})
                return
        time.sleep(0.1)
    raise TimeoutError("the servers make no streams")


class Writers:
    """Tasks that append, and what they were told."""

    def __init__(self, count: int = 16, size: int = 72, unit: int = 1) -> None:
        self.acknowledged: dict[int, bytes] = {}
        self.absent: list[bytes] = []
        self.unknown: list[bytes] = []
        self.gap = 0.0
        self._count, self._size, self._unit = count, size, unit
        self._last = time.monotonic()

    async def run(self, wal: Any, until: Callable[[], bool], prefix: bytes = b"") -> None:
        self._last = time.monotonic()
        async with trio.open_nursery() as nursery:
            for task in range(self._count):
                nursery.start_soon(self._write, wal, until, prefix + b"%d" % task)

    async def _write(self, wal: Any, until: Callable[[], bool], name: bytes) -> None:
        number = 0
        while not until():
            number += 1
            unit = [
                (b"%s.%d.%d " % (name, number, n)).ljust(self._size, b".")
                for n in range(self._unit)
            ]
            try:
                lsns = await wal.append_many(unit)
            except trio_wal.LogFailedError as exc:
                (self.absent if exc.outcome == "not written" else self.unknown).extend(unit)
                return
            now = time.monotonic()
            self.gap, self._last = max(self.gap, now - self._last), now
            for lsn, data in zip(lsns, unit, strict=True):
                assert lsn not in self.acknowledged
                self.acknowledged[lsn] = data

    def judge(self, found: dict[int, bytes]) -> None:
        """0 lost, 0 doubled, nothing that was called absent."""
        assert self.acknowledged.items() <= found.items()
        assert len(set(found.values())) == len(found)
        assert not set(self.absent) & set(found.values())
        assert set(found.values()) <= {*self.acknowledged.values(), *self.unknown}


async def found_on(log: nats.Log) -> dict[int, bytes]:
    async with trio_wal.open_reader(log) as reader:
        return await read_all(reader)


async def leader(cluster: Cluster, log: nats.Log) -> nats_cluster.Server:
    with trio.fail_after(60):
        while True:
            found = await trio.to_thread.run_sync(cluster.leader_of, f"WAL-{log.name}")
            if found is not None:
                return found
            await trio.sleep(0.05)


async def keep_open(
    log: nats.Log, writers: Writers, over: trio.Event, task_status: Any = trio.TASK_STATUS_IGNORED
) -> None:
    with suppress(trio_wal.LogFencedError):
        async with trio_wal.open_wal(log) as wal:
            task_status.started(wal)
            while not over.is_set() and wal.statistics().state == "open":  # noqa: ASYNC110
                await trio.sleep(0.02)
