"""Sphinx's settings. `python -m nox -s docs` builds the pages into docs/_build/html."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from trio_wal._metrics import TABLE, Group

project = "trio-wal"
author = "the trio-wal authors"
copyright = "the trio-wal authors"
release = version = metadata.version("trio-wal")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib_trio",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"trio-wal {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# sphinxcontrib-trio extends autodoc's classes, which Sphinx 9 has only in this mode.
autodoc_use_legacy_class_based = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False

# A name that leads nowhere is an error, unless it belongs to somebody else: looking up others'
# names would need their servers.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|contextlib|datetime|os|pathlib|ssl|trio|types|typing|uuid)\..*"),
    (r"py:.*", r"(opentelemetry|prometheus_client)\..*"),
    # Names in signatures are shown by where they are defined.
    (r"py:.*", r"trio_wal\._.*"),
    (r"py:.*", r"(trio_wal\.\w+\.)?(D|T|Ts)"),
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


def add_metrics(_app: Any, name: str, source: list[str]) -> None:
    if name == "metrics":
        source[0] = source[0].replace("<!-- metrics -->", "\n".join(map(metrics_table, TABLE)))


def setup(app: Any) -> None:
    app.connect("source-read", add_metrics)
