"""Processes that are stopped, as by a debugger or a freezer: their kernels go on acknowledging what is sent to them."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch

import torchways as tw
from tests.cluster.conftest import cluster_processes, wait_gone
from tests.streams import StreamEnd, calls_of, offering
from torchways.errors import ClusterLost, ExecutorLost
from torchways.rpc import channel
from torchways.rpc.identity import ClusterKey
from torchways.rpc.streams import open_offered

#: A process at the other end of two streams: one that it was offered, and one that it offers. When it is told to on the
#: first, it lets no thread run Python for some seconds, as what compiles may do, and then answers.
OTHER = """
import asyncio, ctypes, sys
from tests.cluster.test_stopped import KEY, ask_often
from tests.streams import StreamEnd, calls_of, offering
from torchways.rpc.streams import open_offered

async def run():
    end = StreamEnd()
    async with offering(KEY) as (service, address), calls_of(sys.argv[1], KEY) as call:
        await open_offered(call(), end.stream)
        print(address, flush=True)
        while True:
            await end.arrived.get()
            ctypes.PyDLL(None).sleep(8)
            end.stream.send(b"done")

ask_often(setattr)
asyncio.run(run())
"""
KEY = ClusterKey(bytes(32))


def ask_often(setattr):
    """Has pings sent more often, and waited for a shorter time."""
    for name in ("_OPTIONS", "_SERVER_OPTIONS"):
        options = {
            **dict(getattr(channel, name)),
            "grpc.keepalive_time_ms": 1_000,
            "grpc.http2.ping_timeout_ms": 5_000,
            "grpc.http2.min_ping_interval_without_data_ms": 500,
        }
        setattr(channel, name, list(options.items()))


def test_streams_are_lost_when_the_other_process_is_stopped_and_not_when_it_is_busy(monkeypatch):
    ask_often(monkeypatch.setattr)

    async def run():
        async with offering(KEY) as (service, address):
            other = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", OTHER, address),
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            try:
                offered, taken = await service.ends.get(), StreamEnd()
                theirs = (await other.stdout.readline()).decode().strip()
                async with calls_of(theirs, KEY) as call:
                    await open_offered(call(), taken.stream)
                    offered.stream.send(b"be busy")
                    assert await offered.arrived.get() == b"done"
                    assert [end.stream.is_closed for end in (offered, taken)] == [False, False]
                    other.send_signal(signal.SIGSTOP)
                    for end in (offered, taken):
                        assert (await end.lost.get()).startswith("it does not answer any more")
                    assert other.returncode is None
            finally:
                other.kill()
                await other.wait()

    asyncio.run(asyncio.wait_for(run(), 120))


def stopped(name):
    """Stops a process of the cluster; returns its pid."""
    [pid] = [pid for process, pid in tw.cluster_info().processes if process.startswith(name)]
    os.kill(pid, signal.SIGSTOP)
    return pid


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_executor_that_is_stopped_is_replaced():
    """It takes about 75 s: a process may not answer for 60 s, and then ten to end itself."""
    with tw.init():
        a, b = (tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1))
        first, second = (tw.function(lambda x: x + 1, mesh=mesh) for mesh in (a, b))
        kept = first(torch.zeros(2))
        assert second(kept).tolist() == [2, 2]
        pid = stopped("executor i0")
        begin = time.monotonic()
        ours = first(torch.zeros(2))
        theirs = second(ours)  # waits for a transfer
        for array in (kept, ours, theirs):
            with pytest.raises(ExecutorLost, match=r"executor i0\.e1"):
                array.cpu(timeout=timedelta(seconds=120))
        assert wait_gone([pid], 30) == set()
        print(f"noticed and ended after {time.monotonic() - begin:.0f} s")
        assert second(torch.zeros(2)).tolist() == [1, 1]
        again = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
        assert tw.function(lambda x: x + 1, mesh=again)(torch.zeros(2)).tolist() == [1, 1]
    assert cluster_processes() == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_scheduler_that_is_stopped_ends_the_cluster():
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        add = tw.function(lambda x: x + 1, mesh=mesh)
        assert add(torch.zeros(2)).tolist() == [1, 1]
        pids = [pid for _, pid in tw.cluster_info().processes]
        stopped("scheduler i0")
        begin = time.monotonic()
        with pytest.raises((ClusterLost, ExecutorLost)):
            add(torch.zeros(2)).cpu(timeout=timedelta(seconds=120))
        assert wait_gone(pids, 60) == set()  # without tw.shutdown()
        print(f"noticed and ended after {time.monotonic() - begin:.0f} s")
    assert cluster_processes() == []
