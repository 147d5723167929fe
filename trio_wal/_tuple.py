"""Keys of tables <-> bytes whose order is the order of the keys.

Law: pure.  What is encoded decodes to an equal key of the same type, and ``a < b`` exactly where
``encode(a) < encode(b)``.  No element's encoding begins another's, so a tuple's is that of its
elements one after the other.

The format is FoundationDB's tuple layer (its ``design/tuple.md``), as far as types go that are
both there and here: a byte that says the type, then the value.  Times, which it leaves to its
users, have the first code that it keeps for them.

  01 ... 00     bytes; a NUL within is 00 FF
  02 ... 00     str, in UTF-8; the same
  05 ... 00     a tuple in a tuple
  0C - 13       int below zero of 8 to 1 bytes: what it lacks to 256 ** n - 1, big-endian
  14            zero
  15 - 1C       int above zero of 1 to 8 bytes, big-endian
  0B, 1D        longer ones; next comes a byte with their length, for 0B its complement
  26, 27        False, True
  30            UUID, 16 bytes
  40            datetime: microseconds from 1970 on in UTC plus 2 ** 63, 8 bytes, big-endian
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any, Final, Protocol, cast, final, get_args, get_origin

from ._util import check_bytes

_ZERO: Final = 0x14
_TUPLE: Final = b"\x05"
_END: Final = b"\x00"
INT_BYTES_MAX: Final = 255
"""Of an int's magnitude."""
EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
_FIRST: Final = datetime.min.replace(tzinfo=timezone.utc) - EPOCH
_LAST: Final = datetime.max.replace(tzinfo=timezone.utc) - EPOCH
_MICROSECOND: Final = timedelta(microseconds=1)
_SIGN: Final = 1 << 63
POSITIVE: Final = [bytes((_ZERO + width,)) for width in range(9)]
"""Before an int of so many bytes that is not below zero."""
WHOLE: Final = b"\xff"
"""Above whatever may follow what is encoded: see `after`."""


class KeyFormatError(ValueError):
    """The bytes are no key of this type."""


class Element(Protocol):
    """How the values of one type are encoded."""

    name: str
    """For messages: what a value must be."""

    def encode(self, value: Any, where: str) -> bytes:
        """Raises `TypeError` or `ValueError` that name ``where``."""
        ...

    def decode(self, data: bytes, at: int) -> tuple[Any, int]:
        """The value at a place, and where it ends; raises `KeyFormatError`."""
        ...


def _wrong(where: str, name: str, value: object) -> TypeError:
    return TypeError(f"{where} must be {name}, not {type(value).__name__}")


def _take(data: bytes, at: int, count: int) -> bytes:
    taken = data[at : at + count]
    if len(taken) != count:
        raise KeyFormatError(f"cut short at byte {at}")
    return taken


@final
class _Int:
    name = "an int"

    def encode(self, value: Any, where: str) -> bytes:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(where, self.name, value)
        width = (value.bit_length() + 7) >> 3
        if value >= 0:
            if width < len(POSITIVE):
                return POSITIVE[width] + value.to_bytes(width, "big")
            self._check(width, where)
            return bytes((0x1D, width)) + value.to_bytes(width, "big")
        if width > 8:
            self._check(width, where)
            head = bytes((0x0B, width ^ 0xFF))
        else:
            head = bytes((_ZERO - width,))
        return head + (value + (1 << 8 * width) - 1).to_bytes(width, "big")

    def _check(self, width: int, where: str) -> None:
        if width > INT_BYTES_MAX:
            raise ValueError(f"{where} is an int of {width} bytes, over {INT_BYTES_MAX}")

    def decode(self, data: bytes, at: int) -> tuple[int, int]:
        code = _take(data, at, 1)[0]
        start = at + 1
        negative = code < _ZERO
        if code in (0x0B, 0x1D):
            width = _take(data, start, 1)[0] ^ (0xFF if negative else 0)
            start += 1
            canonical = width > 8
        elif 0x0C <= code <= 0x1C:
            width = abs(code - _ZERO)
            canonical = True
        else:
            raise KeyFormatError(f"an int is due at byte {at}, not {code:#04x}")
        value = int.from_bytes(_take(data, start, width), "big")
        if negative:
            value -= (1 << 8 * width) - 1
        if not canonical or (value.bit_length() + 7) >> 3 != width:
            raise KeyFormatError(f"an int at byte {at} has more bytes than it needs")
        return value, start + width


def _escaped(code: bytes, data: bytes) -> bytes:
    return code + data.replace(b"\x00", b"\x00\xff") + _END


def _unescape(data: bytes, at: int, code: int, name: str) -> tuple[bytes, int]:
    if data[at : at + 1] != bytes((code,)):
        raise KeyFormatError(f"{name} is due at byte {at}")
    end = at + 1
    while True:
        end = data.find(b"\x00", end)
        if end < 0:
            raise KeyFormatError(f"{name} at byte {at} has no end")
        if data[end + 1 : end + 2] != b"\xff":
            return data[at + 1 : end].replace(b"\x00\xff", b"\x00"), end + 1
        end += 2


def encode_text(text: str, where: str) -> bytes:
    """A str; raises `ValueError`."""
    try:
        data = text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"{where} has half of a surrogate pair in it: {exc}") from None
    return _escaped(b"\x02", data)


@final
class _Bytes:
    name = "bytes"

    def encode(self, value: Any, where: str) -> bytes:
        return _escaped(b"\x01", check_bytes(where, value))

    def decode(self, data: bytes, at: int) -> tuple[bytes, int]:
        return _unescape(data, at, 0x01, self.name)


@final
class _Str:
    name = "a str"

    def encode(self, value: Any, where: str) -> bytes:
        if not isinstance(value, str):
            raise _wrong(where, self.name, value)
        return encode_text(value, where)

    def decode(self, data: bytes, at: int) -> tuple[str, int]:
        text, end = _unescape(data, at, 0x02, self.name)
        try:
            return text.decode(), end
        except UnicodeDecodeError as exc:
            raise KeyFormatError(f"no text at byte {at}: {exc}") from None


@final
class _Bool:
    name = "True or False"

    def encode(self, value: Any, where: str) -> bytes:
        if not isinstance(value, bool):
            raise _wrong(where, self.name, value)
        return b"\x27" if value else b"\x26"

    def decode(self, data: bytes, at: int) -> tuple[bool, int]:
        code = _take(data, at, 1)[0]
        if code not in (0x26, 0x27):
            raise KeyFormatError(f"a bool is due at byte {at}, not {code:#04x}")
        return code == 0x27, at + 1


@final
class _Uuid:
    name = "a uuid.UUID"

    def encode(self, value: Any, where: str) -> bytes:
        if not isinstance(value, uuid.UUID):
            raise _wrong(where, self.name, value)
        return b"\x30" + value.bytes

    def decode(self, data: bytes, at: int) -> tuple[uuid.UUID, int]:
        if _take(data, at, 1) != b"\x30":
            raise KeyFormatError(f"a UUID is due at byte {at}")
        return uuid.UUID(bytes=_take(data, at + 1, 16)), at + 17


@final
class _Datetime:
    name = "a datetime with a time zone"

    def encode(self, value: Any, where: str) -> bytes:
        if not isinstance(value, datetime):
            raise _wrong(where, self.name, value)
        if value.utcoffset() is None:
            raise ValueError(
                f"{where} is a datetime without a time zone, of which nobody can tell when it is: "
                "give it one, as with tzinfo=datetime.timezone.utc"
            )
        since = value - EPOCH
        if not _FIRST <= since <= _LAST:
            raise ValueError(f"{where} is stored in UTC, where it is outside the range of datetime")
        return b"\x40" + (since // _MICROSECOND + _SIGN).to_bytes(8, "big")

    def decode(self, data: bytes, at: int) -> tuple[datetime, int]:
        if _take(data, at, 1) != b"\x40":
            raise KeyFormatError(f"a datetime is due at byte {at}")
        microseconds = int.from_bytes(_take(data, at + 1, 8), "big") - _SIGN
        try:
            return EPOCH + timedelta(microseconds=microseconds), at + 9
        except OverflowError:
            raise KeyFormatError(f"no valid date and time at byte {at}") from None


@final
class _Nested:
    """A tuple in a tuple."""

    name = "a tuple"

    def __init__(self, elements: Elements) -> None:
        self._elements = elements

    def encode(self, value: Any, where: str) -> bytes:
        return _TUPLE + self._elements.encode(value, where) + _END

    def decode(self, data: bytes, at: int) -> tuple[tuple[Any, ...], int]:
        if _take(data, at, 1) != _TUPLE:
            raise KeyFormatError(f"a tuple is due at byte {at}")
        values, end = self._elements.decode(data, at + 1, _END)
        if _take(data, end, 1) != _END:
            raise KeyFormatError(f"a tuple's end is due at byte {end}")
        return values, end + 1


@final
class Elements:
    """The elements of a tuple, without what stands around them."""

    def __init__(self, elements: list[Element], *, repeated: bool) -> None:
        self._elements = elements
        self._repeated = repeated
        """Whether the only one comes any number of times."""

    def encode(self, value: Any, where: str, *, partly: bool = False) -> bytes:
        """
        Args:
          partly: accept the first elements only.
        """
        if not isinstance(cast("object", value), tuple):
            raise _wrong(where, "a tuple", value)
        parts: tuple[Any, ...] = value
        elements = self._elements
        if self._repeated:
            elements = elements * len(parts)
        elif len(parts) > len(elements) or (len(parts) < len(elements) and not partly):
            most = "at most " if partly else ""
            raise ValueError(f"{where} must have {most}{len(elements)} elements, not {len(parts)}")
        return b"".join(
            [
                element.encode(part, f"{where}[{number}]")
                for number, (element, part) in enumerate(zip(elements, parts, strict=False))
            ]
        )

    def decode(self, data: bytes, at: int, until: bytes = b"") -> tuple[tuple[Any, ...], int]:
        """
        Args:
          until: what comes after the last element, where their number is open.
        """
        values: list[Any] = []
        if self._repeated:
            while data[at : at + 1] != until:
                value, at = self._elements[0].decode(data, at)
                values.append(value)
        else:
            for element in self._elements:
                value, at = element.decode(data, at)
                values.append(value)
        return tuple(values), at


_SINGLE: Final[dict[object, Callable[[], Element]]] = {
    int: _Int,
    str: _Str,
    bytes: _Bytes,
    bool: _Bool,
    uuid.UUID: _Uuid,
    datetime: _Datetime,
}
TYPES_TEXT: Final = "int, str, bytes, bool, uuid.UUID, datetime, or a tuple of these"


def _element(kind: Any, where: str) -> Element:
    while hasattr(kind, "__supertype__"):  # a NewType
        kind = kind.__supertype__
    if get_origin(kind) is tuple:
        return _Nested(_elements(kind, where))
    made = _SINGLE.get(kind) if isinstance(kind, type) else None
    if made is None:
        raise TypeError(f"{where} must be {TYPES_TEXT}, not {kind!r}")
    return made()


def _elements(kind: Any, where: str) -> Elements:
    parts = get_args(kind)
    if not parts:
        raise TypeError(f"{where} must say what the tuple contains, for example tuple[int, str]")
    if len(parts) == 2 and parts[1] is Ellipsis:
        return Elements([_element(parts[0], f"{where}[...]")], repeated=True)
    return Elements(
        [_element(part, f"{where}[{number}]") for number, part in enumerate(parts)], repeated=False
    )


def after(data: bytes) -> bytes:
    """Above everything that begins with whole elements ``data``: no element begins with FF."""
    return data + WHOLE


@final
class KeyCodec:
    """The keys of one type."""

    def __init__(self, kind: Any) -> None:
        """
        Raises:
          TypeError: keys of this type cannot be encoded.
        """
        while hasattr(kind, "__supertype__"):
            kind = kind.__supertype__
        if kind is tuple:
            raise TypeError("key must say what the tuple contains, for example tuple[int, str]")
        self._elements = _elements(kind, "key") if get_origin(kind) is tuple else None
        self._single = None if self._elements is not None else _element(kind, "key")
        self.int_only: bool = kind is int

    def encode(self, key: Any) -> bytes:
        """Raises `TypeError` or `ValueError` that name ``key``."""
        if self._single is not None:
            return self._single.encode(key, "key")
        assert self._elements is not None
        return self._elements.encode(key, "key")

    def decode(self, data: bytes, at: int) -> Any:
        """The key from ``at`` to the end; raises `KeyFormatError`."""
        if self._single is not None:
            key, end = self._single.decode(data, at)
        else:
            assert self._elements is not None
            key, end = self._elements.decode(data, at)
        if end != len(data):
            raise KeyFormatError(f"{len(data) - end} bytes after its end")
        return key

    def encode_bound(self, name: str, key: Any) -> bytes:
        """As `encode`, for the end of a range: of a tuple also the first elements only."""
        if self._single is not None:
            return self._single.encode(key, name)
        assert self._elements is not None
        return self._elements.encode(key, name, partly=True)

    def encode_prefix(self, prefix: Any) -> tuple[bytes, bool]:
        """What the keys have in common that start with this: of a tuple the first elements, of
        text or bytes the first of it; and whether it ends with a whole element."""
        if self._elements is not None:
            return self._elements.encode(prefix, "prefix", partly=True), True
        if not isinstance(self._single, (_Str, _Bytes)):
            raise TypeError("prefix is for keys that are tuples, str or bytes")
        return self._single.encode(prefix, "prefix")[: -len(_END)], False
