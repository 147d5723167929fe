"""docs/examples/log_shipper.py, killed in mid-flight, of a log whose end is cut meanwhile."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import msgspec
import trio
from examples import load, running

import trio_wal

example = load("log_shipper")


async def copied(copy: trio_wal.WriteAheadLog) -> list[tuple[int, bytes]]:
    async with copy.read() as records:
        found = [msgspec.msgpack.decode(r.data, type=example.Copied) async for r in records]
    return [(record.lsn, record.data) for record in found]


async def until_copied(wal: trio_wal.WriteAheadLog, copy: trio_wal.WriteAheadLog) -> None:
    async with wal.read() as records:
        expected = [(record.lsn, record.data) async for record in records]
    with trio.fail_after(150):
        while await copied(copy) != expected:  # noqa: ASYNC110  (another process does it)
            await trio.sleep(0.02)


async def test_the_copy_becomes_the_log_whoever_is_killed_and_whatever_is_cut(
    tmp_path: Path,
) -> None:
    rng, count = random.Random(1), 0

    async def append(wal: trio_wal.WriteAheadLog, many: int) -> None:
        nonlocal count
        for _ in range(many):
            count += 1
            await wal.append(b"record %d" % count)

    async with (
        trio_wal.open_wal(tmp_path / "log") as wal,
        trio_wal.open_wal(tmp_path / "copy") as copy,
        trio.open_nursery() as nursery,
    ):
        await append(wal, 50)
        serve = partial(trio.serve_tcp, example.Receiver(copy).serve, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        port = str(listener.socket.getsockname()[1])
        for cut_while_it_runs in (True, False, True):
            with running("log_shipper", "ship", tmp_path / "log", "127.0.0.1", port):
                await until_copied(wal, copy)
                if cut_while_it_runs:
                    await wal.truncate_after(wal.last_lsn - rng.randrange(1, 20))
                await append(wal, rng.randrange(60))
                # It is killed somewhere in the middle of these.
            await append(wal, rng.randrange(20))
            if not cut_while_it_runs:
                await wal.truncate_after(wal.last_lsn - rng.randrange(1, 50))
                await append(wal, rng.randrange(40, 60))
        with running("log_shipper", "ship", tmp_path / "log", "127.0.0.1", port):
            await until_copied(wal, copy)
            # Back to the first record, and to none at all.
            await wal.truncate_after(1)
            await append(wal, 3)
            await until_copied(wal, copy)
            await wal.truncate_after(0)
            await append(wal, 3)
            await until_copied(wal, copy)
        nursery.cancel_scope.cancel()


async def test_what_an_older_connection_has_left_is_refused(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path / "copy") as copy:
        receiver = example.Receiver(copy)
        await receiver.apply(example.Batch(17, 0, [b"a", b"b"]))
        for first in (17, 18, 20):
            ours, theirs = trio.testing.memory_stream_pair()
            shipper = example.Connection(ours)
            await shipper.send(example.Batch(first, 0, [b"x"]))
            await receiver.serve(theirs)
            assert await shipper.receive(str) == "18@0"
        assert await copied(copy) == [(17, b"a"), (18, b"b")]
        await receiver.apply(example.Cut(17))
        await receiver.apply(example.Cut(30))
        assert await copied(copy) == [(17, b"a")]
        await receiver.apply(example.Cut(3))
        assert await copied(copy) == []
