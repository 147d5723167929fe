"""Histories of a replicated log, taken over again and again, on servers with faults (simulated).

Law: the servers are `cas`'s, the time is trio's mock clock, and everything random is drawn from one
seed, so that a history is run again by its number.  What is judged is what users are told: a record
whose append returned is in the log at its LSN, once; one whose append was cancelled, refused or
fenced is not; a follower on another machine has seen what the log holds, and nothing else.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import attrs
import trio
from cas import CasServers, Faults, MemoryCas, open_wal_on_cas, source_on

import trio_wal
from trio_wal import LogFailedError, LogFencedError, LogFullError, LogUnavailableError
from trio_wal._replicated import ReplicatedOptions
from trio_wal._stream import new_record_stream

from ._report import (
    Answer,
    Report,
    add_common_arguments,
    bound,
    collect,
    described,
    per_minute,
    quiet,
)
from ._simulator import seeded_run

HISTORIES: Final = 100
"""In one task of a process."""
LIFETIME_SECONDS: Final = 600.0
"""Of the servers' time; a history that is not over by then hangs."""

COLUMNS = {
    "runs": "histories",
    "appends": "appends",
    "acknowledged": "acknowledged",
    "cancelled": "cancelled",
    "refused": "refused",
    "fenced": "fenced",
    "unknown": "unknown",
    "landed": "of them there",
    "resolved": "resolved",
    "opens": "opens",
    "refused_opens": "refused",
    "read": "followed",
    "forgotten": "forgotten",
    "rate": "a minute",
    "bound": "bound",
}


class Found(Exception):
    """A promise that was broken."""


@attrs.define
class _Told:
    """What users were told, of all owners."""

    acknowledged: dict[int, bytes] = attrs.Factory(dict)
    absent: set[bytes] = attrs.Factory(set)
    unknown: set[bytes] = attrs.Factory(set)
    followed: dict[int, bytes] = attrs.Factory(dict)
    dropped_below: int = 1
    figures: Counter[str] = attrs.Factory(Counter)

    def acknowledge(self, lsn: int, data: bytes) -> None:
        if lsn in self.acknowledged:
            raise Found(f"LSN {lsn} was acknowledged for {self.acknowledged[lsn]!r} and {data!r}")
        self.acknowledged[lsn] = data
        self.figures["acknowledged"] += 1


class History:
    """One run of several owners and a follower over the same servers."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.servers = CasServers(seed=seed)
        self.told = _Told()
        chance = self.random
        share = chance.choice((0.0, 0.02, 0.1, 0.25))
        self.faults = Faults(
            lost=chance.choice((0, share)),
            unanswered=chance.choice((0, share)),
            late=chance.choice((0, share)),
            doubled=chance.choice((0, share)),
            stale=chance.choice((0, share)),
            astray=chance.choice((0, 0.1)),
            gaps=chance.choice((0, share)),
            full=chance.choice((0, 0, 0.05, 0.25)),
        )
        if chance.random() < 0.3:
            self.servers.message_bytes_max = 120
        self.living = 0
        self.following: trio.CancelScope | None = None

    # -- the parties --

    async def _append(self, wal: trio_wal.WriteAheadLog, name: bytes) -> None:
        """One call, and what came of it."""
        told, chance = self.told, self.random
        told.figures["appends"] += 1
        unit = [name + b"/%d" % n for n in range(chance.choice((2, 3, 5)))]
        if chance.random() < 0.8:
            unit = [name + bytes(chance.choice((0, 0, 0, 150)))]
        try:
            with trio.CancelScope() as scope:
                if chance.random() < 0.15:
                    scope.deadline = trio.current_time() + chance.uniform(0, 0.5)
                if len(unit) == 1:
                    lsns = [await wal.append(unit[0])]
                else:
                    lsns = list(await wal.append_many(unit))
        except LogFencedError as exc:
            told.figures["fenced"] += 1
            told.absent.update(unit)
            if exc.outcome != "not written":
                raise Found(f"fenced, and the outcome is {exc.outcome!r}") from exc
            raise
        except LogFailedError as exc:
            known = exc.outcome == "not written"
            told.figures["refused" if known else "unknown"] += 1
            (told.absent if known else told.unknown).update(unit)
            raise
        except (LogFullError, trio.ClosedResourceError):
            told.figures["refused"] += 1
            told.absent.update(unit)
            return
        if scope.cancelled_caught:
            told.figures["cancelled"] += 1
            told.absent.update(unit)
            return
        for lsn, data in zip(lsns, unit, strict=True):
            told.acknowledge(lsn, data)

    async def _write(self, wal: trio_wal.WriteAheadLog, name: bytes, count: int) -> None:
        last = 0
        for number in range(count):
            before = len(self.told.acknowledged)
            with suppress(LogFailedError):
                await self._append(wal, name + b".%d" % number)
            if len(self.told.acknowledged) == before + 1:
                lsn = next(reversed(self.told.acknowledged))
                if wal.last_lsn >= lsn and self.told.acknowledged[lsn].startswith(name + b"."):
                    if lsn <= last:
                        raise Found(f"{name!r} got LSN {lsn} after LSN {last}")
                    last = lsn
            if self.random.random() < 0.3:
                await trio.sleep(self.random.uniform(0, 0.3))

    async def _truncate(self, wal: trio_wal.WriteAheadLog, way: MemoryCas) -> None:
        chance = self.random
        if chance.random() < 0.5:
            await trio.sleep(chance.uniform(0, 0.2))
            lsn = chance.randint(1, wal.last_lsn + 1)
        else:
            # Of what a former owner has written last, where a replica may have what was refused
            # when it was taken over.  Nobody remembers where that is: it is read, of one astray.
            way.faults = attrs.evolve(way.faults, astray=0.5)
            lsn = max(1, wal.last_lsn - chance.randint(0, 3))
        self.told.dropped_below = max(self.told.dropped_below, lsn)
        with suppress(
            *(LogFailedError, LogFullError, trio_wal.CorruptLogError),
            *(trio.ClosedResourceError, OSError),
        ):
            await wal.truncate_before(lsn)
        way.faults = self.faults

    async def _own(self, number: int) -> None:
        """One owner's life: it opens the log, writes, and closes it, or is cut off."""
        chance, told = self.random, self.told
        await trio.sleep(chance.uniform(0, 0.4) * number)
        way = MemoryCas(self.servers, self.faults)
        replication = ReplicatedOptions(
            unavailable_after=chance.choice((2.0, 8.0, 30.0)),
            segment_size=200,
            retention=trio_wal.KeepAll(),
        )
        told.figures["opens"] += 1
        opened = False
        try:
            async with open_wal_on_cas(way, replication=replication) as wal:
                opened = True
                async with trio.open_nursery() as nursery:
                    for task in range(chance.choice((1, 2, 3))):
                        name = b"%d.%d" % (number, task)
                        nursery.start_soon(self._write, wal, name, chance.randint(1, 6))
                    if chance.random() < 0.3:
                        nursery.start_soon(self._truncate, wal, way)
                    if chance.random() < 0.2:
                        await trio.sleep(chance.uniform(0, 0.5))
                        way.cut = True
                        if chance.random() < 0.6:
                            await trio.sleep(chance.uniform(0, 5))
                            way.cut = False
                told.figures["resolved"] += wal.statistics().resolved or 0
        except (LogFencedError, LogUnavailableError, LogFullError, OSError):
            if not opened:
                told.figures["refused_opens"] += 1
        finally:
            self.living -= 1
            if not self.living and self.following is not None:
                self.following.cancel()

    async def _follow(self) -> None:
        """A reader on another machine; it takes what it is told and never goes back."""
        way = MemoryCas(self.servers, attrs.evolve(self.faults, full=0.0))
        source = source_on(way)
        start = None
        with trio.CancelScope() as self.following:
            if not self.living:
                self.following.cancel()
            while True:
                try:
                    async with new_record_stream(source, start, None, follow=True) as records:
                        async for record in records:
                            seen = self.told.followed.setdefault(record.lsn, record.data)
                            if seen != record.data:
                                raise Found(
                                    f"LSN {record.lsn} was {seen!r}, and then {record.data!r}"
                                )
                            start = records.bookmark
                except (trio_wal.LsnTruncatedError, trio_wal.CorruptLogError, OSError) as exc:
                    if isinstance(exc, trio_wal.LogDivergedError) and start is not None:
                        if exc.parted_after is not None or not self.servers.forgetful:
                            raise Found(
                                f"a follower was told that {start} never was: {exc}"
                            ) from exc
                        self.told.figures["forgotten"] += 1
                    if isinstance(exc, trio_wal.LsnTruncatedError):
                        start = None
                    await trio.sleep(0.1)

    # -- the verdict --

    async def run(self) -> None:
        owners = self.random.choice((2, 2, 2, 3, 4))
        self.living = owners
        with trio.fail_after(LIFETIME_SECONDS):
            async with trio.open_nursery() as nursery:
                if self.random.random() < 0.5:
                    nursery.start_soon(self._follow)
                for number in range(owners):
                    nursery.start_soon(self._own, number)
            self.servers.deliver(everything=True)
            async with open_wal_on_cas(self.servers) as wal, wal.read() as records:
                found = {record.lsn: record.data async for record in records}
                self._judge(found, wal.first_lsn, wal.last_lsn)

    def _judge(self, found: dict[int, bytes], first: int, last: int) -> None:
        told = self.told
        if list(found) != list(range(first, last + 1)):
            raise Found(f"LSNs {list(found)} instead of {first} to {last}")
        if first > told.dropped_below:
            raise Found(f"dropped below LSN {first}, asked was {told.dropped_below}")
        data = Counter(found.values())
        if twice := [name for name, count in data.items() if count > 1]:
            raise Found(f"doubled: {twice}")
        for lsn, record in told.acknowledged.items():
            if lsn >= first and found.get(lsn) != record:
                raise Found(
                    f"lost: LSN {lsn} was acknowledged for {record!r}, is {found.get(lsn)!r}"
                )
        if ghosts := told.absent & set(data):
            raise Found(f"called absent, and there: {ghosts}")
        known = {*told.acknowledged.values(), *told.unknown}
        if strangers := set(data) - known:
            raise Found(f"nobody was told of: {strangers}")
        for lsn, record in told.followed.items():
            if lsn >= first and found.get(lsn) != record:
                raise Found(f"a follower saw {record!r} at LSN {lsn}, where {found.get(lsn)!r} is")
        for record in list(data):
            head, slash, _ = record.partition(b"/")
            unit = [one for one in told.unknown if slash and one.startswith(head + b"/")]
            if unit and first == 1 and not all(one in data for one in unit):
                raise Found(f"of the unit {head!r} a part is there")
        told.figures["landed"] += len(told.unknown & set(data))
        told.figures["read"] += len(told.followed)


def run_one(seed: int) -> tuple[Counter[str], str]:
    """One history: figures, and what is wrong with it."""
    history = History(seed)
    wrong = ""
    try:
        seeded_run(history.run, seed=seed)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # noqa: BLE001, ASYNC103  (whatever it is, it is a finding)
        wrong = described(exc)
    history.told.figures["runs"] += 1
    return history.told.figures, wrong


def run_some(seeds: range) -> Answer:
    quiet()
    figures: Counter[str] = Counter()
    failures: list[tuple[object, str]] = []
    for seed in seeds:
        counted, wrong = run_one(seed)
        figures.update(counted)
        if wrong:
            failures.append((seed, wrong))
    return Answer(len(seeds), f"{figures['acknowledged']:,} acknowledged", {"": figures}, failures)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, count=10_000)
    parser.add_argument("--replay", metavar="SEED", help="one history again")


def _tasks(first: int, count: int | None) -> Iterator[range]:
    start, end = first, None if count is None else first + count
    while end is None or start < end:
        stop = start + HISTORIES if end is None else min(start + HISTORIES, end)
        yield range(start, stop)
        start = stop


def run(arguments: argparse.Namespace) -> int:
    report = Report("replication", arguments, COLUMNS)
    count = arguments.count
    rows, seconds = collect(report, run_some, _tasks(arguments.seed, count), count)
    for figures in rows.values():
        cells: dict[str, Any] = {name: figures[name] for name in COLUMNS}
        runs = figures["runs"]
        report.add(**{**cells, "rate": per_minute(runs, seconds), "bound": bound(runs)})
    return report.finish()


def replay(case: str) -> int:
    report = Report("replication", None, COLUMNS)
    figures, wrong = run_one(int(case))
    report.add(**figures)
    if wrong:
        report.find(wrong, f"python -m campaigns replication --replay {case}")
    return report.finish()
