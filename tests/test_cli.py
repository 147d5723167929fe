"""The command line: what it prints, what it returns, and what it leaves alone."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from command_line import (
    CommandLine,
    everything,
    finish,
    flip,
    lines_of,
    make_log,
    read_terminal,
    segment_files,
    start,
)
from msgspec.structs import replace
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal._cli import run
from trio_wal._cli.dump import dump
from trio_wal._disk.chain import META_NAME
from trio_wal._disk.frame import BLOCK, decode_meta, decode_segment_header, segment_name
from trio_wal._disk.opening import open_log_directory
from trio_wal._system.files import OsFiles
from trio_wal.testing import MemoryFiles

append_module = sys.modules["trio_wal._cli.append"]
READING = ("dump", "inspect", "stats", "verify")
PAYLOAD = bytes(1000)
on_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and terminals")


@pytest.fixture
def cli(capsysbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capsysbinary.readouterr)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Three records in two batches."""
    return make_log(tmp_path / "log", [b"one", b"two"], [b"three"])


@pytest.fixture
def long_log(tmp_path: Path) -> Path:
    """Forty records, one a batch, in several segments."""
    records = ([b"%d" % i + PAYLOAD] for i in range(40))
    return make_log(tmp_path / "long", *records, segment_size=16 * 1024)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Sets what the command reads from standard input."""
    with contextlib.ExitStack() as stack:

        def give(data: bytes) -> None:
            file = tmp_path / "stdin"
            file.write_bytes(data)
            monkeypatch.setattr(sys, "stdin", stack.enter_context(file.open()))

        yield give


# -- append -----------------------------------------------------------------------------


def test_each_line_becomes_a_record_without_its_newline(
    cli: CommandLine, stdin: Any, tmp_path: Path
) -> None:
    path = tmp_path / "new"
    stdin(b"one\n\n\xff\xfe\r\nlast")
    assert cli("append", path) == 0
    assert lines_of(path) == [b"one", b"", b"\xff\xfe\r", b"last"]
    assert cli.out == f"LSN 1 to 4: 4 records, 10 bytes, durable in {path}\n"
    assert cli.err == ""


def test_lines_are_the_same_however_the_input_is_cut(
    cli: CommandLine, stdin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [b"a" * n for n in (0, 1, 7, 8, 9, 30, 0)]
    for size in range(1, 12):
        monkeypatch.setattr(append_module, "READ_BYTES", size)
        stdin(b"\n".join(lines))
        path = tmp_path / f"log{size}"
        assert cli("append", path) == 0
        # Behind the last newline there is no line.
        assert lines_of(path) == lines[:-1]


def test_append_goes_on_where_the_log_ends(cli: CommandLine, stdin: Any, log: Path) -> None:
    stdin(b"four\nfive\n")
    assert cli.json("append", log) == {
        "path": str(log),
        "first_lsn": 4,
        "last_lsn": 5,
        "records": 2,
        "bytes": 8,
    }
    assert lines_of(log) == [b"one", b"two", b"three", b"four", b"five"]


def test_without_input_nothing_is_appended(cli: CommandLine, stdin: Any, log: Path) -> None:
    stdin(b"")
    assert cli("append", log) == 0
    assert cli.out == f"no input, nothing appended to {log}\n"
    stdin(b"")
    assert cli.json("append", log)["records"] == 0
    assert lines_of(log) == [b"one", b"two", b"three"]


def test_lines_are_durable_before_append_says_so(
    stdin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = MemoryFiles()
    after: list[MemoryFiles] = []

    def open_wal(path: object) -> Any:
        return trio_wal.open_wal("/log", files=files)

    monkeypatch.setattr(append_module, "open_wal", open_wal)
    monkeypatch.setattr(append_module, "say", lambda text: after.append(files.crash(seed=1)))
    stdin(b"one\ntwo\n")
    assert run(["append", "log"]) == 0

    async def read() -> list[bytes]:
        async with trio_wal.open_wal("/log", files=after[0]) as wal, wal.read() as records:
            return [record.data async for record in records]

    assert trio.run(read) == [b"one", b"two"]


async def test_input_is_read_no_faster_than_the_disk_takes_it(
    stdin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = MemoryFiles()
    stalled = trio.Event()
    true_gate = files.gate

    async def gate() -> None:
        stalled.set()
        await true_gate()

    def open_wal(path: object) -> Any:
        return trio_wal.open_wal("/log", files=files)

    monkeypatch.setattr(files, "gate", gate)
    monkeypatch.setattr(append_module, "open_wal", open_wal)
    monkeypatch.setattr(append_module, "READ_BYTES", 100)
    stdin(b"123456789\n" * 100)
    files.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(append_module.append, Path("log"))
        await stalled.wait()
        await wait_all_tasks_blocked()
        assert os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR) == 100
        files.release()
    assert os.lseek(sys.stdin.fileno(), 0, os.SEEK_CUR) == 1000


def test_a_line_over_the_limit_is_refused_and_what_came_before_is_kept(
    cli: CommandLine, stdin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(append_module, "LINE_BYTES_MAX", 10)
    monkeypatch.setattr(append_module, "READ_BYTES", 8)
    path = tmp_path / "log"
    stdin(b"one\ntwo\nthree\n" + b"x" * 11 + b"\nfour\n")
    assert cli("append", path) == 3
    assert cli.out.startswith("LSN 1 to 3: 3 records, 11 bytes, durable in ")
    assert cli.err == (
        "trio-wal: line 4 of the input is over 10 bytes, the limit of a record; "
        "it was not appended\n"
    )
    assert lines_of(path) == [b"one", b"two", b"three"]


def test_a_log_that_somebody_has_open_is_not_appended_to(
    cli: CommandLine, stdin: Any, log: Path
) -> None:
    stdin(b"four\n")

    async def main() -> int:
        async with trio_wal.open_wal(log):
            return await trio.to_thread.run_sync(cli, "append", log)

    assert trio.run(main) == 3
    assert cli.out == ""
    assert re.match(rf"^trio-wal: .*: the log is open in process {os.getpid()}; ", cli.err)


# -- dump -------------------------------------------------------------------------------


def dumped(cli: CommandLine, *arguments: object) -> list[dict[str, Any]]:
    assert cli("dump", *arguments) == 0, cli.err
    assert cli.err == ""
    return [json.loads(line) for line in cli.out.splitlines()]


def test_dump_prints_one_object_a_record(cli: CommandLine, log: Path) -> None:
    records = dumped(cli, log)
    assert [(r["lsn"], r["text"]) for r in records] == [(1, "one"), (2, "two"), (3, "three")]
    assert all(sorted(r) == ["lsn", "text", "timestamp"] for r in records)
    times = [datetime.fromisoformat(r["timestamp"].replace("Z", "+00:00")) for r in records]
    assert times == sorted(times)
    assert times[0].utcoffset() == timedelta(0)
    assert dumped(cli, log, "--json") == records


def test_what_is_no_text_is_dumped_as_base64_and_says_so(cli: CommandLine, tmp_path: Path) -> None:
    data = [
        b"",
        b"\xff",
        b'a\0b\n\x1b[31m"\\',
        "żółw €".encode(),
        b"\xed\xa0\x80",
        bytes(range(256)),
    ]
    path = make_log(tmp_path / "log", data)
    records = dumped(cli, path)
    assert [
        r["text"].encode() if "text" in r else base64.b64decode(r["base64"]) for r in records
    ] == data
    assert ["base64" in r for r in records] == [False, True, False, False, True, True]
    assert "\x1b" not in cli.out


def test_dump_takes_the_first_and_the_last_lsn(cli: CommandLine, long_log: Path) -> None:
    def lsns(*arguments: object) -> list[int]:
        return [r["lsn"] for r in dumped(cli, long_log, *arguments)]

    assert lsns("--from", 38) == [38, 39, 40]
    assert lsns("--to", 2) == [1, 2]
    assert lsns("--from", 17, "--to", 19) == [17, 18, 19]
    assert lsns("--from", 40, "--to", 99) == [40]
    # Where the next one will be: a script may ask again and again.
    assert lsns("--from", 41) == []
    assert lsns() == list(range(1, 41))


def test_records_that_retention_dropped_are_asked_for_in_vain(
    cli: CommandLine, long_log: Path
) -> None:
    async def main() -> int:
        async with trio_wal.open_wal(long_log) as wal:
            await wal.truncate_before(30)
            return wal.first_lsn

    first = trio.run(main)
    assert cli("dump", long_log, "--from", 1) == 3
    assert cli.out == ""
    assert cli.err == (
        f"trio-wal: LSN 1 has been truncated: the log now starts at LSN {first}; read from there\n"
    )
    assert dumped(cli, long_log)[0]["lsn"] == first


async def test_follow_prints_new_records_until_the_last_that_was_asked_for(
    log: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    async with trio_wal.open_wal(log) as wal, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: dump(str(log), from_="2", to="5", follow=True))
        seen = b""
        with trio.fail_after(60):
            while seen.count(b"\n") < 2:
                await trio.lowlevel.checkpoint()
                seen += capsysbinary.readouterr().out
        for word in (b"four", b"five", b"six"):
            await wal.append(word)
    seen += capsysbinary.readouterr().out
    assert [json.loads(line)["text"] for line in seen.splitlines()] == [
        "two",
        "three",
        "four",
        "five",
    ]


def test_records_before_damage_are_dumped(cli: CommandLine, long_log: Path) -> None:
    damaged = segment_files(long_log)[1]
    flip(damaged, 4096 + 70)
    first = int(damaged.stem[4:])
    assert cli("dump", long_log) == 1
    assert [json.loads(line)["lsn"] for line in cli.out.splitlines()] == list(range(1, first))
    assert cli.err.startswith(f"trio-wal: {damaged}: at offset 4096: ")


def test_dump_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path = make_log(tmp_path / "žurnál", ["żółw €".encode()])
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, err = finish(start("dump", path, env=environment))
    assert (code, err) == (0, b"")
    assert json.loads(out.decode())["text"] == "żółw €"
    code, out, err = finish(start("inspect", path, env=environment))
    assert (code, err) == (0, b"")


# -- inspect ------------------------------------------------------------------------------


def test_inspect_lists_the_segments(cli: CommandLine, long_log: Path) -> None:
    found = cli.json("inspect", long_log)
    files = segment_files(long_log)
    rows = found["segments"]
    assert [row["file"] for row in rows] == [file.name for file in files]
    assert [row["number"] for row in rows] == list(range(1, len(files) + 1))
    assert [row["first_lsn"] for row in rows] == [int(file.stem[4:]) for file in files]
    assert [row["last_lsn"] + 1 for row in rows[:-1]] == [row["first_lsn"] for row in rows[1:]]
    assert all(row["records"] == row["last_lsn"] - row["first_lsn"] + 1 for row in rows)
    # One record a batch.
    assert all(row["frames"] == row["records"] for row in rows)
    assert [row["bytes"] for row in rows] == [file.stat().st_size for file in files]
    assert [row["used"] for row in rows[:-1]] == [file.stat().st_size for file in files[:-1]]
    assert [row["state"] for row in rows] == ["sealed"] * (len(files) - 1) + ["closed"]
    assert all(row["created"].endswith("Z") for row in rows)
    assert (found["first_lsn"], found["last_lsn"]) == (1, 40)
    assert found["bytes"] == sum(row["bytes"] for row in rows)
    assert (found["path"], found["format_version"], found["features"]) == (str(long_log), 1, [])
    assert re.match(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", found["uuid"])


def test_inspect_tells_of_a_segment_of_a_later_version(cli: CommandLine, long_log: Path) -> None:
    from trio_wal._disk.frame import _seal_sector

    segment = segment_files(long_log)[1]
    data = segment.read_bytes()
    fields = data[:8] + b"\x09\0" + data[10 : BLOCK - 4]
    segment.write_bytes(_seal_sector(fields) + data[BLOCK:])
    assert cli("inspect", long_log, "--json") == 1
    findings = json.loads(cli.out)["findings"]
    assert "format version 9 is not supported" in findings[0]["reason"]
    assert all("cause" not in finding for finding in findings)


def test_inspect_prints_a_table_that_nothing_is_cut_from(
    cli: CommandLine, long_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    found = cli.json("inspect", long_log)
    assert cli("inspect", long_log) == 0
    assert cli.err == ""
    path, head, summary, columns, *rows = cli.out.splitlines()
    assert path == str(long_log)
    assert head == f"log {found['uuid']}, format 1, features: none"
    assert summary == (
        f"40 records, LSN 1 to 40, all durable; {len(found['segments'])} segments, "
        f"{found['bytes'] / 1024:.1f} KiB"
    )
    assert re.split("  +", columns) == [
        *("segment", "first LSN", "last LSN", "records", "used", "state", "created (UTC)")
    ]
    assert [re.split("  +", row.strip())[:-1] for row in rows] == [
        [
            f"{row['number']}",
            f"{row['first_lsn']}",
            f"{row['last_lsn']}",
            f"{row['records']}",
            f"{row['used'] / 1024:.1f} KiB",
            row["state"],
        ]
        for row in found["segments"]
    ]


def test_inspect_fits_80_columns_though_its_numbers_are_large(
    cli: CommandLine, tmp_path: Path
) -> None:
    path = make_log(tmp_path / "log", [PAYLOAD])
    (segment,) = segment_files(path)
    meta = decode_meta((path / META_NAME).read_bytes())
    header = decode_segment_header(segment.read_bytes())
    header = replace(header, number=1_234_567, first_lsn=12_345_678_901)
    moved = path / segment_name(header.first_lsn)
    moved.write_bytes(header.encode() + segment.read_bytes()[BLOCK:])
    segment.unlink()
    meta = replace(meta, base_number=header.number, base_lsn=header.first_lsn)
    (path / META_NAME).write_bytes(meta.encode())
    assert cli("inspect", path) == 0
    columns, row = cli.out.splitlines()[-2:]
    assert row.split()[:3] == ["1234567", "12345678901", "-"]
    assert max(len(columns), len(row)) <= 80


def test_inspect_sees_a_log_that_is_open_and_one_that_was_killed(
    cli: CommandLine, log: Path, tmp_path: Path
) -> None:
    async def main() -> Any:
        async with trio_wal.open_wal(log) as wal:
            await wal.append(b"four")
            # Other processes are told a little later.
            async with trio_wal.open_reader(log) as reader, reader.follow(4) as records:
                await records.__anext__()
            shutil.copytree(log, killed)
            return await trio.to_thread.run_sync(cli.json, "inspect", log)

    killed = tmp_path / "killed"
    for found in (trio.run(main), cli.json("inspect", killed)):
        (row,) = found["segments"]
        assert (row["state"], row["records"], row["frames"]) == ("active", 4, 3)
        assert found["last_lsn"] == 4
    (row,) = cli.json("inspect", log)["segments"]
    assert row["state"] == "closed"


def test_inspect_sees_a_rotation_that_a_crash_cut_short(cli: CommandLine, long_log: Path) -> None:
    before_last = segment_files(long_log)[-2]
    data = before_last.read_bytes()
    # Neither footer nor pointer has reached the disk.
    before_last.write_bytes(data[:512] + bytes(512) + data[1024:-512])
    assert [row["state"] for row in cli.json("inspect", long_log)["segments"]][-2:] == [
        "unsealed",
        "closed",
    ]
    assert cli("verify", long_log) == 0


def test_inspect_misses_the_segments_of_a_log_that_has_none(cli: CommandLine, log: Path) -> None:
    (segment,) = segment_files(log)
    segment.unlink()
    assert cli("inspect", log) == 1
    assert f"{segment}: at offset 0: the log's segments are missing" in cli.err


@pytest.mark.parametrize("number", [0, 2])
def test_inspect_misses_a_segment_as_verify_does(
    cli: CommandLine, long_log: Path, number: int
) -> None:
    lost = segment_files(long_log)[number]
    lost.unlink()
    assert cli("inspect", long_log) == 1
    assert f"{lost}: at offset 0: segment {number + 1} is missing: " in cli.err
    assert cli("verify", long_log) == 1
    assert f"{lost}: offset 0: segment {number + 1} is missing: " in cli.out


def test_a_segment_that_was_closed_and_then_rotated_away_is_unsealed_until_it_is_sealed(
    cli: CommandLine, log: Path
) -> None:
    (closed,) = segment_files(log)
    before = closed.read_bytes()

    async def rotate() -> None:
        async with trio_wal.open_wal(log) as wal:
            await wal._log.run_job(wal._log.engine.rotate)

    trio.run(rotate)
    closed.write_bytes(before)
    assert [row["state"] for row in cli.json("inspect", log)["segments"]] == ["unsealed", "closed"]
    assert cli("verify", log) == 0


def test_inspect_names_the_features_of_a_log(cli: CommandLine, tmp_path: Path) -> None:
    pytest.importorskip("zstandard", reason="the zstd extra is not installed")
    path = make_log(tmp_path / "log", [PAYLOAD], compression="zstd")
    assert cli.json("inspect", path)["features"] == ["zstd"]
    assert cli("inspect", path) == 0
    assert "features: zstd\n" in cli.out
    assert cli.json("verify", path)["features"] == ["zstd"]


def test_a_log_whose_creation_was_cut_short_can_be_looked_at(
    cli: CommandLine, tmp_path: Path
) -> None:
    path = make_log(tmp_path / "log")
    meta = replace(decode_meta((path / META_NAME).read_bytes()), live=False)
    (path / META_NAME).write_bytes(meta.encode())
    assert cli.json("inspect", path)["segments"] == []
    assert dumped(cli, path) == []
    assert cli("verify", path) == 0


def test_inspect_shows_a_segment_of_an_impossible_time(cli: CommandLine, tmp_path: Path) -> None:
    """A log may have been created on a machine without a clock."""
    path = make_log(tmp_path / "log", [PAYLOAD])
    (segment,) = segment_files(path)
    data = segment.read_bytes()
    for time_us, year in ((-1, "1970-01-01"), (2**62, "9999-12-31")):
        header = replace(decode_segment_header(data), created_us=time_us)
        segment.write_bytes(header.encode() + data[BLOCK:])
        # The frames do not follow this header: that is damage, and the segment is shown.
        assert cli("inspect", path, "--json") == 1
        (row,) = json.loads(cli.out)["segments"]
        assert row["created"].startswith(year)


def test_dump_refuses_what_is_no_transaction_in_a_databases_log(
    cli: CommandLine, tmp_path: Path
) -> None:
    path = str(tmp_path / "log")
    log = open_log_directory(OsFiles(), path, segment_size=1, database=True)
    log.write([b"no transaction"], 0, sync=True)
    log.close()
    assert cli("dump", path) == 1
    assert re.match(rf"^trio-wal: {re.escape(path)}: .*: LSN 1: a transaction does not", cli.err)


def test_an_empty_log_can_be_looked_at(cli: CommandLine, tmp_path: Path) -> None:
    path = make_log(tmp_path / "log")
    assert dumped(cli, path) == []
    assert cli("inspect", path) == 0
    assert "\n0 records; 1 segment, " in cli.out
    assert cli("verify", path) == 0
    assert cli.out.startswith("OK: 1 segment, 0 frames, 0 records, ")


# -- verify -------------------------------------------------------------------------------


def test_verify_says_ok_with_counts(cli: CommandLine, log: Path) -> None:
    assert cli("verify", log) == 0
    assert re.match(r"^OK: 1 segment, 2 frames, 3 records, [\d,]+ bytes, LSN 1 to 3\n$", cli.out)
    assert cli.err == ""
    found = cli.json("verify", log)
    assert found["ok"] is True
    assert found["findings"] == []
    assert (found["segments"], found["frames"], found["records"]) == (1, 2, 3)
    assert (found["first_lsn"], found["last_lsn"]) == (1, 3)
    assert (found["clean"], found["torn_bytes"]) == (True, 0)
    assert found["uuid"] == cli.json("inspect", log)["uuid"]


def test_verify_prints_every_finding_and_their_number(cli: CommandLine, long_log: Path) -> None:
    first, second = segment_files(long_log)[:2]
    flip(first, 4096 + 70)
    flip(second, 4096 + 70)
    second_lsn = int(second.stem[4:])
    assert cli("verify", long_log) == 1
    *findings, total = cli.out.splitlines()
    why = "checksum of the frame body does not match"
    assert findings == [
        f"{first}: offset 4096: {why} (lost: LSN 1)",
        f"{second}: offset 4096: {why} (lost: LSN {second_lsn})",
    ]
    assert total.startswith("2 findings; readable: ")
    assert ", 38 frames, 38 records, " in total
    assert cli("verify", long_log, "--json") == 1
    found = json.loads(cli.out)
    assert found["ok"] is False
    assert found["findings"] == [
        {"path": str(file), "offset": 4096, "reason": why, "first_lsn": lsn, "last_lsn": lsn}
        for file, lsn in ((first, 1), (second, second_lsn))
    ]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database whose store has LSN 1 and 2, and whose log has one more."""

    async def main() -> None:
        async with trio_wal.open_database(tmp_path / "db") as db:
            await db.put(b"a", b"1")
            await db.put(b"b", b"2")
            await db.checkpoint()
        async with trio_wal.open_database(tmp_path / "db") as db:
            await db.put(b"c", b"3")

    trio.run(main)
    return tmp_path / "db"


def test_verify_of_a_database_checks_log_and_store(cli: CommandLine, database: Path) -> None:
    before = everything(database)
    assert cli("verify", database) == 0
    first, second = cli.out.splitlines()
    assert re.match(r"^OK: 1 segment, \d+ frames, \d+ records?, [\d,]+ bytes, LSN \d to 3$", first)
    assert re.match(r"^store: 2 keys, [\d,]+ bytes, LSN 2$", second)
    found = cli.json("verify", database)
    store = {"path": str(database / "store" / "data.mdb"), "lsn": 2, "keys": 2, "note": ""}
    assert store.items() <= found["store"].items()
    assert (found["ok"], found["last_lsn"]) == (True, 3)
    assert everything(database) == before


def test_verify_of_a_database_prints_every_finding_of_its_store(
    cli: CommandLine, database: Path
) -> None:
    file = database / "store" / "data.mdb"
    content = bytearray(file.read_bytes())
    for offset in range(2 * 4096, len(content), 4096):
        content[offset + 10] = 0
    file.write_bytes(content)
    assert cli("verify", database) == 1
    *findings, total = cli.out.splitlines()
    assert all(line.startswith(f"{file}: offset ") for line in findings)
    assert total.startswith(f"{len(findings)} finding")
    assert cli("verify", "--json", database) == 1
    found = json.loads(cli.out)
    assert found["ok"] is False
    assert len(found["findings"]) == len(findings)


def test_verify_of_what_is_left_of_a_database_says_what_is_missing(
    cli: CommandLine, database: Path
) -> None:
    shutil.rmtree(database / "log")
    assert cli("verify", database) == 1
    assert (
        cli.out
        == f"{database}/log: offset 0: the database has no log\n1 finding\nstore: 2 keys, "
        + (cli.out.rpartition("keys, ")[2])
    )
    assert cli("verify", "--json", database) == 1
    assert json.loads(cli.out)["findings"][0]["reason"] == "the database has no log"


def test_verify_says_where_lmdb_could_not_be_asked(
    cli: CommandLine, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "")
    assert cli("verify", database) == 0
    why = "the pages were checked, but the store was not read through LMDB: there is no Python"
    assert f"{database}/store/data.mdb: {why}" in cli.out


@on_posix
@pytest.mark.parametrize("command", READING)
def test_a_databases_log_that_is_a_link_is_not_read(
    cli: CommandLine, database: Path, log: Path, command: str
) -> None:
    shutil.rmtree(database / "log")
    (database / "log").symlink_to(log)
    assert cli(command, database) != 0
    assert "a symbolic link and not a directory" in cli.out + cli.err
    assert "one" not in cli.out


def test_verify_says_which_records_are_lost(cli: CommandLine, long_log: Path) -> None:
    names = segment_files(long_log)
    names[1].unlink()
    names[-1].unlink()
    assert cli("verify", long_log) == 1
    middle, end, _ = cli.out.splitlines()
    lsns = [int(name.stem[4:]) for name in names]
    assert middle.endswith(f" (lost: LSN {lsns[1]} to {lsns[2] - 1})")
    assert end.endswith(f" (lost: LSN {lsns[-1]} and all behind it)")


def test_an_unfinished_batch_is_no_finding(cli: CommandLine, long_log: Path) -> None:
    last = segment_files(long_log)[-1]
    data = bytearray(last.read_bytes())
    used = len(data.rstrip(b"\0"))
    end = -(-used // 512) * 512
    data[512:1024] = bytes(512)
    data[end : end + 100] = b"\xaa" * 100
    last.write_bytes(data)
    assert cli("verify", long_log) == 0
    ok, torn = cli.out.splitlines()
    assert ok.startswith("OK: ")
    assert torn.startswith("512 bytes of an unfinished batch at the end: no damage; ")
    assert cli.json("verify", long_log)["torn_bytes"] == 512


# -- what is no log, or cannot be read ------------------------------------------------------


@pytest.mark.parametrize("command", READING)
def test_what_is_not_there_is_an_error_of_one_line(
    cli: CommandLine, command: str, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    assert cli(command, missing) == 3
    assert (cli.out, cli.err) == ("", f"trio-wal: {missing}: No such file or directory\n")
    assert not missing.exists()


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("what", ["file", "empty", "foreign"])
def test_what_is_no_log_is_an_error_and_stays_as_it_is(
    cli: CommandLine, command: str, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "thing"
    if what == "file":
        path.write_bytes(b"dear diary")
    else:
        path.mkdir()
        if what == "foreign":
            (path / "notes.txt").write_bytes(b"dear diary")
    before = everything(tmp_path)
    assert cli(command, path) == 3
    assert cli.out == ""
    assert cli.err.startswith(f"trio-wal: {path}: ")
    assert cli.err.count("\n") == 1
    assert everything(tmp_path) == before


@pytest.mark.parametrize("command", ["dump", "inspect"])
def test_damage_is_a_finding_after_what_is_whole(
    cli: CommandLine, command: str, long_log: Path
) -> None:
    segments = segment_files(long_log)
    damaged = segments[2]
    first = int(damaged.stem[4:])
    flip(damaged, 30)
    assert cli(command, long_log) == 1
    why = "checksum of the segment header does not match"
    if command == "dump":
        assert [json.loads(line)["lsn"] for line in cli.out.splitlines()] == list(range(1, first))
        assert cli.err == (
            f"trio-wal: {damaged}: at offset 0: {why}; nothing was modified; "
            "'trio-wal verify' lists every finding\n"
        )
    else:
        assert cli.err == f"trio-wal: {damaged}: at offset 0: {why}\n"
        assert cli("inspect", long_log, "--json") == 1
        found = json.loads(cli.out)
        assert [row["file"] for row in found["segments"]] == [
            segment.name for segment in segments if segment != damaged
        ]
        assert found["records"] == sum(row["records"] for row in found["segments"]) < 40
        assert found["findings"][0]["path"] == str(damaged)


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("what", ["frame", "cut", "sealed"])
def test_damage_at_the_end_of_a_log_is_a_finding_too(
    cli: CommandLine, what: str, closed: bool, long_log: Path, tmp_path: Path
) -> None:
    """Where the frames of the last segment end is the log's end only if nothing says otherwise."""
    path = long_log
    if not closed:
        path = tmp_path / "killed"

        async def kill() -> None:
            async with trio_wal.open_wal(long_log) as wal:
                for number in range(5):
                    await wal.append(b"%d" % number)
                shutil.copytree(long_log, path)

        trio.run(kill)
        (path / "lock").unlink()
    last = segment_files(path)[-1]
    if what == "frame":
        flip(last, 4096 + 20)
    elif what == "cut":
        os.truncate(last, 4096)
    else:
        last.unlink()
    code = 1 if closed or what != "cut" else 0
    for command in ("inspect", "dump", "verify"):
        assert cli(command, path) == code, command
        assert bool(cli.err) is (code == 1 and command != "verify")
    assert cli("inspect", path, "--json") == code
    found = json.loads(cli.out)
    # What is said of the whole is what is said of its parts.
    assert found["records"] == sum(row["records"] for row in found["segments"])
    assert found["last_lsn"] == found["segments"][-1]["last_lsn"]
    assert bool(found["findings"]) is bool(code)


def test_records_that_are_not_known_to_be_durable_are_counted_and_said_to_be(
    cli: CommandLine, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"

    async def main() -> None:
        async with trio_wal.open_wal(tmp_path / "log") as wal:
            for record in (b"one", b"two"):
                await wal.append(record)
            shutil.copytree(tmp_path / "log", killed)

    trio.run(main)
    (killed / "lock").unlink()
    assert cli("inspect", killed) == 0
    assert "\n2 records, LSN 1 to 2, known to be durable up to 1; 1 segment, " in cli.out
    found = cli.json("inspect", killed)
    assert (found["records"], found["last_lsn"], found["durable_lsn"]) == (2, 2, 1)
    assert [row["records"] for row in found["segments"]] == [2]


def test_a_start_beyond_the_end_is_said_to_be(cli: CommandLine, log: Path) -> None:
    for options in ([], ["--to", 120]):
        assert cli("dump", log, "--from", 99, *options) == 1
        assert cli.out == ""
        assert cli.err == (
            f"trio-wal: {log}: --from 99 is beyond the end: the newest durable record is LSN 3\n"
        )
    assert cli("dump", log, "--from", 99, "--follow") == 1
    assert (cli.out, cli.err.count("\n")) == ("", 1)
    assert cli("dump", log, "--from", 4) == 0
    assert (cli.out, cli.err) == ("", "")


@pytest.mark.parametrize("command", READING)
def test_a_log_from_the_future_is_an_error(cli: CommandLine, command: str, log: Path) -> None:
    from trio_wal._disk.frame import META_MAGIC, _seal_sector

    (log / "log.meta").write_bytes(_seal_sector(META_MAGIC + b"\x02\x00"))
    assert cli(command, log) == 3
    assert cli.out == ""
    assert cli.err.startswith(f"trio-wal: {log}/log.meta: format version 2 is not supported; ")


def test_a_disk_that_cannot_be_read_is_an_error(
    cli: CommandLine, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pread(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    assert cli("dump", log) == 3
    assert (cli.out, cli.err) == ("", "trio-wal: [Errno 5] Input/output error\n")


# -- reading commands leave everything alone ---------------------------------------------------


@pytest.mark.parametrize("command", READING)
@pytest.mark.parametrize("damaged", [False, True])
def test_reading_commands_write_nothing(
    cli: CommandLine,
    command: str,
    damaged: bool,
    long_log: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if damaged:
        flip(segment_files(long_log)[1], 4096 + 70)
    (long_log / "spare-1.tmp").write_bytes(b"left by a crash")
    before = everything(long_log)
    flags: list[int] = []
    true_open = os.open

    def watched_open(path: Any, mode: int, *rest: Any, **options: Any) -> int:
        flags.append(mode)
        return true_open(path, mode, *rest, **options)

    monkeypatch.setattr(os, "open", watched_open)
    cli(command, long_log)
    monkeypatch.undo()
    assert flags
    assert not any(mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) for mode in flags)
    assert everything(long_log) == before


def test_reading_commands_need_no_lock(cli: CommandLine, log: Path) -> None:
    async def main() -> None:
        async with trio_wal.open_wal(log) as wal:
            for command in READING:
                assert await trio.to_thread.run_sync(cli, command, log) == 0
                await wal.append(b"more")

    trio.run(main)


WRITER = """\
import sys, trio, trio_wal

async def main():
    async with trio_wal.open_wal(
        sys.argv[1], segment_size=16384, retention=trio_wal.KeepSegments(4)
    ) as wal:
        async def write():
            while True:
                if await wal.append(bytes(1500)) == 100:
                    print("ready", flush=True)
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(write)

trio.run(main)
"""


def test_reading_commands_work_on_a_log_that_is_being_written(
    cli: CommandLine, tmp_path: Path
) -> None:
    """Eight tasks append, segments are rotated and dropped, all the while."""
    path = tmp_path / "log"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == b"ready\n"
        last = 100
        rounds = 0
        # The machine may be busy: go on until the log was seen to grow.
        while rounds < 15 or last == 100:
            rounds += 1
            found = cli.json("verify", path)
            assert found["findings"] == []
            shown = cli.json("inspect", path)
            assert shown["last_lsn"] >= last
            last = shown["last_lsn"]
            code = cli("dump", path)
            lsns = [json.loads(line)["lsn"] for line in cli.out.splitlines()]
            assert lsns == list(range(lsns[0], lsns[0] + len(lsns))) if lsns else True
            # A reader that retention overtakes is told so.
            assert code == 0 or " truncated: the log now starts at " in cli.err, cli.err
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


# -- usage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "frobnicate"),
        (["verify"], "DIR"),
        (["verify", "a", "b"], "b"),
        (["verify", "--frob", "a"], "--frob"),
        (["dump", "a", "--from", "x"], "--from"),
        (["dump", "a", "--from", "0"], "--from must be an LSN, 1 or more, not 0"),
        (["dump", "a", "--to", "-3"], "--to"),
        (["dump", "a", "--from", "2026-11-29T12:00"], "--from must say its zone"),
        (["dump", "a", "--to", "yesterday"], "--to must be an LSN or a time"),
        (
            ["dump", "a", "--from", "2026-11-29T12:00Z", "--to", "2026-11-29T11:00Z"],
            "is before --from",
        ),
        (["dump", "a", "--from", "7", "--to", "6"], "--to 6 is before --from 7"),
    ],
)
def test_a_wrong_command_line_is_an_error_of_its_own(
    cli: CommandLine, arguments: list[str], message: str
) -> None:
    assert cli(*arguments) == 2
    assert cli.out == ""
    assert message in cli.err


def test_no_command_shows_the_commands_and_is_wrong_usage(cli: CommandLine) -> None:
    assert cli() == 2
    assert cli.out == ""
    for command in ("append", "demo", "dump", "inspect", "verify"):
        assert f" {command} " in cli.err


@pytest.mark.parametrize(
    "command", ["append", "bench", "demo", "dump", "inspect", "stats", "verify"]
)
def test_every_command_has_help_and_json(cli: CommandLine, command: str) -> None:
    assert cli(command, "--help") == 0
    assert f"trio-wal {command}" in cli.out
    assert "--json" in cli.out
    assert cli.err == ""


def test_the_version_is_the_packages(cli: CommandLine) -> None:
    assert cli("--version") == 0
    assert cli.out == f"{trio_wal.__version__}\n"


# -- as a program -------------------------------------------------------------------------------


def test_the_module_can_be_run(log: Path) -> None:
    code, out, err = finish(start("verify", log))
    assert (code, err) == (0, b"")
    assert out.startswith(b"OK: ")
    assert finish(start("verify", log / "missing"))[0] == 3


WITHOUT = """\
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv[1:] = [sys.argv[1], "verify", "log"]
from trio_wal.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("missing", ["cyclopts", "rich"])
def test_without_the_extra_the_program_says_what_to_install(missing: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, missing], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"trio-wal: the command line needs {missing}, which is not installed: "
        "python -m pip install 'trio-wal[cli]'\n"
    )


def test_a_compressed_log_without_its_extra_says_what_to_install(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zstandard", reason="the zstd extra is not installed")
    path = make_log(tmp_path / "log", [PAYLOAD], compression="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert cli("verify", path) == 2
    assert cli.err == (
        "trio-wal: a log with zstd compression needs the zstandard package: "
        "python -m pip install 'trio-wal[zstd]'\n"
    )


def test_the_library_loads_nothing_of_the_command_line() -> None:
    code = (
        "import sys, trio_wal, trio_wal.testing\n"
        "sys.exit(any(m.partition('.')[0] in ('cyclopts', 'rich', 'zstandard')\n"
        "             or m.startswith('trio_wal._cli') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@on_posix
def test_dump_ends_quietly_when_nobody_reads_on(long_log: Path) -> None:
    # More than a pipe holds.
    make_log(long_log, [PAYLOAD] * 200)
    process = start("dump", long_log)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b'{"lsn":1,')
    process.stdout.close()
    process.stdout = None
    code, _, err = finish(process)
    assert (code, err) == (141, b"")


@on_posix
@pytest.mark.parametrize("command", ["verify", "inspect", "append", "dump --help"])
def test_a_result_that_nobody_reads_is_dropped_quietly(command: str, log: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = start(*command.split(), log, stdout=writer)
    os.close(writer)
    code, _, err = finish(process)
    assert (code, err) == (141, b"")


@on_posix
def test_ctrl_c_ends_follow_quietly(log: Path) -> None:
    process = start("dump", log, "--follow")
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) == (130, b"", b"")


@on_posix
def test_ctrl_c_ends_a_dump_that_nobody_takes(long_log: Path) -> None:
    make_log(long_log, [PAYLOAD] * 200)
    process = start("dump", long_log)
    assert process.stdout is not None
    # It is under way, and soon blocked: a pipe does not hold all of it.
    assert process.stdout.read(1) == b"{"
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=240) == 130
    assert finish(process)[2] == b""


BLOCKED = """\
import sys
from trio_wal import _cli

def interrupted(arguments):
    print("half a result")
    raise KeyboardInterrupt

_cli._run = interrupted
sys.exit(_cli.run([]))
"""


@on_posix
def test_ctrl_c_leaves_no_output_to_wait_for() -> None:
    """The interpreter would flush it at its end, into a pipe that is full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(65536)):
            pass
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, b"x"):
            pass
    os.set_blocking(writer, True)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=240,
        check=False,
        env={name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    os.close(reader)
    os.close(writer)
    assert (done.returncode, done.stderr) == (130, b"")


@on_posix
def test_ctrl_c_ends_append_quietly_and_keeps_what_was_taken(tmp_path: Path) -> None:
    path = tmp_path / "log"
    process = start("append", path)
    assert process.stdin is not None
    process.stdin.write(b"one\ntwo\n")
    process.stdin.flush()
    follower = start("dump", path, "--follow", "--to", 2) if _wait_for(path) else None
    assert follower is not None
    # Both are durable now ...
    assert finish(follower)[0] == 0
    assert process.stdout is not None
    said = f"LSN 1 to 2: 2 records, 6 bytes, durable in {path}\n".encode()
    assert process.stdout.readline() == said
    # ... and append waits for more.
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=240) == 130
    assert finish(process) == (130, b"", b"")
    assert lines_of(path) == [b"one", b"two"]


def _wait_for(path: Path) -> bool:
    """Until another process has made its log."""

    async def main() -> bool:
        with trio.fail_after(60):
            while True:
                with contextlib.suppress(FileNotFoundError, trio_wal.WrongDirectoryError):
                    async with trio_wal.open_reader(path) as reader:
                        return reader.first_lsn == 1
                await trio.lowlevel.checkpoint()

    return trio.run(main)


# -- for people ---------------------------------------------------------------------------------


@on_posix
def test_a_terminal_gets_a_progress_bar_and_nothing_else_does(long_log: Path) -> None:
    import pty

    code, out, err = finish(start("verify", long_log))
    assert (code, err) == (0, b"")
    terminal, other_side = pty.openpty()
    process = start("verify", long_log, stderr=other_side, env={"TERM": "xterm"})
    os.close(other_side)
    shown = read_terminal(terminal, until=b"\0")
    os.close(terminal)
    assert finish(process)[:2] == (0, out)
    assert b"verifying" in shown


def test_a_name_is_shown_as_it_is(cli: CommandLine, tmp_path: Path) -> None:
    path = make_log(tmp_path / "[bold]x[/bold] :smile: ż", [b"one"])
    assert cli("inspect", path) == 0
    assert cli.out.startswith(f"{path}\nlog ")
    assert cli("verify", path / os.fsdecode(b"no\xffne")) == 3
    assert cli.err.startswith(f"trio-wal: {path}/no\\xffne: ")


# -- dump, by time and from where it was ------------------------------------------------------


def times_of(cli: CommandLine, log: Path) -> list[tuple[int, str]]:
    return [(row["lsn"], row["timestamp"]) for row in dumped(cli, log)]


def test_dump_by_time(cli: CommandLine, tmp_path: Path) -> None:
    async def main() -> None:
        async with trio_wal.open_wal(tmp_path / "log") as wal:
            for _ in range(6):
                await wal.append(b"x")
                await trio.sleep(0.002)

    trio.run(main)
    log = tmp_path / "log"
    rows = times_of(cli, log)
    third, fourth = rows[2][1], rows[3][1]
    assert [lsn for lsn, _ in rows] == [1, 2, 3, 4, 5, 6]

    def lsns(*options: object) -> list[int]:
        assert cli("dump", log, *options) == 0, cli.err
        return [json.loads(line)["lsn"] for line in cli.out.splitlines()]

    assert lsns("--from", third) == [3, 4, 5, 6]
    assert lsns("--to", third) == [1, 2, 3]
    assert lsns("--from", third, "--to", fourth) == [3, 4]
    assert lsns("--from", third, "--to", 4) == [3, 4]
    assert lsns("--from", 2, "--to", third) == [2, 3]
    assert lsns("--from", "2100-01-01T00:00+01:00") == []
    assert lsns("--to", "2000-01-01T00:00:00Z") == []


def test_dump_goes_on_where_it_was(cli: CommandLine, tmp_path: Path, log: Path) -> None:
    state = tmp_path / "state"

    def lsns(*options: object) -> list[int]:
        assert cli("dump", log, "--state", state, *options) == 0, cli.err
        return [json.loads(line)["lsn"] for line in cli.out.splitlines()]

    assert lsns("--to", 2) == [1, 2]
    assert state.read_text() == "2@0\n"
    assert lsns("--to", 2) == []
    assert lsns() == [3]
    assert lsns() == []

    async def main() -> None:
        async with trio_wal.open_wal(log) as wal:
            await wal.append(b"more")

    trio.run(main)
    assert lsns("--from", 1) == [4]

    async def cut() -> None:
        async with trio_wal.open_wal(log) as wal:
            await wal.truncate_after(2)
            await wal.append_many([b"a", b"b", b"c"])

    trio.run(cut)
    assert cli("dump", log, "--state", state) == 1
    assert "4@0" in cli.err
    state.write_text("nonsense")
    assert cli("dump", log, "--state", state) == 3
    assert "no state of a dump" in cli.err
    assert state.read_text() == "nonsense"
    assert sorted(one.name for one in tmp_path.iterdir() if "state" in one.name) == ["state"]


def test_a_follower_that_is_killed_goes_on_where_it_was(tmp_path: Path, log: Path) -> None:
    state = tmp_path / "state"
    seen: list[int] = []
    for number in range(3):
        make_log(log, [b"%d" % number])
        follower = start("dump", log, "--follow", "--state", state)
        assert follower.stdout is not None
        seen += [json.loads(follower.stdout.readline())["lsn"] for _ in range(1 if seen else 4)]
        for _ in range(12_000):
            if state.exists() and state.read_text() == f"{seen[-1]}@0\n":
                break
            time.sleep(0.01)
        else:
            pytest.fail("it does not keep where it is")
        follower.kill()
        finish(follower)
    assert seen == [1, 2, 3, 4, 5, 6]


# -- completion -----------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(cli: CommandLine, shell: str, tmp_path: Path) -> None:
    assert cli("completion", shell) == 0
    script = cli.out
    for name in ("append", "dump", "repair", "backup", "consumers", "accept-loss"):
        assert name in script
    if shutil.which(shell) is None:
        return
    path = tmp_path / "script"
    path.write_text(script)
    done = subprocess.run([shell, "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_a_command(cli: CommandLine, tmp_path: Path) -> None:
    assert cli("completion", "bash") == 0
    ask = "COMP_WORDS=(trio-wal rep); COMP_CWORD=1; _trio_wal; echo ${COMPREPLY[@]}"
    (tmp_path / "script").write_text(f"{cli.out}\n{ask}\n")
    done = subprocess.run(["bash", tmp_path / "script"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["repair"]


def test_completion_of_another_shell(cli: CommandLine) -> None:
    assert cli("completion", "csh") == 2


# -- repair ---------------------------------------------------------------------------------


def test_repair_says_what_would_be_lost_and_changes_nothing(
    cli: CommandLine, long_log: Path
) -> None:
    assert cli("repair", long_log) == 0
    assert cli.out == "OK: nothing is to be repaired\n"
    flip(segment_files(long_log)[1], 4096 + 70)
    before = {name: kept[0] for name, kept in everything(long_log).items()}
    assert cli("repair", long_log) == 1
    assert {name: kept[0] for name, kept in everything(long_log).items()} == before
    assert "would be lost: LSN " in cli.out
    assert "nothing was changed; --accept-loss does it" in cli.out
    assert cli("repair", long_log, "--json") == 1
    told = json.loads(cli.out)
    assert not told["done"]
    assert told["lost_records"] == sum(last - first + 1 for first, last in told["lost"]) > 0
    assert cli("repair", long_log, "--accept-loss") == 0
    assert f"what was there before is in {long_log}/before-repair-1" in cli.out
    assert cli("verify", long_log) == 0
    assert len(lines_of(long_log)) == told["last_lsn"]


async def test_repair_sets_a_store_aside_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "db"
    async with trio_wal.open_database(path) as db:
        await db.put(b"key", b"value")
        await db.checkpoint()

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trio_wal", "repair", str(path), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    told = await trio.to_thread.run_sync(run, "--rebuild-store")
    assert told.returncode == 1, told
    assert "the store would be set aside; the next open rebuilds it\n" in told.stdout
    done = await trio.to_thread.run_sync(run, "--rebuild-store", "--accept-loss")
    assert done.returncode == 0, done
    assert not (path / "store").exists()
    async with trio_wal.open_database(path) as db:
        assert db.get(b"key") == b"value"


def test_repair_of_what_is_no_log_or_open(cli: CommandLine, tmp_path: Path, log: Path) -> None:
    assert cli("repair", tmp_path / "nothing") == 3
    assert cli("repair", "nats://127.0.0.1:1/orders") == 3
    assert "the servers repair" in cli.err

    async def main() -> None:
        async with trio_wal.open_wal(log):
            assert cli("repair", log, "--accept-loss") == 3

    trio.run(main)
    assert cli.err.startswith(f"trio-wal: {log}: ")
