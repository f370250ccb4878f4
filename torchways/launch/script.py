"""Runs the user's script as the controller, so that it dies with twrun: `python -m torchways.launch.script`."""

from __future__ import annotations

import os
import runpy
import sys

from torchways.observability.process import die_with_parent


def main() -> None:
    """Arguments: the parent's pid, "path" or "module", the script, its arguments."""
    parent_pid, kind, script, *arguments = sys.argv[1:]
    die_with_parent(int(parent_pid))
    sys.argv = [script, *arguments]
    if kind == "module":
        sys.path.insert(0, os.getcwd())
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
