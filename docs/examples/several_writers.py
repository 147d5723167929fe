"""Several processes that write into one database: one owns it, the others send to it.

    python docs/examples/several_writers.py own notes.db notes.socket
    python docs/examples/several_writers.py write notes.socket --name alice --count 1000

The socket's mode is 0600: only processes of the same user (and root's) get through.

A writer gives each request the next number, and sends together what its tasks want written at the
same time.  The owner commits all that has arrived on a connection in one transaction, together with
the writer's last number, and acknowledges up to that number; commits of several connections share a
sync.  Whichever side is killed: the writer connects again, is told its last number, and sends what
comes after it.  So nothing that was acknowledged is lost, and nothing is there twice.

The owner does nothing else, so that its event loop may stand still while the disk is written
(`sync_in="loop"`).

While a commit waits for the disk, its connection is not read: the socket's buffer fills up, and
the writer's `send_all` waits.  Whoever sends what is no request is cut off, and nobody else
notices.  `several_writers_bench.py` compares this with SQLite.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator

import msgspec
import trio

import trio_wal

FRAME_BYTES_MAX = 1 << 20
BATCH_BYTES_MAX = FRAME_BYTES_MAX - 100  # so much less is in one frame
HEAD_BYTES = 5  # at most, of data in MessagePack
NAME_CHARACTERS_MAX = 100


class Requests(msgspec.Struct, array_like=True):
    """What a writer's tasks wanted written at the same time."""

    first: int  # its number; each other one has the next
    data: list[bytes]


class Entry(msgspec.Struct, array_like=True):
    writer: str
    number: int
    data: bytes


decode_requests = msgspec.msgpack.Decoder(Requests).decode

entries = trio_wal.Table("entries", key=int, value=Entry)
writers = trio_wal.Table("writers", key=str, value=int)  # the last number of each
lengths = trio_wal.Table("lengths", key=str, value=int)


class Frames:
    """Messages on a stream: four bytes of length, then MessagePack."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    @staticmethod
    def encode(message: object) -> bytes:
        data = msgspec.msgpack.encode(message)
        return len(data).to_bytes(4, "big") + data

    async def receive(self) -> list[bytes]:
        """All that have arrived, one at least; none at the end of the stream."""
        frames: list[bytes] = []
        buffer = self._buffer
        while not frames:
            data = await self._stream.receive_some(1 << 16)
            if not data:
                return []
            buffer += data
            start = 0
            while len(buffer) - start >= 4:
                size = int.from_bytes(buffer[start : start + 4], "big")
                if size > FRAME_BYTES_MAX:
                    raise ValueError(f"a frame of {size} bytes")
                if len(buffer) - start - 4 < size:
                    break
                frames.append(bytes(buffer[start + 4 : start + 4 + size]))
                start += 4 + size
            del buffer[:start]
        return frames


# -- the owner ----------------------------------------------------------------------


async def commit(db: trio_wal.Database, name: str, received: list[Requests]) -> int:
    """The number up to which the writer's requests are durable."""
    async with db.transaction() as tx:
        before = last = writers.get(tx, name, 0)
        length = lengths.get(tx, "entries", 0)
        for requests in received:
            if requests.first > last + 1:
                raise ValueError(f"request {requests.first} after {last}")
            # What is there was sent again, after a connection broke.
            for data in requests.data[last + 1 - requests.first :]:
                last, length = last + 1, length + 1
                entries.put(tx, length, Entry(name, last, data))
        if last > before:
            writers.put(tx, name, last)
            lengths.put(tx, "entries", length)
    return last


class Owner:
    def __init__(self, db: trio_wal.Database) -> None:
        self._db = db
        self._connected: dict[str, tuple[trio.CancelScope, trio.Event]] = {}

    async def serve(self, stream: trio.SocketStream) -> None:
        frames = Frames(stream)
        try:
            if received := await frames.receive():
                name = msgspec.msgpack.decode(received.pop(0), type=str)
                if not 0 < len(name) <= NAME_CHARACTERS_MAX:
                    raise ValueError(f"a name of {len(name)} characters")
                async with self._alone(name):
                    while True:
                        requests = [decode_requests(frame) for frame in received]
                        last = await commit(self._db, name, requests)
                        await stream.send_all(Frames.encode(last))
                        if not (received := await frames.receive()):
                            return
        except trio_wal.WalError:
            raise  # LogFailedError is a BrokenResourceError, but no fault of the writer's
        except (trio.BrokenResourceError, ValueError, msgspec.MsgspecError) as exc:
            print(f"a writer was cut off: {exc!r}", file=sys.stderr)

    @contextlib.asynccontextmanager
    async def _alone(self, name: str) -> AsyncIterator[None]:
        """Of a writer that was killed and is back, the first connection ends before the second
        is told a number: what the first has sent and nobody has read is not to come later."""
        while name in self._connected:
            scope, ended = self._connected[name]
            scope.cancel()
            await ended.wait()
        ended = trio.Event()
        with trio.CancelScope() as scope:
            self._connected[name] = scope, ended
            try:
                yield
            finally:
                del self._connected[name]
                ended.set()


async def own(path: str, socket_path: str) -> None:
    async with trio_wal.open_database(path, sync_in="loop") as db:
        # There is one owner at a time: a socket that is here is left over from the one before.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket_path)
        socket = trio.socket.socket(trio.socket.AF_UNIX)
        await socket.bind(socket_path)
        os.chmod(socket_path, 0o600)  # nobody can connect before listen()
        socket.listen(100)
        print("ready", flush=True)
        await trio.serve_listeners(Owner(db).serve, [trio.SocketListener(socket)])


# -- a writer -----------------------------------------------------------------------


class Batch:
    """Requests that are sent together, and acknowledged together."""

    def __init__(self, first: int) -> None:
        self.requests = Requests(first, [])
        self.size = 0
        self.durable = trio.Event()

    @property
    def last(self) -> int:
        return self.requests.first + len(self.requests.data) - 1


class Writer:
    """Any number of tasks `write` through one connection, which `run` keeps up.

    One process at a time uses a name.
    """

    def __init__(self, socket_path: str, name: str) -> None:
        self._socket_path = socket_path
        self._name = name
        self._last = 0
        self._under_way: deque[Batch] = deque()
        self._filling: Batch | None = None  # the newest of them, until it is sent
        self._news = trio.Event()

    async def write(self, data: bytes) -> int:
        """Returns the request's number when it is durable.  Cancelled: it may be written or not.

        Numbers are given in the order of calls; each task that calls has one under way.
        """
        size = len(data) + HEAD_BYTES
        if size > BATCH_BYTES_MAX:
            raise ValueError(f"data has {len(data)} bytes, over {BATCH_BYTES_MAX - HEAD_BYTES}")
        batch = self._filling
        if batch is None or batch.size + size > BATCH_BYTES_MAX:
            batch = self._filling = Batch(self._last + 1)
            self._under_way.append(batch)
            self._news.set()
        self._last += 1
        number = self._last
        batch.requests.data.append(data)
        batch.size += size
        await batch.durable.wait()
        return number

    async def run(self, *, task_status: trio.TaskStatus[int]) -> None:
        """Starts with the number of the last request of this name that the owner has."""
        first = True
        while True:
            with contextlib.suppress(OSError, trio.BrokenResourceError):
                async with await trio.open_unix_socket(self._socket_path) as stream:
                    frames = Frames(stream)
                    await stream.send_all(Frames.encode(self._name))
                    for frame in await frames.receive():
                        self._acknowledge(frame)
                        if first:
                            first, self._last = False, msgspec.msgpack.decode(frame, type=int)
                            task_status.started(self._last)
                        await self._talk(stream, frames)
            await trio.sleep(0.05)  # the owner is being started again

    async def _talk(self, stream: trio.SocketStream, frames: Frames) -> None:
        async def send() -> None:
            sent = 0
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    self._news = trio.Event()
                    self._filling = None
                    waiting = [batch for batch in self._under_way if batch.last > sent]
                    if waiting:
                        sent = waiting[-1].last
                        await stream.send_all(b"".join(Frames.encode(b.requests) for b in waiting))
                    else:
                        await self._news.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            with contextlib.suppress(trio.BrokenResourceError):
                while received := await frames.receive():
                    self._acknowledge(received[-1])
            nursery.cancel_scope.cancel()

    def _acknowledge(self, frame: bytes) -> None:
        number = msgspec.msgpack.decode(frame, type=int)
        while self._under_way and self._under_way[0].last <= number:
            self._under_way.popleft().durable.set()


async def write(socket_path: str, name: str, count: int, tasks: int, quiet: bool) -> None:
    writer = Writer(socket_path, name)

    async def task() -> None:
        for number in numbers:
            written = await writer.write(b"note %d" % number)
            if not quiet:
                print("written", written, flush=True)

    async with trio.open_nursery() as nursery:
        last = await nursery.start(writer.run)
        print("the owner has", last, flush=True)
        numbers = iter(range(last + 1, count + 1))
        start = time.monotonic()
        async with trio.open_nursery() as tasks_nursery:
            for _ in range(tasks):
                tasks_nursery.start_soon(task)
        print("written from", start, "to", time.monotonic())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Several processes write into one database.")
    commands = parser.add_subparsers(dest="command", required=True)
    owner = commands.add_parser("own")
    owner.add_argument("path")
    owner.add_argument("socket")
    client = commands.add_parser("write")
    client.add_argument("socket")
    client.add_argument("--name", required=True)
    client.add_argument("--count", type=int, default=1000, help="what it writes in all its lives")
    client.add_argument("--tasks", type=int, default=64)
    client.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    if given.command == "own":
        trio.run(own, given.path, given.socket)
    else:
        trio.run(write, given.socket, given.name, given.count, given.tasks, given.quiet)
