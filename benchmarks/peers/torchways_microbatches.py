"""Training steps in microbatches, of a model that torchways has placed: what islands and pipelines have in common."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import training

import torchways as tw

_READ_TIMEOUT = timedelta(minutes=5)


class MicrobatchTrainer:
    """A placed model, an optimizer, and a step of both.

    Args:
        model: takes what it is called with by name.
        meshes: its slices.
        count: microbatches of a batch.
        schedule: their order.
    """

    def __init__(self, model: torch.nn.Module, meshes: Sequence[tw.VirtualSlice], count: int, schedule: str) -> None:
        self._meshes = meshes
        optimizer = torch.optim.AdamW(model.parameters(), lr=training.LEARNING_RATE)

        def forward_backward(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            loss = model(input_ids=input_ids, labels=labels).loss / count
            loss.backward()
            return loss.detach()

        @tw.program
        def step(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            losses = tw.microbatch(forward_backward, input_ids, labels, n_microbatches=count, schedule=schedule)
            optimizer.step()
            optimizer.zero_grad()
            return losses.sum()

        self._step = step

    def run(self, batches: list[dict[str, torch.Tensor]]) -> list[float]:
        losses = [self._step(**batch) for batch in batches]
        tw.synchronize(timeout=_READ_TIMEOUT)  # the last update is over, too
        return [loss.item() for loss in tw.get(losses, timeout=_READ_TIMEOUT)]

    def close(self) -> None:
        del self._step
        for mesh in self._meshes:
            mesh.close()
