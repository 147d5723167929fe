"""The demo on a database: what its ledger notices, and a run with a kill."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio

pytest.importorskip("cyclopts", reason="the demo needs the cli extra")

from trio_wal import open_database
from trio_wal._cli._demo import bank, run as demo_run
from trio_wal._cli._demo.bank import ACCOUNTS, BALANCE, TRANSFER_TASKS, BankLedger
from trio_wal._cli._demo.workload import Workload, build
from trio_wal.testing import MemoryFiles


class Silent:
    def describe(self, what: str) -> None: ...

    def update(self, done: float, total: float) -> None: ...

    def note(self, text: str) -> None: ...


def small() -> Workload:
    return build((b"one\ntwo\nthree\n", b"four\n"), tasks=2)


def ledger_with(*stored: int, acknowledged: list[int]) -> BankLedger:
    ledger = BankLedger(small())
    ledger.acknowledge([word for index in acknowledged for word in (index, index + 1, 5)])
    ledger.begin()
    for index in stored:
        ledger.stored(index, small().records[index])
    return ledger


def test_a_line_that_was_acknowledged_and_is_not_there_is_lost() -> None:
    assert ledger_with(0, 1, 2, acknowledged=[0, 1, 2, 3]).end().lost == 1
    assert not ledger_with(0, 1, 2, 3, acknowledged=[0, 1, 2]).end()


def test_a_line_whose_bytes_differ_is_altered() -> None:
    ledger = ledger_with(acknowledged=[])
    ledger.stored(0, b"something else")
    assert ledger.end().altered == 1


def test_a_line_without_the_one_before_it_is_out_of_order() -> None:
    assert ledger_with(1, acknowledged=[]).end().misordered == 1


def test_money_that_is_missing_is_noticed() -> None:
    ledger = BankLedger(small())
    counts = [0] * TRANSFER_TASKS
    assert not ledger.settle(ACCOUNTS * BALANCE, counts)
    assert ledger.settle(ACCOUNTS * BALANCE - 7, counts).missing_money == 7


def test_transfers_that_are_lost_or_invented_are_noticed() -> None:
    ledger = BankLedger(small())
    lines = len(small().records)
    ledger.acknowledge([lines + 3, 9, 5, lines + 3, 10, 5])
    counts = [0] * TRANSFER_TASKS
    counts[3] = 1
    assert ledger.settle(ACCOUNTS * BALANCE, list(counts)).lost_transfers == 1
    counts[3] = 2 + bank.UNDER_WAY  # what a kill can leave unacknowledged
    assert not ledger.settle(ACCOUNTS * BALANCE, list(counts))
    counts[3] = 3 + 2 * bank.UNDER_WAY
    assert ledger.settle(ACCOUNTS * BALANCE, list(counts)).invented_transfers == 1


async def test_a_transfer_keeps_the_sum_and_counts_itself() -> None:
    async with open_database("/bank", files=MemoryFiles()) as db:
        async with db.transaction() as tx:
            for number in range(ACCOUNTS):
                tx.put(bank.account_key(number), b"%d" % BALANCE)
        rng = Random(1)
        for turn in range(50):
            async with db.transaction() as tx:
                bank.move(tx, 2, turn, rng)
        balances = [int(value) for _, value in db.scan(prefix=bank.ACCOUNT)]
        assert sum(balances) == ACCOUNTS * BALANCE
        assert len(set(balances)) > 1
        assert db.get(bank.count_key(2)) == b"50"


@pytest.fixture
def workload() -> Workload:
    return build(tuple(b"line %d\n" % number * 50 for number in range(200)), tasks=16)


async def test_a_database_that_is_killed_on_the_way_loses_nothing(
    tmp_path: Path, workload: Workload
) -> None:
    report = await demo_run.run(
        workload, str(tmp_path / "db"), kills=1, seed=3, watcher=Silent(), database=True
    )
    assert report.ok
    assert report.kills == 1
    assert report.found == report.lines == len(workload.records)
    assert report.transfers > 0


async def test_a_database_that_forgets_is_noticed(
    tmp_path: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = demo_run._DatabaseDemo._check

    async def forgetful(self: demo_run._DatabaseDemo, *arguments: object) -> float:
        async with open_database(self._directory) as db:
            await db.delete(bank.line_key(0))
            await db.put(bank.account_key(0), b"0")
        return await real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(demo_run._DatabaseDemo, "_check", forgetful)
    report = await demo_run.run(
        workload, str(tmp_path / "db"), kills=1, seed=3, watcher=Silent(), database=True
    )
    assert not report.ok
    assert report.problems.lost == 1
    assert report.bank.missing_money != 0
    await trio.lowlevel.checkpoint()
