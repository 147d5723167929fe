"""Who waits for a key to change.

Law: one event loop, no I/O.  The newest commits are remembered by their keys, so that who asks
again, with the LSN that it was given last, misses none; older ones are looked up in the log, by
whoever calls.  Nothing is remembered before somebody has waited for the first time.

What a commit costs that concerns nobody is what counts here: most concern nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from itertools import chain, count
from operator import itemgetter
from typing import Any, Final, final

import msgspec
import trio

COMMITS_REMEMBERED: Final = 10_000
KEYS_REMEMBERED: Final = 100_000
"""Of these commits together: some 5 MB where keys have 50 bytes, 51 MB where they have 511."""


Commit = tuple[int, Collection[bytes], Any, int]
"""Its number, then the keys that it wrote; the rest is of no interest here."""
_Batch = tuple[int, int, int, bytes]
"""The LSN of its last commit, how many there are, how many keys, and these packed: as objects they
would lie all over memory, and what is committed meanwhile finds its own no more in the
processor's cache, which costs more than to pack them."""

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[list[bytes]]).decode


@final
class Watch:
    """What one task waits for: a key, all that start with a prefix, or any key."""

    __slots__ = ("_event", "key", "lsn", "prefix")

    def __init__(self, key: bytes | None, prefix: bytes | None) -> None:
        self.key: bytes | None = key
        self.prefix: bytes = prefix or b""
        self.lsn: int | None = None
        """Of the commit that touched it."""
        self._event = trio.Event()

    def touched_by(self, keys: Collection[bytes]) -> bool:
        """Whether a commit that wrote these changed it."""
        if self.key is not None:
            return self.key in keys
        prefix = self.prefix
        return any(key.startswith(prefix) for key in keys)

    async def wait(self) -> None:
        """Until `lsn` is set, or nothing more will come."""
        await self._event.wait()

    def wake(self) -> None:
        self._event.set()


@final
class Watches:
    """Those who wait, and what they may have missed."""

    def __init__(self) -> None:
        self.begun: bool = False
        """Whether anybody has ever waited."""
        self.known_from: int = 0
        """All later commits are remembered."""
        self._recent: deque[_Batch] = deque()
        self._commits_remembered = 0
        self._keys_remembered = 0
        self._by_key: dict[bytes, set[Watch]] = {}
        self._by_prefix: dict[int, dict[bytes, set[Watch]]] = {}
        """By the prefix's length."""

    def begin(self, durable_lsn: int) -> None:
        """Remember commits from here on, unless that was begun before."""
        if not self.begun:
            self.begun = True
            self.known_from = durable_lsn

    def add(self, watch: Watch) -> None:
        self._place(watch).setdefault(watch.key or watch.prefix, set()).add(watch)

    def discard(self, watch: Watch) -> None:
        place, name = self._place(watch), watch.key or watch.prefix
        watches = place.get(name, set())
        watches.discard(watch)
        if not watches:
            place.pop(name, None)
            if watch.key is None and not place:
                del self._by_prefix[len(name)]

    def _place(self, watch: Watch) -> dict[bytes, set[Watch]]:
        if watch.key is not None:
            return self._by_key
        return self._by_prefix.setdefault(len(watch.prefix), {})

    def missed(self, watch: Watch, since: int) -> int | None:
        """The newest of the remembered commits after ``since`` that touched it."""
        for last_lsn, _, _, packed in reversed(self._recent):
            for lsn, keys in zip(count(last_lsn, -1), reversed(_unpack(packed))):
                if lsn <= since:
                    return None
                if watch.touched_by(keys):
                    return lsn
        return None

    def settled(self, first_lsn: int, commits: Collection[Commit]) -> None:
        """These commits are durable."""
        written = [tuple(commit[1]) for commit in commits]
        keys = sum(map(len, written))
        recent = self._recent
        recent.append((first_lsn + len(written) - 1, len(written), keys, _pack(written)))
        self._commits_remembered += len(written)
        self._keys_remembered += keys
        if (self._by_key or self._by_prefix) and self._touches(written):
            self._touch_all(first_lsn, written)
        while (
            self._commits_remembered > COMMITS_REMEMBERED or self._keys_remembered > KEYS_REMEMBERED
        ):
            self.known_from, commits_forgotten, keys, _ = recent.popleft()
            self._commits_remembered -= commits_forgotten
            self._keys_remembered -= keys

    def _touches(self, written: list[tuple[bytes, ...]]) -> bool:
        """Whether anybody waits for one of these keys: mostly not, so all of them are asked
        about at once, which costs a key a fifth of asking for it alone."""
        keys = [*chain.from_iterable(written)]
        return not self._by_key.keys().isdisjoint(keys) or not all(
            prefixes.keys().isdisjoint(map(itemgetter(slice(length)), keys))
            for length, prefixes in self._by_prefix.items()
        )

    def _touch_all(self, first_lsn: int, written: list[tuple[bytes, ...]]) -> None:
        by_key, by_prefix = self._by_key, self._by_prefix
        for lsn, keys in enumerate(written, first_lsn):
            for key in keys:
                if key in by_key:
                    _touch(by_key[key], lsn)
                for length, prefixes in by_prefix.items():
                    watches = prefixes.get(key[:length])
                    if watches is not None:
                        _touch(watches, lsn)

    def end(self) -> None:
        """Nothing more will become durable."""
        for place in (self._by_key, *self._by_prefix.values()):
            for watches in place.values():
                for watch in watches:
                    watch.wake()


def _touch(watches: set[Watch], lsn: int) -> None:
    for watch in watches:
        watch.lsn = lsn
        watch.wake()
