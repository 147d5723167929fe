"""Cancellation and Ctrl-C at every point: `Cancelled` means absent, returned means there."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import trio
from helpers import SMALL_SEGMENT, AtStep, Call, Disk, open_memory, open_tasks, read_all
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal.testing import MemoryFiles

# -- in flight --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["append", "append_many"])
async def test_a_record_in_flight_is_waited_for_and_the_next_checkpoint_raises(
    files: MemoryFiles, kind: str
) -> None:
    events: list[object] = []

    async def write() -> None:
        if kind == "append":
            events.append(await wal.append(b"flying"))
        else:
            events.append(await wal.append_many([b"flying", b"too"]))
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            events.append("cancelled")
            raise

    async with open_memory(files) as wal:
        async with open_tasks(files) as nursery:
            files.hold()
            call = Call(nursery, write)
            await wait_all_tasks_blocked()
            call.scope.cancel()
            await wait_all_tasks_blocked()
            assert events == []
            assert wal.statistics().tasks_waiting_durable == 1
            files.release()
        assert call.state == "cancelled"
        if kind == "append":
            assert events == [1, "cancelled"]
            assert await read_all(wal) == {1: b"flying"}
        else:
            assert events == [range(1, 3), "cancelled"]
            assert await read_all(wal) == {1: b"flying", 2: b"too"}


async def test_a_truncation_in_flight_is_waited_for(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        await wal.append_many([b"1", b"2", b"3"])
        async with open_tasks(files) as nursery:
            files.hold()
            queued = [Call(nursery, wal.append, b"flying")]
            await wait_all_tasks_blocked()
            queued.append(Call(nursery, wal.truncate_after, 1))
            await wait_all_tasks_blocked()
            queued[1].scope.cancel()
            await wait_all_tasks_blocked()
            files.release()
            await wait_all_tasks_blocked()
            assert queued[1].state == "cancelled"
            assert wal.last_lsn == 4

            files.hold()
            flying = Call(nursery, wal.truncate_after, 1)
            await wait_all_tasks_blocked()
            flying.scope.cancel()
            await wait_all_tasks_blocked()
            assert flying.state == "waiting"
            files.release()
        assert flying.state == "returned"
        assert await read_all(wal) == {1: b"1"}


# -- at every step ----------------------------------------------------------------


class Step:
    """One run of one operation that is cancelled at the k-th step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.record = b"step %d" % step
        self.returned: Any = None
        self.outcome = ""

    async def run(self, operation: Callable[[bytes], Awaitable[Any]]) -> bool:
        """Whether the cancellation came in time."""
        with trio.CancelScope() as scope, AtStep(self.step, scope.cancel) as at_step:
            self.returned = await operation(self.record)
            self.outcome = "returned"
        if not self.outcome:
            assert scope.cancelled_caught
            self.outcome = "cancelled"
        return at_step.done


def check_steps(steps: list[Step], found: dict[int, bytes], *, gives_lsn: bool) -> None:
    outcomes = {step.outcome for step in steps}
    assert outcomes == {"returned", "cancelled"}
    values = list(found.values())
    for step in steps:
        if step.outcome == "cancelled":
            assert step.record not in values, step.step
        else:
            assert values.count(step.record) == 1, step.step
            if gives_lsn:
                assert found[step.returned] == step.record


async def crowd(wal: trio_wal.WriteAheadLog, name: bytes) -> None:
    """Others who write all the time, and hold the queue full."""
    while True:
        await wal.append(b"crowd " + name)


@pytest.mark.parametrize("tasks", [0, 4])
@pytest.mark.parametrize("kind", ["append", "append_many", "send"])
async def test_cancelled_at_any_step_a_writer_left_nothing_or_returned(
    disk: Disk, kind: str, tasks: int
) -> None:
    async def many(record: bytes) -> int:
        lsns = await wal.append_many([record, b"of " + record, b""])
        assert len(lsns) == 3
        return lsns[0]

    steps: list[Step] = []
    async with disk.open(max_queue_size=2, flush_interval=0) as wal:
        operation = {"append": wal.append, "append_many": many, "send": wal.send}[kind]
        async with trio.open_nursery() as nursery:
            for number in range(tasks):
                nursery.start_soon(crowd, wal, b"%d" % number)
            for number in range(400 if disk.real and tasks else 2000):
                steps.append(Step(number))
                if not await steps[-1].run(operation) and number > 20:
                    break
            nursery.cancel_scope.cancel()
        await wal.flush()
        statistics = wal.statistics()
        assert statistics.records_waiting == statistics.bytes_waiting == 0
        assert statistics.tasks_waiting_send == statistics.tasks_waiting_durable == 0
        found = await read_all(wal)
        check_steps(steps, found, gives_lsn=kind != "send")
        if kind == "append_many":
            for step in steps:
                unit = [step.record, b"of " + step.record, b""]
                if step.outcome == "returned":
                    assert [found[step.returned + n] for n in range(3)] == unit
                else:
                    assert unit[1] not in found.values()
    async with disk.open() as wal:
        assert await read_all(wal) == found


@pytest.mark.parametrize("name", ["flush", "wait_durable", "truncate_before", "truncate_after"])
async def test_cancelled_at_any_step_the_others_leave_the_log_whole(disk: Disk, name: str) -> None:
    async def operation(record: bytes) -> Any:
        wal.send_nowait(record)
        if name == "flush":
            return await wal.flush()
        if name == "wait_durable":
            return await wal.wait_durable(wal.last_lsn + 1)
        if name == "truncate_before":
            return await wal.truncate_before(wal.last_lsn + 2)
        return await wal.truncate_after(wal.last_lsn)

    async with disk.open(flush_interval=0, segment_size=SMALL_SEGMENT) as wal:
        outcomes = set()
        for number in range(100):
            step = Step(number)
            before = wal.first_lsn, wal.last_lsn
            in_time = await step.run(operation)
            outcomes.add(step.outcome)
            last = await wal.flush()
            found = await read_all(wal)
            assert list(found) == list(range(wal.first_lsn, wal.last_lsn + 1))
            if name in ("flush", "wait_durable"):
                # Accepted is accepted: cancelling the wait takes nothing back.
                assert found[last] == step.record
            elif name == "truncate_before":
                assert last == before[1] + 1
                assert wal.first_lsn in (before[0], last + 1)
                if step.outcome == "returned":
                    assert wal.first_lsn == last + 1
            else:
                assert last in (before[1], before[1] + 1)
                if step.outcome == "returned":
                    assert last == before[1]
            if not in_time and number > 20:
                break
        assert outcomes == {"returned", "cancelled"}
    async with disk.open() as wal:
        assert await read_all(wal) == found


async def test_cancelled_at_any_step_of_its_life_a_log_can_be_opened_again(disk: Disk) -> None:
    """From the first step of opening to the last of closing, with work between."""
    returned: dict[int, bytes] = {}
    for number in range(1000):
        data = b"%d" % number
        with trio.CancelScope() as scope, AtStep(number, scope.cancel) as at_step:
            async with disk.open(flush_interval=0) as wal:
                returned[await wal.append(data)] = data
                wal.send_nowait(data)
                for lsn in await wal.append_many([data, data]):
                    returned[lsn] = data
                await read_all(wal, start=wal.last_lsn)
        async with disk.open() as wal:
            found = await read_all(wal)
            assert {lsn: found[lsn] for lsn in returned} == returned
            assert wal.recovery.clean_shutdown
            assert set(found.values()) <= {b"%d" % n for n in range(number + 1)}
        if not at_step.done:
            break
    assert not at_step.done
    assert len(returned) > 3


async def test_a_cancelled_body_drains_first(files: MemoryFiles) -> None:
    with trio.CancelScope() as scope:
        async with open_memory(files, flush_interval=1000) as wal:
            for number in range(100):
                wal.send_nowait(b"%d" % number)
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert wal.durable_lsn == 100
    async with open_memory(files) as wal:
        assert wal.recovery.clean_shutdown
        assert wal.last_lsn == 100


async def test_closing_is_not_cut_short_by_cancellation(files: MemoryFiles) -> None:
    async with open_memory(files) as wal, open_tasks(files) as nursery:
        files.hold()
        for _ in range(3):
            wal.send_nowait(b"record")
        closing = Call(nursery, wal.aclose)
        await wait_all_tasks_blocked()
        closing.scope.cancel()
        await wait_all_tasks_blocked()
        assert closing.state == "waiting"
        files.release()
        await wait_all_tasks_blocked()
        # Delivered afterwards, when all is done.
        assert closing.state == "cancelled"
        assert wal.statistics().state == "closed"
        assert wal.durable_lsn == 3


async def test_the_flusher_is_shielded_from_a_cancellation_around_the_log(
    files: MemoryFiles,
) -> None:
    """Writers in a shielded task go on when everything around is cancelled."""
    async with open_memory(files) as wal, trio.open_nursery() as nursery:
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            for number in range(1, 20):
                assert await wal.append(b"record") == number


# -- Ctrl-C -----------------------------------------------------------------------


def interrupt() -> None:
    """What the terminal does, while trio's own code runs."""
    signal.raise_signal(signal.SIGINT)


def run_interrupted(main: Callable[[], Awaitable[None]]) -> None:
    """Run a program that must end by the one Ctrl-C that it gets."""
    with pytest.raises(KeyboardInterrupt) as caught:
        trio.run(main)
    assert caught.type is KeyboardInterrupt, "wrapped"


def test_ctrl_c_in_the_body_drains_and_passes_unwrapped(files: MemoryFiles) -> None:
    async def main() -> None:
        async with open_memory(files, flush_interval=1000) as wal:
            for number in range(100):
                wal.send_nowait(b"%d" % number)
            with AtStep(3, interrupt):
                await trio.sleep_forever()

    async def look() -> None:
        async with open_memory(files) as wal:
            assert wal.recovery.clean_shutdown
            assert wal.last_lsn == 100

    run_interrupted(main)
    trio.run(look)


def test_ctrl_c_during_the_drain_does_not_cut_it_short(files: MemoryFiles) -> None:
    durable = []

    @trio.lowlevel.enable_ki_protection
    async def interrupt_the_drain() -> None:
        await wait_all_tasks_blocked()
        interrupt()
        await wait_all_tasks_blocked()
        durable.append(wals[0].durable_lsn)
        files.release()

    wals = []

    async def main() -> None:
        try:
            async with open_memory(files) as wal:
                wals.append(wal)
                files.hold()
                for number in range(100):
                    wal.send_nowait(b"%d" % number)
                trio.lowlevel.spawn_system_task(interrupt_the_drain)
        finally:
            durable.append(wal.durable_lsn)

    async def look() -> None:
        async with open_memory(files) as wal:
            assert wal.recovery.clean_shutdown
            assert wal.last_lsn == 100

    run_interrupted(main)
    assert durable == [0, 100]
    trio.run(look)


def test_ctrl_c_while_an_append_is_in_flight_leaves_the_record_or_not_by_its_outcome(
    files: MemoryFiles,
) -> None:
    lsns = []

    @trio.lowlevel.enable_ki_protection
    async def interrupt_the_write() -> None:
        await wait_all_tasks_blocked()
        interrupt()
        await wait_all_tasks_blocked()
        files.release()

    async def main() -> None:
        async with open_memory(files) as wal:
            files.hold()
            trio.lowlevel.spawn_system_task(interrupt_the_write)
            lsns.append(await wal.append(b"flying"))
            await trio.lowlevel.checkpoint()
            lsns.append(await wal.append(b"never"))

    async def look() -> None:
        async with open_memory(files) as wal:
            assert await read_all(wal) == {1: b"flying"}

    run_interrupted(main)
    assert lsns == [1]
    trio.run(look)


INTERRUPTED_FILES = (
    "_batch.py", "_admission.py", "_queue.py", "_watermark.py", "_flusher.py", "_local.py",
    "_log.py", "_state.py", "_wal.py", "_worker.py",
)  # fmt: skip
PACKAGE = str(Path(trio_wal.__file__).parent)


@functools.cache
def is_of_the_log(code: CodeType) -> bool:
    path = code.co_filename
    return path.startswith(PACKAGE) and path.endswith(INTERRUPTED_FILES)


class LineTracer:
    """Counts the lines that run in the tasks of the log, and interrupts at one of them: then there
    is nothing more to count, and nothing is traced any more."""

    def __init__(self, interrupt_at: int = 0) -> None:
        self.lines: list[tuple[str, int]] = []
        self._interrupt_at = interrupt_at

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if is_of_the_log(frame.f_code) else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self._interrupt_at:
                sys.settrace(None)
                interrupt()
        return self._line


def life_of_a_log(files: MemoryFiles, tracer: LineTracer, returned: dict[int, bytes]) -> None:
    """Open, write in every way, close; ``returned`` gets what returned."""

    async def others(wal: trio_wal.WriteAheadLog) -> None:
        returned[await wal.append(b"other")] = b"other"

    async def main() -> None:
        async with open_memory(
            files, max_queue_size=2, flush_interval=0, segment_size=SMALL_SEGMENT
        ) as wal:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(others, wal)
            returned[await wal.append(b"append")] = b"append"
            lsns = await wal.append_many([b"many", b"more"])
            returned.update(zip(lsns, [b"many", b"more"], strict=True))
            await wal.send(b"sent")
            await wal.flush()
            await wal.wait_durable(1)

    # The same lines in the same order each time.
    trio._core._run._r.seed(0)  # type: ignore[attr-defined]
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        trio.run(main)
    finally:
        sys.settrace(before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a call interrupted before it was awaited
def test_ctrl_c_at_every_line_of_the_log_leaves_it_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal at each line of the flusher, the queue and the rest that runs in a whole
    life of a log: what returned is there, the log is closed cleanly and can be opened."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    for _ in range(2):  # what is done once in a process is behind the second
        tracer = LineTracer()
        returned: dict[int, bytes] = {}
        life_of_a_log(MemoryFiles(), tracer, returned)
    assert len(returned) == 7
    # The first and the last time that each line ran.
    first = {line: number for number, line in reversed(list(enumerate(tracer.lines, 1)))}
    last = {line: number for number, line in enumerate(tracer.lines, 1)}
    assert len(first) > 250

    async def look() -> None:
        async with open_memory(files) as wal:
            found = await read_all(wal)
            assert {lsn: found[lsn] for lsn in returned} == returned
            assert wal.recovery.torn_bytes == 0
            assert wal.recovery.clean_shutdown or not opened

    counts = set()
    for number in sorted({*first.values(), *last.values()}):
        files = MemoryFiles()
        tracer = LineTracer(number)
        returned = {}
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            life_of_a_log(files, tracer, returned)
        error = caught.value  # alone, or in the group of the body's nursery
        while hasattr(error, "exceptions"):
            (error,) = error.exceptions
        assert type(error) is KeyboardInterrupt, tracer.lines[number - 1]
        opened = "log.meta" in files.contents("/log") if files.exists("/log") else False
        trio.run(look)
        counts.add(len(returned))
    assert counts > {0, 7}


INTERRUPTED_PROGRAM = """
import os, sys, threading
import trio, trio_wal

leave = threading.Event()

async def main():
    async with trio_wal.open_wal(sys.argv[1], flush_interval=1000) as wal:
        await wal.append(b"first")
        original = trio_wal._system.files.sync_file
        def slow(fd):
            print("syncing", flush=True)
            leave.wait()
            original(fd)
        trio_wal._system.files.sync_file = slow
        for number in range(1000):
            wal.send_nowait(b"%d" % number)
        threading.Thread(target=wait_for_parent, daemon=True).start()
    await trio.lowlevel.checkpoint()
    print("not reached: Ctrl-C comes first", flush=True)

def wait_for_parent():
    sys.stdin.readline()
    leave.set()

trio.run(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_a_real_ctrl_c_during_the_drain_of_a_real_log(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED_PROGRAM, str(tmp_path / "log")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "syncing\n"
        process.send_signal(signal.SIGINT)
        process.stdin.write("\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=240)
        assert err.rstrip().endswith("KeyboardInterrupt")
        assert "not reached" not in out

    async def look() -> None:
        async with trio_wal.open_wal(tmp_path / "log") as wal:
            assert wal.recovery.clean_shutdown
            assert wal.last_lsn == 1001

    trio.run(look)
