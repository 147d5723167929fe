"""What a database, a reader of it and a replica count.

Law: values only; nothing here looks anything up.  A module of its own, so that a log does not
load it.
"""

from collections.abc import Mapping
from typing import final

import attrs

from ._exports import publish
from ._statistics import ConsumerStatistics, WalStatistics


@final
@attrs.frozen(kw_only=True)
class DatabaseStatistics:
    """A look at the database at one moment; what `Database.statistics` returns."""

    wal: WalStatistics
    """Of the log in front."""
    consumers: Mapping[str, ConsumerStatistics]
    """All that there are, by name, in use or not; also in ``wal``."""
    transactions: int
    """Transactions with writes that became durable in this session."""
    conflicts: int
    """Commits refused with `TransactionConflict`."""
    pending: int
    """Commits on their way to the disk."""
    memtable_keys: int
    """Keys with a newer value than the store has."""
    memtable_bytes: int
    """Memory of the keys and values that are newer than the store, estimated."""
    tasks_waiting_checkpoint: int
    """Tasks that wait to begin a transaction because checkpoints have fallen behind."""
    open_readers: int
    """Snapshots and transactions that hold a view."""
    checkpoint_lsn: int
    """Up to here the store holds everything."""
    checkpoints: int
    """Checkpoints of this session."""
    checkpoint_seconds_last: float
    """How long the last checkpoint wrote."""
    store_keys: int
    """Keys in the store."""
    store_bytes: int
    """Size of the store's file."""


@final
@attrs.frozen(kw_only=True)
class DatabaseReaderStatistics:
    """A look at a reader at one moment; what `DatabaseReader.statistics` returns."""

    durable_lsn: int
    """The newest transaction that is seen by the reader."""
    checkpoint_lsn: int
    """Up to here the store that is read has everything."""
    memtable_keys: int
    """Keys with a newer value than the store has."""
    memtable_bytes: int
    """Memory of the keys and values that are newer than the store, estimated."""
    open_readers: int
    """Snapshots and streams that hold a view."""
    store_bytes: int
    """Size of the store's file."""
    consumers: Mapping[str, ConsumerStatistics]
    """All that the database has, by name."""
    following: bool
    """Whether the reader follows the log; False: something was found that cannot be read, which
    every call tells."""


@final
@attrs.frozen(kw_only=True)
class ReplicaStatistics:
    """A look at a replica at one moment; what `Replica.statistics` returns."""

    lsn: int
    """The newest transaction that the replica shows."""
    known_lsn: int
    """The newest transaction that the log is known to have."""
    lag_seconds: float
    """For how long the replica has been behind the log; 0 where it is not."""
    transactions: int
    """Transactions that the replica has applied in this session."""
    checkpoint_lsn: int
    """Up to here its store holds everything."""
    memtable_keys: int
    """Keys with a newer value than the store has."""
    open_readers: int
    """Snapshots that hold a view."""


publish(DatabaseReaderStatistics, DatabaseStatistics, ReplicaStatistics)
