"""A database in trouble and out of it again: what health says, and what monitoring is given.

Law: a case makes one kind of trouble after the other, drawn, in virtual time, and knows itself
which reasons there must be; whenever nothing moves it looks, and what it finds is compared with
its own counts and with a few names that it has written down without the package's table:

  * the reasons are those of the trouble that there is, and gone when it is over;
  * each series is given once, what counts never goes back, buckets are cumulative and complete;
  * of each state just one word is told.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import random
from typing import Any, Final

import trio
from helpers import Call
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal import LogFailedError, LogFullError
from trio_wal._metrics import Buckets, points
from trio_wal._sampling import Sampler
from trio_wal.testing import MemoryFiles

from . import _report
from ._promises import check
from ._simulator import seeded_run

STEPS: Final = 12
QUEUE: Final = 10
CROWDED: Final = 9
"""Of them are nine tenths."""
CHECKPOINT_BYTES: Final = 20_000
SHARE: Final = 10
"""Cases of one task for a worker process."""

Seen = dict[tuple[str, ...], Any]


class Case:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.files = MemoryFiles(seed=seed)
        self.db: Any
        self.sampler: Sampler
        self.committed = 0
        self.before: Seen = {}
        self.slow = False
        """Whether the disk takes its time."""
        self._gate = self.files.gate
        vars(self.files)["gate"] = self._pass

    async def run(self) -> None:
        options: dict[str, Any] = {
            "max_queue_size": QUEUE,
            "segment_size": 1,
            "checkpoint_bytes": CHECKPOINT_BYTES,
        }
        async with trio_wal.open_database("/db", files=self.files, **options) as self.db:
            self.sampler = Sampler([self.db])
            self.look()
            for _ in range(STEPS):
                steps = (self._put, self._stall, self._rush, self._full, self._store, self._writer)
                await self.rng.choice(steps)()
                self.look()
                await trio.sleep(self.rng.choice((0, 30)))
            broken = self.rng.random() < 0.5
            if broken:
                # Whatever else the log does in the background meets some of them.
                self.files.fail("sync", errno.EIO, times=100)
                with contextlib.suppress(LogFailedError):
                    await self.db.put(b"key", b"value")
                self.files.heal()
                self.look("failed")
        self.look("failed" if broken else "closed")

    async def _pass(self) -> None:
        await self._gate()
        if self.slow:
            await trio.sleep(0.1)

    # -- what happens --

    async def _put(self, size: int = 10) -> None:
        await self.db.put(b"%d" % self.rng.randrange(20), bytes(size))
        self.committed += 1

    async def _stall(self) -> None:
        """The disk stands still while the queue fills, more or less."""
        waiting = self.rng.choice((3, CROWDED - 1, CROWDED, QUEUE, QUEUE, QUEUE + 4))
        self.files.hold()
        async with trio.open_nursery() as nursery:
            Call(nursery, self.db.put, b"flying", b"")
            await wait_all_tasks_blocked()
            for number in range(waiting):
                Call(nursery, self.db.put, b"%d" % number, b"")
            await wait_all_tasks_blocked()
            self.look()
            seconds = self.rng.choice((1, 4, 6, 100))
            await trio.sleep(seconds)
            self.look(*["queue_full"] * (waiting >= CROWDED and seconds > 5))
            self.files.release()
        self.committed += 1 + waiting

    async def _rush(self) -> None:
        """More tasks than the queue has places write without pause; nobody looks meanwhile."""
        over = False

        async def write(number: int) -> None:
            while not over:
                await self.db.put(b"%d" % number, b"")
                self.committed += 1

        self.slow = True
        async with trio.open_nursery() as nursery:
            for number in range(3 * QUEUE):
                nursery.start_soon(write, number)
            seconds = self.rng.choice((3, 8))
            await trio.sleep(seconds)
            codes = {reason.code for reason in self.db.health().reasons}
            expected = {"queue_full"} if seconds > 5 else set[str]()
            check(codes == expected, f"after a rush of {seconds} seconds: {codes}")
            over = True
        self.slow = False

    async def _full(self) -> None:
        await self.db.checkpoint()
        self.files.free_bytes = 0
        try:
            for _ in range(10):
                await self._put(1000)
        except LogFullError:
            self.look("disk_full")
        self.files.heal()
        await trio.sleep(1)

    async def _store(self) -> None:
        """Checkpoints fail, perhaps until they are an interval behind."""
        self.files.fail("store", errno.EIO, times=1000)
        await self._put(CHECKPOINT_BYTES)
        await trio.sleep(self.rng.choice((2, 10)))
        self.look("checkpoints_failing")
        if self.rng.random() < 0.5 and not self.db.statistics().tasks_waiting_checkpoint:
            try:
                await self._put(CHECKPOINT_BYTES)
            except LogFullError:
                pass
            else:
                self.look("checkpoints_failing", "checkpoints_behind")
        self.files.heal()
        await trio.sleep(5)

    async def _writer(self) -> None:
        name = f"w{self.rng.randrange(5)}"
        async with self.db.writer(name) as writer, self.db.consumer(name):
            await writer.put(b"key", b"")
            # A consumer's first place is a transaction, too.
            self.committed = self.db.statistics().transactions
            seen = self.look()
            check(seen.get(("trio_wal_writer_records_appended_total", "/db", name)) == 1, "writer")
            check(("trio_wal_consumer_lag_records", "/db", name) in seen, "consumer")

    # -- what is looked for --

    def look(self, *codes: str) -> Seen:
        """Compare with what must be so; gives all series."""
        health = self.db.health()
        found = [reason.code for reason in health.reasons]
        check(sorted(found) == sorted(codes), f"the reasons are {found}, not {codes}")
        bad = {"failed", "closed"} & set(codes)
        status = "failed" if bad else "degraded" if codes else "ok"
        check(health.status == status, f"the status is {health.status}, not {status}")
        (look,) = self.sampler.looks()
        every = [((metric.name, *labels), value) for metric, labels, value in points(look)]
        seen: Seen = dict(every)
        check(len(seen) == len(every), "a series is there twice")
        self._compare(seen)
        told = {key[2] for key in seen if key[0] == "trio_wal_health_reason" and seen[key]}
        check(told == set(codes), f"told are {told}, not {codes}")
        for name, word in (("health_status", status), ("state", self.db.statistics().wal.state)):
            words = [key[2] for key in seen if key[0] == f"trio_wal_{name}" and seen[key]]
            check(words == [word], f"{name}: {words}, not {word}")
        return seen

    def _compare(self, seen: Seen) -> None:
        statistics = self.db.statistics()
        wal = statistics.wal
        expected = {
            "database_transactions_total": self.committed,
            "database_checkpoint_lsn": statistics.checkpoint_lsn,
            "records_appended_total": wal.records_appended,
            "appended_bytes_total": wal.bytes_appended,
            "durable_lsn": self.db.durable_lsn,
            "first_lsn": self.db.wal.first_lsn,
            "records_waiting": wal.records_waiting,
            "tasks_waiting_send": wal.tasks_waiting_send,
            "backpressure_waits_total": wal.backpressure_waits,
            "disk_bytes": wal.disk_bytes,
            "statistics_age_seconds": 0,
        }
        for name, figure in expected.items():
            value = seen["trio_wal_" + name, "/db"]
            check(value == figure, f"{name} is {value}, not {figure}")
        syncs = seen["trio_wal_sync_seconds", "/db"]
        check(syncs.count == wal.batches_synced, f"{syncs.count} syncs, not {wal.batches_synced}")
        check(syncs.sum == wal.sync_seconds_total, "the sum of syncs is another")
        for key, value in seen.items():
            if isinstance(value, Buckets):
                counts = [count for _, count in value.cumulative]
                check(counts == sorted(counts), f"{key}: buckets are not cumulative: {counts}")
            elif key[0].endswith("_total") and len(key) == 2:
                check(value >= self.before.get(key, 0), f"{key} has gone back to {value}")
        self.before = seen


def run_case(seed: int) -> None:
    """Raises what is found."""
    seeded_run(Case(seed).run, seed=seed)


def found_in(seed: int) -> str:
    return _report.found_in(run_case, seed)


# -- the campaign -------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replay", metavar="SEED", help="one case again")
    _report.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    return _report.run_seeds("figures", arguments, run_case, SHARE, "cases")


def replay(text: str) -> int:
    return _report.replay_seed(run_case, text)
