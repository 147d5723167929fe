"""Every error of the package's own, in one place.

Law: an error carries attributes, not only text; its message says what happened,
where (path, offset, LSN) and what to run next.  `trio` is imported here for one
base class only: `LogFailedError` must be caught by ``except trio.BrokenResourceError``.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import Literal

import trio

from ._exports import publish
from ._identity import Bookmark
from ._text import printable

Outcome = Literal["not written", "unknown"]


class WalError(Exception):
    """Base of every error that trio-wal defines itself."""


class CorruptLogError(WalError):
    """The log on disk is not what a crash can leave behind: something damaged it.

    Nothing was modified.  ``trio-wal verify DIR`` lists every finding.

    Attributes:
      path: the file (or directory) in which the damage was found.
      offset: the byte offset of the damage in that file; 0 where the file as a whole is wrong.
      reason: what is wrong there.
    """

    def __init__(self, path: str | os.PathLike[str], offset: int, reason: str) -> None:
        super().__init__(path, offset, reason)
        self.path: str = os.fspath(path)
        self.offset = offset
        self.reason = reason

    def __str__(self) -> str:
        return printable(
            f"{self.path}: at offset {self.offset}: {self.reason}; "
            "nothing was modified; 'trio-wal verify' lists every finding"
        )


class WrongDirectoryError(WalError, ValueError):
    """The path holds something else than the call opens: ``open_wal`` was given a database,
    ``open_database`` a log, or either of them a directory that is neither.

    Nothing was modified, and nothing is damaged.

    Attributes:
      path: what was given, or the ``log`` in it.
      found: what is there: ``"a database"``, ``"a log"``, ``"the log of a database"``; otherwise
          why it is neither.
      instead: what to call, or to give, instead.
    """

    def __init__(self, path: str | os.PathLike[str], found: str, instead: str) -> None:
        super().__init__(path, found, instead)
        self.path: str = os.fspath(path)
        self.found = found
        self.instead = instead

    def __str__(self) -> str:
        return printable(
            f"{self.path}: this is {self.found}: use {self.instead}; nothing was modified"
        )


class UnsupportedFormatError(WalError):
    """The log was written in a format that this version of trio-wal cannot read.

    Nothing was modified.

    Attributes:
      path: the file that says so.
      version: the format version found, or the unknown feature flags where the
          version is known but a feature is not.
      reason: which of the two it is, and of what.
      features: the names of those features, such as ``"bit 6"`` where this version has no name
          for it; empty where it is the version.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        version: int,
        reason: str = "format version",
        features: tuple[str, ...] = (),
    ) -> None:
        super().__init__(path, version, reason, features)
        self.path: str = os.fspath(path)
        self.version = version
        self.reason = reason
        self.features = features

    @property
    def what(self) -> str:
        """The version that is not supported, or the features with their names."""
        names = f" ({', '.join(self.features)})" if self.features else ""
        return f"{self.reason} {self.version}{names}"

    def __str__(self) -> str:
        return printable(
            f"{self.path}: {self.what} is not supported; "
            "nothing was modified; open it with the version of trio-wal that wrote it, "
            "or a newer one"
        )


class LogLockedError(WalError):
    """Another handle, in this process or another, owns the log or database.

    The page "Several processes" of the documentation says what to do about it.

    Attributes:
      path: the directory of the log or database.
      pid: the owner's process id; None where it cannot be told.
      database: whether it is a database.
      owner: how the owner of a replicated log names itself; otherwise None.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        pid: int | None,
        database: bool = False,
        owner: str | None = None,
    ) -> None:
        super().__init__(path, pid, database, owner)
        self.path: str = os.fspath(path)
        self.pid = pid
        self.database = database
        self.owner = owner

    def __str__(self) -> str:
        if self.owner is not None:
            return printable(
                f"{self.path}: the log is open in {self.owner}; close it there, "
                "read with open_reader(), or open it with takeover=True"
            )
        owner = "another process" if self.pid is None else f"process {self.pid}"
        what = "database" if self.database else "log"
        reader = "open_database_reader()" if self.database else "open_reader()"
        advice = f"or read with {reader}, which needs no lock"
        if self.pid != os.getpid():
            advice = f"close it there, {advice}"
        elif self.database:  # LMDB has no reader of a file that its process has open
            advice = "that is this process: use the Database that is open, for reading too"
        else:
            advice = f"that is this process: use the log that is open, {advice}"
        return printable(
            f"{self.path}: the {what} is open in {owner}; {advice} "
            "(see 'Several processes' in the documentation)"
        )


class UntrustedDirectoryError(WalError):
    """The directory of a log or database is not this user's alone; nothing was modified.

    The owner of a directory, and everybody who may write to it, can replace what is in it:
    with a log that says something else, or with one made to do harm.
    ``trust_directory=True`` opens it anyway.

    Attributes:
      path: the directory.
      reason: who else owns it or may write to it.
      remedy: how to change that.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path: str = os.fspath(path)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return printable(
            f"{self.path}: {self.reason}; {self.remedy}, or open it with trust_directory=True"
        )


class LogFullError(WalError):
    """There is no space for the next records; nothing was accepted.

    Either the disk has no space for the next segment; then ``__cause__`` is the operating
    system's error.  Or, for a database, the store's map is full and cannot grow while
    snapshots are open, or every checkpoint has failed for several seconds; then
    ``__cause__`` is the error of the last one.  Neither log nor database is broken: they
    work again when there is space.

    Attributes:
      path: the log's directory, or the store's.
      needed: bytes that the next segment, or checkpoint, needs.
      reason: what is full, if it is not the disk.
      database: whether it is a database or its log, which only checkpoints make shorter.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        needed: int,
        reason: str | None = None,
        database: bool = False,
    ) -> None:
        super().__init__(path, needed, reason, database)
        self.path: str = os.fspath(path)
        self.needed = needed
        self.reason = reason
        self.database = database

    def __str__(self) -> str:
        if self.reason is not None:
            return printable(f"{self.path}: no space for {self.needed} bytes: {self.reason}")
        truncate = "" if self.database else " or call truncate_before()"
        return printable(
            f"{self.path}: no space for a segment of {self.needed} bytes; nothing was "
            f"accepted; free disk space{truncate}, then try again"
        )

    def again(self) -> LogFullError:
        """The same error for one more task: a traceback belongs to one."""
        fresh = LogFullError(self.path, self.needed, self.reason, self.database)
        fresh.__cause__ = self.__cause__
        return fresh


class RecordTooLargeError(WalError, ValueError):
    """A record, or the sum of an ``append_many``, is over a limit; nothing was queued.

    Attributes:
      size: bytes asked for.
      limit: bytes allowed.
      parameter: the name of the limit.
    """

    def __init__(self, size: int, limit: int, parameter: str = "max_record_size") -> None:
        super().__init__(size, limit, parameter)
        self.size = size
        self.limit = limit
        self.parameter = parameter

    def __str__(self) -> str:
        return f"data of {self.size} bytes is over {self.parameter} of {self.limit} bytes"


class LsnTruncatedError(WalError, LookupError):
    """The records asked for are no longer in the log (or, for a reader overtaken by
    ``truncate_after``, no longer the same).

    Attributes:
      first_lsn: the first LSN that the log still holds.
      lsn: the LSN that was asked for; None where it is not known.
    """

    def __init__(self, first_lsn: int, lsn: int | None = None) -> None:
        super().__init__(first_lsn, lsn)
        self.first_lsn = first_lsn
        self.lsn = lsn

    def __str__(self) -> str:
        asked = "the records asked for have" if self.lsn is None else f"LSN {self.lsn} has"
        return (
            f"{asked} been truncated: the log now starts at LSN {self.first_lsn}; read from there"
        )


class LogDivergedError(LsnTruncatedError):
    """The log no longer holds what was read before: its history is a different one.

    ``truncate_after`` dropped records that had already been read, or this is a copy of the log
    that went on by itself, or the log never came as far as the place asked for.  State that was
    made from these records must go back to ``parted_after``, or be built anew.

    Attributes:
      path: the log's directory.
      bookmark: the place that is not in this log's history.
      parted_after: the last LSN up to which both histories are the same; None where the log
          does not know the bookmark's epoch.
      first_lsn: the first LSN at which the histories differ, or may differ.
    """

    def __init__(
        self, path: str | os.PathLike[str], bookmark: Bookmark, parted_after: int | None
    ) -> None:
        super().__init__(1 if parted_after is None else parted_after + 1, bookmark.lsn)
        self.path: str = os.fspath(path)
        self.bookmark = bookmark
        self.parted_after = parted_after

    def __reduce__(self) -> tuple[object, ...]:
        # Pickled by its own arguments: the base class has others.
        return type(self), (self.path, self.bookmark, self.parted_after)

    def __str__(self) -> str:
        if self.parted_after is None:
            common = "the log does not know that epoch: start over with what it holds"
        else:
            common = (
                f"the two are the same up to LSN {self.parted_after}: go back to there, "
                "or start over"
            )
        return printable(
            f"{self.path}: {self.bookmark} is not in the history of this log; {common}"
        )


class LogFailedError(WalError, trio.BrokenResourceError):
    """A write or a sync failed; the log is broken, and this handle accepts nothing more.

    ``__cause__`` is the `OSError`.  A sync is never retried: the kernel may have
    dropped the pages that it could not write and would report success.  Close the
    log, fix the disk, open it again: recovery finds what is durable.

    Attributes:
      path: the log's directory.
      outcome: ``"not written"``: the records of this call never reached the file;
          ``"unknown"``: they were in the batch being written, and only recovery can
          tell whether they are there.
    """

    def __init__(self, path: str | os.PathLike[str], outcome: Outcome) -> None:
        super().__init__(path, outcome)
        self.path: str = os.fspath(path)
        self.outcome: Outcome = outcome

    def again(self, outcome: Outcome) -> LogFailedError:
        """The same failure for one more task, whose records have an outcome of their own."""
        return LogFailedError(self.path, outcome)

    def __str__(self) -> str:
        fate = (
            "the records of this call were not written"
            if self.outcome == "not written"
            else "whether the records of this call are durable is unknown until the log is reopened"
        )
        return printable(
            f"{self.path}: a write or sync failed and the log is closed for writing; {fate}"
        )


class LogFencedError(LogFailedError):
    """Another owner has taken over the replicated log; this handle accepts nothing more.

    Its ``outcome`` is always ``"not written"``: the other owner's epoch begins where the batch
    in flight would have gone.  What was acknowledged before is in the log.  Open it again to
    take it over in turn, or leave it to the other owner.

    Attributes:
      epoch: the epoch that the other owner has begun.
      owner: how that owner names itself.
    """

    def __init__(
        self, path: str | os.PathLike[str], epoch: int, owner: str, outcome: Outcome = "not written"
    ) -> None:
        super().__init__(path, "not written")
        self.epoch = epoch
        self.owner = owner

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.epoch, self.owner)

    def again(self, outcome: Outcome) -> LogFailedError:
        """The same, for one more task; nothing of it was written either."""
        return LogFencedError(self.path, self.epoch, self.owner)

    def __str__(self) -> str:
        return printable(
            f"{self.path}: {self.owner} has taken this log over, with epoch {self.epoch}; the "
            "records of this call were not written; open the log again to take it back"
        )


class LogUnavailableError(LogFailedError):
    """The servers of a replicated log have not answered for as long as ``unavailable_after``
    allows; this handle accepts nothing more.

    Attributes:
      seconds: for how long they were asked.
      reason: how the last try failed.
      outcome: ``"unknown"`` for the batch in flight, which may be in the log, or may still get
          there; the next open settles that.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        seconds: float,
        reason: str,
        outcome: Outcome = "unknown",
    ) -> None:
        super().__init__(path, outcome)
        self.seconds = seconds
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.seconds, self.reason, self.outcome)

    def again(self, outcome: Outcome) -> LogFailedError:
        """The same, for one more task, whose records have an outcome of their own."""
        return LogUnavailableError(self.path, self.seconds, self.reason, outcome)

    def __str__(self) -> str:
        fate = (
            "the records of this call were not written"
            if self.outcome == "not written"
            else "whether the records of this call are durable is unknown until the log is reopened"
        )
        return printable(
            f"{self.path}: no answer from a majority of the servers for {self.seconds:.1f} seconds "
            f"({self.reason}); {fate}"
        )


class UnsupportedOperationError(WalError, TypeError):
    """This kind of log cannot do that; nothing was changed.

    Attributes:
      path: the log.
      operation: what was called.
      reason: why it is not possible.
    """

    def __init__(self, path: str | os.PathLike[str], operation: str, reason: str) -> None:
        super().__init__(path, operation, reason)
        self.path: str = os.fspath(path)
        self.operation = operation
        self.reason = reason

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.operation}() is not supported here: {self.reason}")


class UnsuitableServersError(WalError):
    """The servers, or the stream on them, would not keep what a log promises; nothing was written.

    Attributes:
      path: the log.
      reason: what is wrong.
      remedy: what to do.
    """

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path = path
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return printable(f"{self.path}: {self.reason}; {self.remedy}; nothing was written")


class RestoreGapError(WalError):
    """`restore` cannot reach what it was asked for, because something is missing; nothing was made.

    Attributes:
      path: the archive.
      reason: what is missing.
      first_lsn: the first LSN to which it can restore; None: to none.
      last_lsn: the last one before the gap, or before the end; None: it can restore to none.
      last_time: when the record ``last_lsn`` was written; None where that is not known.
    """

    def __init__(
        self,
        path: str,
        reason: str,
        first_lsn: int | None = None,
        last_lsn: int | None = None,
        last_time: datetime | None = None,
    ) -> None:
        super().__init__(path, reason, first_lsn, last_lsn, last_time)
        self.path = path
        self.reason = reason
        self.first_lsn = first_lsn
        self.last_lsn = last_lsn
        self.last_time = last_time

    def __str__(self) -> str:
        if self.first_lsn is None or self.last_lsn is None:
            return printable(f"{self.path}: {self.reason}; nothing was made")
        when = "" if self.last_time is None else f" ({self.last_time.isoformat()})"
        return printable(
            f"{self.path}: {self.reason}; nothing was made; it can be restored to "
            f"LSN {self.first_lsn} to {self.last_lsn}{when}"
        )


class TransactionConflict(WalError):
    """Another commit has changed something that the transaction read.

    Nothing of the transaction reached the log; run it again.

    Attributes:
      key: the key, or the first key of the scanned range, that changed.
      own: whether the transaction's own task changed it outside of the transaction, with
          ``db.put`` or ``db.delete``.  Trying again does not help then.
    """

    def __init__(self, key: bytes, own: bool = False) -> None:
        super().__init__(key, own)
        self.key = key
        self.own = own

    def __str__(self) -> str:
        if self.own:
            return (
                f"key {self.key!r}, read by this transaction, was changed by db.put() or "
                "db.delete() in its own block, which is another commit; "
                "use tx.put() or tx.delete() there"
            )
        return (
            f"key {self.key!r}, read by this transaction, was changed by another commit; "
            "run it again"
        )


class KeyExistsError(WalError):
    """``insert`` of a key that is already there.

    Attributes:
      key: that key.
    """

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"key {self.key!r} exists; use put() or update() to replace its value"


class TableDecodeError(WalError, ValueError):
    """A key or value in a table's part of the database does not decode: it was written with
    another type, or by hand.

    Attributes:
      table: the table's name.
      key: the key; if it is the key that does not decode, its bytes in the database.
      reason: what is wrong with it.
    """

    def __init__(self, table: str, key: object, reason: str) -> None:
        super().__init__(table, key, reason)
        self.table = table
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return printable(
            f"table {self.table!r}, key {self.key!r}: {self.reason}; it was written with another "
            "type of the table, or by hand"
        )


publish(
    CorruptLogError,
    KeyExistsError,
    LogDivergedError,
    LogFailedError,
    LogFencedError,
    LogFullError,
    LogLockedError,
    LogUnavailableError,
    LsnTruncatedError,
    RecordTooLargeError,
    RestoreGapError,
    TableDecodeError,
    TransactionConflict,
    UnsupportedFormatError,
    UnsupportedOperationError,
    UntrustedDirectoryError,
    WalError,
    WrongDirectoryError,
)
