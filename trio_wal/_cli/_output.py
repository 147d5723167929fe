"""How commands talk: exit codes, JSON, tables, progress bars.

Law: standard output has the result and nothing else; with ``--json`` that is JSON.
Everything for people on the way there goes to standard error, and progress bars only
where that is a terminal.  Whatever a file name or a record holds, what is written is
printable, and a line stays one line.
"""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Final, TextIO, TypeAlias, cast

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from trio_wal._disk.chain import LOG_NAME, META_NAME, STORE_NAME
from trio_wal._files import Directory, close_quietly
from trio_wal._system.files import OsFiles
from trio_wal._text import encodable, plain_json, printable


class ExitCode(enum.IntEnum):
    """What every command returns."""

    OK = 0
    FINDINGS = 1
    USAGE = 2
    """The command line is wrong, or cannot be run as it is installed."""
    FAILED = 3
    """An I/O error (a standard stream that is closed is one), or what is no log, or one that
    cannot be read or written."""
    INTERRUPTED = 130
    """Ctrl-C: 128 + SIGINT, as shells count."""
    PIPE_CLOSED = 141
    """Nobody reads the output any more: 128 + SIGPIPE."""


class UsageError(Exception):
    """The command line asks for something that cannot be; the text says what."""


class CommandError(Exception):
    """It cannot be done, and no error of the library says so; the text does."""


TABLE_WIDTH: Final = 200
"""Columns that a table may take: far more than it needs, so that nothing is cut off."""

Dir: TypeAlias = Annotated[
    Path, Parameter(name="DIR", help="The directory of a log, or of a database.")
]
Place: TypeAlias = Annotated[
    str,
    Parameter(
        name="DIR",
        help="The directory of a log, or of a database; or the URL of a log on servers, such as "
        "nats://host:4222/orders.",
    ),
]
LocalPlace: TypeAlias = Annotated[
    str, Parameter(name="DIR", help="The directory of a log, or of a database.")
]
"""For a command that refuses a URL in words of its own."""
Database: TypeAlias = Annotated[Path, Parameter(name="DB", help="The directory of a database.")]
LogDir: TypeAlias = Annotated[Path, Parameter(name="DIR", help="The directory of a log.")]
Json: TypeAlias = Annotated[
    bool,
    Parameter(name="--json", negative=(), show_default=False, help="Machine-readable output."),
]


def write_json(value: object) -> None:
    """One JSON document, on a line of its own, in UTF-8 whatever the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(to_json(value) + b"\n")


def to_json(value: object) -> bytes:
    """In which every line is one document, and nothing but JSON."""
    return plain_json(msgspec.json.encode(_encodable(value)))


def _encodable(value: object) -> object:
    """The same, where a path may be none that UTF-8 can hold."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {_encodable(key): _encodable(inner) for key, inner in items}
    if isinstance(value, (list, tuple)):
        return list(map(_encodable, cast("list[object]", value)))
    return value


def say(text: str) -> None:
    """A line of the result."""
    print(printable(text))


def complain(text: str) -> None:
    """A line on standard error; nobody is told where that cannot be written."""
    stream = cast("TextIO | None", sys.stderr)
    if stream is None:
        return
    try:
        print(f"trio-wal: {printable(text)}", file=stream, flush=True)
    except (OSError, ValueError):
        forget(stream)


def forget(stream: TextIO) -> None:
    """Whoever read it has left or does not keep up, or it cannot be written: nothing is to be
    flushed into it at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def as_bytes(name: str, text: str, *, digits: bool) -> bytes:
    """What somebody has typed as a key."""
    if not digits:
        return os.fsencode(text)
    try:
        return bytes.fromhex(text)
    except ValueError as exc:
        raise UsageError(f"{name} must be pairs of hexadecimal digits, not {text!r}") from exc


def count(number: int, noun: str) -> str:
    """``1 segment``, ``2,000 segments``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def new_table(*columns: str, numbers: tuple[str, ...] = (), plain: bool = False) -> Table:
    """``plain``: without lines, so that more fits into 80 columns."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False) if plain else Table()
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return table


def show(shown: Table | Text) -> None:
    """As a part of the result; in colours only where that is a terminal."""
    console = Console(highlight=False, markup=False, emoji=False, width=TABLE_WIDTH)
    # Not written by rich itself, which ends the program where nobody reads any more.
    with console.capture() as captured:
        console.print(shown)
    for line in captured.get().splitlines():
        print(line.rstrip())


class Bar:
    """A progress bar, or nothing where standard error is no terminal."""

    def __init__(self, progress: Progress | None, what: str) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=None) if progress is not None else None

    def update(self, done: float, total: float) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def describe(self, what: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=what)

    def note(self, text: str) -> None:
        """A line that stays above the bar."""
        if self._progress is not None:
            self._progress.console.print(Text(printable(text)))


class _RateColumn(ProgressColumn):
    """How many per second, lately."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed is not None else "")


@contextmanager
def progress_bar(what: str, *, bytes_done: bool = False, rate: bool = False) -> Generator[Bar]:
    """``rate``: also how many per second, and how long the rest will take; to be updated often."""
    if not sys.stderr.isatty():
        yield Bar(None, what)
        return
    amount: Callable[[], ProgressColumn] = DownloadColumn if bytes_done else MofNCompleteColumn
    times: tuple[ProgressColumn, ...] = (TimeElapsedColumn(),)
    if rate:
        times = (_RateColumn(), TextColumn("ETA"), TimeRemainingColumn(compact=True))
    # As wide as there is room, with all that stands beside it.
    bar = BarColumn(bar_width=None if rate else 40)
    columns = (TextColumn("{task.description}"), bar, amount(), *times)
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=rate) as progress:
        yield Bar(progress, what)


def log_of(path: Path) -> Path:
    """The log in a directory: that itself, or the log of the database that it is."""
    inner = path / LOG_NAME
    return inner if (inner / META_NAME).exists() and not (path / META_NAME).exists() else path


def is_database(path: Path) -> bool:
    """Whether it is a database's directory, or what is left of one."""
    names = (LOG_NAME, STORE_NAME)
    return any(os.path.lexists(path / n) for n in names) and not (path / META_NAME).exists()


@contextmanager
def opened(path: Path) -> Generator[Directory]:
    """A directory to read, without its lock; a database's log is no link to another."""
    log = log_of(path)
    directory = OsFiles().open_directory(str(log), follow=log is path)
    try:
        yield directory
    finally:
        close_quietly(directory)
