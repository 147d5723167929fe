"""A log on three NATS servers of this machine, beside bare publishes of the same sizes.

Law: ratios are taken within a round, in which the log and what it is compared with take turns;
absolute figures say little of other disks and networks.  A bare publish is one message, one in
flight, appended by compare-and-set, by the same client: what a batch cannot be faster than.  The
servers are processes of this machine, so that no trial is free of what they use of it.

Where 1,024 tasks wait for each batch, what the servers need and what Python needs for as many tasks
follow each other: the bound is both times together, the latter measured by the same log on servers
in memory.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from harness import Comparison, Contender, Setting, Spread, percentile
from report import Report, Requirement, spread_text, table

import trio_wal
from trio_wal import nats

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import nats_cluster
from cas import CasServers, open_wal_on_cas
from nats_writers import Writers, heal, leader

RECORD: Final = bytes(100)
TASKS: Final = (1, 16, 128, 1024)
UNITS: Final = {800_000: 0.7, 8_000_000: 0.75}
"""Bytes of a unit, and what share of bare publishes it must reach."""
UNIT_RECORD: Final = bytes(20_000)
BARE_BYTES: Final = 900_000
"""Of a bare publish beside units: nearly as large as a message may be."""
WRITERS: Final = 64
"""Tasks of the database."""
NEEDED: Final = 0.75
GAP_SECONDS: Final = 12.0


def turns(contenders: Sequence[Contender], rounds: int) -> Comparison:
    """As `harness.compare`, which would count the servers as somebody else's load."""
    result = Comparison(rounds, {contender.name: [] for contender in contenders})
    for round_ in range(rounds):
        for contender in contenders if round_ % 2 == 0 else reversed(contenders):
            result.trials[contender.name].append(dict(contender.run()))
    return result


def bound(publishes: float, records: float, null: float) -> float:
    """Records per second at most, where batches of so many records are published at this rate, and
    this log could do as much with servers that answer at once."""
    return 1 / (1 / (publishes * records) + 1 / null)


# -- trials ----------------------------------------------------------------------------


def bare(cluster: nats_cluster.Cluster, size: int, seconds: float) -> dict[str, float]:
    """Publishes of so many bytes, one in flight, each right behind the last one."""
    from nats.aio.client import Client

    async def publish() -> float:
        client = Client()
        await client.connect(cluster.urls[0])
        stream = client.jetstream()
        name = f"bare-{time.monotonic_ns()}"
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

    return {"per second": asyncio.run(publish())}


async def _append(wal: trio_wal.WriteAheadLog, tasks: int, seconds: float) -> dict[str, float]:
    until = time.monotonic() + seconds

    async def append() -> None:
        while time.monotonic() < until:
            await wal.append(RECORD)

    began = time.monotonic()
    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(append)
    took = time.monotonic() - began
    found = wal.statistics()
    batches = found.batches_synced
    return {
        "batches": batches / took,
        "records": found.records_appended / took,
        "records of a batch": found.records_appended / batches,
    }


async def _appends(log: nats.Log, tasks: int, seconds: float) -> dict[str, float]:
    async with trio_wal.open_wal(log) as wal:
        return await _append(wal, tasks, seconds)


async def _null(tasks: int, seconds: float) -> dict[str, float]:
    async with open_wal_on_cas(CasServers()) as wal:
        found = await _append(wal, tasks, seconds)
    return {"records": found["records"]}


async def _units(log: nats.Log, size: int, seconds: float) -> dict[str, float]:
    unit = [UNIT_RECORD] * (size // len(UNIT_RECORD))
    async with trio_wal.open_wal(log) as wal:
        began, count = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            await wal.append_many(unit)
            count += 1
        return {"MB": count * size / (time.monotonic() - began) / 1e6}


async def _replay(log: nats.Log) -> dict[str, float]:
    async with trio_wal.open_reader(log) as reader, reader.read() as records:
        size = count = 0
        began = time.monotonic()
        async for record in records:
            size += len(record.data)
            count += 1
        took = time.monotonic() - began
    return {"MB": size / took / 1e6, "records": count / took}


async def _database(log: nats.Log, folder: Path, seconds: float) -> dict[str, float]:
    lags: list[float] = []
    async with (
        trio_wal.open_database(folder / "leader", log=log) as db,
        trio_wal.open_replica(folder / "replica", log=log) as replica,
    ):
        until = time.monotonic() + seconds

        async def write(task: int) -> None:
            keys = [b"%d.%d" % (task, key) for key in range(4)]
            count = 0
            while time.monotonic() < until:
                async with db.transaction() as tx:
                    for key in keys:
                        tx.get(key)
                        tx.put(key, b"%d" % count)
                count += 1

        async def watch() -> None:
            while time.monotonic() < until:
                lsn, began = db.durable_lsn, time.monotonic()
                await replica.wait_for(lsn)
                lags.append(time.monotonic() - began)
                await trio.sleep(0.01)

        began = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            for task in range(WRITERS):
                nursery.start_soon(write, task)
        rate = db.statistics().transactions / (time.monotonic() - began)
        began = time.monotonic()
        async with replica.promote():
            promoted = time.monotonic() - began
    lag = percentile(sorted(lags), 0.99) * 1e3
    return {"transactions": rate, "lag ms": lag, "promotion s": promoted}


async def _death(cluster: nats_cluster.Cluster, log: nats.Log) -> dict[str, float]:
    """Seconds without an acknowledgement, around the death of the stream's leader."""
    writers, over = Writers(16), trio.Event()
    async with trio_wal.open_wal(log) as wal, trio.open_nursery() as nursery:
        nursery.start_soon(writers.run, wal, over.is_set)
        await trio.sleep(0.5)
        server = await leader(cluster, log)
        before = len(writers.acknowledged)
        await trio.to_thread.run_sync(server.kill)
        with trio.fail_after(60):
            while len(writers.acknowledged) < before + 100:  # noqa: ASYNC110
                await trio.sleep(0.01)
        over.set()
    return {"gap s": writers.gap}


# -- the benchmark ---------------------------------------------------------------------


class _Bench:
    def __init__(self, setting: Setting, cluster: nats_cluster.Cluster, folder: Path) -> None:
        self.report = Report("replicated")
        self._cluster = cluster
        self._folder = folder
        self._seconds, self._rounds = (1.0, 3) if setting.brief else (3.0, 5)
        self._names = 0

    def _log(self, name: str | None = None) -> nats.Log:
        self._names += 1
        name = name or f"log-{self._names}"
        return nats.Log(self._cluster.urls, name, monitor=self._cluster.monitors)

    def _run(self, trial: Callable[..., Any], *arguments: object) -> dict[str, float]:
        found: dict[str, float] = trio.run(trial, *arguments)
        return found

    def _require(self, key: str, what: str, limit: float, measured: Spread, **how: Any) -> None:
        at_most = how.get("at_most", False)
        needed = f"at {'most' if at_most else 'least'} {limit:g} {how.get('unit', '×')}"
        requirement = Requirement(f"replicated {key}", what, needed, limit, measured, **how)
        self.report.requirements.append(requirement)

    def appends(self) -> None:
        seconds, rounds = self._seconds, self._rounds
        title = f"Appends of {len(RECORD)} bytes, {rounds} rounds of {seconds:g} s"
        shown = table(title, ["tasks", "appends/s", "batches/s", "bare/s", "of the bound"])
        for tasks in TASKS:
            # How large its batches are must be known before anything is compared.
            known = self._run(_appends, self._log(), tasks, seconds)["records of a batch"]
            size = round(known * (len(RECORD) + 4)) + 64
            log = self._log(f"appends-{tasks}")
            contenders = [
                Contender("log", partial(self._run, _appends, log, tasks, seconds)),
                Contender("bare", partial(bare, self._cluster, size, seconds)),
            ]
            if tasks == TASKS[-1]:
                contenders.append(Contender("null", partial(self._run, _null, tasks, seconds)))
            found = turns(contenders, rounds)
            ratio = found.ratio("log", "bare")
            if tasks == TASKS[-1]:
                ratio = _of_bound(found)
            what = f"appends, {tasks:,} at a time, to bare publishes"
            if tasks == TASKS[-1]:
                what += ", and Python's share"
            self._require(f"appends {tasks}", what, NEEDED, ratio)
            rates = (found.spread("log", "records"), found.spread("log"), found.spread("bare"))
            shown.add_row(f"{tasks:,}", *(spread_text(spread) for spread in (*rates, ratio)))
            self.report.data[f"appends {tasks}"] = found.trials
        self.report.tables.append(shown)

    def units(self) -> None:
        for size, needed in UNITS.items():
            log = self._log(f"units-{size}")

            def publishes() -> dict[str, float]:
                found = bare(self._cluster, BARE_BYTES, self._seconds)
                return {"MB": found["per second"] * BARE_BYTES / 1e6}

            found = turns(
                [
                    Contender("log", partial(self._run, _units, log, size, self._seconds)),
                    Contender("bare", publishes),
                ],
                self._rounds,
            )
            what = f"units of {size // 1000:,} KB, to bare publishes of {BARE_BYTES // 1000} KB"
            self._require(f"units {size}", what, needed, found.ratio("log", "bare"))
            self.report.data[f"units {size}"] = found.trials

    def replays(self) -> None:
        """Of what the trials before have written."""
        contenders = [
            Contender("large", partial(self._run, _replay, self._log("units-800000"))),
            Contender("small", partial(self._run, _replay, self._log(f"appends-{TASKS[-1]}"))),
        ]
        found = turns(contenders, self._rounds)
        self._require("replay", "replay of 20 KB records", 100, found.spread("large"), unit="MB/s")
        what = f"replay of {len(RECORD)} byte records"
        records = found.spread("small", "records")
        self._require("replay records", what, 400_000, records, unit="records/s")
        self.report.data["replay"] = found.trials

    def databases(self) -> None:
        def trial() -> dict[str, float]:
            log = self._log()
            return self._run(_database, log, self._folder / log.name, self._seconds)

        found = turns([Contender("database", trial)], self._rounds)
        require = self._require
        what = f"serializable transactions with {WRITERS} tasks, 4 reads and writes each"
        rate = found.spread("database", "transactions")
        require("transactions", what, 5_000, rate, unit="per second")
        lag = found.spread("database", "lag ms")
        require("lag", "a replica behind it, p99", 100, lag, unit="ms", at_most=True)
        promoted = found.spread("database", "promotion s")
        require("promotion", "its promotion", 1, promoted, unit="s", at_most=True)
        self.report.data["database"] = found.trials

    def deaths(self) -> None:
        gaps: list[float] = []
        for _ in range(self._rounds):
            gaps.append(self._run(_death, self._cluster, self._log())["gap s"])
            heal(self._cluster)
        what = "without an acknowledgement after a leader's death"
        # The longest one counts, not the median.
        spread = Spread(max(gaps), min(gaps), max(gaps))
        self._require("death", what, GAP_SECONDS, spread, unit="s", at_most=True)
        self.report.data["deaths"] = gaps


def _of_bound(found: Comparison) -> Spread:
    """Of what could be done at most, round by round."""
    return Spread.of(
        [
            mine["records"]
            / bound(theirs["per second"], mine["records of a batch"], null["records"])
            for mine, theirs, null in zip(
                *(found.trials[name] for name in ("log", "bare", "null")), strict=True
            )
        ]
    )


def run(setting: Setting) -> Report:
    """The benchmark."""
    if (reason := nats_cluster.missing()) is not None:
        return Report("replicated", notes=[f"replicated: skipped, {reason}."])
    with setting.scratch() as folder, nats_cluster.running(folder / "servers", 3) as cluster:
        bench = _Bench(setting, cluster, folder)
        bench.appends()
        bench.units()
        bench.replays()
        bench.databases()
        bench.deaths()
        return bench.report
