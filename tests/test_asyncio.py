"""`trio_wal.asyncio`: the promises of a log, kept to the tasks of an asyncio event loop."""

from __future__ import annotations

import asyncio
import errno
import gc
import inspect
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import trio_wal
import trio_wal.asyncio
from trio_wal.testing import MemoryFiles

Log = trio_wal.asyncio.WriteAheadLog
LOG = "/log"
DB = "/db"


def run(main: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    before = {thread for thread in threading.enumerate() if thread.name.startswith("trio_wal")}
    result = asyncio.run(main(*args))
    after = {thread for thread in threading.enumerate() if thread.name.startswith("trio_wal")}
    assert after == before
    return result


async def in_trio(log: Any, function: Callable[..., object], *args: object) -> Any:
    """Something that the tests do to the disk, in the thread where it is used."""
    return await log._portal.call_sync(function, *args)


async def until(log: Log, condition: Callable[[trio_wal.WalStatistics], bool]) -> None:
    while not condition(await log.statistics()):
        pass


def flying(statistics: trio_wal.WalStatistics) -> bool:
    """One record is being written, and no other waits for that."""
    return statistics.tasks_waiting_durable == 1 and statistics.records_waiting == 0


# -- the way out ----------------------------------------------------------------------

ENTRIES = {
    "open_wal": trio_wal.open_wal,
    "open_database": trio_wal.open_database,
    "open_reader": trio_wal.open_reader,
    "open_database_reader": trio_wal.open_database_reader,
}


@pytest.mark.parametrize("name", ENTRIES)
def test_under_asyncio_an_open_names_the_one_for_asyncio(name: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ENTRIES[name](str(tmp_path / "it")):
            pass

    with pytest.raises(
        RuntimeError,
        match=rf"^trio_wal\.{name}\(\) needs trio, and this is asyncio: use "
        rf"trio_wal\.asyncio\.{name}\(\)$",
    ):
        asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


def step(coroutine: Coroutine[Any, Any, Any]) -> None:
    """A coroutine without any event loop."""
    try:
        coroutine.send(None)
    finally:
        coroutine.close()


@pytest.mark.parametrize("name", ENTRIES)
def test_outside_of_any_event_loop_an_open_says_how_to_run_it(name: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ENTRIES[name](str(tmp_path / "it")):
            pass

    with pytest.raises(
        RuntimeError, match=rf"^trio_wal\.{name}\(\) needs trio: run it under trio\.run\(\)"
    ):
        step(main())


CALLS: dict[str, Callable[[Any, Any], Awaitable[object]]] = {
    "append": lambda db, wal: wal.append(b"a"),
    "append_many": lambda db, wal: wal.append_many([b"a"]),
    "send": lambda db, wal: wal.send(b"a"),
    "flush": lambda db, wal: wal.flush(),
    "rotate": lambda db, wal: wal.rotate(),
    "put": lambda db, wal: db.put(b"key", b"a"),
    "write": lambda db, wal: db.write({b"key": b"a"}),
    "run": lambda db, wal: db.run(lambda tx: tx.put(b"key", b"a")),
    "checkpoint": lambda db, wal: db.checkpoint(),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_from_another_thread_names_the_way_out(name: str, files: MemoryFiles) -> None:
    def elsewhere() -> None:
        async def main() -> None:
            await CALLS[name](db, wal)

        with pytest.raises(RuntimeError, match=r"trio, and this is asyncio.*wal\.asyncio"):
            asyncio.run(main())
        with pytest.raises(RuntimeError, match=r"needs trio.*trio\.from_thread\.run"):
            step(main())

    async with (
        trio_wal.open_wal(LOG, files=files) as wal,
        trio_wal.open_database(DB, files=files) as db,
    ):
        await trio.to_thread.run_sync(elsewhere)
        # Nothing has happened to them.
        assert await wal.append(b"mine") == 1
        assert await db.put(b"mine", b"") == 1


async def test_under_trio_the_one_for_asyncio_names_trios() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"^trio_wal\.asyncio\.open_wal\(\) needs asyncio: run it under asyncio\.run\(\); "
        r"under trio it is trio_wal\.open_wal\(\)$",
    ):
        await trio_wal.asyncio.open_wal(LOG, files=MemoryFiles()).__aenter__()


# -- a log ----------------------------------------------------------------------------


def test_a_log_is_written_read_and_found_again(tmp_path: Path) -> None:
    async def write() -> None:
        async with trio_wal.asyncio.open_wal(tmp_path / "log") as wal:
            assert await wal.append(b"one") == 1
            assert await wal.append_many(b"%d" % number for number in range(3)) == range(2, 5)
            await wal.send(b"five")
            await wal.send_nowait(b"six")
            assert await wal.flush() == 6
            await wal.wait_durable(6)
            async with wal.read(2, 4) as records:
                assert [record.data async for record in records] == [b"0", b"1"]
                assert records.bookmark == trio_wal.Bookmark(3, 0)
            async with wal.writer("w", priority="high") as writer:
                assert await writer.append(b"seven") == 7
                assert (await writer.statistics()).records_appended == 1
            assert wal.path == str(tmp_path / "log")
            assert await wal.rotate() == 7
            await wal.truncate_before(7)
            await wal.truncate_after(7)
            assert (await wal.first_lsn(), await wal.last_lsn()) == (1, 7)
            assert await wal.durable_lsn() == 7
            assert await wal.bookmark() == trio_wal.Bookmark(7, await wal.epoch())
            assert (await wal.health()).status == "ok"

    run(write)

    async def read() -> list[bytes]:
        async with (
            trio_wal.asyncio.open_wal(tmp_path / "log") as wal,
            trio_wal.asyncio.open_reader(tmp_path / "log") as reader,
        ):
            assert wal.recovery.clean_shutdown
            assert await reader.durable_lsn() == 7
            async with reader.read(7) as records:
                return [record.data async for record in records]

    assert run(read) == [b"seven"]


def test_appends_of_many_tasks_share_a_sync(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            lsns = await asyncio.gather(*(wal.append(b"%d" % n) for n in range(500)))
            assert sorted(lsns) == list(range(1, 501))
            assert (await wal.statistics()).batches_synced <= 3

    run(main)


def test_a_follower_gets_what_others_append(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            found: list[int] = []

            async def follow() -> None:
                async with wal.follow() as records:
                    async for batch in records.batches(3):
                        found.extend(record.lsn for record in batch)
                        assert records.bookmark.lsn == found[-1]
                        if len(found) == 20:
                            return

            follower = asyncio.create_task(follow())
            for number in range(20):
                await wal.append(b"%d" % number)
            await follower
            assert found == list(range(1, 21))

    run(main)


def test_a_consumer_gets_again_what_it_has_not_acknowledged(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            await wal.append_many([b"a", b"b", b"c"])
            async with wal.consumer("mailer") as consumer:
                assert consumer.name == "mailer"
                assert (await consumer.__anext__()).lsn == 1
                record = await consumer.__anext__()
                await consumer.acknowledge(record)
                assert (await consumer.__anext__()).lsn == 3
            async with wal.consumer("mailer") as consumer:
                assert (await consumer.__anext__()).lsn == 3
            await wal.drop_consumer("mailer")
            with pytest.raises(KeyError):
                await wal.drop_consumer("mailer")

    run(main)


def test_errors_are_those_of_trio(files: MemoryFiles) -> None:
    async def main() -> None:
        with pytest.raises(TypeError, match="max_queue_size"):
            trio_wal.asyncio.open_wal(LOG, max_queue_size="many")  # type: ignore[arg-type]
        async with trio_wal.asyncio.open_wal(LOG, files=files, max_record_size=10) as wal:
            with pytest.raises(TypeError, match=r"^data must be bytes, not str$"):
                await wal.append("text")  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="records must be an iterable of bytes"):
                await wal.append_many(b"one")  # type: ignore[arg-type]
            with pytest.raises(trio_wal.RecordTooLargeError):
                await wal.append(b"." * 11)
            with pytest.raises(trio_wal.LogDivergedError):
                await wal.read(7).__aenter__()
            with pytest.raises(trio_wal.LogLockedError):
                await trio_wal.asyncio.open_wal(LOG, files=files).__aenter__()
            # No space for a segment, then a disk that fails.
            files.free_bytes = 0
            with pytest.raises(trio_wal.LogFullError):
                await wal.append_many([b"." * 10] * 100_000)
            files.heal()
            assert await wal.append(b"after") == 1
            files.fail("pwrite", errno.EIO)
            with pytest.raises(trio_wal.LogFailedError) as caught:
                await wal.append(b"lost")
            assert isinstance(caught.value.__cause__, OSError)
        with pytest.raises(trio.ClosedResourceError):
            await wal.append(b"late")

    run(main)


def test_an_open_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            await trio_wal.asyncio.open_reader(tmp_path / "nothing").__aenter__()
        (tmp_path / "file").write_text("")
        with pytest.raises(trio_wal.WrongDirectoryError):
            await trio_wal.asyncio.open_wal(tmp_path / "file").__aenter__()

    run(main)


def test_a_context_manager_is_for_one_use(files: MemoryFiles) -> None:
    async def main() -> None:
        opening = trio_wal.asyncio.open_wal(LOG, files=files)
        async with opening as wal:
            with pytest.raises(RuntimeError, match="can be used only once"):
                await opening.__aenter__()
            stream = wal.read()
            with pytest.raises(RuntimeError, match="enter the stream first"):
                await stream.__anext__()
            async with stream:
                with pytest.raises(RuntimeError, match="can be used only once"):
                    await stream.__aenter__()

    run(main)


@pytest.mark.parametrize(
    ("block", "first"),
    [
        ("transaction", r"enter the transaction first: async with db\.transaction\(\)$"),
        ("snapshot", r"enter the snapshot first: async with db\.snapshot\(\) as snap$"),
        ("stream", r"enter the stream first: async with db\.stream\(\) as pairs$"),
        ("changes", r"enter the stream first: async with$"),
    ],
)
def test_a_block_of_a_database_is_entered_once_and_before_it_is_used(
    block: str, first: str, files: MemoryFiles
) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(LOG, files=files) as db:
            made = getattr(db, block)()
            use = made.__anext__ if hasattr(made, "__anext__") else partial(made.get, b"key")
            with pytest.raises(RuntimeError, match=first):
                await use()
            with pytest.raises(RuntimeError, match=first):
                await made.__aexit__(None, None, None)
            async with made as entered:
                assert entered is made
                with pytest.raises(RuntimeError, match=r"^a [a-z]+ can be used only once$"):
                    await made.__aenter__()
            with pytest.raises(RuntimeError, match=r"^a [a-z]+ can be used only once$"):
                await made.__aenter__()

    run(main)


@pytest.mark.parametrize("block", ["transaction", "snapshot", "stream", "changes"])
def test_a_block_that_two_tasks_enter_at_a_time_is_entered_by_one(
    block: str, files: MemoryFiles
) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(LOG, files=files) as db:
            made = getattr(db, block)()
            results = await asyncio.gather(
                made.__aenter__(), made.__aenter__(), return_exceptions=True
            )
            assert [type(result) for result in results] == [type(made), RuntimeError]
            await made.__aexit__(None, None, None)
            # Nothing is left of the second.
            assert (await db.statistics()).open_readers == 0

    run(main)


def test_the_exception_of_the_body_passes_through(files: MemoryFiles) -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
                await wal.send(b"accepted")
                raise ZeroDivisionError
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            assert await wal.last_lsn() == 1

    run(main)


# -- cancellation ---------------------------------------------------------------------


def test_a_cancelled_append_that_still_waits_is_absent(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files, max_queue_size=1) as wal:
            await in_trio(wal, files.hold)
            first = asyncio.create_task(wal.append(b"flying"))
            await until(wal, flying)
            others = [asyncio.create_task(wal.append(b"%d" % n)) for n in range(3)]
            await until(wal, lambda statistics: statistics.tasks_waiting_send >= 1)
            for other in others:
                other.cancel()
            for other in others:
                with pytest.raises(asyncio.CancelledError):
                    await other
            await in_trio(wal, files.release)
            assert await first == 1
            assert await wal.append(b"next") == 2

    run(main)


def test_an_append_that_is_being_written_is_waited_for(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            events: list[object] = []

            async def write() -> None:
                events.append(await wal.append(b"flying"))
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    events.append("cancelled")
                    raise

            await in_trio(wal, files.hold)
            task = asyncio.create_task(write())
            await until(wal, flying)
            for _ in range(3):
                task.cancel()
                await wal.statistics()
                assert events == []
            await in_trio(wal, files.release)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert events == [1, "cancelled"]

    run(main)


def test_a_task_that_was_only_an_append_returns_what_it_came_to(files: MemoryFiles) -> None:
    """And not `CancelledError`, which would say that the record is absent."""

    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            await in_trio(wal, files.hold)
            task = asyncio.create_task(wal.append(b"flying"))
            await until(wal, flying)
            task.cancel()
            await wal.statistics()
            await in_trio(wal, files.release)
            assert await task == 1
            # The same by a time-out, which is over by then.
            await in_trio(wal, files.hold)
            waiting = asyncio.create_task(asyncio.wait_for(wal.append(b"again"), 0.001))
            await asyncio.sleep(0.1)
            await until(wal, lambda statistics: statistics.tasks_waiting_durable <= 1)
            await in_trio(wal, files.release)
            try:
                assert await waiting == 2
            except asyncio.TimeoutError:
                # The machine was slow, and it still waited.
                assert await wal.last_lsn() == 1
            await asyncio.sleep(0.01)

    run(main)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout is new in Python 3.11")
def test_a_time_out_that_came_too_late_does_not_cancel_what_follows(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            await in_trio(wal, files.hold)
            written = asyncio.Event()

            async def write() -> int:
                async with asyncio.timeout(None) as limit:
                    written.limit = limit  # type: ignore[attr-defined]
                    lsn = await wal.append(b"flying")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                return lsn

            task = asyncio.create_task(write())
            await until(wal, flying)
            written.limit.reschedule(0)  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)
            await wal.statistics()
            await in_trio(wal, files.release)
            assert await task == 1

    run(main)


def test_an_open_that_is_cancelled_leaves_nothing(files: MemoryFiles) -> None:
    async def main() -> None:
        opening = trio_wal.asyncio.open_wal(LOG, files=files)

        async def enter() -> Log:
            return await opening.__aenter__()

        task = asyncio.create_task(enter())
        await asyncio.sleep(0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        else:
            await opening.__aexit__(None, None, None)
        async with trio_wal.asyncio.open_wal(LOG, files=files):
            pass

    run(main)


def test_leaving_is_not_cut_short(files: MemoryFiles) -> None:
    async def main() -> None:
        entered = asyncio.Event()

        async def use() -> None:
            async with trio_wal.asyncio.open_wal(LOG, files=files, flush_interval=3600) as wal:
                await wal.send(b"accepted")
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(use())
        await entered.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            assert await wal.last_lsn() == 1

    run(main)


def test_back_pressure_holds(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files, max_queue_size=2) as wal:
            await in_trio(wal, files.hold)
            tasks = [asyncio.create_task(wal.append(b"%d" % n)) for n in range(100)]
            await until(wal, lambda statistics: statistics.tasks_waiting_send >= 90)
            statistics = await wal.statistics()
            assert statistics.records_waiting <= 2
            with pytest.raises(trio.WouldBlock):
                await wal.send_nowait(b"one more")
            await in_trio(wal, files.release)
            assert sorted(await asyncio.gather(*tasks)) == list(range(1, 101))

    run(main)


# -- by the turn ----------------------------------------------------------------------


def test_an_answer_that_has_come_is_not_lost_to_a_cancellation(files: MemoryFiles) -> None:
    """By a task that has got its own in the same turn."""

    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            lsns: list[int] = []
            others: list[asyncio.Task[None]] = []

            async def write(number: int) -> None:
                lsns.append(await wal.append(b"%d" % number))
                while others:
                    if others[-1] is not asyncio.current_task():
                        others[-1].cancel()
                    others.pop()
                await asyncio.sleep(0)

            tasks = [asyncio.create_task(write(number)) for number in range(4)]
            others.extend(tasks)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert sorted(lsns) == [1, 2, 3, 4]
            assert [type(result) for result in results].count(asyncio.CancelledError) == 3
            assert results.count(None) == 1

    run(main)


def test_a_task_that_ends_the_run_of_the_loop_keeps_no_answers_from_others(
    files: MemoryFiles,
) -> None:
    loop = asyncio.new_event_loop()
    opening = trio_wal.asyncio.open_wal(LOG, files=files)
    wal = loop.run_until_complete(opening.__aenter__())
    lsns: list[int] = []

    async def write(number: int) -> None:
        lsns.append(await wal.append(b"%d" % number))
        if len(lsns) < 3:
            raise SystemExit

    tasks = [loop.create_task(write(number)) for number in range(4)]
    for count in (1, 2):
        with pytest.raises(SystemExit):
            loop.run_until_complete(asyncio.wait(tasks, timeout=60))
        assert len(lsns) == count
    loop.run_until_complete(asyncio.wait(tasks, timeout=60))
    assert sorted(lsns) == [1, 2, 3, 4]
    assert [type(task.exception()) for task in tasks].count(SystemExit) == 2
    loop.run_until_complete(opening.__aexit__(None, None, None))
    loop.close()


def test_a_task_that_ends_the_run_of_the_loop_as_the_block_is_left_keeps_nobody_in_it(
    files: MemoryFiles,
) -> None:
    loop = asyncio.new_event_loop()
    opening = trio_wal.asyncio.open_database(DB, files=files)
    db = loop.run_until_complete(opening.__aenter__())

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await db.wait_changed(b"key")
        # Until it is the end of trio's run that tells.
        with suppress(trio.ClosedResourceError):
            while True:
                await db.statistics()
        raise SystemExit

    tasks = [loop.create_task(wait()) for _ in range(3)]
    loop.run_until_complete(db.statistics())
    leaving = loop.create_task(opening.__aexit__(None, None, None))
    for _ in tasks:
        with pytest.raises(SystemExit):
            loop.run_until_complete(asyncio.wait([*tasks, leaving], timeout=60))
    loop.run_until_complete(asyncio.wait([*tasks, leaving], timeout=60))
    assert [type(task.exception()) for task in tasks] == [SystemExit] * 3
    assert leaving.exception() is None
    loop.close()


def test_a_call_for_which_there_was_no_memory_keeps_no_other_from_its_way(
    files: MemoryFiles,
) -> None:
    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        call_soon = loop.call_soon

        def no_memory(*_: object, **__: object) -> None:
            loop.call_soon = call_soon
            raise MemoryError

        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            loop.call_soon = no_memory
            with pytest.raises(MemoryError):
                await wal.append(b"none")
            task = asyncio.create_task(wal.append(b"one"))
            done, _ = await asyncio.wait({task}, timeout=60)
            assert done
            assert await task == 1

    run(main)


def test_what_was_called_with_is_not_kept_until_the_next_call(files: MemoryFiles) -> None:
    class Thing:
        pass

    async def main() -> None:
        async with trio_wal.asyncio.open_wal(LOG, files=files) as wal:
            thing = Thing()
            kept = weakref.ref(thing)
            assert await in_trio(wal, lambda thing: thing, thing) is thing
            await asyncio.sleep(0)
            # Whatever is called after it comes after all that is to be done for it.
            portal: Any = wal._portal
            heard = threading.Event()
            portal._token.run_sync_soon(heard.set)
            assert heard.wait(60)
            del thing
            assert kept() is None

    run(main)


FACTORIES: dict[str, Any] = {
    "written in Python": lambda loop, coro, **options: asyncio.tasks._PyTask(  # type: ignore[attr-defined]
        coro, loop=loop, **options
    ),
}
if sys.version_info >= (3, 12):
    FACTORIES["eager"] = asyncio.eager_task_factory


@pytest.mark.parametrize("factory", FACTORIES)
def test_tasks_of_other_kinds_are_served_alike(factory: str, files: MemoryFiles) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(FACTORIES[factory])
        async with trio_wal.asyncio.open_wal(LOG, files=files, max_queue_size=20) as wal:
            lsns = await asyncio.gather(*(wal.append(b"%d" % n) for n in range(20)))
            assert sorted(lsns) == list(range(1, 21))
            await in_trio(wal, files.hold)
            flight = asyncio.create_task(wal.append(b"flying"))
            await until(wal, flying)
            queued = asyncio.create_task(wal.append(b"queued"))
            await until(wal, lambda statistics: statistics.records_waiting == 1)
            for _ in range(3):
                flight.cancel()
            withdrawn = len(wal._portal._withdrawn)
            queued.cancel("why")
            await asyncio.wait({queued})
            await in_trio(wal, files.release)
            # Whoever cancels in each turn until it comes to pass, as anyio does, says it once.
            assert withdrawn == 1
            with pytest.raises(asyncio.CancelledError) as caught:
                await queued
            if sys.version_info >= (3, 11):
                assert caught.value.args == ("why",)
            assert await flight == 21
            assert await wal.append(b"next") == 22

    run(main)


# -- a database -----------------------------------------------------------------------


def test_a_database_does_what_it_does_under_trio(tmp_path: Path) -> None:
    jobs = trio_wal.Table("jobs", key=int, value=dict[str, int])

    async def main() -> None:
        async with trio_wal.asyncio.open_database(tmp_path / "db") as db:
            assert await db.put(b"a", b"1") == 1
            assert await db.write({b"b": b"2", b"c": b"3"}) == 2
            assert await db.get(b"a") == b"1"
            assert await db.get(b"none", 5) == 5
            assert await db.delete(b"c") == 3
            assert not await db.discard(b"c")
            assert await db.scan(b"a") == [(b"a", b"1"), (b"b", b"2")]
            async with db.transaction() as tx:
                assert await tx.get(b"a") == b"1"
                await tx.insert(b"d", b"4")
                await tx.update(b"d", b"5")
                assert await tx.pop(b"b") == b"2"
                assert await tx.pop(b"b", None) is None
                with pytest.raises(KeyError):
                    await tx.pop(b"b")
                assert await tx.scan() == [(b"a", b"1"), (b"d", b"5")]
                await tx.call(jobs.put, 7, {"x": 1})
                assert await tx.delete_range(prefix=b"d") == 1
                assert tx.lsn is None
            assert tx.lsn == await db.durable_lsn()
            with pytest.raises(ZeroDivisionError):  # noqa: PT012
                async with db.transaction() as tx:
                    await tx.put(b"a", b"lost")
                    raise ZeroDivisionError
            assert await db.view(lambda snap: jobs.get(snap, 7)) == {"x": 1}
            async with db.snapshot() as snap:
                await db.put(b"a", b"later")
                assert await snap.get(b"a") == b"1"
                assert await snap.call(lambda snap: snap.get(b"a")) == b"1"
                assert len(await snap.scan()) == 2
                async with snap.stream() as pairs:
                    assert len([pair async for pair in pairs]) == 2
            async with db.writer("w") as writer:
                await writer.put(b"w", b"")
                assert await writer.run(lambda tx: tx.get(b"w")) == b""
                async with writer.transaction() as tx:
                    await tx.delete(b"w")
            assert await db.checkpoint() == await db.durable_lsn()
            assert await db.backup(tmp_path / "copy") == await db.durable_lsn()
            assert (await db.health()).status == "ok"
            lsn = await db.durable_lsn()
        async with trio_wal.asyncio.open_database_reader(tmp_path / "db") as reader:
            await reader.wait_for(lsn)
            assert await reader.get(b"a") == b"later"
            assert await reader.view(lambda snap: jobs.get(snap, 7)) == {"x": 1}
        async with trio_wal.asyncio.open_database(tmp_path / "copy") as db:
            assert await db.get(b"a") == b"later"

    run(main)


def test_run_takes_sync_functions_there_and_async_ones_here(files: MemoryFiles) -> None:
    async def main() -> None:
        here = threading.get_ident()
        async with trio_wal.asyncio.open_database(DB, files=files) as db:

            def there(tx: trio_wal.Transaction, by: int) -> int:
                assert threading.get_ident() != here
                total = int(tx.get(b"n", b"0")) + by
                tx.put(b"n", b"%d" % total)
                return total

            async def slowly(tx: trio_wal.asyncio.Transaction, by: int) -> int:
                assert threading.get_ident() == here
                total = int(await tx.get(b"n", b"0")) + by
                await tx.put(b"n", b"%d" % total)
                return total

            totals = await asyncio.gather(*(db.run(there, 1) for _ in range(100)))
            assert sorted(totals) == list(range(1, 101))
            await asyncio.gather(*(db.run(slowly, 1, retries=100) for _ in range(10)))
            assert await db.get(b"n") == b"110"
            with pytest.raises(TypeError, match=r"^fn must be a sync function"):
                await db.run(lambda tx: slowly(tx, 1))  # type: ignore[arg-type]
            with pytest.raises(ZeroDivisionError):
                await db.run(lambda tx: 1 // 0)
            assert await db.get(b"n") == b"110"

    run(main)


def test_a_transaction_serves_one_call_at_a_time(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(DB, files=files) as db:
            async with db.transaction() as tx:
                results = await asyncio.gather(tx.get(b"a"), tx.get(b"b"), return_exceptions=True)
                assert results[0] is None
                assert isinstance(results[1], trio.BusyResourceError)
            with pytest.raises(trio_wal.TransactionConflict):  # noqa: PT012
                async with db.transaction() as tx:
                    await tx.get(b"a")
                    await db.put(b"a", b"changed")
                    await tx.put(b"b", b"")
            # Neither has kept a task of trio.
            assert (await db.statistics()).open_readers == 0

    run(main)


async def wrong_before(tx: trio_wal.asyncio.Transaction) -> None:
    with pytest.raises(RuntimeError, match="enter the transaction first"):
        await tx.__aexit__(None, None, None)
    await tx.__aenter__()


async def wrong_after(tx: trio_wal.asyncio.Transaction) -> None:
    async with tx:
        pass


async def wrong_twice(tx: trio_wal.asyncio.Transaction) -> None:
    await wrong_after(tx)
    await tx.__aexit__(None, None, None)


@pytest.mark.parametrize("wrong", [wrong_before, wrong_after, wrong_twice])
def test_a_transaction_used_out_of_its_block_disturbs_nobody(
    wrong: Callable[[trio_wal.asyncio.Transaction], Awaitable[None]], files: MemoryFiles
) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(DB, files=files) as db:
            tx = db.transaction()
            await wrong(tx)
            for _ in range(3):
                # More calls of a turn than there were tasks of trio's before.
                used, *others = await asyncio.gather(
                    tx.get(b"a"),
                    *(db.put(b"%d" % n, b"") for n in range(4)),
                    return_exceptions=True,
                )
                assert all(isinstance(lsn, int) for lsn in others)
                if wrong is wrong_before:
                    assert used is None
                else:
                    assert isinstance(used, trio.ClosedResourceError)
            await tx.__aexit__(None, None, None)
            assert (await db.statistics()).open_readers == 0

    run(main)


def test_a_transaction_left_while_it_is_entered_in_vain_is_left(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(DB, files=files) as db:
            await db.aclose()
            tx = db.transaction()
            entering, leaving = await asyncio.gather(
                tx.__aenter__(), tx.__aexit__(None, None, None), return_exceptions=True
            )
            assert isinstance(entering, trio.ClosedResourceError)
            assert isinstance(leaving, RuntimeError)

    run(main)


def test_leaving_behind_a_commit_and_cancelled_does_not_cancel_the_commit(
    files: MemoryFiles,
) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(DB, files=files) as db:
            await in_trio(db, files.hold)
            first = asyncio.create_task(db.put(b"first", b""))
            await until(db.wal, flying)
            tx = await db.transaction().__aenter__()
            await tx.put(b"second", b"")
            commit = asyncio.create_task(tx.commit())
            await until(db.wal, lambda statistics: statistics.records_waiting == 1)
            leaving = asyncio.create_task(tx.__aexit__(None, None, None))
            # It has come there when what was called after it has.
            await asyncio.sleep(0)
            await db.statistics()
            leaving.cancel()
            await asyncio.sleep(0)
            await db.statistics()
            await in_trio(db, files.release)
            assert [await first, await commit] == [1, 2]
            await asyncio.wait([leaving])
            assert await db.get(b"second") == b""
            assert (await db.statistics()).open_readers == 0

    run(main)


def test_an_acknowledgement_is_part_of_a_transaction(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(DB, files=files) as db:
            await db.put(b"order", b"17")
            async with db.consumer("mailer") as consumer:
                commit = await consumer.__anext__()
                async with db.transaction() as tx:
                    await tx.put(b"mailed", b"17")
                    await consumer.acknowledge_in(tx, commit)
            async with db.consumer("mailer") as consumer:
                commit = await consumer.__anext__()
                assert [operation.key for operation in commit.operations] == [b"mailed"]
                await consumer.acknowledge(commit)

    run(main)


def test_changes_and_waiting_for_them(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(DB, files=files) as db:
            changed = asyncio.create_task(db.wait_changed(b"key", since=0))
            async with db.changes() as commits:
                await db.put(b"other", b"")
                await db.put(b"key", b"")
                assert [(await commits.__anext__()).lsn for _ in range(2)] == [1, 2]
                assert commits.bookmark.lsn == 2
                waiting = asyncio.create_task(commits.__anext__())
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
                await db.put(b"third", b"")
                assert (await commits.__anext__()).lsn == 3
            assert await changed == 2

    run(main)


def test_large_ranges_are_fetched_in_pieces(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(DB, files=files) as db:
            await db.write({b"%06d" % number: b"." * 700 for number in range(5000)})
            async with db.stream() as pairs:
                assert [int(key) async for key, _ in pairs] == list(range(5000))

    run(main)


# -- the end --------------------------------------------------------------------------


def test_whoever_waits_when_the_block_is_left_is_told(files: MemoryFiles) -> None:
    async def main() -> None:
        async with trio_wal.asyncio.open_database(DB, files=files) as db:
            waiting = asyncio.create_task(db.wait_changed(b"key"))
            await db.statistics()
            stream = db.changes()
            await stream.__aenter__()
        with pytest.raises(trio.ClosedResourceError):
            await waiting
        with pytest.raises(trio.ClosedResourceError):
            await stream.__anext__()
        await stream.__aexit__(None, None, None)

    run(main)


def test_another_event_loop_is_refused(files: MemoryFiles) -> None:
    loop = asyncio.new_event_loop()
    opening = trio_wal.asyncio.open_wal(LOG, files=files)
    wal = loop.run_until_complete(opening.__aenter__())
    with pytest.raises(RuntimeError, match="opened by another event loop"):
        asyncio.run(wal.append(b"a"))
    assert loop.run_until_complete(wal.append(b"a")) == 1
    loop.run_until_complete(opening.__aexit__(None, None, None))
    loop.close()


def test_a_loop_that_is_closed_inside_the_block_closes_the_log(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    opening = trio_wal.asyncio.open_wal(tmp_path / "log", flush_interval=3600)
    wal = loop.run_until_complete(opening.__aenter__())
    loop.run_until_complete(wal.send(b"accepted"))
    task = loop.create_task(wal.follow().__aenter__())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    opening._portal._thread.join(60)  # type: ignore[attr-defined]
    assert not opening._portal._thread.is_alive()  # type: ignore[attr-defined]
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task
    gc.collect()

    async def read() -> None:
        async with trio_wal.open_wal(tmp_path / "log") as again:
            assert again.recovery.clean_shutdown
            assert again.last_lsn == 1

    trio.run(read)


PROGRAM = """
    import asyncio, sys
    import trio_wal.asyncio

    async def main():
        wal = await trio_wal.asyncio.open_wal(sys.argv[1], flush_interval=3600).__aenter__()
        print(await wal.append(b"acknowledged"), flush=True)
        await wal.send(b"accepted")
        {end}

    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("pass", 0), ("sys.exit(3)", 3), ("raise KeyboardInterrupt", -2), ("1 // 0", 1)],
)
def test_a_program_that_ends_inside_the_block_ends(tmp_path: Path, end: str, code: int) -> None:
    program = textwrap.dedent(PROGRAM).format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "log")],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == "1\n"

    async def read() -> int:
        async with trio_wal.open_wal(tmp_path / "log") as wal:
            return wal.last_lsn

    assert trio.run(read) == 2


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_child_it_is_closed(tmp_path: Path) -> None:
    import os

    async def main() -> None:
        async with trio_wal.asyncio.open_wal(tmp_path / "log") as wal:
            await wal.append(b"a")
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    step(wal.append(b"b"))
                except trio.ClosedResourceError:
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0  # noqa: ASYNC222
            assert await wal.append(b"b") == 2

    run(main)


# -- the shape ------------------------------------------------------------------------

SAME = {
    "WriteAheadLog": {"send_nowait", "first_lsn", "last_lsn", "durable_lsn", "epoch", "bookmark"},
    "Database": {"epoch", "durable_lsn"},
}


@pytest.mark.parametrize(
    "name",
    [
        "WriteAheadLog",
        "Writer",
        "LogReader",
        "RecordStream",
        "Consumer",
        "Database",
        "DatabaseWriter",
        "DatabaseReader",
        "DatabaseConsumer",
        "CommitStream",
        "Snapshot",
        "Transaction",
        "PairStream",
    ],
)
def test_every_method_of_trios_is_there_with_its_parameters(name: str) -> None:
    trios, ours = getattr(trio_wal, name), getattr(trio_wal.asyncio, name)
    assert ours.__module__ == "trio_wal.asyncio"
    for member in vars(trios):
        if member.startswith("_") or (name, member) == ("Snapshot", "close"):
            continue
        value = getattr(ours, member)
        assert (getattr(value, "__doc__", None) or "").strip(), member
        inner = value.fget if isinstance(value, property) else value
        assert inner.__module__ == "trio_wal.asyncio", member
        if inspect.isfunction(vars(trios)[member]) and member != "run":
            given = list(inspect.signature(value).parameters.values())
            wanted = list(inspect.signature(vars(trios)[member]).parameters.values())
            assert [(p.name, p.kind) for p in given] == [(p.name, p.kind) for p in wanted], member


@pytest.mark.parametrize("name", ENTRIES)
def test_the_opening_calls_have_trios_signatures(name: str) -> None:
    ours, trios = getattr(trio_wal.asyncio, name), getattr(trio_wal, name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(trios).parameters)
    assert ours.__module__ == "trio_wal.asyncio"


def test_without_it_asyncio_is_not_loaded() -> None:
    code = "import sys, trio_wal; print('asyncio' in sys.modules); trio_wal.asyncio.open_wal"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
