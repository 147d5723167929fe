"""The example of a failover is run: as it stands, with few kills."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nats_cluster
import pytest

FAILOVER = Path(__file__).resolve().parent.parent / "docs" / "examples" / "failover.py"

missing = nats_cluster.missing()


@pytest.mark.skipif(missing is not None, reason=missing or "")
@pytest.mark.skipif(sys.platform == "win32", reason="uses SIGKILL")
def test_leaders_are_killed_and_no_order_is_lost_or_doubled() -> None:
    done = subprocess.run(
        [sys.executable, str(FAILOVER), "--kills", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = dict(re.findall(r"^(\D+?) +([\d.]+)$", done.stdout, re.MULTILINE))
    assert table["leaders killed"] == "2"
    assert int(table["orders acknowledged"]) >= 1000
    assert table["orders lost"] == table["orders doubled"] == "0"
