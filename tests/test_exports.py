"""What is public: documented, named as users know it, and made only by the calls that open it."""

from __future__ import annotations

import ast
import inspect
import pickle
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import attrs
import pytest

import trio_wal
import trio_wal.testing
from trio_wal import Bookmark
from trio_wal.testing import MemoryFiles

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
EVERYTHING = {name: getattr(trio_wal, name) for name in dir(trio_wal)}
MODULES = [name for name, value in EVERYTHING.items() if inspect.ismodule(value)]
PUBLIC = {
    name: value
    for name, value in EVERYTHING.items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
EXTRAS = {"testing", "asyncio", "nats", "otel", "prometheus"}
"""Modules that are there once somebody has used them."""
ALIASES = {"Durability", "SyncIn", "VerifyStore"}
"""Types that are no classes."""
MADE_BY_OPENING = (
    "CommitStream",
    "Database",
    "DatabaseWriter",
    "LogReader",
    "RecordStream",
    "Replica",
    "Snapshot",
    "Transaction",
    "WriteAheadLog",
    "Writer",
)
INHERITED = (BaseException, tuple, object)


def own_names(cls: type) -> Iterator[str]:
    """Public attributes that this package gives a class."""
    for part in cls.__mro__:
        if part.__module__.startswith("trio_wal"):
            yield from [name for name in vars(part) if not name.startswith("_")]
    yield from (name for name in getattr(cls, "__annotations__", {}) if not name.startswith("_"))


def has_docstring(cls: type, name: str) -> bool:
    value = inspect.getattr_static(cls, name, None)
    if isinstance(value, property):
        value = value.fget
    return bool((getattr(getattr(value, "__func__", value), "__doc__", None) or "").strip())


def class_definitions() -> dict[str, ast.ClassDef]:
    package = Path(trio_wal.__file__).parent
    return {
        node.name: node
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    }


DEFINITIONS = class_definitions()


def fields_with_docstrings(cls: type) -> set[str]:
    """Fields that are followed by a string in the source, or named in the class's docstring."""
    body = DEFINITIONS[cls.__name__].body
    found = {
        field.target.id
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    return found | set(re.findall(r"^ +(\w+): ", cls.__doc__ or "", re.MULTILINE))


def test_the_namespace_holds_only_what_is_meant_for_users() -> None:
    assert {name for name in MODULES if not name.startswith("_")} - EXTRAS == set()
    strangers = {
        name
        for name, value in PUBLIC.items()
        if not inspect.isclass(value) and not inspect.isfunction(value)
    }
    assert strangers == ALIASES


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in ALIASES])
def test_whatever_is_public_says_that_it_is_trio_wals(name: str) -> None:
    value: Any = PUBLIC[name]
    assert value.__module__ == "trio_wal"
    assert value.__qualname__ == name
    assert (value.__doc__ or "").strip()
    if inspect.isclass(value):
        for method in list(vars(value).values()):
            inner = method.fget if isinstance(method, property) else method
            if inspect.isfunction(inner) and inner.__name__ in own_names(value):
                assert inner.__module__ == "trio_wal", inner


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_attribute_is_documented(name: str) -> None:
    cls = CLASSES[name]
    documented = fields_with_docstrings(cls)
    without = {
        attribute
        for attribute in own_names(cls)
        if not has_docstring(cls, attribute) and attribute not in documented
    }
    if attrs.has(cls):
        # One word says it: the page of the reference has the rest.
        without -= {field.name for field in attrs.fields(cls)}
    if issubclass(cls, trio_wal.Retention):
        without -= {"droppable", "next_change_us"}  # as the base class says
    assert without == set()


def documented_in_reference() -> dict[str, str]:
    text = "\n".join(page.read_text("utf-8") for page in sorted(REFERENCE.glob("*.rst")))
    found = re.findall(
        r"^\.\. auto(?:class|function|exception|data):: ([\w.]+)[^\n]*\n((?:   :[^\n]*\n)*)",
        text,
        re.MULTILINE,
    )
    return {name.removeprefix("trio_wal."): options for name, options in found}


def test_the_reference_has_all_that_is_public() -> None:
    found = documented_in_reference()
    assert set(PUBLIC) - set(found) - ALIASES == set()
    for name, cls in CLASSES.items():
        members = re.search(r":members: *([^\n]*)", found.get(name, ""))
        if members is None or not members[1]:
            continue
        listed = {word.strip() for word in members[1].split(",")}
        assert set(own_names(cls)) - listed == set(), name


def test_an_open_log_and_database_have_no_other_public_names() -> None:
    async def names() -> dict[str, set[str]]:
        files = MemoryFiles()
        found = {}
        async with trio_wal.open_database("/db", files=files) as db:
            await db.put(b"key", b"value")
            with db.snapshot() as snapshot:
                found["Snapshot"] = set(vars(snapshot))
            async with db.transaction() as tx:
                tx.get(b"key")
                found["Transaction"] = set(vars(tx))
            async with db.changes() as commits, trio_wal.open_reader("/db/log", files=files) as log:
                found["CommitStream"] = set(vars(commits))
                found["RecordStream"] = set(vars(log.read()))
                found["LogReader"] = set(vars(log))
            found["Database"] = set(vars(db))
            found["WriteAheadLog"] = set(vars(db.wal))
        return found

    import trio

    for name, attributes in trio.run(names).items():
        public = {attribute for attribute in attributes if not attribute.startswith("_")}
        assert public - set(own_names(CLASSES[name])) == set(), name


@pytest.mark.parametrize("name", MADE_BY_OPENING)
def test_what_is_opened_has_no_public_constructor(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^trio_wal\.{name} has no public constructor$"):
        CLASSES[name]()


ERRORS = [
    trio_wal.CorruptLogError("/log", 512, "no frame"),
    trio_wal.UnsupportedFormatError("/log", 2),
    trio_wal.UnsupportedFormatError("/log", 64, "feature set", ("bit 6",)),
    trio_wal.LogLockedError("/log", 17),
    trio_wal.LogFullError("/log", 4096),
    trio_wal.RecordTooLargeError(9, 8),
    trio_wal.LsnTruncatedError(5, 3),
    trio_wal.LogDivergedError("/log", Bookmark(5, 1), 3),
    trio_wal.LogFailedError("/log", "unknown"),
    trio_wal.LogFencedError("/log", 7, "process 17"),
    trio_wal.LogUnavailableError("/log", 30.0, "no answer"),
    trio_wal.UnsupportedOperationError("/log", "truncate_after", "it is replicated"),
    trio_wal.RestoreGapError(
        "/archive", "it ends", 1, 7, datetime(2026, 1, 1, tzinfo=timezone.utc)
    ),
    trio_wal.TransactionConflict(b"key"),
    trio_wal.KeyExistsError(b"key"),
    trio_wal.TableDecodeError("jobs", (7, "mail"), "why"),
    trio_wal.WrongDirectoryError("/log", "a database", "open_database()"),
    trio_wal.UntrustedDirectoryError("/log", "it is another's", "chown it"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_pickled_whole_and_by_its_public_name(error: Any) -> None:
    data = pickle.dumps(error)
    assert b"trio_wal._" not in data
    copy = pickle.loads(data)
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_error_is_among_them() -> None:
    errors = {cls for cls in CLASSES.values() if issubclass(cls, trio_wal.WalError)}
    assert errors - {type(error) for error in ERRORS} == {trio_wal.WalError}


@pytest.mark.parametrize(
    "value", [Bookmark(3, 4), trio_wal.KeepBytes(5) | trio_wal.KeepSegments(2)], ids=repr
)
def test_values_are_pickled(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize("name", [name for name, cls in CLASSES.items() if attrs.has(cls)])
def test_the_types_of_fields_can_be_asked_for(name: str) -> None:
    hints = get_type_hints(CLASSES[name])
    assert {field.name for field in attrs.fields(CLASSES[name])} <= set(hints)
    assert not any(isinstance(hint, str) for hint in hints.values())


def test_checkers_and_programs_know_the_same_names() -> None:
    """Of the package: imports that only checkers see, and a table by which names are loaded."""
    tree = ast.parse(Path(trio_wal.__file__).read_text("utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    found = {node.module: " ".join(alias.name for alias in node.names) for node in imports}
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    assert {module: names.split() for module, names in trio_wal._NAMES.items()} == {
        module: names.split() for module, names in found.items()
    }


def in_a_new_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return run.stdout.strip()


def test_a_star_imports_all_that_is_public() -> None:
    code = "from trio_wal import *; print(*(name for name in globals() if name[:1] != '_'))"
    assert set(in_a_new_python(code).split()) == set(PUBLIC)


def test_names_are_listed_before_they_are_loaded_and_wrong_ones_refused() -> None:
    code = "import trio_wal; print(*dir(trio_wal))"
    assert set(PUBLIC) | {"__version__", "__doc__"} <= set(in_a_new_python(code).split())
    with pytest.raises(AttributeError, match=r"^module 'trio_wal' has no attribute 'open_wall'$"):
        trio_wal.open_wall  # type: ignore[attr-defined]  # noqa: B018


def test_whoever_loads_a_module_its_public_names_are_trio_wals() -> None:
    """As a pickle needs it, whose reader knows nothing of modules."""
    code = """
from importlib import import_module
import trio_wal
for module, names in trio_wal._NAMES.items():
    for name in names.split():
        value = getattr(import_module("trio_wal." + module), name)
        if getattr(value, "__qualname__", None) == name and value.__module__ != "trio_wal":
            print(value)
print("looked at", len(trio_wal._WHERE))
"""
    assert in_a_new_python(code) == f"looked at {len(PUBLIC)}"


def test_threads_that_load_a_name_at_once_get_one_object() -> None:
    code = """
import threading, trio_wal
start, got = threading.Barrier(8), []
def load(turn):
    names = list(trio_wal._WHERE)
    start.wait()
    got.append({name: getattr(trio_wal, name) for name in names[turn:] + names[:turn]})
threads = [threading.Thread(target=load, args=(turn * 9,)) for turn in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(got) == 8
print(sum(found[name] is not getattr(trio_wal, name) for found in got for name in found))
"""
    assert in_a_new_python(code) == "0"


def test_help_lists_classes_and_functions() -> None:
    text = pydoc.plain(pydoc.render_doc(trio_wal))
    for name in (*MADE_BY_OPENING, "open_wal", "open_database", "open_reader", "LogFailedError"):
        assert name in text
    assert "_exceptions." not in text


def test_tools_for_tests_say_where_they_are_from() -> None:
    assert MemoryFiles.__module__ == "trio_wal.testing"
