"""A disk that remembers: one file over FUSE, every write and barrier in order.

Law: the process that serves it does nothing else.  It reads the program's messages from a pipe
before each request: a message that was read after n writes was sent after no more than n, so
it binds every power cut at n or later.

It speaks to /dev/fuse itself (linux/fuse.h); the mount point is a plain file, so there is
nothing to look up.  A loop device on that file sends a barrier (FSYNC) for each flush of the
file system above.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import select
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import attrs

from . import _mounts

SECTOR: Final = 512
"""What a disk writes whole."""

_IN: Final = struct.Struct("<IIQQIIIHH")
_OUT: Final = struct.Struct("<IiQ")
_READ: Final = struct.Struct("<QQIIQII")
_WRITE: Final = _READ
_ATTRIBUTES: Final = struct.Struct("<QQQQQQIIIIIIIIII")
_MAX_WRITE: Final = 1 << 17
_BUFFER: Final = _MAX_WRITE + 4096
_ROOT: Final = 1

_GETATTR, _OPEN, _READ_OP, _WRITE_OP = 3, 14, 15, 16
_RELEASE, _FSYNC, _FLUSH, _INIT = 18, 20, 25, 26
_FORGET, _INTERRUPT, _BATCH_FORGET = 2, 36, 42
_NO_REPLY: Final = frozenset({_FORGET, _INTERRUPT, _BATCH_FORGET})
_FOPEN_DIRECT_IO: Final = 1
_BIG_WRITES: Final = 1 << 5


@attrs.define
class Recording:
    """What a disk went through, from the content it began with."""

    system: str
    base: bytes
    writes: list[tuple[int, bytes] | None] = attrs.Factory(list)
    """(offset, data) of each write, None for each barrier, in the order of completion."""
    messages: list[tuple[int, str]] = attrs.Factory(list)
    """(writes and barriers before it was read, line) of the program."""
    failed: list[tuple[int, str]] = attrs.Factory(list)
    """(place, what) of each request that was answered with an error; its data is in no write."""

    def save(self, path: str) -> None:
        with open(path, "wb") as file:
            pickle.dump(attrs.astuple(self, recurse=False), file)

    @classmethod
    def load(cls, path: str) -> Recording:
        with open(path, "rb") as file:
            return cls(*pickle.load(file))  # our own file


@attrs.define
class Fault:
    """Answers requests with EIO, from a message that is ``since`` until one that is ``until``:
    those that hold ``marker``, or any, from the n-th on."""

    marker: bytes | None = None
    until: str = ""
    after: int = 0
    kind: str = "write"
    """"write" or "barrier"."""
    count: int = 1
    """How many in a row."""
    since: str = ""

    def heard(self, line: str) -> None:
        if line == self.since:
            self.since = ""
        if line == self.until:
            self.count = 0

    def hits(self, kind: str, data: bytes = b"") -> bool:
        if self.since or not self.count or kind != self.kind:
            return False
        if self.marker is not None and self.marker not in data:
            return False
        if self.after:
            self.after -= 1
            return False
        self.count -= 1
        return True


class _Messages:
    """Lines from the program's pipe."""

    def __init__(self, fd: int) -> None:
        self.fd: int = fd
        self._rest = b""
        self.ended = False
        os.set_blocking(fd, False)

    def take(self) -> Iterator[str]:
        """All that can be had without waiting."""
        while not self.ended:
            try:
                chunk = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return
            self.ended = not chunk
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode()


class BlockStore:
    """Serves one file, from the moment it is mounted until `stop` is closed."""

    def __init__(
        self, recording: Recording, messages: int, stop: int, fault: Fault | None = None
    ) -> None:
        self._recording = recording
        self._content = bytearray(recording.base)
        self._messages = _Messages(messages)
        self._stop = stop
        self._fault = fault or Fault(count=0)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._handlers: dict[int, Callable[[bytes], bytes]] = {
            _INIT: self._init,
            _GETATTR: self._getattr,
            _OPEN: lambda _: struct.pack("<QII", 0, _FOPEN_DIRECT_IO, 0),
            _READ_OP: self._read,
            _WRITE_OP: self._write,
            _FSYNC: self._fsync,
            _FLUSH: lambda _: b"",
            _RELEASE: lambda _: b"",
        }

    def mount(self, target: str) -> None:
        """``target`` is a file."""
        options = f"fd={self._device},rootmode={stat.S_IFREG | 0o600:o},user_id=0,group_id=0"
        _mounts.mount("block-store", target, "fuse", 0, options)

    def close(self) -> None:
        """In a process that only forked the one that serves."""
        os.close(self._device)

    def serve(self) -> Recording:
        poll = select.poll()
        for fd in (self._device, self._messages.fd, self._stop):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            self._hear()
            if self._messages.ended and self._messages.fd in ready:
                poll.unregister(self._messages.fd)
            if self._device in ready:
                if not self._answer():
                    break
            elif self._stop in ready:
                break
        os.close(self._device)
        return self._recording

    def _hear(self) -> None:
        place = len(self._recording.writes)
        for line in self._messages.take():
            self._recording.messages.append((place, line))
            self._fault.heard(line)

    def _answer(self) -> bool:
        """One request; False once the file is unmounted."""
        try:
            request = os.read(self._device, _BUFFER)
        except OSError as exc:
            if exc.errno == errno.ENODEV:
                return False
            if exc.errno in (errno.ENOENT, errno.EAGAIN):
                return True
            raise
        # What was sent before this request was made is in the pipe by now.
        self._hear()
        _, operation, unique, *_ = _IN.unpack_from(request)
        if operation in _NO_REPLY:
            return True
        number, answer = 0, b""
        try:
            handler = self._handlers.get(operation)
            if handler is None:
                number = errno.ENOSYS
            else:
                answer = handler(request[_IN.size :])
        except OSError as exc:
            number = exc.errno or errno.EIO
        # ENOENT: nobody waits for it any more.
        with contextlib.suppress(FileNotFoundError):
            os.write(self._device, _OUT.pack(_OUT.size + len(answer), -number, unique) + answer)
        return True

    def _init(self, request: bytes) -> bytes:
        _, _, readahead, _ = struct.unpack_from("<IIII", request)
        return struct.pack(
            "<IIIIHHIIHHI28x", 7, 31, readahead, _BIG_WRITES, 16, 12, _MAX_WRITE, 1, 0, 0, 0
        )

    def _getattr(self, request: bytes) -> bytes:
        size = len(self._content)
        attributes = _ATTRIBUTES.pack(
            *(_ROOT, size, size // SECTOR, 0, 0, 0, 0, 0, 0),
            *(stat.S_IFREG | 0o600, 1, 0, 0, 0, 4096, 0),
        )
        return struct.pack("<QII", 1, 0, 0) + attributes

    def _read(self, request: bytes) -> bytes:
        _, offset, size, *_ = _READ.unpack_from(request)
        return bytes(self._content[offset : offset + size])

    def _write(self, request: bytes) -> bytes:
        _, offset, size, *_ = _WRITE.unpack_from(request)
        data = request[_WRITE.size : _WRITE.size + size]
        if self._fault.hits("write", data):
            self._recording.failed.append((len(self._recording.writes), f"write at {offset}"))
            raise OSError(errno.EIO, "as asked for")
        if offset + size > len(self._content):
            raise OSError(errno.ENOSPC, "behind the end of the disk")
        self._content[offset : offset + size] = data
        self._recording.writes.append((offset, data))
        return struct.pack("<II", size, 0)

    def _fsync(self, request: bytes) -> bytes:
        if self._fault.hits("barrier"):
            self._recording.failed.append((len(self._recording.writes), "barrier"))
            raise OSError(errno.EIO, "as asked for")
        self._recording.writes.append(None)
        return b""


def _main(target: str, system: str, base: str, saved: str) -> None:
    """A process of its own: it serves a copy of ``base`` as ``target`` until that is unmounted, is
    told messages on its standard input, and at last writes the recording to ``saved``."""
    # Nobody closes it: the end is the unmounting.
    never, _ = os.pipe()
    store = BlockStore(Recording(system, Path(base).read_bytes()), 0, never)
    store.mount(target)
    print("mounted", flush=True)
    store.serve().save(saved)


if __name__ == "__main__":
    _main(*sys.argv[1:])
