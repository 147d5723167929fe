"""A durable job queue: priorities, delays, retries with back-off, time-outs, dead letters.

    echo '{"kind": "hello", "payload": "world"}' | python docs/examples/job_queue.py jobs.db

takes jobs from standard input, one JSON object per line (`priority`: 0 is first; `delay` in
seconds), says `enqueued` once a job is durable, and ends when all are done.  Kill it whenever you
like, and start it again: no job that it has told of is lost.

A job's number is in one of two tables.  `ready` is in the order of priorities.  `later` is in
the order of time: jobs that are delayed, that are tried again, and that a worker has just now
(until its visibility time-out) are all alike, and become ready when their time has come.

A handler may run more than once for a job.  What it returns is called in the transaction that
ends the job, so an effect on the database happens exactly once.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec
import trio

import trio_wal
from trio_wal import Database, Table, Transaction


class Job(msgspec.Struct, frozen=True):
    kind: str
    payload: str
    priority: int = 5
    tries: int = 0
    due: int = 0
    """When it is ready (again), in milliseconds since 1970."""
    error: str = ""


Effect = Callable[[Transaction], None]
Handler = Callable[[int, Job], Awaitable[Effect]]

jobs = Table("jobs", key=int, value=Job)
ready = Table("ready", key=tuple[int, int], value=bytes)  # priority and number
later = Table("later", key=tuple[int, int], value=bytes)  # time and number
dead = Table("dead", key=int, value=Job)
counters = Table("counters", key=str, value=int)


def now() -> int:
    return time.time_ns() // 1_000_000


def count(tx: Transaction, name: str) -> int:
    """The next number.  No transaction here has an `await` in it, so none can conflict."""
    number = counters.get(tx, name, 0) + 1
    counters.put(tx, name, number)
    return number


class Queue:
    def __init__(self, db: Database, visibility: float = 30.0, tries: int = 5) -> None:
        self._db = db
        self._visibility = visibility
        self._tries = tries

    async def enqueue(
        self, kind: str, payload: str, *, priority: int = 5, delay: float = 0.0
    ) -> int:
        """The job's number; it is durable when this returns."""
        async with self._db.transaction() as tx:
            number = count(tx, "job")
            job = Job(kind, payload, priority, due=now() + int(delay * 1000))
            jobs.insert(tx, number, job)
            if delay > 0:
                later.insert(tx, (job.due, number), b"")
            else:
                ready.insert(tx, (priority, number), b"")
        return number

    async def promote(self) -> None:
        """Run by one task: jobs whose time has come are put where workers find them."""
        while True:
            seen = self._db.durable_lsn
            async with self._db.transaction() as tx:
                for place, _ in list(later.scan(tx, stop=(now() + 1,), limit=100)):
                    later.delete(tx, place)
                    job = jobs.get(tx, place[1])
                    assert job is not None
                    if job.tries < self._tries:
                        ready.put(tx, (job.priority, place[1]), b"")
                    else:
                        # Its last try never ended: the process died, perhaps of it.
                        self._bury(tx, place[1], job, "out of time")
                first = next(later.scan(tx, limit=1), None)
            seconds = math.inf if first is None else max(0, first[0][0] - now()) / 1000
            with trio.move_on_after(seconds):
                await self._db.wait_changed(prefix=later.prefix, since=seen)

    async def work(self, handlers: Mapping[str, Handler]) -> None:
        """Run by any number of tasks."""
        while True:
            seen = self._db.durable_lsn
            claimed = await self._claim()
            if claimed is None:
                await self._db.wait_changed(prefix=ready.prefix, since=seen)
                continue
            number, job = claimed
            try:
                with trio.fail_after(self._visibility):
                    effect = await handlers[job.kind](number, job)
            except Exception as exc:  # noqa: BLE001  (whatever it is, the job is tried again)
                await self._fail(number, job, repr(exc))
            else:
                await self._complete(number, job, effect)

    async def _claim(self) -> tuple[int, Job] | None:
        async with self._db.transaction() as tx:
            place = next(ready.scan(tx, limit=1), None)
            if place is None:
                return None
            (priority, number), _ = place
            ready.delete(tx, (priority, number))
            job = jobs.get(tx, number)
            assert job is not None
            due = now() + int(self._visibility * 1000)
            job = msgspec.structs.replace(job, tries=job.tries + 1, due=due)
            jobs.put(tx, number, job)
            later.put(tx, (due, number), b"")
        return number, job

    def _release(self, tx: Transaction, number: int, job: Job) -> bool:
        """Whether the job is still this worker's: its time may be over, and another one at it."""
        if jobs.get(tx, number) != job:
            return False
        later.discard(tx, (job.due, number))
        ready.discard(tx, (job.priority, number))
        jobs.delete(tx, number)
        return True

    async def _complete(self, number: int, job: Job, effect: Effect) -> None:
        async with self._db.transaction() as tx:
            if self._release(tx, number, job):
                effect(tx)

    async def _fail(self, number: int, job: Job, error: str) -> None:
        async with self._db.transaction() as tx:
            if not self._release(tx, number, job):
                return
            if job.tries >= self._tries:
                self._bury(tx, number, job, error)
                return
            job = msgspec.structs.replace(job, due=now() + 50 * 2**job.tries, error=error)
            jobs.put(tx, number, job)
            later.put(tx, (job.due, number), b"")

    def _bury(self, tx: Transaction, number: int, job: Job, error: str) -> None:
        jobs.discard(tx, number)
        dead.put(tx, number, msgspec.structs.replace(job, error=error))

    async def wait_empty(self) -> None:
        seen = self._db.durable_lsn
        while next(jobs.scan(self._db, limit=1), None) is not None:
            seen = await self._db.wait_changed(prefix=jobs.prefix, since=seen)


# -- what the jobs do ---------------------------------------------------------------

done = Table("done", key=int, value=tuple[int, str])  # in the order in which they were done


async def hello(number: int, job: Job) -> Effect:
    await trio.sleep(0.002)  # something outside of the database, which may happen again
    return lambda tx: done.insert(tx, count(tx, "done"), (number, job.payload))


async def flaky(number: int, job: Job) -> Effect:
    if job.tries == 1:
        raise ConnectionError("it is down")
    return await hello(number, job)


async def broken(number: int, job: Job) -> Effect:
    raise ValueError(f"nobody can do job {number}, {job.payload!r}")


HANDLERS: Mapping[str, Handler] = {"hello": hello, "flaky": flaky, "broken": broken}


async def main(path: str, workers: int, visibility: float, tries: int) -> None:
    async with trio_wal.open_database(path) as db:
        queue = Queue(db, visibility, tries)
        async with trio.open_nursery() as nursery:
            if workers:
                nursery.start_soon(queue.promote)
            for _ in range(workers):
                nursery.start_soon(queue.work, HANDLERS)
            async for line in trio.wrap_file(sys.stdin):
                number = await queue.enqueue(**msgspec.json.decode(line))
                print("enqueued", number, line.strip(), flush=True)
            if workers:
                await queue.wait_empty()
            nursery.cancel_scope.cancel()
        for table in (jobs, done, dead):
            print(f"{table.name}: {sum(1 for _ in table.scan(db))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A durable job queue.")
    parser.add_argument("path")
    parser.add_argument("--workers", type=int, default=4, help="0: only enqueue")
    parser.add_argument("--visibility", type=float, default=30.0, help="seconds for one try")
    parser.add_argument("--tries", type=int, default=5, help="then a job is dead")
    arguments = parser.parse_args()
    trio.run(main, arguments.path, arguments.workers, arguments.visibility, arguments.tries)
