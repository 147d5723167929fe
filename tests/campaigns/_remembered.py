"""What recovery and reader made of a file, for the next image that holds the same one.

Law: only what is made of the bytes of one file, and of arguments, is remembered; while it is
made there is no other file to see.  What is done to a log as a whole is done to each image:
its segments put in a row, its end decided on and mended, the seals and copies written.

Of a log's segments all but one or two are the same in thousands of images.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Final, final

from trio_wal._disk import recovery as _recovery
from trio_wal._disk.chain import META_NAME
from trio_wal._disk.cursor import Cursor
from trio_wal._disk.directory import LogDirectory
from trio_wal._disk.segment import SegmentInfo
from trio_wal._engine import Record

REMEMBERED_MAX: Final = 600
"""Files; each has some ten KiB."""


@final
class _File:
    """A file that nobody writes."""

    def __init__(self, path: str, content: bytes) -> None:
        self.path = path
        self._content = content

    def pread(self, length: int, offset: int) -> bytes:
        return self._content[offset : offset + length]

    def next_data(self, offset: int) -> int:
        return offset

    def size(self) -> int:
        return len(self._content)

    def close(self) -> None:
        pass


@final
class _Alone:
    """A directory in which nothing but one file can be seen."""

    def __init__(self, path: str, name: str, content: bytes) -> None:
        self.path = path
        self._name = name
        self._content = content

    def open(self, name: str) -> _File:
        if name != self._name:
            raise AssertionError(f"{name!r} is read to judge {self._name!r}")
        return _File(f"{self.path}/{name}", self._content)


def _content(directory: Any, name: str) -> bytes | None:
    """Of a file in memory; None where there is none."""
    inode = directory._folder.names.get(name)
    return None if inode is None else bytes(inode.data)


_NAME_OF: Final[dict[str, Callable[..., str]]] = {
    "read_meta": lambda: META_NAME,
    "read_segment": lambda name: name,
    "_examine_last": lambda last, *_: last.file_name,
    "_examine_sealed": lambda segment, *_: segment.file_name,
}
"""Functions of recovery that are given a directory and read one file in it: which one, by
their other arguments."""


class Memory:
    """Of one simulation."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self._read: dict[Hashable, list[Record]] = {}
        self._functions = {
            name: self._remembering(vars(_recovery)[name], name_of)
            for name, name_of in _NAME_OF.items()
        }

    def _keep(self, memory: dict[Hashable, Any], key: Hashable, made: Any) -> None:
        if len(memory) >= REMEMBERED_MAX:
            memory.clear()
        memory[key] = made

    def _remembering(
        self, original: Callable[..., Any], name_of: Callable[..., str]
    ) -> Callable[..., Any]:
        memory, place = self._made, original.__name__

        def remembered(directory: Any, *arguments: Any, **more: Any) -> Any:
            name = name_of(*arguments)
            content = _content(directory, name)
            if content is None:
                return original(directory, *arguments, **more)
            key = (place, content, directory.path, arguments, *more.values())
            made = memory.get(key)
            if made is None:
                made = original(_Alone(directory.path, name, content), *arguments, **more)
                self._keep(memory, key, made)
            return made

        return remembered

    @contextmanager
    def of_recovery(self) -> Iterator[None]:
        """Have recovery look at no file that it has looked at before."""
        module = vars(_recovery)
        before = {name: module[name] for name in self._functions}
        module.update(self._functions)
        try:
            yield
        finally:
            module.update(before)

    def read_sealed(self, log: LogDirectory, segment: SegmentInfo, cursor: Cursor) -> list[Record]:
        """The records of a segment at whose first one the cursor stands; then it is behind."""
        key = (_content(log._directory, segment.name), segment)
        records = self._read.get(key)
        if records is None:
            records = []
            while cursor.next_lsn < segment.next_lsn:
                records += cursor.chunk(segment.next_lsn)
            self._keep(self._read, key, records)
        cursor.next_lsn = segment.next_lsn
        return records
