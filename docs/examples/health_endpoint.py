"""A liveness and a readiness probe for a database, over HTTP and without a web framework.

    python -m pip install trio-wal
    python docs/examples/health_endpoint.py bank.db --port 8080
    curl -i http://127.0.0.1:8080/live
    curl -i http://127.0.0.1:8080/ready

`/live` is an error only where a restart helps: a log that is broken.  A full disk is none, because
the log goes on by itself when there is space.  `/ready` is an error also while the database works
less well than it should, so that a load balancer sends what it can to others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from functools import partial

import attrs
import trio

import trio_wal

PATIENCE = 5.0
"""Seconds for a request to arrive."""
REQUEST_BYTES_MAX = 16 * 1024


def answer(path: str, health: trio_wal.Health) -> tuple[int, str]:
    """Status and body for a path."""
    well = {"/live": health.status != "failed", "/ready": health.status == "ok"}.get(path)
    if well is None:
        return 404, "there are /live and /ready\n"
    return 200 if well else 503, json.dumps(attrs.asdict(health)) + "\n"


async def serve_one(db: trio_wal.Database, stream: trio.SocketStream) -> None:
    async with stream:
        request = b""
        with trio.move_on_after(PATIENCE):
            while b"\r\n\r\n" not in request and len(request) < REQUEST_BYTES_MAX:
                data = await stream.receive_some()
                if not data:
                    return
                request += data
            words = request.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
            status, body = answer(words[1] if len(words) == 3 else "", db.health())
            head = f"HTTP/1.1 {status} .\r\nContent-Length: {len(body)}\r\nConnection: close"
            await stream.send_all(f"{head}\r\n\r\n{body}".encode())


async def serve(db: trio_wal.Database, port: int) -> None:
    async def handler(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # the client has gone
            await serve_one(db, stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handler, port, host="127.0.0.1"))
        print("http://{}:{}".format(*listeners[0].socket.getsockname()), flush=True)


async def main(path: str, port: int) -> None:
    async with trio_wal.open_database(path) as db:
        await serve(db, port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Probes for a database.")
    parser.add_argument("path")
    parser.add_argument("--port", type=int, default=8080)
    given = parser.parse_args()
    trio.run(main, given.path, given.port)
