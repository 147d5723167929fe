"""Snapshots of a database's store in an `Archive`: for machines that have nothing, and for
`restore`.

Law: blocking; a snapshot is there when its manifest is, and that is written last.  What is fetched
is believed after its digest, length, log and LSN are those that the manifest names.

Names: ``<lsn>-<epoch>-<digest>.mdb`` for the store's file, ``<lsn>-<epoch>.json`` for the manifest,
so that they sort by LSN.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Final
from uuid import UUID

import attrs

from ._archive import Archive, pieces_of
from ._exceptions import CorruptLogError
from ._files import Files
from ._identity import History, epoch_of
from ._manifest import (
    encode_manifest,
    history_as_json,
    history_of_json,
    read_manifest,
    write_pieces,
)
from ._store_files import DATA_NAME

SNAPSHOTS: Final = "snapshots"
"""Under which name a log is held: by what no snapshot has."""
_MANIFEST: Final = re.compile(r"(\d{20})-([0-9a-f]{16})\.json", re.ASCII)


@attrs.frozen(kw_only=True)
class Manifest:
    """What a snapshot says of itself."""

    uuid: UUID
    """Of the database's log."""
    lsn: int
    """Up to which the snapshot holds everything."""
    history: History
    """The epochs of the log."""
    data: str
    """The name of the store's file."""
    size: int
    digest: str
    """SHA-256 of that, in hexadecimal digits."""

    @property
    def name(self) -> str:
        return manifest_name(self.lsn, self.epoch)

    @property
    def epoch(self) -> int:
        return epoch_of(self.history)

    def as_json(self) -> dict[str, object]:
        return {
            "uuid": str(self.uuid),
            "lsn": self.lsn,
            "history": history_as_json(self.history),
            "data": self.data,
            "size": self.size,
            "digest": self.digest,
        }


def manifest_name(lsn: int, epoch: int) -> str:
    return f"{lsn:020d}-{epoch:016x}.json"


def put_snapshot(
    files: Files,
    kept: Archive,
    store_path: str,
    *,
    uuid: UUID,
    lsn: int,
    history: History,
    tick: Callable[[], None] = lambda: None,
) -> Manifest:
    """Keep a copy of a store, which nobody writes.  Where there is one of this LSN and epoch, that
    is the snapshot.

    Args:
      tick: called between pieces; what it raises ends this, and nothing is kept.

    Raises:
      CorruptLogError: what is kept is another log's.
    """
    name = manifest_name(lsn, epoch_of(history))
    if name in kept.list():
        return _own_manifest(kept, name, uuid)
    directory = files.open_directory(store_path)
    try:
        file = directory.open(DATA_NAME)
        try:
            digest, size = hashlib.sha256(), 0
            for piece in pieces_of(file, tick):
                digest.update(piece)
                size += len(piece)
            text = digest.hexdigest()
            data = f"{name.removesuffix('.json')}-{text[:16]}.mdb"
            kept.put(data, pieces_of(file, tick))
        finally:
            file.close()
    finally:
        directory.close()
    manifest = Manifest(uuid=uuid, lsn=lsn, history=history, data=data, size=size, digest=text)
    try:
        kept.put(name, [encode_manifest(manifest.as_json())])
    except FileExistsError:
        # Another was faster.
        return _own_manifest(kept, name, uuid)
    return manifest


def newest_snapshot(kept: Archive, uuid: UUID) -> Manifest | None:
    """The one with the highest LSN that is whole enough to say what it is.

    Raises:
      CorruptLogError: the newest is another database's, or is none.
    """
    names = sorted(filter(is_manifest, kept.list()))
    return _own_manifest(kept, names[-1], uuid) if names else None


def _own_manifest(kept: Archive, name: str, uuid: UUID) -> Manifest:
    manifest = read_snapshot(kept, name)
    if manifest.uuid != uuid:
        reason = f"the snapshot is of another database, {manifest.uuid}, not of {uuid}"
        raise CorruptLogError(name, 0, reason)
    return manifest


def is_manifest(name: str) -> bool:
    """Whether an object of this name says what a snapshot is."""
    return _MANIFEST.fullmatch(name) is not None


def snapshot_name_of(name: str) -> tuple[int, int] | None:
    """The LSN and the epoch of a snapshot, by the name of its manifest."""
    match = _MANIFEST.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2], 16))


def read_snapshot(kept: Archive, name: str) -> Manifest:
    """Raises `CorruptLogError`, `FileNotFoundError`."""
    content = read_manifest(kept, name, "a snapshot")
    try:
        found = Manifest(
            uuid=UUID(content["uuid"]),
            lsn=int(content["lsn"]),
            history=history_of_json(content["history"]),
            data=str(content["data"]),
            size=int(content["size"]),
            digest=str(content["digest"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptLogError(name, 0, f"this is not a manifest of a snapshot: {exc!r}") from exc
    if found.name != name:
        raise CorruptLogError(name, 0, "the manifest is stored under the name of another one")
    return found


def fetch_snapshot(
    files: Files,
    kept: Archive,
    manifest: Manifest,
    store_path: str,
    tick: Callable[[int], None] = lambda _: None,
) -> None:
    """Make a store of a snapshot, in a directory that is not there yet.

    Args:
      tick: called with the bytes of each piece.

    Raises:
      CorruptLogError: what is kept is not what the manifest names; nothing is left of it.
    """
    temporary = files.begin_directory(store_path)
    try:
        write_store(files, temporary, manifest, kept.get(manifest.data), tick)
        files.finish_directory(temporary, store_path)
    except BaseException:
        files.discard_directory(temporary)
        raise


def write_store(
    files: Files,
    path: str,
    manifest: Manifest,
    content: Iterator[bytes],
    tick: Callable[[int], None] = lambda _: None,
) -> None:
    """The file of a store in a new directory, durably.

    Raises:
      CorruptLogError: the content is not what the manifest names.
    """
    directory = files.open_directory(path, create=True)
    try:
        file = directory.open(DATA_NAME, create=True)
        try:
            written = write_pieces(file, content, manifest.size, tick)
            if written != (manifest.size, manifest.digest):
                reason = "what is kept is not what the manifest of the snapshot names"
                raise CorruptLogError(manifest.data, 0, reason)
            file.sync()
        finally:
            file.close()
        directory.sync()
    finally:
        directory.close()
