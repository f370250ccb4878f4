"""The environment of an executor process: which devices its PJRT client has, and how XLA runs on them."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence

from torchways.addresses import address_of

logger = logging.getLogger(__name__)

#: Folder in which executors keep what they compiled, for later clusters.
COMPILATION_CACHE_VARIABLE = "TORCHWAYS_COMPILATION_CACHE"

#: Flags of XLA's that are on by default on CPU, with other values than PyTorch's.
_OFF = (
    # Maxima and minima of what has a NaN are NaN; with it, XLA leaves NaNs out.
    "xla_cpu_enable_fast_min_max",
    # XNNPACK packs the right matrix of some large products, and packs it again only when its address changes: after an
    # update in place (donation), products of some executions are those of the old weights.
    "xla_cpu_use_xnnpack",
)


#: Where TPU processes of one slice find each other: libtpu's own first port, and how many we use from there.
_TPU_FIRST_PORT, _TPU_NUM_PORTS = 8476, 2048


def _num_threads(num_devices: int, num_local_devices: int) -> int:
    """Returns the size of an executor's pool of XLA threads, over which each kernel is spread.

    More threads than cores cost time: a third of a step with 32 for four devices on two cores, and a sixth with two for
    each of two executors of one device. One device has no collectives, so its part of the cores is enough. With more,
    collectives of several executions in flight may take all threads of a smaller pool, wait for each other, and XLA
    aborts the process after ten seconds: two threads a device ran all soaks.
    """
    num_cores = os.cpu_count() or 1
    if num_devices == 1:
        return max(1, num_cores // num_local_devices)
    return max(2 * num_devices, num_cores)


def executor_environment(
    platform: str,
    device_indices: Sequence[int],
    base: Mapping[str, str],
    *,
    num_local_devices: int = 1,
    host_number: int = 0,
    addresses: Sequence[str] = (),
) -> dict[str, str]:
    """Returns the whole environment of an executor.

    Args:
        platform: "cpu", "tpu" or "simulated".
        device_indices: the island's devices that its PJRT client shall have.
        num_local_devices: CPU devices of this machine, in all executors, which share its cores.
        host_number: which of its slice's hosts it is.
        addresses: "host:port" of each of the slice's hosts (`tpu_addresses`), for TPU slices of several; there, a host
            has as many devices as any other, and hosts stand in a line along the first dimension of the topology.
        base: environment to start from; what a user set there for threads is kept. TORCHWAYS_COMPILATION_CACHE names
            a folder for compiled functions, which serves later clusters; on TPU only.
    """
    environment = dict(base)
    environment.setdefault("OMP_NUM_THREADS", "1")
    # XLA's C++ log: errors only.
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    environment.setdefault("NPROC", str(_num_threads(len(device_indices), num_local_devices)))
    # Threads that launch computations; idle ones of a large pool wake each other and spin.
    environment.setdefault("XLA_THREAD_POOL_SIZE", "4")
    # torch-xla cannot be told to forget a compiled function: a smaller cache than its own, of 2,048, bounds the memory
    # of those that no program has any more. One that is still in use is compiled again (runtime/xla.py).
    environment.setdefault("XLA_COMPILATION_CACHE_SIZE", "512")
    # glibc would give every large block back to the kernel and take it anew: received values are then written to fresh
    # pages, at a quarter of the speed.
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 32))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 32))
    # XLA's threads allocate for each of their computations. With one arena for all they waited for its lock: training
    # steps on four devices took up to 1.4 times as long. Blocks that are too large for a thread's arena, of 64 MB, go
    # back to the kernel: huge pages make it cheaper to take them anew.
    environment.setdefault("MALLOC_ARENA_MAX", "16")
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    if platform == "tpu":
        # Untested on hardware: a process that sees just these chips of its host.
        environment["PJRT_DEVICE"] = "TPU"
        environment["TPU_VISIBLE_CHIPS"] = ",".join(map(str, device_indices))
        environment["TPU_PROCESS_BOUNDS"] = f"{max(1, len(addresses))},1,1"
        environment["TPU_CHIPS_PER_PROCESS_BOUNDS"] = f"1,{len(device_indices)},1"
        if len(addresses) > 1:
            environment["TPU_PROCESS_ADDRESSES"] = ",".join(addresses)
            environment["TPU_PROCESS_PORT"] = addresses[host_number].rpartition(":")[2]
            environment["CLOUD_TPU_TASK_ID"] = str(host_number)
        if folder := environment.get(COMPILATION_CACHE_VARIABLE):
            # Untested on hardware. torch-xla's keys are hashes of graphs: they do not tell its version or the devices.
            version = importlib.metadata.version("torch_xla")
            place = os.path.join(folder, f"torch_xla-{version}", f"tpu-{len(device_indices)}")
            environment["XLA_PERSISTENT_CACHE_PATH"] = place
    else:
        # torch-xla 2.9's CPU client writes executables to such a cache but reads none: "UNIMPLEMENTED: Deserializing
        # serialized executable not supported". It would compile everything as before, and write it each time.
        if environment.pop("XLA_PERSISTENT_CACHE_PATH", None) or environment.get(COMPILATION_CACHE_VARIABLE):
            logger.warning("no compilation cache on disk: torch-xla's CPU client cannot load what it compiled earlier")
        flags = environment.get("XLA_FLAGS", "").split()
        missing = [f"--{flag}=false" for flag in _OFF if not any(flag in given for given in flags)]
        environment["XLA_FLAGS"] = " ".join([*flags, *missing])
        environment["PJRT_DEVICE"] = "CPU"
        environment["CPU_NUM_DEVICES"] = str(len(device_indices))
    return environment


def tpu_addresses(host: str, set_number: int, num_hosts: int) -> list[str]:
    """Returns where the processes of a set of devices of several hosts listen for each other; not those of others."""
    first = set_number * num_hosts
    return [address_of(host, _TPU_FIRST_PORT + (first + number) % _TPU_NUM_PORTS) for number in range(num_hosts)]
