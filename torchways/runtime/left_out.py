"""What executors never use of torch-xla and PyTorch, whose imports take half of an executor's start (3.5 of 7 s)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def _unavailable(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("an executor imports torch-xla without its export to StableHLO")


#: Export and a GRU by scan import PyTorch's compilers: 1.5 to 2 s. Nothing public leaves them out. torch-xla puts its
#: GRU in the place of PyTorch's, which therefore stands in for it.
_STAND_INS: dict[str, dict[str, Any]] = {
    "torch_xla.stablehlo": {"save_as_stablehlo": _unavailable, "save_torch_model_as_stablehlo": _unavailable},
    "torch_xla.experimental.gru": {"GRU": torch.nn.GRU},
}


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """While inside, a first import of torch_xla does without them; whoever imports them later has them."""
    dynamo = SimpleNamespace(config=SimpleNamespace())  # torch-xla sets options there, which would import it: 1.3 s
    if "torch._dynamo" not in sys.modules:
        vars(torch)["_dynamo"] = dynamo
    names = _STAND_INS.keys() - sys.modules.keys()
    for name in names:
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(_STAND_INS[name])
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        if vars(torch).get("_dynamo") is dynamo:
            del vars(torch)["_dynamo"]
