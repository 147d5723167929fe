"""What the system says of the disk below a directory, and whether its syncs can be believed.

Law: reads only.  What the system does not say is None; on other systems than Linux that is all of
it.  That a disk lies can only be suspected: the proof is a power cut.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import attrs

from .probe import Times

IN_MEMORY: Final = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")
NETWORK: Final = ("nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "virtiofs", "fuse")
NO_BARRIERS: Final = ("nobarrier", "barrier=0", "nodiskflush")
TURN_SECONDS: Final = 0.002
"""A disk that turns 15,000 times a minute takes 4 ms a turn: on average half of that passes until
the place comes by."""
FASTEST_SECONDS: Final = 5e-6
"""No answer of a device takes less: that is about the time of a command to the fastest of them."""
SYS: Final = Path("/sys/dev/block")
MOUNTS: Final = Path("/proc/self/mountinfo")


@attrs.frozen(kw_only=True)
class Device:
    """What there is below a directory."""

    filesystem: str | None = None
    options: tuple[str, ...] = ()
    """Of the mount."""
    name: str | None = None
    """Of the block device, such as ``nvme0n1``."""
    rotational: bool | None = None
    write_cache: str | None = None
    """``"write back"``: the device keeps writes for a while, and a sync must tell it to write them
    down.  ``"write through"``: the system believes that it need not."""
    virtual: bool = False
    """Whether a hypervisor, a loop or a mapper is behind it: what is below that nobody says."""


@attrs.frozen
class Suspicion:
    """A reason not to believe what was measured, or what a sync says."""

    code: str
    text: str


def device_of(path: str, mounts: Path = MOUNTS, devices: Path = SYS) -> Device:
    """Of the file system on which a path is.

    Args:
      mounts, devices: where the system keeps it.

    Raises:
      OSError: there is no such path.
    """
    at = _numbers(os.stat(path).st_dev)
    filesystem, options, source = _mount(mounts, at)
    # Of btrfs and others the number is none of a block device; the mount's source may be.
    block = _block(devices / at) or _block_named(devices, source)
    if block is None:
        return Device(filesystem=filesystem, options=options)
    rotational = _read(block / "queue" / "rotational")
    name = block.name
    return Device(
        filesystem=filesystem,
        options=options,
        name=name,
        rotational=None if rotational is None else rotational == "1",
        write_cache=_read(block / "queue" / "write_cache"),
        virtual=name.startswith(("vd", "xvd", "loop", "dm-", "md", "zram", "ram", "nbd", "rbd"))
        or "virtio" in os.path.realpath(block),
    )


def _mount(mounts: Path, at: str) -> tuple[str | None, tuple[str, ...], str]:
    """File system, options and source of the mount with a device's number."""
    try:
        lines = mounts.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None, (), ""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, more = before.split(), after.split()
        if len(fields) > 5 and len(more) > 1 and fields[2] == at:
            own = more[2] if len(more) > 2 else ""
            return more[0], tuple(dict.fromkeys(f"{fields[5]},{own}".split(","))), more[1]
    return None, (), ""


def _block(place: Path) -> Path | None:
    """Where the system speaks of a block device; of a partition, of the disk that it is a part
    of."""
    try:
        real = place.resolve(strict=True)
    except OSError:
        return None
    for candidate in (real, real.parent):
        if (candidate / "queue").is_dir():
            return candidate
    return None


def _block_named(devices: Path, source: str) -> Path | None:
    if sys.platform != "win32" and source.startswith("/dev/"):
        with suppress(OSError):
            return _block(devices / _numbers(os.stat(source).st_rdev))
    return None


def _numbers(device: int) -> str:
    """Major and minor, as the system writes them; of Windows there are none."""
    if sys.platform == "win32":
        text = "none"
    else:
        text = f"{os.major(device)}:{os.minor(device)}"
    return text


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None


def suspicions(device: Device, syncs: Times) -> list[Suspicion]:
    """Why syncs may not be what they say; none: nothing speaks against them."""
    found: list[Suspicion] = []
    filesystem = device.filesystem or ""
    if filesystem in IN_MEMORY:
        text = f"this is {filesystem}: it is in memory, and gone when the machine is"
        return [Suspicion("memory", text)]
    if filesystem == "overlay":
        text = "this is an overlay, as containers have: nothing says what is below it"
        found.append(Suspicion("overlay", text))
    if filesystem.partition(".")[0] in NETWORK:
        text = f"this is {filesystem}: a sync is worth what the other machine makes of it"
        found.append(Suspicion("network", text))
    if off := [option for option in NO_BARRIERS if option in device.options]:
        text = f"mounted with {off[0]}: a sync does not reach the disk; mount it without"
        found.append(Suspicion("no_barriers", text))
    if syncs.p50 < FASTEST_SECONDS:
        text = "a sync is over faster than any device answers: nobody asks the disk"
        found.append(Suspicion("too_fast", text))
    elif device.rotational and not device.virtual and syncs.p50 < TURN_SECONDS:
        text = (
            "the disk turns, and a sync is over before it can have turned: it keeps writes in a "
            "cache, which must have a battery"
        )
        found.append(Suspicion("too_fast_for_a_disk", text))
    if device.write_cache == "write through" and not device.virtual:
        text = (
            "the system believes that this device keeps nothing back, so it never asks it to write "
            "down; true of disks whose cache survives a power cut"
        )
        found.append(Suspicion("write_through", text))
    if device.virtual:
        text = f"{device.name} is virtual: whether a sync reaches a disk is up to what is below it"
        found.append(Suspicion("virtual", text))
    return found
