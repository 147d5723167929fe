"""Images of a disk as a power cut may leave it, from a recording of what it went through.

Law: pure.  What was written before the last barrier that was completed is there.  Of what was
written since, any part may be there: each sector is as it was or as one of those writes left
it, whatever became of its neighbours.  Only a superblock is written whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from random import Random
from typing import Final

import attrs

from ._blockstore import SECTOR, Recording

Piece = tuple[int, bytes]
"""(offset, data)."""

MODES: Final = (
    "kept",
    "lost",
    "writes",
    "sectors",
    "prefix",
    "reordered",
    "suffix",
    "torn",
)
"""What becomes of the writes since the last barrier, by a cut's damage seed: all kept; all
lost; some of the writes; some of the sectors; the first and a part of the next; any and a part
of another; the last ones without the first; of each write its beginning or its end."""


@attrs.frozen
class Cut:
    """One power cut of a recording."""

    place: int
    """So many writes and barriers had been completed."""
    damage: int
    """Seed of what became of those since the last barrier."""

    @property
    def mode(self) -> str:
        return MODES[self.damage % len(MODES)]


def choose(recording: Recording, count: int, rng: Random, first: int = 0) -> list[Cut]:
    """Random cuts from the place ``first`` on, in the order of places."""
    places = sorted(rng.randint(first, len(recording.writes)) for _ in range(count))
    return [Cut(place, rng.getrandbits(32)) for place in places]


class Cutter:
    """Goes through a recording from cut to cut, forwards."""

    def __init__(self, recording: Recording, whole: Sequence[tuple[int, int]] = ()) -> None:
        self._recording = recording
        self._whole = whole
        self.durable = bytearray(recording.base)
        """The disk as of the last barrier."""
        self._barrier = 0

    def advance(self, cut: Cut) -> list[Piece]:
        """What of the writes since the last barrier is on the disk; `durable` is the rest."""
        writes = self._recording.writes
        barrier = self._barrier
        for place in range(barrier, cut.place):
            if writes[place] is None:
                barrier = place + 1
        for offset, data in _only_writes(writes[self._barrier : barrier]):
            self.durable[offset : offset + len(data)] = data
        self._barrier = barrier
        pending = list(_only_writes(writes[barrier : cut.place]))
        return self._damaged(pending, cut)

    def fingerprint(self, pieces: list[Piece]) -> bytes:
        """Two cuts of this recording with the same one leave the same disk."""
        digest = blake2b(self._barrier.to_bytes(8, "little"), digest_size=16)
        for offset, data in pieces:
            if self.durable[offset : offset + len(data)] != data:
                digest.update(offset.to_bytes(8, "little") + data)
        return digest.digest()

    def image(self, pieces: list[Piece]) -> bytes:
        """The whole disk."""
        content = bytearray(self.durable)
        for offset, data in pieces:
            content[offset : offset + len(data)] = data
        return bytes(content)

    def _damaged(self, pending: list[Piece], cut: Cut) -> list[Piece]:
        rng = Random(cut.damage)
        mode = cut.mode
        count = len(pending)
        if mode == "lost" or not count:
            return []
        if mode == "kept":
            return pending
        share = rng.random()
        if mode == "writes":
            return [piece for piece in pending if rng.random() < share]
        if mode == "suffix":
            return pending[rng.randrange(count) :]
        if mode == "sectors":
            return [
                unit for piece in pending for unit in self._units(piece) if rng.random() < share
            ]
        if mode == "torn":
            return [unit for piece in pending for unit in self._torn(piece, rng)]
        chosen = list(range(count))
        if mode == "reordered":
            rng.shuffle(chosen)
        kept = rng.randrange(count)
        places = sorted(chosen[:kept])
        torn = chosen[kept]
        return [
            unit
            for place in sorted((*places, torn))
            for unit in (self._torn(pending[place], rng) if place == torn else [pending[place]])
        ]

    def _units(self, piece: Piece) -> list[Piece]:
        """The parts of a write that are there whole or not at all."""
        offset, data = piece
        units: list[Piece] = []
        while data:
            length = SECTOR - offset % SECTOR
            for start, size in self._whole:
                if start <= offset < start + size:
                    length = start + size - offset
            units.append((offset, data[:length]))
            offset, data = offset + length, data[length:]
        return units

    def _torn(self, piece: Piece, rng: Random) -> list[Piece]:
        units = self._units(piece)
        at = rng.randint(0, len(units))
        return units[:at] if rng.random() < 0.7 else units[at:]


def _only_writes(entries: Sequence[Piece | None]) -> Iterator[Piece]:
    return (entry for entry in entries if entry is not None)
