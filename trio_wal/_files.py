"""Every call to the operating system, behind three small protocols.

Law: `os`, `fcntl` and the clock are used here and nowhere else in the package.
Nothing here knows what a frame is.  All of it blocks and belongs in a worker
thread; `trio_wal.testing` has the same three classes in memory, with faults.

Files are opened with ``O_NOFOLLOW`` and must be regular; they never get the number
of a standard stream, so that a stray ``print`` cannot write into a segment.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from ._disk.frame import crc32c
from ._exceptions import (
    CorruptLogError,
    LogLockedError,
    UntrustedDirectoryError,
    WrongDirectoryError,
)
from ._util import align_up

LOCK_NAME: Final = "lock"
_IOV_MAX: Final = 1024
_PREAD_UNSEEN: Final = 4 << 20
_PID_BYTES: Final = 32
_WORD: Final = struct.Struct("<QQQI")
"""The durable LSN, the same with every bit inverted, the epoch, and a checksum of the three."""
_ALL_BITS: Final = (1 << 64) - 1
_WORD_BARE: Final = 16
"""Bytes of what older versions wrote: without an epoch."""
_COPY_NAME: Final = "spare-copy.tmp"
"""Recovery clears away what has such a name."""
_COPY_BYTES: Final = 1 << 20
FOLIO_MAX: Final = mmap.PAGESIZE**2 // 8
"""At multiples of this no folio of Linux's page cache reaches across: none is larger than what
one page of a page table, with entries of 8 bytes, maps (2 MiB where a page has 4 KiB)."""

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
    """Becomes readable when files of a directory change."""

    def fileno(self) -> int: ...

    def drain(self) -> None:
        """Forget what has changed so far."""
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


# -- the operating system ---------------------------------------------------------

_BINARY: Final[int] = getattr(os, "O_BINARY", 0)
_NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK: Final[int] = getattr(os, "O_NONBLOCK", 0)
_CLOEXEC: Final[int] = getattr(os, "O_CLOEXEC", 0)
_HAS_DIR_FD: Final = (
    sys.platform != "win32" and os.open in os.supports_dir_fd and os.unlink in os.supports_dir_fd
)


def _sync(fd: int) -> None:
    """Make a file's data durable: the one place that decides how.

    fdatasync on Linux.  macOS: F_FULLFSYNC, because fsync there stops at the drive's
    cache (fsync(2)); fsync where the file system has no F_FULLFSYNC, and elsewhere.
    """
    if sys.platform == "darwin":
        import fcntl

        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as exc:
            if exc.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
            os.fsync(fd)
    elif sys.platform == "linux":
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def _check_journal(fd: int) -> None:
    """After a sync that succeeded: an `OSError` where the file system's journal has failed.

    On ext4 a sync says 0 of a file or directory whose change was in a transaction that failed,
    if another sync, of any file and process, was told of the failure (seen on Linux 6.18: the
    transaction counts as committed for everybody who comes later).  The next change of anything
    finds the journal aborted, and from then on the file system says EROFS.  So a time is changed,
    which needs no other sync; and once more, because ext4 does not say whether it was written
    down.  Where bytes were written over others nothing was in a transaction.
    """
    if sys.platform == "linux":
        for _ in range(2):
            # Who may write the file may do that, unless its mode has been changed since.
            with contextlib.suppress(PermissionError):
                os.utime(fd)


_FIEMAP: Final = 0xC020660B
_FIEMAP_HEAD: Final = struct.Struct("=QQLLLL")
"""First byte and length asked for, flags, extents that were found, room for extents, reserved."""
_FIEMAP_EXTENT: Final = struct.Struct("=QQQ16xL12x")
"""First byte in the file, place on the disk, length, flags."""
_FIEMAP_PLAIN: Final = 0x0001 | 0x1000
"""An extent's flags that say nothing of its state: that it is the last, that it was put together.
Any other says that it is not on the disk yet, not written, shared, or kept in a special way."""
_FIEMAP_ROOM: Final = 64


def _written_bytes(fd: int) -> int:
    """As `File.written_bytes`, by Linux's FS_IOC_FIEMAP.

    SEEK_DATA would not do: it calls reserved space data that was read into the page cache.
    """
    end = 0
    if sys.platform == "linux":
        import fcntl

        more = True
        while more:
            found = bytearray(_FIEMAP_HEAD.size + _FIEMAP_ROOM * _FIEMAP_EXTENT.size)
            _FIEMAP_HEAD.pack_into(found, 0, end, _ALL_BITS, 0, 0, _FIEMAP_ROOM, 0)
            try:
                fcntl.ioctl(fd, _FIEMAP, found)
            except OSError:
                # Not every file system can tell.
                break
            count = _FIEMAP_HEAD.unpack_from(found)[3]
            more = count == _FIEMAP_ROOM
            for number in range(count):
                place = _FIEMAP_HEAD.size + number * _FIEMAP_EXTENT.size
                start, _, length, flags = _FIEMAP_EXTENT.unpack_from(found, place)
                if start > end or flags & ~_FIEMAP_PLAIN:
                    return end
                end = start + length
    return end


def _word_in(raw: bytes) -> Word:
    """What stands in a lock file behind the owner's pid."""
    if len(raw) < _WORD_BARE:
        return NO_WORD
    durable_lsn, inverted, epoch, crc = _WORD.unpack(raw.ljust(_WORD.size, b"\0"))
    if durable_lsn ^ _ALL_BITS != inverted:
        return NO_WORD
    whole = len(raw) == _WORD.size and crc32c(raw[:-4]) == crc
    return Word(durable_lsn, epoch if whole else None)


def _above_stdio(fd: int) -> int:
    """The same file under a number above 2."""
    if fd > 2:
        return fd
    if sys.platform != "win32":
        import fcntl

        try:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        finally:
            os.close(fd)
    else:
        raise OSError(errno.EBADF, "standard streams are closed: open them before the log")


class OsFile:
    """A regular file by its descriptor."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd
        self._seek = threading.Lock()

    def pread(self, length: int, offset: int) -> bytes:
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

    def sync(self, *, in_place: bool = False) -> None:
        _sync(self._fd)
        if not in_place:
            _check_journal(self._fd)

    def written_bytes(self) -> int:
        return _written_bytes(self._fd)

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

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


_directories: weakref.WeakSet[OsDirectory] = weakref.WeakSet()
_fork_callbacks: set[weakref.WeakMethod[Callable[[], None]]] = set()


def _after_fork_in_child() -> None:
    for directory in list(_directories):
        directory.disown()
    for reference in list(_fork_callbacks):
        callback = reference()
        if callback is not None:
            callback()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


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
            flags = os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC | (0 if follow else _NOFOLLOW)
            self._fd = _above_stdio(os.open(path, flags))
        _directories.add(self)

    def _where(self, name: str) -> tuple[str, int | None]:
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(f"name must be one of a file in the directory, not {name!r}")
        return (name, self._fd) if _HAS_DIR_FD else (os.path.join(self.path, name), None)

    def names(self) -> list[str]:
        if sys.platform != "win32" and self._fd >= 0 and _HAS_DIR_FD:
            # Through a descriptor of its own: a duplicate of one shares its place in the listing,
            # and two threads that list at once would each miss names, or see them twice.
            fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC, dir_fd=self._fd)
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
        flags |= _BINARY | _NOFOLLOW | _CLOEXEC | _NONBLOCK
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        try:
            fd = _above_stdio(os.open(where, flags, 0o600, dir_fd=dir_fd))
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
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
            _forget_cached(file._fd, keep)
        finally:
            file.close()

    def sync(self) -> None:
        if self._fd >= 0:
            _sync_directory(self._fd)

    # -- ownership --

    def check_trusted(self) -> None:
        if self._fd >= 0:
            _check_trusted(self.path, os.fstat(self._fd))

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
        _remove_directories(made)

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
            self._lock_file.pwrite([bytes(_WORD.size)], _PID_BYTES)
            self._lock_file.sync()
        self._lock_file.pwrite([str(os.getpid()).encode().ljust(_PID_BYTES, b"\n")], 0)

    def _lock_windows(self) -> None:
        if sys.platform == "win32":
            import msvcrt

            where = os.path.join(self.path, LOCK_NAME)
            fd = _above_stdio(os.open(where, os.O_RDWR | os.O_CREAT | _BINARY, 0o600))
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
            return file.pread(_PID_BYTES + _WORD.size, 0)
        finally:
            if file is not self._lock_file:
                file.close()

    def _owner(self) -> int | None:
        """Who holds the lock, where that is certain."""
        digits = self._read_lock_file()[:_PID_BYTES].strip()
        signed = int(digits) if digits.isdigit() and len(digits) < 12 else None
        if sys.platform == "win32":
            # The lock is on the very file that has the text.
            return signed
        else:  # noqa: RET505  (mypy reads what is behind as unreachable there)
            try:
                with open("/proc/locks", "rb") as file:
                    return _lock_holder(file.read(), os.fstat(self._fd), signed)
            except OSError:
                # No Linux.  The text is cleared by a close, but not by a kill.
                path = os.path.join(self.path, LOCK_NAME)
                return signed if signed is not None and _may_own(path, signed) else None

    def publish(self, durable_lsn: int, epoch: int) -> None:
        if self._lock_file is not None:
            word = _WORD.pack(durable_lsn, durable_lsn ^ _ALL_BITS, epoch, 0)[:-4]
            crc = crc32c(word).to_bytes(4, "little")
            self._lock_file.pwrite([word, crc], _PID_BYTES)

    def published(self) -> Word:
        before = self._read_lock_file()[_PID_BYTES:]
        while (word := _word_in(before)).epoch is None:
            # Its owner may be writing it just now; one that names no epoch stands still.
            again = self._read_lock_file()[_PID_BYTES:]
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
                self._lock_file.pwrite([b"\n" * _PID_BYTES], 0)
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


_IN_CHANGES: Final = 0x2 | 0x40 | 0x80 | 0x100 | 0x200
"""Of inotify(7), which the standard library does not have: a file was written, has gone or come
under a name, was created, was unlinked."""
_EVENTS_BYTES: Final = 64 << 10


class _Inotify:
    """A watch on one directory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._fd, _EVENTS_BYTES)) > _EVENTS_BYTES // 2:
                pass

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def watch_directory(fd: int) -> Watch | None:
    """None where the system gives no watch: it has none left for this user, for one."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        try:
            watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            added = -1
            if watch >= 0:
                watch = _above_stdio(watch)
                # By its descriptor: another directory may stand under its path by now.
                added = libc.inotify_add_watch(watch, b"/proc/self/fd/%d" % fd, _IN_CHANGES)
        except AttributeError:
            return None
        if added >= 0:
            return _Inotify(watch)
        if watch >= 0:
            os.close(watch)
    return None


def _forget_cached(fd: int, keep: range = range(0)) -> None:
    """Drop the clean pages of a file from the page cache, but for some of those in ``keep``.

    A page whose write has failed is clean and not on the disk.  On ext4 it stays lost even
    if it is then written again and synced with success, where its block had never been written
    before (seen on Linux 6.18); once it is dropped, writing it again works.

    Linux passes over a page that waits to be written, as a process that was killed leaves
    it: it is written now, or fails now, and either way what is then read is the disk's.  It
    passes over a folio, its unit of caching, that reaches out of the range it is told: so the
    ranges end where no folio can reach across.
    """
    if sys.platform not in ("win32", "darwin"):
        with contextlib.suppress(OSError):
            _sync(fd)
        start = align_up(keep.start, FOLIO_MAX)
        stop = keep.stop - keep.stop % FOLIO_MAX
        if start < stop:
            os.posix_fadvise(fd, 0, start, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(fd, stop, 0, os.POSIX_FADV_DONTNEED)
        else:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as exc:
        # Some file systems (CIFS, some FUSE) cannot sync a directory and say EINVAL.
        if exc.errno != errno.EINVAL:
            raise
    _check_journal(fd)


def _check_trusted(path: str, status: os.stat_result) -> None:
    """As ssh and git do: who may write a directory can put any log there, or take this one away."""
    if sys.platform != "win32":
        me = os.geteuid()
        if status.st_uid not in (me, 0):
            raise UntrustedDirectoryError(
                path,
                f"it belongs to user {status.st_uid}, and this process runs as user {me}",
                f"run as that user, or 'chown {me}' the directory and its files",
            )
        if status.st_mode & 0o022:
            mode = stat.S_IMODE(status.st_mode)
            raise UntrustedDirectoryError(
                path, f"other users may write it (mode {mode:04o})", "'chmod go-w' the directory"
            )


def _may_own(path: str, pid: int) -> bool:
    """Whether there is such a process, and nobody but this user or root wrote its number."""
    if sys.platform != "win32":
        try:
            if pid > 1 and os.stat(path, follow_symlinks=False).st_uid in (os.geteuid(), 0):
                os.kill(pid, 0)
                return True
        except PermissionError:
            return True
        except OSError:
            pass
    return False


def _lock_holder(table: bytes, status: os.stat_result, signed: int | None) -> int | None:
    """The process that has an flock on a file, by Linux's /proc/locks; 0 or less there stands for
    one that is not visible from here (proc(5), and lock_translate_pid in fs/locks.c)."""
    if sys.platform != "win32":
        device = b"%02x:%02x" % (os.major(status.st_dev), os.minor(status.st_dev))
        inode = b"%d" % status.st_ino
        for line in table.splitlines():
            words = line.split()
            if len(words) < 6 or words[1] != b"FLOCK":
                continue
            where, _, number = words[5].rpartition(b":")
            pid = int(words[4])
            # btrfs gives stat another device than the lock has: there the pid must fit.
            if number == inode and pid > 0 and (where == device or pid == signed):
                return pid
    return None


def _remove_directories(paths: Sequence[str]) -> None:
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
        _remove_directories(made[::-1])
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
        parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC)
        name = os.path.basename(path)
        try:
            os.mkdir(name, 0o700, dir_fd=parent_fd)
            made.append(path)
            _make_private(name, path, parent_fd)
            _sync_directory(parent_fd)
        except FileExistsError:
            pass
        finally:
            os.close(parent_fd)


def _make_private(name: str, path: str, parent_fd: int) -> None:
    """Mode 0700 for a directory just made, whatever the umask has taken away."""
    if sys.platform != "win32":
        flags = os.O_RDONLY | os.O_DIRECTORY | _NOFOLLOW | _CLOEXEC
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


def _no_directory(
    path: str, *, follow: bool, link: bool = False
) -> WrongDirectoryError | CorruptLogError:
    """Of a user's path, or of one inside of a database, where nothing else may stand."""
    if not follow:
        return CorruptLogError(path, 0, f"{'a symbolic link and ' if link else ''}not a directory")
    return WrongDirectoryError(path, "not a directory", "a directory's path, or a new one")


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
                raise _no_directory(path, follow=follow, link=stat.S_ISLNK(mode))
            return OsDirectory(os.path.abspath(path), made, follow=follow)
        except OSError as exc:
            _remove_directories(made)
            # ELOOP, or ENOTDIR on Linux: a link has taken its place since.
            if exc.errno == errno.ENOTDIR or (exc.errno == errno.ELOOP and not follow):
                raise _no_directory(path, follow=follow) from exc
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
        _remove_directories(paths)

    def on_fork(self, callback: Callable[[], None]) -> None:
        reference: weakref.WeakMethod[Callable[[], None]] = weakref.WeakMethod(
            callback, _fork_callbacks.discard
        )
        _fork_callbacks.add(reference)


def close_quietly(file: File | Directory) -> None:
    """Close what is given up anyway, after an error that must not be hidden."""
    with contextlib.suppress(OSError):
        file.close()


def system_error(text: str) -> int | None:
    """The errno whose text a library's message ends with; None: it is no error of the system."""
    found = [number for number in errno.errorcode if text.endswith(os.strerror(number))]
    return max(found, key=lambda number: len(os.strerror(number)), default=None)


# -- for the store, whose files LMDB opens by their paths ------------------------------------------


def open_store_directory(path: str) -> OsDirectory:
    """The directory of a store, which must be one itself, and no link to one."""
    return OsFiles().open_directory(path, follow=False)


def plain_size(directory: OsDirectory, name: str) -> int | None:
    """Bytes of a regular file that has one name; None where there is none.

    Raises:
      CorruptLogError: it is something else.  A file with a second name, a hard link, may be
          anybody's, and is written in place.
    """
    where, dir_fd = directory._where(name)
    try:
        found = os.stat(where, dir_fd=dir_fd, follow_symlinks=False)
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
    where, dir_fd = directory._where(name)
    found = os.stat(where, dir_fd=dir_fd, follow_symlinks=False)
    return found.st_dev, found.st_ino


def descriptor(file: OsFile) -> int:
    """For a library that writes a file by its number."""
    return file._fd


def path_below(directory: OsDirectory) -> str:
    """A path by which a library that wants one finds this directory, whatever stands under its
    name by then: Linux has such."""
    by_number = f"/proc/self/fd/{directory._fd}"
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


def begin_directory(path: str) -> str:
    """As `Files.begin_directory`."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "the destination of a backup exists", path)
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
        directory = OsDirectory(temporary, follow=False)
        try:
            os.fchmod(directory._fd, 0o700)
        finally:
            directory.close()
    return temporary


def finish_directory(temporary: str, path: str) -> None:
    """As `Files.finish_directory`."""
    _sync_by_path(temporary)
    try:
        if sys.platform != "win32" and os.path.lexists(path):
            # An empty directory would be replaced.
            raise FileExistsError(errno.EEXIST, "the destination of a backup exists", path)
        os.rename(temporary, path)
    except OSError as exc:
        if exc.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, "the destination of a backup exists", path) from exc
        raise
    _sync_by_path(os.path.dirname(os.path.abspath(path)))


def _sync_by_path(path: str) -> None:
    if sys.platform != "win32":
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC)
        try:
            _sync_directory(fd)
        finally:
            os.close(fd)


def discard_directory(temporary: str) -> None:
    """As `Files.discard_directory`."""
    import shutil

    shutil.rmtree(temporary, ignore_errors=True)


_CRASHES: Final = frozenset({"SIGBUS", "SIGSEGV", "SIGABRT", "SIGFPE", "SIGILL", "SIGTRAP"})
_CHILD: Final = "import sys; sys.path[:] = sys.argv[3:]; from trio_wal import {0}; {0}.{1}()"


class ChildError(Exception):
    """A child process could not do its work; the text says why."""


def run_child(module: str, function: str, *arguments: str) -> tuple[bytes, str]:
    """Call a function of this package in a process of its own.

    Nothing of that process's surroundings decides what it imports: isolated (``-I``), and with
    the absolute entries of this process's path.  The function finds the arguments in
    ``sys.argv[1:3]``.

    Returns what it wrote to standard output, and the name of the signal that ended it where
    that tells of a crash.

    Raises:
      ChildError: it could not be started, or ended as it should not.
    """
    import signal
    import subprocess

    if not sys.executable or getattr(sys, "frozen", False):
        raise ChildError("there is no Python interpreter to start")
    path = [entry for entry in sys.path if os.path.isabs(entry)]
    given = [*arguments, "", ""][:2]
    command = [sys.executable, "-I", "-c", _CHILD.format(module, function), *given, *path]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except (OSError, subprocess.SubprocessError, MemoryError) as exc:
        raise ChildError(f"a child process cannot be started: {exc}") from exc
    if done.returncode == 0:
        return done.stdout, ""
    name = f"exit code {done.returncode}"
    if done.returncode < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-done.returncode).name
    elif done.returncode & 0xFFFFFFF0 == 0xC0000000:
        # Windows: an access violation, or a page that cannot be read.
        return b"", f"{done.returncode:#x}"
    if name in _CRASHES:
        return b"", name
    last = done.stderr.decode(errors="backslashreplace").strip().splitlines()[-1:]
    raise ChildError(f"the child process ended with {': '.join([name, *last])}")
