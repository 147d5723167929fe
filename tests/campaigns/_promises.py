"""What a log may hold: what was asked of it, what it answered, and what may be found then.

Law: pure, and the only books about the promises of the public contract.  They know what was
handed over, acknowledged, withdrawn, dropped and cut, and nothing of files.  Whoever watches a
log tells them, and asks: *is this what it may hold now?*

* Returned means durable: an acknowledged record is there, at its LSN.
* Withdrawn means absent: what was cancelled, refused or said not to be written is never seen.
  So is what a crash took: once the log was found without it, it does not come back.
* A unit is there whole or not at all, its records in a row.
* The records of one task keep their order, and none is missing before one that is there.
* `truncate_before` drops no more than was asked for, and not less once it has said how much.
* `truncate_after` is done whole or not at all, and what was handed over before it is not found
  behind it.
* The transactions of a database are such records.  At its LSN, what one has read still stood.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Final, Literal

import attrs

LOST: Final = "lost"
"""How the text of a `Wrong` begins that is the loss of something acknowledged."""
State = dict[bytes, bytes]
Found = Sequence[tuple[int, Hashable]]
"""(LSN, key) of each record in a log; None where its bytes are nobody's."""


Kind = Literal["lost", "partial", "other"]


class Wrong(AssertionError):
    """A promise was broken; the text says which."""

    def __init__(self, kind: Kind, what: str) -> None:
        super().__init__(what if kind == "other" else f"{kind}: {what}")
        self.kind = kind
        """``lost``: acknowledged and not there; ``partial``: a unit or a cut in part."""


def check(condition: object, *what: object) -> None:
    """Raises `Wrong` where a condition does not hold."""
    if not condition:
        raise Wrong("other", " ".join(map(str, what)))


def anything(first_lsn: int) -> bool:
    """For `Promises.lets_go`: the log may start anywhere."""
    return True


@attrs.define(eq=False)
class Record:
    """A record that was handed over, and what became of it."""

    key: Hashable
    """By what it is recognized; no two have the same."""
    task: Hashable
    number: int
    """Among the task's own: they keep their order."""
    order: int
    """Among all, by the time of the call."""
    unit: list[Record] = attrs.field(repr=False)
    part: int
    """Its place in its unit."""
    last: bool
    """Whether nothing of its unit follows, as after a cut through it."""
    lsn: int | None = None
    """Acknowledged, or seen."""
    gone: bool = False
    """It must never be seen again."""

    def __str__(self) -> str:
        return repr(self.key)[:40]


@attrs.define(eq=False)
class Cut:
    """A ``truncate_after`` that is under way: done whole, or not at all."""

    lsn: int
    order: int
    """So many records were handed over before."""
    after: dict[int, Record] = attrs.Factory(dict)
    """What was seen behind the cut, if it is done."""
    acknowledged: int = 0


@attrs.frozen
class _View:
    """What may be there: as it is known, or with the cut made that is under way."""

    at: Mapping[int, Record]
    must: int = 0
    """It may not end before this LSN."""
    new: bool = True
    """There may be records that were not seen before."""
    cut: Cut | None = None

    def cuts_through(self, lsn: int) -> bool:
        """Whether of the unit of this record the rest may have been cut off."""
        return self.cut is not None and lsn == self.cut.lsn


@attrs.define(eq=False)
class Promises:
    """Of one log over all its lives and crashes."""

    complete: bool = False
    """Whether all that is written is seen (`learn`) before anything is told of it."""
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
    cut: Cut | None = None
    version: int = 0
    """Counts changes of what is allowed."""
    records: dict[Hashable, Record] = attrs.Factory(dict)
    """All that were ever handed over, by key."""
    at: dict[int, Record] = attrs.Factory(dict)
    """By LSN, as far as it is known, those dropped from the log's start among them."""
    by_task: dict[Hashable, list[Record]] = attrs.Factory(dict)
    _asks: list[int] = attrs.Factory(list)
    """Of the ``truncate_before`` that are under way."""
    _sure: list[tuple[Record, int]] = attrs.Factory(list)
    """(record, LSN that it is above) of those called durable without an LSN."""

    def copy(self) -> Promises:
        return deepcopy(self)

    @property
    def order(self) -> int:
        """How many records were handed over so far."""
        return len(self.records)

    @property
    def last(self) -> int:
        """The highest LSN that is known."""
        return max(self.at, default=0)

    # -- what is asked, and answered --

    def submit(self, task: Hashable, *keys: Hashable) -> list[Record]:
        """A task hands over one record, or a unit of several."""
        mine = self.by_task.setdefault(task, [])
        unit: list[Record] = []
        for part, key in enumerate(keys):
            assert key not in self.records, "keys must be unique"
            last = part == len(keys) - 1
            record = Record(key, task, len(mine), self.order, unit, part, last)
            self.records[key] = record
            mine.append(record)
            unit.append(record)
        return unit

    def unknown(self) -> list[Record]:
        """What was handed over and of which nothing is known yet."""
        return [one for one in self.records.values() if one.lsn is None and not one.gone]

    def acknowledge(self, records: Iterable[Record], lsn: int, *, durable: bool = True) -> None:
        """A call has returned this LSN, of the first of its records.

        Args:
          durable: else they are only written.
        """
        for place, record in enumerate(records, lsn):
            if record.lsn is None and not self.complete and not record.gone:
                other = self.at.setdefault(place, record)
                check(other is record, f"LSN {place} was given to {other} and to {record}")
                record.lsn = place
            if record.lsn != place:
                seen = "never seen in the file" if record.lsn is None else f"LSN {record.lsn}"
                raise Wrong("lost", f"LSN {place} is acknowledged, but {record} was {seen}")
            if record.gone:
                continue  # dropped by a cut since
            if self.cut is not None and self.cut.after.get(place) is record:
                self.cut.acknowledged = max(self.cut.acknowledged, place)
            elif durable:
                self.durable = max(self.durable, place)
            else:
                self.written = max(self.written, place)
        self.version += 1

    def cover(self, records: Iterable[Record], above: int = 0) -> None:
        """Accepted records are durable, at LSNs that were not told, above this one."""
        self._sure += [(record, above) for record in records]
        self.version += 1

    def is_sure(self, record: Record) -> bool:
        """Whether it was acknowledged in one way or the other."""
        return record.lsn is not None or any(record is other for other, _ in self._sure)

    def withdraw(self, records: Iterable[Record], why: str) -> None:
        """A call has said that nothing of it is in the log."""
        for record in records:
            check(record.lsn is None, f"{why}, but LSN {record.lsn} is in the file")
            record.gone = True
        self.version += 1

    def settle_durable(self, lsn: int) -> None:
        """The log has said that everything up to here is durable."""
        if self.cut is None and lsn > self.durable:
            self.durable = lsn
            self.version += 1

    def begin_drop(self, lsn: int) -> None:
        """A ``truncate_before`` is under way."""
        self._asks.append(lsn)

    def end_drop(self, lsn: int) -> None:
        self._asks.remove(lsn)
        self.asked = max(self.asked, lsn)

    def raise_floor(self, first_lsn: int) -> None:
        """The log has said where it starts."""
        if first_lsn > self.floor:
            lets_go = self.lets_go is not None and self.lets_go(first_lsn)
            if wrong := self._check_asked(first_lsn, lets_go):
                raise wrong[0]
            self.floor = first_lsn
            self.version += 1

    def begin_cut(self, lsn: int) -> None:
        assert self.cut is None
        self.cut = Cut(lsn, self.order)
        self.version += 1

    def end_cut(self, *, done: bool) -> None:
        cut, self.cut = self.cut, None
        assert cut is not None
        self.version += 1
        if not done:
            if cut.after:
                raise Wrong("partial", f"the cut after LSN {cut.lsn} was refused, and was made")
            return
        self._forget_behind(cut.lsn)
        for record in self.unknown():
            record.gone = record.order < cut.order
        if cut.lsn in self.at:
            # Of its unit a part may have been cut off.
            self.at[cut.lsn].last = True
        self.at.update(cut.after)
        self.asked = min(self.asked, cut.lsn + 1)
        self.durable = max(min(cut.lsn, self.last), cut.acknowledged)
        self.written = min(self.written, self.last)
        self._sure = [(record, above) for record, above in self._sure if not record.gone]

    # -- what is found --

    def learn(self, found: Found) -> list[Record]:
        """These records are there, right as they are; gives those not seen before."""
        at, above = self.at, 0
        if self.cut is not None and found and self._compare(_View(self.at), found, found[0][0]):
            at, above = self.cut.after, self.cut.lsn
        learnt: list[Record] = []
        for lsn, key in found:
            record = self.records.get(key)
            if record is not None and record.lsn is None and not record.gone and lsn > above:
                record.lsn = lsn
                at[lsn] = record
                learnt.append(record)
        self.version += bool(learnt)
        return learnt

    def crashed(self, found: Found, first_lsn: int, kept: Collection[Record] = ()) -> None:
        """After a crash the log goes on with this: what is there stays, what is not never was.

        But for a cut that seems made: until the log is open again, another power loss may
        take it back.

        Args:
          kept: what is known to be there, below what is found, though not at which LSN.
        """
        last_lsn = first_lsn + len(found) - 1
        if self.cut is not None and not self._looks_cut(found, last_lsn):
            self.end_cut(done=False)
        self.learn(found)
        if self.cut is None:
            self._forget_behind(last_lsn)
        for record in self.unknown():
            record.gone = record not in kept
        # Another power loss, before the recovery is done, may still take the unacknowledged.
        self.written = last_lsn if self.cut is None else 0
        self.asked = first_lsn
        self._asks.clear()
        self._sure.clear()
        self.version += 1

    def opened(self, found: Found, last_lsn: int) -> None:
        """The log is open, with this in it: all of it is durable now."""
        if self.cut is not None:
            self.end_cut(done=self._looks_cut(found, last_lsn))
        if self.complete and last_lsn != self.last:
            raise Wrong("lost", f"opened at LSN {last_lsn}, {self.last} were there")
        self.settle_durable(last_lsn)

    def _looks_cut(self, found: Found, last_lsn: int) -> bool:
        assert self.cut is not None
        return last_lsn == self.cut.lsn or any(
            self.at.get(lsn) is not self.records.get(key) for lsn, key in found
        )

    def _forget_behind(self, last_lsn: int) -> None:
        for lsn in [lsn for lsn in self.at if lsn > last_lsn]:
            self.at.pop(lsn).gone = True

    # -- what may be found --

    def expect(self, found: Found, first_lsn: int, **how: bool) -> None:
        """`check`, and raise the first that is wrong."""
        if wrong := self.check(found, first_lsn, **how):
            raise wrong[0]

    def check(
        self, found: Found, first_lsn: int, *, killed: bool = False, new: bool = True
    ) -> list[Wrong]:
        """What is wrong with a log that holds this; the books stay as they are.

        Args:
          killed: only the process has died: all that was written must be there.
          new: there may be records that were not seen before.
        """
        lsns = [lsn for lsn, _ in found]
        if lsns != list(range(first_lsn, first_lsn + len(found))):
            return [Wrong("other", f"LSNs {lsns} from {first_lsn} on")]
        wrong: list[Wrong] = []
        if first_lsn < self.floor:
            told = f"starts at LSN {first_lsn}, what is below {self.floor} came back"
            wrong.append(Wrong("other", told))
        wrong += self._check_asked(first_lsn, self.lets_go is not None)
        must = max(self.durable, self.written) if killed else self.durable
        uncut = self._compare(_View(self.at, must, new), found, first_lsn)
        uncut += self._check_sure(found, first_lsn)
        cut = self.cut
        if uncut and cut is not None:
            kept = {lsn: record for lsn, record in self.at.items() if lsn <= cut.lsn} | cut.after
            must = max(cut.lsn, cut.acknowledged)
            made = self._compare(_View(kept, must, new, cut), found, first_lsn)
            told = f"the cut after LSN {cut.lsn} is neither not made ({uncut[0]}) nor made"
            uncut = [Wrong("partial", f"{told} ({made[0]})")] if made else []
        return wrong + uncut

    def _check_asked(self, first_lsn: int, lets_go: bool) -> list[Wrong]:
        below = max([self.asked, *self._asks])
        if lets_go or first_lsn <= below:
            return []
        told = f"starts at LSN {first_lsn}, only what is below {below} was to be dropped"
        return [Wrong("lost", told)]

    def _check_sure(self, found: Found, first_lsn: int) -> list[Wrong]:
        there = {key for _, key in found} if self._sure else set()
        return [
            Wrong("lost", f"{record} is not there, and was called durable")
            for record, above in self._sure
            if above + 1 >= first_lsn and record.key not in there
        ]

    def _compare(self, view: _View, found: Found, first_lsn: int) -> list[Wrong]:
        wrong: list[Wrong] = []
        last_lsn = first_lsn + len(found) - 1
        if last_lsn < view.must:
            wrong.append(Wrong("lost", f"ends at LSN {last_lsn}, durable was {view.must}"))
        at = view.at
        before = at.get(first_lsn - 1)
        if self.complete and before is None and first_lsn > 1:
            told = f"starts at LSN {first_lsn}, only {max(at, default=0)} were written"
            wrong.append(Wrong("other", told))
        if before is not None and not before.last and not view.cuts_through(first_lsn - 1):
            wrong.append(Wrong("partial", f"starts at LSN {first_lsn}, inside of a unit"))
        if self.complete and all(lsn in at and at[lsn].key == key for lsn, key in found):
            # Looked at when it was learnt.
            before = at.get(last_lsn)
        else:
            before = self._compare_each(view, found, wrong)
        if before is not None and not before.last and not view.cuts_through(last_lsn):
            wrong.append(Wrong("partial", f"ends at LSN {last_lsn}, inside of a unit"))
        return wrong

    def _compare_each(self, view: _View, found: Found, wrong: list[Wrong]) -> Record | None:
        """Record by record; gives the last one."""
        before: Record | None = None
        there: list[Record] = []
        for lsn, key in found:
            record = self.records.get(key)
            if view.cuts_through(lsn - 1):
                before = None
            if (what := _misplaced(view, lsn, record)) is not None:
                kind: Kind = "lost" if lsn in view.at else "other"
                wrong.append(Wrong(kind, f"LSN {lsn} holds {repr(key)[:40]}, {what}"))
            if record is not None:
                if not _follows(before, record):
                    wrong.append(Wrong("partial", f"{record} at LSN {lsn} is in another's unit"))
                there.append(record)
            before = record
        if there:
            wrong += self._check_tasks(there, found[0][0], view.cut.order if view.cut else 0)
        return before

    def _check_tasks(self, there: list[Record], first_lsn: int, since: int) -> list[Wrong]:
        """The order of each task, without a gap."""
        wrong: list[Wrong] = []
        numbers: dict[Hashable, list[int]] = {}
        for record in there:
            numbers.setdefault(record.task, []).append(record.number)
        for task, mine in numbers.items():
            if mine != sorted(set(mine)):
                wrong.append(Wrong("other", f"the records of task {task} are out of order"))
            # Of what was never seen, some may have been dropped.
            low = 0 if self.complete or first_lsn == 1 else min(mine)
            missing = [
                str(record)
                for record in self.by_task[task][low : max(mine)]
                if record.lsn is None and not record.gone and record.order >= since
                and record.number not in mine
            ]  # fmt: skip
            if missing:
                wrong.append(Wrong("other", f"of task {task}, {missing} are missing in between"))
        return wrong


def _misplaced(view: _View, lsn: int, record: Record | None) -> str | None:
    """Why this record may not stand there."""
    known = view.at.get(lsn)
    if known is not None:
        return None if record is known else f"{known} was there"
    if record is None:
        return "which nobody wrote"
    if record.gone or record.lsn is not None or not view.new:
        return "which must not be there"
    if view.cut is not None and record.order < view.cut.order:
        return "handed over before the cut that it is behind"
    return None


def _follows(before: Record | None, record: Record) -> bool:
    """Whether units are whole where these two are neighbours."""
    if before is None or before.last:
        return not record.part
    return before.part + 1 < len(before.unit) and before.unit[before.part + 1] is record


# -- of a database ---------------------------------------------------------------------


def apply(state: State, writes: Mapping[bytes, bytes | None]) -> None:
    for key, value in writes.items():
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value


def check_serial(
    lsn: int,
    before: State,
    reads: Mapping[bytes, bytes | None],
    scanned: list[tuple[bytes, bytes]] | None = None,
) -> None:
    """A transaction read what stood before its LSN; raises `Wrong`."""
    for key, value in reads.items():
        check(before.get(key) == value, f"LSN {lsn} is not serializable: it read {key!r}")
    if scanned is not None:
        check(scanned == sorted(before.items()), f"LSN {lsn} is not serializable: it scanned")
