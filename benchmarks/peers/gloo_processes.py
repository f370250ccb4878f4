"""Processes of one thread each that train together over gloo: the first speaks the protocol and leads the others.

It tells the others what to do by a broadcast; every process then does its part.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import protocol
import torch
import torch.distributed as dist
import torch.multiprocessing
import training


class MemberTrainer(Protocol):
    """A workload in one of the processes."""

    def steps(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Takes its part in one step for each batch; returns the losses, which only the first process needs."""


#: Makes a process's part of a workload.
MakeTrainer: TypeAlias = Callable[[training.Workload], MemberTrainer]


class LeadingTrainer:
    """The trainer of the first process."""

    def __init__(self, make: MakeTrainer, workload: training.Workload) -> None:
        _tell(("prepare", workload))
        self._trainer = make(workload)

    def run(self, batches: list[dict[str, torch.Tensor]]) -> list[float]:
        _tell(("steps", batches))
        return list(map(float, self._trainer.steps(batches)))

    def about(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        del self._trainer


class GlooProcesses:
    version = f"torch {torch.__version__}"

    def __init__(self, make: MakeTrainer) -> None:
        self._make = make

    def prepare(self, workload: training.Workload, model: torch.nn.Module) -> LeadingTrainer:
        return LeadingTrainer(self._make, workload)


def _tell(what: tuple[str, Any]) -> None:
    dist.broadcast_object_list([what], src=0)


def _join(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def follow(index: int, make: MakeTrainer, size: int, store: str) -> None:
    """The life of each process but the first."""
    protocol.watch_parent()
    _join(index + 1, size, store)
    trainer: MemberTrainer | None = None
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0)
        kind, what = told[0]
        if kind == "prepare":
            trainer = make(what)
        elif kind == "steps":
            assert trainer is not None
            trainer.steps(what)
        else:
            return


@contextmanager
def open_system(make: MakeTrainer, size: int) -> Iterator[GlooProcesses]:
    """Starts the processes; `make` must be the name of something in a module."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        others = torch.multiprocessing.spawn(follow, (make, size, store), nprocs=size - 1, join=False)
        _join(0, size, store)
        yield GlooProcesses(make)
        _tell(("end", None))
        while not others.join():
            pass
        dist.destroy_process_group()
