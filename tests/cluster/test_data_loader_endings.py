"""Data processes on clusters of their own: what is lost, and what other clients may not do."""

import asyncio
import collections
import contextlib
import os
import signal
from datetime import timedelta
from types import SimpleNamespace

import grpc
import pytest

import torchways as tw
from tests.cluster.conftest import wait_gone
from tests.cluster.test_access import attacker, refused
from torchways.api import _current as current_session
from torchways.config import ClusterConfig
from torchways.errors import (
    ConfigError,
    ExecutorLost,
    SessionClosed,
)
from torchways.launch.embedded import start_cluster
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.channel import TOKEN_VARIABLE
from torchways.rpc.identity import metadata

ROWS = "tests.datasets:Rows"


def test_executors_and_sessions_that_are_lost():
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        batches = tw.data_loader(ROWS, mesh, args=[4000], batch_size=2)
        iterator = iter(batches)
        next(iterator)
        pids = dict(tw.cluster_info().processes)
        [executor] = [pid for name, pid in pids.items() if name.startswith("executor")]
        os.kill(executor, signal.SIGKILL)
        with pytest.raises(ExecutorLost, match=r"signal 9 \(SIGKILL\)"):
            collections.deque(iterator, maxlen=0)
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        batches = tw.data_loader(ROWS, mesh, args=[4000], batch_size=2, num_workers=2)
        iterator = iter(batches)
        next(iterator)
        pids = set(dict(tw.cluster_info().processes).values())
    assert wait_gone(pids) == set()
    with pytest.raises(SessionClosed, match=r"tw\.shutdown\(\)"):
        next(iterator)
    batches.close()


def test_a_standing_cluster_runs_no_code_of_clients_unless_it_is_told_to(monkeypatch):
    cluster = start_cluster(ClusterConfig(islands=1, devices_per_island=1))
    try:
        monkeypatch.setenv("TORCHWAYS_ADDRESS", cluster.address)
        monkeypatch.setenv(TOKEN_VARIABLE, cluster.token)
        with tw.init():
            mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
            with pytest.raises(ConfigError, match=r"island 0 runs no input pipelines of clients.*--data-path"):
                tw.data_loader(ROWS, mesh, args=[4])
    finally:
        cluster.close()


def test_another_client_has_no_part_in_a_data_process(monkeypatch):
    """With the cluster's token, it neither starts one on another's slice, nor calls, finds or ends another's."""
    cluster = start_cluster(ClusterConfig(islands=1, devices_per_island=1, data_path=()))
    try:
        monkeypatch.setenv("TORCHWAYS_ADDRESS", cluster.address)
        monkeypatch.setenv(TOKEN_VARIABLE, cluster.token)
        with tw.init(), contextlib.ExitStack() as stack:
            mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
            batches = stack.enter_context(contextlib.closing(tw.data_loader(ROWS, mesh, args=[20], batch_size=2)))
            iterator = iter(batches)
            assert next(iterator)["label"].tolist() == [0, 1]
            session = current_session()
            address = session.slices.address(mesh)
            info = session.connections.manager.wait_data_process(1, timedelta(seconds=30))
            victim = SimpleNamespace(
                manager=cluster.address,
                scheduler=address.scheduler_address,
                executor=address.executors[0].address,
                token=cluster.token,
                data=session.connections.loop.run(info),
                slice_id=mesh.slice_id,
            )
            asyncio.run(asyncio.wait_for(_attack(victim), 60))
            assert [batch["label"].tolist()[0] for batch in iterator] == list(range(2, 20, 2))
    finally:
        cluster.close()


async def _attack(victim):
    async with attacker(victim) as (_, mine, (manager, _, _)):
        started = await manager.StartDataProcess(pb.StartDataProcessRequest(slice_id=victim.slice_id), metadata=mine)
        assert started.failure.kind == "AccessDenied"
        found = await manager.WaitDataProcess(pb.WaitDataProcessRequest(process_id=1), metadata=mine)
        assert (found.failure.kind, found.address) == ("DataProcessLost", "")
        await manager.EndDataProcess(pb.EndDataProcessRequest(process_id=1), metadata=mine)
        async with channel.open_channel(victim.data) as opened:
            stub = pb_grpc.DataProcessStub(opened)
            for call, request in (
                (stub.OpenDataset, pb.OpenDatasetRequest(spec="{}")),
                (stub.BeginPass, pb.BeginPassRequest(pass_number=9)),
                (stub.TakeBatch, pb.TakeBatchRequest(pass_number=1, number=1, first_buffer_id=1)),
            ):
                with refused():
                    await call(request, metadata=mine)
                with refused():
                    await call(request, metadata=metadata(victim.token))
                with refused(grpc.StatusCode.UNAUTHENTICATED):
                    await call(request, metadata=metadata("guess"))
