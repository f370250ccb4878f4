"""Labels on the nodes of a traced graph: the slice, the call and the loop that an operator belongs to.

The tracer writes them, and the partitioner reads them. This module knows nothing of either.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchways.mesh import VirtualSlice
from torchways.schedules import AUTO, Schedule

#: Key of `node.meta`: the `Region` of a node. A node without one is placed by the partitioner.
REGION_KEY = "tw_region"

#: Key of `node.meta`: True where backward computes again what forward computed (a checkpoint).
RECOMPUTED_KEY = "tw_recomputed"

#: Key of `node.meta`: True where the operator is part of an optimizer's step.
UPDATE_KEY = "tw_update"

#: Key of `node.meta`: True where autograd made the operator.
BACKWARD_KEY = "tw_backward"

#: Key of `node.meta`: the (`LoopLabel`, number of the body) of a node that is part of a loop's body.
LOOP_KEY = "tw_loop"

#: Key of `node.meta`: the (`LoopLabel`, number) of the value that a CARRY or an EXIT node (operators.py) stands for.
CARRY_KEY = "tw_carry"

#: Key of `node.meta`: of how many sums over replicas the addends come before an operator of backward on its slice.
#: Operators with other numbers are other computations, so that a sum starts while backward goes on.
PART_KEY = "tw_part"

#: All keys that say what a node is part of.
LABEL_KEYS = (REGION_KEY, RECOMPUTED_KEY, UPDATE_KEY, BACKWARD_KEY, LOOP_KEY, CARRY_KEY, PART_KEY)


@dataclass(frozen=True, slots=True, eq=False)
class LoopLabel:
    """A loop over microbatches: its body is traced once, or twice if the last microbatch is smaller.

    Attributes:
        num_turns: number of microbatches.
        schedule: name of the schedule, or the schedule.
        line: the user's line.
    """

    num_turns: int
    schedule: str | Schedule
    line: str

    @property
    def is_automatic(self) -> bool:
        """Whether its schedule is searched for."""
        return isinstance(self.schedule, str) and self.schedule.lower() == AUTO


@dataclass(frozen=True, slots=True)
class Region:
    """The slice and the compiled-function call that an operator belongs to.

    Attributes:
        mesh: slice that it runs on; None: to be inferred.
        call: number of the compiled-function call that it belongs to, or -1 for what runs between calls. Operators of
            one call are next to each other in the order of the trace.
        name: that function's name.
        backward: whether autograd made it.
        is_repeated: whether the call is of a region that is compiled once (`torch.compiler.nested_compile_region`);
            its backward is a call of its own then.
        stage: number of the pipeline's stage, or -1.
        replica: number of the replica of a module that it belongs to.
    """

    mesh: VirtualSlice | None
    call: int
    name: str
    backward: bool = False
    is_repeated: bool = False
    stage: int = -1
    replica: int = 0
