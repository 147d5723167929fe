"""`open_wal` and `WriteAheadLog`: what they accept, what they promise, how they end."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from helpers import (
    LOG,
    SMALL_SEGMENT,
    AfterEveryStep,
    Call,
    Disk,
    append_until,
    open_memory,
    open_tasks,
    read_all,
)
from trio.testing import (
    MockClock,
    assert_checkpoints,
    assert_no_checkpoints,
    wait_all_tasks_blocked,
)

import trio_wal
from trio_wal.testing import MemoryFiles

# -- LSNs and content -------------------------------------------------------------


async def test_an_empty_log_has_first_lsn_1_and_last_lsn_0(disk: Disk) -> None:
    for _ in range(3):
        async with disk.open() as wal:
            assert (wal.first_lsn, wal.last_lsn, wal.durable_lsn) == (1, 0, 0)
            assert await read_all(wal) == {}


async def test_lsns_count_from_1_without_gaps_across_segments_and_reopenings(disk: Disk) -> None:
    given: dict[int, bytes] = {}
    for session in range(4):
        async with disk.open(segment_size=SMALL_SEGMENT) as wal:
            assert wal.last_lsn == len(given)
            assert await read_all(wal) == given
            for number in range(30):
                data = b"%d/%d " % (session, number) * 40
                lsn = await wal.append(data)
                assert lsn == len(given) + 1
                given[lsn] = data
            unit = [b"%d" % number for number in range(session)]
            lsns = await wal.append_many(unit)
            assert lsns == range(len(given) + 1, len(given) + 1 + session)
            given.update(zip(lsns, unit, strict=True))
            assert wal.statistics().segments > session + 1
            assert await read_all(wal) == given
    async with disk.open() as wal:
        assert await read_all(wal) == given
        assert wal.recovery.last_lsn == len(given) == 4 * 30 + 0 + 1 + 2 + 3


FRAME_LIKE = [
    b"TWF\x01",
    b"trio-wal" + bytes(504),
    b"triowal\n" + bytes(504),
    b"TWP\x01" + bytes(508),
    struct.pack("<4sIQQqI", b"TWF\x01", 0, 2, 1, 0, 1).ljust(64, b"\0"),
    bytes(512),
    b"\xff" * 512,
    bytes(range(256)) * 16,
]


async def test_payloads_that_look_like_parts_of_the_format_are_only_payload(disk: Disk) -> None:
    async with disk.open(segment_size=SMALL_SEGMENT) as wal:
        for data in FRAME_LIKE:
            await wal.append(data)
            # At a place where a frame could stand: behind a header and 448 bytes.
            await wal.append(bytes(444) + data)
            await wal.append_many([data] * 3)
        given = await read_all(wal)
    async with disk.open() as wal:
        assert await read_all(wal) == given
    found = iter(given.values())
    for data in FRAME_LIKE:
        assert [next(found) for _ in range(5)] == [data, bytes(444) + data, data, data, data]


async def test_whole_segment_files_are_good_payloads_for_another_log(files: MemoryFiles) -> None:
    """What stands inside is of another log, and must never be taken for this one's."""
    async with trio_wal.open_wal("/inner", files=files, segment_size=SMALL_SEGMENT) as wal:
        await append_until(wal, lambda: wal.statistics().segments > 2)
    payloads = [data for name, data in files.contents("/inner").items() if name.endswith(".log")]
    async with open_memory(files) as wal:
        for data in payloads:
            await wal.append(data)
    async with open_memory(files.crash_image(0, "kill")) as wal:
        assert list((await read_all(wal)).values()) == payloads


@pytest.mark.parametrize("size", [0, 1, 443, 444, 445, 511, 512, 513, 4096, 100_000])
async def test_records_of_every_size_come_back(files: MemoryFiles, size: int) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    async with open_memory(files) as wal:
        assert await wal.append(data) == 1
        assert await wal.append_many([data, b"", data]) == range(2, 5)
    async with open_memory(files) as wal:
        assert await read_all(wal) == {1: data, 2: data, 3: b"", 4: data}


async def test_a_thousand_empty_records_are_a_thousand_records(disk: Disk) -> None:
    async with disk.open() as wal:
        assert await wal.append_many([b""] * 1000) == range(1, 1001)
        assert await wal.append(b"") == 1001
    async with disk.open() as wal:
        assert await read_all(wal) == dict.fromkeys(range(1, 1002), b"")


# -- the limit of one record ------------------------------------------------------


async def test_a_record_of_exactly_max_record_size_passes_and_one_more_does_not(
    files: MemoryFiles,
) -> None:
    async with open_memory(files, max_record_size=1000) as wal:
        assert await wal.append(b"x" * 1000) == 1
        assert await wal.append_many([b"y" * 1000]) == range(2, 3)
        await wal.send(b"z" * 1000)
        wal.send_nowait(b"!" * 1000)
        await wal.flush()
        match = r"^data of 1001 bytes is over max_record_size of 1000 bytes$"
        with pytest.raises(trio_wal.RecordTooLargeError, match=match) as caught:
            await wal.append(b"x" * 1001)
        assert (caught.value.size, caught.value.limit) == (1001, 1000)
        assert isinstance(caught.value, ValueError)
        with pytest.raises(trio_wal.RecordTooLargeError, match=match):
            await wal.append_many([b"fits", b"x" * 1001])
        with pytest.raises(trio_wal.RecordTooLargeError, match=match):
            await wal.send(b"x" * 1001)
        with pytest.raises(trio_wal.RecordTooLargeError, match=match):
            wal.send_nowait(b"x" * 1001)
        assert wal.statistics().peak_bytes_waiting == 2000
        assert await wal.flush() == 4


async def test_too_large_a_record_is_refused_before_it_is_queued(files: MemoryFiles) -> None:
    """At once, though the queue is full and the disk stalls."""
    async with (
        open_memory(files, max_record_size=10, max_queue_size=1) as wal,
        open_tasks(files) as nursery,
    ):
        files.hold()
        for _ in range(3):
            Call(nursery, wal.append, b"record")
            await wait_all_tasks_blocked()
        for write in (wal.append, wal.send):
            with assert_no_checkpoints(), pytest.raises(trio_wal.RecordTooLargeError):
                await write(b"x" * 11)
        call = Call(nursery, wal.append_many, [b"x" * 11])
        await wait_all_tasks_blocked()
        assert isinstance(call.error, trio_wal.RecordTooLargeError)
        assert wal.statistics().tasks_waiting_send == 1
        files.release()


async def test_a_unit_over_what_a_frame_can_hold_is_refused(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_wal._local.LocalEngine.batch_bytes_max", 10_000)
    monkeypatch.setattr("trio_wal._local.LocalEngine.batch_records_max", 100)
    async with open_memory(files, max_record_size=1000, max_batch_bytes=5000) as wal:
        assert len(await wal.append_many([bytes(996)] * 10)) == 10
        with pytest.raises(
            trio_wal.RecordTooLargeError,
            match=r"^data of 9980 bytes is over the limit of one append_many of 10000 bytes$",
        ):
            await wal.append_many([bytes(998)] * 10)
        assert len(await wal.append_many([b""] * 100)) == 100
        with pytest.raises(trio_wal.RecordTooLargeError, match=r"^data of 101 "):
            await wal.append_many([b""] * 101)
        assert await wal.flush() == 110


# -- append_many ------------------------------------------------------------------


async def test_append_many_of_a_million_records_is_one_batch(tmp_path: Path) -> None:
    count = 1_000_000
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        assert await wal.append(b"before") == 1
        lsns = await wal.append_many(b"%d" % number for number in range(count))
        assert lsns == range(2, count + 2)
        assert await wal.append(b"behind") == count + 2
        assert wal.statistics().batches_synced == 3
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        assert wal.recovery.last_lsn == count + 2
        expected = 0
        async with wal.read(2, count + 2) as records:
            async for record in records:
                assert record.lsn == expected + 2
                assert record.data == b"%d" % expected
                expected += 1
        assert expected == count


@pytest.mark.parametrize("empty", [[], (), iter(()), {}, (x for x in ())])
async def test_append_many_of_nothing_is_a_checkpoint_and_an_empty_range(
    files: MemoryFiles, empty: object
) -> None:
    async with open_memory(files) as wal:
        await wal.append(b"one")
        before = files.operations["pwrite"]
        with assert_checkpoints():
            lsns = await wal.append_many(empty)
        assert list(lsns) == []
        assert isinstance(lsns, range)
        assert files.operations["pwrite"] == before
        assert await wal.append(b"two") == 2


@pytest.mark.parametrize("make", [list, tuple, iter, dict.fromkeys, lambda r: (x for x in r)])
async def test_append_many_takes_any_iterable(files: MemoryFiles, make: object) -> None:
    data = [b"a", b"b", b"c"]
    async with open_memory(files) as wal:
        assert await wal.append_many(make(data)) == range(1, 4)  # type: ignore[operator]
        assert list((await read_all(wal)).values()) == data


@pytest.mark.parametrize("place", [0, 3, 25_000])
@pytest.mark.parametrize(
    ("bad", "kind"), [("text", "str"), (None, "NoneType"), (bytearray(1), "bytearray"), (1, "int")]
)
async def test_append_many_names_the_element_that_is_wrong(
    files: MemoryFiles, place: int, bad: object, kind: str
) -> None:
    async with open_memory(files) as wal:
        with pytest.raises(TypeError, match=rf"^records\[{place}\] must be bytes, not {kind}$"):
            await wal.append_many([*[b"good"] * place, bad, b"good"])
        assert await wal.append(b"the first") == 1


@pytest.mark.parametrize("bad", [b"bytes", "text", bytearray(b"x"), memoryview(b"x")])
async def test_append_many_refuses_one_record(files: MemoryFiles, bad: object) -> None:
    async with open_memory(files) as wal:
        with pytest.raises(TypeError, match=r"^records must be an iterable of bytes, not one "):
            await wal.append_many(bad)
        with pytest.raises(TypeError, match=r"^records must be an iterable of bytes, not int$"):
            await wal.append_many(17)
        assert wal.last_lsn == 0


async def test_an_iterable_that_raises_leaves_nothing(files: MemoryFiles) -> None:
    def records() -> Iterator[bytes]:
        yield from [b"x"] * 15_000
        raise ZeroDivisionError("in the generator")

    async with open_memory(files) as wal:
        with pytest.raises(ZeroDivisionError, match=r"^in the generator$"):
            await wal.append_many(records())
        assert await wal.append(b"the first") == 1


async def test_a_long_iterable_does_not_hold_up_the_loop(files: MemoryFiles) -> None:
    taken = [0]

    def records() -> Iterator[bytes]:
        for _ in range(100_000):
            taken[-1] += 1
            yield b""

    async with open_memory(files) as wal:
        with AfterEveryStep(lambda: taken.append(0)):
            await wal.append_many(records())
    assert sum(taken) == 100_000
    assert max(taken) <= 10_001


@pytest.mark.parametrize("bad", ["text", bytearray(b"x"), memoryview(b"x"), 1, None, [b"x"]])
async def test_a_record_must_be_bytes(files: MemoryFiles, bad: object) -> None:
    match = rf"^data must be bytes, not {type(bad).__name__}$"
    async with open_memory(files) as wal:
        with pytest.raises(TypeError, match=match):
            await wal.append(bad)
        with pytest.raises(TypeError, match=match):
            await wal.send(bad)
        with pytest.raises(TypeError, match=match):
            wal.send_nowait(bad)
        assert await wal.flush() == 0


# -- checkpoints ------------------------------------------------------------------


async def test_every_async_method_is_a_checkpoint(disk: Disk) -> None:
    with assert_checkpoints():
        manager = disk.open()
        wal = await manager.__aenter__()
    calls = [
        (wal.append, b"one"),
        (wal.append_many, [b"two", b"three"]),
        (wal.append_many, []),
        (wal.send, b"four"),
        (wal.flush,),
        (wal.flush,),
        (wal.wait_durable, 0),
        (wal.wait_durable, 4),
        (wal.truncate_before, 1),
        (wal.truncate_before, 5),
        (wal.truncate_after, 4),
        (wal.truncate_after, 100),
        (wal.aclose,),
        (wal.aclose,),
    ]
    for function, *arguments in calls:
        with assert_checkpoints():
            await function(*arguments)
    await manager.__aexit__(None, None, None)


async def test_every_async_method_can_be_cancelled_before_it_begins(disk: Disk) -> None:
    async with disk.open() as wal:
        await wal.append(b"one")
        for function, *arguments in [
            (wal.append, b"no"),
            (wal.append_many, [b"no"]),
            (wal.append_many, []),
            (wal.send, b"no"),
            (wal.flush,),
            (wal.wait_durable, 0),
            (wal.wait_durable, 2),
            (wal.truncate_before, 2),
            (wal.truncate_after, 0),
        ]:
            with trio.CancelScope() as scope:
                scope.cancel()
                await function(*arguments)
            assert scope.cancelled_caught, function
        assert await wal.append(b"two") == 2
        assert await read_all(wal) == {1: b"one", 2: b"two"}


async def test_no_sync_method_is_a_checkpoint(disk: Disk) -> None:
    async with disk.open() as wal:
        with assert_no_checkpoints():
            wal.send_nowait(b"one")
            wal.statistics()
            assert wal.first_lsn == 1
            assert wal.last_lsn == wal.durable_lsn == 0
            assert wal.path.endswith("log")
            assert wal.recovery.last_lsn == 0
            assert "durable_lsn=0" in repr(wal)
            wal.read()
            wal.follow()
    with assert_no_checkpoints():
        wal.statistics()


# -- closing ----------------------------------------------------------------------


async def test_leaving_the_block_drains_what_was_accepted(disk: Disk) -> None:
    async with disk.open(flush_interval=1000) as wal:
        for number in range(1000):
            wal.send_nowait(b"%d" % number)
    assert wal.durable_lsn == 1000
    assert wal.statistics().state == "closed"
    async with disk.open() as wal:
        assert wal.recovery.clean_shutdown
        assert list((await read_all(wal)).values()) == [b"%d" % n for n in range(1000)]


async def test_closing_twice_and_concurrently_is_closing_once(disk: Disk) -> None:
    async with disk.open() as wal:
        wal.send_nowait(b"one")
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(wal.aclose)
        await wal.aclose()
        assert wal.statistics().state == "closed"
        await wal.aclose()
        # The lock is free already.
        async with disk.open() as again:
            assert await read_all(again) == {1: b"one"}


async def test_use_after_closing_raises_closed_resource_error(disk: Disk) -> None:
    async with disk.open() as wal:
        await wal.append(b"one")
        await wal.aclose()
    match = rf"^{wal.path}: this log is closed$"
    for function, *arguments in [
        (wal.append, b"no"),
        (wal.append_many, [b"no"]),
        (wal.append_many, []),
        (wal.send, b"no"),
        (wal.flush,),
        (wal.truncate_before, 1),
        (wal.truncate_before, 2),
        (wal.truncate_after, 0),
        (wal.truncate_after, 1),
        (wal.wait_durable, 2),
    ]:
        with pytest.raises(trio.ClosedResourceError, match=match):
            await function(*arguments)
    for function, *arguments in [(wal.send_nowait, b"no"), (wal.read,), (wal.follow,)]:
        with pytest.raises(trio.ClosedResourceError, match=match):
            function(*arguments)
    # What is known stays known.
    assert (wal.first_lsn, wal.last_lsn, wal.durable_lsn) == (1, 1, 1)
    assert wal.statistics().state == "closed"
    await wal.wait_durable(1)
    await wal.aclose()


async def test_methods_called_while_it_closes_raise_closed_resource_error(
    files: MemoryFiles,
) -> None:
    async with open_memory(files) as wal, open_tasks(files) as nursery:
        files.hold()
        flying = Call(nursery, wal.append, b"one")
        await wait_all_tasks_blocked()
        queued = Call(nursery, wal.append, b"two")
        closing = Call(nursery, wal.aclose)
        await wait_all_tasks_blocked()
        assert wal.statistics().state == "closing"
        for write in (wal.append, wal.send):
            with pytest.raises(trio.ClosedResourceError):
                await write(b"late")
        with pytest.raises(trio.ClosedResourceError):
            wal.send_nowait(b"late")
        with pytest.raises(trio.ClosedResourceError):
            await wal.flush()
        assert closing.state == "waiting"
        files.release()
        await wait_all_tasks_blocked()
        assert (flying.value, queued.value, closing.state) == (1, 2, "returned")


async def test_closing_with_a_full_queue_writes_the_queue_and_refuses_the_blocked(
    files: MemoryFiles,
) -> None:
    async with open_memory(files, max_queue_size=3) as wal, open_tasks(files) as nursery:
        files.hold()
        calls = []
        for number in range(8):
            calls.append(Call(nursery, wal.append, b"%d" % number))
            await wait_all_tasks_blocked()
        closing = Call(nursery, wal.aclose)
        await wait_all_tasks_blocked()
        # The blocked are told at once; the queued wait for their outcome.
        assert [call.state for call in calls] == ["waiting"] * 4 + ["raised"] * 4
        for call in calls[4:]:
            with pytest.raises(trio.ClosedResourceError, match=r"^/log: the log was closed$"):
                raise call.error
        files.release()
        await wait_all_tasks_blocked()
        assert closing.state == "returned"
        assert [call.value for call in calls[:4]] == [1, 2, 3, 4]
    async with open_memory(files) as wal:
        assert await read_all(wal) == {n + 1: b"%d" % n for n in range(4)}


class BodyError(Exception):
    pass


async def test_the_exception_of_the_body_passes_unwrapped_and_the_log_drains(disk: Disk) -> None:
    error = BodyError("mine")
    cause = KeyError("cause")
    with pytest.raises(BodyError) as caught:  # noqa: PT012
        async with disk.open(flush_interval=1000) as wal:
            await wal.append(b"one")
            wal.send_nowait(b"two")
            raise error from cause
    assert caught.value is error
    assert caught.value.__cause__ is cause
    async with disk.open() as wal:
        assert wal.recovery.clean_shutdown
        assert await read_all(wal) == {1: b"one", 2: b"two"}


async def test_an_exception_group_of_the_body_is_not_touched(disk: Disk) -> None:
    async def fail() -> None:
        raise BodyError("in a task")

    with pytest.raises(BaseException) as caught:  # noqa: PT011, PT012
        async with disk.open() as wal:
            wal.send_nowait(b"one")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(trio.sleep_forever)
    assert type(caught.value).__name__ == "ExceptionGroup"
    assert caught.value.message == "Exceptions from Trio nursery"  # type: ignore[attr-defined]
    (inner,) = caught.value.exceptions  # type: ignore[attr-defined]
    assert type(inner) is BodyError
    assert wal.durable_lsn == 1


@pytest.mark.parametrize("error", [GeneratorExit, SystemExit, KeyboardInterrupt, StopIteration])
async def test_any_base_exception_of_the_body_drains_the_log(
    files: MemoryFiles, error: type[BaseException]
) -> None:
    mine = error("mine")
    with pytest.raises(error) as caught:  # noqa: PT012
        async with open_memory(files, flush_interval=1000) as wal:
            wal.send_nowait(b"one")
            raise mine
    assert caught.value is mine
    assert wal.durable_lsn == 1


async def test_open_wal_is_for_one_use(files: MemoryFiles) -> None:
    manager = open_memory(files)
    async with manager:
        pass
    with pytest.raises(
        RuntimeError,
        match=r"^open_wal\(\) gives a context manager that can be used only once$",
    ):
        await manager.__aenter__()


async def test_two_logs_side_by_side_know_nothing_of_each_other(files: MemoryFiles) -> None:
    async with (
        trio_wal.open_wal("/a", files=files) as a,
        trio_wal.open_wal("/b", files=files) as b,
        trio.open_nursery() as nursery,
    ):
        for number in range(50):
            nursery.start_soon(a.append, b"a%d" % number)
            if number % 2:
                nursery.start_soon(b.append, b"b%d" % number)
        await wait_all_tasks_blocked()
        assert (a.last_lsn, b.last_lsn) == (50, 25)
        assert {data[:1] for data in (await read_all(b)).values()} == {b"b"}


# -- truncation -------------------------------------------------------------------


async def test_truncate_before_drops_whole_segments_and_keeps_the_lsns(disk: Disk) -> None:
    async with disk.open(segment_size=SMALL_SEGMENT) as wal:
        lsns = await append_until(wal, lambda: wal.statistics().segments == 4)
        given = await read_all(wal)
        segments = wal.statistics().segments

        await wal.truncate_before(2)
        assert (wal.first_lsn, wal.statistics().segments) == (1, segments)

        middle = lsns[len(lsns) // 2]
        await wal.truncate_before(middle)
        assert 1 < wal.first_lsn <= middle
        assert wal.statistics().segments < segments
        given = {lsn: data for lsn, data in given.items() if lsn >= wal.first_lsn}
        assert await read_all(wal) == given
        assert (wal.last_lsn, wal.durable_lsn) == (lsns[-1], lsns[-1])
        assert await wal.append(b"next") == lsns[-1] + 1
        given[lsns[-1] + 1] = b"next"
        first = wal.first_lsn
        # Below what is there: nothing to do.
        await wal.truncate_before(1)
        assert wal.first_lsn == first
    async with disk.open(segment_size=SMALL_SEGMENT) as wal:
        assert wal.first_lsn == first == wal.recovery.first_lsn
        assert await read_all(wal) == given
        with pytest.raises(trio_wal.LsnTruncatedError) as caught:
            await read_all(wal, start=first - 1)
        assert caught.value.first_lsn == first


async def test_a_log_truncated_to_nothing_has_first_lsn_behind_last_lsn(disk: Disk) -> None:
    async with disk.open() as wal:
        await wal.append_many([b"%d" % n for n in range(10)])
        await wal.truncate_before(11)
        assert (wal.first_lsn, wal.last_lsn, wal.durable_lsn) == (11, 10, 10)
        assert await read_all(wal) == {}
        await wal.truncate_before(11)
        assert (wal.first_lsn, wal.last_lsn) == (11, 10)
    async with disk.open() as wal:
        assert (wal.first_lsn, wal.last_lsn, wal.durable_lsn) == (11, 10, 10)
        assert await wal.append(b"eleven") == 11
        assert await read_all(wal) == {11: b"eleven"}


async def test_truncate_before_covers_what_was_accepted_before_it(files: MemoryFiles) -> None:
    async with open_memory(files, flush_interval=1000) as wal:
        for number in range(5):
            wal.send_nowait(b"%d" % number)
        await wal.truncate_before(6)
        assert (wal.first_lsn, wal.last_lsn) == (6, 5)


async def test_truncate_before_checks_its_argument(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        await wal.append_many([b"x"] * 5)
        with pytest.raises(
            ValueError, match=r"^lsn must be at most 6, right after the last record, not 7"
        ):
            await wal.truncate_before(7)
        with pytest.raises(ValueError, match=r"^lsn must be at least 1, not 0$"):
            await wal.truncate_before(0)
        with pytest.raises(TypeError, match=r"^lsn must be an int, not float$"):
            await wal.truncate_before(1.0)
        assert wal.first_lsn == 1


@pytest.mark.parametrize("lsn", [0, 1, 2, 3, 5, 6, 9, 10, 11, 1000])
async def test_truncate_after_drops_the_records_above_and_reuses_their_lsns(
    disk: Disk, lsn: int
) -> None:
    async with disk.open() as wal:
        # Cuts between batches, in the middle of them, and behind the last one.
        await wal.append(b"1")
        await wal.append_many([b"2", b"3", b"4", b"5"])
        await wal.append(b"6")
        await wal.append_many([b"7", b"8", b"9", b"10"])
        given = {n: b"%d" % n for n in range(1, 11) if n <= lsn}
        kept = min(lsn, 10)
        await wal.truncate_after(lsn)
        assert (wal.first_lsn, wal.last_lsn, wal.durable_lsn) == (1, kept, kept)
        assert await read_all(wal) == given
        assert await wal.append(b"new") == kept + 1
        given[kept + 1] = b"new"
        assert await read_all(wal) == given
    async with disk.open() as wal:
        assert await read_all(wal) == given
        assert (wal.first_lsn, wal.last_lsn) == (1, kept + 1)


async def test_truncate_after_cuts_whole_segments(disk: Disk) -> None:
    async with disk.open(segment_size=SMALL_SEGMENT) as wal:
        await append_until(wal, lambda: wal.statistics().segments == 6)
        total = wal.last_lsn
        for lsn in (total - 1, total - total // 5, total // 2, total // 3, 3, 0):
            given = {n: d for n, d in (await read_all(wal)).items() if n <= lsn}
            await wal.truncate_after(lsn)
            assert await read_all(wal) == given
            assert wal.last_lsn == lsn
            data = b"in place of %d" % lsn
            assert await wal.append(data) == lsn + 1
        assert wal.statistics().segments < 6
    async with disk.open() as wal:
        assert await read_all(wal) == {1: b"in place of 0"}


async def test_truncate_after_meets_truncate_before(disk: Disk) -> None:
    async with disk.open(segment_size=SMALL_SEGMENT) as wal:
        lsns = await append_until(wal, lambda: wal.statistics().segments == 4)
        await wal.truncate_before(lsns[-1])
        first = wal.first_lsn
        assert first > 1
        match = (
            rf"^lsn must be at least {first - 1}, right before the first record, not {first - 2}$"
        )
        with pytest.raises(ValueError, match=match):
            await wal.truncate_after(first - 2)
        await wal.truncate_after(first - 1)
        assert (wal.first_lsn, wal.last_lsn) == (first, first - 1)
        assert await read_all(wal) == {}
        assert await wal.append(b"again") == first
    async with disk.open() as wal:
        assert await read_all(wal) == {first: b"again"}


async def test_truncate_after_checks_its_argument(files: MemoryFiles) -> None:
    async with open_memory(files) as wal:
        with pytest.raises(ValueError, match=r"^lsn must be at least 0, not -1$"):
            await wal.truncate_after(-1)
        with pytest.raises(TypeError, match=r"^lsn must be an int, not NoneType$"):
            await wal.truncate_after(None)


async def test_records_accepted_before_truncate_after_are_dropped_with_the_others(
    files: MemoryFiles,
) -> None:
    async with open_memory(files) as wal, open_tasks(files) as nursery:
        await wal.append(b"1")
        files.hold()
        Call(nursery, wal.append, b"2")
        await wal.send(b"3")
        await wait_all_tasks_blocked()
        call = Call(nursery, wal.truncate_after, 1)
        await wait_all_tasks_blocked()
        files.release()
        await wait_all_tasks_blocked()
        assert call.state == "returned"
        assert await read_all(wal) == {1: b"1"}
        assert await wal.append(b"again 2") == 2


@pytest.mark.parametrize("bad", [-1, True, "1", 1.5, None])
async def test_wait_durable_checks_its_argument(files: MemoryFiles, bad: object) -> None:
    async with open_memory(files) as wal:
        with pytest.raises((TypeError, ValueError), match=r"^lsn must be "):
            await wal.wait_durable(bad)


# -- time -------------------------------------------------------------------------


async def test_a_clock_that_jumps_back_leaves_timestamps_that_never_decrease(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async def append(wal: trio_wal.WriteAheadLog, offset_seconds: int) -> None:
        files.clock_offset_us = offset_seconds * 1_000_000
        await wal.append(bytes(400))

    async with open_memory(files, segment_size=SMALL_SEGMENT) as wal:
        for offset in (0, 10, -3600, -7200, 5, 20, -100):
            await append(wal, offset)
        for _ in range(60):  # over the ends of some segments
            await append(wal, -(10**6))
        assert wal.statistics().segments > 2
    async with open_memory(files, segment_size=SMALL_SEGMENT) as wal:
        await append(wal, -(10**8))
        await wal.truncate_after(wal.last_lsn - 1)
        await append(wal, -(10**8))
        async with wal.read() as records:
            times = [record.timestamp.timestamp() async for record in records]
        start = times[0]
        assert times == sorted(times)
        assert [time - start for time in times[:7]] == [0, 10, 10, 10, 10, 20, 20]
        assert set(times[7:]) == {start + 20}
        assert len(times) == 7 + 60 + 1


async def test_a_timestamp_is_the_time_of_the_batch_in_utc(
    files: MemoryFiles, mock_clock: MockClock
) -> None:
    async with open_memory(files) as wal:
        await wal.append(b"one")
        mock_clock.jump(90)
        await wal.append_many([b"two", b"three"])
        async with wal.read() as records:
            found = [record.timestamp async for record in records]
    assert [f"{time:%Y-%m-%d %H:%M:%S %Z}" for time in found] == [
        "2023-11-14 22:13:20 UTC",
        "2023-11-14 22:14:50 UTC",
        "2023-11-14 22:14:50 UTC",
    ]


# -- compression ------------------------------------------------------------------


async def test_a_zstd_log_is_smaller_and_reads_the_same(disk: Disk) -> None:
    pytest.importorskip("zstandard", reason="the zstd extra is not installed")
    given = {n: b"the same words again and again %d " % n * 20 for n in range(1, 101)}
    async with disk.open(compression="zstd", segment_size=SMALL_SEGMENT) as wal:
        for data in list(given.values())[:50]:
            await wal.append(data)
        await wal.append_many(list(given.values())[50:])
        await wal.append(b"")  # what compression does not make smaller
        assert await read_all(wal) == {**given, 101: b""}
        await wal.truncate_after(75)  # in the middle of a compressed frame
        assert wal.statistics().segments > 1
    async with disk.open() as wal:
        assert await read_all(wal) == {n: d for n, d in given.items() if n <= 75}
        assert await wal.append(b"goes on, compressed " * 100) == 76
    async with disk.open(compression="zstd") as wal:
        assert wal.last_lsn == 76


async def test_compression_takes_less_of_the_disk(files: MemoryFiles) -> None:
    pytest.importorskip("zstandard", reason="the zstd extra is not installed")
    data = [b"the same words again and again" * 20] * 1000
    used = {}
    for compression in ("none", "zstd"):
        path = f"/{compression}"
        async with trio_wal.open_wal(path, files=files, compression=compression) as wal:
            await wal.append_many(data)
            await wal.truncate_before(1)
        name = f"wal-{1:020d}.log"
        used[compression] = len(files.read_file(path, name).rstrip(b"\0"))
    assert used["zstd"] * 10 < used["none"]


@pytest.mark.parametrize(("made", "asked"), [("none", "zstd"), ("zstd", "none"), (None, "zstd")])
async def test_asking_for_another_compression_than_the_log_has_is_refused(
    files: MemoryFiles, made: str | None, asked: str
) -> None:
    pytest.importorskip("zstandard", reason="the zstd extra is not installed")
    async with open_memory(files, compression=made) as wal:
        await wal.append(b"one")
    before = files.contents(LOG)
    with pytest.raises(
        ValueError,
        match=rf"^compression must be what the log was created with, not '{asked}'$",
    ):
        async with open_memory(files, compression=asked):
            pass
    assert files.contents(LOG) == before
    async with open_memory(files, compression=made) as wal:
        assert await read_all(wal) == {1: b"one"}


async def test_zstd_without_zstandard_says_what_to_install(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(ModuleNotFoundError, match=r"^a log with zstd .* 'trio-wal\[zstd\]'$"):
        open_memory(files, compression="zstd")
    assert not files.exists(LOG)


# -- threads ----------------------------------------------------------------------


async def test_an_exhausted_default_thread_limiter_does_not_starve_the_log(
    tmp_path: Path,
) -> None:
    limiter = trio.to_thread.current_default_thread_limiter()
    leave = threading.Event()

    async def occupy() -> None:
        await trio.to_thread.run_sync(leave.wait)

    async with trio.open_nursery() as nursery:
        try:
            for _ in range(int(limiter.total_tokens) + 5):
                nursery.start_soon(occupy)
            await wait_all_tasks_blocked()
            assert limiter.statistics().tasks_waiting == 5
            async with trio_wal.open_wal(tmp_path / "log", segment_size=SMALL_SEGMENT) as wal:
                await append_until(wal, lambda: wal.statistics().segments > 3)
                assert len(await read_all(wal)) == wal.last_lsn
                await wal.truncate_before(wal.last_lsn)
                assert wal.first_lsn > 1
            assert limiter.available_tokens == 0
        finally:
            leave.set()


# -- followers and the close --------------------------------------------------------------


async def test_a_close_does_not_wait_for_a_follower_that_is_behind_and_it_is_told(
    files: MemoryFiles,
) -> None:
    """It has what was read from the disk before; that there is more, it must know."""
    async with open_memory(files) as wal:
        await wal.append_many([b"1", b"2", b"3"])
        stream = wal.follow()
        records = await stream.__aenter__()
        assert (await records.__anext__()).lsn == 1
        await wal.append_many([b"4", b"5"])
    assert [(await records.__anext__()).lsn for _ in range(2)] == [2, 3]
    with pytest.raises(trio.ClosedResourceError):
        await records.__anext__()
    await stream.__aexit__(None, None, None)


@pytest.mark.parametrize("parked", [True, False])
async def test_a_close_ends_a_follower_that_has_had_everything(
    files: MemoryFiles, parked: bool
) -> None:
    given: list[int] = []

    async def follow() -> None:
        async with wal.follow() as records:
            async for record in records:
                given.append(record.lsn)
                if record.lsn == 3 and not parked:
                    await go_on.wait()

    go_on = trio.Event()
    async with trio.open_nursery() as nursery:
        async with open_memory(files) as wal:
            await wal.append_many([b"1", b"2", b"3"])
            nursery.start_soon(follow)
            await wait_all_tasks_blocked()
        go_on.set()
    assert given == [1, 2, 3]
