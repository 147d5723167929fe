"""An open that fails leaves nothing behind: no lock, no descriptor, no thread, no file."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import trio
from databases import DB
from helpers import LOG

import trio_wal
from trio_wal import CorruptLogError, LogFailedError, LogFullError
from trio_wal._checkpoint import Checkpointer
from trio_wal._disk.opening import open_log_directory
from trio_wal._store import LmdbStore
from trio_wal._system.files import OsDirectory, OsFile, OsFiles
from trio_wal._worker import ThreadWorker
from trio_wal.testing import MemoryFiles

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses an eventfd and /proc")
Opener = Callable[..., AbstractAsyncContextManager[Any]]
OPENERS: list[Opener] = [trio_wal.open_wal, trio_wal.open_database]


def descriptors() -> list[str]:
    """What this process has open, without what trio and the interpreter have of their own."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # the listing's own
    return sorted(found)


def tree(path: Path) -> dict[str, bytes | None]:
    return {
        str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else None
        for entry in sorted(path.rglob("*"))
    }


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    before = descriptors()
    yield
    left = [name for name in descriptors() if name not in before]
    assert [name for name in left if not name.startswith(("anon_inode", "socket", "pipe"))] == []


async def fails(open_it: Opener, path: Any, error: type[BaseException], **options: Any) -> Any:
    """The open fails, with no group around its error, and neither lock nor descriptor stays."""
    await trio.to_thread.run_sync(int)  # trio's own descriptors are there from now on
    real = sys.platform == "linux" and "files" not in options
    before = descriptors() if real else []
    with pytest.raises(error) as caught:
        async with open_it(path, **options):
            raise AssertionError("it was opened")
    if real:
        assert descriptors() == before
    return caught.value


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def no_thread(*_: Any, **__: Any) -> Any:
    raise RuntimeError("can't start new thread")


async def no_worker(self: ThreadWorker) -> None:
    """As `ThreadWorker.run`, where no thread can be started."""
    original = threading.Thread.start
    thread_cache = trio._core._thread_cache.THREAD_CACHE  # type: ignore[attr-defined]
    idle = dict(thread_cache._idle_workers)
    thread_cache._idle_workers.clear()
    threading.Thread.start = no_thread  # type: ignore[method-assign]
    try:
        await ThreadWorker_run(self)
    finally:
        threading.Thread.start = original  # type: ignore[method-assign]
        thread_cache._idle_workers.update(idle)


ThreadWorker_run = ThreadWorker.run


def no_descriptor(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(os, "eventfd", refuse)
    return errno.EMFILE


def no_thread_for_the_worker(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(ThreadWorker, "run", no_worker)
    return errno.EAGAIN


def no_mark_on_disk(monkeypatch: pytest.MonkeyPatch) -> int:
    """The last write of a creation."""
    calls = 0

    def rename(self: OsDirectory, old: str, new: str) -> None:
        nonlocal calls
        calls += new == "log.meta"
        if calls == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), new)
        original(self, old, new)

    original = OsDirectory.rename
    monkeypatch.setattr(OsDirectory, "rename", rename)
    return errno.EIO


def no_sync(monkeypatch: pytest.MonkeyPatch) -> int:
    calls = 0

    def sync(self: OsFile, *, in_place: bool = False) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), self.path)
        original(self, in_place=in_place)

    original = OsFile.sync
    monkeypatch.setattr(OsFile, "sync", sync)
    return errno.EIO


FAULTS = [no_descriptor, no_thread_for_the_worker, no_mark_on_disk, no_sync]


@linux
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("open_it", OPENERS)
@pytest.mark.parametrize("place", ["new", "parents", "empty"])
async def test_an_open_that_fails_removes_what_it_has_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_it: Opener,
    fault: Callable[[pytest.MonkeyPatch], int],
    place: str,
) -> None:
    path = tmp_path / ("some/parents/log" if place == "parents" else "log")
    if place == "empty":
        path.mkdir(0o700)
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        number = fault(patch)
        error = await fails(open_it, path, OSError)
    assert error.errno == number
    assert tree(tmp_path) == before
    async with open_it(path):
        pass


@linux
@pytest.mark.parametrize("fault", [no_descriptor, no_thread_for_the_worker])
@pytest.mark.parametrize("open_it", OPENERS)
async def test_an_open_that_fails_leaves_a_log_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_it: Opener,
    fault: Callable[[pytest.MonkeyPatch], int],
) -> None:
    async with open_it(tmp_path / "log") as opened:
        if open_it is trio_wal.open_database:
            await opened.put(b"key", b"value")
        else:
            await opened.append(b"record")
    for name in tree(tmp_path):
        if name.endswith("/lock"):
            os.unlink(tmp_path / name)
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        number = fault(patch)
        error = await fails(open_it, tmp_path / "log", OSError)
    assert error.errno == number
    assert {name: data for name, data in tree(tmp_path).items() if ".mdb" not in name} == {
        name: data for name, data in before.items() if ".mdb" not in name
    }
    async with open_it(tmp_path / "log") as opened:
        assert getattr(opened, "wal", opened).last_lsn == 1


class Fault(Exception):
    pass


def raise_fault(*_: Any, **__: Any) -> Any:
    raise Fault


@pytest.mark.parametrize(
    ("kind", "name"), [(LmdbStore, "_open"), (LmdbStore, "read"), (Checkpointer, "start")]
)
async def test_a_database_that_fails_behind_its_log_removes_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, raise_fault)
        await fails(trio_wal.open_database, tmp_path / "new" / "db", Fault)
    assert tree(tmp_path) == {}
    async with trio_wal.open_database(tmp_path / "new" / "db") as db:
        await db.put(b"key", b"value")
    before = {name: data for name, data in tree(tmp_path).items() if not name.endswith(".mdb")}
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, raise_fault)
        await fails(trio_wal.open_database, tmp_path / "new" / "db", Fault)
    after = {name: data for name, data in tree(tmp_path).items() if not name.endswith(".mdb")}
    assert after == before
    async with trio_wal.open_database(tmp_path / "new" / "db") as db:
        assert db.get(b"key") == b"value"


async def test_a_database_whose_replay_fails_can_be_opened_again(tmp_path: Path) -> None:
    async with trio_wal.open_database(tmp_path / "db") as db:
        await db.put(b"key", b"value")
        image = tree(tmp_path)
    log = open_log_directory(
        OsFiles(), str(tmp_path / "db" / "log"), segment_size=1 << 20, database=True
    )
    log.write([b"no transaction"], 1, sync=True)
    log.close()
    await fails(trio_wal.open_database, tmp_path / "db", CorruptLogError)
    for name, data in image.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    async with trio_wal.open_database(tmp_path / "db") as db:
        assert db.get(b"key") == b"value"


async def test_a_full_disk_leaves_no_log_behind(files: MemoryFiles) -> None:
    files.free_bytes = 100_000
    error = await fails(trio_wal.open_wal, LOG, LogFullError, files=files)
    assert isinstance(error.__cause__, OSError)
    assert not files.exists(LOG)
    files.heal()
    async with trio_wal.open_wal(LOG, files=files) as wal:
        assert await wal.append(b"record") == 1


@pytest.mark.parametrize("open_it", OPENERS)
async def test_whichever_call_of_a_first_open_fails_nothing_stays(
    open_it: Opener, files: MemoryFiles
) -> None:
    """And where power fails while it is removed, the next open works."""
    path = LOG if open_it is trio_wal.open_wal else DB
    images: list[MemoryFiles] = []
    for operation in ("open", "pwrite", "sync", "allocate", "rename", "sync_dir", "lock"):
        for number in range(100):
            files = MemoryFiles()
            files.fail(operation, after=number)  # type: ignore[arg-type]
            files.after_operation = lambda *_, files=files, number=number: images.append(  # type: ignore[misc]
                files.crash_image(number)
            )
            opened = False
            try:
                async with open_it(path, files=files):
                    opened = True
            except (OSError, LogFailedError):
                pass
            else:
                break
            if not opened:
                assert not files.exists(path), (operation, number)
            files.heal()
            async with open_it(path, files=files):
                pass
        else:
            raise AssertionError("it never works")
    assert len(images) > 100
    for image in images:
        async with open_it(path, files=image) as opened:
            assert getattr(opened, "wal", opened).last_lsn == 0


async def test_an_open_that_waits_for_one_that_fails_makes_the_log_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the directory open that is removed, and its lock."""
    path = str(tmp_path / "log")
    late = OsFiles().open_directory(path, create=True)
    opened = [late]
    original = OsFiles.open_directory

    def open_directory(self: OsFiles, path: str, **how: bool) -> OsDirectory:
        return opened.pop() if opened else original(self, path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(OsFiles, "open_directory", open_directory)
        os.rmdir(path)
        log = open_log_directory(OsFiles(), path, segment_size=1)
    log.write([b"record"], 0, sync=True)
    log.close()
    log = open_log_directory(OsFiles(), path, segment_size=1)
    assert log.last_lsn == 1
    log.close()


async def test_who_does_not_get_the_lock_removes_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two made it at the same time; the other one is about to write its first file."""
    path = str(tmp_path / "log")
    original = OsDirectory.lock

    def lock(self: OsDirectory) -> None:
        monkeypatch.undo()
        other.append(OsFiles().open_directory(path))
        other[0].lock()
        original(self)

    other: list[OsDirectory] = []
    monkeypatch.setattr(OsDirectory, "lock", lock)
    with pytest.raises(trio_wal.LogLockedError):
        open_log_directory(OsFiles(), path, segment_size=1)
    assert os.listdir(path) == []
    other[0].close()


async def test_a_thread_that_cannot_be_started_later_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        await wal.append(b"record")
        with monkeypatch.context() as patch:
            patch.setattr(trio.to_thread, "run_sync", no_thread)
            with pytest.raises(OSError, match=r"^\[Errno 11\] no thread can be started") as caught:
                await wal.truncate_before(2)
        assert caught.value.errno == errno.EAGAIN
        assert await wal.append(b"record") == 2
