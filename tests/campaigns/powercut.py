"""Power cuts under the real program on real file systems (Linux, as root).

A disk of our own (FUSE and a loop device) records every write and barrier while the program
works on ext4, xfs or btrfs on it. Then the disk is made again as a power cut at any write may
have left it; the file system's own recovery mounts it, trio-wal opens what is there, and what
was acknowledged by then must be in it. ``--count`` is of cuts.

Parts: ``cuts``; ``faults``: the disk answers one write or barrier with an error, so that a later
sync says that all is well.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import pickle
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import attrs
import trio

from . import _lives, _mounts, _program
from ._blockstore import BlockStore, Fault, Recording
from ._cuts import Cut, Cutter, Piece, choose
from ._ledger import Ledger, new_ledger
from ._lives import FINDINGS_MAX
from ._mounts import FILE_SYSTEMS, FileSystem, Loop
from ._program import InlineFiles, Job
from ._promises import LOST
from ._report import (
    Report,
    add_common_arguments,
    bound,
    fail_usage,
    fast_folder,
    in_processes,
    per_minute,
    progress_bar,
    replay_command,
)

PARTS = ("cuts", "faults")
KINDS = ("log", "database")
CUTS = 120
"""Of one recording."""
GENERATIONS = 2
"""Recordings in a row: each next one begins with a disk that a cut of the one before left."""
LIVES = 3
"""Of the program in one recording."""
DEEP = 4
"""After one of so many cuts the program goes on, and what it then writes must be there too."""
TASKS = 4
OPERATIONS = 14
EXIT_CODES = (0, -signal.SIGKILL)
"""How a life may end where the disk takes everything."""
STEPS = 250
"""About so many steps has the event loop in a life."""
DAMAGED = (errno.EBADMSG, errno.EUCLEAN)
"""What a file system answers when it finds its own structures damaged."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, count=12_000, parts=PARTS)
    parser.add_argument(
        "--systems", default=",".join(FILE_SYSTEMS), help="file systems (%(default)s)"
    )
    parser.add_argument("--cuts", type=int, default=CUTS, help="of one recording (%(default)s)")
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("powercut-failures"),
        help="for failing cases (%(default)s)",
    )
    parser.add_argument("--replay", metavar="FILE:PLACE:DAMAGE", help="make a kept cut again")


@attrs.frozen
class Task:
    """A disk, its recordings and their cuts."""

    part: str
    system: str
    kind: str
    seed: int
    cuts: int
    """Of each recording."""
    folder: str
    keep: str


@attrs.define
class Found:
    """Something wrong after one cut."""

    what: str
    lost: bool
    cut: Cut
    file: str


@attrs.define
class Outcome:
    task: Task
    recordings: int = 0
    writes: int = 0
    barriers: int = 0
    cuts: int = 0
    opening: int = 0
    """Of the cuts: while the program opened what an earlier cut, or the end of a process,
    had left."""
    distinct: int = 0
    torn: int = 0
    """Openings that cut an unfinished batch."""
    unmountable: int = 0
    """Disks that the file system itself did not mount, or found damaged; in no other figure."""
    false_syncs: int = 0
    """Losses after a sync that the file system called successful without a barrier."""
    acknowledged: int = 0
    failed: int = 0
    """Requests that the disk answered with an error."""
    told: int = 0
    """Recordings in which trio-wal said that the log had failed."""
    forgotten: int = 0
    """... and in which a second sync then said that all was well."""
    retaken: int = 0
    """... and in which the log was opened again at once, on the same mount."""
    errors: Counter[str] = attrs.Factory(Counter)
    found: list[Found] = attrs.Factory(list)

    def add(self, other: Outcome) -> None:
        for name in FIGURES:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors += other.errors
        self.found += other.found


FIGURES = (
    *("recordings", "writes", "barriers", "cuts", "distinct", "opening", "torn"),
    *("unmountable", "acknowledged", "failed", "told", "forgotten", "retaken", "false_syncs"),
)


# -- the campaign ----------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    systems = arguments.systems.split(",")
    if unknown := set(systems) - set(FILE_SYSTEMS):
        return fail_usage(f"--systems {', '.join(sorted(unknown))}: not known")
    reason = _mounts.why_not((), fuse=True)
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    missing = {name: why for name in systems if (why := _mounts.why_not([name]))}
    for name, why in missing.items():
        print(f"skipped on {name}: {why}")
    systems = [name for name in systems if name not in missing]
    if not systems:
        return 0
    return _run(arguments, systems)


def _run(arguments: argparse.Namespace, systems: list[str]) -> int:
    parts = arguments.parts or list(PARTS)
    report = Report("powercut", arguments, COLUMNS)
    totals: dict[tuple[str, str, str], Outcome] = {}
    cuts = 0
    with (
        _lives.scratch("powercut", fast_folder()) as folder,
        progress_bar("powercut", minutes=arguments.minutes, count=arguments.count) as bar,
    ):
        tasks = _tasks(arguments, parts, systems, folder)
        for outcome in in_processes(disk_of, tasks, arguments.workers, bar.over):
            task = outcome.task
            key = (task.part, task.system, task.kind)
            totals.setdefault(key, Outcome(task)).add(outcome)
            for found in outcome.found:
                place = f"{found.file}:{found.cut.place}:{found.cut.damage}"
                report.find(
                    f"{task.part} {task.system} {task.kind} {task.seed}, "
                    f"cut {outcome.cuts} of its disk: {found.what.splitlines()[0]}",
                    replay_command("powercut", "--replay", place),
                )
            cuts += outcome.cuts
            bar.advance(outcome.cuts, f"{cuts:,} cuts")
            if len(report.findings) >= FINDINGS_MAX:
                break
        seconds = bar.seconds
    for key in sorted(totals):
        _add_row(report, totals[key], seconds)
    _add_sum(report, totals, cuts, seconds)
    return report.finish()


COLUMNS = {
    "part": "part",
    "system": "on",
    "kind": "of a",
    "recordings": "recordings",
    "writes": "writes",
    "barriers": "barriers",
    "cuts": "cuts",
    "distinct": "distinct",
    "opening": "opening",
    "torn": "torn",
    "lost": "lost",
    "other": "other",
    "bound": "bound",
}


def _add_row(report: Report, total: Outcome, seconds: float) -> None:
    task = total.task
    lost = sum(found.lost for found in total.found)
    report.add(
        part=task.part,
        system=task.system,
        kind=task.kind,
        **{name: getattr(total, name) for name in FIGURES},
        errors=dict(total.errors),
        lost=lost,
        other=len(total.found) - lost,
        bound=bound(total.cuts),
    )


def _add_sum(
    report: Report, totals: dict[tuple[str, str, str], Outcome], cuts: int, seconds: float
) -> None:
    if unmountable := sum(total.unmountable for total in totals.values()):
        report.note(f"{unmountable} disks were not mounted by the file system: in no figure")
    for (_, system, kind), total in sorted(totals.items()):
        if total.false_syncs:
            report.note(
                f"{system}, {kind}: {total.false_syncs} losses are the file system's own: after an "
                "error it said of a sync that it had succeeded, and had sent no barrier"
            )
    for (part, system, kind), total in sorted(totals.items()):
        if part == "faults":
            report.note(
                f"{system}, {kind}: {total.failed} requests failed in {total.recordings} "
                f"recordings; the log said so in {total.told}; a second sync then said ok in "
                f"{total.forgotten}; opened again on the same mount in {total.retaken}"
            )
    report.note(
        f"{cuts:,} cuts, {per_minute(cuts, seconds):,} a minute; "
        f"no loss in so many: at most {bound(cuts)} of all cuts lose, at 95 %"
    )


def _tasks(
    arguments: argparse.Namespace, parts: list[str], systems: list[str], folder: str
) -> Iterator[Task]:
    """Every part, file system and kind in turn; plain cuts three times as often as faults."""
    turns = [part for part in parts for _ in range(3 if part == "cuts" else 1)]
    combinations = [(part, system, kind) for part in turns for kind in KINDS for system in systems]
    keep = str(arguments.keep.absolute())
    for number in count():
        part, system, kind = combinations[number % len(combinations)]
        seed = arguments.seed * 1_000_003 + number
        yield Task(part, system, kind, seed, arguments.cuts, folder, keep)


# -- one disk --------------------------------------------------------------------------


def disk_of(task: Task) -> Outcome:
    """Record, cut, and go on from one of the cuts."""
    _program.end_with_campaign()
    _mounts.enter_private_namespace()
    system = FILE_SYSTEMS[task.system]
    rng = Random(task.seed)
    options = _lives.options(task.kind, rng)
    outcome = Outcome(task)
    with tempfile.TemporaryDirectory(dir=task.folder) as folder:
        _mounts.make(system, f"{folder}/image")
        base = Path(folder, "image").read_bytes()
        ledger = new_ledger(task.kind, task.seed, power=True)
        for generation in range(GENERATIONS):
            disk = Disk(system, Path(folder))
            jobs = _jobs(task, generation, disk.place, options, rng)
            fault = _fault(jobs, rng) if task.part == "faults" else None
            recording, codes = disk.record(base, jobs, fault, rng)
            outcome.recordings += 1
            outcome.writes += sum(entry is not None for entry in recording.writes)
            outcome.barriers += sum(entry is None for entry in recording.writes)
            case = Case(task.kind, task.seed, jobs[-1].life + 1, options, recording, ledger)
            base, ledger = _cut(outcome, disk, case, rng)
            _count_faults(outcome, case, codes)
            allowed = (*EXIT_CODES, _program.FAILED) if fault is not None else EXIT_CODES
            strange = [code for code in codes if code not in allowed]
            if strange and not outcome.found:
                last = Cut(len(recording.writes), 0)
                text = f"the program ended with {strange}"
                outcome.found.append(Found(text, False, last, _keep(outcome, case, "running")))
            if outcome.found:
                break
    return outcome


def _jobs(
    task: Task, generation: int, place: str, options: dict[str, Any], rng: Random
) -> list[Job]:
    jobs: list[Job] = []
    faulty = task.part == "faults"
    large = faulty and task.kind == "log" and rng.random() < 0.5
    stranger = faulty and rng.random() < 0.4
    for number in range(LIVES):
        job = Job(
            kind=task.kind,
            path=place,
            seed=task.seed,
            life=generation * LIVES + number,
            tasks=TASKS,
            operations=rng.randint(OPERATIONS // 2, OPERATIONS),
            ending=rng.choice(("close", "exit", "kill")),
            kill_at=rng.randint(1, STEPS),
            options=options,
            faulty=faulty,
            stranger=stranger,
        )
        if large:
            # One at a time: the frames are then as long as that is about.
            large_options = {**options, "segment_size": 256 * _mounts.KIB, "durability": "sync"}
            job = attrs.evolve(
                job, tasks=1, large=True, cuts=False, operations=9, options=large_options
            )
        if faulty and number == 0:
            # The fault must be met, and told.
            poison = None if large else rng.randrange(job.operations // 2)
            job = attrs.evolve(job, ending="close", poison=poison)
        jobs.append(job)
    return jobs


def _fault(jobs: list[Job], rng: Random) -> Fault:
    """An error for the write of a chosen record, or for any request of the first life."""
    until = json.dumps(["life", jobs[1].life])
    if jobs[0].stranger:
        # Most likely one of the journal, of which the stranger is told.
        return Fault(None, until, after=rng.randrange(120))
    if jobs[0].large:
        if rng.random() < 0.5:
            return Fault(None, until, after=rng.randrange(3), since='["closing"]')
        return Fault(None, until, after=rng.randrange(70))
    if rng.random() < 0.6:
        return Fault(_program.POISON, until, after=rng.choice((0, 0, 0, 1)))
    return Fault(
        None,
        until,
        after=rng.randrange(120),
        kind=rng.choice(("write", "barrier")),
        count=rng.choice((1, 1, 3)),
    )


@attrs.frozen(eq=False)
class Case:
    """A recording and what is needed to judge a cut of it; kept when one is bad."""

    kind: str
    seed: int
    life: int
    """The number of a life that opens what a cut left."""
    options: dict[str, Any]
    recording: Recording
    ledger: Ledger
    """Of what was before the recording."""

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        recording = attrs.astuple(self.recording, recurse=False)
        with open(path, "wb") as file:
            pickle.dump(
                (self.kind, self.seed, self.life, self.options, recording, self.ledger), file
            )

    @classmethod
    def load(cls, path: Path) -> Case:
        with open(path, "rb") as file:
            kind, seed, life, options, recording, ledger = pickle.load(file)  # our own file
        return cls(kind, seed, life, options, Recording(*recording), ledger)


def _cut(outcome: Outcome, disk: Disk, case: Case, rng: Random) -> tuple[bytes, Ledger]:
    """All cuts of a recording; gives the disk and the ledger of one of them."""
    recording = case.recording
    count = outcome.task.cuts
    cuts = choose(recording, count, rng)
    chosen = rng.randrange(count)
    going_on: tuple[bytes, Ledger] | None = None
    cutter = Cutter(recording, disk.system.whole)
    judge = Judge(case)
    seen: set[bytes] = set()
    with disk.image() as image:
        for number, cut in enumerate(cuts):
            pieces = cutter.advance(cut)
            ledger = judge.at(cut.place)
            image.write(cutter.durable, pieces)
            try:
                problems, torn = look(case, ledger, image, deep=number % DEEP == 0)
            except Unmountable:
                outcome.unmountable += 1
                continue
            seen.add(cutter.fingerprint(pieces))
            outcome.cuts += 1
            outcome.opening += judge.opening
            outcome.torn += torn
            if problems and _is_false_sync(recording, cut):
                outcome.false_syncs += 1
                _keep(outcome, case, "false-sync")
                break
            if problems:
                file = _keep(outcome, case, "lost")
                is_loss = any(text.startswith(LOST) for text in problems)
                outcome.found.append(Found(problems[0], is_loss, cut, file))
                break
            if number >= chosen and going_on is None:
                going_on = cutter.image(pieces), ledger.copy()
    outcome.distinct += len(seen)
    judge.at(len(recording.writes))
    outcome.acknowledged += judge.ledger.acknowledged - case.ledger.acknowledged
    if judge.ledger.problems and not outcome.found:
        # Not after a cut, but already while the program ran.
        file = _keep(outcome, case, "running")
        last = Cut(len(recording.writes), 0)
        is_loss = any(text.startswith(LOST) for text in judge.ledger.problems)
        outcome.found.append(Found(judge.ledger.problems[0], is_loss, last, file))
    return going_on or (recording.base, case.ledger)


def _is_false_sync(recording: Recording, cut: Cut) -> bool:
    """Whether the file system lied: since the disk's error it has asked for no barrier at all,
    and yet it has said of a sync that it had succeeded."""
    failed = [place for place, _ in recording.failed if place <= cut.place]
    if not failed or any(entry is None for entry in recording.writes[failed[0] : cut.place]):
        return False
    return any(
        failed[0] <= place <= cut.place and line.startswith('["synced"')
        for place, line in recording.messages
    )


def _keep(outcome: Outcome, case: Case, why: str) -> str:
    task = outcome.task
    name = f"{why}-{task.part}-{task.system}-{task.kind}-{task.seed}-{case.life}"
    path = Path(task.keep) / name
    if not path.exists():
        case.save(path)
    return str(path)


class Judge:
    """The ledger at one place of a recording after the other, forwards."""

    def __init__(self, case: Case) -> None:
        self._messages = case.recording.messages
        self._next = 0
        self.ledger = case.ledger.copy()
        self.opening = True
        """Whether the last place is one at which a life had not yet opened what it found."""

    def at(self, place: int) -> Ledger:
        lines: list[str] = []
        while self._next < len(self._messages) and self._messages[self._next][0] <= place:
            lines.append(self._messages[self._next][1])
            self._next += 1
        self.ledger.hear(lines)
        for line in lines:
            if line.startswith('["life"'):
                self.opening = True
            elif line.startswith('["open"'):
                self.opening = False
        return self.ledger


class Unmountable(Exception):
    """The file system itself refuses the disk."""


def look(case: Case, ledger: Ledger, image: Image, *, deep: bool) -> tuple[list[str], bool]:
    """Open what is on the disk; gives (what is wrong, whether an unfinished batch was cut)."""
    job = Job(
        kind=case.kind,
        path=image.place,
        seed=case.seed,
        life=case.life,
        tasks=2,
        operations=2 if deep else 0,
        cuts=False,
        options=case.options,
    )
    later = ledger.copy() if deep else ledger
    with image.mounted():
        problems, torn = _look(job, later, deep)
    if any(f" {number} " in text for number in DAMAGED for text in problems):
        raise Unmountable(problems[0])
    if deep and not problems:
        # What was written after the recovery is durable too, and the recovery itself was.
        with image.mounted():
            again = attrs.evolve(job, life=job.life + 1, operations=0)
            problems, _ = _look(again, later, True)
    return problems, torn


def _look(job: Job, ledger: Ledger, take: bool) -> tuple[list[str], bool]:
    said: list[tuple[Any, ...]] = []
    trio.run(_program.live, job, lambda *words: said.append(words), InlineFiles())
    problems: list[str] = []
    torn = False
    if take:
        before = len(ledger.problems)
        for words in said:
            ledger.take(words)
        problems += ledger.problems[before:]
    for words in said:
        if words[0] == "open":
            torn = bool(words[3 if job.kind == "log" else 2])
            if not take:
                problems += ledger.check(words[1:])
        elif words[0] in ("refused", "error", "strange") and not (take and words[0] == "strange"):
            problems.append(" ".join(map(str, words)))
    if not any(words[0] == "closed" for words in said) and not problems:
        problems.append("the program did not come to its end")
    return problems, torn


def _count_faults(outcome: Outcome, case: Case, codes: list[int]) -> None:
    """What an injected error came to."""
    recording = case.recording
    if not recording.failed:
        return
    ledger = case.ledger.copy()
    errors = len(ledger.errors.names)
    syncs = len(ledger.errors.second_sync)
    ledger.hear(line for _, line in recording.messages)
    names = ledger.errors.names[errors:]
    said = ledger.errors.second_sync[syncs:]
    outcome.failed += len(recording.failed)
    outcome.errors.update(f"{name} {how}".strip() for name, how, _ in names)
    told = any(name == "LogFailedError" for name, _, _ in names)
    outcome.told += told
    outcome.forgotten += told and bool(said) and all(text.endswith(": ok") for text in said)
    outcome.retaken += told and len(codes) > 1 and codes[1] == 0


# -- disks -----------------------------------------------------------------------------


class Image:
    """A disk in memory, made again and again."""

    def __init__(self, system: FileSystem, folder: Path, size: int) -> None:
        self._system = system
        self._path = str(folder / "image")
        self._target = str(folder / "mounted")
        self.place = f"{self._target}/data"
        os.makedirs(self._target, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, size)
        self._loop = Loop(self._path)

    def write(self, durable: bytearray, pieces: list[Piece]) -> None:
        os.pwrite(self._fd, durable, 0)
        for offset, data in pieces:
            os.pwrite(self._fd, data, offset)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        self._loop.forget()
        try:
            _mounts.mount(self._loop.device, self._target, self._system.name)
        except OSError as exc:
            raise Unmountable(str(exc)) from exc
        with _mounts.unmounted_after(self._target):
            yield

    def close(self) -> None:
        self._loop.close()
        os.close(self._fd)


class Disk:
    """The recorded disk of one task, and images of it."""

    def __init__(self, system: FileSystem, folder: Path) -> None:
        self.system = system
        self._folder = folder
        self._file = str(folder / "disk")
        self._target = str(folder / "recorded")
        self.place = f"{self._target}/data"
        os.makedirs(self._target, exist_ok=True)
        Path(self._file).touch()

    @contextlib.contextmanager
    def image(self) -> Iterator[Image]:
        image = Image(self.system, self._folder, self.system.size)
        try:
            yield image
        finally:
            image.close()

    def record(
        self, base: bytes, jobs: list[Job], fault: Fault | None, rng: Random
    ) -> tuple[Recording, list[int]]:
        """Run the lives on a disk that begins as ``base``; gives also their exit codes."""
        messages, said = os.pipe()
        stopped, stop = os.pipe()
        recording = Recording(self.system.name, base)
        store = BlockStore(recording, messages, stopped, fault)
        store.mount(self._file)
        saved = str(self._folder / "recording")
        server = _serve(store, saved, (said, stop))
        store.close()
        os.close(messages)
        os.close(stopped)
        try:
            with Loop(self._file) as loop:
                codes = self._lives(loop, jobs, said, rng)
        finally:
            os.close(said)
            os.close(stop)
            _mounts.unmount(self._file, _mounts.MNT_DETACH)
            _, status = os.waitpid(server, 0)
        if status:
            raise RuntimeError(f"the block store ended with status {status}")
        return Recording.load(saved), codes

    def _lives(self, loop: Loop, jobs: list[Job], said: int, rng: Random) -> list[int]:
        codes: list[int] = []
        while jobs:
            try:
                _mounts.mount(loop.device, self._target, self.system.name)
            except OSError:
                # An error that it met before keeps it from that; the cuts will show what is lost.
                break
            try:
                # Some lives on one mount, so that each finds the page cache of the one before.
                for _ in range(min(len(jobs), rng.choice((1, 2, 3, 3)))):
                    job, *jobs = jobs
                    pid = _program.fork(job, said)
                    _, status = os.waitpid(pid, 0)
                    codes.append(os.waitstatus_to_exitcode(status))
            finally:
                _mounts.unmount(self._target)
        return codes


def _serve(store: BlockStore, path: str, others: tuple[int, ...]) -> int:
    """Fork the process that serves the disk and at last saves the recording."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _program.die_with_parent()
        _program.ignore_interrupts()
        for fd in others:
            os.close(fd)
        store.serve().save(path)
        code = 0
    finally:
        os._exit(code)


# -- replay ----------------------------------------------------------------------------


def replay(text: str) -> int:
    name, _, numbers = text.partition(":")
    place, damage = map(int, numbers.split(":"))
    try:
        case = Case.load(Path(name))
    except OSError as exc:
        return fail_usage(f"--replay {text}: {exc}")
    _mounts.private_namespace()
    cut = Cut(place, damage)
    with _lives.scratch("powercut", fast_folder()) as folder:
        disk = Disk(FILE_SYSTEMS[case.recording.system], Path(folder))
        cutter = Cutter(case.recording, disk.system.whole)
        pieces = cutter.advance(cut)
        ledger = Judge(case).at(place)
        print(f"damage: {cut.mode}; {len(pieces)} pieces written since the last barrier")
        with disk.image() as image:
            image.write(cutter.durable, pieces)
            problems, _ = look(case, ledger.copy(), image, deep=False)
            if not problems:
                image.write(cutter.durable, pieces)
                problems, _ = look(case, ledger.copy(), image, deep=True)
        problems = [*ledger.problems, *problems]
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems")
    return 1 if problems else 0
