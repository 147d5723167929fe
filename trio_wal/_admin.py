"""What is asked of a log's, a database's or an archive's files, for the command line.

Law: blocking, no trio, takes no lock, writes nothing.  It composes `_disk`, `_store` and what
archives are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from uuid import UUID

import attrs

from ._archive import Archive
from ._archived import PassingFile, check_archived
from ._disk.finding import Finding, finding_of
from ._disk.frame import to_datetime
from ._disk.verify import LOOK_TRIES, Progress, Verification, verify
from ._exceptions import (
    CorruptLogError,
    RestoreGapError,
    UnsupportedFormatError,
    WrongDirectoryError,
)
from ._files import Directory, close_quietly
from ._restorable import Base, Piece, Restorable, Target, first_restorable, make_plan
from ._sources import ArchiveContent, look_at_archive
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
    except (CorruptLogError, UnsupportedFormatError):
        return True


# -- archives ---------------------------------------------------------------------------


@attrs.frozen
class ArchiveVerification:
    """What `verify_archive` found."""

    uuid: UUID | None
    """The log's; None: nothing says it."""
    findings: tuple[Finding, ...]
    segments: int
    """Segments that are whole."""
    backups: int
    """Backups that are whole."""
    bytes: int
    """Of both."""
    first_lsn: int | None
    """The first LSN to which the newest history can be restored; None: to none."""
    last_lsn: int | None
    """The last one before a gap, or the end."""
    last_time: datetime | None
    """When that was written; None: not known."""


def list_archive(archive: Archive) -> ArchiveContent:
    """What an archive says that it has.

    Raises:
      WrongDirectoryError, UnsupportedFormatError, OSError
    """
    return look_at_archive(archive)


def verify_archive(archive: Archive, progress: Progress | None = None) -> ArchiveVerification:
    """Read every object of an archive: its digest, and of a segment every frame; and see how far
    it can be restored.

    Raises:
      WrongDirectoryError, UnsupportedFormatError, OSError
    """
    content = look_at_archive(archive)
    findings = [Finding(exc.path, exc.offset, exc.reason) for exc in content.damaged]
    sizes = [piece.manifest.size for piece in content.pieces]
    sizes += [base.manifest.size for base in content.bases]
    total, done = sum(sizes), 0
    whole_pieces: list[Piece] = []
    whole_bases: list[Base] = []

    def counted(pieces: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal done
        for piece in pieces:
            yield piece
            done += len(piece)
            if progress is not None:
                progress(min(done, total), total)

    for piece in content.pieces:
        told = piece.manifest
        check = partial(check_archived, told.data, counted(piece.content()), told)
        if _holds(told.data, findings, check):
            whole_pieces.append(piece)
    for base in content.bases:
        check = partial(_check_base, base, counted(base.content()))
        if _holds(base.manifest.data, findings, check):
            whole_bases.append(base)
    there = Restorable(name=repr(archive), pieces=whole_pieces, bases=whole_bases)
    return _reachable(there, findings, total)


def _holds(name: str, findings: list[Finding], check: Callable[[], None]) -> bool:
    """Whether an object is what it should be; else there is one finding more."""
    try:
        check()
    except (CorruptLogError, UnsupportedFormatError) as exc:
        findings.append(finding_of(exc, name))
        return False
    except FileNotFoundError:
        findings.append(Finding(name, 0, "the object that a manifest names is missing"))
        return False
    return True


def _check_base(base: Base, content: Iterable[bytes]) -> None:
    file = PassingFile(base.manifest.data, content)
    if (file.finish(), file.size) != (base.manifest.digest, base.manifest.size):
        reason = "what is kept is not what the manifest of the snapshot names"
        raise CorruptLogError(file.path, 0, reason)


def _reachable(there: Restorable, findings: list[Finding], size: int) -> ArchiveVerification:
    uuid = first = last = when = None
    try:
        plan = make_plan(there, Target())
        uuid, last = plan.uuid, plan.lsn
        first = plan.first_lsn if plan.base is None else first_restorable(there)
        if plan.pieces:
            when = to_datetime(plan.pieces[-1].manifest.last_time_us)
    except RestoreGapError as exc:
        uuid = there.check_uuid()
        first, last, when = exc.first_lsn, exc.last_lsn, exc.last_time
        findings.append(Finding(there.name, 0, exc.reason))
    except CorruptLogError as exc:
        findings.append(finding_of(exc, there.name))
    except WrongDirectoryError:
        if not findings:
            raise
    return ArchiveVerification(
        uuid=uuid,
        findings=tuple(findings),
        segments=len(there.pieces),
        backups=len(there.bases),
        bytes=size,
        first_lsn=first,
        last_lsn=last,
        last_time=when,
    )
