"""Files and directories of the operating system, by their descriptors.

Law: files are opened with ``O_NOFOLLOW`` and must be regular.  A directory that is renamed, or
replaced by another, is still the one that was opened.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Final, cast

from trio_wal._exceptions import CorruptLogError, LogLockedError
from trio_wal._files import LOCK_NAME, NO_WORD, Watch, Word, close_quietly

from .descriptors import BINARY, CLOEXEC, HAS_DIR_FD, NOFOLLOW, NONBLOCK, above_stdio
from .owner import PID_BYTES, WORD_BYTES, check_trusted, encode_word, lock_holder, may_own, word_in
from .paths import (
    begin_directory,
    discard_directory,
    finish_directory,
    make_directory,
    no_directory,
    remove_directories,
)
from .sync import (
    check_journal,
    forget_cached,
    sync_directory,
    sync_file,
    write_back,
    written_bytes,
)
from .watch import watch_directory

_IOV_MAX: Final = 1024
OFFSET_MAX: Final = 1 << 62
"""Beyond what any file system has."""
_PREAD_UNSEEN: Final = 4 << 20
_COPY_NAME: Final = "spare-copy.tmp"
"""Recovery clears away what has such a name."""
_COPY_BYTES: Final = 1 << 20
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})
"""What a file system says that has no hard links."""


class OsFile:
    """A regular file by its descriptor."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._seek = threading.Lock()

    def pread(self, length: int, offset: int) -> bytes:
        if offset > OFFSET_MAX:
            # As behind any end; the system call takes no such number.  A forged file has them.
            return b""
        if length > _PREAD_UNSEEN:
            # The system call takes memory for all of it, be the file as short as it may.
            length = max(0, min(length, self.size() - offset))
        data = self._pread(length, offset)
        if len(data) == length or not data:
            return data
        pieces = [data]
        got = len(data)
        while got < length:
            data = self._pread(length - got, offset + got)
            if not data:
                break
            pieces.append(data)
            got += len(data)
        return b"".join(pieces)

    def next_data(self, offset: int) -> int:
        if sys.platform != "win32":
            try:
                # The descriptor's own position is used by nobody.
                return os.lseek(self._fd, offset, os.SEEK_DATA)
            except AttributeError:
                # Not every system that Python runs on has it.
                pass
            except OSError as exc:
                if exc.errno == errno.ENXIO:
                    # There is nothing more.
                    return max(offset, self.size())
        return offset

    def pwrite(self, pieces: Sequence[bytes], offset: int) -> None:
        total = sum(map(len, pieces))
        written = self._pwrite(pieces, offset)
        if written != total:
            self._pwrite_rest(pieces, offset, written)

    def _pwrite_rest(self, pieces: Sequence[bytes], offset: int, written: int) -> None:
        """Go on after a short write, which is not an error yet."""
        rest = memoryview(b"".join(pieces))
        while written < len(rest):
            step = self._pwrite([bytes(rest[written : written + (1 << 20)])], offset + written)
            if step <= 0:
                raise OSError(errno.EIO, "the file takes no more bytes", self.path)
            written += step

    if sys.platform == "win32":

        def _pread(self, length: int, offset: int) -> bytes:
            with self._seek:
                os.lseek(self._fd, offset, os.SEEK_SET)
                return os.read(self._fd, length)

        def _pwrite(self, pieces: Sequence[bytes], offset: int) -> int:
            with self._seek:
                os.lseek(self._fd, offset, os.SEEK_SET)
                return os.write(self._fd, b"".join(pieces))

    else:

        def _pread(self, length: int, offset: int) -> bytes:
            return os.pread(self._fd, length, offset)

        def _pwrite(self, pieces: Sequence[bytes], offset: int) -> int:
            if len(pieces) > _IOV_MAX:
                pieces = [b"".join(pieces)]
            return os.pwritev(self._fd, pieces, offset)

    def write_back(self, length: int, offset: int) -> None:
        write_back(self._fd, length, offset)

    def sync(self, *, in_place: bool = False) -> None:
        sync_file(self._fd)
        if not in_place:
            check_journal(self._fd)

    def written_bytes(self) -> int:
        return written_bytes(self._fd)

    def allocate(self, size: int) -> None:
        have = os.fstat(self._fd).st_size
        if size <= have:
            return
        if sys.platform not in ("win32", "darwin"):
            try:
                os.posix_fallocate(self._fd, have, size - have)
            except OSError as exc:
                if exc.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
            else:
                return
        zeros = bytes(min(size - have, 1 << 20))
        for offset in range(have, size, len(zeros)):
            self.pwrite([zeros[: size - offset]], offset)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def fileno(self) -> int:
        """For a library that writes the file by its number."""
        return self._fd

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class WeakMethods:
    """Methods of objects, for as long as those live elsewhere.

    Unlike `weakref.WeakSet` and `weakref.WeakMethod`, nothing that is written in Python runs when
    one dies.  Objects die in garbage collections, and a Ctrl-C that arrives during one is looked at
    by the first line of Python after it: if that were ours, its KeyboardInterrupt would be printed
    as ignored there, and the program would go on.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[object], Callable[..., None]]] = {}
        self._numbers = itertools.count()

    def add(self, method: Callable[[], None]) -> None:
        bound = cast(MethodType, method)
        number = next(self._numbers)
        # pop(number, reference): the second one is what it gives where the first is not there.
        forget: Callable[[object], object] = partial(self._found.pop, number)
        self._found[number] = weakref.ref(bound.__self__, forget), bound.__func__

    def call(self) -> None:
        """All of them, in the order in which they were added."""
        for reference, function in list(self._found.values()):
            owner = reference()
            if owner is not None:
                function(owner)

    def __len__(self) -> int:
        return len(self._found)


_directories: Final = WeakMethods()
_fork_callbacks: Final = WeakMethods()


def _after_fork_in_child() -> None:
    _directories.call()
    _fork_callbacks.call()


def on_every_fork(callback: Callable[[], None]) -> None:
    """Have a function called in every forked child, until the process ends: for what a module
    keeps.  Where there is no fork nothing is done."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=callback)


on_every_fork(_after_fork_in_child)


class OsDirectory:
    """A directory by its descriptor, where the platform has such: renaming it, or
    putting another in its place, does not redirect what an open log writes.

    The lock is an flock on the directory itself: no lock file that somebody could
    unlink.  It goes away with the process, however that ends.
    """

    def __init__(self, path: str, made: tuple[str, ...] = (), *, follow: bool = True) -> None:
        self.path = path
        self.made = made
        self._fd = -1
        self._lock_file: OsFile | None = None
        self._windows_lock: int = -1
        if sys.platform != "win32":
            flags = os.O_RDONLY | os.O_DIRECTORY | CLOEXEC | (0 if follow else NOFOLLOW)
            self._fd = above_stdio(os.open(path, flags))
        _directories.add(self.disown)

    def _where(self, name: str) -> tuple[str, int | None]:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(f"name must be one of a file in the directory, not {name!r}")
        return (name, self._fd) if HAS_DIR_FD else (os.path.join(self.path, name), None)

    def fileno(self) -> int:
        """For what finds the directory by its descriptor."""
        return self._fd

    def status(self, name: str) -> os.stat_result:
        """Of a file of this directory, or of the link that stands there."""
        where, dir_fd = self._where(name)
        return os.stat(where, dir_fd=dir_fd, follow_symlinks=False)

    def names(self) -> list[str]:
        if sys.platform != "win32" and self._fd >= 0 and HAS_DIR_FD:
            # Through a descriptor of its own: a duplicate of one shares its place in the listing,
            # and two threads that list at once would each miss names, or see them twice.
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | CLOEXEC, dir_fd=self._fd)
            try:
                return sorted(os.listdir(fd))
            finally:
                os.close(fd)
        return sorted(os.listdir(self.path))

    def open(self, name: str, *, create: bool = False, writable: bool = False) -> OsFile:
        where, dir_fd = self._where(name)
        path = os.path.join(self.path, name)
        flags = os.O_RDWR if writable or create else os.O_RDONLY
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        flags |= BINARY | NOFOLLOW | CLOEXEC | NONBLOCK
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        try:
            fd = above_stdio(os.open(where, flags, 0o600, dir_fd=dir_fd))
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):
                raise CorruptLogError(path, 0, "not a regular file") from exc
            exc.filename = path
            raise
        file = OsFile(path, fd)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptLogError(path, 0, "not a regular file")
            if sys.platform != "win32":
                if create:
                    os.fchmod(fd, 0o600)
                elif writable and status.st_nlink > 1:
                    return self._break_link(name, file)
        except BaseException:
            file.close()
            raise
        return file

    def _break_link(self, name: str, file: OsFile) -> OsFile:
        """A file that has another name gets a copy in its place: whoever made the hard link,
        such as ``cp -al`` for a backup, shall not see what is written from now on."""
        copy = self.open(_COPY_NAME, create=True)
        try:
            size = file.size()
            for offset in range(0, size, _COPY_BYTES):
                copy.pwrite([file.pread(min(_COPY_BYTES, size - offset), offset)], offset)
            copy.sync()
            self.rename(_COPY_NAME, name)
            self.sync()
        except BaseException:
            close_quietly(copy)
            with contextlib.suppress(OSError):
                self.unlink(_COPY_NAME)
            raise
        file.close()
        copy.path = file.path
        return copy

    def rename(self, old: str, new: str) -> None:
        old_where, dir_fd = self._where(old)
        new_where, _ = self._where(new)
        try:
            os.replace(old_where, new_where, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        except OSError as exc:
            exc.filename = os.path.join(self.path, old)
            exc.filename2 = os.path.join(self.path, new)
            raise

    def rename_new(self, old: str, new: str) -> None:
        old_where, dir_fd = self._where(old)
        new_where, _ = self._where(new)
        try:
            if sys.platform == "win32":
                os.rename(old_where, new_where)
            else:
                try:
                    os.link(old_where, new_where, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
                except OSError as exc:
                    if exc.errno not in _NO_LINKS:
                        raise
                    # A file system without links: as well as it can be had there.
                    if new in self.names():
                        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from exc
                    os.replace(old_where, new_where, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
                else:
                    os.unlink(old_where, dir_fd=dir_fd)
        except OSError as exc:
            exc.filename = os.path.join(self.path, old)
            exc.filename2 = os.path.join(self.path, new)
            raise

    def unlink(self, name: str) -> None:
        where, dir_fd = self._where(name)
        try:
            os.unlink(where, dir_fd=dir_fd)
        except OSError as exc:
            exc.filename = os.path.join(self.path, name)
            raise

    def reread(self, name: str, keep: range = range(0)) -> None:
        file = self.open(name)
        try:
            forget_cached(file.fileno(), keep)
        finally:
            file.close()

    def sync(self) -> None:
        if self._fd >= 0:
            sync_directory(self._fd)

    # -- ownership --

    def check_trusted(self) -> None:
        if self._fd >= 0:
            check_trusted(self.path, os.fstat(self._fd))

    def is_there(self) -> bool:
        if self._fd < 0:
            return True
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def unmake(self) -> None:
        made, self.made = self.made, ()
        if sys.platform == "win32" and self._windows_lock >= 0:
            # The lock is on a file, and a file that is open cannot be removed.
            self.close()
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.path, LOCK_NAME))
        remove_directories(made)

    def lock(self) -> None:
        if sys.platform == "win32":
            self._lock_windows()
        else:
            import fcntl

            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                if exc.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise LogLockedError(self.path, self._owner()) from exc
                raise

    def sign(self, *, new: bool = False) -> None:
        try:
            self._lock_file = self.open(LOCK_NAME, writable=True)
        except FileNotFoundError:
            self._lock_file = self.open(LOCK_NAME, create=True)
        if new and self.published() != NO_WORD:
            self._lock_file.pwrite([bytes(WORD_BYTES)], PID_BYTES)
            self._lock_file.sync()
        self._lock_file.pwrite([str(os.getpid()).encode().ljust(PID_BYTES, b"\n")], 0)

    def _lock_windows(self) -> None:
        if sys.platform == "win32":
            import msvcrt

            where = os.path.join(self.path, LOCK_NAME)
            fd = above_stdio(os.open(where, os.O_RDWR | os.O_CREAT | BINARY, 0o600))
            try:
                # A byte far behind the text, so that others can read the owner's pid.
                os.lseek(fd, 1 << 20, os.SEEK_SET)
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            except OSError as exc:
                os.close(fd)
                raise LogLockedError(self.path, self._owner()) from exc
            self._windows_lock = fd

    def _read_lock_file(self) -> bytes:
        try:
            file = self._lock_file or self.open(LOCK_NAME)
        except (OSError, CorruptLogError):
            return b""
        try:
            return file.pread(PID_BYTES + WORD_BYTES, 0)
        finally:
            if file is not self._lock_file:
                file.close()

    def _owner(self) -> int | None:
        """Who holds the lock, where that is certain."""
        digits = self._read_lock_file()[:PID_BYTES].strip()
        signed = int(digits) if digits.isdigit() and len(digits) < 12 else None
        if sys.platform == "win32":
            # The lock is on the very file that has the text.
            return signed
        else:  # noqa: RET505  (mypy reads what is behind as unreachable there)
            try:
                with open("/proc/locks", "rb") as file:
                    return lock_holder(file.read(), os.fstat(self._fd), signed)
            except OSError:
                # No Linux.  The text is cleared by a close, but not by a kill.
                path = os.path.join(self.path, LOCK_NAME)
                return signed if signed is not None and may_own(path, signed) else None

    def publish(self, durable_lsn: int, epoch: int) -> None:
        if self._lock_file is not None:
            self._lock_file.pwrite(encode_word(durable_lsn, epoch), PID_BYTES)

    def published(self) -> Word:
        before = self._read_lock_file()[PID_BYTES:]
        while (word := word_in(before)).epoch is None:
            # Its owner may be writing it just now; one that names no epoch stands still.
            again = self._read_lock_file()[PID_BYTES:]
            if again == before:
                break
            before = again
        return word

    def watch(self) -> Watch | None:
        return watch_directory(self._fd)

    def disown(self) -> None:
        """In a forked child: let go of the descriptors, so that the lock is the parent's
        alone, without unlocking it for the parent."""
        self._close()

    def close(self) -> None:
        if self._lock_file is not None:
            # Whoever has this number next is not the owner.
            with contextlib.suppress(OSError):
                self._lock_file.pwrite([b"\n" * PID_BYTES], 0)
        self._close()

    def _close(self) -> None:
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        fd, self._windows_lock = self._windows_lock, -1
        if fd >= 0:
            os.close(fd)


class OsFiles:
    """The real file system and the real clock."""

    threaded = True

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def open_directory(
        self, path: str, *, create: bool = False, follow: bool = True
    ) -> OsDirectory:
        made: tuple[str, ...] = ()
        if create and not os.path.lexists(path):
            made = make_directory(path)
        try:
            mode = os.stat(path, follow_symlinks=follow).st_mode
            if not stat.S_ISDIR(mode):
                raise no_directory(path, follow=follow, link=stat.S_ISLNK(mode))
            return OsDirectory(os.path.abspath(path), made, follow=follow)
        except OSError as exc:
            remove_directories(made)
            # ELOOP, or ENOTDIR on Linux: a link has taken its place since.
            if exc.errno == errno.ENOTDIR or (exc.errno == errno.ELOOP and not follow):
                raise no_directory(path, follow=follow) from exc
            raise

    def begin_directory(self, path: str) -> str:
        return begin_directory(path)

    def finish_directory(self, temporary: str, path: str) -> None:
        finish_directory(temporary, path)

    def discard_directory(self, temporary: str) -> None:
        discard_directory(temporary)

    def time_us(self) -> int:
        return time.time_ns() // 1000

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)

    def absolute(self, path: str) -> str:
        return os.path.abspath(path)

    def remove_directories(self, paths: Sequence[str]) -> None:
        remove_directories(paths)

    def on_fork(self, callback: Callable[[], None]) -> None:
        _fork_callbacks.add(callback)
