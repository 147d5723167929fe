"""Opening a log in a directory: lock, look, decide, repair.

Law: nothing is written before nothing can be refused any more, and what an open that fails has
created is removed again.  Blocking; no trio.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from trio_wal._codec import require_zstd
from trio_wal._exceptions import (
    CorruptLogError,
    LogLockedError,
    UnsupportedFormatError,
    WrongDirectoryError,
)
from trio_wal._files import Directory, Files, close_quietly

from .chain import check_ours
from .directory import LogDirectory
from .frame import FEATURE_DATABASE, FEATURE_ZSTD
from .placesfile import read_places
from .recovery import VERIFY_BYTES, Plan, check_records, examine, reread_tail
from .repair import uncreate


def open_log_directory(
    files: Files,
    path: str,
    *,
    segment_size: int,
    verify_bytes: float = VERIFY_BYTES,
    compression: str | None = None,
    check: Callable[[Plan], int | None] | None = None,
    database: bool = False,
    trust_directory: bool = False,
) -> LogDirectory:
    """Lock, recover and open the log in a directory, which is created if it is missing.

    Args:
      check: looks at the plan before anything is written, and may refuse it; returns the LSN
          from which on all records will be read at once, and so are checked before, or None.

    Raises:
      LogLockedError, WrongDirectoryError, UntrustedDirectoryError, CorruptLogError,
      UnsupportedFormatError, LogFullError, OSError: what this open has created is removed
          again.
      ModuleNotFoundError: the log is compressed and zstandard is not installed.
    """
    if compression == "zstd":
        require_zstd()
    started_us = files.time_us()
    # A database's log is in the database, and not where a link leads.
    directory = _open_locked(files, path, follow=not database, trust_directory=trust_directory)
    plan: Plan | None = None
    found_names: frozenset[str] = frozenset()
    try:
        names = directory.names()
        found_names = frozenset(names)
        check_ours(directory, names)
        reread_tail(directory, names)
        plan = examine(directory, names, verify_bytes=verify_bytes)
        features = FEATURE_ZSTD if compression == "zstd" else 0
        if database:
            features |= FEATURE_DATABASE
        if plan.meta is not None:
            _check_features(directory.path, plan.meta.features, features, compression)
        if check is not None:
            read_from = check(plan)
            if read_from is not None:
                plan = check_records(directory, plan, read_from)
        places = {} if database or plan.meta is None else read_places(directory, plan.meta.log_uuid)
        if places:
            # Its name may be in the page cache only: no place may be taken back any more.
            directory.sync()
        # Only now, when nothing can be refused any more, is anything written.
        directory.sign(new=plan.meta is None)
        return LogDirectory(
            files,
            directory,
            plan,
            segment_size=segment_size,
            features=features,
            started_us=started_us,
            found_names=found_names,
            places=places,
        )
    except BaseException:
        with contextlib.suppress(OSError, CorruptLogError, UnsupportedFormatError):
            if plan is not None:
                uncreate(directory, found_names, created=plan.meta is None)
            directory.unmake()
        close_quietly(directory)
        raise


def _check_features(path: str, has: int, wanted: int, compression: str | None) -> None:
    """Whether a log with these features is what the caller wants to open."""
    database = wanted & FEATURE_DATABASE
    if database and not has & FEATURE_DATABASE:
        raise WrongDirectoryError(path, "a log, not a database's", "open_wal()")
    if not database and has & FEATURE_DATABASE:
        parent = path.rpartition("/")[0]
        raise WrongDirectoryError(path, "the log of a database", f"open_database({parent!r})")
    if compression is not None and has != wanted:
        raise ValueError(f"compression must be what the log was created with, not {compression!r}")
    if has & FEATURE_ZSTD:
        require_zstd()


def _open_locked(files: Files, path: str, *, follow: bool, trust_directory: bool) -> Directory:
    """The directory, made if it is missing, with this process as its owner."""
    while True:
        directory = files.open_directory(path, create=True, follow=follow)
        try:
            if not trust_directory:
                directory.check_trusted()
            directory.lock()
            if directory.is_there():
                return directory
        except BaseException as exc:
            if not isinstance(exc, LogLockedError):
                # Else another is its owner by now, even if it was made here.
                directory.unmake()
            close_quietly(directory)
            raise
        # Its owner failed to open it, and has removed what it had made.
        close_quietly(directory)
