"""The files of a store, and what they say of themselves, read without LMDB.

Law: LMDB trusts its file and its paths, so nothing here asks it: it would follow whatever the
pages say.  What is not a regular file of its own, in a directory that is no link, is refused.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from . import _pages
from ._base import StoreState
from ._exceptions import CorruptLogError, UnsupportedFormatError
from ._files import File, close_quietly
from ._places import PlacesError, decode_places
from ._system.files import OsDirectory
from ._system.store import open_store_directory, plain_size

DATA_NAME: Final = "data.mdb"
LOCK_NAME: Final = "lock.mdb"
SUSPECT_NAME: Final = "suspect"
"""Stands beside the data from a failed write on, until the data was read from the disk anew."""
STORE_FORMAT: Final = 1


def data_file(path: str) -> str:
    return f"{path}/{DATA_NAME}"


def store_size(path: str) -> int:
    """Bytes of a store's file, as far as that can be told."""
    try:
        directory = open_store_directory(path)
        try:
            return plain_size(directory, DATA_NAME) or 0
        finally:
            directory.close()
    except (OSError, CorruptLogError):
        return 0


def damaged(path: str, reason: str) -> CorruptLogError:
    return CorruptLogError(
        path,
        0,
        f"{reason}; where the log still starts at LSN 1, moving the store away lets "
        "open_database rebuild it from the log, otherwise restore a backup",
    )


def check_files(directory: OsDirectory) -> dict[str, int | None]:
    """The sizes of a store's files, None where there is none.

    Raises:
      CorruptLogError: one of them is not a regular file of its own: what LMDB, or a mark, would
          write there would be written elsewhere.
    """
    names = (DATA_NAME, LOCK_NAME, SUSPECT_NAME)
    return {name: plain_size(directory, name) for name in names}


def forget_suspect(directory: OsDirectory, sizes: dict[str, int | None]) -> None:
    """After a write of a store has failed: read it from the disk, not from the page cache."""
    if sizes[SUSPECT_NAME] is not None and sizes[DATA_NAME]:
        directory.reread(DATA_NAME)


@contextmanager
def opened_data(path: str) -> Generator[File | None]:
    """A store's data file, to read; None where there is none yet."""
    try:
        directory = open_store_directory(path)
    except FileNotFoundError:
        yield None
        return
    try:
        sizes = check_files(directory)
        forget_suspect(directory, sizes)
        if not sizes[DATA_NAME]:
            yield None
            return
        file = directory.open(DATA_NAME)
        try:
            yield file
        finally:
            close_quietly(file)
    finally:
        close_quietly(directory)


def inspect_store(path: str) -> StoreState | None:
    """What a store says of itself, without writing; None where there is none yet.

    LMDB is not asked: it would follow whatever the pages say.  After this it may be: the few
    pages that opening it reads have been checked.

    Raises:
      CorruptLogError: this is no store, or damaged, or the file is shorter than it says.
      UnsupportedFormatError: a newer trio-wal wrote it, or a newer LMDB.
      OSError: the disk's own.
    """
    with opened_data(path) as file:
        if file is None:
            return None
        try:
            _, _, meta = _pages.read_meta(file.pread, file.size())
        except _pages.PagesVersionError as exc:
            raise newer_pages(path, exc) from exc
        except _pages.PagesError as exc:
            raise found_at(path, exc.offset, exc.reason) from exc
        return state_of(path, meta)


def newer_pages(path: str, exc: _pages.PagesVersionError) -> UnsupportedFormatError:
    return UnsupportedFormatError(data_file(path), exc.version, "LMDB data version")


def found_at(path: str, offset: int, reason: str) -> CorruptLogError:
    error = damaged(data_file(path), reason)
    return CorruptLogError(error.path, offset, error.reason)


def state_of(path: str, meta: dict[bytes, bytes]) -> StoreState | None:
    """Raises `CorruptLogError`, `UnsupportedFormatError`."""
    name = data_file(path)
    lsn, uuid, version = (meta.get(key) for key in (b"lsn", b"log", b"format"))
    if lsn is None and uuid is None and version is None:
        return None
    if lsn is None or uuid is None or len(lsn) != 8 or len(uuid) != 16 or version is None:
        raise damaged(name, "the store does not say of which log it is the state")
    if (number := int.from_bytes(version, "little")) != STORE_FORMAT:
        raise UnsupportedFormatError(name, number, "store format")
    covered_lsn = int.from_bytes(lsn, "little")
    found = meta.get(_pages.CONSUMERS)
    if found is None:
        return StoreState(uuid, covered_lsn)
    commit_lsn = int.from_bytes(found[:8], "little")
    if commit_lsn > covered_lsn:
        raise damaged(name, f"a commit {commit_lsn} in a store of LSN {covered_lsn}")
    try:
        return StoreState(uuid, covered_lsn, decode_places(found[8:]), commit_lsn)
    except PlacesError as exc:
        raise damaged(name, f"the places of consumers: {exc}") from exc


def misfit(
    state: StoreState | None, log_uuid: bytes | None, base_lsn: int, last_lsn: int
) -> str | None:
    """Why a store and a log do not belong together; ``log_uuid`` None: there is no log."""
    if log_uuid is None:
        return None if state is None else "there is a store but no log"
    if state is None:
        if base_lsn > 1:
            return f"the store is missing, and the log starts at LSN {base_lsn}"
    elif state.log_uuid != log_uuid:
        return "the store belongs to another log"
    elif state.lsn > last_lsn:
        return f"the store holds LSN {state.lsn}, but its log ends at LSN {last_lsn}"
    elif state.lsn + 1 < base_lsn:
        return f"the store ends at LSN {state.lsn}, but its log starts at {base_lsn}"
    return None
