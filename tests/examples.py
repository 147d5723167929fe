"""The programs in docs/examples, for tests that run them as a user would, and kill them."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
SECONDS_MAX = 200
"""After which a program that hangs is killed; no test waits for so long."""


def load(name: str) -> Any:
    """The example as a module, for its tables and functions."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # msgspec looks there for the names in annotations.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def running(name: str, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The example as a process, with pipes; killed at the end of the block."""
    with subprocess.Popen(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=1,
        encoding="utf-8",
    ) as process:
        watchdog = threading.Timer(SECONDS_MAX, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def write(process: subprocess.Popen[str], *lines: str) -> None:
    """To its standard input; all that it does not read before it dies is lost."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        for line in lines:
            process.stdin.write(line + "\n")


def read(process: subprocess.Popen[str], count: int) -> list[str]:
    """So many whole lines of its standard output, fewer if it ends."""
    assert process.stdout is not None
    lines = (process.stdout.readline() for _ in range(count))
    return [line.strip() for line in lines if line.endswith("\n")]


def finish(process: subprocess.Popen[str]) -> list[str]:
    """The rest of its output, when its input has ended; it must have ended well."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    lines = process.stdout.read().splitlines()
    assert process.wait() == 0
    return lines


def kill(process: subprocess.Popen[str]) -> list[str]:
    """The rest of what it said until then.  A line that the kill cut short was never said: where
    output is not buffered (PYTHONUNBUFFERED), a `print` of several words is several writes."""
    assert process.stdout is not None
    process.kill()
    *lines, _ = process.stdout.read().split("\n")
    process.wait()
    return lines
