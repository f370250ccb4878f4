"""Plain eager PyTorch on the CPU, with all its threads and no devices to share the batch: the steps of training.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import protocol
import torch
import training


class EagerTrainer:
    """A model in this process."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=training.LEARNING_RATE)

    def run(self, batches: list[dict[str, torch.Tensor]]) -> list[float]:
        return [self._step(batch) for batch in batches]

    def _step(self, batch: dict[str, torch.Tensor]) -> float:
        loss = self._model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def about(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        del self._model, self._optimizer


class Eager:
    version = f"torch {torch.__version__}"

    def prepare(self, workload: training.Workload, model: torch.nn.Module) -> EagerTrainer:
        return EagerTrainer(model)


@contextmanager
def open_system() -> Iterator[Eager]:
    yield Eager()


if __name__ == "__main__":
    protocol.argument_parser(__doc__).parse_args()
    training.serve(open_system)
