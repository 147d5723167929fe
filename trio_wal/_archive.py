"""Where copies are kept that outlive a machine: of a log's segments, and of a database's store.

Law: blocking.  What stands under a name is whole, durable, and never becomes anything else; what
the names mean is known to those who put things there (`_archived`, `_snapshots`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, Final, Protocol, cast, final
from uuid import UUID

import attrs

from ._exceptions import CorruptLogError, UnsupportedFormatError, WrongDirectoryError
from ._exports import publish
from ._files import Directory, File, Files, close_quietly
from ._identity import History, Parting
from ._system.files import OsFiles
from ._util import KiB, MiB, check_path

CHUNK_BYTES: Final = 1 * MiB
"""What is read, checked and written at once."""
IDENTITY_NAME: Final = "archive.json"
IDENTITY_FORMAT: Final = 1
MANIFEST_BYTES_MAX: Final = 64 * KiB
_OBJECT: Final = re.compile(r"\d{20}-[0-9a-f-]+\.(json|mdb|wal)", re.ASCII)
"""Names of what is kept in archives."""
_TEMPORARY: Final = ".tmp"


class Archive(Protocol):
    """Where segments of a log and backups of a database are kept: `DirectoryArchive`,
    `ObjectArchive`, or an object of your own.

    One archive belongs to one log and its copies.  The methods may block: they are called in
    worker threads, possibly two at a time.  They may raise anything: what they raise while
    segments are archived is logged, and the call is tried again; otherwise the caller gets it.
    """

    def put(self, name: str, content: Iterable[bytes]) -> None:
        """Keep something under a name.

        On return it is there, whole and durable; if this raises, nothing is there that was not
        there before.  Create-only: where the name is taken, what stands there stays.  If that is
        the same content, all is well, and it is durable on return, too.

        Args:
          content: consumed once; what it raises is raised, and nothing is kept.

        Raises:
          FileExistsError: the name is taken by other content; ``filename`` is that name.
        """
        ...

    def list(self) -> list[str]:
        """The names of all that is kept, in any order."""
        ...

    def get(self, name: str) -> Iterator[bytes]:
        """What is kept under a name, piece by piece.  Raises `FileNotFoundError`."""
        ...


def check_archive(name: str, value: object) -> Archive:
    """Raises `TypeError` that names the parameter."""
    if not all(callable(getattr(value, method, None)) for method in ("put", "list", "get")):
        kind = type(value).__name__
        raise TypeError(f"{name} must be an Archive, with put, list and get, not {kind}")
    return cast(Archive, value)


def taken(name: str) -> FileExistsError:
    """The error of a `put` under a name that something else has."""
    text = "other content is kept under this name, and nothing is ever overwritten"
    return FileExistsError(errno.EEXIST, text, name)


def is_same(kept: Iterable[bytes], content: Iterable[bytes]) -> bool:
    """Whether what is kept is what was to be put; takes memory for a piece of each."""
    ours, theirs = iter(content), iter(kept)
    left = right = b""
    while True:
        # Pieces may be cut differently, and be empty.
        left = left or next(filter(None, ours), b"")
        right = right or next(filter(None, theirs), b"")
        size = min(len(left), len(right))
        if left[:size] != right[:size] or (not size and left != right):
            return False
        if not size:
            return True
        left, right = left[size:], right[size:]


@final
class DirectoryArchive:
    """An `Archive` in a directory: on another disk, or one that several machines see.

    Every object is a file of its own.  It is written under another name, synced, and linked to
    its name, so that if two put the same name at once, one wins and the other is told.  Then
    the directory is synced.  Files that end with ``.tmp`` were left by processes that were
    killed, and may be deleted while nobody archives.
    """

    def __init__(self, path: str | PathLike[str], *, files: Files | None = None) -> None:
        """
        Args:
          path: created with mode 0700 when the first thing is put, if it is missing.
          files: another file system, such as `trio_wal.testing.MemoryFiles`.
        """
        self._files: Files = OsFiles() if files is None else files
        self.path: str = self._files.absolute(check_path(path))
        """Absolute."""
        self._numbers = itertools.count()

    def put(self, name: str, content: Iterable[bytes]) -> None:
        """As `Archive.put`."""
        directory = self._files.open_directory(self.path, create=True)
        try:
            if name not in directory.names():
                self._put_new(directory, name, self._write(directory, name, content))
            else:
                self._check_same(directory, name, content)
            # For what is there already, too: who put it may have been killed.
            directory.sync()
        finally:
            directory.close()

    def _write(self, directory: Directory, name: str, content: Iterable[bytes]) -> str:
        unique = f"{self._files.random_bytes(8).hex()}{next(self._numbers)}"
        temporary = f"{name}.{unique}{_TEMPORARY}"
        file = directory.open(temporary, create=True)
        try:
            offset = 0
            for piece in content:
                file.pwrite([piece], offset)
                offset += len(piece)
            file.sync()
            file.close()
        except BaseException:
            close_quietly(file)
            _unlink_quietly(directory, temporary)
            raise
        return temporary

    def _put_new(self, directory: Directory, name: str, temporary: str) -> None:
        try:
            directory.rename_new(temporary, name)
        except FileExistsError:
            # Somebody was faster.
            try:
                self._check_same(directory, name, _pieces(directory, temporary))
            finally:
                _unlink_quietly(directory, temporary)
        except BaseException:
            _unlink_quietly(directory, temporary)
            raise

    def _check_same(self, directory: Directory, name: str, content: Iterable[bytes]) -> None:
        if not is_same(_pieces(directory, name), content):
            raise taken(f"{self.path}/{name}")

    def list(self) -> list[str]:
        """As `Archive.list`; empty where there is no such directory yet."""
        try:
            directory = self._files.open_directory(self.path)
        except FileNotFoundError:
            return []
        try:
            return [name for name in directory.names() if not name.endswith(_TEMPORARY)]
        finally:
            directory.close()

    def get(self, name: str) -> Iterator[bytes]:
        """As `Archive.get`."""
        directory = self._files.open_directory(self.path)
        try:
            yield from _pieces(directory, name)
        finally:
            directory.close()

    def __repr__(self) -> str:
        return f"DirectoryArchive({self.path!r})"


def _unlink_quietly(directory: Directory, name: str) -> None:
    with contextlib.suppress(OSError):
        directory.unlink(name)


def _pieces(directory: Directory, name: str) -> Iterator[bytes]:
    file = directory.open(name)
    try:
        yield from pieces_of(file)
    finally:
        file.close()


def pieces_of(file: File, tick: Callable[[], None] = lambda: None) -> Iterator[bytes]:
    """All of a file; ``tick`` is called before a piece is given."""
    offset = 0
    while piece := file.pread(CHUNK_BYTES, offset):
        tick()
        yield piece
        offset += len(piece)


def write_pieces(
    file: File, content: Iterable[bytes], size_max: int, tick: Callable[[int], None]
) -> tuple[int, str]:
    """Write into an empty file, until it is larger than ``size_max``; returns its size, and its
    SHA-256 in hex."""
    digest, size = hashlib.sha256(), 0
    for piece in content:
        digest.update(piece)
        file.pwrite([piece], size)
        size += len(piece)
        tick(len(piece))
        if size > size_max:
            break
    return size, digest.hexdigest()


def get_small(archive: Archive, name: str, size_max: int) -> bytes:
    """All of a small object.

    Raises:
      FileNotFoundError
      CorruptLogError: it is larger than such a thing can be.
    """
    pieces: list[bytes] = []
    size = 0
    for piece in archive.get(name):
        pieces.append(piece)
        size += len(piece)
        if size > size_max:
            raise CorruptLogError(name, 0, f"more than {size_max} bytes")
    return b"".join(pieces)


# -- manifests ----------------------------------------------------------------------------


def encode_manifest(fields: Mapping[str, object]) -> bytes:
    """A manifest as JSON, with a checksum of its own: what it says is believed."""
    return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1).encode() + b"\n"


def _checksum(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_manifest(archive: Archive, name: str, kind: str) -> dict[str, Any]:
    """The fields of a manifest, whose checksum is good.

    Raises:
      CorruptLogError: it is none; ``kind`` says of what.
      FileNotFoundError
    """
    try:
        fields = dict(json.loads(get_small(archive, name, MANIFEST_BYTES_MAX)))
        checksum = fields.pop("checksum")
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise CorruptLogError(name, 0, f"this is no manifest of {kind}: {exc!r}") from exc
    if checksum != _checksum(fields):
        raise CorruptLogError(name, 0, f"checksum of the manifest of {kind} does not match")
    return fields


def history_as_json(history: History) -> list[list[int]]:
    return [[parting.epoch, parting.after_lsn] for parting in history]


def history_of_json(value: Any) -> History:
    """Raises `ValueError` or `TypeError`."""
    return tuple(Parting(int(epoch), int(after_lsn)) for epoch, after_lsn in value)


# -- whose archive ------------------------------------------------------------------------


@attrs.frozen
class Identity:
    """Whose archive something is."""

    log: UUID | None
    """None: nobody's yet, it is empty."""

    def check(self, archive: Archive, log: UUID | None) -> None:
        """Raises `WrongDirectoryError` where it is another log's.

        Args:
          log: None: one that does not exist yet, and so has no archive.
        """
        if self.log is not None and self.log != log:
            found = f"the archive of the log {self.log}"
            raise WrongDirectoryError(repr(archive), found, "an archive of its own for every log")


def read_identity(archive: Archive) -> Identity:
    """Whose an archive is.

    Raises:
      WrongDirectoryError: there are other things than an archive's.
      CorruptLogError, UnsupportedFormatError
    """
    try:
        data = get_small(archive, IDENTITY_NAME, MANIFEST_BYTES_MAX)
    except FileNotFoundError:
        names = sorted(archive.list())
        if not names or any(map(_OBJECT.fullmatch, names)):
            return Identity(None)
        found = f"no archive: it holds {names[0]!r}"
        raise WrongDirectoryError(repr(archive), found, "an empty one") from None
    try:
        content = json.loads(data)
        version, log = int(content["format"]), UUID(content["log"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptLogError(IDENTITY_NAME, 0, f"it does not say whose archive: {exc!r}") from exc
    if version != IDENTITY_FORMAT:
        raise UnsupportedFormatError(IDENTITY_NAME, version, "format of the archive")
    return Identity(log)


def probe(archive: Archive) -> None:
    """Have an archive that can tell see whether it is one: `ObjectArchive.probe`.

    Raises:
      WrongDirectoryError: it is none.
    """
    look = getattr(archive, "probe", None)
    if callable(look):
        look()


def put_identity(archive: Archive, log: UUID) -> None:
    """Make sure that this is the log's archive.

    Raises:
      WrongDirectoryError: it is another log's, or none.
    """
    probe(archive)
    read_identity(archive).check(archive, log)
    content = {"format": IDENTITY_FORMAT, "log": str(log)}
    try:
        archive.put(IDENTITY_NAME, [json.dumps(content).encode()])
    except FileExistsError:
        # Another was faster, or writes it in other words.
        read_identity(archive).check(archive, log)


publish(Archive, DirectoryArchive)
