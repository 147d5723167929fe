"""The benchmarks' own arithmetic, and that each of them can be run.

`perf/` is not part of the package: its modules are imported from where they stand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PERF = Path(__file__).resolve().parent.parent / "perf"
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

Import = Callable[[str], ModuleType]


@pytest.fixture
def perf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Import]:
    """Imports a module of `perf/`, for as long as the test lasts."""
    from importlib import import_module

    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(PERF))
    yield import_module
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and Path(file).parent == PERF:
            del sys.modules[name]


@pytest.fixture
def harness(perf: Import, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With nothing else running on the machine."""
    module: Any = perf("harness")
    monkeypatch.setattr(module.ForeignLoad, "cores", lambda self: 0.0)
    return module


@pytest.fixture
def report(perf: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With nothing stored."""
    module: Any = perf("report")
    monkeypatch.setattr(module, "RATIOS", tmp_path / "ratios.json")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def test_every_benchmark_has_a_name_and_can_be_run(perf: Import) -> None:
    files = {path.stem.removeprefix("bench_") for path in PERF.glob("bench_*.py")}
    names = perf("run").NAMES
    assert sorted(names) == sorted(files)
    for name in names:
        assert callable(perf(f"bench_{name}").run)


# -- statistics -------------------------------------------------------------------


def test_a_spread_of_few_is_the_least_and_the_greatest(harness: Any) -> None:
    assert harness.Spread.of([3.0, 1.0, 9.0]) == harness.Spread(3.0, 1.0, 9.0)


def test_one_outlier_of_many_is_not_the_spread(harness: Any) -> None:
    assert harness.Spread.of([*map(float, range(1, 9)), 1000.0]) == harness.Spread(5.0, 3.0, 7.0)


@pytest.mark.parametrize(("share", "value"), [(0.0, 0), (0.5, 50), (0.99, 99), (1.0, 99)])
def test_a_percentile_is_one_of_the_values(harness: Any, share: float, value: int) -> None:
    assert harness.percentile(range(100), share) == value


def test_a_ratio_is_taken_within_a_round(harness: Any) -> None:
    """The machine became ten times faster in between: no ratio of medians is 2."""
    trials = {
        "mine": [{"rate": 2.0, "us": 5.0}, {"rate": 20.0, "us": 1.0}, {"rate": 6.0, "us": 1.0}],
        "theirs": [{"rate": 1.0, "us": 1.0}, {"rate": 10.0, "us": 1.0}, {"rate": 3.0, "us": 1.0}],
    }
    found = harness.Comparison(3, trials)
    assert found.ratio("mine", "theirs") == harness.Spread(2.0, 2.0, 2.0)
    assert found.ratio("mine", "theirs", "us") == harness.Spread(1.0, 1.0, 5.0)
    assert found.median("theirs") == 3.0


def test_contenders_take_turns_forwards_and_backwards(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever else this machine does just now.
    monkeypatch.setattr(harness.ForeignLoad, "cores", lambda self: 0.0)
    turns: list[str] = []

    def contender(name: str) -> Any:
        def trial() -> Mapping[str, float]:
            turns.append(name)
            return {"rate": float(len(turns))}

        return harness.Contender(name, trial)

    found = harness.compare([contender("a"), contender("b"), contender("c")], 3)
    assert "".join(turns) == "abccbaabc"
    assert found.values("a") == [1.0, 6.0, 7.0]
    assert found.disturbed == 0


def test_a_disturbed_trial_is_repeated_and_the_least_disturbed_counts(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = [2.0, 0.5, 1.0, 0.1]
    rates = [900.0, 100.0, 800.0, 200.0]
    monkeypatch.setattr(harness.ForeignLoad, "cores", lambda self: foreign.pop(0))
    found = harness.compare([harness.Contender("it", lambda: {"rate": rates.pop(0)})], 2)
    assert found.values("it") == [100.0, 200.0]
    assert found.values("it", "foreign_cores") == [0.5, 0.1]
    assert found.disturbed == 1


# -- what must be reached ---------------------------------------------------------


def requirement(
    report: Any, measured: float, *, key: str = "it", limit: float = 2.0, **more: Any
) -> Any:
    spread = report.Spread(measured, measured - 1, measured + 1)
    return report.Requirement(key, f"what {key} is", "2", limit, spread, **more)


@pytest.mark.parametrize(
    ("measured", "at_most", "reached"),
    [
        (2.0, False, True),
        (2.1, False, True),
        (1.9, False, False),
        (2.0, True, True),
        (1.9, True, True),
        (2.1, True, False),
    ],
)
def test_a_limit_itself_is_reached(
    report: Any, measured: float, at_most: bool, reached: bool
) -> None:
    assert requirement(report, measured, at_most=at_most).reached is reached


FACTS = {
    "processor": "P",
    "cores": "2",
    "system": "S",
    "file system": "F",
    "python": "3",
    "load": "1",
    "mode": "brief",
}


def store(report: Any, *requirements: Any, **facts: str) -> None:
    report.store_ratios(requirements, {**FACTS, **facts})


@pytest.mark.parametrize(
    ("measured", "at_most", "told"),
    [
        (8.6, False, False),
        (8.4, False, True),
        (20.0, False, False),
        (11.4, True, False),
        (11.6, True, True),
        (5.0, True, False),
    ],
)
def test_what_is_worse_by_more_than_15_percent_is_told(
    report: Any, measured: float, at_most: bool, told: bool
) -> None:
    store(report, requirement(report, 10.0, at_most=at_most))
    lines = report.regressions([requirement(report, measured, at_most=at_most)], FACTS)
    assert len(lines) == told
    if told:
        sign = "+" if at_most else "-"
        assert lines[0].startswith("regression: what it is: ")
        assert lines[0].endswith(f"stored 10.0 ({sign}16%)")


def test_only_what_was_measured_and_stored_is_compared(report: Any) -> None:
    store(report, requirement(report, 10.0), requirement(report, 0.0, key="nothing"))
    other = [requirement(report, 1.0, key="new"), requirement(report, 0.0, key="nothing")]
    assert report.regressions(other, FACTS) == []


def test_seconds_are_not_stored_and_not_compared(report: Any) -> None:
    """They are one machine's; a ratio with the same key would be another figure."""
    store(report, requirement(report, 10.0), requirement(report, 5.0, key="t", unit="ms"))
    assert set(json.loads(report.RATIOS.read_text())["brief"]["ratios"]) == {"it"}
    assert report.regressions([requirement(report, 1.0, unit="ms")], FACTS) == []


def test_a_long_run_is_not_compared_with_a_short_one(report: Any) -> None:
    store(report, requirement(report, 10.0))
    at_length = {**FACTS, "mode": "at length"}
    lines = report.regressions([requirement(report, 1.0)], at_length)
    assert lines == ["No ratios are stored that were measured at length."]
    store(report, requirement(report, 1.0), mode="at length")
    assert report.regressions([requirement(report, 1.0)], at_length) == []
    assert len(report.regressions([requirement(report, 1.0)], FACTS)) == 1


def test_nothing_stored_at_all_is_said(report: Any) -> None:
    lines = report.regressions([requirement(report, 1.0)], FACTS)
    assert lines == ["No ratios are stored that were measured briefly."]


def test_ratios_of_another_machine_are_compared_and_named(report: Any) -> None:
    store(report, requirement(report, 10.0), processor="Q", load="7")
    lines = report.regressions([requirement(report, 1.0)], FACTS)
    assert lines[0].startswith("regression: ")
    assert lines[1:] == ["The stored ratios are another machine's: processor: Q."]


def test_storing_keeps_what_this_run_did_not_measure(report: Any) -> None:
    store(report, requirement(report, 10.0), requirement(report, 3.0, key="other"))
    store(report, requirement(report, 11.0), load="2")
    stored = json.loads(report.RATIOS.read_text())["brief"]
    assert stored["ratios"] == {"it": 11.0, "other": 3.0}
    assert stored["machine"]["load"] == "2"


def test_ratios_of_two_machines_are_not_stored_together(report: Any) -> None:
    store(report, requirement(report, 10.0), requirement(report, 3.0, key="other"))
    store(report, requirement(report, 9.0), mode="at length")
    store(report, requirement(report, 11.0), cores="64")
    stored = json.loads(report.RATIOS.read_text())
    assert stored["brief"]["ratios"] == {"it": 11.0}
    assert stored["at length"]["ratios"] == {"it": 9.0}


def test_the_stored_ratios_are_of_the_form_that_is_read(perf: Import) -> None:
    report: Any = perf("report")
    for mode, stored in json.loads(report.RATIOS.read_text()).items():
        assert mode in {"brief", "at length"}
        assert set(report.SAME) <= set(stored["machine"])
        assert all(type(ratio) is float for ratio in stored["ratios"].values())


def test_what_was_found_is_saved_as_json(report: Any, tmp_path: Path) -> None:
    made = report.Report("it", data={"spread": report.Spread(2.0, 1.0, 3.0)})
    made.requirements.append(requirement(report, 2.0))
    report.save(made, FACTS)
    saved = json.loads((tmp_path / "results" / "it.json").read_text())
    assert saved["machine"] == FACTS
    assert saved["data"]["spread"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert [(r["key"], r["reached"]) for r in saved["requirements"]] == [("it", True)]


def test_each_plot_of_the_docs_is_drawn_by_a_benchmark(perf: Import) -> None:
    plots: Any = perf("plots")
    drawn: list[str] = []
    for name, each in plots.PLOTS.items():
        assert callable(perf(f"bench_{name}").run)
        for _, file_name, draw in each:
            assert callable(draw)
            drawn.append(file_name)
    assert len(set(drawn)) == len(drawn)
    images = {path.name for path in (PERF.parent / "docs" / "images").glob("*.png")}
    assert images <= set(drawn)


# -- small trials -----------------------------------------------------------------


@linux
@pytest.mark.parametrize("kind", ["append", "put", "ceiling"])
def test_a_trial_of_few_tasks_finds_every_figure(perf: Import, tmp_path: Path, kind: str) -> None:
    found = perf("apart").apart(perf("bench_scale").commits, str(tmp_path / "it"), kind, 3, 0.0)
    figures = {"per second", "bytes a task"}
    figures |= {"CPU s a million"} if kind == "ceiling" else {"p50 ms", "p99 ms"}
    assert set(found) == figures
    assert found["per second"] > 0


@linux
@pytest.mark.parametrize("shuffled", [False, True])
def test_loaded_keys_are_found_again(perf: Import, tmp_path: Path, shuffled: bool) -> None:
    apart, scale = perf("apart").apart, perf("bench_scale")
    path = str(tmp_path / "db")
    apart(scale.load_keys, path, 300, shuffled)
    found = apart(scale.use_keys, path, 300, 0.0)
    assert len(found["open ms"]) == scale.OPENS


@linux
def test_a_small_log_is_opened_at_all_of_its_ends(
    perf: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale: Any = perf("bench_scale")
    monkeypatch.setattr(scale, "UNIT_RECORD_BYTES", 100)
    monkeypatch.setattr(scale, "LOG_OPENS", 1)
    row = scale._log_of(tmp_path / "log", 4_000_000)
    assert len(row["ends"]) == scale.ENDS
    assert row["segments dropped"] > 0


@linux
def test_a_unit_is_appended_as_a_whole(perf: Import, tmp_path: Path) -> None:
    found = perf("apart").apart(perf("bench_scale").unit, str(tmp_path / "log"), 5_000)
    assert set(found) == {"per second", "growth"}


@pytest.mark.parametrize("name", ["trio_wal.asyncio", "trio_wal, under trio"])
def test_puts_under_asyncio_are_counted(perf: Import, tmp_path: Path, name: str) -> None:
    found = perf("apart").apart(perf("bench_asyncio").trial, str(tmp_path / "db"), name, 3, 0.1)
    assert found["rate"] > 0
    assert found["cpu_us"] > 0


@linux
def test_each_row_about_readers_and_consumers_is_measured(perf: Import, tmp_path: Path) -> None:
    readers: Any = perf("bench_readers")
    trials = [trial for each in readers.CONTENDERS.values() for trial in each.values()]
    assert len(trials) == 13
    for trial in trials:
        found = perf("apart").apart(trial, str(tmp_path / trial.__name__), 0.1)
        # In so short a time perhaps none that the system counts; alone none at all.
        others = found.pop("others' cores", 0)
        assert not others or trial in (readers.beside_readers, readers.beside_others)
        assert found
        # A commit may be seen before the owner's own task has run: that is no time at all.
        assert all(figure > 0 or trial is readers.visible for figure in found.values()), trial


@linux
def test_a_small_database_is_opened_again_and_again_by_a_reader(
    perf: Import, tmp_path: Path
) -> None:
    apart, readers = perf("apart").apart, perf("bench_readers")
    apart(readers.large, str(tmp_path / "db"), 100_000)
    found = apart(readers.opening, str(tmp_path / "db"))
    assert len(found["open ms"]) == readers.OPENS
    assert len(found["again ms"]) == 3 * readers.OPENS
    assert all(figure > 0 for figure in found["open ms"])


def test_a_benchmark_that_breaks_off_is_told_and_the_others_run(
    perf: Import,
    report: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran: list[str] = []

    def fail(setting: object) -> None:
        ran.append("append")
        raise ZeroDivisionError("it broke")

    def succeed(setting: object) -> Any:
        ran.append("memory")
        return report.Report("memory")

    monkeypatch.setattr(perf("bench_append"), "run", fail)
    monkeypatch.setattr(perf("bench_memory"), "run", succeed)
    monkeypatch.setattr(perf("plots"), "draw", lambda name, directory: None)
    monkeypatch.setattr(perf("harness"), "touch_memory", lambda directory: None)
    command = ["run.py", "append", "memory", "--brief", "--dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as told:
        perf("run").main()
    assert told.value.code == "broken off: append"
    assert ran == ["append", "memory"]
    assert "it broke" in capsys.readouterr().err


def test_a_follower_is_timed_from_durable_to_given(perf: Import, tmp_path: Path) -> None:
    found = perf("apart").apart(perf("bench_follow").trial, str(tmp_path / "log"), 0.1)
    assert 0 <= found["median"] <= found["p99"] <= found["slowest"]


@linux
@pytest.mark.parametrize("stored", [False, True])
def test_the_first_key_behind_few_deleted_ones_is_timed_at_every_moment(
    perf: Import, tmp_path: Path, stored: bool
) -> None:
    queue: Any = perf("job_queue")
    found = perf("apart").apart(queue.heads, str(tmp_path / "db"), 3_000, stored, True)
    assert set(found) == {"empty", *queue.MOMENTS}
    assert all(set(times) == set(queue.READERS) for times in found.values())


@linux
@pytest.mark.parametrize("kind", ["ours", "sqlite"])
def test_a_queue_of_jobs_gives_each_of_them_once(perf: Import, tmp_path: Path, kind: str) -> None:
    queue: Any = perf("job_queue")
    assert perf("apart").apart(queue.jobs, str(tmp_path / "db"), kind, 0.2)["rates"]


# -- beside servers ---------------------------------------------------------------


def test_what_follows_each_other_is_bounded_by_both_times(perf: Import) -> None:
    bound = perf("bench_replicated").bound
    assert bound(100.0, 10.0, float("inf")) == pytest.approx(1000.0)
    assert bound(100.0, 10.0, 1000.0) == pytest.approx(500.0)
