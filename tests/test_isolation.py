"""No anomaly of the literature: the cases of Martin Kleppmann's Hermitage, and cousins.

Two rows, ``1 = 10`` and ``2 = 20``.  Each case runs with nothing between its steps, with a
checkpoint after every commit (a transaction then reads from a store that has moved on),
and with a disk that stalls (every commit stays pending while others read it).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
from databases import Session, State, open_memory_database, open_sessions, write
from trio.testing import wait_all_tasks_blocked

from trio_wal import Database, TransactionConflict
from trio_wal.testing import MemoryFiles

ONE, TWO, THREE, FOUR = b"1", b"2", b"3", b"4"


@attrs.define(eq=False)
class Case:
    """Transactions side by side, and what is done between their steps."""

    db: Database
    files: MemoryFiles
    between: str
    t: list[Session]

    async def commit(self, number: int) -> Any:
        """End transaction ``number``; gives its LSN, a conflict, or None while it is pending."""
        session = self.t[number]
        session.commit_soon()
        await wait_all_tasks_blocked()
        if self.between == "checkpoint":
            await self.db.checkpoint()
        elif self.between == "three checkpoints":
            for n in range(3):
                await self.db.put(b"other", b"%d" % n)
                await self.db.checkpoint()
        return session.outcome

    def refused(self, number: int, key: bytes | None = None) -> bool:
        outcome = self.t[number].outcome
        return isinstance(outcome, TransactionConflict) and key in (None, outcome.key)

    async def finish(self) -> State:
        """Let the disk go on, and look at the two (or more) rows."""
        self.files.release()
        await wait_all_tasks_blocked()
        return {key: value for key, value in self.db.scan() if key != b"other"}

    def outcomes(self) -> list[bool]:
        """Of each transaction: whether it was committed."""
        return [isinstance(session.outcome, int) for session in self.t]


BETWEEN = ("nothing", "checkpoint", "three checkpoints", "stalled disk")


@pytest.fixture(params=BETWEEN)
def between(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


@asynccontextmanager
async def open_case(between: str, count: int) -> AsyncIterator[Case]:
    files = MemoryFiles()
    async with open_memory_database(files) as db:
        await write(db, {ONE: b"10", TWO: b"20"})
        async with open_sessions(db, count) as sessions:
            if between == "stalled disk":
                files.hold()
            try:
                yield Case(db, files, between, sessions)
            finally:
                # A commit that others have read waits for the disk, cancelled or not.
                files.release()


def value_is(number: int) -> Any:
    return lambda items: {key: value for key, value in items.items() if int(value) == number}


# -- G0: write cycles --------------------------------------------------------------


async def test_g0_write_cycles_of_blind_writes_leave_one_of_both(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        await t1.put(ONE, b"11")
        await t2.put(ONE, b"12")
        await t1.put(TWO, b"21")
        await case.commit(0)
        await t2.put(TWO, b"22")
        await case.commit(1)
        assert await case.finish() == {ONE: b"12", TWO: b"22"}
        assert case.outcomes() == [True, True]


async def test_g0_write_cycles_of_updates_are_refused(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        await t1.do(lambda tx: tx.update(ONE, b"11"))
        await t2.do(lambda tx: tx.update(ONE, b"12"))
        await t1.do(lambda tx: tx.update(TWO, b"21"))
        await case.commit(0)
        await t2.do(lambda tx: tx.update(TWO, b"22"))
        await case.commit(1)
        assert case.refused(1)
        assert await case.finish() == {ONE: b"11", TWO: b"21"}


# -- G1: dirty reads ---------------------------------------------------------------


async def test_g1a_what_was_aborted_is_never_read(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        await t1.put(ONE, b"101")
        assert await t2.get(ONE) == b"10"
        await t1.abort()
        assert await t2.get(ONE) == b"10"
        await case.commit(1)
        assert await case.finish() == {ONE: b"10", TWO: b"20"}
        assert case.outcomes() == [False, True]


async def test_g1b_what_was_written_in_between_is_never_read(between: str) -> None:
    async with open_case(between, 3) as case:
        t1, t2, t3 = case.t
        await t1.put(ONE, b"101")
        assert await t2.get(ONE) == b"10"
        await t1.put(ONE, b"11")
        await case.commit(0)
        assert await t2.get(ONE) == b"10"
        assert await t3.get(ONE) == b"11"
        await case.commit(1)
        await case.commit(2)
        assert case.refused(1, ONE)
        await case.finish()
        assert case.outcomes() == [True, False, True]


async def test_g1c_information_does_not_flow_in_a_circle(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        await t1.put(ONE, b"11")
        await t2.put(TWO, b"22")
        assert await t1.get(TWO) == b"20"
        assert await t2.get(ONE) == b"10"
        await case.commit(0)
        await case.commit(1)
        assert case.refused(1, ONE)
        assert await case.finish() == {ONE: b"11", TWO: b"20"}


# -- OTV: an observed transaction vanishes -----------------------------------------


async def test_otv_an_observed_transaction_does_not_vanish(between: str) -> None:
    async with open_case(between, 4) as case:
        t1, t2, t3, t4 = case.t
        await t1.put(ONE, b"11")
        await t1.put(TWO, b"19")
        await t2.put(ONE, b"12")
        await case.commit(0)
        assert await t3.get(ONE) == b"11"
        await t2.put(TWO, b"18")
        assert await t3.get(TWO) == b"19"
        await case.commit(1)
        assert await t3.get(TWO) == b"19"
        assert await t3.get(ONE) == b"11"
        assert await t4.scan(ONE, THREE) == {ONE: b"12", TWO: b"18"}
        await case.commit(2)
        await case.commit(3)
        assert case.refused(2)
        assert await case.finish() == {ONE: b"12", TWO: b"18"}
        assert case.outcomes() == [True, True, False, True]


# -- PMP: predicates and many preceders --------------------------------------------


async def test_pmp_a_row_that_came_to_match_is_not_seen(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        assert value_is(30)(await t1.scan(ONE, FOUR)) == {}
        await t2.do(lambda tx: tx.insert(THREE, b"30"))
        await case.commit(1)
        assert value_is(30)(await t1.scan(ONE, FOUR)) == {}
        assert await t1.get(THREE) is None
        await case.commit(0)
        assert case.refused(0, THREE)
        assert await case.finish() == {ONE: b"10", TWO: b"20", THREE: b"30"}


async def test_pmp_with_write_predicates_is_refused(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        for key, value in (await t1.scan(ONE, FOUR)).items():
            await t1.put(key, b"%d" % (int(value) + 10))
        for key in value_is(20)(await t2.scan(ONE, FOUR)):
            await t2.do(lambda tx, key=key: tx.delete(key))  # type: ignore[misc]
        await case.commit(0)
        await case.commit(1)
        assert case.refused(1)
        assert await case.finish() == {ONE: b"20", TWO: b"30"}


async def test_pmp_with_write_predicates_the_other_way_round(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        for key in value_is(20)(await t2.scan(ONE, FOUR)):
            await t2.do(lambda tx, key=key: tx.delete(key))  # type: ignore[misc]
        for key, value in (await t1.scan(ONE, FOUR)).items():
            await t1.put(key, b"%d" % (int(value) + 10))
        await case.commit(1)
        await case.commit(0)
        assert case.refused(0, TWO)
        assert await case.finish() == {ONE: b"10"}


# -- P4: lost update ---------------------------------------------------------------


async def test_p4_no_update_is_lost(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        assert await t1.get(ONE) == await t2.get(ONE) == b"10"
        await t1.put(ONE, b"11")
        await t2.put(ONE, b"11")
        await case.commit(0)
        await case.commit(1)
        assert case.refused(1, ONE)
        await case.finish()


# -- G-single: read skew -----------------------------------------------------------


async def test_g_single_reads_are_of_one_moment(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        assert await t1.get(ONE) == b"10"
        assert await t2.get(ONE) == b"10"
        assert await t2.get(TWO) == b"20"
        await t2.put(ONE, b"12")
        await t2.put(TWO, b"18")
        await case.commit(1)
        assert await t1.get(TWO) == b"20"
        await case.commit(0)
        assert case.refused(0)
        assert await case.finish() == {ONE: b"12", TWO: b"18"}


async def test_g_single_with_predicates(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        assert len([v for v in (await t1.scan(ONE, FOUR)).values() if int(v) % 5 == 0]) == 2
        (key,) = value_is(10)(await t2.scan(ONE, FOUR))
        await t2.put(key, b"12")
        await case.commit(1)
        assert [v for v in (await t1.scan(ONE, FOUR)).values() if int(v) % 3 == 0] == []
        await case.commit(0)
        assert case.refused(0, ONE)
        await case.finish()


async def test_g_single_with_dependencies_over_another_range(between: str) -> None:
    """What was read first has not changed; what is read late had, and is old all the same."""
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        assert await t1.scan(ONE, TWO) == {ONE: b"10"}
        await t2.put(TWO, b"18")
        await t2.do(lambda tx: tx.insert(THREE, b"30"))
        await case.commit(1)
        assert await t1.scan(TWO, FOUR) == {TWO: b"20"}
        await case.commit(0)
        assert case.refused(0)
        await case.finish()


async def test_g_single_with_write_predicates(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        assert await t1.get(ONE) == b"10"
        assert await t2.scan(ONE, FOUR) == {ONE: b"10", TWO: b"20"}
        await t2.put(ONE, b"12")
        await t2.put(TWO, b"18")
        await case.commit(1)
        for key in value_is(20)(await t1.scan(ONE, FOUR)):
            await t1.do(lambda tx, key=key: tx.delete(key))  # type: ignore[misc]
        await case.commit(0)
        assert case.refused(0)
        assert await case.finish() == {ONE: b"12", TWO: b"18"}


# -- G2: write skew ----------------------------------------------------------------


async def test_g2_item_write_skew_is_refused(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        for session in (t1, t2):
            assert await session.get(ONE) == b"10"
            assert await session.get(TWO) == b"20"
        await t1.put(ONE, b"11")
        await t2.put(TWO, b"21")
        await case.commit(0)
        await case.commit(1)
        assert case.refused(1, ONE)
        assert await case.finish() == {ONE: b"11", TWO: b"20"}


async def test_g2_item_on_absent_keys_is_refused(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        for session in (t1, t2):
            assert await session.do(lambda tx: THREE in tx or FOUR in tx) is False
        await t1.put(THREE, b"30")
        await t2.put(FOUR, b"40")
        await case.commit(0)
        await case.commit(1)
        assert case.refused(1, THREE)
        assert THREE in await case.finish()


async def test_g2_write_skew_by_predicate_is_refused(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        for session in (t1, t2):
            rows = await session.scan(ONE, b"5")
            assert [value for value in rows.values() if int(value) % 3 == 0] == []
        await t1.do(lambda tx: tx.insert(THREE, b"30"))
        await t2.do(lambda tx: tx.insert(FOUR, b"42"))
        await case.commit(0)
        await case.commit(1)
        assert case.refused(1, THREE)
        assert await case.finish() == {ONE: b"10", TWO: b"20", THREE: b"30"}


async def test_g2_write_skew_by_deletion_is_refused(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        for session in (t1, t2):
            assert len(await session.scan(prefix=b"")) >= 2
        await t1.do(lambda tx: tx.delete(ONE))
        await t2.do(lambda tx: tx.delete(TWO))
        await case.commit(0)
        await case.commit(1)
        assert case.refused(1)
        assert await case.finish() == {TWO: b"20"}


async def test_g2_two_edges_is_refused(between: str) -> None:
    """Fekete's: the one that only reads makes the difference."""
    async with open_case(between, 3) as case:
        t1, t2, t3 = case.t
        assert await t1.scan(ONE, FOUR) == {ONE: b"10", TWO: b"20"}
        await t2.put(TWO, b"25")
        await case.commit(1)
        assert await t3.scan(ONE, FOUR) == {ONE: b"10", TWO: b"25"}
        await case.commit(2)
        await t1.put(ONE, b"0")
        await case.commit(0)
        assert case.refused(0, TWO)
        assert await case.finish() == {ONE: b"10", TWO: b"25"}
        assert case.outcomes() == [False, True, True]


# -- beside Hermitage --------------------------------------------------------------


async def test_what_is_read_after_checkpoints_is_held_against_what_they_took_away(
    between: str,
) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        assert await t1.get(ONE) == b"10"
        await t2.put(TWO, b"21")
        await case.commit(1)
        # The version that conflicts may have gone into the store before it is read.
        assert await t1.get(TWO) == b"20"
        await t1.put(ONE, b"11")
        await case.commit(0)
        assert case.refused(0, TWO)
        assert await case.finish() == {ONE: b"10", TWO: b"21"}


async def test_disjoint_transactions_do_not_conflict(between: str) -> None:
    async with open_case(between, 2) as case:
        t1, t2 = case.t
        assert await t1.get(ONE) == b"10"
        assert await t1.scan(THREE, FOUR) == {}
        assert await t2.get(TWO) == b"20"
        await t1.put(ONE, b"11")
        await t2.put(TWO, b"21")
        await t2.put(FOUR, b"40")
        await case.commit(1)
        assert await t1.get(ONE) == b"11"
        await case.commit(0)
        assert await case.finish() == {ONE: b"11", TWO: b"21", FOUR: b"40"}
        assert case.outcomes() == [True, True]


async def test_a_reader_of_pending_commits_returns_when_they_are_durable() -> None:
    async with open_case("stalled disk", 3) as case:
        t1, t2, t3 = case.t
        await t1.put(ONE, b"11")
        assert await case.commit(0) is None
        assert await t2.get(TWO) == b"20"
        assert await t3.get(ONE) == b"11"
        # It has read nothing that is pending: it need not wait.
        assert await case.commit(1) == 1
        assert await case.commit(2) is None
        assert case.db.get(ONE) == b"10"
        await case.finish()
        assert case.t[2].outcome == 2
        assert case.db.get(ONE) == b"11"
