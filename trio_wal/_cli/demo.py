"""`trio-wal demo`: real files through the log, killed on the way, nothing lost."""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Annotated, Final

import attrs
from cyclopts import Parameter
from rich.text import Text

from trio_wal._exceptions import CorruptLogError

from ._demo import run as demo_run
from ._demo.run import Report
from ._demo.workload import Workload, build
from ._output import (
    ExitCode,
    Json,
    UsageError,
    complain,
    count,
    new_table,
    progress_bar,
    say,
    show,
    write_json,
)

TASKS_MAX: Final = 100_000
KILLS_MAX: Final = 100
SKIPPED: Final = frozenset({"site-packages", "dist-packages", "__pycache__"})


async def demo(
    *files: Annotated[
        Path, Parameter(help="Their lines are written; default: Python's standard library.")
    ],
    dir: Annotated[  # noqa: A002  (the option's name)
        Path | None,
        Parameter(help="A new or empty directory to write to; default: a temporary one."),
    ] = None,
    tasks: Annotated[int, Parameter(help="Tasks that append at the same time.")] = 128,
    kills: Annotated[int, Parameter(help="How many times the writer is killed.")] = 2,
    seed: Annotated[
        int | None, Parameter(help="Seed for the moments of the kills; default: random.")
    ] = None,
    log_only: Annotated[
        bool,
        Parameter(show_default=False, help="Append to a log instead of committing to a database."),
    ] = False,
    json: Json = False,
) -> int:
    """Write every line of real files, kill the writer on the way, and check that nothing is lost.

    Many tasks in a separate process put the lines into a database, each line in a durable
    transaction, while others move money between accounts. That process is killed (SIGKILL)
    in the middle of it, and the database is opened again. Every line and transfer that was
    acknowledged must be there, unchanged, and the sum of all balances must be right. Then a
    new process goes on with what is missing. At the end, everything is read back and compared
    with the files. Exits with 0 only if nothing was lost.
    """
    for name, value, low, high in (
        ("--tasks", tasks, 1, TASKS_MAX),
        ("--kills", kills, 0, KILLS_MAX),
    ):
        if not low <= value <= high:
            raise UsageError(f"{name} must be from {low} to {high}, not {value}")
    workload = _load(files, tasks)
    where, is_temporary = _place(dir)
    keep = False
    try:
        with progress_bar("writing", rate=True) as bar:
            report = await demo_run.run(
                workload, str(where), kills=kills, seed=seed, watcher=bar, database=not log_only
            )
        keep = not report.ok
    except CorruptLogError:
        # It does not open any more: no report says so, but what is left of it does.
        keep = True
        complain(f"everything is left in {where}")
        raise
    finally:
        if is_temporary and not keep:
            shutil.rmtree(where, ignore_errors=True)
    if json:
        write_json(_as_json(report))
    else:
        _print(report, database=not log_only)
        if is_temporary and keep:
            say(f"everything is left in {where}")
    return ExitCode.OK if report.ok else ExitCode.FINDINGS


def _load(files: tuple[Path, ...], tasks: int) -> Workload:
    for file in files:
        if file.is_dir():
            raise UsageError(f"{file} is a directory: name the files")
    paths = files or standard_library()
    workload = build(tuple(path.read_bytes() for path in paths), tasks)
    if not workload.records:
        raise UsageError("the files have no lines")
    return workload


def standard_library() -> tuple[Path, ...]:
    """The .py files of the running Python's own library, without what was installed."""
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(
        path
        for path in sorted(root.rglob("*.py"))
        if SKIPPED.isdisjoint(path.relative_to(root).parts) and path.is_file()
    )


def _place(directory: Path | None) -> tuple[Path, bool]:
    """Where the log goes, and whether that is to be removed."""
    if directory is None:
        return Path(tempfile.mkdtemp(prefix="trio-wal-demo-")), True
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"--dir {directory} exists and is not an empty directory")
    return directory, False


def _as_json(report: Report) -> dict[str, object]:
    fields = attrs.asdict(report)
    problems = fields.pop("problems")
    bank = fields.pop("bank")
    return {
        "ok": report.ok,
        "verdict": verdict(report),
        **fields,
        **problems,
        **bank,
        "appends_per_second": report.appends_per_second,
        "records_per_batch": _records_per_batch(report),
    }


def _records_per_batch(report: Report) -> float:
    return report.found / report.batches if report.batches else 0.0


def verdict(report: Report) -> str:
    """One line: what it came to."""
    problems, bank = report.problems, report.bank
    wrong = [
        (problems.altered, "altered"),
        (problems.duplicated, "duplicated"),
        (problems.misordered + problems.misplaced, "out of order"),
        (bank.lost_transfers, "transfers lost"),
        (bank.invented_transfers, "transfers invented"),
        (abs(bank.missing_money), "of the money missing"),
        (report.damaged, "damaged places found"),
        (report.untold, "kept that no kill explains"),
    ]
    if not report.stopped:
        wrong += [
            (report.lines - report.found, "not written"),
            (report.sources - report.sources_identical, "of the files not identical"),
        ]
    parts = [f"{report.acknowledged:,} acknowledged", f"{problems.lost:,} lost"]
    parts += [f"{number:,} {what}" for number, what in wrong if number]
    return f"{'PASS' if report.ok else 'FAIL'}: {', '.join(parts)}"


def _print(report: Report, *, database: bool) -> None:
    show(Text(verdict(report), style="bold green" if report.ok else "bold red"))
    table = new_table("", "value", numbers=("value",), plain=True)
    table.show_header = False
    for title, rows in _groups(report, database=database).items():
        table.add_row()
        table.add_row(title, style="bold")
        for label, value in rows:
            table.add_row(f"  {label}", value)
    show(table)


def _groups(report: Report, *, database: bool) -> dict[str, list[tuple[str, str]]]:
    """The rows of the table, under their headings."""
    problems, bank = report.problems, report.bank
    written = [
        (f"lines of {count(report.sources, 'file')}", f"{report.lines:,}"),
        ("megabytes", f"{report.bytes / 1e6:,.1f}"),
        ("tasks that wrote at the same time", f"{report.tasks:,}"),
        (
            f"durable {'transactions' if database else 'records'} per second",
            f"{report.appends_per_second:,.0f}",
        ),
        ("syncs of the disk", f"{report.syncs:,}"),
        ("lines per sync", f"{report.found / report.syncs if report.syncs else 0:,.1f}"),
        ("time until a line was durable: median", _milliseconds(report.latency_p50)),
        ("  99 % of the lines at most", _milliseconds(report.latency_p99)),
        ("  the slowest", _milliseconds(report.latency_max)),
    ]
    found = [
        ("acknowledged", f"{report.acknowledged:,}"),
        ("kept, not acknowledged", f"{report.unacknowledged_kept:,}"),
        ("lost", f"{problems.lost:,}"),
        ("altered", f"{problems.altered:,}"),
        ("duplicated", f"{problems.duplicated:,}"),
        ("out of order", f"{problems.misordered + problems.misplaced:,}"),
        (
            "files identical",
            "not compared"
            if report.stopped
            else f"{report.sources_identical:,} of {report.sources:,}",
        ),
    ]
    if database:
        written.append(("transfers of money meanwhile", f"{report.transfers:,}"))
        moved = bank.lost_transfers + bank.invented_transfers
        found.append(("transfers lost or invented", f"{moved:,}"))
        found.append(("money missing", f"{bank.missing_money:,}"))
    if report.damaged:
        found.append(("damaged places", f"{report.damaged:,}"))
    return {
        "What was written": written,
        "How it was killed": [
            ("kills (SIGKILL)", f"{report.kills:,}"),
            *[
                (f"{number}: {at:,} acknowledged, open again after", _milliseconds(seconds))
                for number, (at, seconds) in enumerate(
                    zip(report.killed_at, report.recovery_seconds, strict=True), 1
                )
            ],
            ("the whole run", f"{report.seconds:,.1f} s"),
        ],
        "What was found": found,
    }


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
