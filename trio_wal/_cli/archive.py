"""`trio-wal archive`: what an archive has, and whether that is whole."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import attrs
from cyclopts import App, Parameter

from trio_wal import _admin
from trio_wal._archive import DirectoryArchive
from trio_wal._disk.finding import TOLD
from trio_wal._disk.frame import to_datetime
from trio_wal._restorable import Base, Piece

from ._output import (
    CommandError,
    ExitCode,
    Json,
    complain,
    count,
    new_table,
    progress_bar,
    say,
    show,
    write_json,
)

archive_app: Final = App(name="archive", help="Look at the archive of a log or a database.")

ArchiveDir: TypeAlias = Annotated[
    Path, Parameter(name="DIR", help="The directory of an archive (DirectoryArchive).")
]


def open_archive(path: Path) -> DirectoryArchive:
    """Raises `FileNotFoundError`: an archive makes its directory only when it is put to use."""
    if not path.is_dir():
        raise CommandError(f"{path}: there is no such directory")
    return DirectoryArchive(path)


@archive_app.command(name="list")
def list_(directory: ArchiveDir, /, *, json: Json = False) -> int:
    """List the segments and backups of an archive, by their manifests.

    Reads manifests only; `trio-wal archive verify` reads everything. Exits with 1 if a manifest
    is damaged.

    Example: `trio-wal archive list /backup/orders`
    """
    found = _admin.list_archive(open_archive(directory))
    rows = sorted(
        [*map(_segment_row, found.pieces), *map(_backup_row, found.bases)],
        key=lambda row: (row["first_lsn"], row["kind"], row["last_lsn"]),
    )
    if json:
        damaged = [{"path": exc.path, "reason": exc.reason} for exc in found.damaged]
        write_json({"path": str(directory.absolute()), "objects": rows, "damaged": damaged})
    else:
        _print_rows(rows)
    for exc in found.damaged:
        complain(f"{exc.path}: {exc.reason}")
    return ExitCode.FINDINGS if found.damaged else ExitCode.OK


def _segment_row(piece: Piece) -> dict[str, Any]:
    told = piece.manifest
    return {
        "kind": "segment",
        "first_lsn": told.first_lsn,
        "last_lsn": told.last_lsn,
        "epoch": told.name.epoch,
        "first_time": to_datetime(told.first_time_us),
        "last_time": to_datetime(told.last_time_us),
        "bytes": told.size,
        "object": told.data,
    }


def _backup_row(base: Base) -> dict[str, Any]:
    told = base.manifest
    return {
        "kind": "backup",
        "first_lsn": told.lsn,
        "last_lsn": told.lsn,
        "epoch": told.epoch,
        "first_time": None,
        "last_time": None,
        "bytes": told.size,
        "object": told.data,
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    table = new_table(
        "kind", "LSN", "until (UTC)", "epoch", "bytes", numbers=("bytes",), plain=True
    )
    for row in rows:
        lsns = str(row["last_lsn"])
        if row["kind"] == "segment":
            lsns = f"{row['first_lsn']} to {lsns}"
        size = f"{row['bytes']:,}"
        table.add_row(row["kind"], lsns, _when(row["last_time"]), f"{row['epoch']:x}", size)
    show(table)
    kinds = [row["kind"] for row in rows]
    segments, backups = kinds.count("segment"), kinds.count("backup")
    total = sum(row["bytes"] for row in rows)
    say(f"{count(segments, 'segment')}, {count(backups, 'backup')}, {count(total, 'byte')}")


def _when(time: datetime | None) -> str:
    return "" if time is None else time.strftime("%Y-%m-%d %H:%M:%S")


@archive_app.command
def verify(directory: ArchiveDir, /, *, json: Json = False) -> int:
    """Read everything in an archive, print every problem, and say how far it can be restored.

    The digest of every object is compared, and every frame of a segment is checked. A place where
    segments are missing is a problem, too. Writes nothing. Exits with 1 if there are findings.

    Example: `trio-wal archive verify /backup/orders`
    """
    archive = open_archive(directory)
    with progress_bar("verifying", bytes_done=True) as bar:
        found = _admin.verify_archive(archive, bar.update)
    if json:
        fields = attrs.asdict(found, filter=TOLD)
        fields["uuid"] = None if found.uuid is None else str(found.uuid)
        write_json({"ok": not found.findings, "path": archive.path, **fields})
    else:
        _print_verification(found)
    return ExitCode.FINDINGS if found.findings else ExitCode.OK


def _print_verification(found: _admin.ArchiveVerification) -> None:
    for finding in found.findings:
        say(f"{finding.path}: {finding.reason}")
    checked = (
        f"{count(found.segments, 'segment')}, {count(found.backups, 'backup')}, "
        f"{count(found.bytes, 'byte')}"
    )
    if found.findings:
        say(f"{count(len(found.findings), 'finding')}; whole: {checked}")
    else:
        say(f"OK: {checked}")
    if found.first_lsn is None or found.last_lsn is None:
        say("it can be restored to no LSN")
        return
    when = "" if found.last_time is None else f", {_when(found.last_time)} UTC"
    say(f"it can be restored to LSN {found.first_lsn} to {found.last_lsn}{when}")
