"""Which cluster a subcommand means, and what it proves itself with."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from torchways.errors import ClusterLost, ConfigError

if TYPE_CHECKING:
    from torchways.rpc.operator import OperatorAccess

_ADDRESS_VARIABLE = "TORCHWAYS_ADDRESS"


class UsageError(ConfigError):
    """The command line is wrong."""


def command_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    """Adds a subcommand, whose help ends with examples."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_state_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a state file."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--name", help="name of the cluster (default: default); its state file has it")
    which.add_argument(
        "--state",
        metavar="PATH",
        help="state file (default: torchways/NAME.json in $XDG_RUNTIME_DIR, or ~/.torchways/NAME.json)",
    )


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that name a running cluster."""
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help=f"the cluster (default: that of --state or --name; else ${_ADDRESS_VARIABLE}; else that named default)",
    )
    add_state_flags(parser)


def state_path(parsed: argparse.Namespace) -> Path:
    """Returns the state file that the flags name."""
    from torchways.launch.state_file import default_path

    if parsed.state:
        return Path(parsed.state).absolute()
    try:
        return default_path("default" if parsed.name is None else parsed.name)
    except ConfigError as error:
        raise UsageError(str(error)) from None


def state_flag(parsed: argparse.Namespace) -> str:
    """Returns the flag that names the same state file, for messages; empty for the default."""
    if parsed.state:
        return f" --state {parsed.state}"
    return f" --name {parsed.name}" if parsed.name else ""


def access(parsed: argparse.Namespace) -> OperatorAccess:
    """Returns where the cluster is, and what proves who asks.

    Raises:
        ClusterLost: the state file's cluster does not run.
        ConfigError: there is no token, or others may read its file.
    """
    from torchways.launch import state_file
    from torchways.rpc.operator import OperatorAccess

    is_named = bool(parsed.state or parsed.name)
    address = parsed.address or ("" if is_named else os.environ.get(_ADDRESS_VARIABLE, ""))
    if address and not is_named:
        token = state_file.find_token(address)
        state = _operators_state(address)
        return OperatorAccess(address, token, state.operator_secret if state else "")
    path = state_path(parsed)
    if not state_file.lives(path):
        started = f"torchways up{state_flag(parsed)} --detach"
        raise ClusterLost(f"no cluster runs that has the state file {path}: start one (`{started}`), or give --address")
    state = state_file.read(path)
    if not state.address:
        raise ClusterLost(f"the cluster of {path} is starting; ask again in some seconds")
    return OperatorAccess(address or state.address, state.token, state.operator_secret)


def _operators_state(address: str):  # type: ignore[no-untyped-def]  # ClusterState | None; imported when it is needed
    """Returns the state of the cluster at an address, from the file in the environment or a default folder."""
    from torchways.launch import state_file

    if name := os.environ.get(state_file.TOKEN_FILE_VARIABLE, ""):
        try:
            state = state_file.read(Path(name))
            if state.address == address:
                return state
        except (FileNotFoundError, ConfigError):
            pass  # it holds the token alone, or `find_token` says what is wrong with it
    try:
        return state_file.state_at(address)
    except ConfigError:
        return None  # the token is another's; what needs the operator's secret says so
