"""One process in a node agent's care: its start, its ready line, what it prints, and its end.

Must be used on the main thread: children die when the thread that started them ends.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import IO, Any, TypeAlias

import psutil

from torchways.launch.script import bound_command
from torchways.launch.template import Forked

logger = logging.getLogger(__name__)

_TAIL_LINES = 40
#: A longer line is passed on, and kept, in pieces.
_LINE_BYTES = 1 << 16
_TERM_SECONDS = 2.0
#: How long what a process printed last may be on its way after it has ended (a process of its own may hold the pipe).
_DRAIN_SECONDS = 0.5
#: A line of what faulthandler prints. The stacks have ended when none has come for a while.
_STACK_LINE = re.compile(r"(Current thread|Thread) 0x|  File \"|  \.\.\.|  <|  Garbage-collecting|\n")
_QUIET_SECONDS = 0.3
_MAX_STACK_LINES = 5000
#: How long what data processes leave behind is looked at, and how often.
_GROUP_SECONDS = 2.0
_GROUP_ATTEMPTS = 40


Process: TypeAlias = subprocess.Popen[bytes] | Forked
Launch: TypeAlias = Callable[[int, int], Awaitable[Process]]


def launch_command(command: list[str], environment: dict[str, str]) -> Launch:
    """Returns what starts `command`, which gets the flags ``--ready-fd`` and ``--parent-pid`` as well."""

    async def launch(ready_fd: int, output_fd: int) -> Process:
        return subprocess.Popen(  # noqa: ASYNC220 - asyncio's own would start it on another thread, with which it died
            bound_command([*command, "--ready-fd", str(ready_fd), "--parent-pid", str(os.getpid())]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # gloo and others chat there; logs and errors go to stderr
            stderr=output_fd,
            pass_fds=(ready_fd,),
            env=environment,
        )

    return launch


class Child:
    """A running process.

    Attributes:
        name: "executor i0.e1".
        asked: it was told to end.
    """

    def __init__(self, name: str, process: Process, ready_fd: int, output_fd: int, log: IO[str] | None) -> None:
        self.name = name
        self.asked = False
        self._dump: asyncio.Queue[str] | None = None
        self._one_dump = asyncio.Lock()
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._log = log
        self._process = process
        self._ready = asyncio.create_task(_read_line(ready_fd), name=f"ready line of {name}")
        self._output = asyncio.create_task(self._pass_on(output_fd), name=f"output of {name}")
        self._exited = asyncio.create_task(_wait_exit(self._process), name=f"exit of {name}")

    @classmethod
    async def start(cls, name: str, launch: Launch, log_dir: str | None) -> Child:
        """Starts a process.

        Args:
            launch: starts it, given the file descriptors for its ready line and for what it writes to stderr.
            log_dir: where that goes; None: to our stderr.
        """
        log = _log_file(log_dir, name) if log_dir is not None else None  # first: it may fail, and then nothing runs
        ready_read, ready_write = os.pipe()
        output_read, output_write = os.pipe()
        try:
            process = await launch(ready_write, output_write)
        except BaseException:
            os.close(ready_read)
            os.close(output_read)
            if log is not None:
                log.close()
            raise
        finally:
            os.close(ready_write)
            os.close(output_write)
        return cls(name, process, ready_read, output_read, log)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def wait_ready(self, seconds: float) -> dict[str, Any] | None:
        """Waits for its ready line; None if it ended before.

        Raises:
            TimeoutError: neither happened in `seconds`.
        """
        await asyncio.wait({self._ready, self._exited}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done() and not self._exited.done():
            raise TimeoutError(f"{self.name} was not ready in {seconds:g} s")
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(asyncio.shield(self._ready), _DRAIN_SECONDS)
            return dict(json.loads(line)) if line else None
        return None

    async def wait(self) -> str:
        """Waits until it has ended; returns how, "exit code 1" or "signal 9 (SIGKILL)"."""
        code = await asyncio.shield(self._exited)
        await asyncio.wait({self._output}, timeout=_DRAIN_SECONDS)
        if code >= 0:
            return f"exit code {code}"
        named = {number.value: f" ({number.name})" for number in signal.Signals}  # real-time signals have no names
        return f"signal {-code}{named.get(-code, '')}"

    async def stacks(self, seconds: float) -> str:
        """Has it print the stacks of all its threads; returns them, or nothing where it printed none in time."""
        if not self._ready.done() or self._exited.done():
            return ""  # the signal would end a process that does not expect it yet
        async with self._one_dump:
            lines: list[str] = []
            queue = self._dump = asyncio.Queue()
            try:
                self._process.send_signal(signal.SIGUSR1)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        lines.append(await queue.get())
                        while len(lines) < _MAX_STACK_LINES:
                            lines.append(await asyncio.wait_for(queue.get(), _QUIET_SECONDS))
            finally:
                self._dump = None
            return "".join(lines).strip("\n")

    async def end(self, *, asked: bool = True) -> None:
        """Ends it: SIGTERM, after two seconds SIGKILL. Idempotent."""
        self.asked = self.asked or asked
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._exited.done():
                return
            self._process.send_signal(number)
            await asyncio.wait({self._exited}, timeout=_TERM_SECONDS)
        if not self._exited.done():
            logger.error("%s (pid %d) does not end, even by SIGKILL", self.name, self.pid)

    def log_tail(self) -> str:
        """Returns the last lines that it wrote."""
        return "".join(self._tail)

    async def _pass_on(self, fd: int) -> None:
        reader = await _open_reader(fd)
        while line := await _next_line(reader):
            text = line.decode(errors="replace")
            if self._dump is not None and _STACK_LINE.match(text):
                self._dump.put_nowait(text)
                continue
            self._tail.append(text)
            with contextlib.suppress(OSError):  # the terminal or disk behind it is gone; the process is not to blame
                print(text, end="", file=self._log or sys.stderr, flush=True)
        if self._log is not None:
            self._log.close()


async def end_group(leader: int) -> None:
    """Waits for what a data process left behind: its workers, which die with it, and what they have started.

    They are our children since it ended (see launch/template.py). After a while they are killed.
    """
    for attempt in range(_GROUP_ATTEMPTS):
        try:
            while os.waitpid(-leader, os.WNOHANG)[0]:  # noqa: ASYNC222 - it does not wait
                pass
        except ChildProcessError:
            return
        if attempt >= _GROUP_ATTEMPTS // 2:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
        await asyncio.sleep(_GROUP_SECONDS / _GROUP_ATTEMPTS)
    logger.error("processes of group %d do not end, even by SIGKILL", leader)


def reap_others(pids: Collection[int]) -> None:
    """Reaps the children of this process that have ended, but for some, whose ends others wait for."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, ChildProcessError):
            if process.pid not in pids and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)


async def _wait_exit(process: Process) -> int:
    if not hasattr(os, "pidfd_open"):
        while process.poll() is None:  # noqa: ASYNC110 - no event to wait for on this platform
            await asyncio.sleep(0.05)
        return process.wait()
    fd = os.pidfd_open(process.pid)
    exited = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, exited.set)
    try:
        await exited.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    return process.wait()


async def _open_reader(fd: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=_LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0))
    return reader


async def _next_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await reader.read(error.consumed or _LINE_BYTES)


async def _read_line(fd: int) -> bytes:
    """Reads one line of any length; empty if the pipe was closed before its end."""
    reader = await _open_reader(fd)
    data = b""
    while not data.endswith(b"\n"):
        piece = await _next_line(reader)
        if not piece:
            return b""
        data += piece
    return data


def _log_file(log_dir: str, name: str) -> IO[str]:
    folder = Path(log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"{name.replace(' ', '_')}.log").open("a")
