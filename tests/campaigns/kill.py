"""SIGKILL at a random moment, again and again: what was acknowledged must be there.

A program with many tasks writes into a log or a database and says through a pipe what was
acknowledged; it is killed while it opens, works or closes, and the next life opens what is
left.  ``--count`` is of kills.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random

import attrs

from . import _lives, _program
from ._ledger import LOST, new_ledger
from ._lives import Kill, Life
from ._program import Job
from ._report import (
    Report,
    add_common_arguments,
    bound,
    fail_usage,
    in_processes,
    per_minute,
    progress_bar,
    replay_command,
)

KINDS = ("log", "database")
LIVES = 9
"""Of one directory; the last is not killed."""
FINDINGS_MAX = 10
"""So many, and the campaign ends: the rest is most likely the same."""
TASKS = 5
OPERATIONS = 40
STEPS = 500
"""About so many steps has the event loop in a life."""
MESSAGES = 400
OPENING_SECONDS = 0.015
CLOSING_SECONDS = 0.004


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, count=2000)
    parser.add_argument("--directory", type=Path, help="where the files go (a temporary folder)")
    parser.add_argument(
        "--keep", type=Path, default=Path("kill-failures"), help="for failing cases (%(default)s)"
    )
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="open a kept case again")


@attrs.frozen
class Task:
    """The lives of one directory."""

    kind: str
    seed: int
    directory: str
    keep: str


@attrs.define
class Outcome:
    """What they came to."""

    kind: str
    seed: int
    lives: int = 0
    kills: int = 0
    moments: Counter[str] = attrs.Factory(Counter)
    """Of the kills."""
    acknowledged: int = 0
    torn: int = 0
    """Openings that cut an unfinished batch."""
    problems: list[str] = attrs.Factory(list)
    kept: str = ""


def run(arguments: argparse.Namespace) -> int:
    if arguments.replay is not None:
        return replay(arguments.replay)
    if arguments.directory is not None and not arguments.directory.is_dir():
        return fail_usage(f"--directory {arguments.directory} is no folder")
    report = Report(
        "kill",
        arguments,
        {
            "kind": "of a",
            "lives": "lives",
            "kills": "kills",
            "opening": "opening",
            "working": "working",
            "closing": "closing",
            "torn": "torn tails",
            "acknowledged": "acknowledged",
            "lost": "lost",
            "other": "other",
            "per_minute": "kills/min",
            "bound": "bound",
        },
    )
    totals = {kind: Outcome(kind, arguments.seed) for kind in KINDS}
    lost: Counter[str] = Counter()
    other: Counter[str] = Counter()
    with (
        _lives.scratch("kill", arguments.directory) as folder,
        progress_bar("kill", minutes=arguments.minutes, count=arguments.count) as bar,
    ):
        tasks = _tasks(arguments.seed, folder, str(arguments.keep))
        for outcome in in_processes(lives_of, tasks, arguments.workers, bar.over):
            total = totals[outcome.kind]
            total.lives += outcome.lives
            total.kills += outcome.kills
            total.moments += outcome.moments
            total.acknowledged += outcome.acknowledged
            total.torn += outcome.torn
            if outcome.problems:
                is_loss = any(text.startswith(LOST) for text in outcome.problems)
                (lost if is_loss else other)[outcome.kind] += 1
                report.find(
                    f"{outcome.kind} {outcome.seed}: {outcome.problems[0].splitlines()[0]}",
                    replay_command("kill", "--replay", outcome.kept),
                )
            bar.advance(outcome.kills, f"{sum(t.kills for t in totals.values()):,} kills")
            if len(report.findings) >= FINDINGS_MAX:
                break
        seconds = bar.seconds
    for kind, total in totals.items():
        report.add(
            kind=kind,
            lives=total.lives,
            kills=total.kills,
            **{name: total.moments[name] for name in ("opening", "working", "closing")},
            torn=total.torn,
            acknowledged=total.acknowledged,
            lost=lost[kind],
            other=other[kind],
            per_minute=per_minute(total.kills, seconds),
            bound=bound(total.kills),
        )
    return report.finish()


def _tasks(seed: int, directory: str, keep: str) -> Iterator[Task]:
    for number in count():
        yield Task(KINDS[number % 2], seed * 1_000_003 + number, directory, keep)


def lives_of(task: Task) -> Outcome:
    """All lives of one directory; ends with the first problem."""
    _program.end_with_campaign()
    rng = Random(task.seed)
    options = _lives.options(task.kind, rng)
    outcome = Outcome(task.kind, task.seed)
    ledger = new_ledger(task.kind, task.seed, power=False)
    said: list[str] = []
    folder = Path(tempfile.mkdtemp(dir=task.directory))
    place, before = folder / "files", folder / "before"
    try:
        for number in range(LIVES):
            job, kill = plan(task, number, str(place), options, rng)
            # Kept until the next opening has shown that all is well.
            shutil.rmtree(before, ignore_errors=True)
            if place.exists():
                shutil.copytree(place, before)
            life = _lives.live(job, kill)
            outcome.problems += _lives.judge(ledger, life)
            outcome.problems += life.told("refused", "error")
            _count(outcome, life)
            if outcome.problems:
                where = Path(task.keep).absolute() / f"{task.kind}-{task.seed}"
                files = {"before": before, "after": place}
                _lives.keep(where, files, job, said, life.lines)
                outcome.kept = str(where)
                break
            said += life.lines
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    outcome.acknowledged = ledger.acknowledged
    return outcome


def plan(
    task: Task, number: int, path: str, options: dict[str, object], rng: Random
) -> tuple[Job, Kill | None]:
    """The next life, and how it is to end."""
    kill: Kill | None = None
    ending, step, operations = "close", 0, OPERATIONS
    match rng.choices(("opening", "closing", "message", "step"), (3, 2, 4, 4))[0]:
        case "opening":
            kill = Kill(delay=rng.uniform(0, OPENING_SECONDS))
        case "closing":
            kill = Kill(name="closing", delay=rng.uniform(0, CLOSING_SECONDS))
            operations = rng.randint(1, OPERATIONS)
        case "message":
            kill = Kill(messages=rng.randint(1, MESSAGES), delay=rng.uniform(0, 0.002))
        case _:
            ending, step = "kill", rng.randint(1, STEPS)
    if number == LIVES - 1:
        ending, kill, operations = "close", None, 0
    job = Job(
        kind=task.kind,
        path=path,
        seed=task.seed,
        life=number,
        tasks=TASKS,
        operations=operations,
        ending=ending,
        kill_at=step,
        options=options,
    )
    return job, kill


def _count(outcome: Outcome, life: Life) -> None:
    outcome.lives += 1
    if life.killed:
        outcome.kills += 1
        outcome.moments[life.moment] += 1
    outcome.torn += life.torn_bytes > 0


def replay(where: Path) -> int:
    if not (where / "job.json").is_file():
        return fail_usage(f"--replay {where}: there is no kept case")
    problems = _lives.replay(where, power=False)
    for text in problems:
        print(text)
    print(f"{len(problems)} problems")
    return 1 if problems else 0
