"""A transaction <-> one record: what goes in comes out, and anything else is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from trio_wal._disk.frame import FRAME_BODY_MAX
from trio_wal._operations import (
    KEY_BYTES_MAX,
    OPERATION_OVERHEAD,
    OPERATIONS_MAX,
    TRANSACTION_FORMAT,
    OperationsError,
    check_key,
    decode_puts,
    decode_transaction,
    encode_transaction,
    operations_in,
)

keys = st.binary(min_size=1, max_size=KEY_BYTES_MAX)
writes = st.dictionaries(keys, st.none() | st.binary(max_size=300), max_size=30)


@settings(max_examples=200, deadline=None)
@given(writes)
def test_a_transaction_survives_the_record(transaction: dict[bytes, bytes | None]) -> None:
    record = encode_transaction(transaction)
    assert decode_transaction(record) == transaction
    # The order of first writes too.
    assert list(decode_transaction(record)) == list(transaction)


@settings(max_examples=200, deadline=None)
@given(writes)
def test_a_record_is_never_larger_than_what_put_reckoned(
    transaction: dict[bytes, bytes | None],
) -> None:
    reckoned = 1 + sum(
        OPERATION_OVERHEAD + len(key) + len(value or b"") for key, value in transaction.items()
    )
    assert len(encode_transaction(transaction)) <= reckoned + (not transaction)


def test_the_reckoning_holds_for_the_largest_headers_too() -> None:
    many = {b"%d" % n: None for n in range(70_000)}
    large = {b"k" * KEY_BYTES_MAX: bytes(70_000)}
    for transaction in (many, large):
        reckoned = 1 + sum(
            OPERATION_OVERHEAD + len(key) + len(value or b"") for key, value in transaction.items()
        )
        assert len(encode_transaction(transaction)) <= reckoned


@settings(max_examples=200, deadline=None)
@given(writes)
def test_operations_are_the_same_one_by_one(transaction: dict[bytes, bytes | None]) -> None:
    record = encode_transaction(transaction)
    assert list(operations_in(record)) == list(transaction.items())


def test_operations_are_the_same_one_by_one_with_large_headers() -> None:
    for transaction in (
        {b"%d" % n: None for n in range(70_000)},
        {b"k" * n: bytes(70_000 * n) for n in (1, 300, KEY_BYTES_MAX)},
    ):
        record = encode_transaction(transaction)
        assert list(operations_in(record)) == list(transaction.items())


@settings(max_examples=500, deadline=None)
@given(writes, st.integers(0), st.binary(min_size=1, max_size=3))
def test_one_by_one_nothing_is_taken_for_a_transaction_that_is_none(
    transaction: dict[bytes, bytes | None], place: int, change: bytes
) -> None:
    record = bytearray(encode_transaction(transaction))
    place %= len(record)
    record[place : place + len(change)] = change
    try:
        found = decode_transaction(bytes(record))
    except OperationsError:
        with pytest.raises(OperationsError):
            list(operations_in(bytes(record)))
    else:
        # A key that is there twice counts as the last one says.
        assert dict(operations_in(bytes(record))) == found


def test_no_more_operations_are_believed_than_a_writer_can_have_written() -> None:
    # What a transaction counts for each key, against the largest limit that there is.
    assert OPERATIONS_MAX * (OPERATION_OVERHEAD + 1) + 1 <= FRAME_BODY_MAX - 4
    for count in (OPERATIONS_MAX + 1, 2**32 - 1):
        record = b"\x01\xdf" + count.to_bytes(4, "big")
        for decode in (decode_transaction, lambda data: list(operations_in(data))):
            with pytest.raises(OperationsError, match=rf"^no transaction: {count:,} keys, over 6"):
                decode(record)
    for head in (b"\x8f", b"\xde\xff\xff", b"\xdf\0\x01\0\0"):
        with pytest.raises(OperationsError, match=r"^no transaction: [\d,]+ keys in \d+ bytes$"):
            decode_transaction(b"\x01" + head + bytes(40))


def test_the_format_stays_as_it_is() -> None:
    """What is in people's logs: a format byte, then a MessagePack map of bin to bin or nil."""
    record = b"\x01\x83\xc4\x01a\xc4\x0210\xc4\x01b\xc0\xc4\x01c\xc4\x00"
    transaction = {b"a": b"10", b"b": None, b"c": b""}
    assert encode_transaction(transaction) == record
    assert decode_transaction(record) == transaction


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"", "a transaction does not start with b''$"),
        (b"\x03\x80", r"a transaction does not start with b'\\x03'$"),
        (b"\x01", "no transaction: "),
        (b"\x01\x81", "no transaction: "),
        (b"\x01\x80\x00", "no transaction: "),
        (b"\x01\x90", "no transaction: "),
        (b"\x01\x81\xa1a\xc4\x01b", "no transaction: "),
        (b"\x01\x81\xc4\x01a\x01", "no transaction: "),
        (b"\x01\xdf\xff\xff\xff\xff", "no transaction: "),
        (b"\x01\x81\xc4\x00\xc0", "a transaction with a key of 0 bytes$"),
        (TRANSACTION_FORMAT + msgspec.msgpack.encode({b"k" * 512: b""}), "a .* key of 512 bytes$"),
    ],
)
def test_what_is_no_transaction_is_refused(record: bytes, message: str) -> None:
    with pytest.raises(OperationsError, match=f"^{message}"):
        decode_transaction(record)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_transaction_or_refused(record: bytes) -> None:
    try:
        decoded = decode_transaction(TRANSACTION_FORMAT + record)
    except OperationsError:
        return
    assert decode_transaction(encode_transaction(decoded)) == decoded


puts = st.dictionaries(
    keys | st.binary(min_size=1, max_size=3),
    st.binary(max_size=3) | st.binary(max_size=300),
    min_size=1,
    max_size=1,
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(puts | writes, min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0), st.integers(-3, 3)), max_size=3),
    st.tuples(st.integers(0), st.binary(max_size=2)),
)
def test_puts_decoded_together_are_what_they_are_one_by_one(
    transactions: list[dict[bytes, bytes | None]],
    moved: list[tuple[int, int]],
    change: tuple[int, bytes],
) -> None:
    """Whatever is changed in them, and wherever one ends and the next one begins."""
    records = list(map(encode_transaction, transactions))
    for number, by in moved:
        place = number % len(records)
        both = records[place - 1] + records[place]
        cut = min(max(len(records[place - 1]) + by, 0), len(both))
        records[place - 1], records[place] = both[:cut], both[cut:]
    number, changed = change
    place = number % len(records)
    record = records[place]
    at = number // len(records) % (len(record) + 1)
    records[place] = record[:at] + changed + record[at + len(changed) :]
    found = decode_puts(records)
    if found is not None:
        assert [{key: value} for key, value in zip(*found, strict=True)] == [
            decode_transaction(record) for record in records
        ]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=255), st.binary(max_size=300)), min_size=1)
)
def test_the_usual_puts_are_decoded_together(pairs: list[tuple[bytes, bytes]]) -> None:
    for chosen in (
        [(key, value[:255]) for key, value in pairs],
        [(key, value + bytes(256)) for key, value in pairs],
        pairs,
    ):
        records = [encode_transaction({key: value}) for key, value in chosen]
        assert decode_puts(records) == ([key for key, _ in chosen], [value for _, value in chosen])


ONE = b"\x01\x81\xc4\x01a\xc4\x01b"


@pytest.mark.parametrize(
    "records",
    [
        # The first one goes on in the second, which has a byte too many for that.
        [b"\x01\x81\xc4\x01a\xc4\x02b", b"\x01" + ONE],
        [ONE + b"\x01", ONE[1:]],
        [b"\x01\x81\xc4\x01a\xc4\x08b", ONE, ONE],
        # Numbers and maps, but not in turns.
        [b"\x01\x81\xc4\x01a\xc4\x01b", b"\x01\x01"],
        [ONE, b"\x81\xc4\x01a\xc4\x01b\x01"],
        [ONE, b"\x80" + ONE[1:]],
        # As many keys as there are records.
        [b"\x01\x80", b"\x01\x82\xc4\x01a\xc4\x01b\xc4\x01c\xc4\x01d"],
        # Longer than they need be.
        [b"\x01\x81\xc5\0\x01a\xc4\x01b"],
        [ONE, b"\x01\x81\xc4\0\xc4\x01b"],
        [ONE, b"\x01\x81\xc4\x01a\xc0"],
        [ONE, encode_transaction({b"k" * 256: b""})],
        [ONE, b"\x01\x81\xc4\x01k\xc5\0\x01v"],
        [ONE, b"\x01\x81\xc4\x01k\xc5\0\xff" + bytes(255)],
        [ONE, b"\x01\x81\xc4\x01k\xc6\0\0\1\0" + bytes(256)],
        [TRANSACTION_FORMAT + msgspec.msgpack.encode({b"k" * 512: b""})],
        [ONE, b""],
        [b"", ONE],
    ],
)
def test_what_may_be_no_puts_is_not_decoded_together(records: list[bytes]) -> None:
    assert decode_puts(records) is None


@pytest.mark.parametrize("key", [b"\0", b"k", b"k" * KEY_BYTES_MAX])
def test_a_key_of_1_to_511_bytes_passes(key: bytes) -> None:
    assert check_key(key) is key


@pytest.mark.parametrize("key", [b"", b"k" * 512])
def test_an_empty_or_long_key_is_refused_by_name(key: bytes) -> None:
    with pytest.raises(ValueError, match=f"^key must have 1 to 511 bytes, not {len(key)}$"):
        check_key(key)


@pytest.mark.parametrize("key", ["k", None, 1, bytearray(b"k"), memoryview(b"k")])
def test_a_key_that_is_not_bytes_is_refused_by_name(key: object) -> None:
    with pytest.raises(TypeError, match=f"^key must be bytes, not {type(key).__name__}$"):
        check_key(key)
