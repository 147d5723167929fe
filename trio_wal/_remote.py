"""A database whose log is kept by servers: opening it, and following it on another machine.

Law: the store here is this machine's cache, and may be made again from the log, and from a snapshot
where the log no longer reaches back.  What the log has is never dropped above a snapshot that is
there.  Whoever only follows writes nothing but its own store.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Final, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from ._archive import Archive, check_archive
from ._base import StoreState
from ._caslog import Description, RemoteLog
from ._core import OPENING_HOLD, Core
from ._database import Database, new_database
from ._disk.chain import LOG_NAME, META_NAME, STORE_NAME, neither
from ._engine import Forked
from ._exceptions import CorruptLogError, LogLockedError, WrongDirectoryError
from ._files import LOCK_NAME, Directory, Files, close_quietly
from ._log import Log, LogOptions, OpenLog
from ._park import require_trio
from ._replicated import (
    ReplicatedEngine,
    ReplicatedOptions,
    open_replicated,
)
from ._retention import KeepAll, Retention
from ._snapshots import SNAPSHOTS, fetch_snapshot, newest_snapshot
from ._store_files import damaged, data_file, misfit
from ._stores import stores_of
from ._util import Unentered, check_bool, check_int
from ._worker import Blocking

POLL_SECONDS: Final = 1.0
"""How often it is looked whether a snapshot is due."""


@attrs.frozen(kw_only=True)
class RemoteOptions:
    """How a database on servers is opened; `open_database` says what each means."""

    path: str
    log: RemoteLog
    snapshots: Archive | None
    snapshot_bytes: int
    checkpoint_bytes: int
    map_size: int
    check_store: bool = True
    segment_size: int = 1
    retention: Retention = attrs.field(factory=KeepAll)
    trust_directory: bool = False

    def keeping(
        self, segment_size: int, retention: Retention, trust_directory: bool
    ) -> RemoteOptions:
        """With what only the one who writes says."""
        return attrs.evolve(
            self,
            segment_size=segment_size,
            retention=retention,
            trust_directory=check_bool("trust_directory", trust_directory),
        )


def check_remote_options(
    path: str,
    log: RemoteLog,
    snapshots: Archive | None,
    snapshot_bytes: int,
    checkpoint_bytes: int,
    map_size: int,
    check_store: bool = True,
) -> RemoteOptions:
    """These arguments of `open_database`, or the error that names the wrong one."""
    return RemoteOptions(
        path=path,
        log=log,
        snapshots=None if snapshots is None else check_archive("snapshots", snapshots),
        snapshot_bytes=check_int("snapshot_bytes", snapshot_bytes, 1),
        checkpoint_bytes=checkpoint_bytes,
        map_size=map_size,
        check_store=check_store,
    )


@final
class Cache:
    """The directory of a database whose log is elsewhere, and the store in it."""

    def __init__(self, options: RemoteOptions, files: Files) -> None:
        self.path: Final[str] = options.path
        self.store_path: Final = f"{options.path}/{STORE_NAME}"
        self._options = options
        self._files = files
        self._stores = stores_of(files)
        self._directory: Directory | None = None
        self.state: StoreState | None = None
        """What the store holds."""

    def enter(self) -> None:
        """Become the owner of the directory, which is made if it is missing.

        Raises:
          LogLockedError, WrongDirectoryError, UntrustedDirectoryError, CorruptLogError, OSError
        """
        directory = self._files.open_directory(self.path, create=True)
        try:
            if not self._options.trust_directory:
                directory.check_trusted()
            try:
                directory.lock()
            except LogLockedError as exc:
                raise LogLockedError(self.path, exc.pid, database=True) from exc.__cause__
            names = [name for name in directory.names() if name[0] != "." and name != "lost+found"]
            if LOG_NAME in names:
                found = "a database with a log of its own"
                raise WrongDirectoryError(self.path, found, "open_database() without log=")
            if META_NAME in names:
                raise WrongDirectoryError(self.path, "a log", "a new path for the cache")
            if strange := [name for name in names if name not in (STORE_NAME, LOCK_NAME)]:
                raise WrongDirectoryError(self.path, *neither(strange))
            directory.sign()
            if STORE_NAME in names:
                if self._options.check_store:
                    self._stores.check_store(self.store_path, "auto", None)
                self.state = self._stores.inspect_store(self.store_path)
        except BaseException:
            close_quietly(directory)
            raise
        self._directory = directory

    def leave(self) -> None:
        directory, self._directory = self._directory, None
        if directory is not None:
            close_quietly(directory)

    def check_uuid(self, found: Description) -> None:
        """Before anything is written to the log."""
        if self.state is not None and self.state.log_uuid != found.uuid.bytes:
            raise damaged(data_file(self.store_path), "the store belongs to another log")

    def fit(self, found: Description, first_lsn: int, last_lsn: int) -> StoreState:
        """Make sure that the store reaches the log, from a snapshot where it must be.

        Raises:
          CorruptLogError: they do not fit, and there is no snapshot that helps.
        """
        state, kept = self.state, self._options.snapshots
        if (state is None or state.lsn + 1 < first_lsn) and kept is not None:
            manifest = newest_snapshot(kept, found.uuid)
            if manifest is not None and manifest.lsn > (0 if state is None else state.lsn):
                if state is not None:
                    # A cache that the log has left behind: the snapshot has all of it.
                    self._stores.remove_store(self.store_path)
                    self.state = None
                fetch_snapshot(self._files, kept, manifest, self.store_path)
                state = self._stores.inspect_store(self.store_path)
                if state is None or (state.log_uuid, state.lsn) != (found.uuid.bytes, manifest.lsn):
                    self._stores.remove_store(self.store_path)
                    reason = "it is not the snapshot that its manifest names"
                    raise CorruptLogError(manifest.data, 0, reason)
        wrong = misfit(state, found.uuid.bytes, first_lsn, last_lsn)
        if wrong is not None:
            if state is None or state.lsn + 1 < first_lsn:
                wrong += "; a snapshot is needed (snapshots=), and there is none that helps"
            raise damaged(data_file(self.store_path), wrong)
        self.state = state
        return state or StoreState(found.uuid.bytes, 0)


@final
class OpenRemoteDatabase(Unentered, AbstractAsyncContextManager[Database]):
    """What `open_database` returns for a log on servers."""

    _call = "trio_wal.open_database"

    def __init__(self, options: RemoteOptions, run: LogOptions, files: Files) -> None:
        self._options = options
        self._files = files
        self._blocking: Blocking
        self._cache = Cache(options, files)
        self._state: StoreState
        self._opened = OpenLog("open_database", run, self._open_engine)

    async def _open_engine(self) -> ReplicatedEngine:
        options, cache = self._options, self._cache
        cas, found = await options.log.connect(create=True)
        try:
            cache.check_uuid(found)
        except BaseException:
            with trio.CancelScope(shield=True):
                await cas.aclose()
            raise
        how = ReplicatedOptions(
            unavailable_after=options.log.unavailable_after,
            takeover=options.log.takeover,
            segment_size=options.segment_size,
            retention=options.retention,
        )
        engine = await open_replicated(cas, found, how, self._files)
        # Until a snapshot is known nothing may be dropped.
        engine.hold(SNAPSHOTS, 1)
        engine.hold(OPENING_HOLD, 0)
        try:
            tail = engine.tail
            self._state = await self._blocking(cache.fit, found, tail.first_lsn, tail.last_lsn)
            await self._hold_snapshots(engine, found)
        except BaseException:
            await engine.abandon()
            raise
        return engine

    async def _hold_snapshots(self, engine: ReplicatedEngine, found: Description) -> None:
        kept = self._options.snapshots
        if kept is not None:
            manifest = await self._blocking(newest_snapshot, kept, found.uuid)
            if manifest is not None:
                engine.hold(SNAPSHOTS, manifest.lsn + 1)

    @enable_ki_protection
    async def __aenter__(self) -> Database:
        require_trio("open_database")
        self._blocking = Blocking(threaded=self._files.threaded)
        await self._blocking(self._cache.enter)
        try:
            log = await self._opened.enter()
            try:
                db = await self._open_on(log)
            except BaseException as exc:
                await self._opened.leave(exc)
                raise
        except BaseException:
            self._cache.leave()
            raise
        log.hand_out()
        return db

    async def _open_on(self, log: Log) -> Database:
        options, files, blocking = self._options, self._files, self._blocking
        stores, state = stores_of(files), self._state
        store = await blocking(stores.open_store, self._cache.store_path, options.map_size)
        try:
            core = Core(options.path, log, store, state, files, blocking, options.checkpoint_bytes)
        except BaseException:
            store.close()
            raise
        replayed = await core.start()
        recovery = attrs.evolve(
            log.engine.recovery, transactions_replayed=replayed, checkpoint_lsn=state.lsn
        )
        kept = options.snapshots
        if kept is not None:
            snapshotter = Snapshotter(core, kept, options.snapshot_bytes)
            log.before_close(snapshotter.stop)
            log.start_soon(snapshotter.run)
        return new_database(core, recovery)

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._opened.leave(exc)
        finally:
            self._cache.leave()


@final
class Snapshotter:
    """The task that makes a snapshot every so many bytes of log."""

    def __init__(self, core: Core, kept: Archive, snapshot_bytes: int) -> None:
        self._core = core
        self._kept = kept
        self._snapshot_bytes = snapshot_bytes
        self._stopping = trio.CancelScope()
        self._done = trio.Event()

    async def run(self) -> None:
        since = 0
        with trio.CancelScope(shield=True):
            try:
                with self._stopping:
                    while True:
                        await trio.sleep(POLL_SECONDS)
                        written = self._core.log.statistics().bytes_appended
                        if written - since >= self._snapshot_bytes:
                            await self._core.try_snapshot(self._kept)
                            since = written
            except Forked:
                pass
            finally:
                if not self._core.log.status.disowned:
                    self._done.set()

    async def stop(self) -> None:
        """One that is being made is finished first."""
        self._stopping.cancel()
        await self._done.wait()
