"""Sphinx's settings. `python -m nox -s docs` builds the pages into docs/_build/html."""

from __future__ import annotations

from importlib import metadata

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
    # Names in signatures are shown by where they are defined.
    (r"py:.*", r"trio_wal\._.*"),
    (r"py:.*", r"(trio_wal\.\w+\.)?(D|T|Ts)"),
]
