"""What a transaction has read, and whether that still holds.

Law: no await.  Serializable by validation ("optimistic", backward: Kung & Robinson 1981): a
commit passes only if no key that was read, found absent or scanned over has a version newer
than the view.  Reads see the newest committed state as of the first of them, pending commits
included; on the newest of those the transaction depends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, final

from trio.lowlevel import Task

from ._layer import Layer
from ._memtable import View
from ._mvcc import Versions
from ._viewers import CommitDependency

DROPPED_LAYERS_MAX: Final = 2
"""Memtable layers, of up to ``checkpoint_bytes`` of log each, that an open transaction keeps
after a checkpoint has dropped them."""


@final
class ReadSet:
    """A `_viewers.Reader`: a transaction from its first read on."""

    # Defaults on the class: most transactions never need these of their own.
    dependency: CommitDependency | None = None
    """On the newest pending commit that was read."""
    _doomed: bytes | None = None
    """A key that is known to conflict."""
    _past: set[bytes] | None = None
    _dropped: tuple[Layer, ...] = ()
    _blind = False
    _ranges: list[tuple[bytes | None, bytes | None]] | None = None

    def __init__(self, versions: Versions, task: Task | None) -> None:
        self._versions = versions
        self.task = task
        self._keys: set[bytes] = set()
        self.view: View = versions.pin(self)
        self._seq = versions.last_seq

    # -- reading --

    def get(self, key: bytes) -> bytes | None:
        keys = self._keys
        if key not in keys:
            keys.add(key)
            if self._blind and self._doomed is None:
                self._doomed = key
        view = self.view
        version = view.version(key, self._seq)
        if version is None:
            try:
                return view.base.get(key)
            except Exception as exc:
                view.base.explain(exc)
                raise
        if version.seq > self._versions.settled_seq:
            self._observe(key, version.seq)
        return version.value

    def _observe(self, key: bytes, seq: int) -> None:
        if seq > self._versions.settled_seq:
            dependency = self._versions.depend(key, seq)
            if self.dependency is None or seq > self.dependency.seq:
                self.dependency = dependency

    def begin_range(self, start: bytes | None, stop: bytes | None) -> int:
        """Before anything of a range is given out, all of it counts as read; returns its place,
        for `end_range`."""
        if self._blind and self._doomed is None:
            self._doomed = start or b""
        if self._ranges is None:
            self._ranges = []
        self._ranges.append((start, stop))
        return len(self._ranges) - 1

    def end_range(self, place: int, last: bytes | None, reverse: bool) -> None:
        """A scan was left early, after the key ``last``: it gives back what it did not reach."""
        assert self._ranges is not None
        start, stop = self._ranges[place]
        if last is None:
            start = stop = b""
        elif reverse:
            start = last
        else:
            stop = last + b"\0"
        self._ranges[place] = start, stop

    def scan(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """What is committed in a range."""
        return self.view.scan(self._seq, start, stop, reverse, self._observe)

    # -- what happens meanwhile --

    def layer_dropped(self, layer: Layer) -> None:
        """The layer has gone into the store, where versions have no numbers any more.

        What is read from here on must still be held against it, so it is kept, up to a
        bound: a transaction that stays open over several checkpoints and then reads on
        conflicts, because nobody can tell any more.
        """
        if layer.last_seq <= self._seq:
            return
        if self._doomed is None:
            self._doomed = self._conflict_in(layer)
        if len(self._dropped) < DROPPED_LAYERS_MAX:
            self._dropped += (layer,)
        else:
            self._blind = True

    def changed_past(self, keys: Iterable[bytes]) -> None:
        """Its own task has changed keys by `Database.put`, `Database.delete` or the like."""
        if self._past is None:
            self._past = set()
        self._past.update(keys)

    # -- validation --

    def conflict(self) -> bytes | None:
        """A key that was read and has changed since, or None."""
        if self._doomed is not None:
            return self._doomed
        if self.dependency is not None and self.dependency.lost:
            # What was read will never have been.
            return self.dependency.key
        versions = self._versions
        if self._seq != versions.last_seq:
            for layer in (*versions.view.layers(), *self._dropped):
                conflict = self._conflict_in(layer)
                if conflict is not None:
                    return conflict
        return None

    def _conflict_in(self, layer: Layer) -> bytes | None:
        """A key that was read and has a version newer than the view."""
        seq = self._seq
        if layer.last_seq <= seq:
            return None
        versions = layer.versions
        for key in self._keys:
            version = versions.get(key)
            if version is not None and version.seq > seq:
                return key
        for start, stop in self._ranges or ():
            changed = layer.changed_since(seq, start, stop)
            if changed is not None:
                return changed
        return None

    def is_own(self, key: bytes) -> bool:
        """Whether its own task has changed the key past it, as far as that was noticed."""
        return self._past is not None and key in self._past
