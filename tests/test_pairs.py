"""`Database.stream` and `Snapshot.stream`: large ranges, with a turn for the others."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from databases import open_memory_database, write
from trio.testing import assert_checkpoints

from trio_wal import _pairs
from trio_wal.testing import MemoryFiles

ITEMS = {b"%c%d" % (letter, number): b"%d" % number for letter in b"ab" for number in range(5)}


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"reverse": True},
        {"prefix": b"a"},
        {"start": b"a2", "stop": b"b1"},
        {"prefix": b"b", "limit": 2, "reverse": True},
        {"limit": 0},
        {"prefix": b"c"},
    ],
)
async def test_a_stream_gives_what_a_scan_gives(files: MemoryFiles, where: dict[str, Any]) -> None:
    async with open_memory_database(files) as db:
        await write(db, dict(ITEMS))
        expected = list(db.scan(**where))
        async with db.stream(**where) as pairs:
            assert [pair async for pair in pairs] == expected
        with db.snapshot() as snap:
            await db.put(b"a00", b"later")
            async with snap.stream(**where) as pairs:
                assert [pair async for pair in pairs] == expected


async def test_it_shows_the_moment_of_entering(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"a", b"1")
        stream = db.stream()
        await db.put(b"a", b"2")
        async with stream as pairs:
            await db.put(b"a", b"3")
            await db.put(b"b", b"3")
            await db.checkpoint()
            assert db.statistics().open_readers == 1
            assert [pair async for pair in pairs] == [(b"a", b"2")]
        assert db.statistics().open_readers == 0


async def test_others_get_their_turn(files: MemoryFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 0.0001
        return now

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(_pairs, "perf_counter", clock)
    turns = 0
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        await write(db, {b"%03d" % number: b"" for number in range(100)})
        async with db.stream() as pairs:
            nursery.start_soon(count)
            given = 0
            last = turns
            async for _ in pairs:
                given += 1
                if turns != last:
                    given, last = 0, turns
                # A look at the clock for each.
                assert given <= 20
            assert turns >= 10
        nursery.cancel_scope.cancel()


async def test_entering_and_the_end_are_checkpoints_and_cancelling_loses_no_pair(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pairs, "TURN_SECONDS", 0.0)
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"", b"b": b""})
        stream = db.stream()
        with assert_checkpoints():
            await stream.__aenter__()
        for key in (b"a", b"b"):
            with trio.CancelScope() as scope:
                scope.cancel()
                await stream.__anext__()
            assert scope.cancelled_caught
            with assert_checkpoints():
                assert await stream.__anext__() == (key, b"")
        for _ in range(2):
            with assert_checkpoints(), pytest.raises(StopAsyncIteration):
                await stream.__anext__()
        await stream.__aexit__(None, None, None)
        with pytest.raises(trio.ClosedResourceError, match="this stream of pairs is closed"):
            await stream.__anext__()
        with pytest.raises(RuntimeError, match="can be used only once"):
            await stream.__aenter__()


async def test_it_ends_with_what_it_reads(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"", b"b": b""})
        with pytest.raises(RuntimeError, match="enter the stream first"):
            await db.stream().__anext__()
        with db.snapshot() as snap:
            of_snapshot = await snap.stream().__aenter__()
            await of_snapshot.__anext__()
            never_entered = snap.stream()
        with pytest.raises(trio.ClosedResourceError):
            await of_snapshot.__anext__()
        with pytest.raises(trio.ClosedResourceError):
            await never_entered.__aenter__()
        with pytest.raises(trio.ClosedResourceError):
            snap.stream()
        of_database = await db.stream().__aenter__()
        await of_database.__anext__()
    with pytest.raises(trio.ClosedResourceError):
        await of_database.__anext__()
    with pytest.raises(trio.ClosedResourceError):
        db.stream()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"start": "a"}, TypeError),
        ({"limit": -1}, ValueError),
        ({"start": b"a", "prefix": b"a"}, ValueError),
    ],
)
async def test_bad_arguments_are_refused_at_once(
    files: MemoryFiles, arguments: dict[str, Any], error: type[Exception]
) -> None:
    async with open_memory_database(files) as db:
        with pytest.raises(error):
            db.stream(**arguments)
        with db.snapshot() as snap, pytest.raises(error):
            snap.stream(**arguments)


async def test_a_scan_that_fails_at_once_keeps_nothing() -> None:
    let_go: list[None] = []

    def scan() -> Any:
        raise OSError("no")

    stream = _pairs.new_pair_stream(scan, lambda: let_go.append(None))
    with pytest.raises(OSError, match="no"):
        await stream.__aenter__()
    assert let_go == [None]
