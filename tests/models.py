"""A database beside a naive model of what each of its readers must see."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator

import attrs
import trio
from databases import Session, State, write
from helpers import Call
from trio.testing import wait_all_tasks_blocked

from trio_wal import Database, Snapshot, TransactionConflict
from trio_wal.testing import MemoryFiles

KEYS = [b"%02d" % n for n in range(10)] + [b"03\0", b"03\0\0", b"03!", b"07 "]


@attrs.define(eq=False)
class Written:
    """A commit, as the model knows it."""

    seq: int
    items: dict[bytes, bytes | None]
    call: Call | Ending
    durable: bool = False


Range = tuple["bytes | None", "bytes | None"]


@attrs.define(eq=False)
class Reading:
    """An open transaction: it sees every commit up to ``seq`` that was not withdrawn."""

    seq: int
    session: Session
    keys: set[bytes] = attrs.Factory(set)
    ranges: list[Range] = attrs.Factory(list)

    def touched_by(self, items: dict[bytes, bytes | None]) -> bool:
        return any(
            key in self.keys or any(_within(key, *reached) for reached in self.ranges)
            for key in items
        )


@attrs.define(eq=False)
class Ending:
    """The commit of a session, as a `Call`."""

    session: Session

    @property
    def state(self) -> str:
        return "returned" if self.session.ended.is_set() else "being waited for"


@attrs.define(eq=False)
class Scan:
    """One that is under way."""

    step: Callable[[], Awaitable[tuple[bytes, bytes] | None]]
    seen: Callable[[], State]
    """What it must show, as it is known by now."""
    start: bytes | None
    stop: bytes | None
    reverse: bool
    last: bytes | None = None

    def expected(self) -> tuple[bytes, bytes] | None:
        items = _range(self.seen(), self.start, self.stop, self.reverse)
        for item in items:
            if self.last is None or (item[0] < self.last if self.reverse else item[0] > self.last):
                return item
        return None


@attrs.define(eq=False)
class Model:
    """A database on a disk that only moves when told to, and what must be seen of it."""

    db: Database
    files: MemoryFiles
    nursery: trio.Nursery
    rng: random.Random
    sessions: Iterator[Session]
    durable: State = attrs.Factory(dict)
    written: list[Written] = attrs.Factory(list)
    """Pending and durable ones since the start, without those withdrawn."""
    commits: int = 0
    readings: list[Reading] = attrs.Factory(list)
    snapshots: list[tuple[Snapshot, State]] = attrs.Factory(list)
    scans: list[Scan] = attrs.Factory(list)
    checkpoint: Call | None = None
    deleted: float = 0.3
    """Share of the keys that are there which a commit deletes."""
    seen: set[str] = attrs.Factory(set)
    """What happened, to be sure that the interesting did."""

    def state(self, seq: int) -> State:
        state: State = {}
        for commit in self.written:
            if commit.seq <= seq:
                _apply(state, commit.items)
        return state

    async def put(self) -> None:
        count = self.rng.randint(1, 4)
        tag = b"%d" % self.commits
        now = self.state(self.commits)
        items: dict[bytes, bytes | None] = {}
        for key in self.rng.sample(KEYS, count):
            items[key] = None if key in now and self.rng.random() < self.deleted else tag
        if any(value is None for value in items.values()):
            # Deleting is reading: such a commit makes others that are pending stay.
            items = items if self.rng.random() < self.deleted + 0.2 else dict.fromkeys(items, tag)
        self.commits += 1
        call = Call(self.nursery, write, self.db, items)
        self.written.append(Written(self.commits, items, call))
        await wait_all_tasks_blocked()

    async def cancel(self) -> None:
        pending = [commit for commit in self.written if commit.call.state == "waiting"]
        if not pending:
            return
        commit = self.rng.choice(pending)
        assert isinstance(commit.call, Call)
        commit.call.scope.cancel()
        await wait_all_tasks_blocked()
        if commit.call.state == "cancelled":
            self.written.remove(commit)
            self.seen.add("withdrawn")

    async def move(self) -> None:
        """Let the disk do what there is to do, and stall again."""
        self.files.release()
        await wait_all_tasks_blocked()
        self.files.hold()
        for commit in self.written:
            if not commit.durable and commit.call.state == "returned":
                commit.durable = True
                _apply(self.durable, commit.items)
        assert all(commit.durable for commit in self.written)

    async def freeze(self) -> None:
        if self.checkpoint is None or self.checkpoint.state != "waiting":
            self.checkpoint = Call(self.nursery, self.db.checkpoint)
            await wait_all_tasks_blocked()
            if self.checkpoint.state == "waiting":
                self.seen.add("frozen with pending commits")

    async def begin(self) -> None:
        if len(self.readings) < 4:
            session = next(self.sessions)
            key = self.rng.choice(KEYS)
            await session.get(key)
            self.readings.append(Reading(self.commits, session, {key}))

    async def end(self) -> None:
        if self.readings:
            reading = self.readings.pop(self.rng.randrange(len(self.readings)))
            await reading.session.abort()

    async def end_with_a_commit(self) -> None:
        """It passes if and only if nothing that was read has been written since."""
        if not self.readings:
            return
        reading = self.readings.pop(self.rng.randrange(len(self.readings)))
        session = reading.session
        items: dict[bytes, bytes | None] = {b"~%d" % self.commits: b"own"}
        for key in items:
            await session.put(key, b"own")
        newer = [commit for commit in self.written if commit.seq > reading.seq]
        conflict = any(reading.touched_by(commit.items) for commit in newer)
        session.commit_soon()
        await wait_all_tasks_blocked()
        if conflict:
            assert isinstance(session.outcome, TransactionConflict)
            self.seen.add("conflict")
        else:
            assert session.outcome is None or isinstance(session.outcome, int)
            self.commits += 1
            self.written.append(Written(self.commits, items, Ending(session)))
            self.seen.add("no conflict")

    async def open_scan(self) -> None:
        """Of the database, a snapshot or a transaction; it is not looked at yet."""
        if len(self.scans) >= 4:
            self.scans.pop(0)
        start, stop = self.bounds()
        reverse = self.rng.random() < 0.5
        who = self.rng.choice(("database", "snapshot", "transaction"))
        if who == "transaction" and self.readings:
            reading = self.rng.choice(self.readings)
            reading.ranges.append((start, stop))
            items = await reading.session.do(lambda tx: tx.scan(start, stop, reverse=reverse))

            async def step() -> tuple[bytes, bytes] | None:
                if reading not in self.readings:
                    return scan.expected()
                return await reading.session.do(lambda _: next(items, None))

            scan = Scan(step, lambda: self.state(reading.seq), start, stop, reverse)
        else:
            if who == "snapshot" and self.snapshots:
                snap, state = self.rng.choice(self.snapshots)
                found = snap.scan(start, stop, reverse=reverse)
            else:
                state, snap = dict(self.durable), None
                found = self.db.scan(start, stop, reverse=reverse)

            async def step() -> tuple[bytes, bytes] | None:
                if snap is not None and all(snap is not other for other, _ in self.snapshots):
                    return scan.expected()
                return next(found, None)

            scan = Scan(step, lambda: state, start, stop, reverse)
        self.scans.append(scan)

    async def step_scans(self) -> None:
        for scan in self.scans:
            for _ in range(self.rng.randint(0, 3)):
                item = await scan.step()
                assert item == scan.expected()
                if item is None:
                    break
                scan.last = item[0]
                self.seen.add("scan under way")

    def bounds(self) -> Range:
        start, stop = sorted(self.rng.choices([None, *KEYS, b"\xff"], k=2), key=lambda k: k or b"")
        return start, stop

    async def open_snapshot(self) -> None:
        if len(self.snapshots) < 4:
            self.snapshots.append((self.db.snapshot().__enter__(), dict(self.durable)))

    async def close_snapshot(self) -> None:
        if self.snapshots:
            snap, _ = self.snapshots.pop(self.rng.randrange(len(self.snapshots)))
            snap.close()

    async def look(self) -> None:
        """Everybody sees what he must see."""
        start, stop = self.bounds()
        reverse = self.rng.random() < 0.5
        limit = self.rng.choice((None, None, 1, 2))

        def content(state: State) -> list[tuple[bytes, bytes]]:
            return _range(state, start, stop, reverse)[:limit]

        found = list(self.db.scan(start, stop, reverse=reverse, limit=limit))
        assert found == content(self.durable)
        assert {key: self.db.get(key) for key in KEYS} == {
            key: self.durable.get(key) for key in KEYS
        }
        for snap, state in self.snapshots:
            found = list(snap.scan(start, stop, reverse=reverse, limit=limit))
            assert found == content(state)
            assert {key: snap.get(key) for key in KEYS} == {key: state.get(key) for key in KEYS}
        if self.readings:
            reading = self.rng.choice(self.readings)
            expected = self.state(reading.seq)
            if self.rng.random() < 0.5:
                key = self.rng.choice(KEYS)
                reading.keys.add(key)
                assert await reading.session.get(key) == expected.get(key)
            else:
                found = await reading.session.do(
                    lambda tx: list(tx.scan(start, stop, reverse=reverse, limit=limit))
                )
                assert found == content(expected)
                if len(found) == limit:
                    last = found[-1][0]
                    reading.ranges.append((last, stop) if reverse else (start, last + b"\0"))
                else:
                    reading.ranges.append((start, stop))


def _within(key: bytes, start: bytes | None, stop: bytes | None) -> bool:
    return (start is None or key >= start) and (stop is None or key < stop)


def _apply(state: State, items: dict[bytes, bytes | None]) -> None:
    for key, value in items.items():
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value


def _range(
    state: State, start: bytes | None, stop: bytes | None, reverse: bool
) -> list[tuple[bytes, bytes]]:
    return sorted(
        ((key, value) for key, value in state.items() if _within(key, start, stop)),
        reverse=reverse,
    )
