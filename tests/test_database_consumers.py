"""Consumers of a database: acknowledgements in transactions, in checkpoints, in backups."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NoReturn

import pytest
import trio
from cas import CasServers, MemoryLog
from databases import DB, open_memory_database
from test_consumers import TINY, acknowledge, given, place, take, waiting
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal import (
    CorruptLogError,
    LsnTruncatedError,
    RecordTooLargeError,
    TransactionConflict,
    _stream,
)
from trio_wal._caslog import Unsure
from trio_wal._operations import (
    OperationsError,
    decode_transaction,
    encode_placed_transaction,
    moves_in,
    operations_in,
)
from trio_wal._places import Move, Place, encode_places
from trio_wal._store_files import STORE_FORMAT, state_of
from trio_wal.testing import MemoryFiles


async def fill(db: Any, count: int) -> list[int]:
    return [await db.put(b"k%d" % n, b"v") for n in range(count)]


# -- in a transaction ---------------------------------------------------------------------------


async def test_an_acknowledgement_is_part_of_its_transaction(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        lsns = await fill(db, 3)
        async with db.consumer("a") as consumer:
            items = await take(consumer, 3)
            async with db.transaction() as tx:
                tx.put(b"seen", b"2")
                consumer.acknowledge_in(tx, items[1])
                assert place(db) == 0
            assert place(db) == lsns[1]
            with contextlib.suppress(KeyError):
                async with db.transaction() as tx:
                    consumer.acknowledge_in(tx, items[2])
                    raise KeyError
            assert place(db) == lsns[1]
            async with db.transaction() as tx:
                consumer.acknowledge_in(tx, items[2])
                tx.abort()
            assert place(db) == lsns[1]
        assert await given(db, "a") == [lsns[2], 5]
    async with open_memory_database(files) as db:
        assert place(db) == lsns[1]
        assert db.get(b"seen") == b"2"


async def test_an_acknowledgement_that_conflicts_has_not_happened(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        lsns = await fill(db, 2)
        async with db.consumer("a") as consumer:
            items = await take(consumer, 2)
            tx = db.transaction()
            await tx.__aenter__()
            tx.get(b"k0")
            consumer.acknowledge_in(tx, items[0])
            tx.put(b"x", b"")
            await db.put(b"k0", b"other")
            with pytest.raises(TransactionConflict):
                await tx.commit()
            assert place(db) == 0
            tries = 0

            async def fn(tx: Any) -> None:
                nonlocal tries
                tries += 1
                count = int(tx.get(b"count", b"0"))
                tx.put(b"count", b"%d" % (count + 1))
                consumer.acknowledge_in(tx, items[1])
                if tries < 3:
                    await db.put(b"count", b"%d" % (10 * tries))

            await db.run(fn)
            assert tries == 3
            assert db.get(b"count") == b"21"
            assert place(db) == lsns[1]


async def test_a_transaction_with_an_acknowledgement_only(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        lsns = await fill(db, 3)
        async with db.consumer("a") as consumer, db.consumer("b") as other:
            mine, theirs = await take(consumer, 3), await take(other, 3)
            async with db.transaction() as tx:
                consumer.acknowledge_in(tx, mine[1])
                other.acknowledge_in(tx, theirs[2])
                consumer.acknowledge_in(tx, mine[0])
            assert (place(db, "a"), place(db, "b")) == (lsns[1], lsns[2])
            before = db.wal.last_lsn
            async with db.transaction() as tx:
                # Nothing new.
                consumer.acknowledge_in(tx, mine[0])
            assert db.wal.last_lsn == before


@pytest.mark.parametrize("through_writer", [False, True])
async def test_whose_block_was_left_acknowledges_nothing(
    files: MemoryFiles, through_writer: bool
) -> None:
    """Somebody else may have been given the same commits by then."""
    async with open_memory_database(files) as db, db.writer("w") as w:
        await fill(db, 2)
        begin = w.transaction if through_writer else db.transaction
        async with db.consumer("a") as consumer:
            (item,) = await take(consumer, 1)
            tx = begin()
            await tx.__aenter__()
            tx.put(b"x", b"1")
            consumer.acknowledge_in(tx, item)
        with pytest.raises(
            trio.ClosedResourceError, match="consumer 'a' is closed: its block was left"
        ):
            await tx.commit()
        assert db.get(b"x") is None
        assert place(db) == 0
        async with db.transaction() as tx:
            with pytest.raises(trio.ClosedResourceError):
                consumer.acknowledge_in(tx, item)


async def test_whose_block_was_left_acknowledges_nothing_again(files: MemoryFiles) -> None:
    """Not even what is acknowledged already: another user may be given what comes next."""
    async with open_memory_database(files) as db:
        await fill(db, 3)
        async with db.consumer("a") as consumer:
            items = await take(consumer, 2)
            await consumer.acknowledge(items[1])
            tx = db.transaction()
            await tx.__aenter__()
            tx.put(b"seen", b"1")
            consumer.acknowledge_in(tx, items[0])
        with pytest.raises(trio.ClosedResourceError):
            await tx.__aexit__(None, None, None)
        assert db.get(b"seen") is None


async def test_acknowledging_through_a_writer(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, db.writer("w") as w:
        lsns = await fill(db, 3)
        async with db.consumer("a") as consumer:
            items = await take(consumer, 3)
            await consumer.acknowledge(items[0])
            assert place(db) == lsns[0]
            async with w.transaction() as tx:
                tx.put(b"x", b"1")
                consumer.acknowledge_in(tx, items[2])
            assert place(db) == lsns[2]


async def test_the_next_user_waits_for_what_the_last_one_has_begun(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        lsns = await fill(db, 2)
        async with db.consumer("a") as consumer:
            (item,) = await take(consumer, 1)
            files.hold()

            async def handle() -> None:
                async with db.transaction() as tx:
                    tx.put(b"x", b"1")
                    consumer.acknowledge_in(tx, item)

            nursery.start_soon(handle)
            await wait_all_tasks_blocked()
        found: list[list[int]] = []
        done = trio.Event()

        async def use() -> None:
            found.append(await given(db, "a"))
            done.set()

        nursery.start_soon(use)
        await wait_all_tasks_blocked()
        assert found == []
        files.release()
        await done.wait()
        assert found == [[lsns[1], 4]]


async def test_bad_arguments_are_refused(files: MemoryFiles) -> None:
    async with (
        open_memory_database(files) as db,
        open_memory_database(MemoryFiles(), max_record_size=100) as small,
    ):
        await fill(db, 2)
        await fill(small, 1)
        async with db.consumer("a") as consumer, small.consumer("a") as little:
            (item,) = await take(consumer, 1)
            (tiny,) = await take(little, 1)
            async with db.transaction() as tx:
                with pytest.raises(TypeError, match=r"^tx must be a Transaction, not str$"):
                    consumer.acknowledge_in("tx", item)  # type: ignore[arg-type]
                with pytest.raises(TypeError, match=r"^item must be a Commit, not int$"):
                    consumer.acknowledge_in(tx, 1)  # type: ignore[arg-type]
                with pytest.raises(ValueError, match=r"^tx must be a transaction of the consumer"):
                    little.acknowledge_in(tx, tiny)
                assert tx.lsn is None
            with pytest.raises(trio.ClosedResourceError):
                consumer.acknowledge_in(tx, item)
            async with small.transaction() as tx:
                tx.put(b"k", bytes(61))
                with pytest.raises(RecordTooLargeError):
                    little.acknowledge_in(tx, tiny)
            assert small.get(b"k") == bytes(61)
            assert place(small) == 0
        with pytest.raises(RecordTooLargeError):
            async with small.consumer("a" * 100):
                raise AssertionError


@pytest.mark.parametrize("kind", ["kill", "power"])
async def test_exactly_once_whenever_it_crashes(files: MemoryFiles, kind: Any) -> None:
    """A count, and where it is: they are moved together."""
    images: list[MemoryFiles] = []
    total = 8
    async with open_memory_database(files, segment_size=TINY) as db:
        for _ in range(total):
            await db.put(b"event", b"")
        files.after_operation = lambda operation, path: images.append(
            files.crash_image(len(images), kind)
        )
        await count_events(db, 4)
        await db.checkpoint()
        await count_events(db, 2)
        files.after_operation = None
    for image in images:
        async with open_memory_database(image, segment_size=TINY) as db:
            await count_events(db, total)
            assert db.get(b"count") == b"%d" % total


async def count_events(db: Any, most: int) -> None:
    async with db.consumer("counter") as consumer:
        for commit in (await waiting(consumer))[:most]:
            async with db.transaction() as tx:
                if commit.operations[0].key == b"event":
                    tx.put(b"count", b"%d" % (1 + int(tx.get(b"count", b"0"))))
                consumer.acknowledge_in(tx, commit)


# -- nobody sees them ---------------------------------------------------------------------------


async def test_acknowledgements_are_shown_to_nobody(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db, trio.open_nursery() as nursery:
        await db.put(b"a", b"1")
        woken: list[int] = []

        async def watch() -> None:
            woken.append(await db.wait_changed(prefix=b""))

        nursery.start_soon(watch)
        await wait_all_tasks_blocked()
        await acknowledge(db, "a", 1)
        await given(db, "b")
        await db.drop_consumer("a")
        last = db.durable_lsn
        assert last == 5
        await wait_all_tasks_blocked()
        assert woken == []
        async with db.changes() as commits:
            assert [commit.lsn for commit in await waiting(commits)] == [1]
            assert commits.bookmark.lsn == last
        lsn = await db.put(b"b", b"2")
        await wait_all_tasks_blocked()
        assert woken == [lsn]
        async with db.changes() as commits:
            assert [commit.lsn for commit in await take(commits, 2)] == [1, lsn]
        async with db.changes(2) as commits:
            assert [c.lsn for c in await commits.batches(None).__anext__()] == [lsn]
            await acknowledge(db, "b", lsn)
            assert await waiting(commits) == []
        with db.snapshot() as snap:
            assert dict(snap.scan()) == {b"a": b"1", b"b": b"2"}


async def test_a_reader_passes_over_them(files: MemoryFiles) -> None:
    async with open_memory_database(files, segment_size=TINY) as db:
        await fill(db, 3)
        await acknowledge(db, "a", 2)
        await db.checkpoint()
        async with trio_wal.open_database_reader(DB, files=files) as reader:
            await db.put(b"x", b"1")
            await acknowledge(db, "a", 3)
            await reader.wait_for(db.durable_lsn)
            assert reader.get(b"x") == b"1"
            async with reader.changes(reader.durable_lsn - 1) as commits:
                found = await waiting(commits)
                assert [c.operations[0].key for c in found] == [b"x"]


# -- checkpoints --------------------------------------------------------------------------------


async def test_a_place_behind_a_checkpoint_passes_over_no_commit(files: MemoryFiles) -> None:
    """An acknowledgement among what a checkpoint covers does not count for what comes later."""
    async with open_memory_database(files) as db:
        await db.put(b"1", b"")
        await given(db, "a")
        await db.put(b"3", b"")
        await db.put(b"4", b"")
        await db.checkpoint()
    async with open_memory_database(files) as db:
        await acknowledge(db, "a", 3)
        assert await given(db, "a") == [4]
        assert db.statistics().consumers["a"].lag_records >= 1


async def test_what_was_reached_over_is_not_asked_for_again(files: MemoryFiles) -> None:
    """Nothing but acknowledgements came after the place, and the log has dropped those."""
    async with open_memory_database(files, segment_size=TINY) as db:
        await fill(db, 4)
        await acknowledge(db, "a", 4)
        for number in range(30):
            await given(db, f"other {number}")
            await db.drop_consumer(f"other {number}")
        await db.checkpoint()
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert db.wal.first_lsn > 20
        assert place(db) == 4
        assert db.statistics().consumers["a"].lag_records == 0
        image = files.crash_image()
        lsn = await db.put(b"new", b"")
        assert await given(db, "a") == [lsn]
        later = files.crash_image()
        await db.checkpoint()
    for found, expected in ((image, []), (later, [lsn]), (files, [lsn])):
        async with open_memory_database(found, segment_size=TINY) as db:
            assert place(db) == 4
            assert await given(db, "a") == expected
            assert db.statistics().consumers["a"].lag_records == len(expected)


async def test_a_checkpoint_that_is_frozen_early_has_the_places_of_its_lsn(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files, segment_size=TINY) as db:
        await fill(db, 10)
        await acknowledge(db, "a", 5)
        async with db.consumer("a") as consumer, trio.open_nursery() as nursery:
            items = await take(consumer, 5)
            files.hold()
            nursery.start_soon(db.checkpoint)
            nursery.start_soon(consumer.acknowledge, items[0])
            await wait_all_tasks_blocked()
            nursery.start_soon(consumer.acknowledge, items[1])
            await wait_all_tasks_blocked()
            files.release()
        assert place(db) == 7
        image = files.crash_image(kind="kill")
    async with open_memory_database(image, segment_size=TINY) as db:
        assert place(db) == 7
        assert await given(db, "a") == [8, 9, 10]


@pytest.mark.parametrize("again", [False, True], ids=["new", "again"])
async def test_a_consumer_that_no_checkpoint_knows_holds_what_it_has_yet_to_see(
    files: MemoryFiles, again: bool
) -> None:
    async def checkpoint(db: Any) -> None:
        await db.checkpoint()
        for _ in range(20):
            await trio.lowlevel.checkpoint()

    async with open_memory_database(files, segment_size=TINY) as db:
        lsns = await fill(db, 12)
        await acknowledge(db, "slow", lsns[0])
        if again:
            await acknowledge(db, "a", lsns[-1])
        await checkpoint(db)
        if again:
            await db.drop_consumer("a")
        async with db.consumer("a", start=lsns[2]):
            pass
        # From here on nobody but the new one holds the log.
        await db.drop_consumer("slow")
        image = files.crash_image()
    async with open_memory_database(image, segment_size=TINY) as db:
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert db.wal.first_lsn <= lsns[2]
        await acknowledge(db, "a", lsns[5])
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        assert db.wal.first_lsn <= lsns[2], "where durability is less, a crash may take it back"
        await checkpoint(db)
        assert await given(db, "a") == lsns[6:]
        await acknowledge(db, "a", lsns[-1])
        await checkpoint(db)
        await checkpoint(db)
        assert db.wal.first_lsn > lsns[2], "and it lets go of it afterwards"


async def test_a_consumer_whose_hold_was_dropped_comes_back_with_nothing(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await fill(db, 2)
        await given(db, "a")
        await db.checkpoint()
        await db.drop_consumer("a")
        await given(db, "b")
        await db.checkpoint()
    async with open_memory_database(files) as db:
        assert list(db.statistics().consumers) == ["b"]
        await db.drop_consumer("b")
        await db.checkpoint()
    async with open_memory_database(files) as db:
        assert db.statistics().consumers == {}


def test_what_a_store_says_of_places_is_checked() -> None:
    meta = {b"lsn": (7).to_bytes(8, "little"), b"log": bytes(16)}
    meta[b"format"] = STORE_FORMAT.to_bytes(2, "little")
    plain = state_of("/s", meta)
    assert plain is not None
    assert (plain.places, plain.commit_lsn) == ({}, 7)
    places = {"a": Place(3, 0, 5)}
    good = (6).to_bytes(8, "little") + encode_places(places)
    found = state_of("/s", {**meta, b"consumers": good})
    assert found is not None
    assert (found.places, found.commit_lsn) == (places, 6)
    for bad in (b"", good[:-1], (8).to_bytes(8, "little") + encode_places(places)):
        with pytest.raises(CorruptLogError):
            state_of("/s", {**meta, b"consumers": bad})


@pytest.mark.parametrize("real", [False, True])
async def test_many_long_names_are_stored(tmp_path: Any, real: bool) -> None:
    """What the store says of them takes more than a page of LMDB's."""
    path, files = (str(tmp_path / "db"), None) if real else (DB, MemoryFiles())
    names = [f"{number:02}" + "\U0001f600" * 250 for number in range(20)]
    async with trio_wal.open_database(path, files=files) as db:
        await fill(db, 2)
        for name in names:
            await acknowledge(db, name, 1)
        await db.checkpoint()
        await db.backup(f"{path}2")
    for one in (path, f"{path}2"):
        async with trio_wal.open_database(one, files=files) as db:
            assert [place(db, name) for name in names] == [1] * 20
    async with trio_wal.open_database(path, files=files) as db:
        assert await given(db, names[0]) == [2]
        for name in names:
            await db.drop_consumer(name)
        await db.checkpoint()
    async with trio_wal.open_database(path, files=files) as db:
        assert db.statistics().consumers == {}


# -- backups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("real", [False, True])
async def test_a_backup_has_the_places_of_its_lsn(tmp_path: Any, real: bool) -> None:
    path, files = (str(tmp_path / "db"), None) if real else (DB, MemoryFiles())
    copy = f"{path}-copy"
    async with trio_wal.open_database(path, files=files) as db:
        lsns = await fill(db, 4)
        await acknowledge(db, "all", lsns[-1])
        await acknowledge(db, "some", lsns[1])
        lsn = await db.backup(copy)
        await db.drop_consumer("all")
        assert await given(db, "some") == lsns[2:]
    async with trio_wal.open_database(copy, files=files) as db:
        found = db.statistics().consumers
        assert found["all"].acknowledged_lsn == lsns[-1]
        assert found["all"].lag_records == 0
        assert found["some"].acknowledged_lsn == lsns[1]
        # What came after its place is in the state that was copied, and not in a log.
        with pytest.raises(LsnTruncatedError) as caught:
            await given(db, "some")
        assert caught.value.first_lsn == lsn + 1
        new = await db.put(b"new", b"")
        async with db.consumer("all") as consumer:
            (item,) = await take(consumer, 1)
            assert item.lsn == new
            await consumer.acknowledge(item)
        await db.drop_consumer("some")
        assert await given(db, "some") == [new]
    async with trio_wal.open_database(copy, files=files) as db:
        assert await given(db, "all") == []


# -- records ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"\x02", "places of consumers are cut short"),
        (b"\x02\0\0", "a map is due, not b''"),
        (b"\x02\x01\0\0", "places of consumers are cut short"),
        (b"\x02\0\0\x80\0", "no transaction"),
        (b"\x03\0\0\x80", "does not start with"),
    ],
)
def test_what_moves_no_places_is_refused(record: bytes, reason: str) -> None:
    with pytest.raises(OperationsError, match=reason):
        decode_transaction(record)
    with pytest.raises(OperationsError):
        list(operations_in(record))


def test_a_transaction_with_moves_is_read_back() -> None:
    for count in (0, 1, 15, 16, 70_000):
        writes: Any = {b"k%d" % n: None for n in range(count)}
        moves = {"a": Move(trio_wal.Bookmark(3, 1)), "b": Move(None)}
        record = encode_placed_transaction(writes, moves)
        assert decode_transaction(record) == writes
        assert dict(operations_in(record)) == writes
        assert moves_in(record) == moves


@pytest.mark.parametrize("where", ["it was left", "it is left open"])
async def test_servers_that_do_not_answer_keep_nobody_who_has_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Neither who leaves the consumer, nor who closes the database around it."""
    monkeypatch.setattr(_stream, "AHEAD_RECORDS_MIN", 1)
    log, asked, cut = MemoryLog(CasServers()), trio.Event(), trio.Event()

    async def read(_position: int, _max_bytes: int) -> NoReturn:
        asked.set()
        try:
            await trio.sleep(log.unavailable_after)
        except trio.Cancelled:
            cut.set()
            raise
        raise Unsure("no answer")

    async with trio_wal.open_database(tmp_path / "data", log=log) as db:
        for _ in range(4):
            await db.put(b"large", bytes(300_000))
        consumer = db.consumer("a")
        await consumer.__aenter__()
        (item,) = await take(consumer, 1)
        monkeypatch.setattr(log.ways[0], "read", read)
        await consumer.acknowledge(item)
        await asked.wait()
        if where == "it was left":
            await consumer.__aexit__(None, None, None)
            await wait_all_tasks_blocked()
            assert cut.is_set()
    assert cut.is_set()
