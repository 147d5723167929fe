"""A watch on a directory: inotify.

Law: tells that something has changed, never what.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Final

from trio_wal._files import Watch

from .descriptors import above_stdio

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
                watch = above_stdio(watch)
                # By its descriptor: another directory may stand under its path by now.
                added = libc.inotify_add_watch(watch, b"/proc/self/fd/%d" % fd, _IN_CHANGES)
        except AttributeError:
            return None
        if added >= 0:
            return _Inotify(watch)
        if watch >= 0:
            os.close(watch)
    return None
