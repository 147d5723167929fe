"""Whose directory this is: whether it is to be trusted, who has its lock, and the lock file's text.

Law: reads and judges; who takes the lock is `files`.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
from typing import Final

from trio_wal._disk.frame import crc32c
from trio_wal._exceptions import UntrustedDirectoryError
from trio_wal._files import NO_WORD, Word

PID_BYTES: Final = 32
_WORD: Final = struct.Struct("<QQQI")
"""The durable LSN, the same with every bit inverted, the epoch, and a checksum of the three."""
WORD_BYTES: Final = _WORD.size
_ALL_BITS: Final = (1 << 64) - 1
_WORD_BARE: Final = 16
"""Bytes of what older versions wrote: without an epoch."""


def word_in(raw: bytes) -> Word:
    """What stands in a lock file behind the owner's pid."""
    if len(raw) < _WORD_BARE:
        return NO_WORD
    durable_lsn, inverted, epoch, crc = _WORD.unpack(raw.ljust(_WORD.size, b"\0"))
    if durable_lsn ^ _ALL_BITS != inverted:
        return NO_WORD
    whole = len(raw) == _WORD.size and crc32c(raw[:-4]) == crc
    return Word(durable_lsn, epoch if whole else None)


def encode_word(durable_lsn: int, epoch: int) -> list[bytes]:
    """What an owner leaves in the lock file behind its pid."""
    word = _WORD.pack(durable_lsn, durable_lsn ^ _ALL_BITS, epoch, 0)[:-4]
    return [word, crc32c(word).to_bytes(4, "little")]


def check_trusted(path: str, status: os.stat_result) -> None:
    """As ssh and git do: who may write a directory can put any log there, or take this one away."""
    if sys.platform != "win32":
        me = os.geteuid()
        if status.st_uid not in (me, 0):
            raise UntrustedDirectoryError(
                path,
                f"it belongs to user {status.st_uid}, and this process runs as user {me}",
                f"run as that user, or run 'chown {me}' on the directory and its files",
            )
        if status.st_mode & 0o022:
            mode = stat.S_IMODE(status.st_mode)
            raise UntrustedDirectoryError(
                path,
                f"other users may write to it (mode {mode:04o})",
                "run 'chmod go-w' on the directory",
            )


def may_own(path: str, pid: int) -> bool:
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


def lock_holder(table: bytes, status: os.stat_result, signed: int | None) -> int | None:
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
