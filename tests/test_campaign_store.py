"""The campaign on damaged stores: a share of it, and whether it notices what it is for."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from campaigns import __main__ as campaigns, store
from campaigns.store import DEFECTS, DIFFERS, FOREIGN, REFUSED, SAME, SIGNAL, Found

from trio_wal import _pages, _store, _store_check, _store_files
from trio_wal._pages import Contents


@pytest.fixture(autouse=True)
def _no_folders() -> Iterator[None]:
    yield
    if store.subject.cache_info().currsize:
        store.forget_subjects()


def test_the_share_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.json"
    arguments = ["store", "--count", "60", "--workers", "1", "--output", str(output)]
    assert campaigns.main(arguments) == 0
    figures = json.loads(output.read_text())
    total = figures["rows"][-1]
    assert total["cases"] == 60
    assert total[REFUSED] > 10
    assert total[SAME] > 5
    assert not any(total[name] for name in DEFECTS)
    assert "60 damaged stores, 0 defects" in capsys.readouterr().out


@pytest.mark.parametrize("name", store.DAMAGES)
def test_each_damage_changes_something_and_can_be_made_again(name: str) -> None:
    cases = [case for case in range(2000) if store.damaged_kind(case) == name][:6]
    changed = 0
    for case in cases:
        subject, kind, content = store.damaged(case)
        assert kind == name
        assert store.damaged(case) == (subject, kind, content)
        changed += content != store.subject(subject).content
    assert changed


# -- the judge, with a check that is broken on purpose --------------------------------------------


def refused_cases(count: int) -> list[int]:
    """Of those that are not read unchecked: that could end this process."""
    found: list[int] = []
    case = 0
    while len(found) < count:
        case += 1
        if case % store.UNCHECKED_EVERY and store.judge(case).outcome == REFUSED:
            found.append(case)
    return found


def test_a_check_that_finds_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = refused_cases(12)
    original = _pages.check

    def blind(*arguments: Any) -> Contents:
        found = original(*arguments)
        meta = dict.fromkeys((b"lsn", b"log", b"format"), b"")
        return found if not found.findings else Contents((), 0, meta)

    monkeypatch.setattr(_pages, "check", blind)
    monkeypatch.setattr(_store_check, "state_of", lambda path, meta: None)
    monkeypatch.setattr(_store_files, "misfit", lambda *arguments: None)
    # Those that LMDB's verifier passes too may end whoever reads them.
    monkeypatch.setattr(store, "_read_all", read_nothing)
    outcomes = [store.judge(case).outcome for case in cases]
    assert outcomes.count(FOREIGN) > 6


async def read_nothing(*arguments: Any) -> Found:
    return Found(SAME)


def test_an_open_that_passes_over_what_was_found_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = refused_cases(1)
    monkeypatch.setattr(_store_check, "check_before_open", lambda *arguments: None)
    found = store.judge(case)
    assert found.outcome == DIFFERS
    assert found.what.endswith("and opened")


def test_a_key_that_only_a_scan_finds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "damaged", lambda case: ("small", "none", longer()))

    def longer() -> bytes:
        return store.subject("small").content + b"\0"

    assert store.judge(1).outcome == SAME
    original = _store.LmdbRead.__init__

    def miss(self: Any, opened: Any, txn: Any) -> None:
        original(self, opened, txn)
        get = self.get
        self.get = lambda key: None if key == b"key-00007" else get(key)

    monkeypatch.setattr(_store.LmdbRead, "__init__", miss)
    found = store.judge(1)
    assert found.outcome == DIFFERS
    assert "get differs from scan" in found.what


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("unchecked", [False, True])
def test_a_process_that_a_store_ends_is_found_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: bool
) -> None:
    """As if the second of the cases ended it."""
    program = tmp_path / "python"
    about = f"echo '{json.dumps({'case': 1, 'outcome': store.UNCHECKED, 'what': ''})}'"
    program.write_text(
        f"""#!/bin/sh
for case in 0 1 2; do
    if [ $case -lt $5 ]; then continue; fi
    if [ $case = 1 ]; then {about if unchecked else ":"}; kill -SEGV $$; fi
    echo '{{"case": '$case', "outcome": "{SAME}", "what": ""}}'
done
"""
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    answer = store.run_task(range(3))
    expected = store.CRASH if unchecked else SIGNAL
    assert sum(answer.rows.values(), Counter()) == {SAME: 2, expected: 1}
    assert [case for case, _ in answer.failures] == ([] if unchecked else [1])


def test_a_finding_can_be_replayed(capfd: pytest.CaptureFixture[str]) -> None:
    assert campaigns.main(["store", "--replay", "4294967297"]) == 0
    out = capfd.readouterr().out
    assert any(f"{outcome}: " in out for outcome in store.OUTCOMES)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store._report, "fast_folder", lambda: str(tmp_path))
    store.run_task(range(3))
    assert list(tmp_path.iterdir()) == []
