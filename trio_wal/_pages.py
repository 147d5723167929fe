"""LMDB's data file, read as bytes: what LMDB takes for granted is checked here.

Law: bytes in, values out.  LMDB maps the file and follows what it finds there; a page that is
not what it should be can end the process (SIGBUS), make a read miss keys, or make a write
spoil others.  Nothing is mapped here and no offset is followed unchecked, so damage and forgery
can be found but can do nothing.

Format: LMDB 0.9, data version 1 (``mdb.c``, "page header", "node header", ``MDB_db`` and
``MDB_meta``), in the word size and byte order of this machine.  Of what that format allows only
what a store of this package has is accepted: two named databases, one value per key.  What is
checked, for every page that the newest header reaches:

* its number, its kind, and its depth in the tree;
* nodes that lie without gap or overlap between ``upper`` and the page's end;
* keys in order, within the bounds that the pages above give, and 1 to 511 bytes long;
* values that lie in their page or in overflow pages of just the right number;
* that each page below ``last_page`` is either in one place of one tree or free, and that the
  counts of entries, pages and levels are true.

Values have no checksums: a changed byte of a value cannot be seen.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from struct import Struct, calcsize, error as StructError, unpack_from  # noqa: N812
from typing import Final, TypeVar

import attrs

K = TypeVar("K", bytes, int)

Read = Callable[[int, int], bytes]
"""``read(length, offset)``: as `File.pread`."""

MAGIC: Final = 0xBEEFC0DE
VERSION: Final = 1
KEY_BYTES_MAX: Final = 511
FINDINGS_MAX: Final = 100
"""After so many the rest of the file is not looked at."""
DATA: Final = b"data"
META: Final = b"meta"
CONSUMERS: Final = b"consumers"
"""Of what a store says of itself, the one value that may be long."""
CONSUMERS_BYTES_MAX: Final = 1 << 21
"""More than `_places.PLACES_BYTES_MAX`: what is longer is not read."""

_WORD: Final = "Q" if calcsize("P") == 8 else "I"
_PAGE: Final = Struct(f"={_WORD}HHHH")
"""Page number, pad, flags, lower, upper."""
_OVERFLOW: Final = Struct(f"={_WORD}HHI")
"""Page number, pad, flags, number of pages."""
_NODE: Final = Struct("=HHHH")
"""Low and high half of a value's length, flags, length of the key."""
_TREE: Final = Struct(f"=IHH{_WORD * 5}")
_HEADER: Final = Struct(f"=II{_WORD * 2}")
_HEADER_END: Final = Struct(f"={_WORD * 2}")
_NUMBER: Final = Struct(f"={_WORD}")
_HEADER_SIZE: Final = _PAGE.size + _HEADER.size + 2 * _TREE.size + _HEADER_END.size
_NO_PAGE: Final = (1 << 8 * _NUMBER.size) - 1

_BRANCH, _LEAF, _OVERFLOWS, _IS_META = 1, 2, 4, 8
_BIG, _SUBTREE = 1, 2
_INTEGER_KEY: Final = 8
_DEPTH_MAX: Final = 32
PAGE_BYTES_MAX: Final = 1 << 15
_PAGE_SIZES: Final = frozenset(1 << n for n in range(8, 16))


class PagesError(Exception):
    """The file is not what it should be at an offset."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(offset, reason)
        self.offset = offset
        self.reason = reason


class PagesVersionError(PagesError):
    """It is LMDB's, of a version that we do not know."""

    def __init__(self, version: int) -> None:
        super().__init__(0, f"LMDB data version {version} is not supported")
        self.version = version


@attrs.frozen
class Tree:
    """A database's record: where its tree is and what it claims to hold."""

    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


@attrs.frozen
class Header:
    """The newest of the two meta pages."""

    page_size: int
    free: Tree
    main: Tree
    last_page: int
    transaction: int
    main_pad: int


@attrs.frozen
class Contents:
    """What was found in a file."""

    findings: tuple[tuple[int, str], ...]
    """(offset, reason)"""
    entries: int
    """Keys of the data."""
    meta: dict[bytes, bytes]
    """What the store says of itself; empty where there was no checkpoint."""


def read_header(read: Read, size: int) -> Header:
    """The header that LMDB would use.

    Raises:
      PagesError: there is none that can be used, or the file is shorter than it says.
      PagesVersionError: both headers are of another version; of one alone, that is damage.
    """
    first, page_size = _read_meta(read, 0)
    if page_size not in _PAGE_SIZES:
        raise PagesError(0, f"the header claims pages of {page_size} bytes")
    second, other_size = _read_meta(read, page_size)
    if other_size != page_size:
        raise PagesError(page_size, "the two headers do not agree on the size of a page")
    for number, header in enumerate((first, second)):
        if header.transaction and header.transaction & 1 != number:
            raise PagesError(number * page_size, "the header stands in the place of the other one")
    if abs(first.transaction - second.transaction) > 1:
        # They are written by turns; one that is older than that would bring old pages back.
        raise PagesError(0, "the two headers are not of two transactions in a row")
    newest = second if first.transaction < second.transaction else first
    at = page_size if newest is second else 0
    if newest.last_page < 1:
        raise PagesError(at, "the header does not count itself")
    needed = (newest.last_page + 1) * page_size
    if needed > size:
        raise PagesError(at, f"the file has {size} bytes of {needed}")
    if newest.free.flags != _INTEGER_KEY or newest.main.flags or newest.main_pad:
        raise PagesError(at, "the header has flags that no store has")
    for name, tree in (("free pages", newest.free), ("databases", newest.main)):
        _check_tree(at, name, tree, newest.last_page)
    return newest


def _read_meta(read: Read, offset: int) -> tuple[Header, int]:
    page = read(_HEADER_SIZE, offset)
    if len(page) < _HEADER_SIZE:
        raise PagesError(offset, "the file is too short for its header")
    number, _, flags, _, _ = _PAGE.unpack_from(page)
    magic, version, _, _ = _HEADER.unpack_from(page, _PAGE.size)
    if magic != MAGIC or flags != _IS_META or number != (offset > 0):
        raise PagesError(offset, "this is no header of LMDB")
    at = _PAGE.size + _HEADER.size
    page_size: int = _TREE.unpack_from(page, at)[0]
    if version != VERSION:
        other = read(_HEADER_SIZE, page_size) if not offset and page_size in _PAGE_SIZES else b""
        if len(other) == _HEADER_SIZE and _HEADER.unpack_from(other, _PAGE.size)[:2] == (
            MAGIC,
            version,
        ):
            raise PagesVersionError(version)
        raise PagesError(offset, f"LMDB data version {version} is not supported")
    free = _tree(page, at)
    main = _tree(page, at + _TREE.size)
    last_page, transaction = _HEADER_END.unpack_from(page, at + 2 * _TREE.size)
    main_pad = _TREE.unpack_from(page, at + _TREE.size)[0]
    return Header(page_size, free, main, last_page, transaction, main_pad), page_size


def _tree(page: bytes, at: int) -> Tree:
    return Tree(*_TREE.unpack_from(page, at)[1:])


def _check_tree(offset: int, name: str, tree: Tree, last_page: int) -> None:
    counts = (tree.depth, tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries)
    if tree.root == _NO_PAGE:
        if any(counts):
            raise PagesError(offset, f"the tree of {name} has no pages and counts some")
    elif not 1 < tree.root <= last_page or not 1 <= tree.depth <= _DEPTH_MAX:
        raise PagesError(offset, f"the tree of {name} has its root nowhere")


def read_meta(read: Read, size: int) -> tuple[Header, dict[bytes, Tree], dict[bytes, bytes]]:
    """The header, the named databases, and what the store says of itself.

    Only the pages of these are looked at, which are a handful.

    Raises:
      PagesError
    """
    walk = _Walk(read, size, None)
    trees, meta = walk.outline()
    if walk.findings:
        raise PagesError(*walk.findings[0])
    return walk.header, trees, meta


def check(read: Read, size: int, tick: Callable[[int], None] | None = None) -> Contents:
    """Everything that the newest header reaches.

    Args:
      tick: called with the bytes of each page that is looked at.

    Raises:
      PagesVersionError
    """
    try:
        walk = _Walk(read, size, tick)
        trees, meta = walk.outline()
        walk.everything(trees)
    except PagesVersionError:
        raise
    except PagesError as exc:
        return Contents(((exc.offset, exc.reason),), 0, {})
    data = trees.get(DATA)
    return Contents(tuple(walk.findings[:FINDINGS_MAX]), 0 if data is None else data.entries, meta)


@attrs.define
class _Counts:
    branch_pages: int = 0
    leaf_pages: int = 0
    overflow_pages: int = 0
    entries: int = 0


Take = Callable[[int, bytes, int, bytes], None]
"""Called with the offset, key, flags and value of an entry; the value of a large one is the number
of its first page, and then its length."""


class _Walk:
    def __init__(self, read: Read, size: int, tick: Callable[[int], None] | None) -> None:
        self.findings: list[tuple[int, str]] = []
        self.header = read_header(read, size)
        self._read = read
        self._tick = tick
        self._page_size = self.header.page_size
        self._used = bytearray(self.header.last_page + 1)
        """1 for each page that was met, or is free."""
        self._used[0] = self._used[1] = 1

    def outline(self) -> tuple[dict[bytes, Tree], dict[bytes, bytes]]:
        trees: dict[bytes, Tree] = {}

        def take_tree(offset: int, key: bytes, flags: int, value: bytes) -> None:
            if flags != _SUBTREE or len(value) != _TREE.size or key not in (DATA, META):
                raise PagesError(offset, "this is no trio-wal store")
            tree = _tree(value, 0)
            if tree.flags or _TREE.unpack(value)[0]:
                raise PagesError(offset, f"the database {key.decode()!r} has flags")
            _check_tree(offset, key.decode(), tree, self.header.last_page)
            trees[key] = tree

        meta: dict[bytes, bytes] = {}

        def take_meta(offset: int, key: bytes, flags: int, value: bytes) -> None:
            if key == CONSUMERS and flags == _BIG:
                first, length = unpack_from(f"={_WORD}I", value)
                if length > CONSUMERS_BYTES_MAX:
                    raise PagesError(offset, f"the places of consumers have {length} bytes")
                value = self._read(length, first * self._page_size + _PAGE.size)
            elif flags or key not in (b"lsn", b"log", b"format", CONSUMERS):
                raise PagesError(offset, "the store says of itself what no store says")
            meta[key] = value

        self._walk("databases", self.header.main, bytes, take_tree)
        if META in trees:
            self._walk("meta", trees[META], bytes, take_meta)
        return trees, meta

    def everything(self, trees: dict[bytes, Tree]) -> None:
        if DATA in trees:
            self._walk("data", trees[DATA], bytes, _take_data)
        free: list[tuple[int, bytes]] = []

        def take_free(offset: int, key: bytes, flags: int, value: bytes) -> None:
            number = int.from_bytes(key, sys.byteorder)
            if flags & ~_BIG or not 0 < number <= self.header.transaction:
                raise PagesError(offset, "the list of free pages is of no transaction")
            if flags:
                first, length = unpack_from(f"={_WORD}I", value)
                value = self._read(length, first * self._page_size + _PAGE.size)
            free.append((offset, value))

        self._walk("free pages", self.header.free, _integer, take_free)
        if not self.findings:
            for offset, value in free:
                self._take_free_pages(offset, value)
        if not self.findings:
            lost = self._used.find(0)
            if lost >= 0:
                self._find(lost * self._page_size, "the page is in no tree and not free either")

    def _find(self, offset: int, reason: str) -> None:
        self.findings.append((offset, reason))

    def _take_free_pages(self, offset: int, value: bytes) -> None:
        """A list: how many, and then their numbers, falling."""
        word = _NUMBER.size
        count = len(value) // word - 1
        if len(value) % word or count < 0 or _NUMBER.unpack_from(value)[0] != count:
            self._find(offset, "the list of free pages is not as long as it says")
            return
        used, last = self._used, self.header.last_page
        before = last + 1
        for number in unpack_from(f"={count}{_WORD}", value, word):
            if not 1 < number < before or used[number]:
                self._find(offset, f"page {number} is called free and is not")
                return
            used[number] = 1
            before = number

    def _claim(self, offset: int, number: int, count: int = 1) -> None:
        """A page belongs to the place at which it was met, and to no other."""
        if not 1 < number <= self.header.last_page - count + 1:
            raise PagesError(offset, f"page {number} is named here and does not exist")
        if 1 in self._used[number : number + count]:
            raise PagesError(offset, f"page {number} is named here and elsewhere")
        self._used[number : number + count] = b"\1" * count

    # -- one tree --

    def _walk(self, name: str, tree: Tree, order: Callable[[bytes], K], take: Take) -> None:
        """Every page of a tree in the order of its keys; ``order`` gives what keys compare by."""
        if tree.root == _NO_PAGE:
            return
        counts = _Counts()
        before = len(self.findings)
        self._visit(tree.root, 1, tree, None, None, order, take, counts, 0)
        if len(self.findings) > before:
            return
        found = (counts.branch_pages, counts.leaf_pages, counts.overflow_pages, counts.entries)
        said = (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries)
        for what, is_, should in zip(
            ("branch pages", "leaf pages", "overflow pages", "entries"), found, said, strict=True
        ):
            if is_ != should:
                reason = f"the tree of {name} has {is_} {what} and says {should}"
                self._find(tree.root * self._page_size, reason)

    def _visit(
        self,
        number: int,
        depth: int,
        tree: Tree,
        low: K | None,
        high: K | None,
        order: Callable[[bytes], K],
        take: Take,
        counts: _Counts,
        parent: int,
    ) -> None:
        if len(self.findings) >= FINDINGS_MAX:
            return
        offset = number * self._page_size
        try:
            self._claim(parent, number)
            page = self._read(self._page_size, offset)
            if self._tick is not None:
                self._tick(self._page_size)
            if len(page) != self._page_size:
                raise PagesError(offset, "the page ends with the file")
            if depth == tree.depth:
                counts.leaf_pages += 1
                self._leaf(page, number, low, high, order, take, counts)
                return
            counts.branch_pages += 1
            children = self._branch(page, number, low, high, order)
        except PagesError as exc:
            self._find(exc.offset, exc.reason)
            return
        except StructError:
            self._find(offset, "the page ends with the file")
            return
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            self._find(offset, f"the page cannot be read: {exc.strerror}")
            return
        for child, child_low, child_high in children:
            self._visit(child, depth + 1, tree, child_low, child_high, order, take, counts, offset)

    def _slots(self, page: bytes, number: int, kind: int) -> tuple[int, ...]:
        """Where the nodes of a page are, in the order of their keys."""
        offset = number * self._page_size
        own, _, flags, lower, upper = _PAGE.unpack_from(page)
        if own != number:
            raise PagesError(offset, f"this is page {own} and not page {number}")
        if flags != kind:
            what = "leaf" if kind == _LEAF else "branch"
            raise PagesError(offset, f"the page is no {what}: its flags are {flags:#x}")
        if not _PAGE.size < lower <= upper <= self._page_size or lower & 1:
            raise PagesError(offset, f"the page's bounds are {lower} and {upper}")
        return unpack_from(f"={(lower - _PAGE.size) // 2}H", page, _PAGE.size)

    def _check_packed(self, offset: int, page: bytes, spans: list[tuple[int, int]]) -> None:
        """Nodes fill the page from ``upper`` to its end: LMDB moves them on that assumption."""
        spans.sort()
        at = _PAGE.unpack_from(page)[4]
        for start, end in spans:
            if start != at:
                raise PagesError(offset + start, "the page's nodes overlap or leave a gap")
            at = end
        if at != self._page_size:
            raise PagesError(offset, "the page's nodes do not end where the page does")

    def _leaf(
        self,
        page: bytes,
        number: int,
        low: K | None,
        high: K | None,
        order: Callable[[bytes], K],
        take: Take,
        counts: _Counts,
    ) -> None:
        offset = number * self._page_size
        size = self._page_size
        unpack = _NODE.unpack_from
        spans: list[tuple[int, int]] = []
        at_least: K | None = low
        strictly = False
        for slot in self._slots(page, number, _LEAF):
            if slot + 8 > size:
                raise PagesError(offset, f"a node lies at {slot}, outside of the page")
            below, above, flags, key_size = unpack(page, slot)
            length = below | above << 16
            key = page[slot + 8 : slot + 8 + key_size]
            end = slot + 8 + key_size + (_NUMBER.size if flags & _BIG else length)
            if end > size or not 0 < key_size <= KEY_BYTES_MAX:
                raise PagesError(offset + slot, "a node reaches out of its page")
            place = order(key)
            if at_least is not None and (place <= at_least if strictly else place < at_least):
                raise PagesError(offset + slot, "the keys are not in order")
            at_least, strictly = place, True
            value = page[slot + 8 + key_size : end]
            if flags & _BIG:
                (first,) = _NUMBER.unpack(value)
                counts.overflow_pages += self._large(offset + slot, first, length)
                value = Struct(f"={_WORD}I").pack(first, length)
            take(offset + slot, key, flags, value)
            spans.append((slot, end + 1 & ~1))
        if high is not None and at_least is not None and at_least >= high:
            raise PagesError(offset, "the keys are not in order")
        self._check_packed(offset, page, spans)
        counts.entries += len(spans)

    def _large(self, offset: int, first: int, length: int) -> int:
        """A value in pages of its own; returns how many."""
        needed = (_PAGE.size - 1 + length) // self._page_size + 1
        self._claim(offset, first, needed)
        own, _, flags, pages = _OVERFLOW.unpack(self._read(_OVERFLOW.size, first * self._page_size))
        if (own, flags, pages) != (first, _OVERFLOWS, needed):
            reason = f"{needed} pages of a value of {length} bytes should begin here"
            raise PagesError(first * self._page_size, reason)
        if self._tick is not None:
            self._tick(needed * self._page_size)
        return needed

    def _branch(
        self, page: bytes, number: int, low: K | None, high: K | None, order: Callable[[bytes], K]
    ) -> list[tuple[int, K | None, K | None]]:
        """(page, first key it may have, first key it may not have) of each child."""
        offset = number * self._page_size
        size = self._page_size
        spans: list[tuple[int, int]] = []
        children: list[int] = []
        bounds: list[K | None] = []
        before = low
        for slot in self._slots(page, number, _BRANCH):
            if slot + 8 > size:
                raise PagesError(offset, f"a node lies at {slot}, outside of the page")
            below, above, flags, key_size = _NODE.unpack_from(page, slot)
            end = slot + 8 + key_size
            if end > size or key_size > KEY_BYTES_MAX:
                raise PagesError(offset + slot, "a node reaches out of its page")
            bound = low
            if children:
                # The first one has no lower bound of its own; LMDB never looks at its key.
                bound = order(page[slot + 8 : end])
                if not key_size or (before is not None and bound <= before):
                    raise PagesError(offset + slot, "the keys are not in order")
                before = bound
            children.append(below | above << 16 | (flags << 32 if _WORD == "Q" else 0))
            bounds.append(bound)
            spans.append((slot, end + 1 & ~1))
        if high is not None and before is not None and before >= high:
            raise PagesError(offset, "the keys are not in order")
        if len(children) < 2 and order is not _integer:
            raise PagesError(offset, "a branch has one child only")
        self._check_packed(offset, page, spans)
        ends = bounds[1:]
        ends.append(high)
        return list(zip(children, bounds, ends, strict=True))


def _integer(key: bytes) -> int:
    """As LMDB orders its free pages: by the number of a transaction."""
    if len(key) != _NUMBER.size:
        raise PagesError(0, "the list of free pages is of no transaction")
    return int.from_bytes(key, sys.byteorder)


def _take_data(offset: int, _key: bytes, flags: int, _value: bytes) -> None:
    if flags & ~_BIG:
        raise PagesError(offset, f"the flags of an entry are {flags:#x}")
