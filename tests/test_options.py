"""Arguments of `open_wal`: what is wrong is refused by name before anything is created."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import LOG, open_memory, read_all

import trio_wal
from trio_wal import KeepAll
from trio_wal.testing import MemoryFiles

MiB = 1 << 20
FRAME_MAX = 1 << 30

WRONG_TYPES: list[tuple[str, object, str]] = [
    ("max_queue_size", "10", "max_queue_size must be an int, not str"),
    ("max_queue_size", 10.0, "max_queue_size must be an int or math.inf, not 10.0"),
    ("max_queue_size", None, "max_queue_size must be an int, not NoneType"),
    ("max_queue_size", True, "max_queue_size must be an int, not bool"),
    ("max_queue_size", math.nan, "max_queue_size must be an int or math.inf, not nan"),
    ("max_queue_bytes", "10", "max_queue_bytes must be an int, not str"),
    ("max_queue_bytes", 1.5, "max_queue_bytes must be an int or math.inf, not 1.5"),
    ("max_queue_bytes", -math.inf, "max_queue_bytes must be an int or math.inf, not -inf"),
    ("max_record_size", 1.0, "max_record_size must be an int, not float"),
    ("max_record_size", math.inf, "max_record_size must be an int, not float"),
    ("max_record_size", False, "max_record_size must be an int, not bool"),
    ("max_batch_bytes", math.inf, "max_batch_bytes must be an int, not float"),
    ("max_batch_bytes", b"8", "max_batch_bytes must be an int, not bytes"),
    ("flush_interval", "1", "flush_interval must be a number of seconds, not str"),
    ("flush_interval", None, "flush_interval must be a number of seconds, not NoneType"),
    ("flush_interval", True, "flush_interval must be a number of seconds, not bool"),
    ("segment_size", 1e6, "segment_size must be an int, not float"),
    ("segment_size", None, "segment_size must be an int, not NoneType"),
    ("durability", None, "durability must be a str, not NoneType"),
    ("durability", True, "durability must be a str, not bool"),
    (
        "retention",
        3,
        "retention must be None or made of KeepAll, KeepSegments, KeepFor and KeepBytes, not int",
    ),
    (
        "retention",
        KeepAll,
        "retention must be None or made of KeepAll, KeepSegments, KeepFor and KeepBytes, not type",
    ),
    ("sync_in", None, "sync_in must be a str, not NoneType"),
    ("compression", True, "compression must be a str, not bool"),
    ("verify_bytes", "all", "verify_bytes must be an int, not str"),
    ("verify_bytes", 0.5, "verify_bytes must be an int or math.inf, not 0.5"),
    ("trust_directory", 1, "trust_directory must be True or False, not 1"),
    ("archive", "/backup", "archive must be an Archive, with put, list and get, not str"),
    ("target_latency", "0.1", "target_latency must be a number of seconds, not str"),
    ("target_latency", True, "target_latency must be a number of seconds, not bool"),
    ("commit_delay", "1", "commit_delay must be a number of seconds, not str"),
    ("commit_delay", None, "commit_delay must be a number of seconds, not NoneType"),
    ("reserve", "0.1", "reserve must be a number, not str"),
    ("consumer_hold_bytes", "1", "consumer_hold_bytes must be an int, not str"),
    ("consumer_hold_bytes", 0.5, "consumer_hold_bytes must be an int or math.inf, not 0.5"),
    ("consumer_hold_bytes", None, "consumer_hold_bytes must be an int, not NoneType"),
]

WRONG_VALUES: list[tuple[str, object, str]] = [
    ("max_queue_size", 0, "max_queue_size must be at least 1, not 0"),
    ("consumer_hold_bytes", -1, "consumer_hold_bytes must be at least 0, not -1"),
    ("max_queue_size", -1, "max_queue_size must be at least 1, not -1"),
    ("max_queue_bytes", 0, "max_queue_bytes must be at least 1, not 0"),
    (
        "max_record_size",
        0,
        f"max_record_size must be at least 1 and at most {FRAME_MAX - 4}, not 0",
    ),
    (
        "max_record_size",
        FRAME_MAX - 3,
        f"max_record_size must be at least 1 and at most {FRAME_MAX - 4}, not {FRAME_MAX - 3}",
    ),
    (
        "max_batch_bytes",
        0,
        f"max_batch_bytes must be at least 1 and at most {FRAME_MAX // 2}, not 0",
    ),
    (
        "max_batch_bytes",
        FRAME_MAX,
        f"max_batch_bytes must be at least 1 and at most {FRAME_MAX // 2}, not {FRAME_MAX}",
    ),
    (
        "flush_interval",
        -0.001,
        "flush_interval must be at least 0 and at most 1e+10 seconds, not -0.001",
    ),
    (
        "flush_interval",
        math.inf,
        "flush_interval must be at least 0 and at most 1e+10 seconds, not inf",
    ),
    (
        "flush_interval",
        math.nan,
        "flush_interval must be at least 0 and at most 1e+10 seconds, not nan",
    ),
    ("segment_size", 0, f"segment_size must be at least 1 and at most {1 << 40}, not 0"),
    (
        "segment_size",
        (1 << 40) + 1,
        f"segment_size must be at least 1 and at most {1 << 40}, not {(1 << 40) + 1}",
    ),
    ("durability", "Sync", "durability must be one of 'sync', 'interval', 'none', not 'Sync'"),
    ("sync_in", "Loop", "sync_in must be one of 'thread', 'loop', not 'Loop'"),
    ("durability", "", "durability must be one of 'sync', 'interval', 'none', not ''"),
    ("compression", "gzip", "compression must be one of 'none', 'zstd', not 'gzip'"),
    ("verify_bytes", -1, "verify_bytes must be at least 0, not -1"),
]


@pytest.mark.parametrize(
    ("parameter", "value", "message", "error"),
    [(*case, TypeError) for case in WRONG_TYPES] + [(*case, ValueError) for case in WRONG_VALUES],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_argument_is_named_before_anything_is_created(
    tmp_path: Path, parameter: str, value: object, message: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        # At the call already: no trio is running here.
        trio_wal.open_wal(tmp_path / "log", **{parameter: value})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (None, TypeError, "path must be a str or os.PathLike, not NoneType"),
        (17, TypeError, "path must be a str or os.PathLike, not int"),
        (b"log", TypeError, "path must be a str or os.PathLike of str, not bytes"),
        ("", ValueError, "path must be a non-empty path without NUL characters, not ''"),
        ("a\0b", ValueError, "path must be a non-empty path without NUL characters, not 'a\\x00b'"),
    ],
)
def test_a_wrong_path_is_refused(path: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        trio_wal.open_wal(path)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        trio_wal.open_reader(path)


def test_every_parameter_behind_the_path_is_keyword_only_and_checked() -> None:
    parameters = inspect.signature(trio_wal.open_wal).parameters
    positional = [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert positional == ["path"]
    checked = {case[0] for case in WRONG_TYPES}
    assert set(parameters) - checked == {"path", "files"}
    with pytest.raises(TypeError, match=r"^open_wal\(\) takes 1 positional argument but 2 were "):
        trio_wal.open_wal("log", 10)  # type: ignore[misc]
    with pytest.raises(
        TypeError, match=r"^open_wal\(\) got an unexpected keyword argument 'timeout'"
    ):
        trio_wal.open_wal("log", timeout=1)  # type: ignore[call-arg]


def test_the_defaults_are_those_of_the_contract() -> None:
    parameters = inspect.signature(trio_wal.open_wal).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "path": inspect.Parameter.empty,
        "max_queue_size": 10_000,
        "target_latency": 0.010,
        "max_queue_bytes": 64 * MiB,
        "max_record_size": 16 * MiB,
        "max_batch_bytes": 8 * MiB,
        "flush_interval": 0.010,
        "commit_delay": 0.0,
        "segment_size": 64 * MiB,
        "durability": "sync",
        "retention": None,
        "compression": None,
        "verify_bytes": 32 * MiB,
        "trust_directory": False,
        "sync_in": "thread",
        "reserve": 0.1,
        "consumer_hold_bytes": math.inf,
        "archive": None,
        "files": None,
    }


async def test_the_smallest_values_make_a_log_that_works(files: MemoryFiles) -> None:
    options = {
        "max_queue_size": 1,
        "max_queue_bytes": 1,
        "max_record_size": 1,
        "max_batch_bytes": 1,
        "flush_interval": 0,
        "segment_size": 1,
        "verify_bytes": 0,
    }
    async with open_memory(files, **options) as wal:
        for number in range(20):
            assert await wal.append(b"%d" % (number % 10)) == number + 1
        assert await wal.append_many([b"a", b"b", b"c"]) == range(21, 24)
        await wal.send(b"d")
        assert await wal.flush() == 24
        found = await read_all(wal)
    async with open_memory(files, **options) as wal:
        assert await read_all(wal) == found
        assert wal.last_lsn == 24


async def test_the_largest_values_make_a_log_that_works(files: MemoryFiles) -> None:
    async with open_memory(
        files,
        max_queue_size=math.inf,
        max_queue_bytes=math.inf,
        max_record_size=FRAME_MAX - 4,
        max_batch_bytes=FRAME_MAX // 2,
        flush_interval=1e9,
        segment_size=1 << 40,
        verify_bytes=math.inf,
    ) as wal:
        assert await wal.append(b"one") == 1
        await wal.send(b"two")
        assert await wal.flush() == 2


@pytest.mark.parametrize("kind", [str, Path])
async def test_a_path_may_be_text_or_path_like_and_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.chdir(tmp_path)
    async with trio_wal.open_wal(kind("some/folders/log")) as wal:
        assert wal.path == str(tmp_path / "some" / "folders" / "log")
        monkeypatch.chdir("/")
        assert await wal.append(b"one") == 1
    async with trio_wal.open_wal(tmp_path / "some" / "folders" / "log") as wal:
        assert wal.last_lsn == 1


async def test_options_may_change_from_session_to_session(files: MemoryFiles) -> None:
    for number, options in enumerate(
        [
            {"segment_size": 1},
            {"max_record_size": 10},
            {"durability": "none"},
            {"durability": "interval", "flush_interval": 0},
            {"max_batch_bytes": 1, "max_queue_size": 1},
        ]
    ):
        async with open_memory(files, **options) as wal:
            assert await read_all(wal) == {n: b"%d" % n for n in range(1, number + 1)}
            assert await wal.append(b"%d" % (number + 1)) == number + 1
    assert files.exists(LOG)


def test_a_database_takes_every_option_of_a_log_by_its_name_and_default() -> None:
    """They are spelt out, so that checkers and `help` know them."""
    log = inspect.signature(trio_wal.open_wal).parameters
    database = inspect.signature(trio_wal.open_database).parameters
    assert set(log) <= set(database)
    for name, parameter in log.items():
        # Whose log it is says another option of a database.
        if name != "path":
            assert database[name] == parameter, name
    assert {parameter.kind for parameter in database.values()} == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'max_queue_sise'"):
        trio_wal.open_database("it", max_queue_sise=5)  # type: ignore[call-arg]
