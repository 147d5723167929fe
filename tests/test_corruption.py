"""Damage is refused with its place, and nothing is touched; or it does not matter.

After a clean close the outcome of one flipped bit is an error or the full right content,
never a record that is wrong or missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

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
    records_of,
    segments,
)

from trio_wal import CorruptLogError, UnsupportedFormatError, WrongDirectoryError
from trio_wal._disk.frame import (
    BLOCK,
    DATA_OFFSET,
    FRAME_HEADER_SIZE,
    POINTER_OFFSET,
    SegmentHeader,
    crc32c,
    decode_segment_header,
)
from trio_wal._disk.scan import FrameScanner, start_of
from trio_wal._disk.segment import ActiveSegment, Extent
from trio_wal._disk.verify import verify
from trio_wal._util import KiB
from trio_wal.testing import MemoryFiles

BATCHES = [[b"first"], [b"second", b"", b"third"], [bytes(600)], [b"last", b"of all"]]
RECORDS = numbered(record for batch in BATCHES for record in batch)


def refused(files: MemoryFiles, error: type[Exception], match: str) -> None:
    """Opening is refused, again and again, and changes nothing."""
    before = files.contents(LOG)
    for _ in range(2):
        with pytest.raises(error, match=match):
            open_log(files, verify_bytes=math.inf)
    assert files.contents(LOG) == before


# -- one flipped bit ------------------------------------------------------------------------


def outcome(files: MemoryFiles) -> object:
    """What one open makes of the files: their content, or the error."""
    log = None
    try:
        log = open_log(files, verify_bytes=math.inf)
        return records_of(log)
    except (CorruptLogError, UnsupportedFormatError) as exc:
        return type(exc)
    finally:
        if log is not None:
            log.close(orderly=False)


def used(files: MemoryFiles, name: str) -> list[int]:
    """The bytes of a segment that anything depends on, and one of each stretch of others."""
    data = files.read_file(LOG, name)
    places = {len(data) - 1, DATA_OFFSET - 1, POINTER_OFFSET + BLOCK + 7, 200}
    places.update(range(128), range(BLOCK - 4, BLOCK + 48))
    for block in range(DATA_OFFSET, len(data), BLOCK):
        end = block + len(data[block : block + BLOCK].rstrip(b"\0"))
        places.update(range(block, end), [block + BLOCK - 1])
    return sorted(place for place in places if place < len(data))


@pytest.mark.parametrize("close", [True, False], ids=["closed", "crashed"])
@pytest.mark.parametrize("segment_size", [TINY, 16 * KiB], ids=["segments", "one segment"])
def test_one_flipped_bit_is_refused_or_without_effect(close: bool, segment_size: int) -> None:
    """Every byte of what is used, a bit of each in turn."""
    files = make_log(*BATCHES, close=close, segment_size=segment_size)
    before = files.contents(LOG)
    outcomes: Counter[object] = Counter()
    for name in files.names(LOG):
        places = used(files, name) if name.startswith("wal-") else range(len(before[name]))
        for place in places:
            # One bit of each byte in turn: eight neighbours have all eight.
            bit = 8 * place + place % 8
            files.flip_bit(LOG, name, bit)
            image = copy_of(files)
            files.flip_bit(LOG, name, bit)
            found = outcome(image)
            outcomes[found] += 1
            if found in (CorruptLogError, UnsupportedFormatError):
                files.flip_bit(LOG, name, bit)
                assert image.contents(LOG) == files.contents(LOG), "refused, and yet modified"
                files.flip_bit(LOG, name, bit)
    assert files.contents(LOG) == before
    assert outcomes[CorruptLogError] > 500
    kept = {found for found in outcomes if not isinstance(found, type)}
    if close:
        assert kept == {RECORDS}
    else:
        # Nothing tells damage in the last group commit from a torn write of it.
        assert kept <= {RECORDS, RECORDS[:-2]}


@pytest.mark.parametrize("name_of", ["log.meta", "first", "last"])
def test_all_bits_of_all_headers_and_frame_headers_matter(name_of: str) -> None:
    files = make_log(*BATCHES)
    names = {"log.meta": "log.meta", "first": segments(files)[0], "last": segments(files)[-1]}
    name = names[name_of]
    ranges = [range(BLOCK)]
    if name != "log.meta":
        ranges.append(range(DATA_OFFSET, DATA_OFFSET + FRAME_HEADER_SIZE))
    for place in (place for places in ranges for place in places):
        for bit in range(8):
            image = copy_of(files)
            image.flip_bit(LOG, name, 8 * place + bit)
            assert outcome(image) is CorruptLogError


@pytest.mark.parametrize("verify_bytes", [0, math.inf])
@pytest.mark.parametrize(
    ("offset", "place", "reason"),
    [
        (POINTER_OFFSET + 9, POINTER_OFFSET, "the pointer to the segment's footer is damaged"),
        (5120 + 10, 5120, "the segment's footer is damaged"),
    ],
)
def test_a_damaged_pointer_is_not_called_a_damaged_footer(
    offset: int, place: int, reason: str, verify_bytes: float
) -> None:
    """It could be written anew, but damage is damage; `verify` says the same of it."""
    files = make_log(*BATCHES, [b"one segment more"])
    name = segments(files)[0]
    files.flip_bit(LOG, name, 8 * offset)
    before = files.contents(LOG)
    with pytest.raises(CorruptLogError) as caught:
        open_log(files, verify_bytes=verify_bytes)
    found = (caught.value.path, caught.value.offset, caught.value.reason)
    assert found == (f"/log/{name}", place, reason)
    assert files.contents(LOG) == before
    (finding,) = verify(files.open_directory(LOG)).findings
    assert (finding.path, finding.offset, finding.reason) == found


@pytest.mark.parametrize("number", range(4))
def test_an_error_says_where_the_damage_is(number: int) -> None:
    files = make_log(*BATCHES)
    name = segments(files)[number // 2]
    offset = [4096, 4608, 4096, 5120][number]
    files.flip_bit(LOG, name, 8 * (offset + FRAME_HEADER_SIZE))
    with pytest.raises(CorruptLogError) as caught:
        open_log(files, verify_bytes=math.inf)
    error = caught.value
    assert (error.path, error.offset) == (f"/log/{name}", offset)
    assert error.reason.startswith("checksum of the frame body does not match")
    assert str(error) == (
        f"/log/{name}: at offset {offset}: {error.reason}; nothing was modified; "
        "'trio-wal verify' lists every finding"
    )


def test_damage_that_a_later_frame_calls_durable_is_no_torn_tail() -> None:
    files = make_log([b"a"], [b"b"], [b"c"], close=False, segment_size=16 * KiB)
    (name,) = segments(files)
    files.flip_bit(LOG, name, 8 * (DATA_OFFSET + BLOCK + FRAME_HEADER_SIZE))
    refused(
        files,
        CorruptLogError,
        rf"^/log/{name}: at offset 4608: checksum of the frame body does not match; the "
        r"frame at offset 5120 says that LSN 2 had been durable",
    )


def test_a_closed_log_without_its_last_record_is_refused() -> None:
    files = make_log([b"a"], [b"b"], segment_size=16 * KiB)
    (name,) = segments(files)
    data = files.read_file(LOG, name)
    lost = DATA_OFFSET + BLOCK
    for end in (lost + 2 * BLOCK, lost + BLOCK):
        files.write_file(LOG, name, data[:lost] + bytes(end - lost) + data[end:])
        refused(files, CorruptLogError, rf"^/log/{name}: at offset {lost}: ")


def test_random_blocks_swapped_or_misplaced_are_refused() -> None:
    files = make_log(*BATCHES, segment_size=16 * KiB)
    (name,) = segments(files)
    data = files.read_file(LOG, name)
    blocks = range(DATA_OFFSET, DATA_OFFSET + 6 * BLOCK, BLOCK)
    for a in blocks:
        for b in blocks:
            if a == b:
                continue
            image = copy_of(files)
            changed = bytearray(data)
            changed[a : a + BLOCK] = data[b : b + BLOCK]
            misplaced = bytes(changed)
            changed[b : b + BLOCK] = data[a : a + BLOCK]
            for damaged in (misplaced, bytes(changed)):
                image.write_file(LOG, name, damaged)
                assert outcome(copy_of(image)) in (CorruptLogError, RECORDS)


# -- files missing, renamed, foreign ---------------------------------------------------------


def four_segments(*, close: bool = True) -> MemoryFiles:
    files = make_log(*([b"%d" % n] for n in range(8)), close=close)
    assert len(segments(files)) == 4
    return files


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (0, "wal-0{19}1.log: at offset 0: segment 1 is missing: the log starts there"),
        (1, "wal-0{19}3.log: at offset 0: segment 2 is missing: wal-0{19}5.log comes after it"),
        (2, "wal-0{19}5.log: at offset 0: segment 3 is missing: wal-0{19}7.log comes after it"),
        (3, r"wal-0{19}7.log: at offset 0: segment 4 is missing: wal-0{19}5.log is sealed"),
    ],
)
def test_a_missing_segment_is_noticed(number: int, reason: str, close: bool) -> None:
    files = four_segments(close=close)
    files.remove_file(LOG, segments(files)[number])
    refused(files, CorruptLogError, f"^/log/{reason}")


def test_all_segments_missing_is_noticed() -> None:
    files = four_segments()
    for name in segments(files):
        files.remove_file(LOG, name)
    refused(files, CorruptLogError, r"^/log/wal-0{19}1\.log: .* the log's segments are missing")


def test_a_segment_dropped_by_hand_is_missed_even_if_it_was_the_last_and_empty() -> None:
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    log.rotate()
    log.close()
    files.remove_file(LOG, segments(files)[-1])
    refused(files, CorruptLogError, r"^/log/wal-0{19}2\.log: .* segment 2 is missing: wal-0{19}1")


@pytest.mark.parametrize("number", range(4))
def test_a_renamed_segment_is_noticed(number: int) -> None:
    files = four_segments()
    name = segments(files)[number]
    files.write_file(LOG, "wal-00000000000000000099.log", files.read_file(LOG, name))
    files.remove_file(LOG, name)
    refused(
        files,
        CorruptLogError,
        rf"^/log/wal-0{{18}}99\.log: at offset 0: the header says that this file is {name}",
    )


@pytest.mark.parametrize("number", range(4))
def test_a_second_copy_of_a_segment_is_noticed(number: int) -> None:
    files = four_segments()
    name = segments(files)[number]
    files.write_file(LOG, "wal-00000000000000000099.log", files.read_file(LOG, name))
    refused(files, CorruptLogError, r"^/log/wal-0{18}99\.log: .* this file is wal-")


def test_two_segments_of_one_number_are_noticed() -> None:
    files = four_segments()
    header = decode_segment_header(files.read_file(LOG, segments(files)[1]))
    forged = SegmentHeader(header.log_uuid, 2, 4, header.salt, header.created_us, 7)
    data = forged.encode().ljust(DATA_OFFSET, b"\0")
    files.write_file(LOG, forged.name, data)
    refused(
        files, CorruptLogError, r"^/log/wal-0{19}4\.log: .* both this file and .* are segment 2"
    )


@pytest.mark.parametrize("number", range(4))
def test_a_segment_of_another_log_is_noticed(number: int) -> None:
    files, other = four_segments(), MemoryFiles(seed=99)
    log = open_log(other)
    for n in range(8):
        append(log, b"%d" % n)
    log.close()
    name = segments(files)[number]
    assert segments(other) == segments(files)
    files.write_file(LOG, name, other.read_file(LOG, name))
    refused(
        files,
        CorruptLogError,
        rf"^/log/{name}: at offset 0: this segment belongs to another log",
    )


@pytest.mark.parametrize("number", range(4))
def test_two_segments_swapped_are_noticed(number: int) -> None:
    files = four_segments()
    a, b = segments(files)[number], segments(files)[number - 1]
    data_a, data_b = files.read_file(LOG, a), files.read_file(LOG, b)
    files.write_file(LOG, a, data_b)
    files.write_file(LOG, b, data_a)
    refused(files, CorruptLogError, r"^/log/wal-.* the header says that this file is wal-")


def test_a_strange_name_among_the_segments_is_noticed() -> None:
    files = four_segments()
    files.write_file(LOG, "wal-1.log", b"")
    refused(files, CorruptLogError, r"^/log/wal-1\.log: .* this is not the name of a segment")


def resealed(sector: bytes, offset: int, field: bytes) -> bytes:
    fields = sector[:offset] + field + sector[offset + len(field) : BLOCK - 4]
    return fields + crc32c(fields).to_bytes(4, "little")


@pytest.mark.parametrize("number", [0, 1, 2, 3, "log.meta"])
def test_a_file_from_the_future_is_unsupported_and_not_damaged(number: int | str) -> None:
    files = four_segments()
    name = number if isinstance(number, str) else segments(files)[number]
    data = files.read_file(LOG, name)
    files.write_file(LOG, name, resealed(data, 8, b"\2\0") + data[BLOCK:])
    refused(files, UnsupportedFormatError, rf"^/log/{name}: format version 2 is not supported; ")
    files.write_file(LOG, name, resealed(data, 12, b"\0\1\0\0") + data[BLOCK:])
    refused(
        files,
        UnsupportedFormatError,
        rf"^/log/{name}: feature set 256 \(bit 8\) is not supported; ",
    )


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4095])
@pytest.mark.parametrize("number", range(4))
def test_a_segment_cut_into_its_header_is_noticed(number: int, size: int) -> None:
    files = four_segments()
    name = segments(files)[number]
    files.write_file(LOG, name, files.read_file(LOG, name)[:size])
    refused(files, CorruptLogError, rf"^/log/{name}: at offset 0: ")


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("size", [DATA_OFFSET, DATA_OFFSET + 1, DATA_OFFSET + BLOCK])
def test_a_segment_cut_into_its_records_is_noticed(number: int, size: int) -> None:
    files = four_segments()
    name = segments(files)[number]
    files.write_file(LOG, name, files.read_file(LOG, name)[:size])
    refused(files, CorruptLogError, rf"^/log/{name}: at offset \d+: ")


@pytest.mark.parametrize("number", range(4))
def test_a_segment_zeroed_from_its_records_on_is_noticed(number: int) -> None:
    files = four_segments()
    name = segments(files)[number]
    data = files.read_file(LOG, name)
    files.write_file(LOG, name, data[:DATA_OFFSET].ljust(len(data), b"\0"))
    refused(files, CorruptLogError, rf"^/log/{name}: at offset 4096: ")


@pytest.mark.parametrize("number", range(3))
def test_bytes_behind_a_footer_are_noticed(number: int) -> None:
    files = four_segments()
    name = segments(files)[number]
    data = files.read_file(LOG, name)
    files.write_file(LOG, name, data + b"more")
    if number < 2:
        refused(files, CorruptLogError, rf"^/log/{name}: .* bytes behind the segment's footer")
    else:
        # The crash of a rotation may have left them; a new footer cuts them off.
        assert len(content(files)) == 8
        open_log(files)
        assert files.read_file(LOG, name) == data


def test_a_footer_that_lies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checksum is good; what it counts is not what is there."""
    files = four_segments()
    name = segments(files)[0]
    data = files.read_file(LOG, name)
    header = decode_segment_header(data)
    file = files.open_directory(LOG).open(name, writable=True)
    scanner = FrameScanner(file.pread, header, start_of(header))
    assert [frame.count for _, (frame, _) in zip(range(2), scanner, strict=False)] == [1, 1]
    active = ActiveSegment(file, Extent(header, len(data), scanner.position, frames=2))
    monkeypatch.setattr(ActiveSegment, "records", 3)
    active.seal()
    refused(
        files,
        CorruptLogError,
        rf"^/log/{name}: .* the footer counts 3 records up to LSN 2, the segment has 2 up to 2",
    )


# -- log.meta, and directories that are none ------------------------------------------------------


def test_a_missing_meta_is_noticed() -> None:
    files = four_segments()
    files.remove_file(LOG, "log.meta")
    refused(files, CorruptLogError, r"^/log/log\.meta: at offset 0: the file is missing")


@pytest.mark.parametrize("data", [b"", b"x", bytes(512), b"triowal\n" + bytes(504), b"x" * 600])
def test_a_damaged_meta_is_noticed(data: bytes) -> None:
    files = four_segments()
    files.write_file(LOG, "log.meta", data)
    refused(files, CorruptLogError, r"^/log/log\.meta: at offset 0: ")


@pytest.mark.parametrize("data", [b"", b"trio-wal", bytes(8192), b"\x7fELF" * 2000])
def test_a_segment_that_is_something_else_is_noticed(data: bytes) -> None:
    files = four_segments()
    name = segments(files)[1]
    files.write_file(LOG, name, data)
    refused(files, CorruptLogError, rf"^/log/{name}: at offset 0: ")


def test_a_foreign_directory_is_refused() -> None:
    files = MemoryFiles()
    files.write_file(LOG, "thesis.tex", b"ten years of work")
    refused(
        files,
        WrongDirectoryError,
        r"^/log: this is neither a log nor a database: it holds 'thesis\.tex': use ",
    )


def test_a_log_of_which_only_creation_was_begun_may_hold_no_second_segment() -> None:
    files = MemoryFiles()
    images: list[MemoryFiles] = []
    files.after_operation = lambda operation, path: images.append(copy_of(files))
    open_log(files)
    begun = next(image for image in images if segments(image))
    data = begun.read_file(LOG, segments(begun)[0])
    assert open_log(copy_of(begun)).last_lsn == 0
    begun.write_file(LOG, "wal-00000000000000000002.log", data)
    refused(
        begun,
        CorruptLogError,
        r"^/log/wal-0{19}2\.log: .* a log that was never in use has segments",
    )


MUTATIONS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "doubled": lambda data: data + data,
    "shifted": lambda data: b"\0" + data[:-1],
    "reversed": lambda data: data[::-1],
    "without a block": lambda data: data[: 2 * BLOCK] + data[3 * BLOCK :],
    "header twice": lambda data: data[:DATA_OFFSET] + data,
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("close", [True, False])
def test_mutilated_files_are_refused_or_give_all_records(mutation: str, close: bool) -> None:
    files = four_segments(close=close)
    expected = content(files)
    for name in files.names(LOG):
        image = copy_of(files)
        image.write_file(LOG, name, MUTATIONS[mutation](files.read_file(LOG, name)))
        found = outcome(copy_of(image))
        if name == segments(files)[-1] and not close:
            assert found in (CorruptLogError, expected, expected[:-1])
        else:
            assert found in (CorruptLogError, expected)
