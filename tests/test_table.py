"""`Table`: typed keys and values, each in a part of the database of its own."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Any

import attrs
import msgspec
import pytest
from databases import commits_of, open_memory_database, write
from hypothesis import given, strategies as st

from trio_wal import KeyExistsError, Operation, Table, TableDecodeError
from trio_wal.testing import MemoryFiles


class Job(msgspec.Struct, frozen=True):
    kind: str
    tries: int = 0


@attrs.frozen
class Point:
    x: int
    y: int


JOBS = Table("jobs", key=tuple[int, str], value=Job)
WORDS = Table("words", key=str, value=dict[str, int])
BLOBS = Table("blobs", key=bytes, value=bytes)
NUMBERS = Table("numbers", key=int, value=Point)
COUNTS = Table("counts", key=str, value=int)


async def test_what_is_put_is_given_back_by_all_that_can_be_read(files: MemoryFiles) -> None:
    job = Job("mail")
    async with open_memory_database(files) as db:
        async with db.transaction() as tx:
            JOBS.put(tx, (7, "b"), job)
            JOBS.put(tx, (7, "a"), Job("print", 2))
            JOBS.put(tx, (-1, "x"), Job("first"))
            NUMBERS.put(tx, -5, Point(1, 2))
            assert JOBS.get(tx, (7, "b")) == job
            assert [key for key, _ in JOBS.scan(tx)] == [(-1, "x"), (7, "a"), (7, "b")]
            assert JOBS.get(db, (7, "b")) is None
        with db.snapshot() as snap:
            for source in (db, snap):
                assert JOBS.get(source, (7, "b")) == job
                assert JOBS.get(source, (8, "b")) is None
                assert JOBS.get(source, (8, "b"), 0) == 0
                assert NUMBERS.get(source, -5) == Point(1, 2)
                assert list(JOBS.scan(source, prefix=(7,), reverse=True)) == [
                    ((7, "b"), job),
                    ((7, "a"), Job("print", 2)),
                ]
                assert list(JOBS.scan(source, limit=1)) == [((-1, "x"), Job("first"))]


async def test_an_int_may_stand_for_a_float(files: MemoryFiles) -> None:
    rates = Table("rates", key=str, value=float)
    async with open_memory_database(files) as db:
        async with db.transaction() as tx:
            rates.put(tx, "a", 1)
            rates.put(tx, "b", 1.5)
            with pytest.raises(TypeError, match="value must be of type float, not bool"):
                rates.put(tx, "c", True)
        assert list(rates.scan(db)) == [("a", 1.0), ("b", 1.5)]
        assert type(rates.get(db, "a")) is float


async def test_values_of_a_union_are_of_any_of_its_types(files: MemoryFiles) -> None:
    either = Table("either", key=str, value=int | str)
    optional = Table("optional", key=str, value=int | None)
    async with open_memory_database(files) as db:
        async with db.transaction() as tx:
            either.put(tx, "number", 3)
            either.put(tx, "word", "blue")
            optional.put(tx, "nothing", None)
        assert dict(either.scan(db)) == {"number": 3, "word": "blue"}
        assert optional.get(db, "nothing", 0) is None


async def test_scans_begin_and_end_where_they_are_told(files: MemoryFiles) -> None:
    keys = [(number, name) for number in range(3) for name in ("a", "b")]
    async with open_memory_database(files) as db:
        async with db.transaction() as tx:
            for key in keys:
                JOBS.put(tx, key, Job(""))
            for word in ("", "a", "ab", "a\0", "b", "\U0010ffff"):
                WORDS.put(tx, word, {})
            for data in (b"", b"\xff", b"\xff\xff", b"\xff\0", b"\0"):
                BLOBS.put(tx, data, data)

        def found(**where: Any) -> list[tuple[int, str]]:
            return [key for key, _ in JOBS.scan(db, **where)]

        assert found() == keys
        assert found(start=(1,)) == keys[2:]
        assert found(stop=(1,)) == keys[:2]
        assert found(start=(0, "b"), stop=(2, "b")) == keys[1:5]
        assert found(prefix=(1,)) == keys[2:4]
        assert found(prefix=(1, "b")) == keys[3:4]
        assert found(prefix=()) == keys
        assert [w for w, _ in WORDS.scan(db, prefix="a")] == ["a", "a\0", "ab"]
        assert [w for w, _ in WORDS.scan(db, prefix="a\0")] == ["a\0"]
        assert [w for w, _ in WORDS.scan(db, prefix="")] == [
            "",
            "a",
            "a\0",
            "ab",
            "b",
            "\U0010ffff",
        ]
        assert [w for w, _ in WORDS.scan(db, "a", "b")] == ["a", "a\0", "ab"]
        assert [d for d, _ in BLOBS.scan(db, prefix=b"\xff")] == [b"\xff", b"\xff\0", b"\xff\xff"]
        assert [d for d, _ in BLOBS.scan(db, prefix=b"\0")] == [b"\0"]
        with pytest.raises(ValueError, match="prefix cannot be combined"):
            JOBS.scan(db, (1,), prefix=(1,))


async def test_writing_does_what_a_transaction_does(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        async with db.transaction() as tx:
            WORDS.insert(tx, "a", {"x": 1})
            with pytest.raises(KeyExistsError):
                WORDS.insert(tx, "a", {})
            with pytest.raises(KeyError, match="'b'"):
                WORDS.update(tx, "b", {})
            WORDS.update(tx, "a", {"x": 2})
            with pytest.raises(KeyError, match="'b'"):
                WORDS.delete(tx, "b")
            assert WORDS.discard(tx, "b") is False
            with pytest.raises(KeyError, match="'b'"):
                WORDS.pop(tx, "b")
            assert WORDS.pop(tx, "b", None) is None
            assert WORDS.pop(tx, "a") == {"x": 2}
            for word in ("c", "d", "da", "e"):
                WORDS.put(tx, word, {})
            assert WORDS.discard(tx, "e") is True
            WORDS.delete(tx, "c")
            tx.put(b"zz", b"not of a table")
        async with db.transaction() as tx:
            assert WORDS.delete_range(tx, prefix="d") == 2
            assert WORDS.delete_range(tx) == 0
            NUMBERS.put(tx, 1, Point(0, 0))
            NUMBERS.put(tx, 2, Point(0, 0))
            assert NUMBERS.delete_range(tx, 1, 2) == 1
        assert [key for key, _ in db.scan()] == [NUMBERS.encode_key(2), b"zz"]


NAMES = st.text(st.sampled_from("ab\x01\xff\U0010ffff"), min_size=1, max_size=3)


@given(NAMES, NAMES, st.binary(max_size=3), st.binary(max_size=3))
def test_tables_never_overlap(one: str, two: str, first: bytes, second: bytes) -> None:
    table, other = (Table(name, key=bytes, value=bytes) for name in (one, two))
    assert table.encode_key(first).startswith(table.prefix)
    assert table.encode_key(first).startswith(other.prefix) == (one == two)
    assert (table.encode_key(first) == other.encode_key(second)) == ((one, first) == (two, second))


async def test_changes_say_what_they_did_to_a_table(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        async with db.transaction() as tx:
            JOBS.put(tx, (1, "a"), Job("x"))
            WORDS.put(tx, "w", {})
        await db.delete(JOBS.encode_key((1, "a")))
        first, second = await commits_of(db)
        assert [JOBS.decode(each) for each in first.operations] == [((1, "a"), Job("x")), None]
        assert [JOBS.decode(each) for each in second.operations] == [((1, "a"), None)]
        assert JOBS.decode_key(second.operations[0].key) == (1, "a")
        with pytest.raises(TableDecodeError, match="it begins differently"):
            JOBS.decode_key(b"elsewhere")


async def test_what_does_not_decode_names_table_and_key(files: MemoryFiles) -> None:
    strange = JOBS.prefix + b"\x15"
    async with open_memory_database(files) as db:
        await write(db, {JOBS.encode_key((1, "a")): b"\xc1", strange: b""})
        with pytest.raises(TableDecodeError, match=r"table 'jobs', key \(1, 'a'\): ") as caught:
            JOBS.get(db, (1, "a"))
        assert (caught.value.table, caught.value.key) == ("jobs", (1, "a"))
        with pytest.raises(TableDecodeError, match="this is not a key of the table") as caught:
            list(JOBS.scan(db))
        assert caught.value.key == strange
        async with db.transaction() as tx:
            with pytest.raises(TableDecodeError):
                JOBS.pop(tx, (1, "a"))
            assert JOBS.encode_key((1, "a")) in tx
            # Not decoded, so it can be mended.
            assert JOBS.delete_range(tx) == 2
        # As an older program left it.
        await db.put(JOBS.encode_key((1, "a")), msgspec.msgpack.encode({"kind": 7}))
        with pytest.raises(TableDecodeError, match="Expected `str`, got `int`"):
            JOBS.get(db, (1, "a"))
        with pytest.raises(TableDecodeError):
            JOBS.decode(Operation(JOBS.encode_key((1, "a")), b""))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": ""}, ValueError, "name must have 1 to 255 characters, not 0"),
        ({"name": "x" * 256}, ValueError, "name must have 1 to 255 characters, not 256"),
        ({"name": "\U0010ffff" * 128}, ValueError, "name has 514 bytes"),
        ({"name": "a\0b"}, ValueError, "name must not contain a NUL character"),
        ({"name": "\ud800"}, ValueError, "name has half of a surrogate pair"),
        ({"name": b"x"}, TypeError, "name must be a str, not bytes"),
        ({"key": float}, TypeError, "key must be int, str"),
        ({"value": {1, 2}}, TypeError, "value: "),
        ({"value": lambda: 0}, TypeError, "value: "),
    ],
)
def test_a_table_that_cannot_be_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {"name": "x", "key": int, "value": int, **arguments}
    with pytest.raises(error, match=message):
        Table(given["name"], key=given["key"], value=given["value"])


@pytest.mark.parametrize(
    ("put", "error", "message"),
    [
        (lambda tx: JOBS.put(tx, 7, Job("")), TypeError, "table 'jobs': key must be a tuple"),
        (
            lambda tx: JOBS.put(tx, (7, "x" * 600), Job("")),
            ValueError,
            r"table 'jobs': key has 610 bytes with the table's name, over 511: \(7, 'xx",
        ),
        (lambda tx: JOBS.put(tx, (7, ""), 5), TypeError, "table 'jobs': value must be of type Job"),
        (lambda tx: WORDS.put(tx, "", []), TypeError, "table 'words': value must be of type dict"),
        (lambda tx: WORDS.put(tx, "", {"": 1 << 70}), ValueError, "table 'words': value cannot be"),
        (lambda tx: WORDS.put(tx, "", {"": object()}), TypeError, "table 'words': value cannot be"),
        (lambda tx: COUNTS.put(tx, "", True), TypeError, "value must be of type int, not bool"),
        (lambda tx: BLOBS.put(tx, b"", "x"), TypeError, "table 'blobs': value must be bytes"),
        (lambda tx: NUMBERS.put(tx, "1", Point(0, 0)), TypeError, "table 'numbers': key must be"),
        (lambda tx: NUMBERS.put(tx, True, Point(0, 0)), TypeError, "table 'numbers': key must be"),
    ],
)
async def test_what_a_table_cannot_hold_changes_nothing(
    files: MemoryFiles, put: Any, error: type[Exception], message: str
) -> None:
    async with open_memory_database(files) as db:
        async with db.transaction() as tx:
            with pytest.raises(error, match=message):
                put(tx)
        assert list(db.scan()) == []


@given(st.integers(-(1 << 70), 1 << 70))
def test_an_int_is_encoded_the_same_by_the_short_way(number: int) -> None:
    pair = Table("numbers", key=tuple[int], value=bytes)
    assert NUMBERS.encode_key(number) == pair.encode_key((number,))


@pytest.mark.parametrize(("name_bytes", "width_max"), [(500, 8), (501, 7), (507, 1), (508, 0)])
def test_an_int_for_which_a_long_name_leaves_no_room_is_refused(
    name_bytes: int, width_max: int
) -> None:
    name = "\u00e9" * (name_bytes // 2) + "x" * (name_bytes % 2)
    table = Table(name, key=int, value=bytes)
    largest = (1 << 8 * width_max) - 1
    for held in (largest, -largest):
        assert len(table.encode_key(held)) == 3 + name_bytes + width_max
    for refused in (largest + 1, -largest - 1):
        with pytest.raises(ValueError, match="bytes with the table's name, over 511"):
            table.encode_key(refused)


def test_a_key_may_be_of_any_type_that_is_named() -> None:
    when = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
    who = uuid.uuid4()
    kind = tuple[int, str, bytes, bool, uuid.UUID, dt.datetime, tuple[int, ...]]
    table = Table("all", key=kind, value=bytes)
    key = (1, "x", b"y", True, who, when, (1, 2))
    assert table.decode_key(table.encode_key(key)) == key
    assert repr(table) == "<trio_wal.Table 'all'>"
