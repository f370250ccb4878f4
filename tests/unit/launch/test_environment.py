"""Which devices an executor sees."""

import importlib.metadata
import os

from torchways.launch.environment import executor_environment, tpu_addresses


def test_cpu_executors_have_as_many_virtual_devices_as_their_slice():
    environment = executor_environment("cpu", [1, 3], {"PATH": "/bin"})
    assert environment["PJRT_DEVICE"] == "CPU"
    assert environment["CPU_NUM_DEVICES"] == "2"
    assert environment["NPROC"] == str(max(4, os.cpu_count()))
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["PATH"] == "/bin"
    assert environment["XLA_FLAGS"] == "--xla_cpu_enable_fast_min_max=false --xla_cpu_use_xnnpack=false"
    assert executor_environment("cpu", range(16), {})["NPROC"] == str(max(32, os.cpu_count()))  # two threads a device
    # One device has no collectives: its part of the cores.
    assert executor_environment("cpu", [0], {})["NPROC"] == str(os.cpu_count())
    assert executor_environment("cpu", [0], {}, num_local_devices=os.cpu_count())["NPROC"] == "1"
    assert executor_environment("cpu", [0], {}, num_local_devices=1000)["NPROC"] == "1"


def test_tpu_executors_see_the_chips_of_their_slice():
    environment = executor_environment("tpu", [2, 3], {})
    assert environment["PJRT_DEVICE"] == "TPU"
    assert environment["TPU_VISIBLE_CHIPS"] == "2,3"
    assert environment["TPU_PROCESS_BOUNDS"] == "1,1,1"
    assert environment["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"
    assert "CPU_NUM_DEVICES" not in environment


def test_tpu_executors_of_a_slice_of_several_hosts_find_each_other():
    addresses = tpu_addresses("10.0.0.1", 3, 2)
    found = [
        executor_environment("tpu", devices, {}, host_number=number, addresses=addresses)
        for number, devices in enumerate([[0, 1], [2, 3]])
    ]
    for number, environment in enumerate(found):
        assert environment["TPU_PROCESS_BOUNDS"] == "2,1,1"
        assert environment["TPU_CHIPS_PER_PROCESS_BOUNDS"] == "1,2,1"
        assert environment["TPU_PROCESS_ADDRESSES"].split(",") == addresses
        assert addresses[number].endswith(f":{environment['TPU_PROCESS_PORT']}")
        assert environment["CLOUD_TPU_TASK_ID"] == str(number)
    assert [environment["TPU_VISIBLE_CHIPS"] for environment in found] == ["0,1", "2,3"]
    assert not {*addresses} & {*tpu_addresses("10.0.0.1", 4, 2)}
    alone = executor_environment("tpu", [0], {}, addresses=tpu_addresses("10.0.0.1", 3, 1))
    assert "TPU_PROCESS_ADDRESSES" not in alone


def test_what_the_user_set_for_threads_is_kept_and_devices_are_ours():
    base = {"OMP_NUM_THREADS": "4", "NPROC": "64", "PJRT_DEVICE": "GPU", "CPU_NUM_DEVICES": "9"}
    environment = executor_environment("cpu", [0], base)
    assert (environment["OMP_NUM_THREADS"], environment["NPROC"]) == ("4", "64")
    assert (environment["PJRT_DEVICE"], environment["CPU_NUM_DEVICES"]) == ("CPU", "1")
    assert base["PJRT_DEVICE"] == "GPU"
    flags = executor_environment("cpu", [0], {"XLA_FLAGS": "--xla_dump_to=/tmp"})["XLA_FLAGS"]
    assert flags == "--xla_dump_to=/tmp --xla_cpu_enable_fast_min_max=false --xla_cpu_use_xnnpack=false"
    base = {"XLA_FLAGS": "--xla_cpu_use_xnnpack=true --xla_cpu_enable_fast_min_max=true"}
    assert executor_environment("cpu", [0], base)["XLA_FLAGS"] == base["XLA_FLAGS"]


def test_compilations_are_cached_on_disk_by_version_and_devices_where_the_client_can_load_them(caplog):
    base = {"TORCHWAYS_COMPILATION_CACHE": "/cache"}
    version = importlib.metadata.version("torch_xla")
    for devices in ([0], [0, 1]):
        environment = executor_environment("tpu", devices, base)
        assert environment["XLA_PERSISTENT_CACHE_PATH"] == f"/cache/torch_xla-{version}/tpu-{len(devices)}"
    assert "XLA_PERSISTENT_CACHE_PATH" not in executor_environment("tpu", [0], {})
    assert caplog.text == ""
    for base in ({"TORCHWAYS_COMPILATION_CACHE": "/cache"}, {"XLA_PERSISTENT_CACHE_PATH": "/cache"}):
        assert "XLA_PERSISTENT_CACHE_PATH" not in executor_environment("cpu", [0], base)
        assert "torch-xla's CPU client cannot load what it compiled earlier" in caplog.text
        caplog.clear()
