"""The flat loop over plain frames: it takes what the scanner takes, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from campaigns import plain as campaign
from campaigns.mutants import MUTANTS, PLAIN, Mutant, Task, judge_one
from hypothesis import given, settings, strategies as st
from logs import LOG, make_log, segments
from msgspec.structs import replace

from trio_wal import _codec
from trio_wal._disk import plain as _plain, walk, window as _window
from trio_wal._disk.chain import FoundSegment
from trio_wal._disk.frame import (
    BLOCK,
    DATA_OFFSET,
    FRAME_HEADER_SIZE,
    INDEX_STEP_MIN,
    SegmentHeader,
    decode_segment_header,
    encode_body,
    equal_table,
    has_equal_table,
)
from trio_wal._disk.plain import follow_plain
from trio_wal._disk.scan import FrameScanner, start_of
from trio_wal._util import align_up

BATCHES = [[b"one"], [b"two", b"", b"three"], [bytes(100)] * 7, [b"four"]]
SEEDED = [one for one in MUTANTS if one.judge == PLAIN]


def segment(*batches: list[bytes], close: bool = True) -> bytes:
    files = make_log(*batches, close=close, segment_size=16 * 1024)
    return files.read_file(LOG, segments(files)[-1])


def one_segment(*batches: list[bytes]) -> bytes:
    """However long it becomes."""
    maker = campaign.Maker(random.Random(1))
    maker.forged, maker.behind = 0, False
    for batch in batches:
        maker.data(len(batch), b"".join(encode_body(batch)))
    return bytes(maker.made.data)


DATA = segment(*BATCHES)
HEADER = decode_segment_header(DATA)
END = 7 * BLOCK + DATA_OFFSET
"""After the CLOSE frame."""


def scanner_of(data: bytes, *, bodies: bool = True) -> FrameScanner:
    file = campaign.Bytes(data)
    return FrameScanner(file.pread, HEADER, start_of(HEADER), bodies=bodies, skim=True)


def compare(data: bytes, header: SegmentHeader = HEADER) -> None:
    """Walk over a segment in both ways."""
    file = campaign.Bytes(data)
    found = FoundSegment(header, "wal", len(data), None, None)
    theirs = campaign.by_scanner(file, found, None, INDEX_STEP_MIN)
    assert campaign.by_loop(file, found, None) == theirs


def test_the_loop_takes_all_frames_with_records_and_leaves_the_mark_of_the_close() -> None:
    scanner = scanner_of(DATA)
    assert follow_plain(scanner)
    assert scanner.position.next_lsn == 13
    (mark, _), *others = scanner
    assert (mark.count, mark.end, others) == (0, scanner.position.offset, [])
    assert not follow_plain(scanner)


@pytest.mark.parametrize("bodies", [True, False])
def test_the_loop_stops_at_the_lsn_that_it_is_told(bodies: bool) -> None:
    for stop_lsn, due in ((1, 1), (2, 2), (3, 5), (5, 5), (12, 12), (100, 13)):
        scanner = scanner_of(DATA, bodies=bodies)
        assert follow_plain(scanner, None, stop_lsn) == (due > 1)
        assert scanner.position.next_lsn == due


def test_every_bit_of_a_log_that_has_flipped_is_judged_by_both_alike() -> None:
    compare(DATA)
    for place in range(DATA_OFFSET, END):
        for bit in range(8):
            data = bytearray(DATA)
            data[place] ^= 1 << bit
            compare(bytes(data))


def test_a_log_that_was_cut_anywhere_is_judged_by_both_alike() -> None:
    for length in range(DATA_OFFSET, END + 1):
        compare(DATA[:length])


def test_blocks_that_were_swapped_are_judged_by_both_alike() -> None:
    blocks = [DATA[at : at + BLOCK] for at in range(DATA_OFFSET, END, BLOCK)]
    for one in range(len(blocks)):
        for other in range(one):
            swapped = blocks.copy()
            swapped[one], swapped[other] = swapped[other], swapped[one]
            compare(DATA[:DATA_OFFSET] + b"".join(swapped))


def test_frames_of_another_salt_or_chain_are_judged_by_both_alike() -> None:
    for header in (
        replace(HEADER, salt=bytes(16)),
        replace(HEADER, number=HEADER.number + 1),
        replace(HEADER, first_lsn=2),
        replace(HEADER, previous=1),
    ):
        compare(DATA, header)


@pytest.mark.parametrize("record", [bytes(70_000), bytes(100_000), bytes(600_000)])
def test_large_frames_are_read_for_themselves(record: bytes) -> None:
    data = one_segment([record], [b"small"], [record, record])
    header = decode_segment_header(data)
    file = campaign.Bytes(data)
    scanner = FrameScanner(file.pread, header, start_of(header), skim=True)
    assert len(record) > _window.APART
    while follow_plain(scanner):
        pass
    all_of_it = 2 * len(record) < _plain.WINDOW
    assert scanner.position.next_lsn == header.first_lsn + (4 if all_of_it else 2)
    assert file.longest <= _plain.WINDOW
    compare(data, header)
    for place in (DATA_OFFSET + 64, DATA_OFFSET + 70_000, len(data) - 600):
        damaged = bytearray(data)
        damaged[place] ^= 1
        compare(bytes(damaged), header)


@pytest.mark.parametrize("length", [200, _window.APART + 2000, _plain.WINDOW + 2000])
def test_a_body_that_is_cut_short_is_none_whatever_its_checksum_says(length: int) -> None:
    """Its checksum is that of the part which is there, and no padding is due behind the rest."""
    for whole in (align_up(length, BLOCK), length):
        maker = campaign.Maker(random.Random(1))
        body = b"".join(encode_body([bytes(whole - FRAME_HEADER_SIZE - 4)]))
        maker.data(1, body[:100], stored=len(body), raw=len(body))
        made = maker.made
        data = bytes(made.data[: DATA_OFFSET + FRAME_HEADER_SIZE + 100])
        compare(data, made.header)
        file = campaign.Bytes(data)
        assert not follow_plain(FrameScanner(file.pread, made.header, start_of(made.header)))


def test_a_log_that_is_never_synced_is_plain() -> None:
    """Its frames call nothing durable, not even what stands before their segment."""
    maker = campaign.Maker(random.Random(1))
    maker.next_lsn += 100
    header = replace(maker.made.header, first_lsn=maker.next_lsn)
    maker.made.header, maker.previous = header, header.digest
    for durable_lsn in (0, 0, 7, 3):
        maker.data(1, b"".join(encode_body([b"record"])), durable_lsn=durable_lsn)
    data = header.encode().ljust(DATA_OFFSET, b"\0") + bytes(maker.made.data[DATA_OFFSET:])
    compare(data, header)
    scanner = FrameScanner(campaign.Bytes(data).pread, header, start_of(header), skim=True)
    assert follow_plain(scanner)
    assert scanner.position.next_lsn == header.first_lsn + 4
    assert scanner.position.durable_lsn == header.first_lsn - 1


def test_what_comes_after_small_frames_is_not_read_twice() -> None:
    data = one_segment(*([[b"small"], [bytes(100_000)]] * 40))
    header = decode_segment_header(data)
    asked: list[int] = []

    def read(length: int, offset: int) -> bytes:
        found = data[offset : offset + length]
        asked.append(len(found))
        return found

    scanner = FrameScanner(read, header, start_of(header), skim=True)
    assert follow_plain(scanner)
    assert scanner.position.offset == len(data)
    assert sum(asked) < 1.3 * len(data)


def test_nor_are_large_frames_that_are_not_plain() -> None:
    maker = campaign.Maker(random.Random(1))
    for time_us in range(20, 0, -1):
        maker.data(1, b"".join(encode_body([bytes(300_000)])), time_us=time_us)
    data = bytes(maker.made.data)
    asked: list[int] = []

    def read(length: int, offset: int) -> bytes:
        found = data[offset : offset + length]
        asked.append(len(found))
        return found

    header = maker.made.header
    assert len(list(FrameScanner(read, header, start_of(header), skim=True))) == 20
    assert sum(asked) < 1.1 * len(data)


def test_after_a_compressed_frame_the_loop_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zstandard")
    maker = campaign.Maker(random.Random(1))
    body = b"".join(encode_body([bytes(1000)]))
    (packed,), codec = _codec.compress([body])
    for _ in range(10):
        maker.frame(packed, count=1, codec=int(codec), raw=len(body))
    for _ in range(11):
        maker.data(1, body)
    tries: list[bool] = []

    def tried(*args: Any) -> bool:
        tries.append(follow_plain(*args))
        return tries[-1]

    monkeypatch.setattr(walk, "follow_plain", tried)
    data, header = bytes(maker.made.data), maker.made.header
    found = FoundSegment(header, "wal", len(data), None, None)
    outcome = campaign.by_loop(campaign.Bytes(data), found, None)
    assert (outcome.frames, outcome.reason) == (21, "")
    # At the beginning, after the first frame that was not compressed, and at the end.
    assert tries == [False, True, False]


def test_windows_hold_whole_frames_where_they_can() -> None:
    data = one_segment(*([bytes(3000)] for _ in range(200)))
    header = decode_segment_header(data)
    asked: list[tuple[int, int]] = []

    def read(length: int, offset: int) -> bytes:
        asked.append((length, offset))
        return data[offset : offset + length]

    scanner = FrameScanner(read, header, start_of(header), skim=True)
    assert follow_plain(scanner)
    frame = -(-(64 + 4 + 3000) // BLOCK) * BLOCK
    # But for the first, which is read before it is known how long a frame is.
    assert asked[1][1] == DATA_OFFSET + _window.FIRST_WINDOW // frame * frame
    assert len(asked) > 3
    for (length, offset), (_, following) in pairwise(asked[1:]):
        assert length % frame == 0
        assert following == min(offset + length, len(data))


@pytest.mark.parametrize(
    ("count", "length", "each"),
    [(1, 4, 0), (1, 9, 5), (3, 12, 0), (3, 18, 2), (3, 19, None), (3, 11, None), (3, 0, None)],
)
def test_a_table_of_equal_lengths_is_known_by_its_sum(
    count: int, length: int, each: int | None
) -> None:
    table = b"" if each is None else each.to_bytes(4, "little") * count
    assert equal_table(count, length) == table
    assert has_equal_table(table or bytes(length), count, length) == (each is not None)
    assert not has_equal_table(b"\1" * length, count, length)


def test_a_long_table_of_equal_lengths_is_compared_in_slices() -> None:
    count = 200_000
    table = (7).to_bytes(4, "little") * count
    assert has_equal_table(table, count, 11 * count)
    for place in (0, 4 * 65_536, 4 * 131_072 + 1, 4 * count - 1):
        other = bytearray(table)
        other[place] ^= 1
        assert not has_equal_table(bytes(other), count, 11 * count)
    assert not has_equal_table(table[:-4], count, 11 * count)


# -- the campaign -------------------------------------------------------------------


def seeds() -> Iterator[int]:
    yield from range(7 << 20, (7 << 20) + 400)


def test_a_share_of_the_campaign_finds_nothing() -> None:
    for seed in seeds():
        campaign.run_case(seed)


@settings(deadline=None)
@given(st.integers(min_value=0, max_value=(1 << 64) - 1))
def test_any_segment_is_judged_by_both_alike(seed: int) -> None:
    campaign.run_case(seed)


def test_the_campaign_makes_sound_segments_and_damaged_ones() -> None:
    made = [campaign.segment(random.Random(seed)) for seed in seeds()]
    sound = sum(one.plain for one in made)
    assert 40 < sound < len(made) - 100


def test_the_campaign_sees_a_loop_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "follow_plain", lambda *_: False)
    assert any("it stops at" in campaign.found_in(seed) for seed in seeds())


def test_there_are_enough_seeded_bugs() -> None:
    assert len(SEEDED) >= 20


@pytest.mark.parametrize("one", SEEDED[::7], ids=lambda one: one.name.replace(" ", "-"))
def test_a_seeded_bug_is_found(one: Mutant) -> None:
    verdict = judge_one(Task(one, (one.judge,), 1, 200.0))
    assert verdict.judge == one.judge
