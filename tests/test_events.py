"""The ``trio_wal`` logger: which events there are, their levels and values; none per record."""

from __future__ import annotations

import errno
import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from databases import DB, open_memory_database
from helpers import LOG, Call, open_memory, open_tasks
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_wal import LogFailedError, LogFullError, _log
from trio_wal._events import tell
from trio_wal.testing import MemoryFiles


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "trio_wal")


def events(caplog: pytest.LogCaptureFixture, *names: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(level, message without its path, values) of each, after a check of what all have."""
    found = []
    for record in caplog.records:
        values = dict(record.trio_wal)  # type: ignore[attr-defined]
        event, path = values.pop("event"), values.pop("path")
        assert record.name == "trio_wal"
        assert record.getMessage().startswith(f"{path}: ")
        json.dumps(values)
        if not names or event in names:
            text = record.getMessage().removeprefix(f"{path}: ")
            found.append((f"{event} {record.levelname}", text, values))
    caplog.clear()
    return found


async def test_a_life_in_order_is_three_lines(
    files: MemoryFiles, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with open_memory(files) as wal:
        for _ in range(100):
            await wal.append(b"record")
        report = attrs.asdict(wal.recovery)
    (opened, closed) = events(caplog)
    assert opened[0] == "opened INFO"
    assert opened[1] == "opened at LSN 0 in 0.000 seconds, closed in order before"
    assert opened[2] == report
    assert closed == ("closed INFO", "closed at LSN 100", {"last_lsn": 100})


async def test_a_cut_batch_is_a_warning_with_its_bytes(
    files: MemoryFiles, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_memory(files) as wal:
        await wal.append(b"kept")
        image, torn_image = files.crash_image(), files.crash_image()
    events(caplog)
    async with open_memory(image):
        (opened,) = events(caplog, "opened")
    assert opened[0] == "opened INFO"
    assert re.match(r"opened at LSN 1 in 0\.\d+ seconds, recovered$", opened[1])
    (name,) = (name for name in torn_image.names(LOG) if name.startswith("wal-"))
    data = bytearray(torn_image.read_file(LOG, name))
    data[4096 + 512 : 4096 + 600] = b"x" * 88
    torn_image.write_file(LOG, name, bytes(data))
    async with open_memory(torn_image):
        (opened,) = events(caplog, "opened")
    torn = opened[2]["torn_bytes"]
    assert torn > 0
    assert opened[0] == "opened WARNING"
    assert opened[1].endswith(f"recovered, {torn} bytes of an unfinished batch cut")


async def test_an_end_that_readers_were_told_of_and_that_is_lost_is_a_warning(
    files: MemoryFiles, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_memory(files) as wal:
        for _ in range(3):
            await wal.append(b"record")
        image = files.crash_image(kind="kill")
    events(caplog)
    (name,) = (name for name in image.names(LOG) if name.startswith("wal-"))
    image.write_file(LOG, name, image.read_file(LOG, name)[: 4096 + 512].ljust(1 << 20, b"\0"))
    async with open_memory(image):
        (opened,) = events(caplog, "opened")
    assert opened[0] == "opened WARNING"
    assert opened[2]["lost_lsn"] == 3
    assert opened[1].endswith(
        "; readers had been told that LSN 3 is durable, and all after 1 is lost: a new epoch begins"
    )


async def test_each_rotation_is_a_line_for_who_asks(
    files: MemoryFiles, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_memory(files, segment_size=1) as wal:
        await wal.append(bytes(3000))
        await wal.append(bytes(3000))
        (rotated,) = events(caplog, "rotated")
    assert rotated == (
        "rotated DEBUG",
        "segment 2 begins at LSN 2",
        {"segment": 2, "first_lsn": 2, "segments": 2},
    )


async def test_a_full_disk_is_told_when_it_begins_and_when_it_ends(
    files: MemoryFiles, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with open_memory(files, segment_size=1) as wal:
        files.free_bytes = 0  # before anything wants the next segment to be prepared
        await wal.append(b"one")
        for _ in range(3):
            with pytest.raises(LogFullError):
                await wal.append(bytes(3000))
        await trio.sleep(10)
        (full,) = events(caplog, "full", "space")
        assert full[0] == "full WARNING"
        assert full[1].startswith(f"the disk is full: {LOG}: no space for a segment of ")
        assert full[2]["last_lsn"] == 1
        assert full[2]["needed"] > 3000
        files.heal()
        await trio.sleep(1)
        (space,) = events(caplog, "full", "space")
        assert space[0] == "space INFO"
        assert re.match(r"there is disk space again, after 10\.\d seconds$", space[1])


async def test_writers_that_wait_for_long_are_told_of_once(
    files: MemoryFiles, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async def slow() -> None:
        await trio.sleep(0.3)

    async def write() -> None:
        for _ in range(10):
            await wal.append(b"record")

    vars(files)["gate"] = slow
    async with open_memory(files, max_queue_size=1) as wal:
        for tasks, told in ((3, 1), (1, 0)):
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(write)
            await wal.append(b"record")
            found = events(caplog, "backpressure_began", "backpressure_ended")
            assert [event for event, _, _ in found] == told * [
                "backpressure_began WARNING",
                "backpressure_ended INFO",
            ]
            if told:
                # Trio runs the tasks in any order.
                assert found[0][2] in [{"tasks": n, "records": 1, "bytes": 6} for n in (1, 2)]
                told_tasks = found[0][2]["tasks"]
                assert (
                    found[0][1] == f"writers wait for room in the queue, {told_tasks} at the moment"
                )
                assert found[1][2]["seconds"] > 1
                # Three tasks and a queue of one: most of 30 appends have waited.
                assert 10 <= found[1][2]["waits"] <= 30
                assert found[1][1].endswith(f"seconds and {found[1][2]['waits']} waits")


async def test_a_failure_is_one_error(files: MemoryFiles, caplog: pytest.LogCaptureFixture) -> None:
    async with open_memory(files) as wal:
        files.fail("sync", errno.EIO)
        with pytest.raises(LogFailedError):
            await wal.append(b"record")
    found = events(caplog)
    assert [event for event, _, _ in found] == ["opened INFO", "failed ERROR"]
    assert found[1][2] == {
        "outcome": "unknown",
        "last_lsn": 0,
        "durable_lsn": 0,
        "error": "OSError(5, 'Input/output error')",
    }


async def test_a_database_tells_of_its_replay_and_its_checkpoints(
    files: MemoryFiles, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    async with open_memory_database(files, checkpoint_bytes=100) as db:
        await db.put(b"key", bytes(200))
        await wait_all_tasks_blocked()
        assert [event for event, _, _ in events(caplog)] == [
            "opened INFO",
            "replayed INFO",
            "checkpoint DEBUG",
        ]
        files.fail("store", errno.EIO, times=3)
        await db.put(b"key", bytes(200))
        await trio.sleep(10)
        found = events(caplog)
        assert [event for event, _, _ in found] == [
            *["checkpoint_failed WARNING"] * 3,
            "checkpoint INFO",
        ]
        assert found[3][2]["lsn"] == 2
        assert found[3][2]["passes_again"] is True
        assert found[3][1].endswith("seconds: they pass again")
        await db.put(b"key", b"value")
        image = files.crash_image()
    events(caplog)
    async with open_memory_database(image):
        found = events(caplog, "replayed")
    assert found == [
        (
            "replayed INFO",
            "1 transactions after the store's LSN 2 replayed",
            {"transactions_replayed": 1, "checkpoint_lsn": 2},
        )
    ]


async def test_an_open_that_fails_says_nothing(
    files: MemoryFiles, caplog: pytest.LogCaptureFixture
) -> None:
    files.fail("rename", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        async with open_memory(files):
            pass
    files.fail("store", errno.EIO)
    assert events(caplog) == []


async def test_a_commit_is_no_line(files: MemoryFiles, caplog: pytest.LogCaptureFixture) -> None:
    async with open_memory(files) as wal, open_tasks(files) as nursery:
        events(caplog)
        for _ in range(100):
            Call(nursery, wal.append, b"record")
        await wal.send(b"record")
        await wal.flush()
        assert events(caplog) == []


class _Refuses(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.asked += 1
        raise ValueError("a filter with a bug")


async def test_a_filter_with_a_bug_breaks_no_log(
    files: MemoryFiles, request: pytest.FixtureRequest
) -> None:
    refuses = _Refuses()
    logger = logging.getLogger("trio_wal")
    logger.addFilter(refuses)
    request.addfinalizer(lambda: logger.removeFilter(refuses))
    for _ in range(2):
        async with open_memory(files, segment_size=1) as wal:
            for _ in range(10):
                await wal.append(b"x")
        async with open_memory_database(files, checkpoint_bytes=1) as db:
            for _ in range(10):
                await db.put(b"k", b"v")
                await wait_all_tasks_blocked()
    assert refuses.asked > 20


@pytest.mark.parametrize("opened", [open_memory, open_memory_database])
async def test_an_open_that_fails_at_its_last_step_leaves_nothing(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch, opened: Any
) -> None:
    def no_memory(*args: object, **values: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(_log, "tell", no_memory)
        with pytest.raises(MemoryError):
            async with opened(files):
                raise AssertionError
    assert not any(files.exists(path) for path in (LOG, DB))
    async with opened(files):
        pass


def test_a_name_cannot_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    path = "/log\n2026-01-01 ERROR forged\x1b[2J"
    tell(logging.WARNING, "test", path, "text\nmore")
    (record,) = caplog.records
    assert record.getMessage() == r"/log\x0a2026-01-01 ERROR forged\x1b[2J: text\x0amore"
    assert record.trio_wal == {"event": "test", "path": path}  # type: ignore[attr-defined]


@pytest.mark.parametrize("which", ["standard library", "structlog"])
async def test_the_recipes_of_the_documentation_give_json(
    files: MemoryFiles, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parent.parent / "docs" / "logging.md"
    if not page.exists():
        pytest.skip("the pages are not here: this is not the source tree")
    if which == "structlog":
        pytest.importorskip("structlog")
    recipes = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    (recipe,) = [text for text in recipes if ("structlog" in text) == (which == "structlog")]
    logger = logging.getLogger("trio_wal")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    namespace: dict[str, Any] = {}
    exec(recipe, namespace)
    output = io.StringIO()
    namespace["handler"].setStream(output)
    async with open_memory(files) as wal:
        await wal.append(b"record")
    opened, closed = map(json.loads, output.getvalue().splitlines())
    assert (opened["event"], opened["level"], opened["path"]) == ("opened", "info", LOG)
    assert (closed["event"], closed["last_lsn"]) == ("closed", 1)
    assert closed["timestamp"].startswith("20")
    (shown,) = re.findall(r"```json\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    assert set(json.loads(shown)) == set(opened)


def test_the_documentation_has_every_event() -> None:
    root = Path(__file__).parent.parent
    pages = root / "docs" / "usage.md"
    if not pages.exists():
        pytest.skip("the pages are not here: this is not the source tree")
    table = pages.read_text(encoding="utf-8")
    told = set()
    for module in (root / "trio_wal").rglob("*.py"):
        text = module.read_text(encoding="utf-8")
        told |= set(re.findall(r'tell\(\s*[^"]*?"([a-z_]+)",', text))
    assert len(told) == 18
    assert {name for name in told if f"`{name}`" not in table} == set()
