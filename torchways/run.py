"""`twrun`: starts a cluster on this machine, runs a script against it, ends the cluster.

Spelled as torchrun where it means the same. But there is one copy of the script, the controller.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from torchways.config import PLATFORMS, ClusterConfig
from torchways.errors import TorchwaysError
from torchways.launch.embedded import start_cluster
from torchways.observability.process import LOG_LEVEL_VARIABLE, LOG_LEVELS, setup_logging
from torchways.rpc.channel import TOKEN_VARIABLE

logger = logging.getLogger(__name__)

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
    )
    result.add_argument("--islands", type=int, default=2, help="islands of the cluster (default: 2)")
    result.add_argument("--devices-per-island", type=int, default=2, help="devices of each island (default: 2)")
    result.add_argument("--platform", choices=PLATFORMS, default="cpu", help="PJRT platform (default: cpu)")
    result.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="of every process")
    result.add_argument("--log-dir", help="folder for one log file a process; default: all to stderr")
    result.add_argument("-m", "--module", action="store_true", help="the script is a module's name, as for python -m")
    result.add_argument("script", help="path of the script, or the module's name with -m")
    result.add_argument("script_args", nargs=argparse.REMAINDER, help="arguments of the script")
    return result


def normalize(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with flags spelled with dashes, as far as they are twrun's: --log_dir is --log-dir."""
    result = list(arguments)
    takes_value = {"--islands", "--devices-per-island", "--platform", "--log-level", "--log-dir"}
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
    if not parsed.module and not os.path.isfile(parsed.script):
        print(f"twrun: there is no script {parsed.script!r} (in {os.getcwd()})", file=sys.stderr)
        sys.exit(2)
    os.environ[LOG_LEVEL_VARIABLE] = parsed.log_level
    setup_logging("twrun")
    try:
        config = ClusterConfig(
            islands=parsed.islands,
            devices_per_island=parsed.devices_per_island,
            platform=parsed.platform,
            log_level=parsed.log_level,
            log_dir=parsed.log_dir,
        )
        code = _run(config, parsed)
    except TorchwaysError as error:
        print(f"twrun: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code)


def _run(config: ClusterConfig, parsed: argparse.Namespace) -> int:
    # Signals that come while the cluster starts must not leave it behind: they raise, and `finally` ends it.
    signal.signal(signal.SIGTERM, _raise_interrupt)
    cluster = start_cluster(config)
    try:
        environment = {**os.environ, "TORCHWAYS_ADDRESS": cluster.address, TOKEN_VARIABLE: cluster.token}
        kind = "module" if parsed.module else "path"
        script = subprocess.Popen(
            [
                *(sys.executable, "-m", "torchways.launch.script", str(os.getpid())),
                *(kind, parsed.script, *parsed.script_args),
            ],
            env=environment,
        )
        return _wait(script)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        cluster.close()


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _wait(script: subprocess.Popen[bytes]) -> int:
    """Waits for the script, passing signals on; a second Ctrl-C kills it."""
    interrupts = 0

    def interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        if interrupts > 1:
            script.kill()
        elif not sys.stdin.isatty():  # a terminal sends Ctrl-C to the script by itself
            script.send_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, lambda *_: script.terminate())
    code = script.wait()
    if code < 0:
        print(f"twrun: the script was ended by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code
    return code


if __name__ == "__main__":
    main()
