"""The code blocks of a page, for tests that run them as a reader would.

Law: what a page shows is what is run.  Numbers, paths and times of an output may differ from those
that the page shows, words may not.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SECONDS_MAX = 1200
"""After which a page's commands are ended; no test waits for so long."""

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)


@attrs.frozen
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    """What the fence says: ``python``, ``console``, ``{literalinclude}`` ..."""
    argument: str
    """Of a directive."""
    options: dict[str, str]
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text("utf-8")
    for match in _FENCE.finditer(text):
        indent = len(match["indent"])
        lines = [line[indent:] for line in match["body"].split("\n")]
        words = match["info"].split(maxsplit=1) or [""]
        language, argument = words[0], words[1] if len(words) > 1 else ""
        options = {}
        while (
            language.startswith("{")
            and lines
            and (option := re.match(r":([\w-]+): ?(.*)", lines[0]))
        ):
            options[option[1]] = option[2]
            del lines[0]
        if language == "{code-block}":
            language, argument = argument, ""
        yield Block(
            page, text.count("\n", 0, match.start()) + 1, language, argument, options,
            "\n".join(lines).strip("\n") + "\n",
        )  # fmt: skip


def pages() -> list[Path]:
    """All that is written in Markdown for readers."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


# -- a page that is followed from top to bottom ----------------------------------------------------


def commands(block: Block) -> list[tuple[str, str]]:
    """The commands of a console block, and what each is said to print."""
    found: list[tuple[str, str]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            command, output = found.pop()
            found.append((command, output + line + "\n"))
    return found


PROLOGUE = """\
set -u
cd "$1"
# A reader waits for some seconds: here, until that has happened for which they are.
sleep() {
    until [ "$(wc -l < sold.txt 2>/dev/null || echo 0)" -ge 100 ]; do command sleep 0.1; done
}
"""
MARK = "-- the end of a command --"


def follow(page: Path, folder: Path, skip: tuple[str, ...] = ()) -> list[tuple[str, str, str]]:
    """Write the page's programs into the folder and run its commands.

    Returns each with what the page shows, and with what it prints.  Those that begin with one of
    ``skip`` are left out.
    """
    script, shown = [PROLOGUE], []
    for block in blocks(page):
        if block.language == "python" and "caption" in block.options:
            (folder / block.options["caption"]).write_text(block.text, "utf-8")
        elif block.language == "console":
            for command, output in commands(block):
                if not command.startswith(skip):
                    script.append(f"{command}\necho '{MARK}'\n")
                    shown.append((command, output))
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    (folder / "bin").mkdir()
    for name in ("python", "trio-wal"):
        program = (
            [sys.executable, "-W", "error", "-X", "utf8"]
            if name == "python"
            else [sys.executable, "-m", "trio_wal"]
        )
        wrapper = folder / "bin" / name
        wrapper.write_text(f'#!/bin/sh\nexec {" ".join(program)} "$@"\n', "utf-8")
        wrapper.chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    printed = subprocess.run(
        [bash, "-c", "\n".join(script), "bash", str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        timeout=SECONDS_MAX,
        env={**os.environ, "PATH": path, "PYTHONSAFEPATH": "1"},
    ).stdout.split(f"{MARK}\n")
    assert len(printed) == len(shown) + 1, printed
    return [(*item, found) for item, found in zip(shown, printed, strict=False)]


def alike(shown: str, found: str) -> bool:
    """Whether this is what was shown, but for numbers, paths, times and what ``...`` stands for."""
    pattern = re.escape(_plain(shown))
    lines = re.escape("...\n")
    pattern = pattern.replace(lines, r"(?:.*\n)*").replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, _plain(found)) is not None


def _plain(text: str) -> str:
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "UUID", text)
    text = re.sub(r"\S*/(?=[\w.]+)", "", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT\S+", "TIME", text)
    text = re.sub(r"\d+(?:[,.]\d+)*", "N", text)
    text = re.sub(r"N segments?|N frames?", lambda match: match[0].rstrip("s"), text)
    return re.sub(r" +", " ", text)
