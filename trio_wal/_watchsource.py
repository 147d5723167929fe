"""A log's directory that another process may be writing, looked at: `WatchSource`.

Law: never writes and takes no lock.  The owner may be doing anything meanwhile: rotating,
truncating, recovering, dying.  So what looks wrong is looked at again, for as long as the files
change, and believed when they stand still; and what is taken for the log's end is that only where
nothing proves that there was more (`_disk.walk.judge_end`).
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from typing import Final, final

import attrs
import trio

from ._disk.chain import (
    LOG_NAME,
    META_NAME,
    TRUNCATE_NAME,
    FoundSegment,
    check_joins,
    list_chain,
    look_at,
    no_log,
    read_meta,
)
from ._disk.cursor import Place, place_in
from ._disk.finding import Finding
from ._disk.frame import BLOCK, DATA_OFFSET, Kind, Meta, Pointer, SegmentHeader
from ._disk.plain import follow_plain
from ._disk.scan import FrameScanner, Position, start_of
from ._disk.walk import begun_lsn, judge_end, proven_lsn
from ._engine import Moved, Reader, Tail
from ._exceptions import CorruptLogError, WrongDirectoryError
from ._files import Directory, File, Watch, Word, close_quietly
from ._local import FileCursor
from ._stream import RETRY_SECONDS, SAME_DAMAGE_TIMES
from ._text import printable
from ._worker import Blocking

POLL_SECONDS: Final = 0.02
"""How often the files of another process's log are looked at for news, where nothing wakes."""
WATCHED_POLL_SECONDS: Final = 1.0
"""The same where a change of the files wakes: for file systems that do not tell of all changes."""


@attrs.frozen
class _Evidence:
    """All that stands at a log's end and around it: while it is the same, so is the verdict."""

    block: bytes
    """What stands where the next frame would."""
    pointer: Pointer | None
    size: int
    word: Word


@attrs.frozen
class _Tail:
    """How far the last segment was scanned."""

    header: SegmentHeader
    position: Position
    watermark: int
    """The highest LSN that the frames so far, or the existence of the segment, call durable."""
    last_kind: Kind | None = None
    reason: str = ""


@attrs.frozen
class _Seen:
    """A log as one look has found it.  Immutable: threads read it while another look is made."""

    meta: Meta | None = None
    """None: not looked at yet."""
    names: tuple[str, ...] = ()
    """Of what may be a segment."""
    segments: tuple[FoundSegment, ...] = ()
    """Those that can be read, without a gap."""
    first_lsn: int = 1
    durable_lsn: int = 0
    last_lsn: int = 0
    damage: CorruptLogError | None = None
    chain_damage: CorruptLogError | None = None
    """The part of it that is not the last segment's."""
    beyond_lsn: int = 0
    """What segments that cannot be reached prove to have been durable."""
    tail: _Tail | None = None
    evidence: _Evidence | None = None
    changes: int = 0
    """How often files were seen to have come, gone or been replaced."""


@final
class WatchSource:
    """A directory that another process may be writing; a `_stream.Source`."""

    def __init__(self, directory: Directory, blocking: Blocking) -> None:
        self.name: str = directory.path
        self.blocking = blocking
        self._directory = directory
        self._seen = _Seen()
        self._surprises = 0
        """How often a file was not what the last look had found."""
        self._surprises_seen = 0
        """Those after which everything was looked at anew."""
        self._looking = threading.Lock()
        self._closed = False
        self._watch: Watch | None = None
        self._watchable = True
        """Until it turns out that nothing tells of changes."""
        self._watching = False
        self._others = trio.lowlevel.ParkingLot()
        """Streams that wait for the one that watches."""

    # -- what was seen --

    @property
    def tail(self) -> Tail:
        seen = self._seen
        history = () if seen.meta is None else seen.meta.history
        return Tail(seen.first_lsn, seen.last_lsn, seen.durable_lsn, history)

    @property
    def changes(self) -> int:
        return self._seen.changes

    @property
    def meta(self) -> Meta:
        """After a look."""
        assert self._seen.meta is not None
        return self._seen.meta

    @property
    def uuid(self) -> uuid.UUID:
        return uuid.UUID(bytes=self.meta.log_uuid)

    @property
    def segments(self) -> tuple[FoundSegment, ...]:
        return self._seen.segments

    @property
    def damage(self) -> CorruptLogError | None:
        return self._seen.damage

    def behind(self, lsn: int) -> tuple[int, float]:
        """How many bytes of the log come after ``lsn``, and how long ago the oldest of them was
        written at most: both estimated from what is known of whole segments."""
        seen = self._seen
        total, since_us = 0.0, time.time_ns() // 1000
        next_lsn = seen.durable_lsn + 1
        for segment in reversed(seen.segments):
            if next_lsn - 1 <= lsn:
                break
            count = next_lsn - segment.header.first_lsn
            end = segment.size
            if seen.tail is not None and seen.tail.header == segment.header:
                end = seen.tail.position.offset
            total += min(1.0, (next_lsn - 1 - lsn) / count) * (end - DATA_OFFSET) if count else 0
            since_us = segment.header.created_us
            next_lsn = segment.header.first_lsn
        return max(0, math.ceil(total)), max(0, time.time_ns() // 1000 - since_us) / 1e6

    # -- looking --

    async def refresh(self) -> None:
        await self.blocking(self.look)

    async def settle(self) -> None:
        # A look ends only when what it has found stands still.
        await self.refresh()

    def look(self) -> None:
        """See what has changed; blocking.

        Raises:
          CorruptLogError: nothing can be read, or another log stands here now.
          UnsupportedFormatError, OSError
        """
        with self._looking:
            believed: object = None
            last_wrong, times = "", 0
            surprises = self._surprises
            while True:
                print_before = self._fingerprint()
                seen: _Seen | None = None
                wrong: Exception | None = None
                try:
                    seen = self._look_once(*print_before)
                    wrong = seen.damage
                except (CorruptLogError, WrongDirectoryError, FileNotFoundError, Moved) as exc:
                    wrong = exc
                if seen is not None and (wrong is None or wrong is self._seen.damage):
                    self._seen, self._surprises_seen = seen, surprises
                    return
                doubt = (print_before, repr(wrong))
                last_wrong, times = doubt[1], times + 1 if doubt[1] == last_wrong else 1
                stands = doubt == believed and self._fingerprint() == print_before
                if stands or times >= SAME_DAMAGE_TIMES:
                    if seen is not None:
                        self._seen, self._surprises_seen = seen, surprises
                        return
                    assert wrong is not None
                    if isinstance(wrong, Moved):
                        raise CorruptLogError(wrong.path, wrong.offset, wrong.reason)
                    raise wrong
                believed = doubt
                time.sleep(RETRY_SECONDS)

    @property
    def _surprised(self) -> bool:
        return self._surprises != self._surprises_seen

    def _fingerprint(self) -> tuple[tuple[str, ...], Meta | None]:
        """What changes whenever the chain does, but for a file that another one replaces."""
        meta = read_meta(self._directory)
        names = self._directory.names()
        return tuple(n for n in names if n.startswith("wal-") or n == TRUNCATE_NAME), meta

    def _look_once(self, names: tuple[str, ...], meta: Meta | None) -> _Seen:
        seen = self._seen
        known = seen.meta
        if meta is None:
            if known is None:
                instead = f"open_reader({self.name + '/' + LOG_NAME!r})"
                raise no_log(self.name, self._directory.names(), instead)
            raise CorruptLogError(f"{self.name}/{META_NAME}", 0, "the file is missing")
        if known is not None and known.live:
            if not meta.live or meta.log_uuid != known.log_uuid:
                raise CorruptLogError(self.name, 0, "another log stands here now")
        elif not meta.live:
            return attrs.evolve(seen, meta=meta)
        # Before the files are scanned: what it speaks of is in them then.
        word = self._directory.published()
        if word.epoch not in (None, meta.epoch) and read_meta(self._directory) != meta:
            raise Moved(f"{self.name}/{META_NAME}", "its history is not the one of the lock file")
        same = names == seen.names and meta == known and not self._surprised
        # What was found wrong may be put right, or have only looked so.
        if seen.segments and same and seen.chain_damage is None:
            last = seen.segments[-1]
            file = self._directory.open(last.file_name)
            try:
                fresh = look_at(file, last.file_name)
                if fresh.header == last.header:
                    segments = (*seen.segments[:-1], fresh)
                    return self._judge(attrs.evolve(seen, segments=segments), file, word)
            finally:
                file.close()
        seen = self._find_chain(names, meta)
        file = self._directory.open(seen.segments[-1].file_name)
        try:
            fresh = look_at(file, seen.segments[-1].file_name)
            if fresh.header != seen.segments[-1].header:
                # What is known of the others may be as old.
                self._surprises += 1
                raise Moved(file.path, "another segment stands in the place of this one")
            seen = attrs.evolve(seen, segments=(*seen.segments[:-1], fresh))
            return self._judge(seen, file, word)
        finally:
            file.close()

    def _find_chain(self, names: tuple[str, ...], meta: Meta) -> _Seen:
        """Which segments there are, and whether they are one chain."""
        seen, known = self._seen, self._seen.meta
        cut = known is not None and known.history != meta.history
        cached: dict[str, FoundSegment] = {}
        same = known is not None and known.truncation == meta.truncation
        if same and not cut and not self._surprised and seen.chain_damage is None:
            # All but the last two are as they were: nothing writes to them any more.
            cached = {found.file_name: found for found in seen.segments[:-2]}
        problems: list[CorruptLogError] = []

        def report(finding: Finding) -> None:
            if finding.cause is not None:
                raise finding.cause
            problems.append(finding.damage)

        chain = list_chain(self._directory, meta, report, cached)
        followed = {} if seen.tail is None else {seen.tail.header: seen.tail.position}
        chain = check_joins(self._directory, meta, chain, report, followed)
        if not chain.segments:
            raise problems[0]
        damage = problems[0] if problems else None
        here = [(found.file_name, found.header) for found in chain.segments]
        moved = here != [(found.file_name, found.header) for found in seen.segments]
        moved = moved or cut or names != seen.names or repr(damage) != repr(seen.chain_damage)
        beyond = [found.header.first_lsn - 1 for found in chain.beyond]
        beyond += [found.mark.first_lsn - 1 for found in chain.beyond if found.mark is not None]
        return attrs.evolve(
            seen,
            meta=meta,
            names=names,
            segments=tuple(chain.segments),
            first_lsn=meta.base_lsn,
            durable_lsn=0 if cut else seen.durable_lsn,
            last_lsn=0 if cut else seen.last_lsn,
            chain_damage=damage,
            beyond_lsn=max(beyond, default=0),
            tail=None if cut else seen.tail,
            changes=seen.changes + moved,
        )

    def _judge(self, seen: _Seen, file: File, word: Word) -> _Seen:
        """Where the last segment, and so the log, ends, and how much of it is durable."""
        meta, last, tail = seen.meta, seen.segments[-1], seen.tail
        assert meta is not None
        first_look = tail is None or tail.header != last.header
        if tail is None or first_look:
            tail = _Tail(last.header, start_of(last.header), last.header.first_lsn - 1)
        tail, block = self._scan(file, tail)
        end = tail.position
        evidence = _Evidence(block, last.pointer, last.size, word)
        as_before = seen.tail == tail and seen.evidence == evidence
        if as_before and not first_look and seen.changes == self._seen.changes:
            return seen
        # An epoch begins with what is durable; its owner has yet to say so.
        told = max(word.told_lsn(meta.epoch), begun_lsn(meta))
        proof = proven_lsn(word, meta)
        if last.pointer is not None:
            # Also where the frame that it tells of is damaged: what stands before is durable.
            told = max(told, last.pointer.last_lsn)
        damage, proven = seen.chain_damage, seen.beyond_lsn
        # Whoever follows a living owner has all from its word; and in a file of old bytes something
        # stands behind the end of whatever it is just writing.
        told_end = last.header.reused and not meta.copied and word.epoch == meta.epoch
        unknown = first_look and not (told_end and seen.tail is not None)
        suspicious = _suspicious(tail, evidence, proof, look=not told_end)
        if damage is not None:
            # Others come after it: it was whole, and durable.
            proven = max(proven, end.next_lsn - 1)
        elif unknown or suspicious or seen.damage is not None:
            judged = judge_end(
                self.name,
                file,
                last,
                end,
                reason=tail.reason,
                last_kind=tail.last_kind,
                told_lsn=proof,
            )
            if judged.loss is not None:
                damage, proven = judged.loss.finding.damage, judged.loss.durable_lsn
        if damage is not None and repr(damage) == repr(seen.damage):
            damage = seen.damage
        # What once was durable is, unless the end was cut: an unlinked lock file says nothing.
        durable = max(seen.durable_lsn, tail.watermark, min(told, end.next_lsn - 1), proven)
        return attrs.evolve(
            seen,
            durable_lsn=durable,
            last_lsn=max(durable, end.next_lsn - 1),
            damage=damage,
            tail=tail,
            evidence=evidence,
        )

    def _scan(self, file: File, tail: _Tail) -> tuple[_Tail, bytes]:
        """Go over the frames that have come; also gives the block at which they end."""
        block = file.pread(BLOCK, tail.position.offset)
        if not block.strip(b"\0"):
            # Most looks find nothing new: one small read.
            return tail, block
        scanner = FrameScanner(file.pread, tail.header, tail.position, bodies=False, skim=True)
        frames, kind = iter(scanner), tail.last_kind
        while True:
            if follow_plain(scanner):
                kind = Kind.DATA
            frame_body = next(frames, None)
            if frame_body is None:
                break
            kind = frame_body[0].kind
        watermark = max(tail.watermark, scanner.position.durable_lsn)
        tail = _Tail(tail.header, scanner.position, watermark, kind, scanner.reason)
        return tail, file.pread(BLOCK, tail.position.offset)

    # -- for streams --

    def locate(self, lsn: int) -> Place:
        segments = self._seen.segments
        found = [segment for segment in segments if segment.header.first_lsn <= lsn]
        if not found:
            raise Moved(self.name, f"no segment has LSN {lsn}")
        segment = found[-1]
        following = segments[len(found)].header if len(found) < len(segments) else None
        try:
            file = self._directory.open(segment.file_name)
        except FileNotFoundError:
            # Renamed or dropped since the last look.
            self._surprises += 1
            path = f"{self.name}/{segment.file_name}"
            raise Moved(path, "the segment is missing") from None
        try:
            fresh = look_at(file, segment.file_name)
            if fresh.header != segment.header:
                self._surprises += 1
                raise Moved(file.path, "another segment stands in the place of this one")
            return place_in(file, fresh, lsn, following)
        except BaseException:
            close_quietly(file)
            raise

    def release(self, header: SegmentHeader) -> None:
        pass

    def cursor(self) -> FileCursor:
        return FileCursor(self, self.blocking)

    async def wait_beyond(self, lsn: int) -> bool:
        history = self.tail.history
        while True:
            tail = self.tail
            if tail.durable_lsn > lsn or tail.history != history or self.damage is not None:
                return True
            await self._news()

    def subscribe(self, reader: Reader) -> None:
        # It is not told of a cut any sooner than it will look itself.
        pass

    def unsubscribe(self, reader: Reader) -> None:
        pass

    async def _news(self) -> None:
        """Until something may have changed, and was looked at."""
        self._check_open()
        if not self._watchable:
            await trio.sleep(POLL_SECONDS)
            await self.refresh()
            return
        if self._watching:
            # One task waits for the files, and looks, for all.
            await self._others.park()
            self._check_open()
            return
        self._watching = True
        try:
            await self._watch_files()
        finally:
            self._watching = False
            self._others.unpark_all()

    async def _watch_files(self) -> None:
        if self._watch is None:
            self._watch = self._directory.watch()
            self._watchable = self._watch is not None
            # What has changed before was not watched.
            await self.refresh()
            return
        watch, before = self._watch, self._seen
        with trio.move_on_after(WATCHED_POLL_SECONDS) as scope:
            await trio.lowlevel.wait_readable(watch.fileno())
        self._check_open()
        told = watch.drain()
        await self.refresh()
        if scope.cancelled_caught and not told and self._seen.durable_lsn != before.durable_lsn:
            # Either this file system does not tell, or it has told since it was asked.
            self._check_open()
            self._watchable = watch.drain()
            if self._watchable:
                await self.refresh()

    def _check_open(self) -> None:
        """Where others may have closed it meanwhile: a watch that is made now would stay."""
        if self._closed:
            raise trio.ClosedResourceError(f"{printable(self.name)}: this reader is closed")

    def disown(self) -> None:
        """This is a forked child: the threads are the parent's."""
        self.blocking.disown()

    async def aclose(self) -> None:
        """Streams that wait get `trio.ClosedResourceError`."""
        self._closed = True
        watch, self._watch = self._watch, None
        if watch is not None:
            trio.lowlevel.notify_closing(watch.fileno())
            watch.close()
        self._others.unpark_all()
        await self.blocking.close()
        self._directory.close()


def _suspicious(tail: _Tail, evidence: _Evidence, told_lsn: int, *, look: bool) -> bool:
    """Whether something at the log's end, ``look``: be it no frame, says more than that it ends."""
    pointer = evidence.pointer
    return (
        (look and bool(evidence.block.strip(b"\0")))
        or tail.last_kind is Kind.SEAL
        or (
            pointer is not None
            and (pointer.kind is Kind.SEAL or pointer.offset > tail.position.offset)
        )
        or told_lsn >= tail.position.next_lsn
    )
