"""Loop devices, file systems and mounts, for campaigns with real disks (Linux, as root).

Law: nothing outlives the process that made it, however that ends: mounts belong to a mount
namespace of its own, loop devices clear themselves when they are closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Final

import attrs

MS_RDONLY: Final = 0x1
MS_REMOUNT: Final = 0x20
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
MNT_DETACH: Final = 0x2

_CLONE_NEWNS: Final = 0x20000
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LO_FLAGS_AUTOCLEAR: Final = 0x4
_BLKFLSBUF: Final = 0x1261
_LOOP_TRIES: Final = 100

KIB: Final = 1024
MIB: Final = 1024 * KIB


@attrs.frozen
class FileSystem:
    """A file system, made small: a cut writes all of it anew."""

    name: str
    size: int
    options: tuple[str, ...]
    whole: tuple[tuple[int, int], ...]
    """(offset, length) of its superblock: written whole or not at all, which is what the file
    system itself takes for granted (its checksum covers more than 512 bytes)."""

    @property
    def tool(self) -> str:
        return f"mkfs.{self.name}"


FILE_SYSTEMS: Final = {
    system.name: system
    for system in (
        FileSystem(
            "ext4",
            12 * MIB,
            (
                *("-F", "-q", "-b", "4096", "-m", "0", "-N", "128", "-J", "size=4"),
                *("-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"),
                *("-O", "^resize_inode"),
            ),
            ((0, 4096),),
        ),
        # Below 300 MiB it is "unsupported", which concerns its speed on large disks.
        FileSystem(
            "xfs",
            16 * MIB,
            ("-f", "-q", "-K", "--unsupported", "-d", "agcount=1"),
            ((0, 4096),),
        ),
        FileSystem(
            "btrfs",
            32 * MIB,
            ("-f", "-q", "-K", "--mixed", "-m", "single", "-d", "single"),
            ((64 * KIB, 4096),),
        ),
    )
}


# -- what is possible here -------------------------------------------------------------


def why_not(systems: Sequence[str] = (), *, fuse: bool = False) -> str | None:
    """Why real disks cannot be used here; None where they can."""
    if sys.platform != "linux":
        return "loop devices and FUSE are Linux's"
    if os.geteuid() != 0:
        return "mounting needs root"
    for device in ("/dev/loop-control", *(["/dev/fuse"] if fuse else [])):
        try:
            os.close(os.open(device, os.O_RDWR))
        except OSError as exc:
            return f"{device} cannot be opened: {exc.strerror}"
    for name in systems:
        if (reason := _why_not_system(name)) is not None:
            return reason
    try:
        in_child(private_namespace)
    except OSError as exc:
        return f"no mount namespace can be made: {exc.strerror}"
    return None


def _why_not_system(name: str) -> str | None:
    if shutil.which(f"mkfs.{name}") is None:
        return f"mkfs.{name} is not installed"
    if not _kernel_has(name):
        subprocess.run(["modprobe", name], check=False, capture_output=True)
    return None if _kernel_has(name) else f"this kernel has no {name}"


def _kernel_has(name: str) -> bool:
    with open("/proc/filesystems", encoding="ascii") as lines:
        return any(line.split()[-1] == name for line in lines)


def in_child(function: object) -> None:
    """Try it where it changes nothing; the error of the child is raised here."""
    assert callable(function)
    pid = os.fork()
    if not pid:
        number = 0
        try:
            function()
        except OSError as exc:
            number = exc.errno or errno.EIO
        finally:
            os._exit(number)
    _, status = os.waitpid(pid, 0)
    if number := os.waitstatus_to_exitcode(status):
        raise OSError(number, os.strerror(number))


# -- mounts ----------------------------------------------------------------------------


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def private_namespace() -> None:
    """From here on this process's mounts are seen by it and its children only, and go away
    with the last of them."""
    _call("unshare", _CLONE_NEWNS)
    mount("none", "/", None, MS_REC | MS_PRIVATE)


_entered: list[int] = []


def enter_private_namespace() -> None:
    """`private_namespace`, once in a process."""
    if _entered != [os.getpid()]:
        private_namespace()
        _entered[:] = [os.getpid()]


def mount(source: str, target: str, kind: str | None, flags: int = 0, data: str = "") -> None:
    _call(
        "mount",
        source.encode(),
        target.encode(),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        data.encode(),
    )


def unmount(target: str, flags: int = 0) -> None:
    _call("umount2", target.encode(), flags)


@contextlib.contextmanager
def mounted(device: str, target: str, kind: str, flags: int = 0) -> Iterator[None]:
    mount(device, target, kind, flags)
    with unmounted_after(target):
        yield


@contextlib.contextmanager
def unmounted_after(target: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # Perhaps something in there is still open: it must not hide the error.
        unmount(target, MNT_DETACH)
        raise
    unmount(target)


def make(system: FileSystem, path: str, size: int | None = None) -> None:
    """A new file system in a new file."""
    with open(path, "wb") as file:
        file.truncate(size or system.size)
    done = subprocess.run(
        [system.tool, *system.options, path], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise OSError(errno.EINVAL, f"{system.tool}: {done.stderr.strip()}")


# -- loop devices ----------------------------------------------------------------------


class Loop(contextlib.AbstractContextManager["Loop"]):
    """A loop device on a file; `close` frees it as soon as nothing is mounted on it."""

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        backing = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            self.device, self._fd = _attach(backing)
        finally:
            os.close(backing)

    def __exit__(self, *_: object) -> None:
        self.close()

    def forget(self) -> None:
        """Drop what the kernel remembers of the device: the file was changed behind it."""
        import fcntl

        fcntl.ioctl(self._fd, _BLKFLSBUF)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _attach(backing: int) -> tuple[str, int]:
    import fcntl

    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_LOOP_TRIES):
            device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, _LOOP_CONFIGURE, _loop_config(backing))
            except OSError as exc:
                os.close(fd)
                # Somebody else took it between the two calls.
                if exc.errno != errno.EBUSY:
                    raise
            else:
                return device, fd
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device is free")


def _loop_config(backing: int) -> bytes:
    """``struct loop_config`` of linux/loop.h: descriptor, block size, ``struct loop_info64``."""
    info = bytearray(232)
    struct.pack_into("<I", info, 52, _LO_FLAGS_AUTOCLEAR)
    return struct.pack("<II", backing, 512) + bytes(info) + bytes(64)
