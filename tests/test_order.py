"""Keys in order, made ready bit by bit."""

from __future__ import annotations

from hypothesis import given, strategies as st

from trio_wal._order import RUNS_MERGED, SortedKeys

key_sets = st.lists(st.binary(max_size=3), max_size=60)
bounds = st.none() | st.binary(max_size=3)


def expected(keys: list[bytes], start: bytes | None, stop: bytes | None) -> list[bytes]:
    return sorted(
        {key for key in keys if (start is None or key >= start) and (stop is None or key < stop)}
    )


@given(key_sets, key_sets, st.integers(1, 5), bounds, bounds)
def test_they_come_as_from_one_sorted_set_between_any_bounds(
    given_keys: list[bytes], added: list[bytes], run: int, start: bytes | None, stop: bytes | None
) -> None:
    keys = SortedKeys(given_keys)
    for key in added:
        keys.fresh.append(key)
        if len(keys.fresh) == run:
            keys.tidy()
        # A look in between changes nothing.
        assert list(keys.between(key, key + b"\0", reverse=False)) == [key]
    found = expected([*given_keys, *added], start, stop)
    assert list(keys.between(start, stop, reverse=False)) == found
    assert list(keys.between(start, stop, reverse=True)) == found[::-1]


def test_short_runs_become_long_ones_so_that_a_scan_merges_few() -> None:
    keys = SortedKeys()
    for number in range(100 * RUNS_MERGED + 3):
        keys.fresh.append(b"%06d" % (number * 7919 % 10_000))
        keys.tidy()
    assert (len(keys._long), len(keys._short)) == (1 + 100, 3)
    assert {len(run) for run in keys._long[1:]} == {RUNS_MERGED}
    assert len(list(keys.between(None, None, reverse=False))) == 100 * RUNS_MERGED + 3
