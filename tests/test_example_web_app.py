"""docs/examples/web_app.py, with its workers and its owner killed."""

from __future__ import annotations

import http.client
import os
import signal
import sys
import threading
from pathlib import Path
from subprocess import Popen

import pytest
from examples import kill, read, running

pytest.importorskip("hypercorn")
pytest.importorskip("quart_trio")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="descriptors that are passed on")


class Site:
    """What a client sees."""

    def __init__(self, process: Popen[str]) -> None:
        lines = read(process, 2)
        assert [line.split()[0] for line in lines] == ["writes", "reads"]
        self.writes, self.reads = (int(line.rpartition(":")[2]) for line in lines)

    def put(self, name: str, text: str) -> str:
        """Returns the bookmark."""
        status, headers, _ = ask(self.writes, "PUT", f"/notes/{name}", text)
        assert status == 204
        return headers["Bookmark"]

    def get(self, name: str, bookmark: str) -> tuple[str, str]:
        """The text, and who has answered."""
        status, headers, text = ask(self.reads, "GET", f"/notes/{name}", "", bookmark)
        # 503: the machine is so busy that the worker has not seen it within its patience.
        while status == 503:
            status, headers, text = ask(self.reads, "GET", f"/notes/{name}", "", bookmark)
        assert status == 200, text
        return text, headers["Worker"]


def ask(
    port: int, method: str, path: str, body: str, bookmark: str = "0@0"
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=150)
    try:
        connection.request(method, path, body or None, {"Bookmark": bookmark})
        answer = connection.getresponse()
        headers = {name.title(): value for name, value in answer.getheaders()}
        return answer.status, headers, answer.read().decode()
    finally:
        connection.close()


def test_a_client_reads_its_own_writes_whoever_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    acknowledged: list[str] = []
    with running("web_app", path, "--workers", "2") as process:
        site = Site(process)
        for number in range(20):
            bookmark = site.put("note", f"text {number}")
            text, worker = site.get("note", bookmark)
            assert text == f"text {number}"
            if number in (5, 10):
                os.kill(int(worker), signal.SIGKILL)

        def write() -> None:
            while True:
                try:
                    site.put(f"n{len(acknowledged)}", f"{len(acknowledged)}")
                except (OSError, http.client.HTTPException):
                    return
                acknowledged.append(f"n{len(acknowledged)}")
                if len(acknowledged) == 10:
                    enough.set()

        enough = threading.Event()
        writer = threading.Thread(target=write)
        writer.start()
        assert enough.wait(150)
        kill(process)  # returns when the workers, which have the same standard output, have ended
        writer.join()
    with running("web_app", path, "--workers", "1") as process:
        site = Site(process)
        bookmark = site.put("last", "one")
        for number, name in enumerate(acknowledged):
            assert site.get(name, bookmark)[0] == str(number)
        assert ask(site.reads, "GET", "/notes/none", "", bookmark)[0] == 404
        assert ask(site.reads, "GET", "/notes/last", "", "no bookmark")[0] == 400
        assert ask(site.reads, "GET", "/notes/last", "", "1@ffffffff")[0] == 409
        process.terminate()
        assert process.wait() == 0
