"""`repair`: what stays, what is said to be lost, and that nothing else is."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
import trio
from logs import LOG, Records, append, content, copy_of, make_log, open_log, segments
from msgspec.structs import replace

import trio_wal
from trio_wal import RepairReport
from trio_wal._disk.chain import META_NAME, META_NEW_NAME, PLACES_NEW_NAME, TRUNCATE_NAME
from trio_wal._disk.frame import DATA_OFFSET, FRAME_HEADER_SIZE, decode_meta
from trio_wal._disk.segment import NEW_NAME, SPARE_PREFIX
from trio_wal._disk.verify import verify
from trio_wal._files import LOCK_NAME
from trio_wal._repair import ASIDE, Repair
from trio_wal._system.files import OsFiles
from trio_wal.testing import MemoryFiles

PAYLOAD: Final = bytes(range(200))
COPIES: Final = f"{LOG}/{ASIDE}-1"


def nothing(done: int, total: int) -> None:
    pass


def repair(files: MemoryFiles, path: str = LOG, **options: Any) -> RepairReport:
    """As a worker thread does it."""
    options = {"accept_loss": True, "keep": "oldest", "trust_directory": False, **options}
    options.setdefault("tick", nothing)
    return Repair(files, path, **options).run()


def a_log() -> MemoryFiles:
    """Four segments or so, two frames of two records in each, closed in order."""
    return make_log(*([b"%d" % i + PAYLOAD, b"-"] for i in range(8)))


def whole(first: int = 1, last: int = 16) -> Records:
    return tuple(
        (lsn, b"-" if lsn % 2 == 0 else b"%d" % (lsn // 2) + PAYLOAD)
        for lsn in range(first, last + 1)
    )


def flip(files: MemoryFiles, name: str, offset: int) -> None:
    files.flip_bit(LOG, name, 8 * offset)


def opens(files: MemoryFiles) -> bool:
    try:
        open_log(copy_of(files)).abandon()
    except (trio_wal.CorruptLogError, trio_wal.UnsupportedFormatError):
        return False
    return True


def check_repaired(files: MemoryFiles, report: RepairReport) -> None:
    """What the report says is so, and the log works."""
    found = content(files)
    assert found == whole()[report.first_lsn - 1 : report.last_lsn]
    kept = range(report.first_lsn, report.last_lsn + 1)
    lost = sorted(lsn for gone in report.lost for lsn in gone)
    assert not set(lost).intersection(kept)
    log = open_log(files)
    append(log, b"after")
    log.close()
    assert content(files) == (*found, (report.last_lsn + 1, b"after"))


# -- every byte -----------------------------------------------------------------------------


def every_place(files: MemoryFiles) -> list[tuple[str, int]]:
    """Each byte up to the end of a file's frames, and some behind."""
    places = [(META_NAME, offset) for offset in range(len(files.read_file(LOG, META_NAME)))]
    for name in segments(files):
        data = files.read_file(LOG, name)
        end = len(data.rstrip(b"\0")) + 64
        # The zeros between header and frames are many, and all alike.
        offsets = [*range(700), *range(700, DATA_OFFSET, 97), *range(DATA_OFFSET, end)]
        places += [(name, offset) for offset in offsets if offset < len(data)]
    return places


def test_a_damaged_byte_anywhere_costs_what_verify_says_and_no_more() -> None:
    sound = a_log()
    assert content(sound) == whole()
    places = every_place(sound)
    damaged = 0
    for name, offset in random.Random(7).sample(places, 700):
        files = copy_of(sound)
        flip(files, name, offset)
        before = files.contents(LOG)
        told = repair(files, accept_loss=False)
        assert files.contents(LOG) == before, (name, offset)
        if opens(files):
            assert not told.damage, (name, offset, told)
            assert not told.lost
            continue
        damaged += 1
        found = verify(files.open_directory(LOG)).findings
        gone = {
            lsn
            for one in found
            if one.first_lsn is not None
            for lsn in range(one.first_lsn, (one.last_lsn or 16) + 1)
        }
        report = repair(files)
        assert report.done
        assert attrs.evolve(report, copies=None, done=False) == told
        assert report.copies == COPIES
        kept = min(gone, default=17) - 1
        assert (report.first_lsn, report.last_lsn) == (1, kept), (name, offset, found)
        assert report.lost == ((range(kept + 1, 17),) if gone else ()), (name, offset)
        for changed in report.files:
            assert files.read_file(COPIES, changed) == before[changed]
        check_repaired(files, report)
    assert damaged > 200


# -- what whole files can be ----------------------------------------------------------------


def remove(number: int) -> Callable[[MemoryFiles], None]:
    return lambda files: files.remove_file(LOG, segments(files)[number])


def zero_header(number: int) -> Callable[[MemoryFiles], None]:
    def damage(files: MemoryFiles) -> None:
        name = segments(files)[number]
        data = files.read_file(LOG, name)
        files.write_file(LOG, name, bytes(512) + data[512:])

    return damage


def rename(number: int) -> Callable[[MemoryFiles], None]:
    def damage(files: MemoryFiles) -> None:
        name = segments(files)[number]
        data = files.read_file(LOG, name)
        files.remove_file(LOG, name)
        files.write_file(LOG, "wal-00000000000000000099.log", data)

    return damage


def add_foreign(files: MemoryFiles) -> None:
    other = make_log([b"of another log"], seed=8)
    files.write_file(LOG, "wal-00000000000000000044.log", other.read_file(LOG, segments(other)[0]))


def double(files: MemoryFiles) -> None:
    files.write_file(LOG, "wal-00000000000000000044.log", files.read_file(LOG, segments(files)[1]))


def no_meta(files: MemoryFiles) -> None:
    files.remove_file(LOG, META_NAME)


def bad_meta(files: MemoryFiles) -> None:
    flip(files, META_NAME, 9)


def never_in_use(files: MemoryFiles) -> None:
    meta = decode_meta(files.read_file(LOG, META_NAME))
    files.write_file(LOG, META_NAME, replace(meta, live=False).encode())


def nothing_readable(files: MemoryFiles) -> None:
    for number in range(len(segments(files))):
        zero_header(number)(files)


SEGMENT_ENDS: Final = (4, 8, 12, 16)
DAMAGES: Final[dict[str, tuple[Callable[[MemoryFiles], None], int]]] = {
    "the first is missing": (remove(0), 0),
    "one is missing": (remove(1), 4),
    "the last is missing": (remove(3), 12),
    "the first has no header": (zero_header(0), 0),
    "one has no header": (zero_header(2), 8),
    "the last has no header": (zero_header(3), 12),
    "one is renamed": (rename(1), 16),
    "the last is renamed": (rename(3), 16),
    "a foreign one": (add_foreign, 16),
    "one is there twice": (double, 16),
    "log.meta is missing": (no_meta, 16),
    "log.meta is damaged": (bad_meta, 16),
    "log.meta says that it was never in use": (never_in_use, 16),
    "nothing can be read": (nothing_readable, 0),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_whole_files(what: str) -> None:
    damage, last = DAMAGES[what]
    files = a_log()
    assert len(segments(files)) == 4
    damage(files)
    assert not opens(files)
    told = repair(files, accept_loss=False)
    assert told.damage
    assert not told.done
    assert (told.first_lsn, told.last_lsn) == (1, last)
    assert not opens(files)
    report = repair(files)
    assert attrs.evolve(report, copies=None, done=False) == told
    check_repaired(files, report)
    assert not repair(files).damage


@pytest.mark.parametrize("what", DAMAGES)
def test_the_newest_part(what: str) -> None:
    damage, _ = DAMAGES[what]
    files = a_log()
    damage(files)
    report = repair(files, keep="newest")
    if what in ("the first is missing", "the first has no header"):
        assert (report.first_lsn, report.last_lsn) == (5, 16)
        assert report.lost == (range(1, 5),)
    if what in ("one is missing", "one has no header"):
        assert report.last_lsn == 16
        assert report.first_lsn in (9, 13)
    check_repaired(files, report)


def test_a_tail_that_was_proven_and_is_gone() -> None:
    files = a_log()
    name = segments(files)[-1]
    data = files.read_file(LOG, name)
    files.write_file(LOG, name, data[:DATA_OFFSET] + bytes(len(data) - DATA_OFFSET))
    report = repair(files)
    assert (report.last_lsn, report.lost) == (12, (range(13, 17),))
    check_repaired(files, report)


def test_a_tail_that_was_not_proven_is_no_damage() -> None:
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    log.write([b"torn"], log.synced_lsn, sync=False)
    images = [files.crash_image(seed) for seed in range(10)]
    log.abandon()
    for image in images:
        assert not repair(image).damage


def test_a_decided_truncation_whose_segment_is_gone_brings_nothing_back() -> None:
    files = a_log()
    log = open_log(files)
    images: list[MemoryFiles] = []

    def look(operation: str, path: str) -> None:
        if operation == "rename" and path.endswith(f"/{META_NAME}") and not images:
            images.append(copy_of(files))

    files.after_operation = look
    log.truncate_after(7)
    files.after_operation = None
    (image,) = images
    assert decode_meta(image.read_file(LOG, META_NAME)).truncation is not None
    image.remove_file(LOG, TRUNCATE_NAME)
    assert not opens(image)
    report = repair(image)
    # Record 7 was copied into the segment that is gone.
    assert (report.last_lsn, report.lost_more) == (6, True)
    check_repaired(image, report)


def test_the_places_of_consumers() -> None:
    files = a_log()
    files.write_file(LOG, "consumers", b"nonsense")
    report = repair(files)
    assert report.consumers_lost
    assert report.last_lsn == 16
    assert files.read_file(COPIES, "consumers") == b"nonsense"
    check_repaired(files, report)


def test_what_a_disk_cannot_read_is_zeros_in_the_copy() -> None:
    files = a_log()
    flip(files, segments(files)[2], DATA_OFFSET + FRAME_HEADER_SIZE)
    files.fail("pread", errno.EIO, after=10**9)
    report = repair(files)
    check_repaired(files, report)


def test_a_new_epoch_begins_where_something_is_lost() -> None:
    files = a_log()
    log = open_log(files)
    epoch = log.meta.says.epoch
    log.close()
    remove(3)(files)
    repair(files)
    log = open_log(files)
    assert log.meta.says.epoch > epoch
    assert log.meta.says.history[-1].after_lsn == 12
    log.close()


def test_a_forgotten_epoch_is_passed() -> None:
    files = a_log()
    log = open_log(files)
    log.truncate_after(14)
    epoch = log.meta.says.epoch
    log.close()
    no_meta(files)
    report = repair(files)
    assert report.last_lsn == 14
    log = open_log(files)
    assert log.meta.says.epoch > epoch
    log.close()


def test_without_log_meta_another_logs_segment_under_its_own_name_is_not_taken() -> None:
    """Which of the two has come from elsewhere nothing tells: the repair does not choose."""
    files, other = make_log([b"mine"]), make_log([b"of another log"], seed=8)
    (name,) = segments(files)
    files.write_file(LOG, "wal-00000000000000000044.log", files.read_file(LOG, name))
    files.write_file(LOG, name, other.read_file(LOG, name))
    no_meta(files)
    before = files.contents(LOG)
    with pytest.raises(
        trio_wal.CorruptLogError, match=r"^/log/log\.meta: at offset 0: .*: move away those"
    ):
        repair(files)
    assert files.contents(LOG) == before
    files.remove_file(LOG, name)
    assert repair(files).last_lsn == 1
    assert content(files) == ((1, b"mine"),)


# -- interrupted ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kill", "power"])
@pytest.mark.parametrize("what", [*DAMAGES, "a byte"])
def test_a_crash_at_every_step(what: str, kind: Any) -> None:
    files = a_log()
    if what == "a byte":
        flip(files, segments(files)[1], DATA_OFFSET + FRAME_HEADER_SIZE + 700)
    else:
        DAMAGES[what][0](files)
    images: list[MemoryFiles] = []

    def crash(operation: str, path: str) -> None:
        if operation not in ("pread", "open"):
            images.append(files.crash_image(len(images), kind))

    files.after_operation = crash
    report = repair(files)
    files.after_operation = None
    assert len(images) > 5
    for image in images:
        again = repair(image)
        assert again.last_lsn == report.last_lsn
        assert not repair(image).damage
        check_repaired(image, report)


@pytest.mark.parametrize(
    "operation", ["pwrite", "sync", "rename", "unlink", "sync_dir", "allocate", "truncate", "open"]
)
def test_a_call_that_fails(operation: Any) -> None:
    sound = a_log()
    flip(sound, segments(sound)[1], DATA_OFFSET + FRAME_HEADER_SIZE + 10)
    failed = 0
    while True:
        files = copy_of(sound)
        files.fail(operation, errno.EIO, after=failed)
        try:
            report = repair(files)
        except OSError:
            failed += 1
            files.heal()
            again = repair(files)
            check_repaired(files, again)
        else:
            break
    assert failed or operation == "truncate", "nothing failed"
    files.heal()
    check_repaired(files, report)


# -- for users ------------------------------------------------------------------------------


def segment_names(path: Path) -> list[str]:
    return sorted(one.name for one in path.iterdir() if one.name.startswith("wal-"))


async def broken_log(path: Path) -> None:
    """Sixteen records or so in several segments, one byte of the second wrong."""
    async with trio_wal.open_wal(path, segment_size=1) as wal:
        for number in range(16):
            await wal.append(b"%d" % number * 500)
    with (path / segment_names(path)[1]).open("r+b") as file:
        file.seek(DATA_OFFSET + FRAME_HEADER_SIZE + 3)
        file.write(b"?")


async def test_a_log_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "log"
    await broken_log(path)
    told: list[tuple[int, int]] = []
    report = await trio_wal.repair(path, on_progress=lambda done, total: told.append((done, total)))
    assert report.damage
    assert not report.done
    assert told[-1][0] == told[-1][1] > 0
    with pytest.raises(trio_wal.CorruptLogError):
        async with trio_wal.open_wal(path):
            raise AssertionError("it opens")
    done = await trio_wal.repair(path, accept_loss=True)
    assert done == attrs.evolve(report, done=True, copies=done.copies)
    assert done.copies == str(path / f"{ASIDE}-1")
    assert done.lost_records == 16 - done.last_lsn
    assert set(os.listdir(done.copies)) == set(done.files)
    async with trio_wal.open_wal(path) as wal:
        assert wal.last_lsn == done.last_lsn > 0
        assert await wal.append(b"after") == done.last_lsn + 1
        with pytest.raises(trio_wal.LogDivergedError):
            async with wal.read(trio_wal.Bookmark(16, 0)):
                raise AssertionError("its history goes on")
    assert not (await trio_wal.repair(path)).damage


async def test_a_log_that_is_open(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        await wal.append(b"x")
        with pytest.raises(trio_wal.LogLockedError):
            await trio_wal.repair(tmp_path / "log", accept_loss=True)


async def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await trio_wal.repair(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(trio_wal.WrongDirectoryError):
        await trio_wal.repair(tmp_path / "other", accept_loss=True)
    assert os.listdir(tmp_path / "other") in (["file"], ["file", "lock"], ["lock", "file"])
    with pytest.raises(trio_wal.UnsupportedOperationError, match="servers repair"):
        await trio_wal.repair("nats://127.0.0.1:1/x")
    async with trio_wal.open_database(tmp_path / "db") as db:
        await db.put(b"a", b"b")
    with pytest.raises(trio_wal.WrongDirectoryError, match="repair"):
        await trio_wal.repair(tmp_path / "db" / "log")
    with pytest.raises(TypeError, match="accept_loss"):
        await trio_wal.repair(tmp_path / "db", accept_loss=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep"):
        await trio_wal.repair(tmp_path / "db", keep="all")  # type: ignore[arg-type]


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("accept_loss", [False, True])
@pytest.mark.parametrize("name", ["wal-00000000000000000099.log", META_NAME])
@pytest.mark.parametrize("what", ["directory", "link", "pipe"])
async def test_what_cannot_be_copied_is_refused_before_anything_is_promised(
    tmp_path: Path, what: str, name: str, accept_loss: bool
) -> None:
    path = tmp_path / "log"
    async with trio_wal.open_wal(path) as wal:
        await wal.append(b"one")
    place = path / name
    place.unlink(missing_ok=True)
    if what == "directory":
        place.mkdir()
    elif what == "link":
        place.symlink_to("/etc/passwd")
    else:
        os.mkfifo(place)
    before = sorted(path.iterdir())
    with pytest.raises(trio_wal.CorruptLogError, match="so it cannot be copied: move it away"):
        await trio_wal.repair(path, accept_loss=accept_loss)
    assert sorted(path.iterdir()) == before
    place.rmdir() if what == "directory" else place.unlink()
    assert (await trio_wal.repair(path, accept_loss=True)).lost == ()
    async with trio_wal.open_wal(path) as wal:
        assert wal.last_lsn == 1


async def test_cancelled_while_it_looks(tmp_path: Path) -> None:
    path = tmp_path / "log"
    await broken_log(path)
    before = {one.name: one.read_bytes() for one in path.iterdir()}
    with trio.CancelScope() as scope:

        def stop(done: int, total: int) -> None:
            trio.from_thread.run_sync(scope.cancel)

        await trio_wal.repair(path, accept_loss=True, on_progress=stop)
    assert scope.cancelled_caught
    assert {one.name: one.read_bytes() for one in path.iterdir()} == before
    assert (await trio_wal.repair(path, accept_loss=True)).done


# -- databases ------------------------------------------------------------------------------


async def a_database(path: Path, *, checkpoint: bool, drop: bool = False) -> None:
    """Twenty puts; the first ten in the store, if that is asked for."""
    retention = None if drop else trio_wal.KeepAll()
    async with trio_wal.open_database(path, segment_size=1, retention=retention) as db:
        for number in range(20):
            await db.put(b"%02d" % number, b"v" * 300)
            if number == 9 and checkpoint:
                await db.checkpoint()


async def keys(path: Path) -> list[int]:
    async with trio_wal.open_database(path) as db:
        return [int(key) for key, _ in db.scan()]


def damage_log(path: Path, lsn: int) -> None:
    """The segment with a record."""
    names = segment_names(path / "log")
    name = [name for name in names if int(name[4:24]) <= lsn][-1]
    with (path / "log" / name).open("r+b") as file:
        file.seek(DATA_OFFSET + FRAME_HEADER_SIZE + 3)
        file.write(b"?")


def damage_store(path: Path) -> None:
    file = path / "store" / "data.mdb"
    file.write_bytes(file.read_bytes()[:4096])


async def test_damage_in_what_the_store_has_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "db"
    await a_database(path, checkpoint=True)
    damage_log(path, 3)
    report = await trio_wal.repair(path, accept_loss=True)
    assert (report.lost, report.store, report.last_lsn) == ((), "kept", 20)
    assert 3 < report.first_lsn <= 11
    assert await keys(path) == list(range(20))


async def test_damage_behind_the_store_is_cut_there(tmp_path: Path) -> None:
    path = tmp_path / "db"
    await a_database(path, checkpoint=True)
    damage_log(path, 15)
    told = await trio_wal.repair(path)
    with pytest.raises(trio_wal.CorruptLogError):
        await keys(path)
    report = await trio_wal.repair(path, accept_loss=True)
    assert attrs.evolve(report, done=False, copies=None) == told
    assert report.lost == (range(report.last_lsn + 1, 21),)
    assert await keys(path) == list(range(report.last_lsn))
    assert 10 <= report.last_lsn < 15


async def test_damage_around_the_end_of_the_store(tmp_path: Path) -> None:
    """Nothing of the log joins it: the store is what is left."""
    path = tmp_path / "db"
    await a_database(path, checkpoint=True)
    damage_log(path, 10)
    damage_log(path, 11)
    report = await trio_wal.repair(path, accept_loss=True)
    assert report.last_lsn >= 10
    assert await keys(path) == list(range(report.last_lsn))
    assert report.lost == (range(report.last_lsn + 1, 21),)


@pytest.mark.parametrize("how", ["damaged", "missing"])
async def test_a_store_is_rebuilt_from_the_log(tmp_path: Path, how: str) -> None:
    path = tmp_path / "db"
    await a_database(path, checkpoint=True)
    if how == "damaged":
        damage_store(path)
    else:
        for file in (path / "store").iterdir():
            file.unlink()
        (path / "store").rmdir()
    report = await trio_wal.repair(path, accept_loss=True)
    if how == "damaged":
        assert (report.store, report.lost) == ("rebuilt", ())
        assert report.copies is not None
        assert (Path(report.copies) / "store" / "data.mdb").exists()
    assert await keys(path) == list(range(20))


def rot_store_format(path: Path) -> None:
    """One byte in the number of the store's format, wherever that stands."""
    file = path / "store" / "data.mdb"
    data = bytearray(file.read_bytes())
    found = [match.end() for match in re.finditer(b"format" + b"\1\0", data)]
    assert found
    for end in found:
        data[end - 2] ^= 4
    file.write_bytes(data)


async def test_a_store_that_says_it_is_newer_is_rebuilt_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    """Nothing else tells a rotten number from a newer trio-wal's."""
    path = tmp_path / "db"
    await a_database(path, checkpoint=True)
    rot_store_format(path)
    newer = r"data\.mdb: store format 5 "
    for accept_loss in (False, True):
        with pytest.raises(trio_wal.UnsupportedFormatError, match=newer):
            await trio_wal.repair(path, accept_loss=accept_loss)
    told = await trio_wal.repair(path, rebuild_store=True)
    assert (told.store, told.lost, told.done) == ("rebuilt", (), False)
    with pytest.raises(trio_wal.UnsupportedFormatError, match=newer):
        await keys(path)
    report = await trio_wal.repair(path, accept_loss=True, rebuild_store=True)
    assert attrs.evolve(report, done=False, copies=None) == told
    assert report.copies is not None
    assert (Path(report.copies) / "store" / "data.mdb").exists()
    assert await keys(path) == list(range(20))


async def test_a_store_is_not_set_aside_where_the_log_cannot_rebuild_it(tmp_path: Path) -> None:
    path = tmp_path / "db"
    await a_database(path, checkpoint=True, drop=True)
    rot_store_format(path)
    before = sorted(one.name for one in path.rglob("*"))
    with pytest.raises(
        trio_wal.CorruptLogError,
        match=r"shall be rebuilt.*; the log does not have the beginning any more, .*: restore a ",
    ):
        await trio_wal.repair(path, accept_loss=True, rebuild_store=True)
    assert sorted(one.name for one in path.rglob("*")) == before


async def test_a_store_that_is_gone_need_not_be_set_aside(tmp_path: Path) -> None:
    """As after a crash in the middle of a repair, which the same call carries to its end."""
    path = tmp_path / "db"
    await a_database(path, checkpoint=True)
    shutil.rmtree(path / "store")
    report = await trio_wal.repair(path, accept_loss=True, rebuild_store=True)
    assert (report.damage, report.done) == ((), False)
    damage_log(path, 15)
    report = await trio_wal.repair(path, accept_loss=True, rebuild_store=True)
    assert (len(report.damage), report.done) == (1, True)
    assert await keys(path) == list(range(report.last_lsn))


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
@pytest.mark.parametrize("rebuild", [False, True])
@pytest.mark.parametrize("instead", ["file", "link", "link to nowhere"])
async def test_what_is_no_store_is_set_aside_as_it_is(
    tmp_path: Path, instead: str, rebuild: bool
) -> None:
    path, store = tmp_path / "db", tmp_path / "db" / "store"
    await a_database(path, checkpoint=True)
    store.rename(tmp_path / "elsewhere")
    if instead == "file":
        store.write_bytes(b"precious")
    else:
        store.symlink_to("../elsewhere" if instead == "link" else "../nowhere")
    report = await trio_wal.repair(path, accept_loss=True, rebuild_store=rebuild)
    assert (report.store, report.lost, report.done) == ("rebuilt", (), True)
    assert report.copies is not None
    kept = Path(report.copies) / "store"
    assert kept.read_bytes() == b"precious" if instead == "file" else kept.is_symlink()
    assert await keys(path) == list(range(20))


async def test_a_log_has_no_store_to_rebuild(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        await wal.append(b"record")
    with pytest.raises(trio_wal.WrongDirectoryError, match="without rebuild_store"):
        await trio_wal.repair(tmp_path / "log", rebuild_store=True)


async def test_a_store_that_the_log_cannot_rebuild(tmp_path: Path) -> None:
    path = tmp_path / "db"
    await a_database(path, checkpoint=True, drop=True)
    damage_store(path)
    before = sorted(one.name for one in path.rglob("*"))
    with pytest.raises(trio_wal.CorruptLogError, match="restore a backup"):
        await trio_wal.repair(path, accept_loss=True)
    assert sorted(one.name for one in path.rglob("*")) == before


@pytest.mark.parametrize("how", ["no directory", "empty directory", "no segments"])
async def test_a_database_without_its_log(tmp_path: Path, how: str) -> None:
    path = tmp_path / "db"
    await a_database(path, checkpoint=True)
    for file in (path / "log").iterdir():
        if how != "no segments" or file.name != META_NAME:
            file.unlink()
    if how == "no directory":
        (path / "log").rmdir()
    report = await trio_wal.repair(path, accept_loss=True)
    assert report.done
    assert (report.store, report.last_lsn) == ("kept", 10)
    assert report.lost_more
    assert await keys(path) == list(range(10))
    async with trio_wal.open_database(path) as db:
        assert await db.put(b"20", b"x") == 11


async def test_a_store_that_is_ahead_of_its_log(tmp_path: Path) -> None:
    path = tmp_path / "db"
    await a_database(path, checkpoint=True)
    names = segment_names(path / "log")
    for name in names:
        if int(name[4:24]) >= 6:
            (path / "log" / name).unlink()
    report = await trio_wal.repair(path, accept_loss=True)
    assert (report.first_lsn, report.last_lsn) == (11, 10)
    assert await keys(path) == list(range(10))


async def test_a_sound_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "db"
    await a_database(path, checkpoint=True)
    report = await trio_wal.repair(path, accept_loss=True)
    assert (report.damage, report.done, report.store) == ((), False, "kept")
    assert not (path / f"{ASIDE}-1").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a directory cannot be opened there")
@pytest.mark.parametrize(
    "name",
    [*(NEW_NAME, META_NEW_NAME, PLACES_NEW_NAME, TRUNCATE_NAME, LOCK_NAME), f"{SPARE_PREFIX}1.tmp"],
)
@pytest.mark.parametrize("damaged", [False, True])
async def test_a_directory_in_the_place_of_a_file_must_be_moved_away(
    tmp_path: Path, name: str, damaged: bool
) -> None:
    path = tmp_path / "log"
    async with trio_wal.open_wal(path, segment_size=1) as wal:
        for _ in range(6):
            await wal.append(PAYLOAD)
    if damaged:
        segment = min(path.glob("wal-*.log"))
        data = bytearray(segment.read_bytes())
        data[DATA_OFFSET + FRAME_HEADER_SIZE] ^= 1
        segment.write_bytes(data)
    place = path / name
    place.unlink(missing_ok=True)
    place.mkdir()
    before = sorted(one.name for one in path.iterdir())
    at = f"{re.escape(str(place))}: at offset 0: not a regular file"
    for accept_loss in (False, True):
        with pytest.raises(trio_wal.CorruptLogError, match=f"^{at}, but .*: move it away; "):
            await trio_wal.repair(path, accept_loss=accept_loss)
    with pytest.raises(trio_wal.CorruptLogError, match=f"^{at}; "):
        async with trio_wal.open_wal(path):
            pass
    found = verify(OsFiles().open_directory(str(path))).findings
    assert (str(place), "not a regular file") in [(one.path, one.reason) for one in found]
    assert sorted(one.name for one in path.iterdir()) == before
    place.rmdir()
    report = await trio_wal.repair(path, accept_loss=True)
    assert report.done == damaged
    async with trio_wal.open_wal(path) as wal:
        assert wal.last_lsn == 6 or damaged
