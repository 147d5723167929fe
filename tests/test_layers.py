"""The house: one order of all modules, and what may be called where; read from the source.

Law: every import points down the order, of whatever kind: at the top, in a function, for
types only, by name.  A new module has no place until somebody gives it one: see `ORDER`.

What does not hold yet stands in a list, which may only become shorter: an entry that is no
longer needed fails.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs
import pytest

import trio_wal

PACKAGE = Path(trio_wal.__file__).parent

ORDER: dict[int, list[str]] = {
    # Bytes and values: no files, no clock, no threads, no tasks.
    0: [
        "_disk.__init__",
        "_text",
        "_util",
        "_exports",
        "_identity",
        "_exceptions",
        "_places",
        "_base",
        "_statistics",
        "_database_statistics",
        "_health",
        "_pace",
        "_engine",
        "_caslog",
        "_events",
        "_retention",
        "_order",
        "_pages",
        "_disk.finding",
        "_disk.frame",
        "_messages",
        "_codec",
        "_disk.window",
        "_disk.scan",
        "_disk.plain",
        "_operations",
        "_tuple",
    ],
    # Files: blocking calls, run in worker threads.
    1: [
        "_files",
        "_turns",
        "_system.__init__",
        "_system.descriptors",
        "_system.sync",
        "_system.watch",
        "_system.owner",
        "_system.paths",
        "_system.files",
        "_system.store",
        "_system.child",
        "_store_files",
        "_store",
        "_store_check",
        "_store_reader",
        "_stores",
        "_archive",
        "_manifest",
        "_objects",
        "_snapshots",
        "_disk.segment",
        "_disk.chain",
        "_disk.walk",
        "_disk.recovery",
        "_disk.repair",
        "_disk.cursor",
        "_disk.placesfile",
        "_disk.verify",
        "_disk.salvage",
        "_disk.metafile",
        "_disk.holds",
        "_disk.spares",
        "_disk.cut",
        "_disk.directory",
        "_disk.opening",
        "_archived",
        "_archiving",
        "_restorable",
        "_sources",
        "_restoring",
    ],
    # Tasks: trio.
    2: [
        "_park",
        "_worker",
        "_state",
        "_batch",
        "_admission",
        "_backlog",
        "_linger",
        "_queue",
        "_lines",
        "_watermark",
        "_flusher",
        "_stream",
        "_archiver",
        "_local",
        "_streamlog",
        "_appender",
        "_streamindex",
        "_takeover",
        "_replicated",
        "_asyncio",
        "_portal",
        "_facade",
        "_natscas",
        "_natscheck",
        "nats",
        "_remotelog",
        "_log",
        "_writer",
        "_consumers",
        "_consumer",
        "_wal",
        "_watchsource",
        "_reader",
        "_restore",
    ],
    # The database on top of the log.
    3: [
        "_layer",
        "_memtable",
        "_watch",
        "_viewers",
        "_room",
        "_mvcc",
        "_pairs",
        "_snapshot",
        "_readset",
        "_transaction",
        "_database_writer",
        "_changes",
        "_database_consumer",
        "_replay",
        "_checkpoint",
        "_core",
        "_database",
        "_remote",
        "_replica",
        "_table",
        "_opening",
        "_follower",
        "_copying",
        "_database_reader",
    ],
    # Edges: they compose.
    4: [
        "_metrics",
        "_sampling",
        "prometheus",
        "otel",
        "_repair",
        "_facade_log",
        "_facade_reading",
        "_facade_transaction",
        "_facade_database",
        "asyncio",
        "__init__",
        "_memorydisk",
        "testing",
        "_admin",
        "_cli",
        "__main__",
    ],
}
"""From the ground up: a module may import what stands before it, and nothing else."""
BAND = {name: band for band, names in ORDER.items() for name in names}
FLOOR = {
    name: floor for floor, name in enumerate(name for names in ORDER.values() for name in names)
}

UPWARD: set[str] = set()
"""Imports that point up."""
POKES: set[str] = set()
"""Private names of another module's objects."""
LONG_FUNCTIONS: set[str] = set()
"""Functions of more lines than `FUNCTION_LINES_MAX`."""
LARGE_CLASSES: set[str] = set()
"""Classes of more methods than `CLASS_METHODS_MAX`, without a reason in their docstring."""

FUNCTION_LINES_MAX = 60
"""Without the docstring, which may be as long as it must."""
CLASS_METHODS_MAX = 30
REASON = "So many methods because"
"""What the sentence in the docstring of a larger class begins with."""

PATHS = {"PathLike", "fspath"}
"""What any module may take from `os`: the types of paths."""
OS_ALLOWED = {
    "_park": {"eventfd", "eventfd_read", "eventfd_write", "EFD_NONBLOCK", "EFD_CLOEXEC", "close"},
    "testing": {*PATHS, "strerror", "getpid"},
    "_takeover": {"getpid"},
}
OS_FREE = {"_system", "_cli"}
TRIO_ALLOWED = {"_exceptions": {"BrokenResourceError"}}
"""One error must be caught by trio's name; that band is otherwise without trio."""
EXTRAS = {
    *("cyclopts", "rich", "zstandard", "lmdb", "nats", "asyncio", "prometheus_client"),
    *("opentelemetry", "obstore", "trio_wal._metrics"),
}
"""What ``import trio_wal`` must not load: the extras, and what only a database needs."""
IMPURE = {"os", "io", "time", "threading", "socket", "subprocess", "asyncio", "trio", "lmdb"}


def module_name(parts: Sequence[str]) -> str:
    """A module as the bands know it: the command line is one, the other folders are many."""
    return ".".join(parts[: 2 if parts[0] in ("_disk", "_system") else 1])


@attrs.frozen
class Import:
    """One name that a module imports."""

    module: str
    """``os.path`` for ``import os.path``; ``_disk.frame`` for ``from ._disk.frame import X``."""
    name: str | None
    line: int
    own: bool
    """Whether it is one of this package's own modules."""


def imports_of(path: Path, nodes: list[ast.AST]) -> Iterator[Import]:
    depth = len(path.relative_to(PACKAGE).parts)
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                own = alias.name.partition(".")[0] == "trio_wal"
                name = own_module(alias.name.split(".")[1:]) if own else alias.name
                yield Import(name, None, node.lineno, own)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # For `importlib.import_module`, or for a child process.
            package, _, module = node.value.partition(".")
            if package == "trio_wal" and module in FLOOR:
                yield Import(module, None, node.lineno, own=True)
        elif isinstance(node, ast.ImportFrom):
            absolute = (node.module or "").split(".")
            if node.level:
                inside = path.relative_to(PACKAGE).parts[: depth - node.level]
                parts = [*inside, *filter(None, absolute)]
            elif absolute[0] == "trio_wal":
                parts = absolute[1:]
            else:
                for alias in node.names:
                    yield Import(".".join(absolute), alias.name, node.lineno, own=False)
                continue
            for alias in node.names:
                # `from . import _codec` and `from trio_wal._disk import scan` name a module.
                yield Import(own_module([*parts, alias.name]), alias.name, node.lineno, own=True)


def own_module(parts: Sequence[str]) -> str:
    """The module in which a dotted name of this package is found."""
    if not parts or parts[0] not in {name.partition(".")[0] for name in FLOOR}:
        return "__init__"
    return module_name(parts) if module_name(parts) in FLOOR else parts[0]


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
    found: list[Source] = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        tree = ast.parse(path.read_text("utf-8"), str(path))
        nodes = list(ast.walk(tree))
        found.append(Source(module_name(parts), path, tree, nodes, list(imports_of(path, nodes))))
    return found


SOURCES = sources()


def place(source: Source, line: int) -> str:
    return f"{source.path.relative_to(PACKAGE)}:{line}"


def check_list(found: Iterable[str], known: set[str]) -> None:
    """What is found is what is known: nothing new, and nothing that is done and still listed."""
    found = set(found)
    assert sorted(found - known) == [], "new"
    assert sorted(known - found) == [], "no longer needed: take it off the list"


def test_every_module_has_a_place() -> None:
    assert {source.name for source in SOURCES} == set(FLOOR)
    assert len(FLOOR) == sum(map(len, ORDER.values()))


def test_imports_point_down() -> None:
    check_list(
        (
            f"{source.name} imports {found.module}"
            for source in SOURCES
            for found in source.imports
            if found.own
            and found.module != source.name
            and FLOOR.get(found.module, len(FLOOR)) > FLOOR[source.name]
        ),
        UPWARD,
    )


def private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.endswith("__")


def names_of(source: Source) -> set[str]:
    """The private names that a module's classes give to their objects."""
    names: set[str] = set()
    for node in source.nodes:
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    names.add(part.name)
                elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    names.add(part.target.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and is_self(node.value)
        ):
            names.add(node.attr)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def pokes(source: Source) -> Iterator[str]:
    own_names = names_of(source)
    others = {found.name for found in source.imports if not found.own}
    others |= {found.module for found in source.imports if not found.own}
    for found in source.imports:
        if found.own and private(found.name) and found.name not in modules():
            yield f"{source.name}: {found.name}"
    for node in source.nodes:
        if not isinstance(node, ast.Attribute) or not private(node.attr) or is_self(node.value):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in others:
            # Not ours: as `os._exit`.
            continue
        if node.attr not in own_names:
            yield f"{source.name}: {ast.unparse(node)}"


def modules() -> set[str]:
    """The names by which modules are imported."""
    files = {path.stem for path in PACKAGE.rglob("*.py")}
    return files | {path.name for path in PACKAGE.rglob("*") if path.is_dir()}


def test_no_module_uses_private_names_of_another_ones_objects() -> None:
    check_list((poke for source in SOURCES for poke in pokes(source)), POKES)


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    first = node.body[0]
    docstring = 0
    if ast.get_docstring(node, clean=False) is not None:
        assert first.end_lineno is not None
        docstring = first.end_lineno - first.lineno + 1
    return node.end_lineno - node.lineno + 1 - docstring


def test_functions_fit_a_screen() -> None:
    check_list(
        (
            f"{source.name}: {node.name}"
            for source in SOURCES
            for node in source.nodes
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and lines_of(node) > FUNCTION_LINES_MAX
        ),
        LONG_FUNCTIONS,
    )


def test_classes_are_small_or_say_why_not() -> None:
    large = [
        (source, node)
        for source in SOURCES
        for node in source.nodes
        if isinstance(node, ast.ClassDef)
        and len(
            {m.name for m in node.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef))}
        )
        > CLASS_METHODS_MAX
    ]
    check_list(
        (
            f"{source.name}: {node.name}"
            for source, node in large
            if REASON not in (ast.get_docstring(node) or "")
        ),
        LARGE_CLASSES,
    )


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if s.name.partition(".")[0] not in OS_FREE], ids=lambda s: s.name
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


def test_lmdb_is_known_to_who_writes_and_who_reads_only() -> None:
    assert {source.name for source in SOURCES if imported(source, "lmdb")} == {
        "_store",
        "_store_reader",
    }


def test_the_extras_are_known_at_the_edges_only() -> None:
    for module in ("cyclopts", "rich"):
        assert {source.name for source in SOURCES if imported(source, module)} == {"_cli"}
    assert {source.name for source in SOURCES if imported(source, "zstandard")} == {"_codec"}
    assert {source.name for source in SOURCES if imported(source, "nats")} == {"_natscas", "nats"}
    for module, edge in (("prometheus_client", "prometheus"), ("opentelemetry", "otel")):
        assert {source.name for source in SOURCES if imported(source, module)} == {edge}


def test_only_the_command_line_prints() -> None:
    wrong = [
        place(source, node.lineno)
        for source in SOURCES
        if source.name not in ("_cli", "__main__")
        for node in source.nodes
        if isinstance(node, ast.Name) and node.id in ("print", "breakpoint")
    ]
    assert wrong == []


def told_by(code: str) -> set[str]:
    """The words that a new Python prints."""
    # The folder may be there only because the tests run from it.
    environment = {"PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    return set(run.stdout.split())


def loaded_by(code: str) -> set[str]:
    """The modules that a new Python has after this."""
    return told_by(f"{code}\nimport sys; print(*sys.modules)")


def test_importing_the_package_loads_nothing_of_it() -> None:
    found = loaded_by("import trio_wal")
    assert {name for name in found if name.partition(".")[0] == "trio_wal"} == {"trio_wal"}
    assert not found & {"trio", "attrs", "msgspec"}


def test_all_that_is_public_needs_none_of_the_extras() -> None:
    assert not loaded_by("from trio_wal import *") & EXTRAS


NOT_FOR_A_LOG = {
    "_database_statistics",
    *("_archiver", "_archived", "_archiving", "_manifest"),
    *("_replicated", "_appender", "_messages", "_streamlog", "_streamindex", "_takeover"),
}
"""For databases, for archives, and for logs that servers keep."""


def test_the_log_alone_loads_no_database_and_nothing_of_servers() -> None:
    found = loaded_by("from trio_wal import open_wal, open_reader")
    own = {name.removeprefix("trio_wal.") for name in found if name.startswith("trio_wal.")}
    assert {"_wal", "_reader", "_local"} <= own
    assert own & {*ORDER[3], *NOT_FOR_A_LOG} == set()
    assert {name for name in own & BAND.keys() if BAND[name] > 3} == set()
    # Not cheap themselves; for what only some logs do.  msgspec 0.19 loads json by itself.
    assert not (found - loaded_by("import msgspec")) & {"statistics", "fractions", "json", *EXTRAS}


ATTRS_OF_A_LOG = """
import sys, attrs, trio_wal
trio_wal.open_wal
for name, module in list(sys.modules.items()):
    for value in vars(module).values() if name.startswith("trio_wal.") else ():
        if isinstance(value, type) and attrs.has(value):
            print(f"{value.__module__}.{value.__qualname__}")
"""


def test_no_code_is_generated_for_the_private_values_of_a_log() -> None:
    """attrs compiles the methods of each class when it is imported: half of the time that
    ``open_wal`` took to load.  A ``msgspec.Struct`` has its methods from C."""
    private = {name for name in told_by(ATTRS_OF_A_LOG) if name.startswith("trio_wal._")}
    assert private <= {
        # Has fields that are not compared.
        "trio_wal._disk.finding.Finding",
        # Of public values: they look, and are pickled, as these do.
        *(f"trio_wal._retention.{name}" for name in ("_Pair", "_Both", "_Either")),
        # An `outcome.Value`.
        "trio_wal._park._Woken",
    }


def test_every_module_opens_with_what_it_is_for() -> None:
    without = [
        str(source.path.relative_to(PACKAGE))
        for source in SOURCES
        if not (ast.get_docstring(source.tree) or "").strip()
    ]
    assert without == []
