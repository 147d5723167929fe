"""Units and argument checks that every band may use.

Law: no I/O, no trio; a check either returns the value it was given or raises a
`TypeError` or `ValueError` that names the parameter.
"""

from __future__ import annotations

import math
from os import PathLike, fspath
from typing import TYPE_CHECKING, Final, NoReturn

KiB: Final = 1024
MiB: Final = 1024 * KiB


def align_up(number: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is not below ``number``."""
    return -(-number // unit) * unit


INT_MAX: Final = (1 << 64) - 1
"""The largest LSN that the format can hold; and more than anybody has of anything."""
SECONDS_MAX: Final = 1e10
"""Three hundred years."""


def _shown(value: float) -> str:
    """A number in a message; of more than 4,300 digits Python makes no text."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    return str(value)


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as an `int` within ``low <= value <= high``; bools are refused."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if high is None and value > INT_MAX:
        high = INT_MAX
    if value < low or (high is not None and value > high):
        above = "" if high is None else f" and at most {high}"
        raise ValueError(f"{name} must be at least {low}{above}, not {_shown(value)}")
    return value


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def check_int_or_inf(name: str, value: object, low: int) -> int | float:
    """Like `check_int`, and `math.inf` passes."""
    if isinstance(value, float) and value == math.inf:
        return value
    if isinstance(value, float):
        raise TypeError(f"{name} must be an int or math.inf, not {value!r}")
    return check_int(name, value, low)


def check_seconds(name: str, value: object, low: float = 0.0) -> float:
    """``value`` as a number of seconds, at least ``low`` and not absurdly many."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    if not low <= value <= SECONDS_MAX:
        raise ValueError(
            f"{name} must be at least {low:g} and at most {SECONDS_MAX:g} seconds, "
            f"not {_shown(value)}"
        )
    return float(value)


def check_share(name: str, value: object, high: float) -> float:
    """``value`` as a part of a whole, 0 to ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not 0 <= value <= high:
        raise ValueError(f"{name} must be at least 0 and at most {high:g}, not {_shown(value)}")
    return float(value)


def check_bytes(name: str, value: object) -> bytes:
    """``value`` as `bytes`, not as a subclass, which not every encoder takes.

    A mutable buffer is refused: it could change while it waits.  What a subclass says of itself,
    of its length for one, is of no account.
    """
    if type(value) is bytes:
        return value
    if not isinstance(value, bytes):
        raise TypeError(f"{name} must be bytes, not {type(value).__name__}")
    return bytes(memoryview(value))


def check_path(path: str | PathLike[str]) -> str:
    """A path as a `str`."""
    try:
        text = fspath(path)
    except TypeError:
        raise TypeError(f"path must be a str or os.PathLike, not {type(path).__name__}") from None
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or os.PathLike of str, not {type(text).__name__}")
    if not text or "\0" in text:
        raise ValueError(f"path must be a non-empty path without NUL characters, not {text!r}")
    return text


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, not {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


class Unentered:
    """What an ``open_*()`` returns; says so where its ``async with`` was forgotten."""

    _call: str
    """How it was called."""

    if not TYPE_CHECKING:  # for a checker there is none of this

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):  # asked for by Python, not by a user
                raise AttributeError(name)
            raise AttributeError(
                f"{self._call}() gives something to enter: async with {self._call}(...); "
                f"{name!r} belongs to what that gives"
            )

        def __enter__(self) -> NoReturn:
            raise TypeError(f"{self._call}() is entered by async with, not by with")

        def __exit__(self, *_: object) -> None:
            """Python looks for it before it calls ``__enter__``."""
