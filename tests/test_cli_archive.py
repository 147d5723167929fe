"""`trio-wal archive` and `trio-wal restore`: what they print, return, and leave alone."""

from __future__ import annotations

import shutil
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from archives import wait_archived
from command_line import CommandLine, everything, lines_of

import trio_wal
from trio_wal import DirectoryArchive

PAYLOAD = bytes(1000)


@pytest.fixture
def cli(capsysbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capsysbinary.readouterr)


async def _write_log(path: Path) -> None:
    archive = DirectoryArchive(path / "archive")
    async with trio_wal.open_wal(path / "log", archive=archive, segment_size=1) as wal:
        for number in range(12):
            await wal.append(b"%d" % number + PAYLOAD)
        await wait_archived(wal)


async def _write_database(path: Path) -> None:
    archive = DirectoryArchive(path / "archive")
    async with trio_wal.open_database(path / "db", archive=archive, segment_size=1) as db:
        for number in range(12):
            await db.put(b"%d" % (number % 5), b"%d" % number)
            if number == 5:
                await db.backup(path / "backup")
        await wait_archived(db.wal)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    trio.run(_write_log, tmp_path)
    return tmp_path


@pytest.fixture
def database(tmp_path: Path) -> Path:
    trio.run(_write_database, tmp_path)
    return tmp_path


def test_a_list_has_every_segment_and_backup(cli: CommandLine, database: Path) -> None:
    before = everything(database / "archive")
    assert cli("archive", "list", database / "archive") == 0
    assert cli.err == ""
    lines = cli.out.splitlines()
    assert lines[0].split() == ["kind", "LSN", "until", "(UTC)", "epoch", "bytes"]
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("backup   6 ") for line in lines)
    assert any(line.startswith("segment") and " to 12 " in line for line in lines)
    found = cli.json("archive", "list", database / "archive")
    kinds = [row["kind"] for row in found["objects"]]
    assert kinds.count("backup") == 1
    assert lines[-1].startswith(f"{kinds.count('segment')} segments, 1 backup, ")
    assert found["damaged"] == []
    for row in found["objects"]:
        assert (database / "archive" / row["object"]).stat().st_size == row["bytes"]
        if row["kind"] == "segment":
            assert datetime.fromisoformat(row["last_time"].replace("Z", "+00:00")).tzinfo
    assert everything(database / "archive") == before


def test_what_is_whole_is_ok_and_says_how_far_it_reaches(cli: CommandLine, database: Path) -> None:
    before = everything(database / "archive")
    assert cli("archive", "verify", database / "archive") == 0
    first, second = cli.out.splitlines()
    assert first.startswith("OK: ")
    assert " 1 backup, " in first
    assert second.startswith("it can be restored to LSN 1 to 12, 20")
    found = cli.json("archive", "verify", database / "archive")
    assert (found["ok"], found["first_lsn"], found["last_lsn"]) == (True, 1, 12)
    assert everything(database / "archive") == before


def test_every_problem_is_a_finding(cli: CommandLine, log: Path) -> None:
    archive = log / "archive"
    data = sorted(archive.glob("*.wal"))
    manifests = sorted(archive.glob("0*.json"))
    damaged = bytearray(data[3].read_bytes())
    damaged[4200] ^= 1
    data[3].write_bytes(damaged)
    data[6].unlink()
    manifests[8].write_text("{")
    assert cli("archive", "verify", archive) == 1
    lines = cli.out.splitlines()
    assert any(line.startswith(f"{data[3].name}: ") for line in lines)
    assert f"{data[6].name}: the object that a manifest names is missing" in lines
    assert any(line.startswith(f"{manifests[8].name}: this is not a manifest") for line in lines)
    assert any("what comes after LSN 3 is missing" in line for line in lines)
    assert lines[-2].startswith("4 findings; whole: ")
    assert lines[-1].startswith("it can be restored to LSN 1 to 3, ")
    assert cli("archive", "verify", archive, "--json") == 1
    assert cli("archive", "list", archive) == 1
    assert f"{manifests[8].name}: this is not a manifest of a segment" in cli.err


@pytest.mark.parametrize("command", ["list", "verify"])
def test_what_is_no_archive(cli: CommandLine, log: Path, command: str) -> None:
    assert cli("archive", command, log / "nowhere") == 3
    assert cli.err == f"trio-wal: {log / 'nowhere'}: there is no such directory\n"
    assert not (log / "nowhere").exists()
    assert cli("archive", command, log / "log") == 3
    assert "this is no archive" in cli.err


def test_restore_says_what_it_has_made(cli: CommandLine, log: Path) -> None:
    made = log / "made"
    assert cli("restore", log / "archive", made, "--to-lsn", 7) == 0
    first, second = cli.out.splitlines()
    assert first.startswith(f"{made}: log made, up to LSN 7, of 20")
    assert second.startswith("from 7 segments, ")
    assert cli.err == ""
    assert lines_of(made) == [b"%d" % number + PAYLOAD for number in range(7)]
    assert cli("verify", made) == 0
    report = cli.json("restore", log / "archive", log / "more")
    assert (report["last_lsn"], report["database"], report["dry_run"]) == (12, False, False)
    time = report["last_time"].replace("+00:00", "Z")
    assert cli("restore", log / "archive", log / "timed", "--to-time", time) == 0
    assert len(lines_of(log / "timed")) == 12


def test_a_dry_run_makes_nothing(cli: CommandLine, log: Path) -> None:
    before = everything(log)
    assert cli("restore", log / "archive", log / "made", "--to-lsn", 7, "--dry-run") == 0
    assert "log would be made, up to LSN 7, of " in cli.out
    assert everything(log) == before


def test_a_place_that_is_not_there_is_a_finding(cli: CommandLine, log: Path) -> None:
    before = everything(log)
    assert cli("restore", log / "archive", log / "made", "--to-lsn", 13) == 1
    assert "the log ends at LSN 12; nothing was made; it can be restored to LSN 1 to 12" in cli.err
    assert cli.out == ""
    assert everything(log) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to-lsn", "1", "--to-time", "2026-01-01T00:00:00Z"], "cannot be combined"),
        (["--to-lsn", "-1"], "to_lsn must be at least 0"),
        (["--to-time", "2026-01-01T00:00:00"], "--to-time must have a time zone"),
        (["--to-time", "noon"], "--to-time must be a time such as"),
        (["--epoch", "x"], "--epoch must be hexadecimal digits"),
    ],
)
def test_a_wrong_place_is_a_usage_error(
    cli: CommandLine, log: Path, arguments: list[str], message: str
) -> None:
    assert cli("restore", log / "archive", log / "made", *arguments) == 2
    assert message in cli.err
    assert not (log / "made").exists()


def test_what_cannot_be_is_one_line(cli: CommandLine, log: Path) -> None:
    assert cli("restore", log / "archive", log / "log") == 3
    assert cli.err == f"trio-wal: {log / 'log'}: the destination of the restore already exists\n"
    assert cli("restore", log / "nowhere", log / "made") == 3
    assert cli("restore", log, log / "made") == 3
    assert not (log / "made").exists()


def test_the_drill_of_the_operations_page(cli: CommandLine, database: Path) -> None:
    archive, drill = database / "archive", database / "drill.db"
    shutil.rmtree(database / "db" / "store")
    assert cli("archive", "verify", archive) == 0
    assert cli("restore", archive, drill, "--to-lsn", 9, "--dry-run") == 0
    would = cli.out
    assert cli("restore", archive, drill, "--to-lsn", 9) == 0
    assert cli.out == would.replace("would be made", "made")
    assert "from the backup of LSN 6 and " in cli.out
    assert cli("verify", drill) == 0
    assert "LSN 6" in cli.out
    # The disk is gone but for the log: it is the tail.
    assert cli("restore", archive, database / "new.db", "--tail", database / "db") == 0
    expected = {b"%d" % (n % 5): b"%d" % n for n in range(12)}

    async def state(path: Path) -> dict[bytes, bytes]:
        async with trio_wal.open_database(path) as db:
            return dict(db.scan())

    assert trio.run(partial(state, database / "new.db")) == expected
    assert trio.run(partial(state, drill)) == {b"%d" % (n % 5): b"%d" % n for n in range(9)}


def test_an_older_history_is_had_by_its_epoch(cli: CommandLine, tmp_path: Path) -> None:
    async def main() -> None:
        archive: Any = DirectoryArchive(tmp_path / "archive")
        async with trio_wal.open_wal(tmp_path / "log", archive=archive) as wal:
            await wal.append_many([b"one", b"two"])
            await wait_archived(wal)
            await wal.truncate_after(1)
            await wal.append(b"other")
            await wait_archived(wal)

    trio.run(main)
    rows = cli.json("archive", "list", tmp_path / "archive")["objects"]
    assert {row["epoch"] > 0 for row in rows} == {True, False}
    assert cli("restore", tmp_path / "archive", tmp_path / "new") == 0
    assert cli("restore", tmp_path / "archive", tmp_path / "old", "--epoch", "0") == 0
    assert lines_of(tmp_path / "new") == [b"one", b"other"]
    assert lines_of(tmp_path / "old") == [b"one", b"two"]
    assert cli("restore", tmp_path / "archive", tmp_path / "no", "--epoch", "17") == 3


@pytest.mark.parametrize("command", [["archive", "list"], ["archive", "verify"], ["restore"]])
def test_help_has_an_example(cli: CommandLine, command: list[str]) -> None:
    assert cli(*command, "--help") == 0
    assert f"trio-wal {' '.join(command)} /backup/" in " ".join(cli.out.split())
