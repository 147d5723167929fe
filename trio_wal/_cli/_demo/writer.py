"""The process that writes, until it is done or killed.

Law: an acknowledgement leaves this process only after `append` has returned, and at once:
all that one batch woke go out in one write.  Nothing is kept that a kill could lose and
the parent would need.

Standard input has the job; standard output takes messages: a header of three ``<u64``
(acknowledgements in it, syncs so far, nanoseconds of appending so far), then three for
each acknowledgement: the line's index, its LSN, nanoseconds that `append` took.
"""

from __future__ import annotations

import os
import signal
import sys
from array import array
from random import Random
from time import perf_counter_ns
from typing import BinaryIO, Final

import msgspec
import trio

from trio_wal._opening import open_database
from trio_wal._util import MiB
from trio_wal._wal import WriteAheadLog, open_wal

from . import bank
from .workload import Workload, build

WORDS: Final = 3
"""Words of a message's header, and of each acknowledgement."""
WORD_BYTES: Final = 8
CHECKPOINT_BYTES: Final = 8 * MiB
"""Small, so that kills meet checkpoints."""


class Job(msgspec.Struct, array_like=True):
    """What the parent sends."""

    path: str
    contents: tuple[bytes, ...]
    tasks: int
    resume: list[int]
    """Index of the first line that each task still has to append."""
    max_record_size: int
    database: bool
    seed: int
    """Of the transfers."""


class _Acknowledger:
    """Collects what the tasks were told and passes it on."""

    def __init__(self, out: BinaryIO, wal: WriteAheadLog) -> None:
        self._out = out
        self._wal = wal
        self._began = perf_counter_ns()
        self.words: list[int] = []
        self.some = trio.Event()

    async def run(self) -> None:
        while True:
            await self.some.wait()
            self.send()

    def send(self) -> None:
        words, self.words = self.words, []
        self.some = trio.Event()
        syncs = self._wal.statistics().batches_synced
        head = (len(words) // WORDS, syncs, perf_counter_ns() - self._began)
        # A full pipe holds the event loop up: the parent reads all the time.
        self._out.write(array("Q", (*head, *words)).tobytes())
        self._out.flush()


async def write(job: Job, workload: Workload, out: BinaryIO) -> None:
    """Append what is left of the workload, one line after the other in each task."""
    async with open_wal(job.path, max_record_size=job.max_record_size) as wal:
        told = _Acknowledger(out, wal)

        async def append_lines(first: int, end: int) -> None:
            append, records = wal.append, workload.records
            for index in range(first, end):
                began = perf_counter_ns()
                lsn = await append(records[index])
                told.words += (index, lsn, perf_counter_ns() - began)
                told.some.set()

        async with trio.open_nursery() as acknowledging:
            acknowledging.start_soon(told.run)
            async with trio.open_nursery() as appending:
                for first, end in zip(job.resume, workload.bounds[1:], strict=True):
                    appending.start_soon(append_lines, first, end)
            acknowledging.cancel_scope.cancel()
        told.send()


async def write_database(job: Job, workload: Workload, out: BinaryIO) -> None:
    """Each line in a transaction of its own, and money moved all the while."""
    async with open_database(
        job.path, max_record_size=job.max_record_size, checkpoint_bytes=CHECKPOINT_BYTES
    ) as db:
        if db.get(bank.account_key(0)) is None:
            async with db.transaction() as tx:
                for number in range(bank.ACCOUNTS):
                    tx.put(bank.account_key(number), b"%d" % bank.BALANCE)
        told = _Acknowledger(out, db.wal)
        done = False

        def tell(index: int, lsn: int | None, began: int) -> None:
            assert lsn is not None
            told.words += (index, lsn, perf_counter_ns() - began)
            told.some.set()

        async def put_lines(first: int, end: int) -> None:
            for index in range(first, end):
                began = perf_counter_ns()
                lsn = await db.put(bank.line_key(index), workload.records[index])
                tell(index, lsn, began)

        async def transfer(task: int) -> None:
            rng = Random(job.seed + task)
            turn = int(db.get(bank.count_key(task), b"0"))
            while not done:
                began = perf_counter_ns()
                async with db.transaction() as tx:
                    bank.move(tx, task, turn, rng)
                tell(len(workload.records) + task, tx.lsn, began)
                turn += 1

        async with trio.open_nursery() as acknowledging:
            acknowledging.start_soon(told.run)
            async with trio.open_nursery() as transferring:
                for task in range(bank.TRANSFER_TASKS):
                    transferring.start_soon(transfer, task)
                async with trio.open_nursery() as putting:
                    for first, end in zip(job.resume, workload.bounds[1:], strict=True):
                        putting.start_soon(put_lines, first, end)
                done = True
            acknowledging.cancel_scope.cancel()
        told.send()


def main() -> None:
    """Entry point of the child process."""
    # Ctrl-C reaches the whole group of processes; the parent sees to this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever prints must not end up among the acknowledgements.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Job)
    try:
        program = write_database if job.database else write
        trio.run(program, job, build(job.contents, job.tasks), out)
        out.close()
    except BaseException as exc:
        if _is_broken_pipe(exc):
            # The parent is gone.
            os._exit(1)
        raise


def _is_broken_pipe(exc: BaseException) -> bool:
    inner: tuple[BaseException, ...] = getattr(exc, "exceptions", ())
    return isinstance(exc, BrokenPipeError) or any(map(_is_broken_pipe, inner))
