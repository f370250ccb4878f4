"""`torchways down`: ends a cluster that stays."""

from __future__ import annotations

import argparse
import math
import os
import signal

from torchways.cli.target import UsageError, add_state_flags, command_parser, state_path
from torchways.errors import ClusterLost, ConfigError

_EXAMPLES = """\
  torchways down
  torchways down --name team
  torchways down --state /srv/tw.json --timeout 60
"""
#: How long processes may take to be gone after SIGKILL.
_KILL_SECONDS = 10.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = command_parser(
        commands, "down", "end a cluster in good order, and wait until all its processes are gone", _EXAMPLES
    )
    add_state_flags(parser)
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="then what is left is killed (default: 30)"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Ends it; returns when it is gone."""
    import psutil

    from torchways.launch import state_file

    if not 0 <= parsed.timeout < math.inf:
        raise UsageError(f"--timeout must be a number of seconds that is not negative, not {parsed.timeout:g}")
    path = state_path(parsed)
    if not state_file.lives(path):
        if path.exists():
            state_file.remove_stale(path)
            raise ClusterLost(f"the cluster of {path} has ended already, unasked; its state file is removed now")
        raise ClusterLost(f"no cluster runs that has the state file {path}; name another by --name or --state")
    state = state_file.read(path)
    try:
        agent = psutil.Process(state.pid)
        processes = [agent, *agent.children(recursive=True)]
        os.kill(state.pid, signal.SIGTERM)
    except (ProcessLookupError, psutil.NoSuchProcess):
        processes = []
    except PermissionError:
        raise ConfigError(
            f"the cluster of {path} (pid {state.pid}) is another user's: only that user may end it"
        ) from None
    _, left = psutil.wait_procs(processes, timeout=max(0.0, parsed.timeout))
    if left:
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        _, stuck = psutil.wait_procs(left, timeout=_KILL_SECONDS)
        pids = ", ".join(str(process.pid) for process in left)
        state_file.remove_stale(path)
        if stuck:
            raise ClusterLost(f"processes {pids} do not end, even by SIGKILL: they hang in the operating system")
        raise ClusterLost(f"processes {pids} had not ended after {parsed.timeout:g} s, and were killed; none is left")
    print(f"the cluster at {state.address or path} is down")
    return 0
