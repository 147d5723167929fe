"""Keys in order, made ready bit by bit, and gaps between them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_wal import _order
from trio_wal._order import RUNS_MERGED, Gaps, Order, Run, SortedKeys

key_sets = st.lists(st.binary(max_size=3), max_size=60, unique=True)
bounds = st.none() | st.binary(max_size=3)


def expected(keys: set[bytes], start: bytes | None, stop: bytes | None) -> list[bytes]:
    return sorted(
        key for key in keys if (start is None or key >= start) and (stop is None or key < stop)
    )


@given(key_sets, st.integers(0, 60), st.integers(1, 5), bounds, bounds)
def test_they_come_as_from_one_sorted_set_between_any_bounds(
    all_keys: list[bytes], first: int, run: int, start: bytes | None, stop: bytes | None
) -> None:
    keys = SortedKeys(all_keys[:first])
    for key in all_keys[first:]:
        keys.fresh.append(key)
        if len(keys.fresh) == run:
            keys.tidy()
        # A look in between changes nothing.
        assert list(keys.between(key, key + b"\0", reverse=False)) == [key]
    found = expected(set(all_keys), start, stop)
    assert list(keys.between(start, stop, reverse=False)) == found
    assert list(keys.between(start, stop, reverse=True)) == found[::-1]


def put(keys: SortedKeys, key: bytes) -> None:
    if key in keys.stale:
        keys.stale.remove(key)
    else:
        keys.fresh.append(key)


@pytest.mark.parametrize("block", [1, 2, 7, 512])
@pytest.mark.parametrize("stale", [0, 3, 1000])
def test_an_order_of_one_moment_stays_whatever_is_added_and_taken_out(
    block: int, stale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_order, "BLOCK_KEYS", block)
    monkeypatch.setattr(_order, "STALE_MIN", stale)
    monkeypatch.setattr(_order, "RUN_KEYS", 10)
    for seed in range(15):
        rng = random.Random(seed)
        keys = SortedKeys()
        there: set[bytes] = set()
        moments: list[tuple[Order, set[bytes]]] = []
        for _ in range(400):
            if rng.random() < 0.6 or not there:
                key = b"%02d" % rng.randrange(100)
                if key not in there:
                    put(keys, key)
                    there.add(key)
            else:
                gone = rng.sample(sorted(there), rng.choice((1, 1, 1, min(len(there), 40))))
                keys.discard(sorted(gone))
                there.difference_update(gone)
            if len(keys.fresh) >= 10:
                keys.tidy(5)
            if rng.random() < 0.1:
                moments = [*moments[-3:], (keys.order, there.copy())]
            start, stop = (rng.choice((None, b"%02d" % rng.randrange(100))) for _ in range(2))
            reverse = rng.random() < 0.5
            listed = list(keys.between(start, stop, reverse=reverse))
            assert listed == sorted(set(listed), reverse=reverse)
            assert set(listed) - keys.stale == set(expected(there, start, stop))
            for order, then in moments:
                # Maybe with some that came since, before they were sorted.
                listed = list(order.between(start, stop, reverse=reverse))
                assert listed == sorted(set(listed), reverse=reverse)
                assert set(listed) >= set(expected(then, start, stop))


def test_short_runs_become_long_ones_so_that_a_scan_merges_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_order, "RUN_KEYS", 10)
    keys = SortedKeys()
    for number in range(10_000):
        keys.fresh.append(b"%06d" % (number * 7919 % 10_000))
        if len(keys.fresh) >= (3 if number < 5000 else 10):
            keys.tidy()
    sizes = sorted(run.size for run in keys.order.runs)
    assert len(sizes) <= 10_000 // 80 + 2 * RUNS_MERGED
    assert len([size for size in sizes if size < 80]) <= 2 * RUNS_MERGED
    assert sizes[-1] < 3 * 80
    assert len(list(keys.between(None, None, reverse=False))) == 10_000


def test_runs_whose_keys_are_gone_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_order, "RUN_KEYS", 8)
    keys = SortedKeys()
    for number in range(4000):
        keys.fresh.append(b"%06d" % number)
        if len(keys.fresh) >= 8:
            keys.tidy()
        if number % 50:
            keys.discard([b"%06d" % number])
    assert len(list(keys.between(None, None, reverse=False))) <= 80 + _order.STALE_MIN + 1
    assert len(keys.order.runs) < 3 * RUNS_MERGED


class Watched(list[bytes]):
    """A block that counts the keys that are taken out of it, looked at or copied."""

    touched = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.touched += len(found) if isinstance(place, slice) else 1
        return found

    def _counted(self, keys: Iterator[bytes]) -> Iterator[bytes]:
        for key in keys:
            self.touched += 1
            yield key

    def __iter__(self) -> Iterator[bytes]:
        return self._counted(super().__iter__())

    def __reversed__(self) -> Iterator[bytes]:
        return self._counted(super().__reversed__())


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("start", [None, b"", b"000010", b"001000", b"002500"])
@pytest.mark.parametrize("stop", [None, b"~", b"009990", b"009000", b"005000"])
def test_the_first_keys_of_a_run_touch_no_more_of_it_than_a_search_does(
    start: bytes | None, stop: bytes | None, reverse: bool
) -> None:
    """There are dozens of runs where a snapshot is of half of a million keys, in no order."""
    keys = [b"%06d" % number for number in range(10_000)]
    blocks = [Watched(keys[first : first + 500]) for first in range(0, 10_000, 500)]
    run = Run([*blocks], [max(list(block)) for block in blocks], len(keys))
    for block in blocks:
        block.touched = 0
    found = run.between(start, stop, reverse)
    assert found is not None
    first = list(islice(found, 3))
    within = expected(set(keys), start, stop)
    assert first == (within[::-1] if reverse else within)[:3]
    # At most one search of a block for each bound, and a look at the run's own ends.
    assert sum(block.touched for block in blocks) <= 2 * (500).bit_length() + 3 + 4
    assert [*first, *found] == (within[::-1] if reverse else within)


# -- gaps --------------------------------------------------------------------------


def stretches(numbers: set[int]) -> list[tuple[bytes, bytes]]:
    """Of numbers: those that follow one another are one."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] + 1 == number:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [(b"%03d" % first, b"%03d" % last) for first, last in found]


@pytest.mark.parametrize("block", [2, 4, 512])
def test_gaps_are_disjoint_in_order_and_those_that_touch_become_one(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_order, "BLOCK_KEYS", block)
    for seed in range(40):
        rng = random.Random(seed)
        gaps = Gaps()
        dead: set[int] = set()
        copies: list[tuple[Gaps, list[tuple[bytes, bytes]]]] = []
        for _ in range(150):
            first = rng.randrange(500)
            last = first + rng.choice((0, 0, 0, 1, 2, 30))
            dead.update(range(first, last + 1))
            # Whoever puts one says what it touches: see `Layer._widen_gaps`.
            while first - 1 in dead:
                first -= 1
            while last + 1 in dead:
                last += 1
            gaps.put(b"%03d" % first, b"%03d" % last)
            there = stretches(dead)
            if rng.random() < 0.1:
                copies = [*copies[-3:], (gaps.copy(), there)]
            for found, then in ((gaps, there), *copies):
                assert list(found.between(None, None, False)) == then
            bound, other = (b"%03d" % rng.randrange(510) for _ in range(2))
            around = [gap for gap in there if gap[0] <= bound <= gap[1]]
            assert gaps.around(bound) == (around[0] if around else None)
            assert list(gaps.between(bound, other, False)) == [
                gap for gap in there if bound <= gap[0] < other
            ]
            assert list(gaps.between(bound, other, True)) == [
                gap for gap in reversed(there) if bound <= gap[1] < other
            ]
            assert gaps.beyond(bound, False) == (around[0][1] + b"\0" if around else bound)
            assert gaps.beyond(bound, True) == (around[0][0] if around else bound)
            assert all(before[1] < behind[0] for before, behind in pairwise(there))
        assert not Gaps()
        assert gaps
