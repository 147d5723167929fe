"""A transactional outbox: an order and the message about it are one commit.

    python docs/examples/outbox.py receive invoices.db invoices.socket
    python docs/examples/outbox.py order orders.db invoices.socket --count 1000

To change a database and then to send a message is two steps, and a crash between them loses one.
Here the message is put into a table in the same transaction as the order.  A task of its own sends
what is in that table, and deletes it when the receiver has acknowledged it.  If that answer is
lost, the message is sent again.  It has an id, and the receiver drops what it has seen: it keeps
the id in the same transaction as what it does about the message.  Either side may be killed.
"""

from __future__ import annotations

import argparse
import contextlib
import os

import msgspec
import trio

import trio_wal
from trio_wal import Database, Table

LINE_BYTES_MAX = 1 << 20


class Message(msgspec.Struct, frozen=True):
    id: str
    text: str


orders = Table("orders", key=int, value=str)
outbox = Table("outbox", key=int, value=Message)


async def order(db: Database, text: str) -> int:
    """Returns its number; when it is durable, so is the message."""
    async with db.transaction() as tx:
        last = next(orders.scan(tx, reverse=True, limit=1), None)
        number = 1 if last is None else last[0] + 1
        orders.insert(tx, number, text)
        outbox.insert(tx, number, Message(f"{db.uuid}/{number}", text))
    return number


async def deliver(db: Database, socket_path: str) -> None:
    """Run by one task: sends what is in the outbox, in order, for ever."""
    while True:
        try:
            async with await trio.open_unix_socket(socket_path) as stream:
                await deliver_on(db, stream)
        except trio_wal.WalError:
            raise  # LogFailedError is a BrokenResourceError, but not of the connection
        except (OSError, trio.BrokenResourceError):
            await trio.sleep(0.05)  # the receiver is away: try again


async def deliver_on(db: Database, stream: trio.SocketStream) -> None:
    while True:
        seen = db.durable_lsn
        waiting = list(outbox.scan(db, limit=100))
        if not waiting:
            await db.wait_changed(prefix=outbox.prefix, since=seen)
            continue
        await stream.send_all(msgspec.json.encode([message for _, message in waiting]) + b"\n")
        if await stream.receive_some() != b"+":
            raise trio.BrokenResourceError("the receiver has not acknowledged")
        async with db.transaction() as tx:
            for number, _ in waiting:
                outbox.delete(tx, number)


async def wait_delivered(db: Database) -> None:
    seen = db.durable_lsn
    while next(outbox.scan(db, limit=1), None) is not None:
        seen = await db.wait_changed(prefix=outbox.prefix, since=seen)


# -- the receiver -------------------------------------------------------------------

handled = Table("handled", key=str, value=bytes)  # ids
invoices = Table("invoices", key=int, value=str)


async def handle(db: Database, messages: list[Message]) -> None:
    async with db.transaction() as tx:
        last = next(invoices.scan(tx, reverse=True, limit=1), None)
        number = 0 if last is None else last[0]
        for message in messages:
            if handled.get(tx, message.id) is None:
                handled.put(tx, message.id, b"")
                number += 1
                invoices.insert(tx, number, message.text)


class Receiver:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def serve(self, stream: trio.SocketStream) -> None:
        buffer = bytearray()
        while len(buffer) <= LINE_BYTES_MAX:
            try:
                data = await stream.receive_some()
            except trio.BrokenResourceError:
                return
            if not data:
                return
            buffer += data
            if buffer.endswith(b"\n"):  # a sender waits for the answer before its next line
                try:
                    messages = msgspec.json.decode(buffer, type=list[Message])
                except (msgspec.MsgspecError, ValueError):
                    return
                buffer.clear()
                await handle(self._db, messages)
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(b"+")


async def receive(path: str, socket_path: str) -> None:
    async with trio_wal.open_database(path) as db:
        # There is one owner at a time: a socket that is here is left over from the one before.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket_path)
        socket = trio.socket.socket(trio.socket.AF_UNIX)
        await socket.bind(socket_path)
        os.chmod(socket_path, 0o600)  # nobody can connect before listen()
        socket.listen()
        print("ready", flush=True)
        await trio.serve_listeners(Receiver(db).serve, [trio.SocketListener(socket)])


async def place_orders(path: str, socket_path: str, count: int) -> None:
    async with trio_wal.open_database(path) as db, trio.open_nursery() as nursery:
        nursery.start_soon(deliver, db, socket_path)
        for _ in range(count):
            print("ordered", await order(db, "two of blue"), flush=True)
        await wait_delivered(db)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A transactional outbox.")
    parser.add_argument("what", choices=["order", "receive"])
    parser.add_argument("path")
    parser.add_argument("socket")
    parser.add_argument("--count", type=int, default=100, help="of orders")
    given = parser.parse_args()
    if given.what == "order":
        trio.run(place_orders, given.path, given.socket, given.count)
    else:
        trio.run(receive, given.path, given.socket)
