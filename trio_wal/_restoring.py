"""Making a log, or a database, of what was archived.

Law: blocking; everything is made under another name, and is there whole or not at all.  Every
byte is checked on its way: the digest of each object, each frame, and that the segments are one
chain.  What is made is a copy that was not opened yet, as a backup is: its first open begins an
epoch.

The last segment is cut as ``truncate_after`` cuts: it is sealed after the last frame that stays
whole, and what stays of the next one goes into a new segment, with a salt of its own.  So no
segment of the copy is ever taken for the one that it was made of.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import attrs
from msgspec.structs import replace

from ._archived import Frames, read_frames, read_header
from ._disk import scan
from ._disk.chain import LOG_NAME, STORE_NAME
from ._disk.frame import FrameHeader, Meta, SegmentHeader, index_step, log_features, to_datetime
from ._disk.recovery import examine
from ._disk.repair import create_empty, new_segment, write_meta
from ._disk.segment import (
    FIRST_CAPACITY,
    NEW_NAME,
    ActiveSegment,
    Extent,
    capacity_for,
    encode,
)
from ._exceptions import CorruptLogError
from ._files import Directory, Files, close_quietly
from ._identity import History, branch, epoch_of, generation, remembered
from ._manifest import write_pieces
from ._restorable import Piece, RestorePlan
from ._snapshots import write_store
from ._stores import stores_of

_NOT_WHOLE = "what is kept is not what the manifest of the segment names"

Tick = Callable[[int], None]
"""Called with the bytes of each piece; what it raises ends the restore."""


@attrs.frozen
class Restored:
    """What was made."""

    path: str
    last_time: datetime | None
    """Of its last record; None where its log has none."""


def restore_to(files: Files, dest: str, plan: RestorePlan, tick: Tick) -> Restored:
    """Make what the plan says, in a directory that is not there yet.

    Raises:
      FileExistsError: ``dest`` exists.
      CorruptLogError, UnsupportedFormatError: what was archived is not what it was; nothing is
          left of what was made.
      OSError: likewise.
    """
    plan = attrs.evolve(plan, history=_history(files, plan))
    temporary = files.begin_directory(dest)
    try:
        consumers = plan.consumers
        if plan.base is not None:
            store = f"{temporary}/{STORE_NAME}"
            write_store(files, store, plan.base.manifest, plan.base.content(), tick)
            consumers = _check_store(files, store, plan) or consumers
        path = f"{temporary}/{LOG_NAME}" if plan.database else temporary
        if plan.pieces:
            last_us = _make_log(files, path, attrs.evolve(plan, consumers=consumers), tick)
        else:
            last_us = None
            create_empty(
                files,
                path,
                log_uuid=plan.uuid.bytes,
                first_lsn=plan.first_lsn,
                features=plan.features,
                history=plan.history,
                consumers=consumers,
            )
        _check_log(files, path, plan)
        files.finish_directory(temporary, dest)
    except BaseException:
        files.discard_directory(temporary)
        raise
    return Restored(files.absolute(dest), None if last_us is None else to_datetime(last_us))


def _history(files: Files, plan: RestorePlan) -> History:
    """Where that is not the newest, with an epoch above all: the copy goes on with the same
    archive, and the next `restore` must take that for the newest."""
    if generation(plan.newest) <= generation(epoch_of(plan.history)):
        return remembered(plan.history)
    return branch(plan.history, plan.lsn, files.random_bytes(4), plan.newest)


def _check_store(files: Files, path: str, plan: RestorePlan) -> bool:
    """Whether the store is what its manifest says; returns whether it has places of consumers."""
    assert plan.base is not None
    state = stores_of(files).inspect_store(path)
    if state is None or (state.log_uuid, state.lsn) != (plan.uuid.bytes, plan.base.lsn):
        reason = "it is not the snapshot that its manifest names"
        raise CorruptLogError(plan.base.manifest.data, 0, reason)
    return bool(state.places)


def _check_log(files: Files, path: str, plan: RestorePlan) -> None:
    """What was made is read as an open would read it."""
    directory = files.open_directory(path)
    try:
        found = examine(directory, verify_bytes=0)
    finally:
        close_quietly(directory)
    assert found.meta is not None
    if (found.meta.base_lsn, found.last_lsn) != (plan.first_lsn, plan.lsn):
        reason = f"it ends at LSN {found.last_lsn}, not at {plan.lsn}"
        raise CorruptLogError(path, 0, reason)


# -- a log ------------------------------------------------------------------------------


@attrs.frozen
class _End:
    """Where the segments that stay end, and what comes after that."""

    number: int
    first_lsn: int
    previous: int
    time_us: int
    records: list[bytes]


def _make_log(files: Files, path: str, plan: RestorePlan, tick: Tick) -> int:
    """The segments, and one in which the log goes on; returns the time of the last record."""
    directory = files.open_directory(path, create=True)
    try:
        end = _End(plan.pieces[0].manifest.number, plan.first_lsn, 0, 0, [])
        for piece in plan.pieces:
            stop = min(piece.last_lsn, plan.lsn)
            end = _make_segment(directory, piece, stop, end.time_us, tick)
        first = plan.pieces[0].manifest
        features = log_features(first.features)
        header = SegmentHeader(
            plan.uuid.bytes,
            end.number,
            end.first_lsn,
            files.random_bytes(16),
            files.time_us(),
            end.previous,
            features,
        )
        _begin_segment(directory, header, end)
        write_meta(
            directory,
            Meta(
                plan.uuid.bytes,
                base_number=first.number,
                base_lsn=first.first_lsn,
                features=features,
                live=True,
                history=plan.history,
                copied=True,
                consumers=plan.consumers,
            ),
        )
        return end.time_us
    finally:
        close_quietly(directory)


def _begin_segment(directory: Directory, header: SegmentHeader, end: _End) -> None:
    """The last segment, closed in order, with what stays of a frame that was cut."""
    body = encode(end.records, header.features)
    active = new_segment(directory, header, capacity_for(body.stored_length, FIRST_CAPACITY))
    try:
        active.position = replace(active.position, time_us=end.time_us)
        if end.records:
            active.write(body, header.first_lsn - 1, end.time_us)
        active.sync()
        directory.rename(NEW_NAME, header.name)
        directory.sync()
        active.mark_closed()
    finally:
        close_quietly(active.file)


def _make_segment(
    directory: Directory, piece: Piece, stop_lsn: int, time_us: int, tick: Tick
) -> _End:
    """One segment up to a record, sealed and durable but for its name."""
    name = _write(directory, piece, tick)
    file = directory.open(name, writable=True)
    try:

        def is_over(frame: FrameHeader) -> bool:
            return frame.next_lsn > stop_lsn + 1

        header = read_header(file.path, file.pread)
        _check_header(piece, header)
        step = index_step(file.size())
        found = read_frames(
            file.path, file.pread, header, is_over, last_lsn=stop_lsn, skim=False, step=step
        )
        end = _end_of(piece, header, found, stop_lsn, max(time_us, found.end.time_us))
        whole = found.seal is not None and stop_lsn == piece.last_lsn
        if whole or end.first_lsn == header.first_lsn:
            file.sync()
        else:
            extent = Extent(header, file.size(), found.end, found.frames, found.index)
            ActiveSegment(file, extent).seal()
    finally:
        close_quietly(file)
    if end.first_lsn == header.first_lsn:
        # Nothing of it stays as it was: the next one takes its place.
        directory.unlink(name)
    return end


def _end_of(
    piece: Piece, header: SegmentHeader, found: Frames, stop_lsn: int, time_us: int
) -> _End:
    records: list[bytes] = []
    if found.beyond is not None and found.beyond[0].first_lsn <= stop_lsn:
        frame, body = found.beyond
        records = scan.payloads(frame, body)[: stop_lsn + 1 - frame.first_lsn]
        time_us = max(time_us, frame.time_us)
    end = found.end
    reached = end.next_lsn - 1 + len(records)
    if reached != stop_lsn:
        reason = f"it ends at LSN {reached}, and not at {stop_lsn}"
        raise CorruptLogError(piece.name, end.offset, reason)
    if found.beyond is None and end.previous != piece.manifest.end:
        raise CorruptLogError(piece.name, end.offset, "its last frame is another one")
    if end.next_lsn == header.first_lsn:
        return _End(header.number, header.first_lsn, header.previous, time_us, records)
    return _End(header.number + 1, end.next_lsn, end.previous, time_us, records)


def _check_header(piece: Piece, header: SegmentHeader) -> None:
    told = piece.manifest
    if (
        (header.log_uuid, header.number, header.first_lsn, header.salt)
        != (told.uuid.bytes, told.number, told.first_lsn, told.salt)
    ) or (header.previous, header.features) != (told.previous, told.features):
        raise CorruptLogError(piece.name, 0, "the segment is not the one that its manifest names")


def _write(directory: Directory, piece: Piece, tick: Tick) -> str:
    """The file of a segment, as it is kept; returns its name."""
    told = piece.manifest
    name = told.segment_file
    file = directory.open(name, create=True)
    try:
        size, digest = write_pieces(file, piece.content(), told.size, tick)
        if size != told.size or (piece.checked and digest != told.digest):
            raise CorruptLogError(told.data if piece.checked else piece.name, 0, _NOT_WHOLE)
    finally:
        file.close()
    return name
