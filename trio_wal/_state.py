"""Whether a log takes records, and if not, why: what all of its parts ask.

Law: one object per log, and no tasks.  The queue moves it from state to state; the errors that
users get because of it are made here.
"""

from __future__ import annotations

import enum

import trio

from ._exceptions import LogFailedError, Outcome
from ._text import printable


class State(enum.Enum):
    OPEN = "open"
    FULL = "full"
    """No disk space for the next segment; works again when there is."""
    CLOSING = "closing"
    CLOSED = "closed"
    FAILED = "failed"


class Status:
    """The state of one log."""

    __slots__ = ("disowned", "failure", "failure_told", "loss", "name", "refuses", "state")

    def __init__(self, name: str) -> None:
        self.name: str = name
        self.state: State = State.OPEN
        self.refuses: bool = False
        """Whether nothing is accepted any more.  For those who ask before every record: in
        Python 3.11 it costs a quarter of a microsecond to compare `state`."""
        self.failure: BaseException | None = None
        """What broke the log."""
        self.failure_told: bool = False
        """Whether anybody has been told."""
        self.loss: Outcome = "not written"
        """After a failure: what became of the records that were accepted before it."""
        self.disowned: bool = False
        """Whether this is a forked child, where all of the log is dead."""

    def stop(self, state: State) -> None:
        """From here on nothing is accepted, whatever else the state becomes."""
        self.state = state
        self.refuses = True

    def end(self) -> None:
        """Nothing of the log runs any more."""
        if self.state is not State.FAILED:
            self.stop(State.CLOSED)

    def check_open(self, outcome: Outcome = "not written") -> None:
        """Raises `trio.ClosedResourceError` or `LogFailedError` where nothing is accepted."""
        if self.state is State.FAILED:
            assert self.failure is not None
            raise self.failed(outcome, self.failure)
        if self.state is not State.OPEN and self.state is not State.FULL:
            raise trio.ClosedResourceError(f"{printable(self.name)}: this log is closed")

    def check_usable(self) -> None:
        """As `check_open`, for a call that is about records accepted before."""
        self.check_open(self.loss)

    def failed(self, outcome: Outcome, cause: BaseException) -> LogFailedError:
        """A new error for one caller, who is thereby told: of the engine's own kind, if it has
        one."""
        self.failure_told = True
        if isinstance(cause, LogFailedError):
            error = cause.again(outcome)
        else:
            error = LogFailedError(self.name, outcome)
        error.__cause__ = cause
        return error
