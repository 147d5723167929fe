"""What is asked of a log's or a database's files as they lie on the disk, for the command line.

Law: blocking, no trio, takes no lock, writes nothing.  It composes `_disk` and `_store`, which do
not know each other.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from ._disk.finding import Finding
from ._disk.verify import LOOK_TRIES, Progress, Verification, verify
from ._exceptions import CorruptLogError, WrongDirectoryError
from ._files import Directory, close_quietly
from ._store_check import StoreCheck, check_store
from ._store_files import data_file, inspect_store, misfit


@attrs.frozen
class DatabaseVerification:
    """What `verify_database` found."""

    log: Verification | None
    """None: there is no log that could be looked at."""
    store: StoreCheck
    findings: tuple[Finding, ...]
    """The log's, the store's, and why the two do not fit."""


def verify_database(
    log_path: str,
    store_path: str,
    open_log: Callable[[], Directory],
    progress: Progress | None = None,
) -> DatabaseVerification:
    """Check log, store, and that they belong together.

    Raises:
      UnsupportedFormatError, ModuleNotFoundError, OSError: as `verify`.
    """
    tries = 0
    while True:
        tries += 1
        store, findings = _verify_store(store_path, progress)
        try:
            directory = open_log()
            try:
                log = verify(directory, progress)
            finally:
                close_quietly(directory)
        except (CorruptLogError, WrongDirectoryError, FileNotFoundError) as exc:
            findings.append(_no_log_finding(exc, log_path))
            return DatabaseVerification(None, store, tuple(findings))
        wrong = None
        if not findings:
            wrong = misfit(store.state, log.log_uuid, log.first_lsn, log.last_lsn)
        if wrong is None or tries == LOOK_TRIES or not _goes_on(store_path, store):
            break
    if wrong is not None:
        findings.append(Finding(store.path, 0, wrong))
    return DatabaseVerification(log, store, (*log.findings, *findings))


def _no_log_finding(error: Exception, log_path: str) -> Finding:
    if isinstance(error, CorruptLogError):
        return Finding(error.path, error.offset, error.reason)
    if isinstance(error, WrongDirectoryError):
        return Finding(error.path, 0, f"this is {error.found}")
    return Finding(log_path, 0, "the database has no log")


def _verify_store(path: str, progress: Progress | None) -> tuple[StoreCheck, list[Finding]]:
    try:
        store = check_store(path, progress)
    except CorruptLogError as exc:
        name = data_file(path)
        return StoreCheck(name, (), None, 0, 0), [Finding(exc.path, exc.offset, exc.reason)]
    return store, [Finding(store.path, offset, reason) for offset, reason in store.findings]


def _goes_on(path: str, store: StoreCheck) -> bool:
    """Whether there was a checkpoint since: then the log may begin behind what was looked at."""
    try:
        return inspect_store(path) != store.state
    except CorruptLogError:
        return True
