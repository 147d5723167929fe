"""`trio-wal get`: one value of a database."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from trio_wal._database_reader import open_database_reader

from ._output import Database, ExitCode, Json, as_bytes, complain, write_json
from .dump import data_fields


async def get(
    database: Database,
    key: Annotated[
        str, Parameter(name="KEY", help="The key as text; with --hex, as hexadecimal digits.")
    ],
    /,
    *,
    hex_: Annotated[
        bool,
        Parameter(name="--hex", negative=(), show_default=False, help="KEY is hexadecimal digits."),
    ] = False,
    json: Json = False,
) -> int:
    """Print the value of a key, byte for byte, and nothing else.

    Takes no lock; another process may have the database open. With `--json` it prints one
    object: lsn, key, and the value as text or base64. Exits with 1 if there is no such key.

    Example: `trio-wal get bank.db alice`
    """
    wanted = as_bytes("KEY", key, digits=hex_)
    async with open_database_reader(database) as reader:
        with reader.snapshot() as snapshot:
            value, lsn = snapshot.get(wanted), snapshot.lsn
    if json:
        found = None if value is None else data_fields(value)
        write_json({"lsn": lsn, "key": data_fields(wanted), "value": found})
    elif value is not None:
        sys.stdout.flush()
        sys.stdout.buffer.write(value)
    if value is None:
        if not json:
            complain(f"{database}: there is no key {key!r}")
        return ExitCode.FINDINGS
    return ExitCode.OK
