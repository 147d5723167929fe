"""The campaign on archives: a share of it, and that it is not blind."""

from __future__ import annotations

import os
import sys

import pytest
from campaigns import __main__ as campaigns, archive, mutants
from campaigns.mutants import MUTANTS, Mutant, Task, judge_one

SEEDED = [one for one in MUTANTS if one.judge == mutants.ARCHIVE]
SHARE = sys.version_info[1] % 3
"""Each Python takes a part of the seeds; all of them have all."""


@pytest.mark.parametrize("seed", range(SHARE, 40, 3))
def test_a_log_is_archived_and_restored(seed: int) -> None:
    archive.run_case(seed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a killed program is forked")
def test_a_killed_program_loses_nothing() -> None:
    acknowledged, restored = archive.kill_and_restore(8, seed=1)
    assert acknowledged > 8
    assert restored > 8


def test_every_commit_can_be_restored(capsys: pytest.CaptureFixture[str]) -> None:
    assert campaigns.main(["archive", "--commits", "12"]) == 0
    assert "places, each restored exactly" in capsys.readouterr().out


def test_there_are_enough_seeded_bugs() -> None:
    assert len(SEEDED) >= 8


@pytest.mark.parametrize("one", SEEDED[::6], ids=lambda one: one.name.replace(" ", "-"))
def test_a_seeded_bug_is_found(one: Mutant) -> None:
    verdict = judge_one(Task(one, (one.judge,), 1, 200.0))
    assert verdict.judge == one.judge
