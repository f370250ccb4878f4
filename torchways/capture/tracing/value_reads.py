"""Questions of a traced function about values.

They are answered if the values are known. If an answer may differ at the next call, it is a condition of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from torchways.array import Array
from torchways.capture.python_state.tokens import TensorSource
from torchways.capture.source import user_line
from torchways.capture.tracing.known_values import ArgumentRead, KnownValues
from torchways.capture.tracing.trace import GraphInput
from torchways.errors import DataDependentError
from torchways.mesh import tensor_text

#: A condition of a trace compares no tensors with more elements than this.
_MAX_POSITIONS = 1024


class ValueReads:
    """The values that one trace asks for.

    Args:
        inputs: the trace's, which grow.
        node_of: returns the node of a tensor, which becomes an input if it is none of the trace yet.
        host_arguments: the call's tensors whose values the trace may read, by position; None: it may not.
        reads_positions: whether it may also ask them for the positions of what is selected.

    Attributes:
        reads: what was read of the call's tensors and of Python's state.
    """

    def __init__(
        self,
        inputs: list[GraphInput],
        node_of: Callable[[torch.Tensor], torch.fx.Node | None],
        host_arguments: Sequence[torch.Tensor | None],
        reads_positions: bool,
    ) -> None:
        self.reads: list[ArgumentRead] = []
        self._inputs = inputs
        self._node_of = node_of
        self._host_arguments = host_arguments
        self._reads_positions = reads_positions
        self._known = KnownValues(self._start_of)

    def ask(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls an operator whose result, or its shape, depends on values: possible where these are known.

        Returns:
            its result; tensors in it are on the host.

        Raises:
            DataDependentError: they are not.
        """
        values: dict[int, torch.Tensor] = {}
        nodes: dict[int, torch.fx.Node] = {}
        for tensor in tensors_in((args, kwargs)):
            value = tensor.constant if is_known_constant(tensor) else None  # type: ignore[attr-defined]
            if value is None and (node := self._node_of(tensor)) is not None:
                value = self._known.value_of(node)
                nodes[id(tensor)] = node
            if value is None:
                raise DataDependentError(_data_dependent(func, tensor, self._is_input(nodes.get(id(tensor)))))
            values[id(tensor)] = value
        with _disable_current_modes(), torch.no_grad():
            known_args, known_kwargs = pytree.tree_map_only(
                torch.Tensor, lambda tensor: values[id(tensor)], (args, kwargs)
            )
            result = func(*known_args, **known_kwargs)
            read = self._known.read(func, nodes, values, args, kwargs, result, user_line())
        if read is not None:
            if not self._may_be_kept(result, read):
                raise DataDependentError(_many_values(func))
            self.reads.append(read)
        return result

    def _may_be_kept(self, value: Any, read: ArgumentRead) -> bool:
        """Whether a trace may hold for calls whose tensors have this value in common."""
        is_state = not any(isinstance(source, int) for source in read.sources)
        if type(value) in (bool, int) or (is_state and type(value) is float):
            return True
        leaves = pytree.tree_leaves(value)
        return (is_state or self._reads_positions) and all(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.int64 and leaf.numel() <= _MAX_POSITIONS
            for leaf in leaves
        )

    def _is_input(self, node: torch.fx.Node | None) -> bool:
        """Whether a node is given to the graph, and not computed."""
        return any(item.node is node for item in self._inputs)

    def _start_of(self, node: torch.fx.Node) -> tuple[Any, torch.Tensor | None]:
        """Returns what a placeholder stands for, and its value where the trace may read that.

        Of arrays it may read those of one element: counters and flags. A parameter never has the same value again.
        """
        source: Any = next((item.source for item in self._inputs if item.node is node), None)
        if isinstance(source, int):
            return source, self._host_arguments[source]
        if isinstance(source, TensorSource):
            tensor = source.tensor
            if not isinstance(tensor, Array):
                return source, tensor
            is_small = tensor.numel() == 1 and not tensor.requires_grad
            return source, tensor._buffer.read() if is_small else None
        return None, source if type(source) is torch.Tensor else None


def is_known_constant(value: Any) -> bool:
    """Whether a fake tensor knows its value."""
    return isinstance(value, FakeTensor) and value.constant is not None


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Returns the tensors of a pytree."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _data_dependent(operator: Any, tensor: torch.Tensor, is_array: bool) -> str:
    what = "the array" if is_array else "a computed tensor"
    text = f"{what} {tensor_text(tensor.dtype, tensor.shape)}"
    return (
        f"the program depends on the value of {text} ({operator}) at {user_line()}, and has no one graph for all "
        "values: select with torch.where, or return the tensor and decide outside the program"
    )


def _many_values(operator: Any) -> str:
    return (
        f"the program depends on the value of a host tensor ({operator}) at {user_line()}, where only bools and "
        "integers may be asked for: other values seldom come again, and each would need a graph of its own; pass a "
        "Python number, or compute with the tensor"
    )
