"""The other side of `_program`: forks a life, listens to it, kills it at a chosen moment.

Law: the process that forks has no other threads.  All that a life said before it died is
heard: what stands in a pipe outlives who wrote it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import attrs

from . import _program
from ._ledger import Ledger, new_ledger
from ._program import Job


@attrs.frozen
class Kill:
    """When a life is killed: ``delay`` seconds after its n-th message, or after one of a name."""

    messages: int = 0
    name: str = ""
    delay: float = 0.0


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


# -- a failing case, kept --------------------------------------------------------------


def keep(where: Path, files: dict[str, Path], job: Job, said: list[str], last: list[str]) -> None:
    """Everything that `replay` needs: the files before and after the life that showed it, what
    lives before it had said, and what it said."""
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    for name, path in files.items():
        if path.exists():
            shutil.copytree(path, where / name)
    for name, lines in (("said", said), ("last", last)):
        (where / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (where / "job.json").write_text(job.json() + "\n", encoding="utf-8")


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
    }
    if kind == "database":
        found["checkpoint_bytes"] = rng.choice((4 << 10, 16 << 10, 64 << 10))
        found["map_size"] = 1 << 20
    return found
