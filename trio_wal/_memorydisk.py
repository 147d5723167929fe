"""What a disk in memory holds, and what a loss of power leaves of it; for `trio_wal.testing`.

Law: values, which know no faults, counts or clocks.  Each says apart what programs see and what is
durable, and nothing gets from the one to the other but by a sync.  Everything random comes from
the caller.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

from ._base import StoreState
from ._files import NO_WORD, Word
from ._order import SortedKeys

SECTOR: Final = 512
"""What a disk writes whole or not at all, or tears: the unit of damage."""


@attrs.define(eq=False)
class Inode:
    """One file: what programs see, and what is on the disk.

    Either is immutable `bytes` once crash images share it, and becomes a `bytearray` of its
    own again when it is written to.
    """

    data: bytes | bytearray = b""
    disk: bytes | bytearray = b""
    dirty: set[int] = attrs.Factory(set[int])

    def _writable(self) -> bytearray:
        data = self.data
        if not isinstance(data, bytearray):
            data = self.data = bytearray(data)
        return data

    def write(self, data: bytes, offset: int) -> None:
        mine = self._writable()
        end = offset + len(data)
        if end > len(mine):
            mine.extend(bytes(end - len(mine)))
        mine[offset:end] = data
        self.dirty.update(range(offset // SECTOR, -(-end // SECTOR)))

    def resize(self, size: int) -> None:
        mine = self._writable()
        have = len(mine)
        if size < have:
            del mine[size:]
        else:
            mine.extend(bytes(size - have))
        self.dirty.update(range(min(size, have) // SECTOR, -(-max(size, have) // SECTOR)))

    def sync(self) -> None:
        data, disk = self.data, self.disk
        size = len(data)
        if len(self.dirty) * SECTOR >= max(size, len(disk), 1):
            # All of it: as a new file's.
            self.disk = bytes(data)
            self.dirty.clear()
        elif self.dirty or len(disk) != size:
            if not isinstance(disk, bytearray):
                disk = self.disk = bytearray(disk)
            del disk[size:]
            disk.extend(bytes(size - len(disk)))
            for sector in self.dirty:
                start = sector * SECTOR
                disk[start : start + SECTOR] = data[start : start + SECTOR]
            del disk[size:]
            self.dirty.clear()

    def flip(self, bit: int) -> None:
        """On the disk and in the cache."""
        self.disk, self.data = (
            _flipped(data, bit) if bit // 8 < len(data) else data for data in (self.disk, self.data)
        )

    def share(self) -> None:
        """From here on crash images may hold what this file does."""
        self.data = bytes(self.data)
        self.disk = bytes(self.disk)

    def after_power_loss(self, rng: random.Random, freed: Sequence[bytes]) -> Inode:
        """The disk, with each sector that was not synced lost, kept, torn, garbage, or what
        a deleted file has left there."""
        self.share()
        size = rng.choice((len(self.disk), len(self.data)))
        # Few crashes damage every sector in its own way: often all share one fate.
        fates = rng.choice(_FATES)
        disk = bytearray(self.disk[:size])
        disk.extend(bytes(size - len(disk)))
        for sector in sorted(self.dirty):
            start = sector * SECTOR
            new = bytes(self.data[start : start + SECTOR]).ljust(SECTOR, b"\0")
            old = bytes(disk[start : start + SECTOR]).ljust(SECTOR, b"\0")
            fate = rng.choice(fates)
            if new == old or fate == "lost":
                continue
            if fate == "torn":
                cut = rng.randrange(SECTOR)
                new = new[:cut] + old[cut:]
            elif fate == "garbage":
                new = rng.randbytes(SECTOR)
            elif fate == "stale":
                left = rng.choice(freed) if freed else b""
                at = start if rng.random() < 0.5 else rng.randrange(0, len(left) + 1, SECTOR)
                new = left[at : at + SECTOR].ljust(SECTOR, b"\0")
            disk[start : start + SECTOR] = new[: max(0, min(SECTOR, size - start))]
        left_over = bytes(disk)
        return Inode(left_over, left_over)

    def copy(self) -> Inode:
        self.share()
        return Inode(self.data, self.disk, self.dirty.copy())


_FATES: Final = (
    ("lost",),
    ("kept",),
    ("lost", "kept"),
    ("lost", "kept", "torn", "garbage", "stale"),
)


def _flipped(data: bytes | bytearray, bit: int) -> bytes:
    at = bit // 8
    return b"".join((data[:at], bytes((data[at] ^ 1 << bit % 8,)), data[at + 1 :]))


@attrs.frozen(eq=False)
class Change:
    """One change of a directory's names: ``old`` becomes ``new`` (None: is created; is gone)."""

    old: str | None
    new: str | None
    inode: Inode | None = None

    def apply(self, names: dict[str, Inode]) -> None:
        inode = self.inode if self.old is None else names.pop(self.old, None)
        if self.new is not None and inode is not None:
            names[self.new] = inode


@attrs.define(eq=False)
class Folder:
    """One directory: its names now, on the disk, and what is not yet synced, in order."""

    names: dict[str, Inode] = attrs.Factory(dict[str, Inode])
    disk: dict[str, Inode] = attrs.Factory(dict[str, Inode])
    pending: list[Change] = attrs.Factory(list[Change])
    owner: object = None
    published: Word = NO_WORD
    words: list[Word] = attrs.Factory(lambda: [NO_WORD])
    """All that were published: any of them may be on the disk, for none is synced."""

    def change(self, change: Change) -> None:
        change.apply(self.names)
        self.pending.append(change)

    def sync(self) -> None:
        self.disk = dict(self.names)
        self.pending.clear()


@attrs.define(eq=False)
class StoreImage:
    """A database's store: what is durable of it."""

    items: dict[bytes, bytes] = attrs.Factory(dict[bytes, bytes])
    state: StoreState | None = None

    def copy(self) -> StoreImage:
        return StoreImage(self.items.copy(), self.state)


class MemoryRead:
    """A store at one moment."""

    def __init__(self, items: dict[bytes, bytes]) -> None:
        self._items = items
        self._order: SortedKeys | None = None

    def get(self, key: bytes) -> bytes | None:
        return self._items.get(key)

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        if self._order is None:
            self._order = SortedKeys(self._items)
        for key in self._order.between(start, stop, reverse=reverse):
            yield key, self._items[key]

    def explain(self, exc: BaseException) -> None:
        pass

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        before = next(self.items(None, key, True), None)
        after = next(self.items(key + b"\0", None, False), None)
        return (
            None if before is None else before[0],
            key in self._items,
            None if after is None else after[0],
        )

    def close(self) -> None:
        pass
