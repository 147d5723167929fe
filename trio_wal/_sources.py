"""Where `restore` finds segments and stores: an archive, a backup's directory, a log's directory.

Law: blocking, and nothing but reading.  A log that is given as the tail must not be open: its lock
is held while it is read.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from uuid import UUID

import attrs

from ._archive import CHUNK_BYTES, Archive, DirectoryArchive
from ._archived import (
    PassingFile,
    SegmentManifest,
    read_frames,
    read_segment_manifest,
    segment_name_of,
)
from ._disk import scan
from ._disk.chain import (
    LOG_NAME,
    META_NAME,
    STORE_NAME,
    FoundSegment,
    list_chain,
    no_log,
    read_meta,
)
from ._disk.finding import refuse
from ._disk.frame import DATA_OFFSET, FrameHeader, Kind, Meta
from ._disk.walk import begun_lsn, check_last
from ._disk.window import Read
from ._exceptions import CorruptLogError, WrongDirectoryError
from ._files import Directory, Files, close_quietly
from ._manifest import read_identity
from ._restorable import Base, Piece, Restorable, Tail
from ._snapshots import Manifest, is_manifest, read_snapshot
from ._store_files import DATA_NAME
from ._stores import stores_of

# -- an archive -------------------------------------------------------------------------


def piece_of_archive(archive: Archive, name: str) -> Piece:
    """The segment that a manifest names."""
    manifest = read_segment_manifest(archive, name)

    def content() -> Iterator[bytes]:
        return archive.get(manifest.data)

    return Piece(
        manifest=manifest,
        name=name,
        content=content,
        read=lambda: PassingFile(manifest.data, content()),
    )


def base_of_archive(archive: Archive, name: str) -> Base:
    """The snapshot that a manifest names."""
    manifest = read_snapshot(archive, name)
    return Base(manifest=manifest, content=lambda: archive.get(manifest.data))


@attrs.frozen
class ArchiveContent:
    """What an archive has, by its manifests."""

    pieces: list[Piece]
    bases: list[Base]
    damaged: list[CorruptLogError]
    """Of each manifest that is none."""
    objects: frozenset[str]
    """All names that are there."""


def look_at_archive(archive: Archive) -> ArchiveContent:
    """Every manifest of an archive.

    Raises:
      WrongDirectoryError: it is no archive.
      UnsupportedFormatError, OSError
    """
    found = ArchiveContent([], [], [], frozenset(archive.list()))
    log: UUID | None = None
    try:
        log = read_identity(archive).log
    except CorruptLogError as exc:
        found.damaged.append(exc)
    for name in sorted(found.objects):
        try:
            if segment_name_of(name) is not None:
                piece = piece_of_archive(archive, name)
                _check_log(name, piece.manifest.uuid, log)
                found.pieces.append(piece)
            elif is_manifest(name):
                base = base_of_archive(archive, name)
                _check_log(name, base.manifest.uuid, log)
                found.bases.append(base)
        except CorruptLogError as exc:
            found.damaged.append(exc)
        except FileNotFoundError:
            # Its owner is tidying up.
            continue
    return found


def _check_log(name: str, uuid: UUID, log: UUID | None) -> None:
    if log is not None and uuid != log:
        raise CorruptLogError(name, 0, f"it is of the log {uuid}, in the archive of {log}")


# -- a log's directory ------------------------------------------------------------------


def look_at_log(directory: Directory) -> tuple[list[Piece], Tail]:
    """The segments of a log, in the last of them as far as its frames go.

    Raises:
      WrongDirectoryError, CorruptLogError, UnsupportedFormatError, OSError
    """
    meta = read_meta(directory)
    if meta is None:
        raise no_log(directory.path, directory.names(), "its path, or that of its log")
    tail = Tail(
        uuid=UUID(bytes=meta.log_uuid),
        history=meta.history,
        first_lsn=meta.base_lsn,
        features=meta.features,
    )
    if not meta.live:
        return [], tail
    found = list_chain(directory, meta, refuse).segments
    pieces = [_sealed_piece(directory, meta, segment, after) for segment, after in pairwise(found)]
    last = _last_piece(directory, meta, found[-1])
    return [*pieces, *filter(None, [last])], tail


def _sealed_piece(
    directory: Directory, meta: Meta, segment: FoundSegment, after: FoundSegment
) -> Piece:
    """A segment with another after it, which says where it ends."""
    next_lsn, mark = after.header.first_lsn, segment.mark
    file = directory.open(segment.file_name)
    try:
        first = scan.frame_at(file.pread, segment.header, DATA_OFFSET)
        if mark is not None and mark.kind is Kind.SEAL and mark.first_lsn == next_lsn:
            last_us = mark.time_us
        else:
            last_us = _end_time(file.path, file.pread, segment, next_lsn)
    finally:
        file.close()
    end = next_lsn - 1, after.header.previous
    return _piece_of_log(directory, meta, segment, first, end, last_us, segment.size)


def _end_time(path: str, read: Read, segment: FoundSegment, next_lsn: int) -> int:
    last_lsn = next_lsn - 1
    found = read_frames(
        path, read, segment.header, lambda frame: frame.first_lsn > last_lsn, last_lsn=last_lsn
    )
    return found.end.time_us


def _last_piece(directory: Directory, meta: Meta, segment: FoundSegment) -> Piece | None:
    """The segment in which the log ends; None where it has no records."""
    file = directory.open(segment.file_name)
    try:
        walk = check_last(directory.path, file, segment, refuse, told_lsn=begun_lsn(meta))
        first = scan.frame_at(file.pread, segment.header, DATA_OFFSET)
    finally:
        file.close()
    end = walk.end
    if end.next_lsn == segment.header.first_lsn:
        return None
    place = end.next_lsn - 1, end.previous
    return _piece_of_log(directory, meta, segment, first, place, end.time_us, end.offset)


def _piece_of_log(
    directory: Directory,
    meta: Meta,
    segment: FoundSegment,
    first: FrameHeader | None,
    end: tuple[int, int],
    last_us: int,
    size: int,
) -> Piece:
    header = segment.header
    manifest = SegmentManifest(
        uuid=UUID(bytes=header.log_uuid),
        number=header.number,
        salt=header.salt,
        first_lsn=header.first_lsn,
        last_lsn=end[0],
        first_time_us=last_us if first is None else first.time_us,
        last_time_us=last_us,
        previous=header.previous,
        end=end[1],
        features=header.features,
        consumers=meta.consumers,
        history=meta.history,
        size=size,
        digest="",
    )
    path = f"{directory.path}/{segment.file_name}"

    def content() -> Iterator[bytes]:
        return _file_pieces(directory, segment.file_name, size)

    return Piece(
        manifest=manifest,
        name=path,
        content=content,
        read=lambda: PassingFile(path, content()),
        checked=False,
    )


def _file_pieces(directory: Directory, name: str, size: int) -> Iterator[bytes]:
    file = directory.open(name)
    try:
        offset = 0
        while piece := file.pread(min(CHUNK_BYTES, size - offset), offset):
            yield piece
            offset += len(piece)
    finally:
        file.close()


# -- a backup's directory ---------------------------------------------------------------


def look_at_backup(files: Files, path: str, directory: Directory) -> Base:
    """The store of a backup, as `Database.backup` has left it.

    Args:
      directory: of the backup's store.

    Raises:
      WrongDirectoryError: it was opened since, and may hold more than its LSN says.
      CorruptLogError, UnsupportedFormatError, OSError
    """
    log = files.open_directory(f"{path}/{LOG_NAME}", follow=False)
    try:
        meta = read_meta(log)
    finally:
        close_quietly(log)
    state = stores_of(files).inspect_store(f"{path}/{STORE_NAME}")
    if meta is None or not meta.copied:
        found = "a database that was opened, or no backup"
        raise WrongDirectoryError(path, found, "an archive, or what Database.backup() has made")
    if state is None or (state.log_uuid, state.lsn) != (meta.log_uuid, meta.base_lsn - 1):
        raise CorruptLogError(path, 0, "the store is not that of the backup's log")
    name = f"{directory.path}/{DATA_NAME}"
    file = directory.open(DATA_NAME)
    try:
        size = file.size()
    finally:
        file.close()

    def content() -> Iterator[bytes]:
        return _file_pieces(directory, DATA_NAME, size)

    whole = PassingFile(name, content())
    manifest = Manifest(
        uuid=UUID(bytes=meta.log_uuid),
        lsn=state.lsn,
        history=meta.history,
        data=name,
        size=size,
        digest=whole.finish(),
    )
    return Base(manifest=manifest, content=content)


# -- all of it --------------------------------------------------------------------------


def archive_at(source: Archive | str, files: Files) -> Archive | None:
    """The archive that is given, or that a path leads to; None: the path is that of a log, or of a
    backup.

    Raises:
      FileNotFoundError, WrongDirectoryError
    """
    if not isinstance(source, str):
        return source
    directory = files.open_directory(source)
    try:
        names = directory.names()
    finally:
        close_quietly(directory)
    if META_NAME in names or _is_database(files, source, names):
        return None
    return DirectoryArchive(source, files=files)


def _is_database(files: Files, path: str, names: list[str]) -> bool:
    # In memory a directory does not list those in it.
    return LOG_NAME in names or STORE_NAME in names or files.exists(f"{path}/{LOG_NAME}")


@contextmanager
def opened_sources(files: Files, source: Archive | str, tail: str | None) -> Generator[Restorable]:
    """All that `restore` may begin with, as long as the block runs.

    Args:
      tail: the directory of a log, or of a database, whose end is newer than the archive.

    Raises:
      LogLockedError: the tail is open.
      FileNotFoundError, WrongDirectoryError, CorruptLogError, UnsupportedFormatError, OSError
    """
    pieces: list[Piece] = []
    bases: list[Base] = []
    damaged: list[CorruptLogError] = []
    end: Tail | None = None
    with ExitStack() as stack:

        def opened(path: str, *, follow: bool) -> Directory:
            directory = files.open_directory(path, follow=follow)
            stack.callback(close_quietly, directory)
            return directory

        logs = [] if tail is None else [tail]
        archive = archive_at(source, files)
        if archive is not None:
            found = look_at_archive(archive)
            pieces, bases, damaged = found.pieces, found.bases, found.damaged
        elif not isinstance(source, str):
            raise AssertionError(source)
        elif files.exists(f"{source}/{LOG_NAME}"):
            store = opened(f"{source}/{STORE_NAME}", follow=False)
            bases.append(look_at_backup(files, source, store))
        else:
            logs.insert(0, source)
        for path in logs:
            inner = f"{path}/{LOG_NAME}"
            is_database = files.exists(inner)
            directory = opened(inner if is_database else path, follow=not is_database)
            directory.lock()
            more, end = look_at_log(directory)
            pieces += more
        name = source if isinstance(source, str) else repr(source)
        yield Restorable(name=name, pieces=pieces, bases=bases, tail=end, damaged=damaged)
