"""`torchways stacks`: where every process is."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from torchways.cli.target import access, add_target_flags, command_parser
from torchways.errors import ConfigError

if TYPE_CHECKING:
    from torchways.rpc.operator import Stacks

_EXAMPLES = """\
  torchways stacks
  torchways stacks --process "executor i0.e1" --process "scheduler i0"
  torchways stacks --pid 4711
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = command_parser(
        commands, "stacks", "have every process print the Python stacks of its threads, and show them", _EXAMPLES
    )
    add_target_flags(parser)
    parser.add_argument("--pid", type=int, action="append", default=[], help="of this process only; may be repeated")
    parser.add_argument(
        "--process", action="append", default=[], metavar="NAME", help="of the process that `status` calls so; likewise"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Asks and prints; fails if a process printed nothing."""
    from torchways.rpc.operator import ask

    found = ask(access(parsed), lambda client: client.stacks(parsed.pid, parsed.process))
    if not found:
        asked = [*map(str, parsed.pid), *parsed.process]
        raise ConfigError(f"the cluster has no process {' or '.join(asked)}; `torchways status` lists them")
    found.sort(key=lambda item: (item.host, item.pid))
    if parsed.json:
        print(json.dumps([item._asdict() for item in found], indent=1))
    else:
        print("\n\n".join(map(_as_text, found)))
    silent = [f"{item.name} (pid {item.pid})" for item in found if not item.text]
    if silent:
        print(f"torchways stacks: printed nothing in time: {', '.join(silent)}", file=sys.stderr)
    return 1 if silent else 0


def _as_text(item: Stacks) -> str:
    return f"== {item.name} (pid {item.pid} on {item.host})\n{item.text or 'nothing in time'}"
