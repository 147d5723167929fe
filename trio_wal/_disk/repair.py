"""Carrying a plan of `recovery` out; and what else makes or replaces files of a log.

Law: does what the plan says, nothing else; can be interrupted anywhere, and is then simply
done again.  Blocking; no trio.

Copying instead of trusting what can be read matters: after a failed sync the kernel
keeps pages that are not on the disk and calls them clean (see "Can Applications Recover
from fsync Failures?", USENIX ATC 2020).  And copying instead of writing the same
bytes again: an acknowledged frame is never written over before its copy is durable.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from trio_wal._engine import RecoveryReport
from trio_wal._exceptions import LogFullError
from trio_wal._files import LOCK_NAME, NO_SPACE, Directory, File, Files, close_quietly
from trio_wal._identity import History, branch

from .chain import (
    META_NAME,
    META_NEW_NAME,
    TRUNCATE_NAME,
    FoundSegment,
    is_temporary,
    read_meta,
)
from .frame import (
    BLOCK,
    DATA_OFFSET,
    FEATURE_DATABASE,
    POINTER_OFFSET,
    Kind,
    Meta,
    SegmentHeader,
    Truncation,
    log_features,
    segment_name_lsn,
)
from .recovery import Plan
from .scan import FrameScanner
from .segment import (
    FIRST_CAPACITY,
    NEW_NAME,
    ActiveSegment,
    Body,
    Extent,
    SegmentInfo,
    capacity_for,
)


def write_meta(directory: Directory, meta: Meta, *, reserved: bool = False) -> None:
    """Replace ``log.meta``, durably and atomically; ``reserved`` after `reserve_meta`."""
    if reserved:
        file = directory.open(META_NEW_NAME, writable=True)
    else:
        if META_NEW_NAME in directory.names():
            directory.unlink(META_NEW_NAME)
        file = directory.open(META_NEW_NAME, create=True)
    try:
        file.pwrite([meta.encode()], 0)
        file.sync()
    finally:
        file.close()
    directory.rename(META_NEW_NAME, META_NAME)
    directory.sync()


def reserve_meta(directory: Directory, size: int) -> None:
    """Keep the disk space of the next ``log.meta``, of so many bytes: on a full disk, dropping
    segments is the way out and must not fail for want of a block."""
    if META_NEW_NAME in directory.names():
        directory.unlink(META_NEW_NAME)
    file = directory.open(META_NEW_NAME, create=True)
    try:
        file.allocate(size)
    except OSError:
        directory.unlink(META_NEW_NAME)
        raise
    finally:
        file.close()


class OpenLog(msgspec.Struct, eq=False):
    """What `repair` hands over: the log's end, ready for the next frame."""

    meta: Meta
    sealed: list[SegmentInfo]
    active: ActiveSegment
    report: RecoveryReport


def repair(
    files: Files,
    directory: Directory,
    plan: Plan,
    *,
    segment_size: int,
    features: int,
    meta_reserved: bool = False,
) -> OpenLog:
    """Make the log what the plan says it is, durably.

    Of an open log, too: ``truncate_after`` makes the plan that recovery would make after a crash.
    Every step leaves a directory that `examine` reads the same way, so that a crash
    here, or in the repair of that crash, changes nothing.

    Args:
      segment_size: bytes of a full-grown segment.
      features: what a log that does not exist yet is created with.
      meta_reserved: after `reserve_meta`.
    """
    for name in plan.leftovers:
        directory.unlink(name)
    if plan.meta is None:
        new = Meta(files.random_bytes(16), base_number=1, base_lsn=1, features=features)
        meta, sealed, active = _create(files, directory, segment_size, new)
    else:
        meta = plan.meta
        sealed = _mend_chain(directory, plan)
        if meta.truncation is not None:
            # Before a tail is copied: the copy has another salt than the one decided on.
            meta = replace(meta, truncation=None)
            write_meta(directory, meta, reserved=meta_reserved)
        active = _reopen(files, directory, plan, sealed, segment_size)
        # A segment without frames does not know what time the log had reached.
        time_us = max((s.last_time_us for s in sealed), default=0)
        here = active.position
        active.position = replace(here, time_us=max(here.time_us, time_us))
        if meta.copied or plan.lost_lsn:
            # Only now that all before is durable, as an epoch promises.  A copy's original may have
            # gone on, and other copies may, too; and what is lost has been given to others.
            history = branch(meta.history, here.next_lsn - 1, files.random_bytes(4))
            meta = replace(meta, history=history, copied=False)
            write_meta(directory, meta)
    report = RecoveryReport(
        first_lsn=meta.base_lsn,
        last_lsn=active.position.next_lsn - 1,
        segments=len(sealed) + 1,
        records_replayed=plan.records_replayed,
        bytes_scanned=plan.bytes_scanned,
        torn_bytes=plan.torn_bytes,
        clean_shutdown=plan.clean,
        seconds=0.0,
        lost_lsn=plan.lost_lsn,
    )
    return OpenLog(meta, sealed, active, report)


def uncreate(directory: Directory, before: frozenset[str], *, created: bool) -> None:
    """After an open that failed: remove the files that were not there before.

    Of a log that the open has made nothing stays.  Every step leaves what the next open takes
    for an interrupted creation.  Of a log that was there only files go that its recovery would
    remove too.
    """
    if created:
        meta = read_meta(directory)
        if meta is not None and meta.live:
            write_meta(directory, replace(meta, live=False))
    for name in directory.names():
        if name not in before and (
            is_temporary(name)
            or name == LOCK_NAME
            or (created and segment_name_lsn(name) is not None)
        ):
            directory.unlink(name)
    if created and META_NAME not in before and META_NAME in directory.names():
        directory.sync()
        directory.unlink(META_NAME)


def create_empty(
    files: Files,
    path: str,
    *,
    log_uuid: bytes,
    first_lsn: int,
    features: int,
    history: History,
    consumers: bool = False,
) -> None:
    """Make a directory with the log that goes on at ``first_lsn``: for a backup.

    It has the history of the log that it is of, and gets an epoch of its own when it is first
    opened: there may be several copies of a backup.
    """
    meta = Meta(
        log_uuid,
        base_number=1,
        base_lsn=first_lsn,
        features=features,
        history=history,
        copied=True,
        consumers=consumers,
    )
    directory = files.open_directory(path, create=True)
    try:
        _, _, active = _create(files, directory, FIRST_CAPACITY, meta)
        try:
            active.mark_closed()
        finally:
            active.file.close()
    finally:
        directory.close()


def _create(
    files: Files, directory: Directory, segment_size: int, meta: Meta
) -> tuple[Meta, list[SegmentInfo], ActiveSegment]:
    write_meta(directory, meta)
    header = SegmentHeader(
        meta.log_uuid, 1, meta.base_lsn, files.random_bytes(16), files.time_us(), 0, meta.features
    )
    active = new_segment(directory, header, min(segment_size, FIRST_CAPACITY))
    try:
        active.sync()
        directory.rename(NEW_NAME, header.name)
        directory.sync()
        meta = replace(meta, live=True)
        write_meta(directory, meta)
    except BaseException:
        close_quietly(active.file)
        raise
    return meta, [], active


def new_segment(directory: Directory, header: SegmentHeader, capacity: int) -> ActiveSegment:
    """A segment under its temporary name, zeros written; not yet durable.

    Raises:
      LogFullError, OSError
    """
    capacity = capacity_for(0, capacity)
    zeroed = min(capacity, FIRST_CAPACITY)
    file: File | None = None
    try:
        file = directory.open(NEW_NAME, create=True)
        file.pwrite([header.encode(), bytes(zeroed - BLOCK)], 0)
        file.allocate(capacity)
    except OSError as exc:
        if file is not None:
            close_quietly(file)
            directory.unlink(NEW_NAME)
        if exc.errno in NO_SPACE:
            database = bool(header.features & FEATURE_DATABASE)
            raise LogFullError(directory.path, capacity, database=database) from exc
        raise
    return ActiveSegment(file, Extent.empty(header, capacity), written=zeroed)


def begin_segment(directory: Directory, header: SegmentHeader, offset: int) -> Truncation:
    """An empty segment in which a log goes on that is cut, durable under `TRUNCATE_NAME`.

    Args:
      offset: where the segment before it is cut.

    Returns what ``log.meta`` must say for the cut to be decided.  Raises `LogFullError`.
    """
    for name in {NEW_NAME, TRUNCATE_NAME}.intersection(directory.names()):
        directory.unlink(name)
    active = new_segment(directory, header, FIRST_CAPACITY)
    try:
        active.sync()
    finally:
        close_quietly(active.file)
    directory.rename(NEW_NAME, TRUNCATE_NAME)
    directory.sync()
    return Truncation(header.salt, header.number - 1, offset, header.previous, header.first_lsn)


def _mend_chain(directory: Directory, plan: Plan) -> list[SegmentInfo]:
    """Names and footers as they have to be; returns the segments before the last."""
    last = plan.last
    assert last is not None
    sealed = list(plan.sealed)
    if last.file_name != last.header.name:
        directory.rename(last.file_name, last.header.name)
    # Also what an interrupted session renamed or unlinked, and was seen here, is durable now:
    # an open that was killed between the two leaves a directory that looks clean.
    directory.sync()
    if plan.seal_previous is not None:
        sealed.append(seal_at(directory, plan.seal_previous))
    elif plan.previous is not None and not plan.clean:
        _rewrite_footer(directory, plan.previous)
    return sealed


def _reopen(
    files: Files, directory: Directory, plan: Plan, sealed: list[SegmentInfo], segment_size: int
) -> ActiveSegment:
    """The segment to go on in; what it seals is added to ``sealed``."""
    last, end = plan.last, plan.end
    assert last is not None
    assert end is not None
    if plan.copy_from is not None:
        return _copy_tail(files, directory, plan, sealed, segment_size)
    file = directory.open(last.header.name, writable=True)
    return ActiveSegment(
        file,
        end,
        has_pointer=True,
        marks_offset=plan.marks_offset,
        written=file.written_bytes(),
    )


def seal_at(directory: Directory, extent: Extent) -> SegmentInfo:
    """Cut a segment at the extent's end, and write its footer."""
    file = directory.open(extent.header.name, writable=True)
    return ActiveSegment(file, extent).seal()


def _rewrite_footer(directory: Directory, segment: FoundSegment) -> None:
    """The last sync of the session before may have failed on it: what was read may be
    in the page cache only."""
    assert segment.pointer is not None
    file = directory.open(segment.header.name, writable=True)
    try:
        for offset, end in ((segment.pointer.offset, segment.size), (POINTER_OFFSET, DATA_OFFSET)):
            file.pwrite([file.pread(end - offset, offset)], offset)
        file.sync()
    finally:
        file.close()


def _copy_tail(
    files: Files,
    directory: Directory,
    plan: Plan,
    sealed: list[SegmentInfo],
    segment_size: int,
) -> ActiveSegment:
    """Start a new segment with a copy of the frames that are not proven durable."""
    last, end, before = plan.last, plan.end, plan.copy_from
    assert last is not None
    assert end is not None
    assert before is not None
    start = before.end
    # Without a record before the copy the old segment goes: its name is the new one's.
    replaces = start.next_lsn == last.header.first_lsn
    header = replace(
        last.header,
        number=last.number if replaces else last.number + 1,
        first_lsn=start.next_lsn,
        salt=files.random_bytes(16),
        created_us=files.time_us(),
        previous=last.header.previous if replaces else start.previous,
        features=log_features(last.header.features),
    )
    # As a new log's first one: no larger than what is filled with zeros, so that frames stand in
    # place from the first one on.
    wanted = min(segment_size, FIRST_CAPACITY)
    active = new_segment(directory, header, capacity_for(end.end.offset - start.offset, wanted))
    try:
        _copy_frames(directory, active, before, end)
        directory.rename(NEW_NAME, header.name)
        directory.sync()
        if not replaces:
            sealed.append(seal_at(directory, before))
    except BaseException:
        close_quietly(active.file)
        raise
    return active


def _copy_frames(
    directory: Directory,
    active: ActiveSegment,
    before: Extent,
    end: Extent,
) -> None:
    """The records of a segment between two places, durably."""
    start = before.end
    old = directory.open(before.header.name)
    try:
        for frame, body in FrameScanner(old.pread, before.header, start):
            if frame.offset >= end.end.offset:
                break
            if frame.kind is Kind.DATA:
                active.write(
                    Body(
                        [body],
                        frame.codec,
                        frame.count,
                        frame.stored_length,
                        frame.raw_length,
                        frame.body_crc,
                    ),
                    start.next_lsn - 1,
                    frame.time_us,
                )
    finally:
        old.close()
    active.sync()
