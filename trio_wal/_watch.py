"""Who waits for a key to change.

Law: one event loop, no I/O.  The newest commits are remembered by their keys, so that who asks
again, with the LSN that it was given last, misses none; older ones are looked up in the log, by
whoever calls.  Nothing is remembered before somebody has waited for the first time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Any, Final, final

import trio

COMMITS_REMEMBERED: Final = 10_000
KEYS_REMEMBERED: Final = 100_000
"""Of these commits together: some 10 MB where keys have 50 bytes, 60 MB where they have 511."""


Commit = tuple[int, Collection[bytes], Any, int]
"""Its number, then the keys that it wrote; the rest is of no interest here."""


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
        self._recent: deque[tuple[int, tuple[bytes, ...]]] = deque()
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
        for lsn, keys in reversed(self._recent):
            if lsn <= since:
                break
            if watch.touched_by(keys):
                return lsn
        return None

    def settled(self, first_lsn: int, commits: Collection[Commit]) -> None:
        """These commits are durable."""
        recent = self._recent
        by_key, by_prefix = self._by_key, self._by_prefix
        for lsn, commit in enumerate(commits, first_lsn):
            keys = tuple(commit[1])
            recent.append((lsn, keys))
            self._keys_remembered += len(keys)
            if by_key or by_prefix:
                for key in keys:
                    if key in by_key:
                        _touch(by_key[key], lsn)
                    for length, prefixes in by_prefix.items():
                        watches = prefixes.get(key[:length])
                        if watches is not None:
                            _touch(watches, lsn)
        while len(recent) > COMMITS_REMEMBERED or self._keys_remembered > KEYS_REMEMBERED:
            self.known_from, forgotten = recent.popleft()
            self._keys_remembered -= len(forgotten)

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
