"""`restore`: a log or a database as it was at some place, made of what was archived.

Law: promises, and the checks of what users pass; the work is done in one thread, by `_sources`,
`_restorable` and `_restoring`.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Final, final

import attrs
from trio.lowlevel import enable_ki_protection

from ._archive import Archive, check_archive
from ._base import Progress
from ._disk.frame import to_datetime
from ._exports import publish
from ._files import Files
from ._identity import EPOCH_MAX, epoch_of
from ._park import require_trio
from ._restorable import RestorePlan, Target, make_plan, time_of
from ._restoring import restore_to
from ._sources import opened_sources
from ._system.files import OsFiles
from ._util import INT_MAX, check_bool, check_int, check_path
from ._worker import Blocking, cancellation_check

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


@final
@attrs.frozen(kw_only=True)
class RestoreReport:
    """What `restore` has made, or would make."""

    path: str
    """Of the log or database, absolute."""
    uuid: uuid.UUID
    """The log's: that of what it was made of."""
    database: bool
    """Whether it is a database; else it is a log."""
    first_lsn: int
    """The oldest record that its log has; ``last_lsn + 1`` where it has none."""
    last_lsn: int
    """The place to which it was restored."""
    last_time: datetime | None
    """When the record ``last_lsn`` was written, UTC; None where only a backup was needed."""
    epoch: int
    """Of the history that was restored.  The first open of what was made begins another one."""
    backup_lsn: int | None
    """The LSN of the backup that it begins with; None: with none."""
    segments: int
    """Segments that it took."""
    bytes: int
    """Of these, and of the backup."""
    dry_run: bool
    """Whether nothing was made."""


def _check_time(to_time: object) -> int:
    """Microseconds since 1970."""
    if not isinstance(to_time, datetime):
        raise TypeError(f"to_time must be a datetime, not {type(to_time).__name__}")
    if to_time.utcoffset() is None:
        raise ValueError(f"to_time must have a time zone, not {to_time.isoformat()}")
    since = to_time - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def _check_target(to_lsn: int | None, to_time: datetime | None, epoch: int | None) -> Target:
    if to_lsn is not None and to_time is not None:
        raise ValueError("to_time cannot be combined with to_lsn")
    return Target(
        lsn=None if to_lsn is None else check_int("to_lsn", to_lsn, 0, INT_MAX),
        time_us=None if to_time is None else _check_time(to_time),
        epoch=None if epoch is None else check_int("epoch", epoch, 0, EPOCH_MAX),
    )


@enable_ki_protection
async def restore(
    source: Archive | str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    to_lsn: int | None = None,
    to_time: datetime | None = None,
    epoch: int | None = None,
    tail: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    files: Files | None = None,
) -> RestoreReport:
    """Make a log or a database of what was archived, as it was at some place::

        noon = datetime(2026, 11, 29, 12, 0, tzinfo=timezone.utc)
        await trio_wal.restore(archive, "bank.db", to_time=noon)

    A database begins with the newest backup before that place, or without one at LSN 1; then all
    segments up to there.  Every byte is checked: by its digest, frame by frame, and that each
    segment continues the one before it.

    What it makes is opened by `open_database` or `open_wal`, and begins a new epoch then: it and
    what it is a copy of may give the same LSN to different records from there on.  It may go on
    with the same archive.  The places of a log's consumers are not restored: they start over.

    It is made under another name next to ``dest`` and renamed when it is durable.  Cancelled, it
    ends at the next mebibyte, and nothing of it is left.

    Args:
      source: an archive; or a path: of a `DirectoryArchive`, of a backup that nobody has opened
          yet, or of a log, of which a beginning is wanted.
      dest: a directory that does not exist yet.
      to_lsn: the last record that is wanted; None: all that there is.
      to_time: with a time zone; the last commit at or before that time.
      epoch: of the log's histories that which was today's in this epoch: to have back what a
          `WriteAheadLog.truncate_after` has dropped.  None: the newest.
      tail: the directory of a log or a database that has more than the archive, and is not open:
          what was not archived yet when it ended.
      dry_run: find out what would be made, and make nothing.  Manifests are read, and of one
          segment the times, but no digest is checked.
      on_progress: called, in a worker thread, with the bytes that are there so far and the bytes
          that there are.
      files: another file system, such as `trio_wal.testing.MemoryFiles`, for all paths.

    Raises, and nothing was made:
      TypeError, ValueError: an argument is wrong; the message names it.
      RestoreGapError: something is missing, or the place is before the first one or after the end.
      FileExistsError: ``dest`` exists.
      FileNotFoundError: there is no such source or tail, or what a manifest names is gone.
      WrongDirectoryError: the source, or the tail, is something else.
      LogLockedError: the tail is open.
      LogDivergedError: nothing is there of this epoch.
      CorruptLogError: something is damaged, or several logs' things are mixed.
      UnsupportedFormatError: a newer trio-wal wrote it.
      OSError: the operating system's, or the archive's own.
    """
    given = os.fspath(source) if isinstance(source, (str, os.PathLike)) else source
    used = OsFiles() if files is None else files
    where = check_path(given) if isinstance(given, str) else check_archive("source", given)
    path, end = check_path(dest), None if tail is None else check_path(tail)
    target = _check_target(to_lsn, to_time, epoch)
    check_bool("dry_run", dry_run)
    require_trio("restore")
    check = cancellation_check(threaded=used.threaded)

    def run() -> RestoreReport:
        return _restore(used, where, used.absolute(path), target, end, dry_run, on_progress, check)

    return await Blocking(threaded=used.threaded)(run)


def _restore(
    files: Files,
    source: Archive | str,
    dest: str,
    target: Target,
    tail: str | None,
    dry_run: bool,
    on_progress: Progress | None,
    check: Callable[[], None],
) -> RestoreReport:
    if files.exists(dest):
        raise FileExistsError(errno.EEXIST, "the destination of the restore already exists", dest)
    with opened_sources(files, source, tail) as there:
        plan = make_plan(there, target)
        done, total = 0, plan.bytes

        def tick(count: int) -> None:
            nonlocal done
            check()
            done += count
            if on_progress is not None:
                on_progress(done, total)

        check()
        last_time = None
        if not dry_run:
            last_time = restore_to(files, dest, plan, tick).last_time
        return _report(dest, plan, last_time, dry_run)


def _report(
    dest: str, plan: RestorePlan, last_time: datetime | None, dry_run: bool
) -> RestoreReport:
    if dry_run and plan.pieces:
        last_time = to_datetime(time_of(plan.pieces[-1], plan.lsn))
    return RestoreReport(
        path=dest,
        uuid=plan.uuid,
        database=plan.database,
        first_lsn=plan.first_lsn,
        last_lsn=plan.lsn,
        last_time=last_time,
        epoch=epoch_of(plan.history),
        backup_lsn=None if plan.base is None else plan.base.lsn,
        segments=len(plan.pieces),
        bytes=plan.bytes,
        dry_run=dry_run,
    )


publish(RestoreReport, restore)
