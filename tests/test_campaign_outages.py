"""Power cuts under servers: which there are, and the disk that serves one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="loop devices and FUSE are Linux's")

from campaigns import _mounts, outages

TESTS = Path(__file__).parent

SCRIPT = """
import os, sys
from pathlib import Path
from campaigns import _cuts, _mounts, outages

folder = Path(sys.argv[1])
_mounts.enter_private_namespace()
_mounts.make(outages.SYSTEM, str(folder / "base"))
disk = outages.Disk(folder / "disk", folder / "data")
disk.record(folder / "base")
for name, synced in (("kept", True), ("lost", False)):
    fd = os.open(folder / "data" / name, os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"data")
    if synced:
        os.fsync(fd)
    os.close(fd)
disk.cut()
disk.come_back(_cuts.MODES.index("lost"))
print(sorted(os.listdir(folder / "data")))
disk.close()
"""


def test_a_disk_has_after_the_cut_what_was_synced_and_nothing_else(tmp_path: Path) -> None:
    if (reason := _mounts.why_not([outages.SYSTEM.name], fuse=True)) is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['kept', 'lost+found']\n"


def test_every_kind_of_outage_has_its_control() -> None:
    found = Counter((outage, sync) for outage, sync, _ in outages.cases(16, 1))
    assert found == {
        ("all", "always"): 6,
        ("all", "default"): 2,
        ("split", "always"): 6,
        ("split", "default"): 2,
    }
