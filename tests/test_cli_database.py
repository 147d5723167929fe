"""The commands that look into a database, and copy it, from outside of its owner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from command_line import CommandLine, everything, make_log

import trio_wal


@pytest.fixture
def cli(capfdbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capfdbinary.readouterr)


ITEMS = {
    b"acc:1": b"ten",
    b"acc:2": "zwölf".encode(),
    b"bin\xff": b"\x00\xff",
    b"large": b"x" * (3 << 20),
}


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Half of it in the store, half in the log only."""

    async def main() -> None:
        async with trio_wal.open_database(tmp_path / "bank") as db:
            await db.put(b"gone", b"soon")
            for number, (key, value) in enumerate(ITEMS.items()):
                await db.put(key, value)
                if number == 1:
                    await db.checkpoint()
            await db.delete(b"gone")

    trio.run(main)
    return tmp_path / "bank"


def contents(path: Path) -> dict[bytes, bytes]:
    async def main() -> dict[bytes, bytes]:
        async with trio_wal.open_database(path) as db:
            return dict(db.scan())

    return trio.run(main)


# -- get ------------------------------------------------------------------------------------


def test_get_prints_the_value_and_nothing_else(cli: CommandLine, bank: Path) -> None:
    assert cli("get", bank, "acc:1") == 0
    assert (cli.out, cli.err) == ("ten", "")
    found = cli.json("get", bank, "acc:2")
    assert found == {"lsn": 6, "key": {"text": "acc:2"}, "value": {"text": "zwölf"}}
    found = cli.json("get", bank, "62696eff", "--hex")
    assert found["key"] == {"base64": "Ymlu/w=="}
    assert found["value"] == {"base64": "AP8="}


def test_get_of_a_key_that_is_not_there(cli: CommandLine, bank: Path) -> None:
    assert cli("get", bank, "nobody") == 1
    assert (cli.out, cli.err) == ("", f"trio-wal: {bank}: there is no key 'nobody'\n")
    assert cli("get", bank, "gone", "--json") == 1
    assert json.loads(cli.out)["value"] is None


def test_a_wrong_key_is_a_wrong_command_line(cli: CommandLine, bank: Path) -> None:
    assert cli("get", bank, "xyz", "--hex") == 2
    assert "pairs of hexadecimal digits" in cli.err
    assert cli("get", bank, "") != 0
    assert cli("get", bank, "k" * 600) != 0
    assert "Traceback" not in cli.err


# -- scan -----------------------------------------------------------------------------------


def scanned(cli: CommandLine, bank: Path, *options: object) -> list[object]:
    assert cli("scan", bank, *options) == 0, cli.err
    return [json.loads(line) for line in cli.out.splitlines()]


def test_scan_prints_all_in_order(cli: CommandLine, bank: Path) -> None:
    rows = scanned(cli, bank)
    assert rows == [
        {"key": {"text": "acc:1"}, "value": {"text": "ten"}},
        {"key": {"text": "acc:2"}, "value": {"text": "zwölf"}},
        {"key": {"base64": "Ymlu/w=="}, "value": {"base64": "AP8="}},
        {"key": {"text": "large"}, "value": {"text": "x" * (3 << 20)}},
    ]


def test_scan_of_a_part(cli: CommandLine, bank: Path) -> None:
    keys = [{"key": {"text": "acc:1"}}, {"key": {"text": "acc:2"}}]
    assert scanned(cli, bank, "--keys", "--prefix", "acc:") == keys
    assert scanned(cli, bank, "--keys", "--prefix", "acc:", "--reverse") == keys[::-1]
    assert scanned(cli, bank, "--keys", "--limit", 1) == keys[:1]
    assert scanned(cli, bank, "--keys", "--start", "acc:2", "--stop", "b") == keys[1:]
    assert scanned(cli, bank, "--keys", "--hex", "--prefix", "6163633a") == keys
    assert scanned(cli, bank, "--limit", 0) == []
    assert cli("scan", bank, "--limit", -1) == 2
    assert cli("scan", bank, "--prefix", "a", "--stop", "b") == 2


def test_they_take_no_lock_and_write_nothing(cli: CommandLine, bank: Path) -> None:
    before = {name: kept[0] for name, kept in everything(bank).items() if "lock.mdb" not in name}
    scanned(cli, bank)
    assert cli("get", bank, "acc:1") == 0
    assert cli("consumers", bank) == 0
    after = {name: kept[0] for name, kept in everything(bank).items() if "lock.mdb" not in name}
    assert after == before


@pytest.mark.parametrize("command", ["get", "scan", "backup", "consumers"])
def test_what_is_no_database(cli: CommandLine, tmp_path: Path, command: str) -> None:
    more = {"get": ["k"], "backup": [tmp_path / "dest"]}.get(command, [])
    assert cli(command, tmp_path / "nothing", *more) == 3
    (tmp_path / "empty").mkdir(mode=0o700)
    assert cli(command, tmp_path / "empty", *more) == 3
    if command != "consumers":
        log = make_log(tmp_path / "log", [b"x"])
        assert cli(command, log, *more) == 3
        assert "this is a log" in cli.err
    assert not (tmp_path / "dest").exists()
    assert os.listdir(tmp_path / "empty") == []


# -- backup ---------------------------------------------------------------------------------


def test_backup_of_a_database_that_is_open_elsewhere(cli: CommandLine, bank: Path) -> None:
    dest = bank.parent / "copy"
    program = f"""
import sys, trio, trio_wal
async def main():
    async with trio_wal.open_database({str(bank)!r}):
        print("open", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
trio.run(main)
"""
    owner = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"open\n"
        found = cli.json("backup", bank, dest)
        assert (found["dest"], found["lsn"]) == (str(dest), 6)
        assert cli("backup", bank, dest) == 3
        assert "exists" in cli.err
    finally:
        owner.communicate(b"", timeout=240)
    assert cli("verify", dest) == 0
    assert contents(dest) == ITEMS
    assert sorted(one.name for one in bank.parent.iterdir()) == ["bank", "copy"]


def test_a_backup_has_a_history_of_its_own(cli: CommandLine, bank: Path) -> None:
    dest = bank.parent / "copy"
    assert cli("backup", bank, dest) == 0
    assert cli.out.startswith(f"{dest}: LSN 6, ")

    async def main() -> None:
        async with trio_wal.open_database(bank) as old, trio_wal.open_database(dest) as new:
            assert (old.uuid, old.durable_lsn) == (new.uuid, new.durable_lsn)
            assert new.epoch > old.epoch
            assert await new.put(b"more", b"here") == 7
            bookmark = new.wal.bookmark
            with pytest.raises(trio_wal.LogDivergedError):
                async with old.changes(bookmark):
                    raise AssertionError("another history")

    trio.run(main)


# -- consumers ------------------------------------------------------------------------------


def test_consumers_of_a_database(cli: CommandLine, bank: Path) -> None:
    assert cli("consumers", bank) == 0
    assert cli.out == "there are no consumers\n"

    async def main() -> None:
        async with trio_wal.open_database(bank) as db:
            async with db.consumer("mail", start=1) as consumer:
                commit = await consumer.__anext__()
                await consumer.acknowledge(commit)
            async with db.consumer("all") as consumer:
                async for commit in consumer:
                    if commit.lsn == 6:
                        await consumer.acknowledge(commit)
                        break
            await db.checkpoint()
            async with db.consumer("mail") as consumer:
                commit = await consumer.__anext__()
                await consumer.acknowledge(commit)

    trio.run(main)
    rows = cli.json("consumers", bank)["consumers"]
    assert [(row["name"], row["acknowledged_lsn"]) for row in rows] == [("all", 6), ("mail", 2)]
    assert rows[0]["lag_records"] == rows[0]["lag_bytes"] == 0
    assert rows[1]["lag_records"] >= 4
    assert rows[1]["lag_bytes"] > 0
    assert cli("consumers", bank) == 0
    assert [line.split()[:2] for line in cli.out.splitlines()[1:]] == [["all", "6"], ["mail", "2"]]
    copy = bank.parent / "copy"
    assert cli("backup", bank, copy) == 0
    again = cli.json("consumers", copy)["consumers"]
    assert [(row["name"], row["acknowledged_lsn"]) for row in again] == [("all", 6), ("mail", 2)]


def test_consumers_of_a_log(cli: CommandLine, tmp_path: Path) -> None:
    log = make_log(tmp_path / "log", [b"a", b"b", b"c"])
    assert cli.json("consumers", log) == {"consumers": []}

    async def main() -> None:
        async with trio_wal.open_wal(log) as wal, wal.consumer("mail") as consumer:
            await consumer.acknowledge(await consumer.__anext__())

    trio.run(main)
    (row,) = cli.json("consumers", log)["consumers"]
    assert (row["name"], row["acknowledged_lsn"], row["lag_records"]) == ("mail", 1, 2)
    assert row["lag_bytes"] > 0
    assert row["lag_seconds"] >= 0
    assert cli("consumers", "nats://127.0.0.1:1/log") == 3
