"""Every way to read a log, and whether what it gave of a damaged one is honest.

Law: a way is given files and tells what it got: records in order, and the error that ended
them.  It knows nothing of the damage.  Honest is everything, or a prefix of it and then
`CorruptLogError`; without the error no less than what is left of the log proves to have been
durable.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, Final

import attrs
import trio
from databases import open_memory_database
from logs import TINY

import trio_wal
from trio_wal import CorruptLogError, KeepAll, Record, UnsupportedFormatError, _reader
from trio_wal._cli.dump import _dump, pieces, transaction_pieces
from trio_wal._cli.inspect import _look
from trio_wal.testing import MemoryFiles

IDLE_SECONDS: Final = 0.05
"""Of a clock that jumps: a follower that has given nothing for so long waits for a writer."""
ENDLESS_SECONDS: Final = 3.0
"""Of the same clock: nothing here waits for anybody."""


@attrs.frozen
class Place:
    """Where the log stands, and what a way needs to know of it."""

    path: str
    database: bool
    middle_lsn: int
    """A record in the middle."""
    damage: Callable[[MemoryFiles], None]
    """Puts it in."""


@attrs.define
class Seen:
    """What a way to read gave."""

    start: int = 1
    """It was asked for records from here on."""
    records: list[Record] = attrs.Factory(list)
    durable_lsn: int | None = None
    """That the reader said was durable, at its end."""
    lsns: range | None = None
    """Instead of records: their LSNs only."""
    error: Exception | None = None
    opened: bool = False

    @property
    def last_lsn(self) -> int:
        if self.lsns is not None:
            return self.lsns.stop - 1
        return self.records[-1].lsn if self.records else self.start - 1


Way = Callable[[MemoryFiles, Place, Seen], Awaitable[None]]


async def _take(stream: Any, seen: Seen) -> None:
    async with stream as records:
        async for record in records:
            seen.records.append(record)


async def _reader_read(files: MemoryFiles, place: Place, seen: Seen) -> None:
    place.damage(files)
    async with trio_wal.open_reader(place.path, files=files) as reader:
        seen.opened = True
        await _take(reader.read(), seen)
        seen.durable_lsn = reader.durable_lsn


async def _no_word(files: MemoryFiles, place: Place, seen: Seen) -> None:
    """Without the owner's word: the file with it was unlinked."""
    files.open_directory(place.path).publish(0, 0)
    await _reader_read(files, place, seen)


async def _middle(files: MemoryFiles, place: Place, seen: Seen) -> None:
    place.damage(files)
    seen.start = place.middle_lsn
    async with trio_wal.open_reader(place.path, files=files) as reader:
        seen.opened = True
        await _take(reader.read(place.middle_lsn), seen)


async def _follow(files: MemoryFiles, place: Place, seen: Seen) -> None:
    place.damage(files)
    async with trio_wal.open_reader(place.path, files=files) as reader:
        seen.opened = True
        await _follow_on(reader, seen)


async def _follow_on(reader: Any, seen: Seen) -> None:
    with trio.CancelScope() as scope:
        async with reader.follow() as records:
            scope.deadline = trio.current_time() + IDLE_SECONDS
            async for record in records:
                seen.records.append(record)
                scope.deadline = trio.current_time() + IDLE_SECONDS


async def _under_a_reader(files: MemoryFiles, place: Place, seen: Seen) -> None:
    """Damaged after the reader had read all of it."""
    async with trio_wal.open_reader(place.path, files=files) as reader:
        await _take(reader.read(), Seen())
        place.damage(files)
        seen.opened = True
        await _take(reader.read(), seen)


async def _under_a_follower(files: MemoryFiles, place: Place, seen: Seen) -> None:
    """Damaged when a follower had been given all up to the middle."""
    async with (
        trio_wal.open_reader(place.path, files=files) as reader,
        reader.follow() as records,
    ):
        while seen.last_lsn < place.middle_lsn:
            seen.records.append(await records.__anext__())
        place.damage(files)
        seen.opened = True
        with trio.CancelScope() as scope:
            while True:
                scope.deadline = trio.current_time() + IDLE_SECONDS
                seen.records.append(await records.__anext__())


async def _owner(files: MemoryFiles, place: Place, seen: Seen) -> None:
    """Damaged after its owner had opened it; read by the owner."""
    async with AsyncExitStack() as stack:
        if place.database:
            path = place.path.rpartition("/")[0]
            opening = open_memory_database(
                files, path, segment_size=TINY, retention=KeepAll(), verify_bytes=0
            )
            wal = (await stack.enter_async_context(opening)).wal
        else:
            opening = trio_wal.open_wal(place.path, files=files, segment_size=TINY, verify_bytes=0)
            wal = await stack.enter_async_context(opening)
        place.damage(files)
        seen.opened = True
        await _take(wal.read(), seen)


async def _dump_all(files: MemoryFiles, place: Place, seen: Seen) -> None:
    """`trio-wal dump`: what stands behind the command, with its output thrown away."""
    place.damage(files)

    def pieces_of(record: Record) -> Iterator[bytes]:
        seen.records.append(record)
        return transaction_pieces(place.path, record) if place.database else pieces(record)

    with _no_output():
        async with trio_wal.open_reader(place.path, files=files) as reader:
            seen.opened = True
            async with reader.read() as records:
                await _dump(records, None, pieces_of)


@contextmanager
def _no_output() -> Iterator[None]:
    before, sys.stdout = sys.stdout, io.TextIOWrapper(io.BytesIO())
    try:
        yield
    finally:
        sys.stdout = before


async def _inspect_all(files: MemoryFiles, place: Place, seen: Seen) -> None:
    """`trio-wal inspect`: the LSNs that it shows."""
    place.damage(files)
    log = _look(files.open_directory(place.path))
    seen.lsns = range(log.first_lsn, log.last_lsn + 1)
    seen.durable_lsn = log.durable_lsn
    seen.opened = True
    for finding in log.findings[:1]:
        seen.error = CorruptLogError(finding.path, finding.offset, finding.reason)


READ: Final = "read"
NO_WORD: Final = "read, no word"
OWNER: Final = "owner"
WAYS: Final[dict[str, Way]] = {
    READ: _reader_read,
    NO_WORD: _no_word,
    "middle": _middle,
    "follow": _follow,
    "under a reader": _under_a_reader,
    "under a follower": _under_a_follower,
    OWNER: _owner,
    "dump": _dump_all,
    "inspect": _inspect_all,
}


@contextmanager
def quick() -> Iterator[None]:
    """Nobody writes here: what looks wrong need not be given time."""
    before = _reader.RETRY_SECONDS
    setattr(_reader, "RETRY_SECONDS", 0)  # noqa: B010  (a constant)
    try:
        yield
    finally:
        setattr(_reader, "RETRY_SECONDS", before)  # noqa: B010


class Endless(Exception):
    """A way to read came to no end."""


async def look(way: str, files: MemoryFiles, place: Place) -> Seen:
    """What a way gives of these files, its error included."""
    seen = Seen()
    try:
        with trio.fail_after(ENDLESS_SECONDS):
            await WAYS[way](files, place, seen)
    except (CorruptLogError, UnsupportedFormatError) as exc:
        seen.error = exc
    except trio.TooSlowError:
        raise Endless(f"it tries for ever, after LSN {seen.last_lsn}") from None
    return seen
