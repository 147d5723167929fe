"""What every benchmark needs: fair turns, medians, the machine's description, tables, plots.

Law: what is compared is measured side by side.  One trial is one short run of one
contender; contenders take turns, forwards in one round and backwards in the next, so
that a machine that becomes slower or faster in between favours nobody.  A ratio is taken
within a round and then the median over the rounds, never from two medians.

A trial during which other processes used much of the machine says nothing about the
contender: it is repeated, a bounded number of times, and the rest is reported as it is.
"""

from __future__ import annotations

import contextlib
import gc
import json
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
from typing import Any, Final

import attrs
from rich.console import Console
from rich.table import Table

import trio_wal

ROOT: Final = Path(__file__).resolve().parent
RESULTS: Final = ROOT / "results"
"""Not in git: results belong to one machine and one moment."""
RATIOS: Final = ROOT / "ratios.json"
"""In git: ratios travel better than seconds.  By mode: brief, or at length."""
SAME: Final = ("processor", "cores", "system", "file system", "python")
"""Where these are the same, it counts as the same machine."""
REGRESSION: Final = 0.15
"""A ratio that fell by more than this share of the stored one is reported."""
FOREIGN_MAX: Final = 0.25
"""Cores that other processes may use during a trial, on average.  The kernel's own threads
are among them: writing through a journal costs some 0.1."""
REPEATS_MAX: Final = 2
"""How often a disturbed trial is repeated."""
TOUCHED_BYTES: Final = 1 << 30
"""Page cache that is used once beforehand, and given back."""

MiB: Final = 1 << 20

console: Final = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


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


# -- what was found ---------------------------------------------------------------


@attrs.frozen
class Requirement:
    """One line of the table of what must be reached."""

    key: str
    """Under this name the figure is kept in ``ratios.json``."""
    what: str
    needed: str
    limit: float
    measured: Spread
    unit: str = "x"
    at_most: bool = False

    @property
    def reached(self) -> bool:
        if self.at_most:
            return self.measured.median <= self.limit
        return self.measured.median >= self.limit

    @property
    def text(self) -> str:
        measured = self.measured
        return (
            f"{_number(measured.median)} {self.unit}".replace(" x", " ×")
            + f"  ({_number(measured.low)} to {_number(measured.high)})"
        )


@attrs.define
class Report:
    """What one benchmark found."""

    name: str
    tables: list[Table] = attrs.Factory(list)
    notes: list[str] = attrs.Factory(list)
    data: dict[str, Any] = attrs.Factory(dict)
    requirements: list[Requirement] = attrs.Factory(list)
    plots: dict[str, Callable[[Any, Any], None]] = attrs.Factory(dict)
    """By file name: draws into a matplotlib figure, given it and the data as it was saved."""


def _number(value: float) -> str:
    if value >= 1_000_000:
        return f"{value / 1e6:.2f} M"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


number: Final = _number


def table(title: str, columns: Sequence[str]) -> Table:
    """The first column is the subject, the others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place else "left", overflow="fold")
    return made


def show(report: Report) -> None:
    for made in report.tables:
        console.print(made)
    for note in report.notes:
        console.print(note, style="dim")
    console.print()


def show_requirements(requirements: Sequence[Requirement]) -> None:
    made = table("Must reach", ["what", "needed", "measured, median (spread)", "reached"])
    made.columns[1].justify = made.columns[2].justify = made.columns[3].justify = "left"
    for requirement in requirements:
        made.add_row(
            requirement.what,
            requirement.needed,
            requirement.text,
            "[green]yes[/]" if requirement.reached else "[bold red]no[/]",
        )
    console.print(made)


def show_regressions(requirements: Sequence[Requirement], facts: Mapping[str, str]) -> None:
    """Told, never failed: the machine may be another one."""
    for line in regressions(requirements, facts):
        console.print(line, style="bold yellow" if line.startswith("regression") else "dim")


def regressions(requirements: Sequence[Requirement], facts: Mapping[str, str]) -> list[str]:
    """Each ratio that is worse than the stored one, a line each; and with what it was compared,
    where that is not what was measured here.

    A run is compared with one in the same mode: the slowest of a short run and of a long one
    are two things.
    """
    stored = _stored().get(facts["mode"])
    if stored is None:
        return [f"No ratios are stored that were measured {_how(facts['mode'])}."]
    lines = []
    for requirement in requirements:
        reference = stored["ratios"].get(requirement.key)
        if not _is_ratio(requirement) or not reference:
            continue
        change = requirement.measured.median / reference - 1
        if (change if requirement.at_most else -change) > REGRESSION:
            lines.append(
                f"regression: {requirement.what}: {number(requirement.measured.median)}, "
                f"stored {number(reference)} ({change:+.0%})"
            )
    if others := _differences(stored["machine"], facts):
        lines.append(f"The stored ratios are another machine's: {', '.join(others)}.")
    return lines


def store_ratios(requirements: Sequence[Requirement], facts: Mapping[str, str]) -> None:
    """Keep these figures as the ones to compare with.

    What was stored for the same mode remains where this run did not measure it, but not
    beside figures of another machine.
    """
    stored = _stored()
    mode = facts["mode"]
    ratios = {r.key: round(r.measured.median, 3) for r in requirements if _is_ratio(r)}
    if mode in stored and not _differences(stored[mode]["machine"], facts):
        ratios = stored[mode]["ratios"] | ratios
    stored[mode] = {"ratios": ratios, "machine": dict(facts)}
    RATIOS.write_text(json.dumps(stored, indent=2) + "\n")


def _stored() -> dict[str, Any]:
    """By mode: the ratios, and the machine on which they were measured."""
    try:
        stored: dict[str, Any] = json.loads(RATIOS.read_text())
    except FileNotFoundError:
        return {}
    return stored


def _is_ratio(requirement: Requirement) -> bool:
    """Seconds and bytes are one machine's, and are not stored."""
    return requirement.unit == "x"


def _how(mode: str) -> str:
    return "briefly" if mode == "brief" else mode


def _differences(stored: Mapping[str, str], facts: Mapping[str, str]) -> list[str]:
    return [f"{name}: {stored.get(name)}" for name in SAME if stored.get(name) != facts.get(name)]


def save(report: Report, facts: Mapping[str, str], plots: Path) -> None:
    """The figures as JSON, the plots as PNG."""
    RESULTS.mkdir(exist_ok=True)
    document = {
        "benchmark": report.name,
        "machine": dict(facts),
        "data": report.data,
        "requirements": [
            {**attrs.asdict(requirement), "reached": requirement.reached}
            for requirement in report.requirements
        ],
    }
    text = json.dumps(document, indent=1, default=_plain)
    (RESULTS / f"{report.name}.json").write_text(text + "\n")
    if report.plots:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib.figure import Figure

        plots.mkdir(parents=True, exist_ok=True)
        data = json.loads(text)["data"]
        for name, draw in report.plots.items():
            figure = Figure(figsize=(7.2, 4.2), dpi=90, layout="constrained")
            draw(figure, data)
            figure.savefig(plots / name)


def _plain(value: object) -> object:
    if isinstance(value, (Spread, Comparison)):
        return attrs.asdict(value)
    raise TypeError(f"{type(value).__name__} is nothing for JSON")
