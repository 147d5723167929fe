"""A running database, without promises to users: what `Database` is made of.

Law: this file puts versions, store, log and checkpoints together, and takes them apart in the
right order; what each of them does is its own.
"""

from __future__ import annotations

import logging
from typing import Final, final

import trio
from trio.lowlevel import enable_ki_protection

from ._archive import Archive
from ._base import Store, StoreState
from ._checkpoint import Checkpointer
from ._consumers import Consumers
from ._database_consumer import CommitKeeper
from ._disk.chain import LOG_NAME, STORE_NAME
from ._events import tell
from ._exceptions import CorruptLogError, LogFailedError, LogFullError
from ._files import Files
from ._log import Log
from ._manifest import put_identity
from ._mvcc import Versions
from ._replay import replay_live
from ._snapshots import SNAPSHOTS, put_snapshot
from ._wal import new_wal
from ._worker import Blocking, cancellation_check

OPENING_HOLD: Final = "opening"
"""Under which name the log is held until it is known which consumers there are."""
SNAPSHOT_NAME: Final = ".snapshot"
"""Where the copy stands that is being made, with a random part behind."""


@final
class Core:
    """An open log and an open store, and what is between them."""

    def __init__(
        self,
        path: str,
        log: Log,
        store: Store,
        state: StoreState,
        files: Files,
        blocking: Blocking,
        checkpoint_bytes: int,
        archive: Archive | None = None,
    ) -> None:
        self.path: Final = path
        self.log: Final = log
        self._store: Final = store
        self._files: Final = files
        self._blocking: Final = blocking
        self._archive: Final = archive
        """Gets a copy of each backup."""
        self.versions: Final = Versions(
            path,
            store,
            log,
            durable_lsn=log.durable_lsn,
            checkpoint_bytes=checkpoint_bytes,
            max_transaction_bytes=log.max_record_size,
            stored=state,
        )
        self.versions.epoch = log.tail.epoch
        log.own(self.versions)
        self.consumers: Consumers
        self.wal: Final = new_wal(log, owned=True)
        self.checkpointer: Final = Checkpointer(self.versions, store, log, blocking, state)
        self.checkpointer.busy = log.engine.busy
        self._closed_store: tuple[int, int] | None = None

    async def start(self) -> int:
        """Bring the log's tail into the memtable, and begin to checkpoint; returns how many
        transactions were replayed.  From here on the log closes the store."""
        log = self.log
        log.before_close(self._before_close)
        count = await self._replay()
        consumers = self.consumers = Consumers(log, CommitKeeper(self.versions, log))
        self.checkpointer.on_stored = consumers.hold_all
        log.hold(OPENING_HOLD, None)
        self.checkpointer.start(log.start_soon)
        self._files.on_fork(self._disown)
        return count

    async def _replay(self) -> int:
        log, versions = self.log, self.versions
        count = 0
        async with log.read(self.checkpointer.state.lsn + 1) as records:
            async for batch in records.batches(None):
                await replay_live(versions, log.name, batch, self.checkpointer.checkpoint)
                count += len(batch)
        return count

    async def backup(self, path: str) -> int:
        """A copy of the store as of now, and an empty log that goes on after it.

        Under another name, so that nothing is ever there half, and what failed can be tried
        again.
        """
        files, blocking = self._files, self._blocking
        temporary = await blocking(files.begin_directory, path)
        try:
            copied = f"{temporary}/{STORE_NAME}"

            async def copy(state: StoreState) -> None:
                with self.log.engine.busy():
                    await blocking(self._store.copy, copied)
                await self.log.engine.branch(f"{temporary}/{LOG_NAME}", state.lsn)

            lsn = await self.checkpointer.checkpoint_for(copy)
            # Checkpoints go on meanwhile: an archive may be slow.
            if self._archive is not None:
                await self._put_snapshot(self._archive, copied, lsn)
            with trio.CancelScope(shield=True):
                await blocking(files.finish_directory, temporary, path)
        except BaseException:
            with trio.CancelScope(shield=True):
                await blocking(files.discard_directory, temporary)
            raise
        return lsn

    async def _put_snapshot(self, kept: Archive, store_path: str, lsn: int) -> None:
        """Keep a copy of a store that nobody writes, and that has everything up to ``lsn``."""
        # In which epoch does not matter to who goes on: LSNs of a log on servers are never
        # given twice, and in a directory the copy's next open begins one of its own.
        uuid, history = self.wal.uuid, self.log.tail.history
        if kept is self._archive:
            await self.log.engine.check_archive()

        def put() -> None:
            if kept is self._archive:
                put_identity(kept, uuid)
            put_snapshot(
                self._files,
                kept,
                store_path,
                uuid=uuid,
                lsn=lsn,
                history=history,
                tick=cancellation_check(threaded=self._files.threaded),
            )

        with self.log.engine.busy():
            await self._blocking(put)

    async def snapshot_to(self, kept: Archive) -> int:
        """Keep a copy of the store, as of now, where other machines find it; gives its LSN."""
        files, blocking = self._files, self._blocking
        temporary = await blocking(files.begin_directory, f"{self.path}/{SNAPSHOT_NAME}")
        try:
            copied = f"{temporary}/{STORE_NAME}"

            async def copy(_: StoreState) -> None:
                await blocking(self._store.copy, copied)

            lsn = await self.checkpointer.checkpoint_for(copy)
            await self._put_snapshot(kept, copied, lsn)
        finally:
            with trio.CancelScope(shield=True):
                await blocking(files.discard_directory, temporary)
        self.log.hold(SNAPSHOTS, lsn + 1)
        return lsn

    async def try_snapshot(self, kept: Archive) -> None:
        """As `snapshot_to`, by itself: what fails is told, and tried again some time."""
        path = self.path
        try:
            lsn = await self.snapshot_to(kept)
        except (OSError, LogFailedError, LogFullError, CorruptLogError) as exc:
            text = f"no snapshot was made, will try again: {exc!r}"
            tell(logging.WARNING, "snapshot_failed", path, text, error=repr(exc))
        else:
            tell(logging.INFO, "snapshot", path, f"snapshot up to LSN {lsn}", lsn=lsn)

    def store_statistics(self) -> tuple[int, int]:
        """(keys, bytes of the file); after the close, those of that moment."""
        return self._closed_store or self._store.statistics()

    @enable_ki_protection
    async def _before_close(self) -> None:
        versions = self.versions
        # LMDB must not be closed while somebody reads; nor may a checkpoint wait for them.
        try:
            versions.let_go()
        finally:
            await self.checkpointer.stop()
        await self._blocking.close()
        versions.close()
        try:
            self._closed_store = self._store.statistics()
        finally:
            self._store.close()

    def _disown(self) -> None:
        """In a forked child: the database is the parent's."""
        self._blocking.disown()
        self.versions.disown()
        self._closed_store = (0, 0)
