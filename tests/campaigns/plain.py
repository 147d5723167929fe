"""The flat loop of `_disk.plain` against the scanner that it must agree with.

Law: a case is one segment, made of frames of all kinds, mostly plain ones, and mostly damaged
somewhere.  It is walked over twice: with the loop, with windows of drawn sizes, and frame by frame
with `FrameScanner` alone and a tally that is kept here, in other words.  Both must come to the same
place for the same reason, with the same counts, and say the same on the way.  On a segment without
damage the loop must take all plain frames itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import struct
from collections.abc import Callable, Iterator
from typing import Final
from unittest import mock

import attrs
from msgspec.structs import astuple

from trio_wal import _codec
from trio_wal._disk import plain, scan, walk, window
from trio_wal._disk.chain import FoundSegment
from trio_wal._disk.finding import Finding
from trio_wal._disk.frame import (
    BLOCK,
    DATA_OFFSET,
    FRAME_BODY_MAX,
    FRAME_HEADER_SIZE,
    FRAME_MAGIC,
    INDEX_STEP_MIN,
    TIME_US_MAX,
    Footer,
    FrameHeader,
    Kind,
    SegmentHeader,
    crc32c,
)
from trio_wal._disk.plain import follow_plain
from trio_wal._disk.scan import FrameScanner, Position, start_of
from trio_wal._disk.walk import Walk
from trio_wal._util import KiB, MiB

from . import _report
from ._forge import hostile
from ._promises import check

SHARE: Final = 200
"""Cases of one task for a worker process."""
HAS_ZSTD: Final = importlib.util.find_spec("zstandard") is not None
HEADER: Final = struct.Struct("<4sIQQqIBBHIIIIQ")
"""A frame's, in the words of docs/format."""
FIELDS: Final = (
    "first_lsn", "durable_lsn", "time_us", "count", "kind", "codec", "flags", "stored", "raw",
    "body_crc", "previous", "offset",
)  # fmt: skip
AS_FORGED: Final = {"flags": "kind", "stored": "stored_length", "raw": "raw_length"}
"""Fields that `_forge` knows by another name, or not."""


# -- a segment ----------------------------------------------------------------------


@attrs.define
class Made:
    """A segment's bytes, and what is known of them."""

    header: SegmentHeader
    data: bytearray = attrs.Factory(bytearray)
    plain: bool = True
    """Whether there is nothing but whole plain frames, and perhaps a mark at the end."""


def _table(rng: random.Random, count: int, longest: int) -> list[int]:
    if rng.random() < 0.6:
        return [rng.randrange(longest + 1)] * count
    return [rng.randrange(longest + 1) for _ in range(count)]


def _body(rng: random.Random, wrong: float = 0.0) -> tuple[int, bytes]:
    """So many records, and the bytes of a body that has them; ``wrong``: how many have not."""
    count = rng.choice((1, 1, 1, 2, 3, 7, 40))
    longest = rng.choice((0, 1, 20, 500, 500, 3000))
    lengths = _table(rng, count, longest)
    total = sum(lengths)
    if rng.random() < wrong:
        # The table says something else.
        lengths[rng.randrange(count)] = rng.choice((0, 1, 501, total))
    if rng.random() < wrong:
        total += rng.randrange(1, count + 1)
    return count, struct.pack(f"<{count}I", *lengths) + rng.randbytes(total)


class Maker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        first_lsn = rng.choice((1, 1, 500, 1 << 40))
        header = SegmentHeader(
            log_uuid=bytes(16),
            number=rng.randrange(1, 9),
            first_lsn=first_lsn,
            salt=rng.randbytes(16),
            created_us=0,
            previous=rng.getrandbits(32),
        )
        self.made = Made(header, bytearray(header.encode().ljust(DATA_OFFSET, b"\0")))
        self.next_lsn = first_lsn
        self.durable_lsn = first_lsn - 1
        self.previous = header.digest
        self.time_us = rng.choice((0, 1_700_000_000_000_000))
        self.behind = rng.random() < 0.3
        """Whether what frames call durable falls behind."""
        self.forged = rng.choice((0, 0, 0, 0.02, 0.1))
        """How many of the frames have a field that nobody would write."""
        self.odd = rng.choice((0, 0, 0.02, 0.2))
        """How many are not plain."""

    def make(self) -> Made:
        rng, made = self.rng, self.made
        if self.forged:
            made.plain = False
        for _ in range(rng.choice((0, 1, 2, 5, 12, 30))):
            if rng.random() < self.odd:
                made.plain = False
                rng.choice(self.oddities())()
            else:
                self.data(*_body(rng, self.forged))
        if rng.random() < 0.6:
            self.close(rng.choice((Kind.CLOSE, Kind.SEAL)))
        made.data += bytes(rng.choice((0, 0, 100, BLOCK, 5000)))
        return made

    def data(self, count: int, body: bytes, **fields: int) -> None:
        self.frame(body, count=count, **fields)

    def compressed(self) -> None:
        count, body = _body(self.rng)
        if HAS_ZSTD:
            (packed,), codec = _codec.compress([body])
            self.frame(packed, count=count, codec=int(codec), raw=len(body))

    def close(self, kind: Kind = Kind.CLOSE) -> None:
        records = self.next_lsn - self.made.header.first_lsn + (self.rng.random() < 0.1)
        self.frame(Footer(records, self.next_lsn - 1, 3, ((1, 4096),)).encode(), kind=int(kind))

    def oddities(self) -> list[Callable[[], None]]:
        return [
            *(self.close, self.compressed, self.hole, self.early),
            *(self.late, self.modest, self.huge, self.beyond),
        ]

    def late(self) -> None:
        """A frame of a time that no calendar has, or just has."""
        self.data(*_body(self.rng), time_us=TIME_US_MAX + self.rng.randrange(2))

    def modest(self) -> None:
        """A frame that calls less durable than the one before it did."""
        self.data(*_body(self.rng), durable_lsn=max(0, self.durable_lsn - self.rng.randrange(3)))

    def huge(self) -> None:
        """A frame whose body, which is not there, is as long as may be, or longer."""
        length = FRAME_BODY_MAX + self.rng.randrange(2)
        self.data(*_body(self.rng), stored=length, raw=length)

    def beyond(self) -> None:
        """A frame whose table is longer than its body."""
        self.frame(bytes(4 * self.rng.randrange(3)), count=self.rng.choice((3, 40)))

    def hole(self) -> None:
        self.made.data += bytes(BLOCK)

    def early(self) -> None:
        """A frame whose clock was put back."""
        self.data(*_body(self.rng), time_us=max(0, self.time_us - 5))

    def frame(self, body: bytes, **given: int) -> None:
        rng, made = self.rng, self.made
        self.time_us += rng.choice((0, 1, 1000))
        fields = {
            "first_lsn": self.next_lsn,
            "durable_lsn": self.durable_lsn,
            "time_us": self.time_us,
            "count": 0,
            "kind": int(Kind.DATA),
            "codec": 0,
            "flags": 0,
            "stored": len(body),
            "raw": len(body),
            "body_crc": crc32c(body),
            "previous": self.previous,
            "offset": len(made.data),
            **given,
        }
        end_lsn = self.next_lsn + fields["count"]
        if rng.random() < self.forged:
            name = rng.choice((*FIELDS, "durable_lsn", "time_us"))
            fields[name] = hostile(rng, AS_FORGED.get(name, name), fields[name])
            if name == "time_us":
                fields[name] %= 1 << 63
        seed = made.header.seed if rng.random() >= self.forged / 4 else rng.getrandbits(32)
        head = HEADER.pack(FRAME_MAGIC, 0, *(fields[name] for name in FIELDS))
        crc = crc32c(head[8:], seed)
        padding = -(FRAME_HEADER_SIZE + len(body)) % BLOCK
        dirt = padding and rng.random() < self.forged / 4
        made.data += head[:4] + crc.to_bytes(4, "little") + head[8:] + body
        made.data += rng.randbytes(padding) if dirt else bytes(padding)
        self.previous = crc
        if not self.behind:
            self.durable_lsn = end_lsn - 1
        elif rng.random() < 0.5:
            self.durable_lsn = rng.randrange(self.durable_lsn, end_lsn)
        self.next_lsn = end_lsn


def _flip(made: Made, rng: random.Random) -> None:
    data = made.data
    place = rng.randrange(DATA_OFFSET, len(data))
    if rng.random() < 0.5:
        # Headers are few bytes of all.
        place = place - place % BLOCK + rng.randrange(FRAME_HEADER_SIZE)
    if place < len(data):
        data[place] ^= 1 << rng.randrange(8)


def _cut(made: Made, rng: random.Random) -> None:
    del made.data[rng.randrange(DATA_OFFSET, len(made.data)) :]


def _zero(made: Made, rng: random.Random) -> None:
    start = rng.randrange(DATA_OFFSET, len(made.data)) // BLOCK * BLOCK
    end = min(len(made.data), start + BLOCK * rng.randrange(1, 9))
    made.data[start:end] = bytes(end - start)


def _swap(made: Made, rng: random.Random) -> None:
    """Two stretches of blocks in each other's place."""
    data = made.data
    one, other = (rng.randrange(DATA_OFFSET, len(data)) // BLOCK * BLOCK for _ in range(2))
    size = min(BLOCK * rng.randrange(1, 4), len(data) - max(one, other))
    data[one : one + size], data[other : other + size] = (
        data[other : other + size],
        data[one : one + size],
    )


def _again(made: Made, rng: random.Random) -> None:
    """A stretch of it stands once more at the end."""
    start = rng.randrange(DATA_OFFSET, len(made.data)) // BLOCK * BLOCK
    made.data += made.data[start : start + BLOCK * rng.randrange(1, 9)]


DAMAGES: Final[tuple[Callable[[Made, random.Random], None], ...]] = (
    _flip, _flip, _flip, _cut, _zero, _swap, _again,
)  # fmt: skip


def segment(rng: random.Random) -> Made:
    made = Maker(rng).make()
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 5))):
        if len(made.data) > DATA_OFFSET:
            made.plain = False
            rng.choice(DAMAGES)(made, rng)
    return made


# -- two walks ----------------------------------------------------------------------


@attrs.frozen
class Outcome:
    """All that a walk has come to."""

    end: Position
    reason: str
    last_kind: Kind | None
    came: bool
    frames: int
    records: int
    data_end: Position
    index: list[tuple[int, int]]
    unproven: list[tuple[int, int, tuple[int, int, int, int, int]]]
    findings: list[Finding]


@attrs.define
class Bytes:
    """A segment's bytes as a file."""

    data: bytes
    path: str = "wal"
    longest: int = 0
    """What was asked for at most."""

    def pread(self, length: int, offset: int) -> bytes:
        self.longest = max(self.longest, length)
        return self.data[offset : offset + length]

    def next_data(self, offset: int) -> int:
        return offset


def by_loop(file: Bytes, found: FoundSegment, until: FrameHeader | None) -> Outcome:
    """As opening and verifying walk."""
    findings: list[Finding] = []
    walk = Walk(file, found, findings.append)
    came = walk.follow(until)
    tally = walk.tally
    return Outcome(
        walk.end,
        walk.reason,
        walk.last_kind,
        came,
        tally.frames,
        tally.records,
        tally.data_end,
        tally.index,
        list(tally.unproven),
        findings,
    )


def by_scanner(file: Bytes, found: FoundSegment, until: FrameHeader | None, step: int) -> Outcome:
    """The same, frame by frame."""
    # It only says what `Walk` says of a frame whose checksums are good.
    findings: list[Finding] = []
    listener = Walk(file, found, findings.append)
    scanner = FrameScanner(file.pread, found.header, start_of(found.header), skim=True)
    here = data_end = scanner.position
    met: list[tuple[FrameHeader, int, Position]] = []
    index: list[tuple[int, int]] = []
    last_kind, proven = None, 0
    came = _is_at(here, until)
    for frame, body in scanner if not came else ():
        if listener._take(frame, body, here) and frame.kind is Kind.DATA:
            if not index or frame.offset - index[-1][1] >= step:
                index.append((frame.first_lsn, frame.offset))
            met.append((frame, len(met), data_end))
            data_end = scanner.position
        here, last_kind = scanner.position, frame.kind
        proven = max(proven, frame.durable_lsn)
        came = _is_at(here, until)
        if came or frame.kind is Kind.SEAL:
            break
    return Outcome(
        here,
        scanner.reason,
        last_kind,
        came,
        len(met),
        sum(frame.count for frame, _, _ in met),
        data_end,
        index,
        [
            (frame.next_lsn, number, astuple(before))
            for frame, number, before in met
            if frame.next_lsn - 1 > proven
        ],
        findings,
    )


def _is_at(here: Position, until: FrameHeader | None) -> bool:
    ends = here.next_lsn, here.previous
    return until is not None and ends == (until.first_lsn, until.previous)


# -- a case -------------------------------------------------------------------------


@contextlib.contextmanager
def sizes(rng: random.Random) -> Iterator[None]:
    """Windows of other sizes, so that a small segment has many edges."""
    apart = rng.choice((0, BLOCK, 2 * BLOCK, 64 * KiB))
    largest = rng.choice((2 * BLOCK, 8 * BLOCK, 1 * MiB))
    first = rng.choice((100, BLOCK, 5 * BLOCK, 16 * KiB))
    with (
        mock.patch.object(window, "APART", apart),
        mock.patch.object(plain, "APART", apart),
        mock.patch.object(plain, "WINDOW", largest),
        mock.patch.object(window, "FIRST_WINDOW", first),
        mock.patch.object(scan, "SKIM_WINDOW", rng.choice((first, 2 * BLOCK, 64 * KiB))),
    ):
        yield


def _compare(what: str, mine: object, theirs: object) -> None:
    check(mine == theirs, f"{what}: the loop has {mine}, the scanner {theirs}")


def run_case(seed: int) -> None:
    """Raises what is found."""
    rng = random.Random(seed)
    made = segment(rng)
    file = Bytes(bytes(made.data))
    found = FoundSegment(made.header, "wal", len(file.data), None, None)
    step = rng.choice((1, 2 * BLOCK, 3000, INDEX_STEP_MIN))
    frames = [frame for frame, _ in FrameScanner(file.pread, made.header, start_of(made.header))]
    until = rng.choice([None, None, *frames])
    theirs = by_scanner(file, found, until, step)
    with sizes(rng), mock.patch.object(walk, "index_step", return_value=step):
        _compare("a walk", by_loop(file, found, until), theirs)
        _without_bodies(file, made)
        if made.plain:
            _all_at_once(file, made, frames)


def _without_bodies(file: Bytes, made: Made) -> None:
    """Only headers are looked at, and the loop goes as far as it can each time."""
    start = start_of(made.header)
    one = FrameScanner(file.pread, made.header, start, bodies=False)
    for _ in one:
        pass
    other = FrameScanner(file.pread, made.header, start, bodies=False, skim=True)
    frames = iter(other)
    while follow_plain(other) or next(frames, None) is not None:
        pass
    _compare("headers", (other.position, other.reason), (one.position, one.reason))


def _all_at_once(file: Bytes, made: Made, frames: list[FrameHeader]) -> None:
    """Of what is sound the loop takes everything, and it reads no more at once than it may."""
    file.longest = 0
    scanner = FrameScanner(file.pread, made.header, start_of(made.header), skim=True)
    follow_plain(scanner)
    others = (
        frame.offset
        for frame in frames
        if frame.kind is not Kind.DATA or frame.end - frame.offset > plain.WINDOW
    )
    due = next(others, frames[-1].end if frames else DATA_OFFSET)
    check(scanner.position.offset == due, f"it stops at {scanner.position.offset}, not {due}")
    most = max(plain.WINDOW, window.FIRST_WINDOW, scan.SKIM_WINDOW) + 2 * BLOCK
    check(file.longest <= most, f"it has read {file.longest} bytes at once, not {most}")


def found_in(seed: int) -> str:
    return _report.found_in(run_case, seed)


# -- the campaign -------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replay", metavar="SEED", help="one case again")
    _report.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    return _report.run_seeds("plain", arguments, run_case, SHARE, "cases")


def replay(text: str) -> int:
    return _report.replay_seed(run_case, text)
