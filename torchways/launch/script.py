"""Becomes another command that dies with its parent: ``python -m torchways.launch.script PARENT_PID COMMAND...``.

The kernel's order to kill this process when its parent ends outlives `exec`, so that it holds from the first moment,
also for a command that takes seconds to import. For twrun's script and for the processes of a node.
"""

from __future__ import annotations

import os
import sys

from torchways.observability.process import die_with_parent


def bound_command(command: list[str]) -> list[str]:
    """Returns the command line that runs `command` so that it dies with this process (its forking thread)."""
    return [sys.executable, "-m", "torchways.launch.script", str(os.getpid()), *command]


def main() -> None:
    """Arguments: the parent's pid, the command."""
    parent_pid, *command = sys.argv[1:]
    die_with_parent(int(parent_pid))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main()
