"""Metrics for Prometheus: `WalCollector`.

Law: nothing is counted here; ``_metrics`` says what there is and how it is called, ``_sampling``
looks at it.

Needs the extra ``prometheus``.  Nothing is done between two scrapes.

::

    from prometheus_client import REGISTRY, start_http_server
    from trio_wal.prometheus import WalCollector

    async with trio_wal.open_database("bank.db") as db:
        REGISTRY.register(WalCollector(db))
        start_http_server(9464)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import copy
from functools import cache, partial
from typing import Final, final

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.metrics_core import Metric as Family
    from prometheus_client.registry import Collector
    from prometheus_client.samples import Sample
except ModuleNotFoundError as _exc:
    raise ModuleNotFoundError(
        "trio_wal.prometheus needs prometheus_client: python -m pip install 'trio-wal[prometheus]'",
        name=_exc.name,
    ) from _exc

from . import _exports
from ._metrics import Buckets, Kind, Labels, Metric, metrics, points
from ._sampling import Observed, Sampler
from ._statistics import HISTOGRAM_BOUNDS

_LABELS_OF: Final = {
    metric: (*group.labels, metric.label) if metric.label else group.labels
    for group, metric in metrics()
}


@final
class WalCollector(Collector):
    """Gives what logs, databases, readers of databases and replicas say of themselves.

    A collector for a registry of ``prometheus_client``; one for all objects of a program.  Nothing
    is counted between scrapes: ``statistics()`` and ``health()`` are asked when a scrape comes.

    A scrape may come from any thread.  The figures are taken by the event loop to which an object
    belongs, all in one step.  Where that loop does not answer within a second, the scrape has the
    figures of before, and ``trio_wal_statistics_age_seconds`` says how old they are.  An object
    that is closed, or has failed, keeps giving what it last said.  A scrape never raises.

    Args:
      objects: `trio_wal.WriteAheadLog`, `trio_wal.Database`, `trio_wal.DatabaseReader` and
          `trio_wal.Replica`, open, in any number; their label ``log`` is their path.

    Raises:
      TypeError: one of them is something else.
      RuntimeError: not called by a task of the trio run that opened them.
    """

    def __init__(self, *objects: Observed) -> None:
        self._sampler = Sampler(objects)
        self._series: dict[tuple[Metric, Labels], _Series] = {}
        """Those of the last scrape."""

    def add(
        self,
        object: Observed,  # noqa: A002
        *,
        name: str | None = None,
    ) -> None:
        """Give the figures of this one, too.

        Args:
          object: instead of what had its name before, where that was closed and opened again.
          name: of its label ``log``; None: its path.

        Raises:
          TypeError, RuntimeError: as for the class.
        """
        self._sampler.add(object, name)

    def remove(self, object: Observed) -> None:  # noqa: A002
        """Give its figures no more.  Never raises: nothing happens where it is not there."""
        self._sampler.remove(object)

    def describe(self) -> Iterable[Family]:
        """What there may be, without figures: for the registry, which refuses names twice."""
        return [_family(metric) for _, metric in metrics()]

    def collect(self) -> Iterable[Family]:
        """What there is now."""
        known, kept = self._series, {}
        families: dict[Metric, Family] = {}
        for look in self._sampler.looks():
            for point in points(look):
                metric, labels, value = point
                key = metric, labels
                series = known.get(key)
                if series is None:
                    series = _series(metric, labels)
                kept[key] = series
                family = families.get(metric)
                if family is None:
                    family = families[metric] = _family(metric)
                # What ``add_metric`` of a family would do, in less of the time that a scrape takes.
                if isinstance(value, Buckets):
                    family.samples += _parts(series, value)
                else:
                    name, whose = series[0]
                    family.samples.append(_sample((name, whose, value) + _NOTHING))  # noqa: RUF005
        self._series = kept
        return list(families.values())


_NOTHING: Final = tuple(Sample._field_defaults[name] for name in Sample._fields[3:])
"""What follows a sample's value: when it was taken, an example, and what later versions have."""
_new_tuple: Final[Callable[..., Sample]] = getattr(tuple, "__new__")  # noqa: B009  (its type says too little)
_sample: Final[Callable[[tuple[object, ...]], Sample]] = partial(_new_tuple, Sample)
"""As calling the class, whose ``__new__`` is written in Python.  A tuple that is put together from
two is made in half of the time of one that is unpacked into another (RUF005)."""

_Series = tuple[tuple[str, dict[str, str]], ...]
"""Names and labels of the samples of one point: they are the same in every scrape."""


def _series(metric: Metric, labels: Labels) -> _Series:
    name, whose = metric.name, dict(zip(_LABELS_OF[metric], labels, strict=True))
    if metric.kind is not Kind.HISTOGRAM:
        return ((name, whose),)
    bucket = f"{name}_bucket"
    return (
        *((bucket, {**whose, "le": _bound(bound)}) for bound in (*HISTOGRAM_BOUNDS, math.inf)),
        (f"{name}_count", whose),
        (f"{name}_sum", whose),
    )


def _parts(series: _Series, value: Buckets) -> list[Sample]:
    """Of a histogram."""
    figures = [float(count) for _, count in value.cumulative]
    figures += figures[-1], value.sum
    return [
        _sample((name, whose, figure) + _NOTHING)  # noqa: RUF005
        for (name, whose), figure in zip(series, figures, strict=True)
    ]


@cache
def _template(metric: Metric) -> Family:
    name, text, labels = metric.name, metric.text, _LABELS_OF[metric]
    if metric.kind is Kind.COUNTER:
        return CounterMetricFamily(name, text, labels=labels)
    if metric.kind is Kind.HISTOGRAM:
        return HistogramMetricFamily(name, text, labels=labels)
    return GaugeMetricFamily(name, text, labels=labels)


def _family(metric: Metric) -> Family:
    """One without samples."""
    family = copy(_template(metric))
    family.samples = []
    return family


@cache
def _bound(bound: float) -> str:
    return "+Inf" if bound == math.inf else repr(bound)


_exports.say_public(__name__, {"WalCollector": WalCollector})
