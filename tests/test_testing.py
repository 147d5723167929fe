"""The files in memory: they behave as real ones do, but for what they are asked to do wrong."""

from __future__ import annotations

import errno
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings, strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

import trio_wal
from trio_wal import LogLockedError
from trio_wal._files import Directory, File
from trio_wal._system.files import OsFiles
from trio_wal.testing import SECTOR, CrashKind, MemoryFiles

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

PATH = "/folder"
KINDS: list[CrashKind] = ["kill", "power"]


def folder(files: MemoryFiles) -> Directory:
    return files.open_directory(PATH, create=True)


def a_file(files: MemoryFiles, data: bytes = b"", *, durable: bool = True) -> File:
    directory = folder(files)
    file = directory.open("file", create=True)
    if data:
        file.pwrite([data], 0)
    if durable:
        file.sync()
        directory.sync()
    return file


def durable(files: MemoryFiles, seed: int = 0) -> bytes | None:
    """What is left of the file after the power failed."""
    return files.crash_image(seed).contents(PATH).get("file")


# -- as real files -----------------------------------------------------------------------


def play(directory: Directory, seed: int) -> list[object]:
    """Random calls and their results, the same for any kind of files."""
    rng = random.Random(seed)
    results: list[object] = []
    opened: list[File] = []
    for _ in range(60):
        name = rng.choice("abc")
        call = rng.choice(
            ("create", "open", "pwrite", "pread", "allocate", "truncate", "size", "sync")
            if rng.random() < 0.7
            else ("rename", "unlink", "names", "sync directory")
        )
        try:
            if call == "create":
                opened.append(directory.open(name, create=True))
            elif call == "open":
                opened.append(directory.open(name, writable=True))
            elif call == "rename":
                directory.rename(name, rng.choice("abc"))
            elif call == "unlink":
                directory.unlink(name)
            elif call == "names":
                results.append(directory.names())
            elif call == "sync directory":
                directory.sync()
            elif opened:
                file = rng.choice(opened)
                number = rng.randint(0, 3000)
                if call == "pwrite":
                    pieces = [rng.randbytes(rng.randint(0, 900)) for _ in range(rng.randint(0, 3))]
                    file.pwrite(pieces, number)
                elif call == "pread":
                    results.append(file.pread(rng.randint(0, 4000), number))
                elif call == "size":
                    results.append(file.size())
                elif call == "allocate":
                    file.allocate(number)
                elif call == "truncate":
                    file.truncate(number)
                else:
                    file.sync()
        except OSError as exc:
            results.append((call, exc.errno))
    results.append({name: directory.open(name).pread(9999, 0) for name in directory.names()})
    for file in opened:
        file.close()
    return results


@pytest.mark.parametrize("seed", range(40))
def test_they_answer_as_real_files_do(seed: int, tmp_path: Path) -> None:
    real = OsFiles().open_directory(str(tmp_path))
    assert play(folder(MemoryFiles()), seed) == play(real, seed)
    real.close()


def test_a_missing_directory_is_not_found() -> None:
    files = MemoryFiles()
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] .*: '/folder'$"):
        files.open_directory(PATH)
    with pytest.raises(FileNotFoundError):
        files.names(PATH)
    assert not files.exists(PATH)
    files.open_directory(PATH, create=True)
    assert files.exists(PATH)


def test_the_lock_is_one_handles() -> None:
    files = MemoryFiles()
    first, second = folder(files), folder(files)
    first.lock()
    with pytest.raises(LogLockedError) as caught:
        second.lock()
    assert (caught.value.path, caught.value.pid) == (PATH, os.getpid())
    second.close()
    with pytest.raises(LogLockedError):
        folder(files).lock()
    first.close()
    second.lock()


def test_the_clock_is_trios_and_can_jump() -> None:
    files = MemoryFiles(epoch_us=1000)

    async def main() -> tuple[int, int, int]:
        before = files.time_us()
        await trio.sleep(2.5)
        after = files.time_us()
        files.clock_offset_us -= 10_000_000
        return before, after, files.time_us()

    before, after, jumped = trio.run(main, clock=MockClock(autojump_threshold=0))
    assert after - before == 2_500_000
    assert jumped == after - 10_000_000


def test_random_bytes_come_from_the_seed() -> None:
    def some(seed: int) -> bytes:
        return MemoryFiles(seed=seed).random_bytes(16)

    assert some(1) == some(1) != some(2)
    assert len(some(1)) == 16


# -- crashes ---------------------------------------------------------------------------------


def test_a_killed_process_loses_nothing_that_it_wrote() -> None:
    files = MemoryFiles()
    file = a_file(files, b"one", durable=False)
    file.pwrite([b"two"], 5000)
    assert files.crash_image(kind="kill").contents(PATH) == files.contents(PATH)


def test_what_a_killed_process_did_not_sync_is_still_not_durable() -> None:
    files = MemoryFiles()
    file = a_file(files, b"old" * 1000)
    file.pwrite([b"new" * 1000], 0)
    killed = files.crash_image(kind="kill")
    seen = {durable(killed, seed) for seed in range(50)}
    assert b"old" * 1000 in seen
    assert b"new" * 1000 in seen


def test_what_is_synced_survives_every_power_loss() -> None:
    files = MemoryFiles()
    file = a_file(files, b"a" * 3000)
    file.pwrite([b"b" * SECTOR], 2 * SECTOR)
    for seed in range(200):
        left = durable(files, seed)
        assert left is not None
        assert len(left) == 3000
        assert left[: 2 * SECTOR] + left[3 * SECTOR :] == b"a" * (3000 - SECTOR)
    file.sync()
    assert {durable(files, seed) for seed in range(50)} == {files.read_file(PATH, "file")}


def test_a_power_loss_takes_keeps_tears_and_spoils_sectors_each_for_itself() -> None:
    files = MemoryFiles()
    file = a_file(files, b"a" * 2 * SECTOR)
    file.pwrite([b"b" * 2 * SECTOR], 0)
    old, new = b"a" * SECTOR, b"b" * SECTOR
    fates = set()
    for seed in range(400):
        left = durable(files, seed) or b""
        for sector in (left[:SECTOR], left[SECTOR:]):
            if sector in (old, new):
                fates.add("lost" if sector == old else "kept")
            elif sector.rstrip(b"a").strip(b"b") == b"":
                fates.add("torn")
            else:
                fates.add("garbage")
        fates.add(("reordered", left[:SECTOR] == old and left[SECTOR:] == new))
    assert {"lost", "kept", "torn", "garbage", ("reordered", True)} <= fates


def test_a_size_that_was_not_synced_may_be_lost() -> None:
    files = MemoryFiles()
    file = a_file(files, b"a" * 100)
    file.allocate(5000)
    assert {len(durable(files, seed) or b"") for seed in range(50)} == {100, 5000}
    file.sync()
    file.truncate(10)
    assert {len(durable(files, seed) or b"") for seed in range(50)} == {10, 5000}
    file.sync()
    assert durable(files) == b"a" * 10


def test_of_changes_to_a_directory_a_beginning_survives() -> None:
    files = MemoryFiles()
    directory = folder(files)
    for name in "abc":
        directory.open(name, create=True)
    directory.sync()
    directory.rename("a", "d")
    directory.unlink("b")
    directory.open("e", create=True)
    seen = {tuple(files.crash_image(seed).names(PATH)) for seed in range(100)}
    assert seen == {tuple(names) for names in ("abc", "bcd", "cd", "cde")}
    assert files.crash_image(kind="kill").names(PATH) == ["c", "d", "e"]
    directory.sync()
    assert {tuple(files.crash_image(seed).names(PATH)) for seed in range(20)} == {tuple("cde")}


def test_a_synced_file_whose_name_is_not_is_lost() -> None:
    files = MemoryFiles()
    directory = folder(files)
    file = directory.open("file", create=True)
    file.pwrite([b"data"], 0)
    file.sync()
    assert {durable(files, seed) for seed in range(20)} == {None, b"data"}


@given(st.integers(0, 2**32), st.sampled_from(KINDS))
def test_a_crash_is_decided_by_its_seed(seed: int, kind: CrashKind) -> None:
    def crashed() -> dict[str, bytes]:
        files = MemoryFiles()
        file = a_file(files, b"old" * 2000)
        file.pwrite([b"new" * 2000], 100)
        folder(files).open("another", create=True)
        return files.crash_image(seed, kind).contents(PATH)

    assert crashed() == crashed()


def test_an_image_and_its_original_live_on_apart() -> None:
    files = MemoryFiles()
    file = a_file(files, b"one")
    image = files.crash_image(kind="kill")
    file.pwrite([b"two"], 0)
    image.open_directory(PATH).open("file", writable=True).pwrite([b"three"], 0)
    image.open_directory(PATH).unlink("file")
    assert files.contents(PATH) == {"file": b"two"}
    assert image.contents(PATH) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_written_to_apart_from_its_original_and_from_other_images(
    kind: CrashKind,
) -> None:
    files = MemoryFiles()
    a_file(files, b"as it was")
    images = [files.crash_image(seed, kind) for seed in range(3)]
    folder(images[0]).open("file", writable=True).pwrite([b"AS"], 0)
    folder(images[1]).open("file", writable=True).truncate(2)
    images[2].flip_bit(PATH, "file", 0)
    assert [image.read_file(PATH, "file") for image in images] == [
        b"AS it was", b"as", b"`s it was",
    ]  # fmt: skip
    assert files.read_file(PATH, "file") == b"as it was"
    folder(files).open("file", writable=True).pwrite([b"!"], 8)
    assert [image.read_file(PATH, "file") for image in images] == [
        b"AS it was", b"as", b"`s it was",
    ]  # fmt: skip
    assert durable(files) in (b"as it was", b"as it wa!")
    # What is durable of an image is its own too: of the first nothing is synced.
    assert durable(images[0], 0) != durable(images[2], 0)


def test_of_a_file_written_over_only_what_was_synced_is_on_the_disk() -> None:
    files = MemoryFiles()
    file = a_file(files, b"a" * 2 * SECTOR)
    files.crash_image()
    file.pwrite([b"b" * SECTOR], 0)
    file.sync()
    file.pwrite([b"c" * SECTOR], SECTOR)
    left = {durable(files, seed) for seed in range(200)}
    assert {data[:SECTOR] for data in left if data} == {b"b" * SECTOR}
    assert b"b" * SECTOR + b"a" * SECTOR in left
    assert b"b" * SECTOR + b"c" * SECTOR in left


def test_crashes_of_crashes_never_draw_the_same_salt() -> None:
    files = MemoryFiles()
    drawn = [files.random_bytes(16)]
    for _ in range(20):
        files = files.crash_image()
        drawn.append(files.random_bytes(16))
    assert len(set(drawn)) == len(drawn)


def test_files_are_dead_after_a_crash() -> None:
    files = MemoryFiles()
    file = a_file(files, b"data")
    directory = folder(files)
    after = files.crash(kind="kill")
    for call in (
        lambda: file.pread(1, 0),
        lambda: file.pwrite([b"x"], 0),
        file.sync,
        lambda: file.truncate(0),
        directory.sync,
        lambda: directory.open("file"),
        lambda: directory.rename("file", "other"),
        lambda: files.open_directory(PATH),
    ):
        with pytest.raises(OSError, match=r"^\[Errno 5\] this file system has crashed: "):
            call()
    assert after.read_file(PATH, "file") == b"data"
    after.open_directory(PATH).open("file").pread(1, 0)


async def test_a_log_whose_files_crash_is_broken_and_its_successor_recovers() -> None:
    files = MemoryFiles()
    async with trio_wal.open_wal("/log", files=files) as wal:
        await wal.append(b"kept")
        after = files.crash(seed=1)
        with pytest.raises(trio_wal.LogFailedError, match=r"^/log: a write or sync failed"):
            await wal.append(b"lost")
    async with trio_wal.open_wal("/log", files=after) as wal:
        assert wal.last_lsn == 1


# -- faults ------------------------------------------------------------------------------------


def test_calls_fail_after_so_many_and_so_often() -> None:
    files = MemoryFiles()
    file = a_file(files)
    files.fail("pwrite", errno.EDQUOT, after=2, times=2)
    for fails in (False, False, True, True, False, False):
        if fails:
            with pytest.raises(OSError, match=rf"^\[Errno {errno.EDQUOT}\] .*: '/folder/file'$"):
                file.pwrite([b"x"], 0)
        else:
            file.pwrite([b"x"], 0)


def test_calls_fail_for_ever_until_they_are_healed() -> None:
    files = MemoryFiles()
    directory = folder(files)
    files.fail("sync_dir", times=math.inf)
    for _ in range(5):
        with pytest.raises(OSError, match=r"^\[Errno 5\]"):
            directory.sync()
    files.heal()
    directory.sync()


def test_two_faults_come_one_after_the_other() -> None:
    files = MemoryFiles()
    file = a_file(files)
    files.fail("sync", errno.EIO)
    files.fail("sync", errno.ENOSPC)
    found = []
    for _ in range(2):
        with pytest.raises(OSError, match=r"^\[Errno") as caught:
            file.sync()
        found.append(caught.value.errno)
    file.sync()
    assert found == [errno.EIO, errno.ENOSPC]


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("open", lambda directory, file: directory.open("file")),
        ("pread", lambda directory, file: file.pread(1, 0)),
        ("pwrite", lambda directory, file: file.pwrite([b"x"], 0)),
        ("sync", lambda directory, file: file.sync()),
        ("allocate", lambda directory, file: file.allocate(100)),
        ("truncate", lambda directory, file: file.truncate(0)),
        ("rename", lambda directory, file: directory.rename("file", "other")),
        ("unlink", lambda directory, file: directory.unlink("file")),
        ("sync_dir", lambda directory, file: directory.sync()),
        ("lock", lambda directory, file: directory.lock()),
    ],
)
def test_every_operation_can_fail_and_changes_nothing_then(operation: Any, call: Any) -> None:
    files = MemoryFiles()
    file = a_file(files, b"data")
    directory = folder(files)
    before, count = files.contents(PATH), files.operations.get(operation, 0)
    files.fail(operation, errno.EROFS)
    with pytest.raises(OSError, match=rf"^\[Errno {errno.EROFS}\]"):
        call(directory, file)
    assert files.contents(PATH) == before
    call(directory, file)
    assert files.operations[operation] == count + 2


def test_a_short_write_leaves_what_was_written() -> None:
    files = MemoryFiles()
    file = a_file(files, b"a" * 10)
    files.fail("pwrite", written=3)
    with pytest.raises(OSError, match=r"^\[Errno 5\]"):
        file.pwrite([b"bb", b"bb", b"bb"], 2)
    assert files.read_file(PATH, "file") == b"aabbbaaaaa"


def test_after_a_failed_sync_the_pages_count_as_clean_and_are_not_on_the_disk() -> None:
    files = MemoryFiles()
    file = a_file(files, b"old")
    file.pwrite([b"new"], 0)
    files.fail("sync")
    with pytest.raises(OSError, match=r"^\[Errno 5\]"):
        file.sync()
    file.sync()
    assert file.pread(3, 0) == b"new"
    assert {durable(files, seed) for seed in range(20)} == {b"old"}
    file.pwrite([b"new"], 0)
    file.sync()
    assert durable(files) == b"new"


def test_space_is_taken_by_growing_and_given_back() -> None:
    files = MemoryFiles()
    file = a_file(files)
    files.free_bytes = 1000
    file.allocate(600)
    file.pwrite([bytes(500)], 200)
    assert files.free_bytes == 300
    for call in (lambda: file.allocate(1001), lambda: file.pwrite([bytes(301)], 700)):
        with pytest.raises(OSError, match=rf"^\[Errno {errno.ENOSPC}\]"):
            call()
    assert (files.free_bytes, file.size()) == (300, 700)
    file.pwrite([bytes(700)], 0)
    file.truncate(100)
    assert files.free_bytes == 900
    folder(files).unlink("file")
    assert files.free_bytes == 1000


def test_every_change_is_announced_with_its_path() -> None:
    files = MemoryFiles()
    seen: list[tuple[str, str]] = []
    files.after_operation = lambda operation, path: seen.append((operation, path))
    file = a_file(files, b"x")
    file.allocate(10)
    file.truncate(5)
    directory = folder(files)
    directory.rename("file", "other")
    directory.unlink("other")
    assert seen == [
        ("open", "/folder/file"),
        ("pwrite", "/folder/file"),
        ("sync", "/folder/file"),
        ("sync_dir", "/folder"),
        ("allocate", "/folder/file"),
        ("truncate", "/folder/file"),
        ("rename", "/folder/other"),
        ("unlink", "/folder/other"),
    ]
    seen.clear()
    assert file.pread(1, 0) == b"x"
    assert seen == []


# -- stalls ---------------------------------------------------------------------------------------


async def test_a_held_disk_lets_nothing_be_acknowledged_and_the_loop_lives() -> None:
    files = MemoryFiles()
    async with trio_wal.open_wal("/log", files=files) as wal, trio.open_nursery() as nursery:
        files.hold()
        nursery.start_soon(wal.append, b"a")
        await wait_all_tasks_blocked()
        assert wal.last_lsn == 0
        assert wal.statistics().tasks_waiting_durable == 1
        files.hold()
        files.release()
        await wait_all_tasks_blocked()
        assert wal.durable_lsn == 1
        files.release()
        assert await wal.append(b"b") == 2


# -- damage ----------------------------------------------------------------------------------------


def test_rot_is_on_the_disk_and_in_the_cache() -> None:
    files = MemoryFiles()
    a_file(files, b"\0\0\0")
    files.flip_bit(PATH, "file", 8 + 2)
    assert files.read_file(PATH, "file") == b"\0\4\0"
    assert durable(files) == b"\0\4\0"
    files.flip_bit(PATH, "file", 8 + 2)
    assert durable(files) == b"\0\0\0"


def test_files_are_put_and_taken_by_hand() -> None:
    files = MemoryFiles()
    files.write_file(PATH, "file", b"data")
    assert files.contents(PATH) == {"file": b"data"}
    assert durable(files) == b"data"
    files.write_file(PATH, "file", b"other")
    assert durable(files) == b"other"
    files.remove_file(PATH, "file")
    assert files.names(PATH) == files.crash_image().names(PATH) == []
