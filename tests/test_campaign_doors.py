"""The campaign on what goes on between tasks, threads, processes and event loops; see `_doors`."""

from __future__ import annotations

import sys
from typing import NoReturn

import pytest
import trio
from campaigns import _doors
from campaigns._doors import PARTS, found_in

from trio_wal import _stream


@pytest.mark.parametrize("part", PARTS)
def test_a_share_finds_nothing(part: str) -> None:
    if part == "wakes" and sys.platform != "linux":
        pytest.skip("inotify is Linux's")
    for seed in range(3):
        assert found_in(seed, part) == ""


def test_without_a_part_each_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for part in PARTS:
        monkeypatch.setitem(_doors.PARTS, part, lambda *_, part=part: asked.append(part))
    assert [found_in(seed) for seed in range(len(PARTS))] == [""] * len(PARTS)
    assert asked == list(PARTS)


def test_a_record_that_is_passed_over_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _stream.Reading._take

    def take(self: _stream.Reading, records: list[trio.Event], history: object) -> None:
        real(self, records, history)  # type: ignore[arg-type]
        if self._next == 5:
            self._next += 1

    monkeypatch.setattr(_stream.Reading, "_take", take)
    found = [found_in(seed, "ahead") for seed in range(5)]
    assert any("LSN 6 is given, not 5" in text for text in found)


def test_a_reader_that_nobody_wakes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def news(_source: object) -> NoReturn:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(_doors, "SECONDS", 0.1)
    monkeypatch.setattr("trio_wal._watchsource.WatchSource._news", news)
    assert "TooSlowError" in found_in(0, "wakes")
