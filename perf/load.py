"""Tasks in a closed loop, and what the log is compared with.

Law: every contender is measured the same way.  N tasks do one thing over and over, each
starts again when its last one is done.  One of them, the timekeeper, looks at the clock
each time it comes back: the window opens and closes at an acknowledgement, so that no
batch is counted in part.  Nothing else is timed in a trial that counts throughput.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Final

import attrs
import trio
from trio.lowlevel import (
    Abort,
    Task,
    cancel_shielded_checkpoint,
    current_task,
    reschedule,
    wait_task_rescheduled,
)

import trio_wal

RECORD: Final = b"." * 100
WARM_UP_SECONDS: Final = 0.15
CPU: Final = "CPU s a million"
"""Figure of a trial: seconds of CPU for a million of what it counts."""
QUEUE_SIZE: Final = 10_000
"""The log's own default, and the size of the ceiling's channel if that has room for all."""
BATCH_BYTES: Final = 8 << 20
"""The log's own default: no batch is larger."""
BLOCK: Final = 512
FRAME_HEADER: Final = 64
FILE_BYTES: Final = 32 << 20
AGED_BYTES: Final = 22 << 20
"""A young log's segments are small; behind this much it has come to those of full size."""
AGED_TASKS_MIN: Final = 32
"""Frames of fewer records are treated the same, and would take long."""


@attrs.define
class _Window:
    """The part of a run that counts."""

    seconds: float
    count: Callable[[], int]
    """How many are done."""
    open: bool = True
    done: int = 0
    elapsed: float = 0.0
    cpu: float = 0.0
    """Seconds of CPU, all threads of this process together."""
    on_start: Callable[[], None] = lambda: None

    async def keep(self, step: Callable[[], Awaitable[object]]) -> None:
        """The timekeeper's loop."""
        deadline = perf_counter() + WARM_UP_SECONDS
        while perf_counter() < deadline:
            await step()
        self.on_start()
        before, start, cpu = self.count(), perf_counter(), process_time()
        while True:
            await step()
            now = perf_counter()
            if now - start >= self.seconds:
                break
        self.done, self.elapsed = self.count() - before, now - start
        self.cpu = process_time() - cpu
        self.open = False

    @property
    def rates(self) -> dict[str, float]:
        return {"per second": self.done / self.elapsed, CPU: self.cpu / self.done * 1e6}


# -- the bare ceiling -------------------------------------------------------------


def ceiling(tasks: int, seconds: float) -> dict[str, float]:
    """Tasks only park and are woken: what trio itself costs.

    Each task puts itself into a memory channel and parks; one task drains the channel,
    wakes all that were in it, and lets them run once.
    """
    return trio.run(_ceiling, tasks, seconds)


async def _ceiling(tasks: int, seconds: float) -> dict[str, float]:
    send, receive = trio.open_memory_channel[Task](max(QUEUE_SIZE, tasks))
    woken = 0
    window = _Window(seconds, lambda: woken)

    def abort(_: object) -> Abort:
        return Abort.SUCCEEDED

    async def step() -> None:
        send.send_nowait(current_task())
        await wait_task_rescheduled(abort)

    async def worker() -> None:
        task = current_task()
        send_nowait = send.send_nowait
        while window.open:
            send_nowait(task)
            await wait_task_rescheduled(abort)

    async def drain() -> None:
        nonlocal woken
        receive_nowait = receive.receive_nowait
        while True:
            batch = [await receive.receive()]
            try:
                while True:
                    batch.append(receive_nowait())
            except trio.WouldBlock:
                pass
            woken += len(batch)
            for task in batch:
                reschedule(task)
            await cancel_shielded_checkpoint()

    async with trio.open_nursery() as drainer:
        drainer.start_soon(drain)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(window.keep, step)
            for _ in range(tasks - 1):
                nursery.start_soon(worker)
        drainer.cancel_scope.cancel()
    return window.rates


# -- the log ----------------------------------------------------------------------


def age(path: Path, unit: Sequence[bytes]) -> None:
    """Bring a new log to its full-size segments, by frames like the ones to come: from their
    size the log decides how it prepares a segment."""

    async def fill() -> None:
        async with trio_wal.open_wal(path, durability="none") as wal:
            for _ in range(0, AGED_BYTES, _frame_bytes(sum(map(len, unit)), len(unit))):
                await prepared(wal)
                await wal.append_many(unit)

    if not path.exists():
        trio.run(fill)


async def prepared(wal: trio_wal.WriteAheadLog) -> None:
    """Until the next segment is ready, as it is in time where every record waits for a sync:
    one taken half-way has slower syncs for as long as it lasts."""
    while wal._log.engine._directory.spares.preparing:  # noqa: ASYNC110  (a thread of the log's own does it)
        await trio.sleep(0.02)


def _aged(path: Path, tasks: int, record: bytes = RECORD) -> None:
    count = max(AGED_TASKS_MIN, tasks)
    age(path, [record] * min(count, BATCH_BYTES // len(record)))


def log(
    path: Path,
    tasks: int,
    seconds: float,
    *,
    record: bytes = RECORD,
    max_queue_size: float = QUEUE_SIZE,
    sync_in: trio_wal.SyncIn = "thread",
    retention: trio_wal.Retention | None = None,
) -> dict[str, float]:
    """Durable appends by this many tasks, in the log at ``path``."""
    _aged(path, tasks, record)

    async def main() -> dict[str, float]:
        async with trio_wal.open_wal(
            path, max_queue_size=max_queue_size, sync_in=sync_in, retention=retention
        ) as wal:
            return await _log(wal, tasks, seconds, record)

    return trio.run(main)


async def _log(
    wal: trio_wal.WriteAheadLog, tasks: int, seconds: float, record: bytes
) -> dict[str, float]:
    window = _Window(seconds, lambda: wal.durable_lsn)
    before = after = wal.statistics()

    def start() -> None:
        nonlocal before
        before = wal.statistics()

    window.on_start = start

    async def worker() -> None:
        while window.open:
            await wal.append(record)

    async def keep() -> None:
        nonlocal after
        await window.keep(lambda: wal.append(record))
        after = wal.statistics()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep)
        for _ in range(tasks - 1):
            nursery.start_soon(worker)
    syncs = after.batches_synced - before.batches_synced
    return {
        **window.rates,
        "MB per second": window.rates["per second"] * len(record) / 1e6,
        "records per sync": window.done / syncs,
        "sync us": (after.sync_seconds_total - before.sync_seconds_total) / syncs * 1e6,
    }


def log_latency(path: Path, tasks: int, seconds: float) -> list[float]:
    """Seconds of each append: the same load, but every task looks at the clock twice a record,
    which is why this is no trial that counts throughput."""
    _aged(path, tasks)
    return trio.run(_log_latency, path, tasks, seconds)


async def _log_latency(path: Path, tasks: int, seconds: float) -> list[float]:
    taken: list[float] = []
    async with trio_wal.open_wal(path) as wal:
        counts_from = perf_counter() + WARM_UP_SECONDS
        until = counts_from + seconds

        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(append_until, wal, taken, counts_from, until)
    return taken


async def append_until(
    wal: trio_wal.WriteAheadLog, taken: list[float], counts_from: float, until: float
) -> None:
    """One task's appends, and the seconds of each that begins when it counts."""
    append = wal.append
    while True:
        start = perf_counter()
        await append(RECORD)
        end = perf_counter()
        if start >= counts_from:
            taken.append(end - start)
        if end >= until:
            return


# -- one thread call per append ---------------------------------------------------


def thread_per_append(path: Path, tasks: int, seconds: float, *, grow: bool) -> dict[str, float]:
    """Without a log: `trio.to_thread.run_sync` per append, doing one write and one fdatasync.

    One file for all tasks.  A lock gives each write its place; the sync is outside of it, so
    that syncs of several threads may run, and be merged, at the same time.  ``grow``: the
    file grows, as files do; else it is made of written zeros beforehand.
    """
    fd = _file(path, 0 if grow else FILE_BYTES)
    try:
        return trio.run(_thread_per_append, fd, tasks, seconds, grow)
    finally:
        os.close(fd)


async def _thread_per_append(fd: int, tasks: int, seconds: float, grow: bool) -> dict[str, float]:
    lock = threading.Lock()
    done = offset = 0
    window = _Window(seconds, lambda: done)

    def job() -> None:
        nonlocal done, offset
        with lock:
            here, offset = offset, offset + len(RECORD)
            if not grow and offset + len(RECORD) > FILE_BYTES:
                offset = 0
            os.pwrite(fd, RECORD, here)
        os.fdatasync(fd)
        with lock:
            done += 1

    async def step() -> None:
        await trio.to_thread.run_sync(job)

    async def worker() -> None:
        while window.open:
            await step()

    async with trio.open_nursery() as nursery:
        for _ in range(tasks - 1):
            nursery.start_soon(worker)
        await window.keep(step)
        # With thousands of tasks most of them wait for a thread.
        nursery.cancel_scope.cancel()
    return window.rates


# -- the bare disk ----------------------------------------------------------------


def frame_bytes(records: int) -> int:
    """What a batch of this many `RECORD`s takes in the log's file."""
    return _frame_bytes(records * len(RECORD), records)


def _frame_bytes(payload: int, records: int) -> int:
    return -(-(FRAME_HEADER + 4 * records + payload) // BLOCK) * BLOCK


PREPARATIONS: Final = ("growing", "reserved", "written")


def _file(path: Path, size: int, *, written: bool = True) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    if size and not written:
        os.posix_fallocate(fd, 0, size)
    zeros = bytes(min(size, 1 << 20))
    for offset in range(0, size if written else 0, len(zeros) or 1):
        os.pwrite(fd, zeros, offset)
    os.fsync(fd)
    return fd


def disk(
    path: Path,
    sizes: Sequence[int],
    seconds: float,
    preparation: str,
    *,
    file_bytes: int = FILE_BYTES,
) -> dict[str, float]:
    """One thread, no trio: pwrite and fdatasync in a loop, writes of these sizes in turn.

    ``preparation``: the file is "growing", or its space is "reserved" (fallocate), or it is
    "written": full of zeros, and synced, beforehand.  At its end the loop starts over, in
    a new file unless that was written.
    """
    result: list[tuple[int, int, float]] = []

    def work() -> None:
        fd = _file(
            path, 0 if preparation == "growing" else file_bytes, written=preparation == "written"
        )
        data = [os.urandom(size) for size in sizes]
        count = offset = total = 0
        spent = 0.0
        while spent < seconds:
            piece = data[count % len(data)]
            if offset + len(piece) > file_bytes:
                offset = 0
                if preparation != "written":
                    os.close(fd)
                    fd = _file(path, 0 if preparation == "growing" else file_bytes, written=False)
            start = perf_counter()
            os.pwrite(fd, piece, offset)
            os.fdatasync(fd)
            spent += perf_counter() - start
            offset += len(piece)
            total += len(piece)
            count += 1
        os.close(fd)
        result.append((count, total, spent))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    count, total, spent = result[0]
    return {
        "per second": count / spent,
        "MB per second": total / spent / 1e6,
        "us": spent / count * 1e6,
    }
