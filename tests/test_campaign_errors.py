"""The error loops: a short share of them, and that their oracle is not blind."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from campaigns import __main__ as campaigns, errors
from campaigns.errors import KINDS, MODES, WORKLOADS, Case, Result, run_case

from trio_wal import LogFailedError
from trio_wal._disk.directory import LogDirectory
from trio_wal._flusher import Flusher
from trio_wal.testing import MemoryFile


def sample(workload: str, seed: int, count: int) -> list[Case]:
    rng = random.Random(seed)
    workloads = WORKLOADS[workload]
    return [
        Case(
            workload,
            rng.randrange(workloads.moments or 1),
            rng.choice(list(KINDS)),
            rng.choice(list(MODES)),
            rng.randrange(100),
        )
        for _ in range(count)
    ]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(60, "trio_wal")


@pytest.mark.parametrize("workload", WORKLOADS)
def test_no_word_is_false_whichever_call_fails(workload: str) -> None:
    results = [run_case(case) for case in sample(workload, 5, 12)]
    assert [result.error for result in results if result.error] == []
    assert sum(bool(result.operation) for result in results) > 3


def test_a_loop_ends_where_there_are_no_more_operations() -> None:
    answer = errors.run_loop(errors.Loop(Case("interval", 0, "EFBIG", "once", 0), 7))
    assert 3 < sum(row["once"] for row in answer.rows.values()) < 20
    assert run_case(Case("interval", 0, "EFBIG", "once", 9999)) == Result("", {})


# -- the oracle ---------------------------------------------------------------------


def first_error(workload: str, kind: str, mode: str) -> str:
    """What the first case of a loop that finds something finds."""
    for number in range(400):
        result = run_case(Case(workload, 0, kind, mode, number))
        if result.error or not result.operation:
            return result.error
    raise AssertionError("the loop does not end")


def test_a_sync_that_is_tried_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = MemoryFile.sync

    def sync(self: MemoryFile, *, in_place: bool = False) -> None:
        try:
            original(self, in_place=in_place)
        except OSError:
            original(self, in_place=in_place)

    monkeypatch.setattr(MemoryFile, "sync", sync)
    assert first_error("appends", "EIO", "once") != ""


def test_an_acknowledgement_before_the_sync_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def sync(self: LogDirectory) -> None:
        self.synced_lsn = self.last_lsn

    monkeypatch.setattr(LogDirectory, "sync", sync)
    assert first_error("appends", "EIO", "for ever") != ""


def test_a_wrong_outcome_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch in flight is called not written."""
    original = Flusher._fail

    def fail(self: Flusher, exc: BaseException) -> None:
        original(self, exc)
        self._queue.status.loss = "not written"

    monkeypatch.setattr(Flusher, "_fail", fail)
    assert "which must not be there" in first_error("appends", "EIO", "once")


def test_an_error_with_another_cause_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LogFailedError.__init__

    def init(self: LogFailedError, *args: Any) -> None:
        original(self, *args)
        self.__cause__ = None

    def fail(self: Flusher, exc: BaseException) -> None:
        Flusher_fail(self, OSError(errno.EPERM, "another"))

    Flusher_fail = Flusher._fail  # noqa: N806  (a function)
    monkeypatch.setattr(LogFailedError, "__init__", init)
    monkeypatch.setattr(Flusher, "_fail", fail)
    assert "is caused by" in first_error("appends", "EIO", "once")


def test_a_finding_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    assert campaigns.main(["errors", "--replay", "appends:0:EIO:once:30"]) == 0
    assert "nothing false" in capsys.readouterr().out
    assert campaigns.main(["errors", "--replay", "nothing"]) == 2
    assert campaigns.main(["errors", "no such workload"]) == 2
