"""`trio-wal consumers`: who reads a log or a database, how far, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs

from trio_wal._database_reader import open_database_reader
from trio_wal._disk.placesfile import read_places
from trio_wal._statistics import ConsumerStatistics
from trio_wal._system.files import OsFiles
from trio_wal._watchsource import WatchSource
from trio_wal._worker import Blocking

from . import _servers
from ._output import (
    CommandError,
    ExitCode,
    Json,
    LocalPlace,
    is_database,
    new_table,
    say,
    show,
    write_json,
)


async def consumers(place: LocalPlace, /, *, json: Json = False) -> int:
    """List the consumers of a log or a database: how far each has acknowledged, and how far
    it is behind, in records (for a database: commits), bytes and seconds.

    Takes no lock; another process may have it open. Bytes and seconds are estimates from whole
    segments.

    Example: `trio-wal consumers shop.db`
    """
    if _servers.is_url(place):
        raise CommandError(f"{place}: servers keep consumers of a database only: name its cache")
    path = Path(place)
    if is_database(path):
        async with open_database_reader(path) as reader:
            found = reader.statistics().consumers
    else:
        found = await _of_log(path)
    if json:
        rows = [{"name": name, **attrs.asdict(one)} for name, one in sorted(found.items())]
        write_json({"consumers": rows})
    elif found:
        _print(found)
    else:
        say("there are no consumers")
    return ExitCode.OK


async def _of_log(path: Path) -> Mapping[str, ConsumerStatistics]:
    blocking = Blocking(threaded=True)
    directory = await blocking(OsFiles().open_directory, str(path))
    source = WatchSource(directory, blocking)
    try:
        await source.refresh()
        places = await blocking(read_places, directory, source.meta.log_uuid)
        found: dict[str, ConsumerStatistics] = {}
        for name, place in places.items():
            lag = max(0, source.tail.durable_lsn - place.lsn)
            size, seconds = source.behind(place.lsn) if lag else (0, 0.0)
            found[name] = ConsumerStatistics(
                acknowledged_lsn=place.lsn, lag_records=lag, lag_bytes=size, lag_seconds=seconds
            )
        return found
    finally:
        await source.aclose()


def _print(found: Mapping[str, ConsumerStatistics]) -> None:
    numbers = ("acknowledged", "behind", "bytes", "seconds")
    table = new_table("consumer", *numbers, numbers=numbers, plain=True)
    for name, one in sorted(found.items()):
        table.add_row(
            name,
            f"{one.acknowledged_lsn:,}",
            f"{one.lag_records:,}",
            f"{one.lag_bytes:,}",
            f"{one.lag_seconds:,.1f}",
        )
    show(table)
