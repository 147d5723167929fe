"""A log on servers where users may give one: which it is, and which options it does not take.

Law: checks of arguments, of all calls that take such a log, and nothing else; its client is loaded
only where one is given.
"""

from __future__ import annotations

import os

from ._archive import Archive
from ._caslog import RemoteLog
from ._flusher import Durability
from ._local import SEGMENT_SIZE_MAX, VERIFY_BYTES, SyncIn, check_retention
from ._retention import Retention
from ._util import check_int


def remote_log(path: str | os.PathLike[str] | RemoteLog) -> RemoteLog | None:
    """The log on servers that is given in the place of a path; None: it is a path."""
    if isinstance(path, str) and path.startswith(("nats://", "tls://")):
        from .nats import Log as NatsLog

        return NatsLog.parse(path)
    return path if isinstance(path, RemoteLog) else None


def check_remote_log(log: object) -> RemoteLog:
    """The ``log`` of `open_database` and `open_replica`."""
    if not isinstance(log, (str, RemoteLog)):
        raise TypeError(f"log must be a trio_wal.nats.Log or its URL, not {type(log).__name__}")
    found = remote_log(log)
    if found is None:
        raise ValueError(f"log must be a trio_wal.nats.Log or its URL, not {log!r}")
    return found


def refuse_options(what: str, **given: bool) -> None:
    """Raises `TypeError` that names the options which were given though they mean nothing."""
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise TypeError(f"{', '.join(wrong)}: not an option of {what}")


def check_remote(
    durability: Durability,
    segment_size: int,
    retention: Retention | None,
    compression: str | None,
    verify_bytes: float,
    sync_in: SyncIn,
    archive: Archive | None,
) -> None:
    """Those arguments of `open_wal` that a replicated log takes, or does not."""
    what = "a replicated log"
    refuse_options(
        what,
        compression=compression is not None,
        verify_bytes=verify_bytes != VERIFY_BYTES,
        archive=archive is not None,
        sync_in=sync_in != "thread",
    )
    if durability != "sync":
        raise ValueError(f"durability must be 'sync' for {what}, not {durability!r}")
    check_int("segment_size", segment_size, 1, SEGMENT_SIZE_MAX)
    check_retention(retention)
