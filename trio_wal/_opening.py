"""Opening a database: directory, log and store, and that they belong together.

Law: what is there is looked at before anything is written, and an open that fails leaves it as
it was, and nothing else.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, final

import attrs
from trio.lowlevel import enable_ki_protection

from ._archive import Archive
from ._base import Progress, StoreState
from ._caslog import BATCH_BYTES_MAX, RemoteLog
from ._checkpoint import HOLD
from ._core import OPENING_HOLD, Core
from ._database import Database, new_database
from ._disk.chain import LOG_NAME, META_NAME, STORE_NAME, neither
from ._disk.recovery import Plan
from ._engine import Engine
from ._events import tell
from ._exceptions import CorruptLogError, LogLockedError, WrongDirectoryError
from ._exports import publish
from ._files import Files
from ._flusher import Durability
from ._local import VERIFY_BYTES, LocalEngine, LocalOptions, SyncIn, check_local_options, open_local
from ._log import RESERVE, TARGET_LATENCY, Log, LogOptions, OpenLog, check_log_options
from ._park import require_trio
from ._remote import OpenRemoteDatabase, RemoteOptions, check_remote_options
from ._remotelog import check_remote, check_remote_log, refuse_options
from ._replica import OpenReplica, Replica
from ._retention import KeepSegments, Retention
from ._store_files import damaged, data_file, misfit
from ._stores import stores_of
from ._system.files import OsFiles
from ._util import MiB, Unentered, check_bool, check_int, check_one_of, check_path
from ._worker import Blocking

VerifyStore = Literal["auto", "child", "none"]
"""What `open_database` takes as ``verify_store``: ``"auto"``, ``"child"`` or ``"none"``."""

MAP_SIZE: Final = 1 << 36
"""64 GiB of address space, not of disk: the file grows as it is needed."""
MAP_SIZE_MAX: Final = 1 << 61
"""Below what LMDB's C can count, once doubled; where less is too much, the system says so."""


@attrs.frozen
class _Options:
    """The checked arguments of `open_database` that are not the log's alone."""

    path: str
    checkpoint_bytes: int
    map_size: int
    verify_store: VerifyStore
    on_verify_progress: Progress | None


@final
class _OpenDatabase(Unentered, AbstractAsyncContextManager[Database]):
    """What `open_database` returns."""

    _call = "trio_wal.open_database"

    def __init__(
        self, options: _Options, files: Files, run: LogOptions, where: LocalOptions
    ) -> None:
        self._options = options
        self._path = options.path
        self._files = files
        self._stores = stores_of(files)
        self._where = where
        self._opened = OpenLog("open_database", run, self._open_engine)
        self._state: StoreState | None = None
        self._made: tuple[str, ...] = ()

    @property
    def _next_lsn(self) -> int:
        """The first one that the store does not have."""
        return 1 if self._state is None else self._state.lsn + 1

    @property
    def _store_path(self) -> str:
        return f"{self._path}/{STORE_NAME}"

    def _check(self, plan: Plan) -> int | None:
        """Log and store must fit each other before either is written; returns the first LSN
        to replay."""
        options, how = self._options, self._options.verify_store
        if how == "child" or (how == "auto" and not plan.clean):
            self._stores.check_store(self._store_path, how, options.on_verify_progress)
        state = self._state = self._stores.inspect_store(self._store_path)
        meta = plan.meta
        wrong = misfit(
            state,
            None if meta is None else meta.log_uuid,
            1 if meta is None else meta.base_lsn,
            plan.last_lsn,
        )
        if wrong is not None:
            raise damaged(data_file(self._store_path), wrong)
        return None if meta is None else self._next_lsn

    def _prepare(self) -> None:
        """Create the directory, or see whether it is a database's."""
        directory = self._files.open_directory(self._path, create=True)
        self._made = directory.made
        try:
            found = directory.names()
            if not self._where.trust_directory:
                directory.check_trusted()
                if STORE_NAME in found:
                    self._check_store_trusted()
            names = [name for name in found if name[0] != "." and name != "lost+found"]
            if not names or LOG_NAME in names:
                return
            if STORE_NAME in names:
                raise CorruptLogError(self._path, 0, "a database without its log")
            if META_NAME in names:
                raise WrongDirectoryError(self._path, "a log", "open_wal()")
            raise WrongDirectoryError(self._path, *neither(names))
        finally:
            directory.close()

    def _check_store_trusted(self) -> None:
        try:
            directory = self._files.open_directory(self._store_path, follow=False)
        except (OSError, CorruptLogError):
            # Whatever it is: for those to say who open it.
            return
        try:
            directory.check_trusted()
        finally:
            directory.close()

    def _remove_made(self) -> None:
        """After an open that failed: the directories that `_prepare` has made."""
        self._files.remove_directories(self._made)

    async def _open_engine(self) -> Engine:
        engine = await open_local(
            self._files,
            self._where,
            check=self._check,
            database=True,
            undo=partial(self._stores.remove_store, self._store_path),
        )
        engine.hold(HOLD, self._next_lsn)
        # Until it is known which consumers there are.
        engine.hold(OPENING_HOLD, 0)
        return engine

    @enable_ki_protection
    async def __aenter__(self) -> Database:
        require_trio("open_database")
        blocking = Blocking(threaded=self._files.threaded)
        try:
            await blocking(self._prepare)
            try:
                log = await self._opened.enter()
            except LogLockedError as exc:
                raise LogLockedError(self._path, exc.pid, database=True) from exc.__cause__
            try:
                db = await self._open_on(log, blocking)
                self._hand_out(log, db)
            except BaseException as exc:
                await self._opened.leave(exc)
                raise
        except BaseException:
            self._remove_made()
            raise
        return db

    def _hand_out(self, log: Log, db: Database) -> None:
        log.hand_out()
        report = db.recovery
        tell(
            logging.INFO,
            "replayed",
            db.path,
            f"{report.transactions_replayed} transactions after the store's LSN "
            f"{report.checkpoint_lsn} replayed",
            transactions_replayed=report.transactions_replayed,
            checkpoint_lsn=report.checkpoint_lsn,
        )

    async def _open_on(self, log: Log, blocking: Blocking) -> Database:
        options, files = self._options, self._files
        store = await blocking(self._stores.open_store, self._store_path, options.map_size)
        try:
            state = self._state or StoreState(log.engine.uuid.bytes, 0)
            core = Core(
                self._path,
                log,
                store,
                state,
                files,
                blocking,
                options.checkpoint_bytes,
                self._where.archive,
            )
        except BaseException:
            store.close()
            raise
        replayed = await core.start()
        recovery = attrs.evolve(
            log.engine.recovery, transactions_replayed=replayed, checkpoint_lsn=state.lsn
        )
        return new_database(core, recovery)

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._opened.leave(exc)


def open_database(
    path: str | os.PathLike[str],
    *,
    log: str | RemoteLog | None = None,
    snapshots: Archive | None = None,
    snapshot_bytes: int = 1024 * MiB,
    checkpoint_bytes: int = 64 * MiB,
    map_size: int = MAP_SIZE,
    verify_store: VerifyStore = "auto",
    on_verify_progress: Callable[[int, int], None] | None = None,
    retention: Retention | None = None,
    max_queue_size: float | Literal["auto"] = 10_000,
    target_latency: float = TARGET_LATENCY,
    max_queue_bytes: float = 64 * MiB,
    max_record_size: int = 16 * MiB,
    max_batch_bytes: int = 8 * MiB,
    flush_interval: float = 0.010,
    commit_delay: float | Literal["auto"] = 0.0,
    segment_size: int = 64 * MiB,
    durability: Durability = "sync",
    compression: Literal["none", "zstd"] | None = None,
    verify_bytes: float = VERIFY_BYTES,
    trust_directory: bool = False,
    sync_in: SyncIn = "thread",
    reserve: float = RESERVE,
    consumer_hold_bytes: float = math.inf,
    archive: Archive | None = None,
    files: Files | None = None,
) -> AbstractAsyncContextManager[Database]:
    """Open a transactional key-value store in a directory, recovering it first.

    ::

        async with trio_wal.open_database("bank.db") as db:
            async with db.transaction() as tx:
                tx.put(b"alice", b"10")

    Keys are `bytes` of 1 to 511; values `bytes` of any length that fits, with the rest of
    its transaction, into ``max_record_size``.

    Args:
      path: a directory; created with mode 0700 if it is missing.
      log: a log that servers keep, `trio_wal.nats.Log` or its URL; the directory is then this
          machine's cache of what is in it, and may be deleted.  None: the log is in the directory.
      snapshots: where snapshots of such a database are kept, for machines that have nothing; only
          what one of them has is dropped from the log.  None: nothing is ever dropped from it.
      snapshot_bytes: a snapshot is made every so many bytes of log.
      checkpoint_bytes: committed state is moved into the store every so many bytes of log.
          Twice that may have to be replayed on opening, and kept in memory.
      map_size: bytes of address space for LMDB; grown when it is full.
      verify_store: LMDB trusts its file, and reading a damaged page can end the process, so
          the store can be checked before it is opened.  ``"auto"``: every page, after a crash
          and where the store has at most 128 MiB; that takes 3 ms per MiB.  ``"child"``: every
          page, and then every key through LMDB, in a child process, always; twice that, and
          0.3 seconds for the process.  ``"none"``: nothing but the few pages that opening reads.
      on_verify_progress: called, in a worker thread, with the bytes that are checked so far and
          the bytes that there are.
      retention: how much of the log to keep beyond what the store does not hold yet, for
          `Database.changes`; None: nothing.
      max_queue_size, target_latency, max_queue_bytes: as for `open_wal`.
      max_record_size, max_batch_bytes: as for `open_wal`.
      flush_interval, commit_delay, segment_size, durability, compression: as for `open_wal`.
      verify_bytes, trust_directory, sync_in, reserve, consumer_hold_bytes: as for `open_wal`.
      archive: as for `open_wal`; gets a copy of every `Database.backup`, too.
      files: another file system, such as `trio_wal.testing.MemoryFiles`.

    With ``log``, ``compression``, ``verify_bytes``, ``sync_in`` and ``archive`` cannot be given,
    and ``durability`` must be ``"sync"``.  Opening takes the log over; its previous owner gets
    `LogFencedError` from the next commit on.

    Raises, when called:
      TypeError, ValueError: an argument is wrong; the message names it.

    Raises, on entering; what was there is as it was, and nothing else stays:
      LogLockedError, WrongDirectoryError, UntrustedDirectoryError: as `open_wal`.
      UnsupportedFormatError, LogFullError, OSError, RuntimeError: as `open_wal`.
      CorruptLogError: also where LMDB's file is damaged, or log and store do not fit.

    Raises, on leaving:
      LogFailedError: a write or sync failed and nobody has been told.
    """
    name, used = check_path(path), OsFiles() if files is None else files
    own = _check_options(used, name, checkpoint_bytes, map_size, verify_store, on_verify_progress)
    remote = _check_log(log, snapshots)
    run = check_log_options(
        LocalEngine.batch_bytes_max if remote is None else BATCH_BYTES_MAX,
        max_queue_size=max_queue_size,
        target_latency=target_latency,
        max_queue_bytes=max_queue_bytes,
        max_record_size=max_record_size,
        max_batch_bytes=max_batch_bytes,
        flush_interval=flush_interval,
        commit_delay=commit_delay,
        durability=durability,
        reserve=reserve,
        consumer_hold_bytes=consumer_hold_bytes,
    )
    keep = KeepSegments(1) if retention is None else retention
    if remote is not None:
        check_remote(
            durability, segment_size, retention, compression, verify_bytes, sync_in, archive
        )
        cache = _cache_options(own, remote, snapshots, snapshot_bytes)
        return OpenRemoteDatabase(cache.keeping(segment_size, keep, trust_directory), run, used)
    path = f"{name}/{LOG_NAME}"
    where = check_local_options(
        path, segment_size, keep, compression, verify_bytes, trust_directory, sync_in, archive
    )
    return _OpenDatabase(own, used, run, where)


def _check_log(log: RemoteLog | str | None, snapshots: Archive | None) -> RemoteLog | None:
    """None: the log is in the database's directory."""
    if log is None:
        refuse_options("a database with a log of its own", snapshots=snapshots is not None)
        return None
    return check_remote_log(log)


def _check_options(
    files: Files,
    path: str,
    checkpoint_bytes: int,
    map_size: int,
    verify_store: VerifyStore,
    on_verify_progress: Progress | None,
) -> _Options:
    check_int("checkpoint_bytes", checkpoint_bytes, 1)
    check_int("map_size", map_size, 1 * MiB, MAP_SIZE_MAX)
    check_one_of("verify_store", verify_store, ("auto", "child", "none"))
    path = files.absolute(path)
    return _Options(path, checkpoint_bytes, map_size, verify_store, on_verify_progress)


def _cache_options(
    own: _Options, log: RemoteLog, snapshots: Archive | None, snapshot_bytes: int
) -> RemoteOptions:
    return check_remote_options(
        own.path,
        log,
        snapshots,
        snapshot_bytes,
        own.checkpoint_bytes,
        own.map_size,
        own.verify_store != "none",
    )


def open_replica(
    path: str | os.PathLike[str],
    *,
    log: str | RemoteLog,
    snapshots: Archive | None = None,
    checkpoint_bytes: int = 64 * MiB,
    map_size: int = MAP_SIZE,
    trust_directory: bool = False,
    files: Files | None = None,
) -> AbstractAsyncContextManager[Replica]:
    """Follow a database whose log servers keep, on another machine, with a store of its own.

    ::

        async with trio_wal.open_replica("bank.replica", log=log) as replica:
            await replica.wait_for(lsn)
            replica.get(b"alice")

    A standby is a replica that is promoted when the leader is gone: `Replica.promote`.

    Args:
      path: a directory for this machine's copy; created with mode 0700 if it is missing, and made
          again from the log, and from a snapshot, whenever it is deleted.
      log: `trio_wal.nats.Log`, or its URL.
      snapshots: where to begin, where the log no longer reaches back to what is here.
      checkpoint_bytes, map_size, trust_directory, files: as for `open_database`.

    Raises, when called:
      TypeError, ValueError: an argument is wrong; the message names it.

    Raises, on entering:
      FileNotFoundError: there is no such log; `open_database` makes one.
      LogLockedError: the directory is open elsewhere.
      CorruptLogError: the store is damaged, of another log, or older than log and snapshots are.
      UnsuitableServersError, LogUnavailableError, PermissionError: as `open_wal`.
      WrongDirectoryError, UntrustedDirectoryError, OSError, RuntimeError: as `open_database`.
    """
    name, used = check_path(path), OsFiles() if files is None else files
    remote = check_remote_log(log)
    check_int("checkpoint_bytes", checkpoint_bytes, 1)
    check_int("map_size", map_size, 1 * MiB, MAP_SIZE_MAX)
    options = attrs.evolve(
        check_remote_options(used.absolute(name), remote, snapshots, 1, checkpoint_bytes, map_size),
        trust_directory=check_bool("trust_directory", trust_directory),
    )
    same: dict[str, Any] = {
        "log": remote,
        "snapshots": snapshots,
        "checkpoint_bytes": checkpoint_bytes,
        "map_size": map_size,
        "trust_directory": trust_directory,
        "files": files,
    }

    def promote(**given: Any) -> AbstractAsyncContextManager[Database]:
        return open_database(name, **{**same, **given})

    return OpenReplica(options, used, promote)


publish(open_database, open_replica)
