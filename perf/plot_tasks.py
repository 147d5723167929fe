"""The README's plot, drawn from the table in docs/performance.md: `python perf/plot_tasks.py`.

Law: nothing is measured here, and no figure stands here.  A test compares the files with the table.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
SERIES: Final = {
    "trio_wal": "trio-wal",
    "plyvel, 40 threads": "LevelDB",
    "sqlite3, 40 threads": "SQLite",
    "lmdb, 40 threads": "LMDB",
    "rocksdict, 40 threads": "RocksDB",
}
"""Rows of the table, in the order of their last figures, and what they are called."""
THEMES: Final = {
    "light": {
        "text": "#1f2328", "faint": "#59636e", "grid": "#d1d9e0",
        "trio-wal": "#0969da", "LevelDB": "#8250df", "SQLite": "#bc4c00",
        "RocksDB": "#cf222e", "LMDB": "#1a7f37",
    },
    "dark": {
        "text": "#f0f6fc", "faint": "#9198a1", "grid": "#3d444d",
        "trio-wal": "#58a6ff", "LevelDB": "#bc8cff", "SQLite": "#f0883e",
        "RocksDB": "#ff7b72", "LMDB": "#3fb950",
    },
}  # fmt: skip
LEFT, RIGHT, TOP, BOTTOM = 70, 530, 52, 330
LOWEST, HIGHEST = 1_000, 400_000  # transactions per second at the ends of the axis
LINE = 19
"""Pixels between two labels."""


def table(page: str) -> dict[str, dict[int, int]]:
    """Transactions per second, by row and tasks."""
    head = re.search(r"^\| \| 1 task \|.*$", page, re.MULTILINE)
    assert head is not None
    tasks = [int(cell.replace(",", "")) for cell in re.findall(r"([\d,]+) tasks?", head[0])]
    found = {}
    for name in SERIES:
        row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", page[head.end() :], re.MULTILINE)
        assert row is not None, name
        found[name] = dict(
            zip(tasks, [int(cell.replace(",", "")) for cell in row[1].split("|")], strict=True)
        )
    return found


def x(tasks: int) -> float:
    return LEFT + (RIGHT - LEFT) * math.log(tasks) / math.log(1024)


def y(rate: int) -> float:
    share = math.log(rate / LOWEST) / math.log(HIGHEST / LOWEST)
    return BOTTOM - (BOTTOM - TOP) * share


def labels(rows: dict[str, dict[int, int]]) -> dict[str, float]:
    """How high the label of each row stands: beside its line, and none on another."""
    found: dict[str, float] = {}
    last = -math.inf
    for name in rows:
        last = max(y(rows[name][1024]), last + LINE)
        found[name] = last
    # Those that were moved down are moved up again by half, to stand around their lines, and not
    # onto the one above them.
    crowd = [name for name in rows if found[name] > y(rows[name][1024])]
    if crowd:
        names = list(rows)
        above = names.index(crowd[0]) - 1
        crowd.insert(0, names[above])
        shift = (found[crowd[-1]] - y(rows[crowd[-1]][1024])) / 2
        if above:
            shift = min(shift, found[crowd[0]] - LINE - found[names[above - 1]])
        found.update({name: found[name] - shift for name in crowd})
    return found


def draw(rows: dict[str, dict[int, int]], theme: str) -> str:
    colours = THEMES[theme]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 690 380" role="img"'
        ' font-family="system-ui, sans-serif" font-size="14">'
    )
    title = (
        f'<text x="{LEFT}" y="24" fill="{colours["text"]}" font-size="16">'
        "Durable transactions per second, one put each</text>"
    )
    lines = [head, "<title>Durable transactions per second over tasks</title>", title]
    lines += [
        f'<path d="M{LEFT} {y(rate):.1f}H{RIGHT}" stroke="{colours["grid"]}"/>'
        f'<text x="{LEFT - 8}" y="{y(rate) + 5:.1f}" text-anchor="end"'
        f' fill="{colours["faint"]}">{rate // 1000:,} k</text>'
        for rate in (3_000, 10_000, 30_000, 100_000, 300_000)
    ]
    lines += [
        f'<text x="{x(tasks):.1f}" y="{BOTTOM + 22}" text-anchor="middle"'
        f' fill="{colours["faint"]}">{tasks:,}</text>'
        for tasks in rows["trio_wal"]
    ]
    lines.append(
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 44}" text-anchor="middle"'
        f' fill="{colours["text"]}">tasks that commit at the same time</text>'
    )
    places = labels(rows)
    for name, row in reversed(rows.items()):
        label = SERIES[name]
        points = " ".join(f"{x(tasks):.1f},{y(rate):.1f}" for tasks, rate in row.items())
        width, weight = (4, 600) if label == "trio-wal" else (2, 400)
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colours[label]}"'
            f' stroke-width="{width}" stroke-linejoin="round"/>'
            f'<text x="{RIGHT + 10}" y="{places[name] + 5:.1f}" fill="{colours[label]}"'
            f' font-weight="{weight}">{label} {row[1024]:,}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    rows = table((DOCS / "performance.md").read_text("utf-8"))
    for theme in THEMES:
        (DOCS / "images" / f"tasks-{theme}.svg").write_text(draw(rows, theme), "utf-8")


if __name__ == "__main__":
    main()
