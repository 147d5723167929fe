"""Reading: what is given, in which order, when it ends, and what stops it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from logs import LOG, TINY, append, make_log, numbered, open_log, segments
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal import (
    Bookmark,
    CorruptLogError,
    LogDivergedError,
    LogFailedError,
    LsnTruncatedError,
    UnsupportedFormatError,
    WrongDirectoryError,
)
from trio_wal._disk.cursor import CHUNK_BYTES, Cursor
from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.frame import BLOCK, DATA_OFFSET, FRAME_HEADER_SIZE, crc32c
from trio_wal._disk.opening import open_log_directory
from trio_wal._engine import Record
from trio_wal._log import LogSource
from trio_wal._system.files import OsFiles
from trio_wal._util import KiB
from trio_wal._watchsource import POLL_SECONDS
from trio_wal._worker import Blocking
from trio_wal.testing import MemoryFiles

Pairs = list[tuple[int, bytes]]


def open_wal(files: MemoryFiles, **options: Any) -> Any:
    options.setdefault("segment_size", TINY)
    return trio_wal.open_wal(LOG, files=files, **options)


async def read(log: Any, start: int | None = None, stop: int | None = None) -> Pairs:
    async with log.read(start, stop) as records:
        return [(record.lsn, record.data) async for record in records]


async def take(records: Any, count: int) -> Pairs:
    """The next records; the test does not wait for ever."""
    found = []
    with trio.fail_after(60):
        for _ in range(count):
            record = await records.__anext__()
            found.append((record.lsn, record.data))
    return found


async def drain(records: Any, found: Pairs) -> None:
    """All that is given before the end, or an error."""
    async for record in records:
        found.append((record.lsn, record.data))


def payloads(count: int, first: int = 1) -> list[bytes]:
    return [b"record %d" % n for n in range(first, first + count)]


def log_of(count: int, *, size: int = 0, **options: Any) -> MemoryFiles:
    """One record a frame, two frames a segment."""
    return make_log(*([data.ljust(size, b".")] for data in payloads(count)), **options)


def make_real_log(path: Path, count: int) -> None:
    log = open_log_directory(OsFiles(), str(path), segment_size=TINY)
    for data in payloads(count):
        append(log, data)
    log.close()


# The same log, as its owner sees it and as one sees it who only reads.


@asynccontextmanager
async def owner(files: MemoryFiles) -> AsyncIterator[Any]:
    async with open_wal(files) as wal:
        yield wal


@asynccontextmanager
async def onlooker(files: MemoryFiles) -> AsyncIterator[Any]:
    async with trio_wal.open_reader(LOG, files=files) as reader:
        yield reader


both = pytest.mark.parametrize("look", [owner, onlooker])


# -- read -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (None, None, range(1, 10)),
        (1, None, range(1, 10)),
        (0, None, range(1, 10)),
        (4, None, range(4, 10)),
        (9, None, range(9, 10)),
        (10, None, range(0)),
        (None, 0, range(0)),
        (None, 1, range(0)),
        (None, 5, range(1, 5)),
        (None, 10, range(1, 10)),
        (None, 1000, range(1, 10)),
        (3, 3, range(0)),
        (3, 8, range(3, 8)),
        (8, 3, range(0)),
    ],
)
async def test_read_gives_the_records_from_start_to_stop(
    look: Any, start: int | None, stop: int | None, expected: range
) -> None:
    async with look(log_of(9)) as log:
        found = await read(log, start, stop)
    assert found == [(lsn, b"record %d" % lsn) for lsn in expected]


@both
async def test_the_records_of_one_batch_are_cut_at_start_and_stop(look: Any) -> None:
    files = make_log(payloads(5), payloads(5, 6))
    async with look(files) as log:
        for start in range(1, 11):
            for stop in range(start, 12):
                assert await read(log, start, stop) == list(
                    numbered(payloads(stop - start, start), start)
                )


@both
async def test_reading_below_the_first_record_says_where_the_log_starts(look: Any) -> None:
    files = log_of(6)
    log = open_log(files)
    log.drop_before(5)
    log.close()
    async with look(files) as log:
        for open_stream in (log.read, log.follow):
            for start in (1, 0, 4):
                with pytest.raises(
                    LsnTruncatedError, match=r"^LSN \d has been truncated: "
                ) as caught:
                    async with open_stream(start):
                        raise AssertionError("it was opened")
                assert (caught.value.first_lsn, caught.value.lsn) == (5, max(start, 1))
        assert await read(log) == await read(log, 5) == list(numbered(payloads(2, 5), 5))


@both
async def test_a_start_that_is_no_lsn_is_refused_by_name(look: Any) -> None:
    async with look(log_of(1)) as log:
        with pytest.raises(TypeError, match=r"^start must be an int, not str$"):
            log.read("1")
        with pytest.raises(ValueError, match=r"^stop must be at least 0, not -1$"):
            log.read(None, -1)
        with pytest.raises(TypeError, match=r"^start must be an int, not bool$"):
            log.follow(True)


@both
async def test_an_empty_log_has_nothing_to_read(look: Any) -> None:
    files = MemoryFiles()
    open_log(files).close()
    async with look(files) as log:
        assert (log.first_lsn, log.durable_lsn) == (1, 0)
        assert await read(log) == []
        assert await read(log, 1) == []


async def test_read_ends_at_what_was_durable_on_entering() -> None:
    async with open_wal(log_of(3)) as wal, wal.read() as records:
        await wal.append(b"later")
        assert [record.lsn async for record in records] == [1, 2, 3]
        assert await read(wal, 4) == [(4, b"later")]


async def test_records_have_the_time_of_their_batch(autojump_clock: trio.testing.MockClock) -> None:
    files = MemoryFiles(epoch_us=1_700_000_000_000_000)
    async with open_wal(files) as wal:
        await wal.append_many([b"a", b"b"])
        await trio.sleep(1.5)
        await wal.append(b"c")
        async with wal.read() as records:
            found = [record async for record in records]
    epoch = datetime.fromtimestamp(1_700_000_000, timezone.utc)
    assert found[0].timestamp == found[1].timestamp >= epoch
    assert found[2].timestamp - found[0].timestamp == timedelta(seconds=1.5)
    assert all(record.timestamp.tzinfo is timezone.utc for record in found)


async def test_reading_goes_on_while_the_log_is_written_and_rotated() -> None:
    files = log_of(20)
    async with open_wal(files) as wal, trio.open_nursery() as nursery:

        async def write(name: bytes) -> None:
            for n in range(20):
                await wal.append(b"%s %d" % (name, n))

        async def check(start: int) -> None:
            for _ in range(5):
                found = await read(wal, start)
                assert [lsn for lsn, _ in found] == list(range(start, found[-1][0] + 1))
                assert found[: 21 - start] == list(numbered(payloads(21 - start, start), start))

        for number in range(3):
            nursery.start_soon(write, b"task %d" % number)
            nursery.start_soon(check, 1 + 9 * number)
    assert len(segments(files)) > 20


async def test_reading_in_chunks_gives_every_record_once() -> None:
    size = CHUNK_BYTES // 3
    files = log_of(10, size=size)
    async with open_wal(files) as wal:
        found = await read(wal)
        assert found == list(numbered(data.ljust(size, b".") for data in payloads(10)))
        assert [lsn for lsn, _ in await read(wal, 4, 9)] == [4, 5, 6, 7, 8]


async def test_a_batch_larger_than_a_chunk_is_read() -> None:
    records = [bytes([n]) * (CHUNK_BYTES // 4) for n in range(20)]
    async with open_wal(MemoryFiles()) as wal:
        await wal.append_many(records)
        assert await read(wal) == list(numbered(records))
        assert await read(wal, 7, 9) == [(7, records[6]), (8, records[7])]


@both
async def test_reading_starts_near_the_record_asked_for(look: Any) -> None:
    """A footer's index leads there: the frames before are not read."""
    size = 60 * KiB
    batches = [[data.ljust(size, b".")] for data in payloads(100)]
    files = make_log(*batches, segment_size=8 * 1024 * KiB)
    sealed, last = segments(files)[-2:]
    assert len(files.read_file(LOG, sealed)) > 3 * 1024 * KiB
    read_bytes = 0
    original = trio_wal.testing.MemoryFile.pread

    def pread(self: Any, length: int, offset: int) -> bytes:
        nonlocal read_bytes
        data = original(self, length, offset)
        read_bytes += len(data)
        return data

    first = int(last[4:24])
    for lsn in (first - 2, first + 1):
        async with look(files) as log:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trio_wal.testing.MemoryFile, "pread", pread)
                read_bytes = 0
                assert await read(log, lsn, lsn + 1) == [(lsn, batches[lsn - 1][0])]
        assert read_bytes < 2 * 1024 * KiB


# -- follow ----------------------------------------------------------------------------------


async def test_a_follower_gets_what_is_there_and_then_what_comes() -> None:
    async with open_wal(log_of(3)) as wal, wal.follow(2) as records:
        assert await take(records, 2) == list(numbered(payloads(2, 2), 2))
        found: Pairs = []

        async def follow() -> None:
            found.extend(await take(records, 4))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await wait_all_tasks_blocked()
            assert found == []
            await wal.append(b"four")
            await wal.append_many([b"five", b"six", b"seven"])
        assert found == [(4, b"four"), (5, b"five"), (6, b"six"), (7, b"seven")]


async def test_a_follower_may_start_at_a_record_still_to_come() -> None:
    async with open_wal(log_of(3)) as wal, wal.follow(4) as records:
        for number in range(4, 6):
            await wal.append(b"%d" % number)
        assert await take(records, 2) == [(4, b"4"), (5, b"5")]


@both
@pytest.mark.parametrize("start", [5, 1000])
async def test_nobody_can_start_after_the_next_record(look: Any, start: int) -> None:
    """Whoever counts so far has read another history."""
    async with look(log_of(3)) as log:
        for stream in (log.read(start), log.follow(start)):
            with pytest.raises(
                LogDivergedError, match=rf"^/log: {start - 1}@0 is not in "
            ) as caught:
                await stream.__aenter__()
            assert caught.value.bookmark == Bookmark(start - 1, 0)
            assert (caught.value.parted_after, caught.value.first_lsn) == (3, 4)


async def test_a_follower_ends_when_the_log_is_closed() -> None:
    found: Pairs = []
    async with open_wal(log_of(3)) as wal, trio.open_nursery() as nursery:

        async def follow() -> None:
            async with wal.follow() as records:
                found.extend([(record.lsn, record.data) async for record in records])

        nursery.start_soon(follow)
        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        await wal.append(b"last")
        await wal.aclose()
    assert sorted(found) == sorted([*numbered([*payloads(3), b"last"])] * 2)


async def test_a_follower_of_a_log_that_fails_gets_all_that_is_durable_and_then_the_error() -> None:
    files = log_of(2)
    async with open_wal(files) as wal, wal.follow() as records:
        files.fail("sync")
        with pytest.raises(LogFailedError):
            await wal.append(b"lost")
        assert await take(records, 2) == list(numbered(payloads(2)))
        for _ in range(2):
            with pytest.raises(LogFailedError, match=r"^/log: a write or sync failed") as caught:
                await records.__anext__()
            assert isinstance(caught.value.__cause__, OSError)


async def test_a_waiting_follower_is_told_of_a_failure() -> None:
    files = log_of(2)
    async with (
        open_wal(files) as wal,
        wal.follow(3) as records,
        trio.open_nursery() as nursery,
    ):

        async def follow() -> None:
            with pytest.raises(LogFailedError, match=r"^/log: a write or sync failed"):
                await records.__anext__()

        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        files.fail("sync")
        with pytest.raises(LogFailedError):
            await wal.append(b"lost")


@pytest.mark.parametrize("look", [owner, onlooker])
async def test_nothing_is_given_before_it_is_durable(
    look: Any, autojump_clock: trio.testing.MockClock
) -> None:
    files = MemoryFiles()
    async with open_wal(files, durability="none", segment_size=64 * KiB) as wal:
        # There is room for all: a rotation would sync.
        await wal.append_many(payloads(2))
        await wal.flush()
        if look is owner:
            log, close = wal, None
        else:
            close = trio_wal.open_reader(LOG, files=files)
            log = await close.__aenter__()
        async with log.follow() as records:
            assert await take(records, 2) == list(numbered(payloads(2)))
            for number in range(3, 7):
                assert await wal.append(b"record %d" % number) == number
            with trio.move_on_after(1) as scope:
                await records.__anext__()
            assert scope.cancelled_caught, "what is written and not synced was given out"
            assert log.durable_lsn == 2
            assert await read(log, 2) == [(2, b"record 2")]
            await wal.flush()
            assert await take(records, 4) == list(numbered(payloads(4, 3), 3))
        if close is not None:
            await close.__aexit__(None, None, None)


# -- overtaken --------------------------------------------------------------------------------


async def test_a_reader_overtaken_by_truncate_before_is_told() -> None:
    async with open_wal(log_of(6)) as wal, wal.read() as finite, wal.follow() as endless:
        await wal.truncate_before(5)
        for records in (finite, endless):
            with pytest.raises(LsnTruncatedError) as caught:
                await records.__anext__()
            assert (caught.value.first_lsn, caught.value.lsn) == (5, 1)


async def test_a_reader_does_not_go_on_in_a_file_that_was_dropped() -> None:
    """Its file is still open; but what it would give is no longer in the log."""
    files = log_of(8, size=CHUNK_BYTES // 3, segment_size=4 * CHUNK_BYTES)
    async with open_wal(files, segment_size=4 * CHUNK_BYTES) as wal, wal.read() as records:
        # One chunk, and not all of the segment.
        await take(records, 3)
        first = wal._log.engine._directory.sealed()[0]
        assert first.next_lsn > 4
        await wal.truncate_before(first.next_lsn)
        with pytest.raises(LsnTruncatedError) as caught:
            await records.__anext__()
        assert (caught.value.first_lsn, caught.value.lsn) == (first.next_lsn, 4)


async def test_calls_in_threads_are_waited_for_before_the_files_are_closed() -> None:
    blocking = Blocking(threaded=True)
    go_on = threading.Event()
    done: list[str] = []

    async def call() -> None:
        await blocking(go_on.wait)
        done.append("call")

    async def close() -> None:
        await blocking.close()
        done.append("close")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        nursery.start_soon(close)
        await wait_all_tasks_blocked()
        early = done.copy()
        go_on.set()
    assert early == []
    with pytest.raises(trio.ClosedResourceError, match=r"^this log is closed$"):
        await blocking(print)
    assert sorted(done) == ["call", "close"]
    await blocking.close()


async def test_a_reader_behind_whom_records_are_dropped_goes_on() -> None:
    size = CHUNK_BYTES
    async with open_wal(log_of(6, size=size)) as wal, wal.read() as records:
        assert [lsn for lsn, _ in await take(records, 3)] == [1, 2, 3]
        await wal.truncate_before(4)
        assert [lsn for lsn, _ in await take(records, 3)] == [4, 5, 6]


async def test_a_reader_who_has_been_given_what_is_cut_is_told() -> None:
    async with open_wal(log_of(6)) as wal:
        async with wal.read() as records, wal.follow() as others:
            await take(records, 4)
            await take(others, 6)
            await wal.truncate_after(3)
            await wal.append(b"another fourth")
            for stream in (records, others):
                with pytest.raises(LsnTruncatedError):
                    await stream.__anext__()
        assert await read(wal, 4) == [(4, b"another fourth")]


@pytest.mark.parametrize("taken", [0, 1, 3])
async def test_a_reader_who_has_not_been_given_what_is_cut_goes_on(taken: int) -> None:
    """Also where the records were already read from the disk for it."""
    async with open_wal(log_of(6)) as wal, wal.read() as finite, wal.follow() as endless:
        for records in (finite, endless):
            await take(records, taken)
        await wal.truncate_after(3)
        await wal.append(b"another fourth")
        rest = numbered(payloads(3))[taken:]
        assert [(record.lsn, record.data) async for record in finite] == list(rest)
        assert await take(endless, 4 - taken) == [*rest, (4, b"another fourth")]


async def test_a_follower_of_what_is_to_come_is_not_concerned_by_a_cut() -> None:
    async with open_wal(log_of(6)) as wal, wal.follow(7) as records:
        await wal.truncate_after(5)
        for data in (b"six", b"seven"):
            await wal.append(data)
        assert await take(records, 1) == [(7, b"seven")]


@pytest.mark.parametrize("given", [0, 5])
async def test_files_that_go_while_the_log_is_cut_are_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int
) -> None:
    """The files go in a thread; a reader comes upon the gap, and waits."""
    async with trio_wal.open_wal(tmp_path, segment_size=TINY) as wal, wal.follow() as records:
        for data in payloads(5):
            await wal.append(data)
        await take(records, given)
        for data in payloads(5, 6):
            await wal.append(data)
        directory = wal._log.engine._directory._directory
        token = trio.lowlevel.current_trio_token()
        cut_begun, go_on = trio.Event(), trio.Event()
        rename, settle = directory.rename, LogSource.settle

        def slow(old: str, new: str) -> None:
            # All segments but the first are gone now.
            if old == "truncate.tmp":
                trio.from_thread.run_sync(cut_begun.set, trio_token=token)
                trio.from_thread.run(go_on.wait, trio_token=token)
            rename(old, new)

        async def wait(source: LogSource) -> None:
            if not go_on.is_set():
                with trio.move_on_after(0.05) as scope:
                    await settle(source)
                go_on.set()
                assert scope.cancelled_caught, "the reader does not wait for the end of the cut"
            await settle(source)

        monkeypatch.setattr(directory, "rename", slow)
        monkeypatch.setattr(LogSource, "settle", wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wal.truncate_after, 2)
            await cut_begun.wait()
            try:
                if given:
                    with pytest.raises(LsnTruncatedError):
                        await take(records, 1)
                else:
                    assert await take(records, 2) == list(numbered(payloads(2)))
                    nursery.start_soon(wal.append, b"another third")
                    assert await take(records, 1) == [(3, b"another third")]
                assert go_on.is_set()
            finally:
                go_on.set()


async def test_what_was_missed_during_a_cut_is_looked_for_again_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the reader asks whether it was damage, the cut is over, and its LSN is written anew."""
    missed = False
    make_real_log(tmp_path, 10)
    async with trio_wal.open_wal(tmp_path, segment_size=TINY) as wal, wal.read(3) as records:
        directory = wal._log.engine._directory._directory
        token = trio.lowlevel.current_trio_token()
        cut_begun, go_on, cut = trio.Event(), trio.Event(), trio.Event()
        rename, chunk = directory.rename, Cursor.chunk

        def slow(old: str, new: str) -> None:
            if old == "truncate.tmp":
                trio.from_thread.run_sync(cut_begun.set, trio_token=token)
                trio.from_thread.run(go_on.wait, trio_token=token)
            rename(old, new)

        async def finish() -> None:
            go_on.set()
            await cut.wait()
            for number in range(3, 9):
                await wal.append(b"another %d" % number)

        def late(cursor: Cursor, stop: int) -> list[Record]:
            nonlocal missed
            try:
                return chunk(cursor, stop)
            except (CorruptLogError, OSError):
                if not missed:
                    missed = True
                    trio.from_thread.run(finish, trio_token=token)
                raise

        async def truncate() -> None:
            await wal.truncate_after(2)
            cut.set()

        monkeypatch.setattr(directory, "rename", slow)
        monkeypatch.setattr(Cursor, "chunk", late)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(truncate)
            await cut_begun.wait()
            try:
                with pytest.raises(StopAsyncIteration):
                    await records.__anext__()
            finally:
                go_on.set()
        monkeypatch.undo()
        async with wal.read(3) as again:
            assert await take(again, 6) == [(n, b"another %d" % n) for n in range(3, 9)]


async def test_a_reader_that_is_faster_than_the_news_of_a_cut_waits_for_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The worker has cut the log; the task that waits for it has not run yet."""
    async with open_wal(log_of(6)) as wal, wal.read() as finite, wal.follow() as endless:
        worker, cut, go_on = wal._log.engine._worker, trio.Event(), trio.Event()
        call = worker.call

        async def late(job: Any) -> Any:
            result = await call(job)
            if wal._log.engine._directory.cuts:
                cut.set()
                await go_on.wait()
            return result

        worker.call = late
        found: list[Pairs] = [[], []]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wal.truncate_after, 3)
            await cut.wait()
            for records, pairs in zip((finite, endless), found, strict=True):
                nursery.start_soon(drain, records, pairs)
            try:
                await trio.sleep(1)
            finally:
                go_on.set()
            await wal.append(b"another fourth")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert found[0] == list(numbered(payloads(3)))
        assert found[1] == [*numbered(payloads(3)), (4, b"another fourth")]


async def test_a_waiting_follower_is_told_of_a_cut() -> None:
    async with open_wal(log_of(6)) as wal, wal.follow() as records:
        await take(records, 6)
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                with pytest.raises(LsnTruncatedError):
                    await records.__anext__()

            nursery.start_soon(follow)
            await wait_all_tasks_blocked()
            await wal.truncate_after(3)
            await wal.append(b"4")


# -- damage ------------------------------------------------------------------------------------


def damaged(files: MemoryFiles, lsn: int, at: int = FRAME_HEADER_SIZE + 4) -> str:
    name = segments(files)[(lsn - 1) // 2]
    files.flip_bit(LOG, name, 8 * (DATA_OFFSET + (lsn - 1) % 2 * BLOCK + at))
    return name


@both
@pytest.mark.parametrize("lsn", range(1, 7))
@pytest.mark.parametrize("at", [20, FRAME_HEADER_SIZE + 4])
async def test_the_records_before_damage_are_given_and_then_its_place(
    look: Any, lsn: int, at: int, autojump_clock: trio.testing.MockClock
) -> None:
    files = log_of(8)
    name = damaged(files, lsn, at)
    log = trio_wal.open_wal(LOG, files=files, segment_size=TINY, verify_bytes=0)
    if look is onlooker:
        log = trio_wal.open_reader(LOG, files=files)
    async with log as opened, opened.read() as records:
        assert [number for number, _ in await take(records, lsn - 1)] == list(range(1, lsn))
        with pytest.raises(CorruptLogError, match=rf"^/log/{name}: at offset ") as caught:
            await records.__anext__()
        assert caught.value.offset == DATA_OFFSET + (lsn - 1) % 2 * BLOCK
        with pytest.raises(CorruptLogError):
            await records.__anext__()
        # What stands behind can still be asked for.
        behind = lsn + lsn % 2 + 1
        assert await read(opened, behind) == list(numbered(payloads(9 - behind, behind), behind))


@both
async def test_a_segment_that_went_missing_is_damage(
    look: Any, autojump_clock: trio.testing.MockClock
) -> None:
    files = log_of(8)
    async with look(files) as log, log.read() as records:
        files.remove_file(LOG, segments(files)[1])
        found: Pairs = []
        with pytest.raises(CorruptLogError, match=r"^/log/wal-0{19}[35]\.log: .* missing"):
            await drain(records, found)
        assert found == list(numbered(payloads(2)))


# -- manners -----------------------------------------------------------------------------------


async def test_two_tasks_cannot_iterate_one_stream() -> None:
    async with (
        open_wal(log_of(1)) as wal,
        wal.follow(2) as records,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(take, records, 1)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError, match=r"^another task is reading"):
            await records.__anext__()
        await wal.append(b"x")


async def test_a_stream_is_entered_once_and_before_it_is_iterated() -> None:
    async with open_wal(log_of(1)) as wal:
        records = wal.read()
        with pytest.raises(RuntimeError, match=r"^enter the stream first"):
            await records.__anext__()
        async with records:
            pass
        with pytest.raises(trio.ClosedResourceError, match=r"^this stream of records is closed$"):
            await records.__anext__()
        with pytest.raises(RuntimeError, match=r"^a stream of records can be used only once$"):
            async with records:
                pass


@both
async def test_entering_and_the_end_of_iterating_are_checkpoints(look: Any) -> None:
    async with look(log_of(2)) as log:
        records = log.read()
        with trio.testing.assert_checkpoints():
            await records.__aenter__()
        with trio.testing.assert_checkpoints():
            await records.__anext__()
        await records.__anext__()
        with trio.testing.assert_checkpoints(), pytest.raises(StopAsyncIteration):
            await records.__anext__()
        await records.__aexit__(None, None, None)


@both
async def test_other_tasks_get_their_turn_while_a_large_batch_is_read(look: Any) -> None:
    files = MemoryFiles()
    count = 5000
    async with open_wal(files) as wal:
        await wal.append_many([b"%d" % number for number in range(count)])
    seen = 0
    turns = []
    async with look(files) as log, log.read() as records, trio.open_nursery() as nursery:

        async def other() -> None:
            while True:
                turns.append(seen)
                await trio.lowlevel.checkpoint()

        nursery.start_soon(other)
        async for record in records:
            assert record.data == b"%d" % seen
            seen += 1
        nursery.cancel_scope.cancel()
    assert seen == count
    # Trio runs the tasks of one turn in any order: at worst two turns meet.
    assert max(later - earlier for earlier, later in pairwise([*turns, count])) <= 2 * 1024


async def test_a_cut_while_others_have_their_turn_is_noticed() -> None:
    files = MemoryFiles()
    async with open_wal(files) as wal:
        await wal.append_many([b"%d" % number for number in range(5000)])
        async with wal.read() as records:
            given = [await records.__anext__() for _ in range(2000)]
            while len(records._ready) % 1024:
                given.append(await records.__anext__())
            cancelled = False
            with trio.CancelScope() as scope:
                scope.cancel()
                try:
                    await records.__anext__()
                except trio.Cancelled:
                    cancelled = True
                    raise
            assert cancelled
            await wal.append(b"behind")
            await wal.truncate_after(4000)
            given += [record async for record in records]
    assert [record.lsn for record in given] == list(range(1, 4001)), "a cancelled turn loses none"


async def test_a_cancelled_follower_lets_go_of_its_segment_and_loses_nothing() -> None:
    async with open_wal(log_of(3)) as wal:
        async with wal.follow() as records:
            assert len(await take(records, 3)) == 3
            with trio.CancelScope() as scope:
                scope.cancel()
                await records.__anext__()
            assert scope.cancelled_caught
            await wal.append(b"record 4")
            assert await take(records, 1) == [(4, b"record 4")]
            assert wal._log.engine._directory.spares._readers
        assert not wal._log.engine._directory.spares._readers


async def test_reading_a_closed_log_is_an_error() -> None:
    async with open_wal(log_of(3)) as wal:
        pass
    for stream in (wal.read, wal.follow):
        with pytest.raises(trio.ClosedResourceError, match=r"^/log: this log is closed$"):
            stream()


@pytest.mark.parametrize("real", [False, True])
async def test_a_log_closed_under_a_slow_reader_does_not_end_its_stream_as_if_all_was_read(
    real: bool, tmp_path: Path
) -> None:
    path, files = (str(tmp_path), None) if real else (LOG, MemoryFiles())
    async with trio_wal.open_wal(path, files=files, segment_size=TINY) as wal:
        for _ in range(4):
            await wal.append(bytes(CHUNK_BYTES))
        async with wal.follow() as follower, wal.read() as reader:
            assert len(await take(follower, 1)) == len(await take(reader, 1)) == 1
            await wal.aclose()
            for records in (follower, reader):
                with pytest.raises(trio.ClosedResourceError):
                    await take(records, 3)


async def test_a_log_is_not_closed_under_a_call_in_a_thread(tmp_path: Path) -> None:
    """The call would find its directory's number given to another file."""
    async with trio_wal.open_wal(tmp_path / "log", segment_size=TINY) as wal:
        for n in range(4):
            await wal.append(b"%d" % n)
        directory, worker = wal._log.engine._directory, wal._log.engine._worker
        order: list[str] = []
        begun, go_on = trio.Event(), trio.Event()
        token = trio.lowlevel.current_trio_token()
        original = directory.drop_before

        def slow(lsn: int, policy: Any = None) -> int:
            if policy is not None:
                return original(lsn, policy)  # of the maintenance, which is waited for below
            trio.from_thread.run_sync(begun.set, trio_token=token)
            trio.from_thread.run(go_on.wait, trio_token=token)
            dropped = original(lsn)
            order.append("dropped")
            return dropped

        call = worker.call

        async def watch(job: Any) -> Any:
            order.append("job")
            return await call(job)

        directory.drop_before, worker.call = slow, watch
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wal.truncate_before, 3)
            await begun.wait()
            nursery.start_soon(wal.aclose)
            await wal._log.engine._maintenance_done.wait()
            await wait_all_tasks_blocked()
            go_on.set()
        assert order == ["dropped", "job"], "the job is the closing of the files"
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        assert wal.first_lsn == 3


# -- beside the owner ---------------------------------------------------------------------------


async def test_a_reader_takes_no_lock_and_writes_nothing() -> None:
    files = log_of(5)
    log = open_log(files)
    append(log, b"record 6")
    before, files.operations = files.contents(LOG), {}
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert await read(reader) == list(numbered(payloads(6)))
        assert (reader.path, reader.first_lsn, reader.durable_lsn) == (LOG, 1, 6)
    assert set(files.operations) == {"open", "pread"}
    assert files.contents(LOG) == before
    assert append(log, b"record 7") == 7


async def test_a_reader_follows_the_owner_through_rotations_and_truncations(
    autojump_clock: trio.testing.MockClock,
) -> None:
    files = log_of(1)
    async with (
        open_wal(files) as wal,
        trio_wal.open_reader(LOG, files=files) as reader,
        reader.follow() as records,
    ):
        await take(records, 1)
        for first in range(2, 30, 4):
            for data in payloads(4, first):
                await wal.append(data)
            await wal.truncate_before(first)
            assert await take(records, 4) == list(numbered(payloads(4, first), first))
            assert reader.first_lsn == wal.first_lsn


async def test_a_reader_of_a_dead_log_sees_what_is_known_to_be_durable() -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=64 * KiB)
    for data in payloads(3):
        append(log, data)
    log.write([b"record 4"], 3, sync=False)
    dead = files.crash_image(kind="kill")
    async with trio_wal.open_reader(LOG, files=dead) as reader:
        assert reader.durable_lsn == 3
    after_power_loss = files.crash_image(seed=2)
    async with trio_wal.open_reader(LOG, files=after_power_loss) as reader:
        # The last frame's own sync has no witness.
        assert reader.durable_lsn in (2, 3)
        assert await read(reader) == list(numbered(payloads(reader.durable_lsn)))


async def test_the_end_of_a_reader_is_told_by_the_log(
    autojump_clock: trio.testing.MockClock,
) -> None:
    files = log_of(6)
    log = open_log(files)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        async with reader.follow() as records:
            await take(records, 6)
            log.truncate_after(3)
            with pytest.raises(LsnTruncatedError), trio.fail_after(60):
                await records.__anext__()
        append(log, b"four")
        assert (await read(reader))[2:] == [(3, b"record 3"), (4, b"four")]


@pytest.mark.parametrize("event", ["recovery", "truncation", "rotation"])
async def test_a_follower_notices_another_segment_under_the_same_name(
    event: str, autojump_clock: trio.testing.MockClock
) -> None:
    files = MemoryFiles()
    log = open_log(files)
    if event != "rotation":
        append(log, b"one")
    async with trio_wal.open_reader(LOG, files=files) as reader, reader.follow() as records:
        names, due, data = files.names(LOG), 1, b"another"
        if event == "recovery":
            assert await take(records, 1) == [(1, b"one")]
            log.close(orderly=False)
            log = open_log(files)
            due = 2
        elif event == "truncation":
            log.truncate_after(0)
        else:
            data = bytes(10_000)  # the empty segment has no room for it
        append(log, data)
        assert files.names(LOG) == names
        assert await take(records, 1) == [(due, data)]


async def test_the_durable_lsn_of_a_reader_does_not_fall_when_the_lock_file_goes(
    tmp_path: Path,
) -> None:
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=64 * KiB)
    for data in payloads(3):
        append(log, data)
    async with trio_wal.open_reader(tmp_path) as reader, reader.follow() as records:
        assert len(await take(records, 3)) == 3
        (tmp_path / "lock").unlink()
        assert reader.durable_lsn == 3
        append(log, b"record 4")
        append(log, b"record 5")
        assert await take(records, 1) == [(4, b"record 4")], "the next frame is the witness"
    log.close()


async def test_many_followers_share_a_reader(tmp_path: Path) -> None:
    log: LogDirectory = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    append(log, b"record 1")
    async with trio_wal.open_reader(tmp_path) as reader:
        found: list[Pairs] = []

        async def follow() -> None:
            async with reader.follow() as records:
                found.append(await take(records, 50))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(follow)
            for data in payloads(49, 2):
                append(log, data)
                await trio.lowlevel.checkpoint()
    log.close()
    assert found == [list(numbered(payloads(50)))] * 5


async def test_a_follower_looks_for_news_now_and_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    files = log_of(1)
    async with trio_wal.open_reader(LOG, files=files) as reader, reader.follow(2) as records:
        with trio.move_on_after(100 * POLL_SECONDS):
            await records.__anext__()
        assert files.operations["pread"] < 1000


async def test_a_log_that_is_only_being_created_is_empty() -> None:
    files = MemoryFiles()
    images: list[MemoryFiles] = []
    files.after_operation = lambda operation, path: images.append(files.crash_image(kind="kill"))
    open_log(files)
    created = 0
    for image in images:
        if "log.meta" not in image.names(LOG):
            with pytest.raises(WrongDirectoryError, match=r"^/log: this is neither a log nor"):
                await trio_wal.open_reader(LOG, files=image).__aenter__()
            continue
        async with trio_wal.open_reader(LOG, files=image) as reader:
            created += 1
            assert (reader.first_lsn, reader.durable_lsn) == (1, 0)
            assert await read(reader) == []
    assert created > 3


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], r"^/log: this is neither a log nor a database: it is empty: use "),
        (["thesis.tex"], r"^/log: this is neither .*: it holds 'thesis\.tex': use "),
        (["log"], r"^/log: this is a database: use open_reader\('/log/log'\); nothing was mod"),
        (["log", "store"], r"^/log: this is a database: use open_reader\('/log/log'\); "),
        (["log", "src"], r"^/log: this is neither .*: it holds 'log': use "),
    ],
)
async def test_a_directory_without_a_log_is_refused(names: list[str], match: str) -> None:
    files = MemoryFiles()
    files.open_directory(LOG, create=True)
    for name in names:
        files.write_file(LOG, name, b"")
    with pytest.raises(WrongDirectoryError, match=match):
        async with trio_wal.open_reader(LOG, files=files):
            pass


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("log.meta", r"^/log/log\.meta: at offset 0: log\.meta cut short: 0 of 512"),
        ("wal-00000000000000000001.log", r"^/log/log\.meta: at offset 0: the file is missing"),
    ],
)
async def test_what_is_left_of_a_log_is_damage(name: str, match: str) -> None:
    files = MemoryFiles()
    files.write_file(LOG, name, b"")
    with pytest.raises(CorruptLogError, match=match):
        await trio_wal.open_reader(LOG, files=files).__aenter__()


async def test_a_log_that_is_taken_away_from_its_reader_is_damage() -> None:
    files = log_of(3)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        for name in files.names(LOG):
            files.remove_file(LOG, name)
        with pytest.raises(CorruptLogError, match=r"^/log/log\.meta: .*: the file is missing"):
            await read(reader)


async def test_a_directory_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    for reader in (
        trio_wal.open_reader(LOG, files=MemoryFiles()),
        trio_wal.open_reader(tmp_path / "nothing"),
    ):
        with pytest.raises(FileNotFoundError):
            async with reader:
                pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WrongDirectoryError, match=r"/file: this is not a directory: use a dir"):
        async with trio_wal.open_reader(tmp_path / "file"):
            pass


async def test_a_log_from_the_future_is_not_read() -> None:
    files = log_of(1)
    data = bytearray(files.read_file(LOG, "log.meta"))
    data[8] = 2
    data[BLOCK - 4 :] = crc32c(bytes(data[: BLOCK - 4])).to_bytes(4, "little")
    files.write_file(LOG, "log.meta", bytes(data))
    with pytest.raises(UnsupportedFormatError, match=r"^/log/log\.meta: format version 2 is not"):
        async with trio_wal.open_reader(LOG, files=files):
            pass


@pytest.mark.parametrize("real", [False, True])
async def test_a_closed_reader_reads_no_more(real: bool, tmp_path: Path) -> None:
    path = str(tmp_path) if real else LOG
    files: Any = OsFiles() if real else MemoryFiles()
    log = open_log_directory(files, path, segment_size=TINY)
    append(log, b"a")
    async with trio_wal.open_reader(path, files=files) as reader, reader.follow() as records:
        await take(records, 1)
        with trio.testing.assert_checkpoints():
            await reader.aclose()
        await reader.aclose()
        calls: list[Callable[[], Any]] = [
            reader.read,
            reader.follow,
            lambda: reader.first_lsn,
            lambda: reader.durable_lsn,
        ]
        for call in calls:
            with pytest.raises(trio.ClosedResourceError, match=r": this reader is closed$"):
                call()
        with pytest.raises(trio.ClosedResourceError):
            await records.__anext__()
    log.close()


@pytest.mark.parametrize("again", [owner, onlooker])
async def test_an_opener_is_for_one_use(again: Any) -> None:
    files = log_of(1)
    opener = trio_wal.open_reader(LOG, files=files) if again is onlooker else open_wal(files)
    async with opener:
        pass
    with pytest.raises(
        RuntimeError,
        match=r"^open_(reader|wal)\(\) gives a context manager that can be used only once$",
    ):
        async with opener:
            pass


async def test_a_compressed_log_is_read_like_any_other() -> None:
    batches = [[b"a" * 5000, b"b"], [b"c" * 3000], [b"d"]]
    files = make_log(*batches, compression="zstd")
    for look in (owner, onlooker):
        async with look(files) as log:
            assert await read(log) == list(numbered([b"a" * 5000, b"b", b"c" * 3000, b"d"]))
            assert await read(log, 2, 4) == [(2, b"b"), (3, b"c" * 3000)]


async def test_a_reader_is_told_where_a_segment_ends_before_the_next_one_begins() -> None:
    """Files of two copies of one log that went different ways: no thread may look for ever."""
    copies = []
    for first in ([b"1", b"2"], [b"1"]):
        files = MemoryFiles(seed=1)
        log = open_log(files)
        for data in first:
            append(log, data)
        log.rotate()
        append(log, b"last")
        log.close()
        copies.append(files)
    files, other = copies
    name = segments(files)[0]
    files.write_file(LOG, name, other.read_file(LOG, name))
    with pytest.raises(CorruptLogError, match=r": this segment does not continue wal-0+1\.log"):
        # Which of the two is the odd one nobody can tell.
        async with trio_wal.open_reader(LOG, files=files):
            pass
