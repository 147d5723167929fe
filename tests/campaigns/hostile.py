"""Hostile files: forged logs with good checksums, bombs, strange names, links, FIFOs.

Law: whatever stands in the directory, opening, reading, verifying, inspecting and dumping it
end in an answer or in a typed error (`WalError`, `OSError`), within a bound of memory
(RLIMIT_AS) and of time.  A refused open has changed nothing; an accepted log keeps what is
appended to it; nothing outside of the directory is touched.
"""

from __future__ import annotations

import argparse
import atexit
import codecs
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import math
import os
import random
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs
import trio
from databases import DB
from helpers import read_all
from logs import LOG, TINY

import trio_wal
from trio_wal import WalError
from trio_wal._disk import recovery
from trio_wal._disk.chain import META_NAME, META_NEW_NAME, TRUNCATE_NAME
from trio_wal._disk.frame import BATCH_RECORDS_MAX, FRAME_BODY_MAX, Kind, segment_name
from trio_wal._disk.recovery import VERIFY_BYTES
from trio_wal._disk.segment import NEW_NAME, SPARE_PREFIX
from trio_wal._disk.verify import verify
from trio_wal._files import LOCK_NAME
from trio_wal._store_files import DATA_NAME, LOCK_NAME as STORE_LOCK_NAME, SUSPECT_NAME
from trio_wal._util import MiB
from trio_wal.testing import MemoryFiles

from . import _forge, _report
from ._forge import Contents
from ._promises import Wrong, check

MEMORY_BYTES: Final = 512 * MiB
"""What a process may take for the inputs, beyond what it has before the first."""
BOMB_MEMORY_BYTES: Final = 3 * FRAME_BODY_MAX
"""For the largest frames that the format allows, in address space beyond what the process has: a
body of 1 GiB, decompressed, taken apart, and printed as text.  It is there twice at a time."""
BOMB_AVAILABLE_BYTES: Final = 4 << 30
BOMB_SECONDS_MAX: Final = 300
"""Each NUL of 1 GiB is printed as six bytes."""
SECONDS_MAX: Final = 30
"""Of one input, with room for a machine that does other things."""
COUNT: Final = 100_000
CHUNK: Final = 400
CASES: Final = "cases"
"""Row of how many there were of each part."""
REAL_EVERY: Final = 64
"""One of so many inputs is also put on real files and given to the command line."""
PARTS: Final = ("inputs", "names", "places", "bombs")
OPTIONS: Final[dict[str, Any]] = {"segment_size": TINY, "flush_interval": 0}


class Slow(BaseException):
    """An input takes too long; nobody may catch this."""


# -- an input, on files in memory ---------------------------------------------------


def files_of(contents: Contents, path: str) -> MemoryFiles:
    files = MemoryFiles(seed=11)
    files.open_directory(path, create=True).close()
    for name, data in contents.items():
        files.write_file(path, name, data)
    return files


@attrs.define
class Outcomes:
    """What each way of looking at an input came to."""

    counts: Counter[str] = attrs.Factory(Counter)

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Only the typed errors may come out."""
        try:
            yield
        except (WalError, OSError) as exc:
            self.counts[f"{what}: {type(exc).__name__}"] += 1
        else:
            self.counts[f"{what}: ok"] += 1


async def examine(contents: Contents, database: bool, rng: random.Random) -> Outcomes:
    """Everything that reads, and writes where a log can be opened."""
    outcomes = Outcomes()
    path = f"{DB}/log" if database else LOG
    verify_bytes = rng.choice((math.inf, VERIFY_BYTES, 0))
    files = files_of(contents, path)
    directory = files.open_directory(path)
    findings = True
    with outcomes.of("verify"):
        findings = bool(verify(directory).findings)
    await _open_log(outcomes, contents, verify_bytes, sound=not findings)
    with outcomes.of("read"):
        async with trio_wal.open_reader(path, files=files) as reader:
            async with reader.read() as records:
                found = [record async for record in records]
            with outcomes.of("dump"):
                _dump(found, database)
    refused = True
    with contextlib.suppress(WalError, OSError):
        recovery.examine(directory, verify_bytes=math.inf)
        refused = False
    with outcomes.of("inspect"):
        _inspect(directory)
    check(files.contents(path) == contents, "a reader has written")
    check(findings or not refused, "refused, and verify finds nothing")
    if database:
        await _open_database(outcomes, contents)
    return outcomes


async def _open_log(
    outcomes: Outcomes, contents: Contents, verify_bytes: float, *, sound: bool
) -> None:
    """Open, read, append; open again and cut.

    Args:
      sound: whether `verify` finds nothing.  It also looks behind the end of a log that was closed
          in order, where opening does not look, and where appending will come to.
    """
    files = files_of(contents, LOG)
    options = {**OPTIONS, "verify_bytes": verify_bytes}
    unchecked = verify_bytes != math.inf
    opened = acknowledged = False
    closed = True
    whole: list[bytes] = []
    with outcomes.of("open"):
        async with trio_wal.open_wal(LOG, files=files, **options) as wal:
            opened = True
            closed = wal.recovery.clean_shutdown
            with outcomes.of("read own"):
                whole = list((await read_all(wal)).values())
                check(len(whole) == wal.last_lsn - wal.first_lsn + 1, "records are missing")
                with outcomes.of("append"):
                    lsn = await wal.append(b"after")
                    check(lsn == wal.last_lsn, f"LSN {lsn} is not the last")
                    acknowledged = True
    if not opened:
        check(files.contents(LOG) == contents, "refused, and yet modified")
    if not acknowledged:
        return
    again: list[bytes] = []
    with accepted() if sound or not closed else outcomes.of("open again"):
        async with trio_wal.open_wal(LOG, files=files, **options) as wal:
            with outcomes.of("read again"):
                again = list((await read_all(wal)).values())
                check(
                    again == [*whole, b"after"] or unchecked, "what was acknowledged is not there"
                )
            with outcomes.of("truncate"):
                await wal.truncate_after(wal.first_lsn)
                await wal.truncate_before(wal.last_lsn + 1)
    check(
        again or unchecked or (closed and not sound), "accepted, written, and then not to be read"
    )


@contextlib.contextmanager
def accepted() -> Iterator[None]:
    """What was accepted once, and written, must be so again."""
    try:
        yield
    except (WalError, OSError) as exc:
        raise Wrong("other", f"accepted, written, and then refused: {exc}") from exc


def _command(name: str) -> Any:
    """A command's module; None without the extra: then there is no command line."""
    if importlib.util.find_spec("cyclopts") is None:
        return None
    return importlib.import_module(f"trio_wal._cli.{name}")


def _dump(records: list[trio_wal.Record], database: bool) -> None:
    command = _command("dump")
    if command is not None:
        pieces_of = partial(command.transaction_pieces, LOG) if database else command.pieces
        for record in records[:1000]:
            sink = Sink()
            for piece in pieces_of(record):
                sink.write(piece)
            sink.check_end()


def _inspect(directory: Any) -> None:
    command = _command("inspect")
    if command is not None:
        log = command._as_json(command._look(directory))
        Sink().write(_command("_output").to_json(log))


async def _open_database(outcomes: Outcomes, contents: Contents) -> None:
    files = files_of(contents, f"{DB}/log")
    acknowledged = False
    before: dict[bytes, bytes] = {}
    with outcomes.of("open database"):
        async with trio_wal.open_database(DB, files=files, **OPTIONS) as db:
            before = dict(db.scan())
            with outcomes.of("commit"):
                await db.put(b"after", b"1")
                acknowledged = True
    if acknowledged:
        with accepted():
            async with trio_wal.open_database(DB, files=files) as db:
                again = dict(db.scan())
                with outcomes.of("checkpoint"):
                    await db.checkpoint()
        check(again == {**before, b"after": b"1"}, "what was committed is not there")


# -- the same on real files, through the command line -------------------------------


class Sink(io.RawIOBase):
    """Takes what a command writes, keeps nothing, and looks for what a terminal would obey.

    Every line must be printable; what it says is not its business.
    """

    _CONTROLS = bytes(code for code in (*range(32), 127) if code != 10)

    def __init__(self) -> None:
        super().__init__()
        self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        clean = len(piece.translate(None, self._CONTROLS)) == len(piece)
        check(clean, "a control character is printed")
        text = self._decode(piece)
        if not piece.isascii():
            check(text.replace("\n", "").isprintable(), "what is not printable is printed")
        return len(piece)

    def check_end(self) -> None:
        self._decode(b"", True)


def examine_real(contents: Contents, database: bool, folder: Path) -> Outcomes:
    outcomes = Outcomes()
    path = folder / "log"
    path.mkdir()
    try:
        for name, data in contents.items():
            (path / name).write_bytes(data)
        look_at_real(outcomes, path)
        check({p.name: p.read_bytes() for p in path.iterdir()} == contents, "a reader has written")
        trio.run(_open_real, outcomes, path)
    finally:
        shutil.rmtree(path)
    return outcomes


def look_at_real(outcomes: Outcomes, path: Path) -> None:
    """The reading commands, each in the way the terminal calls them."""
    if importlib.util.find_spec("cyclopts") is None:
        return
    run_command = importlib.import_module("trio_wal._cli").run
    for arguments in (["verify"], ["inspect", "--json"], ["inspect"], ["dump"]):
        sinks = Sink(), Sink()
        out, err = (
            io.TextIOWrapper(io.BufferedWriter(sink), encoding="utf-8", write_through=True)
            for sink in sinks
        )
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_command([arguments[0], str(path), *arguments[1:]])
        for stream, sink in zip((out, err), sinks, strict=True):
            stream.flush()
            sink.check_end()
        check(code in (0, 1, 3), f"{arguments[0]} exits with {code}")
        outcomes.counts[f"trio-wal {arguments[0]}: {code}"] += 1


async def _open_real(outcomes: Outcomes, path: Path) -> None:
    with outcomes.of("open, real files"):
        async with trio_wal.open_wal(path, **OPTIONS) as wal:
            with outcomes.of("read, real files"):
                await read_all(wal)


# -- names: what is no regular file, and where none should be ------------------------

Place = Callable[[Path, Path], None]
"""Puts something at a path; the second one is outside of the log."""


def _fifo(path: Path, canary: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path, canary: Path) -> None:
    # Bound from within: the name of a socket may not be long.
    before = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(before)
        os.close(before)


def _device(path: Path, canary: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero: endless


def _filled_directory(path: Path, canary: Path) -> None:
    path.mkdir()
    (path / "kept").write_bytes(b"kept")


KINDS: Final[dict[str, Place]] = {
    "link to a file": lambda path, canary: path.symlink_to(canary / "file"),
    "link to a log's file": lambda path, canary: path.symlink_to(canary / "log" / path.name),
    "link to itself": lambda path, canary: path.symlink_to(path.name),
    "link to nothing": lambda path, canary: path.symlink_to(canary / "nothing"),
    "link out of here": lambda path, canary: path.symlink_to(f"../../{canary.name}/file"),
    "directory": lambda path, canary: path.mkdir(),
    "directory with a file": _filled_directory,
    "FIFO": _fifo,
    "socket": _socket,
    "endless device": _device,
    "empty file": lambda path, canary: path.touch(),
    "hard link": lambda path, canary: path.hardlink_to(canary / "file"),
}


def _fits(target: str, kind: str) -> bool:
    """The address of a socket is short, unlike a file's name."""
    return kind != "socket" or len(os.fsencode(target)) < 100


TARGETS: Final = (
    META_NAME,
    LOCK_NAME,
    META_NEW_NAME,
    NEW_NAME,
    TRUNCATE_NAME,
    f"{SPARE_PREFIX}1.tmp",
    f"{SPARE_PREFIX}2.tmp",
    segment_name(1),
    segment_name(5),
    segment_name(99),
    *_forge.NAMES,
)


def examine_name(target: str, kind: str, folder: Path) -> Outcomes:
    """One thing in the place of a log's file, or beside them."""
    outcomes = Outcomes()
    contents = _forge.base("closed")
    path, canary = folder / "log", folder / "canary"
    path.mkdir()
    (canary / "log").mkdir(parents=True)
    for name, data in contents.items():
        (path / name).write_bytes(data)
        (canary / "log" / name).write_bytes(data)
    with _removed(path, canary):
        if not put(outcomes, KINDS[kind], path / target, canary):
            return outcomes
        before = _tree(canary)
        look_at_real(outcomes, path)
        for _ in range(2):
            trio.run(_open_real, outcomes, path)
        with outcomes.of("open database, real files"):
            trio.run(_open_real_database, folder)
        same = _tree(canary) == before
        # The lock file says who has the log, also where it has a second name elsewhere.
        check(same or (target, kind) == (LOCK_NAME, "hard link"), "the outside was changed")
    return outcomes


def put(outcomes: Outcomes, kind: Place, place: Path, canary: Path) -> bool:
    """Put something in the place of a file or directory; False: the system does not permit it."""
    (canary / "file").write_bytes(b"outside")
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    try:
        kind(place, canary)
    except PermissionError:
        outcomes.counts["not permitted here"] += 1
        return False
    return True


@contextlib.contextmanager
def _removed(*folders: Path) -> Iterator[None]:
    try:
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder)


# -- places: the same in a database's directory --------------------------------------

PLACES: Final = (
    "log",
    "store",
    *(f"store/{name}" for name in (DATA_NAME, STORE_LOCK_NAME, SUSPECT_NAME, "other")),
    *(f"log/{name}" for name in (META_NAME, segment_name(1))),
)
PLACE_SECONDS_MAX: Final = 30
PLACES_SHARE: Final = 12
"""So many where there is only so much time."""
STORE_KINDS: Final[dict[str, Place]] = {
    **KINDS,
    "link to a directory": lambda path, canary: path.symlink_to(canary / "empty"),
    "link to a log": lambda path, canary: path.symlink_to(canary / "log"),
    "link to a store": lambda path, canary: path.symlink_to(canary / "store"),
    "link to an empty file": lambda path, canary: path.symlink_to(canary / "nothing in it"),
    "hard link to an empty file": lambda path, canary: path.hardlink_to(canary / "nothing in it"),
    "gone": lambda path, canary: None,
}


def examine_place(target: str, kind: str, folder: Path) -> Outcomes:
    """One thing in the place of a database's file or directory."""
    outcomes = Outcomes()
    path, canary = folder / "db", folder / "canary"
    shutil.copytree(_database(), path)
    for name in ("log", "store"):
        shutil.copytree(path / name, canary / name)
    (canary / "empty").mkdir()
    (canary / "nothing in it").touch()
    with _removed(path, canary):
        if not put(outcomes, STORE_KINDS[kind], path / target, canary):
            return outcomes
        before = _tree(canary)
        look_at_real(outcomes, path)
        for how in ("auto", "child", "none"):
            with outcomes.of("open database"):
                trio.run(_open_and_write, path, how)
        check(_tree(canary) == before, "the outside was changed")
        if kind.startswith("link ") and target != "store/other":
            check(outcomes.counts["open database: ok"] == 0, "a link was followed")
    return outcomes


@functools.lru_cache
def _database() -> Path:
    """One to be copied; removed with the process."""
    folder = tempfile.mkdtemp(dir=_report.fast_folder())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    trio.run(_make_database, Path(folder) / "db")
    return Path(folder) / "db"


async def _make_database(path: Path) -> None:
    async with trio_wal.open_database(path, map_size=1 * MiB) as db:
        await db.put(b"a", b"1")
        await db.checkpoint()


async def _open_and_write(path: Path, how: Any) -> None:
    async with trio_wal.open_database(path, map_size=1 * MiB, verify_store=how) as db:
        dict(db.scan())
        await db.put(b"b", b"2")
        await db.checkpoint()


async def _open_real_database(path: Path) -> None:
    async with trio_wal.open_database(path, map_size=1 * MiB):
        pass


def _tree(path: Path) -> dict[str, tuple[int, str]]:
    """Every name, its mode, what it holds."""
    return {
        str(entry.relative_to(path)): (
            entry.lstat().st_mode,
            hashlib.sha256(entry.read_bytes()).hexdigest() if entry.is_file() else "",
        )
        for entry in sorted(path.rglob("*"))
    }


# -- bombs: the largest that the format allows ---------------------------------------


def _bomb(log: _forge.Log, raw: list[bytes], raw_length: int, count: int) -> None:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=sum(map(len, raw)))
    body = b"".join([*map(compressor.compress, raw), compressor.flush()])
    frame = log.segments[0].frames[0]
    frame.body, frame.raw_length, frame.count, frame.codec = body, raw_length, count, 1


PIECE_BYTES: Final = 64 * MiB


def _large_record(log: _forge.Log) -> None:
    """One record of 1 GiB, in a file of some KiB: of NULs, which take most room as text."""
    piece = bytes(PIECE_BYTES)
    size = FRAME_BODY_MAX
    pieces = [struct.pack("<I", size - 4) + piece[4:], *[piece] * (size // PIECE_BYTES - 1)]
    _bomb(log, pieces, size, 1)


def _many_records(log: _forge.Log) -> None:
    """As many records as fit into 1 GiB: a quarter of a milliard empty ones."""
    pieces = [bytes(PIECE_BYTES)] * (FRAME_BODY_MAX // PIECE_BYTES)
    _bomb(log, pieces, FRAME_BODY_MAX, FRAME_BODY_MAX // 4)


def _too_many_records(log: _forge.Log) -> None:
    size = 4 * (BATCH_RECORDS_MAX + MiB)
    _bomb(log, [bytes(size)], size, size // 4)
    # Whatever came behind it would contradict it, before its records are looked at.
    del log.segments[1:], log.segments[0].frames[1:]


def _most_records(log: _forge.Log) -> None:
    size = 4 * BATCH_RECORDS_MAX
    _bomb(log, [bytes(size)], size, BATCH_RECORDS_MAX)


def _larger_than_it_says(log: _forge.Log) -> None:
    _bomb(log, [bytes(PIECE_BYTES)] * 16, 4096, 1)


def _long_frame(log: _forge.Log) -> None:
    """A header that claims 1 GiB, in a short file."""
    frame = log.segments[0].frames[0]
    frame.stored_length = frame.raw_length = FRAME_BODY_MAX


def _long_footer(log: _forge.Log) -> None:
    for frame in log.segments[0].frames:
        if frame.kind == Kind.SEAL:
            frame.stored_length = frame.raw_length = FRAME_BODY_MAX


BOMBS: Final[dict[str, tuple[Callable[[_forge.Log], None], int]]] = {
    "a record of 1 GiB": (_large_record, BOMB_MEMORY_BYTES),
    "268 million empty records": (_many_records, BOMB_MEMORY_BYTES),
    "16 million empty records": (_most_records, BOMB_MEMORY_BYTES),
    "17 million empty records": (_too_many_records, MEMORY_BYTES),
    "1 GiB that says it is 4 KiB": (_larger_than_it_says, MEMORY_BYTES),
    "a frame of 1 GiB in 6 KiB": (_long_frame, MEMORY_BYTES),
    "a footer of 1 GiB in 6 KiB": (_long_footer, MEMORY_BYTES),
}


def examine_bomb(name: str, folder: Path) -> Outcomes:
    """The reading commands and an open; the limit is the caller's."""
    log = _forge.take_apart(_forge.base("compressed"))
    BOMBS[name][0](log)
    return examine_real(log.encode(), False, folder)


def in_a_process(name: str) -> Outcomes:
    """A process of its own for each bomb: its limit is another, and it may be killed."""
    command = [sys.executable, "-m", "campaigns", "hostile", "--replay", f"bombs:{name}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, check=False)
    check(done.returncode == 0, f"exit code {done.returncode}: {done.stdout[-300:]!r}")
    lines = (line.split(maxsplit=1) for line in done.stdout.decode().splitlines())
    return Outcomes(Counter({what: int(number) for number, what in lines}))


def missing_memory() -> str:
    """Why the bombs cannot be set off here; nothing: they can."""
    if "compressed" not in _forge.BASES:
        return "zstandard is not installed"
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return "how much memory there is cannot be told"
    kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if kib * 1024 < BOMB_AVAILABLE_BYTES:
        return f"only {kib // 1024:,} MiB of memory are free of {BOMB_AVAILABLE_BYTES // MiB:,}"
    return ""


# -- limits -------------------------------------------------------------------------


def limit_memory(extra: int) -> None:
    """Where the platform can: no more address space than now and so much."""
    if sys.platform != "linux":
        return
    import resource

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, hard))


@contextlib.contextmanager
def limited_time(seconds: float = SECONDS_MAX) -> Iterator[None]:
    """Raises `Slow`; the shorter of two that are nested counts."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    limit = min(seconds, left or seconds)

    def ring(number: int, frame: object) -> None:
        raise Slow(f"more than {limit:.3g} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


# -- the campaign -------------------------------------------------------------------


@attrs.frozen
class Task:
    part: str
    cases: tuple[str, ...]


_limits: list[int] = []


def limit_once(extra: int) -> None:
    if not _limits:
        # Everything that is loaded once is loaded before the limit is set.
        with contextlib.suppress(Exception):
            run_case("inputs", "0")
        _limits.append(extra)
        limit_memory(extra)


def run_task(task: Task) -> _report.Answer:
    if task.part != "bombs":
        limit_once(MEMORY_BYTES)
    counts: Counter[str] = Counter()
    failures: list[tuple[object, str]] = []
    left = deque(task.cases)

    def run() -> None:
        if task.part == "inputs" and not is_real(left[0]):
            trio.run(_run_inputs, left, counts)
        else:
            counts.update(run_case(task.part, left[0]).counts)
            left.popleft()

    while left:
        if found := _report.found_in(run):
            failures.append((f"{task.part}:{left.popleft()}", found))
    rows = {task.part: counts, CASES: Counter({task.part: len(task.cases)})}
    return _report.Answer(len(task.cases), task.part, rows, failures)


async def _run_inputs(left: deque[str], counts: Counter[str]) -> None:
    """As many as there are, up to the next that is put on real files, in one run of trio.

    What one of them raises, and be it in trio's own code, ends the run: it is then the first
    that is left.
    """
    while left and not is_real(left[0]):
        with limited_time():
            rng = random.Random(int(left[0]))
            counts.update((await examine(*_forge.mutated(rng), rng)).counts)
        left.popleft()


def is_real(case: str) -> bool:
    return int(case) % REAL_EVERY == 0


def run_case(part: str, case: str) -> Outcomes:
    with limited_time(BOMB_SECONDS_MAX if part == "bombs" else SECONDS_MAX):
        if part == "inputs":
            return run_input(random.Random(int(case)), real=is_real(case))
        with tempfile.TemporaryDirectory(dir=_report.fast_folder()) as folder:
            if part == "bombs":
                return in_a_process(case) if not _limits else examine_bomb(case, Path(folder))
            target, _, kind = case.partition("|")
            if part == "places":
                with limited_time(PLACE_SECONDS_MAX):
                    return examine_place(target, kind, Path(folder))
            return examine_name(target, kind, Path(folder))


def run_input(rng: random.Random, *, real: bool) -> Outcomes:
    contents, database = _forge.mutated(rng)
    outcomes = trio.run(examine, contents, database, rng)
    if real:
        with tempfile.TemporaryDirectory(dir=_report.fast_folder()) as folder:
            outcomes.counts.update(examine_real(contents, database, Path(folder)).counts)
    return outcomes


def _count(arguments: argparse.Namespace) -> int:
    """Of the random inputs; with a time and no number there is no end."""
    if arguments.count is not None:
        return int(arguments.count)
    return COUNT if arguments.minutes is None else 1 << 40


def tasks_of(arguments: argparse.Namespace) -> Iterator[Task]:
    parts = arguments.parts or PARTS
    if "bombs" in parts and not missing_memory():
        yield from (Task("bombs", (name,)) for name in BOMBS)
    if "names" in parts and sys.platform != "win32":
        cases = [f"{target}|{kind}" for target in TARGETS for kind in KINDS if _fits(target, kind)]
        yield from (Task("names", tuple(cases[n : n + 24])) for n in range(0, len(cases), 24))
    if "places" in parts and sys.platform != "win32":
        cases = [f"{t}|{kind}" for t in PLACES for kind in STORE_KINDS if _fits(t, kind)]
        if arguments.minutes is not None:
            # Each takes a second, and the inputs come after them.
            cases = random.Random(arguments.seed).sample(cases, PLACES_SHARE)
        yield from (Task("places", tuple(cases[n : n + 12])) for n in range(0, len(cases), 12))
    if "inputs" in parts:
        for start in range(0, _count(arguments), CHUNK):
            numbers = range(start, min(start + CHUNK, _count(arguments)))
            seeds = (str((arguments.seed << 32) + number) for number in numbers)
            yield Task("inputs", tuple(seeds))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replay", metavar="PART:CASE", help="one case again")
    _report.add_common_arguments(parser, parts=PARTS)


def run(arguments: argparse.Namespace) -> int:
    columns = {"part": "part", "looked": "looked at by", "cases": "times"}
    report = _report.Report("hostile", arguments, columns | {"ok": "ok", "errors": "typed errors"})
    total = None
    if arguments.minutes is None or arguments.count is not None:
        total = sum(len(task.cases) for task in tasks_of(arguments))
    counts, seconds = _report.collect(report, run_task, tasks_of(arguments), total)
    cases = counts.pop(CASES, Counter())
    for part, found in counts.items():
        for name in dict.fromkeys(key.rpartition(": ")[0] for key in found):
            errors = {
                key.rpartition(": ")[2]: number
                for key, number in found.items()
                if key.rpartition(": ")[0] == name
            }
            fine = errors.pop("ok", 0)
            told = ", ".join(f"{key} {number:,}" for key, number in sorted(errors.items()))
            report.add(
                part=part, looked=name, cases=fine + sum(errors.values()), ok=fine, errors=told
            )
    done = cases.total()
    report.note(
        f"{done:,} inputs ({', '.join(f'{part} {number:,}' for part, number in cases.items())}), "
        f"{_report.per_minute(done, seconds):,} a minute"
    )
    report.note(f"memory: {MEMORY_BYTES // MiB} MiB above the start of a process, by RLIMIT_AS")
    if "bombs" in (arguments.parts or PARTS):
        why = missing_memory()
        limit = f"{BOMB_MEMORY_BYTES // MiB:,} MiB for what decompresses to 1 GiB"
        report.note(f"bombs not set off: {why}" if why else f"bombs: {limit}")
    return report.finish()


def replay(text: str) -> int:
    part, _, case = text.partition(":")
    if part not in PARTS:
        raise KeyError(part)
    limit_once(BOMBS[case][1] if part == "bombs" else MEMORY_BYTES)
    answer = run_task(Task(part, (case,)))
    for what, number in sorted(answer.rows[part].items()):
        print(f"{number:6} {what}")
    for _, what in answer.failures:
        print(what)
    return 1 if answer.failures else 0
