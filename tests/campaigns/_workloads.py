"""The programs that the simulator crashes: on the log and on the database.

Law: only the public API is used.  Whatever a call promises by returning, or by raising, is
told to the oracle at once.  Sizes are small, so that an image is: a segment holds two short
records or a dozen, and a session ends after a few dozen calls.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import attrs
import trio

import trio_wal
from trio_wal import KeepBytes, KeepFor, KeepSegments, _checkpoint
from trio_wal._disk.frame import segment_name
from trio_wal._operations import encode_transaction
from trio_wal._retention import Retention, _Both, _Either

from ._images import DB, LOG, Pair, recover_database, replayed
from ._promises import Record, Wrong, check, check_serial
from ._simulator import Simulation, Workload

SEGMENT_SIZES = (1, 1, 7_000, 12_000)
"""The first: as small as they come, two short records."""
CALLS_MAX = 10
"""Of one task in one session."""
RECORDS_KEPT = 10
"""A session begins with at most so many records of the ones before, and a segment."""


CUT_SECONDS = 10_000
"""Who waits for an LSN that is cut off meanwhile waits for the next record with it: perhaps none
comes.  Virtual ones."""


@attrs.define(eq=False)
class World:
    """A session: tasks that make calls, which are methods of this, and what those say."""

    sim: Simulation
    weights: dict[str, int]
    """Of calls, by name."""
    cancels: ClassVar[Sequence[str]]
    """Calls that are cancelled on their way."""

    @property
    def rng(self) -> random.Random:
        return self.sim.rng

    async def tasks(self, opened: Any, count: int) -> None:
        async with trio.open_nursery() as nursery:
            for task in range(count):
                nursery.start_soon(self._task, opened, task)
        self.sim.closing()

    async def _task(self, opened: Any, task: int) -> None:
        names = list(self.weights)
        for _ in range(self.rng.randint(1, CALLS_MAX)):
            (name,) = self.rng.choices(names, list(self.weights.values()))
            with self.sim.tolerating_faults():
                await getattr(self, name)(opened, task)

    async def cancelled(self, opened: Any, task: int) -> None:
        """A call that is cancelled some checkpoints later, or at once."""
        call = getattr(self, self.rng.choice(self.cancels))
        steps = self.rng.randint(0, 10)

        async def cancel(scope: trio.CancelScope) -> None:
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel, scope)
                with self.sim.tolerating_faults():
                    await call(opened, task)

    async def hand_over(self, unit: list[Record], call: Awaitable[Any]) -> Any:
        """Make a call with records, and tell where it says that they are absent."""
        withdraw = self.sim.promises.withdraw
        try:
            return await call
        except (trio.Cancelled, trio.WouldBlock) as exc:
            self.sim.tell(withdraw, unit, f"its call raised {type(exc).__name__}")
            raise
        except trio_wal.LogFailedError as exc:
            # Of what was being written nobody knows.
            if exc.outcome == "not written":
                self.sim.tell(withdraw, unit, "it was said not to be written")
            raise


@attrs.define(eq=False)
class LogWorld(World):
    """A session on the log."""

    sent: list[Record] = attrs.Factory(list)
    _numbers: dict[int, int] = attrs.Factory(dict)
    cancels = ("append", "append", "append_many", "send")

    async def session(self) -> None:
        sim = self.sim
        async with trio_wal.open_wal(LOG, files=sim.files, **sim.options) as wal:
            sim.live = wal
            policy = sim.options.get("retention")
            if policy is not None:
                sim.promises.lets_go = partial(self._lets_go, policy, wal)
            await self._opened(wal)
            if wal.last_lsn - wal.first_lsn > RECORDS_KEPT:
                # Recovering an image costs what the log holds; so much shows all there is.
                with sim.tolerating_faults():
                    await self._drop_before(wal, wal.last_lsn - RECORDS_KEPT // 2)
            await self.tasks(wal, self.rng.choice((1, 2, 2, 3)))

    async def _opened(self, wal: Any) -> None:
        pairs: list[Pair] = []
        with contextlib.suppress(trio_wal.LsnTruncatedError):  # retention is at work already
            async with wal.read() as records:
                async for record in records:
                    pairs.append((record.lsn, record.data))  # noqa: PERF401  (kept if it raises)

        def told() -> None:
            if len(pairs) == wal.last_lsn - wal.first_lsn + 1:
                self.sim.promises.expect(pairs, wal.first_lsn, killed=True, new=False)
            self.sim.promises.opened(pairs, wal.last_lsn)

        self.sim.tell(told)

    def _lets_go(self, policy: Retention, wal: Any, first_lsn: int) -> bool:
        """Whether the log may just have dropped all that is below, by what it still holds."""
        sim = self.sim
        if isinstance(policy, KeepSegments):
            return bool(wal.statistics().segments >= policy.count)
        if isinstance(policy, KeepBytes):
            files = sim.files.contents(LOG)
            start = segment_name(first_lsn)
            kept = [len(files[name]) for name in files if name[:4] == "wal-" and name >= start]
            return sum(kept) >= policy.count
        if isinstance(policy, KeepFor):
            age_us = sim.files.time_us() - sim.written_us[first_lsn - 1]
            return age_us > policy.seconds * 1e6
        assert isinstance(policy, (_Both, _Either))
        # What both keep is less than what either keeps.
        enough = any if isinstance(policy, _Both) else all
        return enough(self._lets_go(one, wal, first_lsn) for one in policy._policies)

    # -- payloads --

    def _payload(self, task: int) -> bytes:
        rng = self.rng
        number = self._numbers[task] = self._numbers.get(task, 0) + 1
        size = rng.choice((0, 20, rng.randint(0, 200), rng.randint(0, 200), rng.randint(300, 1500)))
        # The session is part of it: payloads are unique over all of a log's life.
        return b"%d.%d.%x." % (task, number, rng.getrandbits(48)) + rng.randbytes(size)

    # -- calls --

    def to(self, wal: Any, task: int) -> Any:
        """Through what a task writes: always the same, as only so its records keep their order."""
        return wal

    async def append(self, wal: Any, task: int) -> None:
        payload = self._payload(task)
        await self._append(task, [payload], self.to(wal, task).append(payload))

    async def append_many(self, wal: Any, task: int) -> None:
        payloads = [self._payload(task) for _ in range(self.rng.choice((1, 2, 3, 5)))]
        await self._append(task, payloads, self.to(wal, task).append_many(payloads))

    async def _append(self, task: int, payloads: list[bytes], call: Awaitable[Any]) -> None:
        unit = self.sim.promises.submit(task, *payloads)
        answer = await self.hand_over(unit, call)
        lsns = range(answer, answer + 1) if isinstance(answer, int) else answer
        check(len(lsns) == len(unit), f"{len(unit)} records were given {lsns}")
        durable = self.sim.options.get("durability", "sync") == "sync"
        self.sim.tell(self.sim.promises.acknowledge, unit, lsns[0], durable=durable)

    async def send(self, wal: Any, task: int) -> None:
        payload = self._payload(task)
        through = self.to(wal, task)

        async def send_now() -> None:
            through.send_nowait(payload)

        unit = self.sim.promises.submit(task, payload)
        with contextlib.suppress(trio.WouldBlock):
            sending = through.send(payload) if self.rng.random() < 0.5 else send_now()
            await self.hand_over(unit, sending)
            self.sent += unit

    async def flush(self, wal: Any, task: int) -> None:
        before = list(self.sent)
        lsn = await wal.flush()

        def told() -> None:
            if self.sim.promises.cut is not None:
                return  # made already, perhaps, and not yet told
            for submission in before:
                if not submission.gone and (submission.lsn is None or submission.lsn > lsn):
                    raise Wrong("lost", f"flush returned LSN {lsn} and left {submission}")
            self.sim.promises.settle_durable(lsn)

        self.sim.tell(told)

    async def wait_durable(self, wal: Any, task: int) -> None:
        lsn = self.rng.randint(0, wal.last_lsn)
        if self.sim.options.get("durability") == "none":
            return
        cut = self.sim.promises.cut is not None
        with trio.move_on_after(CUT_SECONDS) as scope:
            await wal.wait_durable(lsn)
        if scope.cancelled_caught and lsn <= wal.last_lsn:
            self.sim.tell(check, False, f"LSN {lsn} was written, and never called durable")
        if not cut and lsn <= wal.durable_lsn:
            self.sim.tell(self.sim.promises.settle_durable, lsn)

    async def sleep(self, wal: Any, task: int) -> None:
        """What is accepted becomes durable ``flush_interval`` later, also if nobody waits."""
        options, promises = self.sim.options, self.sim.promises
        last_lsn, cut, sent = wal.last_lsn, promises.cut, list(self.sent)
        seconds = self.rng.choice((0.001, 0.02, 5))
        await trio.sleep(seconds)

        def told() -> None:
            if promises.cut is not None or cut is not None or wal.last_lsn < last_lsn:
                return  # the end of the log was cut meanwhile
            if self.sim.sync_failed():
                return
            durable_lsn = wal.durable_lsn
            if durable_lsn < last_lsn:
                raise Wrong("lost", f"{seconds} s later LSN {last_lsn} is not durable")
            for submission in sent:
                if not submission.gone and (submission.lsn or math.inf) > durable_lsn:
                    raise Wrong("lost", f"{seconds} s after it was sent it is not durable")
            promises.settle_durable(durable_lsn)

        if seconds > options["flush_interval"] + 0.001 and options.get("durability") != "none":
            self.sim.tell(told)

    async def truncate_before(self, wal: Any, task: int) -> None:
        lsn = self.rng.randint(wal.first_lsn, wal.last_lsn + 1)
        # A truncate_after may have cut off more than that meanwhile.
        with contextlib.suppress(ValueError):
            await self._drop_before(wal, lsn)

    async def _drop_before(self, wal: Any, lsn: int) -> None:
        self.sim.tell(self.sim.promises.begin_drop, lsn)
        try:
            await wal.truncate_before(lsn)
        finally:
            self.sim.tell(self.sim.promises.end_drop, lsn)

    async def truncate_after(self, wal: Any, task: int) -> None:
        promises = self.sim.promises
        if promises.cut is not None or self.sim.quiet:
            return
        low = max(wal.first_lsn - 1, wal.last_lsn - 8)
        lsn = self.rng.randint(low, wal.last_lsn)
        promises.begin_cut(lsn)
        done = True
        try:
            await wal.truncate_after(lsn)
        except (trio_wal.LsnTruncatedError, ValueError):
            done = False
        self.sim.tell(promises.end_cut, done=done)


@attrs.define(eq=False)
class LinesWorld(LogWorld):
    """A session whose tasks have writers: none, two normal ones, one of high priority."""

    through: list[Any] = attrs.Factory(list)

    async def tasks(self, opened: Any, count: int) -> None:
        queue_size = opened.statistics().max_queue_size
        async with (
            opened.writer("a", max_queue_size=min(2, queue_size)) as a,
            opened.writer("b") as b,
            opened.writer("high", priority="high") as high,
        ):
            self.through = [opened, a, high, b]
            await super().tasks(opened, 4)

    def to(self, wal: Any, task: int) -> Any:
        return self.through[task % 4]

    async def flush(self, wal: Any, task: int) -> None:
        """A writer's own: of what it has accepted."""
        before = [submission for submission in self.sent if submission.task == task]
        lsn = await self.to(wal, task).flush()

        def told() -> None:
            for submission in before:
                if not submission.gone and (submission.lsn is None or submission.lsn > lsn):
                    raise Wrong("lost", f"flush returned LSN {lsn} and left {submission}")

        self.sim.tell(told)


@attrs.define(eq=False)
class DatabaseWorld(World):
    """A session on the database."""

    backups: int = 0
    cancels = ("transact", "put", "checkpoint")

    async def session(self) -> None:
        sim = self.sim
        piece_bytes = self.rng.choice((1, 30, 1 << 20))
        with mock.patch.object(_checkpoint, "PIECE_BYTES", piece_bytes):
            async with trio_wal.open_database(DB, files=sim.files, **sim.options) as db:
                sim.live = db.wal
                sim.tell(self._check_state, db)
                sim.tell(sim.promises.opened, [], db.durable_lsn)
                await self.tasks(db, self.rng.randint(1, 4))

    def _check_state(self, db: Any) -> None:
        """What is read outside of a transaction is one durable state."""
        lsn = db.durable_lsn
        if dict(db.scan()) != self.sim.states[lsn]:
            raise Wrong("partial", f"the database does not show the state of LSN {lsn}")
        self.sim.promises.settle_durable(lsn)

    def _key(self) -> bytes:
        return b"key %d" % self.rng.randrange(6)

    def _value(self) -> bytes:
        rng = self.rng
        return rng.randbytes(rng.choice((1, 8, rng.randint(0, 120), rng.randint(300, 900))))

    def to(self, db: Any, task: int) -> Any:
        """Through what a task commits."""
        return db

    async def transact(self, db: Any, task: int) -> None:
        """Reads and writes; serializable: at its LSN what it read still stood."""
        rng, sim = self.rng, self.sim
        reads: dict[bytes, bytes | None] = {}
        writes: dict[bytes, bytes | None] = {}
        scanned: list[tuple[bytes, bytes]] | None = None
        submission: Record | None = None
        try:
            async with self.to(db, task).transaction() as tx:
                for _ in range(rng.randint(1, 4)):
                    key = self._key()
                    if rng.random() < 0.6:
                        value = tx.get(key)
                        if key not in writes:
                            reads[key] = value
                    if rng.random() < 0.7:
                        writes[key] = self._value()
                        tx.put(key, writes[key])
                    elif (key in tx) and rng.random() < 0.5:
                        if key not in writes:
                            reads[key] = tx.get(key)
                        writes[key] = None
                        tx.delete(key)
                    elif key not in writes:
                        reads[key] = tx.get(key)
                    if rng.random() < 0.3:
                        await trio.lowlevel.checkpoint()
                if rng.random() < 0.2 and not writes:
                    scanned = list(tx.scan())
                if not writes and rng.random() < 0.7:
                    return
                # Unique, so that a record in the log tells whose it is.
                writes[b"task %d" % task] = b"%x" % rng.getrandbits(64)
                tx.put(b"task %d" % task, writes[b"task %d" % task])
                (submission,) = sim.promises.submit(task, encode_transaction(writes))
        except (trio_wal.TransactionConflict, trio.Cancelled) as exc:
            if submission is not None:
                why = f"the commit raised {type(exc).__name__}"
                sim.tell(sim.promises.withdraw, [submission], why)
            if isinstance(exc, trio.Cancelled):
                raise
            return
        assert submission is not None

        def told() -> None:
            sim.promises.acknowledge([submission], tx.lsn)
            check_serial(tx.lsn, sim.states[tx.lsn - 1], reads, scanned)

        sim.tell(told)

    async def put(self, db: Any, task: int) -> None:
        key, value = b"task %d" % task, b"%x" % self.rng.getrandbits(64)
        unit = self.sim.promises.submit(task, encode_transaction({key: value}))
        lsn = await self.hand_over(unit, self.to(db, task).put(key, value))
        self.sim.tell(self.sim.promises.acknowledge, unit, lsn)

    async def look(self, db: Any, task: int) -> None:
        self.sim.tell(self._check_state, db)
        await trio.lowlevel.checkpoint()

    async def checkpoint(self, db: Any, task: int) -> None:
        lsn = await db.checkpoint()

        def told() -> None:
            self.sim.store_floor = max(self.sim.store_floor, lsn)
            self.sim.promises.settle_durable(lsn)

        self.sim.tell(told)

    async def backup(self, db: Any, task: int) -> None:
        self.backups += 1
        sim = self.sim
        path = f"/backup {task} {self.backups} {self.rng.getrandbits(32):x}"
        lsn = await db.backup(path)

        def told() -> None:
            # Durable as a whole when it returns, whatever happens next.
            image = sim.files.crash_image(self.rng.getrandbits(32), "power")
            found = recover_database(image, path, segment_size=sim.options["segment_size"])
            if (found.log.last_lsn, replayed(found)) != (lsn, sim.states[lsn]):
                raise Wrong("partial", f"the backup is not the state of LSN {lsn}")

        sim.tell(told)
        # Its first segment is a full-grown one: every later image would be slow to make.
        sim.files._folders.pop(f"{path}/log")
        sim.files._folders.pop(path, None)
        sim.files._stores.pop(f"{path}/store")


@attrs.define(eq=False)
class LinesDatabaseWorld(DatabaseWorld):
    """A session whose tasks have writers."""

    through: list[Any] = attrs.Factory(list)

    async def tasks(self, opened: Any, count: int) -> None:
        async with (
            opened.writer("a", max_queue_size=1) as a,
            opened.writer("high", priority="high") as high,
        ):
            self.through = [a, opened, high]
            await super().tasks(opened, 4)

    def to(self, db: Any, task: int) -> Any:
        return self.through[task % 3]


# -- the workloads ------------------------------------------------------------------

Options = Callable[[random.Random], dict[str, Any]]


def _options(**fixed: Any) -> Options:
    """Options of a log, some of them by chance."""

    def choose(rng: random.Random) -> dict[str, Any]:
        chosen = {
            "segment_size": rng.choice(SEGMENT_SIZES),
            "flush_interval": rng.choice((0, 0.010)),
            "max_queue_size": rng.choice((3, 10_000)),
            "max_batch_bytes": rng.choice((500, 1 << 20)),
        }
        return chosen | {
            name: value(rng) if callable(value) else value for name, value in fixed.items()
        }

    return choose


def _log(name: str, weights: dict[str, int], *, fails: bool = False, **fixed: Any) -> Workload:
    return Workload(
        name, lambda sim: LogWorld(sim, weights).session(), _options(**fixed), fails=fails
    )


def _database(name: str, weights: dict[str, int], *, fails: bool = False, **fixed: Any) -> Workload:
    options = _options(
        checkpoint_bytes=lambda rng: rng.choice((300, 900, 1 << 20)), max_queue_size=100, **fixed
    )
    return Workload(
        name, lambda sim: DatabaseWorld(sim, weights).session(), options, database=True, fails=fails
    )


def _retention(rng: random.Random) -> Any:
    return rng.choice(
        (
            KeepSegments(1),
            KeepSegments(3),
            KeepBytes(9000),
            KeepFor(3),
            KeepSegments(2) | KeepFor(1),
            KeepSegments(4) & KeepBytes(12_000),
        )
    )


_MIXED = {
    "append": 6, "append_many": 3, "send": 4, "flush": 2, "wait_durable": 1, "sleep": 1,
    "cancelled": 2,
}  # fmt: skip

WORKLOADS = {
    workload.name: workload
    for workload in (
        _log("append", {"append": 1}),
        _log("units", {"append": 1, "append_many": 2}),
        _log("send", {"send": 4, "append": 1, "flush": 1, "wait_durable": 1, "sleep": 1}),
        _log("cancel", {"append": 2, "append_many": 1, "send": 1, "cancelled": 4}),
        _log("drop", {"append": 5, "append_many": 1, "truncate_before": 2}),
        _log("cut", {"append": 5, "append_many": 2, "send": 1, "truncate_after": 2}),
        _log("retention", {"append": 5, "sleep": 1}, retention=_retention),
        _log("interval", {**_MIXED, "sleep": 4}, durability="interval"),
        _log("none", _MIXED, durability="none"),
        _log(
            "everything",
            {**_MIXED, "truncate_before": 2, "truncate_after": 2},
            durability=lambda rng: rng.choice(("sync", "interval", "none")),
            retention=lambda rng: rng.choice((None, _retention(rng))),
        ),
        _log(
            "failed-sync",
            {**_MIXED, "append": 9, "truncate_before": 1, "truncate_after": 1},
            fails=True,
        ),
        Workload(
            "lines",
            lambda sim: LinesWorld(sim, _MIXED).session(),
            _options(
                max_queue_size=lambda rng: rng.choice((2, 3, "auto")),
                max_batch_bytes=lambda rng: rng.choice((300, 500, 1 << 20)),
                reserve=lambda rng: rng.choice((0.0, 0.1, 0.5)),
                commit_delay=lambda rng: rng.choice((0.0, 0.001, "auto")),
            ),
        ),
        Workload(
            "lines-database",
            lambda sim: LinesDatabaseWorld(
                sim, {"transact": 6, "put": 2, "look": 1, "cancelled": 1}
            ).session(),
            _options(
                checkpoint_bytes=lambda rng: rng.choice((300, 1 << 20)),
                max_queue_size=lambda rng: rng.choice((1, 2)),
                commit_delay=lambda rng: rng.choice((0.0, "auto")),
            ),
            database=True,
        ),
        _database("failed-sync-database", {"transact": 5, "checkpoint": 1}, fails=True),
        _database("transactions", {"transact": 6, "put": 1, "look": 1, "cancelled": 1}),
        _database("checkpoints", {"transact": 5, "put": 1, "look": 1, "checkpoint": 3}),
        _database(
            "backup", {"transact": 5, "checkpoint": 1, "backup": 1, "cancelled": 1, "look": 1}
        ),
    )
}
