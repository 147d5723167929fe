"""The interruptions: a short share of them, and that their oracle is not blind."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import trio
from campaigns import __main__ as campaigns, interrupts
from campaigns._promises import Wrong
from campaigns.hostile import limited_time
from campaigns.interrupts import PROGRAMS, run_case

from trio_wal._log import Log
from trio_wal._queue import WriteQueue
from trio_wal._worker import Blocking

# A call that was interrupted before it was awaited.
interrupted_calls = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caplog.set_level(60, "trio_wal")
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    yield
    # What was never awaited is told of here, where it is expected, and not in another test.
    gc.collect()


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_cancelled_at_a_step_the_log_is_whole(program: str, mode: str) -> None:
    for step in range(3, 100, 8):
        assert run_case("cancel", program, mode, step) == "cancelled"
    assert run_case("cancel", program, mode, 9999) == ""


@interrupted_calls
@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_at_a_line_leaves_the_log_whole(program: str) -> None:
    count = len(interrupts.lines(program))
    assert count > 3000
    for case in range(5, count, count // 30):
        assert run_case("ctrl-c", program, "", case) == "interrupted"


@interrupted_calls
def test_ctrl_c_in_a_blocking_call_does_not_hang_the_close() -> None:
    class Finder(interrupts.Tracer):
        """The moments in `_worker.Blocking.__call__`."""

        def __init__(self) -> None:
            super().__init__()
            self.found: list[int] = []

        def _line(self, frame: FrameType, event: str, arg: object) -> Any:
            if event == "line" and frame.f_code is Blocking.__call__.__code__:
                self.found.append(self.count + 1)
            return super()._line(frame, event, arg)

    finder = Finder()
    interrupts.interrupted("log", 0, finder)
    assert len(finder.found) > 40
    for number in finder.found:
        with limited_time(60):
            assert interrupts.interrupted("log", number)


@pytest.mark.skipif(bool(interrupts.memory_usable()), reason=interrupts.memory_usable() or "it can")
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="forks beside pytest's threads: warned of")
@pytest.mark.parametrize("program", PROGRAMS)
def test_where_memory_fails_nothing_acknowledged_is_lost(program: str) -> None:
    outcomes = {interrupts.starved(program, number, 1) for number in (600, 1500, 3100)}
    assert outcomes


# -- the oracle ---------------------------------------------------------------------


def lies(part: str, program: str, mode: str, cases: range) -> list[str]:
    found = []
    for case in cases:
        try:
            run_case(part, program, mode, case)
        except Wrong as exc:
            found.append(str(exc))
    return found


def test_a_record_that_is_not_withdrawn_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def withdraw(self: WriteQueue, batch: Any, task: Any, raise_cancel: Any = None) -> Any:
        if batch.taken:
            return trio.lowlevel.Abort.FAILED
        batch.entries[next(self._numbers)] = batch.entries.pop(task)
        batch.unwaited += 1
        batch.mixed = True
        return trio.lowlevel.Abort.SUCCEEDED

    monkeypatch.setattr(WriteQueue, "withdraw", withdraw)
    found = lies("cancel", "log", "one", range(5, 60))
    assert any("which must not be there" in what for what in found)


def test_a_close_that_does_not_drain_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = WriteQueue.close

    def close(self: WriteQueue) -> None:
        filling = self.backlog.filling
        if filling.unwaited == len(filling.entries):
            filling.entries.clear()
            filling.unwaited = 0
        original(self)

    monkeypatch.setattr(WriteQueue, "close", close)
    assert any("called durable" in what for what in lies("cancel", "log", "all", range(10, 100)))


@interrupted_calls
def test_a_ctrl_c_that_is_swallowed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Log.aclose

    async def close(self: Log) -> None:
        try:
            await original(self)
            await trio.lowlevel.checkpoint()
        except KeyboardInterrupt:
            pass

    monkeypatch.setattr(Log, "aclose", close)
    count = len(interrupts.lines("log"))
    found = lies("ctrl-c", "log", "", range(0, count, count // 60))
    assert "Ctrl-C was swallowed" in found


def test_a_finding_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    assert campaigns.main(["interrupts", "--replay", "cancel:log:all:20"]) == 0
    assert capsys.readouterr().out == "cancelled\n"
    assert campaigns.main(["interrupts", "--replay", "nothing"]) == 2
    assert campaigns.main(["interrupts", "no such part"]) == 2
