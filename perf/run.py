"""The benchmarks: ``python perf/run.py [NAME...]``, or ``python -m nox -s perf -- [NAME...]``.

Without a name all of them run, briefly, which takes some minutes; a name runs that one at
length.  "scale" at length writes some 30 GB, takes a quarter of an hour where the disk takes
200 MB/s for as long, and leaves out what there is no room for.  "before" needs a checkout of
another commit (--before) and leaves itself out without one.  "replicated" needs a nats-server
and leaves itself out where there is none.  Figures and plots go to ``perf/results``.

At the end stands the table of what must be reached, and which ratios have become worse
than those in ``perf/ratios.json``, that is than the last run with ``--store`` in the same
mode.  Timing never fails a run: the exit code says only whether the benchmarks ran.  One that
breaks off is told with its traceback, and the others run.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

NAMES = (
    "append",
    "recovery",
    "memory",
    "transactions",
    "tails",
    "follow",
    "readers",
    "asyncio",
    "scale",
    "backpressure",
    "replicated",
    "operate",
    "before",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of trio-wal.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--dir", help="where the logs go: a directory on a real disk")
    parser.add_argument("--brief", action="store_true", help="briefly, also with a name")
    parser.add_argument("--before", help="a checkout of another commit, for the benchmark of it")
    parser.add_argument("--plots", help="where the plots go; the default is perf/results")
    parser.add_argument(
        "--store", action="store_true", help="keep the ratios as the ones to compare with"
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(NAMES)):
        parser.error(f"there is no benchmark {unknown[0]!r}: only {', '.join(NAMES)}")

    # Python is told not to look into this folder (see ENV in noxfile.py): the package must be
    # the installed one.  The benchmarks themselves are not installed.
    sys.path.append(str(Path(__file__).resolve().parent))
    import harness
    import plots as drawing
    import report as found

    directory = harness.scratch_directory(arguments.dir)
    setting = harness.Setting(
        directory, brief=arguments.brief or not arguments.names, before=arguments.before
    )
    facts = {**harness.machine(directory), "mode": setting.mode}
    found.console.print(", ".join(f"{name}: {fact}" for name, fact in facts.items()), "\n")
    plots = Path(arguments.plots) if arguments.plots else found.RESULTS
    harness.touch_memory(directory)
    requirements: list[found.Requirement] = []
    broken = []
    for name in arguments.names or NAMES:
        try:
            report = importlib.import_module(f"bench_{name}").run(setting)
        except Exception:  # noqa: BLE001  (the others are wanted, whatever it was)
            traceback.print_exc()
            broken.append(name)
            continue
        found.show(report)
        found.save(report, facts)
        drawing.draw(name, plots)
        requirements += report.requirements
    found.show_requirements(requirements)
    found.show_regressions(requirements, facts)
    if arguments.store:
        found.store_ratios(requirements, facts)
    if broken:
        sys.exit(f"broken off: {', '.join(broken)}")


if __name__ == "__main__":
    main()
