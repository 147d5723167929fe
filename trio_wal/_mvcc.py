"""Versions: which commits there are, which of them are durable, and who reads which state.

Law: one event loop, no I/O, and nothing above: no transaction, no snapshot, no database.  The
log is handed in (`CommitLog`) and tells what becomes of each commit; whoever reads is a
`Reader`; a checkpoint is asked for here and made elsewhere.

A commit gets its number, its versions and its place in the log in one stretch without a
checkpoint of trio's.  So the order of numbers is the order of the log, without locks.  Where the
log is full, its place is one in line; where there are several lines, whose turns nobody knows
beforehand, the stretch is the moment in which the log lets it in (`Versions.by_turns`).

A reader may see commits that are still on their way to the disk.  Then it has a *commit
dependency* on them (Larson et al., "High-Performance Concurrency Control Mechanisms for
Main-Memory Databases", PVLDB 5 (4), 2011): it returns only when they are durable, fails where
they are lost, and whoever made them cannot take them back any more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice
from time import perf_counter
from typing import Any, Final, Protocol, final

import trio
from trio.lowlevel import Task, enable_ki_protection

from ._base import Readable, StoreState
from ._engine import Record
from ._exceptions import TransactionConflict
from ._layer import MANY_BYTES, Layer, Version
from ._memtable import Memtable, View
from ._operations import (
    PLACED_FORMAT,
    OperationsError,
    Writes,
    decode_puts,
    decode_transaction,
    encode_placed_transaction,
    encode_transaction,
    moves_in,
    not_a_transaction,
)
from ._places import CommitPlaces, Moves, Place
from ._room import Room
from ._text import printable
from ._util import KiB
from ._viewers import CommitDependency, Reader, Readers
from ._watch import Watches

LOOKED_AT_BYTES: Final = 2048
"""Of commits that are replayed before one looks at the time again: some tens of microseconds."""
REPLAYED_TOGETHER: Final = 128
"""Commits that are replayed in one go, where that can be: a tenth of a millisecond."""
REPLAYED_BYTES: Final = 64 * KiB
"""Of so many bytes at most, because they are copied."""


class LogStatus(Protocol):
    """Whether a log takes records."""

    @property
    def refuses(self) -> bool:
        """Whether nothing is accepted any more."""
        ...

    @property
    def disowned(self) -> bool:
        """Whether this is a forked child, where all of it is dead."""
        ...

    def check_open(self) -> None:
        """Raises where nothing is accepted any more, and says why."""
        ...


class CommitLog(Protocol):
    """The log that makes commits durable: what versions need of it.

    Of every record that it was given it says to the versions, in one call each, either
    `Versions.withdrawn` or, for a whole batch, `Versions.settled`, before the task that waits
    for it runs again.  Before it takes a record back for good it asks `Versions.may_withdraw`.
    Where it breaks it says `Versions.failed`.
    """

    @property
    def append(self) -> Callable[[bytes, Task], Awaitable[int]]:
        """Gives what the task awaits at once; it returns the record's LSN."""
        ...

    def append_in_turn(self, record: bytes, line: Any, enter: Callable[[], None]) -> Awaitable[int]:
        """`append` for a log that several lines lead into, of which ``line`` is one, None the
        log's own.  ``enter`` is called in the moment in which the record is let in, in the same
        step; what it raises is raised here, and then there is no record."""
        ...

    @property
    def status(self) -> LogStatus: ...

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task beside the log, which does not end before it."""
        ...


class Settled(Protocol):
    """Commits that one sync has made durable."""

    @property
    def first_lsn(self) -> int: ...

    @property
    def entries(self) -> Collection[Any]:
        """The tasks whose commits they are, in the order of their LSNs; others may be among
        them where it is `mixed`."""
        ...

    @property
    def mixed(self) -> bool: ...


@final
class Pin:
    """A `Reader` of durable state: it depends on nothing, and nothing can invalidate it."""

    __slots__ = ("lsn", "seq", "task", "view")

    def __init__(self, versions: Versions) -> None:
        self.task: Task | None = None
        self.view = versions.pin(self)
        self.seq: int = versions.settled_seq
        self.lsn: int = versions.durable_lsn

    def layer_dropped(self, layer: Layer) -> None:
        pass

    def changed_past(self, keys: Iterable[bytes]) -> None:
        pass


@final
class Versions:
    """Committed state above the store, its numbers, and its readers.

    Attributes are read in every commit and every `get`; only this class sets them.
    So many methods because commits, readers, what the log says and checkpoints meet in one state.
    """

    def __init__(
        self,
        path: str,
        store: Readable,
        log: CommitLog,
        *,
        durable_lsn: int,
        checkpoint_bytes: int,
        max_transaction_bytes: int,
        stored: StoreState | None = None,
    ) -> None:
        """
        Args:
          stored: what the store says of itself; None: it has no places of consumers.
        """
        self.path: Final = path
        """The database's, for messages."""
        self._log = log
        self._append = log.append
        self._status = log.status
        self._memtable: Final = Memtable(store)
        self._pending: dict[Any, tuple[int, Writes, Layer, int]] = {}
        """Commits on their way to the disk, by task and in their order: number, writes, the
        layer that has them, and their bytes in the log."""
        self._dependencies: dict[int, CommitDependency] = {}
        """On those among them that a transaction has read, by number."""
        self.readers: Final = Readers()
        self._pins: Final = self.readers.pins
        self._moving: dict[int, Moves] = {}
        """What those among them do to the places of consumers, by number."""
        stored = stored or StoreState(b"", 0)
        self.stored_places: Mapping[str, Place] = stored.places
        """Of consumers, as of the newest checkpoint."""
        self.places: Final = CommitPlaces(stored.places, stored.commit_lsn, stored.lsn)
        """As of `durable_lsn`."""
        self.last_seq: int = 0
        self.settled_seq: int = 0
        """Of the newest commit whose call may return; those above are pending."""
        self.durable_lsn: int = durable_lsn
        self.epoch: int = 0
        """Of the history that they are of; set by who makes or replays them."""
        self.max_transaction_bytes: Final = max_transaction_bytes
        self._checkpoint_bytes: Final = checkpoint_bytes
        self.room: Final = Room()
        self.transactions: int = 0
        """Those with writes that became durable."""
        self.conflicts: int = 0
        self.closed: bool = False
        self.by_turns: bool = False
        """Whether commits come in through several lines: see `commit_in_turn`."""
        self._burying = False
        self.watches: Final = Watches()
        self._refresh()

    def _refresh(self) -> None:
        """Remember the parts of the current view that every read needs."""
        view = self._memtable.view
        self.view: View = view
        self.newest: dict[bytes, Version] = view.active.versions
        """Of the active layer, by key."""
        self.base_get: Callable[[bytes], bytes | None] = view.base.get
        """Of the store, as of the newest checkpoint."""
        self.checkpointing: bool = view.frozen is not None
        """Whether a layer is on its way into the store."""

    def _renew(self) -> None:
        self._memtable.renew()
        self._refresh()

    def check_open(self) -> None:
        """Raises `trio.ClosedResourceError` where the database is closed."""
        if self.closed:
            raise trio.ClosedResourceError(f"{printable(self.path)}: this database is closed")

    # -- readers --

    def get(self, key: bytes) -> bytes | None:
        """The durable value of a key."""
        version = self.newest.get(key)
        if version is not None and version.seq <= self.settled_seq:
            return version.value
        return self.view.get(key, self.settled_seq)

    def pin(self, reader: Reader) -> View:
        """Somebody begins to read: what it may need is kept until
        `Readers.unpin`."""
        if self.closed:
            self.check_open()
        view = self.view
        view.base.pin()
        # A transaction reads as of later; but so they stand in order.
        self._pins[reader] = self.settled_seq
        return view

    # -- commits --

    def commit(self, writes: Writes, task: Task, moves: Moves | None = None) -> Awaitable[int]:
        """Hand over to the log, in one stretch with the validation of the task that calls, and
        wait; it gives the LSN.

        Not a coroutine function: one frame less to pass through a park and a wake.  What
        it returns must be awaited at once.
        """
        if self._status.refuses:
            self._status.check_open()
        if self.by_turns:
            return self.commit_in_turn(writes, task, moves=moves)
        if moves is None:
            payload = encode_transaction(writes)
        else:
            payload = encode_placed_transaction(writes, moves)
            self._moving[self.last_seq + 1] = moves
        layer = self.view.active
        self.last_seq = seq = self.last_seq + 1
        size = len(payload)
        self._pending[task] = (seq, writes, layer, size)
        if size >= MANY_BYTES and layer.make_way(writes):
            self._renew()
        if layer.add(writes, seq, self.settled_seq, self._pins):
            self._renew()
        layer.log_bytes += size
        if layer.log_bytes >= self._checkpoint_bytes:
            self.room.ask()
        append = self._append  # called as a method, it would be looked up twice
        return append(payload, task)

    def commit_in_turn(
        self,
        writes: Writes,
        task: Task,
        line: Any = None,
        validate: Callable[[], None] | None = None,
        moves: Moves | None = None,
    ) -> Awaitable[int]:
        """`commit` where there are several lines: it has its number only when the log lets it in.

        Args:
          line: the log's, through which it comes in; None: the log's own.
          validate: raises where it must not be committed, as of that moment.
        """
        self._status.check_open()
        if moves is None:
            payload = encode_transaction(writes)
        else:
            payload = encode_placed_transaction(writes, moves)

        def enter() -> None:
            if validate is not None:
                validate()
            layer = self.view.active
            self.last_seq = seq = self.last_seq + 1
            if moves is not None:
                self._moving[seq] = moves
            self._pending[task] = (seq, writes, layer, len(payload))
            if len(payload) >= MANY_BYTES and layer.make_way(writes):
                self._renew()
            if layer.add(writes, seq, self.settled_seq, self._pins):
                self._renew()
            layer.log_bytes += len(payload)
            if layer.log_bytes >= self._checkpoint_bytes:
                self.room.ask()

        return self._log.append_in_turn(payload, line, enter)

    @property
    def pending(self) -> int:
        """Commits on their way to the disk."""
        return len(self._pending)

    def has_pending(self, seq: int) -> bool:
        """Whether a commit up to this number is pending."""
        return bool(self._pending) and next(iter(self._pending.values()))[0] <= seq

    def depend(self, key: bytes, seq: int) -> CommitDependency:
        """A transaction has read a pending commit: it cannot be taken back any more."""
        found = self._dependencies.get(seq)
        if found is None:
            found = self._dependencies[seq] = CommitDependency(key, seq)
        return found

    async def wait_for(self, dependency: CommitDependency | None) -> int:
        """Wait until what was read is durable; returns the newest durable LSN.

        Raises:
          TransactionConflict: what was read will never have been.
        """
        if dependency is None or dependency.settled:
            await trio.lowlevel.checkpoint()
        elif not dependency.lost:
            await dependency.wait()
        if dependency is not None and dependency.lost:
            self._status.check_open()
            self.conflicts += 1
            raise TransactionConflict(dependency.key)
        return self.durable_lsn

    def note_conflict(self) -> None:
        self.conflicts += 1

    # -- the log tells what becomes of them --

    def may_withdraw(self, task: Task) -> bool:
        """Whether the task's commit may still be taken back."""
        commit = self._pending.get(task)
        return commit is None or commit[0] not in self._dependencies

    def withdrawn(self, task: Task) -> None:
        """The task's commit will not be in the log."""
        commit = self._pending.pop(task, None)
        if commit is None:
            return
        seq, writes, layer, size = commit
        layer.log_bytes -= size
        self._moving.pop(seq, None)
        if self.room.waiting and not self.behind():
            self.room.tell()
        if layer.remove(writes, seq, self.settled_seq):
            self._renew()
        dependency = self._dependencies.pop(seq, None)
        if dependency is not None:
            dependency.lose()

    def settled(self, batch: Settled) -> None:
        """These commits are durable; their tasks have not run yet."""
        pending = self._pending
        if not batch.mixed and len(pending) == len(batch.entries):
            # The usual: whoever commits waits for this batch.
            commits = list(pending.values())
            pending.clear()
        else:
            # A flush waits in the batch too; and numbers stand for those who do not wait.
            pop = pending.pop
            commits = [c for key in batch.entries if (c := pop(key, None)) is not None]
        if not commits:
            return
        seq, _, layer, _ = commits[-1]
        lsn = self.durable_lsn = batch.first_lsn + len(commits) - 1
        self.settled_seq = seq
        self.transactions += len(commits)
        layer.last_lsn = lsn
        if commits[0][2] is not layer:
            # A checkpoint froze the layer in between.
            frozen = [c for c in commits if c[2] is not layer]
            frozen[0][2].last_lsn = batch.first_lsn + len(frozen) - 1
        if self._moving:
            self._settle_moves(batch.first_lsn, commits)
        if self.watches.begun:
            self.watches.settled(batch.first_lsn, commits)
        if self._settle_layers(seq) and not self._burying and self._dead():
            self._burying = True
            self._log.start_soon(self._bury)
        if self._dependencies:
            for number in [number for number in self._dependencies if number <= seq]:
                self._dependencies.pop(number).settle()

    def failed(self) -> None:
        """Nothing more will become durable."""
        self.watches.end()

    def _settle_layers(self, seq: int) -> bool:
        """Returns whether a view was made anew."""
        oldest = self.readers.oldest()
        below = self._memtable.below
        renew = False
        for layer in reversed(self.view.layers()):
            if layer.settle(seq, oldest, below):
                renew = True
        if renew:
            self._renew()
        return renew

    def _dead(self) -> bool:
        return any(layer.dead(self.settled_seq) for layer in self.view.layers())

    @enable_ki_protection
    async def _bury(self) -> None:
        """A task: deal with the many deletions of a large transaction bit by bit."""
        try:
            while self._dead():
                await trio.lowlevel.checkpoint()
                self._settle_layers(self.settled_seq)
        finally:
            self._burying = False

    def replay(
        self, name: str, records: Sequence[Record], at: int, until: float, *, to_checkpoint: bool
    ) -> int:
        """Durable commits of the log's, in the log's order, where nothing is committed: from this
        one on, for some time.  Returns which is the next.

        Others may be reading meanwhile, and waiting for it.  `settle_replayed` comes after some of
        them, before another task's turn.

        Args:
          name: of the log, for messages.
          until: by `time.perf_counter`; looked at now and then.
          to_checkpoint: whether to end where a checkpoint is due.

        Raises:
          CorruptLogError: the next one is none.
        """
        try:
            while at < len(records):
                done = self._replay_puts(records, at)
                at = (
                    at + done
                    if done
                    else self._replay_each(name, records, at, until, to_checkpoint)
                )
                full = self.view.active.log_bytes >= self._checkpoint_bytes
                if (full and to_checkpoint) or perf_counter() >= until:
                    break
        finally:
            # A store that somebody else writes may be further.
            self.durable_lsn = max(self.durable_lsn, self.view.active.last_lsn)
        return at

    def _replay_puts(self, records: Sequence[Record], at: int) -> int:
        """The same as `_replay_each` for a stretch of commits that each put one key, as most do
        in some logs, in a fraction of the time; returns how many, 0 where it must not."""
        if self._pins or self.watches.begun:
            return 0
        some = records[at : at + REPLAYED_TOGETHER]
        payloads = [record.data for record in some]
        layer, size = self.view.active, sum(map(len, payloads))
        if size > REPLAYED_BYTES or layer.log_bytes + size >= self._checkpoint_bytes:
            return 0
        puts = decode_puts(payloads)
        if puts is None:
            return 0
        renew = layer.add_settled(*puts, self.last_seq + 1)
        if renew is None:
            return 0
        self.settled_seq = self.last_seq = layer.last_seq
        layer.last_lsn = some[-1].lsn
        layer.log_bytes += size
        if renew:
            self._renew()
        return len(some)

    def _replay_each(
        self, name: str, records: Sequence[Record], at: int, until: float, to_checkpoint: bool
    ) -> int:
        """Some commits, one after the other."""
        layer = self.view.active
        keep_older = bool(self._pins)
        watches = self.watches if self.watches.begun else None
        seen_bytes = 0
        try:
            for record in islice(records, at, at + REPLAYED_TOGETHER):
                lsn, data = record.lsn, record.data
                writes = decode_transaction(data)
                moves = moves_in(data) if data[:1] == PLACED_FORMAT else None
                at += 1
                size = len(data)
                seq = self.settled_seq = self.last_seq = self.last_seq + 1
                if size >= MANY_BYTES and layer.make_way(writes):
                    self._renew()
                if layer.add(writes, seq, seq, keep_older):
                    self._renew()
                layer.last_lsn = lsn
                layer.log_bytes += size
                if moves:
                    self._moved(lsn, moves, layer, alone=not writes)
                if watches is not None:
                    watches.settled(lsn, [(seq, writes, layer, size)])
                if layer.log_bytes >= self._checkpoint_bytes:
                    self.room.ask()
                    if to_checkpoint:
                        break
                seen_bytes += size
                if seen_bytes >= LOOKED_AT_BYTES:
                    seen_bytes = 0
                    if perf_counter() >= until:
                        break
        except OperationsError as exc:
            raise not_a_transaction(name, records[at].lsn, exc) from exc
        return at

    async def settle_replayed(self) -> None:
        """Forget what the replayed commits have replaced.  A checkpoint only where there is much
        of it."""
        while self._settle_layers(self.settled_seq):
            if not self._dead():
                break
            # More deletions to be buried than are at once.
            await trio.lowlevel.checkpoint()

    # -- places of consumers --

    def moving(self, name: str) -> bool:
        """Whether a pending commit moves this consumer's place."""
        return any(name in moves for moves in self._moving.values())

    def _settle_moves(self, first_lsn: int, commits: Iterable[tuple[Any, ...]]) -> None:
        for lsn, (seq, writes, layer, _) in enumerate(commits, first_lsn):
            moves = self._moving.pop(seq, None)
            if moves is not None:
                self._moved(lsn, moves, layer, alone=not writes)

    def _moved(self, lsn: int, moves: Moves, layer: Layer, *, alone: bool) -> None:
        layer.places.update(self.places.record(lsn, moves, alone=alone))
        if alone:
            layer.acknowledged_lsn, layer.commit_lsn = lsn, self.places.commit_lsn

    def state_at(self, frozen: Layer, before: StoreState) -> StoreState:
        """What a store that holds the frozen layer says of itself."""
        lsn = max(frozen.last_lsn, before.lsn)
        places = {**before.places, **frozen.places}
        known = {name: place for name, place in places.items() if place is not None}
        if lsn == before.lsn:
            return StoreState(before.log_uuid, lsn, known, before.commit_lsn)
        commit_lsn = frozen.commit_lsn if frozen.acknowledged_lsn == lsn else lsn
        return StoreState(before.log_uuid, lsn, known, commit_lsn)

    # -- room --

    def behind(self) -> bool:
        """Whether checkpoints are a whole interval behind."""
        view = self.view
        return view.frozen is not None and view.active.log_bytes >= self._checkpoint_bytes

    @enable_ki_protection
    async def wait_for_room(self) -> None:
        """Back-pressure: wait while checkpoints are a whole interval behind.

        Raises:
          LogFullError: they cannot go on; see `Room.wait`.
          LogFailedError, trio.ClosedResourceError: as the log says.
        """
        while self.behind():
            self._status.check_open()
            await self.room.wait(reading=bool(self._pins))

    # -- for checkpoints --

    def checkpoint_due(self) -> bool:
        """Whether there is something to be done for whoever asked: what made it due may have
        been withdrawn."""
        view = self.view
        return view.frozen is not None or view.active.log_bytes >= self._checkpoint_bytes

    def freeze(self) -> Layer | None:
        """What is to be checkpointed, with no more commits to come; None: nothing is here.

        One that was interrupted is given again.
        """
        view = self.view
        if view.frozen is not None:
            return view.frozen
        if not view.active.versions and not view.active.last_lsn:
            return None
        frozen = self._memtable.freeze()
        self._refresh()
        return frozen

    def checkpointed(self, frozen: Layer, state: StoreState) -> None:
        """The store holds the frozen layer, durably."""
        # A copy: the garbage collector ends scans that were left, whenever it likes.
        for reader in list(self._pins):
            reader.layer_dropped(frozen)
        self._memtable.drop_frozen()
        self._refresh()
        self.stored_places = state.places
        self.places.stored(state.lsn)
        self.places.forget_before(
            min((place.lsn for place in self.places.now.values()), default=state.lsn)
        )
        self.room.tell()
        if self.view.active.log_bytes >= self._checkpoint_bytes:
            self.room.ask()

    def reopen_base(self, between: Callable[[], None]) -> None:
        """Do something while the store is not being read; nobody else may be reading."""
        try:
            self._memtable.reopen_base(between)
        finally:
            self._refresh()

    # -- the end --

    def let_go(self) -> None:
        """Nobody reads any more: the store is about to be closed."""
        self.closed = True
        self.readers.let_go()

    def close(self) -> None:
        """Let go of the store too."""
        self.room.tell()
        self.watches.end()
        self._memtable.close()
        self._refresh()
        self.base_get = self._get_closed

    def disown(self) -> None:
        """In a forked child: all of it is the parent's.

        The store's read transactions stay as they are: to end one of LMDB's would free its place
        in the table of readers, which is the parent's too.
        """
        for view in (self.view, *[reader.view for reader in list(self._pins)]):
            view.base.pin()
        self.let_go()
        self._memtable.close()
        self._refresh()
        self.base_get = self._get_closed

    def _get_closed(self, key: bytes) -> bytes | None:
        self.check_open()
        return None
