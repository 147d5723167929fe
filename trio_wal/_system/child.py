"""A function of this package in a process of its own, which may crash.

Law: nothing of that process's surroundings decides what it imports.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Final

_CRASHES: Final = frozenset({"SIGBUS", "SIGSEGV", "SIGABRT", "SIGFPE", "SIGILL", "SIGTRAP"})
_CHILD: Final = "import sys; sys.path[:] = sys.argv[3:]; from trio_wal import {0}; {0}.{1}()"


class ChildError(Exception):
    """A child process could not do its work; the text says why."""


def run_child(module: str, function: str, *arguments: str) -> tuple[bytes, str]:
    """Call a function of this package in a process of its own.

    Nothing of that process's surroundings decides what it imports: isolated (``-I``), and with
    the absolute entries of this process's path.  The function finds the arguments in
    ``sys.argv[1:3]``.

    Returns what it wrote to standard output, and the name of the signal that ended it where
    that tells of a crash.

    Raises:
      ChildError: it could not be started, or ended as it should not.
    """
    import signal
    import subprocess

    if not sys.executable or getattr(sys, "frozen", False):
        raise ChildError("there is no Python interpreter to start")
    path = [entry for entry in sys.path if os.path.isabs(entry)]
    given = [*arguments, "", ""][:2]
    command = [sys.executable, "-I", "-c", _CHILD.format(module, function), *given, *path]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except (OSError, subprocess.SubprocessError, MemoryError) as exc:
        raise ChildError(f"a child process cannot be started: {exc}") from exc
    if done.returncode == 0:
        return done.stdout, ""
    name = f"exit code {done.returncode}"
    if done.returncode < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-done.returncode).name
    elif done.returncode & 0xFFFFFFF0 == 0xC0000000:
        # Windows: an access violation, or a page that cannot be read.
        return b"", f"{done.returncode:#x}"
    if name in _CRASHES:
        return b"", name
    last = done.stderr.decode(errors="backslashreplace").strip().splitlines()[-1:]
    raise ChildError(f"the child process ended with {': '.join([name, *last])}")
