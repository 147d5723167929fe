"""Cancelled at every step, Ctrl-C at every line, out of memory at every allocation.

Law: a program runs with one interruption; then its log or database is opened again and must
bear out what every call said (`errors.Witness`), and more: what raised `Cancelled` is absent,
what was accepted is there because leaving drains, the close was a clean one, Ctrl-C comes out
of the program as what it is, and nothing hangs.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import attrs
import trio
from databases import DB
from helpers import LOG, AtStep, read_all

import trio_wal
from trio_wal import KeepAll
from trio_wal.testing import MemoryFiles

from . import _report, errors
from ._promises import Wrong, check
from ._simulator import seeded_run
from .errors import HANG_SECONDS, HEALTHY, OPTIONS, Injector, Witness
from .hostile import limited_time

PARTS: Final = ("cancel", "ctrl-c", "memory")
STEPS: Final = 800
"""More than any of the programs has."""
CHUNK: Final = 40
CASE_SECONDS: Final = 60
PACKAGE: Final = str(Path(trio_wal.__file__).parent)
TRACED: Final = (
    "_batch.py", "_admission.py", "_queue.py", "_watermark.py", "_flusher.py", "_local.py",
    "_log.py", "_state.py", "_wal.py", "_worker.py", "_park.py",
    "_database.py", "_core.py", "_mvcc.py", "_viewers.py", "_room.py",
    "_readset.py", "_snapshot.py", "_transaction.py",
    "_checkpoint.py", "_layer.py", "_memtable.py", "_reader.py", "_watchsource.py",
)  # fmt: skip
"""What runs in the event loop, where a signal arrives; not what runs in threads."""


# -- programs -----------------------------------------------------------------------


@attrs.define(eq=False)
class Run:
    """One run of a program."""

    witness: Witness
    scope: trio.CancelScope = attrs.Factory(trio.CancelScope)
    """Around everything."""
    victim: trio.CancelScope = attrs.Factory(trio.CancelScope)
    """Around one of the writers."""
    entered: bool = False
    """Whether the log was open."""


async def _three(run: Run, work: Callable[[bytes], Awaitable[None]], *beside: Any) -> None:
    """A victim and two others do the same, with a call beside them."""

    async def one(name: bytes, scope: trio.CancelScope) -> None:
        with scope:
            await work(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, b"victim", run.victim)
        for number in range(2):
            nursery.start_soon(one, b"%d" % number, trio.CancelScope())
        for call in beside:
            nursery.start_soon(run.witness.ask, call)


async def log_program(files: MemoryFiles, run: Run) -> None:
    """Three writers, a full queue, rotations, a reader, segments dropped."""
    options = {**OPTIONS, "flush_interval": 10}
    async with trio_wal.open_wal(LOG, files=files, max_queue_size=3, **options) as wal:
        run.entered = True
        await _three(run, partial(errors.writer, wal, run.witness))
        await run.witness.ask(partial(read_all, wal, wal.last_lsn))
        await run.witness.ask(partial(wal.wait_durable, wal.last_lsn))
        run.witness.promises.begin_drop(5)
        await run.witness.ask(partial(wal.truncate_before, 5))
        await run.witness.write(b"last", [b"last"], partial(wal.append, b"last"))


async def database_program(files: MemoryFiles, run: Run) -> None:
    """Three tasks with transactions that read and write, checkpoints, a backup."""
    async with trio_wal.open_database(
        DB, files=files, checkpoint_bytes=400, retention=KeepAll(), **OPTIONS
    ) as db:
        run.entered = True

        async def work(name: bytes) -> None:
            await errors.transact(db, run.witness, name, errors.markers(name, 3))

        await _three(run, work, db.checkpoint)
        with db.snapshot() as snapshot:
            dict(snapshot.scan())
        await run.witness.ask(partial(db.backup, "/backup"))
        await run.witness.ask(db.checkpoint)


PROGRAMS: Final = {"log": log_program, "database": database_program}


def fresh() -> tuple[MemoryFiles, Run]:
    return MemoryFiles(seed=6), Run(Witness(Injector(HEALTHY, 0, 0)))


def look(files: MemoryFiles, run: Run, program: str) -> None:
    """Open what was left, and hold it against what was said."""
    witness = run.witness
    if run.entered:
        # Leaving the block has drained: what was accepted is there.
        for records in witness.sent.values():
            witness.promises.cover(records)
    for image in (files.crash_image(kind="kill"), files.crash_image(1)):

        async def main(image: MemoryFiles = image) -> None:
            if program == "log":
                async with trio_wal.open_wal(LOG, files=image, **OPTIONS) as wal:
                    witness.examine(wal.first_lsn, await read_all(wal))
                    report = wal.recovery
            else:
                async with trio_wal.open_database(
                    DB, files=image, retention=KeepAll(), **OPTIONS
                ) as db:
                    await witness.examine_database(db)
                    report = db.recovery
            check(report.torn_bytes == 0, f"something torn was left: {report}")
            check(report.clean_shutdown or not run.entered, "the log was not closed in order")

        trio.run(main)


# -- cancelled ----------------------------------------------------------------------


def cancelled(program: str, mode: str, step: int) -> bool:
    """Whether there was such a step."""
    files, run = fresh()
    at_step: AtStep | None = None

    async def main() -> None:
        nonlocal at_step
        with trio.move_on_after(HANG_SECONDS) as patience:
            target = run.scope if mode == "all" else run.victim
            with run.scope, AtStep(step, target.cancel) as at_step:
                await PROGRAMS[program](files, run)
        check(not patience.cancelled_caught, "it hangs")

    seeded_run(main, seed=0)
    assert at_step is not None
    look(files, run, program)
    return at_step.done


# -- interrupted --------------------------------------------------------------------


@functools.cache
def is_traced(code: CodeType) -> bool:
    return code.co_filename.startswith(PACKAGE) and code.co_filename.endswith(TRACED)


class Tracer:
    """Counts the lines of the package that run, and sends a signal at one of them: then there is
    nothing more to count, and nothing is traced any more."""

    def __init__(self, interrupt_at: int = 0) -> None:
        self.count = 0
        self.first: dict[tuple[str, int], int] = {}
        self.last: dict[tuple[str, int], int] = {}
        self._interrupt_at = interrupt_at
        self.done = False

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if is_traced(frame.f_code) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.count += 1
            if self._interrupt_at:
                if self.count == self._interrupt_at:
                    self.done = True
                    sys.settrace(None)
                    signal.raise_signal(signal.SIGINT)
            else:
                place = frame.f_code.co_filename, frame.f_lineno
                self.first.setdefault(place, self.count)
                self.last[place] = self.count
        return self._line


def interrupted(program: str, number: int, tracer: Tracer | None = None) -> bool:
    """Whether there was so many lines."""
    files, run = fresh()
    tracer = Tracer(number) if tracer is None else tracer

    async def main() -> None:
        await PROGRAMS[program](files, run)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        seeded_run(main, seed=0)
        came_out = False
    except BaseException as exc:  # noqa: BLE001, ASYNC103  (what it is, is looked at)
        came_out = True
        sys.settrace(before)
        kinds = set(map(type, _report.leaves(exc)))
        check(kinds == {KeyboardInterrupt}, f"Ctrl-C came out as {_report.described(exc)}")
    finally:
        sys.settrace(before)
        signal.signal(signal.SIGINT, handler)
    check(came_out == tracer.done, "Ctrl-C was swallowed")
    look(files, run, program)
    return tracer.done


@functools.cache
def lines(program: str) -> tuple[int, ...]:
    """When each line ran for the first and for the last time; then every other moment."""
    tracer = Tracer()
    interrupted(program, 0, tracer)
    edges = sorted({*tracer.first.values(), *tracer.last.values()})
    rest = sorted(set(range(1, tracer.count + 1)) - set(edges))
    random.Random(1).shuffle(rest)
    return (*edges, *rest)


# -- out of memory ------------------------------------------------------------------
#
# In a forked child on real files: `_testcapi` fails its n-th allocation, and the parent
# judges what the child has said through a pipe, even where it died of it.  Many of the
# allocations are trio's own, or CPython's, which do not outlive that: a child that is stuck,
# or dies, is a crash like any other, and must have told no lie.

ROUNDS: Final = 6
MANY: Final = 500
"""So many failures in a row nobody overlooks."""
CHILD_SECONDS: Final = 2
"""After so long a child is stuck."""


def memory_usable() -> str:
    """Why this part cannot run here; nothing: it can."""
    if not hasattr(os, "fork"):
        return "this platform cannot fork"
    if importlib.util.find_spec("_testcapi") is None:
        return "this Python comes without _testcapi"
    return ""


async def _memory_program(path: str, tell: Callable[[bytes], object], begin: Any) -> None:
    database = path.endswith("db")
    begin()
    if database:
        async with trio_wal.open_database(path, checkpoint_bytes=300, map_size=1 << 20) as db:
            for n in range(ROUNDS):
                try:
                    async with db.transaction() as tx:
                        before = tx.get(b"count", b"-")
                        tx.put(b"count", b"%d" % n)
                        tx.put(b"before", before)
                    tell(b"%d " % n)
                except MemoryError:
                    pass
    else:
        async with trio_wal.open_wal(path, segment_size=1, flush_interval=0) as wal:
            for n in range(ROUNDS):
                try:
                    if n == 3:
                        await wal.append_many([b"%d" % n, b"%d of" % n])
                    else:
                        await wal.append(b"%d" % n)
                    tell(b"%d " % n)
                except MemoryError:
                    pass


@functools.cache
def _load_all() -> None:
    """Whatever is imported late, so that its allocations are not counted."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("log", "db"):
            trio.run(_memory_program, f"{folder}/{name}", lambda said: None, lambda: None)


def starved(program: str, number: int, burst: int) -> str:
    """What became of a child whose allocations from the n-th on fail, so many of them."""
    testcapi: Any = importlib.import_module("_testcapi")
    _load_all()
    read_end, write_end = os.pipe()
    where = _report.fast_folder()
    with tempfile.TemporaryDirectory(dir=where, ignore_cleanup_errors=True) as folder:
        path = f"{folder}/{'db' if program == 'database' else 'log'}"
        child = os.fork()
        if child == 0:
            _in_child(testcapi, path, write_end, number, burst)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            said = pipe.read().split()
        _, status = os.waitpid(child, 0)
        outcome = _outcome(status)
        _judge_child(path, [int(n) for n in said])
        return f"{outcome}, all said" if len(said) == ROUNDS else outcome


def _in_child(testcapi: Any, path: str, pipe: int, number: int, burst: int) -> None:
    code = 70
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CHILD_SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)

        def begin() -> None:
            testcapi.set_nomemory(number, number + burst)

        program = partial(_memory_program, path, partial(os.write, pipe), begin)
        try:
            trio.run(program)
            code = 0
        except BaseException as exc:  # noqa: BLE001, ASYNC103  (the exit code tells what it was)
            testcapi.remove_mem_hooks()
            kinds = set(map(type, _report.leaves(exc)))
            named = (MemoryError, trio_wal.WalError, OSError)
            code = 1 if all(issubclass(kind, named) for kind in kinds) else 2
        testcapi.remove_mem_hooks()
    finally:
        os._exit(code)


def _outcome(status: int) -> str:
    if os.WIFSIGNALED(status):
        return "stuck" if os.WTERMSIG(status) == signal.SIGALRM else "died"
    return {0: "went on", 1: "raised"}.get(os.WEXITSTATUS(status), "raised another error")


def _judge_child(path: str, acknowledged: list[int]) -> None:
    async def main() -> None:
        if path.endswith("db"):
            async with trio_wal.open_database(path, map_size=1 << 20) as db:
                state = dict(db.scan())
            shown = int(state.get(b"count", b"-1"))
            check(shown >= max(acknowledged, default=-1), f"{acknowledged} became {state}")
            check(len(state) in (0, 2), f"half a transaction: {state}")
        else:
            async with trio_wal.open_wal(path) as wal:
                found = list((await read_all(wal)).values())
            for n in acknowledged:
                check(b"%d" % n in found, f"{n} was acknowledged, there is {found}")
            check((b"3" in found) == (b"3 of" in found), f"half a unit: {found}")
            check(found == sorted(found) and len(set(found)) == len(found), f"order: {found}")

    trio.run(main)


@functools.cache
def allocations(program: str) -> int:
    """About how many there are: from there on nothing is felt any more."""
    low, high = 1, 1 << 22
    while high - low > MANY:
        middle = (low + high) // 2
        try:
            felt = starved(program, middle, MANY) != "went on, all said"
        except Wrong:
            felt = True  # told by the cases themselves
        low, high = (middle, high) if felt else (low, middle)
    return high


# -- the campaign -------------------------------------------------------------------


@attrs.frozen
class Task:
    part: str
    program: str
    mode: str
    cases: range
    """Steps, places among `lines`, or allocations."""


def run_case(part: str, program: str, mode: str, case: int) -> str:
    """What came of it; nothing: there is no such case."""
    with limited_time(CASE_SECONDS):
        if part == "cancel":
            return "cancelled" if cancelled(program, mode, case) else ""
        if part == "memory":
            outcome = starved(program, case, int(mode))
            return outcome if case < allocations(program) else ""
        moments = lines(program)
        if case >= len(moments):
            return ""
        return "interrupted" if interrupted(program, moments[case]) else ""


def run_task(task: Task) -> _report.Answer:
    counts: Counter[str] = Counter()
    failures: list[tuple[object, str]] = []
    row = (task.part, task.program, task.mode)
    for case in task.cases:
        outcome = ""

        def run(case: int = case) -> None:
            nonlocal outcome
            outcome = run_case(task.part, task.program, task.mode, case)

        if found := _report.found_in(run):
            failures.append((":".join((*row, str(case))), f"{', '.join(row)}: {found}"))
            outcome = "FOUND"
        if not outcome:
            break
        counts[outcome] += 1
    return _report.Answer(1, f"{task.part}: {task.program}", {row: counts}, failures)


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    stride, seed = arguments.stride, arguments.seed
    found: list[list[Task]] = []
    for part in arguments.parts or PARTS:
        for program in PROGRAMS:
            if part == "cancel":
                rows = [(mode, STEPS) for mode in ("all", "one")]
            elif part == "ctrl-c":
                rows = [("", len(lines(program)))]
            elif memory_usable():
                rows = []
            else:
                rows = [(burst, allocations(program)) for burst in ("1", "50")]
            for mode, count in rows:
                step = stride * (ALLOCATIONS_STRIDE if part == "memory" else 1)
                cases = range(seed % step, count, step)
                # A child that is stuck takes its seconds.
                size = 5 if part == "memory" else CHUNK
                starts = list(range(0, len(cases), size))
                if part == "memory":
                    random.Random(seed).shuffle(starts)
                found.append(
                    [Task(part, program, mode, cases[start : start + size]) for start in starts]
                )
    # Where the time is too short for all of them, some of each row are done.
    return [task for turn in zip_longest(*found) for task in turn if task is not None]


ALLOCATIONS_STRIDE: Final = 5
"""Neighbours among the allocations mostly belong to one call."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stride", type=int, default=1, metavar="N", help="every N-th moment only (%(default)s)"
    )
    parser.add_argument("--replay", metavar="PART:PROGRAM:MODE:CASE", help="one case again")
    _report.add_common_arguments(parser, parts=PARTS)


def run(arguments: argparse.Namespace) -> int:
    columns = {"part": "part", "program": "program", "mode": "mode", "cases": "cases"}
    report = _report.Report(
        "interrupts", arguments, columns | {"came": "what came of it", "found": "FOUND"}
    )
    todo = tasks_of(arguments)
    rows, seconds = _report.collect(report, run_task, todo, len(todo))
    for (part, program, mode), row in sorted(rows.items()):
        came = ", ".join(f"{name} {n:,}" for name, n in sorted(row.items()) if name != "FOUND")
        report.add(
            part=part,
            program=program,
            mode=mode,
            cases=row.total(),
            came=came,
            found=row["FOUND"],
        )
    total = sum(row.total() for row in rows.values())
    report.note(f"{total:,} interruptions, {_report.per_minute(total, seconds):,} a minute")
    if "memory" in (arguments.parts or PARTS) and (why := memory_usable()):
        report.note(f"memory: not run: {why}")
    return report.finish()


def replay(text: str) -> int:
    part, program, mode, case = text.split(":")
    answer = run_task(Task(part, program, mode, range(int(case), int(case) + 1)))
    told = [what for _, what in answer.failures] or [*answer.rows[part, program, mode]]
    print("\n".join(told) or "there is no such case")
    return 1 if answer.failures else 0
