"""What executors do without of torch-xla."""

import subprocess
import sys

CODE = """
import sys, torch
gru = torch.nn.GRU
import torchways.runtime.xla
assert torch.nn.GRU is gru
assert "torch._inductor.lowering" not in sys.modules, "torch-xla imports PyTorch's compilers some other way now"
assert "torch._dynamo" not in sys.modules
assert torch._dynamo.config.suppress_errors in (True, False)
import torch_xla, torch_xla.stablehlo
assert torch_xla.stablehlo.save_as_stablehlo.__module__ == "torch_xla.stablehlo"
"""


def test_executors_import_no_compilers_and_others_may():
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=120)
