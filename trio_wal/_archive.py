"""Where copies are kept that outlive a machine: of a log's segments, and of a database's store.

Law: blocking.  What stands under a name is whole, durable, and never becomes anything else; what
the names mean is known to those who put things there (`_manifest`, `_archived`, `_snapshots`).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import Any, Final, Protocol, cast, final

import msgspec

from ._exports import publish
from ._files import Directory, File, Files, close_quietly
from ._system.files import OsFiles
from ._util import KiB, check_path

CHUNK_BYTES: Final = 256 * KiB
"""What is read, checked and written at once: so little stays in the processor's cache, and holds
nobody up."""
_TEMPORARY: Final = ".tmp"


class Archive(Protocol):
    """Where segments of a log and backups of a database are kept: `DirectoryArchive`,
    `ObjectArchive`, or an object of your own.

    One archive belongs to one log and its copies.  The methods may block: they are called in
    worker threads, possibly two at a time.  They may raise anything: what they raise while
    segments are archived is logged, and the call is tried again; otherwise the caller gets it.

    One that also has a method ``put_group``, as `DirectoryArchive` has, is called with several
    objects at once where several segments wait.
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


def puts_groups(archive: Archive) -> bool:
    """Whether it has a ``put_group`` of its own, such as that of `DirectoryArchive`."""
    return callable(getattr(archive, "put_group", None))


def put_group(archive: Archive, objects: Iterable[tuple[str, Iterable[bytes]]]) -> None:
    """Put one after the other, or as an archive does that better, which `puts_groups`."""
    if puts_groups(archive):
        cast(Any, archive).put_group(objects)
    else:
        for name, content in objects:
            archive.put(name, content)


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
        self.put_group([(name, content)])

    def put_group(self, objects: Iterable[tuple[str, Iterable[bytes]]]) -> None:
        """As `put` of one after the other, with fewer syncs: for a journal in which the file system
        notes them all, several files are little more than one.

        Args:
          objects: names and contents.

        On return all are there, whole and durable.  If this raises, the first of them may be there.

        Raises:
          FileExistsError: as `put`.
        """
        directory = self._files.open_directory(self.path, create=True)
        written: list[_Written] = []
        try:
            for name, content in objects:
                file = _open_kept(directory, name)
                if file is None:
                    written.append(self._write(directory, name, content))
                else:
                    self._check_same(name, file, content)
            # The last one first: until it is on the disk the others are as well, mostly, and the
            # first sync writes the journal for all.
            for one in reversed(written):
                one.file.sync()
                one.file.close()
            while written:
                self._name(directory, written[0])
                del written[0]
            # For what is there already, too: who put it may have been killed.
            directory.sync()
        finally:
            for one in written:
                close_quietly(one.file)
                _unlink_quietly(directory, one.temporary)
            directory.close()

    def _write(self, directory: Directory, name: str, content: Iterable[bytes]) -> _Written:
        unique = f"{self._files.random_bytes(8).hex()}{next(self._numbers)}"
        temporary = f"{name}.{unique}{_TEMPORARY}"
        file = directory.open(temporary, create=True)
        try:
            offset = 0
            for piece in content:
                file.pwrite([piece], offset)
                file.write_back(len(piece), offset)
                offset += len(piece)
        except BaseException:
            close_quietly(file)
            _unlink_quietly(directory, temporary)
            raise
        return _Written(name, temporary, file)

    def _name(self, directory: Directory, one: _Written) -> None:
        try:
            directory.rename_new(one.temporary, one.name)
        except FileExistsError:
            # Somebody was faster.
            try:
                self._check_same(
                    one.name, directory.open(one.name), _pieces(directory, one.temporary)
                )
            finally:
                _unlink_quietly(directory, one.temporary)

    def _check_same(self, name: str, kept: File, content: Iterable[bytes]) -> None:
        """Closes what is kept."""
        try:
            if not is_same(pieces_of(kept), content):
                raise taken(f"{self.path}/{name}")
        finally:
            close_quietly(kept)

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


class _Written(msgspec.Struct, frozen=True, eq=False):
    """An object under another name, not synced yet."""

    name: str
    temporary: str
    file: File


def _open_kept(directory: Directory, name: str) -> File | None:
    """What has this name; None: nothing has."""
    try:
        return directory.open(name)
    except FileNotFoundError:
        return None


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


publish(Archive, DirectoryArchive)
