"""Error loops: the n-th file operation fails, for every n, once and for ever, in every way.

Law: a workload runs whole programs on files in memory; one fault is put into it; a witness
notes what each call said.  Afterwards the log is opened again, as it is and after crashes,
and must bear out every word:

  * what was acknowledged is there, with its content and in order; LSNs have no gaps;
  * what a call said is not written is not there; a unit is there whole or not at all;
  * the error is one of those that the call documents, and names the operating system's;
  * after a failed write or sync the handle is dead, and the file is not touched again:
    no sync is retried;
  * what an open shows, after whatever failed before it, survives the loss of power then:
    recovery does not believe the page cache.
"""

from __future__ import annotations

import argparse
import errno
import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final, TypeVar

import attrs
import trio
from databases import DB, TINY_SEGMENT, after, commits_of
from helpers import LOG, read_all

import trio_wal
from trio_wal import (
    Database,
    KeepAll,
    KeepSegments,
    LogFailedError,
    LogFullError,
    Transaction,
    TransactionConflict,
    WriteAheadLog,
)
from trio_wal._files import NO_SPACE
from trio_wal.testing import MemoryFiles, Operation

from . import _report
from ._promises import Promises, Record, check
from ._simulator import seeded_run

T = TypeVar("T", WriteAheadLog, Database)

SEEDS: Final = 2
"""Power failures after each case."""
HANG_SECONDS: Final = 1000.0
"""Of the virtual clock, which jumps when nobody can do anything: then something hangs."""

ALL: Final[frozenset[Operation]] = frozenset(
    (
        "open", "pread", "pwrite", "sync", "allocate", "truncate",
        "rename", "unlink", "sync_dir", "lock", "store",
    )
)  # fmt: skip
CHANGES: Final = ALL - {"pread", "lock"}
GROWS: Final[frozenset[Operation]] = frozenset(
    ("open", "pwrite", "sync", "allocate", "rename", "sync_dir", "store")
)


@attrs.frozen
class Kind:
    """One way to fail."""

    error: int
    operations: frozenset[Operation]
    """Those that fail in this way."""
    written: int = 0
    """Bytes of a write that reach the file all the same."""


KINDS: Final = {
    "EIO": Kind(errno.EIO, ALL),
    "short write": Kind(errno.EIO, frozenset({"pwrite"}), written=300),
    "ENOSPC": Kind(errno.ENOSPC, GROWS),
    "short write, ENOSPC": Kind(errno.ENOSPC, frozenset({"pwrite"}), written=512),
    "EDQUOT": Kind(errno.EDQUOT, GROWS),
    "EROFS": Kind(errno.EROFS, CHANGES),
    "EMFILE": Kind(errno.EMFILE, frozenset({"open"})),
    "EFBIG": Kind(errno.EFBIG, frozenset({"pwrite", "allocate", "truncate"})),
}
MODES: Final = {"once": 1.0, "for ever": math.inf}


# -- putting the fault in -----------------------------------------------------------


@attrs.define(eq=False)
class _Fault:
    """As `MemoryFiles` wants it."""

    error: int
    written: int


@attrs.define(eq=False)
class Injector:
    """Lets the n-th operation of a kind fail, and notes what is done then."""

    kind: Kind
    number: float
    times: float
    count: int = 0
    """Operations of the kind so far."""
    failed: list[tuple[str, str]] = attrs.Factory(list)
    """(operation, path) of those that did not succeed."""
    retried: list[str] = attrs.Factory(list)
    """Segments that were written or synced again after that had failed."""
    dead: set[str] = attrs.Factory(set)
    """Segments of which a write or sync has failed."""

    def into(self, files: MemoryFiles) -> None:
        original = files._due

        def due(operation: Operation, path: str) -> object:
            fault = original(operation, path)
            return fault if fault is not None else self._due(operation, path)

        # The one place through which all operations go; nothing public can count them all.
        vars(files)["_due"] = due

    def _due(self, operation: Operation, path: str) -> _Fault | None:
        if operation in ("pwrite", "sync", "truncate") and path in self.dead:
            self.retried.append(f"{operation} {path}")
        if operation not in self.kind.operations:
            return None
        number, self.count = self.count, self.count + 1
        if not self.number <= number < self.number + self.times:
            return None
        self.failed.append((operation, path))
        if operation in ("pwrite", "sync") and "/wal-" in path:
            self.dead.add(path)
        return _Fault(self.kind.error, self.kind.written)

    def reopened(self) -> None:
        """A new handle may write what the old one may not."""
        self.dead.clear()


# -- what was said ------------------------------------------------------------------


@attrs.define(eq=False)
class Witness:
    """What was asked for, and what was answered."""

    injector: Injector
    promises: Promises = attrs.Factory(Promises)
    sent: dict[bytes, list[Record]] = attrs.Factory(dict)
    """Of every task: accepted, and nothing more was said."""
    backups: dict[str, int] = attrs.Factory(dict)
    """LSN of every backup that was made."""
    told: Counter[str] = attrs.Factory(Counter)

    def name(self, exc: BaseException) -> str:
        """The outcome's name, after a check that it is a documented one."""
        kind = type(exc).__name__
        if isinstance(exc, (LogFailedError, LogFullError)):
            cause = exc.__cause__
            check(isinstance(cause, OSError), f"{exc!r} has the cause {cause!r}")
            assert isinstance(cause, OSError)
            check(cause.errno == self.injector.kind.error, f"{exc!r} is caused by {cause!r}")
            if isinstance(exc, LogFullError):
                check(cause.errno in NO_SPACE, f"{exc!r} is caused by {cause!r}")
            else:
                kind += f": {exc.outcome}"
        elif isinstance(exc, OSError):
            check(exc.errno == self.injector.kind.error, f"not what failed: {exc!r}")
            kind = "OSError"
        else:
            named = isinstance(exc, (trio.ClosedResourceError, TransactionConflict))
            check(named, f"raised: {exc!r}")
        self.told[kind] += 1
        return kind

    async def write(
        self, task: bytes, records: list[bytes], call: Callable[[], Awaitable[Any]]
    ) -> bool:
        """A call that appends; whether it was acknowledged."""
        unit = self.promises.submit(task, *records)
        try:
            answer = await call()
        except trio.Cancelled:
            self.promises.withdraw(unit, "it was cancelled")
            raise
        except (OSError, trio_wal.WalError, trio.ClosedResourceError) as exc:
            if self.name(exc) != "LogFailedError: unknown":
                self.promises.withdraw(unit, f"it raised {exc!r}")
            return False
        if answer is None:
            self.sent.setdefault(task, []).extend(unit)
        else:
            lsns = range(answer, answer + 1) if isinstance(answer, int) else answer
            check(len(lsns) == len(unit), f"{len(unit)} records got {lsns}")
            self.promises.acknowledge(unit, lsns[0])
        return True

    async def flush(self, task: bytes, call: Callable[[], Awaitable[Any]]) -> None:
        """A call that makes durable what the task has sent, or tells what became of it."""
        records = self.sent.get(task, [])
        try:
            await call()
        except LogFullError as exc:
            self.name(exc)
            return
        except (OSError, trio_wal.WalError, trio.ClosedResourceError) as exc:
            if self.name(exc) == "LogFailedError: not written":
                self.promises.withdraw(records, f"it raised {exc!r}")
        else:
            self.promises.cover(records)
        self.sent[task] = []

    async def ask(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """A call that writes nothing; its answer, or None where it failed."""
        try:
            return await call()
        except (OSError, trio_wal.WalError, trio.ClosedResourceError) as exc:
            self.name(exc)
            return None

    async def cut(self, wal: WriteAheadLog, lsn: int) -> None:
        known = self.promises.cut is None
        if known:
            self.promises.begin_cut(lsn)
        try:
            await wal.truncate_after(lsn)
        except (OSError, trio_wal.WalError, trio.ClosedResourceError) as exc:
            if self.name(exc) != "LogFailedError: unknown" and known:
                self.promises.end_cut(done=False)
            return
        check(known, "what became of one cut was unknown, and then another was made")
        self.promises.end_cut(done=True)

    async def drop(self, wal: WriteAheadLog, lsn: int) -> None:
        self.promises.begin_drop(lsn)
        await self.ask(lambda: wal.truncate_before(lsn))
        check(wal.first_lsn <= lsn, f"first_lsn {wal.first_lsn} after truncate_before({lsn})")

    def examine(self, first_lsn: int, found: dict[int, bytes]) -> None:
        """Whether what is found bears out all that was said."""
        self.promises.expect(list(found.items()), first_lsn)

    def go_on(self, first_lsn: int, found: dict[int, bytes]) -> None:
        """The same of a log that is open: from here on that is the truth."""
        self.examine(first_lsn, found)
        pairs = list(found.items())
        self.promises.crashed(pairs, first_lsn)
        self.promises.opened(pairs, first_lsn + len(pairs) - 1)

    async def examine_database(self, db: Database) -> dict[int, bytes]:
        """The same for a database: its log's commits, and the state that follows from them."""
        commits = await commits_of(db)
        state = dict(db.scan())
        found: dict[int, bytes] = {}
        for commit in commits:
            values = [operation.value or b"" for operation in commit.operations]
            marker = found[commit.lsn] = values[0]
            shared, _, before = values[-1].partition(AFTER)
            check(values[:2] == [marker] * 2 and shared == marker, f"half a {commit}")
            if commit.lsn == 1 or commit.lsn - 1 in found:
                check(before == found.get(commit.lsn - 1, b""), f"{commit} has read {before!r}")
        first_lsn = db.wal.first_lsn
        self.promises.begin_drop(db.recovery.checkpoint_lsn + 1)
        self.examine(first_lsn, found)
        check(after({} if first_lsn == 1 else state, commits) == state, "the state is another")
        for task, records in self.promises.by_task.items():
            assert isinstance(task, bytes)
            last = state.get(task)
            check(last == state.get(b"both " + task), f"half a transaction of {task!r}")
            shown = 0
            if last is not None:
                keys = [record.key for record in records]
                check(last in keys, f"{task!r} has {last!r}, never written")
                shown = keys.index(last) + 1
                check(not records[shown - 1].gone, f"{last!r} was said to be not written")
            more = any(map(self.promises.is_sure, records[shown:]))
            check(not more, f"{task!r} has {last!r}: acknowledged is more")
        return found


# -- programs on a log --------------------------------------------------------------

OPTIONS: Final[dict[str, Any]] = {"segment_size": TINY_SEGMENT, "flush_interval": 0}


def open_log(files: MemoryFiles, **options: Any) -> AbstractAsyncContextManager[WriteAheadLog]:
    return trio_wal.open_wal(LOG, files=files, **{**OPTIONS, **options})


def open_db(files: MemoryFiles, **options: Any) -> AbstractAsyncContextManager[Database]:
    return trio_wal.open_database(DB, files=files, **{**OPTIONS, **options})


async def session(
    opening: AbstractAsyncContextManager[T],
    witness: Witness,
    body: Callable[[T], Awaitable[None]],
) -> None:
    """One life of a log, or of a database."""
    injector = witness.injector
    injector.reopened()
    told = witness.told.total()
    try:
        async with opening as opened:
            await body(opened)
            await _probe(witness, opened)
    except (OSError, trio_wal.WalError) as exc:
        witness.name(exc)
    check(not injector.dead or witness.told.total() > told, "a failed write was told to nobody")


async def _probe(witness: Witness, writes: Any) -> None:
    """A broken log is dead for good."""
    wal = writes.wal if isinstance(writes, Database) else writes
    failed = wal.statistics().state == "failed"
    check(failed or not witness.injector.dead, "a failed write, and the log goes on")
    if not failed:
        return
    calls: list[Callable[[], Awaitable[Any]]] = [wal.flush]
    if isinstance(writes, Database):
        calls += [partial(writes.put, b"after", b"the failure"), partial(writes.run, _read_only)]
    else:
        calls += [
            partial(wal.append, b"after the failure"),
            partial(wal.append_many, [b"after the failure"]),
            partial(wal.send, b"after the failure"),
            partial(wal.truncate_before, wal.first_lsn),
            partial(wal.truncate_after, wal.first_lsn - 1),
        ]
    for call in calls:
        try:
            await call()
        except LogFailedError as exc:
            witness.name(exc)
        else:
            check(call is calls[-1] and isinstance(writes, Database), "a broken log has answered")


def _read_only(tx: Transaction) -> object:
    return tx.get(b"nothing")


async def writer(wal: WriteAheadLog, witness: Witness, name: bytes) -> None:
    """Every way of writing."""
    for n in range(2):
        data = b"%s %d" % (name, n)
        await witness.write(name, [data + b" append"], partial(wal.append, data + b" append"))
        unit = [data + b" unit", data + b" of", data + b" three"]
        await witness.write(name, unit, partial(wal.append_many, unit))
        await witness.write(name, [data + b" send"], partial(wal.send, data + b" send"))
        await witness.flush(name, wal.flush)


async def append_some(wal: WriteAheadLog, witness: Witness, name: bytes, count: int) -> None:
    for n in range(count):
        data = b"%s %d" % (name, n)
        await witness.write(name, [data], partial(wal.append, data))


async def appends(files: MemoryFiles, witness: Witness) -> None:
    """Three tasks, rotations, a close in order, and the same again."""

    async def body(wal: WriteAheadLog) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(writer, wal, witness, b"%d-%d" % (life, number))

    for life in range(2):  # noqa: B007  (the body asks for it)
        await session(open_log(files), witness, body)


async def truncations(files: MemoryFiles, witness: Witness) -> None:
    """Segments dropped and recycled, the log's end cut."""

    async def body(wal: WriteAheadLog) -> None:
        await append_some(wal, witness, b"a", 8)
        await witness.drop(wal, min(6, wal.last_lsn + 1))
        await append_some(wal, witness, b"b", 4)
        await witness.cut(wal, max(wal.last_lsn - 3, wal.first_lsn - 1))
        await append_some(wal, witness, b"c", 3)
        await witness.cut(wal, max(wal.last_lsn - 1, wal.first_lsn - 1))
        await append_some(wal, witness, b"d", 1)
        await witness.drop(wal, wal.last_lsn + 1)
        await append_some(wal, witness, b"e", 1)
        await witness.drop(wal, wal.first_lsn)
        await _tidied(files, witness, wal)

    await session(open_log(files), witness, body)


async def retention(files: MemoryFiles, witness: Witness) -> None:
    """Segments go by themselves, and come back as the next ones."""

    async def body(wal: WriteAheadLog) -> None:
        for n in range(9):
            witness.promises.begin_drop(wal.last_lsn + 1)
            data = b"%d" % n
            await witness.write(b"a", [data], partial(wal.append, data))
            await trio.sleep(1)
        await _tidied(files, witness, wal)

    await session(open_log(files, retention=KeepSegments(1)), witness, body)


async def late_syncs(durability: str, files: MemoryFiles, witness: Witness) -> None:
    """Answered when it is written: only what a flush covers must survive."""

    async def body(wal: WriteAheadLog) -> None:
        promises = witness.promises
        for n in range(12):
            data = b"%d" % n
            unit = promises.submit(b"a", data)
            lsn = await witness.ask(partial(wal.append, data))
            if lsn is not None:
                promises.acknowledge(unit, lsn, durable=False)
            if n % 4 == 3:
                durable = await witness.ask(wal.flush)
                if durable is not None:
                    check(durable >= promises.written, f"flush gave {durable}")
                    promises.settle_durable(durable)
        await trio.sleep(3)

    opening = open_log(files, durability=durability, flush_interval=1)
    await session(opening, witness, body)


async def after_a_crash(files: MemoryFiles, witness: Witness) -> None:
    """A log is recovered, written and closed, and recovered again."""

    async def body(wal: WriteAheadLog) -> None:
        witness.go_on(wal.first_lsn, await read_all(wal))
        await append_some(wal, witness, b"life %d" % life, 2)

    for life in range(2):  # noqa: B007  (the body asks for it)
        await session(open_log(files), witness, body)


# -- programs on a database ---------------------------------------------------------

TASKS: Final = 3
SHARED: Final = b"shared"
AFTER: Final = b" after "
"""Every transaction puts itself, and the one that it found there, into the shared key."""


async def look_on(db: Database, witness: Witness) -> None:
    """Read-only transactions: what one has read is durable when it returns."""
    for _ in range(6):
        shared = await witness.ask(partial(db.run, lambda tx: tx.get(SHARED)))
        if shared is not None:
            witness.promises.cover([witness.promises.records[shared.partition(AFTER)[0]]])


async def transact(db: Database, witness: Witness, name: bytes, markers: list[bytes]) -> None:
    """Transactions of three keys, so that half of one would be seen; some take their time."""
    for n, marker in enumerate(markers):

        async def change(tx: Transaction, n: int = n, marker: bytes = marker) -> Transaction:
            before, _, _ = tx.get(SHARED, b"").partition(AFTER)
            if n == 1:
                for _ in range(5):
                    await trio.lowlevel.checkpoint()
            elif n == 2:
                await witness.ask(db.checkpoint)
            tx.put(name, marker)
            tx.put(b"both " + name, marker)
            tx.put(SHARED, marker + AFTER + before)
            return tx

        async def call(change: Callable[..., Awaitable[Transaction]] = change) -> Any:
            tx: Transaction = await db.run(change)
            return tx.lsn

        await witness.write(name, [marker], call)


def markers(name: bytes, count: int) -> list[bytes]:
    """What the transactions of one task write."""
    return [b"%s %d" % (name, n) for n in range(count)]


async def database(keep: bool, files: MemoryFiles, witness: Witness) -> None:
    """Commits of three tasks beside checkpoints, a backup, a close, and all of it again."""

    async def body(db: Database) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(TASKS):
                name = b"%d-%d" % (life, number)
                nursery.start_soon(transact, db, witness, name, markers(name, 3))
            nursery.start_soon(look_on, db, witness)
            nursery.start_soon(witness.ask, db.checkpoint)
        lsn = await witness.ask(partial(db.backup, f"/backup {life}"))
        if lsn is not None:
            witness.backups[f"/backup {life}"] = lsn
        name = b"%d-last" % life
        await transact(db, witness, name, markers(name, 1))

    for life in range(2):  # noqa: B007  (the body asks for it)
        retention = KeepAll() if keep else None
        opening = open_db(files, checkpoint_bytes=400, retention=retention)
        await session(opening, witness, body)


async def database_after_a_crash(files: MemoryFiles, witness: Witness) -> None:
    async def body(db: Database) -> None:
        await witness.examine_database(db)
        name = b"life %d" % life
        await transact(db, witness, name, markers(name, 2))
        await witness.ask(db.checkpoint)

    for life in range(2):  # noqa: B007  (the body asks for it)
        opening = open_db(files, checkpoint_bytes=400, retention=KeepAll())
        await session(opening, witness, body)


Program = Callable[[MemoryFiles, Witness], Awaitable[None]]


@attrs.frozen
class Workload:
    program: Program
    before: Program | None = None
    """Crashed at an operation of this one, which does not fail."""
    moments: int = 0
    """At so many of its operations."""


WORKLOADS: Final = {
    "appends": Workload(appends),
    "truncations": Workload(truncations),
    "retention": Workload(retention),
    "interval": Workload(partial(late_syncs, "interval")),
    "no syncs": Workload(partial(late_syncs, "none")),
    "recovery of appends": Workload(after_a_crash, appends, 12),
    "recovery of truncations": Workload(after_a_crash, truncations, 24),
    "database": Workload(partial(database, True)),
    "database, recycling": Workload(partial(database, False)),
    "recovery of a database": Workload(database_after_a_crash, partial(database, True), 12),
}


PARTS: Final = tuple(WORKLOADS)


# -- one case -----------------------------------------------------------------------


@attrs.frozen
class Start:
    """Where a program begins: files, and what is known of them."""

    files: MemoryFiles
    promises: Promises

    def copy(self, injector: Injector) -> tuple[MemoryFiles, Witness]:
        files = self.files.crash_image(kind="kill")
        files.clock_offset_us -= 3_600_000_000  # the times of records never go back
        injector.into(files)
        return files, Witness(injector, self.promises.copy())


HEALTHY: Final = Kind(0, frozenset())


@functools.cache
def starts(name: str) -> list[Start]:
    """Where the cases of a workload begin."""
    workload = WORKLOADS[name]
    files = MemoryFiles(seed=5)
    witness = Witness(Injector(HEALTHY, 0, 0))
    if workload.before is None:
        return [Start(files, witness.promises)]
    found: list[Start] = []

    def crash(operation: Operation, path: str) -> None:
        found.append(Start(files.crash_image(len(found), "power"), witness.promises.copy()))

    files.after_operation = crash
    play(partial(workload.before, files, witness))
    step = len(found) / workload.moments
    return [found[int(step * (n + 0.5))] for n in range(workload.moments)]


def play(program: Callable[[], Awaitable[None]]) -> None:
    """Run a program on a virtual clock, the same way each time."""

    async def main() -> None:
        with trio.move_on_after(HANG_SECONDS) as scope:
            await program()
        check(not scope.cancelled_caught, "it hangs")

    seeded_run(main, seed=0)


@attrs.frozen
class Case:
    workload: str
    start: int
    kind: str
    mode: str
    number: int
    """Which of the operations that can fail in this way."""

    def __str__(self) -> str:
        return f"{self.workload}:{self.start}:{self.kind}:{self.mode}:{self.number}"


@attrs.frozen
class Result:
    operation: str
    """The first that failed; nothing: there are not so many."""
    told: dict[str, int]
    images: int = 0
    error: str = ""


def run_case(case: Case) -> Result:
    kind = KINDS[case.kind]
    injector = Injector(kind, case.number, MODES[case.mode])
    files, witness = starts(case.workload)[case.start].copy(injector)
    images = 0

    def run() -> None:
        nonlocal images
        play(partial(WORKLOADS[case.workload].program, files, witness))
        if injector.failed:
            check(not injector.retried, "touched again after it had failed:", injector.retried)
            images = examine(files, witness)

    error = _report.found_in(run)
    if not injector.failed and not error:
        return Result("", {})
    first = injector.failed[0][0] if injector.failed else "none"
    return Result(first, dict(witness.told), images, error)


def examine(files: MemoryFiles, witness: Witness) -> int:
    """Open what is left, as it is and after crashes; returns how many images."""
    alive = files.crash_image(kind="kill")
    shown = _look_at(alive, witness, power_seeds=range(SEEDS))
    for seed in range(SEEDS):
        _look_at(files.crash_image(seed), witness)
    for path, lsn in witness.backups.items():
        _look_at_backup(alive, path, lsn, shown)
    return 1 + 2 * SEEDS


async def _tidied(files: MemoryFiles, witness: Witness, wal: WriteAheadLog) -> None:
    """The one fault is over: what could not be removed goes."""
    injector = witness.injector
    if injector.times == 1 and injector.failed and wal.statistics().state == "open":
        await trio.sleep(10)
        _check_tidy(files, wal.statistics().segments, spares=1)


def _check_tidy(files: MemoryFiles, segments: int, spares: int = 0) -> None:
    """Nothing is left lying that could not be removed at first."""
    names = set(files.names(LOG)) - {"log.meta", "log.meta.tmp", "consumers.json"}
    others = [name for name in names if not name.startswith("wal-")]
    check(len(names) - len(others) == segments, f"{segments} segments, and {sorted(names)}")
    check(len(others) <= spares, f"left lying: {sorted(others)}")


def _look_at(
    files: MemoryFiles, witness: Witness, power_seeds: Iterable[int] = ()
) -> dict[int, bytes]:
    shown: dict[int, bytes] = {}
    images: list[MemoryFiles] = []

    async def main() -> None:
        if files.exists(DB):
            async with open_db(files, retention=KeepAll()) as db:
                shown.update(await witness.examine_database(db))
                images.extend(files.crash_image(seed) for seed in power_seeds)
            return
        async with open_log(files) as wal:
            async with wal.read() as records:
                found = [record async for record in records]
            shown.update((record.lsn, record.data) for record in found)
            witness.examine(wal.first_lsn, shown)
            times = [record.timestamp for record in found]
            check(times == sorted(times), "the times of records go back")
            segments = wal.statistics().segments
            images.extend(files.crash_image(seed) for seed in power_seeds)

        _check_tidy(files, segments)

    trio.run(main)
    for image in images:
        again = _look_at(image, witness)
        check(again == shown, "what an open had shown is gone after the loss of power")
    return shown


def _look_at_backup(files: MemoryFiles, path: str, lsn: int, shown: dict[int, bytes]) -> None:
    async def main() -> None:
        async with trio_wal.open_database(path, files=files) as db:
            check(db.durable_lsn == lsn, f"{path} is of LSN {db.durable_lsn}, not {lsn}")
            shared, _, _ = db.get(SHARED, b"").partition(AFTER)
            check(shared == shown.get(lsn), f"{path} has not the state of LSN {lsn}")

    if lsn in shown:
        trio.run(main)


# -- the campaign -------------------------------------------------------------------


@attrs.frozen
class Loop:
    """The cases of one n after the other, until there are no more."""

    case: Case
    stride: int


def run_loop(loop: Loop) -> _report.Answer:
    rows: dict[tuple[str, str], Counter[str]] = {}
    failures: list[tuple[object, str]] = []
    for number in itertools.count(loop.case.number, loop.stride):
        case = attrs.evolve(loop.case, number=number)
        result = run_case(case)
        if not result.operation:
            break
        row = rows.setdefault((result.operation, case.kind), Counter())
        row.update((case.workload, case.mode))
        row["images"] += result.images
        row["unnoticed"] += not result.told
        row.update({SHOWN[name]: count for name, count in result.told.items()})
        if result.error:
            row["false"] += 1
            failures.append((case, f"{case}, {result.operation}: {result.error}"))
    return _report.Answer(1, loop.case.workload, rows, failures)


def first_cases(
    workloads: Iterable[str], kinds: Iterable[str] = KINDS, modes: Iterable[str] = MODES
) -> list[Case]:
    """Of each loop."""
    return [
        Case(name, start, kind, mode, 0)
        for name in workloads
        for start in range(WORKLOADS[name].moments or 1)
        for kind in kinds
        for mode in modes
    ]


def loops(arguments: argparse.Namespace) -> list[Loop]:
    """All of them; with a stride each begins at another n."""
    stride = arguments.stride
    found = [
        Loop(attrs.evolve(case, number=(place + arguments.seed) % stride), stride)
        for place, case in enumerate(first_cases(arguments.parts or PARTS))
    ]
    # Where the time is too short for all of them, some of each kind are done.
    random.Random(arguments.seed).shuffle(found)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stride", type=int, default=1, metavar="N", help="every N-th operation only"
    )
    parser.add_argument("--replay", metavar="CASE", help="one case again")
    _report.add_common_arguments(parser, parts=WORKLOADS)


SHOWN: Final = {
    "LogFailedError: unknown": "unknown",
    "LogFailedError: not written": "not written",
    "LogFullError": "full",
    "OSError": "OSError",
    "ClosedResourceError": "closed",
}
"""What callers were told, and the column in which it is counted."""


def run(arguments: argparse.Namespace) -> int:
    report = _report.Report(
        "errors",
        arguments,
        {"operation": "operation", "error": "error"}
        | {mode: mode for mode in MODES}
        | {column: f"told: {column}" for column in SHOWN.values()}
        | {"unnoticed": "no effect", "images": "images", "false": "FALSE"},
    )
    todo = loops(arguments)
    figures, seconds = _report.collect(report, run_loop, todo, len(todo))
    columns = (*MODES, *SHOWN.values(), "unnoticed", "images", "false")
    every: Counter[str] = Counter()
    for (operation, kind), row in sorted(figures.items()):
        report.add(operation=operation, error=kind, **{name: row[name] for name in columns})
        every.update(row)
    kinds = f"{len(KINDS)} kinds"
    report.add(operation="all", error=kinds, **{name: every[name] for name in columns})
    cases = {name: every[name] for name in WORKLOADS if every[name]}
    total, images = sum(cases.values()), every["images"]
    report.note(
        f"{total:,} faults, {images:,} images opened afterwards; "
        f"{_report.per_minute(total, seconds):,} faults a minute; "
        + ", ".join(f"{name} {count:,}" for name, count in cases.items())
    )
    return report.finish()


def replay(text: str) -> int:
    name, start, kind, mode, number = text.split(":")
    case = Case(name, int(start), kind, mode, int(number))
    result = run_case(case)
    print(f"{case}: {result.operation or 'no such operation'} failed; told: {result.told}")
    print(result.error or "nothing false")
    return 1 if result.error else 0
