"""What of a damaged log can be kept, and how it comes to open again: for ``repair``.

Law: blocking, no trio.  What is damage is judged by `chain` and `walk`, as for an open and for
`verify`; what becomes of it is decided here, and the next open carries it out as it carries out a
``truncate_after``.  Nothing is changed before copies of all that is going to change are durable.

What stays is a run of segments, each of which leads to the next one, and the last of them up to
its first damage; LSNs have no gaps, so a log cannot go on behind a hole.  In order:

  copies of every file that is changed or dropped, durable        the log is as damaged as before
  what no record depends on is mended: padding, in a copy of      the same, or less
  the file, footers, the name of a file
  a new, empty segment, under a temporary name                    the same
  ``log.meta`` says where the log begins, where it is cut, and    the log is repaired; the files
  that a new epoch begins there                                   that it no longer has are there
  those files go                                                  an open does the rest

A crash anywhere leaves a log that `survey` looks at once more.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

import attrs
from msgspec.structs import replace

from trio_wal._exceptions import CorruptLogError, UnsupportedFormatError
from trio_wal._files import Directory, File, Files, close_quietly
from trio_wal._identity import EPOCH_RANDOM_BITS, History, Parting, branch
from trio_wal._util import MiB

from . import scan
from .chain import (
    META_NAME,
    PLACES_NAME,
    TRUNCATE_NAME,
    Chain,
    FoundSegment,
    Until,
    check_ours,
    list_chain,
    list_unborn,
    read_segment,
)
from .finding import Finding
from .frame import (
    FEATURE_DATABASE,
    FRAME_HEADER_SIZE,
    Meta,
    SegmentHeader,
    segment_name,
    segment_name_lsn,
)
from .repair import begin_segment, seal_at, write_meta
from .segment import NEW_NAME, Extent
from .verify import CarefulFile, check_places, find_meta, guess_meta
from .walk import Walk, begun_lsn, check_last, check_segment

Keep = Literal["oldest", "newest"]
Progress = Callable[[int, int], None]
"""Called with the bytes that were looked at and the bytes that there are."""

COPY_BYTES: Final = 4 * MiB
PADDING: Final = "padding"
"""What the reason of a finding in bytes between frames begins with."""
_EPOCHS_PASSED: Final = 1 << 20
"""How many there may have been of which nobody knows."""


def forgotten(epoch: int = 0) -> History:
    """That of a log whose history nobody knows any more: a new epoch must begin at once.

    Args:
      epoch: one that it had; there may have been later ones.
    """
    count = (epoch >> EPOCH_RANDOM_BITS) + _EPOCHS_PASSED
    return (Parting(count << EPOCH_RANDOM_BITS, 0),)


@attrs.frozen
class Piece:
    """One segment, and how much of it is sound."""

    segment: FoundSegment
    sound: Extent
    """Up to where every record is."""
    leads_on: bool
    """Whether the segment after it is there, and continues it."""
    is_end: bool
    """Whether the log ends in it, and nothing was lost there."""
    padding: tuple[tuple[int, int], ...] = ()
    """(offset, bytes) of what should be zeros, and no record depends on."""
    footer: bool = True
    """Whether its footer, if it has to have one, is whole."""

    @property
    def first_lsn(self) -> int:
        return self.segment.header.first_lsn

    @property
    def last_lsn(self) -> int:
        return self.sound.end.next_lsn - 1


@attrs.frozen
class Survey:
    """A log's files: what is wrong, and what is sound."""

    meta: Meta
    has_meta: bool
    findings: tuple[Finding, ...]
    pieces: tuple[Piece, ...]
    known_lsn: int
    """The last record of which anything tells."""
    open_ended: bool
    """Whether there may have been more, of which nothing tells."""

    @property
    def unborn(self) -> bool:
        """Whether its creation was interrupted, so that it never had a record."""
        return not self.meta.live

    @property
    def damaged(self) -> bool:
        """Whether an open refuses it."""
        return not all(finding.harmless for finding in self.findings)

    def runs(self) -> list[list[Piece]]:
        """The pieces, where each leads to the next one."""
        found: list[list[Piece]] = []
        for piece in self.pieces:
            before = found[-1][-1] if found else None
            if before is not None and before.leads_on:
                found[-1].append(piece)
            else:
                found.append([piece])
        return found


@attrs.frozen
class Salvage:
    """What will stay of a log."""

    survey: Survey
    kept: tuple[Piece, ...]
    """In order, the last one up to its end; none: the log will be empty."""
    first_lsn: int
    """The log's first one; without records it goes on with this one."""
    places: bool
    """Whether the places of consumers are gone."""

    @property
    def last_lsn(self) -> int:
        return self.kept[-1].last_lsn if self.kept else self.first_lsn - 1

    @property
    def cuts(self) -> bool:
        """Whether the log's end is cut."""
        return not self.kept or not self.kept[-1].is_end

    @property
    def changes(self) -> bool:
        """Whether an open would not do as it is."""
        return self.survey.damaged or self.cuts

    @property
    def lost(self) -> tuple[range, ...]:
        """LSNs that the log had, as far as anything tells, and will not have."""
        began = self.survey.meta.base_lsn
        before = range(began, self.first_lsn)
        after = range(self.last_lsn + 1, self.survey.known_lsn + 1)
        return tuple(lost for lost in (before, after) if lost)

    @property
    def lost_bytes(self) -> int:
        """Of segment files that go, or part of them."""
        stay = {piece.segment.file_name: piece.sound.end.offset for piece in self.kept}
        whole = {piece.segment.file_name for piece in self.kept[:-1]}
        if not self.cuts:
            whole |= {self.kept[-1].segment.file_name}
        total = 0
        for piece in self.survey.pieces:
            name = piece.segment.file_name
            if name not in whole:
                total += max(0, piece.segment.size - stay.get(name, 0))
        return total


# -- looking ----------------------------------------------------------------------------


class _Lost(Exception):
    """Records are lost here."""


def survey(directory: Directory, progress: Progress | None = None) -> Survey:
    """Look at everything, as `verify` does; the caller is the log's owner.

    Raises:
      WrongDirectoryError: there is no log in this directory.
      UnsupportedFormatError: a file is from a newer trio-wal, which knows what it is worth.
      ModuleNotFoundError: the log is compressed and zstandard is not installed.
      CorruptLogError: ``log.meta`` is gone, and nothing tells which segments are the log's.
      OSError: a file cannot be opened.
    """
    findings: list[Finding] = []
    check_ours(directory, directory.names(), _refuse_to_remove)
    found = find_meta(directory, findings.append)
    if found is not None and not found.live:
        list_unborn(directory, directory.names(), findings.append)
        if not findings:
            return Survey(found, True, (), (), found.base_lsn - 1, False)
        # It was in use, whatever it says.
        found = None
    meta = found or _made_up(directory)
    if not meta.features & FEATURE_DATABASE:
        check_places(directory, meta, findings.append)
    chain = list_chain(directory, meta, findings.append)
    for finding in findings:
        if isinstance(finding.cause, UnsupportedFormatError):
            raise finding.cause
    segments = [*chain.segments, *chain.beyond]
    total = sum(segment.size for segment in segments)
    pieces: list[Piece] = []
    done = 0
    for segment in segments:

        def tick(offset: int, before: int = done) -> None:
            if progress is not None:
                progress(min(before + offset, total), total)

        pieces.append(_look_at(directory, meta, chain, segment, findings.append, tick))
        done += segment.size
    if progress is not None:
        progress(total, total)
    lost = [finding for finding in findings if not finding.harmless]
    ends = [finding.last_lsn or finding.first_lsn or 0 for finding in lost]
    word = directory.published()
    told = 0 if meta.copied or found is None else word.told_lsn(meta.epoch)
    known = max([meta.base_lsn - 1, begun_lsn(meta), told, *ends, *(p.last_lsn for p in pieces)])
    # In a history that is forgotten the word may be of what was cut off since.
    open_ended = found is None and word.durable_lsn > known
    open_ended |= any(f.first_lsn is not None and f.last_lsn is None for f in lost)
    return Survey(meta, found is not None, tuple(findings), tuple(pieces), known, open_ended)


def _refuse_to_remove(finding: Finding) -> None:
    reason = f"{finding.reason}, but it has the name of a file of the log: move it away"
    raise CorruptLogError(finding.path, finding.offset, reason)


def _made_up(directory: Directory) -> Meta:
    """In place of a ``log.meta`` that is gone, and with it the log's history.

    Raises `CorruptLogError` where nothing tells which of the segments are the log's.
    """
    meta = guess_meta(directory)
    _check_identity(directory, meta)
    history = forgotten(directory.published().epoch or 0)
    consumers = bool(meta.features & FEATURE_DATABASE)
    return replace(meta, history=history, consumers=consumers)


def _check_identity(directory: Directory, meta: Meta) -> None:
    """A segment under its own name has a right to be there, and one that came from elsewhere has
    mostly not: more of the log's own are at home than there are of any other log at all."""
    at_home: Counter[bytes] = Counter()
    everywhere: Counter[bytes] = Counter()
    unreadable = False
    for name in directory.names():
        if segment_name_lsn(name) is None:
            continue
        try:
            header = read_segment(directory, name).header
        except (CorruptLogError, UnsupportedFormatError, OSError):
            unreadable = True
            continue
        everywhere[header.log_uuid] += 1
        at_home[header.log_uuid] += name == header.name
    others = [count for uuid, count in everywhere.items() if uuid != meta.log_uuid]
    own = at_home[meta.log_uuid]
    if (others and own <= max(others)) or (everywhere and not own and unreadable):
        reason = (
            "log.meta is gone, and the segments do not tell which of them are this log's: move "
            "away those that are not"
        )
        raise CorruptLogError(f"{directory.path}/{META_NAME}", 0, reason)


def _look_at(
    directory: Directory,
    meta: Meta,
    chain: Chain,
    segment: FoundSegment,
    report: Callable[[Finding], None],
    tick: Callable[[int], None],
) -> Piece:
    until = chain.until(segment)
    if until.is_last:
        until = _decided_end(meta, segment) or until
    found: list[Finding] = []
    opened = directory.open(segment.file_name)
    try:
        file = CarefulFile(opened, segment.size, found.append, tick)
        if until.is_last:
            told = begun_lsn(meta)
            walk = check_last(
                directory.path, file, segment, found.append, told_lsn=told, look_behind=True
            )
        else:
            walk = check_segment(file, segment, until, found.append)
        for finding in found:
            report(finding)
        wrong = [finding for finding in found if not finding.harmless]
        follows = until.following is not None and chain.find(segment.number + 1) is not None
        if not wrong and follows and walk.seal is None:
            # No damage in the last segment but one, which it may not be any more.
            return Piece(segment, walk.extent(), follows, False, footer=False)
        if not wrong:
            return Piece(segment, _up_to_records(walk), follows, until.is_last)
        return _sound_part(file, segment, until, wrong, follows=follows)
    finally:
        close_quietly(opened)


def _decided_end(meta: Meta, segment: FoundSegment) -> Until | None:
    """What comes after the last segment that there is, where the one in which a truncated log
    goes on is missing: what was cut off then must not come back."""
    cut = meta.truncation
    if cut is None or segment.number != cut.keep_number:
        return None
    following = replace(
        segment.header,
        number=segment.number + 1,
        first_lsn=cut.first_lsn,
        salt=cut.salt,
        previous=cut.previous,
    )
    return Until(following, is_last=False, may_be_open=True)


def _up_to_records(walk: Walk) -> Extent:
    """Without CLOSE and SEAL frames at the end, to which nothing must be chained."""
    return walk.extent() if walk.last_kind is None else walk.data_extent()


def _sound_part(
    file: CarefulFile,
    segment: FoundSegment,
    until: Until,
    wrong: Sequence[Finding],
    *,
    follows: bool,
) -> Piece:
    """Up to the first record that is lost."""
    padding: list[tuple[int, int]] = []

    def judge(finding: Finding) -> None:
        if not finding.harmless and not finding.reason.startswith(PADDING):
            raise _Lost

    walk = Walk(file, segment, judge)
    leads_on = False
    with contextlib.suppress(_Lost):
        while not (leads_on := walk.follow(until.following)):
            frame = scan.frame_at(file.pread, segment.header, walk.end.offset)
            if frame is None or not walk.reason.startswith(PADDING):
                break
            start = frame.offset + FRAME_HEADER_SIZE + frame.stored_length
            padding.append((start, frame.end - start))
            walk.pass_over(walk.reason)
    # What follows is chained to the last frame of all, which may be a CLOSE.
    sound = walk.extent() if leads_on and follows else _up_to_records(walk)
    only_padding = all(finding.reason.startswith(PADDING) for finding in wrong)
    return Piece(
        segment,
        sound,
        leads_on=leads_on and follows,
        is_end=until.is_last and only_padding,
        padding=tuple(padding),
        footer=only_padding,
    )


# -- deciding ---------------------------------------------------------------------------


def decide(survey: Survey, keep: Keep = "oldest", needed_lsn: int | None = None) -> Salvage:
    """What will stay.

    Args:
      keep: where there are several runs without a hole, which one.
      needed_lsn: of a database: the next one that its store does not have.  What stays must begin
          there or before, and end there or behind it; else the log goes on empty from there.
    """
    meta = survey.meta
    places = any(finding.path.endswith(f"/{PLACES_NAME}") for finding in survey.findings)

    def salvage(run: Sequence[Piece]) -> Salvage:
        kept = list(run)
        if not kept[-1].is_end and kept[-1].last_lsn < kept[-1].first_lsn:
            # The segment in which the log goes on takes its name.
            del kept[-1]
        return Salvage(survey, tuple(kept), run[0].first_lsn, places)

    runs = survey.runs()
    if needed_lsn is not None:
        for run in runs:
            if run[0].first_lsn <= needed_lsn <= run[-1].last_lsn + 1:
                return salvage(run)
        return Salvage(survey, (), needed_lsn, places)
    if keep == "newest" and runs:
        return salvage(runs[-1])
    for run in runs[:1]:
        first = run[0].segment.header
        if (first.number, first.first_lsn) == (meta.base_number, meta.base_lsn):
            return salvage(run)
    return Salvage(survey, (), meta.base_lsn, places)


def changed_files(directory: Directory, salvage: Salvage) -> list[str]:
    """The names of those that are changed or dropped."""
    names = directory.names()
    stay = {piece.segment.file_name for piece in salvage.kept if not _is_changed(piece, salvage)}
    changed = [name for name in names if _is_segment(name) and name not in stay]
    if META_NAME in names:
        changed.append(META_NAME)
    if salvage.places:
        changed.append(PLACES_NAME)
    return changed


def _is_segment(name: str) -> bool:
    return name.startswith("wal-") or name == TRUNCATE_NAME


def _is_changed(piece: Piece, salvage: Salvage) -> bool:
    is_last = piece is salvage.kept[-1]
    return bool(
        piece.padding
        or _is_renamed(piece)
        or (is_last and salvage.cuts)
        or not (is_last or piece.footer)
    )


def _is_renamed(piece: Piece) -> bool:
    return piece.segment.file_name != piece.segment.header.name


# -- doing ------------------------------------------------------------------------------


def copy_files(
    files: Files,
    directory: Directory,
    names: Iterable[str],
    dest: str,
    progress: Progress | None = None,
) -> None:
    """Copies of these, durable, in a new directory.  What cannot be read is zeros there."""
    copies = files.open_directory(dest, create=True)
    try:
        for name in names:
            opened = directory.open(name)
            try:
                copy = copies.open(name, create=True)
                try:
                    _copy(opened, copy, progress)
                    copy.sync()
                finally:
                    copy.close()
            finally:
                close_quietly(opened)
        copies.sync()
    finally:
        copies.close()


def _copy(source: File, dest: File, progress: Progress | None) -> None:
    def tick(offset: int) -> None:
        if progress is not None:
            progress(offset, size)

    size = source.size()
    unread: list[Finding] = []
    careful = CarefulFile(source, size, unread.append, tick)
    for offset in range(0, size, COPY_BYTES):
        dest.pwrite([careful.pread(min(COPY_BYTES, size - offset), offset)], offset)


def carry_out(files: Files, directory: Directory, salvage: Salvage) -> None:
    """Make the log open again; copies of `changed_files` are durable.

    Interrupted anywhere it is done again from `survey` on.  What is left to do at the end is
    what an open does after a ``truncate_after``.
    """
    _mend(directory, salvage)
    _write_decision(files, directory, salvage)
    stay = {piece.segment.header.name for piece in salvage.kept}
    for name in directory.names():
        if (name.startswith("wal-") and name not in stay) or (
            salvage.places and name == PLACES_NAME
        ):
            directory.unlink(name)
    directory.sync()


def _mend(directory: Directory, salvage: Salvage) -> None:
    """What no record depends on."""
    _rename(directory, salvage.kept)
    for piece in salvage.kept:
        if piece.padding:
            _clear_padding(directory, piece)
        if not piece.footer and piece is not salvage.kept[-1]:
            seal_at(directory, piece.sound)


def _clear_padding(directory: Directory, piece: Piece) -> None:
    """In a copy that takes the segment's place: its frames stand in the same sectors, and a write
    that a crash tears could take them along."""
    name = piece.segment.header.name
    if NEW_NAME in directory.names():
        directory.unlink(NEW_NAME)
    old = directory.open(name)
    try:
        new = directory.open(NEW_NAME, create=True)
        try:
            _copy(old, new, None)
            for offset, length in piece.padding:
                new.pwrite([bytes(length)], offset)
            new.sync()
        finally:
            new.close()
    finally:
        close_quietly(old)
    directory.rename(NEW_NAME, name)
    directory.sync()


def _rename(directory: Directory, kept: Sequence[Piece]) -> None:
    """Each file gets its name; who stands under it meanwhile is found by `survey` all the same,
    under another segment's."""
    names = {piece.segment.header.name: piece.segment.file_name for piece in kept}
    for name in [piece.segment.header.name for piece in kept if _is_renamed(piece)]:
        for other, place in names.items():
            if place == name and other != name:
                names[other] = _free_name(directory)
                directory.rename(name, names[other])
        directory.rename(names[name], name)
        names[name] = name
    directory.sync()


def _free_name(directory: Directory) -> str:
    """A segment's, that none has."""
    taken = [lsn for lsn in map(segment_name_lsn, directory.names()) if lsn is not None]
    return segment_name(max(taken, default=0) + 1)


def _write_decision(files: Files, directory: Directory, salvage: Salvage) -> None:
    meta, kept = salvage.survey.meta, salvage.kept
    first_number = kept[0].segment.number if kept else _free_number(salvage)
    decided = replace(meta, base_number=first_number, base_lsn=salvage.first_lsn, live=True)
    survey = salvage.survey
    if salvage.cuts or not survey.has_meta or survey.known_lsn > salvage.last_lsn:
        history = branch(meta.history, salvage.last_lsn, files.random_bytes(4))
        decided = replace(decided, history=history)
    if not salvage.cuts:
        if decided != meta:
            write_meta(directory, decided)
        return
    last = kept[-1].segment if kept else None
    place = kept[-1].sound.end if kept else None
    header = SegmentHeader(
        meta.log_uuid,
        first_number if last is None else last.number + 1,
        salvage.last_lsn + 1,
        files.random_bytes(16),
        files.time_us(),
        0 if place is None else place.previous,
        meta.features,
    )
    truncation = begin_segment(directory, header, 0 if place is None else place.offset)
    write_meta(directory, replace(decided, truncation=truncation))


def _free_number(salvage: Salvage) -> int:
    """For a segment that takes the place of all others: those before it are then below the log's
    base, and those from it on are cut off."""
    before = [
        piece.segment.number
        for piece in salvage.survey.pieces
        if piece.first_lsn < salvage.first_lsn
    ]
    return max([salvage.survey.meta.base_number - 1, *before]) + 1
