"""The programs in docs/examples are run: against a disk that stands still, and as they stand."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import open_memory, read_all, until

from trio_wal.testing import MemoryFiles

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
LOAD_SHEDDING = EXAMPLES / "load_shedding.py"

pytest.importorskip("hypercorn")
pytest.importorskip("quart_trio")


@pytest.mark.filterwarnings("ignore")
async def test_a_service_refuses_after_a_while_and_what_it_refused_is_not_there(
    files: MemoryFiles,
) -> None:
    """Over a real socket; the disk stands still until every other request was refused."""
    example = runpy.run_path(str(LOAD_SHEDDING))
    # Where the disk is well, a machine that is busy with something else may take long for anything.
    patience = example["make_app"].__globals__
    patience["PATIENCE"] = 600.0
    answers: dict[bytes, int] = {}

    async def order(port: int, data: bytes) -> None:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            answers[data] = await example["post"](stream, data)

    async with open_memory(files, max_queue_size=3) as wal, trio.open_nursery() as nursery:
        stop = trio.Event()
        port: Any = await nursery.start(example["run_service"], wal, stop)
        try:
            await order(port, b"before")
            files.hold()
            nursery.start_soon(order, port, b"in flight")
            await until(lambda: wal.statistics().tasks_waiting_durable == 1)
            patience["PATIENCE"] = 0.5
            async with trio.open_nursery() as others:
                # Three of them find room, five do not.
                for number in range(8):
                    others.start_soon(order, port, b"order %d" % number)
            assert sorted(answers) == [b"before", *(b"order %d" % n for n in range(8))]
            assert wal.statistics().records_waiting == 0
            files.release()
            await until(lambda: b"in flight" in answers)
            patience["PATIENCE"] = 600.0
            await order(port, b"after")
        finally:
            files.release()
            stop.set()
    assert answers == {
        b"before": 201, b"in flight": 201, b"after": 201,
        **{b"order %d" % number: 503 for number in range(8)},
    }  # fmt: skip
    async with open_memory(files) as wal:
        assert list((await read_all(wal)).values()) == [b"before", b"in flight", b"after"]


def test_the_program_finds_nothing_lost_and_nothing_twice() -> None:
    command = [sys.executable, str(LOAD_SHEDDING), "--seconds", "1", "--clients", "10"]
    told = subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", timeout=100
    ).stdout
    figures = {line.partition(": ")[0]: line.partition(": ")[2] for line in told.splitlines()}
    assert figures["done and not in the log"] == "0"
    assert figures["in the log and not done"] == "0"
    assert figures["twice in the log"] == "0"
    done = re.search(r"of these done (\d+)", told)
    assert done is not None
    assert int(done[1]) > 0
