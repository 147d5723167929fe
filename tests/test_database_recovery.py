"""Crashes, kills and files that do not belong together: what a database finds afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import attrs
import pytest
import trio
from campaigns._images import fingerprint
from databases import (
    DB,
    TINY_SEGMENT,
    Home,
    State,
    after,
    check_content,
    commits_of,
    hash_tree,
    open_memory_database,
    write,
)
from helpers import Call, open_tasks
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal import (
    CorruptLogError,
    Database,
    KeepAll,
    LogFullError,
    TransactionConflict,
    WrongDirectoryError,
)
from trio_wal._disk.frame import BLOCK, DATA_OFFSET
from trio_wal.testing import MemoryFiles

# -- crashes at every operation on the files ---------------------------------------

ACCOUNTS = [b"account %d" % number for number in range(6)]
TOTAL = 600


@attrs.frozen
class Image:
    """The files after a crash, and what must and may be found in them."""

    files: MemoryFiles
    operation: str
    acknowledged: int
    """Every transaction up to here must be there."""
    checkpoint_lsn: int
    """What the store said it holds at the moment of the crash."""


@attrs.define(eq=False)
class Bank:
    """Transfers between accounts, crashed at operations on the files."""

    files: MemoryFiles
    rng: random.Random
    images: list[Image] = attrs.Factory(list)
    acknowledged: int = 0
    operations: dict[str, int] = attrs.Factory(dict)
    seeds: int = 2
    stride: int = 1
    """Of every so many operations one is crashed at."""
    _count: int = 0
    _seen: set[tuple[str, int, int, int]] = attrs.Factory(set)

    def __attrs_post_init__(self) -> None:
        self.files.after_operation = self._crash

    def _crash(self, operation: str, path: str) -> None:
        self.operations[operation] = self.operations.get(operation, 0) + 1
        self._count += 1
        if self._count % self.stride:
            return
        state = self.files.inspect_store(f"{DB}/store")
        for seed in range(self.seeds + 1):
            kind: Any = "power" if seed else "kill"
            image = self.files.crash_image(self._count * 10 + seed, kind)
            checkpoint_lsn = 0 if state is None else state.lsn
            # Whoever reads changes nothing: what a crash leaves then was looked at before.
            seen = kind, fingerprint(image), self.acknowledged, checkpoint_lsn
            if seen not in self._seen:
                self._seen.add(seen)
                told = f"{operation} {path}"
                self.images.append(Image(image, told, self.acknowledged, checkpoint_lsn))

    async def open_accounts(self, db: Database) -> None:
        items: dict[bytes, bytes | None] = dict.fromkeys(ACCOUNTS, b"100")
        self.acknowledge(await write(db, items))

    def acknowledge(self, lsn: int) -> None:
        self.acknowledged = max(self.acknowledged, lsn)

    async def transfer(self, db: Database, clerk: int, count: int) -> None:
        for number in range(count):
            source, target = self.rng.sample(ACCOUNTS, 2)
            amount = self.rng.randint(1, 50)
            async with db.transaction() as tx:
                tx.put(source, b"%d" % (int(tx.get(source, b"")) - amount))
                tx.put(target, b"%d" % (int(tx.get(target, b"")) + amount))
                tx.put(b"clerk %d" % clerk, b"%d" % number)
            assert tx.lsn is not None
            self.acknowledge(tx.lsn)

    async def check(self, image: Image, states: list[State], *, go_on: bool) -> None:
        """``states[n]`` is the state after LSN ``n``; ``go_on`` with a transaction from there."""
        async with open_memory_database(image.files, segment_size=TINY_SEGMENT) as db:
            lsn = db.durable_lsn
            assert image.acknowledged <= lsn < len(states), image
            found = dict(db.scan())
            assert found == states[lsn], image
            balances = [int(found[key]) for key in ACCOUNTS if key in found]
            assert sum(balances) in (0, TOTAL), image
            report = db.recovery
            assert report.checkpoint_lsn == image.checkpoint_lsn, image
            assert report.transactions_replayed == lsn - report.checkpoint_lsn, image
            assert db.wal.first_lsn <= report.checkpoint_lsn + 1, image
            if not go_on:
                return
            assert await db.put(b"after", b"") == lsn + 1
        async with open_memory_database(image.files) as db:
            assert dict(db.scan()) == states[lsn] | {b"after": b""}, image


async def states_of(db: Database) -> list[State]:
    """The state after every LSN: the whole log must be there."""
    states: list[State] = [{}]
    for commit in await commits_of(db, 1):
        states.append(after(states[-1], [commit]))
    return states


class Recorder:
    """Follows a database, so that every state is known although the log is dropped."""

    def __init__(self, states: list[State] | None = None) -> None:
        self.states: list[State] = states or [{}]

    async def follow(self, db: Database) -> None:
        engine = db.wal._log.engine
        # Trio runs the tasks in any order: what this has not read is not dropped.
        engine.hold("recorder", len(self.states))
        async with db.changes(len(self.states)) as commits:
            async for commit in commits:
                assert commit.lsn == len(self.states)
                self.states.append(after(self.states[-1], [commit]))
                engine.hold("recorder", len(self.states))


@pytest.fixture(params=[1, 30, 4 << 20])
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Checkpoints in pieces of one key, of a few, and of all."""
    monkeypatch.setattr("trio_wal._checkpoint.PIECE_BYTES", request.param)
    return int(request.param)


async def test_a_crash_at_any_operation_leaves_every_acknowledged_transaction_whole(
    autojump_clock: MockClock, piece_bytes: int
) -> None:
    files = MemoryFiles(seed=1)
    bank = Bank(files, random.Random(1), seeds=1)
    recorder = Recorder()
    files.fail("store", after=2, times=1)
    async with trio.open_nursery() as followers:
        for session in range(3):
            async with open_memory_database(
                files, segment_size=TINY_SEGMENT, checkpoint_bytes=900
            ) as db:
                followers.start_soon(recorder.follow, db)
                if not session:
                    await bank.open_accounts(db)
                async with trio.open_nursery() as nursery:
                    for clerk in range(3):
                        nursery.start_soon(bank.transfer, db, clerk, 12)
                with contextlib.suppress(OSError):
                    await db.checkpoint()
                await bank.transfer(db, 0, 2)
    files.after_operation = None
    assert {"pwrite", "sync", "rename", "store", "unlink", "sync_dir"} <= bank.operations.keys()
    assert bank.operations["store"] > (50 if piece_bytes == 1 else 5)
    assert len(bank.images) > 500
    for number, image in enumerate(bank.images):
        await bank.check(image, recorder.states, go_on=number % 2 == 0)


@pytest.mark.usefixtures("piece_bytes")
async def test_a_crash_while_recovering_from_a_crash_is_recovered_from_as_well() -> None:
    files = MemoryFiles(seed=2)
    bank = Bank(files, random.Random(2), stride=11, seeds=1)
    async with open_memory_database(
        files, segment_size=TINY_SEGMENT, checkpoint_bytes=1500, retention=KeepAll()
    ) as db:
        await bank.open_accounts(db)
        async with trio.open_nursery() as nursery:
            for clerk in range(3):
                nursery.start_soon(bank.transfer, db, clerk, 8)
        states = await states_of(db)
    files.after_operation = None
    nested = 0
    for image in bank.images:
        second = Bank(image.files, random.Random(3), stride=3, seeds=1)
        second.acknowledged = image.acknowledged
        async with open_memory_database(
            image.files, segment_size=TINY_SEGMENT, checkpoint_bytes=500
        ) as db:
            await db.checkpoint()
        image.files.after_operation = None
        for again in second.images:
            nested += 1
            await bank.check(again, states, go_on=nested % 2 == 0)
    assert nested > 100


async def test_a_commit_in_flight_is_there_whole_or_not_at_all_after_power_is_lost(
    files: MemoryFiles,
) -> None:
    outcomes = set()
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1", b"b": b"1"})

        def crash(operation: str, path: str) -> None:
            images.extend(files.crash_image(seed) for seed in range(10))

        images: list[MemoryFiles] = []
        files.after_operation = crash
        await write(db, {b"a": b"2", b"b": None} | {b"c%d" % n: bytes(500) for n in range(10)})
        files.after_operation = None
        final = dict(db.scan())
    for image in images:
        async with open_memory_database(image) as db:
            found = dict(db.scan())
            assert found in ({b"a": b"1", b"b": b"1"}, final)
            outcomes.add(len(found))
    assert outcomes == {2, 11}


async def test_what_a_full_disk_refused_is_not_there_after_a_crash(files: MemoryFiles) -> None:
    async with open_memory_database(files, segment_size=TINY_SEGMENT) as db:
        await write(db, {b"a": b"1"})
        await wait_all_tasks_blocked()
        async with open_tasks(files) as nursery:
            files.hold()
            call = Call(nursery, write, db, {b"b": bytes(100_000)})
            await wait_all_tasks_blocked()
            files.free_bytes = 0
            files.release()
        assert isinstance(call.error, LogFullError)
        files.free_bytes = 1e9
        await write(db, {b"c": b"3"})
        images = [files.crash_image(seed) for seed in range(5)]
    for image in images:
        async with open_memory_database(image) as db:
            await check_content(db, {b"a": b"1", b"c": b"3"})


# -- a process that is killed ------------------------------------------------------

KILLED = """
import sys, trio, trio_wal

async def clerk(db, number):
    while True:
        async with db.transaction() as tx:
            for key, change in ((b"a%d" % (number % 3), -1), (b"a%d" % (number % 5), 1)):
                tx.put(key, b"%d" % (int(tx.get(key, b"100")) + change))
            tx.put(b"clerk%d" % number, b"%d" % (int(tx.get(b"clerk%d" % number, b"0")) + 1))
            count = tx.get(b"clerk%d" % number)
        sys.stdout.write(f"{number} {count.decode()}\\n")
        sys.stdout.flush()

async def main():
    async with trio_wal.open_database(
        sys.argv[1], checkpoint_bytes=3000, segment_size=20_000
    ) as db:
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(clerk, db, number)

trio.run(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_process_leaves_every_acknowledged_transaction(tmp_path: Path) -> None:
    path = str(tmp_path / "db")
    reached: dict[int, int] = {}
    last_lsn = 0
    for rounds in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for number, line in enumerate(child.stdout):
            if not line.endswith("\n"):
                break
            clerk, count = map(int, line.split())
            assert count > reached.get(clerk, 0)
            reached[clerk] = count
            if number == 300 + 100 * rounds:
                os.kill(child.pid, signal.SIGKILL)
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL

        async def look() -> None:
            nonlocal last_lsn
            async with trio_wal.open_database(path) as db:
                report = db.recovery
                assert not report.clean_shutdown
                assert report.checkpoint_lsn > last_lsn
                assert report.transactions_replayed == report.last_lsn - report.checkpoint_lsn
                last_lsn = report.last_lsn
                counts = {n: int(db.get(b"clerk%d" % n, b"0")) for n in range(8)}
                assert sum(counts.values()) == last_lsn
                for clerk, count in reached.items():
                    # At most one more was on its way back to the clerk.
                    assert count <= counts[clerk] <= count + 1
                reached.update(counts)
                balances = [int(value) for _, value in db.scan(prefix=b"a")]
                assert sum(balances) == 100 * len(balances)

        trio.run(look)


# -- log and store that do not belong together -------------------------------------


async def make(home: Home, *, commits: int = 5, checkpoint_at: int = 3, tail: bool = True) -> None:
    """A database whose store holds the first few commits; its log keeps all."""
    async with home.open(retention=KeepAll(), segment_size=TINY_SEGMENT) as db:
        for number in range(1, commits + 1):
            await write(db, {b"k%d" % number: bytes(200), b"last": b"%d" % number})
            if number == checkpoint_at:
                await db.checkpoint()


async def wait_dropped(db: Database, lsn: int) -> None:
    """Until a thread has dropped this record from the log."""
    while db.wal.first_lsn <= lsn:
        await trio.lowlevel.checkpoint()


def expected(commits: int) -> State:
    return {b"k%d" % number: bytes(200) for number in range(1, commits + 1)} | {
        b"last": b"%d" % commits
    }


E = TypeVar("E", CorruptLogError, WrongDirectoryError)


async def refuse(path: Path, message: str, error: type[E] = CorruptLogError) -> E:
    """Opening is refused, and every byte below stays as it was."""
    before = hash_tree(path)
    with pytest.raises(error, match=message) as caught:
        await trio_wal.open_database(path).__aenter__()
    assert hash_tree(path) == before
    assert "nothing was modified" in str(caught.value)
    return caught.value


REBUILD = (
    "; where the log still starts at LSN 1, moving the store away lets open_database rebuild "
    "it from the log, otherwise restore a backup; nothing was modified; "
)


async def test_a_store_that_is_gone_is_rebuilt_from_a_log_that_starts_at_1(tmp_path: Path) -> None:
    home = Home(tmp_path)
    await make(home)
    shutil.move(tmp_path / "db" / "store", tmp_path / "moved away")
    async with home.open() as db:
        assert (db.recovery.checkpoint_lsn, db.recovery.transactions_replayed) == (0, 5)
        await check_content(db, expected(5))
        assert await db.checkpoint() == 5
    async with home.open() as db:
        await check_content(db, expected(5))


async def test_a_store_that_is_gone_is_refused_where_the_log_starts_later(tmp_path: Path) -> None:
    home = Home(tmp_path)
    async with home.open(segment_size=TINY_SEGMENT) as db:
        for number in range(30):
            await db.put(b"%d" % number, bytes(200))
        await db.checkpoint()
        await wait_dropped(db, 1)
        first = db.wal.first_lsn
    shutil.rmtree(tmp_path / "db" / "store")
    error = await refuse(
        tmp_path / "db",
        rf"^{tmp_path}/db/store/data\.mdb: at offset 0: the store is missing, and the "
        rf"log starts at LSN {first}; ",
    )
    assert REBUILD in str(error)
    assert error.path == str(tmp_path / "db" / "store" / "data.mdb")
    # Also an empty file is no store.
    (tmp_path / "db" / "store").mkdir()
    (tmp_path / "db" / "store" / "data.mdb").touch()
    await refuse(tmp_path / "db", r"^.*: the store is missing, and the log starts at LSN ")


async def test_the_store_of_another_database_is_refused(tmp_path: Path) -> None:
    home, other = Home(tmp_path), Home(tmp_path / "other")
    await make(home)
    await make(other)
    shutil.rmtree(tmp_path / "db" / "store")
    shutil.copytree(tmp_path / "other" / "db" / "store", tmp_path / "db" / "store")
    error = await refuse(
        tmp_path / "db", r"^.*data\.mdb: at offset 0: the store belongs to another log; "
    )
    assert REBUILD in str(error)
    shutil.move(tmp_path / "db" / "store", tmp_path / "moved away")
    async with home.open() as db:
        await check_content(db, expected(5))


async def test_a_store_ahead_of_its_log_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    await make(home, commits=3, checkpoint_at=3)
    shutil.copytree(tmp_path / "db" / "log", tmp_path / "old log")
    async with home.open(retention=KeepAll()) as db:
        await db.put(b"newer", b"")
        await db.checkpoint()
    shutil.rmtree(tmp_path / "db" / "log")
    shutil.move(tmp_path / "old log", tmp_path / "db" / "log")
    error = await refuse(
        tmp_path / "db", r"^.*data\.mdb: .*: the store holds LSN 4, but its log ends at LSN 3; "
    )
    assert REBUILD in str(error)
    shutil.move(tmp_path / "db" / "store", tmp_path / "moved away")
    async with home.open() as db:
        await check_content(db, expected(3))


async def test_a_store_too_old_for_its_log_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    await make(home)
    shutil.copytree(tmp_path / "db" / "store", tmp_path / "old store")
    async with home.open(segment_size=TINY_SEGMENT) as db:
        for number in range(30):
            await db.put(b"%d" % number, bytes(200))
        await db.checkpoint()
        await wait_dropped(db, 9)
        first = db.wal.first_lsn
    shutil.rmtree(tmp_path / "db" / "store")
    shutil.move(tmp_path / "old store", tmp_path / "db" / "store")
    await refuse(
        tmp_path / "db",
        rf"^.*data\.mdb: .*: the store ends at LSN 3, but its log starts at {first}; ",
    )


async def test_a_store_without_a_log_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    await make(home)
    shutil.move(tmp_path / "db" / "log", tmp_path / "log")
    await refuse(tmp_path / "db", r"^.*/db: at offset 0: a database without its log; ")
    (tmp_path / "db" / "log").mkdir()
    await refuse(tmp_path / "db", r"^.*data\.mdb: at offset 0: there is a store but no log; ")
    (tmp_path / "db" / "log").rmdir()
    shutil.move(tmp_path / "log", tmp_path / "db" / "log")
    async with home.open() as db:
        await check_content(db, expected(5))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a header of zeros": lambda data: bytes(8192) + data[8192:],
    "a header of garbage": lambda data: b"\xa5" * 8192 + data[8192:],
    "half of the file": lambda data: data[: len(data) // 2],
    "no last page": lambda data: data[:-4096],
    "one byte": lambda data: data[:1],
    "text": lambda data: b"this is no database\n" * 1000,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
async def test_a_damaged_store_is_refused_and_can_be_rebuilt(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    home = Home(tmp_path)
    await make(home)
    file = tmp_path / "db" / "store" / "data.mdb"
    file.write_bytes(damage(file.read_bytes()))
    error = await refuse(tmp_path / "db", rf"^{file}: at offset \d+: ")
    assert REBUILD in str(error)
    shutil.move(tmp_path / "db" / "store", tmp_path / "moved away")
    async with home.open() as db:
        await check_content(db, expected(5))


async def test_a_damaged_log_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    await make(home)
    segment = sorted((tmp_path / "db" / "log").glob("wal-*"))[2]
    segment.unlink()
    await refuse(tmp_path / "db", rf"^{segment.parent}/wal-.*: at offset 0: segment . is mis")


def damage(segment: Path) -> None:
    """Flip a bit in the body of its first frame."""
    data = bytearray(segment.read_bytes())
    data[DATA_OFFSET + 100] ^= 1
    segment.write_bytes(data)


@pytest.mark.parametrize("ending", ["closed", "torn"])
@pytest.mark.parametrize("number", [1, 2, 3])
async def test_damage_among_what_would_be_replayed_is_found_before_anything_is_written(
    tmp_path: Path, number: int, ending: str
) -> None:
    """Behind the store's LSN everything is checked, whatever `verify_bytes` says: replay reads
    it, but only after an unfinished batch was cut, and checkpoints while it reads."""
    home = Home(tmp_path)
    options: Any = {"retention": KeepAll(), "checkpoint_bytes": 300}
    async with home.open(segment_size=TINY_SEGMENT, checkpoint_bytes=1 << 20) as db:
        for count in range(1, 10):
            await db.put(b"k%d" % count, bytes(200))
            if count == 1:
                await db.checkpoint()
    segments = sorted((tmp_path / "db" / "log").glob("wal-*"))
    assert [int(path.name[4:24]) for path in segments] == [1, 3, 5, 7, 9]
    if ending == "torn":
        data = bytearray(segments[-1].read_bytes())
        assert not any(data[DATA_OFFSET + 2 * BLOCK :])
        data[DATA_OFFSET + 2 * BLOCK : DATA_OFFSET + 2 * BLOCK + 4] = b"torn"
        segments[-1].write_bytes(data)
    damage(segments[number])
    before = hash_tree(tmp_path)
    for _ in range(2):
        with pytest.raises(CorruptLogError) as caught:
            await home.open(segment_size=TINY_SEGMENT, verify_bytes=0, **options).__aenter__()
        assert hash_tree(tmp_path) == before
    assert (caught.value.path, caught.value.offset) == (str(segments[number]), DATA_OFFSET)


async def test_what_the_store_holds_is_not_checked_for_a_replay(tmp_path: Path) -> None:
    home = Home(tmp_path)
    options: Any = {"segment_size": TINY_SEGMENT, "retention": KeepAll(), "verify_bytes": 0}
    async with home.open(**options) as db:
        for count in range(1, 10):
            await db.put(b"k%d" % count, bytes(200))
            if count == 5:
                await db.checkpoint()
    segments = sorted((tmp_path / "db" / "log").glob("wal-*"))
    damage(segments[1])
    async with home.open(**options) as db:
        report = db.recovery
        # LSN 5 and 6 share a segment.
        assert (report.records_replayed, report.transactions_replayed) == (5, 4)
        assert db.get(b"k9") == bytes(200)


async def test_a_log_that_is_not_a_databases_is_refused(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        await wal.append(b"no transaction")
    # Given itself, and as a database's.
    own = await refuse(
        tmp_path / "log", r"^.*/log: this is a log: use open_wal\(\); nothing", WrongDirectoryError
    )
    assert (own.path, own.found, own.instead) == (str(tmp_path / "log"), "a log", "open_wal()")
    (tmp_path / "db").mkdir()
    shutil.move(tmp_path / "log", tmp_path / "db" / "log")
    message = rf"^{tmp_path}/db/log: this is a log, not a database's: use open_wal\(\); "
    await refuse(tmp_path / "db", message, WrongDirectoryError)


async def test_a_databases_directory_is_no_log(tmp_path: Path) -> None:
    await make(Home(tmp_path))
    before = hash_tree(tmp_path)
    path = re.escape(str(tmp_path / "db"))
    with pytest.raises(
        WrongDirectoryError, match=rf"^{path}: this is a database: use open_database\(\); nothing"
    ):
        await trio_wal.open_wal(tmp_path / "db").__aenter__()
    with pytest.raises(
        WrongDirectoryError,
        match=rf"^{path}/log: this is the log of a database: use open_database\('{path}'\); ",
    ):
        await trio_wal.open_wal(tmp_path / "db" / "log").__aenter__()
    with pytest.raises(
        WrongDirectoryError, match=rf"^{path}: this is a database: use open_reader\('{path}/log'\)"
    ):
        await trio_wal.open_reader(tmp_path / "db").__aenter__()
    # That works.
    async with trio_wal.open_reader(tmp_path / "db" / "log") as reader:
        assert reader.durable_lsn > 0
    assert hash_tree(tmp_path) == before


async def test_a_foreign_directory_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_bytes(b"dear ...")
    await refuse(
        tmp_path / "home",
        r"^.*/home: this is neither a log nor a database: it holds 'letter\.txt': use ",
        WrongDirectoryError,
    )
    (tmp_path / "mixed" / "log").mkdir(parents=True)
    (tmp_path / "mixed" / "log" / "letter.txt").write_bytes(b"dear ...")
    foreign = r"^.*/mixed/log: this is neither a log nor a database: it holds 'letter"
    await refuse(tmp_path / "mixed", foreign, WrongDirectoryError)
    (tmp_path / "file").write_bytes(b"dear ...")
    with pytest.raises(WrongDirectoryError, match=rf"^{tmp_path}/file: this is not a directory: "):
        await trio_wal.open_database(tmp_path / "file").__aenter__()


async def test_an_empty_directory_and_hidden_names_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "db" / "lost+found").mkdir(parents=True)
    (tmp_path / "db" / ".snapshots").mkdir()
    async with Home(tmp_path).open() as db:
        await db.put(b"a", b"1")
    async with Home(tmp_path).open() as db:
        await check_content(db, {b"a": b"1"})


async def test_an_open_that_was_interrupted_before_the_log_was_made_is_begun_anew(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path)
    (tmp_path / "db" / "log").mkdir(parents=True)
    async with home.open() as db:
        await db.put(b"a", b"1")
    # The store may be there without ever having had a checkpoint.
    async with home.open() as db:
        assert db.statistics().checkpoint_lsn == 0
        await check_content(db, {b"a": b"1"})


# -- the log decides ---------------------------------------------------------------


async def test_a_conflict_and_an_abort_leave_nothing_to_replay(files: MemoryFiles) -> None:
    async with open_memory_database(files) as db:
        await write(db, {b"a": b"1"})

        async def conflict() -> None:
            async with db.transaction() as tx:
                tx.put(b"b", tx.get(b"a", b""))
                await write(db, {b"a": b"2"})

        with pytest.raises(TransactionConflict):
            await conflict()
        async with db.transaction() as tx:
            tx.put(b"c", b"")
            tx.abort()
        after_crash = files.crash_image(3)
    async with open_memory_database(after_crash) as db:
        assert db.recovery.transactions_replayed == 2
        await check_content(db, {b"a": b"2"})
