"""The commands that read a log on servers, and `nats check`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import nats_cluster
import pytest
import trio
from nats_cluster import Cluster, running
from nats_writers import log_on

import trio_wal

pytest.importorskip("cyclopts")
pytest.importorskip("rich")

from trio_wal._cli import run

missing = nats_cluster.missing()
real = pytest.mark.skipif(missing is not None, reason=missing or "")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("single"), 1, seed=31) as cluster:
        yield cluster


def url_of(cluster: Cluster, name: str) -> str:
    monitors = "&".join(f"monitor={url}" for url in cluster.monitors)
    return f"{cluster.urls[0]}/{name}?replicas=1&{monitors}"


def told(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code = run([*arguments, "--json"])
    return code, json.loads(capfd.readouterr().out)


@real
def test_a_log_on_servers_is_inspected_verified_and_dumped(
    single: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    async def write() -> None:
        async with trio_wal.open_wal(log_on(single, "orders")) as wal:
            for number in range(3):
                await wal.append(b"order %d" % number)

    trio.run(write)
    url = url_of(single, "orders")
    code, found = told(capfd, "inspect", url)
    assert code == 0
    assert (found["records"], found["first_lsn"], found["last_lsn"]) == (3, 1, 3)
    assert (found["replicas"], found["replicas_current"]) == (1, 1)
    assert found["epoch"] > 0
    assert run(["inspect", url]) == 0
    assert "3 records, LSN 1 to 3, all durable" in capfd.readouterr().out
    code, found = told(capfd, "verify", url)
    assert (code, found["ok"], found["records"], found["bytes"]) == (0, True, 3, 21)
    assert run(["verify", url]) == 0
    assert capfd.readouterr().out == "OK: 3 records, 21 bytes, LSN 1 to 3\n"
    assert run(["dump", url, "--from", "2"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(line["lsn"], line["text"]) for line in lines] == [(2, "order 1"), (3, "order 2")]


@real
def test_servers_are_checked_and_nothing_is_made(
    single: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    code, found = told(capfd, "nats", "check", url_of(single, "nothing"))
    assert (code, found["ok"], found["findings"]) == (0, True, [])
    assert found["servers"][0]["synced"] is True
    assert found["stream"] == "there is no such log yet"
    assert run(["inspect", url_of(single, "nothing")]) == 3
    assert "there is no such log" in capfd.readouterr().err
    assert run(["nats", "check", f"{single.urls[0]}/nothing?monitor=http://127.0.0.1:9"]) == 1
    assert "nobody says whether it syncs every write" in capfd.readouterr().out


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["dump"], ["nats", "check"]])
def test_what_is_no_url_of_a_log_is_a_usage_error(
    command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, "nats://host:4222"]) == 2
    assert "must end with the log's name" in capfd.readouterr().err
