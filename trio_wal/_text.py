"""Text on its way out: to a terminal, into a log, into the text of an error.

Law: pure.  A file name, a key or a record may hold anything; what leaves the package to be
read by people holds nothing that a terminal obeys, that turns text around, or that begins
another line.  Whatever programs read (attributes of errors, records) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_REMEMBERED: Final = 0x10000
"""Code points below this are looked up once: the table has a bound."""


def _shown(code: int) -> str:
    """A character that is not printable, by its number."""
    if code < 0x80:
        return f"\\x{code:02x}"
    if 0xDC80 <= code <= 0xDCFF:
        # A byte that is no UTF-8, as `os.fsdecode` gives it (PEP 383).
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _in_json(code: int) -> str:
    """A character by its number, as JSON writes it: in UTF-16 (RFC 8259, section 7)."""
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


class _Table(dict[int, str]):
    """For `str.translate`: what is printable stays, all else becomes what ``show`` says."""

    def __init__(self, show: Callable[[int], str]) -> None:
        self._show = show

    def __missing__(self, code: int) -> str:
        character = chr(code)
        text = character if character.isprintable() else self._show(code)
        if code < _REMEMBERED:
            self[code] = text
        return text


class _Surrogates(dict[int, str]):
    """For `str.translate`: only what has no place in UTF-8 is shown by its number."""

    def __missing__(self, code: int) -> str:
        return _shown(code) if 0xD800 <= code <= 0xDFFF else chr(code)


_TEXT: Final = _Table(_shown)
_JSON: Final = _Table(_in_json)
_UNICODE: Final = _Surrogates()


def printable(text: str) -> str:
    r"""``text`` with everything that is not printable by its number.

    ``\xNN`` is an ASCII control character, or a byte of a file name that is no UTF-8;
    ``\uNNNN`` and ``\UNNNNNNNN`` are characters: other controls, line and paragraph
    separators, marks that turn text around, spaces other than the usual one.
    """
    return text if text.isprintable() else text.translate(_TEXT)


def encodable(text: str) -> str:
    r"""``text`` as UTF-8 can hold it: a byte of a file name that is no UTF-8 as ``\xNN``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.translate(_UNICODE)
    return text


def plain_json(line: bytes) -> bytes:
    r"""The same JSON with everything that is not printable as ``\uNNNN``.

    ``line`` is JSON in UTF-8, without newlines: what is not printable is within strings.
    """
    if line.isascii() and b"\x7f" not in line:
        return line
    text = line.decode()
    return line if text.isprintable() else text.translate(_JSON).encode()
