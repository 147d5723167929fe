"""Segments made of dropped ones, with the bytes that those had: where such a one ends."""

from __future__ import annotations

import itertools
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import trio
from archives import RESTORED, archive_in, wait_archived
from helpers import read_all
from logs import (
    LOG,
    append,
    content,
    copy_of,
    forget_word,
    make_reused_log,
    numbered,
    open_log,
    records_of,
    reuse_dropped,
    reusing,
    segments,
)
from msgspec.structs import replace
from trio.testing import MockClock

import trio_wal
from trio_wal import (
    CorruptLogError,
    KeepBytes,
    KeepSegments,
    Retention,
    UnsupportedFormatError,
)
from trio_wal._disk import frame as _frame, scan
from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.frame import (
    BLOCK,
    DATA_OFFSET,
    FEATURE_REUSED,
    Kind,
    decode_meta,
    decode_segment_header,
    terminator_end,
)
from trio_wal._disk.scan import FrameScanner, start_of
from trio_wal._disk.verify import verify
from trio_wal._repair import Repair
from trio_wal._util import KiB, MiB
from trio_wal._watchsource import WatchSource
from trio_wal._worker import Blocking
from trio_wal.testing import MemoryFile, MemoryFiles

SIZE = 16 * KiB
"""Of a segment: room for some twenty short frames."""


def old_bytes(log: LogDirectory) -> bytes:
    """What stands behind the last frame of the active segment."""
    file = log.open_segment(log.active.header)
    start = log.active.position.offset
    return file.pread(file.size() - start, start)


def spoil(files: MemoryFiles, log: LogDirectory, offset: int) -> None:
    """One bit of the active segment."""
    data = bytearray(files.read_file(LOG, log.active.header.name))
    data[offset] ^= 1
    files.write_file(LOG, log.active.header.name, bytes(data))


def assert_damaged(source: WatchSource, place: int) -> None:
    assert isinstance(source.damage, CorruptLogError)
    assert source.damage.offset == place


def in_reused(files: MemoryFiles, **options: Any) -> LogDirectory:
    """An open log whose active segment was full of frames, and has three of its own."""
    log = open_log(files, segment_size=SIZE, **options)
    for number in range(1, 200):
        append(log, b"record %d" % number)
        reuse_dropped(log)
        if log.active.header.reused and log.active.frames == 3:
            return log
    raise AssertionError("no segment was used again")


def prepare_reused(log: LogDirectory) -> None:
    for _ in range(200):
        append(log, b"record")
        reuse_dropped(log)
        if log.spares.ready is not None:
            return
    raise AssertionError("no segment was prepared")


# -- making one -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kib", "reused"), [(63, False), (64, True), (330, True)])
def test_between_large_frames_a_dropped_segment_keeps_its_bytes(kib: int, reused: bool) -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=1 * MiB)
    while not log.sealed():
        append(log, b"x" * (kib * KiB))
    append(log, b"y" * (kib * KiB))
    log.drop_before(log.active.header.first_lsn)
    log.prepare_spare()
    spare = log.spares.ready
    assert spare is not None
    assert any(files.read_file(LOG, spare.name)) == reused
    while not log.sealed():
        append(log, b"z" * (kib * KiB))
    assert log.active.header.reused == reused
    assert log.features == 0, "a log has no such feature"
    assert records_of(log)


def test_a_reused_segment_begins_with_zeros_up_to_the_end_of_a_page() -> None:
    """Where its first frame will stand is no frame, and what stands before it is nobody's."""
    files = MemoryFiles()
    log = open_log(files, segment_size=SIZE)
    while not log.sealed():
        append(log, b"old")
    with reusing():
        append(log, b"more")
        append(log, b"and more")
    log.drop_before(log.active.header.first_lsn)
    with reusing():
        log.prepare_spare()
    log.rotate()
    assert log.active.header.reused
    data = files.read_file(LOG, log.active.header.name)
    assert not any(data[BLOCK : DATA_OFFSET + 4 * KiB])
    assert any(data[DATA_OFFSET + 4 * KiB :])
    assert append(log, b"first") == log.active.header.first_lsn


def test_a_terminator_is_a_block_at_least_and_stays_in_the_file() -> None:
    assert terminator_end(DATA_OFFSET, MiB) == 2 * DATA_OFFSET
    assert terminator_end(DATA_OFFSET + 3 * KiB, MiB) == 2 * DATA_OFFSET
    assert terminator_end(2 * DATA_OFFSET - BLOCK, MiB) == 2 * DATA_OFFSET
    assert terminator_end(2 * DATA_OFFSET, MiB) == 3 * DATA_OFFSET
    assert terminator_end(5000 * BLOCK, 5000 * BLOCK + 100) == 5000 * BLOCK + 100
    assert terminator_end(5000 * BLOCK, 5000 * BLOCK) == 5000 * BLOCK
    assert terminator_end(5001 * BLOCK, 5000 * BLOCK) == 5001 * BLOCK, "a mark may stand behind it"


@pytest.mark.parametrize(("kib", "in_place"), [(40, [True, True]), (0, [True, False])])
def test_a_file_of_another_size_gets_that_of_a_segment(
    kib: int, in_place: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a sync need not ask the file system for more up to where the dropped segment went."""
    files = MemoryFiles()
    with reusing():
        log = open_log(files, segment_size=SIZE)
        append(log, bytes(kib * KiB))
        log.rotate()
        append(log, b"kept")
        log.rotate()
        dropped = log.sealed()[0]
        assert (dropped.bytes > SIZE) == (kib > 0)
        log.drop_before(dropped.next_lsn)
        log.prepare_spare()
        log.rotate()
        append(log, b"in the next one")
        log.rotate()
        assert log.active.header.reused
        assert len(files.read_file(LOG, log.active.header.name)) == log.active.capacity == SIZE
        found: list[bool] = []
        whole = MemoryFile.sync

        def sync(file: MemoryFile, *, in_place: bool = False) -> None:
            found.append(in_place)
            whole(file, in_place=in_place)

        monkeypatch.setattr(MemoryFile, "sync", sync)
        append(log, b"short")
        append(log, bytes(6 * KiB))
    assert found == in_place


def test_each_life_of_a_file_has_its_own_salt() -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=SIZE)
    headers = {log.active.header}
    for _ in range(200):
        append(log, b"record")
        reuse_dropped(log)
        headers.add(log.active.header)
    assert sum(header.reused for header in headers) > 3
    assert len({header.salt for header in headers}) == len(headers)


# -- its end --------------------------------------------------------------------------------


def test_behind_the_last_frame_stand_zeros_and_then_what_was_there() -> None:
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        for _ in range(4):
            append(log, b"r" * 700)
            behind = old_bytes(log)
            assert not any(behind[:BLOCK])
            assert any(behind[BLOCK : 2 * BLOCK])


@pytest.mark.parametrize("close", [False, True])
def test_an_end_behind_which_old_bytes_stand_is_an_end(close: bool) -> None:
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        every = records_of(log)
        log.close(orderly=close)
    assert content(files, segment_size=SIZE) == every
    found = open_log(copy_of(files), segment_size=SIZE)
    assert (found.report.torn_bytes, found.report.clean_shutdown) == (0, close)
    checked = verify(copy_of(files).open_directory(LOG))
    assert (checked.findings, checked.torn_bytes, checked.clean) == ((), 0, close)


def test_a_log_that_was_closed_goes_on_in_a_reused_segment() -> None:
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        log.close()
        log = open_log(files, segment_size=SIZE)
        assert log.active.header.reused
        append(log, b"next")
        assert not any(old_bytes(log)[:BLOCK])
        every = records_of(log)
    assert content(copy_of(files), segment_size=SIZE) == every


def test_a_log_goes_on_behind_the_mark_of_its_close_only_while_the_pointer_leads_there() -> None:
    """The first write behind the mark takes it away: of that write, too, a crash may have left
    the end."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        header, every = log.active.header, records_of(log)
        log.close()
    data = files.read_file(LOG, header.name)
    image = copy_of(files)
    image.write_file(LOG, header.name, data[:BLOCK] + bytes(BLOCK) + data[2 * BLOCK :])
    found = open_log(image, segment_size=SIZE)
    assert (records_of(found), found.report.clean_shutdown) == (every, False)
    assert found.active.header.number == header.number + 1
    assert open_log(files, segment_size=SIZE).active.header == header


def test_what_is_called_torn_is_the_batch_as_far_as_it_is_in_the_file() -> None:
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        name, start = log.active.header.name, log.active.position.offset
        append(log, b"torn" * 500)
        end = log.active.position.offset
    data = bytearray(files.read_file(LOG, name))
    data[end - BLOCK] ^= 1
    for size, torn in ((len(data), end - start), (end - BLOCK, end - BLOCK - start)):
        image = copy_of(files)
        image.write_file(LOG, name, bytes(data[:size]))
        assert open_log(image, segment_size=SIZE).report.torn_bytes == torn


def test_after_a_crash_no_log_goes_on_in_one() -> None:
    """What stands behind the end may be of the batch that was being written."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
    header = log.active.header
    image = copy_of(files)
    found = open_log(image, segment_size=SIZE)
    assert found.active.header.number == header.number + 1
    assert not found.active.header.reused, "a copy is in a file of zeros"
    (before,) = [s for s in found.sealed() if s.header == header]
    assert len(image.read_file(LOG, before.name)) == before.bytes


def test_a_program_that_is_only_started_and_killed_does_not_fill_the_disk() -> None:
    files = MemoryFiles()
    with reusing():
        every = records_of(in_reused(files))
        found = set[tuple[int, ...]]()
        for life in range(100):
            files = files.crash_image(life, "kill" if life % 3 else "power")
            assert records_of(open_log(files, segment_size=SIZE)) == every
            found.add(tuple(map(len, files.contents(LOG).values())))
    assert len(found) == 1


def test_a_batch_that_fills_a_segment_to_its_end_has_no_terminator() -> None:
    """And the mark of a close, for which there is room, has what there is before the end."""
    files = MemoryFiles()
    lengths = set[int]()
    with reusing():
        for spare in range(0, 4 * BLOCK, BLOCK // 2):
            files = MemoryFiles(seed=spare)
            log = in_reused(files)
            # Its capacity need be no multiple of a block.
            room = log.active.capacity - log.active.position.offset - spare
            append(log, b"f" * (room // BLOCK * BLOCK - 68))
            if not log.active.header.reused:
                continue
            lengths.add(log.active.capacity - log.active.position.offset)
            size = len(files.read_file(LOG, log.active.header.name))
            assert size == log.active.capacity
            every = records_of(log)
            assert content(files, segment_size=SIZE) == every
            log.close()
            assert open_log(copy_of(files), segment_size=SIZE).report.clean_shutdown
            assert verify(files.open_directory(LOG)).findings == ()
            log = open_log(files, segment_size=SIZE)
            append(log, b"after")
            assert content(files, segment_size=SIZE) == records_of(log)
    assert min(lengths) == 2 * BLOCK


def test_an_empty_one_is_replaced_after_a_crash() -> None:
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        prepare_reused(log)
        log.rotate()
        assert log.active.header.reused
    every, name = records_of(log), log.active.header.name
    image = copy_of(files)
    found = open_log(image, segment_size=SIZE)
    assert records_of(found) == every
    assert (found.active.header.name, found.active.header.reused) == (name, False)


def test_every_torn_state_of_a_batch_and_its_terminator() -> None:
    """Each block of the write as it was, as it should be, half and half, garbage, or as it was
    in the file's life before: the batch is there, or it is not, and never is it damage."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        start, every, name = log.active.position.offset, records_of(log), log.active.header.name
        before = files.read_file(LOG, name)
        append(log, b"torn" * 150)
        after, with_it = files.read_file(LOG, name), records_of(log)
        end = log.active.position.offset
    # Header, body, terminator, and the block behind, which was not written.
    assert (end - start, after[end + BLOCK :]) == (2 * BLOCK, before[end + BLOCK :])
    places = range(start, end + BLOCK, BLOCK)
    whole = 0
    for fates in itertools.product(range(5), repeat=len(places)):
        data = bytearray(before)
        for place, fate in zip(places, fates, strict=True):
            old, new = (side[place : place + BLOCK] for side in (before, after))
            data[place : place + BLOCK] = (
                old,
                new,
                new[:100] + old[100:],
                random.Random(place).randbytes(BLOCK),
                before[end + BLOCK : end + 2 * BLOCK],
            )[fate]
        image = copy_of(files)
        image.write_file(LOG, name, bytes(data))
        # What the owner has told was never synced.
        found = open_log(image, segment_size=SIZE)
        has = records_of(found)
        there = bytes(data[start:end]) == after[start:end]
        assert has == (with_it if there else every), fates
        whole += there
        if not there and not any(data[start : start + BLOCK]):
            assert found.report.torn_bytes == 0
        elif not there:
            assert found.report.torn_bytes >= BLOCK
    assert whole >= 5


def test_frames_of_a_former_life_are_none() -> None:
    """They have good checksums, of their own salt, and stand just where the next frame would."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        every, header = records_of(log), log.active.header
        place = log.active.position.offset
        before = files.read_file(LOG, header.name)
    taken = 0
    for at in range(place, len(before) - BLOCK, BLOCK):
        if before[at : at + 4] == _frame.FRAME_MAGIC:
            taken += 1
            image = copy_of(files)
            image.write_file(LOG, header.name, before[:place] + before[at:])
            assert content(image, segment_size=SIZE) == every
    assert taken > 3


def test_old_records_that_are_full_of_magics_are_not_decoded_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They stand behind the end for a whole segment, and whoever comes after a crash looks at
    them: at a microsecond each, 64 MiB of them would take it 20 seconds."""
    files = MemoryFiles()
    with reusing():
        log = open_log(files, segment_size=256 * KiB)
        while not (log.active.header.reused and log.active.frames == 1):
            append(log, _frame.FRAME_MAGIC * 4000)
            reuse_dropped(log)
    every = records_of(log)
    assert old_bytes(log).count(_frame.FRAME_MAGIC) > 40_000
    decoded: list[int] = []
    whole = scan.decode_frame_header

    def decode_frame_header(data: bytes, offset: int, seed: int) -> _frame.FrameHeader | None:
        decoded.append(offset)
        return whole(data, offset, seed)

    monkeypatch.setattr(scan, "decode_frame_header", decode_frame_header)
    assert content(files, segment_size=SIZE) == every
    assert len(decoded) < 100


@pytest.mark.parametrize("close", [False, True])
def test_what_proves_damage_is_found_among_what_only_looks_like_it(close: bool) -> None:
    """Be it a frame or the mark of a close, at any place: right behind a magic that is none, and
    across two of the pieces in which the end is looked at."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        header, place = log.active.header, DATA_OFFSET + BLOCK
        if close:
            place = log.active.position.offset - BLOCK
            log.close()
    data = bytearray(files.read_file(LOG, header.name))
    data[BLOCK : 2 * BLOCK] = bytes(BLOCK)
    proof = bytes(data[place + BLOCK : place + BLOCK + _frame.FRAME_HEADER_SIZE])
    data[place:] = b"o" * (2 * scan.SKIM_WINDOW)
    for at in (
        place + BLOCK,
        place + BLOCK + 3,
        *(place + scan.SKIM_WINDOW - back for back in (64, 63, 40, 4, 3, 1, 0)),
        len(data) - len(proof),
    ):
        changed = bytearray(data)
        changed[at - 4 : at] = _frame.FRAME_MAGIC
        changed[at : at + len(proof)] = proof
        image = copy_of(files)
        image.write_file(LOG, header.name, bytes(changed))
        with pytest.raises(CorruptLogError, match="had been durable"):
            open_log(image, segment_size=SIZE)


def test_records_that_hold_segments_of_this_very_log_prove_nothing() -> None:
    """Whoever keeps copies of the log's files in the log: the one that is being written, and those
    of which it is made."""
    files = MemoryFiles()
    rng = random.Random(3)
    expected: list[bytes] = []
    ends = 0
    with reusing():
        log = open_log(files, segment_size=4 * SIZE)
        for number in range(220):
            names = [name for name in files.names(LOG) if name.startswith(("wal-", "spare-"))]
            copied = files.read_file(LOG, rng.choice(names[-2:]))
            at = rng.randrange(0, len(copied), BLOCK)
            # As it stands in a frame it keeps its place in a block, or it does not.
            record = bytes(rng.choice((0, BLOCK - 68))) + copied[at : at + rng.randrange(9000)]
            expected.append(record)
            append(log, record)
            reuse_dropped(log)
            if log.active.header.reused:
                ends += 1
                image = files.crash_image(number, rng.choice(("kill", "power")))
                assert verify(image.open_directory(LOG)).findings == ()
                found = records_of(open_log(image, segment_size=SIZE))
                first = log.first_lsn
                assert found == numbered(expected[first - 1 :], first)
            if rng.random() < 0.05:
                lsn = log.last_lsn - rng.randrange(1, 4)
                log.truncate_after(lsn)
                del expected[lsn:]
    assert ends > 100


# -- damage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("offset", [0, 70])
def test_damage_before_what_proves_it_durable_is_refused(zeroed: bool, offset: int) -> None:
    """Zeros are no end where a frame behind them says that there was more."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        header, place = log.active.header, DATA_OFFSET + BLOCK
    data = bytearray(files.read_file(LOG, header.name))
    if zeroed:
        data[place : place + BLOCK] = bytes(BLOCK)
    else:
        data[place + offset] ^= 4
    image = copy_of(files)
    image.write_file(LOG, header.name, bytes(data))
    with pytest.raises(CorruptLogError, match="had been durable") as caught:
        open_log(image, segment_size=SIZE)
    assert caught.value.offset == place
    assert verify(image.open_directory(LOG)).findings


def test_every_bit_of_a_reused_segment_with_a_frame_behind_is_guarded() -> None:
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        header, every = log.active.header, records_of(log)
        last = log.active.position.offset - BLOCK
    data = files.read_file(LOG, header.name)
    for bit in range(8 * DATA_OFFSET, 8 * last, 31):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        image = copy_of(files)
        image.write_file(LOG, header.name, bytes(changed))
        with pytest.raises(CorruptLogError):
            open_log(image, segment_size=SIZE)
    for bit in range(8 * (last + 2 * BLOCK), 8 * len(data), 997):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        image = copy_of(files)
        image.write_file(LOG, header.name, bytes(changed))
        assert content(image, segment_size=SIZE) == every


# -- sealing, cutting -----------------------------------------------------------------------


def test_a_reused_segment_ends_with_its_footer_like_any_other() -> None:
    files = make_reused_log(*([b"record %d" % n] for n in range(160)), segment_size=SIZE, keep=3)
    reused = 0
    for name in segments(files)[:-1]:
        data = files.read_file(LOG, name)
        header = decode_segment_header(data)
        reused += header.reused

        def read(length: int, offset: int, data: bytes = data) -> bytes:
            return data[offset : offset + length]

        *_, (last, _) = FrameScanner(read, header, start_of(header))
        assert (last.kind, last.end) == (Kind.SEAL, len(data))
    assert reused
    checked = verify(files.open_directory(LOG))
    assert (checked.findings, checked.clean) == ((), True)


def test_bytes_behind_the_footer_of_a_reused_segment_are_damage() -> None:
    files = make_reused_log(*([b"record %d" % n] for n in range(180)), segment_size=SIZE, keep=3)
    names = [name for name in segments(files)[:-2] if is_reused(files, name)]
    assert names
    data = files.read_file(LOG, names[0])
    files.write_file(LOG, names[0], data + bytes(BLOCK) + b"x".ljust(BLOCK, b"\0"))
    (finding,) = verify(files.open_directory(LOG)).findings
    assert finding.reason == "bytes behind the segment's footer"


def is_reused(files: MemoryFiles, name: str) -> bool:
    return decode_segment_header(files.read_file(LOG, name)).reused


@pytest.mark.parametrize("back", range(6))
def test_a_log_is_cut_in_a_reused_segment_and_goes_on_in_another(back: int) -> None:
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        append(log, b"two", b"of one batch")
        lsn = log.last_lsn - back
        every = tuple(pair for pair in records_of(log) if pair[0] <= lsn)
        log.truncate_after(lsn)
        assert records_of(log) == every
        append(log, b"after")
        every = records_of(log)
        assert content(copy_of(files), segment_size=SIZE) == every
        log.close()
    assert content(files, segment_size=SIZE) == every
    assert verify(files.open_directory(LOG)).findings == ()


def test_a_log_that_is_cut_may_go_on_in_a_reused_one() -> None:
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        prepare_reused(log)
        lsn = log.last_lsn - 1
        log.truncate_after(lsn)
        assert log.active.header.reused
        assert append(log, b"after") == lsn + 1
        every = records_of(log)
        assert not any(old_bytes(log)[:BLOCK])
    assert content(copy_of(files), segment_size=SIZE) == every


def test_a_segment_in_which_a_cut_log_goes_on_begins_with_zeros() -> None:
    """Also where no record comes into it: its pointer, and where its first frame will stand."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        prepare_reused(log)
        log.truncate_after(log.last_lsn - 1)
        every = records_of(log)
        header = log.active.header
        assert (header.reused, log.active.frames) == (True, 0)
    data = files.read_file(LOG, header.name)
    assert not any(data[BLOCK : DATA_OFFSET + BLOCK])
    assert any(data[DATA_OFFSET + BLOCK :])
    checked = verify(copy_of(files).open_directory(LOG))
    assert (checked.findings, checked.torn_bytes) == ((), 0)
    found = open_log(copy_of(files), segment_size=SIZE)
    assert (records_of(found), found.report.torn_bytes) == (every, 0)


# -- readers --------------------------------------------------------------------------------


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for each time that all behind an end is read."""
    done: list[int] = []
    whole = scan.examine_tail

    def examine_tail(*args: Any) -> scan.Tail:
        done.append(1)
        return whole(*args)

    monkeypatch.setattr(scan, "examine_tail", examine_tail)
    return done


def test_whoever_follows_does_not_search_the_old_bytes(searches: list[int]) -> None:
    """Not even while the owner is writing, and no zeros stand behind its newest frame."""
    files = MemoryFiles()
    log = in_reused(files)
    source = WatchSource(files.open_directory(LOG), Blocking(threaded=False))
    source.look()
    assert len(searches) == 1, "who has just come believes nothing"
    rotated = 0
    with reusing():
        for number in range(60):
            header = log.active.header
            append(log, b"record %d" % number)
            rotated += log.active.header != header
            file = files._folder(LOG).names[log.active.header.name]
            offset = log.active.position.offset
            stood = bytes(file.data[offset : offset + BLOCK])
            if number % 3 == 1:
                file.write(b"half a frame".ljust(len(stood), b"."), offset)
            source.look()
            file.write(stood, offset)
            assert source.tail.durable_lsn == log.last_lsn
            assert source.damage is None
            reuse_dropped(log)
    assert rotated > 1
    assert len(searches) == 1


def test_whoever_follows_finds_what_is_lost_by_the_owners_word() -> None:
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        source = WatchSource(files.open_directory(LOG), Blocking(threaded=False))
        source.look()
        place = log.active.position.offset
        append(log, b"lost")
        spoil(files, log, place + 8)
    source.look()
    assert_damaged(source, place)


def test_a_reader_after_a_power_cut_searches(searches: list[int]) -> None:
    """The owner's word may be older than what it speaks of."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
    spoil(files, log, DATA_OFFSET + BLOCK + 8)
    forget_word(files)
    source = WatchSource(files.open_directory(LOG), Blocking(threaded=False))
    source.look()
    assert isinstance(source.damage, CorruptLogError)
    assert searches


def test_whoever_follows_searches_where_the_word_is_gone(searches: list[int]) -> None:
    """Or is of another epoch: then it does not say that it speaks of all that there is."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        source = WatchSource(files.open_directory(LOG), Blocking(threaded=False))
        source.look()
        place = log.active.position.offset
        append(log, b"lost")
        append(log, b"says so")
    spoil(files, log, place + 8)
    forget_word(files)
    source.look()
    assert_damaged(source, place)


@pytest.mark.parametrize("reused", [False, True])
def test_whoever_follows_leaves_to_the_word_what_is_no_zeros_only_in_a_reused_segment(
    reused: bool,
) -> None:
    """Elsewhere that is a batch that is being written, or more than that."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files) if reused else open_log(files, segment_size=SIZE)
        source = WatchSource(files.open_directory(LOG), Blocking(threaded=False))
        append(log, b"before")
        source.look()
        place = log.active.position.offset
        log.write([b"lost"], log.last_lsn, sync=True)
        log.write([b"says so"], log.last_lsn, sync=True)
        spoil(files, log, place + 8)
        source.look()
        assert (source.damage is None) == reused
        log.publish()
        source.look()
    assert_damaged(source, place)


def test_whoever_follows_a_copy_that_was_not_opened_searches() -> None:
    """Its word is that of the log that it is a copy of."""
    files = MemoryFiles()
    with reusing():
        log = in_reused(files)
        meta = log.meta.says
        files.write_file(LOG, "log.meta", replace(meta, copied=True).encode())
        source = WatchSource(files.open_directory(LOG), Blocking(threaded=False))
        source.look()
        place = log.active.position.offset
        log.write([b"lost"], log.last_lsn, sync=True)
        log.write([b"says so"], log.last_lsn, sync=True)
    spoil(files, log, place + 8)
    source.look()
    assert_damaged(source, place)


# -- whole programs -------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [KeepSegments(1), KeepBytes(2 * SIZE)])
async def test_what_retention_drops_is_the_next_segment(
    kept: Retention, autojump_clock: MockClock
) -> None:
    files = MemoryFiles()
    seen: dict[str, bool] = {}
    with reusing():
        async with trio_wal.open_wal(LOG, files=files, segment_size=SIZE, retention=kept) as wal:
            while len(seen) < 20:
                await wal.append(b"%d " % wal.last_lsn * 90)
                await trio.sleep(1)
                header = wal._log.engine._directory.active.header
                seen[header.name] = header.reused
    assert list(seen.values())[5:] == [True] * 15  # the first ones have nothing that was dropped


async def test_what_was_archived_of_them_is_restored(autojump_clock: MockClock) -> None:
    files = MemoryFiles()
    archive = archive_in(files)
    every = [b"record %d" % number for number in range(150)]
    with reusing():
        async with trio_wal.open_wal(
            LOG, files=files, archive=archive, segment_size=SIZE, retention=KeepSegments(1)
        ) as wal:
            for record in every:
                await wal.append(record)
                await trio.sleep(1)
            await wal.rotate()
            await wait_archived(wal)
    manifests = [name for name in archive.list() if name.startswith("0") and name.endswith("json")]
    assert any(json.loads(b"".join(archive.get(name)))["features"] for name in manifests)
    for lsn in range(len(every) - 25, len(every) + 1, 5):
        await trio_wal.restore(archive, RESTORED, files=files, to_lsn=lsn)
        async with trio_wal.open_wal(RESTORED, files=files) as wal:
            assert list((await read_all(wal)).values()) == every[:lsn]
            assert await wal.append(b"another history") == lsn + 1
        files.discard_directory(RESTORED)


def all_reused() -> MemoryFiles:
    """A log, closed in order, each of whose segments was a dropped one."""
    files = make_reused_log(*([b"record %d" % n] for n in range(200)), segment_size=SIZE, keep=3)
    assert all(is_reused(files, name) for name in segments(files))
    return files


async def test_what_is_restored_of_their_directory_is_a_log_without_the_feature() -> None:
    files = all_reused()
    every = content(files, segment_size=SIZE)
    first = every[0][0]
    for lsn in (first - 1, first, first + 7, every[-1][0]):
        await trio_wal.restore(LOG, RESTORED, files=files, to_lsn=lsn)
        assert decode_meta(files.read_file(RESTORED, "log.meta")).features == 0
        last = files.read_file(RESTORED, max(segments(files, RESTORED)))
        assert not decode_segment_header(last).reused
        async with trio_wal.open_wal(RESTORED, files=files) as wal:
            assert tuple((await read_all(wal)).items()) == every[: lsn + 1 - first]
            assert await wal.append(b"another history") == lsn + 1
        files.discard_directory(RESTORED)


def test_without_its_meta_such_a_log_is_repaired() -> None:
    files = all_reused()
    every = content(files, segment_size=SIZE)
    files.remove_file(LOG, "log.meta")
    found = verify(files.open_directory(LOG))
    assert (len(found.findings), found.features) == (1, 0)
    options: dict[str, Any] = {"accept_loss": True, "keep": "oldest", "trust_directory": False}
    assert Repair(files, LOG, tick=lambda done, total: None, **options).run().done
    assert content(files, segment_size=SIZE) == every
    log = open_log(files, segment_size=SIZE)
    assert append(log, b"after") == every[-1][0] + 1


@pytest.mark.parametrize("sync_in", ["thread", "loop"])
@pytest.mark.parametrize("durability", ["sync", "none"])
async def test_a_log_on_real_files_uses_dropped_segments_again(
    tmp_path: Path, sync_in: trio_wal.SyncIn, durability: Any
) -> None:
    kept = KeepSegments(2)
    found: list[bool] = []
    with reusing():
        async with trio_wal.open_wal(
            tmp_path / "log",
            segment_size=SIZE,
            retention=kept,
            sync_in=sync_in,
            durability=durability,
            compression="zstd" if find_spec("zstandard") else None,
        ) as wal:
            while not any(found):
                assert wal.last_lsn < 10_000
                await wal.append(b"%d " % wal.last_lsn * 90)
                await trio.sleep(0.001)
                found.append(wal._log.engine._directory.active.header.reused)
            written = wal.last_lsn
        async with trio_wal.open_wal(tmp_path / "log", segment_size=SIZE) as wal:
            assert wal.recovery.clean_shutdown
            records = await read_all(wal)
            assert list(records) == list(range(wal.first_lsn, written + 1))
            assert all(data == b"%d " % (lsn - 1) * 90 for lsn, data in records.items())


# -- other versions -------------------------------------------------------------------------


def test_a_version_that_does_not_know_them_refuses_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_reused_log(*([b"record %d" % n] for n in range(100)), segment_size=SIZE)
    monkeypatch.setattr(_frame, "SEGMENT_FEATURES_KNOWN", _frame.FEATURES_KNOWN)
    before = files.contents(LOG)
    with pytest.raises(UnsupportedFormatError, match=r"feature set 8 \(reused\)") as caught:
        open_log(files, segment_size=SIZE)
    assert caught.value.path.endswith(".log")
    assert files.contents(LOG) == before


def test_a_log_that_has_none_has_files_that_older_versions_read() -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=SIZE)
    for _ in range(80):
        append(log, b"small")
        sealed = log.sealed()
        if len(sealed) > 1:
            log.drop_before(sealed[-1].first_lsn)
            log.prepare_spare()
    assert not any(is_reused(files, name) for name in segments(files))


def test_only_a_segment_has_the_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_reused_log(*([b"record %d" % n] for n in range(100)), segment_size=SIZE)
    data = bytearray(files.read_file(LOG, "log.meta"))
    data[12] |= FEATURE_REUSED
    data[508:512] = _frame.crc32c(bytes(data[:508])).to_bytes(4, "little")
    files.write_file(LOG, "log.meta", bytes(data))
    with pytest.raises(UnsupportedFormatError, match=r"feature set 8 \(reused\)"):
        open_log(files, segment_size=SIZE)


def test_records_outlive_any_number_of_lives() -> None:
    files = MemoryFiles()
    rng = random.Random(5)
    expected: list[bytes] = []
    with reusing():
        log = open_log(files, segment_size=SIZE)
        for number in range(300):
            expected.append(rng.randbytes(rng.randrange(1500)))
            append(log, expected[-1])
            reuse_dropped(log, keep=2)
            if number % 37 == 36:
                log.close(orderly=bool(number % 2))
                log = open_log(files, segment_size=SIZE)
        first = log.first_lsn
        assert records_of(log) == numbered(expected[first - 1 :], first)
        log.close()
    assert verify(files.open_directory(LOG)).findings == ()
