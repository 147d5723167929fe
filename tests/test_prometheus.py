"""`trio_wal.prometheus`: what a scrape says, where it may come from, and what it survives."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio
from campaigns._simulator import seeded_run
from cas import CasServers, MemoryLog, open_wal_on_cas
from databases import open_memory_database
from helpers import open_memory, until

import trio_wal
from trio_wal import DirectoryArchive, LogFailedError, _sampling
from trio_wal.testing import MemoryFiles

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.openmetrics import exposition
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from trio_wal._metrics import Buckets, Kind, metrics, points
from trio_wal._sampling import Sampler
from trio_wal.prometheus import WalCollector

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def registry_of(collector: WalCollector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry


def scrape(registry: CollectorRegistry) -> Samples:
    """What Prometheus gets, after a check that it is what it should be."""
    text = generate_latest(registry).decode()
    found: Samples = {}
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert family.documentation
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    check_histograms(found)
    return found


def check_histograms(found: Samples) -> None:
    buckets: dict[Any, dict[float, float]] = {}
    for (name, labels), value in found.items():
        if name.endswith("_bucket"):
            of = {key: text for key, text in labels if key != "le"}
            key = name.removesuffix("_bucket"), frozenset(of.items())
            buckets.setdefault(key, {})[float(dict(labels)["le"])] = value
    assert buckets
    for (name, labels), counts in buckets.items():
        assert list(counts) == sorted(counts)
        assert list(counts.values()) == sorted(counts.values()), "cumulative"
        assert counts[math.inf] == found[f"{name}_count", labels]
        assert (found[f"{name}_sum", labels] > 0) <= (counts[math.inf] > 0)


def value(found: Samples, name: str, **labels: str) -> float:
    return found[f"trio_wal_{name}", frozenset(labels.items())]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loop answers too late, however busy this machine is."""
    monkeypatch.setattr(_sampling, "LOOP_SECONDS", 60.0)


# -- what it says -----------------------------------------------------------------------


async def test_a_scrape_says_what_the_statistics_say(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, wal.writer("audit", max_queue_size=7) as audit:
        registry = registry_of(WalCollector(wal))
        for _ in range(5):
            await wal.append(b"record")
        await audit.append(b"more")
        async with wal.consumer("mailer"):
            found, statistics = scrape(registry), wal.statistics()
        assert value(found, "records_appended_total", log="/log") == 6
        assert value(found, "appended_bytes_total", log="/log") == 34
        assert value(found, "durable_lsn", log="/log") == 6
        assert value(found, "sync_seconds_count", log="/log") == statistics.batches_synced
        assert value(found, "sync_seconds_sum", log="/log") == statistics.sync_seconds_total
        assert value(found, "state", log="/log", state="open") == 1
        assert value(found, "state", log="/log", state="failed") == 0
        assert value(found, "health_status", log="/log", status="ok") == 1
        last = value(found, "last_sync_timestamp_seconds", log="/log")
        assert last == statistics.last_sync_time.timestamp()
        of_writer = {"log": "/log", "writer": "audit"}
        assert value(found, "writer_records_appended_total", **of_writer) == 1
        assert value(found, "writer_max_queue_size", **of_writer) == 7
        assert value(found, "consumer_lag_records", log="/log", consumer="mailer") == 6
        assert not any("database" in name or "replica" in name for name, _ in found)


async def test_an_unbounded_queue_is_infinite(files: MemoryFiles) -> None:
    async with open_memory(files, max_queue_size=math.inf) as wal:
        found = scrape(registry_of(WalCollector(wal)))
    assert value(found, "max_queue_size", log="/log") == math.inf
    assert value(found, "queue_utilization_ratio", log="/log") == 0


async def test_openmetrics_is_understood_too(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, db.writer("w"), db.consumer("c"):
        await db.put(b"key", b"value")
        text = exposition.generate_latest(registry_of(WalCollector(db))).decode()
    families = {family.name: family for family in parse_openmetrics(text)}
    assert families["trio_wal_sync_seconds"].type == "histogram"
    assert families["trio_wal_records_appended"].type == "counter"


async def test_names_of_all_kinds_are_labels(files: MemoryFiles) -> None:
    name = 'a "quoted"\\ name\nof \x01 two lines \u202e'
    async with open_memory(files) as wal, wal.writer(name):
        found = scrape(registry_of(WalCollector(wal)))
    # What a label may hold is the parser's business; that the lines stay lines is ours.
    assert [dict(labels)["writer"] for _, labels in found if "writer" in dict(labels)]


async def test_all_kinds_of_objects_stand_beside_one_another(
    files: MemoryFiles, tmp_path: Path
) -> None:
    log = MemoryLog(CasServers())
    async with (
        trio_wal.open_database(tmp_path / "a", log=log) as leader,
        trio_wal.open_replica(tmp_path / "b", log=log) as replica,
        open_memory_database(files) as db,
        trio_wal.open_database_reader("/db", files=files) as reader,
        open_wal_on_cas(CasServers(seed=2)) as wal,
    ):
        await replica.wait_for(await leader.put(b"key", b"value"))
        await reader.wait_for(await db.put(b"key", b"value"))
        collector = WalCollector(leader, replica, db)
        collector.add(reader, name="reader")
        collector.add(wal, name="wal")
        found = scrape(registry_of(collector))
        assert value(found, "replicas", log="wal") == 3
        assert value(found, "replica_lsn", log=replica.path) == 1
        assert value(found, "database_transactions_total", log=leader.path) == 1
        assert value(found, "reader_durable_lsn", log="reader") == 1
        assert value(found, "reader_following", log="reader") == 1
        assert ("trio_wal_replicas", frozenset({("log", "/db")})) not in found
        collector.remove(db)
        assert ("trio_wal_durable_lsn", frozenset({("log", "/db")})) not in scrape(
            registry_of(collector)
        )
    # Readers and replicas have no statistics any more: what they last said stays.
    found = scrape(registry_of(collector))
    assert value(found, "replica_lsn", log=replica.path) == 1
    assert value(found, "reader_durable_lsn", log="reader") == 1
    assert value(found, "health_reason", log="reader", code="closed") == 1
    assert value(found, "state", log=leader.path, state="closed") == 1


class _Plain(Collector):
    """The same, as the library's documentation has it done."""

    def __init__(self, collector: WalCollector) -> None:
        self._collector = collector

    def collect(self) -> Iterator[Any]:
        families: dict[Any, Any] = {}
        labels_of = {metric: group.labels for group, metric in metrics()}
        for look in self._collector._sampler.looks():
            for metric, labels, seen in points(look):
                names = labels_of[metric] + ((metric.label,) if metric.label else ())
                kind = {Kind.COUNTER: CounterMetricFamily, Kind.HISTOGRAM: HistogramMetricFamily}
                if metric not in families:
                    made = kind.get(metric.kind, GaugeMetricFamily)
                    families[metric] = made(metric.name, metric.text, labels=names)
                if isinstance(seen, Buckets):
                    buckets = [
                        ("+Inf" if bound == math.inf else str(bound), count)
                        for bound, count in seen.cumulative
                    ]
                    families[metric].add_metric(labels, buckets, seen.sum)
                else:
                    families[metric].add_metric(labels, seen)
        yield from families.values()


async def test_a_scrape_is_to_the_byte_what_the_librarys_own_calls_would_say(
    files: MemoryFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_memory(files) as wal,
        open_memory_database(MemoryFiles(), "/a db") as db,
        trio_wal.open_wal(tmp_path / "archived", archive=DirectoryArchive(tmp_path / "x")) as other,
    ):
        collector = WalCollector(wal)
        registry, plain = registry_of(collector), CollectorRegistry()
        plain.register(_Plain(collector))

        async def check() -> None:
            looks = Sampler.looks(collector._sampler)
            # Ages are of each look.
            monkeypatch.setattr(collector._sampler, "looks", lambda: looks)
            for exposed in (generate_latest, exposition.generate_latest):
                # Twice: what is kept of one scrape is what the next one has.
                texts = [exposed(registry), exposed(plain), exposed(registry)]
                assert texts[0] == texts[1] == texts[2]
                assert texts[0].count(b"\n") > 80

        await check()
        await wal.append_many([b"x"] * 1_234_567)
        await check()
        async with wal.writer("one", priority="high") as writer, wal.writer('t"wo\n'):
            await writer.append(b"x")
            await check()
        async with wal.consumer("c\\"):
            await check()
        collector.add(db)
        collector.add(other, name="other")
        await db.put(b"key", b"value")
        await check()
        collector.remove(wal)
        collector.add(wal, name="another name")
        await check()
        collector.remove(db)
        await check()
    await check()


# -- which objects ----------------------------------------------------------------------


async def test_what_has_no_statistics_of_its_own_is_refused(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, wal.writer("w") as writer:
        for wrong in (writer, "log", None):
            with pytest.raises(TypeError, match=r"^objects must be open logs, databases"):
                WalCollector(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^name must be a str, not int$"):
            WalCollector().add(wal, name=5)  # type: ignore[arg-type]


async def test_objects_are_added_where_they_are_opened(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        with pytest.raises(RuntimeError, match="by a task of the trio run that opened them"):
            await trio.to_thread.run_sync(WalCollector, wal)


async def test_two_collectors_of_a_registry_are_refused(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        registry = registry_of(WalCollector(wal))
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            registry.register(WalCollector())


async def test_a_log_that_is_opened_again_takes_the_place_of_the_closed_one(
    files: MemoryFiles,
) -> None:
    collector = WalCollector()
    for number in range(1, 4):
        async with open_memory(files) as wal:
            collector.add(wal)
            await wal.append(b"record")
            found = scrape(registry_of(collector))
            assert value(found, "records_appended_total", log="/log") == 1
            assert value(found, "durable_lsn", log="/log") == number


# -- from where, and when ---------------------------------------------------------------


async def test_closed_and_failed_logs_keep_giving_their_last_state(files: MemoryFiles) -> None:
    broken = MemoryFiles()
    async with open_memory(files) as wal, open_memory(broken) as failing:
        collector = WalCollector(wal)
        collector.add(failing, name="failing")
        await wal.append(b"record")
        broken.fail("sync", errno.EIO)
        with pytest.raises(LogFailedError):
            await failing.append(b"record")
    for _ in range(2):
        found = await trio.to_thread.run_sync(scrape, registry_of(collector))
        assert value(found, "state", log="/log", state="closed") == 1
        assert value(found, "records_appended_total", log="/log") == 1
        assert value(found, "state", log="failing", state="failed") == 1
        assert value(found, "health_reason", log="failing", code="failed") == 1


def test_a_scrape_after_the_end_of_the_run_gives_the_end(tmp_path: Path) -> None:
    async def main() -> WalCollector:
        async with trio_wal.open_database(tmp_path / "db") as db:
            collector = WalCollector(db)
            for number in range(7):
                await db.put(b"%d" % number, b"value")
        return collector

    found = scrape(registry_of(trio.run(main)))
    path = str(tmp_path / "db")
    assert value(found, "database_transactions_total", log=path) == 7
    assert value(found, "database_store_keys", log=path) >= 0
    assert value(found, "state", log=path, state="closed") == 1
    assert value(found, "statistics_age_seconds", log=path) == 0


async def test_a_loop_that_does_not_answer_leaves_the_figures_of_before(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sampling, "LOOP_SECONDS", 0.01)
    async with open_memory(files) as wal:
        registry = registry_of(WalCollector(wal))
        await wal.append(b"record")
        scrape(registry)
        await wal.append(b"record")
        results: list[Samples] = []
        # The event loop stands still until the scrape has ended.
        thread = threading.Thread(target=lambda: results.append(scrape(registry)))
        thread.start()
        thread.join()
        (found,) = results
        assert value(found, "records_appended_total", log="/log") == 1
        assert value(found, "statistics_age_seconds", log="/log") > 0
        monkeypatch.setattr(_sampling, "LOOP_SECONDS", 60.0)
        found = await trio.to_thread.run_sync(scrape, registry)
        assert value(found, "records_appended_total", log="/log") == 2
        assert value(found, "statistics_age_seconds", log="/log") == 0


async def test_an_object_whose_statistics_fail_breaks_neither_the_scrape_nor_the_loop(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory(files) as wal:
        registry = registry_of(WalCollector(wal))

        def fail() -> Any:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(wal._log, "statistics", fail)
            found = await trio.to_thread.run_sync(scrape, registry)
            assert value(found, "durable_lsn", log="/log") == 0
        await wal.append(b"record")
        assert value(scrape(registry), "durable_lsn", log="/log") == 1


async def test_in_a_forked_child_nobody_is_asked(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        collector = WalCollector(wal)
        await wal.append(b"record")
        collector._sampler._disown()
        found = await trio.to_thread.run_sync(scrape, registry_of(collector))
        assert value(found, "durable_lsn", log="/log") == 0


async def test_figures_are_taken_by_the_loop_whoever_asks(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[int] = set()
    async with open_memory(files) as wal:
        look = wal._log.statistics

        def statistics() -> Any:
            threads.add(threading.get_ident())
            return look()

        monkeypatch.setattr(wal._log, "statistics", statistics)
        registry = registry_of(WalCollector(wal))
        scrape(registry)
        for _ in range(3):
            await trio.to_thread.run_sync(scrape, registry)
    assert threads == {threading.get_ident()}


async def test_threads_may_scrape_a_busy_database(tmp_path: Path) -> None:
    """Writers, consumers and checkpoints come and go meanwhile, and the store's map grows."""
    async with trio_wal.open_database(
        tmp_path / "db", map_size=1 << 20, checkpoint_bytes=20_000, max_queue_size=4
    ) as db:
        registry = registry_of(WalCollector(db))
        results: list[Samples] = []
        stop = threading.Event()

        def scrape_on() -> None:
            last = -1.0
            for _ in range(25):
                found = scrape(registry)
                results.append(found)
                count = value(found, "records_appended_total", log=db.path)
                assert count >= last
                last = count
                assert value(found, "statistics_age_seconds", log=db.path) >= 0
            stop.set()

        async def write(number: int) -> None:
            for turn in range(1_000_000):
                if stop.is_set():
                    break
                async with db.writer(f"{number}-{turn}") as writer:
                    await writer.put(b"%d-%d" % (number, turn % 500), bytes(300))
                if turn % 20 == 0:
                    async with db.consumer(f"{number}-{turn}"):
                        pass
                    await db.drop_consumer(f"{number}-{turn}")

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(write, number)
            async with trio.open_nursery() as threads:
                for _ in range(3):
                    threads.start_soon(trio.to_thread.run_sync, scrape_on)
            stop.set()
        assert len(results) == 75
    assert any("writer" in dict(labels) for found in results for _, labels in found)


async def test_several_runs_of_trio_are_each_asked_in_their_own(files: MemoryFiles) -> None:
    """One collector for a program with two event loops."""
    collector = WalCollector()
    opened, stop = threading.Event(), trio.Event()
    token: list[Any] = []

    async def other() -> None:
        async with open_memory(MemoryFiles()) as wal:
            collector.add(wal, name="other")
            await wal.append(b"record")
            ended = trio.Event()
            token.extend((trio.lowlevel.current_trio_token(), ended))
            opened.set()
            await ended.wait()

    async with open_memory(files) as wal, trio.open_nursery() as nursery:
        collector.add(wal, name="this")
        nursery.start_soon(trio.to_thread.run_sync, trio.run, other)
        await until(opened.is_set)
        found = scrape(registry_of(collector))
        assert value(found, "durable_lsn", log="this") == 0
        assert value(found, "durable_lsn", log="other") == 1
        token[0].run_sync_soon(token[1].set)
    stop.set()
    found = scrape(registry_of(collector))
    assert value(found, "state", log="other", state="closed") == 1


# -- installed or not -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "needs"),
    [("prometheus", "prometheus_client"), ("otel", "opentelemetry")],
)
def test_without_the_extra_it_says_what_to_install(module: str, needs: str) -> None:
    code = (
        f"import sys; sys.modules[{needs!r}] = None\n"
        "import trio_wal\n"
        f"try: trio_wal.{module}\n"
        "except ModuleNotFoundError as exc: print(exc)\n"
    )
    root = str(Path(trio_wal.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        encoding="utf-8",
        env={"PYTHONPATH": root},
    )
    assert f"python -m pip install 'trio-wal[{module}]'" in run.stdout


def lines_of_appends(*, collected: bool) -> Counter[tuple[str, int]]:
    """How often each line of the package runs while many tasks append, in one order of tasks."""
    ran: Counter[tuple[str, int]] = Counter()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if "/trio_wal/" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        ran[frame.f_code.co_filename, frame.f_lineno] += event == "line"
        return trace

    async def main() -> None:
        async with open_memory(MemoryFiles(seed=1)) as wal:
            registry = CollectorRegistry()
            if collected:
                registry.register(WalCollector(wal))
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                async with trio.open_nursery() as nursery:
                    for _ in range(20):
                        nursery.start_soon(append_some, wal)
            finally:
                sys.settrace(before)
            assert bool(generate_latest(registry)) == collected

    async def append_some(wal: trio_wal.WriteAheadLog) -> None:
        for _ in range(20):
            await wal.append(b"record")

    seeded_run(main, seed=1)
    return ran


def test_a_collector_costs_an_append_nothing() -> None:
    """Not a line is run that would not be run without it."""
    alone = lines_of_appends(collected=False)
    assert sum(alone.values()) > 400
    assert lines_of_appends(collected=True) == alone
