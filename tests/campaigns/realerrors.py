"""Errors of the operating system under the real program, made by real tools (Linux).

``calls``: with strace the n-th call of each kind fails, for every n, once or for ever (the call
itself is skipped).  ``limit``: a file-size limit (RLIMIT_FSIZE), which makes true short writes.
``full``: a small ext4 that fills up and gets space again.  ``gone``: a file system that is shut
down under the program, or read-only before it starts.  ``--count`` is of lives with an error.

Then the error is gone, and what was acknowledged must be there.  libfiu has no part in this: it
does not know pwritev2, with which Python writes.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Final

import attrs

from . import _lives, _mounts, _program
from ._ledger import Ledger, new_ledger
from ._lives import FINDINGS_MAX, Life
from ._mounts import FILE_SYSTEMS, KIB, MIB, FileSystem, Loop
from ._program import Job
from ._promises import LOST
from ._report import (
    Report,
    add_common_arguments,
    fail_usage,
    in_processes,
    per_minute,
    progress_bar,
    replay_command,
)

PARTS: Final = ("calls", "limit", "full", "gone")
KINDS: Final = ("log", "database")
CALLS: Final = {
    "pwritev2": ("EIO", "ENOSPC", "EDQUOT", "EFBIG", "EROFS"),
    "pwrite64": ("EIO", "ENOSPC"),
    "fdatasync": ("EIO", "ENOSPC", "EDQUOT"),
    "fsync": ("EIO", "ENOSPC"),
    "fallocate": ("ENOSPC", "EDQUOT", "EIO", "EFBIG"),
    "openat": ("EMFILE", "ENFILE", "ENOSPC", "EDQUOT", "EROFS", "EIO"),
    "renameat": ("EIO", "ENOSPC", "EROFS"),
    "unlinkat": ("EIO", "EROFS"),
    "ftruncate": ("EIO", "EROFS", "EFBIG"),
    "pread64": ("EIO",),
    "mkdir": ("ENOSPC", "EROFS"),
}
"""What fails, and how."""
WAYS: Final = ("once", "for ever")
TRACED: Final = ",".join((*CALLS, "write", "pwritev", "writev"))

_LINE: Final = re.compile(r"^(\d+) +(\w+)\((.*?)(?:\) += (.*)|<unfinished \.\.\.>|)$")
_RESUMED: Final = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>.*?\) += (.*)$")
_PATH: Final = re.compile(r"^(\d+)<([^>]*)>")
_GOING_DOWN: Final = 0x8004587D
_NO_LOG_FLUSH: Final = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, parts=PARTS)
    parser.add_argument(
        "--first", type=int, default=1, metavar="N", help="begin with the N-th calls (%(default)s)"
    )
    parser.add_argument(
        "--replay", metavar="CASE", help="run one case again, as a finding names it"
    )


@attrs.frozen
class Case:
    """One error."""

    part: str
    kind: str
    seed: int
    call: str = ""
    name: str = ""
    """Of the errno."""
    way: str = ""
    number: int = 0

    @property
    def series(self) -> tuple[str, ...]:
        return (self.part, self.kind, self.call, self.name, self.way)

    def text(self) -> str:
        return ":".join(map(str, attrs.astuple(self))).replace(" ", "-")

    @classmethod
    def parse(cls, text: str) -> Case:
        part, kind, seed, call, name, way, number = text.split(":")
        return cls(part, kind, int(seed), call, name, way.replace("-", " "), int(number))


@attrs.define
class Outcome:
    case: Case
    hit: bool = False
    """Whether the error happened."""
    happened: str = ""
    """What the program said of it."""
    acknowledged: int = 0
    problems: list[str] = attrs.Factory(list)

    def live(self, ledger: Ledger, job: Job, **how: Any) -> Life:
        """A life, and what it shows to be wrong."""
        life = _lives.live(job, **how)
        self.problems += _lives.judge(ledger, life)
        return life


# -- the campaign ----------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    able = []
    for part in arguments.parts or PARTS:
        reason = why_not(part)
        if reason is None:
            able.append(part)
        else:
            print(f"skipped {part}: {reason}")
    if not able:
        return 0
    report = Report("realerrors", arguments, COLUMNS)
    outcomes: list[Outcome] = []
    with (
        _lives.scratch("realerrors") as folder,
        progress_bar("realerrors", minutes=arguments.minutes, count=arguments.count) as bar,
    ):
        limited = arguments.minutes is not None
        plan = Plan(able, arguments.seed, arguments.first, limited=limited)
        jobs = ((case, folder) for case in plan)
        for outcome in in_processes(_case_in, jobs, arguments.workers, bar.over):
            plan.learn(outcome)
            if not outcome.hit:
                bar.advance(0)
                continue
            outcomes.append(outcome)
            for problem in outcome.problems[:1]:
                report.find(
                    f"{outcome.case.text()}: {problem.splitlines()[0]}",
                    replay_command("realerrors", "--replay", outcome.case.text()),
                )
            bar.advance(1, f"{len(outcomes):,} errors")
            if len(report.findings) >= FINDINGS_MAX:
                break
        seconds = bar.seconds
    _add_rows(report, outcomes)
    exhausted = sum(1 for series in plan.series if series in plan.exhausted)
    report.note(
        "failed: LogFailedError; full: LogFullError; refused: not opened; told: another error of "
        "the call; unseen: of work beside the writers, which goes on"
    )
    report.note(
        f"{len(outcomes):,} errors, {per_minute(len(outcomes), seconds):,} a minute; of "
        f"{len(plan.series)} series of calls, {exhausted} were gone through to the last call"
    )
    return report.finish()


def why_not(part: str) -> str | None:
    """Why a part cannot be run here; None where it can."""
    if part == "calls":
        if shutil.which("strace") is None:
            return "strace is not installed"
        return None if _can_trace() else "this process may not trace another one"
    if part in ("full", "gone"):
        return _mounts.why_not(["ext4"])
    return None


def _can_trace() -> bool:
    waiting = subprocess.Popen(["sleep", "60"])
    try:
        tracer = Tracer(waiting.pid, "/dev/null", "fdatasync:error=EIO:when=1")
    except OSError:
        return False
    finally:
        waiting.kill()
        waiting.wait()
    tracer.close()
    return True


COLUMNS: Final = {
    "part": "part",
    "what": "what fails",
    "errors": "errors",
    "failed": "failed",
    "full": "full",
    "refused": "refused",
    "told": "told",
    "unseen": "unseen",
    "acknowledged": "acks",
    "false": "false, lost",
    "other": "other",
}


def _add_rows(report: Report, outcomes: list[Outcome]) -> None:
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        case = outcome.case
        rows.setdefault((case.part, case.call or case.part), []).append(outcome)
    for (part, what), group in sorted(rows.items()):
        happened = Counter(outcome.happened for outcome in group)
        lost = sum(any(text.startswith(LOST) for text in one.problems) for one in group)
        report.add(
            part=part,
            what=what,
            errors=len(group),
            **{name: happened[name] for name in ("failed", "full", "refused", "told", "unseen")},
            acknowledged=sum(outcome.acknowledged for outcome in group),
            false=lost,
            other=sum(bool(outcome.problems) for outcome in group) - lost,
            errnos=sorted({outcome.case.name for outcome in group} - {""}),
        )


class Plan:
    """Every n of every series in turn, until a series has no call of that number."""

    def __init__(self, parts: list[str], seed: int, first: int, *, limited: bool) -> None:
        self._parts = parts
        self._seed = seed
        self._first = first
        self._limited = limited
        self.exhausted: set[tuple[str, ...]] = set()
        self.series = [case.series for case in self._round(1) if case.part == "calls"]

    def __iter__(self) -> Iterator[Case]:
        for number in count(self._first):
            cases = [case for case in self._round(number) if case.series not in self.exhausted]
            if not any(case.part == "calls" for case in cases) and not self._goes_on(number):
                return
            Random(f"{self._seed} {number}").shuffle(cases)
            for case in cases:
                # It may have come to its end while others were run.
                if case.series not in self.exhausted:
                    yield case

    def _goes_on(self, number: int) -> bool:
        """Without calls there is no end but the budget's, or so many rounds."""
        return self._limited or ("calls" not in self._parts and number < self._first + ROUNDS)

    def learn(self, outcome: Outcome) -> None:
        if outcome.case.part == "calls" and not outcome.hit:
            self.exhausted.add(outcome.case.series)

    def _round(self, number: int) -> Iterator[Case]:
        for part in self._parts:
            for kind in KINDS:
                if part == "calls":
                    for call, names in CALLS.items():
                        for name in names:
                            for way in WAYS:
                                yield Case(part, kind, self._seed, call, name, way, number)
                else:
                    yield Case(part, kind, self._seed * 1_000_003 + number)


ROUNDS: Final = 50
REPLAYS: Final = 30


# -- one case --------------------------------------------------------------------------


def _case_in(work: tuple[Case, str]) -> Outcome:
    _program.end_with_campaign()
    case, folder = work
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place:
        return run_case(case, Path(place))


def run_case(case: Case, folder: Path) -> Outcome:
    return {"calls": _calls, "limit": _limit, "full": _full, "gone": _gone}[case.part](case, folder)


def _job(case: Case, path: str, life: int, rng: Random, **changes: Any) -> Job:
    options = {
        "segment_size": rng.choice((1, 8 * KIB, 16 * KIB)),
        "flush_interval": 0,
        "durability": rng.choice(("sync", "sync", "sync", "interval")),
    }
    if case.kind == "database":
        options |= {"checkpoint_bytes": 4 * KIB, "map_size": 1 * MIB}
    job = Job(kind=case.kind, path=path, seed=case.seed, life=life, options=options)
    return attrs.evolve(job, **{"tasks": 2, "operations": 8, **changes})


def _conclude(outcome: Outcome, ledger: Ledger, job: Job, life: int) -> Outcome:
    """The error is gone: open, go on, open again."""
    _note(outcome, ledger)
    for step, operations in enumerate((2, 0)):
        again = attrs.evolve(job, life=life + step, operations=operations, ballast="")
        before = len(ledger.errors.names) + len(ledger.errors.refused)
        healed = outcome.live(ledger, again)
        if len(ledger.errors.names) + len(ledger.errors.refused) > before:
            outcome.problems.append(f"without the error: {healed.lines[-3:]}")
    outcome.acknowledged = ledger.acknowledged
    return outcome


def _note(outcome: Outcome, ledger: Ledger) -> None:
    errors = ledger.errors
    names = {name for name, _, _ in errors.names}
    if "LogFailedError" in names:
        outcome.happened = "failed"
        if not errors.dead and not ledger.closing:
            outcome.problems.append("the log failed, and no later call was seen to fail")
    elif errors.refused:
        outcome.happened = "refused"
        wrong = [one for one in errors.refused if one[0] not in REFUSALS]
        if wrong:
            outcome.problems.append(f"opening failed as if the files were damaged: {wrong}")
    elif "LogFullError" in names:
        outcome.happened = "full"
    else:
        outcome.happened = "told" if names else "unseen"


REFUSALS: Final = ("OSError", "LogFullError", "PermissionError", "FileNotFoundError")
"""What opening may raise where the disk is at fault; damage is something else."""


# -- calls that fail -------------------------------------------------------------------


class Tracer:
    """strace on a process that waits to begin."""

    def __init__(self, pid: int, output: str, inject: str) -> None:
        self._process = subprocess.Popen(
            [
                *("strace", "-f", "-y", "-s", "200", "-o", output, "-p", str(pid)),
                *("-e", f"trace={TRACED}", "-e", "signal=none", "-e", f"inject={inject}"),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        line = self._process.stderr.readline().decode(errors="replace")
        if "attached" not in line:
            self.close()
            raise OSError(errno.EPERM, f"strace: {line.strip()}")

    def close(self) -> None:
        """It ends with the process that it traces."""
        assert self._process.stderr is not None
        self._process.stderr.read()
        self._process.wait()
        self._process.stderr.close()


@attrs.frozen
class Call:
    """A line of strace's output."""

    name: str
    path: str
    """Of the first argument, where that is a descriptor."""
    arguments: str
    injected: bool
    reads_only: bool = False
    """The first argument is a descriptor that nothing can be written by."""

    @property
    def message(self) -> list[Any] | None:
        """What the program said with it, if it did."""
        at = self.arguments.find('"[')
        if self.name != "write" or at < 0:
            return None
        text = self.arguments[at + 1 : self.arguments.rindex('"')].removesuffix("\\n")
        try:
            words: list[Any] = json.loads(text.replace('\\"', '"'))
        except ValueError:
            # strace shows the beginning only; what counts here is short.
            return None
        return words


def calls_of(lines: Iterable[str]) -> Iterator[Call]:
    """The calls in the order in which they began; an error that was injected is one's end, but
    that is in the same instant."""
    pending: dict[tuple[str, str], int] = {}
    found: list[Call] = []
    read_only: dict[str, bool] = {}

    def ended(call: Call, result: str) -> Call:
        if call.name == "openat" and (descriptor := _PATH.match(result)) is not None:
            read_only[descriptor[1]] = "O_RDONLY" in call.arguments
        return attrs.evolve(call, injected="(INJECTED)" in result)

    for line in lines:
        if (match := _RESUMED.match(line)) is not None:
            place = pending.pop((match[1], match[2]), None)
            if place is not None:
                found[place] = ended(found[place], match[3])
        elif (match := _LINE.match(line)) is not None:
            descriptor, path = "", ""
            if (first := _PATH.match(match[3])) is not None:
                descriptor, path = first.groups()
            if match[4] is None:
                pending[match[1], match[2]] = len(found)
            call = Call(match[2], path, match[3], False, read_only.get(descriptor, False))
            found.append(ended(call, match[4] or ""))
    return iter(found)


def _calls(case: Case, folder: Path) -> Outcome:
    rng = Random(f"{case.seed} {case.kind}")
    outcome = Outcome(case)
    ledger = new_ledger(case.kind, case.seed, power=False)
    path = str(folder / "files")
    # The error meets a log that is there already, except where making one is to fail.
    if case.call != "mkdir":
        outcome.live(ledger, _job(case, path, 0, rng))
    job = _job(case, path, 1, rng)
    when = f"{case.number}{'+' if case.way == 'for ever' else ''}"
    trace = str(folder / "trace")
    inject = f"{case.call}:error={case.name}:when={when}"
    life = _lives.live(job, before=lambda pid: Tracer(pid, trace, inject).close)
    with open(trace, encoding="utf-8", errors="replace") as lines:
        calls = list(calls_of(lines))
    outcome.hit = any(call.injected for call in calls)
    if not outcome.hit:
        return outcome
    outcome.problems += _lives.judge(ledger, life)
    outcome.problems += _check_calls(case, calls, life)
    return _conclude(outcome, ledger, job, 2)


def _is_commit(call: Call) -> bool:
    """A write or sync of a segment in use: who waits for it must hear of its failure.

    Not the sync by which opening has a segment's pages written before it drops them from the
    cache: whether it fails or not, what is read then is the disk's.
    """
    return call.name in ("fdatasync", "pwritev2") and "/wal-" in call.path and not call.reads_only


def _check_calls(case: Case, calls: list[Call], life: Life) -> list[str]:
    first = next((place for place, call in enumerate(calls) if _is_failed_commit(call)), None)
    if first is None:
        return []
    wrong: list[str] = []
    if not (life.says("error") or life.says("refused")):
        wrong.append(f"{LOST}: {calls[first].name} of {calls[first].path} failed, nobody was told")
    willed: set[tuple[int, int]] = set()
    for call in calls[first:]:
        words = call.message or [""]
        if words[0] == "will":
            willed.add((words[1], words[2]))
        elif words[0] == "ack" and (words[1], words[2]) in willed:
            wrong.append(f"{LOST}: acknowledged after a failure: {words}")
    commits = [call for call in calls if call.name == "fdatasync" and _is_commit(call)]
    for path in sorted({call.path for call in commits if call.injected}):
        syncs = [call.injected for call in commits if call.path == path]
        if again := len(syncs) - 1 - syncs.index(True):
            wrong.append(f"after a failed sync {path} was synced {again} times more")
    return wrong


def _is_failed_commit(call: Call) -> bool:
    return call.injected and _is_commit(call)


# -- a limit on the size of files ------------------------------------------------------


def _limit(case: Case, folder: Path) -> Outcome:
    """The write that crosses the limit is short; the next one fails with EFBIG."""
    rng = Random(case.seed)
    outcome = Outcome(case, hit=True)
    ledger = new_ledger(case.kind, case.seed, power=False)
    path = str(folder / "files")
    life = 0
    if rng.random() < 0.5:
        outcome.live(ledger, _job(case, path, life, rng))
        life = 1
    size = rng.randrange(rng.choice((4 * KIB, 40 * KIB, 200 * KIB)))
    job = _job(case, path, life, rng, operations=20)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    outcome.live(ledger, job, inside=limit)
    return _conclude(outcome, ledger, job, life + 1)


# -- a disk that is full ---------------------------------------------------------------

SMALL: Final = attrs.evolve(
    FILE_SYSTEMS["ext4"],
    size=4 * MIB,
    options=("-F", "-q", "-b", "1024", "-m", "0", "-N", "128", "-O", "^has_journal"),
)


def _full(case: Case, folder: Path) -> Outcome:
    """A ballast leaves little room; it is removed when the log says that it is full."""
    rng = Random(case.seed)
    outcome = Outcome(case, hit=True)
    ledger = new_ledger(case.kind, case.seed, power=False)
    with _disk(folder, SMALL) as (mounted, _):
        job = _job(case, f"{mounted}/files", 0, rng)
        outcome.live(ledger, job)
        ballast = f"{mounted}/ballast"
        space = os.statvfs(mounted)
        left = rng.randrange(min(200 * KIB, space.f_bavail * space.f_frsize))
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - left)
        job = attrs.evolve(job, life=1, operations=40, ballast=ballast)
        outcome.live(ledger, job)
        room = ledger.errors.room
        if room is not None and room == ledger.acknowledged and not ledger.errors.dead:
            outcome.problems.append("the disk had space again, and nothing was accepted")
        Path(ballast).unlink(missing_ok=True)
        return _conclude(outcome, ledger, job, 2)


# -- a disk that is gone ---------------------------------------------------------------


def _gone(case: Case, folder: Path) -> Outcome:
    """The file system is shut down under the program, or read-only when it begins."""
    rng = Random(case.seed)
    outcome = Outcome(case, hit=True)
    ledger = new_ledger(case.kind, case.seed, power=True)
    with _disk(folder, FILE_SYSTEMS["ext4"]) as (mounted, device):
        job = _job(case, f"{mounted}/files", 0, rng, operations=20)
        outcome.live(ledger, job)
        job = attrs.evolve(job, life=1)
        if case.seed % 2:
            _mounts.mount(device, mounted, "ext4", _mounts.MS_REMOUNT | _mounts.MS_RDONLY)
            life = outcome.live(ledger, job)
            if not life.says("refused"):
                outcome.problems.append(f"opened on a read-only file system: {life.lines[-1:]}")
            _mounts.mount(device, mounted, "ext4", _mounts.MS_REMOUNT)
        else:
            down = _lives.Act(rng.randint(1, 60), lambda: _go_down(mounted))
            outcome.live(ledger, job, act=down)
            _mounts.unmount(mounted)
            _mounts.mount(device, mounted, "ext4")
        return _conclude(outcome, ledger, job, 2)


def _go_down(mounted: str) -> None:
    fd = os.open(mounted, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.ioctl(fd, _GOING_DOWN, struct.pack("<I", _NO_LOG_FLUSH))
    finally:
        os.close(fd)


@contextlib.contextmanager
def _disk(folder: Path, system: FileSystem) -> Iterator[tuple[str, str]]:
    """A new file system, mounted: (where, its device)."""
    _mounts.enter_private_namespace()
    image, mounted = str(folder / "image"), str(folder / "mounted")
    os.mkdir(mounted)
    _mounts.make(system, image)
    with Loop(image) as loop:
        _mounts.mount(loop.device, mounted, system.name)
        try:
            yield mounted, loop.device
        finally:
            _mounts.unmount(mounted, _mounts.MNT_DETACH)


# -- replay ----------------------------------------------------------------------------


def replay(text: str) -> int:
    case = Case.parse(text)
    if (reason := why_not(case.part)) is not None:
        return fail_usage(f"--replay {text}: {reason}")
    with _lives.scratch("realerrors") as folder:
        # Threads do not run alike twice: what happened once may take some tries.
        tries = 1
        while not (outcome := _case_in((case, folder))).problems and tries < REPLAYS:
            tries += 1
    print(f"{text}, run {tries} times: {outcome.happened or 'the error did not happen'}")
    for problem in outcome.problems:
        print(problem)
    print(f"{len(outcome.problems)} problems")
    return 1 if outcome.problems else 0
