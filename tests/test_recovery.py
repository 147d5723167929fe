"""What a crash leaves behind, and what the next open makes of it.

Acknowledged records are there, a unit is whole or absent, order is kept, and what an open
has reported no second crash takes back.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from logs import (
    LOG,
    TINY,
    CrashTest,
    Records,
    append,
    content,
    copy_of,
    make_log,
    numbered,
    open_log,
    records_of,
    segments,
)
from msgspec.structs import replace

import trio_wal
from trio_wal import CorruptLogError, RecoveryReport
from trio_wal._disk.chain import read_meta
from trio_wal._disk.frame import (
    BLOCK,
    DATA_OFFSET,
    FRAME_HEADER_SIZE,
    POINTER_OFFSET,
    Meta,
    Truncation,
    frame_size,
)
from trio_wal._disk.opening import open_log_directory
from trio_wal._disk.recovery import examine
from trio_wal._disk.segment import ActiveSegment
from trio_wal._disk.verify import verify
from trio_wal._system.files import OsFiles
from trio_wal._system.sync import FOLIO_MAX
from trio_wal._util import KiB
from trio_wal.testing import MemoryFiles


def report(files: MemoryFiles, **options: Any) -> RecoveryReport:
    """What an open would say; the files stay as they are."""
    log = open_log(copy_of(files), **options)
    log.close(orderly=False)
    return attrs.evolve(log.report, seconds=0.0)


# -- what is reported ---------------------------------------------------------------------


def test_a_new_log_is_empty_and_clean() -> None:
    files = MemoryFiles()
    log = open_log(files)
    assert attrs.evolve(log.report, seconds=0.0) == RecoveryReport(1, 0, 1, 0, 0, 0, True, 0.0)
    log.close()
    assert report(files).clean_shutdown


def test_a_closed_log_is_clean_and_checked() -> None:
    files = make_log([b"1", b"2"], [b"3"], [b"4"])
    assert report(files) == RecoveryReport(
        first_lsn=1,
        last_lsn=4,
        segments=2,
        records_replayed=4,
        # Two frames, one and the mark of the close.
        bytes_scanned=4 * BLOCK,
        torn_bytes=0,
        clean_shutdown=True,
        seconds=0.0,
    )


def test_a_log_whose_process_was_killed_is_whole_and_not_clean() -> None:
    files = make_log([b"1", b"2"], [b"3"], [b"4"], close=False)
    assert report(files) == RecoveryReport(1, 4, 2, 4, 3 * BLOCK, 0, False, 0.0)
    assert content(files) == numbered([b"1", b"2", b"3", b"4"])


def test_the_mark_of_a_close_holds_until_something_is_written() -> None:
    files = make_log([b"1"], segment_size=64 * KiB)
    log = open_log(files, segment_size=64 * KiB)
    assert report(files).clean_shutdown
    append(log, b"2")
    assert not report(files).clean_shutdown
    log.close()
    assert report(files).clean_shutdown


def test_examining_writes_nothing() -> None:
    files = make_log([b"1"], [b"2"], [b"3"], close=False)
    log = open_log(files)
    log.active.file.pwrite([b"torn"], log.active.position.offset)
    files = copy_of(files)
    plan = examine(files.open_directory(LOG))
    assert plan.torn_bytes == BLOCK
    assert set(files.operations) <= {"open", "pread"}


# -- torn tails -----------------------------------------------------------------------------

LAST_BATCH = [b"c" * 200, b"", b"d" * 250]


def unfinished(files: MemoryFiles, name: str, frame: int, cut: int, *, short: bool) -> MemoryFiles:
    """A crash that has written the bytes up to ``cut`` of the frame at ``frame``."""
    after = copy_of(files)
    data = after.read_file(LOG, name)
    after.write_file(LOG, name, data[:cut] if short else data[:cut].ljust(len(data), b"\0"))
    return after


@pytest.mark.parametrize("short", [False, True], ids=["zeros behind", "file ends"])
@pytest.mark.parametrize("segment_size", [TINY, 64 * KiB], ids=["first frame", "third frame"])
def test_an_unfinished_batch_is_cut_at_every_byte(short: bool, segment_size: int) -> None:
    files = make_log([b"a"], [b"b"], LAST_BATCH, close=False, segment_size=segment_size)
    name = segments(files)[-1]
    frame = DATA_OFFSET if segment_size == TINY else DATA_OFFSET + 2 * BLOCK
    data = files.read_file(LOG, name)
    whole = frame + len(data[frame:].rstrip(b"\0"))
    assert frame_size(whole - frame - 64) == frame_size(4 * 3 + 450)
    for cut in range(frame, whole + 1):
        after = unfinished(files, name, frame, cut, short=short)
        left = len(data[frame:cut].rstrip(b"\0"))
        expected = numbered([b"a", b"b", *(LAST_BATCH if cut == whole else [])])
        log = open_log(after, segment_size=segment_size)
        assert records_of(log) == expected
        if cut == whole:
            assert log.report.torn_bytes == 0
        elif short:
            # The file's last block may be one in part.
            assert log.report.torn_bytes == min(-(-left // BLOCK) * BLOCK, cut - frame)
        else:
            assert log.report.torn_bytes == -(-left // BLOCK) * BLOCK
        assert not log.report.clean_shutdown
        append(log, b"after")
        log.close()
        for _ in range(2):
            log = open_log(after, segment_size=segment_size)
            assert records_of(log) == (*expected, (len(expected) + 1, b"after"))
            assert (log.report.torn_bytes, log.report.clean_shutdown) == (0, True)
            log.close()


def test_a_mark_that_a_kill_left_in_the_page_cache_is_durable_after_the_next_close() -> None:
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    moments: list[MemoryFiles] = []

    def look(operation: str, path: str) -> None:
        if operation == "pwrite":
            moments.append(files.crash_image(kind="kill"))

    files.after_operation = look
    log.close()
    files.after_operation = None
    killed = moments[-1]
    log = open_log(killed)
    assert log.report.clean_shutdown
    log.close()
    for seed in range(20):
        assert report(killed.crash_image(seed)).clean_shutdown


def test_stray_bytes_behind_a_closed_log_are_cut() -> None:
    files = make_log([b"a"], [b"b"], segment_size=64 * KiB)
    (name,) = segments(files)
    data = files.read_file(LOG, name)
    end = DATA_OFFSET + 3 * BLOCK
    files.write_file(LOG, name, data[:end] + b"stray".ljust(len(data) - end, b"\0"))
    log = open_log(files, segment_size=64 * KiB)
    assert log.report.torn_bytes == BLOCK
    append(log, b"c")
    append(log, b"d")
    assert content(files) == numbered([b"a", b"b", b"c", b"d"])


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("growth", [1, 511, 512, 100_000])
def test_a_longer_file_with_zeros_is_no_damage(close: bool, growth: int) -> None:
    files = make_log([b"a"], [b"b"], [b"c"], close=close)
    expected = report(files)
    for name in segments(files):
        files.write_file(LOG, name, files.read_file(LOG, name) + bytes(growth))
        found = report(files)
        # A crash in a rotation can leave zeros behind a footer: such a close is not clean.
        assert attrs.evolve(found, clean_shutdown=close) == expected
    log = open_log(files)
    append(log, b"d")
    assert content(files) == numbered([b"a", b"b", b"c", b"d"])


@pytest.mark.parametrize("close", [False, True])
def test_the_unused_end_of_the_last_file_is_not_missed(close: bool) -> None:
    files = make_log([b"a"], [b"b"], close=close, segment_size=64 * KiB)
    (name,) = segments(files)
    used = DATA_OFFSET + (3 if close else 2) * BLOCK
    files.write_file(LOG, name, files.read_file(LOG, name)[:used])
    log = open_log(files)
    assert log.report.torn_bytes == 0
    append(log, b"c")
    assert content(files) == numbered([b"a", b"b", b"c"])


@pytest.mark.parametrize(
    ("kept", "pointer", "torn"),
    [
        (BLOCK, True, 0),
        (BLOCK, False, 0),
        (FRAME_HEADER_SIZE, False, 0),
        # Only the pointer tells what that was, or nothing does.
        (20, True, 0),
        (20, False, BLOCK),
        (0, True, 0),
    ],
)
def test_a_torn_mark_of_a_close_is_no_unfinished_batch(kept: int, pointer: bool, torn: int) -> None:
    """The power failed in the last sync of a close; every record had been told durable."""
    files = MemoryFiles(seed=7)
    log = open_log(files, segment_size=16 * KiB)
    append(log, b"a")
    append(log, b"b")
    # So that the mark has two blocks, as it has in long segments.
    log.active.index = [(1, DATA_OFFSET + n) for n in range(40)]
    mark = log.active.position.offset
    log.close()
    (name,) = segments(files)
    data = bytearray(files.read_file(LOG, name))
    assert len(data[mark:].rstrip(b"\0")) > BLOCK
    data[mark + kept :] = bytes(len(data) - mark - kept)
    if not pointer:
        data[POINTER_OFFSET : POINTER_OFFSET + BLOCK] = bytes(BLOCK)
    files.write_file(LOG, name, bytes(data))
    found = report(files, segment_size=16 * KiB)
    assert (found.last_lsn, found.torn_bytes, found.clean_shutdown) == (2, torn, False)
    assert verify(files.open_directory(LOG)).torn_bytes == torn
    log = open_log(files, segment_size=16 * KiB)
    assert records_of(log) == numbered([b"a", b"b"])
    append(log, b"c")
    log.close()
    assert content(files) == numbered([b"a", b"b", b"c"])


# -- crashes at every operation ---------------------------------------------------------------


def story_of_appends(t: CrashTest) -> None:
    t.open()
    for n in range(3):
        t.append(b"%d" % n)
    t.append(b"a unit", b"of three", b"z" * 2000)
    t.log.prepare_spare()
    t.append(b"x", b"y")
    t.append(b"z")


def story_of_late_syncs(t: CrashTest) -> None:
    t.open()
    t.append(b"first")
    t.append_unsynced(b"a", b"b", b"c", b"d", b"e" * 1500)
    t.append(b"last")


def story_of_sessions(t: CrashTest) -> None:
    t.open()
    t.close()
    t.open()
    t.append(b"a", b"b")
    t.close()
    t.open()
    t.close()
    t.open()
    t.step(lambda log: log.rotate())
    t.append(b"c")
    t.append(b"d")
    t.close()
    t.open()
    t.append(b"e")


def story_of_dropping(t: CrashTest) -> None:
    t.open()
    for n in range(7):
        t.append(b"%d" % n)
    t.truncate_before(4)
    t.log.prepare_spare()
    t.append(b"a")
    t.append(b"b", b"c")
    t.step(lambda log: log.rotate())
    t.truncate_before(t.log.last_lsn + 1)
    t.append(b"d")


def story_of_cutting(t: CrashTest) -> None:
    t.open()
    t.append(b"1")
    t.append(b"2", b"3", b"4")
    t.append(b"5")
    t.append(b"6", b"7")
    t.truncate_after(6)
    t.truncate_after(5)
    t.append(b"six")
    t.truncate_after(3)
    t.append(b"four")
    t.append(b"five")
    t.append(b"six")
    t.close()
    t.open()
    t.truncate_after(4)
    t.append(b"five")
    t.truncate_after(0)
    t.close()
    t.open()
    t.append(b"one")
    t.append(b"two")
    t.truncate_after(1)
    t.truncate_after(0)
    t.append(b"one")
    t.append(b"two")
    t.append(b"three")
    t.append(b"four")
    t.truncate_before(3)
    t.truncate_after(2)
    t.append(b"three")


STORIES = [
    story_of_appends,
    story_of_late_syncs,
    story_of_sessions,
    story_of_dropping,
    story_of_cutting,
]


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("segment_size", [TINY, 16 * KiB])
def test_a_crash_at_any_operation_loses_nothing_acknowledged(story: Any, segment_size: int) -> None:
    test = CrashTest(MemoryFiles(seed=3), seeds=range(3), options={"segment_size": segment_size})
    story(test)
    assert test.images > 50


@pytest.mark.parametrize("story", STORIES)
def test_a_crash_at_any_operation_of_a_recovery_changes_nothing(story: Any) -> None:
    test = CrashTest(MemoryFiles(seed=4), seeds=range(1), nested=7)
    story(test)
    assert test.nested_images > 50


def test_a_crash_while_a_log_is_created_leaves_a_log_or_nothing() -> None:
    files = MemoryFiles()
    images: list[MemoryFiles] = []
    files.after_operation = lambda operation, path: images.extend(
        [files.crash_image(kind="kill"), *(files.crash_image(seed) for seed in range(20))]
    )
    open_log(files)
    assert len(images) > 200
    for image in images:
        log = open_log(image)
        assert (log.first_lsn, log.last_lsn, log.report.torn_bytes) == (1, 0, 0)
        append(log, b"a")
        assert content(image.crash_image(1)) == ((1, b"a"),)


async def test_a_crash_at_any_operation_of_a_log_with_many_tasks_loses_nothing_acknowledged() -> (
    None
):
    """The same through the whole log: queue, group commit, rotation, background work."""
    files = MemoryFiles()
    acknowledged: dict[int, bytes] = {}
    units: list[tuple[bytes, ...]] = []
    moments: list[tuple[MemoryFiles, dict[int, bytes]]] = []

    def crash(operation: str, path: str) -> None:
        before = dict(acknowledged)
        moments.extend((files.crash_image(seed), before) for seed in (0, 1))

    async def write(name: bytes) -> None:
        for n in range(4):
            data = b"%s %d" % (name, n)
            acknowledged[await wal.append(data)] = data
        unit = tuple(b"%s unit %d" % (name, n) for n in range(3))
        units.append(unit)
        acknowledged.update(zip(await wal.append_many(unit), unit, strict=True))

    async with trio_wal.open_wal(LOG, files=files, segment_size=TINY) as wal:
        files.after_operation = crash
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(write, b"task %d" % number)
        files.after_operation = None
    assert len(acknowledged) == 35
    assert len(moments) > 50
    for image, known in moments:
        found = dict(content(image))
        assert known.items() <= found.items()
        assert list(found) == list(range(1, len(found) + 1))
        for unit in units:
            lsns = [lsn for lsn, data in found.items() if data in unit]
            assert [found[lsn] for lsn in lsns] in ([], list(unit))
            assert not lsns or lsns == list(range(lsns[0], lsns[0] + 3))


# -- the page cache is not trusted --------------------------------------------------------------


def reopened_then_power_lost(files: MemoryFiles, allowed: list[Records], seed: int) -> None:
    """What an open reports, and what is appended then, survives the loss of power."""
    log = open_log(files)
    found = records_of(log)
    assert found in allowed
    append(log, b"after")
    after = content(files.crash_image(seed))
    assert after == (*found, (log.last_lsn, b"after"))


@pytest.mark.parametrize("story", [story_of_sessions, story_of_dropping, story_of_cutting])
@pytest.mark.parametrize(
    ("operation", "error"),
    [
        ("sync", errno.EIO),
        ("pwrite", errno.EIO),
        ("pwrite", errno.ENOSPC),
        ("sync_dir", errno.EIO),
        ("rename", errno.EIO),
        ("unlink", errno.EIO),
        ("truncate", errno.EIO),
        ("allocate", errno.ENOSPC),
    ],
)
def test_a_call_that_fails_at_any_time_makes_no_open_report_what_is_not_durable(
    story: Any, operation: Any, error: int
) -> None:
    """After a failed sync the kernel shows pages that are not on the disk, as clean."""
    for after in range(200):
        test = CrashTest(MemoryFiles(seed=after), seeds=())
        test._check = lambda image: None  # type: ignore[method-assign]
        written = 300 if operation == "pwrite" else 0
        test.files.fail(operation, error, after=after, written=written)
        with contextlib.suppress(OSError, trio_wal.LogFullError):
            story(test)
        if test.files.operations.get(operation, 0) <= after:
            break
        for seed in range(2):
            reopened_then_power_lost(copy_of(test.files), test.allowed, seed)
    assert after or operation == "unlink"


def test_a_failed_sync_of_a_record_is_not_believed_by_the_next_open() -> None:
    files = make_log([b"a"], segment_size=64 * KiB)
    log = open_log(files, segment_size=64 * KiB)
    files.fail("sync")
    with pytest.raises(OSError, match=r"^\[Errno 5\]"):
        append(log, b"b")
    files = copy_of(files)
    log = open_log(files, segment_size=64 * KiB)
    assert log.last_lsn == 2, "it can be read, so it may have been acknowledged"
    for seed in range(5):
        assert content(files.crash_image(seed)) == numbered([b"a", b"b"])


@pytest.mark.parametrize("rotate", [False, True])
def test_a_failed_sync_of_the_mark_of_a_close_costs_no_later_record(rotate: bool) -> None:
    """The next frame is chained to the mark: both or none must reach the disk."""
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    files.fail("sync")
    with pytest.raises(OSError, match=r"^\[Errno 5\]"):
        log.close()
    files = copy_of(files)
    images: list[MemoryFiles] = []
    log = open_log(files)
    assert log.report.clean_shutdown
    files.after_operation = lambda *_: images.extend(files.crash_image(seed) for seed in range(3))
    if rotate:
        log.rotate()
    for image in images:
        assert content(image) == ((1, b"a"),)
    files.after_operation = None
    append(log, b"b")
    for seed in range(5):
        assert content(files.crash_image(seed)) == numbered([b"a", b"b"])


def test_what_was_dropped_before_two_kills_does_not_come_back_after_an_open() -> None:
    files = make_log(*([b"%d" % n] for n in range(6)))
    # The first kill: log.meta has its new name, and the directory is not synced.
    killed: list[MemoryFiles] = []

    def kill(operation: str, path: str) -> None:
        if operation == "rename" and path == f"{LOG}/log.meta":
            killed.append(files.crash_image(kind="kill"))

    files.after_operation = kill
    open_log(files).drop_before(5)
    # The second: the next open has removed the last of the dropped segments.
    again = killed[0]
    images: list[MemoryFiles] = []
    again.after_operation = lambda *_: images.append(again.crash_image(kind="kill"))
    first_lsn = open_log(again).first_lsn
    assert first_lsn == 5
    assert len(images) >= 3
    for image in images:
        opened = open_log(image)
        if opened.first_lsn == first_lsn:
            assert {open_log(image.crash_image(seed)).first_lsn for seed in range(20)} == {5}


def test_only_what_is_not_proven_durable_is_copied() -> None:
    files = make_log([b"a"], [b"b"], [b"c"], close=False, segment_size=64 * KiB)
    log = open_log(files, segment_size=64 * KiB)
    # Frame b was written when a was durable, c when b was: only c has no witness.
    assert [(s.first_lsn, s.next_lsn) for s in log.sealed()] == [(1, 3)]
    assert log.active.header.first_lsn == 3
    log.close()
    log = open_log(files, segment_size=64 * KiB)
    assert log.segments == 2, "a closed log is its own witness"


# -- unfinished business --------------------------------------------------------------------------


def test_temporary_files_of_a_crash_are_removed() -> None:
    files = make_log([b"a"])
    before = files.contents(LOG)
    for name in ("log.meta.tmp", "segment.tmp", "spare-1.tmp", "spare-27.tmp", "truncate.tmp"):
        files.write_file(LOG, name, b"whatever")
    open_log(files).close()
    assert files.contents(LOG) == before


def test_other_files_in_the_directory_are_left_alone() -> None:
    files = make_log([b"a"])
    for name in (".hidden", "notes.txt", "spare-parts.txt", "wal", "log.meta.bak"):
        files.write_file(LOG, name, b"mine")
    before = files.contents(LOG)
    log = open_log(files)
    assert records_of(log) == ((1, b"a"),)
    log.close()
    assert files.contents(LOG) == before


@pytest.mark.parametrize("name", [".gitignore", "lost+found", "lock", "segment.tmp"])
def test_a_log_is_created_in_a_directory_that_holds_nothing_of_weight(name: str) -> None:
    files = MemoryFiles()
    files.write_file(LOG, name, b"")
    log = open_log(files)
    assert log.last_lsn == 0


def decided(files: MemoryFiles, cut: Truncation) -> None:
    meta = read_meta(files.open_directory(LOG))
    assert meta is not None
    files.write_file(LOG, "log.meta", replace(meta, truncation=cut).encode())


def test_a_cut_that_was_decided_needs_its_new_segment() -> None:
    files = make_log([b"a"], [b"b"], [b"c"], close=False)
    decided(files, Truncation(bytes(16), 1, DATA_OFFSET + BLOCK, 0, 2))
    before = files.contents(LOG)
    with pytest.raises(
        CorruptLogError,
        match=r"^/log/wal-0{19}2\.log: at offset 0: the segment in which a truncated log "
        r"goes on is missing",
    ):
        open_log(files)
    assert files.contents(LOG) == before


def test_a_cut_that_was_not_decided_leaves_no_trace() -> None:
    files = make_log([b"a"], [b"b"], [b"c"])
    files.write_file(LOG, "truncate.tmp", files.read_file(LOG, segments(files)[0]))
    assert content(files) == numbered([b"a", b"b", b"c"])


def test_a_segment_without_a_footer_gets_it_by_the_next_open() -> None:
    """A crash between the two steps of a rotation."""
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    append(log, b"b")
    images: list[MemoryFiles] = []
    files.after_operation = lambda operation, path: images.append(copy_of(files))
    log.rotate()
    files.after_operation = None
    fresh = segments(files)[-1]
    unsealed = next(image for image in images if fresh in image.names(LOG))
    sealed = files.read_file(LOG, segments(files)[0])
    assert unsealed.read_file(LOG, segments(files)[0]) != sealed
    log = open_log(unsealed)
    assert unsealed.read_file(LOG, segments(files)[0]) == sealed
    assert not log.report.clean_shutdown
    assert records_of(log) == numbered([b"a", b"b"])


def test_the_footer_of_the_last_segment_but_one_is_made_durable_again() -> None:
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    append(log, b"b")
    # The third sync of a rotation is the footer's.
    files.fail("sync", after=1)
    with pytest.raises(OSError, match=r"^\[Errno 5\]"):
        log.rotate()
    files = copy_of(files)
    name = segments(files)[0]
    assert len(segments(files)) == 2
    log = open_log(files)
    append(log, b"c")
    append(log, b"d")
    append(log, b"e")
    for seed in range(5):
        image = files.crash_image(seed)
        assert image.read_file(LOG, name) == files.read_file(LOG, name)
        assert content(image) == numbered([b"a", b"b", b"c", b"d", b"e"])


# -- how much is checked ------------------------------------------------------------------------


def eight() -> MemoryFiles:
    """Eight records in four segments."""
    return make_log(*([b"%d" % n] for n in range(8)))


@pytest.mark.parametrize(
    ("verify_bytes", "replayed"),
    [
        # A segment costs its bytes, 32 KiB for each frame and 64 bytes for each record.
        (0, 0),
        (33 * KiB - BLOCK + 127, 0),
        (33 * KiB - BLOCK + 128, 2),
        (98 * KiB + 383, 2),
        (98 * KiB + 384, 6),
        (163 * KiB + 639, 6),
        (163 * KiB + 640, 10),
        (math.inf, 10),
    ],
)
def test_so_much_is_checked_record_by_record_newest_first(
    verify_bytes: float, replayed: int
) -> None:
    files = make_log(*([b"%d" % n, b"%d" % n] for n in range(5)))
    assert len(segments(files)) == 3
    found = report(files, verify_bytes=verify_bytes)
    assert found.records_replayed == replayed
    assert (found.first_lsn, found.last_lsn, found.clean_shutdown) == (1, 10, True)


FRAME = 100 * KiB


@pytest.fixture(scope="module")
def long_segments() -> MemoryFiles:
    """A short segment, then two of 24 frames of 100 KiB each, closed."""
    files = MemoryFiles(seed=8)
    log = open_log(files, segment_size=26 * FRAME)
    append(log, b"first")
    for number in range(48):
        if number % 24 == 0:
            log.rotate()
        append(log, bytes([number]) * (FRAME - BLOCK))
    log.close()
    assert len(segments(files)) == 3
    return files


@pytest.mark.parametrize("frames", [0, 1, 2, 4, 10, 23, 24, 25, 30, 47, 48])
def test_of_a_long_segment_the_newest_part_is_checked(
    long_segments: MemoryFiles, frames: int
) -> None:
    """From a place in its footer's index on, of which there is one each 300 KiB here."""
    budget = frames * (FRAME + 32 * KiB + 64) + 2 * BLOCK
    found = report(long_segments, verify_bytes=budget)
    assert frames - 3 < found.records_replayed <= frames
    if frames % 24 == 0:
        assert found.records_replayed == frames
    assert found.bytes_scanned - FRAME * found.records_replayed in (0, BLOCK)
    assert found.clean_shutdown


@pytest.mark.parametrize("damaged", [9, 22, 33, 34, 46])
@pytest.mark.parametrize("checked", [5, 10, 24, 40])
def test_damage_in_the_part_that_is_checked_is_refused_and_in_no_other(
    long_segments: MemoryFiles, damaged: int, checked: int
) -> None:
    files = copy_of(long_segments)
    name = segments(files)[1 + damaged // 24]
    offset = DATA_OFFSET + damaged % 24 * FRAME
    files.flip_bit(LOG, name, 8 * (offset + 70_000))
    budget = checked * (FRAME + 32 * KiB + 64) + 2 * BLOCK
    replayed = report(long_segments, verify_bytes=budget).records_replayed
    if damaged >= 48 - replayed:
        before = files.contents(LOG)
        with pytest.raises(CorruptLogError, match=rf"^/log/{name}: at offset {offset}: checksum"):
            open_log(files, verify_bytes=budget)
        assert files.contents(LOG) == before
    else:
        log = open_log(files, verify_bytes=budget)
        with pytest.raises(CorruptLogError, match=rf"^/log/{name}: at offset {offset}: checksum"):
            records_of(log)


@pytest.mark.parametrize("number", [0, 1])
def test_an_index_that_lies_costs_only_a_longer_check(number: int) -> None:
    """It is in a footer with a good checksum: no damage, but nothing to begin at either."""
    files = MemoryFiles(seed=8)
    log = open_log(files, segment_size=26 * FRAME)
    append(log, b"first")
    log.rotate()
    for n in range(14):
        append(log, bytes([n]) * (FRAME - BLOCK))
    log.active.index[1:] = [(lsn, offset + BLOCK) for lsn, offset in log.active.index[1:]]
    if number == 0:
        log.rotate()
        append(log, b"last")
    log.close()
    found = report(files, verify_bytes=6 * (FRAME + 32 * KiB + 64))
    assert found.records_replayed == found.last_lsn - 1
    assert (found.clean_shutdown, found.segments) == (True, 3 - number)


def test_the_last_segment_of_a_crashed_log_is_checked_whatever_is_asked_for() -> None:
    files = make_log([b"a"], [b"b"], [b"c"], close=False, segment_size=64 * KiB)
    assert report(files, verify_bytes=0).records_replayed == 3


def test_damage_outside_of_the_budget_is_found_when_it_is_read() -> None:
    files = eight()
    name = segments(files)[1]
    files.flip_bit(LOG, name, 8 * (DATA_OFFSET + BLOCK + 64))
    with pytest.raises(CorruptLogError):
        open_log(copy_of(files), verify_bytes=math.inf)
    log = open_log(files, verify_bytes=0)
    with pytest.raises(CorruptLogError, match=rf"^/log/{name}: at offset 4608: "):
        records_of(log)
    append(log, b"8")
    log.drop_before(5)
    assert records_of(log) == numbered((b"%d" % n for n in range(4, 9)), 5)


@pytest.mark.parametrize("offset", [0, POINTER_OFFSET + 20, DATA_OFFSET + 2 * BLOCK + 5])
def test_headers_and_footers_are_checked_whatever_the_budget(offset: int) -> None:
    files = eight()
    name = segments(files)[0]
    files.flip_bit(LOG, name, 8 * offset)
    with pytest.raises(CorruptLogError, match=rf"^/log/{name}: "):
        open_log(files, verify_bytes=0)


def test_a_log_opened_at_its_mark_goes_on_as_if_all_had_been_checked() -> None:
    full, fast = eight(), eight()
    for files, verify_bytes in ((full, math.inf), (fast, 0)):
        log = open_log(files, verify_bytes=verify_bytes)
        append(log, b"8")
        append(log, b"9")
        log.close()
    assert content(full) == content(fast) == numbered(b"%d" % n for n in range(10))
    assert segments(full) == segments(fast)


def test_meta_of_a_log_in_use_says_so() -> None:
    meta = read_meta(eight().open_directory(LOG))
    assert meta is not None
    assert meta == Meta(meta.log_uuid, 1, 1, live=True)


# -- what a forger writes ---------------------------------------------------------------------


def test_a_footer_that_lies_about_its_segment_is_not_gone_on_with() -> None:
    """Behind the mark of a close recovery counts from its footer, and writes the next one."""
    files = make_log([b"a"], [b"b"], segment_size=16 * KiB)
    log = open_log(files, segment_size=16 * KiB)
    append(log, b"c")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActiveSegment, "records", 10)
        log.close()
    log = open_log(files, segment_size=16 * KiB, verify_bytes=0)
    log.rotate()
    append(log, b"d")
    log.close()
    assert content(files) == numbered([b"a", b"b", b"c", b"d"])


def test_a_log_of_which_only_creation_was_begun_may_hold_no_strange_segment() -> None:
    files = MemoryFiles()
    images: list[MemoryFiles] = []
    files.after_operation = lambda operation, path: images.append(copy_of(files))
    open_log(files)
    begun = next(image for image in images if "log.meta" in image.names(LOG))
    begun.write_file(LOG, "wal-1.log", b"")
    with pytest.raises(CorruptLogError, match=r"^/log/wal-1\.log: .* not the name of a segment"):
        open_log(begun)


# -- the page cache ---------------------------------------------------------------------


def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(file, offset, length) of what is asked to be read from the disk, as it is asked for."""
    asked: list[tuple[str, int, int]] = []

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        asked.append((os.path.basename(os.readlink(f"/proc/self/fd/{fd}")), offset, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return asked


@pytest.mark.skipif(sys.platform != "linux", reason="looks descriptors up in Linux's /proc")
def test_the_end_of_a_log_is_read_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed write the page cache holds what the disk does not have."""
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=1)
    for number in range(10):
        append(log, bytes([number]))
    log.close(orderly=False)
    names = sorted(path.name for path in tmp_path.glob("wal-*"))
    assert len(names) > 3
    asked = forgotten(monkeypatch)
    open_log_directory(OsFiles(), str(tmp_path), segment_size=1).close()
    assert asked == [(name, 0, 0) for name in names[-2:]]


def test_a_mark_is_written_only_when_the_one_before_it_is_durable() -> None:
    """For whoever sees it takes it for a proof that all before it is."""
    files = make_log([b"a"], [b"b"], [b"c"])
    previous, _ = segments(files)
    # Zeros behind the footer: it is written again, and the log is marked again.
    files.write_file(LOG, previous, files.read_file(LOG, previous) + bytes(BLOCK))
    log = open_log(files)
    calls: list[str] = []
    files.after_operation = lambda operation, path: calls.append(operation)
    log.close()
    # The old mark, the new one, the pointer.
    assert calls == ["pwrite", "sync", "pwrite", "pwrite", "sync"]
    assert content(files) == numbered([b"a", b"b", b"c"])
    assert report(files).clean_shutdown


@pytest.mark.skipif(sys.platform != "linux", reason="looks descriptors up in Linux's /proc")
@pytest.mark.parametrize("close", [True, False])
def test_what_a_seal_or_a_close_proves_to_be_on_the_disk_need_not_come_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, close: bool
) -> None:
    """Else an open would wait for the disk, however orderly the log was closed."""
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=1)
    for size in (1, 4 * FOLIO_MAX, 3 * FOLIO_MAX, 2 * FOLIO_MAX):
        append(log, bytes(size))
    assert [info.bytes // FOLIO_MAX for info in log.sealed()] == [0, 4, 3]
    log.close(orderly=close)
    *_, previous, last = sorted(path.name for path in tmp_path.glob("wal-*"))
    asked = forgotten(monkeypatch)
    open_log_directory(OsFiles(), str(tmp_path), segment_size=1).close()
    assert asked == [
        (previous, 0, FOLIO_MAX),
        (previous, 3 * FOLIO_MAX, 0),
        *([(last, 0, FOLIO_MAX), (last, 2 * FOLIO_MAX, 0)] if close else [(last, 0, 0)]),
    ]


# -- marks of a close that are in the page cache only ---------------------------------------------


ROOMY = 64 * KiB
"""So that what is appended goes behind the mark, into the same segment."""


def _killed_while_closing() -> MemoryFiles:
    """A log with record 1, whose process died when it had written its CLOSE frame, and had not
    synced it."""
    files = MemoryFiles()
    log = open_log(files, segment_size=ROOMY)
    append(log, b"1")
    images: list[MemoryFiles] = []

    def look(operation: str, _: str) -> None:
        if operation == "pwrite":
            images.append(files.crash_image(kind="kill"))

    files.after_operation = look
    log.close()
    # The CLOSE frame, then the pointer to it.
    return images[0]


@pytest.mark.parametrize("torn", [False, True])
def test_a_copy_is_not_chained_to_a_mark_that_the_disk_may_not_have(torn: bool) -> None:
    """Killed while closing, killed again before anything was synced, and then the power fails in
    the midst of recovery: where the CLOSE frame is lost, what was copied must still fit."""
    files = _killed_while_closing()
    log = open_log(files, segment_size=ROOMY)
    log.write([b"2"], log.synced_lsn, sync=False)
    if torn:
        log.active.file.pwrite([b"torn"], log.active.position.offset)
    again = files.crash_image(kind="kill")
    images: list[MemoryFiles] = []
    again.after_operation = lambda *_: images.extend(again.crash_image(seed) for seed in range(20))
    recovered = open_log(again, segment_size=ROOMY)
    assert [data for _, data in records_of(recovered)] == [b"1", b"2"]
    assert len(images) > 100
    for image in images:
        found = [data for _, data in records_of(open_log(image, segment_size=ROOMY))]
        assert found in ([b"1"], [b"1", b"2"])
