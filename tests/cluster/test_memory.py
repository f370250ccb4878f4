"""The memory budget with real executors: computations wait for it, what can never fit is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import psutil
import pytest
import torch

import torchways as tw
from torchways.config import ClusterConfig
from torchways.errors import RemoteError, ResourceExhausted
from torchways.launch.embedded import start_cluster
from torchways.rpc.channel import TOKEN_VARIABLE

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def mesh():
    with tw.init(islands=1, devices_per_island=1, memory_budget=100 * MEGABYTE, memory_wait=timedelta(seconds=2)):
        yield tw.init_device_mesh((1,), mesh_dim_names=("dp",))


def make(value):
    return value * torch.ones(30 * MEGABYTE // 4)


def status(waits, seconds=10):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        [found] = tw.executor_status()
        if any("bytes of device memory" in line for line in found.waiting_for) == waits:
            return found
        time.sleep(0.02)
    raise AssertionError(found)


@pytest.mark.slow  # tests/unit/executor/test_engine.py has when; here is that it is the kernel that gets it
def test_memory_goes_back_when_nothing_is_computed(mesh):
    arrays = [tw.program(make, mesh=mesh)(torch.tensor(2.0)) for _ in range(3)]
    tw.synchronize()
    before = tw.executor_status()[0].rss_bytes
    del arrays
    deadline = time.monotonic() + 60
    while tw.executor_status()[0].rss_bytes > before - 80 * MEGABYTE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def halve(carry, x):
    return carry * 0.5 + 1, carry[:1] * 1


def test_a_loop_updates_its_carry_in_place(mesh):
    """Two of it do not fit into the budget beside a third."""
    init = tw.program(lambda value: value * torch.ones(40 * MEGABYTE // 4), mesh=mesh)(torch.tensor(8.0))
    final, ys = tw.scan(halve, init, length=8, mesh=mesh, donate=True)
    assert [y.item() for y in ys[:3]] == [8.0, 5.0, 3.5]
    assert final[:1].item() == 2 + 6 / 2**8
    assert status(waits=False).used_bytes < 41 * MEGABYTE


def test_a_computation_waits_for_memory_and_the_wait_shows(mesh, tmp_path):
    program = tw.program(make, mesh=mesh)
    with tw.profile(tmp_path / "trace.json"):
        held = [program(torch.tensor(float(number))) for number in range(3)]
        assert [array[:1].item() for array in held] == [0.0, 1.0, 2.0]
        late = program(torch.tensor(7.0))
        found = status(waits=True)
        assert found.budget_bytes == 100 * MEGABYTE
        assert 90 * MEGABYTE <= found.used_bytes < 100 * MEGABYTE
        assert sum(found.client_bytes.values()) == 90 * MEGABYTE
        assert not late.done()
        del held[0]
        assert late[:1].item() == 7.0
        status(waits=False)
    spans = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert any("waits for memory: unit 0 of run" in event["name"] for event in spans)


def test_more_is_in_flight_than_fits(mesh):
    program = tw.program(make, mesh=mesh)
    totals = [tw.program(torch.sum, mesh=mesh)(program(torch.tensor(1.0))) for _ in range(20)]
    assert [total.item() for total in totals] == [30 * MEGABYTE / 4] * 20


def test_a_wait_that_nothing_can_end_fails_and_says_who_holds_what(mesh):
    program = tw.program(make, mesh=mesh)
    held = [program(torch.tensor(1.0)) for _ in range(3)]
    late = program(torch.tensor(7.0))
    with pytest.raises(
        (RemoteError, ResourceExhausted), match=r"waited 2 s for 31,457,280 bytes.*client 1: 94,371,840"
    ):
        late.cpu()
    assert held[0][:1].item() == 1.0
    del held, late
    assert program(torch.tensor(8.0))[:1].item() == 8.0


def test_what_can_never_fit_is_refused_before_it_is_sent(mesh):
    @tw.program(mesh=mesh)
    def large(x):
        return x * torch.ones(120 * MEGABYTE // 4)

    with pytest.raises(
        ResourceExhausted, match=r"large needs 125,829,12\d bytes on each device.*budget is 104,857,600"
    ):
        large(torch.ones(()))
    with pytest.raises((RemoteError, ResourceExhausted), match=r"125,829,120 bytes a device at once.*104,857,600"):
        tw.distribute_tensor(torch.ones(120 * MEGABYTE // 4), mesh).cpu()


CLIENT = """
import torch, torchways as tw
tw.init()
mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
arrays = [tw.distribute_tensor(torch.ones(1_000_000), mesh) for _ in range(5)]
print(arrays[-1].sum().item(), flush=True)
import time
time.sleep(1000)
"""


def test_a_dead_clients_memory_is_free_within_ten_seconds():
    cluster = start_cluster(ClusterConfig(islands=1, devices_per_island=2))
    environment = {**os.environ, "TORCHWAYS_ADDRESS": cluster.address, TOKEN_VARIABLE: cluster.token}
    command = [sys.executable, "-c", CLIENT]
    client = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    saved = dict(os.environ)
    try:
        assert client.stdout.readline() == "1000000.0\n"
        os.environ.update(environment)
        tw.shutdown()
        with tw.init():
            mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
            array = tw.distribute_tensor(torch.ones(2), mesh)
            assert array.tolist() == [1.0, 1.0]
            [executor] = [pid for name, pid in tw.cluster_info().processes if name.startswith("executor")]
            [found] = tw.executor_status()
            assert (list(found.client_bytes.values()), found.used_bytes) == ([8], 20_000_008)  # only its own by client
            client.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 10
            while tw.executor_status()[0].used_bytes > 8 and time.monotonic() < deadline:
                time.sleep(0.05)
            [found] = tw.executor_status()
            assert (list(found.client_bytes.values()), found.used_bytes, found.num_buffers) == ([8], 8, 1)
            assert array.tolist() == [1.0, 1.0]  # the executor, which both had, is there still
            assert psutil.pid_exists(executor)
    finally:
        os.environ.clear()
        os.environ.update(saved)
        client.kill()
        client.wait()
        cluster.close()
