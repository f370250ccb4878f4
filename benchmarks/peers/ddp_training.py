"""DistributedDataParallel over gloo, a process with one thread for each device: the steps of training.py.

Each process takes its part of each batch. The loss that is reported is the mean over processes.
"""

import gloo_processes
import protocol
import torch
import torch.distributed as dist
import training
from torch.nn.parallel import DistributedDataParallel


class DdpTrainer:
    """A model in every process."""

    def __init__(self, workload: training.Workload) -> None:
        model = training.build_model(workload)
        self._model = DistributedDataParallel(model)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=training.LEARNING_RATE)

    def steps(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        losses = torch.stack([self._step(batch) for batch in batches])
        dist.reduce(losses, dst=0)
        return losses / dist.get_world_size()

    def _step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rank, size = dist.get_rank(), dist.get_world_size()
        loss: torch.Tensor = self._model(**{name: tensor.chunk(size)[rank] for name, tensor in batch.items()}).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()


if __name__ == "__main__":
    arguments = protocol.argument_parser(__doc__).parse_args()
    training.serve(lambda: gloo_processes.open_system(DdpTrainer, arguments.devices))
