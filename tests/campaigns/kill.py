"""SIGKILL at a random moment, again and again: what was acknowledged must be there.

A program with many tasks writes into a log or a database and says through a pipe what was
acknowledged; it is killed while it opens, works or closes, and the next life opens what is
left.  ``--count`` is of kills.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

from . import _lives, _program
from ._ledger import new_ledger
from ._lives import Kill, Outcome, Task
from ._program import Job
from ._report import add_common_arguments, fail_usage, replay_command

KINDS = ("log", "database")
LIVES = 9
"""Of one directory; the last is not killed."""
TASKS = 5
OPERATIONS = 40
STEPS = 500
"""About so many steps has the event loop in a life."""
MESSAGES = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, count=2000)
    _lives.add_arguments(parser, "kill")
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="open a kept case again")


COLUMNS = {
    "lives": "lives",
    "kills": "kills",
    "opening": "opening",
    "working": "working",
    "closing": "closing",
    "torn": "torn tails",
    "acknowledged": "acknowledged",
    "lost": "lost",
    "other": "other",
}


def run(arguments: argparse.Namespace) -> int:
    def replayed(outcome: Outcome) -> str:
        return replay_command("kill", "--replay", outcome.kept)

    tasks = partial(_tasks, arguments)
    return _lives.run_all("kill", arguments, COLUMNS, KINDS, lives_of, tasks, replayed)


def _tasks(arguments: argparse.Namespace, folder: str) -> Iterator[Task]:
    for number in count():
        seed = arguments.seed * 1_000_003 + number
        yield Task(KINDS[number % 2], seed, folder, str(arguments.keep))


def lives_of(task: Task) -> Outcome:
    """All lives of one directory; ends with the first problem."""
    _program.end_with_campaign()
    rng = Random(task.seed)
    options = _lives.options(task.kind, rng)
    outcome = Outcome(task.kind, task.seed)
    ledger = new_ledger(task.kind, task.seed, power=False)
    said: list[str] = []
    with tempfile.TemporaryDirectory(dir=task.directory, ignore_cleanup_errors=True) as folder:
        place, before = Path(folder, "files"), Path(folder, "before")
        for number in range(LIVES):
            job, kill = plan(task, number, str(place), options, rng)
            # Kept until the next opening has shown that all is well.
            shutil.rmtree(before, ignore_errors=True)
            if place.exists():
                shutil.copytree(place, before)
            life = _lives.live(job, kill)
            outcome.problems += _lives.judge(ledger, life)
            outcome.problems += life.told("refused", "error")
            outcome.count(life)
            if outcome.problems:
                files = {"before": before, "after": place}
                outcome.kept = _lives.keep(
                    task.kept, files, {"said": said, "last": life.lines}, job
                )
                break
            said += life.lines
    outcome.figures["acknowledged"] = ledger.acknowledged
    return outcome


def plan(
    task: Task, number: int, path: str, options: dict[str, object], rng: Random
) -> tuple[Job, Kill | None]:
    """The next life, and how it is to end."""
    kill, end = _lives.random_end(rng, OPERATIONS, messages=MESSAGES, steps=STEPS)
    if number == LIVES - 1:
        kill, end = None, {"operations": 0}
    job = Job(
        kind=task.kind,
        path=path,
        seed=task.seed,
        life=number,
        tasks=TASKS,
        consumes=task.kind == "log",
        options=options,
        **end,
    )
    return job, kill


def replay(where: Path) -> int:
    if not (where / "job.json").is_file():
        return fail_usage(f"--replay {where}: there is no kept case")
    problems = _lives.replay(where, power=False)
    for text in problems:
        print(text)
    print(f"{len(problems)} problems")
    return 1 if problems else 0
