"""The node agent: starts, watches and ends the torchways processes of one machine.

It lives as long as its stdin is open: the pipe is held by whoever started it (a controller or twrun), so that a
controller that is killed takes its cluster along. Its children die with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from torchways.launch.environment import executor_environment
from torchways.observability.process import setup_process
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

_TAIL_LINES = 40
_TERM_SECONDS = 2.0
_READY_SECONDS = 120.0


@dataclass(slots=True)
class _Child:
    """A process that this agent started."""

    name: str
    process: asyncio.subprocess.Process
    tail: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_TAIL_LINES))
    #: It was told to end.
    ending: bool = False


class NodeAgent:
    """See the module's docstring."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._children: dict[str, _Child] = {}
        self._outgoing: asyncio.Queue[pb.NodeEvent] = asyncio.Queue()
        self._over = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Runs until the owner is gone or the cluster cannot go on; then ends all children."""
        self._start(self._watch_owner(), "watch the owner")
        self._start(self._join(), "join")
        await self._over.wait()
        await asyncio.gather(*(self._end(child) for child in list(self._children.values())))

    def _start(self, coroutine, name: str) -> None:  # type: ignore[no-untyped-def]
        async def run() -> None:
            try:
                await coroutine
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception("%s failed; ending the cluster", name)
                self._over.set()

        task = asyncio.create_task(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch_owner(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.read()
        logger.info("the owner is gone")
        self._over.set()

    # ---- the resource manager

    async def _join(self) -> None:
        address = self._arguments.join
        if address is None:
            address = (await self._spawn("resource manager", "torchways.cluster", [], dict(os.environ)))["address"]
        stub = pb_grpc.ResourceManagerStub(channel.open_channel(address))
        joined = pb.NodeJoined(
            host=socket.gethostname(),
            pid=os.getpid(),
            platform=self._arguments.platform,
            devices_per_island=[self._arguments.devices_per_island] * self._arguments.islands,
        )
        self._outgoing.put_nowait(pb.NodeEvent(joined=joined))
        stream = stub.JoinNode(self._events(), metadata=channel.metadata(channel.cluster_token()))
        reason = "it closed the stream"
        try:
            async for command in stream:
                self._obey(command, address)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        if not self._over.is_set():
            logger.error("the resource manager at %s is gone (%s); ending the cluster", address, reason)
            self._over.set()

    async def _events(self) -> AsyncIterator[pb.NodeEvent]:
        while True:
            yield await self._outgoing.get()

    def _obey(self, command: pb.NodeCommand, address: str) -> None:
        match command.WhichOneof("command"):
            case "accepted":
                with os.fdopen(self._arguments.ready_fd, "w") as pipe:
                    pipe.write(json.dumps({"address": address}) + "\n")
            case "start_scheduler":
                self._start(self._start_scheduler(command.start_scheduler), command.start_scheduler.name)
            case "start_executor":
                self._start(self._start_executor(command.start_executor), command.start_executor.name)
            case "end_process":
                child = self._children.get(command.end_process.name)
                if child is not None:
                    self._start(self._end(child), f"end {child.name}")

    # ---- children

    async def _start_scheduler(self, order: pb.StartScheduler) -> None:
        flags = ["--island-id", str(order.island_id)]
        ready = await self._spawn(order.name, "torchways.island", flags, dict(os.environ))
        if ready:
            scheduler = pb.SchedulerReady(address=ready["address"])
            self._report_ready(order.name, pb.ProcessReady(scheduler=scheduler))

    async def _start_executor(self, order: pb.StartExecutor) -> None:
        flags = [
            *("--executor-id", order.executor_id),
            *("--slice-id", str(order.slice_id)),
            *("--shape", ",".join(map(str, order.shape))),
            *("--axis-names", ",".join(order.axis_names)),
            *("--platform", self._arguments.platform),
        ]
        environment = executor_environment(self._arguments.platform, order.device_indices, os.environ)
        ready = await self._spawn(order.name, "torchways.executor", flags, environment)
        if ready:
            self._report_ready(order.name, pb.ProcessReady(executor=pb.ExecutorInfo(**ready)))

    def _report_ready(self, name: str, ready: pb.ProcessReady) -> None:
        ready.name, ready.pid = name, self._children[name].process.pid
        self._outgoing.put_nowait(pb.NodeEvent(ready=ready))

    async def _spawn(self, name: str, module: str, flags: list[str], environment: dict[str, str]) -> dict[str, Any]:
        """Starts a child and waits for its ready line; returns an empty dict if it ended before."""
        read_fd, write_fd = os.pipe()
        host = self._arguments.host
        common = ["--ready-fd", str(write_fd), "--host", host, "--parent-pid", str(os.getpid())]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *common, *flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,  # gloo and others chat there; logs and errors go to stderr
            stderr=asyncio.subprocess.PIPE,
            pass_fds=(write_fd,),
            env=environment,
        )
        os.close(write_fd)
        child = self._children[name] = _Child(name, process)
        self._start(self._watch(child), f"watch {name}")
        reader = asyncio.StreamReader(limit=1 << 24)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb")
        )
        try:
            line = await asyncio.wait_for(reader.readline(), _READY_SECONDS)
        except TimeoutError:
            logger.error("%s was not ready in %g s; ending it", name, _READY_SECONDS)
            await self._end(child, asked=False)
            line = b""
        finally:
            transport.close()
        return dict(json.loads(line)) if line else {}

    async def _watch(self, child: _Child) -> None:
        """Passes on what a child prints; reports its end, and ends the cluster if it was the resource manager."""
        log = self._log_file(child.name)
        assert child.process.stderr is not None
        while line := await child.process.stderr.readline():
            text = line.decode(errors="replace")
            child.tail.append(text)
            print(text, end="", file=log or sys.stderr, flush=True)
        code = await child.process.wait()
        if log is not None:
            log.close()
        self._children.pop(child.name, None)
        if child.ending or self._over.is_set():
            return
        reason = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        logger.warning("%s (pid %d) ended: %s", child.name, child.process.pid, reason)
        exited = pb.ProcessExited(name=child.name, pid=child.process.pid, reason=reason, log_tail="".join(child.tail))
        self._outgoing.put_nowait(pb.NodeEvent(exited=exited))
        if child.name == "resource manager":
            self._over.set()

    def _log_file(self, name: str) -> Any:
        if self._arguments.log_dir is None:
            return None
        folder = Path(self._arguments.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / f"{name.replace(' ', '_')}.log").open("a")

    async def _end(self, child: _Child, *, asked: bool = True) -> None:
        child.ending = asked
        for send, seconds in ((child.process.terminate, _TERM_SECONDS), (child.process.kill, _TERM_SECONDS)):
            try:
                send()
                await asyncio.wait_for(child.process.wait(), seconds)
                return
            except ProcessLookupError:
                return
            except TimeoutError:
                logger.warning("%s does not end", child.name)


def main() -> None:
    """Entry point of `python -m torchways.launch`."""
    parser = argparse.ArgumentParser(description="Node agent: runs the torchways processes of this machine.")
    parser.add_argument("--join", help="resource manager to join; without it this node is the head and starts one")
    parser.add_argument("--islands", type=int, default=1)
    parser.add_argument("--devices-per-island", type=int, default=1)
    parser.add_argument("--platform", default="cpu")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--log-dir")
    parser.add_argument("--ready-fd", type=int, required=True)
    arguments = parser.parse_args()
    setup_process("node agent")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(NodeAgent(arguments).run())
    os._exit(0)  # nothing of ours is left; do not wait for gRPC's threads
