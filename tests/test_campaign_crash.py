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
from campaigns._oracle import Timeline, Wrong
from campaigns._simulator import Failure, Result, Simulation, replay, run_points
from campaigns._workloads import WORKLOADS

from trio_wal import _log, _mvcc, _readset
from trio_wal._disk import directory as _directory, recovery as _recovery
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
    result = Simulation(WORKLOADS["append"], 2).run()
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
    patch.setattr(MemoryFile, "sync", lambda self: None)


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
        return _directory.attrs.evolve(plan, copy_from=None)

    original = _recovery.examine
    patch.setattr(_directory, "examine", examine)


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


# -- the oracle ----------------------------------------------------------------------


def timeline_of(*tasks: tuple[int, bytes], durable: int = 0) -> Timeline:
    """A log of these records, (task, payload) each."""
    timeline = Timeline()
    submissions = [timeline.submit(task, payload)[0] for task, payload in tasks]
    pairs = [(lsn, payload) for lsn, (_, payload) in enumerate(tasks, 1)]
    timeline.check(pairs, 1, killed=True, learn=True)
    for lsn in range(1, durable + 1):
        timeline.acknowledge(submissions[lsn - 1], lsn, durable=True)
    return timeline


A, B, C, D = ((lsn, payload) for lsn, payload in enumerate((b"a", b"b", b"c", b"d"), 1))


def test_the_oracle_knows_what_is_lost_and_what_came_back() -> None:
    timeline = timeline_of((0, b"a"), (1, b"b"), (0, b"c"), durable=2)
    for pairs in ([A, B], [A, B, C]):
        timeline.check(pairs, 1, killed=False)
    timeline.begin_drop(4)
    timeline.check([B, C], 2, killed=False)
    with pytest.raises(Wrong, match=r"^lost: ends at LSN 1, LSN 2 had been acknowledged$"):
        timeline.check([A], 1, killed=False)
    timeline.settle_floor(2)
    with pytest.raises(Wrong, match=r"^starts at LSN 1, what is below 2 came back$"):
        timeline.check([A, B], 1, killed=False)
    timeline.check([], 3, killed=False)
    with pytest.raises(Wrong, match=r"^lost: an image started at LSN 3"):
        timeline.settle_floor(2)


def test_the_oracle_knows_what_was_not_written() -> None:
    timeline = timeline_of((0, b"a"), (1, b"b"))
    timeline.begin_drop(4)
    for pairs, first, reason in (
        ([A, (2, b"x")], 1, r"^LSN 2 holds b'x', which was not written there$"),
        ([A, C], 1, r"^LSNs \[1, 3\] from 1 on$"),
        ([C], 3, r"^LSN 3 holds b'c', which was not written there$"),
        ([D], 4, r"^starts at LSN 4, only 2 were written$"),
    ):
        with pytest.raises(Wrong, match=reason):
            timeline.check(pairs, first, killed=False)
    with pytest.raises(Wrong, match=r"^LSN 3 holds b'x', which nobody wrote$"):
        timeline.check([A, B, (3, b"x")], 1, killed=True, learn=True)
    with pytest.raises(Wrong, match=r"^LSN 3 holds b'a', which was lost or taken back$"):
        timeline.check([A, B, (3, b"a")], 1, killed=True, learn=True)


def test_the_oracle_knows_the_order_of_a_task_and_what_was_withdrawn() -> None:
    timeline = Timeline()
    (first,), (second,) = timeline.submit(0, b"a"), timeline.submit(0, b"b")
    with pytest.raises(Wrong, match=r"^LSN 1 came before record 0 of the same task$"):
        timeline.check([(1, b"b")], 1, killed=True, learn=True)
    timeline.withdraw([first], "append raised Cancelled")
    timeline.check([(1, b"b")], 1, killed=True, learn=True)
    with pytest.raises(Wrong, match=r"^append raised Cancelled, but LSN 1 is in the file$"):
        timeline.withdraw([second], "append raised Cancelled")
    with pytest.raises(Wrong, match=r"^LSN 2 holds b'a', which was lost or taken back$"):
        timeline.check([(1, b"b"), (2, b"a")], 1, killed=True, learn=True)


def test_the_oracle_knows_a_unit_in_part() -> None:
    timeline = Timeline()
    timeline.submit(0, b"a", b"b", b"c")
    timeline.submit(1, b"d")
    with pytest.raises(Wrong, match=r"^partial: LSN 2 stands inside of another's unit$"):
        timeline.check([A, (2, b"d")], 1, killed=True, learn=True)
    timeline = Timeline()
    timeline.submit(0, b"a", b"b", b"c")
    timeline.check([A, B, C], 1, killed=True, learn=True)
    timeline.check([], 1, killed=False)
    with pytest.raises(Wrong, match=r"^partial: ends at LSN 2, inside of a unit$"):
        timeline.check([A, B], 1, killed=False)
    timeline.begin_drop(2)
    with pytest.raises(Wrong, match=r"^partial: starts at LSN 2, inside of a unit$"):
        timeline.check([B, C], 2, killed=False)


def test_the_oracle_knows_a_cut_in_part() -> None:
    timeline = timeline_of((0, b"a"), (1, b"b"), (0, b"c"), durable=3)
    timeline.begin_cut(1)
    (late,) = timeline.submit(2, b"d")
    for pairs in ([A], [A, B, C]):
        timeline.check(pairs, 1, killed=False)
    with pytest.raises(Wrong, match=r"^partial: the cut after LSN 1 is neither not made "):
        timeline.check([A, B], 1, killed=False)
    timeline.check([A, (2, b"d")], 1, killed=True, learn=True)
    timeline.acknowledge(late, 2, durable=True)
    timeline.end_cut(done=True)
    timeline.check([A, (2, b"d")], 1, killed=False)
    with pytest.raises(Wrong, match=r"^lost: ends at LSN 1, LSN 2 had been acknowledged$"):
        timeline.check([A], 1, killed=False)
    with pytest.raises(Wrong, match=r"^LSN 2 holds b'b', which was not written there$"):
        timeline.check([A, B, C], 1, killed=False)


def test_the_oracle_knows_what_nobody_asked_to_drop() -> None:
    told = r"^lost: starts at LSN 3, only what is below 2 was to be dropped$"
    timeline = timeline_of((0, b"a"), (1, b"b"), (0, b"c"), durable=3)
    timeline.begin_drop(2)
    timeline.check([B, C], 2, killed=False)
    for killed in (False, True):
        with pytest.raises(Wrong, match=told):
            timeline.check([C], 3, killed=killed)
    with pytest.raises(Wrong, match=told):
        timeline.raise_floor(3)
    timeline.end_drop(2)
    timeline.settle_floor(2)
    with pytest.raises(Wrong, match=told):
        timeline.check([C], 3, killed=False)
    with pytest.raises(Wrong, match=r"^starts at LSN 1, what is below 2 came back$"):
        timeline.check([A, B, C], 1, killed=True)


def test_the_oracle_forgets_what_was_asked_behind_a_cut_and_before_a_crash() -> None:
    timeline = timeline_of((0, b"a"), (1, b"b"), (0, b"c"), durable=3)
    timeline.begin_drop(4)
    timeline.end_drop(4)
    timeline.begin_cut(1)
    timeline.end_cut(done=True)
    timeline.submit(2, b"d")
    timeline.check([A, (2, b"d")], 1, killed=True, learn=True)
    timeline.check([(2, b"d")], 2, killed=True)
    with pytest.raises(Wrong, match=r"^lost: starts at LSN 3, only what is below 2 was to be"):
        timeline.check([], 3, killed=True)
    timeline.begin_drop(3)
    timeline.check([], 3, killed=True)
    # The session dies in that call, and its records are there.
    timeline.crashed([A, (2, b"d")], 1)
    with pytest.raises(Wrong, match=r"^lost: starts at LSN 3, only what is below 1 was to be"):
        timeline.check([], 3, killed=True)


def test_the_oracle_asks_retention_once_the_open_log_has_dropped() -> None:
    timeline = timeline_of((0, b"a"), (1, b"b"), (0, b"c"), durable=3)
    timeline.lets_go = lambda first_lsn: first_lsn <= 2
    timeline.check([C], 3, killed=False)
    with pytest.raises(Wrong, match=r"^lost: an image started at LSN 3, the log it was taken"):
        timeline.settle_floor(2)
    timeline.raise_floor(2)
    with pytest.raises(Wrong, match=r"^lost: starts at LSN 3, only what is below 1 was to be"):
        timeline.settle_floor(3)


def test_the_oracle_does_not_believe_an_acknowledgement_that_no_image_showed() -> None:
    timeline = Timeline()
    (submission,) = timeline.submit(0, b"a")
    with pytest.raises(Wrong, match=r"^lost: LSN 1 is acknowledged, but was never seen"):
        timeline.acknowledge(submission, 1, durable=True)
    assert timeline.waiting()


def test_what_a_crash_of_a_session_took_never_comes_back() -> None:
    timeline = timeline_of((0, b"a"), (1, b"b"), durable=1)
    timeline.crashed([A], 1)
    timeline.submit(1, b"c")
    timeline.check([A, (2, b"c")], 1, killed=True, learn=True)
    with pytest.raises(Wrong, match=r"^LSN 2 holds b'b', which was not written there$"):
        timeline.check([A, B], 1, killed=False)


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
    total.add(Result("a", runs=1, points=2, nested=3, deepest=2))
    total.add(Result("b", runs=1, points=5, images=4, lost=1, first_failure=failure))
    total.add(Result("c", deepest=1, first_failure=Failure("later", "replay", 9)))
    assert total == Result("all", 2, 0, 7, 4, 3, 2, 1, 0, 0, first_failure=failure)


def test_the_seeded_scheduler_leaves_trio_as_it_was() -> None:
    run: Any = _simulator.trio._core._run
    before = run._ALLOW_DETERMINISTIC_SCHEDULING, run._r

    async def fail() -> None:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match=r"^on purpose$"):
        _simulator.seeded_run(fail, seed=1)
    with pytest.raises(ValueError, match=r"^on purpose$"):
        schedules.controlled_run(schedules.Scheduler(), fail)
    assert (run._ALLOW_DETERMINISTIC_SCHEDULING, run._r) == before
