"""A database whose log servers keep: its cache, replicas, promotion, snapshots, rebuilding."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from cas import CasServers, MemoryLog
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal import DirectoryArchive


@pytest.fixture
def servers() -> CasServers:
    return CasServers()


@pytest.fixture
def log(servers: CasServers) -> MemoryLog:
    return MemoryLog(servers)


def state(db: Any) -> dict[bytes, bytes]:
    return dict(db.scan())


# -- consumers ----------------------------------------------------------------------------


async def lsns_given(db: Any, name: str, count: int) -> list[int]:
    """So many, and whatever follows soon: the clock does not wait for threads."""
    found: list[int] = []
    async with db.consumer(name) as consumer:
        with trio.CancelScope() as scope:
            if not count:
                scope.deadline = trio.current_time() + 1
            async for commit in consumer:
                found.append(commit.lsn)
                if len(found) >= count:
                    scope.deadline = trio.current_time() + 1
    return found


async def acknowledge(db: Any, name: str, lsn: int) -> None:
    async with db.consumer(name) as consumer:
        async for commit in consumer:
            if commit.lsn == lsn:
                await consumer.acknowledge(commit)
                return


async def test_consumers_move_to_whoever_takes_over(
    log: MemoryLog, tmp_path: Path, autojump_clock: object
) -> None:
    async with trio_wal.open_database(tmp_path / "a", log=log) as db:
        for number in range(5):
            await db.put(b"%d" % number, b"value")
        await acknowledge(db, "x", 2)
        await db.checkpoint()
        await acknowledge(db, "x", 3)
        async with trio_wal.open_replica(tmp_path / "b", log=log) as replica:
            await replica.wait_for(db.durable_lsn)
            async with replica.promote() as promoted:
                assert promoted.statistics().consumers["x"].acknowledged_lsn == 3
                await promoted.checkpoint()
                assert await lsns_given(promoted, "x", 2) == [4, 5]
                await acknowledge(promoted, "x", 5)
        with suppress(trio_wal.LogFencedError):
            await db.put(b"x", b"never")
    shutil.rmtree(tmp_path / "a")
    for name in ("b", "a"):
        async with trio_wal.open_database(tmp_path / name, log=log) as db:
            assert db.statistics().consumers["x"].acknowledged_lsn == 5
            assert await lsns_given(db, "x", 0) == []


async def test_a_consumer_holds_what_a_snapshot_has(
    log: MemoryLog, tmp_path: Path, autojump_clock: object
) -> None:
    kept = DirectoryArchive(tmp_path / "snapshots")
    options: Any = {"log": log, "snapshots": kept, "segment_size": 1}
    async with trio_wal.open_database(tmp_path / "a", **options) as db:
        for number in range(20):
            await db.put(b"%d" % number, bytes(100))
        await acknowledge(db, "x", 10)
        await db.snapshot_to(kept)
        await trio.sleep(5)
    async with trio_wal.open_database(
        tmp_path / "a", retention=trio_wal.KeepSegments(1), **options
    ) as db:
        await db.put(b"more", b"")
        while db.wal.first_lsn == 1:  # noqa: ASYNC110  (nothing tells of it)
            await trio.sleep(1)
        assert db.wal.first_lsn <= 11
        assert await lsns_given(db, "x", 11) == [*range(11, 21), 23]
    shutil.rmtree(tmp_path / "a")
    async with trio_wal.open_database(tmp_path / "a", **options) as db:
        assert await lsns_given(db, "x", 11) == [*range(11, 21), 23]
        assert db.statistics().consumers["x"].lag_bytes > 0
        await db.drop_consumer("x")


async def test_a_log_on_servers_has_no_consumers_of_its_own(log: MemoryLog) -> None:
    async with trio_wal.open_wal(log) as wal:
        with pytest.raises(trio_wal.UnsupportedOperationError, match="consumers"):
            wal.consumer("x")
        with pytest.raises(trio_wal.UnsupportedOperationError, match="consumers"):
            await wal.drop_consumer("x")
        assert wal.statistics().consumers == {}


# -- the database -------------------------------------------------------------------------


async def test_a_database_on_servers_keeps_what_it_acknowledged(
    log: MemoryLog, tmp_path: Path
) -> None:
    async with trio_wal.open_database(tmp_path / "a", log=log) as db:
        for number in range(20):
            await db.put(b"key %d" % number, b"value")
        async with db.transaction() as tx:
            tx.delete(b"key 3")
            tx.put(b"key 4", b"changed")
        assert await db.checkpoint() == 21
        await db.put(b"key 5", b"later")
        expected = state(db)
        assert db.wal.statistics().position is not None
    async with trio_wal.open_database(tmp_path / "a", log=log) as db:
        assert state(db) == expected
        assert (db.recovery.checkpoint_lsn, db.recovery.transactions_replayed) == (21, 1)
        assert db.epoch > 0
    assert not (tmp_path / "a" / "log").exists()


async def test_a_cache_may_be_deleted_and_another_machine_have_its_own(
    log: MemoryLog, tmp_path: Path
) -> None:
    async with trio_wal.open_database(tmp_path / "a", log=log) as db:
        for number in range(50):
            await db.put(b"%d" % number, b"value")
        await db.checkpoint()
        expected = state(db)
    shutil.rmtree(tmp_path / "a")
    for name in ("a", "b"):
        async with trio_wal.open_database(tmp_path / name, log=log) as db:
            assert state(db) == expected
            assert db.recovery.transactions_replayed == 50


async def test_a_second_database_takes_over_and_the_first_commits_nothing(
    log: MemoryLog, tmp_path: Path
) -> None:
    async with trio_wal.open_database(tmp_path / "a", log=log) as first:
        await first.put(b"key", b"1")
        async with trio_wal.open_database(tmp_path / "b", log=log) as second:
            await second.put(b"key", b"2")
            with pytest.raises(trio_wal.LogFencedError) as caught:
                await first.put(b"key", b"never")
            assert caught.value.outcome == "not written"
            # It shows what it knew to be durable.
            assert first.get(b"key") == b"1"
    async with trio_wal.open_database(tmp_path / "b", log=log) as db:
        assert state(db) == {b"key": b"2"}


async def test_a_cache_of_another_log_is_refused_and_nothing_written(tmp_path: Path) -> None:
    async with trio_wal.open_database(tmp_path / "a", log=MemoryLog(CasServers(seed=1))) as db:
        await db.put(b"key", b"value")
        await db.checkpoint()
    other = CasServers(seed=2)
    with pytest.raises(trio_wal.CorruptLogError, match="the store belongs to another log"):
        async with trio_wal.open_database(tmp_path / "a", log=MemoryLog(other)):
            pytest.fail("opened")
    assert other.entries == []


async def test_directories_of_other_kinds_are_refused(log: MemoryLog, tmp_path: Path) -> None:
    async with trio_wal.open_database(tmp_path / "own"), trio_wal.open_wal(tmp_path / "wal"):
        pass
    for name, match in (("own", "a log of its own"), ("wal", "this is a log")):
        with pytest.raises(trio_wal.WrongDirectoryError, match=match):
            async with trio_wal.open_database(tmp_path / name, log=log):
                pytest.fail("opened")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "file").touch()
    with pytest.raises(trio_wal.WrongDirectoryError, match="neither a log nor a database"):
        async with trio_wal.open_database(tmp_path / "strange", log=log):
            pytest.fail("opened")
    async with trio_wal.open_database(tmp_path / "cache", log=log) as db:
        await db.put(b"key", b"value")
        with pytest.raises(trio_wal.LogLockedError):
            async with trio_wal.open_database(tmp_path / "cache", log=log):
                pytest.fail("opened twice")
        await db.put(b"key", b"not fenced by it")
    with pytest.raises(trio_wal.CorruptLogError, match="without its log"):
        async with trio_wal.open_database(tmp_path / "cache"):
            pytest.fail("opened")


def test_options_that_mean_nothing_are_named(log: MemoryLog, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^snapshots: not an option of a database with a log of"):
        trio_wal.open_database(tmp_path, snapshots=DirectoryArchive(str(tmp_path)))
    with pytest.raises(TypeError, match=r"^compression: not an option"):
        trio_wal.open_database(tmp_path, log=log, compression="zstd")
    with pytest.raises(ValueError, match=r"^durability must be 'sync'"):
        trio_wal.open_database(tmp_path, log=log, durability="none")
    with pytest.raises(TypeError, match=r"^snapshots must be an Archive"):
        trio_wal.open_database(tmp_path, log=log, snapshots=17)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^snapshot_bytes must be at least 1"):
        trio_wal.open_database(tmp_path, log=log, snapshot_bytes=0)
    for call in (trio_wal.open_database, trio_wal.open_replica):
        with pytest.raises(TypeError, match=r"^log must be a trio_wal\.nats\.Log or its URL"):
            call(tmp_path, log=17)  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"^log must be a trio_wal\.nats\.Log or its URL"):
            call(tmp_path, log="/a/path")  # type: ignore[operator]


# -- replicas -----------------------------------------------------------------------------


async def test_a_replica_follows_and_shows_what_was_waited_for(
    log: MemoryLog, tmp_path: Path
) -> None:
    async with (
        trio_wal.open_database(tmp_path / "a", log=log) as db,
        trio_wal.open_replica(tmp_path / "b", log=log, checkpoint_bytes=500) as replica,
    ):
        for number in range(60):
            lsn = await db.put(b"%d" % (number % 10), b"%d" % number)
            if number % 7 == 0:
                await replica.wait_for(lsn)
                assert replica.get(b"%d" % (number % 10)) == b"%d" % number
        with replica.snapshot() as snap:
            seen = dict(snap.scan())
            await db.put(b"new", b"value")
            async with db.transaction() as tx:
                tx.delete(b"3")
                tx.put(b"4", b"four")
            await replica.wait_for(db.wal.bookmark)
            assert dict(snap.scan()) == seen
        assert state(replica) == state(db)
        assert replica.get(b"3") is None
        assert replica.get(b"3", b"default") == b"default"
        assert (replica.lag(), replica.lsn, replica.uuid) == (0, 62, db.uuid)
        assert replica.bookmark == db.wal.bookmark
        statistics = replica.statistics()
        assert (statistics.transactions, statistics.lag_seconds) == (62, 0.0)
        async with replica.changes(62) as commits:
            assert (await commits.__anext__()).lsn == 62
    async with trio_wal.open_replica(tmp_path / "b", log=log) as replica:
        assert replica.statistics().checkpoint_lsn > 0
        await replica.wait_for(62)
        assert replica.get(b"4") == b"four"


async def test_waiting_for_what_never_was_is_an_error(log: MemoryLog, tmp_path: Path) -> None:
    async with (
        trio_wal.open_database(tmp_path / "a", log=log) as db,
        trio_wal.open_replica(tmp_path / "b", log=log) as replica,
    ):
        lsn = await db.put(b"key", b"value")
        await replica.wait_for(lsn)
        with pytest.raises(trio_wal.LogDivergedError):
            await replica.wait_for(trio_wal.Bookmark(lsn, db.epoch + 1000))
        with pytest.raises(TypeError):
            await replica.wait_for("1")  # type: ignore[arg-type]
    with pytest.raises(trio.ClosedResourceError):
        replica.get(b"key")
    with pytest.raises(trio.ClosedResourceError):
        await replica.wait_for(1)


async def test_a_replica_is_promoted_while_the_leader_writes(
    log: MemoryLog, tmp_path: Path
) -> None:
    acknowledged: dict[bytes, bytes] = {}

    async def write(db: trio_wal.Database) -> None:
        with suppress(trio_wal.LogFencedError):
            for number in range(100_000):
                key = b"%d" % number
                await db.put(key, b"old")
                acknowledged[key] = b"old"

    async with (
        trio_wal.open_database(tmp_path / "a", log=log) as leader,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(write, leader)
        async with trio_wal.open_replica(tmp_path / "b", log=log) as replica:
            await replica.wait_for(50)
            async with replica.promote(max_queue_size=100) as db:
                assert db.wal.statistics().max_queue_size == 100
                await db.put(b"by", b"the new one")
                await wait_all_tasks_blocked()
                assert acknowledged.items() <= state(db).items()
                assert len(state(db)) == len(acknowledged) + 1
                with pytest.raises(trio.ClosedResourceError):
                    replica.get(b"by")
    async with trio_wal.open_database(tmp_path / "b", log=log) as db:
        assert db.get(b"by") == b"the new one"


async def test_a_replica_goes_on_through_a_takeover(log: MemoryLog, tmp_path: Path) -> None:
    async with trio_wal.open_database(tmp_path / "a", log=log) as db:
        await db.put(b"1", b"one")
    async with trio_wal.open_replica(tmp_path / "r", log=log) as replica:
        for number in range(3):
            async with trio_wal.open_database(tmp_path / f"{number}", log=log) as db:
                await replica.wait_for(await db.put(b"key", b"%d" % number))
                assert replica.get(b"key") == b"%d" % number
                await db.put(b"other", b"value")
                await replica.wait_for(db.wal.bookmark)
                assert replica.epoch == db.epoch


# -- snapshots ----------------------------------------------------------------------------


async def test_nothing_is_dropped_but_what_a_snapshot_has(
    log: MemoryLog, servers: CasServers, tmp_path: Path
) -> None:
    kept = DirectoryArchive(str(tmp_path / "kept"))
    options: dict[str, Any] = {"log": log, "segment_size": 1}
    async with trio_wal.open_database(tmp_path / "a", **options) as db:
        for number in range(20):
            await db.put(b"%d" % number, b"value")
        await db.checkpoint()
        await trio.sleep(0.05)
        assert db.wal.first_lsn == 1
        assert await db.snapshot_to(kept) == 20
        for number in range(5):
            await db.put(b"after %d" % number, b"value")
        with trio.fail_after(60):
            while db.wal.first_lsn < 20:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert db.wal.first_lsn <= 21
        expected = state(db)
    assert servers.first > 1
    # A machine that has nothing.
    with pytest.raises(trio_wal.CorruptLogError, match=r"a snapshot is needed \(snapshots=\)"):
        async with trio_wal.open_database(tmp_path / "new", **options):
            pytest.fail("opened")
    async with trio_wal.open_database(tmp_path / "new", snapshots=kept, **options) as db:
        assert state(db) == expected
        assert db.recovery.checkpoint_lsn == 20
    async with trio_wal.open_replica(tmp_path / "replica", log=log, snapshots=kept) as replica:
        await replica.wait_for(25)
        assert state(replica) == expected


async def test_snapshots_are_made_by_themselves_and_a_cache_left_behind_begins_anew(
    log: MemoryLog, tmp_path: Path
) -> None:
    kept = DirectoryArchive(str(tmp_path / "kept"))
    options: dict[str, Any] = {"log": log, "segment_size": 1, "snapshots": kept}
    async with trio_wal.open_database(tmp_path / "old", **options) as db:
        await db.put(b"first", b"value")
        await db.checkpoint()
    async with trio_wal.open_database(tmp_path / "a", snapshot_bytes=100, **options) as db:
        for number in range(20):
            await db.put(b"%d" % number, bytes(50))
        with trio.fail_after(60):
            while db.wal.first_lsn < 10:  # noqa: ASYNC110
                await trio.sleep(0.05)
        expected = state(db)
    assert any(name.endswith(".json") for name in kept.list())
    async with trio_wal.open_database(tmp_path / "old", **options) as db:
        assert state(db) == expected


@pytest.mark.parametrize("what", ["data", "digest", "uuid", "json", "gone"])
async def test_a_snapshot_that_is_not_what_it_says_is_refused(
    log: MemoryLog, tmp_path: Path, what: str
) -> None:
    kept = DirectoryArchive(str(tmp_path / "kept"))
    async with trio_wal.open_database(tmp_path / "a", log=log) as db:
        await db.put(b"key", b"value")
        await db.snapshot_to(kept)
    (manifest,) = (tmp_path / "kept").glob("*.json")
    (data,) = (tmp_path / "kept").glob("*.mdb")
    content = json.loads(manifest.read_text())
    if what == "data":
        data.write_bytes(data.read_bytes()[:-1] + b"x")
    elif what == "gone":
        data.unlink()
    elif what == "json":
        manifest.write_text("{")
    else:
        content[what] = "00000000-0000-0000-0000-000000000000"
        manifest.write_text(json.dumps(content))
    error = FileNotFoundError if what == "gone" else trio_wal.CorruptLogError
    with pytest.raises(error):
        async with trio_wal.open_database(tmp_path / "new", log=log, snapshots=kept):
            pytest.fail("opened")
    assert not (tmp_path / "new" / "store").exists()
    # Without it, all is in the log.
    async with trio_wal.open_database(tmp_path / "new", log=log) as db:
        assert state(db) == {b"key": b"value"}


async def test_a_snapshot_is_kept_once(log: MemoryLog, tmp_path: Path) -> None:
    kept = DirectoryArchive(str(tmp_path / "kept"))
    async with trio_wal.open_database(tmp_path / "a", log=log) as db:
        await db.put(b"key", b"value")
        assert await db.snapshot_to(kept) == await db.snapshot_to(kept) == 1
    assert len(kept.list()) == 2
    assert [path.name for path in (tmp_path / "a").iterdir() if "snapshot" in path.name] == []
