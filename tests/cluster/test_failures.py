"""Processes that die, and sessions that end."""

import contextlib
import os
import signal
import time
from datetime import timedelta

import pytest
import torch

import torchways as tw
from tests.breaking import break_connections
from tests.cluster.conftest import cluster_processes, interrupted, wait_gone, writer_of
from torchways.capture.host_content import HostContent
from torchways.controller.buffers import HostBuffer
from torchways.errors import (
    CheckpointError,
    ClusterLost,
    ExecutorLost,
    PlacementError,
    RemoteError,
    SessionClosed,
    UserError,
)


def pid_of(name):
    return dict(tw.cluster_info().processes)[name]


def read_for_ever(run):
    while True:
        run(torch.rand(64, 64)).cpu(timeout=timedelta(seconds=60))


def busy(x):
    for _ in range(300):
        x = (x @ x).softmax(-1)
    return x


def test_executor_killed_mid_step_is_named_and_the_other_island_goes_on():
    with tw.init():
        a, b = (tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=island) for island in (0, 1))
        first = tw.function(busy, mesh=a)
        second = tw.function(lambda x: x.sum(0), mesh=b)
        ours = first(torch.rand(1024, 1024))
        theirs = second(ours)  # waits for a transfer from the executor that dies
        alone = second(torch.ones(4, 2))
        [name] = [name for name, _ in tw.cluster_info().processes if name.startswith("executor i0")]
        executor_id = name.removeprefix("executor ")
        os.kill(pid_of(name), signal.SIGKILL)
        for array in (ours, theirs):
            with pytest.raises(ExecutorLost, match=executor_id.replace(".", r"\.")):
                array.cpu(timeout=timedelta(seconds=60))
        assert alone.tolist() == [4, 4]
        with pytest.raises((ExecutorLost, PlacementError), match=r"lost|closed"):
            first(torch.rand(1024, 1024)).cpu()
        assert [status.executor_id[:2] for status in tw.executor_status()] == ["i1"]
        # A new slice of the same island works.
        again = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=0)
        assert tw.function(lambda x: x + 1, mesh=again)(torch.zeros(2)).tolist() == [1, 1]


def test_an_executor_that_loses_its_scheduler_is_replaced():
    """Neither can go on with it: what was sent between them is lost."""
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        add = tw.function(lambda x: x + 1, mesh=mesh)
        kept = add(torch.zeros(2))
        assert kept.tolist() == [1, 1]
        [name] = [name for name, _ in tw.cluster_info().processes if name.startswith("executor")]
        pid = pid_of(name)
        assert break_connections(pid, pid_of("scheduler i0"))
        with pytest.raises((ExecutorLost, PlacementError), match=r"lost|closed|gone"):
            read_for_ever(add)
        deadline = time.monotonic() + 60
        while True:  # until the executor has ended, a new mesh may still be refused
            try:
                again = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
                result = tw.function(lambda x: x + 1, mesh=again)(torch.zeros(2)).cpu(timeout=timedelta(seconds=60))
                break
            except ExecutorLost:
                assert time.monotonic() < deadline
        assert result.tolist() == [1, 1]
        assert wait_gone([pid]) == set()
        with pytest.raises(ExecutorLost, match=name.removeprefix("executor ")):
            kept.cpu(timeout=timedelta(seconds=60))


def test_a_link_that_breaks_between_two_executors_is_opened_anew():
    """What was under way fails; what comes after it works, on the same meshes, and the executors stay."""
    with tw.init():
        a, b = (tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=island) for island in (0, 1))
        first = tw.function(lambda x: x + 1, mesh=a)
        second = tw.function(lambda x: x * 2, mesh=b)
        small, large = torch.zeros(2), torch.zeros(1 << 16)

        def there_and_back(x):
            return first(second(first(x)))

        assert there_and_back(small).tolist() == [3, 3]
        processes = tw.cluster_info().processes
        pids = [pid for name, pid in processes if name.startswith("executor")]
        for _ in range(3):
            under_way = [there_and_back(x) for x in (small, large)]
            assert break_connections(*pids)
            for array in under_way:  # right, or lost
                with contextlib.suppress(ExecutorLost):
                    assert torch.equal(array.cpu(timeout=timedelta(seconds=60)), torch.full(array.shape, 3.0))
            deadline = time.monotonic() + 60
            for x in (small, large):
                while True:
                    try:
                        assert torch.equal(
                            there_and_back(x).cpu(timeout=timedelta(seconds=60)), torch.full(x.shape, 3.0)
                        )
                        break
                    except ExecutorLost:
                        assert time.monotonic() < deadline
        assert tw.cluster_info().processes == processes


def test_a_node_that_fails_is_reported_with_its_line_and_poisons_only_what_follows():
    """More memory than any machine has, and a budget that allows it: the executor's own error, not one we inject."""

    def too_much(x):
        return x.sum() + 1

    with tw.init(memory_budget=1 << 60):
        a, b = (tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=island) for island in (0, 1))
        huge = tw.Array(HostBuffer(HostContent((1 << 45,), torch.float32, 0.0)), (1 << 45,), torch.float32)
        failing = tw.function(too_much, mesh=a)
        fine = tw.function(lambda x: x * 2, mesh=a)
        first, second = failing(huge), fine(torch.ones(2))
        third = tw.function(lambda x: x + 1, mesh=b)(first)
        for array in (first, third):
            with pytest.raises(RemoteError, match=r"too_much[\s\S]*test_failures\.py:\d+") as raised:
                array.cpu()
            assert "allocate" in raised.value.remote_traceback
        assert second.tolist() == [2, 2]


@pytest.mark.parametrize("name", ["resource manager", "scheduler i0"])
def test_lost_control_processes_surface_at_the_next_read(name):
    with tw.init():
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
        run = tw.function(lambda x: x @ x, mesh=mesh)
        run(torch.rand(64, 64)).cpu()
        os.kill(pid_of(name), signal.SIGKILL)
        with pytest.raises(ClusterLost):
            read_for_ever(run)


def test_closed_sessions():
    with pytest.raises(SessionClosed, match=r"tw\.init"):
        tw.init_device_mesh((1,), mesh_dim_names=("dp",))
    with tw.init(islands=1, devices_per_island=1):
        with pytest.raises(UserError, match="already"):
            tw.init()
        old = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        array = tw.distribute_tensor(torch.ones(2), old)
        assert array.tolist() == [1, 1]
        pids = [pid for _, pid in tw.cluster_info().processes if pid]
    assert wait_gone(pids) == set()
    tw.shutdown()  # idempotent
    assert "fp32[2]" in repr(array)
    with pytest.raises(SessionClosed, match=r"tw\.shutdown\(\) has closed"):
        array.cpu()
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        with pytest.raises(PlacementError, match=r"closed|another session"):
            tw.function(lambda x: x + 1, mesh=mesh)(array).cpu()
        with pytest.raises(PlacementError, match=r"closed|another session"):
            tw.function(lambda x: x + 1, mesh=old)(torch.ones(2))


def test_ctrl_c_while_shutdown_waits_for_a_checkpoint_ends_the_wait_and_all_else(tmp_path):
    tw.init(islands=1, devices_per_island=1)
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
    state = {"x": tw.distribute_tensor(torch.ones(2), mesh)}
    tw.checkpoint.save(tmp_path, state, step=1).result()
    writer_of(mesh).send_signal(signal.SIGSTOP)
    saving = tw.checkpoint.save(tmp_path, state, step=2)
    pids = [pid for _, pid in tw.cluster_info().processes if pid]
    interrupted(tw.shutdown)
    assert wait_gone(pids) == set()
    assert cluster_processes() == []
    with pytest.raises(CheckpointError, match="step_00000002 could not be saved"):
        saving.result(timedelta(seconds=20))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    tw.shutdown()
    with tw.init(islands=1, devices_per_island=1):
        assert [island.num_devices for island in tw.cluster_info().islands] == [1]


def test_released_slices_free_their_devices():
    with tw.init(islands=1, devices_per_island=2):
        mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
        array = tw.distribute_tensor(torch.ones(2), mesh)
        array.cpu()
        [pid] = [pid for name, pid in tw.cluster_info().processes if name.startswith("executor")]
        mesh.close()
        mesh.close()
        again = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
        other = tw.distribute_tensor(torch.ones(3), again)
        assert other.tolist() == [1.0] * 3
        assert [pid for name, pid in tw.cluster_info().processes if name.startswith("executor")] == [pid]
        [status] = tw.executor_status()
        assert (status.num_buffers, status.used_bytes) == (1, 12)
        with pytest.raises(PlacementError, match="closed"):
            array.cpu()


def test_sigusr1_prints_the_stacks_of_any_process(capfd):
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        tw.function(lambda x: x + 1, mesh=mesh)(torch.zeros(2)).cpu()
        for name, pid in tw.cluster_info().processes:
            os.kill(pid, signal.SIGUSR1)
            deadline, printed = time.monotonic() + 5, ""
            while "most recent call first" not in printed and time.monotonic() < deadline:
                time.sleep(0.05)
                printed += capfd.readouterr().err
            assert "most recent call first" in printed, name
