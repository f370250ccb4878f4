"""`torchways trace`: what all executors do in some seconds, as a file for Perfetto."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torchways.cli.target import access, add_target_flags, command_parser
from torchways.errors import ConfigError

if TYPE_CHECKING:
    from torchways.rpc import torchways_pb2 as pb
    from torchways.rpc.operator import OperatorClient

_EXAMPLES = """\
  torchways trace                                  # five seconds, to trace.json.gz
  torchways trace --seconds 1 -o step.json.gz      # open it at https://ui.perfetto.dev
"""
_MAX_SECONDS = 600.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = command_parser(commands, "trace", "write a trace of what all executors do for all clients", _EXAMPLES)
    add_target_flags(parser)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to watch (default: 5)")
    parser.add_argument(
        "-o", "--output", default="trace.json.gz", metavar="PATH", help="file; compressed if it ends with .gz"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Watches, collects and writes."""
    import asyncio

    from torchways.observability.trace import write_chrome_trace
    from torchways.rpc.operator import ask

    if not 0 < parsed.seconds <= _MAX_SECONDS:
        raise ConfigError(f"--seconds must be above 0 and at most {_MAX_SECONDS:g}, not {parsed.seconds:g}")
    path = Path(parsed.output)

    async def collect(client: OperatorClient) -> dict[str, list[pb.Span]]:
        await client.observe()  # a cluster that is not there, or refuses us, is noticed before the wait
        started_ns = time.time_ns()
        await asyncio.sleep(parsed.seconds)
        return await client.spans(started_ns)

    spans = ask(access(parsed), collect)
    try:
        write_chrome_trace(path, spans)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    num_spans, executors = sum(map(len, spans.values())), "1 executor" if len(spans) == 1 else f"{len(spans)} executors"
    found = f"{num_spans:,} spans of {executors} in {parsed.seconds:g} s"
    print(f"{path}: {found}; open it at https://ui.perfetto.dev")
    return 0
