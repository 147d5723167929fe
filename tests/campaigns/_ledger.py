"""What the program was told, and whether what is there now agrees with it.

Law: pure.  Built from the program's messages alone; trusts nothing that a log says about
itself beyond what stands in it.  A ledger that has heard the messages up to some moment says
what is wrong with what an opening finds after a crash at that moment.

What a log may hold is `_promises`' to say.  Of a database this knows besides: the state is the
one after a number of whole transactions, at least those acknowledged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, TypeAlias

import attrs

from ._program import ACCOUNTS, BALANCE, writes_of
from ._promises import LOST, Found, Promises, Record, Wrong, anything

Id: TypeAlias = tuple[int, int, int]
"""(life, task, number): of a unit, of a transaction."""
Marks: TypeAlias = list[list[int] | None]
"""`_program.Mark` of each record; None: it has wrong bytes."""


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


class Ledger:
    """Of one log or database, over all its lives."""

    def __init__(self, seed: int, *, power: bool) -> None:
        self.seed = seed
        self.power = power
        """After a power cut only what is durable must be there; after a kill also what was
        acknowledged as written."""
        self.life = 0
        self.promises = Promises()
        self.problems: list[str] = []
        self.errors = Errors()
        self.acknowledged = 0
        self.opened = 0
        """How often it was opened and looked at."""
        self.closing = False
        """Whether the present life has said that it is closing."""
        self.place: int | None = None
        """Where the consumer was told to be; None: perhaps there is none."""
        self.tried: int = -1
        """Up to where it has asked to be."""
        self.units: dict[Id, list[Record]] = {}
        """All that anybody meant to write."""

    def copy(self) -> Ledger:
        return deepcopy(self)

    def hear(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.take(json.loads(line))

    def take(self, words: Sequence[Any]) -> None:
        try:
            getattr(self, "_" + words[0].replace(" ", "_"))(*words[1:])
        except Wrong as exc:
            self.problems.append(str(exc))

    # -- messages of both --

    def _life(self, life: int) -> None:
        self.life = life
        self.closing = False

    def _will(self, task: int, number: int, parts: int) -> None:
        unit = (self.life, task, number)
        keys = [(*unit, part, parts) for part in range(parts)]
        self.units[unit] = self.promises.submit(unit[:2], *keys)

    def _ack(self, task: int, number: int, lsn: int) -> None:
        """Acknowledged, so durable."""
        self.acknowledged += 1
        self.promises.acknowledge(self.units[self.life, task, number], lsn)

    def _written(self, task: int, number: int, lsn: int) -> None:
        """Acknowledged where durability is less than "sync"."""
        self.acknowledged += 1
        self.promises.acknowledge(self.units[self.life, task, number], lsn, durable=False)

    def _seen(self, lsn: int | None) -> None:
        """Everything up to here is durable: something said so, or showed it."""
        self.promises.settle_durable(lsn or 0)

    def _absent(self, task: int, number: int) -> None:
        self.promises.withdraw(self.units[self.life, task, number], "it was cancelled")

    def _error(
        self, task: int, number: int, name: str, outcome: str, number_of: int | None
    ) -> None:
        self.errors.names.append((name, outcome, number_of))
        if number >= 0 and (name == "LogFullError" or outcome == "not written"):
            self.promises.withdraw(self.units[self.life, task, number], f"it raised {name}")

    def _refused(self, name: str, number: int | None, text: str) -> None:
        self.errors.refused.append((name, number, text))

    def _dead(self, durable_lsn: int) -> None:
        """The failed handle refuses; it says up to where everything is durable."""
        self.errors.dead = True
        if (durable := self.promises.durable) > durable_lsn:
            self.problems.append(f"it failed at LSN {durable_lsn}, and {durable} was durable")

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

    # -- messages of a consumer --

    def _begun(self, lsn: int) -> None:
        if self.place is None:
            self.place = lsn
        self.tried = max(self.tried, lsn)

    def _acknowledging(self, lsn: int) -> None:
        self.tried = max(self.tried, lsn)

    def _place_acknowledged(self, lsn: int) -> None:
        self.place = lsn

    def _forgetting(self) -> None:
        self.place, self.tried = None, 1 << 62

    def _forgotten(self) -> None:
        self.tried = -1

    def _place(self, lsn: int | None) -> None:
        """Where an opening finds it."""
        if self.place is not None and (lsn is None or not self.place <= lsn <= self.tried):
            self.problems.append(
                f"{LOST}: the consumer is at LSN {lsn}, has been at {self.place}, and has tried "
                f"{self.tried}"
            )
        self.place = lsn
        self.tried = -1 if lsn is None else lsn

    def _check_found(self, found: Found, first_lsn: int) -> list[str]:
        return list(map(str, self.promises.check(found, first_lsn, killed=not self.power)))


# -- the log ---------------------------------------------------------------------------


class LogLedger(Ledger):
    def __init__(self, seed: int, *, power: bool) -> None:
        super().__init__(seed, power=power)
        self.dropping = 0
        """The LSN of the last truncate_before that was asked for."""

    def _flushed(self, durable: int, task: int, numbers: list[int], low: int) -> None:
        self._seen(durable)
        self.acknowledged += len(numbers)
        for number in numbers:
            self.promises.cover(self.units[self.life, task, number], low)

    def _drop(self, lsn: int) -> None:
        self.dropping = lsn
        self.promises.begin_drop(lsn)

    def _dropped(self, first_lsn: int) -> None:
        self.promises.raise_floor(first_lsn)
        self.promises.end_drop(self.dropping)

    def _not_dropped(self) -> None:
        self.promises.end_drop(self.dropping)

    def _cut(self, lsn: int) -> None:
        self._not_cut()  # of one that was refused, as for want of space, only an error is told
        self.promises.begin_cut(lsn)

    def _not_cut(self) -> None:
        if self.promises.cut is not None:
            self.promises.end_cut(done=False)

    def _cut_done(self, lsn: int) -> None:
        self.promises.end_cut(done=True)

    def _map(self, first: int, marks: Marks) -> None:
        """Everything that is in the log, nothing being under way."""
        self.promises.learn(_found(first, marks))

    def _open(self, first: int, last: int, torn: int, clean: bool, marks: Marks) -> None:
        self.problems += self.check((first, last, torn, clean, marks))
        self.opened += 1
        # From here on what was found is the truth, and what was not is gone for good.
        found = _found(first, marks)
        self.promises.crashed(found, first)
        self.promises.opened(found, last)
        self.promises.raise_floor(first)

    def check(self, words: Sequence[Any]) -> list[str]:
        first, last, _, _, marks = words
        wrong: list[str] = []
        if len(marks) != last + 1 - first:
            wrong.append(f"{len(marks)} records from LSN {first} to {last}")
        return wrong + self._check_found(_found(first, marks), first)


def _found(first: int, marks: Marks) -> Found:
    return [(lsn, None if mark is None else tuple(mark)) for lsn, mark in enumerate(marks, first)]


# -- the database ----------------------------------------------------------------------


class DatabaseLedger(Ledger):
    def __init__(self, seed: int, *, power: bool) -> None:
        super().__init__(seed, power=power)
        # How much of its log it may drop, its state says.
        self.promises.lets_go = anything
        self.settled: dict[tuple[int, int], int] = {}
        """Of each task of an earlier life: the number of its last transaction."""

    def _set_up(self) -> None:
        pass

    def _open(self, *words: Any) -> None:
        self.problems += self.check(words)
        self.opened += 1
        durable, _, _, _, counts, _, _, _, commits = words
        self.settled = {(life, task): number for life, task, number in counts}
        found, first = _committed(commits, durable)
        kept = {record for unit in self._included(self.settled) for record in self.units[unit]}
        self.promises.crashed(found, first, kept)
        self.promises.opened(found, durable)

    def _included(self, last: dict[tuple[int, int], int]) -> list[Id]:
        """What is in a state in which these are the last of each task."""
        return [
            unit
            for unit, (record,) in self.units.items()
            if unit[2] <= last.get(unit[:2], -1) and not record.gone
        ]

    def check(self, words: Sequence[Any]) -> list[str]:
        durable, _, _, setup, counts, own, shared, balances, commits = words
        last = {(life, task): number for life, task, number in counts}
        found, first = _committed(commits, durable)
        wrong = self._check_found(found, first)
        if first + len(found) - 1 != durable:
            wrong.append(f"the log ends at LSN {commits[-1][0]}, and {durable} is durable")
        for pair, number in last.items():
            unit = (*pair, number)
            if unit not in self.units:
                wrong.append(f"{unit} is there, which nobody wrote")
            elif self.units[unit][0].gone:
                wrong.append(f"{unit} is there, which must not be")
        for pair, number in self.settled.items():
            if pair[0] < self.life and last.get(pair) != number:
                wrong.append(f"{LOST}: {pair} was at {number}, is at {last.get(pair)}")
        must = max(self.promises.durable, 0 if self.power else self.promises.written)
        known = {
            unit: record.lsn
            for unit, (record,) in self.units.items()
            if record.lsn and not record.gone
        }
        wrong += [
            f"{LOST}: {unit} at LSN {lsn}"
            for unit, lsn in known.items()
            if lsn <= must and unit[2] > last.get(unit[:2], -1)
        ]
        included = self._included(last)
        if durable != len(included) + bool(setup):
            wrong.append(f"ends at LSN {durable} with {len(included)} transactions, setup {setup}")
        if setup and (len(balances), sum(balances)) != (ACCOUNTS, ACCOUNTS * BALANCE):
            wrong.append(f"{len(balances)} accounts have {sum(balances)}")
        wrong += self._check_own(included, own)
        there = set(included)
        for lsn, life, task, number in commits:
            if (life, task, number) not in there:
                wrong.append(f"LSN {lsn} is {(life, task, number)}, but the state is without it")
            known[life, task, number] = lsn
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


def _committed(commits: list[list[int]], durable: int) -> tuple[Found, int]:
    """(what stands in the log, its first LSN)"""
    found = [(lsn, (life, task, number, 0, 1)) for lsn, life, task, number in commits]
    return found, found[0][0] if found else durable + 1


def new_ledger(kind: str, seed: int, *, power: bool) -> Ledger:
    return (LogLedger if kind == "log" else DatabaseLedger)(seed, power=power)
