"""A reader's thread gives way to a log of the same process, and to nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from logs import LOG

import trio_wal
from trio_wal import _local, _turns
from trio_wal._turns import BUSY_SECONDS, PAUSE_SECONDS, SLICE_SECONDS, Turns
from trio_wal.testing import MemoryFiles


class Clock:
    """Time that passes only when it is told to, and the pauses that were made."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def work(clock: Clock, turns: Turns, pieces: int, seconds: float, *, writes: bool) -> int:
    """So many pieces of work of so many seconds; returns how often the reader gave way."""
    reader = turns.slice()
    before = len(clock.pauses)
    for _ in range(pieces):
        clock.now += seconds
        if writes:
            turns.wrote()
        reader.give_way()
    return len(clock.pauses) - before


def test_a_reader_gives_way_once_a_slice_while_something_is_written() -> None:
    clock = Clock()
    turns = Turns(clock, clock.pause)
    assert work(clock, turns, 100, SLICE_SECONDS / 4.1, writes=True) == 20
    assert work(clock, turns, 100, 1.1 * SLICE_SECONDS, writes=True) == 100
    assert set(clock.pauses) == {PAUSE_SECONDS}


def test_a_reader_is_not_starved() -> None:
    clock = Clock()
    turns = Turns(clock, clock.pause)
    started = clock.now
    assert work(clock, turns, 1000, SLICE_SECONDS / 10, writes=True) <= 100
    worked = clock.now - started - sum(clock.pauses)
    assert len(clock.pauses) <= worked / SLICE_SECONDS
    assert sum(clock.pauses) < 0.7 * (clock.now - started)


def test_a_reader_makes_no_pause_where_nobody_writes() -> None:
    clock = Clock()
    turns = Turns(clock, clock.pause)
    assert work(clock, turns, 1000, SLICE_SECONDS, writes=False) == 0
    turns.wrote()
    clock.now += BUSY_SECONDS
    assert work(clock, turns, 1000, SLICE_SECONDS, writes=False) == 0


def test_time_in_which_a_reader_waits_is_no_work() -> None:
    clock = Clock()
    turns = Turns(clock, clock.pause)
    reader = turns.slice()
    for _ in range(10):
        clock.now += 1
        turns.wrote()
        reader.begin()
        clock.now += SLICE_SECONDS / 2
        reader.give_way()
    assert not clock.pauses
    clock.now += SLICE_SECONDS
    reader.give_way()
    assert clock.pauses == [PAUSE_SECONDS]


async def test_who_follows_a_log_is_not_held_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(_local, "TURNS", Turns(clock, clock.pause))
    async with trio_wal.open_wal(tmp_path / "log") as wal, wal.follow() as records:
        for number in range(10):
            clock.now += 1
            await wal.append(b"record")
            assert (await records.__anext__()).lsn == number + 1
    assert not clock.pauses


def test_a_log_that_has_written_has_work_for_a_moment() -> None:
    clock = Clock()
    turns = Turns(clock, clock.pause)
    turns.wrote()
    pauses = work(clock, turns, 1000, 1.1 * SLICE_SECONDS, writes=False)
    most = BUSY_SECONDS / (SLICE_SECONDS + PAUSE_SECONDS)
    assert 0.7 * most < pauses <= most


@pytest.mark.parametrize("way", ["read", "batches", "reader", "changes"])
async def test_readers_of_every_kind_give_way_after_each_frame(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    turns = Turns(clock, clock.pause)
    monkeypatch.setattr(_local, "TURNS", turns)
    monkeypatch.setattr(_turns, "SLICE_SECONDS", 0.0)
    if way == "changes":
        async with trio_wal.open_database(tmp_path / "db") as db:
            for number in range(10):
                await db.put(b"%d" % number, b"")
            assert not clock.pauses
            async with db.changes(1) as changes:
                await changes.__anext__()
    else:
        async with trio_wal.open_wal(tmp_path / "log") as wal:
            for _ in range(10):
                await wal.append(b"record")
            assert not clock.pauses
            if way == "reader":
                async with (
                    trio_wal.open_reader(tmp_path / "log") as reader,
                    # What the owner says of the newest record may come a moment after it.
                    reader.follow() as records,
                ):
                    assert [(await records.__anext__()).lsn for _ in range(10)] == [*range(1, 11)]
            elif way == "batches":
                async with wal.read() as records:
                    assert [len(batch) async for batch in records.batches(100)] == [10]
            else:
                async with wal.read() as records:
                    assert [record.lsn async for record in records] == [*range(1, 11)]
    # Each append has been a batch, and so a frame.
    assert len(clock.pauses) == 10


async def test_without_threads_nobody_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(_local, "TURNS", Turns(clock, clock.pause))
    monkeypatch.setattr(_turns, "SLICE_SECONDS", 0.0)
    async with trio_wal.open_wal(LOG, files=MemoryFiles()) as wal:
        await wal.append(b"record")
        async with wal.read() as records:
            assert [record.data async for record in records] == [b"record"]
    await trio.lowlevel.checkpoint()
    assert not clock.pauses
