"""`trio-wal restore`: a log or a database as it was at some place, made of an archive."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import attrs
from cyclopts import Parameter

from trio_wal._exceptions import RestoreGapError
from trio_wal._restore import RestoreReport, restore as restore_log

from ._output import ExitCode, Json, UsageError, complain, count, progress_bar, say, write_json


async def restore(
    source: Annotated[
        Path,
        Parameter(name="SRC", help="An archive, a backup that was never opened, or a log."),
    ],
    dest: Annotated[Path, Parameter(name="DEST", help="A directory that does not exist yet.")],
    /,
    *,
    to_lsn: Annotated[int | None, Parameter(help="The last record to restore.")] = None,
    to_time: Annotated[
        str | None,
        Parameter(
            help="The last commit at or before this time: ISO 8601 with a time zone, such as "
            "2026-11-29T12:00:00Z."
        ),
    ] = None,
    epoch: Annotated[
        str | None,
        Parameter(
            help="An older history's epoch, in hexadecimal digits: see trio-wal archive list."
        ),
    ] = None,
    tail: Annotated[
        Path | None,
        Parameter(help="The log or database itself, for the end that is not archived yet."),
    ] = None,
    dry_run: Annotated[
        bool,
        Parameter(negative=(), show_default=False, help="Only say what would be restored."),
    ] = False,
    json: Json = False,
) -> int:
    """Make a log or a database from an archive, as it was at some LSN or time.

    Begins with the newest backup before that and continues with the segments after it. Every
    byte is checked. DEST appears only once it is whole. Without --to-lsn and --to-time,
    everything is restored. If something is missing, it exits with 1 and says how far it can
    restore.

    Example: `trio-wal restore /backup/bank bank.db --to-time 2026-11-29T12:00:00Z`
    """
    if to_lsn is not None and to_time is not None:
        raise UsageError("--to-lsn and --to-time cannot be combined")
    with progress_bar("restoring", bytes_done=True) as bar:
        try:
            report = await restore_log(
                source,
                dest,
                to_lsn=to_lsn,
                to_time=None if to_time is None else _time(to_time),
                epoch=None if epoch is None else _epoch(epoch),
                tail=tail,
                dry_run=dry_run,
                on_progress=bar.update,
            )
        except (ValueError, TypeError) as exc:
            if isinstance(exc, OSError) or type(exc) not in (ValueError, TypeError):
                raise
            raise UsageError(str(exc)) from exc
        except RestoreGapError as exc:
            complain(str(exc))
            return ExitCode.FINDINGS
    if json:
        write_json({**attrs.asdict(report), "uuid": str(report.uuid)})
    else:
        _print(report)
    return ExitCode.OK


def _time(text: str) -> datetime:
    # Python 3.10 does not know the Z.
    plain = f"{text[:-1]}+00:00" if text[-1:] in ("Z", "z") else text
    try:
        time = datetime.fromisoformat(plain)
    except ValueError as exc:
        example = "2026-11-29T12:00:00Z"
        raise UsageError(f"--to-time must be a time such as {example}, not {text!r}") from exc
    if time.utcoffset() is None:
        raise UsageError(f"--to-time must have a time zone, such as a Z at its end, not {text!r}")
    return time


def _epoch(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError as exc:
        raise UsageError(f"--epoch must be hexadecimal digits, not {text!r}") from exc


def _print(report: RestoreReport) -> None:
    what = "database" if report.database else "log"
    made = "would be made" if report.dry_run else "made"
    say(f"{report.path}: {what} {made}, up to LSN {report.last_lsn}{_when(report.last_time)}")
    begun = "" if report.backup_lsn is None else f"the backup of LSN {report.backup_lsn} and "
    say(f"from {begun}{count(report.segments, 'segment')}, {count(report.bytes, 'byte')}")


def _when(time: datetime | None) -> str:
    return "" if time is None else f", of {time.isoformat()}"
