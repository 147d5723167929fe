"""The program that real disks, signals and errors are let loose on, and what it says of itself.

Law: what it tells about itself is true when it is told: an acknowledgement leaves it only
after `append` or `commit` has returned, an intention before the call is made.  What is read
on opening is told before anything is written.  It judges nothing: that is `_ledger`'s.

One message is one line of JSON: its name, then what `_ledger` says there.  Everything
written is made from (seed, life, task, number) alone, so that one look at a record tells whose
it is and whether each of its bytes is right.  A life is one run of the program; in a life each
task has at most one operation under way.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import multiprocessing
import os
import signal
import struct
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import lru_cache, partial
from hashlib import shake_128
from random import Random
from typing import Any, Final

import attrs
import lmdb  # noqa: F401  (loaded before anything fails on purpose)
import trio

import trio_wal
from trio_wal import Database, Transaction, TransactionConflict, WriteAheadLog
from trio_wal._disk.segment import SPARE_PREFIX
from trio_wal._files import Files
from trio_wal._operations import decode_transaction
from trio_wal._system.files import OsDirectory, OsFile, OsFiles

from . import _report

# With all that they are made of: errors are to meet what is opened, not what is imported.
for _name in dir(trio_wal):
    getattr(trio_wal, _name)

Tell = Callable[..., None]
Mark = tuple[int, int, int, int, int]
"""(life, task, number, part, parts) of a record."""

HANG_SECONDS: Final = 120
"""A program that is not done by then hangs: it is ended by SIGALRM, which is a finding."""
PAUSE_SECONDS_MAX: Final = 0.02
"""Between two truncations, checkpoints and so on: a few operations of each task."""
FAILED: Final = 3
"""Exit code of a life that ended in an error that it told."""
BROKEN: Final = 70
"""Exit code after an error that is the program's own."""

CHECK_BYTES: Final = 8
"""That follow a record's head however short it is."""
ACCOUNTS: Final = 10
BALANCE: Final = 100
SLOTS: Final = 6
SHARED: Final = 4
SETUP: Final = b"setup"
CONSUMER: Final = "mirror"

_HEAD: Final = struct.Struct("<4sIHHIHHI")
_MAGIC: Final = b"TWc1"
_PR_SET_PDEATHSIG: Final = 1
_SYNC_FILE_RANGE_WRITE_AND_WAIT: Final = 7

POISON: Final = b"the disk does not take this"
"""Stands in the record that `Job.poison` asks for: a block store can know its write by it."""


@attrs.frozen(kw_only=True)
class BaseJob:
    """One life of a program that writes into a log."""

    kind: str
    """"log" or "database"."""
    path: str
    seed: int
    life: int = 0
    tasks: int = 4
    operations: int = 20
    """Of each task."""
    ending: str = "close"
    """"close": in order; "exit": the process ends when its tasks have; "kill": at a step."""
    kill_at: int = 0
    """The step of the event loop at which it kills itself, for "kill"."""
    cuts: bool = True
    """Whether `truncate_after` is among what it does."""
    drops: bool = True
    """Whether `truncate_before` is."""
    consumes: bool = False
    """Whether a log's consumer is beside it."""
    options: dict[str, Any] = attrs.Factory(dict)
    """For `open_wal` or `open_database`."""

    def json(self) -> str:
        return json.dumps(attrs.asdict(self))


@attrs.frozen(kw_only=True)
class Job(BaseJob):
    """One life of this program."""

    large: bool = False
    """Appends only, of records so large that segments are not written with zeros in advance, and
    each the first in its blocks of the file system."""
    poison: int | None = None
    """Task 0 writes `POISON` in its operation of this number."""
    faulty: bool = False
    """The disk may answer with errors: tell each sync that has succeeded, and after an error
    sync every file by hand and tell what that says."""
    stranger: bool = False
    """Another program's file is synced at every turn, just before ours is: it is told of an error
    in the file system's journal, and we may then be told nothing."""
    ballast: str = ""
    """A file that is removed at the first `LogFullError`, to make room."""


class InlineFiles(OsFiles):
    """Real files without threads, so that whoever opens a log here can fork afterwards."""

    threaded = False


# -- what is written -------------------------------------------------------------------


def record(seed: int, mark: Mark, size: int) -> bytes:
    """A record that says whose it is."""
    head = _HEAD.pack(_MAGIC, seed & 0xFFFFFFFF, *mark, size)
    return head + shake_128(head).digest(CHECK_BYTES + size)


def mark_of(seed: int, data: bytes) -> Mark | None:
    """Whose record this is; None where a single byte of it is wrong."""
    if len(data) < _HEAD.size:
        return None
    _, _, life, task, number, part, parts, size = _HEAD.unpack_from(data)
    if size > len(data):
        return None
    mark = (life, task, number, part, parts)
    return mark if record(seed, mark, size) == data.removesuffix(POISON) else None


LARGE: Final = 9 * 4096 - 64 - 4 - _HEAD.size - CHECK_BYTES
"""Of a record that fills nine pages with its frame's header and table of lengths."""


def _size(rng: Random) -> int:
    return rng.choice((0, 20, rng.randrange(300), rng.randrange(300), rng.randrange(5000)))


@attrs.frozen
class Writes:
    """What one transaction writes beside its count and, perhaps, a transfer."""

    own: tuple[tuple[int, int | None], ...]
    """(slot, size of its value; None: deleted)."""
    shared: tuple[int, ...]
    transfer: bool


@lru_cache(maxsize=100_000)
def writes_of(seed: int, life: int, task: int, number: int) -> Writes:
    rng = Random(f"{seed} {life} {task} {number}")
    slots = rng.sample(range(SLOTS), rng.randint(0, 3))
    own = tuple((slot, None if rng.random() < 0.2 else _size(rng)) for slot in slots)
    shared = tuple(rng.sample(range(SHARED), rng.randint(0, 2)))
    return Writes(own, shared, rng.random() < 0.4)


def count_key(life: int, task: int) -> bytes:
    return b"count/%d/%d" % (life, task)


def own_key(task: int, slot: int) -> bytes:
    return b"own/%d/%d" % (task, slot)


def shared_key(place: int) -> bytes:
    return b"shared/%d" % place


def account_key(place: int) -> bytes:
    return b"account/%d" % place


# -- lives -----------------------------------------------------------------------------


class Gate:
    """Operations beside each other, or one call alone."""

    def __init__(self) -> None:
        self._running = 0
        self._shut = False
        self._lot = trio.lowlevel.ParkingLot()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        while self._shut:
            await self._lot.park()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._lot.unpark_all()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        while self._shut:
            await self._lot.park()
        self._shut = True
        try:
            while self._running:
                await self._lot.park()
            yield
        finally:
            self._shut = False
            self._lot.unpark_all()


class Life:
    """What every program has that writes into a log: tasks, and what goes on beside them."""

    def __init__(self, job: Any, tell: Tell) -> None:
        self.job = job
        self.tell = tell
        self.failed = False
        self.gate = Gate()
        self.synced = job.options.get("durability", "sync") == "sync"
        """Whether an acknowledgement means durable."""

    def rng(self, who: object) -> Random:
        return Random(f"{self.job.seed} {self.job.life} {who}")

    async def tasks(
        self,
        act: Callable[[int, int, Random], Awaitable[int]],
        *beside: Callable[[Random], Awaitable[None]],
    ) -> None:
        """All tasks, and beside them what goes on until they are done.

        ``act`` is given a task's index and the number of its operation, and gives the next one's.
        """

        async def task(index: int) -> None:
            rng, number = self.rng(index), 0
            for _ in range(self.job.operations):
                if self.failed:
                    return
                async with self.gate.shared():
                    number = await act(index, number, rng)

        async def other(function: Callable[[Random], Awaitable[None]], rng: Random) -> None:
            while not self.failed:
                await trio.sleep(rng.uniform(0, PAUSE_SECONDS_MAX))
                await function(rng)

        if not self.job.operations:
            return
        async with trio.open_nursery() as aside:
            for place, function in enumerate(beside):
                aside.start_soon(other, function, self.rng(f"beside {place}"))
            async with trio.open_nursery() as nursery:
                for index in range(self.job.tasks):
                    nursery.start_soon(task, index)
            aside.cancel_scope.cancel()


# -- the log ---------------------------------------------------------------------------


class _Life(Life):
    """What log and database have in common."""

    def size(self, rng: Random) -> int:
        return LARGE if self.job.large else _size(rng)

    def error(self, exc: BaseException, task: int = -1, number: int = -1) -> None:
        """Say how a call failed."""
        cause = exc if isinstance(exc, OSError) else exc.__cause__
        outcome = getattr(exc, "outcome", "")
        name = type(exc).__name__
        self.tell("error", task, number, name, outcome, getattr(cause, "errno", None))
        if isinstance(exc, trio_wal.LogFullError) and os.path.exists(self.job.ballast):
            os.unlink(self.job.ballast)
            self.tell("room")
        if isinstance(exc, trio.BrokenResourceError):
            self.failed = True

    @contextlib.contextmanager
    def telling(self, task: int = -1, number: int = -1) -> Iterator[None]:
        """A call may fail as it is documented, which is told."""
        try:
            yield
        except (trio.BrokenResourceError, trio_wal.WalError, OSError) as exc:
            self.error(exc, task, number)

    async def probe(self, wal: WriteAheadLog, write: Callable[[], Awaitable[int]]) -> None:
        """A log that has failed takes nothing more, and says so."""
        if not self.failed:
            return
        try:
            lsn = await write()
        except trio.BrokenResourceError:
            self.tell("dead", wal.durable_lsn)
        else:
            self.tell("strange", f"a failed log took LSN {lsn}")

    async def cancelling(
        self, rng: Random, task: int, number: int, call: Callable[[], Awaitable[int]]
    ) -> None:
        """A call that is cancelled on its way, which says what became of it."""
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(self._cancel, scope, rng.randrange(6))
                with self.telling(task, number):
                    self.acknowledge(task, number, await call())
            if scope.cancelled_caught:
                # That is the promise: raised means absent.
                self.tell("absent", task, number)

    @staticmethod
    async def _cancel(scope: trio.CancelScope, steps: int) -> None:
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    def acknowledge(self, task: int, number: int, lsn: int) -> None:
        self.tell("ack" if self.synced else "written", task, number, lsn)


class _LogLife(_Life):
    wal: WriteAheadLog

    async def look(self, wal: WriteAheadLog) -> None:
        """Tell what the log holds."""
        seed = self.job.seed
        async with wal.read() as records:
            found = [(item.lsn, mark_of(seed, item.data)) async for item in records]
        lsns = [lsn for lsn, _ in found]
        if lsns != list(range(wal.first_lsn, wal.last_lsn + 1)):
            self.tell("strange", f"LSNs {lsns} between {wal.first_lsn} and {wal.last_lsn}")
        if wal.durable_lsn != wal.last_lsn:
            self.tell("strange", f"opened with {wal.durable_lsn} of {wal.last_lsn} durable")
        report = wal.recovery
        self.tell(
            *("open", wal.first_lsn, wal.last_lsn, report.torn_bytes, report.clean_shutdown),
            [mark for _, mark in found],
        )
        if self.job.consumes:
            known = wal.statistics().consumers.get(CONSUMER)
            self.tell("place", None if known is None else known.acknowledged_lsn)

    async def run(self, wal: WriteAheadLog) -> None:
        self.wal = wal
        await self.look(wal)
        beside = [self.follow]
        if self.job.drops:
            beside.append(self.drop)
        if self.job.cuts:
            beside.append(self.cut)
        if self.job.consumes:
            beside.append(self.consume)
        await self.tasks(self.act, *beside)
        await self.probe(wal, partial(wal.append, b"after the failure"))

    async def act(self, task: int, number: int, rng: Random) -> int:
        """One operation; gives the number of the next."""
        tell, wal = self.tell, self.wal
        kind = rng.choices(("append", "many", "send", "cancel"), (5, 2, 2, 1))[0]
        if self.job.large:
            kind = "append"
        if self.job.poison == number and task == 0:
            kind = "poison"
        sizes = [self.size(rng) for _ in range(1 if kind == "append" else rng.randint(2, 5))]
        seed, life = self.job.seed, self.job.life
        with self.telling(task, number):
            if kind == "send":
                await self.send(task, number, sizes)
                return number + len(sizes)
            parts = len(sizes) if kind == "many" else 1
            tell("will", task, number, parts)
            units = [
                record(seed, (life, task, number, part, parts), sizes[part])
                for part in range(parts)
            ]
            if kind == "many":
                self.acknowledge(task, number, (await wal.append_many(units))[0])
            elif kind == "cancel":
                await self.cancelling(rng, task, number, lambda: wal.append(units[0]))
            else:
                if kind == "poison":
                    units = [units[0] + POISON]
                self.acknowledge(task, number, await wal.append(units[0]))
        return number + 1

    async def send(self, task: int, number: int, sizes: list[int]) -> None:
        low = self.wal.durable_lsn
        sent: list[int] = []
        for place, size in enumerate(sizes):
            self.tell("will", task, number + place, 1)
            data = record(self.job.seed, (self.job.life, task, number + place, 0, 1), size)
            try:
                await self.wal.send(data)
            except trio_wal.LogFullError as exc:
                self.error(exc, task, number + place)
            except trio.BrokenResourceError as exc:
                self.error(exc, task, number + place)
                return
            else:
                sent.append(number + place)
        try:
            durable = await self.wal.flush()
        except (trio.BrokenResourceError, trio_wal.LogFullError) as exc:
            self.error(exc)
        else:
            self.tell("flushed", durable, task, sent, low)

    async def drop(self, rng: Random) -> None:
        wal = self.wal
        lsn = rng.randint(wal.first_lsn, wal.durable_lsn + 1)
        # Not far from the end: something should be left to be checked.
        lsn = max(wal.first_lsn, lsn - rng.randrange(60))
        self.tell("drop", lsn)
        try:
            await wal.truncate_before(lsn)
        except (trio_wal.LsnTruncatedError, ValueError):
            # What goes on beside this has cut that LSN off.
            self.tell("not dropped")
        except (trio.BrokenResourceError, trio_wal.WalError, OSError) as exc:
            self.error(exc)
        else:
            self.tell("dropped", wal.first_lsn)

    async def cut(self, rng: Random) -> None:
        wal, seed = self.wal, self.job.seed
        if rng.random() < 0.5:
            return
        async with self.gate.alone():
            if self.failed:
                return
            with trio.CancelScope(shield=True):
                try:
                    await wal.flush()
                    async with wal.read() as records:
                        found = [(item.lsn, mark_of(seed, item.data)) async for item in records]
                    # Not `first_lsn`: what goes on beside this may have moved it since.
                    first = found[0][0] if found else wal.last_lsn + 1
                    self.tell("map", first, [mark for _, mark in found])
                    low = max(wal.first_lsn - 1, wal.last_lsn - rng.randrange(1, 40))
                    lsn = rng.randint(low, wal.last_lsn)
                    self.tell("cut", lsn)
                    await wal.truncate_after(lsn)
                except (trio_wal.LsnTruncatedError, ValueError):
                    # What goes on beside this has dropped that LSN.
                    self.tell("not cut")
                except (trio.BrokenResourceError, trio_wal.WalError, OSError) as exc:
                    self.error(exc)
                else:
                    self.tell("cut done", lsn)

    async def follow(self, rng: Random) -> None:
        """Whatever a reader is given no crash can take back."""
        wal = self.wal
        start = rng.randint(wal.first_lsn, wal.durable_lsn + 1)
        # OSError: it is the disk that fails.
        with contextlib.suppress(trio_wal.LsnTruncatedError, trio.BrokenResourceError, OSError):
            async with wal.follow(start) as records:
                async for item in records:
                    if mark_of(self.job.seed, item.data) is None:
                        self.tell("strange", f"a reader got LSN {item.lsn} with wrong bytes")
                    self.tell("seen", item.lsn)
                    if rng.random() < 0.05:
                        return

    async def consume(self, rng: Random) -> None:
        """What is acknowledged is not given again, nor is anything passed over."""
        wal = self.wal
        with self.telling():
            try:
                async with wal.consumer(CONSUMER) as consumer:
                    expected = consumer.bookmark.lsn + 1
                    self.tell("begun", expected - 1)
                    async for item in consumer:
                        if item.lsn != expected:
                            self.tell("strange", f"a consumer got {item.lsn}, not {expected}")
                        expected = item.lsn + 1
                        if rng.random() < 0.3:
                            self.tell("acknowledging", item.lsn)
                            await consumer.acknowledge(item)
                            self.tell("place acknowledged", item.lsn)
                        if rng.random() < 0.05:
                            return
            except trio_wal.LogDivergedError:
                # What it has seen was cut off.
                self.tell("forgetting")
                await wal.drop_consumer(CONSUMER)
                self.tell("forgotten")


# -- the database ----------------------------------------------------------------------


class _DatabaseLife(_Life):
    db: Database

    async def look(self, db: Database) -> None:
        """Tell what the database holds: each part by whose it is."""
        seed = self.job.seed
        counts: list[tuple[int, int, int]] = []
        own: list[tuple[int, int, int, int]] = []
        shared: list[tuple[int, ...]] = []
        balances: list[int] = []
        wrong: list[str] = []
        setup = False
        for key, value in db.scan():
            if db.get(key) != value:
                wrong.append(f"{key!r}: get and scan differ")
            name, *rest = key.split(b"/")
            if key == SETUP:
                setup = True
            elif name == b"count":
                counts.append((int(rest[0]), int(rest[1]), int(value)))
            elif name == b"shared":
                shared.append((int(rest[0]), *map(int, value.split())))
            elif name == b"account":
                balances.append(int(value))
            else:
                task, slot = int(rest[0]), int(rest[1])
                mark = mark_of(seed, value)
                if mark is None or value not in self.values(mark[0], task, mark[2], slot):
                    wrong.append(f"{key!r} has a wrong value of {len(value)} bytes")
                else:
                    own.append((task, slot, mark[0], mark[2]))
        for text in wrong:
            self.tell("strange", text)
        report = db.recovery
        self.tell(
            *("open", db.durable_lsn, report.torn_bytes, report.clean_shutdown, setup),
            *(counts, own, shared, balances, await self.commits(db)),
        )

    async def commits(self, db: Database) -> list[tuple[int, int, int, int]]:
        """(LSN, life, task, number) of each transaction that is still in the log."""
        while True:
            # Meanwhile the database may drop a segment that its store covers.
            with contextlib.suppress(trio_wal.LsnTruncatedError):
                return await self.commits_now(db)

    async def commits_now(self, db: Database) -> list[tuple[int, int, int, int]]:
        found: list[tuple[int, int, int, int]] = []
        async with db.wal.read() as records:
            async for item in records:
                writes = decode_transaction(item.data)
                count = next((key for key in writes if key.startswith(b"count/")), None)
                if count is None:
                    if SETUP not in writes:
                        self.tell("strange", f"LSN {item.lsn} is nobody's transaction")
                    continue
                _, life, task = count.split(b"/")
                mark = (int(life), int(task), int(writes[count] or b"-1"))
                if not self.is_whole(writes, *mark):
                    self.tell("strange", f"LSN {item.lsn} is not what {mark} wrote")
                found.append((item.lsn, *mark))
        return found

    def values(self, life: int, task: int, number: int, slot: int) -> tuple[bytes, ...]:
        """What may stand there if that transaction wrote it last."""
        seed = self.job.seed
        size = dict(writes_of(seed, life, task, number).own).get(slot)
        if size is None:
            return ()
        value = record(seed, (life, task, number, slot, 0), size)
        return value, value + POISON

    def is_whole(self, writes: dict[bytes, bytes | None], life: int, task: int, n: int) -> bool:
        planned = writes_of(self.job.seed, life, task, n)
        expected = {shared_key(place) for place in planned.shared}
        for slot, size in planned.own:
            key = own_key(task, slot)
            value = writes.get(key, b"")
            if size is None:
                # Deleted only where it was there.
                if value:
                    return False
            else:
                expected.add(key)
                if value not in self.values(life, task, n, slot):
                    return False
        accounts = [key for key in writes if key.startswith(b"account/")]
        return expected <= set(writes) and len(accounts) == (2 if planned.transfer else 0)

    async def run(self, db: Database) -> None:
        self.db = db
        await self.look(db)
        if not self.job.operations:
            return
        with self.telling():
            if db.get(SETUP) is None:
                await self.set_up()
            await self.tasks(self.act, self.checkpoint, self.snapshot)
        await self.probe(db.wal, partial(db.put, SETUP, b"after the failure"))

    async def set_up(self) -> None:
        self.tell("set up")
        async with self.db.transaction() as tx:
            for place in range(ACCOUNTS):
                tx.put(account_key(place), b"%d" % BALANCE)
            tx.put(SETUP, b"done")
        if self.synced:
            self.tell("seen", tx.lsn)

    async def act(self, task: int, number: int, rng: Random) -> int:
        self.tell("will", task, number, 1)
        with self.telling(task, number):
            if rng.random() < 0.1:
                await self.cancelling(rng, task, number, lambda: self.commit(task, number, rng))
            else:
                self.acknowledge(task, number, await self.commit(task, number, rng))
                if not self.synced and rng.random() < 0.2:
                    self.tell("seen", await self.db.wal.flush())
        return number + 1

    async def commit(self, task: int, number: int, rng: Random) -> int:
        """One transaction, again until nothing conflicts with it."""
        while True:
            try:
                async with self.db.transaction() as tx:
                    await self.fill(tx, task, number, rng)
            except TransactionConflict:
                continue
            assert tx.lsn is not None
            return tx.lsn

    async def fill(self, tx: Transaction, task: int, number: int, rng: Random) -> None:
        job = self.job
        planned = writes_of(job.seed, job.life, task, number)
        tx.put(count_key(job.life, task), b"%d" % number)
        for slot, size in planned.own:
            key = own_key(task, slot)
            if size is not None:
                poison = POISON if job.poison == number and task == 0 else b""
                tx.put(key, record(job.seed, (job.life, task, number, slot, 0), size) + poison)
            elif key in tx:
                tx.delete(key)
        for place in planned.shared:
            tx.put(shared_key(place), b"%d %d %d" % (job.life, task, number))
        if planned.transfer:
            source, target = rng.sample(range(ACCOUNTS), 2)
            amount = rng.randrange(BALANCE)
            read = int(tx.get(account_key(source), b"0")), int(tx.get(account_key(target), b"0"))
            if rng.random() < 0.5:
                await trio.lowlevel.checkpoint()
            tx.put(account_key(source), b"%d" % (read[0] - amount))
            tx.put(account_key(target), b"%d" % (read[1] + amount))

    async def checkpoint(self, rng: Random) -> None:
        with self.telling():
            self.tell("seen", await self.db.checkpoint())

    async def snapshot(self, rng: Random) -> None:
        """What a snapshot shows is whole and durable, also while checkpoints go on."""
        with self.db.snapshot() as snapshot:
            if self.synced:
                self.tell("seen", snapshot.lsn)
            for _ in range(rng.randrange(50)):
                await trio.lowlevel.checkpoint()
            try:
                total = sum(int(value) for _, value in snapshot.scan(prefix=b"account/"))
            except OSError as exc:
                # LMDB's file cannot be read any more.
                self.error(exc)
                return
        if total not in (0, ACCOUNTS * BALANCE):
            self.tell("strange", f"a snapshot of LSN {snapshot.lsn} has {total} in its accounts")


# -- running a life --------------------------------------------------------------------


async def live(job: Job, tell: Tell, files: Files | None = None) -> None:
    """Open, tell, work, close; every error of the package's is told."""
    is_log = job.kind == "log"
    life: Any = (_LogLife if is_log else _DatabaseLife)(job, tell)
    opening: Any = trio_wal.open_wal if is_log else trio_wal.open_database
    tell("life", job.life)
    stage = "open"
    try:
        async with opening(job.path, files=files, **job.options) as opened:
            stage = "run"
            await life.run(opened)
            stage = "close"
            tell("closing")
            if job.ending == "exit":
                os._exit(0)
    except (trio.BrokenResourceError, trio_wal.WalError, OSError) as exc:
        if stage == "open" or (stage == "run" and isinstance(exc, OSError)):
            # Also where what was opened could not be read.
            number = getattr(exc if isinstance(exc, OSError) else exc.__cause__, "errno", None)
            tell("refused", type(exc).__name__, number, str(exc))
        else:
            life.error(exc)
            if stage == "run":
                tell("strange", f"{exc!r}\n{traceback.format_exc()}")
    else:
        tell("closed")


class KillAtStep(trio.abc.Instrument):
    def __init__(self, step: int) -> None:
        self._left = step

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


def teller(fd: int) -> Tell:
    """Messages into a pipe, each at once."""

    def tell(*words: object) -> None:
        data = json.dumps(words).encode() + b"\n"
        while data:
            data = data[os.write(fd, data) :]

    return tell


def tell_syncs(tell: Tell) -> None:
    """From here on, in this process: what the operating system says of each sync."""
    sync = OsFile.sync

    def sync_and_tell(self: OsFile, *, in_place: bool = False) -> None:
        sync(self, in_place=in_place)
        tell("synced", os.path.basename(self.path))

    setattr(OsFile, "sync", sync_and_tell)  # noqa: B010  (a method)


def let_stranger_sync_first(folder: str, before: Callable[[], None] = lambda: None) -> None:
    """From here on, in this process: before each of our syncs our bytes are on their way to
    the disk, and somebody else's sync has the file system write its journal.

    ``before`` is called between the two.
    """
    libc = ctypes.CDLL(None)
    path = os.path.join(folder, "stranger")

    def sync_first(fd: int) -> None:
        # Through a descriptor of its own, so that an error of our bytes is still told to ours.
        mine = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        libc.sync_file_range(
            mine, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE_AND_WAIT
        )
        os.close(mine)
        before()
        with contextlib.suppress(OSError):
            stranger = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
            try:
                os.write(stranger, b"not ours")
                os.fsync(stranger)
            finally:
                os.close(stranger)

    def file_sync(self: OsFile, *, in_place: bool = False) -> None:
        sync_first(self._fd)
        sync(self, in_place=in_place)

    def directory_sync(self: OsDirectory) -> None:
        sync_first(self._fd)
        sync_directory(self)

    sync, sync_directory = OsFile.sync, OsDirectory.sync
    setattr(OsFile, "sync", file_sync)  # noqa: B010  (a method)
    setattr(OsDirectory, "sync", directory_sync)  # noqa: B010


def sync_again(path: str) -> list[str]:
    """What a second sync says, of each file: the kernel may have forgotten the first's error."""
    said: list[str] = []
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            if not name.startswith((SPARE_PREFIX, "lock")):
                fd = -1
                try:
                    fd = os.open(os.path.join(folder, name), os.O_RDWR)
                    os.fdatasync(fd)
                    said.append(f"{name}: ok")
                except OSError as exc:
                    said.append(f"{name}: {exc.strerror}")
                finally:
                    if fd >= 0:
                        os.close(fd)
    return said


def run(job: Job, fd: int) -> int:
    """A life in this process, which is to end with it; gives its exit code."""
    tell = teller(fd)
    said: list[str] = []

    def tell_and_see(*words: object) -> None:
        said.append(str(words[0]))
        tell(*words)

    if job.stranger:
        let_stranger_sync_first(os.path.dirname(job.path))
    if job.faulty:
        tell_syncs(tell)
    if code := run_told(job, tell, live, job, tell_and_see):
        return code
    if job.faulty and "error" in said and os.path.exists(job.path):
        tell("second sync", sync_again(job.path))
    return FAILED if {"error", "refused"} & set(said) else 0


def run_told(job: Any, tell: Tell, main: Callable[..., Awaitable[None]], *args: Any) -> int:
    """Run a life's program; an error of its own is told, and a finding.  Gives the exit code."""
    # What goes wrong on purpose is told, not logged.
    logging.disable()
    instruments = [KillAtStep(job.kill_at)] if job.ending == "kill" else []
    try:
        trio.run(main, *args, instruments=instruments)
    except BrokenPipeError:
        return 1
    except Exception as exc:  # noqa: BLE001  (told, and a finding)
        tell("strange", f"{leaves(exc)}\n{traceback.format_exc()}")
        return BROKEN
    return 0


def leaves(exc: BaseException) -> str:
    return ", ".join(map(repr, _report.leaves(exc)))


def ignore_interrupts() -> None:
    """Ctrl-C reaches the whole group of processes; the parent sees to this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_with_campaign() -> None:
    """For a worker process: not to outlive the campaign, which may be killed."""
    if multiprocessing.parent_process() is not None:
        die_with_parent()


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def fork(
    job: Any,
    fd: int,
    keep: Callable[[], None] | None = None,
    main: Callable[[Any, int], int] = run,
) -> int:
    """A life in a forked process, which tells into ``fd``; gives its process id.

    This process must have no other threads.  ``keep`` is called in the child first, then
    ``main``, whose result is the exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = BROKEN
    try:
        die_with_parent()
        ignore_interrupts()
        signal.alarm(HANG_SECONDS)
        if keep is not None:
            keep()
        code = main(job, fd)
    except Exception:  # noqa: BLE001  (the process ends here)
        traceback.print_exc()
    finally:
        os._exit(code)
