"""Tensors of the host among a program's arguments: large ones go to executors beside the runs that take them."""

import gc
import os
import signal
import threading
from datetime import timedelta

import pytest
import torch

import torchways as tw
from torchways.api import _current as current_session
from torchways.capture.host_content import HostContent
from torchways.config import ClusterConfig
from torchways.controller.buffers import HostBuffer
from torchways.controller.session import puts
from torchways.errors import ExecutorLost, RunCancelled
from torchways.launch.embedded import start_cluster
from torchways.rpc.channel import TOKEN_VARIABLE
from torchways.rpc.clients import ExecutorClient, SchedulerClient

MEGABYTE = 1 << 20
DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.complex64]


@pytest.fixture(scope="module")
def meshes():
    tw.shutdown()
    with tw.init(islands=2, devices_per_island=2):
        yield [tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=island) for island in range(2)]


def test_schedulers_do_not_carry_them(meshes, monkeypatch):
    sizes, send = [], SchedulerClient.send
    monkeypatch.setattr(
        SchedulerClient, "send", lambda self, message: (sizes.append(message.ByteSize()), send(self, message))[1]
    )
    total = tw.function(lambda x, y: (x.sum(), y.sum()), mesh=meshes[0])
    large, small = torch.ones(MEGABYTE), torch.ones(1000)
    for _ in range(3):
        assert [value.item() for value in total(large, small)] == [float(MEGABYTE), 1000.0]
    runs = [size for size in sizes if size > 3000]  # but for those that register a program
    assert max(sizes) < 50_000
    assert len(runs) >= 3  # small ones go with the run


@pytest.mark.parametrize("is_local", [True, False], ids=["by file", "by gRPC"])
def test_values_are_those_of_the_call(meshes, monkeypatch, is_local):
    monkeypatch.setattr(os, "access", lambda path, mode, access=os.access, **_: is_local and access(path, mode))
    mesh = tw.init_device_mesh((2,), mesh_dim_names=("x",), island=0)
    for dtype in DTYPES:
        x = torch.arange(300 * 301).reshape(300, 301).remainder(7).to(dtype)
        views = [x, x.T, x[:, ::2], x[:1].expand(300, 301), x.unsqueeze(0), x.reshape(-1)[5:90_000]]
        for view in views:
            program = tw.program(lambda t, u: (t.clone(), u.clone()), mesh=mesh)
            given, expected = view.clone(), view.clone()
            first, second = program(given, given)  # one tensor twice
            given.zero_()  # too late to be seen
            assert torch.equal(first.cpu(), expected)
            assert torch.equal(second.cpu(), expected)
    assert current_session().values.puts._under_way == {}


def test_several_slices_and_a_changed_argument(meshes):
    one, two = meshes
    weight = tw.distribute_tensor(torch.full((MEGABYTE,), 2.0), two)

    twice = tw.function(lambda x: x.mul(2).sum(), mesh=one)
    weighted = tw.function(lambda x: (x * weight).sum(), mesh=two)

    @tw.program
    def both(x):
        y, z = twice(x), weighted(x)
        return y, z, y + z

    for value in (1.0, 3.0):
        total = 2 * value * MEGABYTE
        assert [item.item() for item in both(torch.full((MEGABYTE,), value))] == [total, total, 2 * total]


def test_a_controller_does_not_send_ahead_without_end(meshes, monkeypatch):
    monkeypatch.setattr(puts, "_MAX_RUN_BYTES", 4 * MEGABYTE)
    session, seen = current_session(), []
    program = tw.program(lambda x: x.sum(), mesh=meshes[0])
    results = []
    for number in range(20):
        results.append(program(torch.full((MEGABYTE // 4,), float(number))))
        seen.append(session.values.puts._run_bytes)
    assert [item.item() for item in results] == [number * MEGABYTE / 4 for number in range(20)]
    assert 0 < max(seen) <= 4 * MEGABYTE
    large = torch.ones(2 * MEGABYTE)  # more than all: it goes alone
    assert program(large).item() == 2 * MEGABYTE
    session.runs.wait_for_all(timedelta(seconds=60))
    assert session.values.puts._run_bytes == 0


@pytest.mark.parametrize("number", [0, 3, True, 1.5])
def test_one_number_everywhere_may_be_of_any_type(meshes, number):
    value = HostBuffer(HostContent((3,), torch.float32, number))
    assert current_session().values.put(value, meshes[0], ("R",)).read().tolist() == [float(number)] * 3


def test_more_values_at_once_than_files_are_open(meshes, monkeypatch):
    monkeypatch.setattr(puts, "_MAX_PUTS", 3)
    arrays = [tw.distribute_tensor(torch.full((10_000,), float(number)), meshes[0]) for number in range(30)]
    assert [array[:1].item() for array in arrays] == list(range(30))


def test_one_that_does_not_arrive_fails_what_reads_it(meshes, monkeypatch):
    mesh = meshes[1]
    program = tw.program(lambda x: x.sum(), mesh=mesh)
    assert program(torch.ones(100_000)).item() == 100_000

    async def put(self, *_, **__):
        raise ExecutorLost("no way to it")

    with monkeypatch.context() as patch:
        patch.setattr(ExecutorClient, "put", put)
        for _ in range(5):  # it fails before its run is sent, or behind it
            with pytest.raises((ExecutorLost, RunCancelled), match="no way to it"):
                program(torch.ones(100_000)).cpu(timeout=timedelta(seconds=30))
        array = tw.distribute_tensor(torch.ones(100_000), mesh)
        for _ in range(2):
            with pytest.raises(ExecutorLost, match="no way to it"):
                array.cpu(timeout=timedelta(seconds=30))
        with pytest.raises(ExecutorLost, match="no way to it"):
            program(array).cpu(timeout=timedelta(seconds=30))
        del array
    current_session().runs.wait_for_all(timedelta(seconds=60))
    gc.collect()
    assert current_session().values.puts._errors == {}  # nobody has what did not arrive
    assert program(torch.ones(100_000)).item() == 100_000


def test_they_have_no_place_before_their_run(monkeypatch):
    """Ten runs are sent at once, with 40 MB of arguments in all, where 16 MB are all the memory."""
    tw.shutdown()
    with tw.init(islands=1, devices_per_island=1, memory_budget=16 * MEGABYTE, memory_wait=timedelta(seconds=2)):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        program = tw.program(lambda x: (x * 2).sum(), mesh=mesh)

        @tw.program(mesh=mesh)
        def before(x):
            for _ in range(8):
                x = torch.linalg.matrix_power(x, (1 << 60) - 1)  # over a hundred products
            return x.sum()

        program(torch.zeros(MEGABYTE)).cpu()
        busy = before(torch.eye(720))  # all values come while it computes
        results = [program(torch.full((MEGABYTE,), float(number))) for number in range(10)]
        for number, result in enumerate(results):
            assert result.item() == 2 * number * MEGABYTE
        assert busy.item() == 720


def test_every_host_of_a_slice_gets_them(tmp_path, monkeypatch):
    tw.shutdown()
    config = ClusterConfig(islands=1, devices_per_island=2, hosts_per_island=2, platform="simulated")
    cluster = start_cluster(config)
    monkeypatch.setenv("TORCHWAYS_ADDRESS", cluster.address)
    monkeypatch.setenv(TOKEN_VARIABLE, cluster.token)
    try:
        with tw.init():
            mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
            program = tw.program(lambda x: x + 1, mesh=mesh)
            for _ in range(3):
                assert torch.equal(program(torch.ones(2, 100_000)).cpu(), torch.full((2, 100_000), 2.0))
    finally:
        cluster.close()


def test_an_executor_that_dies_while_it_takes_one_is_lost():
    tw.shutdown()
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        program = tw.program(lambda x: x.sum(), mesh=mesh)
        assert program(torch.ones(100_000)).item() == 100_000
        [pid] = [pid for name, pid in tw.cluster_info().processes if name.startswith("executor")]
        os.kill(pid, signal.SIGSTOP)
        result = program(torch.ones(8 * MEGABYTE))
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        with pytest.raises(ExecutorLost):
            result.cpu(timeout=timedelta(seconds=60))
