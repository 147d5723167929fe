"""What an archive says of what it holds: whose it is, and manifests; small objects of JSON.

Law: blocking.  What an archive gives is checked before it is believed.  A module of its own, so
that a log without an archive does not load it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from uuid import UUID

import attrs

from ._archive import Archive
from ._exceptions import CorruptLogError, UnsupportedFormatError, WrongDirectoryError
from ._files import File
from ._identity import History, Parting
from ._util import KiB

IDENTITY_NAME: Final = "archive.json"
IDENTITY_FORMAT: Final = 1
MANIFEST_BYTES_MAX: Final = 64 * KiB
_OBJECT: Final = re.compile(r"\d{20}-[0-9a-f-]+\.(json|mdb|wal)", re.ASCII)
"""Names of what is kept in archives."""


def write_pieces(
    file: File, content: Iterable[bytes], size_max: int, tick: Callable[[int], None]
) -> tuple[int, str]:
    """Write into an empty file, until it is larger than ``size_max``; returns its size, and its
    SHA-256 in hex."""
    digest, size = hashlib.sha256(), 0
    for piece in content:
        digest.update(piece)
        file.pwrite([piece], size)
        size += len(piece)
        tick(len(piece))
        if size > size_max:
            break
    return size, digest.hexdigest()


def get_small(archive: Archive, name: str, size_max: int) -> bytes:
    """All of a small object.

    Raises:
      FileNotFoundError
      CorruptLogError: it is larger than such a thing can be.
    """
    pieces: list[bytes] = []
    size = 0
    for piece in archive.get(name):
        pieces.append(piece)
        size += len(piece)
        if size > size_max:
            raise CorruptLogError(name, 0, f"more than {size_max} bytes")
    return b"".join(pieces)


# -- manifests ----------------------------------------------------------------------------


def encode_manifest(fields: Mapping[str, object]) -> bytes:
    """A manifest as JSON, with a checksum of its own: what it says is believed."""
    return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1).encode() + b"\n"


def _checksum(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_manifest(archive: Archive, name: str, kind: str) -> dict[str, Any]:
    """The fields of a manifest, whose checksum is good.

    Raises:
      CorruptLogError: it is none; ``kind`` says of what.
      FileNotFoundError
    """
    try:
        fields = dict(json.loads(get_small(archive, name, MANIFEST_BYTES_MAX)))
        checksum = fields.pop("checksum")
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise CorruptLogError(name, 0, f"this is not a manifest of {kind}: {exc!r}") from exc
    if checksum != _checksum(fields):
        raise CorruptLogError(name, 0, f"checksum of the manifest of {kind} does not match")
    return fields


def history_as_json(history: History) -> list[list[int]]:
    return [[parting.epoch, parting.after_lsn] for parting in history]


def history_of_json(value: Any) -> History:
    """Raises `ValueError` or `TypeError`."""
    return tuple(Parting(int(epoch), int(after_lsn)) for epoch, after_lsn in value)


# -- whose archive ------------------------------------------------------------------------


@attrs.frozen
class Identity:
    """Whose archive something is."""

    log: UUID | None
    """None: nobody's yet, it is empty."""

    def check(self, archive: Archive, log: UUID | None) -> None:
        """Raises `WrongDirectoryError` where it is another log's.

        Args:
          log: None: one that does not exist yet, and so has no archive.
        """
        if self.log is not None and self.log != log:
            found = f"the archive of the log {self.log}"
            raise WrongDirectoryError(repr(archive), found, "an archive of its own for every log")


def read_identity(archive: Archive) -> Identity:
    """Whose an archive is.

    Raises:
      WrongDirectoryError: there are other things than an archive's.
      CorruptLogError, UnsupportedFormatError
    """
    try:
        data = get_small(archive, IDENTITY_NAME, MANIFEST_BYTES_MAX)
    except FileNotFoundError:
        names = sorted(archive.list())
        if IDENTITY_NAME in names:
            # Put by somebody else in between: a backup and the archiver begin one together.
            data = get_small(archive, IDENTITY_NAME, MANIFEST_BYTES_MAX)
        elif not names or any(map(_OBJECT.fullmatch, names)):
            return Identity(None)
        else:
            found = f"no archive: it holds {names[0]!r}"
            raise WrongDirectoryError(repr(archive), found, "an empty one") from None
    try:
        content = json.loads(data)
        version, log = int(content["format"]), UUID(content["log"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptLogError(IDENTITY_NAME, 0, f"it does not say whose archive: {exc!r}") from exc
    if version != IDENTITY_FORMAT:
        raise UnsupportedFormatError(IDENTITY_NAME, version, "format of the archive")
    return Identity(log)


def probe(archive: Archive) -> None:
    """Have an archive that can tell see whether it is one: `ObjectArchive.probe`.

    Raises:
      WrongDirectoryError: it is none.
    """
    look = getattr(archive, "probe", None)
    if callable(look):
        look()


def put_identity(archive: Archive, log: UUID) -> None:
    """Make sure that this is the log's archive.

    Raises:
      WrongDirectoryError: it is another log's, or none.
    """
    probe(archive)
    read_identity(archive).check(archive, log)
    content = {"format": IDENTITY_FORMAT, "log": str(log)}
    try:
        archive.put(IDENTITY_NAME, [json.dumps(content).encode()])
    except FileExistsError:
        # Another was faster, or writes it in other words.
        read_identity(archive).check(archive, log)
