"""The hostile campaign: hypothesis draws what the campaign draws from seeds, and shrinks it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from campaigns import __main__ as campaigns, _forge, hostile
from campaigns._promises import Wrong
from campaigns._report import described
from hypothesis import HealthCheck, given, settings, strategies as st

from trio_wal import _store, _store_files
from trio_wal._disk import cursor as _cursor, scan as _scan
from trio_wal._system.files import OsDirectory, OsFiles

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join((str(Path(hostile.__file__).parents[1]), *sys.path)),
}
UNHURRIED = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


@pytest.mark.parametrize("name", _forge.BASES)
def test_a_log_that_nobody_changed_comes_out_as_it_went_in(name: str) -> None:
    contents = _forge.base(name)
    assert _forge.take_apart(contents).encode() == contents


@UNHURRIED
@given(st.randoms(use_true_random=False))
def test_whatever_stands_in_the_files_an_answer_or_a_typed_error_comes_of_it(
    rng: random.Random,
) -> None:
    outcomes = hostile.run_input(rng, real=False)
    assert outcomes.counts.total() >= 4


def test_so_it_is_on_real_files_and_for_the_command_line() -> None:
    for number in range(3 * hostile.REAL_EVERY, 9 * hostile.REAL_EVERY, hostile.REAL_EVERY):
        outcomes = hostile.run_case("inputs", str(number))
        assert any(what.startswith("trio-wal verify") for what in outcomes.counts)


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs, sockets and links")
@pytest.mark.parametrize("kind", hostile.KINDS)
@pytest.mark.parametrize("target", ["log.meta", "wal-00000000000000000001.log", "spare-1.tmp"])
def test_what_is_no_regular_file_harms_nobody(target: str, kind: str, tmp_path: Path) -> None:
    outcomes = hostile.examine_name(target, kind, tmp_path)
    assert outcomes.counts.total() > 5 or outcomes.counts["not permitted here"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs, sockets and links")
@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("store", "link to a store"),
        ("store", "gone"),
        ("log", "link to a log"),
        ("store/data.mdb", "link to an empty file"),
        ("store/data.mdb", "FIFO"),
        ("store/lock.mdb", "link to a file"),
        ("store/lock.mdb", "hard link"),
        ("store/suspect", "link to nothing"),
        ("store/other", "endless device"),
    ],
)
def test_what_stands_where_a_databases_file_should_harms_nobody(
    target: str, kind: str, tmp_path: Path
) -> None:
    outcomes = hostile.examine_place(target, kind, tmp_path)
    assert outcomes.counts.total() > 4 or outcomes.counts["not permitted here"]


def test_a_link_that_is_followed_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def open_directory(path: str) -> OsDirectory:
        return OsFiles().open_directory(path)

    for module in (_store, _store_files):
        monkeypatch.setattr(module, "open_store_directory", open_directory)
    with pytest.raises(Wrong, match=r"the outside was changed|a link was followed"):
        hostile.examine_place("store", "link to a store", tmp_path)


# -- the oracle ---------------------------------------------------------------------


def findings(seeds: range) -> list[str]:
    found = []
    for seed in seeds:
        try:
            hostile.run_input(random.Random(seed), real=False)
        except Exception as exc:  # noqa: BLE001  (whatever it is, it is a finding)
            found.append(described(exc))
    return found


def test_an_error_that_is_none_of_ours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(range(60)) == []

    def check_table(body: bytes, count: int, length: int) -> tuple[int, ...]:
        raise IndexError("believed a count")

    monkeypatch.setattr(_scan, "check_table", check_table)
    assert any("IndexError: believed a count" in what for what in findings(range(60)))


def test_records_that_are_left_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _cursor.Cursor.chunk
    monkeypatch.setattr(_cursor.Cursor, "chunk", lambda self, stop: original(self, stop)[1:])
    with hostile.limited_time(20):
        assert any("records are missing" in what for what in findings(range(20)))


def test_a_case_that_takes_too_long_is_a_finding() -> None:
    if not hasattr(hostile.signal, "setitimer"):
        pytest.skip("this platform has no timer")

    def endless() -> None:
        with hostile.limited_time(0.01):
            while True:
                pass

    with pytest.raises(hostile.Slow, match=r"^more than 0\.01 seconds$"):
        endless()


def test_a_finding_ends_no_more_than_its_own_input(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [str(number) for number in range(62, 72)]

    async def examine(contents: object, database: bool, rng: random.Random) -> hostile.Outcomes:
        case = cases[len(seen)]
        seen.append(case)
        if case == "65":
            raise hostile.Slow("more than 30 seconds")
        if case == "68":
            raise Wrong("other", "not as it should be")
        return hostile.Outcomes(hostile.Counter({"looked": 1}))

    seen: list[str] = []
    monkeypatch.setattr(hostile, "examine", examine)
    monkeypatch.setattr(hostile, "examine_real", lambda *args: hostile.Outcomes())
    monkeypatch.setattr(hostile, "limit_once", lambda extra: None)
    answer = hostile.run_task(hostile.Task("inputs", tuple(cases)))
    assert seen == cases
    assert answer.rows["inputs"] == {"looked": 8}
    assert [(case, what.partition(" (")[0]) for case, what in answer.failures] == [
        ("inputs:65", "Slow: more than 30 seconds"),
        ("inputs:68", "Wrong: not as it should be"),
    ]


def test_a_finding_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    # In a process of its own: the limit of memory would stay with this one.
    command = [sys.executable, "-m", "campaigns", "hostile", "--replay", "names:log.meta|FIFO"]
    tests = Path(hostile.__file__).parents[1]
    done = subprocess.run(command, cwd=tests, capture_output=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done
    assert b"open, real files: CorruptLogError" in done.stdout
    assert campaigns.main(["hostile", "no such part"]) == 2
    assert campaigns.main(["hostile", "--replay", "no such part:1"]) == 2
    assert "no such" in capsys.readouterr().err
