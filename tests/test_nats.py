"""A log on real NATS servers of this machine: refusals, takeovers, servers killed and paused.

`nox -s cluster` runs this; without nats-py and a nats-server it is skipped.  What is asserted of
time are the promises of the reference alone, and wide.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import attrs
import nats_cluster
import pytest
import trio
import trio.testing
from helpers import read_all
from nats_cluster import Cluster, running
from nats_writers import Writers, found_on, heal, js, keep_open, leader, log_on

import trio_wal
from trio_wal import nats
from trio_wal._caslog import Unsure

REFUSED_SECONDS: Final = 30.0
GAP_SECONDS: Final = 60.0
"""Bounds for a machine that is busy with something else; what is usual is in docs/replication."""
"""For which nothing may be acknowledged after a leader's death."""

missing = nats_cluster.missing()
real = pytest.mark.skipif(missing is not None, reason=missing or "")


# -- what servers answer: none is needed -------------------------------------------------------


@pytest.mark.skipif(missing is not None and "nats-py" in missing, reason=missing or "")
@pytest.mark.parametrize("what", ["wanted", "elects", "other"])
def test_servers_that_elect_a_leader_are_asked_again_and_other_errors_are_theirs(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from trio_wal import _natscas

    codes = {"elects": 10008, "other": 10059}
    error = {"err_code": codes.get(what), "description": "for a reason"}
    data = json.dumps({"seq": 7} if what == "wanted" else {"error": error}).encode()

    async def ask_one(*_: object) -> Any:
        return SimpleNamespace(data=data)

    connection = _natscas.Connection(
        _natscas.Access(servers=("nats://a:1",), name="x"), lambda: None
    )
    monkeypatch.setattr(connection, "ask_one", ask_one)
    answer = connection.api("STREAM.CREATE.x")
    if what == "wanted":
        assert asyncio.run(answer) == {"seq": 7}
    elif what == "elects":
        with pytest.raises(Unsure, match=r"^for a reason \(error 10008\)$"):
            asyncio.run(answer)
    else:
        with pytest.raises(_natscas.ApiError, match=r"^for a reason \(error 10059\)$"):
            asyncio.run(answer)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_who_waits_is_told_when_the_clients_loop_itself_fails() -> None:
    """The thread says why, as a thread does."""
    from trio_wal import _asyncio

    thread = _asyncio.AsyncioThread("x")

    async def wait() -> None:
        await asyncio.sleep(60)

    async def ask(told: list[str]) -> None:
        with pytest.raises(trio.ClosedResourceError) as refused:
            await thread.call(wait)
        told.append(str(refused.value))

    async def spoil() -> None:
        def select(timeout: float | None) -> list[Any]:
            raise OSError("the selector is broken")

        loop: Any = asyncio.get_running_loop()
        loop._selector.select = select

    told: list[str] = []
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask, told)
            await trio.testing.wait_all_tasks_blocked()
            # The loop may be at an end before it can answer this.
            with suppress(trio.ClosedResourceError):
                await thread.call(spoil)
        assert told == ["this log is closed: its client's event loop has ended"] * 3
        # The others were told after it was closed.
        with pytest.raises(trio.ClosedResourceError, match=r"^this log is closed$"):
            await thread.call(wait)
        await thread.aclose()


@pytest.mark.skipif(missing is not None and "nats-py" in missing, reason=missing or "")
# It is the client's own error that is told otherwise; the session `cluster` has the client.
async def test_who_is_about_to_listen_when_it_is_closed_is_told_so() -> None:
    """A reader that is left as soon as it is open."""
    from trio_wal import _asyncio, _natscas

    access = _natscas.Access(servers=("nats://a:1",), name="x")
    cas = _natscas.NatsCas(access, "x", _asyncio.AsyncioThread("x"))
    await cas._thread.call(cas._connection.close)
    with pytest.raises(trio.ClosedResourceError, match=r"^this log is closed$"):
        await cas.changed(1.0)
    await cas.aclose()


# -- the description: no server, no client ---------------------------------------------------


def test_a_log_is_described_and_its_secrets_are_not_shown() -> None:
    log = nats.Log(["nats://a:1", "nats://b:2"], "orders", user="me", password="secret")
    assert log.address == "nats://a:1,b:2/orders"
    assert "secret" not in repr(log)
    assert nats.Log("nats://a:1", "x").servers == ("nats://a:1",)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        log.name = "other"  # type: ignore[misc]


def test_a_url_names_a_log() -> None:
    log = nats.Log.parse(
        "nats://me:p%40ss@a:1,b/orders?monitor=http://a:8222&monitor=http://b:8222"
        "&replicas=1&takeover=false&unavailable_after=2.5&assume_synced=true&max_bytes=1000"
    )
    assert log == nats.Log(
        ["nats://a:1", "nats://b:4222"],
        "orders",
        user="me",
        password="p@ss",
        monitor=["http://a:8222", "http://b:8222"],
        replicas=1,
        takeover=False,
        unavailable_after=2.5,
        assume_synced=True,
        max_bytes=1000,
    )


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("nats://host:4222", "must end with the log's name"),
        ("nats://me:secret@host:4222", "must end with the log's name"),
        ("http://host/orders", "must begin with 'nats://'"),
        ("nats://host:4222/a b", "^name must be 1 to 64"),
        ("nats://host:4222/" + "a" * 65, "^name must be 1 to 64"),
        ("nats://host:99999/orders", "^servers: Port out of range"),
        ("nats:///orders", "^servers must be URLs"),
        ("nats://host:4222/orders?colour=red", "has no option 'colour'"),
        ("nats://host:4222/orders?replicas=many", "replicas must be a number"),
        ("nats://host:4222/orders?replicas=1&replicas=2", "names 'replicas' twice"),
        ("nats://host:4222/orders?takeover=maybe", "takeover must be 'true' or 'false'"),
        ("nats://host:4222/orders?monitor=ftp://x", "^monitor must be URLs"),
    ],
)
def test_what_is_no_url_of_a_log_is_refused_when_called(url: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        nats.Log.parse(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"servers": []}, ValueError, "^servers must name"),
        ({"servers": ["nats://me:secret@a:1"]}, ValueError, "^servers must not carry a password"),
        ({"servers": [17]}, TypeError, "^servers must be URLs"),
        ({"name": 17}, TypeError, "^name must be a str"),
        ({"name": ""}, ValueError, "^name must be"),
        ({"replicas": 0}, ValueError, "^replicas must be at least 1"),
        ({"replicas": 6}, ValueError, "^replicas must be at least 1 and at most 5"),
        ({"max_bytes": 0}, ValueError, "^max_bytes"),
        ({"unavailable_after": -1}, ValueError, "^unavailable_after"),
        ({"takeover": 1}, TypeError, "^takeover must be True or False"),
        ({"assume_synced": None}, TypeError, "^assume_synced must be True or False"),
        ({"tls": True}, TypeError, r"^tls must be an ssl\.SSLContext"),
        ({"password": 17}, TypeError, "^password must be a str"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    arguments: dict[str, Any] = {"servers": ["nats://a:1"], "name": "orders", **options}
    with pytest.raises(error, match=match):
        nats.Log(**arguments)


@pytest.mark.parametrize("where", ["nats://a:1/orders", nats.Log("nats://a:1", "orders")])
def test_options_of_a_directory_are_refused_when_called(where: Any) -> None:
    for option, value in (
        ("compression", "zstd"),
        ("verify_bytes", 17),
        ("trust_directory", True),
        ("files", trio_wal.testing.MemoryFiles()),
    ):
        with pytest.raises(TypeError, match=rf"^{option}: not an option of a replicated log$"):
            trio_wal.open_wal(where, **{option: value})
    with pytest.raises(ValueError, match=r"^durability must be 'sync' for a replicated log"):
        trio_wal.open_wal(where, durability="interval")
    with pytest.raises(TypeError, match=r"^files: not an option"):
        trio_wal.open_reader(where, files=trio_wal.testing.MemoryFiles())


async def test_without_the_extra_it_is_said_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "nats.aio.client", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trio-wal\[nats\]'$") as caught:
        async with trio_wal.open_wal("nats://a:1/orders"):
            pytest.fail("opened")
    assert "\n" not in str(caught.value)


@real
async def test_servers_that_are_not_there_are_named_in_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(trio_wal.LogUnavailableError, match=r"nats://127\.0\.0\.1:1"):
        async with trio_wal.open_wal("nats://127.0.0.1:1/orders"):
            pytest.fail("opened")
    assert time.monotonic() - started < REFUSED_SECONDS


# -- refusals -----------------------------------------------------------------------------


@contextmanager
def refused(error: type[Exception], match: str) -> Iterator[None]:
    started = time.monotonic()
    with pytest.raises(error, match=match):
        yield
    assert time.monotonic() - started < REFUSED_SECONDS


async def attempt(log: nats.Log) -> None:
    async with trio_wal.open_wal(log) as wal:
        await wal.append(b"never")
        pytest.fail("opened, and appended")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One server that syncs every write."""
    with running(tmp_path_factory.mktemp("single"), 1, seed=1) as cluster:
        yield cluster


async def streams(cluster: Cluster) -> list[str]:
    answer = await trio.to_thread.run_sync(js, cluster, "STREAM.NAMES", {})
    return list(answer["streams"] or [])


@real
async def test_one_server_is_taken_where_one_copy_is_asked_for(single: Cluster) -> None:
    with refused(nats.UnsuitableServersError, "there are 1 servers for 3 replicas; .*replicas=1"):
        await attempt(log_on(single, "few", replicas=3))
    assert "WAL-few" not in await streams(single)
    async with trio_wal.open_wal(log_on(single, "one")) as wal:
        assert await wal.append(b"record") == 1
        assert wal.statistics().replicas == 1
        assert wal.statistics().assume_synced is False
    with refused(nats.UnsuitableServersError, "has 1 replicas, but 3 were asked for"):
        await attempt(log_on(single, "one", replicas=3, assume_synced=True))


@real
async def test_servers_that_nobody_can_ask_are_refused(single: Cluster) -> None:
    with refused(nats.UnsuitableServersError, "nobody says whether .* syncs every write"):
        await attempt(log_on(single, "unasked", monitor=()))
    with refused(nats.UnsuitableServersError, "nobody says whether .*assume_synced=True"):
        await attempt(log_on(single, "unasked", monitor=["http://127.0.0.1:1"]))
    assert "WAL-unasked" not in await streams(single)
    async with trio_wal.open_wal(log_on(single, "believed", monitor=(), assume_synced=True)) as wal:
        assert wal.statistics().assume_synced
    # The log is there by now: the leader says who has it, and one of those does not answer.
    with refused(
        nats.UnsuitableServersError, r"whether n0, perhaps http://127.0.0.1:1 \(.*\), syncs"
    ):
        await attempt(log_on(single, "believed", monitor=["http://127.0.0.1:1"]))


@real
async def test_a_server_that_syncs_now_and_then_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, 1, seed=2, sync="2m") as cluster:
        with refused(nats.UnsuitableServersError, "does not sync every write; set .*always"):
            await attempt(log_on(cluster))
        assert await streams(cluster) == []


@contextmanager
def monitoring(content: Any) -> Iterator[str]:
    """A server's monitoring that says this."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


SYNCED = {"jetstream": {"config": {"sync_always": True}}}


@real
@pytest.mark.parametrize(
    ("says", "match"),
    [
        ({"server_name": "n0", "version": "2.11.9", **SYNCED}, "2.11.9, which is too old"),
        ({"server_name": "n0", "version": "2.15.1", "jetstream": {}}, "has no JetStream"),
        ({}, "nobody says whether"),
        ([], "nobody says whether"),
    ],
)
async def test_what_a_server_says_of_itself_is_looked_at(
    tmp_path: Path, single: Cluster, says: Any, match: str
) -> None:
    with monitoring(says) as url, refused(nats.UnsuitableServersError, match):
        await attempt(log_on(single, "asked", monitor=[url]))


@real
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metadata": {}}, "was not created by trio-wal"),
        ({"storage": "memory"}, "has storage = 'memory'"),
        ({"max_age": 3600_000_000_000}, "has max_age"),
        ({"max_msgs": 5}, "has max_msgs"),
        ({"discard": "old"}, "has discard = 'old'"),
        ({"deny_delete": False}, "has deny_delete"),
        ({"allow_direct": False}, "has allow_direct"),
        ({"allow_atomic": False}, "has allow_atomic"),
        ({"subjects": ["wal.other.>"]}, "has subjects"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
async def test_a_stream_that_is_not_as_it_should_be_is_refused(
    single: Cluster, changes: dict[str, Any], match: str
) -> None:
    name = "bad-" + "-".join(changes)
    config = {
        "name": f"WAL-{name}",
        "subjects": [f"wal.{name}"],
        "storage": "file",
        "discard": "new",
        "retention": "limits",
        "deny_delete": True,
        "allow_direct": True,
        "allow_atomic": True,
        "metadata": {"trio-wal-uuid": "0" * 32},
        **changes,
    }
    made = await trio.to_thread.run_sync(js, single, f"STREAM.CREATE.WAL-{name}", config)
    assert "error" not in made
    with refused(nats.UnsuitableServersError, match):
        await attempt(log_on(single, name))
    info = await trio.to_thread.run_sync(js, single, f"STREAM.INFO.WAL-{name}", {})
    assert info["state"]["messages"] == 0


@real
async def test_a_subject_that_another_stream_takes_is_refused(single: Cluster) -> None:
    config = {"name": "GREEDY", "subjects": ["wal.taken"], "storage": "file"}
    await trio.to_thread.run_sync(js, single, "STREAM.CREATE.GREEDY", config)
    with refused(nats.UnsuitableServersError, "another stream takes the subject 'wal.taken'"):
        await attempt(log_on(single, "taken"))


ACCOUNTS = """
authorization {
  users: [
    { user: writer, password: right,
      permissions: { publish: ["wal.>", "$JS.API.>"], subscribe: ["_INBOX.>", "wal.>"] } },
    { user: looker, password: right,
      permissions: { publish: ["$JS.API.>"], subscribe: ["_INBOX.>", "wal.>"] } },
    { nkey: %s }
  ]
}
"""


@real
async def test_credentials_and_permissions(tmp_path: Path) -> None:
    import nkeys

    seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    with running(tmp_path, 1, seed=3, more=ACCOUNTS % public) as cluster:
        writer = {"user": "writer", "password": "right"}
        async with trio_wal.open_wal(log_on(cluster, **writer)) as wal:
            await wal.append(b"record")
        async with trio_wal.open_wal(log_on(cluster, nkey_seed=bytes(seed).decode())) as wal:
            assert await wal.append(b"record") == 2
        for wrong in ({"user": "writer", "password": "wrong"}, {}):
            with refused(PermissionError, "refuse the connection, check credentials"):
                await attempt(log_on(cluster, **wrong))
        with refused(PermissionError, "no permission|[Pp]ermissions [Vv]iolation"):
            await attempt(log_on(cluster, user="looker", password="right"))
        async with trio_wal.open_wal(log_on(cluster, **writer)) as wal:
            assert wal.last_lsn == 2


def certificate(folder: Path) -> tuple[Path, Path]:
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


@real
async def test_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    more = f'tls {{ cert_file: "{cert}", key_file: "{key}" }}'
    with running(tmp_path, 1, seed=4, more=more) as cluster:
        known = ssl.create_default_context(cafile=str(cert))
        async with trio_wal.open_wal(log_on(cluster, tls=known)) as wal:
            assert await wal.append(b"record") == 1
        for unknown in (ssl.create_default_context(), None):
            with refused(PermissionError, "refuse the connection, check credentials and TLS"):
                await attempt(log_on(cluster, tls=unknown))


@real
async def test_only_a_log_that_is_there_is_read(single: Cluster) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such log"):
        async with trio_wal.open_reader(log_on(single, "nothing")):
            pytest.fail("opened")
    assert "WAL-nothing" not in await streams(single)


# -- three servers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("cluster"), 3, seed=5) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def _healed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test has done to the servers, the next one finds three that make streams."""
    yield
    if "cluster" in request.fixturenames and not missing:
        made: Cluster = request.getfixturevalue("cluster")
        heal(made)


async def write_through(
    cluster: Cluster, log: nats.Log, fault: Callable[[], object], writers: Writers
) -> None:
    """Write, have something happen, and write until it goes on again for a while."""
    over = trio.Event()
    async with trio_wal.open_wal(log) as wal, trio.open_nursery() as nursery:
        nursery.start_soon(writers.run, wal, over.is_set)
        with trio.fail_after(60):
            while not writers.acknowledged:
                await trio.sleep(0.02)
        await trio.sleep(0.5)
        before = len(writers.acknowledged)
        await trio.to_thread.run_sync(fault)
        with trio.fail_after(100):
            while len(writers.acknowledged) < before + 100 * writers._unit:
                await trio.sleep(0.02)
        over.set()
    writers.judge(await found_on(log))


@real
@pytest.mark.parametrize("number", range(3))
async def test_a_leader_that_is_killed_loses_nothing(cluster: Cluster, number: int) -> None:
    log, writers = log_on(cluster, f"killed-{number}"), Writers()
    async with trio_wal.open_wal(log):
        pass
    server = await leader(cluster, log)
    await write_through(cluster, log, server.kill, writers)
    assert writers.gap < GAP_SECONDS


@real
async def test_a_leader_that_is_paused_loses_nothing(cluster: Cluster) -> None:
    log, writers = log_on(cluster, "paused"), Writers()
    async with trio_wal.open_wal(log):
        pass
    server = await leader(cluster, log)
    await write_through(cluster, log, lambda: server.kill(signal.SIGSTOP), writers)
    assert writers.gap < GAP_SECONDS


@real
async def test_all_servers_killed_lose_nothing(cluster: Cluster) -> None:
    writers = Writers()
    log = log_on(cluster, "all")
    async with trio.open_nursery() as nursery:

        def all_killed() -> None:
            cluster.stop()
            trio.from_thread.run_sync(cluster.start_servers)

        nursery.start_soon(write_through, cluster, log, all_killed, writers)


@real
async def test_units_over_the_limit_of_a_message_are_whole_through_a_kill(cluster: Cluster) -> None:
    log, writers = log_on(cluster, "units"), Writers(2, size=600_000, unit=5)
    async with trio_wal.open_wal(log):
        pass
    server = await leader(cluster, log)
    over = trio.Event()
    async with trio_wal.open_wal(log) as wal, trio.open_nursery() as nursery:
        nursery.start_soon(writers.run, wal, over.is_set)
        await trio.sleep(1)
        await trio.to_thread.run_sync(server.kill)
        before = len(writers.acknowledged)
        with trio.fail_after(100):
            while len(writers.acknowledged) < before + 20:
                await trio.sleep(0.02)
        over.set()
    found = await found_on(log)
    writers.judge(found)
    assert len(found) % 5 == 0


@real
@pytest.mark.parametrize("kill", [False, True])
async def test_a_live_writer_is_taken_over(cluster: Cluster, kill: bool) -> None:
    log, writers = log_on(cluster, f"takeover-{kill}"), Writers()
    over = trio.Event()
    rounds = 2 if kill else 5
    async with trio.open_nursery() as nursery:
        for number in range(rounds):
            wal = await nursery.start(keep_open, log, writers, over)
            nursery.start_soon(writers.run, wal, over.is_set, b"%d/" % number)
            await trio.sleep(0.5)
            if kill:
                server = await leader(cluster, log)
                await trio.to_thread.run_sync(server.kill)
                started = time.monotonic()
                wal = await nursery.start(keep_open, log, writers, over)
                assert time.monotonic() - started < GAP_SECONDS
                cluster.start_servers()
                await trio.to_thread.run_sync(cluster.wait_ready)
        over.set()
    writers.judge(await found_on(log))
    assert writers.absent


@real
async def test_a_full_stream_works_again_after_a_purge(cluster: Cluster) -> None:
    log = log_on(cluster, "full", max_bytes=300_000)
    async with trio_wal.open_wal(log) as wal:
        with pytest.raises(trio_wal.LogFullError):
            for _ in range(100):
                await wal.append(bytes(10_000))
        last = wal.last_lsn
        assert wal.statistics().state == "full"
        await wal.truncate_before(last)
        with trio.fail_after(60):
            while wal.statistics().state == "full":
                await trio.sleep(0.05)
        assert await wal.append(bytes(10_000)) == last + 1
    assert list(await found_on(log)) == [last, last + 1]


@real
@pytest.mark.parametrize("busy", [False, True])
async def test_leaving_with_all_servers_dead_takes_no_longer_than_the_bound(
    cluster: Cluster, busy: bool
) -> None:
    log = log_on(cluster, f"dead-{busy}", unavailable_after=4)
    opened = trio_wal.open_wal(log)
    wal = await opened.__aenter__()
    await wal.append(b"one")
    await trio.to_thread.run_sync(cluster.stop)
    if busy:
        wal.send_nowait(b"two")
    started = time.monotonic()
    if busy:
        with pytest.raises(trio_wal.LogUnavailableError) as caught:
            await opened.__aexit__(None, None, None)
        assert caught.value.outcome == "unknown"
    else:
        await opened.__aexit__(None, None, None)
    # The bound, one try, the last mark, and the client's own end; and this machine is slow.
    assert time.monotonic() - started < (4 if busy else 0) + REFUSED_SECONDS


@real
async def test_a_follower_goes_on_through_a_kill(cluster: Cluster) -> None:
    log, writers = log_on(cluster, "followed"), Writers(4)
    async with trio_wal.open_wal(log):
        pass
    server = await leader(cluster, log)
    found: dict[int, bytes] = {}

    async def follow() -> None:
        async with trio_wal.open_reader(log) as reader, reader.follow() as records:
            async for record in records:
                found[record.lsn] = record.data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        await write_through(cluster, log, server.kill, writers)
        with trio.fail_after(60):
            while not writers.acknowledged.items() <= found.items():
                await trio.sleep(0.02)
        nursery.cancel_scope.cancel()


@real
async def test_a_long_log_is_read_whole_from_anywhere(cluster: Cluster) -> None:
    log = log_on(cluster, "long")
    sizes = [10, 20_000, 900_000, 2_500_000, 5] * 4
    async with trio_wal.open_wal(log) as wal:
        for number, size in enumerate(sizes):
            await wal.append(bytes([number]) * size)
        expected = {lsn: bytes([lsn - 1]) * size for lsn, size in enumerate(sizes, 1)}
        assert await read_all(wal) == expected
        for start in (1, 3, 4, 5, 20):
            tail = {lsn: data for lsn, data in expected.items() if lsn >= start}
            assert await read_all(wal, start) == tail
        # A server that is behind for a moment is not counted as current: the majority has answered.
        with trio.fail_after(60):
            while wal.statistics().replicas_current < 3:
                await trio.sleep(0.05)
        assert wal.statistics().replicas == 3


@real
async def test_whoever_asks_first_leaves_a_live_owner_alone(cluster: Cluster) -> None:
    log = log_on(cluster, "polite")
    async with trio_wal.open_wal(log) as wal:
        with pytest.raises(trio_wal.LogLockedError, match="process "):
            async with trio_wal.open_wal(attrs.evolve(log, takeover=False)):
                pytest.fail("opened")
        assert await wal.append(b"one") == 1
    async with trio_wal.open_wal(attrs.evolve(log, takeover=False)) as wal:
        assert wal.last_lsn == 1


# -- a database, and a replica of it ----------------------------------------------------------


@real
async def test_a_standby_is_promoted_when_leader_and_server_are_gone(
    cluster: Cluster, tmp_path: Path
) -> None:
    log = log_on(cluster, "promoted")
    acknowledged: dict[bytes, bytes] = {}

    async def write(db: trio_wal.Database, task: int) -> None:
        with suppress(trio_wal.LogFailedError):
            for number in range(100_000):
                key = b"%d.%d" % (task, number)
                await db.put(key, b"value")
                acknowledged[key] = b"value"

    async with (
        trio_wal.open_database(tmp_path / "leader", log=log) as leading,
        trio.open_nursery() as nursery,
    ):
        for task in range(8):
            nursery.start_soon(write, leading, task)
        async with trio_wal.open_replica(tmp_path / "standby", log=log) as replica:
            with trio.fail_after(60):
                await replica.wait_for(100)
            server = await leader(cluster, log)
            await trio.to_thread.run_sync(server.kill)
            began = time.monotonic()
            async with replica.promote() as db:
                await db.put(b"by", b"the new one")
                assert time.monotonic() - began < 2 * GAP_SECONDS
                assert acknowledged.items() <= dict(db.scan()).items()
                nursery.cancel_scope.cancel()
    # A machine that has nothing.
    async with trio_wal.open_database(tmp_path / "new", log=log) as db:
        assert acknowledged.items() <= dict(db.scan()).items()
        assert db.get(b"by") == b"the new one"


# -- forked children ------------------------------------------------------------------------

FORKED = """
import os, signal, sys, time, trio, trio_wal

class Left(Exception):
    pass

async def append_for_ever(handle):
    try:
        while True:
            await handle.append(b"record")
    except trio.ClosedResourceError:
        if os.getpid() == parent:
            raise

def cas_of(kind, handle):
    return {
        "log": lambda: handle._log.engine._cas,
        "database": lambda: handle.wal._log.engine._cas,
        "reader": lambda: handle._source.log.cas,
        "replica": lambda: handle._following.source.log.cas,
    }[kind]()

async def follow(stream):
    try:
        async with stream as items:
            async for _ in items:
                pass
    except trio.ClosedResourceError:
        if os.getpid() == parent:
            raise

async def main(kind, url, path, how):
    opened = {
        "log": lambda: trio_wal.open_wal(url),
        "reader": lambda: trio_wal.open_reader(url),
        "database": lambda: trio_wal.open_database(path, log=url),
        "replica": lambda: trio_wal.open_replica(path, log=url),
    }[kind]
    with trio.fail_after(90):
        try:
            async with opened() as handle, trio.open_nursery() as nursery:
                streams = {"log": "follow", "reader": "follow"}.get(kind, "changes")
                nursery.start_soon(follow, getattr(handle, streams)())
                if kind == "log":
                    nursery.start_soon(append_for_ever, handle)
                    await handle.append(b"record")
                else:
                    # Whatever it looks at now and then, it is at rest or not.
                    await trio.sleep(0.3)
                child = os.fork()
                if child == 0:
                    signal.alarm(60)
                    try:
                        calls = {"log": "read", "reader": "read"}.get(kind, "snapshot")
                        getattr(handle, calls)()
                    except trio.ClosedResourceError:
                        pass
                    else:
                        os._exit(1)
                    try:
                        await cas_of(kind, handle).last()
                    except trio.ClosedResourceError:
                        pass
                    else:
                        os._exit(3)
                    if how == "exception":
                        raise Left
                    await handle.aclose()
                    nursery.cancel_scope.cancel()
                    await trio.lowlevel.checkpoint()
                done = 0, 0
                while done == (0, 0):
                    await trio.sleep(0.01)
                    done = os.waitpid(child, os.WNOHANG)
                assert os.waitstatus_to_exitcode(done[1]) == 9, done
                if kind == "log":
                    await handle.append(b"record")
                elif kind == "database":
                    await handle.put(b"key", b"the parent's")
                    assert handle.get(b"key") == b"the parent's"
                elif kind == "replica":
                    await handle.wait_for(1)
                    async with handle.promote() as db:
                        await db.put(b"key", b"the parent's")
                else:
                    async with handle.read() as records:
                        assert [record.data async for record in records] != []
                print("parent", flush=True)
                nursery.cancel_scope.cancel()
            if os.getpid() != parent:
                os._exit(9)
        except BaseException as exc:
            if os.getpid() != parent:
                found = [exc]
                while hasattr(found[0], "exceptions"):
                    found = found[0].exceptions
                os._exit(9 if isinstance(found[0], Left) else 2)
            raise

parent = os.getpid()
trio.run(main, *sys.argv[1:])
"""


@real
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("how", ["exception", "aclose"])
@pytest.mark.parametrize("kind", ["log", "reader", "database", "replica"])
async def test_a_forked_child_leaves_its_parents_connection_alone(
    single: Cluster, tmp_path: Path, kind: str, how: str
) -> None:
    url = f"{single.urls[0]}/forked-{kind}-{how}?replicas=1&monitor={single.monitors[0]}"
    if kind == "reader":
        async with trio_wal.open_wal(url) as wal:
            await wal.append(b"record")
    if kind == "replica":
        async with trio_wal.open_database(tmp_path / "db", log=url) as db:
            await db.put(b"key", b"value")
    with trio.fail_after(120):
        done = await trio.run_process(
            [sys.executable, "-c", FORKED, kind, url, str(tmp_path / "here"), how],
            capture_stdout=True,
            env={**os.environ, "PYTHONPATH": str(Path(trio_wal.__file__).parent.parent)},
        )
    assert done.stdout == b"parent\n"
    if kind in ("database", "replica"):
        async with trio_wal.open_database(tmp_path / "db", log=url) as db:
            assert db.get(b"key") == b"the parent's"
    else:
        async with trio_wal.open_reader(url) as reader, reader.read() as records:
            assert {record.data async for record in records} == {b"record"}
