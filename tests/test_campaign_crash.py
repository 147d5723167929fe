"""The crash campaign: a short share of it, and that its oracles are not blind.

A deliberate bug is put into the package for one test at a time; the campaign must find it,
and the command it prints must show it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from campaigns import (
    __main__ as campaigns,
    _remembered,
    _report,
    _simulator,
    schedules,
    whole,
)
from campaigns._images import fingerprint
from campaigns._simulator import Failure, Result, Simulation, replay, run_points
from campaigns._workloads import WORKLOADS
from msgspec.structs import replace

from trio_wal import _log, _mvcc, _readset
from trio_wal._disk import directory as _directory, opening as _opening, recovery as _recovery
from trio_wal._queue import WriteQueue
from trio_wal.testing import MemoryFile, MemoryFiles


def case_of(failure: Failure) -> str:
    """The argument of ``--replay``."""
    return failure.replay.rpartition(" ")[2]


# -- a share of the campaign ---------------------------------------------------------


@pytest.mark.parametrize("workload", WORKLOADS)
def test_no_crash_of_a_workload_loses_what_was_acknowledged(workload: str) -> None:
    result = run_points(11, points=150, workload=workload)
    assert result.first_failure is None
    assert result.points >= 150
    assert 0 < result.images <= result.points
    assert not result.lost + result.partial + result.other


def test_recoveries_are_crashed_three_deep() -> None:
    result = Simulation(WORKLOADS["append"], 7).run()
    assert result.first_failure is None
    assert result.nested > 100
    assert result.deepest == 3


def test_the_same_seed_does_the_same() -> None:
    first, second = (run_points(5, points=300, workload="everything") for _ in range(2))
    assert first == second
    assert first != run_points(6, points=300, workload="everything")


@pytest.mark.parametrize("workload", ["everything", "retention", "checkpoints"])
def test_what_is_remembered_of_images_and_files_changes_nothing(
    workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = found_in(workload, monkeypatch)
    monkeypatch.setattr(_simulator, "FORGETS_EVERY", 1)
    monkeypatch.setattr(_simulator, "RECOVERED_MAX", 0)
    assert found_in(workload, monkeypatch) == first


def found_in(workload: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Of a simulation: its sums and what each of its recoveries found."""

    def recover(simulation: Simulation, *args: Any, **kwargs: Any) -> Any:
        found = original(simulation, *args, **kwargs)
        held.append((found.first_lsn, list(found.pairs), found.store_lsn, dict(found.store_items)))
        return found

    held: list[object] = []
    original = Simulation._recover
    with monkeypatch.context() as patch:
        patch.setattr(Simulation, "_recover", recover)
        held.append(Simulation(WORKLOADS[workload], 4).run())
    assert len(held) > 100
    return held


def test_what_is_remembered_of_a_file_was_made_of_that_file_alone() -> None:
    alone = _remembered._Alone("/log", "wal-1", b"of it")
    assert alone.open("wal-1").pread(2, 3) == b"it"
    with pytest.raises(AssertionError, match=r"^'wal-2' is read to judge 'wal-1'$"):
        alone.open("wal-2")


def test_images_differ_also_in_the_pieces_of_a_checkpoint() -> None:
    files = MemoryFiles()
    store = files.open_store("/store", 0)
    prints = [fingerprint(files)]
    for value in (b"1", b"2"):
        store.apply([(b"key", value)], None)
        prints.append(fingerprint(files))
    assert len(set(prints)) == 3


@pytest.mark.parametrize("program", whole.PROGRAMS)
@pytest.mark.parametrize("mode", whole.MODES)
def test_no_program_loses_anything_where_it_is_cancelled(program: str, mode: whole.Mode) -> None:
    result = whole.run_steps(program, 3, mode, range(1, whole.STEPS_MAX, 4), set())
    assert result.first_failure is None
    # The last run was past the program's end.
    assert 10 < result.runs < whole.STEPS_MAX / 4
    assert result.points == 4 * (result.runs - 1)


def test_all_schedules_up_to_a_cost_are_run_once() -> None:
    seen: dict[str, set[bytes]] = {}
    for enumeration in schedules.enumerations(2):
        choices = seen[enumeration.program] = set()
        while (task := enumeration.next_task()) is not None:
            assert not choices & set(task[1])
            choices.update(task[1])
            enumeration.done(schedules.explore(*task))
        assert enumeration.result.first_failure is None
        assert enumeration.complete == "cost 2"
        assert enumeration.result.points == len(choices)
        assert all(sum(schedule) <= 2 for schedule in choices)
    assert all(len(choices) > 100 for choices in seen.values())


def test_schedules_follow_from_one_another() -> None:
    options = [3, 1, 2]

    def below(choices: bytes) -> list[bytes]:
        found = [choices]
        for cost, child in schedules.children(choices, options, 3):
            assert cost == sum(child)
            found += below(child)
        return found

    expected = [bytes((a, 0, b)).rstrip(b"\0") for a in range(3) for b in range(2)]
    assert sorted(below(b"")) == sorted(expected)


# -- bugs are found ------------------------------------------------------------------

Break = Callable[[pytest.MonkeyPatch], None]


def _no_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryFile, "sync", lambda self, *, in_place=False: None)


def _acknowledged_early(patch: pytest.MonkeyPatch) -> None:
    def write(self: Any, records: Any, durable_lsn: int, *, sync: bool) -> bool:
        wants_spare = original(self, records, durable_lsn, sync=False)
        self.synced_lsn = self.last_lsn
        return wants_spare

    original = _directory.LogDirectory.write
    patch.setattr(_directory.LogDirectory, "write", write)


def _tail_not_copied(patch: pytest.MonkeyPatch) -> None:
    def examine(*args: Any, **kwargs: Any) -> Any:
        plan = original(*args, **kwargs)
        return replace(plan, copy_from=None)

    original = _recovery.examine
    patch.setattr(_opening, "examine", examine)


def _withdrawn_too_late(patch: pytest.MonkeyPatch) -> None:
    def withdraw(self: WriteQueue, batch: Any, task: Any, *rest: object) -> Any:
        taken, batch.taken = batch.taken, False
        try:
            return original(self, batch, task, *rest)
        finally:
            batch.taken = taken

    original = WriteQueue.withdraw
    patch.setattr(WriteQueue, "withdraw", withdraw)


def _dropped_too_far(patch: pytest.MonkeyPatch) -> None:
    def hold(self: Any, who: str, lsn: int) -> None:
        original(self, who, lsn + 2)

    original = _log.Log.hold
    patch.setattr(_log.Log, "hold", hold)


def _never_conflicts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_readset.ReadSet, "conflict", lambda self: None)


def _checkpoint_does_not_wait(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_mvcc.Versions, "has_pending", lambda self, seq: False)


@pytest.mark.parametrize(
    ("break_it", "workload"),
    [
        (_no_sync, "append"),
        (_acknowledged_early, "append"),
        (_tail_not_copied, "units"),
        (_withdrawn_too_late, "cancel"),
        (_dropped_too_far, "checkpoints"),
        (_never_conflicts, "transactions"),
    ],
)
def test_the_simulator_finds_a_bug_and_shows_it_again(
    break_it: Break, workload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_it(patch)
        result = run_points(1, points=20_000, workload=workload)
        failure = result.first_failure
        assert failure is not None
        assert failure.points >= 1
        assert result.lost + result.partial + result.other == 1
        again = replay(case_of(failure)).first_failure
        assert again is not None
        assert again.what == failure.what
    assert replay(case_of(failure)).first_failure is None


@pytest.mark.parametrize(
    ("break_it", "program"),
    [(_acknowledged_early, "log"), (_withdrawn_too_late, "log"), (_never_conflicts, "database")],
)
def test_whole_programs_find_a_bug_and_show_it_again(
    break_it: Break, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_it(patch)
        failure = None
        for seed in range(1, 30):
            result = whole.run_steps(program, seed, "all", range(5, whole.STEPS_MAX, 9), set())
            failure = result.first_failure
            if failure is not None:
                break
        assert failure is not None
        assert campaigns.main(["whole", "--replay", case_of(failure)]) == 1
    assert campaigns.main(["whole", "--replay", case_of(failure)]) == 0


@pytest.mark.parametrize("break_it", [_never_conflicts, _checkpoint_does_not_wait])
def test_schedules_find_a_bug_and_show_it_again(
    break_it: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        break_it(patch)
        failure = schedules.run_schedules(1, points=2_000).first_failure
        assert failure is not None
        assert campaigns.main(["schedules", "--replay", case_of(failure)]) == 1
    assert campaigns.main(["schedules", "--replay", case_of(failure)]) == 0


# -- the campaign as a command -------------------------------------------------------


def test_the_campaign_prints_a_table_and_writes_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "crash.json"
    arguments = ["--count", "200", "--workers", "1", "--seed", "21", "--output", str(output)]
    assert campaigns.main(["crash", "simulator", "--workload", "cut", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "campaign crash" in printed
    assert "seed 21" in printed
    assert "nothing found" in printed
    figures = json.loads(output.read_text())
    assert figures["arguments"]["seed"] == 21
    assert figures["findings"] == []
    (cut, total) = figures["rows"]
    assert (cut["workload"], total["workload"]) == ("cut", "all")
    assert total["points"] >= 200
    assert total["bound"] == _report.bound(total["points"] + total["nested"])


def test_a_finding_is_printed_with_its_command_and_ends_in_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _no_sync(monkeypatch)
    arguments = ["--count", "1000000", "--workers", "1", "--workload", "append"]
    assert campaigns.main(["crash", "simulator", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "FOUND append, seed 1" in printed
    (case, *_) = [line.split()[-1] for line in printed.splitlines() if "replay:" in line]
    assert campaigns.main(["crash", "--replay", case]) == 1


def test_several_processes_share_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--count", "300", "--workers", "2", "--workload", "append"]
    assert campaigns.main(["crash", "simulator", *arguments]) == 0
    assert "append" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["crash", "nonsense"],
        ["crash", "--replay", "nonsense"],
        ["whole", "--replay", "log:1:some:3"],
        ["schedules", "--replay", "9:0"],
    ],
)
def test_wrong_usage_ends_in_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert campaigns.main(arguments) == 2
    assert any(capsys.readouterr())


def test_every_campaign_says_what_it_is() -> None:
    for name in campaigns.names():
        assert campaigns.summary(name), name


def test_results_add_up() -> None:
    failure = Failure("what", "replay", 3)
    total = Result("all")
    total.add(Result("a", runs=1, points=2, nested=3, deepest=2, reused=1))
    total.add(Result("b", runs=1, points=5, images=4, lost=1, first_failure=failure))
    total.add(Result("c", deepest=1, first_failure=Failure("later", "replay", 9)))
    assert total == Result("all", 2, 0, 7, 4, 3, 2, 1, 1, 0, 0, first_failure=failure)


def test_the_seeded_scheduler_leaves_trio_as_it_was() -> None:
    run: Any = _simulator.trio._core._run
    before = run._ALLOW_DETERMINISTIC_SCHEDULING, run._r

    async def fail() -> None:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match=r"^on purpose$"):
        _simulator.seeded_run(fail, seed=1)
    with pytest.raises(ValueError, match=r"^on purpose$"):
        _simulator.controlled_run(schedules.Scheduler(), fail)
    assert (run._ALLOW_DETERMINISTIC_SCHEDULING, run._r) == before
