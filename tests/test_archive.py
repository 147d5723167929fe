"""Archives, and the task of a log that fills one: nothing is dropped here before it is there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
from archives import (
    ARCHIVE,
    LOG,
    RESTORED,
    Wayward,
    archive_in,
    records_of,
    settle,
    wait_archived,
    write_batches,
)
from trio.testing import MockClock

import trio_wal
from trio_wal import DirectoryArchive, KeepSegments, _archiver
from trio_wal._archive import is_same
from trio_wal._archived import OpenedLog
from trio_wal._archiver import CLOSE_SECONDS
from trio_wal._archiving import begin_archive
from trio_wal._manifest import put_identity, read_identity
from trio_wal.testing import MemoryFiles

ONE, TWO = (f"{lsn:020d}-0.wal" for lsn in (1, 2))
"""Names of what an archive has."""
NEW_LOG = OpenedLog(history=(), first_lsn=1, last_lsn=0, ends={})


@pytest.fixture
def files() -> MemoryFiles:
    return MemoryFiles()


@pytest.fixture
def autojump(autojump_clock: MockClock) -> MockClock:
    return autojump_clock


def open_log(files: MemoryFiles, archive: Any, **options: Any) -> Any:
    options = {"segment_size": 4096, **options}
    return trio_wal.open_wal(LOG, files=files, archive=archive, **options)


def manifests(archive: Any) -> list[dict[str, Any]]:
    names = sorted(name for name in archive.list() if name[0] == "0" and name.endswith(".json"))
    return [json.loads(b"".join(archive.get(name))) for name in names]


# -- a directory as an archive ------------------------------------------------------------


def test_what_is_put_is_got_and_listed(tmp_path: Path) -> None:
    archive = DirectoryArchive(tmp_path / "archive")
    assert archive.list() == []
    archive.put("one", [b"a", b"", b"bc"])
    archive.put("empty", [])
    assert sorted(archive.list()) == ["empty", "one"]
    assert b"".join(archive.get("one")) == b"abc"
    assert b"".join(archive.get("empty")) == b""
    assert repr(archive) == f"DirectoryArchive({str(tmp_path / 'archive')!r})"
    assert (tmp_path / "archive").stat().st_mode & 0o777 == 0o700


def test_a_name_is_taken_once_and_the_same_content_is_fine(tmp_path: Path) -> None:
    archive = DirectoryArchive(str(tmp_path))
    archive.put("one", [b"abc"])
    archive.put("one", [b"ab", b"c"])
    for other in ([b"abd"], [b"ab"], [b"abcd"], []):
        with pytest.raises(
            FileExistsError, match="other content is kept under this name"
        ) as caught:
            archive.put("one", other)
        assert caught.value.filename == str(tmp_path / "one")
    assert b"".join(archive.get("one")) == b"abc"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_an_error_of_the_content_leaves_nothing(tmp_path: Path) -> None:
    def content() -> Iterator[bytes]:
        yield b"abc"
        raise ZeroDivisionError

    archive = DirectoryArchive(str(tmp_path))
    with pytest.raises(ZeroDivisionError):
        archive.put("one", content())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        next(archive.get("one"))


def test_of_two_who_put_at_once_one_wins(tmp_path: Path) -> None:
    archive = DirectoryArchive(str(tmp_path))

    def content(name: str, second: Iterable[bytes]) -> Iterator[bytes]:
        # The other is there in the middle of this one.
        archive.put(name, second)
        yield b"abc"

    archive.put("one", content("one", [b"abc"]))
    with pytest.raises(FileExistsError):
        archive.put("two", content("two", [b"other"]))
    assert b"".join(archive.get("two")) == b"other"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_file_system_without_links_is_served_as_well_as_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr("os.link", link)
    archive = DirectoryArchive(str(tmp_path))
    archive.put("one", [b"abc"])
    archive.put("one", [b"abc"])
    with pytest.raises(FileExistsError):
        archive.put("one", [b"x"])
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("name", ["../one", "a/b", "", ".", ".."])
def test_a_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"^name must be one of a file in the directory"):
        DirectoryArchive(str(tmp_path / "archive")).put(name, [b"x"])


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ([], [], True),
        ([b""], [], True),
        ([b"abc"], [b"a", b"", b"bc"], True),
        ([b"abc"], [b"ab"], False),
        ([b"ab"], [b"abc"], False),
        ([b"abc"], [b"abd"], False),
        ([], [b"a"], False),
    ],
)
def test_content_is_compared_however_it_is_cut(
    left: list[bytes], right: list[bytes], same: bool
) -> None:
    assert is_same(left, right) is same


@pytest.mark.parametrize("kind", ["power", "kill"])
def test_what_is_put_or_listed_survives_a_crash_at_any_operation(kind: Any) -> None:
    files = MemoryFiles()
    archive = archive_in(files)
    images: list[MemoryFiles] = []
    files.after_operation = lambda *_: images.extend(files.crash_image(n, kind) for n in range(5))
    archive.put(ONE, [b"a" * 700, b"b" * 700])
    put_at = len(images)
    archive.put(TWO, [b"c"])
    for number, image in enumerate(images):
        there = archive_in(image)
        names = there.list()
        assert ONE in names or number < put_at
        for name in names:
            assert b"".join(there.get(name)) == (b"a" * 700 + b"b" * 700 if name == ONE else b"c")
        # What a log has listed is believed: it must not go away any more.
        begin_archive(there, UUID(int=1), NEW_LOG)
        for seed in range(5):
            assert set(archive_in(image.crash_image(seed)).list()) >= set(names)
        image.remove_file(ARCHIVE, "archive.json")
        # And whoever puts it once more may believe it, too.
        there.put(ONE, [b"a" * 700, b"b" * 700])
        for seed in range(5):
            assert ONE in archive_in(image.crash_image(seed)).list()


def test_each_failing_call_of_a_put_leaves_nothing_and_can_be_tried_again() -> None:
    for operation in ("open", "pwrite", "sync", "rename", "sync_dir"):
        for after in range(4):
            files = MemoryFiles()
            archive = archive_in(files)
            archive.put("other", [b"x"])
            files.fail(operation, errno.ENOSPC, after=after)
            try:
                archive.put("one", [b"a", b"b"])
            except OSError:
                # Of a sync of the directory nobody knows; of all else nothing is left.
                assert archive.list() == ["other"] or operation == "sync_dir"
            files.heal()
            archive.put("one", [b"a", b"b"])
            assert archive.list() == ["one", "other"]
            assert files.names(ARCHIVE) == ["one", "other"]


# -- archiving ------------------------------------------------------------------------


async def test_every_sealed_segment_is_archived_with_a_manifest(files: MemoryFiles) -> None:
    archive = archive_in(files)
    async with open_log(files, archive) as wal:
        await write_batches_now(wal, 40)
        await settle()
        found = manifests(archive)
        sealed = wal.statistics().segments - 1
        assert len(found) == sealed > 2
        assert wal.statistics().archived_lsn == found[-1]["last_lsn"]
        assert await wal.rotate() == wal.last_lsn
        await settle()
        found = manifests(archive)
        records = {record.lsn: record for record in await records_of(wal)}
        statistics = wal.statistics()
    assert [m["first_lsn"] for m in found] == [1, *(m["last_lsn"] + 1 for m in found[:-1])]
    assert statistics.archived_lsn == found[-1]["last_lsn"] == 40
    assert (statistics.archive_lag_segments, statistics.archive_lag_bytes) == (0, 0)
    assert (statistics.archive_failures, statistics.archive_error) == (0, None)
    contents = files.contents(LOG)
    for number, manifest in enumerate(found, 1):
        (data,) = [n for n in archive.list() if n.endswith(".wal") and manifest["salt"] in n]
        assert b"".join(archive.get(data)) == contents[f"wal-{manifest['first_lsn']:020d}.log"]
        assert hashlib.sha256(b"".join(archive.get(data))).hexdigest() == manifest["digest"]
        assert manifest["digest"][:16] in data
        assert manifest["number"] == number
        assert manifest["uuid"] == str(wal.uuid)
        for which in ("first", "last"):
            time = records[manifest[f"{which}_lsn"]].timestamp
            assert manifest[f"{which}_time_us"] == round(time.timestamp() * 1e6)
    assert len(archive.list()) == 2 * len(found) + 1


async def write_batches_now(wal: Any, count: int) -> None:
    for number in range(count):
        await wal.append(b"%d" % number + bytes(300))


async def test_a_log_without_an_archive_has_no_figures_of_one(files: MemoryFiles) -> None:
    async with trio_wal.open_wal(LOG, files=files) as wal:
        found = wal.statistics()
    assert found.archived_lsn is found.archive_lag_segments is found.archive_lag_bytes is None
    assert found.archive_failures is found.archive_error is None


async def test_an_open_goes_on_where_the_last_one_ended(files: MemoryFiles) -> None:
    archive = Wayward(archive_in(files))
    async with open_log(files, archive) as wal:
        await write_batches_now(wal, 40)
    first = list(archive.puts)
    async with open_log(files, archive) as wal:
        await settle()
        assert archive.puts == first
        await wal.rotate()
        await settle()
        assert len(archive.puts) == len(first) + 2
        assert wal.statistics().archived_lsn == 40
    assert len(set(archive.puts)) == len(archive.puts)


async def test_an_archive_that_comes_later_gets_what_the_log_still_has(files: MemoryFiles) -> None:
    async with trio_wal.open_wal(LOG, files=files, segment_size=4096) as wal:
        await write_batches_now(wal, 40)
        await wal.truncate_before(20)
        first = wal.first_lsn
        assert first > 1
    archive = archive_in(files)
    async with open_log(files, archive) as wal:
        await settle()
        assert manifests(archive)[0]["first_lsn"] == first
    report = await trio_wal.restore(archive, RESTORED, files=files)
    assert (report.first_lsn, report.last_lsn) == (first, manifests(archive)[-1]["last_lsn"])


async def test_nothing_is_dropped_before_it_is_there(
    files: MemoryFiles, autojump: MockClock
) -> None:
    archive = Wayward(archive_in(files))
    broken = True

    def before(method: str, name: str) -> None:
        if broken and method == "put" and name[0] == "0":
            raise OSError(errno.ENOSPC, "the archive is full")

    archive.before = before
    async with open_log(files, archive, retention=KeepSegments(1)) as wal:
        await write_batches_now(wal, 60)
        await trio.sleep(10)
        assert wal.first_lsn == 1
        await wal.truncate_before(40)
        assert wal.first_lsn == 1
        found = wal.statistics()
        assert found.archived_lsn == 0
        assert found.archive_lag_segments == found.segments - 1
        assert 0 < found.archive_lag_bytes < found.disk_bytes
        assert found.archive_failures > 2
        assert found.archive_error == "OSError: [Errno 28] the archive is full"
        broken = False
        await trio.sleep(70)
        found = wal.statistics()
        assert found.archived_lsn > 40
        assert (found.archive_lag_segments, found.archive_error) == (0, None)
        assert wal.first_lsn == found.archived_lsn + 1


async def test_tries_are_further_and_further_apart_and_told(
    files: MemoryFiles, autojump: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "trio_wal")
    archive = Wayward(archive_in(files))
    times: list[float] = []

    def before(method: str, name: str) -> None:
        if method == "put" and name.endswith(".wal"):
            times.append(trio.current_time())
            if len(times) < 12:
                raise RuntimeError("what an archive may raise")

    archive.before = before
    async with open_log(files, archive) as wal:
        await wal.append(b"x")
        await wal.rotate()
        await trio.sleep(600)
        assert wal.statistics().archive_failures == 11
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60]
    found = [r.trio_wal for r in caplog.records if "archive" in r.trio_wal["event"]]  # type: ignore[attr-defined]
    assert [event["event"] for event in found] == ["archive_failed"] * 11 + [
        "archived",
        "archive_works",
    ]
    assert found[0]["error"] == "RuntimeError('what an archive may raise')"
    assert (found[11]["segment"], found[11]["last_lsn"]) == (1, 1)
    assert found[12]["lsn"] == 1


async def test_a_cut_log_is_archived_as_another_history(files: MemoryFiles) -> None:
    archive = archive_in(files)
    async with open_log(files, archive) as wal:
        await write_batches_now(wal, 40)
        await wal.rotate()
        await settle()
        old = await records_of(wal)
        await wal.truncate_after(25)
        await wal.append(b"the new history")
        await wal.rotate()
        await settle()
        new = await records_of(wal)
        assert wal.statistics().archived_lsn == 26
        assert wal.statistics().archive_failures == 0
        epoch = wal.epoch
    assert [r.data for r in new[25:]] == [b"the new history"]
    await restored(files, new)
    await restored(files, old, epoch=0)
    await restored(files, old[:33], epoch=0, to_lsn=33)
    await restored(files, new, epoch=epoch)
    await restored(files, old[:25], to_lsn=25)
    with pytest.raises(trio_wal.LogDivergedError):
        await trio_wal.restore(archive, RESTORED, files=files, epoch=17)


async def restored(files: MemoryFiles, records: list[Any], **options: Any) -> None:
    report = await trio_wal.restore(archive_in(files), RESTORED, files=files, **options)
    assert report.last_lsn == len(records)
    async with trio_wal.open_wal(RESTORED, files=files) as wal:
        assert await records_of(wal) == records
    files.discard_directory(RESTORED)


async def test_a_cut_while_a_segment_is_put_makes_it_anew(files: MemoryFiles) -> None:
    archive = Wayward(archive_in(files))
    cuts = 0
    async with open_log(files, archive, retention=KeepSegments(1)) as wal:
        directory = wal._log.engine._directory

        def before(method: str, name: str) -> None:
            nonlocal cuts
            if method == "put" and name.endswith(".wal") and not cuts:
                cuts += 1
                # What it would be in a thread: a cut beside the call.
                directory.truncate_after(2)

        for number in range(5):
            await wal.append(b"%d" % number)
        archive.before = before
        await wal.rotate()
        await settle()
    # The first one's data stays, but nothing says that it is the log's.
    assert [(m["first_lsn"], m["last_lsn"]) for m in manifests(archive)] == [(1, 2)]


async def test_a_segment_that_is_being_cut_is_not_called_damaged(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread it is read beside the cut, which has the archiver go on at its end."""
    archive = Wayward(archive_in(files))
    async with open_log(files, archive) as wal:
        engine = wal._log.engine
        put, failed = _archiver.put_segments, 0

        def put_segments(*args: Any) -> int:
            nonlocal failed
            if failed:
                return put(*args)
            failed += 1
            engine._archiver.begin_cut()
            engine._directory.cuts += 1
            raise trio_wal.CorruptLogError("wal-1.log", 4096, "the segment's footer is missing")

        monkeypatch.setattr(_archiver, "put_segments", put_segments)
        await wal.append(b"one")
        await wal.rotate()
        await settle()
        assert failed
        assert archive.puts == []
        engine._directory.cuts += 1
        engine._archiver.end_cut()
        await settle()
        found = wal.statistics()
        assert (found.archived_lsn, found.archive_failures, found.archive_error) == (1, 0, None)


async def test_what_its_owner_has_deleted_from_an_archive_stays_deleted(files: MemoryFiles) -> None:
    archive = Wayward(archive_in(files))
    async with open_log(files, archive) as wal:
        await write_batches_now(wal, 40)
        await settle()
    names = sorted(name for name in files.names(ARCHIVE) if name[0] == "0")
    gone = names[:4]
    for name in gone:
        files.remove_file(ARCHIVE, name)
    archive.puts.clear()
    async with open_log(files, archive) as wal:
        await settle()
        assert archive.puts == []
        await wal.rotate()
    assert set(gone) & set(files.names(ARCHIVE)) == set()
    # But what is missing in between is put there again, be it the segment or the manifest.
    for name in names[6:10:3]:
        files.remove_file(ARCHIVE, name)
        async with open_log(files, archive):
            await settle()
        assert name in files.names(ARCHIVE)


def set_back(files: MemoryFiles, before: dict[str, bytes]) -> None:
    files.discard_directory(LOG)
    for name, data in before.items():
        files.write_file(LOG, name, data)


async def fill(wal: Any, *records: bytes | None) -> None:
    """None: the segment is sealed."""
    for data in records:
        if data is None:
            await wal.rotate()
        else:
            await wal.append(data)


async def live_and_set_back(
    files: MemoryFiles, archive: Any, *records: bytes | None, cut: bool = False
) -> None:
    """A log of one record that goes on with these, archived, and is set back to that one."""
    async with open_log(files, None, segment_size=1 << 16) as wal:
        await wal.append(b"common")
    before = files.contents(LOG)
    async with open_log(files, archive, segment_size=1 << 16) as wal:
        if cut:
            await wal.truncate_after(0)
        await fill(wal, *records)
    set_back(files, before)


@pytest.mark.parametrize(
    ("cut", "more", "told"),
    [
        (False, 1, r"is ahead, of LSN 2; this log ended at 1: "),
        (False, 3, r"is ahead, of LSN 2; this log ended at 1: "),
        (True, 1, r"is ahead, of epoch 1[0-9a-f]{8}; this log, in epoch 0, is not: "),
    ],
)
async def test_a_log_that_was_set_back_does_not_archive_beside_what_it_had_archived(
    files: MemoryFiles, autojump: MockClock, cut: bool, more: int, told: str
) -> None:
    """The same segment, the same LSNs, other records; or other ones, of which restore takes one."""
    archive = archive_in(files)
    await live_and_set_back(files, archive, b"one", None, cut=cut)
    kept = files.contents(ARCHIVE)
    async with open_log(files, archive, segment_size=1 << 16, retention=KeepSegments(1)) as wal:
        for _ in range(more):
            await wal.append(b"two")
        await wal.rotate()
        await trio.sleep(5)
        found = wal.statistics()
        assert found.archive_error is not None
        assert re.match("FileExistsError: .* the archive " + told, found.archive_error)
        assert (wal.first_lsn, found.archived_lsn) == (1, 0)
    assert files.contents(ARCHIVE) == kept


SET_BACK_FURTHER: Any = pytest.mark.parametrize(
    ("archived", "instead"),
    [
        # The same segment.
        ((b"one", None), (b"ONE", None, b"TWO")),
        # The same one, and another of the same place.
        ((b"one", None, b"two", None), (b"ONE", None, b"TWO", None)),
        # What is not sealed yet is nowhere else.
        ((b"one", None, b"two", None), (b"ONE", None, b"TWO", b"THREE")),
        # Segments that end elsewhere.
        ((b"one", b"two", b"three", None), (b"ONE", b"TWO", None, b"THREE", b"FOUR")),
    ],
)


@SET_BACK_FURTHER
@pytest.mark.parametrize("refused", [False, True])
async def test_a_log_that_was_set_back_is_told_from_what_was_archived_when_it_has_come_further(
    files: MemoryFiles,
    autojump: MockClock,
    archived: Iterable[bytes | None],
    instead: Iterable[bytes | None],
    refused: bool,
) -> None:
    """Whether it was refused before, or had no archive meanwhile."""
    archive = archive_in(files)
    await live_and_set_back(files, archive, *archived)
    kept = files.contents(ARCHIVE)
    async with open_log(files, archive if refused else None, segment_size=1 << 16) as wal:
        await fill(wal, *instead)
    for more in (b"more", b"and more"):
        async with open_log(files, archive, segment_size=1 << 16, retention=KeepSegments(1)) as wal:
            await fill(wal, more, None)
            await trio.sleep(5)
            found = wal.statistics()
            assert found.archive_error is not None
            told = r"has another segment, up to LSN \d, than this log: its files were set back"
            assert re.match(f"FileExistsError: .* the archive {told}", found.archive_error)
            assert (wal.first_lsn, found.archived_lsn) == (1, 0)
    assert files.contents(ARCHIVE) == kept


def open_database(path: Path, archive: Any) -> Any:
    return trio_wal.open_database(path / "db", archive=archive)


async def set_back_database(path: Path, archive: Any, *, backup: bool) -> None:
    """To where it had one key; it had had two."""
    async with open_database(path, archive) as db:
        await db.put(b"a", b"1")
    shutil.copytree(path / "db", path / "older")
    async with open_database(path, archive) as db:
        await db.put(b"b", b"1")
        if backup:
            await db.backup(path / "backup")
        else:
            await db.wal.rotate()
    shutil.rmtree(path / "db")
    (path / "older").rename(path / "db")


@pytest.mark.parametrize("backup", [False, True])
async def test_a_database_that_was_set_back_puts_nothing_beside_what_it_had_archived(
    tmp_path: Path, backup: bool
) -> None:
    """Be it a segment or a backup that is there, and that comes."""
    archive = DirectoryArchive(tmp_path / "archive")
    await set_back_database(tmp_path, archive, backup=backup)
    kept = sorted(archive.list())
    async with open_database(tmp_path, archive) as db:
        await db.put(b"c", b"1")
        with pytest.raises(FileExistsError, match="the archive is ahead, of LSN 2; this log ended"):
            await db.backup(tmp_path / "another")
        assert not (tmp_path / "another").exists()
    assert sorted(archive.list()) == kept


async def test_a_backup_that_was_put_before_the_archive_was_asked_is_the_logs_own(
    tmp_path: Path,
) -> None:
    archive = Wayward(DirectoryArchive(tmp_path / "archive"))
    failed = 0

    def fail(method: str, _: str) -> None:
        nonlocal failed
        if method == "list" and not failed:
            failed += 1
            raise OSError(errno.EIO, "no answer")

    async with open_database(tmp_path, archive) as db:
        await db.put(b"a", b"1")
    archive.before = fail
    async with open_database(tmp_path, archive) as db:
        await db.put(b"b", b"1")
        with trio.fail_after(60):
            while not failed:  # noqa: ASYNC110  (a thread does it)
                await trio.sleep(0.001)
        await db.backup(tmp_path / "backup")
        with trio.fail_after(60):
            while db.statistics().wal.archive_error is not None:  # noqa: ASYNC110
                await trio.sleep(0.001)


async def test_a_log_that_was_set_back_and_cut_before_the_archive_answers_is_told_from_it(
    files: MemoryFiles, autojump: MockClock
) -> None:
    archive = Wayward(archive_in(files))
    await live_and_set_back(files, archive, b"one", None)
    kept = files.contents(ARCHIVE)

    def fail(method: str, _: str) -> None:
        if method == "list":
            raise OSError(errno.EIO, "no answer")

    archive.before = fail
    async with open_log(files, archive, segment_size=1 << 16) as wal:
        await fill(wal, b"ONE", b"TWO")
        await wal.truncate_after(2)
        await wal.rotate()
        archive.before = lambda *_: None
        await trio.sleep(100)
        assert "is ahead, of LSN 2; this log ended at 1: " in str(wal.statistics().archive_error)
    assert files.contents(ARCHIVE) == kept


async def test_what_is_said_of_a_segment_is_asked_of_the_next_older_one_where_it_is_damaged(
    files: MemoryFiles, autojump: MockClock
) -> None:
    archive = archive_in(files)
    async with open_log(files, archive) as wal:
        await fill(wal, b"one", None, b"two", None)
    newest = max(name for name in files.names(ARCHIVE) if name.endswith(".json") and name[0] == "0")
    files.write_file(ARCHIVE, newest, b"damaged")
    async with open_log(files, archive) as wal:
        await fill(wal, b"three", None)
        await trio.sleep(5)
        assert wal.statistics().archive_error is None
        assert wal.statistics().archived_lsn == 3


async def test_a_log_from_whose_last_segment_a_repair_has_taken_something_goes_on(
    files: MemoryFiles, autojump: MockClock
) -> None:
    """The CLOSE frame between its last record and its footer, to which nothing is chained then."""
    archive = archive_in(files)
    async with open_log(files, archive) as wal:
        await wal.append(b"one")
    async with open_log(files, archive) as wal:
        await fill(wal, None, b"two", None)
    names = sorted(name for name in files.names(LOG) if name.startswith("wal-"))
    files.write_file(LOG, names[1], bytes(4096))
    report = await trio_wal.repair(LOG, accept_loss=True, files=files)
    assert (report.done, report.last_lsn) == (True, 1)
    for number in range(2):
        async with open_log(files, archive) as wal:
            await fill(wal, b"%d" % number, None)
            await trio.sleep(5)
            assert wal.statistics().archive_error is None
            assert wal.statistics().archived_lsn == wal.last_lsn
            records = await records_of(wal)
    assert [record.data for record in records] == [b"one", b"0", b"1"]
    await restored(files, records)


async def test_a_log_that_was_set_back_to_what_is_archived_goes_on(
    files: MemoryFiles, autojump: MockClock
) -> None:
    archive = archive_in(files)
    async with open_log(files, archive) as wal:
        await write_batches(wal, 3)
        await wait_archived(wal)
        archived = wal.last_lsn
    before = files.contents(LOG)
    async with open_log(files, None) as wal:
        await wal.append(b"never archived")
    set_back(files, before)
    async with open_log(files, archive) as wal:
        assert await wal.append(b"instead") == archived + 1
        await wait_archived(wal)
    await trio_wal.restore(archive, RESTORED, files=files)
    async with trio_wal.open_wal(RESTORED, files=files) as wal:
        assert [record.data for record in await records_of(wal)][archived:] == [b"instead"]


async def test_a_damaged_segment_is_not_archived_and_not_dropped(
    files: MemoryFiles, autojump: MockClock
) -> None:
    async with trio_wal.open_wal(LOG, files=files, segment_size=4096) as wal:
        await write_batches_now(wal, 40)
    name = files.names(LOG)[3]
    files.flip_bit(LOG, name, 8 * 5000)
    archive = archive_in(files)
    async with open_log(files, archive, retention=KeepSegments(1), verify_bytes=0) as wal:
        await trio.sleep(5)
        found = wal.statistics()
        assert found.archive_error is not None
        assert found.archive_error.startswith(f"CorruptLogError: {LOG}/{name}: at offset 4608")
        assert name == f"wal-{wal.first_lsn:020d}.log"
        assert found.archived_lsn == wal.first_lsn - 1


# -- opening and closing ----------------------------------------------------------------


async def test_the_archive_of_another_log_is_refused_before_anything_is_written(
    files: MemoryFiles,
) -> None:
    archive = archive_in(files)
    async with open_log(files, archive) as wal:
        await wal.append(b"x")
        uuid = wal.uuid
    with pytest.raises(
        trio_wal.WrongDirectoryError, match=rf"this is the archive of the log {uuid}: use"
    ):
        async with trio_wal.open_wal("/other", files=files, archive=archive):
            pytest.fail("opened")
    assert not files.exists("/other")
    async with trio_wal.open_wal("/other", files=files) as wal:
        await wal.append(b"y")
    before = files.contents("/other")
    with pytest.raises(trio_wal.WrongDirectoryError, match=r"this is the archive of the log"):
        async with trio_wal.open_wal("/other", files=files, archive=archive):
            pytest.fail("opened")
    assert files.contents("/other") == before
    async with open_log(files, archive):
        pass


async def test_a_directory_with_other_things_is_no_archive(files: MemoryFiles) -> None:
    files.write_file("/photos", "holiday.jpg", b"x")
    with pytest.raises(trio_wal.WrongDirectoryError, match=r"no archive: it holds 'holiday.jpg'"):
        async with open_log(files, DirectoryArchive("/photos", files=files)):
            pytest.fail("opened")
    assert not files.exists(LOG)


@pytest.mark.parametrize(
    ("content", "error"),
    [(b'{"format": 2, "log": "%s"}', "format of the archive 2"), (b"{", None), (b"[]", None)],
)
async def test_an_identity_that_cannot_be_read(
    files: MemoryFiles, autojump: MockClock, content: bytes, error: str | None
) -> None:
    content = content.replace(b"%s", b"cd072cd8-be6f-9f62-ac4c-09c28206e7e3")
    files.write_file(ARCHIVE, "archive.json", content)
    archive = archive_in(files)
    if error is not None:
        with pytest.raises(trio_wal.UnsupportedFormatError, match=error):
            async with open_log(files, archive):
                pytest.fail("opened")
        return
    # Damage there must not keep a log from being used.
    async with open_log(files, archive) as wal:
        await wal.append(b"x")
        await wal.rotate()
        await trio.sleep(1)
        assert "it does not say whose archive" in (wal.statistics().archive_error or "")
    assert files.contents(ARCHIVE) == {"archive.json": content}


async def test_an_archive_that_is_gone_keeps_no_log_from_opening_and_closing(
    files: MemoryFiles, autojump: MockClock
) -> None:
    archive = Wayward(archive_in(files))

    def before(method: str, name: str) -> None:
        raise OSError(errno.EHOSTDOWN, "nobody is there")

    archive.before = before
    started = trio.current_time()
    async with open_log(files, archive) as wal:
        await write_batches_now(wal, 30)
        await settle()
        assert wal.statistics().archive_failures == 1
    assert trio.current_time() == started
    archive.before = lambda *_: None
    async with open_log(files, archive) as wal:
        await settle()
        assert wal.statistics().archived_lsn == manifests(archive)[-1]["last_lsn"] > 1


async def test_a_close_goes_on_with_what_is_sealed(files: MemoryFiles) -> None:
    archive = archive_in(files)
    async with open_log(files, archive) as wal:
        await wal.append(b"x")
        await wal.rotate()
    assert len(manifests(archive)) == 1


async def test_an_archive_that_never_answers_is_left_alone(tmp_path: Path) -> None:
    """Real threads: what hangs is not waited for longer than is said."""
    answer = trio.Event()
    token = trio.lowlevel.current_trio_token()
    hung: list[str] = []

    class Hung:
        def put(self, name: str, content: Iterable[bytes]) -> None:
            hung.append("put")
            trio.from_thread.run(answer.wait, trio_token=token)

        def list(self) -> list[str]:
            return []

        def get(self, name: str) -> Iterator[bytes]:
            raise FileNotFoundError

    async with trio_wal.open_wal(tmp_path / "log", archive=Hung()) as wal:
        engine = wal._log.engine
        await wal.append(b"x")
        with trio.fail_after(60):
            while not hung:  # noqa: ASYNC110
                await trio.sleep(0.01)
        # Not as long as a close would wait.
        engine._archiver._error = "as if the last try had failed"
    answer.set()
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        assert wal.last_lsn == 1
    assert CLOSE_SECONDS < 10


def test_an_archive_is_checked_before_anything_is_done(tmp_path: Path) -> None:
    for opens in (trio_wal.open_wal, trio_wal.open_database):
        with pytest.raises(TypeError, match=r"^archive must be an Archive, with put, list and get"):
            opens(tmp_path / "log", archive=str(tmp_path))  # type: ignore[operator]
    archive = DirectoryArchive(tmp_path / "archive")
    with pytest.raises(TypeError, match=r"^archive: not an option of a replicated log"):
        trio_wal.open_wal("nats://host/log", archive=archive)
    with pytest.raises(TypeError, match=r"^archive: not an option of a replicated log"):
        trio_wal.open_database(tmp_path, log="nats://host/log", archive=archive)
    assert list(tmp_path.iterdir()) == []


# -- crashes -----------------------------------------------------------------------------


async def _workload(files: MemoryFiles, told: list[int], cut: bool) -> None:
    """Segments come and go; ``told`` is what is durable at each moment."""
    archive = archive_in(files)
    for life in range(2):
        async with open_log(files, archive, segment_size=1, retention=KeepSegments(1)) as wal:
            for number in range(4):
                told.append(await wal.append(b"%d.%d" % (life, number) + bytes(100)))
                await settle()
            if cut and not life:
                # From here on less is promised, until it has returned.
                told.append(2)
                await wal.truncate_after(2)
                await settle()


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", ["power", "kill"])
def test_whatever_was_acknowledged_is_in_the_archive_or_in_the_log_after_any_crash(
    kind: Any, cut: bool
) -> None:
    files = MemoryFiles()
    told = [0]
    images: list[tuple[MemoryFiles, int]] = []

    def crash(*_: object) -> None:
        images.append((files.crash_image(len(images), kind), told[-1]))

    files.after_operation = crash
    trio.run(_workload, files, told, cut, clock=MockClock(autojump_threshold=0))
    assert len(images) > 100
    while images:
        # Hundreds of them take a gigabyte.
        image, lsn = images.pop()
        trio.run(_restore_all, image, lsn, clock=MockClock(autojump_threshold=0))


async def _restore_all(files: MemoryFiles, lsn: int) -> None:
    if not files.exists(f"{LOG}") or "log.meta" not in files.names(LOG):
        assert lsn == 0
        return
    # Recovery first, and without the archive: it must have nothing to drop that is not there.
    async with trio_wal.open_wal(LOG, files=files) as wal:
        rest = {record.lsn: record.data for record in await records_of(wal)}
        last = wal.last_lsn
    assert last >= lsn
    if not files.exists(ARCHIVE):
        assert sorted(rest) == list(range(1, last + 1))
        return
    report = await trio_wal.restore(archive_in(files), RESTORED, tail=LOG, files=files)
    assert (report.first_lsn, report.last_lsn) == (1, last)
    async with trio_wal.open_wal(RESTORED, files=files) as wal:
        found = {record.lsn: record.data for record in await records_of(wal)}
    assert sorted(found) == list(range(1, last + 1))
    assert found | rest == found


async def test_each_failing_call_of_archiving_is_tried_again(autojump: MockClock) -> None:
    for operation in ("open", "pread", "pwrite", "sync", "rename", "sync_dir"):
        for after in range(0, 24, 2):
            log, there = MemoryFiles(), MemoryFiles()
            archive = DirectoryArchive(ARCHIVE, files=there)
            async with trio_wal.open_wal(LOG, files=log, archive=archive, segment_size=1) as wal:
                there.fail(operation, after=after)
                for number in range(5):
                    await wal.append(b"%d" % number + bytes(100))
                await wal.rotate()
                await trio.sleep(10)
                assert wal.statistics().archived_lsn == 5
            there.heal()
            report = await trio_wal.restore(archive, RESTORED, files=there)
            assert report.last_lsn == 5


async def test_files_of_the_log_that_cannot_be_read_are_tried_again(
    files: MemoryFiles, autojump: MockClock
) -> None:
    archive = archive_in(MemoryFiles())
    async with open_log(files, archive, segment_size=1) as wal:
        for _ in range(6):
            files.fail("pread", times=2)
            await wal.append(bytes(100))
            await settle()
            files.heal()
        await wal.rotate()
        await trio.sleep(5)
        assert wal.statistics().archived_lsn == 6
        assert (wal.statistics().archive_failures or 0) > 0


# -- several at once --------------------------------------------------------------------


def objects_of(*contents: bytes) -> list[tuple[str, list[bytes]]]:
    return [
        (f"{number:020d}-0.wal", [content[:300], content[300:]])
        for number, content in enumerate(contents, 1)
    ]


def test_what_is_put_together_is_put_as_if_one_by_one(tmp_path: Path) -> None:
    archive = DirectoryArchive(tmp_path)
    archive.put("two", [b"2"])
    archive.put_group([("one", [b"1"]), ("two", [b"2"]), ("one", [b"", b"1"]), ("three", [])])
    assert sorted(archive.list()) == ["one", "three", "two"]
    with pytest.raises(FileExistsError) as caught:
        archive.put_group([("four", [b"4"]), ("two", [b"other"]), ("five", [b"5"])])
    assert caught.value.filename == str(tmp_path / "two")
    assert b"".join(archive.get("two")) == b"2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "two"]
    archive.put_group([])


@pytest.mark.parametrize("kind", ["power", "kill"])
def test_what_is_put_together_survives_a_crash_at_any_operation(kind: Any) -> None:
    contents = b"a" * 700, b"b" * 900, b"c", b"d" * 512
    whole = {name: b"".join(pieces) for name, pieces in objects_of(*contents)}
    files = MemoryFiles()
    archive = archive_in(files)
    images: list[MemoryFiles] = []

    def crash(*_: object) -> None:
        images.extend([files.crash_image(len(images) + n, kind) for n in range(9)])

    files.after_operation = crash
    archive.put_group(objects_of(*contents))
    lengths = set()
    for image in images:
        there = archive_in(image)
        names = there.list()
        lengths.add(len(names))
        # In their order, and none but whole.
        assert sorted(names) == sorted(whole)[: len(names)]
        assert all(b"".join(there.get(name)) == whole[name] for name in names)
        there.put_group(objects_of(*contents))
        for seed in range(3):
            assert sorted(archive_in(image.crash_image(seed)).list()) == sorted(whole)
    # A crash between two renames was among them.
    assert lengths & {1, 2, 3}
    for seed in range(9):
        assert sorted(archive_in(files.crash_image(seed)).list()) == sorted(whole)


def test_each_failing_call_of_a_group_leaves_no_temporary_file() -> None:
    for operation in ("open", "pwrite", "sync", "rename", "sync_dir"):
        for after in range(6):
            files = MemoryFiles()
            archive = archive_in(files)
            archive.put("other", [b"x"])
            files.fail(operation, errno.ENOSPC, after=after)
            with contextlib.suppress(OSError):
                archive.put_group(objects_of(b"a", b"b", b"c"))
            assert files.names(ARCHIVE) == archive.list()
            files.heal()
            archive.put_group(objects_of(b"a", b"b", b"c"))
            assert len(archive.list()) == 4


async def sealed_log(files: MemoryFiles, count: int) -> None:
    """So many segments are sealed, and not archived."""
    async with trio_wal.open_wal(LOG, files=files, segment_size=4096) as wal:
        for number in range(count):
            await wal.append(b"%d" % number + bytes(100))
            await wal.rotate()


class Groups:
    """An archive that notes what it is given together."""

    def __init__(self, archive: DirectoryArchive) -> None:
        self._archive = archive
        self.put, self.list, self.get = archive.put, archive.list, archive.get
        self.groups: list[list[str]] = []
        self.fails = 0
        """So many groups of more than one fail."""

    def put_group(self, objects: Iterable[tuple[str, Iterable[bytes]]]) -> None:
        objects = list(objects)
        self.groups.append([name for name, _ in objects])
        if self.fails and len(objects) > 1:
            self.fails -= 1
            raise OSError(errno.ENOSPC, "not so many")
        self._archive.put_group(objects)

    def sizes(self, suffix: str = ".wal") -> list[int]:
        return [len(group) for group in self.groups if group[0].endswith(suffix)]


async def test_segments_that_wait_are_put_together_and_the_first_of_all_alone(
    files: MemoryFiles,
) -> None:
    await sealed_log(files, 40)
    archive = Groups(archive_in(files))
    async with open_log(files, archive, segment_size=1) as wal:
        await settle()
        assert wal.statistics().archived_lsn == 40
    assert archive.sizes() == archive.sizes(".json") == [1, 16, 16, 7]
    # Manifests come when their segments are there.
    assert [group[0][-4:] for group in archive.groups] == [".wal", "json"] * 4


async def test_a_group_costs_few_syncs(files: MemoryFiles) -> None:
    await sealed_log(files, 16)
    there = MemoryFiles()
    archive = DirectoryArchive(ARCHIVE, files=there)
    async with open_log(files, archive, segment_size=1):
        await settle()
    counted = {name: there.operations[name] for name in ("sync", "sync_dir")}
    # Whose it is, the first one, all others: two objects for each, and their names once.
    assert counted == {"sync": 1 + 2 * 16, "sync_dir": 1 + 2 + 2}


async def test_a_group_is_bounded_by_its_bytes(
    files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    await sealed_log(files, 9)
    size = files.contents(LOG)[files.names(LOG)[3]]
    monkeypatch.setattr(_archiver, "GROUP_BYTES_MAX", 2 * len(size) + 1)
    archive = Groups(archive_in(files))
    async with open_log(files, archive, segment_size=1):
        await settle()
    assert archive.sizes() == [1, 2, 2, 2, 2]
    monkeypatch.setattr(_archiver, "GROUP_BYTES_MAX", 1)
    files = MemoryFiles()
    await sealed_log(files, 3)
    archive = Groups(archive_in(files))
    async with open_log(files, archive, segment_size=1):
        await settle()
    assert archive.sizes() == [1, 1, 1]


async def test_after_a_group_has_failed_one_is_put_by_itself(
    files: MemoryFiles, autojump: MockClock
) -> None:
    await sealed_log(files, 10)
    archive = Groups(archive_in(files))
    archive.fails = 2
    async with open_log(files, archive, segment_size=1) as wal:
        await trio.sleep(10)
        assert wal.statistics().archived_lsn == 10
        assert wal.statistics().archive_failures == 2
    assert archive.sizes() == [1, 9, 1, 8, 1, 7]


async def test_an_archive_that_knows_no_groups_gets_one_segment_after_the_other(
    files: MemoryFiles, autojump: MockClock
) -> None:
    """Together all of them would only come later, and after an error once more."""
    await sealed_log(files, 10)
    archive, lags = Wayward(archive_in(files)), list[int]()
    async with open_log(files, archive, segment_size=1) as wal:

        def before(method: str, name: str) -> None:
            if method == "put" and name.endswith(".json") and name != "archive.json":
                lags.append(wal.statistics().archive_lag_segments)
                if len(lags) == 6:
                    raise OSError(errno.EIO, "not this one")

        archive.before = before
        await trio.sleep(5)
        assert wal.statistics().archived_lsn == 10
        assert wal.statistics().archive_failures == 1
    # The one that has failed is all that is put twice.
    assert lags == [10, 9, 8, 7, 6, 5, 5, 4, 3, 2, 1]
    names = sorted(archive.puts)
    assert len(names) == 21
    assert len(set(names)) == 20


async def test_who_puts_one_after_the_other_does_not_rest(tmp_path: Path) -> None:
    for archive, rests in (
        (DirectoryArchive(tmp_path / "a"), True),
        (Wayward(DirectoryArchive(tmp_path / "b")), False),
    ):
        async with trio_wal.open_wal(tmp_path / f"log {rests}", archive=archive) as wal:
            assert (wal._log.engine._archiver._rest_seconds > 0) is rests


async def test_those_before_a_damaged_one_are_put(files: MemoryFiles, autojump: MockClock) -> None:
    await sealed_log(files, 10)
    name = sorted(name for name in files.names(LOG) if name.startswith("wal-"))[5]
    files.flip_bit(LOG, name, 8 * 4700)
    archive = Groups(archive_in(files))
    async with open_log(files, archive, segment_size=1, verify_bytes=0) as wal:
        await trio.sleep(5)
        found = wal.statistics()
        assert found.archived_lsn == 5
        assert "CorruptLogError" in (found.archive_error or "")
        assert name in (found.archive_error or "")
    assert [m["last_lsn"] for m in manifests(archive)] == [1, 2, 3, 4, 5]


async def test_a_fast_log_gathers_segments_and_a_close_does_not_wait_for_more(
    files: MemoryFiles, autojump: MockClock
) -> None:
    archive = Groups(archive_in(files))
    async with open_log(files, archive, segment_size=1) as wal:
        # Files in memory cost no syncs; those of a disk do.
        wal._log.engine._archiver._rest_seconds = _archiver.REST_SECONDS
        lags = []
        for number in range(100):
            await wal.append(b"%d" % number + bytes(100))
            await wal.rotate()
            await trio.sleep(0.03125)
            lags.append(wal.statistics().archive_lag_segments)
        # As many as are sealed in that time, and not one more.
        assert max(lags) == 8
        assert set(archive.sizes()[2:]) == {8}
        started = trio.current_time()
        await wal.append(bytes(100))
        last = await wal.rotate()
    assert trio.current_time() == started
    assert manifests(archive)[-1]["last_lsn"] == last


async def test_a_thread_that_archives_gives_way_but_not_when_it_is_behind(
    files: MemoryFiles,
) -> None:
    ways: list[int] = []

    class Slice:
        def give_way(self) -> None:
            ways.append(1)

    async with open_log(files, archive_in(files), segment_size=1 << 20) as wal:
        archiver = wal._log.engine._archiver
        archiver._slice = Slice()
        for number in range(50):
            await wal.append(b"%d" % number)
        await wal.rotate()
        await settle()
        # After each frame.
        assert len(ways) >= 50
        archiver._behind = True
        count = len(ways)
        archiver._tick()
        assert len(ways) == count


@pytest.mark.parametrize("kind", ["power", "kill"])
def test_what_a_group_has_let_go_is_in_the_archive_after_any_crash(kind: Any) -> None:
    async def archive_all() -> None:
        await sealed_log(files, 7)
        files.after_operation = crash
        archive = archive_in(files)
        async with open_log(files, archive, segment_size=1, retention=KeepSegments(1)) as wal:
            await settle()
            told.append(await wal.append(bytes(100)))
            await wal.rotate()
            await settle()

    def crash(*_: object) -> None:
        images.append((files.crash_image(len(images), kind), told[-1]))

    files = MemoryFiles()
    told = [7]
    images: list[tuple[MemoryFiles, int]] = []
    trio.run(archive_all, clock=MockClock(autojump_threshold=0))
    assert len(images) > 100
    while images:
        trio.run(_restore_all, *images.pop(), clock=MockClock(autojump_threshold=0))


async def test_health_tells_of_an_archive_that_gets_nothing_and_not_of_one_that_gathers(
    files: MemoryFiles, autojump: MockClock
) -> None:
    archive = Groups(archive_in(files))
    async with open_log(files, archive, segment_size=1) as wal:
        archiver = wal._log.engine._archiver
        archiver._rest_seconds = _archiver.REST_SECONDS
        # It has had nothing to do for long.
        await trio.sleep(100)
        lags = []
        for number in range(400):
            await wal.append(b"%d" % number)
            await wal.rotate()
            await trio.sleep(0.03125)
            lags.append(wal.statistics().archive_lag_segments)
            assert not wal.health().reasons
        assert max(lags) > 3
        # As if a call did not return.
        archiver._rest_seconds = math.inf
        told = []
        for number in range(10):
            await wal.append(b"%d" % number)
            await wal.rotate()
            await trio.sleep(1)
            told.append([reason.code for reason in wal.health().reasons])
        assert told[:3] == [[]] * 3
        assert told[7:] == [["archive_behind"]] * 3


class _Overtaken:
    """An archive into which somebody else puts whose it is, just after it was looked for."""

    def __init__(self, archive: DirectoryArchive, log: UUID) -> None:
        self._archive = archive
        self._log = log

    def put(self, name: str, content: Iterable[bytes]) -> None:
        self._archive.put(name, content)

    def list(self) -> list[str]:
        return self._archive.list()

    def get(self, name: str) -> Iterator[bytes]:
        try:
            return iter([*self._archive.get(name)])
        except FileNotFoundError:
            put_identity(self._archive, self._log)
            raise


def test_an_archive_that_somebody_else_begins_meanwhile_is_that_logs() -> None:
    archive, log = DirectoryArchive("/archive", files=MemoryFiles()), UUID(int=1)
    assert read_identity(_Overtaken(archive, log)).log == log
    archive = DirectoryArchive("/another", files=MemoryFiles())
    put_identity(_Overtaken(archive, log), log)
    with pytest.raises(trio_wal.WrongDirectoryError, match=r"the archive of the log"):
        put_identity(archive, UUID(int=2))
