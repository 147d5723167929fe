"""A web application of several processes: one owns the database, the workers read it.

    python -m pip install trio-wal "hypercorn[trio]" quart-trio
    python docs/examples/web_app.py notes.db --workers 2

prints two addresses.  A proxy in front of them sends what writes to the first, and what only reads
to the second:

    curl -i -X PUT --data hello $WRITES/notes/greeting
    curl -i -H "Bookmark: 1@0" $READS/notes/greeting

The owner answers a PUT when it is durable, with the place of its commit in the header `Bookmark`.
A client that sends it along with a GET reads its own writes: the worker follows the owner, and
waits until it has come so far.  Workers share a listening socket, are started again when they
die, and end when the owner does.  If the owner dies, start it again: nothing acknowledged is lost.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from quart import request
from quart_trio import QuartTrio

import trio_wal
from trio_wal import Bookmark

PATIENCE = 5.0
"""Seconds that a reader waits for the owner's commit to be seen."""

notes = trio_wal.Table("notes", key=str, value=bytes)


def make_owner(db: trio_wal.Database) -> QuartTrio:
    app = QuartTrio("owner")

    @app.put("/notes/<name>")
    async def put_note(name: str) -> Any:
        text: bytes = await request.body
        async with db.transaction() as tx:
            notes.put(tx, name, text)
        assert tx.lsn is not None
        return "", 204, {"Bookmark": str(Bookmark(tx.lsn, db.epoch))}

    return app


def make_worker(db: trio_wal.DatabaseReader) -> QuartTrio:
    app = QuartTrio("worker")

    @app.get("/notes/<name>")
    async def get_note(name: str) -> Any:
        try:
            bookmark = Bookmark.parse(request.headers.get("Bookmark", "0@0"))
            with trio.fail_after(PATIENCE):
                await db.wait_for(bookmark)
        except ValueError as exc:
            return str(exc), 400
        except trio.TooSlowError:
            return "that commit is not seen here yet", 503, {"Retry-After": "1"}
        except trio_wal.LogDivergedError as exc:
            return str(exc), 409  # the database was restored since
        with db.snapshot() as snapshot:
            text, shown = notes.get(snapshot, name), snapshot.bookmark
        headers = {"Bookmark": str(shown), "Worker": str(os.getpid())}
        return ("no such note", 404, headers) if text is None else (text, 200, headers)

    return app


def configured(bind: str) -> Config:
    config = Config()
    config.bind = [bind]
    config.loglevel = "WARNING"
    return config


async def stop_signal() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return


async def keep_worker(path: str, fd: int) -> None:
    command = [sys.executable, __file__, path, "--worker", str(fd)]
    while True:
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, pass_fds=(fd,))
        try:
            status = await process.wait()
        finally:
            process.kill()
        print(f"a worker has ended ({status})", file=sys.stderr)
        await trio.sleep(0.2)


async def run_owner(path: str, workers: int) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as reads:
        async with trio_wal.open_database(path) as db, trio.open_nursery() as nursery:

            async def serve_writes(*, task_status: trio.TaskStatus[list[str]]) -> None:
                await serve(
                    make_owner(db),
                    configured("127.0.0.1:0"),
                    shutdown_trigger=stop_signal,
                    task_status=task_status,
                    mode="asgi",
                )
                nursery.cancel_scope.cancel()

            (url,) = await nursery.start(serve_writes)
            print("writes", url)
            print("reads", "http://{}:{}".format(*reads.getsockname()), flush=True)
            for _ in range(workers):
                nursery.start_soon(keep_worker, path, reads.fileno())


async def run_worker(path: str, fd: int) -> None:
    async def orphaned() -> None:
        # Standard input is a pipe from the owner, which ends when the owner does.
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)

    async with trio_wal.open_database_reader(path) as db:
        await serve(
            make_worker(db), configured(f"fd://{fd}"), shutdown_trigger=orphaned, mode="asgi"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A web application of several processes.")
    parser.add_argument("path")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", metavar="FD", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is None:
        trio.run(run_owner, given.path, given.workers)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the owner's to handle
        trio.run(run_worker, given.path, given.worker)
