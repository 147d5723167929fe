"""A log shipper: reads a log that another process writes, and sends it to a copy elsewhere.

    python docs/examples/log_shipper.py receive copy.wal 4711
    python docs/examples/log_shipper.py ship orders.wal 127.0.0.1 4711

The shipper needs no lock, keeps nothing, and may be killed.  The copy is a log, too, and each of
its records has the bookmark that it was sent with.  So the receiver knows how far it has come, and
tells each shipper that connects.  If the end of the log was cut (`truncate_after`), or the log was
restored from a backup, its history is another one from some LSN on.  `LogDivergedError` says so to
the shipper, which tells the receiver to cut its copy there, and goes on.

A receiver that has been away for longer than the log's retention cannot be helped from the log:
`LsnTruncatedError` ends the shipper.  Let it begin with a backup.  The connection is neither
encrypted nor authenticated: for more than one machine put TLS (`trio.SSLStream`) around it.
"""

from __future__ import annotations

import argparse
from typing import Any

import msgspec
import trio

import trio_wal
from trio_wal import Bookmark, LogDivergedError, LogReader, WriteAheadLog

RECORDS_MAX = 100
"""In a message."""
MESSAGE_BYTES_MAX = (RECORDS_MAX + 1) << 24
"""A record has 16 MiB at most, unless the log was opened with another max_record_size."""


class Batch(msgspec.Struct, tag=True):
    first_lsn: int
    epoch: int
    records: list[bytes]


class Cut(msgspec.Struct, tag=True):
    after_lsn: int
    """What comes after it is no longer in the log."""


class Copied(msgspec.Struct, array_like=True):
    """A record of the copy."""

    lsn: int
    epoch: int
    data: bytes


class Connection:
    """Messages on a stream: four bytes of length, then MessagePack."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def send(self, message: object) -> None:
        data = msgspec.msgpack.encode(message)
        await self._stream.send_all(len(data).to_bytes(4, "big") + data)

    async def receive(self, kind: Any) -> Any:
        """None: the other side is gone."""
        if (length := await self._take(4)) is None:
            return None
        size = int.from_bytes(length, "big")
        if size > MESSAGE_BYTES_MAX:
            raise ValueError(f"a message of {size} bytes")
        data = await self._take(size)
        return None if data is None else msgspec.msgpack.decode(data, type=kind)

    async def _take(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            data = await self._stream.receive_some(1 << 16)
            if not data:
                return None
            self._buffer += data
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


# -- the shipper --------------------------------------------------------------------


async def ship(path: str, host: str, port: int) -> None:
    """For ever, whether the other side is there or not."""
    while True:
        try:
            async with (
                await trio.open_tcp_stream(host, port) as stream,
                trio_wal.open_reader(path) as reader,
            ):
                await ship_on(reader, Connection(stream))
        except (OSError, trio.BrokenResourceError):
            await trio.sleep(0.1)


async def ship_on(reader: LogReader, peer: Connection) -> None:
    text = await peer.receive(str)
    place = Bookmark.parse(text) if text else None
    while True:
        try:
            await follow(reader, peer, place)
        except LogDivergedError as exc:
            await peer.send(Cut(exc.parted_after or 0))
            await acknowledged(peer)
            # Nothing is in common, or the log does not know what: the copy begins anew.
            parted = exc.parted_after
            place = Bookmark(parted, exc.bookmark.epoch) if parted else None


async def follow(reader: LogReader, peer: Connection, place: Bookmark | None) -> None:
    async with reader.follow(place) as records:
        async for batch in records.batches(RECORDS_MAX):
            data = [record.data for record in batch]
            await peer.send(Batch(batch[0].lsn, records.bookmark.epoch, data))
            await acknowledged(peer)


async def acknowledged(peer: Connection) -> None:
    if not await peer.receive(bool):
        raise trio.BrokenResourceError("the receiver is gone")


# -- the receiver -------------------------------------------------------------------


class Receiver:
    def __init__(self, copy: WriteAheadLog) -> None:
        self._copy = copy

    async def place(self) -> Copied:
        """The last record that is here; without any, LSN 0."""
        async with self._copy.read(max(self._copy.first_lsn, self._copy.last_lsn)) as records:
            async for record in records:
                return msgspec.msgpack.decode(record.data, type=Copied)
        return Copied(0, 0, b"")

    async def serve(self, stream: trio.SocketStream) -> None:
        shipper = Connection(stream)
        try:
            last = await self.place()
            await shipper.send(str(Bookmark(last.lsn, last.epoch)) if last.lsn else "")
            while (message := await shipper.receive(Batch | Cut)) is not None:
                await self.apply(message)
                await shipper.send(True)
        except trio_wal.WalError:
            raise  # LogFailedError is a BrokenResourceError, but not of the connection
        except (trio.BrokenResourceError, ValueError, msgspec.MsgspecError) as exc:
            print(f"a shipper was cut off: {exc!r}")

    async def apply(self, message: Batch | Cut) -> None:
        last = await self.place()
        if isinstance(message, Cut):
            surplus = last.lsn - message.after_lsn
            if surplus > 0:
                await self._copy.truncate_after(max(0, self._copy.last_lsn - surplus))
            return
        if last.lsn and message.first_lsn != last.lsn + 1:
            raise ValueError(f"LSN {message.first_lsn} after {last.lsn}: of an older connection")
        copied = (
            Copied(lsn, message.epoch, data)
            for lsn, data in enumerate(message.records, message.first_lsn)
        )
        await self._copy.append_many([msgspec.msgpack.encode(record) for record in copied])


async def receive(path: str, port: int) -> None:
    async with trio_wal.open_wal(path) as copy:
        await trio.serve_tcp(Receiver(copy).serve, port, host="127.0.0.1")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ships a log to a copy.")
    commands = parser.add_subparsers(dest="command", required=True)
    shipper = commands.add_parser("ship")
    shipper.add_argument("path")
    shipper.add_argument("host")
    shipper.add_argument("port", type=int)
    receiver = commands.add_parser("receive")
    receiver.add_argument("path")
    receiver.add_argument("port", type=int)
    given = parser.parse_args()
    if given.command == "ship":
        trio.run(ship, given.path, given.host, given.port)
    else:
        trio.run(receive, given.path, given.port)
