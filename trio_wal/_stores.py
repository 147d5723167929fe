"""Which stores go with which files.

Law: the only place that chooses.  `_files` knows no store, and a database no LMDB.
"""

from __future__ import annotations

from typing import final

from ._base import Progress, Store, StoreCheckLevel, StoreReader, Stores, StoreState
from ._files import Files
from ._store import LmdbStore
from ._store_check import check_before_open
from ._store_files import DATA_NAME, LOCK_NAME, SUSPECT_NAME, inspect_store
from ._store_reader import LmdbStoreReader
from ._system.files import OsFiles
from ._system.paths import move_aside, sync_by_path
from ._system.store import open_store_directory, remove_file


def stores_of(files: Files) -> Stores:
    """Their own, as files in memory have them, or else LMDB's."""
    return files if isinstance(files, Stores) else LmdbStores()


@final
class LmdbStores:
    """Stores in the file system of the operating system."""

    def inspect_store(self, path: str) -> StoreState | None:
        return inspect_store(path)

    def check_store(self, path: str, how: StoreCheckLevel, progress: Progress | None) -> None:
        check_before_open(path, how, progress)

    def open_store(self, path: str, map_size: int) -> Store:
        return LmdbStore(path, map_size)

    def open_store_reader(self, path: str) -> StoreReader:
        return LmdbStoreReader(path)

    def remove_store(self, path: str) -> None:
        try:
            directory = open_store_directory(path)
        except FileNotFoundError:
            return
        try:
            for name in (DATA_NAME, LOCK_NAME, SUSPECT_NAME):
                remove_file(directory, name)
        finally:
            directory.close()
        OsFiles().remove_directories([path])

    def set_store_aside(self, path: str, dest: str) -> None:
        move_aside(path, dest)
        sync_by_path(path.rpartition("/")[0])
