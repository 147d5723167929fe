"""The places of consumers: which there are, how they move, and their bytes.

Law: values only; whatever comes from a disk is checked, with bounds, before it is believed.

A place is the last record that its consumer is done with.  Places move by changes, which are
applied in the order in which they became durable; the same changes give the same places
anywhere: in a running log, in its recovery, and in a reader of it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping
from struct import Struct
from typing import Final, final

import msgspec
from msgspec.structs import replace

from ._identity import EPOCH_MAX, Bookmark

NAME_CHARACTERS_MAX: Final = 255
CONSUMERS_MAX: Final = 1000
"""Of one log: their places are written together."""
LSNS_NOTED_MAX: Final = 1 << 16
"""Of acknowledgements, to count how many there are somewhere; beyond, every other one, and so
on."""

_COUNT: Final = Struct("<H")
_MOVE: Final = Struct("<BHQQ")
"""Kind, bytes of the name, LSN, epoch; the name follows."""
_PLACE: Final = Struct("<HQQQ")
"""Bytes of the name, LSN, epoch, reach; the name follows."""
_NAME_BYTES_MAX: Final = 4 * NAME_CHARACTERS_MAX
PLACES_BYTES_MAX: Final = _COUNT.size + CONSUMERS_MAX * (_PLACE.size + _NAME_BYTES_MAX)

_ENDED, _MOVED, _BEGUN = 0, 1, 2


class PlacesError(ValueError):
    """The bytes are no places."""


@final
class Place(msgspec.Struct, frozen=True):
    """Up to where a consumer has acknowledged."""

    lsn: int
    """The last record that it is done with; 0: none."""
    epoch: int
    reach: int
    """What comes after ``lsn``, up to here, is nothing but acknowledgements: nothing that the
    consumer has yet to see."""

    @property
    def bookmark(self) -> Bookmark:
        return Bookmark(self.lsn, self.epoch)


@final
class Move(msgspec.Struct, frozen=True):
    """What becomes of one consumer's place."""

    bookmark: Bookmark | None
    """The new place; None: the consumer is dropped."""
    begins: bool = False
    """Whether this is its first place, or only moves one that there is, forward."""


Moves = Mapping[str, Move]


def is_after(move: Move, old: Move) -> bool:
    """Whether one of two moves of a consumer, which become durable together, is the one that
    counts: the first that was made is ``old``."""
    if move.begins or move.bookmark is None or old.bookmark is None:
        return True
    return move.bookmark.lsn > old.bookmark.lsn


def consumer_hold(name: str) -> str:
    """Under which name the log is held for a consumer."""
    return f"consumer:{name}"


def check_consumer_name(name: object) -> str:
    """Raises `TypeError` or `ValueError` that names ``name``."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, not {type(name).__name__}")
    if not 0 < len(name) <= NAME_CHARACTERS_MAX:
        raise ValueError(f"name must have 1 to {NAME_CHARACTERS_MAX} characters, not {len(name)}")
    try:
        name.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"name must be text that UTF-8 can encode, not {name!r}") from exc
    return str(name)


# -- bytes ------------------------------------------------------------------------------


def encode_moves(moves: Moves) -> bytes:
    parts = [_COUNT.pack(len(moves))]
    for name, move in moves.items():
        text, place = name.encode(), move.bookmark
        if place is None:
            parts.append(_MOVE.pack(_ENDED, len(text), 0, 0))
        else:
            kind = _BEGUN if move.begins else _MOVED
            parts.append(_MOVE.pack(kind, len(text), place.lsn, place.epoch))
        parts.append(text)
    return b"".join(parts)


def decode_moves(data: bytes, at: int = 0) -> tuple[dict[str, Move], int]:
    """The moves that stand at an offset, and where they end.

    Raises `PlacesError`.
    """
    count, at = _take_count(data, at)
    moves: dict[str, Move] = {}
    for _ in range(count):
        if len(data) < at + _MOVE.size:
            raise PlacesError("places of consumers are cut short")
        kind, size, lsn, epoch = _MOVE.unpack_from(data, at)
        name, at = _take_name(data, at + _MOVE.size, size)
        if kind not in (_ENDED, _MOVED, _BEGUN) or name in moves:
            raise PlacesError(f"an entry of kind {kind}, or a second one, for consumer {name!r}")
        if kind == _ENDED:
            if lsn or epoch:
                raise PlacesError(f"consumer {name!r} was dropped, and has a place")
            moves[name] = Move(None)
        else:
            moves[name] = Move(_check_place(name, lsn, epoch, lsn).bookmark, kind == _BEGUN)
    return moves, at


def encode_places(places: Mapping[str, Place]) -> bytes:
    parts = [_COUNT.pack(len(places))]
    for name, place in places.items():
        text = name.encode()
        parts += (_PLACE.pack(len(text), place.lsn, place.epoch, place.reach), text)
    return b"".join(parts)


def decode_places(data: bytes) -> dict[str, Place]:
    """Raises `PlacesError`."""
    if len(data) > PLACES_BYTES_MAX:
        raise PlacesError(f"{len(data):,} bytes of places, over {PLACES_BYTES_MAX:,}")
    count, at = _take_count(data, 0)
    places: dict[str, Place] = {}
    for _ in range(count):
        if len(data) < at + _PLACE.size:
            raise PlacesError("places of consumers are cut short")
        size, lsn, epoch, reach = _PLACE.unpack_from(data, at)
        name, at = _take_name(data, at + _PLACE.size, size)
        if name in places:
            raise PlacesError(f"a second place of consumer {name!r}")
        places[name] = _check_place(name, lsn, epoch, reach)
    if at != len(data):
        raise PlacesError(f"{len(data) - at} bytes after the places of consumers")
    return places


def _take_count(data: bytes, at: int) -> tuple[int, int]:
    if len(data) < at + _COUNT.size:
        raise PlacesError("places of consumers are cut short")
    (count,) = _COUNT.unpack_from(data, at)
    if count > CONSUMERS_MAX:
        raise PlacesError(f"{count:,} consumers, over {CONSUMERS_MAX:,}")
    return count, at + _COUNT.size


def _take_name(data: bytes, at: int, size: int) -> tuple[str, int]:
    text = data[at : at + size]
    if len(text) != size:
        raise PlacesError("the name of a consumer is cut short")
    try:
        return check_consumer_name(text.decode()), at + size
    except ValueError as exc:
        raise PlacesError(f"no name of a consumer: {exc}") from exc


def _check_place(name: str, lsn: int, epoch: int, reach: int) -> Place:
    if max(lsn, epoch, reach) > EPOCH_MAX or reach < lsn:
        raise PlacesError(f"consumer {name!r} has a place to which no log comes")
    return Place(lsn, epoch, reach)


# -- how they move ----------------------------------------------------------------------


class Places:
    """Those of one log, at its durable end."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.now: dict[str, Place] = dict(places)

    def moved(self, moves: Moves) -> dict[str, Place | None]:
        """These moves have become durable; gives what has changed."""
        changed: dict[str, Place | None] = {}
        for name, move in moves.items():
            place, old = move.bookmark, self.now.get(name)
            if place is None:
                if self.now.pop(name, None) is not None:
                    changed[name] = None
            elif move.begins or (old is not None and place.lsn > old.lsn):
                changed[name] = self.now[name] = Place(place.lsn, place.epoch, place.lsn)
        return changed

    def lag(self, place: Place, durable_lsn: int) -> int:
        """Records after a place."""
        return max(0, durable_lsn - place.reach)

    def began(self, name: str) -> int | None:
        """The place at which a consumer began, as long as nothing but a record says that it did."""
        return None


@final
class CommitPlaces(Places):
    """Those of a database, which move by records of its log.

    A record that does nothing else is an acknowledgement.  No consumer has to see those, so a
    place reaches over all that come directly after it.
    """

    def __init__(self, places: Mapping[str, Place], commit_lsn: int, covered_lsn: int) -> None:
        """
        Args:
          places: as a checkpoint says.
          commit_lsn: the newest record among those that it covers that is no acknowledgement.
          covered_lsn: the last one that it covers.
        """
        super().__init__(places)
        self.commit_lsn: int = commit_lsn
        """The newest one, as of the last acknowledgement."""
        self._begun: dict[str, tuple[int, int]] = {}
        """By name, of those that began after the last checkpoint: the record that says so, and the
        place."""
        self._acknowledged_lsn = covered_lsn
        """After `commit_lsn`, up to here, there are only acknowledgements."""
        self._lsns: array[int] = array("Q")
        """Of acknowledgements, ascending: one of `_every`."""
        self._every = 1
        self._due = 1

    def commit_lsn_at(self, lsn: int) -> int:
        """The newest record up to ``lsn``, the last one of all, that is no acknowledgement."""
        return self.commit_lsn if self._acknowledged_lsn == lsn else lsn

    def record(self, lsn: int, moves: Moves, *, alone: bool) -> dict[str, Place | None]:
        """The record ``lsn`` moves places; gives what has changed.

        Args:
          alone: whether it does nothing else.
        """
        changed = self.moved(moves)
        for name, move in moves.items():
            if move.bookmark is None:
                self._begun.pop(name, None)
            elif move.begins:
                self._begun[name] = lsn, move.bookmark.lsn
        if not alone:
            return changed
        if self._acknowledged_lsn != lsn - 1:
            self.commit_lsn = lsn - 1
        self._acknowledged_lsn = lsn
        for name, place in self.now.items():
            if place.reach == lsn - 1 or (name in changed and self.commit_lsn <= place.lsn):
                changed[name] = self.now[name] = replace(place, reach=max(lsn, place.lsn))
        self._note(lsn)
        return changed

    def began(self, name: str) -> int | None:
        found = self._begun.get(name)
        return None if found is None else found[1]

    def stored(self, lsn: int) -> None:
        """A checkpoint has what the records up to ``lsn`` say."""
        self._begun = {name: begun for name, begun in self._begun.items() if begun[0] > lsn}

    def _note(self, lsn: int) -> None:
        self._due -= 1
        if self._due:
            return
        if len(self._lsns) >= LSNS_NOTED_MAX:
            del self._lsns[::2]
            self._every *= 2
        self._lsns.append(lsn)
        self._due = self._every

    def lag(self, place: Place, durable_lsn: int) -> int:
        """Records after a place that are no acknowledgements: 0 only where there are none."""
        after = durable_lsn - place.reach
        if after <= 0:
            return 0
        known = self._lsns
        count = bisect_right(known, durable_lsn) - bisect_right(known, place.reach)
        return max(1, after - count * self._every)

    def forget_before(self, lsn: int) -> None:
        """No place will be asked for that is before this one."""
        del self._lsns[: bisect_right(self._lsns, lsn)]
        if not self._lsns:
            self._every = self._due = 1
