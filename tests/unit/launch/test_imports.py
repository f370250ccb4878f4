"""Processes of the control plane start fast: they import no torch."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "torchways.cluster.server",
        "torchways.island.server",
        "torchways.launch.node",
        "torchways.run",
        "torchways.cli.main",
    ],
)
def test_the_control_plane_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
