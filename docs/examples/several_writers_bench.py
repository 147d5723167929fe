"""Durable writes per second from several processes: through one owner, and with SQLite.

    python docs/examples/several_writers_bench.py

Each of 4 processes has 64 tasks, and each task waits for its write before it does the next one.
With `several_writers.py`, all send to one owner.  With SQLite (in WAL mode, synchronous=FULL) each
process opens the file, and batches by hand: one transaction for all that its tasks want written.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import subprocess
import sys
import tempfile
import time

import trio

SEVERAL_WRITERS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "several_writers.py")


class SqliteWriter:
    def __init__(self, path: str) -> None:
        # Used by one thread at a time; another process may hold the lock for a while.
        self._connection = sqlite3.connect(
            path, timeout=60, isolation_level=None, check_same_thread=False
        )
        for line in (
            "PRAGMA journal_mode=WAL",
            "PRAGMA synchronous=FULL",
            "CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, data BLOB)",
        ):
            self._connection.execute(line)
        self._waiting: list[tuple[bytes, trio.Event]] = []
        self._news = trio.Event()

    async def write(self, data: bytes) -> None:
        durable = trio.Event()
        self._waiting.append((data, durable))
        self._news.set()
        await durable.wait()

    def _commit(self, rows: list[tuple[bytes]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT INTO entries (data) VALUES (?)", rows)
        self._connection.execute("COMMIT")

    async def run(self) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            batch, self._waiting = self._waiting, []
            await trio.to_thread.run_sync(self._commit, [(data,) for data, _ in batch])
            for _, durable in batch:
                durable.set()


async def write(path: str, count: int, tasks: int) -> None:
    writer = SqliteWriter(path)
    numbers = iter(range(1, count + 1))

    async def task() -> None:
        for number in numbers:
            await writer.write(b"note %d" % number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        start = time.monotonic()
        async with trio.open_nursery() as tasks_nursery:
            for _ in range(tasks):
                tasks_nursery.start_soon(task)
        print("written from", start, "to", time.monotonic())
        nursery.cancel_scope.cancel()


def rate(commands: list[list[str]], count: int) -> float:
    """Of processes that run at the same time, from the first write to the last."""
    running = [
        subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) for command in commands
    ]
    words = [process.communicate()[0].split() for process in running]
    seconds = max(float(w[-1]) for w in words) - min(float(w[-3]) for w in words)
    return count * len(commands) / seconds


def main(folder: str, count: int, tasks: int, processes: int) -> None:
    options = ["--count", str(count), "--tasks", str(tasks)]
    with tempfile.TemporaryDirectory(dir=folder) as path:
        socket, database = os.path.join(path, "socket"), os.path.join(path, "db")
        own = [sys.executable, SEVERAL_WRITERS, "own", database, socket]
        with subprocess.Popen(own, stdout=subprocess.PIPE) as owner:
            assert owner.stdout is not None
            owner.stdout.readline()  # it is ready
            command = [SEVERAL_WRITERS, "write", socket, "--quiet", *options]
            ours = rate([[*command, "--name", f"writer {n}"] for n in range(processes)], count)
            owner.kill()
        sqlite = [__file__, "--sqlite", os.path.join(path, "sqlite.db"), *options]
        theirs = rate([sqlite] * processes, count)
    print(f"{processes} processes of {tasks} tasks, durable writes per second:")
    print(f"through one owner {ours:,.0f}; SQLite {theirs:,.0f}; ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Several writers, compared with SQLite.")
    parser.add_argument("--folder", default="/var/tmp", help="on the disk that is measured")
    parser.add_argument("--count", type=int, default=50_000, help="writes of each process")
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--sqlite", metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.sqlite:
        trio.run(write, given.sqlite, given.count, given.tasks)
    else:
        main(given.folder, given.count, given.tasks, given.processes)
