"""The pages of a store, read as bytes: what is sound is called so, and what is not is found."""

from __future__ import annotations

import errno
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from lmdb.verify import verify as lmdb_verify

from trio_wal import _pages
from trio_wal._base import StoreState
from trio_wal._pages import FINDINGS_MAX, Contents, PagesError, check, read_header, read_meta
from trio_wal._store import LmdbStore
from trio_wal._util import MiB

UUID = bytes(range(16))
PAGE = 4096


def read_of(content: bytes | bytearray) -> _pages.Read:
    return lambda length, offset: bytes(content[offset : offset + length])


def checked(content: bytes | bytearray) -> Contents:
    return check(read_of(content), len(content))


def reasons(content: bytes | bytearray) -> list[str]:
    return [reason for _, reason in checked(content).findings]


def make(path: Path, *pieces: list[tuple[bytes, bytes | None]]) -> bytearray:
    """The file of a store to which these were applied one after the other."""
    store = LmdbStore(str(path), 64 * MiB)
    for number, piece in enumerate(pieces):
        store.apply(piece, StoreState(UUID, number + 1))
    store.close()
    return bytearray((path / "data.mdb").read_bytes())


@pytest.fixture
def content(tmp_path: Path) -> bytearray:
    """Two levels, large values, free pages."""
    keys = [b"%05d" % n for n in range(600)]
    filled = [(key, key * (1000 if n % 100 == 50 else 10)) for n, key in enumerate(keys)]
    some = [(key, None) for key in keys[::3]]
    return make(tmp_path / "store", filled, some, [(b"last", b"")])


def pages(content: bytearray, flags: int) -> list[int]:
    """Offsets of the pages of a kind that the newest state of the data has."""
    live: list[int] = []
    walk = _pages._Walk(read_of(content), len(content), None)
    trees, _ = walk.outline()
    data = trees[b"data"]

    def look(number: int, depth: int) -> None:
        offset = number * PAGE
        if content[offset + 10] == flags:
            live.append(offset)
        if depth < data.depth:
            for child, _, _ in walk._branch(
                bytes(content[offset : offset + PAGE]), number, None, None, bytes
            ):
                look(child, depth + 1)

    look(data.root, 1)
    return live


# -- sound ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_whatever_was_put_and_deleted_the_store_is_sound(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = LmdbStore(str(tmp_path / "store"), 64 * MiB)
    state: dict[bytes, bytes] = {}
    longest = rng.choice((8, 60, 511))
    sizes = rng.choice(((0, 5, 40), (100, 900), (0, 10, 1500, 3000, 5000, 40_000)))
    for lsn in range(1, 16):
        piece: dict[bytes, bytes | None] = {}
        for _ in range(rng.randrange(1, 200)):
            if state and rng.random() < 0.4:
                piece[rng.choice(list(state))] = None
            else:
                key = rng.randbytes(rng.randrange(1, longest + 1))
                piece[key] = rng.randbytes(rng.choice(sizes))
        store.apply(sorted(piece.items()), StoreState(UUID, lsn))
        for key, value in piece.items():
            if value is None:
                state.pop(key, None)
            else:
                state[key] = value
        content = (tmp_path / "store" / "data.mdb").read_bytes()
        found = checked(content)
        assert found.findings == ()
        assert found.entries == len(state)
        assert found.meta[b"lsn"] == lsn.to_bytes(8, "little")
    store.close()
    assert lmdb_verify(str(tmp_path / "store")) == []


def test_a_store_from_which_all_was_deleted_is_sound(tmp_path: Path) -> None:
    filled: list[tuple[bytes, bytes | None]] = [(b"%d" % n, bytes(100)) for n in range(500)]
    emptied: list[tuple[bytes, bytes | None]] = [(key, None) for key, _ in filled]
    assert checked(make(tmp_path / "store", filled, emptied)).entries == 0
    assert checked(make(tmp_path / "new")) == Contents((), 0, {})


def test_opening_looks_at_a_handful_of_pages(content: bytearray) -> None:
    looked: list[int] = []

    def read(length: int, offset: int) -> bytes:
        looked.append(offset)
        return bytes(content[offset : offset + length])

    _, trees, meta = read_meta(read, len(content))
    assert sorted(trees) == [b"data", b"meta"]
    assert meta == {b"lsn": (3).to_bytes(8, "little"), b"log": UUID, b"format": b"\1\0"}
    assert len(looked) == 4


# -- not sound -----------------------------------------------------------------------------------


def test_headers_that_no_lmdb_writes_are_refused(content: bytearray) -> None:
    newest = PAGE if read_header(read_of(content), len(content)).transaction & 1 else 0

    def changed(at: int, form: str, value: int, header: int = newest) -> bytearray:
        copy = bytearray(content)
        struct.pack_into(form, copy, header + at, value)
        return copy

    for other, message in (
        (changed(16, "=I", 1), "this is no header of LMDB"),
        (changed(10, "=H", 2), "this is no header of LMDB"),
        (changed(0, "=Q", 5), "this is no header of LMDB"),
        (changed(20, "=I", 3), "LMDB data version 3 is not supported"),
        (changed(40, "=I", 0, 0), "the header claims pages of 0 bytes"),
        (changed(40, "=I", 3000, 0), "the header claims pages of 3000 bytes"),
        (changed(40, "=I", 1 << 31, 0), "the header claims pages of 2147483648 bytes"),
        (changed(40, "=I", 8192, PAGE), "the two headers do not agree on the size of a page"),
        (changed(44, "=H", 0x4008), "the header has flags that no store has"),
        (changed(88, "=I", 1 << 31), "the header has flags that no store has"),
        (changed(92, "=H", 4), "the header has flags that no store has"),
        (changed(136, "=Q", 0), "the header does not count itself"),
        (changed(136, "=Q", 1 << 52), "the file has "),
        (changed(144, "=Q", 999, 0), "the header stands in the place of the other one"),
        (changed(144, "=Q", 998, 0), "the two headers are not of two transactions in a row"),
        (changed(128, "=Q", 1 << 40), "the tree of databases has its root nowhere"),
        (changed(94, "=H", 200), "the tree of databases has its root nowhere"),
        (changed(80, "=Q", 0), "the tree of free pages has its root nowhere"),
        (bytearray(content[: PAGE + 30]), "the file is too short for its header"),
    ):
        with pytest.raises(PagesError, match=rf"{message}"):
            read_header(read_of(other), len(other))


Change = Callable[[bytearray, int], None]


def _put(at: int, form: str, value: int) -> Change:
    return lambda content, page: struct.pack_into(form, content, page + at, value)


def _node(content: bytearray, page: int, number: int) -> int:
    """Where a node of a page is."""
    return page + int(struct.unpack_from("=H", content, page + 16 + 2 * number)[0])


def _node_put(number: int, at: int, form: str, value: int) -> Change:
    return lambda content, page: struct.pack_into(
        form, content, _node(content, page, number) + at, value
    )


def _swap_slots(content: bytearray, page: int) -> None:
    first, second = struct.unpack_from("=HH", content, page + 16)
    struct.pack_into("=HH", content, page + 16, second, first)


def _same_slot_twice(content: bytearray, page: int) -> None:
    content[page + 18 : page + 20] = content[page + 16 : page + 18]


def _raise_bound(content: bytearray, page: int) -> None:
    """A key of the branch above the first key of the leaf it leads to."""
    at = _node(content, page, 1) + 8
    content[at + 4] += 1


def _child_of_itself(content: bytearray, page: int) -> None:
    struct.pack_into("=H", content, _node(content, page, 0), page // PAGE)


def _only_child(content: bytearray, page: int) -> None:
    _put(12, "=H", 18)(content, page)
    _put(14, "=H", _node(content, page, 0) - page)(content, page)


LEAF_CHANGES: dict[str, tuple[Change, str]] = {
    "another number": (_put(0, "=Q", 3), "this is page 3 and not page "),
    "of no kind": (_put(10, "=H", 0), "the page is no leaf: its flags are 0x0"),
    "dirty": (_put(10, "=H", 0x12), "the page is no leaf: its flags are 0x12"),
    "a branch": (_put(10, "=H", 1), "the page is no leaf: its flags are 0x1"),
    "no keys": (_put(12, "=H", 16), "the page's bounds are 16 and "),
    "an odd bound": (_put(12, "=H", 19), "the page's bounds are 19 and "),
    "a bound behind the page": (_put(14, "=H", 5000), "the page's bounds are "),
    "a bound in the slots": (_put(14, "=H", 18), "the page's bounds are "),
    "a bound too low": (lambda c, p: _put(14, "=H", _node(c, p, 0) - p - 800)(c, p), "gap|bounds"),
    "a slot outside": (_put(16, "=H", 0xFFFE), "a node lies at 65534, outside of the page"),
    "a slot at the end": (_put(16, "=H", PAGE - 4), "a node lies at 4092, outside of the page"),
    "a slot a little off": (lambda c, p: _put(16, "=H", _node(c, p, 0) - p + 2)(c, p), ""),
    "slots swapped": (_swap_slots, "the keys are not in order"),
    "a slot twice": (_same_slot_twice, "the keys are not in order"),
    "no key": (_node_put(0, 6, "=H", 0), "a node reaches out of its page"),
    "a key too long": (_node_put(0, 6, "=H", 512), "a node reaches out of its page"),
    "a longer value": (_node_put(1, 0, "=H", 70), "the page's nodes overlap or leave a gap"),
    "a value of 4 GiB": (_node_put(1, 2, "=H", 0xFFFF), "a node reaches out of its page"),
    "a sub-database": (_node_put(0, 4, "=H", 2), "the flags of an entry are 0x2"),
    "duplicates": (_node_put(0, 4, "=H", 4), "the flags of an entry are 0x4"),
}


@pytest.mark.parametrize("name", LEAF_CHANGES)
def test_a_leaf_that_no_lmdb_writes_is_found(content: bytearray, name: str) -> None:
    change, message = LEAF_CHANGES[name]
    change(content, pages(content, 2)[1])
    found = reasons(content)
    assert found
    assert any(part in found[0] for part in message.split("|")), found


BRANCH_CHANGES: dict[str, tuple[Change, str]] = {
    "one child": (_only_child, "a branch has one child only"),
    "a child that is nowhere": (_node_put(1, 0, "=H", 0xFFFF), "is named here and does not exist"),
    "a child that is a header": (_node_put(1, 0, "=H", 1), "page 1 is named here and does not"),
    "a child far away": (_node_put(1, 4, "=H", 1), "is named here and does not exist"),
    "itself as its child": (_child_of_itself, "is named here and elsewhere"),
    "keys out of order": (_swap_slots, ""),
    "a bound that its leaf does not keep": (_raise_bound, "the keys are not in order"),
    "a key outside": (_node_put(1, 6, "=H", 5000), "a node reaches out of its page"),
    "a slot outside": (_put(18, "=H", 0xFFFE), "a node lies at 65534, outside of the page"),
    "a leaf in its place": (_put(10, "=H", 2), "the page is no branch: its flags are 0x2"),
}


@pytest.mark.parametrize("name", BRANCH_CHANGES)
def test_a_branch_that_no_lmdb_writes_is_found(content: bytearray, name: str) -> None:
    change, message = BRANCH_CHANGES[name]
    change(content, pages(content, 1)[0])
    found = reasons(content)
    assert found
    assert message in found[0]


def test_pages_of_a_large_value_are_looked_at(content: bytearray) -> None:
    number = next(
        at // PAGE
        for at in range(2 * PAGE, len(content), PAGE)
        if struct.unpack_from("=QHHI", content, at) == (at // PAGE, 0, 4, 2)
    )
    for change in (_put(0, "=Q", 3), _put(10, "=H", 2), _put(12, "=I", 1), _put(12, "=I", 9)):
        copy = bytearray(content)
        change(copy, number * PAGE)
        assert "2 pages of a value of 5000 bytes should begin here" in reasons(copy)


def test_trees_that_do_not_hold_what_they_count_are_found(content: bytearray) -> None:
    walk = _pages._Walk(read_of(content), len(content), None)
    at = _node(content, walk.header.main.root * PAGE, 0) + 8 + len(b"data")
    assert walk.outline()[0][b"data"].entries == struct.unpack_from("=Q", content, at + 32)[0]
    for offset, what in ((8, "branch pages"), (16, "leaf pages"), (32, "entries")):
        copy = bytearray(content)
        copy[at + offset] ^= 1
        assert any(f" {what} and says " in reason for reason in reasons(copy))
    for offset, message in ((0, "has flags"), (4, "has flags"), (6, "has its root nowhere")):
        copy = bytearray(content)
        copy[at + offset] ^= 2
        assert any(message in reason for reason in reasons(copy)), offset


def test_free_pages_that_are_in_use_or_forgotten_are_found(content: bytearray) -> None:
    walk = _pages._Walk(read_of(content), len(content), None)
    root = walk.header.free.root * PAGE
    node = _node(content, root, 0)
    count = struct.unpack_from("=Q", content, node + 16)[0]
    assert count > 1
    used = pages(content, 2)[0] // PAGE
    for at, value, message in (
        (16, count - 1, "the list of free pages is not as long as it says"),
        (24, used, "is called free and is not"),
        (24, 1 << 40, "is called free and is not"),
        (8, 1 << 30, "the list of free pages is of no transaction"),
    ):
        copy = bytearray(content)
        struct.pack_into("=Q", copy, node + at, value)
        assert any(message in reason for reason in reasons(copy)), message
    # One more page, in no tree and in no list.
    copy = bytearray(content) + bytes(PAGE)
    header = PAGE if walk.header.transaction & 1 else 0
    struct.pack_into("=Q", copy, header + 136, walk.header.last_page + 1)
    assert reasons(copy) == ["the page is in no tree and not free either"]


def test_an_lmdb_file_of_somebody_else_is_no_store(tmp_path: Path) -> None:
    for name in (b"", b"theirs"):
        folder = tmp_path / (name.decode() or "plain")
        with lmdb.open(str(folder), max_dbs=2) as env:
            handle = env.open_db(name) if name else None
            with env.begin(write=True, db=handle) as txn:
                txn.put(b"a", b"b")
        assert reasons((folder / "data.mdb").read_bytes()) == ["this is no trio-wal store"]
    with lmdb.open(str(tmp_path / "many"), max_dbs=2) as env:
        env.open_db(b"data", dupsort=True)
    assert reasons((tmp_path / "many" / "data.mdb").read_bytes()) == [
        "the database 'data' has flags"
    ]


def test_a_sector_that_cannot_be_read_is_found_and_any_other_error_is_told(
    content: bytearray,
) -> None:
    bad = pages(content, 2)[1]

    def read(number: int) -> _pages.Read:
        def read(length: int, offset: int) -> bytes:
            if offset == bad:
                raise OSError(number, os.strerror(number))
            return bytes(content[offset : offset + length])

        return read

    found = check(read(errno.EIO), len(content))
    assert found.findings == ((bad, "the page cannot be read: Input/output error"),)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        check(read(errno.ENOMEM), len(content))


def test_a_file_that_becomes_shorter_is_found(content: bytearray) -> None:
    size = len(content)
    assert any(
        "ends with the file" in r for _, r in check(read_of(content[: -PAGE * 4]), size).findings
    )


def test_there_are_not_too_many_findings(tmp_path: Path) -> None:
    content = make(tmp_path / "store", [(b"%06d" % n, bytes(1900)) for n in range(600)])
    for page in pages(content, 2):
        content[page + 10] = 0
    assert len(checked(content).findings) == FINDINGS_MAX
