"""The campaign of readers: a short share of it, and that it sees what it is for.

The judge is told of a log and of streams; each way of being wrong has its own words.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from campaigns._marks import Chain, History, Mark, Runs, Wrong, mark_of, record, runs_of
from campaigns._onlookers import Onlooker, report_tool
from campaigns._owner import Owner, _LogLife
from campaigns.readers import Judge, Outcome

from trio_wal import Bookmark, CorruptLogError, LogDivergedError, LsnTruncatedError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX processes and signals")

TESTS = Path(__file__).parent
SEED = 7


def run_python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the campaign forks, which a process with threads must not."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=TESTS,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_readers_beside_a_few_kills_find_nothing_wrong(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = run_python(
        *("-m", "campaigns", "readers", "live", "--count", 12, "--lives", 12, "--workers", 1),
        *("--seed", 5, "--keep", tmp_path / "kept", "--output", figures, "--directory", tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert sum(row["kills"] for row in found["rows"]) >= 12
    assert sum(row["records"] for row in found["rows"]) > 1000
    assert not any(row["wrong"] for row in found["rows"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"]


BUGS = {
    "a follower does not ask whether the history is still the same": """
from campaigns import _onlookers
from trio_wal import _stream
_onlookers.SETTLE_SECONDS = 3.0  # one that never gets there is found as surely
assert _stream.Reading.epoch_changed
_stream.Reading.epoch_changed = lambda self: None
""",
    "what looks damaged is believed at once": """
from trio_wal import _stream, _watchsource
_stream.SAME_DAMAGE_TIMES = _watchsource.SAME_DAMAGE_TIMES = 1
first = _stream.Reading.__init__
def init(self, *args, **more):
    first(self, *args, **more)
    self._doubts = 50
_stream.Reading.__init__ = init
""",
    "a record is passed over now and then": """
from trio_wal._disk import cursor as _cursor
whole = _cursor.Cursor.chunk
def chunk(self, stop):
    records = whole(self, stop)
    return records[:1] + records[2:] if len(records) > 3 else records
_cursor.Cursor.chunk = chunk
""",
    "readers stand still": """
from trio_wal import _watchsource
whole = _watchsource.WatchSource._judge
def judge(self, seen, file, word):
    found = whole(self, seen, file, word)
    return _watchsource.attrs.evolve(found, durable_lsn=min(found.durable_lsn, 5))
_watchsource.WatchSource._judge = judge
""",
}
RUN = """
import sys
from campaigns import readers
for seed in (5, *range(3, 43, 2)):
    outcome = readers.lives_of(readers.Task("log", seed, sys.argv[1], sys.argv[2], lives=12))
    if outcome.problems:
        break
print(outcome.problems[0])
assert (readers.Path(outcome.kept) / "said").stat().st_size
"""


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_and_what_was_said_is_kept(tmp_path: Path, bug: str) -> None:
    done = run_python("-c", BUGS[bug] + RUN, tmp_path, tmp_path / "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_wrong_options_are_usage() -> None:
    for arguments in (["no such part"], ["--case", "log:x"]):
        done = run_python("-m", "campaigns", "readers", *arguments)
        assert (done.returncode, done.stdout) == (2, "")


# -- what an owner and a tool are told meanwhile ------------------------------------------


class Dropping:
    """A log of which a part is dropped while it is read."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncIterator[Any]]:
        async def records() -> AsyncIterator[Any]:
            yield SimpleNamespace(lsn=8, data=b"")
            if self.errors:
                raise self.errors.pop()
            yield SimpleNamespace(lsn=9, data=b"")

        yield records()


async def test_an_owner_whose_log_drops_by_itself_on_opening_reads_again() -> None:
    """Retention is applied beside whatever the program does first."""
    life = _LogLife(Owner(kind="log", path="", seed=SEED), print)
    wal: Any = Dropping(LsnTruncatedError(9, 8))
    life.wal = wal
    with trio.fail_after(60):
        assert await life.items(lambda item: bytes(item.data)) == [(8, b""), (9, b"")]
    # But nobody has cut it.
    wal.errors.append(LogDivergedError("log", Bookmark(9, 1), 8))
    with pytest.raises(LogDivergedError):
        await life.items(lambda item: bytes(item.data))


@pytest.mark.parametrize(
    ("error", "sound"),
    [
        (LogDivergedError("log", Bookmark(3, 1), 2), True),
        (LogDivergedError("log", Bookmark(3, 1), None), True),
        (LsnTruncatedError(5, 4), True),
        (CorruptLogError("log", 0, "damaged"), False),
    ],
)
def test_a_dump_may_be_overtaken(error: Exception, sound: bool) -> None:
    """It has said the first three records by then."""
    said = "".join(
        json.dumps({"lsn": mark[0], "base64": base64.b64encode(data).decode()}) + "\n"
        for mark in OLD
        if (data := record(SEED, Mark(*mark), 5))
    )
    onlooker = Onlooker(kind="log", path="", seed=SEED, report="", role="tools", pause=0)
    reports: list[Any] = []
    told = judge(*LOG, ("cut", 400, 2, 5, *RUNS), ("drop", 401, 5, *RUNS))
    report_tool(onlooker, lambda *words: reports.append(words), "dump", 500, 1, said, f"{error}")
    (report,) = reports
    assert (wrong(told, *report) == []) == sound


# -- records that tell their history ------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 300])
def test_a_record_is_known_only_with_all_its_bytes(size: int) -> None:
    mark = Mark(3, 2, 1, 0)
    data = record(SEED, mark, size)
    assert mark_of(SEED, data) == mark
    assert mark_of(SEED + 1, data) is None
    assert mark_of(SEED, data[:-1]) is None
    assert mark_of(SEED, data + b"x") is None
    for place in range(len(data)):
        wrong = bytearray(data)
        wrong[place] ^= 1
        assert mark_of(SEED, bytes(wrong)) is None


def give(*marks: tuple[int, int, int, int] | None, first: int = 1) -> Chain:
    chain = Chain(SEED)
    for lsn, words in enumerate(marks, first):
        chain.give(lsn, b"" if words is None else record(SEED, Mark(*words), 5))
    return chain


OLD = [(1, 10, 1, 0), (2, 10, 1, 0), (3, 10, 1, 0)]


def test_a_stream_that_goes_on_in_the_next_history_is_right() -> None:
    assert give(*OLD, (4, 20, 4, 10), (5, 20, 4, 10)).told() == [1, 5, 5, 20]
    assert give(*OLD, None, (5, 10, 1, 0)).told() == [1, 5, 5, 10]
    assert give((7, 20, 4, 10), first=7).told() == [7, 7, 7, 20]


@pytest.mark.parametrize(
    ("marks", "problem"),
    [
        ([*OLD, (4, 20, 2, 10)], "two histories"),
        ([*OLD, (4, 20, 4, 5)], "two histories"),
        ([*OLD, None, (5, 20, 4, 10)], "two histories"),
        ([*OLD, (5, 10, 1, 0)], "is the record of LSN 5"),
    ],
)
def test_a_stream_of_two_histories_is_found(marks: Any, problem: str) -> None:
    with pytest.raises(Wrong, match=problem):
        give(*marks)


def test_a_gap_and_an_altered_record_are_found() -> None:
    chain = give(*OLD)
    with pytest.raises(Wrong, match=r"^LSN 5 was given where 4 is due$"):
        chain.give(5, b"")
    with pytest.raises(Wrong, match=r"^LSN 4 has other bytes than were written$"):
        chain.give(4, b"something")


def test_what_stands_in_a_log_tells_which_lsn_is_of_which_history() -> None:
    marks = [*OLD, (4, 20, 4, 10), (5, 20, 4, 10)]
    log = [(mark[0], record(SEED, Mark(*mark), 3)) for mark in marks]
    runs = runs_of(SEED, log)
    assert runs.told() == [[1, 4], [10, 20]]
    assert [runs.of(lsn) for lsn in (0, 1, 3, 4, 9)] == [0, 10, 10, 20, 20]
    assert runs.ends(5) == [(10, 3), (20, 5)]
    runs.cut(2)
    assert runs.ends(2) == [(10, 2)]


# -- the judge ------------------------------------------------------------------------------


def judge(*messages: tuple[Any, ...]) -> Judge:
    history = History()
    told = Judge(history, Outcome("log", SEED))
    for name, at, *words in messages:
        history.hear(name, at, words)
    assert not history.problems
    return told


def wrong(told: Judge, *report: Any) -> list[str]:
    told.hear(None, [list(report)])
    found = list(told.outcome.problems)
    told.outcome.problems.clear()
    return found


RUNS = ([1], [10])
LOG = (
    ("life", 90, 0),
    ("synced", 92, 5, 0),
    ("open", 100, 1, 5, *RUNS),
    ("closed", 200, 5, *RUNS),
)


def stream(
    end: list[Any], *, kind: str = "read", start: Any = None, told: Any, at: int = 300
) -> tuple[Any, ...]:
    return ("stream", at, at + 1, at + 2, "a reader", kind, start, told, end)


def test_a_read_gives_all_that_was_acknowledged() -> None:
    told = judge(*LOG)
    assert wrong(told, *stream(["end"], told=[1, 5, 5, 10])) == []
    assert wrong(told, *stream(["end"], told=[1, 5, 5, 10], start=1)) == []
    (found,) = wrong(told, *stream(["end"], told=[1, 4, 4, 10]))
    assert found.endswith("it ended, and LSN 5 was acknowledged")
    assert wrong(told, *stream(["end"], told=[1, 4, 4, 10], at=95)) == [], "nobody knew"
    assert wrong(told, *stream(["end"], told=[0, 0, 0, 0], start=6)) == []
    assert wrong(told, *stream(["end"], kind="follow", told=[1, 5, 5, 10])), "followers go on"


def test_an_error_of_a_sound_log_is_found() -> None:
    (found,) = wrong(judge(*LOG), *stream(["error", "CorruptLogError(...)"], told=[1, 2, 2, 10]))
    assert found.endswith("CorruptLogError(...)")


def test_a_truncation_must_have_been() -> None:
    told = judge(*LOG)
    report = stream(["truncated", 3, 2], told=[1, 1, 1, 10], kind="follow", at=500)
    assert wrong(told, *report)
    told.history.hear("drop", 400, [4, *RUNS])
    assert wrong(told, *report) == []
    assert wrong(told, *stream(["truncated", 3, 2], told=[1, 4, 4, 10], at=500))


def test_another_history_must_have_begun() -> None:
    told = judge(*LOG)
    report = stream(["diverged", 3, 5], told=[1, 5, 5, 10], kind="follow", at=500)
    assert wrong(told, *report)
    told.history.hear("cut", 400, [3, 5, *RUNS])
    assert wrong(told, *report) == []
    # Who was given nothing of what was cut need not be told.
    assert wrong(told, *stream(["diverged", 3, 2], told=[1, 2, 2, 10], at=500))


def test_what_was_cut_need_not_be_given() -> None:
    told = judge(*LOG, ("cut", 400, 3, 5, *RUNS), ("cut done", 450, 3))
    assert wrong(told, *stream(["end"], told=[1, 3, 3, 10], at=500)) == []
    assert wrong(told, *stream(["end"], told=[1, 3, 3, 10], at=390))
    assert wrong(told, *stream(["end"], told=[1, 2, 2, 10], at=500))


def test_the_beginning_is_where_truncations_allow() -> None:
    told = judge(*LOG, ("drop", 400, 4, *RUNS), ("dropped", 450, 3))
    for first, at, sound in ((1, 300, True), (3, 500, True), (1, 500, False), (5, 500, False)):
        found = wrong(told, "looked", at, at + 1, "a reader", first, 5)
        assert (found == []) == sound, (first, at)
    (found,) = wrong(told, "looked", 500, 501, "a reader", 3, 4)
    assert found == "a reader: durable_lsn is 4, and 5 was acknowledged"


def test_what_was_given_and_did_not_last_is_found() -> None:
    told = judge(*LOG)
    assert wrong(told, "gave", 500, "a follower", 5, 10) == []
    told.settled()
    assert told.outcome.problems == []
    told.history.hear("synced", 450, [6, 10])
    assert wrong(told, "gave", 500, "a follower", 6, 10) == []
    told.settled()
    (found,) = told.outcome.problems
    assert found.startswith("a follower was given LSN 6 of history 10, which is not in the log")


def test_what_was_given_before_it_was_durable_is_found() -> None:
    told = judge(*LOG, ("synced", 450, 7, 20))
    assert wrong(told, "gave", 451, "a follower", 7, 20) == []
    (found,) = wrong(told, "gave", 449, "a follower", 6, 20)
    assert found == "a follower was given LSN 6 of history 20 before it was durable"
    assert wrong(told, "gave", 500, "a follower", 8, 20)
    assert wrong(told, "gave", 89, "a follower", 5, 10)
    # A life makes durable what it finds, before it can say what that is.
    assert wrong(told, "gave", 91, "a follower", 5, 10) == []


def test_a_chain_goes_back_to_where_histories_parted() -> None:
    chain = give(*OLD, (4, 20, 4, 10), (5, 20, 4, 10))
    chain.back_to(4)
    assert chain.told() == [1, 4, 4, 20]
    chain.back_to(2)
    assert chain.told() == [1, 2, 2, 10]
    chain.give(3, record(SEED, Mark(3, 30, 3, 10), 5))
    with pytest.raises(Wrong, match="two histories"):
        chain.give(4, record(SEED, Mark(4, 20, 4, 10), 5))
    chain.back_to(9)
    assert chain.told() == [0, 0, 0, 0]
    chain.give(10, b"")


def test_an_opening_that_lost_what_was_durable_is_found() -> None:
    history = History()
    for name, at, *words in LOG:
        history.hear(name, at, words)
    history.hear("open", 300, [1, 4, *RUNS])
    assert history.problems == ["opened with LSN 4, durable was 5"]


def test_histories_are_forgotten_with_what_is_dropped() -> None:
    rng = Random(SEED)
    runs = Runs()
    for history in range(20):
        runs.begin(1 + 3 * history, history)
    runs.drop(rng.choice([31, 32, 33]))
    assert runs.told()[0][0] == 31
