"""docs/format.md, read with nothing but `struct` and a checksum of this file's own.

The tables of the page decode its example; what they say must be what the page claims, what
the code writes, and what the code reads.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from trio_wal._disk.frame import (
    BLOCK,
    DATA_OFFSET,
    FORMAT_VERSION,
    FRAME_BODY_MAX,
    FRAME_HEADER_SIZE,
    POINTER_OFFSET,
    SEGMENT_HEADER_SIZE,
    Meta,
    SegmentHeader,
    decode_meta,
    decode_segment_header,
)
from trio_wal._disk.scan import FrameScanner, payloads, start_of
from trio_wal._disk.segment import ActiveSegment, Extent, encode
from trio_wal._identity import Parting
from trio_wal._system.files import OsFiles
from trio_wal.testing import MemoryFiles

PAGE = (Path(__file__).parent.parent / "docs" / "format.md").read_text("utf-8")


def crc32c(data: bytes, start: int = 0) -> int:
    """Bit by bit, as RFC 3720 describes it."""
    register = start ^ 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def section(title: str) -> str:
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the page has no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of the section's first table, without its head."""
    lines = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i64": "q"}


def table(title: str) -> list[tuple[int, str, str]]:
    """(offset, struct code, field)"""
    return [
        (int(offset), CODES.get(kind, kind), field)
        for offset, kind, field, _ in rows(section(title))
    ]


def decode(title: str, data: bytes) -> dict[str, int | bytes]:
    """The fields that a table of the page says stand in these bytes."""
    return {
        field: struct.unpack_from(f"<{code}", data, offset)[0]
        for offset, code, field in table(title)
    }


def dumps() -> list[bytes]:
    """The hexadecimal dumps of the page."""
    found = []
    for block in re.findall(r"^```text\n(00000000 .*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        data = b""
        for line in block.splitlines():
            if line == "*":
                continue
            offset, _, digits = line.partition("  ")
            data = data.ljust(int(offset, 16), b"\0") + bytes.fromhex(digits)
        found.append(data)
    return found


SEGMENT, META = dumps()
CLAIMS: dict[tuple[str, str], str] = {
    (part, field): value for part, field, value in rows(section("A worked example"))
}
UUID, SALT = bytes(range(16)), bytes(range(0xA0, 0xB0))


def claimed(part: str) -> dict[str, int | bytes]:
    """What the page says of a part of its example."""
    fields: dict[str, int | bytes] = {}
    for (of, field), value in CLAIMS.items():
        if of == part and field != "index":
            fields[field] = bytes.fromhex(value) if len(value) == 32 else int(value, 0)
    assert fields, part
    return fields


@pytest.mark.parametrize(
    "title", ["Segment header", "Frame header", "Footer", "Pointer", "log.meta", "History"]
)
def test_the_fields_of_a_table_stand_one_behind_the_other(title: str) -> None:
    end = 0
    for offset, code, field in table(title):
        assert offset >= end, field
        assert field == "checksum" or offset - end < 8, f"a gap before {field}"
        end = offset + struct.calcsize(f"<{code}")
    assert len({field for _, _, field in table(title)}) == len(table(title))


def test_the_example_has_what_the_page_says_of_it() -> None:
    seed = crc32c(SALT + struct.pack("<Q", 1))
    parts = {
        "segment header": decode("Segment header", SEGMENT),
        "seed": {"checksum of salt and number": seed},
        "frame at 4096": decode("Frame header", SEGMENT[4096:]),
        "frame at 4608": decode("Frame header", SEGMENT[4608:]),
        "footer at 4608": decode("Footer", SEGMENT[4608 + 64 :]),
        "pointer": decode("Pointer", SEGMENT[512:]),
        "log.meta": decode("log.meta", META),
    }
    assert {part for part, _ in CLAIMS} == set(parts)
    for part, fields in parts.items():
        assert claimed(part).items() <= fields.items(), part
    (pair,) = struct.iter_unpack("<QQ", SEGMENT[4608 + 64 + 24 : 4608 + 64 + 40])
    assert str(pair) == CLAIMS["footer at 4608", "index"]


def test_the_example_follows_the_rules_of_the_page() -> None:
    header = decode("Segment header", SEGMENT)
    assert (header["magic"], header["version"]) == (b"trio-wal", 1)
    assert header["checksum"] == crc32c(SEGMENT[:508])
    pointer = decode("Pointer", SEGMENT[512:])
    assert pointer["magic"] == b"TWP\x01"
    seed = crc32c(SALT + struct.pack("<Q", 1))
    assert pointer["checksum"] == crc32c(SEGMENT[512 + 8 : 512 + 44], seed)
    assert not any(SEGMENT[512 + 44 : 4096])
    offset, previous, lsn, durable, time = 4096, header["checksum"], 1, 0, header["created"]
    kinds, records = [], []
    while any(SEGMENT[offset:]):
        frame = decode("Frame header", SEGMENT[offset:])
        stored, count = frame["stored length"], frame["count"]
        assert isinstance(stored, int)
        assert isinstance(count, int)
        assert (frame["magic"], frame["offset"], frame["first LSN"]) == (b"TWF\x01", offset, lsn)
        assert frame["previous"] == previous
        assert frame["checksum"] == crc32c(SEGMENT[offset + 8 : offset + 64], seed)
        assert frame["durable LSN"] == durable
        assert frame["time"] >= time  # type: ignore[operator]
        body = SEGMENT[offset + 64 : offset + 64 + stored]
        assert frame["body checksum"] == crc32c(body)
        end = -(-(offset + 64 + stored) // 512) * 512
        assert not any(SEGMENT[offset + 64 + stored : end])
        kinds.append(frame["kind"])
        if frame["kind"] == 1:
            place = 4 * count
            for length in struct.unpack_from(f"<{count}I", body):
                records.append(body[place : place + length])
                place += length
            assert place == frame["raw length"]
        else:
            assert (pointer["offset"], pointer["frame checksum"]) == (offset, frame["checksum"])
            assert decode("Footer", body)["last LSN"] == pointer["last LSN"] == lsn - 1
        lsn += count
        offset, previous, durable, time = end, frame["checksum"], lsn - 1, frame["time"]
    assert (kinds, records) == ([1, 3], [b"hello", b"trio"])
    meta = decode("log.meta", META)
    assert (meta["magic"], meta["checksum"]) == (b"triowal\n", crc32c(META[:508]))
    assert meta["log UUID"] == header["log UUID"]


def test_the_code_writes_the_example() -> None:
    files = MemoryFiles()
    file = files.open_directory("/log", create=True).open("segment", create=True)
    header = SegmentHeader(UUID, 1, 1, SALT, 1_700_000_000_000_000, 0)
    file.pwrite([header.encode()], 0)
    file.allocate(len(SEGMENT))
    active = ActiveSegment(file, Extent.empty(header, len(SEGMENT)))
    active.write(encode([b"hello", b"trio"]), 0, 1_700_000_000_250_000)
    active.mark_closed()
    assert files.read_file("/log", "segment") == SEGMENT
    assert Meta(UUID, 1, 1, live=True).encode() == META


def test_the_code_reads_the_example() -> None:
    header = decode_segment_header(SEGMENT)
    scanner = FrameScanner(lambda n, at: SEGMENT[at : at + n], header, start_of(header))
    (frame, body), (close, _) = scanner
    assert payloads(frame, body) == [b"hello", b"trio"]
    assert (close.kind, scanner.reason) == (3, "")
    assert decode_meta(META) == Meta(UUID, 1, 1, live=True)


def test_the_code_writes_a_history_as_the_page_says() -> None:
    history = (Parting(0, 0), Parting(1 << 32 | 0xABCDEF, 1000))
    data = Meta(UUID, 1, 1, live=True, history=history, copied=True).encode()
    meta = decode("log.meta", data)
    assert (meta["features"], meta["copied"], meta["epochs"]) == (16, 1, 2)
    assert meta["checksum"] == crc32c(data[:508])
    assert meta["history checksum"] == crc32c(data[512 : 512 + 32])
    entries = [decode("History", data[512 + 16 * n :]) for n in range(2)]
    assert [(e["epoch"], e["parted after"]) for e in entries] == [
        (parting.epoch, parting.after_lsn) for parting in history
    ]
    assert len(data) == 1024
    assert not any(data[512 + 32 :])


def test_the_owners_word_is_written_as_the_page_says(tmp_path: Path) -> None:
    directory = OsFiles().open_directory(str(tmp_path))
    directory.lock()
    directory.sign()
    directory.publish(77, 1 << 32 | 5)
    data = (tmp_path / "lock").read_bytes()
    directory.close()
    word = decode("The owner's word", data)
    assert (word["durable LSN"], word["epoch"]) == (77, 1 << 32 | 5)
    assert word["durable LSN, inverted"] == 2**64 - 1 - 77
    assert word["checksum"] == crc32c(data[32:56])
    assert len(data) == 60


def test_the_numbers_in_the_text_are_those_of_the_code() -> None:
    header = decode("Segment header", SEGMENT)
    assert (header["version"], header["header size"]) == (FORMAT_VERSION, SEGMENT_HEADER_SIZE)
    assert (header["data offset"], header["block"]) == (DATA_OFFSET, BLOCK)
    assert (POINTER_OFFSET, FRAME_BODY_MAX) == (512, 2**30)
    last = table("Frame header")[-1]
    assert last[0] + struct.calcsize(last[1]) == FRAME_HEADER_SIZE


def test_every_flipped_bit_that_the_page_calls_checked_is_noticed_by_its_rules() -> None:
    """The checksum of this file, not the code's, over the frame at 4096."""
    seed = crc32c(SALT + struct.pack("<Q", 1))
    for place in range(8, 64):
        flipped = bytearray(SEGMENT[4096 : 4096 + 64])
        flipped[place] ^= 1 << place % 8
        assert (
            crc32c(bytes(flipped[8:]), seed) != decode("Frame header", bytes(flipped))["checksum"]
        )
