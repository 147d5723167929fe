"""docs/examples/outbox.py, with sender and receiver killed."""

from __future__ import annotations

import random
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from examples import finish, kill, load, read, running

import trio_wal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets")

example = load("outbox")


async def test_each_order_is_invoiced_once_whoever_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    rng = random.Random(1)
    told: list[str] = []
    with ExitStack() as stack:
        receiver = stack.enter_context(running("outbox", "receive", "invoices.db", "s"))
        for _ in range(3):
            with running("outbox", "order", "orders.db", "s", "--count", "100000") as sender:
                told += read(sender, rng.randrange(20, 50))
                if rng.random() < 0.7:
                    kill(receiver)
                    told += read(sender, 10)
                    receiver = stack.enter_context(running("outbox", "receive", "invoices.db", "s"))
                    told += read(sender, rng.randrange(20))
                told += kill(sender)
        with running("outbox", "order", "orders.db", "s", "--count", "1") as sender:
            told += finish(sender)
        kill(receiver)
    async with trio_wal.open_database("orders.db") as db:
        ordered = dict(example.orders.scan(db))
        assert not list(example.outbox.scan(db))
        uuid = db.uuid
    async with trio_wal.open_database("invoices.db") as db:
        assert {key for key, _ in example.handled.scan(db)} == {f"{uuid}/{n}" for n in ordered}
        assert len(list(example.invoices.scan(db))) == len(ordered)
    acknowledged = [int(line.split()[1]) for line in told if line.startswith("ordered ")]
    assert len(acknowledged) >= 60
    assert sorted(ordered) == list(range(1, len(ordered) + 1))
    assert set(acknowledged) <= ordered.keys()


async def test_a_message_that_comes_again_is_dropped(tmp_path: Path) -> None:
    one, two = example.Message("a/1", "one"), example.Message("a/2", "two")
    async with trio_wal.open_database(tmp_path / "db") as db:
        await example.handle(db, [one])
        await example.handle(db, [one, two, two])
        assert dict(example.invoices.scan(db)) == {1: "one", 2: "two"}
