"""`torchways`: starts, watches and ends clusters that stay. One module of this package for each subcommand.

Nothing here imports torch, and a subcommand imports what it needs when it runs: the program answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from torchways.cli import down, stacks, status, top, trace, up
from torchways.cli.target import UsageError
from torchways.errors import TorchwaysError

#: Exit codes: it failed; the command line is wrong.
FAILED, USAGE = 1, 2
_INTERRUPTED = 130

_EPILOG = """
examples:
  torchways up --islands 2 --devices-per-island 4 --detach
  twrun --address "$(torchways status --address-only)" train.py
  torchways top
  torchways down

exit codes: 0 done, 1 it failed (one line on stderr says why), 2 the command line is wrong
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    result = argparse.ArgumentParser(
        prog="torchways",
        description="Starts, watches and ends clusters that stay, which scripts join and leave.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = result.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for module in (up, down, status, top, trace, stacks):
        module.add_parser(commands)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `torchways`; exits with one of the codes above."""
    parsed = parser().parse_args(arguments)
    try:
        code = parsed.run(parsed)
        sys.stdout.flush()
    except TorchwaysError as error:
        print(f"torchways {parsed.command}: {error}", file=sys.stderr)
        code = USAGE if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BrokenPipeError:  # whoever read our output has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)
