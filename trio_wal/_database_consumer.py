"""A consumer of a database, as a trio program sees it: `DatabaseConsumer`.

Law: promises and the checks of what users pass, and how places move by transactions; what a
consumer is, is `_consumers`'.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, final

from trio.lowlevel import current_task, enable_ki_protection

from ._changes import Commit, CommitStream, new_commit_stream
from ._consumers import Session
from ._exports import NoPublicConstructor, constructor, publish
from ._identity import Bookmark
from ._log import Log
from ._mvcc import Versions
from ._operations import check_size, encode_placed_transaction
from ._places import Move, Place, Places
from ._transaction import Transaction, acknowledge_in


@final
class CommitKeeper:
    """A `_consumers.Keeper`: a place moves by a transaction that does nothing else."""

    in_log = True

    def __init__(self, versions: Versions, log: Log) -> None:
        self._versions = versions
        self._log = log
        self._admitted = False

    @property
    def places(self) -> Places:
        return self._versions.places

    @property
    def stored(self) -> Mapping[str, Place]:
        return self._versions.stored_places

    @property
    def durable_lsn(self) -> int:
        return self._versions.durable_lsn

    async def admit(self) -> None:
        if not self._admitted:
            await self._log.engine.admit_consumers()
            self._admitted = True

    @enable_ki_protection
    async def move(self, name: str, move: Move) -> None:
        versions = self._versions
        moves = {name: move}
        check_size(len(encode_placed_transaction({}, moves)), versions.max_transaction_bytes)
        versions.check_open()
        if versions.checkpointing and versions.behind():
            await versions.wait_for_room()
        await versions.commit({}, current_task(), moves)

    async def settle(self, name: str) -> None:
        while self._versions.moving(name):
            await self._log.flush()


@final
class DatabaseConsumer(
    AbstractAsyncContextManager["DatabaseConsumer"],
    AsyncIterator[Commit],
    metaclass=NoPublicConstructor,
):
    """A named, durable place in a database's commits; what `Database.consumer` gives.

    Iterating gives every durable commit after that place, and then waits for new ones, as
    `Database.changes` does and with the same errors.  What was not acknowledged is given again
    the next time it is entered: at least once, or, with `acknowledge_in`, exactly once.  A
    cancellation loses nothing, as of any `CommitStream`.
    """

    def __init__(self, session: Session, versions: Versions, path: str) -> None:
        self._session = session
        self._versions = versions
        self._path = path
        self._commits: CommitStream | None = None

    @enable_ki_protection
    async def __aenter__(self) -> DatabaseConsumer:
        self._commits = new_commit_stream(self._path, await self._session.enter())
        return self

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.leave()

    def _entered(self) -> CommitStream:
        self._session.check_open()
        assert self._commits is not None
        return self._commits

    @property
    def name(self) -> str:
        """As given to ``consumer()``."""
        return self._session.name

    @property
    def bookmark(self) -> Bookmark:
        """The place after the last commit that was given, acknowledged or not."""
        return self._entered().bookmark

    def __aiter__(self) -> DatabaseConsumer:
        return self

    def __anext__(self) -> Coroutine[Any, Any, Commit]:
        return (self._commits or self._entered()).__anext__()

    def batches(
        self, max_records: int | None = 1000, *, linger: float = 0.0
    ) -> AsyncIterator[list[Commit]]:
        """The same commits in lists, as `CommitStream.batches`; acknowledge the last one of a
        list for all of it."""
        return self._entered().batches(max_records, linger=linger)

    @enable_ki_protection
    async def acknowledge(self, item: Commit) -> None:
        """Everything up to this commit, which this consumer has given, is done with.

        A transaction of its own, which takes an LSN and changes nothing but the place; no
        consumer, and no `Database.changes`, shows it.  Durable on return.  A commit that
        lies before what is acknowledged changes nothing.

        Cancellation is that of `Transaction.commit`.

        Raises:
          TypeError: ``item`` is no `Commit`.
          ValueError: this consumer has not given it, since its block was entered.
          LogFullError, LogFailedError, trio.ClosedResourceError: as `Database.put`; also where
              the block was left.
        """
        if not isinstance(item, Commit):
            raise TypeError(f"item must be a Commit, not {type(item).__name__}")
        await self._session.acknowledge(item)

    @enable_ki_protection
    def acknowledge_in(self, tx: Transaction, item: Commit) -> None:
        """The same as part of a transaction: it and the acknowledgement become durable together,
        or neither::

            async for commit in consumer:
                async with db.transaction() as tx:
                    tx.put(b"seen", b"%d" % commit.lsn)
                    consumer.acknowledge_in(tx, commit)

        The commit of ``tx`` fails with `trio.ClosedResourceError` where the consumer's block was
        left before: then another user may have been given the same commit.

        Raises:
          TypeError: ``tx`` is no `Transaction`, or ``item`` no `Commit`.
          ValueError: ``tx`` is of another database, or this consumer has not given ``item``.
          RecordTooLargeError: the transaction would be over ``max_record_size``.
          trio.BusyResourceError, trio.ClosedResourceError: as the transaction's methods; also
              where the block was left.
        """
        if not isinstance(tx, Transaction):
            raise TypeError(f"tx must be a Transaction, not {type(tx).__name__}")
        if not isinstance(item, Commit):
            raise TypeError(f"item must be a Commit, not {type(item).__name__}")
        session = self._session
        place = session.place_of(item)
        move = None if place is None else Move(place)
        acknowledge_in(tx, self._versions, session.name, move, session.check_open)


new_database_consumer = constructor(DatabaseConsumer)


publish(DatabaseConsumer)
