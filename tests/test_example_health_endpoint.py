"""docs/examples/health_endpoint.py, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import signal
from pathlib import Path

import pytest
from examples import load, read, running

from trio_wal import Health, HealthReason

DEGRADED = Health("degraded", (HealthReason("disk_full", "there is no disk space"),))
FAILED = Health("failed", (HealthReason("failed", "the log is broken", "failed"),))


@pytest.mark.parametrize(
    ("health", "live", "ready"),
    [(Health("ok", ()), 200, 200), (DEGRADED, 200, 503), (FAILED, 503, 503)],
)
def test_a_probe_is_an_error_where_it_should_be(health: Health, live: int, ready: int) -> None:
    answer = load("health_endpoint").answer
    status, body = answer("/live", health)
    assert status == live
    assert json.loads(body)["status"] == health.status
    assert [reason["code"] for reason in json.loads(body)["reasons"]] == [
        reason.code for reason in health.reasons
    ]
    assert answer("/ready", health)[0] == ready
    assert answer("/", health)[0] == 404


def test_it_answers_as_it_stands(tmp_path: Path) -> None:
    with running("health_endpoint", tmp_path / "bank.db", "--port", "0") as process:
        (url,) = read(process, 1)
        for path, expected in (("/live", 200), ("/ready", 200), ("/other", 404)):
            connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=150)
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == expected
            body = answer.read()
            if expected == 200:
                assert json.loads(body) == {"status": "ok", "reasons": []}
            connection.close()
        process.send_signal(signal.SIGINT)
        process.wait()
