"""The command line: one file a sub-command, put together here.

Law: the only place that prints.  A command returns its exit code; whatever it raises
becomes one line on standard error.  Reading commands take no lock and write nothing.

Needs the ``cli`` extra; the library never imports this package.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO, cast

from cyclopts import App, CycloptsError, UnusedCliTokensError
from rich.console import Console

from trio_wal import __version__
from trio_wal._exceptions import WalError, WrongDirectoryError

from ._output import CommandError, ExitCode, UsageError, complain, forget
from .append import append
from .archive import archive_app
from .backup import backup
from .bench import bench
from .completion import completion_of
from .consumers import consumers
from .demo import demo
from .dump import dump
from .get import get
from .inspect import inspect
from .nats import nats_app
from .repair import repair
from .restore import restore
from .scan import scan
from .stats import stats
from .verify import verify

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

app = App(
    name="trio-wal",
    version=__version__,
    help="Work on write-ahead logs from the command line.",
    backend="trio",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
_COMMANDS = (
    *(
        demo,
        append,
        dump,
        get,
        scan,
        inspect,
        stats,
        verify,
        repair,
        consumers,
        backup,
        restore,
        bench,
    ),
)
for _command in _COMMANDS:
    app.command(_command)
app.command(archive_app)
app.command(nats_app)
app.command(completion_of(app))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code and raises nothing."""
    _occupy_closed_streams()
    stdout = cast("TextIO | None", sys.stdout)
    if stdout is None:
        complain("standard output is closed, so there is no place for a result; nothing was done")
        return ExitCode.FAILED
    for stream in (stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name that the terminal cannot show is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    code = _run_and_explain(list(arguments))
    try:
        stdout.flush()
    except (OSError, ValueError) as exc:
        forget(stdout)
        if isinstance(exc, BrokenPipeError):
            return ExitCode.PIPE_CLOSED
        if code != ExitCode.FAILED:
            complain(f"standard output: {exc}")
        return ExitCode.FAILED
    return code


def _occupy_closed_streams() -> None:
    """No file may get the number of a standard stream that is closed: what is printed to that
    would be written into it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest number that is free: this one.
            os.open(os.devnull, os.O_RDWR)
    if cast("TextIO | None", sys.stderr) is None:
        # For whoever writes there without a look.
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _run_and_explain(arguments: list[str]) -> int:
    """The exit code; whatever is raised is one line on standard error."""
    try:
        return _run_plainly(arguments)
    except KeyboardInterrupt:
        forget(sys.stdout)
        return ExitCode.INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # SystemExit: rich, while it shows the help.
        forget(sys.stdout)
        return ExitCode.PIPE_CLOSED
    except (UsageError, ModuleNotFoundError) as exc:
        complain(str(exc))
        return ExitCode.USAGE
    except WrongDirectoryError as exc:
        # What to call instead is for programs.
        other = {"a log": ", not a database", "a database": ", not a log"}.get(exc.found, "")
        complain(f"{exc.path}: this is {exc.found}{other}")
        return ExitCode.FAILED
    except (WalError, CommandError) as exc:
        complain(str(exc))
        return ExitCode.FAILED
    except OSError as exc:
        complain(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))
        return ExitCode.FAILED
    except Exception as exc:  # noqa: BLE001  (the last line of defence: code 1 would say "findings")
        complain(f"{type(exc).__name__}: {exc}")
        return ExitCode.FAILED


def _run_plainly(arguments: list[str]) -> int:
    """Without the groups that nurseries make of what comes out of their tasks: Ctrl-C may meet any
    of them, and what one of many tasks met stands for all."""
    try:
        return _run(arguments)
    except BaseExceptionGroup as exc:
        raise _first(exc.subgroup(KeyboardInterrupt) or exc) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found = group.exceptions[0]
    if isinstance(found, BaseExceptionGroup):
        return _first(cast("BaseExceptionGroup[BaseException]", found))
    return found


def _run(arguments: list[str]) -> int:
    if not arguments:
        app.help_print([], console=Console(stderr=True))
        return ExitCode.USAGE
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except UnusedCliTokensError as exc:
        extra = ", ".join(map(repr, exc.unused_tokens or ()))
        raise UsageError(f"Unexpected argument: {extra}. See trio-wal --help.") from exc
    except CycloptsError as exc:
        raise UsageError(f"{exc} See trio-wal --help.") from exc
    # --help and --version give None.
    return code if isinstance(code, int) else ExitCode.OK
