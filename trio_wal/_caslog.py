"""What a replicated log asks of its servers: append by compare-and-set, and read.

Law: values and protocols; no sockets, no threads, no trio.  A `CasLog` knows positions and
messages; records, LSNs and epochs are the business of `_replicated`, and so is what an answer that
never came means: every call here is one try, and says honestly what is known of its outcome.

Positions count messages from 1 on, without gaps, and are never used twice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Protocol
from uuid import UUID

import msgspec

from ._exports import publish
from ._util import MiB

BATCH_BYTES_MAX: Final = 64 * MiB
"""Of one batch, whatever the servers would take: they hold it in memory as a whole, and so does
whoever reads it."""

# -- values -----------------------------------------------------------------------------


class Entry(msgspec.Struct, frozen=True):
    """One message of the log."""

    position: int
    ident: str
    """What its writer called it; "" for a message that no trio-wal wrote."""
    data: bytes


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a log and its servers, at one moment; as old as the answer."""

    uuid: UUID
    """Made with the log."""
    first: int
    """The oldest position that is kept; ``last + 1`` where nothing is."""
    last: int
    bytes: int
    """What its messages take."""
    bytes_max: float = math.inf
    message_bytes_max: int
    """Of one piece."""
    pieces_max: int = 1
    """How many pieces one `CasLog.append` takes."""
    replicas: int = 1
    replicas_current: int = 1
    """How many of them are up to date."""
    assume_synced: bool = False
    """Whether the servers were not asked whether they sync each write."""


# -- errors: why a try has failed --------------------------------------------------------


class CasError(Exception):
    """A call came to nothing, or nobody knows; the text says why."""


class Conflict(CasError):
    """Refused: the log does not end where it should.  Nothing was written by this try.

    A server that has fallen behind says it too, and then it proves nothing.
    """

    def __init__(self, last: int) -> None:
        super().__init__(f"the log ends at position {last}")
        self.last = last
        """Where a server believes it to end: a hint where to try next."""


class Full(CasError):
    """Refused for want of space.  Nothing was written by this try."""


class Denied(CasError):
    """Refused for good: there is no permission."""


class Unsure(CasError):
    """No answer, or none that says anything: it may have been done, or may yet be."""


class Gone(CasError):
    """The position asked for has been dropped."""

    def __init__(self, first: int) -> None:
        super().__init__(f"the log begins at position {first}")
        self.first = first


# -- the log ----------------------------------------------------------------------------


class CasLog(Protocol):
    """A replicated stream of messages.  Its calls may be made by several tasks; each may be
    cancelled, and then nobody knows whether it was done."""

    name: str
    """For messages: an address."""

    async def describe(self) -> Description:
        """Raises `Unsure`."""
        ...

    async def last(self) -> int:
        """The last position: a hint, which may be old.  Raises `Unsure`."""
        ...

    async def append(self, after: int, pieces: Sequence[bytes], ident: str) -> int:
        """Append messages, all or none, right behind position ``after``; gives the last one's
        position.  One try.  Returned means: durable on a majority of the servers.

        Raises:
          Conflict, Full: nothing was written by this try.
          Denied, Unsure
        """
        ...

    async def ident_at(self, position: int) -> str | None:
        """The ident of the message there, from who knows it for certain: a majority agrees.
        None: there is none, as far as is known.  Raises `Unsure`."""
        ...

    async def read(self, position: int, max_bytes: int) -> list[Entry]:
        """Messages from ``position`` on, at least one if there is one.  From any replica, so that
        the newest may be missing.

        Raises:
          Gone: it has been dropped.
          Unsure
        """
        ...

    async def drop_before(self, position: int) -> None:
        """Drop the messages before a position.  Raises `Unsure`, `Denied`."""
        ...

    async def elsewhere(self) -> None:
        """Try another server from here on."""
        ...

    async def changed(self, seconds: float) -> None:
        """Wait until there may be more to read, or so many seconds have passed."""
        ...

    async def announce(self, owner: str) -> None:
        """Answer from here on whoever asks for the log's owner.  A courtesy: nothing is safe
        because of it."""
        ...

    async def owner(self) -> str | None:
        """Who answers as the log's owner; None: nobody did."""
        ...

    async def aclose(self) -> None:
        """Let go of everything; raises nothing."""
        ...

    def disown(self) -> None:
        """This is a forked child: sockets and threads are the parent's."""
        ...


class RemoteLog(ABC):
    """A log that servers keep: what `trio_wal.open_wal` and the like take instead of a path.

    `trio_wal.nats.Log` is one.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """For messages: without credentials."""

    unavailable_after: float
    """Seconds that a batch in flight may be without an outcome."""
    takeover: bool
    """Whether to open it also while another owner is alive."""

    @abstractmethod
    async def connect(self, *, create: bool) -> tuple[CasLog, Description]:
        """A connection to the log, which is as it should be, and what is known of it.

        Cancelled: no connection stays.

        Args:
          create: make it if it is missing.

        Raises:
          UnsuitableServersError: the servers are not what a log needs.
          PermissionError: they refuse to let this program in.
          LogUnavailableError: none of them answers.
          FileNotFoundError: there is no such log, and it is not to be made.
        """


publish(RemoteLog)
