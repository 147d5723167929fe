"""``python -m campaigns NAME [options]``: finds the campaign and hands over.

Law: a campaign's module is imported only when it is asked for: some need what is not
installed everywhere.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._report import fail_usage, quiet

HERE = Path(__file__).parent


def names() -> list[str]:
    """The campaigns that there are."""
    return sorted(path.stem for path in HERE.glob("[a-z]*.py"))


def load(name: str) -> Any:
    return importlib.import_module(f"campaigns.{name}")


def summary(name: str) -> str:
    """First line of a campaign's docstring, without importing it."""
    module = ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(module) or "").partition("\n")[0]


def parser_of(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m campaigns {name}", description=summary(name))
    load(name).add_arguments(parser)
    return parser


def run(campaign: Any, arguments: argparse.Namespace) -> int:
    """A campaign, or one of its cases again: ``replay`` raises `ValueError` or `LookupError`
    where there is none of that name."""
    quiet()
    if unknown := set(getattr(arguments, "parts", ())) - set(getattr(campaign, "PARTS", ())):
        return fail_usage(f"no such part: {', '.join(sorted(unknown))}")
    if getattr(arguments, "replay", None) is None:
        return int(campaign.run(arguments))
    try:
        return int(campaign.replay(arguments.replay))
    except (ValueError, LookupError):
        return fail_usage(f"no such case: {arguments.replay}")


def main(argv: Sequence[str]) -> int:
    known = names()
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m campaigns NAME [options]; NAME --help tells the options\n")
        for name in known:
            print(f"  {name:12} {summary(name)}")
        return 0 if argv else 2
    name, *rest = argv
    if name not in known:
        print(f"there is no campaign {name!r}, only {', '.join(known)}", file=sys.stderr)
        return 2
    try:
        return run(load(name), parser_of(name).parse_args(rest))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
