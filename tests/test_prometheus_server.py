"""The alert rules and the dashboard, evaluated by a real Prometheus server that scrapes a program.

The program has a log in each of the situations that an alert is for, and one that is well.  The
server is Debian's package ``prometheus``; without it these tests are skipped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from cas import CasServers, MemoryLog, open_wal_on_cas
from helpers import Call
from msgspec.structs import replace
from trio.testing import wait_all_tasks_blocked

import trio_wal
from trio_wal import LogFailedError, LogFullError, _sampling
from trio_wal._metrics import Kind, metrics
from trio_wal._replicated import ReplicatedOptions
from trio_wal.testing import MemoryFiles

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, start_http_server

from trio_wal.prometheus import WalCollector

DOCS = Path(__file__).parents[1] / "docs"
ALERTS = DOCS / "prometheus" / "alerts.yml"
DASHBOARD = DOCS / "grafana" / "trio-wal.json"
pytestmark = pytest.mark.skipif(
    not DOCS.exists(), reason="the pages are not here: this is not the source tree"
)
NAMES = {
    metric.name + part
    for _, metric in metrics()
    for part in (("_bucket", "_sum", "_count") if metric.kind is Kind.HISTOGRAM else ("",))
}
PATIENCE_SECONDS = 90
"""After which what should have shown by then does not come any more."""

EXPECTED = {
    "TrioWalFailed": {"failed"},
    "TrioWalDiskFull": {"full"},
    "TrioWalNoAnswer": {"unsettled"},
    "TrioWalNotFollowing": {"not following"},
    "TrioWalCheckpoints": {"checkpoints"},
    "TrioWalQueueFull": {"crowded"},
    "TrioWalSlowSyncs": {"slow"},
    "TrioWalConsumerBehind": {"consumer"},
    "TrioWalArchive": {"no archive"},
    "TrioWalReplicasBehind": {"two of three"},
    "TrioWalReplicaBehind": {"replica behind"},
    "TrioWalLoopStalled": {"stalled"},
}
"""Of each alert, for which logs it is told."""


class NoArchive:
    """An archive that is gone."""

    def put(self, name: str, content: Iterable[bytes]) -> None:
        raise OSError(errno.EHOSTUNREACH, "no route to the archive")

    def list(self) -> list[str]:
        raise OSError(errno.EHOSTUNREACH, "no route to the archive")

    def get(self, name: str) -> Iterator[bytes]:
        raise OSError(errno.EHOSTUNREACH, "no route to the archive")


# -- the program ------------------------------------------------------------------------


class Program:
    """Logs in all situations, which a collector looks at."""

    def __init__(self, stack: AsyncExitStack, nursery: trio.Nursery, tmp_path: Path) -> None:
        self._stack = stack
        self._nursery = nursery
        self._path = tmp_path
        self.collector = WalCollector()

    async def memory(self, name: str, **options: Any) -> tuple[MemoryFiles, Any]:
        files = MemoryFiles()
        manager = trio_wal.open_wal(f"/{name}", files=files, **options)
        wal = await self._stack.enter_async_context(manager)
        self.collector.add(wal, name=name)
        return files, wal

    async def begin(self) -> None:
        await self._well()
        await self._failed_and_full()
        await self._not_archived()
        await self._crowded()
        await self._behind()
        await self._servers()
        await self._slow()

    async def _well(self) -> None:
        """A database at work, with all that a dashboard shows."""
        enter = self._stack.enter_async_context
        db = await enter(trio_wal.open_database(self._path / "well"))
        files = MemoryFiles()
        await (await enter(trio_wal.open_database("/read", files=files))).put(b"key", b"value")
        reader = await enter(trio_wal.open_database_reader("/read", files=files))
        writer, consumer = await enter(db.writer("w")), await enter(db.consumer("c"))
        self.collector.add(db, name="well")
        self.collector.add(reader, name="reader")

        async def work() -> None:
            number = 0
            while True:
                number += 1
                await db.put(b"%d" % (number % 100), b"value")
                await writer.put(b"%d" % (number % 100), b"value")
                with trio.move_on_after(0.01):
                    await consumer.acknowledge(await consumer.__aiter__().__anext__())
                await trio.sleep(0.02)

        self._nursery.start_soon(work)

    async def _failed_and_full(self) -> None:
        files, wal = await self.memory("failed")
        files.fail("sync", errno.EIO)
        with pytest.raises(LogFailedError):
            await wal.append(b"record")
        files, wal = await self.memory("full", segment_size=1)
        files.free_bytes = 0  # before anything wants the next segment to be prepared
        await wal.append(b"one")
        with pytest.raises(LogFullError):
            await wal.append(bytes(3000))
        db_files = MemoryFiles()
        manager = trio_wal.open_database("/db", files=db_files, checkpoint_bytes=1000)
        db = await self._stack.enter_async_context(manager)
        self.collector.add(db, name="checkpoints")
        db_files.fail("store", errno.EIO, times=1_000_000)
        self._stack.callback(db_files.heal)
        await db.put(b"key", bytes(1000))

    async def _not_archived(self) -> None:
        _, wal = await self.memory("no archive", segment_size=1, archive=NoArchive())
        for _ in range(5):
            await wal.append(bytes(3000))

    async def _crowded(self) -> None:
        files, wal = await self.memory("crowded", max_queue_size=10)
        files.hold()
        self._stack.callback(files.release)
        Call(self._nursery, wal.append, b"in flight")
        await wait_all_tasks_blocked()
        for _ in range(15):
            Call(self._nursery, wal.append, b"record")
        await wait_all_tasks_blocked()

    async def _behind(self) -> None:
        files, wal = await self.memory("consumer")
        async with wal.consumer("mailer"):
            await wal.append(b"record")
        files.clock_offset_us = 3600 * 1_000_000
        enter = self._stack.enter_async_context
        files = MemoryFiles()
        await enter(trio_wal.open_database("/followed", files=files))
        reader = await enter(trio_wal.open_database_reader("/followed", files=files))
        vars(reader._follower)["failure"] = OSError(errno.EIO, "Input/output error")
        self.collector.add(reader, name="not following")
        log = MemoryLog(CasServers())
        leader = await enter(trio_wal.open_database(self._path / "a", log=log))
        replica = await enter(trio_wal.open_replica(self._path / "b", log=log))
        await replica.wait_for(await leader.put(b"key", b"value"))
        vars(replica._following)["behind_since"] = trio.current_time() - 100
        self.collector.add(replica, name="replica behind")

    async def _servers(self) -> None:
        servers = CasServers(seed=2)
        now = replace(servers.description(), replicas_current=2)
        vars(servers)["description"] = lambda: replace(now, last=servers.last)
        wal = await self._stack.enter_async_context(open_wal_on_cas(servers))
        self.collector.add(wal, name="two of three")
        silent, patient = CasServers(seed=3), ReplicatedOptions(unavailable_after=3600.0)
        manager = open_wal_on_cas(silent, replication=patient)
        wal = await self._stack.enter_async_context(manager)
        self.collector.add(wal, name="unsettled")
        silent.hold()
        self._stack.callback(silent.release)
        Call(self._nursery, wal.append, b"record")

    async def _slow(self) -> None:
        """Syncs that take long, by what was counted; and an event loop that stands still."""
        _, wal = await self.memory("slow")

        async def sync_slowly() -> None:
            while True:
                wal._log.engine._syncs.note(3.0, 0)
                await trio.sleep(0.05)

        self._nursery.start_soon(sync_slowly)
        blocked, over = threading.Event(), threading.Event()
        self._stack.callback(over.set)

        async def stall() -> None:
            async with trio_wal.open_wal("/stalled", files=MemoryFiles()) as stalled:
                self.collector.add(stalled, name="stalled")
                self.collector._sampler._subjects["stalled"].seen_at -= 1000
                blocked.set()
                over.wait()

        # Not of the nursery: it ends after the stack, whose callbacks end it.
        thread = threading.Thread(target=trio.run, args=(stall,))
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(over.set)
        await trio.to_thread.run_sync(blocked.wait)


@asynccontextmanager
async def program(tmp_path: Path) -> AsyncIterator[int]:
    """Gives the port on which it can be scraped."""
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        running = Program(stack, nursery, tmp_path)
        await running.begin()
        registry = CollectorRegistry()
        registry.register(running.collector)
        server, thread = start_http_server(0, "127.0.0.1", registry)
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            nursery.cancel_scope.cancel()


# -- the server -------------------------------------------------------------------------


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.get("/api/v1/query", query=expression)["result"]
        return result

    def alerts(self) -> dict[str, list[dict[str, Any]]]:
        """What each rule has found, whether it lasts long enough to be told or not."""
        groups = self.get("/api/v1/rules", type="alert")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert all(rule["health"] in ("ok", "unknown") for rule in rules), rules
        return {rule["name"]: rule["alerts"] for rule in rules}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@contextmanager
def prometheus(tmp_path: Path, program_port: int) -> Iterator[Prometheus]:
    config = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            {"job_name": "program", "static_configs": [{"targets": [f"127.0.0.1:{program_port}"]}]}
        ],
    }
    # Whatever is JSON is YAML.
    file = tmp_path / "prometheus.yml"
    file.write_text(json.dumps(config), encoding="utf-8")
    command = ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    command.append("--log.level=warn")
    process, port = begin(command, tmp_path)
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait()


def begin(command: list[str], folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """With a port that nobody has taken between its being found free and the server's use of it."""
    for number in range(10):
        port = free_port()
        with (folder / f"prometheus{number}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{port}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                Prometheus(port).get("/api/v1/status/runtimeinfo")
                # Else it was another server's answer.
                if process.poll() is None:
                    return process, port
            time.sleep(0.05)
        process.kill()
        process.wait()
    raise AssertionError((folder / "prometheus0.log").read_text())


def eventually(check: Callable[[], None]) -> None:
    """Until the check passes, or nobody believes that it ever will."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            check()
            return
        except (AssertionError, OSError, KeyError):
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


# -- what is asked ----------------------------------------------------------------------


def dashboard_expressions() -> dict[str, str]:
    """By panel; variables have the values of a dashboard that was just opened."""
    found: dict[str, str] = {}
    for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$log", ".*").replace("$__rate_interval", "1m")
            assert "$" not in expression
            found[f"{panel['title']} {target['refId']}"] = expression
    return found


def check_dashboard(server: Prometheus) -> None:
    empty = {title for title, text in dashboard_expressions().items() if not server.query(text)}
    assert empty == set()


def check_alerts(server: Prometheus) -> None:
    found = {
        name: {alert["labels"]["log"] for alert in alerts}
        for name, alerts in server.alerts().items()
    }
    assert found == EXPECTED


def check_texts(server: Prometheus) -> None:
    """Their annotations are templates."""
    for name, alerts in server.alerts().items():
        for alert in alerts:
            summary = alert["annotations"]["summary"]
            assert summary.startswith(alert["labels"]["log"]), name
            assert "{{" not in summary
            assert "error" not in summary


def check_scrape(server: Prometheus) -> None:
    assert [up["value"][1] for up in server.query("up")] == ["1"]
    seen = {
        series["__name__"] for series in server.get("/api/v1/series", **{"match[]": '{log!=""}'})
    }
    assert seen - {"ALERTS", "ALERTS_FOR_STATE"} <= NAMES
    assert not NAMES - seen, "each metric is seen in one of the situations"


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Prometheus' server")
async def test_prometheus_evaluates_every_expression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sampling, "LOOP_SECONDS", 0.1)

    def ask(port: int) -> None:
        with prometheus(tmp_path, port) as server:
            eventually(lambda: check_scrape(server))
            eventually(lambda: check_alerts(server))
            eventually(lambda: check_dashboard(server))
            check_texts(server)

    async with program(tmp_path) as port:
        await trio.to_thread.run_sync(ask, port)


# -- without a server -------------------------------------------------------------------


def test_expressions_name_what_there_is() -> None:
    text = ALERTS.read_text("utf-8")
    rules = re.findall(r"- alert: (\w+)\n +expr: (.+)", text)
    assert [name for name, _ in rules] == list(EXPECTED)
    for expression in (*dashboard_expressions().values(), *(rule for _, rule in rules)):
        used = set(re.findall(r"trio_wal_\w+", expression))
        assert used, expression
        assert used <= NAMES, expression


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in panels]
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert set(variables) == {"datasource", "log"}
    (name,) = re.findall(r"label_values\((\w+), log\)", variables["log"]["query"]["query"])
    assert name in NAMES
