"""Which log this is, and which of its histories: uuid, epoch, bookmark.

Law: values only.  An LSN names a record within one history.  Where a history ends and another
one goes on from an older place (``truncate_after``, a backup that is put to use), the log gets
a new epoch, and remembers after which LSN that parted from the one before.  So an LSN together
with its epoch, a bookmark, says whether what its owner has seen is still in the log.

An epoch grows by a counter in its upper half; its lower half is random, so that two copies of
one log, which part from the same history at the same place, never have the same epoch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, final

import attrs
import msgspec

from ._exports import publish
from ._util import check_int

EPOCH_RANDOM_BITS: Final = 32
EPOCH_MAX: Final = (1 << 63) - 1
PARTINGS_MAX: Final = 224
"""How many a log remembers: with them, ``log.meta`` fills 4 KiB.  A bookmark of an older epoch is
refused, because nobody can tell any more."""
UNPARTED: Final = 1 << 63
"""Above every LSN."""

_TEXT: Final = re.compile(r"(0|[1-9][0-9]{0,18})@(0|[1-9a-f][0-9a-f]{0,15})", re.ASCII)


def _not_negative(_: object, field: Any, value: Any) -> None:
    check_int(field.name, value, 0, EPOCH_MAX)


@final
@attrs.frozen
class Bookmark:
    """A place in a log's history: what a consumer of a log keeps.

    ``str(bookmark)`` is short and has no spaces, as ``"1234@5f3a09"``: the LSN, and the epoch in
    hexadecimal digits.
    """

    lsn: int = attrs.field(validator=_not_negative)
    """The last record that was seen; 0: none yet."""
    epoch: int = attrs.field(validator=_not_negative)
    """The epoch of the log when that record was seen."""

    def __str__(self) -> str:
        return f"{self.lsn}@{self.epoch:x}"

    @classmethod
    def parse(cls, text: str) -> Bookmark:
        """The bookmark that ``str`` made this text of.

        Raises:
          TypeError: ``text`` is no `str`.
          ValueError: it is no bookmark.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"text must be a bookmark, such as '1234@5f3a09', not {text!r}")
        return cls(int(match[1]), int(match[2], 16))


class Parting(msgspec.Struct, frozen=True):
    """The beginning of an epoch."""

    epoch: int
    after_lsn: int
    """The last record that it shares with the epoch before it."""


History = tuple[Parting, ...]
"""Epochs of a log, ascending; the last one is today's.  Empty: there is only epoch 0."""

_BEGINNING: Final[History] = (Parting(0, 0),)


def epoch_of(history: History) -> int:
    """Today's epoch."""
    return history[-1].epoch if history else 0


def generation(epoch: int) -> int:
    """How often a log had begun a new epoch."""
    return epoch >> EPOCH_RANDOM_BITS


def common_lsn(history: History, epoch: int) -> int | None:
    """Up to which LSN an epoch's records are this log's; None: it is not in its history, or
    forgotten.  `UNPARTED` for today's epoch."""
    known = history or _BEGINNING
    for index, parting in enumerate(known):
        if parting.epoch == epoch:
            return min((later.after_lsn for later in known[index + 1 :]), default=UNPARTED)
    return None


def branch(history: History, after_lsn: int, random: bytes, newest: int = 0) -> History:
    """The history with a new epoch that begins after an LSN.

    Args:
      random: four bytes.
      newest: an epoch of another history, above which it is, too.
    """
    known = history or _BEGINNING
    count = generation(max(epoch_of(known), newest)) + 1
    low = int.from_bytes(random, "little") & ((1 << EPOCH_RANDOM_BITS) - 1)
    return remembered((*known, Parting(count << EPOCH_RANDOM_BITS | low, after_lsn)))


def remembered(history: History) -> History:
    """As much as a log remembers of it."""
    return history[-PARTINGS_MAX:]


def recalled(history: History, others: Iterable[History]) -> History:
    """The history with the epochs that it has forgotten, of which what it was before may tell.

    Args:
      others: of which some are what it was before.
    """
    if not history or not history[0].epoch:
        return history
    before: dict[int, History] = {}
    for other in others:
        for index, parting in enumerate(other):
            if index > len(before.get(parting.epoch, ())):
                before[parting.epoch] = other[:index]
    # Epochs ascend: what somebody else has written there must not lead in a circle.
    while (older := before.get(history[0].epoch)) and older[0].epoch < history[0].epoch:
        history = (*older, *history)
    return history


publish(Bookmark)
