"""Processes that read a log while its owner works, is killed, and opens it again.

Law: they judge only what one stream can tell (`_marks.Chain`), and report the rest: each
stream with the times at which it was begun, entered and ended.  They take no lock and never
stop because of an error: the next stream is begun.

Reports are lines of JSON, appended to a file that the campaign reads.  It asks, through a
pipe, whether every follower has come to the end of a log that stands still.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any, Final

import attrs
import trio

import trio_wal
from trio_wal import Bookmark, DatabaseReader, Snapshot

from . import _program
from ._marks import Chain, mark_of
from ._owner import HEAD, KEYS, SUM, Stream, now, sum_of
from ._promises import Wrong

FOLLOWERS: Final = 3
READERS: Final = 5
"""Streams of the first reader: eight together."""
NEWEST: Final = 40
PAUSES_SECONDS: Final = (0.003, 0.01, 0.03)
"""One of them is an onlooker's: how eagerly it reads."""
SLOW_SHARE: Final = 0.02
"""Of the records that a follower is slow with."""
PROGRAM_SHARE: Final = 0.01
"""Of tools that are run as programs of their own, which takes long."""
AWAY_SECONDS_MAX: Final = 0.6
AWAY_SHARE: Final = 0.15
"""Of followers that go on where they were left."""
SETTLE_SECONDS: Final = 20.0
"""So long a follower may take to the end of a log that stands still: that is no measure, only
what tells slow from never."""
REPORT: Final = "report"


@attrs.frozen(kw_only=True)
class Onlooker:
    """One process."""

    kind: str
    path: str
    """The log's directory."""
    seed: int
    report: str
    role: str
    """"readers", "streams": those on one reader only, "tools"."""
    command: int = -1
    """Descriptors of the pipes by which it is asked, and answers."""
    answer: int = -1
    pause: float


@attrs.frozen
class Handle:
    """An onlooker, as the campaign has it."""

    pid: int
    command: int
    answer: int

    def ask(self, last_lsn: int, history: int) -> str:
        """Wait until every follower is at the log's end; gives what is wrong."""
        os.write(self.command, json.dumps([last_lsn, history]).encode() + b"\n")
        if not select.select([self.answer], [], [], SETTLE_SECONDS + 10)[0]:
            return "the reading process does not answer"
        line = os.read(self.answer, 1 << 16)
        if not line:
            return "the reading process has ended"
        return str(json.loads(line))

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.command)
        os.close(self.answer)


def start(onlooker: Onlooker) -> Handle:
    """This process must have no other threads."""
    asked, command = os.pipe()
    answer, answered = os.pipe()
    job = attrs.evolve(onlooker, command=asked, answer=answered)

    def begin() -> None:
        signal.alarm(0)  # it lives as long as the campaign
        os.close(command)
        os.close(answer)

    pid = _program.fork(job, -1, begin, run)
    os.close(asked)
    os.close(answered)
    return Handle(pid, command, answer)


def run(onlooker: Onlooker, _: int) -> int:
    logging.disable()
    tell = _program.teller(os.open(onlooker.report, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    try:
        if onlooker.role == "tools":
            use_tools(onlooker, tell)
        else:
            trio.run(_Readers(onlooker, tell).run)
    except Exception as exc:  # noqa: BLE001  (told, and a finding)
        tell("strange", f"{_program.leaves(exc)}\n{traceback.format_exc()}")
    return 0


# -- a program that reads ------------------------------------------------------------------


class _Readers:
    def __init__(self, onlooker: Onlooker, tell: _program.Tell) -> None:
        self.onlooker = onlooker
        self.tell = tell
        self.followers: dict[str, Stream] = {}
        self.numbers = 0
        self.database: DatabaseReader | None = None

    def rng(self, who: object) -> Random:
        return Random(f"{self.onlooker.seed} reading {who}")

    def stream(self, who: str, kind: str, start: int | Bookmark | None, **more: Any) -> Stream:
        self.numbers += 1
        onlooker = self.onlooker
        database = onlooker.kind == "database"
        name = f"{who}.{self.numbers}"
        return Stream(self.tell, name, kind, onlooker.seed, start, database, **more)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.asked)
            nursery.start_soon(self.many_streams)
            if self.onlooker.role == "readers":
                nursery.start_soon(self.one_follower)
                nursery.start_soon(self.again_and_again)
                if self.onlooker.kind == "database":
                    nursery.start_soon(self.one_database_reader)
                    nursery.start_soon(self.databases_again_and_again)

    async def many_streams(self) -> None:
        """Eight streams on one reader that stays open."""
        async with (
            trio_wal.open_reader(self.onlooker.path) as reader,
            trio.open_nursery() as streams,
        ):
            for place in range(FOLLOWERS):
                streams.start_soon(self.follow, reader, f"follower {place} of eight")
            for place in range(READERS):
                streams.start_soon(self.read, reader, f"reader {place} of eight")

    async def one_follower(self) -> None:
        """One that has its reader to itself, which looks only when it does."""
        async with trio_wal.open_reader(self.onlooker.path) as reader:
            await self.follow(reader, "lone follower")

    async def again_and_again(self) -> None:
        """A reader of its own for each stream."""
        rng = self.rng("again")
        while True:
            try:
                async with trio_wal.open_reader(self.onlooker.path) as reader:
                    await self.read_once(reader, "new reader", rng)
            except Exception as exc:  # noqa: BLE001  (told, and a finding)
                self.tell("wrong", now(), "open_reader", _program.leaves(exc))
            await trio.sleep(rng.uniform(0, 3 * self.onlooker.pause))

    # -- the database, read --

    async def one_database_reader(self) -> None:
        """One that stays open."""
        path = os.path.dirname(self.onlooker.path)
        async with trio_wal.open_database_reader(path) as reader:
            self.database = reader
            await self.moments(reader, "database reader", math.inf)

    async def databases_again_and_again(self) -> None:
        path = os.path.dirname(self.onlooker.path)
        rng = self.rng("databases again")
        while True:
            who = "new database reader"
            try:
                async with trio_wal.open_database_reader(path) as reader:
                    await self.moments(reader, who, rng.randint(1, 50))
            except Exception as exc:  # noqa: BLE001  (told, and a finding)
                self.tell("wrong", now(), who, _program.leaves(exc))
            await trio.sleep(rng.uniform(0, 3 * self.onlooker.pause))

    async def moments(self, reader: DatabaseReader, who: str, count: float) -> None:
        """Look again and again; each time all of it must be of one moment."""
        rng = self.rng(who)
        last_lsn, number = 0, 0
        while number < count:
            number += 1
            try:
                with reader.snapshot() as snap:
                    wrong = self.wrong_moment(snap, who)
                    await trio.sleep(rng.uniform(0, self.onlooker.pause))
                    # Also after whatever has happened meanwhile.
                    wrong = wrong or self.wrong_moment(snap, who)
                if snap.lsn < last_lsn:
                    wrong = wrong or f"LSN {snap.lsn} was seen after {last_lsn}"
                last_lsn = snap.lsn
            except Exception as exc:  # noqa: BLE001  (told, and a finding)
                wrong = _program.leaves(exc)
            if wrong:
                self.tell("wrong", now(), who, wrong)
                return
            await trio.sleep(rng.uniform(0, self.onlooker.pause))

    def wrong_moment(self, snap: Snapshot, who: str) -> str:
        items = dict(snap.scan())
        head = items.get(HEAD)
        mark = None if head is None else mark_of(self.onlooker.seed, head)
        if mark is None:
            return "" if head is None and not snap.lsn else f"no head at LSN {snap.lsn}"
        self.tell("gave", now(), who, mark.lsn, mark.history)
        if mark.lsn != snap.lsn:
            return f"the head is of LSN {mark.lsn} at LSN {snap.lsn}"
        told, keys = int(items.get(SUM, b"0")), {k: v for k, v in items.items() if k[:4] == KEYS}
        if sum_of(keys.items()) != told:
            return f"at LSN {snap.lsn} keys are missing, or of another moment: {sorted(keys)}"
        differ = [key for key, value in items.items() if snap.get(key) != value]
        return f"at LSN {snap.lsn} get says otherwise of {differ}" if differ else ""

    async def follow(self, reader: Any, who: str) -> None:
        rng = self.rng(who)

        def pause() -> float | None:
            return rng.uniform(0, 0.01) if rng.random() < SLOW_SHARE else None

        start: int | Bookmark | None = None
        chain: Chain | None = None
        while True:
            count = rng.choice((rng.randint(1, 200), math.inf))
            stream = self.stream(who, "follow", start, count=count, pause=pause)
            stream.first_lsn = lambda: reader.first_lsn
            if start is not None and chain is not None:
                stream.chain = chain
            self.followers[who] = stream
            end = await stream.run(reader.follow)
            start, chain = stream.again(end), stream.chain
            # Where it stays away for long, the log may have been cut, more than once.
            away = AWAY_SECONDS_MAX if rng.random() < AWAY_SHARE else 0.01
            await trio.sleep(rng.uniform(0, away))

    async def read(self, reader: Any, who: str) -> None:
        rng = self.rng(who)
        while True:
            await self.read_once(reader, who, rng)
            await trio.sleep(rng.uniform(0, 2 * READERS * self.onlooker.pause))

    async def read_once(self, reader: Any, who: str, rng: Random) -> None:
        kind = rng.choice(("oldest", "random", "newest", "some"))
        try:
            start = None
            if kind != "oldest":
                before = now()
                first, last = reader.first_lsn, reader.durable_lsn
                self.tell("looked", before, now(), who, first, last)
                start = max(1, first)
                if kind == "random":
                    start = max(start, rng.randint(min(first, last), last))
                elif kind == "newest":
                    start = max(start, last - NEWEST + 1)
        except Exception as exc:  # noqa: BLE001  (told, and a finding)
            self.tell("wrong", now(), who, _program.leaves(exc))
            return
        if kind == "some":
            # A follower that leaves.
            stream = self.stream(who, "follow", start, count=rng.randint(1, 100))
            with trio.move_on_after(rng.uniform(0, 0.1)):
                await stream.run(reader.follow)
            return
        await self.stream(who, "read", start).run(reader.read)

    async def asked(self) -> None:
        stream = trio.lowlevel.FdStream(self.onlooker.command)
        rest = b""
        while chunk := await stream.receive_some():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                last_lsn, history = json.loads(line)
                answer = await self.at_end(last_lsn, history)
                os.write(self.onlooker.answer, json.dumps(answer).encode() + b"\n")

    async def at_end(self, last_lsn: int, history: int) -> str:
        """Wait for the followers; gives what is wrong with one."""

        def is_there(stream: Stream) -> bool:
            known = stream.chain.known
            return (
                stream.running
                and stream.entered > 0
                and stream.position == last_lsn
                and (known is None or not history or known.history == history)
            )

        with trio.move_on_after(SETTLE_SECONDS):
            while not all(map(is_there, self.followers.values())):  # noqa: ASYNC110  (no event)
                await trio.sleep(0.002)
            for stream in self.followers.values():
                stream._tell_given()
            if self.database is not None:
                await self.database.wait_for(last_lsn)
            return ""
        if self.database is not None and self.database.durable_lsn < last_lsn:
            return f"the database reader stands still at LSN {self.database.durable_lsn}"
        return "; ".join(
            f"{who} stands still at LSN {stream.position} of {stream.chain.told()}, "
            f"the log ends at LSN {last_lsn} of history {history}"
            for who, stream in self.followers.items()
            if not is_there(stream)
        )


# -- the command line ----------------------------------------------------------------------


class _Output(io.TextIOWrapper):
    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding="utf-8")


def use_tools(onlooker: Onlooker, tell: _program.Tell) -> None:
    from trio_wal import _cli

    rng = Random(f"{onlooker.seed} tools")
    out, err = sys.stdout, sys.stderr
    while True:
        name = rng.choice(("dump", "inspect", "verify"))
        if rng.random() < PROGRAM_SHARE:
            use_command(onlooker, tell, name)
            continue
        begun = now()
        texts = _Output(), _Output()
        sys.stdout, sys.stderr = texts
        try:
            code = _cli.run([name, onlooker.path])
        except BaseException as exc:  # noqa: BLE001  (told, and a finding)
            code = -1
            texts[1].write(f"{exc!r}")
        finally:
            for text in texts:
                text.flush()
            sys.stdout, sys.stderr = out, err
        said, complained = (text.bytes.getvalue().decode() for text in texts)
        report_tool(onlooker, tell, name, begun, code, said, complained)
        time.sleep(rng.uniform(0, 6 * onlooker.pause))


def use_command(onlooker: Onlooker, tell: _program.Tell, name: str) -> None:
    """As a program of its own."""
    begun = now()
    command = [sys.executable, "-m", "trio_wal", name, onlooker.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    report_tool(onlooker, tell, name, begun, done.returncode, done.stdout, done.stderr)


def report_tool(
    onlooker: Onlooker,
    tell: _program.Tell,
    name: str,
    begun: int,
    code: int,
    said: str,
    complained: str,
) -> None:
    if name != "dump":
        if code:
            tell("wrong", now(), name, f"exit code {code}: {complained}{said[:300]}")
        else:
            tell("tool", now(), name)
        return
    chain = Chain(onlooker.seed)
    try:
        for line in said.splitlines():
            chain.give(*_dumped(json.loads(line)))
        end: list[Any] = ["end"]
        if code and "is not in the history of this log" in complained:
            end = ["diverged", None, chain.next_lsn - 1]
        elif code and "truncated" in complained:
            end = ["truncated", 0, chain.next_lsn]
        elif code:
            end = ["error", complained]
    except (Wrong, ValueError, KeyError) as exc:
        end = ["wrong", f"{exc!r}"]
    tell("stream", begun, 0, now(), "dump", "read", None, chain.told(), end)


def _dumped(line: dict[str, Any]) -> tuple[int, bytes]:
    if "operations" in line:
        for operation in line["operations"]:
            if _bytes(operation["key"]) == HEAD:
                return line["lsn"], _bytes(operation["value"])
        raise Wrong("other", f"LSN {line['lsn']} is nobody's transaction")
    return line["lsn"], _bytes(line)


def _bytes(fields: dict[str, str]) -> bytes:
    import base64

    return fields["text"].encode() if "text" in fields else base64.b64decode(fields["base64"])


@attrs.define(eq=False)
class Reports:
    """What onlookers have said, as it grows."""

    path: Path
    _at: int = 0

    def new(self) -> list[list[Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
