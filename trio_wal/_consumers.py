"""Consumers: named places in a log, how they move, and what they hold.

Law: one event loop.  A place is durable before anybody sees that it has moved; whoever iterates
begins after it, so that what was not acknowledged is given again.  Who keeps the places is a
`Keeper`: for a log that is the engine (`EngineKeeper`), for a database its transactions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NoReturn, Protocol, final

import msgspec
import trio
from trio.lowlevel import enable_ki_protection

from ._exceptions import LogDivergedError, LogFullError
from ._identity import Bookmark, common_lsn
from ._log import Log
from ._park import require_trio
from ._places import CONSUMERS_MAX, Move, Place, Places, consumer_hold, is_after
from ._statistics import ConsumerStatistics
from ._stream import RecordStream, check_history, read_ahead
from ._text import printable
from ._util import check_int


class Keeper(Protocol):
    """Where places are, durably."""

    in_log: bool
    """Whether they move by records of the log: then they are of its history."""

    @property
    def places(self) -> Places: ...

    @property
    def stored(self) -> Mapping[str, Place]:
        """Places to which nothing can take a consumer back any more."""
        ...

    @property
    def durable_lsn(self) -> int: ...

    async def admit(self) -> None:
        """Called before the first place of a session begins or moves."""
        ...

    async def move(self, name: str, move: Move) -> None:
        """On return it is durable, and seen in `places`.

        Raises:
          LogFullError, OSError, LogFailedError, trio.ClosedResourceError
        """
        ...

    async def settle(self, name: str) -> None:
        """Wait until no move of this consumer's is under way."""
        ...


class _Group(msgspec.Struct, eq=False):
    """Moves that become durable by one write."""

    moves: dict[str, Move] = {}
    done: bool = False
    error: Exception | None = None

    def add(self, name: str, move: Move) -> None:
        old = self.moves.get(name)
        if old is None or is_after(move, old):
            self.moves[name] = move


@final
class EngineKeeper:
    """A `Keeper` of a log that is nobody's: the engine writes all places at once."""

    in_log = False

    def __init__(self, log: Log) -> None:
        self._log = log
        self.places: Final = Places(log.engine.places)
        self._next = _Group()
        self._one = trio.Lock()

    @property
    def stored(self) -> Mapping[str, Place]:
        return self.places.now

    @property
    def durable_lsn(self) -> int:
        return self._log.durable_lsn

    async def admit(self) -> None:
        pass

    @enable_ki_protection
    async def move(self, name: str, move: Move) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._log.status.check_usable()
        group = self._next
        group.add(name, move)
        with trio.CancelScope(shield=True):
            async with self._one:
                if not group.done:
                    # Whoever comes from here on waits for the write after this one.
                    self._next = _Group()
                    await self._write(group)
        if group.error is not None:
            self._raise(group.error)

    async def _write(self, group: _Group) -> None:
        moved = Places(self.places.now)
        moved.moved(group.moves)
        try:
            await self._log.engine.keep_places(moved.now)
        except (OSError, LogFullError, trio.ClosedResourceError) as exc:
            group.error = exc
        else:
            self.places.moved(group.moves)
        finally:
            group.done = True

    def _raise(self, error: Exception) -> NoReturn:
        """To each who has waited for the write."""
        self._log.status.check_usable()
        if isinstance(error, LogFullError):
            raise error.again()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, error.filename) from error
        raise trio.ClosedResourceError(f"{printable(self._log.name)}: this log is closed")

    async def settle(self, name: str) -> None:
        async with self._one:
            pass


@final
class Consumers:
    """Those of one log."""

    def __init__(self, log: Log, keeper: Keeper) -> None:
        self.log: Final = log
        self.keeper: Final = keeper
        self.in_use: Final[set[str]] = set()
        log.consumers = self.statistics
        self.hold_all()

    def hold(self, name: str) -> None:
        """Keep in the log what a consumer has yet to see, or may be given again after a crash."""
        places = self.keeper.places
        now, stored, began = places.now.get(name), self.keeper.stored.get(name), places.began(name)
        if now is None:
            self.log.hold(consumer_hold(name), None)
            return
        first = now.reach + 1
        if stored is not None:
            first = min(first, stored.reach + 1)
        if began is not None:
            first = min(first, began + 1)
        self.log.hold(consumer_hold(name), first, self.log.consumer_hold_bytes)

    def hold_all(self) -> None:
        """What is stored has changed."""
        for name in self.keeper.places.now:
            self.hold(name)

    async def drop(self, name: str) -> None:
        """End a consumer, durably."""
        self.log.status.check_usable()
        if name in self.in_use:
            await trio.lowlevel.checkpoint()
            raise _busy(name)
        self.in_use.add(name)
        try:
            await self.keeper.settle(name)
            if name not in self.keeper.places.now:
                await trio.lowlevel.checkpoint()
                raise KeyError(name)
            await self.keeper.admit()
            await self.keeper.move(name, Move(None))
            with trio.CancelScope(shield=True):
                # Where durability is less than "sync".
                await self.log.flush()
            self.hold(name)
        finally:
            self.in_use.discard(name)

    def statistics(self) -> Mapping[str, ConsumerStatistics]:
        keeper, engine = self.keeper, self.log.engine
        durable_lsn = keeper.durable_lsn
        found: dict[str, ConsumerStatistics] = {}
        for name, place in keeper.places.now.items():
            lag = keeper.places.lag(place, durable_lsn)
            size, seconds = engine.behind(place.reach) if lag else (0, 0.0)
            found[name] = ConsumerStatistics(
                acknowledged_lsn=place.lsn,
                lag_records=lag,
                lag_bytes=size,
                lag_seconds=seconds,
            )
        return found


def _busy(name: str) -> trio.BusyResourceError:
    return trio.BusyResourceError(f"consumer {name!r} is in use")


class Item(Protocol):
    """A record or a commit."""

    @property
    def lsn(self) -> int: ...


def check_start(start: int | Bookmark | None) -> int | Bookmark | None:
    """Raises `TypeError` or `ValueError` that names ``start``."""
    if start is None or isinstance(start, Bookmark):
        return start
    return check_int("start", start, 0)


@final
class Session:
    """One use of a consumer, from entering its block to leaving it."""

    def __init__(self, consumers: Consumers, name: str, start: int | Bookmark | None) -> None:
        self.name: Final = name
        self._consumers = consumers
        self._start = start
        self._stream: RecordStream | None = None
        self._left = False

    # -- the block --

    @enable_ki_protection
    async def enter(self) -> RecordStream:
        """Raises what `WriteAheadLog.consumer` says."""
        consumers, name = self._consumers, self.name
        if self._stream is not None or self._left:
            raise RuntimeError("a consumer's block can be used only once: call consumer() again")
        require_trio("log.consumer")
        await trio.lowlevel.checkpoint()
        consumers.log.status.check_usable()
        if name in consumers.in_use:
            raise _busy(name)
        consumers.in_use.add(name)
        try:
            await consumers.keeper.settle(name)
            place = consumers.keeper.places.now.get(name)
            if place is None:
                self._stream = await self._begin()
            else:
                stream = consumers.log.follow(self._bookmark(place))
                self._stream = await stream.__aenter__()
                with trio.CancelScope(shield=True):
                    await consumers.keeper.admit()
        except BaseException:
            if self._stream is not None:
                await self._stream.__aexit__(None, None, None)
            consumers.in_use.discard(name)
            raise
        return self._stream

    def _bookmark(self, place: Place) -> Bookmark:
        """Where to go on: behind acknowledgements that come directly after the place."""
        log = self._consumers.log
        tail = log.tail
        if self._consumers.keeper.in_log:
            return Bookmark(place.reach, tail.epoch)
        common = common_lsn(tail.history, place.epoch)
        if common is None or place.lsn > min(common, tail.last_lsn):
            parted = None if common is None else min(common, tail.last_lsn)
            raise LogDivergedError(log.name, place.bookmark, parted)
        return place.bookmark

    async def _begin(self) -> RecordStream:
        """Its first use: the place becomes durable before anything is given."""
        consumers = self._consumers
        log, keeper = consumers.log, consumers.keeper
        while True:
            stream = await log.follow(self._start).__aenter__()
            try:
                if len(keeper.places.now.keys() | consumers.in_use) > CONSUMERS_MAX:
                    raise ValueError(
                        f"name must be that of an existing consumer: there are already "
                        f"{CONSUMERS_MAX}; drop one first"
                    )
                begin = stream.bookmark
                log.hold(consumer_hold(self.name), begin.lsn + 1, log.consumer_hold_bytes)
                await log.engine.settle_holds()
                if log.tail.first_lsn <= begin.lsn + 1:
                    await keeper.admit()
                    await keeper.move(self.name, Move(begin, begins=True))
                    return stream
            except BaseException:
                await stream.__aexit__(None, None, None)
                consumers.hold(self.name)
                raise
            # The log was being cut at its beginning when the hold came.
            await stream.__aexit__(None, None, None)
            consumers.hold(self.name)

    @enable_ki_protection
    async def leave(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            self._left = True
            self._consumers.in_use.discard(self.name)
            await stream.__aexit__(None, None, None)

    @property
    def stream(self) -> RecordStream:
        if self._stream is None:
            self.check_open()
        assert self._stream is not None
        return self._stream

    def check_open(self) -> None:
        """Raises where nobody is in the block."""
        if self._left:
            raise trio.ClosedResourceError(f"consumer {self.name!r} is closed: its block was left")
        if self._stream is None:
            raise RuntimeError("enter the consumer first: async with log.consumer() as consumer")

    # -- acknowledging --

    def place_of(self, item: Item) -> Bookmark | None:
        """The place after an item that was given; None: it is acknowledged.

        Raises:
          ValueError: this consumer has not given it.
          LogDivergedError: it was, and is no longer in the log.
          trio.ClosedResourceError, LogFailedError
        """
        stream, lsn = self.stream, item.lsn
        self._consumers.log.status.check_usable()
        check_history(stream)
        now = self._consumers.keeper.places.now.get(self.name)
        if now is not None and lsn <= now.lsn:
            return None
        bookmark = stream.bookmark
        if lsn > bookmark.lsn:
            raise ValueError(
                f"item must be one that this consumer gave: it gave nothing after LSN "
                f"{bookmark.lsn}, and this is {lsn}"
            )
        # Until it is durable nobody takes any more: time to have the next ones read.
        read_ahead(stream, self._consumers.log.start_aside)
        return Bookmark(lsn, bookmark.epoch)

    async def acknowledge(self, item: Item) -> None:
        """On return everything up to the item is acknowledged, durably."""
        place = self.place_of(item)
        if place is None:
            await trio.lowlevel.checkpoint()
            return
        await self._consumers.keeper.move(self.name, Move(place))
        self._consumers.hold(self.name)
