"""A recorder that labels each node: its slice and call, the user's line, and whether it recomputes or updates.

A node that autograd makes gets the labels of the forward operator whose gradient it computes. It is found by autograd's
sequence numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchways.capture.regions import (
    BACKWARD_KEY,
    LOOP_KEY,
    RECOMPUTED_KEY,
    REGION_KEY,
    UPDATE_KEY,
    LoopLabel,
    Region,
)
from torchways.capture.replica_trace import ReplicaTrace
from torchways.capture.source import user_line
from torchways.capture.tracing.recorder import Recorder
from torchways.errors import PlacementError
from torchways.graphs import SOURCE_KEY
from torchways.mesh import Placements, VirtualSlice
from torchways.operators import CONSTRAIN


@dataclass(frozen=True, slots=True)
class _Label:
    """What an operator is part of: the labels that its nodes get."""

    region: Region | None
    line: str
    is_recomputed: bool
    is_update: bool
    is_backward: bool


class LabellingRecorder(Recorder):
    """Records what runs inside, with labels on the nodes; see `Recorder`.

    Attributes:
        region: the region of what is called now, outside of backward.
        in_optimizer: whether an optimizer's step is running.
    """

    def __init__(self, fake_mode: FakeTensorMode, decompositions: Mapping[Any, Any]) -> None:
        super().__init__(fake_mode, decompositions)
        self.region: Region | None = None
        self.in_optimizer = False
        #: The label of the operator under way.
        self._label = _Label(None, "", False, False, False)
        self.replicas = ReplicaTrace()
        #: The loop whose body is traced, and the number of the body.
        self.loop: tuple[LoopLabel, int] | None = None
        self._calls = 0
        #: The repeated region whose backward runs, and the region that its operators get.
        self._backward: tuple[Region, Region] | None = None
        #: Region and line of the forward operator that made an autograd node, by its sequence number.
        self._of_sequence: dict[int, tuple[Region | None, str]] = {}

    # ---- regions

    @contextmanager
    def unplaced(self) -> Iterator[None]:
        """What is called inside runs wherever it is needed."""
        outer, self.region = self.region, None
        try:
            yield
        finally:
            self.region = self._another_call(outer)

    @contextmanager
    def placed(self, mesh: VirtualSlice) -> Iterator[None]:
        """What is called inside runs on `mesh`, outside of the call under way."""
        outer, self.region = self.region, Region(mesh, -1, "")
        try:
            yield
        finally:
            self.region = self._another_call(outer)

    @contextmanager
    def function_call(self, mesh: VirtualSlice, name: str) -> Iterator[None]:
        """Makes all that runs inside part of one call of the compiled function `name` on `mesh`."""
        outer = self.region
        if outer is not None and outer.call >= 0 and outer.mesh is not None:
            yield  # a function called by a function is part of it
            return
        with self._call_of(self._new_region(mesh, name)):
            yield

    @contextmanager
    def repeated_region(self, name: str) -> Iterator[None]:
        """Makes what runs inside a compiled function, and its backward another; equal ones are compiled once."""
        mesh = self.region.mesh if self.region is not None else None
        with self._call_of(
            Region(
                mesh, self._next_call(), name, is_repeated=True, stage=self._stage(), replica=self.replicas.number or 0
            )
        ):
            yield

    @contextmanager
    def _call_of(self, region: Region) -> Iterator[None]:
        outer, self.region = self.region, region
        try:
            yield
        finally:
            inner = self.region
            began = inner.mesh is not region.mesh or inner.stage != region.stage
            if (outer is None or outer.call < 0) and began:  # another stage
                outer = replace(inner, call=-1, is_repeated=False) if inner.mesh is not None else None
            self.region = self._another_call(outer)

    def _another_call(self, region: Region | None) -> Region | None:
        """Returns the region for the rest of a call, after something that is no part of it."""
        return replace(region, call=self._next_call()) if region is not None and region.call >= 0 else region

    def _stage(self) -> int:
        return self.region.stage if self.region is not None else -1

    def _new_region(self, mesh: VirtualSlice | None, name: str) -> Region:
        replica = self.replicas.number or 0
        return Region(mesh, self._next_call(), name, stage=self._stage(), replica=replica)

    def _next_call(self) -> int:
        self._calls += 1
        return self._calls - 1

    @contextmanager
    def stage(self, mesh: VirtualSlice, name: str, stage_index: int = -1) -> Iterator[None]:
        """Places what runs inside on `mesh`, until other stages begin within it."""
        outer = self.region
        self.enter_stage(mesh, name, stage_index)
        try:
            yield
        finally:
            self.region = self._another_call(outer)

    def is_alone(self) -> bool:
        """Whether what is called now is training on one device, outside a repeated region."""
        region = self.region
        if region is None or region.mesh is None or region.is_repeated:
            return False
        return region.mesh.root.size() == 1 and torch.is_grad_enabled()

    def enter_stage(self, mesh: VirtualSlice | None, name: str = "", stage_index: int = -1) -> None:
        """Places what runs from here on on `mesh`, as part of whatever runs there; None: places it by its inputs.

        Args:
            stage_index: number of the pipeline's stage that begins here; -1: it is the one that there is on `mesh`.
        """
        if stage_index < 0 and self.region is not None and self.region.mesh is mesh:
            stage_index = self.region.stage
        replica = self.replicas.number or 0
        if self.region is None or self.region.call < 0:
            self.region = Region(mesh, -1, name, stage=stage_index, replica=replica) if mesh is not None else None
        elif (self.region.mesh is not mesh or self.region.stage != stage_index) and (
            self.region.is_repeated or self.region.mesh is None
        ):
            self.region = replace(self.region, mesh=mesh, call=self._next_call(), stage=stage_index, replica=replica)

    def constrain(self, tensor: torch.Tensor, mesh: VirtualSlice, placements: Placements) -> torch.Tensor:
        """Returns the tensor, on `mesh` and sharded so.

        Raises:
            PlacementError: a compiled function of another slice is being called.
        """
        saved = self.region
        if saved is None or saved.call < 0:
            self.region = Region(mesh, -1, "" if saved is None else saved.name, stage=self._stage())
        elif saved.mesh is None:
            self.region = replace(saved, mesh=mesh)
        elif saved.mesh.root is not mesh.root:
            raise PlacementError(
                f"{saved.name} runs on mesh {saved.mesh} as a whole, and cannot place a tensor on another slice, mesh "
                f"{mesh}, at {user_line()}"
            )
        try:
            return CONSTRAIN(tensor, " ".join(placements))
        finally:
            self.region = saved

    def _end_call(self) -> None:
        """Begins another call, after an operator that is no part of any."""
        self.region, self._backward = self._another_call(self.region), None

    # ---- labels

    def _label_now(self) -> _Label:
        autograd_node = torch._C._current_autograd_node()
        if autograd_node is not None:
            region, line = self._of_sequence.get(autograd_node._sequence_nr(), (None, ""))  # type: ignore[attr-defined]
            region = self._backward_region(region)
        elif self._backward is not None and torch._C._current_graph_task_id() != -1:  # it adds up gradients
            region, line = self._backward[1], ""
        else:
            region, line = self.region, user_line()
            self._backward = None
        # The sequence number was raised when the operator's autograd node was made, just before this dispatch. An
        # operator that needs no gradient makes none, and finds the number of the one before. Within backward, nodes
        # are made where a checkpoint computes its forward again.
        sequence = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
        self._of_sequence.setdefault(sequence, (region, line))
        # Backward's own formulas run without gradients, the forward of a checkpoint with.
        is_recomputed = autograd_node is not None and torch.is_grad_enabled()
        is_backward = torch._C._current_graph_task_id() != -1
        return _Label(region, line, is_recomputed, self.in_optimizer, is_backward)

    def _backward_region(self, forward: Region | None) -> Region | None:
        """Returns the region of an operator that autograd made for one of a region."""
        if forward is None and self._backward is not None:  # it adds up gradients
            return self._backward[1]
        if forward is not None and forward.call >= 0 and forward == self.region:
            return forward  # a function that computes gradients itself, and goes on with them, is one node
        if forward is None or not forward.is_repeated:
            self._backward = None
            return replace(forward, backward=True) if forward is not None and not forward.backward else forward
        if self._backward is None or forward not in self._backward:
            self.region = self._another_call(self.region)
            self._backward = forward, replace(forward, backward=True, call=self._next_call())
        return self._backward[1]

    def is_current(self, view: torch.fx.Node) -> bool:
        """Within a loop's body, a view is taken of what the turn gets; behind it, of what the last turn left."""
        return view.meta.get(LOOP_KEY) == self.loop

    def label(self, node: torch.fx.Node) -> None:
        label, meta = self._label, node.meta
        if label.is_recomputed:
            meta[RECOMPUTED_KEY] = True
        if label.is_update:
            meta[UPDATE_KEY] = True
        if label.is_backward:
            meta[BACKWARD_KEY] = True
        if label.region is not None:
            meta[REGION_KEY] = label.region
        if self.loop is not None:
            meta[LOOP_KEY] = self.loop
        meta[SOURCE_KEY] = label.line
