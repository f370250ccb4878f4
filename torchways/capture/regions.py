"""Labels on the nodes of a traced graph: the slice and the call that an operator belongs to.

The tracer writes them, and the partitioner reads them. This module knows nothing of either.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchways.mesh import VirtualSlice

#: Key of `node.meta`: the `Region` of a node. A node without one is placed by the partitioner.
REGION_KEY = "tw_region"

#: Key of `node.meta`: True where backward computes again what forward computed (a checkpoint).
RECOMPUTED_KEY = "tw_recomputed"

#: Key of `node.meta`: True where the operator is part of an optimizer's step.
UPDATE_KEY = "tw_update"


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
    """

    mesh: VirtualSlice | None
    call: int
    name: str
    backward: bool = False
    is_repeated: bool = False
