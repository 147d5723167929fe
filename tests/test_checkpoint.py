"""Checkpoints: state moves into the store beside the writers, and nothing is lost on the way."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import trio
from databases import (
    DB,
    TINY_SEGMENT,
    Home,
    check_content,
    commits_of,
    hold_with_batch_in_flight,
    open_memory_database,
    open_sessions,
    write,
)
from helpers import AfterEveryStep, AtStep, Call, open_tasks
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_wal import (
    Database,
    KeepAll,
    KeepBytes,
    KeepSegments,
    LogFailedError,
    LogFullError,
    LsnTruncatedError,
    _order,
)
from trio_wal._base import StoreState
from trio_wal._layer import Layer
from trio_wal._util import MiB
from trio_wal.testing import MemoryFiles


@pytest.fixture(params=["memory", "real"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    return Home(tmp_path if request.param == "real" else None)


def stored(files: MemoryFiles) -> dict[bytes, bytes]:
    """What the store in memory holds."""
    return dict(files._stores[f"{DB}/store"].items)


class StalledStore:
    """Lets a database's store stop before it writes a checkpoint, in its thread."""

    def __init__(self, db: Database) -> None:
        self.go_on = threading.Event()
        self.begun = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._apply = db._core._store.apply
        db._core._store.apply = self.apply  # type: ignore[method-assign]

    def apply(self, items: Iterable[tuple[bytes, bytes | None]], state: StoreState) -> None:
        self._token.run_sync_soon(self.begun.set)
        assert self.go_on.wait(60)
        self._apply(items, state)


# -- one checkpoint ----------------------------------------------------------------


async def test_a_checkpoint_moves_everything_into_the_store(home: Home) -> None:
    async with home.open() as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        await write(db, {b"b": None, b"c": b"2"})
        before = db.statistics()
        assert (before.store_keys, before.memtable_keys, before.checkpoint_lsn) == (0, 3, 0)
        assert await db.checkpoint() == 2
        after = db.statistics()
        assert (after.store_keys, after.memtable_keys, after.checkpoint_lsn) == (2, 0, 2)
        assert (after.memtable_bytes, after.checkpoints) == (0, 1)
        assert after.checkpoint_seconds_last > 0
        await check_content(db, {b"a": b"1", b"c": b"2"})
        await write(db, {b"a": None})
        assert await db.checkpoint() == 3
        await check_content(db, {b"c": b"2"})
    async with home.open() as db:
        assert (db.recovery.checkpoint_lsn, db.recovery.transactions_replayed) == (3, 0)
        await check_content(db, {b"c": b"2"})


async def test_a_checkpoint_of_nothing_writes_nothing(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        assert await db.checkpoint() == 0
        await db.put(b"a", b"1")
        assert await db.checkpoint() == 1
        assert await db.checkpoint() == 1
        assert db.statistics().checkpoints == 1
    assert files.operations["store"] == 1
    async with open_memory_database(files) as db:
        assert await db.checkpoint() == 1
    assert files.operations["store"] == 1


async def test_checkpoints_come_by_themselves_every_checkpoint_bytes(home: Home) -> None:
    async with home.open(checkpoint_bytes=10_000) as db:
        for number in range(100):
            await db.put(b"%d" % number, bytes(1000))
            await wait_all_tasks_blocked()
        stats = db.statistics()
        assert 8 <= stats.checkpoints <= 10
        assert stats.checkpoint_lsn >= 80
        assert stats.memtable_bytes < 30_000
        await check_content(db, {b"%d" % number: bytes(1000) for number in range(100)})


async def test_two_checkpoints_at_once_are_one_after_the_other(home: Home) -> None:
    async with home.open() as db:
        await db.put(b"a", b"1")
        async with trio.open_nursery() as nursery:
            calls = [Call(nursery, db.checkpoint) for _ in range(5)]
        assert [call.value for call in calls] == [1] * 5
        assert db.statistics().checkpoints == 1


async def test_writers_and_readers_go_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    home = Home(tmp_path)
    async with home.open() as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        store = StalledStore(db)
        async with trio.open_nursery() as nursery:
            call = Call(nursery, db.checkpoint)
            await store.begun.wait()
            with db.snapshot() as snap:
                for number in range(20):
                    await write(db, {b"a": b"%d" % number, b"n%02d" % number: b""})
                assert await db.run(lambda tx: tx.get(b"a")) == b"19"
                assert (db.get(b"a"), db.get(b"b"), snap.get(b"a")) == (b"19", b"1", b"1")
                assert db.statistics().checkpoint_lsn == 0
                assert call.state == "waiting"
                store.go_on.set()
                await wait_for(call)
                assert call.value == 1
                expected = {b"a": b"19", b"b": b"1"} | {b"n%02d" % n: b"" for n in range(20)}
                await check_content(db, expected)
                assert dict(snap.scan()) == {b"a": b"1", b"b": b"1"}
        assert await db.checkpoint() == 21
        await check_content(db, expected)


async def wait_for(call: Call) -> None:
    """Until a call that a thread serves has ended."""
    while call.state == "waiting":
        await trio.lowlevel.checkpoint()


async def test_what_a_checkpoint_writes_is_taken_down_in_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There deletions go on to be buried, while the store is written in a thread."""
    taken: list[trio.lowlevel.Task] = []
    items = Layer.items

    def items_in_a_task(layer: Layer) -> Any:
        taken.append(trio.lowlevel.current_task())
        return items(layer)

    monkeypatch.setattr(Layer, "items", items_in_a_task)
    async with Home(tmp_path).open() as db:
        await db.put(b"k", b"")
        await db.checkpoint()
        assert taken


async def test_a_checkpoint_waits_for_commits_that_are_pending(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, open_tasks(files) as nursery:
        await db.put(b"a", b"1")
        await hold_with_batch_in_flight(files, nursery, db)
        withdrawn = Call(nursery, db.put, b"never", b"")
        Call(nursery, db.put, b"b", b"1")
        await wait_all_tasks_blocked()
        checkpoint = Call(nursery, db.checkpoint)
        await wait_all_tasks_blocked()
        # Begun later: not of this checkpoint.
        Call(nursery, db.put, b"a", b"2")
        await wait_all_tasks_blocked()
        withdrawn.scope.cancel()
        await wait_all_tasks_blocked()
        assert withdrawn.state == "cancelled"
        assert checkpoint.state == "waiting"
        assert "store" not in files.operations
        files.release()
        await wait_for(checkpoint)
        assert checkpoint.value == 3
        assert stored(files) == {b"a": b"1", b"b": b"1", b"in flight": b""}
        assert db.get(b"a") == b"2"


async def test_a_checkpoint_goes_on_when_a_full_disk_took_pending_commits_back(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files, segment_size=TINY_SEGMENT) as db:
        await db.put(b"a", b"1")
        await wait_all_tasks_blocked()
        async with open_tasks(files) as nursery:
            files.hold()
            lost = Call(nursery, db.put, b"b", bytes(100_000))
            await wait_all_tasks_blocked()
            checkpoint = Call(nursery, db.checkpoint)
            await wait_all_tasks_blocked()
            files.free_bytes = 0
            files.release()
            await wait_all_tasks_blocked()
            assert isinstance(lost.error, LogFullError)
            assert (checkpoint.state, checkpoint.value) == ("returned", 1)
        assert stored(files) == {b"a": b"1"}
        files.free_bytes = math.inf


async def test_a_checkpoint_goes_on_when_a_failed_log_took_pending_commits_back(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"a", b"1")
        async with open_tasks(files) as nursery:
            files.hold()
            lost = Call(nursery, db.put, b"b", b"2")
            await wait_all_tasks_blocked()
            checkpoint = Call(nursery, db.checkpoint)
            await wait_all_tasks_blocked()
            files.fail("pwrite")
            files.release()
        assert isinstance(lost.error, LogFailedError)
        assert (checkpoint.state, checkpoint.value) == ("returned", 1)
        assert stored(files) == {b"a": b"1"}


async def test_a_checkpoint_cancelled_at_any_step_is_done_by_the_next(files: MemoryFiles) -> None:
    outcomes = set()
    for step in range(30):
        disk = files.crash_image(kind="kill")
        async with open_memory_database(disk) as db:
            await db.put(b"a", b"1")
            with trio.CancelScope() as scope, AtStep(step, scope.cancel):
                await db.checkpoint()
            outcomes.add(db.statistics().checkpoint_lsn)
            await db.put(b"b", b"2")
            await check_content(db, {b"a": b"1", b"b": b"2"})
            assert await db.checkpoint() == 2
            assert stored(disk) == {b"a": b"1", b"b": b"2"}
            await check_content(db, {b"a": b"1", b"b": b"2"})
    assert outcomes == {0, 1}


# -- a store that fails ------------------------------------------------------------


async def test_a_checkpoint_that_fails_loses_nothing_and_the_next_one_does_it_all(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        for number in range(3):
            files.fail("store", 28)
            with pytest.raises(OSError, match=r"No space left on device"):
                await db.checkpoint()
            await write(db, {b"a": b"%d" % number, b"n%d" % number: b""})
            await check_content(
                db,
                {b"a": b"%d" % number, b"b": b"1"} | {b"n%d" % n: b"" for n in range(number + 1)},
            )
            assert db.statistics().checkpoint_lsn == 0
        # Also what was committed since the first attempt.
        assert await db.checkpoint() == db.durable_lsn == 4
        assert stored(files) == dict(db.scan())
    async with open_memory_database(files) as db:
        assert db.recovery.transactions_replayed == 0


async def test_a_checkpoint_in_the_background_is_tried_until_it_passes(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, files: MemoryFiles
) -> None:
    files.fail("store", times=5)
    async with open_memory_database(files, checkpoint_bytes=1000) as db:
        await db.put(b"a", bytes(1000))
        await trio.sleep(4.5)
        assert db.statistics().checkpoint_lsn == 0
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 5
        assert caplog.messages[0].startswith("/db: checkpoint failed, will try again: OSError(5,")
        await trio.sleep(1)
        assert db.statistics().checkpoint_lsn == 1
        await check_content(db, {b"a": bytes(1000)})


# -- back-pressure -----------------------------------------------------------------


async def test_transactions_wait_to_begin_while_checkpoints_are_an_interval_behind(
    autojump_clock: MockClock, files: MemoryFiles
) -> None:
    files.fail("store", times=3)
    async with open_memory_database(files, checkpoint_bytes=10_000) as db:

        async def put(key: bytes) -> None:
            async with db.transaction() as tx:
                tx.put(key, bytes(1000))

        async with open_sessions(db, 1) as (begun,), trio.open_nursery() as nursery:
            assert await begun.get(b"a") is None
            calls = []
            for number in range(30):
                function = put if number % 2 else lambda key: db.put(key, bytes(1000))
                calls.append(Call(nursery, function, b"%02d" % number))
                await wait_all_tasks_blocked()
            # Ten into the layer that cannot be stored, ten into the one above it.
            assert [call.state for call in calls] == ["returned"] * 20 + ["waiting"] * 10
            stats = db.statistics()
            assert (stats.tasks_waiting_checkpoint, stats.memtable_keys) == (10, 20)
            assert stats.memtable_bytes < 2 * 10_000 + 20 * 300 + 2000
            # Who has begun may end, and nobody waits to read.
            await begun.put(b"b", b"")
            assert await begun.commit() == 21
            assert db.get(b"00") == bytes(1000)
            with db.snapshot() as snap:
                assert len(list(snap.scan())) == 21
            assert trio.current_time() < 0.5
        assert trio.current_time() < 4
        assert db.statistics().tasks_waiting_checkpoint == 0
        await check_content(
            db, {b"%02d" % number: bytes(1000) for number in range(30)} | {b"b": b""}
        )


async def cancelled_commits(db: Database, count: int) -> None:
    for number in range(count):
        with trio.CancelScope() as scope:
            scope.cancel()
            await db.put(b"key-%d" % (number % 10), bytes(100))
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await db.delete(b"there")
        assert scope.cancelled_caught


async def test_cancelled_commits_leave_nothing_in_a_quiet_database_and_wake_no_checkpoint(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files, checkpoint_bytes=10_000) as db:
        await db.put(b"there", b"")
        await db.checkpoint()
        await db.put(b"there", b"again")
        await wait_all_tasks_blocked()
        active = db._versions.view.active
        bytes_before = active.bytes, active.log_bytes
        await cancelled_commits(db, 500)
        await wait_all_tasks_blocked()
        assert (active.bytes, active.log_bytes) == bytes_before
        assert len(active.versions) == 1
        assert len(active.keys.fresh) <= 1 + 2 * _order.STALE_MIN
        assert (len(active._dying), len(active._replacing)) == (0, 0)
        # As big as an interval.
        with trio.CancelScope() as scope:
            scope.cancel()
            await db.put(b"big", bytes(20_000))
        await wait_all_tasks_blocked()
        stats = db.statistics()
        assert (stats.checkpoints, stats.memtable_keys) == (1, 1)
        assert db._versions.view.active is active
        await check_content(db, {b"there": b"again"})


async def test_cancelled_commits_are_no_reason_to_wait_for_a_checkpoint(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files, checkpoint_bytes=10_000) as db:
        await db.put(b"k", b"1")
        files.fail("store", times=1000)
        with pytest.raises(OSError, match="Input/output error"):
            await db.checkpoint()
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            pending = Call(nursery, db.put, b"pending", bytes(20_000))
            await wait_all_tasks_blocked()
            waiting = Call(nursery, db.put, b"waiting", b"")
            await wait_all_tasks_blocked()
            assert db.statistics().tasks_waiting_checkpoint == 1
            pending.scope.cancel()
            await wait_all_tasks_blocked()
            assert pending.state == "cancelled"
            # There is room again.
            assert db.statistics().tasks_waiting_checkpoint == 0
            files.release()
        assert waiting.state == "returned"


async def test_who_waits_for_checkpoints_that_fail_again_and_again_is_told(
    autojump_clock: MockClock, files: MemoryFiles
) -> None:
    files.fail("store", 30, times=20)
    async with open_memory_database(files, checkpoint_bytes=1000) as db:
        await db.put(b"a", bytes(1000))
        await wait_all_tasks_blocked()
        await db.put(b"b", bytes(1000))
        with pytest.raises(LogFullError, match=r"failing for 5 seconds.*Read-only") as caught:
            await db.put(b"c", b"")
        assert 4 < trio.current_time() < 7
        assert isinstance(caught.value.__cause__, OSError)
        # Once that is known nobody waits for it.
        before = trio.current_time()
        with pytest.raises(LogFullError):
            async with db.transaction() as tx:
                tx.put(b"c", b"")
        assert trio.current_time() == before
        assert db.get(b"c") is None
        with pytest.raises(OSError, match="Read-only"):
            await db.checkpoint()
        await trio.sleep(30)
        # The disk is well again.
        await db.put(b"c", b"")
        await check_content(db, {b"a": bytes(1000), b"b": bytes(1000), b"c": b""})
        assert await db.checkpoint() == 3
        # And patience begins anew.
        files.fail("store", times=2)
        await db.put(b"d", bytes(1000))
        await wait_all_tasks_blocked()
        await db.put(b"e", bytes(1000))
        await db.put(b"f", b"")
        assert db.durable_lsn == 6


async def test_a_task_that_is_cancelled_while_it_waits_to_begin_has_done_nothing(
    autojump_clock: MockClock, files: MemoryFiles
) -> None:
    files.fail("store", times=2)
    async with open_memory_database(files, checkpoint_bytes=1000) as db:
        await db.put(b"a", bytes(1000))
        await wait_all_tasks_blocked()
        await db.put(b"b", bytes(1000))
        with trio.move_on_after(0.5) as scope:
            await db.put(b"c", b"")
        assert scope.cancelled_caught
        with trio.move_on_after(0.2) as scope:
            async with db.transaction() as tx:
                tx.put(b"c", b"")
        assert scope.cancelled_caught
        assert db.statistics().tasks_waiting_checkpoint == 0
        await db.put(b"d", b"")
        assert db.durable_lsn == 3


async def test_closing_ends_the_wait_to_begin(
    autojump_clock: MockClock, files: MemoryFiles
) -> None:
    files.fail("store", times=math.inf)
    async with (
        trio.open_nursery() as nursery,
        open_memory_database(files, checkpoint_bytes=1000) as db,
    ):
        await db.put(b"a", bytes(1000))
        await wait_all_tasks_blocked()
        await db.put(b"b", bytes(1000))

        async def transaction() -> None:
            async with db.transaction() as tx:
                tx.put(b"c", b"")

        calls = [Call(nursery, db.put, b"c", b""), Call(nursery, transaction)]
        await wait_all_tasks_blocked()
        assert db.statistics().tasks_waiting_checkpoint == 2
    for call in calls:
        assert isinstance(call.error, trio.ClosedResourceError)
    files.heal()
    async with open_memory_database(files) as db:
        assert db.durable_lsn == 2


@pytest.mark.parametrize("store_fails", [False, True])
async def test_a_log_that_fails_ends_the_wait_to_begin(
    autojump_clock: MockClock, files: MemoryFiles, store_fails: bool
) -> None:
    with pytest.raises(RuntimeError, match=r"^end$"):
        await _fail_log_while_a_task_waits_to_begin(files, store_fails)


async def _fail_log_while_a_task_waits_to_begin(files: MemoryFiles, store_fails: bool) -> None:
    async with open_memory_database(files, checkpoint_bytes=1000) as db:
        await db.put(b"a", b"1")
        async with open_tasks(files) as nursery:
            files.hold()
            # The checkpoint waits for the first, which is being written.
            calls = []
            for key in (b"a", b"b", b"c"):
                calls.append(Call(nursery, db.put, key, bytes(1000)))
                await wait_all_tasks_blocked()
            assert db.statistics().tasks_waiting_checkpoint == 1
            if store_fails:
                files.fail("store", times=math.inf)
            files.fail("pwrite")
            files.release()
        assert [type(call.error) for call in calls] == [LogFailedError] * 3
        assert dict(db.scan()) == {b"a": b"1"}
        with pytest.raises(LogFailedError):
            await db.checkpoint()
        raise RuntimeError("end")


# -- the store is never ahead of the log, nor the log too short --------------------


@pytest.mark.parametrize("durability", ["none", "interval"])
async def test_the_store_is_never_ahead_of_what_the_log_has_synced(
    files: MemoryFiles, durability: str
) -> None:
    async with open_memory_database(files, durability=durability, flush_interval=1000) as db:
        for number in range(10):
            await db.put(b"%d" % number, b"")
        assert db.wal.durable_lsn == 0
        assert await db.checkpoint() == 10
        assert db.wal.durable_lsn == 10
        images = [files.crash_image(seed) for seed in range(10)]
    for image in images:
        async with open_memory_database(image) as db:
            assert (db.recovery.checkpoint_lsn, db.durable_lsn) == (10, 10)
            assert len(list(db.scan())) == 10


async def test_the_log_is_dropped_only_below_what_the_store_holds(
    autojump_clock: MockClock, files: MemoryFiles
) -> None:
    store_path = f"{DB}/store"

    def check() -> None:
        state = files.inspect_store(store_path)
        assert db.wal.first_lsn <= (0 if state is None else state.lsn) + 1

    files.fail("store", after=3, times=2)
    files.fail("store", after=8, times=3)
    async with open_memory_database(files, checkpoint_bytes=2000, segment_size=TINY_SEGMENT) as db:
        with AfterEveryStep(check) as instrument:
            for number in range(300):
                await db.put(b"%d" % (number % 20), b"%d" % number)
                if number % 50 == 0:
                    with contextlib.suppress(OSError):
                        await db.checkpoint()
        assert instrument.steps > 500
        await wait_all_tasks_blocked()
        assert db.wal.first_lsn > 200
        first = db.wal.first_lsn
        await trio.sleep(10)
        assert db.wal.first_lsn <= db.statistics().checkpoint_lsn + 1
    async with open_memory_database(files) as db:
        assert db.wal.first_lsn >= first
        await check_content(db, {b"%d" % (n % 20): b"%d" % n for n in range(280, 300)})


async def test_without_a_checkpoint_the_log_keeps_everything(files: MemoryFiles) -> None:
    for number in range(3):
        async with open_memory_database(
            files, segment_size=TINY_SEGMENT, retention=KeepSegments(1)
        ) as db:
            await wait_all_tasks_blocked()
            assert db.wal.first_lsn == 1
            assert db.recovery.transactions_replayed == 20 * number
            for _ in range(20):
                await db.put(b"k", bytes(300))
            assert db.wal.statistics().segments > 5
    async with open_memory_database(files, segment_size=TINY_SEGMENT) as db:
        assert await db.checkpoint() == 60
        await wait_all_tasks_blocked()
        assert db.wal.first_lsn > 50
    async with open_memory_database(files) as db:
        await check_content(db, {b"k": bytes(300)})


@pytest.mark.parametrize(
    ("retention", "kept_from"),
    [(None, 50), (KeepSegments(1), 50), (KeepAll(), 1), (KeepBytes(10 * MiB), 1)],
)
async def test_retention_keeps_more_of_the_log_for_changes(
    files: MemoryFiles, retention: Any, kept_from: int
) -> None:
    async with open_memory_database(files, segment_size=TINY_SEGMENT, retention=retention) as db:
        for number in range(60):
            await db.put(b"%d" % number, bytes(300))
        await db.checkpoint()
        await wait_all_tasks_blocked()
        first = db.wal.first_lsn
        if kept_from == 1:
            assert first == 1
            assert [commit.lsn for commit in await commits_of(db, 1)] == list(range(1, 61))
        else:
            assert first > kept_from
            with pytest.raises(
                LsnTruncatedError,
                match=rf"^LSN 1 has been truncated: the log now starts at LSN {first};",
            ) as caught:
                await commits_of(db, 1)
            assert (caught.value.first_lsn, caught.value.lsn) == (first, 1)
        # None: from the oldest that there is.
        assert [commit.lsn for commit in await commits_of(db)] == list(range(first, 61))


async def test_a_feed_that_retention_overtakes_is_told_and_skips_nothing(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files, segment_size=TINY_SEGMENT) as db:
        for number in range(10):
            await db.put(b"%d" % number, bytes(300))
        seen: list[int] = []

        async def follow() -> None:
            async with db.changes() as commits:
                async for commit in commits:
                    seen.append(commit.lsn)
                    if commit.lsn == 5:
                        for number in range(10, 60):
                            await db.put(b"%d" % number, bytes(300))
                        await db.checkpoint()
                        await wait_all_tasks_blocked()

        with pytest.raises(LsnTruncatedError) as caught:
            await follow()
        assert caught.value.first_lsn == db.wal.first_lsn > 50
        assert 5 <= len(seen) < 50
        assert seen == list(range(1, len(seen) + 1))


# -- the map -----------------------------------------------------------------------


async def test_the_map_grows_when_it_is_full_and_snapshots_see_their_moment(
    tmp_path: Path,
) -> None:
    async with Home(tmp_path).open(map_size=1 * MiB) as db:  # 16 MiB are the least
        await write(db, {b"old": b"1"})
        await db.checkpoint()
        async with trio.open_nursery() as nursery:
            with db.snapshot() as snap, db.snapshot() as other:
                for number in range(30):
                    await db.put(b"%02d" % number, bytes(1 * MiB))
                await write(db, {b"old": b"2"})
                call = Call(nursery, db.checkpoint)
                await wait_for_full_map(db)
                assert call.state == "waiting"
                # Meanwhile everything goes on.
                await db.put(b"new", b"1")
                assert db.get(b"old") == b"2"
                assert list(snap.scan()) == list(other.scan()) == [(b"old", b"1")]
            await wait_for(call)
            assert call.value == 32
        expected = {b"%02d" % number: bytes(1 * MiB) for number in range(30)}
        assert dict(db.scan()) == expected | {b"old": b"2", b"new": b"1"}
        assert await db.checkpoint() == 33
        assert db.statistics().store_bytes > 30 * MiB
    async with Home(tmp_path).open(map_size=1 * MiB) as db:
        assert db.statistics().store_keys == 32


async def wait_for_full_map(db: Database) -> None:
    """Until a checkpoint waits for those who read."""
    while not db._versions.readers.waited_for:
        await trio.lowlevel.checkpoint()


async def test_closing_does_not_wait_for_a_snapshot_that_a_growing_map_waits_for(
    tmp_path: Path,
) -> None:
    async with trio.open_nursery() as nursery, Home(tmp_path).open(map_size=1 * MiB) as db:
        snap = db.snapshot().__enter__()
        async with db.transaction() as tx:
            for number in range(15):
                tx.put(b"%02d" % number, bytes(1 * MiB))
        for number in range(15, 20):
            await db.put(b"%02d" % number, bytes(1 * MiB))
        call = Call(nursery, db.checkpoint)
        await wait_for_full_map(db)
    assert call.value == 6
    with pytest.raises(trio.ClosedResourceError):
        snap.get(b"00")
    async with Home(tmp_path).open() as db:
        assert (db.recovery.transactions_replayed, db.statistics().store_keys) == (0, 20)


async def test_the_map_grows_early_while_nobody_reads(tmp_path: Path) -> None:
    async with Home(tmp_path).open(map_size=1 * MiB) as db:  # 16 MiB are the least
        for number in range(10):
            await db.put(b"%02d" % number, bytes(1 * MiB))
        assert await db.checkpoint() == 10
        with db.snapshot() as snap:
            for number in range(10, 20):
                await db.put(b"%02d" % number, bytes(1 * MiB))
            assert await db.checkpoint() == 20, "it waited for the snapshot"
            assert len(list(snap.scan())) == 10


async def test_who_keeps_a_full_map_from_growing_is_told_and_it_works_again_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_wal._checkpoint.READERS_PATIENCE_SECONDS", 0)
    home = Home(tmp_path)
    count = itertools.count()

    async def put(db: Database) -> None:
        await db.put(b"%03d" % next(count), bytes(1 * MiB))

    message = r"store: no space for \d+ bytes: the store's map is full and cannot grow while"
    async with home.open(map_size=1 * MiB, checkpoint_bytes=4 * MiB) as db:
        with db.snapshot() as snap:
            # A task that holds the snapshot itself would otherwise wait for ever.
            with pytest.raises(LogFullError, match=message):
                await repeat(put, db)
            acknowledged = db.durable_lsn
            with pytest.raises(LogFullError, match=message):
                await db.transaction().__aenter__()
            with pytest.raises(LogFullError, match=message):
                await db.checkpoint()
            assert list(snap.scan()) == []
            assert len(list(db.scan())) == acknowledged
        assert 10 < acknowledged < 40, "as much as the map and the memtable hold"
        for _ in range(30):
            await put(db)
        assert await db.checkpoint() == acknowledged + 30
        with db.snapshot():
            # The map has room: nobody who reads is waited for any more.
            await db.put(b"last", b"")
            assert await db.checkpoint() == acknowledged + 31
    async with home.open() as db:
        assert db.statistics().store_keys == acknowledged + 31


async def repeat(call: Callable[[Database], Awaitable[None]], db: Database) -> None:
    for _ in range(100):
        await call(db)


# -- snapshots ---------------------------------------------------------------------


async def test_snapshots_survive_checkpoints_and_overwriting(home: Home) -> None:
    async with home.open() as db:
        snapshots = []
        for number in range(6):
            await write(db, {b"k": b"%d" % number, b"k%d" % number: b""})
            if number % 2:
                await write(db, {b"k%d" % (number - 1): None})
            snapshots.append((db.snapshot().__enter__(), db.durable_lsn, dict(db.scan())))
            if number % 3 == 2:
                await db.checkpoint()
        await write(db, dict.fromkeys(dict(db.scan()), None))
        await db.checkpoint()
        assert list(db.scan()) == []
        assert db.statistics().open_readers == 6
        for snap, lsn, state in snapshots:
            assert (snap.lsn, dict(snap.scan())) == (lsn, state)
            assert dict(snap.scan(reverse=True)) == state
            assert [snap.get(b"k%d" % n) for n in range(6)] == [
                state.get(b"k%d" % n) for n in range(6)
            ]
        for snap, _, _ in reversed(snapshots):
            snap.close()
        assert db.statistics().open_readers == 0


async def test_a_closed_snapshot_is_closed(home: Home) -> None:
    async with home.open() as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        with db.snapshot() as snap:
            items = snap.scan()
            assert next(items) == (b"a", b"1")
        snap.close()
        assert snap.lsn == 1
        for use in (lambda: snap.get(b"a"), snap.scan, lambda: next(items)):
            with pytest.raises(trio.ClosedResourceError, match=r"^this snapshot is closed$"):
                use()
        assert db.statistics().open_readers == 0


# -- opening -----------------------------------------------------------------------


async def test_opening_replays_only_what_the_store_does_not_hold(home: Home) -> None:
    expected = {}
    async with home.open() as db:
        for number in range(30):
            expected[b"%02d" % (number % 7)] = b"%d" % number
            await write(db, {b"%02d" % (number % 7): b"%d" % number})
            if number == 19:
                await db.checkpoint()
    async with home.open() as db:
        report = db.recovery
        assert (report.checkpoint_lsn, report.transactions_replayed) == (20, 10)
        assert (report.last_lsn, report.clean_shutdown) == (30, True)
        assert db.statistics().checkpoint_lsn == 20
        await check_content(db, expected)
        assert await db.checkpoint() == 30
    async with home.open() as db:
        assert (db.recovery.checkpoint_lsn, db.recovery.transactions_replayed) == (30, 0)
        await check_content(db, expected)


async def test_replaying_a_long_tail_checkpoints_on_the_way(home: Home) -> None:
    expected = {}
    async with home.open() as db:
        for number in range(100):
            expected[b"%02d" % (number % 30)] = bytes(1000)
            await write(db, {b"%02d" % (number % 30): bytes(1000)})
    async with home.open(checkpoint_bytes=10_000) as db:
        assert (db.recovery.checkpoint_lsn, db.recovery.transactions_replayed) == (0, 100)
        stats = db.statistics()
        assert stats.checkpoints >= 9
        assert stats.checkpoint_lsn >= 90
        await check_content(db, expected)
    async with home.open() as db:
        assert db.recovery.transactions_replayed <= 10
        await check_content(db, expected)


async def test_an_open_whose_store_fails_is_refused_and_leaves_no_lock(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        for _ in range(5):
            await db.put(b"a", bytes(1000))
    files.fail("store")
    with pytest.raises(OSError, match=r"Input/output error"):
        async with open_memory_database(files, checkpoint_bytes=1000):
            pytest.fail("opened")
    async with open_memory_database(files, checkpoint_bytes=1000) as db:
        assert db.recovery.transactions_replayed == 5


async def test_after_the_log_has_failed_checkpoints_and_backups_are_refused(
    files: MemoryFiles,
) -> None:
    with contextlib.suppress(LogFailedError):
        async with open_memory_database(files) as db:
            await db.put(b"a", b"1")
            files.fail("sync")
            with pytest.raises(LogFailedError):
                await db.put(b"b", b"1")
            for call in (db.checkpoint, lambda: db.backup("/copy")):
                with pytest.raises(LogFailedError) as caught:
                    await call()
                assert caught.value.outcome == "unknown"
                assert isinstance(caught.value.__cause__, OSError)
            assert not files.exists("/copy")
            assert db.get(b"a") == b"1"
