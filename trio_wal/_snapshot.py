"""A durable view of one moment.

Law: what a snapshot shows no crash can take back, and nothing that happens later changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar, final, overload

import trio
from trio.lowlevel import enable_ki_protection

from ._exports import NoPublicConstructor, constructor, publish
from ._identity import Bookmark
from ._mvcc import Pin, Versions
from ._operations import check_key, check_range
from ._pairs import PairStream, new_pair_stream

D = TypeVar("D")


@final
class Snapshot(AbstractContextManager["Snapshot"], metaclass=NoPublicConstructor):
    """A consistent, durable view at one LSN; writers and checkpoints go on.

    It shows the moment at which ``with`` was entered, and is for one use.  Keep it short: while
    it is open, memory and disk pages that it may need cannot be freed.
    """

    _pin: Pin | None = None
    _entered = False
    _lsn = 0

    _epoch = 0

    def __init__(self, versions: Versions) -> None:
        self._versions = versions

    @enable_ki_protection
    def __enter__(self) -> Snapshot:
        if self._entered:
            raise RuntimeError("a snapshot can be used only once")
        # Here, not when it was made: without the block nobody would let go of what it keeps.
        self._pin = Pin(self._versions)
        self._lsn, self._epoch = self._pin.lsn, self._versions.epoch
        self._entered = True
        return self

    @enable_ki_protection
    def __exit__(self, *_: object) -> None:
        self.close()

    @enable_ki_protection
    def close(self) -> None:
        """Let go of the view; idempotent."""
        pin, self._pin = self._pin, None
        if pin is not None:
            self._versions.readers.unpin(pin)

    def _open_pin(self) -> Pin:
        if self._pin is None or self._versions.closed:
            self._check_entered()
            raise trio.ClosedResourceError("this snapshot is closed")
        return self._pin

    def _check_entered(self) -> None:
        if not self._entered:
            raise RuntimeError("enter the snapshot first: with db.snapshot() as snap")

    @property
    def lsn(self) -> int:
        """The newest transaction that it contains."""
        self._check_entered()
        return self._lsn

    @property
    def bookmark(self) -> Bookmark:
        """`lsn`, with the database's epoch: `Database.changes` continues after this state."""
        return Bookmark(self.lsn, self._epoch)

    @overload
    def get(self, key: bytes) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: D) -> bytes | D: ...
    def get(self, key: bytes, default: object = None) -> object:
        """The value of ``key`` at `lsn`, or ``default``.

        Raises:
          TypeError, ValueError: ``key`` is not 1 to 511 bytes.
          trio.ClosedResourceError: the snapshot, or the database, is closed.
          OSError, CorruptLogError: as `Database.get`.
        """
        pin = self._open_pin()
        value = pin.view.get(check_key(key), pin.seq)
        return default if value is None else value

    def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """As `Database.scan`, at `lsn`; ends with the snapshot."""
        start, stop = check_range(start, stop, prefix, limit)
        self._open_pin()
        return self._scan(start, stop, reverse, limit)

    def stream(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> PairStream:
        """As `scan`, for large ranges: other tasks get their turn at least once a millisecond::

            async with snap.stream(prefix=b"user:") as pairs:
                async for key, value in pairs: ...

        It ends with the snapshot.
        """
        start, stop = check_range(start, stop, prefix, limit)
        self._open_pin()
        scan = partial(self.scan, start, stop, reverse=reverse, limit=limit)
        return new_pair_stream(scan, _nothing)

    def _scan(
        self, start: bytes | None, stop: bytes | None, reverse: bool, limit: int | None
    ) -> Iterator[tuple[bytes, bytes]]:
        if limit == 0:
            return
        pin = self._open_pin()
        found = pin.view.scan(pin.seq, start, stop, reverse)
        for number, item in enumerate(found, 1):
            yield item
            if number == limit:
                return
            self._open_pin()


def _nothing() -> None:
    pass


new_snapshot = constructor(Snapshot)


@enable_ki_protection
def _scan_once(
    snapshot: Snapshot, start: bytes | None, stop: bytes | None, reverse: bool, limit: int | None
) -> Iterator[tuple[bytes, bytes]]:
    with snapshot:
        # `scan_once` takes this: a generator that was never begun would not let go either.
        yield b"", b""
        yield from snapshot.scan(start, stop, reverse=reverse, limit=limit)


def scan_once(
    snapshot: Snapshot, start: bytes | None, stop: bytes | None, reverse: bool, limit: int | None
) -> Iterator[tuple[bytes, bytes]]:
    """A scan of a snapshot that begins now and ends with the scan."""
    found = _scan_once(snapshot, start, stop, reverse, limit)
    next(found)
    return found


def stream_once(
    snapshot: Snapshot, start: bytes | None, stop: bytes | None, reverse: bool, limit: int | None
) -> PairStream:
    """A stream of a snapshot that begins when the stream is entered, and ends with it."""

    def scan() -> Iterator[tuple[bytes, bytes]]:
        return snapshot.__enter__().scan(start, stop, reverse=reverse, limit=limit)

    return new_pair_stream(scan, snapshot.close)


publish(Snapshot)
