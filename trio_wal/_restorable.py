"""What a log, or a database, can be restored from, and how to come to a place in it.

Law: decides, and reads no more than it must for that: manifests, headers, and of one segment the
times of its frames.  `_restoring` carries the plan out, and checks every byte.

A plan goes along one history of the log: the newest, or the one that is asked for.  Of a segment
that was put into the archive in an older epoch only those records are of it which the two have in
common.  Each next segment must begin with the checksum of the last frame of the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NoReturn, Protocol, final
from uuid import UUID

import attrs
from msgspec.structs import replace

from ._archived import Frames, SegmentManifest, read_frames, read_header, segment_name_of
from ._disk.frame import FEATURE_DATABASE, FrameHeader, log_features, to_datetime
from ._exceptions import CorruptLogError, LogDivergedError, RestoreGapError, WrongDirectoryError
from ._identity import Bookmark, History, common_lsn, epoch_of, recalled
from ._snapshots import Manifest, snapshot_name_of


class Reader(Protocol):
    """Reads a segment from its beginning to its end."""

    @property
    def path(self) -> str: ...

    def pread(self, length: int, offset: int) -> bytes: ...


@final
@attrs.frozen(kw_only=True)
class Piece:
    """A segment, and where to get it."""

    manifest: SegmentManifest
    name: str
    """For messages."""
    content: Callable[[], Iterator[bytes]]
    """Its bytes, up to `SegmentManifest.size`."""
    read: Callable[[], Reader]
    """The same, to be read once."""
    checked: bool = True
    """Whether the manifest's digest is known; one of a log's directory has none."""

    @property
    def first_lsn(self) -> int:
        return self.manifest.first_lsn

    @property
    def last_lsn(self) -> int:
        return self.manifest.last_lsn


@final
@attrs.frozen(kw_only=True)
class Base:
    """A copy of a database's store, and where to get it."""

    manifest: Manifest
    content: Callable[[], Iterator[bytes]]

    @property
    def lsn(self) -> int:
        return self.manifest.lsn


@final
@attrs.frozen(kw_only=True)
class Tail:
    """What a log's directory says of the log."""

    uuid: UUID
    history: History
    first_lsn: int
    features: int


@final
@attrs.frozen(kw_only=True)
class Restorable:
    """All that there is."""

    name: str
    """For messages."""
    pieces: Sequence[Piece]
    bases: Sequence[Base]
    damaged: Sequence[CorruptLogError] = ()
    """What could not be read: it may be what is missing."""
    tail: Tail | None = None
    """Of a directory that is given as the log's end."""

    def check_uuid(self) -> UUID:
        """The log's.

        Raises:
          WrongDirectoryError: there is nothing.
          CorruptLogError: there are several logs' things.
        """
        names = {piece.manifest.uuid: piece.name for piece in self.pieces}
        names.update({base.manifest.uuid: base.manifest.name for base in self.bases})
        if self.tail is not None:
            names.setdefault(self.tail.uuid, "the tail")
        if not names:
            if self.damaged:
                raise self.damaged[0]
            found = "no archive, or one that has nothing yet"
            raise WrongDirectoryError(self.name, found, "the archive of a log")
        if len(names) > 1:
            (one, name), (other, other_name), *_ = sorted(names.items())
            reason = f"{name} is of the log {one}, and {other_name} of {other}"
            raise CorruptLogError(self.name, 0, reason)
        return next(iter(names))


@final
@attrs.frozen(kw_only=True)
class Target:
    """Where to."""

    lsn: int | None = None
    time_us: int | None = None
    """The last commit at or before this time."""
    epoch: int | None = None
    """Of which history; None: the newest."""


@final
@attrs.frozen(kw_only=True)
class RestorePlan:
    """How to come there."""

    uuid: UUID
    history: History
    """The one that is restored; its end is `lsn`."""
    newest: int
    """The newest epoch of all that there are."""
    database: bool
    features: int
    consumers: bool
    base: Base | None
    pieces: Sequence[Piece]
    """Of the last one records above `lsn` may have to be left out."""
    first_lsn: int
    lsn: int

    @property
    def bytes(self) -> int:
        size = sum(piece.manifest.size for piece in self.pieces)
        return size + (0 if self.base is None else self.base.manifest.size)


def make_plan(there: Restorable, target: Target) -> RestorePlan:
    """Decide.

    Raises:
      RestoreGapError: it cannot be reached.
      WrongDirectoryError, CorruptLogError: see `Restorable.check_uuid`; or a segment that must be
          looked into is damaged.
      LogDivergedError: no such history is there.
    """
    return _Planner(there, target).plan()


BEGINNING: Final = 1


def first_restorable(there: Restorable) -> int | None:
    """The first LSN to which the newest history can be restored; None: there is none."""
    return _Planner(there, Target()).first_lsn()


class _Planner:
    def __init__(self, there: Restorable, target: Target) -> None:
        self._there = there
        self._target = target
        self._uuid = there.check_uuid()
        self._history = self._choose_history()
        usable = [piece for piece in there.pieces if self._usable(piece) >= piece.first_lsn]
        self._pieces = sorted(usable, key=self._rank)
        self._bases = sorted(
            (base for base in there.bases if self._has(base)), key=lambda base: base.lsn
        )
        features = [piece.manifest.features for piece in there.pieces]
        features += [] if there.tail is None else [there.tail.features]
        self._database = bool(there.bases) or any(f & FEATURE_DATABASE for f in features)
        self._features = log_features(features[0]) if features else FEATURE_DATABASE

    def _choose_history(self) -> History:
        """The newest epoch's, or that of the target."""
        there = self._there
        known = [piece.manifest.history for piece in there.pieces]
        known += [base.manifest.history for base in there.bases]
        if there.tail is not None:
            known.append(there.tail.history)
        newest = max(known, key=lambda history: (epoch_of(history), len(history)))
        epoch = self._target.epoch
        for error in there.damaged if epoch is None else ():
            if self._named(error.path)[1] > epoch_of(newest):
                reason = f"{error.reason}; nothing else is there of the newest history"
                reason += ": for an older one give its epoch"
                raise CorruptLogError(error.path, error.offset, reason) from error
        if epoch is None or epoch == epoch_of(newest):
            return recalled(newest, known)
        of_epoch = [history for history in known if epoch_of(history) == epoch]
        if not of_epoch:
            raise LogDivergedError(there.name, Bookmark(self._target.lsn or 0, epoch), None)
        return recalled(max(of_epoch, key=len), known)

    def _newest_epoch(self) -> int:
        there = self._there
        known = [epoch_of(piece.manifest.history) for piece in there.pieces]
        known += [base.manifest.epoch for base in there.bases]
        known += [self._named(error.path)[1] for error in there.damaged]
        return max([epoch_of(self._history), *known])

    def _usable(self, piece: Piece) -> int:
        return piece.manifest.usable_lsn(self._history)

    def _has(self, base: Base) -> bool:
        common = common_lsn(self._history, base.manifest.epoch)
        return common is not None and base.lsn <= common

    def _rank(self, piece: Piece) -> tuple[int, bool, int, int]:
        """By LSN; of those that begin at one, first whoever ends in this history, and last was
        put."""
        usable, epoch = self._usable(piece), epoch_of(piece.manifest.history)
        return piece.first_lsn, usable < piece.last_lsn, -usable, -epoch

    def plan(self) -> RestorePlan:
        target = self._target
        lsn = target.lsn if target.time_us is None else self._lsn_at(target.time_us)
        base = self._newest_base(lsn)
        start = self._start(base, lsn)
        if base is None:
            self._check_beginning(start)
        chain, reached = self._follow(start, lsn)
        if reached < lsn if lsn is not None else self._beyond(reached):
            self._missing(start, chain, reached)
        manifests = [piece.manifest for piece in chain]
        return RestorePlan(
            uuid=self._uuid,
            # An epoch that began after the place agrees with those before it up to there, too.
            history=tuple(
                replace(parting, after_lsn=min(parting.after_lsn, reached))
                for parting in self._history
            ),
            newest=self._newest_epoch(),
            database=self._database,
            features=self._features,
            consumers=any(manifest.consumers for manifest in manifests),
            base=base,
            pieces=chain,
            first_lsn=chain[0].first_lsn if chain else reached + 1,
            lsn=reached,
        )

    def _start(self, base: Base | None, lsn: int | None) -> int:
        """The first record that is needed of the segments."""
        if base is not None:
            return base.lsn + 1
        first = self._there.tail.first_lsn if self._there.tail is not None else None
        if self._pieces:
            first = self._pieces[0].first_lsn
        if first is None or (self._database and first > BEGINNING):
            self._before_first(lsn)
        if lsn is not None and lsn < first - 1:
            self._before_first(lsn)
        return first

    def _check_beginning(self, start: int) -> None:
        """A log begins with the first segment that there is; none before it may be lost."""
        for error in self._there.damaged:
            name = segment_name_of(error.path)
            if name is not None and name.key.first_lsn < start:
                raise error

    def _newest_base(self, lsn: int | None) -> Base | None:
        found = [base for base in self._bases if lsn is None or base.lsn <= lsn]
        return found[-1] if found else None

    def _follow(self, start: int, stop: int | None) -> tuple[list[Piece], int]:
        """The segments from the record ``start`` on, as far as they go, at most to ``stop``; and
        how far that is."""
        chain: list[Piece] = []
        reached = start - 1
        while stop is None or reached < stop:
            piece = self._next(chain[-1] if chain else None, reached + 1)
            if piece is None:
                break
            chain.append(piece)
            reached = self._usable(piece)
            if reached < piece.last_lsn:
                # What comes after that is of another history.
                break
        if stop is None or reached < stop:
            chain, reached = self._further(chain, start, reached)
        return chain, reached if stop is None else min(reached, stop)

    def _further(self, chain: list[Piece], start: int, reached: int) -> tuple[list[Piece], int]:
        """Where the log's end was cut, an older segment may have records that stay, and that the
        archive has nowhere else."""
        ends = {piece.last_lsn: number for number, piece in enumerate(chain)}
        for piece in sorted(self._pieces, key=self._usable, reverse=True):
            if self._usable(piece) <= reached:
                break
            if piece.first_lsn <= start:
                return [piece], self._usable(piece)
            number = ends.get(piece.first_lsn - 1)
            if number is not None and _follows(chain[number].manifest, piece.manifest):
                return [*chain[: number + 1], piece], self._usable(piece)
        return chain, reached

    def _next(self, before: Piece | None, lsn: int) -> Piece | None:
        for piece in self._pieces:
            if piece.first_lsn > lsn:
                break
            if self._usable(piece) < lsn:
                continue
            if before is None or _follows(before.manifest, piece.manifest):
                return piece
        return None

    def _beyond(self, lsn: int) -> bool:
        """Whether there is more after this place."""
        ends = [base.lsn for base in self._bases]
        ends += [self._usable(piece) for piece in self._pieces]
        ends += [self._named_end(error.path) for error in self._there.damaged]
        return any(end > lsn for end in ends)

    def _named_end(self, name: str) -> int:
        """Up to where this history was in an object, by the name of its manifest."""
        last, epoch = self._named(name)
        return min(last, common_lsn(self._history, epoch) or 0)

    @staticmethod
    def _named(name: str) -> tuple[int, int]:
        """The last LSN and the epoch of an object, by the name of its manifest; 0: it has none."""
        segment = segment_name_of(name)
        if segment is not None:
            return segment.key.last_lsn, segment.epoch
        return snapshot_name_of(name) or (0, 0)

    # -- times --

    def _lsn_at(self, time_us: int) -> int:
        """The last record that was written at or before a time."""
        when = to_datetime(time_us).isoformat()
        before = [piece for piece in self._pieces if piece.manifest.first_time_us <= time_us]
        if not before:
            self._nothing(f"there is nothing of {when} or before")
        piece = min(before, key=lambda piece: (-piece.first_lsn, *self._rank(piece)))
        while True:
            usable, last_time_us = self._usable(piece), piece.manifest.last_time_us
            whole = usable == piece.last_lsn
            if not whole or time_us < last_time_us:
                lsn = last_lsn_at(piece, time_us, usable)
                if lsn < usable:
                    return lsn
            after = self._next(None, usable + 1)
            if after is None:
                break
            if after.first_lsn > usable:
                # It was written later: else that segment would have been taken.
                return usable
            piece = after
        end_us = last_time_us if whole else time_of(piece, usable)
        at_end = self._there.tail is not None or time_us <= end_us
        if not at_end or self._beyond(usable):
            # Nobody knows which commits there were until then.
            reason = f"after LSN {usable} nothing is there until {when}"
            self._raise(reason, self.first_lsn(), usable, [piece])
        return usable

    # -- what cannot be --

    def first_lsn(self) -> int | None:
        """The first LSN to which it can be restored; None: there is none."""
        first = self._pieces[0].first_lsn if self._pieces else None
        if first is not None and (first == BEGINNING or not self._database):
            return first
        return self._bases[0].lsn if self._bases else None

    def _nothing(self, reason: str) -> NoReturn:
        """There is nothing to begin with: say what could be restored."""
        first = self.first_lsn()
        if first is None:
            self._raise(reason, None, None, [])
        base = first > BEGINNING and bool(self._bases)
        chain, reached = self._follow(first + base, None)
        self._raise(reason, first, reached, chain)

    def _before_first(self, lsn: int | None) -> NoReturn:
        if self._bases:
            what = f"the first backup is of LSN {self._bases[0].lsn}"
        elif self._pieces:
            what = f"the first segment begins at LSN {self._pieces[0].first_lsn}"
        else:
            what = "nothing is of that history"
        if self._database and not self._bases:
            what += ", and there is no backup"
        self._nothing(what if lsn is None else f"LSN {lsn} cannot be restored: {what}")

    def _missing(self, start: int, chain: list[Piece], reached: int) -> NoReturn:
        reason = f"the log ends at LSN {reached}"
        if self._beyond(reached):
            reason = f"what comes after LSN {reached} is missing"
        self._raise(reason, self.first_lsn() or start, reached, chain)

    def _raise(
        self, reason: str, first: int | None, last: int | None, chain: Sequence[Piece]
    ) -> NoReturn:
        when = None
        if chain and last == chain[-1].last_lsn:
            when = to_datetime(chain[-1].manifest.last_time_us)
        damaged = self._there.damaged
        if damaged:
            reason += f"; {len(damaged)} manifests cannot be read, as {damaged[0].path}"
        error = RestoreGapError(self._there.name, reason, first, last, when)
        raise error from (damaged[0] if damaged else None)


def _follows(before: SegmentManifest, after: SegmentManifest) -> bool:
    """Whether a segment goes on where another one ends."""
    return (after.first_lsn, after.number, after.previous) == (
        before.last_lsn + 1,
        before.number + 1,
        before.end,
    )


def time_of(piece: Piece, lsn: int) -> int:
    """When a record of a segment was written.

    Raises:
      CorruptLogError, UnsupportedFormatError
    """
    return _frames_until(piece, lambda frame: frame.first_lsn > lsn).end.time_us


def _frames_until(piece: Piece, ends: Callable[[FrameHeader], bool]) -> Frames:
    file = piece.read()
    header = read_header(file.path, file.pread)
    return read_frames(file.path, file.pread, header, ends, last_lsn=piece.last_lsn)


def last_lsn_at(piece: Piece, time_us: int, usable_lsn: int) -> int:
    """The last record of a segment that was written at or before a time, and is usable.

    Raises:
      CorruptLogError, UnsupportedFormatError
    """

    def is_later(frame: FrameHeader) -> bool:
        return frame.time_us > time_us or frame.first_lsn > usable_lsn

    return min(_frames_until(piece, is_later).end.next_lsn - 1, usable_lsn)
