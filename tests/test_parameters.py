"""Every public number, and every public record: what is wrong is refused by its name.

One table of calls and one of values; each pair is either accepted or a `TypeError` or
`ValueError` whose message begins with the parameter's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
from databases import DB
from helpers import LOG

import trio_wal
from trio_wal import Database, KeepBytes, KeepFor, KeepSegments, WriteAheadLog
from trio_wal.testing import MemoryFiles

VALUES: list[object] = [
    None, True, "1", b"1", "", math.nan, math.inf, -math.inf, -1, -1.5, 0.5, 1e308, -1e308, 5e-324,
    2**63, 2**64, 10**400, -(10**400), 10**5000, -(10**5000), object(), [1], [None], ["x"], (), {},
]  # fmt: skip


def shown(value: object) -> str:
    kind = type(value).__name__
    return f"{kind}-{value.bit_length()} bits" if isinstance(value, int) else f"{kind}-{value}"[:20]


WAL_NUMBERS = [
    "max_queue_size", "max_queue_bytes", "max_record_size", "max_batch_bytes", "flush_interval",
    "segment_size", "verify_bytes",
]  # fmt: skip

CALLS: dict[str, tuple[str, Callable[[Any], object]]] = {
    f"open_wal({name}=)": (name, lambda value, name=name: trio_wal.open_wal(LOG, **{name: value}))
    for name in WAL_NUMBERS
} | {
    f"open_database({name}=)": (
        name,
        lambda value, name=name: trio_wal.open_database(DB, **{name: value}),
    )
    for name in ("checkpoint_bytes", "map_size", *WAL_NUMBERS)
} | {
    "KeepFor": ("seconds", KeepFor),
    "KeepSegments": ("count", KeepSegments),
    "KeepBytes": ("count", KeepBytes),
}  # fmt: skip

LOG_CALLS: dict[str, tuple[str, Callable[[WriteAheadLog, Any], object]]] = {
    "append": ("data", lambda wal, value: wal.append(value)),
    "append_many": ("records", lambda wal, value: wal.append_many(value)),
    "send": ("data", lambda wal, value: wal.send(value)),
    "send_nowait": ("data", lambda wal, value: wal.send_nowait(value)),
    "wait_durable": ("lsn", lambda wal, value: wal.wait_durable(value)),
    "read(start=)": ("start", lambda wal, value: wal.read(value)),
    "read(stop=)": ("stop", lambda wal, value: wal.read(stop=value)),
    "follow": ("start", lambda wal, value: wal.follow(value)),
    "truncate_before": ("lsn", lambda wal, value: wal.truncate_before(value)),
    "truncate_after": ("lsn", lambda wal, value: wal.truncate_after(value)),
}

DATABASE_CALLS: dict[str, tuple[str, Callable[[Database, Any], object]]] = {
    "put(key)": ("key", lambda db, value: db.put(value, b"value")),
    "put(value)": ("value", lambda db, value: db.put(b"key", value)),
    "get": ("key", lambda db, value: db.get(value)),
    "delete": ("key", lambda db, value: db.delete(value)),
    "scan(limit=)": ("limit", lambda db, value: db.scan(limit=value)),
    "scan(start=)": ("start", lambda db, value: db.scan(value)),
    "scan(stop=)": ("stop", lambda db, value: db.scan(stop=value)),
    "scan(prefix=)": ("prefix", lambda db, value: db.scan(prefix=value)),
    "run(retries=)": ("retries", lambda db, value: db.run(len, retries=value)),
    "changes": ("start", lambda db, value: db.changes(value)),
}


async def call(name: str, function: Callable[[], object]) -> None:
    """It does its work, or refuses by name."""
    try:
        result = function()
        if hasattr(result, "__await__"):
            with trio.move_on_after(1):
                await result
        elif hasattr(result, "__next__"):
            list(result)
    except (TypeError, ValueError) as exc:
        named = str(exc).startswith((f"{name} ", f"{name}["))
        if not named and not isinstance(exc, trio_wal.WalError):
            raise AssertionError(f"without the name {name}") from exc
    except KeyError:
        assert name == "key"


@pytest.mark.parametrize("what", CALLS)
async def test_an_options_value_is_accepted_or_refused_by_its_name(
    what: str, files: MemoryFiles
) -> None:
    name, function = CALLS[what]
    for value in VALUES:
        await call(name, lambda value=value: function(value))  # type: ignore[misc]


@pytest.mark.parametrize("value", VALUES, ids=shown)
async def test_a_logs_argument_is_accepted_or_refused_by_its_name(
    value: object, files: MemoryFiles, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio_wal.open_wal(LOG, files=files) as wal:
        await wal.append_many([b"one", b"two", b"three"])
        for name, function in LOG_CALLS.values():
            await call(name, lambda function=function: function(wal, value))  # type: ignore[misc]
        assert await wal.append(b"still works") >= 1


@pytest.mark.parametrize("value", VALUES, ids=shown)
async def test_a_databases_argument_is_accepted_or_refused_by_its_name(
    value: object, files: MemoryFiles, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio_wal.open_database(DB, files=files) as db:
        await db.put(b"one", b"1")
        for what, (name, function) in DATABASE_CALLS.items():
            if what == "run(retries=)":
                continue
            await call(name, lambda function=function: function(db, value))  # type: ignore[misc]

        def nothing(tx: object) -> None: ...

        await call("retries", lambda: db.run(nothing, retries=value))  # type: ignore[arg-type]
        assert db.get(b"one") == b"1"


LARGEST: list[tuple[str, object]] = [
    ("max_queue_size", 2**64 - 1),
    ("max_queue_bytes", 2**64 - 1),
    ("flush_interval", 1e10),
    ("segment_size", 1 << 40),
    ("verify_bytes", 2**64 - 1),
    ("retention", KeepFor(1e10)),
    ("retention", KeepBytes(2**64 - 1)),
    ("retention", KeepSegments(2**64 - 1) & KeepFor(5e-324)),
]


@pytest.mark.parametrize(("name", "value"), LARGEST, ids=str)
async def test_what_is_accepted_works_at_its_bound(
    files: MemoryFiles, name: str, value: object
) -> None:
    options: dict[str, Any] = {"segment_size": 1, name: value}
    async with trio_wal.open_wal(LOG, files=files, **options) as wal:
        for _ in range(10):
            await wal.append(bytes(1000))
        await wal.send(b"sent")
        assert 0 <= wal.statistics().queue_utilization <= 1
    async with trio_wal.open_wal(LOG, files=files, **options) as wal:
        assert wal.last_lsn == 11


@pytest.mark.parametrize("segment_size", [1, 10, 5000])
async def test_the_smallest_segment_has_room_for_a_frame_and_a_footer(
    files: MemoryFiles, segment_size: int
) -> None:
    async with trio_wal.open_wal(LOG, files=files, segment_size=segment_size) as wal:
        for number in range(10):
            assert await wal.append(b"%d" % number) == number + 1
        sizes = [len(data) for name, data in files.contents(LOG).items() if name[:4] == "wal-"]
    assert len(sizes) > 3
    assert max(sizes) <= 6.5 * 1024
