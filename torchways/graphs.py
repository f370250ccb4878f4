"""Captured graphs as bytes: how a controller hands a compiled function to executors, without pickle.

The format is torch.export's own (a zip of JSON; `torch.export.save`), so operators, symbolic values and versions are
PyTorch's business. A graph here is flat and functional: placeholders are tensors, the output is a tuple of tensors.
"""

from __future__ import annotations

import io

import torch
import torch.utils._pytree as pytree
from torch.export.exported_program import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

import torchways.operators  # noqa: F401  (graphs have its operators)

#: Key of `node.meta`: the user's line that a node comes from, "train.py:41 in train_step".
SOURCE_KEY = "tw_source"


def serialize_graph(graph_module: torch.fx.GraphModule) -> bytes:
    """Returns `graph_module` as bytes.

    Args:
        graph_module: flat, functional, core ATen; every node has a fake tensor in ``meta["val"]``. Its nodes'
            ``meta["tw_source"]`` travels along.
    """
    inputs = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    outputs = [str(node.name) for node in graph_module.graph.output_node().args[0]]  # type: ignore[union-attr]
    for node in graph_module.graph.nodes:
        node.meta = {"val": node.meta.get("val"), SOURCE_KEY: node.meta.get(SOURCE_KEY, "")}
        node.meta["stack_trace"] = node.meta[SOURCE_KEY]  # the field that torch.export's format keeps
    signature = ExportGraphSignature(
        input_specs=[InputSpec(InputKind.USER_INPUT, TensorArgument(name=name), None) for name in inputs],
        output_specs=[OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=name), None) for name in outputs],
    )
    exported = ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=signature,
        state_dict={},
        range_constraints={},
        module_call_graph=[
            ModuleCallEntry(
                fqn="",
                signature=ModuleCallSignature(
                    inputs=[],
                    outputs=[],
                    in_spec=pytree.tree_structure((tuple(inputs), {})),
                    out_spec=pytree.tree_structure(tuple(outputs)),
                ),
            )
        ],
    )
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


def deserialize_graph(data: bytes) -> torch.fx.GraphModule:
    """Returns the graph that `serialize_graph` wrote; nodes have ``meta["val"]`` and ``meta["tw_source"]``."""
    graph_module = torch.export.load(io.BytesIO(data)).graph_module
    for node in graph_module.graph.nodes:
        node.meta[SOURCE_KEY] = node.meta.get("stack_trace") or ""
    return graph_module
