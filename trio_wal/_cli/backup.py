"""`trio-wal backup`: a copy of a database, from outside of its owner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from trio_wal._database_reader import open_database_reader

from ._output import Database, ExitCode, Json, count, say, write_json


async def backup(
    database: Database,
    dest: Annotated[Path, Parameter(name="DEST", help="A directory that does not exist yet.")],
    /,
    *,
    json: Json = False,
) -> int:
    """Copy a database, as of now, into a new directory that opens as a database.

    Another process may have it open; that process is neither asked nor delayed. The copy is
    complete and durable, or it is not there at all. Deleted data is not in it.

    Example: `trio-wal backup bank.db bank-2026-11-29.db`
    """
    async with open_database_reader(database) as reader:
        lsn = await reader.backup(dest)
    async with open_database_reader(dest) as copy:
        size = copy.statistics().store_bytes
    if json:
        write_json({"dest": str(dest), "lsn": lsn, "bytes": size})
    else:
        say(f"{dest}: LSN {lsn}, {count(size, 'byte')}")
    return ExitCode.OK
