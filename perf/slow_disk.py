"""A disk as slow as one likes: real files whose sync takes a given time, and no longer.

Law: what a sync costs is the only thing simulated.  The time passes in the log's worker
thread, where a sync's would, so that the event loop runs on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import attrs

from trio_wal._system.files import OsFiles


@attrs.define
class Speed:
    """May be changed while the log is open."""

    sync_seconds: float
    byte_seconds: float = 0.0
    """For each byte written since the sync before."""


class _File:
    def __init__(self, file: Any, speed: Speed) -> None:
        self._file = file
        self._speed = speed
        self._bytes = 0

    def pwrite(self, pieces: Sequence[bytes], offset: int) -> None:
        self._file.pwrite(pieces, offset)
        self._bytes += sum(map(len, pieces))

    def sync(self, *, in_place: bool = False) -> None:
        size, self._bytes = self._bytes, 0
        time.sleep(self._speed.sync_seconds + size * self._speed.byte_seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Directory:
    def __init__(self, directory: Any, speed: Speed) -> None:
        self._directory = directory
        self._speed = speed

    def open(self, name: str, **how: Any) -> Any:
        return _File(self._directory.open(name, **how), self._speed)

    def sync(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._directory, name)


class SlowFiles(OsFiles):
    """Files for ``open_wal(files=...)``."""

    def __init__(self, speed: Speed) -> None:
        super().__init__()
        self.speed = speed

    def open_directory(self, path: str, **how: Any) -> Any:
        return _Directory(super().open_directory(path, **how), self.speed)
