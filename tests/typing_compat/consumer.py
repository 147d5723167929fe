"""A user's module. It is type-checked, not run.

mypy 1.10.1 with trio-typing's plugin checks it in `nox -s typing_compat`, mypy of today in
`nox -s typing`, both strictly. `assert_type` and the ignores that must be needed make the check
fail when a type is lost on the way: an `Any` satisfies neither.
"""

from __future__ import annotations

import contextlib
import math
from datetime import datetime
from pathlib import Path

import trio
from typing_extensions import assert_type

import trio_wal
from trio_wal import KeepBytes, KeepFor, LogFailedError, LogFullError, Record, WriteAheadLog


async def write(wal: WriteAheadLog, name: str, count: int) -> None:
    for number in range(count):
        lsn = await wal.append(f"{name} {number}".encode())
        assert_type(lsn, int)
    assert_type(await wal.append_many([b"one", b"two"]), range)
    await wal.send(b"unattended")
    with contextlib.suppress(trio.WouldBlock):
        wal.send_nowait(b"at once")
    assert_type(await wal.flush(), int)
    await wal.wait_durable(1)


async def write_wrongly(wal: WriteAheadLog) -> None:
    await wal.append("text")  # type: ignore[arg-type]
    await wal.wait_durable("1")  # type: ignore[arg-type]
    lsn: str = await wal.append(b"data")  # type: ignore[assignment]
    del lsn


async def read(wal: WriteAheadLog) -> list[bytes]:
    found: list[bytes] = []
    async with wal.read(start=1, stop=10) as records:
        async for record in records:
            assert_type(record, Record)
            assert_type(record.lsn, int)
            assert_type(record.timestamp, datetime)
            found.append(record.data)
    return found


async def follow(wal: WriteAheadLog, start: int) -> None:
    async with wal.follow(start) as records:
        async for record in records:
            assert_type(record.data, bytes)


async def look(path: Path) -> None:
    async with trio_wal.open_reader(path) as reader:
        assert_type(reader.first_lsn, int)
        assert_type(reader.durable_lsn, int)
        async with reader.read() as records:
            assert_type([record.data async for record in records], "list[bytes]")


async def main(path: Path) -> None:
    try:
        async with trio_wal.open_wal(
            path,
            max_queue_size=math.inf,
            flush_interval=0.02,
            durability="interval",
            retention=KeepFor(3600.0),
        ) as wal:
            assert_type(wal, WriteAheadLog)
            assert_type(wal.recovery.records_replayed, int)
            assert_type(wal.recovery.clean_shutdown, bool)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow, wal, 1)
                nursery.start_soon(write, wal, "task", 10)
                nursery.start_soon(write, wal, "task", "10")  # type: ignore[arg-type]
                with trio.move_on_after(1.0):
                    assert_type(await read(wal), "list[bytes]")
                nursery.cancel_scope.cancel()
            assert_type(wal.statistics().queue_utilization, float)
            await wal.truncate_before(wal.first_lsn)
            await wal.truncate_after(wal.last_lsn)
            await wal.aclose()
    except LogFullError:
        pass
    except LogFailedError as error:
        assert_type(error.outcome == "unknown", bool)
    except trio.BrokenResourceError:
        pass


async def open_wrongly(path: Path) -> None:
    async with trio_wal.open_wal(path, durability="always"):  # type: ignore[arg-type]
        pass
    async with trio_wal.open_wal(path, retention=KeepBytes("1 GB")):  # type: ignore[arg-type]
        pass


if __name__ == "__main__":
    trio.run(main, Path("log"))
