"""A log's segments in an `Archive`: their names, their manifests, and what is checked.

Law: blocking; a segment is there when its manifest is, and that is put last.  What goes there has
been read to its last frame; what is taken from there is believed after its digest and its frames.

Names: ``<first LSN>-<last LSN>-<epoch>-<salt>-<digest>.wal`` for the segment's file, as it stands
in the log, and ``<first LSN>-<last LSN>-<epoch>-<salt>.json`` for the manifest, so that both sort
by LSN.  A segment's salt is its own; one whose end was cut ends with another LSN; and the epoch,
that of the log when the segment was put there, says in which history its records are.  So two
histories of a log never want the same name.
"""

from __future__ import annotations

import errno
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, final
from uuid import UUID

import attrs

from ._archive import Archive
from ._disk import scan
from ._disk.frame import (
    BLOCK,
    SEGMENT_FEATURES_KNOWN,
    FrameError,
    FrameHeader,
    Kind,
    SegmentHeader,
    UnsupportedVersion,
    decode_footer,
    decode_segment_header,
    segment_name,
    unknown_features,
)
from ._disk.scan import FrameScanner, Position, start_of
from ._disk.window import Read
from ._exceptions import CorruptLogError
from ._identity import History, common_lsn, epoch_of, generation
from ._manifest import history_as_json, history_of_json, read_manifest

_STEM: Final = r"(\d{20})-(\d{20})-([0-9a-f]{16})-([0-9a-f]{32})"
_MANIFEST: Final = re.compile(rf"{_STEM}\.json", re.ASCII)
_DATA: Final = re.compile(rf"({_STEM})-[0-9a-f]{{16}}\.wal", re.ASCII)


@attrs.frozen
class SegmentKey:
    """Which segment of a log it is, and up to where: the same key, the same records."""

    salt: bytes
    first_lsn: int
    last_lsn: int


@attrs.frozen
class SegmentName:
    """What the name of a manifest says."""

    key: SegmentKey
    epoch: int

    @property
    def stem(self) -> str:
        key = self.key
        return f"{key.first_lsn:020d}-{key.last_lsn:020d}-{self.epoch:016x}-{key.salt.hex()}"

    @property
    def manifest(self) -> str:
        return f"{self.stem}.json"

    def data(self, digest: str) -> str:
        return f"{self.stem}-{digest[:16]}.wal"


def segment_name_of(name: str) -> SegmentName | None:
    """What an object's name says, if it is that of a segment's manifest."""
    match = _MANIFEST.fullmatch(name)
    if match is None:
        return None
    key = SegmentKey(bytes.fromhex(match[4]), int(match[1]), int(match[2]))
    return SegmentName(key, int(match[3], 16))


@final
@attrs.frozen(kw_only=True)
class SegmentManifest:
    """What is said of a segment in an archive."""

    uuid: UUID
    """The log's."""
    number: int
    """The segment's, which counts from 1 in every log and copy of a log."""
    salt: bytes
    first_lsn: int
    last_lsn: int
    first_time_us: int
    """Of its first batch, in microseconds since 1970."""
    last_time_us: int
    """Of its last batch."""
    previous: int
    """Checksum of the frame before the segment."""
    end: int
    """Checksum of its last frame but the footer: what the next segment must name as `previous`."""
    features: int
    consumers: bool
    """Whether transactions may move places of consumers."""
    history: History
    """The log's epochs when the segment was put there."""
    size: int
    """Bytes of the file."""
    digest: str
    """SHA-256 of it, in hexadecimal digits."""

    @property
    def key(self) -> SegmentKey:
        return SegmentKey(self.salt, self.first_lsn, self.last_lsn)

    @property
    def name(self) -> SegmentName:
        return SegmentName(self.key, epoch_of(self.history))

    @property
    def data(self) -> str:
        """The name of the segment's file in the archive."""
        return self.name.data(self.digest)

    @property
    def segment_file(self) -> str:
        """The name of the segment's file in a log."""
        return segment_name(self.first_lsn)

    def usable_lsn(self, history: History) -> int:
        """Up to which LSN its records are those of a history; below `first_lsn`: none is."""
        common = common_lsn(history, epoch_of(self.history))
        return 0 if common is None else min(common, self.last_lsn)

    def as_json(self) -> dict[str, object]:
        fields = attrs.asdict(self, recurse=False)
        fields["uuid"], fields["salt"] = str(self.uuid), self.salt.hex()
        fields["history"] = history_as_json(self.history)
        return fields


def read_segment_manifest(archive: Archive, name: str) -> SegmentManifest:
    """Raises `CorruptLogError`, `UnsupportedFormatError`, `FileNotFoundError`."""
    fields = read_manifest(archive, name, "a segment")
    try:
        found = SegmentManifest(
            uuid=UUID(fields.pop("uuid")),
            salt=bytes.fromhex(fields.pop("salt")),
            history=history_of_json(fields.pop("history")),
            digest=str(fields.pop("digest")),
            consumers=bool(fields.pop("consumers")),
            **_numbers(fields),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptLogError(name, 0, f"this is not a manifest of a segment: {exc!r}") from exc
    if found.name.manifest != name:
        raise CorruptLogError(name, 0, "the manifest is stored under the name of another one")
    if unknown := found.features & ~SEGMENT_FEATURES_KNOWN:
        raise unknown_features(unknown).of(name)
    return found


_NUMBERS: Final = (
    "number", "first_lsn", "last_lsn", "first_time_us", "last_time_us",
    "previous", "end", "features", "size",
)  # fmt: skip


def _numbers(fields: Mapping[str, Any]) -> dict[str, int]:
    # What a later version adds is no concern of this one.
    return {name: int(fields[name]) for name in _NUMBERS}


# -- reading a segment ------------------------------------------------------------------


@final
class PassingFile:
    """A file that comes in pieces, from its beginning to its end: read in order, once."""

    def __init__(self, path: str, pieces: Iterable[bytes]) -> None:
        self.path = path
        self.size: int = 0
        """Bytes that have come."""
        self._pieces = iter(pieces)
        self._digest = hashlib.sha256()
        self._held = b""
        self._offset = 0
        """Of the first byte that is still held."""

    def pread(self, length: int, offset: int) -> bytes:
        """Nothing before ``offset`` can be read any more."""
        skip = offset - self._offset
        assert skip >= 0
        if skip + length > len(self._held):
            parts = [self._held[skip:]]
            have = len(parts[0])
            while have < length and (piece := next(self._pieces, None)) is not None:
                self._digest.update(piece)
                start = max(0, offset - self.size)
                self.size += len(piece)
                if start < len(piece):
                    parts.append(piece[start:])
                    have += len(parts[-1])
            self._held, self._offset, skip = b"".join(parts), offset, 0
        return self._held[skip : skip + length]

    def finish(self) -> str:
        """Take what is left; returns the digest of all, SHA-256 in hexadecimal digits."""
        self._held = b""
        for piece in self._pieces:
            self._digest.update(piece)
            self.size += len(piece)
        return self._digest.hexdigest()


@attrs.frozen
class Frames:
    """What the frames of a segment came to, up to a place."""

    header: SegmentHeader
    end: Position
    """After the last frame that was taken, which has no record above the one asked for."""
    frames: int
    """Data frames before it."""
    first_time_us: int
    index: tuple[tuple[int, int], ...]
    """(first LSN, offset) of some of them."""
    seal: FrameHeader | None
    """The SEAL frame, where the segment was followed to that."""
    beyond: tuple[FrameHeader, bytes] | None
    """The data frame at which it was ended."""


def read_header(path: str, read: Read) -> SegmentHeader:
    """Raises `CorruptLogError` or `UnsupportedFormatError`."""
    try:
        return decode_segment_header(read(BLOCK, 0))
    except UnsupportedVersion as exc:
        raise exc.of(path) from exc
    except FrameError as exc:
        raise CorruptLogError(path, 0, str(exc)) from exc


def read_frames(
    path: str,
    read: Read,
    header: SegmentHeader,
    ends: Callable[[FrameHeader], bool] = lambda _: False,
    *,
    last_lsn: int | None = None,
    skim: bool = True,
    step: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> Frames:
    """Follow and check the frames of a segment, to its footer, or to where they end.

    Args:
      read: asked for ascending offsets only.
      ends: whether to end before this data frame.
      last_lsn: where this one is reached, whatever stands after it is of no concern: a crash may
          have torn the footer.
      skim: whether the body of the frame in `Frames.beyond` is of no use.
      step: bytes between two entries of the index.
      tick: called after each frame; what it raises is raised.

    Raises:
      CorruptLogError: what stands after the last frame is neither a frame nor nothing.
    """
    scanner = FrameScanner(read, header, start_of(header), skim=skim)
    end, count, first_us = scanner.position, 0, 0
    index: list[tuple[int, int]] = []

    def frames_so_far(seal: FrameHeader | None, beyond: tuple[FrameHeader, bytes] | None) -> Frames:
        return Frames(header, end, count, first_us, tuple(index), seal, beyond)

    for frame, body in scanner:
        try:
            scan.check_body(frame, body)
        except FrameError as exc:
            raise CorruptLogError(path, frame.offset, str(exc)) from exc
        if frame.kind is Kind.SEAL:
            _check_footer(path, header, frame, body)
            return frames_so_far(frame, None)
        if frame.kind is Kind.DATA:
            if ends(frame):
                return frames_so_far(None, (frame, body))
            if not index or frame.offset - index[-1][1] >= step:
                index.append((frame.first_lsn, frame.offset))
            first_us = first_us or frame.time_us
            count += 1
        end = scanner.position
        tick()
    if scanner.reason and end.next_lsn - 1 != last_lsn:
        raise CorruptLogError(path, end.offset, scanner.reason)
    return frames_so_far(None, None)


def _check_footer(path: str, header: SegmentHeader, frame: FrameHeader, body: bytes) -> None:
    footer = decode_footer(body)
    counted = frame.first_lsn - header.first_lsn, frame.first_lsn - 1
    if (footer.records, footer.last_lsn) != counted:
        reason = f"the footer counts {footer.records} records, the segment has {counted[0]}"
        raise CorruptLogError(path, frame.offset, reason)


def check_archived(path: str, pieces: Iterable[bytes], manifest: SegmentManifest) -> None:
    """Whether what is kept is the segment that its manifest names, to the last frame.

    Raises:
      CorruptLogError, UnsupportedFormatError
    """
    file = PassingFile(path, pieces)
    found = read_sealed(file)
    if (file.finish(), file.size) != (manifest.digest, manifest.size):
        reason = "what is kept is not what the manifest of the segment names"
        raise CorruptLogError(path, 0, reason)
    told = manifest.number, manifest.first_lsn, manifest.last_lsn, manifest.salt, manifest.end
    header, seal = found.header, found.seal
    assert seal is not None
    is_ = header.number, header.first_lsn, seal.first_lsn - 1, header.salt, seal.previous
    if told != is_ or UUID(bytes=header.log_uuid) != manifest.uuid:
        raise CorruptLogError(path, 0, "the segment is not the one that its manifest names")


def read_sealed(file: PassingFile, tick: Callable[[], None] = lambda: None) -> Frames:
    """The frames of a segment that must end with a footer; ``tick`` is called after each.

    Raises:
      CorruptLogError, UnsupportedFormatError
    """
    header = read_header(file.path, file.pread)
    found = read_frames(file.path, file.pread, header, tick=tick)
    if found.seal is None:
        raise CorruptLogError(file.path, found.end.offset, "the segment's footer is missing")
    return found


# -- what an archive has ----------------------------------------------------------------


def archived_segments(names: Iterable[str]) -> Iterator[SegmentName]:
    """The segments that are there, by the names of an archive's objects."""
    names = list(names)
    whole = {match[1] for match in map(_DATA.fullmatch, names) if match is not None}
    for name in names:
        found = segment_name_of(name)
        if found is not None and found.stem in whole:
            yield found


@final
@attrs.frozen(kw_only=True)
class OpenedLog:
    """What a log had when it was opened."""

    history: History
    first_lsn: int
    last_lsn: int
    ends: Mapping[SegmentKey, int]
    """Its sealed segments, ascending, and `SegmentManifest.end` of each."""

    def own_segments(self, found: Iterable[SegmentName]) -> set[SegmentKey]:
        """Which of an archive's segments the log has, or had.

        Raises:
          FileExistsError: one is in the way; see `check`.
        """
        own = set[SegmentKey]()
        for name in found:
            self.check(name.manifest, name.epoch, name.key.last_lsn)
            common = common_lsn(self.history, name.epoch)
            if common is None or name.key.last_lsn > common:
                continue
            if name.key.last_lsn >= self.first_lsn and name.key not in self.ends:
                # Segments of one history that differ, though none was cut.
                raise self.others(name)
            own.add(name.key)
        return own

    def check(self, manifest: str, epoch: int, last_lsn: int) -> None:
        """Whether what an archive has, by the name of its manifest, is from before the log's end.

        Raises:
          FileExistsError: there is more in the log's epoch, or an epoch that it does not know: its
              files were set back, or a copy of them went on.  `restore` would take that for the
              log's end, and not what comes now.
        """
        today = epoch_of(self.history)
        if common_lsn(self.history, epoch) is None and generation(epoch) >= generation(today):
            what = f"is ahead, of epoch {epoch:x}; this log, in epoch {today:x}, is not"
            raise _in_the_way(manifest, what)
        if epoch == today and last_lsn > self.last_lsn:
            what = f"is ahead, of LSN {last_lsn}; this log ended at {self.last_lsn}"
            raise _in_the_way(manifest, what)

    def others(self, name: SegmentName) -> FileExistsError:
        """The error where a segment ends where none of the log's does, or has other records: the
        log was set back, and may have come further since then."""
        what = f"has another segment, up to LSN {name.key.last_lsn}, than this log"
        return _in_the_way(name.manifest, what)


def _in_the_way(manifest: str, what: str) -> FileExistsError:
    text = f"the archive {what}: its files were set back, or a copy of them went on; "
    text += "restore the archive, or give the log a new one"
    return FileExistsError(errno.EEXIST, text, manifest)


def pruned_before(found: Iterable[SegmentName], history: History) -> int:
    """Below which LSN an archive once had this log, and its owner has deleted it: it has nothing
    there, and segments are put there in order."""
    first = 1 << 64
    for name in found:
        common = common_lsn(history, name.epoch)
        if common is not None and name.key.last_lsn <= common:
            first = min(first, name.key.first_lsn)
    return 0 if first == 1 << 64 else first
