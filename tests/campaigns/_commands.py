"""What reads a database from outside, against a dictionary: `get`, `scan`, `dump --state`, and a
reader's backup; and what `sync_in` and the check of NATS servers promise.

Law: a case is a seed.  Everything is on real files, in a temporary folder; nothing is asked of a
server.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import trio

import trio_wal
from trio_wal import Bookmark
from trio_wal._cli import run
from trio_wal._system.files import OsFiles

State = dict[bytes, bytes]


class Wrong(Exception):
    """A promise was not kept; the text says which."""


def found_in(seed: int) -> str:
    """What is wrong, if anything."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="trio-wal-commands-") as folder:
        try:
            trio.run(_sync_in_the_loop, Path(folder) / "loop", rng)
            state, place = trio.run(_make, Path(folder) / "db", rng)
            _get(Path(folder) / "db", state, rng)
            _scan(Path(folder) / "db", state, rng)
            _dump(Path(folder), rng)
            trio.run(_backup, Path(folder), state, place)
            _servers(rng)
        except Wrong as exc:
            return f"seed {seed}: {exc}"
    return ""


def _expect(found: object, due: object, what: str) -> None:
    if found != due:
        raise Wrong(f"{what}: {found!r}, not {due!r}")


def _say(*arguments: object) -> tuple[int, bytes]:
    """A command's exit code, and what it prints."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    kept, sys.stdout = sys.stdout, out
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            code = run([str(argument) for argument in arguments])
        out.flush()
        buffer: Any = out.buffer
        return code, buffer.getvalue()
    finally:
        sys.stdout = kept


def _bytes_of(fields: dict[str, str]) -> bytes:
    if "text" in fields:
        return fields["text"].encode()
    return base64.b64decode(fields["base64"])


# -- a database -----------------------------------------------------------------------------------


async def _make(path: Path, rng: random.Random) -> tuple[State, int]:
    """What it holds, and where its consumer is."""
    state: State = {}
    place = 0
    async with trio_wal.open_database(path, segment_size=1) as db:
        for number in range(rng.randrange(4, 30)):
            key = rng.choice([b"a%d", b"b%d", b"b\xff%d"]) % rng.randrange(12)
            value = rng.randbytes(rng.choice([0, 3, 400]))
            if rng.random() < 0.2:
                await db.discard(key)
                state.pop(key, None)
            else:
                await db.put(key, value)
                state[key] = value
            if number == 2:
                # So that there is one to be given, whatever a checkpoint has dropped.
                await db.put(b"a", b"mail")
                state[b"a"] = b"mail"
                async with db.consumer("mail") as consumer:
                    commit = await consumer.__anext__()
                    await consumer.acknowledge(commit)
                    # The first one, or what a checkpoint before has left of the log.
                    place = commit.lsn
            if rng.random() < 0.1:
                await db.checkpoint()
        # The last commit is behind the last checkpoint: whoever reads sees layers, too.
        await db.put(b"last", b"one")
        state[b"last"] = b"one"
    return state, place


def _get(path: Path, state: State, rng: random.Random) -> None:
    for key in (rng.choice(sorted(state)), b"no such key", b"last"):
        code, said = _say("get", path, key.hex(), "--hex")
        _expect((code, said), (0 if key in state else 1, state.get(key, b"")), f"get {key!r}")


def _scan(path: Path, state: State, rng: random.Random) -> None:
    options: list[str] = []
    keys = sorted(state)
    if rng.random() < 0.5:
        options += ["--prefix", b"b".hex()]
        keys = [key for key in keys if key.startswith(b"b")]
    else:
        start, stop = sorted(rng.choices(keys, k=2))
        options += ["--start", start.hex(), "--stop", stop.hex()]
        keys = [key for key in keys if start <= key < stop]
    if rng.random() < 0.5:
        options.append("--reverse")
        keys.reverse()
    if rng.random() < 0.5:
        limit = rng.randrange(5)
        options += ["--limit", str(limit)]
        keys = keys[:limit]
    # So much is written at once: what a scan prints here comes to more now and then.
    with mock.patch("trio_wal._cli.scan.WRITE_BYTES", rng.choice((1, 500, 1 << 18))):
        code, said = _say("scan", path, "--hex", *options)
    lines = [json.loads(line) for line in said.splitlines()]
    found = [(_bytes_of(line["key"]), _bytes_of(line["value"])) for line in lines]
    _expect((code, found), (0, [(key, state[key]) for key in keys]), f"scan {options}")


async def _backup(folder: Path, state: State, place: int) -> None:
    async with trio_wal.open_database_reader(folder / "db") as reader:
        durable = reader.durable_lsn
        uuid, epoch = reader.uuid, reader.epoch
        lsn = await reader.backup(folder / "copy")
    _expect(lsn, durable, "the LSN of a reader's backup")
    async with trio_wal.open_database(folder / "copy") as db:
        _expect(dict(db.scan()), state, "a reader's backup")
        _expect((db.durable_lsn, db.uuid), (lsn, uuid), "end and uuid of a reader's backup")
        _expect(db.epoch > epoch, True, "a new epoch of a reader's backup")
        places = {name: one.acknowledged_lsn for name, one in db.statistics().consumers.items()}
        _expect(places, {"mail": place}, "places in a reader's backup")
        _expect(await db.put(b"more", b""), lsn + 1, "the first commit of a reader's backup")


# -- a log ------------------------------------------------------------------------------------


def _dump(folder: Path, rng: random.Random) -> None:
    """Calls with a state give every record once, and never one before its LSN."""
    log, state = folder / "dumped", folder / "state"
    due: list[int] = []
    found: list[int] = []
    for _ in range(3):
        due += trio.run(_append, log, rng.randrange(1, 6))
        code, said = _say("dump", log, "--state", state)
        _expect(code, 0, "dump --state")
        found += [json.loads(line)["lsn"] for line in said.splitlines()]
        _expect(found, due, "what dump --state gave")
        _expect(state.exists(), True, "whether a dump has kept its state")
        kept = Bookmark.parse(state.read_text().strip())
        _expect(kept.lsn, due[-1], "the state of a dump")


async def _append(log: Path, count: int) -> Iterable[int]:
    async with trio_wal.open_wal(log) as wal:
        return await wal.append_many([b"record"] * count)


async def _sync_in_the_loop(path: Path, rng: random.Random) -> None:
    """What is acknowledged can be read by others: the owner has told of it.  Where a thread did
    the write that may be a moment later."""
    async with trio_wal.open_wal(path, sync_in="loop") as wal:
        for _ in range(5):
            lsn = await wal.append(rng.randbytes(20))
            told = -1
            with trio.move_on_after(2):
                while (told := _told(path)) != lsn:  # noqa: ASYNC110  (a thread does it)
                    await trio.sleep(0.01)
            _expect(told, lsn, "what a log with sync_in='loop' tells of")
            _expect(wal.durable_lsn, lsn, "what is durable with sync_in='loop'")


def _told(path: Path) -> int:
    directory = OsFiles().open_directory(str(path))
    try:
        return directory.published().durable_lsn
    finally:
        directory.close()


# -- servers --------------------------------------------------------------------------------------


def _servers(rng: random.Random) -> None:
    # Here, because it needs nats-py.
    from trio_wal._natscheck import VERSION_MIN, Server, fault_of

    for _ in range(20):
        server = Server(
            url="http://one:8222",
            version=rng.choice([(2, 11, 9), (2, 12, 0), (2, 13), (3, 0, 1), ()]),
            jetstream=rng.random() < 0.7,
            synced=rng.random() < 0.7,
        )
        suits = server.version[:2] >= VERSION_MIN and server.jetstream and server.synced
        _expect(fault_of(server) is None, suits, f"whether {server} suits")
