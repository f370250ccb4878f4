"""From what was captured to a variant that can be called: lowered, and registered with the slices that run it."""

from __future__ import annotations

from typing import Any

from torchways.capture.python_state.conditions import Conditions
from torchways.controller.bindings import StateTensor
from torchways.controller.parity.report import active_parity
from torchways.controller.session import Session
from torchways.controller.variant import Captured, Dispatch, Variant, make_piece
from torchways.mesh import VirtualSlice
from torchways.passes.lower import lower
from torchways.passes.sequential import sequential, whole


def variant_of(
    captured: Captured,
    meshes: list[VirtualSlice],
    session: Session,
    state: Conditions,
    reads: list[Any],
    dispatch: Dispatch = "parallel",
    traced_seconds: float = 0.0,
) -> Variant:
    """Lowers and registers what was captured."""
    program = captured.program
    pieces = [whole(program)] if dispatch == "parallel" else sequential(program)
    variant = Variant(
        captured=captured,
        lowered=lower(program),
        pieces=[make_piece(captured, piece, meshes) for piece in pieces],
        meshes=meshes,
        session=session,
        state=state,
        reads=reads,
        traced_seconds=traced_seconds,
    )
    for piece in variant.pieces:
        for slice_index, items in piece.arguments.items():
            for item in items:
                if isinstance(item.binding, StateTensor):
                    item.binding.source.home = (meshes[slice_index], item.placements)
    if active_parity() is None:
        variant.bind(variant.pieces)
    else:
        variant.observed()
    return variant
