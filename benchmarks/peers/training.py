"""The training steps that benchmarks/spmd.py, islands.py and pipeline.py compare: models, data, splits, requests.

A *workload* is a model of `transformers`, a batch, a mesh of CPU devices and a plan of how parameters are split. A
*step* is forward, backward and an update by `torch.optim.AdamW`, on a batch that comes from the host. All systems draw
the same weights and the same batches, and report the loss of every step.

Lines
    A worker says `{"ready": true, "version": "..."}`, then answers each line of its stdin with one line:

    {"workload": {...}, "steps": K}
        -> {"seconds": s, "losses": [...], "tokens": of a step, "parameters": of the model, ...}
                                          of K steps; the clock stops when the last one is over
        -> {"error": "what went wrong"}

    A request for another workload than the last drops the last one, builds the new one and runs `WARM_UP_STEPS` of it,
    whose losses come first in the answer. Steps go on from where the request before ended.
"""

import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import protocol
import torch
import transformers

from torchways.mesh import VirtualSlice
from torchways.parallel.plans import Plan, fully_shard, tensor_parallel
from torchways.schedules import make_schedule

#: Steps before any is counted: torch-xla compiles the first three or so anew, until shardings stay as they are.
WARM_UP_STEPS = 4
AXES = ("dp", "tp")
VOCABULARY = 512
LEARNING_RATE = 1e-3
_SEED = 0

#: Width, layers (of the encoder and of the decoder each, in T5) and heads of each size.
SIZES = {
    "nano": (32, 1, 2),
    "micro": (64, 2, 4),
    "tiny": (128, 2, 4),
    "mini": (192, 4, 4),
    "small": (256, 4, 4),
}


@dataclass(frozen=True)
class Workload:
    """What one row of the table is about.

    Attributes:
        model: "t5", an encoder-decoder, or "llama", a decoder-only language model.
        size: of `SIZES`.
        batch: sequences in a step, over all devices.
        length: tokens in a sequence; T5's input and its output each have as many.
        mesh: sizes of the axes `AXES`.
        plan: "data", "full" (fully sharded), "tensor" or "full x tensor".
        num_microbatches: that a pipeline splits a batch into; systems without a pipeline take whole batches.
        schedule: of the pipeline.
    """

    model: str
    size: str
    batch: int
    length: int
    mesh: tuple[int, int]
    plan: str
    num_microbatches: int = 1
    schedule: str = ""

    @property
    def tokens(self) -> int:
        """Tokens in a step: all that the model reads and predicts."""
        return self.batch * self.length * (2 if self.model == "t5" else 1)


def build_model(workload: Workload) -> torch.nn.Module:
    """Returns the model in training mode, on the CPU, with the weights that all systems begin with; without dropout."""
    width, layers, heads = SIZES[workload.size]
    torch.manual_seed(_SEED)
    if workload.model == "t5":
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=width,
            d_kv=width // heads,
            d_ff=4 * width,
            num_layers=layers,
            num_heads=heads,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            use_cache=False,
        )
        return transformers.T5ForConditionalGeneration(config).train()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2 * layers,
        num_attention_heads=heads,
        max_position_embeddings=workload.length,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def batches(workload: Workload, first: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Returns the batches of steps `first`, `first + 1`, ...: the model's arguments, int64 of [batch, length]."""
    made = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        shape = (workload.batch, workload.length)
        ids = torch.randint(1, VOCABULARY, shape, generator=generator)
        labels = torch.randint(1, VOCABULARY, shape, generator=generator) if workload.model == "t5" else ids
        made.append({"input_ids": ids, "labels": labels})
    return made


def plan_of(model: torch.nn.Module, workload: Workload, mesh: VirtualSlice) -> Plan:
    """Returns how the parameters are split over `mesh`."""
    plan: Plan = {}
    if "tensor" in workload.plan:
        plan = tensor_parallel(model, mesh)
    if "full" in workload.plan:
        plan = fully_shard(model, mesh, plan=plan)
    return plan


def slices_of_stages(schedule: str, num_slices: int, num_microbatches: int) -> list[int]:
    """Returns the slice, or process, of each stage of a pipeline; a slice has two stages where the schedule allows."""
    num_stages = num_slices if schedule in ("GPipe", "1F1B") else 2 * num_slices
    found = make_schedule(schedule, num_stages, num_slices, num_microbatches).slice_of_stage
    return [found[stage] for stage in range(num_stages)]


def first_layers(num_layers: int, num_stages: int) -> list[int]:
    """Returns the number of the layer that each stage begins with; stages have as many layers, or nearly."""
    if num_stages > num_layers:
        raise ValueError(f"{num_layers} layers cannot be split into {num_stages} stages")
    return [stage * num_layers // num_stages for stage in range(num_stages)]


class Trainer(Protocol):
    """A workload, ready to run."""

    def run(self, batches: list[dict[str, torch.Tensor]]) -> list[float]:
        """Takes one step for each batch; returns the losses when all steps are over, with their updates."""

    def about(self) -> dict[str, Any]:
        """What else to report of the last `run`."""

    def close(self) -> None:
        """Gives up all that it holds."""


class System(Protocol):
    """A system under test."""

    version: str

    def prepare(self, workload: Workload, model: torch.nn.Module) -> Trainer:
        """Places a model that is on the CPU, and makes its optimizer."""


class _Worker:
    """Answers requests; holds one workload at a time."""

    def __init__(self) -> None:
        self._workload: Workload | None = None
        self._trainer: Trainer | None = None
        self._steps = self._parameters = 0

    def answer(self, system: System, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._measure(system, request)
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}

    def _measure(self, system: System, request: dict[str, Any]) -> dict[str, Any]:
        workload = Workload(**{**request["workload"], "mesh": tuple(request["workload"]["mesh"])})
        losses: list[float] = []
        if workload != self._workload:
            if self._trainer is not None:
                self._trainer.close()
            self._workload, self._steps = workload, 0
            model = build_model(workload)
            self._parameters = sum(parameter.numel() for parameter in model.parameters())
            self._trainer = system.prepare(workload, model)
            losses = self._run(WARM_UP_STEPS)[0]
        found, seconds = self._run(int(request["steps"]))
        assert self._trainer is not None
        size = {"tokens": workload.tokens, "parameters": self._parameters}
        return {"seconds": seconds, "losses": losses + found, **size, **self._trainer.about()}

    def _run(self, steps: int) -> tuple[list[float], float]:
        assert self._trainer is not None
        assert self._workload is not None
        data = batches(self._workload, self._steps, steps)
        self._steps += steps
        begin = time.perf_counter()
        losses = self._trainer.run(data)
        return losses, time.perf_counter() - begin


def serve(open_system: Callable[[], AbstractContextManager[System]]) -> None:
    """Runs a worker until EOF."""
    worker = _Worker()
    protocol.converse(open_system, worker.answer)
