"""Event sourcing: streams with expected versions, and a projection that resumes and can be rebuilt.

    python docs/examples/event_sourcing.py folder --tasks 8 --count 500
    python docs/examples/event_sourcing.py folder --count 0 --rebuild

Accounts are streams of events.  A task reads an account, thinks about what it has read, and appends
its event with the version that it saw: if another task was faster, that is `VersionConflictError`,
and it thinks again.  So no decision is ever based on what is no longer so.

The balances are a projection, a database of their own that is made from the commits of the first.
It keeps a bookmark of the last commit that it has seen, in the same transaction as the balances,
so each event counts once, however often either of them is killed.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Literal

import msgspec
import trio

import trio_wal
from trio_wal import Bookmark, Database, Readable, Table


class Event(msgspec.Struct, frozen=True):
    kind: Literal["deposited", "withdrawn"]
    amount: int

    @property
    def change(self) -> int:
        return self.amount if self.kind == "deposited" else -self.amount


class VersionConflictError(Exception):
    """The stream is no longer, or not yet, at the version that was expected."""


events = Table("events", key=tuple[str, int], value=Event)  # stream and version, from 1 on


def version(source: Readable, stream: str) -> int:
    last = next(events.scan(source, prefix=(stream,), reverse=True, limit=1), None)
    return 0 if last is None else last[0][1]


async def append(db: Database, stream: str, expected: int, *new: Event) -> int:
    """Adds to a stream that is at the version ``expected``; durable when it returns.

    Returns the stream's version.
    """
    async with db.transaction() as tx:
        found = version(tx, stream)
        if found != expected:
            raise VersionConflictError(f"{stream} is at version {found}, not {expected}")
        for event in new:
            expected += 1
            events.insert(tx, (stream, expected), event)
    return expected


# -- the projection -----------------------------------------------------------------

balances = Table("balances", key=str, value=int)
places = Table("places", key=str, value=str)


async def clear(view: Database) -> None:
    async with view.transaction() as tx:
        balances.delete_range(tx)
        places.discard(tx, "events")


async def project(db: Database, view: Database) -> None:
    """Follows the events' database for ever."""
    text = places.get(view, "events")
    try:
        await follow(db, view, None if text is None else Bookmark.parse(text))
    except trio_wal.LogDivergedError:
        # Events that were counted are not in this database: it was restored from a backup.
        await clear(view)
        await follow(db, view, None)


async def follow(db: Database, view: Database, start: Bookmark | None) -> None:
    async with db.changes(start) as commits:
        async for batch in commits.batches(1000):
            async with view.transaction() as tx:
                for operation in (o for commit in batch for o in commit.operations):
                    (account, _), event = events.decode(operation) or (("", 0), None)
                    if event is not None:
                        balance = balances.get(tx, account, 0)
                        balances.put(tx, account, balance + event.change)
                places.put(tx, "events", str(commits.bookmark))


async def wait_projected(db: Database, view: Database) -> None:
    """Until the view shows all that is durable now."""
    goal, seen = db.durable_lsn, view.durable_lsn
    while Bookmark.parse(places.get(view, "events", "0@0")).lsn < goal:
        seen = await view.wait_changed(prefix=places.prefix, since=seen)


# -- what the accounts are used for -------------------------------------------------


async def decide(db: Database, account: str, rng: random.Random) -> tuple[int, Event]:
    """What to append, and the version of what that was decided on."""
    with db.snapshot() as now:
        found = list(events.scan(now, prefix=(account,)))
    balance = sum(event.change for _, event in found)
    await trio.lowlevel.checkpoint()  # whoever must be asked, others go on meanwhile
    amount = rng.randrange(1, 100)
    kind: Literal["deposited", "withdrawn"] = "withdrawn" if amount <= balance else "deposited"
    return len(found), Event(kind, amount)


async def customer(db: Database, count: int, rng: random.Random) -> int:
    """Returns how often another one was faster."""
    conflicts = 0
    while count:
        account = rng.choice(["alice", "bob", "carol"])
        expected, event = await decide(db, account, rng)
        try:
            reached = await append(db, account, expected, event)
        except VersionConflictError:
            conflicts += 1
            continue
        count -= 1
        print("appended", account, reached, flush=True)
    return conflicts


async def main(folder: Path, tasks: int, count: int, rebuild: bool) -> None:
    conflicts = 0

    async def run_customer() -> None:
        nonlocal conflicts
        conflicts += await customer(db, count, random.Random())

    async with (
        # Without KeepAll, the log would only have what the store has not got yet.
        trio_wal.open_database(folder / "events", retention=trio_wal.KeepAll()) as db,
        trio_wal.open_database(folder / "balances") as view,
        trio.open_nursery() as nursery,
    ):
        if rebuild:
            await clear(view)
        nursery.start_soon(project, db, view)
        async with trio.open_nursery() as customers:
            for _ in range(tasks):
                customers.start_soon(run_customer)
        await wait_projected(db, view)
        for account, balance in balances.scan(view):
            print("balance", account, balance)
        print("conflicts", conflicts)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Event sourcing.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--count", type=int, default=100, help="events of each task")
    parser.add_argument("--rebuild", action="store_true", help="the balances, from the events")
    given = parser.parse_args()
    trio.run(main, given.folder, given.tasks, given.count, given.rebuild)
