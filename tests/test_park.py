"""Parking and waking: what trio's own pair does, with objects that are used again."""

from __future__ import annotations

import attrs
import outcome
import pytest
import trio
from helpers import Call, open_memory, open_tasks
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    Task,
    current_task,
    reschedule,
    wait_task_rescheduled,
)
from trio.testing import wait_all_tasks_blocked

from trio_wal import _park, _queue
from trio_wal._park import WOKEN, AbortFn, park, request
from trio_wal.testing import MemoryFiles


@attrs.define(eq=False)
class Parker:
    """A task's place to wait in, used over and over."""

    waiting: list[Task] = attrs.Factory(list[Task])
    aborted: int = 0
    answer: Abort = Abort.SUCCEEDED

    def abort(self, _: RaiseCancelT) -> Abort:
        self.aborted += 1
        if self.answer is Abort.SUCCEEDED:
            self.waiting.pop()
        return self.answer


async def test_one_request_parks_again_and_again() -> None:
    parker = Parker()
    mine = request(parker.abort)
    rounds = 0

    async def sleeper() -> None:
        nonlocal rounds
        for _ in range(100):
            parker.waiting.append(current_task())
            await park(mine)
            rounds += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper)
        for expected in range(100):
            await wait_all_tasks_blocked()
            assert rounds == expected
            reschedule(parker.waiting.pop(), WOKEN)
    assert rounds == 100
    assert parker.aborted == 0


async def test_a_cancelled_task_is_asked_for_and_gets_cancelled() -> None:
    parker = Parker()
    mine = request(parker.abort)
    for turn in range(1, 4):
        with trio.move_on_after(0) as scope:
            parker.waiting.append(current_task())
            await park(mine)
        assert scope.cancelled_caught
        assert parker.aborted == turn
        assert parker.waiting == []


async def test_a_task_that_cannot_leave_is_woken_normally() -> None:
    parker = Parker(answer=Abort.FAILED)
    mine = request(parker.abort)
    reached = False

    async def sleeper() -> None:
        nonlocal reached
        with trio.CancelScope() as scope:
            scope.cancel()
            parker.waiting.append(current_task())
            await park(mine)
            reached = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper)
        await wait_all_tasks_blocked()
        assert parker.aborted
        assert not reached
        reschedule(parker.waiting.pop(), WOKEN)
    assert reached


async def test_another_outcome_still_gets_through() -> None:
    parker = Parker()

    async def sleeper() -> None:
        parker.waiting.append(current_task())
        await park(request(parker.abort))

    with pytest.RaisesGroup(pytest.RaisesExc(KeyError, match=r"^'told'$")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeper)
            await wait_all_tasks_blocked()
            reschedule(parker.waiting.pop(), outcome.Error(KeyError("told")))


async def test_woken_can_be_unwrapped_again_and_sent() -> None:
    def generator() -> object:
        got = yield 1
        assert got is None
        yield 2

    async def async_generator() -> object:
        got = yield 3
        assert got is None
        yield 4

    for _ in range(3):
        assert WOKEN.unwrap() is None  # type: ignore[func-returns-value]
    started = generator()
    assert next(started) == 1  # type: ignore[call-overload]
    assert WOKEN.send(started) == 2  # type: ignore[arg-type]
    other = async_generator()
    assert await anext(other) == 3  # type: ignore[call-overload]
    assert await WOKEN.asend(other) == 4  # type: ignore[arg-type]
    await other.aclose()  # type: ignore[attr-defined]


def test_the_messages_of_this_trio_can_be_used_again() -> None:
    """Where this fails, trio has changed: the log still works, a fifth slower."""
    assert _park.REUSES


@attrs.frozen
class TwoFields:
    abort_func: object
    when: float = 0.0


@attrs.define
class Mutable:
    abort_func: object


@pytest.mark.parametrize("message", [TwoFields(None), Mutable(None), object(), None])
def test_a_message_that_says_more_or_may_change_is_not_used_again(message: object) -> None:
    assert not _park._is_reusable(message)


async def test_without_reuse_a_request_is_the_abort_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_park, "REUSES", False)
    parker = Parker()
    assert request(parker.abort) == parker.abort


async def test_with_another_trio_appends_park_as_it_documents(
    monkeypatch: pytest.MonkeyPatch, files: MemoryFiles
) -> None:
    parked = 0

    async def park(abort: AbortFn) -> None:
        nonlocal parked
        parked += 1
        await wait_task_rescheduled(abort)

    monkeypatch.setattr(_queue, "REUSES", False)
    monkeypatch.setattr(_queue, "park", park)
    monkeypatch.setattr(_queue, "request", lambda abort: abort)
    async with open_memory(files) as wal, open_tasks(files) as nursery:
        files.hold()
        first = Call(nursery, wal.append, b"first")
        await wait_all_tasks_blocked()
        with trio.move_on_after(0) as scope:
            await wal.append(b"cancelled")
        assert scope.cancelled_caught
        second = Call(nursery, wal.append, b"second")
        await wait_all_tasks_blocked()
        files.release()
        await wait_all_tasks_blocked()
        assert (first.value, second.value) == (1, 2)
    assert parked == 3
