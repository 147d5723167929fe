"""What the package says to whoever operates the program: the events of the ``trio_wal`` logger.

Law: nothing per record, nothing where a commit passes; a few lines in the life of a log.
Each has its values as ``record.trio_wal``, a dict with ``event`` and ``path``, for programs;
docs/usage.md has the table.  What has a caller is raised, and not logged as well.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Final

from ._text import printable

log: Final = logging.getLogger("trio_wal")


def tell(level: int, event: str, path: str, text: str, **values: object) -> None:
    """Log one event; ``text`` follows the path in the message.

    Raises nothing: no filter or handler of the application's may break a log that works.
    """
    with contextlib.suppress(Exception):
        if log.isEnabledFor(level):
            extra = {"trio_wal": {"event": event, "path": path, **values}}
            log.log(level, "%s: %s", printable(path), printable(text), extra=extra)
