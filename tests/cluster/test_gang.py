"""Slices over four host processes (simulated devices; all else is real): they compute, and never deadlock."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch

import torchways as tw
from tests.breaking import break_connections
from tests.cluster.test_launch import wait_for
from torchways.config import ClusterConfig
from torchways.errors import ConfigError, ExecutorLost
from torchways.launch.embedded import start_cluster
from torchways.rpc.channel import TOKEN_VARIABLE

CLIENT = """
import random, sys
from datetime import timedelta
import torch, torchways as tw
seed, count, sizes = int(sys.argv[1]), int(sys.argv[2]), [int(size) for size in sys.argv[3].split(",")]
tw.init()
meshes = [tw.init_device_mesh((size,), mesh_dim_names=("dp",)) for size in sizes]
programs = [tw.program(lambda x: x + 1, mesh=mesh) for mesh in meshes]
arrays = [tw.distribute_tensor(torch.zeros(4), mesh) for mesh in meshes]
expected = [0] * len(meshes)
dice = random.Random(seed)
sys.stdin.readline()
for _ in range(count):
    chosen = dice.randrange(len(meshes))
    arrays[chosen] = programs[chosen](arrays[chosen])
    expected[chosen] += 1
assert [array.cpu(timeout=timedelta(seconds=120)).tolist() for array in arrays] == [[float(n)] * 4 for n in expected]
print("done", flush=True)
tw.shutdown()
"""


@contextlib.contextmanager
def island(scheduling, tmp_path):
    """A cluster of one island: four hosts of a device each."""
    config = ClusterConfig(
        islands=1,
        devices_per_island=4,
        hosts_per_island=4,
        platform="simulated",
        scheduling=scheduling,
        log_dir=str(tmp_path),
    )
    cluster = start_cluster(config)
    environment = {**os.environ, "TORCHWAYS_ADDRESS": cluster.address, TOKEN_VARIABLE: cluster.token}
    try:
        yield environment
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def gang(tmp_path_factory):
    """The environment of clients of one such cluster, whose executors serve one test after the other."""
    with island("gang", tmp_path_factory.mktemp("logs")) as environment:
        yield environment


@pytest.fixture
def session(gang, monkeypatch):
    """This process is a client of it."""
    for name in ("TORCHWAYS_ADDRESS", TOKEN_VARIABLE):
        monkeypatch.setenv(name, gang[name])
    with tw.init():
        yield tw


def executors():
    return {name for name, _ in tw.cluster_info().processes if name.startswith("executor")}


@contextlib.contextmanager
def clients(environment, count, slices=((4, 2), (4, 3), (3, 2))):
    """Three clients of overlapping slices, at work."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(seed), str(count), ",".join(map(str, sizes))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed, sizes in enumerate(slices)
    ]
    try:
        for client in running:
            client.stdin.write("go\n")
            client.stdin.flush()
        yield running
    finally:
        for client in running:
            client.kill()
            client.communicate()


def test_slices_of_several_hosts_exchange_values_and_sums(session):
    before = executors()
    wide, narrow = (tw.init_device_mesh((size,), mesh_dim_names=("dp",)) for size in (4, 2))
    assert len(executors() - before) <= 6
    double = tw.function(lambda x: x * 2, mesh=wide)
    add = tw.function(lambda x, y: x + y, mesh=narrow)

    @tw.program
    def step(x):
        y = add(double(x), x)
        first, second = tw.all_reduce([double(y), add(y, y)])
        return double(first), add(second, second)

    for x in (torch.randn(4), torch.randn(40_000)):
        first, second = step(x)
        torch.testing.assert_close(first.cpu(timeout=timedelta(seconds=60)), x * 24)
        torch.testing.assert_close(second.cpu(timeout=timedelta(seconds=60)), x * 24)
    assert len(tw.executor_status()) == 6


def test_each_host_writes_its_part_of_a_checkpoint(session, tmp_path):
    mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
    double = tw.function(lambda x: x * 2, mesh=mesh)
    values = {f"value{n}": torch.full((4, 4), float(n)) for n in range(8)}
    state = {name: double(value) for name, value in values.items()}
    tw.checkpoint.save(tmp_path / "checkpoint", state).result()
    hosts = {path.name.rsplit("_", 1)[0] for path in (tmp_path / "checkpoint").glob("__i*")}
    assert len(hosts) == 2
    state = {name: tw.distribute_tensor(torch.zeros_like(value), mesh) for name, value in values.items()}
    tw.checkpoint.load(tmp_path / "checkpoint", state)
    for name, value in values.items():
        torch.testing.assert_close(state[name].cpu(timeout=timedelta(seconds=60)), 2 * value)


@contextlib.contextmanager
def stopped(pids):
    """Processes that do nothing meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("host", [0, 3])
def test_what_one_host_alone_has_lost_fails_on_all_and_others_go_on(session, gang, host):
    """Its links break: the other hosts get what it has lost, and must not wait for it on their devices."""
    wide, narrow = (tw.init_device_mesh((size,), mesh_dim_names=("dp",)) for size in (4, 2))
    make, take = tw.function(lambda x: x + 1, mesh=narrow), tw.function(lambda x: x * 2, mesh=wide)

    def is_lost(array):
        try:
            value = array.cpu(timeout=timedelta(seconds=60))
        except ExecutorLost:
            return True
        assert torch.equal(value, torch.full((4,), 2.0))
        return False

    assert not is_lost(take(make(torch.zeros(4))))
    pids = {name.split()[1]: pid for name, pid in tw.cluster_info().processes if name.startswith("executor")}
    [losing] = [name for name in pids if name.endswith(f".h{host}") and f"{name.rpartition('.')[0]}.h3" in pids]
    senders = [pid for name, pid in pids.items() if f"{name.rpartition('.')[0]}.h2" not in pids]
    deadline = time.monotonic() + 60
    with clients(gang, 10, [(4,)]) as [other]:
        some_lost = False
        while not some_lost:
            assert time.monotonic() < deadline
            with stopped(senders):
                made = [take(make(torch.zeros(4))) for _ in range(4)]
                time.sleep(0.5)  # until the runs are there, if that is long enough
                assert sum(break_connections(pids[losing], pid) for pid in senders)
            some_lost = any([is_lost(array) for array in made])
        printed = other.communicate(timeout=200)
    assert printed[0] == "done\n", printed
    while is_lost(take(make(torch.zeros(4)))):  # the other end may have noticed later
        assert time.monotonic() < deadline
    wait_for(lambda: not any(status.num_runs_in_flight for status in tw.executor_status()), "the end of all runs")
    assert (f"executor {losing}", pids[losing]) in tw.cluster_info().processes


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("computations", "slices"),
    [
        pytest.param(10, [(4, 2), (4,), (3,)], id="10"),  # each more is a process of each of its hosts
        pytest.param(1000, [(4, 2), (4, 3), (3, 2)], id="1000", marks=pytest.mark.slow),
    ],
)
def test_computations_of_three_clients_over_four_hosts_never_deadlock(gang, computations, slices):
    with clients(gang, computations, slices) as running:
        printed = [client.communicate(timeout=200 + computations) for client in running]
    assert [out for out, _ in printed] == ["done\n"] * 3, printed


@pytest.mark.slow  # simulated in tests/unit/island/test_gang.py
def test_they_deadlock_in_the_order_of_arrival(tmp_path):
    with island("arrival", tmp_path) as environment, clients(environment, 1000) as running:
        [log] = wait_for(lambda: list(tmp_path.glob("device*")), "the device's log")
        deadline = time.monotonic() + 240
        while "deadlock: " not in log.read_text():
            assert time.monotonic() < deadline
            assert any(client.poll() is None for client in running)
            time.sleep(0.5)
        assert any(client.poll() is None for client in running)


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="a CPU computation cannot span processes"):
        ClusterConfig(devices_per_island=4, hosts_per_island=2)
    with pytest.raises(ConfigError, match="cannot be split evenly over 3 hosts"):
        ClusterConfig(devices_per_island=4, hosts_per_island=3, platform="simulated")
    with pytest.raises(ConfigError, match="scheduling must be one of gang, arrival"):
        ClusterConfig(scheduling="random")
