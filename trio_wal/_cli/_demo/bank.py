"""Accounts between which money is moved, while lines go into the same database.

Law: pure; both processes agree here on keys and values.  Money is neither made nor lost:
whatever is killed when, the sum of all balances is the same.
"""

from __future__ import annotations

import struct
from random import Random
from typing import Final

import attrs

from trio_wal._transaction import Transaction

from .ledger import Ledger
from .workload import Workload

ACCOUNTS: Final = 100
BALANCE: Final = 1_000
TRANSFER_TASKS: Final = 16
AMOUNT_MAX: Final = 100
UNDER_WAY: Final = 2
"""Transfers a task that a kill may leave without an acknowledgement: one whose word was not
sent yet, and one that was durable and whose task had not run yet."""

_LINE: Final = struct.Struct(">cI")
_NUMBER: Final = struct.Struct(">cH")


def line_key(index: int) -> bytes:
    """Of a line of the workload."""
    return _LINE.pack(b"L", index)


def line_index(key: bytes) -> int:
    index: int = _LINE.unpack(key)[1]
    return index


def account_key(number: int) -> bytes:
    return _NUMBER.pack(b"A", number)


def count_key(task: int) -> bytes:
    """Where a task counts its transfers, in the same transaction as each."""
    return _NUMBER.pack(b"T", task)


LINES: Final = b"L"
ACCOUNT: Final = b"A"


def move(tx: Transaction, task: int, turn: int, rng: Random) -> None:
    """One transfer, and the count of it."""
    source, target = rng.sample(range(ACCOUNTS), 2)
    balance = int(tx.get(account_key(source), b"0"))
    amount = min(balance, rng.randint(1, AMOUNT_MAX))
    tx.put(account_key(source), b"%d" % (balance - amount))
    tx.put(account_key(target), b"%d" % (int(tx.get(account_key(target), b"0")) + amount))
    tx.put(count_key(task), b"%d" % (turn + 1))


@attrs.define
class BankProblems:
    """Of one look at the accounts."""

    missing_money: int = 0
    """Difference of the sum of all balances from what it must be."""
    lost_transfers: int = 0
    """Acknowledged transfers that are not there."""
    invented_transfers: int = 0
    """Transfers beyond those that each task can have had under way."""

    def __bool__(self) -> bool:
        return any(attrs.astuple(self))


class BankLedger(Ledger):
    """Also what was acknowledged of transfers: their index stands behind the last line's."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.transfers = [0] * TRANSFER_TASKS
        """Acknowledged, by task."""
        self.counted = [0] * TRANSFER_TASKS
        """Found in the database by the last look, by task."""

    def acknowledge(self, words: list[int]) -> None:  # type: ignore[override]
        """As `Ledger.acknowledge`, transfers among them."""
        lines = len(self._workload.records)
        own: list[int] = []
        for place in range(0, len(words), 3):
            if words[place] < lines:
                own += words[place : place + 3]
            else:
                self.transfers[words[place] - lines] += 1
        super().acknowledge(own)

    def stored(self, index: int, data: bytes) -> None:
        """A line as the database has it."""
        workload, problems, found = self._workload, self._problems, self._found
        if index >= len(workload.records) or workload.records[index] != data:
            problems.altered += 1
            return
        found[index] = 1
        if not (index and found[index - 1]) and not workload.is_first_of_task(index):
            problems.misordered += 1

    def settle(self, balances: int, counts: list[int]) -> BankProblems:
        """Compare accounts and counts."""
        problems = BankProblems(missing_money=ACCOUNTS * BALANCE - balances)
        for task, count in enumerate(counts):
            problems.lost_transfers += max(0, self.transfers[task] - count)
            problems.invented_transfers += max(0, count - self.transfers[task] - UNDER_WAY)
        # What a kill left in the database without an acknowledgement counts from here on.
        self.transfers = [max(pair) for pair in zip(self.transfers, counts, strict=True)]
        self.counted = counts
        return problems
