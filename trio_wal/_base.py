"""What keeps a database's committed state, as the rest of the database knows it.

Law: values and protocols; no file, no lmdb.  `_store` has LMDB behind them, `trio_wal.testing`
a dict in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NoReturn, Protocol, runtime_checkable

import attrs

from ._exceptions import CorruptLogError
from ._places import Place

StoreCheckLevel = Literal["child", "auto"]
Progress = Callable[[int, int], None]
"""Called with the bytes that are checked and the bytes that there are."""


class MapFull(Exception):
    """The store has no more room in its map, or a write has failed and its pages must not be
    written again before they were forgotten; grow it while nobody reads, and try again."""


@attrs.frozen
class StoreState:
    """To which log a store belongs, and how much of it it holds."""

    log_uuid: bytes
    lsn: int
    places: Mapping[str, Place] = attrs.field(factory=dict[str, Place])
    """Of the database's consumers, as of that LSN."""
    commit_lsn: int = attrs.field(default=attrs.Factory(lambda self: self.lsn, takes_self=True))
    """The newest record up to that LSN that does more than to move places."""


class ReadTransaction(Protocol):
    """The store as it was when this began."""

    def get(self, key: bytes) -> bytes | None: ...

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """``start <= key < stop`` in the order of keys, or backwards."""
        ...

    def explain(self, exc: BaseException) -> None:
        """Raises what an error of `get` means; returns where that is no error of the store."""
        ...

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        """The key before, whether this one is there, and the key after it."""
        ...

    def close(self) -> None: ...


class Readable(Protocol):
    """What can be read as of a moment."""

    def read(self) -> ReadTransaction: ...


class Store(Readable, Protocol):
    """Committed state on disk."""

    path: str

    def apply(self, items: Iterable[tuple[bytes, bytes | None]], state: StoreState | None) -> None:
        """Write a piece of a checkpoint, durably, all or nothing; ``state`` with the last.

        Raises:
          MapFull
          CorruptLogError: the file is damaged.
          OSError: a write failed; the next call raises `MapFull`.
        """
        ...

    def crowded(self, needed: int) -> bool:
        """Whether half of the map is used, or would be with so many bytes more; or else `grow`
        is due."""
        ...

    def grow(self) -> None:
        """Make the map larger, or begin anew after a failed write; nothing may be reading."""
        ...

    def copy(self, path: str) -> None:
        """A consistent copy into a new directory, without what was deleted."""
        ...

    def statistics(self) -> tuple[int, int]:
        """(keys, bytes of the file)."""
        ...

    def close(self) -> None: ...


class StoreReader(Protocol):
    """Committed state on disk that another process may be writing."""

    def read(self) -> tuple[ReadTransaction, StoreState | None]:
        """The store at this moment, and what it says of itself; None: it has nothing yet.

        Of a checkpoint under way it may have more than its LSN says: of commits that were
        durable at this moment.

        Raises:
          CorruptLogError, OSError
        """
        ...

    def size(self) -> int:
        """Bytes of the file."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Stores(Protocol):
    """Where the stores of databases are.  Files may have a kind of store of their own."""

    def inspect_store(self, path: str) -> StoreState | None:
        """What a store says of itself, without writing; None: there is none."""
        ...

    def check_store(self, path: str, how: StoreCheckLevel, progress: Progress | None) -> None:
        """Raises `CorruptLogError` with the first of a store's defects."""
        ...

    def open_store(self, path: str, map_size: int) -> Store:
        """Open a store, which is created if it is missing."""
        ...

    def open_store_reader(self, path: str) -> StoreReader:
        """Read a store that another process may be writing; nothing is written but LMDB's table
        of who reads.  It may not be there yet."""
        ...

    def remove_store(self, path: str) -> None:
        """Remove a store that nothing was ever committed to."""
        ...

    def set_store_aside(self, path: str, dest: str) -> None:
        """Move a store, as it is, to where nothing stands yet on the same file system; durable
        on return."""
        ...


class Unreadable:
    """In the place of a read transaction that could not be had: whoever reads is told."""

    def __init__(self, error: OSError | CorruptLogError) -> None:
        self._error = error

    def _again(self) -> NoReturn:
        """A traceback belongs to one: the same error for one more, with the same cause."""
        error = self._error
        cause = error.__cause__ or error
        if isinstance(error, CorruptLogError):
            raise CorruptLogError(*error.args) from cause
        raise OSError(error.errno, error.strerror, error.filename) from cause

    def get(self, key: bytes) -> bytes | None:
        """Raises `OSError` or `CorruptLogError`."""
        self._again()

    def items(
        self, start: bytes | None, stop: bytes | None, reverse: bool
    ) -> Iterator[tuple[bytes, bytes]]:
        """Raises `OSError` or `CorruptLogError`."""
        self._again()

    def explain(self, exc: BaseException) -> None:
        pass

    def neighbours(self, key: bytes) -> tuple[bytes | None, bool, bytes | None]:
        """Raises `OSError` or `CorruptLogError`."""
        self._again()

    def close(self) -> None:
        pass
