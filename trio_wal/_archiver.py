"""The task of a log in a directory that puts its sealed segments into an `Archive`.

Law: nothing here holds up a commit, an open or a close: an archive that is slow, full, or gone
costs disk space, because what it does not have yet is held, and is told in the log and in
``statistics()``.  What has been put there is known by asking the archive, once per open.
"""

from __future__ import annotations

import logging
import math
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import accumulate, islice
from typing import Final, final
from uuid import UUID

import trio
from trio.lowlevel import enable_ki_protection

from ._archive import Archive, puts_groups
from ._archived import OpenedLog, SegmentKey, SegmentName, pruned_before
from ._archiving import begin_archive, key_of, put_segments
from ._disk.directory import LogDirectory
from ._disk.recovery import Plan
from ._disk.segment import SegmentInfo
from ._engine import Forked, Moved
from ._events import tell
from ._exceptions import CorruptLogError, UnsupportedFormatError, WrongDirectoryError
from ._manifest import Identity, probe, read_identity
from ._statistics import ArchiveStatistics
from ._turns import TURNS
from ._util import MiB
from ._worker import Blocking

ARCHIVE_HOLD: Final = "archive"
"""Under which name a log is held: by what its archive does not have yet."""
RETRY_SECONDS: Final = 1.0
RETRY_SECONDS_MAX: Final = 60.0
"""Between two tries, twice as long each time up to this."""
REST_SECONDS: Final = 0.25
"""From the end of one group to the beginning of the next, so that a fast log's segments gather:
what a group costs, syncs above all, costs most of it once."""
GROUP_SEGMENTS_MAX: Final = 16
GROUP_BYTES_MAX: Final = 16 * MiB
"""Of segments that are put together; a larger one is put by itself.  Where more than that waits,
there is no rest."""
OPEN_SECONDS: Final = 5.0
"""How long an open waits to be told whose archive it is; the task asks again."""
CLOSE_SECONDS: Final = 5.0
"""How long a close goes on with what is sealed, where the last try has not failed."""


class _Stopped(Exception):
    """The log is being closed, and waits no longer."""


@final
class Archiver:
    """
    Args:
      name: the log's, for messages.
      hold, busy: the engine's.
    """

    def __init__(
        self,
        archive: Archive,
        directory: LogDirectory,
        name: str,
        hold: Callable[[str, int], None],
        busy: Callable[[], AbstractContextManager[None]],
        *,
        threaded: bool,
    ) -> None:
        self._archive = archive
        self._directory = directory
        self._name = name
        self._blocking = Blocking(threaded=threaded, abandons=True)
        self._there: set[SegmentKey] | None = None
        """Segments that the archive has; None: it has not answered yet."""
        self._names: list[SegmentName] = []
        """What it had then."""
        self._asking = trio.Lock()
        """So that what a backup puts there is not taken for another log's."""
        self._gone = 0
        """Below this LSN its owner has deleted what it had."""
        self._opened = _opened(directory)
        self._archived_lsn = directory.first_lsn - 1
        self._waiting = True
        """Whether it may lack a segment."""
        self._clock = trio.lowlevel.current_clock()
        """Statistics may be asked for after the end of the run."""
        self._since = trio.current_time()
        """When it began to, or got one of those that it lacked."""
        self._looked_at: int = directory.cuts
        """`LogDirectory.cuts` when that was found out."""
        self._together = puts_groups(archive)
        """Whether several cost it less than one after the other does: else all of them would only
        come later."""
        self._rest_seconds = REST_SECONDS if threaded and self._together else 0.0
        self._rest_until = -math.inf
        self._slice = TURNS.slice() if threaded else None
        self._behind = False
        """Whether more waits than is put together."""
        self._hold = hold
        self._busy = busy
        self._failures = 0
        self._error: str | None = None
        """What the last try came to; None: it passed."""
        self._alone = False
        """Whether the next one is put by itself, because that of several has failed."""
        self._cutting = False
        self._due = trio.Event()
        self._ending = trio.Event()
        self._scope = trio.CancelScope()
        self._abandoned = threading.Event()
        """Set when a call that is still under way shall end by itself."""
        self._done: trio.Event | None = None
        """None until the task has begun."""
        self._forked = False
        hold(ARCHIVE_HOLD, 0)

    def statistics(self) -> ArchiveStatistics:
        segments = size = 0
        for info in reversed(self._directory.sealed()):
            if info.next_lsn - 1 <= self._archived_lsn:
                break
            segments, size = segments + 1, size + info.bytes
        return ArchiveStatistics(
            archived_lsn=self._archived_lsn,
            archive_lag_segments=segments,
            archive_lag_bytes=size,
            archive_failures=self._failures,
            archive_error=self._error,
            stalled_seconds=self._clock.current_time() - self._since if segments else 0.0,
        )

    # -- what the engine tells --

    def wake(self) -> None:
        """A segment was sealed."""
        if not self._waiting:
            self._waiting, self._since = True, trio.current_time()
        self._due.set()

    def begin_cut(self) -> None:
        """The log's end is about to be cut, by which segments that the archive has become others,
        which it has not."""
        self._cutting = True
        self._hold(ARCHIVE_HOLD, 0)

    def end_cut(self) -> None:
        self._cutting = False
        self._due.set()

    # -- the task --

    @enable_ki_protection
    async def run(self) -> None:
        done = self._done = trio.Event()
        try:
            with trio.CancelScope(shield=True), self._scope:
                if not self._ending.is_set():
                    await self._go_on()
        except Forked:
            pass
        except trio.ClosedResourceError:
            if not self._forked:
                raise
        finally:
            self._abandoned.set()
            if not self._forked:
                done.set()

    async def _go_on(self) -> None:
        delay = RETRY_SECONDS
        while True:
            self._due = trio.Event()
            if await self._try():
                delay = RETRY_SECONDS
                if self._ending.is_set():
                    return
                await self._due.wait()
            else:
                with trio.move_on_after(delay):
                    await self._ending.wait()
                delay = min(2 * delay, RETRY_SECONDS_MAX)
                if self._ending.is_set():
                    return

    async def _try(self) -> bool:
        """Put there what is not; returns whether the archive has all that is sealed."""
        try:
            await self._put_all()
        except Exception as exc:
            # An archive is its user's, and raises what it likes.
            if self._forked:
                raise
            self._failures += 1
            self._alone = True
            self._error = f"{type(exc).__name__}: {exc}"
            text = f"{self._archive!r}: what is sealed is not archived, will try again: {exc!r}"
            tell(logging.WARNING, "archive_failed", self._name, text, error=repr(exc))
            return False
        if self._error is not None:
            self._error = None
            text = f"{self._archive!r}: archived up to LSN {self._archived_lsn} again"
            tell(logging.INFO, "archive_works", self._name, text, lsn=self._archived_lsn)
        return True

    async def _put_all(self) -> None:
        directory = self._directory
        there = self._there
        if there is None:
            there = await self._ask()
        while (group := self._next(there)) and not self._cutting:
            if await self._rest():
                # More may have come.
                continue
            cuts, meta = directory.cuts, directory.meta.says
            try:
                with self._busy():
                    count = await self._blocking(
                        put_segments, self._archive, directory, group, meta, cuts, self._tick
                    )
            except (Moved, FileNotFoundError, CorruptLogError):
                if directory.cuts == cuts:
                    raise
                # They are other segments by now, or none; or are being cut.
                continue
            self._alone = False
            self._rest_until = trio.current_time() + self._rest_seconds
            for info in group[:count]:
                there.add(key_of(info))
                tell(
                    logging.DEBUG,
                    "archived",
                    self._name,
                    f"segment {info.header.number}, up to LSN {info.next_lsn - 1}, is archived",
                    segment=info.header.number,
                    last_lsn=info.next_lsn - 1,
                )

    async def _ask(self) -> set[SegmentKey]:
        """Which segments the archive has."""
        async with self._asking:
            if self._there is not None:
                return self._there
            log_uuid = UUID(bytes=self._directory.log_uuid)
            names, there = await self._blocking(
                begin_archive, self._archive, log_uuid, self._opened
            )
            self._names, self._there, self._looked_at = names, there, -1
            return there

    async def check(self) -> None:
        """Before anything else is put there.

        Raises:
          FileExistsError: nothing must be; and what an archive raises.
        """
        await self._ask()

    async def _rest(self) -> bool:
        """Until it is time for the next group; returns whether it was not."""
        if self._behind or self._ending.is_set() or trio.current_time() >= self._rest_until:
            return False
        with trio.move_on_at(self._rest_until):
            await self._ending.wait()
        return True

    def _tick(self) -> None:
        if self._abandoned.is_set():
            raise _Stopped
        if self._slice is not None and not self._behind:
            self._slice.give_way()

    def _next(self, there: set[SegmentKey]) -> list[SegmentInfo]:
        """The oldest segments that the archive has not, as many as are put together; they are
        held."""
        directory, begin = self._directory, 0
        cuts = directory.cuts
        sealed, active = directory.shape()
        if cuts == self._looked_at:
            begin = bisect_right(sealed, self._archived_lsn, key=_first_lsn)
        else:
            self._gone = pruned_before(self._names, directory.history)
        rest = islice(sealed, begin, None)
        missing = [s for s in rest if s.next_lsn > self._gone and key_of(s) not in there]
        first = missing[0].first_lsn if missing else active.header.first_lsn
        if not self._cutting:
            if first - 1 != self._archived_lsn:
                self._since = trio.current_time()
            self._waiting = bool(missing)
            self._archived_lsn, self._looked_at = first - 1, cuts
            self._hold(ARCHIVE_HOLD, first)
        size = self._group_size(missing, sealed, there)
        self._behind = size < len(missing)
        return missing[: size if self._together else 1]

    def _group_size(
        self, missing: list[SegmentInfo], sealed: list[SegmentInfo], there: set[SegmentKey]
    ) -> int:
        """How many of the first are put together: one where that has just failed, so that none
        waits for another's sake; and one where the archive has none before it, because if a crash
        left others without that, it would be taken for deleted (see `pruned_before`)."""
        before = bisect_left(sealed, missing[0].first_lsn, key=_first_lsn) - 1 if missing else -1
        if self._alone or before < 0 or key_of(sealed[before]) not in there:
            return 1
        sizes = accumulate(info.bytes for info in missing[:GROUP_SEGMENTS_MAX])
        return max(1, sum(size <= GROUP_BYTES_MAX for size in sizes))

    # -- ending --

    async def stop(self, seconds: float) -> None:
        """Go on with what is sealed for at most so long, unless that fails anyway; then let go of
        a call that is still under way.  The next open goes on from there."""
        self._ending.set()
        self._due.set()
        if self._done is None:
            return
        if self._error is not None:
            seconds = 0.0
        self._scope.deadline = trio.current_time() + seconds
        await self._done.wait()

    def disown(self) -> None:
        """In a forked child: what is under way there has no thread."""
        self._forked = True
        self._blocking.disown()


def _first_lsn(info: SegmentInfo) -> int:
    return info.first_lsn


def _opened(directory: LogDirectory) -> OpenedLog:
    sealed, active = directory.shape()
    headers = [*(info.header for info in sealed), active.header]
    return OpenedLog(
        history=directory.history,
        first_lsn=directory.first_lsn,
        last_lsn=directory.last_lsn,
        ends={key_of(s): after.previous for s, after in zip(sealed, headers[1:], strict=True)},
    )


# -- before the log is opened -----------------------------------------------------------


async def ask_identity(archive: Archive, *, threaded: bool) -> Identity:
    """Whose archive it is; nobody's, as far as it does not say within `OPEN_SECONDS`.

    Raises:
      WrongDirectoryError, UnsupportedFormatError: it is no archive, or a newer version's.
    """
    blocking = Blocking(threaded=threaded, abandons=True)
    identity = Identity(None)
    with trio.move_on_after(OPEN_SECONDS):
        try:
            await blocking(probe, archive)
            identity = await blocking(read_identity, archive)
        except (WrongDirectoryError, UnsupportedFormatError):
            raise
        except Exception:  # noqa: BLE001  (the task will say so, again and again)
            pass
    return identity


def checking(
    archive: Archive, identity: Identity, check: Callable[[Plan], int | None] | None
) -> Callable[[Plan], int | None]:
    """``check``, after a look whether it is the log's own archive."""

    def check_both(plan: Plan) -> int | None:
        meta = plan.meta
        identity.check(archive, None if meta is None else UUID(bytes=meta.log_uuid))
        return None if check is None else check(plan)

    return check_both
