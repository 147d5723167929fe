"""What any release wrote is read; what a newer one wrote is passed over or refused by name.

The logs of `test_golden` belong to this, too: ``nox -s format_compat`` runs both with the package
as it is built.  The files in ``data/v1_databases`` are never written again; the script beside them
tells how they were.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from command_line import CommandLine
from test_golden import V1, digest

import trio_wal
from trio_wal import UnsupportedFormatError
from trio_wal._disk.chain import read_meta
from trio_wal._disk.frame import BLOCK, DATA_OFFSET, crc32c, feature_names
from trio_wal._manifest import encode_manifest
from trio_wal._system.files import OsFiles

DATABASES = V1.parent / "v1_databases"
TINY = 1
COMMITS = 12
STORED = 8
"""Commits that the store has: after them comes the first checkpoint."""
STORED_LSN = 14
LAST_LSN = 21
needs_its_kind_of_store = pytest.mark.skipif(
    (sys.byteorder, struct.calcsize("P")) != ("little", 8),
    reason="a store does not travel between architectures",
)


def state_after(commits: int) -> dict[bytes, bytes]:
    kept = range(max(1, commits - 2), commits + 1)
    keys = {b"key %02d" % number: b"value %d" % number * number for number in kept}
    return {b"count": b"%d" % commits, **keys} if commits else {}


def commits_until(lsn: int) -> int:
    """How many commits there are up to a record: between them stand acknowledgements."""
    return lsn if lsn <= STORED else max(STORED, lsn - (LAST_LSN - COMMITS))


@pytest.fixture
def cli(capsysbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capsysbinary.readouterr)


@pytest.fixture
def databases(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATABASES, tmp_path / "copies"))


# -- what was released ------------------------------------------------------------------------


def test_the_databases_are_as_they_were_written() -> None:
    assert digest(DATABASES) == (
        "ce2eae64812c641795bf77b37de18bbf4df5e57b7396a5841a656c40c5be6d98"
    ), "never write them again: add new ones beside them"
    script = (DATABASES.parent / "write_v1_databases.py").read_text("utf-8")
    assert "if HERE.exists():\n        sys.exit(" in script


@needs_its_kind_of_store
@pytest.mark.parametrize(
    ("name", "commits", "last_lsn", "consumers"),
    [
        ("closed", COMMITS, LAST_LSN, {"mail": 5, "audit": 6}),
        ("killed", COMMITS, LAST_LSN, {"mail": 5, "audit": 6}),
        ("backup", STORED, STORED_LSN, {"mail": 5}),
    ],
)
async def test_a_database_is_read_verified_and_gone_on_with(
    databases: Path, name: str, commits: int, last_lsn: int, consumers: dict[str, int]
) -> None:
    path = databases / name
    async with trio_wal.open_database_reader(path) as reader:
        assert dict(reader.scan()) == state_after(commits)
    async with trio_wal.open_database(path, segment_size=TINY) as db:
        assert dict(db.scan()) == state_after(commits)
        assert db.durable_lsn == last_lsn
        assert db.recovery.clean_shutdown is (name != "killed")
        places = db.statistics().consumers
        assert {name: place.acknowledged_lsn for name, place in places.items()} == consumers
        if name != "backup":
            async with db.consumer("audit") as consumer:
                assert (await consumer.__anext__()).lsn == 7
        await db.put(b"written", b"today")
        await db.checkpoint()
    async with trio_wal.open_database(path) as db:
        assert dict(db.scan()) == {**state_after(commits), b"written": b"today"}
        assert db.recovery.clean_shutdown


@needs_its_kind_of_store
@pytest.mark.parametrize("name", ["closed", "killed", "backup"])
def test_a_database_has_nothing_that_verify_or_repair_would_find(
    cli: CommandLine, databases: Path, name: str
) -> None:
    found = cli.json("verify", databases / name)
    assert (found["ok"], found["findings"], found["store"]["lsn"]) == (True, [], STORED_LSN)
    assert cli.json("repair", databases / name)["damage"] == []


@needs_its_kind_of_store
@pytest.mark.parametrize("lsn", range(STORED_LSN, LAST_LSN + 1))
async def test_an_archive_is_restored_to_every_place(databases: Path, lsn: int) -> None:
    archive = trio_wal.DirectoryArchive(databases / "archive")
    await trio_wal.restore(archive, databases / "restored", to_lsn=lsn)
    async with trio_wal.open_database(databases / "restored") as db:
        assert dict(db.scan()) == state_after(commits_until(lsn))


def test_an_archive_is_whole(cli: CommandLine, databases: Path) -> None:
    found = cli.json("archive", "verify", databases / "archive")
    assert found["findings"] == []
    assert (found["segments"], found["backups"], found["last_lsn"]) == (11, 1, LAST_LSN)


async def test_consumers_of_a_log_go_on_where_they_were(databases: Path) -> None:
    async with trio_wal.open_wal(databases / "consumers") as wal:
        async with wal.consumer("mail") as consumer:
            assert (await consumer.__anext__()).data == b"record 4"
        async with wal.consumer("new") as consumer:
            assert (await consumer.__anext__()).data == b"record 1"
        assert await wal.append(b"written today") == 8


# -- what a newer release writes ----------------------------------------------------------------


def change(file: Path, offset: int, field: bytes) -> None:
    """Another field in a header that has its checksum in its last four bytes."""
    data = file.read_bytes()
    block = data[:offset] + field + data[offset + len(field) : BLOCK - 4]
    file.write_bytes(block + crc32c(block).to_bytes(4, "little") + data[BLOCK:])


def segment_of(log: Path) -> Path:
    return min(log.glob("wal-*.log"))


def newer_meta(log: Path) -> str:
    change(log / "log.meta", 12, ((1 << 7) | read_features(log)).to_bytes(4, "little"))
    return f"{log}/log.meta: feature set 128 (bit 7) is not supported"


def read_features(log: Path) -> int:
    return int.from_bytes((log / "log.meta").read_bytes()[12:16], "little")


def newer_version(log: Path) -> str:
    change(log / "log.meta", 8, b"\2\0")
    return f"{log}/log.meta: format version 2 is not supported"


def newer_segment(log: Path) -> str:
    segment = segment_of(log)
    features = int.from_bytes(segment.read_bytes()[12:16], "little") | 1 << 6
    change(segment, 12, features.to_bytes(4, "little"))
    return f"{segment}: feature set 64 (bit 6) is not supported"


def newer_store(log: Path) -> str:
    """Its format number, in the store's own words, is the value of the key that is called so."""
    file = log.parent / "store" / "data.mdb"
    data = file.read_bytes()
    assert data.count(b"format\1\0") >= 1
    file.write_bytes(data.replace(b"format\1\0", b"format\2\0"))
    return f"{file}: store format 2 is not supported"


def newer_lmdb(log: Path) -> str:
    """Both headers, at the beginning of the first two pages."""
    file = log.parent / "store" / "data.mdb"
    data = bytearray(file.read_bytes())
    for page in (0, 4096):
        assert data[page + 20 : page + 24] == b"\1\0\0\0"
        data[page + 20] = 2
    file.write_bytes(data)
    return f"{file}: LMDB data version 2 is not supported"


IN_A_LOG = [newer_meta, newer_version, newer_segment]
IN_A_DATABASE = [*IN_A_LOG, newer_store, newer_lmdb]


async def read_all(log: Path) -> None:
    async with trio_wal.open_reader(log) as reader, reader.read() as records:
        async for _ in records:
            pass


async def refuse_opening(opening: Any, message: str) -> None:
    with pytest.raises(UnsupportedFormatError) as caught:
        async with opening:
            pytest.fail("opened")
    assert str(caught.value).startswith(f"{message}; nothing was modified; open it with ")


def untouched(path: Path, doing: Callable[[], object]) -> None:
    """LMDB's table of readers is not the database's."""

    def content() -> dict[str, bytes]:
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return {str(file): file.read_bytes() for file in files if file.name != "lock.mdb"}

    before = content()
    doing()
    assert content() == before


@pytest.mark.parametrize("newer", IN_A_LOG)
@pytest.mark.parametrize("accept_loss", [False, True])
def test_a_newer_log_is_refused_by_name_wherever_it_is_opened(
    tmp_path: Path, newer: Callable[[Path], str], accept_loss: bool
) -> None:
    log = Path(shutil.copytree(V1 / "closed", tmp_path / "log"))
    message = newer(log)

    async def main() -> None:
        await refuse_opening(trio_wal.open_wal(log, verify_bytes=10**9), message)
        with pytest.raises(UnsupportedFormatError) as caught:
            await trio_wal.repair(log, accept_loss=accept_loss)
        assert str(caught.value).startswith(message)
        with pytest.raises(UnsupportedFormatError) as caught:
            await trio_wal.restore(log, tmp_path / "restored")
        assert str(caught.value).startswith(message)
        assert not (tmp_path / "restored").exists()
        with pytest.raises(UnsupportedFormatError) as caught:
            await read_all(log)
        assert str(caught.value).startswith(message)

    untouched(log, lambda: trio.run(main))


@pytest.mark.parametrize("newer", IN_A_LOG)
def test_commands_name_what_they_do_not_know(
    cli: CommandLine, tmp_path: Path, newer: Callable[[Path], str]
) -> None:
    log = Path(shutil.copytree(V1 / "closed", tmp_path / "log"))
    message = newer(log)
    what = message.partition(": ")[2]
    # What is wrong with one segment is a finding, of which there may be others.
    listed = 1 if newer is newer_segment else 3

    def look() -> None:
        for command, code in (("verify", listed), ("inspect", listed), ("dump", 3)):
            assert cli(command, log) == code, command
            assert what in cli.out + cli.err, command
        for arguments in (["repair"], ["repair", "--accept-loss"]):
            assert cli(arguments[0], log, *arguments[1:]) == 3
            assert cli.err.startswith(f"trio-wal: {message}; nothing was modified")
        assert cli("restore", log, tmp_path / "restored") == 3
        assert what in cli.err

    untouched(log, look)


@needs_its_kind_of_store
@pytest.mark.parametrize("newer", IN_A_DATABASE)
@pytest.mark.parametrize("name", ["closed", "backup"])
def test_a_newer_database_is_refused_by_name_wherever_it_is_opened(
    databases: Path, newer: Callable[[Path], str], name: str
) -> None:
    path = databases / name
    message = newer(path / "log")

    async def main() -> None:
        await refuse_opening(trio_wal.open_database(path), message)
        await refuse_opening(trio_wal.open_database_reader(path), message)
        for accept_loss in (False, True):
            with pytest.raises(UnsupportedFormatError) as caught:
                await trio_wal.repair(path, accept_loss=accept_loss)
            assert str(caught.value).startswith(message)
        if name == "backup" and newer is not newer_segment:
            # Of a backup's log only ``log.meta`` is of use to a restore.
            with pytest.raises(UnsupportedFormatError) as caught:
                await trio_wal.restore(path, databases / "restored")
            assert str(caught.value).startswith(message)

    untouched(path, lambda: trio.run(main))


@needs_its_kind_of_store
@pytest.mark.parametrize("newer", [newer_store, newer_lmdb])
def test_commands_name_the_newer_store(
    cli: CommandLine, databases: Path, newer: Callable[[Path], str]
) -> None:
    path = databases / "closed"
    message = newer(path / "log")

    def look() -> None:
        for arguments in (("verify",), ("repair",), ("get", b"count".decode()), ("scan",)):
            assert cli(arguments[0], path, *arguments[1:]) == 3, arguments
            assert cli.err.startswith(f"trio-wal: {message}; nothing was modified"), arguments

    untouched(path, look)


@needs_its_kind_of_store
async def test_one_header_of_another_version_is_damage(databases: Path) -> None:
    file = databases / "closed" / "store" / "data.mdb"
    data = bytearray(file.read_bytes())
    data[20] = 2
    file.write_bytes(data)
    with pytest.raises(trio_wal.CorruptLogError, match="LMDB data version 2 is not supported"):
        async with trio_wal.open_database(databases / "closed"):
            pytest.fail("opened")


@pytest.mark.parametrize("accept_loss", [False, True])
async def test_newer_places_of_consumers_are_refused_and_not_dropped(
    databases: Path, accept_loss: bool
) -> None:
    path = databases / "consumers"
    file = path / "consumers"
    data = bytearray(file.read_bytes())
    data[8] = 2
    file.write_bytes(data)
    message = f"{file}: version of the places of consumers 2 is not supported"
    await refuse_opening(trio_wal.open_wal(path), message)
    with pytest.raises(UnsupportedFormatError):
        await trio_wal.repair(path, accept_loss=accept_loss)
    assert file.read_bytes() == bytes(data)


def test_a_newer_segment_in_an_archive_is_refused_by_its_manifest(
    cli: CommandLine, databases: Path
) -> None:
    archive = databases / "archive"
    manifest = min(archive.glob("*15-*16-*.json"))
    fields = json.loads(manifest.read_bytes())
    del fields["checksum"]
    fields["features"] |= 1 << 8
    manifest.write_bytes(encode_manifest(fields))
    message = f"trio-wal: {manifest.name}: feature set 256 (bit 8) is not supported; "
    for arguments in (("archive", "verify", archive), ("archive", "list", archive)):
        assert cli(*arguments) == 3
        assert cli.err.startswith(message)
    assert cli("restore", archive, databases / "restored") == 3
    assert cli.err.startswith(message)
    assert not (databases / "restored").exists()


def test_what_else_a_newer_manifest_says_is_passed_over(cli: CommandLine, databases: Path) -> None:
    archive = databases / "archive"
    for manifest in archive.glob("0*.json"):
        fields = json.loads(manifest.read_bytes())
        del fields["checksum"]
        manifest.write_bytes(encode_manifest({**fields, "colour": "blue"}))
    assert cli.json("archive", "verify", archive)["last_lsn"] == LAST_LSN


def test_a_newer_archive_is_refused(cli: CommandLine, databases: Path) -> None:
    identity = databases / "archive" / "archive.json"
    identity.write_text(json.dumps({**json.loads(identity.read_bytes()), "format": 2}))
    assert cli("archive", "list", databases / "archive") == 3
    assert "archive.json: format of the archive 2 is not supported" in cli.err


# -- what may be passed over --------------------------------------------------------------------


def log_with_optional_features(path: Path) -> None:
    """Bits at offset 16 of a segment and at 92 of ``log.meta``, and a file of which nobody knows.
    The first frame is chained to the header, so that it is written anew with its checksum."""
    change(path / "log.meta", 92, (5).to_bytes(4, "little"))
    segment = segment_of(path)
    change(segment, 16, (1 << 31 | 1).to_bytes(4, "little"))
    data = bytearray(segment.read_bytes())
    header = bytes(data[: BLOCK - 4])
    seed = crc32c(header[56:72] + header[40:48])
    frame = data[DATA_OFFSET : DATA_OFFSET + 64]
    frame[52:56] = crc32c(header).to_bytes(4, "little")
    frame[4:8] = crc32c(bytes(frame[8:64]), seed).to_bytes(4, "little")
    data[DATA_OFFSET : DATA_OFFSET + 64] = frame
    segment.write_bytes(data)
    (path / "hints").write_bytes(b"of a newer release")


async def test_optional_features_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "log"
    async with trio_wal.open_wal(path) as wal:
        await wal.append_many([b"one", b"two"])
    # The mark of the close is chained to that frame: as if the process had been killed before it.
    segment = segment_of(path)
    data = segment.read_bytes()
    close = DATA_OFFSET + BLOCK
    segment.write_bytes(
        data[:BLOCK] + bytes(BLOCK) + data[2 * BLOCK : close] + bytes(len(data) - close)
    )
    log_with_optional_features(path)
    async with trio_wal.open_reader(path) as reader:
        assert reader.first_lsn == 1
    async with trio_wal.open_wal(path, verify_bytes=10**9) as wal:
        async with wal.read() as records:
            assert [record.data async for record in records] == [b"one", b"two"]
        assert await wal.append(b"three") == 3
        await wal.truncate_after(2)
    async with trio_wal.open_wal(path) as wal:
        assert wal.last_lsn == 2
    assert (path / "hints").read_bytes() == b"of a newer release"
    # Whoever writes log.meta anew cannot know whether what he passes over still holds.
    assert (path / "log.meta").read_bytes()[92:96] == bytes(4)


def test_features_have_names() -> None:
    assert feature_names(0) == ()
    assert feature_names(0b110011) == ("zstd", "database", "epochs", "consumers")
    assert feature_names(1 << 31 | 0b101) == ("zstd", "bit 2", "bit 31")
    directory = OsFiles().open_directory(os.fspath(V1.parent / "v1_epochs" / "parted"))
    try:
        meta = read_meta(directory)
    finally:
        directory.close()
    assert meta is not None
    assert meta.features == 0
