"""Errors: what their messages say, that they can be copied, and that no path can forge a line."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from databases import open_memory_database
from helpers import open_memory, open_tasks
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal.testing import MemoryFiles

HOSTILE = "/data/\x1b]0;PWNED\x07\x1b[2J\nOK: 1 segment\u202e\udcff\x9b"
SHOWN = r"/data/\x1b]0;PWNED\x07\x1b[2J\x0aOK: 1 segment\u202e\xff\u009b"

ERRORS: list[trio_wal.WalError] = [
    trio_wal.CorruptLogError(HOSTILE, 4096, f"both this file and {HOSTILE} are segment 1"),
    trio_wal.UnsupportedFormatError(HOSTILE, 2),
    trio_wal.WrongDirectoryError(HOSTILE, "a database", "open_database()"),
    trio_wal.LogLockedError(HOSTILE, 17),
    trio_wal.LogLockedError(HOSTILE, None, database=True),
    trio_wal.LogFullError(HOSTILE, 4096),
    trio_wal.LogFullError(HOSTILE, 4096, "in the way: " + HOSTILE),
    trio_wal.LogFullError(HOSTILE, 4096, database=True),
    trio_wal.RecordTooLargeError(10, 5),
    trio_wal.LsnTruncatedError(7, 3),
    trio_wal.LogFailedError(HOSTILE, "unknown"),
    trio_wal.LogLockedError(HOSTILE, None, owner=HOSTILE),
    trio_wal.LogFencedError(HOSTILE, 7, HOSTILE),
    trio_wal.LogUnavailableError(HOSTILE, 30.0, HOSTILE, "not written"),
    trio_wal.UnsupportedOperationError(HOSTILE, "truncate_after", HOSTILE),
    trio_wal.TransactionConflict(HOSTILE.encode(errors="replace")),
    trio_wal.TransactionConflict(b"\x1b\x9b\n", own=True),
    trio_wal.KeyExistsError(b"\x1b\x9b\n"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_message_is_one_line_that_a_terminal_only_shows(error: trio_wal.WalError) -> None:
    assert str(error).isprintable()
    if hasattr(error, "path"):
        # Programs get it as it is.
        assert error.path == HOSTILE
        assert str(error).startswith(f"{SHOWN}: ")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_can_be_sent_to_another_process(error: trio_wal.WalError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_a_wrong_directory_is_a_wrong_value() -> None:
    error = trio_wal.WrongDirectoryError("/x", "a database", "open_database()")
    assert isinstance(error, ValueError)
    assert not isinstance(error, trio_wal.CorruptLogError)
    assert (error.path, error.found, error.instead) == ("/x", "a database", "open_database()")
    assert str(error) == "/x: this is a database: use open_database(); nothing was modified"


# -- a handle that is closed names its path, too ------------------------------------------------


async def test_a_closed_handle_names_a_strange_path_without_harm() -> None:
    path = "/log\x1b\n"
    match = r"^/log\\x1b\\x0a: this (log|database) is closed$"
    async with trio_wal.open_wal(path, files=MemoryFiles()) as wal:
        pass
    with pytest.raises(trio.ClosedResourceError, match=match):
        await wal.append(b"record")
    async with trio_wal.open_database(path, files=MemoryFiles()) as db:
        pass
    with pytest.raises(trio.ClosedResourceError, match=match):
        db.get(b"key")


# -- who has it open, and what to do then ---------------------------------------------------------


async def test_a_database_that_is_open_twice_is_used_where_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "db"
    async with trio_wal.open_database(path):
        with pytest.raises(trio_wal.LogLockedError) as caught:
            async with trio_wal.open_database(path):
                raise AssertionError("it was opened")
        # A reader would be refused here, too.
        with pytest.raises(OSError, match="this process has the database open already"):
            async with trio_wal.open_database_reader(path):
                raise AssertionError("it was opened")
    error = caught.value
    assert (error.path, error.database) == (str(path), True)
    assert str(error) == (
        f"{path}: the database is open in process {os.getpid()}; that is this process: use the "
        "Database that is open, for reading too (see 'Several processes' in the documentation)"
    )


@pytest.mark.parametrize(
    ("database", "pid", "what", "owner", "reader"),
    [
        (True, 4711, "database", "process 4711", "open_database_reader"),
        (True, None, "database", "another process", "open_database_reader"),
        (False, 4711, "log", "process 4711", "open_reader"),
        (False, None, "log", "another process", "open_reader"),
    ],
)
def test_what_is_open_in_another_process_can_be_read(
    database: bool, pid: int | None, what: str, owner: str, reader: str
) -> None:
    other = None if pid is None else os.getpid() + 1
    owner = owner.replace("4711", str(other))
    assert str(trio_wal.LogLockedError("/data", other, database)) == (
        f"/data: the {what} is open in {owner}; close it there, or read with {reader}(), "
        "which needs no lock (see 'Several processes' in the documentation)"
    )


async def test_a_log_that_is_open_elsewhere_can_be_read(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path / "log"):
        with pytest.raises(trio_wal.LogLockedError, match=r"or read with open_reader\(\), ") as log:
            async with trio_wal.open_wal(tmp_path / "log"):
                raise AssertionError("it was opened")
    assert not log.value.database


async def test_a_database_without_space_is_not_told_to_truncate_its_log() -> None:
    for opened, database in ((open_memory_database, True), (open_memory, False)):
        files = MemoryFiles()
        files.free_bytes = 100_000
        with pytest.raises(trio_wal.LogFullError) as caught:
            async with opened(files):
                raise AssertionError("it was opened")
        assert caught.value.database is database
        assert ("truncate_before" in str(caught.value)) is not database
        assert "free disk space" in str(caught.value)
        assert caught.value.again().database is database


# -- what was forgotten ---------------------------------------------------------------------------


async def test_a_stream_that_is_not_entered_says_how_to_enter_it() -> None:
    async with open_memory_database(MemoryFiles()) as db:
        with pytest.raises(RuntimeError, match=r"^enter .*: async with db\.changes\(\) as comm"):
            await anext(aiter(db.changes()))
    async with open_memory(MemoryFiles()) as wal:
        for stream, call in ((wal.read(), "read"), (wal.follow(), "follow")):
            match = rf"^enter the stream first: async with log\.{call}\(\) as records$"
            with pytest.raises(RuntimeError, match=match):
                await anext(aiter(stream))


async def _conflict(db: Any, change: Callable[[], Any]) -> trio_wal.TransactionConflict:
    """What a transaction gets in whose block something was changed."""
    try:
        async with db.transaction() as tx:
            tx.get(b"key")
            await change()
    except trio_wal.TransactionConflict as exc:
        return exc
    raise AssertionError("it was committed")


@pytest.mark.parametrize("call", ["put", "delete"])
async def test_a_task_that_writes_past_its_own_transaction_is_told_so(call: str) -> None:
    async with open_memory_database(MemoryFiles()) as db:
        await db.put(b"key", b"1")
        change = partial(db.put, b"key", b"2") if call == "put" else partial(db.delete, b"key")
        error = await _conflict(db, change)
        assert error.own
        assert str(error) == (
            "key b'key', read by this transaction, was changed by db.put() or db.delete() in its "
            "own block, which is another commit; use tx.put() or tx.delete() there"
        )


async def test_a_conflict_with_another_task_carries_no_such_hint() -> None:
    async with open_memory_database(MemoryFiles()) as db, trio.open_nursery() as nursery:
        await db.put(b"key", b"1")

        async def change() -> None:
            # Its own, but of another key; and this one is changed by another task.
            await db.put(b"other", b"2")
            nursery.start_soon(db.put, b"key", b"3")
            await wait_all_tasks_blocked()

        error = await _conflict(db, change)
        assert not error.own
        assert str(error).endswith(
            ", read by this transaction, was changed by another commit; run it again"
        )


async def test_a_put_that_was_withdrawn_is_not_what_the_transaction_conflicts_with() -> None:
    files = MemoryFiles()
    async with open_tasks(files) as nursery, open_memory_database(files) as db:
        await db.put(b"key", b"1")

        async def change() -> None:
            files.hold()
            # One batch is under way; the next ones wait, and can be withdrawn.
            nursery.start_soon(db.put, b"other", b"2")
            await wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                scope.cancel()
                await db.put(b"key", b"2")
            files.release()
            nursery.start_soon(db.put, b"key", b"3")
            await wait_all_tasks_blocked()

        assert not (await _conflict(db, change)).own


# -- without trio ---------------------------------------------------------------------------------

OPENS: dict[str, Callable[[Any], AbstractAsyncContextManager[Any]]] = {
    "open_wal": trio_wal.open_wal,
    "open_database": trio_wal.open_database,
    "open_reader": trio_wal.open_reader,
}


@pytest.mark.parametrize("name", OPENS)
def test_another_event_loop_is_told_what_is_missing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new"

    async def main() -> None:
        async with OPENS[name](path):
            raise AssertionError("it was opened")

    match = rf"^trio_wal\.{name}\(\) needs trio, and this is asyncio: use trio_wal\.asyncio\.{name}"
    with pytest.raises(RuntimeError, match=match):
        asyncio.run(main())
    match = rf"^trio_wal\.{name}\(\) needs trio: run it under trio\.run\(\)"
    with pytest.raises(RuntimeError, match=match):
        main().send(None)
    assert not path.exists()
