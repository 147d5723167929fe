"""Logs written once, by the first version of the format, are read as they always were.

A failure here means that trio-wal no longer reads what it once wrote: the files are never
written again (``tests/data/write_v1.py`` tells how they were).
"""

from __future__ import annotations

import hashlib
import math
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import attrs
import pytest
from logs import TINY, append

import trio_wal
from trio_wal import Bookmark, CorruptLogError, LogDivergedError, RecoveryReport
from trio_wal._disk.opening import open_log_directory
from trio_wal._system.files import OsFiles

V1 = Path(__file__).parent / "data" / "v1"
START = datetime(2023, 11, 14, 22, 13, 20, tzinfo=timezone.utc)
"""Every batch of each log is a quarter of a second behind the one before."""


@attrs.frozen
class Golden:
    batches: list[list[bytes]]
    first_batch: int = 1
    """Number of the first batch that is still there."""
    seconds: float = 0.0
    """Behind `START`, when the log was begun."""
    first_lsn: int = 1
    report: dict[str, Any] = attrs.Factory(dict)

    def records(self) -> list[tuple[int, datetime, bytes]]:
        found = []
        lsn = self.first_lsn
        for number, batch in enumerate(self.batches, self.first_batch):
            for data in batch:
                found.append((lsn, START + timedelta(seconds=self.seconds + number / 4), data))
                lsn += 1
        return found


LOGS = {
    "closed": Golden(
        [
            [b"first record"],
            [b"", b"\x00\xff", "grüße".encode(), b""],
            [b"x" * 1000],
            [b"second session"],
            [b"TWF\x01 is how a frame begins", b"trio-wal is how a segment begins"],
            [b"last record"],
        ],
        report={"segments": 4, "clean_shutdown": True, "torn_bytes": 0},
    ),
    "crashed": Golden(
        [
            *([b"record %d" % n] for n in range(1, 6)),
            [b"two records", b"of one batch"],
            [b"acknowledged by its own sync, and by no later frame"],
        ],
        seconds=1.5,
        report={"segments": 4, "clean_shutdown": False, "torn_bytes": 512},
    ),
    "zstd": Golden(
        [
            [b"compressible " * 200],
            [b"short"],
            [b'{"order": %d, "colour": "blue"}' % n for n in range(50)],
            [bytes(4000)],
        ],
        seconds=3.5,
        report={"segments": 2, "clean_shutdown": True, "torn_bytes": 0},
    ),
    "dropped": Golden(
        [[b"record 5"], [b"record 6"], [b"record 7"]],
        first_batch=5,
        seconds=4.5,
        first_lsn=5,
        report={"segments": 2, "clean_shutdown": True, "torn_bytes": 0},
    ),
    "cut": Golden(
        [[b"record 1", b"record 2", b"record 3"], [b"record 4"]],
        seconds=6.25,
        report={"segments": 2, "clean_shutdown": False, "torn_bytes": 0},
    ),
}
"""What each log holds, and what the first open says of it."""


def digest(folder: Path) -> str:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_logs_are_as_they_were_written() -> None:
    assert digest(V1) == "0e6a841f53ef8f399b24720bffbdeb2692a251b923aa267c4434f1cf3b99abc4", (
        "never write them again: add new ones beside them"
    )
    assert {folder.name for folder in V1.iterdir()} == set(LOGS)


def test_the_script_that_wrote_them_does_not_write_again() -> None:
    script = (V1.parent / "write_v1.py").read_text("utf-8")
    assert "if folder.exists():\n            sys.exit(" in script


@pytest.mark.parametrize("name", LOGS)
async def test_a_reader_reads_them_where_they_are(name: str) -> None:
    golden = LOGS[name]
    before = digest(V1 / name)
    async with trio_wal.open_reader(V1 / name) as reader, reader.read() as records:
        found = [(record.lsn, record.timestamp, record.data) async for record in records]
        assert reader.first_lsn == golden.first_lsn
    expected = golden.records()
    if name == "cut":
        # Nothing that a reader trusts says that the new segment's record is durable.
        expected = expected[:-1]
    assert found == expected
    assert digest(V1 / name) == before


@pytest.mark.parametrize("name", LOGS)
async def test_they_are_opened_and_gone_on_with(name: str, tmp_path: Path) -> None:
    golden = LOGS[name]
    path = tmp_path / name
    shutil.copytree(V1 / name, path)
    expected = golden.records()
    last = expected[-1][0]
    async with trio_wal.open_wal(path, verify_bytes=math.inf, segment_size=TINY) as wal:
        assert {key: getattr(wal.recovery, key) for key in golden.report} == golden.report
        assert (wal.first_lsn, wal.last_lsn) == (golden.first_lsn, last)
        async with wal.read() as records:
            found = [(record.lsn, record.timestamp, record.data) async for record in records]
        assert found == expected
        assert await wal.append(b"written today") == last + 1
    async with trio_wal.open_wal(path) as wal:
        assert wal.recovery.clean_shutdown
        async with wal.read(last + 1) as records:
            assert [record.data async for record in records] == [b"written today"]


# -- logs whose last segment was a dropped one --

REUSED = V1.parent / "v1_reused"


def test_the_logs_with_reused_segments_are_as_they_were_written() -> None:
    assert digest(REUSED) == "948b40351d3f4d7ac014fd31be878567d8b9b6dbc1195c2ef2a74bff178d9b50"
    script = (V1.parent / "write_v1_reused.py").read_text("utf-8")
    assert "if folder.exists():\n            sys.exit(" in script


@pytest.mark.parametrize("name", ["closed", "killed"])
async def test_a_reused_segment_ends_at_its_terminator(name: str, tmp_path: Path) -> None:
    data = (REUSED / name / "wal-00000000000000000028.log").read_bytes()
    assert data[12] == 8, "the feature"
    assert b"record 9" in data, "of the file's life before"
    every = [*(b"record %d" % n for n in range(19, 30)), b"the last record"]
    async with trio_wal.open_reader(REUSED / name) as reader, reader.read() as records:
        # Nobody's word says that the last batch of the killed one is durable.
        assert [record.data async for record in records] == every[: 12 if name == "closed" else 11]
    path = tmp_path / name
    shutil.copytree(REUSED / name, path)
    async with trio_wal.open_wal(path, segment_size=TINY) as wal:
        assert wal.recovery.clean_shutdown == (name == "closed")
        assert (wal.recovery.torn_bytes, wal.first_lsn, wal.last_lsn) == (0, 19, 30)
        assert await wal.append(b"written today") == 31
        async with wal.read() as records:
            assert [record.data async for record in records] == [*every, b"written today"]


# -- logs with epochs --

EPOCHS = V1.parent / "v1_epochs"
PARTED = [b"first 1", b"first 2", b"third 3", b"third 4"]


def test_the_logs_with_epochs_are_as_they_were_written() -> None:
    assert digest(EPOCHS) == "15e1786104e24bbc2a4985993b6412a99bf0162b8e7a6d8e37fc98209e51e360"
    script = (V1.parent / "write_v1_epochs.py").read_text("utf-8")
    assert "if folder.exists():\n            sys.exit(" in script


async def test_the_history_of_a_log_is_read_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "parted"
    shutil.copytree(EPOCHS / "parted", path)
    async with trio_wal.open_reader(EPOCHS / "parted") as reader, reader.read() as records:
        assert [record.data async for record in records] == PARTED
        epoch = reader.epoch
    assert epoch == 10903605599
    async with trio_wal.open_wal(path) as wal:
        assert wal.bookmark == Bookmark(4, epoch)
        for lsn in (1, 2):
            async with wal.read(Bookmark(lsn, 0)) as records:
                assert [record.data async for record in records] == PARTED[lsn:]
        with pytest.raises(LogDivergedError) as caught:
            await wal.read(Bookmark(3, 0)).__aenter__()
        assert caught.value.parted_after == 2
        await wal.truncate_after(3)
        assert wal.epoch > epoch
        async with wal.read(Bookmark(3, epoch)) as records:
            assert [record.data async for record in records] == []


async def test_a_truncation_with_an_epoch_is_carried_out(tmp_path: Path) -> None:
    path = tmp_path / "deciding"
    shutil.copytree(EPOCHS / "deciding", path)
    async with trio_wal.open_reader(path) as reader:
        epoch = reader.epoch
        assert reader.bookmark == Bookmark(2, epoch)
    async with trio_wal.open_wal(path, segment_size=TINY) as wal:
        assert (wal.last_lsn, wal.epoch) == (2, epoch)
        assert epoch > 0
        with pytest.raises(LogDivergedError):
            await wal.read(Bookmark(5, 0)).__aenter__()


async def test_a_copy_that_was_never_opened_begins_an_epoch(tmp_path: Path) -> None:
    epochs = set()
    for name in ("one", "other"):
        shutil.copytree(EPOCHS / "copied", tmp_path / name)
        async with trio_wal.open_reader(tmp_path / name) as reader:
            before = reader.epoch
        async with trio_wal.open_wal(tmp_path / name) as wal:
            assert (wal.first_lsn, wal.last_lsn) == (8, 7)
            assert wal.epoch > before > 0
            epochs.add(wal.epoch)
            async with wal.follow(Bookmark(7, before)) as records:
                assert records.bookmark == Bookmark(7, wal.epoch)
            await wal.append(b"8")
            with pytest.raises(LogDivergedError) as caught:
                await wal.read(Bookmark(8, before)).__aenter__()
            assert caught.value.parted_after == 7
    assert len(epochs) == 2


def test_damage_in_them_is_found(tmp_path: Path) -> None:
    path = tmp_path / "closed"
    shutil.copytree(V1 / "closed", path)
    file = path / "wal-00000000000000000001.log"
    data = bytearray(file.read_bytes())
    data[4096 + 70] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptLogError, match=r"/wal-0{19}1\.log: at offset 4096: "):
        open_log_directory(OsFiles(), str(path), segment_size=TINY)


def test_what_is_written_today_is_read_like_them(tmp_path: Path) -> None:
    """The same bytes but for UUID, salts and times: the format did not change by accident."""
    log = open_log_directory(OsFiles(), str(tmp_path), segment_size=TINY)
    for batch in LOGS["closed"].batches[:3]:
        append(log, *batch)
    log.close()
    report: RecoveryReport = log.report
    assert report.clean_shutdown
    name = "wal-00000000000000000001.log"
    today, then = ((folder / name).read_bytes() for folder in (tmp_path, V1 / "closed"))
    changed = {place for place, (a, b) in enumerate(zip(today, then, strict=True)) if a != b}
    # UUID; salt, time; checksums of the header, of the pointer and of what it points to.
    fields = {*range(24, 40), *range(56, 80), *range(508, 512), *range(516, 520), *range(552, 556)}
    for frame in (4096, 4608, 5120):
        # Checksum, time, checksum of the frame before.
        fields |= {frame + place for place in (*range(4, 8), *range(24, 32), *range(52, 56))}
    assert changed <= fields
    assert len(changed) > 50
