"""Every code block of the documentation is run: nothing is shown that does not work.

Quickstart, tutorial and migration are followed from top to bottom.  A block of any other page is
run as the body of an async function, in which names such as `wal` and `db` mean what they mean on
that page.  Commands of other pages are parsed by the command line itself.
"""

from __future__ import annotations

import ast
import configparser
import contextlib
import json
import re
import runpy
import shlex
import shutil
import sqlite3
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from doc_blocks import DOCS, ROOT, Block, alike, blocks, follow, pages

import trio_wal
import trio_wal.testing

FOLLOWED = {"quickstart.md", "tutorial.md", "comparison.md"}
ALL = [block for page in pages() for block in blocks(page)]


def of(*languages: str, others: bool = True) -> list[Block]:
    return [
        block
        for block in ALL
        if block.language in languages and not (others and block.page.name in FOLLOWED)
    ]


# -- pages that are followed ----------------------------------------------------------------------


def test_the_quickstart_does_what_it_says(tmp_path: Path) -> None:
    outcomes = follow(
        DOCS / "quickstart.md", tmp_path, skip=("python3 -m venv", ".", "python -m pip")
    )
    assert len(outcomes) == 6
    for command, shown, found in outcomes:
        if command.startswith("python"):
            assert found == shown, command
        else:
            assert alike(shown, found), (command, found)


def test_the_tutorial_does_what_it_says_and_loses_nothing(tmp_path: Path) -> None:
    shutil.copy(DOCS / "examples" / "shop.py", tmp_path)
    outcomes = follow(DOCS / "tutorial.md", tmp_path)
    assert sum("kill -9" in command for command, _, _ in outcomes) == 1
    for command, shown, found in outcomes:
        assert alike(shown, found), (command, found)
    checks = [found for command, _, found in outcomes if " check " in command]
    assert len(checks) == 2
    for line in checks:
        told = re.fullmatch(r"([\d,]+) confirmed, ([\d,]+) missing\n", line)
        assert told is not None
        assert int(told[1].replace(",", "")) > 0
        assert told[2] == "0"


def test_the_shop_refuses_what_is_sold_out_and_changes_nothing(tmp_path: Path) -> None:
    shop: Any = runpy.run_path(str(DOCS / "examples" / "shop.py"))

    async def main() -> None:
        async with shop["open_shop"](str(tmp_path / "shop.db")) as db:
            await shop["stock"](db, 3)
            assert await shop["place"](db, shop["Order"]("ann", "blue", 2)) == 1
            with pytest.raises(shop["SoldOutError"]):
                await shop["place"](db, shop["Order"]("bob", "blue", 2))
            assert shop["products"].get(db, "blue").stock == 1
            assert [number for number, _ in shop["orders"].scan(db)] == [1]

    trio.run(main)


def migration(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    (block,) = (b for b in ALL if b.options.get("caption") == f"from_{name}.py")
    (folder / "program.py").write_text(block.text, "utf-8")
    monkeypatch.chdir(folder)

    def run() -> str:
        import io

        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            runpy.run_path("program.py", run_name="__main__")
        return out.getvalue()

    return run


def test_a_table_of_sqlite_becomes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = migration("sqlite", tmp_path, monkeypatch)
    with contextlib.closing(sqlite3.connect("orders.sqlite")) as old, old:
        old.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT, cents INTEGER)")
        old.executemany(
            "INSERT INTO orders VALUES (?, ?, ?)",
            [(n, f"c{n % 7}", n * 10) for n in range(1, 2501)],
        )
    assert run() == "2500 orders\n"
    assert run() == "2500 orders\n"


def test_items_of_persist_queue_become_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    persistqueue = pytest.importorskip("persistqueue")
    run = migration("persistqueue", tmp_path, monkeypatch)
    old = persistqueue.SQLiteAckQueue("jobs.queue")
    for number in range(3):
        old.put({"mail": number})
    old.close()
    assert run().splitlines() == [f"doing {{'mail': {number}}}" for number in range(3)]


def test_entries_of_diskcache_become_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diskcache = pytest.importorskip("diskcache")
    run = migration("diskcache", tmp_path, monkeypatch)
    with diskcache.Cache("cache") as old:
        old.set("a", "one")
        old.set("b", "two", expire=1000)
    assert run() == "2 entries\n"


def test_plain_files_become_a_log_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = migration("files", tmp_path, monkeypatch)
    Path("events.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"', "utf-8")
    Path("settings.json").write_text('{"size": 3, "colour": "blue"}', "utf-8")
    for _ in range(2):
        assert run() == "2 events\n{'colour': 'blue', 'size': 3}\n"


# -- blocks of other pages ------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def meanings(folder: Path) -> AsyncIterator[dict[str, Any]]:
    """What the names of a block mean."""
    (folder / "db").mkdir()

    async def send_mails(_operations: object) -> None:
        raise StopAsyncIteration

    async with (
        trio_wal.open_wal(folder / "wal") as wal,
        trio_wal.open_database(folder / "db" / "bank.db") as db,
    ):
        lsn = await db.put(b"alice", b"10")
        await wal.append(b"first")
        yield {
            **{
                name: sys.modules.get(name)
                for name in ("contextlib", "msgspec", "trio", "trio_wal")
            },
            **{name: getattr(trio_wal, name) for name in ("Bookmark", "open_wal")},
            "path": folder / "another.wal",
            "wal": wal,
            "db": db,
            "lsn": lsn,
            "data": b"data",
            "saved": "",
            "send_mails": send_mails,
        }


class Done(Exception):
    """Ends a block that would wait for ever."""


async def run_block(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    if block.page.name == "asyncio.md":
        await trio.to_thread.run_sync(run_under_asyncio, block)
        return
    async with meanings(folder) as names:
        setup = SETUPS.get(first_line(block))
        if setup is not None:
            text = await setup(names, block.text, monkeypatch)
        else:
            text = block.text
        source = "async def block():\n" + textwrap.indent(text, "    ")
        exec(compile(source, str(block), "exec"), names)
        with trio.move_on_after(60) as scope:
            await trio.lowlevel.checkpoint()
            await names["block"]()
        assert not scope.cancelled_caught, f"{block} does not end"


def run_under_asyncio(block: Block) -> None:
    import asyncio

    source = "async def block():\n" + textwrap.indent(block.text, "    ")
    if "asyncio.run(" in block.text:
        source = "def block():\n" + textwrap.indent(block.text, "    ")

    async def main(names: dict[str, Any]) -> None:
        from trio_wal import asyncio as aio

        async with aio.open_wal("a.wal") as wal, aio.open_database("a.db") as db:
            await db.put(b"alice", b"20")
            jobs = trio_wal.Table("jobs", key=tuple[int, str], value=str)
            names.update(wal=wal, db=db, data=b"data", JOBS=jobs)
            await names["block"]()

    names: dict[str, Any] = {"trio_wal": trio_wal, "asyncio": asyncio}
    exec(compile(source, str(block), "exec"), names)
    if "asyncio.run(" in block.text:
        names["block"]()
    else:
        asyncio.run(main(names))


def first_line(block: Block) -> str:
    return block.text.split("\n", 1)[0]


Setup = Callable[[dict[str, Any], str, pytest.MonkeyPatch], Any]
SETUPS: dict[str, Setup] = {}


def setup(line: str) -> Callable[[Setup], Setup]:
    def remember(function: Setup) -> Setup:
        SETUPS[line] = function
        return function

    return remember


@setup('async with trio_wal.open_database_reader("bank.db") as reader:')
async def _reader(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    # An owner that has closed: a process has a database open once.
    async with trio_wal.open_database("bank.db") as db:
        names["lsn"] = await db.put(b"alice", b"10")
    return text


@setup("async with db.transaction() as tx:")
async def _transaction(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    return text


@setup("place = Bookmark.parse(saved) if saved else None")
async def _bookmark(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    return 'saved = ""\n' + text + "        break\n"


@setup('async with db.consumer("mailer") as consumer:')
async def _consumer(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    sent: list[object] = []

    async def send_mails(operations: object) -> None:
        sent.append(operations)

    names["send_mails"] = send_mails
    return text + "        break\n"


@setup("async for commit in consumer:")
async def _exactly_once(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    await names["db"].put(b"order/1", b"x")
    body = textwrap.indent(text + "    if commit.lsn >= 2:\n        break\n", "    ")
    body += '    assert db.get(b"count") == b"1"\n'
    return f'async with db.consumer("counter") as consumer:\n{body}'


@setup("lsn = db.durable_lsn")
async def _wait_changed(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    jobs = names["jobs"] = trio_wal.Table("jobs", key=tuple[int, str], value=str)
    worked: list[object] = []

    def work_on(found: Any) -> None:
        worked.append(list(found))
        if worked[-1]:
            raise Done
        names["nursery"].start_soon(put)

    async def put() -> None:
        async with names["db"].transaction() as tx:
            jobs.put(tx, (1, "a"), "b")

    names["work_on"], names["Done"] = work_on, Done
    body = textwrap.indent(text, "        ")
    return (
        "global nursery\nasync with trio.open_nursery() as nursery:\n    try:\n"
        f"{body}    except Done:\n        pass\n"
    )


@setup("from prometheus_client import REGISTRY, start_http_server")
async def _prometheus(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    client = pytest.importorskip("prometheus_client")
    monkeypatch.setattr(client, "start_http_server", lambda _port: None)
    monkeypatch.setattr(client, "REGISTRY", client.CollectorRegistry())
    return text


@setup("from trio_wal.otel import instrument")
async def _otel(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("opentelemetry")
    return text


@setup('archive = trio_wal.DirectoryArchive("/backup/bank")')
async def _archive(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    return text.replace("/backup/bank", "backup")


@setup("log = trio_wal.nats.Log(")
async def _servers(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    # What is said to the servers, tests/test_nats.py and test_replicated.py run.
    opened = []

    @contextlib.asynccontextmanager
    async def open_database(path: str, log: Any) -> AsyncIterator[Any]:
        assert isinstance(log, trio_wal.nats.Log)
        opened.append(path)
        yield names["db"]

    names["trio_wal"] = type(
        "trio_wal", (), {"nats": trio_wal.nats, "open_database": open_database}
    )
    return text


@setup("import json, logging, time")
@setup("import logging, structlog")
async def _logging(names: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if "structlog" in text:
        pytest.importorskip("structlog")
    import io
    import logging

    log = logging.getLogger("trio_wal")
    monkeypatch.setattr(log, "handlers", [])
    stream = names["stream"] = io.StringIO()
    monkeypatch.setattr(logging.StreamHandler, "__init__", _stream_handler(stream))
    return text + (
        'async with trio_wal.open_wal("told"):\n    pass\n'
        "import json\n"
        'told = [json.loads(line)["event"] for line in stream.getvalue().splitlines()]\n'
        'assert told == ["opened", "closed"], told\n'
    )


def _stream_handler(stream: Any) -> Any:
    import logging

    init = logging.StreamHandler.__init__
    return lambda self: init(self, stream)


RUN_BY_THEIR_OWN = {"README.md"}
"""tests/test_readme.py."""


def python_blocks() -> list[Any]:
    old = pytest.mark.skipif(
        sys.version_info < (3, 11), reason="asyncio.timeout is new in Python 3.11"
    )
    return [
        pytest.param(block, marks=[old] if "asyncio.timeout" in block.text else [], id=str(block))
        for block in of("python")
        if block.page.name not in RUN_BY_THEIR_OWN
    ]


@pytest.mark.parametrize("block", python_blocks())
async def test_a_block_of_python_runs(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_block(block, tmp_path, monkeypatch)


def test_every_setup_belongs_to_a_block() -> None:
    assert set(SETUPS) - {first_line(block) for block in of("python")} == set()


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_a_block_of_json_is_json(block: Block) -> None:
    for line in block.text.splitlines():
        json.loads(line)


@pytest.mark.parametrize("block", of("ini"), ids=str)
def test_a_block_of_ini_is_ini(block: Block) -> None:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.read_string(block.text)
    assert parser.sections()


KNOWN = {
    "python",
    "console",
    "sh",  # of the runbook, which tests/test_runbook.py runs
    "json",
    "ini",
    "text",
    "{literalinclude}",
    "{toctree}",
    "{raw}",
    "{include}",
    "{image}",
}


@pytest.mark.parametrize("block", ALL, ids=str)
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in KNOWN
    if block.language == "{literalinclude}":
        assert (block.page.parent / block.argument).is_file()


# -- commands -------------------------------------------------------------------------------------


def shown_commands() -> list[tuple[str, str]]:
    found = []
    for block in of("console"):
        for line in block.text.splitlines():
            if line.startswith("$ "):
                command = line[2:].partition(" # ")[0]
                found += [(str(block), part) for part in re.split(r"; | \| | && ", command)]
    return found


@pytest.mark.parametrize(("where", "command"), shown_commands())
def test_a_command_is_one_that_exists(where: str, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "trio-wal":
        pytest.importorskip("cyclopts")
        from trio_wal._cli import app

        app.parse_args(words[1:], exit_on_error=False, print_error=False)
    elif words[:3] == ["python", "-m", "nox"] and "-s" in words:
        session = words[words.index("-s") + 1]
        assert session in sessions(), where
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), where
    else:
        assert words[0] in OTHERS, (where, command)


OTHERS = {"python", "python3", "printf", "rm", "git", ".", "mv", "cd"}


def sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text("utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }


# -- examples and drawings ------------------------------------------------------------------------


@pytest.mark.parametrize("program", sorted((DOCS / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_an_example_is_shown_whole_and_run_by_a_test(program: Path) -> None:
    shown = {
        (block.page.parent / block.argument).resolve()
        for block in ALL
        if block.language == "{literalinclude}" and not block.options
    }
    assert program.resolve() in shown
    tests = (path.read_text("utf-8") for path in (ROOT / "tests").glob("*.py"))
    assert any(re.search(rf'["/]{program.stem}(\.py)?"', text) for text in tests)


@pytest.mark.parametrize(
    "page", sorted((DOCS / "concepts").glob("*.md")), ids=lambda page: page.stem
)
def test_a_concept_has_a_drawing_with_words_for_who_cannot_see_it(page: Path) -> None:
    (drawing,) = (block for block in blocks(page) if block.language == "{raw}")
    assert re.search(r'<svg [^>]*role="img" aria-label="[^"]{20,}"', drawing.text)
    assert 'fill="black"' not in drawing.text


def test_the_changelog_begins_with_the_version_that_this_is() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    head, _, notes = text.partition("\n<!-- towncrier release notes start -->\n")
    assert head == "# Changelog\n"
    assert notes.startswith(f"\n## trio-wal {trio_wal.__version__} (")


def test_the_plot_of_the_readme_shows_the_measured_table(monkeypatch: pytest.MonkeyPatch) -> None:
    plot: Any = runpy.run_path(str(ROOT / "perf" / "plot_tasks.py"))
    rows = plot["table"]((DOCS / "performance.md").read_text("utf-8"))
    for theme in ("light", "dark"):
        assert plot["draw"](rows, theme) == (DOCS / "images" / f"tasks-{theme}.svg").read_text(
            "utf-8"
        )


def test_the_line_that_contributing_breaks_is_there_and_so_are_the_tests() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    removed = re.findall(r"^-  +(return .*)$", text, re.MULTILINE)[0]
    source = (ROOT / "trio_wal" / "_retention.py").read_text("utf-8")
    assert source.count(removed) == 1
    tests = (ROOT / "tests" / "test_retention.py").read_text("utf-8")
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) == 2
    assert all(f"def {name}(" in tests for name in named)
