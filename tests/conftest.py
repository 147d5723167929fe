from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Disk

from trio_wal.testing import MemoryFiles


@pytest.fixture
def files() -> MemoryFiles:
    """Files in memory, to be stalled and broken."""
    return MemoryFiles()


@pytest.fixture(params=["memory", "real"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    """For what must hold on files in memory and on real ones."""
    return Disk(tmp_path if request.param == "real" else None)
