"""Restoring: to every place of a log, of a database, and never to one that is not there."""

from __future__ import annotations

import errno
import json
import shutil
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from archives import (
    ARCHIVE,
    LOG,
    RESTORED,
    Archived,
    Wayward,
    archive_in,
    archived_log,
    records_of,
    settle,
    wait_archived,
    write_batches,
)
from databases import write
from trio.testing import MockClock

import trio_wal
from trio_wal import DirectoryArchive, KeepSegments, RestoreGapError
from trio_wal._disk.chain import read_meta
from trio_wal.testing import MemoryFiles

SECOND = timedelta(seconds=1)
UTC = timezone.utc


def archived_here(count: int, **options: Any) -> Archived:
    return trio.run(partial(archived_log, count, **options), clock=MockClock(autojump_threshold=0))


@pytest.fixture
def archived() -> Archived:
    return archived_here(40)


def names(archived: Archived, ending: str = "") -> list[str]:
    """Of the objects of segments, by LSN."""
    found = archived.files.names(ARCHIVE)
    return [name for name in found if name[0] == "0" and name.endswith(ending)]


def listed(path: Path) -> list[str]:
    return sorted(inner.name for inner in path.iterdir())


# -- where to -----------------------------------------------------------------------------


async def test_to_every_lsn(autojump_clock: MockClock) -> None:
    archived = await archived_log(110)
    assert archived.last_lsn > 200
    for lsn in range(archived.last_lsn + 1):
        report = await archived.restore(to_lsn=lsn)
        assert (report.first_lsn, report.last_lsn, report.epoch) == (1, lsn, 0)
        if lsn:
            assert report.last_time == archived.records[lsn - 1].timestamp
        await archived.check(lsn)


async def test_to_every_time_and_between(archived: Archived) -> None:
    for record in archived.records:
        for time in (record.timestamp, record.timestamp - SECOND / 2):
            lsn = archived.at(time)
            if not lsn:
                with pytest.raises(RestoreGapError, match=r"there is nothing of .* or before; "):
                    await archived.restore(to_time=time)
                continue
            report = await archived.restore(to_time=time)
            assert report.last_lsn == lsn
            await archived.check(lsn)


async def test_to_a_time_of_another_zone(archived: Archived) -> None:
    time = archived.records[20].timestamp
    there = time.astimezone(timezone(timedelta(hours=-9)))
    assert (await archived.restore(to_time=there)).last_lsn == archived.at(time)


async def test_to_the_end(archived: Archived) -> None:
    report = await archived.restore()
    assert report.last_lsn == archived.last_lsn
    assert (report.dry_run, report.database, report.backup_lsn) == (False, False, None)
    assert report.segments == len(names(archived, ".wal"))
    await archived.check(archived.last_lsn)


async def test_what_would_be_made_is_what_is_made(archived: Archived) -> None:
    for lsn in (3, 20, archived.last_lsn):
        would = await archived.restore(to_lsn=lsn, dry_run=True)
        assert would.dry_run
        assert not archived.files.exists(RESTORED)
        made = await archived.restore(to_lsn=lsn)
        for name in (
            "path",
            "uuid",
            "last_time",
            "first_lsn",
            "last_lsn",
            "epoch",
            "segments",
            "bytes",
        ):
            assert getattr(would, name) == getattr(made, name)
        await archived.check(lsn)


async def test_progress_comes_to_its_end(archived: Archived) -> None:
    seen: list[tuple[int, int]] = []
    report = await archived.restore(on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {report.bytes}
    assert seen[-1] == (report.bytes, report.bytes)


@pytest.mark.parametrize("compression", ["none", "zstd"])
async def test_a_compressed_log(autojump_clock: MockClock, compression: Any) -> None:
    pytest.importorskip("zstandard")
    archived = await archived_log(30, compression=compression)
    for lsn in range(0, archived.last_lsn, 7):
        await archived.restore(to_lsn=lsn)
        await archived.check(lsn)


async def test_one_batch_of_several_segments_sizes_is_cut_inside(autojump_clock: MockClock) -> None:
    files = MemoryFiles()
    async with trio_wal.open_wal(LOG, files=files, archive=archive_in(files)) as wal:
        await wal.append_many([b"%d" % n * 100_000 for n in range(10)])
        records = await records_of(wal)
        await wal.rotate()
    archived = Archived(files, archive_in(files), records)
    for lsn in range(11):
        await archived.restore(to_lsn=lsn)
        await archived.check(lsn)


# -- histories ----------------------------------------------------------------------------


async def test_what_was_restored_goes_on_with_the_same_archive(archived: Archived) -> None:
    """Its new segments stand beside the old ones, of which the newest history wins."""
    files = archived.files
    await archived.restore(to_lsn=30)
    async with trio_wal.open_wal(
        RESTORED, files=files, archive=archived.archive, segment_size=4096
    ) as wal:
        for number in range(30):
            await wal.append(b"new %d" % number + bytes(300))
        await wal.rotate()
        await settle()
        assert wal.statistics().archive_error is None
        assert wal.statistics().archived_lsn == 60
        new = await records_of(wal)
        epoch = wal.epoch
    files.discard_directory(RESTORED)
    assert new[:30] == archived.records[:30]
    newer = Archived(files, archived.archive, new)
    for lsn in (10, 29, 30, 31, 45, 60):
        assert (await archived.restore(to_lsn=lsn)).epoch == epoch
        await newer.check(lsn)
    # And the older one is still there.
    last = archived.last_lsn
    assert (await archived.restore(epoch=0)).last_lsn == last
    await archived.check(last)


async def test_what_was_archived_in_an_epoch_that_the_log_has_forgotten_is_restored(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_wal._identity.PARTINGS_MAX", 3)
    files = MemoryFiles()
    archive = archive_in(files)
    for _ in range(2):
        # Twice: of what the log has forgotten it knows nothing when it is opened again.
        async with trio_wal.open_wal(LOG, files=files, archive=archive) as wal:
            for number in range(5):
                await wal.append_many([b"%d" % number, b"%d" % number])
                await wait_archived(wal)
                await wal.append(b"cut off")
                await wal.truncate_after(wal.last_lsn - 1)
            await wal.append(b"end")
            await wait_archived(wal)
            records = await records_of(wal)
            assert len(wal._log.engine._history) == 3
    found = Archived(files, archive, records)
    for lsn in range(found.last_lsn + 1):
        assert (await found.restore(to_lsn=lsn)).first_lsn == 1
        await found.check(lsn)
    await found.restore()
    # No more than there is room for in log.meta.
    meta = read_meta(files.open_directory(RESTORED))
    assert meta is not None
    assert len(meta.history) == 3
    await found.check(found.last_lsn)


@pytest.mark.parametrize("damaged", [False, True])
async def test_an_older_history_that_was_restored_goes_on_with_the_same_archive(
    archived: Archived, damaged: bool
) -> None:
    """It is the newest one then, be the one that was not the newest but a name."""
    files, archive = archived.files, archived.archive
    before = {*files.names(ARCHIVE)}
    await archived.restore(to_lsn=30)
    async with trio_wal.open_wal(RESTORED, files=files, archive=archive) as wal:
        await wal.append(b"a wrong way")
        await wal.rotate()
        await settle()
        assert wal.statistics().archive_error is None
    files.discard_directory(RESTORED)
    if damaged:
        for name in {*files.names(ARCHIVE)} - before:
            if name.endswith(".json"):
                files.write_file(ARCHIVE, name, b"damaged")
        with pytest.raises(trio_wal.CorruptLogError, match=": for an older one give its epoch"):
            # Not the older one, without a word.
            await archived.restore()
    report = await archived.restore(to_lsn=32, epoch=0)
    assert (report.last_lsn, report.epoch) == (32, 0)
    async with trio_wal.open_wal(RESTORED, files=files, archive=archive) as wal:
        await wal.append(b"the right one")
        await wal.rotate()
        await settle()
        assert wal.statistics().archive_error is None
        assert wal.statistics().archived_lsn == 33
        records, epoch = await records_of(wal), wal.epoch
    files.discard_directory(RESTORED)
    assert records[:32] == archived.records[:32]
    assert (await archived.restore()).epoch == epoch
    await Archived(files, archive, records).check(33)


async def test_a_bookmark_of_before_still_says_whether_its_place_is_there(
    archived: Archived,
) -> None:
    await archived.restore(to_lsn=30)
    async with trio_wal.open_wal(RESTORED, files=archived.files) as wal:
        assert wal.epoch > 0
        async with wal.read(trio_wal.Bookmark(29, 0)) as records:
            assert [record.lsn async for record in records] == [30]
        with pytest.raises(trio_wal.LogDivergedError) as caught:
            async with wal.read(trio_wal.Bookmark(31, 0)):
                pytest.fail("read")
        assert caught.value.parted_after == 30


async def test_two_copies_are_two_histories(archived: Archived) -> None:
    epochs = set()
    for _ in range(2):
        await archived.restore(to_lsn=30)
        async with trio_wal.open_wal(RESTORED, files=MemoryFiles.crash_image(archived.files, 1)):
            pass
        async with trio_wal.open_wal(RESTORED, files=archived.files) as wal:
            epochs.add(wal.epoch)
        archived.files.discard_directory(RESTORED)
    assert len(epochs) == 2


# -- the tail -----------------------------------------------------------------------------


async def test_the_tail_has_what_was_not_archived_yet(autojump_clock: MockClock) -> None:
    files = MemoryFiles()
    archive = archive_in(files)
    async with trio_wal.open_wal(
        LOG, files=files, archive=archive, segment_size=4096, retention=KeepSegments(1)
    ) as wal:
        await write_batches(wal, 50)
        await settle()
        with pytest.raises(trio_wal.LogLockedError):
            await trio_wal.restore(archive, RESTORED, tail=LOG, files=files)
        first, last, durable = wal.first_lsn, wal.last_lsn, wal.statistics().archived_lsn
    assert durable is not None
    assert 1 < first <= durable + 1 <= last
    with pytest.raises(
        RestoreGapError, match=rf"the log ends at LSN {durable}; .* LSN 1 to {durable} "
    ):
        await trio_wal.restore(archive, RESTORED, to_lsn=last, files=files)
    report = await trio_wal.restore(archive, RESTORED, tail=LOG, files=files)
    assert (report.first_lsn, report.last_lsn) == (1, last)
    async with trio_wal.open_wal(RESTORED, files=files) as wal:
        found = await records_of(wal)
        assert [record.lsn for record in found] == list(range(1, last + 1))
    files.discard_directory(RESTORED)
    # With its end known, later times have an answer.
    later = found[-1].timestamp + SECOND
    with pytest.raises(RestoreGapError, match=r"nothing is there until "):
        await trio_wal.restore(archive, RESTORED, to_time=later, files=files)
    report = await trio_wal.restore(archive, RESTORED, to_time=later, tail=LOG, files=files)
    assert report.last_lsn == last


async def test_a_log_is_its_own_source(archived: Archived) -> None:
    for lsn in (0, 1, 20, archived.last_lsn):
        report = await trio_wal.restore(LOG, RESTORED, to_lsn=lsn, files=archived.files)
        assert report.last_lsn == lsn
        await archived.check(lsn)


@pytest.mark.parametrize("kind", ["power", "kill"])
async def test_the_tail_of_a_log_that_was_killed(autojump_clock: MockClock, kind: Any) -> None:
    files = MemoryFiles()
    async with trio_wal.open_wal(LOG, files=files, segment_size=1) as wal:
        await write_batches(wal, 7)
        last = wal.last_lsn
        for seed in range(4):
            image = files.crash_image(seed, kind)
            report = await trio_wal.restore(LOG, RESTORED, files=image)
            assert report.last_lsn == last
            async with trio_wal.open_wal(RESTORED, files=image) as copy:
                assert await records_of(copy) == await records_of(wal)


# -- what is not there --------------------------------------------------------------------


async def test_a_gap_is_told_with_the_last_place_that_can_be_had(archived: Archived) -> None:
    manifests = names(archived, ".json")
    first, last = (int(part) for part in manifests[4].split("-")[:2])
    archived.files.remove_file(ARCHIVE, manifests[4])
    end = archived.records[first - 2].timestamp
    for options in ({}, {"to_lsn": first}, {"to_lsn": archived.last_lsn}):
        with pytest.raises(RestoreGapError, match=f"what comes after LSN {first - 1} is") as caught:
            await archived.restore(**options)
        assert (caught.value.first_lsn, caught.value.last_lsn) == (1, first - 1)
        assert caught.value.last_time == end
        assert end.isoformat() in str(caught.value)
    # Before it all can be had; a time within it is none of which anything is known.
    await archived.restore(to_lsn=first - 1)
    await archived.check(first - 1)
    before = end - timedelta(microseconds=1)
    assert (await archived.restore(to_time=before, dry_run=True)).last_lsn == archived.at(before)
    for time in (end, archived.records[last - 1].timestamp):
        with pytest.raises(RestoreGapError, match=r"nothing is there until"):
            await archived.restore(to_time=time)
    assert not archived.files.exists(RESTORED)


async def test_a_place_after_the_end_or_before_the_first(archived: Archived) -> None:
    last = archived.last_lsn
    with pytest.raises(RestoreGapError, match=f"the log ends at LSN {last}; nothing was made"):
        await archived.restore(to_lsn=last + 1)
    with pytest.raises(RestoreGapError, match=f"after LSN {last} nothing is there until"):
        await archived.restore(to_time=datetime.now(UTC) + timedelta(days=1000))
    gone = names(archived)[:4]
    for name in gone:
        archived.files.remove_file(ARCHIVE, name)
    first = int(gone[-1].split("-")[1]) + 1
    with pytest.raises(
        RestoreGapError, match=f"LSN 1 cannot be restored: the first segment begins at LSN {first};"
    ) as caught:
        await archived.restore(to_lsn=1)
    assert (caught.value.first_lsn, caught.value.last_lsn) == (first, last)
    report = await archived.restore(to_lsn=first)
    assert (report.first_lsn, report.last_lsn) == (first, first)


async def test_objects_that_are_there_twice_do_no_harm(archived: Archived) -> None:
    """As two copies of a log make them, each in its own epoch."""
    for name in names(archived, ".json"):
        fields = json.loads(archived.files.read_file(ARCHIVE, name))
        archived.files.write_file(ARCHIVE, f"copy of {name}", json.dumps(fields).encode())
    await archived.restore()
    await archived.check(archived.last_lsn)


async def test_nothing_that_is_damaged_is_taken_for_what_it_was(archived: Archived) -> None:
    """A bit in every object, at many places: the restore is right, or an error that says why."""
    for name in names(archived):
        data = archived.files.read_file(ARCHIVE, name)
        for bit in range(0, 8 * len(data), max(1, 8 * len(data) // 7) | 1):
            archived.files.flip_bit(ARCHIVE, name, bit)
            with pytest.raises((RestoreGapError, trio_wal.CorruptLogError)) as caught:
                await archived.restore()
            if name.endswith(".json") and name != names(archived, ".json")[0]:
                assert isinstance(caught.value, RestoreGapError)
                assert f"1 manifests cannot be read, as {name}" in str(caught.value)
                assert isinstance(caught.value.__cause__, trio_wal.CorruptLogError)
            else:
                assert isinstance(caught.value, trio_wal.CorruptLogError)
                assert caught.value.path == name
            assert not archived.files.exists(RESTORED)
            archived.files.flip_bit(ARCHIVE, name, bit)
    await archived.restore()
    await archived.check(archived.last_lsn)


async def test_damage_elsewhere_is_in_nobodys_way(archived: Archived) -> None:
    archived.files.write_file(ARCHIVE, names(archived, ".json")[-1], b"{")
    archived.files.write_file(ARCHIVE, "archive.json", b"no JSON")
    await archived.restore(to_lsn=10)
    await archived.check(10)


@pytest.mark.parametrize("what", ["shorter", "longer", "another", "gone"])
async def test_a_segment_that_is_not_what_its_manifest_names(archived: Archived, what: str) -> None:
    files, (first, second, *_) = archived.files, names(archived, ".wal")
    data = files.read_file(ARCHIVE, second)
    if what == "gone":
        files.remove_file(ARCHIVE, second)
    else:
        first_data = files.read_file(ARCHIVE, first)
        changed = {"shorter": data[:-512], "longer": data + bytes(512), "another": first_data}
        files.write_file(ARCHIVE, second, changed[what])
    error = FileNotFoundError if what == "gone" else trio_wal.CorruptLogError
    with pytest.raises(error):
        await archived.restore()
    assert not files.exists(RESTORED)
    await archived.restore(to_lsn=1)


async def test_segments_of_another_log_are_not_mixed_in(archived: Archived) -> None:
    files = MemoryFiles(seed=5)
    archive = DirectoryArchive(ARCHIVE, files=files)
    async with trio_wal.open_wal(LOG, files=files, archive=archive) as wal:
        await wal.append(b"x")
        await wal.rotate()
    for name in files.names(ARCHIVE):
        if name[0] == "0":
            archived.files.write_file(ARCHIVE, name, files.read_file(ARCHIVE, name))
    last = archived.last_lsn
    assert (await archived.restore(dry_run=True)).last_lsn == last
    # Without a word of whose archive it is nobody can tell which is meant.
    archived.files.remove_file(ARCHIVE, "archive.json")
    with pytest.raises(trio_wal.CorruptLogError, match=r"is of the log .*, and .* of "):
        await archived.restore()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to_lsn": -1}, ValueError, "^to_lsn must be at least 0"),
        ({"to_lsn": "1"}, TypeError, "^to_lsn must be an int"),
        ({"to_time": datetime(2026, 1, 1)}, ValueError, "^to_time must have a time zone"),  # noqa: DTZ001
        ({"to_time": "2026-01-01"}, TypeError, "^to_time must be a datetime"),
        (
            {"to_lsn": 1, "to_time": datetime(2026, 1, 1, tzinfo=UTC)},
            ValueError,
            "^to_time cannot be combined with to_lsn",
        ),
        ({"epoch": -1}, ValueError, "^epoch must be at least 0"),
        ({"dry_run": 1}, TypeError, "^dry_run must be True or False"),
        ({"tail": 1}, TypeError, "^path must be a str"),
        ({"tail": "/nowhere"}, FileNotFoundError, "/nowhere"),
        ({"tail": ARCHIVE}, trio_wal.WrongDirectoryError, "neither a log nor a database"),
    ],
)
async def test_what_is_wrong_is_named(
    archived: Archived, options: Any, error: type[Exception], message: str
) -> None:
    before = archived.files.contents(ARCHIVE)
    with pytest.raises(error, match=message):
        await archived.restore(**options)
    assert archived.files.contents(ARCHIVE) == before
    assert not archived.files.exists(RESTORED)


async def test_a_source_that_is_none(archived: Archived) -> None:
    files = archived.files
    with pytest.raises(TypeError, match=r"^source must be an Archive, with put, list and get"):
        await trio_wal.restore(17, RESTORED, files=files)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        await trio_wal.restore("/nowhere", RESTORED, files=files)
    files.write_file("/photos", "holiday.jpg", b"x")
    with pytest.raises(trio_wal.WrongDirectoryError, match=r"no archive: it holds 'holiday.jpg'"):
        await trio_wal.restore("/photos", RESTORED, files=files)
    files.open_directory("/empty", create=True)
    with pytest.raises(trio_wal.WrongDirectoryError, match=r"no archive, or one that has nothing"):
        await trio_wal.restore("/empty", RESTORED, files=files)
    with pytest.raises(FileExistsError, match=r"the destination of the restore already exists"):
        await trio_wal.restore(ARCHIVE, LOG, files=files)
    with pytest.raises(FileExistsError):
        await trio_wal.restore(ARCHIVE, LOG, files=files, dry_run=True)


# -- failures ------------------------------------------------------------------------------


async def test_each_failing_call_leaves_nothing_and_can_be_tried_again(archived: Archived) -> None:
    files = archived.files
    for operation in (
        "open",
        "pread",
        "pwrite",
        "sync",
        "allocate",
        "rename",
        "sync_dir",
        "truncate",
    ):
        for after in (*range(12), *range(12, 200, 17)):
            files.fail(operation, errno.EIO, after=after)
            try:
                await archived.restore(to_lsn=33)
            except OSError:
                assert not files.exists(RESTORED), (operation, after)
                assert not files.exists(f"{RESTORED}.tmp")
                files.heal()
                await archived.restore(to_lsn=33)
            files.heal()
            await archived.check(33)


async def test_a_full_disk(archived: Archived) -> None:
    archived.files.free_bytes = 20_000
    with pytest.raises((OSError, trio_wal.LogFullError)):
        await archived.restore()
    assert not archived.files.exists(RESTORED)
    archived.files.heal()
    await archived.restore()
    await archived.check(archived.last_lsn)


@pytest.mark.parametrize("kind", ["power", "kill"])
def test_after_a_crash_at_any_operation_it_is_there_whole_or_not_at_all(kind: Any) -> None:
    async def main() -> Archived:
        archived = await archived_log(15)
        files = archived.files
        files.after_operation = lambda *_: images.extend(
            files.crash_image(seed, kind) for seed in range(2)
        )
        await archived.restore(to_lsn=17)
        files.after_operation = None
        images.extend(files.crash_image(seed, kind) for seed in range(8))
        return archived

    images: list[MemoryFiles] = []
    archived = trio.run(main, clock=MockClock(autojump_threshold=0))
    assert len(images) > 60
    there = 0
    for image in images:
        found = Archived(image, archive_in(image), archived.records)

        async def look(found: Archived = found) -> None:
            nonlocal there
            if found.files.exists(RESTORED):
                there += 1
                await found.check(17)
            # What was half made is in nobody's way, but for its name.
            found.files.discard_directory(f"{RESTORED}.tmp")
            await found.restore(to_lsn=17)
            await found.check(17)

        trio.run(look, clock=MockClock(autojump_threshold=0))
    assert there >= 8


async def test_cancelled_it_ends_and_leaves_nothing(tmp_path: Path) -> None:
    archive = Wayward(DirectoryArchive(tmp_path / "archive"))
    async with trio_wal.open_wal(tmp_path / "log", archive=archive, segment_size=1) as wal:
        for _ in range(5):
            await wal.append(bytes(2000))
        await wait_archived(wal)
    with trio.CancelScope() as scope:
        calls = 0

        def progress(done: int, total: int) -> None:
            nonlocal calls
            calls += 1
            trio.from_thread.run_sync(scope.cancel)

        await trio_wal.restore(archive, tmp_path / "made", on_progress=progress)
        pytest.fail("restored")
    assert scope.cancelled_caught
    assert calls == 1
    assert listed(tmp_path) == ["archive", "log"]


# -- databases -----------------------------------------------------------------------------


def state_of(db: Any) -> dict[bytes, bytes]:
    return dict(db.scan())


async def run_bank(path: Path, archive: Any, states: dict[int, dict[bytes, bytes]]) -> list[Any]:
    """Commits, with two backups between them; gives the times of each."""
    times: list[Any] = [None]
    async with trio_wal.open_database(
        path / "db", archive=archive, segment_size=1, checkpoint_bytes=2000
    ) as db:
        states[0] = {}
        for number in range(60):
            lsn = await write(db, {b"%d" % (number % 17): b"%d" % number + bytes(200)})
            states[lsn] = state_of(db)
            if number in (20, 40):
                assert await db.backup(path / f"backup {number}") == lsn
        async with db.changes(db.wal.first_lsn) as commits:
            async for commit in commits:
                times.append(commit.timestamp)
                if commit.lsn == lsn:
                    break
        await wait_archived(db.wal)
    return times


async def check_database(path: Path, lsn: int, expected: dict[bytes, bytes]) -> None:
    async with trio_wal.open_database(path, verify_store="child") as db:
        assert state_of(db) == expected
        assert db.durable_lsn == lsn
        assert await db.put(b"goes on", b"x") == lsn + 1


async def test_the_drill(tmp_path: Path) -> None:
    """Backup, commits, destroy, restore to a place in the middle, compare."""
    archive = DirectoryArchive(tmp_path / "archive")
    states: dict[int, dict[bytes, bytes]] = {}
    await run_bank(tmp_path, archive, states)
    shutil.rmtree(tmp_path / "db")
    for lsn in (0, 1, 20, 21, 22, 30, 41, 42, 59, 60):
        report = await trio_wal.restore(archive, tmp_path / f"to {lsn}", to_lsn=lsn)
        assert report.database
        assert report.last_lsn == lsn
        assert report.backup_lsn == (41 if lsn >= 41 else 21 if lsn >= 21 else None)
        await check_database(tmp_path / f"to {lsn}", lsn, states[lsn])
    # Without its first segments it begins with the first backup.
    for name in sorted(archive.list())[:4]:
        (tmp_path / "archive" / name).unlink()
    with pytest.raises(
        RestoreGapError,
        match=r"LSN 20 cannot be restored: the first backup is of LSN 21; .*21 to 60",
    ):
        await trio_wal.restore(archive, tmp_path / "no", to_lsn=20)
    report = await trio_wal.restore(tmp_path / "archive", tmp_path / "by path", to_lsn=33)
    await check_database(tmp_path / "by path", 33, states[33])


async def test_the_drill_by_time(tmp_path: Path) -> None:
    archive = DirectoryArchive(tmp_path / "archive")
    states: dict[int, dict[bytes, bytes]] = {}
    async with trio_wal.open_database(
        tmp_path / "db", archive=archive, retention=trio_wal.KeepAll()
    ) as db:
        await db.put(b"alice", b"10")
        await db.backup(tmp_path / "backup")
        for number in range(5):
            await db.put(b"alice", b"%d" % number)
            await trio.sleep(0.002)
        await wait_archived(db.wal)
        async with db.changes(1) as commits:
            times = {}
            async for commit in commits:
                times[commit.lsn] = commit.timestamp
                states[commit.lsn] = {b"alice": commit.operations[0].value or b""}
                if commit.lsn == 6:
                    break
    for lsn in range(2, 7):
        dest = tmp_path / f"to {lsn}"
        report = await trio_wal.restore(archive, dest, to_time=times[lsn])
        assert (report.last_lsn, report.last_time, report.backup_lsn) == (lsn, times[lsn], 1)
        await check_database(dest, lsn, states[lsn])


async def test_a_backup_and_what_is_left_of_the_database(tmp_path: Path) -> None:
    archive = DirectoryArchive(tmp_path / "archive")
    states: dict[int, dict[bytes, bytes]] = {}
    async with trio_wal.open_database(tmp_path / "db", retention=trio_wal.KeepAll()) as db:
        for number in range(20):
            await db.put(b"%d" % number, b"x")
            states[number + 1] = state_of(db)
            if number == 9:
                await db.backup(tmp_path / "backup")
    for lsn in (10, 15, 20):
        dest = tmp_path / f"to {lsn}"
        options: dict[str, Any] = {"to_lsn": lsn, "tail": tmp_path / "db"}
        report = await trio_wal.restore(tmp_path / "backup", dest, **options)
        assert (report.last_lsn, report.backup_lsn) == (lsn, 10)
        await check_database(dest, lsn, states[lsn])
    with pytest.raises(
        RestoreGapError, match=r"LSN 9 cannot be restored: the first backup is of LSN 10"
    ):
        await trio_wal.restore(tmp_path / "backup", tmp_path / "no", to_lsn=9)
    with pytest.raises(RestoreGapError, match=r"the log ends at LSN 10"):
        await trio_wal.restore(tmp_path / "backup", tmp_path / "no", to_lsn=11)
    # A database that was in use may hold more than its LSN says.
    for path in (tmp_path / "db", tmp_path / "to 10"):
        with pytest.raises(trio_wal.WrongDirectoryError, match=r"a database that was opened"):
            await trio_wal.restore(path, tmp_path / "no")
    assert archive.list() == []
    assert not (tmp_path / "no").exists()


async def test_a_backup_that_cannot_be_archived_is_none(tmp_path: Path) -> None:
    archive = Wayward(DirectoryArchive(tmp_path / "archive"))

    def before(method: str, name: str) -> None:
        if name.endswith(".mdb"):
            raise OSError(errno.ENOSPC, "the archive is full")

    archive.before = before
    async with trio_wal.open_database(tmp_path / "db", archive=archive) as db:
        await db.put(b"key", b"value")
        with pytest.raises(OSError, match="the archive is full"):
            await db.backup(tmp_path / "backup")
        assert listed(tmp_path) == ["archive", "db"]
        archive.before = lambda *_: None
        assert await db.backup(tmp_path / "backup") == 1
    report = await trio_wal.restore(archive, tmp_path / "made")
    assert (report.backup_lsn, report.segments, report.last_time) == (1, 0, None)
    await check_database(tmp_path / "made", 1, {b"key": b"value"})


async def test_consumers_of_a_database_are_restored_with_it(tmp_path: Path) -> None:
    archive = DirectoryArchive(tmp_path / "archive")
    async with trio_wal.open_database(tmp_path / "db", archive=archive) as db:
        await db.put(b"one", b"1")
        async with db.consumer("mailer") as consumer:
            async for commit in consumer:
                await consumer.acknowledge(commit)
                break
        await db.put(b"two", b"2")
        await db.backup(tmp_path / "backup")
        last = db.durable_lsn
        await wait_archived(db.wal)
    for number, to_lsn in enumerate((None, last - 1)):
        await trio_wal.restore(archive, tmp_path / f"{number}", to_lsn=to_lsn)
        async with trio_wal.open_database(tmp_path / f"{number}") as db:
            assert db.statistics().consumers["mailer"].acknowledged_lsn == 1


async def test_a_damaged_backup_is_found(tmp_path: Path) -> None:
    archive = DirectoryArchive(tmp_path / "archive")
    async with trio_wal.open_database(tmp_path / "db", archive=archive) as db:
        await db.put(b"one", b"1")
        await db.backup(tmp_path / "backup")
    (data,) = (tmp_path / "archive").glob("*.mdb")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(trio_wal.CorruptLogError, match="what is kept is not what the manifest"):
        await trio_wal.restore(archive, tmp_path / "made")
    assert not (tmp_path / "made").exists()
