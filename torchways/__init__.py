"""Pathways for PyTorch: one controller, many accelerators, asynchronous sharded dataflow.

The public names of the package. They are imported on first use, so that the processes of a cluster can import their
own modules without torch.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchways.api import (
        balanced_stages,
        cancel,
        check_values,
        cluster_info,
        cond,
        data_loader,
        deadline,
        distribute_tensor,
        executor_status,
        function,
        generate,
        get,
        init,
        init_device_mesh,
        is_eager,
        microbatch,
        parallelize_module,
        parity,
        pipeline,
        profile,
        program,
        redistribute,
        replicate,
        scan,
        shutdown,
        while_loop,
    )
    from torchways.array import Array
    from torchways.capture.collectives import all_reduce
    from torchways.mesh import VirtualSlice
    from torchways.parallel.pipeline import SplitPoint
    from torchways.parallel.plans import fully_shard, tensor_parallel
    from torchways.schedules import Schedule

__version__ = "0.1.0"

_FORK_VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"


def _keep_grpc_from_forks() -> None:
    """Has gRPC, which reads this when it is imported, do nothing at a fork.

    Its own handlers crash half of the processes that a session's process forks, such as a DataLoader's workers.
    """
    if os.environ.get(_FORK_VARIABLE, "0").lower() not in ("0", "false"):
        warnings.warn(f"torchways sets {_FORK_VARIABLE}=0: with gRPC's support, forked processes crash", stacklevel=3)
    os.environ[_FORK_VARIABLE] = "0"


_keep_grpc_from_forks()

_MODULE_OF = {
    **dict.fromkeys(
        [
            "balanced_stages",
            "cancel",
            "check_values",
            "cluster_info",
            "cond",
            "data_loader",
            "deadline",
            "distribute_tensor",
            "executor_status",
            "function",
            "generate",
            "get",
            "init",
            "init_device_mesh",
            "is_eager",
            "microbatch",
            "parallelize_module",
            "parity",
            "pipeline",
            "profile",
            "program",
            "redistribute",
            "replicate",
            "scan",
            "shutdown",
            "synchronize",
            "while_loop",
        ],
        "torchways.api",
    ),
    "Array": "torchways.array",
    "all_reduce": "torchways.capture.collectives",
    "VirtualSlice": "torchways.mesh",
    "SplitPoint": "torchways.parallel.pipeline",
    "fully_shard": "torchways.parallel.plans",
    "tensor_parallel": "torchways.parallel.plans",
    "Schedule": "torchways.schedules",
}

#: Modules that are part of the interface.
_MODULES = ("checkpoint", "errors")

__all__ = [
    "Array",
    "Schedule",
    "SplitPoint",
    "VirtualSlice",
    "all_reduce",
    "balanced_stages",
    "cancel",
    "check_values",
    "cluster_info",
    "cond",
    "data_loader",
    "deadline",
    "distribute_tensor",
    "executor_status",
    "fully_shard",
    "function",
    "generate",
    "get",
    "init",
    "init_device_mesh",
    "is_eager",
    "microbatch",
    "parallelize_module",
    "parity",
    "pipeline",
    "profile",
    "program",
    "redistribute",
    "replicate",
    "scan",
    "shutdown",
    "synchronize",
    "tensor_parallel",
    "while_loop",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"torchways.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'torchways' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
