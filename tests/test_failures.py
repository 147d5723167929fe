"""Disks that fail and disks that are full: who is told what, and what is never done."""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import LOG, SMALL_SEGMENT, Call, append_until, open_memory, open_tasks, read_all
from logs import content, make_log, open_log, records_of
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal.testing import MemoryFiles

UNKNOWN = (
    rf"^{LOG}: a write or sync failed and the log is closed for writing; "
    "whether the records of this call are durable is unknown until the log is reopened$"
)
NOT_WRITTEN = (
    rf"^{LOG}: a write or sync failed and the log is closed for writing; "
    "the records of this call were not written$"
)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "trio_wal")


@asynccontextmanager
async def failing(files: MemoryFiles, **options: Any) -> AsyncIterator[trio_wal.WriteAheadLog]:
    """A log whose failure has been told by the end of the block, so that leaving is quiet."""
    async with open_memory(files, **options) as wal:
        try:
            yield wal
        finally:
            files.release()


def check(error: Exception | None, outcome: str, cause: int = errno.EIO) -> None:
    assert type(error) is trio_wal.LogFailedError
    assert isinstance(error, trio.BrokenResourceError)
    assert error.outcome == outcome
    assert error.path == LOG
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == cause
    with pytest.raises(
        trio_wal.LogFailedError, match=NOT_WRITTEN if outcome != "unknown" else UNKNOWN
    ):
        raise error


# -- the first failure is the last ------------------------------------------------


@pytest.mark.parametrize("operation", ["pwrite", "sync"])
@pytest.mark.parametrize(
    "error", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EBADF]
)
async def test_every_waiter_is_told_what_became_of_its_record(
    files: MemoryFiles, operation: Any, error: int
) -> None:
    async with failing(files, max_queue_size=3) as wal:
        await wal.append(b"before")
        async with open_tasks(files) as nursery:
            files.hold()
            flying = [Call(nursery, wal.append, b"flying")]
            await wait_all_tasks_blocked()
            queued = [Call(nursery, wal.append, b"queued")]
            queued.append(Call(nursery, wal.append_many, [b"queued", b"too"]))
            await wait_all_tasks_blocked()
            blocked = [
                Call(nursery, wal.append, b"blocked"),
                Call(nursery, wal.append_many, [b"blocked"]),
                Call(nursery, wal.send, b"blocked"),
            ]
            await wait_all_tasks_blocked()
            waiting = Call(nursery, wal.wait_durable, 2)
            await wait_all_tasks_blocked()
            assert wal.statistics().tasks_waiting_send == 3
            files.fail(operation, error)
            files.release()
        check(flying[0].error, "unknown", error)
        for call in queued + blocked:
            check(call.error, "not written", error)
        check(waiting.error, "unknown", error)
        # No two tasks share one exception, whose traceback is one task's.
        errors = [call.error for call in (*flying, *queued, *blocked)]
        assert len(set(map(id, errors))) == len(errors)

        assert wal.statistics().state == "failed"
        for function, *arguments in [
            (wal.append, b"later"),
            (wal.append_many, [b"later"]),
            (wal.append_many, []),
            (wal.send, b"later"),
            (wal.truncate_after, 0),
            (wal.truncate_before, 1),
        ]:
            with pytest.raises(trio_wal.LogFailedError) as caught:
                await function(*arguments)
            check(caught.value, "not written", error)
        with pytest.raises(trio_wal.LogFailedError) as caught:
            wal.send_nowait(b"later")
        check(caught.value, "not written", error)
        # These ask for what was there before them.
        for function, *arguments in [(wal.flush,), (wal.wait_durable, 3)]:
            with pytest.raises(trio_wal.LogFailedError) as caught:
                await function(*arguments)
            check(caught.value, "unknown", error)
        # What was durable still is.
        await wal.wait_durable(1)
        assert await read_all(wal) == {1: b"before"}
    assert wal.statistics().state == "failed"
    for seed in range(10):
        async with open_memory(files.crash_image(seed)) as wal:
            found = await read_all(wal)
        assert found in ({1: b"before"}, {1: b"before", 2: b"flying"})


async def test_a_sync_is_never_tried_again_and_nothing_is_written_any_more(
    files: MemoryFiles,
) -> None:
    async with failing(files) as wal:
        await wal.append(b"before")
        files.fail("sync")
        before = dict(files.operations)
        with pytest.raises(trio_wal.LogFailedError, match=UNKNOWN):
            await wal.append(b"flying")
        for _ in range(5):
            with pytest.raises(trio_wal.LogFailedError, match=NOT_WRITTEN):
                await wal.append(b"later")
            with pytest.raises(trio_wal.LogFailedError, match=UNKNOWN):
                await wal.flush()
        await wal.aclose()
    assert files.operations["sync"] == before["sync"] + 1
    assert files.operations["pwrite"] == before["pwrite"] + 1
    assert files.operations.get("truncate", 0) == before.get("truncate", 0)


@pytest.mark.parametrize("written", [0, 1, 64, 300, 511, 512, 100_000])
async def test_a_short_write_breaks_the_log_and_recovery_cuts_it(
    files: MemoryFiles, written: int
) -> None:
    async with failing(files) as wal:
        await wal.append(b"before" * 100)
        files.fail("pwrite", errno.ENOSPC, written=written)
        with pytest.raises(trio_wal.LogFailedError, match=UNKNOWN):
            await wal.append(b"flying" * 100)
    async with open_memory(files.crash_image(0, "kill")) as wal:
        found = await read_all(wal)
        whole = {1: b"before" * 100, 2: b"flying" * 100}
        assert found == (whole if written > 1000 else {1: b"before" * 100})
        assert await wal.append(b"next") == len(found) + 1


async def test_no_acknowledgement_is_false_whichever_call_fails() -> None:
    """The n-th write, sync, allocation, truncation or directory operation fails, once or
    from then on, through rotations, truncations and closing: what was acknowledged is
    there after any crash that follows."""
    for operation in (
        "pwrite",
        "sync",
        "allocate",
        "truncate",
        "rename",
        "unlink",
        "sync_dir",
        "open",
    ):
        for times in (1, math.inf):
            number = 0
            while True:
                files = MemoryFiles(seed=number)
                acknowledged: dict[int, bytes] = {}
                async with open_memory(files, segment_size=SMALL_SEGMENT):
                    pass
                files.operations.clear()
                files.fail(operation, errno.EIO, after=number, times=times)  # type: ignore[arg-type]
                with suppress(OSError, trio_wal.WalError):
                    await work(files, acknowledged)
                if files.operations.get(operation, 0) <= number:
                    break
                files.heal()
                for seed in range(2):
                    async with open_memory(files.crash_image(seed)) as wal:
                        found = await read_all(wal)
                        assert list(found) == list(range(wal.first_lsn, wal.last_lsn + 1))
                    for lsn, data in acknowledged.items():
                        assert lsn < wal.first_lsn or found[lsn] == data, (operation, number)
                    assert wal.first_lsn <= 20
                number += 1
            assert number >= 1, operation


async def work(files: MemoryFiles, acknowledged: dict[int, bytes]) -> None:
    async with open_memory(files, segment_size=SMALL_SEGMENT, flush_interval=0) as wal:
        for number in range(30):
            data = b"%d" % number * 200
            acknowledged[await wal.append(data)] = data
        await wal.truncate_before(20)
        wal.send_nowait(b"sent")
        acknowledged[await wal.append(b"behind it")] = b"behind it"
        cut = wal.last_lsn - 3
        for lsn in [lsn for lsn in acknowledged if lsn > cut]:
            del acknowledged[lsn]
        await wal.truncate_after(cut)
        acknowledged[await wal.append(b"the last")] = b"the last"


# -- who has been told ------------------------------------------------------------


async def test_the_loss_of_a_sent_record_is_reported_by_flush(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with failing(files, flush_interval=1000) as wal:
        await wal.send(b"sent")
        files.fail("sync")
        with pytest.raises(trio_wal.LogFailedError, match=UNKNOWN) as caught:
            await wal.flush()
        check(caught.value, "unknown")
    # Told once: leaving the block said nothing.


async def test_leaving_the_block_raises_if_nobody_has_been_told(files: MemoryFiles) -> None:
    with pytest.raises(trio_wal.LogFailedError, match=UNKNOWN) as caught:  # noqa: PT012
        async with open_memory(files, flush_interval=1000) as wal:
            await wal.send(b"sent")
            files.fail("sync")
    check(caught.value, "unknown")
    assert wal.statistics().state == "failed"
    assert wal.durable_lsn == 0


async def test_closing_raises_if_nobody_has_been_told_and_leaving_not_again(
    files: MemoryFiles,
) -> None:
    async with open_memory(files, flush_interval=1000) as wal:
        await wal.send(b"sent")
        files.fail("pwrite")
        with pytest.raises(trio_wal.LogFailedError, match=UNKNOWN):
            await wal.aclose()
        await wal.aclose()


@pytest.mark.parametrize("teller", ["append", "send", "send_nowait", "wait_durable", "follow"])
async def test_whoever_was_told_is_enough(files: MemoryFiles, teller: str) -> None:
    async def follow() -> None:
        async with wal.follow() as records:
            async for _ in records:
                pass

    async def send_nowait() -> None:
        wal.send_nowait(b"later")

    async with failing(files, flush_interval=0) as wal:
        files.fail("sync")
        await wal.send(b"sent")
        await wait_all_tasks_blocked()
        assert wal.statistics().state == "failed"
        with pytest.raises(trio_wal.LogFailedError) as caught:
            await {
                "append": lambda: wal.append(b"later"),
                "send": lambda: wal.send(b"later"),
                "send_nowait": send_nowait,
                "wait_durable": lambda: wal.wait_durable(1),
                "follow": follow,
            }[teller]()
        check(caught.value, "unknown" if teller in ("wait_durable", "follow") else "not written")


async def test_a_follower_gets_all_that_is_durable_and_then_the_failure(
    files: MemoryFiles,
) -> None:
    found = []

    async def follow() -> None:
        async with wal.follow() as records:
            async for record in records:
                found.append(record.data)  # noqa: PERF401  (it does not end)

    async with failing(files) as wal, trio.open_nursery() as nursery:
        call = Call(nursery, follow)
        await wal.append(b"one")
        await wal.append(b"two")
        files.fail("sync")
        with pytest.raises(trio_wal.LogFailedError):
            await wal.append(b"three")
        await wait_all_tasks_blocked()
        check(call.error, "unknown")
        assert found == [b"one", b"two"]


async def test_the_exception_of_the_body_wins(files: MemoryFiles) -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:  # noqa: PT012
        async with open_memory(files, flush_interval=1000) as wal:
            await wal.send(b"sent")
            files.fail("sync")
            raise error
    assert caught.value is error
    assert wal.statistics().state == "failed"


async def test_the_failure_that_the_body_lets_through_is_the_one_it_got(
    files: MemoryFiles,
) -> None:
    errors = []
    with pytest.raises(trio_wal.LogFailedError) as caught:  # noqa: PT012
        async with open_memory(files) as wal:
            files.fail("sync")
            try:
                await wal.append(b"flying")
            except trio_wal.LogFailedError as exc:
                errors.append(exc)
                raise
    assert [caught.value] == errors


@pytest.mark.parametrize("operation", ["pwrite", "sync"])
async def test_a_failure_while_the_log_is_closed_is_told(
    files: MemoryFiles, operation: Any
) -> None:
    """All records are durable; what fails is the mark of a clean close."""
    with pytest.raises(trio_wal.LogFailedError, match=UNKNOWN):  # noqa: PT012
        async with open_memory(files) as wal:
            await wal.append(b"one")
            files.fail(operation)
    async with open_memory(files) as wal:
        assert await read_all(wal) == {1: b"one"}
        # That mark may be in the page cache only, and must not become a hole in the log.
        assert await wal.append(b"two") == 2
        for seed in range(10):
            async with open_memory(files.crash_image(seed)) as after:
                assert await read_all(after) == {1: b"one", 2: b"two"}


@pytest.mark.parametrize("durability", ["interval", "none"])
async def test_a_failed_sync_behind_acknowledged_writes_is_loud(
    files: MemoryFiles, autojump_clock: MockClock, durability: str
) -> None:
    async with failing(files, durability=durability, flush_interval=1.0) as wal:
        assert await wal.append(b"written") == 1
        files.fail("sync")
        if durability == "interval":
            await trio.sleep(2)
            assert wal.statistics().state == "failed"
        with pytest.raises(trio_wal.LogFailedError, match=UNKNOWN):
            await wal.flush()
        with pytest.raises(trio_wal.LogFailedError, match=NOT_WRITTEN):
            await wal.append(b"later")
        assert wal.durable_lsn == 0


async def test_a_failure_in_flight_is_not_hidden_by_a_cancellation(files: MemoryFiles) -> None:
    async with failing(files) as wal, open_tasks(files) as nursery:
        files.hold()
        call = Call(nursery, wal.append, b"flying")
        await wait_all_tasks_blocked()
        call.scope.cancel()
        files.fail("sync")
        files.release()
        await wait_all_tasks_blocked()
        check(call.error, "unknown")


async def test_the_failure_is_logged(files: MemoryFiles, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "trio_wal")
    async with failing(files) as wal:
        files.fail("sync")
        with pytest.raises(trio_wal.LogFailedError):
            await wal.append(b"flying")
    (record,) = caplog.records
    assert record.name == "trio_wal"
    assert record.getMessage().startswith("/log: the log is broken: OSError(5, ")


async def test_a_failed_log_can_be_opened_again_at_once(files: MemoryFiles) -> None:
    async with failing(files) as wal:
        await wal.append(b"one")
        files.fail("sync")
        with pytest.raises(trio_wal.LogFailedError):
            await wal.append(b"two")
        await wal.aclose()
        async with open_memory(files) as again:
            assert again.recovery.last_lsn in (1, 2)
            await again.append(b"three")
    with pytest.raises(trio.ClosedResourceError, match=r"^/log: this log is closed$"):
        wal.read()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux syncs with fdatasync")
async def test_fdatasync_that_fails_on_real_files_breaks_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fdatasync(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "log"
    async with trio_wal.open_wal(path) as wal:
        for number in range(10):
            await wal.append(b"%d" % number)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fdatasync)
            async with trio.open_nursery() as nursery:
                several = [Call(nursery, wal.append, b"lost?") for _ in range(5)]
            for call in several:
                assert isinstance(call.error, trio_wal.LogFailedError)
                assert call.error.__cause__.errno == errno.EIO  # type: ignore[union-attr]
            assert len(calls) == 1
            with pytest.raises(trio_wal.LogFailedError, match=r" were not written$"):
                await wal.append(b"later")
            await wal.aclose()
            assert len(calls) == 1
    async with trio_wal.open_wal(path) as wal:
        found = list((await read_all(wal)).values())
        assert found[:10] == [b"%d" % number for number in range(10)]
        assert set(found[10:]) <= {b"lost?"}
        assert not wal.recovery.clean_shutdown


# -- a full disk ------------------------------------------------------------------


async def fill(wal: trio_wal.WriteAheadLog, files: MemoryFiles) -> trio_wal.LogFullError:
    """Append until the disk has no room for the next segment."""
    files.free_bytes = 0
    while True:
        try:
            await wal.append(bytes(400))
        except trio_wal.LogFullError as exc:
            return exc


FULL = (
    rf"^{LOG}: no space for a segment of \d+ bytes; nothing was accepted; "
    r"free disk space or call truncate_before\(\), then try again$"
)


async def test_a_full_disk_refuses_before_acceptance_and_works_again_with_space(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    """At once, both times: no timer has a part in it."""
    start = trio.current_time()
    async with open_memory(files, segment_size=SMALL_SEGMENT) as wal:
        error = await fill(wal, files)
        with pytest.raises(trio_wal.LogFullError, match=FULL):
            raise error
        assert (error.path, error.needed) == (LOG, SMALL_SEGMENT)
        assert isinstance(error.__cause__, OSError)
        assert error.__cause__.errno == errno.ENOSPC
        last = wal.last_lsn
        assert wal.statistics().state == "full"
        assert wal.statistics().records_waiting == 0
        assert last == wal.durable_lsn > 5

        for function, *arguments in [
            (wal.append, b"no"),
            (wal.append_many, [b"no", b"no"]),
            (wal.send, b"no"),
            (wal.flush,),
            (wal.truncate_after, 1),
        ]:
            with pytest.raises(trio_wal.LogFullError, match=FULL) as caught:
                await function(*arguments)
            assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(trio_wal.LogFullError, match=FULL) as caught:
            wal.send_nowait(b"no")
        assert isinstance(caught.value.__cause__, OSError)
        assert wal.last_lsn == last
        assert len(await read_all(wal)) == last

        files.free_bytes = math.inf
        assert await wal.append(b"there is space") == last + 1
        assert wal.statistics().state == "open"
        await wal.send(b"again")
        assert await wal.flush() == last + 2
        assert trio.current_time() == start
    async with open_memory(files) as wal:
        found = await read_all(wal)
        assert found[last + 1] == b"there is space"
        assert b"no" not in found.values()
        assert wal.recovery.clean_shutdown


@pytest.mark.parametrize("max_batch_bytes", [1, 1 << 20])
async def test_everybody_who_waits_is_told_that_the_disk_is_full(
    files: MemoryFiles, max_batch_bytes: int
) -> None:
    async with open_memory(
        files, segment_size=SMALL_SEGMENT, max_queue_size=3, max_batch_bytes=max_batch_bytes
    ) as wal:
        await fill(wal, files)
        files.free_bytes = SMALL_SEGMENT + 4096
        last = await wal.append(b"one more segment")
        files.free_bytes = 0
        async with open_tasks(files) as nursery:
            files.hold()
            calls = []
            for number in range(6):
                calls.append(Call(nursery, wal.append, b"%d" % number + bytes(20_000)))
                await wait_all_tasks_blocked()
            flush = Call(nursery, wal.flush)
            await wait_all_tasks_blocked()
            assert wal.statistics().tasks_waiting_send == 3
            files.release()
            await wait_all_tasks_blocked()
            for call in (*calls, flush):
                assert isinstance(call.error, trio_wal.LogFullError)
        errors = [call.error for call in calls]
        assert len(set(map(id, errors))) == len(errors)
        assert wal.last_lsn == last
        statistics = wal.statistics()
        assert (statistics.records_waiting, statistics.bytes_waiting) == (0, 0)
        assert (statistics.tasks_waiting_send, statistics.tasks_waiting_durable) == (0, 0)


async def test_sent_records_are_kept_on_a_full_disk_and_written_when_there_is_space(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    async with open_memory(files, segment_size=SMALL_SEGMENT) as wal:
        await fill(wal, files)
        files.free_bytes = SMALL_SEGMENT + 4096
        last = await wal.append(b"one more segment")
        files.free_bytes = 0
        # Accepted while nobody knew.
        for number in range(5):
            await wal.send(b"sent %d " % number + bytes(4000))
        with pytest.raises(trio_wal.LogFullError, match=FULL):
            await wal.append(b"refused")
        with pytest.raises(trio_wal.LogFullError, match=FULL):
            await wal.flush()
        await trio.sleep(10)
        assert wal.statistics().state == "full"
        assert wal.last_lsn == last

        files.free_bytes = math.inf
        # By itself, without anybody asking.
        await trio.sleep(1)
        assert wal.statistics().state == "open"
        assert wal.durable_lsn == last + 5
        assert await wal.append(b"accepted") == last + 6
        found = list((await read_all(wal, start=last + 1)).values())
        sent = [b"sent %d " % number + bytes(4000) for number in range(5)]
        assert found == [*sent, b"accepted"]


@pytest.mark.parametrize("sealed", [1, 2, 3])
async def test_truncate_before_makes_room_on_a_full_disk(files: MemoryFiles, sealed: int) -> None:
    """Also where the one file that it drops is kept to be overwritten."""
    async with open_memory(files, segment_size=SMALL_SEGMENT) as wal:
        for _ in range(sealed):
            await fill(wal, files)
            files.free_bytes = SMALL_SEGMENT + 1024
            await wal.append(b"one more segment")
        await fill(wal, files)
        assert wal.statistics().segments == sealed + 1
        last = wal.last_lsn
        files.free_bytes = 1024  # what log.meta takes while it is replaced
        await wal.truncate_before(last)
        assert await wal.append(b"there is room") == last + 1
        assert wal.statistics().state == "open"


async def test_a_full_disk_at_shutdown_loses_sent_records_loudly(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    start = trio.current_time()
    with pytest.raises(trio_wal.LogFailedError, match=NOT_WRITTEN) as caught:  # noqa: PT012
        async with open_memory(files, segment_size=SMALL_SEGMENT) as wal:
            await fill(wal, files)
            files.free_bytes = SMALL_SEGMENT + 4096
            last = await wal.append(b"one more segment")
            files.free_bytes = 0
            for _ in range(5):
                await wal.send(bytes(4000))
            with pytest.raises(trio_wal.LogFullError, match=FULL):
                await wal.append(b"refused")
    assert trio.current_time() == start
    check(caught.value, "not written", errno.ENOSPC)
    assert isinstance(caught.value.__cause__.__cause__, trio_wal.LogFullError)  # type: ignore[union-attr]
    files.heal()
    async with open_memory(files) as wal:
        assert wal.last_lsn == last


async def test_a_full_disk_at_shutdown_with_nothing_to_write_is_no_failure(
    files: MemoryFiles,
) -> None:
    async with open_memory(files, segment_size=SMALL_SEGMENT) as wal:
        await fill(wal, files)
    assert wal.statistics().state == "closed"
    async with open_memory(files) as wal:
        assert wal.recovery.clean_shutdown


async def test_emptying_the_log_on_a_full_disk_is_refused_and_changes_nothing(
    files: MemoryFiles,
) -> None:
    async with open_memory(files, segment_size=SMALL_SEGMENT) as wal:
        files.free_bytes = 0  # before anything wants the next segment to be prepared
        await wal.append(b"one")
        with pytest.raises(trio_wal.LogFullError, match=FULL):
            await wal.truncate_before(2)
        with pytest.raises(trio_wal.LogFullError, match=FULL):
            await wal.truncate_after(0)
        assert await read_all(wal) == {1: b"one"}
        # The one being written has room: this is no full log.
        assert await wal.append(b"two") == 2
        assert wal.statistics().state == "open"


async def test_a_failed_allocation_that_is_not_about_space_breaks_the_log(
    files: MemoryFiles,
) -> None:
    async with failing(files, segment_size=SMALL_SEGMENT) as wal:
        files.fail("allocate", errno.EIO, times=math.inf)
        with pytest.raises(trio_wal.LogFailedError, match=UNKNOWN):
            await append_until(wal, lambda: False)


@pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="no posix_fallocate on this platform"
)
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_real_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def fallocate(fd: int, offset: int, length: int) -> None:
        raise OSError(error, os.strerror(error))

    async with trio_wal.open_wal(tmp_path / "log", segment_size=SMALL_SEGMENT) as wal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", fallocate)
            with pytest.raises(trio_wal.LogFullError) as caught:
                await append_until(wal, lambda: False)
            assert caught.value.__cause__.errno == error  # type: ignore[union-attr]
            last = wal.last_lsn
        assert await wal.append(b"there is space") == last + 1
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        assert len(await read_all(wal)) == last + 1


# -- a cut of the log's end that fails ------------------------------------------------------


@pytest.mark.parametrize("after", range(5))
@pytest.mark.parametrize("operation", ["unlink", "rename", "sync", "sync_dir", "pwrite", "open"])
def test_nothing_is_dropped_once_cutting_the_end_has_failed(operation: Any, after: int) -> None:
    """``log.meta`` may say what the open log does not know: that must not be written over."""
    files = make_log(*([bytes([number])] for number in range(20)), close=False)
    log = open_log(files)
    before = records_of(log)
    files.fail(operation, after=after)
    try:
        log.truncate_after(9)
    except OSError:
        files.heal()
        with pytest.raises(OSError, match=rf"could not be cut, and nothing else will be: '{LOG}'"):
            log.drop_before(5)
    log.close(orderly=False)
    assert content(files) in (before, before[:9])


async def test_a_reader_is_told_when_cutting_the_end_has_failed(files: MemoryFiles) -> None:
    async with failing(files, segment_size=1, flush_interval=0) as wal:
        for number in range(20):
            await wal.append(bytes([number]))
        async with wal.follow(15) as records:
            # The segment of LSN 15 is gone by then.
            files.fail("rename", after=2)
            with pytest.raises(trio_wal.LogFailedError):
                await wal.truncate_after(9)
            with pytest.raises(trio_wal.LogFailedError) as caught:
                await anext(records)
            check(caught.value, "unknown")
