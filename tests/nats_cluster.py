"""Real NATS servers for tests: three of them on this machine, killed, stopped and started again.

Law: processes and their configuration; knows nothing of logs.  The servers end with this process,
whatever becomes of it, and only those that this module has started.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

READY_SECONDS: Final = 60.0
FIRST_PORT: Final = 24_200
"""Below the ports that the system gives to clients, of which one could be taken meanwhile."""
LAST_PORT: Final = 29_000
PR_SET_PDEATHSIG: Final = 1


def server_binary() -> str | None:
    """nats-server, as pip has installed it, or the system."""
    beside = Path(sys.executable).with_name("nats-server")
    return str(beside) if beside.exists() else shutil.which("nats-server")


def missing() -> str | None:
    """Why no servers can be started; None: they can."""
    if importlib.util.find_spec("nats") is None:
        return "nats-py is not installed"
    return None if server_binary() else "there is no nats-server"


def end_with_parent() -> None:
    """Have this process killed when the thread ends that has started it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int, seed: int) -> list[int]:
    found: list[int] = []
    span = LAST_PORT - FIRST_PORT
    for step in range(span):
        port = FIRST_PORT + (seed * 97 + step) % span
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


@attrs.define(eq=False)
class Server:
    """One server and its process."""

    name: str
    folder: Path
    port: int
    monitor_port: int
    cluster_port: int
    host: str = "127.0.0.1"
    enter: Callable[[], None] | None = None
    """Called in its process before the server begins."""
    config: str = ""
    process: subprocess.Popen[bytes] | None = None
    paused: bool = False

    @property
    def url(self) -> str:
        return f"nats://{self.host}:{self.port}"

    @property
    def monitor(self) -> str:
        return f"http://{self.host}:{self.monitor_port}"

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "server.conf"
        config.write_text(self.config)
        binary = server_binary()
        assert binary is not None
        with (self.folder / "log").open("ab") as output:
            self.process = subprocess.Popen(
                [binary, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=self._begin,  # noqa: PLW1509  (calls to the system)
            )

    def _begin(self) -> None:
        end_with_parent()
        if self.enter is not None:
            self.enter()

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        assert self.process is not None
        self.paused = how == signal.SIGSTOP
        self.process.send_signal(how)
        if how in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait()

    def ask(self, path: str) -> Any:
        """Its monitoring; None: it does not answer."""
        try:
            with urllib.request.urlopen(f"{self.monitor}/{path}", timeout=2) as answer:
                return json.load(answer)
        except (OSError, ValueError):
            return None

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Cluster:
    """Servers that know each other."""

    def __init__(
        self,
        folder: Path,
        count: int = 3,
        *,
        seed: int = 0,
        sync: str = "always",
        more: str = "",
        jetstream: str = "max_mem: 64MB, max_file: 10GB",
        places: Sequence[tuple[str, Callable[[], None] | None]] = (),
    ) -> None:
        """
        Args:
          seed: of the ports, so that several clusters do not look at the same ones.
          more: lines of each server's configuration.
          places: where each server is: its address, and what takes its process there.
        """
        ports = _free_ports(3 * count, seed)
        self.servers = [
            Server(f"n{n}", folder / f"n{n}", *ports[3 * n : 3 * n + 3]) for n in range(count)
        ]
        for one, (host, enter) in zip(self.servers, places, strict=False):
            one.host, one.enter = host, enter
        routes = ", ".join(f"nats://{one.host}:{one.cluster_port}" for one in self.servers)
        for one in self.servers:
            cluster = f"""
cluster {{ name: walcl, listen: "{one.host}:{one.cluster_port}", routes: [{routes}],
  ping_interval: "2s", ping_max: 2, write_deadline: "5s" }}
"""
            one.config = f"""
server_name: {one.name}
listen: "{one.host}:{one.port}"
http: "{one.host}:{one.monitor_port}"
max_payload: 1MB
jetstream {{ store_dir: "{one.folder / "data"}", {jetstream}, sync_interval: {sync} }}
{cluster if count > 1 else ""}
{more}
"""

    @property
    def urls(self) -> list[str]:
        return [one.url for one in self.servers]

    @property
    def monitors(self) -> list[str]:
        return [one.monitor for one in self.servers]

    def start_servers(self) -> None:
        """Those that are not running.  In the main thread: a server ends with the thread that has
        started it, and a worker thread ends when it has nothing to do."""
        for one in self.servers:
            if not one.running():
                one.start()

    def start(self) -> None:
        self.start_servers()
        self.wait_ready()

    def wait_ready(self, count: int | None = None) -> None:
        """Until so many servers (all) are in the meta group's view, and current."""
        count = len(self.servers) if count is None else count
        until = time.monotonic() + READY_SECONDS
        while time.monotonic() < until:
            if self._ready(count):
                return
            time.sleep(0.02)
        raise TimeoutError(f"{count} servers are not ready after {READY_SECONDS:.0f} seconds")

    def _ready(self, count: int) -> bool:
        for one in self.servers:
            found = one.ask("jsz") if one.running() else None
            if found is None:
                continue
            if len(self.servers) == 1:
                return True
            meta = found.get("meta_cluster") or {}
            if meta.get("leader") == one.name:
                peers = meta.get("replicas") or []
                return 1 + sum(1 for peer in peers if peer.get("current")) >= count
        return False

    def leader_of(self, stream: str) -> Server | None:
        """The server that leads a stream."""
        for one in self.servers:
            found = one.ask("jsz?streams=1&accounts=1") if one.running() else None
            for account in (found or {}).get("account_details") or []:
                for detail in account.get("stream_detail") or []:
                    leader = (detail.get("cluster") or {}).get("leader")
                    if detail.get("name") == stream and leader:
                        return next((s for s in self.servers if s.name == leader), None)
        return None

    def stop(self) -> None:
        for one in self.servers:
            if one.running():
                one.kill()


@contextlib.contextmanager
def running(folder: Path, count: int = 3, **options: Any) -> Iterator[Cluster]:
    cluster = Cluster(folder, count, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
