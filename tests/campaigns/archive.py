"""Logs that are archived, cut, dropped and crashed, and what can be restored of them (simulated).

Law: only the public API is used.  A case is a log of a few lives, each ended by a close or by a
crash at some operation on its files or its archive's, which are in the same memory.  The archive
fails now and then, before or after it has done what was asked.  After each life:

  * archive and log together hold every record that was acknowledged, and no other but what was
    being written; before the log is recovered, and after that;
  * the archive alone holds a beginning of a history that the log had, up to where the log has said
    that it is archived, at least;
  * of that it can be restored to any LSN, and to any time, exactly; a gap is told;
  * now and then the log is destroyed, and what was restored goes on in its place;
  * now and then its files are set back to what they were a life ago: an archive that has more than
    that, or other records, takes nothing from it, says so, and nothing is dropped; and the same
    when it has come further.

At the end the archive works, and gets everything.

``--kills N`` kills a real program instead, and restores what it has left.  ``--commits N`` restores
a log of so many commits to every one of them, and to a time between each two.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any, Final

import attrs
import trio
from trio.testing import MockClock

import trio_wal
from trio_wal import DirectoryArchive, KeepSegments, Record
from trio_wal.testing import MemoryFiles

from . import _report
from ._promises import check
from ._simulator import seeded_run

LOG: Final = "/log"
ARCHIVE: Final = "/archive"
MADE: Final = "/made"
LIVES: Final = 4
CALLS_MAX: Final = 14
SHARE: Final = 20
"""Cases of one task for a worker process."""

History = list[bytes]


class Wayward:
    """An archive that fails now and then; it can do no more than it must."""

    def __init__(
        self, archive: DirectoryArchive, rng: random.Random, done: Callable[[], None]
    ) -> None:
        self._archive = archive
        self._done = done
        """Called when several things were put at once."""
        self._rng = rng
        self._share = rng.choice((0.1, 0.4))
        """Of the calls fail so many, before anything is done: then more waits for the next one."""

    def _fail(self, share: float) -> None:
        if self._rng.random() < share:
            raise OSError(errno.EIO, "the archive fails")

    def put(self, name: str, content: Iterable[bytes]) -> None:
        self._fail(self._share)
        self._archive.put(name, content)
        self._fail(0.05)

    def list(self) -> list[str]:
        self._fail(self._share)
        return self._archive.list()

    def get(self, name: str) -> Iterator[bytes]:
        self._fail(0.1)
        return self._archive.get(name)


class WaywardTogether(Wayward):
    """One that puts several at once, and may fail after it has put some of them."""

    def put_group(self, objects: Iterable[tuple[str, Iterable[bytes]]]) -> None:
        self._fail(self._share)
        objects = list(objects)
        put = self._rng.choice((len(objects), len(objects), self._rng.randint(0, len(objects))))
        if put:
            self._archive.put_group(objects[:put])
        if put > 1:
            self._done()
        self._fail(0.05 if put == len(objects) else 1)


@attrs.define(eq=False)
class World:
    rng: random.Random
    files: MemoryFiles
    model: History = attrs.Factory(list)
    """The log's records, from LSN 1 on."""
    possible: list[History] = attrs.Factory(lambda: [[]])
    """What they may be, if it crashes now."""
    past: list[History] = attrs.Factory(list)
    """Histories that the log once had."""
    archived: int = 0
    """Up to where the log last said that it is archived."""
    has_cut: bool = False
    """In this life."""
    image: tuple[MemoryFiles, list[History], int] | None = None
    """What a crash has left."""
    older: tuple[dict[str, bytes], list[History]] | None = None
    """The log's files, its records, and its past, before a life; None: it is not set back."""
    written: int = 0
    operations: int = 0
    """On files, in this life."""
    crash_at: int | None = None
    """At which of them it crashes."""

    def archive(self, files: MemoryFiles | None = None) -> DirectoryArchive:
        return DirectoryArchive(ARCHIVE, files=files or self.files)

    # -- one life --

    async def live(self) -> None:
        rng, self.crash_at = self.rng, self.rng.choice((None, self.rng.randrange(400)))
        kind: Any = rng.choice(("kill", "power"))
        seed, self.operations = rng.getrandbits(32), 0

        def crash(*_: object) -> None:
            self.operations += 1
            if self.operations == self.crash_at:
                after = self.files.crash_image(seed, kind)
                self.image = after, list(self.possible), self.archived

        self.image, self.archived, self.has_cut = None, 0, False
        self.files.after_operation = crash
        async with trio_wal.open_wal(
            LOG,
            files=self.files,
            archive=rng.choice((Wayward, WaywardTogether))(self.archive(), rng, self.crash_soon),
            segment_size=rng.choice((1, 1, 8000)),
            retention=rng.choice((None, KeepSegments(1), KeepSegments(2))),
        ) as wal:
            for _ in range(rng.randint(3, CALLS_MAX)):
                await self._call(wal)
                said = wal.statistics().archived_lsn
                # After a cut it may be said of records that are no more, until all is looked at.
                self.archived = min(self.archived, said) if self.has_cut else said
        self.files.after_operation = None
        if self.image is not None:
            self.files, self.possible, self.archived = self.image

    def crash_soon(self) -> None:
        """Several things were put at once: now and then it crashes soon after that."""
        if self.image is None and self.rng.random() < 0.3:
            self.crash_at = self.operations + self.rng.randint(1, 12)

    async def _call(self, wal: Any) -> None:
        rng = self.rng
        call = rng.choices(("append", "rotate", "sleep", "drop", "cut"), (8, 2, 4, 1, 1))[0]
        if call == "append":
            batch = [self._payload() for _ in range(rng.choice((1, 1, 2, 4)))]
            after = self.model + batch
            self.possible = [self.model, after]
            await wal.append_many(batch)
            self.model, self.possible = after, [after]
        elif call == "rotate":
            check(await wal.rotate() == len(self.model), "another LSN was sealed")
        elif call == "sleep":
            await trio.sleep(rng.choice((0, 0.1, 3, 100)))
        elif call == "drop":
            await wal.truncate_before(rng.randint(1, wal.last_lsn + 1))
        elif wal.first_lsn - 1 < wal.last_lsn:
            lsn = rng.randint(wal.first_lsn - 1, wal.last_lsn)
            after = self.model[:lsn]
            self.possible = [self.model, after]
            self.past.append(self.model)
            self.archived, self.has_cut = min(self.archived, lsn), True
            try:
                await wal.truncate_after(lsn)
            except trio_wal.LsnTruncatedError:
                # Retention was faster.
                after = self.model
            self.model, self.possible = after, [after]

    def _payload(self) -> bytes:
        self.written += 1
        return b"%d:" % self.written + bytes(self.rng.randrange(400))

    # -- what it has left --

    def has_log(self) -> bool:
        return self.files.exists(LOG) and "log.meta" in self.files.names(LOG)

    async def look(self) -> None:
        files = self.files
        if not self.has_log():
            check([] in self.possible, "the log is gone")
            # The next one has another identity.
            self.model, self.older = [], None
            return
        found = await self._restored(tail=LOG)
        check(found in self.possible, f"{len(found)} records, not {self._lengths()}")
        async with trio_wal.open_wal(LOG, files=files) as wal:
            async with wal.read() as records:
                rest = [record.data async for record in records]
            first = wal.first_lsn
        check(rest == found[first - 1 :], "recovery finds another log than restore")
        again = await self._restored(tail=LOG)
        check(again == found, "after recovery it is another log")
        self.past += [history for history in self.possible if history != found]
        self.model, self.possible = found, [found]
        await self._look_at_archive()

    def _lengths(self) -> str:
        return " or ".join(str(len(history)) for history in self.possible)

    async def _look_at_archive(self) -> None:
        try:
            records = await self._records()
        except (trio_wal.WrongDirectoryError, FileNotFoundError):
            names = self.files.names(ARCHIVE) if self.files.exists(ARCHIVE) else []
            check(not any(n[0] == "0" and n.endswith(".json") for n in names), "nothing is found")
            check(self.archived == 0, "what was archived is gone")
            return
        found = [record.data for record in records]
        check(len(found) >= self.archived, f"{self.archived} were archived, {len(found)} are there")
        known = [self.model, *self.past]
        check(_begins_one(found, known), "the archive has another history")
        for lsn in self.rng.sample(range(len(found) + 1), min(4, len(found) + 1)):
            check(await self._restored(to_lsn=lsn) == found[:lsn], f"LSN {lsn} is another")
        for record in self.rng.sample(records, min(3, len(records))):
            last = max(other.lsn for other in records if other.timestamp <= record.timestamp)
            there = await self._restored(to_time=record.timestamp)
            check(there == found[:last], f"the time of LSN {record.lsn} is another")
        await self._look_for_gap(len(found))
        if self.rng.random() < 0.2:
            self.past.append(self.model)
            self.files.discard_directory(LOG)
            await trio_wal.restore(self.archive(), LOG, files=self.files)
            self.model, self.possible = found, [found]
            self.older = None

    async def set_back(self) -> None:
        """The log's disk is an older one; its archive is not."""
        if self.older is None or not self.files.exists(ARCHIVE):
            return
        contents, (model, *past) = self.older
        known = [model, *past]
        self.files.discard_directory(LOG)
        for name, data in contents.items():
            self.files.write_file(LOG, name, data)
        before = self.files.contents(ARCHIVE)
        names = [name for name in before if name[0] == "0" and name.endswith(".json")]
        there = await self._restored() if names else []
        sealed = await self._ends_sealed()
        options: Any = {"retention": KeepSegments(1), "segment_size": self.rng.choice((1, 8000))}
        async with trio_wal.open_wal(
            LOG, files=self.files, archive=self.archive(), **options
        ) as wal:
            ended = wal.last_lsn
            check(ended == len(model), "the older log is another one")
            first, epoch = wal.first_lsn, wal.epoch
            for _ in range(self.rng.randint(1, 6)):
                model = [*model, self._payload()]
                check(await wal.append(model[-1]) == len(model), "another LSN was given")
                await trio.sleep(self.rng.choice((0, 10)))
            await wal.rotate()
            await trio.sleep(100)
            found = wal.statistics()
            if found.archive_error is None:
                check(found.archived_lsn == len(model), "not archived")
            else:
                check(found.first_lsn == first, f"dropped from {first} to {found.first_lsn}")
        if found.archive_error is None:
            check(_begins_one(there, known), "the archive was ahead, and took more")
            check(await self._restored() == model, "what it took is not what comes back")
        else:
            check(self.files.contents(ARCHIVE) == before, "what was refused has changed something")
            # Where there is a newer history, restore would not take this one.
            newer = any(int(name.split("-")[2], 16) > epoch for name in names)
            ahead = newer or not _begins_one(there, known)
            # Its last segment was sealed before, and goes on; or is sealed there again, with the
            # same records.
            again = not sealed and any(int(name.split("-")[1]) == ended for name in names)
            check(ahead or again, f"refused: {found.archive_error}")
            if not again:
                await self._look_again(before, first)
            # As docs/operations.md says.
            self.files.discard_directory(LOG)
            await trio_wal.restore(self.archive(), LOG, files=self.files)
            model = there
        self.past.append(self.model)
        self.model, self.possible, self.older = model, [model], None

    async def _ends_sealed(self) -> bool:
        """Whether the log's last segment has no records yet."""
        async with trio_wal.open_wal(LOG, files=self.files.crash_image(0, "kill")) as wal:
            segments = wal.statistics().segments
            await wal.rotate()
            return wal.statistics().segments == segments

    async def _look_again(self, before: dict[str, bytes], first: int) -> None:
        """What was refused stays so, though the log may have come further than the archive."""
        size = self.rng.choice((1, 8000))
        async with trio_wal.open_wal(LOG, files=self.files, segment_size=size) as wal:
            for _ in range(self.rng.randint(0, 12)):
                await wal.append(self._payload())
        async with trio_wal.open_wal(
            LOG, files=self.files, archive=self.archive(), retention=KeepSegments(1)
        ) as wal:
            await wal.rotate()
            await trio.sleep(100)
            found = wal.statistics()
        check(found.archive_error is not None, "what was refused is taken later")
        check(found.first_lsn == first, "dropped, though refused before")
        check(self.files.contents(ARCHIVE) == before, "something was put later")

    async def _look_for_gap(self, last: int) -> None:
        """What is missing is told, and not passed over."""
        names = [n for n in self.files.names(ARCHIVE) if n[0] == "0" and n.endswith(".json")]
        if len({name.split("-")[2] for name in names}) != 1:
            # Without some of them another history would be the newest.
            return
        if len({name.split("-")[0] for name in names}) != len(names):
            # A log that was set back had not sealed yet what it had sealed before.
            return
        name = self.rng.choice(names)
        files = self.files.crash_image(0, "kill")
        files.remove_file(ARCHIVE, name)
        first, end = map(int, name.split("-")[:2])
        try:
            report = await trio_wal.restore(self.archive(files), MADE, files=files, dry_run=True)
        except trio_wal.RestoreGapError as exc:
            check(exc.last_lsn == first - 1, f"LSN {exc.last_lsn} is not the last before the gap")
        except trio_wal.WrongDirectoryError:
            check(len(names) == 1, "nothing is there")
        else:
            check(last in (report.last_lsn, end), "a gap is passed over")

    async def finish(self) -> None:
        """An archive that works again gets everything."""
        async with trio_wal.open_wal(LOG, files=self.files, archive=self.archive()) as wal:
            last = await wal.rotate()
            await trio.sleep(1)
            found = wal.statistics()
            check(found.archived_lsn == last, f"not archived: {found.archive_error}")

    async def _records(self, **options: Any) -> list[Record]:
        """Of what is restored."""
        files = self.files
        await trio_wal.restore(self.archive(), MADE, files=files, **options)
        async with trio_wal.open_wal(MADE, files=files, verify_bytes=1 << 40) as wal:
            check(wal.recovery.torn_bytes == 0, "what was restored is torn")
            async with wal.read() as records:
                found = [record async for record in records]
        files.discard_directory(MADE)
        check([r.lsn for r in found] == list(range(1, len(found) + 1)), "records are missing")
        return found

    async def _restored(self, **options: Any) -> History:
        if not self.files.exists(ARCHIVE):
            self.files.open_directory(ARCHIVE, create=True)
        return [record.data for record in await self._records(**options)]


def _begins_one(found: History, known: Iterable[History]) -> bool:
    return any(found == history[: len(found)] for history in known)


async def _lives(seed: int) -> None:
    world = World(random.Random(seed), MemoryFiles(seed=seed))
    for _ in range(LIVES):
        if world.rng.random() < 0.5 and world.has_log():
            world.older = world.files.contents(LOG), [world.model, *world.past]
        await world.live()
        await world.look()
        if world.rng.random() < 0.3:
            await world.set_back()
            await world.look()
    await world.finish()
    await world.look()


def run_case(seed: int) -> None:
    """Raises what is found."""
    seeded_run(_lives, seed, seed=seed)


def found_in(seed: int) -> str:
    return _report.found_in(run_case, seed)


# -- every commit -------------------------------------------------------------------


async def _every_commit(count: int, seed: int) -> int:
    """Restores one log to every commit, and to a time before each; how often."""
    world = World(random.Random(seed), MemoryFiles(seed=seed))
    async with trio_wal.open_wal(
        LOG, files=world.files, archive=world.archive(), segment_size=16_000
    ) as wal:
        for _ in range(count):
            await trio.sleep(1)
            await wal.append_many([world._payload() for _ in range(world.rng.choice((1, 1, 3)))])
        async with wal.read() as records:
            found = [record async for record in records]
        await wal.rotate()
    for record in found:
        check(await world._records(to_lsn=record.lsn) == found[: record.lsn], f"LSN {record.lsn}")
        time = record.timestamp - timedelta(seconds=0.5)
        last = sum(other.timestamp <= time for other in found)
        if last:
            check(await world._records(to_time=time) == found[:last], f"before LSN {record.lsn}")
    return 2 * len(found)


# -- real processes -----------------------------------------------------------------

LIVES_OF_ONE: Final = 50
"""Kills of one database: a restore reads all of its manifests."""
TASKS: Final = 4
SLOTS: Final = 25
PADDING: Final = 200
LIFE_SECONDS: Final = 0.3
"""At most so long until the kill, from the fork on: it may meet the open."""
COMMITS_MAX: Final = 100

SERVER: Final = f"""
import os, shutil, sys, trio, trio_wal
def tell(*words):
    # In one piece: a line is told, or not.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
async def main(folder):
    archive = trio_wal.DirectoryArchive(folder + "/archive")
    async with trio_wal.open_database(
        folder + "/db", archive=archive, segment_size=1, checkpoint_bytes=20_000
    ) as db:
        async def commit(task):
            while True:
                async with db.transaction() as tx:
                    count = int(tx.get(b"%d" % task, b"0")) + 1
                    tx.put(b"%d" % task, b"%d" % count)
                    tx.put(b"%d %d" % (task, count % {SLOTS}), b"%d" % count + bytes({PADDING}))
                tell(task, count, tx.lsn)
                await trio.sleep(0.002)
        async with trio.open_nursery() as nursery:
            for task in range({TASKS}):
                nursery.start_soon(commit, task)
            while True:
                for _ in range(5):
                    await trio.sleep(0.02)
                    await db.wal.rotate()
                copy = folder + "/copy " + os.urandom(4).hex()
                await db.backup(copy)
                shutil.rmtree(copy)
for folder in sys.stdin:
    pid = os.fork()
    if not pid:
        tell("pid", os.getpid())
        trio.run(main, folder.strip())
    tell("end", os.waitpid(pid, 0)[1])
"""
"""Forks for each line that it is given a program that archives, and never ends by itself.  A
process that has imported everything does that, because that takes longer than the rest."""


class Victims:
    """Programs that are killed (SIGKILL), one at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._pid: int | None = None

    def close(self) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        with self._server as server:
            server.kill()

    def live(self, folder: str, seconds: float, commits: int | None) -> Iterator[Told]:
        """What one says of its commits, until it is killed.

        Args:
          seconds: when; from the fork on, or from the last of ``commits`` that it is waited for.
        """
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{folder}\n")
        stdin.flush()
        self._pid = int(stdout.readline().split()[1])
        for _ in range(commits or 0):
            yield _told(stdout.readline())
        time.sleep(seconds)
        os.kill(self._pid, signal.SIGKILL)
        for line in stdout:
            if line.startswith("end"):
                self._pid = None
                check(int(line.split()[1]) == signal.SIGKILL, f"it has ended by itself: {line}")
                return
            yield _told(line)
        raise RuntimeError("the program that forks has ended")


@attrs.frozen
class Told:
    """A commit that was acknowledged: the ``count``-th of its task."""

    task: int
    count: int
    lsn: int


def _told(line: str) -> Told:
    numbers = line.split()
    check(len(numbers) == 3 and numbers[0] != "end", f"it has ended by itself: {line}")
    return Told(*map(int, numbers))


def kill_and_restore(count: int, seed: int) -> tuple[int, int]:
    """Kills a program (SIGKILL) again and again; after each kill its database is restored to the
    last commit that was acknowledged, to one before that, and now and then from its archive
    alone.  Gives how many commits were acknowledged, and how often it was restored."""
    rng = random.Random(seed)
    acknowledged = restored = 0
    with contextlib.closing(Victims()) as victims:
        for first in range(0, count, LIVES_OF_ONE):
            told: list[Told] = []
            lives = min(LIVES_OF_ONE, count - first)
            with tempfile.TemporaryDirectory() as folder:
                for life in range(lives):
                    # Half of them while it opens or soon after, however slow this machine is.
                    commits = rng.choice((None, rng.randrange(COMMITS_MAX)))
                    seconds = rng.random() * (LIFE_SECONDS if commits is None else 0.02)
                    told += victims.live(folder, seconds, commits)
                    places: list[int | None] = []
                    if told:
                        last = max(one.lsn for one in told)
                        places += [last, rng.randint(0, last)]
                    if told and (rng.random() < 0.1 or life == lives - 1):
                        places.append(None)
                    for lsn in places:
                        trio.run(_check_restored, folder, lsn, told)
                    restored += len(places)
            acknowledged += len(told)
    check(acknowledged > 5 * count, f"no more than {acknowledged} commits: this shows nothing")
    return acknowledged, restored


async def _check_restored(folder: str, lsn: int | None, told: list[Told]) -> None:
    """Args:
    lsn: None: of the archive alone, to wherever it reaches.
    """
    archive, dest = DirectoryArchive(f"{folder}/archive"), f"{folder}/made"
    if lsn is None and not any(
        name[0] == "0" and name.endswith(".json") for name in archive.list()
    ):
        # It has nothing but its own name yet.
        return
    tail = None if lsn is None else f"{folder}/db"
    report = await trio_wal.restore(archive, dest, to_lsn=lsn, tail=tail)
    lsn = report.last_lsn if lsn is None else lsn
    check(report.last_lsn == lsn, f"restored to LSN {report.last_lsn}, not {lsn}")
    async with trio_wal.open_database(dest) as db:
        check(db.durable_lsn == lsn, f"it opens at LSN {db.durable_lsn}, not {lsn}")
        found = dict(db.scan())
    await trio.to_thread.run_sync(shutil.rmtree, dest)
    counts = [int(found.pop(b"%d" % task, b"0")) for task in range(TASKS)]
    check(sum(counts) == lsn, f"{sum(counts)} commits at LSN {lsn}: lost, or doubled")
    for one in told:
        is_there = counts[one.task] >= one.count
        check(is_there == (one.lsn <= lsn), f"{one} at LSN {lsn}: {counts[one.task]}")
    expected = {
        b"%d %d" % (task, number % SLOTS): b"%d" % number + bytes(PADDING)
        for task, number_of in enumerate(counts)
        for number in range(max(1, number_of - SLOTS + 1), number_of + 1)
    }
    check(found == expected, f"LSN {lsn} is another state")


# -- the campaign -------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replay", metavar="SEED", help="one case again")
    parser.add_argument("--kills", type=int, help="kill a real program so often instead")
    parser.add_argument("--commits", type=int, help="restore one log of so many to each of them")
    _report.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.kills is not None:
        if not hasattr(os, "fork"):
            return _report.fail_usage("--kills needs a system with fork(2)")
        told, restored = kill_and_restore(arguments.kills, arguments.seed)
        print(
            f"{arguments.kills:,} kills, {told:,} commits acknowledged, {restored:,} restores: "
            "0 lost, 0 doubled"
        )
        return 0
    if arguments.commits is not None:
        count = trio.run(
            partial(_every_commit, arguments.commits, arguments.seed),
            clock=MockClock(autojump_threshold=0),
        )
        print(f"{count:,} places, each restored exactly")
        return 0
    return _report.run_seeds("archive", arguments, run_case, SHARE, "logs")


def replay(text: str) -> int:
    return _report.replay_seed(run_case, text)
