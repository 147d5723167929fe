"""A transaction <-> one record of the log.

Law: pure.  One transaction is one payload, so it is all there or not at all by
construction.  Format: a byte that says which format, then MessagePack
(https://msgpack.org) of a map from key to new value, nil where the key is deleted, in the
order of the transaction's first write to each key.
"""

from __future__ import annotations

from typing import Final

import attrs
import msgspec

from ._util import check_bytes

KEY_BYTES_MAX: Final = 511
"""LMDB's default limit: a longer key would be accepted and could never be checkpointed."""
TRANSACTION_FORMAT: Final = b"\x01"
OPERATION_OVERHEAD: Final = 16
"""Upper bound of what the format adds to a key and a value."""

Writes = dict[bytes, "bytes | None"]

_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(dict[bytes, bytes | None])


@attrs.frozen
class Operation:
    """What a transaction did to one key in the end."""

    key: bytes
    value: bytes | None
    """The new value, or None where the key was deleted."""


class OperationsError(ValueError):
    """The bytes are no transaction."""


def encode_transaction(writes: Writes) -> bytes:
    return TRANSACTION_FORMAT + _encode(writes)


def decode_transaction(record: bytes) -> Writes:
    """Raises `OperationsError`."""
    if record[:1] != TRANSACTION_FORMAT:
        raise OperationsError(f"a transaction does not start with {record[:1]!r}")
    try:
        writes = _decoder.decode(memoryview(record)[1:])
    except msgspec.MsgspecError as exc:
        raise OperationsError(f"no transaction: {exc}") from exc
    for key in writes:
        if not 0 < len(key) <= KEY_BYTES_MAX:
            raise OperationsError(f"a transaction with a key of {len(key)} bytes")
    return writes


def check_key(key: object) -> bytes:
    """Raises `TypeError` or `ValueError` that names ``key``."""
    data = check_bytes("key", key)
    if not 0 < len(data) <= KEY_BYTES_MAX:
        raise ValueError(f"key must have 1 to {KEY_BYTES_MAX} bytes, not {len(data)}")
    return data
