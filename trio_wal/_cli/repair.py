"""`trio-wal repair`: what is wrong, what it would cost to go on, and with leave, doing it."""

from __future__ import annotations

from typing import Annotated, Literal

from attrs import asdict
from cyclopts import Parameter

from trio_wal._repair import Repair, RepairReport
from trio_wal._system.files import OsFiles

from . import _servers
from ._output import CommandError, ExitCode, Json, LocalPlace, count, progress_bar, say, write_json


def repair(
    place: LocalPlace,
    /,
    *,
    accept_loss: Annotated[
        bool,
        Parameter(negative=(), show_default=False, help="Do it; without this, nothing is changed."),
    ] = False,
    keep: Annotated[
        Literal["oldest", "newest"],
        Parameter(help="Which part of a log to keep if it has a gap."),
    ] = "oldest",
    rebuild_store: Annotated[
        bool,
        Parameter(
            negative=(),
            show_default=False,
            help="Set a database's store aside without reading it, and rebuild it from the log: "
            "for a damaged store that claims to be of a newer trio-wal.",
        ),
    ] = False,
    json: Json = False,
) -> int:
    """Make a damaged log or database open again, or say what that would lose.

    Copies every file that it changes or drops into a directory `before-repair-1` (or a higher
    number) next to them, cuts the log before its first damage, and begins a new epoch there.
    A database loses nothing that its store has. A damaged store is set aside, and rebuilt from
    the log if the log goes back to the beginning. No process may have it open.

    Exits with 1 if there is damage and `--accept-loss` was not given.

    Example: `trio-wal repair orders.wal`, and if the loss is acceptable,
    `trio-wal repair orders.wal --accept-loss`
    """
    if _servers.is_url(place):
        raise CommandError(
            f"{place}: the servers repair their copies of a replicated log from each other"
        )
    files = OsFiles()
    with progress_bar("looking", bytes_done=True) as bar:
        report = Repair(
            files,
            files.absolute(place),
            accept_loss=accept_loss,
            keep=keep,
            trust_directory=False,
            tick=bar.update,
            rebuild_store=rebuild_store,
        ).run()
    if json:
        write_json(_as_json(report))
    else:
        _print(report)
    return ExitCode.FINDINGS if report.damage and not report.done else ExitCode.OK


def _as_json(report: RepairReport) -> dict[str, object]:
    lost = [[gone.start, gone.stop - 1] for gone in report.lost]
    fields = asdict(report, recurse=True)
    return {**fields, "lost": lost, "lost_records": report.lost_records}


def _print(report: RepairReport) -> None:
    for one in report.damage:
        say(f"{one.path}: offset {one.offset}: {one.reason}")
    if not report.damage:
        say("OK: nothing is to be repaired")
        return
    done = report.done
    for gone in report.lost:
        which = f"LSN {gone.start}" if len(gone) == 1 else f"LSN {gone.start} to {gone.stop - 1}"
        say(f"{'lost' if done else 'would be lost'}: {which}, {count(len(gone), 'record')}")
    if report.lost_more:
        say("there may have been more records after those; nothing tells of them any more")
    if not report.lost and not report.lost_more:
        say(f"no record {'was' if done else 'would be'} lost")
    if report.consumers_lost:
        say("the places of consumers are gone: each begins anew")
    if report.store == "rebuilt":
        say(f"the store {'was' if done else 'would be'} set aside; the next open rebuilds it")
    last = report.last_lsn
    kept = f"LSN {report.first_lsn} to {last}" if last >= report.first_lsn else "no record"
    say(f"the log {'has' if done else 'would have'} {kept}")
    if report.copies is not None:
        say(f"what was there before is in {report.copies}")
    if not done:
        say("nothing was changed; --accept-loss does it, after copies were made")
