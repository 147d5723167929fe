"""The bytes of the log: segment header, pointer, frame, log.meta; their checksums and limits.

Law: values in, bytes out, and back; no file is touched here.  Every byte that
this module writes is described in docs/format, and a test reads the worked
example there with nothing but `struct`.  Decoders take hostile bytes: they return
None (not one of ours) or raise `FrameError`, and believe no length before its
checksum.

Checksums are CRC-32C (Castagnoli; RFC 3720 appendix B.4).  A frame's checksum
starts from the salt and number of its segment and covers its own offset and the
checksum of the frame before it: stale, swapped, misplaced or copied frames fail.
"""

from __future__ import annotations

import enum
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from itertools import accumulate, pairwise
from typing import Final, cast

import msgspec

with warnings.catch_warnings():
    # Said below.
    warnings.filterwarnings("ignore", message="As the c extension", category=RuntimeWarning)
    import google_crc32c

from trio_wal._exceptions import UnsupportedFormatError
from trio_wal._identity import EPOCH_MAX, PARTINGS_MAX, History, Parting, epoch_of
from trio_wal._util import KiB, align_up

FORMAT_VERSION: Final = 1
BLOCK: Final = 512
"""Frames start at multiples of this: the unit in which disks tear.  A frame shares
no block with the frame before it, so writing it cannot tear what is durable."""
TERMINATOR_ALIGN: Final = 4 * KiB
"""A page of most page caches."""
DATA_OFFSET: Final = 4 * KiB
"""Where a segment's first frame starts: the header has a page of its own."""
POINTER_OFFSET: Final = BLOCK
FRAME_HEADER_SIZE: Final = 64
SEGMENT_HEADER_SIZE: Final = 128
FRAME_BODY_MAX: Final = 1 << 30
"""Bytes of one frame's body, stored or decompressed: what a reader may have to
hold at once.  `append_many` refuses a unit above it."""
BATCH_RECORDS_MAX: Final = 1 << 24
"""Records of one frame: a table of lengths costs a reader some hundred bytes a record."""
LSN_MAX: Final = 1 << 63
"""No log comes that far, and what follows still fits its field."""
START_MAX: Final = LSN_MAX // 2
"""Of a segment's number and first LSN: what is appended to it stays below `LSN_MAX`."""
INDEX_STEP_MIN: Final = 256 * KiB
INDEX_ENTRIES_MAX: Final = 256
"""A footer's index has an entry each max(256 KiB, capacity / 256)."""
FOOTER_BYTES_MAX: Final = 64 * KiB
"""Bytes of a footer, of which a reader takes 6 times as much memory.  A writer's has some 257
entries of 16 bytes, and one more for each session that a kill has ended; 4,094 fit."""

SEGMENT_MAGIC: Final = b"trio-wal"
META_MAGIC: Final = b"triowal\n"
FRAME_MAGIC: Final = b"TWF\x01"
POINTER_MAGIC: Final = b"TWP\x01"

FEATURE_ZSTD: Final = 1
"""Incompatible feature: frames of this log may be compressed with Zstandard (RFC 8878)."""
FEATURE_DATABASE: Final = 2
"""Incompatible feature: every record is a transaction of a database (see `_operations`)."""
FEATURE_REUSED: Final = 8
"""Incompatible feature, of a segment alone: behind its end stands a terminator, and behind that
whatever a dropped segment had left in the file."""
FEATURE_EPOCHS: Final = 16
"""Incompatible feature, of ``log.meta`` only: the log has a history of epochs, which whoever writes
that file anew must keep."""
FEATURE_CONSUMERS: Final = 32
"""Incompatible feature, of ``log.meta`` only: transactions of the database may move places of
consumers (`_operations.PLACED_FORMAT`), and its store may keep them."""
_META_FEATURES: Final = FEATURE_EPOCHS | FEATURE_CONSUMERS
FEATURES_KNOWN: Final = FEATURE_ZSTD | FEATURE_DATABASE
SEGMENT_FEATURES_KNOWN: Final = FEATURES_KNOWN | FEATURE_REUSED
_FEATURE_NAMES: Final = {
    FEATURE_ZSTD: "zstd",
    FEATURE_DATABASE: "database",
    FEATURE_REUSED: "reused",
    FEATURE_EPOCHS: "epochs",
    FEATURE_CONSUMERS: "consumers",
}

_CHECKED_SECTOR: Final = struct.Struct(f"<{BLOCK - 4}sI")
_SEGMENT: Final = struct.Struct("<8sHHIII16sQQ16sqIII")
_FRAME: Final = struct.Struct("<4sIQQqIBBHIIIIQ")
_POINTER: Final = struct.Struct("<4sIB7xQQQI")
_META: Final = struct.Struct("<8sHHI16sQQBBB5x16sQQIIQQII")
_PARTING: Final = struct.Struct("<QQ")
META_SIZE_MAX: Final = BLOCK + PARTINGS_MAX * _PARTING.size
"""Bytes of ``log.meta``."""
_FOOTER: Final = struct.Struct("<QQQ")
_SEED: Final = struct.Struct("<16sQ")

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
assert _FRAME.size == FRAME_HEADER_SIZE
assert _SEGMENT.size <= SEGMENT_HEADER_SIZE


class Kind(enum.IntEnum):
    DATA = 1
    SEAL = 2
    """The segment ends here and another follows."""
    CLOSE = 3
    """A clean close: everything before is durable.  Frames of a later session may follow."""


class Codec(enum.IntEnum):
    NONE = 0
    ZSTD = 1


class FrameError(ValueError):
    """The bytes are not a valid one of what was asked for; the text says why."""


if google_crc32c.implementation != "c":
    # In the words of who meets it; google-crc32c's own names neither this package nor a remedy.
    warnings.warn(
        "trio-wal: checksums are computed in Python, at some 3 MB per second, because "
        "google-crc32c has no C extension for this Python; with a C compiler: "
        "pip install --force-reinstall --no-binary google-crc32c google-crc32c",
        RuntimeWarning,
        stacklevel=2,
    )

extend_crc32c: Final = cast("Callable[[int, bytes], int]", google_crc32c.extend)  # pyright: ignore[reportUnknownMemberType]
"""``extend_crc32c(start, data)``: as `crc32c`, for a loop in which one more call counts."""


def crc32c(data: bytes, start: int = 0) -> int:
    """CRC-32C of ``data``, going on from ``start``."""
    return extend_crc32c(start, data)


def to_datetime(time_us: int) -> datetime:
    """UTC time from microseconds since 1970-01-01."""
    return _EPOCH + timedelta(microseconds=time_us)


TIME_US_MAX: Final = (datetime.max.replace(tzinfo=timezone.utc) - _EPOCH) // timedelta(
    microseconds=1
)


# -- segment header ---------------------------------------------------------------


def segment_name(first_lsn: int) -> str:
    return f"wal-{first_lsn:020d}.log"


def segment_name_lsn(name: str) -> int | None:
    """The first LSN in a segment's file name; None where it is no such name."""
    digits = name[4:-4]
    if name[:4] != "wal-" or name[-4:] != ".log" or len(digits) != 20:
        return None
    return int(digits) if digits.isascii() and digits.isdigit() else None


class SegmentHeader(msgspec.Struct, frozen=True):
    log_uuid: bytes
    number: int
    first_lsn: int
    salt: bytes
    created_us: int
    previous: int
    """Checksum of the last frame before this segment (of the previous segment's header
    where that is empty); 0 in the first segment of a log."""
    features: int = 0
    optional: int = 0
    """Bits of features that whoever does not know them passes over; none is known so far.  They
    are kept because `digest` covers them."""

    @property
    def name(self) -> str:
        return segment_name(self.first_lsn)

    @property
    def seed(self) -> int:
        """Where the checksums of this segment's frames start."""
        return crc32c(_SEED.pack(self.salt, self.number))

    @property
    def reused(self) -> bool:
        """Whether the file was a dropped segment's, and keeps its bytes behind the end."""
        return bool(self.features & FEATURE_REUSED)

    def encode(self) -> bytes:
        return _seal_sector(
            _SEGMENT.pack(
                SEGMENT_MAGIC,
                FORMAT_VERSION,
                SEGMENT_HEADER_SIZE,
                self.features,
                self.optional,
                0,
                self.log_uuid,
                self.number,
                self.first_lsn,
                self.salt,
                self.created_us,
                self.previous,
                DATA_OFFSET,
                BLOCK,
            )
        )

    @property
    def digest(self) -> int:
        """The checksum that the first frame names as its predecessor's."""
        return cast(int, _CHECKED_SECTOR.unpack(self.encode())[1])


def log_features(features: int) -> int:
    """Of those of a segment the ones that its log has."""
    return features & ~FEATURE_REUSED


def feature_names(features: int) -> tuple[str, ...]:
    """One for each bit: ``"zstd"``, or ``"bit 6"`` where it is not known."""
    bits = (1 << bit for bit in range(features.bit_length()) if features >> bit & 1)
    return tuple(_FEATURE_NAMES.get(bit, f"bit {bit.bit_length() - 1}") for bit in bits)


class UnsupportedVersion(FrameError):
    """Whole and ours, but of a version or with features that we do not know."""

    def __init__(self, version: int, reason: str, features: tuple[str, ...] = ()) -> None:
        error = UnsupportedFormatError("", version, reason, features)
        super().__init__(f"{error.what} is not supported")
        self.version = version
        self.features = features
        self.reason = reason

    def of(self, path: str) -> UnsupportedFormatError:
        """What to raise of the file in which it stands."""
        return UnsupportedFormatError(path, self.version, self.reason, self.features)


def unknown_features(features: int) -> UnsupportedVersion:
    return UnsupportedVersion(features, "feature set", feature_names(features))


def _seal_sector(fields: bytes) -> bytes:
    padded = fields.ljust(BLOCK - 4, b"\0")
    return _CHECKED_SECTOR.pack(padded, crc32c(padded))


def _open_sector(sector: bytes, magic: bytes, what: str) -> None:
    """Check what every version of a header keeps in place: magic, checksum, version."""
    if len(sector) < BLOCK:
        raise FrameError(f"{what} cut short: {len(sector)} of {BLOCK} bytes")
    padded, crc = _CHECKED_SECTOR.unpack(sector[:BLOCK])
    if padded[:8] != magic:
        raise FrameError(f"no {what}: it starts with {padded[:8]!r}")
    if crc32c(padded) != crc:
        raise FrameError(f"checksum of the {what} does not match")
    version = int.from_bytes(padded[8:10], "little")
    if version != FORMAT_VERSION:
        raise UnsupportedVersion(version, "format version")


def decode_segment_header(sector: bytes) -> SegmentHeader:
    """The header in a segment's first block.

    Raises:
      FrameError: it is not one; `UnsupportedVersion` where a newer trio-wal wrote it.
    """
    _open_sector(sector, SEGMENT_MAGIC, "segment header")
    _, _, size, features, optional, _, uuid, number, first_lsn, *rest = _SEGMENT.unpack_from(sector)
    salt, created, previous, data, block = rest
    if features & ~SEGMENT_FEATURES_KNOWN:
        raise unknown_features(features & ~SEGMENT_FEATURES_KNOWN)
    if (size, data, block) != (SEGMENT_HEADER_SIZE, DATA_OFFSET, BLOCK):
        raise FrameError("the segment header declares a different layout from version 1")
    if max(number, first_lsn) > START_MAX:
        raise FrameError(f"the segment header has the number {number} and LSN {first_lsn}")
    return SegmentHeader(
        log_uuid=uuid,
        number=number,
        first_lsn=first_lsn,
        salt=salt,
        created_us=created,
        previous=previous,
        features=features,
        optional=optional,
    )


# -- frames -----------------------------------------------------------------------


class FrameHeader(msgspec.Struct, frozen=True):
    kind: Kind
    offset: int
    first_lsn: int
    durable_lsn: int
    """The highest LSN whose sync had returned when this frame was written."""
    time_us: int
    count: int
    codec: Codec
    stored_length: int
    raw_length: int
    body_crc: int
    previous: int
    crc: int

    @property
    def next_lsn(self) -> int:
        return self.first_lsn + self.count

    @property
    def end(self) -> int:
        """Offset behind the frame and its padding: where the next one starts."""
        return self.offset + frame_size(self.stored_length)


def frame_size(stored_length: int) -> int:
    """Bytes in the file, padding included."""
    return align_up(FRAME_HEADER_SIZE + stored_length, BLOCK)


def terminator_end(offset: int, capacity: int) -> int:
    """Where the zeros end that a writer puts behind a frame which ends at ``offset``: a block of
    them or more, up to a page's end, so that no page need be read to be written in part."""
    return max(offset, min(align_up(offset + BLOCK, TERMINATOR_ALIGN), capacity))


def index_step(capacity: int) -> int:
    """Bytes of a segment between two entries of its footer's index."""
    return max(INDEX_STEP_MIN, -(-capacity // INDEX_ENTRIES_MAX))


def footer_reserve(capacity: int) -> int:
    """Room that a segment keeps free for a CLOSE and the SEAL frame."""
    return 2 * frame_size(_FOOTER.size + 16 * (capacity // index_step(capacity) + 1))


def encode_frame_header(header: FrameHeader, seed: int) -> bytes:
    """The 64 bytes; `header.crc` is ignored and computed."""
    fields = _FRAME.pack(
        FRAME_MAGIC,
        0,
        header.first_lsn,
        header.durable_lsn,
        header.time_us,
        header.count,
        header.kind,
        header.codec,
        0,
        header.stored_length,
        header.raw_length,
        header.body_crc,
        header.previous,
        header.offset,
    )[8:]
    return FRAME_MAGIC + crc32c(fields, seed).to_bytes(4, "little") + fields


def decode_frame_header(data: bytes, offset: int, seed: int) -> FrameHeader | None:
    """The frame header that starts ``data``, if it was written at ``offset`` of the
    segment that ``seed`` stands for; None for anything else."""
    if data[:4] != FRAME_MAGIC or len(data) < FRAME_HEADER_SIZE:
        return None
    (_, crc, first, durable, time_us, count, kind, codec, flags, stored, raw, body, prev, at) = (
        _FRAME.unpack(data[:FRAME_HEADER_SIZE])
    )
    if at != offset or crc32c(data[8:FRAME_HEADER_SIZE], seed) != crc:
        return None
    if flags or kind not in _KINDS or codec not in _CODECS or not 0 <= time_us <= TIME_US_MAX:
        return None
    longest = FRAME_BODY_MAX if kind == Kind.DATA else FOOTER_BYTES_MAX
    if max(stored, raw) > longest or durable >= first or (kind == Kind.DATA) != (count > 0):
        return None
    if count > BATCH_RECORDS_MAX or first > LSN_MAX:
        return None
    return FrameHeader(
        kind=_KINDS[kind],
        offset=at,
        first_lsn=first,
        durable_lsn=durable,
        time_us=time_us,
        count=count,
        codec=_CODECS[codec],
        stored_length=stored,
        raw_length=raw,
        body_crc=body,
        previous=prev,
        crc=crc,
    )


_KINDS: Final = {int(kind): kind for kind in Kind}
_CODECS: Final = {int(codec): codec for codec in Codec}
_JOIN_RECORDS: Final = 1 << 16
_TABLE_SLICE: Final = 1 << 16
"""Lengths that are taken out of a table at a time: as objects they are ten times as large."""
_GATHER_RECORDS: Final = 1000
"""Below the 1,024 pieces that one writev(2) takes."""
_GATHER_MEAN: Final = 4 * KiB


def encode_body(records: Sequence[bytes]) -> list[bytes]:
    """A table of lengths (``<u32`` each), then the payloads, as a few large pieces.

    The pieces of a unit of a million records are joined slice by slice: its memory
    is one copy of the payload.
    """
    count = len(records)
    table = struct.pack(f"<{count}I", *map(len, records))
    if count <= _GATHER_RECORDS and sum(map(len, records)) >= _GATHER_MEAN * count:
        # Large records: gathered by the write itself, not copied before it.
        return [table, *records]
    if count <= _JOIN_RECORDS:
        return [b"".join((table, *records))]
    return [
        table,
        *(b"".join(records[i : i + _JOIN_RECORDS]) for i in range(0, count, _JOIN_RECORDS)),
    ]


def decode_body(body: bytes, count: int) -> list[bytes]:
    """The payloads of a decompressed body.

    Raises:
      FrameError: the table does not add up to the body.
    """
    start = 4 * count
    records: list[bytes] = []
    append = records.append
    for lengths in check_table(body, count, len(body)):
        ends = accumulate(lengths, initial=start)
        next(ends)
        for end in ends:
            append(body[start:end])
            start = end
    return records


def check_table(body: bytes, count: int, length: int) -> Iterable[tuple[int, ...]]:
    """The table of lengths with which a body of ``length`` bytes begins, in slices.

    Raises:
      FrameError: it does not add up to the body.
    """
    if 4 * count > length:
        raise FrameError(f"a table of {count} lengths does not fit a body of {length} bytes")
    slices: Iterable[tuple[int, ...]]
    if count <= _TABLE_SLICE:
        slices = (struct.unpack_from(f"<{count}I", body),)
        total = 4 * count + sum(slices[0])
    else:
        slices = _table_slices(body, count)
        total = 4 * count + sum(map(sum, _table_slices(body, count)))
    if total != length:
        raise FrameError(f"the lengths add up to {total} bytes, the body has {length}")
    return slices


def equal_table(count: int, length: int) -> bytes:
    """The table of a body of ``length`` bytes whose records all have one length; b"" where there
    is none."""
    each, rest = divmod(length - 4 * count, count)
    return b"" if rest or each < 0 else struct.pack("<I", each) * count


def has_equal_table(body: bytes, count: int, length: int) -> bool:
    """Whether a body of ``length`` bytes begins with such a table, which need not be added up."""
    each, rest = divmod(length - 4 * count, max(1, count))
    if rest or each < 0:
        return False
    piece = struct.pack("<I", each) * min(count, _TABLE_SLICE)
    places = range(0, 4 * count, 4 * _TABLE_SLICE)
    return all(body.startswith(piece[: 4 * count - at], at) for at in places)


def _table_slices(body: bytes, count: int) -> Iterator[tuple[int, ...]]:
    for at in range(0, count, _TABLE_SLICE):
        yield struct.unpack_from(f"<{min(_TABLE_SLICE, count - at)}I", body, 4 * at)


class Footer(msgspec.Struct, frozen=True):
    """Body of a SEAL or CLOSE frame."""

    records: int
    """Records in this segment."""
    last_lsn: int
    frames: int
    """Data frames in this segment."""
    index: tuple[tuple[int, int], ...] = ()
    """(first LSN, offset) of some frames, ascending: where a read may start."""

    def encode(self) -> bytes:
        flat = [number for pair in self.index for number in pair]
        return _FOOTER.pack(self.records, self.last_lsn, self.frames) + struct.pack(
            f"<{len(flat)}Q", *flat
        )


def decode_footer(body: bytes) -> Footer:
    """Raises `FrameError` where the body is not a footer's."""
    if not _FOOTER.size <= len(body) <= FOOTER_BYTES_MAX or (len(body) - _FOOTER.size) % 16:
        raise FrameError(f"a footer cannot have {len(body)} bytes")
    flat = struct.unpack_from(f"<{(len(body) - _FOOTER.size) // 8}Q", body, _FOOTER.size)
    index = tuple(zip(flat[::2], flat[1::2], strict=True))
    if any(a >= b for a, b in pairwise(index)):
        raise FrameError("the footer's index is not ascending")
    records, last_lsn, frames = _FOOTER.unpack_from(body)
    return Footer(records, last_lsn, frames, index)


# -- pointer ----------------------------------------------------------------------


class Pointer(msgspec.Struct, frozen=True):
    """Second block of a segment: where its SEAL or last CLOSE frame is.

    Only a hint that saves scanning; zeros or a wrong checksum mean that there is none.
    """

    kind: Kind
    offset: int
    last_lsn: int
    crc: int
    """Checksum of that frame."""


def encode_pointer(pointer: Pointer, seed: int) -> bytes:
    fields = _POINTER.pack(
        POINTER_MAGIC, 0, pointer.kind, pointer.offset, pointer.last_lsn, 0, pointer.crc
    )
    crc = crc32c(fields[8:], seed)
    return (POINTER_MAGIC + crc.to_bytes(4, "little") + fields[8:]).ljust(BLOCK, b"\0")


def decode_pointer(data: bytes, seed: int) -> Pointer | None:
    if len(data) < _POINTER.size or data[:4] != POINTER_MAGIC:
        return None
    _, crc, kind, offset, last_lsn, _, frame_crc = _POINTER.unpack_from(data)
    if crc32c(data[8 : _POINTER.size], seed) != crc or kind not in (Kind.SEAL, Kind.CLOSE):
        return None
    return Pointer(_KINDS[kind], offset, last_lsn, frame_crc)


# -- log.meta ---------------------------------------------------------------------


class Truncation(msgspec.Struct, frozen=True):
    """A ``truncate_after`` that was decided and must be carried out.

    Segments above ``keep_number`` are dropped but for the one with ``salt``, the new
    end of the log; segment ``keep_number`` (none, where it is below the log's base) is
    sealed at ``offset``.
    """

    salt: bytes
    keep_number: int
    offset: int
    previous: int
    first_lsn: int
    """First LSN of the new last segment."""


class Meta(msgspec.Struct, frozen=True):
    """``log.meta``: which segment is the log's first, so that a missing one is noticed."""

    log_uuid: bytes
    base_number: int
    base_lsn: int
    features: int = 0
    """Of the segments."""
    live: bool = False
    """False until the first segment is durable: a crash before may be started over."""
    truncation: Truncation | None = None
    history: History = ()
    copied: bool = False
    """Whether this is a copy of another log that was not opened yet: then it gets an epoch."""
    consumers: bool = False
    """Whether the database's transactions may move places of consumers."""

    @property
    def epoch(self) -> int:
        return epoch_of(self.history)

    def encode(self) -> bytes:
        cut = self.truncation or Truncation(bytes(16), 0, 0, 0, 0)
        table = b"".join(_PARTING.pack(p.epoch, p.after_lsn) for p in self.history)
        own = FEATURE_EPOCHS if self.history or self.copied else 0
        if self.consumers:
            own |= FEATURE_CONSUMERS
        block = _seal_sector(
            _META.pack(
                META_MAGIC,
                FORMAT_VERSION,
                0,
                self.features | own,
                self.log_uuid,
                self.base_number,
                self.base_lsn,
                self.live,
                self.truncation is not None,
                self.copied,
                cut.salt,
                cut.keep_number,
                cut.offset,
                cut.previous,
                0,
                cut.first_lsn,
                0,
                len(self.history),
                crc32c(table),
            )
        )
        return block + table.ljust(align_up(len(table), BLOCK), b"\0")


def decode_meta(data: bytes) -> Meta:
    """The first `META_SIZE_MAX` bytes of the file.

    Raises:
      FrameError: as `decode_segment_header`.
    """
    _open_sector(data, META_MAGIC, "log.meta")
    (_, _, _, features, uuid, number, lsn, live, cut, copied, salt, *rest) = _META.unpack_from(data)
    keep, offset, previous, _, first, _, partings, table_crc = rest
    unknown = features & ~(FEATURES_KNOWN | _META_FEATURES)
    if unknown:
        raise unknown_features(unknown)
    if max(number, lsn) > START_MAX:
        raise FrameError(f"log.meta has the number {number} and LSN {lsn}")
    if not features & FEATURE_EPOCHS and (partings or copied):
        raise FrameError("log.meta has epochs, but does not say so")
    if features & FEATURE_CONSUMERS and not features & FEATURE_DATABASE:
        raise FrameError("log.meta says that transactions move consumers, in a log that has none")
    return Meta(
        log_uuid=uuid,
        base_number=number,
        base_lsn=lsn,
        features=features & ~_META_FEATURES,
        live=bool(live),
        truncation=Truncation(salt, keep, offset, previous, first) if cut else None,
        history=_decode_history(data, partings, table_crc),
        copied=bool(copied),
        consumers=bool(features & FEATURE_CONSUMERS),
    )


def _decode_history(data: bytes, count: int, crc: int) -> History:
    size = count * _PARTING.size
    if count > PARTINGS_MAX or len(data) < BLOCK + size:
        raise FrameError(f"log.meta declares {count} epochs and has {len(data)} bytes")
    table = data[BLOCK : BLOCK + size]
    if crc32c(table) != crc:
        raise FrameError("checksum of the epochs in log.meta does not match")
    history = tuple(Parting(*pair) for pair in _PARTING.iter_unpack(table))
    if any(a.epoch >= b.epoch for a, b in pairwise(history)):
        raise FrameError("the epochs in log.meta are not ascending")
    if history and max(history[-1].epoch, *(p.after_lsn for p in history)) > EPOCH_MAX // 2:
        raise FrameError("log.meta has an epoch, or its beginning, that no log comes to")
    return history
