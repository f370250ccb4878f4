"""Executors as forks of a process that has imported what they need (executor/template.py); the node agent's side.

The agent is the reaper of what its descendants leave behind (PR_SET_CHILD_SUBREAPER), so that executors are its own
children: it sees how they end, and they die with it. Linux only; elsewhere executors are started as other processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

from torchways.launch.script import bound_command
from torchways.observability.process import adopt_orphans

#: Longest wait for a fork, with the imports before the first.
_FORK_SECONDS = 120.0


class Forked:
    """A process that is ours without `subprocess` having started it; what `Child` uses of a Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Returns its exit code, negative for a signal, or None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self) -> int:
        """Waits for its end; returns its exit code, negative for a signal."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def send_signal(self, number: int) -> None:
        """Sends a signal, if it has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Template:
    """A process that forks executors.

    Args:
        environment: that it imports in; an executor has its own.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        adopt_orphans()
        self._environment = environment
        self._one_at_a_time = asyncio.Lock()
        self._start()

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        command = [sys.executable, "-m", "torchways.executor.template"]
        flags = ["--socket-fd", str(theirs.fileno()), "--agent-pid", str(os.getpid())]
        with theirs:
            self._process = subprocess.Popen(
                bound_command([*command, *flags]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=self._environment,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_forking(self) -> bool:
        """Whether there may be an executor that `fork` has not returned yet."""
        return self._one_at_a_time.locked()

    async def fork(self, flags: list[str], environment: dict[str, str], fds: list[int]) -> Forked:
        """Forks an executor.

        Args:
            flags: its command line.
            environment: its whole environment.
            fds: for its ready line, and for what it writes to stderr.

        Raises:
            OSError: the template has died, or does not answer.
        """
        async with self._one_at_a_time:
            if self._process.poll() is not None:
                self._socket.close()
                self._start()
            message = json.dumps({"flags": flags, "environment": environment}).encode()
            socket.send_fds(self._socket, [message], fds)
            try:
                receiving = asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
                answer = await asyncio.wait_for(receiving, _FORK_SECONDS)
            except TimeoutError:
                self._process.kill()
                raise TimeoutError(f"the executor template did not answer in {_FORK_SECONDS:g} s") from None
            if not answer:
                raise ConnectionResetError(f"the executor template ended with code {self._process.wait()}")
            return Forked(int(json.loads(answer)["pid"]))

    def end(self) -> None:
        """Ends the template; its executors go on."""
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def can_fork() -> bool:
    """Whether this system has what a template needs."""
    return sys.platform == "linux" and hasattr(os, "pidfd_open")
