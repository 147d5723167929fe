"""The command line: one file a sub-command, put together here.

Law: the only place that prints.  A command returns its exit code; whatever it raises
becomes one line on standard error.  Reading commands take no lock and write nothing.

Needs the ``cli`` extra; the library never imports this package.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from rich.console import Console

from trio_wal import __version__
from trio_wal._exceptions import WalError

from ._output import CommandError, ExitCode, UsageError, complain
from .append import append
from .demo import demo
from .dump import dump
from .inspect import inspect
from .verify import verify

app = App(
    name="trio-wal",
    version=__version__,
    help="Work on write-ahead logs from the command line.",
    backend="trio",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
for _command in (demo, append, dump, inspect, verify):
    app.command(_command)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code and raises nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name that the terminal cannot show is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(list(arguments))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _forget_stdout()
        return ExitCode.INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # SystemExit: rich, while it shows the help.
        _forget_stdout()
        return ExitCode.PIPE_CLOSED
    except UsageError as exc:
        complain(str(exc))
        return ExitCode.USAGE
    except ModuleNotFoundError as exc:
        complain(str(exc))
        return ExitCode.USAGE
    except OSError as exc:
        complain(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))
        return ExitCode.FAILED
    except (WalError, CommandError) as exc:
        complain(str(exc))
        return ExitCode.FAILED


def _run(arguments: list[str]) -> int:
    if not arguments:
        app.help_print([], console=Console(stderr=True))
        return ExitCode.USAGE
    try:
        code = app(
            arguments,
            exit_on_error=False,
            print_error=True,
            error_console=Console(stderr=True),
            result_action="return_value",
        )
    except CycloptsError:
        return ExitCode.USAGE
    # --help and --version give None.
    return code if isinstance(code, int) else ExitCode.OK


def _forget_stdout() -> None:
    """Whoever read the output has left or does not keep up: nothing is to be flushed into
    it at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
