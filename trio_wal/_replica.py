"""A database that follows its log from another machine: `open_replica` and `Replica`.

Law: writes nothing but its own store, which moves along the log in its order: each checkpoint
carries the LSN up to which it has everything.  What it shows is durable, a whole number of
transactions, and never goes back.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Final, NoReturn, TypeVar, final, overload

import trio
from trio.lowlevel import Task, enable_ki_protection

from ._base import StoreState
from ._changes import CommitStream, new_commit_stream
from ._checkpoint import Checkpointer
from ._database import Database
from ._database_statistics import ReplicaStatistics
from ._engine import Forked
from ._exceptions import CorruptLogError, LogDivergedError
from ._exports import NoPublicConstructor, constructor, publish
from ._files import Files
from ._health import Health, behind, closed, judge, not_following, silent
from ._identity import Bookmark, History, common_lsn, epoch_of
from ._mvcc import Versions
from ._operations import check_key, check_range
from ._pairs import PairStream
from ._park import end_forked, require_trio
from ._remote import Cache, RemoteOptions
from ._replay import replay_live
from ._replicated import open_remote_source
from ._snapshot import Snapshot, new_snapshot, scan_once, stream_once
from ._state import State, Status
from ._stores import stores_of
from ._stream import new_record_stream
from ._streamlog import StreamSource
from ._util import Unentered, check_int
from ._worker import Blocking

D = TypeVar("D")

RETRY_SECONDS: Final = 1.0
"""After servers gave no answer."""


@final
class _Followed:
    """The log, as versions and checkpoints know one; it takes nothing."""

    def __init__(self, name: str, start_soon: Callable[..., None]) -> None:
        self.status: Final = Status(name)
        self.status.stop(State.CLOSING)
        self.durable_lsn = 0
        self._start_soon = start_soon

    def append(self, record: bytes, task: Task) -> Awaitable[int]:
        raise AssertionError("a replica writes nothing")

    def append_in_turn(self, record: bytes, line: Any, enter: Callable[[], None]) -> Awaitable[int]:
        raise AssertionError("a replica writes nothing")

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        self._start_soon(task)

    async def flush(self) -> int:
        await trio.lowlevel.checkpoint()
        return self.durable_lsn

    def hold(self, who: str, lsn: int) -> None:
        pass


@final
class Following:
    """What a replica is made of, while it follows."""

    def __init__(
        self, source: StreamSource, cache: Cache, options: RemoteOptions, files: Files
    ) -> None:
        self.source: Final = source
        self.cache: Final = cache
        self._options = options
        self._files = files
        self._blocking = Blocking(threaded=files.threaded)
        self._manager = trio.open_nursery()
        self._nursery: trio.Nursery
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self.versions: Versions
        self.checkpointer: Checkpointer
        self._followed: _Followed
        self._store: Any
        self.history: History = source.tail.history
        """Of what is shown."""
        self.behind_since: float | None = None
        self.silent_since: float | None = None
        """From when on no server has answered."""
        self.failure: Exception | None = None
        """What has ended the following."""
        self.transactions: int = 0
        """Those that were applied."""
        self.forked: bool = False
        self._news = trio.Event()

    async def start(self, state: StoreState) -> None:
        options, blocking = self._options, self._blocking
        stores = stores_of(self._files)
        self._store = await blocking(stores.open_store, self.cache.store_path, options.map_size)
        self._nursery = await self._manager.__aenter__()
        try:
            self._begin(state)
        except BaseException:
            # No memory.
            self._nursery.cancel_scope.cancel()
            await self._manager.__aexit__(None, None, None)
            self._store.close()
            raise

    def _begin(self, state: StoreState) -> None:
        options, blocking = self._options, self._blocking
        followed = self._followed = _Followed(self.source.name, self._nursery.start_soon)
        followed.durable_lsn = state.lsn
        self.versions = Versions(
            options.path,
            self._store,
            followed,
            durable_lsn=state.lsn,
            checkpoint_bytes=options.checkpoint_bytes,
            max_transaction_bytes=1,
            stored=state,
        )
        self.checkpointer = Checkpointer(self.versions, self._store, followed, blocking, state)
        self.checkpointer.start(self._nursery.start_soon)
        self._nursery.start_soon(self._follow)

    async def _follow(self) -> None:
        try:
            with trio.CancelScope(shield=True), self._scope:
                while True:
                    try:
                        await self._apply()
                    except OSError:
                        # Servers that give no answer may do so again.
                        if self.silent_since is None:
                            self.silent_since = trio.current_time()
                        await trio.sleep(RETRY_SECONDS)
        except Forked:
            pass
        except Exception as exc:  # noqa: BLE001  (whoever waits or reads on is told)
            self.failure = exc
        finally:
            if not self.forked:
                self._tell()
                self._stopped.set()

    async def _apply(self) -> None:
        source, versions = self.source, self.versions
        start = versions.durable_lsn + 1
        async with new_record_stream(source, start, None, follow=True) as records:
            self._tell()
            async for batch in records.batches(None):
                if versions.behind():
                    await versions.room.wait(reading=False)
                await replay_live(versions, source.name, batch)
                self.transactions += len(batch)
                self._followed.durable_lsn = versions.durable_lsn
                self._tell()

    def _tell(self) -> None:
        tail = self.source.tail
        self.silent_since = None
        self.history = tail.history
        self.versions.epoch = epoch_of(self.history)
        if self.versions.durable_lsn >= tail.durable_lsn:
            self.behind_since = None
        elif self.behind_since is None:
            self.behind_since = trio.current_time()
        news, self._news = self._news, trio.Event()
        news.set()

    async def wait_news(self) -> None:
        await self._news.wait()

    @enable_ki_protection
    async def stop(self) -> None:
        """End following; what was applied, and is not in the store, is in the log."""
        with trio.CancelScope(shield=True):
            self._scope.cancel()
            await self._stopped.wait()
            try:
                self.versions.let_go()
            finally:
                await self.checkpointer.stop()
            await self._blocking.close()
            self.versions.close()
            self._store.close()
            await self.source.aclose()
            self.cache.leave()

    async def leave(self) -> None:
        """After `stop`, from where it was started: whoever promotes a replica may do so within
        other nurseries."""
        if self.forked:
            await end_forked(self._nursery, Forked)
        # All of its tasks have ended: this neither waits nor wraps anything.
        await self._manager.__aexit__(None, None, None)

    def disown(self) -> None:
        """In a forked child: all of it is the parent's."""
        self.forked = self._followed.status.disowned = True
        self._blocking.disown()
        self.source.disown()
        self.versions.disown()


@final
class Replica(metaclass=NoPublicConstructor):
    """A database that another machine writes, followed here; what `open_replica` gives.

    Reads are sync and see this machine's copy: durable, in order, a little behind.  There is no
    public constructor.
    """

    def __init__(self, following: Following, promote: Callable[..., Any], files: Files) -> None:
        self._following = following
        self._versions = following.versions
        self._promote = promote
        self._closed = False
        files.on_fork(self._disown)

    # -- reading --

    @overload
    def get(self, key: bytes) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: D) -> bytes | D: ...
    def get(self, key: bytes, default: object = None) -> object:
        """The value of ``key`` as of `lsn`, or ``default``; as `Database.get`."""
        versions = self._versions
        versions.check_open()
        try:
            value = versions.get(check_key(key))
        except BaseException as exc:
            versions.view.base.explain(exc)
            raise
        return default if value is None else value

    def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """As `Database.scan`, at `lsn`."""
        self._versions.check_open()
        start, stop = check_range(start, stop, prefix, limit)
        return scan_once(self.snapshot(), start, stop, reverse, limit)

    def stream(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> PairStream:
        """As `scan`, for large ranges; see `Database.stream`."""
        self._versions.check_open()
        start, stop = check_range(start, stop, prefix, limit)
        return stream_once(self.snapshot(), start, stop, reverse, limit)

    def snapshot(self) -> Snapshot:
        """A consistent view at one LSN; as `Database.snapshot`."""
        self._versions.check_open()
        return new_snapshot(self._versions)

    def changes(self, start: int | Bookmark | None = None) -> CommitStream:
        """Every committed transaction of the log, from LSN ``start`` on, as `Database.changes`; it
        may be ahead of what is shown here."""
        self._versions.check_open()
        source = self._following.source
        entering = "replica.changes() as commits"
        records = new_record_stream(source, start, None, follow=True, entering=entering)
        return new_commit_stream(source.name, records)

    # -- how far it is --

    @property
    def path(self) -> str:
        """The directory of this machine's copy, absolute."""
        return self._following.cache.path

    @property
    def uuid(self) -> uuid.UUID:
        """The database's."""
        return self._following.source.uuid

    @property
    def lsn(self) -> int:
        """The newest transaction that is shown here."""
        return self._versions.durable_lsn

    @property
    def durable_lsn(self) -> int:
        """As `lsn`: all that is shown is durable."""
        return self._versions.durable_lsn

    @property
    def epoch(self) -> int:
        """The log's, as far as it is known here."""
        return epoch_of(self._following.history)

    @property
    def bookmark(self) -> Bookmark:
        """`lsn` with the `epoch`."""
        return Bookmark(self.lsn, self.epoch)

    def lag(self) -> int:
        """How many transactions the log is known to have that are not shown here yet."""
        return max(0, self._following.source.tail.durable_lsn - self.lsn)

    def statistics(self) -> ReplicaStatistics:
        """Cheap; no checkpoint."""
        following, versions = self._following, self._versions
        since = following.behind_since
        return ReplicaStatistics(
            lsn=self.lsn,
            known_lsn=following.source.tail.durable_lsn,
            lag_seconds=0.0 if since is None else trio.current_time() - since,
            transactions=following.transactions,
            checkpoint_lsn=following.checkpointer.state.lsn,
            memtable_keys=sum(len(layer.versions) for layer in versions.view.layers()),
            open_readers=len(versions.readers.pins),
        )

    def health(self) -> Health:
        """Whether the replica follows its log, and how closely; cheap, no checkpoint.

        It may be asked after the replica was closed or promoted.
        """
        if self._closed:
            return judge((closed("the replica", "closed"),))
        following, now = self._following, trio.current_time()
        since, silent_since = following.behind_since, following.silent_since
        return judge(
            (
                not_following("the replica", following.failure),
                silent(None if silent_since is None else now - silent_since),
                behind(self.lag(), 0.0 if since is None else now - since),
                *following.checkpointer.reasons(),
            )
        )

    @enable_ki_protection
    async def wait_for(self, place: int | Bookmark) -> None:
        """Wait until a transaction is shown here: read your own writes, on another machine.

        Cancelling it changes nothing.

        Args:
          place: its LSN, or a bookmark of the database.

        Raises:
          LogDivergedError: the bookmark is not of this database's history.
          CorruptLogError, LsnTruncatedError: the log cannot be followed any further.
          trio.ClosedResourceError: the replica is closed, or promoted.
        """
        following = self._following
        lsn = place.lsn if isinstance(place, Bookmark) else check_int("place", place, 0)
        await trio.lowlevel.checkpoint()
        while True:
            self._versions.check_open()
            if self.lsn >= lsn:
                if isinstance(place, Bookmark):
                    self._check_history(place)
                return
            if following.failure is not None:
                self._raise_failure(following.failure)
            await following.wait_news()

    def _check_history(self, place: Bookmark) -> None:
        common = common_lsn(self._following.history, place.epoch)
        if common is None or place.lsn > common:
            raise LogDivergedError(self._following.source.name, place, common)

    def _raise_failure(self, failure: Exception) -> NoReturn:
        if isinstance(failure, CorruptLogError):
            raise CorruptLogError(*failure.args) from failure
        raise failure

    # -- its life --

    def promote(self, **options: Any) -> AbstractAsyncContextManager[Database]:
        """Take the log over, and go on as its `Database`, on the same store::

            async with replica.promote() as db:
                await db.put(b"key", b"value")

        Who should do so is not decided here: of two that do, one gets `LogFencedError`, and nothing
        is lost.  On entering, the replica ends; what it lacks is replayed.

        Args:
          options: as for `open_database`.

        Raises, on entering: as `open_database`.
        """
        return _Promotion(self, self._promote(**options))

    async def aclose(self) -> None:
        """Stop following, and close; a checkpoint; idempotent.

        A cancellation is delivered when it is closed.
        """
        await self._close()
        await trio.lowlevel.checkpoint()

    async def _close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._following.stop()

    def _disown(self) -> None:
        """In a forked child all of it is the parent's."""
        self._closed = True
        self._following.disown()


_new_replica = constructor(Replica)


@final
class _Promotion(AbstractAsyncContextManager[Database]):
    """What `Replica.promote` returns."""

    def __init__(self, replica: Replica, opened: AbstractAsyncContextManager[Database]) -> None:
        self._replica = replica
        self._opened = opened

    @enable_ki_protection
    async def __aenter__(self) -> Database:
        await self._replica.aclose()
        return await self._opened.__aenter__()

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._opened.__aexit__(exc_type, exc, traceback)


@final
class OpenReplica(Unentered, AbstractAsyncContextManager[Replica]):
    """What `open_replica` returns."""

    _call = "trio_wal.open_replica"

    def __init__(self, options: RemoteOptions, files: Files, promote: Callable[..., Any]) -> None:
        self._options = options
        self._files = files
        self._promote = promote
        self._following: Following
        self._replica: Replica | None = None

    @enable_ki_protection
    async def __aenter__(self) -> Replica:
        if self._replica is not None:
            raise RuntimeError("open_replica() gives a context manager that can be used only once")
        require_trio("open_replica")
        options, files = self._options, self._files
        blocking = Blocking(threaded=files.threaded)
        cache = Cache(options, files)
        await blocking(cache.enter)
        try:
            source = await open_remote_source(options.log)
            try:
                found = await source.log.describe()
                cache.check_uuid(found)
                tail = source.tail
                state = await blocking(cache.fit, found, tail.first_lsn, tail.last_lsn)
                following = Following(source, cache, options, files)
                await following.start(state)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await source.aclose()
                raise
        except BaseException:
            cache.leave()
            raise
        self._following = following
        self._replica = _new_replica(following, self._promote, files)
        return self._replica

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._replica is not None:
            try:
                await self._replica._close()
            finally:
                await self._following.leave()


publish(Replica)
