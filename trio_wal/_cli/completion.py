"""`trio-wal completion`: what a shell needs to complete the commands and their options."""

from __future__ import annotations

from typing import Literal

from cyclopts import App

from ._output import ExitCode


def completion_of(app: App) -> App:
    """The command, which knows all others of ``app``."""
    command = App(name="completion", help_format="markdown")

    @command.default
    def completion(shell: Literal["bash", "zsh", "fish"], /) -> int:
        """Print a script that completes commands, options and paths in a shell.

        Example: `source <(trio-wal completion bash)`, in `~/.bashrc`; for zsh write it to
        `_trio-wal` in a directory of `$fpath`, for fish to
        `~/.config/fish/completions/trio-wal.fish`.

        Args:
          shell: Which shell the script is for.
        """
        print(app.generate_completion(shell=shell))
        return ExitCode.OK

    return command
