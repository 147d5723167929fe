"""Moving committed state into the store, beside the writers.

Law: one checkpoint at a time.  The frozen layer goes into the store together with the LSN
that it reaches, in one LMDB transaction in a worker thread; only when that is synced may
the log drop what it covers.  A checkpoint that is interrupted anywhere changes nothing and
is simply done again.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import enable_ki_protection

from ._exceptions import LogFailedError, LogFullError
from ._recovery import create_empty
from ._store import MapFull, StoreState

if TYPE_CHECKING:
    from ._database import Database
    from ._memtable import Layer

log = logging.getLogger("trio_wal")

RETRY_SECONDS: Final = 1.0
SORT_RUN: Final = 4096
"""Keys that are sorted at once: about a millisecond."""


class Checkpointer:
    """The task that checkpoints by itself, and what `Database.checkpoint` calls."""

    def __init__(self, db: Database, state: StoreState) -> None:
        self._db = db
        self.state = state
        """What the store holds, durably."""
        self._one = trio.Lock()
        self._wanted = trio.Event()
        self._stopping = trio.CancelScope()
        self.done = trio.Event()
        self._started = False
        self.count = 0
        self.seconds_last = 0.0

    def wake(self) -> None:
        self._wanted.set()

    @enable_ki_protection
    async def run(self) -> None:
        """Checkpoint whenever asked to, until stopped."""
        with trio.CancelScope(shield=True):
            try:
                with self._stopping:
                    while True:
                        await self._wanted.wait()
                        self._wanted = trio.Event()
                        try:
                            await self.checkpoint()
                        except (OSError, LogFullError) as exc:
                            log.warning(
                                "%s: checkpoint failed, will try again: %r", self._db.path, exc
                            )
                            self.wake()
                            # The log may be broken too: who waits for room must hear of it.
                            self._db.wake_waiting_for_room()
                            await trio.sleep(RETRY_SECONDS)
            except (LogFailedError, trio.ClosedResourceError):
                # The writers are told; here there is nothing more to do.
                self._db.wake_waiting_for_room()
            finally:
                self.done.set()

    def start(self, nursery: trio.Nursery) -> None:
        self._started = True
        nursery.start_soon(self.run)

    async def stop(self) -> None:
        """Wait for a checkpoint that is being written; begin no other."""
        self._stopping.cancel()
        if self._started:
            await self.done.wait()
        async with self._one:
            pass

    @enable_ki_protection
    async def checkpoint(self) -> int:
        """Everything committed so far goes into the store; returns the LSN it holds."""
        async with self._one:
            return await self._everything()

    async def _everything(self) -> int:
        if self._db.memtable.view.frozen is not None:
            # One that was interrupted; what was committed since comes after it.
            await self._checkpoint()
        return await self._checkpoint()

    async def _checkpoint(self) -> int:
        db = self._db
        memtable = db.memtable
        frozen = memtable.view.frozen
        if frozen is None:
            if not memtable.view.active.versions:
                return self.state.lsn
            frozen = memtable.freeze()
            db.refresh_view()
        await db.wait_settled(frozen.last_seq)
        if db.wal.durable_lsn < frozen.last_lsn:
            # Where durability is less than "sync": the store must never be ahead of the log.
            await db.wal.flush()
        lsn = max(frozen.last_lsn, self.state.lsn)
        state = StoreState(self.state.log_uuid, lsn)
        started = perf_counter()
        while True:
            try:
                await db.blocking(self._apply, frozen, state)
                break
            except MapFull:
                await self._grow()
        self.seconds_last = perf_counter() - started
        self.count += 1
        self.state = state
        db.checkpointed(frozen, lsn)
        return lsn

    @enable_ki_protection
    async def backup(self, path: str) -> int:
        """A copy of the store as of now, and an empty log that goes on behind it."""
        async with self._one:
            await self._everything()
            await self._db.blocking(self._copy, path, self.state)
            return self.state.lsn

    def _copy(self, path: str, state: StoreState) -> None:
        files = self._db.files
        if files.exists(path):
            raise FileExistsError(17, "the destination of a backup exists", path)
        self._db.store.copy(f"{path}/store")
        directory = files.open_directory(f"{path}/log", create=True)
        try:
            create_empty(
                files,
                directory,
                log_uuid=state.log_uuid,
                first_lsn=state.lsn + 1,
                features=self._db.wal._directory.features,
            )
        finally:
            directory.close()

    def _apply(self, frozen: Layer, state: StoreState) -> None:
        versions = frozen.versions
        items = ((key, versions[key].value) for key in _in_order(versions))
        self._db.store.apply(items, state)

    async def _grow(self) -> None:
        """A larger map, which LMDB allows only while nobody reads."""
        await self._db.wait_unread()
        self._db.memtable.reopen_base(self._db.store.grow)
        self._db.refresh_view()


def _in_order(keys: Iterable[bytes]) -> Iterator[bytes]:
    """The keys ascending, so that LMDB's tree is written page by page.

    One sort of a million keys would hold the interpreter lock, and with it the event loop,
    for a second: short runs are sorted and merged.
    """
    iterator = iter(keys)
    runs: list[list[bytes]] = []
    while run := sorted(islice(iterator, SORT_RUN)):
        runs.append(run)
    return heapq.merge(*runs)


async def settle_quietly(db: Database) -> None:
    """Wait for what is queued; who waits for it is told by others what became of it."""
    try:
        await db.wal.flush()
    except (LogFullError, LogFailedError):
        # What was pending has been withdrawn.
        await trio.lowlevel.checkpoint()
