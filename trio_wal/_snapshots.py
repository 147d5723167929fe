"""Snapshots of a database's store, kept where all machines find them.

Law: blocking; a snapshot is there when its manifest is, and that is written last.  What is fetched
is believed after its digest, length, log and LSN are those that the manifest names.

Names: ``<lsn>-<epoch>-<digest>.mdb`` for the store's file, ``<lsn>-<epoch>.json`` for the manifest,
so that they sort by LSN.  Nothing is ever overwritten with something else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Final, Protocol, final
from uuid import UUID

import attrs

from ._exceptions import CorruptLogError
from ._files import Files
from ._store_files import DATA_NAME
from ._system.files import OsFiles
from ._util import MiB, check_path

CHUNK_BYTES: Final = 1 * MiB
SNAPSHOTS: Final = "snapshots"
"""Under which name a log is held: by what no snapshot has."""
_MANIFEST: Final = re.compile(r"(\d{20})-([0-9a-f]{16})\.json", re.ASCII)


class SnapshotStore(Protocol):
    """Where snapshots are kept: `DirectorySnapshots`, or an object storage.

    Its methods are called in worker threads, and block.  What they raise reaches the caller of
    `Database.snapshot_to`, `open_database` and `open_replica`.
    """

    def put(self, name: str, content: Iterable[bytes]) -> None:
        """Keep something under a name, durably and whole, or not at all.  A name that is taken is
        left as it is."""
        ...

    def list(self) -> list[str]:
        """The names of all that is kept."""
        ...

    def get(self, name: str) -> Iterator[bytes]:
        """What is kept under a name, piece by piece.  Raises `FileNotFoundError`."""
        ...


@final
class DirectorySnapshots:
    """A `SnapshotStore` in a directory that all machines see, as on a network file system."""

    def __init__(self, path: str) -> None:
        """
        Args:
          path: created if it is missing.
        """
        self.path: str = check_path(path)
        self._files: Files = OsFiles()

    def put(self, name: str, content: Iterable[bytes]) -> None:
        """As `SnapshotStore.put`."""
        directory = self._files.open_directory(self.path, create=True)
        try:
            names = directory.names()
            if name in names:
                return
            temporary = f"{name}.{self._files.random_bytes(8).hex()}.tmp"
            file = directory.open(temporary, create=True)
            try:
                offset = 0
                for piece in content:
                    file.pwrite([piece], offset)
                    offset += len(piece)
                file.sync()
            except BaseException:
                file.close()
                directory.unlink(temporary)
                raise
            file.close()
            directory.rename(temporary, name)
            directory.sync()
        finally:
            directory.close()

    def list(self) -> list[str]:
        """As `SnapshotStore.list`."""
        try:
            directory = self._files.open_directory(self.path)
        except FileNotFoundError:
            return []
        try:
            return [name for name in directory.names() if not name.endswith(".tmp")]
        finally:
            directory.close()

    def get(self, name: str) -> Iterator[bytes]:
        """As `SnapshotStore.get`."""
        directory = self._files.open_directory(self.path)
        try:
            file = directory.open(name)
            try:
                offset = 0
                while piece := file.pread(CHUNK_BYTES, offset):
                    yield piece
                    offset += len(piece)
            finally:
                file.close()
        finally:
            directory.close()

    def __repr__(self) -> str:
        return f"DirectorySnapshots({self.path!r})"


@attrs.frozen(kw_only=True)
class Manifest:
    """What a snapshot says of itself."""

    uuid: UUID
    """Of the database's log."""
    lsn: int
    """Up to which the snapshot holds everything."""
    epoch: int
    data: str
    """The name of the store's file."""
    size: int
    digest: str
    """SHA-256 of that, in hexadecimal digits."""

    @property
    def name(self) -> str:
        return f"{self.lsn:020d}-{self.epoch:016x}.json"


def put_snapshot(
    files: Files, kept: SnapshotStore, store_path: str, *, uuid: UUID, lsn: int, epoch: int
) -> Manifest:
    """Keep a copy of a store, which nobody writes."""
    directory = files.open_directory(store_path)
    try:
        file = directory.open(DATA_NAME)
        try:
            digest, size = hashlib.sha256(), 0
            while piece := file.pread(CHUNK_BYTES, size):
                digest.update(piece)
                size += len(piece)
            text = digest.hexdigest()
            data = f"{lsn:020d}-{epoch:016x}-{text[:16]}.mdb"
            offsets = range(0, size, CHUNK_BYTES)
            kept.put(data, (file.pread(CHUNK_BYTES, offset) for offset in offsets))
        finally:
            file.close()
    finally:
        directory.close()
    manifest = Manifest(uuid=uuid, lsn=lsn, epoch=epoch, data=data, size=size, digest=text)
    content = {**attrs.asdict(manifest), "uuid": str(uuid)}
    kept.put(manifest.name, [json.dumps(content, indent=1).encode()])
    return manifest


def newest_snapshot(kept: SnapshotStore, uuid: UUID) -> Manifest | None:
    """The one with the highest LSN that is whole enough to say what it is.

    Raises:
      CorruptLogError: the newest is another database's, or is none.
    """
    names = sorted(name for name in kept.list() if _MANIFEST.fullmatch(name))
    if not names:
        return None
    manifest = _read_manifest(kept, names[-1])
    if manifest.uuid != uuid:
        reason = f"the snapshot is of another database, {manifest.uuid}, not of {uuid}"
        raise CorruptLogError(names[-1], 0, reason)
    return manifest


def _read_manifest(kept: SnapshotStore, name: str) -> Manifest:
    try:
        content = json.loads(b"".join(kept.get(name)))
        found = Manifest(
            uuid=UUID(content["uuid"]),
            lsn=int(content["lsn"]),
            epoch=int(content["epoch"]),
            data=str(content["data"]),
            size=int(content["size"]),
            digest=str(content["digest"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptLogError(name, 0, f"this is no manifest of a snapshot: {exc!r}") from exc
    if found.name != name:
        raise CorruptLogError(name, 0, "the manifest stands under the name of another one")
    return found


def fetch_snapshot(files: Files, kept: SnapshotStore, manifest: Manifest, store_path: str) -> None:
    """Make a store of a snapshot, in a directory that is not there yet.

    Raises:
      CorruptLogError: what is kept is not what the manifest names; nothing is left of it.
    """
    temporary = files.begin_directory(store_path)
    try:
        directory = files.open_directory(temporary)
        try:
            file = directory.open(DATA_NAME, create=True)
            try:
                digest, size = hashlib.sha256(), 0
                for piece in kept.get(manifest.data):
                    digest.update(piece)
                    file.pwrite([piece], size)
                    size += len(piece)
                    if size > manifest.size:
                        break
                if (size, digest.hexdigest()) != (manifest.size, manifest.digest):
                    reason = "what is kept is not what the manifest of the snapshot names"
                    raise CorruptLogError(manifest.data, 0, reason)
                file.sync()
            finally:
                file.close()
            directory.sync()
        finally:
            directory.close()
        files.finish_directory(temporary, store_path)
    except BaseException:
        files.discard_directory(temporary)
        raise
