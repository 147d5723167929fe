"""`Transaction`: what it sees, what it refuses, and what becomes of its commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
from databases import (
    check_content,
    commits_of,
    hold_with_batch_in_flight,
    open_memory_database,
    open_sessions,
    write,
)
from helpers import AtStep, Call, open_tasks
from hypothesis import given, settings, strategies as st
from trio.testing import assert_checkpoints, assert_no_checkpoints, wait_all_tasks_blocked

import trio_wal
from trio_wal import (
    Database,
    KeyExistsError,
    LogFailedError,
    LogFullError,
    RecordTooLargeError,
    Transaction,
    TransactionConflict,
)
from trio_wal.testing import MemoryFiles

# -- reading and writing -----------------------------------------------------------


async def test_a_transaction_sees_its_own_writes(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        async with db.transaction() as tx:
            assert (tx.get(b"a"), tx.get(b"x"), tx.get(b"x", b"0")) == (b"1", None, b"0")
            assert b"a" in tx
            assert b"x" not in tx
            tx.put(b"a", b"2")
            tx.insert(b"x", b"")
            tx.delete(b"b")
            assert (tx.get(b"a"), tx.get(b"x", b"0"), tx.get(b"b", b"0")) == (b"2", b"", b"0")
            assert b"x" in tx
            assert b"b" not in tx
            assert list(tx.scan()) == [(b"a", b"2"), (b"x", b"")]
            tx.insert(b"b", b"3")
            tx.delete(b"x")
            tx.update(b"b", b"4")
            assert list(tx.scan(reverse=True)) == [(b"b", b"4"), (b"a", b"2")]
            # Nobody else does.
            await check_content(db, {b"a": b"1", b"b": b"1"})
        await check_content(db, {b"a": b"2", b"b": b"4"})


async def test_discard_and_pop_take_a_key_that_may_be_absent(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"2", b"c": b""})
        async with db.transaction() as tx:
            assert (tx.discard(b"x"), tx.discard(b"a"), tx.discard(b"a")) == (False, True, False)
            assert (tx.pop(b"b"), tx.pop(b"c", b"0"), tx.pop(b"b", 7)) == (b"2", b"", 7)
            with pytest.raises(KeyError, match="b'b'"):
                tx.pop(b"b")
            for call in (tx.discard, tx.pop):
                with pytest.raises(ValueError, match="key must have"):
                    call(b"")
        await check_content(db, {})
        assert await db.discard(b"a") is False
        last = await db.put(b"a", b"1")
        with assert_checkpoints():
            assert await db.discard(b"a") is True
        assert db.durable_lsn == last + 1
        with assert_checkpoints():
            assert await db.discard(b"a") is False
        # Nothing was written.
        assert db.durable_lsn == last + 1


@pytest.mark.parametrize("call", ["discard", "pop", "delete_range"])
async def test_what_they_did_not_find_counts_as_read(files: MemoryFiles, call: str) -> None:
    calls: dict[str, Callable[[Transaction], object]] = {
        "discard": lambda tx: tx.discard(b"a"),
        "pop": lambda tx: tx.pop(b"a", None),
        "delete_range": lambda tx: tx.delete_range(prefix=b"a"),
    }
    async with open_memory_database(files) as db, open_sessions(db, 1) as (session,):
        await session.do(calls[call])
        await session.put(b"b", b"")
        await db.put(b"a", b"")
        assert isinstance(await session.commit(), TransactionConflict)


async def test_delete_range_removes_what_scan_would_give(files: MemoryFiles) -> None:
    names = [b"%c%c" % (a, b) for a in b"ab" for b in b"xyz"]
    async with open_memory_database(files) as db:
        await write(db, dict.fromkeys(names[:4], b"1"))
        async with db.transaction() as tx:
            for name in names[4:]:
                tx.put(name, b"2")
            tx.delete(b"ax")
            assert tx.delete_range(b"ay", b"bx") == 2
            assert [key for key, _ in tx.scan()] == [b"bx", b"by", b"bz"]
            assert tx.delete_range(prefix=b"by") == 1
            assert tx.delete_range(b"c") == 0
            with pytest.raises(ValueError, match="prefix cannot be combined"):
                tx.delete_range(b"a", prefix=b"b")
        await check_content(db, {b"bx": b"1", b"bz": b"2"})
        async with db.transaction() as tx:
            assert tx.delete_range() == 2
        await check_content(db, {})


async def test_delete_range_that_is_too_large_removes_nothing(files: MemoryFiles) -> None:
    names = [b"%03d" % number for number in range(200)]
    async with open_memory_database(files, max_record_size=2000) as db:
        for start in range(0, 200, 50):
            await write(db, dict.fromkeys(names[start : start + 50], b""))
        async with db.transaction() as tx:
            with pytest.raises(RecordTooLargeError):
                tx.delete_range()
            assert len(list(tx.scan())) == 200
            assert tx.delete_range(stop=b"100") == 100
        async with db.transaction() as tx:
            for name in names[100:190]:
                tx.put(name, b"xx")
            # They count once: what is removed needs less than what was to be put.
            assert tx.delete_range(stop=b"190") == 90
            tx.put(names[190], b"x" * (2000 - 91 * 19 - 1))
            with pytest.raises(RecordTooLargeError):
                tx.put(b"191", b"")
        assert [key for key, _ in db.scan()] == names[190:]


async def test_write_sets_and_removes_blindly_as_one(files: MemoryFiles) -> None:
    async with open_memory_database(files, max_record_size=1000) as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        with assert_checkpoints():
            assert await db.write({b"a": b"2", b"b": None, b"x": None, b"c": b""}) == 2
        await check_content(db, {b"a": b"2", b"c": b""})
        with assert_checkpoints():
            assert await db.write({}) == 2
        for bad, error in (
            ({b"": b""}, ValueError),
            ({b"k": "v"}, TypeError),
            ({"k": b"v"}, TypeError),
            ([(b"k", b"v")], TypeError),
            ({b"a": b"3", b"k": b"v" * 1000}, RecordTooLargeError),
        ):
            with pytest.raises(error):
                await db.write(bad)  # type: ignore[arg-type]
        assert db.durable_lsn == 2
        (_, commit) = await commits_of(db)
        assert {each.key: each.value for each in commit.operations} == {
            b"a": b"2",
            b"b": None,
            b"x": None,
            b"c": b"",
        }
        with trio.CancelScope() as scope:
            scope.cancel()
            await db.write({b"a": b"4"})
        assert scope.cancelled_caught
        await check_content(db, {b"a": b"2", b"c": b""})
    for call in (db.write({}), db.write({b"a": b""})):
        with pytest.raises(trio.ClosedResourceError):
            await call


@pytest.mark.parametrize("call", ["write", "discard"])
async def test_who_writes_past_its_own_block_is_told(files: MemoryFiles, call: str) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"a", b"1")
        tx = db.transaction()
        with pytest.raises(TransactionConflict) as caught:  # noqa: PT012  (the block commits)
            async with tx:
                tx.put(b"b", tx.get(b"a", b""))
                await (db.discard(b"a") if call == "discard" else db.write({b"a": None}))
        assert caught.value.own


async def test_insert_update_and_delete_ask_whether_the_key_is_there(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"there", b"1")
        async with db.transaction() as tx:
            with pytest.raises(KeyExistsError, match=r"^key b'there' exists; use put\(\) or") as e:
                tx.insert(b"there", b"2")
            assert e.value.key == b"there"
            for call in (lambda: tx.update(b"absent", b""), lambda: tx.delete(b"absent")):
                with pytest.raises(KeyError, match=r"^b'absent'$"):
                    call()
            tx.delete(b"there")
            with pytest.raises(KeyError):
                tx.delete(b"there")
            with pytest.raises(KeyError):
                tx.update(b"there", b"")
            tx.insert(b"there", b"3")
            with pytest.raises(KeyExistsError):
                tx.insert(b"there", b"4")
        await check_content(db, {b"there": b"3"})


async def test_an_exception_in_the_block_aborts_and_passes_through(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        error = RuntimeError("mine")
        tx = db.transaction()

        async def body() -> None:
            async with tx:
                tx.put(b"a", tx.get(b"b", b"1"))
                raise error

        with pytest.raises(RuntimeError, match=r"^mine$") as caught:
            await body()
        assert caught.value is error
        assert (tx.lsn, db.wal.last_lsn) == (None, 0)
        assert db.statistics().open_readers == 0
        await check_content(db, {})


async def test_abort_leaves_nothing_and_ends_the_transaction(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        async with db.transaction() as tx:
            tx.put(b"a", tx.get(b"a", b"1"))
            with assert_no_checkpoints():
                tx.abort()
                tx.abort()
            assert db.statistics().open_readers == 0
            with pytest.raises(trio.ClosedResourceError):
                tx.get(b"a")
        assert (tx.lsn, db.wal.last_lsn) == (None, 0)


async def test_commit_in_the_block_gives_the_lsn_and_ends_the_transaction(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        for lsn in (1, 2):
            async with db.transaction() as tx:
                tx.put(b"a", b"%d" % lsn)
                assert tx.lsn is None
                assert await tx.commit() == lsn
                assert tx.lsn == lsn
                with pytest.raises(trio.ClosedResourceError):
                    await tx.commit()
                tx.abort()
            assert db.wal.last_lsn == lsn
        assert [commit.lsn for commit in await commits_of(db)] == [1, 2]


USES: dict[str, Callable[[Transaction], object]] = {
    "get": lambda tx: tx.get(b"a"),
    "in": lambda tx: b"a" in tx,
    "scan": lambda tx: tx.scan(),
    "put": lambda tx: tx.put(b"a", b""),
    "insert": lambda tx: tx.insert(b"n", b""),
    "update": lambda tx: tx.update(b"a", b""),
    "delete": lambda tx: tx.delete(b"a"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
async def test_no_use_after_the_end(use: Callable[[Transaction], object]) -> None:
    async with open_memory_database(MemoryFiles()) as db:
        await db.put(b"a", b"1")
        for end in ("commit", "abort", "raise"):
            try:
                async with db.transaction() as tx:
                    tx.get(b"a")
                    if end == "abort":
                        tx.abort()
                    elif end == "raise":
                        raise KeyError(end)
            except KeyError:
                pass
            with pytest.raises(trio.ClosedResourceError, match=r"^this transaction has ended$"):
                use(tx)


@pytest.mark.parametrize("use", [*USES.values(), Transaction.abort], ids=[*USES, "abort"])
async def test_two_tasks_in_one_transaction_are_refused(
    use: Callable[[Transaction], object],
) -> None:
    async with open_memory_database(MemoryFiles()) as db:
        await db.put(b"a", b"1")
        async with db.transaction() as tx:

            async def other() -> None:
                with pytest.raises(
                    trio.BusyResourceError, match=r"^another task is using this transaction$"
                ):
                    use(tx)
                with pytest.raises(trio.BusyResourceError):
                    await tx.commit()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
            # It is still good for its own task.
            tx.put(b"b", b"2")
        assert db.get(b"b") == b"2"


async def test_a_transaction_is_for_one_use_and_must_be_entered(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        tx = db.transaction()
        with pytest.raises(RuntimeError, match=r"^enter the transaction first: async with"):
            tx.get(b"a")
        async with tx:
            pass
        with pytest.raises(RuntimeError, match=r"^a transaction can be used only once$"):
            async with tx:
                pass


# -- limits ------------------------------------------------------------------------

WRITES: dict[str, Callable[[Transaction, Any, Any], None]] = {
    "put": lambda tx, key, value: tx.put(key, value),
    "insert": lambda tx, key, value: tx.insert(key, value),
    "update": lambda tx, key, value: tx.update(key, value),
}


@pytest.mark.parametrize("call", WRITES.values(), ids=WRITES)
async def test_limits_are_checked_by_name_where_something_is_written(
    call: Callable[[Transaction, Any, Any], None],
) -> None:
    async with open_memory_database(MemoryFiles(), max_record_size=1000) as db:
        await db.put(b"there", b"")
        async with db.transaction() as tx:
            for key in (b"", b"k" * 512):
                with pytest.raises(ValueError, match=rf"^key must have 1 to .* not {len(key)}$"):
                    call(tx, key, b"")
            with pytest.raises(TypeError, match=r"^key must be bytes, not str$"):
                call(tx, "there", b"")
            key = b"there" if call is WRITES["update"] else b"new"
            for value in ("v", None, 1, bytearray(b"v")):
                with pytest.raises(TypeError, match=r"^value must be bytes, not "):
                    call(tx, key, value)
            with pytest.raises(RecordTooLargeError, match=r"max_record_size of 1000 byt") as large:
                call(tx, key, bytes(1000))
            assert large.value.limit == 1000 < large.value.size
            # None of that counts.
            assert tx.get(b"new") is None
            tx.put(b"k" * 511, bytes(400))
        assert db.get(b"k" * 511) == bytes(400)
        await db.checkpoint()
        assert db.get(b"k" * 511) == bytes(400)


@pytest.mark.parametrize("use", ["get", "in", "delete"])
async def test_keys_are_checked_by_name_where_something_is_read(use: str) -> None:
    async with open_memory_database(MemoryFiles()) as db, db.transaction() as tx:
        call: dict[str, Callable[[Any], object]] = {
            "get": tx.get,
            "in": lambda key: key in tx,
            "delete": tx.delete,
        }
        for bad in (b"", b"k" * 512):
            with pytest.raises(ValueError, match=r"^key must have 1 to 511 bytes"):
                call[use](bad)
        with pytest.raises(TypeError, match=r"^key must be bytes, not int$"):
            call[use](1)


async def test_what_put_accepts_can_be_committed_and_what_is_over_the_limit_is_refused(
    files: MemoryFiles,
) -> None:
    """To the byte: of many sizes, either `put` refuses or the commit and checkpoint pass."""
    async with open_memory_database(files, max_record_size=300) as db:
        refused = 0
        for size in range(200, 320):
            async with db.transaction() as tx:
                try:
                    tx.put(b"k" * 10, bytes(size // 2))
                    tx.put(b"l" * 3, bytes(size - size // 2))
                except RecordTooLargeError:
                    refused += 1
                    tx.abort()
        assert 40 < refused < 100
        await db.checkpoint()
        assert db.statistics().store_keys == 2


async def test_writing_a_key_again_takes_no_more_room(files: MemoryFiles) -> None:
    async with open_memory_database(files, max_record_size=1000) as db:
        async with db.transaction() as tx:
            for number in range(100):
                tx.put(b"a", bytes(500))
                tx.put(b"b", b"%d" % number)
                tx.delete(b"a")
            tx.put(b"a", bytes(900))
            with pytest.raises(RecordTooLargeError):
                tx.put(b"c", bytes(100))
        await check_content(db, {b"a": bytes(900), b"b": b"99"})


# -- scans -------------------------------------------------------------------------


async def test_a_scan_takes_ranges_prefixes_directions_and_limits(files: MemoryFiles) -> None:
    keys = [b"a", b"b", b"ba", b"bb", b"b\xff", b"b\xff\xff", b"c", b"\xff", b"\xff\xff"]
    state = {key: key for key in keys}
    async with open_memory_database(files) as db:
        # Some in the store, some in the memtable, some the transaction's own.
        await write(db, {key: state[key] for key in keys[::3]})
        await db.checkpoint()
        await write(db, {key: state[key] for key in keys[1::3]})
        async with db.transaction() as tx:
            for key in keys[2::3]:
                tx.put(key, state[key])

            def scan(**kwargs: Any) -> list[bytes]:
                items = list(tx.scan(**kwargs))
                assert all(state[key] == value for key, value in items)
                return [key for key, _ in items]

            assert scan() == sorted(keys)
            assert scan(start=b"b", stop=b"c") == [b"b", b"ba", b"bb", b"b\xff", b"b\xff\xff"]
            assert scan(start=b"b\0", stop=b"bb") == [b"ba"]
            assert scan(stop=b"ba") == [b"a", b"b"]
            assert scan(start=b"c") == [b"c", b"\xff", b"\xff\xff"]
            assert scan(start=b"c", stop=b"b") == []
            assert scan(prefix=b"b") == [b"b", b"ba", b"bb", b"b\xff", b"b\xff\xff"]
            assert scan(prefix=b"b\xff") == [b"b\xff", b"b\xff\xff"]
            assert scan(prefix=b"\xff") == [b"\xff", b"\xff\xff"]
            assert scan(prefix=b"") == sorted(keys)
            assert scan(prefix=b"d") == []
            assert scan(limit=0) == []
            assert scan(limit=3) == [b"a", b"b", b"ba"]
            assert scan(limit=100) == sorted(keys)
            assert scan(reverse=True) == sorted(keys, reverse=True)
            assert scan(reverse=True, limit=2) == [b"\xff\xff", b"\xff"]
            assert scan(prefix=b"b", reverse=True, limit=2) == [b"b\xff\xff", b"b\xff"]
            assert scan(start=b"b", stop=b"bb", reverse=True) == [b"ba", b"b"]


@pytest.mark.parametrize("where", ["transaction", "database", "snapshot"])
async def test_what_a_scan_cannot_do_is_refused_by_name_and_at_once(where: str) -> None:
    async with open_memory_database(MemoryFiles()) as db:
        async with db.transaction() as tx:
            with db.snapshot() as snap:
                scan: Any = {"transaction": tx, "database": db, "snapshot": snap}[where].scan
                for name in ("start", "stop", "prefix"):
                    with pytest.raises(TypeError, match=rf"^{name} must be bytes, not str$"):
                        scan(**{name: "a"})
                with pytest.raises(ValueError, match=r"^limit must be at least 0, not -1$"):
                    scan(limit=-1)
                with pytest.raises(TypeError, match=r"^limit must be an int, not float$"):
                    scan(limit=1.0)
                for other in ({"start": b"a"}, {"stop": b"a"}):
                    with pytest.raises(
                        ValueError, match=r"^prefix cannot be combined with start or stop$"
                    ):
                        scan(prefix=b"a", **other)
        assert db.statistics().open_readers == 0


async def test_a_scan_sees_the_writes_made_before_it(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"b": b"1", b"d": b"1"})
        async with db.transaction() as tx:
            tx.put(b"a", b"2")
            found = []
            for key, value in tx.scan():
                found.append((key, value))
                tx.put(key, b"3")
                tx.put(b"c", b"3")
                if b"d" in tx:
                    tx.delete(b"d")
            assert found == [(b"a", b"2"), (b"b", b"1"), (b"d", b"1")]
            assert dict(tx.scan()) == {b"a": b"3", b"b": b"3", b"c": b"3"}


async def test_a_scan_is_over_when_its_transaction_is(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        for own in ({}, {b"c": b""}):
            async with db.transaction() as tx:
                for key, value in own.items():
                    tx.put(key, value)
                begun, fresh = tx.scan(), tx.scan()
                assert next(begun) == (b"a", b"1")
            for items in (begun, fresh):
                with pytest.raises(trio.ClosedResourceError, match=r"^this transaction has ended$"):
                    next(items)


keys_strategy = st.binary(min_size=1, max_size=2)
states = st.dictionaries(keys_strategy, st.binary(max_size=2), max_size=12)
bounds = st.none() | st.binary(max_size=2)


@settings(max_examples=100, deadline=None)
@given(
    stored=states,
    overlay=st.dictionaries(keys_strategy, st.none() | st.binary(max_size=2), max_size=8),
    own=st.dictionaries(keys_strategy, st.none() | st.binary(max_size=2), max_size=8),
    start=bounds,
    stop=bounds,
    reverse=st.booleans(),
    limit=st.none() | st.integers(0, 6),
)
def test_a_scan_merges_store_memtable_and_own_writes(
    stored: dict[bytes, bytes],
    overlay: dict[bytes, bytes | None],
    own: dict[bytes, bytes | None],
    start: bytes | None,
    stop: bytes | None,
    reverse: bool,
    limit: int | None,
) -> None:
    async def main() -> None:
        async with open_memory_database(MemoryFiles()) as db:
            state: dict[bytes, bytes] = {}
            for number, writes in enumerate((stored, overlay, own)):
                async with db.transaction() as tx:
                    for key, value in writes.items():
                        if value is not None:
                            tx.put(key, value)
                            state[key] = value
                        elif state.pop(key, None) is not None:
                            tx.delete(key)
                    expected = sorted(
                        (
                            (key, value)
                            for key, value in state.items()
                            if (start is None or key >= start) and (stop is None or key < stop)
                        ),
                        reverse=reverse,
                    )[:limit]
                    assert list(tx.scan(start, stop, reverse=reverse, limit=limit)) == expected
                if not number:
                    await db.checkpoint()

    trio.run(main)


# -- conflicts ---------------------------------------------------------------------

STATE: dict[bytes, bytes | None] = {b"b": b"1", b"d": b"1", b"f": b"1"}


async def conflicts(
    read: Callable[[Transaction], object],
    change: dict[bytes, bytes | None],
    *,
    own: dict[bytes, bytes] | None = None,
    between: str = "nothing",
) -> bytes | None:
    """Whether a transaction that read something is refused after a change: by which key."""
    async with open_memory_database(MemoryFiles()) as db:
        await write(db, STATE)
        if between == "stored":
            await db.checkpoint()
        async with open_sessions(db, 1) as (session,):
            for key, value in (own or {}).items():
                await session.put(key, value)
            await session.do(read)
            await session.put(b"zz", b"1")
            await write(db, change)
            if between != "nothing":
                await db.checkpoint()
            outcome = await session.commit()
            assert db.statistics().conflicts == isinstance(outcome, TransactionConflict)
            assert (db.get(b"zz") is None) == isinstance(outcome, TransactionConflict)
            assert db.statistics().open_readers == 0
        return outcome.key if isinstance(outcome, TransactionConflict) else None


@pytest.mark.parametrize("between", ["nothing", "checkpoint", "stored"])
async def test_a_commit_conflicts_if_and_only_if_what_was_read_has_changed(between: str) -> None:
    async def check(
        read: Callable[[Transaction], object],
        *,
        yes: tuple[bytes, ...],
        no: tuple[bytes, ...],
        own: dict[bytes, bytes] | None = None,
    ) -> None:
        for key in yes:
            values: list[bytes | None] = [b"2", None] if key in STATE else [b"2"]
            for value in values:
                change = {key: value}
                assert await conflicts(read, change, own=own, between=between) == key, change
        for key in no:
            assert await conflicts(read, {key: b"2"}, own=own, between=between) is None, key

    await check(lambda tx: tx.get(b"b"), yes=(b"b",), no=(b"a", b"c", b"d"))
    await check(lambda tx: b"c" in tx, yes=(b"c",), no=(b"b", b"d"))
    await check(lambda tx: tx.update(b"b", b"3"), yes=(b"b",), no=(b"a",))
    await check(lambda tx: tx.delete(b"b"), yes=(b"b",), no=(b"a",))
    await check(lambda tx: tx.insert(b"c", b"3"), yes=(b"c",), no=(b"b",))
    # A blind write reads nothing.
    await check(lambda tx: tx.put(b"b", b"3"), yes=(), no=(b"b",))
    # What it wrote itself it has not read.
    await check(lambda tx: tx.get(b"b"), yes=(), no=(b"b",), own={b"b": b"3"})
    # A range counts as a whole, with what is not there.
    everything = (b"a", b"b", b"c", b"d", b"e", b"f", b"g")
    await check(lambda tx: list(tx.scan()), yes=everything, no=())
    await check(lambda tx: list(tx.scan(b"b", b"d")), yes=(b"b", b"c"), no=(b"a", b"d", b"e"))
    await check(lambda tx: list(tx.scan(b"g", b"k")), yes=(b"g", b"jj"), no=(b"f", b"k"))
    await check(lambda tx: list(tx.scan(prefix=b"c")), yes=(b"c", b"cc"), no=(b"b", b"d"))
    await check(lambda tx: list(tx.scan(b"k", b"g")), yes=(), no=(b"g", b"h", b"k"))


async def test_a_scan_that_is_left_early_counts_only_what_it_reached() -> None:
    def first(count: int, **kwargs: Any) -> Callable[[Transaction], object]:
        def read(tx: Transaction) -> None:
            for number, _ in enumerate(tx.scan(**kwargs), 1):
                if number == count:
                    break

        return read

    for read in (first(1), lambda tx: list(tx.scan(limit=1))):
        assert await conflicts(read, {b"a": b"2"}) == b"a"
        assert await conflicts(read, {b"b": b"2"}) == b"b"
        for key in (b"b\0", b"c", b"d", b"f", b"g"):
            assert await conflicts(read, {key: b"2"}) is None, key
    for read in (first(1, reverse=True), lambda tx: list(tx.scan(reverse=True, limit=1))):
        assert await conflicts(read, {b"g": b"2"}) == b"g"
        assert await conflicts(read, {b"f": b"2"}) == b"f"
        for key in (b"a", b"b", b"d", b"e"):
            assert await conflicts(read, {key: b"2"}) is None, key
    for read in (first(2, start=b"b", stop=b"e"), first(2, start=b"b", stop=b"e", reverse=True)):
        assert await conflicts(read, {b"c": b"2"}) == b"c"
        assert await conflicts(read, {b"e": b"2"}) is None
    # To the end without another item is to the end of the range.
    assert await conflicts(first(9, start=b"d"), {b"g": b"2"}) == b"g"
    # Exactly as many as the limit: nothing is known of what comes behind.
    assert await conflicts(lambda tx: list(tx.scan(limit=3)), {b"g": b"2"}) is None
    assert await conflicts(lambda tx: list(tx.scan(limit=4)), {b"g": b"2"}) == b"g"
    assert await conflicts(lambda tx: list(tx.scan(limit=0)), {b"b": b"2"}) is None
    # Its own writes lead it on as well.
    assert await conflicts(first(1), {b"a": b"2"}, own={b"aa": b""}) == b"a"
    assert await conflicts(first(1), {b"b": b"2"}, own={b"aa": b""}) is None


async def test_a_scan_that_was_not_begun_or_is_not_finished_counts_as_a_whole() -> None:
    kept: list[object] = []

    def unfinished(tx: Transaction) -> None:
        items = tx.scan()
        next(items)
        kept.append(items)

    assert await conflicts(unfinished, {b"f": b"2"}) == b"f"
    assert await conflicts(lambda tx: kept.append(tx.scan()), {b"f": b"2"}) == b"f"


async def test_reads_are_repeatable_whatever_is_committed_and_checkpointed_beside_them(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await write(db, STATE)
        async with open_sessions(db, 1) as (session,):
            assert await session.get(b"b") == b"1"
            for number in range(6):
                await write(db, {b"b": b"%d" % number, b"d": b"2", b"a": b"2"})
                if number % 2:
                    await write(db, {b"d": None})
                    await db.checkpoint()
                assert await session.get(b"b") == await session.get(b"d") == b"1"
                assert await session.get(b"a") is None
                assert await session.scan() == STATE
            assert isinstance(await session.commit(), TransactionConflict)


async def test_a_checkpoint_alone_makes_no_conflict(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, STATE)
        async with open_sessions(db, 1) as (session,):
            assert await session.get(b"b") == b"1"
            assert await session.scan(b"d") == {b"d": b"1", b"f": b"1"}
            for number in range(5):
                await db.checkpoint()
                await db.put(b"a%d" % number, b"")
            assert await session.get(b"b") == b"1"
            await session.put(b"c", b"1")
            assert await session.commit() == 7


async def test_a_transaction_open_for_many_checkpoints_that_reads_on_is_refused(
    files: MemoryFiles,
) -> None:
    """What a late read must be held against is kept for a bounded time only."""
    async with open_memory_database(files) as db:
        await write(db, STATE)
        async with open_sessions(db, 2) as (session, other):
            assert await session.get(b"b") == await other.get(b"b") == b"1"
            for number in range(4):
                await db.put(b"a%d" % number, b"")
                await db.checkpoint()
            assert await session.get(b"d") == b"1"
            assert await other.scan(b"d", b"e") == {b"d": b"1"}
            assert isinstance(await session.commit(), TransactionConflict)
            assert isinstance(await other.commit(), TransactionConflict)


async def test_a_conflict_names_the_key_and_says_so(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        tx = db.transaction()

        async def body() -> None:
            async with tx:
                tx.get(b"k")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(db.put, b"k", b"1")

        with pytest.raises(
            TransactionConflict,
            match=r"^key b'k', read by .*, was changed by another commit; run it again$",
        ) as caught:
            await body()
        assert caught.value.key == b"k"
        assert isinstance(caught.value, trio_wal.WalError)
        assert (tx.lsn, db.wal.last_lsn) == (None, 1)


async def test_a_transaction_that_only_read_what_changed_since_is_refused_too(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db, open_sessions(db, 1) as (session,):
        await session.get(b"k")
        await db.put(b"k", b"1")
        assert isinstance(await session.commit(), TransactionConflict)


async def test_a_block_without_await_never_conflicts(files: MemoryFiles) -> None:
    async with open_memory_database(files, checkpoint_bytes=3000) as db:

        async def increment() -> None:
            for _ in range(10):
                async with db.transaction() as tx:
                    for key in (b"n", b"m"):
                        tx.put(key, b"%d" % (int(tx.get(key, b"0")) + 1))
                    assert len(list(tx.scan())) == 2

        async with trio.open_nursery() as nursery:
            for _ in range(128):
                nursery.start_soon(increment)
        assert db.get(b"n") == db.get(b"m") == b"1280"
        stats = db.statistics()
        assert (stats.conflicts, stats.transactions) == (0, 1280)
        assert stats.checkpoints > 3
        # And many at a time shared a sync.
        assert stats.wal.batches_synced < 100


# -- pending commits ---------------------------------------------------------------


async def test_a_transaction_sees_what_is_pending_and_waits_for_it(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"1"})
        async with open_tasks(files) as nursery:
            files.hold()
            pending = Call(nursery, write, db, {b"a": b"2", b"b": None, b"c": b"2"})
            await wait_all_tasks_blocked()

            async def read(use: Callable[[Transaction], object]) -> int | None:
                async with db.transaction() as tx:
                    seen.append(use(tx))
                return tx.lsn

            seen: list[object] = []
            uses: list[Callable[[Transaction], object]] = [
                lambda tx: tx.get(b"a"),
                lambda tx: b"b" in tx,
                lambda tx: list(tx.scan()),
                lambda tx: next(tx.scan()),
                lambda tx: next(tx.scan(b"b")),
            ]
            calls = []
            for use in uses:
                calls.append(Call(nursery, read, use))
                await wait_all_tasks_blocked()
            both = [(b"a", b"2"), (b"c", b"2")]
            assert seen == [b"2", False, both, *both]
            assert [call.state for call in calls] == ["waiting"] * len(uses)
            # What it neither wrote nor removed nobody waits for.
            free = Call(nursery, read, lambda tx: (tx.get(b"x"), list(tx.scan(b"d"))))
            await wait_all_tasks_blocked()
            assert (free.state, free.value) == ("returned", 1)
            assert pending.state == "waiting"
            # Outside nothing of it is seen.
            assert list(db.scan()) == [(b"a", b"1"), (b"b", b"1")]
            assert db.get(b"a") == b"1"
            with db.snapshot() as snap:
                assert (snap.lsn, snap.get(b"a"), snap.get(b"c")) == (1, b"1", None)
            files.release()
            await wait_all_tasks_blocked()
            assert pending.value == 2
            assert [call.value for call in calls] == [2] * len(uses)
            assert db.get(b"a") == b"2"


async def test_a_commit_that_was_read_is_behind_what_it_read_in_the_log(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        async with open_tasks(files) as nursery:
            files.hold()

            async def append(letter: bytes) -> int | None:
                async with db.transaction() as tx:
                    tx.put(b"k", tx.get(b"k", b"") + letter)
                return tx.lsn

            calls = []
            for letter in (b"a", b"b", b"c"):
                calls.append(Call(nursery, append, letter))
                await wait_all_tasks_blocked()
            assert [call.state for call in calls] == ["waiting"] * 3
            files.release()
        assert [call.value for call in calls] == [1, 2, 3]
        assert [commit.operations[0].value for commit in await commits_of(db)] == [
            b"a",
            b"ab",
            b"abc",
        ]


async def test_a_commit_cancelled_while_queued_is_absent(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1"})
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            call = Call(nursery, write, db, {b"a": b"2", b"b": b"2"})
            await wait_all_tasks_blocked()
            assert db.statistics().pending == 2
            call.scope.cancel()
            await wait_all_tasks_blocked()
            assert call.state == "cancelled"
            assert db.statistics().pending == 1
            # At once, in memory ...
            async with open_sessions(db, 1) as (session,):
                assert await session.get(b"a") == b"1"
                assert await session.get(b"b") is None
                await session.put(b"c", b"3")
                session.commit_soon()
                await wait_all_tasks_blocked()
                files.release()
                await session.ended.wait()
        # ... and in the log.
        assert [[op.key for op in commit.operations] for commit in await commits_of(db)] == [
            [b"a"],
            [b"in flight"],
            [b"c"],
        ]
        await check_content(db, {b"a": b"1", b"c": b"3", b"in flight": b""})


async def test_a_commit_cancelled_while_it_is_written_returns_its_lsn(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        async with open_tasks(files) as nursery:
            files.hold()
            call = Call(nursery, db.put, b"a", b"1")
            await wait_all_tasks_blocked()
            call.scope.cancel()
            await wait_all_tasks_blocked()
            assert call.state == "waiting"
            files.release()
        assert (call.state, call.value) == ("returned", 1)
        await check_content(db, {b"a": b"1"})


@pytest.mark.parametrize("blocked", [False, True], ids=["queued", "blocked"])
async def test_a_commit_that_others_have_read_is_not_withdrawn(blocked: bool) -> None:
    files = MemoryFiles()
    options = {"max_queue_size": 1} if blocked else {}
    async with open_memory_database(files, **options) as db:
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            if blocked:
                Call(nursery, db.put, b"queued", b"")
                await wait_all_tasks_blocked()
            call = Call(nursery, db.put, b"a", b"1")
            await wait_all_tasks_blocked()
            assert db.wal.statistics().tasks_waiting_send == blocked
            async with open_sessions(db, 1) as (session,):
                assert await session.get(b"a") == b"1"
                call.scope.cancel()
                await wait_all_tasks_blocked()
                assert call.state == "waiting"
                assert await session.get(b"a") == b"1"
                session.commit_soon()
                await wait_all_tasks_blocked()
                assert not session.ended.is_set()
                files.release()
                await session.ended.wait()
                assert session.outcome == db.durable_lsn == call.value
        assert call.state == "returned"
        assert db.get(b"a") == b"1"


@pytest.mark.parametrize("scanned", [False, True], ids=["get", "scan"])
async def test_none_of_the_commits_that_others_have_read_is_withdrawn(
    files: MemoryFiles, scanned: bool
) -> None:
    """Whatever the order in which they were read: the older one last, too."""
    async with open_memory_database(files) as db:
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            calls = []
            for key in (b"c", b"b", b"a"):
                calls.append(Call(nursery, db.put, key, b"1"))
                await wait_all_tasks_blocked()
            async with open_sessions(db, 1) as (session,):
                if scanned:
                    assert await session.scan(b"a", b"d") == dict.fromkeys((b"a", b"b", b"c"), b"1")
                else:
                    for key in (b"a", b"c", b"b"):
                        assert await session.get(key) == b"1"
                for call in calls:
                    call.scope.cancel()
                await wait_all_tasks_blocked()
                assert [call.state for call in calls] == ["waiting"] * 3
                for key in (b"a", b"b", b"c"):
                    assert await session.get(key) == b"1"
                session.commit_soon()
                await wait_all_tasks_blocked()
                files.release()
                await session.ended.wait()
                assert session.outcome == db.durable_lsn
        assert [call.state for call in calls] == ["returned"] * 3
        for key in (b"a", b"b", b"c"):
            assert db.get(key) == b"1"


async def test_a_commit_cancelled_while_blocked_by_back_pressure_is_absent(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files, max_queue_size=1) as db:
        async with open_tasks(files) as nursery:
            await hold_with_batch_in_flight(files, nursery, db)
            calls = []
            for number in range(4):
                calls.append(Call(nursery, db.put, b"k", b"%d" % number))
                await wait_all_tasks_blocked()
            assert db.wal.statistics().tasks_waiting_send == 3
            calls[1].scope.cancel()
            calls[3].scope.cancel()
            await wait_all_tasks_blocked()
            assert [call.state for call in calls] == [
                "waiting",
                "cancelled",
                "waiting",
                "cancelled",
            ]
            files.release()
        assert db.get(b"k") == b"2"
        assert [commit.operations[0].value for commit in await commits_of(db)] == [b"", b"0", b"2"]


async def test_a_cancelled_transaction_that_waits_for_what_it_read_has_written_nothing(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db, open_tasks(files) as nursery:
        files.hold()
        Call(nursery, db.put, b"a", b"1")
        await wait_all_tasks_blocked()

        async def read() -> None:
            async with db.transaction() as tx:
                assert tx.get(b"a") == b"1"

        reader = Call(nursery, read)
        await wait_all_tasks_blocked()
        reader.scope.cancel()
        await wait_all_tasks_blocked()
        assert reader.state == "cancelled"
        assert db.statistics().open_readers == 0
        files.release()


async def test_a_commit_cancelled_at_any_step_is_whole_or_absent(files: MemoryFiles) -> None:
    """Cut after the k-th step of any task, for all k."""
    outcomes = set()
    for step in range(40):
        disk = files.crash_image(kind="kill")
        async with open_memory_database(disk) as db:
            lsn = None
            with trio.CancelScope() as scope, AtStep(step, scope.cancel):
                async with db.transaction() as tx:
                    tx.put(b"a", tx.get(b"a", b"1"))
                    await trio.lowlevel.checkpoint()
                    tx.put(b"b", b"1")
                lsn = tx.lsn
            assert lsn == tx.lsn
            assert db.statistics().open_readers == 0
            assert len(await commits_of(db)) == (lsn is not None)
            await check_content(db, {b"a": b"1", b"b": b"1"} if lsn else {})
            outcomes.add(lsn)
    assert outcomes == {None, 1}


# -- a log that refuses or fails ---------------------------------------------------


async def test_a_full_disk_takes_pending_commits_back(files: MemoryFiles) -> None:
    async with open_memory_database(files, segment_size=1) as db:
        await write(db, {b"a": b"1"})
        await wait_all_tasks_blocked()
        files.hold()
        async with open_tasks(files) as nursery:
            first = Call(nursery, db.put, b"a", bytes(100_000))
            await wait_all_tasks_blocked()
            second = Call(nursery, db.put, b"b", b"2")
            await wait_all_tasks_blocked()

            async def read() -> None:
                async with db.transaction() as tx:
                    assert tx.get(b"b") == b"2"

            async def read_and_write() -> None:
                async with db.transaction() as tx:
                    tx.put(b"c", tx.get(b"b", b""))

            readers = [Call(nursery, read), Call(nursery, read_and_write)]
            await wait_all_tasks_blocked()
            files.free_bytes = 0
            files.release()
            await wait_all_tasks_blocked()
            for call in (first, second, readers[1]):
                assert isinstance(call.error, LogFullError)
            assert isinstance(readers[0].error, TransactionConflict)
            assert readers[0].error.key == b"b"
            stats = db.statistics()
            assert (stats.pending, stats.conflicts, stats.wal.state) == (0, 1, "full")
            await check_content(db, {b"a": b"1"})
            files.free_bytes = 1e9
            assert await db.put(b"d", b"4") == 2
        await check_content(db, {b"a": b"1", b"d": b"4"})


async def test_a_transaction_that_has_read_what_a_full_disk_took_back_is_refused(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files, segment_size=1) as db, open_sessions(db, 2) as sessions:
        writer = sessions[1]
        await wait_all_tasks_blocked()
        files.hold()
        async with open_tasks(files) as nursery:
            call = Call(nursery, db.put, b"a", bytes(100_000))
            await wait_all_tasks_blocked()
            for session in sessions:
                assert await session.get(b"a") == bytes(100_000)
            await writer.put(b"b", b"2")
            files.free_bytes = 0
            files.release()
            await wait_all_tasks_blocked()
            assert isinstance(call.error, LogFullError)
            files.free_bytes = 1e9
            for session in sessions:
                outcome = await session.commit()
                assert isinstance(outcome, TransactionConflict)
                assert outcome.key == b"a"
        await check_content(db, {})


async def test_a_failed_log_takes_pending_commits_back_and_ends_all_writing(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1"})
        async with open_tasks(files) as nursery:
            files.hold()
            flying = Call(nursery, db.put, b"a", b"2")
            await wait_all_tasks_blocked()
            queued = Call(nursery, db.put, b"b", b"2")
            await wait_all_tasks_blocked()

            async def read() -> None:
                async with db.transaction() as tx:
                    assert tx.get(b"a") == b"2"

            reader = Call(nursery, read)
            await wait_all_tasks_blocked()
            files.fail("sync")
            files.release()
        for call, outcome in ((flying, "unknown"), (queued, "not written")):
            assert isinstance(call.error, LogFailedError)
            assert call.error.outcome == outcome
            assert isinstance(call.error.__cause__, OSError)
        assert isinstance(reader.error, LogFailedError)
        assert db.statistics().pending == 0
        # What is durable can be read as ever.
        await check_content(db, {b"a": b"1"})
        async with db.transaction() as tx:
            assert tx.get(b"a") == b"1"
        for call_ in (lambda: db.put(b"c", b""), lambda: write(db, {b"a": None})):
            with pytest.raises(LogFailedError) as caught:
                await call_()
            assert caught.value.outcome == "not written"
        assert db.statistics().pending == 0
        await check_content(db, {b"a": b"1"})


# -- conventions -------------------------------------------------------------------


async def test_leaving_and_committing_are_checkpoints_and_nothing_else_is(
    files: MemoryFiles,
) -> None:
    async with open_memory_database(files) as db:
        await db.put(b"a", b"1")

        async def leave(use: Callable[[Transaction], object]) -> None:
            with assert_checkpoints():
                async with db.transaction() as tx:
                    with assert_no_checkpoints():
                        use(tx)

        uses: list[Callable[[Transaction], object]] = [
            lambda tx: None,
            lambda tx: tx.get(b"a"),
            lambda tx: list(tx.scan()),
            lambda tx: tx.put(b"a", b"2"),
            lambda tx: tx.update(b"a", b"2"),
            lambda tx: tx.delete(b"a"),
            lambda tx: tx.insert(b"a", b"2"),
            lambda tx: tx.abort(),
        ]
        for use in uses:
            await leave(use)
        async with db.transaction() as tx:
            with assert_checkpoints():
                await tx.commit()
        async with db.transaction() as tx:
            tx.get(b"a")
            await db.put(b"a", b"3")
            with assert_checkpoints(), pytest.raises(TransactionConflict):
                await tx.commit()


async def test_a_cancelled_scope_lets_nothing_be_committed(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:

        async def put(db: Database) -> None:
            async with db.transaction() as tx:
                tx.put(b"a", b"1")

        for call in (
            put,
            lambda db: db.put(b"a", b"1"),
            lambda db: db.run(lambda tx: tx.put(b"a", b"1")),
        ):
            with trio.CancelScope() as scope:
                scope.cancel()
                await call(db)
            assert scope.cancelled_caught
        await check_content(db, {})
        assert db.wal.last_lsn == 0
