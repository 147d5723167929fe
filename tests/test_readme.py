"""The README's examples are run as they stand, and its commands exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trio_wal

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(example: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", example],
        cwd=folder,
        check=True,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    ).stdout


def test_the_first_example_is_a_database_and_prints_what_it_says(tmp_path: Path) -> None:
    assert "open_database" in EXAMPLES[0]
    for _ in range(2):  # on a second run, too
        assert run(EXAMPLES[0], tmp_path) == "0 100\n"


def test_the_second_example_is_the_log_and_reads_back_what_it_wrote(tmp_path: Path) -> None:
    lines = run(EXAMPLES[1], tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert lines[0].endswith("b'order 17: two of blue'")
    assert lines[1].endswith("b'seen by 10.0.0.7'")


@pytest.mark.parametrize("session", ["demo", "tests"])
def test_the_two_commands_name_sessions_of_the_noxfile(session: str) -> None:
    assert f"python -m pip install nox && python -m nox -s {session}" in README
    functions = {
        node.name: {
            keyword.arg
            for d in node.decorator_list
            if isinstance(d, ast.Call)
            for keyword in d.keywords
        }
        for node in ast.walk(ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.decorator_list
    }
    assert session in functions


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"])
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+\.(?:md|rst|png|svg))(?:#[^)]*)?\)", page.read_text("utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_the_index_of_the_documentation_has_the_first_example() -> None:
    first = README.partition("<!-- first example -->")[2].partition("<!-- end first example -->")[0]
    assert first.strip() == f"```python\n{EXAMPLES[0]}```"


def test_the_image_of_the_readme_is_there_for_both_themes() -> None:
    images = re.findall(r'(?:srcset|src)="([^"]+)"', README)
    assert len(images) == 2
    assert all((ROOT / image).is_file() for image in images)


@pytest.mark.parametrize("name", ["open_wal", "open_database", "open_reader"])
def test_what_usage_names_is_public(name: str) -> None:
    assert name in (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    assert callable(getattr(trio_wal, name))
