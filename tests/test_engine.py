"""The seam: whatever the engine is, a log keeps its promises, and the engine is asked in order.

The first half is what every engine must pass; the second what only one whose failures can be
chosen shows.
"""

from __future__ import annotations

import errno
import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

import nats_cluster
import pytest
import trio
from cas import CasServers, open_wal_on_cas
from engines import MemoryServer, open_database_on, open_wal_on
from helpers import SMALL_SEGMENT, Call, append_until, open_memory, read_all
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal.testing import MemoryFiles


class Files:
    """A log in a directory."""

    replicated = False

    def __init__(self) -> None:
        self._files = MemoryFiles()

    def open(self, **options: Any) -> AbstractAsyncContextManager[Any]:
        return open_memory(self._files, segment_size=SMALL_SEGMENT, **options)

    def hold(self) -> None:
        self._files.hold()

    def release(self) -> None:
        self._files.release()

    def fill(self) -> None:
        self._files.free_bytes = 0

    def make_room(self) -> None:
        self._files.free_bytes = math.inf

    def crash(self, seed: int) -> None:
        self._files = self._files.crash(seed)


class Server:
    """A log on a server in memory."""

    replicated = False

    def __init__(self) -> None:
        self._server = MemoryServer()

    def open(self, **options: Any) -> AbstractAsyncContextManager[Any]:
        return open_wal_on(self._server, **options)

    def hold(self) -> None:
        self._server.hold()

    def release(self) -> None:
        self._server.release()

    def fill(self) -> None:
        self._server.free_bytes = 0

    def make_room(self) -> None:
        self._server.free_bytes = math.inf

    def crash(self, seed: int) -> None:
        self._server.random.seed(seed)
        self._server.crash()


class Replicated:
    """A log that a majority of servers in memory keeps."""

    replicated = True

    def __init__(self) -> None:
        self._servers = CasServers()

    def open(self, **options: Any) -> AbstractAsyncContextManager[Any]:
        return open_wal_on_cas(self._servers, **options)

    def hold(self) -> None:
        self._servers.hold()

    def release(self) -> None:
        self._servers.release()

    def fill(self) -> None:
        self._servers.bytes_max = 0

    def make_room(self) -> None:
        self._servers.bytes_max = math.inf

    def crash(self, seed: int) -> None:
        self._servers.crash()


class Nats:
    """A log on a real server, which is neither stalled nor filled here."""

    replicated = True
    count = 0

    def __init__(self, cluster: nats_cluster.Cluster) -> None:
        self._cluster = cluster
        Nats.count += 1
        self._name = f"contract-{Nats.count}"

    def open(self, **options: Any) -> AbstractAsyncContextManager[Any]:
        where = [f"monitor={url}" for url in self._cluster.monitors]
        url = f"{self._cluster.urls[0]}/{self._name}?replicas=1&{'&'.join(where)}"
        return trio_wal.open_wal(url, **options)


@pytest.fixture(params=[Files, Server, Replicated])
def home(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nats_cluster.Cluster]:
    if (reason := nats_cluster.missing()) is not None:
        pytest.skip(reason)
    with nats_cluster.running(tmp_path_factory.mktemp("nats"), 1, seed=7) as cluster:
        yield cluster


@pytest.fixture(params=[Files, Server, Replicated, Nats])
def any_home(request: pytest.FixtureRequest) -> Any:
    """Also one whose servers are real."""
    if request.param is Nats:
        return Nats(request.getfixturevalue("nats_server"))
    return request.param()


@pytest.fixture(params=[Files, Server])
def own_home(request: pytest.FixtureRequest) -> Any:
    """Not a replicated one: what a majority has is durable, and not taken back."""
    return request.param()


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


LARGE = bytes(3000)
"""A few of these are more than a directory has prepared."""


async def soon(condition: Callable[[], bool]) -> None:
    """A real server takes its time."""
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110  (its news come from elsewhere)
            await trio.sleep(0.001)


# -- every engine -------------------------------------------------------------------------


async def test_what_was_written_is_there_in_every_later_session(any_home: Any) -> None:
    home = any_home
    expected: dict[int, bytes] = {}
    uuids = set()
    for session in range(3):
        async with home.open() as wal:
            uuids.add(wal.uuid)
            assert wal.recovery.clean_shutdown
            assert await read_all(wal) == expected
            first = len(expected) + 1
            assert await wal.append(b"%d one" % session) == first
            assert await wal.append_many([b"two", b"", b"four"]) == range(first + 1, first + 4)
            await wal.send(b"five")
            wal.send_nowait(b"six")
            assert await wal.flush() == wal.durable_lsn == first + 5
            data = [b"%d one" % session, b"two", b"", b"four", b"five", b"six"]
            expected.update(enumerate(data, first))
            assert await read_all(wal) == expected
            assert await read_all(wal, 3, 5) == {3: b"", 4: b"four"}
            assert wal.bookmark == trio_wal.Bookmark(first + 5, wal.epoch)
            # A replicated log begins an epoch at each open, because each open takes it over.
            assert (wal.epoch > 0) is home.replicated
            statistics = wal.statistics()
            assert (statistics.records_appended, statistics.state) == (6, "open")
            assert statistics.durable_lsn == statistics.last_lsn == first + 5
        assert wal.statistics().state == "closed"
    assert len(uuids) == 1


async def test_a_follower_gets_what_comes_and_ends_with_the_log(any_home: Any) -> None:
    home = any_home
    found: dict[int, bytes] = {}

    async def follow(wal: Any) -> None:
        async with wal.follow() as records:
            async for record in records:
                found[record.lsn] = record.data

    async with trio.open_nursery() as nursery, home.open() as wal:
        nursery.start_soon(follow, wal)
        for lsn in range(1, 20):
            await wal.append(b"record")
            await soon(lambda: list(found) == list(range(1, lsn + 1)))  # noqa: B023
        await wal.append_many([b"record"] * 10)
        await soon(lambda: len(found) == 29)
    assert list(found) == list(range(1, 30))


async def test_what_anybody_holds_is_kept_until_all_have_let_go(home: Any) -> None:
    async with home.open() as wal:
        engine = wal._log.engine
        for _ in range(60):
            await wal.append(LARGE)
        engine.hold("archive", 20)
        engine.hold("store", 50)
        await wal.truncate_before(61)
        assert 1 < wal.first_lsn <= 20
        engine.hold("archive", 55)
        await wal.truncate_before(61)
        assert 20 < wal.first_lsn <= 50
        engine.hold("store", None)
        engine.hold("archive", None)
        await wal.truncate_before(61)
        assert wal.first_lsn == 61


async def test_writers_share_any_log(any_home: Any) -> None:
    # The engines of the tests are given what `open_wal` makes of "auto".
    bound: Any = "auto" if isinstance(any_home, (Files, Nats)) else 1_000_000
    async with any_home.open(
        max_queue_size=bound, target_latency=0.005, commit_delay="auto"
    ) as wal:
        assert 16 <= wal.statistics().max_queue_size <= 1_000_000
        async with (
            wal.writer("bulk", max_queue_size=4) as bulk,
            wal.writer("urgent", priority="high") as urgent,
            trio.open_nursery() as nursery,
        ):
            for _ in range(20):
                nursery.start_soon(bulk.append, b"bulk")
                nursery.start_soon(urgent.append, b"urgent")
            await bulk.send(b"bulk")
            await bulk.flush()
        writers = wal.statistics().writers
        assert await wal.append(b"the log's own") == 42
        data = list((await read_all(wal)).values())
        assert (data.count(b"bulk"), data.count(b"urgent")) == (21, 20)
        assert writers == {}
        assert 16 <= wal.statistics().max_queue_size <= 1_000_000


async def test_truncate_before_drops_whole_pieces_and_readers_are_told(any_home: Any) -> None:
    home = any_home
    async with home.open() as wal:
        for _ in range(40):
            await wal.append(LARGE)
        async with wal.read() as records:
            await wal.truncate_before(30)
            first = wal.first_lsn
            assert 1 < first <= 30
            with pytest.raises(trio_wal.LsnTruncatedError) as caught:
                async for _ in records:
                    pass
            assert caught.value.first_lsn == first
        with pytest.raises(trio_wal.LsnTruncatedError):
            await read_all(wal, 1)
        assert list(await read_all(wal)) == list(range(first, 41))
        await wal.truncate_before(41)
        assert (wal.first_lsn, wal.last_lsn) == (41, 40)
        assert await read_all(wal) == {}
        assert await wal.append(b"next") == 41
    async with home.open() as wal:
        assert await read_all(wal) == {41: b"next"}


async def test_rotate_ends_what_can_be_dropped_as_a_whole(any_home: Any) -> None:
    async with any_home.open() as wal:
        assert await wal.rotate() == 0
        assert await wal.append_many([b"one", b"two"]) == range(1, 3)
        await wal.send(b"three")
        assert await wal.rotate() == wal.durable_lsn == 3
        assert await wal.rotate() == 3
        await wal.append(b"four")
        await wal.truncate_before(4)
        with trio.fail_after(60):
            while wal.first_lsn < 4:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert (wal.first_lsn, wal.last_lsn) == (4, 4)
    with pytest.raises(trio.ClosedResourceError):
        await wal.rotate()
    async with any_home.open() as wal:
        assert await read_all(wal) == {4: b"four"}
        assert await wal.rotate() == 4


async def test_a_rotation_that_is_cancelled_in_line_does_nothing(home: Any) -> None:
    async with home.open() as wal:
        await wal.append(b"one")
        home.hold()
        async with trio.open_nursery() as nursery:
            append = Call(nursery, wal.append, b"two")
            await wait_all_tasks_blocked()
            rotate = Call(nursery, wal.rotate)
            await wait_all_tasks_blocked()
            rotate.scope.cancel()
            await wait_all_tasks_blocked()
            assert rotate.state == "cancelled"
            home.release()
        assert append.value == 2
        assert await wal.rotate() == 2


async def test_truncate_after_begins_an_epoch_and_followers_are_told(own_home: Any) -> None:
    home = own_home
    async with home.open() as wal:
        for number in range(1, 11):
            await wal.append(b"old %d" % number)
        end = wal.bookmark
        behind, before = wal.follow(), wal.follow()
        async with behind, before:
            for _ in range(10):
                await behind.__anext__()
            for _ in range(4):
                await before.__anext__()
            await wal.truncate_after(6)
            assert (wal.last_lsn, wal.durable_lsn) == (6, 6)
            assert wal.epoch > end.epoch
            assert await wal.append_many([b"new"] * 9) == range(7, 16)
            with pytest.raises(trio_wal.LogDivergedError) as caught:
                await behind.__anext__()
            assert caught.value.parted_after == 6
            data = [(await before.__anext__()).data for _ in range(4)]
            assert data == [b"old 5", b"old 6", b"new", b"new"]
        with pytest.raises(trio_wal.LogDivergedError):
            async with wal.read(end):
                pass
        epoch = wal.epoch
    async with home.open() as wal:
        assert wal.epoch == epoch
        assert len(await read_all(wal)) == 15
        await wal.truncate_after(15)
        assert wal.epoch == epoch


async def test_a_log_without_room_tells_who_waits_and_keeps_what_was_sent(
    home: Any, autojump_clock: MockClock
) -> None:
    async with home.open() as wal:
        await wal.append(b"before")
        home.fill()
        with pytest.raises(trio_wal.LogFullError):
            await append_until(wal, lambda: False, LARGE)
        given = wal.last_lsn
        assert wal.statistics().state == "full"
        with pytest.raises(trio_wal.LogFullError):
            wal.send_nowait(LARGE)
        waiting = Call(trio.lowlevel.current_task().parent_nursery, wal.append, LARGE)
        await wait_all_tasks_blocked()
        home.make_room()
        await trio.sleep(1)
        assert wal.statistics().state == "open"
        after = given + (waiting.state == "returned")
        assert await wal.append(LARGE) == after + 1
    async with home.open() as wal:
        assert wal.last_lsn == after + 1


async def test_what_was_sent_waits_for_room(home: Any, autojump_clock: MockClock) -> None:
    async with home.open() as wal:
        home.fill()
        for _ in range(30):
            await wal.send(LARGE)
        await trio.sleep(1)
        assert wal.statistics().state == "full"
        home.make_room()
        await trio.sleep(1)
        assert await wal.flush() == 30


async def test_closing_without_room_says_that_what_was_sent_is_lost(
    home: Any, autojump_clock: MockClock
) -> None:
    async def fill_and_close() -> None:
        async with home.open() as wal:
            home.fill()
            for _ in range(30):
                await wal.send(LARGE)

    with pytest.raises(trio_wal.LogFailedError) as caught:
        await fill_and_close()
    cause = caught.value.__cause__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ENOSPC
    home.make_room()
    async with home.open() as wal:
        assert wal.last_lsn < 30


async def test_closing_drains_the_queue(home: Any) -> None:
    async with trio.open_nursery() as nursery:
        async with home.open(max_queue_size=4, flush_interval=1000) as wal:
            home.hold()
            calls = [Call(nursery, wal.append, b"record")]
            await wait_all_tasks_blocked()
            calls += [Call(nursery, wal.append, b"record") for _ in range(2)]
            await wait_all_tasks_blocked()
            wal.send_nowait(b"sent")
            wal.send_nowait(b"sent")
            blocked = Call(nursery, wal.append, b"blocked")
            await wait_all_tasks_blocked()
            nursery.start_soon(wal.aclose)
            await wait_all_tasks_blocked()
            assert isinstance(blocked.error, trio.ClosedResourceError)
            with pytest.raises(trio.ClosedResourceError):
                wal.send_nowait(b"late")
            home.release()
        assert sorted(call.value for call in calls) == [1, 2, 3]
    async with home.open() as wal:
        assert wal.last_lsn == 5
        assert wal.recovery.clean_shutdown


async def test_a_cancelled_append_is_withdrawn_until_its_batch_is_taken(home: Any) -> None:
    async with home.open() as wal, trio.open_nursery() as nursery:
        home.hold()
        flying = Call(nursery, wal.append, b"flying")
        await wait_all_tasks_blocked()
        queued = [Call(nursery, wal.append, b"queued %d" % n) for n in range(5)]
        unit = Call(nursery, wal.append_many, [b"unit"] * 3)
        await wait_all_tasks_blocked()
        for call in (flying, queued[1], queued[3], unit):
            call.scope.cancel()
        await wait_all_tasks_blocked()
        assert [call.state for call in queued] == ["waiting", "cancelled"] * 2 + ["waiting"]
        assert (flying.state, unit.state) == ("waiting", "cancelled")
        home.release()
        await wait_all_tasks_blocked()
        assert flying.value == 1
        assert sorted(call.value for call in queued if call.value) == [2, 3, 4]
        assert set((await read_all(wal)).values()) == {
            b"flying",
            b"queued 0",
            b"queued 2",
            b"queued 4",
        }


@pytest.mark.parametrize("seed", range(10))
async def test_after_a_crash_all_that_was_durable_is_there(home: Any, seed: int) -> None:
    rng = random.Random(seed)
    given: dict[int, bytes] = {}
    durable = 0
    with suppress(OSError, trio_wal.WalError):
        async with home.open(durability="none") as wal:
            for number in range(rng.randrange(20)):
                data = b"%d" % number
                given[await wal.append(data)] = data
                if rng.random() < 0.2:
                    durable = await wal.flush()
            home.crash(seed)
    async with home.open() as wal:
        found = await read_all(wal)
        assert found.items() <= given.items()
        assert durable <= len(found) == wal.last_lsn
        assert await wal.append(b"next") == len(found) + 1


async def test_durability_interval_syncs_by_itself(
    own_home: Any, autojump_clock: MockClock
) -> None:
    home = own_home
    async with home.open(durability="interval", flush_interval=1.0) as wal:
        assert await wal.append(b"one") == 1
        assert (wal.last_lsn, wal.durable_lsn) == (1, 0)
        await trio.sleep(1.1)
        assert wal.durable_lsn == 1
        assert wal.statistics().batches_synced == 1


# -- failures -----------------------------------------------------------------------------


class Fenced(trio_wal.LogFailedError):
    """What an engine may raise when another owner has taken its log over."""

    def __init__(self, path: str, outcome: trio_wal.Outcome, owner: str) -> None:
        super().__init__(path, outcome)
        self.owner = owner

    def again(self, outcome: trio_wal.Outcome) -> trio_wal.LogFailedError:
        return Fenced(self.path, outcome, self.owner)


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError(errno.ECONNRESET, "connection lost"), "unknown"),
        (trio_wal.LogFailedError("memory:log", "unknown"), "unknown"),
    ],
    ids=["OSError", "LogFailedError"],
)
async def test_a_write_without_an_answer_is_unknown_and_what_waits_is_not_written(
    server: MemoryServer, error: Exception, outcome: str, applied: bool
) -> None:
    with suppress(trio_wal.LogFailedError):
        async with open_wal_on(server) as wal, trio.open_nursery() as nursery:
            await wal.append(b"before")
            server.hold()
            flying = Call(nursery, wal.append, b"flying")
            await wait_all_tasks_blocked()
            queued = Call(nursery, wal.append, b"queued")
            waits = Call(nursery, wal.wait_durable, 3)
            follows = Call(nursery, read_to_the_end, wal)
            await wait_all_tasks_blocked()
            server.fail("write", error, applied=applied)
            server.release()
            await wait_all_tasks_blocked()
            assert flying.error.outcome == outcome
            assert flying.error.__cause__ is error
            assert queued.error.outcome == "not written"
            assert isinstance(waits.error, trio_wal.LogFailedError)
            assert isinstance(follows.error, trio_wal.LogFailedError)
            assert wal.durable_lsn == 1
            with pytest.raises(trio_wal.LogFailedError):
                await wal.append(b"after")
    assert [call for call in server.calls if call != "chunk"] == ["open", "write", "write", "close"]
    assert not server.closed_in_order
    async with open_wal_on(server) as wal:
        assert list((await read_all(wal)).values()) == [b"before", b"flying"][: 1 + applied]


async def read_to_the_end(wal: Any) -> None:
    async with wal.follow() as records:
        async for _ in records:
            pass


async def test_an_engine_that_knows_that_nothing_was_written_is_believed_and_keeps_its_kind(
    server: MemoryServer,
) -> None:
    error = Fenced(server.name, "not written", "host 7")
    async with open_wal_on(server) as wal, trio.open_nursery() as nursery:
        await wal.append(b"before")
        server.hold()
        server.fail("write", error)
        flying = Call(nursery, wal.append, b"flying")
        await wait_all_tasks_blocked()
        calls = [Call(nursery, wal.append, b"queued"), Call(nursery, wal.flush)]
        await wait_all_tasks_blocked()
        server.release()
        await wait_all_tasks_blocked()
        with pytest.raises(Fenced) as caught:
            await wal.append(b"after")
        for found in (flying.error, *(call.error for call in calls), caught.value):
            assert isinstance(found, Fenced)
            assert found is not error
            assert (found.outcome, found.owner) == ("not written", "host 7")
            assert found.__cause__ is error
    async with open_wal_on(server) as wal:
        assert await read_all(wal) == {1: b"before"}


@pytest.mark.parametrize("durability", ["interval", "none"])
async def test_what_was_written_before_a_fence_and_not_synced_is_unknown(
    server: MemoryServer, durability: str
) -> None:
    async with open_wal_on(server, durability=durability, flush_interval=1000) as wal:
        await wal.append(b"written")
        server.fail("write", Fenced(server.name, "not written", "host 7"))
        with pytest.raises(Fenced) as caught:
            await wal.append(b"fenced")
        assert caught.value.outcome == "not written"
        with pytest.raises(Fenced) as caught:
            await wal.flush()
        assert caught.value.outcome == "unknown"


async def test_a_sync_that_fails_is_not_tried_again(server: MemoryServer) -> None:
    async with open_wal_on(server, durability="none") as wal:
        await wal.append(b"written")
        server.fail("sync", OSError(errno.EIO, "no"))
        with pytest.raises(trio_wal.LogFailedError) as caught:
            await wal.flush()
        assert caught.value.outcome == "unknown"
    assert server.calls == ["open", "write", "sync", "close"]
    assert not server.closed_in_order


async def test_a_close_that_fails_is_told_on_leaving(server: MemoryServer) -> None:
    opened = open_wal_on(server)
    wal = await opened.__aenter__()
    await wal.append(b"written")
    server.fail("close", OSError(errno.EIO, "no"))
    with pytest.raises(trio_wal.LogFailedError):
        await opened.__aexit__(None, None, None)
    assert server.owner is None
    async with open_wal_on(server) as wal:
        assert wal.last_lsn == 1
        assert not wal.recovery.clean_shutdown


async def test_a_truncation_that_fails_without_an_answer_breaks_the_log(
    server: MemoryServer,
) -> None:
    async with open_wal_on(server) as wal:
        await wal.append_many([b"record"] * 5)
        server.fail("truncate_after", OSError(errno.ECONNRESET, "lost"), applied=True)
        with pytest.raises(trio_wal.LogFailedError) as caught:
            await wal.truncate_after(3)
        assert caught.value.outcome == "unknown"
    async with open_wal_on(server) as wal:
        assert (wal.last_lsn, wal.epoch >> 32) == (3, 1)


async def test_a_read_that_fails_harms_nobody_else(server: MemoryServer) -> None:
    async with open_wal_on(server) as wal:
        await wal.append_many([b"record"] * 5)
        server.fail("chunk", OSError(errno.ECONNRESET, "lost"))
        with pytest.raises(OSError, match="lost"):
            await read_all(wal)
        assert len(await read_all(wal)) == 5
        assert await wal.append(b"next") == 6


# -- limits and life ----------------------------------------------------------------------


@pytest.mark.parametrize("records_max", [12, 1000])
async def test_no_write_is_larger_than_the_engine_takes(
    server: MemoryServer, records_max: int
) -> None:
    """The engine asserts it; what is too large alone is refused before anything is queued."""
    server.batch_bytes_max, server.batch_records_max = 200, records_max
    rng = random.Random(1)
    sent = 0
    async with open_wal_on(server, max_queue_size=math.inf, flush_interval=0) as wal:
        with pytest.raises(trio_wal.RecordTooLargeError):
            await wal.append(bytes(197))
        with pytest.raises(trio_wal.RecordTooLargeError):
            await wal.append_many([bytes(40)] * 5)
        with pytest.raises(trio_wal.RecordTooLargeError):
            await wal.append_many([b""] * (13 if records_max == 12 else 51))
        for _ in range(60):
            server.hold()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wal.append, b"flying")
                await wait_all_tasks_blocked()
                sent += 1
                for _ in range(rng.randrange(40)):
                    data = bytes(rng.choice((0, 0, 0, 1, 50, 196)))
                    count = rng.choice((1, 1, 1, 12, 5)) if not data else 1
                    if count > 1:
                        nursery.start_soon(wal.append_many, [data] * count)
                    else:
                        nursery.start_soon(wal.append, data)
                    if rng.random() < 0.5:
                        await wait_all_tasks_blocked()
                    sent += count
                await wait_all_tasks_blocked()
                server.release()
        assert wal.last_lsn == sent
        assert server.calls.count("write") < sent / 2


async def test_an_engine_that_cannot_serve_fails_the_open_and_is_let_go(
    server: MemoryServer,
) -> None:
    server.unreachable = ConnectionRefusedError(errno.ECONNREFUSED, "no server")
    with pytest.raises(ConnectionRefusedError):
        async with open_wal_on(server):
            pytest.fail("opened")
    assert server.owner is None
    assert "close" not in server.calls
    server.unreachable = None
    async with open_wal_on(server) as wal:
        assert wal.last_lsn == 0


async def test_the_engine_s_tasks_run_while_the_log_is_open(server: MemoryServer) -> None:
    async with open_wal_on(server) as wal:
        engine = server.owner
        assert engine is not None
        assert engine.running
        with trio.CancelScope() as scope:
            scope.cancel()
            await wal.aclose()
        assert not engine.running
    assert server.owner is None
    assert server.closed_in_order


# -- a database on it ---------------------------------------------------------------------


async def test_a_database_on_another_engine(server: MemoryServer) -> None:
    async with open_database_on(server) as db:
        for number in range(20):
            await db.put(b"key %d" % number, b"value")
        async with db.transaction() as tx:
            tx.delete(b"key 3")
            tx.put(b"key 4", b"changed")
        with db.snapshot() as snap:
            assert await db.checkpoint() == 21
            await db.put(b"key 5", b"later")
            assert snap.get(b"key 5") == b"value"
        async with db.transaction() as tx:
            tx.get(b"key 6")
            await db.put(b"key 6", b"other")
            tx.put(b"key 7", b"never")
            with pytest.raises(trio_wal.TransactionConflict):
                await tx.commit()
        state = dict(db.scan())
        async with db.changes(21) as commits:
            assert (await commits.__anext__()).lsn == 21
    server.crash()
    async with open_database_on(server) as db:
        assert dict(db.scan()) == state
        assert (db.recovery.checkpoint_lsn, db.recovery.transactions_replayed) == (21, 2)


async def test_checkpoints_let_the_log_get_shorter_and_hold_the_rest(server: MemoryServer) -> None:
    async with open_database_on(server) as db:
        for number in range(40):
            await db.put(b"%d" % number, b"value")
        engine = server.owner
        assert engine is not None
        await engine.drop_before(30)
        assert server.first_lsn == 1
        await db.checkpoint()
        await engine.drop_before(30)
        assert 20 < server.first_lsn <= 30


async def test_a_backup_of_a_database_on_another_engine_is_a_directory(
    server: MemoryServer,
) -> None:
    async with open_database_on(server) as db:
        await db.put(b"key", b"value")
        await db.backup("/backup")
        await db.put(b"key", b"later")
    async with trio_wal.open_database("/backup", files=server.files) as copy:
        assert dict(copy.scan()) == {b"key": b"value"}
        assert copy.uuid == server.uuid
        assert copy.epoch > 0


@pytest.mark.parametrize("seed", range(20))
async def test_a_database_keeps_what_it_acknowledged_whatever_the_server_does(seed: int) -> None:
    """Lives that end in a failure or a crash; a commit of unknown outcome is there or not."""
    rng = random.Random(seed)
    server = MemoryServer(seed=seed)
    state: dict[bytes, bytes] = {}
    doubt: dict[bytes, bytes] = {}
    for life in range(6):
        async with open_database_on(server, checkpoint_bytes=rng.choice((200, 1 << 20))) as db:
            found = dict(db.scan())
            if unknown := {key for key in found | state if found.get(key) != state.get(key)}:
                assert life
                assert unknown <= doubt.keys()
                assert all(found[key] == doubt[key] for key in unknown)
            state = found
            doubt.clear()
            applied = rng.random() < 0.5
            for number in range(rng.randrange(5, 30)):
                key, value = b"%d" % rng.randrange(10), b"%d:%d" % (life, number)
                if rng.random() < 0.07:
                    error: Callable[[], Exception] = rng.choice(
                        (
                            lambda: OSError(errno.ECONNRESET, "lost"),
                            lambda: trio_wal.LogFailedError(server.name, "unknown"),
                        )
                    )
                    server.fail("write", error(), applied=applied)
                try:
                    await db.put(key, value)
                except trio_wal.LogFailedError:
                    doubt[key] = value
                    break
                state[key] = value
                if rng.random() < 0.1:
                    await db.checkpoint()
        if rng.random() < 0.5:
            server.crash()
