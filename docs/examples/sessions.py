"""Sessions with expiry: an index by time in a second table, and a task that cleans up.

    python docs/examples/sessions.py sessions.db --count 1000 --lifetime 5

A session is found by its token, and is gone when its time is over, cleaned up or not.  The second
table has the same sessions in the order of time, so that the cleaner reads only what it deletes.
Both are changed in one transaction, so they always agree, also after a crash.  Tokens are not
stored, only their digests: whoever reads the database cannot use a session.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import time
from collections.abc import Callable

import msgspec
import trio

import trio_wal
from trio_wal import Database, Table, Transaction

CLEANED_AT_ONCE = 100
"""Sessions in a transaction of the cleaner, which the event loop waits for."""


class Session(msgspec.Struct, frozen=True):
    user: str
    expires: int
    """Milliseconds since 1970."""


sessions = Table("sessions", key=bytes, value=Session)  # by the token's digest
by_time = Table("sessions_by_time", key=tuple[int, bytes], value=bytes)


def milliseconds() -> int:
    return time.time_ns() // 1_000_000


def digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class Sessions:
    def __init__(
        self, db: Database, lifetime: float, clock: Callable[[], int] = milliseconds
    ) -> None:
        self._db = db
        self._lifetime = int(lifetime * 1000)
        self._clock = clock

    def _put(self, tx: Transaction, key: bytes, user: str) -> None:
        expires = self._clock() + self._lifetime
        sessions.put(tx, key, Session(user, expires))
        by_time.put(tx, (expires, key), b"")

    def _pop(self, tx: Transaction, key: bytes) -> Session | None:
        session = sessions.pop(tx, key, None)
        if session is not None:
            by_time.delete(tx, (session.expires, key))
        return session

    async def begin(self, user: str) -> str:
        """The token of a new session, which survives a crash."""
        token = secrets.token_urlsafe()
        async with self._db.transaction() as tx:
            self._put(tx, digest(token), user)
        return token

    def user(self, token: str) -> str | None:
        """Whose session it is; None if there is none, or no longer."""
        session = sessions.get(self._db, digest(token))
        return None if session is None or session.expires <= self._clock() else session.user

    async def renew(self, token: str) -> bool:
        """Its lifetime begins anew; False if it is over already."""
        async with self._db.transaction() as tx:
            session = self._pop(tx, digest(token))
            if session is None or session.expires <= self._clock():
                return False
            self._put(tx, digest(token), session.user)
        return True

    async def end(self, token: str) -> None:
        """When this returns, no crash brings the session back."""
        async with self._db.transaction() as tx:
            self._pop(tx, digest(token))

    async def clean(self) -> None:
        """Run by one task: deletes what has expired, for ever."""
        while True:
            seen = self._db.durable_lsn
            async with self._db.transaction() as tx:
                end = (self._clock() + 1,)
                for (_, key), _ in list(by_time.scan(tx, stop=end, limit=CLEANED_AT_ONCE)):
                    self._pop(tx, key)
                first = next(by_time.scan(tx, limit=1), None)
            if first is None:
                await self._db.wait_changed(prefix=by_time.prefix, since=seen)
            else:
                # All live equally long: none that begins from now on expires before this one.
                await trio.sleep(max(0, first[0][0] - self._clock()) / 1000)

    async def wait_empty(self) -> None:
        seen = self._db.durable_lsn
        while next(by_time.scan(self._db, limit=1), None) is not None:
            seen = await self._db.wait_changed(prefix=by_time.prefix, since=seen)


async def main(path: str, count: int, lifetime: float) -> None:
    async with trio_wal.open_database(path) as db, trio.open_nursery() as nursery:
        store = Sessions(db, lifetime)
        nursery.start_soon(store.clean)
        for number in range(count):
            token = await store.begin(f"user {number}")
            print("began", token, number, flush=True)
            if number % 3 == 1:
                await store.renew(token)
            elif number % 3 == 2:
                await store.end(token)
                print("ended", token, number, flush=True)
        await store.wait_empty()
        print("all are over")
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Sessions with expiry.")
    parser.add_argument("path")
    parser.add_argument("--count", type=int, default=1000, help="sessions that begin")
    parser.add_argument("--lifetime", type=float, default=5.0, help="seconds")
    given = parser.parse_args()
    trio.run(main, given.path, given.count, given.lifetime)
