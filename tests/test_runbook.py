"""docs/runbook: every list of commands does what it says, on files of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from archives import wait_archived
from command_line import PROGRAM, flip, segment_files

import trio_wal

PAGE = (Path(__file__).parents[1] / "docs" / "runbook.md").read_text("utf-8")
SECTIONS = {
    title: re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}
DUE = {
    *("Deploy", "Monitor", "Disk full", "Damage found", "Restore drill"),
    *("Upgrade", "Downgrade", "Move a database", "Change `segment_size`"),
}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell")


async def _make(data: Path, archive: Path) -> None:
    kept = trio_wal.DirectoryArchive(archive)
    async with trio_wal.open_database(data / "bank.db", archive=kept, segment_size=1) as db:
        for number in range(12):
            await db.put(b"account %d" % (number % 5), b"%d" % number)
            if number == 5:
                await db.backup(data.parent / "first-backup")
        async with db.consumer("mail") as consumer:
            await consumer.acknowledge(await consumer.__anext__())
        await wait_archived(db.wal)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """With a database in ``data``, its archive in ``backup``, and the command on a path."""
    (tmp_path / "data").mkdir(mode=0o700)
    trio.run(_make, tmp_path / "data", tmp_path / "backup" / "bank")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, command in (("trio-wal", PROGRAM), ("python", [sys.executable])):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {" ".join(command)} "$@"\n')
        script.chmod(0o755)
    return tmp_path


def run(place: Path, commands: str) -> str:
    """What a shell prints that ends at the first command that fails."""
    here = re.sub(r"(?<![\w/])/(data|backup)\b", rf"{place}/\1", commands)
    done = subprocess.run(
        ["sh", "-eu", "-c", here],
        cwd=place,
        env={**os.environ, "PATH": f"{place}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, (commands, done.stdout, done.stderr)
    return done.stdout


def test_the_page_has_a_list_for_everything() -> None:
    assert set(SECTIONS) == DUE
    assert all(SECTIONS.values())


@pytest.mark.parametrize("title", sorted(DUE - {"Damage found"}))
def test_every_list_can_be_run_as_it_stands(place: Path, title: str) -> None:
    said = [run(place, commands) for commands in SECTIONS[title]]
    assert all(said) or title == "Downgrade"
    assert not list((place / "data").glob("*drill*"))
    left = place / "data" / ("elsewhere.db" if title == "Move a database" else "bank.db")
    assert run(place, f"trio-wal verify {left}").startswith("OK: ")


def test_damage_is_seen_restored_from_the_archive_and_repaired(place: Path) -> None:
    log = place / "data" / "bank.db" / "log"
    flip(segment_files(log)[-2], 4096 + 70)
    looked, restored, repaired = (run(place, commands) for commands in SECTIONS["Damage found"])
    assert "checksum of the frame body does not match" in looked
    assert "nothing was changed" in looked
    assert "database made" in restored
    assert "what was there before is in " in repaired
    assert repaired.splitlines()[-2].startswith("OK: ")
    # The copy that was made first is still as damaged as it was.
    assert (place / "data" / "bank.damaged").is_dir()
    shutil.rmtree(place / "data" / "bank.db")
