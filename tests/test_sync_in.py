"""``sync_in="loop"``: writes and syncs in the event loop, while that is quick."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import Call, read_all, until
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal import _worker
from trio_wal._disk.directory import LogDirectory
from trio_wal._statistics import LoopWrites
from trio_wal._worker import LOOP_BYTES_MAX, LoopWriter, ThreadWorker


class Seen:
    """In which thread batches are written."""

    def __init__(self) -> None:
        self.loop = threading.get_ident()
        self.threads: list[int] = []
        self.error: OSError | None = None
        self.before: Callable[[], None] = lambda: None

    def take(self) -> list[bool]:
        """For each write since the last call: whether it was in the event loop."""
        found = [one == self.loop for one in self.threads]
        self.threads.clear()
        return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen = Seen()
    write = LogDirectory.write

    def noted(self: LogDirectory, *arguments: Any, **options: Any) -> bool:
        seen.threads.append(threading.get_ident())
        seen.before()
        if seen.error is not None:
            raise seen.error
        return write(self, *arguments, **options)

    monkeypatch.setattr(LogDirectory, "write", noted)
    return seen


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk is too slow."""
    monkeypatch.setattr(_worker, "LOOP_SECONDS_MAX", 1e9)


async def settle(wal: trio_wal.WriteAheadLog) -> None:
    """Until the thread has nothing to do, and no segment is being prepared."""
    engine = wal._log.engine
    assert isinstance(engine, trio_wal._local.LocalEngine)
    loop = engine._loop
    assert loop is not None
    await until(lambda: loop.may(0))


async def test_by_default_the_thread_writes(tmp_path: Path, seen: Seen) -> None:
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        await wal.append(b"x")
        assert wal.statistics().loop_writes == 0
    assert seen.take() == [False]


@pytest.mark.usefixtures("patient")
async def test_the_event_loop_writes(tmp_path: Path, seen: Seen) -> None:
    async with trio_wal.open_wal(tmp_path / "log", sync_in="loop") as wal:
        await settle(wal)
        for number in range(5):
            assert await wal.append(b"%d" % number) == number + 1
            assert wal.durable_lsn == number + 1
        assert seen.take() == [True] * 5
        found = wal.statistics()
        assert found.loop_writes == 5
        assert 0 < found.loop_seconds_max <= found.loop_seconds_total
        assert found.loop_slow == 0
        assert found.batches_synced == 5
        assert await read_all(wal) == {lsn: b"%d" % (lsn - 1) for lsn in range(1, 6)}
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        assert wal.recovery.clean_shutdown
        assert wal.last_lsn == 5


@pytest.mark.usefixtures("patient")
async def test_many_tasks_share_a_sync(tmp_path: Path, seen: Seen) -> None:
    async with trio_wal.open_wal(tmp_path / "log", sync_in="loop") as wal:
        await settle(wal)

        async def write() -> None:
            for _ in range(10):
                await wal.append(b"x")

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(write)
        assert wal.durable_lsn == 500
    assert len(seen.threads) < 50


@pytest.mark.usefixtures("patient")
async def test_other_processes_are_told_of_it(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path / "log", sync_in="loop") as wal:
        await settle(wal)
        async with trio_wal.open_reader(tmp_path / "log") as reader:
            for lsn in range(1, 20):
                await wal.append(b"x")
                async with reader.read() as records:
                    assert [record.lsn async for record in records] == list(range(1, lsn + 1))


@pytest.mark.usefixtures("patient")
async def test_large_batches_and_new_segments_are_the_threads(tmp_path: Path, seen: Seen) -> None:
    async with trio_wal.open_wal(tmp_path / "log", sync_in="loop") as wal:
        await settle(wal)
        await wal.append(bytes(LOOP_BYTES_MAX))
        await settle(wal)
        await wal.append(bytes(LOOP_BYTES_MAX + 1))
        assert seen.take() == [True, False]
        for _ in range(10):
            await settle(wal)
            segments = wal.statistics().segments
            await wal.append(bytes(200_000))
            if wal.statistics().segments > segments:
                assert seen.take()[-1] is False
                return
    raise AssertionError("no new segment")


async def test_after_a_slow_one_the_thread_writes_for_a_second(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(_worker, "perf_counter", lambda: now)
    async with trio_wal.open_wal(tmp_path / "log", sync_in="loop") as wal:
        await settle(wal)

        def slow() -> None:
            nonlocal now
            now += 0.006

        seen.before = slow
        await wal.append(b"a")
        seen.before = lambda: None
        assert wal.statistics().loop_slow == 1
        await wal.append(b"b")
        now += 0.98
        await wal.append(b"c")
        now += 0.03
        await settle(wal)
        await wal.append(b"d")
        assert seen.take() == [True, False, False, True]


@pytest.mark.usefixtures("patient")
async def test_while_others_write_the_thread_writes(tmp_path: Path, seen: Seen) -> None:
    async with trio_wal.open_wal(tmp_path / "log", sync_in="loop") as wal:
        await settle(wal)
        with wal._log.engine.busy():
            await wal.append(b"a")
        await settle(wal)
        await wal.append(b"b")
        assert seen.take() == [False, True]


@pytest.mark.usefixtures("patient")
async def test_a_checkpoint_sends_commits_to_the_thread(tmp_path: Path, seen: Seen) -> None:
    async with trio_wal.open_database(tmp_path / "db", sync_in="loop") as db:
        await settle(db.wal)
        await db.put(b"a", b"1")
        seen.take()
        core = db._core
        apply, begun, go_on = core.checkpointer._apply, threading.Event(), threading.Event()

        def held(*arguments: Any) -> None:
            begun.set()
            assert go_on.wait(60)
            apply(*arguments)

        core.checkpointer._apply = held  # type: ignore[assignment,method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(db.checkpoint)
            await trio.to_thread.run_sync(begun.wait, 60)
            await db.put(b"b", b"2")
            go_on.set()
        assert seen.take() == [False]
        # What the store has now is dropped from the log, which is busy, too.
        with trio.fail_after(60):
            while seen.take() != [True]:
                await settle(db.wal)
                await db.put(b"c", b"3")


@pytest.mark.usefixtures("patient")
async def test_a_write_that_fails_in_the_event_loop_breaks_the_log(
    tmp_path: Path, seen: Seen
) -> None:
    async with trio_wal.open_wal(tmp_path / "log", sync_in="loop") as wal:
        await settle(wal)
        await wal.append(b"good")
        seen.error = OSError(errno.EIO, os.strerror(errno.EIO), "the disk")
        with pytest.raises(trio_wal.LogFailedError) as caught:
            await wal.append(b"bad")
    assert seen.take() == [True, True]
    assert caught.value.outcome == "unknown"
    assert isinstance(caught.value.__cause__, OSError)
    seen.error = None
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        assert await read_all(wal) == {1: b"good"}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("durability", ["interval", "none"])
async def test_other_kinds_of_durability(tmp_path: Path, seen: Seen, durability: Any) -> None:
    options: dict[str, Any] = {"durability": durability, "flush_interval": 0.01}
    async with trio_wal.open_wal(tmp_path / "log", sync_in="loop", **options) as wal:
        await settle(wal)
        await wal.append(b"x")
        assert await wal.flush() == 1
        assert wal.durable_lsn == 1
        if durability == "interval":
            await wal.append(b"y")
            with trio.fail_after(60):
                await wal.wait_durable(2)
    assert set(seen.take()) == {True}


async def test_a_log_in_memory_takes_it(seen: Seen) -> None:
    files = trio_wal.testing.MemoryFiles()
    async with trio_wal.open_wal("/log", sync_in="loop", files=files) as wal:
        assert await wal.append(b"x") == 1
        assert wal.statistics().loop_writes == 0


async def test_who_may_not() -> None:
    worker = ThreadWorker(lambda: None)
    try:
        loop = LoopWriter(worker, lambda: None)
        assert loop.may(LOOP_BYTES_MAX)
        assert not loop.may(LOOP_BYTES_MAX + 1)
        worker._given += 1
        assert not loop.may(1)
        worker._ended += 1
        assert loop.may(1)
        worker.disowned = True
        assert not loop.may(1)
        worker.disowned = False
        with loop.busy():
            with loop.busy():
                pass
            assert not loop.may(1)
        assert loop.may(1)
    finally:
        worker.close()


async def test_a_job_that_was_given_before_the_last_one_had_quite_ended_is_one_too() -> None:
    """What the thread says to other processes after an answer must not come after the loop's."""
    turns = [threading.Event(), threading.Event()]
    ended: list[int] = []

    def afterwards() -> None:
        assert turns[len(ended)].wait(60)
        ended.append(1)

    worker = ThreadWorker(afterwards)
    loop = LoopWriter(worker, lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        try:
            await worker.call(lambda: None)
            # The thread is still at what follows the first when it is given the second.
            second = Call(nursery, worker.call, lambda: None)
            await wait_all_tasks_blocked()
            turns[0].set()
            await until(lambda: second.state == "returned")
            assert len(ended) == 1
            assert not worker.idle
            assert not loop.may(1)
            turns[1].set()
            await until(lambda: loop.may(1))
            assert len(ended) == 2
        finally:
            for turn in turns:
                turn.set()
            worker.stop()


def test_what_is_counted() -> None:
    found = LoopWrites()
    found.note(0.5, slow=True)
    found.note(0.25, slow=False)
    assert (found.count, found.seconds_total, found.seconds_max, found.slow) == (2, 0.75, 0.5, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.usefixtures("patient")
async def test_a_forked_child_writes_nothing(tmp_path: Path, seen: Seen) -> None:
    async with trio_wal.open_wal(tmp_path / "log", sync_in="loop") as wal:
        await settle(wal)
        await wal.append(b"a")
        engine = wal._log.engine
        assert isinstance(engine, trio_wal._local.LocalEngine)
        assert engine._loop is not None
        pid = os.fork()
        if pid == 0:
            os._exit(0 if not engine._loop.may(1) else 1)
        _, status = await trio.to_thread.run_sync(os.waitpid, pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        await settle(wal)
        assert await wal.append(b"b") == 2
