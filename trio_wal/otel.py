"""Metrics for OpenTelemetry: `instrument`.

Law: nothing is counted here; ``_metrics`` says what there is and how it is called, ``_sampling``
looks at it.

Needs the extra ``otel``.  Nothing is done between two collections.

::

    from trio_wal.otel import instrument

    async with trio_wal.open_database("bank.db") as db:
        with instrument(db):
            ...

OpenTelemetry has no histograms that are observed.  So each of ours is three counters: how many in
``.bucket``, with the attribute ``le``, as Prometheus counts them; ``.count``; and ``.sum``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from math import isfinite
from types import TracebackType
from typing import Any, Final, final

try:
    from opentelemetry.metrics import (
        CallbackOptions,
        Meter,
        MeterProvider,
        Observation,
        get_meter_provider,
    )
except ModuleNotFoundError as _exc:
    raise ModuleNotFoundError(
        "trio_wal.otel needs opentelemetry-api: python -m pip install 'trio-wal[otel]'",
        name=_exc.name,
    ) from _exc

from . import _exports
from ._metrics import Buckets, Group, Kind, Labels, Metric, metrics, points
from ._sampling import Observed, Sampler

BUCKET, COUNT, SUM = ".bucket", ".count", ".sum"
_PARTS: Final = {BUCKET: "1", COUNT: "1", SUM: "s"}
"""What a histogram is given as, with its unit."""

_Look = dict[Metric, list[tuple[Labels, "float | Buckets"]]]


@final
class Instrumentation(AbstractContextManager["Instrumentation"]):
    """What `instrument` returns; leaving its block ends it."""

    def __init__(self, sampler: Sampler, meter: Meter) -> None:
        self._sampler = sampler
        self._lock = threading.Lock()
        self._look: _Look = {}
        self._given: set[str] = set()
        """Instruments that have had their part of the look: who asks again wants a new one."""
        for group, metric in metrics():
            self._create(meter, group, metric)

    def _create(self, meter: Meter, group: Group, metric: Metric) -> None:
        name, text = metric.otel_name, metric.text
        if metric.kind is Kind.HISTOGRAM:
            for part, unit in _PARTS.items():
                observe = partial(self._observe, group, metric, name + part)
                meter.create_observable_counter(name + part, [observe], unit, text)
            return
        observe = partial(self._observe, group, metric, name)
        create: Callable[..., object] = meter.create_observable_gauge
        if metric.kind is Kind.COUNTER:
            create = meter.create_observable_counter
        create(name, [observe], metric.unit.ucum, text)

    def _observe(
        self, group: Group, metric: Metric, name: str, _: CallbackOptions
    ) -> Iterable[Observation]:
        keys = (*group.labels, metric.label)
        for labels, value in self._seen(metric, name):
            attributes = dict(zip(keys, labels, strict=False))
            if isinstance(value, Buckets):
                yield from _observations(value, name, attributes)
            elif isfinite(value):
                # OpenTelemetry has no word for a queue without a bound.
                yield Observation(value, attributes)

    def _seen(self, metric: Metric, name: str) -> list[tuple[Labels, float | Buckets]]:
        """Of one look for all instruments: a collection asks each of them once."""
        with self._lock:
            if name in self._given or not self._given:
                self._look = {}
                for look in self._sampler.looks():
                    for found, labels, value in points(look):
                        self._look.setdefault(found, []).append((labels, value))
                self._given = set()
            self._given.add(name)
            return self._look.get(metric, [])

    def add(
        self,
        object: Observed,  # noqa: A002
        *,
        name: str | None = None,
    ) -> None:
        """Observe this one, too.

        Args:
          object: instead of what had its name before, where that was closed and opened again.
          name: of its attribute ``log``; None: its path.

        Raises:
          TypeError, RuntimeError: as `instrument`.
        """
        self._sampler.add(object, name)

    def remove(self, object: Observed) -> None:  # noqa: A002
        """Observe it no more.  Never raises: nothing happens where it is not there."""
        self._sampler.remove(object)

    def uninstrument(self) -> None:
        """Observe nothing any more; idempotent.  OpenTelemetry keeps the instruments, which are
        empty from now on."""
        self._sampler.clear()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.uninstrument()


def _observations(buckets: Buckets, name: str, attributes: dict[str, Any]) -> Iterable[Observation]:
    if name.endswith(SUM):
        yield Observation(buckets.sum, attributes)
    elif name.endswith(COUNT):
        yield Observation(buckets.count, attributes)
    else:
        for bound, count in buckets.cumulative:
            yield Observation(count, {**attributes, "le": f"{bound:g}"})


def instrument(
    *objects: Observed,
    meter_provider: MeterProvider | None = None,
) -> Instrumentation:
    """Have OpenTelemetry observe logs, databases, readers of databases and replicas.

    Nothing is counted between collections: ``statistics()`` and ``health()`` are asked when one
    comes, from whichever thread.  The figures are taken by the event loop to which an object
    belongs.  Where that loop does not answer within a second, those of before are given, and
    ``trio_wal.statistics_age_seconds`` says how old they are.  An object that is closed, or has
    failed, keeps giving what it last said, until `Instrumentation.uninstrument`.

    Args:
      objects: open; their attribute ``log`` is their path.
      meter_provider: None: the one that is set for the program.

    Raises:
      TypeError: one of them is something else.
      RuntimeError: not called by a task of the trio run that opened them.
    """
    sampler = Sampler(objects)
    provider = get_meter_provider() if meter_provider is None else meter_provider
    return Instrumentation(sampler, provider.get_meter("trio_wal"))


_exports.say_public(__name__, {"Instrumentation": Instrumentation, "instrument": instrument})
