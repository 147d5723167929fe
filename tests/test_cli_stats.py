"""`trio-wal stats`: of logs, databases and logs on servers, once and again and again."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from cas import CasServers, MemoryLog
from command_line import CommandLine, finish, flip, make_log, read_terminal, segment_files, start

import trio_wal

pytest.importorskip("cyclopts")
pytest.importorskip("rich")

from trio_wal._cli import _servers

stats_module = sys.modules["trio_wal._cli.stats"]

on_posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")
FIELDS = {
    *("path", "time", "uuid", "epoch", "first_lsn", "durable_lsn", "records", "bytes"),
    *("segments", "records_per_second", "bytes_per_second", "checkpoint_lsn", "store_bytes"),
    *("replicas", "replicas_current", "consumers"),
}


@pytest.fixture
def cli(capfdbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capfdbinary.readouterr)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_module, "WATCH_SECONDS", 0.01)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two segments, and a consumer that has acknowledged a fourth."""
    path = tmp_path / "log"

    async def main() -> None:
        async with trio_wal.open_wal(path, segment_size=1) as wal:
            for _ in range(8):
                await wal.append_many([b"x" * 1000] * 5)
            async with wal.consumer("mailer") as consumer:
                async for record in consumer:
                    if record.lsn == 10:
                        await consumer.acknowledge(record)
                        break

    trio.run(main)
    return path


def test_stats_of_a_log(cli: CommandLine, log: Path) -> None:
    found = cli.json("stats", log)
    assert set(found) == FIELDS
    assert (found["first_lsn"], found["durable_lsn"], found["records"]) == (1, 40, 40)
    assert found["segments"] == len(segment_files(log)) > 1
    # Frames have headers, and are padded to whole sectors.
    assert 40_000 < found["bytes"] < 60_000
    assert found["path"] == str(log)
    (consumer,) = found["consumers"]
    assert (consumer["name"], consumer["acknowledged_lsn"]) == ("mailer", 10)
    assert consumer["lag_records"] == 30
    assert 0 < consumer["lag_bytes"] < found["bytes"]
    for name in ("records_per_second", "bytes_per_second", "checkpoint_lsn", "replicas"):
        assert found[name] is None
    assert cli("stats", log) == 0
    assert f"path             {log}\n" in cli.out
    assert "durable LSN      40\n" in cli.out
    assert "consumer mailer  30 records" in cli.out


def test_stats_of_an_empty_log(cli: CommandLine, tmp_path: Path) -> None:
    found = cli.json("stats", make_log(tmp_path / "log"))
    assert (found["records"], found["bytes"], found["consumers"]) == (0, 0, [])


def test_stats_of_a_database(cli: CommandLine, tmp_path: Path) -> None:
    async def main() -> None:
        async with trio_wal.open_database(tmp_path / "db") as db:
            for number in range(10):
                await db.put(b"%d" % number, b"value")
                if number == 5:
                    await db.checkpoint()
            async with db.consumer("mailer"):
                pass

    trio.run(main)
    found = cli.json("stats", tmp_path / "db")
    assert (found["durable_lsn"], found["checkpoint_lsn"]) == (11, 6)
    assert found["store_bytes"] > 0
    assert found["path"] == str(tmp_path / "db")
    assert [one["name"] for one in found["consumers"]] == ["mailer"]
    assert cli("stats", tmp_path / "db") == 0
    assert "checkpoint       LSN 6, 5 after it\n" in cli.out


def test_stats_of_a_log_on_servers(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = CasServers()
    log = MemoryLog(servers)
    monkeypatch.setattr(_servers, "parse", lambda url: log)

    async def write() -> None:
        async with trio_wal.open_wal(log) as wal:
            await wal.append_many([b"record"] * 3)

    trio.run(write)
    found = cli.json("stats", "nats://host/orders")
    assert (found["durable_lsn"], found["records"], found["segments"]) == (3, 3, None)
    assert (found["replicas"], found["replicas_current"]) == (3, 3)
    assert found["bytes"] == servers.bytes
    assert cli("stats", "nats://host/orders", "--watch", "--count", 2, "--json") == 0
    first, second = map(json.loads, cli.out.splitlines())
    assert (first["records_per_second"], second["records_per_second"]) == (None, 0.0)
    assert cli("stats", "nats://host/orders") == 0
    assert "3 of 3 up to date" in cli.out


async def test_a_log_that_is_written_is_watched(tmp_path: Path) -> None:
    """Its owner notices nothing; each look is a line."""
    path = tmp_path / "log"
    async with trio_wal.open_wal(path, segment_size=1) as wal:
        await wal.append(b"record")
        process = start("stats", path, "--watch", "--json")
        assert process.stdout is not None
        looks: list[Any] = []

        async def look_for(lsn: int) -> Any:
            """The disk may take longer than there is between two looks."""
            assert process.stdout is not None
            while not looks or looks[-1]["durable_lsn"] < lsn:
                line = await trio.to_thread.run_sync(process.stdout.readline)
                looks.append(json.loads(line))
            return looks[-1]

        await look_for(1)
        await wal.append_many([bytes(1000)] * 100)
        second = await look_for(101)
        await wal.append_many([bytes(1000)] * 100)
        third = await look_for(201)
    process.kill()
    finish(process)
    assert looks[0]["records_per_second"] is None
    assert (second["durable_lsn"], third["durable_lsn"]) == (101, 201)
    for look in (second, third):
        assert look["records_per_second"] > 0
        assert look["bytes_per_second"] > look["records_per_second"]
    times = [look["time"] for look in looks]
    assert times == sorted(set(times))


def test_without_a_terminal_each_look_is_a_line_for_people(cli: CommandLine, log: Path) -> None:
    assert cli("stats", log, "--watch", "--count", 2) == 0
    first, second = cli.out.splitlines()
    assert "durable LSN 40" in first
    assert "records/s" not in first
    assert "0 records/s" in second
    assert "mailer 30 behind" in second


async def test_rates_of_a_log_whose_end_was_cut_are_not_known(tmp_path: Path) -> None:
    async with (
        trio_wal.open_wal(tmp_path / "log") as wal,
        stats_module._opened(str(tmp_path / "log")) as look,
    ):

        async def look_for(lsn: int, before: Any) -> Any:
            """The owner tells others a moment after it knows."""
            while True:
                found = await look(before)
                if found.durable_lsn == lsn:
                    return found

        await wal.append_many([b"record"] * 9)
        first = await look_for(9, None)
        await wal.truncate_after(3)
        second = await look_for(await wal.append(b"record"), first)
        assert (second.durable_lsn, second.records_per_second) == (4, None)
        third = await look_for(await wal.append(b"record"), second)
        assert third.records_per_second > 0


@on_posix
def test_a_terminal_is_redrawn_until_ctrl_c(log: Path) -> None:
    import pty

    terminal, other_side = pty.openpty()
    process = start("stats", log, "--watch", stdout=other_side, env={"TERM": "xterm"})
    os.close(other_side)
    # The second look has a rate.
    shown = read_terminal(terminal, until=b"per second")
    os.killpg(process.pid, signal.SIGINT)
    while read_terminal(terminal, until=b"\0"):
        pass
    os.close(terminal)
    code, _, err = finish(process)
    assert (code, err) == (130, b"")
    assert b"durable LSN" in shown
    assert b"consumer mailer" in shown


def test_damage_is_a_finding(cli: CommandLine, log: Path) -> None:
    flip(segment_files(log)[0], 100)
    assert cli("stats", log) == 1
    assert cli.out == ""
    assert "wal-00000000000000000001.log" in cli.err


@pytest.mark.parametrize("arguments", [("--count", "2"), ("--watch", "--count", "0")])
def test_a_count_goes_with_watch(cli: CommandLine, log: Path, arguments: tuple[str, ...]) -> None:
    assert cli("stats", log, *arguments) == 2
    assert "must be 1 or more, and goes with --watch" in cli.err


def test_what_is_not_there_is_an_error_of_one_line(cli: CommandLine, tmp_path: Path) -> None:
    assert cli("stats", tmp_path / "nothing") == 3
    assert len(cli.err.splitlines()) == 1
