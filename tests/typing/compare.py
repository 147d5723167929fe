"""Whether mypy and pyright find in `good.py` nothing, and in `bad.py` what each line says.

Run it with the Python in whose environment both are: ``python tests/typing/compare.py``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ("good.py", "bad.py")
Found = dict[tuple[str, int], set[str]]
"""By file and line: codes of mypy, or rules of pyright."""


def expected(place: int) -> Found:
    """What the comments say: of mypy before the comma, of pyright behind it."""
    found: Found = {}
    for name in PROGRAMS:
        for number, line in enumerate((HERE / name).read_text("utf-8").splitlines(), 1):
            comment = re.search(r"# wrong: (.+), (.+)$", line)
            if comment is not None:
                found[name, number] = set(comment[1 + place].split())
    return found


def of_mypy() -> Found:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file="]
    command += ["--python-version=3.10", *(str(HERE / name) for name in PROGRAMS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode > 1:
        sys.exit(done.stdout + done.stderr)
    found: Found = defaultdict(set)
    for line in done.stdout.splitlines():
        error = re.match(r"(.+?):(\d+)(?::\d+)?: error: .*\[([a-z-]+)\]$", line)
        if error is not None:
            found[Path(error[1]).name, int(error[2])].add(error[3])
    return dict(found)


def of_pyright() -> Found:
    # No settings but these: those of this repository are not a user's.
    settings = {"typeCheckingMode": "strict", "pythonVersion": "3.10", "include": list(PROGRAMS)}
    project = HERE / "pyrightconfig.json"
    project.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    command += ["--project", str(project)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    finally:
        project.unlink()
    if done.returncode > 1:
        sys.exit(done.stdout + done.stderr)
    found: Found = defaultdict(set)
    for error in json.loads(done.stdout)["generalDiagnostics"]:
        line = error["range"]["start"]["line"] + 1
        found[Path(error["file"]).name, line].add(error.get("rule", error["message"]))
    return dict(found)


def main() -> None:
    wrong = 0
    for place, (checker, find) in enumerate((("mypy", of_mypy), ("pyright", of_pyright))):
        wanted, found = expected(place), find()
        for where in sorted(wanted.keys() | found.keys()):
            if wanted.get(where) != found.get(where):
                wrong += 1
                print(
                    f"{where[0]}:{where[1]}: {checker} finds {sorted(found.get(where, ()))}, "
                    f"and should find {sorted(wanted.get(where, ()))}"
                )
        print(f"{checker}: {len(found)} lines with errors of {len(wanted)} expected")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
