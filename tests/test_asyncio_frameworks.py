"""`trio_wal.asyncio` elsewhere: under anyio, on both of its backends, and under hypercorn."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from examples import load

import trio_wal
import trio_wal.asyncio
from trio_wal.testing import MemoryFiles

BACKENDS = ("asyncio", "trio")


def open_log(backend: str, **options: Any) -> AbstractAsyncContextManager[Any]:
    opening: Any = trio_wal if backend == "trio" else trio_wal.asyncio
    manager: AbstractAsyncContextManager[Any] = opening.open_wal("/log", **options)
    return manager


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_anyio_tasks_share_a_sync(backend: str, files: MemoryFiles) -> None:
    async def main() -> None:
        found: list[int] = []

        async def write(data: bytes) -> None:
            found.append(await wal.append(data))

        async with open_log(backend, files=files) as wal:
            async with anyio.create_task_group() as group:
                for number in range(50):
                    group.start_soon(write, b"%d" % number)
            assert sorted(found) == list(range(1, 51))

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cancel_scope_of_anyio_means_absent_or_returned(backend: str, files: MemoryFiles) -> None:
    async def main() -> None:
        events: list[object] = []

        async def write() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                events.append(await wal.append(b"flying"))
                await anyio.lowlevel.checkpoint()
                events.append("not cancelled")

        async def queue() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                events.append(await wal.append(b"queued"))

        async def is_flying() -> bool:
            found = wal.statistics() if backend == "trio" else await wal.statistics()
            return bool(found.tasks_waiting_durable == 1 and found.records_waiting == 0)

        scopes: list[anyio.CancelScope] = []
        async with open_log(backend, files=files) as wal:
            if backend == "trio":
                files.hold()
            else:
                await wal._portal.call_sync(files.hold)
            async with anyio.create_task_group() as group:
                group.start_soon(write)
                while not await is_flying():
                    await anyio.lowlevel.checkpoint()
                group.start_soon(queue)
                while len(scopes) != 2:
                    await anyio.lowlevel.checkpoint()
                for scope in scopes:
                    scope.cancel()
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()
                assert events == []
                if backend == "trio":
                    files.release()
                else:
                    await wal._portal.call_sync(files.release)
            assert events == [1]
            assert await wal.append(b"next") == 2

    anyio.run(main, backend=backend)


async def ask(port: int, request: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith("HTTP/1.1 200"), answer
    return answer.rpartition("\r\n\r\n")[2]


@pytest.mark.skipif(sys.platform == "win32", reason="a socket that is handed over")
@pytest.mark.skipif(importlib.util.find_spec("hypercorn") is None, reason="needs hypercorn")
def test_a_web_service_of_hypercorn_on_asyncio(tmp_path: Path) -> None:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    async def main() -> None:
        async with trio_wal.asyncio.open_database(tmp_path / "db") as db:

            async def app(scope: Any, receive: Any, send: Any) -> None:
                if scope["type"] != "http":
                    return
                key = scope["path"].encode()
                if scope["method"] == "POST":
                    body = b"%d" % await db.put(key, b"value of " + key)
                else:
                    body = await db.get(key, b"nothing")
                headers = [(b"content-length", b"%d" % len(body))]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": body})

            with socket.create_server(("127.0.0.1", 0)) as listening:
                port = listening.getsockname()[1]
                config = Config()
                config.bind = [f"fd://{listening.fileno()}"]
                over = asyncio.Event()
                server = asyncio.create_task(
                    serve(app, config, shutdown_trigger=over.wait)  # type: ignore[arg-type]
                )
                lsns = await asyncio.gather(*(ask(port, f"POST /{n}") for n in range(20)))
                assert sorted(map(int, lsns)) == list(range(1, 21))
                assert await ask(port, "GET /7") == "value of /7"
                over.set()
                await server
                listening.detach()

    asyncio.run(main())


async def test_the_example_for_threads(tmp_path: Path) -> None:
    assert await load("from_thread").main(tmp_path) == 30
    async with trio_wal.open_wal(tmp_path / "imports.wal") as wal, wal.read() as records:
        data = [record.data async for record in records]
    for name in (b"a", b"b", b"c"):
        own = [line for line in data if line.startswith(name)]
        assert own == [b"%s %d" % (name, number) for number in range(10)]
