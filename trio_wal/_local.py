"""The log that this process has open, as something that can be read.

Law: what is durable is the flusher's word; where it stands, the directory's.
"""

from __future__ import annotations

from typing import final

from ._disk.chain import look_at
from ._disk.cursor import Moved, Place, place_in
from ._disk.directory import LogDirectory
from ._disk.frame import SegmentHeader
from ._exceptions import CorruptLogError
from ._files import close_quietly
from ._flusher import Flusher
from ._identity import History
from ._queue import State, WriteQueue
from ._stream import Reading
from ._worker import Blocking


@final
class LocalSource:
    """A `_stream.Source`."""

    def __init__(
        self, directory: LogDirectory, flusher: Flusher, queue: WriteQueue, blocking: Blocking
    ) -> None:
        self.path: str = directory.path
        self.blocking = blocking
        self._directory = directory
        self._flusher = flusher
        self._queue = queue

    @property
    def first_lsn(self) -> int:
        return self._directory.first_lsn

    @property
    def durable_lsn(self) -> int:
        # The flusher hears of a cut only when it is done.
        return min(self._flusher.durable_lsn, self._directory.last_lsn)

    @property
    def last_lsn(self) -> int:
        return min(self._flusher.last_lsn, self._directory.last_lsn)

    @property
    def history(self) -> History:
        return self._flusher.history

    @property
    def damage(self) -> CorruptLogError | None:
        # Opening has made sure of the end, and the owner knows how far it has come since.
        return None

    async def refresh(self) -> None:
        pass

    def generation(self) -> int:
        return self._directory.cuts + self._flusher.cuts

    def shape(self) -> int:
        # A place that is not there any more is looked for anew at once.
        return 0

    def cutting(self) -> bool:
        failed = self._directory.cut_failed
        if failed is not None:
            # What the reader misses may be cut off or not: only recovery can tell.
            raise self._queue.failed("unknown", failed)
        return self._directory.cutting

    def locate(self, lsn: int) -> Place:
        directory = self._directory
        sealed, active = directory.shape()
        header: SegmentHeader = active.header
        index: tuple[tuple[int, int], ...] | None = tuple(active.index)
        following: SegmentHeader | None = None
        if active.header.first_lsn > lsn:
            place = [at for at, s in enumerate(sealed) if s.first_lsn <= lsn < s.next_lsn][-1:]
            if not place:
                raise Moved(self.path, f"no segment has LSN {lsn}")
            header, index = sealed[place[0]].header, None
            behind = [segment.header for segment in sealed[place[0] + 1 :]]
            following = (*behind, active.header)[0]
        directory.pin(header)
        try:
            file = directory.open_segment(header)
            try:
                found = look_at(file, header.name)
                if found.header != header:
                    raise Moved(file.path, "another segment stands in the place of this one")
                return place_in(file, found, lsn, following, index)
            except BaseException:
                close_quietly(file)
                raise
        except BaseException:
            directory.unpin(header)
            raise

    def release(self, header: SegmentHeader) -> None:
        self._directory.unpin(header)

    async def wait_durable_after(self, lsn: int) -> bool:
        flusher = self._flusher
        cuts = flusher.cuts
        while self.durable_lsn <= lsn and flusher.cuts == cuts:
            if flusher.done.is_set():
                if self._queue.state is State.FAILED:
                    self._queue.check_open(self._queue.loss)
                return False
            await flusher.followers.park()
        return True

    def watch(self, reading: Reading) -> None:
        self._flusher.readings.add(reading)

    def unwatch(self, reading: Reading) -> None:
        self._flusher.readings.discard(reading)
