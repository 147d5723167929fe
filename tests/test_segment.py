"""Segments being written: room, footers, the next one, the dropped ones, the cut ones."""

from __future__ import annotations

import contextlib
import errno
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from logs import (
    LOG,
    TINY,
    append,
    content,
    copy_of,
    make_log,
    numbered,
    open_log,
    read_between,
    records_of,
    segments,
)
from msgspec.structs import replace

from trio_wal import CorruptLogError, KeepAll, LogFullError, LsnTruncatedError, Retention
from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.frame import (
    BLOCK,
    DATA_OFFSET,
    FEATURE_ZSTD,
    POINTER_OFFSET,
    Codec,
    Kind,
    decode_segment_header,
    footer_reserve,
    index_step,
)
from trio_wal._disk.opening import open_log_directory
from trio_wal._disk.scan import FrameScanner, footer_index, payloads, read_pointer, start_of
from trio_wal._disk.segment import FIRST_CAPACITY, ActiveSegment, capacity_for, encode
from trio_wal._disk.spares import PAUSE_SHARE, PAUSES
from trio_wal._engine import Moved
from trio_wal._memorydisk import Inode
from trio_wal._system.files import OsFiles
from trio_wal._util import KiB, MiB
from trio_wal.testing import SECTOR, MemoryFile, MemoryFiles

SPARE = "spare-"


def spares(files: MemoryFiles) -> list[str]:
    return [name for name in files.names(LOG) if name.startswith(SPARE)]


# -- room -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 379, 380, 381, 4096, 300 * KiB, 3 * MiB, 20 * MiB])
def test_a_segment_is_never_grown_by_what_is_written_to_it(size: int) -> None:
    """Not even by the mark of a close and a footer behind a frame that fills it."""
    files = MemoryFiles()
    log = open_log(files)
    append(log, bytes(size))
    log.close()
    log = open_log(files)
    name = log.active.header.name
    assert len(files.read_file(LOG, name)) == log.active.capacity
    log.rotate()
    assert len(files.read_file(LOG, name)) <= capacity_for(size + 4, TINY)
    assert records_of(log) == ((1, bytes(size)),)


def test_segments_grow_from_a_small_first_one_up_to_the_size_asked_for() -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=6 * MiB)
    sizes = [log.active.capacity]
    for _ in range(4):
        append(log, b"x")
        log.rotate()
        sizes.append(log.active.capacity)
    assert sizes == [FIRST_CAPACITY, 4 * MiB, 6 * MiB, 6 * MiB, 6 * MiB]


def test_a_segment_that_is_full_is_followed_by_another() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for n in range(5):
        append(log, b"%d" % n)
    assert segments(files) == [f"wal-{n:020d}.log" for n in (1, 3, 5)]
    assert [(s.first_lsn, s.next_lsn) for s in log.sealed()] == [(1, 3), (3, 5)]
    assert [s.header.number for s in log.sealed()] == [1, 2]
    assert log.segments == 3


def test_an_empty_segment_that_is_too_small_is_replaced_under_its_name() -> None:
    files = MemoryFiles()
    log = open_log(files)
    small = log.active.capacity
    append(log, bytes(10 * KiB))
    assert segments(files) == ["wal-00000000000000000001.log"]
    assert log.active.capacity > small
    assert (log.segments, log.active.header.number) == (1, 1)
    log.close()
    assert content(files) == ((1, bytes(10 * KiB)),)


def test_rotating_an_empty_segment_changes_nothing() -> None:
    files = MemoryFiles()
    log = open_log(files)
    before = files.contents(LOG)
    log.rotate()
    assert files.contents(LOG) == before


# -- footers and the mark of a close --------------------------------------------------------


def test_a_sealed_segment_ends_with_its_footer() -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=64 * KiB)
    append(log, b"a", b"b")
    append(log, b"c")
    log.rotate()
    data = files.read_file(LOG, segments(files)[0])
    header = decode_segment_header(data)
    *_, (seal, _) = FrameScanner(lambda n, at: data[at : at + n], header, start_of(header))
    assert seal.kind is Kind.SEAL
    assert (seal.end, seal.durable_lsn) == (len(data), 3)
    pointer, _ = read_pointer(lambda n, at: data[at : at + n], header)
    assert pointer is not None
    assert (pointer.kind, pointer.offset, pointer.crc) == (Kind.SEAL, seal.offset, seal.crc)
    assert log.sealed()[0].bytes == len(data)


def test_a_footer_has_an_entry_for_every_stretch_of_the_segment() -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=8 * MiB)
    append(log, b"first")
    log.rotate()
    first = log.last_lsn + 1
    while log.segments == 2:
        append(log, bytes(30_000))
    sealed = log.sealed()[1]
    data = files.read_file(LOG, sealed.name)
    pointer, _ = read_pointer(lambda n, at: data[at : at + n], sealed.header)
    index = footer_index(lambda n, at: data[at : at + n], sealed.header, pointer)
    assert index[0] == (first, DATA_OFFSET)
    step = index_step(4 * MiB)
    gaps = [after[1] - before[1] for before, after in pairwise(index)]
    assert all(step <= gap < step + 2 * 30_720 for gap in gaps)
    assert len(data) - index[-1][1] < 2 * step


def test_the_first_write_behind_a_close_takes_its_pointer_away() -> None:
    files = make_log([b"a"], segment_size=64 * KiB)
    (name,) = segments(files)
    assert any(files.read_file(LOG, name)[POINTER_OFFSET : POINTER_OFFSET + BLOCK])
    log = open_log(files)
    log.write([b"b"], 1, sync=False)
    assert not any(files.read_file(LOG, name)[POINTER_OFFSET : POINTER_OFFSET + BLOCK])


def test_opening_and_closing_a_closed_log_changes_no_byte() -> None:
    files = make_log([b"a"], [b"b"], [b"c"])
    before = files.contents(LOG)
    for _ in range(3):
        open_log(files).close()
    assert files.contents(LOG) == before


# -- times --------------------------------------------------------------------------------


def times(log: LogDirectory, files: MemoryFiles) -> list[int]:
    found = []
    for header in (*(s.header for s in log.sealed()), log.active.header):
        data = files.read_file(LOG, header.name)
        scanner = FrameScanner(lambda n, at, d=data: d[at : at + n], header, start_of(header))  # type: ignore[misc]
        found += [frame.time_us for frame, _ in scanner if frame.kind is Kind.DATA]
    return found


EVENTS = ["nothing", "rotation", "close", "crash", "torn", "torn at the start", "cut", "cut to 2"]


@pytest.mark.parametrize("event", EVENTS)
def test_a_clock_that_jumps_back_does_not_take_the_times_of_records_with_it(event: str) -> None:
    files = MemoryFiles()
    log = open_log(files)
    for n in range(3):
        append(log, b"%d" % n)
    if event == "torn at the start":
        log.rotate()
    files.clock_offset_us -= 3_600_000_000
    if event == "rotation":
        log.rotate()
    elif event == "close":
        log.close()
        log = open_log(files)
    elif event == "crash":
        log.rotate()
        files = copy_of(files)
        log = open_log(files)
    elif event.startswith("torn"):
        log.active.file.pwrite([b"torn"], log.active.position.offset)
        files = copy_of(files)
        log = open_log(files)
        assert log.report.torn_bytes == BLOCK
    elif event == "cut":
        log.truncate_after(1)
    elif event == "cut to 2":
        log.truncate_after(2)
    append(log, b"after")
    append(log, b"more")
    found = times(log, files)
    assert len(found) == log.last_lsn
    assert found == sorted(found)


# -- the next segment -------------------------------------------------------------------------


def test_a_segment_prepared_ahead_needs_no_space_when_its_turn_comes() -> None:
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    assert log.write([b"b"], 1, sync=True), "it is time to prepare the next one"
    log.prepare_spare()
    assert len(spares(files)) == 1
    files.free_bytes = 0
    allocated = files.operations["allocate"]
    append(log, b"c")
    assert files.operations["allocate"] == allocated
    assert spares(files) == []
    assert records_of(log) == numbered([b"a", b"b", b"c"])


def test_a_second_segment_is_not_prepared() -> None:
    files = MemoryFiles()
    log = open_log(files)
    log.prepare_spare()
    before = files.contents(LOG)
    log.prepare_spare()
    assert files.contents(LOG) == before


def test_without_space_nothing_is_written_and_the_log_works_again_when_there_is() -> None:
    files = make_log([b"a"], [b"b"])
    log = open_log(files)
    files.free_bytes = 0
    before = files.contents(LOG)
    for _ in range(2):
        with pytest.raises(LogFullError, match=r"^/log: no space for a segment of \d+ bytes"):
            append(log, b"c")
        assert files.contents(LOG) == before
    assert log.last_lsn == log.synced_lsn == 2
    files.free_bytes = math.inf
    append(log, b"c")
    log.close()
    assert content(files) == numbered([b"a", b"b", b"c"])


def test_a_full_disk_is_no_error_while_the_next_segment_is_prepared() -> None:
    files = MemoryFiles()
    log = open_log(files)
    files.free_bytes = 1000
    log.prepare_spare()
    assert spares(files) == []
    assert files.free_bytes == 1000 - BLOCK, "the place of the next log.meta is kept"


def test_a_full_disk_is_not_asked_again_at_every_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    for module in ("directory", "spares"):
        monkeypatch.setattr(f"trio_wal._disk.{module}.perf_counter", lambda: now)
    files = MemoryFiles()
    log = open_log(files, segment_size=1 * MiB)
    files.free_bytes = 0

    def wants_spare() -> bool:
        return log.write([bytes(300 * KiB)], log.synced_lsn, sync=True)

    assert wants_spare()
    log.prepare_spare()
    assert not wants_spare()
    now += 10
    assert wants_spare()


def test_segments_can_be_dropped_on_a_disk_without_a_single_free_block() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for number in range(1, 5):
        append(log, b"%d" % number)
        log.prepare_spare()
        files.free_bytes = 0
        assert log.drop_before(log.last_lsn) == (number > 1)
        assert log.first_lsn == number
        files.free_bytes = math.inf
        log.rotate()
    log.close()
    assert files.names(LOG) == ["log.meta", *segments(files)], "no reserve is left behind"
    assert content(files) == ((4, b"4"),)


def test_where_log_meta_has_no_place_segments_stay() -> None:
    files = make_log([b"1"], [b"2"], [b"3"])
    log = open_log(files)
    files.free_bytes = 0
    with pytest.raises(LogFullError, match=r"^/log: no space for 512 bytes: log.meta cannot be"):
        log.drop_before(3)
    assert (log.first_lsn, records_of(log)) == (1, numbered([b"1", b"2", b"3"]))
    files.free_bytes = math.inf
    log.drop_before(3)
    assert records_of(log) == ((3, b"3"),)


def test_where_log_meta_has_no_place_the_end_stays() -> None:
    files = make_log([b"1"], [b"2"], [b"3"])
    log = open_log(files)
    log.prepare_spare()
    files.after_operation = lambda operation, path: (
        files.fail("pwrite", errno.ENOSPC) if path.endswith("truncate.tmp") else None
    )
    with pytest.raises(LogFullError, match=r"^/log: no space for 512 bytes: log.meta cannot be"):
        log.truncate_after(1)
    files.after_operation = None
    files.heal()
    assert "truncate.tmp" not in files.names(LOG)
    assert append(log, b"4") == 4
    assert records_of(log) == numbered([b"1", b"2", b"3", b"4"])
    log.close()
    assert content(files) == numbered([b"1", b"2", b"3", b"4"])


def test_recovering_on_a_full_disk_leaves_no_file_behind() -> None:
    files = make_log([b"a"], close=False)
    before = files.contents(LOG)
    files.free_bytes = 600
    with pytest.raises(LogFullError, match=r"^/log: no space for a segment of \d+ bytes"):
        open_log(files)
    assert files.contents(LOG) == before
    files.heal()
    assert records_of(open_log(files)) == ((1, b"a"),)


def test_a_prepared_segment_that_is_too_small_gives_way_to_a_larger_one() -> None:
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    log.prepare_spare()
    append(log, bytes(50 * KiB))
    assert spares(files) == []
    assert records_of(log) == numbered([b"a", bytes(50 * KiB)])


def test_closing_takes_prepared_and_recycled_files_away() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for n in range(6):
        append(log, b"%d" % n)
    log.drop_before(5)
    log.prepare_spare()
    append(log, b"x")
    log.drop_before(7)
    assert spares(files)
    log.close()
    assert files.names(LOG) == ["log.meta", *segments(files)]


def test_disk_bytes_counts_segments_and_what_is_prepared() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for n in range(3):
        append(log, b"%d" % n)
    sizes = {name: len(data) for name, data in files.contents(LOG).items()}
    assert log.disk_bytes == sum(size for name, size in sizes.items() if name != "log.meta")
    log.prepare_spare()
    assert log.disk_bytes > sum(size for name, size in sizes.items() if name != "log.meta")


def test_disk_bytes_counts_a_dropped_segment_that_is_kept_for_the_next() -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=1)
    for n in range(3):
        append(log, bytes(3000 + n))
    log.drop_before(3)
    for _ in range(2):
        sizes = {name: len(data) for name, data in files.contents(LOG).items()}
        assert spares(files)
        used = sum(size for name, size in sizes.items() if not name.startswith("log.meta"))
        assert log.disk_bytes == used
        log.prepare_spare()


# -- frames that stand in place -------------------------------------------------------------


class InPlace:
    """Watches which sectors of each file have been written, and which of these are synced.

    The file system says what was written, be it synced or not: that is the most it may say.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.syncs: list[bool] = []
        self.written: dict[object, set[int]] = {}
        self.settled: dict[object, set[int]] = {}
        write, resize, sync = MemoryFile.pwrite, Inode.resize, MemoryFile.sync

        def watched_write(file: MemoryFile, pieces: Any, offset: int) -> None:
            write(file, pieces, offset)
            end = offset + sum(map(len, pieces))
            there = self.written.setdefault(file._inode, set())
            there.update(range(offset // SECTOR, -(-end // SECTOR)))

        def watched_resize(inode: Inode, size: int) -> None:
            resize(inode, size)
            for known in (self.written, self.settled):
                known[inode] = {at for at in known.get(inode, ()) if at * SECTOR < size}

        def watched_sync(file: MemoryFile, *, in_place: bool = False) -> None:
            inode, settled = file._inode, self.settled.setdefault(file._inode, set())
            if in_place:
                assert inode.dirty <= settled, "the file system has something to write down"
            self.syncs.append(in_place)
            sync(file, in_place=in_place)
            settled |= self.written.get(inode, set())

        def written_bytes(file: MemoryFile) -> int:
            there, count = self.written.get(file._inode, set()), 0
            while count in there:
                count += 1
            return count * SECTOR

        monkeypatch.setattr(MemoryFile, "pwrite", watched_write)
        monkeypatch.setattr(Inode, "resize", watched_resize)
        monkeypatch.setattr(MemoryFile, "sync", watched_sync)
        monkeypatch.setattr(MemoryFile, "written_bytes", written_bytes)

    def of_appends(self, log: LogDirectory, count: int) -> list[bool]:
        """What is said of the sync of each of these."""
        self.syncs.clear()
        number = log.active.header.number
        for _ in range(count):
            append(log, b"x")
        assert log.active.header.number == number
        return self.syncs[:]


def test_frames_of_a_new_log_stand_in_place_from_the_first_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = InPlace(monkeypatch)
    log = open_log(MemoryFiles(), segment_size=64 * MiB)
    assert watch.of_appends(log, 5) == [True] * 5


def test_a_log_opened_again_finds_what_was_written_and_synced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = MemoryFiles()
    watch = InPlace(monkeypatch)
    log = open_log(files, segment_size=64 * MiB)
    append(log, b"one")
    log.close()
    log = open_log(files, segment_size=64 * MiB)
    # What the file system says may not be on the disk before a sync has returned.
    assert watch.of_appends(log, 5) == [False, *[True] * 4]


def test_after_a_crash_frames_stand_in_place_from_the_first_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = MemoryFiles()
    watch = InPlace(monkeypatch)
    log = open_log(files, segment_size=64 * MiB)
    while log.active.header.number < 3:
        append(log, bytes(100 * KiB))
    append(log, b"not proven to be durable")
    assert log.active.capacity == 16 * MiB
    log = open_log(copy_of(files), segment_size=64 * MiB)
    assert watch.of_appends(log, 5) == [True] * 5


def test_what_is_only_reserved_is_not_taken_for_written(monkeypatch: pytest.MonkeyPatch) -> None:
    files = MemoryFiles()
    watch = InPlace(monkeypatch)
    log = open_log(files, segment_size=64 * MiB)
    append(log, b"one", b"two")
    log.truncate_after(1)
    assert watch.of_appends(log, 5) == [False] * 5
    log.close()
    log = open_log(files, segment_size=64 * MiB)
    assert watch.of_appends(log, 5) == [False] * 5


@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "hurried"])
def test_the_next_segment_is_in_place_as_far_as_zeros_were_written_and_synced(
    monkeypatch: pytest.MonkeyPatch, prepared: bool
) -> None:
    watch = InPlace(monkeypatch)
    log = open_log(MemoryFiles(), segment_size=64 * MiB)
    append(log, b"one")
    if prepared:
        log.prepare_spare()
    log.rotate()
    assert watch.of_appends(log, 5) == [prepared] * 5


# -- dropping -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lsn", "first"),
    [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (6, 5), (7, 7), (8, 7), (100, 7)],
)
def test_only_whole_sealed_segments_are_dropped(lsn: int, first: int) -> None:
    files = make_log(*([b"%d" % n] for n in range(8)))
    log = open_log(files)
    assert log.drop_before(lsn) == (first - 1) // 2
    assert log.first_lsn == first
    expected = numbered((b"%d" % n for n in range(first - 1, 8)), first)
    assert records_of(log) == expected
    assert log.drop_before(lsn) == 0
    assert append(log, b"next") == 9
    log.close()
    assert content(files) == (*expected, (9, b"next"))


def test_a_log_dropped_to_nothing_goes_on_with_its_numbers() -> None:
    files = make_log([b"a"], [b"b"], [b"c"])
    log = open_log(files)
    log.rotate()
    log.drop_before(4)
    assert (log.first_lsn, log.last_lsn) == (4, 3)
    log.close()
    log = open_log(files)
    assert (log.report.first_lsn, log.report.last_lsn) == (4, 3)
    assert append(log, b"d") == 4


def test_one_dropped_segment_becomes_the_next_with_new_zeros() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for n in range(8):
        append(log, b"%d" % n)
    log.drop_before(7)
    (recycled,) = spares(files)
    assert any(files.read_file(LOG, recycled))
    log.prepare_spare()
    assert spares(files) == [recycled]
    assert not any(files.read_file(LOG, recycled))
    append(log, b"8")
    assert spares(files) == []
    assert records_of(log) == numbered((b"%d" % n for n in range(6, 9)), 7)


def test_a_dropped_segment_that_is_being_read_is_not_written_over() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for n in range(4):
        append(log, b"%d" % n)
    (header,) = (s.header for s in log.sealed())
    log.spares.pin(header)
    file = log.open_segment(header)
    before = file.pread(file.size(), 0)
    log.drop_before(3)
    log.prepare_spare()
    append(log, b"x")
    append(log, b"y")
    assert file.pread(len(before), 0) == before
    log.spares.unpin(header)


def test_a_cursor_is_closed_while_a_file_is_made_ready() -> None:
    """It is closed in the event loop, which must not wait for the disk."""
    files = MemoryFiles()
    log = open_log(files)
    header = log.active.header
    log.spares.pin(header)
    closed = threading.Event()

    def close() -> None:
        log.spares.unpin(header)
        closed.set()

    def look(operation: str, path: str) -> None:
        if operation == "allocate":
            closing = threading.Thread(target=close)
            closing.start()
            assert closed.wait(60), "it waited for the file"
            closing.join(60)

    files.after_operation = look
    log.spares.take(0)
    files.after_operation = None
    assert closed.is_set()


def test_a_dropped_segment_is_not_written_over_before_its_new_name_is_durable() -> None:
    """`prepare_spare` runs in another thread and may begin at any moment."""
    files = MemoryFiles()
    log = open_log(files)
    for n in range(6):
        append(log, b"%d" % n)
    images = 0

    def prepare_and_crash(operation: str, path: str) -> None:
        nonlocal images
        files.after_operation = lambda operation, path: crash()
        log.prepare_spare()
        files.after_operation = prepare_and_crash

    def crash() -> None:
        nonlocal images
        for seed in range(4):
            images += 1
            assert content(files.crash_image(seed)) in (every, every[4:])

    every = records_of(log)
    files.after_operation = prepare_and_crash
    log.drop_before(5)
    assert images


@pytest.mark.parametrize(("kib", "pieces"), [(20, 4), (60, 1)])
def test_zeros_are_written_in_pieces_that_are_small_beside_small_frames_only(
    kib: int, pieces: int
) -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=1 * MiB)
    while not log.sealed():
        append(log, b"\xff" * (kib * KiB))
    append(log, bytes(kib * KiB))
    log.drop_before(log.last_lsn)
    synced: list[str] = []
    files.after_operation = lambda operation, path: synced.append(operation)
    log.prepare_spare()
    files.after_operation = None
    assert synced.count("sync") == pieces
    (spare,) = spares(files)
    assert not any(files.read_file(LOG, spare))


def test_space_taken_by_a_recycled_file_is_given_to_a_larger_segment() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for n in range(4):
        append(log, b"%d" % n)
    log.drop_before(3)
    (recycled,) = spares(files)
    kept = len(files.read_file(LOG, recycled))
    big = bytes(3 * KiB)
    needed = capacity_for(len(big) + 4, TINY)
    files.free_bytes = needed - kept
    append(log, big)
    assert records_of(log)[-1] == (5, big)


# -- files that cannot be removed -----------------------------------------------------------


def log_of_six(files: MemoryFiles) -> LogDirectory:
    """Two segments are sealed, and the third has two records, too."""
    log = open_log(files)
    for n in range(6):
        append(log, b"%d" % n)
    assert len(log.sealed()) == 2
    return log


@pytest.mark.parametrize(
    ("operation", "after", "times"),
    [
        ("unlink", 0, 1),  # of the second one, because the first is kept
        ("rename", 1, 1),  # the first of all is that of log.meta
        ("sync_dir", 1, 1),
    ],
)
def test_what_could_not_be_removed_is_removed_by_the_next_call(
    operation: Any, after: int, times: int
) -> None:
    files = MemoryFiles()
    log = log_of_six(files)
    files.fail(operation, after=after, times=times)
    with contextlib.suppress(OSError):
        log.drop_before(5)
    assert log.first_lsn == 5
    files.heal()
    assert log.drop_before(5) == 0
    assert segments(files) == [log.active.header.name]
    append(log, b"more")
    log.prepare_spare()
    assert log.spares.ready is not None
    assert spares(files) == [log.spares.ready.name], "and none was forgotten"


def test_what_cannot_be_removed_is_told_each_time() -> None:
    files = MemoryFiles()
    log = log_of_six(files)
    log.prepare_spare()  # so that none is kept
    files.fail("unlink", times=math.inf)
    for _ in range(3):
        with pytest.raises(OSError, match=r"^\[Errno 5\] "):
            log.drop_before(5)


def test_a_file_whose_new_name_may_not_be_durable_is_not_written_over() -> None:
    """A later sync that passes proves nothing: the kernel may have forgotten."""
    files = MemoryFiles()
    log = log_of_six(files)
    files.fail("sync_dir", after=1)
    with pytest.raises(OSError, match=r"^\[Errno 5\] "):
        log.drop_before(5)
    (renamed,) = spares(files)
    written: list[str] = []
    files.after_operation = lambda operation, path: (
        written.append(path) if operation in ("pwrite", "truncate", "allocate") else None
    )
    log.drop_before(5)
    log.prepare_spare()
    assert written
    assert f"{LOG}/{renamed}" not in written


def test_the_others_go_where_one_cannot_be_removed() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for n in range(9):
        append(log, b"%d" % n)
    assert len(log.sealed()) == 4
    log.prepare_spare()
    files.fail("unlink")
    with pytest.raises(OSError, match=r"^\[Errno 5\] "):
        log.drop_before(9)
    assert segments(files) == ["wal-00000000000000000001.log", log.active.header.name]
    assert content(copy_of(files)) == records_of(log)


def test_a_next_segment_that_can_neither_be_finished_nor_removed_is_not_used() -> None:
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    files.fail("pwrite")
    files.fail("unlink")
    log.prepare_spare()
    assert log.spares.ready is None
    (left,) = spares(files)
    append(log, b"b")
    append(log, b"c")
    assert log.active.header.number == 2
    log.drop_before(3)
    assert left not in spares(files)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_on_which_nothing_can_be_removed_is_full_all_the_same(error: int) -> None:
    """Btrfs needs space to remove a file."""
    files = MemoryFiles()
    log = log_of_six(files)
    log.drop_before(3)
    assert spares(files)
    files.free_bytes = 0
    files.fail("unlink", error, times=math.inf)
    with pytest.raises(LogFullError, match=r"^/log: no space for a segment of \d+ bytes"):
        append(log, b"more")
    left = spares(files)
    files.heal()
    append(log, b"more")
    assert records_of(log)[-1] == (7, b"more")
    log.drop_before(7)
    assert not set(left) & set(spares(files))


def test_a_prepared_segment_that_is_too_small_need_not_be_removable() -> None:
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    log.prepare_spare()
    files.fail("unlink")
    append(log, bytes(50 * KiB))
    assert records_of(log) == numbered([b"a", bytes(50 * KiB)])


def test_kept_files_that_somebody_has_cleaned_away_are_done_without() -> None:
    files = MemoryFiles()
    log = log_of_six(files)
    log.drop_before(3)
    (kept,) = spares(files)
    folder = files.open_directory(LOG)
    folder.unlink(kept)
    log.prepare_spare()
    assert log.spares.ready is not None
    for n in range(4):
        append(log, b"%d" % n)
    log.drop_before(7)
    assert spares(files), "and another one is kept"
    folder.unlink(*spares(files))
    files.free_bytes = 0
    with pytest.raises(LogFullError, match=r"^/log: no space "):
        log.rotate()
    log.close()


def test_a_close_is_one_though_what_was_prepared_cannot_be_removed() -> None:
    files = MemoryFiles()
    log = log_of_six(files)
    log.drop_before(3)
    assert spares(files)
    files.fail("unlink", times=math.inf)
    log.close()
    files.heal()
    again = open_log(files)
    assert again.report.clean_shutdown
    assert spares(files) == []


def test_a_policy_is_asked_when_the_end_cannot_be_cut() -> None:
    """Else the segments that it lets go may be others by the time they go."""
    files = MemoryFiles()
    log = log_of_six(files)

    class Asked(Retention):
        def droppable(self, sealed: Sequence[object], active_bytes: int, now_us: int) -> int:
            assert log.meta.deciding.locked()
            return len(sealed)

    assert log.apply_retention(Asked()) == 2


def test_one_file_is_kept_and_no_more() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for n in range(9):
        append(log, b"%d" % n)
    for lsn in (3, 5, 7):
        log.drop_before(lsn)
        assert len(spares(files)) == 1


def test_none_is_kept_while_the_next_segment_is_being_prepared() -> None:
    files = MemoryFiles()
    log = log_of_six(files)

    def drop(operation: str, path: str) -> None:
        if SPARE in path:
            files.after_operation = None
            log.drop_before(5)

    files.after_operation = drop
    log.prepare_spare()
    assert log.first_lsn == 5
    assert log.spares.ready is not None
    assert spares(files) == [log.spares.ready.name]


def test_a_file_that_got_its_new_name_though_the_call_failed_is_removed() -> None:
    """As a call to a server that answers too late."""
    files = MemoryFiles()
    log = log_of_six(files)

    def fail(operation: str, path: str) -> None:
        if operation == "rename" and SPARE in "".join(spares(files)):
            files.after_operation = None
            raise OSError(errno.EIO, "no answer")

    files.after_operation = fail
    log.drop_before(3)
    assert files.after_operation is None
    assert len(spares(files)) == 1
    assert log.apply_retention(KeepAll()) == 0
    assert spares(files) == []


def test_the_next_log_meta_has_its_space_when_segments_were_dropped() -> None:
    files = MemoryFiles()
    log = log_of_six(files)
    assert "log.meta.tmp" not in files.names(LOG)
    log.drop_before(3)
    assert "log.meta.tmp" in files.names(LOG)


# -- cutting the end ------------------------------------------------------------------------

BATCHES = [[b"1"], [b"2", b"3", b"4"], [b"5"], [b"6", b"7"], [b"8"]]


@pytest.mark.parametrize("lsn", range(9))
@pytest.mark.parametrize("reopened", [False, True])
@pytest.mark.parametrize("segment_size", [TINY, 64 * KiB])
def test_the_log_is_cut_behind_any_record(lsn: int, reopened: bool, segment_size: int) -> None:
    files = make_log(*BATCHES[:3], segment_size=segment_size)
    log = open_log(files, segment_size=segment_size)
    for batch in BATCHES[3:]:
        append(log, *batch)
    if reopened:
        log.close()
        log = open_log(files, segment_size=segment_size)
    log.truncate_after(lsn)
    kept = numbered(b"12345678"[n : n + 1] for n in range(lsn))
    assert (log.first_lsn, log.last_lsn, log.synced_lsn) == (1, lsn, lsn)
    assert records_of(log) == kept
    assert append(log, b"new") == lsn + 1
    assert records_of(log) == (*kept, (lsn + 1, b"new"))
    log.close()
    assert content(files) == (*kept, (lsn + 1, b"new"))
    assert "truncate.tmp" not in files.names(LOG)


def test_cutting_behind_the_end_changes_nothing() -> None:
    files = make_log(*BATCHES)
    log = open_log(files)
    before = files.contents(LOG)
    log.truncate_after(8)
    log.truncate_after(100)
    assert files.contents(LOG) == before


def test_a_cut_counts_as_two_changes_for_readers() -> None:
    log = open_log(make_log(*BATCHES))
    log.truncate_after(8)
    assert log.cuts == 0
    log.truncate_after(4)
    assert log.cuts == 2


@pytest.mark.parametrize("lsn", [1, 3, 4])
def test_the_log_is_not_cut_where_what_is_to_stay_is_damaged(lsn: int) -> None:
    """Cutting at the damage would drop good records and call that done."""
    files = make_log([b"1"], [b"2", b"3", b"4"], [b"5"], [b"6"], [b"7"])
    name = segments(files)[0]
    damaged = DATA_OFFSET if lsn == 1 else DATA_OFFSET + BLOCK
    files.flip_bit(LOG, name, 8 * (damaged + 70))
    log = open_log(files, verify_bytes=0)
    before = files.contents(LOG)
    with pytest.raises(CorruptLogError, match=rf"^/log/{name}: at offset {damaged}: "):
        log.truncate_after(lsn)
    assert files.contents(LOG) == before
    assert append(log, b"8") == 8


def test_without_space_the_log_is_not_cut() -> None:
    files = make_log(*BATCHES)
    log = open_log(files)
    files.free_bytes = 0
    before = files.contents(LOG)
    with pytest.raises(LogFullError):
        log.truncate_after(3)
    assert files.contents(LOG) == before
    files.heal()
    log.truncate_after(3)
    assert records_of(log) == numbered([b"1", b"2", b"3"])


@pytest.mark.parametrize("operation", ["open", "pwrite", "sync", "rename", "sync_dir"])
def test_without_space_for_log_meta_the_log_is_cut_or_as_before_wherever_it_fails(
    operation: Any,
) -> None:
    """Also where log.meta is in place already and only the sync of its name fails."""
    records = numbered([data for batch in BATCHES for data in batch])
    for after in range(20):
        files = make_log(*BATCHES)
        log = open_log(files)
        files.operations.clear()
        files.fail(operation, errno.ENOSPC, after=after)
        with contextlib.suppress(OSError, LogFullError):
            log.truncate_after(3)
        for image in (copy_of(files), *(files.crash_image(seed) for seed in range(3))):
            found = content(image)
            assert found in (records, records[:3])
        if files.operations.get(operation, 0) <= after:
            break
    assert 1 < after < 20


# -- compression -------------------------------------------------------------------------------


def test_a_log_is_compressed_where_that_makes_it_smaller() -> None:
    files = MemoryFiles()
    batches = [[b"a" * 5000], [b"x"], [b"bcd" * 3000, b"", b"efg" * 100]]
    log = open_log(files, compression="zstd", segment_size=64 * KiB)
    for batch in batches:
        append(log, *batch)
    data = files.read_file(LOG, segments(files)[0])
    header = log.active.header
    frames = list(FrameScanner(lambda n, at: data[at : at + n], header, start_of(header)))
    assert [frame.codec for frame, _ in frames] == [Codec.ZSTD, Codec.NONE, Codec.ZSTD]
    assert all(frame.stored_length <= frame.raw_length for frame, _ in frames)
    assert [payloads(frame, body) for frame, body in frames] == batches
    log.close()
    log = open_log(files)
    assert log.active.header.features == FEATURE_ZSTD, "the log remembers"
    assert append(log, bytes(9000)) == 6
    log.truncate_after(4)
    assert records_of(log) == numbered([b"a" * 5000, b"x", b"bcd" * 3000, b""])


@pytest.mark.parametrize(("created", "asked"), [(None, "zstd"), ("none", "zstd"), ("zstd", "none")])
def test_another_compression_than_the_logs_own_is_refused(created: str | None, asked: str) -> None:
    files = make_log([b"a"], compression=created)
    before = files.contents(LOG)
    with pytest.raises(ValueError, match=r"^compression must be what the log was created with"):
        open_log(files, compression=asked)
    assert files.contents(LOG) == before


def test_the_bytes_of_a_body_are_what_its_frame_says() -> None:
    for features in (0, 1):
        body = encode([b"a" * 1000, b"b"], features)
        assert body.stored_length == sum(map(len, body.pieces))
        assert (body.count, body.raw_length) == (2, 1009)
        assert (body.codec is Codec.ZSTD) == (body.stored_length < body.raw_length)


def test_a_segment_keeps_a_reserve_for_its_footer() -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=64 * KiB)
    active: ActiveSegment = log.active
    while active.fits(4):
        append(log, b"")
    assert active is log.active
    left = active.capacity - active.position.offset
    assert footer_reserve(active.capacity) <= left < footer_reserve(active.capacity) + BLOCK


# -- two threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recycled", [False, True])
def test_a_rotation_that_cannot_wait_takes_the_next_segment_as_far_as_it_is(recycled: bool) -> None:
    """Zeros are written ahead in another thread; what an old file held must not shine through."""
    files = MemoryFiles()
    log = open_log(files, segment_size=1 * MiB)
    for _ in range(60):
        append(log, b"\xff" * 20_000)
    if recycled:
        log.drop_before(log.sealed()[0].next_lsn)
        assert spares(files)
    zeros, hurried = 0, threading.Event()

    def look(operation: str, path: str) -> None:
        nonlocal zeros
        if operation == "pwrite" and threading.current_thread() is preparing:
            zeros += 1
            # The rotation asks for the file while its first zeros are written.
            begun.set()
            hurried.wait(60)

    begun = threading.Event()
    files.after_operation = look
    preparing = threading.Thread(target=log.prepare_spare)
    preparing.start()
    assert begun.wait(60)
    rotating = threading.Thread(target=log.rotate)
    rotating.start()
    while not log.spares._hurry:
        rotating.join(0.001)
    hurried.set()
    rotating.join(60)
    preparing.join(60)
    files.after_operation = None
    assert zeros == 1, "it went on writing zeros"
    data = files.read_file(LOG, log.active.header.name)
    assert len(data) == log.active.capacity == 1 * MiB
    assert not any(data[BLOCK:])
    last = log.last_lsn
    assert append(log, b"on it goes") == last + 1
    assert records_of(log)[-1] == (last + 1, b"on it goes")


def test_zeros_leave_the_disk_to_commits_unless_they_fall_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two pieces of zeros there are pauses, bounded; none where the active segment
    fills faster, and none once a rotation waits."""
    log = open_log(MemoryFiles(), segment_size=1 * MiB)
    waits: list[float] = []

    class Lock:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        def wait(self, seconds: float) -> None:
            waits.append(seconds)

    monkeypatch.setattr(log.spares, "_lock", Lock())

    def pauses(done: float, used: float) -> list[float]:
        waits.clear()
        here = log.active.position
        log.active.position = replace(here, offset=int(used * log.active.capacity))
        log.spares._pause(done, 0.5)
        log.active.position = here
        return list(waits)

    assert pauses(done=0.0, used=0.25) == [PAUSE_SHARE * 0.5] * PAUSES
    assert pauses(done=0.5, used=0.49) == [PAUSE_SHARE * 0.5] * PAUSES
    assert pauses(done=0.5, used=0.51) == []
    assert pauses(done=0.99, used=0.75) == []
    log.spares._hurry = True
    assert pauses(done=0.0, used=0.25) == []


@pytest.fixture
def switching() -> Iterator[None]:
    """An interpreter that changes threads as often as it can: in a given time they meet more often,
    and nobody waits for those that only look."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
def test_writing_preparing_dropping_and_reading_go_on_at_the_same_time(tmp_path: Path) -> None:
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    append(log, b"1")
    errors: list[Exception] = []
    done = threading.Event()

    def run(call: Callable[[], object]) -> threading.Thread:
        def loop() -> None:
            try:
                while not done.is_set():
                    call()
            except Exception as exc:  # noqa: BLE001  (the test looks at it)
                errors.append(exc)
                done.set()

        thread = threading.Thread(target=loop)
        thread.start()
        return thread

    def look() -> None:
        first, last = log.first_lsn, log.synced_lsn
        try:
            found = read_between(log, first, last)
        except (FileNotFoundError, CorruptLogError, Moved):
            assert log.first_lsn > first, "nothing was dropped, and yet something is missing"
        else:
            assert found == tuple((lsn, b"%d" % lsn) for lsn in range(first, last + 1))

    threads = [
        run(log.prepare_spare),
        run(lambda: log.drop_before(max(1, log.synced_lsn - 20))),
        run(look),
    ]
    for lsn in range(2, 200):
        if done.is_set():
            break
        append(log, b"%d" % lsn)
    done.set()
    for thread in threads:
        thread.join(60)
    assert errors == []
    log.close()
    assert spares_in(tmp_path) == []
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY, verify_bytes=math.inf)
    assert records_of(log) == tuple((lsn, b"%d" % lsn) for lsn in range(log.first_lsn, 200))
    log.close()


def spares_in(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.name.startswith(SPARE)]


# -- both ends at once ------------------------------------------------------------------


def test_a_cut_below_what_retention_has_dropped_meanwhile_changes_nothing() -> None:
    files = make_log([b"1"], [b"2"], [b"3"], [b"4"])
    log = open_log(files)
    log.drop_before(3)
    before = files.contents(LOG)
    with pytest.raises(LsnTruncatedError) as caught:
        log.truncate_after(1)
    assert caught.value.first_lsn == 3
    assert files.contents(LOG) == before
    assert append(log, b"5") == 5
    log.truncate_after(2)
    assert (log.first_lsn, log.last_lsn) == (3, 2), "just before the first record is no loss"
    assert append(log, b"another") == 3
    assert records_of(log) == ((3, b"another"),)
