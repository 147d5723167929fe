"""A transaction <-> one record of the log.

Law: pure.  One transaction is one payload, so it is all there or not at all by
construction.  Format: a byte that says which format, then MessagePack
(https://msgpack.org) of a map from key to new value, nil where the key is deleted, in the
order of the transaction's first write to each key.  Where the transaction also moves places of
consumers, they stand before the map, as `_places` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import sub
from typing import Final, Literal, cast

import attrs
import msgspec

from ._disk.frame import FRAME_BODY_MAX
from ._exceptions import CorruptLogError, RecordTooLargeError
from ._exports import publish
from ._places import Move, Moves, PlacesError, decode_moves, encode_moves
from ._util import KiB, check_bytes, check_int

KEY_BYTES_MAX: Final = 511
"""LMDB's default limit: a longer key would be accepted and could never be checkpointed."""
TRANSACTION_FORMAT: Final = b"\x01"
PLACED_FORMAT: Final = b"\x02"
"""Of a transaction that moves places of consumers; only in logs that say so: see `Meta`."""
OPERATION_OVERHEAD: Final = 16
"""Upper bound of what the format adds to a key and a value."""

OPERATIONS_MAX: Final = (FRAME_BODY_MAX - 5) // (OPERATION_OVERHEAD + 1)
"""Keys of one transaction, 63,161,283: no writer can have more, because for each it counts
`OPERATION_OVERHEAD`, and a byte of key, against a limit that is that of a frame at most.  A
record may claim three times as many; each costs whoever replays it some 220 bytes."""
_OPERATION_BYTES_MIN: Final = 3
"""The head of a key, and nil: what cannot be there is not made room for."""
_ONE_PUT: Final = TRANSACTION_FORMAT + b"\x81"
PUT_OVERHEAD_MIN: Final = 6
"""Bytes of a transaction that puts one key, beside that and its value: the format's, the map's
and two for each of both."""
SHORT_MAX: Final = 255
"""Bytes of a key or value whose head has two; that of a longer one has at least one more."""

Writes = dict[bytes, "bytes | None"]

COPIED_BYTES: Final = 4 * KiB
"""Up to here."""
_FEW: Final = {
    TRANSACTION_FORMAT + bytes([0x80 | count]): 2 + count * _OPERATION_BYTES_MIN
    for count in range(16)
}
"""With what transactions of up to 15 keys begin, and the bytes that such a one has at least."""

_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(dict[bytes, bytes | None])
_run_decoder = msgspec.msgpack.Decoder(list[Literal[1] | dict[bytes, bytes]])


@attrs.frozen
class Operation:
    """What a transaction did to one key, in total."""

    key: bytes
    value: bytes | None
    """The new value, or None where the key was deleted."""


class OperationsError(ValueError):
    """The bytes are no transaction."""


def not_a_transaction(log: str, lsn: int, exc: OperationsError) -> CorruptLogError:
    """What whoever reads the log is told of a record that is none."""
    return CorruptLogError(log, 0, f"LSN {lsn}: {exc}")


def encode_transaction(writes: Writes) -> bytes:
    return TRANSACTION_FORMAT + _encode(writes)


def encode_placed_transaction(writes: Writes, moves: Moves) -> bytes:
    return PLACED_FORMAT + encode_moves(moves) + _encode(writes)


def moves_in(record: bytes) -> dict[str, Move] | None:
    """What a transaction does to the places of consumers; None: nothing.

    Raises `OperationsError`.
    """
    return _split(record)[0] if record[:1] == PLACED_FORMAT else None


def moves_places(record: bytes) -> bool:
    """Whether a transaction says anything of places."""
    return record[:1] == PLACED_FORMAT


def _split(record: bytes) -> tuple[dict[str, Move], int]:
    """The moves, and where the map begins."""
    if record[:1] != PLACED_FORMAT:
        raise OperationsError(f"a transaction does not start with {record[:1]!r}")
    try:
        return decode_moves(record, 1)
    except PlacesError as exc:
        raise OperationsError(f"no transaction: {exc}") from exc


def decode_transaction(record: bytes) -> Writes:
    """Raises `OperationsError`."""
    # Of few keys, which are most transactions, all that is asked for there.
    begin = 1
    size = len(record)
    least = _FEW.get(record[:2])
    if least is None or least > size:
        begin, _, _ = _count_operations(record)
    # A view costs more than a copy of what is small.
    body = record[begin:] if size <= COPIED_BYTES else memoryview(record)[begin:]
    try:
        writes = _decoder.decode(body)
    except msgspec.MsgspecError as exc:
        raise OperationsError(f"no transaction: {exc}") from exc
    for key in writes:
        if not 0 < len(key) <= KEY_BYTES_MAX:
            raise OperationsError(f"a transaction with a key of {len(key)} bytes")
    return writes


def decode_puts(records: Sequence[bytes]) -> tuple[list[bytes], list[bytes]] | None:
    """The keys and the values of transactions, at least one, that each put one key and do nothing
    else; None: one of them may be another, or none, which `decode_transaction` finds out.

    All are decoded in one call, as elements of one array: the byte of the format is the number 1
    there.  So an element might go on in the next record; but then another one is shorter than its
    own record, which it cannot be if that has no byte more than it needs.
    """
    if records[0][:2] != _ONE_PUT:
        return None
    count = len(records)
    head = b"\xdd" + (2 * count).to_bytes(4, "big")
    try:
        found = _run_decoder.decode(head + b"".join(records))
    except msgspec.MsgspecError:
        return None
    writes = cast("list[dict[bytes, bytes]]", found[1::2])
    try:
        if found[::2].count(1) != count or set(map(len, writes)) != {1}:
            return None
    except TypeError:
        # A number in the place of a map.
        return None
    keys = list(chain.from_iterable(writes))
    values = list(chain.from_iterable(map(dict[bytes, bytes].values, writes)))
    # Each element takes at least so much more than its key and value have, and one byte more for
    # a long value, and for a long key.  Where no record has more, each is just its element.
    sizes = list(map(len, values))
    heads = map(sub, map(sub, map(len, records), map(len, keys)), sizes)
    beyond = map(sub, heads, map(SHORT_MAX.__lt__, sizes))
    return (keys, values) if max(beyond) <= PUT_OVERHEAD_MIN and all(keys) else None


def _count_operations(record: bytes) -> tuple[int, int, int]:
    """Where a transaction's map begins, how many operations it says that it has, and where the
    first one starts.

    Raises `OperationsError`, also where there are more than a writer may have written.
    """
    begin = 1 if record[:1] == TRANSACTION_FORMAT else _split(record)[1]
    kind = record[begin : begin + 1]
    if kind and 0x80 <= kind[0] <= 0x8F:
        count, start = kind[0] & 0x0F, begin + 1
    elif kind in (b"\xde", b"\xdf"):
        start = begin + (3 if kind == b"\xde" else 5)
        count = int.from_bytes(record[begin + 1 : start], "big")
    else:
        raise OperationsError(f"no transaction: a map is due, not {kind!r}")
    if count > OPERATIONS_MAX:
        raise OperationsError(f"no transaction: {count:,} keys, over {OPERATIONS_MAX:,}")
    if count * _OPERATION_BYTES_MIN > len(record) - start:
        raise OperationsError(f"no transaction: {count:,} keys in {len(record):,} bytes")
    return begin, count, start


def operations_in(record: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """The operations of a transaction one by one, as they stand there, without taking memory
    for all of them.

    Raises `OperationsError`, which is all that `decode_transaction` would say.
    """
    _, count, at = _count_operations(record)
    for _ in range(count):
        key, at = _take_bytes(record, at)
        if key is None:
            raise OperationsError(f"no transaction: a key is nil, before byte {at}")
        if not 0 < len(key) <= KEY_BYTES_MAX:
            raise OperationsError(f"a transaction with a key of {len(key)} bytes")
        value, at = _take_bytes(record, at)
        yield key, value
    if at != len(record):
        raise OperationsError(f"no transaction: {len(record) - at} bytes after its end")


def _take_bytes(record: bytes, at: int) -> tuple[bytes | None, int]:
    """A ``bin`` or nil of MessagePack, and where it ends."""
    kind = record[at] if at < len(record) else -1
    if kind == _NIL:
        return None, at + 1
    width = _LENGTH_WIDTHS.get(kind)
    if width is None:
        raise OperationsError(f"no transaction: neither bytes nor nil at byte {at}")
    start = at + 1 + width
    end = start + int.from_bytes(record[at + 1 : start], "big")
    if end > len(record):
        raise OperationsError(f"no transaction: cut short at byte {at}")
    return record[start:end], end


_NIL: Final = 0xC0
_LENGTH_WIDTHS: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4}
"""Bytes of the length of a bin 8, bin 16 and bin 32."""


def check_key(key: object) -> bytes:
    """Raises `TypeError` or `ValueError` that names ``key``."""
    data = check_bytes("key", key)
    if not 0 < len(data) <= KEY_BYTES_MAX:
        raise ValueError(f"key must have 1 to {KEY_BYTES_MAX} bytes, not {len(data)}")
    return data


def check_range(
    start: bytes | None, stop: bytes | None, prefix: bytes | None, limit: int | None
) -> tuple[bytes | None, bytes | None]:
    """The (start, stop) of a scan's arguments."""
    if start is not None:
        start = check_bytes("start", start)
    if stop is not None:
        stop = check_bytes("stop", stop)
    if limit is not None:
        check_int("limit", limit, 0)
    if prefix is None:
        return start, stop
    prefix = check_bytes("prefix", prefix)
    if start is not None or stop is not None:
        raise ValueError("prefix cannot be combined with start or stop")
    trimmed = prefix.rstrip(b"\xff")
    end = trimmed[:-1] + bytes((trimmed[-1] + 1,)) if trimmed else None
    return prefix, end


def check_size(size: int, size_max: int) -> None:
    """Raises `RecordTooLargeError` where a transaction would not fit into a record."""
    if size > size_max:
        raise RecordTooLargeError(size, size_max)


publish(Operation)
