"""Another process's database, followed: its store, and its log's tail in layers above it.

Law: never writes to log or store, takes no lock, and is never ahead of what is durable.  The
layers are those of `_mvcc`, to which the log is replayed as it grows; here nothing is committed.

A checkpoint of the owner's comes in pieces, and each of them may be in the store's read
transaction before the LSN that it belongs to.  They are of commits that were durable when that
transaction began.  So a store is shown only once everything that was durable after its beginning
has been replayed above it: then each key that a piece has set is set again in a layer.

When the store has come further, all begins anew: a new read transaction, and layers of what the
log has after it, which is little right after a checkpoint.  The layers of before are of no use
above another store: a deletion is forgotten where there was nothing to hide under it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Any, Final, NoReturn, final

import trio
from trio.lowlevel import Task

from ._base import ReadTransaction, StoreReader, StoreState
from ._engine import Forked
from ._exceptions import (
    CorruptLogError,
    LogDivergedError,
    LsnTruncatedError,
    UnsupportedFormatError,
)
from ._identity import Bookmark, common_lsn
from ._mvcc import Versions
from ._replay import replay_live
from ._statistics import ConsumerStatistics
from ._store_files import damaged, data_file, misfit
from ._stream import RecordStream, new_record_stream
from ._util import MiB
from ._watchsource import WatchSource
from ._watermark import Watermark

CHECK_BYTES: Final = 4 * MiB
"""Of log above the store, from which on it is asked whether it has come further."""
CHECK_SECONDS: Final = 0.1
"""Between two such questions."""
OPEN_TRIES: Final = 100
"""How often the owner may checkpoint and drop the log while this opens."""


class _NoStatus:
    """Of a log to which nothing is committed here."""

    refuses: bool = True
    disowned: bool = False

    def check_open(self) -> None:
        raise AssertionError("nothing is committed by a reader")


class _NoLog:
    """In the place of `_mvcc.CommitLog`."""

    status: _NoStatus = _NoStatus()

    def append(self, record: bytes, task: Task) -> Awaitable[int]:
        raise AssertionError("nothing is committed by a reader")

    def append_in_turn(self, record: bytes, line: Any, enter: Callable[[], None]) -> Awaitable[int]:
        raise AssertionError("nothing is committed by a reader")

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        raise AssertionError("nothing is committed by a reader")


class _Begun:
    """A store of which a read transaction was begun already; a `_base.Readable`."""

    def __init__(self, transaction: ReadTransaction) -> None:
        self._transaction = transaction

    def read(self) -> ReadTransaction:
        return self._transaction


@final
class Follower:
    """A database's durable state, as far as it was followed."""

    def __init__(self, path: str, source: WatchSource, store: StoreReader) -> None:
        self._path = path
        self.source: Final = source
        self._store = store
        self.versions: Versions
        self.checkpoint_lsn: int = 0
        """Up to here the store that is read has everything."""
        self.forked: bool = False
        self.failure: Exception | None = None
        """Why it follows no more."""
        self._checked = 0.0
        """When the store was asked how far it has come."""
        self._reached = Watermark()
        self._stopping = trio.CancelScope()
        self._former: list[Versions] = []
        """Those of before, while somebody may still be reading them."""

    @property
    def lsn(self) -> int:
        """The newest commit that is seen here."""
        return self.versions.durable_lsn

    @property
    def epoch(self) -> int:
        """Of the history that is seen here."""
        return self.versions.epoch

    # -- beginning --

    async def begin(self) -> RecordStream:
        """Read the store, and the log's tail above it; gives the stream that goes on from there.

        Raises:
          CorruptLogError, OSError, UnsupportedFormatError
        """
        source = self.source
        before: int | None = None
        for _ in range(OPEN_TRIES):
            transaction, state = await self._begin_store()
            lsn = state.lsn
            try:
                # After that: see the top of this module.
                await source.refresh()
                if lsn == before or lsn > source.tail.durable_lsn:
                    self._refuse(lsn)
                return await self._begin_above(transaction, state)
            except LsnTruncatedError:
                # The owner has checkpointed and dropped what was to be read.
                transaction.close()
                before = lsn
            except BaseException:
                transaction.close()
                raise
        raise CorruptLogError(self._path, 0, "its log is dropped faster than it can be read")

    async def _begin_store(self) -> tuple[ReadTransaction, StoreState]:
        """A read transaction of the store, and what it holds."""
        transaction, state = await self.source.blocking(self._store.read)
        if state is None:
            return transaction, StoreState(self.source.meta.log_uuid, 0)
        if state.log_uuid != self.source.meta.log_uuid:
            transaction.close()
            raise damaged(data_file(self._path), "the store belongs to another log")
        return transaction, state

    def _refuse(self, lsn: int) -> NoReturn:
        """Store and log do not fit."""
        source = self.source
        if source.damage is not None:
            raise CorruptLogError(*source.damage.args) from source.damage
        meta, tail = source.meta, source.tail
        state = StoreState(meta.log_uuid, lsn)
        wrong = misfit(state, meta.log_uuid, tail.first_lsn, tail.durable_lsn)
        raise damaged(data_file(self._path), wrong or f"LSN {lsn + 1} is not in its log")

    async def _begin_above(self, transaction: ReadTransaction, state: StoreState) -> RecordStream:
        durable_lsn, lsn = self.source.tail.durable_lsn, state.lsn
        stream = new_record_stream(self.source, lsn + 1, None, follow=True)
        await stream.__aenter__()
        try:
            versions = Versions(
                self._path,
                _Begun(transaction),
                _NoLog(),
                durable_lsn=lsn,
                checkpoint_bytes=1 << 62,
                max_transaction_bytes=0,
                stored=state,
            )
            versions.epoch = stream.bookmark.epoch
            while versions.durable_lsn < durable_lsn:
                await self._replay(versions, stream)
        except BaseException:
            await stream.__aexit__(None, None, None)
            raise
        self.versions, self.checkpoint_lsn = versions, lsn
        return stream

    async def _replay(self, versions: Versions, stream: RecordStream) -> None:
        """The next commits of the log."""
        records = await stream.batches(None).__anext__()
        versions.epoch = stream.bookmark.epoch
        await replay_live(versions, self.source.name, records)

    # -- following --

    async def run(self, stream: RecordStream) -> None:
        """Follow until stopped, or until nothing more can be read, which `failure` tells."""
        try:
            with self._stopping:
                while True:
                    await self._follow(stream)
                    stream = await self._begin_anew()
        except (Forked, trio.ClosedResourceError):
            return
        except (CorruptLogError, UnsupportedFormatError, OSError, MemoryError) as exc:
            self.failure = exc
        self._reached.release()

    async def _follow(self, stream: RecordStream) -> None:
        """Until all is to begin anew."""
        try:
            while not await self._store_is_newer():
                await self._replay(self.versions, stream)
                self._reached.reached(self.lsn)
        except LsnTruncatedError:
            # Fallen behind, or (its kind `LogDivergedError`) the end was cut: the store is right.
            return
        finally:
            await stream.__aexit__(None, None, None)

    async def _store_is_newer(self) -> bool:
        """Whether it has something of what is kept in memory here."""
        now = perf_counter()
        if self.versions.view.active.log_bytes < CHECK_BYTES or now < self._checked:
            return False
        transaction, state = await self._begin_store()
        transaction.close()
        self._checked = now + CHECK_SECONDS
        return state.lsn > self.checkpoint_lsn

    async def _begin_anew(self) -> RecordStream:
        former = self.versions
        stream = await self.begin()
        # Whoever reads it still has its store.
        former.close()
        self._former = [each for each in (*self._former, former) if each.readers.pins]
        self._reached.release()
        return stream

    def check_history(self, place: int | Bookmark) -> None:
        """Raises `LogDivergedError` where a bookmark is not in the log's history."""
        if isinstance(place, Bookmark):
            common = common_lsn(self.source.tail.history, place.epoch)
            if common is None or common < place.lsn:
                raise LogDivergedError(self._path, place, common)

    def sees(self, place: int | Bookmark) -> bool:
        """Whether that is seen here; a bookmark that is in the log's history."""
        if not isinstance(place, Bookmark):
            return self.lsn >= place
        # What was seen under an epoch of before may have been cut since.
        common = common_lsn(self.source.tail.history, self.epoch)
        return common is not None and min(self.lsn, common) >= place.lsn

    async def wait_news(self, lsn: int) -> None:
        """Until that LSN is seen here, or something has happened."""
        await self._reached.wait(lsn)

    def check_following(self) -> None:
        """Raises what ended the following: what is seen here may be old by now."""
        failure = self.failure
        if failure is None:
            return
        if isinstance(failure, (CorruptLogError, UnsupportedFormatError)):
            raise type(failure)(*failure.args) from failure
        if isinstance(failure, OSError):
            raise OSError(failure.errno, failure.strerror, failure.filename) from failure
        raise MemoryError(*failure.args) from failure

    # -- the end --

    def stop(self) -> None:
        """Nobody reads any more."""
        self._stopping.cancel()
        for versions in (*self._former, self.versions):
            versions.let_go()
        self._reached.release()

    def close(self) -> None:
        """Give everything back, after `run` has ended."""
        self.stop()
        self.versions.close()
        self._former.clear()
        self._store.close()

    def disown(self) -> None:
        """In a forked child: all of it is the parent's."""
        self.forked = True
        for versions in (*self._former, self.versions):
            versions.disown()
        self.source.blocking.disown()

    def state(self) -> StoreState:
        """What a store that holds what is seen here would say of itself."""
        lsn, places = self.lsn, self.versions.places
        uuid = self.source.meta.log_uuid
        return StoreState(uuid, lsn, dict(places.now), places.commit_lsn_at(lsn))

    def consumers(self) -> Mapping[str, ConsumerStatistics]:
        """The database's, as they are seen here."""
        places, lsn = self.versions.places, self.lsn
        found: dict[str, ConsumerStatistics] = {}
        for name, place in places.now.items():
            lag = places.lag(place, lsn)
            size, seconds = self.source.behind(place.reach) if lag else (0, 0.0)
            found[name] = ConsumerStatistics(
                acknowledged_lsn=place.lsn, lag_records=lag, lag_bytes=size, lag_seconds=seconds
            )
        return found

    def store_bytes(self) -> int:
        """Of the store's file."""
        return self._store.size()
