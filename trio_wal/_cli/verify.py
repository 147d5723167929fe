"""`trio-wal verify`: every problem of a log or a database, and nothing changed."""

from __future__ import annotations

import uuid
from pathlib import Path

import attrs
from attrs import asdict

from trio_wal import _admin
from trio_wal._disk.chain import LOG_NAME, STORE_NAME
from trio_wal._disk.finding import TOLD, Finding
from trio_wal._disk.frame import feature_names
from trio_wal._disk.verify import Verification, verify as verify_log
from trio_wal._exceptions import CorruptLogError
from trio_wal._store_check import StoreCheck
from trio_wal._system.files import OsFiles

from . import _servers
from ._output import (
    CommandError,
    ExitCode,
    Json,
    Place,
    count,
    is_database,
    opened,
    progress_bar,
    say,
    write_json,
)


def verify(place: Place, /, *, json: Json = False) -> int:
    """Check every frame of a log and print every problem.

    For a database, it also checks the store (every page, then every key through LMDB in a child
    process), and that log and store fit together. Reads only and takes no lock; log and store
    may be written meanwhile. Exits with 1 if there are findings.

    Example: `trio-wal verify orders.wal`
    """
    if _servers.is_url(place):
        return _servers.verify(place, json)
    directory = Path(place)
    if is_database(directory):
        return _verify_database(directory, json)
    try:
        with opened(directory) as files, progress_bar("verifying", bytes_done=True) as bar:
            result = verify_log(files, bar.update)
    except CorruptLogError as exc:
        # No log at all; the error's own text would send the reader here.
        raise CommandError(f"{exc.path}: {exc.reason}") from exc
    if json:
        write_json(_as_json(result))
    else:
        _print(result)
    return ExitCode.FINDINGS if result.findings else ExitCode.OK


def _verify_database(directory: Path, json: bool) -> int:
    whole = OsFiles().absolute(str(directory))
    log, store = f"{whole}/{LOG_NAME}", f"{whole}/{STORE_NAME}"
    with progress_bar("verifying", bytes_done=True) as bar:
        result = _admin.verify_database(
            log, store, lambda: OsFiles().open_directory(log, follow=False), bar.update
        )
    if json:
        fields = {} if result.log is None else _as_json(result.log)
        fields["ok"] = not result.findings
        fields["findings"] = [asdict(finding, filter=TOLD) for finding in result.findings]
        write_json({**fields, "store": _store_as_json(result.store)})
    else:
        _print_database(result)
    return ExitCode.FINDINGS if result.findings else ExitCode.OK


def _store_as_json(store: StoreCheck) -> dict[str, object]:
    lsn = None if store.state is None else store.state.lsn
    fields = {"path": store.path, "lsn": lsn, "keys": store.keys, "bytes": store.bytes}
    return {**fields, "note": store.note}


def _print_database(result: _admin.DatabaseVerification) -> None:
    store = result.store
    if result.log is not None:
        _print(attrs.evolve(result.log, findings=result.findings))
    else:
        _print_findings(result.findings)
        say(count(len(result.findings), "finding"))
    if store.note:
        say(f"{store.path}: {store.note}")
    elif store.state is not None:
        keys, size = count(store.keys, "key"), count(store.bytes, "byte")
        say(f"store: {keys}, {size}, LSN {store.state.lsn}")
    elif not result.findings:
        say("store: empty, the log has everything")


def _as_json(result: Verification) -> dict[str, object]:
    fields = asdict(result, filter=TOLD)
    fields["uuid"] = str(uuid.UUID(bytes=fields.pop("log_uuid")))
    fields["features"] = feature_names(result.features)
    return {"ok": not result.findings, **fields}


def _print(result: Verification) -> None:
    _print_findings(result.findings)
    checked = (
        f"{count(result.segments, 'segment')}, {count(result.frames, 'frame')}, "
        f"{count(result.records, 'record')}, {count(result.bytes, 'byte')}"
    )
    if result.findings:
        say(f"{count(len(result.findings), 'finding')}; readable: {checked}")
        return
    if result.last_lsn >= result.first_lsn:
        checked += f", LSN {result.first_lsn} to {result.last_lsn}"
    say(f"OK: {checked}")
    if result.torn_bytes:
        say(
            f"{count(result.torn_bytes, 'byte')} of an unfinished batch at the end: no damage; "
            "a writer is at work, or was killed"
        )


def _print_findings(findings: tuple[Finding, ...]) -> None:
    for finding in findings:
        say(f"{finding.path}: offset {finding.offset}: {finding.reason}{_lost(finding)}")


def _lost(finding: Finding) -> str:
    first, last = finding.first_lsn, finding.last_lsn
    if first is None:
        return ""
    if last is None:
        return f" (lost: LSN {first} and all behind it)"
    return f" (lost: LSN {first})" if first == last else f" (lost: LSN {first} to {last})"
