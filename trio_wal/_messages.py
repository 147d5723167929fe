"""The messages of a replicated log: their names, and the frames in them.

Law: values in, bytes out, and back; pure.  Messages come from servers: decoders raise `FrameError`
for anything that was not written so, and believe no length before its checksum.

A batch is one frame as it stands on disk (`_disk.frame`), cut into as many messages as it takes.
``offset`` is the position of its first message.  Checksums start from the log's uuid and the epoch,
and each covers that of the message before, so that they are one chain over all epochs: another
history, as a replica that has gone astray may hold one, does not fit.

Three kinds:

  epoch   SEAL.  Begins an epoch, whose number is its position.  Whoever writes it need know nothing
          of what comes before, so it is not chained to that; what follows is chained to both.
  data    DATA.  Records.
  mark    CLOSE.  Written first in each epoch, before messages are dropped, and on an orderly close:
          the log's next LSN and its history, for when what they were known by is gone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, cast
from uuid import UUID

import attrs

from ._disk.frame import (
    FRAME_HEADER_SIZE,
    Codec,
    FrameError,
    FrameHeader,
    Kind,
    crc32c,
    decode_body,
    decode_frame_header,
    encode_body,
    encode_frame_header,
)
from ._identity import EPOCH_MAX, PARTINGS_MAX, History, Parting

HEADER: Final = "Trio-Wal"
"""The header of a message under which its ident stands, where messages have headers."""
UNCHAINED: Final = 0
"""The chain before a log's first message."""

_DATA_IDENT: Final = re.compile(
    r"(\d{1,19})\.([0-9a-f]{16})\.(\d{1,19})\.(\d{1,7})\.(\d{1,19})\.(\d{1,19})\.([0-9a-f]{32})",
    re.ASCII,
)
_EPOCH_IDENT: Final = re.compile(r"E\.([0-9a-f]{16})\.([0-9a-f]{32})", re.ASCII)


@attrs.frozen
class Ident:
    """The name of a batch: the same for all of its pieces, and no two batches have the same."""

    epoch: int
    writer: str
    """Sixteen hexadecimal digits, made anew at each open."""
    batch: int
    """Counted by its writer."""
    pieces: int
    last_lsn: int
    """The newest record, this batch included."""
    mark: int
    """The position of the newest mark."""
    uuid: UUID

    def __str__(self) -> str:
        return (
            f"{self.epoch}.{self.writer}.{self.batch}.{self.pieces}.{self.last_lsn}.{self.mark}."
            f"{self.uuid.hex}"
        )


def epoch_ident(writer: str, uuid: UUID) -> str:
    return f"E.{writer}.{uuid.hex}"


def is_epoch(ident: str) -> bool:
    return ident.startswith("E.")


def parse_ident(text: str, uuid: UUID) -> Ident | None:
    """The name of a batch; None: that of an epoch.

    Raises:
      FrameError: it is neither, or of another log.
    """
    if found := _EPOCH_IDENT.fullmatch(text):
        _check_uuid(found[2], uuid)
        return None
    found = _DATA_IDENT.fullmatch(text)
    if found is None:
        raise FrameError(f"this message is none of trio-wal's: it is called {text[:80]!r}")
    _check_uuid(found[7], uuid)
    epoch, writer, batch, pieces, last_lsn, mark = found.groups()[:6]
    return Ident(int(epoch), writer, int(batch), int(pieces), int(last_lsn), int(mark), uuid)


def _check_uuid(found: str, uuid: UUID) -> None:
    if found != uuid.hex:
        raise FrameError(f"this message is of another log, {UUID(found)}, not of {uuid}")


def seed(uuid: UUID, epoch: int) -> int:
    """Where the checksums of an epoch's frames start."""
    return crc32c(epoch.to_bytes(8, "little"), crc32c(uuid.bytes))


def chain_epoch(chain: int, crc: int) -> int:
    """The chain behind an epoch record: what comes after it covers what comes before it."""
    return crc32c(crc.to_bytes(4, "little"), chain)


@attrs.frozen
class Encoded:
    """A frame, as it is sent."""

    data: bytes
    crc: int

    def pieces(self, bytes_max: int) -> list[bytes]:
        data = self.data
        if len(data) <= bytes_max:
            return [data]
        return [data[at : at + bytes_max] for at in range(0, len(data), bytes_max)]


@attrs.frozen
class Frame:
    """A frame, as it was read and found to be whole."""

    header: FrameHeader
    body: bytes

    def records(self) -> list[bytes]:
        """Raises `FrameError`."""
        return decode_body(self.body, self.header.count)


def _encode(
    kind: Kind,
    body: list[bytes],
    *,
    count: int,
    position: int,
    seed: int,
    first_lsn: int,
    time_us: int,
    previous: int,
) -> Encoded:
    crc = size = 0
    for piece in body:
        crc = crc32c(piece, crc)
        size += len(piece)
    header = FrameHeader(
        kind=kind,
        offset=position,
        first_lsn=first_lsn,
        durable_lsn=first_lsn - 1,
        time_us=time_us,
        count=count,
        codec=Codec.NONE,
        stored_length=size,
        raw_length=size,
        body_crc=crc,
        previous=previous,
        crc=0,
    )
    head = encode_frame_header(header, seed)
    return Encoded(b"".join((head, *body)), int.from_bytes(head[4:8], "little"))


def encode_batch(
    records: Sequence[bytes],
    *,
    position: int,
    seed: int,
    first_lsn: int,
    time_us: int,
    previous: int,
) -> Encoded:
    return _encode(
        Kind.DATA,
        encode_body(records),
        count=len(records),
        position=position,
        seed=seed,
        first_lsn=first_lsn,
        time_us=time_us,
        previous=previous,
    )


@attrs.frozen
class Mark:
    """What a mark says."""

    history: History
    closed: bool
    """Whether the log was closed in order with it."""


def encode_mark(
    mark: Mark, *, position: int, seed: int, next_lsn: int, time_us: int, previous: int
) -> Encoded:
    content = {
        "history": [[parting.epoch, parting.after_lsn] for parting in mark.history],
        "closed": mark.closed,
    }
    return _encode(
        Kind.CLOSE,
        [json.dumps(content).encode()],
        count=0,
        position=position,
        seed=seed,
        first_lsn=next_lsn,
        time_us=time_us,
        previous=previous,
    )


def encode_epoch(owner: str, *, position: int, uuid: UUID, time_us: int) -> Encoded:
    """
    Args:
      owner: who begins it; for people.
    """
    return _encode(
        Kind.SEAL,
        [json.dumps({"owner": owner}).encode()],
        count=0,
        position=position,
        seed=seed(uuid, position),
        first_lsn=1,
        time_us=time_us,
        previous=0,
    )


def decode_frame(data: bytes, position: int, seed: int) -> Frame:
    """A frame from all of its pieces, joined.

    Raises:
      FrameError: it is damaged, or was not written at this position in this epoch.
    """
    header = decode_frame_header(data, position, seed)
    if header is None:
        raise FrameError("no frame of this log, epoch and position stands here")
    if header.codec is not Codec.NONE or header.stored_length != len(data) - FRAME_HEADER_SIZE:
        raise FrameError(f"the frame declares {header.stored_length} bytes and has {len(data)}")
    body = data[FRAME_HEADER_SIZE:]
    if crc32c(body) != header.body_crc:
        raise FrameError("checksum of the frame's body does not match")
    return Frame(header, body)


def _content(frame: Frame) -> dict[str, Any]:
    try:
        content: Any = json.loads(frame.body)
    except ValueError as exc:
        raise FrameError(f"a body that is not JSON: {exc}") from None
    if not isinstance(content, dict):
        raise FrameError("a body that is not a JSON object")
    return cast("dict[str, Any]", content)


def decode_mark(frame: Frame) -> Mark:
    """Raises `FrameError`."""
    if frame.header.kind is not Kind.CLOSE:
        raise FrameError("no mark stands here")
    content = _content(frame)
    try:
        history = tuple(Parting(int(epoch), int(lsn)) for epoch, lsn in content["history"])
        closed = bool(content["closed"])
    except (KeyError, TypeError, ValueError) as exc:
        raise FrameError(f"a mark without its history: {exc!r}") from None
    if len(history) > PARTINGS_MAX or any(a.epoch >= b.epoch for a, b in pairwise(history)):
        raise FrameError("the epochs in a mark are not ascending")
    if any(not 0 <= p.after_lsn <= EPOCH_MAX or not 0 <= p.epoch <= EPOCH_MAX for p in history):
        raise FrameError("a mark has an epoch, or its beginning, that no log comes to")
    return Mark(history, closed)


def decode_owner(data: bytes, position: int, uuid: UUID) -> str:
    """Who has begun an epoch, in words.  Raises `FrameError`."""
    frame = decode_frame(data, position, seed(uuid, position))
    if frame.header.kind is not Kind.SEAL:
        raise FrameError("no epoch begins here")
    return str(_content(frame).get("owner", "unknown"))


def next_history(history: History, epoch: int, after_lsn: int) -> History:
    """The history with one more epoch."""
    known = history or (Parting(0, 0),)
    return (*known, Parting(epoch, after_lsn))[-PARTINGS_MAX:]
