"""What campaigns share: options, a progress bar, processes, the closing table, the JSON.

Law: nothing here knows what is tested.  Works without a terminal: there the progress is a
line now and then.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import attrs
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")
R = TypeVar("R")

LINE_SECONDS = 20.0
"""Without a terminal the progress is told this often."""
ALIKE_MAX = 2
"""Findings, of failures that are alike."""
MEMORY = "/dev/shm"
NARROW = 130
"""Columns of the tables where there is no terminal."""


# -- options ----------------------------------------------------------------------


def add_common_arguments(
    parser: argparse.ArgumentParser,
    *,
    minutes: float | None = None,
    count: int | None = None,
    workers: bool = True,
    parts: Iterable[str] = (),
) -> None:
    """The options that all campaigns have; ``minutes`` or ``count`` is the default budget."""
    if parts:
        parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all")
    parser.add_argument("--minutes", type=float, default=minutes, help="how long (%(default)s)")
    parser.add_argument("--count", type=int, default=count, help="how many cases (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of everything random (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON")
    if workers:
        parser.add_argument(
            "--workers", type=int, default=cores(), help="processes (%(default)s, the cores)"
        )


def cores() -> int:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -- progress ---------------------------------------------------------------------


@attrs.define(eq=False)
class Bar:
    """How far a campaign is: of a time budget, of a count, or of whichever ends first."""

    _progress: Progress
    _title: str
    _seconds: float | None
    _count: int | None
    started: float = attrs.Factory(time.monotonic)
    done: int = 0
    _told: float = attrs.Factory(time.monotonic)
    _task: Any = None

    def __attrs_post_init__(self) -> None:
        self._task = self._progress.add_task(self._title, total=1.0, note="")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def over(self) -> bool:
        """Whether the budget is used up."""
        return (self._seconds is not None and self.seconds >= self._seconds) or (
            self._count is not None and self.done >= self._count
        )

    def advance(self, cases: int = 1, note: str = "") -> None:
        self.done += cases
        share = 0.0
        if self._seconds:
            share = self.seconds / self._seconds
        if self._count:
            share = max(share, self.done / self._count)
        self._progress.update(self._task, completed=min(1.0, share), note=note)
        now = time.monotonic()
        if not self._progress.console.is_terminal and now - self._told >= LINE_SECONDS:
            self._told = now
            print(f"{self._title}: {min(1.0, share):4.0%}  {note}", flush=True)


@contextmanager
def progress_bar(
    title: str, *, minutes: float | None = None, count: int | None = None
) -> Iterator[Bar]:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console(),
        refresh_per_second=4,
        transient=True,
    )
    with progress:
        yield Bar(progress, title, None if minutes is None else minutes * 60, count)


def console() -> Console:
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=NARROW)


# -- cases ------------------------------------------------------------------------


def quiet() -> None:
    """What goes wrong on purpose is not logged."""
    logging.getLogger("trio_wal").setLevel(logging.CRITICAL + 1)


def leaves(exc: BaseException) -> list[BaseException]:
    """What is in a group, without the group."""
    inner: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    return [leaf for one in inner for leaf in leaves(one)] if inner else [exc]


def described(exc: BaseException) -> str:
    """What was raised, and where."""

    def one(leaf: BaseException) -> str:
        place = traceback.extract_tb(leaf.__traceback__)[-1:]
        where = "".join(f" ({Path(frame.filename).name}:{frame.lineno})" for frame in place)
        return f"{type(leaf).__name__}: {leaf}{where}"

    return " | ".join(map(one, leaves(exc)))


def found_in(case: Callable[..., object], *arguments: object) -> str:
    """What a case raises, which is a finding, whatever it is; nothing: it raises nothing."""
    try:
        case(*arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # noqa: BLE001, ASYNC103  (see above)
        return described(exc)
    return ""


def fast_folder() -> str | None:
    """Where files that are written again and again go; None: it is not there."""
    return MEMORY if os.access(MEMORY, os.W_OK) else None


# -- processes --------------------------------------------------------------------


def _begin_worker() -> None:
    quiet()
    # Garbage in cycles is little, and what is alive is looked through often.
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


def in_processes(
    job: Callable[[T], R],
    tasks: Iterable[T | None],
    workers: int,
    over: Callable[[], bool],
) -> Iterator[R]:
    """``job(task)`` for one task after the other, in ``workers`` processes, as they finish.

    ``tasks`` may be endless: none is begun once ``over()``, but those under way are
    waited for.  None for a task: there is none before one under way has finished.  One
    worker: in this process, which is how to debug.  Keep a task at about a second, and
    ``job`` a function of a module.
    """
    if workers <= 1:
        for task in tasks:
            if over():
                return
            if task is not None:
                yield job(task)
        return
    # Not forked: this process has threads (the progress bar's).
    context = multiprocessing.get_context("spawn")
    iterator = iter(tasks)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        running: set[Future[R]] = set()
        try:
            while True:
                while len(running) < 2 * workers and not over():
                    task = next(iterator, None)
                    if task is None:
                        break
                    running.add(pool.submit(job, task))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        except BaseException:
            # Ctrl-C, or nobody wants more: what is under way is not waited for.
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            for future in running:
                future.cancel()


@attrs.frozen
class Answer:
    """What came of the cases of one task."""

    cases: int
    """So much is done of what the bar counts."""
    note: str
    """Behind the bar."""
    rows: dict[Any, Counter[str]]
    """Figures, by row."""
    failures: list[tuple[object, str]] = attrs.Factory(list)
    """(the case as ``--replay`` wants it, what is wrong)"""


def collect(
    report: Report, job: Callable[[T], Answer], tasks: Iterable[T], count: int | None
) -> tuple[dict[Any, Counter[str]], float]:
    """The answers to all tasks: (figures by row, seconds).  Of failures that are alike some are
    findings, and how many there were is noted."""
    arguments = report.arguments
    assert arguments is not None
    rows: dict[Any, Counter[str]] = {}
    alike: Counter[str] = Counter()
    with progress_bar(report.campaign, minutes=arguments.minutes, count=count) as bar:
        for answer in in_processes(job, tasks, arguments.workers, bar.over):
            for row, figures in answer.rows.items():
                rows.setdefault(row, Counter()).update(figures)
            for case, what in answer.failures:
                kind = re.sub(r"\d+", "", what)[:60]
                alike[kind] += 1
                if alike[kind] <= ALIKE_MAX:
                    report.find(what, replay_command(report.campaign, "--replay", f"'{case}'"))
            bar.advance(answer.cases, answer.note)
        seconds = bar.seconds
    for kind, number in alike.items():
        report.note(f"{number:,} times {kind}")
    return rows, seconds


# -- campaigns of which a case is a seed ----------------------------------------------


def _seeds_answer(case: Callable[[int], object], row: str, seeds: range) -> Answer:
    failures: list[tuple[object, str]] = [
        (seed, found) for seed in seeds if (found := found_in(case, seed))
    ]
    rows = {row: Counter({"cases": len(seeds), "found": len(failures)})}
    return Answer(len(seeds), f"seed {seeds.start}", rows, failures)


def run_seeds(
    name: str, arguments: argparse.Namespace, case: Callable[[int], object], share: int, what: str
) -> int:
    """A campaign on seed after seed; returns its exit code.

    Args:
      case: a function of a module, which raises what it finds.
      share: cases of one task for a worker process.
      what: they are called.
    """
    report = Report(name, arguments, {"row": "", "cases": what, "found": "FOUND"})

    def shares() -> Iterator[range]:
        for start in itertools.count(arguments.seed << 20, share):
            yield range(start, start + share)

    rows, seconds = collect(report, partial(_seeds_answer, case, name), shares(), None)
    for row, figures in rows.items():
        report.add(row=row, cases=figures["cases"], found=figures["found"])
    total = sum(figures["cases"] for figures in rows.values())
    report.note(f"{per_minute(total, seconds):,} {what} a minute")
    return report.finish()


def replay_seed(case: Callable[[int], object], text: str) -> int:
    """One of its cases again."""
    found = found_in(case, int(text))
    print(f"{text}: {found or 'nothing'}")
    return 1 if found else 0


# -- the report -------------------------------------------------------------------


def bound(cases: int) -> str:
    """What no failure in so many cases says: at most this share fails, at 95 % (3/N)."""
    return f"{3 / cases:.1e}" if cases else "-"


def per_minute(cases: int, seconds: float) -> int:
    return round(60 * cases / seconds) if seconds > 0 else 0


@attrs.define(eq=False)
class Report:
    """Rows of figures, what was found, and how it ends.

    ``columns`` maps the name of a figure (as in the JSON) to its heading.
    """

    campaign: str
    arguments: argparse.Namespace | None
    """None: one case is run again."""
    columns: dict[str, str]
    rows: list[dict[str, Any]] = attrs.Factory(list)
    findings: list[dict[str, str]] = attrs.Factory(list)
    notes: list[str] = attrs.Factory(list)
    started: float = attrs.Factory(time.monotonic)

    def add(self, **figures: Any) -> None:
        """One row; a figure without a column goes into the JSON only."""
        self.rows.append(figures)

    def note(self, text: str) -> None:
        """A line under the table."""
        self.notes.append(text)

    def find(self, what: str, replay: str) -> None:
        """Something is wrong, and the one command that shows it."""
        self.findings.append({"what": what, "replay": replay})

    def finish(self) -> int:
        """Print the table and what was found, write the JSON; gives the exit code."""
        out = console()
        table = Table(box=box.SIMPLE, title=f"campaign {self.campaign}", title_justify="left")
        for name, heading in self.columns.items():
            number = name == "bound" or any(
                isinstance(row.get(name), int | float) for row in self.rows
            )
            justify: Literal["left", "right"] = "right" if number else "left"
            table.add_column(heading, justify=justify, overflow="fold", no_wrap=number)
        for row in self.rows:
            table.add_row(*(_shown(row.get(name)) for name in self.columns))
        if self.rows:
            out.print(table)
        for text in self.notes:
            out.print(escape(text))
        for finding in self.findings:
            out.print(f"[bold red]FOUND[/] {escape(finding['what'])}")
            out.print(f"  replay: {escape(finding['replay'])}", soft_wrap=True)
        seed = getattr(self.arguments, "seed", None)
        out.print(
            f"seed {seed}, commit {commit()}, {time.monotonic() - self.started:.0f} s: "
            + (f"{len(self.findings)} findings" if self.findings else "nothing found")
        )
        output = getattr(self.arguments, "output", None)
        if output is not None:
            self.write(Path(output))
        return 1 if self.findings else 0

    def write(self, output: Path) -> None:
        arguments = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self.arguments).items()
            if name != "output"
        }
        content = {
            "campaign": self.campaign,
            "arguments": arguments,
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self.started, 1),
            "version": version(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cores": cores(),
            "rows": self.rows,
            "notes": self.notes,
            "findings": self.findings,
        }
        output.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return escape(str(value))


def commit() -> str:
    """Of the source tree that the campaigns stand in; with a + where it was changed."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ("git", *arguments),
        cwd=Path(__file__).parent,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    ).stdout.strip()


def version() -> str:
    """Of trio-wal, and where it was found: the installed package, or a copy before it."""
    import trio_wal

    try:
        number = metadata.version("trio-wal")
    except metadata.PackageNotFoundError:
        number = "not installed"
    return f"{number} ({Path(trio_wal.__file__).parent.name})"


def replay_command(campaign: str, *arguments: object) -> str:
    return " ".join(("python -m campaigns", campaign, *map(str, arguments)))


def fail_usage(text: str) -> int:
    """Exit code of a wrong option."""
    print(text, file=sys.stderr)
    return 2
