"""Commits of a log that somebody else writes, brought into memory as they come.

Law: by the log's order and nothing else; whoever reads here meanwhile gets their turn.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import Final

import trio

from ._engine import Record
from ._mvcc import Versions

TURN_SECONDS: Final = 0.0005
"""For so long commits are replayed without a checkpoint of trio's."""


async def replay_live(
    versions: Versions,
    name: str,
    records: Sequence[Record],
    checkpoint: Callable[[], Awaitable[object]] | None = None,
) -> None:
    """Show the next commits.  Cancelled: some of them are shown.

    Args:
      name: of the log, for messages.
      checkpoint: called whenever the layers are full; None: somebody else sees to that.

    Raises:
      CorruptLogError: one of them is none.
    """
    to_checkpoint = checkpoint is not None
    at = 0
    due = perf_counter() + TURN_SECONDS
    while at < len(records):
        at = versions.replay(name, records, at, due, to_checkpoint=to_checkpoint)
        await versions.settle_replayed()
        if checkpoint is not None and versions.checkpoint_due():
            await checkpoint()
        if perf_counter() >= due:
            await trio.lowlevel.checkpoint()
            due = perf_counter() + TURN_SECONDS
