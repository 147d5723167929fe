"""`trio_wal.asyncio`: durable puts beside trio's own, and beside aiosqlite.

Law: the same closed loop for everybody, each contender in a process of its own, in turns.  Each
put is a durable transaction of its own: with aiosqlite a connection for all tasks, which is the
usual way, and ``synchronous=FULL`` in WAL mode.  CPU time is told as well, because two threads
share what one has under trio.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from apart import apart
from harness import Contender, Setting, compare
from report import Report, Requirement, spread_text, table

import trio_wal.asyncio

TASKS: Final = (1, 16, 128)
VALUE: Final = b"." * 100
KEYS_A_TASK: Final = 500
FACADE: Final = "trio_wal.asyncio"
OWN: Final = "trio_wal, under trio"
AIOSQLITE: Final = "aiosqlite"

Put = Callable[[bytes, bytes], Awaitable[object]]


class _Loop:
    """Tasks that put until the time is over."""

    def __init__(self, seconds: float, put: Put) -> None:
        self._put = put
        self._seconds = seconds
        self._end = 0.0
        self._cpu = 0.0
        self._begin = 0.0
        self._done = 0

    def begin(self) -> None:
        self._cpu, self._begin = time.process_time(), time.perf_counter()
        self._end = self._begin + self._seconds

    async def worker(self, task: int) -> None:
        own, turn = task.to_bytes(3, "big"), 0
        while time.perf_counter() < self._end:
            await self._put(own + b"%d" % (turn % KEYS_A_TASK), VALUE)
            self._done += 1
            turn += 1

    def figures(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._begin
        cpu = time.process_time() - self._cpu
        return {"rate": self._done / seconds, "cpu_us": cpu / max(1, self._done) * 1e6}


async def _gathered(loop: _Loop, tasks: int) -> dict[str, float]:
    loop.begin()
    await asyncio.gather(*(loop.worker(task) for task in range(tasks)))
    return loop.figures()


async def _facade(path: Path, tasks: int, seconds: float) -> dict[str, float]:
    async with trio_wal.asyncio.open_database(path) as db:
        return await _gathered(_Loop(seconds, db.put), tasks)


async def _aiosqlite(path: Path, tasks: int, seconds: float) -> dict[str, float]:
    import aiosqlite

    async with aiosqlite.connect(path, isolation_level=None) as connection:
        await connection.execute("PRAGMA journal_mode = WAL")
        await connection.execute("PRAGMA synchronous = FULL")
        await connection.execute(
            "CREATE TABLE pairs (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
        )

        async def put(key: bytes, value: bytes) -> None:
            # Without a transaction around it, a statement is one.
            await connection.execute("INSERT OR REPLACE INTO pairs VALUES (?, ?)", (key, value))

        return await _gathered(_Loop(seconds, put), tasks)


async def _own(path: Path, tasks: int, seconds: float) -> dict[str, float]:
    async with trio_wal.open_database(path) as db:
        loop = _Loop(seconds, db.put)
        loop.begin()
        async with trio.open_nursery() as nursery:
            for task in range(tasks):
                nursery.start_soon(loop.worker, task)
        return loop.figures()


def trial(path: str, name: str, tasks: int, seconds: float) -> dict[str, float]:
    """Puts per second, and microseconds of CPU time for one."""
    if name == OWN:
        found: dict[str, float] = trio.run(_own, Path(path), tasks, seconds)
        return found
    main: Callable[..., Any] = {FACADE: _facade, AIOSQLITE: _aiosqlite}[name]
    return asyncio.run(main(Path(path), tasks, seconds))


def run(setting: Setting) -> Report:
    """The benchmark."""
    seconds, rounds = (1.0, 3) if setting.brief else (5.0, 7)
    report = Report("asyncio")

    def one(name: str, tasks: int) -> Mapping[str, float]:
        with setting.scratch() as path:
            return apart(trial, str(path / "db"), name, tasks, seconds)

    shown = table(
        f"Durable puts under asyncio, each its own transaction, {rounds} rounds of {seconds:g} s",
        ["tasks", "", "puts per second", "us of CPU per put", "to trio's own"],
    )
    for tasks in TASKS:
        names = (OWN, FACADE, AIOSQLITE)
        found = compare([Contender(name, partial(one, name, tasks)) for name in names], rounds)
        for name in names:
            shown.add_row(
                str(tasks),
                name,
                spread_text(found.spread(name, "rate")),
                spread_text(found.spread(name, "cpu_us")),
                spread_text(found.ratio(name, OWN, "rate")),
            )
        report.data[f"{tasks} tasks"] = {name: found.spread(name, "rate") for name in names}
        if found.disturbed:
            report.notes.append(
                f"{tasks} tasks: other processes disturbed {found.disturbed} trials."
            )
        if tasks == TASKS[-1]:
            for key, to, limit in (("trio's own", OWN, 0.3), ("aiosqlite", AIOSQLITE, 10.0)):
                report.requirements.append(
                    Requirement(
                        f"asyncio to {key}",
                        f"trio_wal.asyncio, put of {tasks} tasks, to {key}",
                        f"at least {limit:g} ×",
                        limit,
                        found.ratio(FACADE, to, "rate"),
                    )
                )
    report.tables.append(shown)
    return report
