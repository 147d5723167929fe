"""Keys of tables as bytes: they come back, and stand in the order of their values."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta, timezone
from typing import Any, NewType

import pytest
from hypothesis import given, strategies as st

from trio_wal._tuple import KeyCodec, KeyFormatError, after

INTS = st.integers(-(1 << 80), 1 << 80) | st.integers(-300, 300)
TEXTS = st.text(max_size=8) | st.text("\0a\xff", max_size=4)
BYTES = st.binary(max_size=8) | st.binary(max_size=4).map(lambda data: data.replace(b"a", b"\0"))
TIMES = st.datetimes(timezones=st.just(timezone.utc))

KINDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, INTS),
    (str, TEXTS),
    (bytes, BYTES),
    (bool, st.booleans()),
    (uuid.UUID, st.uuids()),
    (datetime, TIMES),
    (tuple[int, str], st.tuples(INTS, TEXTS)),
    (tuple[str, bytes, bool], st.tuples(TEXTS, BYTES, st.booleans())),
    (tuple[bytes, ...], st.lists(BYTES, max_size=3).map(tuple)),
    (
        tuple[tuple[str, ...], tuple[int, datetime]],
        st.tuples(st.lists(TEXTS, max_size=3).map(tuple), st.tuples(INTS, TIMES)),
    ),
]
IDS = [str(kind) for kind, _ in KINDS]


@pytest.mark.parametrize(("kind", "values"), KINDS, ids=IDS)
@given(data=st.data())
def test_the_order_of_bytes_is_that_of_values(
    kind: Any, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    codec = KeyCodec(kind)
    first, second = data.draw(values), data.draw(values)
    one, two = codec.encode(first), codec.encode(second)
    assert (one < two, one == two) == (first < second, first == second)
    for value, encoded in ((first, one), (second, two)):
        decoded = codec.decode(b"..." + encoded, 3)
        assert decoded == value
        assert type(decoded) is type(value)


@pytest.mark.parametrize(("kind", "values"), KINDS, ids=IDS)
@given(data=st.data())
def test_no_other_bytes_are_a_key(
    kind: Any, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    """What decodes is what would be encoded; else two keys were one."""
    codec = KeyCodec(kind)
    encoded = bytearray(codec.encode(data.draw(values)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(encoded)))
        encoded[place : place + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=2))
    try:
        value = codec.decode(bytes(encoded), 0)
    except KeyFormatError:
        return
    assert codec.encode(value) == encoded


@pytest.mark.parametrize(
    ("kind", "key", "encoded"),
    [
        # From the examples of FoundationDB's design/tuple.md and its tests.
        (int, 0, "14"),
        (int, 1, "1501"),
        (int, -1, "13fe"),
        (int, 255, "15ff"),
        (int, 256, "160100"),
        (int, -255, "1300"),
        (int, -256, "12feff"),
        (int, -5551212, "11ab4b93"),
        (int, (1 << 64) - 1, "1c" + "ff" * 8),
        (int, 1 << 64, "1d09" + "01" + "00" * 8),
        (int, -(1 << 64), "0bf6" + "fe" + "ff" * 8),
        (bytes, b"foo\0bar", "01666f6f00ff62617200"),
        (str, "F\u00d4O\0bar", "0246c3944f00ff62617200"),
        (bool, True, "27"),
        (tuple[bool, str], (False, ""), "260200"),
        (tuple[tuple[bytes, ...], int], ((b"foo\0bar",), 0), "0501666f6f00ff6261720000" + "14"),
        (uuid.UUID, uuid.UUID(int=1), "30" + "00" * 15 + "01"),
        (datetime, datetime(1970, 1, 1, tzinfo=timezone.utc), "408000000000000000"),
    ],
)
def test_the_format_stays(kind: Any, key: Any, encoded: str) -> None:
    assert KeyCodec(kind).encode(key).hex() == encoded


def test_a_tuple_in_a_tuple_has_an_end() -> None:
    codec = KeyCodec(tuple[tuple[int], int])
    encoded = codec.encode(((1,), 2))
    assert codec.decode(encoded, 0) == ((1,), 2)
    for end in (1, 0x15, 0xFF):
        with pytest.raises(KeyFormatError, match="a tuple's end is due at byte 3"):
            codec.decode(encoded[:3] + bytes((end,)) + encoded[4:], 0)


def test_a_time_is_the_same_in_every_zone() -> None:
    codec = KeyCodec(datetime)
    here = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    assert codec.encode(here) == codec.encode(here.astimezone(timezone.utc))
    assert codec.decode(codec.encode(here), 0) == here


def test_a_new_type_is_what_it_is_made_of() -> None:
    number = NewType("number", int)
    assert KeyCodec(number).encode(7) == KeyCodec(int).encode(7)
    assert KeyCodec(tuple[number, str]).encode((7, "")) == KeyCodec(tuple[int, str]).encode((7, ""))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (float, "key must be int, str, bytes, bool, uuid.UUID, datetime, or a tuple of these, not"),
        (tuple[int, float], r"key\[1\] must be int, str"),
        (tuple[list[int], ...], r"key\[\.\.\.\] must be int, str"),
        (tuple, "key must say what the tuple contains"),
        (tuple[()], "key must say what the tuple contains"),
        (None, "key must be int"),
        ("int", "key must be int"),
        (7, "key must be int"),
    ],
)
def test_other_types_are_refused(kind: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        KeyCodec(kind)


@pytest.mark.parametrize(
    ("kind", "key", "error", "message"),
    [
        (int, True, TypeError, "key must be an int, not bool"),
        (int, "7", TypeError, "key must be an int, not str"),
        (int, 1 << 2040, ValueError, "key is an int of 256 bytes, over 255"),
        (int, -(1 << 2040), ValueError, "key is an int of 256 bytes, over 255"),
        (bool, 1, TypeError, "key must be True or False, not int"),
        (bytes, bytearray(b"x"), TypeError, "key must be bytes, not bytearray"),
        (str, b"x", TypeError, "key must be a str, not bytes"),
        (str, "\ud800", ValueError, "key has half of a surrogate pair"),
        (uuid.UUID, "x", TypeError, "key must be a uuid.UUID, not str"),
        (datetime, 7, TypeError, "key must be a datetime with a time zone, not int"),
        (datetime, datetime(2026, 1, 1), ValueError, "key is a datetime without a time zone"),  # noqa: DTZ001
        (
            datetime,
            datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
            ValueError,
            "key is stored in UTC, where it is outside",
        ),
        (
            datetime,
            datetime.max.replace(tzinfo=timezone(-timedelta(microseconds=1))),
            ValueError,
            "key is stored in UTC, where it is outside",
        ),
        (tuple[int, str], (7,), ValueError, "key must have 2 elements, not 1"),
        (tuple[int, str], (7, "x", 1), ValueError, "key must have 2 elements, not 3"),
        (tuple[int, str], [7, "x"], TypeError, "key must be a tuple, not list"),
        (tuple[int, str], (7, 8), TypeError, r"key\[1\] must be a str, not int"),
        (tuple[tuple[int, ...]], ((1, "x"),), TypeError, r"key\[0\]\[1\] must be an int, not str"),
    ],
)
def test_other_keys_are_refused(kind: Any, key: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KeyCodec(kind).encode(key)


@given(st.tuples(INTS, TEXTS, BYTES), st.tuples(INTS, TEXTS, BYTES), st.integers(0, 3))
def test_keys_that_begin_alike_stand_together(
    key: tuple[int, str, bytes], other: tuple[int, str, bytes], count: int
) -> None:
    codec = KeyCodec(tuple[int, str, bytes])
    data, whole = codec.encode_prefix(key[:count])
    assert whole
    assert data <= codec.encode(key) < after(data)
    assert (data <= codec.encode(other) < after(data)) == (other[:count] == key[:count])


@pytest.mark.parametrize(
    ("kind", "prefix", "message"),
    [
        (int, 7, "prefix is for keys that are tuples, str or bytes"),
        (tuple[int, str], (7, "x", 1), "prefix must have at most 2 elements, not 3"),
        (tuple[int, str], 7, "prefix must be a tuple, not int"),
        (str, 7, "prefix must be a str, not int"),
    ],
)
def test_other_prefixes_are_refused(kind: Any, prefix: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        KeyCodec(kind).encode_prefix(prefix)
