"""Logs on servers, for the commands that read: `inspect` and `verify` of a URL.

Law: connects, reads and writes nothing; a log that is being written is not disturbed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from trio_wal._exceptions import CorruptLogError
from trio_wal._identity import epoch_of
from trio_wal._reader import open_reader
from trio_wal._replicated import open_remote_source
from trio_wal.nats import SCHEMES, Log

from ._output import ExitCode, UsageError, complain, count, say, write_json


def is_url(place: str | Path) -> bool:
    scheme, separator, _ = str(place).partition("://")
    return bool(separator) and scheme in SCHEMES


def parse(url: str) -> Log:
    """Raises `UsageError`."""
    try:
        return Log.parse(url)
    except (ValueError, TypeError) as exc:
        raise UsageError(str(exc)) from exc


def inspect(url: str, json: bool) -> int:
    found = trio.run(_look, parse(url))
    if json:
        write_json(found)
        return ExitCode.OK
    say(found["path"])
    say(f"log {found['uuid']}, epoch {found['epoch']}")
    records = count(found["records"], "record")
    if found["records"]:
        records += f", LSN {found['first_lsn']} to {found['last_lsn']}, all durable"
    say(f"{records}; {count(found['messages'], 'message')}, {count(found['bytes'], 'byte')}")
    say(f"{found['replicas_current']} of {count(found['replicas'], 'replica')} up to date")
    return ExitCode.OK


async def _look(log: Log) -> dict[str, Any]:
    source = await open_remote_source(log)
    try:
        tail, found = source.tail, await source.log.describe()
    finally:
        with trio.CancelScope(shield=True):
            await source.aclose()
    return {
        "path": log.address,
        "uuid": str(found.uuid),
        "epoch": epoch_of(tail.history),
        "first_lsn": tail.first_lsn,
        "last_lsn": tail.last_lsn,
        "records": tail.last_lsn + 1 - tail.first_lsn,
        "messages": found.last + 1 - found.first,
        "bytes": found.bytes,
        "replicas": found.replicas,
        "replicas_current": found.replicas_current,
    }


def verify(url: str, json: bool) -> int:
    result = trio.run(_read_all, parse(url))
    if json:
        write_json(result)
    elif result["ok"]:
        checked = f"{count(result['records'], 'record')}, {count(result['bytes'], 'byte')}"
        if result["records"]:
            checked += f", LSN {result['first_lsn']} to {result['last_lsn']}"
        say(f"OK: {checked}")
    else:
        say(result["findings"][0]["reason"])
        say(f"1 finding; readable: {count(result['records'], 'record')}")
    return ExitCode.OK if result["ok"] else ExitCode.FINDINGS


async def _read_all(log: Log) -> dict[str, Any]:
    """Whatever is read is checked: each frame, and that it continues the one before it."""
    first_lsn = records = size = 0
    findings: list[dict[str, str]] = []
    async with open_reader(log) as reader, reader.read() as stream:
        try:
            async for batch in stream.batches(None):
                first_lsn = first_lsn or batch[0].lsn
                records += len(batch)
                size += sum(len(record.data) for record in batch)
        except CorruptLogError as exc:
            complain(f"{log.address}: damaged after LSN {first_lsn + records - 1}")
            findings.append({"path": exc.path, "reason": str(exc)})
    return {
        "ok": not findings,
        "path": log.address,
        "first_lsn": first_lsn or 1,
        "last_lsn": (first_lsn or 1) + records - 1,
        "records": records,
        "bytes": size,
        "findings": findings,
    }
