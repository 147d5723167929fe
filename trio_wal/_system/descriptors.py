"""Descriptors: how they are opened, and that none has the number of a standard stream.

Law: a stray ``print`` must not write into a segment.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Final

BINARY: Final[int] = getattr(os, "O_BINARY", 0)
NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
NONBLOCK: Final[int] = getattr(os, "O_NONBLOCK", 0)
CLOEXEC: Final[int] = getattr(os, "O_CLOEXEC", 0)
HAS_DIR_FD: Final = (
    sys.platform != "win32" and os.open in os.supports_dir_fd and os.unlink in os.supports_dir_fd
)


def above_stdio(fd: int) -> int:
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
