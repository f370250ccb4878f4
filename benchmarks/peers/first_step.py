"""The first training step of a model, by one system: seconds from the call to the loss on the host.

Systems: torchways (a slice of one device that is ready), lazy and compiled (plain torch-xla, its device ready),
inductor (torch.compile), eager. A model is used once: what a process has compiled of one size serves no other.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import protocol
import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY, LENGTH, BATCH, HEADS = 256, 32, 2, 4


class Block(nn.Module):
    """A layer of a decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.attention(self.before_attention(x)).view(batch, length, 3, HEADS, width // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(found.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class Decoder(nn.Module):
    """A small language model."""

    def __init__(self, layers: int, width: int = 64) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.layers = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.layers(self.tokens(tokens) + self.positions(positions))))


def model_and_batch(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Returns a model ("resnet18", or a decoder's number of layers), its inputs and targets."""
    torch.manual_seed(0)
    if name == "resnet18":
        from torchvision.models import resnet18

        return resnet18(num_classes=10), torch.randn(2, 3, 64, 64), torch.tensor([1, 7])
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    return Decoder(int(name)), tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)


def make_step(model: nn.Module, optimizer: Any, forward: Callable[..., Any], update: Callable[[], Any]) -> Any:
    """Returns a training step."""

    def train_step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(forward(inputs).view(targets.shape[0], -1), targets)
        optimizer.zero_grad()
        loss.backward()
        update()
        return loss.detach()

    return train_step


class _Phases(logging.Handler):
    """Reads what a session says of a program's first run."""

    seconds: dict[str, float]

    def emit(self, record: logging.LogRecord) -> None:
        if found := dict(re.findall(r"(traced|compiled|first run) ([0-9.]+) s", record.getMessage())):
            self.seconds = {name: float(text) for name, text in found.items()}


class Torchways:
    def __init__(self) -> None:
        import torchways as tw

        self.version = f"torchways {tw.__version__}"
        tw.init(islands=1, devices_per_island=1)
        log = logging.getLogger("torchways.controller.session")
        log.setLevel(logging.INFO)
        log.addHandler(phases := _Phases())
        self.phases = phases
        self._tw, self._mesh = tw, tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        tw.function(lambda x: x + 1, mesh=self._mesh)(torch.ones(2)).cpu()  # the slice is ready

    def first_step(self, name: str, turns: int) -> list[float]:
        model, inputs, targets = model_and_batch(name)
        model = self._tw.function(model, mesh=self._mesh)
        step = make_step(model, optimizer := torch.optim.AdamW(model.parameters()), model, optimizer.step)
        return timed(self._tw.program(step), inputs, targets, turns)


class TorchXla:
    def __init__(self, is_compiled: bool) -> None:
        from torchways.launch.environment import executor_environment

        os.environ.update(executor_environment("cpu", range(1), os.environ))
        import torch_xla

        self.version = f"torch-xla {torch_xla.__version__}"
        self._xla, self._is_compiled = torch_xla, is_compiled
        torch.ones(2).to(torch_xla.device()).cpu()

    def first_step(self, name: str, turns: int) -> list[float]:
        model, inputs, targets = model_and_batch(name)
        model = model.to(self._xla.device())
        optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
        inputs, targets = inputs.to(self._xla.device()), targets.to(self._xla.device())
        self._xla.sync(wait=True)
        forward: Any = torch.compile(model, backend="openxla") if self._is_compiled else model
        step = make_step(model, optimizer, forward, optimizer.step)

        def synced(*batch: torch.Tensor) -> torch.Tensor:
            loss = step(*batch)
            self._xla.sync()
            return loss

        return timed(synced, inputs, targets, turns)


class Plain:
    version = f"torch {torch.__version__}"

    def __init__(self, is_compiled: bool) -> None:
        self._is_compiled = is_compiled

    def first_step(self, name: str, turns: int) -> list[float]:
        model, inputs, targets = model_and_batch(name)
        optimizer = torch.optim.AdamW(model.parameters())
        forward: Any = torch.compile(model) if self._is_compiled else model
        return timed(make_step(model, optimizer, forward, optimizer.step), inputs, targets, turns)


def timed(step: Any, inputs: torch.Tensor, targets: torch.Tensor, turns: int) -> list[float]:
    """Returns the seconds of each of the first steps, with the loss read."""
    seconds = []
    for _ in range(turns):
        started = time.monotonic()
        step(inputs, targets).item()
        seconds.append(time.monotonic() - started)
    return seconds


SYSTEMS: dict[str, Callable[[], Any]] = {
    "torchways": Torchways,
    "lazy": lambda: TorchXla(False),
    "compiled": lambda: TorchXla(True),
    "inductor": lambda: Plain(True),
    "eager": lambda: Plain(False),
}


@contextmanager
def opened(name: str) -> Iterator[Any]:
    yield SYSTEMS[name]()
    os._exit(0)  # at its usual end, torch-xla may hang


def answer(system: Any, ask: dict[str, Any]) -> dict[str, Any]:
    seconds = system.first_step(ask["model"], ask["turns"])
    phases = getattr(system, "phases", None)
    return {"seconds": seconds, **({"phases": phases.seconds} if phases is not None else {})}


def main() -> None:
    parser = protocol.argument_parser(__doc__)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    name = parser.parse_args().system
    protocol.converse(lambda: opened(name), answer)


if __name__ == "__main__":
    main()
