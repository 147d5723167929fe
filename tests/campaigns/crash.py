"""Programs crashed at every file operation, and the recovery of every image (simulated).

Parts: ``simulator`` (this module's own), then other campaigns by name; without names, all
that need nothing but Python.  ``--replay CASE`` runs one case of the simulator again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count

from . import __main__ as campaigns
from ._report import (
    Report,
    add_common_arguments,
    bound,
    fail_usage,
    in_processes,
    per_minute,
    progress_bar,
)
from ._simulator import Result, Simulation, replay
from ._workloads import WORKLOADS

SHARES = {
    "simulator": 6,
    "whole": 2,
    "schedules": 2,
    "bitrot": 1,
    "hostile": 1,
    "store": 1,
    "errors": 1,
    "leaks": 1,
    "interrupts": 1,
    "realerrors": 1,
}
"""How the minutes are divided among the parts."""
FINDINGS_MAX = 10
"""So many, and the campaign ends: the rest is most likely the same."""

COLUMNS = {
    "workload": "workload",
    "runs": "runs",
    "operations": "ops",
    "points": "crash points",
    "images": "distinct",
    "nested": "nested",
    "deepest": "deepest",
    "lost": "lost",
    "partial": "partial",
    "other": "other",
    "per_minute": "per minute",
    "bound": "3/N",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, minutes=5)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(SHARES)}; without: all"
    )
    parser.add_argument("--workload", choices=WORKLOADS, help="simulate this one only")
    parser.add_argument("--replay", metavar="CASE", help="one case of the simulator again")


def run(arguments: argparse.Namespace) -> int:
    if arguments.replay is not None:
        return _replay(arguments)
    known = [name for name in SHARES if name == "simulator" or name in campaigns.names()]
    parts = arguments.parts or known
    for name in parts:
        if name not in known:
            return fail_usage(f"there is no part {name!r}, only {', '.join(known)}")
    total = sum(SHARES[name] for name in parts)
    code = 0
    for name in parts:
        minutes = arguments.minutes * SHARES[name] / total
        if name == "simulator":
            code = max(code, simulate(arguments, minutes))
        else:
            code = max(code, _run_other(name, arguments, minutes))
    return code


def _run_other(name: str, arguments: argparse.Namespace, minutes: float) -> int:
    """Another campaign, with its share of the minutes."""
    given = ["--minutes", f"{minutes:.3f}", "--seed", str(arguments.seed)]
    given += ["--workers", str(arguments.workers)]
    if arguments.output is not None:
        stem = arguments.output
        given += ["--output", str(stem.with_name(f"{stem.stem}-{name}{stem.suffix}"))]
    parsed, _ = campaigns.parser_of(name).parse_known_args(given)
    return int(campaigns.load(name).run(parsed))


def _tasks(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    names = [arguments.workload] if arguments.workload else list(WORKLOADS)
    for seed in count(arguments.seed):
        for name in names:
            yield name, seed


def simulate_one(task: tuple[str, int]) -> Result:
    """A workload with a seed, crashed everywhere; in a process of its own."""
    name, seed = task
    return Simulation(WORKLOADS[name], seed).run()


def simulate(arguments: argparse.Namespace, minutes: float) -> int:
    report = Report("crash", arguments, COLUMNS)
    rows: dict[str, Result] = {}
    total = Result("all")
    with progress_bar("simulator", minutes=minutes, count=arguments.count) as bar:

        def over() -> bool:
            return bar.over() or len(report.findings) >= FINDINGS_MAX

        for result in in_processes(simulate_one, _tasks(arguments), arguments.workers, over):
            rows.setdefault(result.workload, Result(result.workload)).add(result)
            total.add(result)
            if result.first_failure is not None:
                report.find(result.first_failure.what, result.first_failure.replay)
            bar.advance(
                result.points,
                f"{total.points:,} points, {total.nested:,} nested, {len(report.findings)} found",
            )
        seconds = bar.seconds
    for row in (*rows.values(), total):
        report.add(
            workload=row.workload,
            runs=row.runs,
            operations=row.operations,
            points=row.points,
            images=row.images,
            nested=row.nested,
            deepest=row.deepest,
            lost=row.lost,
            partial=row.partial,
            other=row.other,
            per_minute=per_minute(total.points + total.nested, seconds) if row is total else None,
            bound=bound(row.points + row.nested),
        )
    return report.finish()


def _replay(arguments: argparse.Namespace) -> int:
    try:
        result = replay(arguments.replay)
    except ValueError as exc:
        return fail_usage(str(exc))
    report = Report("crash", arguments, {})
    if result.first_failure is not None:
        report.find(result.first_failure.what, result.first_failure.replay)
    return report.finish()
