"""PyTorch computes on one thread in every process of the tests, and XLA does not optimize what it compiles.

Threads of PyTorch spin while they wait for each other. With two pytest processes and their executors on the same cores,
that takes most of the processor time: training a small model took ten times as long.

Models of tests are small: XLA's compilation took half of the processor time of many tests, and code without LLVM's
optimization is fast enough for them. `make test-all` leaves XLA_FLAGS empty and checks the code that users run.
"""

import os

# Before torch is imported; scripts and executors that tests start inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
