"""Directories by their paths: made, named and removed.

Law: what is made has mode 0700 whatever the umask, and is durable; nothing is followed that
somebody may have put in the place of what was just made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Sequence

from trio_wal._exceptions import CorruptLogError, UntrustedDirectoryError, WrongDirectoryError

from .descriptors import CLOEXEC, NOFOLLOW
from .sync import sync_directory


def remove_directories(paths: Sequence[str]) -> None:
    with contextlib.suppress(OSError):
        for path in paths:
            os.rmdir(path)


def make_directory(path: str) -> tuple[str, ...]:
    """Create the directory with mode 0700 whatever the umask, missing parents with it,
    and make every new entry durable; returns what was created, innermost first."""
    path = os.path.abspath(path)
    made: list[str] = []
    try:
        while not os.path.isdir(path):
            try:
                _make_directories(path, made)
            except FileNotFoundError:
                # Another open failed, and has removed a parent that it had made.
                if os.path.isdir(os.path.dirname(path)):
                    continue
                raise
            break
    except BaseException:
        remove_directories(made[::-1])
        raise
    return tuple(made[::-1])


def _make_directories(path: str, made: list[str]) -> None:
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        _make_directories(parent, made)
    if sys.platform == "win32":
        with contextlib.suppress(FileExistsError):
            os.mkdir(path)
            made.append(path)
    else:
        # By its name below the parent's descriptor, and never through a link: who may write the
        # parent could put something else in its place between two calls.
        parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | CLOEXEC)
        name = os.path.basename(path)
        try:
            os.mkdir(name, 0o700, dir_fd=parent_fd)
            made.append(path)
            _make_private(name, path, parent_fd)
            sync_directory(parent_fd)
        except FileExistsError:
            pass
        finally:
            os.close(parent_fd)


def _make_private(name: str, path: str, parent_fd: int) -> None:
    """Mode 0700 for a directory just made, whatever the umask has taken away."""
    if sys.platform != "win32":
        flags = os.O_RDONLY | os.O_DIRECTORY | NOFOLLOW | CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=parent_fd)
        except PermissionError:
            # The umask has taken even its owner's rights.
            os.chmod(name, 0o700, dir_fd=parent_fd, follow_symlinks=False)
            fd = os.open(name, flags, dir_fd=parent_fd)
        try:
            status = os.fstat(fd)
            to_do = stat.S_IMODE(status.st_mode) & 0o777 != 0o700
            if status.st_uid != os.geteuid() or (to_do and os.listdir(fd)):
                raise UntrustedDirectoryError(
                    path,
                    "another directory was put in the place of the one just made",
                    "see who may write its parent",
                )
            if to_do:
                os.fchmod(fd, 0o700)
        finally:
            os.close(fd)


def no_directory(
    path: str, *, follow: bool, link: bool = False
) -> WrongDirectoryError | CorruptLogError:
    """Of a user's path, or of one inside of a database, where nothing else may stand."""
    if not follow:
        return CorruptLogError(path, 0, f"{'a symbolic link and ' if link else ''}not a directory")
    return WrongDirectoryError(path, "not a directory", "a directory's path, or a new one")


def begin_directory(path: str) -> str:
    """As `Files.begin_directory`."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "the destination of the backup already exists", path)
    whole = os.path.abspath(path)
    make_directory(os.path.dirname(whole))
    while True:
        temporary = f"{whole}.{os.urandom(6).hex()}.tmp"
        try:
            os.mkdir(temporary, 0o700)
        except FileExistsError:
            continue
        break
    if sys.platform != "win32":
        fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | NOFOLLOW | CLOEXEC)
        try:
            os.fchmod(fd, 0o700)
        finally:
            os.close(fd)
    return temporary


def finish_directory(temporary: str, path: str) -> None:
    """As `Files.finish_directory`."""
    sync_by_path(temporary)
    move_aside(temporary, path)


def move_aside(path: str, dest: str) -> None:
    """Whatever stands there, as it is, be it a file or a link that leads nowhere."""
    try:
        if sys.platform != "win32" and os.path.lexists(dest):
            # An empty directory would be replaced.
            raise FileExistsError(
                errno.EEXIST, "the destination of the backup already exists", dest
            )
        os.rename(path, dest)
    except OSError as exc:
        if exc.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(
                errno.EEXIST, "the destination of the backup already exists", dest
            ) from exc
        raise
    sync_by_path(os.path.dirname(os.path.abspath(dest)))


def sync_by_path(path: str) -> None:
    if sys.platform != "win32":
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | CLOEXEC)
        try:
            sync_directory(fd)
        finally:
            os.close(fd)


def discard_directory(temporary: str) -> None:
    """As `Files.discard_directory`."""
    import shutil

    shutil.rmtree(temporary, ignore_errors=True)
