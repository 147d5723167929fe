"""What a reader is told of damage, of stale and foreign files, and of logs that only change.

A reader must not take damage for the end, nor a change for damage: whoever reads beside the owner
knows less than the owner, and says what is proven.
"""

from __future__ import annotations

import select
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from helpers import Call, descriptors, until
from logs import LOG, TINY, append, copy_of, make_log, numbered, open_log, segments
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal import Bookmark, CorruptLogError, LsnTruncatedError
from trio_wal._cli.inspect import _look
from trio_wal._disk.chain import META_NAME, list_chain, read_meta
from trio_wal._disk.cursor import Cursor
from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.frame import BLOCK, DATA_OFFSET, POINTER_OFFSET
from trio_wal._disk.opening import open_log_directory
from trio_wal._disk.verify import verify
from trio_wal._engine import Moved
from trio_wal._files import Watch, Word
from trio_wal._system.files import OsDirectory, OsFiles
from trio_wal._watchsource import WatchSource
from trio_wal._worker import Blocking
from trio_wal.testing import MemoryFiles

Pairs = list[tuple[int, bytes]]


def payloads(count: int, first: int = 1) -> list[bytes]:
    return [b"record %d" % n for n in range(first, first + count)]


def log_of(count: int, *, close: bool, **options: Any) -> MemoryFiles:
    """One record a frame."""
    return make_log(*([data] for data in payloads(count)), close=close, **options)


async def read(log: Any, start: Any = None, stop: int | None = None) -> Pairs:
    async with log.read(start, stop) as records:
        return [(record.lsn, record.data) async for record in records]


async def read_to_damage(stream: Any) -> tuple[Pairs, CorruptLogError]:
    """What a stream gives before it says that the log is damaged."""
    found: Pairs = []
    with trio.fail_after(60), pytest.raises(CorruptLogError) as caught:
        await drain(stream, found)
    return found, caught.value


async def drain(stream: Any, found: Pairs) -> None:
    async with stream as records:
        async for record in records:
            found.append((record.lsn, record.data))


# -- damage at the end -----------------------------------------------------------------------


def frame_of(lsn: int) -> int:
    """Where the frame of a record stands in a log of one segment."""
    return DATA_OFFSET + (lsn - 1) * BLOCK


def flip_header(files: MemoryFiles, lsn: int) -> None:
    files.flip_bit(LOG, segments(files)[-1], 8 * (frame_of(lsn) + 20))


def flip_body(files: MemoryFiles, lsn: int) -> None:
    files.flip_bit(LOG, segments(files)[-1], 8 * (frame_of(lsn) + 70))


def zero_sector(files: MemoryFiles, lsn: int) -> None:
    name = segments(files)[-1]
    data = bytearray(files.read_file(LOG, name))
    data[frame_of(lsn) : frame_of(lsn) + BLOCK] = bytes(BLOCK)
    files.write_file(LOG, name, bytes(data))


def cut_file(files: MemoryFiles, lsn: int) -> None:
    name = segments(files)[-1]
    files.write_file(LOG, name, files.read_file(LOG, name)[: frame_of(lsn)])


@pytest.mark.parametrize("close", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("damage", [flip_header, flip_body, zero_sector, cut_file])
@pytest.mark.parametrize("lsn", [1, 4, 8])
@pytest.mark.parametrize("way", ["read", "follow"])
async def test_damage_in_the_last_segment_is_not_taken_for_the_end(
    close: bool, damage: Any, lsn: int, way: str, autojump_clock: MockClock
) -> None:
    files = log_of(8, close=close, segment_size=1 << 20)
    damage(files, lsn)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert reader.durable_lsn == 8, "the owner's word, a pointer or a later frame proves it"
        found, error = await read_to_damage(getattr(reader, way)())
        assert found == list(numbered(payloads(lsn - 1)))
        assert error.path == f"{LOG}/{segments(files)[0]}"
        assert error.offset == frame_of(lsn)
        # Whoever asks for less is not concerned.
        assert await read(reader, stop=lsn) == found


@pytest.mark.parametrize("lsn", [2, 7])
async def test_a_later_frame_proves_a_loss_without_the_owners_word(
    lsn: int, autojump_clock: MockClock
) -> None:
    """As after a power cut, which the lock file does not survive."""
    files = log_of(8, close=False, segment_size=1 << 20)
    flip_header(files, lsn)
    files = files.crash_image()
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert reader.durable_lsn == 7
        found, error = await read_to_damage(reader.read())
        assert found == list(numbered(payloads(lsn - 1)))
        assert f"says that LSN {lsn} had been durable" in error.reason or lsn == 7


async def test_a_pointer_proves_what_is_before_the_mark_of_a_close() -> None:
    """The mark itself is damaged, and nobody's word has survived."""
    files = log_of(8, close=True, segment_size=1 << 20)
    flip_header(files, 9)
    files = files.crash_image()
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert reader.durable_lsn == 8
        assert await read(reader) == list(numbered(payloads(8)))


async def test_an_unfinished_batch_is_the_end_and_no_damage() -> None:
    files = log_of(8, close=False, segment_size=1 << 20)
    flip_header(files, 8)
    files = files.crash_image()
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert reader.durable_lsn == 6
        assert await read(reader) == list(numbered(payloads(6)))


async def test_the_owners_word_is_proof_only_in_its_own_history(autojump_clock: MockClock) -> None:
    """A lock file may be older than the truncation, after a power cut."""
    files = log_of(8, close=False)
    log = open_log(files)
    log.truncate_after(3)
    append(log, b"4")
    log.close(orderly=False)
    folder = files._folder(LOG)
    word = folder.published
    # One that was read while it was written has an LSN of one epoch, and names none.
    for epoch in (0, None):
        folder.published = word._replace(durable_lsn=8, epoch=epoch)
        async with trio_wal.open_reader(LOG, files=files) as reader:
            assert [lsn for lsn, _ in await read(reader)] == [1, 2, 3]
    folder.published = word._replace(durable_lsn=8)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        found, error = await read_to_damage(reader.read())
        assert [lsn for lsn, _ in found] == [1, 2, 3, 4]
        assert error.reason.endswith("the log's owner has said that LSN 8 is durable")


@pytest.mark.parametrize("close", [True, False], ids=["closed", "killed"])
@pytest.mark.parametrize("way", ["read", "follow"])
async def test_the_last_segments_file_is_missed(
    close: bool, way: str, autojump_clock: MockClock
) -> None:
    files = log_of(8, close=close)
    last = segments(files)[-1]
    files.remove_file(LOG, last)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        found, error = await read_to_damage(getattr(reader, way)())
        assert found == list(numbered(payloads(6)))
        assert error.path == f"{LOG}/{last}"
        assert error.reason.startswith("segment 4 is missing: ")
        assert await read(reader, stop=5) == found[:4]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("change", ["remove", "header", "foreign"])
async def test_a_segment_that_cannot_be_used_ends_what_is_given(
    number: int, change: str, autojump_clock: MockClock
) -> None:
    files = log_of(8, close=True)
    name = segments(files)[number]
    if change == "remove":
        files.remove_file(LOG, name)
    elif change == "header":
        files.flip_bit(LOG, name, 8 * 60)
    else:
        data = bytearray(files.read_file(LOG, name))
        data[24:40] = b"another log's id"
        data[508:512] = trio_wal._disk.frame.crc32c(bytes(data[:508])).to_bytes(4, "little")
        files.write_file(LOG, name, bytes(data))
    if number == 0:
        with pytest.raises(CorruptLogError):
            async with trio_wal.open_reader(LOG, files=files):
                pass
        return
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert reader.durable_lsn >= 2 * number
        found, error = await read_to_damage(reader.read())
        assert found == list(numbered(payloads(2 * number)))
        assert error.path.startswith(f"{LOG}/wal-")


async def test_a_follower_sees_damage_that_comes_while_it_waits(autojump_clock: MockClock) -> None:
    files = log_of(4, close=True)
    async with (
        trio_wal.open_reader(LOG, files=files) as reader,
        reader.follow() as records,
        trio.open_nursery() as nursery,
    ):
        for _ in range(4):
            await records.__anext__()

        async def follow() -> None:
            with pytest.raises(CorruptLogError, match="is sealed"):
                await records.__anext__()

        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        files.remove_file(LOG, segments(files)[-1])


async def test_a_stray_name_is_told_after_everything_was_given(autojump_clock: MockClock) -> None:
    files = log_of(4, close=True)
    files.write_file(LOG, "wal-7.log", b"")
    async with trio_wal.open_reader(LOG, files=files) as reader:
        found, error = await read_to_damage(reader.read())
        assert found == list(numbered(payloads(4)))
        assert (error.path, error.reason) == (
            f"{LOG}/wal-7.log",
            "this is not the name of a segment",
        )


# -- the chain --------------------------------------------------------------------------------


def a_stale_copy(number: int) -> tuple[MemoryFiles, str]:
    """A log in which one segment is of the time before a truncation: same log, same number, same
    LSN."""
    files = MemoryFiles(seed=7)
    log = open_log(files)
    for data in payloads(12):
        append(log, data)
    name = segments(files)[number]
    stale = files.read_file(LOG, name)
    log.truncate_after(2)
    for lsn in range(3, 15):
        append(log, b"another %d" % lsn)
    log.close()
    assert name in segments(files)
    files.write_file(LOG, name, stale)
    return files, name


@pytest.mark.parametrize("number", [2, 3, 4])
async def test_a_stale_copy_of_a_segment_is_never_read(
    number: int, autojump_clock: MockClock
) -> None:
    files, _ = a_stale_copy(number)
    with pytest.raises(CorruptLogError):
        open_log(copy_of(files), verify_bytes=0)
    whole = [(1, b"record 1"), (2, b"record 2")]
    whole += [(lsn, b"another %d" % lsn) for lsn in range(3, 2 * number + 1)]
    async with trio_wal.open_reader(LOG, files=files) as reader:
        for way in (reader.read, reader.follow):
            found, _ = await read_to_damage(way())
            assert found == whole
        for start in range(2 * number + 1, 15):
            found, _ = await read_to_damage(reader.read(start))
            assert found == []


async def test_a_segment_that_is_replaced_under_a_reader_is_not_read(
    autojump_clock: MockClock,
) -> None:
    files, name = a_stale_copy(3)
    stale = files.read_file(LOG, name)
    files, _ = a_stale_copy(4)
    good = MemoryFiles(seed=7)
    log = open_log(good)
    for data in payloads(12):
        append(log, data)
    log.truncate_after(2)
    for lsn in range(3, 15):
        append(log, b"another %d" % lsn)
    log.close()
    async with trio_wal.open_reader(LOG, files=good) as reader, reader.read() as records:
        found = [(r.lsn, r.data) for r in [await records.__anext__() for _ in range(2)]]
        records._reading.ready.clear()
        records._reading._renew_cursor()
        records._reading._next = 3
        good.write_file(LOG, name, stale)
        error = None
        try:
            async for record in records:
                found.append((record.lsn, record.data))  # noqa: PERF401  (up to the error)
        except CorruptLogError as exc:
            error = exc
    assert error is not None
    assert found == [
        (1, b"record 1"),
        (2, b"record 2"),
        *((lsn, b"another %d" % lsn) for lsn in range(3, 7)),
    ]


async def test_segments_without_a_footer_are_checked_where_they_join(
    autojump_clock: MockClock,
) -> None:
    """A rotation was interrupted, and the next segment is a stale one."""
    files = MemoryFiles(seed=7)
    log = open_log(files)
    for data in payloads(4):
        append(log, data)
    stale_name = segments(files)[-1]
    stale = files.read_file(LOG, stale_name)
    log.truncate_after(1)
    append(log, b"another 2")
    log.close(orderly=False)
    assert [int(name[4:24]) for name in segments(files)] == [1, 2]
    header = trio_wal._disk.frame.decode_segment_header(stale)
    assert header.number == 2
    # Between a truncation and its footer.
    name = segments(files)[0]
    data = bytearray(files.read_file(LOG, name))
    data[POINTER_OFFSET : POINTER_OFFSET + BLOCK] = bytes(BLOCK)
    data[DATA_OFFSET + BLOCK :] = bytes(len(data) - DATA_OFFSET - BLOCK)
    files.write_file(LOG, name, bytes(data))
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert await read(reader, stop=2) == [(1, b"record 1")]
    files.remove_file(LOG, segments(files)[1])
    files.write_file(LOG, stale_name, stale)
    with pytest.raises(CorruptLogError, match="does not continue"):
        # Which of the two is the odd one nobody can tell.
        async with trio_wal.open_reader(LOG, files=files):
            pass


def a_stale_end(frames: int, *, sealed: bool) -> MemoryFiles:
    """A log in which a segment is of the time before a truncation to just before it: it begins
    as the right one does."""
    files = MemoryFiles(seed=7)
    log = open_log(files)
    for data in payloads(2 + frames):
        append(log, data)
    name = segments(files)[-1]
    if sealed:
        log.rotate()
    stale = files.read_file(LOG, name)
    log.truncate_after(2)
    for lsn in range(3, 10):
        append(log, b"another %d" % lsn)
    log.close()
    assert segments(files)[1] == name
    files.write_file(LOG, name, stale)
    return files


@pytest.mark.parametrize("way", ["read", "follow"])
@pytest.mark.parametrize(
    ("frames", "sealed"), [(1, False), (2, False), (2, True)], ids=["one", "all", "sealed"]
)
async def test_what_does_not_come_to_the_next_segment_is_not_given(
    frames: int, sealed: bool, way: str, autojump_clock: MockClock
) -> None:
    files = a_stale_end(frames, sealed=sealed)
    with pytest.raises(CorruptLogError):
        open_log(copy_of(files), verify_bytes=0)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        found, error = await read_to_damage(getattr(reader, way)())
        assert found == list(numbered(payloads(2)))
        assert "does not continue" in error.reason


async def test_the_last_records_of_a_segment_are_given_only_when_it_joins_the_next(
    autojump_clock: MockClock,
) -> None:
    """Whoever has taken them begins in the next one, and sees no more that they do not fit."""
    files = a_stale_end(2, sealed=False)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        source = reader._source
        chain = list_chain(files.open_directory(LOG), source.meta)
        # As if the look had not seen it.
        source._seen = attrs.evolve(source._seen, segments=tuple(chain.segments), damage=None)
        cursor = Cursor(source, 1)
        found: Pairs = []
        error: CorruptLogError | None = None
        try:
            while cursor.next_lsn < 10:
                found += [(record.lsn, record.data) for record in cursor.chunk(10)]
        except CorruptLogError as exc:
            error = exc
        cursor.leave()
        assert error is not None
        assert [lsn for lsn, _ in found] == [1, 2, 3]


async def test_damage_in_a_segment_that_has_no_footer_yet_is_told_where_it_is(
    autojump_clock: MockClock,
) -> None:
    files = log_of(8, close=True)
    name = segments(files)[-2]
    data = bytearray(files.read_file(LOG, name))
    data[POINTER_OFFSET : POINTER_OFFSET + BLOCK] = bytes(BLOCK)
    data[DATA_OFFSET + BLOCK + 20] ^= 1
    files.write_file(LOG, name, bytes(data))
    async with trio_wal.open_reader(LOG, files=files) as reader:
        found, error = await read_to_damage(reader.read())
        assert found == list(numbered(payloads(5)))
        assert (error.path, error.offset) == (f"{LOG}/{name}", DATA_OFFSET + BLOCK)


async def test_a_segment_that_is_replaced_when_others_go_is_damage(
    autojump_clock: MockClock,
) -> None:
    """The new last segment is one that was looked at long ago."""
    files = log_of(10, close=True)
    names = segments(files)
    async with trio_wal.open_reader(LOG, files=files) as reader, reader.follow() as records:
        for _ in range(10):
            await records.__anext__()
        data = bytearray(files.read_file(LOG, names[1]))
        header = trio_wal._disk.frame.decode_segment_header(bytes(data))
        data[:BLOCK] = replace(header, salt=bytes(16)).encode()
        files.write_file(LOG, names[1], bytes(data))
        for name in names[2:]:
            files.remove_file(LOG, name)
        with trio.fail_after(60), pytest.raises(CorruptLogError):
            await records.__anext__()


@pytest.mark.parametrize("start", [7, Bookmark(6, 0)], ids=["lsn", "bookmark"])
async def test_what_is_beyond_damage_is_not_another_history(
    start: Any, autojump_clock: MockClock
) -> None:
    """Whoever asks must not be told to go back."""
    files = log_of(8, close=True)
    first, second = segments(files)[:2]
    data = files.read_file(LOG, second)
    files.write_file(LOG, second, files.read_file(LOG, first))
    files.write_file(LOG, first, data)
    files.write_file(LOG, first, files.read_file(LOG, second))
    for name in segments(files)[2:]:
        files.remove_file(LOG, name)
    folder = files._folder(LOG)
    folder.published = folder.published._replace(durable_lsn=0, epoch=None)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert reader.durable_lsn < 6
        _, error = await read_to_damage(reader.read(start))
        assert error.path == f"{LOG}/{second}"


async def test_a_stray_name_that_comes_and_goes_is_damage_while_it_is_there(
    autojump_clock: MockClock,
) -> None:
    files = log_of(4, close=True)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert await read(reader) == list(numbered(payloads(4)))
        files.write_file(LOG, "wal-7.log", b"")
        found, error = await read_to_damage(reader.read())
        assert found == list(numbered(payloads(4)))
        assert error.path == f"{LOG}/wal-7.log"
        files.remove_file(LOG, "wal-7.log")
        assert await read(reader) == list(numbered(payloads(4)))


@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_segment_that_is_put_right_is_read_by_a_reader_that_has_seen_it_damaged(
    number: int, autojump_clock: MockClock
) -> None:
    files = log_of(8, close=True)
    name = segments(files)[number]
    sound = files.read_file(LOG, name)
    data = bytearray(sound)
    data[24:40] = b"another log's id"
    files.write_file(LOG, name, bytes(data))
    async with trio_wal.open_reader(LOG, files=files) as reader:
        await read_to_damage(reader.read())
        files.write_file(LOG, name, sound)
        assert await read(reader) == list(numbered(payloads(8)))


# -- the end was cut, and the owner has not yet said so -----------------------------------------


async def test_what_a_cut_leaves_is_durable_before_the_owner_says_so(
    autojump_clock: MockClock,
) -> None:
    files = MemoryFiles(seed=7)
    log = open_log(files, segment_size=1 << 20)
    append(log, b"1")
    append(log, b"2", b"3", b"4", b"5")
    append(log, b"6")
    folder = files._folder(LOG)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert reader.durable_lsn == 6
        log.truncate_after(4)
        assert (folder.published.durable_lsn, folder.published.epoch) == (6, 0)
        assert reader.durable_lsn == 4
        assert [lsn for lsn, _ in await read(reader)] == [1, 2, 3, 4]
        async with reader.follow(Bookmark(4, 0)) as records:
            append(log, b"another 5")
            assert (await records.__anext__()).data == b"another 5"
    log.close(orderly=False)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert reader.durable_lsn == 5


async def test_a_cut_between_the_look_at_the_history_and_the_owners_word_is_seen() -> None:
    files = MemoryFiles(seed=7)
    log = open_log(files, segment_size=1 << 20)
    for data in payloads(6):
        append(log, data)
    directory = files.open_directory(LOG)
    source = WatchSource(directory, Blocking(threaded=False))
    whole, cuts = directory.published, [4]

    def published() -> Word:
        if cuts:
            log.truncate_after(cuts.pop())
            log.publish()
        return whole()

    directory.published = published  # type: ignore[method-assign]
    source.look()
    assert (source.tail.durable_lsn, source.tail.history) == (4, log.history)


@pytest.mark.parametrize("other", [0, 2])
async def test_the_owner_reads_no_file_that_took_the_place_of_another(
    other: int, autojump_clock: MockClock
) -> None:
    """A sound segment of this very log, under the name of another one."""
    files = log_of(8, close=True)
    names = segments(files)
    async with trio_wal.open_wal(LOG, files=files, segment_size=TINY) as wal:
        files.write_file(LOG, names[1], files.read_file(LOG, names[other]))
        found, error = await read_to_damage(wal.read())
    assert found == list(numbered(payloads(2)))
    assert (error.path, error.reason) == (
        f"{LOG}/{names[1]}",
        "another segment stands in the place of this one",
    )


async def test_a_follower_that_was_given_the_lost_end_is_told_of_damage(
    autojump_clock: MockClock,
) -> None:
    files = log_of(9, close=False)
    async with trio_wal.open_reader(LOG, files=files) as reader, reader.follow() as records:
        for _ in range(9):
            await records.__anext__()
        files.remove_file(LOG, segments(files)[-1])
        with trio.fail_after(60), pytest.raises(CorruptLogError, match="is sealed"):
            await records.__anext__()


# -- what a crash leaves ------------------------------------------------------------------------


class _EveryImage:
    """Looks at what a kill would leave after every operation on the files."""

    def __init__(self, files: MemoryFiles) -> None:
        self.files = files
        self.images = 0
        files.after_operation = lambda operation, path: self.look()

    def look(self) -> None:
        image = copy_of(self.files)
        directory = image.open_directory(LOG)
        meta = read_meta(directory) if META_NAME in directory.names() else None
        if meta is None or not meta.live:
            return
        self.images += 1
        source = WatchSource(directory, Blocking(threaded=False))
        source.look()
        assert source.damage is None
        verification = verify(directory)
        assert verification.findings == ()
        log = _look(directory)
        assert log.findings == ()
        assert (log.first_lsn, log.durable_lsn) == (source.tail.first_lsn, source.tail.durable_lsn)
        cursor = Cursor(source, source.tail.first_lsn)
        while cursor.next_lsn <= source.tail.durable_lsn:
            cursor.chunk(source.tail.durable_lsn + 1)
        cursor.leave()


@pytest.mark.parametrize("segment_size", [TINY, 1 << 20])
@pytest.mark.parametrize("orderly", [True, False])
def test_no_state_that_a_kill_leaves_is_called_damaged(segment_size: int, orderly: bool) -> None:
    files = MemoryFiles(seed=7)
    every = _EveryImage(files)
    for life in range(3):
        log = open_log(files, segment_size=segment_size)
        for lsn in range(log.last_lsn + 1, log.last_lsn + 4):
            append(log, b"%d" % lsn, b"x" * 100)
        log.write([b"not synced"], log.synced_lsn, sync=False)
        log.write([b"nor this"], log.synced_lsn, sync=False)
        if life == 1:
            log.truncate_after(log.last_lsn - 3)
            append(log, b"another")
        log.rotate()
        append(log, b"last but one")
        if life == 2:
            log.drop_before(log.last_lsn - 3)
        log.write([b"last"], log.synced_lsn, sync=False)
        log.close(orderly=orderly)
    assert every.images > 100


# -- another log in the same place -------------------------------------------------------------


async def test_a_reader_does_not_go_on_in_another_log(autojump_clock: MockClock) -> None:
    files = log_of(10, close=True)
    async with trio_wal.open_reader(LOG, files=files) as reader, reader.follow() as records:
        found = [await records.__anext__() for _ in range(10)]
        for name in files.names(LOG):
            files.remove_file(LOG, name)
        shadow = MemoryFiles(seed=8)
        log = open_log(shadow)
        for _ in range(15):
            append(log, b"of another log")
        log.close()
        for name, data in shadow.contents(LOG).items():
            files.write_file(LOG, name, data)
        for _ in range(2):
            with pytest.raises(CorruptLogError, match="another log stands here now"):
                await records.__anext__()
        with pytest.raises(CorruptLogError, match="another log stands here now"):
            _ = reader.durable_lsn
    assert [record.lsn for record in found] == list(range(1, 11))


async def test_a_look_while_the_log_is_made_anew_does_not_confuse_a_reader(
    autojump_clock: MockClock,
) -> None:
    """log.meta says that nothing is here yet: that is another log, too, and no IndexError."""
    files = log_of(4, close=True)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert reader.durable_lsn == 4
        meta = trio_wal._disk.frame.decode_meta(files.read_file(LOG, "log.meta"))
        anew = trio_wal._disk.frame.Meta(b"another log's id", 1, 1)
        files.write_file(LOG, "log.meta", anew.encode())
        for _ in range(3):
            with pytest.raises(CorruptLogError, match="another log stands here now"):
                _ = reader.durable_lsn
        files.write_file(LOG, "log.meta", meta.encode())
        assert reader.durable_lsn == 4
        assert await read(reader) == list(numbered(payloads(4)))


# -- logs that only change ----------------------------------------------------------------------


def test_threads_that_look_and_locate_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Streams of one reader beside an owner who rotates and drops."""
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    for data in payloads(12):
        append(log, data)
    reader = OsFiles().open_directory(str(tmp_path))
    source = WatchSource(reader, None)  # type: ignore[arg-type]
    source.look()
    errors: list[BaseException] = []
    done = threading.Event()

    def stream() -> None:
        try:
            while not done.is_set():
                source.look()
                first = source.tail.first_lsn
                cursor = Cursor(source, first)
                try:
                    while cursor.next_lsn <= source.tail.durable_lsn:
                        for record in cursor.chunk(source.tail.durable_lsn + 1):
                            assert record.data == b"record %d" % record.lsn
                except (Moved, CorruptLogError):
                    # To be looked at again, as a stream does; what must not be is below.
                    source.look()
                    assert source.damage is None
                finally:
                    cursor.leave()
        except BaseException as exc:  # noqa: BLE001  (the test looks at it)
            errors.append(exc)

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(13, 80):
        append(log, b"record %d" % number)
        log.drop_before(log.last_lsn - 8)
    done.set()
    for thread in threads:
        thread.join()
    log.close()
    reader.close()
    assert not errors


class Step:
    """Something that the owner does between two looks of a reader."""

    def __init__(self, files: MemoryFiles) -> None:
        self.files = files
        self.done = False

    def __call__(self) -> None:
        if not self.done:
            self.done = True
            self.act()

    def act(self) -> None:
        log = open_log(self.files)
        append(log, b"record %d" % (log.last_lsn + 1))
        log.close(orderly=False)


@pytest.mark.parametrize("moment", ["locate", "look_at", "chunk"])
@pytest.mark.parametrize("given", range(6))
async def test_a_tail_that_recovery_copies_away_is_no_damage(
    monkeypatch: pytest.MonkeyPatch, moment: str, given: int, autojump_clock: MockClock
) -> None:
    """The owner was killed and opens the log again, while a stream is about to read its end."""
    files = log_of(6, close=False, segment_size=1 << 20)
    step = Step(files)
    target: Any = {"locate": WatchSource, "look_at": trio_wal._watchsource, "chunk": Cursor}[moment]
    original = getattr(target, moment)

    def first_the_owner(*args: Any) -> Any:
        step()
        return original(*args)

    async with trio_wal.open_reader(LOG, files=files) as reader, reader.follow() as records:
        found = [(r.lsn, r.data) for r in [await records.__anext__() for _ in range(given)]]
        records._reading.ready.clear()
        records._reading._renew_cursor()
        records._reading._next = given + 1
        monkeypatch.setattr(target, moment, first_the_owner)
        with trio.fail_after(60):
            while len(found) < 6:
                record = await records.__anext__()
                found.append((record.lsn, record.data))
    assert step.done
    assert found == list(numbered(payloads(6)))


async def test_a_reader_goes_on_when_it_was_overtaken_by_retention(
    autojump_clock: MockClock,
) -> None:
    files = log_of(8, close=False)
    async with trio_wal.open_reader(LOG, files=files) as reader, reader.read() as records:
        log = open_log(files)
        log.drop_before(6)
        log.close()
        with pytest.raises(LsnTruncatedError) as caught:
            await records.__anext__()
        assert caught.value.first_lsn == 5
        assert not isinstance(caught.value, trio_wal.LogDivergedError)
        assert [lsn for lsn, _ in await read(reader)] == [5, 6, 7, 8]


async def test_a_log_that_never_stands_still_is_looked_at_until_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long that takes: what looked damaged once was about to change."""
    files = log_of(4, close=True)
    name = segments(files)[1]
    good = files.read_file(LOG, name)
    looks = 0
    original = WatchSource._fingerprint

    def restless(self: WatchSource) -> Any:
        nonlocal looks
        looks += 1
        if looks == 40:
            files.write_file(LOG, name, good)
            files.remove_file(LOG, "wal-0.log")
        elif looks < 40:
            files.write_file(LOG, "wal-0.log", b"%d" % looks)
            names, meta = original(self)
            return (*names, f"wal-{looks}"), meta
        return original(self)

    files.remove_file(LOG, name)
    monkeypatch.setattr(WatchSource, "_fingerprint", restless)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        assert await read(reader) == list(numbered(payloads(4)))
    assert looks >= 40


async def test_damage_is_told_even_if_the_log_never_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = log_of(8, close=True)
    files.remove_file(LOG, segments(files)[1])
    looks = 0
    original = WatchSource._fingerprint

    def restless(self: WatchSource) -> Any:
        nonlocal looks
        looks += 1
        names, meta = original(self)
        return (*names, f"wal-{looks}"), meta

    monkeypatch.setattr(WatchSource, "_fingerprint", restless)
    async with trio_wal.open_reader(LOG, files=files) as reader:
        found, error = await read_to_damage(reader.read())
    assert found == list(numbered(payloads(2)))
    assert error.reason == f"segment 2 is missing: {segments(files)[1]} comes after it"


# -- news from another process ---------------------------------------------------------------------


async def test_a_change_of_the_files_wakes_a_follower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a clock: with a watch, nobody looks at the files in between."""
    if sys.platform != "linux":
        pytest.skip("inotify is Linux's")
    monkeypatch.setattr(trio_wal._watchsource, "WATCHED_POLL_SECONDS", 3600.0)
    monkeypatch.setattr(trio_wal._watchsource, "POLL_SECONDS", 3600.0)
    async with (
        trio_wal.open_wal(tmp_path / "log", segment_size=TINY) as wal,
        trio_wal.open_reader(tmp_path / "log") as reader,
        trio.open_nursery() as nursery,
    ):
        found: list[Pairs] = [[] for _ in range(4)]

        async def follow(pairs: Pairs) -> None:
            async with reader.follow() as records:
                async for record in records:
                    pairs.append((record.lsn, record.data))
                    if record.lsn == 30:
                        return

        for pairs in found:
            nursery.start_soon(follow, pairs)
        with trio.fail_after(60):
            for data in payloads(30):
                await wal.append(data)
                for pairs in found:
                    while not pairs or pairs[-1][1] != data:
                        await trio.lowlevel.checkpoint()
        assert all(pairs == list(numbered(payloads(30))) for pairs in found)


async def test_what_came_before_the_watch_is_told_to_all_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """One task makes the watch and looks; who waits meanwhile hears of what that look finds."""
    if sys.platform != "linux":
        pytest.skip("inotify is Linux's")
    monkeypatch.setattr(trio_wal._watchsource, "WATCHED_POLL_SECONDS", 3600.0)
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    source = WatchSource(OsFiles().open_directory(str(tmp_path)), Blocking(threaded=False))
    source.look()
    append(log, b"1")
    log.publish()
    look, may_look, told = source.refresh, trio.Event(), []

    async def refresh() -> None:
        await may_look.wait()
        await look()

    async def wait() -> None:
        told.append(await source.wait_beyond(0))

    monkeypatch.setattr(source, "refresh", refresh)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
            may_look.set()
    assert told == [True] * 3
    await source.aclose()
    log.close()


async def test_the_task_that_watches_for_all_can_be_cancelled(tmp_path: Path) -> None:
    async with (
        trio_wal.open_wal(tmp_path / "log") as wal,
        trio_wal.open_reader(tmp_path / "log") as reader,
        trio.open_nursery() as nursery,
    ):
        scopes, found = [trio.CancelScope() for _ in range(3)], []

        async def follow(number: int) -> None:
            async with reader.follow() as records:
                with scopes[number]:
                    found.append((number, (await records.__anext__()).data))

        for number in range(3):
            nursery.start_soon(follow, number)
            await trio.testing.wait_all_tasks_blocked(0.01)
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked(0.01)
        await wal.append(b"1")
        with trio.fail_after(60):
            while len(found) < 2:
                await trio.lowlevel.checkpoint()
        assert sorted(found) == [(1, b"1"), (2, b"1")]


@pytest.mark.parametrize("followers", [1, 3])
async def test_closing_a_reader_ends_those_who_wait_for_news(
    tmp_path: Path, followers: int
) -> None:
    before = descriptors(tmp_path)
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        await wal.append(b"1")
        inside = descriptors(tmp_path)
        async with trio.open_nursery() as nursery:
            reader_manager = trio_wal.open_reader(tmp_path / "log")
            reader = await reader_manager.__aenter__()
            entered: list[int] = []
            ended: list[int] = []

            async def follow() -> None:
                async with reader.follow(2) as records:
                    entered.append(1)
                    with pytest.raises(trio.ClosedResourceError):
                        await records.__anext__()
                    ended.append(1)

            for _ in range(followers):
                nursery.start_soon(follow)
            # A thread looks at the log first.
            await until(lambda: len(entered) == followers)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await reader_manager.__aexit__(None, None, None)
        assert len(ended) == followers
        # Other threads may just be looking into the directory.
        with trio.fail_after(60):
            await until(lambda: descriptors(tmp_path) <= inside)
    assert descriptors(tmp_path) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
async def test_who_comes_back_from_a_look_at_a_closed_reader_makes_no_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would close it."""
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    source = WatchSource(OsFiles().open_directory(str(tmp_path)), Blocking(threaded=True))
    await source.refresh()
    look, looking, go_on = source.look, threading.Event(), threading.Event()

    def slow() -> None:
        looking.set()
        assert go_on.wait(60)
        look()

    monkeypatch.setattr(source, "look", slow)
    made: list[int] = []
    async with trio.open_nursery() as nursery:
        call = Call(nursery, source.wait_beyond, 0)
        await until(looking.is_set)
        monkeypatch.setattr(OsDirectory, "watch", lambda self: made.append(1))
        nursery.start_soon(source.aclose)
        await wait_all_tasks_blocked()
        go_on.set()
    assert isinstance(call.error, trio.ClosedResourceError)
    assert not made
    log.close()


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
async def test_a_reader_that_is_closed_just_when_there_are_news_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    source = WatchSource(OsFiles().open_directory(str(tmp_path)), Blocking(threaded=True))
    await source.refresh()

    async def wait_readable(fd: int) -> None:
        await source.aclose()

    monkeypatch.setattr(trio.lowlevel, "wait_readable", wait_readable)
    with pytest.raises(trio.ClosedResourceError, match=r": this reader is closed$"):
        await source.wait_beyond(0)
    log.close()


async def test_where_there_is_no_watch_the_files_are_polled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio_wal._system.files.OsDirectory, "watch", lambda self: None)
    async with (
        trio_wal.open_wal(tmp_path / "log") as wal,
        trio_wal.open_reader(tmp_path / "log") as reader,
        reader.follow() as records,
    ):
        with trio.fail_after(60):
            for data in payloads(3):
                await wal.append(data)
                assert (await records.__anext__()).data == data


async def test_a_watch_that_tells_of_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system: what others change there is found by looking."""
    if sys.platform != "linux":
        pytest.skip("inotify is Linux's")
    monkeypatch.setattr(trio_wal._system.watch, "_IN_CHANGES", 0x400)  # only that it is unlinked
    monkeypatch.setattr(trio_wal._system.watch, "_IN_WORD", 0x400)
    monkeypatch.setattr(trio_wal._watchsource, "WATCHED_POLL_SECONDS", 0.05)
    async with (
        trio_wal.open_wal(tmp_path / "log") as wal,
        trio_wal.open_reader(tmp_path / "log") as reader,
        reader.follow() as records,
    ):
        given = 0
        with trio.fail_after(60):
            while reader._source._watchable:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(records.__anext__)
                    await trio.testing.wait_all_tasks_blocked()
                    await wal.append(b"record")
                given += 1
        assert given >= 1
        assert not reader._source._watchable


async def _watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[LogDirectory, WatchSource]:
    """A log, and a source that has its watch and waits no time for it to tell."""
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    source = WatchSource(OsFiles().open_directory(str(tmp_path)), Blocking(threaded=False))
    source.look()
    # The watch is made.
    await source._news()
    monkeypatch.setattr(trio_wal._watchsource, "WATCHED_POLL_SECONDS", 0.0)
    return log, source


@pytest.mark.parametrize("when", ["before it is asked", "while it is looked"])
async def test_a_watch_that_tells_just_when_it_is_looked_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """As with an owner that writes once a second."""
    if sys.platform != "linux":
        pytest.skip("inotify is Linux's")
    log, source = await _watched(tmp_path, monkeypatch)
    look, count = source.refresh, 0

    def commit() -> None:
        append(log, b"1")
        log.publish()

    class Late:
        """Readable only once it is too late."""

        def __init__(self, watch: Watch) -> None:
            self.fileno, self.close = watch.fileno, watch.close
            self.watch = watch

        def drain(self) -> bool:
            if when == "before it is asked" and not count:
                commit()
            return self.watch.drain()

    async def refresh() -> None:
        nonlocal count
        count += 1
        if count == 1 and when == "while it is looked":
            commit()
        await look()
        if count == 1:
            # What is told now and forgotten was not looked at.
            commit()

    assert source._watch is not None
    source._watch = Late(source._watch)
    monkeypatch.setattr(source, "refresh", refresh)
    await source._news()
    assert source._watchable
    if when == "while it is looked":
        assert (source.tail.durable_lsn, count) == (2, 2)
    else:
        assert (source.tail.durable_lsn, count) == (1, 1)
        assert select.select([source._watch], [], [], 0)[0]
    await source.aclose()
    log.close()


async def test_a_watch_is_not_given_up_for_what_it_need_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that has grown, or is about to be closed: only what is durable is news."""
    if sys.platform != "linux":
        pytest.skip("inotify is Linux's")
    log, source = await _watched(tmp_path, monkeypatch)
    size = log.active.file.size()
    with (tmp_path / log.active.header.name).open("r+b", buffering=0) as file:
        file.truncate(size + BLOCK)
        before = source._seen.evidence
        await source._news()
        assert source._seen.evidence != before
        assert source._watchable
    await source.aclose()
    log.close()


async def test_a_follower_stays_with_its_directory_when_that_is_renamed(tmp_path: Path) -> None:
    """It is known by its descriptor, the watch included."""
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        await wal.append(b"1")
        async with trio_wal.open_reader(tmp_path / "log") as reader, reader.follow() as records:
            await records.__anext__()
            (tmp_path / "log").rename(tmp_path / "moved")
            shutil.copytree(tmp_path / "moved", tmp_path / "log")
            await wal.append(b"2")
            with trio.fail_after(60):
                assert (await records.__anext__()).data == b"2"
            assert reader.bookmark == Bookmark(2, 0)
