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

import attrs

from ._identity import EPOCH_MAX, Bookmark

NAME_CHARACTERS_MAX: Final = 255
CONSUMERS_MAX: Final = 1000
"""Of one log: their places are written together."""

_COUNT: Final = Struct("<H")
_ENTRY: Final = Struct("<BHQQQ")
"""Kind, bytes of the name, LSN, epoch, acknowledgements after it; the name follows."""
_NAME_BYTES_MAX: Final = 4 * NAME_CHARACTERS_MAX
PLACES_BYTES_MAX: Final = _COUNT.size + CONSUMERS_MAX * (_ENTRY.size + _NAME_BYTES_MAX)

_ENDED, _MOVED, _BEGUN = 0, 1, 2


class PlacesError(ValueError):
    """The bytes are no places."""


@final
@attrs.frozen
class Place:
    """Up to where a consumer has acknowledged."""

    lsn: int
    """The last record that it is done with; 0: none."""
    epoch: int
    acknowledgements: int = 0
    """Of the records after it that a checkpoint covers, so many are no commits, but
    acknowledgements; in what a store says only."""

    @property
    def bookmark(self) -> Bookmark:
        return Bookmark(self.lsn, self.epoch)


@final
@attrs.frozen
class Move:
    """What becomes of one consumer's place."""

    place: Place | None
    """None: the consumer is dropped."""
    begins: bool = False
    """Whether this is its first place, or only moves one that there is, forward."""


Moves = Mapping[str, Move]


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
        text, place = name.encode(), move.place
        if place is None:
            parts.append(_ENTRY.pack(_ENDED, len(text), 0, 0, 0))
        else:
            kind = _BEGUN if move.begins else _MOVED
            parts.append(
                _ENTRY.pack(kind, len(text), place.lsn, place.epoch, place.acknowledgements)
            )
        parts.append(text)
    return b"".join(parts)


def decode_moves(data: bytes, at: int = 0) -> tuple[dict[str, Move], int]:
    """The moves that stand at an offset, and where they end.

    Raises `PlacesError`.
    """
    if len(data) < at + _COUNT.size:
        raise PlacesError("places of consumers are cut short")
    (count,) = _COUNT.unpack_from(data, at)
    at += _COUNT.size
    if count > CONSUMERS_MAX:
        raise PlacesError(f"{count:,} consumers, over {CONSUMERS_MAX:,}")
    moves: dict[str, Move] = {}
    for _ in range(count):
        if len(data) < at + _ENTRY.size:
            raise PlacesError("places of consumers are cut short")
        kind, size, lsn, epoch, acknowledgements = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        name = _decode_name(data[at : at + size], size)
        at += size
        if kind not in (_ENDED, _MOVED, _BEGUN) or name in moves:
            raise PlacesError(f"an entry of kind {kind}, or a second one, for consumer {name!r}")
        if max(lsn, epoch) > EPOCH_MAX or acknowledgements > EPOCH_MAX:
            raise PlacesError(f"consumer {name!r} has a place to which no log comes")
        if kind == _ENDED:
            if lsn or epoch or acknowledgements:
                raise PlacesError(f"consumer {name!r} was dropped, and has a place")
            moves[name] = Move(None)
        else:
            moves[name] = Move(Place(lsn, epoch, acknowledgements), kind == _BEGUN)
    return moves, at


def _decode_name(data: bytes, size: int) -> str:
    if len(data) != size:
        raise PlacesError("the name of a consumer is cut short")
    try:
        return check_consumer_name(data.decode())
    except ValueError as exc:
        raise PlacesError(f"no name of a consumer: {exc}") from exc


def encode_places(places: Mapping[str, Place]) -> bytes:
    return encode_moves({name: Move(place, True) for name, place in places.items()})


def decode_places(data: bytes) -> dict[str, Place]:
    """Raises `PlacesError`."""
    if len(data) > PLACES_BYTES_MAX:
        raise PlacesError(f"{len(data):,} bytes of places, over {PLACES_BYTES_MAX:,}")
    moves, end = decode_moves(data)
    if end != len(data):
        raise PlacesError(f"{len(data) - end} bytes after the places of consumers")
    places: dict[str, Place] = {}
    for name, move in moves.items():
        if move.place is None or not move.begins:
            raise PlacesError(f"consumer {name!r} has no place")
        places[name] = move.place
    return places


# -- how they move ----------------------------------------------------------------------


class Places:
    """Those of one log, at its durable end."""

    def __init__(self, places: Mapping[str, Place] | None = None, covered_lsn: int = 0) -> None:
        """
        Args:
          places: as a checkpoint says.
          covered_lsn: the LSN of that checkpoint.
        """
        self.now: dict[str, Place] = dict(places or {})
        self._covered = covered_lsn
        self._acknowledgements: array[int] = array("Q")
        """LSNs of records that are acknowledgements and nothing else, ascending; without those
        that a checkpoint covered when this began, which each place counts."""

    def moved(self, moves: Moves) -> dict[str, Place | None]:
        """These moves have become durable; gives what has changed."""
        changed: dict[str, Place | None] = {}
        for name, move in moves.items():
            place, old = move.place, self.now.get(name)
            if place is None:
                if self.now.pop(name, None) is not None:
                    changed[name] = None
            elif move.begins or (old is not None and place.lsn > old.lsn):
                hidden = 0 if old is None or move.begins else old.acknowledgements
                most = max(0, self._covered - place.lsn)
                self.now[name] = Place(place.lsn, place.epoch, min(hidden, most))
                changed[name] = self.now[name]
        return changed

    def acknowledged_at(self, lsn: int) -> None:
        """The record ``lsn`` is an acknowledgement and nothing else."""
        self._acknowledgements.append(lsn)

    def hidden(self, place: Place, lsn: int) -> int:
        """How many of the records after a place, up to ``lsn``, are acknowledgements."""
        known = self._acknowledgements
        return place.acknowledgements + bisect_right(known, lsn) - bisect_right(known, place.lsn)

    def lag(self, place: Place, durable_lsn: int) -> int:
        """Records after a place that are more than acknowledgements."""
        return max(0, durable_lsn - place.lsn - self.hidden(place, durable_lsn))

    def reach(self, place: Place, durable_lsn: int) -> int:
        """An LSN up to which nothing but acknowledgements comes after a place."""
        return max(place.lsn, durable_lsn) if not self.lag(place, durable_lsn) else place.lsn

    def forget_before(self, lsn: int) -> None:
        """No place will be asked for that is before this one."""
        del self._acknowledgements[: bisect_right(self._acknowledgements, lsn)]
