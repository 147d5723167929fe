"""The bit rot campaign: a short share of it, and that its oracle is not blind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from campaigns import __main__ as campaigns, bitrot
from campaigns._ways import OWNER, READER, WAYS
from campaigns.bitrot import (
    HARMLESS,
    OFFLINE,
    READ,
    REFUSED,
    REUSED,
    SHORT,
    SILENT,
    SMALL,
    TORN,
    run_case,
)
from msgspec.structs import replace

from trio_wal import _watchsource
from trio_wal._disk import (
    chain as _chain,
    cursor as _cursor,
    frame as _frame,
    scan as _scan,
    walk as _walk,
)

NAMES = [name for name in SMALL if bitrot.usable(name)]


def outcomes(part: str, name: str, mode: str, cases: range) -> Counter[str]:
    counts: Counter[str] = Counter()
    for case in cases:
        damage, goes = run_case(part, name, mode, case)
        for found in goes:
            assert found.outcome != SILENT, (damage.what, found.error)
            counts[found.outcome] += 1
    return counts


def seen(part: str, name: str, way: str, cases: range) -> Counter[str]:
    """The same by a way to read, opened once."""
    answer = bitrot.run_task(bitrot.Task(part, name, way, cases))
    assert answer.failures == []
    return answer.rows[part, name, way]


@pytest.mark.parametrize("name", NAMES)
def test_the_segments_of_the_logs_that_are_flipped_have_16_kib(name: str) -> None:
    made = bitrot.subject(name)
    sizes = [parts[-1].end for file, parts in made.parts.items() if file.startswith("wal-")]
    assert (sum(sizes), len(sizes)) == (16 * 1024, 3)
    assert made.bits() == 131_072 + 4096, "and log.meta"


@pytest.mark.parametrize("mode", [*bitrot.MODES, OFFLINE])
@pytest.mark.parametrize("name", [*NAMES, *REUSED])
def test_a_flipped_bit_is_never_silent(name: str, mode: str) -> None:
    bits = range(7, bitrot.subject(name).bits(), 1201 if name in SMALL else 2333)
    counts = outcomes("flips", name, mode, bits)
    assert counts[REFUSED] > (10 if name in SMALL else 2)
    assert counts[REFUSED] + counts[READ] > len(bits) // 4
    assert counts[HARMLESS] > 0 or mode == OFFLINE
    if "closed" in name and mode != OFFLINE:
        assert not counts[TORN]


@pytest.mark.parametrize("name", ["log, closed", "log, crashed", *SHORT, *REUSED])
@pytest.mark.parametrize("mode", ["all", OFFLINE])
def test_lost_swapped_and_foreign_files_are_never_silent(name: str, mode: str) -> None:
    count = sum(1 for _ in bitrot.file_damages(bitrot.subject(name)))
    assert outcomes("files", name, mode, range(count))[REFUSED] > count // 4


def test_random_damage_of_a_large_log_is_never_silent() -> None:
    assert outcomes("random", "large log, crashed", "all", range(25))[REFUSED] > 15


# -- every way to read ----------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*NAMES, *REUSED])
def test_no_way_to_read_is_silent_about_a_flipped_bit(name: str, way: str) -> None:
    counts = seen("ways", name, way, range(11, bitrot.subject(name).bits(), 2003))
    assert counts[READ] > 5
    assert counts[HARMLESS] + counts[TORN] > 5
    if way == OWNER:
        assert not counts[TORN], "it knows how far it had come"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["log, closed", "database, crashed", "short log, crashed"])
def test_no_way_to_read_is_silent_about_lost_swapped_and_foreign_files(name: str, way: str) -> None:
    count = sum(1 for _ in bitrot.file_damages(bitrot.subject(name)))
    counts = seen("files", name, way, range(count))
    assert counts[READ] + counts[REFUSED] > count // 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["twice cut, crashed", "dropped cut, closed"])
def test_no_way_to_read_takes_a_stale_segment(name: str, way: str) -> None:
    count = sum(1 for _ in bitrot.stale_damages(name, bitrot.subject(name)))
    counts = seen("stale", name, way, range(count))
    assert counts[READ] + counts[REFUSED] > count // 4


@pytest.mark.parametrize("way", [READER, OWNER])
def test_no_way_to_read_is_silent_about_random_damage(way: str) -> None:
    counts = seen("random", "large log, closed", way, range(10))
    assert counts[READ] > 5


# -- the oracle ---------------------------------------------------------------------


def silent(part: str, name: str, mode: str, cases: range) -> int:
    goes = (found for case in cases for found in run_case(part, name, mode, case)[1])
    return sum(found.outcome == SILENT for found in goes)


class Anything(int):
    """A number that is always the right one."""

    __hash__ = int.__hash__

    def __ne__(self, other: object) -> bool:
        return False


def test_a_checksum_that_is_not_looked_at_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bitrot.subject("log, closed")
    monkeypatch.setattr(_scan, "crc32c", lambda body: Anything())
    assert silent("flips", "log, closed", "all", range(0, made.bits(), 307)) > 5


def test_a_reader_that_takes_damage_for_the_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the log's files, and of nothing else, is proof of loss made."""
    sound = _watchsource.judge_end

    def judge_end(*arguments: Any, **more: Any) -> _walk.End:
        return replace(sound(*arguments, **more), loss=None)

    monkeypatch.setattr(_watchsource, "judge_end", judge_end)
    bits = range(0, bitrot.subject("log, closed").bits(), 201)
    answer = bitrot.run_task(bitrot.Task("ways", "log, closed", READER, bits))
    assert answer.rows["ways", "log, closed", READER][SILENT] > 5


def test_segments_that_need_not_join_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "once cut, closed"
    cases = range(sum(1 for _ in bitrot.stale_damages(name, bitrot.subject(name))))
    monkeypatch.setattr(_chain, "joins", lambda *_: True)
    monkeypatch.setattr(_cursor, "joins", lambda *_: True)
    answer = bitrot.run_task(bitrot.Task("stale", name, READER, cases))
    assert answer.rows["stale", name, READER][SILENT] > 5


def test_a_format_from_the_future_that_is_taken_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bitrot.subject("short log, closed")
    damages = enumerate(bitrot.file_damages(made))
    (case,) = [case for case, damage in damages if damage.what == "log.meta from the future"]
    assert silent("files", "short log, closed", "all", range(case, case + 1)) == 0
    monkeypatch.setattr(_frame, "FORMAT_VERSION", Anything(1))
    assert silent("files", "short log, closed", "all", range(case, case + 1)) == 1


def test_a_finding_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    assert campaigns.main(["bitrot", "--replay", "flips:log, closed:all:40000"]) == 0
    assert "outcome: " in capsys.readouterr().out
    assert campaigns.main(["bitrot", "--replay", "ways:log, closed:reader:40000"]) == 0
    assert capsys.readouterr().out.count("outcome: ") == 3
    assert campaigns.main(["bitrot", "--replay", "flips:no such log:all:1"]) == 2
    assert campaigns.main(["bitrot", "no such part"]) == 2
