"""Memory over many shapes, with small caches: it must not grow with the number of shapes seen."""

import psutil
import pytest
import torch

import torchways as tw

NUM_KEPT = 8


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 2])
def test_memory_is_bounded_over_many_shapes(monkeypatch, num_devices):
    monkeypatch.setenv("XLA_COMPILATION_CACHE_SIZE", str(2 * NUM_KEPT))
    with tw.init(islands=1, devices_per_island=num_devices):
        mesh = tw.init_device_mesh((num_devices,), mesh_dim_names=("dp",))

        @tw.function(mesh=mesh, max_variants=NUM_KEPT)
        def step(x):
            for number in range(40):
                x = torch.tanh(x @ x) + number
            return x

        [executor] = tw.executor_status()
        [pid] = [pid for name, pid in tw.cluster_info().processes if executor.executor_id in name]
        processes = {"executor": psutil.Process(pid), "controller": psutil.Process()}
        resident = {name: [] for name in processes}
        for size in range(2, 242, 2):
            step(torch.ones(size, size)).cpu()
            for name, process in processes.items():
                resident[name].append(process.memory_info().rss)
        assert step.num_traces == NUM_KEPT
        [executor] = tw.executor_status()
        assert executor.num_compiled == 120
        for name, sizes in resident.items():
            assert sizes[119] - sizes[59] < 16 << 20, (name, [size >> 20 for size in sizes[::10]])


@pytest.mark.slow
def test_what_left_the_cache_is_compiled_again(monkeypatch, capfd):
    """More functions in use than torch-xla keeps executables."""
    monkeypatch.setenv("XLA_COMPILATION_CACHE_SIZE", "4")
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        total = tw.function(lambda x: x.sum(), mesh=mesh)
        for _ in range(2):
            assert [total(torch.ones(size)).item() for size in range(1, 9)] == list(range(1, 9))
    assert "compiling one anew" in capfd.readouterr().err
