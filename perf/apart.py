"""A function of a benchmark in a process of its own, and what the kernel says of that process.

Law: memory is measured in a fresh process, because what one measurement has allocated and
freed disturbs the next; and it is the kernel's figure, not what Python thinks.  Arguments
and results go through JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def apart(
    function: Callable[..., dict[str, Any]], *arguments: Any, package: str | None = None
) -> dict[str, Any]:
    """What the function returns, called with these arguments in a new process.

    Args:
      package: the directory of another checkout, whose package it finds.
    """
    command = [
        *(sys.executable, __file__, function.__module__, function.__name__),
        json.dumps(arguments),
    ]
    env = None if package is None else {**os.environ, "PYTHONPATH": package}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- in that process --------------------------------------------------------------


def memory(name: str) -> int:
    """Bytes, of a line of ``/proc/self/status``: VmRSS, VmHWM (its peak), RssAnon, RssFile."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def forget_peak() -> None:
    """Have VmHWM start anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class Stall:
    """Have every sync of this process wait as long as it is told to."""

    def __init__(self) -> None:
        from trio_wal._system import files as _files

        self._moves = threading.Event()
        self._moves.set()
        real = _files.OsFile.sync

        def sync(file: _files.OsFile, *, in_place: bool = False) -> None:
            self._moves.wait()
            real(file, in_place=in_place)

        _files.OsFile.sync = sync  # type: ignore[method-assign]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self._moves.clear()
        try:
            yield
        finally:
            self._moves.set()


def main(module: str, function: str, arguments: str) -> None:
    # This folder's modules; the package is the installed one (see run.py).
    sys.path.append(str(Path(__file__).resolve().parent))
    found = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
