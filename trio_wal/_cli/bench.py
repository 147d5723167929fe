"""`trio-wal bench`: how fast this disk makes records durable, and which settings suit it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import attrs
import trio
from cyclopts import Parameter

from trio_wal._system.files import OsFiles
from trio_wal._util import KiB, MiB

from ._bench.advice import AIMS, TASKS, Aim, Rates, Settings, expected, settings_for
from ._bench.device import Device, Suspicion, device_of, suspicions
from ._bench.probe import Probe, Tick, Times, probe
from ._bench.trial import run_trial
from ._output import (
    Bar,
    ExitCode,
    Json,
    UsageError,
    new_table,
    progress_bar,
    say,
    show,
    write_json,
)

PREFIX: Final = ".trio-wal-bench-"
"""Of the directory in which everything happens, and which goes again."""
RECORD_MAX: Final = 1 * MiB
SECONDS_MAX: Final = 600.0
SLOW: Final = 0.5
"""Below this share of what was expected something else was in the way."""
UNSYNCED_SHARE: Final = 0.25
"""Of a trial's time: measuring what the processor needs."""
SHORT: Final = {
    "low latency": "low latency",
    "balanced": "balanced",
    "high throughput": "throughput",
    "small memory": "small memory",
}


@attrs.frozen
class Tried:
    """Settings for an aim, what they should come to, and what they came to."""

    aim: Aim
    settings: Settings
    tasks: int
    waiting_bytes: int
    expected: Rates
    measured: Rates


async def bench(
    dir: Annotated[  # noqa: A002  (the name of the argument)
        Path, Parameter(name="DIR", help="A directory on the disk in question.")
    ] = Path(),
    /,
    *,
    advise: Annotated[
        bool,
        Parameter(
            negative=(), show_default=False, help="Propose settings for four aims, and try them."
        ),
    ] = False,
    seconds: Annotated[float, Parameter(help="How long each measurement takes.")] = 1.0,
    record_size: Annotated[int, Parameter(help="Size of a record in the trials, in bytes.")] = 100,
    json: Json = False,
) -> int:
    """Measure how long this disk takes to make bytes durable, and how fast it writes.

    With `--advise` it also proposes settings for low latency, balance, high throughput and small
    memory, and tries each with the library itself. It names every reason to doubt the disk, but
    only a power cut can show whether a disk lies. Everything happens in a temporary directory in
    DIR, takes up to a few hundred MiB, and is removed again. Other programs that use the disk
    change the figures.

    Example: `trio-wal bench --advise --seconds 0.2 .`
    """
    if not 0 < seconds <= SECONDS_MAX:
        raise UsageError(f"--seconds must be above 0 and at most {SECONDS_MAX:g}, not {seconds}")
    if not 1 <= record_size <= RECORD_MAX:
        raise UsageError(f"--record-size must be from 1 to {RECORD_MAX}, not {record_size}")
    path = OsFiles().absolute(str(dir))
    device = device_of(path)
    with _scratch_in(path) as scratch, progress_bar("syncing") as bar:
        found = await _probe(scratch, seconds, bar)
        tried = await _try(scratch, found, seconds, record_size, bar) if advise else []
    doubts = suspicions(device, found.sync_prepared)
    if json:
        write_json(_as_json(path, device, doubts, found, record_size, tried))
    else:
        _print(path, device, doubts, found, tried)
    return ExitCode.OK


@contextmanager
def _scratch_in(path: str) -> Generator[str]:
    """A directory that goes again.  An error that names no file names the one it was asked for."""
    scratch: str | None = None
    try:
        scratch = tempfile.mkdtemp(prefix=PREFIX, dir=path)
        yield scratch
    except OSError as exc:
        if scratch is not None and exc.filename is not None:
            raise
        raise OSError(exc.errno, exc.strerror, path) from exc
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


async def _probe(scratch: str, seconds: float, bar: Bar) -> Probe:
    def tick(passed: float) -> None:
        trio.from_thread.check_cancelled()
        bar.update(min(passed, seconds), seconds)

    return await trio.to_thread.run_sync(partial(_probe_in, scratch, seconds, tick))


def _probe_in(scratch: str, seconds: float, tick: Tick) -> Probe:
    directory = OsFiles().open_directory(scratch)
    try:
        return probe(directory, seconds, tick)
    finally:
        directory.close()


async def _try(
    scratch: str, found: Probe, seconds: float, record_size: int, bar: Bar
) -> list[Tried]:
    tried: list[Tried] = []
    for number, aim in enumerate(AIMS):
        bar.describe(f"trying {aim}")
        bar.update(number, len(AIMS))
        settings, tasks = settings_for(aim, found), TASKS[aim]
        run = partial(run_trial, f"{scratch}/log", settings, tasks=tasks, record_size=record_size)
        unsynced = await run(seconds=UNSYNCED_SHARE * seconds, synced=False)
        hoped = expected(tasks, unsynced.records_per_second, found.sync_prepared)
        measured = await run(seconds=seconds, synced=True)
        waiting = settings.waiting_bytes(record_size)
        tried.append(Tried(aim, settings, tasks, waiting, hoped, measured))
    bar.update(len(AIMS), len(AIMS))
    return tried


# -- what is said ---------------------------------------------------------------------------


def _as_json(
    path: str,
    device: Device,
    doubts: list[Suspicion],
    found: Probe,
    record_size: int,
    tried: list[Tried],
) -> dict[str, object]:
    return {
        "path": path,
        "device": attrs.asdict(device),
        "suspicions": [attrs.asdict(doubt) for doubt in doubts],
        **attrs.asdict(found),
        "record_size": record_size,
        "advice": [attrs.asdict(one) for one in tried],
    }


def _print(
    path: str, device: Device, doubts: list[Suspicion], found: Probe, tried: list[Tried]
) -> None:
    say(path)
    say(_about(device))
    table = new_table("sync of 512 bytes", *TIMES, numbers=TIMES, plain=True)
    table.add_row("prepared file", *_cells(found.sync_prepared))
    table.add_row("growing file", *_cells(found.sync_growing))
    show(table)
    say(f"writing: {found.write_bytes_per_second / MiB:,.0f} MiB per second")
    for doubt in doubts:
        say(f"doubt: {doubt.text}")
    if doubts:
        say("whether a sync is kept only a power cut can show")
    if tried:
        _print_advice(tried)


TIMES: Final = ("count", "p50 ms", "p90 ms", "p99 ms", "max ms")


def _cells(times: Times) -> tuple[str, ...]:
    parts = (times.p50, times.p90, times.p99, times.max)
    return f"{times.count:,}", *(f"{part * 1e3:,.3f}" for part in parts)


def _about(device: Device) -> str:
    parts = [device.filesystem or "an unknown file system"]
    if device.name is not None:
        parts.append(f"on {device.name}")
    if device.rotational is not None and not device.virtual:
        parts.append("which turns" if device.rotational else "which does not turn")
    if device.write_cache is not None:
        parts.append(f"({device.write_cache})")
    return " ".join(parts)


def _print_advice(tried: list[Tried]) -> None:
    columns = tuple(SHORT[one.aim] for one in tried)
    table = new_table("", *columns, numbers=columns, plain=True)
    rows = [(name, [_shown(one.settings, name) for one in tried]) for name in NAMES]
    rows += [
        ("tasks", [f"{one.tasks:,}" for one in tried]),
        ("waiting at most", [_bytes(one.waiting_bytes) for one in tried]),
        ("records/s expected", [f"{one.expected.records_per_second:,.0f}" for one in tried]),
        ("records/s measured", [f"{one.measured.records_per_second:,.0f}" for one in tried]),
        ("p50 ms expected", [f"{one.expected.latency_p50 * 1e3:,.2f}" for one in tried]),
        ("p50 ms measured", [f"{one.measured.latency_p50 * 1e3:,.2f}" for one in tried]),
        ("p99 ms expected", [f"{one.expected.latency_p99 * 1e3:,.2f}" for one in tried]),
        ("p99 ms measured", [f"{one.measured.latency_p99 * 1e3:,.2f}" for one in tried]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    show(table)
    say("checkpoint_bytes is a database's, which takes about twice that much memory")
    for one in tried:
        if one.measured.records_per_second < SLOW * one.expected.records_per_second:
            say(f"{one.aim}: far slower than expected; is something else busy here?")


NAMES: Final = tuple(field.name for field in attrs.fields(Settings))


def _shown(settings: Settings, name: str) -> str:
    value: object = getattr(settings, name)
    if not isinstance(value, int):
        return f"{value}"
    return f"{value:,}" if name == "max_queue_size" else _bytes(value)


def _bytes(count: int) -> str:
    return f"{count / MiB:,.1f} MiB" if count >= MiB else f"{count / KiB:,.1f} KiB"
