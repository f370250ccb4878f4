"""torchways: the training steps of training.py, in a pipeline over slices of one CPU device each.

The model is split by `tw.pipeline`, into stages of as many layers, and a batch by `tw.microbatch`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import protocol
import torch
import training
from torchways_microbatches import MicrobatchTrainer

import torchways as tw


class PipelineTrainer(MicrobatchTrainer):
    """A model whose stages are on slices of their own."""

    def __init__(self, workload: training.Workload, model: torch.nn.Module, num_slices: int) -> None:
        count, schedule = workload.num_microbatches, workload.schedule
        meshes = [tw.init_device_mesh((1,), mesh_dim_names=("dp",)) for _ in range(num_slices)]
        homes = training.slices_of_stages(schedule, num_slices, count)
        firsts = training.first_layers(len(model.model.layers), len(homes))
        split = {f"model.layers.{first}": tw.SplitPoint.BEGINNING for first in firsts[1:]}
        tw.pipeline(model, split_spec=split, meshes=[meshes[home] for home in homes])
        super().__init__(model, meshes, count, schedule)

    def about(self) -> dict[str, Any]:
        [loop] = self._step.report().loops
        return {"traces": self._step.num_traces, "stages": len(loop.stages), "bubble": loop.measured_bubble}


class TorchwaysPipeline:
    version = f"torchways {tw.__version__}"

    def __init__(self, num_slices: int) -> None:
        self._num_slices = num_slices

    def prepare(self, workload: training.Workload, model: torch.nn.Module) -> PipelineTrainer:
        return PipelineTrainer(workload, model, self._num_slices)


@contextmanager
def open_system(num_slices: int) -> Iterator[TorchwaysPipeline]:
    with tw.init(islands=1, devices_per_island=num_slices):
        yield TorchwaysPipeline(num_slices)


if __name__ == "__main__":
    arguments = protocol.argument_parser(__doc__).parse_args()
    training.serve(lambda: open_system(arguments.devices))
