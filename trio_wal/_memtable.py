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

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from typing import Final, Protocol

import msgspec

from ._base import Readable, ReadTransaction, Unreadable
from ._exceptions import CorruptLogError
from ._operations import Writes
from ._order import RUN_KEYS, RUN_KEYS_READ, Gaps, Order, SortedKeys

VERSION_OVERHEAD: Final = 200
"""Bytes that a version costs beside its key and value: measured, CPython 3.11."""
SCAN_CHUNK: Final = 128
SCAN_CHUNK_FIRST: Final = 32
"""Most scans that are left early are left at once."""
BURIED_TOGETHER: Final = 32
"""Deletions that are waited for: they cost less together, and scans step over them meanwhile."""
BURIED_AT_ONCE: Final = 1024
"""Of a larger transaction the rest follows bit by bit: this takes 2 to 10 milliseconds."""
DELETIONS_NOTED: Final = 512
"""Deletions that are remembered, and forgotten, together."""
NEWEST: Final = 1 << 62
"""A number that no commit will reach."""


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


class Below(Protocol):
    """What is under a layer, in its newest state."""

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        """The key before, whether this one is there, and the key after it."""
        ...

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]: ...


class Deletions:
    """Keys whose deletion was settled while somebody was reading."""

    __slots__ = ("keys", "last_seq", "sorted")

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.last_seq: int = 0
        self.sorted: bool = True


class Layer:
    """Newest versions by key, and the keys in order.

    Invariants, of every key that has a version:
      * it is either in ``keys`` or in ``_buried``, and only one whose newest version is a
        settled deletion is in the latter;
      * where it is buried and there is something under this layer that it hides, it stands in
        a gap;
    and of every gap: what is under this layer has no key in it but those that have a version
    here, which every reader of a view with this gap sees.

    So a scan need not look at what is buried, only jump over gaps; and whatever is put into
    one later changes nothing of it.
    """

    __slots__ = (
        "_buried",
        "_deletions",
        "_dying",
        "_gaps",
        "_hidden",
        "_level",
        "_replacing",
        "bytes",
        "keys",
        "last_lsn",
        "last_seq",
        "log_bytes",
        "versions",
    )

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
        """Without those that are buried."""
        self._replacing: deque[Version] = deque()
        """Pending versions with an older one behind them, in the order of commits; some may
        have been withdrawn."""
        self._dying: deque[tuple[int, bytes]] = deque()
        """Deletions that are not settled, in the order of commits; some may have been
        withdrawn or replaced."""
        self._buried: set[bytes] = set()
        self._hidden: SortedKeys = SortedKeys()
        """Those that hide something under this layer, for the checkpoint; some have been
        written again since, or come twice."""
        self._gaps: Gaps = Gaps()
        self._deletions: deque[Deletions] = deque()
        """In the order of commits, as long as those who were reading then are."""
        self._level: tuple[Order, Gaps] | None = None

    @property
    def level(self) -> tuple[Order, Gaps]:
        """For views: the keys and gaps of this moment, which nobody changes any more."""
        if self._level is None:
            self._level = self.keys.order, self._gaps.copy()
        return self._level

    def add(self, writes: Writes, seq: int, settled_seq: int, keep_older: bool) -> bool:
        """The versions of a commit; returns whether views must be made anew."""
        versions = self.versions
        self.last_seq = seq
        keys = self.keys
        renew = False
        if len(writes) >= RUN_KEYS_READ:
            # Who reads now need not skip them all.
            keys.tidy()
            self._level = None
            renew = True
        fresh = keys.fresh
        size = 0
        for key, value in writes.items():
            older = versions.get(key)
            if older is None:
                versions[key] = Version(seq, value, None)
                if keys.stale and key in keys.stale:
                    keys.stale.remove(key)
                else:
                    fresh.append(key)
                size += len(key)
            else:
                if older.value is None and key in self._buried:
                    self._buried.remove(key)
                    if key in keys.stale:
                        keys.stale.remove(key)
                    else:
                        fresh.append(key)
                if older.seq <= settled_seq and older.before is not None and not keep_older:
                    # Somebody who has left since had kept it.
                    self.forget_older(older)
                version = versions[key] = Version(seq, value, (older,))
                self._replacing.append(version)
            # As `Version.bytes`.
            if value is None:
                size += VERSION_OVERHEAD
                self._dying.append((seq, key))
            else:
                size += VERSION_OVERHEAD + len(value)
        self.bytes += size
        if len(fresh) >= RUN_KEYS_READ and (keep_older or len(fresh) >= RUN_KEYS):
            keys.tidy(RUN_KEYS_READ // 2)
            self._level = None
            return True
        return renew

    def settle(self, seq: int, oldest: int | None, below: Callable[[Layer], Below]) -> bool:
        """Commits up to ``seq`` are settled: nobody who begins to read now needs what they
        replaced.

        Args:
          oldest: what the one reads who has been reading for longest; None: nobody reads.
          below: gives what is under this layer.

        Returns whether views must be made anew.
        """
        replacing = self._replacing
        while replacing and replacing[0].seq <= seq:
            version = replacing.popleft()
            if version.before is not None and oldest is None:
                self.forget_older(version)
        if self._deletions and (oldest is None or self._deletions[0].last_seq <= oldest):
            self._forget_deletions(oldest)
        if len(self._dying) >= BURIED_TOGETHER and self.dead(seq):
            return self._bury(seq, oldest is not None, below(self))
        return False

    # -- what is deleted --

    def dead(self, seq: int) -> bool:
        """Whether there are deletions to be buried, now that commits up to ``seq`` are settled."""
        return len(self._dying) >= BURIED_TOGETHER and self._dying[0][0] <= seq

    def _bury(self, seq: int, reading: bool, below: Below) -> bool:
        """Deletions are settled: scans shall not meet them any more."""
        versions, dying = self.versions, self._dying
        found: set[bytes] = set()
        for _ in range(BURIED_AT_ONCE):
            if not dying or dying[0][0] > seq:
                break
            key = dying.popleft()[1]
            version = versions.get(key)
            if version is not None and version.value is None and version.seq <= seq:
                found.add(key)
        found -= self._buried
        if not found:
            return False
        keys = sorted(found)
        try:
            hiding = self._widen_gaps(keys, below)
        except (OSError, CorruptLogError):
            # The store cannot be read: they stay where scans find them.
            return False
        self.keys.discard(keys)
        self._level = None
        if hiding:
            self._hidden.fresh += hiding
            if len(self._hidden.fresh) >= RUN_KEYS:
                self._hidden.tidy()
        if reading:
            # They may see what was there before, and must know that it changed.
            self._buried.update(keys)
            self._note_deletions(keys, seq)
        else:
            self._buried.update(hiding)
            for key in found.difference(hiding):
                self._drop(key)
        return True

    def _drop(self, key: bytes) -> None:
        """There is nothing to hide, and nobody to see what was there before."""
        version = self.versions.pop(key)
        if version.before is not None:
            self.forget_older(version)
        self.bytes -= len(key) + VERSION_OVERHEAD

    def _widen_gaps(self, keys: list[bytes], below: Below) -> list[bytes]:
        """Make gaps of those keys, which are sorted, that hide something; returns these."""
        gaps = self._gaps
        hiding: list[bytes] = []
        place, count = 0, len(keys)
        while place < count:
            first = last = keys[place]
            place += 1
            before, there, after = below.neighbours(first)
            if not there:
                continue
            hiding.append(first)
            if gaps.around(first) is not None:
                continue
            # What comes next, as long as it is deleted too.
            following: Iterator[tuple[bytes, bytes]] | None = None
            while after is not None:
                while place < count and keys[place] < after:
                    place += 1
                if place < count and keys[place] == after:
                    hiding.append(last := after)
                    place += 1
                    if following is None:
                        following = below.items(last + b"\0", None, False)
                elif (gap := gaps.around(after)) is not None:
                    last = gap[1]
                    while place < count and keys[place] <= last:
                        if below.neighbours(keys[place])[1]:
                            hiding.append(keys[place])
                        place += 1
                    following = below.items(last + b"\0", None, False)
                else:
                    break
                item = next(following, None)
                after = None if item is None else item[0]
            if before is not None and (gap := gaps.around(before)) is not None:
                first = gap[0]
            gaps.put(first, last)
        return hiding

    def _note_deletions(self, keys: list[bytes], seq: int) -> None:
        if not self._deletions or len(self._deletions[-1].keys) >= DELETIONS_NOTED:
            self._deletions.append(Deletions())
        newest = self._deletions[-1]
        newest.sorted = not newest.keys
        newest.keys += keys
        newest.last_seq = seq

    def _forget_deletions(self, oldest: int | None) -> None:
        """Who was reading then has left."""
        while self._deletions and (oldest is None or self._deletions[0].last_seq <= oldest):
            for key in self._deletions.popleft().keys:
                version = self.versions.get(key)
                if (
                    version is not None
                    and key in self._buried
                    and (oldest is None or version.seq <= oldest)
                    and self._gaps.around(key) is None
                ):
                    self._buried.remove(key)
                    self._drop(key)

    # -- the whole --

    def freeze(self) -> None:
        """No more commits come; from here on the order is read in two threads."""
        self.keys.tidy()
        self._level = None

    def items(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Keys in order with their newest values, None where it was deleted; of a layer
        that is frozen and has no pending commits any more, also in another thread."""
        versions = self.versions
        order = self.keys.order
        # Runs, and what has come since: sorted here, as nobody else reads it.
        hidden = self._hidden.order
        merged = heapq.merge(
            order.between(None, None, reverse=False), hidden.between(None, None, reverse=False)
        )
        for key, _ in groupby(merged):
            version = versions.get(key)
            if version is not None:
                yield key, version.value

    def remove(self, writes: Writes, seq: int, settled_seq: int) -> bool:
        """A pending commit was withdrawn: its versions are gone.  Returns whether views must
        be made anew."""
        gone: list[bytes] = []
        for key in writes:
            removed = self.versions[key]
            if removed.seq == seq:
                older = removed.older
                if older is None:
                    del self.versions[key]
                    self.bytes -= len(key)
                    gone.append(key)
                else:
                    self.versions[key] = older
                    if older.value is None and older.seq <= settled_seq:
                        # To be buried again.
                        self._dying.appendleft((older.seq, key))
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
        while self._dying and not self._has(*self._dying[-1]):
            self._dying.pop()
        if gone:
            self.keys.discard(sorted(gone))
            self._level = None
        return bool(gone)

    def _has(self, seq: int, key: bytes) -> bool:
        """Whether a key has a version of this number."""
        version = self.versions.get(key)
        while version is not None and version.seq > seq:
            version = version.older
        return version is not None and version.seq == seq

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
        for deletions in reversed(self._deletions):
            if deletions.last_seq <= seq:
                break
            keys = deletions.keys
            if not deletions.sorted:
                keys.sort()
                deletions.sorted = True
            for place in range(0 if start is None else bisect_left(keys, start), len(keys)):
                key = keys[place]
                if stop is not None and key >= stop:
                    break
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
        read = self.base.transaction.items
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
