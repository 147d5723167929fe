"""The whole demo: write, kill, recover, check, go on; at the end read everything back.

Law: what the log must hold is known only from acknowledgements that came through the
pipe, and is checked by reading the log, never by asking the process that wrote it.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from array import array
from collections.abc import Callable
from time import perf_counter
from typing import Final, Protocol

import attrs
import msgspec
import trio

from trio_wal._cli._output import CommandError
from trio_wal._disk.chain import LOG_NAME
from trio_wal._disk.verify import verify as verify_log
from trio_wal._opening import open_database
from trio_wal._system.files import OsFiles
from trio_wal._util import MiB
from trio_wal._wal import open_wal

from . import bank
from .bank import BankLedger, BankProblems
from .ledger import Ledger, Problems, Rebuilder
from .workload import Workload
from .writer import WORD_BYTES, WORDS, Job

_CHILD: Final = (
    "import sys\nsys.path[:] = sys.argv[1:]\nfrom trio_wal._cli._demo.writer import main\nmain()\n"
)
"""The child imports from just where its parent did, and before that nothing but what is built
in: ``-c`` puts the working directory first, in which anybody's code may lie; ``-I`` does not."""
READ_BYTES: Final = 1 * MiB
KILL_SPREAD: Final = 0.1
"""A kill comes within this share of the whole around its even place."""
KILL_DELAY_SECONDS: Final = 0.005
"""And up to so much later, so that no moment of a batch is favoured."""
UNTOLD_MAX: Final = 4
"""Lines a task that a kill may leave in the log without an acknowledgement: two whose words were
not sent yet, one that was durable and whose task had not run yet, and one to be sure."""


class Watcher(Protocol):
    """Who shows how it goes on."""

    def describe(self, what: str) -> None: ...

    def update(self, done: float, total: float) -> None: ...

    def note(self, text: str) -> None: ...


@attrs.define
class Report:
    """What came out of it."""

    lines: int
    bytes: int
    tasks: int
    sources: int
    sources_identical: int = 0
    """Sources that, made again from the log alone, are what they were."""
    kills: int = 0
    killed_at: list[int] = attrs.Factory(list[int])
    """Lines that had been acknowledged by each kill."""
    acknowledged: int = 0
    found: int = 0
    problems: Problems = attrs.Factory(Problems)
    transfers: int = 0
    """Between accounts, as the database counts them."""
    bank: BankProblems = attrs.Factory(BankProblems)
    damaged: int = 0
    """Findings of `verify`."""
    unacknowledged_kept: int = 0
    """Lines that a kill left in the log though nobody had been told."""
    torn_bytes: int = 0
    recovery_seconds: list[float] = attrs.Factory(list[float])
    """From opening to open, after each kill."""
    append_seconds: float = 0.0
    """Time in which lines were appended; starts of processes and checks are not in it."""
    batches: int = 0
    """Frames in the log."""
    syncs: int = 0
    latency_p50: float = 0.0
    latency_p99: float = 0.0
    latency_max: float = 0.0
    seconds: float = 0.0
    """Everything."""

    @property
    def stopped(self) -> bool:
        """Whether what was read back is wrong; it does not go on then."""
        return bool(self.problems or self.bank)

    @property
    def untold(self) -> int:
        """Lines without an acknowledgement beyond those that kills explain: nobody promised
        anything of them, so to find them proves nothing."""
        return max(0, self.unacknowledged_kept - UNTOLD_MAX * self.tasks * self.kills)

    @property
    def ok(self) -> bool:
        return (
            not self.stopped
            and not self.damaged
            and not self.untold
            and self.acknowledged + self.unacknowledged_kept == self.found == self.lines
            and self.sources_identical == self.sources
        )

    @property
    def appends_per_second(self) -> float:
        return self.acknowledged / self.append_seconds if self.append_seconds else 0.0


async def run(
    workload: Workload,
    directory: str,
    *,
    kills: int,
    seed: int | None,
    watcher: Watcher,
    database: bool = False,
) -> Report:
    """Append the workload to a new log in ``directory``, with so many kills on the way.

    With ``database`` every line is a transaction, and money is moved at the same time.

    Ends early where a check after a kill finds something wrong.

    Raises:
      CommandError: the process that writes ended by itself.
      WalError, OSError
    """
    began = perf_counter()
    kind = _DatabaseDemo if database else _Demo
    demo = kind(workload, directory, random.Random(seed), watcher)
    await demo.run(kills)
    report = demo.report
    report.seconds = perf_counter() - began
    return report


class _Demo:
    database = False

    def __init__(
        self, workload: Workload, directory: str, rng: random.Random, watcher: Watcher
    ) -> None:
        self._workload = workload
        self._directory = directory
        self._rng = rng
        self._watcher = watcher
        self._total = len(workload.records)
        self._ledger = self._new_ledger()
        longest = max(map(len, workload.records), default=0)
        self._max_record_size = max(16 * MiB, longest)
        self.report = Report(
            lines=self._total,
            bytes=sum(map(len, workload.contents)),
            tasks=workload.tasks,
            sources=len(workload.contents),
        )

    def _new_ledger(self) -> Ledger:
        return Ledger(self._workload)

    async def run(self, kills: int) -> None:
        report, ledger = self.report, self._ledger
        for number in range(kills + 1):
            stop_at = self._kill_place(number, kills) if number < kills else None
            killed = await self._write(stop_at)
            if not killed:
                break
            report.kills += 1
            report.killed_at.append(ledger.acknowledged)
            self._watcher.describe(f"kill {report.kills} of {kills}: checking")
            seconds = await self._check()
            report.recovery_seconds.append(seconds)
            self._watcher.note(
                f"kill {report.kills} of {kills} at {report.killed_at[-1]:,} acknowledged: "
                f"open again after {seconds * 1e3:,.0f} ms, "
                + ("NOT ALL IS RIGHT" if report.stopped else "nothing lost")
            )
            if report.stopped:
                break
        if not report.stopped:
            self._watcher.describe("reading back")
            await self._check(Rebuilder(self._workload))
        self._verify()
        report.acknowledged = ledger.acknowledged
        report.found = ledger.found
        report.unacknowledged_kept = max(0, ledger.found - ledger.acknowledged)
        latencies = sorted(ledger.latencies)
        if latencies:
            report.latency_p50 = latencies[len(latencies) // 2] / 1e9
            report.latency_p99 = latencies[len(latencies) * 99 // 100] / 1e9
            report.latency_max = latencies[-1] / 1e9

    def _kill_place(self, number: int, kills: int) -> float:
        """Acknowledgements after which the writer is killed."""
        even = (number + 1) / (kills + 1)
        spread = KILL_SPREAD * 2 / (kills + 1)
        return self._total * (even + self._rng.uniform(-spread, spread))

    # -- the process that writes --

    async def _write(self, stop_at: float | None) -> bool:
        """Have the rest of the workload written; returns whether that was cut by a kill."""
        self._watcher.describe("writing")
        # Its standard error is this process's: a traceback there is for whoever reads along.
        process = await trio.lowlevel.open_process(
            [sys.executable, "-I", "-c", _CHILD, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        killed = False
        try:
            async with process.stdout:
                async with process.stdin:
                    await self._send_job(process.stdin)
                killed = await self._listen(process, process.stdout, stop_at)
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()
        if process.returncode and not killed:
            raise CommandError(
                f"the process that writes ended by itself, with exit code {process.returncode}"
            )
        return bool(process.returncode)

    async def _send_job(self, stdin: trio.abc.SendStream) -> None:
        job = Job(
            self._directory,
            self._workload.contents,
            self._workload.tasks,
            self._ledger.resume(),
            self._max_record_size,
            self.database,
            self._rng.getrandbits(32),
        )
        # Broken: it ended; its exit code says more.
        with contextlib.suppress(trio.BrokenResourceError):
            await stdin.send_all(msgspec.msgpack.encode(job))

    async def _listen(
        self, process: trio.Process, stdout: trio.abc.ReceiveStream, stop_at: float | None
    ) -> bool:
        """Take acknowledgements, up to the last that was sent before a kill."""
        messages = _Messages(self._acknowledged)
        killed = False
        kill_time: float | None = None
        while True:
            with trio.move_on_at(kill_time) if kill_time is not None else trio.CancelScope():
                chunk = await stdout.receive_some(READ_BYTES)
                if not chunk:
                    break
                messages.feed(bytes(chunk))
            if stop_at is None or killed:
                continue
            if kill_time is None:
                if self._ledger.acknowledged >= stop_at:
                    kill_time = trio.current_time() + self._rng.uniform(0, KILL_DELAY_SECONDS)
            elif trio.current_time() >= kill_time:
                process.kill()
                killed = True
                kill_time = None
        self.report.syncs += messages.syncs
        self.report.append_seconds += messages.nanoseconds / 1e9
        return killed

    def _acknowledged(self, words: array[int]) -> None:
        self._ledger.acknowledge(words)
        self._watcher.update(self._ledger.acknowledged, self._total)

    # -- what became of it --

    async def _check(self, rebuilder: Rebuilder | None = None) -> float:
        """Recover the log and compare all of it; returns how long recovery took."""
        ledger, report = self._ledger, self.report
        saw = ledger.saw
        began = perf_counter()
        async with open_wal(self._directory, max_record_size=self._max_record_size) as wal:
            seconds = perf_counter() - began
            report.torn_bytes += wal.recovery.torn_bytes
            ledger.begin()
            async with wal.read() as records:
                async for record in records:
                    saw(record.lsn, record.data)
                    if rebuilder is not None:
                        rebuilder.saw(record.data)
        report.problems = ledger.end()
        if rebuilder is not None:
            report.sources_identical = rebuilder.identical()
        return seconds

    def _verify(self) -> None:
        self._verify_log(self._directory)

    def _verify_log(self, path: str) -> None:
        directory = OsFiles().open_directory(path)
        try:
            result = verify_log(directory)
        finally:
            directory.close()
        self.report.damaged = len(result.findings)
        self.report.batches = result.frames


class _DatabaseDemo(_Demo):
    """The same on a database."""

    database = True
    _ledger: BankLedger

    def _new_ledger(self) -> BankLedger:
        return BankLedger(self._workload)

    async def _check(self, rebuilder: Rebuilder | None = None) -> float:
        ledger, report = self._ledger, self.report
        began = perf_counter()
        async with open_database(self._directory, max_record_size=self._max_record_size) as db:
            seconds = perf_counter() - began
            report.torn_bytes += db.recovery.torn_bytes
            ledger.begin()
            for key, value in db.scan(prefix=bank.LINES):
                ledger.stored(bank.line_index(key), value)
                if rebuilder is not None:
                    rebuilder.saw(value)
            balances = sum(int(value) for _, value in db.scan(prefix=bank.ACCOUNT))
            counts = [
                int(db.get(bank.count_key(task), b"0")) for task in range(bank.TRANSFER_TASKS)
            ]
        report.problems = ledger.end()
        report.bank = ledger.settle(balances, counts)
        report.transfers = sum(counts)
        if rebuilder is not None:
            report.sources_identical = rebuilder.identical()
        return seconds

    def _verify(self) -> None:
        self._verify_log(f"{self._directory}/{LOG_NAME}")
        # The log has been cut behind what LMDB holds: its frames are not all batches.
        self.report.batches = self.report.syncs


class _Messages:
    """The pipe's bytes, cut into messages; a kill may leave a part of one."""

    def __init__(self, take: Callable[[array[int]], None]) -> None:
        self._take = take
        self._pending = b""
        self.syncs = 0
        self.nanoseconds = 0

    def feed(self, chunk: bytes) -> None:
        data = self._pending + chunk
        words = array("Q", data[: len(data) // WORD_BYTES * WORD_BYTES])
        at = 0
        while at + WORDS <= len(words):
            end = at + WORDS * (words[at] + 1)
            if end > len(words):
                break
            self.syncs, self.nanoseconds = words[at + 1], words[at + 2]
            self._take(words[at + WORDS : end])
            at = end
        self._pending = data[at * WORD_BYTES :]
