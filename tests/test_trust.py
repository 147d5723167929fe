"""Whose directory it is: what other users own or may write is refused, and no link is written
through."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import descriptors
from logs import TINY, append, records_of

import trio_wal
from trio_wal import CorruptLogError, UntrustedDirectoryError
from trio_wal._disk.opening import open_log_directory
from trio_wal._system.files import OsDirectory, OsFiles
from trio_wal._system.paths import make_directory

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="owners and modes are POSIX's")

NOBODY = 65534
root = pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root has a second user at hand"
)
MANNERS = [trio_wal.open_wal, trio_wal.open_database]


def make(open_it: Any, path: Path) -> None:
    async def main() -> None:
        async with open_it(path) as opened:
            await (opened.append(b"a") if open_it is trio_wal.open_wal else opened.put(b"a", b"a"))

    trio.run(main)


def opens(open_it: Any, path: Path, **options: Any) -> None:
    async def main() -> None:
        async with open_it(path, **options):
            pass

    trio.run(main)


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(entry.relative_to(path)): (
            entry.lstat().st_mode,
            entry.read_bytes() if entry.is_file() else b"",
        )
        for entry in path.rglob("*")
    }


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o775, 0o702, 0o1777])
@pytest.mark.parametrize("open_it", MANNERS)
def test_a_directory_that_others_may_write_is_refused(
    tmp_path: Path, open_it: Any, mode: int
) -> None:
    path = tmp_path / "here"
    make(open_it, path)
    before = tree(path)
    path.chmod(mode)
    message = (
        f"{path}: other users may write to it (mode {mode:04o}); run 'chmod go-w' on the "
        "directory, or open it with trust_directory=True"
    )
    with pytest.raises(UntrustedDirectoryError, match=f"^{re.escape(message)}$") as caught:
        opens(open_it, path)
    assert (caught.value.path, caught.value.remedy) == (
        str(path),
        "run 'chmod go-w' on the directory",
    )
    assert tree(path) == before
    opens(open_it, path, trust_directory=True)
    path.chmod(mode & ~0o022)
    opens(open_it, path)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o711])
@pytest.mark.parametrize("open_it", MANNERS)
def test_a_directory_that_others_may_only_read_is_opened(
    tmp_path: Path, open_it: Any, mode: int
) -> None:
    make(open_it, tmp_path / "here")
    (tmp_path / "here").chmod(mode)
    opens(open_it, tmp_path / "here")


def test_a_log_inside_of_a_database_is_looked_at_too(tmp_path: Path) -> None:
    make(trio_wal.open_database, tmp_path / "db")
    for name in ("log", "store"):
        (tmp_path / "db" / name).chmod(0o770)
        with pytest.raises(UntrustedDirectoryError, match=rf"^{tmp_path}/db/{name}: other users"):
            opens(trio_wal.open_database, tmp_path / "db")
        opens(trio_wal.open_database, tmp_path / "db", trust_directory=True)
        (tmp_path / "db" / name).chmod(0o700)
    opens(trio_wal.open_database, tmp_path / "db")


def test_readers_and_tools_read_what_anybody_wrote(tmp_path: Path) -> None:
    make(trio_wal.open_wal, tmp_path / "log")
    (tmp_path / "log").chmod(0o777)
    if os.geteuid() == 0:
        os.chown(tmp_path / "log", NOBODY, NOBODY)
    opens(trio_wal.open_reader, tmp_path / "log")
    command = [sys.executable, "-m", "trio_wal", "verify", str(tmp_path / "log")]
    run = subprocess.run(
        command,
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(trio_wal.__file__).parent.parent)},
    )
    assert run.returncode == 0, run.stderr


@root
@pytest.mark.parametrize("open_it", MANNERS)
def test_roots_process_refuses_another_users_directory(tmp_path: Path, open_it: Any) -> None:
    """What it wrote there would be root's, and its owner could not open the log any more."""
    make(open_it, tmp_path / "here")
    os.chown(tmp_path / "here", NOBODY, NOBODY)
    with pytest.raises(
        UntrustedDirectoryError,
        match=rf"^{tmp_path}/here: it belongs to user {NOBODY}, and this process runs as user 0; "
        "run as that user, or run 'chown 0' on the directory and its files, or open it with trust_",
    ):
        opens(open_it, tmp_path / "here")
    opens(open_it, tmp_path / "here", trust_directory=True)


AS_NOBODY = """
import os, sys, trio, trio_wal
trio_wal.open_wal  # loaded while this user may read it: see docs/processes
os.setgroups([]); os.setgid(65534); os.setuid(65534)

async def main(path):
    try:
        async with trio_wal.open_wal(path) as wal:
            print("opened", await wal.append(b"record"))
    except (trio_wal.WalError, OSError) as exc:
        print(type(exc).__name__, exc.reason if hasattr(exc, "reason") else exc.errno)

trio.run(main, sys.argv[1])
"""


def as_nobody(path: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(path)],
        check=False,
        capture_output=True,
        encoding="utf-8",
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(Path(trio_wal.__file__).parent.parent)},
    )
    if run.returncode and "trio_wal" in run.stderr and "No module" in run.stderr:
        pytest.skip("the other user cannot read the package here")
    return run.stdout.strip() or run.stderr


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that other users can reach, other than pytest's."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name).resolve()
        path.chmod(0o711)
        yield path


@root
@pytest.mark.parametrize(
    ("owner", "mode", "said"),
    [
        (NOBODY, 0o700, "opened 1"),
        (0, 0o777, "UntrustedDirectoryError other users may write to it (mode 0777)"),
        (1, 0o777, "UntrustedDirectoryError it belongs to user 1, and this process runs as user"),
        (NOBODY, 0o730, "UntrustedDirectoryError other users may write to it (mode 0730)"),
    ],
)
def test_a_plain_user_opens_only_his_own(public: Path, owner: int, mode: int, said: str) -> None:
    path = public / "log"
    path.mkdir()
    os.chown(path, owner, owner)
    path.chmod(mode)
    assert as_nobody(path).startswith(said)


@root
def test_a_sticky_directory_for_everybody_is_a_fine_place_for_a_log(public: Path) -> None:
    public.chmod(0o1777)
    assert as_nobody(public / "new" / "log") == "opened 1"
    status = (public / "new" / "log").stat()
    assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (NOBODY, 0o700)


# -- making a directory ---------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0, 0o022, 0o277, 0o777])
@root
def test_a_plain_users_directory_is_his_alone_whatever_his_umask(public: Path, umask: int) -> None:
    public.chmod(0o1777)
    script = AS_NOBODY.replace("\nasync", f"\nos.umask({umask})\nasync", 1)
    run = subprocess.run(
        [sys.executable, "-c", script, str(public / "a" / "log")],
        check=False,
        capture_output=True,
        encoding="utf-8",
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(Path(trio_wal.__file__).parent.parent)},
    )
    assert run.stdout == "opened 1\n", run.stderr
    for path in (public / "a", public / "a" / "log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_what_is_put_in_the_place_of_a_directory_just_made_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By somebody who may write the parent, between mkdir and chmod."""
    victim = tmp_path / "victim"
    victim.mkdir()
    victim.chmod(0o2755)
    original = os.mkdir

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        original(path, mode, dir_fd=dir_fd)
        os.rmdir(path, dir_fd=dir_fd)
        os.symlink(victim, path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", mkdir)
    before = os.umask(0o777)
    try:
        with pytest.raises(OSError, match=rf"^\[Errno ({errno.ELOOP}|{errno.ENOTDIR})\]"):
            make_directory(str(tmp_path / "log"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(victim.stat().st_mode) == 0o2755


@root
def test_another_users_directory_in_the_place_of_one_just_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.mkdir

    def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        original(path, 0o755, dir_fd=dir_fd)
        os.chown(path, NOBODY, NOBODY, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(UntrustedDirectoryError, match=r"/log: another directory was put in the "):
        make_directory(str(tmp_path / "log"))


# -- hard links -----------------------------------------------------------------------------------


def test_a_copy_by_hard_links_does_not_change_with_the_log(tmp_path: Path) -> None:
    """As ``cp -al`` makes one, or a backup program."""
    log = open_log_directory(OsFiles(), str(tmp_path / "log"), segment_size=TINY)
    for n in range(7):
        append(log, b"%d" % n)
    log.close()
    records = [b"%d" % n for n in range(7)]
    (tmp_path / "copy").mkdir(0o700)
    for file in (tmp_path / "log").iterdir():
        os.link(file, tmp_path / "copy" / file.name)
    before = tree(tmp_path / "copy")
    for _ in range(3):
        log = open_log_directory(OsFiles(), str(tmp_path / "log"), segment_size=TINY)
        for n in range(5):
            append(log, b"more %d" % n)
            records.append(b"more %d" % n)
            log.prepare_spare()
        log.drop_before(log.last_lsn)
        log.prepare_spare()
        log.truncate_after(log.last_lsn - 1)
        del records[-1]
        log.close()
        assert tree(tmp_path / "copy") == before
    log = open_log_directory(OsFiles(), str(tmp_path / "log"), segment_size=TINY)
    found = records_of(log)
    assert [data for _, data in found] == records[-len(found) :]
    log.close()
    log = open_log_directory(OsFiles(), str(tmp_path / "copy"), segment_size=TINY)
    assert [data for _, data in records_of(log)] == [b"%d" % n for n in range(7)]
    log.close()


def test_a_copy_that_cannot_be_made_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = OsFiles().open_directory(str(tmp_path / "log"), create=True)
    file = directory.open("file", create=True)
    file.pwrite([b"content"], 0)
    file.close()
    os.link(tmp_path / "log" / "file", tmp_path / "other")
    before = descriptors(tmp_path)

    def rename(self: OsDirectory, old: str, new: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(OsDirectory, "rename", rename)
        with pytest.raises(OSError, match=rf"^\[Errno {errno.EIO}\]"):
            directory.open("file", writable=True)
    assert os.listdir(tmp_path / "log") == ["file"]
    assert os.stat(tmp_path / "other").st_nlink == 2
    assert descriptors(tmp_path) == before
    file = directory.open("file", writable=True)
    file.pwrite([b"another"], 0)
    assert (file.path, file.pread(10, 0)) == (str(tmp_path / "log" / "file"), b"another")
    file.close()
    assert (tmp_path / "other").read_bytes() == b"content"
    assert (tmp_path / "log" / "file").read_bytes() == b"another"
    assert stat.S_IMODE((tmp_path / "log" / "file").stat().st_mode) == 0o600
    directory.close()


# -- errors have the path -------------------------------------------------------------------------


def test_a_directory_with_a_temporary_files_name_is_named_with_its_path(tmp_path: Path) -> None:
    log = open_log_directory(OsFiles(), str(tmp_path / "log"), segment_size=TINY)
    log.close()
    (tmp_path / "log" / "spare-1.tmp").mkdir()
    with pytest.raises(CorruptLogError, match=rf"^{tmp_path}/log/spare-1\.tmp") as caught:
        open_log_directory(OsFiles(), str(tmp_path / "log"), segment_size=TINY)
    assert caught.value.path == str(tmp_path / "log" / "spare-1.tmp")


def test_an_error_of_a_rename_has_both_paths(tmp_path: Path) -> None:
    directory = OsFiles().open_directory(str(tmp_path / "log"), create=True)
    with pytest.raises(FileNotFoundError) as caught:
        directory.rename("old", "new")
    assert (caught.value.filename, caught.value.filename2) == (
        str(tmp_path / "log" / "old"),
        str(tmp_path / "log" / "new"),
    )
    directory.close()
