"""One layer of the memtable: the versions of its keys, and the keys in order.

Law: one event loop, no I/O but the few looks below that a deletion takes.  Every committed
write has a sequence number (the order of commits, which is the order of the log); a reader has
one too and sees nothing newer.  A version is pending while its number is above that of the
newest settled commit.

A layer maps a key to its newest version, which links to older ones as long as somebody
may need them: the newest durable one while newer ones are pending, and all of them while
a transaction or snapshot is open.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from itertools import groupby, repeat
from typing import Final, Protocol

import msgspec

from ._exceptions import CorruptLogError
from ._operations import Writes
from ._order import RUN_KEYS, RUN_KEYS_READ, Gaps, Order, SortedKeys
from ._places import Place

VERSION_OVERHEAD: Final = 200
"""Bytes that a version costs beside its key and value: measured, CPython 3.11."""
BURIED_TOGETHER: Final = 32
"""Deletions that are waited for: they cost less together, and scans step over them meanwhile."""
BURIED_AT_ONCE: Final = 1024
"""Of a larger transaction the rest follows bit by bit: this takes 2 to 10 milliseconds."""
MANY_BYTES: Final = 4 * RUN_KEYS_READ
"""A commit with fewer bytes has fewer writes than `RUN_KEYS_READ`: the shortest write, the deletion
of a key of one byte, takes four."""
DELETIONS_NOTED: Final = 512
"""Deletions that are remembered, and forgotten, together."""


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
        "acknowledged_lsn",
        "bytes",
        "commit_lsn",
        "keys",
        "last_lsn",
        "last_seq",
        "log_bytes",
        "places",
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
        self.places: dict[str, Place | None] = {}
        """Of consumers that its durable commits have moved; None: dropped."""
        self.acknowledged_lsn: int = 0
        """Of its newest durable commit that does nothing else; 0 where there is none."""
        self.commit_lsn: int = 0
        """Of the newest one before that that does more."""
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

    def make_way(self, writes: Writes) -> bool:
        """Those who read now need not skip the keys of a large commit; returns whether views must
        be made anew."""
        if len(writes) < RUN_KEYS_READ:
            return False
        self.keys.tidy()
        self._level = None
        return True

    def add(self, writes: Writes, seq: int, settled_seq: int, keep_older: object) -> bool:
        """The versions of a commit; returns whether views must be made anew.  Before one of
        `MANY_BYTES` and more comes `make_way`.

        Args:
          keep_older: true where somebody reads, as a collection of those who do is.
        """
        versions = self.versions
        self.last_seq = seq
        keys = self.keys
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
        return False

    def add_settled(self, keys: list[bytes], values: list[bytes], first_seq: int) -> bool | None:
        """What `add` and `settle` make of as many settled commits, each of which puts one of these
        keys, where nobody reads; returns whether views must be made anew, or None: nothing was
        done, because one of the keys may stand among the buried ones, or the stale.
        """
        order = self.keys
        if not self._buried.isdisjoint(keys) or not order.stale.isdisjoint(keys):
            return None
        versions = self.versions
        numbers = range(first_seq, first_seq + len(keys))
        made = dict(zip(keys, map(Version, numbers, values, repeat(None)), strict=False))
        if len(made) == len(keys) and versions.keys().isdisjoint(keys):
            order.fresh += keys
            self.bytes += sum(map(len, keys)) + sum(map(len, values))
        else:
            for key, version in made.items():
                older = versions.get(key)
                if older is None:
                    order.fresh.append(key)
                    self.bytes += len(key)
                else:
                    self.forget_older(older)
                    self.bytes -= older.bytes
                self.bytes += version.bytes - VERSION_OVERHEAD
        self.bytes += VERSION_OVERHEAD * len(made)
        versions.update(made)
        self.last_seq = numbers[-1]
        if len(order.fresh) >= RUN_KEYS:
            order.tidy(RUN_KEYS_READ // 2)
            self._level = None
            return True
        return False

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
        """Keys in order with their newest values, None where it was deleted; of a layer that is
        frozen and has no pending commits any more.

        To be called in the event loop.  What it gives may be used up in another thread, while
        deletions go on to be buried here: which keys there are is taken down at once, because
        one that is being buried is in neither order for a moment.
        """
        self._hidden.tidy()
        # Only runs, which nobody changes: none of the two has a fresh key now.
        parts = [
            keys.order.between(None, None, reverse=False) for keys in (self.keys, self._hidden)
        ]
        return self._newest(heapq.merge(*parts))

    def _newest(self, keys: Iterator[bytes]) -> Iterator[tuple[bytes, bytes | None]]:
        versions = self.versions
        for key, _ in groupby(keys):
            version = versions.get(key)
            # None: it hid nothing, and has been dropped since.
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
            older = before[0]
            value = older.value
            size += VERSION_OVERHEAD if value is None else VERSION_OVERHEAD + len(value)
            before = older.before
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
