"""How an open log or database fares, in one word and with reasons: `Health`.

Law: values only; each reason is a function of what it was told, and nothing here looks anything
up.  ``degraded`` is what may end by itself, or by what an operator does, without a restart;
``failed`` is what does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, final

import attrs

from ._exports import publish
from ._statistics import WalStatistics

CROWDED: Final = 0.9
"""Of the queue, in records or bytes."""
CROWDED_SECONDS: Final = 5.0
"""A queue that has been crowded for so long is told: for an instant is how it should be."""
UNSETTLED_SECONDS: Final = 5.0
"""Servers that have not settled a batch for so long have perhaps lost their quorum."""
ARCHIVE_SEGMENTS_MAX: Final = 3
"""Sealed segments that an archive may lack that gets none; of more it is told after
`ARCHIVE_SECONDS`."""
ARCHIVE_SECONDS: Final = 5.0
ARCHIVE_SEGMENTS_FAR: Final = 48
"""More than an archive lacks that keeps up: three times as many as are put there together."""
BEHIND_SECONDS: Final = 5.0
"""A replica that is behind for so long is told."""

CODES: Final = (
    "failed",
    "closed",
    "closing",
    "disk_full",
    "queue_full",
    "replicas_behind",
    "no_answer",
    "archive_behind",
    "checkpoints_failing",
    "checkpoints_behind",
    "store_stuck",
    "not_following",
    "behind",
)
"""Of all reasons that there are."""


@final
@attrs.frozen
class HealthReason:
    """Why something is not as it should be."""

    code: str
    """For programs: one of those that the page "Metrics and health" lists."""
    text: str
    """A sentence for people."""
    status: Literal["degraded", "failed"] = "degraded"
    """How bad that is."""


@final
@attrs.frozen
class Health:
    """How well a log, a database, a reader or a replica is; what ``health()`` returns."""

    status: Literal["ok", "degraded", "failed"]
    """How it fares, in one word; ``"degraded"`` is what works, or will again without being
    reopened, ``"failed"`` what does not."""
    reasons: tuple[HealthReason, ...]
    """Why it is not ``"ok"``; none where it is."""


def judge(reasons: Iterable[HealthReason | None]) -> Health:
    """What these come to; None is no reason."""
    found = tuple(reason for reason in reasons if reason is not None)
    if any(reason.status == "failed" for reason in found):
        return Health("failed", found)
    return Health("degraded" if found else "ok", found)


# -- of a log ---------------------------------------------------------------------------


def failed(what: str, error: BaseException | None) -> HealthReason | None:
    """
    Args:
      what: is broken, if there is an error.
    """
    if error is None:
        return None
    return HealthReason("failed", f"{what} is broken: {error!r}; open it again", "failed")


def closed(what: str, state: str) -> HealthReason | None:
    if state == "closing":
        return HealthReason("closing", f"{what} is being closed")
    return HealthReason("closed", f"{what} is closed", "failed") if state == "closed" else None


def disk_full(state: str) -> HealthReason | None:
    if state != "full":
        return None
    text = "there is no disk space for the next segment; nothing is accepted before there is"
    return HealthReason("disk_full", text)


def queue_full(seconds: float, utilization: float) -> HealthReason | None:
    """
    Args:
      seconds: for which the queue has been crowded.
    """
    if seconds < CROWDED_SECONDS:
        return None
    text = f"the queue is {utilization:.0%} full, and has been over {CROWDED:.0%}"
    return HealthReason("queue_full", f"{text} for {seconds:.0f} seconds")


def replicas_behind(replicas: int | None, current: int | None) -> HealthReason | None:
    """None: it is no replicated log."""
    if replicas is None or current is None or current >= replicas:
        return None
    text = f"{current} of {replicas} replicas are up to date"
    return HealthReason("replicas_behind", text)


def unsettled(seconds: float | None) -> HealthReason | None:
    if seconds is None or seconds < UNSETTLED_SECONDS:
        return None
    text = f"the servers have not settled the batch in flight for {seconds:.0f} seconds"
    return HealthReason("no_answer", text)


def archive_behind(
    segments: int | None, error: str | None, stalled_seconds: float = 0.0
) -> HealthReason | None:
    """
    Args:
      segments: sealed ones that it has not; None: there is no archive.
      stalled_seconds: for how long it has got none of them.
    """
    if segments is None:
        return None
    stalled = segments > ARCHIVE_SEGMENTS_MAX and stalled_seconds >= ARCHIVE_SECONDS
    if error is None and not stalled and segments <= ARCHIVE_SEGMENTS_FAR:
        return None
    text = f"the archive lacks {segments} sealed segments, which are kept here until it has them"
    if error is not None:
        text += f"; the last try: {error}"
    return HealthReason("archive_behind", text)


def log_reasons(
    statistics: WalStatistics,
    failure: BaseException | None,
    crowded_seconds: float,
    stalled_seconds: float = 0.0,
) -> tuple[HealthReason | None, ...]:
    return (
        failed("the log", failure),
        closed("the log", statistics.state),
        disk_full(statistics.state),
        queue_full(crowded_seconds, statistics.queue_utilization),
        replicas_behind(statistics.replicas, statistics.replicas_current),
        unsettled(statistics.unsettled_seconds),
        archive_behind(statistics.archive_lag_segments, statistics.archive_error, stalled_seconds),
    )


# -- of checkpoints ---------------------------------------------------------------------


def checkpoints_failing(seconds: float | None, error: BaseException | None) -> HealthReason | None:
    if seconds is None:
        return None
    text = f"checkpoints have been failing for {seconds:.0f} seconds, and are tried again"
    return HealthReason("checkpoints_failing", f"{text}: {error!r}")


def store_stuck(stuck: bool) -> HealthReason | None:
    if not stuck:
        return None
    text = "the store's map is full, and cannot grow while snapshots or transactions are open"
    return HealthReason("store_stuck", text)


def checkpoints_behind(behind: bool, tasks: int) -> HealthReason | None:
    if not behind:
        return None
    text = f"checkpoints are a whole interval behind; tasks that wait for that: {tasks}"
    return HealthReason("checkpoints_behind", text)


# -- of what follows --------------------------------------------------------------------


def not_following(what: str, error: BaseException | None) -> HealthReason | None:
    if error is None:
        return None
    return HealthReason("not_following", f"{what} follows no more: {error!r}", "failed")


def silent(seconds: float | None) -> HealthReason | None:
    if seconds is None:
        return None
    return HealthReason("no_answer", f"the log has not answered for {seconds:.0f} seconds")


def behind(transactions: int, seconds: float) -> HealthReason | None:
    if seconds < BEHIND_SECONDS:
        return None
    text = f"the log has had {transactions} more transactions for {seconds:.0f} seconds"
    return HealthReason("behind", text)


publish(Health, HealthReason)
