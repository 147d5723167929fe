"""What the log asks of the operating system: files, a directory, a clock, as three small protocols.

Law: protocols and values; nothing here calls the system.  `_system` does that, and
`trio_wal.testing` has the same three classes in memory, with faults.  Nothing here knows what a
frame is.  All of it blocks and belongs in a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from ._exports import publish

LOCK_NAME: Final = "lock"
NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The errors that mean "no room": not a failure while a segment is being prepared."""


class File(Protocol):
    path: str

    def pread(self, length: int, offset: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the end of the file."""
        ...

    def next_data(self, offset: int) -> int:
        """The first offset from here on at which there may be something else than zeros: holes
        are passed over where the platform can tell; ``offset`` itself where it cannot.  At or
        after the file's end where there is nothing more."""
        ...

    def pwrite(self, pieces: Sequence[bytes], offset: int) -> None:
        """All the pieces one after the other, or an `OSError`."""
        ...

    def write_back(self, length: int, offset: int) -> None:
        """Begin to write these bytes to the disk, as far as the system can be asked to, and do not
        wait for it: a later `sync` has less to do.  They will not be read here soon."""
        ...

    def sync(self, *, in_place: bool = False) -> None:
        """On return all that was written is durable, sizes included.

        Args:
          in_place: what was written stands where written bytes stood before, so that the file
              system has nothing of its own to write down.
        """
        ...

    def written_bytes(self) -> int:
        """How much of the file, from its beginning on, is bytes that were written and not only
        space that is reserved; 0 where the file system does not say.

        What is written there stands in place once a sync after this call has returned: the file
        system may not have written down yet what it says here.
        """
        ...

    def allocate(self, size: int) -> None:
        """Grow to ``size`` with space reserved where the file system can; reads as zeros."""
        ...

    def truncate(self, size: int) -> None: ...

    def size(self) -> int: ...

    def close(self) -> None: ...


class Word(NamedTuple):
    """What a log's owner has said of it."""

    durable_lsn: int
    """0 where nothing can be trusted."""
    epoch: int | None
    """In which history; None: it does not say, or not reliably, and so proves nothing."""

    def told_lsn(self, epoch: int) -> int:
        """Up to where the log's records in this epoch are durable; 0 where it does not say.

        One that names no epoch is an older version's, which knows of epoch 0 only, or was read
        while it was written: then half of it may be of the epoch before, whose records are gone.
        """
        return self.durable_lsn if self.epoch == epoch or (self.epoch is None and not epoch) else 0


NO_WORD: Final = Word(0, None)


class Watch(Protocol):
    """Becomes readable when files of a log's directory come or go, are closed after they were
    written, or when its owner publishes what is durable."""

    def fileno(self) -> int: ...

    def drain(self) -> bool:
        """Forget what has changed so far; returns whether anything has."""
        ...

    def close(self) -> None: ...


class Directory(Protocol):
    path: str
    made: tuple[str, ...]
    """What opening it has created: itself, then missing parents, innermost first."""

    def names(self) -> list[str]: ...

    def open(self, name: str, *, create: bool = False, writable: bool = False) -> File:
        """A file of this directory; ``create`` demands that it is not there yet."""
        ...

    def rename(self, old: str, new: str) -> None: ...

    def rename_new(self, old: str, new: str) -> None:
        """As `rename`, or `FileExistsError` where there is one of the new name: of two who
        do this at once, one wins.  Killed in between, a file may have both names."""
        ...

    def unlink(self, name: str) -> None: ...

    def reread(self, name: str, keep: range = range(0)) -> None:
        """Have what is read of a file from now on come from the disk, as far as that can be
        had: after a failed write the kernel keeps what is not there.  Of the bytes in ``keep``
        that is not needed."""
        ...

    def sync(self) -> None:
        """On return all that was created, renamed and unlinked is durable."""
        ...

    def check_trusted(self) -> None:
        """`UntrustedDirectoryError` where other users own the directory or may write it."""
        ...

    def lock(self) -> None:
        """Become the owner, or `LogLockedError` at once; changes no file."""
        ...

    def is_there(self) -> bool:
        """Whether its path still leads here: an open that fails removes what it has made."""
        ...

    def unmake(self) -> None:
        """Remove what opening it has created, as far as that is empty; call it as the owner."""
        ...

    def sign(self, *, new: bool = False) -> None:
        """Leave the owner's pid for those who find the lock taken.

        Args:
          new: the log does not exist yet; what was published of another is gone, durably.
        """
        ...

    def publish(self, durable_lsn: int, epoch: int) -> None:
        """Tell readers in other processes, without durability."""
        ...

    def published(self) -> Word:
        """What an owner last told."""
        ...

    def watch(self) -> Watch | None:
        """Have changes of the directory's files wake a task; None where that cannot be had."""
        ...

    def close(self) -> None: ...


class Files(Protocol):
    """A file system and a clock."""

    threaded: bool
    """Whether its calls block and so belong in a worker thread."""

    def exists(self, path: str) -> bool:
        """Whether anything stands under the path, be it a link that leads nowhere."""
        ...

    def open_directory(self, path: str, *, create: bool = False, follow: bool = True) -> Directory:
        """``follow``: whether the directory itself may be a symbolic link."""
        ...

    def begin_directory(self, path: str) -> str:
        """A new, empty directory next to ``path``, to become that; returns its name.

        Raises:
          FileExistsError: ``path`` exists.
        """
        ...

    def finish_directory(self, temporary: str, path: str) -> None:
        """Give it its name, durably.

        Raises:
          FileExistsError: somebody else has made ``path`` meanwhile.
        """
        ...

    def discard_directory(self, temporary: str) -> None:
        """Remove it with all that it holds, as far as that can be done."""
        ...

    def time_us(self) -> int:
        """UTC, microseconds since 1970-01-01; may jump."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """For the log's UUID and the salts of its segments."""
        ...

    def absolute(self, path: str) -> str:
        """The path, whatever the working directory becomes."""
        ...

    def remove_directories(self, paths: Sequence[str]) -> None:
        """Remove these, one after the other, up to the first that is not empty."""
        ...

    def on_fork(self, callback: Callable[[], None]) -> None:
        """Call a bound method in every forked child, as long as its object lives."""
        ...


def close_quietly(file: File | Directory) -> None:
    """Close what is given up anyway, after an error that must not be hidden."""
    with contextlib.suppress(OSError):
        file.close()


publish(Files)
