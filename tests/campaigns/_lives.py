"""The other side of `_program`: forks a life, listens to it, kills it at a chosen moment.

Law: the process that forks has no other threads.  All that a life said before it died is
heard: what stands in a pipe outlives who wrote it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Final, TypeVar

import attrs

from . import _program
from ._ledger import Ledger, new_ledger
from ._program import Job
from ._promises import LOST
from ._report import Report, bound, fail_usage, in_processes, per_minute, progress_bar

T = TypeVar("T")


OPENING_SECONDS: Final = 0.02
"""So long opening takes, about."""
CLOSING_SECONDS: Final = 0.004


@attrs.frozen
class Kill:
    """When a life is killed: ``delay`` seconds after its n-th message, or after one of a name."""

    messages: int = 0
    name: str = ""
    delay: float = 0.0


def random_end(
    rng: Random,
    operations: int,
    *,
    messages: int,
    steps: int,
) -> tuple[Kill | None, dict[str, Any]]:
    """How a life ends: killed from outside, or by itself, as these fields of its job say."""
    found = {"operations": operations, "ending": "close"}
    match rng.choices(("opening", "closing", "message", "step"), (3, 2, 4, 4))[0]:
        case "opening":
            return Kill(delay=rng.uniform(0, OPENING_SECONDS)), found
        case "closing":
            found["operations"] = rng.randint(1, operations)
            return Kill(name="closing", delay=rng.uniform(0, CLOSING_SECONDS)), found
        case "message":
            return Kill(messages=rng.randint(1, messages), delay=rng.uniform(0, 0.002)), found
    return None, found | {"ending": "kill", "kill_at": rng.randint(1, steps)}


@attrs.define
class Life:
    """What one came to."""

    lines: list[str]
    code: int
    """Exit code; negative: the signal that ended it."""

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    def says(self, name: str) -> bool:
        return bool(self.told(name))

    def told(self, *names: str) -> list[str]:
        """Its messages of these names."""
        starts = tuple(f'["{name}"' for name in names)
        return [line for line in self.lines if line.startswith(starts)]

    @property
    def torn_bytes(self) -> int:
        """Bytes of an unfinished batch that opening cut."""
        for line in self.lines:
            words = json.loads(line)
            if words[0] == "open":
                return int(words[3] if len(words) == 6 else words[2])
        return 0

    @property
    def moment(self) -> str:
        """Where it was when it ended."""
        if not self.says("open"):
            return "opening"
        return "closing" if self.says("closing") else "working"


@attrs.frozen
class Act:
    """Something that is done once a life has said so many messages."""

    messages: int
    call: Callable[[], None]


def live(
    job: Any,
    kill: Kill | None = None,
    *,
    main: Callable[[Any, int], int] = _program.run,
    act: Act | None = None,
    before: Callable[[int], Callable[[], object]] | None = None,
    inside: Callable[[], None] | None = None,
) -> Life:
    """Run one life to its end.

    ``main`` is the program, which is given ``job``.  ``before`` is given the process id, and the
    life begins when it has returned; what it gives is called at the end.  ``inside`` is called in
    the process itself, first.
    """
    reader, writer = os.pipe()
    waiting, go = os.pipe()

    def begin() -> None:
        os.close(reader)
        os.close(go)
        if inside is not None:
            inside()
        os.read(waiting, 1)
        os.close(waiting)

    pid = _program.fork(job, writer, begin, main)
    os.close(writer)
    os.close(waiting)
    ended: Callable[[], object] = bool
    try:
        if before is not None:
            ended = before(pid)
        os.close(go)
        lines = _listen(reader, pid, kill, act)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(reader)
    _, status = os.waitpid(pid, 0)
    ended()
    return Life(lines, os.waitstatus_to_exitcode(status))


def _listen(reader: int, pid: int, kill: Kill | None, act: Act | None) -> list[str]:
    lines: list[str] = []
    rest = b""
    at = None if kill is None or kill.messages or kill.name else time.monotonic() + kill.delay
    while True:
        wait = None if at is None else max(0.0, at - time.monotonic())
        if not select.select([reader], [], [], wait)[0]:
            os.kill(pid, signal.SIGKILL)
            at = kill = None
            continue
        chunk = os.read(reader, 1 << 16)
        if not chunk:
            # A line that the kill cut short was never said.
            return lines
        *whole, rest = (rest + chunk).split(b"\n")
        lines += [line.decode() for line in whole]
        if act is not None and len(lines) >= act.messages:
            act.call()
            act = None
        if kill is not None and at is None and _is_due(kill, lines):
            at = time.monotonic() + kill.delay


def _is_due(kill: Kill, lines: list[str]) -> bool:
    if kill.name:
        return any(line.startswith(f'["{kill.name}"') for line in lines)
    return len(lines) >= kill.messages


def judge(ledger: Ledger, life: Life) -> list[str]:
    """What a life showed to be wrong, in itself and with those before it."""
    before = len(ledger.problems)
    ledger.hear(life.lines)
    found = ledger.problems[before:]
    if life.code == -signal.SIGALRM:
        found.append(f"the program hung; it said last: {life.lines[-1:]}")
    elif life.code not in (0, _program.FAILED, -signal.SIGKILL):
        found.append(f"the program ended with exit code {life.code}")
    return found


# -- where the files go ----------------------------------------------------------------


@contextlib.contextmanager
def scratch(campaign: str, directory: str | None = None) -> Iterator[str]:
    """A folder that is gone afterwards, also where a campaign is told to end (SIGTERM)."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix=f"trio-wal-{campaign}-", dir=directory) as folder:
            yield folder
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# -- a campaign of lives ---------------------------------------------------------------

FINDINGS_MAX: Final = 10
"""So many, and the campaign ends: the rest is most likely the same."""


@attrs.frozen
class Task:
    """The lives of one directory."""

    kind: str
    seed: int
    directory: str
    keep: str

    @property
    def kept(self) -> Path:
        """Where a failing case goes."""
        return Path(self.keep).absolute() / f"{self.kind}-{self.seed}"


@attrs.define
class Outcome:
    """What the lives of one directory came to."""

    kind: str
    seed: int
    figures: Counter[str] = attrs.Factory(Counter)
    """By column; ``opening``, ``working`` and ``closing`` are of the kills."""
    problems: list[str] = attrs.Factory(list)
    kept: str = ""

    def count(self, life: Life) -> None:
        self.figures["lives"] += 1
        if life.killed:
            self.figures.update(("kills", life.moment))
        self.figures["torn"] += life.torn_bytes > 0


def add_arguments(parser: argparse.ArgumentParser, campaign: str) -> None:
    parser.add_argument("--directory", type=Path, help="where the files go (a temporary folder)")
    keep_in = Path(f"{campaign}-failures")
    parser.add_argument(
        "--keep", type=Path, default=keep_in, help="for failing cases (%(default)s)"
    )


def run_all(
    campaign: str,
    arguments: argparse.Namespace,
    columns: dict[str, str],
    kinds: Iterable[str],
    lives_of: Callable[[T], Outcome],
    tasks: Callable[[str], Iterable[T]],
    replayed: Callable[[Outcome], str],
) -> int:
    """Directory after directory until the budget is used up, with a row for each kind.

    ``tasks`` is given the folder in which they stand; ``replayed`` the way to show a finding.
    """
    if arguments.directory is not None and not arguments.directory.is_dir():
        return fail_usage(f"--directory {arguments.directory} is no folder")
    ends = {"per_minute": "kills/min", "bound": "bound"}
    report = Report(campaign, arguments, {"kind": "of a", **columns, **ends})
    totals = {kind: Counter(dict.fromkeys(columns, 0)) for kind in kinds}
    with (
        scratch(campaign.partition(",")[0], arguments.directory) as folder,
        progress_bar(campaign, minutes=arguments.minutes, count=arguments.count) as bar,
    ):
        for outcome in in_processes(lives_of, tasks(folder), arguments.workers, bar.over):
            total = totals[outcome.kind]
            total.update(outcome.figures)
            if outcome.problems:
                is_loss = any(text.startswith(LOST) for text in outcome.problems)
                total.update(("wrong", "lost" if is_loss else "other"))
                case = f"{outcome.kind}:{outcome.seed}"
                what = f"{case}: {outcome.problems[0].splitlines()[0]} (kept: {outcome.kept})"
                report.find(what, replayed(outcome))
            kills = sum(one["kills"] for one in totals.values())
            bar.advance(outcome.figures["kills"], f"{kills:,} kills")
            if len(report.findings) >= FINDINGS_MAX:
                break
        seconds = bar.seconds
    for kind, total in totals.items():
        kills = total["kills"]
        report.add(
            **{"kind": kind, **total, "per_minute": per_minute(kills, seconds)}, bound=bound(kills)
        )
    return report.finish()


# -- a failing case, kept --------------------------------------------------------------


def keep(where: Path, files: dict[str, Path], texts: dict[str, list[str]], job: Any) -> str:
    """Everything that shows a failing case: files, what was said, and the life that showed it;
    gives where that is."""
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    for name, path in files.items():
        if path.exists():
            shutil.copytree(path, where / name)
    for name, lines in texts.items():
        (where / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (where / "job.json").write_text(job.json() + "\n", encoding="utf-8")
    return str(where)


def replay(where: Path, *, power: bool) -> list[str]:
    """What is wrong with the kept life: with the files that it found, with what it said, with
    the files that it left."""
    words: dict[str, Any] = json.loads((where / "job.json").read_text(encoding="utf-8"))
    job = Job(**{**words, "operations": 0, "ending": "close"})
    ledger = new_ledger(job.kind, job.seed, power=power)
    ledger.hear((where / "said").read_text(encoding="utf-8").splitlines())
    problems = _open_copy(where, "before", job, ledger.copy())
    ledger.hear((where / "last").read_text(encoding="utf-8").splitlines())
    problems += [problem for problem in ledger.problems if problem not in problems]
    later = attrs.evolve(job, life=job.life + 1)
    return [*problems, *_open_copy(where, "after", later, ledger)]


def _open_copy(where: Path, name: str, job: Job, ledger: Ledger) -> list[str]:
    with scratch("replay") as folder:
        if (where / name).exists():
            shutil.copytree(where / name, f"{folder}/files")
        life = live(attrs.evolve(job, path=f"{folder}/files"))
    return [*judge(ledger, life), *life.told("refused", "error")]


# -- what a log or database is opened with ---------------------------------------------


def options(kind: str, rng: Random) -> dict[str, Any]:
    """Small segments, so that every life sees rotations, truncations and checkpoints."""
    found: dict[str, Any] = {
        "segment_size": rng.choice((1, 8 << 10, 16 << 10, 64 << 10)),
        "flush_interval": rng.choice((0, 0.001, 0.01)),
        "durability": rng.choice(("sync", "sync", "sync", "interval", "none")),
        "sync_in": rng.choice(("thread", "thread", "loop")),
    }
    if kind == "database":
        found["checkpoint_bytes"] = rng.choice((4 << 10, 16 << 10, 64 << 10))
        found["map_size"] = 1 << 20
    return found
