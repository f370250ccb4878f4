"""`twrun`: starts a cluster on this machine, runs a script against it, ends the cluster; or uses one that runs.

Spelled as torchrun where it means the same. But there is one copy of the script, the controller.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from torchways.config import LOG_FORMATS, PLATFORMS, ClusterConfig
from torchways.errors import TorchwaysError
from torchways.island.policy import check_policy
from torchways.launch.embedded import EmbeddedCluster, start_cluster
from torchways.launch.script import bound_command
from torchways.launch.state_file import find_token
from torchways.observability.process import LOG_FORMAT_VARIABLE, LOG_LEVEL_VARIABLE, LOG_LEVELS, setup_logging
from torchways.rpc.channel import TOKEN_VARIABLE
from torchways.signals import Interrupted, raise_interrupted

logger = logging.getLogger(__name__)

#: Flags that say what cluster to start.
_OF_NEW_CLUSTERS = (
    "--islands",
    "--devices-per-island",
    "--hosts-per-island",
    "--platform",
    "--memory-budget",
    "--policy",
    "--log-dir",
)

_EPILOG = """
ONLY THE CONTROLLER RUNS THE SCRIPT. Unlike torchrun, twrun starts ONE copy of it, whatever the number of devices: the
script is the single controller, and executors run what it dispatches. There is no rank, and no init_process_group.
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    result = argparse.ArgumentParser(
        prog="twrun",
        description="Runs a script as the single controller of a cluster of torchways islands on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="run the script against this cluster (`torchways up`), and leave it running",
    )
    result.add_argument("--islands", type=int, help="islands of the cluster (default: 2)")
    result.add_argument("--devices-per-island", type=int, help="devices of each island (default: 2)")
    result.add_argument("--hosts-per-island", type=int, help="host processes of each island (default: 1)")
    result.add_argument("--platform", choices=PLATFORMS, help="PJRT platform (default: cpu)")
    result.add_argument("--memory-budget", type=int, help="bytes of buffers a device (default: 80%% of RAM, shared)")
    result.add_argument("--policy", help="whose run is next where several clients share devices; see `torchways up`")
    result.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="of every process")
    result.add_argument("--log-format", choices=LOG_FORMATS, help="text (the default), or json: one object a line")
    result.add_argument("--log-dir", help="folder for one log file a process; default: all to stderr")
    kind = result.add_mutually_exclusive_group()
    kind.add_argument("-m", "--module", action="store_true", help="the script is a module's name, as for python -m")
    kind.add_argument("--no-python", action="store_true", help="the script is a command of its own, not Python's")
    result.add_argument("script", help="path of the script, or the module's name with -m")
    result.add_argument("script_args", nargs=argparse.REMAINDER, help="arguments of the script")
    return result


def normalize(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with flags spelled with dashes, as far as they are twrun's: --log_dir is --log-dir."""
    result = list(arguments)
    takes_value = {"--address", *_OF_NEW_CLUSTERS, "--log-level", "--log-format"}
    index = 0
    while index < len(result) and result[index].startswith("-"):
        flag, equals, value = result[index].partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        result[index] = flag + equals + value
        index += 2 if flag in takes_value and not equals else 1
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `twrun`; exits with the script's code (128 + n where signal n ended it)."""
    parsed = parser().parse_args(normalize(sys.argv[1:] if arguments is None else arguments))
    if (missing := _missing(parsed)) is not None:
        print(f"twrun: {missing}", file=sys.stderr)
        sys.exit(2)
    os.environ[LOG_LEVEL_VARIABLE] = parsed.log_level
    if parsed.log_format:
        os.environ[LOG_FORMAT_VARIABLE] = parsed.log_format
    setup_logging("twrun")
    try:
        code = _run_against(parsed.address, parsed) if parsed.address else _run(_config(parsed), parsed)
    except TorchwaysError as error:
        print(f"twrun: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)


def _given(parsed: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of a new cluster that the command line names."""
    names = [flag.removeprefix("--").replace("-", "_") for flag in _OF_NEW_CLUSTERS]
    return {name: value for name in names if (value := getattr(parsed, name)) is not None}


def _config(parsed: argparse.Namespace) -> ClusterConfig:
    config = ClusterConfig(
        log_level=parsed.log_level, log_format=parsed.log_format, data_path=_import_path(parsed), **_given(parsed)
    )
    check_policy(config.policy)
    return config


def _missing(parsed: argparse.Namespace) -> str | None:
    """Says what is wrong with the command line, before anything is started; None if nothing is."""
    if parsed.address and (given := _given(parsed)):
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        return f"{flags} cannot go with --address: that cluster runs already, with its own settings"
    if parsed.module:
        sys.path.insert(0, os.getcwd())  # as python -m has it
        try:
            found = importlib.util.find_spec(parsed.script) is not None
        except ImportError:
            found = False
        return None if found else f"there is no module {parsed.script!r}"
    if parsed.no_python:
        return None if shutil.which(parsed.script) else f"there is no command {parsed.script!r}"
    if not os.path.isfile(parsed.script):
        return f"there is no script {parsed.script!r} (in {os.getcwd()})"
    return None


def _import_path(parsed: argparse.Namespace) -> tuple[str, ...]:
    """Returns the folders that the script imports from, for the cluster's data processes."""
    first = os.getcwd() if parsed.module or parsed.no_python else os.path.dirname(os.path.abspath(parsed.script))
    return (first, *(os.path.abspath(entry) for entry in sys.path[1:]))


def _command(parsed: argparse.Namespace) -> list[str]:
    if parsed.no_python:
        return [parsed.script, *parsed.script_args]
    return [sys.executable, *(["-m"] if parsed.module else []), parsed.script, *parsed.script_args]


def _run_against(address: str, parsed: argparse.Namespace) -> int:
    """Runs the script with a cluster that stays."""
    environment = {**os.environ, "TORCHWAYS_ADDRESS": address, TOKEN_VARIABLE: find_token(address)}
    return _wait(subprocess.Popen(bound_command(_command(parsed)), env=environment))


def _run(config: ClusterConfig, parsed: argparse.Namespace) -> int:
    # A signal that comes while the cluster starts must not leave it behind: it raises, and everything is ended.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, raise_interrupted)
    cluster: EmbeddedCluster | None = None
    try:
        cluster = start_cluster(config)
        environment = {**os.environ, "TORCHWAYS_ADDRESS": cluster.address, TOKEN_VARIABLE: cluster.token}
        return _wait(subprocess.Popen(bound_command(_command(parsed)), env=environment))
    except Interrupted as interrupted:
        return 128 + interrupted.number
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # ending takes seconds, and must not be left half done
        if cluster is not None:
            cluster.close()


def _wait(script: subprocess.Popen[bytes]) -> int:
    """Waits for the script, passing signals on; a second Ctrl-C kills it."""
    interrupts = 0

    def interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            script.kill()
        elif not _in_foreground():  # there the terminal sends Ctrl-C to the script as well
            script.send_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, lambda *_: script.terminate())
    code = script.wait()
    if code < 0:
        print(f"twrun: the script was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code
    return code


def _in_foreground() -> bool:
    """Whether this process belongs to the terminal's foreground group, all of which gets Ctrl-C."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


if __name__ == "__main__":
    main()
