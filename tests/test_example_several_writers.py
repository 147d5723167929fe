"""docs/examples/several_writers.py, with its owner and its writers killed."""

from __future__ import annotations

import os
import random
import stat
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

import pytest
import trio
import trio.testing
from examples import finish, kill, load, read, running

import trio_wal
from trio_wal.testing import MemoryFiles

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix sockets")

if sys.platform != "win32":
    example = load("several_writers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current one: the name of a socket must be short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers_in(lines: list[str]) -> list[int]:
    """Which requests were acknowledged."""
    words = [line.split() for line in lines if line.startswith(("written ", "the owner has "))]
    return [int(w[-1]) for w in words if w[1] != "from"]


async def entries(path: Path) -> dict[str, list[tuple[int, bytes]]]:
    """As the next owner finds them: a reader may not have been told of the last commit of one
    that was killed."""
    found = defaultdict(list)
    async with trio_wal.open_database(path) as db:
        for _, entry in example.entries.scan(db):
            found[entry.writer].append((entry.number, entry.data))
    return dict(found)


async def test_nothing_is_lost_or_doubled_whoever_is_killed(folder: Path) -> None:
    rng, count = random.Random(1), 1000
    names = ["a", "b", "c"]
    highest = dict.fromkeys(names, 0)
    with ExitStack() as stack:
        owner = stack.enter_context(running("several_writers", "own", "db", "s"))

        def start(name: str) -> Popen[str]:
            return stack.enter_context(
                running(
                    "several_writers", "write", "s", "--name", name, "--count", str(count),
                    "--tasks", "8",
                )
            )  # fmt: skip

        writers = {name: start(name) for name in names}
        for _ in range(3):
            # Each has come a little further; then the owner and one writer die.
            for name in names:
                told = read(writers[name], rng.randrange(5, 60))
                highest[name] = max([highest[name], *numbers_in(told)])
            victim = rng.choice(names)
            kill(owner)
            told = kill(writers[victim])
            highest[victim] = max([highest[victim], *numbers_in(told)])
            found = await entries(folder / "db")
            for name in names:
                assert len(found.get(name, ())) >= highest[name]
            owner = stack.enter_context(running("several_writers", "own", "db", "s"))
            writers[victim] = start(victim)
        for name in names:
            finish(writers[name])
        kill(owner)
    expected = [(number, b"note %d" % number) for number in range(1, count + 1)]
    assert await entries(folder / "db") == dict.fromkeys(names, expected)


async def test_garbage_harms_nobody_and_the_socket_is_the_owners_alone(folder: Path) -> None:
    frame = example.Frames.encode
    garbage = [
        b"\xff" * 100,
        b"\0\0\0\0",
        frame(""),
        frame("n" * 101),
        frame(17),
        frame("g") + frame("no request"),
        frame("g") + frame(example.Requests(2, [b"its number is not the next"])),
        frame("g")
        + frame(example.Requests(1, [b"whole"]))
        + frame(example.Requests(2, [b"torn"]))[:-1],
        b"",
    ]
    before = os.umask(0)
    try:
        with running("several_writers", "own", "db", "s") as owner:
            assert read(owner, 1) == ["ready"]
            assert stat.S_IMODE(os.stat("s").st_mode) == 0o600
            with trio.fail_after(100):
                for data in garbage:
                    async with await trio.open_unix_socket("s") as stream:
                        await stream.send_all(data)
                        await stream.send_eof()
                        while await stream.receive_some():
                            pass
            write = ("write", "s", "--name", "good", "--count", "3", "--tasks", "1")
            with running("several_writers", *write) as writer:
                assert numbers_in(finish(writer)) == [0, 1, 2, 3]
    finally:
        os.umask(before)
    found = await entries(folder / "db")
    assert found.pop("good") == [(n, b"note %d" % n) for n in (1, 2, 3)]
    assert found in ({}, {"g": [(1, b"whole")]})


async def test_a_writer_that_is_back_ends_its_first_connection(folder: Path) -> None:
    """What the first one has sent and nobody has read must not get a number of the second's."""

    def requests(first: int, *data: bytes) -> bytes:
        return bytes(example.Frames.encode(example.Requests(first, [*data])))

    with running("several_writers", "own", "db", "s") as owner, trio.fail_after(100):
        assert read(owner, 1) == ["ready"]
        hello = example.Frames.encode("w")
        async with await trio.open_unix_socket("s") as first:
            await first.send_all(hello)
            assert await first.receive_some() == example.Frames.encode(0)
            async with await trio.open_unix_socket("s") as second:
                await second.send_all(hello)
                assert await second.receive_some() == example.Frames.encode(0)
                assert not await first.receive_some()
                await second.send_all(requests(1, b"second", b"more"))
                assert await second.receive_some() == example.Frames.encode(2)
                # As after a connection that broke: some of it is there.
                for _ in range(2):
                    await second.send_all(requests(2, b"more", b"new"))
                    assert await second.receive_some() == example.Frames.encode(3)
    assert await entries(folder / "db") == {"w": [(1, b"second"), (2, b"more"), (3, b"new")]}


async def test_what_tasks_write_at_once_goes_in_frames_that_the_owner_takes(folder: Path) -> None:
    largest = example.BATCH_BYTES_MAX - example.HEAD_BYTES
    sizes = [largest, 0, largest - 1, largest // 2, largest // 2, 1]
    with running("several_writers", "own", "db", "s") as owner, trio.fail_after(100):
        assert read(owner, 1) == ["ready"]
        async with trio.open_nursery() as nursery:
            writer = example.Writer("s", "w")
            assert await nursery.start(writer.run) == 0
            with pytest.raises(ValueError, match=f"data has {largest + 1} bytes, over {largest}"):
                await writer.write(bytes(largest + 1))
            async with trio.open_nursery() as tasks:
                for size in sizes:
                    tasks.start_soon(writer.write, bytes(size))
            nursery.cancel_scope.cancel()
    found = (await entries(folder / "db"))["w"]
    assert [number for number, _ in found] == [*range(1, len(sizes) + 1)]
    assert sorted(len(data) for _, data in found) == sorted(sizes)


async def test_a_connection_is_not_read_while_its_commit_waits() -> None:
    """Back-pressure passes through: who sends faster than the disk is, waits."""
    ours, theirs = trio.testing.memory_stream_pair()
    reads = 0

    async def count() -> None:
        nonlocal reads
        reads += 1

    theirs.receive_stream.receive_some_hook = count
    files = MemoryFiles()
    async with trio_wal.open_database("/db", files=files) as db, trio.open_nursery() as nursery:
        nursery.start_soon(example.Owner(db).serve, theirs)
        frame = example.Frames.encode
        await ours.send_all(frame("w"))
        assert await ours.receive_some() == frame(0)
        files.hold()
        await ours.send_all(frame(example.Requests(1, [b"one"])))
        await trio.testing.wait_all_tasks_blocked()
        await ours.send_all(frame(example.Requests(2, [b"two"])))
        await trio.testing.wait_all_tasks_blocked()
        assert db.wal.statistics().tasks_waiting_durable == 1
        assert reads == 2  # the name, and the first request
        files.release()
        told = b""
        while len(told) < len(frame(1) + frame(2)):
            told += await ours.receive_some()
        assert told == frame(1) + frame(2)
        await ours.send_eof()


def test_the_benchmark_runs(folder: Path) -> None:
    with running("several_writers_bench", "--folder", ".", "--count", "20", "--tasks", "4") as run:
        told = finish(run)
    assert told[0] == "4 processes of 4 tasks, durable writes per second:"
    assert "ratio" in told[1]
