"""Descriptors and the disk: what makes bytes durable, what is on the disk, what the cache forgets.

Law: the one place that decides how a sync is made, and what it says is worth.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import struct
import sys
from typing import Final

from trio_wal._util import align_up

FOLIO_MAX: Final = mmap.PAGESIZE**2 // 8
"""At multiples of this no folio of Linux's page cache reaches across: none is larger than what
one page of a page table, with entries of 8 bytes, maps (2 MiB where a page has 4 KiB)."""


def sync_file(fd: int) -> None:
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


def check_journal(fd: int) -> None:
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


def write_back(fd: int, length: int, offset: int) -> None:
    """As `File.write_back`: Linux writes what it is told that nobody needs any more."""
    if sys.platform == "linux":
        # A hint: what it comes to is seen by the sync.
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def sync_directory(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as exc:
        # Some file systems (CIFS, some FUSE) cannot sync a directory and say EINVAL.
        if exc.errno != errno.EINVAL:
            raise
    check_journal(fd)


_FIEMAP: Final = 0xC020660B
_FIEMAP_HEAD: Final = struct.Struct("=QQLLLL")
"""First byte and length asked for, flags, extents that were found, room for extents, reserved."""
_FIEMAP_EXTENT: Final = struct.Struct("=QQQ16xL12x")
"""First byte in the file, place on the disk, length, flags."""
_FIEMAP_PLAIN: Final = 0x0001 | 0x1000
"""An extent's flags that say nothing of its state: that it is the last, that it was put together.
Any other says that it is not on the disk yet, not written, shared, or kept in a special way."""
_FIEMAP_ROOM: Final = 64
_TO_THE_END: Final = (1 << 64) - 1


def written_bytes(fd: int) -> int:
    """As `File.written_bytes`, by Linux's FS_IOC_FIEMAP.

    SEEK_DATA would not do: it calls reserved space data that was read into the page cache.
    """
    end = 0
    if sys.platform == "linux":
        import fcntl

        more = True
        while more:
            found = bytearray(_FIEMAP_HEAD.size + _FIEMAP_ROOM * _FIEMAP_EXTENT.size)
            _FIEMAP_HEAD.pack_into(found, 0, end, _TO_THE_END, 0, 0, _FIEMAP_ROOM, 0)
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


def forget_cached(fd: int, keep: range = range(0)) -> None:
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
            sync_file(fd)
        start = align_up(keep.start, FOLIO_MAX)
        stop = keep.stop - keep.stop % FOLIO_MAX
        if start < stop:
            os.posix_fadvise(fd, 0, start, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(fd, stop, 0, os.POSIX_FADV_DONTNEED)
        else:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
