"""Walking the frames of one segment: where it ends, why, and what stands behind."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st
from logs import LOG, append, make_log, open_log, segments
from msgspec.structs import astuple, replace

from trio_wal._disk import scan as _scan, window as _window
from trio_wal._disk.frame import (
    BLOCK,
    DATA_OFFSET,
    FRAME_BODY_MAX,
    FRAME_HEADER_SIZE,
    POINTER_OFFSET,
    Codec,
    Footer,
    FrameError,
    FrameHeader,
    Kind,
    SegmentHeader,
    crc32c,
    decode_frame_header,
    decode_segment_header,
    encode_frame_header,
)
from trio_wal._disk.scan import FrameScanner, Position, examine_tail, payloads, start_of
from trio_wal.testing import MemoryFiles

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

BATCHES = [[b"one"], [b"two", b"", b"three"], [bytes(1000)], [b"four"]]
OFFSETS = [4096, 4608, 5120, 6656]
"""Of the four frames; the third takes three blocks."""
END = 7168


def segment(*batches: list[bytes], close: bool = False) -> bytes:
    files = make_log(*batches, close=close, segment_size=16 * 1024)
    (name,) = segments(files)
    return files.read_file(LOG, name)


DATA = segment(*BATCHES)
HEADER = decode_segment_header(DATA)


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda length, offset: data[offset : offset + length]


def scan(data: bytes, position: Position | None = None, *, chained: bool = True) -> FrameScanner:
    return FrameScanner(reader(data), HEADER, position or start_of(HEADER), chained=chained)


def records_of(scanner: FrameScanner) -> list[list[bytes]]:
    return [_scan.payloads(frame, body) for frame, body in scanner]


def changed(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def test_the_frames_come_in_order_with_their_records() -> None:
    scanner = scan(DATA)
    assert [frame.offset for frame, _ in scanner] == OFFSETS
    assert scanner.reason == ""
    assert astuple(scanner.position)[:2] == (END, 7)
    assert records_of(scan(DATA)) == BATCHES


def test_each_frame_says_what_was_durable_before_it() -> None:
    assert [frame.durable_lsn for frame, _ in scan(DATA)] == [0, 1, 4, 5]
    scanner = scan(DATA)
    assert len(list(scanner)) == 4
    assert scanner.position.durable_lsn == 5


def test_a_scan_without_bodies_finds_the_same_frames() -> None:
    scanner = FrameScanner(reader(DATA), HEADER, start_of(HEADER), bodies=False)
    assert [(frame.offset, body) for frame, body in scanner] == [(n, b"") for n in OFFSETS]


def test_the_end_of_the_file_behind_a_whole_frame_is_no_fault() -> None:
    scanner = scan(DATA[:END])
    assert records_of(scanner) == BATCHES
    assert scanner.reason == ""


@pytest.mark.parametrize(
    ("offset", "new", "frames", "reason"),
    [
        (4096, b"X", 0, "no valid frame header"),
        (4608 + 63, b"X", 1, "no valid frame header"),
        (4608, bytes(64), 1, ""),
        (4608 + 64, b"X", 1, "checksum of the frame body does not match"),
        (5120 + 1000, b"X", 2, "checksum of the frame body does not match"),
        (4096 + 400, b"X", 0, "padding behind the frame is not zero"),
        (END - 1, b"X", 3, "padding behind the frame is not zero"),
        (END, b"X", 4, "no valid frame header"),
        (END + 63, b"X", 4, "no valid frame header"),
        (END + 64, b"X", 4, ""),
    ],
)
def test_a_scan_ends_at_the_first_byte_that_is_wrong_and_says_why(
    offset: int, new: bytes, frames: int, reason: str
) -> None:
    scanner = scan(changed(DATA, offset, new))
    assert records_of(scanner) == BATCHES[:frames]
    assert scanner.position.offset == [*OFFSETS, END][frames]
    assert scanner.reason == reason


def test_a_body_cut_short_ends_the_scan_at_every_byte() -> None:
    for size in range(5120, 5120 + FRAME_HEADER_SIZE + 1004):
        scanner = scan(DATA[:size])
        assert records_of(scanner) == BATCHES[:2]
        assert scanner.position.offset == 5120
        if size == 5120:
            assert scanner.reason == ""
        elif size < 5120 + FRAME_HEADER_SIZE:
            assert scanner.reason == "no valid frame header"
        else:
            assert scanner.reason.startswith("frame body cut short")


def forged(**changes: object) -> bytes:
    """The second frame with other fields, and checksums that fit."""
    frame = decode_frame_header(DATA[4608:], 4608, HEADER.seed)
    assert frame is not None
    head = encode_frame_header(replace(frame, **changes), HEADER.seed)
    return changed(DATA, 4608, head)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"first_lsn": 3}, "frame of LSN 3 where 2 is due"),
        ({"first_lsn": 1, "durable_lsn": 0}, "frame of LSN 1 where 2 is due"),
        ({"previous": 7}, "the frame does not follow the one before it"),
        ({"stored_length": FRAME_BODY_MAX}, "frame body cut short: 11712 of 1073741824"),
        ({"stored_length": 5}, "checksum of the frame body does not match"),
        ({"body_crc": 7}, "checksum of the frame body does not match"),
    ],
)
def test_a_frame_that_does_not_fit_its_place_ends_the_scan(
    changes: dict[str, object], reason: str
) -> None:
    scanner = scan(forged(**changes))
    assert records_of(scanner) == BATCHES[:1]
    assert scanner.reason == reason


def test_a_length_is_believed_only_behind_a_good_checksum() -> None:
    asked: list[int] = []

    def read(length: int, offset: int) -> bytes:
        asked.append(length)
        return huge[offset : offset + length]

    # The stored length is at offset 40 of the header; its checksum does not know of it.
    huge = changed(DATA, 4096 + 40, b"\xff\xff\xff\x3f")
    assert list(FrameScanner(read, HEADER, start_of(HEADER))) == []
    assert max(asked) <= _scan.WINDOW


def test_a_walk_reads_little_at_first_and_then_more() -> None:
    asked: list[int] = []

    def read(length: int, offset: int) -> bytes:
        asked.append(length)
        return data[offset : offset + length]

    # Who follows a log's end begins a walk for each batch; most of what it asks for is zeros.
    data = DATA
    assert len(list(FrameScanner(read, HEADER, start_of(HEADER)))) > 1
    assert set(asked) == {_window.FIRST_WINDOW}
    asked.clear()
    files = make_log(
        *([bytes(100_000)] for _ in range(40)), close=False, segment_size=16 * 1024 * 1024
    )
    data = files.read_file(LOG, segments(files)[-1])
    walk = FrameScanner(read, decode_segment_header(data), start_of(decode_segment_header(data)))
    assert len(list(walk)) > 20
    assert asked[0] == _window.FIRST_WINDOW
    assert max(asked) == _scan.WINDOW
    assert len(asked) < 12


def test_a_frame_of_another_incarnation_of_the_segment_is_not_taken() -> None:
    salted = replace(HEADER, salt=bytes(16))
    data = changed(DATA, 0, salted.encode())
    scanner = FrameScanner(reader(data), salted, start_of(salted))
    assert list(scanner) == []
    assert scanner.reason == "no valid frame header"


def test_swapped_frames_are_not_taken() -> None:
    first, second = DATA[4096:4608], DATA[4608:5120]
    scanner = scan(changed(DATA, 4096, second + first))
    assert list(scanner) == []


def test_a_walk_from_the_middle_takes_the_first_frame_as_it_stands_and_checks_the_next() -> None:
    middle = Position(4608, 2, 0)
    assert records_of(scan(DATA, middle, chained=False)) == BATCHES[1:]
    assert records_of(scan(DATA, middle, chained=True)) == []
    # The third frame no longer follows the second.
    other = forged(durable_lsn=0)
    assert records_of(scan(other, middle, chained=False)) == BATCHES[1:2]


def test_a_frame_larger_than_the_window_is_read_whole() -> None:
    big = bytes(range(256)) * (5 * _scan.WINDOW // 256)
    files = make_log([b"a"], [big], [b"b"], segment_size=16 * 1024 * 1024)
    data = files.read_file(LOG, segments(files)[-1])
    header = decode_segment_header(data)
    found = [
        record
        for frame, body in FrameScanner(reader(data), header, start_of(header))
        if frame.kind is Kind.DATA
        for record in _scan.payloads(frame, body)
    ]
    assert found[-2:] == [big, b"b"]


LONG = [b"x" * n for n in (70_000, 0, 100_000, 180_001)]


def long_segment(*batches: list[bytes]) -> bytes:
    files = make_log(*batches, segment_size=16 * 1024)
    return files.read_file(LOG, segments(files)[-1])


def skim(data: bytes) -> FrameScanner:
    header = decode_segment_header(data)
    return FrameScanner(reader(data), header, start_of(header), skim=True)


@pytest.mark.parametrize("records", [LONG, [b""] * 90_000, [b"", *LONG] * 3])
def test_of_a_long_body_a_skim_gives_the_table_that_is_checked(
    records: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_scan, "SKIM_WINDOW", 128 * 1024)
    data = long_segment(records)
    (frame, body), _close = list(skim(data))
    assert frame.stored_length > 2 * _scan.SKIM_WINDOW
    table = 4 * len(records)
    at = frame.offset + FRAME_HEADER_SIZE
    assert body == data[at : at + table]
    _scan.check_body(frame, body)
    with pytest.raises(FrameError, match="add up to"):
        _scan.check_body(frame, b"\1" + body[1:])
    assert [body for _, body in skim(DATA)] == [body for _, body in scan(DATA)]


@pytest.mark.parametrize("place", [64, 80, 131_136, 262_208, 350_080, 350_081, 350_082, 350_207])
@pytest.mark.parametrize("cut", [False, True])
def test_a_skim_judges_a_long_body_as_a_whole_scan_does(
    place: int, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_scan, "SKIM_WINDOW", 128 * 1024)
    data = long_segment(LONG, [b"behind"])
    (first, _), *_ = skim(data)
    assert (first.offset, first.stored_length, first.end) == (DATA_OFFSET, 350_017, 354_304)
    at = DATA_OFFSET + place
    damaged = data[:at] if cut else changed(data, at, bytes([data[at] ^ 1]))
    skimmed = skim(damaged)
    whole = FrameScanner(reader(damaged), decode_segment_header(data), skimmed.position)
    assert [frame for frame, _ in skimmed] == [frame for frame, _ in whole]
    assert skimmed.reason == whole.reason
    assert skimmed.position == whole.position
    # What is cut off behind the body may be missing: it was zeros.
    assert (skimmed.position.offset == first.offset) == (not cut or place < 350_081)


def test_a_large_body_is_read_once_and_kept_by_nobody_but_who_is_given_it() -> None:
    data = segment([bytes(3 * _scan.WINDOW)], [b"behind"], close=False)
    reads: list[tuple[int, int]] = []

    def read(length: int, offset: int) -> bytes:
        reads.append((length, offset))
        return data[offset : offset + length]

    scanner = FrameScanner(read, decode_segment_header(data), start_of(decode_segment_header(data)))
    frames = iter(scanner)
    frame, body = next(frames)
    assert payloads(frame, body) == [bytes(3 * _scan.WINDOW)]
    # No window around it, of which the body would be a copy.
    assert max(length for length, _ in reads) == frame.stored_length
    alone = bytes(bytearray(10))
    # From Python 3.14 on a call's argument is not counted.
    assert sys.getrefcount(body) == sys.getrefcount(alone)
    assert [payloads(*found) for found in frames] == [[b"behind"]]


# -- holes ------------------------------------------------------------------------------


def test_holes_are_passed_over_where_the_file_can_tell() -> None:
    size = 1 << 62
    at = (1 << 61) + 512
    head = encode_frame_header(FRAME_BEHIND, HEADER.seed)
    reads = 0

    def read(length: int, offset: int) -> bytes:
        nonlocal reads
        reads += 1
        assert reads < 10, "zeros are read that are not there"
        return head.ljust(length, b"\0") if offset == at else bytes(length)

    def next_data(offset: int) -> int:
        return at if offset <= at else size

    position = Position(END, 7, 0)
    tail = examine_tail(read, size, HEADER, position, next_data)
    assert tail.covering is not None
    assert (tail.covering.offset, tail.durable_lsn) == (at, 8)
    assert examine_tail(read, size, HEADER, position, lambda _: size).torn_end == END


FRAME_BEHIND = FrameHeader(
    kind=Kind.DATA,
    offset=(1 << 61) + 512,
    first_lsn=9,
    durable_lsn=8,
    time_us=0,
    count=1,
    codec=Codec.NONE,
    stored_length=5,
    raw_length=5,
    body_crc=0,
    previous=0,
    crc=0,
)


# -- hostile bytes ----------------------------------------------------------------------


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_garbage_behind_the_header_is_never_a_frame(garbage: bytes, offset: int) -> None:
    data = changed(DATA, DATA_OFFSET + offset, garbage)
    scanner = scan(data)
    frames = records_of(scanner)
    assert frames == BATCHES[: len(frames)]
    examine_tail(reader(data), len(data), HEADER, scanner.position)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.sampled_from(Kind),
        "first_lsn": st.integers(1, 2**64 - 1),
        "durable_lsn": st.integers(0, 2**64 - 1),
        "time_us": st.integers(-(2**63), 2**63 - 1),
        "count": st.integers(0, 2**32 - 1),
        "codec": st.sampled_from(Codec),
        "stored_length": st.integers(0, 3000) | st.integers(0, 2**32 - 1),
        "raw_length": st.integers(0, 2**32 - 1),
        "previous": st.integers(0, 2**32 - 1),
    },
)


@given(st.lists(st.tuples(FIELDS, st.binary(max_size=600)), min_size=1, max_size=4))
def test_forged_frames_with_good_checksums_are_refused_in_one_way(
    frames: list[tuple[dict[str, object], bytes]],
) -> None:
    """A mutator that repairs every checksum: only `FrameError` may come of it."""
    data = bytearray(DATA[:DATA_OFFSET])
    position = start_of(HEADER)
    for fields, body in frames:
        frame = FrameHeader(
            Kind.DATA,
            position.offset,
            position.next_lsn,
            position.next_lsn - 1,
            1,
            1,
            Codec.NONE,
            len(body),
            len(body),
            crc32c(body),
            position.previous,
            0,
        )
        head = encode_frame_header(replace(frame, **fields), HEADER.seed)
        data += (head + body).ljust(frame.end - frame.offset, b"\0")
        position = Position(frame.end, frame.next_lsn, int.from_bytes(head[4:8], "little"))
    scanner = scan(bytes(data))
    for found, body in scanner:
        try:
            _scan.check_body(found, body)
        except FrameError:
            continue
        if found.kind is Kind.DATA:
            assert len(_scan.payloads(found, body)) == found.count
    examine_tail(reader(bytes(data)), len(data), HEADER, start_of(HEADER))


def test_payloads_that_are_frames_are_only_payloads() -> None:
    """A program may log the bytes of a log: even of this very segment."""
    stolen = DATA[4096:END]
    batches = [[stolen], [stolen[512:]], [b"x" * 444 + stolen], [DATA]]
    files = make_log(*batches, segment_size=64 * 1024)
    data = files.read_file(LOG, segments(files)[0])
    header = decode_segment_header(data)
    found = [
        _scan.payloads(frame, body)
        for frame, body in FrameScanner(reader(data), header, start_of(header))
        if frame.kind is Kind.DATA
    ]
    assert found == batches


# -- bodies --------------------------------------------------------------------------------


def data_frame(body: bytes, count: int, **changes: object) -> FrameHeader:
    frame = FrameHeader(
        Kind.DATA, 4096, 1, 0, 0, count, Codec.NONE, len(body), len(body), crc32c(body), 0, 0
    )
    return replace(frame, **changes)


@pytest.mark.parametrize(
    ("frame", "body", "reason"),
    [
        (data_frame(bytes(4), 2), bytes(4), "a table of 2 lengths does not fit"),
        (data_frame(bytes(5), 1), bytes(5), "the lengths add up to 4 bytes"),
        (data_frame(bytes(4), 1, raw_length=5), bytes(4), "an uncompressed frame declares two"),
        (data_frame(bytes(4), 1, codec=Codec.ZSTD), bytes(4), "compressed body "),
        (data_frame(bytes(4), 0, kind=Kind.SEAL), bytes(4), "a footer cannot have 4 bytes"),
        (data_frame(bytes(4), 0, kind=Kind.CLOSE), bytes(4), "a footer cannot have 4 bytes"),
    ],
)
def test_a_body_must_hold_what_its_frame_declares(
    frame: FrameHeader, body: bytes, reason: str
) -> None:
    with pytest.raises(FrameError, match=f"^{reason}"):
        _scan.check_body(frame, body)


# -- the tail --------------------------------------------------------------------------------


def tail(data: bytes, position: Position) -> tuple[int, int | None]:
    found = examine_tail(reader(data), len(data), HEADER, position)
    return found.torn_end, None if found.covering is None else found.covering.offset


def position_before(number: int) -> Position:
    """Where the scan stands when it has read so many frames."""
    scanner = scan(changed(DATA, [*OFFSETS, END][number], b"X"))
    assert len(list(scanner)) == number
    return scanner.position


def test_a_tail_of_zeros_has_nothing_torn() -> None:
    assert tail(DATA, position_before(4)) == (END, None)


def test_a_torn_tail_reaches_to_the_block_of_its_last_byte() -> None:
    assert tail(changed(DATA, END + 700, b"X"), position_before(4)) == (END + 2 * BLOCK, None)
    assert tail(DATA[: END + 5], position_before(4)) == (END, None)
    assert tail(DATA[:END] + b"XXXXX", position_before(4)) == (END + 5, None)


def test_the_last_frame_damaged_looks_torn() -> None:
    assert tail(changed(DATA, 6656, b"X"), position_before(3)) == (END, None)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_frame_that_a_later_one_calls_durable_is_not_torn(number: int) -> None:
    """The frame behind the next one, or the next one, was written after its sync."""
    damaged = changed(DATA, OFFSETS[number], bytes(BLOCK))
    assert tail(damaged, position_before(number))[1] == OFFSETS[number + 1]


def test_a_covering_frame_is_found_in_every_window() -> None:
    files = MemoryFiles()
    log = open_log(files, segment_size=8 * 1024 * 1024)
    append(log, bytes(900_000))
    append(log, bytes(2 * _scan.WINDOW))
    append(log, b"last")
    name = segments(files)[-1]
    data = files.read_file(LOG, name)
    header = decode_segment_header(data)
    position = start_of(header)
    last = log.active.position.offset - BLOCK
    damaged = changed(data, position.offset, bytes(FRAME_HEADER_SIZE))
    found = examine_tail(reader(damaged), len(damaged), header, position)
    assert found.covering is not None
    assert found.covering.offset == last
    assert last > _scan.WINDOW


@pytest.mark.parametrize("shift", [1, 63, 448, 511, 512, 9000])
def test_a_misplaced_frame_covers_too(shift: int) -> None:
    shifted = changed(DATA, 4608, b"X" * shift + DATA[4608:END])
    assert tail(shifted, position_before(1))[1] == 5120


def test_a_covering_frame_between_two_windows_is_found() -> None:
    (frame,) = (DATA[offset : offset + FRAME_HEADER_SIZE] for offset in OFFSETS[3:])
    for before in range(FRAME_HEADER_SIZE + 1):
        data = DATA[:4608].ljust(4608 + _scan.WINDOW - before, b"\1") + frame
        assert tail(data, position_before(1))[1] == 6656


def test_an_earlier_frame_covers_nothing() -> None:
    """A torn payload may hold a copy of every frame before it."""
    torn = changed(DATA, 6656, DATA[4096:6656] * 3)
    assert tail(torn, position_before(3))[1] is None


# -- footers and pointers ---------------------------------------------------------------------


def test_the_pointer_leads_to_the_footer_and_its_index() -> None:
    data = segment(*BATCHES, close=True)
    header = decode_segment_header(data)
    pointer, clean = _scan.read_pointer(reader(data), header)
    assert clean
    assert pointer is not None
    assert (pointer.kind, pointer.offset, pointer.last_lsn) == (Kind.CLOSE, END, 6)
    frame = _scan.frame_at(reader(data), header, pointer.offset)
    assert frame is not None
    assert frame.crc == pointer.crc
    assert _scan.read_footer(reader(data), frame) == Footer(6, 6, 4, ((1, 4096),))
    assert _scan.footer_index(reader(data), header, pointer) == ((1, 4096),)
    for offset, new in ((END + 70, b"X"), (END, b"X")):
        damaged = reader(changed(data, offset, new))
        assert _scan.footer_index(damaged, header, pointer) == (), "an index is only a help"


def test_an_open_segment_has_no_pointer() -> None:
    assert _scan.read_pointer(reader(DATA), HEADER) == (None, True)
    damaged = changed(DATA, POINTER_OFFSET + 511, b"X")
    assert _scan.read_pointer(reader(damaged), HEADER) == (None, False)
    assert _scan.footer_index(reader(DATA), HEADER, None) == ()


def test_the_first_frame_follows_the_segment_header() -> None:
    assert start_of(HEADER) == Position(DATA_OFFSET, 1, HEADER.digest, 0)
    other = SegmentHeader(HEADER.log_uuid, 1, 1, HEADER.salt, HEADER.created_us + 1, 0)
    scanner = FrameScanner(reader(DATA), other, start_of(other))
    assert list(scanner) == []
    assert scanner.reason == "the frame does not follow the one before it"
