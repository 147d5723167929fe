"""Checking all of a store: every page as bytes, then every key through LMDB in a child process.

Law: nothing is written, and no page of a store ends this process.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from time import perf_counter, sleep
from typing import Final

import attrs

from . import _pages
from ._base import Progress, StoreCheckLevel, StoreState
from ._exceptions import CorruptLogError, UnsupportedFormatError
from ._files import File
from ._store import TURN_PAUSE_SECONDS, TURN_SECONDS, read_everything
from ._store_files import data_file, found_at, newer_pages, opened_data, state_of, store_size
from ._system.child import ChildError, run_child
from ._util import MiB

log = logging.getLogger("trio_wal")

AUTO_BYTES_MAX: Final = 128 * MiB
"""A store up to this size is checked on opening after a crash: 3 ms per MiB, so 0.4 s at most."""
LOOK_TRIES: Final = 20
"""How often a store that is written all the time is looked at before it is left unjudged."""


@attrs.frozen
class StoreCheck:
    """What `check_store` found."""

    path: str
    """Of the data file."""
    findings: tuple[tuple[int, str], ...]
    """(offset, reason)"""
    state: StoreState | None
    keys: int
    bytes: int
    note: str = ""
    """What could not be checked, and why."""


def check_store(
    path: str, progress: Progress | None = None, *, read_through: bool = True
) -> StoreCheck:
    """Check every page, and then whether LMDB reads every key; nothing is written.

    The pages are read as bytes, so nothing that they say can do harm.  ``read_through``: only
    where they are sound is all of it read through LMDB as well, both ways and key by key, in a
    child process: a page that cannot be read ends that one and not this.

    The store may be written meanwhile, and pages be used anew: what is found counts only where
    the headers stood still.

    Raises:
      CorruptLogError: what stands there is no store's file.
      UnsupportedFormatError: a newer trio-wal wrote it, or a newer LMDB.
      OSError: the disk's own.
    """
    name = data_file(path)
    with opened_data(path) as file:
        if file is None:
            return StoreCheck(name, (), None, 0, 0)
        for _ in range(LOOK_TRIES):
            before = _headers(file)
            try:
                found = _check_once(path, file, read_through, progress)
            except UnsupportedFormatError:
                if _headers(file) == before:
                    raise
                continue
            if not found.findings or _headers(file) == before:
                return found
        size = file.size()
    note = "the store was being written all the time, and could not be judged"
    return StoreCheck(name, (), None, 0, size, note)


def _headers(file: File) -> bytes:
    return file.pread(2 * _pages.PAGE_BYTES_MAX, 0)


def _check_once(path: str, file: File, read_through: bool, progress: Progress | None) -> StoreCheck:
    name, size = data_file(path), file.size()
    try:
        contents = _pages.check(file.pread, size, _Ticks(size, progress))
    except _pages.PagesVersionError as exc:
        raise newer_pages(path, exc) from exc
    if contents.findings:
        return StoreCheck(name, contents.findings, None, 0, size)
    try:
        state = state_of(path, contents.meta)
    except CorruptLogError as exc:
        return StoreCheck(name, ((0, exc.reason.partition(";")[0]),), None, 0, size)
    findings: tuple[tuple[int, str], ...] = ()
    note = ""
    if read_through:
        try:
            findings = tuple((0, reason) for reason in _read_in_child(path, contents.entries))
        except ChildError as exc:
            note = f"the pages were checked, but the store was not read through LMDB: {exc}"
    if progress is not None:
        progress(size, size)
    return StoreCheck(name, findings, state, contents.entries, size, note)


class _Ticks:
    """Tells how far a check is, and lets the event loop have its turn."""

    def __init__(self, size: int, progress: Progress | None) -> None:
        self._size = size
        self._progress = progress
        self._done = 0
        self._since = perf_counter()

    def __call__(self, done: int) -> None:
        self._done += done
        if perf_counter() - self._since > TURN_SECONDS:
            if self._progress is not None:
                self._progress(min(self._done, self._size), self._size)
            sleep(TURN_PAUSE_SECONDS)
            self._since = perf_counter()


def _read_in_child(path: str, entries: int) -> Iterator[str]:
    """What is wrong with reading the store through LMDB."""
    output, crash = run_child("_store_check", "read_as_child", path)
    if crash:
        yield f"reading the store through LMDB ends the process ({crash})"
        return
    try:
        answer = json.loads(output)
    except ValueError as exc:
        raise ChildError("the child process did not answer") from exc
    if answer["refused"]:
        raise ChildError(answer["refused"])
    if answer["wrong"]:
        yield answer["wrong"]
    elif answer["keys"] != entries:
        yield f"LMDB reads {answer['keys']} keys of {entries}"


def read_as_child() -> None:
    """What the child process does."""
    keys, wrong, refused = 0, "", ""
    try:
        keys = read_everything(sys.argv[1])
    except CorruptLogError as exc:
        wrong = exc.reason.partition(";")[0]
    except (OSError, MemoryError) as exc:
        refused = str(exc) or type(exc).__name__
    sys.stdout.write(json.dumps({"keys": keys, "wrong": wrong, "refused": refused}))


def check_before_open(path: str, how: StoreCheckLevel, progress: Progress | None) -> None:
    """`check_store` before a store is opened; ``"auto"``: its pages, where there are not too many.

    Raises:
      CorruptLogError: the first finding.
      UnsupportedFormatError, OSError
    """
    if how == "auto" and store_size(path) > AUTO_BYTES_MAX:
        return
    found = check_store(path, progress, read_through=how == "child")
    if found.findings:
        raise found_at(path, *found.findings[0])
    if found.note:
        log.warning("%s: %s", found.path, found.note)
