"""Random histories, and an independent oracle that must be able to explain every one of them.

Many tasks run random transactions: reads, scans, writes of all kinds, with pauses at random
places, aborts and cancellations, beside checkpoints, failing checkpoints, a disk that
stalls, snapshots and change feeds.  Every step is written down with what it returned.

The oracle knows nothing of the database.  It replays the committed transactions in LSN
order on a plain dict, each as a whole, step by step, and every step must return what was
written down: the history is then serializable in LSN order, reads of absent keys and
empty ranges included.  A transaction that wrote nothing, or was not committed, must fit
as a whole between two commits; one that returned also where real time allows it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from databases import TINY_SEGMENT, Home, State, after, commits_of
from trio._core import _run
from trio.testing import MockClock

from trio_wal import (
    Database,
    KeepAll,
    KeyExistsError,
    LogFullError,
    Transaction,
    TransactionConflict,
)

KEYS = [b"%02d" % number for number in range(24)]


# -- what happened -----------------------------------------------------------------


@attrs.define(eq=False)
class Step:
    """One call in a transaction, and what it gave: a value, or the name of an error."""

    call: str
    arguments: tuple[Any, ...]
    result: Any = None


@attrs.define(eq=False)
class Attempt:
    """One transaction, however it ended."""

    steps: list[Step] = attrs.Factory(list)
    returned_before: int = 0
    """The highest LSN whose commit had returned when this one began."""
    outcome: str = "not begun"
    lsn: int | None = None

    @property
    def writes(self) -> dict[bytes, bytes | None]:
        """What it wrote in the end."""
        found: dict[bytes, bytes | None] = {}
        for step in self.steps:
            if step.result is None and step.call in ("put", "insert", "update"):
                found[step.arguments[0]] = step.arguments[1]
            elif step.result is None and step.call == "delete":
                found[step.arguments[0]] = None
        return found


@attrs.define(eq=False)
class History:
    attempts: list[Attempt] = attrs.Factory(list)
    snapshots: list[tuple[int, int, int, State]] = attrs.Factory(list)
    """(its LSN, the highest LSN returned before, the durable one after, content)"""
    returned: int = 0
    """The highest LSN whose commit has returned."""


# -- the oracle --------------------------------------------------------------------


class Wrong(AssertionError):
    """The oracle has no explanation."""


def check_history(history: History, log: dict[int, dict[bytes, bytes | None]]) -> None:
    """``log``: what every LSN wrote, as read back from the database's log."""
    states: list[State] = [{}]
    assert list(log) == list(range(1, len(log) + 1))
    for writes in log.values():
        states.append(_apply(states[-1], writes))
    last = len(log)
    # What a full disk takes back may have been read by who is refused for it later.
    taken_back = any(attempt.outcome == "full" for attempt in history.attempts)
    committed = {}
    for attempt in history.attempts:
        if attempt.outcome == "committed" and attempt.writes:
            assert attempt.lsn is not None
            if attempt.lsn in committed:
                raise Wrong(f"two transactions have LSN {attempt.lsn}")
            committed[attempt.lsn] = attempt
            if log.get(attempt.lsn) != attempt.writes:
                raise Wrong(f"LSN {attempt.lsn}: {log.get(attempt.lsn)}, not {attempt.writes}")
            if attempt.lsn <= attempt.returned_before:
                raise Wrong(f"LSN {attempt.lsn} began after {attempt.returned_before} returned")
            _replay(states[attempt.lsn - 1], attempt)
        elif attempt.outcome == "committed" or not taken_back:
            # At which moments it could have been.  A read-only one that returned saw all that
            # was returned before it began and nothing that was not durable when it ended.
            end = last
            if attempt.outcome == "committed":
                assert attempt.lsn is not None
                end = attempt.lsn
            _fits_somewhere(states[attempt.returned_before : end + 1], attempt)
    if set(committed) != set(log):
        raise Wrong(f"in the log without a transaction: {set(log) - set(committed)}")
    for lsn, returned_before, durable_after, content in history.snapshots:
        if not returned_before <= lsn <= durable_after:
            raise Wrong(f"a snapshot at {lsn}, between {returned_before} and {durable_after}")
        if content != states[lsn]:
            raise Wrong(f"a snapshot at {lsn}: {content}, not {states[lsn]}")


def _apply(state: State, writes: dict[bytes, bytes | None]) -> State:
    state = dict(state)
    for key, value in writes.items():
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value
    return state


def _fits_somewhere(states: list[State], attempt: Attempt) -> None:
    errors = []
    for state in states:
        try:
            _replay(state, attempt)
        except Wrong as exc:
            errors.append(exc)
        else:
            return
    raise Wrong(f"{attempt} fits nowhere: {errors}")


def _replay(state: State, attempt: Attempt) -> None:
    """The transaction alone, on a plain dict: every step gives what it gave then."""
    state = dict(state)
    for step in attempt.steps:
        expected = _OPERATIONS[step.call](state, *step.arguments)
        if expected != step.result:
            raise Wrong(f"{step}: expected {expected!r} of {attempt}")


def _delete(state: State, key: bytes) -> str | None:
    return "KeyError" if state.pop(key, None) is None else None


def _insert(state: State, key: bytes, value: bytes) -> str | None:
    if key in state:
        return "KeyExistsError"
    state[key] = value
    return None


def _update(state: State, key: bytes, value: bytes) -> str | None:
    if key not in state:
        return "KeyError"
    state[key] = value
    return None


def _scan(
    state: State,
    start: bytes | None,
    stop: bytes | None,
    reverse: bool,
    limit: int | None,
    taken: int | None,
) -> list[tuple[bytes, bytes]]:
    """``taken``: so many items were looked at, and then the scan was left."""
    found = sorted(
        (
            item
            for item in state.items()
            if (start is None or item[0] >= start) and (stop is None or item[0] < stop)
        ),
        reverse=reverse,
    )
    return found[:limit][:taken]


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "get": lambda state, key: state.get(key),
    "contains": lambda state, key: key in state,
    "put": lambda state, key, value: state.update({key: value}),
    "delete": _delete,
    "insert": _insert,
    "update": _update,
    "scan": _scan,
}


# -- the tasks ---------------------------------------------------------------------


@attrs.define(eq=False)
class Workload:
    """Random transactions of many tasks, and trouble beside them."""

    db: Database
    rng: random.Random
    seconds: float
    """Longest pause."""
    keys: list[bytes]
    history: History = attrs.Factory(History)
    counts: Counter[str] = attrs.Factory(Counter)
    _running: dict[trio.CancelScope, Attempt] = attrs.Factory(dict)
    _tags: Iterator[int] = attrs.Factory(lambda: iter(range(10**9)))

    async def pause(self) -> None:
        if self.rng.random() < 0.5:
            await trio.sleep(self.rng.random() * self.seconds)
        else:
            await trio.lowlevel.checkpoint()

    async def task(self, transactions: int) -> None:
        for _ in range(transactions):
            attempt = Attempt(returned_before=self.history.returned)
            self.history.attempts.append(attempt)
            with trio.CancelScope() as scope:
                self._running[scope] = attempt
                await self.attempt(attempt)
            del self._running[scope]

    async def attempt(self, attempt: Attempt) -> None:
        history = self.history
        try:
            async with self.db.transaction() as tx:
                # Where it waited to begin, more may have returned.
                attempt.returned_before = history.returned
                attempt.outcome = "aborted"
                for _ in range(self.rng.randint(1, 6)):
                    await self.step(tx, attempt)
                    if self.rng.random() < 0.4:
                        await self.pause()
                if self.rng.random() < 0.1:
                    tx.abort()
                else:
                    attempt.outcome = "cancelled"
            if attempt.outcome == "cancelled":
                attempt.outcome, attempt.lsn = "committed", tx.lsn
                if attempt.writes:
                    assert tx.lsn is not None
                    history.returned = max(history.returned, tx.lsn)
        except TransactionConflict:
            attempt.outcome = "conflict"
        except LogFullError:
            attempt.outcome = "full"
        finally:
            self.counts[attempt.outcome] += 1

    async def step(self, tx: Transaction, attempt: Attempt) -> None:
        rng = self.rng
        key, tag = rng.choice(self.keys), b"%d" % next(self._tags)
        call = rng.choices(
            ("get", "contains", "scan", "put", "insert", "update", "delete"), (6, 1, 3, 3, 2, 2, 2)
        )[0]
        if call == "scan":
            await self.scan(tx, attempt)
            return
        step = Step(call, (key,) if call in ("get", "contains", "delete") else (key, tag))
        attempt.steps.append(step)
        try:
            if call == "contains":
                step.result = key in tx
            else:
                step.result = getattr(tx, call)(*step.arguments)
        except (KeyError, KeyExistsError) as exc:
            step.result = type(exc).__name__

    async def scan(self, tx: Transaction, attempt: Attempt) -> None:
        rng = self.rng
        start, stop = (rng.choice([None, *self.keys, b"035", b"9"]) for _ in range(2))
        reverse = rng.random() < 0.5
        limit = rng.choice((None, None, 0, 1, 3))
        taken = rng.choice((None, None, 1, 2))
        found: list[tuple[bytes, bytes]] = []
        slow = rng.random() < 0.3
        items = tx.scan(start, stop, reverse=reverse, limit=limit)
        for item in islice(items, taken):
            found.append(item)
            if slow:
                await self.pause()
        attempt.steps.append(Step("scan", (start, stop, reverse, limit, taken), found))
        if rng.random() < 0.5:
            # Left early and let go; otherwise it stays open until the end.
            del items

    async def cancel(self) -> None:
        """Cancels transactions, most of them while they are committed."""
        while True:
            await self.pause()
            committing = [s for s, a in self._running.items() if a.outcome == "cancelled"]
            scopes = committing if self.rng.random() < 0.9 else [*self._running]
            if scopes and self.rng.random() < 0.5:
                self.rng.choice(scopes).cancel()

    async def look(self) -> None:
        """Snapshots, taken and read slowly."""
        while True:
            await self.pause()
            returned = self.history.returned
            with self.db.snapshot() as snap:
                durable = self.db.durable_lsn
                content: State = {}
                for key, value in snap.scan(reverse=self.rng.random() < 0.5):
                    content[key] = value
                    if self.rng.random() < 0.2:
                        await self.pause()
                assert all(snap.get(key) == content.get(key) for key in self.keys)
                self.history.snapshots.append((snap.lsn, returned, durable, content))

    async def follow(self, seen: list[int]) -> None:
        async with self.db.changes() as commits:
            async for commit in commits:
                seen.append(commit.lsn)  # noqa: PERF401  (seen before the end)

    async def checkpoints(self) -> None:
        while True:
            for _ in range(self.rng.randint(1, 15)):
                await self.pause()
            with trio.CancelScope() as scope:
                if self.rng.random() < 0.2:
                    scope.deadline = trio.current_time() + self.rng.random() * self.seconds
                try:
                    await self.db.checkpoint()
                except OSError:
                    self.counts["failed checkpoint"] += 1

    async def run(self, tasks: int, transactions: int, *others: Callable[[], Any]) -> None:
        """To the end; then the oracle."""
        seen: list[int] = []
        async with trio.open_nursery() as background:
            for other in (self.look, self.look, self.checkpoints, self.cancel, *others):
                background.start_soon(other)
            background.start_soon(self.follow, seen)
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(self.task, transactions)
            while len(seen) < self.db.durable_lsn:
                await self.pause()
            background.cancel_scope.cancel()
        commits = await commits_of(self.db, 1)
        assert seen == [commit.lsn for commit in commits]
        log = {commit.lsn: {op.key: op.value for op in commit.operations} for commit in commits}
        check_history(self.history, log)
        assert dict(self.db.scan()) == after({}, commits)
        # One that is refused may be cancelled before it is told.
        assert self.db.statistics().conflicts >= self.counts["conflict"]
        assert self.db.statistics().open_readers == 0


# -- the tests ---------------------------------------------------------------------


@pytest.mark.parametrize("first_seed", range(0, 12, 3))
async def test_every_random_history_in_memory_has_a_serial_explanation(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, first_seed: int
) -> None:
    monkeypatch.setattr(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    totals: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + 3):
        _run._r.seed(seed)
        try:
            totals += await run_history_in_memory(seed)
        except BaseException:
            print(f"seed {seed}")
            raise
    assert totals["committed"] > 400
    assert totals["conflict"] > 200
    assert totals["aborted"] > 50
    assert totals["cancelled"] > 10
    assert totals["failed checkpoint"] > 3
    assert totals["checkpoints"] > 20


async def run_history_in_memory(seed: int) -> Counter[str]:
    rng = random.Random(seed)
    home = Home(None)
    files = home.files
    assert files is not None

    async def disk() -> None:
        """Stalls now and then, has failing checkpoints, and in some histories is full at times."""
        try:
            while True:
                await trio.sleep(rng.random() * 0.03)
                files.hold()
                await trio.sleep(rng.random() * 0.05)
                if rng.random() < 0.3:
                    files.fail("store")
                if seed % 3 == 0:
                    files.free_bytes = rng.choice((0, 1e9, 1e9))
                files.release()
        finally:
            files.heal()
            files.release()

    options = {
        "checkpoint_bytes": rng.choice((300, 2000, 10**6)),
        "max_queue_size": rng.choice((2, 10_000)),
        "segment_size": rng.choice((TINY_SEGMENT, 10**6)),
    }
    async with home.open(retention=KeepAll(), **options) as db:
        workload = Workload(db, rng, 0.02, KEYS[: rng.choice((6, 12, 24))])
        await workload.run(12, 40, disk)
        final = dict(db.scan())
        workload.counts["checkpoints"] = db.statistics().checkpoints
    async with home.open() as db:
        assert dict(db.scan()) == final
    return workload.counts


@pytest.mark.parametrize("seed", range(2))
async def test_every_random_history_on_real_files_has_a_serial_explanation(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    home = Home(tmp_path)
    async with home.open(
        retention=KeepAll(), checkpoint_bytes=(3000, 10**6)[seed % 2], segment_size=20_000
    ) as db:
        workload = Workload(db, rng, 0.001, KEYS[:12])
        await workload.run(12, 15)
        assert workload.counts["committed"] > 30
        final = dict(db.scan())
    async with home.open() as db:
        assert dict(db.scan()) == final


# -- the oracle itself -------------------------------------------------------------


def attempt(outcome: str, lsn: int | None, *steps: tuple[Any, ...], before: int = 0) -> Attempt:
    """``steps``: (call, *arguments, result)."""
    return Attempt(
        [Step(call, tuple(arguments), result) for call, *arguments, result in steps],
        returned_before=before,
        outcome=outcome,
        lsn=lsn,
    )


A, B, ONE, TWO = b"1", b"2", b"one", b"two"
ALL = (None, None, False, None, None)

GOOD: dict[str, tuple[list[Attempt], dict[int, dict[bytes, bytes | None]]]] = {
    "one after the other": (
        [
            attempt("committed", 1, ("get", A, None), ("put", A, ONE, None)),
            attempt("committed", 2, ("get", A, ONE), ("put", A, TWO, None), ("get", A, TWO)),
        ],
        {1: {A: ONE}, 2: {A: TWO}},
    ),
    "a reader before the writer": (
        [
            attempt("committed", 1, ("put", A, ONE, None)),
            attempt("committed", 1, ("scan", *ALL, [])),
        ],
        {1: {A: ONE}},
    ),
    "what was aborted": (
        [attempt("aborted", None, ("put", A, ONE, None), ("scan", *ALL, [(A, ONE)]))],
        {},
    ),
}

BAD: dict[str, tuple[list[Attempt], dict[int, dict[bytes, bytes | None]]]] = {
    "a lost update": (
        [
            attempt("committed", 1, ("get", A, None), ("put", A, ONE, None)),
            attempt("committed", 2, ("get", A, None), ("put", A, TWO, None)),
        ],
        {1: {A: ONE}, 2: {A: TWO}},
    ),
    "write skew by a phantom": (
        [
            attempt("committed", 1, ("scan", *ALL, []), ("put", A, ONE, None)),
            attempt("committed", 2, ("scan", *ALL, []), ("put", B, ONE, None)),
        ],
        {1: {A: ONE}, 2: {B: ONE}},
    ),
    "a torn read": (
        [
            attempt("committed", 1, ("put", A, ONE, None), ("put", B, ONE, None)),
            attempt("committed", 1, ("get", A, ONE), ("get", B, None)),
        ],
        {1: {A: ONE, B: ONE}},
    ),
    "a torn read of one that was refused": (
        [
            attempt("committed", 1, ("put", A, ONE, None), ("put", B, ONE, None)),
            attempt("conflict", None, ("get", A, None), ("get", B, ONE)),
        ],
        {1: {A: ONE, B: ONE}},
    ),
    "a stale read": (
        [
            attempt("committed", 1, ("put", A, ONE, None)),
            attempt("committed", 1, ("get", A, None), before=1),
        ],
        {1: {A: ONE}},
    ),
    "a read that returned too early": (
        [
            attempt("committed", 1, ("put", A, ONE, None)),
            attempt("committed", 0, ("get", A, ONE)),
        ],
        {1: {A: ONE}},
    ),
    "a commit that is not in the log": ([attempt("committed", 1, ("put", A, ONE, None))], {}),
    "a commit of something else": (
        [attempt("committed", 1, ("put", A, ONE, None))],
        {1: {A: TWO}},
    ),
    "what was cancelled is in the log": (
        [attempt("cancelled", None, ("put", A, ONE, None))],
        {1: {A: ONE}},
    ),
    "an order against real time": (
        [
            attempt("committed", 2, ("put", A, ONE, None)),
            attempt("committed", 1, ("put", B, ONE, None), before=2),
        ],
        {1: {B: ONE}, 2: {A: ONE}},
    ),
}


@pytest.mark.parametrize("case", GOOD.values(), ids=GOOD)
def test_the_oracle_explains(
    case: tuple[list[Attempt], dict[int, dict[bytes, bytes | None]]],
) -> None:
    check_history(History(case[0]), case[1])


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_the_oracle_has_no_explanation_for(
    case: tuple[list[Attempt], dict[int, dict[bytes, bytes | None]]],
) -> None:
    with pytest.raises(Wrong):
        check_history(History(case[0]), case[1])
