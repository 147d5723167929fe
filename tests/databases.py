"""What the tests of the database share: a home for it, its content, steered transactions."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal import Commit, Database, Transaction
from trio_wal.testing import MemoryFiles

T = TypeVar("T")
State = dict[bytes, bytes]

DB = "/db"
"""Where a database stands in `MemoryFiles`."""
TINY_SEGMENT = 1
"""A segment size that leaves room for a few short commits a segment."""


def open_memory_database(
    files: MemoryFiles, path: str = DB, **options: Any
) -> AbstractAsyncContextManager[Database]:
    return trio_wal.open_database(path, files=files, **options)


class Home:
    """Where a test keeps its database: in memory, or in a real directory."""

    def __init__(self, path: Path | None) -> None:
        self.files = MemoryFiles() if path is None else None
        self.path = DB if path is None else str(path / "db")

    def open(
        self, path: str | None = None, **options: Any
    ) -> AbstractAsyncContextManager[Database]:
        return trio_wal.open_database(path or self.path, files=self.files, **options)

    def beside(self, name: str) -> str:
        """Another path on the same disk."""
        return str(Path(self.path).with_name(name))


# -- content -----------------------------------------------------------------------


async def write(db: Database, items: dict[bytes, bytes | None]) -> int:
    """One transaction that writes these, None deletes; returns its LSN."""
    async with db.transaction() as tx:
        for key, value in items.items():
            if value is None:
                tx.delete(key)
            else:
                tx.put(key, value)
    assert tx.lsn is not None
    return tx.lsn


async def commits_of(db: Database, start: int | None = None) -> list[Commit]:
    """Every durable transaction that the log still has."""
    found: list[Commit] = []
    last = db.durable_lsn
    if last < (start or db.wal.first_lsn):
        return found
    async with db.changes(start) as commits:
        async for commit in commits:
            found.append(commit)
            if commit.lsn >= last:
                break
    return found


def after(state: State, commits: Iterable[Commit]) -> State:
    """The state that follows from ``state``: the serial oracle."""
    state = dict(state)
    for commit in commits:
        for operation in commit.operations:
            if operation.value is None:
                state.pop(operation.key, None)
            else:
                state[operation.key] = operation.value
    return state


async def check_content(db: Database, expected: State) -> None:
    """Every way to read the durable state shows just this."""
    items = sorted(expected.items())
    assert list(db.scan()) == items
    assert list(db.scan(reverse=True)) == items[::-1]
    with db.snapshot() as snap:
        assert list(snap.scan()) == items
    async with db.transaction() as tx:
        assert list(tx.scan()) == items
        for key, value in items:
            assert tx.get(key) == db.get(key) == value


def hash_tree(path: str | Path) -> dict[str, str]:
    """Every name below a directory, with a hash of what the file holds."""
    found = {}
    for entry in sorted(Path(path).rglob("*")):
        name = str(entry.relative_to(path))
        found[name] = hashlib.sha256(entry.read_bytes()).hexdigest() if entry.is_file() else "/"
    return found


# -- tasks -------------------------------------------------------------------------


@attrs.define(eq=False)
class Session:
    """A transaction in a task of its own, steered from outside step by step."""

    _steps: trio.MemorySendChannel[Callable[[Transaction], object]]
    _answers: trio.MemoryReceiveChannel[tuple[Any, BaseException | None]]
    outcome: Any = None
    """After the end: the LSN, or the exception."""
    ended: trio.Event = attrs.Factory(trio.Event)

    async def do(self, step: Callable[[Transaction], T]) -> T:
        """Call ``step(tx)`` in the session's task."""
        await self._steps.send(step)
        value, error = await self._answers.receive()
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    async def get(self, key: bytes) -> bytes | None:
        return await self.do(lambda tx: tx.get(key))

    async def put(self, key: bytes, value: bytes) -> None:
        await self.do(lambda tx: tx.put(key, value))

    async def scan(self, *args: Any, **kwargs: Any) -> State:
        return await self.do(lambda tx: dict(tx.scan(*args, **kwargs)))

    async def abort(self) -> None:
        await self.do(lambda tx: tx.abort())
        await self.commit()

    async def commit(self) -> Any:
        """Leave the block; gives the LSN, or the exception."""
        self.commit_soon()
        await self.ended.wait()
        return self.outcome

    def commit_soon(self) -> None:
        self._steps.close()


@asynccontextmanager
async def open_sessions(db: Database, count: int) -> AsyncIterator[list[Session]]:
    """So many transactions side by side."""

    async def run(
        session: Session,
        steps: trio.MemoryReceiveChannel[Callable[[Transaction], object]],
        answers: trio.MemorySendChannel[tuple[Any, BaseException | None]],
    ) -> None:
        try:
            async with db.transaction() as tx:
                async for step in steps:
                    try:
                        answer: tuple[Any, BaseException | None] = step(tx), None
                    except Exception as exc:  # noqa: BLE001  (the test looks at it)
                        answer = None, exc
                    await answers.send(answer)
            session.outcome = tx.lsn
        except trio_wal.WalError as exc:
            session.outcome = exc
        session.ended.set()

    async with trio.open_nursery() as nursery:
        sessions = []
        for _ in range(count):
            send_step, steps = trio.open_memory_channel[Callable[[Transaction], object]](0)
            send_answer, answers = trio.open_memory_channel[Any](0)
            session = Session(send_step, answers)
            nursery.start_soon(run, session, steps, send_answer)
            sessions.append(session)
        yield sessions
        nursery.cancel_scope.cancel()


async def hold_with_batch_in_flight(
    files: MemoryFiles, nursery: trio.Nursery, db: Database
) -> None:
    """Stall the disk with one commit in flight, so that the next ones stay queued."""
    files.hold()
    nursery.start_soon(db.put, b"in flight", b"")
    await wait_all_tasks_blocked()
