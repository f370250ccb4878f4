"""Conditions on Python's state under which a trace holds, each with words for what changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from torchways.array import Array
from torchways.capture.state import StateTracker, hyperparameters
from torchways.capture.tracer import Trace


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition: `holds` is asked at every call, `change` only where it does not."""

    holds: Callable[[], bool]
    change: Callable[[], str]


def guards_of(traced: Trace, tracker: StateTracker, lifted: list[Array]) -> list[Guard]:
    """Returns the conditions under which a trace holds.

    Args:
        traced: it.
        tracker: state that it touched.
        lifted: arrays that it read.
    """
    slots = {id(slot.owner) for slot in tracker.slots if isinstance(slot.owner, torch.Tensor)}
    without_grad = [array for array in lifted if array.requires_grad and (array.grad is None or id(array) in slots)]
    with_grad = [(array, array.grad) for array in lifted if array.requires_grad and isinstance(array.grad, Array)]
    guards = [
        Guard(
            lambda: all(array.grad is None for array in without_grad),
            lambda: _gradients([array for array in without_grad if array.grad is not None], "has a gradient, had none"),
        ),
        Guard(
            lambda: all(array.grad is grad for array, grad in with_grad),
            lambda: _gradients(
                [array for array, grad in with_grad if array.grad is not grad], "has another gradient than before"
            ),
        ),
    ]
    if not any(isinstance(slot.owner, dict) for slot in tracker.slots):
        for optimizer in tracker.optimizers:
            read = functools.partial(hyperparameters, optimizer)
            guards.append(_unchanged(read, functools.partial(_hyperparameter_change, optimizer)))
    else:  # this run makes the optimizer's state: it is for the first step only
        for slot in tracker.slots:
            if isinstance(slot.owner, dict):
                change = f"the optimizer has state {slot.key!r} now, which the first step made"
                guards.append(Guard(functools.partial(_lacks, slot.owner, slot.key), functools.partial(str, change)))
                break
    for module in dict.fromkeys(traced.modules):
        read_flags = functools.partial(_training_flags, module)
        guards.append(_unchanged(read_flags, functools.partial(_training_change, module)))
    return guards


def _unchanged(read: Callable[[], Any], change: Callable[[Any], str]) -> Guard:
    """Returns the condition that what `read` returns stays what it is now."""
    value = read()
    return Guard(lambda: bool(read() == value), lambda: change(value))


def _gradients(arrays: list[Array], what: str) -> str:
    others = f" (and {len(arrays) - 1} more)" if len(arrays) > 1 else ""
    return f"a parameter of shape {list(arrays[0].shape)}{others} {what}"


def _hyperparameter_change(optimizer: torch.optim.Optimizer, before: tuple[Any, ...]) -> str:
    name = type(optimizer).__name__
    (old_groups, old_state, old_counts), (groups, state, counts) = before, hyperparameters(optimizer)
    if len(groups) != len(old_groups) or counts != old_counts:
        return f"{name} has {len(groups)} parameter groups of {list(counts)} parameters, had {list(old_counts)}"
    for number, (now, was) in enumerate(zip(map(dict, groups), map(dict, old_groups), strict=True)):
        for key in now.keys() | was.keys():
            if now.get(key) != was.get(key):
                return f"{key} of {name}'s group {number} is {now.get(key)!r}, was {was.get(key)!r}"
    return f"{name} has state for {state} parameters, had for {old_state}"


def _lacks(state: dict[str, Any], key: str) -> bool:
    return not isinstance(state.get(key), Array)


def _training_flags(module: torch.nn.Module) -> list[bool]:
    return [item.training for item in module.modules()]


def _training_change(module: torch.nn.Module, before: list[bool]) -> str:
    modes = {True: "training", False: "evaluation"}
    for (name, item), was in zip(module.named_modules(), before, strict=False):
        if item.training != was:
            where = f"{name} of {type(module).__name__}" if name else type(module).__name__
            return f"{where} is in {modes[item.training]} mode, was in {modes[was]} mode"
    return f"{type(module).__name__} has {len(_training_flags(module))} submodules, had {len(before)}"
