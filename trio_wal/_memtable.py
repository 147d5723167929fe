"""Layers over the store, and views of them.

Law: one event loop, no I/O.  Commits go into the active layer; a checkpoint freezes it, writes
it to the store and drops it.  A view is what a reader needs for its life: the store's read
transaction and the layers above it at one moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Final

from ._base import Readable, ReadTransaction, Unreadable
from ._exceptions import CorruptLogError
from ._layer import Below, Layer, Version

SCAN_CHUNK: Final = 128
SCAN_CHUNK_FIRST: Final = 32
"""Most scans that are left early are left at once."""
NOTHING_NOTED: Final = 4
"""Ranges without a key in the store that are remembered."""
NEWEST: Final = 1 << 62
"""A number that no commit will reach."""


class BaseRead:
    """The store's read transaction, shared by those who began above it."""

    def __init__(self, transaction: ReadTransaction) -> None:
        self.transaction = transaction
        self.get: Callable[[bytes], bytes | None] = transaction.get
        """Its errors are the store's own: whoever calls this and fails calls `explain`."""
        self.explain: Callable[[BaseException], None] = transaction.explain
        self._nothing: deque[tuple[bytes, bytes | None]] = deque(maxlen=NOTHING_NOTED)
        """Ranges in which it has no key: from the first to before the second, None being its end.
        Those that scans met of late."""
        self._users = 0
        self._retired = False

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """As `ReadTransaction.items`; where nothing was found of late it is not asked again: who
        looks for the head of a queue does so all the time."""
        if reverse:
            return self.transaction.items(start, stop, reverse)
        low = start or b""
        for nothing, end in self._nothing:
            if low >= nothing and (end is None or (stop is not None and stop <= end)):
                return iter(())
        found = self.transaction.items(start, stop, reverse)
        first = next(found, None)
        if first is None:
            self._nothing.append((low, stop))
            return found
        if first[0] != low:
            self._nothing.append((low, first[0]))
        return chain((first,), found)

    def beyond_nothing(self, edge: bytes | None) -> bytes | None:
        """The first key at or after ``edge``, if that is known; otherwise ``edge``."""
        low = edge or b""
        for nothing, end in self._nothing:
            if end is not None and nothing <= low < end:
                return end
        return edge

    def pin(self) -> None:
        self._users += 1

    def unpin(self) -> None:
        self._users -= 1
        self._close_if_unused()

    def retire(self) -> None:
        """A newer one has taken its place."""
        self._retired = True
        self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._retired and not self._users:
            self.transaction.close()


class View:
    """The store and the layers above it at one moment; shared and immutable.

    The layers may get versions that its readers do not see; their keys in order and their
    gaps are those of the moment when nobody had read it yet, and fresh keys.
    """

    __slots__ = ("_levels", "active", "base", "frozen")

    def __init__(self, base: BaseRead, frozen: Layer | None, active: Layer) -> None:
        self.base: BaseRead = base
        self.frozen: Layer | None = frozen
        self.active: Layer = active
        self._levels = (
            (active.level,) if frozen is None else (active.level, frozen.level)
        )  # from the top

    def version(self, key: bytes, seq: int) -> Version | None:
        """The newest version not newer than ``seq``; None: ask the store."""
        version = self.active.versions.get(key)
        while version is not None and version.seq > seq:
            version = version.older
        if version is None and self.frozen is not None:
            version = self.frozen.versions.get(key)
            while version is not None and version.seq > seq:
                version = version.older
        return version

    def get(self, key: bytes, seq: int) -> bytes | None:
        version = self.version(key, seq)
        if version is not None:
            return version.value
        try:
            return self.base.get(key)
        except Exception as exc:
            self.base.explain(exc)
            raise

    def layers(self) -> tuple[Layer, ...]:
        return (self.active,) if self.frozen is None else (self.active, self.frozen)

    def scan(
        self,
        seq: int,
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        observe: Callable[[bytes, int], None] | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Keys and values at ``seq`` in order: store and layers merged; ``observe`` is told
        of each version in a layer that is seen, by its key and number, but for those that are
        settled and deleted.

        Layers may change between two steps: their keys are taken in chunks, and each
        chunk looks them up anew.
        """
        edges = self._edges(stop if reverse else start, reverse)
        read = self.base.items
        base = read(start, edges[-1], True) if reverse else read(edges[-1], stop, False)
        base_item = next(base, None)
        size = min(SCAN_CHUNK_FIRST, SCAN_CHUNK)
        while True:
            keys, jumps = self._chunk(edges, start, stop, reverse, size)
            for key in keys:
                while base_item is not None and (
                    base_item[0] > key if reverse else base_item[0] < key
                ):
                    yield base_item
                    base_item = next(base, None)
                # Not before: while it yields, a commit may be withdrawn.
                version = self.version(key, seq)
                if version is None:
                    # Only newer versions here: what the store has, if anything, stands.
                    continue
                if observe is not None:
                    observe(key, version.seq)
                if base_item is not None and base_item[0] == key:
                    base_item = next(base, None)
                if jumps and key in jumps and self._jump(edges, jumps[key], reverse):
                    edge = edges[-1]
                    assert edge is not None
                    if base_item is not None and (
                        base_item[0] >= edge if reverse else base_item[0] < edge
                    ):
                        base = read(start, edge, True) if reverse else read(edge, stop, False)
                        base_item = next(base, None)
                if version.value is not None:
                    yield key, version.value
            if len(keys) < size:
                break
            self._advance(edges, keys[-1] if reverse else keys[-1] + b"\0", reverse)
            size = min(4 * size, SCAN_CHUNK)
        while base_item is not None:
            yield base_item
            base_item = next(base, None)

    def _edges(self, edge: bytes | None, reverse: bool) -> list[bytes | None]:
        """Where a scan begins in each layer, and then in the store: below a layer, not within
        one of its gaps."""
        edges = [edge]
        for _, gaps in self._levels:
            if gaps:
                edge = gaps.beyond(edge, reverse)
            edges.append(edge)
        while not reverse and (first := self.base.beyond_nothing(edge)) != edge:
            # The key that is there may be deleted, and what follows it.
            edge = first
            for _, gaps in self._levels:
                edge = gaps.beyond(edge, reverse)
            edges[-1] = edge
        return edges

    def _chunk(
        self,
        edges: list[bytes | None],
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        size: int,
    ) -> tuple[list[bytes], dict[bytes, list[tuple[int, bytes]]]]:
        """The next keys of all layers, in order, without repetition; and of those at which
        gaps begin, whose they are and where they end."""
        found: set[bytes] = set()
        jumps: dict[bytes, list[tuple[int, bytes]]] = {}
        for place, (order, gaps) in enumerate(self._levels):
            low, high = (start, edges[place]) if reverse else (edges[place], stop)
            found.update(islice(order.between(low, high, reverse=reverse), size))
            if gaps:
                for first, last in islice(gaps.between(low, high, reverse), size):
                    key, end = (last, first) if reverse else (first, last + b"\0")
                    found.add(key)
                    if first != last:
                        jumps.setdefault(key, []).append((place, end))
        return sorted(found, reverse=reverse)[:size], jumps

    def _jump(
        self, edges: list[bytes | None], gaps: list[tuple[int, bytes]], reverse: bool
    ) -> bool:
        """What is below the layers whose gaps these are goes on at their ends; returns whether
        the store does."""
        before = edges[-1]
        for place, end in gaps:
            edge: bytes | None = end
            for below in range(place + 1, len(edges)):
                edge = edges[below] = _further(edges[below], edge, reverse)
                if below < len(self._levels):
                    edge = self._levels[below][1].beyond(edge, reverse)
        return edges[-1] != before

    def _advance(self, edges: list[bytes | None], edge: bytes, reverse: bool) -> None:
        for place in range(len(self._levels)):
            edges[place] = _further(edges[place], edge, reverse)


def _further(one: bytes | None, other: bytes | None, reverse: bool) -> bytes | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other) if reverse else max(one, other)


class _BelowActive:
    """The frozen layer over the store, in their newest state."""

    def __init__(self, base: BaseRead, frozen: Layer) -> None:
        self._view = View(base, None, frozen)

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        return self._view.scan(NEWEST, start, stop, reverse)

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        before = next(self.items(None, key, True), None)
        after = next(self.items(key + b"\0", None, False), None)
        return (
            None if before is None else before[0],
            self._view.get(key, NEWEST) is not None,
            None if after is None else after[0],
        )


class Memtable:
    """The current view, and how it changes."""

    def __init__(self, store: Readable) -> None:
        self._store = store
        self.view: View = View(BaseRead(store.read()), None, Layer())

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.view.layers())

    def freeze(self) -> Layer:
        """What is here becomes the frozen layer; commits go into a new one."""
        view = self.view
        assert view.frozen is None
        view.active.freeze()
        self.view = View(view.base, view.active, Layer())
        return view.active

    def renew(self) -> None:
        """Keys of a layer were sorted, or are gone from its order: whoever begins to read now
        shall read those of this moment."""
        view = self.view
        self.view = View(view.base, view.frozen, view.active)

    def below(self, layer: Layer) -> Below:
        """What is under a layer of the current view."""
        view = self.view
        if view.frozen is None or layer is view.frozen:
            return view.base.transaction
        return _BelowActive(view.base, view.frozen)

    def drop_frozen(self) -> None:
        """The store holds the frozen layer now."""
        view = self.view
        self.view = View(self._read(), None, view.active)
        view.base.retire()

    def reopen_base(self, between: Callable[[], None]) -> None:
        """Do something while the store is not being read."""
        view = self.view
        view.base.retire()
        try:
            between()
        finally:
            self.view = View(self._read(), view.frozen, view.active)

    def _read(self) -> BaseRead:
        """What the layers do not have comes from here; where it cannot be had, each read says so,
        until the next time that this is tried."""
        try:
            return BaseRead(self._store.read())
        except (OSError, CorruptLogError) as exc:
            return BaseRead(Unreadable(exc))

    def close(self) -> None:
        view = self.view
        self.view = View(view.base, None, Layer())
        view.base.retire()
