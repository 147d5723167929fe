"""The campaign on lines: a share of it, and that it is not blind."""

from __future__ import annotations

import pytest
from campaigns import lines, mutants
from campaigns.mutants import MUTANTS, Mutant, Task, judge_one

SEEDED = [one for one in MUTANTS if one.judge == mutants.LINES]


@pytest.mark.parametrize("seed", range(12))
def test_a_storm_finds_nothing(seed: int) -> None:
    lines.run_case(seed)


def test_there_are_enough_seeded_bugs() -> None:
    assert len(SEEDED) >= 10


@pytest.mark.parametrize("one", SEEDED[::5], ids=lambda one: one.name.replace(" ", "-"))
def test_a_seeded_bug_is_found(one: Mutant) -> None:
    verdict = judge_one(Task(one, (one.judge,), 1, 30.0))
    assert verdict.judge == one.judge
