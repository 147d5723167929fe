"""What is said to somebody who forgets a word, or calls from the wrong place."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import pytest
import trio
from command_line import CommandLine

import trio_wal
import trio_wal.asyncio
from trio_wal.testing import MemoryFiles

OPENS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("trio_wal.open_wal", trio_wal.open_wal),
    ("trio_wal.open_reader", trio_wal.open_reader),
    ("trio_wal.open_database", trio_wal.open_database),
    ("trio_wal.open_database_reader", trio_wal.open_database_reader),
    ("trio_wal.asyncio.open_wal", trio_wal.asyncio.open_wal),
    ("trio_wal.asyncio.open_reader", trio_wal.asyncio.open_reader),
    ("trio_wal.asyncio.open_database", trio_wal.asyncio.open_database),
    ("trio_wal.asyncio.open_database_reader", trio_wal.asyncio.open_database_reader),
)
numbers = trio_wal.Table("numbers", key=int, value=int)


# -- async with -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "call"), OPENS, ids=[name for name, _ in OPENS])
def test_what_is_not_entered_says_how_to_enter_it(
    name: str, call: Callable[..., Any], tmp_path: Path
) -> None:
    opened = call(tmp_path / "log")
    with pytest.raises(
        AttributeError,
        match=rf"^{re.escape(name)}\(\) gives something to enter: async with "
        rf"{re.escape(name)}\(\.\.\.\); 'append' belongs to what that gives$",
    ):
        opened.append(b"one")
    with (
        pytest.raises(TypeError, match=rf"^{re.escape(name)}\(\) is entered by async with, not"),
        opened,
    ):
        raise AssertionError("it was entered")
    assert not hasattr(opened, "__wrapped__")
    assert list(tmp_path.iterdir()) == []


# -- tables ---------------------------------------------------------------------------------

WRITES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("put", (1, 2)),
    ("delete", (1,)),
    ("discard", (1,)),
)


@pytest.mark.parametrize(("method", "arguments"), WRITES)
async def test_a_table_does_not_take_a_database_for_a_transaction(
    method: str, arguments: tuple[int, ...]
) -> None:
    """The coroutine of `Database.put` would be dropped, and nothing be written."""
    async with trio_wal.open_database("/db", files=MemoryFiles()) as db:
        async with db.transaction() as tx:
            numbers.put(tx, 1, 1)
        with pytest.raises(
            TypeError,
            match=rf"^table 'numbers': {method}\(\) needs a trio_wal\.Transaction, not a "
            r"trio_wal\.Database: async with db\.transaction\(\) as tx$",
        ):
            getattr(numbers, method)(db, *arguments)
        assert numbers.get(db, 1) == 1


async def test_two_tables_of_one_name_are_suspected() -> None:
    texts = trio_wal.Table("numbers", key=int, value=str)
    async with trio_wal.open_database("/db", files=MemoryFiles()) as db:
        async with db.transaction() as tx:
            numbers.put(tx, 1, 2)
        with pytest.raises(
            trio_wal.TableDecodeError,
            match=r"^table 'numbers', key 1: Expected `str`, got `int`; it was written with "
            r"another type of the table, or by hand$",
        ):
            texts.get(db, 1)


async def test_a_table_pops_from_a_transaction_only() -> None:
    async with trio_wal.open_database("/db", files=MemoryFiles()) as db:
        async with db.transaction() as tx:
            numbers.put(tx, 1, 1)
        with pytest.raises(
            TypeError, match=r"pop\(\) needs a trio_wal\.Transaction, not a trio_wal\."
        ):
            numbers.pop(cast("Any", db), 1)
        assert numbers.get(db, 1) == 1


blobs = trio_wal.Table("blobs", key=int, value=bytes)
NEEDS: Final = (
    r"{} needs a trio_wal\.Transaction, not a trio_wal\.asyncio\.Transaction: "
    r"await tx\.call\(table\.{}, \.\.\.\) has one$"
)
READS: Final = (
    r"{} cannot read a trio_wal\.asyncio\.Transaction: "
    r"await db\.view\(lambda snapshot: table\.{}\(snapshot, \.\.\.\)\)$"
)


@pytest.mark.parametrize(
    ("table", "method", "arguments", "says"),
    [
        *((numbers, method, arguments, NEEDS) for method, arguments in WRITES),
        (numbers, "pop", (1,), NEEDS),
        *((table, "get", (1,), READS) for table in (numbers, blobs)),
        (numbers, "scan", (), READS),
    ],
)
def test_a_table_says_what_it_takes_under_asyncio(
    table: Any, method: str, arguments: tuple[int, ...], says: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with (
            trio_wal.asyncio.open_database(tmp_path / "db") as db,
            db.transaction() as tx,
        ):
            with pytest.raises(TypeError, match=says.format(rf"{method}\(\)", method)):
                getattr(table, method)(tx, *arguments)

    asyncio.run(main())


# -- threads --------------------------------------------------------------------------------


async def test_a_record_sent_from_a_thread_is_refused_and_breaks_nothing(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        with pytest.raises(
            RuntimeError,
            match=r"^send_nowait\(\) needs trio: run it under trio\.run\(\); from a thread of "
            r"trio's, by trio\.from_thread\.run_sync\(\)$",
        ):
            await trio.to_thread.run_sync(wal.send_nowait, b"lost")
        assert wal.statistics().records_waiting == 0
        await trio.to_thread.run_sync(trio.from_thread.run_sync, wal.send_nowait, b"sent")
        assert await wal.append(b"kept") == 2


# -- the command line -----------------------------------------------------------------------


@pytest.fixture
def cli(capsysbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capsysbinary.readouterr)


def test_a_command_says_which_of_the_two_it_wants(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, db = tmp_path / "log", tmp_path / "db"

    async def main() -> None:
        async with trio_wal.open_wal(log), trio_wal.open_database(db):
            pass

    trio.run(main)
    assert cli("scan", log) == 3
    assert cli.err == f"trio-wal: {log}: this is a log, not a database\n"
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert cli("append", db) == 3
    assert cli.err == f"trio-wal: {db}: this is a database, not a log\n"


def test_a_word_too_many_is_named(cli: CommandLine, tmp_path: Path) -> None:
    assert cli("verify", tmp_path, "extra") == 2
    assert cli.err == "trio-wal: Unexpected argument: 'extra'. See trio-wal --help.\n"


@pytest.mark.parametrize("command", ["repair", "consumers"])
def test_a_command_that_takes_no_url_offers_none(cli: CommandLine, command: str) -> None:
    assert cli(command, "--help") == 0
    assert "nats://" not in cli.out
