"""`torchways trace`: what schedulers, executors and clients do in some seconds, as a file for Perfetto or a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchways.cli.target import UsageError, access, add_target_flags, command_parser
from torchways.errors import ConfigError

if TYPE_CHECKING:
    from torchways.rpc.operator import ClusterTrace, OperatorClient
    from torchways.rpc.spans import Span

_EXAMPLES = """\
  torchways trace                                  # five seconds, to trace.json.gz
  torchways trace --seconds 1 -o step.json.gz      # open it at https://ui.perfetto.dev
  torchways trace --png lanes.png                  # also a picture: a lane for each device, coloured by client
  torchways trace --from t.json.gz --png lanes.png # a picture of a trace that is there already
"""
_MAX_SECONDS = 600.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = command_parser(
        commands, "trace", "write a trace of what all clients, schedulers and executors do", _EXAMPLES
    )
    add_target_flags(parser)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to watch (default: 5)")
    parser.add_argument(
        "-o", "--output", default="trace.json.gz", metavar="PATH", help="file; compressed if it ends with .gz"
    )
    parser.add_argument("--png", metavar="PATH", help="draw a picture, too")
    parser.add_argument(
        "--from", dest="source", metavar="PATH", help="draw this trace, and ask no cluster; needs --png"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Watches, collects and writes."""
    if parsed.source is not None and parsed.png is None:
        raise UsageError("--from needs --png PATH, the picture to draw")
    if parsed.source is not None:
        from torchways.observability.trace import read_chrome_trace

        trace = read_chrome_trace(Path(parsed.source))
    else:
        trace = _collected(parsed)
    if parsed.png is not None:
        from torchways.observability.trace_picture import write_picture

        try:
            write_picture(Path(parsed.png), trace)
        except OSError as error:
            raise ConfigError(f"cannot write {parsed.png}: {error.strerror}") from error
        print(f"{parsed.png}: a lane for each device, coloured by client")
    return 0


def _collected(parsed: argparse.Namespace) -> dict[str, Any]:
    import asyncio

    from torchways.observability.trace import write_chrome_trace
    from torchways.rpc.operator import ask

    if not 0 < parsed.seconds <= _MAX_SECONDS:
        raise UsageError(f"--seconds must be above 0 and at most {_MAX_SECONDS:g}, not {parsed.seconds:g}")
    path = Path(parsed.output)
    names: dict[int, str] = {}

    async def collect(client: OperatorClient) -> ClusterTrace:
        before = await client.observe()  # a cluster that is not there, or refuses us, is noticed before the wait
        await asyncio.sleep(parsed.seconds)
        after = await client.observe()
        names.update({item.client_id: item.name for item in [*before.clients, *after.clients]})
        return await client.trace(before.time_ns)

    spans, missing = ask(access(parsed), collect)
    try:
        trace = write_chrome_trace(path, spans, names)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    gone = {name: seconds for name, found in spans.items() if (seconds := _forgotten_seconds(found))}
    num_spans = sum(map(len, spans.values())) - len(gone)
    processes = f"{_count(spans, 'executor')}, {_count(spans, 'scheduler')} and {_count(spans, 'client')}"
    print(f"{path}: {num_spans:,} spans of {processes} in {parsed.seconds:g} s; open it at https://ui.perfetto.dev")
    for name, seconds in sorted(gone.items()):
        print(f"without the first {seconds:.1f} s of {name}: it had more spans since than a process keeps")
    for name, reason in sorted(missing.items()):
        print(f"without {name}: {reason}")
    return trace


def _forgotten_seconds(spans: Sequence[Span]) -> float:
    """Returns for how long since the trace's begin a process has no spans any more."""
    from torchways.rpc.spans import FORGOTTEN

    return sum((span.end_ns - span.start_ns) / 1e9 for span in spans if span.kind == FORGOTTEN)


def _count(processes: Any, role: str) -> str:
    count = sum(name.startswith(role) for name in processes)
    return f"1 {role}" if count == 1 else f"{count} {role}s"
