"""Damaged stores: pages of LMDB's file changed at random, and `verify` as the judge.

Law: one sound database, one damage to ``store/data.mdb``, and then a process of its own that
asks the check that `verify` and ``verify_store="child"`` make and reads everything in every
way.  What comes of it is one of the outcomes below.  `SIGNAL`, `BARE`, `DIFFERS` and `FOREIGN`
are the defects: a check that said "sound", and then reading ended the process, raised an error
that is not this package's, missed or made up a key, or LMDB's own verifier knew better.

A changed byte inside a value cannot be seen, because the store has no checksums: that is
`VALUE`, and is counted.

Some of the stores that were found unsound are opened all the same (``verify_store="none"``) and
read: that may end the process, which is `CRASH`, and is why stores are checked; but what comes
out of it as an error must be one of this package's.

A process judges many damages, one after the other; one that is ended by a signal is replaced,
and the damage it was at is the one that did it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import trio
from databases import hash_tree

import trio_wal
from trio_wal import CorruptLogError, WalError, _pages, _store_check, _store_files
from trio_wal._disk.verify import Verification, verify
from trio_wal._system.files import OsFiles

from . import _report

COUNT: Final = 20_000
CHUNK: Final = 200
"""Cases of one process."""
WRITE_EVERY: Final = 8
"""One of so many stores that are called sound is written, checkpointed and backed up as well, and
all of those in which a node was changed."""
UNCHECKED_EVERY: Final = 4
"""One of so many that are found unsound is read without a check."""
PAGE: Final = 4096
FOLDER: Final = "CAMPAIGN_FOLDER"
"""Names the folder in which a process makes its own; it may not be able to remove them."""

REFUSED: Final = "refused"
SAME: Final = "nothing changed"
VALUE: Final = "another value"
SIGNAL: Final = "SIGNAL"
BARE: Final = "BARE ERROR"
DIFFERS: Final = "DIFFERS"
FOREIGN: Final = "LMDB'S OWN KNOWS"
CRASH: Final = "signal, unchecked"
UNCHECKED: Final = "about to be read, unchecked"
DEFECTS: Final = (SIGNAL, BARE, DIFFERS, FOREIGN)
OUTCOMES: Final = (REFUSED, SAME, VALUE, CRASH, *DEFECTS)

State = dict[bytes, bytes]


# -- what is damaged ----------------------------------------------------------------


@attrs.frozen
class Subject:
    """A database, closed in order, and what it holds."""

    folder: Path
    content: bytes
    state: State
    log: Verification


def _mixed(rng: random.Random) -> Iterator[State]:
    """Keys and values of every size, some large; deleted again in part."""
    for _ in range(3):
        yield {
            rng.randbytes(rng.choice((1, 4, 20, 300, 511))): rng.randbytes(
                rng.choice((0, 1, 30, 500, 2500, 9000))
            )
            for _ in range(60)
        }


def _small(rng: random.Random) -> Iterator[State]:
    """Many short ones: pages full of slots."""
    for start in range(3):
        yield {b"key-%05d" % n: b"v%d" % n for n in range(start, 1500, 3)}


def _deep(rng: random.Random) -> Iterator[State]:
    """Long keys: four levels of them."""
    for start in range(2):
        yield {b"%05d" % n + b"k" * 480: b"%d" % n for n in range(start, 700, 2)}


SUBJECTS: Final[dict[str, Callable[[random.Random], Iterator[State]]]] = {
    "mixed": _mixed,
    "small": _small,
    "deep": _deep,
}


@functools.lru_cache
def subject(name: str) -> Subject:
    """Made once in a process, the same way each time."""
    where = os.environ.get(FOLDER) or _report.fast_folder()
    folder = Path(tempfile.mkdtemp(dir=where, prefix="trio-wal-store-"))
    state = trio.run(_make, folder / "db", name)
    content = (folder / "db" / "store" / "data.mdb").read_bytes()
    log = verify(OsFiles().open_directory(str(folder / "db" / "log")))
    return Subject(folder, content, state, log)


def forget_subjects() -> None:
    """Remove what `subject` has made."""
    for name in SUBJECTS:
        shutil.rmtree(subject(name).folder, ignore_errors=True)
    subject.cache_clear()


async def _make(path: Path, name: str) -> State:
    rng = random.Random(name)
    state: State = {}
    async with trio_wal.open_database(path, segment_size=1) as db:
        for piece in SUBJECTS[name](rng):
            gone = rng.sample(sorted(state), len(state) // 4)
            async with db.transaction() as tx:
                for key, value in piece.items():
                    tx.put(key, value)
                for key in gone:
                    if key not in piece:
                        tx.delete(key)
            state.update(piece)
            for key in gone:
                if key not in piece:
                    del state[key]
            await db.checkpoint()
    return state


@functools.lru_cache
def _other() -> bytes:
    """The pages of another database."""
    made = subject("small")
    rng = random.Random(5)
    content = bytearray(made.content)
    for offset in range(2 * PAGE, len(content), PAGE):
        if rng.random() < 0.2:
            content[offset + 3000 : offset + 3004] = rng.randbytes(4)
    return bytes(content)


Damage = Callable[[bytearray, random.Random], None]


def _page(content: bytearray, rng: random.Random) -> int:
    return PAGE * rng.randrange(len(content) // PAGE)


def _bit(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _header_byte(content: bytearray, rng: random.Random) -> None:
    """In the 16 bytes with which a page begins."""
    content[_page(content, rng) + rng.randrange(16)] = rng.randrange(256)


def _slot(content: bytearray, rng: random.Random) -> None:
    """Where a node is."""
    at = _page(content, rng) + 16 + 2 * rng.randrange(20)
    value = rng.choice((rng.randrange(PAGE), rng.randrange(1 << 16), 0, 0xFFFF, PAGE - 4))
    struct.pack_into("=H", content, at, value)


def _nodes(content: bytearray, rng: random.Random) -> int | None:
    """The place of a node of some page."""
    page = _page(content, rng)
    lower = struct.unpack_from("=H", content, page + 12)[0]
    if not 16 < lower < PAGE:
        return None
    at: int = struct.unpack_from("=H", content, page + 16 + 2 * rng.randrange((lower - 16) // 2))[0]
    return page + at if at < PAGE - 8 else None


def _node(content: bytearray, rng: random.Random) -> None:
    """The length of a value or key, the flags, the page of a child."""
    at = _nodes(content, rng)
    if at is not None:
        content[at + rng.randrange(8)] = rng.choice((0, 1, 2, 4, 255, rng.randrange(256)))


def _in_node(content: bytearray, rng: random.Random) -> None:
    """A key, or what follows it: the record of a database, the number of a page."""
    at = _nodes(content, rng)
    if at is not None and at + 80 < len(content):
        content[at + 8 + rng.randrange(60)] = rng.choice((0, 255, rng.randrange(256)))


def _swap_slots(content: bytearray, rng: random.Random) -> None:
    page = _page(content, rng)
    one, other = (page + 16 + 2 * rng.randrange(12) for _ in range(2))
    content[one : one + 2], content[other : other + 2] = (
        content[other : other + 2],
        content[one : one + 2],
    )


def _swap_pages(content: bytearray, rng: random.Random) -> None:
    one, other = _page(content, rng), _page(content, rng)
    kept = content[one : one + PAGE]
    content[one : one + PAGE] = content[other : other + PAGE]
    content[other : other + PAGE] = kept
    if rng.random() < 0.5:
        # As if they had been written to the wrong places.
        struct.pack_into("=Q", content, one, one // PAGE)
        struct.pack_into("=Q", content, other, other // PAGE)


def _double_page(content: bytearray, rng: random.Random) -> None:
    """A page in the place of another, under that one's number."""
    one, other = _page(content, rng), _page(content, rng)
    content[one : one + PAGE] = content[other : other + PAGE]
    struct.pack_into("=Q", content, one, one // PAGE)


def _foreign_page(content: bytearray, rng: random.Random) -> None:
    page = _page(content, rng)
    others = _other()
    if page + PAGE <= len(others):
        content[page : page + PAGE] = others[page : page + PAGE]


def _random_page(content: bytearray, rng: random.Random) -> None:
    page = _page(content, rng)
    start = rng.choice((0, 16, 512, 2048))
    content[page + start : page + PAGE] = rng.randbytes(PAGE - start)


def _zero_sector(content: bytearray, rng: random.Random) -> None:
    sector = 512 * rng.randrange(len(content) // 512)
    content[sector : sector + 512] = bytes(512)


def _scatter(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randrange(2, 40)):
        content[rng.randrange(len(content))] = rng.randrange(256)


def _truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def _extend(content: bytearray, rng: random.Random) -> None:
    content += rng.randbytes(rng.choice((1, 512, PAGE, 3 * PAGE)))


def _swap_headers(content: bytearray, rng: random.Random) -> None:
    first = content[:PAGE]
    content[:PAGE] = content[PAGE : 2 * PAGE]
    content[PAGE : 2 * PAGE] = first
    if rng.random() < 0.5:
        struct.pack_into("=Q", content, 0, 0)
        struct.pack_into("=Q", content, PAGE, 1)


def _old_header(content: bytearray, rng: random.Random) -> None:
    """The newer header is lost: the older one's pages may have been used again."""
    numbers = [struct.unpack_from("=Q", content, at + 144)[0] for at in (0, PAGE)]
    newer = PAGE * (numbers[1] > numbers[0])
    struct.pack_into("=Q", content, newer + 144, max(0, min(numbers) - 1 - rng.randrange(2)))


def _header_field(content: bytearray, rng: random.Random) -> None:
    """Roots, depths, counts, numbers, sizes in one of the two headers."""
    at = rng.choice((0, PAGE)) + 16 + 4 * rng.randrange(34)
    value = rng.choice((0, 1, 2, 3, 7, 255, 1 << 31, (1 << 32) - 1, rng.randrange(64)))
    struct.pack_into("=I", content, at, value)


def _tree_record(content: bytearray, rng: random.Random) -> None:
    """A field of the record of a named database, wherever its name stands."""
    name = rng.choice((b"data", b"meta"))
    places = []
    at = content.find(name)
    while at >= 0:
        places.append(at + 4)
        at = content.find(name, at + 1)
    at = rng.choice(places)
    if at + 48 <= len(content):
        value = rng.choice((0, 1, 2, 4, 8, 16, 255, rng.randrange(64), (1 << 32) - 1))
        struct.pack_into("=I", content, at + 4 * rng.randrange(12), value)


def _free_list(content: bytearray, rng: random.Random) -> None:
    """Another page is called free; the list stays in order."""
    header = _pages.read_header(lambda length, at: bytes(content[at : at + length]), len(content))
    page = header.free.root * PAGE
    if page + PAGE > len(content):
        return
    count = (struct.unpack_from("=H", content, page + 12)[0] - 16) // 2
    node = page + struct.unpack_from("=H", content, page + 16 + 2 * rng.randrange(count))[0]
    length = struct.unpack_from("=Q", content, node + 16)[0]
    numbers = [header.last_page + 1, *struct.unpack_from(f"={length}Q", content, node + 24), 1]
    at = rng.randrange(1, length + 1)
    if numbers[at - 1] - numbers[at + 1] > 2:
        value = rng.randrange(numbers[at + 1] + 1, numbers[at - 1])
        struct.pack_into("=Q", content, node + 16 + 8 * at, value)


DAMAGES: Final[dict[str, Damage]] = {
    "bit": _bit,
    "header byte": _header_byte,
    "slot": _slot,
    "node": _node,
    "in a node": _in_node,
    "slots swapped": _swap_slots,
    "pages swapped": _swap_pages,
    "page doubled": _double_page,
    "page of another": _foreign_page,
    "random page": _random_page,
    "zero sector": _zero_sector,
    "scattered bytes": _scatter,
    "truncated": _truncate,
    "longer": _extend,
    "headers swapped": _swap_headers,
    "older header": _old_header,
    "field of a header": _header_field,
    "record of a tree": _tree_record,
    "list of free pages": _free_list,
}


def damaged(case: int) -> tuple[str, str, bytes]:
    """(subject, what was done, the file) of a case."""
    rng = random.Random(case)
    name = rng.choice(list(SUBJECTS))
    kind = rng.choice(list(DAMAGES))
    content = bytearray(subject(name).content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if len(content) >= 2 * PAGE:
            with contextlib.suppress(_pages.PagesError, struct.error):
                DAMAGES[kind](content, rng)
    return name, kind, bytes(content)


# -- one case, in a process that may end ----------------------------------------------


@attrs.frozen
class Found:
    outcome: str
    what: str = ""


def judge(case: int, unchecked: Callable[[], None] = lambda: None) -> Found:
    """Everything that is asked of one damaged store; this may end the process.

    ``unchecked`` is called before a store is read that was found unsound.
    """
    name, kind, content = damaged(case)
    made = subject(name)
    folder = made.folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "db" / "store").mkdir(parents=True)
    file = folder / "db" / "store" / "data.mdb"
    file.write_bytes(content)
    try:
        found = _store_check.check_store(str(file.parent), read_through=False)
        if found.findings:
            refused = _refused(folder, found)
            if refused.outcome != REFUSED or case % UNCHECKED_EVERY:
                return refused
            shutil.copytree(made.folder / "db" / "log", folder / "db" / "log")
            unchecked()
            return trio.run(_read_unchecked, folder, made.state)
        log = made.log
        if _store_files.misfit(found.state, log.log_uuid, log.first_lsn, log.last_lsn) is not None:
            return Found(REFUSED)
    except CorruptLogError:
        return Found(REFUSED)
    except Exception as exc:  # noqa: BLE001, ASYNC103  (whatever it is, it is a finding)
        return Found(BARE, f"{type(exc).__name__}: {exc}")
    if known := _lmdb_knows(folder):
        return Found(FOREIGN, known)
    if content == made.content:
        return Found(SAME)
    shutil.copytree(made.folder / "db" / "log", folder / "db" / "log")
    try:
        write = kind == "node" or case % WRITE_EVERY == 0
        return trio.run(_read_all, folder, made.state, write)
    except (CorruptLogError, OSError) as exc:
        return Found(DIFFERS, f"called sound, and then {type(exc).__name__}: {exc}")
    except Exception as exc:  # noqa: BLE001, ASYNC103  (whatever it is, it is a finding)
        return Found(BARE, f"{type(exc).__name__}: {exc}")


def _refused(folder: Path, found: _store_check.StoreCheck) -> Found:
    """What is not sound must be refused by opening, where that checks, and without a trace."""
    before = hash_tree(folder / "db" / "store")
    try:
        _store_check.check_before_open(str(folder / "db" / "store"), "child", None)
    except CorruptLogError as exc:
        if (exc.offset, exc.reason.partition(";")[0]) != (
            found.findings[0][0],
            found.findings[0][1].partition(";")[0],
        ):
            return Found(DIFFERS, f"found {found.findings[0]}, and then {exc}")
    else:
        return Found(DIFFERS, f"found {found.findings[0]}, and opened")
    if hash_tree(folder / "db" / "store") != before:
        return Found(DIFFERS, "a check has written")
    return Found(REFUSED)


def _lmdb_knows(folder: Path) -> str:
    """What LMDB's own verifier says, where there is one."""
    if importlib.util.find_spec("lmdb.verify") is None:
        return ""
    module: Any = importlib.import_module("lmdb.verify")
    try:
        found = module.verify(str(folder / "db" / "store"))
    except module.VerifyError as exc:
        found = [str(exc)]
    return found[0] if found else ""


async def _read_all(folder: Path, state: State, write: bool) -> Found:
    """Every way to read, after a check that found nothing."""
    problems: list[str] = []
    values = False
    try:
        async with trio_wal.open_database(folder / "db", segment_size=1) as db:
            seen = dict(db.scan())
            # A key can have become another one, in the same order: nothing tells.
            if len(seen) != len(state):
                problems.append(f"there are {len(seen)} keys and not {len(state)}")
            values = seen != state
            items = sorted(seen.items())
            if list(db.scan()) != items or list(db.scan(reverse=True)) != items[::-1]:
                problems.append("a scan is not in order, or differs backwards")
            with db.snapshot() as snapshot:
                if list(snapshot.scan()) != items:
                    problems.append("a snapshot differs")
                for key, value in items:
                    if not db.get(key) == snapshot.get(key) == value:
                        problems.append(f"get differs from scan: {key!r}")
            async with db.transaction() as tx:
                if list(tx.scan()) != items or any(tx.get(k) != v for k, v in items[::7]):
                    problems.append("a transaction differs")
                if items and items[0][0] not in tx:
                    problems.append("a key that is there is not in the transaction")
            if write:
                problems += await _write_all(folder, db, seen)
    except WalError as exc:
        return Found(DIFFERS, f"called sound, and then {type(exc).__name__}: {exc}")
    if problems:
        return Found(DIFFERS, problems[0])
    return Found(VALUE if values else SAME)


async def _read_unchecked(folder: Path, state: State) -> Found:
    """Every way to read, where any may fail; the process may end."""
    keys = sorted(state)[::9]
    try:
        options: dict[str, Any] = {"verify_store": "none", "segment_size": 1}
        async with trio_wal.open_database(folder / "db", **options) as db:
            with db.snapshot() as snapshot:
                async with db.transaction() as tx:
                    for read in (
                        *(functools.partial(look, key) for key in keys
                          for look in (db.get, snapshot.get, tx.get, tx.__contains__)),
                        *(functools.partial(_all, look, reverse) for reverse in (False, True)
                          for look in (db.scan, snapshot.scan, tx.scan)),
                    ):  # fmt: skip
                        with contextlib.suppress(CorruptLogError, OSError):
                            read()
                    tx.abort()
            with contextlib.suppress(CorruptLogError, OSError):
                await db.put(keys[0], b"new")
                await db.checkpoint()
            with contextlib.suppress(CorruptLogError, OSError):
                await db.backup(folder / "copy")
    except (WalError, OSError):
        pass
    return Found(REFUSED)


def _all(look: Callable[..., Iterator[tuple[bytes, bytes]]], reverse: bool) -> None:
    """A scan to its end, or to where a broken tree has given more than there ever was."""
    for _ in zip(look(reverse=reverse), range(10_000), strict=False):
        pass


async def _write_all(folder: Path, db: trio_wal.Database, seen: State) -> list[str]:
    """Checkpoints that change pages everywhere, and a backup."""
    rng = random.Random(len(seen))
    state = dict(seen)
    for _ in range(3):
        async with db.transaction() as tx:
            for key in rng.sample(sorted(state), min(len(state), 40)):
                tx.delete(key)
                del state[key]
            for _ in range(20):
                key = rng.randbytes(rng.choice((2, 200, 500)))
                state[key] = rng.randbytes(rng.choice((3, 900, 5000)))
                tx.put(key, state[key])
        await db.checkpoint()
    found = []
    if dict(db.scan()) != state:
        found.append("what was written is not what is read")
    checked = _store_check.check_store(str(folder / "db" / "store"), read_through=False)
    if checked.findings:
        found.append(f"written, and then not sound: {checked.findings[0]}")
    await db.backup(folder / "copy")
    async with trio_wal.open_database(folder / "copy") as copy:
        if dict(copy.scan()) != state:
            found.append("the backup differs")
    # Nodes that are not where LMDB thinks show up when it moves all of them.
    async with db.transaction() as tx:
        for key in state:
            tx.delete(key)
    await db.checkpoint()
    if dict(db.scan()):
        found.append("what was deleted is still there")
    return found


# -- processes ----------------------------------------------------------------------


def run_task(cases: range) -> _report.Answer:
    """The cases, in processes of their own that may end."""
    found: list[tuple[int, Found]] = []
    at = cases.start
    while at < cases.stop:
        for case, one in _ask(range(at, cases.stop, cases.step)):
            found.append((case, one))
            at = case + 1
    rows: dict[str, Counter[str]] = {}
    for case, one in found:
        rows.setdefault(damaged_kind(case), Counter())[one.outcome] += 1
    failures: list[tuple[object, str]] = [
        (case, f"{one.outcome}: {one.what}") for case, one in found if one.outcome in DEFECTS
    ]
    return _report.Answer(len(found), f"{len(failures)} found", rows, failures)


def damaged_kind(case: int) -> str:
    rng = random.Random(case)
    rng.choice(list(SUBJECTS))
    return rng.choice(list(DAMAGES))


def _ask(cases: range) -> Iterator[tuple[int, Found]]:
    """Up to the first case that ends the process, that one included."""
    command = [sys.executable, "-m", "campaigns", "store", "--child"]
    command += [str(cases.start), str(cases.stop)]
    # The same package as here, and this campaign, wherever they were found.
    paths = [*filter(None, sys.path), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    at = cases.start
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryDirectory(dir=_report.fast_folder()) as folder,
        subprocess.Popen(command, env={**environment, FOLDER: folder}, **pipes) as child,
    ):
        assert child.stdout is not None
        assert child.stderr is not None
        unchecked = False
        for line in child.stdout:
            answer = json.loads(line)
            unchecked = answer["outcome"] == UNCHECKED
            if unchecked:
                continue
            yield answer["case"], Found(answer["outcome"], answer["what"])
            at = answer["case"] + 1
        said = child.stderr.read().strip().splitlines()[-1:]
        code = child.wait()
    if at < cases.stop:
        yield (
            at,
            Found(
                CRASH if unchecked and code < 0 else SIGNAL, f"exit code {code} {' '.join(said)}"
            ),
        )


def _tell(case: int, found: Found) -> None:
    answer = {"case": case, "outcome": found.outcome, "what": found.what}
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def child(arguments: argparse.Namespace) -> int:
    try:
        for case in range(*arguments.child):
            found = judge(case, functools.partial(_tell, case, Found(UNCHECKED)))
            _tell(case, found)
    finally:
        forget_subjects()
    return 0


# -- the campaign -------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replay", type=int, metavar="CASE", help="one case again")
    parser.add_argument("--child", type=int, nargs=2, metavar=("FROM", "TO"), help="(internal)")
    _report.add_common_arguments(parser)


def tasks_of(arguments: argparse.Namespace) -> Iterator[range]:
    count = arguments.count
    if count is None:
        count = COUNT if arguments.minutes is None else 1 << 40
    first = arguments.seed << 32
    for start in range(0, count, CHUNK):
        yield range(first + start, first + min(start + CHUNK, count))


def run(arguments: argparse.Namespace) -> int:
    if arguments.child is not None:
        return child(arguments)
    columns = {"damage": "damage", "cases": "cases"} | {name: name for name in OUTCOMES}
    report = _report.Report("store", arguments, columns)
    total = None
    if arguments.minutes is None or arguments.count is not None:
        total = sum(map(len, tasks_of(arguments)))
    rows, seconds = _report.collect(report, run_task, tasks_of(arguments), total)
    counts: Counter[str] = Counter()
    for row in rows.values():
        counts.update(row)
    rows["all"] = counts
    for name in (*DAMAGES, "all"):
        row = rows.get(name, Counter())
        report.add(
            damage=name, cases=row.total(), **{outcome: row[outcome] for outcome in OUTCOMES}
        )
    done = counts.total()
    defects = sum(counts[name] for name in DEFECTS)
    report.note(
        f"{done:,} damaged stores, {defects} defects, at most {_report.bound(done)}; "
        f"{_report.per_minute(done, seconds):,} a minute"
    )
    return report.finish()


def replay(case: int) -> int:
    name, kind, _ = damaged(case)
    print(f"{name}: {kind}")
    (_, found), *_ = _ask(range(case, case + 1))
    print(f"{found.outcome}: {found.what}")
    forget_subjects()
    return 1 if found.outcome in DEFECTS else 0
