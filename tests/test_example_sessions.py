"""docs/examples/sessions.py, killed in mid-flight."""

from __future__ import annotations

from pathlib import Path

import trio
from examples import finish, kill, load, read, running
from trio.testing import MockClock

import trio_wal
from trio_wal.testing import MemoryFiles

example = load("sessions")


async def check_index(db: trio_wal.Database) -> None:
    with db.snapshot() as now:
        listed = [(session.expires, key) for key, session in example.sessions.scan(now)]
        assert sorted(listed) == [place for place, _ in example.by_time.scan(now)]


async def test_what_was_acknowledged_holds_and_the_index_agrees_after_kills(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sessions.db"
    live: dict[str, str] = {}
    ended: set[str] = set()
    for count in (30, 50, 70):
        with running("sessions", path, "--count", "100000", "--lifetime", "100000") as process:
            told = read(process, count)
            told += kill(process)
        for line in told:
            word, token, number = line.split()
            if word == "ended":
                ended.add(token)
            elif int(number) % 3 != 2:
                live[token] = f"user {number}"
        async with trio_wal.open_database(path) as db:
            store = example.Sessions(db, 1.0)
            assert {token: store.user(token) for token in live} == live
            assert all(store.user(token) is None for token in ended)
            await check_index(db)
    assert len(live) >= 60
    assert ended


def test_nothing_stays_of_sessions_whose_time_is_over(tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with running("sessions", path, "--count", "100000", "--lifetime", "0.05") as process:
        read(process, 50)
        kill(process)
    with running("sessions", path, "--count", "5", "--lifetime", "0.05") as process:
        assert finish(process)[-1] == "all are over"


async def test_a_session_lives_from_its_last_renewal_and_no_longer(
    autojump_clock: MockClock,
) -> None:
    def clock() -> int:
        return int(trio.current_time() * 1000)

    files = MemoryFiles()
    async with trio_wal.open_database("/db", files=files) as db, trio.open_nursery() as nursery:
        store = example.Sessions(db, 10.0, clock)
        nursery.start_soon(store.clean)
        token = await store.begin("alice")
        await trio.sleep(9)
        other = await store.begin("bob")
        assert await store.renew(token)
        await trio.sleep(9.5)
        assert (store.user(token), store.user(other)) == ("alice", "bob")
        await trio.sleep(0.4)
        await store.end(other)
        assert (store.user(token), store.user(other)) == ("alice", None)
        await trio.sleep(0.2)
        assert store.user(token) is None
        assert not await store.renew(token)
        await store.wait_empty()
        await check_index(db)
        nursery.cancel_scope.cancel()
