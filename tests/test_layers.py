"""Imports point one way, and what may be called where: read from the source.

A new module is in no band until somebody says in which: see `BANDS`.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

import trio_wal

PACKAGE = Path(trio_wal.__file__).parent

BANDS: dict[int, set[str]] = {
    # Bytes and values: no files, no clock, no threads, no tasks.
    0: {
        "_base",
        "_codec",
        "_events",
        "_exceptions",
        "_exports",
        "_frame",
        "_identity",
        "_operations",
        "_order",
        "_pages",
        "_retention",
        "_scan",
        "_text",
        "_util",
    },
    # Files: blocking calls, run in worker threads.
    1: {
        "_chain",
        "_cursor",
        "_directory",
        "_files",
        "_recovery",
        "_repair",
        "_segment",
        "_store",
        "_store_check",
        "_store_files",
        "_stores",
        "_verify",
    },
    # Tasks: trio.
    2: {"_flusher", "_local", "_park", "_queue", "_reader", "_stream", "_wal", "_worker"},
    # The database on top of the log.
    3: {
        "_changes",
        "_checkpoint",
        "_core",
        "_database",
        "_layer",
        "_memtable",
        "_mvcc",
        "_opening",
        "_readset",
        "_snapshot",
        "_transaction",
    },
    # Edges: they compose, and nobody imports them.
    4: {"__init__", "__main__", "_cli", "testing"},
}
BAND = {name: band for band, names in BANDS.items() for name in names}

PATHS = {"PathLike", "fspath"}
"""What any module may take from `os`: the types of paths."""
OS_ALLOWED = {
    "_worker": {"eventfd", "eventfd_read", "eventfd_write", "EFD_NONBLOCK", "EFD_CLOEXEC", "close"},
    "testing": {*PATHS, "strerror", "getpid"},
}
OS_FREE = {"_files", "_cli"}
TRIO_ALLOWED = {"_exceptions": {"BrokenResourceError"}}
"""One error must be caught by trio's name; that band is otherwise without trio."""
EXTRAS = {"cyclopts", "rich", "zstandard", "lmdb"}
"""What ``import trio_wal`` must not load: the extras, and what only a database needs."""
IMPURE = {"os", "io", "time", "threading", "socket", "subprocess", "asyncio", "trio", "lmdb"}


@attrs.frozen
class Import:
    """One name that a module imports."""

    module: str
    """``os.path`` for ``import os.path``; ``_frame`` for ``from ._frame import Codec``."""
    name: str | None
    line: int
    for_types_only: bool
    own: bool
    """Whether it is one of this package's own modules."""


def imports_of(path: Path, nodes: list[ast.AST]) -> Iterator[Import]:
    for_types = {
        id(node)
        for guard in nodes
        if isinstance(guard, ast.If) and ast.unparse(guard.test).endswith("TYPE_CHECKING")
        for statement in guard.body
        for node in ast.walk(statement)
    }
    depth = len(path.relative_to(PACKAGE).parts)
    for node in nodes:
        types_only = id(node) in for_types
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno, types_only, own=False)
        elif isinstance(node, ast.ImportFrom):
            absolute = node.module or ""
            if node.level:
                inside = list(path.relative_to(PACKAGE).parts[: depth - node.level])
                module = ".".join([*inside, *filter(None, [node.module])])
            elif absolute == "trio_wal" or absolute.startswith("trio_wal."):
                module = absolute.partition(".")[2]
            else:
                for alias in node.names:
                    yield Import(absolute, alias.name, node.lineno, types_only, own=False)
                continue
            for alias in node.names:
                # `from . import _scan` and `from trio_wal import _scan` name a module.
                target = module or alias.name
                yield Import(
                    target.partition(".")[0], alias.name, node.lineno, types_only, own=True
                )


@attrs.frozen
class Source:
    name: str
    """The module's, and ``_cli`` for all of that folder."""
    path: Path
    tree: ast.Module
    nodes: list[ast.AST]
    imports: list[Import]

    def taken_from(self, module: str) -> dict[str, int]:
        """The names of a module that this one uses, each with a line."""
        used: dict[str, int] = {}
        aliases: set[str] = set()
        for found in self.imports:
            if found.own or found.module.partition(".")[0] != module:
                continue
            if found.name is not None:
                used[found.name] = found.line
            else:
                aliases.add(found.module.partition(".")[0])
        for node in self.nodes:
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in aliases
            ):
                used.setdefault(node.attr, node.lineno)
        return used


def sources() -> list[Source]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text("utf-8"), str(path))
        nodes = list(ast.walk(tree))
        found.append(Source(first, path, tree, nodes, list(imports_of(path, nodes))))
    return found


SOURCES = sources()


def place(source: Source, line: int) -> str:
    return f"{source.path.relative_to(PACKAGE)}:{line}"


def test_every_module_has_a_band() -> None:
    assert {source.name for source in SOURCES} == set(BAND)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{place(source, found.line)} (band {BAND[source.name]}) imports {found.module} "
        f"(band {BAND[found.module]})"
        for source in SOURCES
        for found in source.imports
        if found.own
        and not found.for_types_only
        and found.module in BAND
        and BAND[found.module] > BAND[source.name]
    ]
    assert wrong == []


def test_nobody_imports_an_edge() -> None:
    wrong = [
        f"{place(source, found.line)} imports {found.module}"
        for source in SOURCES
        for found in source.imports
        if found.own
        and BAND.get(found.module) == 4
        and source.name not in ("__main__", found.module)
    ]
    assert wrong == []


def test_no_module_needs_itself_to_be_imported() -> None:
    """Imports at the top of the modules have no cycle."""
    needs: dict[str, set[str]] = {source.name: set() for source in SOURCES}
    for source in SOURCES:
        top = {
            line
            for node in source.tree.body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for line in (node.lineno,)
        }
        needs[source.name] |= {
            found.module
            for found in source.imports
            if found.own and found.line in top and found.module != source.name
        } & set(BAND)
    done: set[str] = set()
    while ready := {name for name, others in needs.items() if others <= done} - done:
        done |= ready
    assert set(needs) - done == set()


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if s.name not in OS_FREE], ids=lambda s: s.name
)
def test_the_operating_system_is_called_in_one_place(source: Source) -> None:
    allowed = OS_ALLOWED.get(source.name, PATHS)
    wrong = [
        place(source, line) + f" uses os.{name}"
        for name, line in source.taken_from("os").items()
        if name not in allowed
    ]
    for module in ("fcntl", "msvcrt", "mmap", "shutil", "pathlib", "tempfile", "signal"):
        wrong += [f"{place(source, line)} uses {module}" for line in imported(source, module)]
    assert wrong == []


def imported(source: Source, module: str) -> list[int]:
    """The lines that import a module, by statement or by `importlib.import_module`."""
    by_name = [
        node.lineno
        for node in source.nodes
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "importlib.import_module"
        and ast.literal_eval(node.args[0]).partition(".")[0] == module
    ]
    return by_name + [
        found.line
        for found in source.imports
        if not found.own and found.module.partition(".")[0] == module
    ]


@pytest.mark.parametrize("source", [s for s in SOURCES if BAND[s.name] <= 1], ids=lambda s: s.name)
def test_the_first_two_bands_know_no_trio(source: Source) -> None:
    allowed = TRIO_ALLOWED.get(source.name, set())
    assert set(source.taken_from("trio")) == allowed
    assert bool(imported(source, "trio")) == bool(allowed)


@pytest.mark.parametrize("source", [s for s in SOURCES if BAND[s.name] == 0], ids=lambda s: s.name)
def test_the_first_band_is_pure(source: Source) -> None:
    wrong = {module for module in IMPURE if imported(source, module)}
    if source.name == "_exceptions":
        wrong -= {"os", "trio"}
    if source.name == "_util":
        wrong -= {"os"}
    assert wrong == set()
    builtins = {
        node.func.id
        for node in source.nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not builtins & {"open", "input", "exec", "eval"}


def test_lmdb_is_known_in_one_place() -> None:
    assert {source.name for source in SOURCES if imported(source, "lmdb")} == {"_store"}


def test_the_extras_are_known_at_the_edges_only() -> None:
    for module in ("cyclopts", "rich"):
        assert {source.name for source in SOURCES if imported(source, module)} == {"_cli"}
    assert {source.name for source in SOURCES if imported(source, "zstandard")} == {"_codec"}


def test_only_the_command_line_prints() -> None:
    wrong = [
        place(source, node.lineno)
        for source in SOURCES
        if source.name not in ("_cli", "__main__")
        for node in source.nodes
        if isinstance(node, ast.Name) and node.id in ("print", "breakpoint")
    ]
    assert wrong == []


def test_importing_the_package_loads_none_of_the_extras() -> None:
    code = f"import trio_wal, sys; print(sorted({EXTRAS!r} & sys.modules.keys()))"
    # The folder may be there only because the tests run from it.
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.stdout.strip() == "[]"


def test_every_module_opens_with_what_it_is_for() -> None:
    without = [
        str(source.path.relative_to(PACKAGE))
        for source in SOURCES
        if not (ast.get_docstring(source.tree) or "").strip()
    ]
    assert without == []
