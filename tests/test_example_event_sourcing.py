"""docs/examples/event_sourcing.py, killed in mid-flight."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path

import pytest
import trio
from examples import finish, kill, load, read, running

import trio_wal

example = load("event_sourcing")


async def streams(path: Path) -> dict[str, list[tuple[int, int]]]:
    found = defaultdict(list)
    async with trio_wal.open_database_reader(path) as db:
        for (account, version), event in example.events.scan(db):
            found[account].append((version, event.change))
    return dict(found)


async def test_each_event_counts_once_however_often_it_is_killed(tmp_path: Path) -> None:
    rng = random.Random(1)
    told: list[str] = []
    for _ in range(4):
        with running("event_sourcing", tmp_path, "--count", "100000") as process:
            told += read(process, rng.randrange(20, 150))
            told += kill(process)
    with running("event_sourcing", tmp_path, "--count", "0") as process:
        shown = finish(process)
    found = await streams(tmp_path / "events")
    for changes in found.values():
        assert [version for version, _ in changes] == list(range(1, len(changes) + 1))
        # Each decision was made on what was there: nobody has withdrawn what he did not have.
        assert min(sum(c for _, c in changes[: n + 1]) for n in range(len(changes))) >= 0
    words = [line.split() for line in told if line.startswith("appended ")]
    acknowledged = [(account, int(version)) for _, account, version in words]
    assert len(acknowledged) >= 80
    assert all(version <= len(found[account]) for account, version in acknowledged)
    assert len(set(acknowledged)) == len(acknowledged)
    expected = [f"balance {a} {sum(c for _, c in found[a])}" for a in sorted(found)]
    assert shown == [*expected, "conflicts 0"]
    with running("event_sourcing", tmp_path, "--count", "0", "--rebuild") as process:
        assert finish(process) == shown


async def test_an_expected_version_that_is_not_there_is_refused(tmp_path: Path) -> None:
    event = example.Event("deposited", 1)
    async with trio_wal.open_database(tmp_path / "db") as db:
        assert await example.append(db, "a", 0, event, event) == 2
        for expected in (0, 1, 3):
            with pytest.raises(example.VersionConflictError, match=r"^a is at version 2, not "):
                await example.append(db, "a", expected, event)
        assert await example.append(db, "b", 0, event) == 1
        assert await example.append(db, "a", 2, event) == 3


async def test_balances_and_the_place_that_they_are_of_are_one_commit(tmp_path: Path) -> None:
    async with (
        trio_wal.open_database(tmp_path / "db", retention=trio_wal.KeepAll()) as db,
        trio_wal.open_database(tmp_path / "view", retention=trio_wal.KeepAll()) as view,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(example.project, db, view)
        for expected in range(3):
            await example.append(db, "a", expected, example.Event("deposited", 1))
            await example.wait_projected(db, view)
        nursery.cancel_scope.cancel()
        places = []
        with trio.CancelScope(shield=True):
            async with view.wal.read() as records:
                count = len([record async for record in records])
            async with view.changes(1) as commits:
                for _ in range(count):
                    commit = await commits.__anext__()
                    assert any(example.balances.decode(o) for o in commit.operations)
                    places += [example.places.decode(o) for o in commit.operations]
    assert [place[1].partition("@")[0] for place in places if place] == ["1", "2", "3"]
