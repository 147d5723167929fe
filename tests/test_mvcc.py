"""Versions by themselves: a list for a log, a dict for a store, and nothing of a database."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Iterator
from datetime import datetime, timezone
from typing import Any, cast

import attrs
import pytest
import trio
from hypothesis import example, given, settings, strategies as st
from trio.testing import wait_all_tasks_blocked

from trio_wal import LogFullError, TransactionConflict, _layer, _mvcc, _order
from trio_wal._base import StoreState
from trio_wal._checkpoint import Checkpointer
from trio_wal._engine import Record
from trio_wal._layer import MANY_BYTES, Layer, Version
from trio_wal._mvcc import Pin, Versions
from trio_wal._operations import Writes, decode_puts, decode_transaction, encode_transaction
from trio_wal._readset import ReadSet
from trio_wal._snapshot import new_snapshot
from trio_wal._transaction import new_transaction
from trio_wal._worker import Blocking

UUID = bytes(16)
State = dict[bytes, bytes]


# -- a log and a store ----------------------------------------------------------------


class DictRead:
    """A dict as it was."""

    def __init__(self, store: DictStore) -> None:
        self._store = store
        self._content = dict(store.content)
        store.reads += 1

    def get(self, key: bytes) -> bytes | None:
        return self._content.get(key)

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        for key in sorted(self._content, reverse=reverse):
            if (start is None or key >= start) and (stop is None or key < stop):
                yield key, self._content[key]

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        before = [other for other in self._content if other < key]
        after = [other for other in self._content if other > key]
        return max(before, default=None), key in self._content, min(after, default=None)

    def explain(self, exc: BaseException) -> None:
        pass

    def close(self) -> None:
        self._store.reads -= 1


class DictStore:
    path = "a dict"

    def __init__(self) -> None:
        self.content: State = {}
        self.state: StoreState | None = None
        self.reads = 0
        """Those that are open."""
        self.copies: dict[str, State] = {}

    def read(self) -> DictRead:
        return DictRead(self)

    def apply(self, items: Iterable[tuple[bytes, bytes | None]], state: StoreState | None) -> None:
        self.content = dict(self.content)
        for key, value in items:
            if value is None:
                self.content.pop(key, None)
            else:
                self.content[key] = value
        self.state = state

    def crowded(self, needed: int) -> bool:
        return False

    def grow(self) -> None:
        pass

    def copy(self, path: str) -> None:
        self.copies[path] = dict(self.content)

    def statistics(self) -> tuple[int, int]:
        return len(self.content), 0

    def close(self) -> None:
        pass


@attrs.define
class Batch:
    first_lsn: int
    entries: list[object]
    mixed: bool = False


class Outcome:
    """What whoever commits awaits."""

    def __init__(self) -> None:
        self.lsn = 0
        self.done = trio.Event()

    def __await__(self) -> Generator[Any, Any, int]:
        yield from self.done.wait().__await__()
        return self.lsn


@attrs.define
class Status:
    error: Exception | None = None
    disowned: bool = False

    @property
    def refuses(self) -> bool:
        return self.error is not None

    def check_open(self) -> None:
        if self.error is not None:
            raise self.error


class ListLog:
    """Keeps records in a list; makes them durable, or loses them, when it is told to."""

    def __init__(self) -> None:
        self.waiting: dict[Any, tuple[bytes, Outcome]] = {}
        self.durable: list[bytes] = []
        self.jobs: list[Callable[[], Awaitable[None]]] = []
        self.held: list[tuple[str, int]] = []
        self.status = Status()
        self.versions: Versions

    def append(self, record: bytes, task: Any) -> Outcome:
        outcome = Outcome()
        self.waiting[task] = record, outcome
        return outcome

    def append_in_turn(self, record: bytes, line: Any, enter: Callable[[], None]) -> Outcome:
        enter()
        return self.append(record, object())

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        self.jobs.append(task)

    @property
    def durable_lsn(self) -> int:
        return len(self.durable)

    async def flush(self) -> int:
        await trio.lowlevel.checkpoint()
        self.sync()
        return self.durable_lsn

    def hold(self, who: str, lsn: int) -> None:
        self.held.append((who, lsn))

    def sync(self, count: int | None = None, strangers: int = 0) -> None:
        """The first of those who wait are durable now."""
        tasks = list(self.waiting)[:count]
        entries: list[object] = [*range(strangers), *tasks]
        outcomes: list[Outcome] = []
        batch = Batch(len(self.durable) + 1, entries, mixed=bool(strangers))
        for task in tasks:
            record, outcome = self.waiting.pop(task)
            self.durable.append(record)
            outcome.lsn = len(self.durable)
            outcomes.append(outcome)
        if entries:
            self.versions.settled(batch)
        for outcome in outcomes:
            outcome.done.set()

    def lose(self, task: Any) -> None:
        del self.waiting[task]
        self.versions.withdrawn(task)

    def content(self) -> State:
        state: State = {}
        for record in self.durable:
            apply(state, decode_transaction(record))
        return state


def apply(state: State, writes: Writes) -> None:
    for key, value in writes.items():
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value


@attrs.frozen
class Home:
    log: ListLog
    store: DictStore
    versions: Versions

    def commit(self, task: Any, **writes: bytes | None) -> None:
        """Hand over; nobody waits."""
        self.versions.commit({key.encode(): value for key, value in writes.items()}, task)

    def get(self, key: bytes) -> bytes | None:
        """What is durable."""
        return self.versions.view.get(key, self.versions.settled_seq)

    def reads(self) -> ReadSet:
        return ReadSet(self.versions, None)

    def checkpointer(self) -> Checkpointer:
        blocking = Blocking(threaded=False)
        state = StoreState(UUID, 0)
        return Checkpointer(self.versions, self.store, self.log, blocking, state)


def make_home(*, checkpoint_bytes: int = 1 << 20) -> Home:
    log, store = ListLog(), DictStore()
    log.versions = Versions(
        "/nowhere",
        store,
        log,
        durable_lsn=0,
        checkpoint_bytes=checkpoint_bytes,
        max_transaction_bytes=1000,
    )
    return Home(log, store, log.versions)


@pytest.fixture
def home() -> Home:
    return make_home()


# -- visibility -----------------------------------------------------------------------


def test_a_commit_is_seen_by_transactions_at_once_and_by_others_when_it_is_durable(
    home: Home,
) -> None:
    home.commit("a", k=b"1")
    before, reads = Pin(home.versions), home.reads()
    assert reads.get(b"k") == b"1"
    assert home.get(b"k") is None
    home.log.sync()
    assert home.get(b"k") == b"1"
    assert before.view.get(b"k", before.seq) is None
    assert (before.lsn, home.versions.durable_lsn) == (0, 1)
    after = Pin(home.versions)
    assert after.view.get(b"k", after.seq) == b"1"
    assert list(after.view.scan(after.seq, None, None, False)) == [(b"k", b"1")]


def test_numbers_are_those_of_the_log_also_among_strangers(home: Home) -> None:
    home.commit("a", k=b"1")
    home.log.sync(strangers=2)
    home.commit("b", k=b"2")
    home.commit("c", k=b"3")
    home.log.sync(1)
    assert (home.get(b"k"), home.versions.durable_lsn, home.versions.pending) == (b"2", 2, 1)
    home.log.sync(strangers=1)
    assert (home.get(b"k"), home.versions.durable_lsn, home.versions.pending) == (b"3", 3, 0)
    assert home.versions.transactions == 3


def test_what_was_read_and_has_changed_is_a_conflict(home: Home) -> None:
    reader, scanner, other = home.reads(), home.reads(), home.reads()
    reader.get(b"k")
    scanner.begin_range(b"a", b"z")
    other.get(b"m")
    assert reader.conflict() is scanner.conflict() is None
    home.commit("a", k=b"1")
    assert reader.conflict() == scanner.conflict() == b"k"
    assert other.conflict() is None


# -- dependencies ---------------------------------------------------------------------


async def test_whoever_reads_a_pending_commit_depends_on_it(home: Home) -> None:
    home.commit("a", k=b"1")
    assert home.versions.may_withdraw("a")  # type: ignore[arg-type]
    reads = home.reads()
    assert reads.get(b"k") == b"1"
    dependency = reads.dependency
    assert dependency is not None
    assert not home.versions.may_withdraw("a")  # type: ignore[arg-type]
    done: list[int] = []

    async def wait() -> None:
        done.append(await home.versions.wait_for(dependency))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert done == []
        home.log.sync()
    assert done == [1]
    assert dependency.settled
    assert home.reads().dependency is None


@pytest.mark.parametrize("keys", [(b"a", b"b"), (b"b", b"a")])
async def test_whoever_reads_two_pending_commits_waits_for_the_newer(
    home: Home, keys: tuple[bytes, bytes]
) -> None:
    home.commit("a", a=b"1")
    home.commit("b", b=b"2")
    reads = home.reads()
    for key in keys:
        assert reads.get(key) is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(home.versions.wait_for, reads.dependency)
        await wait_all_tasks_blocked()
        home.log.sync(1)
        await wait_all_tasks_blocked()
        assert nursery.child_tasks, "only one of the two is durable"
        home.log.sync(1)


async def test_a_lost_commit_takes_along_whoever_read_it(home: Home) -> None:
    home.commit("a", k=b"1")
    home.log.sync()
    home.commit("b", k=b"2")
    waiting, validating = home.reads(), home.reads()
    assert waiting.get(b"k") == validating.get(b"k") == b"2"
    errors: list[TransactionConflict] = []

    async def wait() -> None:
        with pytest.raises(TransactionConflict) as caught:
            await home.versions.wait_for(waiting.dependency)
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        home.log.lose("b")
    assert [error.key for error in errors] == [b"k"]
    assert validating.conflict() == b"k"
    assert home.versions.conflicts == 1
    assert home.get(b"k") == home.reads().get(b"k") == b"1", "as if it had never been"


async def test_the_loss_of_a_chain_of_commits_reaches_its_end(home: Home) -> None:
    home.commit("a", x=b"1")
    second = home.reads()
    second.get(b"x")
    home.commit("b", y=b"1")
    third = home.reads()
    third.get(b"y")
    for task in ("a", "b"):
        home.log.lose(task)
    assert second.conflict() == b"x"
    with pytest.raises(TransactionConflict):
        await home.versions.wait_for(third.dependency)
    assert home.versions.pending == 0
    assert list(home.reads().scan(None, None, False)) == []


async def test_a_lost_commit_of_a_broken_log_is_the_logs_error(home: Home) -> None:
    home.commit("a", k=b"1")
    reads = home.reads()
    reads.get(b"k")
    home.log.status.error = OSError("broken")
    home.log.lose("a")
    with pytest.raises(OSError, match="broken"):
        await home.versions.wait_for(reads.dependency)


def test_a_log_that_has_stopped_gets_nothing_and_nothing_is_seen_of_it(home: Home) -> None:
    home.log.status.error = OSError("no more")
    with pytest.raises(OSError, match="no more"):
        home.commit("a", k=b"1")
    assert home.versions.pending == home.versions.last_seq == 0
    assert home.reads().get(b"k") is None


# -- pins -----------------------------------------------------------------------------


def test_a_pin_keeps_what_it_may_need_and_no_longer(home: Home) -> None:
    home.commit("a", k=b"1")
    home.log.sync()
    pin = Pin(home.versions)
    for number in range(5):
        home.commit("a", k=b"%d" % number)
        home.log.sync()
    layer = home.versions.view.active
    kept = layer.bytes
    assert pin.view.get(b"k", pin.seq) == b"1"
    home.versions.readers.unpin(pin)
    home.versions.readers.unpin(pin)
    home.commit("a", k=b"6")
    home.log.sync()
    assert layer.bytes < kept / 3
    assert home.get(b"k") == b"6"


async def test_a_pin_outlives_a_checkpoint_and_keeps_the_stores_state(home: Home) -> None:
    home.commit("a", k=b"1")
    home.log.sync()
    pin, reads = Pin(home.versions), home.reads()
    home.commit("a", k=b"2", m=b"2")
    await home.checkpointer().checkpoint()
    assert home.store.content == {b"k": b"2", b"m": b"2"}
    assert home.store.reads == 2
    assert dict(pin.view.scan(pin.seq, None, None, False)) == {b"k": b"1"}
    assert reads.get(b"k") == b"1"
    assert reads.conflict() == b"k", "the layer has gone, what changed in it has not"
    for reader in (pin, reads):
        home.versions.readers.unpin(reader)
    assert home.store.reads == 1


def test_nobody_reads_after_the_end(home: Home) -> None:
    pin = Pin(home.versions)
    home.versions.let_go()
    home.versions.close()
    assert not home.versions.readers.pins
    assert home.store.reads == 0
    home.versions.readers.unpin(pin)
    for attempt in (home.reads, lambda: Pin(home.versions), home.versions.check_open):
        with pytest.raises(trio.ClosedResourceError, match=r"^/nowhere: this database is closed$"):
            attempt()
    with pytest.raises(trio.ClosedResourceError):
        home.versions.base_get(b"k")


async def test_somebody_can_wait_until_nobody_reads(home: Home) -> None:
    pins = [Pin(home.versions) for _ in range(2)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(home.versions.readers.wait_unread)
        await wait_all_tasks_blocked()
        assert home.versions.readers.waited_for
        home.versions.readers.unpin(pins[0])
        await wait_all_tasks_blocked()
        assert home.versions.readers.waited_for
        home.versions.readers.unpin(pins[1])


class _Collects:
    """A reader at whose turn the garbage collector ends another."""

    task: trio.lowlevel.Task | None = None

    def __init__(self, home: Home, others: list[Pin]) -> None:
        self._home, self._others = home, others
        self.dropped = 0
        self.view = home.versions.pin(self)

    def layer_dropped(self, layer: Layer) -> None:
        self.dropped += 1
        while self._others:
            self._home.versions.readers.unpin(self._others.pop())

    def changed_past(self, keys: Iterable[bytes]) -> None:
        pass


def test_a_scan_that_the_garbage_collector_ends_disturbs_no_checkpoint(home: Home) -> None:
    others: list[Pin] = []
    first = _Collects(home, others)
    others += [Pin(home.versions), Pin(home.versions)]
    last = _Collects(home, [])
    home.commit("a", k=b"1")
    home.log.sync()
    frozen = home.versions.freeze()
    assert frozen is not None
    home.versions.checkpointed(frozen, StoreState(b"", frozen.last_lsn))
    assert (first.dropped, last.dropped) == (1, 1)
    left: list[object] = [*home.versions.readers.pins]
    assert left == [first, last]


# -- a checkpoint while deletions are buried --------------------------------------------


@pytest.mark.parametrize("ahead", range(0, 60, 7))
def test_a_checkpoint_has_every_deletion_however_many_are_buried_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    # Few keys meet every case: runs of deletions are sorted and merged all the time.
    monkeypatch.setattr(_layer, "BURIED_AT_ONCE", 5)
    monkeypatch.setattr(_layer, "RUN_KEYS", 8)
    monkeypatch.setattr(_order, "RUN_KEYS", 8)
    monkeypatch.setattr(_order, "RUNS_MERGED", 2)
    keys = [b"%02d" % number for number in range(80)]
    store = DictStore()
    store.content = dict.fromkeys(keys, b"")
    below = store.read()
    random.Random(ahead).shuffle(keys)
    layer = Layer()
    layer.add(dict.fromkeys(keys), 1, 0, keep_older=False)
    layer.freeze()
    for _ in range(ahead % 5):
        layer.settle(1, None, lambda _: below)
    items = layer.items()
    found = [next(items) for _ in range(ahead)]
    while layer.dead(1):
        layer.settle(1, None, lambda _: below)
        found += itertools.islice(items, 1)
    found += items
    assert found == [(key, None) for key in sorted(keys)]


def test_a_large_commit_is_known_by_its_bytes() -> None:
    shortest: Writes = {bytes([number]): None for number in range(_order.RUN_KEYS_READ)}
    assert len(encode_transaction(shortest)) >= MANY_BYTES


@pytest.mark.parametrize("way", ["commit", "in turn", "replay"])
def test_those_who_read_need_not_skip_the_keys_of_a_large_commit(home: Home, way: str) -> None:
    writes: Writes = {b"%03d" % number: b"" for number in range(_order.RUN_KEYS_READ)}
    home.commit("a", k=b"1")
    home.log.sync()
    versions, task = home.versions, cast("Any", "b")
    layer = versions.view.active
    order, _ = layer.level  # what somebody has who reads now
    if way == "replay":
        record = Record(2, datetime.now(timezone.utc), encode_transaction(writes))
        versions.replay("log", [record], 0, math.inf, to_checkpoint=False)
    else:
        versions.by_turns = way == "in turn"
        versions.commit(writes, task)
    assert list(order.between(None, None, reverse=False)) == [b"k"]
    assert list(layer.level[0].between(None, None, reverse=False)) == [*writes, b"k"]


# -- replay ---------------------------------------------------------------------------

some_key = st.integers(0, 11).map(b"%d".__mod__)
some_put = st.tuples(some_key, st.binary(max_size=3)).map(lambda put: {put[0]: put[1]})
some_writes = st.dictionaries(some_key, st.none() | st.binary(max_size=3), max_size=3)
some_commits: st.SearchStrategy[list[Writes]] = st.lists(
    st.lists(some_put, max_size=12) | st.lists(some_writes, max_size=4)
).map(lambda lists: list(itertools.chain.from_iterable(lists)))


def everything_of(layer: Layer) -> dict[str, object]:
    """All that what comes later depends on; not how the keys are kept, which are the same."""

    def chain(version: Version | None) -> list[tuple[int, bytes | None]]:
        found: list[tuple[int, bytes | None]] = []
        while version is not None:
            found.append((version.seq, version.value))
            version = version.older
        return found

    def keys(order: Any, stale: Collection[bytes] = ()) -> list[bytes]:
        return [key for key in order.between(None, None, reverse=False) if key not in stale]

    every: dict[str, object] = {name: getattr(layer, name) for name in Layer.__slots__}
    order, gaps = layer.level
    every["versions"] = [(key, chain(version)) for key, version in layer.versions.items()]
    every["keys"] = keys(layer.keys, layer.keys.stale), keys(order, layer.keys.stale)
    every["places"] = dict(layer.places)
    every["_buried"] = set(layer._buried)
    every["_dying"] = list(layer._dying)
    every["_replacing"] = list(map(chain, layer._replacing))
    every["_deletions"] = [(found.keys, found.last_seq) for found in layer._deletions]
    every["_hidden"] = keys(layer._hidden)
    every["_gaps"] = list(layer._gaps.between(None, None, reverse=False))
    every["_level"] = list(gaps.between(None, None, reverse=False))
    return every


def everything(versions: Versions) -> list[object]:
    layers = list(map(everything_of, versions.view.layers()))
    numbers = (versions.last_seq, versions.settled_seq, versions.durable_lsn)
    scanned = list(versions.view.scan(versions.settled_seq, None, None, False))
    return [layers, numbers, scanned, versions.newest is versions.view.active.versions]


async def live(
    before: list[Writes],
    pinned: range,
    replayed: list[Writes],
    after: list[Writes],
    checkpoint_bytes: int,
) -> list[object]:
    """Commits, while somebody reads; replayed ones; others; and what all is like in between."""
    home = make_home(checkpoint_bytes=checkpoint_bytes)
    versions, log, checkpointer = home.versions, home.log, home.checkpointer()
    home.store.content = {b"1": b"", b"5": b"", b"51": b""}
    versions.reopen_base(lambda: None)
    content = dict(home.store.content)
    pin: Pin | None = None
    for place, writes in enumerate([*before, {}]):
        if place == pinned.start:
            pin = Pin(versions)
        if place == pinned.stop and pin is not None:
            versions.readers.unpin(pin)
        versions.commit(writes, cast("Any", place))
        log.sync()
    if versions.checkpoint_due():
        await checkpointer.checkpoint()
    begin = len(log.durable)
    log.durable += map(encode_transaction, replayed)
    now = datetime.now(timezone.utc)
    records = [Record(lsn, now, data) for lsn, data in enumerate(log.durable, 1)]
    found: list[object] = []
    at = begin
    while at < len(records):
        at = versions.replay("log", records, at, math.inf, to_checkpoint=True)
        await versions.settle_replayed()
        size = versions.view.active.log_bytes - len(records[at - 1].data)
        assert size < checkpoint_bytes, "it ends where a checkpoint is due"
        found += [at, everything(versions)]
        if versions.checkpoint_due():
            await checkpointer.checkpoint()
            found.append(home.store.content)
    for place, writes in enumerate(after):
        versions.commit(writes, cast("Any", place))
        log.sync()
    found.append(everything(versions))
    for data in log.durable:
        apply(content, decode_transaction(data))
    assert dict(versions.view.scan(versions.settled_seq, None, None, False)) == content
    await checkpointer.checkpoint()
    return [*found, everything(versions), home.store.content]


# Deletions that hide something; keys that are gone again; versions that somebody has kept.
@example([{b"1": None}, {b"5": None}], (0, 0), [{b"1": b""}], [], 300)
@example([*({b"2": x, b"3": x} for x in (b"", None))], (0, 0), [{b"2": b""}], [], 300)
@example([{b"1": b""}] * 3, (0, 3), [{b"1": b""}], [], 300)
@settings(max_examples=100, deadline=None)
@given(
    some_commits,
    st.tuples(st.integers(0, 12), st.integers(0, 12)),
    some_commits,
    some_commits,
    st.integers(20, 400),
)
def test_commits_replayed_together_are_what_they_are_one_by_one(
    before: list[Writes],
    pinned: tuple[int, int],
    replayed: list[Writes],
    after: list[Writes],
    checkpoint_bytes: int,
) -> None:
    life = before, range(*pinned), replayed, after, checkpoint_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio_wal._mvcc.REPLAYED_TOGETHER", 4)
        patch.setattr("trio_wal._layer.BURIED_TOGETHER", 2)
        patch.setattr("trio_wal._layer.RUN_KEYS", 4)
        patch.setattr("trio_wal._layer.RUN_KEYS_READ", 2)
        together = trio.run(live, *life)
        patch.setattr("trio_wal._mvcc.decode_puts", lambda _: None)
        assert together == trio.run(live, *life)


def test_whoever_watches_sees_replayed_commits(home: Home) -> None:
    versions = home.versions
    versions.watches.begun = True
    seen: list[tuple[int, Writes]] = []

    def settled(first_lsn: int, commits: list[tuple[Any, ...]]) -> None:
        seen.extend((lsn, commit[1]) for lsn, commit in enumerate(commits, first_lsn))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(versions.watches), "settled", staticmethod(settled))
        versions.replay("log", some_records(3), 0, math.inf, to_checkpoint=False)
    assert seen == [(lsn, {b"%d" % lsn: b""}) for lsn in (1, 2, 3)]


def some_records(count: int, value: bytes = b"") -> list[Record]:
    now = datetime.now(timezone.utc)
    return [
        Record(lsn, now, encode_transaction({b"%d" % lsn: value})) for lsn in range(1, count + 1)
    ]


@pytest.mark.parametrize(("size", "together"), [(0, 3), (_mvcc.REPLAYED_BYTES // 3, 0)])
def test_what_is_large_is_not_copied_to_be_replayed_together(
    home: Home, monkeypatch: pytest.MonkeyPatch, size: int, together: int
) -> None:
    decoded: list[int] = []

    def decode(records: list[bytes]) -> tuple[list[bytes], list[bytes]] | None:
        decoded.append(len(records))
        return decode_puts(records)

    monkeypatch.setattr(_mvcc, "decode_puts", decode)
    versions = home.versions
    assert (
        versions.replay("log", some_records(3, bytes(size)), 0, math.inf, to_checkpoint=True) == 3
    )
    assert sum(decoded) == together
    assert home.get(b"3") == bytes(size)


# -- room -----------------------------------------------------------------------------


async def test_writers_wait_while_a_checkpoint_is_a_whole_interval_behind() -> None:
    home = make_home(checkpoint_bytes=20)
    versions = home.versions
    home.commit("a", k=bytes(20))
    assert versions.checkpoint_due()
    with trio.fail_after(60):
        await versions.room.wait_asked()
    frozen = versions.freeze()
    assert frozen is not None
    assert versions.freeze() is frozen, "one that was interrupted is given again"
    assert not versions.behind()
    home.commit("b", k=bytes(30))
    assert versions.behind()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(versions.wait_for_room)
        await wait_all_tasks_blocked()
        assert versions.room.waiting == 1
        home.log.lose("b")
    home.commit("b", k=bytes(30))
    home.log.sync()
    assert frozen.last_lsn == 1, "a batch may end in another layer than it began in"
    assert versions.view.active.last_lsn == 2
    async with trio.open_nursery() as nursery:
        nursery.start_soon(versions.wait_for_room)
        await wait_all_tasks_blocked()
        versions.checkpointed(frozen, StoreState(b"", frozen.last_lsn))
    assert not versions.behind()
    assert versions.checkpoint_due()


async def test_whoever_waits_in_vain_is_told() -> None:
    home = make_home(checkpoint_bytes=20)
    versions = home.versions
    home.commit("a", k=bytes(20))
    versions.freeze()
    home.commit("b", k=bytes(20))
    stuck = versions.room.stuck = LogFullError("/nowhere", 20, "stuck")
    pin = Pin(versions)
    with pytest.raises(LogFullError, match="stuck") as caught:
        await versions.wait_for_room()
    assert caught.value is not stuck
    versions.readers.unpin(pin)
    with trio.move_on_after(0) as scope:
        await versions.wait_for_room()
    assert scope.cancelled_caught, "nobody reads: it is worth waiting again"
    assert versions.room.waiting == 0
    versions.room.failing = LogFullError("/nowhere", 20, "failing")
    with pytest.raises(LogFullError, match="failing"):
        await versions.wait_for_room()


# -- what stands on them ----------------------------------------------------------------


async def test_a_checkpoint_needs_versions_a_store_and_a_log_only(home: Home) -> None:
    checkpointer = home.checkpointer()
    assert await checkpointer.checkpoint() == 0
    home.commit("a", k=b"1")
    assert await checkpointer.checkpoint() == 1
    assert home.store.state == StoreState(UUID, 1)
    assert home.log.held == [("store", 2)]
    home.commit("a", k=None)
    home.log.lose("a")
    assert await checkpointer.checkpoint() == 1, "it was withdrawn"
    assert home.store.content == {b"k": b"1"}


async def test_transactions_and_snapshots_need_versions_only(home: Home) -> None:
    async with trio.open_nursery() as nursery:

        async def write(value: bytes) -> None:
            async with new_transaction(home.versions) as tx:
                tx.put(b"k", value)

        nursery.start_soon(write, b"1")
        await wait_all_tasks_blocked()
        tx = new_transaction(home.versions)
        async with tx:
            assert tx.get(b"k") == b"1"
            assert list(tx.scan()) == [(b"k", b"1")]
            home.log.sync()
            home.versions.epoch = 7
            with new_snapshot(home.versions) as snapshot:
                assert (snapshot.get(b"k"), str(snapshot.bookmark)) == (b"1", "1@7")
            nursery.start_soon(write, b"2")
            await wait_all_tasks_blocked()
            home.log.sync()
            tx.put(b"m", b"1")
            with pytest.raises(TransactionConflict):
                await tx.commit()


@pytest.mark.parametrize("seed", range(20))
async def test_every_reader_sees_its_moment_whatever_happens(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_wal._layer.BURIED_TOGETHER", 2)
    rng = random.Random(seed)
    home = make_home()
    checkpointer = home.checkpointer()
    pins: dict[Pin, State] = {}
    names = [b"a", b"b", b"c", b"d", b"e"]
    tasks = 0
    for _ in range(150):
        kind = rng.choice(["commit", "commit", "commit", "sync", "lose", "pin", "unpin", "point"])
        if kind == "commit":
            tasks += 1
            chosen = rng.sample(names, rng.randint(1, 3))
            writes = {key: rng.choice([None, b"%d" % tasks]) for key in chosen}
            home.versions.commit(writes, tasks)  # type: ignore[arg-type]
        elif kind == "sync":
            home.log.sync(rng.randint(0, 3))
        elif kind == "lose" and home.log.waiting:
            # The newest: of those before it nobody must have read.
            home.log.lose(list(home.log.waiting)[-1])
        elif kind == "pin":
            pins[Pin(home.versions)] = home.log.content()
        elif kind == "unpin" and pins:
            pin = rng.choice(list(pins))
            del pins[pin]
            home.versions.readers.unpin(pin)
        elif kind == "point" and rng.random() < 0.3:
            await checkpointer.checkpoint()
            assert home.store.content == home.log.content()
        durable = home.log.content()
        assert {key: home.get(key) for key in names} == {key: durable.get(key) for key in names}
        for pin, state in pins.items():
            assert dict(pin.view.scan(pin.seq, None, None, rng.random() < 0.5)) == state
            assert pin.view.get(b"c", pin.seq) == state.get(b"c")
        for job in home.log.jobs:
            await job()
        home.log.jobs.clear()
