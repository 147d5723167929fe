"""Which log, which history, which place in it: uuid, epoch, bookmark."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given, strategies as st
from logs import LOG, TINY, append, copy_of, make_log, numbered, open_log, records_of
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal import (
    Bookmark,
    CorruptLogError,
    LogDivergedError,
    LogFullError,
    LsnTruncatedError,
    UnsupportedFormatError,
)
from trio_wal._disk.frame import BLOCK, DATA_OFFSET, META_SIZE_MAX, FrameError, Meta, decode_meta
from trio_wal._disk.verify import verify
from trio_wal._files import Word
from trio_wal._identity import (
    PARTINGS_MAX,
    UNPARTED,
    Parting,
    branch,
    common_lsn,
    epoch_of,
    recalled,
)
from trio_wal._util import MiB
from trio_wal.testing import MemoryFiles

DB = "/db"


def open_wal(files: MemoryFiles, path: str = LOG, **options: Any) -> Any:
    return trio_wal.open_wal(path, files=files, segment_size=TINY, **options)


# -- bookmarks --------------------------------------------------------------------------------


def test_a_bookmark_is_written_short_and_read_back() -> None:
    assert str(Bookmark(1234, 0x5F3A09)) == "1234@5f3a09"
    assert Bookmark.parse("1234@5f3a09") == Bookmark(1234, 0x5F3A09)
    assert str(Bookmark(0, 0)) == "0@0"


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_every_bookmark_is_read_back(lsn: int, epoch: int) -> None:
    bookmark = Bookmark(lsn, epoch)
    assert Bookmark.parse(str(bookmark)) == bookmark
    assert hash(Bookmark.parse(str(bookmark))) == hash(bookmark)


@pytest.mark.parametrize(
    "text",
    ["", "1", "@", "1@", "@1", "01@1", "1@01", "-1@1", "1@-1", "1@g", "1@A", "1@1 ", " 1@1",
     "1@1\n", "1@1@1", "+1@1", "1_0@1", "\u0661@1", f"{10**19}@1", f"1@{2**63:x}", f"{2**63}@0"],
)  # fmt: skip
def test_what_is_no_bookmark_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(text must be a bookmark, such as|lsn|epoch) ?"):
        Bookmark.parse(text)


def test_bad_bookmarks_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^lsn must be at least 0"):
        Bookmark(-1, 0)
    with pytest.raises(ValueError, match=r"^epoch must be at least 0"):
        Bookmark(1, 2**63)
    with pytest.raises(TypeError, match=r"^lsn must be an int, not bool$"):
        Bookmark(True, 0)
    with pytest.raises(TypeError, match=r"^text must be a str, not bytes$"):
        Bookmark.parse(b"1@1")  # type: ignore[arg-type]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Bookmark(1, 0).lsn = 2  # type: ignore[misc]


# -- histories --------------------------------------------------------------------------------


def test_a_log_that_was_never_cut_has_one_epoch() -> None:
    assert epoch_of(()) == 0
    assert common_lsn((), 0) == UNPARTED
    assert common_lsn((), 1) is None


def test_a_place_is_common_up_to_the_lowest_parting_since() -> None:
    history = ()
    for lsn in (10, 30, 20, 25):
        history = branch(history, lsn, bytes(4))
    epochs = [parting.epoch for parting in history]
    assert epochs == [0, 1 << 32, 2 << 32, 3 << 32, 4 << 32]
    assert [common_lsn(history, epoch) for epoch in epochs] == [10, 20, 20, 25, UNPARTED]
    assert common_lsn(history, 7) is None


@given(st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4))
def test_epochs_grow_and_copies_part_with_different_ones(one: bytes, other: bytes) -> None:
    start = branch((), 5, one)
    first, second = branch(start, 7, one), branch(start, 7, other)
    assert epoch_of(first) > epoch_of(start) > 0
    assert (epoch_of(first) == epoch_of(second)) == (one == other)
    if one != other:
        assert common_lsn(first, epoch_of(second)) is None


def test_the_oldest_epochs_are_forgotten_first() -> None:
    history = ()
    for number in range(2 * PARTINGS_MAX):
        history = branch(history, 1000 + number, number.to_bytes(4, "little"))
    assert len(history) == PARTINGS_MAX
    assert common_lsn(history, 0) is None
    assert common_lsn(history, history[0].epoch) == 1000 + PARTINGS_MAX + 1
    meta = Meta(bytes(16), 1, 1, live=True, history=history)
    assert len(meta.encode()) == META_SIZE_MAX == 4096
    assert decode_meta(meta.encode()) == meta


def test_a_history_that_is_damaged_is_refused() -> None:
    history = branch(branch((), 5, b"abcd"), 4, b"efgh")
    data = Meta(bytes(16), 1, 1, live=True, history=history).encode()
    for bit in range(8 * 560):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode_meta(bytes(damaged))
    for size in range(512, 560):
        with pytest.raises(FrameError, match=r"^log\.meta declares 3 epochs and has"):
            decode_meta(data[:size])


@pytest.mark.parametrize(
    "history",
    [
        (Parting(5, 0), Parting(5, 0)),
        (Parting(5, 0), Parting(4, 0)),
        (Parting(0, 0), Parting(2**63, 0)),
        (Parting(0, 0), Parting(1, 2**63)),
    ],
)
def test_a_forged_history_is_refused(history: tuple[Parting, ...]) -> None:
    with pytest.raises(FrameError, match="epoch"):
        decode_meta(Meta(bytes(16), 1, 1, live=True, history=history).encode())


def test_a_log_without_a_history_is_written_as_it_always_was() -> None:
    data = Meta(bytes(range(16)), 1, 1, live=True).encode()
    assert len(data) == 512
    assert data[12:16] == bytes(4)
    assert Meta(bytes(16), 1, 1, history=branch((), 1, bytes(4))).encode()[12] == 16


# -- uuid and epoch ---------------------------------------------------------------------------


async def test_a_log_keeps_its_uuid_and_begins_with_epoch_0() -> None:
    files = MemoryFiles(seed=3)
    async with open_wal(files) as wal:
        name = wal.uuid
        assert isinstance(name, uuid.UUID)
        assert wal.epoch == 0
        await wal.append(b"1")
        assert wal.bookmark == Bookmark(1, 0)
        async with trio_wal.open_reader(LOG, files=files) as reader:
            assert (reader.uuid, reader.epoch, reader.bookmark) == (name, 0, Bookmark(1, 0))
    async with open_wal(files) as wal:
        assert (wal.uuid, wal.epoch) == (name, 0)
    async with open_wal(MemoryFiles(seed=4)) as other:
        assert other.uuid != name


async def test_the_epoch_grows_when_records_are_dropped_at_the_end_and_stays() -> None:
    files = MemoryFiles()
    epochs = []
    async with open_wal(files) as wal, trio_wal.open_reader(LOG, files=files) as reader:
        for number in range(1, 9):
            await wal.append(b"%d" % number)
        await wal.truncate_after(8)
        await wal.truncate_before(3)
        epochs.append(wal.epoch)
        for lsn in (6, 4):
            await wal.truncate_after(lsn)
            epochs.append(wal.epoch)
            assert wal.bookmark == Bookmark(lsn, wal.epoch)
            assert (reader.epoch, reader.bookmark) == (wal.epoch, wal.bookmark)
    assert epochs[0] == 0
    assert all(a < b for a, b in pairwise(epochs))
    async with open_wal(files) as wal:
        assert wal.epoch == epochs[-1]
        await wal.truncate_before(wal.last_lsn + 1)
        assert wal.epoch == epochs[-1]


async def test_a_bookmark_taken_while_the_log_is_cut_is_of_one_history() -> None:
    """The worker has cut the log; the task that waits for it has not run yet."""
    files = make_log([b"1"], [b"2"], [b"3"])
    async with open_wal(files) as wal, trio.open_nursery() as nursery:
        call, cut, go_on = wal._log.engine._worker.call, trio.Event(), trio.Event()

        async def late(job: Any) -> Any:
            result = await call(job)
            if wal._log.engine._directory.cuts:
                cut.set()
                await go_on.wait()
            return result

        wal._log.engine._worker.call = late
        nursery.start_soon(wal.truncate_after, 1)
        await cut.wait()
        assert wal.bookmark == Bookmark(3, 0)
        go_on.set()
        await wait_all_tasks_blocked()
        assert wal.bookmark == Bookmark(1, wal.epoch)
        assert wal.epoch > 0


async def test_copies_of_one_log_part_with_different_epochs() -> None:
    files = make_log([b"1"], [b"2"], [b"3"])
    found = []
    for seed in (1, 2):
        copy = copy_of(files)
        copy._seed = seed
        async with open_wal(copy) as wal:
            await wal.truncate_after(2)
            await wal.append(b"another third")
            found.append(wal.bookmark)
    one, other = found
    assert one.lsn == other.lsn == 3
    assert one.epoch != other.epoch
    async with open_wal(copy) as wal:
        with pytest.raises(LogDivergedError) as caught:
            await wal.read(one).__aenter__()
        assert caught.value.parted_after is None
        assert str(caught.value) == (
            f"/log: {one} is not in the history of this log; the log does not know that epoch: "
            "start over with what it holds"
        )


def test_a_cut_and_its_epoch_are_decided_at_once() -> None:
    """Whatever a crash leaves has both or neither, and the end of the log tells which."""
    files = make_log([b"1", b"2", b"3"], [b"4"], [b"5"], close=False)
    images: list[MemoryFiles] = []
    log = open_log(files)
    files.after_operation = lambda operation, path: images.extend(
        files.crash_image(seed, kind) for seed in range(3) for kind in ("power", "kill")
    )
    log.truncate_after(2)
    epoch = epoch_of(log.history)
    assert len(images) > 20
    seen = set()
    for image in images:
        after = open_log(image)
        found = records_of(after)
        seen.add((len(found), epoch_of(after.history)))
        after.close()
    assert seen == {(5, 0), (2, epoch)}


def test_where_there_is_no_space_for_the_cut_the_epoch_stays() -> None:
    files = make_log([b"1"], [b"2"], [b"3"])
    log = open_log(files)
    files.free_bytes = 0
    with pytest.raises(LogFullError):
        log.truncate_after(1)
    assert log.history == ()
    files.heal()
    log.truncate_after(1)
    assert len(log.history) == 2
    log.close()


# -- reading from a bookmark ------------------------------------------------------------------


@asynccontextmanager
async def owner(files: MemoryFiles) -> AsyncIterator[Any]:
    async with open_wal(files) as wal:
        yield wal


@asynccontextmanager
async def onlooker(files: MemoryFiles) -> AsyncIterator[Any]:
    async with trio_wal.open_reader(LOG, files=files) as reader:
        yield reader


both = pytest.mark.parametrize("look", [owner, onlooker])


def a_cut_log() -> tuple[MemoryFiles, int]:
    """Five records, of which the last two are of another epoch."""
    files = MemoryFiles(seed=7)
    log = open_log(files)
    for number in range(1, 9):
        append(log, b"old %d" % number)
    log.truncate_after(3)
    for number in (4, 5):
        append(log, b"new %d" % number)
    epoch = epoch_of(log.history)
    log.close()
    return files, epoch


RECORDS = [(1, b"old 1"), (2, b"old 2"), (3, b"old 3"), (4, b"new 4"), (5, b"new 5")]


@both
@pytest.mark.parametrize("way", ["read", "follow"])
async def test_a_bookmark_continues_after_its_place(look: Any, way: str) -> None:
    files, epoch = a_cut_log()
    async with look(files) as log:
        for place in (
            *(Bookmark(lsn, 0) for lsn in range(4)),
            *(Bookmark(lsn, epoch) for lsn in range(6)),
        ):
            found = []
            async with getattr(log, way)(place) as records:
                assert records.bookmark == Bookmark(place.lsn, epoch)
                for _ in range(5 - place.lsn):
                    record = await records.__anext__()
                    found.append((record.lsn, record.data))
                    assert records.bookmark == Bookmark(record.lsn, epoch)
            assert found == RECORDS[place.lsn :]


@both
@pytest.mark.parametrize("way", ["read", "follow"])
@pytest.mark.parametrize("lsn", [4, 5, 8, 1000])
async def test_a_bookmark_of_records_that_are_gone_is_refused_at_once(
    look: Any, way: str, lsn: int
) -> None:
    files, _ = a_cut_log()
    async with look(files) as log:
        with pytest.raises(LogDivergedError) as caught:
            await getattr(log, way)(Bookmark(lsn, 0)).__aenter__()
    error = caught.value
    assert isinstance(error, LsnTruncatedError)
    assert (error.path, error.bookmark, error.parted_after) == (LOG, Bookmark(lsn, 0), 3)
    assert (error.first_lsn, error.lsn) == (4, lsn)
    assert str(error) == (
        f"/log: {lsn}@0 is not in the history of this log; the two are the same up to LSN 3: "
        "go back to there, or start over"
    )


@both
async def test_a_bookmark_ahead_of_the_end_is_refused(look: Any) -> None:
    files, epoch = a_cut_log()
    async with look(files) as log:
        with pytest.raises(LogDivergedError) as caught:
            await log.follow(Bookmark(6, epoch)).__aenter__()
        assert caught.value.parted_after == 5
        with pytest.raises(LogDivergedError) as caught:
            await log.read(Bookmark(1, 12345)).__aenter__()
        assert caught.value.parted_after is None


@both
async def test_a_bookmark_below_the_first_record_is_truncated_and_not_diverged(look: Any) -> None:
    files, epoch = a_cut_log()
    log = open_log(files)
    log.drop_before(4)
    first = log.first_lsn
    log.close()
    assert first > 1
    async with look(files) as opened:
        with pytest.raises(LsnTruncatedError) as caught:
            await opened.read(Bookmark(first - 2, epoch)).__aenter__()
        assert type(caught.value) is LsnTruncatedError
        async with opened.read(Bookmark(first - 1, 0)) as records:
            assert [record.lsn async for record in records] == list(range(first, 6))


async def test_a_stream_has_no_bookmark_before_it_is_entered() -> None:
    async with open_wal(MemoryFiles()) as wal:
        with pytest.raises(RuntimeError, match=r"^enter the stream first"):
            _ = wal.read().bookmark
        async with wal.follow() as records:
            assert records.bookmark == Bookmark(0, 0)


# -- a history that changes under a stream ----------------------------------------------------


Cut = Callable[[Any], Awaitable[None]]


async def cut_and_grow(wal: Any, *, to: int, end: int) -> None:
    await wal.truncate_after(to)
    for number in range(to + 1, end + 1):
        await wal.append(b"new %d" % number)


@both
@pytest.mark.parametrize("end", [5, 14, 15, 16, 24])
async def test_a_follower_that_has_given_what_is_cut_off_is_told(
    look: Any, end: int, autojump_clock: MockClock
) -> None:
    """It had everything, and the log has grown to any length since."""
    files = make_log(*([b"old %d" % n] for n in range(1, 16)))
    async with open_wal(files) as wal:
        followed = wal
        async with trio_wal.open_reader(LOG, files=files) as reader:
            if look is onlooker:
                followed = reader
            async with followed.follow() as records:
                for _ in range(15):
                    await records.__anext__()
                place = records.bookmark
                await cut_and_grow(wal, to=5, end=end)
                for _ in range(2):
                    with trio.fail_after(60), pytest.raises(LogDivergedError) as caught:
                        await records.__anext__()
                    assert caught.value.bookmark == place == Bookmark(15, 0)
                    assert caught.value.parted_after == 5


@both
@pytest.mark.parametrize("given", range(6))
async def test_a_follower_that_has_given_only_what_stays_goes_on(
    look: Any, given: int, autojump_clock: MockClock
) -> None:
    files = make_log(*([b"old %d" % n] for n in range(1, 16)))
    async with open_wal(files) as wal, trio_wal.open_reader(LOG, files=files) as reader:
        followed = reader if look is onlooker else wal
        async with followed.follow() as records:
            # So that nothing more is ready than is given.
            found = [(r.lsn, r.data) for r in [await records.__anext__() for _ in range(given)]]
            if look is onlooker:
                records._reading.ready.clear()
                records._reading._renew_cursor()
                records._reading._next = given + 1
            await cut_and_grow(wal, to=5, end=20)
            with trio.fail_after(60):
                while len(found) < 20:
                    record = await records.__anext__()
                    found.append((record.lsn, record.data))
            assert records.bookmark == Bookmark(20, wal.epoch)
    expected = [(n, (b"old %d" if n <= 5 else b"new %d") % n) for n in range(1, 21)]
    assert found == expected


async def test_a_follower_that_continued_after_what_is_cut_off_is_told() -> None:
    """It has given nothing itself; whoever made the bookmark has seen record 6."""
    files = make_log(*([b"%d" % n] for n in range(1, 7)))
    async with open_wal(files) as wal, wal.follow(wal.bookmark) as records:
        await cut_and_grow(wal, to=4, end=9)
        with pytest.raises(LogDivergedError) as caught:
            await records.__anext__()
        assert caught.value.bookmark == Bookmark(6, 0)


async def test_a_waiting_follower_in_another_process_is_told(autojump_clock: MockClock) -> None:
    files = make_log(*([b"old %d" % n] for n in range(1, 7)))
    async with (
        open_wal(files) as wal,
        trio_wal.open_reader(LOG, files=files) as reader,
        reader.follow() as records,
        trio.open_nursery() as nursery,
    ):
        for _ in range(6):
            await records.__anext__()

        async def follow() -> None:
            with pytest.raises(LogDivergedError):
                await records.__anext__()

        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        await wal.truncate_after(3)


# -- an end that is lost ------------------------------------------------------------------------


def lose(files: MemoryFiles, lsn: int, path: str = LOG) -> None:
    """The frames of a killed log of one segment, one record each, rot from one on."""
    name = next(name for name in files.names(path) if name.startswith("wal-"))
    data = files.read_file(path, name)[: DATA_OFFSET + (lsn - 1) * BLOCK]
    files.write_file(path, name, data + bytes(64 * BLOCK))


async def read_on(records: Any, given: list[bytes]) -> None:
    async for record in records:
        given += [record.data]


def killed_log(count: int = 9) -> MemoryFiles:
    return make_log(*([b"old %d" % n] for n in range(1, count + 1)), close=False, segment_size=MiB)


async def test_an_end_that_others_were_told_of_and_that_is_lost_begins_an_epoch() -> None:
    files = killed_log()
    lose(files, 8)
    async with open_wal(files) as wal:
        assert (wal.last_lsn, wal.recovery.lost_lsn) == (7, 9)
        epoch = wal.epoch
        assert epoch > 0
        assert wal.bookmark == Bookmark(7, epoch)
        assert await wal.append(b"new 8") == 8
        assert await wal.append(b"new 9") == 9
        async with wal.follow(Bookmark(7, 0)) as records:
            assert (await records.__anext__()).data == b"new 8"
        for lsn in (8, 9):
            with pytest.raises(LogDivergedError) as caught:
                await wal.follow(Bookmark(lsn, 0)).__aenter__()
            assert caught.value.parted_after == 7
    for _ in range(2):
        async with open_wal(files) as wal:
            assert (wal.epoch, wal.last_lsn, wal.recovery.lost_lsn) == (epoch, 9, 0)


@pytest.mark.parametrize("lsn", [8, 9])
async def test_a_follower_in_another_process_that_has_the_lost_records_is_told(
    autojump_clock: MockClock, lsn: int
) -> None:
    files = killed_log()
    async with trio_wal.open_reader(LOG, files=files) as reader, reader.follow() as records:
        for _ in range(lsn):
            await records.__anext__()
        lose(files, 8)
        async with open_wal(files) as wal:
            await wal.append_many([b"new %d" % number for number in range(8, 20)])
            given: list[bytes] = []
            with pytest.raises(LogDivergedError) as caught:
                await read_on(records, given)
            assert not any(data.startswith(b"new") for data in given)
            assert caught.value.parted_after == 7
            assert reader.epoch == wal.epoch > 0
            assert reader.durable_lsn == 19


@pytest.mark.parametrize(
    "word",
    [
        Word(7, 0),
        Word(0, None),
        Word(9, 1 << 32 | 5),
        # What an older version says while the log has never been cut.
        pytest.param(Word(9, None), id="bare"),
        pytest.param(Word((1 << 64) - 1, 0), id="forged"),
    ],
)
async def test_a_word_is_never_a_reason_to_refuse_an_open(word: Word) -> None:
    files = killed_log()
    lose(files, 8)
    files._folders[LOG].published = word
    told = word.told_lsn(0)
    async with open_wal(files) as wal:
        assert wal.last_lsn == 7
        assert (wal.epoch > 0) == (told > 7)
        assert wal.recovery.lost_lsn == (told if told > 7 else 0)


def test_the_word_of_the_history_before_a_cut_does_not_begin_an_epoch() -> None:
    files = killed_log()
    word = files._folders[LOG].published
    log = open_log(files, segment_size=MiB)
    log.truncate_after(5)
    log.close(orderly=False)
    # The owner was killed before it could say what is true now.
    files._folders[LOG].published = word
    again = open_log(files, segment_size=MiB)
    assert (again.history, again.report.lost_lsn) == (log.history, 0)


@pytest.mark.parametrize("kind", ["kill", "power"])
def test_a_crash_of_the_open_that_begins_an_epoch_leaves_it_to_the_next(kind: Any) -> None:
    files = killed_log()
    lose(files, 8)
    images: list[MemoryFiles] = []
    word = files._folders[LOG].published

    def crash(operation: str, path: str) -> None:
        for seed in range(3 if kind == "power" else 1):
            image = files.crash_image(seed, kind)
            # That nobody has synced it is not what is looked at here.
            image._folders[LOG].published = word
            images.append(image)

    files.after_operation = crash
    log = open_log(files, segment_size=MiB)
    files.after_operation = None
    lasting = files.crash_image(1, "power")
    assert open_log(lasting, segment_size=MiB).history == log.history
    assert len(images) > 5
    lost = set()
    for image in images:
        again = open_log(image, segment_size=MiB)
        assert again.last_lsn == 7
        assert common_lsn(again.history, 0) == 7
        assert len(again.history) == 2
        lost.add(again.report.lost_lsn)
    assert lost == {0, 9}


async def test_a_reader_misses_the_lost_end_until_the_log_was_opened() -> None:
    files = killed_log()
    lose(files, 8)

    async def read() -> list[int]:
        async with trio_wal.open_reader(LOG, files=files) as reader, reader.read() as records:
            return [record.lsn async for record in records]

    with pytest.raises(CorruptLogError, match="the log's owner has said that LSN 9 is durable"):
        await read()
    # Which is what verify asks: whether an open would refuse it.
    assert verify(files.open_directory(LOG)).findings == ()
    async with open_wal(files):
        assert await read() == list(range(1, 8))
    assert await read() == list(range(1, 8))
    assert verify(files.open_directory(LOG)).findings == ()


async def test_a_database_that_has_lost_commits_tells_those_who_have_seen_them() -> None:
    files = MemoryFiles()
    async with trio_wal.open_database(DB, files=files) as db:
        for number in range(1, 10):
            await db.put(b"key", b"%d" % number)
        killed = files.crash_image(kind="kill")
    lose(killed, 8, f"{DB}/log")
    async with trio_wal.open_database(DB, files=killed) as db:
        assert (db.recovery.lost_lsn, db.durable_lsn) == (9, 7)
        assert db.epoch > 0
        assert db.get(b"key") == b"7"
        await db.put(b"key", b"other")
        with pytest.raises(LogDivergedError) as caught:
            await db.changes(Bookmark(8, 0)).__aenter__()
        assert caught.value.parted_after == 7
        async with db.changes(Bookmark(7, 0)) as commits:
            assert (await commits.__anext__()).lsn == 8


# -- the database and its backups -------------------------------------------------------------


async def backed_up(files: MemoryFiles) -> None:
    """An original of seven commits, and a backup made after the fifth."""
    async with trio_wal.open_database(DB, files=files, retention=trio_wal.KeepAll()) as db:
        for number in range(1, 6):
            await db.put(b"key", b"%d" % number)
        assert await db.backup("/copy") == 5
        for number in (6, 7):
            await db.put(b"key", b"%d" % number)


async def test_a_backup_begins_an_epoch_of_its_own_when_it_is_first_opened() -> None:
    files = MemoryFiles()
    await backed_up(files)
    async with trio_wal.open_database(DB, files=files) as db:
        original = db.uuid
        assert (db.epoch, db.wal.bookmark) == (0, Bookmark(7, 0))
        with db.snapshot() as snapshot:
            assert snapshot.bookmark == Bookmark(7, 0)
    async with trio_wal.open_reader("/copy/log", files=files) as reader:
        assert (reader.uuid, reader.epoch) == (original, 0)
    second = files.crash_image(kind="kill")
    second._seed = 99
    epochs = []
    for image in (files, second):
        async with trio_wal.open_database("/copy", files=image) as db:
            assert db.uuid == original
            epochs.append(db.epoch)
            with db.snapshot() as snapshot:
                assert snapshot.bookmark == Bookmark(5, db.epoch)
        async with trio_wal.open_database("/copy", files=image) as db:
            assert db.epoch == epochs[-1], "only its first open begins one"
    assert 0 < epochs[0] != epochs[1] > 0


async def test_a_consumer_of_the_original_is_told_by_the_backup() -> None:
    files = MemoryFiles()
    await backed_up(files)
    async with trio_wal.open_database(DB, files=files) as db:
        async with db.changes(Bookmark(5, 0)) as commits:
            seen = [await commits.__anext__() for _ in range(2)]
            consumed = commits.bookmark
        assert [commit.lsn for commit in seen] == [6, 7]
        assert consumed == Bookmark(7, 0)
    async with trio_wal.open_database("/copy", files=files) as db:
        for number in range(6, 11):
            await db.put(b"key", b"another %d" % number)
        with pytest.raises(LogDivergedError) as caught:
            await db.changes(consumed).__aenter__()
        assert caught.value.parted_after == 5
        async with db.changes(Bookmark(5, 0)) as commits:
            commit = await commits.__anext__()
            assert (commit.lsn, commit.operations[0].value) == (6, b"another 6")
            assert commits.bookmark == Bookmark(6, db.epoch)
        with pytest.raises(LogDivergedError):
            await db.changes(1000).__aenter__()


async def test_a_backup_of_a_backup_knows_both_histories() -> None:
    files = MemoryFiles()
    await backed_up(files)
    async with trio_wal.open_database("/copy", files=files) as db:
        await db.put(b"key", b"another 6")
        middle = db.epoch
        assert await db.backup("/second") == 6
        await db.put(b"key", b"another 7")
    async with trio_wal.open_database("/second", files=files) as db:
        await db.put(b"key", b"third 7")
        for place, parted in ((Bookmark(6, 0), 5), (Bookmark(7, middle), 6)):
            with pytest.raises(LogDivergedError) as caught:
                await db.changes(place).__aenter__()
            assert caught.value.parted_after == parted
        async with db.changes(Bookmark(6, middle)) as commits:
            assert (await commits.__anext__()).operations[0].value == b"third 7"


async def test_a_crash_in_the_first_open_of_a_backup_leaves_it_one_to_be_opened() -> None:
    files = MemoryFiles()
    await backed_up(files)
    images: list[MemoryFiles] = []
    files.after_operation = lambda operation, path: images.extend(
        files.crash_image(seed, kind) for seed in range(2) for kind in ("power", "kill")
    )
    async with trio_wal.open_database("/copy", files=files) as db:
        await db.put(b"key", b"6")
    files.after_operation = None
    for image in images:
        async with trio_wal.open_database("/copy", files=image) as db:
            assert db.epoch > 0
            assert db.get(b"key") in (b"5", b"6")


# -- versions ---------------------------------------------------------------------------------


def test_versions_that_know_no_epochs_refuse_a_log_that_has_some() -> None:
    """They would write log.meta anew, without its history."""
    files, _ = a_cut_log()
    flags = int.from_bytes(files.read_file(LOG, "log.meta")[12:16], "little")
    assert flags == 16
    data = files.read_file(LOG, segment_of(files))
    assert int.from_bytes(data[12:16], "little") == 0, "the segments need not be refused"


def segment_of(files: MemoryFiles) -> str:
    return next(name for name in files.names(LOG) if name.startswith("wal-"))


def test_a_feature_of_log_meta_is_none_of_a_segment() -> None:
    files = make_log([b"1"])
    name = segment_of(files)
    data = bytearray(files.read_file(LOG, name))
    data[12] |= 16
    data[508:512] = trio_wal._disk.frame.crc32c(bytes(data[:508])).to_bytes(4, "little")
    files.write_file(LOG, name, bytes(data))
    with pytest.raises(UnsupportedFormatError, match=r"feature set 16 \(epochs\) is not supported"):
        open_log(files)


def test_a_history_that_rots_is_damage_of_log_meta() -> None:
    files, _ = a_cut_log()
    files.flip_bit(LOG, "log.meta", 8 * 520)
    with pytest.raises(CorruptLogError, match=r"^/log/log\.meta: at offset 0: checksum of the epo"):
        open_log(files)


def test_the_records_of_a_cut_log_are_numbered_on() -> None:
    files, _ = a_cut_log()
    log = open_log(files)
    assert records_of(log) == numbered([data for _, data in RECORDS])
    log.close()


def test_what_a_history_has_forgotten_is_recalled_from_what_it_was() -> None:
    one, two, three, four = (Parting(epoch, 10 * epoch) for epoch in (1, 2, 3, 4))
    assert recalled((three, four), [(two, three), (one, two), (four,)]) == (one, two, three, four)
    assert recalled((three, four), [(two, three), (one, two, three)]) == (one, two, three, four)
    assert recalled((three, four), [(one, two)]) == (three, four)
    assert recalled((), [(one, two)]) == ()
    whole = (Parting(0, 0), two)
    assert recalled(whole, [(one, Parting(0, 0))]) == whole
    # Of what nobody can have written nothing is believed, and it comes to an end.
    assert recalled((three, four), [(four, three), (three, four)]) == (three, four)
