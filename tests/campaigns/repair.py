"""Damaged logs and databases repaired, with a crash at every step: what is said is so.

Law: what a log held is remembered before it is damaged; what is damage is not asked of the
repair.  For each case:

  * without leave nothing is changed, and with it the report is the same;
  * an open takes a log exactly where no damage is told;
  * what is there afterwards is a run of the records that were there, each of the others is told
    as lost, and bookmarks of lost ones are refused;
  * every file that was changed or dropped is in the copies as it was;
  * interrupted anywhere, by a kill or a power cut, a second repair comes to the same log;
  * a database has the state of its last LSN, and never less than its store had.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
from typing import Any, Final

import attrs
from logs import append, content, copy_of, open_log, records_of, segments

import trio_wal
from trio_wal import RepairReport
from trio_wal._disk.chain import META_NAME, read_segment
from trio_wal._disk.frame import DATA_OFFSET, decode_meta
from trio_wal._disk.verify import verify
from trio_wal._identity import common_lsn
from trio_wal._repair import Repair
from trio_wal.testing import MemoryFiles

from . import _report
from ._promises import check
from ._simulator import seeded_run

LOG, DB = "/log", "/db"
IMAGES: Final = 12
"""Crashes in one repair that are looked at."""
SHARE: Final = 10
"""Cases of one task for a worker process."""
State = dict[bytes, bytes]


def nothing(done: int, total: int) -> None:
    pass


def repair(files: MemoryFiles, path: str, *, accept_loss: bool = True) -> RepairReport:
    """As a worker thread does it."""
    options: dict[str, Any] = {"keep": "oldest", "trust_directory": False, "tick": nothing}
    return Repair(files, path, accept_loss=accept_loss, **options).run()


# -- damage ---------------------------------------------------------------------------------


class Damage:
    """Does harm to the files of a log."""

    def __init__(self, rng: random.Random, files: MemoryFiles, path: str) -> None:
        self.rng = rng
        self.files = files
        self.path = path
        self.done: list[str] = []
        self.meta_gone: bool = False
        self.log_uuid: bytes = decode_meta(self._read(META_NAME)).log_uuid

    def one(self) -> None:
        if not segments(self.files, self.path):
            return
        kinds = (self.flip, self.flip, self.zero, self.remove, self.header, self.rename)
        kinds += (self.swap, self.double, self.cut, self.no_meta, self.foreign)
        kind = self.rng.choice(kinds)
        kind()
        self.done.append(kind.__name__)

    @property
    def strays(self) -> bool:
        """Whether there are segments under other names than their own: without log.meta nothing
        may tell whose they are."""
        return not {"foreign", "swap", "rename", "double"}.isdisjoint(self.done)

    @property
    def usurped(self) -> bool:
        """Whether log.meta is gone, and another log's segment stands under its own name where
        none of the log's is left that can be read: nobody can tell that it is another's."""
        if not self.meta_gone:
            return False
        directory = self.files.open_directory(self.path)
        at_home: set[bytes] = set()
        readable: set[bytes] = set()
        for name in segments(self.files, self.path):
            with contextlib.suppress(trio_wal.CorruptLogError):
                header = read_segment(directory, name).header
                readable.add(header.log_uuid)
                if name == header.name:
                    at_home.add(header.log_uuid)
        directory.close()
        return self.log_uuid not in readable and bool(at_home)

    def _segment(self) -> str:
        return self.rng.choice(segments(self.files, self.path))

    def _read(self, name: str) -> bytes:
        return self.files.read_file(self.path, name)

    def _write(self, name: str, data: bytes) -> None:
        self.files.write_file(self.path, name, data)

    def _offset(self, data: bytes) -> int:
        used = max(1, len(data.rstrip(b"\0")))
        near = self.rng.choice(((0, 1024), (DATA_OFFSET, used), (0, used)))
        return min(len(data) - 1, self.rng.randrange(near[0], max(near[0] + 1, near[1])))

    def flip(self) -> None:
        name = self.rng.choice((self._segment(), self._segment(), META_NAME))
        if name in self.files.names(self.path):
            data = self._read(name)
            self.files.flip_bit(self.path, name, 8 * self._offset(data) + self.rng.randrange(8))
            self.meta_gone |= name == META_NAME

    def zero(self) -> None:
        name = self._segment()
        data = bytearray(self._read(name))
        at = self._offset(bytes(data)) // 512 * 512
        data[at : at + 512] = bytes(min(512, len(data) - at))
        self._write(name, bytes(data))

    def remove(self) -> None:
        name = self._segment()
        self.files.remove_file(self.path, name)

    def header(self) -> None:
        name = self._segment()
        self._write(name, bytes(512) + self._read(name)[512:])

    def rename(self) -> None:
        name = self._segment()
        data = self._read(name)
        self.files.remove_file(self.path, name)
        self._write(f"wal-{self.rng.randrange(1, 400):020d}.log", data)

    def swap(self) -> None:
        one, other = self._segment(), self._segment()
        first, second = self._read(one), self._read(other)
        self._write(one, second)
        self._write(other, first)

    def double(self) -> None:
        self._write(f"wal-{self.rng.randrange(1, 400):020d}.log", self._read(self._segment()))

    def cut(self) -> None:
        name = self._segment()
        data = self._read(name)
        self._write(name, data[: self.rng.randrange(len(data))])

    def no_meta(self) -> None:
        if META_NAME in self.files.names(self.path):
            self.files.remove_file(self.path, META_NAME)
        self.meta_gone = True

    def foreign(self) -> None:
        other = MemoryFiles(seed=self.rng.randrange(1 << 30))
        log = open_log(other)
        append(log, b"of another log")
        log.close()
        (name,) = segments(other)
        # Under its own name nothing but log.meta could tell that it is not this log's.
        number = self.rng.randrange(1, 400)
        number = 400 if number == 1 else number
        self._write(f"wal-{number:020d}.log", other.read_file("/log", name))


def has_segments(files: MemoryFiles, path: str) -> bool:
    return bool(segments(files, path))


# -- logs -----------------------------------------------------------------------------------


def make_log(rng: random.Random) -> MemoryFiles:
    """Some sessions, with rotations and truncations."""
    files = MemoryFiles(seed=rng.randrange(1 << 30))
    size = rng.choice((1, 1, 16 << 10))
    for _ in range(rng.randint(1, 3)):
        log = open_log(files, segment_size=size)
        for _ in range(rng.randint(1, 8)):
            lengths = [rng.choice((0, 5, 200, 900)) for _ in range(rng.randint(1, 3))]
            append(log, *(rng.randbytes(length) for length in lengths))
            if rng.random() < 0.1:
                log.drop_before(rng.randint(1, log.last_lsn))
            if rng.random() < 0.1:
                log.truncate_after(rng.randint(log.first_lsn - 1, log.last_lsn))
        if not log.last_lsn:
            append(log, b"one")
        if rng.random() < 0.3:
            # Killed: the directory is another process's from here on.
            files = files.crash_image(rng.randrange(1 << 30), "kill")
        else:
            log.close()
    return files


def opens(files: MemoryFiles, path: str, *, database: bool = False) -> bool:
    """Whether a full check of all of it refuses nothing."""
    try:
        open_log(copy_of(files), path, verify_bytes=math.inf, database=database).abandon()
    except (trio_wal.CorruptLogError, trio_wal.UnsupportedFormatError):
        return False
    except trio_wal.WrongDirectoryError:
        return False
    return True


def check_log_case(seed: int) -> None:
    """Raises what is found."""
    rng = random.Random(seed)
    files = make_log(rng)
    held = dict(content(files))
    history = meta_of(files, LOG)
    damage = Damage(rng, files, LOG)
    for _ in range(rng.choice((1, 1, 2, 3))):
        damage.one()
    if not has_segments(files, LOG) or damage.usurped:
        return
    before = files.contents(LOG)
    try:
        told = repair(files, LOG, accept_loss=False)
    except trio_wal.CorruptLogError as exc:
        unknown = damage.meta_gone and damage.strays
        check(unknown, f"refused: {exc}", damage.done)
        return
    check(files.contents(LOG) == before, "a look has changed something", damage.done)
    sound = opens(files, LOG)
    check(sound == (not told.damage), f"opens: {sound}, told: {told.damage}", damage.done)
    if sound:
        return
    images = repaired_with_crashes(rng, files, LOG, told, damage)
    for image, report in images:
        check_log(image, told, report, held, history, damage)


def meta_of(files: MemoryFiles, path: str) -> Any:
    return decode_meta(files.read_file(path, META_NAME)).history


def repaired_with_crashes(
    rng: random.Random, files: MemoryFiles, path: str, told: RepairReport, damage: Damage
) -> list[tuple[MemoryFiles, RepairReport]]:
    """The files repaired, and what a second repair makes of crashes in the first."""
    before = files.contents(damage.path)
    images: list[MemoryFiles] = []
    results: list[tuple[MemoryFiles, RepairReport]] = []
    kept_images = 0

    def crash(operation: str, where: str) -> None:
        nonlocal kept_images
        if operation in ("pread", "open"):
            return
        kept_images += 1
        image = files.crash_image(rng.randrange(1 << 30), rng.choice(("kill", "power")))
        if len(images) < IMAGES:
            images.append(image)
        elif rng.random() < IMAGES / kept_images:
            images[rng.randrange(IMAGES)] = image

    files.after_operation = crash
    report = repair(files, path)
    files.after_operation = None
    same = attrs.evolve(report, copies=None, done=False)
    check(same == told, f"told: {told}, done: {report}", damage.done)
    check(report.done, "not done", damage.done)
    below = damage.path.removeprefix(path)
    for kept in (files, files.crash_image(rng.randrange(1 << 30))) if report.files else ():
        copies = kept.contents(f"{report.copies}{below}")
        for name in report.files:
            check(copies.get(name) == before[name], f"{name} was not copied as it was", damage.done)
    after = files.contents(damage.path)
    for name, data in before.items():
        if name not in report.files and name.startswith("wal-"):
            same = after.get(name) == data
            check(same or is_last(files, damage.path, name), f"{name} was changed", damage.done)
    for image in images:
        again = repair(image, path)
        place = (again.first_lsn, again.last_lsn)
        check(place == (told.first_lsn, told.last_lsn), f"again: {again}", told, damage.done)
        check(not repair(image, path).damage, "damaged after two repairs", damage.done)
        results.append((image, again))
    return [(files, report), *results]


def is_last(files: MemoryFiles, path: str, name: str) -> bool:
    """An open writes to the last two segments, as after any crash."""
    return name in segments(files, path)[-3:]


def check_log(
    files: MemoryFiles,
    told: RepairReport,
    report: RepairReport,
    held: dict[int, bytes],
    history: Any,
    damage: Damage,
) -> None:
    found = dict(content(files))
    kept = range(told.first_lsn, told.last_lsn + 1)
    check(list(found) == list(kept), f"{list(found)[:1]}..., told {kept}", damage.done)
    for lsn, data in found.items():
        check(held.get(lsn) == data, f"LSN {lsn} is another record", damage.done)
    lost = {lsn for gone in told.lost for lsn in gone}
    for lsn in held:
        tells = lsn in lost or (told.lost_more and lsn > told.last_lsn)
        unknown = damage.meta_gone and lsn < told.first_lsn
        check(lsn in found or tells or unknown, f"LSN {lsn}: not there, not told", damage.done)
    log = open_log(files, verify_bytes=math.inf)
    common = common_lsn(log.meta.says.history, history[-1].epoch if history else 0)
    if common is not None and any(gone.stop > told.last_lsn + 1 for gone in report.lost):
        # After a power cut nobody may know of it any more.
        check(common <= told.last_lsn, "an epoch goes on", damage.done)
    append(log, b"after")
    check(dict(records_of(log))[told.last_lsn + 1] == b"after", "it does not go on")
    log.close()
    wrong = [one for one in verify(files.open_directory(LOG)).findings if not one.harmless]
    check(not wrong, f"verify: {wrong}", damage.done)


# -- databases ------------------------------------------------------------------------------


async def make_database(rng: random.Random, files: MemoryFiles) -> tuple[dict[int, State], int]:
    """The state at each LSN, and what the store holds."""
    states: dict[int, State] = {0: {}}
    stored = 0
    keep = trio_wal.KeepAll() if rng.random() < 0.5 else None
    options: dict[str, Any] = {"files": files, "segment_size": 1, "retention": keep}
    for _ in range(rng.randint(1, 2)):
        async with trio_wal.open_database(DB, **options) as db:
            for _ in range(rng.randint(1, 10)):
                state = dict(states[db.durable_lsn])
                async with db.transaction() as tx:
                    for _ in range(rng.randint(1, 3)):
                        key = b"%d" % rng.randrange(8)
                        if rng.random() < 0.3:
                            tx.discard(key)
                            state.pop(key, None)
                        else:
                            value = rng.randbytes(rng.choice((0, 10, 500)))
                            tx.put(key, value)
                            state[key] = value
                    tx.put(b"n", b"%d" % db.durable_lsn)
                    state[b"n"] = b"%d" % db.durable_lsn
                states[db.durable_lsn] = state
                if rng.random() < 0.2:
                    stored = await db.checkpoint()
    return states, stored


async def check_database_case(seed: int) -> None:
    rng = random.Random(seed)
    files = MemoryFiles(seed=rng.randrange(1 << 30))
    states, stored = await make_database(rng, files)
    log = f"{DB}/log"
    damage = Damage(rng, files, log)
    first = min(segments(files, log))
    beginning, began = files.read_file(log, first), decode_meta(files.read_file(log, META_NAME))
    for _ in range(rng.choice((0, 1, 1, 2))):
        damage.one()
    if damage.usurped:
        return
    store = f"{DB}/store"
    gone = rng.random() < 0.3
    if gone:
        files.remove_store(store)
        stored = 0
        damage.done.append("store")
    try:
        told = repair(files, DB, accept_loss=False)
    except trio_wal.CorruptLogError as exc:
        if damage.meta_gone and damage.strays:
            return
        intact = began.base_lsn == 1 and files.contents(log).get(first) == beginning
        check(not stored and not intact, f"refused: {exc}", damage.done)
        return
    if not told.damage:
        check(opens(files, log, database=True), "no damage is told", damage.done)
        images = [(files, told)]
    else:
        images = repaired_with_crashes(rng, files, DB, told, damage)
    last = told.last_lsn
    check(last >= stored, f"LSN {last}, the store had {stored}", damage.done)
    lost = {lsn for one in told.lost for lsn in one}
    for lsn in range(last + 1, max(states) + 1):
        check(lsn in lost or told.lost_more, f"LSN {lsn}: not there, not told", damage.done)
    for image, _ in images:
        async with trio_wal.open_database(DB, files=image) as db:
            found = dict(db.scan())
            check(found == states[last], f"another state than that of LSN {last}", damage.done)
            check(db.durable_lsn == last, f"LSN {db.durable_lsn}, told {last}", damage.done)
            check(await db.put(b"after", b"") == last + 1, "it does not go on")


def run_case(seed: int) -> None:
    """Raises what is found."""
    if seed % 3:
        check_log_case(seed)
    else:
        seeded_run(check_database_case, seed, seed=seed)


def found_in(seed: int) -> str:
    return _report.found_in(run_case, seed)


# -- the campaign ---------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replay", metavar="SEED", help="one case again")
    _report.add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    return _report.run_seeds("repair", arguments, run_case, SHARE, "cases")


def replay(text: str) -> int:
    return _report.replay_seed(run_case, text)
