"""Versions of what is not yet in the store, and views of them.

Law: one event loop, no I/O.  Every committed write has a sequence number (the order of
commits, which is the order of the log); a reader has one too and sees nothing newer.  A
version is pending while its number is above that of the newest settled commit.

A layer maps a key to its newest version, which links to older ones as long as somebody
may need them: the newest durable one while newer ones are pending, and all of them while
a transaction or snapshot is open.  Commits go into the active layer; a checkpoint freezes
it, writes it to the store and drops it.  A view is what a reader needs for its life:
the store's read transaction and the layers above it at one moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

import msgspec

from ._exceptions import CorruptLogError
from ._operations import Writes
from ._order import RUN_KEYS, SortedKeys
from ._store import ReadTransaction, Store, Unreadable

VERSION_OVERHEAD: Final = 200
"""Bytes that a version costs beside its key and value: measured, CPython 3.11."""
SCAN_CHUNK: Final = 128


class Version(msgspec.Struct, eq=False, gc=False):
    """One value of a key.

    A msgspec struct, because every commit makes one for each of its keys: a third of the
    price of a class of our own, and nothing that the garbage collector would have to walk
    through.  Chains of versions have no cycles.
    """

    seq: int
    value: bytes | None
    """None: deleted."""
    before: tuple[Version] | None
    """The one it replaced.  In a tuple, because a chain may come to millions of versions, and
    tuples are freed one after the other, where such structs would free each other recursively,
    until the stack ends."""

    @property
    def older(self) -> Version | None:
        return None if self.before is None else self.before[0]

    @property
    def bytes(self) -> int:
        """Estimated memory, without the key."""
        return VERSION_OVERHEAD + (0 if self.value is None else len(self.value))


class Layer:
    """Newest versions by key, and the keys in order."""

    __slots__ = ("_replacing", "bytes", "keys", "last_lsn", "last_seq", "log_bytes", "versions")

    def __init__(self) -> None:
        self.versions: dict[bytes, Version] = {}
        self.bytes: int = 0
        """Estimated memory."""
        self.log_bytes: int = 0
        """Of the transactions in it, as they stand in the log."""
        self.last_seq: int = 0
        self.last_lsn: int = 0
        """Of its newest durable commit; 0 where there is none."""
        self.keys: SortedKeys = SortedKeys()
        """Some may be gone from ``versions`` again."""
        self._replacing: deque[Version] = deque()
        """Pending versions with an older one behind them, in the order of commits; some may
        have been withdrawn."""

    def add(self, writes: Writes, seq: int, settled_seq: int, keep_older: bool) -> None:
        """The versions of a commit."""
        versions = self.versions
        self.last_seq = seq
        fresh = self.keys.fresh
        size = 0
        for key, value in writes.items():
            older = versions.get(key)
            if older is None:
                versions[key] = Version(seq, value, None)
                fresh.append(key)
                size += len(key)
            else:
                if older.seq <= settled_seq and older.before is not None and not keep_older:
                    # Somebody who has left since had kept it.
                    self.forget_older(older)
                version = versions[key] = Version(seq, value, (older,))
                self._replacing.append(version)
            # As `Version.bytes`.
            size += VERSION_OVERHEAD if value is None else VERSION_OVERHEAD + len(value)
        self.bytes += size
        if len(fresh) >= RUN_KEYS:
            self.keys.tidy()

    def settle(self, seq: int, keep_older: bool) -> None:
        """Commits up to ``seq`` are settled: nobody who begins to read now needs what they
        replaced."""
        replacing = self._replacing
        while replacing and replacing[0].seq <= seq:
            version = replacing.popleft()
            if version.before is not None and not keep_older:
                self.forget_older(version)

    def items(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Keys in order with their newest values, None where it was deleted; of a layer
        that nothing is written to any more, also in another thread."""
        versions = self.versions
        for key in self.keys.between(None, None, reverse=False):
            version = versions.get(key)
            if version is not None:
                yield key, version.value

    def remove(self, writes: Writes, seq: int) -> None:
        """A pending commit was withdrawn: its versions are gone."""
        for key in writes:
            removed = self.versions[key]
            if removed.seq == seq:
                if removed.older is None:
                    # Its place in the order stays: harmless, and sorted lists delete slowly.
                    del self.versions[key]
                    self.bytes -= len(key)
                else:
                    self.versions[key] = removed.older
            else:
                newer = removed
                while removed.seq > seq:
                    assert removed.older is not None
                    newer, removed = removed, removed.older
                assert removed.seq == seq
                newer.before = removed.before
            removed.before = None
            self.bytes -= removed.bytes
        # The others stand before one that is still pending: no more of them than of those.
        while self._replacing and self._replacing[-1].before is None:
            self._replacing.pop()

    def forget_older(self, version: Version) -> None:
        """Nobody needs any more what a version replaced."""
        before, version.before = version.before, None
        size = 0
        while before is not None:
            # As `Version.bytes`.
            value = before[0].value
            size += VERSION_OVERHEAD if value is None else VERSION_OVERHEAD + len(value)
            before = before[0].before
        self.bytes -= size

    def changed_since(self, seq: int, start: bytes | None, stop: bytes | None) -> bytes | None:
        """A key of the range with a version newer than ``seq``, or None."""
        if self.last_seq <= seq:
            return None
        versions = self.versions
        for key in self.keys.between(start, stop, reverse=False):
            version = versions.get(key)
            if version is not None and version.seq > seq:
                return key
        return None


class BaseRead:
    """The store's read transaction, shared by those who began above it."""

    def __init__(self, transaction: ReadTransaction) -> None:
        self.transaction = transaction
        self.get: Callable[[bytes], bytes | None] = transaction.get
        """Its errors are the store's own: whoever calls this and fails calls `explain`."""
        self.explain: Callable[[BaseException], None] = transaction.explain
        self._users = 0
        self._retired = False

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
    """The store and the layers above it at one moment; shared and immutable."""

    __slots__ = ("active", "base", "frozen")

    def __init__(self, base: BaseRead, frozen: Layer | None, active: Layer) -> None:
        self.base: BaseRead = base
        self.frozen: Layer | None = frozen
        self.active: Layer = active

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
        of each version in a layer that is seen, by its key and number.

        Layers may change between two steps: their keys are taken in chunks, and each
        chunk looks them up anew.
        """
        base = self.base.transaction.items(start, stop, reverse)
        base_item = next(base, None)
        low, high = start, stop
        while True:
            keys = self._layer_keys(low, high, reverse)
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
                if version.value is not None:
                    yield key, version.value
            if len(keys) < SCAN_CHUNK:
                break
            if reverse:
                high = keys[-1]
            else:
                low = keys[-1] + b"\0"
        while base_item is not None:
            yield base_item
            base_item = next(base, None)

    def _layer_keys(self, low: bytes | None, high: bytes | None, reverse: bool) -> list[bytes]:
        """The next keys of all layers, in order, without repetition."""
        found: set[bytes] = set()
        for layer in self.layers():
            found.update(islice(layer.keys.between(low, high, reverse=reverse), SCAN_CHUNK))
        return sorted(found, reverse=reverse)[:SCAN_CHUNK]


class Memtable:
    """The current view, and how it changes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.view: View = View(BaseRead(store.read()), None, Layer())

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.view.layers())

    def freeze(self) -> Layer:
        """What is here becomes the frozen layer; commits go into a new one."""
        view = self.view
        assert view.frozen is None
        # From here on the order is read in two threads.
        view.active.keys.tidy()
        self.view = View(view.base, view.active, Layer())
        return view.active

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
