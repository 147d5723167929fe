"""The demo on a log: it loses nothing, and notices when something else does."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from command_line import CommandLine, finish, lines_of, read_terminal, start

import trio_wal
from trio_wal._cli import run
from trio_wal._cli._demo import run as demo_run
from trio_wal._cli._demo.bank import BankProblems
from trio_wal._cli._demo.ledger import Ledger, Problems, Rebuilder
from trio_wal._cli._demo.run import Report, _Messages
from trio_wal._cli._demo.workload import Workload, build, line_of
from trio_wal._cli.demo import standard_library, verdict

LINES = 20_000


@pytest.fixture
def cli(capsysbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capsysbinary.readouterr)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo puts temporary directories."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Enough lines that a kill comes in mid-flight, with every kind of line."""
    contents = (
        b"".join(b"%d\n" % i for i in range(LINES // 2)),
        b"",
        b"same\n" * (LINES // 4),
        b"\xff\0\r\n" + b"x" * 5000 + b"\n" * (LINES // 4) + b"no newline at the end",
    )
    paths = [tmp_path / f"source{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


# -- whole runs -----------------------------------------------------------------------------


def test_what_was_acknowledged_survives_two_kills(
    cli: CommandLine, files: list[Path], temporary: Path
) -> None:
    found = cli.json("demo", "--log-only", "--seed", 1, *files)
    lines = sum(len(path.read_bytes().splitlines()) for path in files)
    assert found["ok"] is True
    assert found["lines"] == found["found"] == lines
    assert found["bytes"] == sum(path.stat().st_size for path in files)
    assert found["kills"] == len(found["recovery_seconds"]) == 2
    assert found["acknowledged"] + found["unacknowledged_kept"] == lines
    assert found["verdict"] == f"PASS: {found['acknowledged']:,} acknowledged, 0 lost"
    first, second = found["killed_at"]
    assert 0 < first < second < lines
    # Of each kill at most what one batch and one message hold.
    assert found["unacknowledged_kept"] <= 2 * 3 * found["tasks"]
    assert [found[name] for name in Problems.__annotations__] == [0] * 5
    assert found["sources_identical"] == found["sources"] == 4
    assert found["damaged"] == 0
    assert found["batches"] >= lines / found["tasks"]
    assert 0 < found["syncs"] <= found["batches"]
    assert 0 < found["latency_p50"] <= found["latency_p99"] <= found["latency_max"]
    assert found["appends_per_second"] > 0
    assert list(temporary.iterdir()) == []


def test_nothing_is_run_that_lies_in_the_working_directory(
    cli: CommandLine, files: list[Path], temporary: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """It may be a shared one, or a cloned one: somebody else's code."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in ("json", "os", "struct", "signal", "trio", "msgspec", "attrs", "trio_wal"):
        program = f"import sys\nopen({str(tmp_path / 'run')!r}, 'a').write({name!r})\nsys.exit(7)\n"
        (folder / f"{name}.py").write_text(program)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert cli.json("demo", "--log-only", "--kills", 0, "--tasks", 2, files[0])["ok"] is True
    assert not (tmp_path / "run").exists()


def rows_of(out: str) -> dict[str, str]:
    """The table's rows by label; a heading has no value."""
    rows = (re.split(r" {2,}", line.strip()) for line in out.splitlines() if line)
    return {row[0]: row[1] if len(row) > 1 else "" for row in rows}


def test_the_result_is_a_verdict_and_a_table_in_groups(
    cli: CommandLine, files: list[Path], temporary: Path
) -> None:
    assert cli("demo", "--log-only", "--kills", 1, "--tasks", 16, files[0]) == 0
    assert cli.err == ""
    # Nothing but text where it is no terminal.
    assert cli.out.isascii()
    assert "\x1b" not in cli.out
    assert max(map(len, cli.out.splitlines())) <= 80
    table = rows_of(cli.out)
    assert table["lines of 1 file"] == "10,000"
    kept = ("acknowledged", "kept, not acknowledged")
    assert sum(int(table[name].replace(",", "")) for name in kept) == 10_000
    assert cli.out.splitlines()[0] == f"PASS: {table['acknowledged']} acknowledged, 0 lost"
    assert (table["kills (SIGKILL)"], table["lost"]) == ("1", "0")
    assert table["files identical"] == "1 of 1"
    assert re.search(
        r"^  1: [1-9][\d,]+ acknowledged, open again after +\d[\d,.]* ms$", cli.out, re.MULTILINE
    )
    assert [label for label, value in table.items() if not value][1:] == [
        "What was written",
        "How it was killed",
        "What was found",
    ]
    assert {
        "megabytes",
        "tasks that wrote at the same time",
        "durable records per second",
        "syncs of the disk",
        "lines per sync",
        "time until a line was durable: median",
        "99 % of the lines at most",
        "the slowest",
        "the whole run",
        "altered",
        "duplicated",
        "out of order",
    } < set(table)


def test_the_log_is_kept_where_one_asks_for_it(
    cli: CommandLine, tmp_path: Path, temporary: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"one\ntwo\nthree\nfour\nfive\n")
    place = tmp_path / "log"
    found = cli.json("demo", "--log-only", "--kills", 0, "--tasks", 2, "--dir", place, source)
    assert (found["kills"], found["recovery_seconds"]) == (0, [])
    assert cli("verify", place) == 0
    assert sorted(line_of(data) for data in lines_of(place)) == sorted(
        source.read_bytes().splitlines(keepends=True)
    )
    assert list(temporary.iterdir()) == []


def test_there_may_be_more_tasks_than_lines(
    cli: CommandLine, tmp_path: Path, temporary: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"one\ntwo\n")
    found = cli.json("demo", "--log-only", "--tasks", 50, source)
    assert (found["lines"], found["found"]) == (2, 2)


# -- a log that loses ---------------------------------------------------------------------------


def lossy(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Awaitable[object]]) -> None:
    """Do something to the log between the first kill and the check."""
    true_open = demo_run.open_wal
    spoiled: list[str] = []

    @asynccontextmanager
    async def open_wal(path: str, **options: Any) -> Any:
        if not spoiled:
            spoiled.append(path)
            await spoil(Path(path))
        async with true_open(path, **options) as wal:
            yield wal

    monkeypatch.setattr(demo_run, "open_wal", open_wal)


async def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Another log in the place of this one, with other records."""
    async with trio_wal.open_wal(path) as wal, wal.read() as records:
        data = [record.data async for record in records]
    shutil.rmtree(path)
    async with trio_wal.open_wal(path) as wal:
        await wal.append_many(change(data))


async def drop_the_end(path: Path) -> None:
    async with trio_wal.open_wal(path) as wal:
        # Far more than can be without an acknowledgement.
        await wal.truncate_after(wal.last_lsn - 2000)


async def drop_one(path: Path) -> None:
    await rewrite(path, lambda data: [*data[:500], *data[501:]])


async def alter_one(path: Path) -> None:
    await rewrite(path, lambda data: [*data[:500], data[500] + b"!", *data[501:]])


async def repeat_one(path: Path) -> None:
    await rewrite(path, lambda data: [*data, data[500]])


@pytest.mark.parametrize(
    ("spoil", "shows"),
    [
        (drop_the_end, {"lost"}),
        (drop_one, {"lost", "misordered", "misplaced"}),
        (alter_one, {"lost", "altered", "misordered"}),
        (repeat_one, {"duplicated"}),
    ],
)
def test_a_log_that_does_not_keep_its_word_is_noticed(
    cli: CommandLine,
    files: list[Path],
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], Awaitable[object]],
    shows: set[str],
) -> None:
    lossy(monkeypatch, spoil)
    assert cli("demo", "--log-only", "--kills", 2, "--json", files[0]) == 1
    found = json.loads(cli.out)
    assert found["ok"] is False
    assert {name for name in Problems.__annotations__ if found[name]} == shows
    # It did not go on, and left the log to be looked at.
    assert found["kills"] == 1
    (left,) = temporary.iterdir()
    assert (left / "log.meta").exists()


def test_a_loss_is_in_the_table_with_the_place_of_the_log(
    cli: CommandLine, files: list[Path], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lossy(monkeypatch, drop_one)
    assert cli("demo", "--log-only", "--kills", 1, files[0]) == 1
    table = rows_of(cli.out)
    assert (table["lost"], table["files identical"]) == ("1", "not compared")
    # Whatever was written behind it is under another LSN than was said.
    assert re.match(r"FAIL: [1-9][\d,]+ acknowledged, 1 lost, [1-9][\d,]+ out of order\n", cli.out)
    (left,) = temporary.iterdir()
    assert cli.out.endswith(f"\neverything is left in {left}\n")


def test_damage_that_loses_nothing_is_noticed_too(
    cli: CommandLine, files: list[Path], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_verify = demo_run.verify_log

    def verify(directory: Any) -> Any:
        file = directory.open("wal-00000000000000000001.log", writable=True)
        file.pwrite([b"x"], 2000)
        file.close()
        return true_verify(directory)

    monkeypatch.setattr(demo_run, "verify_log", verify)
    assert cli("demo", "--log-only", "--kills", 0, "--json", files[0]) == 1
    found = json.loads(cli.out)
    assert (found["ok"], found["lost"], found["damaged"]) == (False, 0, 1)


def test_lines_of_which_nobody_was_told_prove_nothing(
    cli: CommandLine, files: list[Path], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The acknowledgements get lost, all or a few: whatever is found was not promised."""
    true_take = Ledger.acknowledge
    monkeypatch.setattr(Ledger, "acknowledge", lambda self, words: true_take(self, words[3:]))
    assert cli("demo", "--log-only", "--kills", 0, "--json", files[0]) == 1
    found = json.loads(cli.out)
    assert (found["ok"], found["lost"], found["found"]) == (False, 0, LINES // 2)
    untold = found["unacknowledged_kept"]
    assert untold > 0
    assert found["verdict"].endswith(f" 0 lost, {untold:,} kept that no kill explains")


def test_a_log_that_does_not_open_any_more_is_kept(
    cli: CommandLine, files: list[Path], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damage(path: Path) -> None:
        with (path / "wal-00000000000000000001.log").open("r+b") as file:
            file.seek(4096)
            file.write(b"x" * 64)

    lossy(monkeypatch, damage)
    assert cli("demo", "--log-only", "--kills", 1, files[0]) == 3
    assert cli.out == ""
    (left,) = temporary.iterdir()
    told, error = cli.err.splitlines()
    assert told == f"trio-wal: everything is left in {left}"
    assert error.startswith(f"trio-wal: {left}/wal-00000000000000000001.log: at offset 4096: ")


def test_a_writer_that_ends_by_itself_is_an_error(
    cli: CommandLine, files: list[Path], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_run, "_CHILD", "import sys; sys.exit(5)")
    assert cli("demo", "--log-only", *files) == 3
    assert cli.out == ""
    assert cli.err == "trio-wal: the process that writes ended by itself, with exit code 5\n"
    assert list(temporary.iterdir()) == []


def test_everything_that_is_wrong_keeps_a_report_from_being_all_right() -> None:
    good = Report(
        lines=2,
        bytes=4,
        tasks=1,
        sources=1,
        sources_identical=1,
        kills=1,
        acknowledged=1,
        unacknowledged_kept=1,
        found=2,
    )
    assert good.ok
    # Nobody was told of a line, and no kill is to blame.
    assert not attrs.evolve(good, kills=0).ok
    for name in Problems.__annotations__:
        assert not attrs.evolve(good, problems=Problems(**{name: 1})).ok
    for wrong in ({"damaged": 1}, {"found": 1}, {"acknowledged": 0}, {"sources_identical": 0}):
        assert not attrs.evolve(good, **wrong).ok


def test_the_verdict_names_everything_that_is_wrong() -> None:
    good = Report(
        lines=1000, bytes=4, tasks=1, sources=2, sources_identical=2, acknowledged=1000, found=1000
    )
    assert verdict(good) == "PASS: 1,000 acknowledged, 0 lost"
    problems = Problems(lost=1, duplicated=2, altered=3, misordered=4, misplaced=5)
    bank = BankProblems(missing_money=-6, lost_transfers=7, invented_transfers=8)
    stopped = attrs.evolve(good, problems=problems, bank=bank, found=10, sources_identical=0)
    assert verdict(stopped) == (
        "FAIL: 1,000 acknowledged, 1 lost, 3 altered, 2 duplicated, 9 out of order, "
        "7 transfers lost, 8 transfers invented, 6 of the money missing"
    )
    unfinished = attrs.evolve(good, damaged=1, found=998, acknowledged=998, sources_identical=1)
    assert verdict(unfinished) == (
        "FAIL: 998 acknowledged, 0 lost, 1 damaged places found, 2 not written, "
        "1 of the files not identical"
    )


# -- the ledger ------------------------------------------------------------------------------


@pytest.fixture
def workload() -> Workload:
    """Two tasks of three lines each: lines 0 to 2 and 3 to 5."""
    return build((b"a\nb\n", b"c\nd\ne\nf"), 2)


def reading(
    workload: Workload,
    acknowledged: dict[int, int],
    records: list[bytes] | list[int],
    first_lsn: int = 1,
) -> tuple[Ledger, Problems]:
    """A ledger that was told these LSNs by line, and then saw a log with these records."""
    ledger = Ledger(workload)
    for index, lsn in acknowledged.items():
        ledger.acknowledge([index, lsn, 1000])
    ledger.begin()
    for lsn, record in enumerate(records, first_lsn):
        ledger.saw(lsn, record if isinstance(record, bytes) else workload.records[record])
    return ledger, ledger.end()


ALL = {0: 1, 3: 2, 1: 3, 4: 4, 2: 5, 5: 6}


def test_lines_in_the_order_of_their_tasks_are_all_right(workload: Workload) -> None:
    ledger, problems = reading(workload, ALL, [0, 3, 1, 4, 2, 5])
    assert not problems
    assert (ledger.acknowledged, ledger.found) == (6, 6)
    assert list(ledger.latencies) == [1000] * 6


def test_a_line_that_is_acknowledged_again_counts_once(workload: Workload) -> None:
    ledger = Ledger(workload)
    ledger.acknowledge([0, 1, 1000, 0, 1, 1000])
    assert ledger.acknowledged == 1


def test_a_line_that_was_never_acknowledged_may_be_there_or_not(workload: Workload) -> None:
    assert not reading(workload, {0: 1}, [0, 3, 1])[1]
    assert not reading(workload, {0: 1}, [0])[1]


def test_an_acknowledged_line_that_is_not_there_is_lost(workload: Workload) -> None:
    assert reading(workload, ALL, [0, 3, 1, 4, 2])[1] == Problems(lost=1)
    assert reading(workload, ALL, [])[1] == Problems(lost=6)


def test_a_line_behind_a_lost_one_is_out_of_order_and_misplaced(workload: Workload) -> None:
    assert reading(workload, ALL, [0, 3, 4, 2, 5])[1] == Problems(lost=1, misordered=1, misplaced=3)


def test_a_line_that_is_there_twice_is_noticed(workload: Workload) -> None:
    assert reading(workload, {}, [0, 0])[1] == Problems(duplicated=1)


@pytest.mark.parametrize("change", [b"", b"short", b"x" * 30, b"\xff" * 9])
def test_a_record_that_is_no_line_is_altered(workload: Workload, change: bytes) -> None:
    assert reading(workload, {0: 1}, [change])[1] == Problems(altered=1, lost=1)
    assert reading(workload, {0: 1}, [workload.records[0] + b"!"])[1] == Problems(altered=1, lost=1)


def test_a_line_from_beyond_its_file_is_altered(workload: Workload) -> None:
    tag = workload.records[1][:4] + b"\x02\0\0\0"
    assert workload.index_of(tag + b"c\n") is None
    assert reading(workload, {}, [tag + b"c\n"])[1] == Problems(altered=1)


def test_lines_of_one_task_in_the_wrong_order_are_noticed(workload: Workload) -> None:
    assert reading(workload, {}, [1, 0])[1] == Problems(misordered=1)
    assert not reading(workload, {}, [3, 0])[1]


def test_a_line_under_another_lsn_than_the_acknowledged_one_is_noticed(workload: Workload) -> None:
    assert reading(workload, {0: 2, 3: 1}, [0, 3])[1] == Problems(misplaced=2)
    assert reading(workload, {}, [0, 3], first_lsn=2)[1] == Problems(misplaced=1)


def test_each_task_goes_on_behind_its_last_line_in_the_log(workload: Workload) -> None:
    assert Ledger(workload).resume() == [0, 3]
    assert reading(workload, {}, [0, 3, 1])[0].resume() == [2, 4]
    assert reading(workload, {}, [0, 3, 1, 2])[0].resume() == [3, 4]


def test_a_second_reading_starts_anew(workload: Workload) -> None:
    ledger, problems = reading(workload, ALL, [0, 0, b"?"])
    assert problems
    ledger.begin()
    for lsn, index in enumerate([0, 3, 1, 4, 2, 5], 1):
        ledger.saw(lsn, workload.records[index])
    assert not ledger.end()


def test_files_are_made_again_from_the_log_alone(workload: Workload) -> None:
    rebuilder = Rebuilder(workload)
    for index in (3, 0, 4, 1, 5):
        rebuilder.saw(workload.records[index])
    # Line 2, the first of the second file, is missing.
    assert rebuilder.identical() == 1
    rebuilder.saw(workload.records[2])
    assert rebuilder.identical() == 2


# -- workload and messages ------------------------------------------------------------------------


def test_lines_keep_their_bytes_and_are_divided_evenly() -> None:
    contents = (b"a\nb\r\n\n", b"", b"c\rd\x0ce\n\xff", b"\n")
    workload = build(contents, 4)
    lines = [line_of(record) for record in workload.records]
    assert lines == [b"a\n", b"b\r\n", b"\n", b"c\rd\x0ce\n", b"\xff", b"\n"]
    assert b"".join(lines) == b"".join(contents)
    assert [workload.index_of(record) for record in workload.records] == list(range(6))
    assert workload.bounds == [0, 1, 3, 4, 6]
    assert [index for index in range(6) if workload.is_first_of_task(index)] == [0, 1, 3, 4]


def test_messages_are_whole_however_the_pipe_cuts_them() -> None:
    words = array("Q", [2, 7, 100, 0, 1, 10, 1, 2, 20, 0, 8, 150, 1, 9, 200, 5, 6, 7])
    data = words.tobytes()
    for size in (1, 7, 8, 24, 1000):
        taken: list[int] = []
        messages = _Messages(taken.extend)
        for at in range(0, len(data), size):
            messages.feed(data[at : at + size])
        assert taken == [0, 1, 10, 1, 2, 20, 5, 6, 7]
        assert (messages.syncs, messages.nanoseconds) == (9, 200)


def test_the_part_of_a_message_that_a_kill_leaves_is_not_believed() -> None:
    data = array("Q", [1, 7, 100, 0, 1, 10, 2, 8, 150, 1, 2, 20, 2]).tobytes()
    taken: list[int] = []
    _Messages(taken.extend).feed(data + b"\x01\x02")
    assert taken == [0, 1, 10]


def test_the_default_is_the_standard_library_and_nothing_that_was_installed() -> None:
    paths = standard_library()
    assert Path(json.__file__) in paths
    assert all(path.suffix == ".py" for path in paths)
    assert not any("site-packages" in path.parts for path in paths)
    assert len(paths) > 100


# -- usage and Ctrl-C ------------------------------------------------------------------------------


def test_wrong_arguments_are_errors(cli: CommandLine, tmp_path: Path, temporary: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for arguments, message in (
        ((tmp_path,), f"{tmp_path} is a directory: name the files"),
        ((empty,), "the files have no lines"),
        (("--tasks", 0, empty), "--tasks must be from 1 to 100000, not 0"),
        (("--kills", -1, empty), "--kills"),
        (("--dir", tmp_path, __file__), f"--dir {tmp_path} exists and is not an empty directory"),
        (("--dir", empty, __file__), f"--dir {empty} exists and is not an empty directory"),
    ):
        assert cli("demo", *arguments) == 2
        assert cli.out == ""
        assert message in cli.err
    missing = tmp_path / "missing"
    assert cli("demo", missing) == 3
    assert cli.err == f"trio-wal: {missing}: No such file or directory\n"
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals and terminals")
def test_ctrl_c_ends_the_demo_and_leaves_nothing_behind(temporary: Path, tmp_path: Path) -> None:
    import pty

    source = tmp_path / "source"
    source.write_bytes(b"line\n" * 300_000)
    terminal, other_side = pty.openpty()
    environment = {"TERM": "xterm", "TMPDIR": str(temporary)}
    process = start("demo", "--log-only", source, stderr=other_side, env=environment)
    os.close(other_side)
    # The bar has a total from the first acknowledgement on: the writer is at work.
    assert b"writing" in read_terminal(terminal, until=b"/300000")
    os.killpg(process.pid, signal.SIGINT)
    assert b"Traceback" not in read_terminal(terminal, until=b"\0")
    os.close(terminal)
    assert process.wait(timeout=240) == 130
    assert finish(process)[:2] == (130, b"")
    assert list(temporary.iterdir()) == []
    # Nor is the process that wrote: it was in the same group.
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.skipif(os.name != "posix", reason="POSIX terminals")
def test_a_terminal_shows_rate_and_time_left_and_each_kill(
    files: list[Path], temporary: Path
) -> None:
    import pty

    terminal, other_side = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "80"}
    process = start("demo", "--log-only", *files, stderr=other_side, env=environment)
    os.close(other_side)
    # Its end: nobody has the other side any more.
    shown = read_terminal(terminal, until=b"\0")
    os.close(terminal)
    code, out, _ = finish(process)
    assert code == 0
    assert out.startswith(b"PASS: ")
    assert re.search(rb"writing .*?\d[\d,]*/s.*?ETA.*?\d\d:\d\d", shown)
    for number in (1, 2):
        assert re.search(
            rb"kill %d of 2 at [\d,]+ acknowledged: open again after [\d,]+ ms, "
            rb"nothing lost\r\n" % number,
            shown,
        )


def test_a_writer_whose_parent_is_gone_ends_without_a_word(tmp_path: Path) -> None:
    import msgspec

    from trio_wal._cli._demo.writer import Job

    reader, writer = os.pipe()
    os.close(reader)
    content = b"line\n" * 100
    job = Job(str(tmp_path / "log"), (content,), 4, [0, 25, 50, 75], 1 << 20, False, 0)
    done = subprocess.run(
        [sys.executable, "-I", "-c", demo_run._CHILD, *sys.path],
        input=msgspec.msgpack.encode(job),
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_run_gives_plain_numbers_for_exit_codes(files: list[Path], temporary: Path) -> None:
    assert run(["demo", "--log-only", "--kills", "0", str(files[2])]) == 0
