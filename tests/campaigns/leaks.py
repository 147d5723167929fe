"""Every call to the system fails once, on real files: what a program leaves behind then.

Law: a program opens, uses and closes a log or a database in a directory of its own; one call
that the package makes to the operating system fails, or one thread cannot be started, or there
is a limit on descriptors, memory or processes for a while.  Afterwards, in the same process:

  * descriptors and the log's threads are as they were before;
  * the next open works: no lock is left;
  * what was acknowledged is there;
  * where the very first open failed, its path does not exist again;
  * the error is one that is documented, and no group.
"""

from __future__ import annotations

import argparse
import errno
import functools
import itertools
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import attrs
import trio
from helpers import read_all

import trio_wal
from trio_wal import _park
from trio_wal._system import child, descriptors as numbers, files, owner, paths, store, sync, watch

from . import _report
from ._promises import Wrong, check
from .hostile import limited_time

CASE_SECONDS: Final = 60
CALLS: Final = (
    "open", "close", "mkdir", "stat", "fstat", "listdir", "pread", "pwritev", "ftruncate",
    "posix_fallocate", "fdatasync", "fsync", "replace", "unlink", "eventfd",
)  # fmt: skip
"""Of `os`, as the package calls them; besides these ``flock`` and ``thread``."""
CALLERS: Final = (_park, child, numbers, files, owner, paths, store, sync, watch)
"""The modules that call the system."""
NEVER_FAIL: Final = frozenset({"close", "fstat"})
"""Counted, so that cases keep their numbers; but close(2) fails with the descriptor closed."""
ERRORS: Final[dict[str, tuple[int, ...]]] = {
    "open": (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EIO),
    "eventfd": (errno.EMFILE, errno.ENOMEM),
    "flock": (errno.ENOLCK,),
    "thread": (errno.EAGAIN,),
    "mkdir": (errno.ENOSPC, errno.EACCES),
    "posix_fallocate": (errno.ENOSPC, errno.EIO),
    "pwritev": (errno.ENOSPC, errno.EIO, errno.EFBIG),
}
OTHERS: Final = (errno.EIO, errno.ENOMEM)
LIMITS: Final = ("descriptors", "memory", "threads")


# -- failing calls ------------------------------------------------------------------


@attrs.define(eq=False)
class Failing:
    """Counts the package's calls to the system and lets one of them fail."""

    number: float
    choice: int = 0
    """Which of the errors that the call can have."""
    only: str = ""
    """Of this call only; nothing: of any."""
    count: int = 0
    failed: str = ""

    def due(self, call: str) -> int | None:
        if self.only and call != self.only:
            return None
        number, self.count = self.count, self.count + 1
        if number != self.number or call in NEVER_FAIL:
            return None
        errors = ERRORS.get(call, OTHERS)
        error = errors[self.choice % len(errors)]
        self.failed = f"{call} {errno.errorcode[error]}"
        return error

    def wrap(self, call: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            error = self.due(call)
            if error is not None:
                raise OSError(error, os.strerror(error))
            return original(*args, **options)

        return wrapped

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Only calls that the package makes: its modules get an `os` of their own."""
        import fcntl

        wrapped = {name: self.wrap(name, getattr(os, name)) for name in CALLS if hasattr(os, name)}
        fake = SimpleNamespace(**{**vars(os), **wrapped})
        run_sync = trio.to_thread.run_sync

        async def in_thread(*args: Any, **options: Any) -> Any:
            if self.due("thread") is not None:
                raise RuntimeError("can't start new thread")
            return await run_sync(*args, **options)

        with (
            ExitStack() as patched,
            mock.patch.object(fcntl, "flock", self.wrap("flock", fcntl.flock)),
            mock.patch.object(trio.to_thread, "run_sync", in_thread),
        ):
            for module in CALLERS:
                patched.enter_context(mock.patch.object(module, "os", fake))
            yield


# -- what is left -------------------------------------------------------------------


def descriptors() -> Counter[str]:
    """What this process has open, by name."""
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # the listing's own
        found[name.partition(":[")[0]] += 1
    return found


def workers() -> int:
    """Threads that serve a log."""
    found = 0
    for frame in sys._current_frames().values():
        at: Any = frame
        while at is not None:
            found += at.f_code.co_name == "_serve"
            at = at.f_back
    return found


# -- programs -----------------------------------------------------------------------

Said = dict[Any, bytes]
"""What was acknowledged: by LSN, or by key."""


async def _ask(call: Awaitable[Any]) -> Any:
    """A call that may fail, as documented; the program goes on."""
    try:
        return await call
    except (OSError, trio_wal.WalError, trio.ClosedResourceError):
        return None


async def _log(path: str, said: Said, opened: list[bool]) -> None:
    cut = False
    for _ in range(2):
        async with trio_wal.open_wal(path, segment_size=1) as wal:
            opened.append(True)
            for number in range(4):
                data = b"%d" % number
                lsn = await _ask(wal.append(data))
                if lsn is not None and not cut:
                    said[lsn] = data
            await read_all(wal)
            if wal.last_lsn > 4:
                cut = True
                said.clear()
                await _ask(wal.truncate_before(3))
                await _ask(wal.truncate_after(wal.last_lsn - 1))
            await _ask(wal.flush())


async def _database(path: str, said: Said, opened: list[bool]) -> None:
    for number in range(2):
        async with trio_wal.open_database(path, segment_size=1, map_size=1 << 24) as db:
            opened.append(True)
            for key in (b"one", b"two", b"three"):
                value = b"%d" % number
                said.pop(key, None)
                if await _ask(db.put(key, value)) is not None:
                    said[key] = value
            await _ask(db.checkpoint())
            await _ask(db.backup(f"{path}.backup{number}"))
            with db.snapshot() as snapshot:
                list(snapshot.scan())


async def _reader(path: str, said: Said, opened: list[bool]) -> None:
    async with trio_wal.open_wal(path, segment_size=1) as wal:
        opened.append(True)
        async with trio_wal.open_reader(path) as reader, reader.follow() as records:
            for number in range(3):
                lsn = await wal.append(b"%d" % number)
                said[lsn] = b"%d" % number
                # Where the owner could not publish, only its next word is heard.
                with trio.move_on_after(0.2):
                    await records.__anext__()


PROGRAMS: Final = {"log": _log, "database": _database, "reader": _reader}


@attrs.frozen
class Result:
    failed: str
    """The call that failed, and with what; nothing: there was no such call."""
    outcome: str = ""
    found: str = ""


def _documented(exc: BaseException) -> bool:
    kinds = (OSError, trio_wal.WalError, trio.ClosedResourceError)
    return isinstance(exc, kinds)


async def _warm() -> None:
    """What trio and the interpreter keep from the first use on."""
    await trio.to_thread.run_sync(int)


async def _open_again(program: str, path: str, said: Said) -> None:
    if program == "database":
        async with trio_wal.open_database(path, map_size=1 << 24) as db:
            for key, value in said.items():
                check(db.get(key) == value, f"{key!r} was {value!r}, and is {db.get(key)!r}")
            await db.put(b"again", b"again")
        return
    async with trio_wal.open_wal(path) as wal:
        found = await read_all(wal)
        for lsn, data in said.items():
            check(found.get(lsn) == data, f"LSN {lsn} was {data!r}, and is {found.get(lsn)!r}")
        await wal.append(b"again")


def run_case(program: str, number: float, choice: int = 0, only: str = "") -> Result:
    """A program with one failing call, and what is left of it."""
    failing = Failing(number, choice, only)
    with tempfile.TemporaryDirectory(prefix="leaks-", ignore_cleanup_errors=True) as folder:
        try:
            trio.run(_warm)
            with limited_time(CASE_SECONDS):
                return _judge(program, os.path.join(folder, "parent", "here"), failing)
        except Wrong as exc:
            return Result(failing.failed or "nothing", found=str(exc))
        except Exception as exc:  # noqa: BLE001  (whatever it is)
            return Result(failing.failed or "nothing", found=f"then: {exc!r}")


def _judge(program: str, path: str, failing: Failing) -> Result:
    before, threads = descriptors(), workers()
    said: Said = {}
    opened: list[bool] = []
    outcome = "nothing raised"
    try:
        with failing():
            trio.run(PROGRAMS[program], path, said, opened)
    except Exception as exc:  # noqa: BLE001  (judged)
        outcome = type(exc).__name__
        check(_documented(exc), f"raised: {exc!r}")
    if not failing.failed:
        return Result("", outcome)
    left = descriptors() - before
    check(not left, "descriptors are left:", dict(left))
    check(workers() == threads, "a thread of the log is left")
    if not opened and failing.failed.split()[0] != "rmdir":
        check(not os.path.exists(os.path.dirname(path)), "the failed open has left its directory")
    trio.run(_open_again, program, path, said)
    check(descriptors() == before, "descriptors after the next open:", descriptors() - before)
    return Result(failing.failed, outcome)


# -- limits -------------------------------------------------------------------------

LIMITED: Final = """
import errno, os, resource, sys, trio, trio_wal
from campaigns import leaks

kind, program, amount, path = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
if kind == "threads" and os.geteuid() == 0:
    # Root may start as many as it likes.
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
said, opened = {}, []
what = {
    "descriptors": resource.RLIMIT_NOFILE, "memory": resource.RLIMIT_AS,
    "threads": resource.RLIMIT_NPROC,
}[kind]
soft, hard = resource.getrlimit(what)

async def limited():
    # From within the run, whose own descriptors are there already.
    used = {
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,
        "memory": int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize(),
        "threads": 0,
    }[kind]
    resource.setrlimit(what, (used + amount, hard))
    try:
        await leaks.PROGRAMS[program](path, said, opened)
    finally:
        resource.setrlimit(what, (soft, hard))

outcome = "nothing raised"
before = leaks.descriptors()
try:
    trio.run(limited)
except MemoryError:
    outcome = "MemoryError"
except Exception as exc:
    outcome = type(exc).__name__
    leaks.check(leaks._documented(exc), f"raised: {exc!r}")
left = leaks.descriptors() - before
leaks.check(not left, "descriptors are left:", dict(left))
if not opened:
    leaks.check(not os.path.exists(path), "the failed open has left its directory")
trio.run(leaks._open_again, program, path, said)
print(outcome)
"""
AMOUNTS: Final = {
    "descriptors": range(30),
    "memory": range(1 << 20, 40 << 20, 1 << 20),
    "threads": range(3),
}


def run_limited(kind: str, program: str, amount: int) -> Result:
    """The same under a limit of the system's, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="leaks-") as folder:
        os.chmod(folder, 0o711)
        home = Path(folder, "home")
        home.mkdir(mode=0o700)
        if kind == "threads" and os.geteuid() == 0:
            os.chown(home, 65534, 65534)
        run = subprocess.run(
            [sys.executable, "-c", LIMITED, kind, program, str(amount), str(home / "here")],
            check=False,
            capture_output=True,
            encoding="utf-8",
            cwd="/",
            timeout=3 * CASE_SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_paths())},
        )
    name = f"{kind} {amount}"
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"]
        return Result(name, found=lines[-1])
    return Result(name, run.stdout.strip())


def _import_paths() -> list[str]:
    return [str(Path(trio_wal.__file__).parents[1]), str(Path(__file__).parents[1])]


# -- the campaign -------------------------------------------------------------------


@attrs.frozen
class Task:
    program: str
    choice: int
    """Which of a call's errors; -1: a limit."""
    numbers: range
    limit: str = ""


def run_task(task: Task) -> _report.Answer:
    rows: dict[str, Counter[str]] = {}
    failures: list[tuple[object, str]] = []
    name = f"{task.program}:{task.limit or task.choice}"
    for number in task.numbers:
        if task.limit:
            result = run_limited(task.limit, task.program, number)
        else:
            result = run_case(task.program, number, task.choice)
        if not result.failed:
            break
        if result.failed != "nothing" or result.found:
            call = result.failed.partition(" ")[0]
            rows.setdefault(call, Counter())[result.outcome or "LEFT"] += 1
        if result.found:
            failures.append((f"{name}:{number}", f"{name}, {result.failed}: {result.found}"))
    return _report.Answer(1, name, rows, failures)


@functools.cache
def calls_of(program: str) -> int:
    """How many calls a program makes, about: threads come in any order."""
    failing = Failing(-1)
    with tempfile.TemporaryDirectory(prefix="leaks-") as folder, failing():
        trio.run(PROGRAMS[program], os.path.join(folder, "here"), {}, [])
    return failing.count


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
    size, stride = 20, arguments.stride
    found = [
        Task(program, choice, range(start + arguments.seed % stride, start + size, stride))
        for program in PROGRAMS
        for choice in range(max(map(len, ERRORS.values())))
        for start in range(0, calls_of(program), size)
    ]
    found += [
        Task(program, -1, range(amount, amount + 1), limit)
        for program in PROGRAMS
        for limit in LIMITS
        for amount in AMOUNTS[limit]
    ]
    random.Random(arguments.seed).shuffle(found)
    return found


def cases(seed: int, only: str) -> Iterator[str]:
    """What each of the cases in some order found, for the mutants; ``only`` is
    ``PROGRAM/CALL``, of which there are few: those one after the other."""
    rng = random.Random(seed)
    if only:
        program, _, call = only.partition("/")
        for number in itertools.count():
            result = run_case(program, number, 0, call)
            if not result.failed:
                return
            yield result.found
    every = [(name, number) for name in PROGRAMS for number in range(calls_of(name))]
    rng.shuffle(every)
    for program, number in every:
        yield run_case(program, number, rng.randrange(5)).found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stride", type=int, default=1, metavar="N", help="every N-th call only (%(default)s)"
    )
    parser.add_argument("--replay", metavar="PROGRAM:CHOICE:NUMBER", help="one case again")
    _report.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if not sys.platform.startswith("linux"):
        print("leaks: not run: it looks into /proc")
        return 0
    report = _report.Report(
        "leaks",
        arguments,
        {"call": "call", "cases": "cases", "outcomes": "the program", "found": "LEFT"},
    )
    todo = tasks_of(arguments)
    rows, seconds = _report.collect(report, run_task, todo, len(todo))
    for call, row in sorted(rows.items()):
        outcomes = ", ".join(f"{name} {n:,}" for name, n in sorted(row.items()) if name != "LEFT")
        report.add(call=call, cases=row.total(), outcomes=outcomes, found=row["LEFT"])
    total = sum(row.total() for row in rows.values())
    report.note(
        f"{total:,} failing calls and limits, {_report.per_minute(total, seconds):,} a minute"
    )
    return report.finish()


def replay(text: str) -> int:
    program, kind, number = text.split(":")
    if kind in LIMITS:
        result = run_limited(kind, program, int(number))
    else:
        result = run_case(program, int(number), int(kind))
    print(f"{text}: {result.failed or 'no such call'}: {result.found or result.outcome}")
    return 1 if result.found else 0
