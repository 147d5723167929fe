"""Bit rot: every bit of small logs flipped, files lost or swapped, large logs damaged at random.

Law: one undamaged log, one damage, one open of a copy.  What comes of it is one of the
outcomes below, and `SILENT` is the only one that is a defect: a record that is wrong or
missing, and nobody was told.  The damaged copy is opened by the package's own recovery, and
what it holds is read through a reader, as a program would.

A log that was not closed in order ends in a group commit that nothing behind it vouches for:
damage there looks like a write that a crash cut short.  That much, and no more, is allowed:
every frame that is lost must itself have been hit, up to the log's end; after a close in
order also the mark of that close and the pointer to it.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import chain
from typing import Any, Final

import attrs
import trio
import trio.testing
from databases import DB, after as after_commits, check_content, commits_of, open_memory_database
from logs import LOG, TINY, append, copy_of, make_log, make_reused_log, open_log
from msgspec.structs import replace

from trio_wal import Commit, CorruptLogError, KeepAll, Record, UnsupportedFormatError
from trio_wal._disk.chain import META_NAME, read_meta
from trio_wal._disk.frame import (
    BLOCK,
    DATA_OFFSET,
    POINTER_OFFSET,
    FrameHeader,
    Kind,
    crc32c,
    decode_meta,
    decode_segment_header,
    segment_name,
)
from trio_wal._disk.recovery import VERIFY_BYTES
from trio_wal._disk.scan import FrameScanner, frame_at, read_pointer, start_of
from trio_wal._disk.verify import verify
from trio_wal._util import KiB
from trio_wal.testing import MemoryFiles

from . import _report, _ways
from ._forge import Contents, slice_of, two_sessions
from ._images import read_log
from ._promises import Wrong
from ._remembered import Memory
from ._ways import NO_WORD, OPEN, OWNER, WAYS, WRITERS, Seen

SMALL_BYTES: Final = 16 * KiB
"""Bytes of the segment files of each log whose every bit is flipped."""
POINTER_BYTES: Final = 44
"""Used bytes of a pointer's block."""
CHUNK: Final = 2048
"""Cases of one task."""

REFUSED: Final = "refused"
ELSEWHERE: Final = "other place"
READ: Final = "when read"
HARMLESS: Final = "harmless"
TORN: Final = "looks torn"
BEFORE: Final = "as before"
"""A stale copy of the log's end, which nothing that is left contradicts."""
SILENT: Final = "SILENT"
OUTCOMES: Final = (REFUSED, ELSEWHERE, READ, HARMLESS, TORN, BEFORE, SILENT)

MODES: Final = {"all": math.inf, "default": VERIFY_BYTES, "least": 0}
"""How much is checked on opening, as ``verify_bytes``: everything, what a program that does
not say gets (of a small log everything too), only headers, footers and the log's end."""
OFFLINE: Final = "offline"
"""What ``trio-wal verify`` says, instead of an open."""
PARTS: Final = ("flips", "verify", "files", "random", "ways", "stale")


# -- what is damaged ----------------------------------------------------------------


@attrs.frozen
class Part:
    """A stretch of a file that stands or falls together."""

    start: int
    end: int
    kind: str
    """header, pointer, reserved, frame, mark (of a close), footer, unused"""
    first_lsn: int = 0
    """Of a frame."""
    proves: int = 0
    """While it is whole it says that all up to this LSN was durable."""


@attrs.frozen
class Subject:
    """A log, or a database's, and what it must hold."""

    files: MemoryFiles
    path: str
    closed: bool
    """Whether it was closed in order: then nothing of it may be lost."""
    records: tuple[Record, ...]
    parts: dict[str, list[Part]]
    """Of each file, in order and without gaps."""
    commits: tuple[Commit, ...] = ()
    """Of a database."""
    past: Past | None = None

    @property
    def contents(self) -> Contents:
        return self.files.contents(self.path)

    def bits(self) -> int:
        return 8 * sum(parts[-1].end for parts in self.parts.values())

    def place(self, bit: int) -> tuple[str, int]:
        """(file, bit in it) of the bits of all files in a row."""
        for name, parts in self.parts.items():
            if bit < 8 * parts[-1].end:
                return name, bit
            bit -= 8 * parts[-1].end
        raise IndexError(bit)

    def part(self, name: str, offset: int) -> Part:
        parts = self.parts[name]
        return parts[bisect_right(parts, offset, key=lambda part: part.start) - 1]


def segments_of(contents: Iterable[str]) -> list[str]:
    return sorted(name for name in contents if name.startswith("wal-"))


def parts_of(contents: Contents) -> dict[str, list[Part]]:
    """How the files of an undamaged log are laid out."""
    found: dict[str, list[Part]] = {}
    kinds = {Kind.DATA: "frame", Kind.CLOSE: "mark", Kind.SEAL: "footer"}
    for name, data in contents.items():
        if not name.startswith("wal-"):
            found[name] = [Part(0, len(data), "header")]
            continue
        header = decode_segment_header(data)
        read = functools.partial(slice_of, data)
        pointer, _ = read_pointer(read, header)
        pointed = None if pointer is None else frame_at(read, header, pointer.offset)
        before = 0 if pointed is None else pointed.next_lsn - 1
        parts = [
            Part(0, POINTER_OFFSET, "header", proves=header.first_lsn - 1),
            Part(POINTER_OFFSET, POINTER_OFFSET + POINTER_BYTES, "pointer", proves=before),
            Part(POINTER_OFFSET + POINTER_BYTES, POINTER_OFFSET + BLOCK, "unused"),
            Part(POINTER_OFFSET + BLOCK, DATA_OFFSET, "reserved"),
        ]
        parts += [
            Part(frame.offset, frame.end, kinds[frame.kind], frame.first_lsn, _proven_by(frame))
            for frame, _ in FrameScanner(read, header, start_of(header))
        ]
        if parts[-1].end < len(data):
            parts.append(Part(parts[-1].end, len(data), "unused"))
        found[name] = parts
    return found


def _proven_by(frame: FrameHeader) -> int:
    return frame.durable_lsn if frame.kind is Kind.DATA else frame.next_lsn - 1


def _crop(files: MemoryFiles, path: str, size: int) -> None:
    """Take the unused end off the last segment, which is prepared ahead and no part of the log."""
    contents = files.contents(path)
    names = segments_of(contents)
    last = contents[names[-1]]
    keep = size - sum(len(contents[name]) for name in names[:-1])
    assert not last[keep:].strip(b"\0"), "there are records"
    files.write_file(path, names[-1], last[:keep])


FIRST: Final = (
    [b"first"],
    [b"second", b"", b"third"],
    [random.Random(1).randbytes(150), bytes(range(250))],
    [b"before the last"],
)
LAST: Final = ([b"last", b"of all"], [b"the very last", b""])


def _log_closed() -> MemoryFiles:
    return make_log(*FIRST, LAST[0])


def _log_crashed() -> MemoryFiles:
    return make_log(*FIRST, *LAST, close=False)


def _log_of_two_sessions() -> MemoryFiles:
    """The mark of a close stands between records."""
    return two_sessions(FIRST[:1], (FIRST[1], [b"between"], LAST[0]))


def _reused(*, close: bool) -> MemoryFiles:
    batches = ([b"record %d" % n] for n in range(100))
    return make_reused_log(*batches, *FIRST, segment_size=SMALL_BYTES, close=close)


def _log_compressed() -> MemoryFiles:
    texts = [[b"text %d " % n * 30] for n in range(5)]
    return make_log(*texts, compression="zstd")


def _database(*, closed: bool) -> MemoryFiles:
    return trio.run(functools.partial(_make_database, MemoryFiles(seed=3), closed=closed))


async def _make_database(files: MemoryFiles, *, closed: bool) -> MemoryFiles:
    """Five or six transactions, two of them in the store already."""
    async with open_memory_database(files, segment_size=TINY, retention=KeepAll()) as db:
        await db.put(b"alice", b"10")
        async with db.transaction() as tx:
            tx.put(b"bob", bytes(range(200)))
            tx.delete(b"alice")
        await db.checkpoint()
        await db.put(b"carol", b"7")
        await db.put(b"bob", b"8")
        await db.put(b"alice", b"11")
        if closed:
            return files
        await db.put(b"dave", b"last")
        return files.crash_image(kind="kill")


def _large(
    *, closed: bool, make: Callable[..., MemoryFiles] = make_log, **options: Any
) -> MemoryFiles:
    """Some 4 MiB in some 18 segments, 1,000 batches of records of 0 to 6,000 bytes."""
    rng = random.Random(2)
    batches = (
        [rng.randbytes(int(6000 * rng.random() ** 3)) for _ in range(rng.choice((1, 1, 2, 7)))]
        for _ in range(1000)
    )
    return make(*batches, close=closed, segment_size=256 * KiB, **options)


@functools.cache
def _log_with_a_past(kind: str, *, closed: bool) -> Past:
    """A log whose end was cut and written anew, and what it was before."""
    files = MemoryFiles(seed=5)
    log = open_log(files)
    moments: list[Contents] = []
    states: list[dict[int, bytes]] = []
    now: dict[int, bytes] = {}

    def write(data: bytes) -> None:
        now[append(log, data)] = data
        moments.append(files.contents(LOG))
        states.append(dict(now))

    for number in range(8):
        write(b"old %d" % number * (800 if kind == "wide" and number % 2 else 1))
    for lsn in CUTS_OF[kind]:
        log.truncate_after(lsn)
        now = {place: data for place, data in now.items() if place <= lsn}
        for number in range(lsn, 9):
            write(b"new %d after %d" % (number, lsn))
    if kind == "dropped":
        log.drop_before(5)
    if closed:
        log.close()
    else:
        files = files.crash_image(kind="kill")
    return Past(files, moments, states)


@attrs.frozen
class Past:
    files: MemoryFiles
    moments: list[Contents]
    states: list[dict[int, bytes]]
    """What each moment's log held."""

    def had(self, records: Iterable[Record]) -> bool:
        """Whether the log once held just these, at these LSNs."""
        return any(
            all(state.get(record.lsn) == record.data for record in records) for state in self.states
        )

    def had_each(self, records: Iterable[Record]) -> bool:
        """Whether each of these was once there, at its LSN."""
        return all(
            any(state.get(record.lsn) == record.data for state in self.states) for record in records
        )


Make = tuple[Callable[[], MemoryFiles], bool]
"""How a log is made, and whether it is then closed in order."""

SMALL: Final[dict[str, Make]] = {
    "log, closed": (_log_closed, True),
    "log, crashed": (_log_crashed, False),
    "log, two sessions": (_log_of_two_sessions, True),
    "log, compressed": (_log_compressed, True),
    "database, closed": (functools.partial(_database, closed=True), True),
    "database, crashed": (functools.partial(_database, closed=False), False),
}
SHORT: Final[dict[str, Make]] = {
    "short log, closed": (lambda: make_log(*FIRST, segment_size=SMALL_BYTES), True),
    "short log, crashed": (
        lambda: make_log(*FIRST, segment_size=SMALL_BYTES, close=False),
        False,
    ),
}
"""Of one segment: no other one vouches for it."""
REUSED: Final[dict[str, Make]] = {
    "reused log, closed": (lambda: _reused(close=True), True),
    "reused log, crashed": (lambda: _reused(close=False), False),
}
"""Of two segments, with bytes of dropped ones behind its end."""


def _past_files(kind: str, *, closed: bool) -> MemoryFiles:
    return copy_of(_log_with_a_past(kind, closed=closed).files)


CUTS_OF: Final = {"once": (2,), "through": (3,), "twice": (2, 4), "wide": (2,), "dropped": (4,)}
"""Where a log's end was cut; two frames are in a segment."""
PAST: Final[dict[str, Make]] = {
    f"{kind} cut, {how}": (
        functools.partial(_past_files, kind, closed=how == "closed"),
        how == "closed",
    )
    for kind in CUTS_OF
    for how in ("closed", "crashed")
}
LARGE: Final[dict[str, Make]] = {
    "large log, closed": (functools.partial(_large, closed=True), True),
    "large log, crashed": (functools.partial(_large, closed=False), False),
    "large reused log, closed": (
        functools.partial(_large, closed=True, make=make_reused_log, keep=6),
        True,
    ),
    "large reused log, crashed": (
        functools.partial(_large, closed=False, make=make_reused_log, keep=6),
        False,
    ),
}


@functools.cache
def subject(name: str) -> Subject:
    make, closed = (SMALL | SHORT | REUSED | PAST | LARGE)[name]
    files = make()
    database = name.startswith("database")
    path = f"{DB}/log" if database else LOG
    if name in SMALL:
        _crop(files, path, SMALL_BYTES)
    for file_name in files.names(path):
        if file_name != META_NAME and not file_name.startswith("wal-"):
            files.remove_file(path, file_name)  # what the next open clears away is no part of it
    log = open_log(copy_of(files), path, database=database, verify_bytes=math.inf)
    records = tuple(read_log(log))
    log.close(orderly=False)
    contents = files.contents(path)
    commits: tuple[Commit, ...] = ()
    if database:
        commits = trio.run(_commits_in, files)
    past = past_of(name) if name in PAST else None
    made = Subject(files, path, closed, records, parts_of(contents), commits, past)
    if name in SMALL:
        sizes = [len(contents[segment]) for segment in segments_of(contents)]
        assert sum(sizes) == SMALL_BYTES, sizes
        assert len(sizes) > 2
    return made


async def _commits_in(files: MemoryFiles) -> tuple[Commit, ...]:
    async with open_memory_database(copy_of(files), retention=KeepAll()) as db:
        assert 0 < db.recovery.checkpoint_lsn < db.durable_lsn
        return tuple(await commits_of(db, 1))


def usable(name: str) -> bool:
    """Whether this subject can be made here: zstandard is an extra."""
    return "compressed" not in name or importlib.util.find_spec("zstandard") is not None


# -- what comes of it ---------------------------------------------------------------


@attrs.frozen
class Damage:
    """Changed files, None: the file is gone; and what was hit of those that are left."""

    what: str
    files: dict[str, bytes | None]
    hit: tuple[tuple[str, int, int], ...]
    """(file, from, to)"""
    must_refuse: bool = False
    """Whole files are missing or foreign: it must be refused, whatever place is named."""
    only: tuple[str, ...] = ()
    """Ways to read for which it is one; nothing: all."""

    @property
    def bytes(self) -> int:
        return sum(end - start for _, start, end in self.hit)

    def apply(self, subject: Subject) -> MemoryFiles:
        image = copy_of(subject.files)
        for name, data in self.files.items():
            if data is not None:
                image.write_file(subject.path, name, data)
            elif name in image.names(subject.path):
                image.remove_file(subject.path, name)
        return image


@attrs.frozen
class Found:
    """What an open of a damaged log, and reading it, came to."""

    outcome: str
    error: str = ""


async def examine(subject: Subject, damage: Damage, verify_bytes: float, memory: Memory) -> Found:
    """Open the damaged copy, read everything, compare."""
    image = damage.apply(subject)
    before = image.contents(subject.path)
    opened: list[bool] = []
    try:
        if subject.commits:
            with memory.of_recovery():
                lsn = await _read_database(subject, image, verify_bytes, opened)
            records = subject.records[:lsn]
        else:
            with memory.of_recovery():
                log = open_log(image, subject.path, verify_bytes=verify_bytes)
            opened.append(True)
            try:
                records = tuple(read_log(log, memory))
            finally:
                log.close(orderly=False)
    except (CorruptLogError, UnsupportedFormatError) as exc:
        if opened:
            return Found(READ, str(exc))
        if image.contents(subject.path) != before:
            if not (subject.commits and _is_refused(subject, image)):
                return Found(SILENT, f"refused, and yet modified: {exc}")
            # The log was opened and repaired; the database then read what it had to replay.
            return Found(READ, str(exc))
        offset = exc.offset if isinstance(exc, CorruptLogError) else 0
        place = REFUSED if _names(subject, damage, exc.path, offset) else ELSEWHERE
        return Found(place, str(exc))
    except Wrong as exc:
        return Found(SILENT, str(exc))
    except Exception as exc:  # noqa: BLE001  (anything else is nobody's to expect)
        return Found(SILENT, f"no typed error: {exc!r}")
    if records == subject.records and not damage.must_refuse:
        return Found(HARMLESS)
    if damage.must_refuse:
        return Found(SILENT, "taken as if it were the log's own")
    lost = subject.records[len(records) :]
    if subject.past is not None and subject.past.had(records):
        return Found(BEFORE)
    if records != subject.records[: len(records)]:
        return Found(SILENT, f"{len(records)} records, not those that were written")
    if not _all_hit(subject, damage, lost[0].lsn):
        return Found(SILENT, f"LSN {lost[0].lsn} to {lost[-1].lsn} are gone, and nobody was told")
    if _had_been_told(subject, lost[0].lsn) and not _parted(subject, image):
        return Found(SILENT, f"LSN {lost[0].lsn} is given again to those who were told of it")
    return Found(TORN)


def _had_been_told(subject: Subject, lsn: int) -> bool:
    """Whether the log's owner had said to other processes that a record is durable."""
    directory = subject.files.open_directory(subject.path)
    meta = read_meta(directory)
    return meta is not None and directory.published().told_lsn(meta.epoch) >= lsn


def _parted(subject: Subject, image: MemoryFiles) -> bool:
    """Whether the log has another epoch than it had."""
    metas = [read_meta(files.open_directory(subject.path)) for files in (subject.files, image)]
    return metas[0] is not None and metas[1] is not None and metas[0].epoch != metas[1].epoch


def _is_refused(subject: Subject, image: MemoryFiles) -> bool:
    """Whether the damage is still there and found when everything is checked."""
    try:
        open_log(copy_of(image), subject.path, database=True, verify_bytes=math.inf)
    except CorruptLogError:
        return True
    return False


async def _read_database(
    subject: Subject, image: MemoryFiles, verify_bytes: float, opened: list[bool]
) -> int:
    """The newest LSN of a database that holds what was committed up to there."""
    async with open_memory_database(
        image, segment_size=TINY, retention=KeepAll(), verify_bytes=verify_bytes
    ) as db:
        opened.append(True)
        lsn = db.durable_lsn
        expected = after_commits({}, subject.commits[:lsn])
        try:
            await check_content(db, expected)
        except AssertionError as exc:
            raise Wrong("other", f"the state is not the one after LSN {lsn}") from exc
        if tuple(await commits_of(db, 1)) != subject.commits[:lsn]:
            raise Wrong("other", "the commits are not those that were made")
        return lsn


def _names(subject: Subject, damage: Damage, path: str, offset: int) -> bool:
    """Whether an error names the place that was hit."""
    if damage.must_refuse:
        return True
    for name, start, end in damage.hit:
        if path != f"{subject.path}/{name}":
            continue
        data = damage.files[name]
        if offset == 0 and (data is None or len(data) < subject.parts[name][-1].end):
            return True  # the file as a whole
        first, last = subject.part(name, start), subject.part(name, end - 1)
        if first.start <= offset <= last.end:
            return True
        if first.kind == "pointer" and subject.part(name, offset).kind in ("footer", "mark"):
            return True  # what the pointer points to
    return False


def _all_hit(subject: Subject, damage: Damage, first_lsn: int) -> bool:
    """Whether everything that told of the records from an LSN on was damaged itself: each of
    their frames, and after a close in order also its mark and the pointer to it."""
    last = segments_of(subject.parts)[-1]
    kinds = {"frame", "mark"} if subject.closed else {"frame"}
    must = [
        (name, part)
        for name, parts in subject.parts.items()
        for part in parts
        if part.kind in kinds and part.first_lsn >= first_lsn
    ]
    if subject.closed:
        must += [(last, part) for part in subject.parts[last] if part.kind == "pointer"]
    hit = _parts_hit(subject, damage)
    return all(pair in hit for pair in must)


async def examine_offline(subject: Subject, damage: Damage, memory: Memory) -> Found:
    """The same damage seen by ``verify``: everything that matters must be a finding."""
    image = damage.apply(subject)
    directory = image.open_directory(subject.path)
    before = image.contents(subject.path)
    try:
        result = verify(directory)
    except (CorruptLogError, UnsupportedFormatError) as exc:
        return Found(REFUSED, str(exc))
    finally:
        directory.close()
    if image.contents(subject.path) != before:
        return Found(SILENT, "verify has modified the log")
    if result.findings:
        place = any(_names(subject, damage, f.path, f.offset) for f in result.findings)
        return Found(REFUSED if place else ELSEWHERE, str(result.findings[0]))
    covered = [part for part in _parts_hit(subject, damage) if _is_covered(subject, *part)]
    if damage.bytes > 1:
        covered = []  # of several parts at once only the whole says whether it matters
    if not covered:
        opened = await examine(subject, damage, math.inf, memory)
        if opened.outcome not in (REFUSED, ELSEWHERE):
            return Found(TORN if result.torn_bytes or not result.clean else HARMLESS)
    return Found(SILENT, f"no finding: {covered or 'and yet it cannot be opened'}")


# -- every way to read ----------------------------------------------------------------


@asynccontextmanager
async def shown(subject: Subject, way: str) -> AsyncIterator[_ways.See]:
    """A way to read, at the undamaged log: to be shown one damage after the other."""
    middle_lsn = subject.records[len(subject.records) // 2].lsn
    scene = _ways.Scene(copy_of(subject.files), subject.path, bool(subject.commits), middle_lsn)
    async with WAYS[way](scene) as look:

        async def see(changes: dict[str, bytes | None]) -> list[Seen]:
            found = await look(changes)
            if way not in WRITERS and not set(scene.files.operations) <= {"open", "pread"}:
                found[0].strange = f"it has written: {scene.files.operations}"
            return found

        yield see


async def examine_way(subject: Subject, damage: Damage, way: str, see: _ways.See) -> list[Found]:
    """The same damage, seen by one of the ways to read."""
    goes = await see(damage.files)
    return [judge_way(subject, damage, way, seen) for seen in goes]


def judge_way(subject: Subject, damage: Damage, way: str, seen: Seen) -> Found:
    """Everything, or what is whole and then an error; or what a crash could have left."""
    if seen.strange:
        return Found(SILENT, f"{seen.what}: {seen.strange}")
    given: Sequence[Any] = seen.records if seen.commits is None else seen.commits
    whole: Sequence[Any] = subject.records if seen.commits is None else subject.commits
    expected = tuple(item for item in whole if item.lsn >= seen.start)[: len(given)]
    if seen.lsns is None and tuple(given) != expected:
        if _is_as_before(subject, damage, seen):
            return Found(BEFORE)
        return Found(SILENT, f"{seen.what}: {len(given)}, not those that were written")
    if seen.error is not None:
        return Found(READ if seen.opened else REFUSED, str(seen.error))
    last = subject.records[-1].lsn
    proven = last if way == OWNER else proven_lsn(subject, damage, word=way != NO_WORD)
    if seen.durable_lsn is not None and seen.durable_lsn < proven:
        return Found(SILENT, f"{seen.what}: durable is {seen.durable_lsn}, proven is {proven}")
    # What was looked at before, and is not needed any more, is not looked at again.
    if damage.must_refuse and way != OWNER and (way != OPEN or seen.start == 1):
        return Found(SILENT, f"{seen.what}: taken as if it were the log's own")
    if seen.last_lsn >= last:
        return Found(HARMLESS)
    if damage.must_refuse or seen.last_lsn < proven:
        return Found(
            SILENT,
            f"{seen.what}: ends after LSN {seen.last_lsn} of {last} without an error, "
            f"though what is left proves {proven}",
        )
    return Found(TORN)


def _is_as_before(subject: Subject, damage: Damage, seen: Seen) -> bool:
    """Whether it is what the log once held, and its owner would take it too; or several stale
    files, which are a chain among themselves, and then an error."""
    past = subject.past
    if past is None:
        return False
    several = len(damage.files) > 1
    if not (past.had_each(seen.records) if several else past.had(seen.records)):
        return False
    if several and seen.error is not None:
        return True
    try:
        open_log(damage.apply(subject), subject.path, verify_bytes=math.inf)
    except CorruptLogError:
        return False
    return True


def proven_lsn(subject: Subject, damage: Damage, *, word: bool) -> int:
    """Up to here what was not hit, and the owner's word, says that all was durable."""
    hit = _parts_hit(subject, damage)
    gone = [name for name, data in damage.files.items() if damage.must_refuse or data is None]
    proven = subject.files.open_directory(subject.path).published().durable_lsn if word else 0
    for name, parts in subject.parts.items():
        if name not in gone:
            proven = max([proven, *(part.proves for part in parts if (name, part) not in hit)])
    return proven


def _parts_hit(subject: Subject, damage: Damage) -> list[tuple[str, Part]]:
    return [
        (name, part)
        for name, start, end in damage.hit
        for part in subject.parts[name]
        if start < part.end and end > part.start
    ]


def _is_covered(subject: Subject, name: str, part: Part) -> bool:
    """Whether damage to a part is damage to the log, and not what a crash may leave behind."""
    names = segments_of(subject.parts)
    if part.kind == "unused":
        return False
    if part.kind in ("footer", "pointer"):
        # The footer of the last but one may still be on its way; the last has none.
        return name in names[:-2]
    if name != names[-1] or part.kind in ("header", "reserved"):
        return True
    ends = [other for other in subject.parts[name] if other.kind in ("frame", "mark")]
    return part != ends[-1]


# -- damages ------------------------------------------------------------------------


def flip(subject: Subject, bit: int) -> Damage:
    name, place = subject.place(bit)
    data = bytearray(subject.files.read_file(subject.path, name))
    data[place // 8] ^= 1 << place % 8
    return Damage(
        f"bit {place % 8} of byte {place // 8} of {name}",
        {name: bytes(data)},
        ((name, place // 8, place // 8 + 1),),
    )


def file_damages(subject: Subject) -> Iterator[Damage]:
    """Each operation on each segment, and on ``log.meta``."""
    contents = subject.contents
    names = segments_of(contents)
    other = _foreign(subject)
    for number, name in enumerate(names):
        data = contents[name]
        whole = ((name, 0, len(data)),)
        before = names[number - 1]
        strange = segment_name(987654321)
        yield Damage(f"{name} missing", {name: None}, (), must_refuse=True)
        if len(names) > 1:
            yield Damage(
                f"{name} and {before} swapped",
                {name: contents[before], before: data},
                (),
                must_refuse=True,
            )
            yield Damage(f"{name} over {before}", {before: data}, (), must_refuse=True)
        yield Damage(f"{name} twice", {strange: data}, (), must_refuse=True)
        yield Damage(f"{name} renamed", {name: None, strange: data}, (), must_refuse=True)
        yield Damage(f"{name} of another log", {name: other[name]}, whole, must_refuse=True)
        yield Damage(f"{name} from the future", {name: _future(data)}, whole, must_refuse=True)
        yield Damage(f"{name} empty", {name: b""}, whole)
        yield Damage(f"{name} all zeros", {name: bytes(len(data))}, whole)
        behind = ((name, len(data) - 1, len(data)),)
        yield Damage(f"{name} with bytes behind", {name: data + b"stray"}, behind)
        for part in subject.parts[name]:
            gone = ((name, part.start, len(data)),)
            yield Damage(f"{name} cut at {part.start}", {name: data[: part.start]}, gone)
            zeros = data[: part.start].ljust(len(data), b"\0")
            yield Damage(f"{name} zeros from {part.start}", {name: zeros}, gone)
            stale = data[: part.start] + other[name][part.start :]
            yield Damage(f"{name} foreign from {part.start}", {name: stale}, gone)
    yield Damage("log.meta missing", {META_NAME: None}, (), must_refuse=True)
    yield Damage(
        "log.meta from the future",
        {META_NAME: _future(contents[META_NAME])},
        ((META_NAME, 0, BLOCK),),
        must_refuse=True,
    )
    yield Damage("log.meta of another log", {META_NAME: other[META_NAME]}, (), must_refuse=True)
    yield Damage("no segment", dict.fromkeys(names), (), must_refuse=True)
    yield Damage("a stray name", {"wal-7.log": b""}, (), must_refuse=True)
    anew = _foreign(subject, b"another ")
    gone: dict[str, bytes | None] = dict.fromkeys(contents)
    yield Damage("another log", {**gone, **anew}, (), must_refuse=True, only=(OPEN,))
    meta = decode_meta(anew[META_NAME])
    empty = replace(meta, live=False).encode()
    yield Damage("a log made anew", {**gone, META_NAME: empty}, (), must_refuse=True, only=(OPEN,))


def _foreign(subject: Subject, mark: bytes = b"") -> Contents:
    """The same log with another UUID and other salts; ``mark`` stands before each record."""
    files = MemoryFiles(seed=99)
    log = open_log(files)
    payloads = {record.lsn: record.data for record in subject.records}
    for part in chain.from_iterable(subject.parts.values()):
        if part.kind == "frame":
            append(log, mark + payloads[part.first_lsn])
    log.close()
    foreign = files.contents(LOG)
    if mark:
        return foreign
    data = foreign[segments_of(foreign)[0]]
    return {
        name: foreign.get(name, data).ljust(len(content), b"\0")[: len(content)]
        for name, content in subject.contents.items()
    }


def stale_damages(name: str, subject: Subject) -> Iterator[Damage]:
    """Segments as they once were, put over those that are, or beside them; one, or all that
    there were at a moment; also under the name of another."""
    now = subject.contents
    tried: set[bytes] = set()
    for moment, contents in enumerate(past_of(name).moments):
        old = {n: d for n, d in contents.items() if n.startswith("wal-") and now.get(n) != d}
        for file, data in old.items():
            if data in tried:
                continue
            tried.add(data)
            yield _stale(subject, f"{file} as it was at {moment}", {file: data})
            for other in segments_of(now):
                if other != file:
                    yield _stale(subject, f"{other} is {file} of {moment}", {other: data})
        if old:
            yield _stale(subject, f"all as they were at {moment}", dict(old))


def past_of(name: str) -> Past:
    kind, _, how = name.partition(" cut, ")
    return _log_with_a_past(kind, closed=how == "closed")


def _stale(subject: Subject, what: str, files: dict[str, bytes | None]) -> Damage:
    hit = tuple((name, 0, subject.parts[name][-1].end) for name in files if name in subject.parts)
    return Damage(what, files, hit)


def _future(data: bytes) -> bytes:
    """The same header of format version 2."""
    fields = data[:8] + b"\2\0" + data[10 : BLOCK - 4]
    return fields + crc32c(fields).to_bytes(4, "little") + data[BLOCK:]


def _random_place(subject: Subject, rng: random.Random, size: int, align: int) -> tuple[str, int]:
    """Somewhere in the used part of a segment; often near the log's end."""
    names = segments_of(subject.parts)
    name = names[-1] if rng.random() < 0.2 else rng.choice(names)
    parts = subject.parts[name]
    used = parts[-1].start if parts[-1].kind == "unused" else parts[-1].end
    start = 0 if rng.random() < 0.8 else max(0, used - 8 * size)
    return name, rng.randrange(start, max(start + 1, used - size + 1)) // align * align


def random_damage(subject: Subject, seed: int) -> Damage:
    """Bytes, sectors and pages that are overwritten, zeroed, swapped or misplaced."""
    rng = random.Random(seed)
    kind = rng.choice(("byte", "bytes", "zeros", "swap", "misplaced", "garbage"))
    size = {"byte": 1, "bytes": rng.randint(2, 3000)}.get(kind, rng.choice((512, 512, 4096, 32768)))
    align = 1 if kind in ("byte", "bytes") else BLOCK
    name, at = _random_place(subject, rng, size, align)
    contents = {name: bytearray(subject.files.read_file(subject.path, name))}
    size = min(size, len(contents[name]) - at)
    hit = [(name, at, at + size)]
    new = rng.randbytes(size)
    if kind == "zeros":
        new = bytes(size)
    elif kind in ("swap", "misplaced"):
        source, start = _random_place(subject, rng, size, align)
        if source not in contents:
            contents[source] = bytearray(subject.files.read_file(subject.path, source))
        new = bytes(contents[source][start : start + size])
        size = len(new)
        hit = [(name, at, at + size)]
        if kind == "swap":
            contents[source][start : start + size] = contents[name][at : at + size]
            hit.append((source, start, start + size))
    contents[name][at : at + size] = new[:size]
    return Damage(
        f"{kind}, {size} bytes at {at} of {name}",
        {key: bytes(value) for key, value in contents.items()},
        tuple(hit),
    )


# -- the campaign -------------------------------------------------------------------


@attrs.frozen
class Task:
    """Some cases of one row."""

    part: str
    subject: str
    mode: str
    cases: range


def run_case(part: str, name: str, mode: str, case: int) -> tuple[Damage, list[Found]]:
    subject(name)  # is made by a run of its own
    told: list[tuple[Damage, list[Found]]] = []

    def each(_: int, damage: Damage, found: list[Found]) -> None:
        told.append((damage, found))

    with _ways.quick():
        trio.run(_run_cases, Task(part, name, mode, range(case, case + 1)), each, clock=_clock())
    return told[0]


def damage_of(part: str, name: str, made: Subject, case: int) -> Damage:
    if part in ("files", "stale"):
        return list_of(part, name)[case]
    return random_damage(made, case) if part == "random" else flip(made, case)


@functools.lru_cache(maxsize=2)  # they hold files
def list_of(part: str, name: str) -> list[Damage]:
    made = subject(name)
    return list(stale_damages(name, made) if part == "stale" else file_damages(made))


async def _run_cases(task: Task, each: Callable[[int, Damage, list[Found]], None]) -> None:
    made, mode = subject(task.subject), task.mode
    memory = Memory()  # most files of a log are not those that were hit
    async with AsyncExitStack() as stack:
        see = await stack.enter_async_context(shown(made, mode)) if mode in WAYS else None
        for case in task.cases:
            damage = damage_of(task.part, task.subject, made, case)
            if damage.only and mode not in damage.only:
                each(case, damage, [])
                continue
            if see is not None:
                each(case, damage, await examine_way(made, damage, mode, see))
            elif mode == OFFLINE:
                each(case, damage, [await examine_offline(made, damage, memory)])
            else:
                each(case, damage, [await examine(made, damage, MODES[mode], memory)])


def run_task(task: Task) -> _report.Answer:
    subject(task.subject)
    with _ways.quick():
        return trio.run(_answer, task, clock=_clock())


def _clock() -> trio.testing.MockClock:
    """Nobody waits for anything but time."""
    return trio.testing.MockClock(autojump_threshold=0)


async def _answer(task: Task) -> _report.Answer:
    counts: Counter[str] = Counter()
    failures: list[tuple[object, str]] = []
    row = (task.part, task.subject, task.mode)

    def each(case: int, damage: Damage, goes: list[Found]) -> None:
        for found in goes:
            counts[found.outcome] += 1
            if found.outcome == SILENT:
                what = f"{task.subject}, {damage.what}: {found.error}"
                failures.append((":".join((*row, str(case))), what))

    await _run_cases(task, each)
    note = f"{task.part}: {task.subject}"
    return _report.Answer(len(task.cases), note, {row: counts}, failures)


def rows(arguments: argparse.Namespace) -> dict[tuple[str, str, str], range]:
    """(part, subject, mode) of each row, and its cases."""
    step = arguments.stride
    wanted: dict[tuple[str, str, str], range] = {}
    small = [name for name in SMALL if usable(name)]
    ways = arguments.ways or WAYS
    for part in arguments.parts or PARTS:
        subjects = {
            "random": list(LARGE),
            "files": [*small, *SHORT, *REUSED],
            "stale": list(PAST),
        }.get(part, [*small, *REUSED])
        for name in subjects:
            if arguments.subject not in name:
                continue
            made = subject(name)
            bits = range(arguments.seed % step, made.bits(), step)
            modes = {
                "flips": [*MODES],
                "verify": [OFFLINE],
                "ways": [*ways],
                "random": [*MODES, *ways],
            }.get(part, ["all", "least", OFFLINE, *ways])
            cases = bits
            if part == "random":
                count = arguments.count // (len(LARGE) * len(modes))
                cases = range(arguments.seed, arguments.seed + count)
            elif part in ("files", "stale"):
                cases = range(len(list_of(part, name)))
                if part == "files" and made.commits:
                    modes = [*ways]
            for mode in modes:
                wanted[part, name, mode] = cases
    return wanted


def tasks_of(wanted: dict[tuple[str, str, str], range]) -> Iterator[Task]:
    for (part, name, mode), cases in wanted.items():
        size = CHUNK if part in ("flips", "verify", "ways") else 64
        for start in range(0, len(cases), size):
            yield Task(part, name, mode, cases[start : start + size])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stride", type=int, default=1, metavar="N", help="flip every N-th bit only (%(default)s)"
    )
    parser.add_argument(
        "--ways",
        action="append",
        choices=WAYS,
        metavar="WAY",
        help=f"to read: {', '.join(WAYS)}; all",
    )
    parser.add_argument(
        "--subject", default="", metavar="TEXT", help="only logs with it in their names; all"
    )
    parser.add_argument("--replay", metavar="PART:SUBJECT:MODE:CASE", help="one case again")
    _report.add_common_arguments(parser, count=60_000, parts=PARTS)


def run(arguments: argparse.Namespace) -> int:
    if arguments.stride < 1:
        return _report.fail_usage("--stride must be 1 or more")
    report = _report.Report(
        "bitrot",
        arguments,
        {"part": "part", "subject": "subject", "mode": "checked", "cases": "cases"}
        | {name: name for name in OUTCOMES},
    )
    wanted = rows(arguments)
    total = sum(map(len, wanted.values()))
    todo = list(tasks_of(wanted))
    if arguments.minutes is not None:
        # Where the time is too short for all of them, some of each row are done.
        random.Random(arguments.seed).shuffle(todo)
    counts, seconds = _report.collect(report, run_task, todo, total)
    for part, name, mode in wanted:
        found = counts.setdefault((part, name, mode), Counter())
        report.add(
            part=part,
            subject=name,
            mode=mode,
            cases=found.total(),
            **{outcome: found[outcome] for outcome in OUTCOMES},
        )
    done = sum(found.total() for found in counts.values())
    silent = sum(found[SILENT] for found in counts.values())
    report.note(
        f"{done:,} damages, {silent} silent; {_report.per_minute(done, seconds):,} a minute"
    )
    for name in SMALL:
        if not usable(name):
            report.note(f"not run: {name}: zstandard is not installed")
    return report.finish()


def replay(case: str) -> int:
    part, name, mode, number = case.split(":")
    damage, found = run_case(part, name, mode, int(number))
    print(f"{name}: {damage.what}")
    for one in found:
        print(f"checked: {mode}; outcome: {one.outcome}; {one.error}")
    return 1 if any(one.outcome == SILENT for one in found) else 0
