"""The node agent: starts, watches and ends the torchways processes of one machine.

It lives as long as its stdin is open and its owner lives: the pipe is held by whoever started it (a controller or
twrun), so that a controller that is killed takes its cluster along. With --stays it has no owner, and lives until
SIGTERM. Its children die with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from torchways.errors import ClusterLost, TorchwaysError
from torchways.ids import ClientId
from torchways.launch.child import Child, Process, end_group, launch_command, reap_others
from torchways.launch.environment import executor_environment, tpu_addresses
from torchways.launch.flags import parser
from torchways.launch.stacks import dumped_stacks
from torchways.launch.state_file import ClusterState, HeldStateFile, hold
from torchways.launch.template import Template, can_fork
from torchways.observability.process import setup_process
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import (
    CLIENT_SECRET_VARIABLE,
    CLUSTER_KEY_VARIABLE,
    Caller,
    Role,
    metadata,
    new_cluster_key,
    take_cluster_key,
)
from torchways.runtime.device_simulator import SECRET_VARIABLE

logger = logging.getLogger(__name__)

_MANAGER = "resource manager"
_READY_SECONDS = 120.0


class NodeAgent:
    """See the module's docstring."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        #: A node that joins a cluster must have been given its key; the head makes it.
        is_given = arguments.join or CLUSTER_KEY_VARIABLE in os.environ
        self._key = take_cluster_key() if is_given else new_cluster_key()
        self._children: dict[str, Child] = {}
        self._outgoing: asyncio.Queue[pb.NodeEvent] = asyncio.Queue()
        #: The devices (island, number) that executors were started for.
        self._devices_of: dict[str, set[tuple[int, int]]] = {}
        #: Pids of data processes, each of which leads a process group: its workers.
        self._groups: set[int] = set()
        #: Names of children that are not there yet.
        self._starting: set[str] = set()
        self._over = asyncio.Event()
        #: The cluster could not go on.
        self.failed = False
        self._state: HeldStateFile | None = None
        self._metrics_address = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready_fd: int | None = arguments.ready_fd
        #: Address of each island's simulated devices, once they are there.
        self._simulators: dict[int, asyncio.Future[str]] = {}
        #: Forks executors, where the system can.
        self._template: Template | None = None
        #: Libraries make folders for temporary files when they are imported, and leave them where a process is killed.
        self._folder = tempfile.mkdtemp(prefix="torchways-")
        #: What a child wrote last that ended while it was starting.
        self._last_words = ""

    async def run(self) -> None:
        """Runs until the owner is gone or the cluster cannot go on; then ends all children."""
        try:
            if self._arguments.state is not None:
                self._state = hold(Path(self._arguments.state))
                self._state.write(ClusterState(pid=os.getpid()))
            await self._run()
        except TorchwaysError as error:
            self._give_up(str(error))
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
            if self._state is not None:
                self._state.remove()  # the last thing: that the file is held says that the cluster lives

    async def _run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._over.set)
        if not self._arguments.stays:
            self._start(self._watch_owner(), "watching the owner")
        if self._arguments.owner_pid is not None:
            self._watch_owner_pid(self._arguments.owner_pid)
        if can_fork():
            environment = executor_environment(self._arguments.platform, [0], os.environ)
            self._template = Template({**environment, "TMPDIR": self._new_folder()})
            asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap_orphans)
        self._start(self._join(), "joining the cluster")
        await self._over.wait()
        self._answer({"error": "the node agent was told to end"})
        if self._template is not None:
            self._template.end()
        await asyncio.gather(*(child.end() for child in self._children.values()))

    def _start(
        self, coroutine: Coroutine[Any, Any, None], name: str, on_failure: Callable[[str], None] | None = None
    ) -> None:
        """Starts a task.

        Args:
            on_failure: takes why it failed; by default the cluster cannot go on without it.
        """
        on_failure = on_failure or self._give_up

        async def run() -> None:
            try:
                await coroutine
            except TorchwaysError as error:
                on_failure(str(error))
            except Exception as error:
                logger.exception("%s failed", name)
                on_failure(f"{name} failed: {error!r}")

        task = asyncio.create_task(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _give_up(self, reason: str) -> None:
        """Ends the cluster, telling the owner why if it still waits for the start."""
        if not self._over.is_set():
            logger.error("ending the cluster: %s", reason)
            self.failed = True
            self._answer({"error": reason})
            self._over.set()

    def _answer(self, message: dict[str, str]) -> None:
        """Writes the ready line, once."""
        fd, self._ready_fd = self._ready_fd, None
        if fd is not None:
            try:
                with os.fdopen(fd, "w") as pipe:
                    pipe.write(json.dumps(message) + "\n")
            except BrokenPipeError:
                logger.info("nobody waits for the cluster any more; ending it")
                self._over.set()

    # ---- the owner

    async def _watch_owner(self) -> None:
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while await reader.read(4096):
            pass
        logger.info("the owner has closed our stdin; ending the cluster")
        self._over.set()

    def _watch_owner_pid(self, pid: int) -> None:
        """Notices the owner's end also where a process that it forked still holds our stdin open."""
        if not hasattr(os, "pidfd_open"):
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._over.set()
            return
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(fd)
            logger.info("the owner (pid %d) is gone; ending the cluster", pid)
            self._over.set()

        loop.add_reader(fd, gone)

    # ---- the resource manager

    async def _join(self) -> None:
        address = self._arguments.join or await self._start_manager()
        stub = pb_grpc.ResourceManagerStub(channel.open_channel(address))
        joined = pb.NodeJoined(
            host=socket.gethostname(),
            pid=os.getpid(),
            platform=self._arguments.platform,
            devices_per_island=[self._arguments.devices_per_island] * self._arguments.islands,
            hosts_per_island=self._arguments.hosts_per_island,
            has_data_processes=self._arguments.data_path is not None,
        )
        self._outgoing.put_nowait(pb.NodeEvent(joined=joined))
        me = Caller(Role.NODE)
        stream = stub.JoinNode(self._events(), metadata=metadata(channel.cluster_token(), me, self._key.secret_of(me)))
        reason = "it closed the stream"
        try:
            async for command in stream:
                self._obey(command, address)
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        if _MANAGER in self._children:  # ours: how its process ended says more
            await asyncio.sleep(0.5)
        self._give_up(f"the resource manager at {address} is gone ({reason})")

    async def _start_manager(self) -> str:
        flags = ["--executor-idle", str(self._arguments.executor_idle)]
        flags += ["--max-weight", str(self._arguments.max_weight), "--max-priority", str(self._arguments.max_priority)]
        if self._arguments.metrics_port is not None:
            flags += ["--metrics-port", str(self._arguments.metrics_port)]
        ready = await self._spawn(_MANAGER, "torchways.cluster", flags, dict(os.environ))
        if ready is None:
            raise ClusterLost(f"the resource manager ended while it was starting: {self._last_words}")
        if "error" in ready:
            raise ClusterLost(str(ready["error"]))
        self._metrics_address = str(ready["metrics_address"])
        return str(ready["address"])

    async def _events(self) -> AsyncIterator[pb.NodeEvent]:
        while True:
            yield await self._outgoing.get()

    def _obey(self, command: pb.NodeCommand, address: str) -> None:
        match command.WhichOneof("command"):
            case "accepted":
                logger.info("joined %s as islands %s", address, list(command.accepted.island_ids))
                self._write_state(address)
                self._answer({"address": address, "metrics_address": self._metrics_address})
            case "start_scheduler":
                self._start(self._start_scheduler(command.start_scheduler, address), command.start_scheduler.name)
            case "start_executor":
                name = command.start_executor.name
                self._start(self._start_executor(command.start_executor), name, partial(self._report_failed, name))
            case "start_data":
                name = command.start_data.name
                self._start(self._start_data(command.start_data), name, partial(self._report_failed, name))
            case "dump_stacks":
                self._start(self._dump_stacks(command.dump_stacks), "printing stacks", logger.error)
            case "end_process":
                child = self._children.get(command.end_process.name)
                self._starting.discard(command.end_process.name)
                if child is not None:
                    self._start(child.end(), f"ending {child.name}")

    def _write_state(self, address: str) -> None:
        if self._state is not None:
            state = ClusterState(
                pid=os.getpid(),
                address=address,
                token=channel.cluster_token(),
                operator_secret=self._key.secret_of(Caller(Role.OPERATOR)),
                log_dir=self._arguments.log_dir or "",
                metrics_address=self._metrics_address,
            )
            self._state.write(state)

    # ---- children

    async def _start_scheduler(self, order: pb.StartScheduler, manager: str) -> None:
        if self._arguments.platform == "simulated":
            await self._start_simulator(order.island_id)
        flags = ["--island-id", str(order.island_id), "--manager", manager]
        flags += ["--policy", self._arguments.policy, "--window", str(self._arguments.window)]
        ready = await self._spawn(order.name, "torchways.island", flags, dict(os.environ))
        if ready is not None:
            scheduler = pb.SchedulerReady(address=ready["address"])
            self._report_ready(order.name, pb.ProcessReady(scheduler=scheduler))

    async def _start_simulator(self, island_id: int) -> None:
        self._simulators[island_id] = asyncio.get_running_loop().create_future()
        name = f"device simulator i{island_id}"
        environment = {**os.environ, **self._simulator_secret()}
        ready = await self._spawn(name, "torchways.runtime.device_simulator", [], environment)
        if ready is None:
            raise ClusterLost(f"{name} ended while it was starting")
        self._simulators[island_id].set_result(str(ready["address"]))

    def _simulator_secret(self) -> dict[str, str]:
        return {SECRET_VARIABLE: self._key.derive("device simulator").hex()}

    async def _start_executor(self, order: pb.StartExecutor) -> None:
        flags = [
            *("--executor-id", order.executor_id),
            *("--devices", ",".join(map(str, order.device_indices))),
            *("--set-size", str(order.set_size)),
            *("--platform", self._arguments.platform),
            *("--budget-bytes", str(self._arguments.budget_bytes)),
            *("--client-bytes", str(self._arguments.client_bytes)),
            *("--client-programs", str(self._arguments.client_programs)),
            *("--memory-wait", str(self._arguments.memory_wait)),
            *("--stall-warning", str(self._arguments.stall_warning)),
        ]
        if len(order.gang) > 1 and self._arguments.scheduling == "gang":
            flags.append("--gang")
        if self._arguments.platform == "simulated":
            flags += ["--simulator", await self._simulators[order.island_id], "--num-hosts", str(len(order.gang))]
            flags += ["--set-name", order.gang[0]]
        simulator = self._simulator_secret() if self._arguments.platform == "simulated" else {}
        environment = executor_environment(
            self._arguments.platform,
            order.device_indices,
            {**os.environ, **simulator},
            num_local_devices=self._arguments.islands * self._arguments.devices_per_island,
            host_number=list(order.gang).index(order.executor_id),
            addresses=tpu_addresses(self._arguments.host, order.set_number, len(order.gang)),
        )
        await self._wait_for_devices(order)
        ready = await self._spawn(order.name, "torchways.executor", flags, environment, self._template)
        if ready is not None:
            self._report_ready(order.name, pb.ProcessReady(executor=pb.ExecutorInfo(**ready)))

    async def _start_data(self, order: pb.StartData) -> None:
        """Starts a data process: it runs code of a client's, and so has that client's identity and not our key."""
        client = Caller(Role.CLIENT, ClientId(order.client_id))
        environment = {**os.environ, CLIENT_SECRET_VARIABLE: self._key.secret_of(client)}
        paths = [self._arguments.data_path, os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        flags = ["--client-id", str(order.client_id), "--name", order.name]
        ready = await self._spawn(order.name, "torchways.data", flags, environment, has_key=False)
        if ready is not None:
            self._report_ready(order.name, pb.ProcessReady(data=pb.DataReady(address=ready["address"])))

    async def _wait_for_devices(self, order: pb.StartExecutor) -> None:
        """Waits until no executor that was told to end has any of these devices: on TPU, a process owns its chips."""
        mine = {(order.island_id, device) for device in order.device_indices}
        for child in list(self._children.values()):
            if child.asked and mine & self._devices_of.get(child.name, set()):
                logger.info("%s waits for the end of %s", order.name, child.name)
                await child.wait()
        self._devices_of[order.name] = mine

    def _report_ready(self, name: str, ready: pb.ProcessReady) -> None:
        child = self._children.get(name)
        if child is not None:
            ready.name, ready.pid = name, child.pid
            self._outgoing.put_nowait(pb.NodeEvent(ready=ready))

    def _report_failed(self, name: str, reason: str) -> None:
        """Reports a process that some client asked for and that cannot be started: it is lost to that client alone."""
        logger.error("%s could not be started: %s", name, reason)
        self._starting.discard(name)
        self._outgoing.put_nowait(pb.NodeEvent(exited=pb.ProcessExited(name=name, reason=reason)))
        if (child := self._children.get(name)) is not None:  # it runs, but not as it should
            self._start(child.end(), f"ending {name}")
        else:
            self._devices_of.pop(name, None)

    async def _spawn(
        self,
        name: str,
        module: str,
        flags: list[str],
        environment: dict[str, str],
        template: Template | None = None,
        *,
        has_key: bool = True,
    ) -> dict[str, Any] | None:
        """Starts a child and waits for its ready line; returns None if it ended, or was ended, before.

        Args:
            has_key: whether it gets the cluster's key.
        """
        if self._over.is_set():
            return None
        flags = ["--host", self._arguments.host, *flags]
        environment["TMPDIR"] = self._new_folder()
        if has_key:
            environment[CLUSTER_KEY_VARIABLE] = self._key.hex()
        launch = launch_alone = launch_command([sys.executable, "-m", module, *flags], environment)
        if template is not None:
            logger.info("waiting for the template to fork %s", name)

            async def launch(ready_fd: int, output_fd: int) -> Process:
                try:
                    return await template.fork(flags, environment, [ready_fd, output_fd])
                except OSError as error:  # the executor says itself what keeps it from starting
                    logger.warning("%s; starting %s as any other process", error, name)
                    return await launch_alone(ready_fd, output_fd)

        self._starting.add(name)
        child = self._children[name] = await Child.start(name, launch, self._arguments.log_dir)
        if not has_key:
            self._groups.add(child.pid)
        self._reap_orphans()
        self._start(self._clean_up_after(child, environment["TMPDIR"]), f"cleaning up after {name}")
        self._start(self._watch(child), f"watching {name}")
        if self._over.is_set() or name not in self._starting:  # told to end meanwhile
            await child.end()
            return None
        self._starting.discard(name)
        logger.info("waiting for %s (pid %d)", name, child.pid)
        try:
            ready = await child.wait_ready(_READY_SECONDS)
            if ready is None:
                lines = child.log_tail().strip().splitlines()
                self._last_words = lines[-1] if lines else "it wrote nothing"
            return ready
        except TimeoutError as error:
            logger.error("%s; ending it", error)
            await child.end(asked=False)
            return None

    def _new_folder(self) -> str:
        """Makes a folder for a child's temporary files."""
        os.makedirs(self._folder, mode=0o700, exist_ok=True)  # somebody may have cleaned /tmp
        return tempfile.mkdtemp(dir=self._folder)

    async def _watch(self, child: Child) -> None:
        """Waits for a child's end and reports it, if nobody asked for it."""
        reason = await child.wait()
        del self._children[child.name]
        self._devices_of.pop(child.name, None)
        if child.asked or self._over.is_set():
            return
        logger.error("%s (pid %d) ended: %s%s", child.name, child.pid, reason, self._tail_of(child))
        exited = pb.ProcessExited(name=child.name, pid=child.pid, reason=reason, log_tail=child.log_tail())
        self._outgoing.put_nowait(pb.NodeEvent(exited=exited))
        if child.name == _MANAGER:
            self._give_up(f"the resource manager ended by {reason}; the last lines that it wrote:\n{child.log_tail()}")

    async def _clean_up_after(self, child: Child, folder: str) -> None:
        await child.wait()
        shutil.rmtree(folder, ignore_errors=True)
        if child.pid in self._groups:
            self._groups.discard(child.pid)
            await end_group(child.pid)

    def _reap_orphans(self) -> None:
        """Reaps the orphans that have ended: what executors and others had started, and that became ours."""
        if self._template is not None and not self._template.is_forking:  # a fork whose pid we do not know yet is ours
            reap_others({self._template.pid, *(child.pid for child in self._children.values())})

    async def _dump_stacks(self, order: pb.DumpStacks) -> None:
        """Has processes print their stacks, all at once, and reports them."""
        async for stacks in dumped_stacks(list(self._children.values()), order.which):
            self._outgoing.put_nowait(pb.NodeEvent(stacks=pb.StacksDumped(request_id=order.request_id, stacks=stacks)))
        end = pb.StacksDumped(request_id=order.request_id, is_last=True)
        self._outgoing.put_nowait(pb.NodeEvent(stacks=end))

    def _tail_of(self, child: Child) -> str:
        """Returns the child's last lines where they went to a file, so that they are seen as well."""
        if self._arguments.log_dir is None or not child.log_tail():
            return ""
        return f"; the last lines that it wrote:\n{child.log_tail().rstrip()}"


def main() -> None:
    """Entry point of `python -m torchways.launch`."""
    arguments = parser().parse_args()
    setup_process("node agent")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    agent = NodeAgent(arguments)
    asyncio.run(agent.run())
    os._exit(1 if agent.failed else 0)  # nothing of ours is left; do not wait for gRPC's threads
