"""torchways: the training steps of training.py, on one slice of CPU devices.

The model is placed by `tw.parallelize_module`, and a step is one call of a `tw.program`. Calls are not waited for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import protocol
import torch
import training

import torchways as tw

_READ_TIMEOUT = timedelta(minutes=5)


class SliceTrainer:
    """A model on a slice of its own."""

    def __init__(self, workload: training.Workload, model: torch.nn.Module) -> None:
        self._mesh = tw.init_device_mesh(workload.mesh, mesh_dim_names=training.AXES)
        tw.parallelize_module(model, self._mesh, training.plan_of(model, workload, self._mesh))
        optimizer = torch.optim.AdamW(model.parameters(), lr=training.LEARNING_RATE)

        @tw.program
        def step(**batch: torch.Tensor) -> torch.Tensor:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        self._step = step

    def run(self, batches: list[dict[str, torch.Tensor]]) -> list[float]:
        losses = [self._step(**batch) for batch in batches]
        tw.synchronize(timeout=_READ_TIMEOUT)  # the last update is over, too
        return [loss.item() for loss in tw.get(losses, timeout=_READ_TIMEOUT)]

    def about(self) -> dict[str, Any]:
        return {"computations": str(self._step).count(" compute @"), "traces": self._step.num_traces}

    def close(self) -> None:
        del self._step
        self._mesh.close()


class Torchways:
    version = f"torchways {tw.__version__}"

    def prepare(self, workload: training.Workload, model: torch.nn.Module) -> SliceTrainer:
        return SliceTrainer(workload, model)


@contextmanager
def open_system(devices: int) -> Iterator[Torchways]:
    with tw.init(islands=1, devices_per_island=devices):
        yield Torchways()


if __name__ == "__main__":
    arguments = protocol.argument_parser(__doc__).parse_args()
    training.serve(lambda: open_system(arguments.devices))
