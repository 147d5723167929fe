"""The doors between tasks, threads, processes and event loops, with somebody running through each.

Law: a case is a seed, and one part: what consumers read ahead, what wakes a reader, the order of
the words of `sync_in="loop"`, segments that are archived together, calls from asyncio.  But for the
archives on real files in a temporary folder, with real threads: so a case that found something need
not find it again.  What is tuned by constants is tuned so that the door is used all the time.
"""

from __future__ import annotations

import asyncio
import errno
import json
import math
import random
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any, Final
from unittest import mock

import trio
from trio.testing import MockClock

import trio_wal
import trio_wal.asyncio
from trio_wal import (
    Consumer,
    DirectoryArchive,
    LogReader,
    WriteAheadLog,
    _archiving,
    _stream,
    _watchsource,
    _worker,
)
from trio_wal._disk import cursor
from trio_wal._local import FileCursor
from trio_wal._system.files import OsDirectory
from trio_wal.testing import MemoryFiles

from . import _report
from ._promises import check

SECONDS: Final = 20.0
"""Whoever has waited so long is stuck."""


def found_in(seed: int, only: str = "") -> str:
    """What is wrong, if anything."""
    part = only or list(PARTS)[seed % len(PARTS)]
    with tempfile.TemporaryDirectory(prefix="trio-wal-doors-") as folder:
        found = _report.found_in(PARTS[part], Path(folder) / "log", random.Random(seed))
    return found and f"{part}, seed {seed}: {found}"


# -- consumers that read ahead --------------------------------------------------------------------


class _Reading:
    """A consumer, and what it must be given next."""

    def __init__(self, wal: WriteAheadLog, consumer: Consumer, acknowledged: int) -> None:
        self.wal = wal
        self.consumer = consumer
        self.next_lsn = acknowledged + 1
        self.given: list[trio_wal.Record] = []

    def take(self, records: list[trio_wal.Record], content: list[bytes]) -> None:
        for record in records:
            check(record.lsn == self.next_lsn, f"LSN {record.lsn} is given, not {self.next_lsn}")
            check(record.data == content[record.lsn], f"LSN {record.lsn} has another content")
            self.next_lsn += 1
            self.given.append(record)

    async def iterate(self, content: list[bytes], seconds: float) -> None:
        with trio.move_on_after(seconds), suppress(OSError):
            self.take([await self.consumer.__anext__()], content)

    async def acknowledge(self, record: trio_wal.Record) -> None:
        await self.consumer.acknowledge(record)
        found = self.wal.statistics().consumers[self.consumer.name].acknowledged_lsn
        check(found >= record.lsn, f"LSN {record.lsn} is acknowledged, and {found} is the place")


async def _ahead(path: Path, rng: random.Random) -> None:
    """Cut ends, errors, cancellation; one task acknowledges while another one iterates."""
    content = [b""]
    async with trio_wal.open_wal(path, segment_size=rng.choice((1, 20_000))) as wal:

        async def add(count: int) -> None:
            for _ in range(count):
                content.append(rng.randbytes(8) + bytes(rng.choice((0, 10, 5000))))
                await wal.append(content[-1])

        await add(rng.randrange(8, 20))
        for _ in range(rng.randrange(1, 4)):
            places = wal.statistics().consumers
            place = places["a"].acknowledged_lsn if "a" in places else 0
            async with wal.consumer("a") as consumer:
                reading = _Reading(wal, consumer, place)
                for _ in range(rng.randrange(5, 30)):
                    await _step(reading, content, add, rng)
                while reading.next_lsn < len(content):
                    await reading.iterate(content, math.inf)


async def _step(
    reading: _Reading,
    content: list[bytes],
    add: Callable[[int], Awaitable[None]],
    rng: random.Random,
) -> None:
    given, step = reading.given[-3:], rng.randrange(6)
    if step <= 1 or not given:
        await reading.iterate(content, rng.choice((0, 0.0005, 0.05)))
    elif step == 2:
        await reading.acknowledge(rng.choice(given))
    elif step == 3:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading.iterate, content, 0.05)
            nursery.start_soon(reading.acknowledge, given[-1])
            nursery.start_soon(reading.acknowledge, given[0])
    elif step == 4:
        # Nothing that was given: others come in its place.
        lsn = rng.randrange(reading.next_lsn - 1, len(content))
        await reading.wal.truncate_after(lsn)
        del content[lsn + 1 :]
        await add(3)
    else:
        await add(rng.randrange(1, 3))


def ahead(path: Path, rng: random.Random) -> None:
    real = FileCursor.chunk

    async def chunk(self: FileCursor, lsn: int, stop: int) -> list[trio_wal.Record]:
        if rng.random() < 0.1:
            raise OSError(errno.EIO, "not this time")
        return await real(self, lsn, stop)

    async def run() -> None:
        with trio.fail_after(SECONDS):
            await _ahead(path, rng)

    with (
        mock.patch.object(FileCursor, "chunk", chunk),
        mock.patch.object(cursor, "CHUNK_BYTES", 1),
        mock.patch.object(_stream, "AHEAD_RECORDS_MIN", 1),
    ):
        trio.run(run)


# -- what wakes a reader --------------------------------------------------------------------------


async def _follow(reader: LogReader, lsns: list[int]) -> None:
    async with reader.follow() as records:
        async for record in records:
            lsns.append(record.lsn)  # noqa: PERF401  (others look at it meanwhile)


async def _woken(path: Path, rng: random.Random) -> None:
    """Several streams of one reader; nobody looks by himself."""
    found: list[list[int]] = [[] for _ in range(rng.randrange(1, 4))]
    async with trio_wal.open_wal(path) as wal:
        await wal.append(b"the first")
        async with trio_wal.open_reader(path) as reader, trio.open_nursery() as nursery:
            for lsns in found:
                nursery.start_soon(_follow, reader, lsns)
            # While they begin to watch.
            await trio.sleep(rng.random() * 0.004)
            lsn = await wal.append(b"the second")
            await _all_have(found, lsn)
            nursery.cancel_scope.cancel()
    async with trio_wal.open_reader(path) as reader, trio.open_nursery() as nursery:
        for lsns in found:
            nursery.start_soon(_follow, reader, lsns)
        for _ in range(rng.randrange(1, 4)):
            await _all_have(found, lsn)
            if rng.random() < 0.5:
                (path / "lock").unlink()
            async with trio_wal.open_wal(path, segment_size=rng.choice((1, 1 << 20))) as wal:
                for _ in range(rng.randrange(1, 5)):
                    lsn = await wal.append(b"another")
                    await _all_have(found, lsn)
        nursery.cancel_scope.cancel()


async def _all_have(found: list[list[int]], lsn: int) -> None:
    with trio.fail_after(SECONDS):
        while any(lsns[-1:] != [lsn] for lsns in found):  # noqa: ASYNC110  (nothing else tells)
            await trio.sleep(0.0005)


def wakes(path: Path, rng: random.Random) -> None:
    with (
        mock.patch.object(_watchsource, "WATCHED_POLL_SECONDS", 3600.0),
        mock.patch.object(_watchsource, "POLL_SECONDS", 3600.0),
    ):
        trio.run(_woken, path, rng)


# -- sync_in="loop" -------------------------------------------------------------------------------


def words(path: Path, rng: random.Random) -> None:
    """Batches that go to the thread, which is slow to say so, and others that do not."""
    said: list[int] = []
    slow = [rng.choice((0, 0, 0.0005, 0.002)) for _ in range(50)]
    real = OsDirectory.publish

    def publish(self: OsDirectory, durable_lsn: int, epoch: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(slow[durable_lsn % len(slow)])
        said.append(durable_lsn)
        real(self, durable_lsn, epoch)

    async def run() -> None:
        async with trio_wal.open_wal(path, sync_in="loop") as wal:
            for _ in range(rng.randrange(10, 50)):
                await wal.append(bytes(rng.choice((10, 300))))
                if rng.random() < 0.2:
                    await wal.rotate()

    with (
        mock.patch.object(OsDirectory, "publish", publish),
        mock.patch.object(_worker, "LOOP_BYTES_MAX", 100),
        mock.patch.object(_worker, "LOOP_PAUSE_SECONDS", 0.0),
    ):
        trio.run(run)
    check(said == sorted(said), f"an older word came last: {said}")


# -- segments that are archived together ----------------------------------------------------------


def groups(_path: Path, rng: random.Random) -> None:
    """A log with many segments gets an archive; some cannot be read at times, and the power fails
    at any operation of either.  In memory."""
    files, crash_at, operations = MemoryFiles(seed=rng.getrandbits(30)), rng.randrange(300), 0
    image = files
    real = _archiving._read_segment

    def crash(*_: object) -> None:
        nonlocal operations, image
        operations += 1
        if operations == crash_at:
            image = files.crash_image(crash_at)

    def read_segment(*arguments: Any) -> Any:
        if rng.random() < 0.1:
            raise OSError(errno.EIO, "not this time")
        return real(*arguments)

    def opened() -> AbstractAsyncContextManager[WriteAheadLog]:
        archive = DirectoryArchive("/archive", files=files)
        return trio_wal.open_wal("/log", files=files, archive=archive, segment_size=1)

    async def archive_all(last: int) -> None:
        async with opened() as wal:
            while wal.statistics().archived_lsn < last:  # noqa: ASYNC110  (nothing tells of it)
                await trio.sleep(1)

    async def first_life() -> int:
        async with trio_wal.open_wal("/log", files=files, segment_size=1) as wal:
            last = 0
            for _ in range(rng.randrange(3, 30)):
                await wal.append(rng.randbytes(50))
                last = await wal.rotate()
        files.after_operation = crash
        with mock.patch.object(_archiving, "_read_segment", read_segment):
            await archive_all(last)
        files.after_operation = lambda *_: None
        return last

    last = trio.run(first_life, clock=MockClock(autojump_threshold=0))
    _check_chain(files, last)
    files = image
    trio.run(archive_all, last, clock=MockClock(autojump_threshold=0))
    _check_chain(files, last)


def _check_chain(files: MemoryFiles, last: int) -> None:
    archive, reached = DirectoryArchive("/archive", files=files), 0
    for name in sorted(archive.list()):
        if not name.startswith("0") or not name.endswith(".json"):
            continue
        manifest = json.loads(b"".join(archive.get(name)))
        check(manifest["first_lsn"] == reached + 1, f"nothing is archived after LSN {reached}")
        reached = manifest["last_lsn"]
    check(reached == last, f"LSN {last} counts as archived, and {reached} is the last one there")


# -- asyncio --------------------------------------------------------------------------------------


class _Callers:
    """Tasks of asyncio that append, and are cancelled at any time."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.returned: dict[bytes, int] = {}
        self.refused: set[bytes] = set()

    async def append(self, wal: trio_wal.asyncio.WriteAheadLog, data: bytes) -> None:
        try:
            lsn = await wal.append(data)
        except asyncio.CancelledError:
            self.refused.add(data)
            raise
        self.returned[data] = lsn
        # Where it is cancelled that came too late.
        for _ in range(3):
            await asyncio.sleep(0)

    async def round(self, wal: trio_wal.asyncio.WriteAheadLog, number: int) -> None:
        rng = self.rng
        async with wal.follow(await wal.durable_lsn() + 1) as records:
            names = [b"%d.%d" % (number, n) for n in range(rng.randrange(1, 30))]
            tasks = [asyncio.create_task(self.append(wal, name)) for name in names]
            cancelled: set[asyncio.Task[None]] = set()
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(rng.choice((0, 0, 0.0003, 0.001)))
                some = rng.sample(tasks, min(len(tasks), rng.randrange(6)))
                cancelled.update(task for task in some if task.cancel())
            _, stuck = await asyncio.wait(tasks, timeout=SECONDS)
            check(not stuck, f"{len(stuck)} calls never come back")
            for task in tasks:
                check(task.cancelled() == (task in cancelled), "a cancellation has got lost")
            await self.wait_in_vain(records)

    async def wait_in_vain(self, records: trio_wal.asyncio.RecordStream) -> None:
        async def drain() -> None:
            async for _ in records:
                pass

        waiting = asyncio.create_task(drain())
        await asyncio.sleep(0.002)
        waiting.cancel()
        _, stuck = await asyncio.wait([waiting], timeout=SECONDS)
        check(not stuck and waiting.cancelled(), "who waits for records cannot be cancelled")


def portal(path: Path, rng: random.Random) -> None:
    callers = _Callers(rng)

    async def run() -> None:
        async with trio_wal.asyncio.open_wal(path) as wal:
            for number in range(rng.randrange(2, 8)):
                await callers.round(wal, number)

    async def look() -> dict[bytes, int]:
        async with trio_wal.open_reader(path) as reader, reader.read() as records:
            return {record.data: record.lsn async for record in records}

    asyncio.run(asyncio.wait_for(run(), 4 * SECONDS))
    there = trio.run(look)
    for data, lsn in callers.returned.items():
        check(there.get(data) == lsn, f"{data!r} is not at LSN {lsn}")
    check(callers.refused.isdisjoint(there), "what was called cancelled is in the log")


PARTS: Final[dict[str, Callable[[Path, random.Random], Any]]] = {
    "ahead": ahead,
    "wakes": wakes,
    "words": words,
    "groups": groups,
    "portal": portal,
}
