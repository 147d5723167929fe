"""The plots of what the benchmarks have found, from the JSON that they leave.

Law: nothing is measured here.  `python perf/plots.py [--plots DIRECTORY]` draws those of the last
runs again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import bench_backpressure
import bench_memory
import bench_recovery
import bench_scale
import bench_tails
import bench_transactions
import job_queue
import load
import peers
import pressure
from report import RESULTS, result_file

Draw = Callable[[Any, dict[str, Any]], None]
"""Into a matplotlib figure, given it and the data as it was saved."""


def draw(name: str, plots: Path) -> list[Path]:
    """Those of a benchmark's last run, as PNG; of parts that it has left out there are none."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.figure import Figure

    data = json.loads(result_file(name).read_text())["data"]
    drawn: list[Path] = []
    for key, file_name, draw_into in PLOTS.get(name, ()):
        if key in data:
            figure = Figure(figsize=(7.2, 4.2), dpi=90, layout="constrained")
            draw_into(figure, data)
            plots.mkdir(parents=True, exist_ok=True)
            figure.savefig(plots / file_name)
            drawn.append(plots / file_name)
    return drawn


def _append_rates(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    appends = data["appends"]
    for name, style in (
        ("ceiling", "k--"),
        ("log", "C0o-"),
        ("log, unbounded queue", "C1x:"),
        ("threads, written", "C3s-"),
    ):
        points = [(row["tasks"], row["per second"].get(name)) for row in appends]
        points = [(tasks, spread) for tasks, spread in points if spread is not None]
        label = {"threads, written": "a thread call each"}.get(name, name)
        axes.errorbar(
            [tasks for tasks, _ in points],
            [spread["median"] for _, spread in points],
            yerr=[
                [spread["median"] - spread["low"] for _, spread in points],
                [spread["high"] - spread["median"] for _, spread in points],
            ],
            fmt=style,
            label=label,
            capsize=2,
            markersize=4,
        )
    tasks = [row["tasks"] for row in appends]
    axes.plot(
        tasks,
        [row["tasks"] * row["per second"]["disk, written"]["median"] for row in appends],
        color="0.6",
        label="bare disk × records a batch",
    )
    axes.set(
        xscale="log", yscale="log", xlabel="tasks", ylabel="durable appends per second",
        ylim=(1e3, 2e6), title="append, 100 bytes",
    )  # fmt: skip
    axes.set_xticks(tasks, [str(count) for count in tasks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _append_latency(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    appends = data["appends"]
    tasks = [row["tasks"] for row in appends]
    for name, style in (("p50", "C0o-"), ("p99", "C1s-"), ("p99.9", "C3^-")):
        axes.plot(
            tasks, [row["latency ms"][name] for row in appends], style, label=name, markersize=4
        )
    axes.set(xscale="log", yscale="log", xlabel="tasks", ylabel="ms", title="latency of append")
    axes.set_xticks(tasks, [str(count) for count in tasks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _overload(figure: Any, data: dict[str, Any]) -> None:
    panels = figure.subplots(1, 3)
    for name, found in data["overload"].items():
        if name in pressure.PRESETS:
            continue
        for axes, key, scale in zip(
            panels, ("per second", "p99", "waiting bytes"), (1, 1e3, 1 / 1024), strict=True
        ):
            axes.plot(
                bench_backpressure.LOADS,
                [value * scale for value in found[key]],
                "o-",
                label=name,
                ms=3,
            )
    found = data["overload"]["250 records"]["p99, fast lane"]
    panels[1].plot(
        bench_backpressure.LOADS, [value * 1e3 for value in found], "k--", label="fast lane", ms=3
    )
    titles = ("written per second", "p99 of a record, ms", "waiting, KiB")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("load : disk", fontsize=8)
        axes.grid(alpha=0.3)
    for axes in panels[1:]:
        axes.set_yscale("log")
    panels[1].legend(fontsize="x-small")


def _auto_bound(figure: Any, data: dict[str, Any]) -> None:
    found = data["follow 1 → 10 → 1"]
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(found["times"], [wait * 1e3 for wait in found["waits"]], ".-", ms=3)
    target = pressure.TARGET * 1e3
    above.axhspan(target / 2, target * 2, alpha=0.15)
    above.set(ylabel="wait, ms", yscale="log", title="a disk of 1, 10 and 1 ms, target 10 ms")
    below.plot(found["times"], found["bounds"], ".-", ms=3, color="C1")
    below.set(ylabel="bound, records", xlabel="s", yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.3)


def _memory(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    for name, style in zip(bench_memory.CASES, ("C0o-", "C1s--", "C3x:"), strict=True):
        loads = data[name]["loads"]
        axes.plot(
            [row["sends"] for row in loads],
            [row["growth MiB"]["median"] for row in loads],
            style,
            label=name,
            markersize=4,
        )
    axes.axhline(
        data[bench_memory.DEFAULT]["limit MiB"], color="0.6", linestyle="--", label="the limit"
    )
    axes.set(
        xscale="log", yscale="log", xlabel=f"sends of {bench_memory.RECORD_BYTES} bytes",
        ylabel="growth of the process, MiB", title="memory while the disk stalls",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _recovery(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = data["over size"]
    styles = ("C3o-", "C0o-", "C3s:", "C0s:")
    for name, style in zip(rows[0]["seconds"], styles, strict=True):
        axes.plot(
            [row["records"] for row in rows],
            [row["seconds"][name]["median"] * 1e3 for row in rows],
            style,
            label=name,
            markersize=4,
        )
    axes.set(
        xscale="log", yscale="log",
        xlabel=f"records of {bench_recovery.RECORD_BYTES} bytes", ylabel="ms",
        title="opening: everything checked, or as ordinarily the newest 32 MiB",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _tasks(figure: Any, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    for place, (kind, what) in enumerate(bench_scale.KINDS.items()):
        rows = data["tasks"][kind]
        tasks = [row["tasks"] for row in rows]
        left.plot(
            tasks,
            [1e6 / row["per second"]["median"] for row in rows],
            f"C{place}o-",
            label=f"{what}: µs",
        )
        left.plot(
            tasks,
            [row["bytes a task"]["median"] / 1000 for row in rows],
            f"C{place}s:",
            label=f"{what}: kB",
        )
        if kind != bench_scale.CEILING:
            for share, line in (("p50 ms", "o-"), ("p99 ms", "^:")):
                right.plot(
                    tasks,
                    [row[share]["median"] for row in rows],
                    f"C{place}{line}",
                    label=f"{what}: {share.removesuffix(' ms')}",
                )
    left.set(title="a commit, µs; a waiting task, kB", xlabel="tasks")
    right.set(title="latency, ms", xlabel="tasks")
    _log_log(left, right)


def _keys(figure: Any, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    rows = data["keys"]
    keys = [row["keys"] for row in rows]
    left.plot(keys, [statistics.median(row["get us"]) for row in rows], "C0o-", label="get")
    left.plot(keys, [row["scan us"] for row in rows], "C1s-", label="scan, a key")
    left.plot(
        keys, [1e6 / row["puts per second"] for row in rows], "C2^-",
        label=f"put, {bench_scale.PUT_TASKS} tasks",
    )  # fmt: skip
    left.plot(keys, [1e6 / row["loaded per second"] for row in rows], "C3x-", label="loading")
    shuffled = [(row["keys"], row["shuffled"]) for row in rows if row["shuffled"] is not None]
    left.plot(
        [count for count, _ in shuffled],
        [1e6 / figures["loaded per second"] for _, figures in shuffled],
        "C3x:",
        label="loading in no order",
    )
    left.set(title="µs each", xlabel="keys")
    right.plot(keys, [statistics.median(row["open ms"]) for row in rows], "C4o-", label="open, ms")
    right.plot(
        keys,
        [row["RssAnon"] / bench_scale.MB for row in rows],
        "C5s-",
        label="own memory, bench_scale.MB",
    )
    right.plot(
        keys,
        [row["RssFile"] / bench_scale.MB for row in rows],
        "C6s:",
        label="LMDB's pages, bench_scale.MB",
    )
    right.plot(
        keys,
        [row["store bytes"] / bench_scale.MB for row in rows],
        "0.5",
        label="LMDB's file, bench_scale.MB",
    )
    right.set(title="opening and memory", xlabel="keys")
    _log_log(left, right)


def _logs(figure: Any, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    rows = data["logs"]
    sizes = [row["bytes"] / bench_scale.MB for row in rows]
    for how, color in (("warm", "C0"), ("cold", "C1")):
        ends = [bench_scale.by_end(row, how) for row in rows]
        for place, line, what in ((0, "o-", "best end"), (-1, "^--", "worst end")):
            left.plot(
                sizes, [end[place]["median"] for end in ends], f"{color}{line}",
                label=f"{how}, {what}",
            )  # fmt: skip
    left.axhline(bench_scale.OPEN_MS_MAX, color="0.6", linestyle=":", label="at most")
    left.set(title="opening, closed in order: ms", xlabel="bench_scale.MB of log")
    for figures, style, label in (
        (
            [statistics.median(row["read warm ms"]) for row in rows],
            "C0o-",
            f"{bench_scale.MIDDLE_RECORDS:,} read, warm",
        ),
        (
            [row["read cold ms"] for row in rows],
            "C1o-",
            f"{bench_scale.MIDDLE_RECORDS:,} read, cold",
        ),
        ([row["truncate ms"] for row in rows], "C2s-", "truncate_before the middle"),
        ([statistics.median(row["close ms"]) for row in rows], "C3^-", "close"),
    ):
        right.plot(sizes, figures, style, label=label)
    right.set(title="reading, dropping, closing: ms", xlabel="bench_scale.MB of log")
    _log_log(left, right)


def _units(figure: Any, data: dict[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    rows = data["units"]
    records = [row["records"] for row in rows]
    left.plot(
        records, [row["records"] / row["per second"]["median"] * 1e3 for row in rows], "C0o-",
        label="append_many, ms",
    )  # fmt: skip
    left.set(title="one unit, durable: ms", xlabel="records")
    right.plot(
        records, [row["growth"]["median"] / bench_scale.MB for row in rows], "C1o-", label="growth"
    )
    right.plot(
        records,
        [count * len(load.RECORD) / bench_scale.MB for count in records],
        "0.5",
        label="payload",
    )
    right.set(title="memory at its peak, bench_scale.MB", xlabel="records")
    _log_log(left, right)


def _log_log(*all_axes: Any) -> None:
    from matplotlib.ticker import LogLocator

    for axes in all_axes:
        axes.set(xscale="log", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(_tick)
        sizes = axes.get_lines()[0].get_xdata()
        axes.set_xticks(sizes, [_tick(size, None) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)


def _tick(value: float, _place: object) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value:,.6g}"


def _queue_heads(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    rows = data["heads"]
    labels = [f"{'stored' if r['stored'] else 'new'}{', shuffled' if r['shuffled'] else ''}"
              for r in rows]  # fmt: skip
    for color, moment in enumerate(job_queue.MOMENTS):
        for reader, marker in zip(job_queue.READERS, "os^x", strict=True):
            axes.plot(
                labels, [job_queue.times(row, moment, reader) for row in rows], f"C{color}{marker}",
                label=f"{moment}, {reader}",
            )  # fmt: skip
    axes.axhline(job_queue.RATIO_MAX, color="0.6", linestyle=":", label="at most")
    axes.set(yscale="log", title="scan(limit=1) behind deleted keys, times an empty database's")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)


def _queue_jobs(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots()
    for name, rates in data["jobs"].items():
        axes.plot(
            [(n + 0.5) * job_queue.SLICE_SECONDS for n in range(len(rates))], rates, label=name
        )
    axes.set(title="a queue of jobs: jobs per second", xlabel="seconds")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _tails(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    tails = data["tails"]
    names = list(tails)[::-1]
    for field, marker in (("median", "o"), ("p99", "s"), ("slowest", "^")):
        values = [tails[name][field]["median"] * 1e3 for name in names]
        axes.plot(values, range(len(names)), marker, label=field, markersize=5)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(
        xscale="log",
        xlabel="ms",
        title=f"latency of commits of {bench_tails.TASKS} tasks, and beside what",
    )
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize="small")


def _transactions(figure: Any, data: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    axes = figure.subplots()
    shown = data["puts"]
    tasks = [entry["tasks"] for entry in shown]
    for name in shown[0]["per second"]:
        rates = [entry["per second"].get(name, {}).get("median") for entry in shown]
        axes.plot(tasks, rates, marker="o", markersize=3, **_style(name))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tasks",
        ylabel="durable transactions a second",
        title="One put a transaction",
    )
    axes.set_xticks(tasks, [str(count) for count in tasks])
    axes.grid(visible=True, alpha=0.3)
    entries = [Line2D([], [], label=name, **style) for name, style in _OURS.items()]
    entries += [
        Line2D([], [], label=peer.name, color=_peer_color(peer.name)) for peer in peers.PEERS
    ]
    entries += [
        Line2D([], [], label=f"a peer, {arrangement}", color="0.3", linestyle=line)
        for arrangement, line in _LINES.items()
    ]
    figure.legend(handles=entries, fontsize=8, loc="outside right upper")


_OURS: Final[Mapping[str, dict[str, Any]]] = {
    bench_transactions.DATABASE: {"color": "C0", "linestyle": "-", "linewidth": 2.5},
    bench_transactions.PUT: {"color": "C0", "linestyle": "--", "linewidth": 1.5},
    bench_transactions.LOG: {"color": "0.5", "linestyle": "--", "linewidth": 1.5},
    bench_transactions.LOG_IN_LOOP: {"color": "0.5", "linestyle": "-.", "linewidth": 1.5},
    bench_transactions.CEILING: {"color": "k", "linestyle": ":", "linewidth": 1.0},
}
_LINES: Final = dict(zip(peers.ARRANGEMENTS, (":", "--", "-", "-."), strict=True))
"""A colour a peer, a line an arrangement."""


def _peer_color(name: str) -> str:
    return f"C{1 + [peer.name for peer in peers.PEERS].index(name)}"


def _style(name: str) -> dict[str, Any]:
    if name in _OURS:
        return _OURS[name]
    peer, arrangement = name.split(", ")
    return {"color": _peer_color(peer), "linestyle": _LINES[arrangement], "linewidth": 1.0}


PLOTS: Final[Mapping[str, tuple[tuple[str, str, Draw], ...]]] = {
    "append": (
        ("appends", "append.png", _append_rates),
        ("appends", "append-latency.png", _append_latency),
    ),
    "backpressure": (
        ("overload", "backpressure-overload.png", _overload),
        ("follow 1 → 10 → 1", "backpressure-auto.png", _auto_bound),
    ),
    "memory": ((bench_memory.DEFAULT, "memory.png", _memory),),
    "recovery": (("over size", "recovery.png", _recovery),),
    "scale": (
        ("tasks", "scale-tasks.png", _tasks),
        ("keys", "scale-keys.png", _keys),
        ("logs", "scale-logs.png", _logs),
        ("units", "scale-units.png", _units),
        ("heads", "scale-heads.png", _queue_heads),
        ("jobs", "scale-jobs.png", _queue_jobs),
    ),
    "tails": (("tails", "tails.png", _tails),),
    "transactions": (("puts", "transactions.png", _transactions),),
}
"""By benchmark: (what its data must have, file name, how)."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Plots of the last benchmarks.")
    parser.add_argument("--plots", default=RESULTS, type=Path, help="where they go: %(default)s")
    arguments = parser.parse_args()
    for name in PLOTS:
        if result_file(name).exists():
            for path in draw(name, arguments.plots):
                print(path)


if __name__ == "__main__":
    main()
