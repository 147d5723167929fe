"""Programs crashed at every file operation, and the recovery of every image (simulated).

Parts: ``simulator`` (this module's own), then other campaigns by name; without names, all
that need nothing but Python.  ``--replay CASE`` runs one case of the simulator again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count

from . import __main__ as campaigns, _simulator
from ._report import Report, add_common_arguments
from ._simulator import ENDS, Result, Simulation, report_results
from ._workloads import WORKLOADS

SHARES = {
    "simulator": 6,
    "whole": 2,
    "schedules": 2,
    "bitrot": 1,
    "hostile": 1,
    "plain": 1,
    "store": 1,
    "errors": 1,
    "leaks": 1,
    "interrupts": 1,
    "lines": 1,
    "threads": 1,
    "figures": 1,
    "repair": 1,
    "archive": 1,
    "realerrors": 1,
}
"""How the minutes are divided among the parts."""
PARTS = tuple(SHARES)

COLUMNS = {
    "workload": "workload",
    "runs": "runs",
    "operations": "ops",
    "points": "crash points",
    "images": "distinct",
    "nested": "nested",
    "deepest": "deepest",
    **ENDS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, minutes=5, parts=PARTS)
    parser.add_argument("--workload", choices=WORKLOADS, help="simulate this one only")
    parser.add_argument("--replay", metavar="CASE", help="one case of the simulator again")


def run(arguments: argparse.Namespace) -> int:
    parts = arguments.parts or PARTS
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
    return report_results(report, simulate_one, _tasks(arguments), minutes)


def replay(case: str) -> int:
    return _simulator.replay(case).report_to(Report("crash", None, {}))
