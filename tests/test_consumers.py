"""Consumers: what they are given, what they hold, and what survives."""

from __future__ import annotations

import errno
import math
import signal
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
from engines import MemoryServer, open_database_on, open_wal_on
from helpers import AtStep, Call, until
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

import trio_wal
from trio_wal import (
    Bookmark,
    CorruptLogError,
    LogDivergedError,
    LogFailedError,
    LogFullError,
    LsnTruncatedError,
    UnsupportedFormatError,
    _consumers,
    _stream,
)
from trio_wal._disk import cursor, frame
from trio_wal._disk.frame import META_SIZE_MAX, decode_meta
from trio_wal._disk.metafile import MetaFile
from trio_wal._disk.opening import open_log_directory
from trio_wal._disk.placesfile import PLACES_VERSION
from trio_wal._disk.verify import verify
from trio_wal._local import FileCursor
from trio_wal._log import Log
from trio_wal.testing import MemoryFiles

TINY = 1
PATH = "/data"


class Kit:
    """A log or a database, as far as consumers of both are the same."""

    def __init__(self, kind: str, path: Path | None = None) -> None:
        self.kind = kind
        self.files = MemoryFiles() if path is None else None
        self.path = PATH if path is None else str(path / "data")

    @property
    def log_path(self) -> str:
        return self.path if self.kind == "log" else f"{self.path}/log"

    def open(self, **options: Any) -> AbstractAsyncContextManager[Any]:
        options.setdefault("segment_size", TINY)
        if self.kind == "log":
            return trio_wal.open_wal(self.path, files=self.files, **options)
        return trio_wal.open_database(self.path, files=self.files, **options)

    async def add(self, opened: Any, count: int, size: int = 0) -> list[int]:
        """So many records or commits; their LSNs."""
        if self.kind == "log":
            return [await opened.append(b"r" + bytes(size)) for _ in range(count)]
        return [await opened.put(b"k%d" % n, bytes(size)) for n in range(count)]

    def wal(self, opened: Any) -> Any:
        return opened if self.kind == "log" else opened.wal

    async def drop_all(self, opened: Any) -> None:
        """Have everything dropped from the log that nobody holds."""
        wal = self.wal(opened)
        if self.kind == "log":
            await wal.truncate_before(wal.durable_lsn + 1)
        else:
            await opened.checkpoint()
            await until(lambda: wal.statistics().segments <= 1 or not wal._log.engine._due.is_set())
            for _ in range(20):
                await trio.lowlevel.checkpoint()


@pytest.fixture(params=["log", "database"])
def kit(request: pytest.FixtureRequest) -> Kit:
    return Kit(request.param)


@pytest.fixture(params=["log", "database"])
def disk_kit(request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
    return Kit(request.param, tmp_path)


async def take(consumer: Any, count: int) -> list[Any]:
    return [await consumer.__anext__() for _ in range(count)]


async def waiting(consumer: Any) -> list[Any]:
    """All that it gives before it waits."""
    found: list[Any] = []
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await wait_all_tasks_blocked()
                scope.cancel()

            nursery.start_soon(give_up)
            async for item in consumer:
                found.append(item)  # noqa: PERF401  (kept when it is cancelled)
    return found


async def acknowledge(opened: Any, name: str, lsn: int, **options: Any) -> None:
    """Take up to an LSN, and say that it is done with."""
    async with opened.consumer(name, **options) as consumer:
        async for item in consumer:
            if item.lsn >= lsn:
                await consumer.acknowledge(item)
                return


async def given(opened: Any, name: str, **options: Any) -> list[int]:
    async with opened.consumer(name, **options) as consumer:
        return [item.lsn for item in await waiting(consumer)]


def place(opened: Any, name: str = "a") -> int:
    lsn: int = opened.statistics().consumers[name].acknowledged_lsn
    return lsn


# -- what is given ------------------------------------------------------------------------------


async def test_what_is_acknowledged_is_not_given_again(disk_kit: Kit) -> None:
    kit = disk_kit
    async with kit.open() as opened:
        lsns = await kit.add(opened, 5)
        async with opened.consumer("a") as consumer:
            items = await take(consumer, 3)
            assert [item.lsn for item in items] == lsns[:3]
            assert consumer.name == "a"
            assert consumer.bookmark == Bookmark(lsns[2], opened.epoch)
            await consumer.acknowledge(items[1])
        async with opened.consumer("a") as consumer:
            items = await take(consumer, 3)
            assert [item.lsn for item in items] == lsns[2:]
            await consumer.acknowledge(items[0])
        assert place(opened) == lsns[2]
    async with kit.open() as opened:
        assert place(opened) == lsns[2]
        more = await kit.add(opened, 2)
        async with opened.consumer("a") as consumer:
            items = await take(consumer, 4)
            assert [item.lsn for item in items] == lsns[3:] + more
            await consumer.acknowledge(items[-1])
    async with kit.open() as opened:
        more = await kit.add(opened, 1)
        async with opened.consumer("a") as consumer:
            assert [item.lsn for item in await take(consumer, 1)] == more


async def test_a_consumer_waits_for_what_comes(kit: Kit) -> None:
    async with (
        kit.open() as opened,
        opened.consumer("a") as consumer,
        trio.open_nursery() as nursery,
    ):
        call = Call(nursery, take, consumer, 2)
        await wait_all_tasks_blocked()
        lsns = await kit.add(opened, 2)
        await wait_all_tasks_blocked()
        assert [item.lsn for item in call.value] == lsns


async def test_several_consumers_each_have_their_place(kit: Kit) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 4)
        await acknowledge(opened, "a", lsns[0])
        await acknowledge(opened, "b", lsns[2])
        assert await given(opened, "a") == lsns[1:]
        assert await given(opened, "b") == lsns[3:]
        assert await given(opened, "c") == lsns
        found = opened.statistics().consumers
        assert [(name, one.acknowledged_lsn, one.lag_records) for name, one in found.items()] == [
            ("a", lsns[0], 3),
            ("b", lsns[2], 1),
            ("c", 0, 4),
        ]


@pytest.mark.parametrize("as_bookmark", [False, True])
async def test_the_first_use_begins_at_start_and_the_next_ones_do_not(
    kit: Kit, as_bookmark: bool
) -> None:
    async with kit.open() as opened:
        await kit.add(opened, 4)
        start = Bookmark(2, opened.epoch) if as_bookmark else 3
        assert await given(opened, "a", start=start) == [3, 4]
        assert await given(opened, "a", start=1) == [3, 4]
        assert place(opened) == 2


async def test_lists_of_items(kit: Kit) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 5)
        async with opened.consumer("a") as consumer:
            async for items in consumer.batches(2):
                assert [item.lsn for item in items] == lsns[:2]
                await consumer.acknowledge(items[-1])
                break
            assert [item.lsn for item in await take(consumer, 1)] == [lsns[2]]
        assert await given(opened, "a") == lsns[2:]


async def test_acknowledging_what_is_acknowledged_changes_nothing(kit: Kit) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 3)
        async with opened.consumer("a") as consumer:
            items = await take(consumer, 3)
            await consumer.acknowledge(items[1])
            before = opened.wal.last_lsn if kit.kind == "database" else 0
            for item in items[:2]:
                with assert_checkpoints():
                    await consumer.acknowledge(item)
            assert before == (opened.wal.last_lsn if kit.kind == "database" else 0)
            assert place(opened) == lsns[1]


async def test_acknowledgements_of_several_tasks_share_a_write() -> None:
    kit = Kit("log")
    assert kit.files is not None
    async with kit.open() as wal:
        await kit.add(wal, 50)
        async with wal.consumer("a") as consumer, wal.consumer("b") as other:
            items, others = await take(consumer, 50), await take(other, 50)
            writes: list[str] = []
            kit.files.after_operation = lambda operation, path: writes.append(operation)
            async with trio.open_nursery() as nursery:
                for item in items:
                    nursery.start_soon(consumer.acknowledge, item)
                for item in reversed(others):
                    nursery.start_soon(other.acknowledge, item)
            assert writes.count("rename") <= 3
        assert place(wal) == place(wal, "b") == 50
    async with kit.open() as wal:
        assert place(wal) == place(wal, "b") == 50


# -- one user -----------------------------------------------------------------------------------


async def test_one_user_at_a_time(kit: Kit) -> None:
    async with kit.open() as opened:
        await kit.add(opened, 1)
        async with opened.consumer("a"):
            with pytest.raises(trio.BusyResourceError, match=r"^consumer 'a' is in use$"):
                async with opened.consumer("a"):
                    raise AssertionError
            with pytest.raises(trio.BusyResourceError, match=r"^consumer 'a' is in use$"):
                await opened.drop_consumer("a")
            assert await given(opened, "b") == [1]
        assert await given(opened, "a") == [1]
        with trio.CancelScope() as scope:
            async with opened.consumer("a"):
                scope.cancel()
                await trio.sleep_forever()
        assert await given(opened, "a") == [1]


async def test_a_block_is_for_one_use(kit: Kit) -> None:
    async with kit.open() as opened:
        (lsn,) = await kit.add(opened, 1)
        consumer = opened.consumer("a")
        for call in (consumer.__anext__, consumer.batches):
            with pytest.raises(RuntimeError, match="enter the consumer first"):
                call()
        async with consumer:
            (item,) = await take(consumer, 1)
        assert item.lsn == lsn
        with pytest.raises(RuntimeError, match="can be used only once"):
            await consumer.__aenter__()
        for call in (partial_of(consumer.acknowledge, item), consumer.__anext__):
            with pytest.raises(trio.ClosedResourceError):
                await call()
        assert await given(opened, "a") == [lsn]


def partial_of(call: Callable[[Any], Awaitable[Any]], item: Any) -> Callable[[], Awaitable[Any]]:
    return lambda: call(item)


async def test_a_closed_log_has_no_consumers(kit: Kit) -> None:
    async with kit.open() as opened:
        await kit.add(opened, 1)
        consumer = opened.consumer("a")
        async with consumer:
            (item,) = await take(consumer, 1)
            await opened.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await consumer.acknowledge(item)
        with pytest.raises(trio.ClosedResourceError):
            async with opened.consumer("a"):
                raise AssertionError
        with pytest.raises(trio.ClosedResourceError):
            await opened.drop_consumer("a")


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("", ValueError, r"^name must have 1 to 255 characters, not 0$"),
        ("x" * 256, ValueError, r"^name must have 1 to 255 characters, not 256$"),
        (b"a", TypeError, r"^name must be a str, not bytes$"),
        (None, TypeError, r"^name must be a str, not NoneType$"),
        ("\ud800", ValueError, r"^name must be text that UTF-8 can encode"),
    ],
)
async def test_bad_names_are_refused_and_nothing_is_made(
    kit: Kit, name: Any, error: type[Exception], reason: str
) -> None:
    async with kit.open() as opened:
        await kit.add(opened, 1)
        with pytest.raises(error, match=reason):
            opened.consumer(name)
        with pytest.raises(error, match=reason):
            await opened.drop_consumer(name)
        check_none(kit, opened)
        assert kit.wal(opened).last_lsn == 1
        longest = "\U0001f600" * 255
        assert await given(opened, longest) == [1]
    async with kit.open() as opened:
        assert list(opened.statistics().consumers) == [longest]


def check_none(kit: Kit, opened: Any) -> None:
    """That there is no trace of a consumer."""
    assert kit.files is not None
    assert opened.statistics().consumers == {}
    assert not [name for name in kit.files.names(kit.log_path) if "consumer" in name]
    meta = decode_meta(kit.files.read_file(kit.log_path, "log.meta")[:META_SIZE_MAX])
    assert not meta.consumers


async def test_a_bad_start_is_refused_and_nothing_is_made(kit: Kit) -> None:
    async with kit.open() as opened:
        await kit.add(opened, 30, 200)
        await kit.drop_all(opened)
        assert kit.wal(opened).first_lsn > 1
        for bad, wrong in (("1", TypeError), (True, TypeError), (-1, ValueError)):
            with pytest.raises(wrong, match=r"^start must be"):
                opened.consumer("a", start=bad)
        errors: list[tuple[object, type[Exception]]] = [
            (1, LsnTruncatedError),
            (32, LogDivergedError),
            (Bookmark(31, 0), LogDivergedError),
            (Bookmark(1, 17), LogDivergedError),
        ]
        for start, error in errors:
            with pytest.raises(error):
                async with opened.consumer("a", start=start):
                    raise AssertionError
            check_none(kit, opened)
        (lsn,) = await kit.add(opened, 1)
        assert await given(opened, "a", start=lsn) == [lsn]


async def test_only_what_was_given_can_be_acknowledged(kit: Kit) -> None:
    async with kit.open() as opened:
        await kit.add(opened, 3)
        async with opened.consumer("a") as consumer, opened.consumer("b") as other:
            items = await take(other, 3)
            await take(consumer, 1)
            with pytest.raises(ValueError, match=r"^item must be one that this consumer gave"):
                await consumer.acknowledge(items[1])
            for bad in (3, None, Bookmark(1, 0)):
                with pytest.raises(TypeError, match=r"^item must be a (Record|Commit), not "):
                    await consumer.acknowledge(bad)
            assert place(opened) == 0


async def test_there_are_not_too_many(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_consumers, "CONSUMERS_MAX", 2)
    async with kit.open() as opened:
        await kit.add(opened, 1)
        await given(opened, "a")
        started: list[str] = []

        async def use(name: str) -> None:
            try:
                async with opened.consumer(name):
                    started.append(name)
            except ValueError as exc:
                assert "there are already 2; drop one first" in str(exc)  # noqa: PT017

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, "b")
            nursery.start_soon(use, "c")
        assert len(started) == 1
        assert len(opened.statistics().consumers) == 2
        await opened.drop_consumer("a")
        assert await given(opened, "d") == [1]


async def test_dropping_one_that_there_is_not(kit: Kit) -> None:
    async with kit.open() as opened:
        with pytest.raises(KeyError, match="nobody"):
            await opened.drop_consumer("nobody")
        check_none(kit, opened)


async def test_a_databases_log_is_consumed_through_the_database() -> None:
    async with Kit("database").open() as db:
        with pytest.raises(TypeError, match="this log belongs to a database"):
            db.wal.consumer("a")
        with pytest.raises(TypeError, match="this log belongs to a database"):
            await db.wal.drop_consumer("a")


# -- what is held -------------------------------------------------------------------------------


async def test_nothing_is_dropped_above_the_slowest_place(kit: Kit) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 40, 200)
        await acknowledge(opened, "slow", lsns[9])
        await acknowledge(opened, "quick", lsns[29])
        await kit.drop_all(opened)
        wal = kit.wal(opened)
        assert 1 < wal.first_lsn <= 11
        assert await given(opened, "slow") == lsns[10:]
        await acknowledge(opened, "slow", lsns[19])
        await kit.drop_all(opened)
        assert 11 < wal.first_lsn <= 21
        await opened.drop_consumer("slow")
        await kit.drop_all(opened)
        assert 21 < wal.first_lsn <= 31
        assert await given(opened, "quick") == lsns[30:]
    async with kit.open() as opened:
        # And from the first moment of the next open.
        await kit.drop_all(opened)
        assert await given(opened, "quick") == lsns[30:]
        assert list(opened.statistics().consumers) == ["quick"]


@pytest.mark.parametrize("start", [None, 1])
async def test_a_log_is_being_cut_when_a_consumer_begins(
    disk_kit: Kit, start: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hold comes too late for what is going already."""
    original = MetaFile.write
    cutting, go_on, begun = threading.Event(), threading.Event(), trio.Event()

    def write(self: MetaFile, meta: frame.Meta) -> None:
        if meta.base_lsn > self.says.base_lsn:
            cutting.set()
            assert go_on.wait(60)
        original(self, meta)

    entered: list[int] = []
    async with disk_kit.open() as opened:
        await disk_kit.add(opened, 1)
        # So that nothing else need be written before there is another one.
        await acknowledge(opened, "first", 1)
        await opened.drop_consumer("first")
        await disk_kit.add(opened, 40, 200)
        wal = disk_kit.wal(opened)
        monkeypatch.setattr(MetaFile, "write", write)

        async def consume() -> None:
            with suppress(LsnTruncatedError):
                async with opened.consumer("late", start=start) as consumer:
                    entered.append(consumer.bookmark.lsn)
                    begun.set()

        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disk_kit.drop_all, opened)
                assert await trio.to_thread.run_sync(cutting.wait, 60)
                nursery.start_soon(consume)
                with trio.move_on_after(0.1):
                    await begun.wait()
                go_on.set()
        assert wal.first_lsn > 2
        if start is None:
            assert entered == [place(opened, "late")]
            assert entered[0] + 1 >= wal.first_lsn
        else:
            assert not entered
            assert "late" not in opened.statistics().consumers


async def test_a_consumer_that_holds_too_much_is_told(kit: Kit) -> None:
    async with kit.open(consumer_hold_bytes=30_000) as opened:
        lsns = await kit.add(opened, 60, 200)
        await given(opened, "slow")
        await acknowledge(opened, "quick", lsns[-2])
        await kit.drop_all(opened)
        wal = kit.wal(opened)
        assert 1 < wal.first_lsn < lsns[-2]
        with pytest.raises(LsnTruncatedError) as caught:
            await given(opened, "slow")
        assert caught.value.first_lsn == wal.first_lsn
        assert await given(opened, "quick") == lsns[-1:]
        # It is not forgotten: whoever owns it decides.
        assert place(opened, "slow") == 0
        await opened.drop_consumer("slow")
        # From the log's first record on it would be too far behind again, with one commit more.
        assert await given(opened, "slow", start=lsns[-1]) == lsns[-1:]


async def test_holds_do_not_keep_what_nobody_can_see(kit: Kit) -> None:
    """What has everything holds nothing, however long it is not used."""
    async with kit.open() as opened:
        lsns = await kit.add(opened, 30, 200)
        await acknowledge(opened, "a", lsns[-1])
        await kit.drop_all(opened)
        wal = kit.wal(opened)
        assert wal.first_lsn > 15
        assert opened.statistics().consumers["a"].lag_records == 0
        assert opened.statistics().consumers["a"].lag_bytes == 0
        assert opened.statistics().consumers["a"].lag_seconds == 0


async def test_a_consumer_can_begin_again_at_an_older_place(kit: Kit) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 30, 200)
        await acknowledge(opened, "a", lsns[-1])
        await opened.drop_consumer("a")
        assert await given(opened, "a", start=5) == lsns[4:]
        await kit.drop_all(opened)
        assert await given(opened, "a") == lsns[4:]
    async with kit.open() as opened:
        assert await given(opened, "a") == lsns[4:]


async def test_the_lag_says_how_far_behind(kit: Kit) -> None:
    async with kit.open(segment_size=1 << 20) as opened:
        lsns = await kit.add(opened, 10, 1000)
        await given(opened, "a")
        found = opened.statistics().consumers["a"]
        assert (found.acknowledged_lsn, found.lag_records) == (0, 10)
        assert 10_000 <= found.lag_bytes < 100_000
        assert found.lag_seconds >= 0
        await acknowledge(opened, "a", lsns[4])
        less = opened.statistics().consumers["a"]
        assert (less.acknowledged_lsn, less.lag_records) == (lsns[4], 5)
        assert less.lag_bytes < found.lag_bytes
        if kit.kind == "database":
            assert opened.statistics().wal.consumers.keys() == {"a"}


# -- what survives ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kill", "power"])
async def test_places_survive_a_crash_at_every_operation(kit: Kit, kind: Any) -> None:
    """What an acknowledgement has returned for is not given again; nothing else is missing."""
    files = kit.files
    assert files is not None
    told = tried = 0
    images: list[tuple[MemoryFiles, int, int]] = []

    def crash(operation: str, path: str) -> None:
        images.append((files.crash_image(len(images), kind), told, tried))

    async with kit.open() as opened:
        await kit.add(opened, 6)
        async with opened.consumer("a") as consumer:
            files.after_operation = crash
            for item in await take(consumer, 6):
                tried = item.lsn
                await consumer.acknowledge(item)
                told = item.lsn
        if kit.kind == "database":
            await opened.checkpoint()
        files.after_operation = None
    assert len(images) > 10
    for image, told, tried in images:
        kit.files = image
        async with kit.open() as opened:
            found = place(opened)
            assert told <= found <= tried
            assert await given(opened, "a") == list(range(found + 1, 7))


@pytest.mark.parametrize("kind", ["kill", "power"])
async def test_beginning_and_dropping_survive_a_crash_at_every_operation(
    kit: Kit, kind: Any
) -> None:
    files = kit.files
    assert files is not None
    state, images = "none", []  # type: tuple[str, list[tuple[MemoryFiles, str]]]
    files.after_operation = lambda operation, path: images.append(
        (files.crash_image(len(images), kind), state)
    )
    async with kit.open() as opened:
        await kit.add(opened, 2)
        state = "either"
        async with opened.consumer("a"):
            state = "there"
            await kit.add(opened, 1)
        state = "either"
        await opened.drop_consumer("a")
        state = "none"
        await kit.add(opened, 1)
        files.after_operation = None
    for image, state in images:
        kit.files = image
        async with kit.open() as opened:
            known = list(opened.statistics().consumers)
            if state != "either":
                assert known == (["a"] if state == "there" else [])


async def test_a_place_that_an_open_has_found_is_durable() -> None:
    """Its file's new name may be in the page cache only, and a clean log is not written to."""
    kit = Kit("log")
    files = kit.files
    assert files is not None
    images: list[MemoryFiles] = []

    def crash(operation: str, path: str) -> None:
        if operation == "rename":
            images.append(files.crash_image(kind="kill"))

    async with kit.open() as wal:
        await kit.add(wal, 3)
        await acknowledge(wal, "a", 1)
    async with kit.open() as wal:
        files.after_operation = crash
        await acknowledge(wal, "a", 2)
        files.after_operation = None
    (image,) = images
    log = open_log_directory(image, PATH, segment_size=TINY)
    assert log.places.found["a"].lsn == 2
    for seed in range(20):
        again = open_log_directory(image.crash_image(seed, "power"), PATH, segment_size=TINY)
        assert again.places.found["a"].lsn == 2
        again.abandon()
    log.abandon()


# -- cancellation -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["enter", "acknowledge", "drop"])
async def test_cancelled_at_every_step(kind_of_kit: str, what: str) -> None:
    """Either nothing has happened, or it is durable and the call returns."""
    for step in range(60):
        kit = Kit(kind_of_kit)
        assert kit.files is not None
        async with kit.open() as opened:
            lsns = await kit.add(opened, 3)
            if what != "enter":
                await given(opened, "a")
            with trio.CancelScope() as scope, AtStep(step, scope.cancel) as at:
                returned = await do(opened, what)
            if not scope.cancelled_caught:
                assert returned
            known = opened.statistics().consumers
            image = kit.files.crash_image(kind="power")
            # It can be used at once.
            if known:
                expected = lsns[1:] if known["a"].acknowledged_lsn else lsns
                assert await given(opened, "a") == expected
            if not scope.cancelled_caught:
                check_done(what, known)
            elif what == "acknowledge":
                assert known["a"].acknowledged_lsn == 0
            elif what == "drop":
                assert known
        kit.files = image
        async with kit.open() as opened:
            assert opened.statistics().consumers.keys() == known.keys()
            if known:
                assert place(opened) == known["a"].acknowledged_lsn
        if not at.done:
            return
    raise AssertionError("it never ends")


def check_done(what: str, known: Any) -> None:
    if what == "drop":
        assert not known
    else:
        assert known["a"].acknowledged_lsn == (1 if what == "acknowledge" else 0)


async def do(opened: Any, what: str) -> bool:
    if what == "drop":
        await opened.drop_consumer("a")
    elif what == "acknowledge":
        async with opened.consumer("a") as consumer:
            (item,) = await take(consumer, 1)
            await consumer.acknowledge(item)
    else:
        async with opened.consumer("a"):
            pass
    return True


@pytest.fixture(params=["log", "database"])
def kind_of_kit(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


async def test_cancelled_lists_lose_nothing(kit: Kit) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 4)
        async with opened.consumer("a") as consumer:
            lists = consumer.batches(10, linger=100)
            with trio.CancelScope() as scope:
                scope.cancel()
                await lists.__anext__()
            assert scope.cancelled_caught
            assert [item.lsn for item in await consumer.batches(10).__anext__()] == lsns


# -- of a log -----------------------------------------------------------------------------------


class Pieces:
    """What is read of a log, one frame at a time, also where little is left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        """The LSN where each begins."""
        self.failures = 0
        """So many of the next ones cannot be read."""
        self.gate: trio.Event | None = None
        """What they wait for."""
        real = FileCursor.chunk

        async def chunk(cursor: FileCursor, lsn: int, stop: int) -> list[trio_wal.Record]:
            self.asked.append(lsn)
            if self.gate is not None:
                await self.gate.wait()
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EIO, "it cannot be read")
            return await real(cursor, lsn, stop)

        monkeypatch.setattr(FileCursor, "chunk", chunk)
        monkeypatch.setattr(cursor, "CHUNK_BYTES", 1)
        monkeypatch.setattr(_stream, "AHEAD_RECORDS_MIN", 1)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    return Pieces(monkeypatch)


async def test_the_next_piece_is_read_while_an_acknowledgement_waits(
    kit: Kit, pieces: Pieces
) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 4)
        async with opened.consumer("a") as consumer, trio.open_nursery() as nursery:
            (item,) = await take(consumer, 1)
            assert kit.files is not None
            kit.files.hold()
            nursery.start_soon(consumer.acknowledge, item)
            nursery.start_soon(consumer.acknowledge, item)
            await wait_all_tasks_blocked()
            asked, bookmark, before = list(pieces.asked), consumer.bookmark, place(opened)
            kit.files.release()
            await wait_all_tasks_blocked()
            # It is only read: nothing else knows of it.
            assert (asked, bookmark.lsn) == (lsns[:2], item.lsn)
            assert before == (0 if kit.kind == "database" else item.lsn)
            assert place(opened) == item.lsn
            assert [each.lsn for each in await take(consumer, 1)] == lsns[1:2]
            assert pieces.asked == lsns[:2]
            assert [each.lsn for each in await take(consumer, 2)] == lsns[2:]
        assert await given(opened, "a") == lsns[1:]


async def test_who_acknowledges_reads_nothing_while_another_task_is_reading(
    kit: Kit, pieces: Pieces
) -> None:
    """Two at once would be given a record twice, or would pass one over."""
    async with kit.open() as opened:
        lsns = await kit.add(opened, 5)
        async with opened.consumer("a") as consumer, trio.open_nursery() as nursery:
            (item,) = await take(consumer, 1)
            found: list[int] = []

            async def iterate() -> None:
                found.extend([each.lsn for each in await take(consumer, 2)])

            pieces.gate = trio.Event()
            nursery.start_soon(iterate)
            await wait_all_tasks_blocked()
            await consumer.acknowledge(item)
            await wait_all_tasks_blocked()
            assert pieces.asked == lsns[:2]
            pieces.gate.set()
            await wait_all_tasks_blocked()
            assert found == lsns[1:3]
            assert [each.lsn for each in await take(consumer, 2)] == lsns[3:]


async def test_where_little_is_left_nothing_is_read_ahead(
    kit: Kit, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_stream, "AHEAD_RECORDS_MIN", 6)
    async with kit.open() as opened:
        lsns = await kit.add(opened, 4)
        async with opened.consumer("a") as consumer:
            (item,) = await take(consumer, 1)
            await consumer.acknowledge(item)
            await wait_all_tasks_blocked()
            assert pieces.asked == lsns[:1]
            assert [each.lsn for each in await take(consumer, 3)] == lsns[1:]


async def test_what_cannot_be_read_ahead_is_told_to_who_needs_it(kit: Kit, pieces: Pieces) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 4)
        async with opened.consumer("a") as consumer:
            (item,) = await take(consumer, 1)
            pieces.failures = 1
            await consumer.acknowledge(item)
            await wait_all_tasks_blocked()
            assert pieces.failures == 0
            (item,) = await take(consumer, 1)
            assert (item.lsn, pieces.asked) == (lsns[1], [lsns[0], lsns[1], lsns[1]])
            pieces.failures = 2
            await consumer.acknowledge(item)
            with pytest.raises(OSError, match="it cannot be read"):
                await take(consumer, 1)
            assert [each.lsn for each in await take(consumer, 2)] == lsns[2:]


async def test_cancelled_while_it_is_read_ahead_nothing_is_lost(kit: Kit, pieces: Pieces) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 3)
        async with opened.consumer("a") as consumer:
            (item,) = await take(consumer, 1)
            pieces.gate = trio.Event()
            await consumer.acknowledge(item)
            for _ in range(2):
                with trio.move_on_after(0.01):
                    await consumer.__anext__()
            pieces.gate.set()
            assert pieces.asked == lsns[:2]
            assert [each.lsn for each in await take(consumer, 2)] == lsns[1:]


@pytest.mark.parametrize("when", ["while it is read", "after it was read"])
async def test_what_was_read_ahead_is_cut(pieces: Pieces, when: str) -> None:
    async with Kit("log").open() as opened:
        await Kit("log").add(opened, 3)
        async with opened.consumer("a") as consumer:
            (item,) = await take(consumer, 1)
            if when == "while it is read":
                pieces.gate = trio.Event()
            await consumer.acknowledge(item)
            await wait_all_tasks_blocked()
            assert pieces.asked == [1, 2]
            await opened.truncate_after(1)
            assert await opened.append(b"another") == 2
            if pieces.gate is not None:
                pieces.gate.set()
            assert [each.data for each in await take(consumer, 1)] == [b"another"]


async def test_who_leaves_while_it_is_read_ahead(disk_kit: Kit, pieces: Pieces) -> None:
    """Its task ends with the log, which waits for the thread that reads."""
    begun, gate = threading.Event(), threading.Event()
    real = cursor.Cursor.chunk

    def chunk(self: cursor.Cursor, stop: int) -> list[trio_wal.Record]:
        if pieces.asked[1:]:
            begun.set()
            gate.wait(60)
        return real(self, stop)

    async def use() -> None:
        async with disk_kit.open() as opened:
            await disk_kit.add(opened, 3)
            async with opened.consumer("a") as consumer:
                await consumer.acknowledge((await take(consumer, 1))[0])
                await trio.to_thread.run_sync(begun.wait, 60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cursor.Cursor, "chunk", chunk)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            await trio.to_thread.run_sync(begun.wait, 60)
            await wait_all_tasks_blocked()
            gate.set()
    async with disk_kit.open() as opened:
        assert place(opened) == 1
        async with opened.consumer("a") as consumer:
            assert [each.lsn for each in await take(consumer, 2)] == [2, 3]


@pytest.mark.parametrize("fails", [MemoryError, KeyboardInterrupt])
async def test_where_no_task_can_be_started_nothing_waits_for_it(
    kit: Kit, pieces: Pieces, monkeypatch: pytest.MonkeyPatch, fails: type[BaseException]
) -> None:
    async with kit.open() as opened:
        lsns = await kit.add(opened, 3)
        async with opened.consumer("a") as consumer:
            (item,) = await take(consumer, 1)

            def start_aside(_log: Log, _task: object) -> NoReturn:
                raise fails

            with monkeypatch.context() as patch:
                patch.setattr(Log, "start_aside", start_aside)
                with pytest.raises(fails):
                    await consumer.acknowledge(item)
            with trio.fail_after(60):
                assert [each.lsn for each in await take(consumer, 2)] == lsns[1:]


def test_ctrl_c_does_not_come_between_a_task_that_reads_ahead_and_the_note_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else two would read with one cursor, or one would wait for nobody."""
    monkeypatch.setattr(cursor, "CHUNK_BYTES", 1)
    monkeypatch.setattr(_stream, "AHEAD_RECORDS_MIN", 1)
    real = Log.start_aside

    def start_aside(log: Log, task: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        cut_short = real(log, task)
        signal.raise_signal(signal.SIGINT)
        return cut_short

    async def main() -> None:
        kit = Kit("log")
        async with kit.open() as opened:
            await kit.add(opened, 3)
            async with opened.consumer("a") as consumer:
                (item,) = await take(consumer, 1)
                monkeypatch.setattr(Log, "start_aside", start_aside)
                with pytest.raises(KeyboardInterrupt):
                    await consumer.acknowledge(item)
                monkeypatch.setattr(Log, "start_aside", real)
                assert consumer._session.stream._reading is not None
                assert consumer._session.stream._reading._ahead is not None
                with trio.fail_after(60):
                    assert [each.lsn for each in await take(consumer, 2)] == [2, 3]

    trio.run(main)


async def test_what_was_acknowledged_is_cut() -> None:
    kit = Kit("log")
    async with kit.open() as wal:
        await kit.add(wal, 6)
        await acknowledge(wal, "before", 2)
        async with wal.consumer("a") as consumer:
            items = await take(consumer, 5)
            await consumer.acknowledge(items[3])
            await wal.truncate_after(3)
            with pytest.raises(LogDivergedError):
                await consumer.acknowledge(items[4])
            with pytest.raises(LogDivergedError):
                await consumer.__anext__()
        await kit.add(wal, 4)
        for _ in range(2):
            with pytest.raises(LogDivergedError) as caught:
                await given(wal, "a")
            assert caught.value.bookmark == Bookmark(4, 0)
            assert caught.value.parted_after == 3
        assert await given(wal, "before") == [3, 4, 5, 6, 7]
    async with kit.open() as wal:
        with pytest.raises(LogDivergedError):
            await given(wal, "a")
        assert await given(wal, "before") == [3, 4, 5, 6, 7]
        await wal.drop_consumer("a")
        assert await given(wal, "a", start=4) == [4, 5, 6, 7]
        await acknowledge(wal, "a", 4)
    async with kit.open() as wal:
        # Its place is of the new epoch.
        assert await given(wal, "a") == [5, 6, 7]


async def test_a_full_disk_keeps_places_where_they_are() -> None:
    kit = Kit("log")
    assert kit.files is not None
    async with kit.open() as wal:
        await kit.add(wal, 3)
        async with wal.consumer("a") as consumer:
            items = await take(consumer, 3)
            await consumer.acknowledge(items[0])
            kit.files.fail("pwrite", errno.ENOSPC)
            with pytest.raises(LogFullError, match="no place of a consumer moves"):
                await consumer.acknowledge(items[1])
            assert place(wal) == 1
            await consumer.acknowledge(items[2])
            assert place(wal) == 3
    async with kit.open() as wal:
        assert place(wal) == 3


@pytest.mark.parametrize("operation", ["open", "pwrite", "sync", "rename", "sync_dir"])
async def test_a_place_that_cannot_be_written_breaks_nothing(operation: Any) -> None:
    kit = Kit("log")
    assert kit.files is not None
    async with kit.open() as wal:
        await kit.add(wal, 3)
        async with wal.consumer("a") as consumer:
            items = await take(consumer, 3)
            await consumer.acknowledge(items[0])
            kit.files.fail(operation)
            with pytest.raises(OSError, match="Input/output error"):
                await consumer.acknowledge(items[1])
            assert place(wal) == 1
            image = kit.files.crash_image(kind="power")
            await kit.add(wal, 1)
            await consumer.acknowledge(items[2])
            assert place(wal) == 3
    async with kit.open() as wal:
        assert place(wal) == 3
    kit.files = image
    async with kit.open() as wal:
        assert place(wal) in (1, 2)


async def test_a_broken_log_moves_no_place(kit: Kit) -> None:
    assert kit.files is not None
    async with kit.open() as opened:
        await kit.add(opened, 2)
        async with opened.consumer("a") as consumer:
            items = await take(consumer, 2)
            kit.files.fail("sync", times=math.inf)
            with pytest.raises(LogFailedError):
                await kit.add(opened, 1)
            kit.files.heal()
            for _ in range(2):
                with pytest.raises(LogFailedError):
                    await consumer.acknowledge(items[0])
        with pytest.raises(LogFailedError):
            await opened.drop_consumer("a")
    async with kit.open() as opened:
        assert place(opened) == 0


async def test_a_damaged_file_of_places_is_told() -> None:
    kit = Kit("log")
    assert kit.files is not None
    async with kit.open() as wal:
        await kit.add(wal, 2)
        await acknowledge(wal, "a", 1)
    good = kit.files.read_file(PATH, "consumers")
    assert verify(kit.files.open_directory(PATH)).findings == ()
    future = bytearray(good)
    future[8] = PLACES_VERSION + 1
    cases: list[tuple[bytes, type[Exception]]] = [
        (good[:-1], CorruptLogError),
        (b"", CorruptLogError),
        (bytes(future), UnsupportedFormatError),
    ]
    for data, error in cases:
        kit.files.write_file(PATH, "consumers", data)
        with pytest.raises(error):
            async with kit.open():
                raise AssertionError
        assert kit.files.read_file(PATH, "consumers") == data
        (finding,) = verify(kit.files.open_directory(PATH)).findings
        assert finding.path == f"{PATH}/consumers"
    kit.files.write_file(PATH, "consumers", good)
    kit.files.write_file(PATH, "consumers.tmp", b"half")
    async with kit.open() as wal:
        assert place(wal) == 1
        await acknowledge(wal, "a", 2)
    assert "consumers.tmp" not in kit.files.names(PATH)


async def test_places_of_another_log_are_refused() -> None:
    kit, other = Kit("log"), Kit("log")
    assert kit.files is not None
    assert other.files is not None
    for one in (kit, other):
        async with one.open() as wal:
            await kit.add(wal, 2)
            await acknowledge(wal, "a", 1)
    other.files.write_file(PATH, "consumers", kit.files.read_file(PATH, "consumers"))
    if kit.files.read_file(PATH, "log.meta") != other.files.read_file(PATH, "log.meta"):
        with pytest.raises(CorruptLogError, match="those of another log"):
            async with other.open():
                raise AssertionError


# -- of another engine --------------------------------------------------------------------------


async def test_a_log_on_another_engine_has_consumers() -> None:
    server = MemoryServer()
    async with open_wal_on(server) as wal:
        for _ in range(4):
            await wal.append(b"r")
        await acknowledge(wal, "a", 2)
    async with open_wal_on(server) as wal:
        assert await given(wal, "a") == [3, 4]
        assert wal.statistics().consumers["a"].lag_records == 2
        await wal.drop_consumer("a")
    async with open_wal_on(server) as wal:
        assert wal.statistics().consumers == {}


async def test_a_database_on_another_engine_has_consumers() -> None:
    server = MemoryServer()
    async with open_database_on(server) as db:
        for n in range(4):
            await db.put(b"k%d" % n, b"")
        await acknowledge(db, "a", 2)
        await db.checkpoint()
        await acknowledge(db, "a", 3)
    async with open_database_on(server) as db:
        assert await given(db, "a") == [4]


# -- of a format ---------------------------------------------------------------------------------


async def test_versions_without_consumers_refuse_a_database_that_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kit = Kit("database")
    async with kit.open() as db:
        await kit.add(db, 1)
    async with kit.open() as db:
        check_none(kit, db)
        await given(db, "a")
    # As such a version has it.
    monkeypatch.setattr(frame, "_META_FEATURES", frame.FEATURE_EPOCHS)
    with pytest.raises(UnsupportedFormatError, match="feature set 32"):
        async with kit.open():
            raise AssertionError
    monkeypatch.undo()
    async with kit.open() as db:
        await db.drop_consumer("a")
    async with kit.open() as db:
        assert db.statistics().consumers == {}
