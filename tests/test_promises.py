"""The books that all campaigns keep: what a log may hold is allowed, all else has its words.

Each story is told twice where that matters: to books that see all that is written (as those
of the simulator, which looks at images), and to books that know only what calls have said.
"""

from __future__ import annotations

import re
from collections.abc import Hashable

import pytest
from campaigns._promises import Promises, Wrong, anything, apply, check, check_serial


def promises_of(*tasks: tuple[int, bytes], durable: int = 0, complete: bool = True) -> Promises:
    """Of a log with these records, (task, payload) each."""
    promises = Promises(complete=complete)
    records = [promises.submit(task, payload)[0] for task, payload in tasks]
    pairs = [(lsn, payload) for lsn, (_, payload) in enumerate(tasks, 1)]
    assert promises.check(pairs, 1, killed=True) == []
    if complete:
        assert promises.learn(pairs) == records
    promises.acknowledge(records[:durable], 1)
    return promises


def said(promises: Promises, *keys: Hashable, first: int = 1, **how: bool) -> list[str]:
    """What is wrong with a log that holds these."""
    return list(map(str, promises.check(list(enumerate(keys, first)), first, **how)))


def learn(promises: Promises, *keys: Hashable, first: int = 1) -> None:
    assert said(promises, *keys, first=first, killed=True) == []
    promises.learn(list(enumerate(keys, first)))


A, B, C, D, X = b"a", b"b", b"c", b"d", b"x"
THREE = (0, A), (1, B), (0, C)


@pytest.mark.parametrize("complete", [True, False])
def test_what_is_acknowledged_is_there_and_the_rest_may_be(complete: bool) -> None:
    promises = promises_of(*THREE, durable=2, complete=complete)
    assert said(promises, A, B) == said(promises, A, B, C) == []
    assert said(promises, A) == ["lost: ends at LSN 1, durable was 2"]
    assert said(promises) == ["lost: ends at LSN 0, durable was 2"]
    assert "lost: LSN 2 holds b'c', b'b' was there" in said(promises, A, C)
    assert "lost: LSN 2 holds None, b'b' was there" in said(promises, A, None)


@pytest.mark.parametrize("complete", [True, False])
def test_what_nobody_wrote_or_stands_there_twice_is_wrong(complete: bool) -> None:
    promises = promises_of((0, A), (1, B), durable=2, complete=complete)
    assert said(promises, A, B, X) == ["LSN 3 holds b'x', which nobody wrote"]
    assert "LSN 3 holds b'a', which must not be there" in said(promises, A, B, A)
    assert str(promises.check([(1, A), (3, C)], 1)[0]) == "LSNs [1, 3] from 1 on"


def test_what_no_image_showed_is_not_in_later_ones() -> None:
    promises = promises_of((0, A), durable=1)
    promises.submit(0, B)
    assert said(promises, A, B) == []
    assert said(promises, A, B, new=False) == ["LSN 2 holds b'b', which must not be there"]
    promises.begin_drop(4)
    assert said(promises, first=3) == ["starts at LSN 3, only 1 were written"]


def test_an_acknowledgement_is_not_believed_that_no_image_showed() -> None:
    promises = Promises(complete=True)
    unit = promises.submit(0, A)
    with pytest.raises(Wrong, match=r"^lost: LSN 1 is acknowledged, but b'a' was never seen"):
        promises.acknowledge(unit, 1)
    assert promises.unknown() == unit


def test_one_lsn_is_given_once_and_to_what_was_seen_there() -> None:
    promises = promises_of((0, A), (1, B), durable=1, complete=False)
    with pytest.raises(Wrong, match=r"^LSN 1 was given to b'a' and to b'b'$"):
        promises.acknowledge([promises.records[B]], 1)
    with pytest.raises(Wrong, match=r"^lost: LSN 2 is acknowledged, but b'a' was LSN 1$"):
        promises.acknowledge([promises.records[A]], 2)


def test_what_is_only_written_is_there_after_a_kill() -> None:
    promises = promises_of((0, A), complete=False)
    promises.acknowledge([promises.records[A]], 1, durable=False)
    assert said(promises) == []
    assert said(promises, killed=True) == ["lost: ends at LSN 0, durable was 1"]
    promises.settle_durable(1)
    assert said(promises) == ["lost: ends at LSN 0, durable was 1"]


@pytest.mark.parametrize("complete", [True, False])
def test_a_task_keeps_its_order_and_what_was_withdrawn_is_absent(complete: bool) -> None:
    promises = Promises(complete=complete)
    first, second, third = (promises.submit(0, key) for key in (A, B, C))
    assert said(promises, A, B, C) == said(promises, A, B) == said(promises) == []
    assert said(promises, B) == ["of task 0, [\"b'a'\"] are missing in between"]
    assert "the records of task 0 are out of order" in said(promises, B, A)
    promises.withdraw(first, "append raised Cancelled")
    assert said(promises, B) == []
    assert said(promises, B, A)[0] == "LSN 2 holds b'a', which must not be there"
    learn(promises, B)
    with pytest.raises(Wrong, match=r"^append raised Cancelled, but LSN 1 is in the file$"):
        promises.withdraw(second, "append raised Cancelled")
    assert third[0].lsn is None


def test_of_what_was_never_seen_some_may_have_been_dropped() -> None:
    for complete in (False, True):
        promises = Promises(complete=complete, asked=9)
        for key in (A, B, C, D):
            promises.submit(0, key)
        problems = said(promises, C, D, first=3)
        assert bool(problems) == complete
        assert said(promises, B, D, first=3)


@pytest.mark.parametrize("complete", [True, False])
def test_a_unit_is_there_whole_or_not_at_all(complete: bool) -> None:
    promises = Promises(complete=complete)
    promises.submit(0, A, B, C)
    promises.submit(1, D)
    assert "partial: b'd' at LSN 2 is in another's unit" in said(promises, A, D)
    assert said(promises, A, B) == ["partial: ends at LSN 2, inside of a unit"]
    assert "partial: b'b' at LSN 1 is in another's unit" in said(promises, B)
    learn(promises, A, B, C)
    assert said(promises) == said(promises, A, B, C, D) == []
    assert said(promises, A, B) == ["partial: ends at LSN 2, inside of a unit"]
    promises.begin_drop(2)
    assert said(promises, B, C, first=2)[0] == "partial: starts at LSN 2, inside of a unit"


def test_what_a_flush_covered_is_there_or_was_dropped() -> None:
    promises = promises_of((0, A), durable=1, complete=False)
    promises.cover(promises.submit(0, B), above=1)
    assert promises.is_sure(promises.records[B])
    assert said(promises, A) == ["lost: b'b' is not there, and was called durable"]
    assert said(promises, A, B) == []
    promises.begin_drop(3)
    assert said(promises, first=3) == []


# -- what is dropped ---------------------------------------------------------------------


def test_no_more_is_dropped_than_was_asked_for_and_not_less_than_was_told() -> None:
    wrong = "lost: starts at LSN 3, only what is below 2 was to be dropped"
    promises = promises_of(*THREE, durable=3)
    promises.begin_drop(2)
    assert said(promises, A, B, C) == said(promises, B, C, first=2) == []
    assert said(promises, C, first=3) == said(promises, C, first=3, killed=True) == [wrong]
    with pytest.raises(Wrong, match=wrong):
        promises.raise_floor(3)
    promises.end_drop(2)
    promises.raise_floor(2)
    assert said(promises, C, first=3) == [wrong]
    assert said(promises, A, B, C) == ["starts at LSN 1, what is below 2 came back"]


def test_retention_is_asked_once_the_open_log_has_dropped() -> None:
    promises = promises_of(*THREE, durable=3)
    promises.lets_go = lambda first_lsn: first_lsn <= 2
    assert said(promises, C, first=3) == []
    promises.raise_floor(2)
    with pytest.raises(Wrong, match=r"^lost: starts at LSN 3, only what is below 1 was to be"):
        promises.raise_floor(3)
    promises.lets_go = anything
    promises.raise_floor(3)
    assert promises.floor == 3


def test_what_was_asked_is_forgotten_behind_a_cut_and_after_a_crash() -> None:
    promises = promises_of(*THREE, durable=3)
    promises.begin_drop(4)
    promises.end_drop(4)
    promises.begin_cut(1)
    promises.end_cut(done=True)
    promises.submit(2, D)
    learn(promises, A, D)
    assert said(promises, D, first=2) == []
    (wrong,) = said(promises, first=3)
    assert wrong.startswith("lost: starts at LSN 3, only what is below 2 was to be")
    promises.begin_drop(3)
    assert said(promises, first=3) == []
    # The session dies in that call, and its records are there.
    promises.crashed([(1, A), (2, D)], 1)
    assert said(promises, first=3)[0].startswith("lost: starts at LSN 3, only what is below 1")


# -- what is cut -------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [True, False])
def test_a_cut_is_made_whole_or_not_at_all(complete: bool) -> None:
    promises = promises_of(*THREE, durable=3, complete=complete)
    promises.begin_cut(1)
    assert said(promises, A) == said(promises, A, B, C) == []
    for keys in ((A, B), ()):
        (wrong,) = said(promises, *keys)
        assert re.match(r"partial: the cut after LSN 1 is neither not made \(lost: ends", wrong)
    (late,) = promises.submit(2, D)
    learn(promises, A, D)
    promises.acknowledge([late], 2)
    assert said(promises, A, B, C) == []
    promises.end_cut(done=True)
    assert said(promises, A, D) == []
    assert said(promises, A) == ["lost: ends at LSN 1, durable was 2"]
    assert "lost: LSN 2 holds b'b', b'd' was there" in said(promises, A, B, C)


def test_what_was_handed_over_before_a_cut_is_not_behind_it() -> None:
    promises = promises_of((0, A), (0, B), durable=2)
    promises.submit(1, C)
    promises.begin_cut(1)
    (wrong,) = said(promises, A, C)
    assert wrong.endswith(
        "nor made (LSN 2 holds b'c', handed over before the cut that it is behind)"
    )
    promises.end_cut(done=True)
    assert said(promises, A, C) == ["LSN 2 holds b'c', which must not be there"]


def test_a_cut_that_was_refused_and_made_is_found() -> None:
    promises = promises_of((0, A), (0, B), durable=2)
    promises.begin_cut(1)
    promises.submit(1, C)
    learn(promises, A, C)
    with pytest.raises(Wrong, match=r"^partial: the cut after LSN 1 was refused, and was made$"):
        promises.end_cut(done=False)


@pytest.mark.parametrize("complete", [True, False])
def test_a_cut_through_a_unit_leaves_its_beginning(complete: bool) -> None:
    promises = Promises(complete=complete)
    unit = promises.submit(0, A, B, C)
    learn(promises, A, B, C)
    promises.acknowledge(unit, 1)
    promises.begin_cut(2)
    assert said(promises, A, B) == []
    promises.submit(1, D)
    learn(promises, A, B, D)
    promises.end_cut(done=True)
    assert said(promises, A, B, D) == said(promises, A, B) == []
    assert said(promises, A) == [
        "lost: ends at LSN 1, durable was 2",
        "partial: ends at LSN 1, inside of a unit",
    ]


# -- crashes -----------------------------------------------------------------------------


@pytest.mark.parametrize("complete", [True, False])
def test_what_a_crash_took_never_comes_back(complete: bool) -> None:
    promises = promises_of((0, A), (1, B), durable=1, complete=complete)
    promises.crashed([(1, A)], 1)
    promises.opened([(1, A)], 1)
    assert said(promises, A, B) == ["LSN 2 holds b'b', which must not be there"]
    promises.submit(1, C)
    learn(promises, A, C)
    assert said(promises, A, C) == []


def test_what_an_opening_found_is_durable() -> None:
    promises = promises_of((0, A), (1, B), durable=1)
    promises.crashed([(1, A), (2, B)], 1)
    assert said(promises, A) == []
    assert said(promises, A, killed=True) == ["lost: ends at LSN 1, durable was 2"]
    promises.opened([(1, A), (2, B)], 2)
    assert said(promises, A) == ["lost: ends at LSN 1, durable was 2"]
    with pytest.raises(Wrong, match=r"^lost: opened at LSN 1, 2 were there$"):
        promises.opened([(1, A)], 1)


def test_a_cut_that_seems_made_is_settled_once_the_log_is_open() -> None:
    promises = promises_of((0, A), (0, B), durable=2)
    promises.begin_cut(1)
    promises.crashed([(1, A)], 1)
    assert said(promises, A) == said(promises, A, B) == []
    promises.opened([(1, A)], 1)
    assert said(promises, A, B) == ["LSN 2 holds b'b', which must not be there"]
    promises = promises_of((0, A), (0, B), durable=2)
    promises.begin_cut(1)
    promises.crashed([(1, A), (2, B)], 1)
    assert said(promises, A)[0] == "lost: ends at LSN 1, durable was 2"


def test_what_is_known_to_be_there_below_is_not_gone() -> None:
    promises = Promises(lets_go=anything)
    (below,) = promises.submit(0, A)
    promises.submit(0, B)
    promises.crashed([(2, B)], 2, {below})
    assert said(promises, B, first=2) == said(promises, A, B) == []


def test_a_copy_goes_its_own_way() -> None:
    promises = promises_of((0, A), (1, B), durable=1, complete=False)
    then = promises.copy()
    promises.acknowledge([promises.records[B]], 2)
    assert said(promises, A)
    assert not said(then, A)


# -- of a database -----------------------------------------------------------------------


def test_a_transaction_read_what_stood_before_it() -> None:
    state = {b"a": b"1", b"b": b"2"}
    check_serial(3, state, {b"a": b"1", b"c": None}, sorted(state.items()))
    with pytest.raises(Wrong, match=r"^LSN 3 is not serializable: it read b'a'$"):
        check_serial(3, state, {b"a": b"0"})
    with pytest.raises(Wrong, match=r"^LSN 3 is not serializable: it scanned$"):
        check_serial(3, state, {}, [(b"a", b"1")])
    apply(state, {b"a": None, b"c": b"3"})
    assert state == {b"b": b"2", b"c": b"3"}


def test_what_is_wrong_says_of_which_kind_it_is() -> None:
    assert str(Wrong("lost", "it")) == "lost: it"
    assert Wrong("partial", "it").kind == "partial"
    check(True, "nothing")
    with pytest.raises(Wrong, match=r"^two words$"):
        check(False, "two", "words")
