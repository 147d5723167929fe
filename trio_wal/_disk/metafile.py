"""``log.meta`` of an open log: what it says, and a place for what it will say next.

Law: blocking; no trio.  It is replaced by whoever has `MetaFile.deciding`, whole or not at all.
Its next block is reserved ahead, because on a full disk dropping segments is the way out.
"""

from __future__ import annotations

import contextlib
import threading

from msgspec.structs import replace

from trio_wal._exceptions import LogFullError
from trio_wal._files import NO_SPACE, Directory

from .chain import META_NEW_NAME, read_meta
from .frame import BLOCK, Meta
from .repair import reserve_meta, write_meta


class MetaFile:
    """Args:
    says: what stands in it.
    """

    def __init__(self, directory: Directory, says: Meta) -> None:
        self.says: Meta = says
        """What the open log goes by: `write` does not change it."""
        self.deciding = threading.Lock()
        """Held while what the log is made of is being changed."""
        self._directory = directory
        self._reserved = False

    def write(self, meta: Meta) -> None:
        """Raises `LogFullError`, with nothing changed, where even that has no place."""
        reserved = self.take_reserved()
        try:
            write_meta(self._directory, meta, reserved=reserved)
        except OSError as exc:
            # Only the sync of its new name may have failed: then it is in place already.
            if exc.errno in NO_SPACE and read_meta(self._directory) == self.says:
                path = self._directory.path
                raise LogFullError(path, BLOCK, "log.meta cannot be written") from exc
            raise

    def admit_consumers(self) -> None:
        """From here on transactions may move places of consumers: versions that do not know it
        must refuse the log.  Durable on return.

        Raises:
          LogFullError, OSError: as `write`.
        """
        with self.deciding:
            if not self.says.consumers:
                meta = replace(self.says, consumers=True)
                self.write(meta)
                self.says = meta
                self.reserve()

    def settle(self) -> None:
        """Wait for whoever drops segments now, and may not have looked at the newest holds."""
        with self.deciding:
            pass

    def reserve(self) -> None:
        """Keep the space for the next one, as far as there is space."""
        if not self._reserved:
            with contextlib.suppress(OSError):
                reserve_meta(self._directory, len(self.says.encode()))
                self._reserved = True

    def reserve_unless_deciding(self) -> None:
        if self.deciding.acquire(blocking=False):
            # Else whoever truncates reserves it himself.
            try:
                self.reserve()
            finally:
                self.deciding.release()

    def take_reserved(self) -> bool:
        """Whether there is such a file, which from here on is the caller's."""
        reserved, self._reserved = self._reserved, False
        return reserved

    def discard(self) -> None:
        """Remove it; where that cannot be, the next open does."""
        if self.take_reserved():
            with contextlib.suppress(OSError):
                self._directory.unlink(META_NEW_NAME)

    def disown(self) -> None:
        """In a forked child: the parent's threads may have had the lock, and are not there."""
        self.deciding = threading.Lock()
