"""Every way to read a log, and whether what it gave of a damaged one is honest.

Law: a way is opened on a log that is sound, is then shown one damage after the other, each put
in and taken out again, and tells what it got: records in order, and the error that ended them.
It knows nothing of the damage.  Honest is everything, or a prefix of it and then
`CorruptLogError`; without the error no less than what is left of the log proves to have been
durable.
"""

from __future__ import annotations

import io
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, Final
from unittest import mock

import attrs
import trio
from databases import open_memory_database
from logs import TINY

import trio_wal
from trio_wal import (
    Commit,
    CorruptLogError,
    KeepAll,
    Record,
    UnsupportedFormatError,
    _watchsource,
)
from trio_wal._cli.dump import _Bounds, _dump, pieces, transaction_pieces
from trio_wal._cli.inspect import _look
from trio_wal._disk import cursor as _cursor
from trio_wal.testing import MemoryFiles

IDLE_SECONDS: Final = 0.03
"""Of a clock that jumps: a follower that has given nothing for so long waits for a writer."""
ENDLESS_SECONDS: Final = 30.0
"""Of the same clock: nothing here waits for anybody."""


@attrs.frozen(eq=False)
class Scene:
    """A log that is sound, but for the moment at which a damage is looked at."""

    files: MemoryFiles
    path: str
    database: bool
    middle_lsn: int
    """A record in the middle."""

    @contextmanager
    def damaged(self, changes: dict[str, bytes | None]) -> Iterator[None]:
        """With these files changed; None: gone."""
        files, path = self.files, self.path
        before = {
            name: files.read_file(path, name) if name in files.names(path) else None
            for name in changes
        }
        try:
            self._put(changes)
            yield
        finally:
            self._put(before)

    def _put(self, changes: dict[str, bytes | None]) -> None:
        for name, data in changes.items():
            if data is not None:
                self.files.write_file(self.path, name, data)
            elif name in self.files.names(self.path):
                self.files.remove_file(self.path, name)


@attrs.define
class Seen:
    """What was got in one go."""

    what: str
    start: int = 1
    """It was asked for records from here on."""
    records: list[Record] = attrs.Factory(list)
    commits: list[Commit] | None = None
    """Instead of records, of a database."""
    durable_lsn: int | None = None
    """That the reader said was durable, at its end."""
    lsns: range | None = None
    """Instead of records: their LSNs only."""
    error: Exception | None = None
    strange: str = ""
    """Another error than there may be."""
    opened: bool = False

    @property
    def last_lsn(self) -> int:
        if self.lsns is not None:
            return self.lsns.stop - 1
        given: list[Any] = self.records if self.commits is None else self.commits
        return int(given[-1].lsn) if given else self.start - 1


See = Callable[[dict[str, bytes | None]], Awaitable[list[Seen]]]
"""Shown one damage, tells what it got."""
Way = Callable[[Scene], AbstractAsyncContextManager[See]]


@contextmanager
def _ending(*goes: Seen) -> Iterator[None]:
    """Whatever ends these is told."""
    try:
        yield
    except (CorruptLogError, UnsupportedFormatError) as exc:
        for seen in goes:
            seen.error = exc
    except Exception as exc:  # noqa: BLE001  (it is a finding)
        for seen in goes:
            seen.strange = f"no typed error: {exc!r}"


@asynccontextmanager
async def _one_go(seen: Seen) -> AsyncIterator[trio.CancelScope]:
    """To its end, or until it comes to none."""
    with _ending(seen), trio.move_on_after(ENDLESS_SECONDS) as scope:
        seen.opened = True
        yield scope
    if scope.cancelled_caught:
        seen.strange = f"it tries for ever, after LSN {seen.last_lsn}"


async def _read(reader: Any, seen: Seen, *, ends: bool = False) -> None:
    """``ends``: also what is called durable, where it comes to an end."""
    start = seen.start if seen.start > 1 else None
    async with _one_go(seen), reader.read(start) as records:
        async for record in records:
            seen.records.append(record)
    if ends:
        _end(reader, seen)


def _end(reader: Any, seen: Seen) -> None:
    if seen.error is None and not seen.strange:
        seen.durable_lsn = reader.durable_lsn


async def _follow(stream: Any, seen: Seen, given: list[Any]) -> None:
    """Until nothing more comes."""
    async with _one_go(seen):
        with trio.move_on_after(ENDLESS_SECONDS / 2) as idle:
            async with stream as items:
                idle.deadline = trio.current_time() + IDLE_SECONDS
                async for item in items:
                    given.append(item)
                    idle.deadline = trio.current_time() + IDLE_SECONDS


# -- the ways -------------------------------------------------------------------------------


@asynccontextmanager
async def _anew(scene: Scene) -> AsyncIterator[See]:
    """A reader of its own for each damage."""

    async def see(changes: dict[str, bytes | None]) -> list[Seen]:
        whole, middle = Seen("dump"), Seen("read from the middle", scene.middle_lsn)
        follow = Seen("follow")
        goes = [whole, middle, follow]
        with scene.damaged(changes), _ending(*goes):
            async with trio_wal.open_reader(scene.path, files=scene.files) as reader:
                await _dump_all(scene, reader, whole)
                _end(reader, whole)
                await _read(reader, middle)
                await _follow(reader.follow(), follow, follow.records)
        return goes

    yield see


async def _dump_all(scene: Scene, reader: Any, seen: Seen) -> None:
    """Reads all, as the command does, with its output thrown away."""

    def pieces_of(record: Record) -> Iterator[bytes]:
        seen.records.append(record)
        return transaction_pieces(scene.path, record) if scene.database else pieces(record)

    before, sys.stdout = sys.stdout, io.TextIOWrapper(io.BytesIO())
    try:
        async with _one_go(seen), reader.read() as records:
            await _dump(records, _Bounds(), pieces_of, None)
    finally:
        sys.stdout = before


@asynccontextmanager
async def _no_word(scene: Scene) -> AsyncIterator[See]:
    """Without the owner's word: the file with it was unlinked."""
    scene.files.open_directory(scene.path).publish(0, 0)

    async def see(changes: dict[str, bytes | None]) -> list[Seen]:
        whole = Seen("read")
        with scene.damaged(changes), _ending(whole):
            async with trio_wal.open_reader(scene.path, files=scene.files) as reader:
                await _read(reader, whole, ends=True)
        return [whole]

    yield see


@asynccontextmanager
async def _under_a_reader(scene: Scene) -> AsyncIterator[See]:
    """One that had read all before, and a follower that had come to the middle, a frame at a
    time; when the damage is gone it must be forgotten."""
    async with trio_wal.open_reader(scene.path, files=scene.files) as reader:

        async def see(changes: dict[str, bytes | None]) -> list[Seen]:
            whole = Seen("read under an open reader")
            middle = Seen("follow, damaged in the middle", scene.middle_lsn)
            before = Seen("what was damaged before")
            with _frame_by_frame(), _ending(before):
                async with reader.follow(scene.middle_lsn) as records:
                    middle.records.append(await records.__anext__())
                    with scene.damaged(changes):
                        await _follow(_Entered(records), middle, middle.records)
                        await _read(reader, whole, ends=True)
            if before.error is not None or before.strange:
                before.strange = f"it was not forgotten: {before.error or before.strange}"
            return [middle, whole, *([before] if before.strange else [])]

        yield see


@attrs.frozen(eq=False)
class _Entered:
    """A stream that is left by somebody else."""

    stream: Any

    async def __aenter__(self) -> Any:
        return self.stream

    async def __aexit__(self, *_: object) -> None:
        pass


def _frame_by_frame() -> AbstractContextManager[Any]:
    """A chunk has one frame."""
    return mock.patch.object(_cursor, "CHUNK_BYTES", 1)


@asynccontextmanager
async def _owner(scene: Scene) -> AsyncIterator[See]:
    """Damaged after its owner had opened it; read by the owner."""
    async with AsyncExitStack() as stack:
        db: Any = None
        if scene.database:
            path = scene.path.rpartition("/")[0]
            opening = open_memory_database(
                scene.files, path, segment_size=TINY, retention=KeepAll(), verify_bytes=0
            )
            db = await stack.enter_async_context(opening)
            wal = db.wal
        else:
            wal = await stack.enter_async_context(
                trio_wal.open_wal(scene.path, files=scene.files, segment_size=TINY, verify_bytes=0)
            )

        async def see(changes: dict[str, bytes | None]) -> list[Seen]:
            goes = [Seen("owner's read")]
            with scene.damaged(changes):
                await _read(wal, goes[0])
                if db is not None:
                    commits: list[Commit] = []
                    goes.append(Seen("changes", commits=commits))
                    await _follow(db.changes(1), goes[1], commits)
            return goes

        yield see


@asynccontextmanager
async def _inspect(scene: Scene) -> AsyncIterator[See]:
    """`trio-wal inspect`: the LSNs that it shows."""

    async def see(changes: dict[str, bytes | None]) -> list[Seen]:
        seen = Seen("inspect")
        with scene.damaged(changes), _ending(seen):
            log = _look(scene.files.open_directory(scene.path))
            seen.opened = True
            seen.lsns = range(log.first_lsn, log.last_lsn + 1)
            seen.durable_lsn = log.durable_lsn
            for finding in log.findings[:1]:
                seen.error = CorruptLogError(finding.path, finding.offset, finding.reason)
        return [seen]

    yield see


READER: Final = "reader"
NO_WORD: Final = "reader, no word"
OPEN: Final = "open reader"
OWNER: Final = "owner"
INSPECT: Final = "inspect"
WAYS: Final[dict[str, Way]] = {
    READER: _anew,
    NO_WORD: _no_word,
    OPEN: _under_a_reader,
    OWNER: _owner,
    INSPECT: _inspect,
}
WRITERS: Final = (OWNER,)
"""These may write."""


def quick() -> AbstractContextManager[Any]:
    """Nobody writes here: what looks wrong need not be given time."""
    return mock.patch.object(_watchsource, "RETRY_SECONDS", 0)
