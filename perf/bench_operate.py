"""Operations: an archive beside appends, restore, `verify`, and what a scrape costs.

Law: each is held against the same bytes, copied or read, and checksummed in the plainest way, in
turns with it and in a process of its own.  The digest of a copy is SHA-256, that of an archive;
the checksum of a read is CRC-32C, that of a log.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

import google_crc32c
import load
import trio
from apart import apart
from harness import Comparison, Contender, MiB, Setting, compare, percentile
from prometheus_client import CollectorRegistry, generate_latest
from report import Report, spread_text, table

import trio_wal
from trio_wal._disk.verify import verify
from trio_wal._store_check import check_store
from trio_wal._system.files import OsFiles
from trio_wal.prometheus import WalCollector
from trio_wal.testing import MemoryFiles

TASKS: Final = 128
SEGMENT_BYTES: Final = 1 * MiB
LOGS: Final = 10
SCRAPES: Final = 200
HOT_APPENDS: Final = 200_000
BYTES: Final = 100 * 1_000_000
BYTES_AT_LENGTH: Final = 1_000 * 1_000_000
VALUE: Final = bytes(range(256)) * 4


def run(setting: Setting) -> Report:
    """The benchmark."""
    rounds, seconds = (3, 2.0) if setting.brief else (9, 3.0)
    report = Report("operate")
    found = {
        "archive": _compare(setting, ARCHIVING, rounds, seconds),
        "scrape": _compare(setting, {f"{LOGS} logs": scraped}, rounds, seconds),
        "hot path": _compare(setting, {"none": unobserved, "collector": observed}, rounds, seconds),
    }
    size = BYTES if setting.brief else BYTES_AT_LENGTH
    with setting.scratch() as path:
        for frames, records in FRAMES.items():
            log = path / f"log {records}"
            apart(make_log, str(log), size, records)
            each = {name: partial(trial, str(log)) for name, trial in READING.items()}
            found[f"verify, {frames}"] = _turns(each, rounds)
            each = {name: partial(trial, str(log)) for name, trial in RESTORING.items()}
            found[f"restore, {frames}"] = _turns(each, rounds)
            shutil.rmtree(log)
        store = path / "db"
        apart(make_store, str(store), size)
        found["store"] = _turns(
            {name: partial(trial, str(store)) for name, trial in CHECKING.items()}, rounds
        )
    _show(found, report, rounds, size)
    disturbed = sum(one.disturbed for one in found.values())
    if disturbed:
        report.notes.append(f"{disturbed} trials were disturbed by other processes.")
    return report


Trial = Callable[..., dict[str, float]]


def _compare(
    setting: Setting, contenders: Mapping[str, Trial], rounds: int, seconds: float
) -> Comparison:
    def one(trial: Trial) -> Mapping[str, float]:
        with setting.scratch() as path:
            return apart(trial, str(path), seconds)

    return compare(
        [Contender(name, partial(one, trial)) for name, trial in contenders.items()], rounds
    )


def _turns(trials: Mapping[str, Callable[[], dict[str, float]]], rounds: int) -> Comparison:
    def one(trial: Any) -> Mapping[str, float]:
        return apart(trial.func, *trial.args)

    return compare([Contender(name, partial(one, trial)) for name, trial in trials.items()], rounds)


# -- an archive beside appends --------------------------------------------------------------


async def _append_beside(
    path: str, seconds: float, archive: trio_wal.Archive | None
) -> dict[str, float]:
    taken: list[float] = []
    async with trio_wal.open_wal(f"{path}/log", segment_size=SEGMENT_BYTES, archive=archive) as wal:
        counts_from = perf_counter() + max(load.WARM_UP_SECONDS, seconds / 10)
        until = counts_from + seconds
        cpu = 0.0

        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(load.append_until, wal, taken, counts_from, until)
            await trio.sleep(counts_from - perf_counter())
            cpu = process_time()
        cpu = process_time() - cpu
        stats = wal.statistics()
        behind = 0.0
        if archive is not None:
            assert stats.archived_lsn is not None
            assert not stats.archive_failures
            behind = 1 - stats.archived_lsn / stats.durable_lsn
    taken.sort()
    return {
        "per second": len(taken) / seconds,
        "p50 ms": percentile(taken, 0.5) * 1e3,
        "p99 ms": percentile(taken, 0.99) * 1e3,
        "max ms": taken[-1] * 1e3,
        load.CPU: cpu / len(taken) * 1e6,
        "not archived": behind,
    }


def without_archive(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_append_beside, path, seconds, None)


def with_archive(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_append_beside, path, seconds, trio_wal.DirectoryArchive(f"{path}/archive"))


ARCHIVING: Final[Mapping[str, Trial]] = {"none": without_archive, "directory": with_archive}


# -- a scrape ---------------------------------------------------------------------------------


async def _scrape(path: str) -> dict[str, float]:
    """From a thread, as a server of `prometheus_client` does it, while nothing else goes on."""
    taken: list[float] = []
    registry = CollectorRegistry()
    async with trio.open_nursery() as nursery:
        logs: list[trio_wal.WriteAheadLog] = []

        async def hold(number: int, *, task_status: trio.TaskStatus[None]) -> None:
            async with trio_wal.open_wal(f"{path}/{number}") as wal:
                await wal.append_many([load.RECORD] * 100)
                logs.append(wal)
                task_status.started()
                await trio.sleep_forever()

        for number_ in range(LOGS):
            await nursery.start(hold, number_)
        registry.register(WalCollector(*logs))

        def scrape() -> None:
            for _ in range(SCRAPES):
                started = perf_counter()
                text = generate_latest(registry)
                taken.append(perf_counter() - started)
                assert text.count(b"trio_wal_last_lsn{") == LOGS

        await trio.to_thread.run_sync(scrape)
        nursery.cancel_scope.cancel()
    taken.sort()
    return {"ms": percentile(taken, 0.5) * 1e3, "p99 ms": percentile(taken, 0.99) * 1e3}


def scraped(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_scrape, path)


async def _hot(observed: bool) -> dict[str, float]:
    """Appends of many tasks with files in memory: nothing but the processor's work."""
    async with trio_wal.open_wal("/log", files=MemoryFiles()) as wal:
        registry = CollectorRegistry()
        if observed:
            registry.register(WalCollector(wal))

        async def worker() -> None:
            for _ in range(HOT_APPENDS // TASKS):
                await wal.append(load.RECORD)

        started = process_time()
        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(worker)
        spent = process_time() - started
        # It is alive until here.
        assert bool(generate_latest(registry)) == observed
    return {"CPU us": spent / HOT_APPENDS * 1e6}


def unobserved(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_hot, False)


def observed(path: str, seconds: float) -> dict[str, float]:
    return trio.run(_hot, True)


# -- reading, copying, checking -----------------------------------------------------------------

FRAMES: Final = {"128 records a frame": 128, "10,000 records a frame": 10_000}
READY_SECONDS: Final = 0.05


async def _make_log(path: str, size: int, records: int) -> None:
    archive = trio_wal.DirectoryArchive(f"{path}/archive")
    unit = [load.RECORD] * records
    async with trio_wal.open_wal(f"{path}/log", durability="none", archive=archive) as wal:
        for _ in range(size // (records * len(load.RECORD))):
            await wal.append_many(unit)
        last = await wal.rotate()
        while wal.statistics().archived_lsn != last:  # noqa: ASYNC110  (a thread of the log's own does it)
            await trio.sleep(READY_SECONDS)


def make_log(path: str, size: int, records: int) -> dict[str, float]:
    """A log, and its archive, that both have so many bytes of records."""
    trio.run(_make_log, path, size, records)
    return {}


def restored(path: str) -> dict[str, float]:
    dest = f"{path}/restored"
    started, cpu = perf_counter(), process_time()
    report = trio.run(partial(trio_wal.restore, f"{path}/archive", dest))
    figures = _figures(report.bytes, started, cpu)
    shutil.rmtree(dest)
    return figures


def copied(path: str) -> dict[str, float]:
    """The same segments, copied, digested and synced, and nothing else."""
    dest = f"{path}/copied"
    os.mkdir(dest)
    done = 0
    started, cpu = perf_counter(), process_time()
    for source in sorted(Path(path, "archive").glob("*.wal")):
        digest = hashlib.sha256()
        with source.open("rb", 0) as old, open(f"{dest}/{source.name}", "xb", 0) as new:
            while piece := old.read(MiB):
                digest.update(piece)
                new.write(piece)
                done += len(piece)
            os.fsync(new.fileno())
    figures = _figures(done, started, cpu)
    shutil.rmtree(dest)
    return figures


def verified(path: str) -> dict[str, float]:
    directory = OsFiles().open_directory(f"{path}/log")
    started, cpu = perf_counter(), process_time()
    found = verify(directory)
    figures = _figures(found.bytes, started, cpu)
    assert not found.findings
    return figures


def checksummed(path: str) -> dict[str, float]:
    """The same files, read a mebibyte at a time, through CRC-32C."""
    done = crc = 0
    started, cpu = perf_counter(), process_time()
    for source in sorted(Path(path, "log").glob("wal-*.log")):
        with source.open("rb", 0) as file:
            while piece := file.read(MiB):
                crc = google_crc32c.extend(crc, piece)
                done += len(piece)
    return _figures(done, started, cpu)


def _figures(done: int, started: float, cpu: float) -> dict[str, float]:
    seconds = perf_counter() - started
    return {"MB per second": done / seconds / 1e6, "CPU s": process_time() - cpu}


READING: Final = {"verify": verified, "read + CRC-32C": checksummed}
RESTORING: Final = {"restore": restored, "copy + SHA-256": copied}


async def _make_store(path: str, size: int) -> None:
    async with trio_wal.open_database(path) as db:
        for first in range(0, size // len(VALUE), 1_000):
            async with db.transaction() as tx:
                for n in range(first, first + 1_000):
                    tx.put(b"key %010d" % n, VALUE)
        await db.checkpoint()


def make_store(path: str, size: int) -> dict[str, float]:
    trio.run(_make_store, path, size)
    return {}


def store_verified(path: str) -> dict[str, float]:
    """Its pages, as `verify` and an open look at them."""
    started, cpu = perf_counter(), process_time()
    found = check_store(f"{path}/store", read_through=False)
    figures = _figures(found.bytes, started, cpu)
    assert not found.findings
    assert found.keys
    return figures


def store_read_through(path: str) -> dict[str, float]:
    """And then key by key through LMDB, in a child process: all that `trio-wal verify` does."""
    started, cpu = perf_counter(), process_time()
    found = check_store(f"{path}/store")
    figures = _figures(found.bytes, started, cpu)
    assert not found.findings
    return figures


def lmdb_verified(path: str) -> dict[str, float]:
    """py-lmdb's own verifier of a file, which it has since its version 3."""
    verifier: Any = importlib.import_module("lmdb.verify")
    file = f"{path}/store/data.mdb"
    started, cpu = perf_counter(), process_time()
    verifier.verify(file)
    return _figures(os.path.getsize(file), started, cpu)


CHECKING: Final = {
    "pages": store_verified,
    "pages, and read through": store_read_through,
    "lmdb.verify": lmdb_verified,
}


# -- what is said -------------------------------------------------------------------------------


def _show(found: Mapping[str, Comparison], report: Report, rounds: int, size: int) -> None:
    for name, comparison in found.items():
        figures = [key for key in next(iter(comparison.trials.values()))[0] if "foreign" not in key]
        shown = table(f"{name}, {rounds} rounds", ["", *figures])
        for what in comparison.trials:
            shown.add_row(what, *(spread_text(comparison.spread(what, one)) for one in figures))
        report.tables.append(shown)
        report.data[name] = {
            what: {one: comparison.spread(what, one) for one in figures}
            for what in comparison.trials
        }
    report.notes.append(f"Restored and verified: {size / 1e6:,.0f} MB of records.")
    archive = found["archive"]
    report.require(
        "archive",
        f"append, {TASKS} tasks, segments of 1 MiB, archived, to not",
        0.8,
        archive.ratio("directory", "none"),
        at_most=False,
    )
    report.require(
        "archive p99",
        "p99 of that, archived, to not",
        2.0,
        archive.ratio("directory", "none", "p99 ms"),
        at_most=True,
    )
    report.require(
        "scrape",
        f"a scrape of {LOGS} logs",
        5.0,
        found["scrape"].spread(f"{LOGS} logs"),
        unit="ms",
        at_most=True,
    )
    report.require(
        "hot path",
        "CPU of an append with a collector, to none",
        1.0,
        found["hot path"].ratio("collector", "none"),
        at_most=True,
    )
    for frames in FRAMES:
        report.require(
            f"restore {frames}",
            f"restore to copying and digesting, {frames}",
            0.5,
            found[f"restore, {frames}"].ratio("restore", "copy + SHA-256"),
            at_most=False,
        )
        report.require(
            f"verify {frames}",
            f"verify to reading and checksumming, {frames}",
            0.4,
            found[f"verify, {frames}"].ratio("verify", "read + CRC-32C"),
            at_most=False,
        )
    report.require(
        "verify store",
        "a store's pages to lmdb.verify",
        1.0,
        found["store"].ratio("pages", "lmdb.verify"),
        at_most=False,
    )
