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
from itertools import pairwise
from typing import Any, ClassVar
from unittest import mock

import attrs
import trio

import trio_wal
from trio_wal import Bookmark, KeepBytes, KeepFor, KeepSegments, _checkpoint
from trio_wal._disk.frame import segment_name
from trio_wal._operations import encode_placed_transaction, encode_transaction
from trio_wal._places import Move
from trio_wal._retention import Retention, _Both, _Either

from ._images import DB, LOG, Pair, recover_database, replayed
from ._promises import Record, Wrong, check, check_serial
from ._simulator import Consumed, Simulation, Workload

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


UNKNOWN_LSN = 1 << 62
"""Where a consumer begins, nobody knows before its block is entered."""
READ_SECONDS = 0.001
"""Virtual ones, after which a consumer has been given all that there is."""


class Consumes(World):
    """Calls of tasks that consume, and tell how far they are."""

    def _opened_with(self, opened: Any) -> None:
        known = opened.statistics().consumers
        for name, consumed in list(self.sim.consumers.items()):
            if name in known:
                self._told(name, known[name].acknowledged_lsn)
            else:
                check(consumed.told < 0 or consumed.may_be_gone, f"{name} is not there")
                del self.sim.consumers[name]
        check(known.keys() == self.sim.consumers.keys(), "a consumer that nobody has made")

    def _name(self) -> str:
        """One that there is, or a new one."""
        every = self.sim.consumers.items()
        known = [name for name, one in every if one.told >= 0 and not one.may_be_gone]
        if known and (len(known) > 3 or self.rng.random() < 0.8):
            return self.rng.choice(known)
        return f"consumer {self.rng.getrandbits(32):x}"

    async def _given(self, consumer: Any) -> list[Any]:
        """Some of what it is given."""
        found: list[Any] = []
        most = self.rng.randint(1, 6)
        with trio.move_on_after(READ_SECONDS):
            if self.rng.random() < 0.3:
                found += await consumer.batches(most).__anext__()
            while len(found) < most:
                found.append(await consumer.__anext__())
        return found

    def _check_given(self, after: int, lsns: list[int]) -> None:
        """That they come without a gap, but for acknowledgements."""
        for before, lsn in pairwise([after, *lsns]):
            missing = set(range(before + 1, lsn)) - self.sim.alone
            check(lsn not in self.sim.alone, f"LSN {lsn} is given, an acknowledgement")
            check(before < lsn and not missing, f"after {before} comes {lsn}: {missing} is missing")

    def _told(self, name: str, lsn: int) -> None:
        consumed = self.sim.consumers[name]
        if consumed.told < 0:
            consumed.tried = lsn
        consumed.told = max(consumed.told, lsn)


@attrs.define(eq=False)
class ConsumersWorld(LogWorld, Consumes):
    """A session with consumers of the log."""

    cancels = ("append", "consume", "consume", "drop_consumer")

    async def tasks(self, opened: Any, count: int) -> None:
        self.sim.tell(self._opened_with, opened)
        await super().tasks(opened, count)

    async def consume(self, wal: Any, task: int) -> None:
        sim, name = self.sim, self._name()
        start = self.rng.choice((None, self.rng.randint(wal.first_lsn, wal.last_lsn + 1)))
        known = sim.consumers.get(name)
        if known is None:
            # It may be there from now on.
            sim.consumers[name] = Consumed(-1, UNKNOWN_LSN)
        with contextlib.suppress(trio.BusyResourceError, trio_wal.LsnTruncatedError):
            async with wal.consumer(name, start=start) as consumer:
                after = consumer.bookmark.lsn
                sim.tell(self._told, name, after)
                items = await self._given(consumer)
                sim.tell(self._check_given, after, [item.lsn for item in items])
                for item in self.rng.sample(items, min(2, len(items))):
                    consumed = sim.consumers[name]
                    consumed.tried = max(consumed.tried, item.lsn)
                    await consumer.acknowledge(item)
                    sim.tell(self._told, name, item.lsn)

    async def drop_consumer(self, wal: Any, task: int) -> None:
        name = self._name()
        if name in self.sim.consumers:
            self.sim.consumers[name].may_be_gone = True
            try:
                with contextlib.suppress(KeyError):
                    await wal.drop_consumer(name)
            except (trio.BusyResourceError, trio.Cancelled) as exc:
                if not self.sim.quiet:
                    self.sim.consumers[name].may_be_gone = False
                if isinstance(exc, trio.Cancelled):
                    raise
                return
            if not self.sim.quiet:
                del self.sim.consumers[name]


@attrs.define(eq=False)
class ConsumersDatabaseWorld(DatabaseWorld, Consumes):
    """A session with consumers of the database."""

    cancels = ("transact", "consume", "consume", "drop_consumer")

    async def tasks(self, opened: Any, count: int) -> None:
        self.sim.tell(self._opened_with, opened)
        await super().tasks(opened, count)

    async def consume(self, db: Any, task: int) -> None:
        sim, name = self.sim, self._name()
        start = self.rng.randint(db.wal.first_lsn, db.durable_lsn + 1)
        begin: list[Record] = []
        if name not in sim.consumers:
            sim.consumers[name] = Consumed(-1, start - 1)
            begin = self._submit(task, {}, name, Bookmark(start - 1, db.epoch), begins=True)
        consumer = db.consumer(name, start=start)
        try:
            await self.hand_over(begin, consumer.__aenter__())
        except (trio.BusyResourceError, trio_wal.LsnTruncatedError) as exc:
            if begin:
                sim.tell(sim.promises.withdraw, begin, f"entering raised {type(exc).__name__}")
            check(isinstance(exc, trio.BusyResourceError) or begin, f"{name}: {exc}")
            return
        try:
            after = consumer.bookmark.lsn
            if begin:
                sim.tell(self._durable, begin)
                sim.tell(self._told, name, start - 1)
            items = await self._given(consumer)
            sim.tell(self._check_given, after, [item.lsn for item in items])
            for item in sorted(self.rng.sample(items, min(2, len(items))), key=lambda i: i.lsn):
                await self._acknowledge(db, task, consumer, item)
        finally:
            await consumer.__aexit__(None, None, None)

    async def _acknowledge(self, db: Any, task: int, consumer: Any, item: Any) -> None:
        sim, place = self.sim, Bookmark(item.lsn, db.epoch)
        consumed = sim.consumers[consumer.name]
        consumed.tried = max(consumed.tried, item.lsn)
        if self.rng.random() < 0.5 and self._is_new(consumer.name, place):
            unit = self._submit(task, {}, consumer.name, place)
            await self.hand_over(unit, consumer.acknowledge(item))
            sim.tell(self._durable, unit)
        else:
            writes: dict[bytes, bytes | None]
            writes = {b"seen": b"%d %x" % (item.lsn, self.rng.getrandbits(64))}

            async def transact() -> int:
                async with db.transaction() as tx:
                    consumer.acknowledge_in(tx, item)
                    tx.put(b"seen", writes[b"seen"])
                assert tx.lsn is not None
                return tx.lsn

            unit = self._submit(task, writes, consumer.name, place)
            lsn = await self.hand_over(unit, transact())
            sim.tell(sim.promises.acknowledge, unit, lsn)
        sim.tell(self._told, consumer.name, item.lsn)

    def _is_new(self, name: str, place: Bookmark | None) -> bool:
        """Whether a record that does only this tells of which call it is."""
        record = encode_placed_transaction({}, {name: Move(place)})
        known = record in self.sim.moves
        self.sim.moves.add(record)
        return not known

    def _submit(
        self,
        task: int,
        writes: dict[bytes, bytes | None],
        name: str,
        place: Bookmark | None,
        *,
        begins: bool = False,
    ) -> list[Record]:
        moves = {name: Move(place, begins)}
        return self.sim.promises.submit(task, encode_placed_transaction(writes, moves))

    def _durable(self, unit: list[Record]) -> None:
        """A call has returned that does not say of which LSN it was."""
        lsn = unit[0].lsn
        if lsn is None:
            raise Wrong("lost", f"{unit[0]} is nowhere, and its call has returned")
        self.sim.promises.acknowledge(unit, lsn)

    async def drop_consumer(self, db: Any, task: int) -> None:
        name = self._name()
        consumed = self.sim.consumers.get(name)
        if consumed is None or consumed.told < 0 or not self._is_new(name, None):
            return
        consumed.may_be_gone = True
        unit = self._submit(task, {}, name, None)
        try:
            await self.hand_over(unit, db.drop_consumer(name))
        except (trio.BusyResourceError, trio.Cancelled) as exc:
            if isinstance(exc, trio.BusyResourceError):
                self.sim.tell(self.sim.promises.withdraw, unit, "it is in use")
            if not self.sim.quiet:
                consumed.may_be_gone = False
            if isinstance(exc, trio.Cancelled):
                raise
            return
        self.sim.tell(self._durable, unit)
        if not self.sim.quiet:
            del self.sim.consumers[name]


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
        _log(
            "reuse",
            {
                "append": 6,
                "append_many": 3,
                "send": 2,
                "sleep": 1,
                "truncate_before": 2,
                "truncate_after": 1,
            },
            durability=lambda rng: rng.choice(("sync", "sync", "interval", "none")),
            retention=lambda rng: rng.choice((KeepSegments(1), KeepSegments(2))),
            segment_size=lambda rng: rng.choice((1, 2_000, 3_000, 7_000)),
        ),
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
        Workload(
            "consumers",
            lambda sim: ConsumersWorld(
                sim,
                {
                    "append": 5,
                    "append_many": 1,
                    "truncate_before": 2,
                    "consume": 5,
                    "drop_consumer": 1,
                    "cancelled": 1,
                },
            ).session(),
            _options(
                durability=lambda rng: rng.choice(("sync", "interval")),
                retention=lambda rng: rng.choice((None, KeepSegments(1))),
            ),
        ),
        Workload(
            "consumers-database",
            lambda sim: ConsumersDatabaseWorld(
                sim,
                {
                    "transact": 4,
                    "put": 2,
                    "checkpoint": 1,
                    "consume": 5,
                    "drop_consumer": 1,
                    "cancelled": 1,
                },
            ).session(),
            _options(
                checkpoint_bytes=lambda rng: rng.choice((300, 900, 1 << 20)), max_queue_size=100
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
