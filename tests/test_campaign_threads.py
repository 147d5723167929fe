"""The campaign on threads: a share of it, and that it is not blind."""

from __future__ import annotations

import sys

import pytest
from campaigns import mutants, threads
from campaigns.mutants import MUTANTS, Mutant, Task, judge_one

SEEDED = [one for one in MUTANTS if one.judge == mutants.THREADS]
SHARE = sys.version_info[1] % 2
"""Each Python takes a part of the seeds; all of them have all."""


@pytest.mark.parametrize("seed", range(SHARE, 6, 2))
def test_a_case_finds_nothing(seed: int) -> None:
    threads.run_case(seed)


@pytest.mark.parametrize("one", SEEDED[::4], ids=lambda one: one.name.replace(" ", "-"))
def test_a_seeded_bug_is_found(one: Mutant) -> None:
    verdict = judge_one(Task(one, (one.judge,), 1, 200.0))
    assert verdict.judge == one.judge
