"""`trio-wal verify`: every problem of a log, and nothing changed."""

from __future__ import annotations

import uuid

from attrs import asdict

from trio_wal import _verify
from trio_wal._exceptions import CorruptLogError

from ._output import (
    CommandError,
    Dir,
    ExitCode,
    Json,
    count,
    feature_names,
    opened,
    progress_bar,
    say,
    write_json,
)


def verify(directory: Dir, /, *, json: Json = False) -> int:
    """Check every frame of a log and print every problem.

    Reads only and takes no lock; the log may be written meanwhile. Exits with 1 if there
    are findings.
    """
    try:
        with opened(directory) as files, progress_bar("verifying", bytes_done=True) as bar:
            result = _verify.verify(files, bar.update)
    except CorruptLogError as exc:
        # No log at all; the error's own text would send the reader here.
        raise CommandError(f"{exc.path}: {exc.reason}") from exc
    if json:
        write_json(_as_json(result))
    else:
        _print(result)
    return ExitCode.FINDINGS if result.findings else ExitCode.OK


def _as_json(result: _verify.Verification) -> dict[str, object]:
    fields = asdict(result)
    fields["uuid"] = str(uuid.UUID(bytes=fields.pop("log_uuid")))
    fields["features"] = feature_names(result.features)
    return {"ok": not result.findings, **fields}


def _print(result: _verify.Verification) -> None:
    for finding in result.findings:
        say(f"{finding.path}: offset {finding.offset}: {finding.reason}{_lost(finding)}")
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


def _lost(finding: _verify.Finding) -> str:
    first, last = finding.first_lsn, finding.last_lsn
    if first is None:
        return ""
    if last is None:
        return f" (lost: LSN {first} and all behind it)"
    return f" (lost: LSN {first})" if first == last else f" (lost: LSN {first} to {last})"
