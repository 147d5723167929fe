"""Whole programs under a virtual clock, cancelled and crashed at every step of any task.

One program with one seed of the scheduler is run again and again; in the k-th run, at the
k-th step that any task makes, crash images are taken, and one writer or everything is
cancelled.  Checked are the promises of the log: what returned is durable and what raised
`Cancelled` is absent (1), order (2), a drained shutdown (5), recovery (6); all through the
public API.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from itertools import count
from typing import Any, Literal

import attrs
import trio
from helpers import AtStep, read_all

import trio_wal
from trio_wal.testing import MemoryFiles

from ._images import DB, LOG, fingerprint
from ._promises import Promises, Record, Wrong, check
from ._report import Report, add_common_arguments
from ._simulator import ENDS, VIRTUAL_SECONDS_MAX, Result, report_results, seeded_run, until_found

POWER_IMAGES = 2
SHARE = 20
"""Steps of one task for a worker process: about a second."""
Mode = Literal["all", "one"]
"""What is cancelled at the k-th step."""
MODES: tuple[Mode, ...] = ("all", "one")

COLUMNS = {
    "workload": "program",
    "runs": "runs",
    "points": "crash points",
    "images": "distinct images",
    **ENDS,
}


@attrs.define(eq=False)
class Run:
    """One run of a program."""

    seed: int
    step: int
    mode: Mode
    files: MemoryFiles = attrs.Factory(MemoryFiles)
    promises: Promises = attrs.Factory(Promises)
    seen: list[tuple[int, Hashable]] = attrs.Factory(list)
    """What a follower was given."""
    sent: list[Record] = attrs.Factory(list)
    """Accepted: to be drained, when the block is left."""
    at_crash: tuple[Promises, int] | None = None
    """What was promised then, and how much a follower had been given."""
    images: list[tuple[MemoryFiles, bool]] = attrs.Factory(list)
    """(files, whether the process alone was killed)"""
    everything: trio.CancelScope = attrs.Factory(trio.CancelScope)
    one: trio.CancelScope = attrs.Factory(trio.CancelScope)

    def at_step(self) -> None:
        self.at_crash = self.promises.copy(), len(self.seen)
        self.images.append((self.files.crash_image(kind="kill"), True))
        for number in range(POWER_IMAGES):
            seed = (self.seed * 65_537 + self.step) * 8 + number
            self.images.append((self.files.crash_image(seed, "power"), False))
        (self.everything if self.mode == "all" else self.one).cancel()

    async def call(
        self,
        task: int,
        function: Callable[..., Awaitable[Any]],
        *args: Any,
        keys: Sequence[Hashable],
    ) -> None:
        unit = self.promises.submit(task, *keys)
        try:
            result = await function(*args)
        except trio.Cancelled:
            self.promises.withdraw(unit, "it was cancelled")
            raise
        except (trio.ClosedResourceError, trio_wal.TransactionConflict):
            self.promises.withdraw(unit, "it was refused")
            return
        if result is None:
            self.sent += unit
        else:
            lsns = [result] if isinstance(result, int) else list(result)
            check(len(lsns) == len(unit), f"{len(unit)} records were given {lsns}")
            self.promises.acknowledge(unit, lsns[0])

    def promised(self, drained: bool) -> tuple[Promises, int]:
        """What must be found of it, and how much of what a follower was given."""
        if drained:
            self.promises.cover(self.sent)
            return self.promises, len(self.seen)
        assert self.at_crash is not None
        return self.at_crash


# -- the log ------------------------------------------------------------------------


async def _log_program(run: Run) -> None:
    rng = random.Random(run.seed)
    options: dict[str, Any] = {
        "segment_size": rng.choice((1, 7_000)),
        "flush_interval": rng.choice((0, 0.010)),
        "max_queue_size": rng.choice((2, 100)),
    }
    # Batches of single records alone have LSNs that are counted, not looked up.
    kinds = rng.choice((("append",), ("append", "append", "append_many", "send")))

    async def writer(wal: Any, task: int, scope: trio.CancelScope) -> None:
        with scope:
            for number in range(4):

                def payload(part: int, number: int = number) -> bytes:
                    return b"%d/%d/%d " % (task, number, part) + bytes(rng.choice((0, 600)))

                kind = rng.choice(kinds)
                if kind == "append_many":
                    data = [payload(part) for part in range(3)]
                    await run.call(task, wal.append_many, data, keys=data)
                else:
                    one = payload(0)
                    await run.call(task, getattr(wal, kind), one, keys=[one])
            await wal.flush()

    async def follower(wal: Any) -> None:
        async with wal.follow() as records:
            async for record in records:
                run.seen.append((record.lsn, record.data))

    async def writers(wal: Any) -> None:
        async with trio.open_nursery() as nursery:
            for task, scope in enumerate((run.one, trio.CancelScope(), trio.CancelScope())):
                nursery.start_soon(writer, wal, task, scope)

    with run.everything:
        opening = trio_wal.open_wal(LOG, files=run.files, **options)
        async with opening as wal, trio.open_nursery() as nursery:
            nursery.start_soon(follower, wal)
            await writers(wal)
            nursery.cancel_scope.cancel()


async def _log_check(run: Run, files: MemoryFiles, drained: bool) -> None:
    async with trio_wal.open_wal(LOG, files=files, segment_size=1) as wal:
        pairs = list((await read_all(wal)).items())
        report = wal.recovery
    if drained and not report.clean_shutdown:
        raise Wrong("other", f"the block was left, but: {report}")
    promises, seen = run.promised(drained)
    promises.expect(pairs, pairs[0][0] if pairs else 1)
    if run.seen[:seen] != pairs[:seen]:
        raise Wrong("lost", f"a follower was given {seen} records that are not all there")


# -- the database -------------------------------------------------------------------

ACCOUNTS = [b"account %d" % number for number in range(3)]
EACH = 100


async def _database_program(run: Run) -> None:
    rng = random.Random(run.seed)
    options: dict[str, Any] = {
        "segment_size": rng.choice((1, 7_000)),
        "checkpoint_bytes": rng.choice((150, 100_000)),
        "flush_interval": rng.choice((0, 0.010)),
    }

    async def transfer(db: Any, task: int, number: int) -> int:
        async with db.transaction() as tx:
            source, target = rng.sample(ACCOUNTS, 2)
            amount = rng.randint(1, 30)
            tx.put(source, b"%d" % (int(tx.get(source, b"0")) - amount))
            if rng.random() < 0.3:
                await trio.lowlevel.checkpoint()
            tx.put(target, b"%d" % (int(tx.get(target, b"0")) + amount))
            tx.put(b"task %d" % task, b"%d" % number)
        assert tx.lsn is not None
        return int(tx.lsn)

    async def writer(db: Any, task: int, scope: trio.CancelScope) -> None:
        with scope:
            for number in range(1, 5):
                await run.call(task, transfer, db, task, number, keys=[(task, number)])

    async def checkpointer(db: Any) -> None:
        for _ in range(2):
            await trio.lowlevel.checkpoint()
            await db.checkpoint()

    with run.everything:
        async with trio_wal.open_database(DB, files=run.files, **options) as db:
            async with db.transaction() as tx:
                for account in ACCOUNTS:
                    tx.put(account, b"%d" % EACH)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer, db, 0, run.one)
                nursery.start_soon(writer, db, 1, trio.CancelScope())
                nursery.start_soon(checkpointer, db)


async def _database_check(run: Run, files: MemoryFiles, drained: bool) -> None:
    async with trio_wal.open_database(DB, files=files, segment_size=1) as db:
        state = dict(db.scan())
        report = db.recovery
    if drained and not report.clean_shutdown:
        raise Wrong("other", f"the block was left, but: {report}")
    if state and sum(int(state[account]) for account in ACCOUNTS) != EACH * len(ACCOUNTS):
        raise Wrong("partial", f"money was made or lost: {state}")
    promises, _ = run.promised(drained)
    last = {task: int(state.get(b"task %d" % task, b"0")) for task in (0, 1)}
    shown = {(task, number) for task in last for number in range(1, last[task] + 1)}
    commits = 1 if state else 0
    for task, number in last.items():
        record = promises.records.get((task, number))
        if number and (record is None or record.gone):
            raise Wrong("other", f"transaction {number} of task {task} is there")
    for key, record in promises.records.items():
        if record.lsn is not None and key not in shown:
            raise Wrong("lost", f"{record} returned; the last that are there are {last}")
        commits += key in shown and not record.gone
    if commits != report.last_lsn:
        raise Wrong("other", f"{commits} commits are there, and {report.last_lsn} LSNs")


PROGRAMS: dict[str, tuple[Callable[[Run], Awaitable[None]], Any]] = {
    "log": (_log_program, _log_check),
    "database": (_database_program, _database_check),
}


# -- running ------------------------------------------------------------------------


def run_steps(program: str, seed: int, mode: Mode, steps: range, images: set[int]) -> Result:
    """Cancel and crash at each of these steps, as far as the program makes so many."""
    result = Result(program)
    main, look = PROGRAMS[program]

    async def guarded(run: Run) -> None:
        with trio.fail_after(VIRTUAL_SECONDS_MAX):
            with AtStep(run.step, run.at_step):
                await main(run)

    for step in steps:
        run = Run(seed, step, mode, MemoryFiles(seed=seed))
        result.runs += 1
        where = "the program failed"
        try:
            seeded_run(guarded, run, seed=seed)
            if run.at_crash is None:
                result.operations = step
                return result
            for number, (image, killed) in enumerate((*run.images, (run.files, True))):
                drained = number == len(run.images)
                where = "left and opened again" if drained else f"image {number}"
                images.add(fingerprint(image))
                result.points += 1
                seeded_run(look, run, image, drained, seed=seed + killed)
        except Exception as exc:  # noqa: BLE001  (whatever it is, it is a finding)
            told = f"{program}, seed {seed}, {mode} cancelled at step {step}, {where}"
            result.fail(exc, told, "whole", f"{program}:{seed}:{mode}:{step}")
            return result
    return result


def run_whole(seed: int, *, seconds: float | None = None, points: int | None = None) -> Result:
    """With seeds from ``seed`` on, until the budget is used up or something is found."""
    images: set[int] = set()
    parts = (run_task(task, images) for task in _tasks(seed, None))
    total = until_found(Result("whole"), parts, seconds, points)
    total.images = len(images)
    return total


Task = tuple[str, int, Mode, int]
"""(program, seed, mode, first step)"""
STEPS_MAX = 200
"""More than any of the programs makes."""


def _tasks(seed: int, program: str | None) -> Iterator[Task]:
    for number in count(seed):
        for first in range(1, STEPS_MAX, SHARE):
            for name in PROGRAMS if program is None else (program,):
                for mode in MODES:
                    yield name, number, mode, first


def run_task(task: Task, images: set[int] | None = None) -> Result:
    program, seed, mode, first = task
    found = set[int]() if images is None else images
    result = run_steps(program, seed, mode, range(first, first + SHARE), found)
    result.images = len(found)
    return result


# -- the campaign -------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, minutes=1)
    parser.add_argument("--program", choices=PROGRAMS, help="this one only")
    parser.add_argument("--replay", metavar="PROGRAM:SEED:MODE:STEP", help="one case again")


def run(arguments: argparse.Namespace) -> int:
    report = Report("whole", arguments, COLUMNS)
    tasks = _tasks(arguments.seed, arguments.program)
    return report_results(report, run_task, tasks, arguments.minutes)


def replay(case: str) -> int:
    program, seed, mode, step = case.split(":")
    steps = range(int(step), int(step) + 1)
    if program not in PROGRAMS:
        raise ValueError(program)
    result = run_steps(program, int(seed), MODES[MODES.index(mode)], steps, set())
    return result.report_to(Report("whole", None, {}))
