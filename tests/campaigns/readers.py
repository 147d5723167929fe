"""Processes that read while the owner rotates, cuts, is killed and opens the log again.

Parts: ``live`` (``--count`` is of kills): readers of every kind stay attached to a log, or a
database's, over many lives of its owner.  ``streams``: eight streams on one reader beside a
writer that rotates and drops all the time, for ``--minutes``.

A sound log must never be called damaged; nothing may be missing, altered, or of two
histories; what was given must last, and what was acknowledged must be given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Final

import attrs

from . import _lives, _onlookers, _owner, _program
from ._lives import Kill, Life, Outcome
from ._marks import History
from ._onlookers import Onlooker, Reports
from ._owner import Owner
from ._report import add_common_arguments, fail_usage, replay_command

PARTS: Final = ("live", "streams")
KINDS: Final = ("log", "log", "log", "database")
LIVES: Final = 45
"""Of one directory."""
ORDERLY: Final = 9
"""After so many kills one life ends in order, and the followers must come to the log's end."""
OPERATIONS: Final = 20
STEPS: Final = 300
MESSAGES: Final = 100
STREAMS: Final = "streams"
ENDLESS: Final = 1 << 40
STREAMS_SEGMENT: Final = 12_000
STREAMS_KEEP: Final = 6
STREAMS_CASE_SECONDS: Final = 15.0
STREAMS_MINUTES: Final = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, count=1000, parts=PARTS)
    _lives.add_arguments(parser, "readers")
    parser.add_argument("--lives", type=int, default=LIVES, help="of one directory (%(default)s)")
    parser.add_argument("--case", metavar="KIND:SEED", help="the lives of one directory again")
    parser.add_argument(
        "--tries", type=int, default=20, help="of --case, until it is found (%(default)s)"
    )


@attrs.frozen
class Task(_lives.Task):
    """So many of them."""

    lives: int = LIVES
    seconds: float = STREAMS_CASE_SECONDS
    """Of the life beside which streams are read."""


# -- the judge -----------------------------------------------------------------------------


@attrs.define
class Judge:
    """What the owner and the onlookers of one directory have said, and what is wrong with it."""

    history: History
    outcome: Outcome
    log: list[str] = attrs.Factory(list)

    def hear(self, life: Life | None, reports: list[list[Any]]) -> None:
        """A life has ended, or only readers have gone on."""
        said: list[list[Any]] = []
        for line in life.lines if life is not None else ():
            words = json.loads(line)
            self.log.append(line)
            match words[0]:
                case "stream" | "gave" | "strange":
                    said.append(words)
                case "closing":
                    pass
                case name:
                    self.history.hear(name, words[1], words[2:])
        for words in [*said, *reports]:
            self.log.append(json.dumps(words))
            self._report(*words)
        self.outcome.problems += self.history.problems
        self.history.problems.clear()

    def settled(self) -> None:
        """Everything has a fate: what was given must be in the log, or was cut."""
        self.outcome.problems += self.history.lost()

    def _wrong(self, text: str) -> None:
        self.outcome.problems.append(text)

    def _report(self, name: str, *words: Any) -> None:
        match name:
            case "stream":
                self._stream(*words)
            case "gave":
                at, who, lsn, history = words
                self.history.note(who, at, lsn, history)
            case "looked":
                self._looked(*words)
            case "tool":
                self.outcome.figures["tools"] += 1
            case "wrong":
                self._wrong(f"{words[1]}: {words[2]}")
            case "strange":
                self._wrong(str(words[0]))
            case _:
                raise AssertionError(name)

    def _looked(self, begun: int, ended: int, who: str, first: int, last: int) -> None:
        low, high = self.history.may_start(begun, ended)
        if not low <= first <= high:
            self._wrong(f"{who}: the log starts at LSN {first}; truncations allow {low} to {high}")
        must = self.history.must_reach(begun, ended)
        if last < must:
            self._wrong(f"{who}: durable_lsn is {last}, and {must} was acknowledged")

    def _stream(
        self,
        begun: int,
        entered: int,
        ended: int,
        who: str,
        kind: str,
        start: int | None,
        told: list[int],
        end: list[Any],
    ) -> None:
        first, last, known, history = told
        figures = self.outcome.figures
        figures["streams"] += 1
        if end[0] in ("truncated", "diverged"):
            figures[end[0]] += 1
        figures["records"] += last - first + 1 if first else 0
        self.history.note(who, ended, known, history)
        name = f"{who} ({kind} from {start}, gave {first} to {last})"
        low, high = self.history.may_start(begun, entered or ended)
        if first and start is None and not low <= first <= high:
            self._wrong(f"{name}: it begins at LSN {first}; truncations allow {low} to {high}")
        match end:
            case ["end"]:
                self._ended(name, begun, ended, kind, start, first, last)
            case ["left"]:
                pass
            case ["closed"]:
                if not who.startswith("life"):
                    self._wrong(f"{name}: it was closed")
            case ["truncated", _, _]:
                self._truncated(name, ended, first, last, start)
            case ["diverged", _, lsn]:
                if not self.history.was_cut(max(last, (start or 1) - 1, lsn), ended):
                    self._wrong(f"{name}: it was told of another history, and nothing was cut")
            case [_, text]:
                self._wrong(f"{name}: {text}")

    def _ended(
        self, name: str, begun: int, ended: int, kind: str, start: int | None, first: int, last: int
    ) -> None:
        if kind == "follow":
            if not name.startswith("life"):
                self._wrong(f"{name}: it ended")
            return
        must = self.history.must_reach(begun, ended)
        lowest = start
        if lowest is None:
            lowest = self.history.may_start(begun, ended)[1]
        if last < must and not (not first and lowest > must):
            self._wrong(f"{name}: it ended, and LSN {must} was acknowledged")

    def _truncated(self, name: str, ended: int, first: int, last: int, start: int | None) -> None:
        """Right where records were dropped that were due, or given."""
        due = last + 1 if first else start
        high = self.history.may_start(ended, ended)[1]
        if due is not None and high <= due:
            self._wrong(f"{name}: it was told of a truncation, and there was none")


# -- the lives of one directory ------------------------------------------------------------


def lives_of(task: Task) -> Outcome:
    """All lives of one directory; ends with the first problem."""
    _program.end_with_campaign()
    rng = Random(task.seed)
    options = _lives.options(task.kind, rng)
    keep = rng.choice((0, 0, 3, 8)) if task.kind == "database" else 0
    if task.kind == STREAMS:
        options, keep = {"segment_size": STREAMS_SEGMENT, "flush_interval": 0}, STREAMS_KEEP
    outcome = Outcome(task.kind, task.seed)
    judge = Judge(History(drops_by_itself=task.kind != "log"), outcome)
    folder = Path(tempfile.mkdtemp(dir=task.directory))
    place = folder / "files"
    reports = Reports(folder / _onlookers.REPORT)
    onlooker = Onlooker(
        kind=task.kind,
        path=str(place / "log" if task.kind == "database" else place),
        seed=task.seed,
        report=str(reports.path),
        role=STREAMS if task.kind == STREAMS else "readers",
        pause=0.0 if task.kind == STREAMS else rng.choice(_onlookers.PAUSES_SECONDS),
    )
    handles: list[_onlookers.Handle] = []
    try:
        for number in range(task.lives):
            owner, kill = plan(task, number, str(place), options, keep, judge.history, rng)
            life = _lives.live(owner, kill, main=_owner.run)
            outcome.count(life)
            if not handles:
                handles.append(_onlookers.start(onlooker))
                if task.kind != STREAMS:
                    handles.append(_onlookers.start(attrs.evolve(onlooker, role="tools")))
            elif owner.ending == "close" and kill is None:
                judge.hear(life, reports.new())
                if life.says("closed"):
                    history = judge.history
                    wrong = handles[0].ask(history.last_lsn, history.runs.of(history.last_lsn))
                    outcome.problems += [wrong] if wrong else []
                    judge.hear(None, reports.new())
                    judge.settled()
                life = attrs.evolve(life, lines=[])
            judge.hear(life, reports.new())
            if life.code == -14:
                outcome.problems.append("the owner hung")
            if outcome.problems:
                texts = {"said": judge.log, "found": outcome.problems}
                outcome.kept = _lives.keep(task.kept, {"files": place}, texts, owner)
                break
    finally:
        for handle in handles:
            handle.end()
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def plan(
    task: Task,
    number: int,
    path: str,
    options: dict[str, Any],
    keep: int,
    history: History,
    rng: Random,
) -> tuple[Owner, Kill | None]:
    """The next life, and how it is to end."""
    kill, end = _lives.random_end(rng, OPERATIONS, messages=MESSAGES, steps=STEPS)
    if task.kind == STREAMS:
        kill = Kill(name="open", delay=task.seconds) if number == 1 else None
        end = {"operations": ENDLESS if number == 1 else 0}
    elif number % (ORDERLY + 1) == 0 or number == task.lives - 1:
        kill, end = None, {"operations": rng.choice((0, OPERATIONS))}
    owner = Owner(
        kind=task.kind,
        path=path,
        seed=task.seed,
        life=number,
        runs=history.runs.told(),
        drops=task.kind != STREAMS,
        cuts=task.kind != STREAMS and bool(task.seed % 2),
        streams=0 if task.kind == STREAMS else 2,
        keep=keep,
        options=options,
        **end,
    )
    return owner, kill


# -- the campaign --------------------------------------------------------------------------


COLUMNS: Final = {
    "lives": "lives",
    "kills": "kills",
    "streams": "streams",
    "records": "records given",
    "truncated": "told of truncation",
    "diverged": "told of another history",
    "tools": "tools",
    "wrong": "wrong",
}


def run(arguments: argparse.Namespace) -> int:
    if arguments.case is not None:
        return run_again(arguments)
    return max(run_part(part, arguments) for part in arguments.parts or PARTS)


def run_part(part: str, arguments: argparse.Namespace) -> int:
    kinds = list(dict.fromkeys(KINDS))
    if part == STREAMS:
        kinds = [STREAMS]
        minutes = arguments.minutes or STREAMS_MINUTES
        arguments = argparse.Namespace(**{**vars(arguments), "minutes": minutes, "count": None})

    def replayed(outcome: Outcome) -> str:
        return replay_command("readers", "--case", f"{outcome.kind}:{outcome.seed}")

    name, tasks = f"readers, {part}", partial(_tasks, part, arguments)
    return _lives.run_all(name, arguments, COLUMNS, kinds, lives_of, tasks, replayed)


def _tasks(part: str, arguments: argparse.Namespace, folder: str) -> Iterator[Task]:
    for number in count():
        kind = STREAMS if part == STREAMS else KINDS[number % len(KINDS)]
        lives = 3 if part == STREAMS else arguments.lives
        seed = arguments.seed * 1_000_003 + number
        yield Task(kind, seed, folder, str(arguments.keep), lives)


def run_again(arguments: argparse.Namespace) -> int:
    """The same plan; when what happens is the machine's to say, so it is tried again."""
    kind, _, seed = arguments.case.partition(":")
    if kind not in (*KINDS, STREAMS) or not seed.isdigit():
        return fail_usage(f"--case {arguments.case} is not KIND:SEED")
    with _lives.scratch("readers", arguments.directory) as folder:
        for number in range(arguments.tries):
            lives = 3 if kind == STREAMS else arguments.lives
            outcome = lives_of(Task(kind, int(seed), folder, str(arguments.keep), lives))
            for text in outcome.problems:
                print(text)
            if outcome.problems:
                print(f"try {number + 1}; what was said: {outcome.kept}/said")
                return 1
    print(f"nothing found in {arguments.tries} tries")
    return 0
