"""Programs on files in memory, crashed at every operation, and every image recovered.

Law: one process, no threads, no real clock but for the budget: the same workload and seed
do the same, to the last byte.  What may be found is the oracle's to say.

A workload runs once, under trio with a virtual clock and a seeded scheduler.  After each of
its operations on the files the images that a crash may leave are built: one of a killed
process, which also tells the oracle what was written, and several of a power loss, by seed.
Each is recovered by the package's own recovery and read back; of an image that was recovered
before, to the last byte, and of a file in it, what was made of it then is taken (see
`_remembered`).  Of some the recovery itself is crashed at each of its operations, and of some
of those once more, three deep; some are recovered twice, some written to and opened again.
"""

from __future__ import annotations

import logging
import math
import random
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar
from unittest import mock

import attrs
import trio
from helpers import read_all
from trio.testing import MockClock

import trio_wal
from trio_wal._disk import directory, frame, spares
from trio_wal._operations import decode_transaction
from trio_wal.testing import MemoryFiles

from ._images import (
    DB,
    LOG,
    Recovered,
    append_after,
    fingerprint,
    is_reused,
    places_in,
    recover_database,
    recover_log,
    replayed,
)
from ._promises import Promises, State, Wrong, anything, apply
from ._remembered import Memory
from ._report import Report, bound, in_processes, per_minute, progress_bar, replay_command

# A broken log says so; here logs are broken by the thousand.
logging.getLogger("trio_wal").addHandler(logging.NullHandler())

T = TypeVar("T")

ENDS = {
    "lost": "lost",
    "partial": "partial",
    "other": "other",
    "per_minute": "per minute",
    "bound": "3/N",
}
"""Last columns of a table of results."""
FINDINGS_MAX = 10
"""So many, and a campaign ends: the rest is most likely the same."""
POWER_IMAGES = 6
"""Damage seeds of an operation; fewer where little can be damaged."""
NESTED_IMAGES = 2
NESTED_DEPTH = 3
NESTED_EVERY = 300
"""Of every so many images the recovery is crashed at each of its operations."""
DEEPER_EVERY = 12
FOLLOWED_EVERY = 6
"""Of every so many images the recovery is repeated, or the log written to."""
RECOVERED_MAX = 500
"""Recovered images that are kept, for when the same one is found again."""
FORGETS_EVERY = 20
"""Every so many recoveries are made without what is remembered of their files."""
REOPENED_EVERY = 400
"""Every so many images are also opened by a whole program."""
REUSES = "reuse"
REUSES_EVERY = 2
"""In the programs of this workload, and in every so many of the others, dropped segments are used
again with the bytes that they have."""
VIRTUAL_SECONDS_MAX = 1e6
"""A program that has not ended by then hangs."""

Path = tuple[tuple[int, int], ...]
"""(operation, damage) of the crash, then of the crash of its recovery, and so on."""

TOLD: Path = ((0, 0),)
"""What no image showed: the program was told something wrong."""


@attrs.frozen
class Failure:
    what: str
    replay: str
    points: int
    """How many crash points it took."""
    kind: str = "other"


@attrs.define
class Result:
    """Sums of one or more simulations."""

    workload: str = ""
    runs: int = 0
    operations: int = 0
    points: int = 0
    """Crashes of the program: images recovered and checked."""
    images: int = 0
    """Distinct ones among them."""
    nested: int = 0
    """Crashes of a recovery, likewise."""
    deepest: int = 0
    reused: int = 0
    """Points at which the log ended in a segment that keeps the bytes of a dropped one."""
    lost: int = 0
    partial: int = 0
    other: int = 0
    first_failure: Failure | None = None

    def add(self, more: Result) -> None:
        for name in (
            "runs", "operations", "points", "images", "nested", "reused", "lost", "partial",
            "other",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(more, name))
        self.deepest = max(self.deepest, more.deepest)
        self.first_failure = self.first_failure or more.first_failure

    def fail(self, error: Exception, where: str, campaign: str, case: str) -> None:
        """Something is wrong; ``case`` is what ``--replay`` wants."""
        kind = error.kind if isinstance(error, Wrong) else "other"
        setattr(self, kind, getattr(self, kind) + 1)
        told = str(error) if isinstance(error, Wrong) else _trace(error)
        replay = replay_command(campaign, "--replay", case)
        points = self.points + self.nested
        self.first_failure = Failure(f"{where}: {told}", replay, points, kind)

    def found_by(self, part: Result) -> bool:
        """Add a part; whether it, or one before it, has found something, after so many points."""
        self.add(part)
        if failure := self.first_failure:
            points = self.points + self.nested
            self.first_failure = attrs.evolve(failure, points=points)
        return failure is not None

    def figures(self, seconds: float | None = None) -> dict[str, Any]:
        """A row of a table."""
        cases = self.points + self.nested
        figures = attrs.asdict(self, filter=attrs.filters.exclude("first_failure"))
        if seconds is not None:
            figures["per_minute"] = per_minute(cases, seconds)
        return {**figures, "bound": bound(cases)}

    def report_to(self, report: Report) -> int:
        """As the only finding, of a case that is run again."""
        if self.first_failure is not None:
            report.find(self.first_failure.what, self.first_failure.replay)
        return report.finish()


@attrs.frozen
class Workload:
    """A program for the simulator."""

    name: str
    session: Callable[[Any], Awaitable[None]]
    """One session: is given a `_workloads.LogWorld` or a `_workloads.DatabaseWorld`."""
    options: Callable[[random.Random], dict[str, Any]]
    """For `open_wal` or `open_database`."""
    database: bool = False
    fails: bool = False
    """In some sessions a sync fails, and the kernel takes its pages for clean: what was
    written can be read, and is not on the disk."""


@attrs.define
class Consumed:
    """How far a consumer is."""

    told: int = -1
    """Up to here it was told that all is acknowledged; -1: not even that it is there."""
    tried: int = 0
    """Up to here it has asked for it."""
    may_be_gone: bool = False
    """Whether it is being dropped."""


class _Found(Exception):
    """Something is wrong with an image."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(path, error)
        self.path = path
        self.error = error


def seeded_run(main: Callable[..., Awaitable[Any]], *args: object, seed: int) -> Any:
    """`trio.run` with a virtual clock, and the order of tasks from a seed."""
    return controlled_run(random.Random(seed), main, *args)


def controlled_run(rng: Any, main: Callable[..., Awaitable[Any]], *args: object) -> Any:
    """The same, with something in the place of trio's random numbers."""
    run: Any = trio._core._run
    with mock.patch.multiple(run, _ALLOW_DETERMINISTIC_SCHEDULING=True, _r=rng):
        return trio.run(main, *args, clock=MockClock(autojump_threshold=0))


@attrs.define(eq=False)
class Simulation:
    """One workload with one seed."""

    workload: Workload
    seed: int
    over: Callable[[], bool] = lambda: False
    """Asked before every operation: whether to stop."""
    only: Path | None = None
    """Crash nowhere else."""
    result: Result = attrs.Factory(Result)
    files: MemoryFiles = attrs.Factory(MemoryFiles)
    rng: random.Random = attrs.Factory(random.Random)
    options: dict[str, Any] = attrs.Factory(dict)
    promises: Promises = attrs.Factory(lambda: Promises(complete=True))
    quiet: bool = True
    """Nothing is looked at: between sessions, behind the crash of a session, at the end."""
    live: Any = None
    """The open `WriteAheadLog`."""
    states: list[State] = attrs.Factory(lambda: [{}])
    """State of a database after each LSN."""
    written_us: dict[int, int] = attrs.Factory(dict)
    """When the record of this LSN was written, by the clock of then."""
    highest_first: int = 1
    """The highest first LSN of any image: the live log must come to it."""
    store_floor: int = 0
    """A checkpoint has returned this LSN."""
    consumers: dict[str, Consumed] = attrs.Factory(dict)
    alone: set[int] = attrs.Factory(set)
    """LSNs of a database's acknowledgements."""
    moves: set[bytes] = attrs.Factory(set)
    """Records that were to be such."""
    _operation: int = 0
    _crash_at: int = 0
    _fails_closing: bool = False
    _next: MemoryFiles | None = None
    _next_killed: bool = False
    _seen: set[tuple[int, bool]] = attrs.Factory(set)
    _seen_version: int = -1
    _images: set[int] = attrs.Factory(set)
    _recovered: dict[tuple[int, float] | None, Recovered] = attrs.Factory(dict)
    """By fingerprint and ``verify_bytes``."""
    _recoveries: int = 0
    _memory: Memory = attrs.Factory(Memory)
    _reopen: list[tuple[Path, MemoryFiles, Recovered, State]] = attrs.Factory(list)

    def run(self) -> Result:
        if self.workload.name == REUSES or not self.seed % REUSES_EVERY:
            # As between large frames, with a terminator that ends before its page does; and where a
            # segment has room for a few frames, retention comes before the next one is prepared.
            with (
                mock.patch.object(directory, "PREPARE_FROM", 0.8),
                mock.patch.object(spares, "REUSE_FRAMES_FROM", 0),
                mock.patch.object(frame, "TERMINATOR_ALIGN", frame.BLOCK),
            ):
                return self._run()
        return self._run()

    def _run(self) -> Result:
        self.result.workload = self.workload.name
        self.result.runs = 1
        self.rng = random.Random(f"{self.workload.name} {self.seed}")
        self.options = self.workload.options(self.rng)
        self.options.setdefault("segment_size", 1)
        self.files = MemoryFiles(seed=self.rng.getrandbits(32))
        if self.workload.database:
            # How much of its log a database may drop, its store says: see `_check_store`.
            self.promises.lets_go = anything
        try:
            for _ in range(self.rng.randint(2, 4)):
                self._session()
                if self.result.first_failure is not None or self.over() or self._is_replayed():
                    break
            for reopen in self._reopen:
                if self.result.first_failure is None:
                    self._check_whole(*reopen)
        finally:
            self.result.operations = self._operation
            self.result.images = len(self._images)
        return self.result

    def _is_replayed(self) -> bool:
        return self.only is not None and 0 < self.only[0][0] <= self._operation

    def _learn(self, found: Recovered) -> None:
        """An image shows all that was written: what of it is new."""
        for record in self.promises.learn(found.pairs):
            lsn = record.lsn or 0
            self.written_us[lsn] = self.files.time_us()
            if self.workload.database:
                del self.states[lsn:]
                state = dict(self.states[lsn - 1])
                writes = decode_transaction(dict(found.pairs)[lsn])
                apply(state, writes)
                self.states.append(state)
                # Whatever had this LSN before a crash is gone.
                self.alone.difference_update([known for known in self.alone if known >= lsn])
                if not writes:
                    self.alone.add(lsn)

    # -- sessions --

    def _session(self) -> None:
        rng = self.rng
        self.files.clock_offset_us += rng.choice((0, 0, 3600, -3600)) * 1_000_000
        self.files.after_operation = self._after_operation
        # Half of the sessions end in a crash, some of those while the log is being opened.
        crashes = rng.random() < 0.5
        self._crash_at = self._operation + rng.choice((rng.randint(1, 12), rng.randint(12, 150)))
        if not crashes:
            self._crash_at = 0
        self._next = None
        fails = self.workload.fails and rng.random() < 0.7
        if fails:
            self._crash_at = 0
            # A third of them while the log is being closed.
            self._fails_closing = rng.random() < 0.33
            if not self._fails_closing:
                self.files.fail("sync", after=rng.randint(0, 40))
        self.quiet = False
        try:
            seeded_run(self._guarded, seed=rng.getrandbits(32))
        except (OSError, trio_wal.LogFailedError) as exc:
            if not self.sync_failed():
                self.fail(exc, TOLD, "the program failed")
        except Exception as exc:  # noqa: BLE001  (whatever it is, it is a finding)
            self.fail(exc, TOLD, "the program failed")
        self.files.after_operation = None
        if fails and self.sync_failed() and not self.quiet:
            # The kernel lives on, and with it what it believes to be clean.
            self._next_killed = True
            # By a seed of its own: salts are never drawn twice.
            self._next = self.files.crash_image(self._damage_seed(POWER_IMAGES + 2), "kill")
        self.files.heal()
        self.live = None
        self._end_session()

    def closing(self) -> None:
        """The session's block is about to be left."""
        if self._fails_closing:
            self._fails_closing = False
            self.files.fail("sync", after=self.rng.choice((0, 0, 1)))

    def sync_failed(self) -> bool:
        """Whether the fault of this session has broken the log, or its opening."""
        broken = self.live is None or self.live.statistics().state == "failed"
        return self._fault_hit() and broken

    def _fault_hit(self) -> bool:
        return any(not fault.times for fault in self.files._faults)

    @contextmanager
    def tolerating_faults(self) -> Iterator[None]:
        """A call may fail where the fault of this session has struck."""
        try:
            yield
        except (trio_wal.LogFailedError, OSError):
            if not self._fault_hit():
                raise

    def _end_session(self) -> None:
        if self._next is None:
            self.tell(self._closed)
        self.quiet = True
        if self._next is not None and self.result.first_failure is None:
            self._resume(self._next)

    async def _guarded(self) -> None:
        with trio.fail_after(VIRTUAL_SECONDS_MAX):
            await self.workload.session(self)

    def _closed(self) -> None:
        """After a clean close: all is durable, and says so."""
        promises = self.promises
        if promises.unknown():
            raise Wrong("lost", "the log was closed, and a record was accepted and not written")
        promises.settle_durable(promises.last)
        image = self.files.crash_image(self._damage_seed(0), "power")
        found = self._recover(image, math.inf)
        self.result.points += 1
        self._check(found, killed=False)
        # Where the mark of an earlier close was never synced, and nothing written since, it
        # may be missing after a power loss; nothing else is.
        unclean = not found.log.report.clean_shutdown and not self.workload.fails
        if unclean or found.log.report.torn_bytes:
            raise Wrong("other", f"a clean close is not seen as one: {found.log.report}")

    def _resume(self, image: MemoryFiles) -> None:
        """The next session starts from a crash of this one."""
        self.files = image
        try:
            found = self._recover(image.crash_image(kind="kill"), math.inf)
            self._check(found, killed=self._next_killed)
            self.promises.crashed(found.pairs, found.first_lsn)
            places = places_in(found, database=self.workload.database)
            told = {name: one.told for name, one in self.consumers.items()}
            # What nobody was told may be gone until the log is open again.
            self.consumers = {name: Consumed(told[name], one.lsn) for name, one in places.items()}
            self.highest_first = found.first_lsn
        except Exception as exc:  # noqa: BLE001
            self.fail(exc, TOLD, "after the crash of a session")

    # -- what the workloads tell --

    def tell(self, fact: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Something was acknowledged, refused, withdrawn."""
        if self.quiet:
            return
        try:
            fact(*args, **kwargs)
            self.look_at_live()
        except Wrong as exc:
            self.fail(exc, TOLD, f"operation {self._operation}")

    def look_at_live(self) -> None:
        """What the open log itself says is durable, or dropped."""
        if self.live is not None:
            first_lsn = self.live.first_lsn
            self.promises.settle_durable(self.live.durable_lsn)
            if self.highest_first > first_lsn:
                raise Wrong(
                    "lost",
                    f"an image started at LSN {self.highest_first}, the log it was taken from "
                    f"still at {first_lsn}",
                )
            self.promises.raise_floor(first_lsn)

    def fail(self, error: Exception, path: Path, where: str) -> None:
        """The first thing that is wrong ends the simulation."""
        self.quiet = True
        if self.result.first_failure is not None:
            return
        steps = ":".join(f"{operation}.{damage}" for operation, damage in path)
        name = self.workload.name
        case = f"{name}:{self.seed}:{steps}"
        self.result.fail(error, f"{name}, seed {self.seed}, {where}", "crash", case)

    # -- crashes --

    def _after_operation(self, operation: str, path: str) -> None:
        if self.quiet:
            return
        self._operation += 1
        number = self._operation
        if self.over():
            self.quiet = True
            return
        try:
            if self.live is not None:
                self.promises.settle_durable(self.live.durable_lsn)
                self.promises.raise_floor(self.live.first_lsn)
            for damage in self._damages():
                self._crash(number, damage)
        except _Found as exc:
            self.fail(exc.error, exc.path, f"crash after {operation} {path}, operation {number}")
            return
        except Wrong as exc:
            self.fail(exc, TOLD, f"operation {number}")
            return
        if self.only is not None and number == self.only[0][0]:
            self.quiet = True
        elif number == self._crash_at:
            self._next_killed = self.rng.random() < 0.5
            kind: Any = "kill" if self._next_killed else "power"
            self._next = self.files.crash_image(self._damage_seed(POWER_IMAGES + 1), kind)
            self.quiet = True

    def _damages(self) -> range | tuple[int, ...]:
        """0 is the killed process; of a power loss no more than can differ."""
        if self.only is not None:
            return (0, self.only[0][1]) if self._operation == self.only[0][0] else (0,)
        unsynced = self._unsynced()
        return range(min(POWER_IMAGES, 2 ** min(unsynced, 4)) + 1 if unsynced else 1)

    def _unsynced(self) -> int:
        """How many sectors and directory operations a power loss may take."""
        total = 0
        for folder in self.files._folders.values():
            total += len(folder.pending)
            total += sum(len(inode.dirty) for inode in folder.names.values())
        return total

    def _damage_seed(self, damage: int) -> int:
        return (self.seed * 1_000_003 + self._operation) * 64 + damage

    def _crash(self, number: int, damage: int) -> None:
        kind: Any = "power" if damage else "kill"
        image = self.files.crash_image(self._damage_seed(damage), kind)
        print_of_image = fingerprint(image)
        if self._seen_version != self.promises.version:
            self._seen_version = self.promises.version
            self._seen.clear()
        key = (print_of_image, not damage)
        if key in self._seen:
            return
        self._seen.add(key)
        self._images.add(print_of_image)
        self.result.points += 1
        reused = is_reused(image)
        self.result.reused += reused
        path = ((number, damage),)
        mix = number * 31 + damage * 7 + self.seed
        try:
            found = self._one_image(
                image, path, mix, killed=not damage, learn=not damage, known_as=print_of_image
            )
            # While a log is being opened, the crash before may have left a torn batch; and in a
            # segment of zeros one may stay behind the mark of a close.
            settled = reused and self.live is not None and not self.workload.fails
            if settled and not damage and found.log.report.torn_bytes:
                raise Wrong("other", "no write was under way, and yet something is called torn")
        except _Found:
            raise
        except Exception as exc:
            raise _Found(path, exc) from exc
        if mix % REOPENED_EVERY == 3:
            again = self.files.crash_image(self._damage_seed(damage), kind)
            lsn = found.pairs[-1][0] if found.pairs else found.first_lsn - 1
            state = self.states[lsn] if self.workload.database else {}
            self._reopen.append((path, again, found, state))

    def _one_image(
        self,
        image: MemoryFiles,
        path: Path,
        mix: int,
        *,
        killed: bool,
        learn: bool,
        known_as: int | None = None,
    ) -> Recovered:
        """Recover, check, and do to some images what is done to some."""
        verify_bytes = math.inf if mix % 3 else 0
        every = DEEPER_EVERY if len(path) > 1 else NESTED_EVERY
        nests = len(path) < NESTED_DEPTH and mix % every == 0
        if nests:
            if learn:
                # What stands in the log must be known before its recovery is crashed.
                dry = self._recover(image.crash_image(kind="kill"), verify_bytes)
                self._check(dry, killed=killed, learn=True)
            self._crash_recovery(image, path, killed)
        follow = mix % FOLLOWED_EVERY
        fresh = nests or follow == 1
        found = self._recover(image, verify_bytes, fresh=fresh, known_as=known_as)
        self._check(found, killed=killed, learn=learn)
        image.after_operation = None
        if nests or follow < 2:
            expected = list(found.pairs)
            if follow == 1:
                expected.append(append_after(found.log))
            # All that a recovery has given out is durable, and stays so without a close.
            files: Any = found.log._files
            again = files.crash_image(mix, "power" if mix % 4 else "kill")
            second = self._recover(again, verify_bytes)
            if second.first_lsn != found.first_lsn or second.pairs != expected:
                raise Wrong(
                    "lost",
                    f"the second recovery found LSN {second.first_lsn} to {second.log.last_lsn}, "
                    f"the first {found.first_lsn} to {found.log.last_lsn}, "
                    f"{len(expected) - len(found.pairs)} appended",
                )
            # Without a write, the mark of a clean close may still be torn; and what stands
            # behind a mark that is whole was never acknowledged, and is not looked at.
            clean = found.log.report.clean_shutdown
            if follow == 1 and not clean and second.log.report.torn_bytes:
                raise Wrong("other", "the first recovery left something torn behind")
        return found

    def _crash_recovery(self, image: MemoryFiles, path: Path, killed: bool) -> None:
        """Have the recovery of this image crash at each of its operations."""
        moments = count(1)

        def crash(operation: str, where: str) -> None:
            moment = next(moments)
            for damage in range(NESTED_IMAGES + 1):
                deeper = (*path, (moment, damage))
                if self.only is not None and self.only[: len(deeper)] != deeper:
                    continue
                seed = hash(deeper) & 0xFFFF_FFFF
                again = image.crash_image(seed, "power" if damage else "kill")
                self.result.nested += 1
                self.result.deepest = max(self.result.deepest, len(deeper))
                mix = moment * 31 + damage * 7 + path[0][0]
                try:
                    self._one_image(again, deeper, mix, killed=killed and not damage, learn=False)
                except _Found:
                    raise
                except Exception as exc:
                    raise _Found(deeper, exc) from exc

        image.after_operation = crash

    # -- recovering and checking --

    def _recover(
        self,
        image: MemoryFiles,
        verify_bytes: float,
        *,
        fresh: bool = False,
        known_as: int | None = None,
    ) -> Recovered:
        """Of an image that was recovered before, to the last byte, what was found then.

        Args:
          fresh: what is found will be written to, or was looked at while it was recovered.
          known_as: the image's fingerprint, if it was taken already.
        """
        known = self._recovered
        key = None if fresh else (known_as or fingerprint(image), verify_bytes)
        if key in known:
            return known[key]
        self._recoveries += 1
        recover = recover_database if self.workload.database else recover_log
        found = recover(
            image,
            segment_size=self.options["segment_size"],
            verify_bytes=verify_bytes,
            memory=self._memory if self._recoveries % FORGETS_EVERY else None,
        )
        if key is not None:
            if len(known) >= RECOVERED_MAX:
                known.clear()
            known[key] = found
        return found

    def _check(self, found: Recovered, *, killed: bool, learn: bool = False) -> None:
        self.promises.expect(found.pairs, found.first_lsn, killed=killed, new=learn)
        if found.log.report.lost_lsn:
            raise Wrong("other", f"the recovery says that records are lost: {found.log.report}")
        self.highest_first = max(self.highest_first, found.first_lsn)
        if learn:
            self._learn(found)
        if self.workload.database:
            self._check_store(found)
        self._check_consumers(found)

    def _check_consumers(self, found: Recovered) -> None:
        places = places_in(found, database=self.workload.database)
        for name, consumed in self.consumers.items():
            place = places.get(name)
            if place is None:
                if consumed.told >= 0 and not consumed.may_be_gone:
                    raise Wrong("lost", f"consumer {name} is not there, but {consumed}")
            elif not consumed.told <= place.lsn <= consumed.tried:
                raise Wrong("lost", f"consumer {name} is at LSN {place.lsn}, but {consumed}")
            elif found.first_lsn > place.reach + 1:
                told = f"consumer {name} has yet to see what comes after LSN {place.reach}"
                raise Wrong("lost", f"{told}, and the log begins at {found.first_lsn}")
            elif not self.alone.issuperset(range(place.lsn + 1, place.reach + 1)):
                raise Wrong("lost", f"consumer {name}, at {place}, passes over commits")
        strange = places.keys() - self.consumers.keys()
        if strange:
            raise Wrong("other", f"nobody has made the consumers {strange}")

    def _check_store(self, found: Recovered) -> None:
        lsn, last_lsn = found.store_lsn, found.log.last_lsn
        if lsn < self.store_floor:
            told = f"a checkpoint had returned {self.store_floor}"
            raise Wrong("lost", f"the store holds LSN {lsn}, {told}")
        if not found.first_lsn - 1 <= lsn <= last_lsn:
            raise Wrong(
                "lost", f"the store ends at LSN {lsn}, the log has {found.first_lsn} to {last_lsn}"
            )
        wrong = [
            key
            for key in self.states[lsn].keys() | found.store_items.keys()
            if found.store_items.get(key) != self.states[lsn].get(key)
            and not self._ahead(key, found.store_items.get(key), lsn, last_lsn)
        ]
        if wrong:
            raise Wrong("partial", f"the store does not have the state at LSN {lsn} in {wrong}")
        if replayed(found) != self.states[last_lsn]:
            raise Wrong("partial", f"the recovered state is not that of LSN {last_lsn}")

    def _ahead(self, key: bytes, value: bytes | None, lsn: int, last_lsn: int) -> bool:
        """Whether a checkpoint that was interrupted may have put this into the store."""
        before = self.states[lsn].get(key)
        later = [state.get(key) for state in self.states[lsn + 1 : last_lsn + 1]]
        return value in later and value != before

    # -- opened by a whole program --

    def _check_whole(self, path: Path, image: MemoryFiles, found: Recovered, state: State) -> None:
        try:
            seeded_run(self._open_whole, image, found, state, seed=self.seed)
        except Exception as exc:  # noqa: BLE001
            self.fail(exc, path, "opened by a program")

    async def _open_whole(self, image: MemoryFiles, found: Recovered, state: State) -> None:
        lsn = found.pairs[-1][0] if found.pairs else found.first_lsn - 1
        if self.workload.database:
            async with trio_wal.open_database(DB, files=image, **self.options) as db:
                if (db.durable_lsn, dict(db.scan())) != (lsn, state):
                    raise Wrong("lost", f"open_database shows another state than that of LSN {lsn}")
                if await db.put(b"after", b"") != lsn + 1:
                    raise Wrong("other", "the next transaction has not the next LSN")
            again = recover_database(image, segment_size=self.options["segment_size"])
            if replayed(again) != {**state, b"after": b""}:
                raise Wrong("lost", "what was put after the crash is not there")
            return
        options = {**self.options, "retention": None}
        async with trio_wal.open_wal(LOG, files=image, **options) as wal:
            pairs = list((await read_all(wal)).items())
            if pairs != found.pairs or wal.last_lsn != lsn:
                raise Wrong("lost", "open_wal shows other records than the recovery")
            if await wal.append(b"after") != lsn + 1:
                raise Wrong("other", "the next record has not the next LSN")


def until_found(
    total: Result, parts: Iterable[Result], seconds: float | None, points: int | None
) -> Result:
    """Add parts until the budget is used up, or something is found."""
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    for part in parts:
        enough = points is not None and total.points + part.points >= points
        if total.found_by(part) or enough or time.monotonic() >= deadline:
            break
    return total


def report_results(
    report: Report,
    job: Callable[[T], Result],
    tasks: Iterable[T],
    minutes: float | None,
) -> int:
    """Results of tasks until the budget is used up or enough is found: a row of each workload,
    and of all."""
    arguments = report.arguments
    assert arguments is not None
    rows: dict[str, Result] = {}
    total = Result("all")
    with progress_bar(report.campaign, minutes=minutes, count=arguments.count) as bar:

        def over() -> bool:
            return bar.over() or len(report.findings) >= FINDINGS_MAX

        for result in in_processes(job, tasks, arguments.workers, over):
            rows.setdefault(result.workload, Result(result.workload)).add(result)
            total.add(result)
            if result.first_failure is not None:
                report.find(result.first_failure.what, result.first_failure.replay)
            note = f"{total.points:,} points, {total.nested:,} nested"
            bar.advance(result.points, f"{note}, {len(report.findings)} found")
        seconds = bar.seconds
    for row in (*rows.values(), total):
        report.add(**row.figures(seconds if row is total else None))
    return report.finish()


def _trace(error: BaseException) -> str:
    """What was raised and the places it passed, on one line."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = ", ".join(f"{place.name}:{place.lineno}" for place in frames)
    return f"{error!r} ({places})"


# -- the entry for campaigns --------------------------------------------------------


def run_points(
    seed: int,
    *,
    seconds: float | None = None,
    points: int | None = None,
    workload: str | None = None,
) -> Result:
    """Simulate, with seeds from ``seed`` on, until the budget is used up or something is found.

    Args:
      workload: one of `WORKLOADS`; None: all of them in turn.
    """
    from ._workloads import WORKLOADS

    names = list(WORKLOADS) if workload is None else [workload]
    total = Result(workload or "all")
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    limit = math.inf if points is None else points
    number = 0
    while total.points < limit and time.monotonic() < deadline:
        simulation = Simulation(WORKLOADS[names[number % len(names)]], seed + number // len(names))
        result = simulation.result
        before = total.points

        def over(before: int = before, result: Result = result) -> bool:
            return before + result.points >= limit or time.monotonic() >= deadline

        simulation.over = over
        if total.found_by(simulation.run()):
            break
        number += 1
    return total


def replay(case: str) -> Result:
    """One case again: ``WORKLOAD:SEED:OPERATION.DAMAGE[:OPERATION.DAMAGE...]``.

    Raises:
      ValueError: it is no such case.
    """
    from ._workloads import WORKLOADS

    name, seed, *steps = case.split(":")
    if name not in WORKLOADS or not steps:
        raise ValueError(f"no case: {case!r}; workloads are {', '.join(WORKLOADS)}")
    path = tuple((int(step.partition(".")[0]), int(step.partition(".")[2])) for step in steps)
    return Simulation(WORKLOADS[name], int(seed), only=path).run()
