"""Slices with real executors: they start, die and end with their slice, client and agent."""

import asyncio
import contextlib
import os
import shutil
from datetime import timedelta

import psutil
import pytest

from tests.cluster.test_launch import assert_gone, family, named, wait_for
from torchways.config import ClusterConfig
from torchways.errors import ExecutorLost, PlacementError, ResourceExhausted
from torchways.launch import embedded
from torchways.launch.child import Child, launch_command
from torchways.rpc import channel, identity
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.clients import ManagerClient

_START = timedelta(seconds=90)


@pytest.fixture
def cluster():
    running = embedded.start_cluster(ClusterConfig(islands=1, devices_per_island=2, executor_idle=timedelta(seconds=1)))
    yield running
    processes = family(running.agent_pid)
    running.close()
    assert_gone(processes, 2)


@contextlib.asynccontextmanager
async def attached(cluster):
    """A client; yields it and the stream of what it is told."""
    client = ManagerClient(cluster.address, cluster.token)
    async with channel.open_channel(cluster.address) as opened:
        stub = pb_grpc.ResourceManagerStub(opened)
        told = stub.Attach(pb.AttachRequest(name="a test"), metadata=identity.metadata(cluster.token))
        attached = (await told.read()).attached
        client.client_id = attached.client_id
        me = identity.Caller(identity.Role.CLIENT, attached.client_id)
        client.metadata = identity.metadata(cluster.token, me, attached.secret)
        yield client, told
    await client.close()


def test_a_slice_starts_is_lost_with_its_executor_and_an_idle_executor_ends(cluster):
    async def call():
        async with attached(cluster) as (client, told):
            with pytest.raises(ResourceExhausted, match="needs 4 devices of one island; island 0 has 2"):
                await client.reserve_slice((4,), ("dp",), None)
            with pytest.raises(PlacementError, match="there is no island 3"):
                await client.reserve_slice((1,), ("dp",), 3)
            slice_id, island = await client.reserve_slice((2,), ("dp",), None)
            assert (slice_id, island) == (1, 0)
            address = await client.wait_slice(slice_id, _START)
            (executor,) = address.executors
            assert executor.executor_id == "i0.e1"
            assert "aten::mm" in {name.partition(".")[0] for name in executor.lowered_ops}
            process = named(cluster.agent_pid, "executor i0.e1")
            assert process.pid == executor.pid

            process.kill()
            lost = (await asyncio.wait_for(told.read(), 10)).executor_lost
            assert (lost.executor_id, lost.slice_id) == ("i0.e1", 1)
            assert lost.reason == f"process {process.pid} ended by signal 9 (SIGKILL)"
            with pytest.raises(ExecutorLost, match=r"executor i0\.e1 is lost: process \d+ ended by signal 9"):
                await client.wait_slice(slice_id, _START)

            others = set(family(cluster.agent_pid)) - {process}
            await client.reserve_slice((1,), ("dp",), None)
            (second,) = set(await _members(cluster, 5)) - others
        assert_gone([second], 10)  # its client is gone

    asyncio.run(call())


def test_a_lost_executor_is_reported_to_all_who_share_it(cluster):
    async def call():
        async with attached(cluster) as (one, told_one), attached(cluster) as (two, told_two):
            slices = [await one.reserve_slice((2,), ("dp",), None), await two.reserve_slice((2, 1), ("x", "y"), None)]
            found = [await client.wait_slice(s, _START) for client, (s, _) in zip((one, two), slices, strict=True)]
            assert found[0].executors == found[1].executors
            [executor] = found[0].executors
            named(cluster.agent_pid, f"executor {executor.executor_id}").kill()
            for told, (slice_id, _) in zip((told_one, told_two), slices, strict=True):
                lost = (await asyncio.wait_for(told.read(), 10)).executor_lost
                assert (lost.executor_id, lost.slice_id) == (executor.executor_id, slice_id)

    asyncio.run(call())


async def _members(cluster, count):
    return await asyncio.to_thread(
        wait_for, lambda: len(members := family(cluster.agent_pid)) == count and members, f"{count} processes"
    )


def test_executors_that_still_start_die_with_a_killed_agent():
    running = embedded.start_cluster(ClusterConfig(islands=1, devices_per_island=2))

    async def call():
        async with attached(running) as (client, _):
            named(running.agent_pid, "scheduler i0")
            await client.reserve_slice((1,), ("dp",), None)
            await client.reserve_slice((1,), ("dp",), None)
            await _members(running, 4)  # with the template that is to fork them
            await asyncio.sleep(0.3)  # in the middle of its imports
            processes = family(running.agent_pid)
            assert len(processes) == 4
            processes[0].kill()
            await asyncio.to_thread(assert_gone, processes, 2)

    asyncio.run(call())
    running.close()


def test_an_executor_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "torch_xla.py").write_text("raise ImportError('no such library today')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    running = embedded.start_cluster(ClusterConfig(islands=1, devices_per_island=1))

    async def call():
        async with attached(running) as (client, _):
            slice_id, _ = await client.reserve_slice((1,), ("dp",), None)
            with pytest.raises(ExecutorLost, match=r"(?s)ended by exit code 1; the last lines.*no such library today"):
                await client.wait_slice(slice_id, _START)

    try:
        asyncio.run(call())
    finally:
        running.close()


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """Where a cluster has its temporary files; asked for before `cluster`."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_process_that_cannot_be_started_is_lost_to_who_asked_for_it_alone(temporary, cluster):
    named(cluster.agent_pid, "scheduler i0")
    (folder,) = temporary.glob("torchways-*")
    shutil.rmtree(folder)

    async def call():
        async with attached(cluster) as (client, told):
            folder.write_text("in the way")
            slice_id, _ = await client.reserve_slice((1,), ("dp",), None)
            with pytest.raises(ExecutorLost, match=r"executor i0\.e1 is lost: it could not be started: .*FileExists"):
                await client.wait_slice(slice_id, _START)
            assert (await asyncio.wait_for(told.read(), 10)).executor_lost.executor_id == "i0.e1"
            folder.unlink()  # as a clean-up of /tmp leaves it
            slice_id, _ = await client.reserve_slice((1,), ("dp",), None)
            await client.wait_slice(slice_id, _START)

    asyncio.run(call())
    assert cluster.lives()


_LEAVES_AN_ORPHAN = """
import os, pathlib, subprocess
from torchways.island.policy import FirstComeFirstServed
subprocess.run(["sh", "-c", "sleep 0.2 & echo $! > orphan-$PPID"], cwd=os.path.dirname(__file__))
Mine = FirstComeFirstServed
"""


def test_the_agent_reaps_what_its_processes_leave_behind(tmp_path, monkeypatch):
    (tmp_path / "orphaning.py").write_text(_LEAVES_AN_ORPHAN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    running = embedded.start_cluster(ClusterConfig(islands=1, devices_per_island=1, policy="orphaning:Mine"))
    scheduler = named(running.agent_pid, "scheduler i0")
    file = tmp_path / f"orphan-{scheduler.pid}"
    pid = int(wait_for(lambda: file.exists() and file.read_text(), "the orphan"))
    wait_for(lambda: not psutil.pid_exists(pid), "the end of the orphan")
    assert scheduler.is_running()  # and the others are as they were
    running.close()


def test_a_process_that_a_signal_without_a_name_ended_is_reported_too():
    async def call():
        launch = launch_command(["sh", "-c", "kill -s 40 $$"], dict(os.environ))  # one of the real-time signals
        child = await Child.start("a test", launch, None)
        return await child.wait()

    assert asyncio.run(call()) == "signal 40"
