"""DistributedDataParallel over gloo, a process with one thread for each device: the steps of training.py.

The first process speaks the protocol; it tells the others what to do by a broadcast, and each process takes its part
of each batch. The loss that is reported is the mean over processes.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import protocol
import torch
import torch.distributed as dist
import torch.multiprocessing
import training
from torch.nn.parallel import DistributedDataParallel


class DdpTrainer:
    """A model in every process."""

    def __init__(self, workload: training.Workload) -> None:
        self._workload = workload
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


class LeadingTrainer:
    """The trainer of the first process, which leads the others."""

    def __init__(self, workload: training.Workload) -> None:
        _tell(("prepare", workload))
        self._trainer = DdpTrainer(workload)

    def run(self, batches: list[dict[str, torch.Tensor]]) -> list[float]:
        _tell(("steps", batches))
        return list(map(float, self._trainer.steps(batches)))

    def about(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        del self._trainer


class Ddp:
    version = f"torch {torch.__version__}"

    def prepare(self, workload: training.Workload, model: torch.nn.Module) -> LeadingTrainer:
        return LeadingTrainer(workload)


def _tell(what: tuple[str, Any]) -> None:
    dist.broadcast_object_list([what], src=0)


def _join(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def follow(index: int, size: int, store: str) -> None:
    """The life of each process but the first."""
    protocol.watch_parent()
    _join(index + 1, size, store)
    trainer: DdpTrainer | None = None
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0)
        kind, what = told[0]
        if kind == "prepare":
            trainer = DdpTrainer(what)
        elif kind == "steps":
            assert trainer is not None
            trainer.steps(what)
        else:
            return


@contextmanager
def open_system(size: int) -> Iterator[Ddp]:
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        others = torch.multiprocessing.spawn(follow, (size, store), nprocs=size - 1, join=False)
        _join(0, size, store)
        yield Ddp()
        _tell(("end", None))
        while not others.join():
            pass
        dist.destroy_process_group()


if __name__ == "__main__":
    arguments = protocol.argument_parser(__doc__).parse_args()
    training.serve(lambda: open_system(arguments.devices))
