"""`trio-wal bench`: what it measures, what it makes of it, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
from command_line import CommandLine

import trio_wal
from trio_wal._cli._bench import device as device_module
from trio_wal._cli._bench.advice import AIMS, TASKS, Settings, expected, settings_for
from trio_wal._cli._bench.device import Device, device_of, suspicions
from trio_wal._cli._bench.probe import Probe, Times, probe, times_of
from trio_wal._cli.bench import PREFIX
from trio_wal._util import KiB, MiB
from trio_wal.testing import MemoryFiles

bench_module = sys.modules["trio_wal._cli.bench"]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and /sys")


@pytest.fixture
def cli(capsysbinary: pytest.CaptureFixture[bytes]) -> CommandLine:
    return CommandLine(capsysbinary.readouterr)


def syncs(p50: float, p99: float | None = None) -> Times:
    slow = p50 if p99 is None else p99
    return Times(count=100, p50=p50, p90=slow, p99=slow, max=slow)


def a_disk(p50: float, p99: float | None = None, write: float = 500 * MiB) -> Probe:
    times = syncs(p50, p99)
    return Probe(sync_prepared=times, sync_growing=times, write_bytes_per_second=write)


# -- measuring --------------------------------------------------------------------------------


def test_times_are_those_of_a_sorted_list() -> None:
    found = times_of([n / 100 for n in reversed(range(100))])
    assert found == Times(count=100, p50=0.5, p90=0.9, p99=0.99, max=0.99)
    assert times_of([2.0]) == Times(count=1, p50=2.0, p90=2.0, p99=2.0, max=2.0)


def memory() -> MemoryFiles:
    files = MemoryFiles()
    files.open_directory("/d", create=True)
    return files


def test_a_probe_writes_as_a_log_does_and_leaves_nothing() -> None:
    files = memory()
    said: list[float] = []
    found = probe(files.open_directory("/d"), 0.01, said.append)
    assert found.sync_prepared.count >= 5
    assert found.sync_growing.count >= 5
    assert found.write_bytes_per_second > 0
    assert said == sorted(said)
    assert files.contents("/d") == {}


@pytest.mark.parametrize("operation", ["allocate", "pwrite", "sync", "sync_dir"])
def test_a_probe_that_fails_leaves_nothing(operation: str) -> None:
    files = memory()
    files.fail(operation, errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
        probe(files.open_directory("/d"), 0.01, lambda _: None)
    assert caught.value.errno == errno.ENOSPC
    assert files.contents("/d") == {}


def test_a_probe_that_is_ended_leaves_nothing() -> None:
    for limit in range(30):
        files = memory()
        ticks = iter(range(limit))
        with pytest.raises(StopIteration):
            probe(files.open_directory("/d"), 1.0, lambda _, ticks=ticks: next(ticks))  # type: ignore[misc]
        assert files.contents("/d") == {}


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("aim", AIMS)
@pytest.mark.parametrize("disk", [a_disk(5e-5), a_disk(1e-3, 5e-3), a_disk(0.02, 0.1, 10 * MiB)])
async def test_a_log_and_a_database_take_them(aim: Any, disk: Probe) -> None:
    settings = settings_for(aim, disk)
    async with trio_wal.open_wal("/log", files=MemoryFiles(), **settings.for_log()) as wal:  # type: ignore[arg-type]
        assert await wal.append(b"x") == 1
    options: dict[str, Any] = attrs.asdict(settings)
    async with trio_wal.open_database("/db", files=MemoryFiles(), **options) as db:
        await db.put(b"k", b"v")
    # A queue holds twice what the tasks of a round append, or the disk waits for records.
    assert settings.max_queue_size >= 2 * min(TASKS[aim], 128)


def test_the_event_loop_syncs_only_where_it_stands_still_for_a_moment() -> None:
    assert settings_for("low latency", a_disk(1e-4, 9e-4)).sync_in == "loop"
    assert settings_for("low latency", a_disk(1e-4, 2e-3)).sync_in == "thread"
    assert {settings_for(aim, a_disk(1e-4)).sync_in for aim in AIMS[1:]} == {"thread"}


def test_a_slow_disk_is_waited_for_and_a_fast_one_not() -> None:
    assert settings_for("high throughput", a_disk(0.006)).commit_delay == "auto"
    assert settings_for("high throughput", a_disk(0.004)).commit_delay == 0.0
    assert settings_for("high throughput", a_disk(0.01, write=20 * MiB)).segment_size == 64 * MiB
    assert settings_for("high throughput", a_disk(0.01)).segment_size == 256 * MiB


def test_what_waits_is_bounded_by_records_and_by_bytes() -> None:
    small: Settings = settings_for("small memory", a_disk(0.001))
    assert small.waiting_bytes(100) == 2 * 256 * 100
    assert small.waiting_bytes(64 * KiB) == 2 * 256 * KiB


def test_a_round_is_the_processors_part_and_a_sync() -> None:
    rates = expected(100, 10_000, syncs(0.010, 0.030))
    assert rates.records_per_second == pytest.approx(100 / 0.020)
    assert (rates.latency_p50, rates.latency_p99) == pytest.approx((0.020, 0.040))


# -- what the system says -------------------------------------------------------------------------


def codes(device: Device, p50: float = 0.001) -> list[str]:
    return [found.code for found in suspicions(device, syncs(p50))]


def test_a_disk_is_suspected_only_where_something_speaks_against_it() -> None:
    plain = Device(filesystem="ext4", name="nvme0n1", rotational=False, write_cache="write back")
    assert codes(plain) == []
    assert codes(Device()) == []
    assert codes(plain, 1e-6) == ["too_fast"]
    turning = attrs.evolve(plain, name="sda", rotational=True)
    assert codes(turning, 0.008) == []
    assert codes(turning, 0.0005) == ["too_fast_for_a_disk"]
    # A virtual disk is called turning by default.
    assert codes(attrs.evolve(turning, name="vda", virtual=True), 0.0005) == ["virtual"]
    assert codes(attrs.evolve(plain, write_cache="write through")) == ["write_through"]
    assert codes(attrs.evolve(plain, options=("rw", "nobarrier"))) == ["no_barriers"]
    assert codes(attrs.evolve(plain, filesystem="overlay")) == ["overlay"]
    assert codes(attrs.evolve(plain, filesystem="nfs4")) == ["network"]
    assert codes(attrs.evolve(plain, filesystem="fuse.sshfs")) == ["network"]
    assert codes(attrs.evolve(plain, filesystem="tmpfs"), 1e-6) == ["memory"]


@on_linux
def test_a_partition_is_that_of_its_disk(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    at = f"{os.major(number)}:{os.minor(number)}"
    disk = tmp_path / "devices" / "pci" / "sda"
    (disk / "queue").mkdir(parents=True)
    (disk / "sda1").mkdir()
    (disk / "queue" / "rotational").write_text("1\n")
    (disk / "queue" / "write_cache").write_text("write back\n")
    sys_dev = tmp_path / "block"
    sys_dev.mkdir()
    (sys_dev / at).symlink_to(disk / "sda1")
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 1 0:1 / /proc rw - proc proc rw\n"
        f"22 1 {at} / / rw,noatime - ext4 /dev/sda1 rw,barrier=0\n"
    )
    found = device_of(str(tmp_path), mounts, sys_dev)
    assert found == Device(
        filesystem="ext4",
        options=("rw", "noatime", "barrier=0"),
        name="sda",
        rotational=True,
        write_cache="write back",
    )
    assert codes(found, 0.008) == ["no_barriers"]
    assert device_of(str(tmp_path), tmp_path / "gone", tmp_path / "gone") == Device()


# -- the command ----------------------------------------------------------------------------------

TIMES = {"count", "p50", "p90", "p99", "max"}
RATES = {"records_per_second", "latency_p50", "latency_p99"}


def test_advice_is_tried_and_says_so_in_json(cli: CommandLine, tmp_path: Path) -> None:
    found = cli.json("bench", tmp_path, "--advise", "--seconds", "0.02", "--record-size", "50")
    assert set(found) == {
        *("path", "device", "suspicions", "sync_prepared", "sync_growing"),
        *("write_bytes_per_second", "record_size", "advice"),
    }
    assert found["path"] == str(tmp_path)
    assert set(found["device"]) == set(attrs.fields_dict(Device))
    assert set(found["sync_prepared"]) == set(found["sync_growing"]) == TIMES
    assert [one["aim"] for one in found["advice"]] == list(AIMS)
    for one in found["advice"]:
        assert set(one) == {"aim", "settings", "tasks", "waiting_bytes", "expected", "measured"}
        assert set(one["settings"]) == set(attrs.fields_dict(Settings))
        assert set(one["expected"]) == set(one["measured"]) == RATES
        assert min(one["measured"].values()) > 0
        assert one["measured"]["latency_p50"] <= one["measured"]["latency_p99"]
    assert list(tmp_path.iterdir()) == []


def test_advice_fits_80_columns(cli: CommandLine, tmp_path: Path) -> None:
    assert cli("bench", tmp_path, "--advise", "--seconds", "0.02") == 0
    lines = cli.out.splitlines()
    assert max(map(len, lines[1:])) <= 80 + 40 * any(line.startswith("doubt") for line in lines)
    table = [line for line in lines if not line.startswith("doubt")]
    assert max(map(len, table[1:])) <= 80
    for text in ("low latency", "small memory", "sync_in", "records/s measured", "MiB per second"):
        assert text in cli.out
    assert list(tmp_path.iterdir()) == []


def test_without_advise_the_disk_is_measured_and_no_more(cli: CommandLine, tmp_path: Path) -> None:
    assert cli.json("bench", tmp_path, "--seconds", "0.02")["advice"] == []


def test_the_example_of_the_help_runs(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("bench", "--help") == 0
    example = re.search(
        r"trio-wal (bench --advise [^\n│]*?) *[│\n]", cli.out.partition("Example")[2]
    )
    assert example is not None, cli.out
    monkeypatch.chdir(tmp_path)
    assert cli(*example[1].split()) == 0
    assert "low latency" in cli.out


@pytest.mark.parametrize("make", ["missing", "file"])
def test_a_directory_that_cannot_be_used_is_named(
    cli: CommandLine, tmp_path: Path, make: str
) -> None:
    path = tmp_path / make
    if make == "file":
        path.write_bytes(b"")
    assert cli("bench", path) == 3
    why = "No such file or directory" if make == "missing" else "Not a directory"
    assert (cli.out, cli.err) == ("", f"trio-wal: {path}: {why}\n")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_named(cli: CommandLine, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert cli("bench", tmp_path) == 3
    assert cli.err == f"trio-wal: {tmp_path}: Permission denied\n"


def test_a_full_disk_is_one_line_and_nothing_stays(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Probe:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bench_module, "probe", fail)
    assert cli("bench", tmp_path) == 3
    assert cli.err == f"trio-wal: {tmp_path}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--seconds", "0"], "--seconds must be above 0 and at most 600, not 0.0"),
        (["--seconds", "nan"], "--seconds must be above 0 and at most 600, not nan"),
        (["--record-size", "0"], "--record-size must be from 1 to 1048576, not 0"),
    ],
)
def test_bad_options_are_refused_by_name(
    cli: CommandLine, tmp_path: Path, options: list[str], error: str
) -> None:
    assert cli("bench", tmp_path, *options) == 2
    assert cli.err == f"trio-wal: {error}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("stage", ["syncing", "trying"])
def test_ctrl_c_ends_it_and_nothing_stays(tmp_path: Path, stage: str) -> None:
    seconds = "300" if stage == "syncing" else "0.05"
    code = (
        "import sys, trio_wal._cli as c\n"
        "b = sys.modules['trio_wal._cli.bench']\n"
        "b.AIMS = b.AIMS * 100_000\n"
        "sys.exit(c.run(sys.argv[1:]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "bench", str(tmp_path), "--advise", "--seconds", seconds],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wanted = "probe" if stage == "syncing" else "log/wal-*.log"

    def begun() -> bool:
        # What was there at one look may be gone at the next: each trial removes its log.
        with contextlib.suppress(FileNotFoundError):
            return any(tmp_path.glob(f"{PREFIX}*/{wanted}"))
        return False

    try:
        while not begun():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, b"")
    assert list(tmp_path.iterdir()) == []


@on_linux
def test_what_is_in_memory_is_said_to_be(cli: CommandLine) -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or device_module.device_of(str(shm)).filesystem != "tmpfs":
        pytest.skip("no tmpfs there")
    found = cli.json("bench", shm, "--seconds", "0.02")
    assert [one["code"] for one in found["suspicions"]] == ["memory"]
