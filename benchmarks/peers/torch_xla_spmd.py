"""Plain torch-xla SPMD, one process with several CPU devices: the training steps of training.py.

As torch-xla's SPMD guide has it: parameters and inputs are marked with how they are split over a mesh, the step is
traced lazily, and `torch_xla.sync()` compiles and launches it, without waiting. On one device nothing is marked.

With `--compiled`, forward and backward, and the optimizer's step, are compiled by `torch.compile(backend="openxla")`:
nothing is traced anew at each step, which is three computations. (The first step is lazy: where the compiled update
is what makes the optimizer's state, torch-xla 2.9 trains to other losses.)
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import protocol

from torchways.launch.environment import executor_environment

# Of the process as our executors have it; read when torch_xla is imported.
os.environ.update(executor_environment("cpu", range(protocol.num_devices()), os.environ))

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as metrics
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
import training

from torchways.mesh import VirtualSlice
from torchways.parallel.plans import placements_of

_DEVICES = protocol.num_devices()


class SpmdTrainer:
    """A model on the devices."""

    def __init__(self, workload: training.Workload, model: Any, is_compiled: bool) -> None:
        self._mesh = xs.Mesh(np.arange(_DEVICES), workload.mesh, training.AXES) if _DEVICES > 1 else None
        mesh = VirtualSlice(shape=workload.mesh, mesh_dim_names=training.AXES)
        placements = placements_of(model, mesh, training.plan_of(model, workload, mesh))
        self._model = model.to(torch_xla.device())
        self._model.tie_weights()  # `.to` makes several parameters of one that is shared
        for name, parameter in self._model.named_parameters():
            self._mark(parameter, _partition_spec(placements[name], parameter.dim()))
        # The step count on the device, so that no Python number of a step has to be sent there.
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=training.LEARNING_RATE, capturable=True)
        self._forward = torch.compile(self._model, backend="openxla") if is_compiled else self._model
        self._update: Callable[[], Any] = self._optimizer.step
        self._later_update = torch.compile(self._update, backend="openxla") if is_compiled else self._update
        self._compilations = 0
        torch_xla.sync(wait=True)

    def run(self, batches: list[dict[str, torch.Tensor]]) -> list[float]:
        before = _compilations()
        losses = []
        for batch in batches:
            losses.append(self._step(batch))
            torch_xla.sync()
            self._update = self._later_update
        found = [loss.item() for loss in losses]
        xm.wait_device_ops()  # the last backward pass and update are over, too
        self._compilations = _compilations() - before
        return found

    def _step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        placed = {name: tensor.to(torch_xla.device()) for name, tensor in batch.items()}
        for tensor in placed.values():
            self._mark(tensor, ("dp", None))
        loss = self._forward(**placed).loss
        loss.backward()
        self._update()
        self._optimizer.zero_grad()
        return loss.detach()

    def _mark(self, tensor: torch.Tensor, spec: tuple[Any, ...]) -> None:
        if self._mesh is not None:
            xs.mark_sharding(tensor, self._mesh, spec)

    def about(self) -> dict[str, Any]:
        return {"compilations": self._compilations}

    def close(self) -> None:
        del self._model, self._optimizer, self._forward, self._update, self._later_update
        torch._dynamo.reset()
        torch_xla.sync(wait=True)


def _partition_spec(placements: tuple[str, ...], ndim: int) -> tuple[Any, ...]:
    """Returns torch-xla's form of placements: for each dimension, the mesh axes that split it."""
    axes: list[list[str]] = [[] for _ in range(ndim)]
    for axis, text in zip(training.AXES, placements, strict=True):
        if text != "R":
            axes[int(text[2:-1])].append(axis)
    return tuple(None if not names else names[0] if len(names) == 1 else tuple(names) for names in axes)


def _compilations() -> int:
    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0


class TorchXla:
    version = f"torch-xla {torch_xla.__version__}, torch {torch.__version__}"

    def __init__(self, is_compiled: bool) -> None:
        self._is_compiled = is_compiled

    def prepare(self, workload: training.Workload, model: torch.nn.Module) -> SpmdTrainer:
        return SpmdTrainer(workload, model, self._is_compiled)


@contextmanager
def open_system(is_compiled: bool) -> Iterator[TorchXla]:
    if _DEVICES > 1:
        xr.use_spmd()
    yield TorchXla(is_compiled)
    os._exit(0)  # at its usual end, torch-xla may hang


if __name__ == "__main__":
    parser = protocol.argument_parser(__doc__)
    parser.add_argument("--compiled", action="store_true", help="by torch.compile")
    arguments = parser.parse_args()
    training.serve(lambda: open_system(arguments.compiled))
