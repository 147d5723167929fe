"""A replicated log in memory: servers that lose, delay, double and forget what they are told.

Law: a `CasServers` is what the servers hold together; a `MemoryCas` is one client's way to them,
with that client's faults.  What a majority has agreed on is never lost and never changed; all else
that `_caslog` allows happens, as often as `Faults` says, drawn from one seed.  Time is trio's.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, final

import attrs
import trio
from engines import log_options

from trio_wal import WriteAheadLog
from trio_wal._caslog import Conflict, Denied, Description, Entry, Full, Gone, Unsure
from trio_wal._log import Log, OpenLog
from trio_wal._messages import parse_ident
from trio_wal._replicated import (
    RemoteLog,
    ReplicatedEngine,
    ReplicatedOptions,
    open_replicated,
)
from trio_wal._streamlog import StreamLog, StreamSource
from trio_wal._wal import new_wal
from trio_wal.testing import MemoryFiles

TRY_SECONDS: Final = 1.0
"""After which a client gives a try up."""


@attrs.frozen(kw_only=True)
class Faults:
    """How often each goes wrong, 0 to 1."""

    lost: float = 0.0
    """A request never arrives."""
    unanswered: float = 0.0
    """It is done, and the answer never arrives."""
    late: float = 0.0
    """It arrives after its sender has given up."""
    doubled: float = 0.0
    """It arrives once more, later."""
    stale: float = 0.0
    """A server answers that is behind: with less than there is, or with an old last position."""
    astray: float = 0.0
    """A replica gives what was refused, as if it stood there."""
    gaps: float = 0.0
    """An answer has a message less in its middle."""
    full: float = 0.0
    """A server says that there is no room."""


NONE: Final = Faults()


@attrs.define(eq=False)
class _Late:
    due: float
    action: Callable[[], object]


class CasServers:
    """What the servers hold."""

    def __init__(self, *, seed: int = 0) -> None:
        self.name = "memory:replicated"
        self.random = random.Random(seed)
        self.uuid = uuid.UUID(bytes=self.random.randbytes(16))
        self.entries: list[Entry] = []
        self.first = 1
        self.bytes = 0
        """What its messages take; counted, because a sum over all of them would be most of what an
        append costs."""
        self.bytes_max: float = math.inf
        self.message_bytes_max = 1 << 20
        self.pieces_max = 64
        self.files = MemoryFiles(seed=seed)
        self.denied = False
        self.refused: dict[int, list[Entry]] = {}
        """What was not taken, by the position at which it would stand."""
        self.forgetful = False
        """Whether an owner had no room for a mark twice in a row: then it may drop the last one."""
        self.owner: MemoryCas | None = None
        self.bell = trio.Event()
        self._late: list[_Late] = []
        self._held: trio.Event | None = None

    @property
    def last(self) -> int:
        return self.first + len(self.entries) - 1

    def at(self, position: int) -> Entry | None:
        index = position - self.first
        return self.entries[index] if 0 <= index < len(self.entries) else None

    # -- what tests do to it --

    def hold(self) -> None:
        """Answer no append, until `release`."""
        self._held = self._held or trio.Event()

    def release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.set()

    async def gate(self) -> None:
        while self._held is not None:
            await self._held.wait()

    def crash(self) -> None:
        """All servers and clients lose their power; a majority has lost nothing."""
        self.release()
        self.owner = None
        self._late.clear()

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        self._late.append(_Late(trio.current_time() + seconds, action))

    def deliver(self, *, everything: bool = False) -> None:
        """What was under way arrives."""
        now = trio.current_time()
        due = [late for late in self._late if everything or late.due <= now]
        self._late = [late for late in self._late if late not in due]
        for late in due:
            late.action()

    # -- what clients do --

    def append(self, after: int, pieces: Sequence[bytes], ident: str) -> int:
        """Compare and set; raises what a leader answers."""
        if after != self.last:
            self._refuse(after, pieces, ident)
            raise Conflict(self.last)
        size = sum(map(len, pieces))
        if self.bytes + size > self.bytes_max:
            raise Full("maximum bytes exceeded")
        for data in pieces:
            self.entries.append(Entry(self.last + 1, ident, data))
        self.bytes += size
        bell, self.bell = self.bell, trio.Event()
        bell.set()
        return self.last

    def append_late(self, after: int, pieces: Sequence[bytes], ident: str) -> None:
        """The same, when nobody listens for the answer."""
        with suppress(Conflict, Full):
            self.append(after, pieces, ident)

    def _refuse(self, after: int, pieces: Sequence[bytes], ident: str) -> None:
        for position, data in enumerate(pieces, after + 1):
            there = self.at(position)
            if there is not None and there.ident != ident:
                self.refused.setdefault(position, []).append(Entry(position, ident, data))

    def drop_before(self, position: int) -> None:
        count = min(max(0, position - self.first), len(self.entries))
        self.bytes -= sum(len(entry.data) for entry in self.entries[:count])
        del self.entries[:count]
        self.first += count

    def description(self) -> Description:
        """Of a stream that all three servers have."""
        return Description(
            uuid=self.uuid,
            first=self.first,
            last=self.last,
            bytes=self.bytes,
            bytes_max=self.bytes_max,
            message_bytes_max=self.message_bytes_max,
            pieces_max=self.pieces_max,
            replicas=3,
            replicas_current=3,
        )


@final
class MemoryCas:
    """A `CasLog`."""

    def __init__(self, servers: CasServers, faults: Faults = NONE) -> None:
        self.name = servers.name
        self.servers = servers
        self.faults = faults
        self.cut = False
        """Whether no server can be reached."""
        self.closed = False
        self.appends = 0
        self.rotations = 0
        self._full_marks = 0
        """So many marks in a row found no room."""

    # -- the way there and back --

    def _draws(self, share: float) -> bool:
        return bool(share) and self.servers.random.random() < share

    async def _travel(self) -> None:
        """A request on its way; raises `Unsure` where it does not arrive."""
        assert not self.closed
        servers = self.servers
        if self.faults is not NONE and servers.random.random() < 0.3:
            await trio.sleep(servers.random.uniform(0.001, 0.03))
        else:
            await trio.lowlevel.checkpoint()
        servers.deliver()
        if self.cut or self._draws(self.faults.lost):
            await self._time_out()

    async def _time_out(self) -> None:
        await trio.sleep(TRY_SECONDS)
        raise Unsure("no answer")

    async def _return(self) -> None:
        if self.cut or self._draws(self.faults.unanswered):
            await self._time_out()

    # -- CasLog --

    async def describe(self) -> Description:
        await self._travel()
        found = self.servers.description()
        await self._return()
        return found

    async def last(self) -> int:
        return (await self.describe()).last

    async def append(self, after: int, pieces: Sequence[bytes], ident: str) -> int:
        named = parse_ident(ident, self.servers.uuid)
        is_mark = named is not None and named.mark == after + 1
        try:
            position = await self._append(after, pieces, ident)
        except Full:
            if is_mark:
                self._full_marks += 1
                self.servers.forgetful |= self._full_marks > 1
            raise
        if is_mark:
            self._full_marks = 0
        return position

    async def _append(self, after: int, pieces: Sequence[bytes], ident: str) -> int:
        self.appends += 1
        servers, faults, chance = self.servers, self.faults, self.servers.random
        assert 0 < len(pieces) <= servers.pieces_max
        assert all(0 < len(data) <= servers.message_bytes_max for data in pieces)
        await servers.gate()
        if self._draws(faults.late):
            pieces = list(pieces)
            servers.later(
                chance.uniform(0, 4 * TRY_SECONDS),
                partial(servers.append_late, after, pieces, ident),
            )
            await self._time_out()
        await self._travel()
        if servers.denied:
            raise Denied("permissions violation")
        if self._draws(faults.full):
            raise Full("insufficient resources")
        if self._draws(faults.stale):
            raise Conflict(chance.randint(0, servers.last + 1))
        conflict: Conflict | None = None
        position = 0
        try:
            position = servers.append(after, pieces, ident)
        except Conflict as exc:
            conflict = exc
        finally:
            if self._draws(faults.doubled):
                servers.later(
                    chance.uniform(0, 2 * TRY_SECONDS),
                    partial(servers.append_late, after, list(pieces), ident),
                )
        await self._return()
        if conflict is not None:
            raise conflict
        return position

    async def ident_at(self, position: int) -> str | None:
        await self._travel()
        if self._draws(self.faults.stale):
            return None
        entry = self.servers.at(position)
        await self._return()
        return None if entry is None else entry.ident

    async def read(self, position: int, max_bytes: int) -> list[Entry]:
        await self._travel()
        servers, faults, chance = self.servers, self.faults, self.servers.random
        if position < servers.first:
            raise Gone(servers.first)
        found: list[Entry] = []
        size, behind = 0, chance.randint(0, 3) if self._draws(faults.stale) else 0
        astray = self._draws(faults.astray)
        for at in range(position, servers.last + 1 - behind):
            entry = servers.at(at)
            assert entry is not None
            ghosts = servers.refused.get(at)
            if astray and ghosts:
                entry = chance.choice(ghosts)
            found.append(entry)
            size += len(entry.data)
            if size >= max_bytes:
                break
        if len(found) > 2 and self._draws(faults.gaps):
            del found[chance.randrange(1, len(found) - 1)]
        await self._return()
        return found

    async def drop_before(self, position: int) -> None:
        await self._travel()
        self.servers.drop_before(position)
        await self._return()

    async def elsewhere(self) -> None:
        self.rotations += 1

    async def changed(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.servers.bell.wait()

    async def announce(self, owner: str) -> None:
        self.servers.owner = self

    async def owner(self) -> str | None:
        await trio.lowlevel.checkpoint()
        owner = self.servers.owner
        return None if owner is None or owner.closed or owner.cut else "process 17"

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()

    def disown(self) -> None:
        self.closed = True


# -- on it ------------------------------------------------------------------------------------


async def open_engine(cas: MemoryCas, options: ReplicatedOptions) -> ReplicatedEngine:
    found = cas.servers.description()
    return await open_replicated(cas, found, options, cas.servers.files)


class MemoryLog(RemoteLog):
    """What `trio_wal.open_wal` and the like take, for servers in memory."""

    def __init__(self, servers: CasServers, *, takeover: bool = True) -> None:
        self.servers = servers
        self.unavailable_after = 30.0
        self.takeover = takeover
        self.exists = True
        self.ways: list[MemoryCas] = []

    @property
    def address(self) -> str:
        return self.servers.name

    async def connect(self, *, create: bool) -> tuple[MemoryCas, Description]:
        way = MemoryCas(self.servers)
        self.ways.append(way)
        return way, await way.describe()


def replicated_log(cas: MemoryCas, replication: ReplicatedOptions, **options: Any) -> OpenLog:
    return OpenLog("open", log_options(**options), partial(open_engine, cas, replication))


@asynccontextmanager
async def _opened(opened: OpenLog) -> AsyncIterator[WriteAheadLog]:
    log: Log = await opened.enter()
    try:
        log.hand_out()
        yield new_wal(log)
    except BaseException as exc:
        await opened.leave(exc)
        raise
    await opened.leave(None)


def open_wal_on_cas(
    where: CasServers | MemoryCas, *, replication: ReplicatedOptions | None = None, **options: Any
) -> AbstractAsyncContextManager[WriteAheadLog]:
    cas = MemoryCas(where) if isinstance(where, CasServers) else where
    return _opened(replicated_log(cas, replication or ReplicatedOptions(), **options))


def source_on(cas: MemoryCas, patience_seconds: float = 30.0) -> StreamSource:
    return StreamSource(StreamLog(cas, cas.servers.uuid, patience_seconds))
