"""``consumers``: up to where the consumers of a log have acknowledged.

Law: blocking; no trio.  The file is never changed, but replaced by one that is durable.  It
belongs to one log, and says to which.  A log without consumers has none, and in the log of a
database they stand elsewhere (`_operations`).
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import Final, final

from trio_wal._exceptions import CorruptLogError, LogFullError, UnsupportedFormatError
from trio_wal._files import NO_SPACE, Directory
from trio_wal._places import PLACES_BYTES_MAX, Place, PlacesError, decode_places, encode_places

from .chain import PLACES_NAME, PLACES_NEW_NAME
from .frame import crc32c

PLACES_MAGIC: Final = b"twplace\n"
PLACES_VERSION: Final = 1
_HEAD: Final = Struct("<8sHHI16s")
"""Magic, version, reserved, bytes of the places, uuid of the log; then these, and a checksum of
all before it."""
_CRC_BYTES: Final = 4


def encode_file(log_uuid: bytes, places: Mapping[str, Place]) -> bytes:
    body = encode_places(places)
    data = _HEAD.pack(PLACES_MAGIC, PLACES_VERSION, 0, len(body), log_uuid) + body
    return data + crc32c(data).to_bytes(_CRC_BYTES, "little")


def decode_file(path: str, data: bytes, log_uuid: bytes) -> dict[str, Place]:
    """Raises `CorruptLogError` or `UnsupportedFormatError`."""

    def damaged(reason: str) -> CorruptLogError:
        return CorruptLogError(
            path, 0, f"{reason}; without this file every consumer of the log begins anew"
        )

    if len(data) < _HEAD.size + _CRC_BYTES:
        raise damaged(f"the places of consumers are cut short: {len(data)} bytes")
    magic, version, _, size, uuid = _HEAD.unpack_from(data)
    if magic != PLACES_MAGIC:
        raise damaged(f"these are no places of consumers: it starts with {magic!r}")
    if version != PLACES_VERSION:
        raise UnsupportedFormatError(path, version, "version of the places of consumers")
    end = _HEAD.size + size
    if size > PLACES_BYTES_MAX or len(data) != end + _CRC_BYTES:
        raise damaged(f"{len(data)} bytes, and places of {size}")
    if crc32c(data[:end]).to_bytes(_CRC_BYTES, "little") != data[end:]:
        raise damaged("checksum of the places of consumers does not match")
    if uuid != log_uuid:
        raise damaged("the places of consumers are those of another log")
    try:
        return decode_places(data[_HEAD.size : end])
    except PlacesError as exc:
        raise damaged(str(exc)) from exc


def read_places(directory: Directory, log_uuid: bytes) -> dict[str, Place]:
    """Those of a log; none where there is no file.

    Raises:
      CorruptLogError, UnsupportedFormatError, OSError
    """
    try:
        file = directory.open(PLACES_NAME)
    except FileNotFoundError:
        return {}
    try:
        longest = _HEAD.size + PLACES_BYTES_MAX + _CRC_BYTES
        data = file.pread(longest + 1, 0)
    finally:
        file.close()
    return decode_file(f"{directory.path}/{PLACES_NAME}", data, log_uuid)


@final
class PlacesFile:
    """That of an open log."""

    def __init__(self, directory: Directory, log_uuid: bytes, found: Mapping[str, Place]) -> None:
        self.found: Final = found
        """What stood there when the log was opened."""
        self._directory = directory
        self._log_uuid = log_uuid

    def write(self, places: Mapping[str, Place]) -> None:
        """As `write_places`."""
        write_places(self._directory, self._log_uuid, places)


def write_places(directory: Directory, log_uuid: bytes, places: Mapping[str, Place]) -> None:
    """Replace them, durably and all at once.

    Raises:
      LogFullError: there is no room; what stood there stands there.
      OSError: they may have been replaced or not.
    """
    data = encode_file(log_uuid, places)
    if PLACES_NEW_NAME in directory.names():
        directory.unlink(PLACES_NEW_NAME)
    try:
        file = directory.open(PLACES_NEW_NAME, create=True)
        try:
            file.pwrite([data], 0)
            file.sync()
        finally:
            file.close()
    except OSError as exc:
        if exc.errno in NO_SPACE:
            raise LogFullError(directory.path, len(data), "no place of a consumer moves") from exc
        raise
    directory.rename(PLACES_NEW_NAME, PLACES_NAME)
    directory.sync()
