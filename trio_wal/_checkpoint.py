"""Moving committed state into the store, beside the writers.

Law: one checkpoint at a time.  The frozen layer goes into the store in a worker thread, and
the LSN that it reaches with the last piece of it; only when that is synced may the log drop
what it covers.  A checkpoint that is interrupted anywhere is simply done again.
"""

from __future__ import annotations

import logging
from time import perf_counter
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import enable_ki_protection

from ._engine import Forked
from ._events import tell
from ._exceptions import CorruptLogError, LogFailedError, LogFullError
from ._log import Log
from ._store import MapFull, StoreState, taking_turns
from ._util import MiB

if TYPE_CHECKING:
    from ._database import Database
    from ._memtable import Layer

RETRY_SECONDS: Final = 1.0
PIECE_BYTES: Final = 4 * MiB
"""What goes into the store, and is synced, at once."""
READERS_PATIENCE_SECONDS: Final = 5.0
"""How long a full map waits for those who read before writers are told."""
DISK_PATIENCE_SECONDS: Final = 5.0
"""How long checkpoints may fail before writers who wait for one are told."""


class Checkpointer:
    """The task that checkpoints by itself, and what `Database.checkpoint` calls."""

    def __init__(self, db: Database, log: Log, state: StoreState) -> None:
        self._db = db
        self._log = log
        self.state = state
        """What the store holds, durably."""
        self._one = trio.Lock()
        self._wanted = trio.Event()
        self._stopping = trio.CancelScope()
        self.done = trio.Event()
        self._started = False
        self.count = 0
        self.seconds_last = 0.0
        self._stuck: LogFullError | None = None
        """The map is full, and somebody reads."""
        self._failing_since: float | None = None
        """In trio's time; None: the last one passed."""
        self._failing: LogFullError | None = None
        """They have been failing for a while."""

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
                        if not self._db._checkpoint_due():
                            continue
                        try:
                            await self.checkpoint()
                        except (OSError, LogFullError, CorruptLogError) as exc:
                            text = f"checkpoint failed, will try again: {exc!r}"
                            path = self._db.path
                            tell(logging.WARNING, "checkpoint_failed", path, text, error=repr(exc))
                            self.wake()
                            # The log may be broken too: who waits for room must hear of it.
                            self._db._wake_waiting_for_room()
                            await trio.sleep(RETRY_SECONDS)
            except Forked:
                pass
            except (LogFailedError, trio.ClosedResourceError):
                # The writers are told; here there is nothing more to do.
                self._db._wake_waiting_for_room()
            finally:
                if not self._db._disowned:
                    self.done.set()

    def start(self) -> None:
        self._started = True
        self._log.start_soon(self.run)

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
        if self._db._memtable.view.frozen is not None:
            # One that was interrupted; what was committed since comes after it.
            await self._checkpoint()
        return await self._checkpoint()

    async def _checkpoint(self) -> int:
        db = self._db
        memtable = db._memtable
        frozen = memtable.view.frozen
        if frozen is None:
            active = memtable.view.active
            if not active.versions and not active.last_lsn:
                return self.state.lsn
            frozen = memtable.freeze()
            db._refresh_view()
        await db._wait_settled(frozen.last_seq)
        if self._log.durable_lsn < frozen.last_lsn:
            # Where durability is less than "sync": the store must never be ahead of the log.
            await self._log.flush()
        lsn = max(frozen.last_lsn, self.state.lsn)
        state = StoreState(self.state.log_uuid, lsn)
        started = perf_counter()
        try:
            await self._store(frozen, state)
        except (OSError, CorruptLogError) as exc:
            self._failed(frozen, exc)
            raise
        self.seconds_last = perf_counter() - started
        passes_again = self._failing_since is not None
        self._failing_since = self._failing = None
        tell(
            logging.INFO if passes_again else logging.DEBUG,
            "checkpoint",
            db.path,
            f"checkpoint up to LSN {lsn} in {self.seconds_last:.3f} seconds"
            + (": they pass again" if passes_again else ""),
            lsn=lsn,
            seconds=self.seconds_last,
            passes_again=passes_again,
        )
        self.count += 1
        self.state = state
        db._checkpointed(frozen, lsn)
        return lsn

    async def _store(self, frozen: Layer, state: StoreState) -> None:
        db = self._db
        if self._stuck is not None:
            await self._wait_unread(frozen)
        if not db._reading and db._store.crowded(frozen.log_bytes):
            # Early, while nobody reads: later it may have to wait for that.
            self._grow(frozen)
        while True:
            try:
                await db._blocking(self._apply, frozen, state)
                return
            except MapFull:
                await self._wait_unread(frozen)
                self._grow(frozen)

    def _failed(self, frozen: Layer, exc: OSError | CorruptLogError) -> None:
        """It may pass at the next try; but nobody shall wait for that for ever."""
        now = trio.current_time()
        if self._failing_since is None:
            self._failing_since = now
        seconds = now - self._failing_since
        if seconds >= DISK_PATIENCE_SECONDS:
            self._failing = LogFullError(
                self._db._store.path,
                frozen.log_bytes,
                f"checkpoints have been failing for {seconds:.0f} seconds, and are tried again: "
                f"{exc}",
            )
            self._failing.__cause__ = exc

    @enable_ki_protection
    async def backup(self, path: str) -> int:
        """A copy of the store as of now, and an empty log that goes on behind it."""
        async with self._one:
            await self._everything()
            await trio.lowlevel.checkpoint_if_cancelled()
            with trio.CancelScope(shield=True):
                await self._copy(path, self.state)
            return self.state.lsn

    async def _copy(self, path: str, state: StoreState) -> None:
        """Under another name, so that nothing is ever there half, and what failed can be tried
        again."""
        db, files, blocking = self._db, self._db._files, self._db._blocking
        temporary = await blocking(files.begin_directory, path)
        try:
            await blocking(db._store.copy, f"{temporary}/store")
            await self._log.engine.branch(f"{temporary}/log", state.lsn)
            await blocking(files.finish_directory, temporary, path)
        except BaseException:
            await blocking(files.discard_directory, temporary)
            raise

    def _apply(self, frozen: Layer, state: StoreState) -> None:
        """In the order of keys, in which LMDB writes its tree page by page.

        In pieces, because the log shares the disk: its syncs would wait for one sync of
        everything.  The last piece carries the LSN.  Of a checkpoint that is interrupted
        the store has some newer values than its LSN says, and the log still has them all:
        replay sets every one of these keys again.
        """
        # Two lists, not one of pairs, which the garbage collector would take for its business.
        keys: list[bytes] = []
        values: list[bytes | None] = []
        size = 0
        for key, value in taking_turns(frozen.items()):
            keys.append(key)
            values.append(value)
            size += len(key) + (0 if value is None else len(value))
            if size >= PIECE_BYTES:
                self._db._store.apply(zip(keys, values, strict=True), None)
                keys, values = [], []
                size = 0
        self._db._store.apply(zip(keys, values, strict=True), state)

    async def _wait_unread(self, frozen: Layer) -> None:
        """LMDB's map grows only while nobody reads.

        Whoever reads may himself be waiting for room in the memtable, and so for this:
        after a while that is an error instead.
        """
        db = self._db
        with trio.move_on_after(READERS_PATIENCE_SECONDS) as scope:
            await db._wait_unread()
        if scope.cancelled_caught:
            self._stuck = LogFullError(
                db._store.path,
                frozen.log_bytes,
                "the store's map is full and cannot grow while snapshots or transactions that "
                "have read are open; end them, or open the database with a larger map_size",
            )
            db._wake_waiting_for_room()  # to be told
            raise self._stuck.again()
        self._stuck = None

    def check_room(self) -> None:
        """Raises `LogFullError` where there will be no room before readers leave, or before
        the disk is mended."""
        if self._failing is not None:
            raise self._failing.again()
        if self._stuck is not None and self._db._reading:
            raise self._stuck.again()

    def _grow(self, frozen: Layer) -> None:
        """Nobody reads, and nothing else runs: no await in here."""
        store = self._db._store

        def grow() -> None:
            store.grow()
            while store.crowded(frozen.log_bytes):
                store.grow()

        try:
            self._db._memtable.reopen_base(grow)
        except (OSError, CorruptLogError):
            # The store may be closed: it must be tried again, whoever asked for this.
            self.wake()
            raise
        finally:
            self._db._refresh_view()


async def settle_quietly(log: Log) -> None:
    """Wait for what is queued; who waits for it is told by others what became of it."""
    try:
        await log.flush()
    except (LogFullError, LogFailedError):
        # What was pending has been withdrawn.
        await trio.lowlevel.checkpoint()
