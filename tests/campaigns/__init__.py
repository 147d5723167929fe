"""The proof: campaigns that try to lose what trio-wal has acknowledged.

::

    python -m nox -s crash -- --minutes 2        # against the package as it is installed
    python -m campaigns crash --minutes 2        # the same, in the folder `tests`

Law: one module per campaign, with `add_arguments(parser)`, `run(arguments) -> int` (0: nothing
lost, 1: findings, 2: usage), and where it has them `PARTS` and `replay(case) -> int`.  Every
random choice comes from ``--seed``; a failing case prints one command that replays just it.
What several share stands in modules that start with an underscore.
"""
