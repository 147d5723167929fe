"""A network of this process's own, with links that are cut and slowed down (Linux, as root).

Law: nothing outlives the process: its network namespaces have no names.  This process is the router
in the middle; each place has a namespace and one link to it.  What is cut is dropped in silence, in
one direction or both, by rules of routing: neither end is told, as with a real partition.  It needs
`ip` and `tc` (Debian: iproute2), and no firewall.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Final

from ._mounts import in_child

_CLONE_NEWNET: Final = 0x40000000


def why_not() -> str | None:
    """Why there can be no network of one's own; None: there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: iproute2)"
    try:
        in_child(lambda: Network(("a", "b")).cut([("a", "b")]))
    except OSError as exc:
        return f"no network namespace can be made and used: {exc}"
    return None


def _call(name: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _run(*command: str, enter: Callable[[], None] | None = None) -> None:
    """Raises `OSError`: also where the program refuses."""
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=enter,
    )
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def _new_namespace() -> int:
    """A descriptor of it, which keeps it."""
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            _call("unshare", _CLONE_NEWNET)
            os.write(tell, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        if not os.read(told, 1):
            raise OSError("no network namespace can be made")
        return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(told)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class Network:
    """Places that see each other through this process, which they all see too.

    Made once in a process, before it has threads: those stay where they are.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Raises `OSError`."""
        _call("unshare", _CLONE_NEWNET)
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        self._namespaces: dict[str, int] = {}
        self._cut: set[tuple[str, str]] = set()
        _run("ip", "link", "set", "lo", "up")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        for name in names:
            self._join(name)

    def _join(self, name: str) -> None:
        self._namespaces[name] = _new_namespace()
        within = self.enter(name)
        link, router = self._link(name), self.address(name, router=True)
        peer = ("peer", "name", link, "netns", str(os.getpid()))
        _run("ip", "link", "add", "eth0", "type", "veth", *peer, enter=within)
        _run("ip", "address", "add", f"{router}/24", "dev", link)
        _run("ip", "link", "set", link, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("address", "add", f"{self.address(name)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", router),
        ):
            _run("ip", *command, enter=within)

    def _link(self, name: str) -> str:
        return f"to-{self._numbers[name]}"

    def address(self, name: str, *, router: bool = False) -> str:
        return f"10.77.{self._numbers[name]}.{1 if router else 2}"

    def enter(self, name: str) -> Callable[[], None]:
        """What takes a process to a place; for `subprocess`'s ``preexec_fn``."""
        return partial(_call, "setns", self._namespaces[name], _CLONE_NEWNET)

    # -- what becomes of it --

    def cut(self, ways: Iterable[tuple[str, str]]) -> None:
        """Drop what goes from the one to the other; the other direction is another way."""
        for way in sorted(set(ways) - self._cut):
            source, target = map(self.address, way)
            _run("ip", "rule", "add", "from", source, "to", target, "blackhole")
            self._cut.add(way)

    def heal(self, ways: Iterable[tuple[str, str]] | None = None) -> None:
        """Let it through again; all of it where nothing is named."""
        for way in sorted(self._cut if ways is None else self._cut & set(ways)):
            source, target = map(self.address, way)
            _run("ip", "rule", "delete", "from", source, "to", target, "blackhole")
            self._cut.discard(way)

    def slow_down(self, names: Iterable[str], bits: int) -> None:
        """Links carry so many bits a second each way; what waits for more than 200 ms is lost."""
        for name in names:
            for device, enter in ((self._link(name), None), ("eth0", self.enter(name))):
                shape = ("tbf", "rate", f"{bits}bit", "burst", "4kb", "latency", "200ms")
                _run("tc", "qdisc", "replace", "dev", device, "root", *shape, enter=enter)

    def speed_up(self, names: Iterable[str]) -> None:
        for name in names:
            for device, enter in ((self._link(name), None), ("eth0", self.enter(name))):
                _run("tc", "qdisc", "delete", "dev", device, "root", enter=enter)


def between(ones: Iterable[str], others: Iterable[str]) -> set[tuple[str, str]]:
    """All ways between two groups, in both directions."""
    there = [(one, other) for one, other in product(ones, others) if one != other]
    return {*there, *((other, one) for one, other in there)}
