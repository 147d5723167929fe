"""The calls to the operating system: real files, real modes, real locks.

What another process does is in test_processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import re
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from mmap import ACCESS_COPY, PAGESIZE, mmap
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio
from logs import TINY, append, open_log, records_of

import trio_wal
from trio_wal import CorruptLogError, LogLockedError, WrongDirectoryError
from trio_wal._disk.opening import open_log_directory
from trio_wal._disk.verify import verify
from trio_wal._files import NO_WORD, Directory, Word
from trio_wal._system.files import OsDirectory, OsFile, OsFiles, WeakMethods
from trio_wal._system.owner import lock_holder
from trio_wal._system.sync import FOLIO_MAX
from trio_wal._system.watch import _watches_in, watch_directory
from trio_wal._util import MiB
from trio_wal.testing import MemoryFiles

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="modes, links and FIFOs are tested as POSIX has them"
)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[OsDirectory]:
    opened = OsFiles().open_directory(str(tmp_path / "log"), create=True)
    yield opened
    opened.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def snapshot(path: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a directory: kind, mode and content."""
    return {
        entry.name: (
            entry.lstat().st_mode,
            entry.read_bytes() if entry.is_file() and not entry.is_symlink() else b"",
        )
        for entry in sorted(path.iterdir())
    }


def refused(path: Path, error: type[Exception], match: str) -> None:
    """Opening a log is refused, soon, and changes nothing in its directory."""

    async def main() -> None:
        with trio.fail_after(60):
            async with trio_wal.open_wal(path):
                raise AssertionError("it was opened")

    before = snapshot(path) if path.is_dir() else None
    with pytest.raises(error, match=match):
        trio.run(main)
    if before is not None:
        assert snapshot(path) == before


def make_log(path: Path, count: int = 5) -> None:
    log = open_log_directory(OsFiles(), str(path), segment_size=TINY)
    for n in range(count):
        append(log, b"%d" % n)
    log.close()


# -- reading and writing ---------------------------------------------------------------------


def test_pieces_are_written_one_after_the_other(directory: OsDirectory) -> None:
    file = directory.open("file", create=True)
    file.pwrite([b"abc", b"", b"def"], 3)
    assert (file.pread(100, 0), file.size()) == (b"\0\0\0abcdef", 9)
    many = [b"%04d" % n for n in range(5000)]
    file.pwrite(many, 1)
    assert file.pread(20_001, 0) == b"\0" + b"".join(many)
    file.close()


def test_a_short_write_is_gone_on_with(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = directory.open("file", create=True)
    original = os.pwritev

    def short(fd: int, pieces: Any, offset: int) -> int:
        return original(fd, [b"".join(pieces)[:7]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    data = [bytes([n]) * 10 for n in range(20)]
    file.pwrite(data, 5)
    monkeypatch.undo()
    assert file.pread(300, 5) == b"".join(data)
    file.close()


def test_a_file_that_takes_no_more_bytes_is_an_error(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = directory.open("file", create=True)
    monkeypatch.setattr(os, "pwritev", lambda fd, pieces, offset: 0)
    with pytest.raises(OSError, match=r"^\[Errno 5\] the file takes no more bytes: .*/log/file'$"):
        file.pwrite([b"abc"], 0)
    file.close()


def test_a_short_read_is_gone_on_with(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = directory.open("file", create=True)
    file.pwrite([b"0123456789"], 0)
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, at: original(fd, min(length, 3), at))
    assert file.pread(8, 1) == b"12345678"
    assert file.pread(100, 5) == b"56789"
    assert file.pread(100, 10) == b""
    # The system call takes no such offset; a forged file may name one.
    for far in (1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        assert file.pread(100, far) == b""
    file.close()


@pytest.mark.parametrize("error", [None, errno.EOPNOTSUPP, errno.EINVAL])
def test_space_is_reserved_and_reads_as_zeros(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    if error is not None:

        def fallocate(*_: object) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(os, "posix_fallocate", fallocate, raising=False)
    file = directory.open("file", create=True)
    file.pwrite([b"abc"], 0)
    file.allocate(3_000_000)
    assert file.pread(4_000_000, 0) == b"abc".ljust(3_000_000, b"\0")
    file.allocate(5)
    assert file.size() == 3_000_000
    blocks = os.stat(Path(directory.path) / "file").st_blocks
    assert blocks * 512 >= 3_000_000, "there are holes"
    file.close()


def test_no_space_to_reserve_is_an_error(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fallocate, raising=False)
    if sys.platform == "darwin":
        pytest.skip("there is no posix_fallocate on macOS")
    file = directory.open("file", create=True)
    with pytest.raises(OSError, match=rf"^\[Errno {errno.ENOSPC}\]"):
        file.allocate(1000)
    file.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere another call does it")
def test_data_is_made_durable_by_fdatasync_and_names_by_fsync(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: calls.append("data"))
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("names"))
    file = directory.open("file", create=True)
    file.sync()
    directory.sync()
    assert calls == ["data", "names"]
    file.close()


@pytest.mark.parametrize(("error", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_directories_is_accepted(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch, error: int, raises: bool
) -> None:
    def fsync(fd: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)
    if raises:
        with pytest.raises(OSError, match=rf"^\[Errno {error}\]"):
            directory.sync()
    else:
        directory.sync()


def test_closing_twice_closes_no_other_file(directory: OsDirectory) -> None:
    file = directory.open("file", create=True)
    number = file._fd
    file.close()
    other = os.open(directory.path, os.O_RDONLY)
    try:
        assert other == number, "the number is free again and given to another"
        file.close()
        os.fstat(other)
    finally:
        os.close(other)
    directory.close()
    directory.close()


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "/etc/passwd", "a/b"])
def test_only_names_in_the_directory_are_names(directory: OsDirectory, name: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: directory.open(name),
        lambda: directory.open(name, create=True),
        lambda: directory.unlink(name),
        lambda: directory.rename(name, "x"),
        lambda: directory.rename("x", name),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^name must be one of a file in the directory"):
            call()


def test_creating_demands_that_there_is_nothing(directory: OsDirectory) -> None:
    path = Path(directory.path)
    (path / "file").write_bytes(b"mine")
    (path / "link").symlink_to(path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            directory.open(name, create=True)
    assert (path / "file").read_bytes() == b"mine"
    assert not (path / "nowhere").exists()


def test_an_open_log_stays_in_its_directory_wherever_that_goes(tmp_path: Path) -> None:
    log = open_log_directory(OsFiles(), str(tmp_path / "log"), segment_size=TINY)
    append(log, b"before")
    (tmp_path / "log").rename(tmp_path / "moved")
    (tmp_path / "log").mkdir()
    for n in range(5):
        append(log, b"%d" % n)
    log.close()
    assert list((tmp_path / "log").iterdir()) == []
    log = open_log_directory(OsFiles(), str(tmp_path / "moved"), segment_size=TINY)
    assert len(records_of(log)) == 6
    log.close()


# -- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_log_is_its_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "new" / "parent" / "log"
    before = os.umask(umask)
    try:
        log = open_log_directory(OsFiles(), str(path), segment_size=TINY)
        append(log, b"a")
        append(log, b"b")
        log.prepare_spare()
        append(log, b"c")
        log.truncate_after(2)
        names = {entry.name: mode(entry) for entry in path.iterdir()}
        log.close()
    finally:
        os.umask(before)
    assert {"lock", "log.meta"} < names.keys()
    assert set(names.values()) == {0o600}
    assert {mode(folder) for folder in (path, path.parent, path.parent.parent)} == {0o700}


def test_a_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.mkdir(mode=0o750)
    path.chmod(0o750)
    make_log(path)
    assert mode(path) == 0o750


# -- things that are no files --------------------------------------------------------------------


def symlink(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_bytes(path.read_bytes() if path.exists() else b"")
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.with_name("nowhere"))


def fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def unix_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket must be short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize("make", [symlink, dangling, fifo, folder, unix_socket])
@pytest.mark.parametrize("name", ["wal-00000000000000000001.log", "log.meta"])
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    """A link would lead out of the directory, a FIFO would be waited for."""
    path = tmp_path / "log"
    make_log(path)
    make(path / name)
    refused(path, CorruptLogError, rf"/{name}: at offset 0: not a regular file")

    async def look() -> None:
        with trio.fail_after(60):
            async with trio_wal.open_reader(path):
                raise AssertionError("it was opened")

    with pytest.raises(CorruptLogError, match=rf"/{name}: at offset 0: not a regular file"):
        trio.run(look)


@pytest.mark.parametrize("make", [symlink, fifo])
def test_a_lock_file_that_is_no_regular_file_is_refused(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "log"
    make_log(path)
    make(path / "lock")
    refused(path, CorruptLogError, r"/lock: at offset 0: not a regular file")


@pytest.mark.parametrize("kind", ["file", "fifo", "device"])
def test_a_path_that_is_no_directory_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "log"
    if kind == "file":
        path.write_bytes(b"my thesis")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path(os.devnull)
    refused(path, WrongDirectoryError, r": this is not a directory: use a directory's path, ")
    assert kind != "file" or path.read_bytes() == b"my thesis"


def test_a_foreign_directory_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(b"ten years")
    (tmp_path / "figures").mkdir()
    refused(tmp_path, WrongDirectoryError, r"this is neither .*: it holds 'figures': use ")


async def test_bad_arguments_create_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for options in ({"segment_size": 0}, {"durability": "perhaps"}, {"retention": 3}):
        with pytest.raises((TypeError, ValueError)):
            trio_wal.open_wal(path, **options)  # type: ignore[arg-type]
    assert not path.exists()


async def test_a_path_through_a_symlink_is_the_same_log(tmp_path: Path) -> None:
    make_log(tmp_path / "log")
    (tmp_path / "link").symlink_to(tmp_path / "log")
    async with trio_wal.open_wal(tmp_path / "link") as wal:
        assert wal.last_lsn == 5
        await wal.append(b"through the link")
        with pytest.raises(LogLockedError):
            async with trio_wal.open_wal(tmp_path / "log"):
                pass
    async with trio_wal.open_wal(tmp_path / "log") as wal:
        assert wal.last_lsn == 6


async def test_a_relative_path_is_meant_from_where_the_log_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with trio_wal.open_wal("log", segment_size=TINY) as wal:
        assert wal.path == str(tmp_path / "log")
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
        for n in range(5):
            await wal.append(b"%d" % n)
        async with wal.read() as records:
            assert len([record async for record in records]) == 5
    assert list((tmp_path / "other").iterdir()) == []


# -- ownership -------------------------------------------------------------------------------------


async def test_a_second_open_in_this_process_is_refused_with_its_pid(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path) as wal:
        await wal.append(b"a")
        with pytest.raises(
            LogLockedError, match=rf"^{re.escape(str(tmp_path))}: the log is open in process \d+; "
        ) as caught:
            async with trio_wal.open_wal(tmp_path):
                pass
        assert (caught.value.path, caught.value.pid) == (str(tmp_path), os.getpid())
        assert await wal.append(b"b") == 2
    async with trio_wal.open_wal(tmp_path) as wal:
        assert wal.last_lsn == 2


async def test_unlinking_the_lock_file_does_not_unlock(tmp_path: Path) -> None:
    async with trio_wal.open_wal(tmp_path) as wal:
        (tmp_path / "lock").unlink()
        with pytest.raises(LogLockedError) as caught:
            async with trio_wal.open_wal(tmp_path):
                pass
        assert caught.value.pid == (os.getpid() if sys.platform == "linux" else None)
        assert await wal.append(b"a") == 1


@pytest.fixture
def _no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no /proc/locks: on macOS, or where /proc is not mounted."""
    original = open

    def refuse(path: Any, *args: Any, **options: Any) -> Any:
        if path == "/proc/locks":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return original(path, *args, **options)

    monkeypatch.setattr("builtins.open", refuse)


HOSTILE_TEXTS = [b"", b"nobody", b"-1", b"9" * 40, b"\xff" * 64, b"0", b"1", b"1\n\n", b"99999999"]


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
@pytest.mark.usefixtures("_no_proc")
def test_a_lock_file_with_another_text_names_nobody(directory: OsDirectory, text: bytes) -> None:
    (Path(directory.path) / "lock").write_bytes(text)
    other = OsFiles().open_directory(directory.path)
    other.lock()
    with pytest.raises(
        LogLockedError, match=rf"^{re.escape(directory.path)}: the log is open in another process; "
    ) as caught:
        directory.lock()
    assert caught.value.pid is None
    other.close()
    directory.lock()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/locks")
@pytest.mark.parametrize("text", [*HOSTILE_TEXTS, b"%d" % os.getppid()])
def test_the_kernel_says_who_has_the_lock_whatever_the_lock_file_says(
    directory: OsDirectory, text: bytes
) -> None:
    """A recovery that has not signed yet, or somebody with flock(1)."""
    (Path(directory.path) / "lock").write_bytes(text)
    with subprocess.Popen(
        [sys.executable, "-c", FLOCK, directory.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(LogLockedError) as caught:
            directory.lock()
        assert caught.value.pid == other.pid
        other.communicate()
    directory.lock()


FLOCK = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_SH)
print("locked", flush=True)
sys.stdin.read()
"""

LOCKS = b"""\
1: FLOCK  ADVISORY  WRITE 17 fd:01:4711 0 EOF
1: -> FLOCK  ADVISORY  WRITE 18 fd:01:4711 0 EOF
2: POSIX  ADVISORY  WRITE 19 fd:01:4712 0 EOF
3: FLOCK  ADVISORY  READ  20 00:2a:4713 0 EOF
4: FLOCK  ADVISORY  WRITE 0 fd:01:4714 0 EOF
"""


@pytest.mark.parametrize(
    ("inode", "signed", "holder"),
    [
        (4711, None, 17),
        (4711, 18, 17),
        (4712, 19, None),  # another kind of lock
        (4713, None, None),  # another device: another file, or one on btrfs
        (4713, 20, 20),
        (4713, 21, None),
        (4714, None, None),  # in another namespace of pids
        (4715, 17, None),
    ],
)
def test_who_has_a_lock_is_read_from_the_table_of_locks(
    inode: int, signed: int | None, holder: int | None
) -> None:
    status = os.stat_result((0o40700, inode, os.makedev(0xFD, 1), 2, 0, 0, 0, 0, 0, 0))
    assert lock_holder(LOCKS, status, signed) == holder


def test_a_close_clears_the_owners_pid(tmp_path: Path) -> None:
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    assert (tmp_path / "lock").read_bytes()[:32].strip() == b"%d" % os.getpid()
    append(log, b"a")
    log.close()
    assert (tmp_path / "lock").read_bytes()[:32].strip() == b""


@pytest.mark.usefixtures("_no_proc")
def test_without_a_table_of_locks_the_owners_word_is_taken_if_it_can_be_true(
    directory: OsDirectory,
) -> None:
    directory.lock()
    directory.sign()
    other = OsFiles().open_directory(directory.path)
    with pytest.raises(LogLockedError) as caught:
        other.lock()
    assert caught.value.pid == os.getpid()
    if os.geteuid() == 0:
        os.chown(Path(directory.path) / "lock", 65534, 65534)
        with pytest.raises(LogLockedError) as caught:
            other.lock()
        assert caught.value.pid is None, "another user may have written that"
    other.close()


def test_a_refused_open_leaves_the_lock_file_as_it_was(tmp_path: Path) -> None:
    make_log(tmp_path)
    (tmp_path / "lock").write_bytes(b"as it was")
    data = bytearray((tmp_path / "log.meta").read_bytes())
    data[100] ^= 1
    (tmp_path / "log.meta").write_bytes(data)
    with pytest.raises(CorruptLogError):
        open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    assert (tmp_path / "lock").read_bytes() == b"as it was"


def test_what_is_published_is_read_whole_or_not_at_all(directory: OsDirectory) -> None:
    assert directory.published() == NO_WORD
    directory.publish(5, 6)
    assert directory.published() == NO_WORD, "only the owner publishes"
    directory.lock()
    directory.sign()
    looker = OsFiles().open_directory(directory.path)
    for lsn, epoch in ((0, 0), (1, 0), (77, 2**40), (2**40, 1), (2**64 - 1, 2**64 - 1), (3, 9)):
        directory.publish(lsn, epoch)
        assert looker.published() == (lsn, epoch)
    lock = Path(directory.path) / "lock"
    data = lock.read_bytes()
    assert len(data) == 60
    for place in range(32, 60):
        torn = bytearray(data)
        torn[place] ^= 0x40
        lock.write_bytes(torn)
        assert looker.published() == (NO_WORD if place < 48 else Word(3, None))
    for size in range(48, 60):
        lock.write_bytes(data[:size])
        assert looker.published() == (3, None), "older versions know no epochs"
    lock.write_bytes(data[:47])
    assert looker.published() == NO_WORD
    looker.close()


def test_what_was_read_while_it_was_written_is_read_again(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.lock()
    directory.sign()
    directory.publish(205, 3)
    before = directory._read_lock_file()
    directory.publish(197, 4)
    after = directory._read_lock_file()
    torn = [before[:48] + after[48:], before[:56] + after[56:]]
    seen = [*torn, after]
    monkeypatch.setattr(OsDirectory, "_read_lock_file", lambda self: seen.pop(0))
    assert directory.published() == (197, 4)
    assert not seen
    # One that stands still is an older version's.
    seen += [torn[0], torn[0]]
    assert directory.published() == (205, None)


def test_listings_in_several_threads_do_not_disturb_each_other(directory: OsDirectory) -> None:
    for number in range(30):
        (Path(directory.path) / f"wal-{number:020}.log").touch()
    expected, wrong = directory.names(), []

    def look() -> None:
        for _ in range(300):
            names = directory.names()
            if names != expected:
                wrong.append(names)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(expected) == 30
    assert not wrong


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_a_watch_tells_of_whatever_changes_in_the_directory(directory: OsDirectory) -> None:
    watch = directory.watch()
    assert watch is not None

    def changed() -> bool:
        told = bool(select.select([watch], [], [], 0)[0])
        watch.drain()
        return told

    file = directory.open("one", create=True)
    assert changed()
    assert not changed()
    # Nobody may take it for durable yet.
    file.pwrite([b"more"], 0)
    assert not changed()
    directory.rename("one", "two")
    assert changed()
    file.close()
    assert changed()
    directory.unlink("two")
    assert changed()
    watch.close()
    watch.close()


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_a_watch_tells_of_what_has_become_durable(directory: OsDirectory) -> None:
    watch = directory.watch()
    assert watch is not None

    def changed() -> bool:
        told = bool(select.select([watch], [], [], 0)[0])
        watch.drain()
        return told

    # The lock file comes only now, and another one later.
    for lsn in (1, 5):
        directory.sign()
        assert changed()
        directory.publish(lsn, 0)
        assert changed()
        assert not changed()
        directory.publish(lsn + 1, 0)
        assert changed()
        (Path(directory.path) / "lock").unlink()
        assert changed()
    watch.close()
    directory.sign()
    another = directory.watch()
    assert another is not None
    directory.publish(9, 0)
    assert select.select([another], [], [], 0)[0]
    another.close()


def test_whose_events_they_are_is_read_past_the_names_in_them() -> None:
    def event(watch: int, name: bytes = b"") -> bytes:
        return struct.pack("iIII", watch, 0x100, 0, len(name)) + name

    names = struct.pack("iIII", 7, 7, 7, 0)
    assert _watches_in(b"") == set()
    assert _watches_in(event(2) + event(1, names * 2) + event(2) + event(-1)) == {1, 2, -1}


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_after_events_were_lost_the_lock_file_is_looked_for_again(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = directory.watch()
    assert watch is not None
    directory.sign()
    while select.select([watch], [], [], 0)[0]:
        os.read(watch.fileno(), 1 << 16)
    lost = [struct.pack("iIII", -1, 0x4000, 0, 0)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", lambda _fd, _size: lost.pop())
        watch.drain()
    assert lost == []
    directory.publish(1, 0)
    assert select.select([watch], [], [], 0)[0]
    watch.close()


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_where_nothing_can_be_watched_there_is_no_watch() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert watch_directory(-1) is None
    assert len(os.listdir("/proc/self/fd")) == before


NO_WATCH_LEFT = """
import os, sys
from trio_wal._system.watch import watch_directory

fd = os.open(sys.argv[1], os.O_RDONLY)
before = os.listdir("/proc/self/fd")
print(watch_directory(fd) is None, before == os.listdir("/proc/self/fd"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="inotify, and its limits, are Linux's")
@pytest.mark.parametrize(
    ("instances", "watches", "none"), [(0, 9, True), (9, 0, True), (9, 1, True), (9, 2, False)]
)
def test_whoever_may_watch_only_half_does_not_watch(
    tmp_path: Path, instances: int, watches: int, none: bool
) -> None:
    make_log(tmp_path / "log", count=1)
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1) here to set limits with")
    limits = "/proc/sys/user/max_inotify"
    script = f"echo {instances} >{limits}_instances && echo {watches} >{limits}_watches"
    script += ' && exec "$@"'
    command = ["unshare", "-Ur", "sh", "-c", script, "sh", sys.executable, "-c", NO_WATCH_LEFT]
    done = subprocess.run(
        [*command, str(tmp_path / "log")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(trio_wal.__file__).parent.parent)},
    )
    if done.stderr.startswith("unshare:") or limits in done.stderr:
        pytest.skip(f"no user namespace: {done.stderr}")
    assert done.stdout.split() == [str(none), str(none)], done.stderr


# -- a file system that cannot be written --------------------------------------------------------

READ_ONLY = """
import errno, sys, trio, trio_wal

async def main(path):
    try:
        async with trio_wal.open_wal(path):
            print("opened")
    except OSError as exc:
        print(errno.errorcode[exc.errno])
    async with trio_wal.open_reader(path) as reader, reader.read() as records:
        print([record.data async for record in records])

trio.run(main, sys.argv[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_a_log_on_a_read_only_file_system_is_read_and_not_opened(tmp_path: Path) -> None:
    make_log(tmp_path / "log", count=2)
    before = snapshot(tmp_path / "log")
    script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && exec "$2" -c "$3" "$1"'
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1) here to make a read-only mount with")
    unshare = ["unshare", "--mount", "--map-root-user", "--user", "sh", "-c", script, "sh"]
    run = subprocess.run(
        [*unshare, str(tmp_path / "log"), sys.executable, READ_ONLY],
        check=False,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(Path(trio_wal.__file__).parent.parent)},
    )
    if run.returncode and not run.stdout:
        pytest.skip(f"no read-only mount can be made here: {run.stderr.strip()}")
    assert run.stdout.splitlines() == ["EROFS", "[b'0', b'1']"]
    assert snapshot(tmp_path / "log") == before


def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere: the read-only file system is the test for root")
    tmp_path.chmod(0o500)
    try:
        refused(tmp_path, PermissionError, r"^\[Errno 13\]")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("operation", ["open", "lock", "pread"])
@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EMFILE])
async def test_an_open_that_the_system_refuses_raises_its_error_and_leaves_the_log(
    operation: Any, error: int
) -> None:
    files = MemoryFiles()
    log = open_log(files)
    append(log, b"a")
    log.close()
    before = files.contents("/log")
    for after in range(1 if operation == "lock" else 3):
        files.fail(operation, error, after=after)
        with pytest.raises(OSError, match=rf"^\[Errno {error}\]"):
            async with trio_wal.open_wal("/log", files=files):
                pass
        assert files.contents("/log") == before
    async with trio_wal.open_wal("/log", files=files) as wal:
        assert wal.last_lsn == 1


def test_both_kinds_of_directories_are_directories(directory: OsDirectory) -> None:
    kinds: list[Directory] = [directory, MemoryFiles().open_directory("/log", create=True)]
    for opened in kinds:
        opened.lock()
        opened.sign()
        opened.publish(3, 8)
        assert opened.published() == (3, 8)
        opened.close()


def test_a_read_far_behind_the_end_takes_no_memory_for_what_is_not_there(
    directory: OsDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forged frame may claim any length; pread(2) takes a buffer of it first."""
    file = directory.open("file", create=True)
    file.pwrite([b"short"], 0)
    asked: list[int] = []
    original = OsFile._pread

    def pread(self: OsFile, length: int, offset: int) -> bytes:
        asked.append(length)
        return original(self, length, offset)

    monkeypatch.setattr(OsFile, "_pread", pread)
    assert file.pread(1 << 40, 0) == b"short"
    assert file.pread(1 << 40, 2) == b"ort"
    assert file.pread(1 << 40, 99) == b""
    assert max(asked) == 5
    file.close()


# -- the page cache --------------------------------------------------------------------------


def cached(path: Path) -> list[int]:
    """Offsets of the pages that are in the page cache (mincore(2))."""
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * (size // PAGESIZE))()
    with path.open("r+b") as file, mmap(file.fileno(), size, access=ACCESS_COPY) as mapped:
        byte = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(byte), ctypes.c_size_t(size), pages)
        del byte
    assert not failed
    return [number * PAGESIZE for number, state in enumerate(pages) if state & 1]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's page cache")
@pytest.mark.parametrize("edge", [0, PAGESIZE, FOLIO_MAX // 2, FOLIO_MAX - PAGESIZE])
def test_nothing_outside_of_what_is_kept_stays_in_the_page_cache(
    directory: OsDirectory, tmp_path: Path, edge: int
) -> None:
    """Not even where the kernel caches in units that reach across the edge."""
    path = tmp_path / "log" / "file"
    size = 6 * FOLIO_MAX
    with contextlib.closing(directory.open("file", create=True)) as file:
        file.pwrite([os.urandom(size)], 0)
        file.sync()
        kept = range(FOLIO_MAX - edge, 4 * FOLIO_MAX + edge)
        directory.reread("file", keep=kept)
        left = cached(path)
        if len(left) == size // PAGESIZE:
            pytest.skip("this file system has its files in memory")
        assert left
        assert set(left) <= set(range(FOLIO_MAX, 4 * FOLIO_MAX, PAGESIZE))
        # Too little to be worth it: everything goes, what is not written yet among it.
        file.pwrite([os.urandom(size)], 0)
        directory.reread("file", keep=range(FOLIO_MAX - 1, 2 * FOLIO_MAX - 1))
        assert cached(path) == []


# -- holes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("real", [True, False])
def test_a_file_tells_where_there_is_something_again(tmp_path: Path, real: bool) -> None:
    files: Any = OsFiles() if real else MemoryFiles()
    path = str(tmp_path / "files") if real else "/files"
    directory = files.open_directory(path, create=True)
    file = directory.open("file", create=True)
    at = 8 * MiB
    file.pwrite([b"start"], 0)
    file.pwrite([b"end"], at)
    assert file.next_data(0) == 0
    found = file.next_data(4 * MiB)
    # Where the file system cannot tell, everything may be something.
    assert 4 * MiB <= found <= at
    if not real or found > 4 * MiB:
        assert file.next_data(at) == at
    assert file.pread(3, max(found, at)) == b"end"
    for offset in (at + 3, at + MiB):
        assert file.next_data(offset) >= min(offset, file.size())
    # Nothing depends on where the descriptor stands.
    assert file.pread(5, 0) == b"start"
    file.close()
    directory.close()


@pytest.mark.parametrize("closed", [True, False])
async def test_a_last_segment_of_64_gib_of_nothing_is_looked_at_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: bool
) -> None:
    path = tmp_path / "log"
    async with trio_wal.open_wal(path) as wal:
        await wal.append_many([b"%d" % n for n in range(5)])
        await wal.append(b"five")
    (segment,) = path.glob("wal-*.log")
    with segment.open("r+b") as file:
        if not closed:
            # No pointer tells where the log ends.
            os.pwrite(file.fileno(), bytes(512), 512)
        try:
            file.truncate(64 * 1024 * MiB)
            holes = os.lseek(file.fileno(), MiB, os.SEEK_DATA) > MiB
        except OSError as exc:
            holes = exc.errno == errno.ENXIO
    if not holes:
        pytest.skip("this file system knows no holes, or no file of that size")
    reads = 0
    true_pread = os.pread

    def pread(*arguments: Any) -> bytes:
        nonlocal reads
        reads += 1
        assert reads < 1000, "zeros are read that are not there"
        return true_pread(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    directory = OsFiles().open_directory(str(path))
    assert verify(directory).findings == ()
    directory.close()
    async with trio_wal.open_reader(path) as reader:
        assert reader.durable_lsn == 6
    async with trio_wal.open_wal(path) as wal:
        await wal.append(b"after")


# -- what is written ------------------------------------------------------------------------


def test_what_is_written_back_early_is_what_was_written(tmp_path: Path) -> None:
    directory = OsFiles().open_directory(str(tmp_path / "files"), create=True)
    file = directory.open("file", create=True)
    pieces = [bytes([number]) * 5_000 for number in range(1, 9)]
    for number, piece in enumerate(pieces):
        file.pwrite([piece], 5_000 * number)
        file.write_back(5_000, 5_000 * number)
    file.sync()
    assert file.pread(50_000, 0) == b"".join(pieces)
    file.close()
    # A hint: it is the sync that says what has failed.
    file.write_back(5_000, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell")
def test_a_file_tells_how_much_of_it_is_written(tmp_path: Path) -> None:
    directory = OsFiles().open_directory(str(tmp_path / "files"), create=True)
    file = directory.open("file", create=True)
    file.pwrite([bytes(MiB)], 0)
    file.sync()
    written = file.written_bytes()
    if not written:
        pytest.skip("this file system does not tell")
    assert written == MiB
    file.allocate(3 * MiB)
    assert file.pread(2 * MiB, MiB) == bytes(2 * MiB)
    assert file.written_bytes() == MiB, "space that is reserved, and was read into the page cache"
    file.pwrite([b"x"], MiB)
    file.pwrite([bytes(4096)], 2 * MiB)
    file.sync()
    assert MiB < file.written_bytes() <= 2 * MiB
    file.pwrite([bytes(2 * MiB)], MiB)
    file.sync()
    assert file.written_bytes() == 3 * MiB
    file.close()
    directory.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell")
@pytest.mark.parametrize(
    ("extents", "written"),
    [
        ([], 0),
        ([(0, 4096, 0x1)], 4096),
        # 64 of them are told at a time.
        ([(at * 4096, 4096, 0x1000) for at in range(200)], 200 * 4096),
        ([(0, 4096, 0), (4096, 4096, 0x800)], 4096),
        ([(0, 4096, 0), (8192, 4096, 0x1)], 4096),
        ([(4096, 4096, 0x1)], 0),
        # Not allocated yet, shared with another file, inside of the inode.
        *(([(0, 4096, 0), (4096, 4096, flag)], 4096) for flag in (0x6, 0x2000, 0x200, 0x1 << 20)),
    ],
)
def test_only_extents_in_a_row_that_are_plainly_written_count(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    extents: list[tuple[int, int, int]],
    written: int,
) -> None:
    import fcntl

    def ioctl(fd: int, request: int, argument: bytearray) -> None:
        start, length, _, _, room, _ = struct.unpack_from("=QQLLLL", argument)
        found = [extent for extent in extents if start <= extent[0] < start + length][:room]
        struct.pack_into("=L", argument, 20, len(found))
        for number, (at, size, flags) in enumerate(found):
            struct.pack_into("=QQQ16xL12x", argument, 32 + 56 * number, at, 1 << 30, size, flags)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    directory = OsFiles().open_directory(str(tmp_path / "files"), create=True)
    file = directory.open("file", create=True)
    assert file.written_bytes() == written
    file.close()
    directory.close()


def test_a_file_system_that_does_not_tell_has_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def ioctl(fd: int, request: int, argument: bytearray) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    directory = OsFiles().open_directory(str(tmp_path / "files"), create=True)
    file = directory.open("file", create=True)
    file.pwrite([bytes(MiB)], 0)
    file.sync()
    assert file.written_bytes() == 0
    file.close()
    directory.close()


@pytest.mark.parametrize("kind", ["log", "database", "readers"])
async def test_nothing_in_python_runs_when_what_was_open_is_collected(
    tmp_path: Path, kind: str
) -> None:
    """A Ctrl-C that arrives during a garbage collection is looked at by the first line of Python
    after it.  In a callback of a weak reference its KeyboardInterrupt is printed, and forgotten."""
    ran: list[str] = []

    async def use() -> None:
        if kind == "log":
            async with trio_wal.open_wal(tmp_path / "log") as wal:
                await wal.append(b"record")
                async with wal.read() as records:
                    assert [record.lsn async for record in records] == [1]
        else:
            async with trio_wal.open_database(tmp_path / "db") as db:
                await db.put(b"key", b"value")
        if kind == "readers":
            async with trio_wal.open_database_reader(tmp_path / "db") as reader:
                assert reader.get(b"key") == b"value"

    def note(frame: FrameType, event: str, _: object) -> None:
        # Trio keeps Ctrl-C out of whatever is called so.
        if event == "call" and frame.f_code.co_name != "__del__":
            ran.append(f"{frame.f_code.co_filename}: {frame.f_code.co_name}")

    gc.collect()
    gc.disable()
    others = gc.callbacks[:]
    gc.callbacks.clear()  # those of test tools
    try:
        await use()
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            collected = gc.collect()
        finally:
            sys.setprofile(before)
    finally:
        gc.callbacks[:] = others
        gc.enable()
    assert collected > 10
    assert ran == []


def test_methods_are_kept_for_as_long_as_their_objects_live() -> None:
    called: list[str] = []

    class Owner:
        def __init__(self, name: str) -> None:
            self.name = name

        def told(self) -> None:
            called.append(self.name)

    methods = WeakMethods()
    first, second, third = Owner("first"), Owner("second"), Owner("third")
    for owner in (first, second, third):
        methods.add(owner.told)
    methods.call()
    assert called == ["first", "second", "third"]
    called.clear()
    del second, third, owner
    gc.collect()
    methods.call()
    assert called == ["first"]
    assert len(methods) == 1
