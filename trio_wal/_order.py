"""Keys in order: the one place that knows sortedcontainers, which has no types.

Law: pure; typed here once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any, cast, final

_sortedcontainers: Any = importlib.import_module("sortedcontainers")


@final
class SortedKeys:
    """Byte strings, ascending; duplicates are kept and harmless."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        self._keys: Any = _sortedcontainers.SortedList(keys)

    def update(self, keys: Iterable[bytes]) -> None:
        self._keys.update(keys)

    def between(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> Iterator[bytes]:
        """``start <= key < stop``, or backwards; None is no bound."""
        found = self._keys.irange(start, stop, inclusive=(True, False), reverse=reverse)
        return cast("Iterator[bytes]", found)
