"""How a replicated log is taken over: the epoch begins, and then it is read where the log goes on.

Law: whoever opens the log first appends an epoch record, with nothing read before: from then on the
place that the former owner's next batch would need is taken.  Only what is read after that decides
where the log goes on.  The epoch's number is the record's position.
"""

from __future__ import annotations

import errno
import os
import platform
from itertools import count
from typing import Final

import attrs
import trio
from msgspec.structs import replace

from ._caslog import CasLog, Conflict, Denied, Description, Full, Gone, Unsure
from ._exceptions import CorruptLogError, LogFencedError, LogFullError, LogUnavailableError
from ._files import Files
from ._identity import epoch_of
from ._messages import encode_epoch, epoch_ident
from ._streamlog import PAUSE_SECONDS_MIN, End, Patience, StreamLog

DAMAGE_TRIES: Final = 8
"""Times that what is read on opening must be damaged before it is called so."""


@attrs.frozen(kw_only=True)
class Taken:
    """A log that is ours, until somebody else takes it."""

    log: StreamLog
    found: Description
    epoch: int
    writer: str
    """Our name in it, drawn for this epoch."""
    end: End
    """What stands before the epoch."""
    first_lsn: int


def this_process() -> str:
    """What a former owner is told of whoever has taken the log over."""
    return f"process {os.getpid()} on {platform.node() or 'an unnamed host'}"


async def take_over(
    cas: CasLog, found: Description, unavailable_after: float, files: Files
) -> Taken:
    """Begin an epoch, and find out what stands before it.

    Raises:
      LogFencedError, LogFullError, LogUnavailableError, CorruptLogError, OSError
    """
    writer = files.random_bytes(8).hex()
    epoch = await _begin_epoch(cas, found, unavailable_after, files, writer)
    log = StreamLog(cas, found.uuid, unavailable_after)
    end = await _find_end(log, epoch)
    assert epoch_of(end.history) == epoch
    first, first_lsn = await find_first(log, found.first, end)
    return Taken(
        log=log,
        found=replace(found, first=first),
        epoch=epoch,
        writer=writer,
        end=end,
        first_lsn=first_lsn,
    )


async def find_first(log: StreamLog, first: int, end: End) -> tuple[int, int]:
    """Where the log begins: position and LSN.  A former owner's purge may arrive late, and so may
    that of the next one, who has purged this epoch too."""
    while True:
        try:
            return first, await log.first_lsn(first, end)
        except Gone as exc:
            if exc.first > end.position:
                raise LogFencedError(log.name, exc.first, "another writer") from exc
            first = exc.first


async def _find_end(log: StreamLog, epoch: int) -> End:
    """What stands before an epoch that has just begun.  What looks like damage may be one
    replica's: it is believed when it has been seen again and again."""
    for tries in count(1):
        try:
            return await log.end_at(epoch, checked=True)
        except CorruptLogError:
            if tries >= DAMAGE_TRIES:
                raise
            await log.cas.elsewhere()
            await trio.sleep(PAUSE_SECONDS_MIN)
        except Gone as exc:
            raise LogFencedError(log.name, max(exc.first, epoch + 1), "another writer") from exc
    raise AssertionError


async def _begin_epoch(
    cas: CasLog, found: Description, unavailable_after: float, files: Files, writer: str
) -> int:
    """Append the epoch record; gives its position."""
    ident = epoch_ident(writer, found.uuid)
    patience = Patience(cas, unavailable_after)
    after, unsure_at = found.last, -1
    owner, time_us = this_process(), files.time_us()
    while True:
        frame = encode_epoch(owner, position=after + 1, uuid=found.uuid, time_us=time_us)
        try:
            return await cas.append(after, [frame.data], ident)
        except Conflict as exc:
            reason = str(exc)
            if unsure_at == after and await _is_ours(cas, after + 1, ident):
                return after + 1
            if exc.last != after:
                # At once: whoever writes this log has no pauses either.
                after = exc.last
                if not patience.over:
                    continue
        except Full as exc:
            reason = str(exc)
            if unsure_at != after:
                raise LogFullError(cas.name, len(frame.data), reason) from exc
        except Denied as exc:
            raise PermissionError(errno.EACCES, f"{cas.name}: {exc}") from exc
        except Unsure as exc:
            reason, unsure_at = str(exc), after
        if patience.over:
            seconds = trio.current_time() - patience.began
            raise LogUnavailableError(cas.name, seconds, reason, "unknown")
        await patience.pause()


async def _is_ours(cas: CasLog, position: int, ident: str) -> bool:
    try:
        return await cas.ident_at(position) == ident
    except Unsure:
        return False
