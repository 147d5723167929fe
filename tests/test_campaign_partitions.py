"""Networks that are cut: what a cut does, and what the campaign is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fcntl", reason="network namespaces are Linux's")

from campaigns import _networks, partitions
from campaigns.__main__ import parser_of

TESTS = Path(__file__).parent

END = """
import socket, sys

one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.bind((sys.argv[1], 4000))
one.settimeout(0.3)
print("bound", flush=True)
for line in sys.stdin:
    if line.strip():
        one.sendto(b".", (line.strip(), 4000))
        print("sent", flush=True)
        continue
    try:
        print(one.recvfrom(1)[1][0], flush=True)
    except TimeoutError:
        print("nothing", flush=True)
"""

SCRIPT = """
import subprocess, sys
from campaigns._networks import Network

network = Network("abc")
ends = {
    name: subprocess.Popen(
        [sys.executable, "-c", sys.argv[1], network.address(name)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=network.enter(name),
    )
    for name in "abc"
}
for end in ends.values():
    assert end.stdout.readline() == "bound\\n"

def ask(name, line=""):
    ends[name].stdin.write(line + "\\n")
    ends[name].stdin.flush()
    return ends[name].stdout.readline().strip()

def passes(one, other):
    assert ask(one, network.address(other)) == "sent"
    return ask(other) == network.address(one)

print(passes("a", "b"), passes("b", "a"))
network.cut([("a", "b")])
print(passes("a", "b"), passes("b", "a"), passes("a", "c"))
network.cut([("a", "b"), ("c", "a")])
network.heal([("a", "b")])
print(passes("a", "b"), passes("c", "a"), passes("a", "c"))
network.heal()
network.slow_down(["a"], 1_000_000)
print(passes("c", "a"))
network.speed_up(["a"])
print(passes("c", "a"))
for end in ends.values():
    end.stdin.close()
    end.wait()
"""


def test_what_is_cut_is_lost_in_that_direction_and_in_silence() -> None:
    if (reason := _networks.why_not()) is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, END],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:5] == [
        "True True",
        "False True True",
        "True False True",
        "True",
        "True",
    ]


def test_a_way_between_groups_is_cut_in_both_directions() -> None:
    assert _networks.between("a", "bc") == {("a", "b"), ("b", "a"), ("a", "c"), ("c", "a")}
    assert len(_networks.between("abc", "abc")) == 6


def test_each_kind_of_cut_is_made_to_a_log_and_to_a_database() -> None:
    found = list(partitions.cases(parser_of("partitions").parse_args([])))
    cuts = [(kind, name) for kind, name, _ in found if name in partitions.CUTS]
    assert sorted(cuts) == sorted(
        (kind, name) for kind in ("log", "database") for name in partitions.CUTS
    )
    assert [name for _, name, _ in found[: -len(cuts)]] == list(partitions.CONTROLS)
    only = parser_of("partitions").parse_args(["cuts", "--only", "deaf", "--count", "3"])
    assert list(partitions.cases(only)) == [
        ("log", "deaf", 1),
        ("database", "deaf", 2),
        ("log", "deaf", 3),
    ]
