"""torchways: the training steps of training.py, on a replica of the model on each of two islands.

The model is placed by `tw.replicate`. Each island computes the loss of its half of a batch, in `tw.microbatch`. The
first steps, before any is counted, are traced for the bytes that an island sends.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import protocol
import torch
import training
from torchways_microbatches import MicrobatchTrainer

import torchways as tw

_ISLANDS = 2


class ReplicaTrainer(MicrobatchTrainer):
    """A model on a slice of each island."""

    def __init__(self, workload: training.Workload, model: torch.nn.Module) -> None:
        (dp, tp), self._gradient_bytes = workload.mesh, 4 * sum(parameter.numel() for parameter in model.parameters())
        meshes = [
            tw.init_device_mesh((dp // _ISLANDS, tp), mesh_dim_names=training.AXES, island=island)
            for island in range(_ISLANDS)
        ]
        tw.replicate(model, meshes, plan=training.plan_of(model, workload, meshes[0]))
        super().__init__(model, meshes, _ISLANDS, "1F1B")
        self._traffic = 0.0

    def run(self, batches: list[dict[str, torch.Tensor]]) -> list[float]:
        if self._traffic:
            return super().run(batches)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            with tw.profile(path):
                losses = super().run(batches)
            self._traffic = _sent(json.loads(path.read_text())) / len(batches) / self._gradient_bytes
        return losses

    def about(self) -> dict[str, Any]:
        return {
            "computations": str(self._step).count(" compute @"),
            "traces": self._step.num_traces,
            "traffic": self._traffic,
        }


def _sent(trace: dict[str, Any]) -> int:
    """Returns the bytes that the island which sends most sent to the other, by a trace; an island is one executor."""
    sent: Counter[int] = Counter()
    for event in trace["traceEvents"]:
        sent[event["pid"]] += event.get("args", {}).get("sent_bytes", 0)  # arrows have none
    return max(sent.values())


class TorchwaysIslands:
    version = f"torchways {tw.__version__}"

    def prepare(self, workload: training.Workload, model: torch.nn.Module) -> ReplicaTrainer:
        return ReplicaTrainer(workload, model)


@contextmanager
def open_system(devices: int) -> Iterator[TorchwaysIslands]:
    with tw.init(islands=_ISLANDS, devices_per_island=devices // _ISLANDS):
        yield TorchwaysIslands()


if __name__ == "__main__":
    arguments = protocol.argument_parser(__doc__).parse_args()
    training.serve(lambda: open_system(arguments.devices))
