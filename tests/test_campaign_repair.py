"""The campaign on repair: a share of it, and that it is not blind."""

from __future__ import annotations

import sys

import pytest
from campaigns import mutants, repair
from campaigns.mutants import MUTANTS, Mutant, Task, judge_one

SEEDED = [one for one in MUTANTS if one.judge == mutants.REPAIR]
SHARE = sys.version_info[1] % 3
"""Each Python takes a part of the seeds; all of them have all."""


@pytest.mark.parametrize("seed", range(5000 + SHARE, 5060, 3))
def test_a_case_finds_nothing(seed: int) -> None:
    repair.run_case(seed)


# Each once showed a bug: files that swapped their names took each other's place; records whose
# loss only the owner's word told went without an epoch; a torn write took a frame along with its
# padding; a footer was written before a CLOSE frame to which the next segment is chained; nothing
# of a log said that it was its store's; without log.meta another log's segment was taken for its
# own; the last segment but one, which may lack its footer, was that no more after the repair.
@pytest.mark.parametrize(
    "seed",
    [
        *(40, 49, 50, 80, 85, 1742, 1985, 1_048_793),
        *(32_506_035, 80_740_487, 80_744_567, 80_746_354),
    ],
)
def test_what_was_found_before(seed: int) -> None:
    repair.run_case(seed)


def test_there_are_enough_seeded_bugs() -> None:
    assert len(SEEDED) >= 8


@pytest.mark.parametrize("one", SEEDED[::6], ids=lambda one: one.name.replace(" ", "-"))
def test_a_seeded_bug_is_found(one: Mutant) -> None:
    verdict = judge_one(Task(one, (one.judge,), 1, 200.0))
    assert verdict.judge == one.judge
