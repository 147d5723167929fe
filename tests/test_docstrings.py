"""What a docstring owes a user: errors, what a cancellation leaves behind, what is durable.

Each call says it, or names the call for which it is said, as in "cancellation and errors are those
of `Transaction.commit`"; what is said there is looked at.

Law: what is public is found and not listed here: all that a public module gives, with all that its
classes have from this package.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

import trio_wal
from trio_wal import _base

MODULES = ("", ".asyncio", ".nats", ".otel", ".prometheus", ".testing")
CALLED_BY_USERS = MODULES[:-1]
"""Most of what files in memory have is called by logs."""
NEEDS = {".otel": "opentelemetry.metrics", ".prometheus": "prometheus_client"}
PROTOCOLS = (trio_wal.Files, _base.Stores)
"""Where the calls are described by which the package uses `trio_wal.testing.MemoryFiles`."""


@attrs.frozen
class Call:
    """A public function, or a method or property of a public class."""

    where: str
    """The module's name."""
    owner: type | None
    name: str
    function: Any

    def __str__(self) -> str:
        owner = "" if self.owner is None else f"{self.owner.__name__}."
        return f"{self.where}.{owner}{self.name}"

    @property
    def text(self) -> str:
        return self.function.__doc__ if self.owner is None else text_of(self.owner, self.name)

    @property
    def parameters(self) -> list[str]:
        if isinstance(self.function, property):
            return []
        found = inspect.signature(self.function).parameters
        return [name for name in found if name not in ("self", "cls")]

    @property
    def trios(self) -> type | None:
        """Of a class of `trio_wal.asyncio`: that of which it does the same."""
        if self.owner is None or self.where != "trio_wal.asyncio":
            return None
        found: type = getattr(trio_wal, self.owner.__name__)
        return found


def function_of(value: object) -> Any:
    """What stands in a class, as it is called; None: nothing that is called."""
    inner = getattr(value, "__func__", value)
    return inner if inspect.isfunction(inner) or isinstance(inner, property) else None


def text_of(owner: type, name: str) -> str:
    """A docstring; of what overrides something, or is as a protocol has it, that one's."""
    for part in (*owner.__mro__, *PROTOCOLS):
        # None has a docstring itself, from Python 3.13 on.
        if name in vars(part) and isinstance(text := vars(part)[name].__doc__, str):
            return text
    return ""


@functools.cache
def things(module: str) -> dict[str, Any]:
    """The classes and functions of a public module."""
    if module in NEEDS:
        pytest.importorskip(NEEDS[module])
    loaded = importlib.import_module(where := f"trio_wal{module}")
    names = getattr(loaded, "__all__", None) or dir(loaded)
    public = {name: getattr(loaded, name) for name in names if not name.startswith("_")}
    found = {n: v for n, v in public.items() if getattr(v, "__module__", None) == where}
    assert found
    return found


@functools.cache
def calls(module: str) -> tuple[Call, ...]:
    where = f"trio_wal{module}"
    found: dict[tuple[type | None, str], Call] = {}
    for name, value in things(module).items():
        if not inspect.isclass(value):
            found[None, name] = Call(where, None, name, value)
            continue
        for part in value.__mro__:
            if not part.__module__.startswith("trio_wal"):
                continue
            for method, inner in vars(part).items():
                if not method.startswith("_") and function_of(inner) is not None:
                    call = Call(where, value, method, function_of(inner))
                    found.setdefault((value, method), call)
    return tuple(found.values())


def named_in(text: str, call: Call) -> Iterator[Call]:
    """The calls to which a docstring refers."""
    for name in re.findall(r"``?(?:trio_wal\.)?([A-Za-z_]\w*(?:\.\w+)?)``?", text):
        head, _, method = name.rpartition(".")
        if head:
            owners = [getattr(trio_wal, head)] if head in trio_wal._WHERE else []
        elif inspect.isfunction(function := getattr(trio_wal, name, None)):
            yield Call("trio_wal", None, name, function)
            continue
        else:
            owners = [owner for owner in (call.trios, call.owner) if owner is not None]
        for owner in owners:
            function = function_of(inspect.getattr_static(owner, method, None))
            if function is not None and (owner, method) != (call.owner, call.name):
                yield Call(owner.__module__, owner, method, function)


def says(call: Call, what: str, depth: int = 3) -> bool:
    """Whether it is said for this call, or for one to which it refers."""
    text = call.text
    if re.search(what, text):
        return True
    return depth > 0 and any(says(other, what, depth - 1) for other in named_in(text, call))


def without(module: str, what: str) -> set[str]:
    return {str(call) for call in calls(module) if call.text and not says(call, what)}


def is_async(call: Call) -> bool:
    """Asyncio's coroutines, of which trio's call is a property or sync, only fetch a value."""
    counterpart = call.trios and function_of(inspect.getattr_static(call.trios, call.name, None))
    return inspect.iscoroutinefunction(counterpart or call.function)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_class_has_a_docstring(module: str) -> None:
    classes = {name: value for name, value in things(module).items() if inspect.isclass(value)}
    assert {
        name for name, cls in classes.items() if not (vars(cls)["__doc__"] or "").strip()
    } == set()


@pytest.mark.parametrize("module", CALLED_BY_USERS)
def test_every_stream_says_what_a_cancellation_leaves(module: str) -> None:
    streams = {
        name: value
        for name, value in things(module).items()
        if inspect.isclass(value) and hasattr(value, "__anext__")
    }
    texts = {
        name: [cls.__doc__, *(getattr(trio_wal, of).__doc__ for of in STREAM.findall(cls.__doc__))]
        for name, cls in streams.items()
    }
    assert {
        name for name, said in texts.items() if not re.search("[Cc]ancel", "".join(said))
    } == set()


STREAM = re.compile(r"[Aa]s `trio_wal\.(\w+)`")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_call_has_a_docstring(module: str) -> None:
    assert {str(call) for call in calls(module) if not call.text.strip()} == set()


@pytest.mark.parametrize("module", CALLED_BY_USERS)
def test_every_async_call_says_what_a_cancellation_leaves(module: str) -> None:
    unsaid = without(module, r"[Cc]ancel")
    assert {str(call) for call in calls(module) if is_async(call)} & unsaid == set()


@pytest.mark.parametrize("module", CALLED_BY_USERS)
def test_every_call_that_takes_something_says_what_it_raises(module: str) -> None:
    unsaid = without(module, r"\w+Error\b|\b[Nn]ever raises\b")
    found = {call for call in calls(module) if call.parameters and not is_for_logs(call)}
    assert {str(call) for call in found} & unsaid == set()


def is_for_logs(call: Call) -> bool:
    """What users write, and logs call; and what an error has."""
    kinds = trio_wal.Retention, trio_wal.Files, trio_wal.Readable, BaseException
    return call.owner is not None and any(kind in call.owner.__mro__ for kind in kinds)


@pytest.mark.parametrize("module", CALLED_BY_USERS)
def test_every_async_call_that_may_write_says_what_is_durable(module: str) -> None:
    unsaid = without(module, r"(?i)\bdurabl|\bcrash")
    found = {str(call) for call in calls(module) if is_async(call)} & unsaid
    assert {name for name in found if not READS.search(name)} == set()


READS = re.compile(r"(?:Reader|Replica)\.(?:aclose|wait_for)$|Log\.connect$|Snapshot\.call$")


@pytest.mark.parametrize("module", CALLED_BY_USERS)
def test_every_option_is_named(module: str) -> None:
    unnamed = {
        f"{call}({parameter}=)"
        for call in calls(module)
        if call.owner is None
        for parameter in call.parameters
        if not says(call, rf"\b{parameter}\b")
    }
    assert unnamed == set()


UNITS = re.compile(r"\bseconds?\b|\bbytes\b|\brecords\b|\btimes\b|\bhow much\b|\bhow many\b")


@pytest.mark.parametrize("module", CALLED_BY_USERS)
def test_every_number_that_may_be_broken_has_its_unit(module: str) -> None:
    """Those are times, sizes that may be infinite, and shares."""
    without_unit = set()
    for call in calls(module):
        for name, entry in re.findall(r"^ +(\w+): (.*(?:\n +[^:\n]*$)*)", call.text, re.MULTILINE):
            if name not in call.parameters:
                continue
            annotation = inspect.signature(call.function).parameters[name].annotation
            if "float" in str(annotation) and not UNITS.search(entry):
                without_unit.add(f"{call}({name}=)")
    assert without_unit == set()
