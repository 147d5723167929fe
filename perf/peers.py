"""What a trio program could use instead: SQLite, LMDB, RocksDB and LevelDB, all durable.

Law: each peer gets its best arrangement, chosen by measuring all of them: calls through
one worker thread, through trio's forty, or collected by hand, which is what an expert
would write: one task takes whatever other tasks have queued and commits it as one
transaction.  Calls in the event loop are held against a log that syncs there, too.  Every
commit is synced: SQLite in WAL mode with ``synchronous=FULL``, LMDB with its default sync,
RocksDB and LevelDB with the sync write option.
"""

from __future__ import annotations

import importlib
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import trio

IN_THREADS: Final = ("one thread", "40 threads", "by hand")
IN_LOOP: Final = "in the loop"
"""What many programs do: the event loop stands still for each commit."""
ARRANGEMENTS: Final = (*IN_THREADS, IN_LOOP)
MAP_SIZE: Final = 1 << 34
BUSY_SECONDS: Final = 60.0

Writes = Mapping[bytes, bytes]


class Peer(ABC):
    """One store; every method blocks."""

    name: str

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def commit(self, writes: Writes) -> None:
        """One durable transaction; called from several threads at a time."""

    @abstractmethod
    def close(self) -> None: ...


class Sqlite(Peer):
    name = "sqlite3"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        path.mkdir()
        self._local = threading.local()
        self._all: list[sqlite3.Connection] = []
        connection = self._connection()
        connection.execute("CREATE TABLE kv (k BLOB PRIMARY KEY, v BLOB) WITHOUT ROWID")
        connection.execute("CREATE TABLE counter (n INTEGER)")
        connection.execute("INSERT INTO counter VALUES (0)")

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self.path / "db",
                isolation_level=None,
                check_same_thread=False,
                timeout=BUSY_SECONDS,
            )
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            self._local.connection = connection
            self._all.append(connection)
        return connection

    def commit(self, writes: Writes) -> None:
        connection = self._connection()
        if len(writes) == 1:
            # A statement by itself is a transaction.
            connection.execute("INSERT OR REPLACE INTO kv VALUES (?, ?)", *writes.items())
            return
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT OR REPLACE INTO kv VALUES (?, ?)", writes.items())
        connection.execute("COMMIT")

    def increment(self) -> None:
        self._connection().execute("UPDATE counter SET n = n + 1")

    def counter(self) -> int:
        row = self._connection().execute("SELECT n FROM counter").fetchone()
        return int(row[0])

    def close(self) -> None:
        for connection in self._all:
            connection.close()


class Lmdb(Peer):
    name = "lmdb"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        path.mkdir()
        self._env: Any = importlib.import_module("lmdb").open(str(path), map_size=MAP_SIZE)

    def commit(self, writes: Writes) -> None:
        with self._env.begin(write=True) as txn:
            for key, value in writes.items():
                txn.put(key, value)

    def close(self) -> None:
        self._env.close()


class Rocks(Peer):
    name = "rocksdict"
    recycled = 0
    """So many files of its log are kept, to be written over."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        module: Any = importlib.import_module("rocksdict")
        self._batch: Any = module.WriteBatch
        options = module.Options(raw_mode=True)
        if self.recycled:
            options.set_recycle_log_file_num(self.recycled)
        self._db: Any = module.Rdict(str(path), options)
        synced = module.WriteOptions()
        synced.sync = True
        self._synced: Any = synced
        self._db.set_write_options(synced)

    def commit(self, writes: Writes) -> None:
        if len(writes) == 1:
            for key, value in writes.items():
                self._db[key] = value
            return
        batch = self._batch(raw_mode=True)
        for key, value in writes.items():
            batch.put(key, value)
        self._db.write(batch, self._synced)

    def close(self) -> None:
        self._db.close()


class RecycledRocks(Rocks):
    name = "rocksdict recycled"
    recycled = 4


class Level(Peer):
    name = "plyvel"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._db: Any = importlib.import_module("plyvel").DB(str(path), create_if_missing=True)

    def commit(self, writes: Writes) -> None:
        with self._db.write_batch(sync=True) as batch:
            for key, value in writes.items():
                batch.put(key, value)

    def close(self) -> None:
        self._db.close()


PEERS: Final[tuple[type[Peer], ...]] = (Sqlite, Lmdb, Rocks, RecycledRocks, Level)


class Threads:
    """A commit is one call in a worker thread."""

    def __init__(self, peer: Peer, threads: int) -> None:
        self._peer = peer
        self._limiter = trio.CapacityLimiter(threads)

    async def run(self) -> None:
        await trio.sleep_forever()

    async def commit(self, writes: Writes) -> None:
        await trio.to_thread.run_sync(self._peer.commit, writes, limiter=self._limiter)


class ByHand:
    """One task commits what all others have queued, as one transaction."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._limiter = trio.CapacityLimiter(1)
        self._writes: dict[bytes, bytes] = {}
        self._done = trio.Event()
        self._some = trio.Event()

    async def run(self) -> None:
        while True:
            await self._some.wait()
            # Let the woken run once: what they write goes into this transaction.
            await trio.lowlevel.checkpoint()
            writes, self._writes = self._writes, {}
            done, self._done = self._done, trio.Event()
            self._some = trio.Event()
            await trio.to_thread.run_sync(self._peer.commit, writes, limiter=self._limiter)
            done.set()

    async def commit(self, writes: Writes) -> None:
        self._writes.update(writes)
        self._some.set()
        await self._done.wait()


class InLoop:
    """A commit is one call in the event loop, which goes on to other tasks after it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def run(self) -> None:
        await trio.sleep_forever()

    async def commit(self, writes: Writes) -> None:
        self._peer.commit(writes)
        await trio.lowlevel.checkpoint()


def arrange(peer: Peer, arrangement: str) -> Threads | ByHand | InLoop:
    if arrangement == "by hand":
        return ByHand(peer)
    if arrangement == IN_LOOP:
        return InLoop(peer)
    return Threads(peer, 1 if arrangement == "one thread" else 40)
