"""Putting the segments of an open log into an `Archive`, one at a time.

Law: blocking; only reads the log.  A segment that changes meanwhile, because the log's end is
cut, is not put there as what it was not: its digest is taken twice, and a cut that begins before
the manifest is put makes it anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol
from uuid import UUID

import attrs

from ._archive import Archive, pieces_of
from ._archived import (
    PassingFile,
    SegmentKey,
    SegmentManifest,
    SegmentName,
    archived_segments,
    read_sealed,
    read_segment_manifest,
)
from ._disk.frame import Meta, SegmentHeader
from ._disk.segment import SegmentInfo
from ._engine import Moved
from ._exceptions import CorruptLogError
from ._files import File, close_quietly
from ._manifest import encode_manifest, put_identity


class SegmentSource(Protocol):
    """The open log, as far as its archive needs it."""

    @property
    def cuts(self) -> int:
        """Changes before and after the log's end is cut."""
        ...

    def open_segment(self, header: SegmentHeader) -> File: ...


def begin_archive(archive: Archive, log_uuid: UUID) -> list[SegmentName]:
    """Make sure that it is this log's, and say which segments it has.

    Raises:
      WrongDirectoryError, CorruptLogError, UnsupportedFormatError, OSError
    """
    names = archive.list()
    # What is seen in a directory may be in the page cache only, until something is put there.
    put_identity(archive, log_uuid)
    return list(archived_segments(names))


def key_of(info: SegmentInfo) -> SegmentKey:
    return SegmentKey(info.header.salt, info.first_lsn, info.next_lsn - 1)


def put_segment(
    archive: Archive,
    source: SegmentSource,
    info: SegmentInfo,
    meta: Meta,
    cuts: int,
    tick: Callable[[], None],
) -> None:
    """Have a sealed segment in the archive.

    Args:
      meta: what the log said of itself when it had this segment.
      cuts: `SegmentSource.cuts` at that time.
      tick: called between pieces; what it raises ends this.

    Raises:
      Moved: the log's end was cut since.
      CorruptLogError: the segment is damaged; nothing was put.
    """
    file = source.open_segment(info.header)
    try:
        found = PassingFile(file.path, pieces_of(file, tick))
        frames = read_sealed(found)
        digest, seal = found.finish(), frames.seal
        assert seal is not None
        if source.cuts != cuts:
            raise Moved(file.path, "the log's end was cut")
        if (frames.header, seal.first_lsn) != (info.header, info.next_lsn):
            raise CorruptLogError(file.path, 0, "this is another segment than the log's")
        manifest = SegmentManifest(
            uuid=UUID(bytes=info.header.log_uuid),
            number=info.header.number,
            salt=info.header.salt,
            first_lsn=info.first_lsn,
            last_lsn=info.next_lsn - 1,
            first_time_us=frames.first_time_us or seal.time_us,
            last_time_us=seal.time_us,
            previous=info.header.previous,
            end=seal.previous,
            features=info.header.features,
            consumers=meta.consumers,
            history=meta.history,
            size=found.size,
            digest=digest,
        )
        archive.put(manifest.data, _unchanged(file.path, pieces_of(file, tick), digest))
    finally:
        close_quietly(file)
    if source.cuts != cuts:
        raise Moved(file.path, "the log's end was cut")
    _put_manifest(archive, manifest)


def _put_manifest(archive: Archive, manifest: SegmentManifest) -> None:
    name = manifest.name.manifest
    try:
        archive.put(name, [encode_manifest(manifest.as_json())])
    except FileExistsError:
        # A copy of this log was faster, and differs in what is of no account here.
        there = read_segment_manifest(archive, name)
        same = attrs.evolve(manifest, history=there.history, consumers=there.consumers)
        if attrs.evolve(there, digest=manifest.digest, size=manifest.size) != same:
            raise


def _unchanged(path: str, pieces: Iterable[bytes], digest: str) -> Iterator[bytes]:
    """The pieces; an error at their end if they are not what was checked."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
        yield piece
    if found.hexdigest() != digest:
        raise Moved(path, "the segment has changed meanwhile")
