"""The environment of an executor process: which devices its PJRT client has, and how XLA runs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def executor_environment(platform: str, device_indices: Sequence[int], base: Mapping[str, str]) -> dict[str, str]:
    """Returns the whole environment of an executor.

    Args:
        platform: "cpu", "tpu" or "simulated".
        device_indices: the island's devices that its PJRT client shall have.
        base: environment to start from; what a user set there for threads is kept.
    """
    environment = dict(base)
    environment.setdefault("OMP_NUM_THREADS", "1")
    # XLA's C++ log: errors only.
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Size of XLA's thread pool. With the default, collectives of several executions in flight take all threads, wait
    # for each other, and XLA aborts the process after ten seconds.
    environment.setdefault("NPROC", "32")
    # Threads that launch computations; idle ones of a large pool wake each other and spin.
    environment.setdefault("XLA_THREAD_POOL_SIZE", "4")
    # torch-xla cannot be told to forget a compiled function: a smaller cache than its own, of 2,048, bounds the memory
    # of those that no program has any more. One that is still in use is compiled again (runtime/xla.py).
    environment.setdefault("XLA_COMPILATION_CACHE_SIZE", "512")
    # glibc would give every large block back to the kernel and take it anew: received values are then written to fresh
    # pages, at a quarter of the speed. (Thread arenas are too small for large blocks: one arena.)
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 32))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(1 << 32))
    environment.setdefault("MALLOC_ARENA_MAX", "1")
    if platform == "tpu":
        # Untested on hardware: one process that sees just these chips of one host.
        environment["PJRT_DEVICE"] = "TPU"
        environment["TPU_VISIBLE_CHIPS"] = ",".join(map(str, device_indices))
        environment["TPU_PROCESS_BOUNDS"] = "1,1,1"
        environment["TPU_CHIPS_PER_PROCESS_BOUNDS"] = f"1,{len(device_indices)},1"
    else:
        environment["PJRT_DEVICE"] = "CPU"
        environment["CPU_NUM_DEVICES"] = str(len(device_indices))
    return environment
