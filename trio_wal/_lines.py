"""The lines of a log's writers: by name, from their opening to their end, and what they count.

Law: no waiting; who is let in when is `_admission`'s, and what users may pass is checked above.
"""

from __future__ import annotations

from threading import get_ident
from typing import Final, final

from ._admission import Line
from ._park import require_trio
from ._queue import WriteQueue
from ._state import Status
from ._statistics import WriterStatistics
from ._text import printable


@final
class Lines:
    """Those that are open."""

    def __init__(
        self, status: Status, queue: WriteQueue, max_queue_size: float, max_queue_bytes: float
    ) -> None:
        self._status = status
        self._queue = queue
        self.max_queue_size: Final = max_queue_size
        """The most records that ever may wait, of all lines together."""
        self.max_queue_bytes: Final = max_queue_bytes
        self._open: dict[str, Line] = {}
        self._thread: Final = get_ident()

    def check_run(self) -> None:
        """Raises `RuntimeError` in another run of trio than the one that opened the log."""
        require_trio("log.writer")
        if get_ident() != self._thread:
            name = printable(self._status.name)
            raise RuntimeError(f"{name}: this log belongs to another run of trio")

    def check_name(self, name: str) -> None:
        """Raises `ValueError` where a writer of this name is open."""
        if name in self._open:
            raise ValueError(f"name must be unique: there is already a writer {name!r}")

    def check(self, line: Line) -> None:
        """Raises `trio.ClosedResourceError` after the end of the line, and `RuntimeError` in
        another run of trio."""
        if line.closed:
            raise line.left()
        if get_ident() != self._thread:
            name = printable(str(line.name))
            raise RuntimeError(f"writer {name} belongs to another run of trio")

    def open(self, name: str, max_queue_size: float, max_queue_bytes: float, *, high: bool) -> Line:
        """A line of its own, until `close`."""
        self._status.check_open()
        self.check_name(name)
        line = self._queue.open_line(name, max_queue_size, max_queue_bytes, high=high)
        self._open[name] = line
        return line

    def close(self, line: Line) -> None:
        """Whoever stands in the line gets `trio.ClosedResourceError`; what was accepted stays."""
        del self._open[str(line.name)]
        self._queue.close_line(line)

    def statistics(self) -> dict[str, WriterStatistics]:
        return {name: self.statistics_of(line) for name, line in self._open.items()}

    def statistics_of(self, line: Line) -> WriterStatistics:
        line.note_peaks()
        return WriterStatistics(
            name=str(line.name),
            priority="high" if line.high else "normal",
            max_queue_size=min(line.max_queue_size, self._queue.admission.max_queue_size),
            max_queue_bytes=min(line.max_queue_bytes, self.max_queue_bytes),
            records_waiting=line.records,
            bytes_waiting=line.bytes,
            peak_records_waiting=line.peak_records,
            peak_bytes_waiting=line.peak_bytes,
            tasks_waiting_send=len(line.blocked),
            backpressure_waits=line.waits.count + len(line.blocked),
            backpressure_seconds=line.waits.seconds_total,
            backpressure_seconds_histogram=line.waits.histogram(),
            rejected=line.rejected,
            records_appended=line.records_appended,
            bytes_appended=line.bytes_appended,
        )
