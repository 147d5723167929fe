from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Disk
from hypothesis import HealthCheck, settings

from trio_wal.testing import MemoryFiles

# A machine that is busy with something else is slow, and that is no finding.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_sessionstart() -> None:
    """A shell without job control starts what runs in the background with SIGINT ignored,
    and Python then installs no handler: Ctrl-C would reach neither tests nor children."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Thousands of collected tests live as long as the process: no collector need look at them
    again, which takes it a third of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """A campaign turns the log off, in whatever process it runs: other tests look at it."""
    log = logging.getLogger("trio_wal")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def files() -> MemoryFiles:
    """Files in memory, to be stalled and broken."""
    return MemoryFiles()


@pytest.fixture(params=["memory", "real"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Disk:
    """For what must hold on files in memory and on real ones."""
    return Disk(tmp_path if request.param == "real" else None)
