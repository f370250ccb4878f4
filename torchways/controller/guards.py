"""Conditions under which a trace holds, on Python's state and a call's host tensors; each says what changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.array import Array
from torchways.capture.known_values import ArgumentRead
from torchways.capture.state import StateTracker, hyperparameters
from torchways.capture.tracer import Trace
from torchways.controller.signatures import Signature, named_leaves


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition: `holds` is asked at every call, `change` only where it does not. Both are told the call."""

    holds: Callable[[Signature], bool]
    change: Callable[[Signature], str]


def guards_of(function: Callable[..., Any], traced: Trace, tracker: StateTracker, lifted: list[Array]) -> list[Guard]:
    """Returns the conditions under which a trace holds.

    Args:
        function: that was traced.
        traced: it.
        tracker: state that it touched.
        lifted: arrays that it read.
    """
    slots = {id(slot.owner) for slot in tracker.slots if isinstance(slot.owner, torch.Tensor)}
    without_grad = [array for array in lifted if array.requires_grad and (array.grad is None or id(array) in slots)]
    with_grad = [(array, array.grad) for array in lifted if array.requires_grad and isinstance(array.grad, Array)]
    guards = [
        Guard(
            lambda _: all(array.grad is None for array in without_grad),
            lambda _: _gradients(
                [array for array in without_grad if array.grad is not None], "has a gradient, had none"
            ),
        ),
        Guard(
            lambda _: all(array.grad is grad for array, grad in with_grad),
            lambda _: _gradients(
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
                guards.append(Guard(functools.partial(_lacks, slot.owner, slot.key), functools.partial(_text, change)))
                break
    for module in dict.fromkeys(traced.modules):
        read_flags = functools.partial(_training_flags, module)
        guards.append(_unchanged(read_flags, functools.partial(_training_change, module)))
    guards += [
        Guard(functools.partial(_reads_same, read), functools.partial(_read_change, read, function))
        for read in traced.reads
    ]
    return guards


def _unchanged(read: Callable[[], Any], change: Callable[[Any], str]) -> Guard:
    """Returns the condition that what `read` returns stays what it is now."""
    value = read()
    return Guard(lambda _: bool(read() == value), lambda _: change(value))


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


def _text(text: str, _: Signature) -> str:
    return text


def _lacks(state: dict[str, Any], key: str, _: Signature) -> bool:
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


def _reads_same(read: ArgumentRead, signature: Signature) -> bool:
    return read.is_same(signature.tensors)


def _read_change(read: ArgumentRead, function: Callable[..., Any], signature: Signature) -> str:
    names = [name for name, _ in named_leaves(function, signature.arguments)]
    arguments = " and ".join(names[signature.tensor_positions[position]] for position in read.positions)
    return f"what {read.line} reads of {arguments} is {_short(read.again(signature.tensors))}, was {_short(read.value)}"


def _short(value: Any) -> str:
    text = repr(pytree.tree_map_only(torch.Tensor, torch.Tensor.tolist, value))
    return text if len(text) <= 60 else f"{text[:57]}..."
