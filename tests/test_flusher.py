"""Group commit: when records are written, synced and acknowledged, and by how many syncs."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import Call, open_memory, open_tasks, read_all
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal._worker import ThreadWorker
from trio_wal.testing import MemoryFiles


def syncs(files: MemoryFiles) -> int:
    return files.operations.get("sync", 0)


class SyncWatch:
    """Writes down what was durable at every sync and every acknowledgement."""

    def __init__(self, files: MemoryFiles) -> None:
        self.events: list[str] = []
        files.after_operation = self._note

    def _note(self, operation: str, path: str) -> None:
        if operation in ("pwrite", "sync"):
            self.events.append(operation)

    async def append(self, wal: trio_wal.WriteAheadLog, data: bytes) -> None:
        await wal.append(data)
        self.events.append(f"ack {data.decode()}")


# -- one write, one sync, then the acknowledgement --------------------------------


async def test_an_append_returns_only_when_its_sync_has_returned(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        watch = SyncWatch(files)
        await watch.append(wal, b"1")
        await watch.append(wal, b"2")
        files.after_operation = None
    assert watch.events == ["pwrite", "sync", "ack 1", "pwrite", "sync", "ack 2"]


async def test_nothing_is_written_while_a_batch_is_in_flight(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        watch = SyncWatch(files)
        async with open_tasks(files) as nursery:
            files.hold()
            nursery.start_soon(watch.append, wal, b"1")
            await wait_all_tasks_blocked()
            nursery.start_soon(watch.append, wal, b"2")
            await wait_all_tasks_blocked()
            nursery.start_soon(watch.append, wal, b"3")
            await wait_all_tasks_blocked()
            assert watch.events == []
            assert wal.last_lsn == 0
            files.release()
        files.after_operation = None
    assert watch.events[:4] == ["pwrite", "sync", "ack 1", "pwrite"]
    assert sorted(watch.events[4:]) == ["ack 2", "ack 3", "sync"]


async def test_a_record_is_durable_before_its_writer_runs(files: MemoryFiles) -> None:
    """Power fails at the very moment of each acknowledgement."""
    async with open_memory(files) as wal:
        for number in range(1, 20):
            lsn = await wal.append(b"%d" % number)
            assert lsn == wal.durable_lsn == number
            for seed in range(3):
                async with open_memory(files.crash_image(seed)) as after:
                    assert await read_all(after) == {n: b"%d" % n for n in range(1, number + 1)}


async def test_n_busy_writers_share_one_sync(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not two halves that take turns: the woken run before the next batch is taken."""
    # trio reverses the order of those that may run at random.  Always reversed, the flusher
    # runs behind the woken, and two halves would never meet by chance.
    scheduler = trio._core._run
    monkeypatch.setattr(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", False)
    monkeypatch.setattr(scheduler._r, "random", lambda: 0.0)
    rounds = 20

    async def write(wal: trio_wal.WriteAheadLog) -> None:
        for _ in range(rounds):
            await wal.append(b"record")

    async with open_memory(files) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            for _ in range(2):
                for _ in range(32):
                    nursery.start_soon(write, wal)
                await wait_all_tasks_blocked()
            # Two halves: one in flight, one waiting.
            assert wal.statistics().records_waiting == 32
            files.release()
        statistics = wal.statistics()
        assert statistics.records_appended == 64 * rounds
        assert statistics.batches_synced <= rounds + 2


async def test_many_writers_of_units_and_records_get_the_lsns_of_their_own(
    files: MemoryFiles,
) -> None:
    async def write(wal: trio_wal.WriteAheadLog, number: int) -> None:
        if number % 3:
            lsns = range(1)
            lsn = await wal.append(b"%d" % number)
            given[lsn] = b"%d" % number
        else:
            lsns = await wal.append_many([b"%d" % number, b"", b"end"])
            assert len(lsns) == 3
            given.update(zip(lsns, [b"%d" % number, b"", b"end"], strict=True))

    given: dict[int, bytes] = {}
    async with open_memory(files) as wal:
        async with trio.open_nursery() as nursery:
            for number in range(90):
                nursery.start_soon(write, wal, number)
        assert await read_all(wal) == given
        assert len(given) == 60 + 30 * 3


# -- flush_interval ---------------------------------------------------------------


async def test_a_sent_record_is_synced_when_flush_interval_has_passed(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    async with open_memory(files, flush_interval=0.5) as wal:
        before = syncs(files)
        await wal.send(b"one")
        await trio.sleep(0.3)
        await wal.send(b"two")
        await trio.sleep(0.1)
        assert wal.durable_lsn == 0
        assert syncs(files) == before
        # The first one decides, not the last.
        await trio.sleep(0.101)
        assert wal.durable_lsn == 2
        assert syncs(files) == before + 1


async def test_with_flush_interval_0_a_sent_record_is_written_at_once(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files, flush_interval=0) as wal:
        await wal.send(b"one")
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 1


@pytest.mark.parametrize("order", ["sent first", "sent after the batch was opened"])
async def test_a_record_that_somebody_waits_for_is_written_at_once(
    files: MemoryFiles, autojump_clock: MockClock, order: str
) -> None:
    start = trio.current_time()
    async with open_memory(files, flush_interval=1000) as wal:
        await wal.send(b"sent")
        if order != "sent first":
            await wait_all_tasks_blocked()
        assert await wal.append(b"waited for") == 2
        await wal.send(b"sent")
        await wait_all_tasks_blocked()
        assert await wal.append_many([b"waited for", b"too"]) == range(4, 6)
        assert wal.durable_lsn == 5
        await wal.send(b"sent")
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 5
        await wal.wait_durable(6)
        assert wal.durable_lsn == 6
        wal.send_nowait(b"sent")
        await wal.wait_durable(7)
        assert wal.durable_lsn == 7
    assert trio.current_time() == start


@pytest.mark.parametrize("when", ["before the first", "between", "in flight"])
async def test_a_record_that_somebody_waits_for_already_is_written_as_soon_as_it_is_sent(
    files: MemoryFiles, autojump_clock: MockClock, when: str
) -> None:
    async with open_memory(files, flush_interval=1000) as wal, open_tasks(files) as nursery:
        before = syncs(files)
        calls = []
        if when == "in flight":
            files.hold()
            Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
        else:
            await wal.append(b"first")
        if when == "before the first":
            calls = [Call(nursery, wal.wait_durable, lsn) for lsn in (5, 3, 99)]
            await wait_all_tasks_blocked()
        await wal.send(b"second")
        await wait_all_tasks_blocked()
        if when != "before the first":
            calls = [Call(nursery, wal.wait_durable, lsn) for lsn in (5, 3, 99)]
        files.release()
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 1, "nobody waits for the second record alone"
        assert syncs(files) == before + 1
        await wal.send(b"third")
        await wait_all_tasks_blocked()
        assert (wal.durable_lsn, calls[1].state) == (3, "returned")
        await wal.send(b"fourth")
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 3
        await wal.send(b"fifth")
        await wait_all_tasks_blocked()
        assert (wal.durable_lsn, calls[0].state) == (5, "returned")
        assert syncs(files) == before + 3
        calls[2].scope.cancel()
        await wal.send(b"sixth")
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 5


@pytest.mark.parametrize("when", ["before it", "while it is written", "after it"])
async def test_a_wait_shortens_the_interval_of_durability_interval_too(
    files: MemoryFiles, autojump_clock: MockClock, when: str
) -> None:
    start = trio.current_time()
    options: dict[str, Any] = {"durability": "interval", "flush_interval": 1000}
    async with open_memory(files, **options) as wal, open_tasks(files) as nursery:
        if when == "before it":
            waiting = Call(nursery, wal.wait_durable, 1)
            await wait_all_tasks_blocked()
        if when == "while it is written":
            files.hold()
        Call(nursery, wal.append, b"one")
        await wait_all_tasks_blocked()
        if when != "before it":
            assert wal.durable_lsn == 0
            waiting = Call(nursery, wal.wait_durable, 1)
            await wait_all_tasks_blocked()
        files.release()
        await wait_all_tasks_blocked()
        assert (wal.durable_lsn, waiting.state) == (1, "returned")
        before = syncs(files)
        await wal.append(b"two")
        await wait_all_tasks_blocked()
        assert (wal.durable_lsn, syncs(files)) == (1, before), "nobody waits for that"
        assert trio.current_time() == start
        await trio.sleep(1001)
        assert (wal.durable_lsn, syncs(files)) == (2, before + 1)


async def test_an_interval_begins_when_the_record_is_accepted(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    """Not when the batch before it is done."""
    async with open_memory(files, flush_interval=0.5) as wal, open_tasks(files) as nursery:
        files.hold()
        Call(nursery, wal.append, b"flying")
        await wait_all_tasks_blocked()
        wal.send_nowait(b"sent")
        await trio.sleep(0.4)
        wal.send_nowait(b"sent later")
        files.release()
        await trio.sleep(0.09)
        assert wal.durable_lsn == 1
        await trio.sleep(0.02)
        assert wal.durable_lsn == 3


async def test_sent_records_are_written_when_a_batch_is_full(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files, flush_interval=1000, max_batch_bytes=100) as wal:
        await wal.send(bytes(60))
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 0
        await wal.send(bytes(60))
        await wait_all_tasks_blocked()
        # The first batch cannot grow any more; the second one still may.
        assert wal.durable_lsn == 1
        await wal.flush()
        await wal.send(bytes(100))
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 3


async def test_a_writer_that_finds_no_room_does_not_wait_for_flush_interval(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    start = trio.current_time()
    async with open_memory(files, flush_interval=1000, max_queue_bytes=100) as wal:
        await wal.send(bytes(60))
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 0
        await wal.send(bytes(60))
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 1
    assert trio.current_time() == start


async def test_closing_does_not_wait_for_flush_interval(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    start = trio.current_time()
    async with open_memory(files, flush_interval=1000) as wal:
        await wal.send(b"sent")
        await wait_all_tasks_blocked()
    assert trio.current_time() == start
    async with open_memory(files) as wal:
        assert await read_all(wal) == {1: b"sent"}


async def test_closing_while_a_batch_is_in_flight_does_not_wait_for_flush_interval(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    start = trio.current_time()
    async with open_memory(files, flush_interval=1000) as wal, open_tasks(files) as nursery:
        files.hold()
        Call(nursery, wal.append, b"flying")
        await wait_all_tasks_blocked()
        wal.send_nowait(b"sent")
        Call(nursery, wal.aclose)
        await wait_all_tasks_blocked()
        files.release()
    assert trio.current_time() == start
    async with open_memory(files) as wal:
        assert wal.last_lsn == 2


# -- flush ------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["sync", "interval", "none"])
async def test_flush_makes_everything_accepted_durable_and_returns_durable_lsn(
    files: MemoryFiles, mock_clock: MockClock, durability: str
) -> None:
    async with open_memory(files, durability=durability, flush_interval=1000) as wal:
        assert await wal.flush() == 0
        wal.send_nowait(b"one")
        assert await wal.flush() == 1
        await wal.send(b"two")
        wal.send_nowait(b"three")
        assert await wal.flush() == 3
        assert wal.durable_lsn == 3
        async with open_memory(files.crash_image(seed=1)) as after:
            assert list((await read_all(after)).values()) == [b"one", b"two", b"three"]


async def test_flush_with_nothing_to_do_syncs_nothing(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        await wal.append(b"one")
        before = syncs(files)
        assert [await wal.flush() for _ in range(10)] == [1] * 10
        assert syncs(files) == before


async def test_flush_waits_for_the_batch_in_flight(files: MemoryFiles) -> None:
    async with open_memory(files, flush_interval=0) as wal, open_tasks(files) as nursery:
        files.hold()
        await wal.send(b"flying")
        await wait_all_tasks_blocked()
        assert wal.statistics().records_waiting == 0
        call = Call(nursery, wal.flush)
        await wait_all_tasks_blocked()
        assert call.state == "waiting"
        files.release()
        await wait_all_tasks_blocked()
        assert call.value == 1


@pytest.mark.parametrize("place", ["in the batch in flight", "behind it"])
async def test_a_flush_can_be_cancelled_while_the_disk_stalls(
    files: MemoryFiles, place: str
) -> None:
    """Its records become durable all the same."""
    async with open_memory(files) as wal, open_tasks(files) as nursery:
        files.hold()
        if place == "behind it":
            Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
        await wal.send(b"sent")
        others = [Call(nursery, wal.append, b"waited for"), Call(nursery, wal.flush)]
        flush = Call(nursery, wal.flush)
        await wait_all_tasks_blocked()
        assert flush.state == "waiting"
        flush.scope.cancel()
        await wait_all_tasks_blocked()
        assert flush.state == "cancelled"
        assert [call.state for call in others] == ["waiting", "waiting"]
        assert wal.durable_lsn == 0
        files.release()
        await wait_all_tasks_blocked()
        assert [call.state for call in others] == ["returned", "returned"]
        assert await wal.flush() == wal.last_lsn
        assert set((await read_all(wal)).values()) >= {b"sent", b"waited for"}


# -- wait_durable -----------------------------------------------------------------


async def test_wait_durable_wakes_each_waiter_at_its_own_lsn(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, trio.open_nursery() as nursery:
        calls = {lsn: Call(nursery, wal.wait_durable, lsn) for lsn in (3, 1, 5, 2, 5, 0)}
        await wait_all_tasks_blocked()
        assert calls[0].state == "returned"
        assert wal.statistics().tasks_waiting_durable == 5
        for lsn in (1, 2, 3):
            await wal.append(b"record")
            await wait_all_tasks_blocked()
            woken = {n for n, call in calls.items() if call.state == "returned"}
            assert woken == set(range(lsn + 1))
        await wal.append_many([b"four", b"five", b"six"])
        await wait_all_tasks_blocked()
        assert calls[5].state == "returned"
        assert wal.statistics().tasks_waiting_durable == 0


@pytest.mark.parametrize("attempt", range(8))
async def test_who_waited_for_a_record_that_was_cut_at_once_is_not_told_of_a_close(
    files: MemoryFiles, attempt: int
) -> None:
    """It was durable.  Which task runs first, the one that waited or the flusher, is chance."""
    async with open_memory(files, durability="none") as wal, open_tasks(files) as nursery:
        files.hold()
        waiting = Call(nursery, wal.wait_durable, 2)
        appended = Call(nursery, wal.append_many, [b"1", b"2"])
        await wait_all_tasks_blocked()
        cut = Call(nursery, wal.truncate_after, 1)
        await wait_all_tasks_blocked()
        files.release()
        await wait_all_tasks_blocked()
        assert [call.state for call in (waiting, appended, cut)] == ["returned"] * 3
        assert wal.durable_lsn == 1


async def test_a_cancelled_wait_durable_leaves_the_others_waiting(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, trio.open_nursery() as nursery:
        calls = [Call(nursery, wal.wait_durable, lsn) for lsn in (1, 2, 2, 3)]
        await wait_all_tasks_blocked()
        calls[1].scope.cancel()
        calls[3].scope.cancel()
        await wait_all_tasks_blocked()
        assert wal.statistics().tasks_waiting_durable == 2
        await wal.append_many([b"one", b"two"])
        await wait_all_tasks_blocked()
        states = [call.state for call in calls]
        assert states == ["returned", "cancelled", "returned", "cancelled"]


async def test_wait_durable_ends_with_the_log(files: MemoryFiles) -> None:
    async with trio.open_nursery() as nursery:
        async with open_memory(files) as wal:
            reached = Call(nursery, wal.wait_durable, 1)
            missed = Call(nursery, wal.wait_durable, 2)
            await wait_all_tasks_blocked()
            wal.send_nowait(b"one")
        await wait_all_tasks_blocked()
        assert reached.state == "returned"
        with pytest.raises(trio.ClosedResourceError, match=r"^the log was closed before LSN 2 "):
            raise missed.error


# -- the three durabilities -------------------------------------------------------


async def test_durability_interval_acknowledges_when_written_and_syncs_every_interval(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    async with open_memory(files, durability="interval", flush_interval=1.0) as wal:
        before = syncs(files)
        assert await wal.append(b"one") == 1
        assert (wal.last_lsn, wal.durable_lsn) == (1, 0)
        await trio.sleep(0.6)
        assert await wal.append(b"two") == 2
        await wal.send(b"three")
        await trio.sleep(0.39)
        assert (wal.last_lsn, wal.durable_lsn) == (3, 0)
        assert syncs(files) == before
        await trio.sleep(0.02)
        assert wal.durable_lsn == 3
        assert syncs(files) == before + 1
        # Nothing new, nothing to sync.
        await trio.sleep(10)
        assert syncs(files) == before + 1
        await wal.append(b"four")
        await trio.sleep(1.01)
        assert (wal.durable_lsn, syncs(files)) == (4, before + 2)
        # After a flush there is nothing left to do for the interval.
        await wal.append(b"five")
        wal.send_nowait(b"six")
        assert await wal.flush() == 6
        await trio.sleep(10)
        assert wal.statistics().batches_synced == 3


async def test_durability_interval_syncs_also_while_it_is_busy(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    """Writers that never pause do not put the sync off."""
    written: dict[int, float] = {}
    lags = []

    async def write() -> None:
        for _ in range(100):
            written[await wal.append(b"record")] = trio.current_time()
            waiting = [at for lsn, at in written.items() if lsn > wal.durable_lsn]
            lags.append(trio.current_time() - min(waiting, default=trio.current_time()))

    def a_write_takes_a_while(operation: str, path: str) -> None:
        if operation == "pwrite":
            mock_clock.jump(0.1)

    async with open_memory(files, durability="interval", flush_interval=1.0) as wal:
        files.after_operation = a_write_takes_a_while
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(write)
        files.after_operation = None
        assert wal.statistics().batches_synced >= 9
    assert 0.5 < max(lags) < 1.3


async def test_durability_interval_with_flush_interval_0_syncs_every_batch(
    files: MemoryFiles,
) -> None:
    async with open_memory(files, durability="interval", flush_interval=0) as wal:
        before = syncs(files)
        for number in range(1, 4):
            await wal.append(b"record")
            assert wal.durable_lsn == number
        assert syncs(files) == before + 3


async def test_durability_none_syncs_only_on_flush_and_on_closing(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    async with open_memory(files, durability="none", flush_interval=0.1) as wal:
        before = syncs(files)
        for number in range(1, 11):
            assert await wal.append(b"%d" % number) == number
            await trio.sleep(100)
        await wal.send(b"sent")
        await trio.sleep(100)
        assert await wal.append_many([b"a", b"b"]) == range(12, 14)
        assert (wal.last_lsn, wal.durable_lsn) == (13, 0)
        assert syncs(files) == before
        assert wal.statistics().batches_synced == 0
        assert await read_all(wal) == {}
        assert await wal.flush() == 13
        assert (wal.durable_lsn, syncs(files)) == (13, before + 1)
        await wal.append(b"last")
        assert wal.durable_lsn == 13
    assert wal.durable_lsn == 14
    async with open_memory(files.crash(seed=3)) as wal:
        assert wal.last_lsn == 14
        assert wal.recovery.clean_shutdown


@pytest.mark.parametrize("durability", ["interval", "none"])
async def test_what_is_written_but_not_synced_may_be_lost_with_the_power(
    files: MemoryFiles, mock_clock: MockClock, durability: str
) -> None:
    """Or the two durabilities would promise what they do not say."""
    async with open_memory(files, durability=durability, flush_interval=1000) as wal:
        await wal.append(b"synced")
        await wal.flush()
        await wal.append(b"written")
        lost = 0
        for seed in range(30):
            async with open_memory(files.crash_image(seed)) as after:
                found = await read_all(after)
            assert found in ({1: b"synced"}, {1: b"synced", 2: b"written"})
            lost += len(found) == 1
        assert 0 < lost < 30
        async with open_memory(files.crash_image(0, "kill")) as after:
            assert await read_all(after) == {1: b"synced", 2: b"written"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the bell is no file descriptor")
async def test_when_the_worker_thread_dies_nobody_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does where there is no memory for the next job."""

    serve = ThreadWorker._serve

    def die(self: ThreadWorker) -> None:
        # The first job only asks whether there is a thread.
        first = self._jobs.get()
        self._jobs.put(first)
        self._jobs.put(None)
        serve(self)
        self._jobs.get()
        raise MemoryError

    monkeypatch.setattr(ThreadWorker, "_serve", die)
    with pytest.raises(trio_wal.LogFailedError) as caught:
        async with trio_wal.open_wal(tmp_path / "log") as wal:
            await wal.append(b"record")
    assert caught.value.outcome == "unknown"
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOMEM
    assert isinstance(cause.__cause__, MemoryError)
    monkeypatch.undo()
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        assert await wal.append(b"record") in (1, 2)
