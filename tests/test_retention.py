"""Retention: which segments a policy lets go, and what a live log does with the answer."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence

import attrs
import pytest
import trio
from helpers import SMALL_SEGMENT, Disk, append_until, open_memory, read_all, until
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal import KeepAll, KeepBytes, KeepFor, KeepSegments, Retention
from trio_wal._disk.spares import PREPARE_FROM
from trio_wal.testing import MemoryFiles

SECOND = 1_000_000


@attrs.frozen
class Segment:
    bytes: int
    last_time_us: int


def segments(*pairs: tuple[int, int]) -> list[Segment]:
    """(bytes, seconds) of sealed segments, oldest first."""
    return [Segment(size, seconds * SECOND) for size, seconds in pairs]


SEALED = segments((100, 10), (200, 20), (300, 30), (400, 40))

# -- the policies alone -----------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (KeepAll(), 0),
        # Four are sealed, and one is being written.
        (KeepSegments(1), 4),
        (KeepSegments(2), 3),
        (KeepSegments(4), 1),
        (KeepSegments(5), 0),
        (KeepSegments(6), 0),
        # The one being written has 50 bytes.
        (KeepBytes(0), 4),
        (KeepBytes(50), 4),
        (KeepBytes(51), 3),
        (KeepBytes(450), 3),
        (KeepBytes(451), 2),
        (KeepBytes(950), 1),
        (KeepBytes(951), 0),
        (KeepBytes(10**9), 0),
        # It is second 45.
        (KeepFor(0), 4),
        (KeepFor(4), 4),
        (KeepFor(5), 3),
        (KeepFor(5.000001), 3),
        (KeepFor(34), 1),
        (KeepFor(35), 0),
        (KeepFor(1e6), 0),
        # & keeps what both keep, | what either keeps.
        (KeepSegments(3) & KeepBytes(451), 2),
        (KeepSegments(2) & KeepBytes(451), 3),
        (KeepSegments(2) | KeepBytes(451), 2),
        (KeepAll() & KeepSegments(2), 3),
        (KeepAll() | KeepSegments(2), 0),
        ((KeepFor(5) | KeepSegments(3)) & KeepBytes(50), 4),
        (KeepFor(5) | (KeepSegments(3) & KeepBytes(50)), 3),
    ],
    ids=str,
)
def test_how_many_of_four_segments_are_droppable(policy: Retention, expected: int) -> None:
    assert policy.droppable(SEALED, 50, 45 * SECOND) == expected
    assert policy.droppable([], 50, 45 * SECOND) == 0


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (KeepAll(), None),
        (KeepSegments(1), None),
        (KeepBytes(1), None),
        (KeepFor(7), 17 * SECOND + 1),
        (KeepFor(7) & KeepFor(3), 13 * SECOND + 1),
        (KeepFor(7) | KeepSegments(3), 17 * SECOND + 1),
        (KeepAll() & KeepSegments(1), None),
    ],
    ids=str,
)
def test_when_time_alone_makes_a_segment_droppable(policy: Retention, expected: int | None) -> None:
    assert policy.next_change_us(SEALED) == expected
    assert policy.next_change_us([]) is None
    if isinstance(policy, KeepFor):
        assert expected is not None
        assert policy.droppable(SEALED, 50, expected - 1) == 0
        assert policy.droppable(SEALED, 50, expected) == 1


def test_an_old_segment_behind_a_young_one_stays() -> None:
    """Only a beginning of the log can go."""
    sealed = segments((1, 10), (1, 100), (1, 20))
    assert KeepFor(50).droppable(sealed, 1, 100 * SECOND) == 1


def test_policies_are_values() -> None:
    assert KeepSegments(3) == KeepSegments(3) != KeepSegments(4)
    assert KeepSegments(3) & KeepFor(1) == KeepSegments(3) & KeepFor(1)
    assert KeepSegments(3) & KeepFor(1) != KeepSegments(3) | KeepFor(1)
    assert len({KeepAll(), KeepAll(), KeepBytes(1), KeepBytes(1)}) == 2


@pytest.mark.parametrize("other", [3, None, "KeepAll()", object])
def test_a_policy_combines_only_with_policies(other: object) -> None:
    with pytest.raises(TypeError, match=r"^unsupported operand type\(s\) for &: "):
        KeepAll() & other
    with pytest.raises(TypeError, match=r"^unsupported operand type\(s\) for \|: "):
        KeepAll() | other


@pytest.mark.parametrize(
    ("make", "value", "error", "message"),
    [
        (KeepSegments, 0, ValueError, r"^count must be at least 1, not 0$"),
        (KeepSegments, 1.0, TypeError, r"^count must be an int, not float$"),
        (KeepSegments, True, TypeError, r"^count must be an int, not bool$"),
        (KeepSegments, None, TypeError, r"^count must be an int, not NoneType$"),
        (KeepBytes, -1, ValueError, r"^count must be at least 0, not -1$"),
        (KeepBytes, "1", TypeError, r"^count must be an int, not str$"),
        (
            KeepFor,
            -1,
            ValueError,
            r"^seconds must be at least 0 and .*, not -1$",
        ),
        (
            KeepFor,
            float("inf"),
            ValueError,
            r"^seconds must be at least 0 and at most 1e\+10 ",
        ),
        (
            KeepFor,
            float("nan"),
            ValueError,
            r"^seconds must be at least 0 and at most 1e\+10 ",
        ),
        (KeepFor, "1", TypeError, r"^seconds must be a number of seconds, not str$"),
    ],
)
def test_a_policy_checks_its_argument(
    make: type, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(value)


# -- in a live log ----------------------------------------------------------------


async def fill(wal: trio_wal.WriteAheadLog, batches: int, data: bytes = bytes(400)) -> None:
    """Write batches of which some twenty fill a segment."""
    for _ in range(batches):
        await wal.append(data)
        await trio.testing.wait_all_tasks_blocked()


async def test_a_log_without_retention_keeps_everything(files: MemoryFiles) -> None:
    for retention in (None, KeepAll()):
        async with open_memory(files, segment_size=SMALL_SEGMENT, retention=retention) as wal:
            await fill(wal, 60)
            assert wal.first_lsn == 1
    assert wal.statistics().segments > 5


async def test_keep_segments_in_a_live_log(files: MemoryFiles) -> None:
    # So large that it takes some batches until the next segment is prepared.
    size = 4 * SMALL_SEGMENT
    async with open_memory(files, segment_size=size, retention=KeepSegments(3)) as wal:
        counts = []
        for _ in range(150):
            await fill(wal, 1, bytes(2000))
            counts.append(wal.statistics().segments)
        assert counts == sorted(counts)
        assert set(counts) == {1, 2, 3}
        assert wal.first_lsn > 1
        found = await read_all(wal)
        assert list(found) == list(range(wal.first_lsn, 151))
    async with open_memory(files, segment_size=SMALL_SEGMENT) as again:
        assert again.first_lsn == wal.first_lsn
        assert await read_all(again) == found


async def test_keep_bytes_in_a_live_log(files: MemoryFiles) -> None:
    count = 3 * SMALL_SEGMENT
    async with open_memory(files, segment_size=SMALL_SEGMENT, retention=KeepBytes(count)) as wal:
        for _ in range(150):
            await fill(wal, 1)
            sealed = sum(segment.bytes for segment in wal._log.engine._directory.sealed())
            used = sealed + wal._log.engine._directory.active.position.offset
            if wal.first_lsn > 1:
                assert count <= used <= count + 2 * SMALL_SEGMENT
        assert wal.first_lsn > 1


async def test_keep_for_drops_by_the_clock_alone(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    async with open_memory(files, segment_size=SMALL_SEGMENT, retention=KeepFor(100)) as wal:
        await append_until(wal, lambda: wal.statistics().segments == 3)
        first_part = wal._log.engine._directory.sealed()[-1].next_lsn
        await trio.sleep(50)
        await append_until(wal, lambda: wal.statistics().segments == 5)
        second_part = wal._log.engine._directory.sealed()[-1].next_lsn
        assert wal.first_lsn == 1
        # Nobody writes any more.
        await trio.sleep(49)
        assert wal.first_lsn == 1
        await trio.sleep(2)
        assert 1 < wal.first_lsn <= first_part
        assert await read_all(wal)
        await trio.sleep(1000)
        # The one that is being written is never dropped.
        assert wal.first_lsn == second_part
        assert wal.statistics().segments == 1
        assert await wal.append(b"next") == wal.last_lsn


async def test_keep_for_keeps_every_record_for_that_long(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    written: dict[int, float] = {}
    async with open_memory(files, segment_size=SMALL_SEGMENT, retention=KeepFor(30)) as wal:
        for _ in range(200):
            written[await wal.append(bytes(400))] = trio.current_time()
            await trio.sleep(0.7)
            young = [lsn for lsn, at in written.items() if at >= trio.current_time() - 30]
            assert wal.first_lsn <= young[0]
        assert wal.first_lsn > 100


async def test_retention_is_applied_when_the_log_is_opened(disk: Disk) -> None:
    async with disk.open(segment_size=SMALL_SEGMENT) as wal:
        await append_until(wal, lambda: wal.statistics().segments == 6)
        last = wal.last_lsn
    async with disk.open(segment_size=SMALL_SEGMENT, retention=KeepSegments(2)) as wal:
        await until(lambda: wal.statistics().segments == 2)
        assert wal.first_lsn > 1
        assert list(await read_all(wal)) == list(range(wal.first_lsn, last + 1))


async def test_both_policies_of_an_and_must_want_to_keep(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    retention = KeepSegments(4) & KeepFor(60)
    async with open_memory(files, segment_size=SMALL_SEGMENT, retention=retention) as wal:
        await fill(wal, 150)
        assert wal.statistics().segments == 4
        await trio.sleep(100)
        assert wal.statistics().segments == 1


async def test_one_policy_of_an_or_is_enough_to_keep(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    retention = KeepSegments(4) | KeepFor(60)
    async with open_memory(files, segment_size=SMALL_SEGMENT, retention=retention) as wal:
        await fill(wal, 150)
        assert wal.first_lsn == 1
        await trio.sleep(100)
        assert wal.statistics().segments == 4


async def test_a_drop_that_fails_is_logged_and_tried_again(
    files: MemoryFiles, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_memory(files, segment_size=SMALL_SEGMENT, retention=KeepSegments(1)) as wal:
        files.fail("rename", errno.EIO, after=1)  # the first is that of the new segment
        await append_until(wal, lambda: wal.statistics().segments == 2)
        await wait_all_tasks_blocked()
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage().startswith("/log: retention failed, will try again: OSError(5, ")
        assert wal.first_lsn == 1
        await trio.sleep(2)
        assert wal.first_lsn > 1
        assert wal.statistics().state == "open"
        assert await wal.append(b"goes on") == wal.last_lsn


@attrs.frozen
class Failing(Retention):
    """As files that can never be removed."""

    def droppable(self, sealed: Sequence[object], active_bytes: int, now_us: int) -> int:
        raise OSError(errno.EIO, "no")


async def test_retention_that_fails_does_not_keep_the_next_segment_from_being_prepared(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    async with open_memory(files, segment_size=SMALL_SEGMENT, retention=Failing()) as wal:
        prepared = 0
        for _ in range(100):
            await fill(wal, 1)
            await trio.sleep(2)
            prepared += wal._log.engine._directory.spares.ready is not None
        assert prepared > 50


async def test_the_next_segment_is_prepared_when_a_quarter_of_this_one_is_full(
    files: MemoryFiles, autojump_clock: MockClock
) -> None:
    found: set[tuple[bool, bool]] = set()
    size = 8 * SMALL_SEGMENT
    async with open_memory(files, segment_size=size, retention=KeepSegments(2)) as wal:
        directory = wal._log.engine._directory
        for _ in range(500):
            await fill(wal, 1)
            await trio.sleep(1)
            active = directory.active
            due = active.position.offset > PREPARE_FROM * active.capacity
            found.add((due, directory.spares.ready is not None))
    assert found == {(False, False), (True, True)}


@attrs.frozen
class Odd(Retention):
    """What a user may write: drop all that is sealed."""

    def droppable(self, sealed: Sequence[object], active_bytes: int, now_us: int) -> int:
        return len(sealed)


async def test_a_policy_of_ones_own_is_a_policy(files: MemoryFiles) -> None:
    async with open_memory(files, segment_size=SMALL_SEGMENT, retention=Odd()) as wal:
        await fill(wal, 100)
        assert wal.statistics().segments == 1
        assert wal.last_lsn == 100
    async with open_memory(files) as wal:
        assert 1 < wal.first_lsn <= 101
