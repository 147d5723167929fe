"""What every benchmark measures with: fair turns, medians, the machine's description.

Law: nothing is shown here: tables, requirements and plots are `report`'s.  What is compared is
measured side by side.  One trial is one short run of one contender; contenders take turns,
forwards in one round and backwards in the next, so that a machine that becomes slower or
faster in between favours nobody.  A ratio is taken within a round and then the median over
the rounds, never from two medians.

A trial during which other processes used much of the machine says nothing about the
contender: it is repeated, a bounded number of times, and the rest is reported as it is.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Final

import attrs

import trio_wal

ROOT: Final = Path(__file__).resolve().parent
FOREIGN_MAX: Final = 0.25
"""Cores that other processes may use during a trial, on average.  The kernel's own threads
are among them: writing through a journal costs some 0.1."""
REPEATS_MAX: Final = 2
"""How often a disturbed trial is repeated."""
TOUCHED_BYTES: Final = 1 << 30
"""Page cache that is used once beforehand, and given back."""

MiB: Final = 1 << 20

# -- trials -----------------------------------------------------------------------


@attrs.frozen
class Contender:
    name: str
    run: Callable[[], Mapping[str, float]]
    """One trial: figures by name.  The first is the one that ratios are made of."""


@attrs.frozen
class Spread:
    """A median and what lies around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Median, least and greatest; quartiles from eight values on, where one outlier
        would otherwise stand for all."""
        if len(values) < 8:
            return cls(statistics.median(values), min(values), max(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@attrs.define
class Comparison:
    """Trials of several contenders, one list entry a round."""

    rounds: int = 0
    trials: dict[str, list[dict[str, float]]] = attrs.Factory(dict)
    disturbed: int = 0
    """Trials that were kept although other processes disturbed them."""

    def values(self, name: str, figure: str | None = None) -> list[float]:
        trials = self.trials[name]
        return [trial[figure or next(iter(trial))] for trial in trials]

    def spread(self, name: str, figure: str | None = None) -> Spread:
        return Spread.of(self.values(name, figure))

    def median(self, name: str, figure: str | None = None) -> float:
        return self.spread(name, figure).median

    def ratio(self, name: str, to: str, figure: str | None = None) -> Spread:
        """Of two contenders, round by round."""
        pairs = zip(self.values(name, figure), self.values(to, figure), strict=True)
        return Spread.of([mine / theirs for mine, theirs in pairs])


def compare(contenders: Sequence[Contender], rounds: int) -> Comparison:
    """Let the contenders take turns."""
    result = Comparison(rounds, {contender.name: [] for contender in contenders})
    for number in range(rounds):
        turns = contenders if number % 2 == 0 else list(reversed(contenders))
        for contender in turns:
            figures, foreign = _undisturbed(contender)
            result.trials[contender.name].append({**figures, "foreign_cores": foreign})
            result.disturbed += foreign > FOREIGN_MAX
    return result


def _undisturbed(contender: Contender) -> tuple[Mapping[str, float], float]:
    attempts: list[tuple[float, Mapping[str, float]]] = []
    while True:
        gc.collect()
        watch = ForeignLoad()
        figures = contender.run()
        foreign = watch.cores()
        attempts.append((foreign, figures))
        if foreign <= FOREIGN_MAX:
            return figures, foreign
        if len(attempts) > REPEATS_MAX:
            # The least disturbed, never the fastest.
            foreign, figures = min(attempts, key=lambda attempt: attempt[0])
            return figures, foreign


class ForeignLoad:
    """How many cores were busy with something other than this process and its children."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy = self._read()

    @staticmethod
    def _read() -> float:
        own = os.times()
        mine = own.user + own.system + own.children_user + own.children_system
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return 0.0
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - mine

    def cores(self) -> float:
        seconds = time.perf_counter() - self._start
        return max(0.0, self._read() - self._busy) / max(seconds, 1e-9)


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that this share of the ordered values does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- where ------------------------------------------------------------------------


@attrs.frozen
class Setting:
    """What a benchmark is told."""

    directory: Path
    """On a real disk."""
    brief: bool
    """Everything within minutes; else one benchmark at length."""
    before: str | None = None
    """A checkout of another commit, to compare with."""

    @property
    def mode(self) -> str:
        return "brief" if self.brief else "at length"

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory of its own, gone afterwards."""
        path = Path(tempfile.mkdtemp(prefix="trio-wal-perf-", dir=self.directory))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def touch_memory(directory: Path) -> None:
    """Have the host of a virtual machine provide memory before anything is measured.

    A page that the guest uses for the first time costs up to 8 us there, ten times the
    copy of its bytes; files written first would pay for it, files written later not.
    """
    piece = bytes(16 * MiB)
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(0, TOUCHED_BYTES, len(piece)):
            file.write(piece)


def file_system(path: Path) -> str:
    """Type and device of the file system that holds ``path``."""
    best = ("", "unknown")
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return best[1]
    for line in mounts:
        before, after = line.split(" - ", 1)
        point = before.split()[4].encode().decode("unicode_escape")
        kind, device = after.split()[:2]
        inside = path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= len(best[0]):
            best = (point, f"{kind} on {os.path.basename(device)}")
    return best[1]


def scratch_directory(wanted: str | None) -> Path:
    """Where the logs go: a file system in memory would make every sync free."""
    if wanted is not None:
        return Path(wanted).resolve()
    temporary = Path(tempfile.gettempdir()).resolve()
    if file_system(temporary).split()[0] in ("tmpfs", "ramfs", "unknown"):
        return Path.cwd()
    return temporary


def machine(directory: Path) -> dict[str, str]:
    """What a reader must know to judge the figures."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "file system": file_system(directory),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: metadata.version(name) for name in ("trio", "attrs", "google-crc32c")},
        "trio-wal": f"{trio_wal.__version__}{_commit()}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that is checked out, with a plus where the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../trio_wal")
        return f" ({git('rev-parse', '--short=12', 'HEAD')}{'+' if changed else ''})"
    except (OSError, subprocess.SubprocessError):
        return ""
