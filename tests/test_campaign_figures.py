"""The campaign on health and metrics: a share of it, and that it is not blind."""

from __future__ import annotations

import sys

import pytest
from campaigns import figures, mutants
from campaigns.mutants import MUTANTS, Mutant, Task, judge_one

SEEDED = [one for one in MUTANTS if one.judge == mutants.FIGURES]
SHARE = sys.version_info[1] % 2
"""Each Python takes a part of the seeds; all of them have all."""


@pytest.mark.parametrize("seed", range(SHARE, 10, 2))
def test_a_case_finds_nothing(seed: int) -> None:
    figures.run_case(seed)


def test_there_are_enough_seeded_bugs() -> None:
    assert len(SEEDED) >= 8


@pytest.mark.parametrize("one", SEEDED[::6], ids=lambda one: one.name.replace(" ", "-"))
def test_a_seeded_bug_is_found(one: Mutant) -> None:
    verdict = judge_one(Task(one, (one.judge,), 1, 200.0))
    assert verdict.judge == one.judge
