"""Recovering a crash image with the real recovery, and reading back what it found.

Law: blocking, no tasks: what `open_wal` and `open_database` do in their threads, called
directly, since an image is recovered a hundred thousand times a minute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from itertools import pairwise
from typing import Any

import attrs

import trio_wal
from trio_wal._base import StoreState
from trio_wal._disk.chain import LOG_NAME, STORE_NAME
from trio_wal._disk.cursor import Cursor
from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.frame import BLOCK, FrameError, decode_segment_header, segment_name_lsn
from trio_wal._disk.opening import open_log_directory
from trio_wal._disk.recovery import Plan
from trio_wal._engine import Record
from trio_wal._local import DirectoryLocator
from trio_wal._operations import decode_transaction, encode_transaction, moves_in
from trio_wal._places import CommitPlaces, Place
from trio_wal.testing import MemoryFiles

from ._promises import State, Wrong, apply
from ._remembered import Memory

LOG = "/log"
DB = "/db"
Pair = tuple[int, bytes]
"""(LSN, payload)"""


@attrs.frozen
class Recovered:
    """An opened log, or database, and what it holds."""

    log: LogDirectory
    pairs: list[Pair]
    store_lsn: int = 0
    store_items: State = attrs.Factory(dict)
    store_state: StoreState | None = None

    @property
    def first_lsn(self) -> int:
        return self.log.first_lsn


def read_log(log: LogDirectory, memory: Memory | None = None) -> list[Record]:
    """Every record of an open log, as a reader gets it."""
    records: list[Record] = []
    last_lsn = log.last_lsn
    cursor = Cursor(DirectoryLocator(log), log.first_lsn)
    try:
        if memory is not None:
            for segment in log.sealed():
                records += memory.read_sealed(log, segment, cursor)
        while cursor.next_lsn <= last_lsn:
            records += cursor.chunk(last_lsn + 1)
    finally:
        cursor.leave()
    for before, after in pairwise(records):
        if after.timestamp < before.timestamp:
            raise Wrong("other", f"the time of LSN {after.lsn} is before the one before")
    return records


def recover_log(
    files: MemoryFiles,
    path: str = LOG,
    *,
    segment_size: int,
    verify_bytes: float = math.inf,
    check: Callable[[Plan], None] | None = None,
    database: bool = False,
    memory: Memory | None = None,
) -> Recovered:
    """What `open_wal` does before it yields."""
    with nullcontext() if memory is None else memory.of_recovery():
        log = open_log_directory(
            files,
            path,
            segment_size=segment_size,
            verify_bytes=verify_bytes,
            check=check,
            database=database,
        )
    report = log.report
    if (report.first_lsn, report.last_lsn) != (log.first_lsn, log.last_lsn):
        raise Wrong("other", f"the report tells of another log: {report}")
    return Recovered(log, [(record.lsn, record.data) for record in read_log(log, memory)])


def recover_database(
    files: MemoryFiles,
    path: str = DB,
    *,
    segment_size: int,
    verify_bytes: float = math.inf,
    memory: Memory | None = None,
) -> Recovered:
    """What `open_database` does before it yields, but for the replay into memory."""
    opener: Any = trio_wal.open_database(path, files=files)
    opener._prepare()
    found = recover_log(
        files,
        f"{path}/{LOG_NAME}",
        segment_size=segment_size,
        verify_bytes=verify_bytes,
        check=opener._check,
        database=True,
        memory=memory,
    )
    # Also of a first checkpoint that was interrupted: its pieces are there, its LSN is not.
    store = files._stores.get(f"{path}/{STORE_NAME}")
    if store is None:
        return found
    lsn = store.state.lsn if store.state else 0
    return Recovered(found.log, found.pairs, lsn, store.items, store.state)


def places_in(found: Recovered, *, database: bool) -> Mapping[str, Place]:
    """Of consumers, as the next program finds them."""
    if not database:
        return found.log.places.found
    state = found.store_state or StoreState(b"", 0)
    places = CommitPlaces(state.places, state.commit_lsn, state.lsn)
    for lsn, payload in found.pairs:
        if lsn > found.store_lsn and (moves := moves_in(payload)):
            places.record(lsn, moves, alone=not decode_transaction(payload))
    return places.now


def replayed(found: Recovered) -> State:
    """The state of a recovered database."""
    state = dict(found.store_items)
    for lsn, payload in found.pairs:
        if lsn > found.store_lsn:
            apply(state, decode_transaction(payload))
    return state


AFTER = encode_transaction({b"after": b"the crash"})
"""A record that is appended to recovered logs and databases."""


def append_after(log: LogDirectory) -> Pair:
    """Go on in a recovered log; durable on return."""
    log.write([AFTER], log.synced_lsn, sync=True)
    return log.last_lsn, AFTER


def is_reused(files: MemoryFiles) -> bool:
    """Whether the last segment of a log here has bytes of a dropped one behind its end."""
    for folder in files._folders.values():
        names = [name for name in folder.names if segment_name_lsn(name) is not None]
        with suppress(FrameError):
            if names and decode_segment_header(bytes(folder.names[max(names)].data[:BLOCK])).reused:
                return True
    return False


def fingerprint(files: MemoryFiles) -> int:
    """Tells images apart by everything that a recovery can see."""
    return hash(
        (
            tuple(
                (path, name, bytes(inode.data))
                for path, folder in sorted(files._folders.items())
                for name, inode in sorted(folder.names.items())
            ),
            tuple(
                (path, str(store.state), tuple(store.items.items()))
                for path, store in files._stores.items()
            ),
        )
    )
