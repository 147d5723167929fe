"""The bit rot campaign: a short share of it, and that its oracle is not blind."""

from __future__ import annotations

from collections import Counter

import pytest
from campaigns import __main__ as campaigns, bitrot
from campaigns.bitrot import HARMLESS, OFFLINE, REFUSED, SHORT, SILENT, SMALL, TORN, run_case

from trio_wal import _frame, _scan

NAMES = [name for name in SMALL if bitrot.usable(name)]


def outcomes(part: str, name: str, mode: str, cases: range) -> Counter[str]:
    counts: Counter[str] = Counter()
    for case in cases:
        damage, found = run_case(part, name, mode, case)
        assert found.outcome != SILENT, (damage.what, found.error)
        counts[found.outcome] += 1
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_the_segments_of_the_logs_that_are_flipped_have_16_kib(name: str) -> None:
    made = bitrot.subject(name)
    sizes = [parts[-1].end for file, parts in made.parts.items() if file.startswith("wal-")]
    assert (sum(sizes), len(sizes)) == (16 * 1024, 3)
    assert made.bits() == 131_072 + 4096, "and log.meta"


@pytest.mark.parametrize("mode", [*bitrot.MODES, OFFLINE])
@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_never_silent(name: str, mode: str) -> None:
    bits = range(7, bitrot.subject(name).bits(), 1201)
    counts = outcomes("flips", name, mode, bits)
    assert counts[REFUSED] > 10
    assert counts[HARMLESS] > 0 or mode == OFFLINE
    if "closed" in name and mode != OFFLINE:
        assert not counts[TORN]


@pytest.mark.parametrize("name", ["log, closed", "log, crashed", *SHORT])
@pytest.mark.parametrize("mode", ["all", OFFLINE])
def test_lost_swapped_and_foreign_files_are_never_silent(name: str, mode: str) -> None:
    count = sum(1 for _ in bitrot.file_damages(bitrot.subject(name)))
    assert outcomes("files", name, mode, range(count))[REFUSED] > count // 4


def test_random_damage_of_a_large_log_is_never_silent() -> None:
    assert outcomes("random", "large log, crashed", "all", range(25))[REFUSED] > 15


# -- the oracle ---------------------------------------------------------------------


def silent(part: str, name: str, mode: str, cases: range) -> int:
    return sum(run_case(part, name, mode, case)[1].outcome == SILENT for case in cases)


class Anything(int):
    """A number that is always the right one."""

    __hash__ = int.__hash__

    def __ne__(self, other: object) -> bool:
        return False


def test_a_checksum_that_is_not_looked_at_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = bitrot.subject("log, closed")
    monkeypatch.setattr(_scan, "crc32c", lambda body: Anything())
    assert silent("flips", "log, closed", "all", range(0, made.bits(), 61)) > 5


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
    assert campaigns.main(["bitrot", "--replay", "flips:no such log:all:1"]) == 2
    assert campaigns.main(["bitrot", "no such part"]) == 2
