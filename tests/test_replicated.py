"""A replicated log: takeovers, lost answers, full servers, what is dropped, followers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import attrs
import pytest
import trio
from cas import CasServers, Faults, MemoryCas, open_wal_on_cas, source_on
from helpers import Call, read_all
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal._caslog import Conflict, Entry, Full, Gone, Unsure
from trio_wal._disk.frame import FrameError
from trio_wal._messages import (
    Ident,
    Mark,
    decode_frame,
    decode_mark,
    encode_mark,
    epoch_ident,
    parse_ident,
)
from trio_wal._replicated import ReplicatedOptions
from trio_wal._stream import new_record_stream
from trio_wal._streamlog import End
from trio_wal._takeover import find_first


@pytest.fixture
def servers() -> CasServers:
    return CasServers()


async def all_of(source: Any, start: Any = None) -> dict[int, bytes]:
    async with new_record_stream(source, start, None, follow=False) as records:
        return {record.lsn: record.data async for record in records}


def answering(
    way: MemoryCas, *answers: Callable[[int, Sequence[bytes], str], object]
) -> list[tuple[int, str]]:
    """Have the next appends come to this; gives what is asked."""
    asked: list[tuple[int, str]] = []
    left = list(answers)
    original = way.append

    async def append(after: int, pieces: Sequence[bytes], ident: str) -> int:
        asked.append((after, ident))
        if not left:
            return await original(after, pieces, ident)
        await trio.lowlevel.checkpoint()
        left.pop(0)(after, pieces, ident)
        raise AssertionError("an answer raises")

    way.append = append  # type: ignore[method-assign]
    return asked


def lost(after: int, pieces: Sequence[bytes], ident: str) -> None:
    raise Unsure("no answer")


# -- reading ------------------------------------------------------------------------------


async def test_what_a_majority_has_said_of_a_message_is_not_asked_again(
    servers: CasServers,
) -> None:
    async with open_wal_on_cas(servers) as wal:
        await wal.append(b"one")
        way = MemoryCas(servers)
        asked: list[int] = []
        original = way.ident_at

        async def ident_at(position: int) -> str | None:
            asked.append(position)
            return await original(position)

        way.ident_at = ident_at  # type: ignore[method-assign]
        source = source_on(way)
        await source.refresh()
        await wal.append(b"two")
        await source.refresh()
        assert await all_of(source) == {1: b"one", 2: b"two"}
        assert asked.count(servers.last) == 1


# -- takeovers ----------------------------------------------------------------------------


async def test_a_second_open_takes_over_and_the_first_is_fenced(servers: CasServers) -> None:
    async with open_wal_on_cas(servers) as first:
        assert await first.append(b"one") == 1
        async with open_wal_on_cas(servers) as second:
            assert second.epoch > first.epoch
            assert await read_all(second) == {1: b"one"}
            assert await second.append(b"two") == 2
            with pytest.raises(trio_wal.LogFencedError) as caught:
                await first.append(b"never")
            assert caught.value.outcome == "not written"
            assert caught.value.epoch == second.epoch
            assert "process" in caught.value.owner
            with pytest.raises(trio_wal.LogFencedError) as caught:
                await first.flush()
            assert caught.value.outcome == "not written"
            # What was durable can be read all the same.
            assert await read_all(first) == {1: b"one"}
        assert first.statistics().state == "failed"
    async with open_wal_on_cas(servers) as third:
        assert await read_all(third) == {1: b"one", 2: b"two"}
        assert third.recovery.clean_shutdown


async def test_whoever_asks_first_does_not_disturb_an_owner(servers: CasServers) -> None:
    polite = ReplicatedOptions(takeover=False)
    async with open_wal_on_cas(servers) as wal:
        with pytest.raises(
            trio_wal.LogLockedError, match="the log is open in process 17"
        ) as caught:
            async with open_wal_on_cas(servers, replication=polite):
                pytest.fail("opened")
        assert caught.value.owner == "process 17"
        assert await wal.append(b"one") == 1
    async with open_wal_on_cas(servers, replication=polite) as wal:
        assert wal.last_lsn == 1


async def test_an_owner_that_was_killed_is_not_called_closed(servers: CasServers) -> None:
    way = MemoryCas(servers)
    options = ReplicatedOptions(unavailable_after=0.0)
    async with open_wal_on_cas(way, replication=options) as wal:
        await wal.append(b"one")
        answering(way, lost)
        with pytest.raises(trio_wal.LogUnavailableError):
            await wal.append(b"two")
    async with open_wal_on_cas(servers) as wal:
        assert not wal.recovery.clean_shutdown
        assert (wal.recovery.last_lsn, wal.recovery.torn_bytes) == (1, 0)


async def test_an_opener_reads_nothing_before_its_epoch_has_begun(servers: CasServers) -> None:
    """Else it would starve beside a writer that never pauses."""
    for _ in range(3):
        async with open_wal_on_cas(servers) as wal:
            await wal.append(b"record")
    way = MemoryCas(servers)
    calls: list[str] = []
    for name in ("read", "ident_at", "describe", "last"):
        original = getattr(way, name)

        def noted(*args: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*args)

        setattr(way, name, noted)

    def conflict(after: int, pieces: Sequence[bytes], ident: str) -> None:
        assert calls == []
        servers.append(servers.last, [b"x"], f"1.{1:016x}.1.1.1.1.{servers.uuid.hex}")
        del servers.entries[-1]
        raise Conflict(servers.last)

    answering(way, conflict, conflict)
    async with open_wal_on_cas(way) as wal:
        assert wal.last_lsn == 3


@pytest.mark.parametrize("kept", ["all", "from its epoch on", "none"])
async def test_an_open_that_is_overtaken_is_fenced(servers: CasServers, kept: str) -> None:
    way = MemoryCas(servers)
    original, epoch = way.read, 0

    async def read(position: int, max_bytes: int) -> list[Entry]:
        nonlocal epoch
        way.read = original  # type: ignore[method-assign]
        epoch = servers.last
        async with open_wal_on_cas(servers):
            pass
        if kept != "all":
            servers.drop_before(epoch if kept == "from its epoch on" else epoch + 1)
        return await original(position, max_bytes)

    async with open_wal_on_cas(servers) as wal:
        await wal.append(b"record")
    way.read = read  # type: ignore[method-assign]
    with pytest.raises(trio_wal.LogFencedError) as caught:
        async with open_wal_on_cas(way):
            pytest.fail("opened")
    assert caught.value.epoch > epoch > 0
    assert way.closed


# -- answers that never came ------------------------------------------------------------------


async def test_a_batch_whose_answer_was_lost_is_found_by_its_name(
    servers: CasServers, autojump_clock: MockClock
) -> None:
    way = MemoryCas(servers)
    async with open_wal_on_cas(way) as wal:

        def landed(after: int, pieces: Sequence[bytes], ident: str) -> None:
            servers.append(after, pieces, ident)
            raise Unsure("the answer was lost")

        asked = answering(way, landed)
        assert await wal.append(b"one") == 1
        assert asked == [asked[0]] * 2, "the very same"
        assert wal.statistics().resolved == 1
        assert await wal.append(b"two") == 2
    async with open_wal_on_cas(servers) as wal:
        assert await read_all(wal) == {1: b"one", 2: b"two"}


async def test_a_refusal_from_a_server_that_is_behind_proves_nothing(
    servers: CasServers, autojump_clock: MockClock
) -> None:
    way = MemoryCas(servers)
    async with open_wal_on_cas(way) as wal:

        def behind(after: int, pieces: Sequence[bytes], ident: str) -> None:
            raise Conflict(0)

        answering(way, behind, behind)
        assert await wal.append(b"one") == 1
        assert wal.statistics().resolved == 0


async def test_without_a_majority_the_batch_in_flight_is_unknown_and_the_rest_not_written(
    servers: CasServers, autojump_clock: MockClock
) -> None:
    way = MemoryCas(servers)
    async with open_wal_on_cas(way, replication=ReplicatedOptions(unavailable_after=5)) as wal:
        await wal.append(b"one")
        way.cut = True
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            flying = Call(nursery, wal.append, b"two")
            await trio.sleep(1)
            assert (wal.statistics().unsettled_seconds or 0) > 0.5
            queued = Call(nursery, wal.append, b"three")
            flying.scope.cancel()
        assert 5 <= trio.current_time() - started <= 8
        assert isinstance(flying.error, trio_wal.LogUnavailableError)
        assert isinstance(queued.error, trio_wal.LogUnavailableError)
        assert flying.error.outcome == "unknown"
        assert queued.error.outcome == "not written"
        assert way.rotations >= 1
        assert wal.statistics().rotations == way.rotations


async def test_what_comes_late_is_refused(servers: CasServers, autojump_clock: MockClock) -> None:
    way = MemoryCas(servers)
    kept: list[tuple[int, Sequence[bytes], str]] = []

    def kept_back(*request: Any) -> None:
        kept.append(request)
        raise Unsure("no answer")

    async with open_wal_on_cas(way) as wal:
        answering(way, kept_back)
        assert await wal.append(b"one") == 1
        servers.append_late(*kept[0])
        assert await wal.append(b"two") == 2
        servers.append_late(*kept[0])
    async with open_wal_on_cas(servers) as wal:
        assert await read_all(wal) == {1: b"one", 2: b"two"}


async def test_without_permission_the_end_is_at_once(servers: CasServers) -> None:
    async with open_wal_on_cas(servers) as wal:
        servers.denied = True
        with pytest.raises(trio_wal.LogFailedError) as caught:
            await wal.append(b"one")
        assert caught.value.outcome == "not written"
        assert isinstance(caught.value.__cause__, trio_wal.LogFailedError)
        assert isinstance(caught.value.__cause__.__cause__, PermissionError)
    with pytest.raises(PermissionError):
        async with open_wal_on_cas(servers):
            pytest.fail("opened")


async def test_where_messages_are_dropped_one_replica_is_not_believed(servers: CasServers) -> None:
    """One that is astray has an epoch where a former owner's record stands: the search for what
    comes before it goes past it."""
    async with open_wal_on_cas(servers) as wal:
        for number in range(1, 7):
            assert await wal.append(b"%d" % number) == number
    place = next(
        entry.position
        for entry in servers.entries
        if (ident := parse_ident(entry.ident, servers.uuid)) is not None and ident.last_lsn == 3
    )
    way = MemoryCas(servers)
    read = way.read
    astray = True

    async def read_astray(position: int, max_bytes: int) -> list[Entry]:
        entries = await read(position, max_bytes)
        if astray and position == place:
            entries[0] = replace(entries[0], ident=epoch_ident("1" * 16, servers.uuid))
        return entries

    async with open_wal_on_cas(way) as wal:
        way.read = read_astray  # type: ignore[method-assign]
        with pytest.raises(trio_wal.CorruptLogError, match="LSN 4 stands where LSN 3 should"):
            await wal.truncate_before(3)
        assert wal.first_lsn == 1
        astray = False
        await wal.truncate_before(3)
        assert wal.first_lsn == 3
        assert list(await read_all(wal)) == [3, 4, 5, 6]


async def test_a_full_log_is_made_room_in_by_truncating(
    servers: CasServers, autojump_clock: MockClock
) -> None:
    async with open_wal_on_cas(servers) as wal:
        for _ in range(5):
            await wal.append(bytes(1000))
        servers.bytes_max = servers.bytes
        with pytest.raises(trio_wal.LogFullError):
            await wal.append(bytes(1000))
        assert wal.statistics().state == "full"
        await wal.truncate_before(5)
        await trio.sleep(1)
        assert await wal.append(bytes(1000)) == 6
        assert wal.first_lsn == 5
    async with open_wal_on_cas(servers) as wal:
        assert list(await read_all(wal)) == [5, 6]


@pytest.mark.parametrize("older", [True, False])
async def test_a_full_log_that_is_made_room_in_remembers_its_epochs(
    servers: CasServers, autojump_clock: MockClock, older: bool
) -> None:
    """As long as it has room for a mark when what stands before its last one is dropped; else from
    the next one on."""
    async with open_wal_on_cas(servers) as wal:
        await wal.append(b"old")
        seen = wal.bookmark
    way = MemoryCas(servers)
    drop, marked = way.drop_before, []

    async def dropping(position: int) -> None:
        await drop(position)
        named = parse_ident(servers.entries[-1].ident, servers.uuid)
        assert named is not None
        marked.append(named.mark >= servers.first)

    async with open_wal_on_cas(way) as wal:
        if not older:
            await wal.truncate_before(2)
        way.drop_before = dropping  # type: ignore[method-assign]
        for _ in range(5):
            await wal.append(bytes(1000))
        servers.bytes_max = servers.bytes
        await wal.truncate_before(5)
        assert wal.first_lsn == 5
        assert all(marked) is older
        servers.crash()
        async with open_wal_on_cas(servers) as heir:
            with pytest.raises(trio_wal.LsnTruncatedError) as caught:
                async with heir.read(seen):
                    pass
            assert type(caught.value) is trio_wal.LsnTruncatedError


async def test_a_full_log_of_which_somebody_else_has_dropped_more_is_left_alone(
    servers: CasServers, autojump_clock: MockClock
) -> None:
    way = MemoryCas(servers)

    def full(after: int, pieces: Sequence[bytes], ident: str) -> object:
        servers.drop_before(servers.last + 1)
        raise Full("maximum bytes exceeded")

    async with open_wal_on_cas(way) as wal:
        for _ in range(5):
            await wal.append(bytes(10))
        await wal.truncate_before(2)
        await wal.append(bytes(10))
        asked = answering(way, full, full)
        await wal.truncate_before(6)
        assert len(asked) == 2
        assert await wal.append(b"next") == 7


# -- what is dropped, and what is known all the same ----------------------------------------------


async def test_an_emptied_log_knows_its_next_lsn_and_its_history(servers: CasServers) -> None:
    epochs = []
    for _ in range(3):
        async with open_wal_on_cas(servers) as wal:
            await wal.append(b"record")
            epochs.append(wal.bookmark)
    async with open_wal_on_cas(servers) as wal:
        await wal.truncate_before(4)
        assert (wal.first_lsn, wal.last_lsn) == (4, 3)
    assert len(servers.entries) <= 2
    async with open_wal_on_cas(servers) as wal:
        assert (wal.first_lsn, wal.last_lsn) == (4, 3)
        assert await wal.append(b"next") == 4
        # A consumer that had everything goes on, whatever was dropped.
        async with wal.read(epochs[-1]) as records:
            assert [record.data async for record in records] == [b"next"]
        with pytest.raises(trio_wal.LsnTruncatedError):
            async with wal.read(epochs[0]):
                pass


@pytest.mark.parametrize("seed", range(5))
async def test_any_record_is_found_wherever_reading_begins(servers: CasServers, seed: int) -> None:
    rng = random.Random(seed)
    servers.message_bytes_max = 100
    expected: dict[int, bytes] = {}
    for _ in range(4):
        async with open_wal_on_cas(servers) as wal:
            for _ in range(rng.randrange(8)):
                data = [bytes(rng.choice((0, 10, 300)))] * rng.choice((1, 1, 4))
                lsns = await wal.append_many(data)
                expected.update(zip(lsns, data, strict=True))
    async with open_wal_on_cas(servers) as wal:
        source = source_on(MemoryCas(servers))
        await source.refresh()
        for lsn in expected:
            tail = {number: data for number, data in expected.items() if number >= lsn}
            assert await read_all(wal, lsn) == tail
            assert await all_of(source, lsn) == tail


async def test_retention_drops_virtual_segments(
    servers: CasServers, autojump_clock: MockClock
) -> None:
    options = ReplicatedOptions(segment_size=1000, retention=trio_wal.KeepSegments(2))
    async with open_wal_on_cas(servers, replication=options) as wal:
        for _ in range(20):
            await wal.append(bytes(400))
            await trio.sleep(0.1)
        assert wal.last_lsn - 4 <= wal.first_lsn <= wal.last_lsn
        assert wal.statistics().segments == 2
        held = wal.first_lsn
    async with open_wal_on_cas(servers) as wal:
        assert wal.first_lsn == held


# -- readers on other machines --------------------------------------------------------------


async def test_a_follower_goes_on_through_takeovers(servers: CasServers) -> None:
    source = source_on(MemoryCas(servers))
    found: list[bytes] = []

    async def follow() -> None:
        async with new_record_stream(source, None, None, follow=True) as records:
            async for record in records:
                found.append(record.data)  # noqa: PERF401  (while it goes on)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        for number in range(4):
            async with open_wal_on_cas(servers) as wal:
                await wal.append(b"%d" % number)
                await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert found == [b"0", b"1", b"2", b"3"]


@pytest.mark.parametrize("what", ["data", "uuid", "foreign", "missing"])
async def test_damage_is_told_and_nothing_after_it_is_given(
    servers: CasServers, what: str, autojump_clock: MockClock
) -> None:
    async with open_wal_on_cas(servers) as wal:
        for number in range(5):
            await wal.append(b"%d" % number)
    place = 4
    entry = servers.entries[place]
    if what == "data":
        data = bytearray(entry.data)
        data[-1] ^= 1
        servers.entries[place] = replace(entry, data=bytes(data))
    elif what == "uuid":
        servers.entries[place] = replace(entry, ident=entry.ident[:-1] + "x")
    elif what == "foreign":
        servers.entries[place] = replace(entry, ident="")
    else:
        servers.entries[place] = replace(servers.entries[place + 1], position=entry.position)
    found: list[int] = []

    async def read() -> None:
        source = source_on(MemoryCas(servers))
        async with new_record_stream(source, None, None, follow=False) as records:
            async for record in records:
                found.append(record.lsn)  # noqa: PERF401  (also where it ends in an error)

    with pytest.raises(trio_wal.CorruptLogError) as caught:
        await read()
    assert found in ([1], [1, 2])
    assert caught.value.path == servers.name
    assert caught.value.offset >= place


# -- messages -----------------------------------------------------------------------------


def test_names_and_marks_take_hostile_bytes(servers: CasServers) -> None:
    rng = random.Random(1)
    mark = Mark(((trio_wal._identity.Parting(3, 7)),), closed=True)
    frame = encode_mark(mark, position=9, seed=5, next_lsn=8, time_us=0, previous=4)
    assert decode_mark(decode_frame(frame.data, 9, 5)) == mark
    for _ in range(500):
        data = bytearray(frame.data)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with pytest.raises(FrameError):
            decode_frame(bytes(data), 9, 5)
    ident = str(Ident(3, "0" * 16, 1, 1, 7, 3, servers.uuid))
    assert str(parse_ident(ident, servers.uuid)) == ident
    for text in (
        "",
        "E.",
        ident + "\n",
        ident[:-1],
        "-1" + ident,
        ident.replace("3.", "\u00b3.", 1),
    ):
        with pytest.raises(FrameError):
            parse_ident(text, servers.uuid)


# -- histories ----------------------------------------------------------------------------


def test_a_share_of_the_campaign_finds_nothing(tmp_path: Any) -> None:
    from campaigns import __main__ as campaigns

    assert campaigns.main(["replication", "--count", "300", "--workers", "1"]) == 0


def test_what_each_fault_is_for_happens() -> None:
    """A campaign whose faults do nothing would find nothing."""
    from campaigns.replication import run_some

    figures = run_some(range(200)).rows[""]
    for name in ("acknowledged", "cancelled", "fenced", "unknown", "landed", "resolved", "read"):
        assert figures[name] > 0, name
    assert attrs.asdict(Faults())


class PurgedLog:
    """Which is purged whenever somebody looks where it begins."""

    name = "log"

    def __init__(self, *firsts: int) -> None:
        self._firsts = list(firsts)

    async def first_lsn(self, first: int, _: End) -> int:
        await trio.lowlevel.checkpoint()
        if self._firsts and first < self._firsts[0]:
            raise Gone(self._firsts.pop(0))
        return 100 + first


async def test_a_log_that_is_purged_while_it_is_opened_is_opened() -> None:
    end = End(position=9, chain=0, last_lsn=109, history=())
    assert await find_first(cast(Any, PurgedLog(3, 5, 9)), 1, end) == (9, 109)
    with pytest.raises(trio_wal.LogFencedError):
        await find_first(cast(Any, PurgedLog(3, 10)), 1, end)
