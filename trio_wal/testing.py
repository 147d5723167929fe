"""A file system in memory that crashes and fails on command, for tests of logs and of
programs that keep one.

Law: behaves like the operating system's files behind the same protocol (`trio_wal._files`),
but for what it is asked to do wrong.

Everything random comes from the seeds that the caller gives.  No thread is used, so tests can run
on trio's `trio.testing.MockClock`.

::

    files = trio_wal.testing.MemoryFiles()
    async with trio_wal.open_wal("/log", files=files) as wal:
        await wal.append(b"kept")
        await wal.send(b"perhaps")
        after = files.crash(seed=1)          # power fails now; `files` is dead
    ...
    async with trio_wal.open_wal("/log", files=after) as wal:
        assert wal.last_lsn >= 1
"""

from __future__ import annotations

import errno
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, final

import attrs
import trio

from . import _exports
from ._base import Progress, ReadTransaction, StoreCheckLevel, StoreState
from ._exceptions import LogLockedError
from ._files import NO_WORD, Watch, Word
from ._memorydisk import SECTOR, Change, Folder, Inode, MemoryRead, StoreImage
from ._util import KiB

FREED_FILES: Final = 8
FREED_BYTES: Final = 64 * KiB
"""Of so many deleted files the beginning may show up in sectors that were not synced."""

Operation = Literal[
    "open", "pread", "pwrite", "sync", "allocate", "truncate",
    "rename", "unlink", "sync_dir", "lock", "store",
]  # fmt: skip

CrashKind = Literal["power", "kill"]


@attrs.define
class _Fault:
    operation: str
    error: int
    skip: int
    times: float
    written: int


@final
class MemoryFiles:
    """Files and directories in memory, with crashes, errors and stalls; see the module.

    So many methods because it is a whole machine: one for each system call that the package makes,
    and those by which a test breaks, holds, looks into and crashes it.

    Args:
      seed: of the UUIDs and salts that logs take from here.
      epoch_us: where the clock stands at trio time 0 (outside of trio: where it stands);
          change ``clock_offset_us`` to make it jump.
    """

    threaded = False

    def __init__(self, *, seed: int = 0, epoch_us: int = 1_700_000_000_000_000) -> None:
        self._seed = seed
        self._random: random.Random | None = None
        """Made when it is asked for: of most crash images it never is."""
        self._epoch_us = epoch_us
        self._folders: dict[str, Folder] = {}
        self._stores: dict[str, StoreImage] = {}
        self._freed: deque[bytes] = deque(maxlen=FREED_FILES)
        self._faults: list[_Fault] = []
        self._held: trio.Event | None = None
        """Set by `release`; None: nothing is held."""
        self._dead = False
        self.clock_offset_us = 0
        self.operations: dict[str, int] = {}
        """How often each operation was called."""
        self.free_bytes: float = math.inf
        """What ``allocate`` and growing writes may still take before ENOSPC."""
        self.after_operation: Callable[[Operation, str], None] | None = None
        """Is called after each operation that changed something, with its path. Crash images
        taken here show every moment."""

    # -- what tests do to it --

    def fail(
        self,
        operation: Operation,
        error: int = errno.EIO,
        *,
        after: int = 0,
        times: float = 1,
        written: int = 0,
    ) -> None:
        """Let calls fail with an ``OSError``.

        Args:
          operation: which call.
          error: its errno.
          after: how many calls still succeed first.
          times: how many then fail; `math.inf`: all of them.
          written: for ``"pwrite"``: bytes that reach the file before the error.
        """
        self._faults.append(_Fault(operation, error, after, times, written))

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()
        self.free_bytes = math.inf

    def hold(self) -> None:
        """Stall: writes and syncs of open logs do not begin until ``release``."""
        if self._held is None:
            self._held = trio.Event()

    def release(self) -> None:
        """Let go on what `hold` holds; nothing happens where nothing is held."""
        held, self._held = self._held, None
        if held is not None:
            held.set()

    async def gate(self) -> None:
        """Where an open log waits before each write."""
        while self._held is not None:
            await self._held.wait()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def crash(self, seed: int = 0, kind: CrashKind = "power") -> MemoryFiles:
        """What is found after a crash now; this file system is dead from here on.

        Args:
          seed: decides what becomes of everything that was not synced.
          kind: ``"kill"``: the process dies, all that it wrote stays.  ``"power"``: sectors
              that were not synced are lost, kept, torn, garbage or stale (of a deleted
              file), and of the directory operations that were not synced a beginning is kept.
        """
        after = self.crash_image(seed, kind)
        self._dead = True
        return after

    def crash_image(self, seed: int = 0, kind: CrashKind = "power") -> MemoryFiles:
        """Like `crash`, and this file system lives on."""
        # What recovers a crash, or the crash of that, never draws a salt again.
        after = MemoryFiles(seed=hash((self._seed, 1)), epoch_us=self._epoch_us)
        after.clock_offset_us = self.clock_offset_us
        after._freed = self._freed.copy()
        if kind == "kill":
            self._kill(after)
        else:
            self._lose_power(after, seed)
        after._stores = {path: store.copy() for path, store in self._stores.items()}
        return after

    def _kill(self, after: MemoryFiles) -> None:
        """The kernel lives on: what was not synced still is not."""
        images: dict[Inode, Inode] = {}

        def image(inode: Inode) -> Inode:
            found = images.get(inode)
            if found is None:
                found = images[inode] = inode.copy()
            return found

        for path, folder in self._folders.items():
            after._folders[path] = Folder(
                {name: image(inode) for name, inode in folder.names.items()},
                {name: image(inode) for name, inode in folder.disk.items()},
                [
                    Change(change.old, change.new, image(change.inode)) if change.inode else change
                    for change in folder.pending
                ],
                published=folder.published,
                words=folder.words.copy(),
            )

    def _lose_power(self, after: MemoryFiles, seed: int) -> None:
        rng: random.Random | None = None
        for path, folder in self._folders.items():
            names = folder.disk.copy()
            if folder.pending:
                rng = rng or random.Random(seed)
                for change in folder.pending[: rng.randint(0, len(folder.pending))]:
                    change.apply(names)
            # A file has one name at a time: nothing is taken twice.
            for name, inode in names.items():
                disk = inode.disk
                if inode.dirty or len(disk) != len(inode.data):
                    rng = rng or random.Random(seed)
                    names[name] = inode.after_power_loss(rng, self._freed)
                else:
                    disk = inode.disk = bytes(disk)
                    names[name] = Inode(disk, disk)
            word = random.Random(seed).choice(folder.words)
            after._folders[path] = Folder(names, names.copy(), published=word, words=[word])

    def names(self, path: str) -> list[str]:
        """The files of a directory."""
        return sorted(self._folder(path).names)

    def contents(self, path: str) -> dict[str, bytes]:
        """Every file of a directory and its bytes."""
        return {name: bytes(i.data) for name, i in sorted(self._folder(path).names.items())}

    def read_file(self, path: str, name: str) -> bytes:
        """What a program would read, synced or not.  Raises `KeyError` where there is no such
        file."""
        return bytes(self._folder(path).names[name].data)

    def write_file(self, path: str, name: str, data: bytes) -> None:
        """Put a file there, durably, or replace it."""
        content = bytes(data)
        inode = Inode(content, content)
        folder = self._folders.setdefault(path, Folder())
        folder.names[name] = inode
        folder.disk[name] = inode

    def remove_file(self, path: str, name: str) -> None:
        """Take a file away, durably.  Raises `KeyError` where there is none."""
        del self._folder(path).names[name]
        self._folder(path).disk.pop(name, None)

    def flip_bit(self, path: str, name: str, bit: int) -> None:
        """Rot: invert one bit, on the disk and in the cache."""
        self._folder(path).names[name].flip(bit)

    def _folder(self, path: str) -> Folder:
        try:
            return self._folders[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None

    # -- faults --

    def _begin(self, operation: Operation, path: str) -> None:
        """Count a call, and let it fail if it is its turn."""
        fault = self._due(operation, path)
        if fault is not None:
            raise OSError(fault.error, os.strerror(fault.error), path)

    def _due(self, operation: Operation, path: str) -> _Fault | None:
        if self._dead:
            raise OSError(errno.EIO, "this file system has crashed", path)
        self.operations[operation] = self.operations.get(operation, 0) + 1
        for fault in self._faults:
            if fault.operation != operation:
                continue
            if fault.skip:
                fault.skip -= 1
            elif fault.times:
                fault.times -= 1
                return fault
        return None

    def _take(self, growth: int, path: str) -> None:
        if growth > self.free_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        self.free_bytes -= growth

    def _done(self, operation: Operation, path: str) -> None:
        if self.after_operation is not None:
            self.after_operation(operation, path)

    # -- what logs do with it --

    def exists(self, path: str) -> bool:
        return any(f"{name}/".startswith(f"{path}/") for name in (*self._folders, *self._stores))

    def open_directory(
        self, path: str, *, create: bool = False, follow: bool = True
    ) -> MemoryDirectory:
        self._begin("open", path)
        made: tuple[str, ...] = ()
        if create and path not in self._folders:
            self._folders[path] = Folder()
            made = (path,)
        return MemoryDirectory(self, path, self._folder(path), made)

    def begin_directory(self, path: str) -> str:
        if self.exists(path):
            raise FileExistsError(
                errno.EEXIST, "the destination of the backup already exists", path
            )
        # What a crash has left there has another random part in its name on a disk.
        self.discard_directory(f"{path}.tmp")
        return f"{path}.tmp"

    def finish_directory(self, temporary: str, path: str) -> None:
        if self.exists(path):
            raise FileExistsError(
                errno.EEXIST, "the destination of the backup already exists", path
            )
        for kept in (self._folders, self._stores):
            for name in [name for name in kept if f"{name}/".startswith(f"{temporary}/")]:
                kept[path + name.removeprefix(temporary)] = kept.pop(name)  # type: ignore[assignment]

    def discard_directory(self, temporary: str) -> None:
        for kept in (self._folders, self._stores):
            for name in [name for name in kept if f"{name}/".startswith(f"{temporary}/")]:
                del kept[name]

    def time_us(self) -> int:
        try:
            seconds = trio.current_time()
        except RuntimeError:
            seconds = time.monotonic()
        return self._epoch_us + int(seconds * 1e6) + self.clock_offset_us

    def random_bytes(self, count: int) -> bytes:
        if self._random is None:
            self._random = random.Random(self._seed)
        return self._random.randbytes(count)

    def on_fork(self, callback: Callable[[], None]) -> None:
        pass

    def absolute(self, path: str) -> str:
        return path

    def inspect_store(self, path: str) -> StoreState | None:
        store = self._stores.get(path)
        return None if store is None else store.state

    def check_store(self, path: str, how: StoreCheckLevel, progress: Progress | None) -> None:
        pass

    def open_store(self, path: str, map_size: int) -> MemoryStore:
        store = self._stores.setdefault(path, StoreImage())
        return MemoryStore(self, path, store)

    def open_store_reader(self, path: str) -> MemoryStoreReader:
        return MemoryStoreReader(self, path)

    def remove_store(self, path: str) -> None:
        self._stores.pop(path, None)

    def set_store_aside(self, path: str, dest: str) -> None:
        self._begin("store", path)
        store = self._stores.pop(path, None)
        if store is not None:
            self._stores[dest] = store

    def remove_directories(self, paths: Sequence[str]) -> None:
        for path in paths:
            folder = self._folders.get(path)
            if folder is None or folder.names or self._has_children(path):
                return
            del self._folders[path]

    def _has_children(self, path: str) -> bool:
        return any(name.startswith(f"{path}/") for name in (*self._folders, *self._stores))


@final
class MemoryStore:
    """Stands in for LMDB: a piece of a checkpoint is there whole, and durable, or not at all."""

    def __init__(self, files: MemoryFiles, path: str, image: StoreImage) -> None:
        self.path = path
        self._files = files
        self._image = image

    def read(self) -> ReadTransaction:
        return MemoryRead(self._image.items)

    def apply(self, items: Iterable[tuple[bytes, bytes | None]], state: StoreState | None) -> None:
        self._files._begin("store", self.path)
        changed = self._image.items.copy()
        for key, value in items:
            if value is None:
                changed.pop(key, None)
            else:
                changed[key] = value
        self._image.items = changed
        if state is not None:
            self._image.state = state
        self._files._done("store", self.path)

    def crowded(self, needed: int) -> bool:
        return False

    def grow(self) -> None:
        pass

    def copy(self, path: str) -> None:
        self._files._stores[path] = self._image.copy()

    def statistics(self) -> tuple[int, int]:
        return len(self._image.items), sum(map(len, self._image.items.values()))

    def close(self) -> None:
        pass


@final
class MemoryStoreReader:
    """Another process's look at a `MemoryStore`."""

    def __init__(self, files: MemoryFiles, path: str) -> None:
        self._files = files
        self._path = path

    def _image(self) -> StoreImage:
        return self._files._stores.get(self._path) or StoreImage()

    def read(self) -> tuple[ReadTransaction, StoreState | None]:
        image = self._image()
        return MemoryRead(image.items), image.state

    def size(self) -> int:
        return sum(map(len, self._image().items.values()))

    def close(self) -> None:
        pass


@final
class MemoryFile:
    """An open file of `MemoryFiles`."""

    def __init__(self, files: MemoryFiles, path: str, inode: Inode) -> None:
        self.path = path
        self._files = files
        self._inode = inode

    def pread(self, length: int, offset: int) -> bytes:
        self._files._begin("pread", self.path)
        return bytes(self._inode.data[offset : offset + length])

    def next_data(self, offset: int) -> int:
        """As file systems know holes: by sectors, not by bytes."""
        while sector := self._inode.data[offset : (offset // SECTOR + 1) * SECTOR]:
            if sector.count(0) != len(sector):
                return offset
            offset += len(sector)
        return offset

    def pwrite(self, pieces: Sequence[bytes], offset: int) -> None:
        data = b"".join(pieces)
        fault = self._files._due("pwrite", self.path)
        if fault is not None:
            if fault.written:
                self._inode.write(data[: fault.written], offset)
            raise OSError(fault.error, os.strerror(fault.error), self.path)
        if data:  # writing nothing behind the end does not grow a file
            self._files._take(max(0, offset + len(data) - len(self._inode.data)), self.path)
            self._inode.write(data, offset)
        self._files._done("pwrite", self.path)

    def sync(self, *, in_place: bool = False) -> None:
        fault = self._files._due("sync", self.path)
        if fault is not None:
            # As kernels do: the pages count as clean from now on, and are not on the disk.
            self._inode.dirty.clear()
            raise OSError(fault.error, os.strerror(fault.error), self.path)
        self._inode.sync()
        self._files._done("sync", self.path)

    def write_back(self, length: int, offset: int) -> None:
        pass

    def written_bytes(self) -> int:
        return 0

    def allocate(self, size: int) -> None:
        self._files._begin("allocate", self.path)
        growth = size - len(self._inode.data)
        if growth > 0:
            self._files._take(growth, self.path)
            self._inode.resize(size)
            self._files._done("allocate", self.path)

    def truncate(self, size: int) -> None:
        self._files._begin("truncate", self.path)
        self._files.free_bytes += max(0, len(self._inode.data) - size)
        self._inode.resize(size)
        self._files._done("truncate", self.path)

    def size(self) -> int:
        return len(self._inode.data)

    def close(self) -> None:
        pass


@final
class MemoryDirectory:
    """An open directory of `MemoryFiles`."""

    def __init__(
        self, files: MemoryFiles, path: str, folder: Folder, made: tuple[str, ...] = ()
    ) -> None:
        self.path = path
        self.made: tuple[str, ...] = made
        self._files = files
        self._folder = folder

    def names(self) -> list[str]:
        return sorted(self._folder.names)

    def open(self, name: str, *, create: bool = False, writable: bool = False) -> MemoryFile:
        path = f"{self.path}/{name}"
        self._files._begin("open", path)
        inode = self._folder.names.get(name)
        if create:
            if inode is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            inode = Inode()
            self._folder.change(Change(None, name, inode))
            self._files._done("open", path)
        elif inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return MemoryFile(self._files, path, inode)

    def rename(self, old: str, new: str) -> None:
        self._files._begin("rename", f"{self.path}/{old}")
        if old not in self._folder.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), old)
        if old != new and new in self._folder.names:
            self._files.free_bytes += len(self._folder.names[new].data)
        self._folder.change(Change(old, new))
        self._files._done("rename", f"{self.path}/{new}")

    def rename_new(self, old: str, new: str) -> None:
        if new in self._folder.names:
            path = f"{self.path}/{new}"
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self.rename(old, new)

    def unlink(self, name: str) -> None:
        self._files._begin("unlink", f"{self.path}/{name}")
        if name not in self._folder.names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        data = self._folder.names[name].data
        self._files.free_bytes += len(data)
        if len(data) > SECTOR:
            self._files._freed.append(bytes(data[:FREED_BYTES]))
        self._folder.change(Change(name, None))
        self._files._done("unlink", f"{self.path}/{name}")

    def sync(self) -> None:
        self._files._begin("sync_dir", self.path)
        self._folder.sync()
        self._files._done("sync_dir", self.path)

    def check_trusted(self) -> None:
        pass

    def is_there(self) -> bool:
        return self._files._folders.get(self.path) is self._folder

    def unmake(self) -> None:
        made, self.made = self.made, ()
        self._files.remove_directories(made)

    def lock(self) -> None:
        self._files._begin("lock", self.path)
        if self._folder.owner is not None:
            raise LogLockedError(self.path, os.getpid())
        self._folder.owner = self

    def reread(self, name: str, keep: range = range(0)) -> None:
        pass

    def sign(self, *, new: bool = False) -> None:
        if new:
            self._folder.published, self._folder.words = NO_WORD, [NO_WORD]

    def publish(self, durable_lsn: int, epoch: int) -> None:
        word = self._folder.published = Word(durable_lsn, epoch)
        self._folder.words.append(word)

    def published(self) -> Word:
        return self._folder.published

    def watch(self) -> Watch | None:
        return None

    def close(self) -> None:
        if self._folder.owner is self:
            self._folder.owner = None


__all__ = ["SECTOR", "MemoryFiles"]

_exports.say_public(__name__, {name: globals()[name] for name in __all__ if name != "SECTOR"})
