"""The campaign on what failing calls leave behind: a share of it, and that it is not blind."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from campaigns import __main__ as campaigns, leaks

from trio_wal._disk import directory as _directory
from trio_wal._disk.directory import LogDirectory
from trio_wal._opening import _OpenDatabase
from trio_wal._system.files import OsDirectory, OsFile

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the campaign looks into /proc"
)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logger = logging.getLogger("trio_wal")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("program", leaks.PROGRAMS)
def test_nothing_is_left_whichever_call_fails(program: str) -> None:
    """Eight cases, and further ones until three of the programs have failed: which calls a
    program gets over, and where they stand, is for threads to say."""
    rng = random.Random(program)
    count = leaks.calls_of(program)
    # Those of the open come first.
    numbers = [*rng.sample(range(60), 4), *rng.sample(range(60, count), 4)]
    failed = 0
    for number in [*numbers, *rng.sample(range(60), 40)]:
        if failed >= 3 and number not in numbers:
            break
        result = leaks.run_case(program, number, rng.randrange(5))
        assert result.found == ""
        failed += bool(result.failed)
    assert failed >= 3


@pytest.mark.parametrize("limit", leaks.LIMITS)
def test_nothing_is_left_after_a_limit(limit: str) -> None:
    amount = leaks.AMOUNTS[limit][2]
    assert leaks.run_limited(limit, "log", amount).found == ""


def lost_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogDirectory, "abandon", lambda self, also=None: None)


def lost_file(monkeypatch: pytest.MonkeyPatch) -> None:
    close = OsFile.close

    def forget(self: OsFile) -> None:
        if self.path.endswith(".log") and sys.exc_info()[0] is None:
            close(self)

    monkeypatch.setattr(OsFile, "close", forget)


def left_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OsDirectory, "unmake", lambda self: None)


def left_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_directory, "uncreate", lambda *args, **options: None)


def left_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_OpenDatabase, "_remove_made", lambda self: None)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = [
    (lost_lock, "log", "left"),
    (lost_file, "log", "descriptors"),
    (left_directory, "log", "the failed open has left its directory"),
    (left_files, "log", "the failed open has left its directory"),
    (left_database, "database", "the failed open has left its directory"),
]


@pytest.mark.parametrize(("bug", "program", "found"), BUGS)
def test_what_is_left_is_found(
    monkeypatch: pytest.MonkeyPatch,
    bug: Callable[[pytest.MonkeyPatch], None],
    program: str,
    found: str,
) -> None:
    """By the calls of one kind, each of them: of all calls, those that show a bug are few, and
    where they stand is for threads to say."""
    bug(monkeypatch)
    assert found in next(filter(None, leaks.cases(0, f"{program}/eventfd")), "")


def test_a_case_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    assert campaigns.main(["leaks", "--replay", "log:0:12"]) == 0
    assert "log:0:12: " in capsys.readouterr().out
    assert campaigns.main(["leaks", "--replay", "nothing"]) == 2
