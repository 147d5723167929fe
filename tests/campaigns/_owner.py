"""The owner of a log that others read: appends, rotates, cuts, is killed, opens again.

Law: what it tells is true when it is told: an acknowledgement after the call has returned, a
truncation before it is asked for.  It writes one history (`_marks`): which record has which
LSN is known before it is accepted, as records are accepted in the order of the calls.

One message is one line of JSON: a name, the time, then what `_marks.History` says there.
Its own streams tell as those of `_onlookers` do.
"""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial, reduce
from itertools import count
from operator import attrgetter, xor
from random import Random
from typing import Any, Final

import attrs
import trio

import trio_wal
from trio_wal import (
    Bookmark,
    Database,
    KeepSegments,
    LogDivergedError,
    LsnTruncatedError,
    Transaction,
    WriteAheadLog,
)
from trio_wal._disk.directory import LogDirectory
from trio_wal._operations import decode_transaction

from ._marks import (
    CUTS_MAX,
    EMPTY_SHARE,
    SIZE_MAX,
    Chain,
    Mark,
    Runs,
    mark_of,
    record,
    runs_of,
)
from ._program import BaseJob, Life, Tell, leaves, run_told, teller
from ._promises import Wrong, check

HEAD: Final = b"head"
"""The key of a database that has the record of its newest transaction."""
SUM: Final = b"sum"
"""The key that has `sum_of` all that begin with `KEYS`."""
KEYS: Final = b"key/"
KEYS_MAX: Final = 50
DELETED_SHARE: Final = 0.4
TELL_RECORDS: Final = 8
"""A stream tells what it has been given so often, and at its end."""


@attrs.frozen(kw_only=True)
class Owner(BaseJob):
    """One life; its kind may also be "streams": a log."""

    streams: int = 2
    """Of its own readers."""
    runs: list[list[int]] = attrs.Factory(lambda: [[], []])
    """`_marks.Runs` of what the lives before have written."""
    keep: int = 0
    """Segments that retention keeps; 0: all, of a database what its store has not."""

    def open(self) -> Any:
        retention = KeepSegments(self.keep) if self.keep else None
        opening = trio_wal.open_database if self.kind == "database" else trio_wal.open_wal
        return opening(self.path, retention=retention, **self.options)


def sum_of(items: Iterable[tuple[bytes, bytes]]) -> int:
    """Of a database's state: no key can be missing, added or of another moment unnoticed."""
    return reduce(xor, (_part(*item) for item in items), 0)


def _part(key: bytes, value: bytes | None) -> int:
    return 0 if value is None else zlib.crc32(value, zlib.crc32(key)) << 32 | zlib.crc32(key)


def size_of(rng: Random) -> int:
    return rng.choice((0, 20, rng.randrange(300), rng.randrange(300), rng.randrange(SIZE_MAX + 1)))


@attrs.define(eq=False)
class Writer:
    """Gives each record its place in the history, in the order of the calls."""

    seed: int
    history: int
    runs: Runs
    next_lsn: int
    base_lsn: int = 0
    """Of the history; 0: it has no record yet."""
    parent: int = 0

    def record(self, rng: Random, *, empty: bool = True) -> bytes:
        lsn = self.next_lsn
        self.next_lsn += 1
        if not self.base_lsn:
            self.base_lsn, self.parent = lsn, self.runs.of(lsn - 1)
            self.runs.begin(lsn, self.history)
        elif empty and rng.random() < EMPTY_SHARE:
            return b""
        return record(self.seed, Mark(lsn, self.history, self.base_lsn, self.parent), size_of(rng))

    def cut(self, lsn: int) -> None:
        """What is above an LSN is gone, and others will take its place."""
        self.runs.cut(lsn)
        self.history += 1
        self.next_lsn, self.base_lsn = lsn + 1, 0


# -- streams -------------------------------------------------------------------------------


def now() -> int:
    return time.monotonic_ns()


@attrs.define(eq=False)
class Stream:
    """Reads one stream to its end, and tells what became of it."""

    tell: Tell
    who: str
    kind: str
    seed: int
    start: int | Bookmark | None = None
    database: bool = False
    chain: Chain = attrs.Factory(lambda self: Chain(self.seed), takes_self=True)
    bookmark: Bookmark | None = None
    """Where it was left."""
    common: Bookmark | None = None
    """The last place that it shares with the history that took its own's place."""
    begun: int = attrs.Factory(now)
    entered: int = 0
    position: int = 0
    """The last LSN that it is beyond."""
    running: bool = True
    first_lsn: Callable[[], int] = lambda: 1
    """Where the log starts, as far as anybody asks for the position."""
    count: float = math.inf
    """It leaves after so many."""
    each: Callable[[int], None] = lambda lsn: None
    """Called with the LSN of each."""
    pause: Callable[[], float | None] = lambda: None
    """So long it waits after one."""

    async def run(self, open_stream: Callable[[int | Bookmark | None], Any]) -> str:
        """Gives how it ended: "end", "left", "truncated", "diverged", "closed", "error"."""
        end: list[Any] = ["error", "cancelled"]
        try:
            end = await self._read(open_stream)
        except LogDivergedError as exc:
            if exc.parted_after is not None:
                self.common = Bookmark(exc.parted_after, exc.bookmark.epoch)
            end = ["diverged", exc.parted_after, exc.bookmark.lsn]
        except LsnTruncatedError as exc:
            end = ["truncated", exc.first_lsn, exc.lsn]
        except trio.ClosedResourceError:
            end = ["closed"]
        except Wrong as exc:
            end = ["wrong", str(exc)]
        except trio.Cancelled:
            end = ["left"]
            raise
        except Exception as exc:  # noqa: BLE001  (told, and a finding)
            end = ["error", f"{leaves(exc)}"]
        finally:
            self.running = False
            times = (self.begun, self.entered, now())
            self.tell("stream", *times, self.who, self.kind, self.first, self.chain.told(), end)
        return str(end[0])

    @property
    def first(self) -> int | None:
        """The first LSN that it asks for; None: the log's."""
        return self.start.lsn + 1 if isinstance(self.start, Bookmark) else self.start

    def again(self, end: str) -> int | Bookmark | None:
        """From where the next one goes on, with the same chain; None: it begins anew."""
        if end == "left":
            return self.bookmark
        if end == "diverged" and self.common is not None:
            self.chain.back_to(self.common.lsn)
            return self.common
        return None

    async def _read(self, open_stream: Callable[[int | Bookmark | None], Any]) -> list[Any]:
        first = self.first
        if first is not None:
            self.chain.next_lsn = max(1, first)
        given = 0
        async with open_stream(self.start) as records:
            self.entered = now()
            self.position = (self.first_lsn() if first is None else max(1, first)) - 1
            async for item in records:
                data = payload(item) if self.database else item.data
                self.chain.give(item.lsn, data)
                self.position = item.lsn
                self.each(item.lsn)
                given += 1
                if given % TELL_RECORDS == 0:
                    self._tell_given()
                if given >= self.count:
                    self.bookmark = records.bookmark
                    told = f"after LSN {item.lsn} the bookmark is {self.bookmark}"
                    check(self.bookmark.lsn == item.lsn, told)
                    return ["left"]
                if (seconds := self.pause()) is not None:
                    self._tell_given()
                    await trio.sleep(seconds)
        return ["end"]

    def _tell_given(self) -> None:
        if self.kind == "follow" and self.chain.known is not None:
            known = self.chain.known
            self.tell("gave", now(), self.who, known.lsn, known.history)


def payload(item: Any) -> bytes:
    """The head of a database's transaction: of a commit, or of a record of its log."""
    if hasattr(item, "operations"):
        writes = {operation.key: operation.value for operation in item.operations}
    else:
        writes = decode_transaction(item.data)
    value = writes.get(HEAD)
    if value is None:
        raise Wrong("other", f"LSN {item.lsn} is nobody's transaction")
    return value


# -- the lives -----------------------------------------------------------------------------


class _Life(Life):
    writer: Writer
    wal: WriteAheadLog

    def __init__(self, owner: Owner, tell: Tell) -> None:
        super().__init__(owner, tell)
        self.owner = owner
        self.durable_max = 0
        self.numbers = count(1)

    def say(self, name: str, *words: object) -> None:
        self.tell(name, now(), *words)

    async def look(self, wal: WriteAheadLog) -> None:
        """What is there."""
        self.wal = wal
        known = Runs(*self.owner.runs)
        runs = await self.find_runs()
        last = wal.last_lsn
        if not runs.histories and last:
            # Nothing that speaks is left: it is as it was when it was dropped.
            known.cut(last)
            runs = known
        self.writer = Writer(self.owner.seed, self.owner.life * CUTS_MAX, runs, last + 1)
        self.durable_max = last
        self.say("open", wal.first_lsn, last, *runs.told())

    async def find_runs(self) -> Runs:
        return runs_of(self.owner.seed, await self.items(attrgetter("data")))

    async def items(self, data_of: Callable[[Any], bytes]) -> list[tuple[int, bytes]]:
        """All that the log holds.  What it opened with may be dropped by itself meanwhile."""
        while True:
            try:
                async with self.wal.read() as records:
                    return [(item.lsn, data_of(item)) async for item in records]
            except LogDivergedError:
                raise
            except LsnTruncatedError:
                continue

    async def go(self, *beside: Callable[[Random], Awaitable[None]]) -> None:
        streams = [partial(self.read_on, place) for place in range(self.owner.streams)]
        await self.tasks(self.act, *beside, *streams)

    async def act(self, task: int, number: int, rng: Random) -> int:
        raise NotImplementedError

    async def read_on(self, place: int, rng: Random) -> None:
        """A stream in the owner's process."""
        who = f"life {self.owner.life}, own stream {place}.{next(self.numbers)}"
        await self.read_once(who, place, rng)

    async def read_once(self, who: str, place: int, rng: Random) -> None:
        raise NotImplementedError

    def check_durable(self, lsn: int) -> None:
        self.durable_max = max(self.durable_max, self.wal.durable_lsn)
        check(lsn <= self.durable_max, f"LSN {lsn} was given, durable is {self.durable_max}")

    def acknowledge(self, last: int, expected: int, seen: int) -> None:
        if last != expected:
            self.tell("strange", f"LSN {last} was given to the record of LSN {expected}")
        if self.synced:
            self.say("ack", last, self.writer.runs.of(last), seen)


class _LogLife(_Life):
    async def run(self, wal: WriteAheadLog) -> None:
        await self.look(wal)
        await self.go(*[self.drop] * self.owner.drops, *[self.cut] * self.owner.cuts)

    async def act(self, task: int, number: int, rng: Random) -> int:
        wal, writer = self.wal, self.writer
        kind = rng.choices(("append", "many", "send"), (5, 2, 2))[0]
        unit = [writer.record(rng) for _ in range(1 if kind == "append" else rng.randint(2, 5))]
        last, seen = writer.next_lsn - 1, wal.durable_lsn
        if kind == "append":
            self.acknowledge(await wal.append(unit[0]), last, seen)
        elif kind == "many":
            self.acknowledge((await wal.append_many(unit))[-1], last, seen)
        else:
            for data in unit:
                wal.send_nowait(data)
            await wal.flush()
        return number + 1

    async def drop(self, rng: Random) -> None:
        wal, runs = self.wal, self.writer.runs
        if rng.random() < 0.04:
            # To nothing: nobody may append meanwhile, or it would not be all.
            async with self.gate.alone():
                await wal.flush()
                self.say("drop", wal.last_lsn + 1, *runs.told())
                await wal.truncate_before(wal.last_lsn + 1)
                self.say("dropped", wal.first_lsn)
            return
        lsn = rng.randint(wal.first_lsn, wal.durable_lsn + 1)
        lsn = max(wal.first_lsn, lsn - rng.randrange(100))
        async with self.gate.shared():
            self.say("drop", lsn, *runs.told())
            try:
                await wal.truncate_before(lsn)
            except (ValueError, LsnTruncatedError):
                return
            self.say("dropped", wal.first_lsn)

    async def cut(self, rng: Random) -> None:
        wal, writer = self.wal, self.writer
        if rng.random() < 0.5:
            return
        async with self.gate.alone():
            with trio.CancelScope(shield=True):
                await wal.flush()
                low = max(wal.first_lsn - 1, wal.last_lsn - rng.randrange(1, 40))
                lsn = rng.randint(low, wal.last_lsn)
                if lsn == wal.last_lsn:
                    return
                self.say("cut", lsn, wal.last_lsn, *writer.runs.told())
                await wal.truncate_after(lsn)
                writer.cut(lsn)
                self.say("cut done", lsn)

    async def read_once(self, who: str, place: int, rng: Random) -> None:
        wal, seed = self.wal, self.owner.seed
        each = self.check_durable
        if place == 0:
            await Stream(self.tell, who, "follow", seed, each=each).run(wal.follow)
            return
        start: int | None = None
        if rng.random() < 0.6:
            start = rng.randint(wal.first_lsn, wal.durable_lsn + 1)
        await Stream(self.tell, who, "read", seed, start, each=each).run(wal.read)


class _DatabaseLife(_Life):
    db: Database
    state: dict[bytes, bytes]
    sum: int

    async def run(self, db: Database) -> None:
        self.db = db
        self.state = dict(db.scan(prefix=KEYS))
        self.sum = sum_of(self.state.items())
        if int(db.get(SUM, b"0")) != self.sum:
            self.tell("strange", "the database holds another state than was written")
        await self.look(db.wal)
        await self.go(self.checkpoint, self.put)

    async def find_runs(self) -> Runs:
        seed = self.owner.seed
        items = await self.items(payload)
        head = self.db.get(HEAD)
        mark = None if head is None else mark_of(seed, head)
        if head is not None and mark is None:
            self.tell("strange", "the head has other bytes than were written")
        runs = runs_of(seed, items)
        if mark is not None:
            if mark.lsn != self.db.durable_lsn:
                self.tell("strange", f"the head is of LSN {mark.lsn} of {self.db.durable_lsn}")
            if not runs.histories:
                runs.begin(mark.base_lsn, mark.history)
        return runs

    async def act(self, task: int, number: int, rng: Random) -> int:
        db, writer = self.db, self.writer
        # No await after the first read, so no conflicts; and what waits for a checkpoint does so on
        # entering: the order of commits is that of the calls.
        async with db.transaction() as tx:
            for _ in range(rng.randrange(4)):
                self.change(tx, rng)
            tx.put(SUM, b"%d" % self.sum)
            tx.put(HEAD, writer.record(rng, empty=False))
            last, seen = writer.next_lsn - 1, db.durable_lsn
        self.acknowledge(tx.lsn or 0, last, seen)
        return number + 1

    def change(self, tx: Transaction, rng: Random) -> None:
        key = KEYS + b"%d" % rng.randrange(KEYS_MAX)
        before = self.state.pop(key, None)
        if rng.random() < DELETED_SHARE:
            tx.discard(key)
            after = None
        else:
            after = self.state[key] = rng.randbytes(rng.randrange(300))
            tx.put(key, after)
        self.sum ^= _part(key, before) ^ _part(key, after)

    async def put(self, rng: Random) -> None:
        """Alone: it may have to wait for a checkpoint after its record was made."""
        db, writer = self.db, self.writer
        async with self.gate.alone():
            data = writer.record(rng, empty=False)
            last, seen = writer.next_lsn - 1, db.durable_lsn
            with trio.CancelScope(shield=True):
                self.acknowledge(await db.put(HEAD, data), last, seen)

    async def checkpoint(self, rng: Random) -> None:
        await self.db.checkpoint()

    async def read_once(self, who: str, place: int, rng: Random) -> None:
        db = self.db
        kind, read = ("follow", db.changes) if place == 0 else ("read", db.wal.read)
        each = self.check_durable
        await Stream(self.tell, who, kind, self.owner.seed, database=True, each=each).run(read)


def tell_syncs(life: _Life) -> None:
    """From here on, in this process: what is durable, as soon as it is."""

    def get(self: LogDirectory) -> int:
        return int(vars(self)["synced_lsn"])

    def put(self: LogDirectory, lsn: int) -> None:
        writer = getattr(life, "writer", None)
        life.say("synced", lsn, 0 if writer is None else writer.history)
        vars(self)["synced_lsn"] = lsn

    setattr(LogDirectory, "synced_lsn", property(get, put))  # noqa: B010  (a plain attribute)


async def live(owner: Owner, tell: Tell) -> None:
    life: _LogLife | _DatabaseLife
    life = (_DatabaseLife if owner.kind == "database" else _LogLife)(owner, tell)
    life.say("life", owner.life)
    tell_syncs(life)
    async with owner.open() as opened:
        await life.run(opened)
        tell("closing")
        if owner.ending == "exit":
            os._exit(0)
    life.say("closed", life.writer.next_lsn - 1, *life.writer.runs.told())


def run(owner: Owner, fd: int) -> int:
    """A life in this process, which is to end with it; gives its exit code."""
    tell = teller(fd)
    return run_told(owner, tell, live, owner, tell)
