"""From what was captured to a variant that can be called: lowered, and registered with the slices that run it."""

from __future__ import annotations

from typing import Any

from torchways.capture.python_state.conditions import Conditions
from torchways.controller.bindings import StateTensor
from torchways.controller.fitting import automatic_loops, fitted
from torchways.controller.parity.report import active_parity
from torchways.controller.session import Session
from torchways.controller.variant import BoundPiece, Captured, Dispatch, ScheduleSearch, Variant, make_piece
from torchways.mesh import VirtualSlice
from torchways.passes.lower import lower
from torchways.passes.sequential import sequential, whole


def pieces_of(captured: Captured, meshes: list[VirtualSlice], dispatch: Dispatch) -> list[BoundPiece]:
    """Returns what a call dispatches, not registered yet; state that is on the host will go where it is read."""
    cut = [whole(captured.program)] if dispatch == "parallel" else sequential(captured.program)
    pieces = [make_piece(captured, piece, meshes) for piece in cut]
    for piece in pieces:
        for slice_index, items in piece.arguments.items():
            for item in items:
                if isinstance(item.binding, StateTensor):
                    item.binding.source.home = (meshes[slice_index], item.placements)
    return pieces


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
    captured = fitted(captured, meshes, session)
    variant = Variant(
        captured=captured,
        lowered=lower(captured.program),
        pieces=pieces_of(captured, meshes, dispatch),
        meshes=meshes,
        session=session,
        state=state,
        reads=reads,
        traced_seconds=traced_seconds,
        dispatch=dispatch,
        search=ScheduleSearch() if automatic_loops(captured) else None,
    )
    if active_parity() is None:
        variant.bind(variant.pieces)
    else:
        variant.observed()
    return variant
