"""PyTorch computes on one thread in every process of the tests.

Its threads spin while they wait for each other. With two pytest processes and their executors on the same cores, that
takes most of the processor time: training a small model took ten times as long.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; scripts that tests start inherit it
