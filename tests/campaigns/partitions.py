"""Networks cut between three real NATS servers and those who write into them (Linux, as root).

Law: each server and each writer is in a network namespace of its own, and its process knows nothing
of it; what was said to the writers stands in the books of `_promises`.  Nothing acknowledged is
lost or doubled; nothing is acknowledged without a majority; nobody waits longer than is documented.
``--count`` is of cuts; each has a log, or a database, of its own.

Parts: ``cuts``, and ``controls``: a stream with one replica, whose cut must be found to acknowledge
without a majority, and a writer that takes any answer for "yes", which must be found to be given
LSNs that are another's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any, Final

import attrs
import nats_cluster
import trio
from nats_writers import heal, leader

import trio_wal

from . import _networks, _remote
from ._networks import Network, between
from ._promises import Promises, Record
from ._remote import Job
from ._report import (
    Bar,
    Report,
    add_common_arguments,
    bound,
    described,
    progress_bar,
    replay_command,
)

PARTS = ("cuts", "controls")
KINDS = ("log", "database")
SERVERS: Final = ("n0", "n1", "n2")
CLIENTS: Final = ("here", "there")

CUT_SECONDS: Final = 15.0
SETTLE_SECONDS: Final = 2.0
"""What was decided before a cut may be told so much later."""
UNAVAILABLE_SECONDS: Final = 30.0
"""The documented time after which a log is called unavailable."""
SHORT_SECONDS: Final = 6.0
"""The same, in the cut that is to be longer."""
GRACE_SECONDS: Final = 10.0
"""More than that a machine may need; who waits longer, hangs."""
START_SECONDS: Final = 300.0
"""For a process to begin, on a busy machine."""
GOAL_SECONDS: Final = 12.0
"""Without an acknowledgement, while a majority is there."""
BEFORE: Final = 40
"""Acknowledgements before a cut, and after it."""
SLOW_BITS: Final = 1_000_000

COLUMNS = {
    "series": "cut",
    "runs": "cuts",
    "acknowledged": "acknowledged",
    "absent": "called absent",
    "unknown": "unknown",
    "lost": "lost",
    "doubled": "doubled",
    "minority": "by a minority",
    "gap": "longest gap s",
    "again": "after healing s",
    "bound": "bound",
}


class Found(Exception):
    """A promise that was broken."""


@attrs.frozen
class Sides:
    """Who is who in a cut."""

    leader: str
    others: tuple[str, str]
    """The other servers."""
    here: str
    """The writer that the log belongs to."""
    chance: Random


Ways = set[tuple[str, str]]


@attrs.frozen(kw_only=True)
class Kind:
    """A way to cut a network."""

    ways: Callable[[Sides], Ways]
    goes_on: bool | None
    """Whether the writer is to be acknowledged meanwhile; None: it depends."""
    taken: bool = False
    """Whether somebody else takes the log over, on the other side."""
    slow: bool = False
    flaps: bool = False
    unavailable_after: float = UNAVAILABLE_SECONDS
    replicas: int = 3
    believing: bool = False
    must_find: str = ""
    """Of a control: what must be found."""


def _minority(sides: Sides) -> Ways:
    return between([sides.leader, sides.here], sides.others)


def _deaf(sides: Sides) -> Ways:
    return {(one, sides.leader) for one in (*sides.others, sides.here)}


def _mute(sides: Sides) -> Ways:
    return {(one, two) for two, one in _deaf(sides)}


def _apart(_: Sides) -> Ways:
    return {way for one, other in combinations(SERVERS, 2) for way in between([one], [other])}


def _some(sides: Sides) -> Ways:
    ways = sorted(between(SERVERS, [*SERVERS, sides.here]))
    return set(sides.chance.sample(ways, sides.chance.randrange(1, len(ways) // 2)))


CUTS: Final = {
    "leader": Kind(ways=lambda s: between([s.leader], s.others), goes_on=True),
    "minority": Kind(ways=_minority, goes_on=False),
    "taken": Kind(ways=_minority, goes_on=False, taken=True),
    "client": Kind(ways=lambda s: between([s.here], [s.leader]), goes_on=True),
    "deaf": Kind(ways=_deaf, goes_on=True),
    "mute": Kind(ways=_mute, goes_on=True),
    "bridge": Kind(ways=lambda s: between([s.leader], s.others[:1]), goes_on=None),
    "follower": Kind(
        ways=lambda s: between(s.others[:1], [s.leader, s.others[1], s.here]), goes_on=True
    ),
    "apart": Kind(ways=_apart, goes_on=False),
    "unavailable": Kind(ways=_minority, goes_on=False, unavailable_after=SHORT_SECONDS),
    "slow": Kind(ways=lambda _: set(), goes_on=True, slow=True),
    "flapping": Kind(ways=_some, goes_on=None, flaps=True),
}
CONTROLS: Final = {
    "one replica": Kind(
        ways=_minority, goes_on=False, replicas=1, must_find="acknowledged by a minority"
    ),
    "believing": Kind(
        ways=_minority, goes_on=None, taken=True, believing=True, must_find="was given to"
    ),
}


# -- a writer, and what it says --------------------------------------------------------


class Writer:
    """A process of `_remote`, at a place of the network."""

    def __init__(self, job: Job, told: Told, enter: Callable[[], None], grace: float) -> None:
        def begin() -> None:
            nats_cluster.end_with_parent()
            enter()

        self.job = job
        self.grace = grace
        self.times: list[float] = []
        """Of its acknowledgements."""
        self.events: list[tuple[str, float]] = []
        """What else it has said: that a log was opened, or has failed."""
        self.ended = False
        self._told = told
        self._errors = Path(job.folder) / f"{job.writer}.errors"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "campaigns._remote", json.dumps(attrs.asdict(job))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                preexec_fn=begin,  # noqa: PLW1509  (calls to the system)
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )

    async def listen(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        async with trio.lowlevel.FdStream(os.dup(self._process.stdout.fileno())) as stream:
            async for chunk in stream:
                *lines, rest = (rest + bytes(chunk)).split(b"\n")
                for line in lines:
                    self._hear(*json.loads(line))
        self.ended = True

    def _hear(self, what: str, *words: Any) -> None:
        if what in ("acknowledged", "absent", "unknown"):
            self._told.hear(what, *words[:-1])
        else:
            self.events.append((" ".join(map(str, (what, *words[:-1]))), words[-1]))
        if what == "acknowledged":
            self.times.append(words[-1])

    def said(self, what: str) -> list[float]:
        """When it has said so."""
        return [at for text, at in self.events if text.startswith(what)]

    async def wait_for(self, count: int, after: float, seconds: float) -> float:
        """Until so many are acknowledged after a moment; gives the seconds to the first."""
        with trio.move_on_after(START_SECONDS):
            while not self.events and not self.ended:  # noqa: ASYNC110
                await trio.sleep(0.02)
        with trio.move_on_after(seconds):
            while sum(at > after for at in self.times[-count:]) < count:
                if self.ended:
                    break
                await trio.sleep(0.02)
            else:
                return min(at for at in self.times if at > after) - after
        raise Found(
            f"{self.job.writer}: a hang: not {count} acknowledged in {seconds:.0f} s; "
            f"it said {self.events[-3:]}, {self._errors.read_text()[-500:]}"
        )

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with trio.move_on_after(self.job.unavailable_after + self.grace):
            while not self.ended or self._process.poll() is None:  # noqa: ASYNC110
                await trio.sleep(0.02)
        if self._process.poll() is None:
            raise Found(f"{self.job.writer}: a hang: it does not end")
        if self._process.returncode:
            raise Found(f"{self.job.writer} has failed: {self._errors.read_text()[-1000:]}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Told:
    """The books of one log."""

    def __init__(self) -> None:
        self.promises = Promises()
        self.figures: Counter[str] = Counter()
        self.acknowledged: dict[int, Record] = {}

    def hear(self, what: str, task: str, number: int, lsn: int = 0) -> None:
        self.figures[what] += 1
        records = self.promises.submit(task, f"{task}.{number}".encode())
        if what == "acknowledged":
            self.promises.acknowledge(records, lsn)
            self.acknowledged[lsn] = records[0]
        elif what == "absent":
            self.promises.withdraw(records, "it was called absent")

    def judge(self, first_lsn: int, found: list[tuple[int, bytes]]) -> None:
        keys = dict(found)
        self.figures["lost"] += sum(
            keys.get(lsn) != record.key for lsn, record in self.acknowledged.items()
        )
        self.figures["doubled"] += sum(count - 1 for count in Counter(keys.values()).values())
        self.promises.expect(found, first_lsn)

    def judge_state(self, found: list[tuple[int, bytes]], state: dict[bytes, bytes]) -> None:
        """Each transaction has counted the ones before it, and nothing else is there."""
        expected: dict[bytes, bytes] = {}
        for _, key in found:
            mine = _remote.COUNT + key.rpartition(b".")[0]
            expected[mine] = b"%d" % (int(expected.get(mine, b"0")) + 1)
            expected[key] = expected[mine]
        if state != expected:
            wrong = [key for key in {*state, *expected} if state.get(key) != expected.get(key)]
            raise Found(f"the state is not that of the log, in {sorted(wrong)[:3]}")


# -- one cut ---------------------------------------------------------------------------


@attrs.define(eq=False)
class Case:
    """One cut of one kind, and what came of it."""

    network: Network
    cluster: nats_cluster.Cluster
    folder: Path
    name: str
    kind: str
    cut: Kind
    seed: int
    grace: float = GRACE_SECONDS
    told: Told = attrs.Factory(Told)
    gap: float = 0.0
    again: float = 0.0

    async def run(self) -> None:
        self.folder.mkdir(parents=True)
        job = self._job("here", self.cluster.urls)
        # The log is made first, so that the writer can be with the server that leads it.
        async with trio_wal.open_wal(job.log()):
            pass
        leading = await leader(self.cluster, job.log())
        urls = sorted(self.cluster.urls, key=lambda url: url != leading.url)
        others = [name for name in SERVERS if name != leading.name]
        chance = Random(self.seed)
        chance.shuffle(others)
        sides = Sides(leading.name, (others[0], others[1]), "here", chance)
        writers: list[Writer] = []
        try:
            async with trio.open_nursery() as nursery:

                def start(place: str) -> Writer:
                    enter = self.network.enter(place)
                    writer = Writer(self._job(place, urls), self.told, enter, self.grace)
                    writers.append(writer)
                    nursery.start_soon(writer.listen)
                    return writer

                await self._cut(sides, start)
                for writer in writers:
                    await writer.stop()
        finally:
            for writer in writers:
                writer.kill()
        await self._judge(job)

    def _job(self, place: str, urls: list[str]) -> Job:
        return Job(
            kind=self.kind,
            servers=urls,
            monitors=self.cluster.monitors,
            name=self.name,
            writer=place,
            folder=str(self.folder),
            seed=self.seed,
            replicas=self.cut.replicas,
            unavailable_after=self.cut.unavailable_after,
            # Who has lost the log to the other side would take it back.
            reopens=not (self.cut.taken and place == "here"),
            believing=self.cut.believing and place == "here",
        )

    async def _cut(self, sides: Sides, start: Callable[[str], Writer]) -> None:
        cut, network = self.cut, self.network
        here = owner = start("here")
        limit = UNAVAILABLE_SECONDS + self.grace
        await here.wait_for(BEFORE, 0.0, limit)
        began = time.monotonic()
        if cut.slow:
            network.slow_down(SERVERS, SLOW_BITS)
        network.cut(cut.ways(sides))
        try:
            if cut.taken:
                owner = start("there")
                await owner.wait_for(BEFORE, began, limit)
            await self._stay_cut(sides, began)
        finally:
            network.heal()
            if cut.slow:
                network.speed_up(SERVERS)
        healed = time.monotonic()
        self.again = await owner.wait_for(BEFORE, healed, limit)
        self._judge_times(here, owner, began, healed)
        if cut.taken and not cut.believing:
            await self._wait_fenced(here)

    async def _stay_cut(self, sides: Sides, began: float) -> None:
        while (left := began + CUT_SECONDS - time.monotonic()) > 0:
            if not self.cut.flaps:
                await trio.sleep(left)
                continue
            await trio.sleep(min(left, sides.chance.uniform(0.1, 3)))
            self.network.heal()
            await trio.sleep(sides.chance.uniform(0, 1))
            self.network.cut(self.cut.ways(sides))

    def _judge_times(self, here: Writer, owner: Writer, began: float, healed: float) -> None:
        cut, told = self.cut, self.told
        during = [at for at in here.times if began + SETTLE_SECONDS < at < healed]
        if cut.goes_on is False:
            told.figures["minority"] += len(during)
            if during:
                raise Found(f"{len(during)} acknowledged by a minority")
        times = [began, *(at for at in owner.times if at > began)]
        if cut.goes_on is not False:
            self.gap = max(then - now for now, then in pairwise(times))
        if cut.unavailable_after == SHORT_SECONDS:
            failed = [at for at in here.said("failed LogUnavailableError") if at > began]
            if not failed or min(failed) > began + SHORT_SECONDS + self.grace:
                raise Found(f"not called unavailable in time: {here.events}")

    async def _wait_fenced(self, writer: Writer) -> None:
        with trio.move_on_after(UNAVAILABLE_SECONDS + self.grace):
            while not writer.said("failed"):  # noqa: ASYNC110
                await trio.sleep(0.02)
        # Where the machine was so slow that the cut lasted longer than a log waits, it has said so.
        told = writer.said("failed LogFencedError not written")
        if not told and not writer.said("failed LogUnavailableError"):
            raise Found(f"{writer.job.writer} was not fenced: {writer.events}")

    async def _judge(self, job: Job) -> None:
        first_lsn, found = await _remote.found_by(job)
        self.told.judge(first_lsn, found)
        if self.kind == "database":
            state = await _remote.state_of(job, str(self.folder / "new"))
            self.told.judge_state(found, state)


# -- the campaign ----------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, count=2 * len(CUTS), workers=False, parts=PARTS)
    parser.add_argument("--only", choices=list(CUTS), help="cuts of one kind")
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_SECONDS,
        help="seconds over the documented ones, on a busy machine (%(default)s)",
    )
    parser.add_argument("--replay", metavar="KIND:CUT:SEED", help="one cut again")


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """(kind, cut, seed) of each; the controls first: without them the rest says nothing."""
    if "controls" in (arguments.parts or PARTS) and not arguments.only:
        yield from (("log", name, arguments.seed) for name in CONTROLS)
    if "cuts" in (arguments.parts or PARTS):
        names = [arguments.only] if arguments.only else list(CUTS)
        for number in range(arguments.count):
            kind = KINDS[number // len(names) % 2]
            yield kind, names[number % len(names)], arguments.seed + number


def why_not() -> str | None:
    return nats_cluster.missing() or _networks.why_not()


class Campaign:
    """The network, the servers in it, and the figures."""

    def __init__(self, report: Report, folder: Path, seed: int) -> None:
        self.report = report
        self._grace = getattr(report.arguments, "grace", GRACE_SECONDS)
        self._folder = folder
        self._numbers = iter(range(1 << 30))
        self._network = Network((*SERVERS, *CLIENTS))
        places = [(self._network.address(name), self._network.enter(name)) for name in SERVERS]
        self.cluster = nats_cluster.Cluster(folder / "servers", 3, seed=seed, places=places)
        self.rows: dict[str, Counter[str]] = {}
        self.times: dict[str, tuple[float, float]] = {}

    def run(self, kind: str, name: str, seed: int) -> str:
        """One cut; gives what was found, or nothing."""
        cut = CUTS.get(name) or CONTROLS[name]
        number = next(self._numbers)
        case = Case(
            network=self._network,
            cluster=self.cluster,
            folder=self._folder / f"{number}",
            name=f"cut-{number}",
            kind=kind,
            cut=cut,
            seed=seed,
            grace=self._grace,
        )
        wrong = ""
        try:
            heal(self.cluster)
            trio.run(case.run)
        except KeyboardInterrupt:
            raise
        except BaseException as exc:  # noqa: BLE001, ASYNC103  (a finding, or several)
            wrong = described(exc)
        figures = case.told.figures
        figures["runs"] += 1
        figures["slower"] += case.gap > GOAL_SECONDS
        self.rows.setdefault(name, Counter()).update(figures)
        gap, again = self.times.get(name, (0.0, 0.0))
        self.times[name] = max(gap, case.gap), max(again, case.again)
        if cut.must_find:
            if cut.must_find not in wrong:
                return f"the control {name!r} was not found out: {wrong or 'nothing was found'}"
            self.report.note(f"control {name!r}, as it must be: {wrong[:150]}")
            return ""
        return wrong

    def finish(self) -> int:
        for name, figures in self.rows.items():
            cells: dict[str, Any] = {column: figures[column] for column in COLUMNS}
            gap, again = self.times[name]
            shown = {"gap": f"{gap:.1f}" if gap else "", "again": f"{again:.1f}"}
            self.report.add(**{**cells, "series": name, **shown, "bound": bound(figures["runs"])})
        if slower := sum(figures["slower"] for figures in self.rows.values()):
            told = f"{slower} times nothing was acknowledged for more than {GOAL_SECONDS:.0f} s"
            self.report.note(f"{told} while a majority was there")
        return self.report.finish()


def _run(report: Report, chosen: list[tuple[str, str, int]], seed: int, bar: Bar) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        campaign = Campaign(report, Path(temporary), seed)
        try:
            campaign.cluster.start()
            for kind, name, number in chosen:
                if bar.over():
                    break
                wrong = campaign.run(kind, name, number)
                if wrong:
                    case = f"'{kind}:{name}:{number}'"
                    report.find(wrong, replay_command("partitions", "--replay", case))
                bar.advance(1, f"{kind}, {name}: {wrong or 'nothing found'}")
        finally:
            campaign.cluster.stop()
        return campaign.finish()


def run(arguments: argparse.Namespace) -> int:
    report = Report("partitions", arguments, COLUMNS)
    if (reason := why_not()) is not None:
        report.note(f"skipped: {reason}")
        return report.finish()
    chosen = list(cases(arguments))
    with progress_bar("partitions", minutes=arguments.minutes, count=len(chosen)) as bar:
        return _run(report, chosen, arguments.seed % 40 + 51, bar)


def replay(case: str) -> int:
    kind, name, seed = case.split(":")
    if kind not in KINDS or name not in (*CUTS, *CONTROLS):
        raise ValueError(case)
    report = Report("partitions", None, COLUMNS)
    if (reason := why_not()) is not None:
        report.note(f"skipped: {reason}")
        return report.finish()
    with progress_bar("partitions", count=1) as bar:
        return _run(report, [(kind, name, int(seed))], 51, bar)
