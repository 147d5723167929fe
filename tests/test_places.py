"""Places of consumers as values: their bytes, and how they move."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from trio_wal import Bookmark, CorruptLogError, UnsupportedFormatError, _places
from trio_wal._disk.placesfile import decode_file, encode_file
from trio_wal._places import (
    CommitPlaces,
    Move,
    Place,
    Places,
    PlacesError,
    decode_moves,
    decode_places,
    encode_moves,
    encode_places,
)

UUID = bytes(range(16))
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=255)
lsns = st.integers(0, 2**63 - 1)
bookmarks = st.builds(Bookmark, lsns, lsns)
moves = st.dictionaries(
    names, st.builds(Move, bookmarks, st.booleans()) | st.just(Move(None)), max_size=5
)
places = st.dictionaries(
    names, st.builds(lambda a, b, e: Place(min(a, b), e, max(a, b)), lsns, lsns, lsns), max_size=5
)


@settings(max_examples=100, deadline=None)
@given(moves, st.binary(max_size=5), st.binary(max_size=5))
def test_moves_are_read_back(found: dict[str, Move], before: bytes, after: bytes) -> None:
    data = before + encode_moves(found)
    assert decode_moves(data + after, len(before)) == (found, len(data))


@settings(max_examples=100, deadline=None)
@given(places)
def test_places_are_read_back(found: dict[str, Place]) -> None:
    assert decode_places(encode_places(found)) == found
    assert decode_file("f", encode_file(UUID, found), UUID) == found


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_whatever_stands_there_is_places_or_an_error(data: bytes) -> None:
    for decode in (decode_moves, decode_places):
        with contextlib.suppress(PlacesError):
            decode(data)
    with pytest.raises((CorruptLogError, UnsupportedFormatError)):
        decode_file("f", data, UUID)


def entry(kind: int, name: bytes, lsn: int = 0, epoch: int = 0) -> bytes:
    return _places._MOVE.pack(kind, len(name), lsn, epoch) + name


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\1", "cut short"),
        (b"\1\0", "cut short"),
        (b"\xe9\3", "1,001 consumers, over 1,000"),
        (b"\1\0" + entry(1, b"name")[:-1], "the name of a consumer is cut short"),
        (b"\1\0" + entry(1, b""), "no name of a consumer"),
        (b"\1\0" + entry(1, b"a" * 256), "no name of a consumer"),
        (b"\1\0" + entry(1, b"\xff"), "no name of a consumer"),
        (b"\1\0" + entry(3, b"a"), "an entry of kind 3"),
        (b"\2\0" + 2 * entry(1, b"a"), "or a second one, for consumer 'a'"),
        (b"\1\0" + entry(0, b"a", 1), "was dropped, and has a place"),
        (b"\1\0" + entry(1, b"a", 1 << 63), "a place to which no log comes"),
    ],
)  # fmt: skip
def test_bad_moves_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(PlacesError, match=reason):
        decode_moves(data)


def test_bad_places_are_refused() -> None:
    one = encode_places({"a": Place(3, 0, 5)})
    with pytest.raises(PlacesError, match=r"^1 bytes after the places of consumers$"):
        decode_places(one + b"\0")
    with pytest.raises(PlacesError, match=r"^a second place of consumer 'a'$"):
        decode_places(b"\2\0" + 2 * one[2:])
    with pytest.raises(PlacesError, match="a place to which no log comes"):
        decode_places(encode_places({"a": Place(3, 0, 2)}))
    with pytest.raises(PlacesError, match=r"bytes of places, over"):
        decode_places(bytes(_places.PLACES_BYTES_MAX + 1))


def test_every_changed_bit_of_the_file_is_found() -> None:
    data = encode_file(UUID, {"a": Place(3, 7, 3), "b": Place(0, 0, 0)})
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptLogError, UnsupportedFormatError)):
            decode_file("f", bytes(changed), UUID)
    for size in range(len(data)):
        with pytest.raises(CorruptLogError, match="without this file every consumer"):
            decode_file("f", data[:size], UUID)
    with pytest.raises(CorruptLogError, match="those of another log"):
        decode_file("f", data, bytes(16))


def test_the_longest_places_there_are_can_be_read_back() -> None:
    most = {chr(0x10000 + n) * 255: Place(n, n, n) for n in range(_places.CONSUMERS_MAX)}
    assert len(encode_places(most)) == _places.PLACES_BYTES_MAX
    assert decode_places(encode_places(most)) == most


def test_a_place_moves_forward_only_and_only_where_there_is_one() -> None:
    known = Places({"a": Place(5, 0, 5)})
    assert known.moved({"a": Move(Bookmark(5, 0)), "b": Move(Bookmark(1, 0))}) == {}
    assert known.moved({"a": Move(Bookmark(6, 0))}) == {"a": Place(6, 0, 6)}
    assert known.moved({"a": Move(Bookmark(2, 0), begins=True)}) == {"a": Place(2, 0, 2)}
    assert known.moved({"a": Move(None), "b": Move(None)}) == {"a": None}
    assert known.now == {}


class Reckoner:
    """What `CommitPlaces` keeps, reckoned from the whole log."""

    def __init__(self) -> None:
        self.alone: list[bool] = [False]
        """Of each record, whether it is an acknowledgement and nothing else."""

    def lag(self, place: Place) -> int:
        return self.alone[place.lsn + 1 :].count(False)


@pytest.mark.parametrize("seed", range(30))
def test_the_lag_is_what_is_in_the_log_and_nothing_is_reached_over(seed: int) -> None:
    """Also where places are taken from a checkpoint, and the rest is replayed."""
    rng = random.Random(seed)
    reckoner, record = Reckoner(), [{}]  # type: tuple[Reckoner, list[dict[str, Move]]]
    live = CommitPlaces({}, 0, 0)
    for lsn in range(1, 120):
        alone = rng.random() < 0.5
        move: dict[str, Move] = {}
        if alone or rng.random() < 0.2:
            name = rng.choice("abc")
            old = live.now.get(name)
            if old is None:
                move[name] = Move(Bookmark(rng.randrange(lsn), 0), begins=True)
            elif rng.random() < 0.05:
                move[name] = Move(None)
            else:
                commits = [n for n in range(old.lsn + 1, lsn) if not reckoner.alone[n]]
                move[name] = Move(Bookmark(rng.choice(commits or [old.lsn]), 0))
        reckoner.alone.append(alone)
        record.append(move)
        if move:
            live.record(lsn, move, alone=alone)
        for place in live.now.values():
            assert live.lag(place, lsn) == reckoner.lag(place)
            assert all(reckoner.alone[place.lsn + 1 : place.reach + 1])
        check_replayed(rng, live, reckoner, record)


def check_replayed(
    rng: random.Random, live: CommitPlaces, reckoner: Reckoner, record: list[dict[str, Move]]
) -> None:
    """A checkpoint at some LSN, and the records after it, give the same places."""
    last = len(record) - 1
    covered = rng.randint(0, last)
    whole = replayed(CommitPlaces({}, 0, 0), record, reckoner, 1, covered)
    commit_lsn = max(n for n in range(covered + 1) if not reckoner.alone[n])
    again = CommitPlaces(whole.now, commit_lsn, covered)
    replayed(again, record, reckoner, covered + 1, last)
    assert again.now == live.now
    for place in again.now.values():
        lag = again.lag(place, last)
        assert lag >= reckoner.lag(place)
        assert (lag == 0) == (reckoner.lag(place) == 0)


def replayed(
    known: CommitPlaces, record: list[dict[str, Move]], reckoner: Reckoner, first: int, last: int
) -> CommitPlaces:
    for lsn in range(first, last + 1):
        if record[lsn]:
            known.record(lsn, record[lsn], alone=reckoner.alone[lsn])
    return known


def test_many_acknowledgements_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_places, "LSNS_NOTED_MAX", 16)
    known = CommitPlaces({"slow": Place(0, 0, 0)}, 0, 0)
    move: Any = {"quick": Move(Bookmark(0, 0), begins=True)}
    for lsn in range(2, 4002, 2):
        known.record(lsn, move, alone=True)
        move = {"quick": Move(Bookmark(lsn - 1, 0))}
    assert len(known._lsns) <= 16
    # 2,000 commits, told from as many acknowledgements.
    assert known.lag(known.now["slow"], 4000) == pytest.approx(2000, rel=0.1)
    known.forget_before(4000)
    assert not known._lsns
    assert known._every == 1
