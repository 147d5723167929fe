"""What every figure of the statistics is: its kind, its unit, and its name for monitoring.

Law: one table, from which the exporters and the documentation are made; a test holds that it has
every field, and no other.  What a figure means stands once: under its field.  Only exporters load
this module.

Names are Prometheus': ``trio_wal_``, what it is, the unit in base units, ``_total`` for counters.
OpenTelemetry has the same without ``_total``, which it adds itself where it speaks to Prometheus.
"""

from __future__ import annotations

import ast
import enum
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cache
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any, Final, final

import attrs

from . import _database_statistics, _health, _statistics
from ._database_statistics import DatabaseReaderStatistics, DatabaseStatistics, ReplicaStatistics
from ._health import Health
from ._statistics import ConsumerStatistics, Histogram, WalStatistics, WriterStatistics


class Kind(enum.Enum):
    """What a figure does."""

    COUNTER = "counter"
    """Only grows, from 0 at each open."""
    GAUGE = "gauge"
    HISTOGRAM = "histogram"
    SUM = "histogram's sum"
    """Of the histogram that names it; exported as a part of that."""
    TIME = "time"
    """Exported as seconds since 1970; nothing where there was none."""
    STATE = "state"
    """One of several words; exported as one series for each, 1 or 0."""
    INFO = "info"
    """A word that stays; exported as a label of a series that is 1."""
    TEXT = "text"
    """A sentence, which is not exported: figures beside it say that there is one."""
    LABEL = "label"
    """Stands in the labels of the others."""
    GROUP = "group"
    """Has figures of its own, which are in the table, too."""


@final
@attrs.frozen
class Unit:
    word: str
    ucum: str
    """As OpenTelemetry writes it."""
    suffix: str = ""
    """Of the name, where it is one of Prometheus' base units."""


def _things(word: str) -> Unit:
    return Unit(word, "{" + word.removesuffix("s") + "}")


BYTES: Final = Unit("bytes", "By", "_bytes")
SECONDS: Final = Unit("seconds", "s", "_seconds")
TIMESTAMP: Final = Unit("seconds since 1970", "s", "_timestamp_seconds")
RATIO: Final = Unit("0 to 1", "1", "_ratio")
NONE: Final = Unit("", "1")
LSN: Final = Unit("LSN", "{lsn}")
RECORDS: Final = _things("records")
TASKS: Final = _things("tasks")
WAITS: Final = _things("waits")
CALLS: Final = _things("calls")
SYNCS: Final = _things("syncs")
SEGMENTS: Final = _things("segments")
SERVERS: Final = _things("servers")
MESSAGES: Final = _things("messages")
BATCHES: Final = Unit("batches", "{batch}")
KEYS: Final = _things("keys")
TRANSACTIONS: Final = _things("transactions")
READERS: Final = _things("readers")
CHECKPOINTS: Final = _things("checkpoints")


@final
@attrs.frozen(eq=False)
class Metric:
    """A field of one of the statistics."""

    field: str
    kind: Kind
    unit: Unit = NONE
    stem: str = ""
    """What it is, in its exported name; where not given, the field."""
    sum_field: str = ""
    """Of a histogram: where the sum is."""
    label: str = ""
    """Of a state, or an info: the label that has the word."""
    words: tuple[str, ...] = ()
    """Of a state: all that there are."""
    of: type = object

    @property
    def exported(self) -> bool:
        """Whether it has a name of its own for monitoring."""
        return self.kind not in (Kind.SUM, Kind.TEXT, Kind.LABEL, Kind.GROUP)

    @property
    def name(self) -> str:
        """For Prometheus; without what is added for parts of a histogram."""
        total = "_total" if self.kind is Kind.COUNTER else ""
        return f"trio_wal_{self.stem}{self.unit.suffix}{total}"

    @property
    def otel_name(self) -> str:
        return f"trio_wal.{self.stem}{self.unit.suffix}"

    @property
    def text(self) -> str:
        """A sentence that says what it is, as under the field."""
        return _text(self)


@final
@attrs.frozen
class Group:
    """What one class has."""

    of: type
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...]


def _counter(field: str, unit: Unit, stem: str = "") -> Metric:
    return Metric(field, Kind.COUNTER, unit, stem)


def _gauge(field: str, unit: Unit = NONE, stem: str = "") -> Metric:
    return Metric(field, Kind.GAUGE, unit, stem)


def _histogram(field: str, stem: str, sum_field: str) -> Metric:
    return Metric(field, Kind.HISTOGRAM, SECONDS, stem, sum_field)


def _state(field: str, *words: str, label: str = "state", stem: str = "") -> Metric:
    return Metric(field, Kind.STATE, stem=stem, label=label, words=words)


def _group(of: type, prefix: str, labels: tuple[str, ...], *metrics: Metric) -> Group:
    return Group(
        of,
        labels,
        tuple(attrs.evolve(m, stem=prefix + (m.stem or m.field), of=of) for m in metrics),
    )


_QUEUE: Final = (
    _gauge("max_queue_size", RECORDS),
    _gauge("max_queue_bytes", BYTES, "max_queue"),
    _gauge("records_waiting", RECORDS),
    _gauge("bytes_waiting", BYTES, "waiting"),
    _gauge("peak_records_waiting", RECORDS),
    _gauge("peak_bytes_waiting", BYTES, "peak_waiting"),
    _gauge("tasks_waiting_send", TASKS),
    _counter("backpressure_waits", WAITS),
    Metric("backpressure_seconds", Kind.SUM, SECONDS),
    _histogram("backpressure_seconds_histogram", "backpressure", "backpressure_seconds"),
    _counter("rejected", CALLS),
    _counter("records_appended", RECORDS),
    _counter("bytes_appended", BYTES, "appended"),
)
"""What a log and each of its writers have."""

WRITER: Final = _group(
    WriterStatistics,
    "writer_",
    ("log", "writer"),
    Metric("name", Kind.LABEL, label="writer"),
    Metric("priority", Kind.INFO, label="priority"),
    *_QUEUE,
)

CONSUMER: Final = _group(
    ConsumerStatistics,
    "consumer_",
    ("log", "consumer"),
    _gauge("acknowledged_lsn", LSN),
    _gauge("lag_records", RECORDS),
    _gauge("lag_bytes", BYTES, "lag"),
    _gauge("lag_seconds", SECONDS, "lag"),
)

WAL: Final = _group(
    WalStatistics,
    "",
    ("log",),
    *_QUEUE,
    _gauge("queue_utilization", RATIO),
    _gauge("tasks_waiting_durable", TASKS),
    Metric("writers", Kind.GROUP),
    Metric("consumers", Kind.GROUP),
    _counter("batches_synced", SYNCS),
    Metric("sync_seconds_total", Kind.SUM, SECONDS),
    _gauge("sync_seconds_max", SECONDS, "sync_max"),
    _histogram("sync_seconds_histogram", "sync", "sync_seconds_total"),
    _gauge("first_lsn", LSN),
    _gauge("last_lsn", LSN),
    _gauge("durable_lsn", LSN),
    _gauge("segments", SEGMENTS),
    _gauge("disk_bytes", BYTES, "disk"),
    Metric("last_sync_time", Kind.TIME, TIMESTAMP, "last_sync"),
    _state("state", "open", "full", "closing", "closed", "failed"),
    _gauge("epoch"),
    _counter("loop_writes", BATCHES),
    _counter("loop_seconds_total", SECONDS, "loop"),
    _gauge("loop_seconds_max", SECONDS, "loop_max"),
    _counter("loop_slow", BATCHES),
    _gauge("position", MESSAGES, "stream_position"),
    _gauge("replicas", SERVERS),
    _gauge("replicas_current", SERVERS),
    _gauge("unsettled_seconds", SECONDS, "unsettled"),
    _counter("rotations", SERVERS, "server_rotations"),
    _counter("resolved", BATCHES, "batches_resolved"),
    _gauge("assume_synced"),
    _gauge("archived_lsn", LSN),
    _gauge("archive_lag_segments", SEGMENTS),
    _gauge("archive_lag_bytes", BYTES, "archive_lag"),
    _counter("archive_failures", CALLS),
    Metric("archive_error", Kind.TEXT),
)

DATABASE: Final = _group(
    DatabaseStatistics,
    "database_",
    ("log",),
    Metric("wal", Kind.GROUP),
    Metric("consumers", Kind.GROUP),
    _counter("transactions", TRANSACTIONS),
    _counter("conflicts", TRANSACTIONS),
    _gauge("pending", TRANSACTIONS),
    _gauge("memtable_keys", KEYS),
    _gauge("memtable_bytes", BYTES, "memtable"),
    _gauge("tasks_waiting_checkpoint", TASKS),
    _gauge("open_readers", READERS),
    _gauge("checkpoint_lsn", LSN),
    _counter("checkpoints", CHECKPOINTS),
    _gauge("checkpoint_seconds_last", SECONDS, "last_checkpoint"),
    _gauge("store_keys", KEYS),
    _gauge("store_bytes", BYTES, "store"),
)

READER: Final = _group(
    DatabaseReaderStatistics,
    "reader_",
    ("log",),
    _gauge("durable_lsn", LSN),
    _gauge("checkpoint_lsn", LSN),
    _gauge("memtable_keys", KEYS),
    _gauge("memtable_bytes", BYTES, "memtable"),
    _gauge("open_readers", READERS),
    _gauge("store_bytes", BYTES, "store"),
    Metric("consumers", Kind.GROUP),
    _gauge("following"),
)

REPLICA: Final = _group(
    ReplicaStatistics,
    "replica_",
    ("log",),
    _gauge("lsn", LSN),
    _gauge("known_lsn", LSN),
    _gauge("lag_seconds", SECONDS, "lag"),
    _counter("transactions", TRANSACTIONS),
    _gauge("checkpoint_lsn", LSN),
    _gauge("memtable_keys", KEYS),
    _gauge("open_readers", READERS),
)

HEALTH: Final = _group(
    Health,
    "health_",
    ("log",),
    _state("status", "ok", "degraded", "failed", label="status"),
    _state("reasons", *_health.CODES, label="code", stem="reason"),
)


@final
@attrs.frozen
class Look:
    """What was seen of a log, a database, a reader or a replica."""

    name: str
    """Its label."""
    statistics: Any
    health: Health
    age_seconds: float
    """How long ago the event loop last answered when figures were asked for; 0 where it has
    just answered."""


LOOK: Final = _group(
    Look,
    "statistics_",
    ("log",),
    Metric("name", Kind.LABEL, label="log"),
    Metric("statistics", Kind.GROUP),
    Metric("health", Kind.GROUP),
    _gauge("age_seconds", SECONDS, "age"),
)

TABLE: Final = (WAL, WRITER, CONSUMER, DATABASE, READER, REPLICA, HEALTH, LOOK)
_GROUPS: Final = {group.of: group for group in TABLE}


def metrics() -> Iterator[tuple[Group, Metric]]:
    """All that are exported."""
    for group in TABLE:
        for metric in group.metrics:
            if metric.exported:
                yield group, metric


# -- what fields mean -------------------------------------------------------------------


@cache
def docstrings(of: type) -> Mapping[str, str]:
    """What stands under each field of a class; nothing where there is no source to read."""
    for module in (_statistics, _database_statistics, _health, sys.modules[__name__]):
        for node in _source_of(module).body:
            if isinstance(node, ast.ClassDef) and node.name == of.__name__:
                return dict(_texts(node))
    return {}


@cache
def _source_of(module: ModuleType) -> ast.Module:
    try:
        return ast.parse(inspect.getsource(module))
    except OSError:
        return ast.Module([], [])


def _texts(definition: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, text in pairwise(definition.body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            yield field.target.id, inspect.cleandoc(text.value.value)


@cache
def _text(metric: Metric) -> str:
    return sentence(docstrings(metric.of).get(metric.field, ""))


def sentence(docstring: str) -> str:
    """The first one, without markup."""
    text = " ".join(docstring.split())
    text = re.split(r"\. |: \(|; |\.$", text, maxsplit=1)[0]
    return re.sub(r"`~?", "", text)


# -- values -----------------------------------------------------------------------------


@final
@attrs.frozen
class Buckets:
    """A histogram as monitoring has it."""

    cumulative: tuple[tuple[float, int], ...]
    """(upper bound in seconds, how many took at most so long)"""
    sum: float

    @property
    def count(self) -> int:
        return self.cumulative[-1][1]


Labels = tuple[str, ...]
Point = tuple[Metric, Labels, "float | Buckets"]
"""A figure, the values of its group's labels, with the word of a state or an info behind, and
what it is."""


def points(look: Look) -> Iterator[Point]:
    """All that was seen."""
    labels = (look.name,)
    yield from _points(look, LOOK, labels)
    yield from _points(look.health, HEALTH, labels)
    statistics = look.statistics
    if statistics is None:
        return
    yield from _points(statistics, _GROUPS[type(statistics)], labels)
    if isinstance(statistics, DatabaseStatistics):
        statistics = statistics.wal
        yield from _points(statistics, WAL, labels)
    if isinstance(statistics, WalStatistics):
        for name, writer in statistics.writers.items():
            yield from _points(writer, WRITER, (look.name, name))
    if isinstance(statistics, (WalStatistics, DatabaseReaderStatistics)):
        for name, consumer in statistics.consumers.items():
            yield from _points(consumer, CONSUMER, (look.name, name))


def _points(seen: Any, group: Group, labels: Labels) -> Iterator[Point]:
    for metric in group.metrics:
        value = getattr(seen, metric.field)
        kind = metric.kind
        if kind is Kind.GAUGE or kind is Kind.COUNTER:
            if value is not None:
                yield metric, labels, float(value)
        elif kind is Kind.HISTOGRAM:
            yield metric, labels, Buckets(cumulated(value), getattr(seen, metric.sum_field))
        elif kind is Kind.STATE:
            now = {value} if isinstance(value, str) else {reason.code for reason in value}
            for word in metric.words:
                yield metric, (*labels, word), float(word in now)
        elif kind is Kind.INFO:
            yield metric, (*labels, value), 1.0
        elif kind is Kind.TIME and isinstance(value, datetime):
            yield metric, labels, value.timestamp()


def cumulated(histogram: Histogram) -> tuple[tuple[float, int], ...]:
    """How many took at most as long as each bound says, not only those over the one before."""
    bounds, counts = zip(*histogram, strict=True)
    return tuple(zip(bounds, accumulate(counts), strict=True))
