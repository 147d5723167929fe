"""What the store asks of the system: LMDB opens its files by their paths.

Law: nothing is opened, read or removed before it was seen to be what it should be.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys

from trio_wal._exceptions import CorruptLogError
from trio_wal._files import NO_SPACE

from .files import OsDirectory, OsFiles


def system_error(text: str) -> int | None:
    """The errno whose text a library's message ends with; None: it is no error of the system."""
    found = [number for number in errno.errorcode if text.endswith(os.strerror(number))]
    return max(found, key=lambda number: len(os.strerror(number)), default=None)


def open_store_directory(path: str) -> OsDirectory:
    """The directory of a store, which must be one itself, and no link to one."""
    return OsFiles().open_directory(path, follow=False)


def plain_size(directory: OsDirectory, name: str) -> int | None:
    """Bytes of a regular file that has one name; None where there is none.

    Raises:
      CorruptLogError: it is something else.  A file with a second name, a hard link, may be
          anybody's, and is written in place.
    """
    try:
        found = directory.status(name)
    except FileNotFoundError:
        return None
    path = os.path.join(directory.path, name)
    if not stat.S_ISREG(found.st_mode):
        raise CorruptLogError(path, 0, "not a regular file")
    if found.st_nlink > 1:
        raise CorruptLogError(
            path, 0, f"not a regular file of its own: it has {found.st_nlink} names (hard links)"
        )
    return found.st_size


def identity(directory: OsDirectory, name: str) -> tuple[int, int]:
    """Tells a file from any other that takes its place."""
    found = directory.status(name)
    return found.st_dev, found.st_ino


def path_below(directory: OsDirectory) -> str:
    """A path by which a library that wants one finds this directory, whatever stands under its
    name by then: Linux has such."""
    by_number = f"/proc/self/fd/{directory.fileno()}"
    if sys.platform == "linux" and os.path.isdir(by_number):
        return by_number
    return directory.path


def leave_mark(directory: OsDirectory, name: str, room: int = 0) -> OSError | None:
    """An empty file that later processes on this running system will see; not durable, and it
    need not be: what it warns of is in the page cache, and goes away with that.

    Returns why there is no room on the disk for so many bytes, where there is none.  They are
    asked for in the file that is made here, which nobody else can have put there.
    """
    try:
        file = directory.open(name, create=True)
        try:
            file.allocate(room)
        finally:
            try:
                if file.size():
                    file.truncate(0)
            finally:
                file.close()
    except OSError as exc:
        return exc if exc.errno in NO_SPACE else None
    return None


def remove_file(directory: OsDirectory, name: str) -> None:
    with contextlib.suppress(OSError):
        directory.unlink(name)
