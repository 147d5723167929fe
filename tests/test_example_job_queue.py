"""docs/examples/job_queue.py, killed in mid-flight."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

from examples import finish, kill, load, read, running, write

import trio_wal

example = load("job_queue")


def job(kind: str, payload: str, **options: float) -> str:
    return json.dumps({"kind": kind, "payload": payload, **options})


def payload_of(told: str) -> str:
    word, _, line = told.split(maxsplit=2)
    assert word == "enqueued"
    return str(json.loads(line)["payload"])


async def test_no_job_is_lost_and_no_effect_is_doubled_however_often_it_is_killed(
    tmp_path: Path,
) -> None:
    path, rng = tmp_path / "jobs.db", random.Random(1)
    options = (path, "--visibility", "0.5", "--tries", "3")
    kinds: dict[str, str] = {}
    acknowledged: list[str] = []
    for life in range(4):
        lines = []
        for number in range(40):
            payload = f"{life}-{number}"
            kind = kinds[payload] = rng.choice(["hello", "hello", "hello", "flaky", "broken"])
            delay = rng.choice([0, 0, 0.01])
            lines.append(job(kind, payload, priority=rng.randrange(3), delay=delay))
        with running("job_queue", *options) as process:
            write(process, *lines)
            told = read(process, rng.randrange(10, 35))
            told += kill(process)
        acknowledged += [payload_of(line) for line in told]
    with running("job_queue", *options) as process:
        finish(process)
    async with trio_wal.open_database_reader(path) as db:
        done = Counter(payload for _, (_, payload) in example.done.scan(db))
        dead = Counter(job.payload for _, job in example.dead.scan(db))
        assert not list(example.jobs.scan(db))
        assert not list(example.ready.scan(db))
        assert not list(example.later.scan(db))
    ended = done + dead
    assert len(acknowledged) >= 40
    assert set(acknowledged) <= ended.keys()
    assert set(ended.values()) == {1}
    # A try that was killed counts as one: a job may be dead that was only unlucky.
    assert all(kinds[payload] != "broken" for payload in done)


async def test_priorities_come_first_and_within_one_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    priorities = [random.Random(2).randrange(4) for _ in range(40)]
    with running("job_queue", path, "--workers", "0") as process:
        write(process, *(job("hello", str(p), priority=p) for p in priorities))
        told = finish(process)
    assert told[-3:] == ["jobs: 40", "done: 0", "dead: 0"]
    with running("job_queue", path, "--workers", "1") as process:
        assert finish(process) == ["jobs: 0", "done: 40", "dead: 0"]
    async with trio_wal.open_database_reader(path) as db:
        order = [(int(payload), number) for _, (number, payload) in example.done.scan(db)]
    assert [priority for priority, _ in order] == sorted(priorities)
    assert order == sorted(order)


async def test_what_fails_again_and_again_is_dead_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    with running("job_queue", path, "--tries", "2") as process:
        write(process, job("broken", "a"), job("flaky", "b"), job("hello", "c", delay=0.05))
        assert finish(process)[-3:] == ["jobs: 0", "done: 2", "dead: 1"]
    async with trio_wal.open_database_reader(path) as db:
        ((_, letter),) = example.dead.scan(db)
    assert (letter.payload, letter.tries) == ("a", 2)
    assert letter.error == "ValueError(\"nobody can do job 1, 'a'\")"
