"""`trio_wal.otel`: the same figures as OpenTelemetry's observable instruments."""

from __future__ import annotations

import errno
import math
from typing import Any

import pytest
import trio
from databases import open_memory_database
from helpers import open_memory

from trio_wal import LogFailedError, _sampling
from trio_wal._metrics import Kind, metrics
from trio_wal.testing import MemoryFiles

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import metrics as api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Gauge, InMemoryMetricReader, Sum

from trio_wal.otel import instrument

Points = dict[tuple[str, frozenset[tuple[str, Any]]], float]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loop answers too late, however busy this machine is."""
    monkeypatch.setattr(_sampling, "LOOP_SECONDS", 60.0)


def provider() -> tuple[MeterProvider, InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    return MeterProvider([reader], shutdown_on_exit=False), reader


def collected(reader: InMemoryMetricReader) -> dict[str, Any]:
    data = reader.get_metrics_data()
    if data is None:
        return {}
    return {
        metric.name: metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def points(reader: InMemoryMetricReader) -> Points:
    return {
        (name, frozenset(point.attributes.items())): point.value
        for name, metric in collected(reader).items()
        for point in metric.data.data_points
    }


def value(found: Points, name: str, **attributes: str) -> float:
    return found[f"trio_wal.{name}", frozenset(attributes.items())]


async def test_instruments_say_what_the_statistics_say(files: MemoryFiles) -> None:
    meters, reader = provider()
    async with open_memory_database(files) as db, db.writer("w") as writer, db.consumer("c"):
        with instrument(db, meter_provider=meters):
            await db.put(b"key", b"value")
            await writer.put(b"key", b"value")
            found, statistics = points(reader), db.statistics()
    assert value(found, "database_transactions", log="/db") == statistics.transactions == 3
    assert value(found, "records_appended", log="/db") == 3
    assert value(found, "appended_bytes", log="/db") == statistics.wal.bytes_appended
    assert value(found, "writer_records_appended", log="/db", writer="w") == 1
    assert value(found, "consumer_lag_records", log="/db", consumer="c") == 2
    assert value(found, "state", log="/db", state="open") == 1
    assert value(found, "state", log="/db", state="closed") == 0
    assert value(found, "health_status", log="/db", status="ok") == 1
    assert value(found, "writer_priority", log="/db", writer="w", priority="normal") == 1
    assert value(found, "sync_seconds.count", log="/db") == statistics.wal.batches_synced
    assert value(found, "sync_seconds.sum", log="/db") == statistics.wal.sync_seconds_total
    assert value(found, "sync_seconds.bucket", log="/db", le="inf") == statistics.wal.batches_synced
    bounds = {
        float(dict(attributes)["le"]): count
        for (name, attributes), count in found.items()
        if name == "trio_wal.sync_seconds.bucket"
    }
    counts = [bounds[bound] for bound in sorted(bounds)]
    assert counts == sorted(counts)
    assert len(bounds) == len(statistics.wal.sync_seconds_histogram)


async def test_instruments_have_kind_unit_and_sentence_of_the_table(files: MemoryFiles) -> None:
    meters, reader = provider()
    async with open_memory_database(files) as db, db.writer("w"), db.consumer("c"):
        await db.put(b"key", b"value")
        with instrument(db, meter_provider=meters):
            found = collected(reader)
    seen = 0
    for _, metric in metrics():
        name = metric.otel_name
        if metric.kind is Kind.HISTOGRAM:
            name += ".sum"
        if name in found:
            seen += 1
            instrument_seen = found[name]
            assert instrument_seen.description == metric.text
            assert instrument_seen.unit == metric.unit.ucum
            counts = metric.kind in (Kind.COUNTER, Kind.HISTOGRAM)
            assert isinstance(instrument_seen.data, Sum if counts else Gauge)
            if counts:
                assert instrument_seen.data.is_monotonic
    assert seen > 50


async def test_a_collection_is_one_look_and_the_next_one_another(files: MemoryFiles) -> None:
    """Also where one comes directly after the other, from another thread."""
    meters, reader = provider()
    async with open_memory(files) as wal:
        with instrument(wal, meter_provider=meters):
            for number in range(1, 20):
                await wal.append(b"record")
                found = await trio.to_thread.run_sync(points, reader)
                assert value(found, "durable_lsn", log="/log") == number
                assert value(found, "records_appended", log="/log") == number
        # Of what is observed no more there is nothing.
        assert points(reader) == {}


async def test_closed_and_failed_logs_keep_their_last_state(files: MemoryFiles) -> None:
    meters, reader = provider()
    broken = MemoryFiles()
    async with open_memory(files) as wal, open_memory(broken) as failing:
        instrumentation = instrument(wal, meter_provider=meters)
        instrumentation.add(failing, name="failing")
        await wal.append(b"record")
        broken.fail("sync", errno.EIO)
        with pytest.raises(LogFailedError):
            await failing.append(b"record")
    found = points(reader)
    assert value(found, "durable_lsn", log="/log") == 1
    assert value(found, "state", log="/log", state="closed") == 1
    assert value(found, "health_reason", log="failing", code="failed") == 1
    instrumentation.remove(failing)
    found = points(reader)
    assert not any(dict(attributes)["log"] == "failing" for _, attributes in found)
    instrumentation.uninstrument()
    instrumentation.uninstrument()
    assert points(reader) == {}


async def test_without_a_provider_it_is_the_programs(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    meters, reader = provider()
    monkeypatch.setattr("trio_wal.otel.get_meter_provider", lambda: meters)
    async with open_memory(files, max_queue_size=math.inf) as wal:
        with instrument(wal):
            found = points(reader)
    assert value(found, "durable_lsn", log="/log") == 0
    assert ("trio_wal.max_queue_size", frozenset({("log", "/log")})) not in found
    # Where the program has set none, nothing happens.
    async with open_memory(files) as wal:
        with instrument(wal, meter_provider=api.NoOpMeterProvider()):
            await wal.append(b"record")


async def test_bad_objects_are_refused(files: MemoryFiles) -> None:
    with pytest.raises(TypeError, match=r"^objects must be open logs, databases"):
        instrument("log")  # type: ignore[arg-type]
    async with open_memory(files) as wal:
        with pytest.raises(RuntimeError, match="by a task of the trio run"):
            await trio.to_thread.run_sync(instrument, wal)
