"""Starts a cluster on this machine: one of this process's own, or one that stays (`torchways up --detach`)."""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from torchways.config import ClusterConfig
from torchways.errors import ClusterLost, ConfigError, DeadlineExceeded
from torchways.launch.flags import flags
from torchways.observability.process import LOG_FORMAT_VARIABLE, LOG_LEVEL_VARIABLE
from torchways.rpc.channel import TOKEN_VARIABLE

logger = logging.getLogger(__name__)

_END_SECONDS = 8.0


class EmbeddedCluster:
    """A running cluster; it ends with `close`, or with this process, however that ends.

    Attributes:
        address: the resource manager's host:port.
        token: what its callers must show.
        metrics_address: host:port of the page /metrics; empty if there is none.
    """

    def __init__(self, agent: subprocess.Popen[bytes], address: str, token: str, metrics_address: str = "") -> None:
        self._agent = agent
        self.address = address
        self.token = token
        self.metrics_address = metrics_address

    @property
    def agent_pid(self) -> int:
        """Pid of the node agent, the parent of all other processes of the cluster."""
        return self._agent.pid

    def lives(self) -> bool:
        """Whether it has not ended."""
        return self._agent.poll() is None

    def wait(self) -> int:
        """Waits until the cluster has ended by itself, or by `torchways down`; returns 0 if it was told to."""
        return self._agent.wait()

    def close(self) -> None:
        """Ends all processes of the cluster and waits until they are gone. Idempotent."""
        end_agent(self._agent)


def end_agent(agent: subprocess.Popen[bytes]) -> None:
    """Ends a node agent by closing its stdin; kills it if that does not help (its children die with it)."""
    if agent.stdin is not None and not agent.stdin.closed:
        agent.stdin.close()
    try:
        agent.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("the node agent (pid %d) does not end; killing it", agent.pid)
        agent.kill()
        agent.wait(_END_SECONDS)


def start_cluster(config: ClusterConfig, *, state: Path | None = None, stays: bool = False) -> EmbeddedCluster:
    """Starts the processes of a cluster on this machine; returns when slices can be asked for.

    Args:
        config: its size and limits.
        state: its state file (launch/state_file.py), if it shall have one.
        stays: it does not end with this process, but by SIGTERM to its node agent alone. It then needs
            `config.log_dir`: its node agent logs there, too.

    Raises:
        DeadlineExceeded: it was not ready in `config.start_timeout`.
        ClusterLost: it ended while starting.
        ConfigError: nothing can be logged in `config.log_dir`.
    """
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_hex(16)
    environment = {**os.environ, TOKEN_VARIABLE: token, LOG_LEVEL_VARIABLE: config.log_level}
    if config.log_format is not None:
        environment[LOG_FORMAT_VARIABLE] = config.log_format
    read_fd, write_fd = os.pipe()
    command = [
        *(sys.executable, "-m", "torchways.launch"),
        *flags(config),
        *("--ready-fd", str(write_fd)),
        *(("--stays",) if stays else ("--owner-pid", str(os.getpid()))),
        *(("--state", str(state)) if state is not None else ()),
    ]
    # A session of its own: Ctrl-C reaches the controller alone, which then ends the cluster in good order.
    try:
        with _output(config.log_dir, has_log=stays) as output:
            agent = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if stays else subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(write_fd,),
                env=environment,
                start_new_session=True,
            )
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    try:
        ready = json.loads(_read_line(read_fd, time.monotonic() + config.start_timeout.total_seconds()))
        if "error" in ready:
            raise ClusterLost(f"the cluster could not start: {ready['error']}")
    except BaseException:
        if stays:
            agent.terminate()
        end_agent(agent)
        raise
    finally:
        os.close(read_fd)
    return EmbeddedCluster(agent, ready["address"], token, ready.get("metrics_address", ""))


@contextmanager
def _output(log_dir: str | None, *, has_log: bool) -> Iterator[IO[bytes] | None]:
    """Makes the folder for logs; gives the node agent's log there if it has one; None: it has our output."""
    if log_dir is None:
        yield None
        return
    folder = Path(log_dir)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (folder / "node_agent.log").open("ab") if has_log else None
    except OSError as error:
        raise ConfigError(f"cannot log to the folder {log_dir}: {error.strerror}; choose another log_dir") from error
    if file is None:
        yield None
        return
    with file:
        yield file


def _read_line(fd: int, deadline: float) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the cluster was not ready in time; raise start_timeout, or see its log")
        if select.select([fd], [], [], min(left, 1.0))[0]:
            part = os.read(fd, 65536)
            if not part:
                raise ClusterLost("the cluster ended while it was starting; what it printed says why")
            data += part
    return data
