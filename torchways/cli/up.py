"""`torchways up`: starts a cluster that stays."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from torchways.cli.target import UsageError, add_state_flags, command_parser, state_flag, state_path
from torchways.errors import ClusterLost, ConfigError, DeadlineExceeded

if TYPE_CHECKING:
    from torchways.config import ClusterConfig
    from torchways.launch.embedded import EmbeddedCluster

_EXAMPLES = """\
  torchways up                                    # two islands of two CPU devices; Ctrl-C ends it
  torchways up --islands 1 --devices-per-island 4 --detach
  torchways up --name team --policy priority --metrics-port 9400 --detach
  torchways up --state /srv/tw.json --token-file /srv/tw.token --log-format json --log-dir /srv/logs --detach
"""
#: The longest time that a flag may say, 30 years.
_MAX_SECONDS = 1e9
_POLL_SECONDS = 0.05
#: They end a cluster in the foreground, and one that is starting.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = command_parser(
        commands, "up", "start a cluster that stays until `torchways down`, Ctrl-C, SIGTERM or SIGHUP", _EXAMPLES
    )
    add_state_flags(parser)
    parser.add_argument("--detach", action="store_true", help="return when it is ready; it goes on in the background")
    parser.add_argument("--json", action="store_true", help="print address, pid and files as one JSON object")
    size = parser.add_argument_group("size")
    size.add_argument("--islands", type=int, default=2, help="islands of the cluster (default: 2)")
    size.add_argument("--devices-per-island", type=int, default=2, help="devices of each island (default: 2)")
    size.add_argument("--hosts-per-island", type=int, default=1, help="host processes of each island (default: 1)")
    size.add_argument("--platform", default="cpu", help="cpu, tpu or simulated (default: cpu)")
    size.add_argument("--memory-budget", type=int, help="bytes of buffers a device (default: 80%% of RAM, shared)")
    sharing = parser.add_argument_group("sharing of devices")
    sharing.add_argument(
        "--policy",
        default="proportional_share",
        help="whose run is next: proportional_share (the default), first_come_first_served, priority, or module:Class",
    )
    sharing.add_argument(
        "--window", type=float, default=0.005, metavar="SECONDS", help="device time admitted ahead (default: 0.005)"
    )
    sharing.add_argument(
        "--client-memory", type=int, metavar="BYTES", help="of a device that one client may have (default: all)"
    )
    sharing.add_argument(
        "--client-programs",
        type=int,
        default=1 << 30,
        metavar="BYTES",
        help="of programs that one client may have on an executor (default: 1 GiB)",
    )
    sharing.add_argument("--max-weight", type=float, default=16.0, help="largest weight of a client (default: 16)")
    sharing.add_argument("--max-priority", type=int, default=10, help="highest priority of a client (default: 10)")
    sharing.add_argument(
        "--data-path",
        metavar="FOLDERS",
        help="let clients run input pipelines (tw.data_loader), with code from these folders, separated as in "
        "PYTHONPATH, and from what is installed: they can run any code as you (docs/security.md)",
    )
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of this machine to listen on, which clients connect to; so not 0.0.0.0 (default: 127.0.0.1)",
    )
    network.add_argument("--metrics-port", type=int, help="of a web page and of /metrics; 0 chooses a free port")
    network.add_argument(
        "--token-file", metavar="PATH", help="write the token alone there, for those who may join and no more"
    )
    logs = parser.add_argument_group("logs")
    logs.add_argument(
        "--stall-warning",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="log what a run waits for that has made no progress for so long (default: 30)",
    )
    logs.add_argument("--log-level", default="warning", help="debug, info, warning or error, of every process")
    logs.add_argument("--log-format", help="text (the default), or json: one object per line")
    logs.add_argument(
        "--log-dir", help="folder for one log file per process (default: stderr; with --detach, beside the state file)"
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Starts it; returns when it is ready (--detach) or has ended."""
    from torchways.launch import state_file

    path = state_path(parsed)
    try:
        config = _config(parsed, path)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    if state_file.lives(path):
        remedy = f"end it (`torchways down{state_flag(parsed)}`), or choose another --name or --state"
        raise ClusterLost(f"a cluster runs already with the state file {path}: {remedy}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # before the logs, whose folder may be below it
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder {path.parent}: {error.strerror}; choose another by --state"
        ) from error
    if parsed.token_file:
        state_file.check_token_file(Path(parsed.token_file))  # before there is a cluster that would end by it
    return _detach(config, path, parsed) if parsed.detach else _stay(config, path, parsed)


def _config(parsed: argparse.Namespace, path: Path) -> ClusterConfig:
    from torchways.config import ClusterConfig
    from torchways.island.policy import check_policy
    from torchways.observability.process import LOG_LEVELS

    if parsed.log_level not in LOG_LEVELS:
        raise ConfigError(f"--log-level must be one of {', '.join(LOG_LEVELS)}, not {parsed.log_level!r}")
    for flag in ("window", "stall_warning"):
        if not abs(value := getattr(parsed, flag)) <= _MAX_SECONDS:
            raise ConfigError(f"--{flag.replace('_', '-')} must be a number of seconds, not {value}")
    log_dir = parsed.log_dir or (str(path.with_suffix("")) + "-logs" if parsed.detach else None)
    config = ClusterConfig(
        islands=parsed.islands,
        devices_per_island=parsed.devices_per_island,
        hosts_per_island=parsed.hosts_per_island,
        platform=parsed.platform,
        host=parsed.host,
        log_level=parsed.log_level,
        log_format=parsed.log_format,
        log_dir=os.path.abspath(log_dir) if log_dir else None,
        memory_budget=parsed.memory_budget,
        client_memory=parsed.client_memory,
        client_programs=parsed.client_programs,
        policy=parsed.policy,
        window=timedelta(seconds=parsed.window),
        stall_warning=timedelta(seconds=parsed.stall_warning),
        max_weight=parsed.max_weight,
        max_priority=parsed.max_priority,
        metrics_port=parsed.metrics_port,
        data_path=_folders(parsed.data_path),
    )
    check_policy(config.policy)
    return config


def _folders(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return tuple(os.path.abspath(folder) for folder in text.split(os.pathsep) if folder)


def _detach(config: ClusterConfig, path: Path, parsed: argparse.Namespace) -> int:
    """Starts the cluster; one that is not announced ends, since nobody would know of it."""
    from torchways.launch.embedded import start_cluster
    from torchways.signals import Interrupted

    _raise_on_signals()
    cluster = None
    try:
        cluster = start_cluster(config, state=path, stays=True)
        _announce(cluster, config, path, parsed)
    except BaseException as error:
        _ignore_signals()
        if cluster is not None:
            os.kill(cluster.agent_pid, signal.SIGTERM)
        if isinstance(error, Interrupted):
            return 128 + error.number
        raise
    return 0


def _stay(config: ClusterConfig, path: Path, parsed: argparse.Namespace) -> int:
    """Starts the cluster, and waits until a signal or `torchways down` ends it."""
    from torchways.launch.embedded import start_cluster
    from torchways.signals import Interrupted

    _raise_on_signals()
    cluster = None
    try:
        cluster = start_cluster(config, state=path)
        _announce(cluster, config, path, parsed)
        code = cluster.wait()
    except Interrupted as interrupted:
        return 0 if cluster is not None else 128 + interrupted.number
    finally:
        _ignore_signals()
        if cluster is not None:
            cluster.close()
    if code != 0:
        raise ClusterLost(f"the cluster ended by itself (its node agent with code {code}); its log says why")
    print("the cluster was ended", file=sys.stderr)
    return 0


def _raise_on_signals() -> None:
    from torchways.signals import raise_interrupted

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` sets it
            signal.signal(number, raise_interrupted)


def _ignore_signals() -> None:
    """Ending a cluster takes seconds, and must not be left half done."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _wait_schedulers(cluster: EmbeddedCluster, config: ClusterConfig) -> None:
    """Waits until all islands have their schedulers: slices can be asked for before, and are then ready later."""
    from torchways.rpc.operator import OperatorAccess, ask

    deadline = time.monotonic() + config.start_timeout.total_seconds()
    logs = f"see the logs in {config.log_dir}" if config.log_dir else "its processes say why"
    ended = f"the cluster ended while its schedulers started: {logs}"
    while True:
        try:
            found = ask(OperatorAccess(cluster.address, cluster.token), lambda client: client.observe())
            if sum(bool(island.scheduler_address) for island in found.cluster.islands) == config.islands:
                return
        except ClusterLost as error:
            raise ClusterLost(ended) from error
        except DeadlineExceeded:
            pass  # a busy machine
        if not cluster.lives():
            raise ClusterLost(ended)
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"not all schedulers were ready in {config.start_timeout}: {logs}")
        time.sleep(_POLL_SECONDS)


def _announce(cluster: EmbeddedCluster, config: ClusterConfig, path: Path, parsed: argparse.Namespace) -> None:
    _wait_schedulers(cluster, config)
    if parsed.token_file:
        from torchways.launch.state_file import write_token

        write_token(Path(parsed.token_file), cluster.token)
    facts = {
        "address": cluster.address,
        "pid": cluster.agent_pid,
        "state": str(path),
        "log_dir": config.log_dir or "",
        "metrics_address": cluster.metrics_address,
    }
    if parsed.json:
        print(json.dumps(facts), flush=True)
        return
    size = f"{config.islands} x {config.devices_per_island} {config.platform} devices"
    lines = [f"cluster of {size} at {cluster.address}", f"  token    in {path}, for you alone (mode 600)"]
    if parsed.token_file:
        lines.append(f"  token    in {parsed.token_file}, without the operator's secret")
    if config.log_dir:
        lines.append(f"  logs     in {config.log_dir}")
    if cluster.metrics_address:
        page = f"http://{cluster.metrics_address}/"
        lines.append(f"  page     at {page} (log in with the operator's secret or the token)")
        lines.append(f"  metrics  at {page}metrics (header Authorization: Bearer TOKEN)")
    lines.append(f'  join     tw.init("{cluster.address}"), or twrun --address {cluster.address} script.py')
    lines.append(f"  end      torchways down{state_flag(parsed)}{'' if parsed.detach else ', or Ctrl-C'}")
    print("\n".join(lines), flush=True)
