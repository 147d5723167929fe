"""A watch on a log's directory: inotify.

Law: tells that something has changed, never what.

Not every write is told of.  An owner writes a frame, syncs it, and then says in the lock file what
is durable: only that is news to anybody, and each event costs the owner some 2 us for everybody
who watches.  So the writes that count are those to the lock file; of other files it is told that
they come, go, or are closed after they were written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import sys
from collections.abc import Callable
from typing import Final

from trio_wal._files import LOCK_NAME, Watch

from .descriptors import above_stdio

_IN_CHANGES: Final = 0x8 | 0x40 | 0x80 | 0x100 | 0x200
"""Of inotify(7), which the standard library does not have: a file was closed that could be written,
has gone or come under a name, was created, was unlinked."""
_IN_WORD: Final = 0x2 | 0x02000000
"""It was written; symbolic links are not followed."""
_EVENT: Final = struct.Struct("iIII")
"""Which watch, what, which of several events belong together, and how long the name is that comes
after it."""
_LOST: Final = -1
"""In the place of a watch: there were too many events to be kept."""
_EVENTS_BYTES: Final = 64 << 10


class _Inotify:
    """A watch on one directory, and on the lock file in it."""

    def __init__(self, fd: int, directory: int, watch_word: Callable[[], bool]) -> None:
        self._fd = fd
        self._directory = directory
        """What events of it are called."""
        self._watch_word = watch_word

    def fileno(self) -> int:
        return self._fd

    def drain(self) -> bool:
        events = b""
        with contextlib.suppress(BlockingIOError):
            while len(read := os.read(self._fd, _EVENTS_BYTES)) > _EVENTS_BYTES // 2:
                events += read
            events += read
        if not _watches_in(events).isdisjoint((self._directory, _LOST)):
            # Another lock file may have come.  If it cannot be watched, whoever waits looks once
            # a second, and sees that he was not told.
            self._watch_word()
        return bool(events)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _watches_in(events: bytes) -> set[int]:
    """Of which watches they are."""
    found, at = set[int](), 0
    while at < len(events):
        watch, _, _, name_bytes = _EVENT.unpack_from(events, at)
        found.add(watch)
        at += _EVENT.size + name_bytes
    return found


def watch_directory(fd: int) -> Watch | None:
    """None where the system gives no watch: it has none left for this user, for one."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        # By its descriptor: another directory may stand under its path by now.
        path = b"/proc/self/fd/%d" % fd
        watch = -1

        def watch_word() -> bool:
            word = b"%s/%s" % (path, LOCK_NAME.encode())
            if libc.inotify_add_watch(watch, word, _IN_WORD) >= 0:
                return True
            # A log that nobody has ever opened to write has none.
            return ctypes.get_errno() == errno.ENOENT

        try:
            watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            added = -1
            if watch >= 0:
                watch = above_stdio(watch)
                added = libc.inotify_add_watch(watch, path, _IN_CHANGES)
        except AttributeError:
            return None
        if added >= 0 and watch_word():
            return _Inotify(watch, added, watch_word)
        if watch >= 0:
            os.close(watch)
    return None
