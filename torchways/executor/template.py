"""`python -m torchways.executor.template`: a process that has imported what executors need, and forks them.

To import PyTorch and torch-xla takes seconds, a fork some milliseconds, and what was imported is shared memory. The
node agent asks over a socket (launch/template.py). An executor becomes the agent's child, not this process's: it is
forked twice, and the process between ends at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from typing import Any

import torchways.runtime.xla  # noqa: F401  (what takes long; it opens no device)
from torchways.executor.server import main as executor_main
from torchways.observability.process import setup_process

_MAX_MESSAGE = 1 << 20
_ADOPTION_SECONDS = 10.0


def main() -> None:
    """Entry point; forks an executor for each request until the agent closes the socket."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--agent-pid", type=int, required=True)
    arguments = parser.parse_args()
    setup_process("executor template")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # a collection in an executor would copy the pages of all that was imported
    with socket.socket(fileno=arguments.socket_fd) as connection:
        while True:
            data, fds, _, _ = socket.recv_fds(connection, _MAX_MESSAGE, 2)
            if not data:
                return
            pid = _fork_twice(connection, json.loads(data), fds, arguments.agent_pid)
            for fd in fds:
                os.close(fd)
            connection.send(json.dumps({"pid": pid}).encode())


def _fork_twice(connection: socket.socket, request: dict[str, Any], fds: list[int], agent_pid: int) -> int:
    """Forks an executor; returns its pid."""
    read, write = os.pipe()
    # Python 3.12 and later warn of forks beside threads. Those here are of libraries that expect it: none holds a lock
    # while this process waits for a request.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    between = os.fork()
    if between == 0:
        executor = os.fork()
        if executor == 0:
            os.close(read)
            os.close(write)
            connection.close()
            _become_executor(request, fds, agent_pid)
        os.write(write, str(executor).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(between, 0)
    pid = int(os.read(read, 64))
    os.close(read)
    return pid


def _become_executor(request: dict[str, Any], fds: list[int], agent_pid: int) -> None:
    """Runs an executor in this process, which has just been forked; does not return."""
    try:
        deadline = time.monotonic() + _ADOPTION_SECONDS
        while os.getppid() != agent_pid:  # until the process between has ended
            if time.monotonic() > deadline:
                os._exit(1)
            time.sleep(0.001)
        ready_fd, output_fd = fds
        nothing = os.open(os.devnull, os.O_RDWR)
        for source, target in ((nothing, 0), (nothing, 1), (output_fd, 2)):
            os.dup2(source, target)
        os.close(nothing)
        os.close(output_fd)
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None
        sys.argv = ["executor", *request["flags"], "--ready-fd", str(ready_fd), "--parent-pid", str(agent_pid)]
        executor_main()
        os._exit(0)
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


if __name__ == "__main__":
    main()
