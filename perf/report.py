"""What benchmarks have found: tables, what must be reached, ratios kept, figures saved, plots.

Law: nothing is measured here.  A plot is drawn from the data as it was saved.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from harness import ROOT, Comparison, Spread
from rich.console import Console
from rich.table import Table

RESULTS: Final = ROOT / "results"
"""Not in git: results belong to one machine and one moment."""
RATIOS: Final = ROOT / "ratios.json"
"""In git: ratios travel better than seconds.  By mode: brief, or at length."""
SAME: Final = ("processor", "cores", "system", "file system", "python")
"""Where these are the same, it counts as the same machine."""
REGRESSION: Final = 0.15
"""A ratio that fell by more than this share of the stored one is reported."""

console: Final = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


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

    def require(
        self,
        key: str,
        what: str,
        limit: float,
        measured: Spread,
        *,
        at_most: bool,
        unit: str = "x",
    ) -> None:
        """One more requirement, a ratio unless it has another unit."""
        needed = f"{'at most' if at_most else 'at least'} {limit:g} {unit}".replace(" x", " ×")
        self.requirements.append(Requirement(key, what, needed, limit, measured, unit, at_most))


def _number(value: float) -> str:
    if value >= 1_000_000:
        return f"{value / 1e6:.2f} M"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


number: Final = _number


def spread_text(spread: Spread) -> str:
    return f"{number(spread.median)}  ({number(spread.low)} to {number(spread.high)})"


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


def result_file(name: str) -> Path:
    """Where the figures of a benchmark's last run are."""
    return RESULTS / f"{name}.json"


def save(report: Report, facts: Mapping[str, str]) -> None:
    """The figures, as JSON."""
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
    result_file(report.name).write_text(text + "\n")


def _plain(value: object) -> object:
    if isinstance(value, (Spread, Comparison)):
        return attrs.asdict(value)
    raise TypeError(f"{type(value).__name__} is nothing for JSON")
