"""`verify`: every finding, nothing but findings, and nothing changed."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from campaigns import _forge
from databases import hash_tree
from helpers import until
from logs import LOG, append, copy_of, make_log, open_log, segments
from msgspec.structs import replace

import trio_wal
from trio_wal import _admin
from trio_wal._admin import DatabaseVerification, verify_database
from trio_wal._disk import chain as _chain, segment as _segment
from trio_wal._disk.chain import META_NAME
from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.finding import Finding
from trio_wal._disk.frame import (
    DATA_OFFSET,
    FEATURE_ZSTD,
    FRAME_HEADER_SIZE,
    POINTER_OFFSET,
    Kind,
    Meta,
    SegmentHeader,
    Truncation,
    decode_meta,
    decode_segment_header,
    encode_frame_header,
    segment_name,
)
from trio_wal._disk.recovery import examine
from trio_wal._disk.scan import FrameScanner, start_of
from trio_wal._disk.verify import (
    LOOK_TRIES,
    Verification,
    list_log,
    verify,
)
from trio_wal._files import Word
from trio_wal._system.files import OsFiles
from trio_wal.testing import MemoryFiles

PAYLOAD = bytes(range(200))
META_PATH = f"{LOG}/{META_NAME}"


def check(files: MemoryFiles) -> Verification:
    """Verify, and hold it to writing nothing."""
    before = files.contents(LOG)
    result = verify(files.open_directory(LOG))
    assert files.contents(LOG) == before
    return result


def places(result: Verification) -> list[tuple[str, int]]:
    return [(os.path.basename(f.path), f.offset) for f in result.findings]


def lost(result: Verification) -> list[tuple[int | None, int | None]]:
    return [(f.first_lsn, f.last_lsn) for f in result.findings]


def ten_batches(**options: Any) -> MemoryFiles:
    """Five segments or so, two frames of two records in each."""
    return make_log(*([b"%d" % i + PAYLOAD, b"-"] for i in range(10)), **options)


def one_segment(batches: int = 6, **options: Any) -> MemoryFiles:
    """A single segment, one record a frame."""
    records = ([b"%d" % i + PAYLOAD] for i in range(batches))
    return make_log(*records, segment_size=1 << 20, **options)


def header_of(files: MemoryFiles, name: str) -> SegmentHeader:
    return decode_segment_header(files.read_file(LOG, name))


def frames(files: MemoryFiles, name: str) -> list[Any]:
    """The headers of a segment's frames."""
    data = files.read_file(LOG, name)
    header = header_of(files, name)
    scanner = FrameScanner(lambda length, at: data[at : at + length], header, start_of(header))
    return [frame for frame, _ in scanner]


def change(files: MemoryFiles, name: str, offset: int, data: bytes) -> None:
    content = bytearray(files.read_file(LOG, name))
    content[offset : offset + len(data)] = data
    files.write_file(LOG, name, bytes(content))


def flip(files: MemoryFiles, name: str, offset: int) -> None:
    files.flip_bit(LOG, name, 8 * offset)


def change_meta(files: MemoryFiles, **changes: Any) -> Meta:
    meta = replace(decode_meta(files.read_file(LOG, META_NAME)), **changes)
    files.write_file(LOG, META_NAME, meta.encode())
    return meta


# -- logs in order --------------------------------------------------------------------


def test_a_log_in_order_has_no_findings_and_is_counted() -> None:
    files = ten_batches()
    result = check(files)
    assert result.findings == ()
    assert (result.records, result.frames) == (20, 10)
    assert (result.first_lsn, result.last_lsn) == (1, 20)
    assert result.segments == len(segments(files)) > 3
    assert result.clean
    assert result.torn_bytes == 0
    assert result.log_uuid == decode_meta(files.read_file(LOG, META_NAME)).log_uuid


def test_an_empty_log_has_no_findings() -> None:
    result = check(make_log())
    assert result.findings == ()
    assert (result.records, result.first_lsn, result.last_lsn) == (0, 1, 0)


def test_a_log_whose_start_was_dropped_has_no_findings() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for i in range(10):
        append(log, b"%d" % i + PAYLOAD)
    log.drop_before(6)
    log.close()
    result = check(files)
    assert result.findings == ()
    assert result.first_lsn == log.first_lsn > 1
    assert result.last_lsn == 10


def test_a_compressed_log_is_decompressed_and_checked() -> None:
    pytest.importorskip("zstandard", reason="the zstd extra is not installed")
    files = one_segment(compression="zstd")
    result = check(files)
    assert result.findings == ()
    assert result.features == FEATURE_ZSTD
    assert result.records == 6


def test_what_a_creation_that_was_cut_short_leaves_is_no_finding() -> None:
    files = one_segment(0)
    change_meta(files, live=False)
    assert check(files).findings == ()
    files.write_file(LOG, segment_name(9), files.read_file(LOG, segment_name(1)))
    assert places(check(files)) == [(segment_name(9), 0)]


@pytest.mark.parametrize("operation", ["append", "truncate_after", "drop_before", "close", "open"])
def test_no_crash_ever_leaves_a_finding(operation: str) -> None:
    images: list[MemoryFiles] = []
    files = MemoryFiles(seed=3)
    log = open_log(files)
    for i in range(7):
        append(log, b"%d" % i + PAYLOAD)

    def crash(*_: object) -> None:
        images.append(files.crash_image(kind="kill"))
        images.extend(files.crash_image(seed) for seed in range(12))

    files.after_operation = crash
    if operation == "append":
        for i in range(5):
            append(log, b"%d" % i + PAYLOAD)
    elif operation == "truncate_after":
        log.truncate_after(4)
    elif operation == "drop_before":
        log.drop_before(5)
    elif operation == "close":
        log.close()
    else:
        log.close(orderly=False)
        open_log(files)
    assert images
    for image in images:
        assert check(image).findings == ()
        assert refusal(image) is None


def test_an_unfinished_batch_at_the_end_is_no_finding_and_is_counted() -> None:
    files = one_segment(3, close=False)
    (name,) = segments(files)
    last = frames(files, name)[-1]
    change(files, name, last.end, b"\x55" * 700)
    result = check(files)
    assert result.findings == ()
    assert result.torn_bytes == 1024
    assert result.records == 3
    assert not result.clean


def test_the_last_batch_of_a_crashed_log_may_be_torn_but_no_batch_before_it() -> None:
    files = one_segment(3, close=False)
    (name,) = segments(files)
    first, _, last = frames(files, name)
    flip(files, name, last.offset + 70)
    result = check(files)
    assert (result.findings, result.records) == ((), 2)
    flip(files, name, first.offset + 70)
    assert places(check(files)) == [(name, first.offset)]


# -- damage ---------------------------------------------------------------------------


MEANINGLESS = "bytes between header and frames that are not zero"


def refusal(files: MemoryFiles) -> trio_wal.CorruptLogError | None:
    """Why the log would not be opened."""
    try:
        examine(files.open_directory(LOG), verify_bytes=math.inf)
    except trio_wal.CorruptLogError as exc:
        return exc
    return None


def test_every_damage_is_found_that_keeps_the_log_from_opening() -> None:
    """One flipped bit in every so many; what opens without complaint has no findings but
    for bytes that mean nothing."""
    pristine = ten_batches()
    found = harmless = 0
    for name in (META_NAME, *segments(pristine)):
        used = len(pristine.read_file(LOG, name).rstrip(b"\0"))
        for bit in range(3, 8 * used, 211):
            files = copy_of(pristine)
            files.flip_bit(LOG, name, bit)
            findings = verify(files.open_directory(LOG)).findings
            error = refusal(files)
            if error is not None:
                found += 1
                assert error.path in {f.path for f in findings}, (name, bit)
            else:
                harmless += 1
                assert {f.reason for f in findings} <= {MEANINGLESS}, (name, bit)
    assert found > 100
    assert harmless


def test_damage_in_several_places_is_found_everywhere() -> None:
    files = ten_batches()
    names = segments(files)
    expected = []
    for name in (names[0], names[2]):
        for frame in frames(files, name)[:2]:
            flip(files, name, frame.offset + FRAME_HEADER_SIZE + 8)
            expected.append((name, frame.offset))
    result = check(files)
    assert places(result) == expected
    assert {f.reason for f in result.findings} == {"checksum of the frame body does not match"}
    assert result.frames == 10 - 4
    assert result.records == 20 - 8


def test_a_damaged_body_loses_its_own_records_only() -> None:
    files = ten_batches()
    name = segments(files)[1]
    frame = frames(files, name)[0]
    flip(files, name, frame.offset + FRAME_HEADER_SIZE)
    result = check(files)
    assert lost(result) == [(frame.first_lsn, frame.next_lsn - 1)]
    assert result.records == 20 - frame.count


def test_behind_a_damaged_frame_header_the_next_frame_is_found() -> None:
    files = one_segment()
    (name,) = segments(files)
    second, third = frames(files, name)[1:3]
    flip(files, name, second.offset + 20)
    flip(files, name, third.offset + 20)
    result = check(files)
    assert places(result) == [(name, second.offset)]
    assert result.findings[0].reason == "no valid frame header"
    assert lost(result) == [(2, 3)]
    assert result.records == 4


def test_what_stands_behind_a_log_that_was_closed_in_order_is_looked_at() -> None:
    """Nobody writes there before the pointer to the mark is taken away; opening does not look."""
    files = MemoryFiles()
    log = open_log(files, segment_size=64 * 1024)
    for n in range(3):
        append(log, b"%d" % n)
    log.close()
    (name,) = segments(files)
    closed = files.read_file(LOG, name)
    (mark,) = (frame for frame in frames(files, name) if frame.kind is Kind.CLOSE)
    log = open_log(files, segment_size=64 * 1024)
    for n in range(3):
        append(log, b"%d" % n)
    forged = closed[: mark.end + 512] + files.read_file(LOG, name)[mark.end + 512 :]
    log.close(orderly=False)
    files = copy_of(files)
    files.write_file(LOG, name, forged)
    result = check(files)
    assert places(result)[0] == (name, mark.end)
    assert lost(result)[0] == (4, 4)
    assert not result.clean


def test_a_stretch_of_zeros_between_frames_is_a_finding() -> None:
    files = one_segment()
    (name,) = segments(files)
    second = frames(files, name)[1]
    change(files, name, second.offset, bytes(second.end - second.offset))
    result = check(files)
    assert places(result) == [(name, second.offset)]
    assert lost(result) == [(2, 2)]


def test_a_frame_in_the_place_of_another_is_a_finding() -> None:
    files = one_segment()
    (name,) = segments(files)
    second, third = frames(files, name)[1:3]
    data = files.read_file(LOG, name)
    change(files, name, second.offset, data[third.offset : third.end])
    assert places(check(files)) == [(name, second.offset)]


def test_bytes_in_a_frames_padding_are_a_finding_that_loses_nothing() -> None:
    files = one_segment()
    (name,) = segments(files)
    second = frames(files, name)[1]
    flip(files, name, second.end - 1)
    result = check(files)
    assert [f.reason for f in result.findings] == ["padding behind the frame is not zero"]
    assert lost(result) == [(None, None)]
    assert result.records == 6


def test_a_frame_that_goes_back_in_time_is_a_finding() -> None:
    files = one_segment(2, close=False)
    (name,) = segments(files)
    last = frames(files, name)[-1]
    forged = encode_frame_header(replace(last, time_us=1), header_of(files, name).seed)
    change(files, name, last.offset, forged)
    (finding,) = check(files).findings
    assert finding.reason == "the frame's time is before that of the frame before it"
    assert finding.offset == last.offset


def test_a_footer_that_miscounts_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    true_footer = _segment.Footer

    def miscount(records: int, *rest: Any) -> object:
        return true_footer(records + 1, *rest)

    monkeypatch.setattr(_segment, "Footer", miscount)
    (finding,) = check(one_segment(2)).findings
    assert finding.reason == ("the footer counts 3 records up to LSN 2, the segment has 2 up to 2")


def test_a_body_that_does_not_hold_what_it_declares_is_a_finding() -> None:
    files = one_segment(3)
    (name,) = segments(files)
    offset = frames(files, name)[1].offset
    log = _forge.take_apart(files.contents(LOG))
    forged = log.segments[0].frames[1]
    # Only a forger makes such a body: its checksum is good.
    length = int.from_bytes(forged.body[:4], "little") + 1
    forged.body = length.to_bytes(4, "little") + forged.body[4:]
    files.write_file(LOG, name, log.encode()[name])
    result = check(files)
    assert places(result) == [(name, offset)]
    assert lost(result) == [(2, 2)]
    assert "add up to" in result.findings[0].reason


def test_bytes_between_header_and_frames_are_a_finding() -> None:
    files = one_segment()
    (name,) = segments(files)
    flip(files, name, DATA_OFFSET - 5)
    assert places(check(files)) == [(name, DATA_OFFSET - 5)]


def test_frames_missing_before_the_mark_of_a_close_are_a_finding() -> None:
    files = one_segment(6)
    (name,) = segments(files)
    third = frames(files, name)[2]
    data = files.read_file(LOG, name)
    change(files, name, third.offset, bytes(len(data) - third.offset))
    result = check(files)
    assert places(result) == [(name, third.offset)]
    assert lost(result) == [(3, 6)]


def test_the_footer_and_its_pointer_are_checked() -> None:
    pristine = ten_batches()
    name = segments(pristine)[0]
    seal = frames(pristine, name)[-1]
    assert seal.kind is Kind.SEAL
    for offset, place, reason in (
        (seal.offset + 70, seal.offset, "the segment's footer is damaged"),
        (seal.offset + 10, seal.offset, "the segment's footer is damaged"),
        (POINTER_OFFSET + 9, POINTER_OFFSET, "the pointer to the segment's footer is damaged"),
    ):
        files = copy_of(pristine)
        flip(files, name, offset)
        result = check(files)
        assert [(f.offset, f.reason) for f in result.findings] == [(place, reason)]
        assert lost(result) == [(None, None)]
    files = copy_of(pristine)
    files.write_file(LOG, name, files.read_file(LOG, name) + bytes(512) + b"x")
    assert places(check(files)) == [(name, seal.end)]


def test_a_footer_that_a_crash_tore_is_no_finding() -> None:
    """In the last segment but one: a rotation writes it when the last one is durable."""
    files = ten_batches()
    name = segments(files)[-2]
    flip(files, name, frames(files, name)[-1].offset + 70)
    assert check(files).findings == ()
    assert refusal(files) is None


# -- segments -------------------------------------------------------------------------


def test_a_missing_segment_is_found_with_the_records_it_had() -> None:
    files = ten_batches()
    names = segments(files)
    gone, behind = header_of(files, names[2]), header_of(files, names[3])
    files.remove_file(LOG, names[2])
    result = check(files)
    assert result.findings == (
        Finding(
            f"{LOG}/{names[2]}",
            0,
            f"segment 3 is missing: {names[3]} comes after it",
            gone.first_lsn,
            behind.first_lsn - 1,
        ),
    )


def test_a_segment_whose_end_is_gone_is_found_with_the_records_it_had() -> None:
    files = ten_batches()
    first, second = segments(files)[:2]
    _, gone, _ = frames(files, first)
    data = files.read_file(LOG, first)
    files.write_file(LOG, first, data[: gone.offset])
    behind = header_of(files, second).first_lsn
    assert check(files).findings == (
        Finding(
            f"{LOG}/{first}",
            gone.offset,
            f"the records before LSN {behind} are missing",
            gone.first_lsn,
            behind - 1,
        ),
    )


def test_a_segment_of_another_past_of_the_log_is_found() -> None:
    """Somebody restored one file from a copy after which the log went another way."""
    files = MemoryFiles()
    log = open_log(files)
    for i in range(4):
        append(log, b"%d" % i + PAYLOAD)
    copy = copy_of(files)
    for each, word in ((log, b"here"), (open_log(copy), b"there")):
        for _ in range(6):
            append(each, word + PAYLOAD)
        each.close()
    name = segments(files)[-2]
    assert name in segments(copy)
    files.write_file(LOG, name, copy.read_file(LOG, name))
    reasons = {f.reason for f in check(files).findings}
    assert f"{name} does not follow this segment" in reasons
    assert f"{segments(files)[-1]} does not follow this segment" in reasons


def test_the_segments_before_and_behind_a_missing_one_are_checked() -> None:
    files = ten_batches()
    names = segments(files)
    files.remove_file(LOG, names[2])
    for name in (names[1], names[3]):
        flip(files, name, DATA_OFFSET + 70)
    assert places(check(files)) == [(names[1], DATA_OFFSET), (names[2], 0), (names[3], DATA_OFFSET)]


def test_missing_first_segments_are_one_finding() -> None:
    files = ten_batches()
    names = segments(files)
    for name in names[:2]:
        files.remove_file(LOG, name)
    (finding,) = check(files).findings
    assert finding.reason == "segments 1 to 2 are missing: the log starts there"
    assert (finding.path, finding.first_lsn) == (f"{LOG}/{names[0]}", 1)
    assert finding.last_lsn == header_of(files, names[2]).first_lsn - 1


@pytest.mark.parametrize("damaged", ["neither", "pointer", "footer"])
def test_a_missing_last_segment_is_noticed_by_the_footer_before_it(damaged: str) -> None:
    files = ten_batches()
    names = segments(files)
    if damaged != "neither":
        seal = frames(files, names[-2])[-1]
        flip(files, names[-2], 520 if damaged == "pointer" else seal.offset + 20)
    gone = header_of(files, names[-1])
    files.remove_file(LOG, names[-1])
    (finding,) = check(files).findings
    assert finding.path == f"{LOG}/{names[-1]}"
    assert finding.reason == f"segment {gone.number} is missing: {names[-2]} is sealed"
    assert (finding.first_lsn, finding.last_lsn) == (gone.first_lsn, None)
    assert refusal(files) is not None


def test_a_log_without_segments_is_a_finding() -> None:
    files = one_segment()
    files.remove_file(LOG, *segments(files))
    (finding,) = check(files).findings
    assert (finding.path, finding.reason) == (
        f"{LOG}/{segment_name(1)}",
        "the log's segments are missing",
    )


@pytest.mark.parametrize("place", [0, 1, 2, -2, -1])
def test_a_damaged_segment_header_is_one_finding(place: int) -> None:
    files = ten_batches()
    names = segments(files)
    first = header_of(files, names[place]).first_lsn
    flip(files, names[place], 40)
    result = check(files)
    assert places(result) == [(names[place], 0)]
    assert result.findings[0].reason == "checksum of the segment header does not match"
    following = names[names.index(names[place]) + 1 :]
    end = header_of(files, following[0]).first_lsn - 1 if following else None
    assert lost(result) == [(first, end)]


def test_a_segment_from_the_future_is_a_finding() -> None:
    files = ten_batches()
    name = segments(files)[2]
    header = replace(header_of(files, name), features=1 << 30)
    change(files, name, 0, header.encode())
    (finding,) = check(files).findings
    assert finding.reason == f"feature set {1 << 30} (bit 30) is not supported"


def test_foreign_duplicate_and_renamed_segments_are_findings() -> None:
    pristine = ten_batches()
    names = segments(pristine)
    stranger = MemoryFiles(seed=99)
    open_log(stranger).close()

    files = copy_of(pristine)
    files.write_file(LOG, segment_name(77), stranger.read_file(LOG, segment_name(1)))
    assert [f.reason for f in check(files).findings] == ["this segment belongs to another log"]

    files = copy_of(pristine)
    files.write_file(LOG, segment_name(88), files.read_file(LOG, names[1]))
    assert [(f.path, f.reason) for f in check(files).findings] == [
        (f"{LOG}/{segment_name(88)}", f"the header says that this file is {names[1]}"),
        (f"{LOG}/{segment_name(88)}", f"both this file and {names[1]} are segment 2"),
    ]

    files = copy_of(pristine)
    files.write_file(LOG, "wal-seven.log", files.read_file(LOG, names[1]))
    assert [f.reason for f in check(files).findings] == ["this is not the name of a segment"]

    files = copy_of(pristine)
    files.write_file(LOG, segment_name(99), files.read_file(LOG, names[1]))
    files.remove_file(LOG, names[1])
    (finding,) = check(files).findings
    assert finding.reason == f"the header says that this file is {names[1]}"


# -- log.meta, and what is no log ---------------------------------------------------------


def test_without_its_meta_file_the_segments_are_still_checked() -> None:
    files = ten_batches()
    name = segments(files)[1]
    flip(files, name, DATA_OFFSET + 70)
    files.remove_file(LOG, META_NAME)
    result = check(files)
    assert places(result) == [(META_NAME, 0), (name, DATA_OFFSET)]
    assert result.findings[0].reason == "the file is missing"
    assert result.segments == len(segments(files))


def test_with_a_damaged_meta_file_the_segments_are_still_checked() -> None:
    files = ten_batches()
    name = segments(files)[1]
    flip(files, name, DATA_OFFSET + 70)
    flip(files, META_NAME, 30)
    result = check(files)
    assert places(result) == [(META_NAME, 0), (name, DATA_OFFSET)]


def test_a_log_from_the_future_is_refused() -> None:
    files = ten_batches()
    change_meta(files, features=1 << 9)
    with pytest.raises(trio_wal.UnsupportedFormatError, match=r"^/log/log\.meta: feature set 512 "):
        verify(files.open_directory(LOG))


@pytest.mark.parametrize("name", [None, "notes.txt"])
def test_a_directory_that_is_no_log_is_refused(name: str | None) -> None:
    files = MemoryFiles()
    directory = files.open_directory(LOG, create=True)
    if name is not None:
        files.write_file(LOG, name, b"dear diary")
    holds = "it is empty" if name is None else "it holds 'notes.txt'"
    with pytest.raises(trio_wal.WrongDirectoryError) as caught:
        verify(directory)
    assert caught.value.path == LOG
    assert caught.value.found == f"neither a log nor a database: {holds}"


# -- bad sectors ----------------------------------------------------------------------


class Interrupted:
    """A directory of `MemoryFiles` that calls back before every read, listing and opening."""

    def __init__(self, directory: Any, before: Callable[[str, int, int], None]) -> None:
        self._directory = directory
        self._before = before
        self.path = directory.path

    def names(self) -> list[str]:
        self._before("names", 0, 0)
        return self._directory.names()

    def published(self) -> Word:
        return self._directory.published()

    def open(self, name: str) -> Any:
        self._before("open", 0, 0)
        return _InterruptedFile(self._directory.open(name), name, self._before)


class _InterruptedFile:
    def __init__(self, file: Any, name: str, before: Callable[[str, int, int], None]) -> None:
        self._file = file
        self._name = name
        self._before = before
        self.path = file.path

    def pread(self, length: int, offset: int) -> bytes:
        self._before(self._name, length, offset)
        return self._file.pread(length, offset)

    def next_data(self, offset: int) -> int:
        return self._file.next_data(offset)

    def size(self) -> int:
        return self._file.size()

    def close(self) -> None:
        self._file.close()


class At:
    """Does something before the n-th read."""

    def __init__(self, moment: int, action: Callable[[], object]) -> None:
        self._moment = moment
        self._action = action
        self.calls = 0

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls == self._moment:
            self._action()


def _bad_sector(name: str, bad: int) -> Callable[[str, int, int], None]:
    def before(read_name: str, length: int, offset: int) -> None:
        if read_name == name and offset <= bad < offset + length:
            raise OSError(errno.EIO, "Input/output error", name)

    return before


def test_a_bad_sector_is_a_finding_and_the_rest_is_checked() -> None:
    files = one_segment(30)
    (name,) = segments(files)
    bad = 4096 * 3
    result = verify(Interrupted(files.open_directory(LOG), _bad_sector(name, bad)))
    assert (f"{LOG}/{name}", bad, "4096 bytes cannot be read: Input/output error") in [
        (f.path, f.offset, f.reason) for f in result.findings
    ]
    inside = [f for f in frames(files, name) if f.offset < bad + 4096 and f.end > bad]
    (gap,) = [f for f in result.findings if f.first_lsn is not None]
    assert (gap.first_lsn, gap.last_lsn) == (inside[0].first_lsn, inside[-1].first_lsn)
    assert result.records == 30 - len(inside)


@pytest.mark.parametrize("name", [META_NAME, segment_name(1)])
def test_a_header_that_cannot_be_read_is_a_finding(name: str) -> None:
    files = ten_batches()
    result = verify(Interrupted(files.open_directory(LOG), _bad_sector(name, 0)))
    assert places(result) == [(name, 0)]
    assert result.findings[0].reason == "the header cannot be read: Input/output error"


def test_another_error_than_a_bad_sector_ends_the_verification() -> None:
    def before(name: str, length: int, offset: int) -> None:
        if offset >= DATA_OFFSET:
            raise OSError(errno.ENOMEM, "Cannot allocate memory", name)

    with pytest.raises(OSError, match=r"^\[Errno 12\] "):
        verify(Interrupted(one_segment().open_directory(LOG), before))


# -- a log that is being written ----------------------------------------------------------


def _grow(log: LogDirectory) -> None:
    for i in range(3):
        append(log, b"new%d" % i + PAYLOAD)


def _cut(log: LogDirectory) -> None:
    log.truncate_after(log.last_lsn - 3)
    append(log, b"other" + PAYLOAD)


def _drop(log: LogDirectory) -> None:
    log.drop_before(log.last_lsn)


def _recycle(log: LogDirectory) -> None:
    """The file of a dropped segment gets another name, and zeros."""
    log.drop_before(log.sealed()[0].next_lsn)
    log.prepare_spare()


@pytest.mark.parametrize("act", [_grow, _cut, _drop, _recycle, LogDirectory.close])
def test_whatever_a_writer_does_meanwhile_is_no_finding(
    act: Callable[[LogDirectory], None],
) -> None:
    """The writer acts between any two reads of the verification."""
    moment = 0
    while _verify_while(act, moment).calls >= moment:
        moment += 1
    assert moment > 20


def _verify_while(act: Callable[[LogDirectory], None], moment: int) -> At:
    files = MemoryFiles(seed=moment)
    log = open_log(files)
    for i in range(9):
        append(log, b"%d" % i + PAYLOAD)
    before = At(moment, lambda: act(log))
    assert verify(Interrupted(files.open_directory(LOG), before)).findings == ()
    return before


def write_in_place(files: MemoryFiles, name: str, data: bytes) -> None:
    """Whoever has the file open sees it."""
    files.open_directory(LOG).open(name, writable=True).pwrite([data], 0)


def test_a_frame_that_is_being_written_is_no_finding() -> None:
    """It is half there at one read; at the next it is whole, and another says it is durable."""
    files = one_segment(4, close=False)
    (name,) = segments(files)
    whole = files.read_file(LOG, name)
    third = frames(files, name)[2]
    hole = bytes(third.end - third.offset)
    torn = whole[: third.offset + 100] + hole[100:] + bytes(len(whole) - third.end)
    seen = 0
    for moment in range(1, 30):
        write_in_place(files, name, torn)
        before = At(moment, lambda: write_in_place(files, name, whole))
        result = verify(Interrupted(files.open_directory(LOG), before))
        if before.calls >= moment:
            assert result.findings == ()
            seen += 1
    assert seen > 5


def test_frames_that_are_being_written_at_every_look_are_no_finding() -> None:
    files = one_segment(4, close=False)
    (name,) = segments(files)
    whole = files.read_file(LOG, name)
    third = frames(files, name)[2]
    torn = whole[: third.offset + 100] + bytes(third.end - third.offset - 100) + whole[third.end :]
    reads = 0

    def before(what: str, _: int, offset: int) -> None:
        nonlocal reads
        if what == "open":
            reads = 0
        elif what == name and offset >= DATA_OFFSET:
            reads += 1
        write_in_place(files, name, torn if reads < 2 else whole)

    assert verify(Interrupted(files.open_directory(LOG), before)).findings == ()


def test_damage_is_found_in_a_log_that_never_stands_still() -> None:
    files = MemoryFiles()
    log = open_log(files)
    for i in range(9):
        append(log, b"%d" % i + PAYLOAD)
    damaged = segments(files)[1]
    flip(files, damaged, DATA_OFFSET + 70)
    busy = [0]

    def before(name: str, *_: object) -> None:
        if name == "names" and busy[0] < 5 * LOOK_TRIES:
            busy[0] += 1
            append(log, PAYLOAD)

    result = verify(Interrupted(files.open_directory(LOG), before))
    assert places(result) == [(damaged, DATA_OFFSET)]


# -- progress -------------------------------------------------------------------------


def test_progress_only_grows_and_ends_at_the_total() -> None:
    files = ten_batches()
    seen: list[tuple[int, int]] = []
    verify(files.open_directory(LOG), lambda done, total: seen.append((done, total)))
    total = sum(len(files.read_file(LOG, name)) for name in segments(files))
    assert {t for _, t in seen} == {total}
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert seen[-1] == (total, total)
    assert len(seen) > len(segments(files))


# -- what log.meta says --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"base_number": 2}, {"base_lsn": 3}])
def test_a_meta_file_that_begins_the_log_elsewhere_is_a_finding(changes: dict[str, int]) -> None:
    files = ten_batches()
    change_meta(files, **changes)
    findings = check(files).findings
    assert findings[0].path == f"{LOG}/{META_NAME}"
    assert findings[0].reason.startswith("it says that the log starts with segment ")


def test_a_decided_cut_without_its_new_segment_is_a_finding() -> None:
    files = ten_batches()
    change_meta(files, truncation=Truncation(bytes(16), 1, DATA_OFFSET, 0, 3))
    findings = check(files).findings
    assert ["the segment in which a truncated log goes on is missing", 3] in [
        [finding.reason, finding.first_lsn] for finding in findings
    ]


def test_a_strange_name_in_a_log_that_was_never_in_use_is_a_finding() -> None:
    files = MemoryFiles()
    images: list[MemoryFiles] = []
    files.after_operation = lambda operation, path: images.append(copy_of(files))
    open_log(files)
    begun = next(image for image in images if META_NAME in image.names(LOG))
    begun.write_file(LOG, "wal-1.log", b"")
    assert [finding.path for finding in check(begun).findings] == [f"{LOG}/wal-1.log"]


# -- many files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, 400, 800])
def test_each_of_many_files_costs_the_same(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    files = one_segment(1)
    for number in range(count):
        files.write_file(LOG, segment_name(1000 + number), b"")
    steps = 0
    original = _chain.segment_name_lsn

    def step(name: str) -> int | None:
        nonlocal steps
        steps += 1
        return original(name)

    monkeypatch.setattr(_chain, "segment_name_lsn", step)
    result = check(files)
    assert [(1000 + n, 1000 + n) for n in range(count - 1)] == lost(result)[1:count]
    assert lost(result)[count] == (999 + count, None)
    assert steps <= 6 * (count + 10)


def test_segments_are_looked_up_in_order_and_not_one_by_one() -> None:
    looked = 0

    class Counted(int):
        def __lt__(self, other: object) -> bool:
            nonlocal looked
            looked += 1
            return int(self) < int(other)  # type: ignore[call-overload, no-any-return]

        def __gt__(self, other: object) -> bool:
            return not (self < other or self == other)

    files = ten_batches()
    listing = list_log(files.open_directory(LOG))
    many = tuple(map(Counted, range(10**4, 2 * 10**4)))
    chain = replace(listing.chain, unreadable=many)
    segment = chain.find(1)
    assert segment is not None
    assert not chain.until(segment).is_last
    assert looked < 100


# -- a database ------------------------------------------------------------------------------------


def make_database(path: Path, name: bytes = b"one", *, keep_log: bool = False) -> Path:
    """A store with LSN 1 to 20, and a log that goes on to 25; it starts at 1 if kept, or later."""

    async def main() -> None:
        options: dict[str, Any] = {"segment_size": 1}
        if keep_log:
            options["retention"] = trio_wal.KeepAll()
        async with trio_wal.open_database(path, **options) as db:
            for number in range(20):
                await db.put(b"%s-%d" % (name, number), bytes(500))
            await db.checkpoint()
            if not keep_log:
                await until(lambda: db.wal.first_lsn > 1)
            for number in range(5):
                await db.put(b"%s-%d" % (name, number), b"newer")

    trio.run(main)
    return path


def check_database(path: Path) -> DatabaseVerification:
    before = hash_tree(path)
    result = verify_database(
        f"{path}/log",
        f"{path}/store",
        lambda: OsFiles().open_directory(f"{path}/log", follow=False),
    )
    assert hash_tree(path) == before
    return result


def only_reason(result: DatabaseVerification) -> str:
    (finding,) = result.findings
    return finding.reason


def test_a_sound_database_is_found_sound(tmp_path: Path) -> None:
    path = make_database(tmp_path / "db")
    result = check_database(path)
    assert result.findings == ()
    assert (result.store.keys, result.store.note) == (20, "")
    assert result.store.state is not None
    assert result.store.state.lsn == 20
    assert result.log is not None
    assert result.log.last_lsn == 25


def test_a_destroyed_store_is_found(tmp_path: Path) -> None:
    path = make_database(tmp_path / "db")
    file = path / "store" / "data.mdb"
    content = bytearray(file.read_bytes())
    for offset in range(2 * 4096, len(content), 4096):
        content[offset + 10 : offset + 210] = bytes(200)
    file.write_bytes(content)
    assert {finding.path for finding in check_database(path).findings} == {str(file)}


def test_a_missing_store_is_found_where_the_log_does_not_start_at_1(tmp_path: Path) -> None:
    path = make_database(tmp_path / "db")
    shutil.rmtree(path / "store")
    assert re.match(
        r"^the store is missing, and the log starts at LSN \d+$", only_reason(check_database(path))
    )
    whole = make_database(tmp_path / "whole", keep_log=True)
    shutil.rmtree(whole / "store")
    assert check_database(whole).findings == ()


def test_a_store_that_does_not_fit_its_log_is_found(tmp_path: Path) -> None:
    one = make_database(tmp_path / "one")
    other = make_database(tmp_path / "other", b"other")
    ahead = make_database(tmp_path / "ahead", keep_log=True)
    shutil.rmtree(one / "store")
    shutil.copytree(other / "store", one / "store")
    assert only_reason(check_database(one)) == "the store belongs to another log"
    for name in sorted((ahead / "log").glob("wal-*.log"))[1:]:
        name.unlink()
    reasons = [finding.reason for finding in check_database(ahead).findings]
    assert any(re.match(r"^the store holds LSN 20, but its log ends at LSN", r) for r in reasons)


def test_a_database_without_a_log_is_found(tmp_path: Path) -> None:
    path = make_database(tmp_path / "db")
    for name in (path / "log").iterdir():
        name.unlink()
    assert only_reason(check_database(path)).startswith("this is neither a log nor a database")
    (path / "log").rmdir()
    assert only_reason(check_database(path)) == "the database has no log"


def test_a_checkpoint_during_the_look_is_no_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_database(tmp_path / "db")
    old = tmp_path / "old"
    shutil.copytree(path, old)

    async def go_on() -> None:
        async with trio_wal.open_database(path, segment_size=1) as db:
            for number in range(30):
                await db.put(b"%d" % number, bytes(500))
            await db.checkpoint()
            # Dropped by a task of the log's own, which a close does not wait for.
            await until(lambda: db.wal.first_lsn > 21)

    trio.run(go_on)
    original = _admin.check_store
    looks: list[str] = []

    def check_store(path: str, *arguments: Any) -> Any:
        looks.append(path)
        # The first look finds the store as it was before the log was cut.
        return original(str(old / "store") if len(looks) == 1 else path, *arguments)

    monkeypatch.setattr(_admin, "check_store", check_store)
    result = check_database(path)
    assert (result.findings, len(looks)) == ((), 2)
