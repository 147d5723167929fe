"""Every schedule of commits, a checkpoint and the recycling of the log, up to a bound.

trio's scheduler is taken over: whenever several tasks could run, one of them does, and
which one is enumerated, not drawn.  The default is the task that became runnable first;
taking the n-th after it costs n.  All schedules up to a cost are run ("delay bounding":
Emmi, Qadeer, Rakamaric 2011), one level of cost after the other, so a campaign ends with
"all schedules up to cost d", and how many those were.

Checked in each: what was read and written is serializable in the order of LSNs; a segment
goes only when the store holds what is in it; the store is the state of its LSN; and a crash
at one moment, another in every schedule, loses nothing acknowledged.
"""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import attrs
import trio

import trio_wal
from trio_wal._disk.frame import segment_name_lsn
from trio_wal.testing import MemoryFiles

from ._images import DB, Recovered, fingerprint, recover_database, replayed
from ._promises import State, Wrong, apply, check_serial
from ._report import Report, add_common_arguments, in_processes, progress_bar
from ._simulator import ENDS, VIRTUAL_SECONDS_MAX, Result, controlled_run, seeded_run, until_found

SHARE = 300
"""Schedules of one task for a worker process: about a second."""
SETTLE_STEPS = 6

COLUMNS = {
    "workload": "program",
    "cost": "all up to",
    "points": "schedules",
    "images": "distinct images",
    "choices": "choices",
    **ENDS,
}


class Scheduler:
    """In the place of trio's random numbers: lets one runnable task run at a time."""

    def __init__(self) -> None:
        self.begin(b"")

    def begin(self, choices: bytes) -> None:
        """Another schedule: not yet of what opens its database."""
        self._choices = choices
        self.active = False
        self.options: list[int] = []
        """How many tasks could run, at each moment where it was more than one."""
        self._queue: list[Any] = []

    def shuffle(self, batch: list[Any]) -> None:
        if not self.active or len(batch) < 2:
            return
        waiting = [task for task in self._queue if task in batch]
        self._queue = waiting + [task for task in batch if task not in waiting]
        place = len(self.options)
        chosen = self._choices[place] if place < len(self._choices) else 0
        self.options.append(len(batch))
        task = self._queue.pop(chosen)
        runner = trio._core._run.GLOBAL_RUN_CONTEXT.runner
        # The others stay runnable, and the loop comes back at once.
        runner.runq.extend(self._queue)
        batch[:] = [task]


# -- the programs -------------------------------------------------------------------


@attrs.define(eq=False)
class Transacted:
    """A transaction: what it read and wrote, and its LSN once that is known."""

    reads: dict[bytes, bytes | None] = attrs.Factory(dict)
    writes: dict[bytes, bytes | None] = attrs.Factory(dict)
    lsn: int = 0
    conflict: bool = False


@attrs.define(eq=False)
class Schedule:
    """One run of a program under one schedule, and what it showed."""

    files: MemoryFiles
    first: list[State]
    """State after each LSN that was there before."""
    crash_at: int = 0
    transactions: list[Transacted] = attrs.Factory(list)
    snapshots: list[tuple[int, State]] = attrs.Factory(list)
    stores: list[tuple[int, State]] = attrs.Factory(list)
    problems: list[Wrong] = attrs.Factory(list)
    image: MemoryFiles | None = None
    print_of_image: int = 0
    must: int = 0
    """The newest LSN acknowledged when the image was made."""
    acknowledged: int = 0
    operations: int = 0
    recovered: dict[int, Recovered] = attrs.Factory(dict)
    """What was found in images, by fingerprint, of this and of other schedules: most leave
    the same few."""

    def after_operation(self, operation: str, path: str) -> None:
        self.operations += 1
        state = self.files.inspect_store(f"{DB}/store")
        if operation == "store":
            assert state is not None
            self.stores.append((state.lsn, dict(self.files._stores[f"{DB}/store"].items)))
        elif operation in ("rename", "unlink"):
            firsts = [segment_name_lsn(name) for name in self.files.names(f"{DB}/log")]
            first = min(lsn for lsn in firsts if lsn is not None)
            held = 0 if state is None else state.lsn
            if first > held + 1:
                told = f"{operation} {path}: the log starts at {first}, the store holds {held}"
                self.problems.append(Wrong("lost", told))
        if self.operations == self.crash_at:
            kind: Any = "kill" if self.crash_at % 3 == 0 else "power"
            self.image = self.files.crash_image(self.crash_at, kind)
            self.print_of_image = fingerprint(self.image)  # as it is: it is recovered later
            self.must = self.acknowledged

    async def transact(self, db: Any, body: Callable[[Any, Transacted], Awaitable[None]]) -> None:
        done = Transacted()
        self.transactions.append(done)
        try:
            async with db.transaction() as tx:
                await body(tx, done)
                for key, value in done.writes.items():
                    tx.put(key, value)
        except trio_wal.TransactionConflict:
            done.conflict = True
            return
        done.lsn = tx.lsn
        self.acknowledged = max(self.acknowledged, done.lsn)

    # -- pieces of programs --

    async def increment(self, db: Any, key: bytes, other: bytes) -> None:
        """Read two keys, with a checkpoint between; write one of them."""

        async def body(tx: Any, done: Transacted) -> None:
            value = done.reads[key] = tx.get(key)
            await trio.lowlevel.checkpoint()
            done.reads[other] = tx.get(other)
            done.writes[key] = value + b"+" + (done.reads[other] or b"")[-20:]

        await self.transact(db, body)

    async def overwrite(self, db: Any, key: bytes, value: bytes) -> None:
        """Write without reading."""

        async def body(tx: Any, done: Transacted) -> None:
            done.writes[key] = value

        await self.transact(db, body)

    async def checkpoint(self, db: Any) -> None:
        lsn = await db.checkpoint()
        state = self.files.inspect_store(f"{DB}/store")
        if state is None or state.lsn < lsn:
            self.problems.append(Wrong("lost", f"checkpoint returned {lsn}, the store: {state}"))

    async def snapshot(self, db: Any) -> None:
        with db.snapshot() as snap:
            before = dict(snap.scan())
            await trio.lowlevel.checkpoint()
            self.snapshots += [(snap.lsn, before), (snap.lsn, dict(snap.scan()))]

    # -- afterwards --

    def check(self) -> None:
        if self.problems:
            raise self.problems[0]
        states = [dict(state) for state in self.first]
        for done in sorted((t for t in self.transactions if t.lsn), key=lambda t: t.lsn):
            if done.lsn != len(states):
                raise Wrong("other", f"LSN {done.lsn} after {len(states) - 1}")
            before = states[-1]
            check_serial(done.lsn, before, done.reads)
            after = dict(before)
            apply(after, done.writes)
            states.append(after)
        for lsn, state in (*self.stores, *self.snapshots):
            if states[lsn] != state:
                raise Wrong("partial", f"a store or a snapshot is not the state of LSN {lsn}")
        last = self.files.crash_image(self.crash_at, "power")
        for image, must in ((self.image, self.must), (last, len(states) - 1)):
            if image is None:
                continue
            found = self._recover(image)
            lsn = found.log.last_lsn
            if not must <= lsn < len(states):
                raise Wrong("lost", f"recovered LSN {lsn}, acknowledged was {must}")
            if replayed(found) != states[lsn]:
                raise Wrong("partial", f"recovered is not the state of LSN {lsn}")

    def _recover(self, image: MemoryFiles) -> Recovered:
        name = fingerprint(image)
        found = self.recovered.get(name)
        if found is None:
            found = self.recovered[name] = recover_database(image, segment_size=1)
        return found


Program = Callable[[Schedule, Any, trio.Nursery], None]


def _commit_checkpoint(run: Schedule, db: Any, nursery: trio.Nursery) -> None:
    nursery.start_soon(run.increment, db, b"a", b"b")
    nursery.start_soon(run.checkpoint, db)


def _two_commits_checkpoint(run: Schedule, db: Any, nursery: trio.Nursery) -> None:
    nursery.start_soon(run.increment, db, b"a", b"b")
    nursery.start_soon(run.increment, db, b"b", b"a")
    nursery.start_soon(run.checkpoint, db)


def _checkpoints_commits(run: Schedule, db: Any, nursery: trio.Nursery) -> None:
    async def twice() -> None:
        await run.overwrite(db, b"a", bytes(600))
        await run.overwrite(db, b"c", bytes(600))

    nursery.start_soon(twice)
    nursery.start_soon(run.checkpoint, db)
    nursery.start_soon(run.checkpoint, db)


def _snapshot_checkpoint(run: Schedule, db: Any, nursery: trio.Nursery) -> None:
    nursery.start_soon(run.increment, db, b"a", b"b")
    nursery.start_soon(run.snapshot, db)
    nursery.start_soon(run.checkpoint, db)


PROGRAMS: dict[str, Program] = {
    "commit x checkpoint x recycle": _commit_checkpoint,
    "two commits x checkpoint x recycle": _two_commits_checkpoint,
    "commits x two checkpoints x recycle": _checkpoints_commits,
    "commit x snapshot x checkpoint": _snapshot_checkpoint,
}
COSTS = {
    "commit x checkpoint x recycle": 60,
    "two commits x checkpoint x recycle": 7,
    "commits x two checkpoints x recycle": 6,
    "commit x snapshot x checkpoint": 7,
}
"""Bounds: the first is out of reach, so all there are; the others' frontiers fit into memory."""
OPTIONS: dict[str, Any] = {"segment_size": 1, "flush_interval": 0, "checkpoint_bytes": 1 << 20}


@attrs.frozen
class Prepared:
    """The database that every schedule starts from."""

    files: MemoryFiles
    states: list[State]


def prepare() -> Prepared:
    """Two segments, nothing of them in the store yet."""
    files = MemoryFiles(seed=1)
    states: list[State] = [{}]

    async def main() -> None:
        async with trio_wal.open_database(DB, files=files, **OPTIONS) as db:
            for key in (b"a", b"b", b"a"):
                await db.put(key, key * 300)
                states.append({**states[-1], key: key * 300})

    seeded_run(main, seed=1)
    return Prepared(files, states)


async def run_schedule(
    program: str,
    prepared: Prepared,
    choices: bytes,
    scheduler: Scheduler,
    recovered: dict[int, Recovered],
) -> Schedule:
    """One schedule: at the n-th moment where several tasks could run, the one that
    ``choices[n]`` says, counted from the default.

    Raises:
      Wrong, or what the program raised.
    """
    scheduler.begin(choices)
    files = prepared.files.crash_image(kind="kill")
    # Every schedule begins at the same time.
    files.clock_offset_us = -int(trio.current_time() * 1e6)
    crash_at = 1 + sum(place * 7 + choice for place, choice in enumerate(choices)) % 40
    run = Schedule(files, prepared.states, crash_at, recovered=recovered)
    run.acknowledged = run.must = len(prepared.states) - 1
    async with trio_wal.open_database(DB, files=files, **OPTIONS) as db:
        files.after_operation = run.after_operation
        with trio.fail_after(VIRTUAL_SECONDS_MAX):
            async with trio.open_nursery() as nursery:
                scheduler.active = True
                PROGRAMS[program](run, db, nursery)
        # What the checkpoint set off goes on for a while.
        for _ in range(SETTLE_STEPS):
            await trio.lowlevel.checkpoint()
        scheduler.active = False
    files.after_operation = None
    run.check()
    return run


# -- enumerating --------------------------------------------------------------------

Frontier = dict[int, list[bytes]]
"""Schedules still to run, by cost; each as its choices up to the last that costs."""


def children(choices: bytes, options: Sequence[int], cost_max: int) -> Iterator[tuple[int, bytes]]:
    """(cost, choices) of the schedules that differ from this one behind its last choice.

    Every schedule but the default has just one parent: itself without its last choice.
    """
    cost = sum(choices)
    for place in range(len(choices), len(options)):
        start = choices.ljust(place, b"\0")
        for choice in range(1, min(options[place] - 1, cost_max - cost) + 1):
            yield cost + choice, start + bytes((choice,))


@attrs.define
class Explored:
    """Some schedules of one program, run, and those that follow from them."""

    result: Result
    frontier: Frontier = attrs.Factory(dict)
    choices: int = 0
    images: set[int] = attrs.Factory(set)


def explore(
    program: str, schedules: Sequence[bytes], cost_max: int, prepared: Prepared | None = None
) -> Explored:
    """One run of trio for all of them: to begin one costs as much as a schedule's half."""
    scheduler = Scheduler()
    return controlled_run(  # type: ignore[no-any-return]
        scheduler, _explore, program, schedules, cost_max, prepared or prepare(), scheduler
    )


async def _explore(
    program: str,
    schedules: Sequence[bytes],
    cost_max: int,
    prepared: Prepared,
    scheduler: Scheduler,
) -> Explored:
    recovered: dict[int, Recovered] = {}
    result = Result(program)
    explored = Explored(result)
    for choices in schedules:
        result.points += 1
        try:
            run = await run_schedule(program, prepared, choices, scheduler, recovered)
        except Exception as exc:  # noqa: BLE001  (whatever it is, it is a finding)
            case = f"{list(PROGRAMS).index(program)}:{'.'.join(map(str, choices or [0]))}"
            told = f"{program}, choices {list(choices)}"
            result.fail(exc, told, "schedules", case)
            return explored
        options = scheduler.options
        explored.choices = max(explored.choices, len(options))
        if run.image is not None:
            explored.images.add(run.print_of_image)
        for cost, child in children(choices, options, cost_max):
            explored.frontier.setdefault(cost, []).append(child)
    return explored


Task = tuple[str, list[bytes], int]


def explore_task(task: Task) -> Explored:
    return explore(*task)


@attrs.define(eq=False)
class Enumeration:
    """All schedules of one program, cheapest first."""

    program: str
    cost_max: int
    frontier: Frontier = attrs.Factory(lambda: {0: [b""]})
    result: Result = attrs.Factory(Result)
    cost: int = 0
    """Of the schedules being run."""
    running: int = 0
    choices: int = 0
    images: set[int] = attrs.Factory(set)

    def next_task(self, share: int = SHARE) -> Task | None:
        """None: nothing can be begun before something running is back, or at all."""
        ready = self.frontier.get(self.cost)
        if not ready:
            if self.running or not self.frontier:
                return None
            self.frontier.pop(self.cost, None)
            self.cost = min(self.frontier, default=self.cost_max)
            if not self.frontier:
                return None
            ready = self.frontier[self.cost]
        task = self.program, ready[-share:], self.cost_max
        del ready[-share:]
        self.running += 1
        return task

    def done(self, part: Explored) -> None:
        self.running -= 1
        for cost, schedules in part.frontier.items():
            self.frontier.setdefault(cost, []).extend(schedules)
        self.result.add(part.result)
        self.choices = max(self.choices, part.choices)
        self.images |= part.images
        self.result.images = len(self.images)

    @property
    def complete(self) -> str:
        """Up to where every schedule was run."""
        if not self.running and not any(self.frontier.values()):
            last = f"cost {self.cost_max}"
            return "all there are" if self.result_is_everything else last
        return f"cost {self.cost - 1}" if self.cost else ""

    @property
    def result_is_everything(self) -> bool:
        """Whether the bound was never met: no schedule costs so much."""
        return self.cost < self.cost_max


def enumerations(cost_max: int | None) -> list[Enumeration]:
    return [
        Enumeration(name, cost if cost_max is None else min(cost, cost_max), result=Result(name))
        for name, cost in COSTS.items()
    ]


def run_schedules(seed: int, *, seconds: float | None = None, points: int | None = None) -> Result:
    """All programs, cheapest schedules first; ``seed`` is not needed: nothing is random."""
    prepared = prepare()
    total = Result("schedules")

    def parts() -> Iterator[Result]:
        programs = enumerations(None)
        while True:
            # The one that is least far: none is left behind.
            ordered = sorted(programs, key=lambda e: e.cost)
            tasks = ((enumeration, enumeration.next_task(20)) for enumeration in ordered)
            enumeration, task = next((one for one in tasks if one[1] is not None), (None, None))
            if enumeration is None or task is None:
                return
            part = explore(*task, prepared=prepared)
            enumeration.done(part)
            total.images += len(part.images)
            yield part.result

    return until_found(total, parts(), seconds, points)


# -- the campaign -------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, minutes=1)
    parser.add_argument("--cost", type=int, help="bound of the costs (each program's own)")
    parser.add_argument("--program", choices=range(len(PROGRAMS)), type=int, help="this one only")
    parser.add_argument("--replay", metavar="PROGRAM:CHOICES", help="one schedule again")


def run(arguments: argparse.Namespace) -> int:
    report = Report("schedules", arguments, COLUMNS)
    programs = {e.program: e for e in enumerations(arguments.cost)}
    if arguments.program is not None:
        only = list(PROGRAMS)[arguments.program]
        programs = {only: programs[only]}
    with progress_bar("schedules", minutes=arguments.minutes, count=arguments.count) as bar:

        def over() -> bool:
            return bar.over() or bool(report.findings)

        def tasks() -> Iterator[Task | None]:
            while True:
                ordered = sorted(programs.values(), key=lambda e: e.cost)
                found = (e.next_task() for e in ordered)
                task = next((task for task in found if task is not None), None)
                if task is None and not any(e.running for e in ordered):
                    return
                yield task

        for part in in_processes(explore_task, tasks(), arguments.workers, over):
            enumeration = programs[part.result.workload]
            enumeration.done(part)
            if part.result.first_failure is not None:
                report.find(part.result.first_failure.what, part.result.first_failure.replay)
            note = f"{bar.done + part.result.points:,} schedules, of cost {enumeration.cost}"
            bar.advance(part.result.points, note)
        seconds = bar.seconds
    total = Result("all")
    for enumeration in programs.values():
        total.add(enumeration.result)
    rows = [(e.result, e.complete, e.choices) for e in programs.values()]
    for row, complete, choices in (*rows, (total, None, None)):
        figures = row.figures(seconds if row is total else None)
        report.add(**figures, cost=complete, choices=choices)
    return report.finish()


def replay(case: str) -> int:
    number, _, steps = case.partition(":")
    program = list(PROGRAMS)[int(number)]
    choices = bytes(map(int, steps.split(".")))
    return explore(program, [choices], 0).result.report_to(Report("schedules", None, {}))
