"""What the command line writes where: closed streams, strange names and records, full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from command_line import PROGRAM, CommandLine, finish, lines_of, make_log, segment_files, start
from hypothesis import HealthCheck, given, settings, strategies as st

import trio_wal
from trio_wal import _cli
from trio_wal._cli import run
from trio_wal._cli._output import CommandError, ExitCode

append_module = sys.modules["trio_wal._cli.append"]
dump_module = sys.modules["trio_wal._cli.dump"]
on_posix = pytest.mark.skipif(os.name != "posix", reason="POSIX streams")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes, /dev/full")
COMMANDS = ("verify", "inspect", "stats", "dump", "append", "repair", "consumers")


@pytest.fixture
def cli(capsysbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capsysbinary.readouterr)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return make_log(tmp_path / "log", [b"one", b"two"])


def in_shell(redirections: str, *arguments: object, given: bytes = b"") -> Any:
    """A command, with standard streams as a shell redirects them."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", *PROGRAM, *map(str, arguments)],
        input=given,
        capture_output=True,
        check=False,
        timeout=240,
    )


# -- closed streams -----------------------------------------------------------------------


@on_posix
@pytest.mark.parametrize("command", [*COMMANDS, "--help", "--version"])
def test_without_standard_output_nothing_is_done(command: str, log: Path) -> None:
    arguments = [command] if command.startswith("--") else [command, log]
    done = in_shell(">&-", *arguments, given=b"three\n")
    assert done.returncode == 3
    assert done.stderr == (
        b"trio-wal: standard output is closed, so there is no place for a result; "
        b"nothing was done\n"
    )
    assert lines_of(log) == [b"one", b"two"]


@on_posix
def test_without_standard_error_either_there_is_nobody_to_tell(log: Path) -> None:
    done = in_shell(">&- 2>&-", "append", log, given=b"three\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")
    assert lines_of(log) == [b"one", b"two"]


@on_posix
def test_without_standard_input_there_is_nothing_to_append(tmp_path: Path) -> None:
    done = in_shell("<&-", "append", tmp_path / "log")
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr == b"trio-wal: standard input is closed: there is nothing to append\n"
    assert not (tmp_path / "log").exists()
    assert in_shell("<&- >&- 2>&-", "append", tmp_path / "log").returncode == 3


@on_posix
@pytest.mark.parametrize("command", ["verify", "inspect", "dump"])
def test_what_needs_no_input_and_has_nothing_to_complain_of_works_without(
    command: str, log: Path
) -> None:
    whole = in_shell("", command, log)
    done = in_shell("<&- 2>&-", command, log)
    assert (done.returncode, done.stdout) == (0, whole.stdout)
    assert in_shell("2>&-", command, log / "missing").returncode == 3


@on_linux
def test_a_result_that_cannot_be_written_is_an_error(log: Path) -> None:
    for command in ("verify", "inspect", "dump", "--help"):
        arguments = [command] if command.startswith("--") else [command, log]
        done = in_shell(">/dev/full", *arguments)
        assert (done.returncode, done.stderr.count(b"\n")) == (3, 1), command
        assert b"No space left on device" in done.stderr


@on_linux
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_was_appended_is_told_even_if_the_result_cannot_be_written(
    log: Path, options: list[str]
) -> None:
    """Whoever sees an error only would append it again."""
    done = in_shell(">/dev/full", "append", log, *options, given=b"three\nfour\n")
    assert done.returncode == 3
    assert (
        done.stderr
        == (
            "trio-wal: standard output: [Errno 28] No space left on device; "
            f"LSN 3 to 4: 2 records, 9 bytes, durable in {log}\n"
        ).encode()
    )


@on_linux
def test_an_error_that_cannot_be_told_keeps_its_exit_code(tmp_path: Path) -> None:
    assert in_shell("2>/dev/full", "verify", tmp_path / "missing").returncode == 3
    assert in_shell("2>/dev/full", "frobnicate").returncode == 2


# -- the last line of defence ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (trio_wal.LogLockedError("/log", 17), 3, "trio-wal: /log"),
        (OSError(errno.EIO, "Input/output error", "file"), 3, "trio-wal: file: Input/output error"),
    ],
)
def test_what_one_of_many_tasks_meets_is_told_as_if_it_were_alone(
    cli: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    said: str,
) -> None:
    async def meet() -> None:
        raise raised

    async def main() -> None:
        async with trio.open_nursery() as outer, trio.open_nursery() as inner:
            inner.start_soon(meet)
            outer.start_soon(trio.sleep_forever)

    def run(_: list[str]) -> int:
        trio.run(main)
        return 0

    monkeypatch.setattr(_cli, "_run", run)
    assert cli("verify", "x") == code
    assert cli.err.startswith(said)
    assert cli.err.count("\n") == (1 if said else 0)
    assert "Group" not in cli.err


@pytest.mark.parametrize("error", [ValueError("a\nb\x1b"), AssertionError(), MemoryError()])
def test_whatever_goes_wrong_is_one_line_and_no_traceback(
    cli: CommandLine, error: Exception, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(_cli, "_run", fail)
    assert cli("verify", log) == ExitCode.FAILED
    assert cli.out == ""
    assert cli.err.startswith(f"trio-wal: {type(error).__name__}: ")
    assert cli.err[:-1].isprintable()


# -- append, while its input stays open -------------------------------------------------------


def speaking(*arguments: object) -> subprocess.Popen[bytes]:
    process = start("append", *arguments)
    assert process.stdin is not None
    assert process.stdout is not None
    return process


def test_append_says_what_is_durable_while_a_pipe_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "log"
    process = speaking(path)
    assert process.stdin is not None
    assert process.stdout is not None
    for number in range(1, 4):
        process.stdin.write(b"record %d\n" % number)
        process.stdin.flush()
        # A program that waits for this before it sends more gets it.
        assert process.stdout.readline() == (
            f"LSN {number} to {number}: 1 record, 8 bytes, durable in {path}\n".encode()
        )
        assert len(lines_of(path)) >= number - 1
    # Every record is said once.
    assert finish(process) == (0, b"", b"")
    assert lines_of(path) == [b"record 1", b"record 2", b"record 3"]


def test_append_says_it_in_json_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    process = speaking(path, "--json")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"one\ntwo\n")
    process.stdin.flush()
    said = json.loads(process.stdout.readline())
    assert said == {"path": str(path), "first_lsn": 1, "last_lsn": 2, "records": 2, "bytes": 6}
    process.stdin.write(b"three")
    code, out, err = finish(process)
    assert (code, err) == (0, b"")
    assert json.loads(out) == said | {"first_lsn": 3, "last_lsn": 3, "records": 1, "bytes": 5}


def test_append_tells_how_far_it_is_where_one_asks_for_it(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"12345678\n" * 3)
    monkeypatch.setattr(append_module, "READ_BYTES", 9)
    monkeypatch.setattr(append_module, "PROGRESS_SECONDS", 0.0)
    path = tmp_path / "log"
    with source.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli("append", path, "--progress") == 0
    assert cli.out == f"LSN 1 to 3: 3 records, 24 bytes, durable in {path}\n"
    assert cli.err.splitlines() == [
        f"trio-wal: LSN 1 to {n}: {records}, {n * 8} bytes, durable in {path} so far"
        for n, records in ((1, "1 record"), (2, "2 records"), (3, "3 records"))
    ]


# -- names ------------------------------------------------------------------------------------

HOSTILE = b"wal-\x1b]0;PWNED\x07\x1b[2J\nOK: 1 segment, 1 frame, 4 records\xc2\x9b\xff\xe2\x80\xae"
SHOWN = r"wal-\x1b]0;PWNED\x07\x1b[2J\x0aOK: 1 segment, 1 frame, 4 records\u009b\xff\u202e"


def controls(text: str) -> set[str]:
    """Characters that a terminal obeys, or that turn text around or begin a line."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n"}


@on_linux
def test_a_files_name_is_shown_and_not_obeyed(
    cli: CommandLine, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (log / os.fsdecode(HOSTILE)).write_bytes(b"")
    assert cli("verify", log) == 1
    finding, total = cli.out.splitlines()
    assert finding == f"{log}/{SHOWN}: offset 0: this is not the name of a segment"
    assert total.startswith("1 finding; ")
    assert cli("verify", log, "--json") == 1
    (found,) = json.loads(cli.out)["findings"]
    assert (controls(cli.out), cli.out.count("\n")) == (set(), 1)
    # What UTF-8 can hold is there as it is; a byte that is none of it is told by its number.
    name = HOSTILE.decode(errors="backslashreplace")
    assert found["path"] == f"{log}/{name}"
    with (log / "lock").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        for command, code in (("dump", 1), ("inspect", 1), ("append", 3)):
            assert cli(command, log) == code
            assert f"{log}/{SHOWN}: " in cli.err
            assert controls(cli.out + cli.err) == set()


@on_linux
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_directory_whose_name_is_no_utf_8_can_be_used(
    cli: CommandLine, tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / os.fsdecode(b"no\xffne\n\xc2\x85")
    source = tmp_path / "source"
    source.write_bytes(b"one\ntwo\n")
    with source.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli("append", path, *options) == 0
    assert lines_of(path) == [b"one", b"two"]
    said = [cli.out]
    for command in ("verify", "inspect", "dump"):
        assert cli(command, path, *options) == 0
        said.append(cli.out)
        assert cli.err == ""
    assert controls("".join(said)) == set()
    if options:
        shown = [json.loads(line).get("path") for text in said for line in text.splitlines()]
        assert shown == [f"{tmp_path}/no\\xffne\n\x85"] * 3 + [None] * 2
    else:
        assert rf"durable in {tmp_path}/no\xffne\x0a\u0085" in said[0]


@on_linux
@pytest.mark.parametrize("argument", ["\x1b[2J", "a\nOK", "--\x9b31m", "\u202e"])
def test_an_argument_is_shown_and_not_obeyed(cli: CommandLine, argument: str) -> None:
    for arguments in ([argument], ["verify", "a", argument], ["dump", "a", "--from", argument]):
        assert cli(*arguments) in (2, 3)
        assert (cli.out, cli.err.count("\n"), controls(cli.err)) == ("", 1, set())


# -- records ----------------------------------------------------------------------------------


STRANGE = [
    b"\xc2\x9b31m",
    "\u202egol.2\u202c".encode(),
    "\x85next".encode(),
    "\u2028\u2029".encode(),
    b"\x7f",
    b"\x1b[31m\0\n\r\x1c\x1d\x1e",
    "żółw \U0001f422 \U000e0041 \u200d".encode(),
]


def test_text_in_a_dump_is_printable_and_every_record_a_line(
    cli: CommandLine, tmp_path: Path
) -> None:
    path = make_log(tmp_path / "log", STRANGE)
    assert cli("dump", path) == 0
    assert controls(cli.out) == set()
    # As a program in Python would take it apart.
    assert [json.loads(line)["text"].encode() for line in cli.out.splitlines()] == STRANGE
    assert "żółw" in cli.out


def test_keys_and_values_in_a_dump_are_printable_too(cli: CommandLine, tmp_path: Path) -> None:
    async def main() -> None:
        async with trio_wal.open_database(tmp_path / "db") as db, db.transaction() as tx:
            for key in STRANGE:
                tx.put(key, key)

    trio.run(main)
    assert cli("dump", tmp_path / "db") == 0
    assert controls(cli.out) == set()
    (line,) = cli.out.splitlines()
    operations = json.loads(line)["operations"]
    assert [(o["key"]["text"].encode(), o["value"]["text"].encode()) for o in operations] == [
        (key, key) for key in STRANGE
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64])
def test_a_large_record_is_the_same_line_in_slices(
    cli: CommandLine, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [*STRANGE, b"", b"\xff" * 10, "ż€🐢\0".encode() * 5, bytes(range(256)), b"ok\xe2\x82"]
    path = make_log(tmp_path / "log", data)
    database = tmp_path / "db"

    async def main() -> None:
        async with trio_wal.open_database(database) as db:
            async with db.transaction() as tx:
                tx.put(b"key", b"old")
                for number, value in enumerate(data):
                    tx.put(b"%d\xff" % number, value)
            await db.delete(b"key")

    trio.run(main)
    whole: list[Any] = []
    for source in (path, database):
        assert cli("dump", source) == 0
        whole.append([json.loads(line) for line in cli.out.splitlines()])
    monkeypatch.setattr(dump_module, "LARGE_BYTES", 0)
    monkeypatch.setattr(dump_module, "SLICE_BYTES", 3 * size)
    monkeypatch.setattr(dump_module, "WRITE_BYTES", size)
    for source, expected in zip((path, database), whole, strict=True):
        assert cli("dump", source) == 0
        assert controls(cli.out) == set()
        assert [json.loads(line) for line in cli.out.splitlines()] == expected


# -- anything ---------------------------------------------------------------------------------

NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)


class Streams:
    """What commands write, without the fixtures that hypothesis does not reset."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, *arguments: object, given: bytes = b"") -> int:
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as err,
            tempfile.TemporaryFile() as stdin,
            pytest.MonkeyPatch.context() as patch,
        ):
            stdin.write(given)
            stdin.seek(0)
            for name, stream in (("stdout", out), ("stderr", err), ("stdin", stdin)):
                patch.setattr(sys, name, stream)
            code = run([str(argument) for argument in arguments])
            self.text = ""
            for stream in (out, err):
                stream.flush()
                stream.buffer.seek(0)
                self.text += stream.buffer.read().decode()
        return code


@pytest.fixture
def folder() -> Iterator[Path]:
    made = tempfile.mkdtemp()
    yield Path(made)
    shutil.rmtree(made)


@on_linux
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(name=NAMES, stray=NAMES, prefixed=st.booleans(), records=st.lists(st.binary(), max_size=5))
def test_no_command_prints_a_control_character_whatever_it_meets(
    folder: Path, name: bytes, stray: bytes, prefixed: bool, records: list[bytes]
) -> None:
    streams = Streams()
    path = Path(os.fsdecode(bytes(folder))) / os.fsdecode(name)
    shutil.rmtree(path, ignore_errors=True)
    given = b"\n".join(records)
    assert streams("append", path, given=given) == 0
    assert controls(streams.text) == set()
    assert streams("append", path, "--json", given=given) == 0
    assert json.loads(streams.text)["records"] == len(given.split(b"\n")) - given.endswith(
        b"\n"
    ) - (not given)
    beside = path / os.fsdecode((b"wal-" + stray)[:40] if prefixed else stray)
    if not beside.exists():
        beside.write_bytes(given)
    for command in ("verify", "inspect", "dump", "append"):
        for options in ([], ["--json"]):
            code = streams(command, path, *options, given=given)
            assert code in (0, 1, 3)
            assert controls(streams.text) == set()
            for line in streams.text.splitlines():
                if options and not line.startswith("trio-wal: "):
                    assert isinstance(json.loads(line), dict)


def test_an_error_of_the_command_line_itself_is_escaped(
    cli: CommandLine, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CommandError("\x1b[2J")

    monkeypatch.setattr(_cli, "_run", fail)
    assert cli("verify", segment_files(log)[0]) == 3
    assert cli.err == "trio-wal: \\x1b[2J\n"
