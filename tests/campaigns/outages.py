"""Power cuts under three real NATS servers, whose disks lose what was not synced (Linux, as root).

Law: each server's data are on ext4 on a disk of `_blockstore`, which is made again as a power cut
may have left it: what was written after the last barrier is there or not, piece by piece.  What was
said to the writers stands in the books of `_promises`.  With ``sync_interval: always`` nothing that
was acknowledged is lost; with the server's default it must be, or this sees nothing.  ``--count``
is of outages.

Outages: ``all``, the three lose their power at once; ``split``: one is paused, so that the leader
and the third acknowledge; the third loses its power and comes back, the leader is lost for good,
and the paused one goes on.  What was acknowledged is then on the disk that has lost its power, or
nowhere.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Final

import attrs
import nats_cluster
import trio
from nats_cluster import Server
from nats_writers import heal, leader

import trio_wal

from . import _mounts, _remote
from ._blockstore import Recording
from ._cuts import Cut, Cutter
from ._mounts import MIB, FileSystem, Loop
from ._remote import Job
from ._report import (
    Bar,
    Report,
    add_common_arguments,
    bound,
    described,
    progress_bar,
    replay_command,
)
from .partitions import Found, Told

OUTAGES = ("all", "split")
SYNCS: Final = {"always": "always", "default": "2m"}
"""``sync_interval``: what the documentation asks for, and what the server does by itself."""

TASKS: Final = 8
UNAVAILABLE_SECONDS: Final = 10.0
BACK_SECONDS: Final = 120.0
"""For the servers to serve the log again, on a busy machine."""
AFTER: Final = 40
"""Acknowledgements after an outage, which must then be there too."""
SYSTEM: Final = FileSystem(
    "ext4",
    64 * MIB,
    (
        *("-F", "-q", "-b", "4096", "-m", "0", "-N", "2048", "-J", "size=4"),
        *("-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"),
        *("-O", "^resize_inode"),
    ),
    ((0, 4096),),
)
CUT: Final = "cut"

COLUMNS = {
    "series": "outage",
    "sync": "sync_interval",
    "runs": "outages",
    "cuts": "disks cut",
    "acknowledged": "acknowledged",
    "unknown": "unknown",
    "lost": "lost",
    "doubled": "doubled",
    "unmountable": "unmountable",
    "again": "back after s",
    "bound": "bound",
}


class Unmountable(Exception):
    """The file system itself refuses a disk."""


class Disk:
    """The disk of one server: recorded up to a power cut, and then what that has left."""

    def __init__(self, folder: Path, target: Path) -> None:
        folder.mkdir(parents=True)
        target.mkdir(parents=True)
        self._folder = folder
        self._target = str(target)
        self._file = str(folder / "disk")
        self._recorder: subprocess.Popen[str] | None = None
        self._loop: Loop | None = None

    def record(self, base: Path) -> None:
        Path(self._file).touch()
        saved = str(self._folder / "recording")
        self._recorder = subprocess.Popen(
            [
                *(sys.executable, "-m", "campaigns._blockstore"),
                *(self._file, SYSTEM.name, str(base), saved),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=nats_cluster.end_with_parent,  # noqa: PLW1509  (one call to the system)
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self._recorder.stdout is not None
        if self._recorder.stdout.readline() != "mounted\n":
            raise OSError("the recording disk does not begin")
        self._mount(self._file)

    def _mount(self, file: str) -> None:
        self._loop = Loop(file)
        try:
            _mounts.mount(self._loop.device, self._target, SYSTEM.name)
        except OSError as exc:
            raise Unmountable(str(exc)) from exc

    def cut(self) -> None:
        """The power is gone: what is written from here on is not."""
        assert self._recorder is not None
        assert self._recorder.stdin is not None
        self._recorder.stdin.write(CUT + "\n")
        self._recorder.stdin.flush()

    def come_back(self, damage: int) -> None:
        """Mount what the cut has left."""
        recording = self._end_recording()
        (place,) = [place for place, line in recording.messages if line == CUT]
        cutter = Cutter(recording, SYSTEM.whole)
        image = self._folder / "image"
        image.write_bytes(cutter.image(cutter.advance(Cut(place, damage))))
        self._mount(str(image))

    def _end_recording(self) -> Recording:
        recorder = self._recorder
        assert recorder is not None
        self._unmount()
        _mounts.unmount(self._file, _mounts.MNT_DETACH)
        recorder.communicate()
        self._recorder = None
        return Recording.load(str(self._folder / "recording"))

    def _unmount(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            with contextlib.suppress(OSError):
                _mounts.unmount(self._target)
            loop.close()

    def close(self) -> None:
        self._unmount()
        if self._recorder is not None:
            with contextlib.suppress(OSError):
                _mounts.unmount(self._file, _mounts.MNT_DETACH)
            self._recorder.kill()
            self._recorder.communicate()


@attrs.define(eq=False)
class Case:
    """One outage, and what came of it."""

    folder: Path
    base: Path
    outage: str
    sync: str
    seed: int
    told: Told = attrs.Factory(Told)
    again: float = 0.0

    def run(self) -> None:
        cluster = nats_cluster.Cluster(
            self.folder, 3, seed=self.seed % 40 + 91, sync=SYNCS[self.sync]
        )
        disks = {
            one.name: Disk(self.folder / f"disk-{one.name}", one.folder / "data")
            for one in cluster.servers
        }
        try:
            for disk in disks.values():
                disk.record(self.base)
            cluster.start()
            heal(cluster)
            self._run(cluster, disks)
        finally:
            cluster.stop()
            for disk in disks.values():
                disk.close()

    def _run(self, cluster: nats_cluster.Cluster, disks: dict[str, Disk]) -> None:
        chance = Random(self.seed)
        job = Job(
            kind="log",
            servers=cluster.urls,
            monitors=cluster.monitors,
            name="orders",
            writer="before",
            folder=str(self.folder),
            seed=self.seed,
            unavailable_after=UNAVAILABLE_SECONDS,
            assume_synced=True,
        )
        gone = trio.run(self._until_cut, job, cluster, disks, chance)
        for server in cluster.servers:
            if server not in gone:
                if not server.running():
                    disks[server.name].come_back(chance.getrandbits(32))
                    self.told.figures["cuts"] += 1
                elif server.paused:
                    # Others take long to talk to one that was paused; what it has not synced it
                    # has all the same, it has lost no power.
                    server.kill()
        for server in cluster.servers:
            if server not in gone and not server.running():
                server.start()
        began = time.monotonic()
        trio.run(self._see, attrs.evolve(job, writer="after"))
        self.again = time.monotonic() - began

    async def _until_cut(
        self, job: Job, cluster: nats_cluster.Cluster, disks: dict[str, Disk], chance: Random
    ) -> list[Server]:
        """Write, and have the power fail; gives the servers that never come back."""
        over = trio.Event()
        gone: list[Server] = []
        async with trio_wal.open_wal(job.log()) as wal, trio.open_nursery() as nursery:
            leading = await leader(cluster, job.log())
            paused, third = chance.sample([s for s in cluster.servers if s is not leading], 2)
            self._start(nursery, wal.append, job, chance, over)
            await self._acknowledged(AFTER)
            if self.outage == "split":
                paused.kill(signal.SIGSTOP)
                await self._acknowledged(AFTER)
            await trio.sleep(chance.uniform(0.2, 2))
            fails = [third] if self.outage == "split" else cluster.servers
            for server in fails:
                assert server.process is not None
                server.process.send_signal(signal.SIGKILL)
            for server in fails:
                server.kill()
                disks[server.name].cut()
            if self.outage == "split":
                leading.kill()
                gone.append(leading)
            over.set()
        return gone

    def _start(
        self,
        nursery: trio.Nursery,
        write: _remote.Write,
        job: Job,
        chance: Random,
        over: trio.Event,
    ) -> None:
        def tell(what: str, *words: Any) -> None:
            if what != "failed":
                self.told.hear(what, *words)

        for number in range(TASKS):
            task = f"{job.writer}.{number}"
            nursery.start_soon(_remote.keep_writing, write, task, chance, over, tell)

    async def _acknowledged(self, more: int) -> None:
        count = self.told.figures["acknowledged"] + more
        with trio.move_on_after(BACK_SECONDS) as scope:
            while self.told.figures["acknowledged"] < count:  # noqa: ASYNC110
                await trio.sleep(0.02)
        if scope.cancelled_caught:
            raise Found(f"a hang: nothing is acknowledged for {BACK_SECONDS:.0f} s")

    async def _see(self, job: Job) -> None:
        """What is there; and the log goes on."""
        first_lsn, found = await self._when_back(lambda: _remote.found_by(job))
        self.told.judge(first_lsn, found)
        over = trio.Event()
        opened = trio_wal.open_wal(attrs.evolve(job, unavailable_after=BACK_SECONDS).log())
        async with opened as wal, trio.open_nursery() as nursery:
            self._start(nursery, wal.append, job, Random(self.seed), over)
            await self._acknowledged(AFTER)
            over.set()
        self.told.judge(*await _remote.found_by(job))

    async def _when_back(self, call: Callable[[], Any]) -> Any:
        until = time.monotonic() + BACK_SECONDS
        while True:
            try:
                return await call()
            except (trio_wal.LogUnavailableError, OSError) as exc:
                if time.monotonic() > until:
                    self.told.figures["lost"] = self.told.figures["acknowledged"]
                    raise Found(f"lost: the log cannot be read: {exc!r}") from exc
            await trio.sleep(0.1)


# -- the campaign ----------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, count=12, workers=False)
    parser.add_argument("--replay", metavar="OUTAGE:SYNC:SEED", help="one outage again")


def why_not() -> str | None:
    return nats_cluster.missing() or _mounts.why_not([SYSTEM.name], fuse=True)


def cases(count: int, seed: int) -> Iterator[tuple[str, str, int]]:
    """(outage, sync, seed): of every eight the first two are controls, with the default sync."""
    for number in range(count):
        outage = OUTAGES[number % 2]
        yield outage, "default" if number % 8 < 2 else "always", seed + number


class Figures:
    """Rows, and what the controls have found."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Counter[str]] = {}
        self.again: dict[tuple[str, str], float] = {}

    def add(self, case: Case, *, lost: bool) -> None:
        row = case.outage, case.sync
        figures = self.rows.setdefault(row, Counter())
        figures.update(case.told.figures)
        figures["runs"] += 1
        figures["losing"] += lost
        self.again[row] = max(self.again.get(row, 0.0), case.again)

    def report_to(self, report: Report) -> None:
        for (outage, sync), figures in sorted(self.rows.items()):
            cells: dict[str, Any] = {column: figures[column] for column in COLUMNS}
            cells |= {"series": outage, "sync": sync, "again": f"{self.again[outage, sync]:.1f}"}
            report.add(**{**cells, "bound": bound(figures["runs"]) if sync == "always" else ""})
            if sync != "default":
                continue
            told = f"with the default sync {figures['losing']} of {figures['runs']} have lost"
            report.note(f"control {outage}: {told}")
            if not figures["losing"]:
                report.find(f"the control {outage!r} has lost nothing: this sees nothing", "-")


def _run(report: Report, chosen: list[tuple[str, str, int]], bar: Bar) -> int:
    figures = Figures()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = folder / "base"
        _mounts.make(SYSTEM, str(base))
        for number, (outage, sync, seed) in enumerate(chosen):
            if bar.over():
                break
            case = Case(folder / f"{number}", base, outage, sync, seed)
            wrong = ""
            try:
                case.run()
            except KeyboardInterrupt:
                raise
            except Unmountable:
                case.told.figures["unmountable"] += 1
            except BaseException as exc:  # noqa: BLE001, ASYNC103  (a finding, or several)
                wrong = described(exc)
            figures.add(case, lost=bool(case.told.figures["lost"] or "lost:" in wrong))
            if wrong and sync == "always":
                replay = f"'{outage}:{sync}:{seed}'"
                report.find(wrong, replay_command("outages", "--replay", replay))
            bar.advance(1, f"{outage}, {sync}: {wrong[:200] or 'nothing lost'}")
    figures.report_to(report)
    return report.finish()


def _start(report: Report, chosen: list[tuple[str, str, int]], minutes: float | None) -> int:
    if (reason := why_not()) is not None:
        report.note(f"skipped: {reason}")
        return report.finish()
    _mounts.enter_private_namespace()
    with progress_bar("outages", minutes=minutes, count=len(chosen)) as bar:
        return _run(report, chosen, bar)


def run(arguments: argparse.Namespace) -> int:
    report = Report("outages", arguments, COLUMNS)
    return _start(report, list(cases(arguments.count, arguments.seed)), arguments.minutes)


def replay(case: str) -> int:
    outage, sync, seed = case.split(":")
    if outage not in OUTAGES or sync not in SYNCS:
        raise ValueError(case)
    return _start(Report("outages", None, COLUMNS), [(outage, sync, int(seed))], None)
