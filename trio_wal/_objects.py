"""An `Archive` in an object storage, through obstore.

Law: blocking; obstore is loaded when an `ObjectArchive` is made.  Nothing is ever put but on the
condition that it is not there.

What is larger than `PART_BYTES` stands there in parts, because a store takes a conditional put only
in one piece, which must be in memory: ``<name>.<number>.part``, and then ``<name>.parts``, which
says how many there are.  Parts without that are left by who was killed, and are not listed.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final, final

from ._archive import CHUNK_BYTES, is_same, taken
from ._exceptions import CorruptLogError, WrongDirectoryError
from ._exports import publish
from ._util import MiB

PART_BYTES: Final = 64 * MiB
"""What is held in memory, at most, and put at once."""
RACERS: Final = 2
_PART: Final = ".part"
_INDEX: Final = ".parts"


def _obstore() -> Any:
    try:
        import obstore
    except ModuleNotFoundError as exc:
        raise ModuleNotFoundError(
            "obstore is missing: python -m pip install 'trio-wal[s3]'", name="obstore"
        ) from exc
    return obstore


@final
class ObjectArchive:
    """An `Archive` in an object storage: S3 and compatible ones, Azure, Google Cloud.

    ::

        store = obstore.store.S3Store("bucket", region="eu-central-1")
        archive = trio_wal.ObjectArchive(store, prefix="bank")

    The store must support puts that fail if the name is taken (``If-None-Match: *``), as S3
    does.  A store that lets two of them succeed is refused when a log is opened with it.
    """

    def __init__(self, store: Any, *, prefix: str = "") -> None:
        """
        Args:
          store: of obstore, such as ``obstore.store.S3Store``.
          prefix: before every name, with a slash between; for several archives in one bucket.

        Raises:
          ModuleNotFoundError: obstore is not installed: the extra ``s3``.
        """
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, not {type(prefix).__name__}")
        self._obstore = _obstore()
        self._store = store
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._probed = False

    def put(self, name: str, content: Iterable[bytes]) -> None:
        """As `Archive.put`."""
        whole, rest = _first_part(content)
        if self._is_there(name if rest is not None else name + _INDEX):
            # Of another size, so something else.
            raise taken(self._path(name))
        if rest is None:
            if not self._create(name, whole) and not is_same(self.get(name), [whole]):
                raise taken(self._path(name))
            return
        count, size, part = 0, 0, whole
        while part:
            part_name = f"{name}.{count:05d}{_PART}"
            if not self._create(part_name, part) and not is_same(self._pieces(part_name), [part]):
                raise taken(self._path(name))
            count, size = count + 1, size + len(part)
            part, rest = (b"", None) if rest is None else _first_part(rest)
        index = json.dumps({"parts": count, "bytes": size}).encode()
        if not self._create(name + _INDEX, index) and not is_same(
            self._pieces(name + _INDEX), [index]
        ):
            raise taken(self._path(name))

    def list(self) -> list[str]:
        """As `Archive.list`."""
        found: list[str] = []
        for batch in self._obstore.list(self._store, prefix=self._prefix or None):
            for entry in batch:
                name = str(entry["path"]).removeprefix(self._prefix)
                if "/" not in name and not name.endswith(_PART):
                    found.append(name.removesuffix(_INDEX))
        return found

    def get(self, name: str) -> Iterator[bytes]:
        """As `Archive.get`."""
        try:
            yield from self._pieces(name)
        except FileNotFoundError as exc:
            try:
                index = b"".join(self._pieces(name + _INDEX))
            except FileNotFoundError:
                raise exc from None
            yield from self._parts(name, index)

    def _parts(self, name: str, index: bytes) -> Iterator[bytes]:
        try:
            count = int(json.loads(index)["parts"])
        except (ValueError, KeyError, TypeError) as exc:
            path = self._path(name + _INDEX)
            raise CorruptLogError(path, 0, "it does not say how many parts there are") from exc
        for number in range(count):
            yield from self._pieces(f"{name}.{number:05d}{_PART}")

    def probe(self) -> None:
        """See whether the store takes two puts under one name for what they are: called when a log
        is opened, and not again after it has passed.

        Raises:
          WrongDirectoryError: it lets both win.
        """
        if self._probed:
            return
        name = f"probe-{secrets.token_hex(8)}"
        won: list[bool] = []
        errors: list[BaseException] = []

        def race(racer: int) -> None:
            try:
                won.append(self._create(name, b"%d" % racer))
            except BaseException as exc:  # noqa: BLE001, ASYNC103  (raised below)
                errors.append(exc)

        racers = [threading.Thread(target=race, args=(number,)) for number in range(RACERS)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        if won:
            self._obstore.delete(self._store, self._path(name))
        if errors:
            raise errors[0]
        if won.count(True) != 1:
            found = "a store where two win that put under one name at once"
            raise WrongDirectoryError(repr(self), found, "one with conditional writes")
        self._probed = True

    def _path(self, name: str) -> str:
        return self._prefix + name

    def _create(self, name: str, content: bytes) -> bool:
        """Put what is not there; False: something is."""
        try:
            self._obstore.put(self._store, self._path(name), content, mode="create")
        except self._obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def _is_there(self, name: str) -> bool:
        try:
            self._obstore.head(self._store, self._path(name))
        except FileNotFoundError:
            return False
        return True

    def _pieces(self, name: str) -> Iterator[bytes]:
        found = self._obstore.get(self._store, self._path(name))
        for piece in found.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(piece)

    def __repr__(self) -> str:
        return f"ObjectArchive({self._store!r}, prefix={self._prefix.rstrip('/')!r})"


def _first_part(content: Iterable[bytes]) -> tuple[bytes, Iterator[bytes] | None]:
    """As much as is put at once, and what comes after that; None: nothing."""
    pieces = iter(content)
    part = bytearray()
    for piece in pieces:
        part += piece
        if len(part) > PART_BYTES:
            rest = bytes(part[PART_BYTES:])
            del part[PART_BYTES:]
            return bytes(part), _chain(rest, pieces)
    return bytes(part), None


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


publish(ObjectArchive)
