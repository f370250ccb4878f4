"""Schedules of pipelines on simulated devices, which wait instead of computing: bubbles, and traces for pictures.

Everything but the devices is real: controller, schedulers, executors and transfers between them. How long a pass takes
is chosen, so slices on one machine do not share its cores for computations.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchways as tw
from benchmarks.timelines import LaneTimes, lane_times
from torchways.mesh import VirtualSlice
from torchways.runtime.simulated import FLOPS_VARIABLE
from torchways.schedules import make_schedule

#: Layers of the model on each slice: schedules with two stages on a slice have one in each stage.
LAYERS_EACH = 2
#: Microbatches for each slice.
MICROBATCHES_EACH = 4
_WIDTH, _ROWS = 8, 2
#: Of a layer's forward pass; its input gradients and its weight gradients are as many.
_FLOPS = 2 * _ROWS * _WIDTH * _WIDTH
_START_TIMEOUT, _READ_TIMEOUT = timedelta(minutes=5), timedelta(minutes=5)
#: Schedules compute the same; only the order in which gradients are added up differs.
_TOLERANCE = 1e-5


class Layer(nn.Module):
    """One matrix product. The gain needs a gradient behind it, so the first stage computes as much as any other."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(_WIDTH))
        self.linear = nn.Linear(_WIDTH, _WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x * self.gain))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A schedule on a number of slices."""

    schedule: str
    num_slices: int
    num_microbatches: int

    @property
    def slice_of_stage(self) -> dict[int, int]:
        """The slice of each stage."""
        num_stages = self.num_slices * (1 if self.schedule in ("GPipe", "1F1B") else LAYERS_EACH)
        return make_schedule(self.schedule, num_stages, self.num_slices, self.num_microbatches).slice_of_stage


@contextlib.contextmanager
def simulated_slices(count: int, pass_seconds: float) -> Iterator[list[VirtualSlice]]:
    """Starts slices of one simulated device each.

    Args:
        count: of them.
        pass_seconds: what the forward pass of a slice's layers takes; input and weight gradients take as long each.
    """
    before = os.environ.get(FLOPS_VARIABLE)
    os.environ[FLOPS_VARIABLE] = str(LAYERS_EACH * _FLOPS / pass_seconds)
    try:
        with tw.init(islands=1, devices_per_island=count, platform="simulated", start_timeout=_START_TIMEOUT):
            yield [tw.init_device_mesh((1,), mesh_dim_names=("dp",)) for _ in range(count)]
    finally:
        del os.environ[FLOPS_VARIABLE]
        if before is not None:
            os.environ[FLOPS_VARIABLE] = before


class Pipeline:
    """The model and its training step, by a setting."""

    def __init__(self, setting: Setting, slices: Sequence[VirtualSlice]) -> None:
        self.setting = setting
        homes, count = setting.slice_of_stage, setting.num_microbatches
        torch.manual_seed(0)
        layers = [Layer() for _ in range(LAYERS_EACH * setting.num_slices)]
        each = len(layers) // len(homes)
        model = tw.pipeline(
            nn.Sequential(*layers),
            split_spec={str(stage * each): tw.SplitPoint.BEGINNING for stage in range(1, len(homes))},
            meshes=[slices[homes[stage]] for stage in range(len(homes))],
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def forward_backward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            loss = (model(x) - y).square().mean() / count
            loss.backward()
            return loss.detach()

        @tw.program
        def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            losses = tw.microbatch(forward_backward, x, y, n_microbatches=count, schedule=setting.schedule)
            optimizer.step()
            optimizer.zero_grad()
            return losses.sum()

        self._step = step
        self._batch = torch.randn(2, count * _ROWS, _WIDTH, generator=torch.Generator().manual_seed(1)).unbind()

    def run(self) -> float:
        """Takes a step; returns its loss."""
        return self._step(*self._batch).cpu(timeout=_READ_TIMEOUT).item()

    def trace(self) -> LaneTimes:
        """Takes a step; returns what it looked like."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            with tw.profile(path):
                self.run()
            return lane_times(json.loads(path.read_text()), self.setting.slice_of_stage)

    def report(self) -> Any:
        """Returns the report of its loop over recent steps."""
        [loop] = self._step.report().loops
        return loop


def measure(
    schedules: Sequence[str], slice_counts: Sequence[int], calls: int, pass_seconds: float
) -> list[dict[str, Any]]:
    """Runs schedules on numbers of slices; returns a row for each.

    Args:
        schedules: names.
        slice_counts: numbers of slices.
        calls: of each, after a first one that compiles.
        pass_seconds: see `simulated_slices`.

    Raises:
        SystemExit: schedules do not compute the same.
    """
    rows = []
    with simulated_slices(max(slice_counts), pass_seconds) as slices:
        for count in slice_counts:
            losses: dict[str, list[float]] = {}
            for name in schedules:
                setting = Setting(schedule=name, num_slices=count, num_microbatches=MICROBATCHES_EACH * count)
                row, losses[name] = _row(Pipeline(setting, slices[:count]), calls)
                rows.append(row)
                print(f"simulated: {row}", file=sys.stderr, flush=True)
            _check_losses(losses)
    return rows


def _row(pipeline: Pipeline, calls: int) -> tuple[dict[str, Any], list[float]]:
    started = time.perf_counter()
    losses = [pipeline.run()]
    first_seconds = time.perf_counter() - started
    losses += [pipeline.run() for _ in range(calls)]
    found = pipeline.report()
    setting = pipeline.setting
    return {
        "schedule": setting.schedule,
        "slices": setting.num_slices,
        "stages": len(setting.slice_of_stage),
        "microbatches": setting.num_microbatches,
        "theoretical_bubble": found.theoretical_bubble,
        "predicted_ms": found.predicted_us / 1e3,
        "predicted_bubble": found.predicted_bubble,
        "measured_ms": found.measured_us / 1e3,
        "measured_bubble": found.measured_bubble,
        "transfer_ms": found.transfer_us / 1e3,
        "calls": found.num_calls,
        "first_step_s": first_seconds,
    }, losses


def _check_losses(losses: Mapping[str, Sequence[float]]) -> None:
    """Ends the benchmark where schedules computed different losses."""
    (first, expected), *others = losses.items()
    for name, found in others:
        if not all(math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in zip(found, expected, strict=True)):
            sys.exit(f"{name} does not compute what {first} does: losses {found}, not {expected}")


def trace_schedules(
    schedules: Sequence[str], num_slices: int, num_microbatches: int, pass_seconds: float
) -> list[tuple[str, LaneTimes]]:
    """Runs schedules; returns what one step of each, after the first, looked like."""
    runs = []
    with simulated_slices(num_slices, pass_seconds) as slices:
        for name in schedules:
            pipeline = Pipeline(
                Setting(schedule=name, num_slices=num_slices, num_microbatches=num_microbatches), slices
            )
            pipeline.run()
            runs.append((name, pipeline.trace()))
    return runs
