"""`python -m trio_wal`, and the entry point of the `trio-wal` script.

Law: says in one line what is missing where the ``cli`` extra is not installed; all else
is in `_cli`.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line of this process; returns the exit code."""
    try:
        from ._cli import run
    except KeyboardInterrupt:
        return 130
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith("trio_wal"):
            raise
        print(
            f"trio-wal: the command line needs {exc.name}, which is not installed: "
            "python -m pip install 'trio-wal[cli]'",
            file=sys.stderr,
        )
        return 2
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
