"""The seeded bugs: each still applies, some are found, and the package as it is passes."""

from __future__ import annotations

import ast
from pathlib import Path

import attrs
import pytest
from campaigns import __main__ as campaigns, _judges, mutants
from campaigns.mutants import MUTANTS, PACKAGE, Mutant, NotThere, Task, judge_one, mutated

NAMED_FIRST = (
    "acknowledged before the sync",
    "no directory sync",
    "no salt",
    "the checksum of a frame's header leaves its lengths out",
    "a torn tail is not cut",
    "watermark too early",
    "a failed sync is tried again",
    "a bad segment is skipped",
)


def find(name: str) -> Mutant:
    (found,) = [one for one in MUTANTS if one.name.startswith(name)]
    return found


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTANTS) >= 30
    assert len({one.name for one in MUTANTS}) == len(MUTANTS)
    for name in NAMED_FIRST:
        assert find(name)


@pytest.mark.parametrize("one", MUTANTS, ids=lambda one: one.name.replace(" ", "-"))
def test_a_mutant_applies_and_is_another_program(one: Mutant) -> None:
    source = (PACKAGE / one.file).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(mutated(one, source))) != ast.dump(ast.parse(source))
    assert one.judge.partition(":")[0] in _judges.JUDGES


def test_a_mutant_that_no_longer_applies_is_an_error() -> None:
    one = find("no salt")
    with pytest.raises(
        NotThere, match=r"^mutant no longer applies: .no salt: .*: 0 times in _disk/frame"
    ):
        mutated(one, "")
    twice = "return crc32c(_SEED.pack(self.salt, self.number))\n" * 2
    with pytest.raises(NotThere, match=r"2 times in _disk/frame"):
        mutated(one, twice)


@pytest.mark.parametrize("name", ["log.meta is not synced", "what is only in the page cache"])
def test_a_seeded_bug_is_found(name: str) -> None:
    one = find(name)
    verdict = judge_one(Task(one, (one.judge,), 1, 200.0))
    assert verdict.judge == one.judge
    assert 0 < verdict.cases < 500


def test_the_package_as_it_is_passes() -> None:
    verdict = judge_one(Task(None, ("simulator",), 1, 0.5))
    assert (verdict.judge, verdict.what, verdict.passed) == ("", "", ("simulator",))
    assert verdict.cases > 20


def test_a_mutant_that_nobody_finds_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    harmless = attrs.evolve(find("no salt"), name="harmless", judge="store")
    harmless = attrs.evolve(harmless, changes=(("MiB", "MiB"),), file="_util.py")
    monkeypatch.setattr(mutants, "MUTANTS", (harmless,))
    monkeypatch.setattr(mutants, "mutated", lambda one, source: source + "\n\n# harmless\n")
    monkeypatch.setattr(_judges, "JUDGES", {"store": _judges.store})
    output = tmp_path / "figures.json"
    arguments = ["--seconds", "0.1", "--workers", "1", "--output", str(output)]
    assert campaigns.main(["mutants", *arguments]) == 1
    out = capsys.readouterr().out
    assert "not found: harmless" in out
    assert "0 of 1 mutants found" in out
    assert output.exists()
    assert campaigns.main(["mutants", "no such text"]) == 2
