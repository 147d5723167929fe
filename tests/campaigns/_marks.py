"""Records that tell their history, and what a stream of them may be.

Law: pure.  A *history* begins where LSNs may be given to other records than before: with each
life of the owner, and at each cut.  It has a number, and every record says whose it is, where
that history began, and which one it goes on from; so a stream is right if each record fits
the one before it, whoever reads and whatever was cut meanwhile.  What only the whole of a log
tells is `History`'s: what was durable when, and what may have gone.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, Final
from zlib import crc32

import attrs

from ._promises import Wrong, check

SIZE_MAX: Final = 3000
CUTS_MAX: Final = 1000
"""In one life."""
EMPTY_SHARE: Final = 0.08
"""Of records without a byte, of which only the LSN can be checked."""

_HEAD: Final = struct.Struct("<4sIQQQQHI")
_MAGIC: Final = b"TWr1"
_POOL: Final = Random(0).randbytes(1 << 16)


@attrs.frozen
class Mark:
    """What a record says of itself."""

    lsn: int
    history: int
    base_lsn: int
    """Its history's first record; never an empty one."""
    parent: int
    """The history that the record before that is of; 0: there is none, or it is dropped and not
    known any more."""


def record(seed: int, mark: Mark, size: int) -> bytes:
    words = (mark.lsn, mark.history, mark.base_lsn, mark.parent)
    at = (mark.lsn * 7919 + mark.history * 104_729) % (len(_POOL) - SIZE_MAX)
    body = _POOL[at : at + size]
    head = _HEAD.pack(_MAGIC, seed & 0xFFFFFFFF, *words, size, 0)
    return _HEAD.pack(_MAGIC, seed & 0xFFFFFFFF, *words, size, crc32(body, crc32(head))) + body


def mark_of(seed: int, data: bytes) -> Mark | None:
    """What a record says; None where a single byte of it is wrong."""
    if len(data) < _HEAD.size:
        return None
    _, _, *words, size, _ = _HEAD.unpack_from(data)
    mark = Mark(*words)
    return mark if size <= SIZE_MAX and record(seed, mark, size) == data else None


@attrs.define
class Chain:
    """What one stream has given."""

    seed: int
    first_lsn: int = 0
    """Of what was given; 0: nothing was."""
    next_lsn: int = 0
    """That must be given next; 0: any."""
    known: Mark | None = None
    """The last that was not empty."""
    _runs: list[Mark] = attrs.Factory(list)
    """The first of each history."""

    def give(self, lsn: int, data: bytes) -> None:
        """Raises `Wrong`."""
        due = self.next_lsn or lsn
        check(lsn == due, f"LSN {lsn} was given where {due} is due")
        self.next_lsn = lsn + 1
        self.first_lsn = self.first_lsn or lsn
        if not data:
            return
        mark = mark_of(self.seed, data)
        if mark is None:
            raise Wrong("other", f"LSN {lsn} has other bytes than were written")
        check(mark.lsn == lsn, f"LSN {lsn} is the record of LSN {mark.lsn}")
        before, self.known = self.known, mark
        if before is not None:
            _check_next(before, mark)
        if before is None or before.history != mark.history:
            self._runs.append(mark)

    def back_to(self, lsn: int) -> None:
        """What was given after this one is no more: the next is the one after it."""
        if not self.first_lsn <= lsn < self.next_lsn:
            self.first_lsn, self.known = 0, None
            self._runs.clear()
        self.next_lsn = lsn + 1
        while self._runs and self._runs[-1].lsn > lsn:
            self._runs.pop()
        if self.known is not None and self.known.lsn > lsn:
            self.known = attrs.evolve(self._runs[-1], lsn=lsn) if self._runs else None

    def told(self) -> list[int]:
        """(first LSN, last LSN, the last that was not empty, its history)"""
        known = self.known
        last = self.next_lsn - 1 if self.first_lsn else 0
        return [self.first_lsn, last, known.lsn if known else 0, known.history if known else 0]


def _check_next(before: Mark, mark: Mark) -> None:
    """What is between the two is empty, and so begins no history."""
    if before.lsn >= mark.base_lsn:
        fits = before.history == mark.history
    else:
        fits = mark.parent in (before.history, 0) and mark.lsn == mark.base_lsn
    check(
        fits,
        f"two histories in one stream: LSN {before.lsn} is of history {before.history}, "
        f"LSN {mark.lsn} of history {mark.history}, which goes on from {mark.parent} "
        f"at LSN {mark.base_lsn}",
    )


# -- the owner's side ----------------------------------------------------------------------


@attrs.define
class Runs:
    """Which LSNs of a log are of which history: the writer's knowledge."""

    starts: list[int] = attrs.Factory(list)
    histories: list[int] = attrs.Factory(list)

    def of(self, lsn: int) -> int:
        """The history of a record; 0: not known, or LSN 0."""
        at = bisect_right(self.starts, lsn) - 1
        return self.histories[at] if at >= 0 else 0

    def begin(self, lsn: int, history: int) -> None:
        """From here on."""
        self.cut(lsn - 1)
        self.starts.append(lsn)
        self.histories.append(history)

    def cut(self, lsn: int) -> None:
        while self.starts and self.starts[-1] > lsn:
            self.starts.pop()
            self.histories.pop()

    def drop(self, lsn: int) -> None:
        """Forget what is before the one that holds an LSN."""
        keep = max(0, bisect_right(self.starts, lsn) - 1)
        del self.starts[:keep], self.histories[:keep]

    def ends(self, last_lsn: int) -> list[tuple[int, int]]:
        """(history, its last LSN)"""
        ends = [*(start - 1 for start in self.starts[1:]), last_lsn][: len(self.starts)]
        return [(h, min(end, last_lsn)) for h, end in zip(self.histories, ends, strict=True)]

    def told(self) -> list[list[int]]:
        return [self.starts, self.histories]


# -- the judge -----------------------------------------------------------------------------


@attrs.define
class _Cut:
    lsn: int
    begun: int
    ended: int | None = None
    """A time; None: not known to have ended."""


@attrs.define
class History:
    """What the owner of a log has said, life after life: the oracle.

    Times are those of one clock that all processes share.
    """

    drops_by_itself: bool = False
    """A database: it drops what its store has."""
    durable: dict[int, int] = attrs.Factory(dict)
    """Of each history: the last LSN that was durable, as far as it is known."""
    runs: Runs = attrs.Factory(Runs)
    last_lsn: int = 0
    """After it was closed in order."""
    problems: list[str] = attrs.Factory(list)
    _seen: list[tuple[int, int]] = attrs.Factory(list)
    """(time, LSN) from which on readers must see it."""
    _cuts: list[_Cut] = attrs.Factory(list)
    _drops: list[tuple[int, int]] = attrs.Factory(list)
    """(time, LSN) that truncations were begun for; LSNs that grow."""
    _dropped: list[tuple[int, int]] = attrs.Factory(list)
    """(time, first LSN) after one was done."""
    given: dict[int, tuple[int, str]] = attrs.Factory(dict)
    """Of each history: the highest LSN that a stream has given, and which one."""
    _begun: list[tuple[int, int]] = attrs.Factory(list)
    """(time, number) of each life."""
    _synced: dict[int, list[tuple[int, int]]] = attrs.Factory(dict)
    """Of each history: (time, LSN) of each sync in the life that wrote it."""
    _opened: list[tuple[int, int]] = attrs.Factory(list)
    """(time at which a life began, last LSN that it found)"""

    def hear(self, name: str, at: int, words: Sequence[Any]) -> None:
        """A message of the owner's."""
        match name:
            case "life":
                self._begun.append((at, words[0]))
            case "synced":
                lsn, history = words
                if history:
                    self._synced.setdefault(history, []).append((at, lsn))
                elif self._begun:
                    # On opening: what was found, of whatever history.
                    self._opened.append((self._begun[-1][0], lsn))
            case "open":
                first, last, starts, histories = words
                self._settle(Runs(starts, histories), last)
                if last < self._must(at):
                    self.problems.append(f"opened with LSN {last}, durable was {self._must(at)}")
                self._dropped_to(at, first)
                for cut in self._cuts:
                    cut.ended = cut.ended or at
            case "ack":
                lsn, history, seen = words
                self.durable[history] = max(lsn, self.durable.get(history, 0))
                self._reach(at, seen)
            case "drop":
                lsn, starts, histories = words
                self._settle(Runs(starts, histories), lsn - 1)
                self._drops.append((at, max(lsn, self._drops[-1][1] if self._drops else 1)))
            case "dropped":
                self._dropped_to(at, words[0])
            case "cut":
                lsn, last, starts, histories = words
                self._settle(Runs(starts, histories), last)
                self._cuts.append(_Cut(lsn, at))
                self._seen.append((at, min(self._must(at), lsn)))
            case "cut done":
                self._cuts[-1].ended = at
            case "closed":
                last, starts, histories = words
                self._settle(Runs(starts, histories), last)
                self.last_lsn = last
                self._reach(at, last)
            case _:
                raise AssertionError(name)

    def _dropped_to(self, at: int, first: int) -> None:
        self._dropped.append((at, max(first, self._dropped[-1][1] if self._dropped else 1)))

    def _settle(self, runs: Runs, last: int) -> None:
        """All up to here is durable now."""
        self.runs = runs
        for history, end in runs.ends(last):
            self.durable[history] = max(end, self.durable.get(history, 0))

    def _reach(self, at: int, lsn: int) -> None:
        if lsn > self._must(at):
            self._seen.append((at, lsn))

    def _must(self, at: int) -> int:
        """What whoever begins to read at a time must come to, but for cuts."""
        return self._between(self._seen, at, 0)

    def _between(self, pairs: list[tuple[int, int]], at: int, default: int) -> int:
        place = bisect_right(pairs, at, key=lambda pair: pair[0]) - 1
        return pairs[place][1] if place >= 0 else default

    def may_start(self, begun: int, entered: int) -> tuple[int, int]:
        """(lowest, highest) first LSN that a log may show between two times."""
        low = self._between(self._dropped, begun, 1)
        if self.drops_by_itself:
            return low, 1 << 62
        return low, max(low, self._between(self._drops, entered, 1))

    def must_reach(self, begun: int, ended: int) -> int:
        """What a read from the first time to the second must have given, the log being sound."""
        lsn = self._must(begun)
        for cut in self._cuts:
            if cut.begun <= ended and (cut.ended is None or cut.ended >= begun):
                lsn = min(lsn, cut.lsn)
        return lsn

    def was_cut(self, lsn: int, until: int) -> bool:
        """Whether some record of this LSN was, or may have been, dropped by a cut."""
        return any(cut.lsn < lsn and cut.begun <= until for cut in self._cuts)

    def lost(self) -> list[str]:
        """What was given and did not last; to be asked when all lives are over, or when the next
        one has said what it has found."""
        return [
            f"{who} was given LSN {lsn} of history {history}, which is not in the log: "
            f"of that history LSN {self.durable.get(history, 0)} is the last"
            for history, (lsn, who) in sorted(self.given.items())
            if lsn > self.durable.get(history, 0)
        ]

    def was_durable(self, lsn: int, history: int, at: int) -> bool:
        """Whether a record that was given at a time was durable by then."""
        mine = self._synced.get(history, [])
        return any(
            lsn <= up_to
            for pairs in (mine, self._opened)
            for _, up_to in reversed(pairs[: bisect_right(pairs, at, key=lambda pair: pair[0])])
        )

    def note(self, who: str, at: int, lsn: int, history: int) -> None:
        """A stream has given this record."""
        if history and not self.was_durable(lsn, history, at):
            self.problems.append(
                f"{who} was given LSN {lsn} of history {history} before it was durable"
            )
        if history and lsn > self.given.get(history, (0, ""))[0]:
            self.given[history] = (lsn, who)


def runs_of(seed: int, records: Iterable[tuple[int, bytes]]) -> Runs:
    """Of what stands in a log; raises `Wrong`."""
    chain = Chain(seed)
    runs = Runs()
    for lsn, data in records:
        chain.give(lsn, data)
        mark = chain.known
        if mark is not None and (not runs.histories or runs.histories[-1] != mark.history):
            runs.begin(max(mark.base_lsn, 0), mark.history)
    return runs
