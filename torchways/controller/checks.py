"""Checks of a captured graph against what the executors can run."""

from __future__ import annotations

from collections.abc import Collection

import torch

from torchways.capture.collectives import ALL_REDUCE
from torchways.controller.session import Session
from torchways.errors import CaptureError
from torchways.graphs import SOURCE_KEY
from torchways.mesh import VirtualSlice

_NO_TYPES_OF_XLA = {torch.complex32}


def not_lowered(
    graph: torch.fx.Graph, session: Session, meshes: list[VirtualSlice]
) -> dict[torch._ops.OpOverload, list[str]]:
    """Returns the operators that the executors would run on the host, with the user's lines."""
    supported = [executor.lowered_ops for mesh in meshes for executor in session.slices.address(mesh).executors]
    targets = {node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)} - {ALL_REDUCE}
    lacking = {item for item in targets if not all(_is_lowered(item, operators) for operators in supported)}
    missing: dict[torch._ops.OpOverload, list[str]] = {}
    for node in graph.nodes if lacking else ():
        if node.target in lacking:
            lines = missing.setdefault(node.target, [])
            if (line := node.meta.get(SOURCE_KEY, "")) not in lines:
                lines.append(line)
    return missing


def check_lowered(graph: torch.fx.Graph, session: Session, meshes: list[VirtualSlice]) -> None:
    """Refuses operators that the executors would run on the host, and types that XLA does not have.

    Raises:
        CaptureError: names every such operator with the user's lines.
    """
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype in _NO_TYPES_OF_XLA:
            raise CaptureError(f"{value.dtype} is no type of XLA's; used at {node.meta.get(SOURCE_KEY, '')}")
    if missing := not_lowered(graph, session, meshes):
        listing = "\n".join(f"  {operator_name(target)} at {', '.join(lines)}" for target, lines in missing.items())
        raise CaptureError(
            f"these operators have no lowering to XLA:\n{listing}\n"
            "write them with other operators, or compute them outside the program"
        )


def _is_lowered(operator: torch._ops.OpOverload, lowered: Collection[str]) -> bool:
    name = operator._schema.name.split("::")[1]
    if operator.namespace == "prims" and hasattr(torch.ops.aten, name):  # it runs as the operator of that name
        packet = getattr(torch.ops.aten, name)
        return any(operator_name(getattr(packet, overload)) in lowered for overload in packet.overloads())
    return operator_name(operator) in lowered


def operator_name(operator: torch._ops.OpOverload) -> str:
    """Returns "aten::add.Tensor" for an operator; the default overload has no suffix."""
    name = operator._schema.name
    overload = operator._schema.overload_name
    return f"{name}.{overload}" if overload else str(name)
