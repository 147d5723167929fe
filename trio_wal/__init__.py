"""A write-ahead log for trio: group commit, bounded memory, recovery that tells the truth.

Start with `open_wal`.  The modules, from bytes to tasks: ``_files`` ``_system`` ``_disk``
(blocking), ``_queue`` ``_flusher`` ``_reader`` ``_wal`` (trio); ``trio_wal.testing`` has files in
memory with faults.

Law: a name is loaded when it is used, with what it needs and nothing else.  So the log alone does
not load the database, and neither of them what needs an extra.
"""

import typing as _typing
from importlib import import_module as _import_module

if _typing.TYPE_CHECKING:
    from ._archive import Archive as Archive, DirectoryArchive as DirectoryArchive
    from ._caslog import RemoteLog as RemoteLog
    from ._changes import Commit as Commit, CommitStream as CommitStream
    from ._consumer import Consumer as Consumer
    from ._database import Database as Database
    from ._database_consumer import DatabaseConsumer as DatabaseConsumer
    from ._database_reader import (
        DatabaseReader as DatabaseReader,
        open_database_reader as open_database_reader,
    )
    from ._database_statistics import (
        DatabaseReaderStatistics as DatabaseReaderStatistics,
        DatabaseStatistics as DatabaseStatistics,
        ReplicaStatistics as ReplicaStatistics,
    )
    from ._database_writer import DatabaseWriter as DatabaseWriter
    from ._engine import Record as Record, RecoveryReport as RecoveryReport
    from ._exceptions import (
        CorruptLogError as CorruptLogError,
        KeyExistsError as KeyExistsError,
        LogDivergedError as LogDivergedError,
        LogFailedError as LogFailedError,
        LogFencedError as LogFencedError,
        LogFullError as LogFullError,
        LogLockedError as LogLockedError,
        LogUnavailableError as LogUnavailableError,
        LsnTruncatedError as LsnTruncatedError,
        RecordTooLargeError as RecordTooLargeError,
        RestoreGapError as RestoreGapError,
        TableDecodeError as TableDecodeError,
        TransactionConflict as TransactionConflict,
        UnsupportedFormatError as UnsupportedFormatError,
        UnsupportedOperationError as UnsupportedOperationError,
        UntrustedDirectoryError as UntrustedDirectoryError,
        WalError as WalError,
        WrongDirectoryError as WrongDirectoryError,
    )
    from ._files import Files as Files
    from ._flusher import Durability as Durability
    from ._health import Health as Health, HealthReason as HealthReason
    from ._identity import Bookmark as Bookmark
    from ._local import SyncIn as SyncIn
    from ._objects import ObjectArchive as ObjectArchive
    from ._opening import (
        VerifyStore as VerifyStore,
        open_database as open_database,
        open_replica as open_replica,
    )
    from ._operations import Operation as Operation
    from ._pairs import PairStream as PairStream
    from ._reader import LogReader as LogReader, open_reader as open_reader
    from ._repair import Damage as Damage, RepairReport as RepairReport, repair as repair
    from ._replica import Replica as Replica
    from ._restore import RestoreReport as RestoreReport, restore as restore
    from ._retention import (
        KeepAll as KeepAll,
        KeepBytes as KeepBytes,
        KeepFor as KeepFor,
        KeepSegments as KeepSegments,
        Retention as Retention,
    )
    from ._snapshot import Snapshot as Snapshot
    from ._statistics import (
        ConsumerStatistics as ConsumerStatistics,
        WalStatistics as WalStatistics,
        WriterStatistics as WriterStatistics,
    )
    from ._stream import RecordStream as RecordStream
    from ._table import Readable as Readable, Table as Table
    from ._transaction import Transaction as Transaction
    from ._wal import WriteAheadLog as WriteAheadLog, open_wal as open_wal
    from ._writer import Writer as Writer

__version__ = "0.2.0"

_NAMES = {
    "_archive": "Archive DirectoryArchive",
    "_caslog": "RemoteLog",
    "_changes": "Commit CommitStream",
    "_consumer": "Consumer",
    "_database": "Database",
    "_database_consumer": "DatabaseConsumer",
    "_database_reader": "DatabaseReader open_database_reader",
    "_database_statistics": "DatabaseReaderStatistics DatabaseStatistics ReplicaStatistics",
    "_database_writer": "DatabaseWriter",
    "_engine": "Record RecoveryReport",
    "_exceptions": (
        "CorruptLogError KeyExistsError LogDivergedError "
        "LogFailedError LogFencedError LogFullError "
        "LogLockedError LogUnavailableError LsnTruncatedError "
        "RecordTooLargeError RestoreGapError TableDecodeError "
        "TransactionConflict UnsupportedFormatError UnsupportedOperationError "
        "UntrustedDirectoryError WalError WrongDirectoryError "
    ),
    "_files": "Files",
    "_flusher": "Durability",
    "_health": "Health HealthReason",
    "_identity": "Bookmark",
    "_local": "SyncIn",
    "_objects": "ObjectArchive",
    "_opening": "VerifyStore open_database open_replica",
    "_operations": "Operation",
    "_pairs": "PairStream",
    "_reader": "LogReader open_reader",
    "_repair": "Damage RepairReport repair",
    "_replica": "Replica",
    "_restore": "RestoreReport restore",
    "_retention": "KeepAll KeepBytes KeepFor KeepSegments Retention",
    "_snapshot": "Snapshot",
    "_statistics": "ConsumerStatistics WalStatistics WriterStatistics",
    "_stream": "RecordStream",
    "_table": "Readable Table",
    "_transaction": "Transaction",
    "_wal": "WriteAheadLog open_wal",
    "_writer": "Writer",
}
"""What is public, by the module that has it."""
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
_EXTRAS = ("asyncio", "nats", "otel", "prometheus")
# For ``from trio_wal import *``; not written out, because type checkers read the imports above.
globals()["__all__"] = list(_WHERE)


def __getattr__(name: str) -> object:
    """The same object every time, in every thread: Python loads a module once."""
    if name in _EXTRAS:
        return _import_module(f"trio_wal.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(f"trio_wal.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
