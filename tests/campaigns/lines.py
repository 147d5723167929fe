"""Storms on the lines of a queue: what waits, whose turn it is, and what each writer counts.

Law: a storm makes one call, cancels one, lets the disk do one sync, or opens or closes a writer,
and then looks, when nothing moves any more.  What it looks for is written down without the
package's own arithmetic:

  * no limit is exceeded, and the counters of every writer are those of its calls;
  * in each line it is first come, first served, and nobody normal passes one who waits;
  * whoever waits is kept out by something: the queue's bound, the reserve, the line's own share;
  * lines that wait throughout are served alike, in records; high priority first, one in nine not;
  * at the end the log holds what was acknowledged, nothing that was cancelled, line by line in
    order.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from typing import Any, Final

import attrs
import trio
from helpers import LOG, Call
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal.testing import MemoryFiles

from . import _report
from ._promises import check
from ._simulator import seeded_run

EVENTS: Final = 150
UNIT_MAX: Final = 5
PASSED_MAX: Final = 8
"""As the contract says."""
SHARE: Final = 20
"""Storms of one task for a worker process."""


@attrs.define(eq=False)
class Item:
    """One call and what it carries."""

    line: Line
    datas: list[bytes]
    call: Call | None = None
    """None: it was a ``send_nowait``."""
    sends: bool = False
    flying: bool = False
    was_blocked: bool = False

    @property
    def bytes(self) -> int:
        return sum(map(len, self.datas))


@attrs.define(eq=False)
class Line:
    """A writer, or the log itself, as the storm knows it."""

    name: str
    to: Any
    manager: Any = None
    high: bool = False
    max_records: float = math.inf
    max_bytes: float = math.inf
    pending: list[Item] = attrs.Factory(list)
    """Accepted and not yet written, and behind them those that stand in line."""
    blocked: int = 0
    """How many these are."""
    waited: int = 0
    rejected: int = 0
    told: list[bytes] = attrs.Factory(list)
    """What must be in the log, in this order."""
    units: float = 0.0
    """How often a call has several records."""

    @property
    def waiting(self) -> list[Item]:
        accepted = self.pending[: len(self.pending) - self.blocked]
        return [item for item in accepted if not item.flying]

    @property
    def records(self) -> int:
        return sum(len(item.datas) for item in self.waiting)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.waiting)

    @property
    def head(self) -> Item | None:
        return self.pending[-self.blocked] if self.blocked else None

    def ready(self) -> bool:
        """Whether somebody stands here whom the line's own share does not keep out."""
        head = self.head
        return head is not None and (
            not self.records
            or (
                self.records + len(head.datas) <= self.max_records
                and self.bytes + head.bytes <= self.max_bytes
            )
        )


class Storm:
    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.files = MemoryFiles(seed=seed)
        self.size = rng.choice((2, 3, 5, 10))
        self.max_bytes = rng.choice((math.inf, 400))
        self.reserve = rng.choice((0.0, 0.1, 0.5, 0.9))
        self.units = rng.random() < 0.5
        self.weights = rng.choice(((60, 12, 16, 4, 2), (60, 3, 20, 3, 1), (70, 0, 12, 2, 0)))
        """Of what happens: calls, cancellations, syncs, writers that come, and that go."""
        self.lines: list[Line] = []
        self.number = itertools.count()
        self.pairs: dict[tuple[Line, Line], int] = {}
        """Of normal lines that have both waited since: by how many records one is ahead."""
        self.since_normal = 0
        """Records of high priority let in while normal lines waited throughout."""
        self.spoken: list[Item] = []

    # -- what there is --

    @property
    def main(self) -> Line:
        return self.lines[0]

    @property
    def kept(self) -> tuple[float, float]:
        """What is kept for high priority: records, bytes."""
        if not self.reserve or not any(line.high for line in self.open_lines):
            return 0, 0
        size = min(math.ceil(round(self.size * self.reserve, 6)), self.size - 1)
        if self.max_bytes == math.inf:
            return size, 0
        return size, min(math.ceil(round(self.max_bytes * self.reserve, 6)), self.max_bytes - 1)

    @property
    def open_lines(self) -> list[Line]:
        return [line for line in self.lines if line.to is not None]

    def fits(self, item: Item, *, reserve: bool) -> bool:
        records = sum(line.records for line in self.lines)
        size = sum(line.bytes for line in self.lines)
        kept = (0, 0) if reserve else self.kept
        return not records or (
            records + len(item.datas) <= self.size - kept[0]
            and size + item.bytes <= self.max_bytes - kept[1]
        )

    # -- what happens --

    async def run(self) -> None:
        options = {
            "max_queue_size": self.size, "max_queue_bytes": self.max_bytes,
            "reserve": self.reserve, "flush_interval": 0,
        }  # fmt: skip
        async with trio_wal.open_wal(LOG, files=self.files, **options) as wal:
            self.wal = wal
            self.lines.append(Line("the log", wal, units=self._units()))
            self.files.after_operation = lambda operation, path: (
                operation == "sync" and self.files.hold()
            )
            self.files.hold()
            async with trio.open_nursery() as nursery:
                self.nursery = nursery
                try:
                    for _ in range(EVENTS):
                        await self._event()
                    await self._end()
                finally:
                    self.files.after_operation = None
                    self.files.release()
                    nursery.cancel_scope.cancel()
            for line in self.open_lines[1:]:
                await line.manager.__aexit__(None, None, None)

    async def _event(self) -> None:
        (what,) = self.rng.choices(
            (self._call, self._cancel, self._step, self._open, self._close), self.weights
        )
        before = {line: line.ready() for line in self.open_lines}
        blocked = {line: line.blocked for line in self.open_lines}
        heads = {line: list(line.pending[-line.blocked :]) for line in before if line.blocked}
        came = await what()
        await wait_all_tasks_blocked()
        self._look(came)
        self._check()
        self._check_turns(before, blocked, heads, came)

    def _units(self) -> float:
        return self.rng.choice((0.0, 0.2, 0.9)) if self.units else 0.0

    async def _call(self) -> Item | None:
        rng = self.rng
        # Some are greedy: their lines are full for long.
        line = rng.choice(self.open_lines[:2] * 3 + self.open_lines)
        count = rng.randint(2, UNIT_MAX) if rng.random() < line.units else 1
        datas = [b"%d:" % next(self.number) + bytes(rng.choice((0, 3, 90))) for _ in range(count)]
        item = Item(line, datas)
        if count == 1 and rng.random() < 0.2:
            crowded = any(one.ready() for one in self.open_lines)
            fits = self.fits(item, reserve=line.high)
            try:
                line.to.send_nowait(datas[0])
            except trio.WouldBlock:
                line.rejected += 1
                return None
            wrong = not line.high and (crowded or not fits)
            check(not wrong, f"{line.name}: send_nowait found room that there was not")
            item.sends = True
        elif count > 1:
            item.call = Call(self.nursery, line.to.append_many, datas)
        elif rng.random() < 0.3:
            item.call, item.sends = Call(self.nursery, line.to.send, datas[0]), True
        else:
            item.call = Call(self.nursery, line.to.append, datas[0])
        line.pending.append(item)
        return item

    async def _cancel(self) -> None:
        calls = [item for line in self.lines for item in line.pending if item.call is not None]
        calls = [item for item in calls if item.call and item.call.state == "waiting"]
        if calls:
            call = self.rng.choice(calls).call
            assert call is not None
            call.scope.cancel()

    async def _step(self) -> None:
        """One sync, of what is being written."""
        if not self.spoken:
            return
        for line in self.lines:
            for item in line.waiting:
                item.flying = True
        # Those that were flying before are written now.
        for line in self.lines:
            written = [item for item in line.pending if item in self.spoken]
            line.pending = [item for item in line.pending if item not in self.spoken]
            for item in written:
                line.told += item.datas
        self.spoken = [item for line in self.lines for item in line.pending if item.flying]
        self.files.release()

    async def _open(self) -> None:
        if len(self.open_lines) > 5:
            return
        rng = self.rng
        line = Line(f"writer {len(self.lines)}", None, units=self._units())
        line.high = rng.random() < 0.3
        options: dict[str, Any] = {"priority": "high" if line.high else "normal"}
        if rng.random() < 0.4:
            line.max_records = options["max_queue_size"] = rng.randint(1, self.size)
        if rng.random() < 0.2:
            line.max_bytes = options["max_queue_bytes"] = 120
        line.manager = self.wal.writer(line.name, **options)
        line.to = await line.manager.__aenter__()
        self.lines.append(line)

    async def _close(self) -> None:
        if len(self.open_lines) < 2:
            return
        line = self.rng.choice(self.open_lines[1:])
        self._check_counters(line)
        await line.manager.__aexit__(None, None, None)
        line.to = None

    # -- what is seen --

    def _look(self, came: Item | None) -> None:
        """Who is where now: in each line those that stand there are the last."""
        whole = self.wal.statistics()
        rest = whole.tasks_waiting_send
        for line in self.lines:
            gone = [
                item
                for item in line.pending
                if item.call is not None and item.call.state in ("cancelled", "raised")
            ]
            for item in gone:
                assert item.call is not None
                closed = isinstance(item.call.error, trio.ClosedResourceError)
                check(closed or item.call.error is None, f"{line.name}: {item.call.error!r}")
                line.pending.remove(item)
        for line in self.lines[1:]:
            seen = whole.writers.get(line.name)
            line.blocked = seen.tasks_waiting_send if seen is not None else 0
            rest -= line.blocked
        self.main.blocked = rest
        for line in self.lines:
            check(0 <= line.blocked <= len(line.pending), f"{line.name}: {line.blocked} blocked")
            for item in line.pending[len(line.pending) - line.blocked :]:
                if not item.was_blocked:
                    item.was_blocked = True
                    line.waited += 1
        if not self.spoken:
            # The disk had nothing to do: what came is being written.
            self.spoken = [item for line in self.lines for item in line.waiting]
            for item in self.spoken:
                item.flying = True

    def _check_counters(self, line: Line) -> None:
        seen = line.to.statistics()
        told = (
            seen.records_waiting, seen.bytes_waiting, seen.backpressure_waits, seen.rejected,
            seen.records_appended, seen.bytes_appended,
        )  # fmt: skip
        own = (
            line.records, line.bytes, line.waited, line.rejected,
            len(line.told), sum(map(len, line.told)),
        )  # fmt: skip
        check(told == own, f"{line.name} counts {told}, it is {own}")
        waits = sum(count for _, count in seen.backpressure_seconds_histogram)
        check(waits == line.waited - line.blocked, f"{line.name}: {waits} waits in its histogram")

    def _check(self) -> None:
        whole = self.wal.statistics()
        records = sum(line.records for line in self.lines)
        size = sum(line.bytes for line in self.lines)
        seen = (whole.records_waiting, whole.bytes_waiting)
        check(seen == (records, size), f"the queue counts {seen}, it is {(records, size)}")
        waited = sum(line.waited for line in self.lines)
        check(whole.backpressure_waits == waited, f"{whole.backpressure_waits} waits: {waited}")
        alone = sum(len(line.waiting) for line in self.lines) <= 1
        check(
            alone or (records <= self.size and size <= self.max_bytes),
            "the queue is over its bound",
        )
        for line in self.open_lines[1:]:
            self._check_counters(line)
            alone = len(line.waiting) <= 1
            fine = line.records <= line.max_records and line.bytes <= line.max_bytes
            check(alone or fine, f"{line.name} is over its share")
        ready = [line for line in self.open_lines if line.ready()]
        heads = [(line, head) for line in ready if (head := line.head) is not None]
        kept_out = [line for line, head in heads if not self.fits(head, reserve=line.high)]
        check(
            not ready or bool(kept_out),
            "somebody waits, and there is room for whoever's turn it is",
        )

    def _check_turns(
        self,
        before: dict[Line, bool],
        blocked: dict[Line, int],
        heads: dict[Line, list[Item]],
        came: Item | None,
    ) -> None:
        """Of lines that were ready before this event, and are still."""
        served: dict[Line, int] = {}
        for line, items in heads.items():
            let_in = [item for item in items if item in line.waiting or item.flying]
            served[line] = sum(len(item.datas) for item in let_in)
        throughout = {line for line in before if before[line] and line.ready()}
        if came is not None and not came.line.high and came in came.line.waiting:
            check(not any(before.values()), "somebody normal has passed those who wait")
        normal = [line for line in throughout if not line.high]
        for pair in [pair for pair in self.pairs if not set(pair) <= set(normal)]:
            del self.pairs[pair]
        most = 2 * (UNIT_MAX if self.units else 1) + 1
        for one, other in itertools.combinations(sorted(normal, key=self.lines.index), 2):
            more = served.get(one, 0) - served.get(other, 0)
            self.pairs[one, other] = ahead = self.pairs.get((one, other), 0) + more
            check(abs(ahead) <= most, f"{one.name} is {ahead} records ahead of {other.name}")
        self._check_priority(served, throughout, before, came)

    def _check_priority(
        self,
        served: dict[Line, int],
        throughout: set[Line],
        before: dict[Line, bool],
        came: Item | None,
    ) -> None:
        high = sum(count for line, count in served.items() if line.high)
        if came is not None and came.line.high and came in came.line.waiting:
            high += len(came.datas)
        normal = sum(count for line, count in served.items() if not line.high)
        if any(line.high for line in throughout):
            turns = (high // PASSED_MAX + 1) * (UNIT_MAX if self.units else 1)
            check(normal <= turns, f"{normal} normal records came before high ones, with {high}")
        waits = any(not line.high for line in throughout)
        self.since_normal = self.since_normal + high if waits and not normal else 0
        most = PASSED_MAX - 1 + UNIT_MAX
        check(self.since_normal <= most, f"{self.since_normal} high records past those who wait")

    async def _end(self) -> None:
        while any(line.pending for line in self.lines):
            await self._step()
            await wait_all_tasks_blocked()
            self._look(None)
            self._check()
        self.files.after_operation = None
        self.files.release()
        await self.wal.flush()
        found: list[bytes] = []
        async with self.wal.read() as records:
            found += [record.data async for record in records]
        for line in self.lines:
            mine = set(line.told)
            got = [data for data in found if data in mine]
            check(got == line.told, f"{line.name}: the log has {len(got)} of {len(line.told)}")
        told = sum(len(line.told) for line in self.lines)
        check(len(found) == told, f"{len(found)} records in the log, {told} acknowledged")


def run_case(seed: int) -> None:
    """Raises what is found."""
    seeded_run(Storm(seed).run, seed=seed)


def found_in(seed: int) -> str:
    return _report.found_in(run_case, seed)


# -- the campaign -------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replay", metavar="SEED", help="one storm again")
    _report.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    return _report.run_seeds("lines", arguments, run_case, SHARE, "storms")


def replay(text: str) -> int:
    return _report.replay_seed(run_case, text)
