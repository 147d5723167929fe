"""One batch at a time onto a replicated log, and what has become of it.

Law: this is where an answer that never came gets its meaning, and nowhere else.  A batch goes right
behind the last position, or nowhere (compare-and-set), under a name that no other batch has.  A try
that came to nothing is made again, the very same bytes.  Refused, because something stands at that
position: is it ours, by its name?  Then an earlier try has landed.  Is it another's?  Then none of
ours ever will, for its place is taken: fenced, surely not written.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from typing import Final, final

import trio

from ._caslog import CasLog, Conflict, Denied, Full, Gone, Unsure
from ._disk.frame import FrameError
from ._exceptions import (
    LogFailedError,
    LogFencedError,
    LogFullError,
    LogUnavailableError,
    Outcome,
)
from ._messages import Encoded, Ident, decode_owner, is_epoch, seed
from ._streamlog import End, Patience, StreamLog


@final
class Appender:
    """The end of a log that this process owns."""

    def __init__(
        self, log: StreamLog, epoch: int, writer: str, end: End, piece_bytes: int, patience: float
    ) -> None:
        """
        Args:
          writer: sixteen hexadecimal digits that no other writer has.
          end: where the log ends, the beginning of the epoch included.
          piece_bytes: of one message.
          patience: seconds that a batch may be without an outcome.
        """
        self.name: Final[str] = log.name
        self.epoch: Final = epoch
        self.seed: Final[int] = seed(log.uuid, epoch)
        self.position: int = end.position
        self.chain: int = end.chain
        self.mark: int = end.mark
        """The position of the newest mark."""
        self.full_bytes: int = 0
        """For which there was no room."""
        self.since: float | None = None
        """When the append that is under way began."""
        self.rotations: int = 0
        self.resolved: int = 0
        """Batches that had landed though no answer said so."""
        self._log = log
        self._cas: CasLog = log.cas
        self._writer = writer
        self._piece_bytes = piece_bytes
        self._patience = patience
        self._batches = 0
        self._broken: LogFailedError | None = None
        """What has ended the writing."""

    async def append(
        self, frame: Encoded, last_lsn: int, *, mark: bool = False, tries: float = math.inf
    ) -> None:
        """Append a frame, which was made for the next position.

        Args:
          last_lsn: of the log, with it.
          mark: whether it is a mark.

        Raises:
          LogFullError, LogFencedError: nothing was written.
          LogUnavailableError, LogFailedError: it says of its outcome what is known.
        """
        if self._broken is not None:
            raise self._broken.again("not written")
        after = self.position
        pieces = frame.pieces(self._piece_bytes)
        ident = str(
            Ident(
                epoch=self.epoch,
                writer=self._writer,
                batch=self._batches + 1,
                pieces=len(pieces),
                last_lsn=last_lsn,
                mark=after + 1 if mark else self.mark,
                uuid=self._log.uuid,
            )
        )
        self.since = trio.current_time()
        try:
            position = await self._settle(after, pieces, ident, len(frame.data), tries)
        except LogFailedError as exc:
            # What stands at the next position now is anybody's guess.
            self._broken = exc
            raise
        finally:
            self.since = None
        assert position == after + len(pieces)
        self.position, self.chain = position, frame.crc
        self._batches += 1
        if mark:
            self.mark = after + 1

    def no_room(self) -> LogFullError:
        """What tells of `full_bytes`."""
        return LogFullError(
            self.name,
            self.full_bytes,
            "the stream has no more; nothing was accepted, raise its limit or the servers' disk "
            "space, or call truncate_before(), then try again",
        )

    async def _settle(
        self, after: int, pieces: Sequence[bytes], ident: str, size: int, tries: float
    ) -> int:
        """Try until it is known what has become of a batch; gives its last position."""
        patience = Patience(self._cas, self._patience)
        open_tries, hint, reason = 0, after, ""
        while True:
            try:
                return await self._cas.append(after, pieces, ident)
            except Conflict as exc:
                hint, reason = exc.last, str(exc)
                landed = await self._look_for(ident, after + 1)
                if landed:
                    self.resolved += 1
                    return after + len(pieces)
            except Full as exc:
                reason = str(exc)
                # After a try without an answer it may be full of just this batch.
                if not open_tries:
                    self.full_bytes = size
                    raise self.no_room() from exc
                if await self._look_for(ident, after + 1):
                    self.resolved += 1
                    return after + len(pieces)
            except Denied as exc:
                cause = PermissionError(errno.EACCES, f"{self.name}: {exc}")
                raise LogFailedError(self.name, outcome_of(open_tries)) from cause
            except Unsure as exc:
                open_tries += 1
                reason = str(exc)
            tries -= 1
            if patience.over or tries <= 0:
                raise self._unavailable(patience, reason, hint, after, open_tries)
            rotations = patience.rotations
            await patience.pause()
            self.rotations += patience.rotations - rotations

    async def _look_for(self, ident: str, position: int) -> bool:
        """Whether a batch of ours stands at its position; False: nobody knows.

        Raises:
          LogFencedError: something else does, so that it never will.
        """
        try:
            found = await self._cas.ident_at(position)
        except Unsure:
            return False
        if found is None:
            # The refusal came from a server that is behind.
            return False
        if found != ident:
            raise await self._fenced(position, found)
        return True

    async def _fenced(self, position: int, ident: str) -> LogFencedError:
        owner = "an unknown writer"
        if not is_epoch(ident):
            owner = f"something that is not trio-wal: its message is called {ident[:80]!r}"
        else:
            try:
                entries = await self._cas.read(position, 1)
                if entries and entries[0].position == position:
                    owner = decode_owner(entries[0].data, position, self._log.uuid)
            except (Unsure, Gone, FrameError):
                pass
        return LogFencedError(self.name, position, owner)

    def _unavailable(
        self, patience: Patience, reason: str, hint: int, after: int, open_tries: int
    ) -> LogUnavailableError:
        if hint < after:
            reason += f"; acknowledged was position {after}"
        seconds = trio.current_time() - patience.began
        return LogUnavailableError(self.name, seconds, reason, outcome_of(open_tries))


def outcome_of(open_tries: int) -> Outcome:
    """What is known of a batch that is given up, after so many tries without an answer."""
    return "unknown" if open_tries else "not written"
