"""Logs taken apart, changed, and put together again with every checksum right.

Law: what comes out passes every checksum but where that itself was changed; which values it
holds is anybody's choice.  A log that nobody has changed comes out as it went in.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import attrs
from logs import LOG, append, make_log, make_reused_log, open_log
from msgspec.structs import replace

from trio_wal._disk.chain import META_NAME, TRUNCATE_NAME
from trio_wal._disk.frame import (
    BATCH_RECORDS_MAX,
    BLOCK,
    DATA_OFFSET,
    FEATURE_DATABASE,
    FEATURE_ZSTD,
    FRAME_BODY_MAX,
    POINTER_OFFSET,
    FrameHeader,
    Kind,
    Meta,
    Pointer,
    SegmentHeader,
    Truncation,
    crc32c,
    decode_meta,
    decode_pointer,
    decode_segment_header,
    encode_body,
    encode_frame_header,
    encode_pointer,
    segment_name,
)
from trio_wal._disk.scan import FrameScanner, start_of
from trio_wal._operations import TRANSACTION_FORMAT, encode_transaction
from trio_wal._util import MiB
from trio_wal.testing import MemoryFiles

Contents = dict[str, bytes]
"""The files of a log's directory."""

BOMB_BYTES: Final = 16 * MiB
"""What a bomb of the random inputs decompresses to at most."""

WIDTHS: Final = {
    "number": 64, "first_lsn": 64, "previous": 32, "created_us": 63, "features": 32,
    "durable_lsn": 64, "time_us": 63, "count": 32, "stored_length": 32, "raw_length": 32,
    "body_crc": 32, "offset": 64, "last_lsn": 64, "crc": 32, "base_number": 64, "base_lsn": 64,
    "keep_number": 64, "kind": 8, "codec": 8,
}  # fmt: skip
"""Bits of each field."""

EDGES: Final = (
    0, 1, 2, 255, 256, BLOCK - 1, BLOCK, BLOCK + 1, DATA_OFFSET, 1 << 16, BATCH_RECORDS_MAX,
    BATCH_RECORDS_MAX + 1, FRAME_BODY_MAX - 1, FRAME_BODY_MAX, FRAME_BODY_MAX + 1, (1 << 31) - 1,
    1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1,
)  # fmt: skip


def hostile(rng: random.Random, field: str, value: int) -> int:
    """Another value of a field."""
    choice = rng.randrange(4)
    if choice == 0:
        new = value + rng.choice((-2, -1, 1, 2, BLOCK, -BLOCK))
    elif choice == 1:
        new = rng.choice(EDGES)
    elif choice == 2:
        new = rng.getrandbits(rng.randint(1, 64))
    else:
        new = value ^ (1 << rng.randrange(WIDTHS[field]))
    return new % (1 << WIDTHS[field])


# -- a log in parts -----------------------------------------------------------------


@attrs.define(eq=False)
class Frame:
    """What is ``None`` follows from the rest when the log is put together."""

    kind: int
    first_lsn: int
    durable_lsn: int
    time_us: int
    count: int
    codec: int
    body: bytes
    raw_length: int
    stored_length: int | None = None
    body_crc: int | None = None
    previous: int | None = None
    offset: int | None = None
    padding: bytes = b""
    """In place of the zeros."""


@attrs.define(eq=False)
class Segment:
    name: str
    header: SegmentHeader
    frames: list[Frame]
    pointer: Pointer | None
    points_to: int | None
    """Which frame the pointer tells of; None: as it stands."""
    rest: bytes
    """Behind the last frame."""
    follows: bool = True
    """Whether the header's ``previous`` is made to fit what stands before it."""


@attrs.define(eq=False)
class Log:
    meta: Meta
    segments: list[Segment]
    database: bool = False
    others: Contents = attrs.Factory(dict)

    def encode(self) -> Contents:
        contents = {META_NAME: self.meta.encode(), **self.others}
        previous = self.segments[0].header.previous if self.segments else 0
        for segment in self.segments:
            if segment.follows:
                segment.header = replace(segment.header, previous=previous)
            contents[segment.name], crc = _encode_segment(segment)
            if segment.name != TRUNCATE_NAME:
                previous = crc
        return contents


def _encode_segment(segment: Segment) -> tuple[bytes, int]:
    """Its bytes, and the checksum that the segment behind must name."""
    header = segment.header
    data = bytearray(header.encode().ljust(DATA_OFFSET, b"\0"))
    crc = following = header.digest
    pointer = segment.pointer
    for place, frame in enumerate(segment.frames):
        stored = len(frame.body) if frame.stored_length is None else frame.stored_length
        head = encode_frame_header(
            FrameHeader(
                kind=frame.kind,  # type: ignore[arg-type]
                offset=len(data) if frame.offset is None else frame.offset,
                first_lsn=frame.first_lsn,
                durable_lsn=frame.durable_lsn,
                time_us=frame.time_us,
                count=frame.count,
                codec=frame.codec,  # type: ignore[arg-type]
                stored_length=stored,
                raw_length=frame.raw_length,
                body_crc=crc32c(frame.body) if frame.body_crc is None else frame.body_crc,
                previous=crc if frame.previous is None else frame.previous,
                crc=0,
            ),
            header.seed,
        )
        crc = int.from_bytes(head[4:8], "little")
        if frame.kind != Kind.SEAL:
            following = crc
        if pointer is not None and segment.points_to == place:
            kind: Any = frame.kind
            pointer = replace(
                pointer,
                kind=kind,
                offset=len(data),
                last_lsn=(frame.first_lsn or 1) - 1,
                crc=crc,
            )
        data += head + frame.body + frame.padding
        data += bytes(-len(data) % BLOCK)
    if pointer is not None:
        data[POINTER_OFFSET : POINTER_OFFSET + BLOCK] = encode_pointer(pointer, header.seed)
    return bytes(data) + segment.rest, following


def take_apart(contents: Contents) -> Log:
    meta = decode_meta(contents[META_NAME])
    segments = []
    for name in sorted(contents, key=lambda name: (name == TRUNCATE_NAME, name)):
        if not name.startswith("wal-") and name != TRUNCATE_NAME:
            continue
        data = contents[name]
        header = decode_segment_header(data)
        pointer = decode_pointer(data[POINTER_OFFSET:], header.seed)
        scanner = FrameScanner(functools.partial(slice_of, data), header, start_of(header))
        frames: list[Frame] = []
        points_to = None
        for frame, body in scanner:
            if pointer is not None and pointer.crc == frame.crc:
                points_to = len(frames)
            frames.append(
                Frame(
                    frame.kind,
                    frame.first_lsn,
                    frame.durable_lsn,
                    frame.time_us,
                    frame.count,
                    frame.codec,
                    body,
                    frame.raw_length,
                )
            )
        rest = data[scanner.position.offset :]
        follows = name != TRUNCATE_NAME
        segments.append(Segment(name, header, frames, pointer, points_to, rest, follows))
    others = {
        name: data
        for name, data in contents.items()
        if name != META_NAME and name not in {segment.name for segment in segments}
    }
    return Log(meta, segments, bool(meta.features & FEATURE_DATABASE), others)


def slice_of(data: bytes, length: int, offset: int) -> bytes:
    return data[offset : offset + length]


# -- logs to begin with -------------------------------------------------------------

BATCHES: Final = ([b"first"], [b"second", b"", b"third"], [bytes(600)], [b"last", b"of all"])
TRANSACTIONS: Final[tuple[dict[bytes, bytes | None], ...]] = (
    {b"alice": b"10"},
    {b"bob": bytes(range(200)), b"alice": None},
    {b"carol": b"7", b"dave": b""},
)


def two_sessions(first: Sequence[list[bytes]], second: Sequence[list[bytes]]) -> MemoryFiles:
    files = make_log(*first)
    log = open_log(files)
    for batch in second:
        append(log, *batch)
    log.close()
    return files


def _dropped() -> MemoryFiles:
    files = make_log(*([b"%d" % n] for n in range(8)))
    log = open_log(files)
    log.drop_before(5)
    log.close()
    return files


def _cut() -> MemoryFiles:
    """Crashed when a ``truncate_after`` was decided and not yet carried out."""
    files = make_log(*([b"%d" % n] for n in range(6)))
    images: list[MemoryFiles] = []
    log = open_log(files)
    files.after_operation = lambda operation, path: images.append(files.crash_image(kind="kill"))
    log.truncate_after(2)
    return next(
        image for image in images if decode_meta(image.read_file(LOG, META_NAME)).truncation
    )


BASES: Final[dict[str, Callable[[], MemoryFiles]]] = {
    "closed": lambda: make_log(*BATCHES),
    "crashed": lambda: make_log(*BATCHES, close=False),
    "two sessions": lambda: two_sessions(BATCHES[:2], BATCHES[2:]),
    "dropped": _dropped,
    "cut": _cut,
    "one segment": lambda: make_log(*BATCHES, segment_size=16 * 1024),
    "reused": lambda: make_reused_log(
        *([b"%d" % n] for n in range(11)), close=False, segment_size=6 * 1024
    ),
    "database": lambda: make_log(
        *([encode_transaction(writes)] for writes in TRANSACTIONS), database=True
    ),
}
if importlib.util.find_spec("zstandard") is not None:
    BASES["compressed"] = lambda: make_log(*([b"text " * 40] for _ in range(4)), compression="zstd")


@functools.cache
def base(name: str) -> Contents:
    contents = BASES[name]().contents(LOG)
    assert take_apart(contents).encode() == contents, name
    return contents


# -- changing it --------------------------------------------------------------------


def mutated(rng: random.Random) -> tuple[Contents, bool]:
    """Files that claim to be a log, and whether they claim to be a database's."""
    log = take_apart(base(rng.choice(sorted(BASES))))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        rng.choice(MUTATIONS)(log, rng)
    database = log.database
    contents = log.encode()
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
        rng.choice(RAW)(contents, rng)
    return contents, database


def _with(values: Any, field: str, value: int) -> Any:
    return replace(values, **{field: value})


def _a_segment(log: Log, rng: random.Random) -> Segment | None:
    return rng.choice(log.segments) if log.segments else None


def _a_frame(log: Log, rng: random.Random) -> Frame | None:
    segment = _a_segment(log, rng)
    return rng.choice(segment.frames) if segment is not None and segment.frames else None


def _change_header(log: Log, rng: random.Random) -> None:
    segment = _a_segment(log, rng)
    if segment is None:
        return
    field = rng.choice(("number", "first_lsn", "previous", "created_us", "features"))
    value = hostile(rng, field, getattr(segment.header, field))
    if field == "features" and rng.random() < 0.7:
        value = rng.choice((0, FEATURE_ZSTD, FEATURE_DATABASE, FEATURE_ZSTD | FEATURE_DATABASE))
    if field == "previous":
        segment.follows = False
    before = segment.header.name
    segment.header = _with(segment.header, field, value)
    if segment.name == before and rng.random() < 0.8:
        segment.name = segment.header.name


def _shift_lsns(log: Log, rng: random.Random) -> None:
    """The same log, somewhere else among the numbers: all of it fits."""
    shift = hostile(rng, "first_lsn", 0)
    cut = log.meta.truncation
    log.meta = replace(
        log.meta,
        base_lsn=(log.meta.base_lsn + shift) % (1 << 64),
        truncation=cut and replace(cut, first_lsn=(cut.first_lsn + shift) % (1 << 64)),
    )
    for segment in log.segments:
        named = segment.name == segment.header.name
        lsn = (segment.header.first_lsn + shift) % (1 << 64)
        segment.header = replace(segment.header, first_lsn=lsn)
        segment.name = segment.header.name if named else segment.name
        for frame in segment.frames:
            frame.first_lsn = (frame.first_lsn + shift) % (1 << 64)
            frame.durable_lsn = (frame.durable_lsn + shift) % (1 << 64)


def _shift_numbers(log: Log, rng: random.Random) -> None:
    shift = hostile(rng, "number", 0)
    log.meta = replace(log.meta, base_number=(log.meta.base_number + shift) % (1 << 64))
    for segment in log.segments:
        number = (segment.header.number + shift) % (1 << 64)
        segment.header = replace(segment.header, number=number)


def _change_frame(log: Log, rng: random.Random) -> None:
    frame = _a_frame(log, rng)
    if frame is None:
        return
    fields = (
        "kind", "first_lsn", "durable_lsn", "time_us", "count", "codec", "raw_length",
        "stored_length", "body_crc", "previous", "offset",
    )  # fmt: skip
    field = rng.choice(fields)
    if field in ("kind", "codec"):
        value = rng.choice((0, 1, 2, 3, 255))
    else:
        value = hostile(rng, field, getattr(frame, field) or len(frame.body))
    setattr(frame, field, value)


def _change_body(log: Log, rng: random.Random) -> None:
    """Another body, of which the header tells the truth, or only nearly."""
    frame = _a_frame(log, rng)
    if frame is None:
        return
    choice = rng.randrange(5)
    if choice == 0:
        frame.body = rng.randbytes(rng.randrange(200))
    elif choice == 1:
        lengths = [hostile(rng, "count", n) for n in range(rng.randrange(6))]
        frame.body = struct.pack(f"<{len(lengths)}I", *lengths) + rng.randbytes(rng.randrange(50))
        frame.count = len(lengths)
    elif choice == 2:
        records = [rng.randbytes(rng.randrange(20)) for _ in range(rng.randrange(1, 9))]
        frame.body = b"".join(encode_body(records))
        frame.count = len(records) + rng.choice((0, 0, 0, 1, -1))
    elif choice == 3:
        _footer(frame, rng)
    else:
        frame.body = frame.body[: rng.randrange(len(frame.body) + 1)]
    frame.raw_length = max(0, len(frame.body) + rng.choice((0, 0, 0, 0, 1, -1)))


def _footer(frame: Frame, rng: random.Random) -> None:
    index = [hostile(rng, "offset", 4096 + 512 * n) for n in range(2 * rng.randrange(5))]
    if rng.random() < 0.5:
        index.sort()
    numbers = [hostile(rng, "last_lsn", n) for n in (3, frame.first_lsn - 1, 2)]
    if rng.random() < 0.5 and len(frame.body) >= 24:
        numbers = list(struct.unpack_from("<QQQ", frame.body))
    frame.body = struct.pack(f"<{3 + len(index)}Q", *numbers, *index)


def _bomb(log: Log, rng: random.Random) -> None:
    """Compressed bodies that hold more, or less, than they say."""
    frame = _a_frame(log, rng)
    if frame is None or "compressed" not in BASES:
        return
    zstandard = importlib.import_module("zstandard")
    size = rng.choice((0, 1, 4096, 1 * MiB, BOMB_BYTES if rng.random() < 0.05 else 1 * MiB))
    raw = struct.pack("<I", max(0, size - 4)) + bytes(size)
    raw = raw[:size]
    frame.count = rng.choice((1, 1, 1, min(size, 1 * MiB) // 4))
    frame.codec = 1
    frame.kind = Kind.DATA
    with_size = rng.random() < 0.7
    compressor: Any = zstandard.ZstdCompressor(level=1, write_content_size=with_size)
    frame.body = compressor.compress(raw)
    frame.raw_length = rng.choice((size, size, size, hostile(rng, "raw_length", size)))
    if rng.random() < 0.3:
        frame.body += rng.choice((frame.body, b"\0", rng.randbytes(20)))
    if rng.random() < 0.2 and frame.body:
        place = rng.randrange(len(frame.body))
        frame.body = frame.body[:place] + rng.randbytes(1) + frame.body[place + 1 :]
    log.meta = replace(log.meta, features=log.meta.features | FEATURE_ZSTD)


def _change_transaction(log: Log, rng: random.Random) -> None:
    """MessagePack that is none, or not of this shape."""
    frame = _a_frame(log, rng)
    if frame is None:
        return
    payloads = (
        TRANSACTION_FORMAT,
        b"",
        b"\x02\x80",
        TRANSACTION_FORMAT + b"\x80",
        TRANSACTION_FORMAT + b"\xdf\xff\xff\xff\xff",
        TRANSACTION_FORMAT + b"\x81\xc4\x00\xc0",
        TRANSACTION_FORMAT + b"\x81\xc5\x02\x00" + bytes(512) + b"\xc0",
        TRANSACTION_FORMAT + b"\x81\xc4\x01a\xc6\xff\xff\xff\xff",
        TRANSACTION_FORMAT + b"\x91" * 5000,
        TRANSACTION_FORMAT + b"\x81\xa1a\xa1b",
        TRANSACTION_FORMAT + rng.randbytes(rng.randrange(30)),
        encode_transaction({b"alice": b"1"}) + b"\0",
        encode_transaction({bytes([n]): None for n in range(200)}),
    )
    payload = rng.choice(payloads)
    frame.body = b"".join(encode_body([payload]))
    frame.raw_length, frame.count, frame.codec, frame.kind = len(frame.body), 1, 0, Kind.DATA


def _change_pointer(log: Log, rng: random.Random) -> None:
    segment = _a_segment(log, rng)
    if segment is None:
        return
    pointer = segment.pointer or Pointer(Kind.CLOSE, DATA_OFFSET, 1, 0)
    field = rng.choice(("offset", "last_lsn", "crc", "kind", "points"))
    if field == "points":
        segment.points_to = rng.randrange(len(segment.frames) + 1)
    elif field == "kind":
        pointer = replace(pointer, kind=rng.choice(list(Kind)))
    else:
        pointer = _with(pointer, field, hostile(rng, field, getattr(pointer, field)))
        segment.points_to = None
    segment.pointer = rng.choice((pointer, pointer, pointer, None))


def _change_meta(log: Log, rng: random.Random) -> None:
    meta = log.meta
    field = rng.choice(
        ("base_number", "base_lsn", "features", "live", "uuid", "cut", "cut", "uncut")
    )
    if field == "live":
        log.meta = replace(meta, live=not meta.live)
    elif field == "uuid":
        log.meta = replace(meta, log_uuid=rng.choice((bytes(16), rng.randbytes(16))))
    elif field == "uncut":
        log.meta = replace(meta, truncation=None)
    elif field == "cut":
        salts = [segment.header.salt for segment in log.segments]
        cut = meta.truncation or Truncation(
            rng.choice((bytes(16), *salts)),
            rng.randrange(5),
            rng.choice((4096, 4608, 5120)),
            0,
            rng.randrange(9),
        )
        name = rng.choice(("keep_number", "offset", "previous", "first_lsn"))
        value = hostile(rng, name, getattr(cut, name))
        log.meta = replace(meta, truncation=_with(cut, name, value))
    else:
        value = hostile(rng, field, getattr(meta, field))
        if field == "features" and rng.random() < 0.8:
            value = rng.randrange(4)
        log.meta = _with(meta, field, value)


def _move_frames(log: Log, rng: random.Random) -> None:
    segment, other = _a_segment(log, rng), _a_segment(log, rng)
    if segment is None or other is None or not segment.frames:
        return
    place = rng.randrange(len(segment.frames))
    frame = segment.frames[place]
    choice = rng.randrange(4)
    if choice == 0:
        del segment.frames[place]
    elif choice == 1:
        segment.frames.insert(rng.randrange(len(segment.frames)), attrs.evolve(frame))
    elif choice == 2:
        other.frames.insert(rng.randrange(len(other.frames) + 1), attrs.evolve(frame))
    else:
        rng.shuffle(segment.frames)


def _more_frames(log: Log, rng: random.Random) -> None:
    """Frames that go on behind the log's end."""
    segment = _a_segment(log, rng)
    if segment is None:
        return
    lsn = max((f.first_lsn + f.count for f in segment.frames), default=segment.header.first_lsn)
    for _ in range(rng.choice((1, 2, 20))):
        records = [rng.randbytes(rng.randrange(9)) for _ in range(rng.randrange(1, 4))]
        body = b"".join(encode_body(records))
        durable = rng.choice((lsn - 1, 0, hostile(rng, "durable_lsn", lsn)))
        frame = Frame(
            Kind.DATA, lsn % (1 << 64), durable % (1 << 64), 1, len(records), 0, body, len(body)
        )
        segment.frames.append(frame)
        lsn += len(records)


def _move_segments(log: Log, rng: random.Random) -> None:
    segment = _a_segment(log, rng)
    if segment is None:
        return
    choice = rng.randrange(5)
    if choice == 0:
        log.segments.remove(segment)
    elif choice == 1:
        segment.name = rng.choice(NAMES)
    elif choice == 2:
        name = rng.choice((TRUNCATE_NAME, segment_name(rng.randrange(20)), *NAMES))
        log.segments.append(attrs.evolve(segment, name=name))
    elif choice == 3:
        header = replace(segment.header, salt=rng.randbytes(16))
        log.segments.append(attrs.evolve(segment, name=TRUNCATE_NAME, header=header))
    else:
        other = rng.choice(log.segments)
        segment.name, other.name = other.name, segment.name


def _change_rest(log: Log, rng: random.Random) -> None:
    segment = _a_segment(log, rng)
    if segment is not None:
        segment.rest = rng.choice(
            (b"", bytes(rng.randrange(2000)), rng.randbytes(rng.randrange(2000)), segment.rest * 2)
        )


def _change_padding(log: Log, rng: random.Random) -> None:
    frame = _a_frame(log, rng)
    if frame is not None:
        frame.padding = rng.randbytes(rng.randrange(1, 600))


MUTATIONS: Final[tuple[Callable[[Log, random.Random], None], ...]] = (
    _change_header,
    _change_header,
    _shift_lsns,
    _shift_numbers,
    _change_frame,
    _change_frame,
    _change_frame,
    _change_body,
    _change_body,
    _bomb,
    _change_transaction,
    _change_pointer,
    _change_meta,
    _change_meta,
    _move_frames,
    _more_frames,
    _move_segments,
    _change_rest,
    _change_padding,
)

NAMES: Final = (
    "wal-", "wal-.log", "wal-1.log", "wal-0000000000000000000x.log", "wal-" + "9" * 20 + ".log",
    "wal-" + "1" * 21 + ".log", "wal-" + "\u0661" * 20 + ".log", "wal-+0000000000000000001.log",
    "wal-00000000000000000001.log\n", "wal-00000000000000000001.log.tmp", "wal-\udcff.log",
    "wal-..", "wal-0000000000000000000\udcff.log", "wal-" + "a" * 200,
    "wal-\x1b]0;x\x07\x1b[2J\nOK: 1 segment", "wal-\x9b31m\u202e\u2028.log",
)  # fmt: skip
"""Names that are not a segment's, or of one that cannot be."""


# -- without checksums --------------------------------------------------------------


def _a_file(contents: Contents, rng: random.Random) -> str | None:
    return rng.choice(sorted(contents)) if contents else None


def _flip(contents: Contents, rng: random.Random) -> None:
    name = _a_file(contents, rng)
    if name is not None and contents[name]:
        data = bytearray(contents[name])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        contents[name] = bytes(data)


def _resize(contents: Contents, rng: random.Random) -> None:
    name = _a_file(contents, rng)
    if name is not None:
        size = rng.choice((0, 1, 511, 512, 4095, 4096, rng.randrange(9000)))
        contents[name] = contents[name][:size].ljust(size, rng.choice((b"\0", b"x")))


def _remove(contents: Contents, rng: random.Random) -> None:
    name = _a_file(contents, rng)
    if name is not None:
        del contents[name]


def _splice(contents: Contents, rng: random.Random) -> None:
    """A stretch of one file over another."""
    source, target = _a_file(contents, rng), _a_file(contents, rng)
    if source is not None and target is not None:
        start, size = rng.randrange(16) * BLOCK, rng.randrange(1, 5) * BLOCK
        place = rng.randrange(16) * BLOCK
        piece, data = contents[source][start : start + size], contents[target]
        contents[target] = data[:place].ljust(place, b"\0") + piece + data[place + len(piece) :]


def _garbage(contents: Contents, rng: random.Random) -> None:
    name = rng.choice((META_NAME, TRUNCATE_NAME, segment_name(rng.randrange(9)), *NAMES))
    contents[name] = rng.randbytes(rng.choice((0, 64, 512, 4096, 6144)))


RAW: Final[tuple[Callable[[Contents, random.Random], None], ...]] = (
    _flip,
    _flip,
    _resize,
    _remove,
    _splice,
    _garbage,
)
