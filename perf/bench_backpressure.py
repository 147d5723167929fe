"""Back-pressure: who waits how long, what the bound follows, and what a delay is worth.

Law: `pressure` has the programs, which measure; here they are run in turns, compared and
shown.  The disks are simulated (`slow_disk`): real files whose sync takes a given time.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
import pressure
import trio
from harness import Setting, Spread
from report import Report, Requirement, number, table

DISKS_MS: Final = (0.1, 1.0, 5.0, 20.0)
LOADS: Final = (0.5, 0.9, 1.2, 2.0, 3.0)
FIXED: Final = (0.25, 0.5, 1.0)
"""Delays in syncs, of which the best is what "auto" is compared with."""

Row = dict[str, list[float]]


def _run(program: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    async def main() -> Any:
        return await program(*arguments, **options)

    return trio.run(main)


def _spread(values: list[float]) -> str:
    spread = Spread.of(values)
    return f"{number(spread.median)} ({number(spread.low)} to {number(spread.high)})"


def _require(
    report: Report, key: str, what: str, limit: float, values: list[float], *, most: bool = True,
    unit: str = "x",
) -> None:  # fmt: skip
    needed = f"at {'most' if most else 'least'} {limit:g} {'×' if unit == 'x' else unit}"
    report.requirements.append(
        Requirement(key, what, needed, limit, Spread.of(values), unit=unit, at_most=most)
    )


def _fairness(report: Report, rounds: int, seconds: float) -> None:
    shown = table(
        "10 polite tasks beside 1,000 greedy ones, queue of 100: p99 of the polite, ms",
        ["sync ms", "alone", "with writers", "without", "with : alone", "without : alone"],
    )
    ratios: list[float] = []
    data: dict[str, Row] = {}
    for sync in (1.0, 5.0, 20.0):
        rows: Row = {"alone": [], "with writers": [], "without": []}
        for _ in range(rounds):
            for name, greedy, writers in (
                ("alone", 0, True), ("with writers", 1000, True), ("without", 1000, False)
            ):  # fmt: skip
                found = _run(pressure.fairness, sync / 1e3, seconds, greedy, writers=writers)
                rows[name].append(found["p99"])
        fair = [w / a for w, a in zip(rows["with writers"], rows["alone"], strict=True)]
        unfair = [w / a for w, a in zip(rows["without"], rows["alone"], strict=True)]
        ratios += fair
        data[f"{sync:g}"] = rows
        medians = [f"{statistics.median(values) * 1e3:.1f}" for values in rows.values()]
        shown.add_row(f"{sync:g}", *medians, _spread(fair), _spread(unfair))
    report.tables.append(shown)
    report.data["fairness"] = data
    _require(report, "polite p99", "polite tasks with a writer each, p99 to alone", 3, ratios)


def _fast_lane(report: Report, rounds: int, seconds: float) -> None:
    shown = table(
        "A commit every 10 ms under 10,000 tasks: its p99",
        ["sync ms", "batches waiting", "fast lane, rounds", "ms", "without, rounds", "ms"],
    )
    reached: list[float] = []
    for sync in (1.0, 5.0):
        for large in (False, True):
            rows: dict[bool, list[Mapping[str, float]]] = {True: [], False: []}
            for _ in range(rounds):
                for high in (True, False):
                    found = _run(
                        pressure.fast_lane, sync / 1e3, seconds, high=high, large=large
                    )  # fmt: skip
                    rows[high].append(found)
            cells = []
            for high in (True, False):
                cells.append(_spread([found["p99 rounds"] for found in rows[high]]))
                cells.append(f"{statistics.median(f['p99'] for f in rows[high]) * 1e3:.1f}")
            reached += [found["p99 rounds"] for found in rows[True]]
            shown.add_row(f"{sync:g}", "60" if large else "1", *cells)
    report.tables.append(shown)
    _require(
        report, "fast lane", "the fast lane's p99 under 10,000 tasks", 3, reached, unit="rounds"
    )


def _follow(report: Report, rounds: int, seconds: float) -> None:
    shown = table(
        f'max_queue_size="auto", target {pressure.TARGET * 1e3:g} ms, 10,000 tasks',
        ["sync ms", "settled after s", "longest wait : target"],
    )
    settled: list[float] = []
    for speeds in ((0.001, 0.010, 0.001), (0.0005, 0.005, 0.0005)):
        found = [_run(pressure.follow_disk, list(speeds), seconds) for _ in range(rounds)]
        text = " → ".join(f"{speed * 1e3:g}" for speed in speeds)
        changes = [time for one in found for time in one.settled[1:]]
        settled += changes
        shown.add_row(text, _spread(changes), _spread([one.overshoot for one in found]))
        report.data[f"follow {text}"] = attrs.asdict(found[0])
    report.tables.append(shown)
    _require(report, "auto settles", "auto bound: time to settle", 2, settled, unit="s")


def _delays(report: Report, brief: bool) -> None:
    shown = table(
        "commit_delay: appends per second, relative to no delay",
        ["sync ms", "tasks", "think ms", "0", "best fixed (syncs)", "auto", "auto : better"],
    )
    against_0: list[float] = []
    against_best: list[float] = []
    rounds, seconds = (1, 0.7) if brief else (3, 1.0)
    for sync in DISKS_MS:
        for tasks in (1, 16, 128, 1024):
            for think in (0.0, sync / 4 if sync > 2 else 2.0):
                row = _delay_row(sync / 1e3, tasks, think / 1e3, seconds, rounds)
                best = max(FIXED, key=lambda share: row[share])
                better = max(row[best], row[0.0])
                against_0.append(row["auto"] / row[0.0])
                against_best.append(row["auto"] / better)
                shown.add_row(
                    f"{sync:g}", f"{tasks:,}", f"{think:g}", f"{row[0.0]:,.0f}",
                    f"{row[best] / row[0.0]:.2f} ({best:g})", f"{row['auto'] / row[0.0]:.2f}",
                    f"{row['auto'] / better:.2f}",
                )  # fmt: skip
    report.tables.append(shown)
    report.data["delays"] = {"against 0": against_0, "against the better": against_best}
    for key, what, values in (
        ("auto delay to 0", 'commit_delay="auto" to 0, the worst point', against_0),
        ("auto delay to best", 'commit_delay="auto" to the better of two, the worst point',
         against_best),
    ):  # fmt: skip
        _require(report, key, what, 0.95, [min(values)], most=False)


def _delay_row(
    sync: float, tasks: int, think: float, seconds: float, rounds: int
) -> dict[Any, float]:
    """Medians of so many runs of each, in turns."""
    rates: dict[Any, list[float]] = {delay: [] for delay in (0.0, *FIXED, "auto")}
    for _ in range(rounds):
        for delay, found in rates.items():
            warm_up = max(0.3, 150 * sync) if delay == "auto" else 0.1 + 5 * sync
            length = max(seconds, 40 * sync)
            pause = delay if delay == "auto" else delay * sync
            run = _run(pressure.delayed, sync, tasks, think, pause, length, warm_up)
            found.append(run["per second"])
    return {delay: statistics.median(found) for delay, found in rates.items()}


def _overload(report: Report, seconds: float) -> None:
    shown = table(
        f"Records of 2 kB at so many times the {pressure.RATE:,} per second that the disk takes; "
        "who finds no room for 50 ms gives up",
        ["bound", "load", "written/s", "refused", "p99 ms", "fast lane p99 ms", "waiting KiB"],
    )
    data: dict[str, dict[str, list[float]]] = {}
    for name in pressure.BOUNDS:
        loads = (2.0,) if name in pressure.PRESETS else LOADS
        for load in loads:
            found = _run(pressure.overloaded, load, seconds, name)
            for figure, value in found.items():
                data.setdefault(name, {}).setdefault(figure, []).append(value)
            shown.add_row(
                name, f"{load:g}", f"{found['per second']:,.0f}", f"{found['refused']:.0%}",
                f"{found['p99'] * 1e3:.0f}", f"{found['p99, fast lane'] * 1e3:.0f}",
                f"{found['waiting bytes'] / 1024:,.0f}",
            )  # fmt: skip
    report.tables.append(shown)
    report.data["overload"] = data


def _shedding(report: Report, seconds: float) -> None:
    found = _run(pressure.shed, 0.020, 3.0, seconds)
    shown = table(
        f"Requests at 3 times what fits for {seconds:g} s, each refused after 50 ms",
        ["offered", "accepted", "lost", "doubled", "answered after 100 ms"],
    )
    shown.add_row(
        f"{found['offered']:,.0f}", f"{found['accepted']:,.0f}", f"{found['lost']:.0f}",
        f"{found['doubled']:.0f}", f"{found['late']:.2%}",
    )  # fmt: skip
    report.tables.append(shown)
    report.data["shedding"] = found
    wrong = found["lost"] + found["doubled"]
    _require(report, "shed wrong", "shedding: lost or doubled", 0, [wrong], unit="records")
    _require(
        report, "shed late", "shedding: answered later than 100 ms", 1, [found["late"] * 100],
        unit="%",
    )  # fmt: skip


def _in_memory(report: Report, rounds: int) -> None:
    found = _run(pressure.in_memory, rounds, 1024, 4)
    shown = table(
        "1,024 tasks, files in memory: throughput, relative to the bounded queue, by turns",
        ["", "quartiles of the ratio"],
    )
    for name, what, limit in (
        ("unbounded", "bounded to unbounded, 1,024 tasks", 0.98),
        ("16 writers", "1,024 tasks through 16 writers, to none", 0.9),
    ):
        inverse = name == "unbounded"
        pairs = zip(found["bounded"], found[name], strict=True)
        values = [n / b if inverse else b / n for b, n in pairs]
        shown.add_row(what, _spread(values))
        _require(report, name, what, limit, values, most=False)
    report.tables.append(shown)
    report.data["in memory"] = found


def _ancestor(report: Report, seconds: float) -> None:
    shown = table("What the ancestor said of itself", ["", "the ancestor", "here"])
    bounded = _run(pressure.scaled, 0.005, 128, seconds, 10_000)
    unbounded = _run(pressure.scaled, 0.005, 128, seconds, float("inf"))
    one = _run(pressure.scaled, 0.005, 1, seconds, 10_000)
    tight = _run(pressure.scaled, 0.005, 128, seconds, 10)
    ratio = bounded["per second"] / unbounded["per second"]
    shown.add_row("bounded : unbounded, 128 writers, sync 5 ms", "0.16 (−84 %)", f"{ratio:.2f}")
    shown.add_row(
        "the same with a bound of 10 records", "",
        f"{tight['per second'] / unbounded['per second']:.2f}",
    )  # fmt: skip
    scale = bounded["per second"] / one["per second"]
    shown.add_row("1 to 128 writers", "“linear” (128 ×)", f"{scale:.0f} ×")
    shown.add_row("bytes waiting at a bound of 10 records of 100 bytes", "",
                  f"{tight['peak bytes']:,.0f}")  # fmt: skip
    push = _run(pressure.push, 20_000)
    shown.add_row("a push (send_nowait)", "", f"{push['us']:.1f} µs")
    report.tables.append(shown)
    sizing = table(
        "The sizing rule: a queue of margin × rate × flush time, at half of the disk's speed",
        ["margin", "records", "waited for room", "written/s"],
    )
    for margin in (0.25, 0.5, 1.0, 2.0, 4.0):
        found = _run(pressure.sized, margin, seconds)
        sizing.add_row(
            f"{margin:g}", f"{found['bound']:.0f}", f"{found['waited']:.1%}",
            f"{found['per second']:.0f}",
        )  # fmt: skip
    report.tables.append(sizing)


def run(setting: Setting) -> Report:
    """The benchmark; the directory is of no matter, as the disks are simulated."""
    report = Report("backpressure")
    brief = setting.brief
    rounds = 3 if brief else 7
    log = logging.getLogger("trio_wal")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        _in_memory(report, 60 if brief else 300)
        _fairness(report, rounds, 1.5 if brief else 5.0)
        _fast_lane(report, 2 if brief else rounds, 2.0 if brief else 5.0)
        _follow(report, 2 if brief else rounds, 3.0)
        _overload(report, 2.0 if brief else 5.0)
        _ancestor(report, 1.0 if brief else 3.0)
        _shedding(report, 60.0)
        _delays(report, brief)
    finally:
        log.setLevel(level)
    return report
