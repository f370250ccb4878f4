"""Packed sequences and recurrent layers on them, in shapes that do not depend on the lengths.

`pack_padded_sequence` drops the elements behind the end of each sequence; how many are left depends on the lengths.
Here they are rows that a mask selects (`rows/rules.py`), in the order in which a packed sequence has them. A recurrent
layer puts them back in their places and goes through all time steps; a sequence that has not begun or is over keeps its
state. The maximum of the lengths is read, and results have its size: one graph serves all lengths with that maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF
from torch.overrides import TorchFunctionMode

from torchways.capture.rows.ragged_tensors import RaggedTensors

#: One step of a layer: the input's part of the gates, the state, the weights for the state; returns the new state.
Cell = Callable[[torch.Tensor, Sequence[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]], list[torch.Tensor]]


class PackedSequences(TorchFunctionMode):
    """While it is active, sequences can be packed, unpacked and given to recurrent layers."""

    def __init__(self, ragged: RaggedTensors) -> None:
        super().__init__()
        self._ragged = ragged
        #: By the node of the batch sizes, with which PyTorch hands a packed sequence on.
        self._packings: dict[Any, _Packing] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _VF._pack_padded_sequence:
            return self._pack(*args, **kwargs)
        if func == _VF._pad_packed_sequence:
            return self._pad(*args, **kwargs)
        if func in _CELLS and not kwargs and isinstance(args[3], (tuple, list)):  # data, batch sizes, state, weights
            return self._run(_CELLS[func], *args)
        return func(*args, **kwargs)

    def _pack(
        self, padded: torch.Tensor, lengths: torch.Tensor, batch_first: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        padded = padded.transpose(0, 1) if batch_first else padded
        _check_lengths(lengths, padded)
        num_steps = int(lengths.max())
        mask = torch.arange(num_steps).unsqueeze(1) < lengths
        packing = _Packing(self._ragged, mask)
        batch_sizes = mask.sum(1)
        self._packings[self._ragged.node_of(batch_sizes)] = packing
        return packing.pack(padded[:num_steps]), batch_sizes

    def _pad(
        self, data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, padding_value: float, total_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        packing = self._packing_of(data, batch_sizes)
        padded = packing.unpack(data, padding_value)
        missing = max(0, total_length - padded.shape[0])
        if missing:
            behind = padded.new_full((missing, *padded.shape[1:]), padding_value)
            padded = torch.cat([padded, behind])
        return padded.transpose(0, 1) if batch_first else padded, packing.mask.sum(0)

    def _packing_of(self, data: torch.Tensor, batch_sizes: torch.Tensor) -> _Packing:
        node = self._ragged.node_of(batch_sizes)
        if node is None or node not in self._packings:  # packed before the trace
            mask = torch.arange(int(batch_sizes[0])) < batch_sizes.unsqueeze(1)
            self._packings[node] = _Packing(self._ragged, mask, data.shape[0])
        return self._packings[node]

    def _run(
        self,
        cell: Cell,
        data: torch.Tensor,
        batch_sizes: torch.Tensor,
        state: Any,
        weights: Sequence[torch.Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
    ) -> tuple[torch.Tensor, ...]:
        packing = self._packing_of(data, batch_sizes)
        states = list(state) if isinstance(state, (tuple, list)) else [state]
        num_directions = 2 if bidirectional else 1
        per_direction = len(weights) // (num_layers * num_directions)
        ends: list[list[torch.Tensor]] = []
        values = packing.unpack(data)
        for layer in range(num_layers):
            outputs = []
            for direction in range(num_directions):
                number = layer * num_directions + direction
                start = [item[number] for item in states]
                own = weights[number * per_direction : (number + 1) * per_direction]
                steps = range(values.shape[0]) if direction == 0 else range(values.shape[0] - 1, -1, -1)
                output, end = _layer(cell, values, packing.mask, start, own, has_biases, steps)
                outputs.append(output)
                ends.append(end)
            values = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if dropout and training and layer < num_layers - 1:
                values = F.dropout(values, dropout)
        return packing.pack(values), *(torch.stack(items) for items in zip(*ends, strict=True))


class _Packing:
    """Where the elements of padded sequences stand in a packed one.

    Args:
        ragged: of the trace.
        mask: which elements there are, [time, batch].
        num_rows: how many these are, if that is known.
    """

    def __init__(self, ragged: RaggedTensors, mask: torch.Tensor, num_rows: int | None = None) -> None:
        self.mask = mask
        self._ragged = ragged
        flat = mask.reshape(-1)
        if num_rows is None:
            self._order = flat.nonzero()[:, 0]
        else:
            self._order = torch.argsort((~flat).to(torch.int32), stable=True)[:num_rows]
        self._place = (flat.to(torch.int64).cumsum(0) - 1).clamp(min=0)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Returns the rows that there are, of [time, batch, ...]."""
        return padded.flatten(0, 1)[self._order]

    def unpack(self, data: torch.Tensor, padding_value: float = 0.0) -> torch.Tensor:
        """Returns the rows in their places, [time, batch, ...]."""
        rows: torch.Tensor = _Spread.apply(self._ragged, self._order, self._place, data)
        padded = rows.reshape(*self.mask.shape, *data.shape[1:])
        mask = self.mask.reshape(*self.mask.shape, *[1] * (padded.dim() - 2))
        return torch.where(mask, padded, torch.full((), padding_value, dtype=padded.dtype))


class _Spread(torch.autograd.Function):
    """Puts packed rows at their places among all. The rows at other places mean nothing, and have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, ragged: RaggedTensors, order: torch.Tensor, place: torch.Tensor, data: torch.Tensor
    ) -> torch.Tensor:
        ctx.order = order
        rows = data.clone()
        ragged.forget(rows)
        return rows[place]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        [grad] = grads
        return None, None, None, grad[ctx.order]


def _check_lengths(lengths: torch.Tensor, padded: torch.Tensor) -> None:
    """Raises what PyTorch does where it cannot pack: how many rows there are is asked of the lengths."""
    if lengths.shape != padded.shape[1:2]:
        raise RuntimeError(
            f"Expected `len(lengths)` to be equal to batch_size, but got {lengths.numel()} "
            f"(batch_size={padded.shape[1]})"
        )
    if bool((lengths <= 0).any()):
        raise RuntimeError(
            "Length of all samples has to be greater than 0, but found an element in 'lengths' that is <= 0"
        )
    if bool((lengths[1:] > lengths[:-1]).any()):
        raise RuntimeError("`lengths` array must be sorted in decreasing order when `enforce_sorted` is True")
    if bool((lengths > padded.shape[0]).any()):
        raise RuntimeError(f"Expected all `lengths` to be at most {padded.shape[0]}, the size of the padded sequence")


def _layer(
    cell: Cell,
    values: torch.Tensor,
    mask: torch.Tensor,
    state: list[torch.Tensor],
    weights: Sequence[torch.Tensor],
    has_biases: bool,
    steps: range,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Goes through the time steps of one layer in one direction; returns its output at each, and the last state."""
    of_input, of_state, *rest = weights
    biases = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
    project = rest[0] if rest else None
    gates = F.linear(values, of_input, biases[0])
    outputs: list[torch.Tensor] = [state[0]] * values.shape[0]
    for step in steps:
        new = cell(gates[step], state, lambda hidden: F.linear(hidden, of_state, biases[1]))
        if project is not None:
            new[0] = F.linear(new[0], project)
        is_there = mask[step].unsqueeze(-1)
        state = [torch.where(is_there, item, old) for item, old in zip(new, state, strict=True)]
        outputs[step] = state[0]
    return torch.stack(outputs), state


def _lstm(gates: torch.Tensor, state: Sequence[torch.Tensor], of_state: Any) -> list[torch.Tensor]:
    hidden, memory = state
    keep_new, keep_old, candidate, show = (gates + of_state(hidden)).chunk(4, -1)
    memory = keep_old.sigmoid() * memory + keep_new.sigmoid() * candidate.tanh()
    return [show.sigmoid() * memory.tanh(), memory]


def _gru(gates: torch.Tensor, state: Sequence[torch.Tensor], of_state: Any) -> list[torch.Tensor]:
    [hidden] = state
    (reset, update, candidate), (old_reset, old_update, old) = gates.chunk(3, -1), of_state(hidden).chunk(3, -1)
    update = (update + old_update).sigmoid()
    candidate = (candidate + (reset + old_reset).sigmoid() * old).tanh()
    return [candidate + update * (hidden - candidate)]


def _rnn_tanh(gates: torch.Tensor, state: Sequence[torch.Tensor], of_state: Any) -> list[torch.Tensor]:
    return [(gates + of_state(state[0])).tanh()]


def _rnn_relu(gates: torch.Tensor, state: Sequence[torch.Tensor], of_state: Any) -> list[torch.Tensor]:
    return [(gates + of_state(state[0])).relu()]


_CELLS: dict[Any, Cell] = {_VF.lstm: _lstm, _VF.gru: _gru, _VF.rnn_tanh: _rnn_tanh, _VF.rnn_relu: _rnn_relu}
