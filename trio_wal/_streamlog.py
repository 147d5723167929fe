"""Reading a replicated log: its end, its beginning, a place in it, and its records.

Law: reads only, and believes nothing that is not chained.  A replica may be behind, so what should
be there and is not is asked for again, also of others, until patience ends.  Owners, readers on
other machines and replicas of databases read by what stands here.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, final
from uuid import UUID

import attrs
import trio

from ._caslog import CasLog, Denied, Description, Entry, Gone, Unsure
from ._disk.frame import FRAME_HEADER_SIZE, FrameError, Kind, decode_frame_header, to_datetime
from ._engine import Forked, Moved, Reader, Record, Tail
from ._exceptions import CorruptLogError
from ._identity import History, Parting
from ._messages import (
    UNCHAINED,
    Frame,
    Ident,
    Mark,
    chain_epoch,
    decode_frame,
    decode_mark,
    next_history,
    parse_ident,
    seed,
)
from ._util import KiB, MiB

PAUSE_SECONDS_MIN: Final = 0.01
PAUSE_SECONDS_MAX: Final = 0.25
ROTATE_SECONDS: Final = 2.5
"""Without an outcome for so long another server is tried: one that has lost its quorum answers
pings for ever, and nothing else."""
READ_BYTES_FIRST: Final = 256 * KiB
READ_BYTES: Final = 4 * MiB
"""Asked for at once, first and from then on: a reader of a few records must not wait for many."""
CHUNK_BYTES: Final = 256 * KiB
CHUNK_RECORDS: Final = 4096
BELL_SECONDS: Final = 1.0
"""How often a follower looks though no bell has rung."""


class Patience:
    """How long and how often a call is tried again."""

    def __init__(self, cas: CasLog, seconds: float) -> None:
        self._cas = cas
        self._seconds = seconds
        self.began: float = trio.current_time()
        self._rotated = self.began
        self._pause = PAUSE_SECONDS_MIN
        self.rotations: int = 0

    @property
    def over(self) -> bool:
        return trio.current_time() - self.began >= self._seconds

    async def pause(self) -> None:
        """Before the next try: ever longer, and now and then to another server."""
        await trio.sleep(self._pause)
        self._pause = min(2 * self._pause, PAUSE_SECONDS_MAX)
        if trio.current_time() - self._rotated >= ROTATE_SECONDS:
            self._rotated = trio.current_time()
            self.rotations += 1
            await self._cas.elsewhere()


@attrs.frozen(kw_only=True)
class End:
    """Where a log ends, as its last message tells."""

    position: int
    chain: int
    """What the next frame names as its predecessor's checksum; only where it was asked for."""
    last_lsn: int
    history: History
    time_us: int = 0
    mark: int = 0
    closed: bool = True
    """Whether nobody has written since it was closed in order."""
    bytes_checked: int = 0
    records_checked: int = 0


@final
class StreamLog:
    """A `CasLog`, asked with patience."""

    def __init__(self, cas: CasLog, uuid: UUID, patience_seconds: float) -> None:
        self.cas: Final = cas
        self.name: Final[str] = cas.name
        self.uuid: Final = uuid
        self._patience_seconds = patience_seconds
        self._histories: dict[int, History] = {}
        """Of the newest mark that was read."""
        self._sure = (0, "")
        """Position and name of the message that a majority was asked for last: they stay."""

    def damaged(self, position: int, reason: object) -> CorruptLogError:
        return CorruptLogError(self.name, position, f"message {position}: {reason}")

    def _silent(self, exc: BaseException | None) -> TimeoutError:
        text = f"{self.name}: no server answers, or none is up to date"
        error = TimeoutError(errno.ETIMEDOUT, text if exc is None else f"{text}: {exc}")
        error.__cause__ = exc
        return error

    # -- asking --

    async def describe(self) -> Description:
        """Raises `TimeoutError`."""
        patience = Patience(self.cas, self._patience_seconds)
        while True:
            try:
                return await self.cas.describe()
            except Unsure as exc:
                if patience.over:
                    raise self._silent(exc) from exc
            await patience.pause()

    async def fetch(self, position: int, max_bytes: int) -> list[Entry]:
        """Messages from a position on which is known to be there; at least one, without a gap.

        Raises:
          Gone, TimeoutError
        """
        patience = Patience(self.cas, self._patience_seconds)
        while True:
            silent: Unsure | None = None
            try:
                entries = await self.cas.read(position, max_bytes)
            except Unsure as exc:
                entries, silent = [], exc
            count = 0
            for entry in entries:
                if entry.position != position + count:
                    break
                count += 1
            if count:
                return entries[:count]
            if patience.over:
                raise self._silent(silent)
            await patience.pause()

    async def fetch_surely(self, position: int) -> Entry:
        """A message that is the one which a majority agrees on; a replica that has gone astray may
        hold another.  For where no later message's checksum says so."""
        patience = Patience(self.cas, self._patience_seconds)
        while True:
            entry = (await self.fetch(position, 1))[0]
            silent: Unsure | None = None
            try:
                if await self.cas.ident_at(position) == entry.ident:
                    self._sure = position, entry.ident
                    return entry
                await self.cas.elsewhere()
            except Unsure as exc:
                silent = exc
            if patience.over:
                raise self._silent(silent)
            await patience.pause()

    async def is_sure(self, entry: Entry) -> bool:
        """Whether a message is the one which a majority agrees on."""
        if self._sure == (entry.position, entry.ident):
            return True
        return (await self.fetch_surely(entry.position)).ident == entry.ident

    def parse(self, entry: Entry) -> Ident | None:
        try:
            return parse_ident(entry.ident, self.uuid)
        except FrameError as exc:
            raise self.damaged(entry.position, exc) from exc

    def decode(self, data: bytes, position: int, epoch: int) -> Frame:
        try:
            return decode_frame(data, position, seed(self.uuid, epoch))
        except FrameError as exc:
            raise self.damaged(position, exc) from exc

    def _decode_mark(self, frame: Frame) -> Mark:
        try:
            return decode_mark(frame)
        except FrameError as exc:
            raise self.damaged(frame.header.offset, exc) from exc

    async def _whole(self, position: int, ident: Ident) -> Frame:
        """A batch, from all of its messages."""
        pieces: list[Entry] = []
        while len(pieces) < ident.pieces:
            pieces += await self.fetch(position + len(pieces), READ_BYTES)
        del pieces[ident.pieces :]
        if any(entry.ident != str(ident) for entry in pieces):
            raise self.damaged(position, "a batch of which messages are missing")
        return self.decode(b"".join(entry.data for entry in pieces), position, ident.epoch)

    # -- its end --

    async def end_at(self, position: int, *, checked: bool) -> End:
        """What a log says of itself that ends at a position.

        Args:
          checked: read the last batch as a whole, for its checksum; otherwise its name alone.

        Raises:
          Gone: it has been dropped meanwhile.
          CorruptLogError, TimeoutError
        """
        epochs: list[tuple[int, int]] = []
        at, ident = position, None
        gone: Gone | None = None
        try:
            while at:
                entry = await self.fetch_surely(at)
                ident = self.parse(entry)
                if ident is not None:
                    break
                crc = self.decode(entry.data, at, at).header.crc
                epochs.append((at, crc))
                at -= 1
        except Gone as exc:
            gone = exc
        if gone is not None:
            # Also where only what stands before it was dropped: whoever did has a mark behind it.
            if gone.first > position or (await self.describe()).last > position:
                raise gone
            reason = "every record of the log's was dropped, and no mark kept"
            raise self.damaged(at, reason) from gone
        if ident is None:
            end = End(position=position, chain=UNCHAINED, last_lsn=0, history=())
        else:
            end = await self._end_of(at, ident, position, checked=checked)
        chain, history = end.chain, end.history
        for epoch, crc in reversed(epochs):
            chain = chain_epoch(chain, crc)
            history = next_history(history, epoch, end.last_lsn)
        return attrs.evolve(end, position=position, chain=chain, history=history)

    async def _end_of(self, at: int, ident: Ident, last: int, *, checked: bool) -> End:
        """As the batch says whose last message stands at a position; behind it, up to ``last``,
        there are only epoch records."""
        frame: Frame | None = None
        start = at - ident.pieces + 1
        if checked or ident.mark == start:
            frame = await self._whole(start, ident)
            if frame.header.next_lsn != ident.last_lsn + 1:
                raise self.damaged(at, "a batch whose name belongs to another one")
        closed = False
        if frame is not None and frame.header.kind is Kind.CLOSE:
            mark = self._decode_mark(frame)
            history, closed = mark.history, mark.closed
        else:
            history = await self._history_at(ident, last)
        return End(
            position=at,
            chain=UNCHAINED if frame is None else frame.header.crc,
            last_lsn=ident.last_lsn,
            history=history,
            time_us=0 if frame is None else frame.header.time_us,
            mark=ident.mark,
            closed=closed,
            bytes_checked=0 if frame is None else len(frame.body),
            records_checked=0 if frame is None else frame.header.count,
        )

    async def _history_at(self, ident: Ident, last: int) -> History:
        known = self._histories.get(ident.mark)
        if known is not None:
            return known
        gone: Gone | None = None
        # Where a full log has dropped it nobody can tell of older epochs any more.
        history: History = (Parting(ident.epoch, 0),)
        try:
            found = self.parse(await self.fetch_surely(ident.mark))
            if found is None or found.epoch != ident.epoch:
                raise self.damaged(ident.mark, "no mark stands here")
            history = self._decode_mark(await self._whole(ident.mark, found)).history
        except Gone as exc:
            gone = exc
        if gone is not None and (await self.describe()).last != last:
            # There is a newer one by now.
            raise gone
        self._histories = {ident.mark: history}
        return history

    # -- its beginning, and what is between --

    async def first_lsn(self, first: int, end: End) -> int:
        """The LSN of the oldest record, where the oldest message has a position."""
        at = first
        while at <= end.position:
            entry = await self.fetch_surely(at)
            ident = self.parse(entry)
            if ident is not None:
                head = entry.data[:FRAME_HEADER_SIZE]
                header = decode_frame_header(head, at, seed(self.uuid, ident.epoch))
                if header is None:
                    raise self.damaged(at, "the log begins in the middle of a batch")
                return header.first_lsn
            at += 1
        return end.last_lsn + 1

    async def find(self, lsn: int, low: int, high: int) -> int:
        """The position of the batch that has a record; it is in ``low .. high``.

        Raises:
          Gone, CorruptLogError, TimeoutError
        """
        while low < high:
            middle = at = (low + high) // 2
            while True:
                ident = self.parse((await self.fetch(at, 1))[0])
                if ident is not None or at == low:
                    break
                # An epoch record has no LSN; what comes before it has.
                at -= 1
            if ident is not None and ident.last_lsn >= lsn:
                high = at
            else:
                low = middle + 1
        return low


@final
class StreamCursor:
    """An `_engine.Cursor` on messages."""

    def __init__(self, log: StreamLog, locate: Callable[[int], Awaitable[int]]) -> None:
        """
        Args:
          locate: gives the position of the batch that has an LSN.  Raises `Gone`.
        """
        self._log = log
        self._locate = locate
        self._entries: deque[Entry] = deque()
        """Fetched, and not yet looked at."""
        self._fetched = 0
        """The position behind them."""
        self._bytes = READ_BYTES_FIRST
        self._chain: int | None = None
        self._epoch: int | None = None
        self._frame_lsn: int | None = None
        """The LSN that the next frame begins with; None, as the two above: not known yet."""
        self._records: list[bytes] = []
        """Of the frame that is being given out."""
        self._given = 0
        """How many of them were."""
        self._first_lsn = 0
        self._time_us = 0

    async def chunk(self, lsn: int, stop: int) -> list[Record]:
        damaged: CorruptLogError | None = None
        try:
            if self._next_lsn != lsn:
                await self._seek(lsn)
            while self._given >= len(self._records):
                await self._next_frame()
                if self._records and self._first_lsn < lsn:
                    # The first one after a seek.
                    self._given = min(lsn - self._first_lsn, len(self._records))
        except Gone as exc:
            self._leave()
            raise Moved(self._log.name, f"LSN {lsn} has been dropped") from exc
        except CorruptLogError as exc:
            self._leave()
            damaged = exc
        if damaged is not None:
            # It may be one replica's alone.
            await self._log.cas.elsewhere()
            raise damaged
        first = self._first_lsn + self._given
        if first != lsn:
            self._leave()
            raise Moved(self._log.name, f"LSN {first} stands where LSN {lsn} should", self._fetched)
        time = to_datetime(self._time_us)
        found: list[Record] = []
        size = 0
        for data in self._records[self._given : self._given + min(stop - lsn, CHUNK_RECORDS)]:
            found.append(Record(lsn + len(found), time, data))
            size += len(data)
            if size >= CHUNK_BYTES:
                break
        self._given += len(found)
        return found

    @property
    def _next_lsn(self) -> int:
        return self._first_lsn + self._given

    def _leave(self) -> None:
        self._entries.clear()
        self._records = []
        self._given = self._first_lsn = 0
        self._chain = self._epoch = self._frame_lsn = None

    async def _seek(self, lsn: int) -> None:
        self._leave()
        self._fetched = await self._locate(lsn)
        self._bytes = READ_BYTES_FIRST

    async def _fetch(self) -> None:
        entries = await self._log.fetch(self._fetched, self._bytes)
        self._bytes = READ_BYTES
        self._entries += entries
        self._fetched += len(entries)

    async def _next_frame(self) -> None:
        """Look at what comes next; the records of a batch, and of an epoch record or mark none."""
        log, entries = self._log, self._entries
        if not entries:
            await self._fetch()
        position, ident = entries[0].position, log.parse(entries[0])
        if ident is None:
            crc = log.decode(entries[0].data, position, position).header.crc
            if self._chain is not None:
                self._chain = chain_epoch(self._chain, crc)
            self._epoch = position
            entries.popleft()
            self._records, self._given = [], 0
            self._first_lsn = 0 if self._frame_lsn is None else self._frame_lsn
            return
        while len(entries) < ident.pieces:
            await self._fetch()
        pieces = [entries[index] for index in range(ident.pieces)]
        if any(entry.ident != pieces[0].ident for entry in pieces):
            raise log.damaged(position, "a batch of which messages are missing")
        data = pieces[0].data if len(pieces) == 1 else b"".join(entry.data for entry in pieces)
        frame = log.decode(data, position, ident.epoch)
        self._check(frame, ident, position)
        if frame.header.kind is Kind.DATA:
            await self._confirm(frame, ident, position)
        try:
            records = frame.records() if frame.header.kind is Kind.DATA else []
        except FrameError as exc:
            raise log.damaged(position, exc) from exc
        for _ in pieces:
            entries.popleft()
        self._chain, self._epoch = frame.header.crc, ident.epoch
        self._frame_lsn = frame.header.next_lsn
        self._records, self._given = records, 0
        self._first_lsn, self._time_us = frame.header.first_lsn, frame.header.time_us

    def _check(self, frame: Frame, ident: Ident, position: int) -> None:
        """Whether a frame fits what comes before it."""
        log, header = self._log, frame.header
        if header.kind is Kind.SEAL or ident.last_lsn != header.next_lsn - 1:
            raise log.damaged(position, "a batch whose name belongs to another one")
        if self._epoch is not None and ident.epoch != self._epoch:
            reason = f"it is of epoch {ident.epoch}, after the beginning of epoch {self._epoch}"
            raise log.damaged(position, reason)
        if self._frame_lsn is not None and header.first_lsn != self._frame_lsn:
            reason = f"LSN {header.first_lsn} stands where LSN {self._frame_lsn} should"
            raise log.damaged(position, reason)
        if self._chain is not None and header.previous != self._chain:
            raise log.damaged(position, "it does not continue what stands before it")

    async def _confirm(self, frame: Frame, ident: Ident, position: int) -> None:
        """Make sure that a batch is in the log's one history before its records are given out: by
        the frame that continues it; at the end, by asking who knows for certain."""
        log, chain = self._log, frame.header.crc
        for index in range(ident.pieces, len(self._entries)):
            entry = self._entries[index]
            following = log.parse(entry)
            if following is None:
                crc = log.decode(entry.data, entry.position, entry.position).header.crc
                chain = chain_epoch(chain, crc)
                continue
            head = entry.data[:FRAME_HEADER_SIZE]
            header = decode_frame_header(head, entry.position, seed(log.uuid, following.epoch))
            if header is None or header.previous != chain:
                raise log.damaged(entry.position, "it does not continue what stands before it")
            return
        if not await log.is_sure(self._entries[0]):
            raise log.damaged(position, "a replica has another message than a majority")

    def close(self) -> None:
        self._leave()


@final
class StreamSource:
    """A replicated log that somebody else writes; an `_engine.Source`."""

    damage = None
    """What is damaged is found by reading it."""

    def __init__(self, log: StreamLog) -> None:
        self.name: str = log.name
        self.log: Final = log
        self.changes: int = 0
        self._first = 1
        self._end = End(position=0, chain=UNCHAINED, last_lsn=0, history=())
        self._tail = Tail(1, 0, 0, ())
        self._one = trio.Lock()
        self._closed = False
        self.forked: bool = False
        """Whether it is the parent process's."""

    @property
    def tail(self) -> Tail:
        return self._tail

    async def refresh(self) -> None:
        """Raises `CorruptLogError` and `TimeoutError`."""
        async with self._one:
            while True:
                try:
                    await self._look()
                    return
                except Gone:
                    # Dropped while it was looked at.
                    await trio.lowlevel.checkpoint()
                except Denied as exc:
                    raise PermissionError(errno.EACCES, f"{self.name}: {exc}") from exc

    async def _look(self) -> None:
        log, found = self.log, await self.log.describe()
        if found.uuid != log.uuid:
            raise log.damaged(0, "another log stands here now")
        end, first, first_lsn = self._end, self._first, self._tail.first_lsn
        if found.last > end.position:
            end = await log.end_at(found.last, checked=False)
        if found.first > first or not self._end.position:
            first = found.first
            first_lsn = await log.first_lsn(first, end)
        if first != self._first:
            self.changes += 1
        self._first, self._end = first, end
        self._tail = Tail(first_lsn, end.last_lsn, end.last_lsn, end.history)

    async def settle(self) -> None:
        await self.refresh()

    @property
    def uuid(self) -> UUID:
        return self.log.uuid

    def look(self) -> None:
        """What is known is what `keep_up` has found."""

    async def keep_up(self) -> None:
        """Look whenever there may be more, until cancelled; what fails is tried again."""
        try:
            while True:
                await self.log.cas.changed(BELL_SECONDS)
                try:
                    await self.refresh()
                except (CorruptLogError, OSError):
                    # Whoever reads is told.
                    await trio.sleep(BELL_SECONDS)
        except (Forked, trio.ClosedResourceError):
            pass

    def disown(self) -> None:
        self._closed = self.forked = True
        self.log.cas.disown()

    async def wait_beyond(self, lsn: int) -> bool:
        history = self._tail.history
        while True:
            tail = self._tail
            if tail.durable_lsn > lsn or tail.history != history:
                return True
            if self._closed:
                raise trio.ClosedResourceError(f"{self.name}: this reader is closed")
            await self.log.cas.changed(BELL_SECONDS)
            await self.refresh()

    async def locate(self, lsn: int) -> int:
        return await self.log.find(lsn, self._first, self._end.position)

    def cursor(self) -> StreamCursor:
        return StreamCursor(self.log, self.locate)

    def subscribe(self, reader: Reader) -> None:
        pass

    def unsubscribe(self, reader: Reader) -> None:
        pass

    async def aclose(self) -> None:
        self._closed = True
        await self.log.cas.aclose()
