"""Checks the model of the replicated log with spin, and that each of its seeded bugs is found.

    python tests/models/check.py [--batches N]

Law: exhaustive for two writers; needs spin and a C compiler, and says so where there are none.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

MODEL: Final = Path(__file__).with_name("replication.pml")
MUTANTS: Final = (
    "NO_EPOCH", "NO_IDENT", "ALL_OTHERS", "TAIL_FIRST", "CALL_ABSENT", "NEW_PLACE", "PURGE_ALL",
    "PURGE_AHEAD",
)  # fmt: skip
DEPTH: Final = 100_000
SECONDS: Final = 600


def search(folder: Path, *defines: str) -> tuple[int, int, int, str]:
    """All states; gives (states, depth, errors, the first one's text)."""
    options = [f"-D{define}" for define in defines]
    folder.mkdir()
    subprocess.run(["spin", *options, "-a", str(MODEL)], cwd=folder, check=True)
    compiler = ["cc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"]
    subprocess.run(compiler, cwd=folder, check=True)
    done = subprocess.run(
        ["./pan", f"-m{DEPTH}", "-w22"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    states = re.search(r"(\d+) states, stored", done.stdout)
    found = re.search(r"depth reached (\d+), errors: (\d+)", done.stdout)
    # With an error found the rest is not searched.
    complete = found is not None and (int(found[2]) or "not completed" not in done.stdout)
    if states is None or found is None or not complete:
        raise RuntimeError(f"spin has not searched all:\n{done.stdout}{done.stderr}")
    error = re.search(r"^pan:1: (.*)$", done.stdout, re.MULTILINE)
    return int(states[1]), int(found[1]), int(found[2]), error[1] if error else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", type=int, default=2, help="of each writer, 1 to 3 (2)")
    batches = parser.parse_args().batches
    if missing := [tool for tool in ("spin", "cc") if shutil.which(tool) is None]:
        print(f"missing: {', '.join(missing)} (apt-get install spin gcc)", file=sys.stderr)
        return 1
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("", *MUTANTS):
            size = 1 if name else batches
            defines = [f"BATCHES={size}", *([name] if name else [])]
            states, depth, errors, text = search(Path(temporary) / (name or "model"), *defines)
            shown = name or f"as it is, {size} batches of each of two writers"
            print(f"{shown}: {states:,} states, depth {depth}, {errors} errors {text}", flush=True)
            wrong += bool(errors) != bool(name)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
