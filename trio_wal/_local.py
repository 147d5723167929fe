"""The engine whose log is a directory of segments, and how a trio program reads such files.

Law: every call that blocks is made in a thread of `_worker`; what is decided here is only which
one, and when.  `LogDirectory` does the work.  Nothing is acknowledged here: `LocalEngine.tail` is
the directory's word, taken over in the event loop when a call has returned.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Final, Literal, final
from uuid import UUID

import msgspec
import trio
from trio.lowlevel import enable_ki_protection

from ._archive import Archive, check_archive
from ._codec import require_zstd
from ._disk.chain import look_at
from ._disk.cursor import Cursor, Locator, Place, place_in
from ._disk.directory import LogDirectory
from ._disk.frame import BATCH_RECORDS_MAX, FRAME_BODY_MAX, SegmentHeader
from ._disk.opening import open_log_directory
from ._disk.recovery import VERIFY_BYTES as VERIFY_BYTES, Plan
from ._disk.repair import create_empty
from ._engine import Forked, Moved, Record, RecoveryReport, Tail
from ._events import tell
from ._exceptions import LogFullError
from ._files import Files, close_quietly
from ._places import Place as ConsumerPlace, consumer_hold
from ._retention import Retention
from ._statistics import BatchTimes, EngineStatistics, SyncTimes
from ._turns import TURNS
from ._util import check_bool, check_int, check_int_or_inf, check_one_of, check_path
from ._worker import Blocking, InlineWorker, LoopWriter, ThreadWorker, Worker

if TYPE_CHECKING:
    from ._archiver import Archiver

SyncIn = Literal["thread", "loop"]
"""What `open_wal` takes as ``sync_in``: ``"thread"`` or ``"loop"``."""

MAINTENANCE_RETRY_SECONDS: Final = 1.0
SEGMENT_SIZE_MAX: Final = 1 << 40


# -- reading files ------------------------------------------------------------------------


@final
class FileCursor:
    """An `_engine.Cursor` on files: each chunk is read in a thread."""

    def __init__(self, locator: Locator, blocking: Blocking) -> None:
        # Without threads nothing can wait for its turn.
        self._slice = TURNS.slice() if blocking.threaded else None
        self._cursor = Cursor(locator, 0, None if self._slice is None else self._slice.give_way)
        self._blocking = blocking
        self._reading = False
        self._closed = False

    async def chunk(self, lsn: int, stop: int) -> list[Record]:
        cursor = self._cursor
        if cursor.next_lsn != lsn:
            cursor.leave()
            cursor.next_lsn = lsn
        self._reading = True
        try:
            return await self._blocking(self._chunk, stop)
        except FileNotFoundError as exc:
            raise Moved(str(exc.filename), "the segment is missing") from exc
        finally:
            self._reading = False
            if self._closed:
                cursor.leave()

    def _chunk(self, stop: int) -> list[Record]:
        if self._slice is not None:
            self._slice.begin()
        return self._cursor.chunk(stop)

    def close(self) -> None:
        self._closed = True
        if not self._reading:
            self._cursor.leave()


@final
class DirectoryLocator:
    """Where the records of a log are that this process has open; a `_cursor.Locator`."""

    def __init__(self, directory: LogDirectory) -> None:
        self._directory = directory

    def locate(self, lsn: int) -> Place:
        directory = self._directory
        sealed, active = directory.shape()
        header: SegmentHeader = active.header
        index: tuple[tuple[int, int], ...] | None = tuple(active.index)
        following: SegmentHeader | None = None
        if active.header.first_lsn > lsn:
            place = [at for at, s in enumerate(sealed) if s.first_lsn <= lsn < s.next_lsn][-1:]
            if not place:
                raise Moved(directory.path, f"no segment has LSN {lsn}")
            header, index = sealed[place[0]].header, None
            behind = [segment.header for segment in sealed[place[0] + 1 :]]
            following = (*behind, active.header)[0]
        directory.spares.pin(header)
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
            directory.spares.unpin(header)
            raise

    def release(self, header: SegmentHeader) -> None:
        self._directory.spares.unpin(header)


# -- the engine ---------------------------------------------------------------------------


class LocalOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a log in a directory is opened; `open_wal` says what each means."""

    path: str
    segment_size: int
    retention: Retention
    compression: Literal["none", "zstd"] | None
    verify_bytes: float
    trust_directory: bool
    archive: Archive | None
    sync_in: SyncIn


def check_retention(retention: Retention | None) -> None:
    """Raises `TypeError` where it is neither None nor a `Retention`."""
    if retention is not None and not isinstance(retention, Retention):
        raise TypeError(
            "retention must be None or made of KeepAll, KeepSegments, KeepFor and KeepBytes, "
            f"not {type(retention).__name__}"
        )


def check_local_options(
    path: str | PathLike[str],
    segment_size: int,
    retention: Retention,
    compression: Literal["none", "zstd"] | None,
    verify_bytes: float,
    trust_directory: bool,
    sync_in: SyncIn,
    archive: Archive | None,
) -> LocalOptions:
    """These arguments of `open_wal`, or the error that names the wrong one."""
    check_retention(retention)
    if compression is not None:
        check_one_of("compression", compression, ("none", "zstd"))
        if compression == "zstd":
            require_zstd()
    check_one_of("sync_in", sync_in, ("thread", "loop"))
    return LocalOptions(
        path=check_path(path),
        segment_size=check_int("segment_size", segment_size, 1, SEGMENT_SIZE_MAX),
        retention=retention,
        compression=compression,
        verify_bytes=check_int_or_inf("verify_bytes", verify_bytes, 0),
        trust_directory=check_bool("trust_directory", trust_directory),
        archive=None if archive is None else check_archive("archive", archive),
        sync_in=sync_in,
    )


@final
class LocalEngine:
    """An `_engine.Engine` on a directory of segments; see `open_local`."""

    batch_bytes_max = FRAME_BODY_MAX
    batch_records_max = BATCH_RECORDS_MAX

    def __init__(
        self,
        files: Files,
        directory: LogDirectory,
        worker: Worker,
        blocking: Blocking,
        retention: Retention,
        undo: Callable[[], None] | None,
        loop: LoopWriter | None = None,
        archive: Archive | None = None,
    ) -> None:
        """
        Args:
          loop: writes in the event loop what is small; None: all is the worker's.
        """
        self.name: str = directory.path
        self.uuid: UUID = UUID(bytes=directory.log_uuid)
        self.recovery: RecoveryReport = directory.report
        self._files = files
        self._directory = directory
        self._worker = worker
        self._blocking = blocking
        self._retention = retention
        self._undo = undo
        self._loop = loop
        self.last_lsn: int = directory.last_lsn
        self.durable_lsn: int = directory.synced_lsn
        self._history = directory.history
        self._active_number = directory.active.header.number
        self._syncs = SyncTimes()
        self.places: Mapping[str, ConsumerPlace] = directory.places.found
        self.keeps_places = True
        self._batch_times: BatchTimes | None = None
        """From the first consumer on."""
        for name, place in self.places.items():
            directory.hold(consumer_hold(name), place.lsn + 1)
        self._started = False
        self._forked = False
        self._ending = trio.Event()
        """Set when nothing more is to be done beside the writing."""
        self._due = trio.Event()
        """Set when there may be something to do beside the writing."""
        self._spare_wanted = False
        """Whether the next segment should be prepared now."""
        self._archiver: Archiver | None = None
        self.check_archive: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        if archive is not None:
            # With all that it is made of, of which a log without an archive has no need.
            from ._archiver import Archiver

            self._archiver = Archiver(
                archive, directory, self.name, self.hold, self.busy, threaded=files.threaded
            )
            self.check_archive = self._archiver.check
        # None until the task has begun.
        self._worker_done: trio.Event | None = None
        self._maintenance_done: trio.Event | None = None

    # -- what it is --

    @property
    def tail(self) -> Tail:
        # Where it begins is moved by retention, in a thread, too.
        return Tail(self._directory.first_lsn, self.last_lsn, self.durable_lsn, self._history)

    def statistics(self) -> EngineStatistics:
        directory = self._directory
        return EngineStatistics(
            self._syncs,
            directory.segments,
            directory.disk_bytes,
            archive=None if self._archiver is None else self._archiver.statistics(),
            loop=None if self._loop is None else self._loop.statistics,
        )

    def busy(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._loop is None else self._loop.busy()

    # -- its life --

    def tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        self._started = True
        more = () if self._archiver is None else (self._archiver.run,)
        return self._run_worker, self._maintain, *more

    async def ready(self) -> None:
        await self._worker.ready()

    @enable_ki_protection
    async def _run_worker(self) -> None:
        done = self._worker_done = trio.Event()
        try:
            await self._worker.run()
        except Forked:
            pass
        finally:
            if not self._forked:
                done.set()

    async def aclose(self, *, orderly: bool) -> None:
        try:
            seconds = 0.0
            if orderly and self._archiver is not None:
                from ._archiver import CLOSE_SECONDS

                seconds = CLOSE_SECONDS
            await self._end(partial(self._directory.close, orderly=orderly), seconds)
        finally:
            if not self._forked:
                # Once more, for where the worker has ended before it could.
                self._directory.close(orderly=False)

    async def abandon(self) -> None:
        undone = False

        def undo() -> None:
            nonlocal undone
            undone = True
            self._directory.abandon(self._undo if self._directory.created else None)

        with contextlib.suppress(OSError):
            await self._end(undo)
        if not undone and not self._forked:
            # There is no worker: that it could not be started is why the open has failed.
            undo()

    async def _end(self, job: Callable[[], None], archive_seconds: float = 0.0) -> None:
        """End the tasks, with ``job`` as the worker's last."""
        if not self._started:
            self._worker.close()
            job()
            return
        try:
            self._directory.spares.stop()
            self._stop_maintenance()
            if self._archiver is not None:
                await self._archiver.stop(archive_seconds)
            if self._maintenance_done is not None:
                await self._maintenance_done.wait()
            await self._blocking.close()
            await self._worker.call(job)
        finally:
            if not self._forked:
                self._worker.stop()
                if self._worker_done is not None:
                    await self._worker_done.wait()

    def on_fork(self, callback: Callable[[], None]) -> None:
        self._files.on_fork(callback)

    def disown(self) -> None:
        self._forked = True
        self._directory.disown()
        self._worker.disown()
        self._blocking.disown()
        if self._archiver is not None:
            self._archiver.disown()

    # -- the one writer --

    async def write(self, records: Sequence[bytes], *, sync: bool) -> None:
        directory = self._directory
        TURNS.wrote()
        job = partial(directory.write, records, self.durable_lsn, sync=sync)
        loop = self._loop
        try:
            if loop is not None and _fits_loop(loop, directory, records):
                wants_spare = loop.run(job)
            else:
                wants_spare = await self._worker.call(job)
        except OSError:
            self._stop_maintenance()
            raise
        if self._batch_times is not None:
            self._batch_times.note(self.last_lsn + 1, directory.active.position.time_us)
        self.last_lsn = directory.last_lsn
        if sync:
            self.durable_lsn = directory.synced_lsn
            self._syncs.note(directory.sync_seconds, self._files.time_us())
        if wants_spare and not self._spare_wanted:
            self._spare_wanted = True
            self._due.set()
        if directory.active.header.number != self._active_number:
            self._note_rotation()

    async def sync(self) -> None:
        await self._call(self._directory.sync, in_loop=True)
        self._syncs.note(self._directory.sync_seconds, self._files.time_us())

    async def make_room(self) -> None:
        await self._worker.call(self._directory.make_room)

    async def rotate(self) -> None:
        await self._call(self._directory.rotate)

    async def truncate_after(self, lsn: int) -> None:
        archiver = self._archiver
        if archiver is None:
            await self._call(partial(self._directory.truncate_after, lsn))
            return
        archiver.begin_cut()
        try:
            await self._call(partial(self._directory.truncate_after, lsn))
        finally:
            archiver.end_cut()

    async def _call(self, job: Callable[[], object], *, in_loop: bool = False) -> None:
        loop = self._loop
        try:
            if in_loop and loop is not None and loop.may(0):
                loop.run(job)
            else:
                await self._worker.call(job)
        except OSError:
            self._stop_maintenance()
            raise
        self.last_lsn, self.durable_lsn = self._directory.last_lsn, self._directory.synced_lsn
        self._history = self._directory.history
        if self._directory.active.header.number != self._active_number:
            self._note_rotation()

    def _note_rotation(self) -> None:
        """A segment is finished: retention may apply to it."""
        header = self._directory.active.header
        self._active_number = header.number
        self._due.set()
        if self._archiver is not None:
            self._archiver.wake()
        tell(
            logging.DEBUG,
            "rotated",
            self.name,
            f"segment {header.number} begins at LSN {header.first_lsn}",
            segment=header.number,
            first_lsn=header.first_lsn,
            segments=self._directory.segments,
        )

    # -- beside the writing --

    async def drop_before(self, lsn: int) -> None:
        await self._blocking(self._directory.drop_before, lsn)

    def hold(self, who: str, lsn: int | None, bytes_max: float = math.inf) -> None:
        if self._directory.hold(who, lsn, bytes_max):
            self._due.set()

    async def settle_holds(self) -> None:
        await self._blocking(self._directory.meta.settle)

    async def keep_places(self, places: Mapping[str, ConsumerPlace]) -> None:
        await self._blocking(self._directory.places.write, places)

    async def admit_consumers(self) -> None:
        await self._blocking(self._directory.meta.admit_consumers)

    def behind(self, lsn: int) -> tuple[int, float]:
        if self._batch_times is None:
            self._batch_times = BatchTimes(self.last_lsn)
        size, since_us = self._directory.behind(lsn)
        noted_us = self._batch_times.time_of(lsn + 1)
        if noted_us is not None:
            since_us = noted_us
        return size, max(0, self._files.time_us() - since_us) / 1e6

    def cursor(self) -> FileCursor:
        return FileCursor(DirectoryLocator(self._directory), self._blocking)

    async def branch(self, dest: str, after_lsn: int) -> None:
        create = partial(
            create_empty,
            log_uuid=self._directory.log_uuid,
            first_lsn=after_lsn + 1,
            features=self._directory.features,
            history=self._directory.history,
            consumers=self._directory.meta.says.consumers,
        )
        await self._blocking(create, self._files, dest)

    def _stop_maintenance(self) -> None:
        self._ending.set()
        self._due.set()

    @enable_ki_protection
    async def _maintain(self) -> None:
        """Prepare the next segment, apply retention: what must not hold up a commit."""
        done = self._maintenance_done = trio.Event()
        directory = self._directory
        with trio.CancelScope(shield=True):
            try:
                while not self._ending.is_set():
                    applied = False
                    try:
                        with self.busy():
                            await self._blocking(directory.apply_retention, self._retention)
                        applied = True
                    except (OSError, LogFullError) as exc:
                        text = f"retention failed, will try again: {exc!r}"
                        tell(logging.WARNING, "retention_failed", self.name, text, error=repr(exc))
                    # After it: what was dropped a moment ago can be the next segment.
                    if self._spare_wanted and not self._ending.is_set():
                        self._spare_wanted = False
                        # As in `Spares.prepare`: a rotation will say so.
                        with contextlib.suppress(OSError), self.busy():
                            await self._blocking(directory.prepare_spare)
                    if applied:
                        await self._wait_for_maintenance()
                    else:
                        with trio.move_on_after(MAINTENANCE_RETRY_SECONDS):
                            await self._ending.wait()
            except Forked:
                pass
            except trio.ClosedResourceError:
                if not self._forked:
                    raise
            finally:
                if not self._forked:
                    done.set()

    async def _wait_for_maintenance(self) -> None:
        due_us = self._directory.next_retention_us(self._retention)
        seconds = math.inf if due_us is None else max(due_us / 1e6, MAINTENANCE_RETRY_SECONDS)
        with trio.move_on_after(seconds):
            await self._due.wait()
        if self._due.is_set():
            self._due = trio.Event()


def _fits_loop(loop: LoopWriter, directory: LogDirectory, records: Sequence[bytes]) -> bool:
    size = sum(map(len, records))
    # Another segment, with the syncs that it takes, is for the thread.
    return loop.may(size) and directory.active.fits(size + 4 * len(records))


async def open_local(
    files: Files,
    options: LocalOptions,
    *,
    check: Callable[[Plan], int | None] | None = None,
    database: bool = False,
    undo: Callable[[], None] | None = None,
) -> LocalEngine:
    """Recover and open the log in a directory, which is created if it is missing.

    Args:
      check, database: as for `open_log_directory`.
      undo: removes what was made beside a log that this open has created, if it fails after all.

    Raises: as `open_log_directory`; what this open has created is removed again.
      WrongDirectoryError: also where the archive is another log's.
    """
    archive = options.archive
    if archive is not None:
        from ._archiver import ask_identity, checking

        check = checking(archive, await ask_identity(archive, threaded=files.threaded), check)
    blocking = Blocking(threaded=files.threaded)
    directory = await blocking(
        open_log_directory,
        files,
        options.path,
        segment_size=options.segment_size,
        verify_bytes=options.verify_bytes,
        compression=options.compression,
        check=check,
        database=database,
        trust_directory=options.trust_directory,
    )
    worker: Worker | None = None
    try:
        worker = _new_worker(files, directory.publish)
        loop = None
        if options.sync_in == "loop" and isinstance(worker, ThreadWorker):
            loop = LoopWriter(worker, directory.publish)
        return LocalEngine(
            files, directory, worker, blocking, options.retention, undo, loop, archive
        )
    except BaseException:
        # No descriptor for the worker, or no memory.
        if worker is not None:
            worker.close()
        directory.abandon()
        raise


def _new_worker(files: Files, afterwards: Callable[[], None]) -> Worker:
    if files.threaded:
        return ThreadWorker(afterwards)
    gate = getattr(files, "gate", trio.lowlevel.cancel_shielded_checkpoint)
    return InlineWorker(gate, afterwards)
