"""Several processes and one log: who may open it, what readers see, what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

import trio_wal
from trio_wal import LogLockedError, LsnTruncatedError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uses fork, SIGKILL and pipes")

PATIENCE = 240
"""Seconds after which a child that hangs fails its test."""


class Child:
    """Another Python, which is told and tells one line at a time."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.pid = process.pid
        self._received = b""

    async def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(" ".join(map(str, words)).encode() + b"\n")

    async def line(self) -> str:
        """The next line; "" at the end."""
        assert self.process.stdout is not None
        while b"\n" not in self._received:
            more = await self.process.stdout.receive_some()
            if not more:
                return ""
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()

    async def ask(self, *words: object) -> str:
        await self.tell(*words)
        return await self.line()

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@asynccontextmanager
async def child(script: str, *arguments: object, **options: Any) -> AsyncIterator[Child]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", PRELUDE + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(trio_wal.__file__).parent.parent)},
        **options,
    )
    try:
        with trio.fail_after(PATIENCE):
            yield Child(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    await stream.aclose()


PRELUDE = """
import json, os, signal, sys, trio, trio_wal

def say(*words):
    # In one write: another process may have the same standard output.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

async def hear():
    return (await trio.to_thread.run_sync(sys.stdin.readline)).split()
"""

WRITER = """
async def main(path, durability):
    async with trio_wal.open_wal(path, segment_size=1, durability=durability) as wal:
        say(wal.last_lsn)
        while command := await hear():
            if command[0] == "append":
                for _ in range(int(command[1])):
                    await wal.append(b"record %d" % (wal.last_lsn + 1))
            elif command[0] == "roomy":
                await wal.append(bytes(50_000))
            elif command[0] == "flush":
                await wal.flush()
            elif command[0] == "before":
                await wal.truncate_before(int(command[1]))
            elif command[0] == "after":
                await wal.truncate_after(int(command[1]))
            say(wal.last_lsn)

trio.run(main, *sys.argv[1:])
"""

CROWD = """
async def main(path):
    async def write(name):
        number = 0
        while True:
            number += 1
            data = b"%d %d" % (name, number)
            lsn = await wal.append(data)
            os.write(1, b"%d %s\\n" % (lsn, data))

    async with trio_wal.open_wal(path, segment_size=1) as wal, trio.open_nursery() as nursery:
        for name in range(8):
            nursery.start_soon(write, name)

trio.run(main, *sys.argv[1:])
"""

READER = """
async def main(path):
    async with trio_wal.open_reader(path) as reader, reader.follow() as records:
        async for record in records:
            say(record.lsn, record.data.decode())

trio.run(main, *sys.argv[1:])
"""


async def take(records: Any, count: int) -> list[tuple[int, bytes]]:
    found = []
    with trio.fail_after(PATIENCE):
        for _ in range(count):
            record = await records.__anext__()
            found.append((record.lsn, record.data))
    return found


def expected(lsns: range) -> list[tuple[int, bytes]]:
    return [(lsn, b"record %d" % lsn) for lsn in lsns]


async def read(path: Path) -> list[tuple[int, bytes]]:
    async with trio_wal.open_wal(path) as wal, wal.read() as records:
        return [(record.lsn, record.data) async for record in records]


# -- one owner ---------------------------------------------------------------------------


async def test_a_log_open_in_another_process_is_refused_with_its_pid(tmp_path: Path) -> None:
    async with child(WRITER, tmp_path, "sync") as owner:
        assert await owner.line() == "0"
        for _ in range(2):
            with pytest.raises(
                LogLockedError, match=r": the log is open in process \d+; "
            ) as caught:
                async with trio_wal.open_wal(tmp_path):
                    pass
            assert caught.value.pid == owner.pid
        assert await owner.ask("append", 3) == "3"
        await owner.kill()
    assert await read(tmp_path) == expected(range(1, 4))


async def test_the_log_is_free_when_its_owner_has_closed_it(tmp_path: Path) -> None:
    async with child(WRITER, tmp_path, "sync") as owner:
        await owner.line()
        assert await owner.ask("append", 3) == "3"
        assert owner.process.stdin is not None
        await owner.process.stdin.aclose()
        assert await owner.process.wait() == 0
    async with trio_wal.open_wal(tmp_path) as wal:
        assert wal.recovery.clean_shutdown


FORK = """
async def main(path):
    async with trio_wal.open_wal(path) as wal:
        await wal.append(b"parent")
        stream = wal.read()
        if os.fork() == 0:
            # Only what needs no loop: trio's own is the parent's.
            outcomes = []
            for call in (
                lambda: wal.append(b"child"),
                lambda: wal.append_many([b"child"]),
                lambda: wal.send(b"child"),
                lambda: wal.flush(),
                lambda: wal.wait_durable(99),
                lambda: wal.truncate_after(0),
            ):
                try:
                    await call()
                except Exception as exc:
                    outcomes.append(type(exc).__name__)
            for call in (lambda: wal.send_nowait(b"child"), wal.read, wal.follow):
                try:
                    call()
                except Exception as exc:
                    outcomes.append(type(exc).__name__)
            say(json.dumps(outcomes))
            sys.stdin.read()
            os._exit(0)
        await wal.append(b"parent again")
        say("written")
        await trio.sleep_forever()

trio.run(main, *sys.argv[1:])
"""


async def test_a_forked_childs_handle_is_dead_and_keeps_no_lock(tmp_path: Path) -> None:
    async with child(FORK, tmp_path) as parent:
        lines = {await parent.line(), await parent.line()}
        assert lines == {"written", json.dumps(["ClosedResourceError"] * 9)}
        with pytest.raises(LogLockedError) as caught:
            async with trio_wal.open_wal(tmp_path):
                pass
        assert caught.value.pid == parent.pid, "the parent still owns it"
        await parent.kill()
        # The child lives, and waits for its standard input to end.
        assert await read(tmp_path) == [(1, b"parent"), (2, b"parent again")]


# -- descriptors ---------------------------------------------------------------------------

WITHOUT_STDIO = """
from trio_wal._disk.opening import open_log_directory
from trio_wal._system.files import OsFiles

path, result = sys.argv[1:]
# Without trio, whose own descriptors would take the free numbers first.
log = open_log_directory(OsFiles(), path, segment_size=1)
for n in range(5):
    log.prepare_spare()
    log.write([b"%d" % n], n, sync=True)
    inodes = {os.stat(os.path.join(path, name)).st_ino for name in os.listdir(path)}
    inodes.add(os.stat(path).st_ino)
    for number in range(3):
        try:
            if os.fstat(number).st_ino in inodes:
                raise SystemExit(f"{number} is a file of the log")
        except OSError:
            pass
log.close()
with open(result, "w") as file:
    file.write("done")
"""


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "<&-"])
def test_no_file_of_a_log_gets_the_number_of_a_standard_stream(tmp_path: Path, closed: str) -> None:
    """A stray print would go into it."""
    result = tmp_path / "result"
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    subprocess.run(
        [*shell, sys.executable, "-c", PRELUDE + WITHOUT_STDIO, str(tmp_path / "log"), str(result)],
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": str(Path(trio_wal.__file__).parent.parent)},
    )
    assert result.read_text() == "done"


async def test_programs_started_by_the_owner_inherit_nothing(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path, segment_size=1) as wal:
        for n in range(5):
            await wal.append(b"%d" % n)
        async with wal.read() as records:
            await records.__anext__()
            log = wal._log.engine._directory._directory.path
            inodes = {os.stat(log).st_ino}
            for name in os.listdir(log):
                # What is being prepared may just be given another name.
                with suppress(FileNotFoundError):
                    inodes.add(os.stat(os.path.join(log, name)).st_ino)
            found = 0
            for number in range(3, 200):
                try:
                    inode = os.fstat(number).st_ino
                except OSError:
                    continue
                if inode in inodes:
                    found += 1
                    assert not os.get_inheritable(number)
            assert found >= 3


# -- readers beside the owner ------------------------------------------------------------------


async def test_a_follower_sees_what_another_process_writes(tmp_path: Path) -> None:
    async with child(WRITER, tmp_path, "sync") as owner:
        await owner.line()
        async with trio_wal.open_reader(tmp_path) as reader, reader.follow() as records:
            last = 0
            for count in (1, 2, 50, 3):
                assert int(await owner.ask("append", count)) == last + count
                assert await take(records, count) == expected(range(last + 1, last + count + 1))
                last += count
                assert reader.durable_lsn == last
            await owner.ask("before", 50)
            assert 1 < reader.first_lsn <= 50
            with pytest.raises(LsnTruncatedError):
                async with reader.read(1):
                    pass
            await owner.kill()
            # A dead owner's records can be read all the same.
            async with reader.read(50) as rest:
                assert [record.lsn async for record in rest] == list(range(50, last + 1))


async def test_a_follower_sees_nothing_that_is_not_durable(tmp_path: Path) -> None:
    async with child(WRITER, tmp_path, "none") as owner:
        await owner.line()
        await owner.ask("roomy")
        assert await owner.ask("flush") == "1"
        async with trio_wal.open_reader(tmp_path) as reader, reader.follow() as records:
            await take(records, 1)
            before = reader.durable_lsn
            # A rotation syncs what is before it, and nothing behind it.
            assert await owner.ask("append", 2) == "3"
            durable = reader.durable_lsn
            assert durable < 3
            if durable > before:
                await take(records, durable - before)
            async with reader.read(durable) as seen:
                found = [record.lsn async for record in seen]
            # What the rotation has synced may be told of just now.
            assert found in ([1], [1, 2], [2])
            await owner.ask("flush")
            assert await take(records, 3 - durable) == expected(range(durable + 1, 4))


async def test_a_follower_goes_on_with_the_next_owner(tmp_path: Path) -> None:
    last = 0
    async with child(WRITER, tmp_path, "sync") as owner:
        await owner.line()
        last = int(await owner.ask("append", 1))
        async with trio_wal.open_reader(tmp_path) as reader, reader.follow() as records:
            assert await take(records, 1) == expected(range(1, 2))
            await owner.kill()
            for _ in range(3):
                async with child(WRITER, tmp_path, "sync") as next_owner:
                    assert await next_owner.line() == str(last)
                    await next_owner.ask("append", 3)
                    assert await take(records, 3) == expected(range(last + 1, last + 4))
                    last += 3
                    await next_owner.kill()


async def test_a_follower_in_another_process_sees_what_this_one_writes(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path, segment_size=1) as wal:
        await wal.append(b"record 1")
        async with child(READER, tmp_path) as reader:
            assert await reader.line() == "1 record 1"
            for lsn in range(2, 30):
                await wal.append(b"record %d" % lsn)
                assert await reader.line() == f"{lsn} record {lsn}"


# -- killed -----------------------------------------------------------------------------------


async def test_what_a_killed_process_was_told_is_there_in_order(tmp_path: Path) -> None:
    """Twice: the second owner recovers what the first one left."""
    told: dict[int, bytes] = {}
    for count in (150, 300):
        async with child(CROWD, tmp_path) as owner:
            while len(told) < count:
                lsn, data = (await owner.line()).encode().split(b" ", 1)
                told[int(lsn)] = data
            await owner.kill()
            while line := await owner.line():
                lsn, data = line.encode().split(b" ", 1)
                told[int(lsn)] = data
        found = dict(await read(tmp_path))
        assert list(found) == list(range(1, len(found) + 1))
        assert told.items() <= found.items()
        assert len(found) <= len(told) + 2 * 8, "at most one batch of each session was in flight"
        for name in range(8):
            numbers = [
                int(data.split()[1]) for data in found.values() if data.split()[0] == b"%d" % name
            ]
            # Each session counts from 1.
            assert all(after in (before + 1, 1) for before, after in pairwise(numbers))


# -- forked children ---------------------------------------------------------------------------

LEAVE = """
import threading

async def main(path, kind, how):
    opened = {
        "log": trio_wal.open_wal, "database": trio_wal.open_database,
        "reader": trio_wal.open_reader, "database reader": trio_wal.open_database_reader,
    }[kind]
    async with opened(path) as handle, trio.open_nursery() as nursery:
        if kind == "log":
            # Some tasks of the program's own are in the middle of something.
            nursery.start_soon(append_for_ever, handle)
            nursery.start_soon(ignore_closed, handle.wait_durable, 10**9)
            nursery.start_soon(ignore_closed, follow, handle.follow())
            await handle.append(b"record")
        if kind == "database reader":
            assert handle.get(b"key") == b"value"
        if kind == "database":
            await handle.put(b"key", b"value")
            snapshot = handle.snapshot().__enter__()
            scan = handle.scan()
            next(scan)
        # A thread that answers trio at this moment has a lock that the child needs.
        lock = trio.lowlevel.current_trio_token()._reentry_queue.lock
        held, forked = threading.Event(), threading.Event()

        def hold():
            with lock:
                held.set()
                forked.wait()

        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        pid = os.fork()
        if pid:
            forked.set()
        if pid == 0:
            if kind == "database":
                calls = [
                    lambda: handle.get(b"key"), lambda: handle.get(b"none"), handle.scan,
                    handle.snapshot, handle.transaction, lambda: snapshot.get(b"key"),
                    lambda: list(scan),
                ]
                for call in calls:
                    try:
                        say("answered", call())
                    except trio.ClosedResourceError:
                        pass
            if kind == "database reader":
                for call in (lambda: handle.get(b"key"), handle.scan, handle.changes):
                    try:
                        say("answered", call())
                    except trio.ClosedResourceError:
                        pass
            if kind == "reader":
                for call in (handle.read, handle.follow, lambda: handle.durable_lsn):
                    try:
                        say("answered", call())
                    except trio.ClosedResourceError:
                        pass
            if how == "exception":
                raise Left
            if how == "exit":
                sys.exit(7)
            await handle.aclose()
            nursery.cancel_scope.cancel()
            return "left"
        # The parent's loop is not run again: the end of the child's run has taken trio's own
        # descriptors out of the epoll instance that both share.
        _, status = os.wait()
        say("child", os.waitstatus_to_exitcode(status))
        if kind == "database":
            assert (handle.get(b"key"), snapshot.get(b"key")) == (b"value", b"value")
        if kind == "reader":
            assert handle.durable_lsn == 1
        say("parent")
        sys.stdin.read()
"""

MIDDLE = """
import threading
from trio_wal import _park
from trio_wal._disk.cursor import Cursor
from trio_wal._disk.directory import LogDirectory

stuck = 0

def stick(*args, **options):
    global stuck
    stuck += 1
    threading.Event().wait()

def hold(lock):
    with lock:
        stick()

async def main(path, how):
    async with (
        trio_wal.open_wal(path) as wal, wal.follow() as records, trio.open_nursery() as nursery
    ):
        await wal.append(b"record")
        await records.__anext__()
        await wal.append(b"record")
        # One thread reads, one writes, one has a lock.
        Cursor.chunk = stick
        nursery.start_soon(ignore_closed, records.__anext__)
        LogDirectory.write = stick
        nursery.start_soon(ignore_closed, wal.append, b"record")
        engine = wal._log.engine
        lock = engine._directory.spares._lock
        threading.Thread(target=hold, args=[lock], daemon=True).start()
        while stuck < 3:
            await trio.sleep(0.001)
        bell = os.dup(engine._worker._bell._fd) if sys.platform == "linux" else None
        pid = os.fork()
        if pid == 0:
            def wake(*args):
                reschedule(*args)
                # Just now the parent's thread has written, and says so.
                if bell is not None:
                    os.eventfd_write(bell, 1)

            reschedule, _park.reschedule = _park.reschedule, wake
            if how == "exception":
                raise Left
            await wal.aclose()
            nursery.cancel_scope.cancel()
            return "left"
        _, status = os.wait()
        say("child", os.waitstatus_to_exitcode(status))
        sys.stdin.read()
"""

ENDING = """
class Left(BaseException):
    pass

async def ignore_closed(function, *args):
    try:
        await function(*args)
    except trio.ClosedResourceError:
        pass

async def append_for_ever(handle):
    try:
        while True:
            await handle.append(b"record")
    except trio.ClosedResourceError:
        pass

async def follow(stream):
    async with stream as records:
        async for record in records:
            pass

def is_left(exc):
    return isinstance(exc, Left) or any(map(is_left, getattr(exc, "exceptions", ())))

pid = os.getpid()
try:
    if trio.run(main, *sys.argv[1:]) == "left":
        os._exit(9)
except BaseException as exc:
    if os.getpid() == pid:
        raise
    if is_left(exc):
        os._exit(8)
    if "SystemExit" in repr(exc) or isinstance(exc, SystemExit):
        os._exit(7)
    import traceback
    traceback.print_exception(exc)
    os._exit(1)
assert os.getpid() == pid, "the child came through"
"""


@pytest.mark.parametrize(("how", "code"), [("exception", 8), ("exit", 7), ("aclose", 9)])
@pytest.mark.parametrize("kind", ["log", "database", "reader", "database reader"])
async def test_a_forked_child_leaves_the_block_at_once(
    tmp_path: Path, kind: str, how: str, code: int
) -> None:
    path = tmp_path / "here"
    if kind == "reader":
        async with trio_wal.open_wal(path) as wal:
            await wal.append(b"record")
    if kind == "database reader":
        async with trio_wal.open_database(path) as db:
            await db.put(b"key", b"value")
    async with child(LEAVE + ENDING, path, kind, how) as parent:
        assert await parent.line() == f"child {code}"
        assert await parent.line() == "parent"
        log = path / "log" if kind == "database" else path
        if "reader" not in kind:
            with pytest.raises(LogLockedError) as caught:
                async with trio_wal.open_wal(log):
                    pass
            assert caught.value.pid == parent.pid
        await parent.kill()
    if "database" in kind:
        async with trio_wal.open_database(path) as db:
            assert db.get(b"key") == b"value"
    else:
        records = await read(path)
        assert {data for _, data in records} == {b"record"}


@pytest.mark.parametrize(("how", "code"), [("exception", 8), ("aclose", 9)])
async def test_a_forked_child_waits_for_none_of_its_parents_threads(
    tmp_path: Path, how: str, code: int
) -> None:
    """Whatever they do at that moment, and whatever they answer."""
    async with child(MIDDLE + ENDING, tmp_path, how) as parent:
        assert await parent.line() == f"child {code}"
        await parent.kill()
