"""Which whole segments a log may drop by itself.

Law: a policy only looks at values; dropping is the log's business.  The segment
being written is never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, final

import attrs

from ._exports import publish
from ._util import check_int, check_seconds


def _at_least_one(_: object, __: Any, value: Any) -> None:
    check_int("count", value, 1)


def _not_negative(_: object, __: Any, value: Any) -> None:
    check_int("count", value, 0)


def _seconds(_: object, __: Any, value: Any) -> None:
    check_seconds("seconds", value)


class Sealed(Protocol):
    """What a policy may know of a sealed segment."""

    @property
    def bytes(self) -> int: ...
    @property
    def last_time_us(self) -> int: ...


class Retention:
    """How much of the log to keep.  ``a & b`` keeps what both keep; ``a | b`` what either keeps.

    Whole segments are dropped, oldest first, when a segment is finished, when the log
    is opened, and when a `KeepFor` runs out; so a little more than asked for is kept.
    """

    def droppable(self, sealed: Sequence[Sealed], active_bytes: int, now_us: int) -> int:
        """How many of the oldest ``sealed`` segments need not be kept."""
        raise NotImplementedError

    def next_change_us(self, sealed: Sequence[Sealed]) -> int | None:
        """When time alone will make the oldest segment droppable; None: never."""
        return None

    def __and__(self, other: object) -> Retention:
        return _Both(self, other) if isinstance(other, Retention) else NotImplemented

    def __or__(self, other: object) -> Retention:
        return _Either(self, other) if isinstance(other, Retention) else NotImplemented


@final
@attrs.frozen
class KeepAll(Retention):
    """Drop nothing but what ``truncate_before`` drops."""

    def droppable(self, sealed: Sequence[Sealed], active_bytes: int, now_us: int) -> int:
        return 0


@final
@attrs.frozen
class KeepSegments(Retention):
    """Keep the newest ``count`` segments, including the one being written."""

    count: int = attrs.field(validator=_at_least_one)

    def droppable(self, sealed: Sequence[Sealed], active_bytes: int, now_us: int) -> int:
        return max(0, len(sealed) + 1 - self.count)


@final
@attrs.frozen
class KeepFor(Retention):
    """Keep every record for at least ``seconds`` after it was written."""

    seconds: float = attrs.field(validator=_seconds)

    def droppable(self, sealed: Sequence[Sealed], active_bytes: int, now_us: int) -> int:
        oldest = now_us - int(self.seconds * 1e6)
        count = 0
        for segment in sealed:
            if segment.last_time_us >= oldest:
                break
            count += 1
        return count

    def next_change_us(self, sealed: Sequence[Sealed]) -> int | None:
        return sealed[0].last_time_us + int(self.seconds * 1e6) + 1 if sealed else None


@final
@attrs.frozen
class KeepBytes(Retention):
    """Keep at least the newest ``count`` bytes of segment files."""

    count: int = attrs.field(validator=_not_negative)

    def droppable(self, sealed: Sequence[Sealed], active_bytes: int, now_us: int) -> int:
        kept = active_bytes
        for number in range(len(sealed), 0, -1):
            if kept >= self.count:
                return number
            kept += sealed[number - 1].bytes
        return 0


@attrs.frozen
class _Pair(Retention):
    first: Retention
    second: Retention

    def next_change_us(self, sealed: Sequence[Sealed]) -> int | None:
        times = [policy.next_change_us(sealed) for policy in self._policies]
        return min((time for time in times if time is not None), default=None)

    @property
    def _policies(self) -> tuple[Retention, Retention]:
        return self.first, self.second


@final
class _Both(_Pair):
    __slots__ = ()

    def droppable(self, sealed: Sequence[Sealed], active_bytes: int, now_us: int) -> int:
        return max(policy.droppable(sealed, active_bytes, now_us) for policy in self._policies)


@final
class _Either(_Pair):
    __slots__ = ()

    def droppable(self, sealed: Sequence[Sealed], active_bytes: int, now_us: int) -> int:
        return min(policy.droppable(sealed, active_bytes, now_us) for policy in self._policies)


publish(KeepAll, KeepBytes, KeepFor, KeepSegments, Retention)
