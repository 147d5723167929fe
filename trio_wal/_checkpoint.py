"""Moving committed state into the store, while writers go on.

Law: one checkpoint at a time.  The frozen layer goes into the store in a worker thread, and
the LSN that it reaches with the last piece of it; only when that is synced may the log drop
what it covers.  A checkpoint that is interrupted anywhere is simply done again.  Writers are
known as `Versions`, the log as `CheckpointLog`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Final, Protocol, final

import trio
from trio.lowlevel import enable_ki_protection

from ._base import MapFull, Store, StoreState
from ._engine import Forked
from ._events import tell
from ._exceptions import CorruptLogError, LogFailedError, LogFullError
from ._health import HealthReason, checkpoints_behind, checkpoints_failing, store_stuck
from ._layer import Layer
from ._mvcc import LogStatus, Versions
from ._store import taking_turns
from ._util import MiB
from ._worker import Blocking

RETRY_SECONDS: Final = 1.0
PIECE_BYTES: Final = 4 * MiB
"""What goes into the store, and is synced, at once."""
READERS_PATIENCE_SECONDS: Final = 5.0
"""How long a full map waits for those who read before writers are told."""
DISK_PATIENCE_SECONDS: Final = 5.0
"""How long checkpoints may fail before writers who wait for one are told."""


class CheckpointLog(Protocol):
    """The log, as far as checkpoints need it."""

    @property
    def durable_lsn(self) -> int: ...

    @property
    def status(self) -> LogStatus: ...

    async def flush(self) -> int:
        """Make durable what was accepted before the call.

        Raises:
          LogFailedError, LogFullError: what was pending has been withdrawn.
          trio.ClosedResourceError
        """
        ...

    def hold(self, who: str, lsn: int) -> None:
        """The record ``lsn`` and what comes after it must not be dropped; what comes before
        may, as far as ``who`` is concerned."""
        ...


HOLD: Final = "store"
"""Under which name the log is held: by what the store does not have yet."""


@final
class Checkpointer:
    """The task that checkpoints by itself, and what `Database.checkpoint` calls."""

    def __init__(
        self,
        versions: Versions,
        store: Store,
        log: CheckpointLog,
        blocking: Blocking,
        state: StoreState,
    ) -> None:
        self._versions = versions
        self._store = store
        self._log = log
        self._blocking = blocking
        self._room = versions.room
        self.state: StoreState = state
        """What the store holds, durably."""
        self._one = trio.Lock()
        self._stopping = trio.CancelScope()
        self._done = trio.Event()
        self._started = False
        self.count: int = 0
        self.seconds_last: float = 0.0
        self.busy: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered while the store is written."""
        self.on_stored: Callable[[], None] = lambda: None
        """Called when the store holds more; what then lets go of the log does so at once."""
        self._failing_since: float | None = None
        """In trio's time; None: the last one passed."""
        self._failure: Exception | None = None
        """Why the last one did not."""

    @enable_ki_protection
    async def run(self) -> None:
        """Checkpoint whenever asked to, until stopped."""
        with trio.CancelScope(shield=True):
            try:
                with self._stopping:
                    while True:
                        await self._room.wait_asked()
                        if self._versions.checkpoint_due():
                            await self._try()
            except Forked:
                pass
            except (LogFailedError, trio.ClosedResourceError):
                # The writers are told; here there is nothing more to do.
                self._room.tell()
            finally:
                if not self._log.status.disowned:
                    self._done.set()

    async def _try(self) -> None:
        try:
            await self.checkpoint()
        except (OSError, LogFullError, CorruptLogError) as exc:
            text = f"checkpoint failed, will try again: {exc!r}"
            path = self._versions.path
            tell(logging.WARNING, "checkpoint_failed", path, text, error=repr(exc))
            self._room.ask()
            # The log may be broken too: who waits for room must hear of it.
            self._room.tell()
            await trio.sleep(RETRY_SECONDS)

    def reasons(self) -> tuple[HealthReason | None, ...]:
        """Why checkpoints do not fare well."""
        since, versions = self._failing_since, self._versions
        if versions.closed:
            return ()
        return (
            checkpoints_failing(
                None if since is None else trio.current_time() - since, self._failure
            ),
            store_stuck(self._room.stuck is not None and bool(versions.readers.pins)),
            checkpoints_behind(versions.behind(), self._room.waiting),
        )

    def start(self, start_soon: Callable[[Callable[[], Awaitable[None]]], None]) -> None:
        """Begin to checkpoint by itself, in a task."""
        self._started = True
        start_soon(self.run)

    async def stop(self) -> None:
        """Wait for a checkpoint that is being written; begin no other."""
        self._stopping.cancel()
        if self._started:
            await self._done.wait()
        async with self._one:
            pass

    @enable_ki_protection
    async def checkpoint(self) -> int:
        """Everything committed so far goes into the store; returns the LSN it holds."""
        async with self._one:
            return await self._everything()

    async def _everything(self) -> int:
        if self._versions.checkpointing:
            # One that was interrupted; what was committed since comes after it.
            await self._checkpoint()
        return await self._checkpoint()

    async def _checkpoint(self) -> int:
        log = self._log
        frozen = self._versions.freeze()
        if frozen is None:
            return self.state.lsn
        while self._versions.has_pending(frozen.last_seq):
            await self._settle_quietly()
        if log.durable_lsn < frozen.last_lsn:
            # Where durability is less than "sync": the store must never be ahead of the log.
            await log.flush()
        state = self._versions.state_at(frozen, self.state)
        lsn = state.lsn
        started = perf_counter()
        try:
            await self._write(frozen, state)
        except (OSError, CorruptLogError) as exc:
            self._failed(frozen, exc)
            raise
        self._passed(lsn, perf_counter() - started)
        self.state = state
        self._versions.checkpointed(frozen, state)
        self.on_stored()
        log.hold(HOLD, lsn + 1)
        return lsn

    async def _settle_quietly(self) -> None:
        """Wait for what is queued; who waits for it is told by others what became of it."""
        try:
            await self._log.flush()
        except (LogFullError, LogFailedError):
            # What was pending has been withdrawn.
            await trio.lowlevel.checkpoint()

    def _passed(self, lsn: int, seconds: float) -> None:
        self.count += 1
        self.seconds_last = seconds
        passes_again = self._failing_since is not None
        self._failing_since = self._failure = self._room.failing = None
        tell(
            logging.INFO if passes_again else logging.DEBUG,
            "checkpoint",
            self._versions.path,
            f"checkpoint up to LSN {lsn} in {seconds:.3f} seconds"
            + (": they pass again" if passes_again else ""),
            lsn=lsn,
            seconds=seconds,
            passes_again=passes_again,
        )

    async def _write(self, frozen: Layer, state: StoreState) -> None:
        if self._room.stuck is not None:
            await self._wait_unread(frozen)
        if not self._versions.readers.pins and self._store.crowded(frozen.log_bytes):
            # Early, while nobody reads: later it may have to wait for that.
            self._grow(frozen)
        while True:
            try:
                with self.busy():
                    await self._blocking(self._apply, frozen.items(), state)
                return
            except MapFull:
                await self._wait_unread(frozen)
                self._grow(frozen)

    def _failed(self, frozen: Layer, exc: OSError | CorruptLogError) -> None:
        """It may pass at the next try; but nobody shall wait for that for ever."""
        now = trio.current_time()
        self._failure = exc
        if self._failing_since is None:
            self._failing_since = now
        seconds = now - self._failing_since
        if seconds >= DISK_PATIENCE_SECONDS:
            failing = self._room.failing = LogFullError(
                self._store.path,
                frozen.log_bytes,
                f"checkpoints have been failing for {seconds:.0f} seconds, and are tried again: "
                f"{exc}",
            )
            failing.__cause__ = exc

    @enable_ki_protection
    async def checkpoint_for(self, job: Callable[[StoreState], Awaitable[None]]) -> int:
        """As `checkpoint`; and before there is another, ``job`` is called with what the store
        holds, and not cut short by cancellation."""
        async with self._one:
            await self._everything()
            await trio.lowlevel.checkpoint_if_cancelled()
            with trio.CancelScope(shield=True):
                await job(self.state)
            return self.state.lsn

    def _apply(self, items: Iterator[tuple[bytes, bytes | None]], state: StoreState) -> None:
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
        for key, value in taking_turns(items):
            keys.append(key)
            values.append(value)
            size += len(key) + (0 if value is None else len(value))
            if size >= PIECE_BYTES:
                self._store.apply(zip(keys, values, strict=True), None)
                keys, values = [], []
                size = 0
        self._store.apply(zip(keys, values, strict=True), state)

    async def _wait_unread(self, frozen: Layer) -> None:
        """LMDB's map grows only while nobody reads.

        Whoever reads may himself be waiting for room in the memtable, and so for this:
        after a while that is an error instead.
        """
        with trio.move_on_after(READERS_PATIENCE_SECONDS) as scope:
            await self._versions.readers.wait_unread()
        if scope.cancelled_caught:
            stuck = self._room.stuck = LogFullError(
                self._store.path,
                frozen.log_bytes,
                "the store's map is full and cannot grow while snapshots or transactions that "
                "have read are open; end them, or open the database with a larger map_size",
            )
            self._room.tell()
            raise stuck.again()
        self._room.stuck = None

    def _grow(self, frozen: Layer) -> None:
        """Nobody reads, and nothing else runs: no await in here."""
        store = self._store

        def grow() -> None:
            store.grow()
            while store.crowded(frozen.log_bytes):
                store.grow()

        try:
            self._versions.reopen_base(grow)
        except (OSError, CorruptLogError):
            # The store may be closed: it must be tried again, whoever asked for this.
            self._room.ask()
            raise
