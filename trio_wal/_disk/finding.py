"""What is wrong with a log's files, and who is told of it.

Law: values.  Whoever judges files tells a reporter of each thing that is wrong, in order, and
goes on as well as it can if that returns.  What a reporter does is up to it: opening refuses,
`verify` lists, a reader remembers the first one and gives what is whole before it.  So `verify`
lists what opening would refuse, because it is the same judge.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

import attrs

from trio_wal._exceptions import CorruptLogError, UnsupportedFormatError


@attrs.frozen
class Finding:
    """One thing that is wrong, and where."""

    path: str
    offset: int
    """Byte offset in the file; 0 where the file as a whole is wrong."""
    reason: str
    first_lsn: int | None = None
    """First of the records that cannot be read because of it; None: none, or not known."""
    last_lsn: int | None = None
    """The last of them; None with a ``first_lsn``: to the end of the log."""
    cause: Exception | None = attrs.field(default=None, eq=False, repr=False)
    """The error itself, where it says more than that something is damaged."""
    harmless: bool = attrs.field(default=False, eq=False, repr=False)
    """Whether a log that has it is opened all the same: nothing is lost by it."""

    @property
    def damage(self) -> CorruptLogError:
        return CorruptLogError(self.path, self.offset, self.reason)

    @property
    def error(self) -> Exception:
        """What to raise of it."""
        return self.cause or self.damage


TOLD: Final = attrs.filters.exclude("cause", "harmless")
"""For `attrs.asdict`: what is said of findings outside of this package."""

Report = Callable[[Finding], None]
"""Is told of each thing that is wrong; what it raises ends the look."""


def refuse(finding: Finding) -> None:
    """The reporter of whoever cannot go on after damage.

    Raises:
      CorruptLogError, UnsupportedFormatError, OSError
    """
    if not finding.harmless:
        raise finding.error


def finding_of(error: CorruptLogError | UnsupportedFormatError | OSError, path: str) -> Finding:
    """What an error says of a file that should have been read.

    Raises:
      OSError: the system's fault, but for a bad sector, which is the file's.
    """
    if isinstance(error, CorruptLogError):
        return Finding(error.path, error.offset, error.reason)
    if isinstance(error, UnsupportedFormatError):
        return Finding(path, 0, f"{error.what} is not supported", cause=error)
    if error.errno != errno.EIO:
        raise error
    return Finding(path, 0, f"the header cannot be read: {error.strerror}", cause=error)
