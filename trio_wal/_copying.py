"""A copy of a database as somebody sees it who is not its owner: for `DatabaseReader.backup`.

Law: under another name until it is durable, as a backup of the owner's; the other database is only
read.  The owner copies its store's pages (`_core`); who reads beside it has layers above a store
that may be older, so that what he sees is written anew, key by key, in order.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import trio

from ._base import MapFull, Store, StoreState
from ._disk.chain import LOG_NAME, STORE_NAME
from ._disk.frame import FEATURE_DATABASE, Meta
from ._disk.repair import create_empty
from ._files import Files
from ._pairs import PairStream
from ._stores import stores_of
from ._util import MiB
from ._worker import Blocking

PIECE_BYTES: Final = 4 * MiB
"""What is written, and synced, at once."""


async def copy_database(
    files: Files,
    blocking: Blocking,
    dest: str,
    pairs: PairStream,
    state: StoreState,
    meta: Meta,
    size: int,
) -> None:
    """Args:
    pairs: every key and value, in order.
    state: what the copy's store says of itself.
    meta: of the log that it is a copy of.
    size: about so many bytes.
    """
    temporary = await blocking(files.begin_directory, dest)
    try:
        map_size = max(16 * MiB, 2 * size)
        path = f"{temporary}/{STORE_NAME}"
        store = await blocking(stores_of(files).open_store, path, map_size)
        try:
            await _fill(blocking, store, pairs, state)
        finally:
            store.close()
        empty = partial(
            create_empty,
            log_uuid=meta.log_uuid,
            first_lsn=state.lsn + 1,
            features=meta.features | FEATURE_DATABASE,
            history=meta.history,
            consumers=meta.consumers,
        )
        await blocking(empty, files, f"{temporary}/{LOG_NAME}")
        await trio.lowlevel.checkpoint()
        await blocking(files.finish_directory, temporary, dest)
    except BaseException:
        with trio.CancelScope(shield=True):
            await blocking(files.discard_directory, temporary)
        raise


async def _fill(blocking: Blocking, store: Store, pairs: PairStream, state: StoreState) -> None:
    keys: list[bytes] = []
    values: list[bytes] = []
    size = 0
    async with pairs:
        async for key, value in pairs:
            keys.append(key)
            values.append(value)
            size += len(key) + len(value)
            if size >= PIECE_BYTES:
                await blocking(_apply, store, keys, values, None)
                keys, values, size = [], [], 0
    await blocking(_apply, store, keys, values, state)


def _apply(store: Store, keys: list[bytes], values: list[bytes], state: StoreState | None) -> None:
    while True:
        try:
            store.apply(zip(keys, values, strict=True), state)
        except MapFull:
            store.grow()
        else:
            return
