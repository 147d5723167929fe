"""The table of metrics: every field has its kind, unit and name, and no other field has."""

from __future__ import annotations

import math
import re
from typing import Any

import attrs
import pytest

import trio_wal
from trio_wal._health import CODES, Health, judge
from trio_wal._metrics import (
    BYTES,
    RATIO,
    SECONDS,
    TABLE,
    TIMESTAMP,
    Buckets,
    Group,
    Kind,
    Look,
    Metric,
    cumulated,
    metrics,
    points,
)

STATISTICS = [
    getattr(trio_wal, name)
    for name in dir(trio_wal)
    if name.endswith("Statistics") and attrs.has(getattr(trio_wal, name))
]
EXPORTED = list(metrics())
NAMES = [metric.name for _, metric in EXPORTED]


def fields(cls: type) -> list[str]:
    return sorted(field.name for field in attrs.fields(cls))


@pytest.mark.parametrize("cls", [*STATISTICS, Health, Look], ids=lambda cls: cls.__name__)
def test_every_field_is_in_the_table_once(cls: type) -> None:
    (group,) = [group for group in TABLE if group.of is cls]
    assert sorted(metric.field for metric in group.metrics) == fields(cls)


def test_nothing_else_is_in_the_table() -> None:
    assert {group.of for group in TABLE} == {*STATISTICS, Health, Look}


def test_names_are_unique_and_prometheus_own() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for name in NAMES:
        assert re.fullmatch(r"trio_wal(_[a-z]+)+", name)
    # What is added for the parts of a histogram makes no name that there is.
    parts = [
        metric.name + part
        for _, metric in EXPORTED
        if metric.kind is Kind.HISTOGRAM
        for part in ("_bucket", "_sum", "_count", "_created")
    ]
    assert not set(parts) & set(NAMES)
    bare = [name.removesuffix("_total") for name in NAMES]
    assert len(set(bare)) == len(bare), "a counter is the family without _total"


@pytest.mark.parametrize(("group", "metric"), EXPORTED, ids=NAMES)
def test_a_name_ends_as_kind_and_unit_say(group: Group, metric: Metric) -> None:
    name = metric.name
    assert name.endswith("_total") == (metric.kind is Kind.COUNTER)
    stem = name.removesuffix("_total")
    for unit in (BYTES, SECONDS, RATIO, TIMESTAMP):
        if unit is metric.unit:
            assert stem.endswith(unit.suffix)
    for word, unit in (("bytes", BYTES), ("ratio", RATIO)):
        assert (word in stem.split("_")) == (metric.unit is unit)
    assert ("seconds" in stem.split("_")) == (metric.unit in (SECONDS, TIMESTAMP))
    assert metric.otel_name == "trio_wal." + stem.removeprefix("trio_wal_")
    # A field that names a unit has it.
    for word, units in (("bytes", (BYTES,)), ("seconds", (SECONDS,)), ("lsn", None)):
        if word in metric.field.split("_"):
            assert metric.unit.word == "LSN" if units is None else metric.unit in units
    assert group.labels[0] == "log"


@pytest.mark.parametrize(("group", "metric"), EXPORTED, ids=NAMES)
def test_a_metric_says_in_a_sentence_what_it_is(group: Group, metric: Metric) -> None:
    text = metric.text
    assert re.match(r"[A-Z]", text)
    assert len(text.split()) >= 2
    assert "`" not in text
    assert not text.endswith((".", ":", ";", ","))
    assert not re.match(r"(Their|They|The same|Of them|Those)\b", text), "read without the name"


@pytest.mark.parametrize(("group", "metric"), EXPORTED, ids=NAMES)
def test_kinds_fit_types(group: Group, metric: Metric) -> None:
    (hint,) = [field.type for field in attrs.fields(metric.of) if field.name == metric.field]
    shown = hint.__name__ if isinstance(hint, type) else str(hint)
    if metric.kind is Kind.HISTOGRAM:
        sums = {m.field: m for m in group.metrics}
        assert sums[metric.sum_field].kind is Kind.SUM
        assert "tuple" in shown or "Histogram" in shown
    elif metric.kind is Kind.TIME:
        assert "datetime" in shown
    elif metric.kind in (Kind.COUNTER, Kind.GAUGE):
        assert re.match(r"(int|float|bool)\b", shown), shown
        if metric.kind is Kind.COUNTER:
            assert "float" not in shown or metric.unit is SECONDS
    elif metric.kind is Kind.STATE and metric.field != "reasons":
        assert all(repr(word) in str(hint) for word in metric.words)
    assert bool(metric.label) == (metric.kind in (Kind.STATE, Kind.INFO))


def test_sums_belong_to_a_histogram() -> None:
    for group in TABLE:
        named = {metric.sum_field for metric in group.metrics if metric.sum_field}
        assert {m.field for m in group.metrics if m.kind is Kind.SUM} == named


def test_buckets_are_cumulative() -> None:
    histogram = ((0.1, 2), (1.0, 0), (math.inf, 5))
    assert cumulated(histogram) == ((0.1, 2), (1.0, 2), (math.inf, 7))
    assert Buckets(cumulated(histogram), 3.5).count == 7


def one_of(cls: type, **given: Any) -> Any:
    """Some values, of the right types."""
    values: dict[str, Any] = {}
    (group,) = [group for group in TABLE if group.of is cls]
    for number, metric in enumerate(group.metrics, 1):
        kind = metric.kind
        values[metric.field] = number
        if kind is Kind.HISTOGRAM:
            values[metric.field] = ((1.0, 1), (math.inf, number))
        elif kind in (Kind.STATE, Kind.INFO, Kind.LABEL):
            values[metric.field] = metric.words[0] if metric.words else "normal"
        elif kind in (Kind.TIME, Kind.TEXT):
            values[metric.field] = None
        elif kind is Kind.GROUP:
            values[metric.field] = {}
    return cls(**{**values, **given})


def seen(look: Look) -> dict[tuple[str, ...], float | Buckets]:
    found = [((metric.name, *labels), value) for metric, labels, value in points(look)]
    assert len(dict(found)) == len(found), "no series twice"
    return dict(found)


def test_a_database_is_seen_with_its_log_writers_and_consumers() -> None:
    consumers = {"mailer": one_of(trio_wal.ConsumerStatistics)}
    wal = one_of(
        trio_wal.WalStatistics,
        writers={"audit": one_of(trio_wal.WriterStatistics, name="audit", priority="high")},
        consumers=consumers,
    )
    database = one_of(trio_wal.DatabaseStatistics, wal=wal, consumers=consumers)
    found = seen(Look("/db", database, judge(()), 0.0))
    assert found["trio_wal_writer_priority", "/db", "audit", "high"] == 1
    assert found["trio_wal_consumer_lag_records", "/db", "mailer"] == 2
    assert found["trio_wal_state", "/db", "open"] == 1
    assert found["trio_wal_state", "/db", "failed"] == 0
    assert found["trio_wal_health_status", "/db", "ok"] == 1
    assert [found["trio_wal_health_reason", "/db", code] for code in CODES] == [0] * len(CODES)
    assert found["trio_wal_statistics_age_seconds", "/db"] == 0
    buckets = found["trio_wal_sync_seconds", "/db"]
    assert isinstance(buckets, Buckets)
    assert buckets.sum == wal.sync_seconds_total
    # Whatever has a value is there.
    groups = {group.of: group for group in TABLE}
    for cls in ("WalStatistics", "DatabaseStatistics", "WriterStatistics", "ConsumerStatistics"):
        for metric in groups[getattr(trio_wal, cls)].metrics:
            is_there = any(key[0] == metric.name for key in found)
            assert is_there == (metric.exported and metric.kind is not Kind.TIME), metric.field


def test_what_only_a_replicated_log_has_is_not_there_for_others() -> None:
    nothing = dict.fromkeys(
        ("position", "replicas", "replicas_current", "unsettled_seconds", "rotations"), None
    )
    wal = one_of(trio_wal.WalStatistics, resolved=None, assume_synced=None, **nothing)
    names = {key[0] for key in seen(Look("/log", wal, judge(()), 0.0))}
    assert "trio_wal_durable_lsn" in names
    assert not names & {"trio_wal_replicas", "trio_wal_unsettled_seconds"}
