"""Tables: parts of a database whose keys and values are Python's, not bytes.

Law: a description, no I/O and no state.  A table's keys are its name and then the key, encoded
by `_tuple`, so that no two tables overlap; its values are MessagePack by msgspec, or bytes as
they are.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from types import CoroutineType, UnionType
from typing import (
    Any,
    Final,
    Generic,
    Protocol,
    TypeGuard,
    TypeVar,
    Union,
    cast,
    final,
    get_origin,
    overload,
)

import msgspec

from ._exceptions import TableDecodeError
from ._exports import publish
from ._operations import KEY_BYTES_MAX, Operation, check_range
from ._transaction import Transaction
from ._tuple import POSITIVE, KeyCodec, KeyFormatError, after, encode_text
from ._util import check_bytes

D = TypeVar("D")
K = TypeVar("K")
V = TypeVar("V")

NAME_CHARACTERS_MAX: Final = 255


class Readable(Protocol):
    """What a table can be read from: a `Database`, `Transaction` or `Snapshot`."""

    @overload
    def get(self, key: bytes) -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: D) -> bytes | D: ...
    def get(self, key: bytes, default: object = None) -> object:
        """As `Database.get`."""
        ...

    def scan(
        self,
        start: bytes | None = None,
        stop: bytes | None = None,
        *,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """As `Database.scan`."""
        ...


class _NoDefault:
    pass


_NO_DEFAULT: Final = _NoDefault()


@final
class Table(Generic[K, V]):
    """A part of a database with typed keys and values::

        jobs = trio_wal.Table("jobs", key=tuple[int, str], value=Job)  # a module's constant

        async with db.transaction() as tx:
            jobs.put(tx, (7, "mail"), Job(...))
        for key, job in jobs.scan(db, prefix=(7,)):
            ...

    It does no I/O: it may be a constant of a module, used with any number of databases.
    Tables with different names never overlap.  Only keys that are put by hand and begin with
    its `prefix` could get in its way.

    Args:
      name: 1 to 255 characters, without NUL.  It stands in every key.
      key: `int`, `str`, `bytes`, `bool`, `uuid.UUID`, `datetime.datetime` (with a time zone; given
          back in UTC), or a tuple of these, as ``tuple[int, str]`` or ``tuple[int, ...]``.  The
          order of keys in the database is that of their values.
      value: what msgspec encodes (a ``msgspec.Struct``, dataclass, attrs class, containers of
          these, ...), or `bytes`, which are stored as they are.

    Raises:
      TypeError, ValueError: an argument is none of these.
    """

    __slots__ = ("_class", "_codec", "_decode", "_encode", "_heads", "_name", "_prefix")

    def __init__(self, name: str, *, key: type[K], value: type[V]) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {type(name).__name__}")
        if not 0 < len(name) <= NAME_CHARACTERS_MAX:
            raise ValueError(
                f"name must have 1 to {NAME_CHARACTERS_MAX} characters, not {len(name)}"
            )
        if "\0" in name:
            raise ValueError(f"name must not contain a NUL character: {name!r}")
        self._name = name
        self._prefix = encode_text(name, "name")
        if len(self._prefix) >= KEY_BYTES_MAX:
            raise ValueError(
                f"name has {len(self._prefix)} bytes, which leaves no room in a key of "
                f"{KEY_BYTES_MAX}"
            )
        self._codec = KeyCodec(key)
        # What stands before an int, by how many bytes it has; where there is room for all of them.
        heads = [self._prefix + code for code in POSITIVE]
        fits = len(heads[-1]) + len(POSITIVE) - 1 <= KEY_BYTES_MAX
        self._heads = heads if self._codec.int_only and fits else None
        self._class: type[Any] | None = None
        if value is bytes:
            self._encode = self._decode = None
        else:
            try:
                self._decode = msgspec.msgpack.Decoder(value).decode
            except TypeError as exc:
                raise TypeError(f"value: {exc}") from None
            self._encode = msgspec.msgpack.Encoder().encode
            origin = get_origin(value) or value
            # Of which of its types a value of a union is, msgspec finds out.
            if isinstance(origin, type) and origin not in (Union, UnionType):
                self._class = origin

    @property
    def name(self) -> str:
        """As given; part of every key's bytes in the database."""
        return self._name

    @property
    def prefix(self) -> bytes:
        """What every key of the table begins with in the database, for
        ``db.wait_changed(prefix=table.prefix)``."""
        return self._prefix

    def __repr__(self) -> str:
        return f"<trio_wal.Table {self._name!r}>"

    # -- keys and values --

    def encode_key(self, key: K) -> bytes:
        """The key as it stands in the database.

        Raises:
          TypeError: it is not of the table's type.
          ValueError: encoded it has over 511 bytes, or it has no encoding.
        """
        number: Any = key
        # As `_tuple` would, for the most usual type.
        if self._heads is not None and type(number) is int and 0 <= number < 1 << 64:
            width = (number.bit_length() + 7) >> 3
            return self._heads[width] + number.to_bytes(width, "big")
        try:
            data = self._prefix + self._codec.encode(key)
        except (TypeError, ValueError) as exc:
            raise type(exc)(f"table {self._name!r}: {exc}") from None
        if len(data) > KEY_BYTES_MAX:
            raise ValueError(
                f"table {self._name!r}: key has {len(data)} bytes with the table's name, over "
                f"{KEY_BYTES_MAX}: {_short(key)}"
            )
        return data

    def encode_value(self, value: V) -> bytes:
        """The value as it stands in the database.

        Raises:
          TypeError: it is not of the table's type, or has something in it that msgspec does
              not encode.
          ValueError: it has something in it that has no encoding, as an int over 64 bits.
        """
        if self._encode is None:
            return check_bytes(f"table {self._name!r}: value", value)
        kind = self._class
        # As type checkers have it, an int may stand for a float; but what would not be decoded as
        # what it is, as a bool for an int, is refused.
        if kind is not None and (
            not isinstance(value, (float, int) if kind is float else kind)
            or (kind in (int, float) and isinstance(value, bool))
        ):
            raise TypeError(
                f"table {self._name!r}: value must be of type {kind.__qualname__}, "
                f"not {type(value).__name__}"
            )
        try:
            return self._encode(value)
        except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as exc:
            error = TypeError if isinstance(exc, TypeError) else ValueError
            raise error(f"table {self._name!r}: value cannot be encoded: {exc}") from exc

    def _decode_value(self, key: K, data: bytes) -> V:
        if self._decode is None:
            return cast("V", data)
        try:
            return self._decode(data)
        except (ValueError, msgspec.MsgspecError) as exc:
            raise TableDecodeError(self._name, key, str(exc)) from exc

    def decode_key(self, data: bytes) -> K:
        """What `encode_key` made this of; such as the ``key`` of a `TransactionConflict`.

        Raises:
          TableDecodeError: it is no key of the table.
        """
        if not data.startswith(self._prefix):
            raise TableDecodeError(
                self._name, data, "this is not a key of the table: it begins differently"
            )
        try:
            return cast("K", self._codec.decode(data, len(self._prefix)))
        except KeyFormatError as exc:
            raise TableDecodeError(
                self._name, data, f"this is not a key of the table: {exc}"
            ) from exc

    def decode(self, operation: Operation) -> tuple[K, V | None] | None:
        """What a transaction did to the table: key and new value, or None for the value where it
        was deleted; for the operations that `Database.changes` gives.

        None where the operation is about another table.

        Raises:
          TableDecodeError: the operation is about the table, and its key or value does not decode.
        """
        if not operation.key.startswith(self._prefix):
            return None
        key = self.decode_key(operation.key)
        value = operation.value
        return key, None if value is None else self._decode_value(key, value)

    # -- reading --

    @overload
    def get(self, source: Readable, key: K) -> V | None: ...
    @overload
    def get(self, source: Readable, key: K, default: D) -> V | D: ...
    def get(self, source: Readable, key: K, default: object = None) -> object:
        """The value of ``key``, or ``default``.

        Args:
          source: a database, a transaction, a snapshot: whatever can be read.

        Raises:
          TableDecodeError: what is stored there is no value of the table.
        """
        data = source.get(self.encode_key(key))
        if data is None:
            return default
        # As `_decode_value` would, without a call.
        decode = self._decode
        try:
            if decode is not None:
                return decode(data)
        except (ValueError, msgspec.MsgspecError):
            return self._decode_value(key, data)
        except TypeError:
            if not _is_coroutine(data):
                raise
        given: Any = data
        if _is_coroutine(given):
            raise self._of_asyncio("get", source, given)
        return data

    def scan(
        self,
        source: Readable,
        start: K | tuple[Any, ...] | None = None,
        stop: K | tuple[Any, ...] | None = None,
        *,
        prefix: K | tuple[Any, ...] | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[K, V]]:
        """Keys and values with ``start <= key < stop``, in the order of keys.

        Args:
          source: a database, a transaction, a snapshot: whatever can be read.
          start, stop: keys; where keys are tuples also their first elements only.
          prefix: instead of the two: keys that are tuples and begin with these elements, or
              are `str` or `bytes` and begin with this.
          reverse: from the last to the first.
          limit: so many at most.

        Raises:
          TableDecodeError: what is stored is no key or value of the table.
        """
        first, end = self._range(start, stop, prefix)
        items: Any = source.scan(first, end, reverse=reverse, limit=limit)
        if _is_coroutine(items):
            raise self._of_asyncio("scan", source, items)
        return self._decoded(items)

    def _decoded(self, items: Iterator[tuple[bytes, bytes]]) -> Iterator[tuple[K, V]]:
        for data, value in items:
            key = self.decode_key(data)
            yield key, self._decode_value(key, value)

    def _range(self, start: Any, stop: Any, prefix: Any) -> tuple[bytes, bytes]:
        own = self._prefix
        if prefix is not None:
            if start is not None or stop is not None:
                raise ValueError("prefix cannot be combined with start or stop")
            data, whole = self._codec.encode_prefix(prefix)
            if whole:
                return own + data, after(own + data)
            first, end = check_range(None, None, own + data, None)
            assert first is not None
            assert end is not None
            return first, end
        first = own if start is None else own + self._codec.encode_bound("start", start)
        end = after(own) if stop is None else own + self._codec.encode_bound("stop", stop)
        return first, end

    # -- writing --

    def put(self, tx: Transaction, key: K, value: V) -> None:
        """Set ``key`` to ``value``: `Transaction.put`."""
        given: object = tx.put(self.encode_key(key), self.encode_value(value))  # type: ignore[func-returns-value]
        if _is_coroutine(given):
            raise self._no_transaction("put", tx, given)

    def insert(self, tx: Transaction, key: K, value: V) -> None:
        """Like `put`; `KeyExistsError` if the key is there."""
        tx.insert(self.encode_key(key), self.encode_value(value))

    def update(self, tx: Transaction, key: K, value: V) -> None:
        """Like `put`; `KeyError` if the key is absent."""
        try:
            tx.update(self.encode_key(key), self.encode_value(value))
        except KeyError:
            raise KeyError(key) from None

    def delete(self, tx: Transaction, key: K) -> None:
        """Remove ``key``; `KeyError` if it is absent: `Transaction.delete`."""
        try:
            given: object = tx.delete(self.encode_key(key))  # type: ignore[func-returns-value]
        except KeyError:
            raise KeyError(key) from None
        if _is_coroutine(given):
            raise self._no_transaction("delete", tx, given)

    def discard(self, tx: Transaction, key: K) -> bool:
        """Remove ``key``, if it is there; returns whether it was: `Transaction.discard`."""
        given = tx.discard(self.encode_key(key))
        if _is_coroutine(given):
            raise self._no_transaction("discard", tx, given)
        return given

    @overload
    def pop(self, tx: Transaction, key: K) -> V: ...
    @overload
    def pop(self, tx: Transaction, key: K, default: D) -> V | D: ...
    def pop(self, tx: Transaction, key: K, default: object = _NO_DEFAULT) -> object:
        """Remove ``key`` and return its value; ``default`` if it is absent, or `KeyError`
        without one.

        Raises:
          TableDecodeError: what is stored is no value of the table; it is still there.
        """
        encoded = self.encode_key(key)
        data: Any = tx.get(encoded)
        if data is None:
            if isinstance(default, _NoDefault):
                raise KeyError(key)
            return default
        if _is_coroutine(data):
            raise self._no_transaction("pop", tx, data)
        value = self._decode_value(key, data)
        given: object = tx.delete(encoded)  # type: ignore[func-returns-value]
        if _is_coroutine(given):
            raise self._no_transaction("pop", tx, given)
        return value

    def delete_range(
        self,
        tx: Transaction,
        start: K | tuple[Any, ...] | None = None,
        stop: K | tuple[Any, ...] | None = None,
        *,
        prefix: K | tuple[Any, ...] | None = None,
    ) -> int:
        """Remove the keys that `scan` would give, without decoding them; returns how many."""
        return tx.delete_range(*self._range(start, stop, prefix))

    def _no_transaction(
        self, method: str, tx: object, given: Coroutine[Any, Any, Any]
    ) -> TypeError:
        """A database has methods of these names, too: coroutines, which would do nothing."""
        given.close()  # so that nobody is warned of it as well
        kind = type(tx)
        if kind.__module__.endswith(".asyncio"):
            advice = f"await tx.call(table.{method}, ...) has one"
        else:
            advice = "async with db.transaction() as tx"
        return TypeError(
            f"table {self._name!r}: {method}() needs a trio_wal.Transaction, "
            f"not a {kind.__module__}.{kind.__qualname__}: {advice}"
        )

    def _of_asyncio(
        self, method: str, source: object, given: Coroutine[Any, Any, Any]
    ) -> TypeError:
        """There, ``get`` and ``scan`` are coroutines."""
        given.close()  # so that nobody is warned of it as well
        kind = type(source)
        return TypeError(
            f"table {self._name!r}: {method}() cannot read a {kind.__module__}.{kind.__qualname__}"
            f": await db.view(lambda snapshot: table.{method}(snapshot, ...))"
        )


def _is_coroutine(given: object) -> TypeGuard[Coroutine[Any, Any, Any]]:
    return isinstance(given, CoroutineType)


def _short(key: object) -> str:
    text = repr(key)
    return text if len(text) <= 60 else text[:57] + "..."


publish(Readable, Table)
