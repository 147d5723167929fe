"""`trio-wal stats`: how far a log or a database has come, and how fast, seen from outside.

Law: reads what files or servers say, as any reader.  What only the owner knows, how full its queue
is and how long syncs take, is in no file: that is for metrics.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import attrs
import trio
from cyclopts import Parameter
from rich.console import Console
from rich.live import Live
from rich.table import Table

from trio_wal._database_reader import DatabaseReader, open_database_reader
from trio_wal._disk.placesfile import read_places
from trio_wal._engine import Tail
from trio_wal._exceptions import CorruptLogError
from trio_wal._identity import epoch_of
from trio_wal._places import Place as ConsumerPlace
from trio_wal._replicated import open_remote_source
from trio_wal._statistics import ConsumerStatistics
from trio_wal._system.files import OsFiles
from trio_wal._text import printable
from trio_wal._util import KiB, MiB
from trio_wal._watchsource import WatchSource
from trio_wal._worker import Blocking

from . import _servers
from ._output import (
    ExitCode,
    Json,
    Place,
    UsageError,
    complain,
    count,
    is_database,
    log_of,
    say,
    show,
    write_json,
)

WATCH_SECONDS: Final = 1.0


@attrs.frozen(kw_only=True)
class Sample:
    """What one look has found."""

    path: str
    time: datetime
    uuid: str
    epoch: int
    first_lsn: int
    durable_lsn: int
    records: int
    """Durable ones that there are."""
    bytes: int
    """What they take in the log; estimated where a part of a segment is concerned."""
    segments: int | None
    """None: it is a log on servers."""
    records_per_second: float | None = None
    """Since the look before; None: this is the first one, or the log's end was cut since."""
    bytes_per_second: float | None = None
    checkpoint_lsn: int | None = None
    """Of a database."""
    store_bytes: int | None = None
    """Of a database."""
    replicas: int | None = None
    """Of a log on servers."""
    replicas_current: int | None = None
    consumers: Mapping[str, ConsumerStatistics] = attrs.field(factory=dict[str, ConsumerStatistics])


Look: TypeAlias = Callable[[Sample | None], Awaitable[Sample]]
"""Takes what the look before has found."""


async def stats(
    place: Place,
    /,
    *,
    watch: Annotated[
        bool, Parameter(negative=(), show_default=False, help="Look again every second.")
    ] = False,
    looks: Annotated[
        int | None, Parameter(name="--count", help="With --watch: stop after this many looks.")
    ] = None,
    json: Json = False,
) -> int:
    """Show how far a log or a database has come: newest durable LSN, records, bytes, segments,
    checkpoint, and consumers.

    With `--watch` it looks again every second and shows rates, until Ctrl-C. A terminal is
    redrawn; otherwise each look is one line, or with `--json` one object. Reads only and takes
    no lock, so it works while another process writes. The owner's queue and the times of its
    syncs are in no file: see the metrics. Exits with 1 if it meets damage.

    Example: `trio-wal stats orders.wal --watch`
    """
    if looks is not None and (looks < 1 or not watch):
        raise UsageError(f"--count {looks}: must be 1 or more, and goes with --watch")
    try:
        async with _opened(place) as look:
            if watch:
                await _watch(look, math.inf if looks is None else looks, json=json)
            else:
                sample = await look(None)
                if json:
                    write_json(_as_json(sample))
                else:
                    show(_table(sample))
    except CorruptLogError as exc:
        complain(str(exc))
        return ExitCode.FINDINGS
    return ExitCode.OK


# -- looking ----------------------------------------------------------------------------


def _opened(place: str) -> AbstractAsyncContextManager[Look]:
    if _servers.is_url(place):
        return _open_servers(place)
    path = Path(place)
    return _open_database(path) if is_database(path) else _open_log(path)


@asynccontextmanager
async def _open_log(path: Path) -> AsyncGenerator[Look]:
    blocking = Blocking(threaded=True)
    # Of a database: its log is no link to another.
    directory = await blocking(OsFiles().open_directory, str(path), follow=log_of(path) == path)
    source = WatchSource(directory, blocking)

    async def look(before: Sample | None) -> Sample:
        await source.refresh()
        places = await blocking(read_places, directory, source.meta.log_uuid)
        if source.damage is not None:
            raise source.damage
        tail = source.tail
        return attrs.evolve(
            _sample(before, source.name, str(source.uuid), tail, source.behind),
            segments=len(source.segments),
            consumers={name: _behind(source, one) for name, one in places.items()},
        )

    try:
        yield look
    finally:
        with trio.CancelScope(shield=True):
            await source.aclose()


def _behind(source: WatchSource, place: ConsumerPlace) -> ConsumerStatistics:
    lag = max(0, source.tail.durable_lsn - place.reach)
    size, seconds = source.behind(place.reach) if lag else (0, 0.0)
    return ConsumerStatistics(
        acknowledged_lsn=place.lsn, lag_records=lag, lag_bytes=size, lag_seconds=seconds
    )


@asynccontextmanager
async def _open_database(path: Path) -> AsyncGenerator[Look]:
    async with _open_log(log_of(path)) as look_at_log, open_database_reader(path) as reader:

        async def look(before: Sample | None) -> Sample:
            sample = await look_at_log(before)
            return attrs.evolve(sample, path=reader.path, **_of_database(reader))

        yield look


def _of_database(reader: DatabaseReader) -> dict[str, Any]:
    found = reader.statistics()
    return {
        "checkpoint_lsn": found.checkpoint_lsn,
        "store_bytes": found.store_bytes,
        "consumers": found.consumers,
    }


@asynccontextmanager
async def _open_servers(url: str) -> AsyncGenerator[Look]:
    source = await open_remote_source(_servers.parse(url))

    async def look(before: Sample | None) -> Sample:
        await source.refresh()
        found = await source.log.describe()

        def behind(lsn: int) -> tuple[int, float]:
            if before is not None and lsn == before.durable_lsn:
                return max(0, found.bytes - before.bytes), 0.0
            return found.bytes, 0.0

        sample = _sample(before, source.name, str(found.uuid), source.tail, behind)
        return attrs.evolve(
            sample, replicas=found.replicas, replicas_current=found.replicas_current
        )

    try:
        yield look
    finally:
        with trio.CancelScope(shield=True):
            await source.aclose()


def _sample(
    before: Sample | None,
    path: str,
    uuid: str,
    tail: Tail,
    behind: Callable[[int], tuple[int, float]],
) -> Sample:
    """What logs of all kinds have.

    Args:
      behind: how many bytes there are after an LSN, and something else.
    """
    now, epoch = datetime.now(timezone.utc), epoch_of(tail.history)
    record_rate: float | None = None
    byte_rate: float | None = None
    if before is not None and before.epoch == epoch and tail.durable_lsn >= before.durable_lsn:
        seconds = max(1e-6, (now - before.time).total_seconds())
        records = tail.durable_lsn - before.durable_lsn
        record_rate = round(records / seconds, 3)
        size = behind(before.durable_lsn)[0] if records else 0
        byte_rate = round(size / seconds, 3)
    return Sample(
        path=path,
        time=now,
        uuid=uuid,
        epoch=epoch,
        first_lsn=tail.first_lsn,
        durable_lsn=tail.durable_lsn,
        records=tail.durable_lsn + 1 - tail.first_lsn,
        bytes=behind(tail.first_lsn - 1)[0],
        segments=None,
        records_per_second=record_rate,
        bytes_per_second=byte_rate,
    )


# -- showing ----------------------------------------------------------------------------


async def _watch(look: Look, looks: float, *, json: bool) -> None:
    sample = await look(None)
    if json or not sys.stdout.isatty():
        while True:
            if json:
                write_json(_as_json(sample))
                sys.stdout.buffer.flush()
            else:
                say(_line(sample))
                sys.stdout.flush()
            looks -= 1
            if not looks:
                return
            await trio.sleep(WATCH_SECONDS)
            sample = await look(sample)
    console = Console(highlight=False, markup=False, emoji=False)
    with Live(_table(sample), console=console, auto_refresh=False) as live:
        while looks > 1:
            looks -= 1
            await trio.sleep(WATCH_SECONDS)
            sample = await look(sample)
            live.update(_table(sample), refresh=True)


def _as_json(sample: Sample) -> Any:
    fields = attrs.asdict(sample, recurse=False)
    consumers = [
        {"name": name, **attrs.asdict(one)} for name, one in sorted(sample.consumers.items())
    ]
    return {**fields, "consumers": consumers}


def _rows(sample: Sample) -> list[tuple[str, str]]:
    def rate(value: float | None, text: Callable[[float], str]) -> str:
        return "" if value is None else f" ({text(value)} per second)"

    rows = [
        ("path", printable(sample.path)),
        ("log", f"{sample.uuid}, epoch {sample.epoch:x}"),
        (
            "durable LSN",
            f"{sample.durable_lsn:,}" + rate(sample.records_per_second, lambda n: f"{n:,.0f}"),
        ),
        ("records", f"{sample.records:,}, from LSN {sample.first_lsn:,}"),
        ("bytes", _size(sample.bytes) + rate(sample.bytes_per_second, _size)),
    ]
    if sample.segments is not None:
        rows.append(("segments", f"{sample.segments:,}"))
    if sample.checkpoint_lsn is not None and sample.store_bytes is not None:
        after = max(0, sample.durable_lsn - sample.checkpoint_lsn)
        rows.append(("checkpoint", f"LSN {sample.checkpoint_lsn:,}, {after:,} after it"))
        rows.append(("store", _size(sample.store_bytes)))
    if sample.replicas is not None:
        rows.append(("replicas", f"{sample.replicas_current} of {sample.replicas} up to date"))
    for name, one in sorted(sample.consumers.items()):
        behind = f"{one.lag_records:,} records, {_size(one.lag_bytes)}, {one.lag_seconds:,.1f} s"
        rows.append((f"consumer {name}", f"{behind} behind" if one.lag_records else "has all"))
    return rows


def _table(sample: Sample) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    # What does not fit is folded: the names of the figures stay whole.
    table.add_column(overflow="fold")
    for name, text in _rows(sample):
        table.add_row(printable(name), text)
    return table


def _line(sample: Sample) -> str:
    """One look, on one line."""
    parts = [f"{sample.time:%Y-%m-%dT%H:%M:%SZ}", f"durable LSN {sample.durable_lsn}"]
    if sample.records_per_second is not None and sample.bytes_per_second is not None:
        parts.append(f"{sample.records_per_second:.0f} records/s")
        parts.append(f"{_size(sample.bytes_per_second)}/s")
    parts.append(_size(sample.bytes))
    if sample.segments is not None:
        parts.append(count(sample.segments, "segment"))
    if sample.checkpoint_lsn is not None:
        parts.append(f"checkpoint LSN {sample.checkpoint_lsn}")
    for name, one in sorted(sample.consumers.items()):
        parts.append(f"{name} {one.lag_records} behind")
    return "  ".join(parts)


def _size(size: float) -> str:
    return f"{size / MiB:,.1f} MiB" if size >= MiB else f"{size / KiB:,.1f} KiB"
