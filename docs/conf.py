"""Sphinx's settings. `python -m nox -s docs` builds the pages into docs/_build/html."""

from __future__ import annotations

import contextlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from html import escape
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any, get_origin, get_type_hints

from sphinx.errors import PycodeError
from sphinx.pycode import ModuleAnalyzer

import trio_wal
from trio_wal._metrics import TABLE, Group

ROOT = Path(__file__).resolve().parent.parent

project = "trio-wal"
author = "the trio-wal authors"
copyright = "the trio-wal authors"
release = version = metadata.version("trio-wal")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinxcontrib_trio",
]
if find_spec("sphinx_copybutton"):  # a build without it has the same pages
    extensions.append("sphinx_copybutton")
exclude_patterns = ["_build"]
default_role = "py:obj"

html_theme = "furo"
html_title = f"trio-wal {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# sphinxcontrib-trio extends autodoc's classes, which Sphinx 9 has only in this mode.
autodoc_use_legacy_class_based = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False

# Looked up in inventories that are stored here, so that a build needs no network: Python's as
# its documentation has it, of the modules that are in use; trio's from the names in its sources.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.inv"),
    "trio": ("https://trio.readthedocs.io/en/stable", "inventories/trio.inv"),
}
# A name that leads nowhere is an error.
nitpicky = True
nitpick_ignore_regex = [
    # No inventories of these are stored.
    (r"py:.*", r"(opentelemetry|prometheus_client)\..*"),
    # Names in signatures are shown by where they are defined.
    (r"py:.*", r"trio_wal\._.*"),
    (r"py:.*", r"AbstractAsyncContextManager"),
    (r"py:.*", r"(trio_wal\.\w+\.)?(D|T|Ts)"),
    (r"py:class", r"AbstractAsyncContextManager"),
]


# -- the tables of metrics, from the one that exporters are made from --------------------------

TITLES = {
    "WalStatistics": "Logs",
    "WriterStatistics": "Writers",
    "ConsumerStatistics": "Consumers",
    "DatabaseStatistics": "Databases",
    "DatabaseReaderStatistics": "Readers of databases",
    "ReplicaStatistics": "Replicas",
    "Health": "Health",
    "Look": "The figures themselves",
}
"""Of what each class has."""


def metrics_table(group: Group) -> str:
    labels = ", ".join(f"`{label}`" for label in group.labels)
    lines = [f"### {TITLES[group.of.__name__]}", "", f"Labels: {labels}.", ""]
    lines += ["| metric | kind | unit | field | what it is |", "|---|---|---|---|---|"]
    for metric in group.metrics:
        if metric.exported:
            kind = metric.kind.value
            if metric.label:
                kind += f", label `{metric.label}`"
            cells = (f"`{metric.name}`", kind, metric.unit.word, f"`{metric.field}`", metric.text)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


# -- the changelog: what is released, and what will be -------------------------------------------

KINDS = {
    "feature": "Features",
    "bugfix": "Bug fixes",
    "doc": "Documentation",
    "removal": "Removals",
}


def changelog() -> str:
    lines: list[str] = []
    for kind, title in KINDS.items():
        fragments = sorted((ROOT / "newsfragments").glob(f"*.{kind}*.md"), key=_numbers)
        if fragments:
            lines += [] if lines else ["## Not released yet", ""]
            lines += [f"### {title}", ""]
            lines += [
                "* " + fragment.read_text("utf-8").strip().replace("\n", "\n  ")
                for fragment in fragments
            ]
            lines.append("")
    released = ROOT / "CHANGELOG.md"
    if released.exists():
        lines.append(
            released.read_text("utf-8").partition("<!-- towncrier release notes start -->")[2]
        )
    return "\n".join(lines)


def _numbers(path: Path) -> list[int]:
    return [int(part) for part in path.name.split(".") if part.isdigit()]


def add_generated(_app: Any, name: str, source: list[str]) -> None:
    if name == "metrics":
        source[0] = source[0].replace("<!-- metrics -->", "\n".join(map(metrics_table, TABLE)))
    elif name == "changelog":
        source[0] = source[0].replace("<!-- changelog -->", changelog())


# -- how a call is called: what sphinxcontrib-trio cannot see -----------------------------------


def functions() -> Iterator[FunctionType]:
    for name in dir(trio_wal):
        value = getattr(trio_wal, name)
        if isinstance(value, FunctionType):
            yield value
        elif inspect.isclass(value):
            yield from (member for member in vars(value).values() if inspect.isfunction(member))


def mark_context_managers() -> None:
    """Say of functions by their annotations that `with` or `async with` is how to call them."""
    for function in functions():
        try:
            returned = get_type_hints(function).get("return")
        except NameError:  # of a module that is imported for type checkers only
            continue
        returned = get_origin(returned) or returned
        if inspect.isclass(returned) and not inspect.iscoroutinefunction(function):
            if issubclass(returned, AbstractAsyncContextManager):
                function.__dict__["__returns_acontextmanager__"] = True
            elif issubclass(returned, AbstractContextManager):
                function.__dict__["__returns_contextmanager__"] = True


# -- docstrings under fields: where a class was written, not where users know it ----------------


def find_field_docstrings() -> None:
    public = ModuleAnalyzer.for_module("trio_wal")
    public.analyze()
    for name in [name for name in sys.modules if name.startswith("trio_wal._")]:
        with contextlib.suppress(PycodeError):
            module = ModuleAnalyzer.for_module(name)
            module.analyze()
            public.attr_docs.update(module.attr_docs)
            public.annotations.update(module.annotations)
            public.tagorder.update(module.tagorder)


def keep_sentences(
    _app: Any, what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Have napoleon take no sentence of a field for "type: description"."""
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # an empty comment


HOMES = {"UnsuitableServersError": "~trio_wal.nats.UnsuitableServersError"}
"""Errors that are no members of the package itself."""


def list_errors(
    _app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    """Make lists of what stands under "Raises, on entering:", which napoleon knows nothing of."""
    found: list[str] = []
    inside = False
    for line in lines:
        if re.match(r"Raises, .*:$", line):
            inside = True
            found += [f"**{line}**", ""]
        elif inside and (error := re.match(r"  (\w[\w., ]*): (.*)", line)):
            names = ", ".join(f"`{HOMES.get(name, name)}`" for name in error[1].split(", "))
            found.append(f"* {names}: {error[2]}")
        else:
            inside = inside and (not line or line.startswith(" "))
            found.append(line[2:] if inside and line.startswith("    ") else line)
    lines[:] = found


# -- the list of all names, under the anchors that a reference of one page had ------------------


def all_names(app: Any) -> str:
    lines = []
    found = sorted(app.env.domains["py"].get_objects(), key=lambda item: item[0].lower())
    for name, _, kind, page, anchor, _ in found:
        if kind != "module":
            address = app.builder.get_relative_uri("reference", page)
            short = escape(name.removeprefix("trio_wal."))
            lines.append(
                f'<li id="{escape(name)}"><a href="{address}#{escape(anchor)}">'
                f"<code>{short}</code></a></li>"
            )
    return f'<ul class="all-names">{"".join(lines)}</ul>'


def add_all_names(app: Any, name: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    if name == "reference":
        context["body"] = re.sub("<!-- all-names -->", lambda _: all_names(app), context["body"])


def setup(app: Any) -> None:
    mark_context_managers()
    find_field_docstrings()
    app.connect("autodoc-process-docstring", keep_sentences, priority=400)
    app.connect("autodoc-process-docstring", list_errors, priority=401)
    app.connect("source-read", add_generated)
    app.connect("html-page-context", add_all_names)
