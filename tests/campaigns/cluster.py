"""Logs and databases on three real NATS servers of this machine, through kills and takeovers.

Law: `nats_cluster` keeps the servers, `nats_writers` judges the logs.  Three series: the server
that leads the stream is killed under 16 tasks; the log is taken over by another writer under them;
a replica of a database is promoted while the leader writes, every second time with the stream's
server killed in that moment.  Times are of this machine, which other work may share.

``--count`` is of events: half of them are kills, a quarter takeovers, a quarter promotions.  Real
servers do not repeat themselves: the command under a finding does the same things again, and may
have to be run more than once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import nats_cluster
import trio
from nats_writers import Writers, found_on, heal, keep_open, leader, log_on

import trio_wal
from trio_wal import nats

from ._report import (
    Bar,
    Report,
    add_common_arguments,
    bound,
    described,
    progress_bar,
    replay_command,
)

TASKS: Final = 16
LIFE_SECONDS: Final = 0.5
ROUNDS: Final = 10
"""On one log; the next ones have a log of their own."""
PARTS_OF_COUNT: Final = {"kills": 2, "takeovers": 4, "promotions": 4}
"""Kinds of events, and which part of them all each is."""

COLUMNS = {
    "runs": "events",
    "acknowledged": "acknowledged",
    "absent": "called absent",
    "unknown": "unknown",
    "gap": "longest gap s",
    "again": "longest until it goes on s",
    "bound": "bound",
}


class Series:
    """One kind of events, and what came of them."""

    def __init__(self, folder: Path, cluster: nats_cluster.Cluster, limit: float) -> None:
        """
        Args:
          limit: seconds after which whoever still waits hangs.
        """
        self._limit = limit
        self.figures: Counter[str] = Counter()
        self.gap = self.again = 0.0
        self._folder = folder
        self._cluster = cluster

    def _count(self, writers: Writers) -> None:
        self.figures["acknowledged"] += len(writers.acknowledged)
        self.figures["absent"] += len(writers.absent)
        self.figures["unknown"] += len(writers.unknown)
        self.gap = max(self.gap, writers.gap)

    async def kills(self, name: str, rounds: int) -> None:
        log, writers, over = log_on(self._cluster, name), Writers(TASKS), trio.Event()
        async with trio_wal.open_wal(log) as wal, trio.open_nursery() as nursery:
            nursery.start_soon(writers.run, wal, over.is_set)
            for _ in range(rounds):
                await trio.sleep(LIFE_SECONDS)
                server = await leader(self._cluster, log)
                before, began = len(writers.acknowledged), time.monotonic()
                await trio.to_thread.run_sync(server.kill)
                with trio.fail_after(self._limit):
                    while len(writers.acknowledged) < before + 10 * TASKS:  # noqa: ASYNC110
                        await trio.sleep(0.01)
                self.again = max(self.again, time.monotonic() - began)
                self._cluster.start_servers()
                await trio.to_thread.run_sync(heal, self._cluster)
                self.figures["runs"] += 1
            over.set()
        writers.judge(await found_on(log))
        self._count(writers)

    async def takeovers(self, name: str, rounds: int) -> None:
        log, writers, over = log_on(self._cluster, name), Writers(TASKS), trio.Event()
        async with trio.open_nursery() as nursery:
            for number in range(rounds + 1):
                began = time.monotonic()
                wal = await nursery.start(keep_open, log, writers, over)
                if number:
                    self.again = max(self.again, time.monotonic() - began)
                    self.figures["runs"] += 1
                nursery.start_soon(writers.run, wal, over.is_set, b"%d/" % number)
                await trio.sleep(LIFE_SECONDS)
            over.set()
        writers.judge(await found_on(log))
        self._count(writers)

    async def promotions(self, name: str, rounds: int) -> None:
        log, acknowledged = log_on(self._cluster, name), dict[bytes, bytes]()
        for number in range(rounds):
            async with (
                trio_wal.open_database(self._folder / f"{name}-{number}", log=log) as db,
                trio.open_nursery() as nursery,
            ):
                for task in range(TASKS):
                    nursery.start_soon(self._put, db, b"%d.%d" % (number, task), acknowledged)
                await self._promote(f"{name}-{number}-standby", log, acknowledged, number % 2 == 1)
                nursery.cancel_scope.cancel()
            self.figures["runs"] += 1
        async with trio_wal.open_database(self._folder / f"{name}-new", log=log) as db:
            found = dict(db.scan())
        assert acknowledged.items() <= found.items(), "lost"
        self.figures["acknowledged"] += len(acknowledged)

    async def _put(self, db: Any, name: bytes, acknowledged: dict[bytes, bytes]) -> None:
        number = 0
        with suppress(trio_wal.LogFencedError):
            while True:
                key = b"%s.%d" % (name, number)
                await db.put(key, b"value")
                acknowledged[key] = b"value"
                number += 1

    async def _promote(
        self, name: str, log: nats.Log, acknowledged: dict[bytes, bytes], kill: bool
    ) -> None:
        async with trio_wal.open_replica(self._folder / name, log=log) as replica:
            with trio.fail_after(self._limit):
                await replica.wait_for(max(1, len(acknowledged)))
            await trio.sleep(LIFE_SECONDS)
            if kill:
                server = await leader(self._cluster, log)
                await trio.to_thread.run_sync(server.kill)
            began = time.monotonic()
            async with replica.promote() as db:
                before = dict(acknowledged)
                await db.put(b"by " + name.encode(), b"the new one")
                self.again = max(self.again, time.monotonic() - began)
                assert before.items() <= dict(db.scan()).items(), "lost at a promotion"
        if kill:
            self._cluster.start_servers()
            await trio.to_thread.run_sync(heal, self._cluster)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, count=40, workers=False)
    parser.add_argument("--only", choices=list(PARTS_OF_COUNT), help="all events are of this kind")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds that nothing may last (%(default)s)"
    )


def events(arguments: argparse.Namespace) -> dict[str, int]:
    """How many of each kind."""
    if arguments.only is not None:
        return {arguments.only: arguments.count}
    return {kind: -(-arguments.count // part) for kind, part in PARTS_OF_COUNT.items()}


def _run_series(
    report: Report, kind: str, count: int, folder: Path, cluster: nats_cluster.Cluster, bar: Bar
) -> None:
    assert report.arguments is not None
    series = Series(folder, cluster, report.arguments.limit)
    for first in range(0, count, ROUNDS):
        if bar.over():
            break
        rounds = min(ROUNDS, count - first)
        try:
            # Whatever the ones before have left behind.
            heal(cluster)
            trio.run(getattr(series, kind), f"{kind}-{first}", rounds)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # noqa: BLE001, ASYNC103  (a finding, or several)
            seed = report.arguments.seed
            again = ("--only", kind, "--count", rounds, "--seed", seed)
            report.find(
                f"{kind}, from {first} on: {described(exc)}", replay_command("cluster", *again)
            )
        bar.advance(rounds, f"{kind}: {series.figures['acknowledged']:,} acknowledged")
    cells: dict[str, Any] = {column: series.figures[column] for column in COLUMNS}
    cells |= {"gap": f"{series.gap:.1f}", "again": f"{series.again:.2f}"}
    report.add(**{"series": kind, **cells, "bound": bound(series.figures["runs"])})


def run(arguments: argparse.Namespace) -> int:
    report = Report("cluster", arguments, {"series": "series", **COLUMNS})
    if (reason := nats_cluster.missing()) is not None:
        report.note(reason)
        return report.finish()
    chosen = events(arguments)
    with (
        tempfile.TemporaryDirectory() as temporary,
        nats_cluster.running(Path(temporary), 3, seed=arguments.seed % 40 + 11) as cluster,
        progress_bar("cluster", minutes=arguments.minutes, count=sum(chosen.values())) as bar,
    ):
        for kind, count in chosen.items():
            _run_series(report, kind, count, Path(temporary) / "stores", cluster, bar)
    return report.finish()
