"""Putting the segments of an open log into an `Archive`, several at a time.

Law: blocking; only reads the log.  A segment that changes meanwhile, because the log's end is
cut, is not put there as what it was not: its digest is taken twice, and a cut that begins before
the manifests are put makes them anew.  These are put when all their segments are there, durably.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol
from uuid import UUID

import attrs

from ._archive import Archive, pieces_of, put_group
from ._archived import (
    OpenedLog,
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
from ._identity import epoch_of
from ._manifest import encode_manifest, put_identity
from ._snapshots import snapshot_name_of


class SegmentSource(Protocol):
    """The open log, as far as its archive needs it."""

    @property
    def cuts(self) -> int:
        """Changes before and after the log's end is cut."""
        ...

    def open_segment(self, header: SegmentHeader) -> File: ...


def begin_archive(
    archive: Archive, log_uuid: UUID, log: OpenedLog
) -> tuple[list[SegmentName], set[SegmentKey]]:
    """Make sure that it is this log's; returns its segments, and which of them the log has, or had.

    Raises:
      FileExistsError: it has what is not from before the log's end; see `OpenedLog`.
      WrongDirectoryError, CorruptLogError, UnsupportedFormatError, OSError
    """
    names = archive.list()
    # What is seen in a directory may be in the page cache only, until something is put there.
    put_identity(archive, log_uuid)
    found = list(archived_segments(names))
    own = log.own_segments(found)
    for name in names:
        snapshot = snapshot_name_of(name)
        if snapshot is not None:
            lsn, epoch = snapshot
            log.check(name, epoch, lsn)
    _leave_others(archive, found, own, log)
    return found, own


def _leave_others(
    archive: Archive, found: Iterable[SegmentName], own: set[SegmentKey], log: OpenedLog
) -> None:
    """What ends where the log's own segment ends need not be the same: another copy of the log has
    filled it, or `repair` has taken a CLOSE frame from its end.  A checksum is of all that was
    before, too, so that the newest one that is the same is enough.

    Raises:
      FileExistsError: it is not, and in today's epoch nothing can be put beside it.
    """
    places = {key: number for number, key in enumerate(log.ends)}
    common = [name for name in found if name.key in places]
    for name in sorted(common, key=lambda name: (places[name.key], name.epoch), reverse=True):
        try:
            manifest = read_segment_manifest(archive, name.manifest)
        except (CorruptLogError, FileNotFoundError):
            # As far as the others tell.
            continue
        if manifest.end == log.ends[name.key]:
            return
        if name.epoch == epoch_of(log.history):
            raise log.others(name)
        # It is put once more, in today's epoch.
        own.discard(name.key)


def key_of(info: SegmentInfo) -> SegmentKey:
    return SegmentKey(info.header.salt, info.first_lsn, info.next_lsn - 1)


def put_segments(
    archive: Archive,
    source: SegmentSource,
    infos: Sequence[SegmentInfo],
    meta: Meta,
    cuts: int,
    tick: Callable[[], None],
) -> int:
    """Have sealed segments in the archive, one after the other; returns how many of the first.

    Args:
      infos: at least one.
      meta: what the log said of itself when it had these segments.
      cuts: `SegmentSource.cuts` at that time.
      tick: called between pieces, and frames; what it raises ends this.

    Raises:
      Moved: the log's end was cut since.
      CorruptLogError: the first one is damaged; nothing was put.
    """
    manifests: list[SegmentManifest] = []
    for info in infos:
        try:
            manifests.append(_read_segment(source, info, meta, cuts, tick))
        except Exception:
            if not manifests:
                raise
            # Those before it are put.  It is the first one the next time.
            break
    put_group(
        archive,
        [
            (manifest.data, _unchanged(source, info.header, manifest.digest, tick))
            for info, manifest in zip(infos, manifests, strict=False)
        ],
    )
    if source.cuts != cuts:
        raise Moved(manifests[0].segment_file, "the log's end was cut")
    _put_manifests(archive, manifests)
    return len(manifests)


def _read_segment(
    source: SegmentSource, info: SegmentInfo, meta: Meta, cuts: int, tick: Callable[[], None]
) -> SegmentManifest:
    """What is to be said of a segment, after a look at all of it."""
    file = source.open_segment(info.header)
    try:
        found = PassingFile(file.path, pieces_of(file, tick))
        frames = read_sealed(found, tick)
        digest, seal = found.finish(), frames.seal
    finally:
        close_quietly(file)
    assert seal is not None
    if source.cuts != cuts:
        raise Moved(file.path, "the log's end was cut")
    if (frames.header, seal.first_lsn) != (info.header, info.next_lsn):
        raise CorruptLogError(file.path, 0, "this is another segment than the log's")
    return SegmentManifest(
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


def _unchanged(
    source: SegmentSource, header: SegmentHeader, digest: str, tick: Callable[[], None]
) -> Iterator[bytes]:
    """The pieces of a segment; an error at their end if they are not what was read before."""
    file = source.open_segment(header)
    try:
        found = hashlib.sha256()
        for piece in pieces_of(file, tick):
            found.update(piece)
            yield piece
    finally:
        close_quietly(file)
    if found.hexdigest() != digest:
        raise Moved(file.path, "the segment has changed meanwhile")


def _put_manifests(archive: Archive, manifests: Sequence[SegmentManifest]) -> None:
    try:
        put_group(archive, [(each.name.manifest, [_encoded(each)]) for each in manifests])
    except FileExistsError:
        for manifest in manifests:
            _put_manifest(archive, manifest)


def _encoded(manifest: SegmentManifest) -> bytes:
    return encode_manifest(manifest.as_json())


def _put_manifest(archive: Archive, manifest: SegmentManifest) -> None:
    name = manifest.name.manifest
    try:
        archive.put(name, [_encoded(manifest)])
    except FileExistsError:
        # A copy of this log was faster, and differs in what is of no account here.
        there = read_segment_manifest(archive, name)
        same = attrs.evolve(manifest, history=there.history, consumers=there.consumers)
        if attrs.evolve(there, digest=manifest.digest, size=manifest.size) != same:
            raise
