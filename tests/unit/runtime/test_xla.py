"""torch-xla as a runtime, in processes of their own, with the environment that executors get."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchways.launch.environment import executor_environment

SCRIPT = Path(__file__).with_name("xla_checks.py")


def check(num_devices, num_executions):
    environment = executor_environment("cpu", range(num_devices), os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(SCRIPT), str(num_devices), str(num_executions)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.stdout == "all right\n", done.stderr


@pytest.mark.parametrize("num_devices", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_runtime(num_devices):
    check(num_devices, 300)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_soak(num_devices):
    """With XLA's default thread pool this deadlocks; launch/environment.py sets a larger one."""
    check(num_devices, 3000)
