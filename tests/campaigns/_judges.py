"""Campaigns as judges of one package: what did you find, after how many cases?

Law: each runs in this process, against whatever `trio_wal` is importable, until it finds
something or its time is over.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Final

import attrs
import trio

import trio_wal
from trio_wal._disk.verify import verify
from trio_wal._system.files import OsFiles

from . import _report
from .__main__ import load
from ._promises import check

OPERATIONS: Final = 400
"""More than a workload of `errors` has."""
ENDLESS: Final = 1 << 20
CASE_SECONDS: Final = 40
"""A case that takes longer is taken as one that never ends."""


@attrs.frozen
class Judgement:
    cases: int
    found: str
    """Nothing: nothing was found."""
    seconds: float


Judge = Callable[[int, float, str], Judgement]
"""(seed, seconds, which part of the campaign: nothing, all of it)"""
Cases = Iterator[str]
"""What each case found: mostly nothing."""


def _until_found(cases: Cases, seconds: float) -> Judgement:
    from .hostile import Slow, limited_time

    _report.quiet()
    started = time.monotonic()
    number = 0
    found = ""
    while not found and (not number or time.monotonic() - started < seconds):
        try:
            with limited_time(CASE_SECONDS):
                found = next(cases)
        except StopIteration:
            break
        except Slow as exc:
            found = str(exc)
        number += 1
    return Judgement(number, found, time.monotonic() - started)


def _first_failure(campaign: str, run: str, seed: int, seconds: float, only: str) -> Judgement:
    """Of a campaign that runs until it finds something; ``only`` is one of its workloads."""
    _report.quiet()
    started = time.monotonic()
    more = {"workload": only} if only else {}
    result = getattr(load(campaign), run)(seed, seconds=seconds, **more)
    found = result.first_failure
    cases = result.points + result.nested
    return Judgement(cases, found.what if found else "", time.monotonic() - started)


def leaks(seed: int, seconds: float, only: str = "") -> Judgement:
    """A failing call on real files; ``only`` is ``PROGRAM/CALL``."""
    from . import leaks as campaign

    return _until_found(campaign.cases(seed, only), seconds)


def errors(seed: int, seconds: float, only: str = "") -> Judgement:
    """A fault at some operation, drawn; ``only`` is ``WORKLOAD[/KIND[/MODE]]``."""
    from .errors import KINDS, MODES, WORKLOADS, first_cases, run_case

    def cases() -> Cases:
        rng = random.Random(seed)
        wanted = only.split("/") if only else []
        every: list[list[str]] = [list(WORKLOADS), list(KINDS), list(MODES)]
        loops = first_cases(
            *([given] if given else choices for given, choices in zip_longest(wanted, every))
        )
        # How many operations there are turns out when one of them is asked for.
        numbers = {loop: rng.sample(range(OPERATIONS), OPERATIONS) for loop in loops}
        while loops:
            loop = rng.choice(loops)
            number = numbers[loop].pop()
            result = run_case(attrs.evolve(loop, number=number))
            if result.operation:
                yield result.error
            else:
                numbers[loop] = [other for other in numbers[loop] if other < number]
            if not numbers[loop]:
                loops.remove(loop)

    return _until_found(cases(), seconds)


def bitrot(seed: int, seconds: float, only: str = "") -> Judgement:
    """Damages, drawn; ``only`` is ``PART[/WAY]``."""
    from .bitrot import (
        MODES,
        OFFLINE,
        PAST,
        SHORT,
        SMALL,
        WAYS,
        Task,
        list_of,
        run_task,
        subject,
        usable,
    )

    def cases() -> Cases:
        rng = random.Random(seed)
        part_only, _, way = only.partition("/")
        while True:
            part = part_only or rng.choice(("flips", "flips", "files", "random", "ways", "stale"))
            names = [*PAST] if part == "stale" else [*filter(usable, SMALL), *SHORT]
            name = rng.choice(names)
            made = subject(name)
            modes = [*WAYS] if part == "ways" else [*MODES, OFFLINE, *WAYS]
            mode = way or rng.choice(modes)
            if made.commits and part == "files" and mode not in WAYS:
                continue
            if part in ("files", "stale"):
                case = rng.randrange(len(list_of(part, name)))
            else:
                case = rng.getrandbits(32) if part == "random" else rng.randrange(made.bits())
            # With whatever was damaged before, a reader that stays open must have done.
            some = range(max(0, case - 3), case + 1)
            failures = run_task(Task(part, name, mode, some)).failures
            yield failures[0][1] if failures else ""

    return _until_found(cases(), seconds)


def hostile(seed: int, seconds: float, only: str = "") -> Judgement:
    from .hostile import MEMORY_BYTES, PLACES, STORE_KINDS, limit_once, run_case

    def places() -> Cases:
        first = ("log", "link to a log"), ("store", "link to a store")
        first += ("store/data.mdb", "link to an empty file"), ("store/lock.mdb", "hard link")
        every = [(target, kind) for kind in STORE_KINDS for target in PLACES]
        for target, kind in dict.fromkeys((*first, *every)):
            yield _report.found_in(run_case, "places", f"{target}|{kind}")

    def cases() -> Cases:
        limit_once(MEMORY_BYTES)
        for number in itertools.count((seed << 32) + 1):
            yield _report.found_in(run_case, "inputs", str(number))

    return _until_found(places() if only == "places" else cases(), seconds)


def bombs(seed: int, seconds: float, only: str = "") -> Judgement:
    """Those that are stopped long before they have taken much memory."""
    from .hostile import BOMBS, MEMORY_BYTES, run_case

    names = [name for name, (_, limit) in BOMBS.items() if limit == MEMORY_BYTES]
    return _until_found((_report.found_in(run_case, "bombs", name) for name in names), seconds)


def pages(seed: int, seconds: float, only: str = "") -> Judgement:
    """Damaged stores, and what their check says of them; in processes that may end."""
    from .store import DEFECTS, _ask

    def cases() -> Cases:
        at = seed << 32
        while True:
            # One process for as long as it lives: it makes the databases first.
            for case, found in _ask(range(at, at + ENDLESS)):
                at = case + 1
                yield f"{found.outcome}: {found.what}" if found.outcome in DEFECTS else ""

    return _until_found(cases(), seconds)


def readers(seed: int, seconds: float, only: str = "") -> Judgement:
    """Short rows of lives; ``only`` is the kind of log.  Each has its own time."""
    from .readers import KINDS, Task, lives_of

    started = time.monotonic()
    kinds = [only] if only else list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        for number in itertools.count(1):
            # Those of odd seeds cut.
            task = Task(
                kinds[number % len(kinds)], 2 * (seed + number) - 1, folder, folder, lives=8
            )
            outcome = lives_of(task)
            found = outcome.problems[0].splitlines()[0] if outcome.problems else ""
            if found or time.monotonic() - started > seconds:
                return Judgement(number, found, time.monotonic() - started)
    raise AssertionError("unreachable")


def lines(seed: int, seconds: float, only: str = "") -> Judgement:
    """Storms on the lines of a queue."""
    from .lines import found_in

    return _until_found(map(found_in, itertools.count(seed << 20)), seconds)


def figures(seed: int, seconds: float, only: str = "") -> Judgement:
    """A database in trouble and out of it again."""
    from .figures import found_in

    return _until_found(map(found_in, itertools.count(seed << 20)), seconds)


def plain(seed: int, seconds: float, only: str = "") -> Judgement:
    """Segments walked over by the flat loop and by the scanner."""
    from .plain import found_in

    return _until_found(map(found_in, itertools.count(seed << 20)), seconds)


def archive(seed: int, seconds: float, only: str = "") -> Judgement:
    """Logs that are archived, cut and crashed, and what is restored of them."""
    from .archive import found_in

    return _until_found(map(found_in, itertools.count(seed << 20)), seconds)


def threads(seed: int, seconds: float, only: str = "") -> Judgement:
    """Checkpoints without pause beside commits and deletions, in real threads."""
    from .threads import found_in

    return _until_found(map(found_in, itertools.count(seed << 20)), seconds)


def repair(seed: int, seconds: float, only: str = "") -> Judgement:
    """Damaged logs and databases repaired, and crashes in that."""
    from .repair import found_in

    return _until_found(map(found_in, itertools.count(seed << 20)), seconds)


def commands(seed: int, seconds: float, only: str = "") -> Judgement:
    """Databases and logs on real files, read from outside and compared."""
    from ._commands import found_in

    return _until_found(map(found_in, itertools.count(seed << 20)), seconds)


def doors(seed: int, seconds: float, only: str = "") -> Judgement:
    """Consumers that read ahead, readers that are woken, the loop's syncs, asyncio's calls."""
    from ._doors import found_in

    return _until_found((found_in(n, only) for n in itertools.count(seed << 20)), seconds)


# -- LMDB ---------------------------------------------------------------------------


def store(seed: int, seconds: float, only: str = "") -> Judgement:
    """Real databases on real files, against a dictionary: checkpoints, reopening, backups."""

    def cases() -> Cases:
        for number in itertools.count(seed):
            with tempfile.TemporaryDirectory() as folder:
                rng = random.Random(number)
                yield _report.found_in(trio.run, _database_on_disk, Path(folder), rng)

    return _until_found(cases(), seconds)


async def _database_on_disk(folder: Path, rng: random.Random) -> None:
    expected: dict[bytes, bytes] = {}
    keys = [b"%d" % n for n in range(12)]
    backup: tuple[Path, dict[bytes, bytes]] | None = None
    for life in range(4):
        async with trio_wal.open_database(
            folder / "db", segment_size=1, checkpoint_bytes=rng.choice((200, 1 << 20))
        ) as db:
            check(dict(db.scan()) == expected, f"life {life}: {dict(db.scan())}, not {expected}")
            for _ in range(rng.randrange(1, 12)):
                async with db.transaction() as tx:
                    for key in rng.sample(keys, rng.randrange(1, 4)):
                        if key in expected and rng.random() < 0.4:
                            tx.delete(key)
                            del expected[key]
                        else:
                            expected[key] = rng.randbytes(rng.choice((0, 5, 300)))
                            tx.put(key, expected[key])
                if rng.random() < 0.3:
                    await db.checkpoint()
            check(list(db.scan()) == sorted(expected.items()), "the scan is another")
            back = list(db.scan(reverse=True))
            check(back == sorted(expected.items(), reverse=True), "the scan backwards is another")
            if rng.random() < 0.5:
                backup = folder / f"backup {life}", dict(expected)
                await db.backup(backup[0])
    if backup is not None:
        async with trio_wal.open_database(backup[0]) as db:
            check(dict(db.scan()) == backup[1], "the backup is another")
    await _mixed_up(folder)


async def _mixed_up(folder: Path) -> None:
    """The store of another database is refused, and so is none where one is needed."""
    for name in (b"one", b"other"):
        async with trio_wal.open_database(folder / name.decode()) as db:
            await db.put(b"name", name)
            await db.checkpoint()
    (folder / "one" / "store").rename(folder / "away")
    (folder / "other" / "store").rename(folder / "one" / "store")
    await _refused(folder / "one", "the store of another database was taken")
    (folder / "one" / "store").rename(folder / "away too")
    async with trio_wal.open_database(folder / "later", segment_size=1) as db:
        for _ in range(3):
            await db.put(b"name", bytes(1000))
            await db.checkpoint()
        # Dropped by a task of the log's own, which a close does not wait for.
        with trio.move_on_after(30):
            while db.wal.first_lsn == 1:  # noqa: ASYNC110  (nothing tells of it)
                await trio.sleep(0.01)
    await trio.to_thread.run_sync(shutil.rmtree, folder / "later" / "store")
    check(first_lsn(folder / "later") > 1, "nothing of the log was dropped")
    await _refused(folder / "later", "a missing store was passed over")


def first_lsn(path: Path) -> int:
    """The first LSN of a database's log."""
    return verify(OsFiles().open_directory(str(path / "log"))).first_lsn


async def _refused(path: Path, otherwise: str) -> None:
    try:
        async with trio_wal.open_database(path):
            pass
    except trio_wal.CorruptLogError:
        return
    raise AssertionError(otherwise)


def replication(seed: int, seconds: float, only: str = "") -> Judgement:
    """Histories of a replicated log."""
    from .replication import run_one

    return _until_found((run_one(case)[1] for case in itertools.count(seed)), seconds)


JUDGES: Final[dict[str, Judge]] = {
    "simulator": partial(_first_failure, "_simulator", "run_points"),
    "whole": partial(_first_failure, "whole", "run_whole"),
    "schedules": partial(_first_failure, "schedules", "run_schedules"),
    "errors": errors,
    "leaks": leaks,
    "bitrot": bitrot,
    "readers": readers,
    "hostile": hostile,
    "plain": plain,
    "bombs": bombs,
    "store": store,
    "pages": pages,
    "replication": replication,
    "lines": lines,
    "threads": threads,
    "figures": figures,
    "archive": archive,
    "repair": repair,
    "commands": commands,
    "doors": doors,
}
"""In the order in which they are asked."""
