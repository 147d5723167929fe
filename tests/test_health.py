"""`health()`: each reason in the situation that it is for, and gone when that is over."""

from __future__ import annotations

import errno
import json
import re
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from cas import CasServers, MemoryLog, open_wal_on_cas
from databases import open_memory_database
from helpers import Call, open_memory, open_tasks
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal import Health, LogFailedError, LogFullError, _health
from trio_wal.testing import MemoryFiles

DOCS = Path(__file__).parents[1] / "docs"


def codes(health: Health) -> list[str]:
    """Of its reasons, after a check of what all have."""
    for reason in health.reasons:
        assert reason.code in _health.CODES
        assert len(reason.text.split()) > 2
        json.dumps(attrs.asdict(reason))
    worst = {reason.status for reason in health.reasons}
    expected = "failed" if "failed" in worst else "degraded" if worst else "ok"
    assert health.status == expected
    return [reason.code for reason in health.reasons]


def text_of(health: Health, code: str) -> str:
    (text,) = [reason.text for reason in health.reasons if reason.code == code]
    return text


# -- a log ------------------------------------------------------------------------------


async def test_a_log_is_well_until_it_is_closed(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        assert wal.health() == Health("ok", ())
        await wal.append(b"record")
        assert wal.health() == Health("ok", ())
    assert codes(wal.health()) == ["closed"]
    assert wal.health().status == "failed"


async def test_a_log_that_is_being_closed_says_so(files: MemoryFiles) -> None:
    async with open_tasks(files) as nursery, open_memory(files) as wal:
        files.hold()
        append = Call(nursery, wal.append, b"record")
        await wait_all_tasks_blocked()
        close = Call(nursery, wal.aclose)
        await wait_all_tasks_blocked()
        assert codes(wal.health()) == ["closing"]
        assert wal.health().status == "degraded"
        files.release()
        await wait_all_tasks_blocked()
        assert (append.state, close.state) == ("returned", "returned")


async def test_a_broken_log_says_why(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        files.fail("sync", errno.EIO)
        with pytest.raises(LogFailedError):
            await wal.append(b"record")
        health = wal.health()
        assert codes(health) == ["failed"]
        assert "Input/output error" in text_of(health, "failed")
    assert codes(wal.health()) == ["failed"]


async def test_nobody_is_told_of_a_failure_by_a_look(files: MemoryFiles) -> None:
    """Leaving the block raises where nobody has been told; who asks for health may be a machine."""

    async def send() -> None:
        async with open_memory(files, flush_interval=0) as wal:
            files.fail("sync", errno.EIO)
            await wal.send(b"record")
            await wait_all_tasks_blocked()
            assert codes(wal.health()) == ["failed"]

    with pytest.raises(LogFailedError):
        await send()


async def test_a_full_disk_is_a_reason_until_there_is_space(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    async with open_memory(files, segment_size=1) as wal:
        files.free_bytes = 0  # before anything wants the next segment to be prepared
        await wal.append(b"one")
        for _ in range(2):
            with pytest.raises(LogFullError):
                await wal.append(bytes(3000))
        assert codes(wal.health()) == ["disk_full"]
        assert wal.health().status == "degraded"
        files.heal()
        await trio.sleep(1)
        assert codes(wal.health()) == []


# -- the queue --------------------------------------------------------------------------


async def test_a_queue_that_stays_full_while_nothing_is_written_is_seen_by_who_asks_again(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files, max_queue_size=10) as wal, open_tasks(files) as nursery:
        files.hold()
        Call(nursery, wal.append, b"in flight")
        await wait_all_tasks_blocked()
        for _ in range(8):
            wal.send_nowait(b"record")
        assert codes(wal.health()) == []
        mock_clock.jump(100)
        assert codes(wal.health()) == [], "80 % is not 90 %"
        wal.send_nowait(b"record")
        assert codes(wal.health()) == []
        mock_clock.jump(4.5)
        assert codes(wal.health()) == []
        mock_clock.jump(1)
        health = wal.health()
        assert codes(health) == ["queue_full"]
        assert re.search(r"90% full.* for (5|6) seconds$", text_of(health, "queue_full"))
        files.release()
        await wait_all_tasks_blocked()
        assert codes(wal.health()) == []


@pytest.mark.parametrize("by", ["records", "bytes"])
async def test_a_queue_that_is_full_batch_after_batch_is_seen_though_nobody_asked(
    files: MemoryFiles, autojump_clock: MockClock, by: str
) -> None:
    async def slow() -> None:
        await trio.sleep(0.1)

    async def write() -> None:
        while True:
            await wal.append(b"record")

    vars(files)["gate"] = slow
    limit = {"records": {"max_queue_size": 4}, "bytes": {"max_queue_bytes": 24}}[by]
    async with open_memory(files, **limit) as wal:
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(write)
            await trio.sleep(3)
            assert codes(wal.health()) == []
            await trio.sleep(4)
            assert codes(wal.health()) == ["queue_full"]
            nursery.cancel_scope.cancel()
        assert codes(wal.health()) == []


async def test_a_pause_between_two_full_queues_ends_the_first(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files, max_queue_size=10) as wal, open_tasks(files) as nursery:
        for _ in range(3):
            files.hold()
            for _ in range(11):
                # One is in flight, ten are the whole queue.
                Call(nursery, wal.append, b"record")
                await wait_all_tasks_blocked()
            assert codes(wal.health()) == []
            mock_clock.jump(4)
            assert codes(wal.health()) == []
            files.release()
            await wait_all_tasks_blocked()
            mock_clock.jump(100)


# -- servers ----------------------------------------------------------------------------


async def test_a_replicated_log_tells_of_replicas_and_of_servers_that_settle_nothing(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = CasServers()
    now = replace(servers.description(), replicas_current=2)
    async with open_wal_on_cas(servers) as wal:
        assert codes(wal.health()) == []
        monkeypatch.setattr(servers, "description", lambda: replace(now, last=servers.last))
        await trio.sleep(30)
        health = wal.health()
        assert codes(health) == ["replicas_behind"]
        assert text_of(health, "replicas_behind") == "2 of 3 replicas are up to date"
        monkeypatch.undo()
        await trio.sleep(30)
        assert codes(wal.health()) == []
        servers.hold()
        async with trio.open_nursery() as nursery:
            Call(nursery, wal.append, b"record")
            await trio.sleep(4)
            assert codes(wal.health()) == []
            await trio.sleep(2)
            assert codes(wal.health()) == ["no_answer"]
            servers.release()
        assert codes(wal.health()) == []


# -- a database -------------------------------------------------------------------------


async def test_a_database_tells_of_its_log_and_of_its_checkpoints(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    async with open_memory_database(files, checkpoint_bytes=1000) as db:
        await db.put(b"key", b"value")
        assert db.health() == Health("ok", ())
        files.fail("store", errno.EIO, times=8)
        await db.put(b"key", bytes(1000))
        await trio.sleep(2.5)
        health = db.health()
        assert codes(health) == ["checkpoints_failing"]
        assert "Input/output error" in text_of(health, "checkpoints_failing")
        await db.put(b"key", bytes(1000))
        async with trio.open_nursery() as nursery:
            put = Call(nursery, db.put, b"key", b"waits")
            await wait_all_tasks_blocked()
            health = db.health()
            assert codes(health) == ["checkpoints_failing", "checkpoints_behind"]
            assert text_of(health, "checkpoints_behind").endswith(": 1")
            put.scope.cancel()
        await trio.sleep(20)
        assert codes(db.health()) == []
        assert codes(db.wal.health()) == []
    assert codes(db.health()) == ["closed"]


async def test_a_store_that_cannot_grow_is_a_reason_while_somebody_reads(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"key", b"value")
        room = db._versions.room
        room.stuck = LogFullError("/db/store", 17, "the store's map is full")
        assert codes(db.health()) == [], "nobody reads: the next checkpoint passes"
        with db.snapshot():
            assert codes(db.health()) == ["store_stuck"]
        room.stuck = None


async def test_a_databases_broken_log_is_its_failure(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        files.fail("sync", errno.EIO)
        with pytest.raises(LogFailedError):
            await db.put(b"key", b"value")
        assert codes(db.health()) == ["failed"]


# -- who follows ------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="files in use")
async def test_a_reader_says_whether_it_follows(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"key", b"value")
        async with trio_wal.open_database_reader("/db", files=files) as reader:
            assert reader.health() == Health("ok", ())
            reader._follower.failure = OSError(errno.EIO, "Input/output error")
            health = reader.health()
            assert codes(health) == ["not_following"]
            assert "Input/output error" in text_of(health, "not_following")
            reader._follower.failure = None
        assert codes(reader.health()) == ["closed"]


async def test_a_replica_says_how_closely_it_follows(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    servers = CasServers()
    log = MemoryLog(servers)
    async with trio_wal.open_database(tmp_path / "a", log=log) as db:
        async with trio_wal.open_replica(tmp_path / "b", log=log) as replica:
            await replica.wait_for(await db.put(b"key", b"value"))
            assert replica.health() == Health("ok", ())
            following = replica._following
            following.behind_since = trio.current_time() - 10
            assert codes(replica.health()) == ["behind"]
            following.behind_since = trio.current_time() - 1
            assert codes(replica.health()) == []
            following.behind_since = None
        assert codes(replica.health()) == ["closed"]


async def test_a_replica_says_that_no_server_answers(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog(CasServers())
    async with trio_wal.open_database(tmp_path / "a", log=log) as db:
        await db.put(b"key", b"value")
    async with trio_wal.open_replica(tmp_path / "b", log=log) as replica:
        await replica.wait_for(1)
        source: Any = replica._following.source

        async def refresh() -> None:
            await trio.lowlevel.checkpoint()
            raise TimeoutError(errno.ETIMEDOUT, "no server answers")

        with monkeypatch.context() as patch:
            patch.setattr(source, "refresh", refresh)
            await trio.sleep(20)
            health = replica.health()
            assert codes(health) == ["no_answer"]
            assert re.search(r"for (1[0-9]|20) seconds$", text_of(health, "no_answer"))
        await trio.sleep(5)
        assert codes(replica.health()) == []


# -- reasons and documentation ----------------------------------------------------------


def test_health_is_the_worst_of_its_reasons() -> None:
    assert _health.judge(()) == _health.judge((None, None)) == Health("ok", ())
    degraded, failed = _health.disk_full("full"), _health.closed("the log", "closed")
    assert _health.judge((None, degraded)).status == "degraded"
    assert _health.judge((degraded, failed)).status == "failed"
    assert _health.judge((failed, degraded)).reasons == (failed, degraded)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (_health.queue_full(4.9, 1.0), None),
        (_health.queue_full(5.0, 1.0), "queue_full"),
        (_health.replicas_behind(None, None), None),
        (_health.replicas_behind(3, 3), None),
        (_health.replicas_behind(3, 2), "replicas_behind"),
        (_health.unsettled(None), None),
        (_health.unsettled(0.0), None),
        (_health.unsettled(5.0), "no_answer"),
        (_health.archive_behind(None, None), None),
        (_health.archive_behind(3, None), None),
        (_health.archive_behind(3, None, 9.0), None),
        (_health.archive_behind(4, None, 4.9), None),
        (_health.archive_behind(4, None, 5.0), "archive_behind"),
        (_health.archive_behind(48, None), None),
        (_health.archive_behind(49, None), "archive_behind"),
        (_health.archive_behind(0, "OSError: gone"), "archive_behind"),
        (_health.behind(1, 4.9), None),
        (_health.behind(1, 5.0), "behind"),
        (_health.closed("it", "open"), None),
        (_health.closed("it", "failed"), None),
        (_health.disk_full("open"), None),
    ],
)
def test_where_reasons_begin(reason: Any, code: str | None) -> None:
    assert (reason and reason.code) == code


def test_every_code_is_used() -> None:
    text = Path(_health.__file__).read_text("utf-8")
    used = set(re.findall(r'HealthReason\(\s*"(\w+)"', text))
    assert used == set(_health.CODES)
