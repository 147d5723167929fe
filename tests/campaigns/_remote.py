"""A program that writes into a log or a database on servers, and says what it was told.

Law: one line of JSON for each outcome, with the time at which it came; it judges nothing, that is
for whoever started it.  It opens the log again when that has become unavailable, stops when it is
fenced, and ends when its standard input does.  The time is the monotonic clock, which all processes
of a machine share.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import attrs
import trio

import trio_wal
from trio_wal import LogFailedError, LogFencedError, nats
from trio_wal._caslog import Conflict, Description
from trio_wal._operations import OperationsError, decode_transaction
from trio_wal._replicated import RemoteLog
from trio_wal.nats import UnsuitableServersError

from ._report import quiet

Tell = Callable[..., None]
Write = Callable[[bytes], Awaitable[int]]

CANCELLED: Final = 0.02
"""Share of the writes that are cancelled."""
CANCEL_SECONDS: Final = 0.02
COUNT: Final = b"count of "
"""With what the keys begin under which a task counts its own transactions."""
PAUSE_SECONDS: Final = 0.2
"""Before a log that could not be opened is opened again."""


@attrs.frozen(kw_only=True)
class Job:
    """One program."""

    kind: str
    """"log" or "database"."""
    servers: list[str]
    monitors: list[str]
    name: str
    """Of the log."""
    writer: str
    """Its keys begin with it."""
    folder: str
    """For its cache."""
    seed: int
    tasks: int = 8
    replicas: int = 3
    unavailable_after: float = 30.0
    assume_synced: bool = False
    reopens: bool = True
    """Whether it opens a log again that has become unavailable."""
    believing: bool = False
    """Whether it takes any answer for "yes": a control, which must be found out."""

    def log(self) -> nats.Log:
        return nats.Log(
            self.servers,
            self.name,
            monitor=self.monitors,
            replicas=self.replicas,
            unavailable_after=self.unavailable_after,
            assume_synced=self.assume_synced,
        )


class _BelievingCas:
    """A `CasLog` that does not look whose batch stands where its own should."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def append(self, after: int, pieces: list[bytes], ident: str) -> int:
        try:
            return int(await self._inner.append(after, pieces, ident))
        except Conflict:
            return after + len(pieces)


class _BelievingLog(RemoteLog):
    """A log whose writer's batches are in it, as far as that writer knows."""

    def __init__(self, inner: nats.Log) -> None:
        self._inner = inner
        self.unavailable_after = inner.unavailable_after
        self.takeover = True

    @property
    def address(self) -> str:
        return self._inner.address

    async def connect(self, *, create: bool) -> tuple[Any, Description]:
        cas, found = await self._inner.connect(create=create)
        # It begins as it should.
        return (_BelievingCas(cas) if found.last else cas), found


# -- writing ---------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _opened(job: Job) -> AsyncIterator[Write]:
    """What writes one key; gives the LSN."""
    log: Any = _BelievingLog(job.log()) if job.believing else job.log()
    if job.kind == "log":
        async with trio_wal.open_wal(log) as wal:
            yield wal.append
        return
    async with trio_wal.open_database(f"{job.folder}/{job.writer}", log=log) as db:

        async def put(key: bytes) -> int:
            async with db.transaction() as tx:
                mine = COUNT + key.rpartition(b".")[0]
                number = int(tx.get(mine) or 0) + 1
                tx.put(mine, b"%d" % number)
                tx.put(key, b"%d" % number)
            assert tx.lsn is not None
            return tx.lsn

        yield put


async def keep_writing(
    write: Write, task: str, chance: random.Random, over: trio.Event, tell: Tell
) -> None:
    """One task: one write after the other, until it is over or the log is."""
    number = 0
    while not over.is_set():
        number += 1
        lsn: int | None = None
        with trio.CancelScope() as scope:
            if chance.random() < CANCELLED:
                scope.deadline = trio.current_time() + chance.uniform(0, CANCEL_SECONDS)
            try:
                lsn = await write(b"%s.%d" % (task.encode(), number))
            except LogFailedError as exc:
                tell("absent" if exc.outcome == "not written" else "unknown", task, number)
                tell("failed", type(exc).__name__, exc.outcome)
                if isinstance(exc, LogFencedError):
                    over.set()
                return
            except trio.ClosedResourceError:
                tell("absent", task, number)
                return
        if lsn is None:
            assert scope.cancelled_caught
            tell("absent", task, number)
        else:
            tell("acknowledged", task, number, lsn)


async def _live(job: Job, over: trio.Event, tell: Tell) -> None:
    life, chance = 0, random.Random(job.seed)
    opened = False
    while not over.is_set() and (job.reopens or not opened):
        life += 1
        try:
            async with _opened(job) as write, trio.open_nursery() as nursery:
                opened = True
                tell("open")
                for number in range(job.tasks):
                    task = f"{job.writer}.{life}.{number}"
                    nursery.start_soon(keep_writing, write, task, chance, over, tell)
        except (LogFailedError, OSError, UnsuitableServersError) as exc:
            # The last one: of servers that are cut off, nobody says whether they sync.
            tell("failed", type(exc).__name__, str(exc))
            if isinstance(exc, LogFencedError):
                return
            await trio.sleep(PAUSE_SECONDS)


async def _until_told(over: trio.Event) -> None:
    async with trio.lowlevel.FdStream(os.dup(0)) as stream:
        while await stream.receive_some():
            pass
    over.set()


async def _main(job: Job) -> None:
    def tell(*words: object) -> None:
        sys.stdout.write(json.dumps([*words, time.monotonic()]) + "\n")
        sys.stdout.flush()

    tell("begun")
    over = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_until_told, over)
        await _live(job, over, tell)
        nursery.cancel_scope.cancel()


# -- what is there ---------------------------------------------------------------------


async def found_by(job: Job) -> tuple[int, list[tuple[int, bytes]]]:
    """The log as it is now: where it begins, and (LSN, key) of each record."""
    async with trio_wal.open_reader(job.log()) as reader, reader.read() as records:
        found = [(record.lsn, _key_of(record.data, job.kind)) async for record in records]
        return reader.first_lsn, found


def _key_of(data: bytes, kind: str) -> bytes:
    if kind == "log":
        return data
    try:
        writes = decode_transaction(data)
    except OperationsError as exc:
        return f"no transaction: {exc}".encode()
    return b" ".join(key for key in writes if not key.startswith(COUNT))


async def state_of(job: Job, cache: str) -> dict[bytes, bytes]:
    """The database, as who has nothing of it finds it."""
    async with trio_wal.open_database(cache, log=job.log()) as db:
        return dict(db.scan())


if __name__ == "__main__":
    quiet()
    trio.run(_main, Job(**json.loads(sys.argv[1])))
