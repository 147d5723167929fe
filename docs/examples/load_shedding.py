"""An HTTP service that says "503, come again" when its log is busy: nobody waits for long.

    python -m pip install trio-wal "hypercorn[trio]" quart-trio
    python docs/examples/load_shedding.py

starts the service on a free port, lets 30 clients press on it for a few seconds, on a disk that
is made to take 20 ms for each sync, and then holds what they were told against the log.

The point is `add_order`: there is no setting for it.  A cancel scope bounds the wait, and an
`append` that was cancelled has left nothing in the log, so 503 means: not done, ask again.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import request
from quart_trio import QuartTrio

import trio_wal
from trio_wal.testing import MemoryFiles

PATIENCE = 0.050
"""Seconds that a client is made to wait for room and for the disk."""


def make_app(wal: trio_wal.WriteAheadLog) -> QuartTrio:
    app = QuartTrio(__name__)

    @app.post("/orders")
    async def add_order() -> Any:
        order = await request.get_data()
        with trio.move_on_after(PATIENCE):
            # If its batch is being written when the time is up, it is waited for, and this
            # returns: the client is told what is true.
            lsn = await wal.append(order)
            return {"lsn": lsn}, 201
        return {"error": "busy, nothing was done"}, 503, {"Retry-After": "1"}

    return app


async def run_service(
    wal: trio_wal.WriteAheadLog,
    stop: trio.Event,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until told to stop; starts with the port."""
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.loglevel = "WARNING"
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(
            lambda task_status: serve(
                make_app(wal),
                config,
                shutdown_trigger=stop.wait,
                task_status=task_status,
                mode="asgi",
            )
        )
        task_status.started(int(url.rpartition(":")[2]))


# -- the load -----------------------------------------------------------------------


async def post(stream: trio.SocketStream, order: bytes) -> int:
    """One request on a connection that stays open; returns the status."""
    head = f"POST /orders HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(order)}\r\n\r\n"
    await stream.send_all(head.encode() + order)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += await receive(stream)
    head_bytes, _, body = answer.partition(b"\r\n\r\n")
    lines = head_bytes.decode().lower().split("\r\n")
    length = next(int(line[15:]) for line in lines if line.startswith("content-length:"))
    while len(body) < length:
        body += await receive(stream)
    return int(lines[0].split()[1])


async def receive(stream: trio.SocketStream) -> bytes:
    data = await stream.receive_some()
    if not data:
        raise ConnectionError("the service has closed the connection")
    return bytes(data)


async def press(
    port: int, clients: int, go_on: Callable[[], bool]
) -> dict[bytes, tuple[int, float]]:
    """Orders of many clients, each on its own connection; what was answered, after how long."""
    answers: dict[bytes, tuple[int, float]] = {}

    async def client(number: int) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            count = 0
            while go_on():
                order = b"client %d, order %d" % (number, count)
                count += 1
                start = time.perf_counter()
                status = await post(stream, order)
                answers[order] = status, time.perf_counter() - start

    async with trio.open_nursery() as nursery:
        for number in range(clients):
            nursery.start_soon(client, number)
    return answers


async def slow_disk(files: MemoryFiles, seconds: float) -> None:
    """Make every sync wait until so much time has passed."""
    files.after_operation = lambda operation, path: operation == "sync" and files.hold()
    files.hold()
    try:
        while True:
            await trio.sleep(seconds)
            files.release()
    finally:
        files.after_operation = None
        files.release()


async def main(seconds: float, clients: int) -> None:
    files = MemoryFiles()
    async with trio_wal.open_wal("/orders", files=files, max_queue_size=4) as wal:
        async with trio.open_nursery() as nursery:
            disk = trio.CancelScope()

            async def slow() -> None:
                with disk:
                    await slow_disk(files, 0.020)

            stop = trio.Event()
            port = await nursery.start(run_service, wal, stop)
            nursery.start_soon(slow)
            until = time.perf_counter() + seconds
            answers = await press(port, clients, lambda: time.perf_counter() < until)
            disk.cancel()
            stop.set()
        async with wal.read() as records:
            found = Counter([record.data async for record in records])
    done = {order for order, (status, _) in answers.items() if status == 201}
    times = sorted(taken for _, taken in answers.values())
    print(f"answered {len(answers)}, of these done {len(done)}, busy {len(answers) - len(done)}")
    print(f"done and not in the log: {len(done - found.keys())}")
    print(f"in the log and not done: {len(found.keys() - done)}")
    print(f"twice in the log: {sum(count > 1 for count in found.values())}")
    print(f"99 % answered within {times[int(0.99 * len(times))] * 1e3:.0f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A service that sheds load.")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=30)
    arguments = parser.parse_args()
    logging.getLogger("trio_wal").setLevel(logging.ERROR)
    trio.run(main, arguments.seconds, arguments.clients)
