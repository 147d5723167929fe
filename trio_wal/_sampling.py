"""Looking at open logs from any thread: what the exporters of metrics stand on.

Law: an object is looked at by its own event loop, and by nothing else: statistics walk dicts that
its tasks change, and ask LMDB, which must not be read while its map grows.  Whoever asks from
another thread waits for the loop, a moment, and takes what was last seen where it does not answer.
Nothing is done between two questions, and none of them raises.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from functools import partial
from time import monotonic
from typing import Any, Final, TypeAlias, final

import attrs
import trio
from trio.lowlevel import TrioToken

from ._database import Database
from ._database_reader import DatabaseReader
from ._health import Health, judge
from ._metrics import Look
from ._replica import Replica
from ._system.files import OsFiles
from ._wal import WriteAheadLog

LOOP_SECONDS: Final = 1.0
"""How long it is waited for an event loop that does not answer: monitoring itself gives up after
some seconds."""


Observed: TypeAlias = WriteAheadLog | Database | DatabaseReader | Replica
"""What can be looked at."""


@final
@attrs.define(eq=False)
class _Subject:
    name: str
    observed: Observed
    token: TrioToken
    statistics: Any = None
    health: Health = attrs.Factory(lambda: judge(()))
    seen_at: float = attrs.Factory(monotonic)
    """When the loop last answered."""

    def look(self) -> None:
        """By its own loop, or when that has ended.  What is closed may have nothing new to say."""
        with contextlib.suppress(Exception):
            self.statistics = self.observed.statistics()
        with contextlib.suppress(Exception):
            self.health = self.observed.health()
        self.seen_at = monotonic()

    def seen(self, asked_at: float) -> Look:
        age = max(0.0, asked_at - self.seen_at)
        return Look(self.name, self.statistics, self.health, age)


@final
class Sampler:
    """The objects that one exporter looks at, by name."""

    def __init__(self, observed: Iterable[Observed]) -> None:
        self._subjects: dict[str, _Subject] = {}
        self._forked = False
        OsFiles().on_fork(self._disown)
        for one in observed:
            self.add(one, None)

    def add(self, observed: Observed, name: str | None) -> None:
        """From now on look at this, too; whatever had its name before is forgotten.

        Raises:
          TypeError: it is none of those that can be looked at, or the name is no text.
          RuntimeError: not called in the run of trio to which it belongs.
        """
        if not isinstance(observed, (WriteAheadLog, Database, DatabaseReader, Replica)):
            raise TypeError(
                "objects must be open logs, databases, readers of databases or replicas, not "
                f"{type(observed).__name__}"
            )
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a str, not {type(name).__name__}")
        try:
            token = trio.lowlevel.current_trio_token()
        except RuntimeError:
            raise RuntimeError(
                "objects must be added by a task of the trio run that opened them"
            ) from None
        subject = _Subject(observed.path if name is None else name, observed, token)
        subject.look()
        # A new dict: another thread may be walking over the old one.
        self._subjects = {**self._subjects, subject.name: subject}

    def remove(self, observed: Observed) -> None:
        """Look at it no more; nothing where it is not there."""
        self._subjects = {
            name: subject
            for name, subject in self._subjects.items()
            if subject.observed is not observed
        }

    def clear(self) -> None:
        """Look at nothing any more."""
        self._subjects = {}

    def looks(self) -> list[Look]:
        """All of them, as they are now, or were when their loop last answered; from any thread.
        Takes about `LOOP_SECONDS` at most."""
        asked_at = monotonic()
        subjects = list(self._subjects.values())
        if not self._forked:
            answers = [
                self._ask(token, [one for one in subjects if one.token is token])
                for token in dict.fromkeys(subject.token for subject in subjects)
            ]
            for answered in answers:
                answered.wait(max(0.0, asked_at + LOOP_SECONDS - monotonic()))
        return [subject.seen(asked_at) for subject in subjects]

    def _ask(self, token: TrioToken, subjects: list[_Subject]) -> threading.Event:
        answered = threading.Event()
        look = partial(_look, subjects, answered)
        if token is _current_token():
            look()
        else:
            try:
                token.run_sync_soon(look)
            except trio.RunFinishedError:
                # Nothing changes any more, whichever thread looks.
                look()
        return answered

    def _disown(self) -> None:
        """In a forked child the loops are the parent's, and would not answer."""
        self._forked = True


def _look(subjects: list[_Subject], answered: threading.Event) -> None:
    for subject in subjects:
        subject.look()
    answered.set()


def _current_token() -> TrioToken | None:
    try:
        return trio.lowlevel.current_trio_token()
    except RuntimeError:
        return None
