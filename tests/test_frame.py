"""The codec: what is written is read back, and nothing else is taken for it.

Fuzz rule: garbage is accepted or refused in the one documented way (None, or `FrameError`),
never with another exception.
"""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st
from msgspec.structs import replace

from trio_wal import _codec
from trio_wal._disk.frame import (
    BATCH_RECORDS_MAX,
    BLOCK,
    DATA_OFFSET,
    FOOTER_BYTES_MAX,
    FRAME_BODY_MAX,
    FRAME_HEADER_SIZE,
    INDEX_ENTRIES_MAX,
    LSN_MAX,
    START_MAX,
    TIME_US_MAX,
    Codec,
    Footer,
    FrameError,
    FrameHeader,
    Kind,
    Meta,
    Pointer,
    SegmentHeader,
    Truncation,
    UnsupportedVersion,
    crc32c,
    decode_body,
    decode_footer,
    decode_frame_header,
    decode_meta,
    decode_pointer,
    decode_segment_header,
    encode_body,
    encode_frame_header,
    encode_pointer,
    footer_reserve,
    frame_size,
    index_step,
    segment_name,
    segment_name_lsn,
    to_datetime,
)

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

UUID = bytes(range(16))
SALT = bytes(range(100, 116))
SEGMENT = SegmentHeader(UUID, 3, 17, SALT, 1_700_000_000_000_000, 0xDEADBEEF)
FRAME = FrameHeader(
    kind=Kind.DATA,
    offset=DATA_OFFSET,
    first_lsn=17,
    durable_lsn=16,
    time_us=1_700_000_000_000_000,
    count=2,
    codec=Codec.NONE,
    stored_length=13,
    raw_length=13,
    body_crc=0x12345678,
    previous=SEGMENT.digest,
    crc=0,
)

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
lsns = st.integers(0, START_MAX)
times = st.integers(0, TIME_US_MAX)
bytes16 = st.binary(min_size=16, max_size=16)

segment_headers = st.builds(
    SegmentHeader,
    log_uuid=bytes16,
    number=lsns,
    first_lsn=lsns,
    salt=bytes16,
    created_us=st.integers(-(2**63), 2**63 - 1),
    previous=u32,
    features=st.sampled_from([0, 1]),
)
metas = st.builds(
    Meta,
    log_uuid=bytes16,
    base_number=lsns,
    base_lsn=lsns,
    features=st.sampled_from([0, 1]),
    live=st.booleans(),
    truncation=st.none()
    | st.builds(
        Truncation,
        salt=bytes16,
        keep_number=u64,
        offset=u64,
        previous=u32,
        first_lsn=u64,
    ),
)
pointers = st.builds(
    Pointer,
    kind=st.sampled_from([Kind.SEAL, Kind.CLOSE]),
    offset=u64,
    last_lsn=u64,
    crc=u32,
)


@st.composite
def frame_headers(draw: st.DrawFn) -> FrameHeader:
    kind = draw(st.sampled_from(Kind))
    longest = FRAME_BODY_MAX if kind is Kind.DATA else FOOTER_BYTES_MAX
    first = draw(st.integers(1, LSN_MAX))
    return FrameHeader(
        kind=kind,
        offset=draw(st.integers(0, 2**40)) * BLOCK,
        first_lsn=first,
        durable_lsn=draw(st.integers(0, first - 1)),
        time_us=draw(times),
        count=draw(st.integers(1, BATCH_RECORDS_MAX)) if kind is Kind.DATA else 0,
        codec=draw(st.sampled_from(Codec)),
        stored_length=draw(st.integers(0, longest)),
        raw_length=draw(st.integers(0, longest)),
        body_crc=draw(u32),
        previous=draw(u32),
        crc=0,
    )


# -- checksums and names ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        # RFC 3720, appendix B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_checksums_are_the_crc32c_of_rfc_3720(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    assert crc32c(data[5:], crc32c(data[:5])) == expected


@pytest.mark.parametrize(
    ("lsn", "name"),
    [
        (1, "wal-00000000000000000001.log"),
        (12_345, "wal-00000000000000012345.log"),
        (2**64 - 1, "wal-18446744073709551615.log"),
    ],
)
def test_a_segment_is_named_after_its_first_lsn(lsn: int, name: str) -> None:
    assert segment_name(lsn) == name
    assert segment_name_lsn(name) == lsn


@pytest.mark.parametrize(
    "name",
    [
        "",
        "wal-.log",
        "wal-1.log",
        "wal-000000000000000000001.log",
        "wal-0000000000000000000x.log",
        "wal-" + 20 * "\u0661" + ".log",  # digits, but not ASCII
        "wal-+0000000000000000001.log",
        "wal-00000000000000000001.lo",
        "WAL-00000000000000000001.log",
        "wal-00000000000000000001.log.bak",
    ],
)
def test_other_names_are_no_segments(name: str) -> None:
    assert segment_name_lsn(name) is None


@given(u64)
def test_names_sort_as_their_lsns_do(lsn: int) -> None:
    assert (segment_name(lsn) < segment_name(17)) == (lsn < 17)


def test_times_are_utc_and_reach_to_the_end_of_datetime() -> None:
    assert to_datetime(0) == datetime(1970, 1, 1, tzinfo=timezone.utc)
    assert to_datetime(TIME_US_MAX) == datetime.max.replace(tzinfo=timezone.utc)


# -- segment header and log.meta ----------------------------------------------------------


@given(segment_headers)
def test_a_segment_header_is_read_as_it_was_written(header: SegmentHeader) -> None:
    sector = header.encode()
    assert len(sector) == BLOCK
    assert decode_segment_header(sector) == header
    assert decode_segment_header(sector + b"more") == header


@given(metas)
def test_log_meta_is_read_as_it_was_written(meta: Meta) -> None:
    sector = meta.encode()
    assert len(sector) == BLOCK
    assert decode_meta(sector) == meta


def resealed(sector: bytes, offset: int, field: bytes) -> bytes:
    """With a field replaced, and a checksum that fits."""
    fields = sector[:offset] + field + sector[offset + len(field) : BLOCK - 4]
    return fields + crc32c(fields).to_bytes(4, "little")


SECTORS: list[tuple[Any, bytes]] = [
    (decode_segment_header, SEGMENT.encode()),
    (decode_meta, Meta(UUID, 1, 1, live=True).encode()),
]


@pytest.mark.parametrize(("decode", "sector"), SECTORS)
def test_every_flipped_bit_of_a_header_is_noticed(decode: Any, sector: bytes) -> None:
    for bit in range(8 * BLOCK):
        flipped = bytearray(sector)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode(bytes(flipped))


@pytest.mark.parametrize(("decode", "sector"), SECTORS)
def test_a_header_cut_short_is_noticed_at_every_byte(decode: Any, sector: bytes) -> None:
    for length in range(BLOCK):
        with pytest.raises(FrameError, match=rf"^(segment header|log\.meta) cut short: {length} "):
            decode(sector[:length])


@pytest.mark.parametrize(("decode", "sector"), SECTORS)
@pytest.mark.parametrize("version", [0, 2, 65535])
def test_another_format_version_is_unsupported_and_not_damage(
    decode: Any, sector: bytes, version: int
) -> None:
    other = resealed(sector, 8, version.to_bytes(2, "little"))
    with pytest.raises(UnsupportedVersion, match=rf"^format version {version} is not supported$"):
        decode(other)


@pytest.mark.parametrize(("decode", "sector"), SECTORS)
def test_a_feature_that_is_not_known_is_unsupported_and_not_damage(
    decode: Any, sector: bytes
) -> None:
    # Features stand at offset 12 in both.
    other = resealed(sector, 12, (0b101).to_bytes(4, "little"))
    with pytest.raises(
        UnsupportedVersion, match=r"^feature set 4 \(bit 2\) is not supported$"
    ) as caught:
        decode(other)
    assert (caught.value.version, caught.value.features) == (4, ("bit 2",))


@pytest.mark.parametrize("number", [START_MAX + 1, 2**64 - 1])
def test_numbers_that_leave_no_room_for_what_follows_are_refused(number: int) -> None:
    for changes in ({"number": number}, {"first_lsn": number}):
        with pytest.raises(FrameError, match=r"^the segment header has the number \d+ and LSN"):
            decode_segment_header(replace(SEGMENT, **changes).encode())
    for changes in ({"base_number": number}, {"base_lsn": number}):
        meta = replace(Meta(bytes(16), 1, 1), **changes)
        with pytest.raises(FrameError, match=r"^log\.meta has the number \d+ and LSN"):
            decode_meta(meta.encode())


def test_a_header_of_another_layout_is_refused() -> None:
    with pytest.raises(FrameError, match=r"^the segment header declares a different layout"):
        decode_segment_header(resealed(SEGMENT.encode(), 10, (64).to_bytes(2, "little")))


def test_a_foreign_file_is_named_as_such() -> None:
    with pytest.raises(FrameError, match=r"^no segment header: it starts with b'\\x7fELF"):
        decode_segment_header(b"\x7fELF".ljust(BLOCK, b"\0"))
    with pytest.raises(FrameError, match=r"^no log\.meta: it starts with b'trio-wal'"):
        decode_meta(SEGMENT.encode())


# -- frames -------------------------------------------------------------------------------


@given(frame_headers(), u32)
def test_a_frame_header_is_read_as_it_was_written(header: FrameHeader, seed: int) -> None:
    data = encode_frame_header(header, seed)
    assert len(data) == FRAME_HEADER_SIZE
    decoded = decode_frame_header(data, header.offset, seed)
    assert decoded == replace(header, crc=int.from_bytes(data[4:8], "little"))
    assert decoded.next_lsn == header.first_lsn + header.count
    assert decoded.end % BLOCK == 0
    assert decoded.end - header.offset >= FRAME_HEADER_SIZE + header.stored_length


def test_every_flipped_bit_of_a_frame_header_is_noticed() -> None:
    data = encode_frame_header(FRAME, SEGMENT.seed)
    for bit in range(8 * FRAME_HEADER_SIZE):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        assert decode_frame_header(bytes(flipped), FRAME.offset, SEGMENT.seed) is None


def test_a_frame_is_valid_only_where_it_was_written() -> None:
    data = encode_frame_header(FRAME, SEGMENT.seed)
    assert decode_frame_header(data, FRAME.offset, SEGMENT.seed) is not None
    assert decode_frame_header(data, FRAME.offset + BLOCK, SEGMENT.seed) is None
    salted = replace(SEGMENT, salt=bytes(16))
    assert decode_frame_header(data, FRAME.offset, salted.seed) is None, "another incarnation"
    unsalted = encode_frame_header(FRAME, 0)
    assert decode_frame_header(unsalted, FRAME.offset, SEGMENT.seed) is None, "no salt at all"
    renumbered = replace(SEGMENT, number=4)
    assert decode_frame_header(data, FRAME.offset, renumbered.seed) is None, "another segment"


@pytest.mark.parametrize(
    ("offset", "field"),
    [
        (8, (0).to_bytes(8, "little")),  # first LSN at durable LSN
        (24, (-1).to_bytes(8, "little", signed=True)),  # before 1970
        (24, (TIME_US_MAX + 1).to_bytes(8, "little")),
        (32, bytes(4)),  # data without records
        (36, b"\0"),
        (36, b"\4"),  # no such kind
        (36, b"\3"),  # a CLOSE with records
        (37, b"\2"),  # no such codec
        (38, b"\1"),  # reserved
        (40, (FRAME_BODY_MAX + 1).to_bytes(4, "little")),
        (44, (FRAME_BODY_MAX + 1).to_bytes(4, "little")),
        (32, (BATCH_RECORDS_MAX + 1).to_bytes(4, "little")),
        (8, (LSN_MAX + 1).to_bytes(8, "little")),
    ],
)
def test_a_frame_header_with_an_impossible_field_is_none_even_if_its_checksum_fits(
    offset: int, field: bytes
) -> None:
    fields = bytearray(encode_frame_header(FRAME, SEGMENT.seed))
    fields[offset : offset + len(field)] = field
    fields[4:8] = crc32c(bytes(fields[8:]), SEGMENT.seed).to_bytes(4, "little")
    assert decode_frame_header(bytes(fields), FRAME.offset, SEGMENT.seed) is None


@given(st.binary(max_size=80), u64, u32)
@example(b"TWF\x01", 0, 0)
@example(b"TWF\x01" + bytes(60), 0, 0)
def test_garbage_is_no_frame_header(data: bytes, offset: int, seed: int) -> None:
    assert decode_frame_header(data, offset, seed) is None


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=50))
@example([b""])
@example([b"", b"", b""])
def test_records_are_read_as_they_were_written(records: list[bytes]) -> None:
    body = b"".join(encode_body(records))
    assert decode_body(body, len(records)) == records


@pytest.mark.parametrize("field", [40, 44])
@pytest.mark.parametrize("kind", [Kind.SEAL, Kind.CLOSE])
def test_a_footer_that_is_longer_than_any_writers_has_no_valid_header(
    kind: Kind, field: int
) -> None:
    """Its length is not believed, and nothing is read, or taken memory for."""
    fields = bytearray(encode_frame_header(replace(FRAME, kind=kind, count=0), SEGMENT.seed))
    for length, valid in ((FOOTER_BYTES_MAX, True), (FOOTER_BYTES_MAX + 1, False)):
        fields[40:48] = bytes(8)
        fields[field : field + 4] = length.to_bytes(4, "little")
        fields[4:8] = crc32c(bytes(fields[8:]), SEGMENT.seed).to_bytes(4, "little")
        found = decode_frame_header(bytes(fields), FRAME.offset, SEGMENT.seed)
        assert (found is not None) is valid


@pytest.mark.parametrize(
    "capacity", [1, 1 << 20, 64 << 20, (64 << 20) + 1, 1 << 30, 1 << 40, 1 << 62]
)
def test_no_writer_comes_near_the_longest_footer(capacity: int) -> None:
    # The first frame, and one for each step from there on: 16 times as many are allowed.
    entries = capacity // index_step(capacity) + 1
    assert entries <= INDEX_ENTRIES_MAX + 1
    longest = Footer(1, 1, 1, tuple((n, n) for n in range(15 * entries))).encode()
    assert len(longest) <= FOOTER_BYTES_MAX
    assert decode_footer(longest).encode() == longest


def test_a_table_is_taken_apart_in_slices_and_comes_out_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [bytes([n]) * (n % 7) for n in range(50)]
    body = b"".join(encode_body(records))
    for size in (1, 7, 49, 50, 51):
        monkeypatch.setattr("trio_wal._disk.frame._TABLE_SLICE", size)
        assert decode_body(body, len(records)) == records
        with pytest.raises(
            FrameError, match=r"^the lengths add up to \d+ bytes, the body has \d+$"
        ):
            decode_body(body + b"x", len(records))


def test_many_records_are_encoded_in_pieces_that_add_up() -> None:
    records = [b"%d" % n for n in range((1 << 16) + 1)]
    pieces = encode_body(records)
    assert len(pieces) == 3
    assert decode_body(b"".join(pieces), len(records)) == records


@pytest.mark.parametrize(
    ("body", "count", "reason"),
    [
        (b"", 1, "a table of 1 lengths does not fit a body of 0 bytes"),
        (bytes(7), 2, "a table of 2 lengths does not fit a body of 7 bytes"),
        (bytes(7), 2**32 - 1, "a table of 4294967295 lengths does not fit a body of 7 bytes"),
        (b"\1\0\0\0", 1, "the lengths add up to 5 bytes, the body has 4"),
        (b"\1\0\0\0ab", 1, "the lengths add up to 5 bytes, the body has 6"),
        (b"\xff\xff\xff\xff", 1, "the lengths add up to 4294967299 bytes, the body has 4"),
    ],
)
def test_a_table_of_lengths_must_add_up_to_the_body(body: bytes, count: int, reason: str) -> None:
    with pytest.raises(FrameError, match=f"^{reason}$"):
        decode_body(body, count)


@given(st.binary(max_size=100), u32)
def test_a_garbage_body_is_records_or_a_frame_error(body: bytes, count: int) -> None:
    try:
        records = decode_body(body, count)
    except FrameError:
        return
    assert b"".join(encode_body(records)) == body


# -- footers and pointers -------------------------------------------------------------------


@given(u64, u64, u64, st.lists(st.tuples(u64, u64), max_size=20))
def test_a_footer_is_read_as_it_was_written(
    records: int, last_lsn: int, frames: int, pairs: list[tuple[int, int]]
) -> None:
    index = tuple(sorted({lsn: (lsn, offset) for lsn, offset in pairs}.values()))
    footer = Footer(records, last_lsn, frames, index)
    assert decode_footer(footer.encode()) == footer


@given(st.binary(max_size=120))
def test_a_garbage_footer_is_a_footer_or_a_frame_error(body: bytes) -> None:
    try:
        footer = decode_footer(body)
    except FrameError:
        return
    assert footer.encode() == body


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (bytes(23), "a footer cannot have 23 bytes"),
        (bytes(32), "a footer cannot have 32 bytes"),
        (bytes(24 + 65536), "a footer cannot have 65560 bytes"),
        (Footer(1, 1, 1, ((5, 9), (5, 9))).encode(), "the footer's index is not ascending"),
        (Footer(1, 1, 1, ((5, 9), (4, 10))).encode(), "the footer's index is not ascending"),
    ],
)
def test_a_footer_of_another_shape_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(FrameError, match=f"^{reason}$"):
        decode_footer(body)


@given(st.integers(0, 1 << 40))
def test_a_segment_keeps_room_for_the_longest_footer_twice(capacity: int) -> None:
    entries = capacity // index_step(capacity) + 1
    assert entries <= INDEX_ENTRIES_MAX + 1
    longest = Footer(0, 0, 0, tuple((n, n) for n in range(entries))).encode()
    assert footer_reserve(capacity) == 2 * frame_size(len(longest))


@given(pointers, u32)
def test_a_pointer_is_read_as_it_was_written(pointer: Pointer, seed: int) -> None:
    block = encode_pointer(pointer, seed)
    assert len(block) == BLOCK
    assert decode_pointer(block, seed) == pointer
    assert decode_pointer(block, seed ^ 1) is None, "of another segment"


@given(st.binary(max_size=60), u32)
@example(b"TWP\x01" + bytes(44), 0)
@example(bytes(512), 0)
def test_garbage_is_no_pointer(block: bytes, seed: int) -> None:
    assert decode_pointer(block, seed) is None


def test_a_pointer_to_a_data_frame_is_none() -> None:
    fields = bytearray(encode_pointer(Pointer(Kind.SEAL, 4096, 9, 1), 7)[:48])
    fields[8] = Kind.DATA
    fields[4:8] = crc32c(bytes(fields[8:]), 7).to_bytes(4, "little")
    assert decode_pointer(bytes(fields), 7) is None


def test_every_flipped_bit_of_a_pointer_is_noticed() -> None:
    block = encode_pointer(Pointer(Kind.CLOSE, 4608, 9, 0xABCDEF), SEGMENT.seed)
    used = struct.calcsize("<4sIB7xQQQI")
    for bit in range(8 * used):
        flipped = bytearray(block)
        flipped[bit // 8] ^= 1 << bit % 8
        assert decode_pointer(bytes(flipped), SEGMENT.seed) is None


# -- compression ------------------------------------------------------------------------------


@given(st.binary(max_size=2000))
@example(bytes(100_000))
def test_a_compressed_body_is_read_as_it_was_written(body: bytes) -> None:
    pieces, codec = _codec.compress([body])
    if codec is Codec.NONE:
        assert pieces == [body]
    else:
        assert sum(map(len, pieces)) < len(body)
        assert _codec.decompress(b"".join(pieces), len(body)) == body


@given(st.binary(max_size=200), st.integers(0, 300))
def test_a_garbage_compressed_body_is_a_frame_error(body: bytes, raw_length: int) -> None:
    with contextlib.suppress(FrameError):
        assert len(_codec.decompress(body, raw_length)) == raw_length


@pytest.mark.parametrize(
    ("raw_length", "reason"),
    [
        (FRAME_BODY_MAX + 1, "declares 1073741825 bytes decompressed, over 1073741824"),
        (99_999, "compressed body declares 100000 bytes, its frame 99999"),
        (100_001, "compressed body declares 100000 bytes, its frame 100001"),
    ],
)
def test_a_decompression_bomb_is_refused_before_it_is_opened(raw_length: int, reason: str) -> None:
    (packed,), _ = _codec.compress([bytes(100_000)])
    with pytest.raises(FrameError, match=f"^{reason}$"):
        _codec.decompress(packed, raw_length)


def test_a_compressed_body_cut_short_is_a_frame_error_at_every_byte() -> None:
    body = bytes(range(256)) * 8
    (packed,), _ = _codec.compress([body])
    for length in range(len(packed)):
        with pytest.raises(FrameError):
            _codec.decompress(packed[:length], len(body))


def test_without_a_checksum_in_c_it_is_said_once_and_by_name() -> None:
    code = """
import sys, warnings
sys.modules["google_crc32c.cext"] = None  # as where there is no wheel and no compiler
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import trio_wal
    import trio_wal.testing
    assert not caught  # nothing of the log is loaded
    trio_wal.open_wal
    from trio_wal import open_reader, open_database
assert trio_wal._disk.frame.crc32c(b"123456789") == 0xE3069283
print([(warning.category.__name__, str(warning.message)[:29]) for warning in caught])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[('RuntimeWarning', 'trio-wal: checksums are compu')]\n"
