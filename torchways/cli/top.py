"""`torchways top`: a live view of a cluster."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torchways.cli.target import UsageError, access, add_target_flags, command_parser
from torchways.errors import DeadlineExceeded

if TYPE_CHECKING:
    import asyncio

    from rich.live import Live

    from torchways.rpc import torchways_pb2 as pb
    from torchways.rpc.activity import Activity, ClientActivity
    from torchways.rpc.operator import OperatorAccess, OperatorClient

_EXAMPLES = """\
  torchways top
  torchways top --interval 0.5 --sort memory
  torchways top --once                      # one frame, as text
  torchways top --json | jq '.clients[] | {name, wanted, got}'

keys:
  q quit   p pause   s sort by the next column
"""
#: What clients can be sorted by, and how; the first is the default. Largest first but for names.
SORTS: dict[str, Callable[[ClientActivity], tuple[float | str, int]]] = {
    "got": lambda client: (-client.got, client.client_id),
    "queue": lambda client: (-(client.num_held + client.num_admitted), client.client_id),
    "memory": lambda client: (-client.buffer_bytes, client.client_id),
    "runs": lambda client: (-client.runs_per_second, client.client_id),
    "name": lambda client: (client.name, client.client_id),
}
_MIN_INTERVAL, _MAX_INTERVAL = 0.1, 60.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = command_parser(
        commands, "top", "show live who uses which devices, what waits for what, memory and compilation", _EXAMPLES
    )
    add_target_flags(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="of a frame (default: 1)")
    parser.add_argument("--sort", choices=tuple(SORTS), default="got", help="what clients are sorted by (default: got)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--once", action="store_true", help="print one frame; so it is where stdout is no terminal")
    form.add_argument("--json", action="store_true", help="print one frame as one JSON object")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Watches until `q`."""
    if not _MIN_INTERVAL <= parsed.interval <= _MAX_INTERVAL:
        limits = f"between {_MIN_INTERVAL:g} and {_MAX_INTERVAL:g}"
        raise UsageError(f"--interval must be {limits} seconds, not {parsed.interval:g}")
    target = access(parsed)
    if parsed.once or parsed.json or not sys.stdout.isatty():
        _print_frame(target, parsed)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _View(target, parsed.interval, parsed.sort).run()
    return 0


def _print_frame(target: OperatorAccess, parsed: argparse.Namespace) -> None:
    import asyncio

    from torchways.rpc.activity import activity_between
    from torchways.rpc.operator import ask

    async def two(client: OperatorClient) -> Activity:
        before = await client.observe()
        await asyncio.sleep(parsed.interval)
        return activity_between(before, await client.observe())

    activity = ask(target, two)
    if parsed.json:
        print(json.dumps({"address": target.address, **dataclasses.asdict(activity)}, indent=1))
        return
    from rich.console import Console

    from torchways.cli.top_view import frame

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    console.print(frame(target.address, activity, sort=parsed.sort))


class _View:
    """The live view; it stays on the screen while the cluster answers."""

    def __init__(self, target: OperatorAccess, interval: float, sort: str) -> None:
        self._target = target
        self._interval = interval
        self._sort = sort
        self._is_paused = False
        self._is_over = False
        self._activity: Activity | None = None

    def run(self) -> None:
        """Draws frames until `q`."""
        import asyncio

        from rich.console import Console
        from rich.live import Live

        from torchways.rpc.operator import connected

        with (
            asyncio.Runner() as runner,
            _keys() as wait_key,
            Live(console=Console(), screen=True, auto_refresh=False) as live,
        ):
            connection = connected(self._target)
            client = runner.run(connection.__aenter__())
            try:
                self._watch(runner, client, live, wait_key)
            finally:
                runner.run(connection.__aexit__(None, None, None))

    def _watch(
        self,
        runner: asyncio.Runner,
        client: OperatorClient,
        live: Live,
        wait_key: Callable[[float], str],
    ) -> None:
        from torchways.rpc.activity import activity_between

        before: pb.Observation | None = None
        while not self._is_over:
            if not self._is_paused:
                with contextlib.suppress(DeadlineExceeded):  # a busy machine; the last frame stays
                    after = runner.run(client.observe())
                    self._activity = activity_between(before if before is not None else after, after)
                    before = after
            self._draw(live)
            next_frame = time.monotonic() + self._interval
            while not self._is_over and (left := next_frame - time.monotonic()) > 0:
                if key := wait_key(left):
                    self._press(key)
                    self._draw(live)

    def _press(self, key: str) -> None:
        match key:
            case "q" | "\x04":
                self._is_over = True
            case "p" | " ":
                self._is_paused = not self._is_paused
            case "s":
                names = list(SORTS)
                self._sort = names[(names.index(self._sort) + 1) % len(names)]

    def _draw(self, live: Live) -> None:
        from torchways.cli.top_view import frame

        if self._activity is not None:
            shown = frame(self._target.address, self._activity, sort=self._sort, is_paused=self._is_paused, keys=True)
            live.update(shown, refresh=True)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Gives a function that waits some seconds for a key, which is empty where none came."""
    import termios
    import tty

    if not sys.stdin.isatty():

        def sleep(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield sleep
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def wait(seconds: float) -> str:
        if not select.select([fd], [], [], seconds)[0]:
            return ""
        return os.read(fd, 1).decode("ascii", "replace") or "q"  # the terminal is gone

    try:
        tty.setcbreak(fd)
        yield wait
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
