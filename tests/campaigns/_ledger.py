"""What the program was told, and whether what is there now agrees with it.

Law: pure.  Built from the program's messages alone; trusts nothing that a log says about
itself beyond what stands in it.  A ledger that has heard the messages up to some moment says
what must be there after a crash at that moment, what may, and what must not.

Of a log: every acknowledged record at its LSN, all of a unit or none of it, the records of a
task in its order and without a gap, nothing that nobody wrote, nothing that was cancelled,
cut off, or already missing after an earlier crash; first LSN and last as truncations allow.
Of a database: the state after a number of whole transactions, at least those acknowledged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, Final, TypeAlias

import attrs

from ._program import ACCOUNTS, BALANCE, writes_of

Id: TypeAlias = tuple[int, int, int]
"""(life, task, number): of a unit, of a transaction."""

LOST: Final = "lost"
"""How a problem begins that is the loss of something acknowledged."""


@attrs.define
class Errors:
    """How calls failed, and what is to be checked of that."""

    names: list[tuple[str, str, int | None]] = attrs.Factory(list)
    """(class, outcome, errno) of each."""
    dead: bool = False
    """Whether a failed handle refused a later call."""
    room: int | None = None
    """Acknowledgements before a full disk had space again."""
    refused: list[tuple[str, int | None, str]] = attrs.Factory(list)
    """(class, errno, text) of each refusal to open."""
    second_sync: list[str] = attrs.Factory(list)

    @property
    def broken(self) -> bool:
        """Whether the log was told to have failed."""
        return any(name == "LogFailedError" for name, _, _ in self.names)


class Ledger:
    """Of one log or database, over all its lives."""

    def __init__(self, seed: int, *, power: bool) -> None:
        self.seed = seed
        self.power = power
        """After a power cut only what is durable must be there; after a kill also what was
        acknowledged as written."""
        self.life = 0
        self.problems: list[str] = []
        self.errors = Errors()
        self.acknowledged = 0
        self.opened = 0
        """How often it was opened and looked at."""
        self.last_seen: tuple[Any, ...] = ()
        """What the last opening found."""
        self.closing = False
        """Whether the present life has said that it is closing."""
        self.willed: dict[Id, int] = {}
        """Parts of each unit that anybody meant to write."""
        self.absent: set[Id] = set()
        """What must not be there any more, or never was."""
        self.lsn_of: dict[Id, int] = {}
        self.at: dict[int, Id] = {}
        self.parts: dict[Id, int] = {}
        """Of units whose LSN is known: how many of its records there are."""
        self.required_last = 0
        """The LSN that must still be there."""
        self._acked: dict[Id, int] = {}
        """In the present life, as durable."""

    def copy(self) -> Ledger:
        return deepcopy(self)

    def hear(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.take(json.loads(line))

    def take(self, words: Sequence[Any]) -> None:
        getattr(self, "_" + words[0].replace(" ", "_"))(*words[1:])

    # -- messages of both --

    def _life(self, life: int) -> None:
        self.life = life
        self.closing = False
        self._acked = {}

    def _will(self, task: int, number: int, parts: int) -> None:
        self.willed[self.life, task, number] = parts

    def _ack(self, task: int, number: int, lsn: int) -> None:
        """Acknowledged, so durable."""
        self._written(task, number, lsn)
        self._acked[self.life, task, number] = lsn
        self._seen(lsn + self.willed[self.life, task, number] - 1)

    def _written(self, task: int, number: int, lsn: int) -> None:
        """Acknowledged where durability is less than "sync"."""
        self.acknowledged += 1
        unit = (self.life, task, number)
        self.lsn_of[unit] = lsn
        self.parts[unit] = self.willed[unit]
        for place in range(lsn, lsn + self.willed[unit]):
            if self.at.setdefault(place, unit) != unit:
                self.problems.append(f"LSN {place} was given to {self.at[place]} and to {unit}")
        if not self.power:
            self._seen(lsn + self.willed[unit] - 1)

    def _seen(self, lsn: int | None) -> None:
        """Everything up to here is durable: something said so, or showed it."""
        self.required_last = max(self.required_last, lsn or 0)

    def _absent(self, task: int, number: int) -> None:
        self.absent.add((self.life, task, number))

    def _error(
        self, task: int, number: int, name: str, outcome: str, number_of: int | None
    ) -> None:
        self.errors.names.append((name, outcome, number_of))
        if number >= 0 and (name == "LogFullError" or outcome == "not written"):
            self.absent.add((self.life, task, number))

    def _refused(self, name: str, number: int | None, text: str) -> None:
        self.errors.refused.append((name, number, text))

    def _dead(self, durable_lsn: int) -> None:
        """The failed handle refuses; it says up to where everything is durable."""
        self.errors.dead = True
        above = {unit: lsn for unit, lsn in self._acked.items() if lsn > durable_lsn}
        if above:
            self.problems.append(f"acknowledged above LSN {durable_lsn}, where it failed: {above}")

    def _room(self) -> None:
        """A full disk has space again."""
        self.errors.room = self.acknowledged

    def _second_sync(self, said: list[str]) -> None:
        self.errors.second_sync += said

    def _synced(self, name: str) -> None:
        """The operating system said that a sync had succeeded."""

    def _strange(self, text: str) -> None:
        self.problems.append(text)

    def _closing(self) -> None:
        self.closing = True

    def _closed(self) -> None:
        pass

    def check(self, words: Sequence[Any]) -> list[str]:
        """What is wrong with the message of an opening now; the ledger stays as it is."""
        raise NotImplementedError


# -- the log ---------------------------------------------------------------------------


class LogLedger(Ledger):
    def __init__(self, seed: int, *, power: bool) -> None:
        super().__init__(seed, power=power)
        self.dropped_low = 1
        """At least up to here a finished truncate_before dropped."""
        self.dropped_high = 1
        """No truncate_before has asked for more."""
        self.cut_lsn: int | None = None
        """A truncate_after that has begun and not ended."""
        self.flushed: list[tuple[Id, int]] = []
        """(record, LSN that it is above) of those that were sent and a flush has covered."""

    def _flushed(self, durable: int, task: int, numbers: list[int], low: int) -> None:
        self._seen(durable)
        self.acknowledged += len(numbers)
        self.flushed += [((self.life, task, number), low) for number in numbers]

    def _drop(self, lsn: int) -> None:
        self.dropped_high = max(self.dropped_high, lsn)

    def _dropped(self, first_lsn: int) -> None:
        self.dropped_low = max(self.dropped_low, first_lsn)

    def _cut(self, lsn: int) -> None:
        self.cut_lsn = lsn

    def _not_cut(self) -> None:
        self.cut_lsn = None

    def _not_dropped(self) -> None:
        pass

    def _cut_done(self, lsn: int) -> None:
        self.cut_lsn = None
        self._forget_above(lsn)
        self.required_last = lsn

    def _map(self, first: int, marks: list[list[int] | None]) -> None:
        """Everything that is in the log, nothing being under way."""
        self._learn(first, marks)

    def _learn(self, first: int, marks: list[list[int] | None]) -> None:
        """Which record has which LSN, also of those that were only sent."""
        self.flushed = []
        self.at = {
            lsn: (mark[0], mark[1], mark[2])
            for lsn, mark in enumerate(marks, first)
            if mark is not None
        }
        self.lsn_of = {}
        self.parts = {}
        for lsn, unit in self.at.items():
            self.lsn_of.setdefault(unit, lsn)
            self.parts[unit] = self.parts.get(unit, 0) + 1

    def _forget_above(self, lsn: int) -> None:
        gone = {unit for unit, first in self.lsn_of.items() if first > lsn}
        self.absent |= gone
        for unit in gone:
            del self.lsn_of[unit]
            self._acked.pop(unit, None)
        self.at = {place: unit for place, unit in self.at.items() if place <= lsn}
        if (last := self.at.get(lsn)) is not None:
            # Of this unit a part may have been cut off.
            self.parts[last] = lsn - self.lsn_of[last] + 1

    def _open(
        self, first: int, last: int, torn: int, clean: bool, marks: list[list[int] | None]
    ) -> None:
        words = (first, last, torn, clean, marks)
        self.problems += self.check(words)
        self.opened += 1
        self.last_seen = words
        # From here on what was found is the truth, and what was not is gone for good.
        self.cut_lsn = None
        self.required_last = last
        self.dropped_low = max(self.dropped_low, first)
        self.dropped_high = max(self.dropped_high, first)
        self._learn(first, marks)
        self.absent |= {unit for unit in self.willed if unit not in self.lsn_of}

    def check(self, words: Sequence[Any]) -> list[str]:
        first, last, _, _, marks = words
        wrong: list[str] = []
        if len(marks) != last + 1 - first:
            wrong.append(f"{len(marks)} records from LSN {first} to {last}")
        if not self.dropped_low <= first <= self.dropped_high:
            wrong.append(
                f"starts at LSN {first}; truncations allow {self.dropped_low} "
                f"to {self.dropped_high}"
            )
        was_cut = self.cut_lsn is not None and last == self.cut_lsn
        if last < self.required_last and not was_cut:
            wrong.append(f"{LOST}: ends at LSN {last}, durable was {self.required_last}")
        return wrong + self._check_records(first, last, marks)

    def _check_records(self, first: int, last: int, marks: list[list[int] | None]) -> list[str]:
        wrong: list[str] = []
        parts: dict[Id, list[tuple[int, int]]] = {}
        newest = 0
        for lsn, mark in enumerate(marks, first):
            if mark is None:
                wrong.append(f"LSN {lsn} has wrong bytes")
                continue
            life, task, number, part, of = mark
            unit = (life, task, number)
            if self.willed.get(unit) != of:
                wrong.append(f"LSN {lsn} is {unit}, which nobody wrote")
            if unit in self.absent:
                wrong.append(f"LSN {lsn} is {unit}, which must not be there")
            if life < newest:
                wrong.append(f"LSN {lsn} is of life {life}, after one of life {newest}")
            newest = max(newest, life)
            parts.setdefault(unit, []).append((lsn, part))
            known = self.at.get(lsn)
            if known is not None and known != unit:
                wrong.append(f"{LOST}: LSN {lsn} is {unit}, acknowledged was {known}")
        wrong += self._check_units(last, parts)
        wrong += [
            f"{LOST}: {unit} at LSN {lsn}"
            for unit, lsn in self.lsn_of.items()
            if first <= lsn <= min(last, self.required_last) and unit not in parts
        ]
        if self.cut_lsn is None:
            wrong += [
                f"{LOST}: {unit}, which a flush covered"
                for unit, low in self.flushed
                if low + 1 >= first and unit not in parts
            ]
        return wrong

    def _check_units(self, last: int, units: dict[Id, list[tuple[int, int]]]) -> list[str]:
        wrong: list[str] = []
        by_task: dict[tuple[int, int], list[int]] = {}
        for unit, found in units.items():
            start = found[0][0]
            count = self.parts.get(unit) or self.willed.get(unit, len(found))
            whole = [(start + part, part) for part in range(count)]
            if self.cut_lsn is not None and found[-1][0] == last == self.cut_lsn:
                # truncate_after may cut through a unit.
                whole = whole[: len(found)]
            if found != whole:
                wrong.append(f"of {unit} there is {found}, not all {count} parts in a row")
            by_task.setdefault(unit[:2], []).append(unit[2])
        for (life, task), numbers in by_task.items():
            if numbers != sorted(numbers):
                wrong.append(f"the records of task {task} of life {life} are out of order")
            missing = [
                number
                for number in range(min(numbers), max(numbers))
                if (life, task, number) in self.willed
                and (life, task, number) not in self.absent
                and (life, task, number) not in units
            ]
            if missing:
                wrong.append(f"of task {task} of life {life}, {missing} are missing in between")
        return wrong


# -- the database ----------------------------------------------------------------------


class DatabaseLedger(Ledger):
    def __init__(self, seed: int, *, power: bool) -> None:
        super().__init__(seed, power=power)
        self.settled: dict[tuple[int, int], int] = {}
        """Of each task of an earlier life: the number of its last transaction."""

    def _set_up(self) -> None:
        pass

    def _open(self, *words: Any) -> None:
        self.problems += self.check(words)
        self.opened += 1
        self.last_seen = words
        durable, _, _, _, counts, _, _, _, commits = words
        self.required_last = durable
        self.settled = {(life, task): number for life, task, number in counts}
        included = {(life, task): number for life, task, number in counts}
        self.absent |= {unit for unit in self.willed if unit[2] > included.get(unit[:2], -1)}
        self.at = {lsn: unit for lsn, unit in self.at.items() if lsn <= durable}
        self.lsn_of = {unit: lsn for unit, lsn in self.lsn_of.items() if lsn <= durable}
        for lsn, life, task, number in commits:
            self.at[lsn] = (life, task, number)
            self.lsn_of[life, task, number] = lsn

    def check(self, words: Sequence[Any]) -> list[str]:
        durable, _, _, setup, counts, own, shared, balances, commits = words
        wrong: list[str] = []
        last = {(life, task): number for life, task, number in counts}
        if durable < self.required_last:
            wrong.append(f"{LOST}: ends at LSN {durable}, durable was {self.required_last}")
        for pair, number in last.items():
            unit = (*pair, number)
            if unit not in self.willed:
                wrong.append(f"{unit} is there, which nobody wrote")
            elif unit in self.absent:
                wrong.append(f"{unit} is there, which must not be")
        for pair, number in self.settled.items():
            if pair[0] < self.life and last.get(pair) != number:
                wrong.append(f"{LOST}: {pair} was at {number}, is at {last.get(pair)}")
        wrong += [
            f"{LOST}: {unit} at LSN {lsn}"
            for unit, lsn in self.lsn_of.items()
            if lsn <= self.required_last and unit[2] > last.get(unit[:2], -1)
        ]
        included = [
            unit
            for unit in self.willed
            if unit[2] <= last.get(unit[:2], -1) and unit not in self.absent
        ]
        if durable != len(included) + bool(setup):
            wrong.append(f"ends at LSN {durable} with {len(included)} transactions, setup {setup}")
        if setup and (len(balances), sum(balances)) != (ACCOUNTS, ACCOUNTS * BALANCE):
            wrong.append(f"{len(balances)} accounts have {sum(balances)}")
        wrong += self._check_own(included, own)
        known = self._check_commits(durable, included, commits, wrong)
        return wrong + self._check_shared(included, shared, known)

    def _check_own(self, included: list[Id], own: list[list[int]]) -> list[str]:
        expected: dict[tuple[int, int], tuple[int, int]] = {}
        for life, task, number in sorted(included):
            for slot, size in writes_of(self.seed, life, task, number).own:
                if size is None:
                    expected.pop((task, slot), None)
                else:
                    expected[task, slot] = (life, number)
        found = {(task, slot): (life, number) for task, slot, life, number in own}
        return [
            f"{LOST}: slot {slot} of task {task} is of {found.get((task, slot))}, "
            f"not of {expected.get((task, slot))}"
            for task, slot in sorted(expected.keys() | found.keys())
            if found.get((task, slot)) != expected.get((task, slot))
        ]

    def _check_commits(
        self, durable: int, included: list[Id], commits: list[list[int]], wrong: list[str]
    ) -> dict[Id, int]:
        """Compare the log with what was acknowledged; gives all LSNs that are known."""
        there = set(included)
        known = {unit: lsn for unit, lsn in self.lsn_of.items() if lsn <= durable}
        for place, (lsn, *rest) in enumerate(commits):
            unit = (rest[0], rest[1], rest[2])
            if lsn != durable - len(commits) + 1 + place:
                wrong.append(f"the log has LSN {lsn} in place {place} of {len(commits)}")
            if self.at.get(lsn, unit) != unit or known.get(unit, lsn) != lsn:
                wrong.append(f"{LOST}: LSN {lsn} is {unit}, acknowledged was {self.at.get(lsn)}")
            if unit not in there:
                wrong.append(f"LSN {lsn} is {unit}, but the state is without it")
            known[unit] = lsn
        return known

    def _check_shared(
        self, included: list[Id], shared: list[list[int]], known: dict[Id, int]
    ) -> list[str]:
        """Of all who wrote a shared key, the last in the log has it."""
        wrong: list[str] = []
        there = set(included)
        owner = {place: (life, task, number) for place, life, task, number in shared}
        newest: dict[int, tuple[int, Id]] = {}
        written: set[int] = set()
        for unit in included:
            for place in writes_of(self.seed, *unit).shared:
                written.add(place)
                if unit in known:
                    newest[place] = max(newest.get(place, (0, unit)), (known[unit], unit))
        if written != set(owner):
            wrong.append(
                f"{LOST}: shared keys {sorted(owner)} are there, {sorted(written)} written"
            )
        for place, unit in owner.items():
            if unit not in there or place not in writes_of(self.seed, *unit).shared:
                wrong.append(f"shared key {place} is {unit}'s, who did not write it")
            elif unit in known and place in newest and newest[place][1] != unit:
                wrong.append(f"{LOST}: shared key {place} is {unit}'s, not {newest[place][1]}'s")
        return wrong


def new_ledger(kind: str, seed: int, *, power: bool) -> Ledger:
    return (LogLedger if kind == "log" else DatabaseLedger)(seed, power=power)
