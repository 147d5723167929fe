"""What a log may hold after a crash: kept beside the program, from what it was told.

Law: no look into the package's insides.  The oracle knows what was handed over, what was
acknowledged and what was taken back; what stands in the log it learns from images of a
process that was killed, which hold all that was written.  A record that an image shows and
that nobody wrote, twice, or out of order, is as wrong as one that is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import attrs

Pair = tuple[int, bytes]
"""(LSN, payload)"""


class Wrong(Exception):
    """A promise was broken; the text says which."""

    def __init__(self, kind: Literal["lost", "partial", "other"], what: str) -> None:
        super().__init__(f"{kind}: {what}" if kind != "other" else what)
        self.kind = kind
        """``lost``: acknowledged and not there; ``partial``: a unit or a cut in part."""


@attrs.define(eq=False)
class Submission:
    """A record that was handed over, and what became of it."""

    key: Hashable = attrs.field(repr=lambda key: repr(key)[:40])
    task: int
    number: int
    """Among the task's own: they keep their order."""
    order: int
    """Among all, by the time of the call."""
    last_of_unit: bool = True
    lsn: int | None = None
    """Where an image showed it."""
    gone: bool = False
    """Taken back, or lost in a crash: it must never be seen again."""


@attrs.define(eq=False)
class Cut:
    """A ``truncate_after`` that is under way: done whole, or not at all."""

    lsn: int
    order: int
    after: list[Pair] = attrs.Factory(list)
    """What was written behind the cut, if it is done."""
    acknowledged: int = 0


@attrs.define(eq=False)
class Timeline:
    """One log over all its sessions and crashes."""

    key_of: Callable[[bytes], Hashable] = bytes
    """By what a payload is recognized."""
    learned: Callable[[int, Hashable], None] = lambda lsn, key: None
    known: list[Pair] = attrs.Factory(list)
    """Every record written, from LSN 1 on, those dropped from the log's start among them."""
    durable: int = 0
    """No crash may lose a record up to here."""
    written: int = 0
    """A crash of the process alone may not either."""
    floor: int = 1
    """What is below was dropped, durably."""
    asked: int = 1
    """What is below may be missing: calls that have ended asked for it."""
    lets_go: Callable[[int], bool] | None = None
    """Whether retention may have the open log start at this LSN now; None: there is none, and
    nothing is dropped that no call has asked for."""
    highest_first: int = 1
    """The highest first LSN of any image: the live log must come to it."""
    cut: Cut | None = None
    version: int = 0
    """Counts changes of what is allowed."""
    _by_key: dict[Hashable, Submission] = attrs.Factory(dict)
    _by_task: dict[int, list[Submission]] = attrs.Factory(dict)
    _seen_of_task: dict[int, int] = attrs.Factory(dict)
    """How many of a task's records are known or gone."""
    _asks: list[int] = attrs.Factory(list)
    """Of the calls that are under way."""
    _inside: set[int] = attrs.Factory(set)
    """LSNs behind which the log cannot end: inside of a unit."""

    # -- what the program does --

    def submit(self, task: int, *keys: Hashable) -> list[Submission]:
        """A task hands over one record, or a unit of several."""
        mine = self._by_task.setdefault(task, [])
        submissions = []
        for place, key in enumerate(keys, 1):
            assert key not in self._by_key, "payloads must be unique"
            submission = Submission(key, task, len(mine), len(self._by_key), place == len(keys))
            mine.append(submission)
            self._by_key[key] = submission
            submissions.append(submission)
        return submissions

    @property
    def order(self) -> int:
        """How many records were handed over so far."""
        return len(self._by_key)

    def waiting(self) -> bool:
        """Whether something was handed over of which nothing is known yet."""
        return any(s.lsn is None and not s.gone for s in self._by_key.values())

    def acknowledge(self, submission: Submission, lsn: int, *, durable: bool) -> None:
        """A call has returned this LSN."""
        if submission.lsn != lsn:
            raise Wrong("lost", f"LSN {lsn} is acknowledged, but was never seen in the file")
        if submission.gone:
            return  # dropped by a cut since
        cut = self.cut
        if cut is not None and any(at == lsn and self._is(p, submission) for at, p in cut.after):
            cut.acknowledged = max(cut.acknowledged, lsn)
        elif durable:
            self.durable = max(self.durable, lsn)
        else:
            self.written = max(self.written, lsn)
        self.version += 1

    def _is(self, payload: bytes, submission: Submission) -> bool:
        return self.key_of(payload) == submission.key

    def withdraw(self, submissions: Sequence[Submission], why: str) -> None:
        """A call has said that nothing of it is in the log."""
        for submission in submissions:
            if submission.lsn is not None:
                raise Wrong("other", f"{why}, but LSN {submission.lsn} is in the file")
            submission.gone = True
        self.version += 1

    def settle_durable(self, lsn: int) -> None:
        """The log has said that everything up to here is durable."""
        if self.cut is None and lsn > self.durable:
            self.durable = lsn
            self.version += 1

    def settle_floor(self, first_lsn: int) -> None:
        """The log has said where it starts."""
        if self.highest_first > first_lsn:
            raise Wrong(
                "lost",
                f"an image started at LSN {self.highest_first}, the log it was taken from "
                f"still at {first_lsn}",
            )
        self.raise_floor(first_lsn)

    def raise_floor(self, first_lsn: int) -> None:
        """Likewise, perhaps while it is dropping more."""
        if first_lsn > self.floor:
            self._check_asked(first_lsn, self.lets_go is not None and self.lets_go(first_lsn))
            self.floor = first_lsn
            self.version += 1

    def begin_drop(self, lsn: int) -> None:
        """A ``truncate_before`` is under way."""
        self._asks.append(lsn)

    def end_drop(self, lsn: int) -> None:
        self._asks.remove(lsn)
        self.asked = max(self.asked, lsn)

    def _check_asked(self, first_lsn: int, lets_go: bool) -> None:
        asked = max(self.asked, *self._asks) if self._asks else self.asked
        if first_lsn > asked and not lets_go:
            raise Wrong(
                "lost", f"starts at LSN {first_lsn}, only what is below {asked} was to be dropped"
            )

    def begin_cut(self, lsn: int) -> None:
        assert self.cut is None
        self.cut = Cut(lsn, self.order)
        self._inside.discard(lsn)
        self.version += 1

    def end_cut(self, *, done: bool) -> None:
        cut, self.cut = self.cut, None
        assert cut is not None
        self.version += 1
        if not done:
            if cut.after:
                raise Wrong("partial", f"the cut after LSN {cut.lsn} was refused, and was made")
            return
        for lsn, payload in self.known[cut.lsn :]:
            self._by_key[self.key_of(payload)].gone = True
            self._inside.discard(lsn)
        for submission in self._by_key.values():
            if submission.lsn is None and submission.order < cut.order:
                submission.gone = True
        self.known[cut.lsn :] = cut.after
        self.asked = min(self.asked, cut.lsn + 1)
        self.durable = max(min(cut.lsn, len(self.known)), cut.acknowledged)
        self.written = min(self.written, len(self.known))

    def crashed(self, found: Sequence[Pair], first_lsn: int) -> None:
        """A new session starts from an image: what is in it stays, what is not never was.

        But for a cut that seems made: until the log is open again, another power loss may
        take it back.
        """
        last_lsn = first_lsn + len(found) - 1
        if self.cut is not None and not self._looks_cut(found, last_lsn):
            self.end_cut(done=False)
        if self.cut is None:
            self._forget_behind(last_lsn)
        for submission in self._by_key.values():
            if submission.lsn is None:
                submission.gone = True
        # Another power loss, before the recovery is done, may still take the unacknowledged.
        self.written = last_lsn if self.cut is None else 0
        self.highest_first = self.asked = first_lsn
        self._asks.clear()
        self.version += 1

    def opened(self, found: Sequence[Pair], last_lsn: int) -> None:
        """The log is open, with this in it: all of it is durable now."""
        if self.cut is not None:
            self.end_cut(done=self._looks_cut(found, last_lsn))
        if last_lsn != len(self.known):
            raise Wrong("lost", f"opened at LSN {last_lsn}, {len(self.known)} were there")
        self.settle_durable(last_lsn)

    def _looks_cut(self, found: Sequence[Pair], last_lsn: int) -> bool:
        assert self.cut is not None
        return last_lsn == self.cut.lsn or not self._fits(self.known, found)

    def _forget_behind(self, last_lsn: int) -> None:
        for _, payload in self.known[last_lsn:]:
            self._by_key[self.key_of(payload)].gone = True
        del self.known[last_lsn:]
        self._inside = {lsn for lsn in self._inside if lsn < last_lsn}

    # -- what an image shows --

    def check(
        self, found: Sequence[Pair], first_lsn: int, *, killed: bool, learn: bool = False
    ) -> None:
        """Whether a recovered log is one that the program may find.

        Args:
          killed: all that was written must be there.
          learn: it may hold records not seen before; else it holds known ones only.

        Raises:
          Wrong
        """
        last_lsn = first_lsn + len(found) - 1
        if [lsn for lsn, _ in found] != list(range(first_lsn, last_lsn + 1)):
            raise Wrong("other", f"LSNs {[lsn for lsn, _ in found]} from {first_lsn} on")
        if first_lsn < self.floor:
            raise Wrong("other", f"starts at LSN {first_lsn}, what is below {self.floor} came back")
        self._check_asked(first_lsn, self.lets_go is not None)
        if first_lsn - 1 in self._inside:
            raise Wrong("partial", f"starts at LSN {first_lsn}, inside of a unit")
        must = max(self.durable, self.written) if killed else self.durable
        cut = self.cut
        if cut is None:
            self._check(self.known, found, last_lsn, must, 0, learn)
        else:
            try:
                self._check(self.known, found, last_lsn, must, 0, learn)
            except Wrong as uncut:
                try:
                    kept = self.known[: cut.lsn] + cut.after
                    must = max(cut.lsn, cut.acknowledged)
                    self._check(kept, found, last_lsn, must, cut.order, learn)
                    cut.after[:] = kept[cut.lsn :]
                except Wrong as made:
                    raise Wrong(
                        "partial",
                        f"the cut after LSN {cut.lsn} is neither not made ({uncut}) "
                        f"nor made ({made})",
                    ) from None
        self.highest_first = max(self.highest_first, first_lsn)

    def _fits(self, known: Sequence[Pair], found: Sequence[Pair]) -> bool:
        return not found or known[found[0][0] - 1 : found[-1][0]] == list(found)

    def _check(
        self,
        known: list[Pair],
        found: Sequence[Pair],
        last_lsn: int,
        must: int,
        since: int,
        learn: bool,
    ) -> None:
        """Compare with one list of what may be there; learnt records are added to it."""
        if last_lsn < must:
            raise Wrong("lost", f"ends at LSN {last_lsn}, LSN {must} had been acknowledged")
        if found and found[0][0] > len(known) + 1:
            raise Wrong("other", f"starts at LSN {found[0][0]}, only {len(known)} were written")
        old = [pair for pair in found if pair[0] <= len(known)] if learn else found
        if not self._fits(known, old):
            lsn, data = next(pair for pair in old if known[pair[0] - 1 : pair[0]] != [pair])
            raise Wrong("other", f"LSN {lsn} holds {data[:40]!r}, which was not written there")
        if len(old) < len(found):
            self._learn(known, found[len(old) :], since)
        if last_lsn in self._inside:
            raise Wrong("partial", f"ends at LSN {last_lsn}, inside of a unit")

    def _learn(self, known: list[Pair], new: Sequence[Pair], since: int) -> None:
        seen = dict(self._seen_of_task)
        submissions: list[Submission] = []
        inside = new[0][0] - 1 in self._inside
        for lsn, payload in new:
            submission = self._by_key.get(self.key_of(payload))
            if submission is None:
                raise Wrong("other", f"LSN {lsn} holds {payload[:40]!r}, which nobody wrote")
            if submission.gone or submission.lsn is not None:
                raise Wrong(
                    "other", f"LSN {lsn} holds {payload[:40]!r}, which was lost or taken back"
                )
            if submission.order < since:
                raise Wrong("other", f"LSN {lsn} was handed over before the cut, and is behind it")
            mine = self._by_task[submission.task]
            place = seen.get(submission.task, 0)
            while place < len(mine) and (mine[place].gone or mine[place].lsn is not None):
                place += 1
            if mine[place] is not submission:
                raise Wrong("other", f"LSN {lsn} came before record {place} of the same task")
            if inside:
                before = submissions[-1] if submissions else self._by_key[self.key_of(known[-1][1])]
                if place == 0 or mine[place - 1] is not before:
                    raise Wrong("partial", f"LSN {lsn} stands inside of another's unit")
            inside = not submission.last_of_unit
            seen[submission.task] = place + 1
            submissions.append(submission)
        self._seen_of_task = seen
        for (lsn, payload), submission in zip(new, submissions, strict=True):
            submission.lsn = lsn
            known.append((lsn, payload))
            if not submission.last_of_unit:
                self._inside.add(lsn)
            self.learned(lsn, submission.key)
        self.version += 1
