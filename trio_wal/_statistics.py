"""What a log counts, and how it is handed out.

Law: values only; nothing here looks anything up.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Final, Literal, final

import attrs
import msgspec

from ._exports import publish

HISTOGRAM_BOUNDS: Final = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005,
    0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0,
)  # fmt: skip
"""Upper bounds, in seconds, of the buckets of every histogram."""

Histogram = tuple[tuple[float, int], ...]
"""(upper bound in seconds, how many took at most so long and longer than the bound before)"""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Times:
    """How long something took, each time: running totals."""

    __slots__ = ("_buckets", "count", "seconds_total")

    def __init__(self) -> None:
        self.count: int = 0
        self.seconds_total: float = 0.0
        self._buckets = [0] * (len(HISTOGRAM_BOUNDS) + 1)

    def note(self, seconds: float) -> None:
        """Once more."""
        self.count += 1
        self.seconds_total += seconds
        self._buckets[bisect_left(HISTOGRAM_BOUNDS, seconds)] += 1

    def histogram(self) -> Histogram:
        return tuple(zip((*HISTOGRAM_BOUNDS, math.inf), self._buckets, strict=True))


class SyncTimes:
    """How long syncs took: running totals."""

    __slots__ = ("_buckets", "_last_us", "count", "seconds_max", "seconds_total")

    def __init__(self) -> None:
        self.count: int = 0
        self.seconds_total: float = 0.0
        self.seconds_max: float = 0.0
        self._last_us: int | None = None
        self._buckets = [0] * (len(HISTOGRAM_BOUNDS) + 1)

    def note(self, seconds: float, now_us: int) -> None:
        """One more, which has just returned; ``now_us`` counts from 1970."""
        self.count += 1
        self.seconds_total += seconds
        self.seconds_max = max(self.seconds_max, seconds)
        self._buckets[bisect_left(HISTOGRAM_BOUNDS, seconds)] += 1
        self._last_us = now_us

    @property
    def last_time(self) -> datetime | None:
        """UTC, when the last one returned."""
        if self._last_us is None:
            return None
        return _EPOCH + timedelta(microseconds=self._last_us)

    def histogram(self) -> Histogram:
        return tuple(zip((*HISTOGRAM_BOUNDS, math.inf), self._buckets, strict=True))


class LoopWrites:
    """What was written and synced in the event loop: running totals."""

    __slots__ = ("count", "seconds_max", "seconds_total", "slow")

    def __init__(self) -> None:
        self.count: int = 0
        self.seconds_total: float = 0.0
        self.seconds_max: float = 0.0
        self.slow: int = 0

    def note(self, seconds: float, *, slow: bool) -> None:
        self.count += 1
        self.seconds_total += seconds
        self.seconds_max = max(self.seconds_max, seconds)
        self.slow += slow


BATCHES_NOTED_MAX: Final = 1024


class BatchTimes:
    """When the newest batches were written; the older, the fewer of them."""

    def __init__(self, last_lsn: int) -> None:
        self._since = last_lsn + 1
        """Before this one nothing is known."""
        self._lsns: list[int] = []
        self._times: list[int] = []
        self._apart_us = 0

    def note(self, first_lsn: int, time_us: int) -> None:
        """One more; times count from 1970."""
        times, lsns = self._times, self._lsns
        while lsns and lsns[-1] >= first_lsn:
            # The log's end was cut.
            lsns.pop()
            times.pop()
        if times and time_us - times[-1] < self._apart_us:
            return
        if len(times) == BATCHES_NOTED_MAX:
            del times[1::2], lsns[1::2]
            self._apart_us = max(1000, 2 * self._apart_us)
        times.append(time_us)
        lsns.append(first_lsn)

    def time_of(self, lsn: int) -> int | None:
        """When a record was written, or some time before; None: nobody knows here."""
        if lsn < self._since or not self._lsns:
            return None
        return self._times[max(0, bisect_right(self._lsns, lsn) - 1)]


@final
@attrs.frozen(kw_only=True)
class ConsumerStatistics:
    """A look at one consumer; in ``statistics().consumers``."""

    acknowledged_lsn: int
    """Up to here the consumer's user is done with everything; 0: with nothing."""
    lag_records: int
    """Durable records (of a database: commits) that the consumer has yet to acknowledge.  Of a
    database that was opened after a checkpoint, acknowledgements among those that the checkpoint
    covers may be counted too few or too many; where the consumer has everything it is 0."""
    lag_bytes: int
    """Bytes that those records take in the log: whole segments by their size, of the segment with
    the place a share by number of records."""
    lag_seconds: float
    """How long ago the oldest of those records was written, or at most so long: of those from
    before this open, when their segment was begun; 0 where there are none."""


class ReplicationStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What only a replicated log has; `WalStatistics` says what it means."""

    position: int
    replicas: int
    replicas_current: int
    unsettled_seconds: float
    rotations: int
    resolved: int
    assume_synced: bool


class ArchiveStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What only a log with an archive has; `WalStatistics` says what it means."""

    archived_lsn: int
    archive_lag_segments: int
    archive_lag_bytes: int
    archive_failures: int
    archive_error: str | None
    stalled_seconds: float
    """For how long it has got none of what it lacks: not for `WalStatistics`."""


class EngineStatistics(msgspec.Struct, frozen=True):
    """What an engine knows that its log does not; `WalStatistics` says what it means."""

    syncs: SyncTimes
    segments: int
    disk_bytes: int
    replication: ReplicationStatistics | None = None
    archive: ArchiveStatistics | None = None
    loop: LoopWrites | None = None


@final
@attrs.frozen(kw_only=True)
class WriterStatistics:
    """A look at one writer's share of the queue; what ``statistics()`` of a writer returns."""

    name: str
    """The name given to ``writer()``."""
    priority: Literal["normal", "high"]
    """The priority given to ``writer()``."""
    max_queue_size: float
    """How many records of the writer may wait: its own limit, or the queue's bound where that is
    less."""
    max_queue_bytes: float
    """How many payload bytes of the writer may wait."""
    records_waiting: int
    """Accepted records of the writer that wait to be written, without the batch being written."""
    bytes_waiting: int
    """Payload bytes of the writer's records that wait to be written."""
    peak_records_waiting: int
    """The most records of the writer that ever waited."""
    peak_bytes_waiting: int
    """The most payload bytes of the writer that ever waited."""
    tasks_waiting_send: int
    """Tasks that stand in the writer's line, because its share or the queue is full."""
    backpressure_waits: int
    """How often a task came to stand in the writer's line."""
    backpressure_seconds: float
    """For how long tasks stood in the writer's line, all together, by trio's clock; of those that
    stand there no more."""
    backpressure_seconds_histogram: Histogram
    """How long each task stood in the writer's line: (upper bound in seconds, waits that took at
    most so long and longer than the bound before); the last bound is infinite."""
    rejected: int
    """How often the writer's ``send_nowait`` raised `trio.WouldBlock`."""
    records_appended: int
    """Records of the writer that were acknowledged."""
    bytes_appended: int
    """Payload bytes of the writer's records that were acknowledged."""


@final
@attrs.frozen(kw_only=True)
class WalStatistics:
    """A look at the log at one moment; what `WriteAheadLog.statistics` returns."""

    records_waiting: int
    """Accepted records that wait to be written, without the batch being written."""
    bytes_waiting: int
    """Payload bytes of the records that wait to be written."""
    max_queue_size: float
    """The bound in force of records that may wait: as given to `open_wal`, or what ``"auto"`` has
    made of it; `math.inf` where unbounded."""
    max_queue_bytes: float
    """How many payload bytes may wait, as given to `open_wal`."""
    queue_utilization: float
    """How full the queue is, 0 to 1, in records or bytes, whichever is more."""
    peak_records_waiting: int
    """The most records that ever waited."""
    peak_bytes_waiting: int
    """The most payload bytes that ever waited."""
    tasks_waiting_send: int
    """Tasks blocked because the queue is full."""
    tasks_waiting_durable: int
    """Tasks whose records are accepted, or that wait for an LSN, and not yet durable."""
    backpressure_waits: int
    """How often a task was blocked by a full queue."""
    backpressure_seconds: float
    """For how long tasks were blocked by a full queue, all together, by trio's clock."""
    backpressure_seconds_histogram: Histogram
    """How long each task was blocked by a full queue: (upper bound in seconds, waits that took at
    most so long and longer than the bound before); the last bound is infinite."""
    rejected: int
    """How often ``send_nowait`` raised `trio.WouldBlock`."""
    writers: Mapping[str, WriterStatistics]
    """Those whose block has not been left, by name; their figures are part of those above."""
    consumers: Mapping[str, ConsumerStatistics]
    """All that there are, by name, in use or not."""
    records_appended: int
    """Records written in this session."""
    bytes_appended: int
    """Payload bytes of the records written in this session."""
    batches_synced: int
    """Syncs that covered new records."""
    sync_seconds_total: float
    """Time spent in syncs."""
    sync_seconds_max: float
    """How long the slowest sync took."""
    sync_seconds_histogram: Histogram
    """How long each sync took: (upper bound in seconds, syncs that took at most so long and longer
    than the bound before); the last bound is infinite."""
    first_lsn: int
    """The oldest record; ``last_lsn + 1`` where there is none."""
    last_lsn: int
    """The newest record written."""
    durable_lsn: int
    """The newest record that a sync has covered."""
    segments: int
    """Segment files of the log, the one being written among them."""
    disk_bytes: int
    """Size of the log's segment files, space prepared ahead and a dropped one that is kept for the
    next included."""
    last_sync_time: datetime | None
    """UTC, when the last sync returned; None before the first."""
    state: Literal["open", "full", "closing", "closed", "failed"]
    """What the log does at the moment.  Where it is ``full``, there is no disk space for the next
    segment; for ``failed`` see `LogFailedError`."""
    epoch: int
    """Which of the log's histories this is, as `WriteAheadLog.epoch`."""
    loop_writes: int = 0
    """Batches that were written, and mostly synced, in the event loop, with ``sync_in="loop"``."""
    loop_seconds_total: float = 0.0
    """For how long the event loop stood still for batches that it wrote, all together."""
    loop_seconds_max: float = 0.0
    """For how long the event loop stood still for a batch, at most."""
    loop_slow: int = 0
    """How often a batch in the event loop took over 5 ms, so that the thread did the work of the
    next second."""
    position: int | None = None
    """The last message of a replicated log; None, as all that follow, for a log in a directory."""
    replicas: int | None = None
    """How many servers keep a copy of the log."""
    replicas_current: int | None = None
    """How many servers' copies were up to date when they were last asked, every ten seconds."""
    unsettled_seconds: float | None = None
    """For how long the batch in flight has had no outcome; 0 where none is in flight."""
    rotations: int | None = None
    """How often another server was tried because one gave no answer."""
    resolved: int | None = None
    """How often a batch was found to have landed though its answer was lost."""
    assume_synced: bool | None = None
    """Whether the servers were taken at their word, and not asked whether they sync each write."""
    archived_lsn: int | None = None
    """The archive has every record up to here that the log had since it was archived; None, as
    all that follow, for a log without ``archive=``."""
    archive_lag_segments: int | None = None
    """Sealed segments that are not there yet; the one being written is none."""
    archive_lag_bytes: int | None = None
    """Bytes of their files."""
    archive_failures: int | None = None
    """How often it was tried in vain to archive, since the log was opened."""
    archive_error: str | None = None
    """What the last try came to; None where it passed."""


publish(ConsumerStatistics, WalStatistics, WriterStatistics)
